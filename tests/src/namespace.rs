//! Private network namespaces as nodes and pods, without names and without cleaning up: a namespace
//! goes when the last user of it goes.

use std::fs::File;
use std::io::{self, Write};
use std::process::{Command, Output, Stdio};
use std::thread;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use margay_api::network::Mac;
use margay_dataplane::routes::pod::{self, PodLink};
use margay_netlink::namespace;
use margay_netlink::route::RouteSocket;
use nix::sched::{CloneFlags, unshare};

/// A network namespace, held open.
#[derive(Debug)]
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// A new namespace with `lo` up. Needs root; the error mentions it.
    pub fn new() -> Result<Self> {
        let opened = thread::spawn(|| -> io::Result<File> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        });
        let file = opened
            .join()
            .expect("the thread does not panic")
            .context("a new network namespace; this test needs root")?;
        let namespace = Self { file };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The namespace as a file, for requests that take one.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A path that names the namespace as long as this value lives, in this process and those that
    /// it starts.
    pub fn path(&self) -> String {
        use std::os::fd::AsRawFd;
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Runs `work` on a thread inside the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        namespace::within(&self.file, work).expect("a namespace that is held open can be entered")
    }

    /// Connects a pod to this node as an ADD does: its link, addresses and the routes to them.
    /// Returns the pod's MAC address.
    pub fn connect_pod(&self, namespace: &Self, interface: &str, nets: &[IpNet]) -> Result<Mac> {
        self.run(|| {
            let mac = pod::pod_mac(interface, "eth0");
            let link = PodLink {
                host: interface,
                pod: "eth0",
                namespace: namespace.file(),
                mtu: 1450,
                mac,
            };
            let mut socket = RouteSocket::open()?;
            let index = pod::create_link(&mut socket, &link)?;
            let mac = pod::configure_pod(&link, nets)?;
            pod::add_routes(&mut socket, index, nets)?;
            Ok(mac)
        })
    }

    /// Runs a program inside, with text on its standard input; fails if the program fails, with its
    /// output.
    pub fn command(&self, program: &str, arguments: &[&str], input: &str) -> Result<String> {
        let output = self.run(|| -> Result<Output> {
            let mut child = Command::new(program)
                .args(arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .with_context(|| format!("start {program}"))?;
            child
                .stdin
                .take()
                .context("standard input")?
                .write_all(input.as_bytes())?;
            Ok(child.wait_with_output()?)
        })?;
        ensure!(
            output.status.success(),
            "{program} {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs `ip` with these arguments.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        self.command("ip", &arguments.split_whitespace().collect::<Vec<_>>(), "")
    }
}

/// Plugs a cable between two namespaces; each end gets an address with prefix length.
pub fn connect(one: (&Namespace, &str, &str), other: (&Namespace, &str, &str)) -> Result<()> {
    one.0.ip(&format!(
        "link add {} type veth peer name {} netns {}",
        one.1,
        other.1,
        other.0.path()
    ))?;
    for (namespace, name, address) in [one, other] {
        if !address.is_empty() {
            namespace.ip(&format!("addr add {address} dev {name}"))?;
        }
        // A router asks for its neighbours from the link-local address, and gives up after three
        // seconds; while that address is tentative, for a second or two after the link came up, it
        // asks nobody.
        let parameter = format!("net/ipv6/conf/{name}/accept_dad=0");
        namespace.command("sysctl", &["-eqw", &parameter], "")?;
        namespace.ip(&format!("link set {name} up"))?;
    }
    Ok(())
}
