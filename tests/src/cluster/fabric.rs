//! The network between the machines: namespaces, bridges and the router. Everything is made and
//! removed by `ip`.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::layout::{Host, Layout, OUTSIDE, OUTSIDE_V6, Subnet};
use super::process;

const FABRIC: &str = "fabric";

/// Makes the fabric and attaches every machine to it.
pub fn create(layout: &Layout) -> Result<()> {
    let fabric = layout.netns(FABRIC);
    batch(None, &[format!("netns add {fabric}")])?;
    batch(Some(&fabric), &fabric_plan(layout.dual_stack))?;
    set(&layout.netns_path(FABRIC), "net/ipv4/ip_forward", "1")?;
    if layout.dual_stack {
        set(
            &layout.netns_path(FABRIC),
            "net/ipv6/conf/all/forwarding",
            "1",
        )?;
    }
    for host in layout.hosts() {
        attach(layout, &host)?;
    }
    Ok(())
}

/// Gives a machine a new network namespace with an address on its subnet.
pub fn attach(layout: &Layout, host: &Host) -> Result<()> {
    batch(None, &attach_plan(layout, host))?;
    batch(Some(&layout.netns(FABRIC)), &port_plan(host))?;
    batch(Some(&layout.netns(&host.name)), &host_plan(host))?;
    // Enabling forwarding is the task of the node's agent.
    set(&layout.netns_path(&host.name), "net/ipv4/ip_forward", "0")
}

/// Removes a machine's network namespace with everything that was programmed into it.
pub fn detach(layout: &Layout, host: &Host) -> Result<()> {
    // The namespace itself ends some time after it was deleted; its port must not be in the way of
    // the next one.
    let _ = batch(
        Some(&layout.netns(FABRIC)),
        &[format!("link delete {}", host.name)],
    );
    batch(
        None,
        &[format!("netns delete {}", layout.netns(&host.name))],
    )
}

/// Removes whatever exists of the network of `layout`.
pub fn remove(layout: &Layout) -> Result<()> {
    let hosts = layout.hosts();
    let names = hosts.iter().map(|host| host.name.as_str()).chain([FABRIC]);
    let present = names.filter(|name| layout.netns_path(name).exists());
    let commands: Vec<String> = present
        .map(|name| format!("netns delete {}", layout.netns(name)))
        .collect();
    batch(None, &commands)
}

fn fabric_plan(dual_stack: bool) -> Vec<String> {
    let mut plan = vec![
        "link set lo up".to_owned(),
        format!("address add {OUTSIDE}/32 dev lo"),
    ];
    for subnet in Subnet::ALL {
        let bridge = subnet.bridge();
        plan.push(format!("link add {bridge} type bridge"));
        plan.push(format!("link set {bridge} up"));
        plan.push(format!("address add {}/24 dev {bridge}", subnet.gateway()));
        if dual_stack {
            plan.push(format!(
                "address add {}/64 dev {bridge} nodad",
                subnet.address_v6(1)
            ));
        }
    }
    if dual_stack {
        plan.push(format!("address add {OUTSIDE_V6}/128 dev lo nodad"));
    }
    plan
}

fn attach_plan(layout: &Layout, host: &Host) -> Vec<String> {
    let (netns, fabric) = (layout.netns(&host.name), layout.netns(FABRIC));
    vec![
        format!("netns add {netns}"),
        format!(
            "link add eth0 netns {netns} type veth peer name {} netns {fabric}",
            host.name
        ),
    ]
}

fn port_plan(host: &Host) -> Vec<String> {
    vec![format!(
        "link set {} master {} up",
        host.name,
        host.subnet.bridge()
    )]
}

fn host_plan(host: &Host) -> Vec<String> {
    let mut plan = vec![
        "link set lo up".to_owned(),
        format!("address add {}/24 dev eth0", host.address),
        "link set eth0 up".to_owned(),
        format!("route add default via {}", host.subnet.gateway()),
    ];
    if let Some(second) = host.address_v6 {
        plan.push(format!("address add {second}/64 dev eth0 nodad"));
        plan.push(format!(
            "route add default via {}",
            host.subnet.address_v6(1)
        ));
    }
    plan
}

/// Runs `ip` once for several commands, in a network namespace when one is named.
fn batch(netns: Option<&str>, commands: &[String]) -> Result<()> {
    if commands.is_empty() {
        return Ok(());
    }
    let mut ip = Command::new("ip");
    if let Some(netns) = netns {
        ip.args(["-n", netns]);
    }
    ip.args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = ip.spawn().context("cannot run ip (package iproute2)")?;
    let mut stdin = child.stdin.take().context("a pipe to ip")?;
    // A failure to write means that ip gave up; its stderr has the reason.
    let _ = std::io::Write::write_all(&mut stdin, (commands.join("\n") + "\n").as_bytes());
    drop(stdin);
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "ip in {}: {}\n{}",
        netns.unwrap_or("-"),
        stderr.trim(),
        commands.join("\n")
    );
    Ok(())
}

fn set(netns: &Path, name: &str, value: &str) -> Result<()> {
    process::in_netns(netns, || {
        std::fs::write(Path::new("/proc/sys").join(name), value)
            .with_context(|| format!("cannot set {name}"))
    })
}
