//! One member of a set, in the driver alone: built, encoded and committed, in a network namespace of its own.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::Result;
use margay_node::nft::{FieldType, Ruleset, Set, SetKind, SetName, Socket, TableName, Transaction};

use super::Bench;
use crate::demo::flips::Quantiles;
use crate::namespace::Namespace;

/// Changes of each size.
const ROUNDS: u32 = 2_000;

/// Sets of three sizes.
pub fn run(bench: &mut Bench) -> Result<()> {
    let namespace = Namespace::new()?;
    for (size, key) in [(1_000, "1k"), (10_000, "10k"), (100_000, "100k")] {
        let times = Quantiles::new(namespace.run(|| member(size))?);
        let us = |part: f64| times.at(part).as_secs_f64() * 1e6;
        bench.sheet.put(&format!("driver.member.{key}"), us(0.5), format!("p99 {:.1} us", us(0.99)))?;
    }
    Ok(())
}

/// Adds and removes one member again and again.
fn member(size: u32) -> Result<Vec<Duration>> {
    let kind = SetKind::of(FieldType::Ipv4);
    let name = SetName::new("members-1")?;
    let address = |number: u32| Ipv4Addr::from_bits(0x0a00_0000 + number);
    let mut ruleset = Ruleset::new(TableName::new("bench-1")?);
    ruleset.put_set(name.clone(), Set::members(kind.clone(), (0..size).map(address)));
    let mut socket = Socket::open()?;
    socket.exec(&Transaction::replace(&ruleset))?;
    let mut times = Vec::new();
    for round in 0..ROUNDS {
        let begin = Instant::now();
        let one = Set::members(kind.clone(), [address(size + round / 2)]);
        let mut transaction = Transaction::new(ruleset.table.clone());
        if round % 2 == 0 {
            transaction.add_elements(&name, one);
        } else {
            transaction.delete_elements(&name, one);
        }
        socket.exec(&transaction)?;
        times.push(begin.elapsed());
    }
    Ok(times)
}
