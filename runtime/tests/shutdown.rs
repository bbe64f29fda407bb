//! Signals act on a process, so each case is a process of its own: this test binary, started again.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use margay_runtime::shutdown::Shutdown;

/// Set in the process that is signalled: what it does after the signal.
const ROLE: &str = "MARGAY_TEST_ROLE";

/// The signalled process; does nothing in an ordinary run.
#[tokio::test]
async fn signalled() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let deadline = if role == "slow" {
        Duration::from_millis(50)
    } else {
        Duration::from_secs(60)
    };
    let shutdown = Shutdown::on_signals(deadline).expect("signals");
    println!("listening");
    shutdown.wait().await;
    println!("asked");
    if role != "quick" {
        std::future::pending::<()>().await;
    }
}

fn start(role: &str) -> (Child, impl Iterator<Item = String>) {
    let mut child = Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", "signalled", "--nocapture"])
        .env(ROLE, role)
        .stdout(Stdio::piped())
        .spawn()
        .expect("start");
    let lines = BufReader::new(child.stdout.take().expect("stdout")).lines();
    (child, lines.map(|line| line.expect("text")))
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill")
        .args([name, &child.id().to_string()])
        .status();
    assert!(sent.expect("kill").success());
}

fn wait_for(lines: &mut impl Iterator<Item = String>, wanted: &str) {
    assert!(
        lines.any(|line| line.ends_with(wanted)),
        "the process ended without {wanted:?}"
    );
}

#[test]
fn one_signal_asks_and_the_process_ends_by_itself() {
    for name in ["-TERM", "-INT"] {
        let (mut child, mut lines) = start("quick");
        wait_for(&mut lines, "listening");
        signal(&child, name);
        wait_for(&mut lines, "asked");
        lines.for_each(drop);
        assert_eq!(child.wait().expect("wait").code(), Some(0), "{name}");
    }
}

#[test]
fn the_deadline_forces_it() {
    let (mut child, mut lines) = start("slow");
    wait_for(&mut lines, "listening");
    signal(&child, "-TERM");
    wait_for(&mut lines, "asked");
    assert_eq!(child.wait().expect("wait").code(), Some(1));
}

#[test]
fn a_second_signal_forces_it() {
    let (mut child, mut lines) = start("stubborn");
    wait_for(&mut lines, "listening");
    signal(&child, "-TERM");
    wait_for(&mut lines, "asked");
    signal(&child, "-INT");
    assert_eq!(child.wait().expect("wait").code(), Some(1));
}
