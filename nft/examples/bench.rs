//! Benchmark of changes to chains in a network namespace of its own; sets are in `make bench`.
//! Needs root: `cargo run -p margay-nft --example bench`.
//!
//! The anchors are the same operations by other means: a netlink program in C, and the `nft`
//! program, started for each. Compare ratios: absolute times depend on the machine.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use margay_nft::{
    Chain, ChainName, Match, NftSocket, Rule, Ruleset, Selector, TableName, Transaction, diff,
};
use nix::sched::{CloneFlags, unshare};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    println!("{:<58} {:>10} {:>10}   anchors", "operation", "p50", "p99");
    for (chains, anchor) in [
        (100, "raw C 127 us, nft program 16.5 ms"),
        (500, "raw C 182 us, nft program 25.8 ms"),
        (2_000, "raw C 196 us, nft program 44.5 ms"),
    ] {
        let [rewrite, compare, list] = chains_of_ten(chains)?;
        report(
            &format!("rewrite one chain of 10 rules among {chains}"),
            anchor,
            rewrite,
        );
        report(
            &format!("find that change by comparing {chains} chains"),
            "-",
            compare,
        );
        let anchor = if chains == 2_000 {
            "raw C 240 ms, nft program 4123 ms"
        } else {
            "-"
        };
        report(
            &format!("read back {chains} chains of 10 rules"),
            anchor,
            list,
        );
    }
    Ok(())
}

/// Rewriting a chain, finding that by comparison, and reading everything back.
fn chains_of_ten(count: u32) -> Result<[Vec<Duration>; 3], Box<dyn std::error::Error>> {
    let mut ruleset = Ruleset::new(TableName::new("bench-1")?);
    let rules = |salt: u32| {
        let rule = |number| {
            Rule::new()
                .when(Match::is(
                    Selector::Saddr4,
                    Ipv4Addr::from_bits(salt * 10 + number),
                ))
                .accept()
        };
        Chain::regular((0..10).map(rule).collect::<Vec<_>>())
    };
    for number in 0..count {
        ruleset.put_chain(ChainName::new(&format!("chain-{number}"))?, rules(number));
    }
    let mut socket = NftSocket::open()?;
    socket.exec(&Transaction::replace(&ruleset))?;
    let [mut rewrites, mut compares, mut lists] = [vec![], vec![], vec![]];
    for round in 0..200 {
        let mut wanted = ruleset.clone();
        wanted
            .chains
            .insert(ChainName::new("chain-7")?, Arc::new(rules(count + round)));
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
        assert!(
            present.drift(&ruleset).is_empty(),
            "nobody else writes here"
        );
    }
    socket.exec(&Transaction::remove(ruleset.table))?;
    Ok([rewrites, compares, lists])
}

fn report(operation: &str, anchor: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let percentile = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!(
        "{operation:<58} {:>10.1?} {:>10.1?}   {anchor}",
        percentile(50),
        percentile(99)
    );
}
