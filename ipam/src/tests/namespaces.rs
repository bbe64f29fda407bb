//! What a namespace says of the addresses of its pods.

use margay_api::endpoint::EndpointKey;
use margay_api::meta::Labels;
use margay_api::rule::IpVersion;
use margay_api::selector::Selector;

use super::*;
use crate::addresses::NodeAddresses;
use crate::namespaces;
use crate::request::{AddressRequest, Addresses};

fn mk_addresses(contents: &Memory) -> (Node, NodeAddresses) {
    let of_team = NodePool {
        namespaces: Some(Selector::parse("team == 'a'").expect("a selector")),
        ..named_pool("team", "10.1.0.0/24", 26)
    };
    let named = NodePool {
        manual: true,
        ..named_pool("named", "10.2.0.0/24", 26)
    };
    let node = mk_node(
        "n1",
        contents,
        vec![pool("10.0.0.0/24", 26), named, of_team],
    );
    let look = namespaces::reader(Arc::new(node.store.clone()));
    let addresses = NodeAddresses::new("n1".to_owned(), node.allocator.clone(), look, clock);
    (node, addresses)
}

fn request(namespace: &str, number: u32, named: Option<&str>) -> AddressRequest {
    AddressRequest {
        ipv4: named.map_or(Demand::IfPooled, |pool| {
            Demand::Always(vec![pool.to_owned()])
        }),
        named_by_pod: [named.is_some(), false],
        ..AddressRequest::of_pod(
            format!("{namespace}{number}"),
            &EndpointKey::new(namespace, "pod"),
        )
    }
}

fn space(label: Option<&str>, pools: Option<&str>) -> Namespace {
    let labels: Labels = label
        .iter()
        .map(|team| ("team".to_owned(), (*team).to_owned()))
        .collect();
    Namespace {
        labels,
        pools: pools
            .iter()
            .map(|text| (IpVersion::V4, (*text).to_owned()))
            .collect(),
    }
}

#[tokio::test]
async fn a_pools_selector_and_a_namespaces_annotation_decide() {
    let contents = Memory::default();
    let (node, addresses) = mk_addresses(&contents);
    node.store.with(|contents| {
        let namespaces = [
            ("annotated", space(None, Some(r#"["named"]"#))),
            ("other", space(Some("b"), None)),
            ("plain", space(None, None)),
            ("team", space(Some("a"), Some(r#"["team"]"#))),
            ("wrong", space(None, Some("named"))),
        ];
        contents.namespaces = namespaces
            .map(|(name, space)| (name.to_owned(), space))
            .into();
    });
    // Namespace, pool that the pod names, and where its address is, or why it has none.
    let table = [
        ("plain", None, "10.0.0."),
        ("other", None, "10.0.0."),
        ("annotated", None, "10.2.0."),
        ("annotated", Some("default"), "10.0.0."),
        ("team", None, "10.1.0."),
        (
            "other",
            Some("team"),
            "has a namespaceSelector that does not select the pod's namespace",
        ),
        (
            "wrong",
            None,
            "annotation cni.projectcalico.org/ipv4pools of Namespace wrong is \"named\"",
        ),
    ];
    for (number, (namespace, named, wanted)) in table.into_iter().enumerate() {
        let given = addresses
            .assign(request(namespace, number as u32, named))
            .await;
        let given = given.map_or_else(|error| error.to_string(), |given| given[0].to_string());
        assert!(given.contains(wanted), "{namespace} {named:?}: {given}");
    }
    let exact = |namespace: &str| {
        let exact = vec!["10.1.0.60".parse().expect("an address")];
        AddressRequest {
            exact,
            ..request(namespace, 99, None)
        }
    };
    let error = addresses
        .assign(exact("other"))
        .await
        .expect_err("naming the address is no way round");
    assert!(
        error
            .to_string()
            .contains("IPPool team, which has a namespaceSelector"),
        "{error}"
    );
    addresses
        .assign(exact("team"))
        .await
        .expect("its own namespace");
}

#[tokio::test]
async fn what_was_claimed_before_the_namespace_was_read_is_released_if_its_annotations_forbid_it() {
    let contents = Memory::default();
    let (node, addresses) = mk_addresses(&contents);
    // No pool asks for labels, so nothing is asked first.
    node.pools.send_modify(|pools| {
        let pools = pools.as_mut().expect("pools");
        Arc::make_mut(pools).retain(|pool| pool.namespaces.is_none());
    });
    node.store.with(|contents| {
        contents
            .namespaces
            .insert("x".to_owned(), space(None, Some(r#"["named"]"#)))
    });
    for number in 0..2 {
        let given = addresses
            .assign(request("x", number, None))
            .await
            .expect("of the pool that is named");
        assert!(given[0].to_string().starts_with("10.2.0."), "{given:?}");
        let (_, held) = node
            .store
            .with(|contents| held(contents, &format!("x{number}")));
        assert_eq!(held, [given[0].addr().to_string()]);
    }
    let writes = node.store.with(|contents| contents.writes);
    addresses
        .assign(request("x", 2, None))
        .await
        .expect("known by now");
    assert_eq!(
        node.store.with(|contents| contents.writes),
        writes + 1,
        "asked first, so nothing is taken back"
    );
    node.store.with(|contents| contents.namespaces.clear());
    let given = addresses
        .assign(request("x", 3, None))
        .await
        .expect("the annotation is gone");
    assert!(given[0].to_string().starts_with("10.0.0."), "{given:?}");
}

#[tokio::test]
async fn no_namespace_is_read_while_none_names_pools_and_no_pool_selects_any() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/24", 26)]);
    let reads = Arc::new(Mutex::new(0));
    let counted = reads.clone();
    let look = namespaces::reader(Arc::new(node.store.clone()));
    let look: namespaces::ReadNamespace = Arc::new(move |name| {
        *counted.lock() += 1;
        look(name)
    });
    let addresses = NodeAddresses::new("n1".to_owned(), node.allocator.clone(), look, clock);
    // Whether typha says that no namespace names pools, and the reads of namespaces after a pod.
    for (number, (none_names_pools, wanted)) in [(false, 1), (true, 1), (true, 1), (false, 2)]
        .into_iter()
        .enumerate()
    {
        node.no_namespace_names_pools.send_replace(none_names_pools);
        addresses
            .assign(request("x", number as u32, None))
            .await
            .expect("an address");
        assert_eq!(*reads.lock(), wanted, "pod {number}");
    }
    node.pools.send_modify(|pools| {
        let selects = Selector::parse("team == 'a'").expect("a selector");
        Arc::make_mut(pools.as_mut().expect("pools"))[0].namespaces = Some(selects);
    });
    node.no_namespace_names_pools.send_replace(true);
    let refused = addresses.assign(request("x", 9, None)).await;
    refused.expect_err("the only pool is for other namespaces");
    assert_eq!(*reads.lock(), 3, "a pool asks for labels");
}
