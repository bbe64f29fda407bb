//! Removal of pods' links.

use anyhow::{Result, ensure};
use margay_dataplane::routes::message::LinkRef;
use margay_dataplane::routes::pod::{self, PodLink};
use margay_dataplane::routes::removal::{LinkRemover, link_index};
use margay_netlink::route::RouteSocket;
use margay_tests::namespace::Namespace;

/// Removals that wait together are one request to the kernel; a link that is gone already does no
/// harm, and no other link is removed.
#[test]
fn links_are_removed_together() -> Result<()> {
    let (host, inside) = (Namespace::new()?, Namespace::new()?);
    let name = |number: usize| format!("cali{number}");
    let removal = host.run(|| -> Result<LinkRemover> {
        let mut socket = RouteSocket::open()?;
        for number in 0..12 {
            let link = PodLink {
                host: &name(number),
                pod: &name(number),
                namespace: inside.file(),
                mtu: 1430,
                mac: pod::pod_mac(&name(number), "eth0"),
            };
            pod::create_link(&mut socket, &link)?;
        }
        let link = |name: String| LinkRef::Name(name);
        let (gone, present) = (
            [link("absent".to_owned()), link(name(2)), link(name(3))],
            [link(name(3))],
        );
        ensure!(
            pod::remove_links(&mut socket, &gone)
                .iter()
                .all(Result::is_ok),
            "a group with a link that is gone"
        );
        ensure!(
            pod::remove_links(&mut socket, &present)
                .iter()
                .all(Result::is_ok),
            "a link that is gone"
        );
        Ok(LinkRemover::spawn()?)
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let removals = (0..10)
        .chain(0..10)
        .map(|number| removal.remove(name(number)));
    for result in runtime.block_on(futures::future::join_all(removals)) {
        result?;
    }
    for namespace in [&host, &inside] {
        let present = namespace.ip("-o link show type veth")?;
        let names = present
            .lines()
            .filter_map(|line| line.split(": ").nth(1)?.split('@').next());
        let names: Vec<&str> = names.collect();
        ensure!(names == ["cali10", "cali11"], "left are {names:?}");
    }
    Ok(())
}

/// A DEL does not wait for its link, and a pod of the same name may have a new one before the old
/// one is removed.
#[test]
fn a_link_that_is_expected_to_go_goes_and_a_later_one_of_its_name_stays() -> Result<()> {
    let (host, inside, own) = (Namespace::new()?, Namespace::new()?, Namespace::new()?);
    let create = |name: &str, namespace: &Namespace| -> Result<()> {
        let mac = pod::pod_mac(name, "eth0");
        let link = PodLink {
            host: name,
            pod: name,
            namespace: namespace.file(),
            mtu: 1430,
            mac,
        };
        host.run(|| -> Result<()> {
            pod::create_link(&mut RouteSocket::open()?, &link)
                .map(drop)
                .map_err(Into::into)
        })
    };
    for (name, namespace) in [("cali1", &inside), ("cali2", &inside), ("cali3", &own)] {
        create(name, namespace)?;
    }
    let index = |name: &str| link_index(name).expect("it is there");
    // Names are looked up in the network of the thread that asks.
    host.run(|| -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let removal = LinkRemover::spawn()?;
        runtime.block_on(async {
            let (one, two, three, none) = tokio::join!(
                removal.wait_or_remove(index("cali1")),
                removal.wait_or_remove(index("cali2")),
                removal.wait_or_remove(index("cali3")),
                removal.wait_or_remove(u32::MAX >> 1),
            );
            [one, two, three, none]
                .into_iter()
                .collect::<Result<Vec<()>, _>>()
        })?;
        Ok(())
    })?;
    ensure!(
        host.ip("-o link show type veth")?.is_empty(),
        "all have gone"
    );
    create("cali1", &inside)?;
    let again = host.run(|| -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let removal = LinkRemover::spawn()?;
        runtime.block_on(async {
            let later = async {
                tokio::task::yield_now().await;
                create("cali1", &inside)
            };
            let (gone, created) = tokio::join!(removal.wait_or_remove(index("cali1")), later);
            gone?;
            created
        })
    });
    again?;
    ensure!(
        host.ip("-o link show type veth")?.contains("cali1"),
        "the new one is not the one that was to go"
    );
    Ok(())
}
