#!/bin/bash
# Linux: a permanent IPv6 address that is given a lifetime loses its subnet route within 30 seconds.
#
# Seen with: Linux 6.18.44, iproute2 6.1.0 (Debian 12), net.ipv6.route.gc_interval 30 (the default).
#
# We expected: after "ip address change ADDRESS/64 dev eth0 valid_lft 1000 preferred_lft 0", the
# usual way to phase out an address, both the address and the route of its /64 expire in 1000
# seconds.
#
# Observed: the address has 1000 seconds left, but its route is listed with a negative time
# ("expires -17180980sec": the lifetime appears to be stored as a point in time). The next garbage
# collection removes it (RTM_DELROUTE), at most 30 seconds later. From then on, packets to
# neighbours in the subnet take the default route or are refused. An address that had a lifetime
# from the start keeps its route when the lifetime changes. A second change of the first address,
# before the collection, repairs its route.
#
# Who is hurt: anyone who renumbers a network as in RFC 4192 with addresses that were configured
# without lifetimes. Instead of the grace period for old connections, the machine is cut off from
# its old neighbours at once, while the list of addresses looks correct.
#
# What works: set the lifetime twice; the second time it is stored correctly.
set -euo pipefail
changed() { echo "changed: $*" >&2; exit 1; }

if [[ $# = 0 ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  unshare --net --mount --pid --fork --kill-child --mount-proc bash "$0" "$work"
  exit
fi

ip link add name eth0 type veth peer name far0
ip link set eth0 up
ip link set far0 up
ip -6 address add 2001:db8:1::1/64 dev eth0 nodad
ip -6 address add 2001:db8:2::1/64 dev eth0 nodad
ip -6 address add 2001:db8:3::1/64 dev eth0 nodad valid_lft 500 preferred_lft 500
for subnet in 1 2 3; do ip -6 address change 2001:db8:$subnet::1/64 dev eth0 nodad valid_lft 1000 preferred_lft 0; done
ip -6 address change 2001:db8:2::1/64 dev eth0 nodad valid_lft 1000 preferred_lft 0

rest() { ip -6 route show "2001:db8:$1::/64" | sed -n 's/.*expires \(-\?[0-9]*\)sec.*/\1/p'; }
(($(rest 1) < 0)) ||
  changed "the route of the permanent address: $(ip -6 route show 2001:db8:1::/64)"
(($(rest 2) > 900)) ||
  changed "the route of that changed twice: $(ip -6 route show 2001:db8:2::/64)"
(($(rest 3) > 900)) ||
  changed "the route of that with a lifetime: $(ip -6 route show 2001:db8:3::/64)"
for _ in {1..90}; do # until the collection
  if [[ -z $(rest 1) ]]; then break; fi
  sleep 1
done
[[ -z $(ip -6 route show 2001:db8:1::/64) ]] ||
  changed "the route of the subnet is there after 90 seconds"
valid=$(ip -6 address show dev eth0 to 2001:db8:1::1 | sed -n 's/.*valid_lft \([0-9]*\)sec.*/\1/p')
((valid > 900)) || changed "the address is valid for: $valid"
(($(rest 2) > 900 && $(rest 3) > 900)) || changed "the other routes: $(ip -6 route)"
if ip -6 route get 2001:db8:1::2 2>/dev/null; then changed "there is a way to the subnet"; fi
echo "as described: 2001:db8:1::1/64 is valid for $valid seconds more, and the route of its subnet is gone"
