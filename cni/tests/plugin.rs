//! The plugin as the container runtime runs it: a process with an environment, standard input, and
//! an agent to ask.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use expect_test::{Expect, expect, expect_file};
use margay_cni::agent::{self, TimeLimits};
use margay_cni::{Reply, run};
use margay_proto::cni::{self, Done, Ip, Outcome, Request, Response, Route, Verb};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// Environment that a runtime sets for a pod.
fn env(command: &str) -> Vec<(String, String)> {
    let pairs = [
        ("CNI_COMMAND", command),
        ("CNI_CONTAINERID", "abc123"),
        ("CNI_NETNS", "/var/run/netns/x"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin"),
        (
            "CNI_ARGS",
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;\
             K8S_POD_INFRA_CONTAINER_ID=abc123;K8S_POD_UID=u-1",
        ),
        ("TRACEPARENT", TRACE),
    ];
    pairs
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
}

fn config(version: &str, socket: &Path) -> Value {
    json!({
        "cniVersion": version,
        "name": "k8s-pod-network",
        "type": "margay",
        "ipam": {"type": "calico-ipam"},
        "margay": {"socket": socket},
        "prevResult": {"cniVersion": version, "ips": [{"address": "10.0.0.7/32"}]},
        "cni.dev/valid-attachments": [{"containerID": "abc123", "ifname": "eth0"}],
    })
}

/// Runs the binary once.
fn plugin(env: &[(String, String)], stdin: &str) -> (String, i32) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_margay-cni"))
        .env_clear()
        .envs(env.iter().cloned())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start the plugin");
    child
        .stdin
        .take()
        .expect("stdin")
        .write_all(stdin.as_bytes())
        .expect("write");
    let output = child.wait_with_output().expect("wait");
    let stdout = String::from_utf8(output.stdout).expect("text");
    (stdout, output.status.code().expect("no signal"))
}

/// Runs the same code within this process, without waiting for an absent agent.
fn call(env: &[(String, String)], stdin: &str) -> Reply {
    let lookup = |name: &str| {
        env.iter()
            .find(|(key, _)| key == name)
            .map(|(_, v)| v.clone())
    };
    run(&lookup, &mut stdin.as_bytes(), Duration::ZERO)
}

fn code(reply: &Reply) -> u64 {
    assert!(!reply.success, "{}", reply.stdout);
    let error: Value = serde_json::from_str(&reply.stdout).expect("JSON");
    error["code"].as_u64().expect("code")
}

/// An agent that answers one request.
struct Agent {
    folder: TempDir,
    asked: JoinHandle<Request>,
}

impl Agent {
    fn answers(outcome: Option<Outcome>) -> Self {
        let folder = TempDir::new().expect("folder");
        let listener = UnixListener::bind(folder.path().join("cni.sock")).expect("bind");
        let asked = thread::spawn(move || answer(&listener, outcome));
        Self { folder, asked }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("cni.sock")
    }

    fn asked(self) -> Request {
        self.asked.join().expect("agent")
    }
}

fn answer(listener: &UnixListener, outcome: Option<Outcome>) -> Request {
    let (mut stream, _) = listener.accept().expect("accept");
    let request = cni::read(&mut stream).expect("request");
    cni::write(&mut stream, &Response { outcome }).expect("response");
    request
}

fn result() -> Outcome {
    let interface = |name: &str, mac: &str, sandbox: &str| cni::Interface {
        name: name.to_owned(),
        mac: mac.to_owned(),
        mtu: 1450,
        sandbox: sandbox.to_owned(),
    };
    let ip = |address: &str| Ip {
        address: address.to_owned(),
        gateway: String::new(),
        interface: Some(1),
    };
    let route = |dst: &str, gw: &str| Route {
        dst: dst.to_owned(),
        gw: gw.to_owned(),
        mtu: 1450,
        ..Route::default()
    };
    Outcome::Result(cni::Result {
        interfaces: vec![
            interface("cali12345678901", "ee:ee:ee:ee:ee:ee", ""),
            interface("eth0", "aa:bb:cc:dd:ee:ff", "/var/run/netns/x"),
        ],
        ips: vec![ip("10.0.0.7/32"), ip("fd00::7/128")],
        routes: vec![
            route("0.0.0.0/0", "169.254.1.1"),
            route("::/0", "fe80::ecee:eeff:feee:eeee"),
        ],
        dns: None,
    })
}

#[test]
fn add_prints_the_shape_of_each_version() {
    let wanted: [Expect; 4] = [
        expect![[r#"
            {"cniVersion":"0.3.1","interfaces":[{"name":"cali12345678901","mac":"ee:ee:ee:ee:ee:ee"},{"name":"eth0","mac":"aa:bb:cc:dd:ee:ff","sandbox":"/var/run/netns/x"}],"ips":[{"version":"4","interface":1,"address":"10.0.0.7/32"},{"version":"6","interface":1,"address":"fd00::7/128"}],"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"},{"dst":"::/0","gw":"fe80::ecee:eeff:feee:eeee"}],"dns":{}}
        "#]],
        expect![[r#"
            {"cniVersion":"0.4.0","interfaces":[{"name":"cali12345678901","mac":"ee:ee:ee:ee:ee:ee"},{"name":"eth0","mac":"aa:bb:cc:dd:ee:ff","sandbox":"/var/run/netns/x"}],"ips":[{"version":"4","interface":1,"address":"10.0.0.7/32"},{"version":"6","interface":1,"address":"fd00::7/128"}],"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"},{"dst":"::/0","gw":"fe80::ecee:eeff:feee:eeee"}],"dns":{}}
        "#]],
        expect![[r#"
            {"cniVersion":"1.0.0","interfaces":[{"name":"cali12345678901","mac":"ee:ee:ee:ee:ee:ee"},{"name":"eth0","mac":"aa:bb:cc:dd:ee:ff","sandbox":"/var/run/netns/x"}],"ips":[{"interface":1,"address":"10.0.0.7/32"},{"interface":1,"address":"fd00::7/128"}],"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"},{"dst":"::/0","gw":"fe80::ecee:eeff:feee:eeee"}],"dns":{}}
        "#]],
        expect![[r#"
            {"cniVersion":"1.1.0","interfaces":[{"name":"cali12345678901","mac":"ee:ee:ee:ee:ee:ee","mtu":1450},{"name":"eth0","mac":"aa:bb:cc:dd:ee:ff","mtu":1450,"sandbox":"/var/run/netns/x"}],"ips":[{"interface":1,"address":"10.0.0.7/32"},{"interface":1,"address":"fd00::7/128"}],"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1","mtu":1450},{"dst":"::/0","gw":"fe80::ecee:eeff:feee:eeee","mtu":1450}],"dns":{}}
        "#]],
    ];
    for (version, wanted) in VERSIONS.into_iter().zip(wanted) {
        let agent = Agent::answers(Some(result()));
        let (stdout, status) = plugin(&env("ADD"), &config(version, &agent.socket()).to_string());
        assert_eq!(status, 0, "{stdout}");
        wanted.assert_eq(&stdout);
    }
}

#[test]
fn the_agent_gets_the_whole_call() {
    let agent = Agent::answers(Some(result()));
    let text = config("1.1.0", &agent.socket()).to_string();
    assert_eq!(plugin(&env("ADD"), &text).1, 0);
    let asked = agent.asked();
    assert_eq!(asked.cni_version, "1.1.0");
    assert_eq!(asked.network, "k8s-pod-network");
    assert_eq!(asked.traceparent, TRACE);
    assert_eq!(asked.config, text.as_bytes());
    assert!(
        (50_000..=60_000).contains(&asked.timeout_millis),
        "{}",
        asked.timeout_millis
    );
    let Some(Verb::Add(add)) = asked.verb else {
        panic!("{asked:?}")
    };
    let previous: Value = serde_json::from_slice(&add.prev_result).expect("JSON");
    assert_eq!(previous["ips"][0]["address"], "10.0.0.7/32");
    expect![[r#"
        Some(
            Attachment {
                container_id: "abc123",
                ifname: "eth0",
                netns: "/var/run/netns/x",
                pod: Some(
                    Pod {
                        namespace: "shop",
                        name: "web-0",
                        uid: "u-1",
                        infra_container_id: "abc123",
                    },
                ),
            },
        )
    "#]]
    .assert_debug_eq(&add.attachment);
}

#[test]
fn every_other_command_prints_nothing() {
    let table: [(&str, &[&str]); 4] = [
        ("DEL", &VERSIONS),
        ("CHECK", &VERSIONS[1..]),
        ("STATUS", &VERSIONS[3..]),
        ("GC", &VERSIONS[3..]),
    ];
    for (command, versions) in table {
        for version in versions {
            let agent = Agent::answers(Some(Outcome::Done(Done {})));
            let text = config(version, &agent.socket()).to_string();
            assert_eq!(
                plugin(&env(command), &text),
                (String::new(), 0),
                "{command} {version}"
            );
            let verb = agent.asked().verb.expect("verb");
            let is_asked = match &verb {
                Verb::Del(del) => command == "DEL" && !del.prev_result.is_empty(),
                Verb::Check(check) => command == "CHECK" && !check.prev_result.is_empty(),
                Verb::Status(_) => command == "STATUS",
                Verb::Gc(gc) => command == "GC" && gc.valid[0].container_id == "abc123",
                Verb::Add(_) => false,
            };
            assert!(is_asked, "{command} {version}: {verb:?}");
        }
    }
}

#[test]
fn del_needs_no_namespace_and_no_pod() {
    let agent = Agent::answers(Some(Outcome::Done(Done {})));
    let mut env = env("DEL");
    env.retain(|(name, _)| !["CNI_NETNS", "CNI_ARGS"].contains(&name.as_str()));
    let text = config("1.1.0", &agent.socket()).to_string();
    assert_eq!(plugin(&env, &text), (String::new(), 0));
    let Some(Verb::Del(del)) = agent.asked().verb else {
        panic!("not a DEL")
    };
    assert_eq!(del.attachment.expect("attachment").netns, "");
}

#[test]
fn version_is_answered_without_an_agent() {
    let supported = r#""supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}"#;
    let table = [
        ("", "1.1.0"),
        ("not JSON", "1.1.0"),
        (r#"{"cniVersion":"0.4.0"}"#, "0.4.0"),
        (r#"{"cniVersion":"9.0.0"}"#, "1.1.0"),
    ];
    let env = [("CNI_COMMAND".to_owned(), "VERSION".to_owned())];
    for (stdin, version) in table {
        let wanted = format!("{{\"cniVersion\":\"{version}\",{supported}\n");
        assert_eq!(plugin(&env, stdin), (wanted, 0), "{stdin:?}");
    }
}

/// Environment and standard input of invalid calls; the answers are in golden/refused.jsonl.
fn bad_calls() -> Vec<(Vec<(String, String)>, String)> {
    let good = config("1.1.0", Path::new("/nowhere/cni.sock"));
    let with = |key: &str, value: Value| {
        let mut config = good.clone();
        config[key] = value;
        config.to_string()
    };
    let environment = |command: &str, name: &str, value: Option<&str>| {
        let mut env = env(command);
        env.retain(|(key, _)| key != name);
        env.extend(value.map(|value| (name.to_owned(), value.to_owned())));
        env
    };
    let text = good.to_string();
    vec![
        (environment("ADD", "CNI_COMMAND", None), text.clone()),
        (env("FROB"), text.clone()),
        (env("add"), text.clone()),
        (environment("ADD", "CNI_CONTAINERID", None), text.clone()),
        (
            environment("ADD", "CNI_CONTAINERID", Some("../x")),
            text.clone(),
        ),
        (
            environment("DEL", "CNI_CONTAINERID", Some("")),
            text.clone(),
        ),
        (environment("ADD", "CNI_IFNAME", Some("a/b")), text.clone()),
        (
            environment("ADD", "CNI_IFNAME", Some("interface-name-x")),
            text.clone(),
        ),
        (environment("CHECK", "CNI_NETNS", None), text.clone()),
        (environment("ADD", "CNI_ARGS", None), text.clone()),
        (
            environment("ADD", "CNI_ARGS", Some("K8S_POD_NAMESPACE=a")),
            text.clone(),
        ),
        (
            environment("ADD", "CNI_ARGS", Some("K8S_POD_NAME")),
            text.clone(),
        ),
        (env("ADD"), String::new()),
        (env("ADD"), "{\"cniVersion\":".to_owned()),
        (env("ADD"), "[]".to_owned()),
        (env("ADD"), with("cniVersion", json!(null))),
        (env("ADD"), with("cniVersion", json!("0.2.0"))),
        (env("ADD"), with("cniVersion", json!(1))),
        (env("CHECK"), with("cniVersion", json!("0.3.1"))),
        (env("GC"), with("cniVersion", json!("1.0.0"))),
        (env("STATUS"), with("cniVersion", json!("1.0.0"))),
        (env("ADD"), with("name", json!(null))),
        (env("ADD"), with("name", json!("a b"))),
        (env("ADD"), with("ipam", json!({"type": "host-local"}))),
        (env("ADD"), with("margay", json!({"socket": "relative"}))),
        (
            env("ADD"),
            with("policy_setup_timeout_seconds", json!("30")),
        ),
        (env("ADD"), with("policy_setup_timeout_seconds", json!(900))),
        (env("CHECK"), with("prevResult", json!(null))),
        (env("CHECK"), with("prevResult", json!("x"))),
        (env("GC"), with("cni.dev/valid-attachments", json!(null))),
        (
            env("GC"),
            with("cni.dev/valid-attachments", json!([{"containerID": "x"}])),
        ),
    ]
}

#[test]
fn bad_calls_are_refused_with_code_name_value_and_remedy() {
    let calls = bad_calls();
    let replies: String = calls
        .iter()
        .map(|(env, stdin)| {
            let reply = call(env, stdin);
            assert!(!reply.success, "{env:?} {stdin}");
            reply.stdout
        })
        .collect();
    expect_file!["golden/refused.jsonl"].assert_eq(&replies);
    // The process prints the same and exits with 1.
    let (env, stdin) = &calls[16];
    assert_eq!(plugin(env, stdin), (call(env, stdin).stdout, 1));
}

#[test]
fn a_configuration_without_end_is_refused() {
    let lookup = |name: &str| (name == "CNI_COMMAND").then(|| "ADD".to_owned());
    let reply = run(&lookup, &mut std::io::repeat(b' '), Duration::ZERO);
    assert_eq!(code(&reply), 6);
}

#[test]
fn what_is_deleted_after_the_agent_was_removed_does_not_hang() {
    let folder = TempDir::new().expect("folder");
    let removed = folder.path().join("removed");
    let mut config = config("1.1.0", &folder.path().join("cni.sock"));
    config["margay"]["removed"] = json!(removed);
    let text = config.to_string();
    assert_eq!(code(&call(&env("DEL"), &text)), 11, "it may come back");
    std::fs::write(&removed, "").expect("a file");
    for command in ["DEL", "GC"] {
        let reply = call(&env(command), &text);
        assert!(
            reply.success && reply.stdout.is_empty(),
            "{command}: {reply:?}"
        );
    }
    for (command, wanted) in [("ADD", 11), ("CHECK", 11), ("STATUS", 50)] {
        let reply = call(&env(command), &text);
        assert_eq!(code(&reply), wanted, "{command}");
        assert!(
            reply.stdout.contains("has been removed from this node"),
            "{command}"
        );
    }
}

#[test]
fn an_absent_agent_is_a_reason_to_try_again() {
    let folder = TempDir::new().expect("folder");
    let socket = folder.path().join("cni.sock");
    let text = config("1.1.0", &socket).to_string();
    for stale in [false, true] {
        if stale {
            drop(UnixListener::bind(&socket).expect("bind"));
        }
        for (command, wanted) in [
            ("ADD", 11),
            ("DEL", 11),
            ("CHECK", 11),
            ("GC", 11),
            ("STATUS", 50),
        ] {
            let reply = call(&env(command), &text);
            assert_eq!(code(&reply), wanted, "{command}: {}", reply.stdout);
            assert!(reply.stdout.contains("margay-node"), "{}", reply.stdout);
            assert!(reply.stdout.contains("cni.sock"), "{}", reply.stdout);
        }
    }
}

#[test]
fn an_agent_that_comes_back_in_time_is_asked() {
    let folder = TempDir::new().expect("folder");
    let socket = folder.path().join("cni.sock");
    drop(UnixListener::bind(&socket).expect("bind"));
    let text = config("1.1.0", &socket).to_string();
    let (asking, is_asking) = std::sync::mpsc::channel();
    let caller = thread::spawn(move || {
        let pairs = env("DEL");
        let lookup = |name: &str| {
            if name == "TRACEPARENT" {
                asking.send(()).expect("the test waits");
            }
            pairs
                .iter()
                .find(|(key, _)| key == name)
                .map(|(_, v)| v.clone())
        };
        run(&lookup, &mut text.as_bytes(), Duration::from_secs(30))
    });
    is_asking.recv().expect("the plugin asks");
    std::fs::remove_file(&socket).expect("remove");
    let listener = UnixListener::bind(&socket).expect("bind");
    answer(&listener, Some(Outcome::Done(Done {})));
    let reply = caller.join().expect("caller");
    assert_eq!(
        reply,
        Reply {
            stdout: String::new(),
            success: true
        }
    );
}

#[test]
fn what_the_agent_refuses_is_passed_on() {
    let agent = Agent::answers(Some(Outcome::Error(cni::Error {
        code: 101,
        msg: "no address is free".to_owned(),
        details: "pool default-ipv4-ippool: 256 of 256 in use".to_owned(),
    })));
    let answer = plugin(&env("ADD"), &config("0.4.0", &agent.socket()).to_string());
    let wanted = r#"{"cniVersion":"0.4.0","code":101,"msg":"no address is free","details":"pool default-ipv4-ippool: 256 of 256 in use"}"#;
    assert_eq!(answer, (format!("{wanted}\n"), 1));
}

#[test]
fn an_answer_that_does_not_match_the_request_is_an_error() {
    let table = [
        ("ADD", Some(Outcome::Done(Done {}))),
        ("DEL", Some(result())),
        ("ADD", None),
    ];
    for (command, outcome) in table {
        let agent = Agent::answers(outcome);
        let reply = call(&env(command), &config("1.1.0", &agent.socket()).to_string());
        assert_eq!(code(&reply), 100, "{command}: {}", reply.stdout);
    }
}

#[test]
fn an_agent_that_dies_before_it_answers_is_a_reason_to_try_again() {
    let folder = TempDir::new().expect("folder");
    let socket = folder.path().join("cni.sock");
    let listener = UnixListener::bind(&socket).expect("bind");
    let dying = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        let _: Request = cni::read(&mut stream).expect("request");
        stream
            .write_all(&[0, 0, 0, 9, 1])
            .expect("a part of an answer");
    });
    let reply = call(&env("ADD"), &config("1.1.0", &socket).to_string());
    assert_eq!(code(&reply), 11, "{}", reply.stdout);
    dying.join().expect("agent");
}

#[test]
fn a_silent_agent_times_out() {
    let folder = TempDir::new().expect("folder");
    let socket = folder.path().join("cni.sock");
    let _silent = UnixListener::bind(&socket).expect("bind");
    let whole = Duration::from_millis(50);
    let limits = TimeLimits {
        until: Instant::now() + whole,
        whole,
        grace: Duration::ZERO,
    };
    let error = agent::call(&socket, Request::default(), limits).expect_err("no answer");
    assert_eq!(error.code(), 11);
    assert!(error.to_string().contains("50ms"), "{error}");
    assert!(limits.left().is_zero());
}

proptest! {
    /// Whatever the input, the caller gets an exit status and valid JSON.
    #[test]
    fn noise_is_answered_in_form(
        command in "(ADD|DEL|CHECK|STATUS|GC|VERSION|.{0,4})",
        id in ".{0,8}",
        ifname in ".{0,20}",
        args in "(K8S_POD_NAMESPACE=a;K8S_POD_NAME=b|.{0,20})",
        stdin in prop_oneof![
            ".{0,40}",
            r#"\{"cniVersion":"(1.1.0|0.3.1|.)","name":"(n|.)","margay":\{"socket":"/nowhere/.{0,3}"\},"prevResult":(1|\{\})\}"#,
        ],
    ) {
        let env = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", id),
            ("CNI_IFNAME", ifname),
            ("CNI_ARGS", args),
        ];
        let env = env.map(|(name, value)| (name.to_owned(), value));
        let reply = call(&env, &stdin);
        let printed: Value = serde_json::from_str(&reply.stdout).expect("JSON");
        if reply.success {
            prop_assert_eq!(&env[0].1, "VERSION");
        } else {
            prop_assert!(printed["code"].as_u64().is_some_and(|code| code > 0));
            prop_assert!(!printed["msg"].as_str().expect("msg").is_empty());
        }
    }
}
