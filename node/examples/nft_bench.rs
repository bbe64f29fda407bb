//! Times of the nftables engine against a real kernel, in a network namespace of its own (needs root):
//! `cargo run -p margay-node --example nft_bench`.
//!
//! Anchors are the figures of the same operations by other means: a raw netlink program in C, and Felix, which starts
//! the `nft` program for each. Compare shapes and ratios; absolute times are those of the machine they were taken on.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use margay_node::nft::{
    Chain, ChainName, FieldType, Match, Rule, Ruleset, Selector, Set, SetKind, SetName, Socket, TableName, Transaction,
    diff,
};
use nix::sched::{CloneFlags, unshare};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    println!("{:<58} {:>10} {:>10}   anchors", "operation", "p50", "p99");
    for size in [1_000, 10_000, 100_000] {
        let anchor = match size {
            1_000 => "raw C 4.8 us, nft program 16.6 ms",
            10_000 => "raw C 6.3 us, nft program 68 ms, Felix 9 to 22 ms",
            _ => "raw C 4.8 us, nft program 2580 ms",
        };
        report(&format!("one member, set of {size}"), anchor, member(&SetKind::of(FieldType::Ipv4), size, 2_000)?);
    }
    for (size, anchor) in [(1_000, "raw C 34 us, nft program 19.9 ms"), (10_000, "raw C 241 us, nft program 103 ms")] {
        let kind = SetKind::of(FieldType::Ipv4).with_intervals();
        report(&format!("one member, interval set of {size}"), anchor, member(&kind, size, 500)?);
    }
    for (chains, anchor) in [
        (100, "raw C 127 us, nft program 16.5 ms"),
        (500, "raw C 182 us, nft program 25.8 ms"),
        (2_000, "raw C 196 us, nft program 44.5 ms"),
    ] {
        let [rewrite, compare, list] = chains_of_ten(chains)?;
        report(&format!("rewrite one chain of 10 rules among {chains}"), anchor, rewrite);
        report(&format!("find that change by comparing {chains} chains"), "-", compare);
        let anchor = if chains == 2_000 { "raw C 240 ms, nft program 4123 ms" } else { "-" };
        report(&format!("read back {chains} chains of 10 rules"), anchor, list);
    }
    Ok(())
}

/// Adding and removing one member, each change built, encoded and committed.
fn member(kind: &SetKind, size: u32, rounds: u32) -> Result<Vec<Duration>, Box<dyn std::error::Error>> {
    let name = SetName::new("members-1")?;
    // Every other address, so that ranges stay apart.
    let address = |number: u32| Ipv4Addr::from_bits(0x0a00_0000 + number * 2);
    let mut ruleset = Ruleset::new(TableName::new("bench-1")?);
    ruleset.put_set(name.clone(), Set::members(kind.clone(), (0..size).map(address)));
    let mut socket = Socket::open()?;
    socket.exec(&Transaction::replace(&ruleset))?;
    let mut times = Vec::new();
    for round in 0..rounds {
        let start = Instant::now();
        let one = Set::members(kind.clone(), [address(size + round / 2)]);
        let mut transaction = Transaction::new(ruleset.table.clone());
        if round % 2 == 0 {
            transaction.add_elements(&name, one);
        } else {
            transaction.delete_elements(&name, one);
        }
        socket.exec(&transaction)?;
        times.push(start.elapsed());
    }
    socket.exec(&Transaction::remove(ruleset.table))?;
    Ok(times)
}

/// Rewriting a chain, finding that by comparison, and reading everything back.
fn chains_of_ten(count: u32) -> Result<[Vec<Duration>; 3], Box<dyn std::error::Error>> {
    let mut ruleset = Ruleset::new(TableName::new("bench-1")?);
    let rules = |salt: u32| {
        let rule =
            |number| Rule::new().when(Match::is(Selector::Saddr4, Ipv4Addr::from_bits(salt * 10 + number))).accept();
        Chain::regular((0..10).map(rule).collect::<Vec<_>>())
    };
    for number in 0..count {
        ruleset.put_chain(ChainName::new(&format!("chain-{number}"))?, rules(number));
    }
    let mut socket = Socket::open()?;
    socket.exec(&Transaction::replace(&ruleset))?;
    let [mut rewrites, mut compares, mut lists] = [vec![], vec![], vec![]];
    for round in 0..200 {
        let mut wanted = ruleset.clone();
        wanted.chains.insert(ChainName::new("chain-7")?, Arc::new(rules(count + round)));
        let start = Instant::now();
        let transaction = diff(&ruleset, &wanted);
        let compared = Instant::now();
        socket.exec(&transaction)?;
        rewrites.push(compared.elapsed());
        compares.push(compared - start);
        ruleset = wanted;
    }
    for _ in 0..5 {
        let start = Instant::now();
        let present = socket.list(&ruleset.table)?;
        lists.push(start.elapsed());
        assert!(present.drift(&ruleset).is_empty(), "nobody else writes here");
    }
    socket.exec(&Transaction::remove(ruleset.table))?;
    Ok([rewrites, compares, lists])
}

fn report(operation: &str, anchor: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let percentile = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!("{operation:<58} {:>10.1?} {:>10.1?}   {anchor}", percentile(50), percentile(99));
}
