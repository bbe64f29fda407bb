//! Attacks of a pod at its link, even without any policy: to impersonate others, to hide packets in
//! tunnels, tags or options, or to change its node's routes and neighbours. Frames go straight into
//! the pod's interface; where each came out is observed at every place where it could.

mod attacks;
mod hidden;
mod lab;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::rule::{Action, PortRange, Protocol};
use margay_calc::model::{PolicyRecord, Record, RecordId, RuleRecord, SideMatch, TierBinding};
use margay_tests::raw::{Packet, Transport, packet};

use attacks::Attack;
use lab::{ALWAYS, DENIED, GATEWAY, Lab, PORT, Place, Records, marked, marked_mac};

/// Sends the frames of all attacks together, and compares where each came out with its expectation.
fn run(lab: &mut Lab, attacks: &[Attack]) -> Result<()> {
    let seen = send(lab, attacks)?;
    let leaks: Vec<String> = attacks
        .iter()
        .filter_map(|attack| {
            let places = seen.get(&attack.number).cloned().unwrap_or_default();
            (places != attack.comes_out).then(|| format!("{}: came out at {places:?}", attack.name))
        })
        .collect();
    ensure!(
        leaks.is_empty(),
        "{} of {} leaked or were lost:\n{}",
        leaks.len(),
        attacks.len(),
        leaks.join("\n")
    );
    Ok(())
}

fn send(lab: &mut Lab, attacks: &[Attack]) -> Result<BTreeMap<u16, BTreeSet<Place>>> {
    let frames: Vec<Vec<u8>> = attacks
        .iter()
        .flat_map(|attack| attack.frames.clone())
        .collect();
    lab.send(&frames)
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_forged_or_hidden_leaves_a_pod() -> Result<()> {
    let mut lab = Lab::new(|_| ()).await?;
    let all = attacks::all(&mut lab);
    ensure!(all.len() > 150, "only {} attacks", all.len());
    run(&mut lab, &all)?;
    // The table alone does it: an administrator may have turned the kernel's own check of return
    // paths off while there was no agent to set it again.
    lab.leave().await?;
    for parameter in ["all", "default", &lab.attacker().interface()] {
        lab.nodes[0].host.command(
            "sysctl",
            &["-qw", &format!("net.ipv4.conf.{parameter}.rp_filter=0")],
            "",
        )?;
    }
    let again = attacks::all(&mut lab);
    run(&mut lab, &again)?;
    // The taps work: without the table much of it comes out.
    lab.disarm().await?;
    let leaking = attacks::all(&mut lab);
    let seen = send(&mut lab, &leaking)?;
    for wanted in [
        "forged 10.244.1.2",
        "forged fd00:244:1::2",
        "VXLAN over 172.30.0.2",
        "IP in IP to 172.30.0.2",
        "priority tag",
    ] {
        let heard = |attack: &&Attack| {
            seen.get(&attack.number)
                .is_some_and(|places| !places.is_subset(&attack.comes_out))
        };
        ensure!(
            leaking
                .iter()
                .filter(|attack| attack.name.contains(wanted))
                .any(|attack| heard(&attack)),
            "{wanted}: nothing of it came out even without a table, so that the test shows nothing"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_teaches_its_node_nothing() -> Result<()> {
    let mut lab = Lab::new(|_| ()).await?;
    let look = |lab: &Lab| -> Result<String> {
        let mut text = String::new();
        for node in &lab.nodes {
            for words in [
                "route show table all",
                "-6 route show table all",
                "addr show",
                "rule show",
            ] {
                text += &node.host.ip(words)?;
            }
        }
        // Lifetimes count down, and a route is a cached one once packets use it.
        Ok(text
            .lines()
            .filter(|line| !line.contains("cache"))
            .collect::<Vec<_>>()
            .join("\n"))
    };
    let before = look(&lab)?;
    let claims = attacks::claims(&mut lab);
    ensure!(claims.len() > 20, "only {} claims", claims.len());
    run(&mut lab, &claims)?;
    ensure!(
        look(&lab)? == before,
        "routes or addresses have changed:\n{before}\n\n{}",
        look(&lab)?
    );

    // No claimed address was learnt on the attacker's link.
    let node = &lab.nodes[0];
    let neighbours = node
        .host
        .ip(&format!("neigh show dev {}", lab.attacker().interface()))?;
    let foreign = [
        lab.victim().addresses,
        lab.remote().addresses,
        lab.nodes[1].addresses,
    ]
    .concat();
    for address in foreign {
        let known = neighbours
            .lines()
            .any(|line| line.split(' ').next() == Some(&address.to_string()));
        ensure!(
            !known,
            "{address} was learnt on the attacker's link:\n{neighbours}"
        );
    }
    for pod in [lab.victim(), lab.remote()] {
        let gateway = pod.namespace.ip("neigh show 169.254.1.1")?;
        ensure!(
            gateway.is_empty() || gateway.contains(&GATEWAY.to_string()),
            "another's gateway has moved: {gateway}"
        );
    }
    for (pod, node) in [(lab.victim(), &lab.nodes[0]), (lab.remote(), &lab.nodes[1])] {
        for address in pod.addresses {
            let link = node.host.ip(&format!("route get {address}"))?;
            ensure!(
                link.contains(&pod.interface()),
                "{address} is looked for elsewhere: {link}"
            );
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_link_believes_is_turned_off() -> Result<()> {
    let lab = Lab::new(|_| ()).await?;
    for pod in [lab.attacker(), lab.victim()] {
        for (parameter, value) in [
            ("ipv4.conf.{}.rp_filter", "1"),
            ("ipv4.conf.{}.accept_redirects", "0"),
            ("ipv4.conf.{}.accept_source_route", "0"),
            ("ipv4.conf.{}.arp_accept", "0"),
            ("ipv6.conf.{}.accept_ra", "0"),
            ("ipv6.conf.{}.accept_redirects", "0"),
            ("ipv6.conf.{}.accept_source_route", "0"),
            ("ipv6.conf.{}.autoconf", "0"),
        ] {
            let name = format!("net.{}", parameter.replace("{}", &pod.interface()));
            let found = lab.nodes[0].host.command("sysctl", &["-n", &name], "")?;
            ensure!(found.trim() == value, "{name} is {}", found.trim());
        }
    }
    Ok(())
}

/// The victim lets in UDP to one port, and the attacker may send UDP to that port and to nobody
/// else.
fn one_port(records: &mut Records) {
    let key = PolicyKey {
        kind: PolicyKind::GlobalNetworkPolicy,
        namespace: String::new(),
        name: "port".to_owned(),
    };
    let rule = RuleRecord {
        action: Action::Allow,
        ip_version: None,
        protocol: Some(Protocol::UDP),
        not_protocol: None,
        icmp: None,
        not_icmp: None,
        source: SideMatch::default(),
        destination: SideMatch {
            ports: [PortRange::single(PORT), PortRange::single(ALWAYS)].into(),
            ..SideMatch::default()
        },
    };
    let policy = PolicyRecord {
        ingress: vec![rule.clone()],
        egress: vec![rule],
    };
    records.insert(RecordId::Policy(key.clone()), Record::Policy(policy));
    let tier = TierBinding {
        name: "default".to_owned(),
        default_action: Action::Deny,
        ingress: vec![key.clone()],
        egress: vec![key],
    };
    for (id, record) in records.iter_mut() {
        if let (RecordId::Endpoint(_), Record::Endpoint(endpoint)) = (id, record) {
            endpoint.tiers = vec![tier.clone()];
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_of_packets_and_headers_before_the_ports_hide_no_port() -> Result<()> {
    let mut lab = Lab::new(one_port).await?;
    let mut attacks = Vec::new();
    let destinations = [
        (Place::Victim, lab.victim().addresses),
        (Place::Remote, lab.remote().addresses),
    ];
    for (place, addresses) in destinations {
        for (own, address) in lab.attacker().addresses.into_iter().zip(addresses) {
            attacks.extend(hidden::hidden_ports(&mut lab, (own, address), place));
        }
    }
    run(&mut lab, &attacks)?;
    ensure!(
        lab.received(DENIED) == 0,
        "a datagram has come to the port that is denied"
    );
    ensure!(
        lab.received(PORT) > 0,
        "nothing has come to the port that is allowed"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_hardware_address_goes_no_further_than_the_link() -> Result<()> {
    let mut lab = Lab::new(|_| ()).await?;
    let (mac, data) = (lab.number(), lab.number());
    let ends = [lab.attacker().addresses[0], lab.victim().addresses[0]];
    let packet = Packet::new(
        ends[0],
        ends[1],
        Transport::Udp {
            ports: (4000, PORT),
            data: marked(data),
        },
    );
    let frame = packet::ethernet(
        GATEWAY,
        marked_mac(mac),
        packet.ethertype(),
        &packet.encode(),
    );
    let seen = lab.send(&[frame])?;
    ensure!(
        seen.get(&data)
            .is_some_and(|places| places.contains(&Place::Victim)),
        "the packet is routed: {seen:?}"
    );
    ensure!(
        !seen.contains_key(&mac),
        "its sender's hardware address came out: {seen:?}"
    );
    // Replies are addressed to the pod's own interface, whatever source was claimed.
    let neighbours = lab.nodes[0]
        .host
        .ip(&format!("neigh show dev {}", lab.attacker().interface()))?;
    ensure!(
        !neighbours.contains(&marked_mac(mac).to_string()),
        "{neighbours}"
    );
    Ok(())
}
