//! Changes by other programs are noticed, described and repaired.

use super::sample::{everything, v4};
use super::support::{
    assert_same_lines, chain_name, in_namespace, list, load, loadable, normal, run, set_name, table,
};
use crate::*;

/// Checks the events and the drift that a command causes, and that one transaction repairs it.
fn check(command: &str, touched: &[ChangedObject], drift: &[Drift]) {
    in_namespace(|| {
        let wanted = everything();
        let mut socket = NftSocket::open().expect("root");
        let mut monitor = Monitor::open(table(), &[socket.port()]).expect("root");
        socket
            .exec(&diff(&Ruleset::new(table()), &wanted))
            .expect("sound");
        let sound = normal(&list());
        assert_eq!(
            monitor.try_next().expect("open"),
            None,
            "our own changes are filtered out"
        );

        load(command);
        match monitor.try_next().expect("open") {
            Some(MonitorEvent::Changed(change)) => {
                assert_eq!(
                    change.changed.iter().cloned().collect::<Vec<_>>(),
                    touched,
                    "{command}"
                );
                assert_eq!(
                    change.generation,
                    socket.read_generation().expect("an answer")
                );
                assert_eq!(change.process_name, "nft");
            }
            other => panic!("{command}: {other:?}"),
        }

        let present = socket.list(&table()).expect("a listing");
        assert_eq!(present.drift(&wanted), drift, "{command}");
        socket
            .exec(&present.diff(&wanted))
            .unwrap_or_else(|error| panic!("{command}: {error}"));
        assert_eq!(
            socket.list(&table()).expect("a listing").drift(&wanted),
            vec![],
            "{command}"
        );
        assert_same_lines(&normal(&list()), &sound);
        assert_eq!(
            monitor.try_next().expect("open"),
            None,
            "the repair is filtered out"
        );
    });
}

fn chain(name: &str) -> ChangedObject {
    ChangedObject::Chain(name.to_owned())
}

fn rules(name: &str) -> ChangedObject {
    ChangedObject::Rules(name.to_owned())
}

fn elements(name: &str) -> ChangedObject {
    ChangedObject::Elements(name.to_owned())
}

#[test]
fn elements_added_removed_and_changed() {
    let drift = |set: &str, missing, foreign| {
        [Drift::Elements {
            set: set_name(set),
            missing,
            foreign,
        }]
    };
    let cases = [
        (
            "add element inet t-1 addresses-4 { 1.1.1.1, 1.1.1.2 }",
            "addresses-4",
            0,
            2,
        ),
        (
            "delete element inet t-1 addresses-4 { 10.0.0.1 }",
            "addresses-4",
            1,
            0,
        ),
        (
            "delete element inet t-1 nets-4 { 10.0.0.0/9 }",
            "nets-4",
            1,
            0,
        ),
        ("add element inet t-1 nets-4 { 12.0.0.0/8 }", "nets-4", 0, 1),
        (
            "delete element inet t-1 dispatch-1 { cali3 }; add element inet t-1 dispatch-1 { cali3 \
             : accept }",
            "dispatch-1",
            1,
            1,
        ),
        ("flush set inet t-1 peers-1", "peers-1", 2, 0),
    ];
    for (command, set, missing, foreign) in cases {
        check(command, &[elements(set)], &drift(set, missing, foreign));
    }
}

#[test]
fn rules_added_removed_and_replaced() {
    let drift = |name| [Drift::Rules(chain_name(name))];
    check(
        "flush chain inet t-1 endpoint-1",
        &[rules("endpoint-1")],
        &drift("endpoint-1"),
    );
    check(
        "add rule inet t-1 endpoint-2 accept",
        &[rules("endpoint-2")],
        &drift("endpoint-2"),
    );
    check(
        "insert rule inet t-1 endpoint-1 accept",
        &[rules("endpoint-1")],
        &drift("endpoint-1"),
    );
    check(
        "insert rule inet t-1 endpoint-1 accept comment \"0000000000000000\"",
        &[rules("endpoint-1")],
        &drift("endpoint-1"),
    );
}

#[test]
fn chains_and_sets_added_removed_and_altered() {
    let cases: [(&str, Vec<ChangedObject>, Drift); 5] = [
        (
            "add chain inet t-1 other-1",
            vec![chain("other-1")],
            Drift::ForeignChain(chain_name("other-1")),
        ),
        (
            "delete chain inet t-1 mangle-1",
            vec![chain("mangle-1")],
            Drift::MissingChain(chain_name("mangle-1")),
        ),
        (
            "add chain inet t-1 forward-1 { policy accept; }",
            vec![chain("forward-1")],
            Drift::BaseChain(chain_name("forward-1")),
        ),
        (
            "add set inet t-1 other-1 { type ipv4_addr; }",
            vec![ChangedObject::Set("other-1".to_owned())],
            Drift::ForeignSet(set_name("other-1")),
        ),
        (
            "delete set inet t-1 empty-4; add set inet t-1 empty-4 { type ipv6_addr; }",
            vec![ChangedObject::Set("empty-4".to_owned())],
            Drift::SetKind(set_name("empty-4")),
        ),
    ];
    for (command, touched, drift) in cases {
        check(command, &touched, &[drift]);
    }
}

#[test]
fn what_cannot_be_ours_replaces_the_table() {
    let unrecognised = |text: &str| [Drift::Unrecognised(text.to_owned())];
    check(
        "add set inet t-1 other-1 { type ipv4_addr; flags timeout; }",
        &[ChangedObject::Set("other-1".to_owned())],
        &unrecognised("set other-1 has unsupported types or flags"),
    );
    check(
        "add table inet t-1 { flags dormant; }",
        &[ChangedObject::Table],
        &unrecognised("the table has flags such as dormant"),
    );
    in_namespace(|| {
        load(&loadable(everything()).to_string());
        run("nft", &["delete", "table", "inet", "t-1"], "");
        let mut socket = NftSocket::open().expect("root");
        assert_eq!(
            socket
                .list(&table())
                .expect("a listing")
                .drift(&everything()),
            vec![Drift::MissingTable]
        );
    });
}

#[test]
fn other_tables_are_not_our_business() {
    in_namespace(|| {
        let mut monitor = Monitor::open(table(), &[]).expect("root");
        load(
            "table inet other { chain c-1 { accept; }; set s-1 { type ipv4_addr; elements = { \
             1.1.1.1 }; }; }",
        );
        load("table ip t-1 { chain c-1 { accept; }; }");
        assert_eq!(monitor.try_next().expect("open"), None);
    });
}

#[test]
fn a_commit_while_the_monitor_is_paused_returns_whether_others_committed_too() {
    in_namespace(|| {
        let mut socket = NftSocket::open().expect("root");
        // Not even our own changes are filtered out.
        let mut monitor = Monitor::open(table(), &[]).expect("root");
        let pause = monitor.pause().expect("open");
        let wanted = everything();
        assert!(
            !pause
                .exec(&mut socket, &diff(&Ruleset::new(table()), &wanted))
                .expect("sound"),
            "no other program committed"
        );
        assert_eq!(monitor.try_next().expect("open"), None);

        let other = std::sync::atomic::AtomicBool::new(true);
        let is_on = || other.load(std::sync::atomic::Ordering::Relaxed);
        let mut again = || {
            pause
                .exec(&mut socket, &Transaction::replace(&wanted))
                .expect("sound")
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut socket = NftSocket::open().expect("root");
                let table = TableName::new("other").expect("a name");
                while is_on() {
                    socket
                        .exec(&Transaction::replace(&Ruleset::new(table.clone())))
                        .expect("sound");
                }
            });
            let noticed = (0..10_000).any(|_| again());
            other.store(false, std::sync::atomic::Ordering::Relaxed);
            assert!(noticed, "the other program commits all the time");
        });
        // Discards the events of the other program.
        while monitor.try_next().expect("open").is_some() {}
        assert!(!again(), "no other program commits any more");
        assert_eq!(monitor.try_next().expect("open"), None);
        load("flush chain inet t-1 forward-1");
        match monitor.try_next().expect("open") {
            Some(MonitorEvent::Changed(change)) => {
                assert_eq!(change.changed, [rules("forward-1")].into())
            }
            other => panic!("the monitor has resumed: {other:?}"),
        }
    });
}

#[test]
fn announcements_that_do_not_fit_are_reported_as_lost() {
    in_namespace(|| {
        let mut monitor = Monitor::open(table(), &[]).expect("root");
        let mut ruleset = Ruleset::new(table());
        let many = (0..200_000u32).map(std::net::Ipv4Addr::from_bits);
        ruleset.put_set(
            set_name("many-1"),
            Set::members(SetKind::of(FieldType::Ipv4), many),
        );
        let mut socket = NftSocket::open().expect("root");
        socket
            .exec(&diff(&Ruleset::new(table()), &ruleset))
            .expect("sound");
        let events: Vec<MonitorEvent> =
            std::iter::from_fn(|| monitor.try_next().expect("open")).collect();
        assert!(events.contains(&MonitorEvent::Lost), "{events:?}");

        let mut transaction = Transaction::new(table());
        transaction.add_elements(
            &set_name("many-1"),
            Set::members(SetKind::of(FieldType::Ipv4), [v4("9.9.9.9")]),
        );
        let generation = socket.exec(&transaction).expect("sound");
        match monitor.try_next().expect("open") {
            Some(MonitorEvent::Changed(change)) => {
                assert_eq!(
                    change.generation, generation,
                    "events after the loss are reported"
                )
            }
            other => panic!("{other:?}"),
        }
    });
}
