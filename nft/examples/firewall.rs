//! Loads a small firewall into a network namespace of its own, changes one element, and reads the
//! table back. Needs root: `cargo run --example firewall`.

use std::net::Ipv4Addr;

use margay_nft::{
    Base, Chain, ChainName, ChainPolicy, ChainType, FieldType, Hook, Match, NftSocket, Rule,
    Ruleset, Selector, Set, SetKind, SetName, TableName, diff,
};
use nix::sched::{CloneFlags, unshare};

fn firewall(blocked: &[Ipv4Addr]) -> Result<Ruleset, Box<dyn std::error::Error>> {
    let name = SetName::new("blocked-1")?;
    let mut ruleset = Ruleset::new(TableName::new("example-1")?);
    let rule = Rule::new()
        .when(Match::in_set(Selector::Saddr4, &name))
        .counter()
        .drop();
    let input = Base {
        kind: ChainType::Filter,
        hook: Hook::Input,
        priority: 0,
        policy: ChainPolicy::Accept,
    };
    ruleset.put_chain(ChainName::new("input-1")?, Chain::base(input, [rule]));
    ruleset.put_set(
        name,
        Set::members(SetKind::of(FieldType::Ipv4), blocked.iter().copied()),
    );
    Ok(ruleset)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    let mut socket = NftSocket::open()?;
    let first = firewall(&[Ipv4Addr::new(192, 0, 2, 1)])?;
    socket.exec(&diff(&Ruleset::new(first.table.clone()), &first))?;
    println!("{first}");

    let second = firewall(&[Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 7)])?;
    let change = diff(&first, &second);
    println!("one address more:\n{change}");
    let generation = socket.exec(&change)?;

    let present = socket.list(&second.table)?;
    println!(
        "generation {}: {} differences",
        generation.0,
        present.drift(&second).len()
    );
    Ok(())
}
