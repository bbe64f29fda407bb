#!/bin/bash
# ctnetlink: a filter by IPv6 address matches every entry except those of that address.
#
# Seen with: Linux 6.18.44; entries made by conntrack 1.4.7 (Debian 12), requests built by hand
# below.
#
# CTA_FILTER restricts a dump (IPCTNL_MSG_CT_GET) or a deletion (IPCTNL_MSG_CT_DELETE) of connection
# tracking entries to those with one given address, for example "all entries with this original
# source". It saves dumping a large table, and deletes all entries of one client with one message.
#
# We expected: the same result for both families; the message is the same, with a longer address.
#
# Observed, with three IPv4 and three IPv6 entries:
#  dump,   source 10.0.0.1: returns that entry
#  delete, source 10.0.0.1: deletes that entry
#  dump,   source fd00::1:  returns the entries of fd00::2 and fd00::3
#  delete, source fd00::1:  deletes the entries of fd00::2 and fd00::3, keeps that of fd00::1,
#                           and reports success
#
# Who is hurt: anyone who ends the connections of one IPv6 address (a deleted pod, a removed
# endpoint of a Service, a blocked client). All other clients lose their translations and
# established state at once, and the intended entries survive. With IPv4, where this is usually
# tried first, everything is correct.
#
# What works: dump without a filter, compare in the program, and delete each entry by its full
# tuple.
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
cat >"$work/ask.py" <<'PYTHON'
"""ask.py dump|delete|list [ADDRESS]: asks ctnetlink for entries whose original source is ADDRESS, or for all; prints the original sources."""
import socket, struct, sys

IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE, NFNL_SUBSYS_CTNETLINK = 1, 2, 1
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLMSG_ERROR, NLMSG_DONE, NESTED = 1, 4, 0x300, 2, 3, 0x8000
CTA_TUPLE_ORIG, CTA_FILTER, CTA_TUPLE_IP, CTA_FILTER_ORIG_FLAGS, CTA_FILTER_REPLY_FLAGS, FILTER_IP_SRC = 1, 25, 1, 1, 2, 1


def attribute(kind, data):
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def attributes(data):
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        found[kind & 0x3FFF] = data[4:length]
        data = data[(length + 3) & ~3:]
    return found


def source(message):
    addresses = attributes(attributes(attributes(message[4:])[CTA_TUPLE_ORIG])[CTA_TUPLE_IP])
    return socket.inet_ntop(socket.AF_INET, addresses[1]) if 1 in addresses else socket.inet_ntop(socket.AF_INET6, addresses[3])


what, family, body = sys.argv[1], socket.AF_UNSPEC, b""
if what != "list":
    family = socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET
    address = attribute(3 if family == socket.AF_INET6 else 1, socket.inet_pton(family, sys.argv[2]))
    body = attribute(CTA_TUPLE_ORIG | NESTED, attribute(CTA_TUPLE_IP | NESTED, address))
    flags = attribute(CTA_FILTER_ORIG_FLAGS, struct.pack("=I", FILTER_IP_SRC)) + attribute(CTA_FILTER_REPLY_FLAGS, bytes(4))
    body += attribute(CTA_FILTER | NESTED, flags)
kind, flags = (IPCTNL_MSG_CT_DELETE, NLM_F_ACK) if what == "delete" else (IPCTNL_MSG_CT_GET, NLM_F_DUMP)
body = struct.pack("=BBH", family, 0, 0) + body
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
netlink.send(struct.pack("=IHHII", 16 + len(body), NFNL_SUBSYS_CTNETLINK << 8 | kind, NLM_F_REQUEST | flags, 1, 0) + body)
found, ended = [], False
while not ended:
    data = netlink.recv(1 << 20)
    while data:
        length, kind = struct.unpack_from("=IH", data)
        message, data = data[16:length], data[(length + 3) & ~3:]
        if kind == NLMSG_ERROR and struct.unpack_from("=i", message)[0]:
            sys.exit(f"errno {-struct.unpack_from('=i', message)[0]}")
        if kind in (NLMSG_ERROR, NLMSG_DONE):
            ended = True
        else:
            found.append(source(message))
print(*sorted(found))
PYTHON

ask() { python3 "$work/ask.py" "$@"; }
fill() {
  conntrack -F 2>"$work/log"
  for i in 1 2 3; do
    conntrack -I -s 10.0.0.$i -d 10.1.0.1 -p udp --sport 1000 --dport 53 -t 600 &>"$work/log"
    conntrack -I -s fd00::$i -d fd01::1 -p udp --sport 1000 --dport 53 -t 600 &>"$work/log"
  done
  [[ $(ask list) = "10.0.0.1 10.0.0.2 10.0.0.3 fd00::1 fd00::2 fd00::3" ]] ||
    { echo "cannot make entries: $(<"$work/log")" >&2; exit 2; }
}

fill
[[ $(ask dump 10.0.0.1) = "10.0.0.1" ]] ||
  changed "the IPv4 dump is not exact: $(ask dump 10.0.0.1)"
[[ $(ask dump fd00::1) = "fd00::2 fd00::3" ]] || changed "the IPv6 dump gave: $(ask dump fd00::1)"
ask delete 10.0.0.1 >"$work/log"
[[ $(ask list) = "10.0.0.2 10.0.0.3 fd00::1 fd00::2 fd00::3" ]] ||
  changed "the IPv4 deletion left: $(ask list)"
fill
ask delete fd00::1 >"$work/log"
[[ $(ask list) = "10.0.0.1 10.0.0.2 10.0.0.3 fd00::1" ]] ||
  changed "the IPv6 deletion left: $(ask list)"
echo "as described: asked to delete the entries of fd00::1, the kernel deleted fd00::2 and fd00::3 and left fd00::1"
