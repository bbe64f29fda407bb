//! Tests of the owner without its thread: retries, comparisons and saves.

use std::time::Instant;

use margay_api::endpoint::interface_name;
use margay_api::rule::Action;
use prometheus_client::registry::Registry;

use super::super::tests::{mk_frame, mk_records};
use super::deadlines::FULL_CHECK;
use super::*;
use margay_dataplane::Attached;
use margay_dataplane::nftables::Nftables;
use margay_dataplane::nftables::model::Model;
use margay_dataplane::nftables::sample::{NODE, mk_pod};

/// Longer than any test takes.
const LATER: Duration = Duration::from_secs(3600);

fn mk_owner(kernel: &Model, store: Option<ViewStore>) -> StateOwner {
    let parts = AgentParts {
        node: NODE.to_owned(),
        view: BTreeMap::new(),
        attached: BTreeMap::new(),
        links: BTreeMap::new(),
        dataplane: Box::new(Nftables::new(NODE, Box::new(kernel.clone()))),
        routes: None,
        store,
        bgp: Default::default(),
        metrics: Metrics::new(&mut Registry::default()),
    };
    StateOwner::new(
        parts,
        watch::channel(Status::default()).0,
        watch::channel(None).0,
    )
}

/// Applies a complete view with one pod.
fn send(owner: &mut StateOwner) {
    let (hello, fault) = (oneshot::channel().0, oneshot::channel().0);
    owner.handle_event(AgentEvent::Connected {
        stream: 1,
        hello,
        fault,
        server: "typha".to_owned(),
    });
    owner.handle_event(AgentEvent::Frame {
        stream: 1,
        frame: mk_frame(1, &mk_records(&[(0, Action::Allow)]), true),
    });
}

#[test]
fn events_do_not_hasten_the_next_attempt_at_what_the_kernel_did_not_take() {
    let kernel = Model::new();
    let mut owner = mk_owner(&kernel, None);
    send(&mut owner);
    kernel.lock().outages = 1;
    owner.commit().expect("one failure is not the end");
    assert!(owner.due.retry.is_some());
    owner.due.retry = Some(Instant::now() + LATER);
    let (done, mut answer) = oneshot::channel();
    let (endpoint, addresses) = mk_pod(0);
    let interface = interface_name(&endpoint);
    owner.handle_event(AgentEvent::Attach {
        interface,
        pod: Attached {
            endpoint,
            uid: String::new(),
            addresses,
            host_ports: Vec::new(),
        },
        done,
    });
    for _ in 0..2 * MAX_ATTEMPTS {
        owner.handle_event(AgentEvent::Drift);
        owner.commit().expect("no attempt");
    }
    assert!(owner.status.borrow().failing.is_some());
    assert_eq!(kernel.lock().commits, 0);
    assert!(
        answer.try_recv().is_err(),
        "the pod's policy is not in the kernel"
    );
    owner.due.retry = Some(Instant::now());
    owner.commit().expect("the kernel is back");
    assert_eq!(
        (owner.status.borrow().failing.clone(), kernel.lock().commits),
        (None, 1)
    );
    assert_eq!(answer.try_recv(), Ok(Ok(())));
}

#[test]
fn a_view_is_saved_when_the_save_before_it_is_over() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = ViewStore::new(folder.path());
    let mut owner = mk_owner(&Model::new(), Some(store.clone()));
    send(&mut owner);
    owner.commit().expect("a commit");
    let (over, waits) = std::sync::mpsc::channel::<()>();
    owner.saving = Some(std::thread::spawn(move || waits.recv().unwrap_or_default()));
    owner.due.save = Some(Instant::now());
    owner.run_due();
    assert!(owner.due.save.is_some(), "put off");
    assert_eq!(store.load(), BTreeMap::new());
    drop(over);
    owner
        .saving
        .take()
        .expect("a save")
        .join()
        .expect("no panic");
    owner.due.save = Some(Instant::now());
    owner.run_due();
    owner
        .saving
        .take()
        .expect("a save")
        .join()
        .expect("no panic");
    assert_eq!(store.load(), mk_records(&[(0, Action::Allow)]));
}

#[test]
fn a_check_that_others_interrupt_changes_nothing_and_is_made_later() {
    let kernel = Model::new();
    let mut owner = mk_owner(&kernel, None);
    send(&mut owner);
    owner.commit().expect("a commit");
    let counts = || {
        let inner = kernel.lock();
        (inner.commits, inner.readings)
    };
    let (commits, readings) = counts();
    kernel.lock().interruptions = usize::MAX;
    owner.due.check = Instant::now();
    owner.run_due();
    // A commit in between does not read the table.
    owner.handle_event(AgentEvent::Frame {
        stream: 1,
        frame: mk_frame(2, &mk_records(&[(1, Action::Allow)]), true),
    });
    owner.commit().expect("nothing failed");
    assert_eq!(counts(), (commits + 1, readings + 1));
    assert_eq!(owner.status.borrow().not_ready_reason(), None);
    assert!(
        owner.due.check < Instant::now() + FULL_CHECK / 2,
        "it is made again soon"
    );

    let wanted = kernel.table();
    kernel.lock().interruptions = 0;
    kernel
        .lock()
        .table
        .as_mut()
        .expect("a table")
        .chains
        .pop_last();
    owner.due.check = Instant::now();
    owner.run_due();
    owner.commit().expect("a repair");
    assert_eq!(kernel.table(), wanted);
}

#[test]
fn a_table_that_cannot_be_read_for_others_is_replaced() {
    let kernel = Model::new();
    let mut owner = mk_owner(&kernel, None);
    send(&mut owner);
    owner.commit().expect("a commit");
    let wanted = kernel.table();
    kernel.lock().interruptions = usize::MAX;
    for strange in [false, true] {
        match strange {
            true => kernel.lock().table = None,
            false => drop(
                kernel
                    .lock()
                    .table
                    .as_mut()
                    .expect("a table")
                    .chains
                    .pop_last(),
            ),
        }
        owner.handle_event(AgentEvent::Drift);
        owner.commit().expect("a repair");
        assert_eq!(kernel.table(), wanted);
        assert_eq!(owner.status.borrow().not_ready_reason(), None);
    }
}

#[test]
fn what_others_change_unnoticed_is_undone_at_once() {
    let kernel = Model::new();
    let mut owner = mk_owner(&kernel, None);
    send(&mut owner);
    // The first one reads the table back, the second does not.
    for revision in [2, 3] {
        kernel.lock().unreported = true;
        owner.commit().expect("a commit");
        assert!(!kernel.lock().unreported, "nothing was committed");
        let table = kernel.table().expect("a table").to_string();
        assert!(
            owner
                .dataplane
                .dump(owner.state.records())
                .starts_with(&table)
        );
        owner.handle_event(AgentEvent::Frame {
            stream: 1,
            frame: mk_frame(revision, &mk_records(&[(1, Action::Allow)]), true),
        });
    }
}
