#!/bin/bash
# conntrack: "conntrack -F -f ipv6" also empties the IPv4 table.
#
# Seen with: conntrack 1.4.7 (Debian 12) on Linux 6.18.44.
#
# We expected: -f selects the family, as it does for -L and -D, so flushing IPv6 leaves IPv4 entries
# alone.
#
# Observed: all entries of both families are gone. The command prints "connection tracking table has
# been emptied" and exits with 0. For a deletion without a tuple, the kernel honours the family only
# if the version field of the nfgenmsg header is not zero, although NFNETLINK_V0, which is zero, is
# the only version its headers define. This program sends zero. The same applies to anyone who
# builds the message: family AF_INET6 with version 0 deletes everything, with version 1 it deletes
# IPv6 entries.
#
# Who is hurt: anyone who clears the state of one family on a router or node in service, for example
# after a change of IPv6 addresses. All IPv4 NAT translations are lost, and connections through them
# hang until they time out.
#
# What works: "conntrack -D -f ipv6", which is checked here too.
set -euo pipefail
changed() { echo "changed: $*" >&2; exit 1; }

if [[ $# = 0 ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  (
    cd "$work"
    apt-get -qq -o APT::Sandbox::User=root download \
      conntrack=1:1.4.7-1+b2 libnetfilter-conntrack3=1.0.9-3 libnfnetlink0=1.0.2-2 \
      libmnl0=1.0.4-3
    for package in *.deb; do dpkg -x "$package" .; done
  )
  unshare --net --mount --pid --fork --kill-child --mount-proc bash "$0" "$work"
  exit
fi

work=$1
export LD_LIBRARY_PATH=$work/usr/lib/x86_64-linux-gnu PATH=$work/usr/sbin:$PATH
count() { conntrack -L -f "$1" 2>/dev/null | wc -l; }
fill() {
  conntrack -D -f ipv4 &>"$work/log" || true
  conntrack -D -f ipv6 &>"$work/log" || true
  for i in 1 2; do
    conntrack -I -s 10.0.0.$i -d 10.1.0.1 -p udp --sport 1000 --dport 53 -t 600 &>"$work/log"
    conntrack -I -s fd00::$i -d fd01::1 -p udp --sport 1000 --dport 53 -t 600 &>"$work/log"
  done
  [[ $(count ipv4) = 2 && $(count ipv6) = 2 ]] ||
    { echo "cannot make entries: $(<"$work/log")" >&2; exit 2; }
}
# Sends IPCTNL_MSG_CT_DELETE for AF_INET6 without a tuple; the argument is nfgenmsg.version.
flush_ipv6() {
  python3 - "$1" <<'PYTHON'
import socket, struct, sys
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
netlink.send(struct.pack("=IHHIIBBH", 20, 1 << 8 | 2, 1 | 4, 1, 0, socket.AF_INET6, int(sys.argv[1]), 0))
sys.exit(struct.unpack_from("=i", netlink.recv(4096), 16)[0] != 0)
PYTHON
}

fill
conntrack -D -f ipv6 &>"$work/log"
[[ $(count ipv4) = 2 && $(count ipv6) = 0 ]] ||
  changed "-D -f ipv6 left $(count ipv4) of IPv4, $(count ipv6) of IPv6"
fill
conntrack -F -f ipv6 &>"$work/log"
[[ $(count ipv4) = 0 && $(count ipv6) = 0 ]] ||
  changed "-F -f ipv6 left $(count ipv4) of IPv4, $(count ipv6) of IPv6"
fill
flush_ipv6 0
[[ $(count ipv4) = 0 && $(count ipv6) = 0 ]] ||
  changed "version 0 left $(count ipv4) of IPv4, $(count ipv6) of IPv6"
fill
flush_ipv6 1
[[ $(count ipv4) = 2 && $(count ipv6) = 0 ]] ||
  changed "version 1 left $(count ipv4) of IPv4, $(count ipv6) of IPv6"
echo "as described: conntrack -F -f ipv6 emptied both families, the same message with nfgenmsg.version 1 only IPv6"
