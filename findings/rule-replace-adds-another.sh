#!/bin/bash
# Linux: RTM_NEWRULE with NLM_F_REPLACE adds the same rule once more each time.
#
# Seen with: Linux 6.18.44; requests built by hand below. The Rust crate rtnetlink 0.24.0 sends the
# same: its replace() on a rule is documented to replace an existing one, and three calls gave three
# rules.
#
# We expected: after three requests with the same source, table and priority there is one rule, as
# there is one route after three replacements of a route.
#
# Observed: three rules, and each request succeeds. The kernel has no replacement of rules: it
# ignores the flag, and looks for an equal rule only if NLM_F_EXCL is set. A request with another
# table at the same priority adds a rule too. One deletion removes one of the copies.
#
# Who is hurt: agents that configure policy routing at each start and use replace to be able to
# repeat it. The list of rules, which the kernel walks in order for each route lookup, grows for as
# long as the machine runs, and the one deletion at the end leaves the other copies in force.
#
# What works: NLM_F_CREATE with NLM_F_EXCL, and EEXIST taken as success; to change a rule, delete
# the old one.
set -euo pipefail
changed() { echo "changed: $*" >&2; exit 1; }

if [[ $# = 0 ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  unshare --net --mount --pid --fork --kill-child --mount-proc bash "$0" "$work"
  exit
fi

work=$1
cat >"$work/ask.py" <<'PYTHON'
"""ask.py exclusive|replace TABLE: RTM_NEWRULE, from 10.1.2.0/24, priority 1000."""
import os, socket, struct, sys

RTM_NEWRULE, NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE = 32, 1, 4, 0x400
NLM_F_REPLACE, NLM_F_EXCL = 0x100, 0x200
FR_ACT_TO_TBL, FRA_SRC, FRA_PRIORITY, FRA_TABLE = 1, 2, 6, 15

verb, table = sys.argv[1], int(sys.argv[2])
flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE
flags |= NLM_F_REPLACE if verb == "replace" else NLM_F_EXCL
body = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 24, 0, table, 0, 0, FR_ACT_TO_TBL, 0)
for kind, value in (
    (FRA_SRC, socket.inet_aton("10.1.2.0")),
    (FRA_PRIORITY, struct.pack("=I", 1000)),
    (FRA_TABLE, struct.pack("=I", table)),
):
    body += struct.pack("=HH", 8, kind) + value
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
netlink.send(struct.pack("=IHHII", 16 + len(body), RTM_NEWRULE, flags, 1, 0) + body)
(errno,) = struct.unpack_from("=i", netlink.recv(4096), 16)
if errno:
    sys.exit(os.strerror(-errno))
PYTHON
ask() { python3 "$work/ask.py" "$@"; }
tables() { ip rule show priority 1000 | sed 's/.*lookup \([0-9]*\).*/\1/' | xargs; }

ask exclusive 100
if ask exclusive 100 2>"$work/log"; then changed "NLM_F_EXCL adds an equal rule: $(tables)"; fi
[[ $(<"$work/log") = "File exists" ]] || changed "NLM_F_EXCL fails with: $(<"$work/log")"
for _ in 1 2; do ask replace 100 || changed "NLM_F_REPLACE fails"; done
[[ $(tables) = "100 100 100" ]] || changed "after two replacements: $(tables)"
ask replace 200
[[ $(tables) = "100 100 100 200" ]] || changed "after one with another table: $(tables)"
ip rule del from 10.1.2.0/24 lookup 100 priority 1000
[[ $(tables) = "100 100 200" ]] || changed "after a deletion: $(tables)"
ip link set lo up
for _ in 1 2 3; do ip route replace 10.9.0.0/16 dev lo table 100; done
[[ $(ip route show table 100 | wc -l) = 1 ]] || changed "routes: $(ip route show table 100)"
echo "as described: each replacement added the rule again"
