//! Next hops that are reached by a gateway.

mod net;

use std::time::Duration;

use margay_bgp::rib::NextHopInfo;
use margay_bgp::session::State;
use net::{Net, address, id};

const SECOND: Duration = Duration::from_secs(1);
const ROUTE: &str = "10.65.0.0/26";

/// 1 is of our own system, 2 is a router of another one, by which packets to 1 are sent.
#[test]
fn a_route_does_not_go_to_the_router_that_its_packets_are_sent_by() {
    let mut net = Net::new(21);
    let asns = [64512, 64512, 65001];
    for asn in asns {
        net.add(asn, |_| {});
    }
    for (node, peer) in [(0, 1), (1, 0), (0, 2), (2, 0)] {
        let config = net.config(peer, asns[peer]);
        net.peer(node, peer, config);
    }
    net.until("sessions", |net| {
        [net.state(0, 1), net.state(0, 2)] == [State::Established; 2]
    });
    net.announce(1, ROUTE);
    net.run(SECOND);
    let is_sent = |net: &Net| {
        let mut routes = net.nodes[0].speaker.routes_sent(id(2));
        routes.any(|(route, _)| *route == net::net(ROUTE))
    };
    assert!(is_sent(&net));
    for gateway in [Some(address(2)), None] {
        let moment = net.moment();
        let way = NextHopInfo {
            gateway,
            ..NextHopInfo::default()
        };
        net.nodes[0]
            .speaker
            .set_next_hop(address(1), Some(Some(way)), moment);
        net.run(SECOND);
        assert_eq!(is_sent(&net), gateway.is_none());
    }
}
