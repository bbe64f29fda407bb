//! Objects of the simulated cluster, and random changes of them.

use serde_json::{Value, json};

use crate::api::{Api, Key};

/// Namespaces.
const NAMESPACES: u8 = 2;
/// Names of pods in each namespace.
const PODS: u8 = 5;
/// The pod that is never deleted: a kind that a working cluster always has objects of is never
/// empty.
const KEPT: (u8, u8) = (0, 0);

/// A change of an object: kind, name, value.
type Write = (&'static str, Key, Option<Value>);

/// What is there before anything else.
pub fn ground(api: &Api, nodes: &[String]) {
    let spec = |spec: Value| Some(json!({"metadata": {}, "spec": spec}));
    let tier = |order: u32, action: &str| spec(json!({"order": order, "defaultAction": action}));
    api.write("Tier", &Key::new("", "first"), tier(100, "Pass"));
    api.write("Tier", &Key::new("", "default"), tier(1_000_000, "Deny"));
    let pool =
        json!({"cidr": "10.0.0.0/24", "natOutgoing": true, "vxlanMode": "Always", "blockSize": 28});
    api.write("IPPool", &Key::new("", "pool"), spec(pool));
    for namespace in 0..NAMESPACES {
        let (kind, key, value) = mk_namespace(namespace, namespace);
        api.write(kind, &key, value);
    }
    for (number, node) in nodes.iter().enumerate() {
        api.write("Node", &Key::new("", node), Some(mk_node(10 + number)));
    }
    for pod in 0..PODS {
        let (kind, key, value) = mk_pod(0, pod, nodes, usize::from(pod), pod % 3, Some(pod), 0);
        api.write(kind, &key, value);
    }
    let (kind, key, value) = mk_kubernetes_policy(0, 0, 1, Some(0), 80);
    api.write(kind, &key, value);
}

/// Makes one random change.
pub fn change(api: &Api, nodes: &[String], dice: &mut fastrand::Rng) -> String {
    let (kind, key, value) = choose(nodes, dice);
    let text = format!(
        "{} {kind} {key}",
        if value.is_some() { "writes" } else { "deletes" }
    );
    api.write(kind, &key, value);
    text
}

fn choose(nodes: &[String], dice: &mut fastrand::Rng) -> Write {
    let namespace = dice.u8(0..NAMESPACES);
    let name = |kind: &str, most: u8, dice: &mut fastrand::Rng| {
        Key::new("", format!("{kind}{}", dice.u8(0..most)))
    };
    match dice.u8(0..20) {
        0..7 => {
            let (pod, node, app) = (dice.u8(0..PODS), dice.usize(0..nodes.len()), dice.u8(0..3));
            let host = dice
                .bool()
                .then(|| namespace * PODS + pod)
                .or_else(|| Some(dice.u8(0..16)).filter(|_| dice.bool()));
            mk_pod(namespace, pod, nodes, node, app, host, dice.u8(0..2))
        }
        7..10 => {
            let pod = dice.u8(0..PODS);
            let key = Key::new(format!("ns{namespace}"), format!("p{pod}"));
            if (namespace, pod) == KEPT {
                mk_pod(namespace, pod, nodes, 0, dice.u8(0..3), Some(0), 0)
            } else {
                ("Pod", key, None)
            }
        }
        10..12 => {
            let peer = dice.bool().then(|| dice.u8(0..3));
            mk_kubernetes_policy(
                namespace,
                dice.u8(0..2),
                dice.u8(0..4),
                peer,
                if dice.bool() { 80 } else { 443 },
            )
        }
        12..14 => mk_policy(namespace, dice.u8(0..2), dice),
        14 => mk_global_policy(dice),
        15 => {
            let kind = if dice.bool() {
                "KubernetesNetworkPolicy"
            } else {
                "NetworkPolicy"
            };
            let letter = if kind == "NetworkPolicy" { "c" } else { "k" };
            (
                kind,
                Key::new(
                    format!("ns{namespace}"),
                    format!("{letter}{}", dice.u8(0..2)),
                ),
                None,
            )
        }
        16 => {
            let key = name("s", 2, dice);
            let net = format!("10.0.0.{}/{}", 4 * dice.u8(0..4), 30 + dice.u8(0..3));
            let set = json!({
                "metadata": {"labels": {"zone": format!("z{}", dice.u8(0..2))}},
                "spec": {"nets": [net, "192.0.2.0/24"]},
            });
            ("GlobalNetworkSet", key, dice.bool().then_some(set))
        }
        17 => mk_namespace(namespace, dice.u8(0..3)),
        18 => mk_block(dice.u8(0..4), nodes, dice),
        _ => (
            "Node",
            Key::new("", &nodes[dice.usize(0..nodes.len())]),
            Some(mk_node(10 + dice.usize(0..20))),
        ),
    }
}

fn mk_namespace(namespace: u8, team: u8) -> Write {
    let name = format!("ns{namespace}");
    let labels = json!({"team": format!("t{team}"), "kubernetes.io/metadata.name": name});
    (
        "Namespace",
        Key::new("", &name),
        Some(json!({"metadata": {"labels": labels}, "spec": {}})),
    )
}

fn mk_node(last: usize) -> Value {
    let address = json!({"type": "InternalIP", "address": format!("192.0.2.{last}")});
    json!({"metadata": {}, "spec": {}, "status": {"addresses": [address]}})
}

fn mk_pod(
    namespace: u8,
    pod: u8,
    nodes: &[String],
    node: usize,
    app: u8,
    host: Option<u8>,
    uid: u8,
) -> Write {
    let key = Key::new(format!("ns{namespace}"), format!("p{pod}"));
    let ports = json!([{"name": "web", "containerPort": 80, "protocol": "TCP"}]);
    let address = host.map(|host| format!("10.0.0.{host}"));
    let status = match &address {
        Some(address) => json!({"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}),
        None => json!({"phase": "Pending"}),
    };
    let object = json!({
        "metadata": {
            "uid": format!("uid-{namespace}-{pod}-{uid}"),
            "labels": {"app": format!("a{app}")},
        },
        "spec": {
            "nodeName": nodes[node % nodes.len()],
            "containers": [{"name": "c", "ports": ports}],
        },
        "status": status,
    });
    ("Pod", key, Some(object))
}

fn mk_kubernetes_policy(namespace: u8, name: u8, target: u8, peer: Option<u8>, port: u16) -> Write {
    let selector = |app: u8| match app {
        3 => json!({}),
        app => json!({"matchLabels": {"app": format!("a{app}")}}),
    };
    let from = match peer {
        Some(app) => json!([{"podSelector": selector(app)}]),
        None => json!([{"namespaceSelector": {"matchLabels": {"team": "t1"}}}]),
    };
    let rule = json!({
        "from": from,
        "ports": [{"protocol": "TCP", "port": port}, {"protocol": "TCP", "port": "web"}],
    });
    let spec =
        json!({"podSelector": selector(target), "policyTypes": ["Ingress"], "ingress": [rule]});
    let key = Key::new(format!("ns{namespace}"), format!("k{name}"));
    (
        "KubernetesNetworkPolicy",
        key,
        Some(json!({"metadata": {}, "spec": spec})),
    )
}

fn mk_policy(namespace: u8, name: u8, dice: &mut fastrand::Rng) -> Write {
    let action = |dice: &mut fastrand::Rng| if dice.bool() { "Allow" } else { "Deny" };
    let rule = |side: &str, dice: &mut fastrand::Rng| {
        let entity = json!({
            "selector": format!("app == 'a{}'", dice.u8(0..3)),
            "namespaceSelector": "all()",
        });
        json!({"action": action(dice), "protocol": "TCP", side: entity})
    };
    let ingress: Vec<Value> = (0..dice.u8(0..3)).map(|_| rule("source", dice)).collect();
    let egress: Vec<Value> = (0..dice.u8(0..2))
        .map(|_| rule("destination", dice))
        .collect();
    let spec = json!({
        "tier": if dice.bool() { "default" } else { "first" },
        "order": dice.u8(0..4),
        "selector": format!("app != 'a{}'", dice.u8(0..3)),
        "types": ["Ingress", "Egress"],
        "ingress": ingress,
        "egress": egress,
    });
    let key = Key::new(format!("ns{namespace}"), format!("c{name}"));
    (
        "NetworkPolicy",
        key,
        Some(json!({"metadata": {}, "spec": spec})),
    )
}

fn mk_global_policy(dice: &mut fastrand::Rng) -> Write {
    let key = Key::new("", format!("g{}", dice.u8(0..2)));
    let rule =
        json!({"action": "Allow", "source": {"selector": format!("zone == 'z{}'", dice.u8(0..2))}});
    let spec = json!({
        "tier": "default",
        "selector": format!("app == 'a{}'", dice.u8(0..3)),
        "types": ["Ingress"],
        "ingress": [rule],
    });
    let is_there = dice.u8(0..3) > 0;
    (
        "GlobalNetworkPolicy",
        key,
        is_there.then(|| json!({"metadata": {}, "spec": spec})),
    )
}

fn mk_block(number: u8, nodes: &[String], dice: &mut fastrand::Rng) -> Write {
    let first = 16 * u16::from(number);
    let key = Key::new("", format!("10-0-0-{first}-28"));
    let spec = json!({
        "cidr": format!("10.0.0.{first}/28"),
        "affinity": format!("host:{}", nodes[dice.usize(0..nodes.len())]),
        "allocations": vec![Value::Null; 16],
        "unallocated": (0..16).collect::<Vec<u8>>(),
        "attributes": [],
        "strictAffinity": false,
        "deleted": false,
    });
    let is_there = dice.u8(0..4) > 0;
    (
        "IPAMBlock",
        key,
        is_there.then(|| json!({"metadata": {}, "spec": spec})),
    )
}
