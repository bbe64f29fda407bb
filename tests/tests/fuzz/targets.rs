//! What every input must be good for: it is refused, or what it means can be written down and read again. A panic is a finding.

use std::collections::BTreeMap;
use std::time::Duration;

use margay_api::endpoint::HostInterface;
use margay_api::hosts::{NodeInterface, Template};
use margay_api::network::parse_net;
use margay_api::policy::Policy;
use margay_api::problem::Refusal;
use margay_api::rule::{Port, Rule};
use margay_api::selector::Selector;
use margay_api::storage::{self, Mode, kind};
use margay_api::{k8s, v3};
use margay_bgp::codec::{self, CodecContext, Framer, Plain};
use margay_bgp::config::{PeerConfig, PeerId, SpeakerConfig};
use margay_bgp::message::{Capabilities, Message as BgpMessage, Open};
use margay_bgp::session::Moment;
use margay_bgp::speaker::Speaker;
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
pub const TARGETS: [(&str, Target); 9] = [
    ("selector", selector),
    ("rule", rule),
    ("policy", policy),
    ("hosts", hosts),
    ("cni", cni),
    ("frame", frame),
    ("up", up),
    ("storage", storage),
    ("bgp", bgp),
];

/// A selector's canonical text parses to the same selector with the same id, and matching it decides something on any labels.
pub fn selector(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    match Selector::parse(text) {
        Ok(parsed) => {
            let canonical = parsed.to_string();
            let again = Selector::parse(&canonical);
            assert_eq!(again.as_ref().map(Selector::id), Ok(parsed.id()), "{text:?} is written {canonical:?}");
            assert_eq!(again, Ok(parsed.clone()), "{text:?} is written {canonical:?}");
            let label = |value: &str| BTreeMap::from([("app".to_owned(), value.to_owned())]);
            for labels in [BTreeMap::new(), label("web"), label("")] {
                let negated = Selector::parse(&format!("!({canonical})"));
                // A selector that is nested as deeply as it may be cannot be negated.
                if let Ok(negated) = negated {
                    assert_ne!(parsed.matches(&labels), negated.matches(&labels), "{canonical:?}");
                }
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Lines as ranges, ports and protocols of a rule.
pub fn rule(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let lines: Vec<&str> = text.lines().take(8).collect();
    if let Some(net) = lines.first().and_then(|line| parse_net(line)) {
        assert_eq!(net, net.trunc());
        assert_eq!(parse_net(&net.to_string()), Some(net));
    }
    let number = |line: &&str| line.parse::<i64>().map_or_else(|_| json!(line), |number| json!(number));
    let values: Vec<Value> = lines.iter().map(number).collect();
    let entity = json!({ "nets": lines, "notNets": lines, "ports": values, "notPorts": values });
    for protocol in values.first().cloned().into_iter().chain([json!("TCP"), json!(132)]) {
        let rules = json!([{ "action": "Allow", "protocol": protocol, "source": entity, "destination": entity }]);
        calico_policy(json!({ "ingress": rules, "egress": rules }));
    }
    let ports: Vec<Value> = values.iter().map(|port| json!({ "port": port, "endPort": values.last() })).collect();
    let blocks = json!([{ "ipBlock": { "cidr": lines.first(), "except": lines.get(1..) } }]);
    kubernetes_policy(json!({ "ingress": [{ "from": blocks, "ports": ports }], "egress": [{ "to": blocks }] }));
}

/// JSON as the specification of a policy of every kind.
pub fn policy(data: &[u8]) {
    let Ok(spec) = serde_json::from_slice::<Value>(data) else { return };
    calico_policy(spec.clone());
    kubernetes_policy(spec);
}

fn object(kind: &str, version: &str, spec: &Value) -> Value {
    json!({ "apiVersion": version, "kind": kind, "metadata": { "name": "a", "namespace": "red" }, "spec": spec })
}

fn calico_policy(spec: Value) {
    let version = "projectcalico.org/v3";
    if let Ok(policy) = serde_json::from_value::<v3::NetworkPolicy>(object("NetworkPolicy", version, &spec)) {
        check_policy(v3::parse::policy::network_policy(&policy));
    }
    if let Ok(policy) = serde_json::from_value::<v3::GlobalNetworkPolicy>(object("GlobalNetworkPolicy", version, &spec))
    {
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
    assert_eq!(Selector::parse(&policy.selector.to_string()).as_ref(), Ok(&policy.selector));
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
            assert_eq!(Selector::parse(&selector.to_string()).as_ref(), Ok(selector));
        }
    }
}

/// JSON as the specification of a host endpoint, as the settings of those that are made for nodes, and as what a node tells of its interfaces.
pub fn hosts(data: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(data) else { return };
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
            assert!(endpoint.interface != HostInterface::ByAddress || !endpoint.addresses.is_empty());
        }
    }
    let settings = json!({ "controllers": { "node": { "hostEndpoint": value } } });
    if let Ok(settings) = serde_json::from_value(object("KubeControllersConfiguration", version, &settings)) {
        match v3::parse::controllers::host_endpoints(&settings) {
            Ok(wanted) => wanted.templates.iter().for_each(check_template),
            Err(refusal) => assert!(!refusal.problems.is_empty(), "refused without a reason"),
        }
    }
    if let Ok(interfaces) = serde_json::from_value::<Vec<NodeInterface>>(value) {
        let text = serde_json::to_string(&interfaces).expect("JSON");
        assert_eq!(serde_json::from_str::<Vec<NodeInterface>>(&text).expect("its own form"), interfaces);
    }
}

fn check_template(template: &Template) {
    assert!(template.nets.iter().all(|net| *net == net.trunc()));
    assert_eq!(Selector::parse(&template.nodes.to_string()).as_ref(), Ok(&template.nodes));
    for interface in ["eth0", "", "bond0.100"] {
        // Whatever the answer is, there is one.
        template.interfaces.as_ref().map(|pattern| pattern.matches(interface));
    }
}

/// Lines `NAME=VALUE` up to an empty one are the environment, and the rest is standard input of the plugin. The plugin's own answer is always JSON.
pub fn cni(data: &[u8]) {
    let end = data.windows(2).position(|pair| pair == b"\n\n");
    let (head, stdin) = end.map_or((data, &[][..]), |end| (&data[..end], &data[end + 2..]));
    let head = String::from_utf8_lossy(head);
    let variables: BTreeMap<&str, &str> = head.lines().filter_map(|line| line.split_once('=')).collect();
    let env = |name: &str| variables.get(name).map(|value| (*value).to_owned());
    let answer = |version: Version, error: &error::Error| {
        let text = result::error(version, error);
        let value: Value = serde_json::from_str(&text).expect("an error is JSON");
        assert!(value["code"].as_u64().is_some_and(|code| code > 0), "{text}");
        assert!(value["msg"].as_str().is_some_and(|message| !message.is_empty()), "{text}");
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
            let request = cni::Request { verb: Some(verb), ..cni::Request::default() };
            if let Ok(frame) = cni::encode_frame(&request) {
                assert_eq!(cni::decode::<cni::Request>(&frame[cni::HEADER..]).expect("its own frame"), request);
            }
        }
        Err(error) => answer(version, &error),
    }
    if let Ok(response) = cni::read::<cni::Response>(&mut &stdin[..])
        && let Some(cni::Outcome::Result(found)) = response.outcome
    {
        for version in Version::ALL {
            serde_json::from_str::<Value>(&result::success(version, &found)).expect("a result is JSON");
        }
    }
}

/// What a server may send: a frame that is taken is the same after it was encoded once more.
pub fn frame(data: &[u8]) {
    let Ok(frame) = wire::Frame::decode(data) else { return };
    let Ok(frame) = sync::decode_frame(frame) else { return };
    for encode in [sync::encode_change, sync::encode_compact] {
        let changes = frame.changes.iter().map(|change: &Change| encode(change.into()));
        let pieces = changes.chain([sync::encode_trailer(&frame.trailer)]).collect();
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

/// What a node may say.
pub fn up(data: &[u8]) {
    let Ok(up) = wire::Up::decode(data) else { return };
    let again = match up.message {
        Some(wire::up::Message::Ack(ack)) => {
            let Ok(ack) = sync::decode_ack(ack) else { return };
            (sync::encode_ack(&ack), Some(ack), None)
        }
        Some(wire::up::Message::LocalEndpoint(endpoint)) => {
            let Ok(endpoint) = sync::decode_local_endpoint(endpoint) else { return };
            (sync::encode_local_endpoint(&endpoint), None, Some(endpoint))
        }
        Some(wire::up::Message::Problems(problems)) => {
            let Ok(problems) = sync::decode_problems(problems) else { return };
            let wire::Up { message: Some(wire::up::Message::Problems(again)) } = sync::encode_problems(&problems)
            else {
                panic!("it is encoded as something else")
            };
            return assert_eq!(sync::decode_problems(again), Ok(problems));
        }
        Some(wire::up::Message::Hello(_)) | None => return,
    };
    match again {
        (wire::Up { message: Some(wire::up::Message::Ack(wire)) }, wanted, _) => {
            assert_eq!(sync::decode_ack(wire).ok(), wanted);
        }
        (wire::Up { message: Some(wire::up::Message::LocalEndpoint(wire)) }, _, wanted) => {
            assert_eq!(sync::decode_local_endpoint(wire).ok(), wanted);
        }
        _ => panic!("it is encoded as something else"),
    }
}

/// JSON as an object of the older storage: what is read is written in a form that reads the same.
pub fn storage(data: &[u8]) {
    let kind = |named: &str| kind::ALL.iter().find(|kind| kind.stored_kind == named);
    let named = serde_json::from_slice::<Value>(data).ok().and_then(|object| Some(object["kind"].as_str()?.to_owned()));
    let Some(kind) = named.as_deref().and_then(kind) else { return };
    let read = match storage::decode(kind, data) {
        Ok(read) => read,
        Err(fault) => return assert!(!fault.to_string().is_empty()),
    };
    assert!(read.problems.iter().all(|problem| !problem.to_string().is_empty()));
    let rewritten = |object: Value| {
        let stored = storage::write(kind, object).ok()?;
        Some(storage::decode(kind, stored.to_string().as_bytes()).expect("its own form").object)
    };
    // What stands behind a point may be read as its neighbour: that is serde_json's, and is not what is asked here.
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

/// Bytes of a BGP peer: each message is read or refused, what is read is written and read again, and a speaker that has a
/// session with the peer takes all of it.
pub fn bgp(data: &[u8]) {
    let internal =
        CodecContext { four_octet_as: true, is_internal: true, ipv4: true, ipv6: true, extended_next_hop: true };
    let external = CodecContext { is_internal: false, extended_next_hop: false, ..internal };
    for context in [internal, external, CodecContext { four_octet_as: false, ..external }] {
        let mut framer = Framer::default();
        let end = framer.push(data, &mut |message| {
            match codec::decode(message, &context) {
                Ok(BgpMessage::Update(update)) if context.four_octet_as => check_routes(update, &context),
                Ok(_) => {}
                Err(error) => assert!((1..=7).contains(&error.notification.code), "{error}"),
            }
            true
        });
        assert!(framer.held() < codec::MAX_MESSAGE && end.err().is_none_or(|error| !error.detail.is_empty()));
    }
    feed_speaker(data);
}

fn check_routes(update: margay_bgp::message::Update, context: &CodecContext) {
    for (mut attributes, nets) in update.announced {
        let mut bytes = Vec::new();
        let left = codec::encode_update(Some(&attributes), &nets, context, &mut bytes);
        let mut again = Vec::new();
        let read = Framer::default().push(&bytes, &mut |message| {
            match codec::decode(message, context) {
                Ok(BgpMessage::Update(update)) => again.extend(update.announced),
                other => panic!("{other:?}"),
            }
            true
        });
        assert!(read.is_ok());
        // What passes a speaker that does not know it is marked as partial; how long its length is means nothing.
        attributes.unknown.iter_mut().for_each(|each| each.flags = each.flags & !0x10 | 0x20);
        for (found, _) in &mut again {
            found.unknown.iter_mut().for_each(|each| each.flags &= !0x10);
            assert_eq!(*found, attributes);
        }
        let found: Vec<_> = again.into_iter().flat_map(|(_, nets)| nets).collect();
        assert_eq!(found, nets[..nets.len() - left]);
    }
}

fn feed_speaker(data: &[u8]) {
    let moment = |seconds| Moment { now: Duration::from_secs(seconds), jitter: 0 };
    let peer = PeerId(1);
    let mut config = PeerConfig::new(([10, 9, 0, 2], 179).into(), 64512);
    config.families = margay_bgp::attributes::Family::ALL.into();
    let open = Open {
        asn: 64512,
        hold_time: config.hold_time,
        router_id: [10, 9, 0, 2].into(),
        capabilities: Capabilities {
            families: config.families.clone(),
            four_octet_as: true,
            route_refresh: true,
            enhanced_route_refresh: true,
            ..Capabilities::default()
        },
    };
    let speaker = Speaker::new(SpeakerConfig::new(64512, [10, 9, 0, 1].into()), Duration::ZERO);
    let mut speaker = speaker.expect("a configuration");
    speaker.set_peer(peer, config, moment(0)).expect("a configuration");
    let connection = speaker.accept([10, 9, 0, 2].into(), [10, 9, 0, 1].into(), moment(0)).expect("a peer");
    let begin = [codec::encode(&open), codec::encode(Plain::Keepalive)].concat();
    speaker.receive(connection, &begin, moment(0));
    speaker.receive(connection, data, moment(1));
    let mut out = Vec::new();
    speaker.transmit(connection, usize::MAX, moment(1), &mut out);
    // A prefix takes a byte at least.
    assert!(speaker.kernel_routes().count() <= data.len());
    speaker.tick(moment(1000));
    assert!(speaker.kernel_routes().count() <= data.len());
}
