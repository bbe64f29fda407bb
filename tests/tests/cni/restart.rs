//! Attachments, unfinished ADDs and the socket after a restart of the agent.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::thread;

use anyhow::{Context, Result, ensure};
use margay_proto::cni::code;
use margay_tests::cluster::process::wait_for;
use margay_tests::lab::PATIENCE;

use super::{NODE, Sandbox, footprint, mk_lab, node, schedule, usual};

/// A damaged file, as after a power failure: the agent starts, and other pods' attachments are
/// unchanged.
#[test]
fn an_agent_starts_with_a_file_that_cannot_be_read_and_only_its_pod_pays() -> Result<()> {
    let mut lab = mk_lab(usual())?;
    for name in ["a", "b"] {
        schedule(&lab, name)?;
    }
    let (broken, whole) = (
        Sandbox::new(&lab, "a", "c1")?,
        Sandbox::new(&lab, "b", "c2")?,
    );
    broken.add()?;
    let result = whole.add()?;
    lab.stop_agent(NODE)?;
    std::fs::write(node(&lab)?.folder().join("attachments/c1@eth0.json"), "")?;
    lab.start_agent(NODE)?;
    lab.wait_enforced()?;
    whole
        .check(&result)?
        .success()
        .context("the other pod is as it was")?;
    ensure!(
        node(&lab)?.attachments()? == ["c1@eth0.json.damaged", "c2@eth0.json"],
        "{:?}",
        node(&lab)?.attachments()?
    );
    let held = lab.blocks().handles().len();
    broken
        .del()
        .context("DEL of a pod of which nothing is known")?;
    ensure!(
        lab.blocks().handles().len() == held - 1,
        "its address is given back all the same"
    );
    broken.add().context("and the pod can be recreated")?;
    Ok(())
}

/// A new agent removes what its predecessor made in an unfinished ADD: nobody got an answer.
#[test]
fn an_add_that_the_agent_does_not_survive_leaves_nothing() -> Result<()> {
    let mut lab = mk_lab(usual())?;
    let before = footprint(&lab)?;
    let sandbox = Sandbox::new(&lab, "unheard-of", "c1")?;
    let call = sandbox.call.clone();
    let add = thread::spawn(move || call.exec("ADD"));
    let waits = || {
        footprint(&lab).is_ok_and(|now| !now.links.is_empty() && now.allocated != before.allocated)
    };
    wait_for(
        PATIENCE,
        || "the ADD to reach the wait for policy".to_owned(),
        waits,
    )?;
    lab.stop_agent(NODE)?;
    let answer = add.join().expect("no panic")?;
    answer.refusal().context("an ADD whose agent is gone")?;
    lab.start_agent(NODE)?;
    let recovered = || footprint(&lab).is_ok_and(|now| now == before);
    wait_for(
        PATIENCE,
        || format!("left behind: {:?}, not {before:?}", footprint(&lab)),
        recovered,
    )
}

#[test]
fn an_attachment_outlives_its_agent() -> Result<()> {
    let mut lab = mk_lab(usual())?;
    let before = footprint(&lab)?;
    schedule(&lab, "a")?;
    let sandbox = Sandbox::new(&lab, "a", "c1")?;
    let result = sandbox.add()?;
    lab.stop_agent(NODE)?;
    let (code, message) = sandbox.call.exec("STATUS")?.refusal()?;
    ensure!(
        code == u64::from(code::NOT_AVAILABLE),
        "STATUS without an agent: {code}: {message}"
    );
    lab.start_agent(NODE)?;
    lab.wait_enforced()?;
    sandbox.call.exec("STATUS")?.success()?;
    sandbox
        .check(&result)?
        .success()
        .context("after a restart")?;
    ensure!(sandbox.add()? == result, "the same answer");
    sandbox.del()?;
    assert_eq!(footprint(&lab)?, before);
    Ok(())
}

/// Whoever may write to the socket creates interfaces and takes addresses.
#[test]
fn the_socket_is_for_root_alone_after_a_restart_too() -> Result<()> {
    let mut lab = mk_lab(usual())?;
    let socket = node(&lab)?.socket();
    for attempt in 0..2 {
        let about = std::fs::metadata(&socket)?;
        let (kind, mode) = (about.file_type(), about.mode() & 0o7777);
        ensure!(
            kind.is_socket() && (about.uid(), about.gid(), mode) == (0, 0, 0o600),
            "{attempt}: {about:?}"
        );
        // Somebody has opened it meanwhile.
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666))?;
        lab.stop_agent(NODE)?;
        lab.start_agent(NODE)?;
    }
    Ok(())
}
