//! Digests of records: what two sides compare to find out where they differ. Both compute them from content alone.
//!
//! A record's digest is the start of SHA-256 over an encoding in which every part has a length or a tag before it, so no two
//! records share one. A set's digest is the digest of its id and kind plus the sum of its members' digests, so a change of
//! members costs what the members cost. Digests of a bucket's records add up to the bucket's digest.
//!
//! The two sides may be of different versions, so the encoding is fixed: what is encoded otherwise than before must be encoded under a
//! domain of another letter, or one side would take the other's meaning for its own.

use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::network::{Encapsulation, EndpointToHostAction, Failsafe, FelixSettings, NodeInfo};
use margay_api::policy::PolicyKey;
use margay_api::rule::{Action, Icmp, IpVersion, PortRange};
use sha2::{Digest, Sha256};

use crate::model::{
    EndpointRecord, HostEndpointRecord, HostInterfaces, IpSetRecord, Member, PolicyRecord, PoolRecord, Record,
    RecordId, RouteRecord, RuleRecord, SetId, SetKind, SideMatch, TierBinding,
};

/// Number of buckets: 2 KB of hello, and 1/256 of the view to restate for one difference.
pub const BUCKETS: usize = 256;

/// The digests of a view's buckets.
pub type Buckets = [u64; BUCKETS];

/// The bucket of a record, below [`BUCKETS`].
pub fn bucket(id: &RecordId) -> u32 {
    let mut encoder = Encoder::new(b'b');
    encoder.id(id);
    (encoder.finish() % BUCKETS as u64) as u32
}

/// The digest of a record.
pub fn digest(id: &RecordId, record: &Record) -> u64 {
    if let (RecordId::IpSet(set), Record::IpSet(IpSetRecord { kind, members })) = (id, record) {
        let members = members.iter().map(member);
        return members.fold(empty_set(set, *kind), u64::wrapping_add);
    }
    let mut encoder = Encoder::new(b'r');
    encoder.id(id);
    encoder.record(record);
    encoder.finish()
}

/// The digest of a set without members. Adding [`member`] of each (wrapping) gives the digest of the whole set.
pub fn empty_set(id: &SetId, kind: SetKind) -> u64 {
    let mut encoder = Encoder::new(b's');
    encoder.text(&id.0);
    encoder.kind(kind);
    encoder.finish()
}

/// What a member adds to the digest of its set.
pub fn member(member: &Member) -> u64 {
    let mut encoder = Encoder::new(b'm');
    encoder.member(member);
    encoder.finish()
}

/// Digests of the buckets of these records.
pub fn buckets<'a>(records: impl IntoIterator<Item = (&'a RecordId, &'a Record)>) -> Buckets {
    let mut buckets = [0; BUCKETS];
    for (id, record) in records {
        add(&mut buckets, id, digest(id, record));
    }
    buckets
}

/// Puts a record's digest into its bucket.
pub fn add(buckets: &mut Buckets, id: &RecordId, digest: u64) {
    let sum = &mut buckets[bucket(id) as usize];
    *sum = sum.wrapping_add(digest);
}

/// Takes a record's digest out of its bucket.
pub fn subtract(buckets: &mut Buckets, id: &RecordId, digest: u64) {
    let sum = &mut buckets[bucket(id) as usize];
    *sum = sum.wrapping_sub(digest);
}

struct Encoder(Sha256);

impl Encoder {
    fn new(domain: u8) -> Self {
        let mut encoder = Self(Sha256::new());
        encoder.byte(domain);
        encoder
    }

    fn finish(self) -> u64 {
        let hash = self.0.finalize();
        let mut first = [0; 8];
        first.copy_from_slice(&hash[..8]);
        u64::from_be_bytes(first)
    }

    fn byte(&mut self, byte: u8) {
        self.0.update([byte]);
    }

    fn number(&mut self, number: u64) {
        self.0.update(number.to_be_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.update(text.as_bytes());
    }

    fn option<T>(&mut self, value: Option<T>, encode: impl FnOnce(&mut Self, T)) {
        self.byte(u8::from(value.is_some()));
        if let Some(value) = value {
            encode(self, value);
        }
    }

    fn list<T>(&mut self, values: &[T], mut encode: impl FnMut(&mut Self, &T)) {
        self.number(values.len() as u64);
        for value in values {
            encode(self, value);
        }
    }

    fn address(&mut self, address: &IpAddr) {
        match address {
            IpAddr::V4(address) => {
                self.byte(4);
                self.0.update(address.octets());
            }
            IpAddr::V6(address) => {
                self.byte(6);
                self.0.update(address.octets());
            }
        }
    }

    fn net(&mut self, net: &IpNet) {
        self.address(&net.addr());
        self.byte(net.prefix_len());
    }

    fn kind(&mut self, kind: SetKind) {
        self.byte(match kind {
            SetKind::Net => 0,
            SetKind::AddressPort => 1,
        });
    }

    fn encapsulation(&mut self, encapsulation: Encapsulation) {
        self.byte(match encapsulation {
            Encapsulation::None => 0,
            Encapsulation::Vxlan => 1,
            Encapsulation::VxlanCrossSubnet => 2,
            Encapsulation::Ipip => 3,
            Encapsulation::IpipCrossSubnet => 4,
        });
    }

    fn action(&mut self, action: Action) {
        self.byte(match action {
            Action::Allow => 0,
            Action::Deny => 1,
            Action::Log => 2,
            Action::Pass => 3,
        });
    }

    fn member(&mut self, member: &Member) {
        match member {
            Member::Net(net) => {
                self.byte(0);
                self.net(net);
            }
            Member::AddressPort(address, protocol, port) => {
                self.byte(1);
                self.address(address);
                self.byte(protocol.0);
                self.0.update(port.to_be_bytes());
            }
        }
    }

    fn id(&mut self, id: &RecordId) {
        match id {
            RecordId::Settings => self.byte(0),
            RecordId::Pool(net) => {
                self.byte(1);
                self.net(net);
            }
            RecordId::Node(name) => {
                self.byte(2);
                self.text(name);
            }
            RecordId::Route(net) => {
                self.byte(3);
                self.net(net);
            }
            RecordId::IpSet(set) => {
                self.byte(4);
                self.text(&set.0);
            }
            RecordId::Policy(key) => {
                self.byte(5);
                self.policy_key(key);
            }
            RecordId::Endpoint(key) => {
                self.byte(6);
                self.text(&key.namespace);
                self.text(&key.name);
            }
            RecordId::HostEndpoint(name) => {
                self.byte(7);
                self.text(name);
            }
        }
    }

    fn policy_key(&mut self, key: &PolicyKey) {
        self.text(key.kind.as_str());
        self.text(&key.namespace);
        self.text(&key.name);
    }

    fn record(&mut self, record: &Record) {
        match record {
            Record::Settings(settings) => self.settings(settings),
            Record::Pool(PoolRecord { nat_outgoing, encapsulation }) => {
                self.byte(u8::from(*nat_outgoing));
                self.encapsulation(*encapsulation);
            }
            Record::Node(node) => self.node(node),
            Record::Route(RouteRecord { node, encapsulation }) => {
                self.text(node);
                self.encapsulation(*encapsulation);
            }
            // Only when id and record disagree in kind: a set's digest is made in `digest`.
            Record::IpSet(set) => self.kind(set.kind),
            Record::Policy(PolicyRecord { ingress, egress }) => {
                self.list(ingress, Self::rule);
                self.list(egress, Self::rule);
            }
            Record::Endpoint(endpoint) => self.endpoint(endpoint),
            Record::HostEndpoint(endpoint) => self.host_endpoint(endpoint),
        }
    }

    fn settings(&mut self, settings: &FelixSettings) {
        let FelixSettings {
            endpoint_to_host,
            vxlan_vni,
            vxlan_port,
            vxlan_mtu,
            vxlan_mtu_v6,
            checksum_offload_broken,
            nat_exclude_hosts,
            allow_conntrack_invalid,
            log_prefix,
            log_rate,
            log_burst,
            ipv6,
            failsafe_inbound,
            failsafe_outbound,
        } = settings;
        self.byte(match endpoint_to_host {
            EndpointToHostAction::Drop => 0,
            EndpointToHostAction::Accept => 1,
            EndpointToHostAction::Return => 2,
        });
        self.number(u64::from(*vxlan_vni));
        self.number(u64::from(*vxlan_port));
        self.number(u64::from(*vxlan_mtu));
        self.byte(u8::from(*nat_exclude_hosts));
        self.byte(u8::from(*allow_conntrack_invalid));
        self.text(log_prefix);
        self.option(*log_rate, |encoder, rate| {
            encoder.number(u64::from(rate.count));
            encoder.text(rate.unit.as_str());
        });
        self.number(u64::from(*log_burst));
        self.byte(u8::from(*ipv6));
        // Behind what an older version encodes, so that settings which it can have are the same to it.
        if *vxlan_mtu_v6 != 0 {
            self.text("vxlan_mtu_v6");
            self.number(u64::from(*vxlan_mtu_v6));
        }
        if *checksum_offload_broken {
            self.text("checksum_offload_broken");
        }
        if *failsafe_inbound != Failsafe::default_inbound() {
            self.text("failsafe_inbound");
            self.list(failsafe_inbound, Self::failsafe);
        }
        if *failsafe_outbound != Failsafe::default_outbound() {
            self.text("failsafe_outbound");
            self.list(failsafe_outbound, Self::failsafe);
        }
    }

    fn failsafe(&mut self, failsafe: &Failsafe) {
        let Failsafe { protocol, port, net } = failsafe;
        self.byte(protocol.0);
        self.0.update(port.to_be_bytes());
        self.option(net.as_ref(), Self::net);
    }

    fn node(&mut self, node: &NodeInfo) {
        let NodeInfo { ipv4, ipv6, vtep, vtep6, labels, standing: _ } = node;
        self.option(*ipv4, |encoder, net| encoder.net(&IpNet::V4(net)));
        self.option(*ipv6, |encoder, net| encoder.net(&IpNet::V6(net)));
        self.option(vtep.as_ref(), |encoder, vtep| {
            encoder.address(&IpAddr::V4(vtep.address));
            encoder.0.update(vtep.mac.0);
        });
        self.number(labels.len() as u64);
        for (key, value) in labels {
            self.text(key);
            self.text(value);
        }
        // Behind what an older version encodes, so that a node without one is the same to it.
        if let Some(vtep) = vtep6 {
            self.address(&IpAddr::V6(vtep.address));
            self.0.update(vtep.mac.0);
        }
    }

    fn rule(&mut self, rule: &RuleRecord) {
        let RuleRecord { action, ip_version, protocol, not_protocol, icmp, not_icmp, source, destination } = rule;
        self.action(*action);
        self.option(*ip_version, |encoder, version| {
            encoder.byte(match version {
                IpVersion::V4 => 4,
                IpVersion::V6 => 6,
            });
        });
        self.option(*protocol, |encoder, protocol| encoder.byte(protocol.0));
        self.option(*not_protocol, |encoder, protocol| encoder.byte(protocol.0));
        self.option(*icmp, Self::icmp);
        self.option(*not_icmp, Self::icmp);
        self.side(source);
        self.side(destination);
    }

    fn icmp(&mut self, icmp: Icmp) {
        self.option(icmp.kind, Self::byte);
        self.option(icmp.code, Self::byte);
    }

    fn side(&mut self, side: &SideMatch) {
        let SideMatch { nets, not_nets, sets, not_sets, ports, port_sets, not_ports, not_port_sets, service_set } =
            side;
        let set = |encoder: &mut Self, set: &SetId| encoder.text(&set.0);
        self.list(nets, Self::net);
        self.list(not_nets, Self::net);
        self.list(sets, set);
        self.list(not_sets, set);
        self.list(ports, Self::ports);
        self.list(port_sets, set);
        self.list(not_ports, Self::ports);
        self.list(not_port_sets, set);
        self.option(service_set.as_ref(), set);
    }

    fn ports(&mut self, ports: &PortRange) {
        self.0.update(ports.first.to_be_bytes());
        self.0.update(ports.last.to_be_bytes());
    }

    fn endpoint(&mut self, endpoint: &EndpointRecord) {
        let EndpointRecord { interface, uid, addresses, tiers, unmatched } = endpoint;
        self.text(interface);
        // One without it is what servers and agents have that do not know of it.
        if !uid.is_empty() {
            self.text(uid);
        }
        self.list(addresses, Self::address);
        self.list(tiers, Self::tier);
        self.action(*unmatched);
    }

    fn host_endpoint(&mut self, endpoint: &HostEndpointRecord) {
        let HostEndpointRecord { interfaces, normal, forward, pre_dnat, untracked, unmatched } = endpoint;
        match interfaces {
            HostInterfaces::All => self.byte(0),
            HostInterfaces::Named(name) => {
                self.byte(1);
                self.text(name);
            }
            HostInterfaces::WithAddress(addresses) => {
                self.byte(2);
                self.number(addresses.len() as u64);
                addresses.iter().for_each(|address| self.address(address));
            }
        }
        for tiers in [normal, forward, pre_dnat, untracked] {
            self.list(tiers, Self::tier);
        }
        self.action(*unmatched);
    }

    fn tier(&mut self, tier: &TierBinding) {
        let TierBinding { name, default_action, ingress, egress } = tier;
        self.text(name);
        self.action(*default_action);
        self.list(ingress, Self::policy_key);
        self.list(egress, Self::policy_key);
    }
}
