#!/bin/bash
# FRR: when another program deletes FRR's nexthop objects, its IPv4 routes are lost and FRR still
# shows them as installed.
#
# Seen with: FRR 8.4.4 (Debian 12, 8.4.4-1.1~deb12u2; zebra and staticd) on Linux 6.18.44, iproute2
# 6.1.0.
#
# zebra creates a kernel object (ip nexthop) for each next hop, and routes that refer to it. When
# the object is deleted, the kernel removes the routes. It sends RTM_DELROUTE for IPv6 routes; for
# IPv4 routes only the deletion of the object is notified (RTM_DELNEXTHOP).
#
# We expected: zebra, which reinstalls a route that someone deletes, also reinstalls the routes of a
# deleted object.
#
# Observed, after "ip nexthop del" of both objects:
#  both objects are back at once, with the same id; zebra logs "sending it back down"
#  the IPv6 route is back
#  the IPv4 route is still missing after 15 seconds, and "show ip route" shows it as best and
#  installed (*)
#
# Who is hurt: a router or node on which anything else manages nexthop objects, be it "ip nexthop
# flush" in a script. Traffic for all IPv4 routes of FRR takes the default route or is dropped,
# every check of the daemon and its sessions passes, and it lasts until the route or its link
# changes or FRR is restarted.
#
# What works: "no zebra nexthop kernel enable" in zebra's configuration; routes then carry their
# next hop, and no object is created.
set -euo pipefail
changed() { echo "changed: $*" >&2; exit 1; }

if [[ $# = 0 ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  (
    cd "$work"
    apt-get -qq -o APT::Sandbox::User=root download \
      frr=8.4.4-1.1~deb12u2 libyang2=2.1.30-2 libpcre2-8-0=10.42-1 libjson-c5=0.16-2 \
      libreadline8=8.2-1.3
    for package in *.deb; do dpkg -x "$package" .; done
  )
  unshare --net --mount --pid --fork --kill-child --mount-proc bash "$0" "$work"
  exit
fi

work=$1
libraries=$work/usr/lib/x86_64-linux-gnu
export LD_LIBRARY_PATH=$libraries:$libraries/frr:$work/lib/x86_64-linux-gnu
mkdir "$work/run"
# FRR asks for a group of its own; here it has one in this mount namespace.
{ cat /etc/group; echo "frrvty:x:64999:root"; } >"$work/group"
mount --bind "$work/group" /etc/group
echo "username root nopassword" >"$work/run/vtysh.conf"
vtysh() { "$work/usr/bin/vtysh" --config_dir "$work/run" --vty_socket "$work/run" "$@" 2>"$work/log"; }
daemon() {
  "$work/usr/lib/frr/$1" -u root -g root -f "$work/run/$1.conf" -z "$work/run/zserv.api" --vty_socket "$work/run" -i "$work/run/$1.pid" -P 0 \
    --moduledir "$libraries/frr/modules" --log "file:$work/run/$1.log" 2>"$work/run/$1.err" &
}
until_true() { for _ in {1..100}; do if "$@"; then return; fi; sleep 0.1; done; return 1; }
has4() { [[ $(ip route show 10.9.0.0/16) = *"via 10.1.0.2"* ]]; }
has6() { [[ $(ip -6 route show 2001:db8:9::/48) = *"via 2001:db8:1::2"* ]]; }
objects() { ip nexthop | awk '/ via / { print $2 }' | sort | xargs; }

ip link set lo up
ip link add name eth0 type veth peer name far0
ip link set eth0 up
ip link set far0 up
ip address add 10.1.0.1/24 dev eth0
ip -6 address add 2001:db8:1::1/64 dev eth0 nodad
: >"$work/run/zebra.conf"
printf 'ip route 10.9.0.0/16 10.1.0.2\nipv6 route 2001:db8:9::/48 2001:db8:1::2\n' >"$work/run/staticd.conf"
daemon zebra
until_true test -S "$work/run/zserv.api"
daemon staticd
until_true has4 && until_true has6 ||
  { echo "FRR makes no routes: $(cat "$work"/run/*.err "$work"/run/*.log)" >&2; exit 2; }

ip route del 10.9.0.0/16
until_true has4 || changed "a deleted IPv4 route does not come back"
before=$(objects)
for object in $before; do ip nexthop del id "$object"; done
same() { [[ $(objects) = "$before" ]]; }
until_true same || changed "nexthop objects were $before, are $(objects)"
grep -q "sending it back down" "$work/run/zebra.log" ||
  changed "zebra's log: $(<"$work/run/zebra.log")"
until_true has6 || changed "the IPv6 route does not come back"
sleep 15
! has4 || changed "the IPv4 route came back"
shown=$(vtysh -d zebra -c "show ip route 10.9.0.0/16")
[[ $shown = *"best"*"* 10.1.0.2, via eth0"* ]] || changed "FRR shows: $shown"
echo "as described: objects $before are back, the IPv6 route is back, the IPv4 route is not, and FRR shows it as installed"
