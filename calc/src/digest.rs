//! Digests of records: server and agent compare them to find differences. Both compute them from
//! content alone.
//!
//! A record's digest is the first 8 bytes of SHA-256 over an encoding in which every part is tagged
//! or preceded by its length, so different records have different encodings. A set's digest is the
//! digest of its id and kind plus the sum of its members' digests, so the cost of a change is
//! proportional to the members that change. The digest of a bucket is the sum of its records'
//! digests.
//!
//! Server and agent may be of different versions, so the encoding is fixed: a changed encoding
//! needs another domain letter, or one side would take a different record for the same.

mod bgp;

use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::network::{Encapsulation, NodeInfo};
use margay_api::policy::PolicyKey;
use margay_api::rule::{Action, Icmp, IpVersion, PortRange};
use margay_api::settings::{Digested, EndpointToHostAction, Failsafe, FelixSettings, SettingValue};
use sha2::{Digest, Sha256};

use crate::model::{
    EndpointRecord, HostEndpointRecord, HostInterfaces, IpSetRecord, Member, PolicyRecord,
    PoolRecord, Record, RecordId, RouteRecord, RuleRecord, SetId, SetKind, SideMatch, TierBinding,
};

/// Number of buckets: 2 KB of hello, and 1/256 of the view to resend for one difference.
pub const BUCKETS: usize = 256;

/// Digests of a view's buckets.
pub type Buckets = [u64; BUCKETS];

/// Bucket of a record, below [`BUCKETS`].
pub fn bucket(id: &RecordId) -> u32 {
    let mut encoder = DigestEncoder::new(b'b');
    encoder.put_id(id);
    (encoder.finish() % BUCKETS as u64) as u32
}

/// Digest of a record.
pub fn digest(id: &RecordId, record: &Record) -> u64 {
    if let (RecordId::IpSet(set), Record::IpSet(IpSetRecord { kind, members })) = (id, record) {
        let members = members.iter().map(member);
        return members.fold(empty_set(set, *kind), u64::wrapping_add);
    }
    let mut encoder = DigestEncoder::new(b'r');
    encoder.put_id(id);
    encoder.put_record(record);
    encoder.finish()
}

/// Digest of a set without members. Adding [`member`] of each (wrapping) gives the digest of the
/// whole set.
pub fn empty_set(id: &SetId, kind: SetKind) -> u64 {
    let mut encoder = DigestEncoder::new(b's');
    encoder.put_text(&id.0);
    encoder.put_kind(kind);
    encoder.finish()
}

/// Contribution of a member to the digest of its set.
pub fn member(member: &Member) -> u64 {
    // Hashed at once, as a set may have a hundred thousand members.
    let mut bytes = MemberBytes::default();
    bytes.put(b"m");
    match member {
        Member::Net(net) => {
            bytes.put(&[0]);
            bytes.put_address(&net.addr());
            bytes.put(&[net.prefix_len()]);
        }
        Member::AddressPort(address, protocol, port) => {
            bytes.put(&[1]);
            bytes.put_address(address);
            bytes.put(&[protocol.0]);
            bytes.put(&port.to_be_bytes());
        }
    }
    first_number(&Sha256::digest(&bytes.bytes[..bytes.length]))
}

/// Encoding of a member, with its domain.
#[derive(Default)]
struct MemberBytes {
    bytes: [u8; 24],
    length: usize,
}

impl MemberBytes {
    fn put(&mut self, part: &[u8]) {
        self.bytes[self.length..self.length + part.len()].copy_from_slice(part);
        self.length += part.len();
    }

    fn put_address(&mut self, address: &IpAddr) {
        match address {
            IpAddr::V4(address) => {
                self.put(&[4]);
                self.put(&address.octets());
            }
            IpAddr::V6(address) => {
                self.put(&[6]);
                self.put(&address.octets());
            }
        }
    }
}

fn first_number(hash: &[u8]) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&hash[..8]);
    u64::from_be_bytes(first)
}

/// Digests of the buckets of these records.
pub fn buckets<'a>(records: impl IntoIterator<Item = (&'a RecordId, &'a Record)>) -> Buckets {
    let mut buckets = [0; BUCKETS];
    for (id, record) in records {
        add(&mut buckets, id, digest(id, record));
    }
    buckets
}

/// Adds a record's digest to its bucket.
pub fn add(buckets: &mut Buckets, id: &RecordId, digest: u64) {
    let sum = &mut buckets[bucket(id) as usize];
    *sum = sum.wrapping_add(digest);
}

/// Subtracts a record's digest from its bucket.
pub fn subtract(buckets: &mut Buckets, id: &RecordId, digest: u64) {
    let sum = &mut buckets[bucket(id) as usize];
    *sum = sum.wrapping_sub(digest);
}

struct DigestEncoder(Sha256);

impl DigestEncoder {
    fn new(domain: u8) -> Self {
        let mut encoder = Self(Sha256::new());
        encoder.put_byte(domain);
        encoder
    }

    fn finish(self) -> u64 {
        first_number(&self.0.finalize())
    }

    fn put_byte(&mut self, byte: u8) {
        self.0.update([byte]);
    }

    fn put_number(&mut self, number: u64) {
        self.0.update(number.to_be_bytes());
    }

    fn put_text(&mut self, text: &str) {
        self.put_number(text.len() as u64);
        self.0.update(text.as_bytes());
    }

    fn put_option<T>(&mut self, value: Option<T>, encode: impl FnOnce(&mut Self, T)) {
        self.put_byte(u8::from(value.is_some()));
        if let Some(value) = value {
            encode(self, value);
        }
    }

    fn put_list<T>(&mut self, values: &[T], mut encode: impl FnMut(&mut Self, &T)) {
        self.put_number(values.len() as u64);
        for value in values {
            encode(self, value);
        }
    }

    fn put_address(&mut self, address: &IpAddr) {
        match address {
            IpAddr::V4(address) => {
                self.put_byte(4);
                self.0.update(address.octets());
            }
            IpAddr::V6(address) => {
                self.put_byte(6);
                self.0.update(address.octets());
            }
        }
    }

    fn put_net(&mut self, net: &IpNet) {
        self.put_address(&net.addr());
        self.put_byte(net.prefix_len());
    }

    fn put_kind(&mut self, kind: SetKind) {
        self.put_byte(match kind {
            SetKind::Net => 0,
            SetKind::AddressPort => 1,
        });
    }

    fn put_encapsulation(&mut self, encapsulation: Encapsulation) {
        self.put_byte(match encapsulation {
            Encapsulation::None => 0,
            Encapsulation::Vxlan => 1,
            Encapsulation::VxlanCrossSubnet => 2,
            Encapsulation::Ipip => 3,
            Encapsulation::IpipCrossSubnet => 4,
        });
    }

    fn put_action(&mut self, action: Action) {
        self.put_byte(match action {
            Action::Allow => 0,
            Action::Deny => 1,
            Action::Log => 2,
            Action::Pass => 3,
        });
    }

    fn put_id(&mut self, id: &RecordId) {
        match id {
            RecordId::Settings => self.put_byte(0),
            RecordId::Pool(net) => {
                self.put_byte(1);
                self.put_net(net);
            }
            RecordId::Node(name) => {
                self.put_byte(2);
                self.put_text(name);
            }
            RecordId::Route(net) => {
                self.put_byte(3);
                self.put_net(net);
            }
            RecordId::IpSet(set) => {
                self.put_byte(4);
                self.put_text(&set.0);
            }
            RecordId::Policy(key) => {
                self.put_byte(5);
                self.put_policy_key(key);
            }
            RecordId::Endpoint(key) => {
                self.put_byte(6);
                self.put_text(&key.namespace);
                self.put_text(&key.name);
            }
            RecordId::HostEndpoint(name) => {
                self.put_byte(7);
                self.put_text(name);
            }
            RecordId::Bgp => self.put_byte(8),
        }
    }

    fn put_policy_key(&mut self, key: &PolicyKey) {
        self.put_text(key.kind.as_str());
        self.put_text(&key.namespace);
        self.put_text(&key.name);
    }

    fn put_record(&mut self, record: &Record) {
        match record {
            Record::Settings(settings) => self.put_settings(settings),
            Record::Pool(PoolRecord {
                nat_outgoing,
                encapsulation,
            }) => {
                self.put_byte(u8::from(*nat_outgoing));
                self.put_encapsulation(*encapsulation);
            }
            Record::Node(node) => self.put_node(node),
            Record::Route(RouteRecord {
                node,
                encapsulation,
            }) => {
                self.put_text(node);
                self.put_encapsulation(*encapsulation);
            }
            // Only if id and record disagree in kind: `digest` handles sets.
            Record::IpSet(set) => self.put_kind(set.kind),
            Record::Policy(PolicyRecord { ingress, egress }) => {
                self.put_list(ingress, Self::put_rule);
                self.put_list(egress, Self::put_rule);
            }
            Record::Endpoint(endpoint) => self.put_endpoint(endpoint),
            Record::HostEndpoint(endpoint) => self.put_host_endpoint(endpoint),
            Record::Bgp(bgp) => self.put_bgp(bgp),
        }
    }

    fn put_settings(&mut self, settings: &FelixSettings) {
        let settings = settings.fields();
        let of = |group: Digested| {
            settings
                .iter()
                .filter(move |setting| setting.digested == group)
        };
        of(Digested::Always).for_each(|setting| self.put_setting(setting.value));
        for setting in of(Digested::IfSet).filter(|setting| !setting.is_default) {
            self.put_text(setting.name);
            // The name says it all of a switch.
            if !matches!(setting.value, SettingValue::Flag(_)) {
                self.put_setting(setting.value);
            }
        }
    }

    fn put_setting(&mut self, value: SettingValue<'_>) {
        match value {
            SettingValue::Number(number) => self.put_number(number),
            SettingValue::Flag(is_set) => self.put_byte(u8::from(is_set)),
            SettingValue::Text(text) => self.put_text(text),
            SettingValue::ToHost(action) => self.put_byte(match action {
                EndpointToHostAction::Drop => 0,
                EndpointToHostAction::Accept => 1,
                EndpointToHostAction::Return => 2,
            }),
            SettingValue::Rate(rate) => self.put_option(rate, |encoder, rate| {
                encoder.put_number(u64::from(rate.count));
                encoder.put_text(rate.unit.as_str());
            }),
            SettingValue::Failsafes(ports) => self.put_list(ports, Self::put_failsafe),
        }
    }

    fn put_failsafe(&mut self, failsafe: &Failsafe) {
        let Failsafe {
            protocol,
            port,
            net,
        } = failsafe;
        self.put_byte(protocol.0);
        self.0.update(port.to_be_bytes());
        self.put_option(net.as_ref(), Self::put_net);
    }

    fn put_node(&mut self, node: &NodeInfo) {
        let NodeInfo {
            ipv4,
            ipv6,
            vtep,
            vtep6,
            ipip,
            labels,
            bgp,
            bgp_annotations: _,
            standing: _,
        } = node;
        self.put_option(*ipv4, |encoder, net| encoder.put_net(&IpNet::V4(net)));
        self.put_option(*ipv6, |encoder, net| encoder.put_net(&IpNet::V6(net)));
        self.put_option(vtep.as_ref(), |encoder, vtep| {
            encoder.put_address(&IpAddr::V4(vtep.address));
            encoder.0.update(vtep.mac.0);
        });
        self.put_number(labels.len() as u64);
        for (key, value) in labels {
            self.put_text(key);
            self.put_text(value);
        }
        // Appended to the encoding of older versions, and only if set, so that a node without it
        // keeps its digest.
        if let Some(vtep) = vtep6 {
            self.put_address(&IpAddr::V6(vtep.address));
            self.0.update(vtep.mac.0);
        }
        if let Some(bgp) = bgp {
            self.put_text("bgp");
            self.put_node_bgp(bgp);
        }
        if let Some(address) = ipip {
            self.put_text("ipip");
            self.put_address(&IpAddr::V4(*address));
        }
    }

    fn put_rule(&mut self, rule: &RuleRecord) {
        let RuleRecord {
            action,
            ip_version,
            protocol,
            not_protocol,
            icmp,
            not_icmp,
            source,
            destination,
        } = rule;
        self.put_action(*action);
        self.put_option(*ip_version, |encoder, version| {
            encoder.put_byte(match version {
                IpVersion::V4 => 4,
                IpVersion::V6 => 6,
            });
        });
        self.put_option(*protocol, |encoder, protocol| encoder.put_byte(protocol.0));
        self.put_option(*not_protocol, |encoder, protocol| {
            encoder.put_byte(protocol.0)
        });
        self.put_option(*icmp, Self::put_icmp);
        self.put_option(*not_icmp, Self::put_icmp);
        self.put_side(source);
        self.put_side(destination);
    }

    fn put_icmp(&mut self, icmp: Icmp) {
        self.put_option(icmp.kind, Self::put_byte);
        self.put_option(icmp.code, Self::put_byte);
    }

    fn put_side(&mut self, side: &SideMatch) {
        let SideMatch {
            nets,
            not_nets,
            sets,
            not_sets,
            ports,
            port_sets,
            not_ports,
            not_port_sets,
            service_set,
        } = side;
        let set = |encoder: &mut Self, set: &SetId| encoder.put_text(&set.0);
        self.put_list(nets, Self::put_net);
        self.put_list(not_nets, Self::put_net);
        self.put_list(sets, set);
        self.put_list(not_sets, set);
        self.put_list(ports, Self::put_ports);
        self.put_list(port_sets, set);
        self.put_list(not_ports, Self::put_ports);
        self.put_list(not_port_sets, set);
        self.put_option(service_set.as_ref(), set);
    }

    fn put_ports(&mut self, ports: &PortRange) {
        self.0.update(ports.first.to_be_bytes());
        self.0.update(ports.last.to_be_bytes());
    }

    fn put_endpoint(&mut self, endpoint: &EndpointRecord) {
        let EndpointRecord {
            interface,
            uid,
            addresses,
            tiers,
            unmatched,
        } = endpoint;
        self.put_text(interface);
        // Omitted if empty, so that records from and for versions without uids keep their digest.
        if !uid.is_empty() {
            self.put_text(uid);
        }
        self.put_list(addresses, Self::put_address);
        self.put_list(tiers, Self::put_tier);
        self.put_action(*unmatched);
    }

    fn put_host_endpoint(&mut self, endpoint: &HostEndpointRecord) {
        let HostEndpointRecord {
            interfaces,
            normal,
            forward,
            pre_dnat,
            untracked,
            unmatched,
        } = endpoint;
        match interfaces {
            HostInterfaces::All => self.put_byte(0),
            HostInterfaces::Named(name) => {
                self.put_byte(1);
                self.put_text(name);
            }
            HostInterfaces::WithAddress(addresses) => {
                self.put_byte(2);
                self.put_number(addresses.len() as u64);
                addresses
                    .iter()
                    .for_each(|address| self.put_address(address));
            }
        }
        for tiers in [normal, forward, pre_dnat, untracked] {
            self.put_list(tiers, Self::put_tier);
        }
        self.put_action(*unmatched);
    }

    fn put_tier(&mut self, tier: &TierBinding) {
        let TierBinding {
            name,
            default_action,
            ingress,
            egress,
        } = tier;
        self.put_text(name);
        self.put_action(*default_action);
        self.put_list(ingress, Self::put_policy_key);
        self.put_list(egress, Self::put_policy_key);
    }
}

#[cfg(test)]
mod tests {
    use margay_api::rule::Protocol;

    use super::*;

    #[test]
    fn digests_of_members_do_not_change() {
        let net = Member::Net("10.0.0.1/32".parse().expect("a range"));
        let port = Member::AddressPort("fd00::1".parse().expect("an address"), Protocol::TCP, 8080);
        assert_eq!(
            [member(&net), member(&port)],
            [0x5e30_8b18_6ad7_7062, 0x83b9_e8bb_ffd6_9607]
        );
    }
}
