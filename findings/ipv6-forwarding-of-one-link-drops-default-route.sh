#!/bin/bash
# Linux: enabling IPv6 forwarding on one link removes the default route of another link.
#
# Seen with: Linux 6.18.44.
#
# We expected: net.ipv6.conf.LINK.forwarding applies to packets that arrive on that link, and to
# that link's role as a router's or a host's. A host that has a default route by router
# advertisement on eth0 keeps it when forwarding is enabled on another link, because eth0 is still a
# host's link.
#
# Observed: each write of 1 removes the default routes learned by router advertisement on all links
# of the network namespace (RTM_DELROUTE is sent). The link written to may be down and have no
# address, and its value may have been 1 already. eth0 still has forwarding=0 and keeps the address
# from the same advertisement. No router solicitation is sent, so the route returns with the next
# unsolicited advertisement, up to 30 minutes later by RFC 4861. Writing 0, or another parameter of
# the link, has no such effect. A link with accept_ra=2 keeps its route.
#
# Who is hurt: anyone who configures links one by one on a machine with IPv6 by router
# advertisement: a network plugin for each new pod, a VPN, a hypervisor for each guest. With each of
# them the machine loses its IPv6 connectivity for minutes, and nothing points at the cause.
#
# What works: accept_ra=2 on the uplink before forwarding is enabled on any link, even if forwarding
# of the uplink stays off.
set -euo pipefail
changed() { echo "changed: $*" >&2; exit 1; }

if [[ $# = 0 ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  unshare --net --mount --pid --fork --kill-child --mount-proc bash "$0" "$work"
  exit
fi

work=$1
mount -t tmpfs tmpfs /run
ip netns add router
ip -n router link add name r0 type veth peer name eth0 netns $$
router() { ip netns exec router "$@"; }
router sysctl -qw net.ipv6.conf.all.forwarding=1 net.ipv6.conf.r0.accept_dad=0
sysctl -qw net.ipv6.conf.eth0.accept_dad=0
ip -n router link set r0 up
ip link set eth0 up
ip link add name other type veth peer name rehto

# One router advertisement: default route for 1800 s and the prefix 2001:db8:5::/64.
cat >"$work/advertise.py" <<'PYTHON'
import socket, struct
link = socket.if_nametoindex("r0")
icmp = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
icmp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
prefix = struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 86400, 14400, 0) + socket.inet_pton(socket.AF_INET6, "2001:db8:5::")
icmp.sendto(struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + prefix, ("ff02::1", 0, 0, link))
PYTHON

has_route() { [[ -n $(ip -6 route show default) ]]; }
advertise() {
  for _ in {1..50}; do
    router python3 "$work/advertise.py" 2>"$work/log" || true
    sleep 0.2
    if has_route; then return; fi
  done
  echo "no default route by router advertisement: $(<"$work/log")" >&2
  exit 2
}

solicited() { awk '$1 == "Icmp6OutRouterSolicits" { print $2 }' /proc/net/snmp6; }

advertise
before=$(solicited)
sysctl -qw net.ipv6.conf.other.proxy_ndp=1 net.ipv6.conf.other.forwarding=0
has_route || changed "a write of 0 took the route"
sysctl -qw net.ipv6.conf.other.forwarding=1
! has_route || changed "the default route of eth0 stays: $(ip -6 route show default)"
[[ $(sysctl -n net.ipv6.conf.eth0.forwarding) = 0 ]] || changed "eth0 forwards"
[[ $(ip -6 address show dev eth0 scope global) = *2001:db8:5:* ]] ||
  changed "the advertised address went too"
sleep 10
[[ $(solicited) = "$before" ]] || changed "routers are solicited"
! has_route || changed "the default route is back: $(ip -6 route show default)"
advertise
sysctl -qw net.ipv6.conf.other.forwarding=1
! has_route || changed "a second write of 1 leaves the route"
advertise
sysctl -qw net.ipv6.conf.eth0.accept_ra=2 net.ipv6.conf.other.forwarding=1
has_route || changed "accept_ra=2 does not keep the route"
echo "as described: net.ipv6.conf.other.forwarding=1 removed the default route of eth0, each time it was written"
