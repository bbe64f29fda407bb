//! Sets in the driver alone, built, encoded and committed in a network namespace of their own: a
//! whole one, and one member of it.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::Result;
use margay_nft::{FieldType, NftSocket, Ruleset, Set, SetKind, SetName, TableName, Transaction};

use super::Bench;
use crate::demo::flips::Quantiles;
use crate::namespace::Namespace;

/// A kind of set, and how often one member is changed.
struct Kind {
    name: &'static str,
    kind: fn() -> SetKind,
    repetitions: u32,
}

const ADDRESSES: Kind = Kind {
    name: "member",
    kind: || SetKind::of(FieldType::Ipv4),
    repetitions: 2_000,
};
/// The kernel keeps ranges in a tree that it cleans up with each change.
const RANGES: Kind = Kind {
    name: "range",
    kind: || SetKind::of(FieldType::Ipv4).with_intervals(),
    repetitions: 500,
};

/// Measurements: kind, size, and the end of the figure's key.
const SIZES: [(Kind, u32, &str); 5] = [
    (ADDRESSES, 1_000, "1k"),
    (ADDRESSES, 10_000, "10k"),
    (ADDRESSES, 100_000, "100k"),
    (RANGES, 1_000, "1k"),
    (RANGES, 10_000, "10k"),
];

/// Sets of either kind and of several sizes.
pub fn run(bench: &mut Bench) -> Result<()> {
    let namespace = Namespace::new()?;
    for (kind, size, key) in SIZES {
        let (load, changes) = namespace.run(|| set(&kind, size))?;
        let times = Quantiles::new(changes);
        let us = |part: f64| times.at(part).as_secs_f64() * 1e6;
        let note = format!(
            "p99 {:.1} us, loaded in {:.1} ms",
            us(0.99),
            load.as_secs_f64() * 1e3
        );
        bench
            .sheet
            .put(&format!("driver.{}.{key}", kind.name), us(0.5), note)?;
        if (kind.name, key) == ("member", "100k") {
            bench
                .sheet
                .put("driver.load.100k", load.as_secs_f64() * 1e3, String::new())?;
        }
    }
    Ok(())
}

/// Loads a set, then adds and removes one member again and again.
fn set(
    Kind {
        name: _,
        kind,
        repetitions,
    }: &Kind,
    size: u32,
) -> Result<(Duration, Vec<Duration>)> {
    let name = SetName::new("members-1")?;
    // Every other address, so that ranges stay apart.
    let address = |number: u32| Ipv4Addr::from_bits(0x0a00_0000 + number * 2);
    let mut socket = NftSocket::open()?;
    let begin = Instant::now();
    let mut ruleset = Ruleset::new(TableName::new("bench-1")?);
    ruleset.put_set(name.clone(), Set::members(kind(), (0..size).map(address)));
    socket.exec(&Transaction::replace(&ruleset))?;
    let load = begin.elapsed();
    let mut times = Vec::new();
    for repetition in 0..*repetitions {
        let begin = Instant::now();
        let one = Set::members(kind(), [address(size + repetition / 2)]);
        let mut transaction = Transaction::new(ruleset.table.clone());
        if repetition % 2 == 0 {
            transaction.add_elements(&name, one);
        } else {
            transaction.delete_elements(&name, one);
        }
        socket.exec(&transaction)?;
        times.push(begin.elapsed());
    }
    socket.exec(&Transaction::remove(ruleset.table))?;
    Ok((load, times))
}
