#!/bin/bash
# GoBGP: IPv6 routes of its own are announced over an IPv4 session with an IPv4 next hop, which BIRD
# rejects.
#
# Seen with: GoBGP 4.8.0 (Go module; 3.10.0 of Debian 12 behaves the same), BIRD 2.0.12 (Debian 12,
# 2.0.12-7), iBGP.
#
# One session carries both families (RFC 4760). Both ends have an IPv4 and an IPv6 address on the
# link.
#
# We expected: an IPv6 route that is added without a next hop ("gobgp global rib add -a ipv6
# 2001:db8:d::/48") is announced with the sender's IPv6 address on the link of the session. BIRD
# 2.0.12 and FRR 8.4.4 do so in GoBGP's place.
#
# Observed: it is announced with next hop 10.1.0.2, the IPv4 address of GoBGP. "gobgp neighbor ...
# adj-out" lists the route, and GoBGP logs nothing. BIRD logs "Invalid NEXT_HOP attribute -
# mismatched address family (10.1.0.2 for ipv6)" and drops the route. The session stays established,
# and IPv4 routes work.
#
# Who is hurt: dual-stack clusters whose nodes have one session each with their routers. IPv4 works;
# IPv6 is announced by one side and accepted by none, and no state or counter of the speaker shows
# it.
#
# What works: a next hop with each IPv6 route ("nexthop 2001:db8:1::2").
set -euo pipefail
changed() { echo "changed: $*" >&2; exit 1; }

if [[ $# = 0 ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  (
    cd "$work"
    apt-get -qq -o APT::Sandbox::User=root download \
      bird2=2.0.12-7 libssh-gcrypt-4=0.10.6-0+deb12u3 libreadline8=8.2-1.3
    for package in *.deb; do dpkg -x "$package" .; done
    export GOPATH=$work/go GOCACHE=$work/go/cache GOBIN=$work/bin GOFLAGS="-modcacherw -buildvcs=false"
    go install github.com/osrg/gobgp/v4/cmd/gobgpd@v4.8.0 github.com/osrg/gobgp/v4/cmd/gobgp@v4.8.0 2>"$work/log" ||
      { cat "$work/log" >&2; exit 2; }
  )
  unshare --net --mount --pid --fork --kill-child --mount-proc bash "$0" "$work"
  exit
fi

work=$1
export LD_LIBRARY_PATH=$work/usr/lib/x86_64-linux-gnu:$work/lib/x86_64-linux-gnu
mount -t tmpfs tmpfs /run
ip netns add sender
ip link set lo up
ip link add name eth0 type veth peer name eth0 netns sender
ip -n sender link set lo up
ip link set eth0 up
ip -n sender link set eth0 up
ip address add 10.1.0.1/24 dev eth0
ip address add 2001:db8:1::1/64 dev eth0 nodad
ip -n sender address add 10.1.0.2/24 dev eth0
ip -n sender address add 2001:db8:1::2/64 dev eth0 nodad

cat >"$work/bird.conf" <<'CONFIG'
log stderr all;
router id 10.1.0.1;
protocol device {}
protocol direct { ipv4; ipv6; }
protocol bgp peer {
  local 10.1.0.1 as 64512;
  neighbor 10.1.0.2 as 64512;
  passive;
  ipv4 { import all; export none; };
  ipv6 { import all; export none; };
}
CONFIG
cat >"$work/gobgp.toml" <<'CONFIG'
[global.config]
as = 64512
router-id = "10.1.0.2"
port = -1
[[neighbors]]
[neighbors.config]
neighbor-address = "10.1.0.1"
peer-as = 64512
[[neighbors.afi-safis]]
[neighbors.afi-safis.config]
afi-safi-name = "ipv4-unicast"
[[neighbors.afi-safis]]
[neighbors.afi-safis.config]
afi-safi-name = "ipv6-unicast"
CONFIG
"$work/usr/sbin/bird" -f -c "$work/bird.conf" -s "$work/bird.ctl" -P "$work/bird.pid" 2>"$work/bird.log" &
ip netns exec sender "$work/bin/gobgpd" -f "$work/gobgp.toml" --api-hosts 127.0.0.1:50051 >"$work/gobgpd.log" 2>&1 &
gobgp() { ip netns exec sender "$work/bin/gobgp" "$@"; }
bird() { "$work/usr/sbin/birdc" -s "$work/bird.ctl" "$@" 2>&1; }
until_true() { for _ in {1..300}; do if "$@"; then return; fi; sleep 0.1; done; return 1; }
established() { [[ $(bird show protocols peer) = *Established* ]]; }
has() { [[ $(bird show route for "$1" protocol peer) = *"$1"* ]]; }
refused() { grep -q "Invalid route $1 withdrawn" "$work/bird.log"; }

until_true established || { echo "no session: $(cat "$work"/*.log)" >&2; exit 2; }
gobgp global rib add 10.92.0.0/16
gobgp global rib add -a ipv6 2001:db8:d::/48
until_true has 10.92.0.0/16 || changed "the IPv4 route does not come: $(bird show route)"
until_true refused 2001:db8:d::/48 ||
  changed "BIRD does not refuse the IPv6 route: $(bird show route all)"
grep -qF "Invalid NEXT_HOP attribute - mismatched address family (10.1.0.2 for ipv6)" "$work/bird.log" ||
  changed "BIRD says: $(<"$work/bird.log")"
sent=$(gobgp neighbor 10.1.0.1 adj-out -a ipv6)
[[ $sent = *2001:db8:d::/48*10.1.0.2* ]] || changed "GoBGP shows as sent: $sent"
if grep -iE '"level":"(warn|error)' "$work/gobgpd.log"; then changed "GoBGP warns"; fi
gobgp global rib add -a ipv6 2001:db8:e::/48 nexthop 2001:db8:1::2
until_true has 2001:db8:e::/48 ||
  changed "the IPv6 route with a next hop does not come: $(bird show route all)"
! has 2001:db8:d::/48 || changed "BIRD has the route after all"
established || changed "the session is down"
echo "as described: 2001:db8:d::/48 was sent with next hop 10.1.0.2, and BIRD dropped it"
