#!/bin/bash
# Linux: connections to ::1 that DNAT sends to another address are established on the way there and
# lose every reply, although DNAT, masquerade and conntrack all match.
#
# Seen with: nftables 1.0.6 (Debian 12), Linux 6.18.44.
#
# A host port is reached at a node's own loopback address by DNAT in output and masquerade in
# postrouting. For 127.0.0.1 that needs net.ipv4.conf.*.route_localnet. IPv6 has no such parameter.
#
# We expected: with the same rules in both IP versions, and masquerade so that the other end answers
# to an address of the link, [::1]:8080 leads to the server as 127.0.0.1:8080 does.
#
# Observed: IPv4 works. With IPv6 the SYN reaches the server from the address of the link, its
# SYN-ACK comes back and is translated, and the kernel discards it when it routes it to ::1 on a
# link other than lo: Ip6InNoRoutes rises, nothing is logged, and the client waits. The client sees
# a timeout where a port without rules would refuse the connection at once.
#
# Who is hurt: whoever publishes a port on all addresses, tests with "localhost" and gets ::1 first:
# the connection hangs until the client falls back to IPv4, if it does. The rules look right and
# their counters rise.
#
# What works: leave ::1 alone, so that the connection is refused; or a proxy on loopback.
set -euo pipefail
changed() { echo "changed: $*" >&2; exit 1; }

if [[ $# = 0 ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  (
    cd "$work"
    apt-get -qq -o APT::Sandbox::User=root download \
      nftables=1.0.6-2+deb12u2 libnftables1=1.0.6-2+deb12u2 libnftnl11=1.2.4-2 libjansson4=2.14-2 \
      libmnl0=1.0.4-3 libxtables12=1.8.9-2 libedit2=3.1-20221030-2
    for package in *.deb; do dpkg -x "$package" .; done
  )
  unshare --net --mount --pid --fork --kill-child --mount-proc bash "$0" "$work"
  exit
fi

work=$1
export LD_LIBRARY_PATH=$work/usr/lib/x86_64-linux-gnu PATH=$work/usr/sbin:$PATH
mount -t tmpfs tmpfs /run
ip link set lo up
ip netns add server
ip link add node type veth peer name eth0 netns server
ip netns exec server ip link set lo up
# No duplicate address detection: the addresses are used at once.
for where in "" "ip netns exec server"; do
  $where sysctl -q -w net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0
done
ip addr add 192.0.2.1/24 dev node
ip addr add 2001:db8::1/64 dev node nodad
ip link set node up
ip netns exec server ip addr add 192.0.2.2/24 dev eth0
ip netns exec server ip addr add 2001:db8::2/64 dev eth0 nodad
ip netns exec server ip link set eth0 up
sysctl -q -w net.ipv4.conf.all.route_localnet=1 net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
nft -f - <<'RULES'
table inet ports {
  chain output {
    type nat hook output priority -100
    ip daddr 127.0.0.1 tcp dport 8080 dnat ip to 192.0.2.2:80
    ip6 daddr ::1 tcp dport 8080 dnat ip6 to [2001:db8::2]:80
  }
  chain postrouting {
    type nat hook postrouting priority 100
    oifname "node" masquerade
  }
}
RULES
ip netns exec server python3 -c '
import socket
server = socket.create_server(("::", 80), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
while True: server.accept()[0].close()
' >"$work/ready" &
until grep -q ready "$work/ready"; do sleep 0.1; done

no_routes() { awk '$1 == "Ip6InNoRoutes" { print $2 }' /proc/net/snmp6; }
connect() {
  python3 -c '
import socket, sys
try: socket.create_connection((sys.argv[1], 8080), timeout=3).close(); print("connected")
except OSError as error: print(type(error).__name__)
' "$1"
}
# The addresses answer without translation, so the link works in both versions.
for address in 192.0.2.2 2001:db8::2; do
  python3 -c 'import socket, sys; socket.create_connection((sys.argv[1], 80), timeout=10)' $address ||
    { echo "no connection to $address" >&2; exit 2; }
done
# After these connections, which would be counted too.
ip netns exec server nft -f - <<'RULES'
table inet seen {
  chain input {
    type filter hook input priority 0
    ip6 saddr 2001:db8::1 tcp dport 80 tcp flags & (syn | ack) == syn counter
  }
  chain output {
    type filter hook output priority 0
    ip6 daddr 2001:db8::1 tcp sport 80 tcp flags & (syn | ack) == (syn | ack) counter
  }
}
RULES

[[ $(connect 127.0.0.1) = connected ]] || changed "127.0.0.1 does not lead to the server"
before=$(no_routes)
found=$(connect ::1)
[[ $found = TimeoutError ]] || changed "::1: $found"
mapfile -t packets < <(ip netns exec server nft list table inet seen | grep -o 'packets [0-9]*')
[[ ${#packets[@]} = 2 && ${packets[0]} != "packets 0" && ${packets[1]} != "packets 0" ]] ||
  changed "the server has seen: ${packets[*]}"
(($(no_routes) > before)) || changed "Ip6InNoRoutes stays at $before"
echo "as described: ::1 reaches the server (${packets[0]} in, ${packets[1]} out) and hears nothing"
