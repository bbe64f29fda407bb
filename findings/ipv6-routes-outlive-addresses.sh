#!/bin/bash
# Linux: when an address is removed, IPv4 routes that depend on it are removed too; IPv6 routes
# stay, and lose their preferred source without a notification.
#
# Seen with: Linux 6.18.44.
#
# We expected: the rule of IPv4 for both families. There, routes whose gateway was reachable by the
# address are removed (without a notification), and routes with the address as their preferred
# source are removed (with one).
#
# Observed, after removing the only global address of eth0, and an address of lo that other routes
# name as their source:
#  IPv4  10.80.0.0/16 via 10.1.0.2                     removed
#  IPv4  10.81.0.0/16 dev eth0 src 10.3.0.1            removed
#  IPv6  2001:db8:80::/48 via 2001:db8:1::2            stays
#  IPv6  2001:db8:81::/48 dev eth0 src 2001:db8:3::1   stays, without "src"
# No notification is sent for the two IPv6 routes. Replacing the first one by itself is refused ("No
# route to host"), packets that use it leave with the address of another link as their source, and
# "src" does not return with its address.
#
# Who is hurt: anyone who maintains routes by the kernel's notifications. When the addresses of a
# dual-stack node are renewed, half of its routes are missing and the other half have the wrong
# source, so filters and return paths see the address of another link. A comparison by prefix and
# gateway finds IPv6 in order. After a restart, the route that was there all the time can no longer
# be created.
#
# What works: on RTM_DELADDR of IPv6, read the routes, compare the preferred source too, and create
# them again once the address is back.
set -euo pipefail
changed() { echo "changed: $*" >&2; exit 1; }

if [[ $# = 0 ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  unshare --net --mount --pid --fork --kill-child --mount-proc bash "$0" "$work"
  exit
fi

work=$1
sysctl -qw net.ipv6.conf.default.accept_dad=0
ip link set lo up
ip link add name eth0 type veth peer name far0
ip link add name eth1 type veth peer name far1
for link in eth0 far0 eth1 far1; do ip link set "$link" up; done
ip address add 10.1.0.1/24 dev eth0
ip address add 10.3.0.1/32 dev lo
ip -6 address add 2001:db8:1::1/64 dev eth0 nodad
ip -6 address add 2001:db8:2::1/64 dev eth1 nodad
ip -6 address add 2001:db8:3::1/128 dev lo nodad
ip route add 10.80.0.0/16 via 10.1.0.2
ip -6 route add 2001:db8:80::/48 via 2001:db8:1::2
ip route add 10.81.0.0/16 dev eth0 src 10.3.0.1
ip -6 route add 2001:db8:81::/48 dev eth0 src 2001:db8:3::1

ip -6 monitor route >"$work/messages" &
for _ in {1..50}; do # until the monitor listens
  ip -6 route replace blackhole 2001:db8:ff::/48
  if [[ -s $work/messages ]]; then break; fi
  sleep 0.1
done
[[ -s $work/messages ]] || { echo "no messages of the kernel" >&2; exit 2; }

route() { ip "$1" route show "$2" | sed 's/ *$//'; }
ip address del 10.3.0.1/32 dev lo
ip -6 address del 2001:db8:3::1/128 dev lo
[[ -z $(route -4 10.81.0.0/16) ]] || changed "IPv4 with src: $(route -4 10.81.0.0/16)"
[[ $(route -6 2001:db8:81::/48) = "2001:db8:81::/48 dev eth0 metric 1024 pref medium" ]] ||
  changed "IPv6 with src: $(route -6 2001:db8:81::/48)"
ip -6 address add 2001:db8:3::1/128 dev lo nodad
[[ $(route -6 2001:db8:81::/48) != *src* ]] || changed "src came back with the address"
ip -6 address del 2001:db8:3::1/128 dev lo

ip address del 10.1.0.1/24 dev eth0
ip -6 address del 2001:db8:1::1/64 dev eth0
[[ -z $(route -4 10.80.0.0/16) ]] || changed "IPv4 by gateway: $(route -4 10.80.0.0/16)"
[[ $(route -6 2001:db8:80::/48) = "2001:db8:80::/48 via 2001:db8:1::2 dev eth0 metric 1024 pref medium" ]] ||
  changed "IPv6 by gateway: $(route -6 2001:db8:80::/48)"
used=$(ip -6 route get 2001:db8:80::1)
[[ $used = *"via 2001:db8:1::2 dev eth0"*"src 2001:db8:2::1"* ]] || changed "packets: $used"
if ip -6 route replace 2001:db8:80::/48 via 2001:db8:1::2 2>"$work/log"; then changed "the same route can be made"; fi
[[ $(<"$work/log") = *"No route to host"* ]] || changed "refused with: $(<"$work/log")"

for _ in {1..50}; do # until the end of the messages is there
  ip -6 route replace blackhole 2001:db8:fe::/48
  if grep -q 2001:db8:fe:: "$work/messages"; then break; fi
  sleep 0.1
done
grep -q "^Deleted 2001:db8:1::/64" "$work/messages" ||
  changed "the route of the address itself is not announced"
if grep -E "2001:db8:8[01]::/48" "$work/messages"; then changed "the routes are announced"; fi
echo "as described: both routes of IPv4 went, both of IPv6 stayed, one without its source, and nothing was announced"
