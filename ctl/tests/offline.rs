//! Commands on folders of manifests, as a pipeline of policies runs them.

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::{Value, json};

/// Folder with the manifests of these tests.
fn data(name: &str) -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
        .display()
        .to_string()
}

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kubectl-margay"))
        .args(args)
        .output()
        .expect("the program runs")
}

/// Exit status and standard output; the folder's name is taken out of it.
fn answer(args: &[&str]) -> (i32, String) {
    let output = run(args);
    let text = String::from_utf8(output.stdout).expect("text");
    let text = if output.status.code() == Some(2) {
        String::from_utf8(output.stderr).expect("text")
    } else {
        text
    };
    (
        output.status.code().expect("no signal"),
        text.replace(&data(""), ""),
    )
}

#[test]
fn an_explanation_names_the_rule_at_both_ends() {
    let shop = data("shop");
    let (status, text) = answer(&["explain", "shop/web", "svc/shop/db", "-f", &shop]);
    assert_eq!(status, 0, "{text}");
    expect_test::expect_file!["data/allowed.txt"].assert_eq(&text);
    let (status, text) = answer(&[
        "explain",
        "other/curl",
        "shop/db-0",
        "-p",
        "postgres",
        "-f",
        &shop,
    ]);
    assert_eq!(status, 1, "{text}");
    expect_test::expect_file!["data/denied.txt"].assert_eq(&text);
}

#[test]
fn json_has_the_same_answer() {
    let (status, text) = answer(&[
        "explain",
        "other/curl",
        "shop/db-0",
        "-p",
        "5432",
        "-o",
        "json",
        "-f",
        &data("shop"),
    ]);
    assert_eq!(status, 1);
    let answer: Value = serde_json::from_str(&text).expect("JSON");
    let connection = &answer["connections"][0];
    assert_eq!(answer["verdict"], "deny");
    assert_eq!(
        (&connection["protocol"], &connection["port"]),
        (&json!("tcp"), &json!(5432))
    );
    let ingress = &connection["ends"][1];
    assert_eq!(
        (&ingress["direction"], &ingress["endpoint"]),
        (&json!("ingress"), &json!("pod shop/db-0"))
    );
    let last = ingress["steps"]
        .as_array()
        .and_then(|steps| steps.last())
        .expect("a step");
    assert_eq!(
        (&last["kind"], &last["tier"], &last["action"]),
        (&json!("tierEnd"), &json!("default"), &json!("deny"))
    );
    assert_eq!(last["policies"], json!(["KubernetesNetworkPolicy shop/db"]));
    assert_eq!(connection["staged"]["verdict"], "allow");
}

#[test]
fn what_cannot_be_answered_has_a_status_of_its_own() {
    let shop = data("shop");
    let cases: &[(&[&str], &str)] = &[
        (
            &["explain", "shop/wep", "shop/db-0", "-f", &shop],
            "there is no pod shop/wep; did you mean shop/web?",
        ),
        (
            &["explain", "shop/web", "10.0.0.1", "-f", &shop],
            "--port: missing",
        ),
        (
            &["explain", "svc/shop/db", "shop/web", "-f", &shop],
            "opens no connections",
        ),
        (
            &["explain", "shop/web", "svc/shop/none", "-f", &shop],
            "there is no Service shop/none",
        ),
        (
            &[
                "explain",
                "shop/web",
                "shop/db-0",
                "-p",
                "http",
                "-f",
                &shop,
            ],
            "declares no port of this name",
        ),
        (
            &["explain", "shop/agent", "shop/db-0", "-f", &shop],
            "uses its host's network",
        ),
        (
            &["explain", "a/b", "c/d", "-f", "/nonexistent"],
            "/nonexistent: cannot be read",
        ),
        (&["explain", "a/b"], "required"),
        (
            &["explain", "a/b", "c/d", "--kubeconfig", "/nonexistent"],
            "--kubeconfig: /nonexistent: cannot be read",
        ),
    ];
    for (args, wanted) in cases {
        let (status, text) = answer(args);
        assert_eq!(status, 2, "{args:?}: {text}");
        assert!(text.contains(wanted), "{args:?}: {text}");
    }
}

/// The examples of the documentation have the verdicts that are written beside them.
#[test]
fn examples_have_their_verdicts() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples");
    let mut asked = 0;
    for entry in std::fs::read_dir(&folder).expect("the examples") {
        let policies = entry.expect("an entry").path();
        if policies.extension().is_none_or(|ending| ending != "yaml") {
            continue;
        }
        let table = std::fs::read_to_string(policies.with_extension("expect"))
            .expect("a table of verdicts");
        let objects = margay_ctl::objects::Objects::read(
            &[data("pods.yaml"), policies.display().to_string()],
            "default",
        );
        let cluster = margay_ctl::cluster::Cluster::of(&objects.expect("readable"));
        assert_eq!(
            (&cluster.refused[..], &cluster.unreadable[..]),
            (&[][..], &[][..]),
            "{}",
            policies.display()
        );
        for (protocol, port, from, to, wanted) in rows(&table) {
            let args = margay_ctl::explain::Args {
                from: from.clone(),
                to: to.clone(),
                port: Some(port),
                protocol: Some(protocol),
                files: Vec::new(),
                namespace: "default".to_owned(),
                output: Default::default(),
                connection: Default::default(),
            };
            let answer = margay_ctl::explain::answer(&args, &cluster).expect("an answer");
            let is_allowed = answer.verdict == margay_ctl::report::VerdictName::Allow;
            assert_eq!(
                is_allowed,
                wanted == ".",
                "{}: {from} to {to}: {answer:#?}",
                policies.display()
            );
            asked += 1;
        }
    }
    assert!(asked > 500, "{asked} questions");
}

/// Protocol, port, source, destination and mark of each cell of a table.
fn rows(table: &str) -> Vec<(String, String, String, String, String)> {
    let (mut cells, mut header, mut asked) =
        (Vec::new(), Vec::new(), (String::new(), String::new()));
    for line in table
        .lines()
        .filter(|line| !line.starts_with('#') && !line.trim().is_empty())
    {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        match words.as_slice() {
            [protocol, port] if !line.starts_with(' ') => asked = (protocol.clone(), port.clone()),
            _ if line.starts_with(' ') => header = words,
            [from, marks @ ..] => {
                let asked_cells = header.iter().zip(marks).filter(|(_, mark)| *mark != "-");
                cells.extend(asked_cells.map(|(to, mark)| {
                    (
                        asked.0.clone(),
                        asked.1.clone(),
                        from.clone(),
                        to.clone(),
                        mark.clone(),
                    )
                }));
            }
            [] => {}
        }
    }
    cells
}

#[test]
fn a_difference_has_groups_of_pods_and_exact_ports() {
    let (policies, world) = (data("change.yaml"), data("pods.yaml"));
    let args = ["diff", "-f", &policies, "--offline", &world];
    let (status, text) = answer(&args);
    assert_eq!(status, 1, "{text}");
    expect_test::expect_file!["data/diff.txt"].assert_eq(&text);
    assert_eq!(answer(&args).1, text, "the same again");
    let (_, limited) = answer(&[&args[..], &["--limit", "1"]].concat());
    assert!(limited.contains(" more; --limit shows them"), "{limited}");
    let (status, text) = answer(&["diff", "-f", &world, "--offline", &world]);
    assert_eq!(status, 0, "{text}");
}

#[test]
fn staged_policies_are_compared_when_asked_for() {
    let shop = data("shop");
    let (status, text) = answer(&["diff", "--staged", "--offline", &shop, "-o", "json"]);
    assert_eq!(status, 1, "{text}");
    let answer: Value = serde_json::from_str(&text).expect("JSON");
    let changes = answer["changes"].as_array().expect("changes");
    assert!(
        changes.iter().all(|change| change["verdict"] == "allow"),
        "{text}"
    );
    let traffic: Vec<&Value> = changes.iter().map(|change| &change["traffic"]).collect();
    let from_curl = json!(["tcp 1-22,24-65535", "udp", "sctp", "icmp"]);
    assert!(traffic.contains(&&from_curl), "{text}");
}

#[test]
fn validation_tells_refused_objects_and_fields_without_effect() {
    let (status, text) = answer(&["validate", "-f", &data("bad.yaml")]);
    assert_eq!(status, 1, "{text}");
    expect_test::expect_file!["data/validate.txt"].assert_eq(&text);
    let (status, text) = answer(&["validate", "-f", &data("shop")]);
    assert_eq!(status, 0, "{text}");
}

#[test]
fn completion_and_manual_pages_are_made_of_the_commands() {
    let (status, text) = answer(&["completion", "bash"]);
    assert_eq!(status, 0, "{text}");
    assert!(
        text.contains("explain") && text.contains("--show-blocks"),
        "{text}"
    );
    let folder = tempfile::tempdir().expect("a folder");
    let (status, text) = answer(&["man", &folder.path().display().to_string()]);
    assert_eq!(status, 0, "{text}");
    let page = std::fs::read_to_string(folder.path().join("kubectl-margay-ipam-show.1"));
    assert!(page.expect("a page").contains("show\\-blocks"));
}

/// The same program is calicoctl by its name.
#[test]
fn the_program_has_another_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let name = folder.path().join("calicoctl");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_kubectl-margay"), &name).expect("a link");
    let output = Command::new(name)
        .args(["version", "--client"])
        .output()
        .expect("it runs");
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(text.starts_with("Client Version:    v"), "{text}");
    let help = Command::new(folder.path().join("calicoctl"))
        .arg("--help")
        .output()
        .expect("it runs");
    let help = String::from_utf8(help.stdout).expect("text");
    assert!(help.contains("Usage: calicoctl <COMMAND>"), "{help}");
}
