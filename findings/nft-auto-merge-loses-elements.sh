#!/bin/bash
# nft: in a set with auto-merge, a permanent element expires with its neighbour's timeout, and an
# element that was added cannot be deleted.
#
# Seen with: nft 1.0.6 (Debian 12, 1.0.6-2+deb12u2) on Linux 6.18.44.
#
# auto-merge joins adjacent and overlapping elements of an interval set, so that lists from
# different sources can be loaded.
#
# We expected: elements with different timeouts or comments are kept apart, or the longer timeout
# wins; and an element can be deleted as it was added, with the rest of the interval staying.
#
# Observed:
#  add 10.0.0.1 (no timeout), then 10.0.0.0/24 timeout 3s
#      becomes 10.0.0.0/24 timeout 3s; after that the set is empty. The same in reverse order.
#  add 10.0.0.0/25 timeout 1h, then 10.0.0.128/25 timeout 3s
#      becomes 10.0.0.0/24 timeout 3s: the last one wins. Both in one command: 1h, for both.
#  add 10.1.0.0/24, then 10.1.1.0/24
#      becomes 10.1.0.0/23; "delete element { 10.1.1.0/24 }" fails with "element does not exist",
#      while "get element { 10.1.1.0/24 }" finds it.
#
# Who is hurt: anyone who maintains lists of addresses with timeouts. A permanent entry disappears
# with someone else's short one, or a short one stays for an hour. A program that removes what it
# added fails as soon as two of its ranges touch, and the range stays.
#
# What works: no auto-merge; merge in the program, and replace the content of the set in one
# transaction ("flush set" and "add element" in one file).
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
nft -f - <<'RULES'
table inet t {
  set timed { type ipv4_addr; flags interval, timeout; auto-merge; }
  set plain { type ipv4_addr; flags interval; auto-merge; }
}
RULES
# The elements without the rest of their time.
elements() { nft list set inet t "$1" | sed -n 's/.*elements = { \(.*\) }/\1/p' | sed 's/ expires [0-9a-z]*//g'; }
add() { nft add element inet t timed "{ $1 }"; }

for order in "10.0.0.1|10.0.0.0/24 timeout 3s" "10.0.0.0/24 timeout 3s|10.0.0.1"; do
  nft flush set inet t timed
  add "${order%|*}"
  add "${order#*|}"
  [[ $(elements timed) = "10.0.0.0/24 timeout 3s" ]] || changed "$order: $(elements timed)"
  sleep 5
  [[ -z $(elements timed) ]] || changed "$order: after 5 s: $(elements timed)"
done
add "10.0.0.0/25 timeout 1h"
add "10.0.0.128/25 timeout 3s"
[[ $(elements timed) = "10.0.0.0/24 timeout 3s" ]] || changed "1h, then 3s: $(elements timed)"
nft flush set inet t timed
add "10.0.0.0/25 timeout 1h, 10.0.0.128/25 timeout 3s"
[[ $(elements timed) = "10.0.0.0/24 timeout 1h" ]] || changed "1h and 3s: $(elements timed)"

nft add element inet t plain '{ 10.1.0.0/24 }'
nft add element inet t plain '{ 10.1.1.0/24 }'
[[ $(elements plain) = 10.1.0.0/23 ]] || changed "two adjacent: $(elements plain)"
nft get element inet t plain '{ 10.1.1.0/24 }' >"$work/log" || changed "the element is not found"
if nft delete element inet t plain '{ 10.1.1.0/24 }' 2>"$work/log"; then changed "deleted, left: $(elements plain)"; fi
[[ $(<"$work/log") = *"element does not exist"* ]] ||
  changed "the deletion failed with: $(<"$work/log")"
[[ $(elements plain) = 10.1.0.0/23 ]] || changed "after the deletion: $(elements plain)"
echo "as described: a permanent element went with its neighbour's timeout, and one that was added cannot be deleted"
