//! Encoding of BGP's records.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use margay_api::bgp::{
    BgpNextHopMode, CommunityValue, FilterAction, FilterRule, Filters, MatchOperator, PeerType,
    RouteOperation, SecretKey,
};
use margay_api::network::NodeBgp;

use super::DigestEncoder;
use crate::model::{BgpMesh, BgpPeerRecord, BgpRecord};

impl DigestEncoder {
    pub(super) fn put_node_bgp(&mut self, bgp: &NodeBgp) {
        let NodeBgp {
            asn,
            cluster_id,
            listen_port,
        } = bgp;
        self.put_number(u64::from(*asn));
        self.put_option(*cluster_id, Self::put_id4);
        self.put_number(u64::from(*listen_port));
    }

    pub(super) fn put_bgp(&mut self, record: &BgpRecord) {
        let BgpRecord {
            asn,
            router_id,
            cluster_id,
            listen_port,
            binds_node_address,
            ignored_interfaces,
            priorities,
            mesh,
            blocks,
            pools,
            services,
            service_ranges,
            communities,
            peers,
        } = record;
        self.put_number(u64::from(*asn));
        self.put_id4(*router_id);
        self.put_option(*cluster_id, Self::put_id4);
        self.put_number(u64::from(*listen_port));
        self.put_byte(u8::from(*binds_node_address));
        self.put_all(ignored_interfaces, |encoder, name| encoder.put_text(name));
        self.put_all(priorities, |encoder, value| {
            encoder.put_number(u64::from(*value));
        });
        self.put_option(mesh.as_ref(), |encoder, mesh| {
            let BgpMesh {
                password,
                restart_time,
            } = mesh;
            encoder.put_option(password.as_ref(), Self::put_secret);
            encoder.put_option(*restart_time, Self::put_duration);
        });
        for ranges in [blocks, pools] {
            self.put_all(ranges, |encoder, (range, is_exported)| {
                encoder.put_net(range);
                encoder.put_byte(u8::from(*is_exported));
            });
        }
        for ranges in [services, service_ranges] {
            self.put_all(ranges, Self::put_net);
        }
        self.put_all(communities, |encoder, (range, values)| {
            encoder.put_net(range);
            encoder.put_all(values, Self::put_community);
        });
        self.put_list(peers, Self::put_bgp_peer);
    }

    fn put_bgp_peer(&mut self, peer: &BgpPeerRecord) {
        let BgpPeerRecord {
            name,
            address,
            asn,
            local_asn,
            allowed_local_asn,
            import,
            export,
            next_hop_mode,
            password,
            source,
            restart_time,
            keepalive,
            ttl_security,
            reachable_by,
            is_reflector_client,
        } = peer;
        let address_of = |encoder: &mut Self, address: IpAddr| encoder.put_address(&address);
        self.put_text(name);
        self.put_address(&address.ip());
        self.put_number(u64::from(address.port()));
        self.put_number(u64::from(*asn));
        self.put_option(*local_asn, |encoder, asn| {
            encoder.put_number(u64::from(asn))
        });
        self.put_byte(*allowed_local_asn);
        for filters in [import, export] {
            let Filters { ipv4, ipv6 } = filters;
            self.put_list(ipv4, Self::put_filter_rule);
            self.put_list(ipv6, Self::put_filter_rule);
        }
        self.put_byte(match next_hop_mode {
            BgpNextHopMode::Auto => 0,
            BgpNextHopMode::Own => 1,
            BgpNextHopMode::Keep => 2,
        });
        self.put_option(password.as_ref(), Self::put_secret);
        self.put_option(*source, address_of);
        self.put_option(*restart_time, Self::put_duration);
        self.put_option(*keepalive, Self::put_duration);
        self.put_option(*ttl_security, Self::put_byte);
        self.put_option(*reachable_by, address_of);
        self.put_byte(u8::from(*is_reflector_client));
    }

    fn put_filter_rule(&mut self, rule: &FilterRule) {
        let FilterRule {
            prefix,
            from_peers,
            interface,
            peer_type,
            community,
            as_path_prefix,
            priority,
            action,
        } = rule;
        self.put_option(prefix.as_ref(), |encoder, prefix| {
            encoder.put_net(&prefix.cidr());
            encoder.put_byte(match prefix.operator() {
                MatchOperator::Equal => 0,
                MatchOperator::NotEqual => 1,
                MatchOperator::In => 2,
                MatchOperator::NotIn => 3,
            });
            let lengths = prefix.lengths();
            encoder.put_byte(*lengths.start());
            encoder.put_byte(*lengths.end());
        });
        self.put_byte(u8::from(*from_peers));
        self.put_option(interface.as_ref(), |encoder, name| encoder.put_text(name));
        self.put_option(*peer_type, |encoder, kind| {
            encoder.put_byte(match kind {
                PeerType::External => 0,
                PeerType::Internal => 1,
            });
        });
        self.put_option(community.as_ref(), Self::put_community);
        self.put_asns(as_path_prefix);
        self.put_option(*priority, |encoder, value| {
            encoder.put_number(u64::from(value));
        });
        match action {
            FilterAction::Reject => self.put_byte(0),
            FilterAction::Accept(operations) => {
                self.put_byte(1);
                self.put_list(operations, Self::put_operation);
            }
        }
    }

    fn put_operation(&mut self, operation: &RouteOperation) {
        match operation {
            RouteOperation::AddCommunity(community) => {
                self.put_byte(0);
                self.put_community(community);
            }
            RouteOperation::PrependAsPath(asns) => {
                self.put_byte(1);
                self.put_asns(asns);
            }
            RouteOperation::SetPriority(value) => {
                self.put_byte(2);
                self.put_number(u64::from(*value));
            }
        }
    }

    fn put_community(&mut self, community: &CommunityValue) {
        match community {
            CommunityValue::Standard(community) => {
                self.put_byte(0);
                self.put_number(u64::from(community.0));
            }
            CommunityValue::Large(community) => {
                self.put_byte(1);
                community
                    .0
                    .iter()
                    .for_each(|part| self.put_number(u64::from(*part)));
            }
        }
    }

    fn put_asns(&mut self, asns: &[u32]) {
        self.put_list(asns, |encoder, asn| encoder.put_number(u64::from(*asn)));
    }

    fn put_secret(&mut self, secret: &SecretKey) {
        let SecretKey { name, key } = secret;
        self.put_text(name);
        self.put_text(key);
    }

    fn put_duration(&mut self, time: Duration) {
        self.put_number(time.as_secs());
    }

    fn put_id4(&mut self, id: Ipv4Addr) {
        self.put_number(u64::from(id.to_bits()));
    }

    fn put_all<T>(
        &mut self,
        values: impl IntoIterator<Item = T, IntoIter: ExactSizeIterator>,
        mut encode: impl FnMut(&mut Self, T),
    ) {
        let values = values.into_iter();
        self.put_number(values.len() as u64);
        values.for_each(|value| encode(self, value));
    }
}
