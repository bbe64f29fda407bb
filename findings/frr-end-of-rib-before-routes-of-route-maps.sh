#!/bin/bash
# FRR: after a graceful restart, End-of-RIB is sent before the routes that depend on a route-map, so
# the peer removes them for seconds.
#
# Seen with: FRR 8.4.4 (Debian 12, 8.4.4-1.1~deb12u2; zebra and bgpd), BIRD 2.0.12 (Debian 12,
# 2.0.12-7) as its peer, iBGP, one IPv4 route.
#
# FRR has "bgp graceful-restart" and "bgp graceful-restart preserve-fw-state" and announces a
# "network" of its own. The route passes a route-map that permits everything, either of the network
# or of the neighbor ("out"). In the configuration file the route-map stands after "router bgp",
# which is the order in which FRR itself writes it. bgpd is killed and started again; zebra runs on.
#
# We expected: FRR announces its routes and then sends End-of-RIB, and a peer that helps in the
# restart (RFC 4724 section 4.2) has the route all the time.
#
# Observed: the new session says that forwarding was preserved (R and F bit), and the peer keeps the
# route as stale. About a second after the session is up, End-of-RIB comes without the route, and
# the peer has to remove it. The route comes three to four seconds later. A route-map that stands
# before "router bgp" does no harm, and neither does a configuration without route-maps.
#
# bgpd reads "router bgp" while the route-map does not exist yet, which denies the route. It looks
# again when "bgp route-map delay-timer" ends, by default 5 seconds after the route-map was read,
# and End-of-RIB does not wait for that.
#
# Who is hurt: networks that rely on graceful restart when FRR crashes or is upgraded. With a
# route-map, peers drop the routes for seconds at every restart, though graceful restart is
# negotiated. bgpd logs nothing about it. A file in the harmless order does not last: FRR writes
# route-maps after "router bgp".
#
# What works: "bgp route-map delay-timer 1", which ends before End-of-RIB.
set -euo pipefail
changed() { echo "changed: $*" >&2; exit 1; }

if [[ $# = 0 ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  (
    cd "$work"
    apt-get -qq -o APT::Sandbox::User=root download \
      frr=8.4.4-1.1~deb12u2 libyang2=2.1.30-2 libpcre2-8-0=10.42-1 libjson-c5=0.16-2 \
      bird2=2.0.12-7 libssh-gcrypt-4=0.10.6-0+deb12u3 libreadline8=8.2-1.3
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
{ grep -v ^frrvty: /etc/group; echo "frrvty:x:64999:root"; } >"$work/group"
mount --bind "$work/group" /etc/group
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/tmp
echo "username root nopassword" >"$work/run/vtysh.conf"
vtysh() {
  "$work/usr/bin/vtysh" --config_dir "$work/run" --vty_socket "$work/run" "$@" 2>"$work/log"
}
daemon() {
  ip netns exec restarter "$work/usr/lib/frr/$1" -u root -g root -f "$work/run/$1.conf" \
    -z "$work/run/zserv.api" --vty_socket "$work/run" -i "$work/run/$1.pid" -P 0 \
    --moduledir "$libraries/frr/modules" --log "file:$work/run/$1.log" 2>"$work/run/$1.err" &
  disown
}
bird() { "$work/usr/sbin/birdc" -s "$work/bird.ctl" "$@" 2>&1; }
until_true() { for _ in {1..300}; do if "$@"; then return; fi; sleep 0.1; done; return 1; }
has() { [[ $(bird show route for 10.92.0.0/16 protocol peer) = *"10.92.0.0/16"* ]]; }
lacks() { ! has; }
helps() { [[ $(bird show protocols all peer) = *"Neighbor graceful restart active"* ]]; }
state() {
  local kept=there
  if helps; then kept=stale; fi
  if has; then echo "$kept"; else echo gone; fi
}
milliseconds() { echo $((${EPOCHREALTIME/./} / 1000)); }

ip netns add restarter
ip link set lo up
ip link add name eth0 type veth peer name eth0 netns restarter
ip -n restarter link set lo up
ip link set eth0 up
ip -n restarter link set eth0 up
ip address add 10.1.0.1/24 dev eth0
ip -n restarter address add 10.1.0.2/24 dev eth0
ip -n restarter route add blackhole 10.92.0.0/16
cat >"$work/bird.conf" <<'CONFIG'
log stderr all;
debug protocols all;
router id 10.1.0.1;
protocol device {}
protocol direct { ipv4; }
protocol bgp peer {
  local 10.1.0.1 as 64512;
  neighbor 10.1.0.2 as 64512;
  graceful restart on;
  connect delay time 1;
  error wait time 1, 1;
  ipv4 { import all; export none; };
}
CONFIG
"$work/usr/sbin/bird" -f -c "$work/bird.conf" -s "$work/bird.ctl" -P "$work/bird.pid" \
  2>>"$work/bird.log" &
disown
: >"$work/run/zebra.conf"
daemon zebra
until_true test -S "$work/run/zserv.api" ||
  { echo "no zebra: $(cat "$work"/run/*.err)" >&2; exit 2; }

map=$'route-map own permit 10\nexit'
# Arguments: lines before "router bgp", the route-map of the network, one of the neighbor, lines
# after it. Prints which states the route has at the peer during a restart, with milliseconds since
# bgpd was killed, and leaves the states in $states.
restart() {
  cat >"$work/run/bgpd.conf" <<CONFIG
$1
router bgp 64512
 bgp router-id 10.1.0.2
 bgp graceful-restart
 bgp graceful-restart preserve-fw-state
 neighbor 10.1.0.1 remote-as 64512
 neighbor 10.1.0.1 timers connect 1
 address-family ipv4 unicast
  network 10.92.0.0/16 $2
  $3
 exit-address-family
exit
$4
CONFIG
  until_true lacks || { echo "a route is left: $(bird show route all)" >&2; exit 2; }
  daemon bgpd
  until_true has || { echo "no route: $(cat "$work/bird.log" "$work"/run/*.err)" >&2; exit 2; }
  # What comes after the first route, at the latest at the end of the delay-timer.
  sleep 6
  [[ $(state) = there ]] || { echo "before the restart: $(bird show protocols all)" >&2; exit 2; }
  : >"$work/bird.log"
  local began now peer last=there
  began=$(milliseconds)
  kill -9 "$(<"$work/run/bgpd.pid")"
  until_true helps || changed "BIRD does not help: $(<"$work/bird.log")"
  : >"$work/run/bgpd.log"
  daemon bgpd
  states=there
  while (($(milliseconds) < began + 9000)); do
    now=$(state)
    if [[ $now != "$last" ]]; then
      echo "  $now after $(($(milliseconds) - began)) ms"
      states+=" $now"
      last=$now
    fi
    sleep 0.1
  done
  peer=$(bird show protocols all peer)
  [[ ${peer#*Neighbor capabilities} = *"Restart recovery"*"AF preserved: ipv4"*"4-octet"* ]] ||
    changed "FRR does not say that forwarding was preserved: $peer"
  running=$(vtysh -d bgpd -c "show running-config")
  grep -oE "Got END-OF-RIB|(added|removed|ignored) .*10.92.0.0/16" "$work/bird.log" >"$work/events"
  # A session that is disabled is not waited for.
  kill "$(<"$work/run/bgpd.pid")"
  bird disable peer >>"$work/log"
  until_true lacks || { echo "a route is left: $(bird show route all)" >&2; exit 2; }
  bird enable peer >>"$work/log"
}
is_lost() {
  [[ $states = "there stale gone there" ]] || changed "$1: $states"
  [[ $(xargs <"$work/events") = "Got END-OF-RIB removed"*" added"* ]] ||
    changed "$1: BIRD says: $(<"$work/bird.log")"
  if grep -iE "route-map|rmap|denied|filtered|10\.92" "$work/run/bgpd.log"; then
    changed "$1: bgpd logs it"
  fi
}
is_kept() {
  [[ $states = "there stale there" ]] || changed "$1: $states"
  [[ $(head -n 1 "$work/events") = ignored* ]] ||
    changed "$1: BIRD says: $(<"$work/bird.log")"
}

out="neighbor 10.1.0.1 route-map own out"
echo "no route-map:"
restart "" "" "" ""
is_kept "no route-map"
echo "route-map of the network, after router bgp:"
restart "" "route-map own" "" "$map"
is_lost "route-map of the network, after router bgp"
echo "route-map of the neighbor, after router bgp:"
restart "" "" "$out" "$map"
is_lost "route-map of the neighbor, after router bgp"
echo "route-map of the network, before router bgp:"
restart "$map" "route-map own" "" ""
is_kept "route-map of the network, before router bgp"
[[ $running = *"router bgp 64512"*"route-map own permit 10"* ]] || changed "FRR writes: $running"
echo "route-map of the network, after router bgp, delay-timer 1:"
restart "bgp route-map delay-timer 1" "route-map own" "" "$map"
is_kept "route-map of the network, after router bgp, delay-timer 1"
echo "as described: End-of-RIB came before routes of a route-map, and the peer removed them"
