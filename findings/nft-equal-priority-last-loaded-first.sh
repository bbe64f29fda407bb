#!/bin/bash
# nftables: of two base chains with the same hook and priority, the one loaded last runs first, so a
# reload changes which of them decides.
#
# Seen with: Linux 6.18.44, nft 1.0.6 (Debian 12, 1.0.6-2+deb12u2). The manual leaves the order of
# equal priorities undefined.
#
# We expected: chains run in the order of their registration, which is the order of "nft list"; a
# table that is replaced within one transaction keeps its place.
#
# Observed: two tables translate the same destination to different ports, both at priority -100
# (dstnat). The one loaded second wins, though it is listed second. When the first is reloaded
# ("delete table" and the new table in one file, the usual way to replace a program's rules), it
# wins, and is then listed last. Flushing a table and refilling it keeps the order.
#
# Who is hurt: nodes on which two programs translate destinations at the customary priority, such as
# a host port plugin and a Service proxy, or a VPN and a firewall. Which one gets a port that both
# have depends on which was restarted last: it works after one boot and not after the next. The
# listing shows the same rules, in the opposite order.
#
# What works: a priority of one's own (dstnat - 1), or flushing chains instead of deleting the
# table.
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
ip link set lo up
cat >"$work/serve.py" <<'PYTHON'
import socket, selectors
names = selectors.DefaultSelector()
for port, name in ((9001, b"one"), (9002, b"two")):
    names.register(socket.create_server(("127.0.0.1", port)), selectors.EVENT_READ, name)
while True:
    for key, _ in names.select():
        connection, _ = key.fileobj.accept()
        connection.sendall(key.data)
        connection.close()
PYTHON
python3 "$work/serve.py" &
ask() { python3 -c 'import socket; print(socket.create_connection(("127.0.0.9", 80), 5).recv(9).decode())'; }
direct() { python3 -c 'import socket; socket.create_connection(("127.0.0.1", 9002), 5)' 2>"$work/log"; }
for _ in {1..50}; do if direct; then break; fi; sleep 0.1; done
direct || { echo "the server does not answer: $(<"$work/log")" >&2; exit 2; }

rules() { printf 'table ip %s {\n chain c {\n type nat hook output priority -100;\n tcp dport 80 dnat to 127.0.0.1:%s\n }\n}\n' "$1" "$2"; }
listed() { nft list tables | awk '{ print $3 }' | xargs; }

rules one 9001 | nft -f -
rules two 9002 | nft -f -
[[ $(ask) = two && $(listed) = "one two" ]] ||
  changed "loaded one, two: $(ask) answers, listed $(listed)"
{ echo "delete table ip one"; rules one 9001; } | nft -f -
[[ $(ask) = one && $(listed) = "two one" ]] ||
  changed "loaded one anew: $(ask) answers, listed $(listed)"
{ echo "flush table ip two"; rules two 9002; } | nft -f -
[[ $(ask) = one ]] || changed "flushed two: $(ask) answers"
{ echo "delete table ip two"; rules two 9002; } | nft -f -
[[ $(ask) = two ]] || changed "loaded two anew: $(ask) answers"
echo "as described: the table that was loaded last decides"
