//! Tests against the kernel's table with realistic entries, and of the choice of method.

use std::collections::BTreeSet;

use margay_api::rule::IpVersion;
use margay_netlink::wire::{Header, Writer, messages, u32_ne};
use margay_netlink::{Buffers, Protocol, Socket};
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

use super::message::{Entry, Selection, TupleField};
use super::*;

/// A kernel without filtered deletions.
struct Older(KernelTable);

impl ConntrackTable for Older {
    fn flush(&mut self, _: PurgeAddress, _: TupleField) -> Result<bool, TableError> {
        Ok(false)
    }

    fn find(
        &mut self,
        version: IpVersion,
        wanted: Selection<'_>,
    ) -> Result<Vec<Entry>, TableError> {
        self.0.find(version, wanted)
    }

    fn delete(&mut self, entry: &Entry) -> Result<(), TableError> {
        self.0.delete(entry)
    }
}

/// Records the requests.
#[derive(Default)]
struct Asked {
    is_filtering: bool,
    walks: usize,
    lists: Vec<IpVersion>,
}

impl ConntrackTable for &'static std::sync::Mutex<Asked> {
    fn flush(&mut self, _: PurgeAddress, _: TupleField) -> Result<bool, TableError> {
        let mut asked = self.lock().expect("no test panics with it");
        asked.walks += 1;
        Ok(asked.is_filtering)
    }

    fn find(&mut self, version: IpVersion, _: Selection<'_>) -> Result<Vec<Entry>, TableError> {
        self.lock()
            .expect("no test panics with it")
            .lists
            .push(version);
        Ok(Vec::new())
    }

    fn delete(&mut self, _: &Entry) -> Result<(), TableError> {
        Ok(())
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn subject(text: &str) -> PurgeAddress {
    PurgeAddress::new(address(text)).expect("an address of a pod")
}

/// A connection: name, protocol, zone, and the four addresses in the order of [`TupleField`].
type Row = (&'static str, u8, u16, [&'static str; 4]);

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;
const GRE: u8 = 47;

/// The pod's addresses are 10.0.0.1 and fd00::1.
const ROWS: [Row; 14] = [
    (
        "asked",
        UDP,
        0,
        ["10.0.0.9", "10.0.0.1", "10.0.0.1", "10.0.0.9"],
    ),
    (
        "asking",
        TCP,
        0,
        ["10.0.0.1", "10.0.0.13", "10.0.0.13", "10.0.0.1"],
    ),
    (
        "asked through a Service",
        UDP,
        0,
        ["10.0.0.14", "10.96.0.1", "10.0.0.1", "10.0.0.14"],
    ),
    (
        "asking, masqueraded",
        TCP,
        0,
        ["10.0.0.1", "1.1.1.1", "1.1.1.1", "172.30.0.1"],
    ),
    (
        "sent elsewhere",
        UDP,
        0,
        ["10.0.0.5", "10.0.0.1", "10.0.0.8", "10.0.0.5"],
    ),
    (
        "seen as the pod",
        UDP,
        0,
        ["10.0.0.4", "10.0.0.3", "10.0.0.3", "10.0.0.1"],
    ),
    (
        "in a zone",
        UDP,
        7,
        ["10.0.0.7", "10.0.0.1", "10.0.0.1", "10.0.0.7"],
    ),
    (
        "SCTP",
        SCTP,
        0,
        ["10.0.0.6", "10.0.0.1", "10.0.0.1", "10.0.0.6"],
    ),
    (
        "another protocol",
        GRE,
        0,
        ["10.0.0.12", "10.0.0.1", "10.0.0.1", "10.0.0.12"],
    ),
    ("IPv6", UDP, 0, ["fd00::9", "fd00::1", "fd00::1", "fd00::9"]),
    (
        "IPv6, masqueraded",
        TCP,
        9,
        ["fd00::1", "2001:db8::1", "2001:db8::1", "fd01::1"],
    ),
    (
        "of others",
        TCP,
        0,
        ["10.0.0.9", "10.0.0.10", "10.0.0.10", "10.0.0.9"],
    ),
    (
        "of others in a zone",
        UDP,
        7,
        ["10.0.0.10", "10.0.0.11", "10.0.0.11", "10.0.0.10"],
    ),
    (
        "of others, IPv6",
        UDP,
        0,
        ["fd00::9", "fd00::10", "fd00::10", "fd00::9"],
    ),
];

fn put_tuple(writer: &mut Writer, kind: u16, protocol: u8, [source, destination]: [&str; 2]) {
    writer.nest(kind, |writer| {
        writer.nest(1, |writer| match (address(source), address(destination)) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                writer.put(1, &source.octets());
                writer.put(2, &destination.octets());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                writer.put(3, &source.octets());
                writer.put(4, &destination.octets());
            }
            _ => panic!("one IP version"),
        });
        writer.nest(2, |writer| {
            writer.put(1, &[protocol]);
            writer.put_u16(2, 40000);
            writer.put_u16(3, 40000);
        });
    });
}

/// Creates an entry as if its packets had been seen.
fn make(socket: &mut Socket, (name, protocol, zone, places): &Row) {
    const NEW: u16 = 1 << 8;
    let family = if address(places[0]).is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    let mut writer = Writer::default();
    writer.put_message(
        Header {
            kind: NEW,
            flags,
            sequence: 1,
        },
        family as u8,
        0,
        |writer| {
            put_tuple(writer, 1, *protocol, [places[0], places[1]]);
            put_tuple(writer, 2, *protocol, [places[2], places[3]]);
            // Timeout in seconds.
            writer.put_u32(7, 600);
            writer.put_u16(18, *zone);
        },
    );
    socket.send(writer.bytes()).expect("a request");
    let answer = socket
        .try_receive()
        .expect("an answer")
        .expect("an answer")
        .to_vec();
    let errno = messages(&answer)
        .find_map(|message| u32_ne(message.body, 0))
        .expect("an error number");
    assert_eq!(errno, 0, "{name}: {}", Errno::from_raw(-(errno as i32)));
}

/// Names of the rows in the table: no two have the same addresses.
fn present(kernel: &mut KernelTable) -> BTreeSet<&'static str> {
    let is_there = |(_, _, _, places): &&Row| {
        let mut found: Option<BTreeSet<Entry>> = None;
        for place in *places {
            let subjects = BTreeSet::from([subject(place)]);
            let with: BTreeSet<Entry> = kernel
                .find(subject(place).version(), Selection::Addresses(&subjects))
                .expect("a list")
                .into_iter()
                .collect();
            found = Some(found.map_or(with.clone(), |found| {
                found.intersection(&with).cloned().collect()
            }));
        }
        found.is_some_and(|found| !found.is_empty())
    };
    ROWS.iter().filter(is_there).map(|row| row.0).collect()
}

/// Runs in a network namespace of its own.
fn isolated(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .expect("these tests make network namespaces: run them as root");
            test();
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

fn purged(
    table: impl FnOnce() -> Box<dyn FnMut(&BTreeMap<PurgeAddress, Extent>)> + Send,
    extent: Extent,
) -> BTreeSet<&'static str> {
    let mut left = BTreeSet::new();
    isolated(|| {
        let mut socket = Socket::open(
            Protocol::Netfilter,
            0,
            Buffers {
                send: None,
                receive: 64 << 10,
            },
        )
        .expect("a socket");
        ROWS.iter().for_each(|row| make(&mut socket, row));
        let mut kernel = KernelTable::open().expect("a socket");
        assert_eq!(
            present(&mut kernel).len(),
            ROWS.len(),
            "all are there at first"
        );
        table()(&BTreeMap::from([
            (subject("10.0.0.1"), extent),
            (subject("fd00::1"), extent),
        ]));
        left = present(&mut kernel);
    });
    left
}

type Purge = Box<dyn FnMut(&BTreeMap<PurgeAddress, Extent>)>;

fn with(table: impl ConntrackTable) -> Purge {
    let mut purger = Purger::new(table);
    Box::new(move |subjects| purger.purge(subjects).expect("the kernel deletes"))
}

#[test]
fn entries_with_an_address_in_any_place_go_and_no_others() {
    let others = BTreeSet::from(["of others", "of others in a zone", "of others, IPv6"]);
    assert_eq!(
        purged(
            || with(KernelTable::open().expect("a socket")),
            Extent::Whole
        ),
        others
    );
    assert_eq!(
        purged(
            || with(Older(KernelTable::open().expect("a socket"))),
            Extent::Whole
        ),
        others
    );
}

#[test]
fn entries_whose_packets_come_to_the_link_go() {
    let mut left = BTreeSet::from(["of others", "of others in a zone", "of others, IPv6"]);
    assert_eq!(
        purged(
            || with(Older(KernelTable::open().expect("a socket"))),
            Extent::Link
        ),
        left,
        "a list has all at once"
    );
    let can_filter = KernelTable::open()
        .expect("a socket")
        .flush(subject("192.0.2.1"), TupleField::ReplySource);
    if can_filter.expect("an answer") {
        left.extend(["sent elsewhere", "seen as the pod"]);
        assert_eq!(
            purged(
                || with(KernelTable::open().expect("a socket")),
                Extent::Link
            ),
            left
        );
    }
}

#[test]
fn few_addresses_cost_walks_and_many_one_list() {
    let few = BTreeMap::from([
        (subject("10.0.0.1"), Extent::Link),
        (subject("fd00::1"), Extent::Whole),
    ]);
    let many: BTreeMap<_, _> = (1..=200)
        .map(|number| (subject(&format!("10.0.0.{number}")), Extent::Link))
        .collect();
    let asked = |is_filtering: bool, rounds: &[&BTreeMap<PurgeAddress, Extent>]| {
        let asked: &'static std::sync::Mutex<Asked> =
            Box::leak(Box::new(std::sync::Mutex::new(Asked {
                is_filtering,
                ..Asked::default()
            })));
        let mut purger = Purger::new(asked);
        rounds
            .iter()
            .for_each(|round| purger.purge(round).expect("nothing fails"));
        let asked = asked.lock().expect("no test panics with it");
        (asked.walks, asked.lists.clone())
    };
    assert_eq!(
        asked(true, &[&few]),
        (2, vec![IpVersion::V6]),
        "IPv6 is never asked for by address"
    );
    assert_eq!(asked(true, &[&many]), (0, vec![IpVersion::V4]));
    let both = vec![IpVersion::V4, IpVersion::V6];
    assert_eq!(
        asked(false, &[&few]),
        (1, both.clone()),
        "a kernel that cannot"
    );
    assert_eq!(
        asked(false, &[&few, &few]),
        (1, [both.clone(), both].concat()),
        "is not asked again"
    );
}

/// A deletion without attributes deletes everything.
#[test]
fn no_address_that_means_everything_is_a_subject() {
    for everything in ["0.0.0.0", "::"] {
        assert_eq!(PurgeAddress::new(address(everything)), None);
    }
    isolated(|| {
        let mut socket = Socket::open(
            Protocol::Netfilter,
            0,
            Buffers {
                send: None,
                receive: 64 << 10,
            },
        )
        .expect("a socket");
        make(&mut socket, &ROWS[0]);
        let asked = KernelTable::open()
            .expect("a socket")
            .flush(subject("fd00::1"), TupleField::OriginalSource);
        assert!(
            !asked.expect("no question"),
            "for IPv6 the kernel would take all others"
        );
        let conntrack = Conntrack::spawn().expect("a thread");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime");
        for addresses in [vec![], vec![address("0.0.0.0")], vec![address("::")]] {
            runtime
                .block_on(conntrack.purge(addresses, Extent::Whole))
                .expect("nothing to do");
        }
        assert_eq!(
            present(&mut KernelTable::open().expect("a socket")),
            BTreeSet::from([ROWS[0].0])
        );
    });
}
