//! Property of every input: it is refused, or its value can be encoded and decoded again. A panic
//! is a finding.

use std::collections::BTreeMap;

use margay_api::endpoint::HostInterface;
use margay_api::hosts::{NodeInterface, Template};
use margay_api::network::parse_net;
use margay_api::policy::Policy;
use margay_api::problem::Refusal;
use margay_api::rule::{Port, Rule};
use margay_api::selector::Selector;
use margay_api::storage::{self, Mode, kind};
use margay_api::{k8s, v3};
use margay_cni::call;
use margay_cni::config::{self, Version};
use margay_cni::{error, result};
use margay_proto::cni;
use margay_proto::sync::{self, Change, Joiner, wire};
use prost::Message;
use serde_json::{Value, json};

/// A fuzz target.
pub type Target = fn(&[u8]);

/// Every target by its name, which is also that of its folder of seeds.
pub const TARGETS: [(&str, Target); 8] = [
    ("selector", selector),
    ("rule", rule),
    ("policy", policy),
    ("hosts", hosts),
    ("cni", cni),
    ("frame", frame),
    ("up", up),
    ("storage", storage),
];

/// A selector's canonical text parses to the same selector with the same id, and matching it
/// decides something on any labels.
pub fn selector(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    match Selector::parse(text) {
        Ok(parsed) => {
            let canonical = parsed.to_string();
            let again = Selector::parse(&canonical);
            assert_eq!(
                again.as_ref().map(Selector::id),
                Ok(parsed.id()),
                "{text:?} is written {canonical:?}"
            );
            assert_eq!(
                again,
                Ok(parsed.clone()),
                "{text:?} is written {canonical:?}"
            );
            let label = |value: &str| BTreeMap::from([("app".to_owned(), value.to_owned())]);
            for labels in [BTreeMap::new(), label("web"), label("")] {
                let negated = Selector::parse(&format!("!({canonical})"));
                // A selector that is nested as deeply as it may be cannot be negated.
                if let Ok(negated) = negated {
                    assert_ne!(
                        parsed.matches(&labels),
                        negated.matches(&labels),
                        "{canonical:?}"
                    );
                }
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Lines as ranges, ports and protocols of a rule.
pub fn rule(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    let lines: Vec<&str> = text.lines().take(8).collect();
    if let Some(net) = lines.first().and_then(|line| parse_net(line)) {
        assert_eq!(net, net.trunc());
        assert_eq!(parse_net(&net.to_string()), Some(net));
    }
    let number = |line: &&str| {
        line.parse::<i64>()
            .map_or_else(|_| json!(line), |number| json!(number))
    };
    let values: Vec<Value> = lines.iter().map(number).collect();
    let entity = json!({ "nets": lines, "notNets": lines, "ports": values, "notPorts": values });
    for protocol in values
        .first()
        .cloned()
        .into_iter()
        .chain([json!("TCP"), json!(132)])
    {
        let rules = json!([
            { "action": "Allow", "protocol": protocol, "source": entity, "destination": entity },
        ]);
        calico_policy(json!({ "ingress": rules, "egress": rules }));
    }
    let ports: Vec<Value> = values
        .iter()
        .map(|port| json!({ "port": port, "endPort": values.last() }))
        .collect();
    let blocks = json!([{ "ipBlock": { "cidr": lines.first(), "except": lines.get(1..) } }]);
    kubernetes_policy(
        json!({ "ingress": [{ "from": blocks, "ports": ports }], "egress": [{ "to": blocks }] }),
    );
}

/// JSON as the specification of a policy of every kind.
pub fn policy(data: &[u8]) {
    let Ok(spec) = serde_json::from_slice::<Value>(data) else {
        return;
    };
    calico_policy(spec.clone());
    kubernetes_policy(spec);
}

fn object(kind: &str, version: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": version,
        "kind": kind,
        "metadata": { "name": "a", "namespace": "red" },
        "spec": spec,
    })
}

fn calico_policy(spec: Value) {
    let version = "projectcalico.org/v3";
    if let Ok(policy) =
        serde_json::from_value::<v3::NetworkPolicy>(object("NetworkPolicy", version, &spec))
    {
        check_policy(v3::parse::policy::network_policy(&policy));
    }
    if let Ok(policy) = serde_json::from_value::<v3::GlobalNetworkPolicy>(object(
        "GlobalNetworkPolicy",
        version,
        &spec,
    )) {
        check_policy(v3::parse::policy::global_network_policy(&policy));
    }
}

fn kubernetes_policy(spec: Value) {
    let object = object("NetworkPolicy", "networking.k8s.io/v1", &spec);
    if let Ok(policy) = serde_json::from_value(object) {
        check_policy(k8s::netpol::policy(&policy).map(|(_, policy)| policy));
    }
}

fn check_policy(parsed: Result<Policy, Refusal>) {
    let enforced = match parsed {
        Ok(policy) => Some(policy),
        Err(refusal) => {
            assert!(!refusal.problems.is_empty(), "refused without a reason");
            refusal.closed
        }
    };
    let Some(policy) = enforced else { return };
    for rule in policy.ingress.iter().chain(&policy.egress) {
        check_rule(rule);
    }
    assert_eq!(
        Selector::parse(&policy.selector.to_string()).as_ref(),
        Ok(&policy.selector)
    );
}

fn check_rule(rule: &Rule) {
    for entity in [&rule.source, &rule.destination] {
        for net in entity.nets.iter().chain(&entity.not_nets) {
            assert_eq!(*net, net.trunc());
        }
        for port in entity.ports.iter().chain(&entity.not_ports) {
            match port {
                Port::Range(range) => assert!(range.first <= range.last, "{range:?}"),
                Port::Named(name) => assert!(!name.is_empty()),
            }
        }
        for selector in entity.selector.iter().chain(&entity.not_selector) {
            assert_eq!(
                Selector::parse(&selector.to_string()).as_ref(),
                Ok(selector)
            );
        }
    }
}

/// JSON as the specification of a host endpoint, as the settings of those that are made for nodes,
/// and as a node's report of its interfaces.
pub fn hosts(data: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(data) else {
        return;
    };
    let version = "projectcalico.org/v3";
    if let Ok(endpoint) = serde_json::from_value(object("HostEndpoint", version, &value)) {
        let parsed = v3::parse::host::host_endpoint(&endpoint);
        let enforced = match parsed {
            Ok(endpoint) => Some(endpoint),
            Err(refusal) => {
                assert!(!refusal.problems.is_empty(), "refused without a reason");
                refusal.closed
            }
        };
        if let Some(endpoint) = enforced {
            assert!(!endpoint.node.is_empty() && endpoint.addresses.is_sorted());
            assert!(
                endpoint.interface != HostInterface::ByAddress || !endpoint.addresses.is_empty()
            );
        }
    }
    let settings = json!({ "controllers": { "node": { "hostEndpoint": value } } });
    if let Ok(settings) =
        serde_json::from_value(object("KubeControllersConfiguration", version, &settings))
    {
        match v3::parse::controllers::host_endpoints(&settings) {
            Ok(wanted) => wanted.templates.iter().for_each(check_template),
            Err(refusal) => assert!(!refusal.problems.is_empty(), "refused without a reason"),
        }
    }
    if let Ok(interfaces) = serde_json::from_value::<Vec<NodeInterface>>(value) {
        let text = serde_json::to_string(&interfaces).expect("JSON");
        assert_eq!(
            serde_json::from_str::<Vec<NodeInterface>>(&text).expect("its own form"),
            interfaces
        );
    }
}

fn check_template(template: &Template) {
    assert!(template.nets.iter().all(|net| *net == net.trunc()));
    assert_eq!(
        Selector::parse(&template.nodes.to_string()).as_ref(),
        Ok(&template.nodes)
    );
    for interface in ["eth0", "", "bond0.100"] {
        // Whatever the answer is, there is one.
        template
            .interfaces
            .as_ref()
            .map(|pattern| pattern.matches(interface));
    }
}

/// Lines `NAME=VALUE` up to an empty one are the environment, and the rest is standard input of the
/// plugin. The plugin's own answer is always JSON.
pub fn cni(data: &[u8]) {
    let end = data.windows(2).position(|pair| pair == b"\n\n");
    let (head, stdin) = end.map_or((data, &[][..]), |end| (&data[..end], &data[end + 2..]));
    let head = String::from_utf8_lossy(head);
    let variables: BTreeMap<&str, &str> = head
        .lines()
        .filter_map(|line| line.split_once('='))
        .collect();
    let env = |name: &str| variables.get(name).map(|value| (*value).to_owned());
    let answer = |version: Version, error: &error::Error| {
        let text = result::error(version, error);
        let value: Value = serde_json::from_str(&text).expect("an error is JSON");
        assert!(
            value["code"].as_u64().is_some_and(|code| code > 0),
            "{text}"
        );
        assert!(
            value["msg"]
                .as_str()
                .is_some_and(|message| !message.is_empty()),
            "{text}"
        );
    };
    let version = config::version_in(stdin);
    serde_json::from_str::<Value>(&result::versions(stdin)).expect("versions are JSON");
    let parsed = match config::parse(stdin) {
        Ok(parsed) => parsed,
        Err(error) => return answer(version, &error),
    };
    assert!(parsed.socket.is_absolute());
    match call::command(&env).and_then(|command| call::parse(command, &env, &parsed)) {
        Ok(verb) => {
            let request = cni::Request {
                verb: Some(verb),
                ..cni::Request::default()
            };
            if let Ok(frame) = cni::encode_frame(&request) {
                assert_eq!(
                    cni::decode::<cni::Request>(&frame[cni::HEADER..]).expect("its own frame"),
                    request
                );
            }
        }
        Err(error) => answer(version, &error),
    }
    if let Ok(response) = cni::read::<cni::Response>(&mut &stdin[..])
        && let Some(cni::Outcome::Result(found)) = response.outcome
    {
        for version in Version::ALL {
            serde_json::from_str::<Value>(&result::success(version, &found))
                .expect("a result is JSON");
        }
    }
}

/// Messages of a server: an accepted frame is the same after it was encoded again.
pub fn frame(data: &[u8]) {
    let Ok(frame) = wire::Frame::decode(data) else {
        return;
    };
    let Ok(frame) = sync::decode_frame(frame) else {
        return;
    };
    for encode in [sync::encode_change, sync::encode_compact] {
        let changes = frame
            .changes
            .iter()
            .map(|change: &Change| encode(change.into()));
        let pieces = changes
            .chain([sync::encode_trailer(&frame.trailer)])
            .collect();
        let mut parts = Joiner::default();
        let mut joined = None;
        for part in sync::split(pieces, 64) {
            assert_eq!(joined, None, "the last part is the last");
            let part = wire::Frame::decode(&*part.concat()).expect("its own encoding");
            joined = parts.push(part).expect("its own encoding");
        }
        assert_eq!(joined.as_ref(), Some(&frame));
    }
}

/// Messages of a node.
pub fn up(data: &[u8]) {
    let Ok(up) = wire::Up::decode(data) else {
        return;
    };
    let again = match up.message {
        Some(wire::up::Message::Ack(ack)) => {
            let Ok(ack) = sync::decode_ack(ack) else {
                return;
            };
            (sync::encode_ack(&ack), Some(ack), None)
        }
        Some(wire::up::Message::LocalEndpoint(endpoint)) => {
            let Ok(endpoint) = sync::decode_local_endpoint(endpoint) else {
                return;
            };
            (sync::encode_local_endpoint(&endpoint), None, Some(endpoint))
        }
        Some(wire::up::Message::Problems(problems)) => {
            let Ok(problems) = sync::decode_problems(problems) else {
                return;
            };
            let wire::Up {
                message: Some(wire::up::Message::Problems(again)),
            } = sync::encode_problems(&problems)
            else {
                panic!("it is encoded as something else")
            };
            return assert_eq!(sync::decode_problems(again), Ok(problems));
        }
        Some(wire::up::Message::Hello(_)) | None => return,
    };
    match again {
        (
            wire::Up {
                message: Some(wire::up::Message::Ack(wire)),
            },
            wanted,
            _,
        ) => {
            assert_eq!(sync::decode_ack(wire).ok(), wanted);
        }
        (
            wire::Up {
                message: Some(wire::up::Message::LocalEndpoint(wire)),
            },
            _,
            wanted,
        ) => {
            assert_eq!(sync::decode_local_endpoint(wire).ok(), wanted);
        }
        _ => panic!("it is encoded as something else"),
    }
}

/// JSON as an object of the older storage: what is read is written in a form that reads the same.
pub fn storage(data: &[u8]) {
    let kind = |named: &str| kind::ALL.iter().find(|kind| kind.stored_kind == named);
    let named = serde_json::from_slice::<Value>(data)
        .ok()
        .and_then(|object| Some(object["kind"].as_str()?.to_owned()));
    let Some(kind) = named.as_deref().and_then(kind) else {
        return;
    };
    let read = match storage::decode(kind, data) {
        Ok(read) => read,
        Err(fault) => return assert!(!fault.to_string().is_empty()),
    };
    assert!(
        read.problems
            .iter()
            .all(|problem| !problem.to_string().is_empty())
    );
    let rewritten = |object: Value| {
        let stored = storage::write(kind, object).ok()?;
        Some(
            storage::decode(kind, stored.to_string().as_bytes())
                .expect("its own form")
                .object,
        )
    };
    // Digits behind a decimal point may be parsed as a neighbouring number: that is serde_json's,
    // and not under test here.
    if !has_fraction(&read.object)
        && let Some(once) = rewritten(read.object)
    {
        assert_eq!(rewritten(once.clone()), Some(once));
    }
    if let Ok(read) = storage::decode_as::<v3::NetworkPolicy>(Mode::V1, kind, data) {
        check_policy(v3::parse::policy::network_policy(&read.object));
    }
}

fn has_fraction(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().any(has_fraction),
        Value::Object(fields) => fields.values().any(has_fraction),
        other => other.is_f64(),
    }
}
