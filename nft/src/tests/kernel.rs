//! The kernel's state after our messages compared with its state after our text, as `nft` lists
//! them.

use std::sync::Arc;

use super::sample::{everything, port, v4};
use super::support::{
    assert_same_lines, chain_name, in_namespace, list, list_json, load, loadable, normal, set_name,
    table,
};
use crate::*;

/// Applies the ruleset to an empty namespace through netlink.
fn apply(ruleset: &Ruleset) -> NftSocket {
    let mut socket = NftSocket::open().expect("root");
    let transaction = diff(&Ruleset::new(table()), ruleset);
    socket
        .exec(&transaction)
        .unwrap_or_else(|error| panic!("{error}"));
    socket
}

#[test]
fn messages_and_text_mean_the_same() {
    everything().check().expect("the sample is sound");
    let ruleset = loadable(everything());
    let ours = in_namespace(|| {
        let _socket = apply(&ruleset);
        (list(), list_json())
    });
    let theirs = in_namespace(|| {
        load(&ruleset.to_string());
        (list(), list_json())
    });
    assert_same_lines(&normal(&ours.0), &normal(&theirs.0));
    assert!(ours.1 == theirs.1, "the same text, but not the same JSON");
    // The printed text has the form of the listing.
    assert_same_lines(&normal(&ruleset.to_string()), &normal(&theirs.0));
}

#[test]
fn what_was_written_is_read_back() {
    let ruleset = everything();
    in_namespace(|| {
        let mut socket = apply(&ruleset);
        let generation = socket.read_generation().expect("an answer");
        let present = socket.list(&table()).expect("a listing");
        assert_eq!(present.generation, generation);
        assert_eq!(present.unrecognised, Vec::<String>::new());
        assert_eq!(present.sets, ruleset.sets);
        assert_eq!(present.drift(&ruleset), vec![]);
        assert!(
            present.diff(&ruleset).is_empty(),
            "{}",
            present.diff(&ruleset)
        );
    });
}

#[test]
fn a_table_loaded_as_text_is_adopted_as_it_is() {
    let ruleset = loadable(everything());
    in_namespace(|| {
        load(&ruleset.to_string());
        let mut socket = NftSocket::open().expect("root");
        let present = socket.list(&table()).expect("a listing");
        assert_eq!(present.unrecognised, Vec::<String>::new());
        assert_eq!(present.drift(&ruleset), vec![]);
    });
}

#[test]
fn thousands_of_elements_go_in_and_out_in_one_transaction() {
    let kind = SetKind::of([FieldType::Ipv4, FieldType::Proto, FieldType::Port]).with_intervals();
    let plain = SetKind::of(FieldType::Ipv6);
    let ranges = SetKind::of(FieldType::Ipv4).with_intervals();
    let mut ruleset = Ruleset::new(table());
    let spaced =
        (0..20_000u32).map(|number| std::net::Ipv4Addr::from_bits(0x0a00_0000 + number * 2));
    let keys = spaced
        .clone()
        .take(5_000)
        .map(|address| [address.into(), Proto::TCP.into(), port(80)]);
    ruleset.put_set(set_name("concat-1"), Set::members(kind, keys));
    let v6 = (0..20_000u128).map(|number| std::net::Ipv6Addr::from_bits((0xfd00 << 112) + number));
    ruleset.put_set(set_name("plain-1"), Set::members(plain, v6));
    ruleset.put_set(set_name("ranges-1"), Set::members(ranges, spaced));
    in_namespace(|| {
        let mut socket = apply(&ruleset);
        assert_eq!(
            socket.list(&table()).expect("a listing").drift(&ruleset),
            vec![]
        );
        let mut emptied = ruleset.clone();
        for set in emptied.sets.values_mut() {
            Arc::make_mut(set).elements.clear();
        }
        socket
            .exec(&diff(&ruleset, &emptied))
            .expect("the elements are there");
        assert_eq!(
            socket.list(&table()).expect("a listing").drift(&emptied),
            vec![]
        );
    });
}

#[test]
fn a_refused_operation_is_named_and_nothing_happens() {
    in_namespace(|| {
        let mut ruleset = Ruleset::new(table());
        ruleset.put_set(set_name("set-1"), Set::new(SetKind::of(FieldType::Ipv4)));
        let mut socket = apply(&ruleset);
        let before = socket.read_generation().expect("an answer");
        let mut transaction = Transaction::new(table());
        transaction.add_elements(
            &set_name("set-1"),
            Set::members(SetKind::of(FieldType::Ipv4), [v4("10.0.0.1")]),
        );
        let lost = Chain::regular(vec![
            Rule::new().accept(),
            Rule::new().goto(&chain_name("nowhere-1")),
        ]);
        transaction.push(TransactionOp::PutChain(chain_name("chain-1"), None));
        transaction.push(TransactionOp::AppendRules(
            chain_name("chain-1"),
            Arc::new(lost),
            0,
        ));
        transaction.delete_elements(
            &set_name("set-1"),
            Set::members(SetKind::of(FieldType::Ipv4), [v4("10.0.0.9")]),
        );
        match socket.exec(&transaction) {
            Err(ExecError::Refused {
                operation,
                index: Some(2),
                source,
                ..
            }) => {
                assert_eq!(operation, "add rule 1 to chain chain-1: goto nowhere-1");
                assert_eq!(source.raw_os_error(), Some(libc::ENOENT));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(socket.read_generation().expect("an answer"), before);
        assert_eq!(
            socket.list(&table()).expect("a listing").drift(&ruleset),
            vec![]
        );
        socket
            .exec(&diff(&Ruleset::new(table()), &Ruleset::new(table())))
            .expect("nothing to do");
    });
}

/// This crate creates sets without a size, but another program may have created one with a size.
#[test]
fn a_full_set_is_called_full() {
    in_namespace(|| {
        let table = table();
        load(&format!(
            "add table inet {table}\nadd set inet {table} full-1 {{ type ipv4_addr; size 1; }}\n"
        ));
        let mut transaction = Transaction::new(table);
        let members = Set::members(
            SetKind::of(FieldType::Ipv4),
            [v4("10.0.0.1"), v4("10.0.0.2")],
        );
        transaction.add_elements(&set_name("full-1"), members);
        let error = NftSocket::open()
            .expect("root")
            .exec(&transaction)
            .expect_err("one too many")
            .to_string();
        assert!(error.contains("the set is full"), "{error}");
        assert!(!error.contains("open files"), "{error}");
    });
}

#[test]
fn generations_count_commits() {
    in_namespace(|| {
        let mut socket = apply(&everything());
        let first = socket.read_generation().expect("an answer");
        let mut transaction = Transaction::new(table());
        transaction.add_elements(
            &set_name("addresses-4"),
            Set::members(SetKind::of(FieldType::Ipv4), [v4("9.9.9.9")]),
        );
        assert_eq!(
            socket.exec(&transaction).expect("sound"),
            Generation(first.0 + 1)
        );
        assert_eq!(
            socket.exec(&Transaction::new(table())).expect("nothing"),
            Generation(first.0 + 1)
        );
    });
}

#[test]
fn removing_the_table_leaves_nothing() {
    in_namespace(|| {
        let mut socket = apply(&everything());
        socket
            .exec(&Transaction::remove(table()))
            .expect("it is there");
        socket
            .exec(&Transaction::remove(table()))
            .expect("it need not be there");
        assert!(!socket.list(&table()).expect("a listing").exists);
    });
}
