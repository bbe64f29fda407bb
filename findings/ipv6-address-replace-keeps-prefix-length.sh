#!/bin/bash
# Linux: replacing an IPv6 address by itself with another prefix length succeeds and keeps the old
# length.
#
# Seen with: Linux 6.18.44, iproute2 6.1.0 (Debian 12).
#
# We expected: "ip address replace ADDRESS/LENGTH" (RTM_NEWADDR with NLM_F_CREATE and NLM_F_REPLACE)
# either applies the length or fails.
#
# Observed, when 2001:db8:1::1/64 is replaced by 2001:db8:1::1/128: exit status 0, an RTM_NEWADDR
# notification that still has /64, the address is listed with /64, and its route 2001:db8:1::/64
# stays. The preferred lifetime in the same request is applied. Without "replace" the request fails
# ("File exists"). IPv4 differs again: replacing 10.1.0.1/24 by 10.1.0.1/32 leaves both.
#
# Who is hurt: anyone who corrects a prefix length. An address that was given /64 by mistake makes
# the machine treat a whole /64 as on-link. The agent that sets it to /128 gets success each time,
# and routes to other machines in that /64 remain shadowed.
#
# What works: delete the address with the length that it has, then add it.
set -euo pipefail
changed() { echo "changed: $*" >&2; exit 1; }

if [[ $# = 0 ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  unshare --net --mount --pid --fork --kill-child --mount-proc bash "$0" "$work"
  exit
fi

work=$1
ip link add name eth0 type veth peer name far0
ip link set eth0 up
ip link set far0 up
ip -6 address add 2001:db8:1::1/64 dev eth0 nodad
ip address add 10.1.0.1/24 dev eth0
lengths() { ip -o "$1" address show dev eth0 scope global | awk '{ print $4 }' | sort | xargs; }

if ip -6 address add 2001:db8:1::1/128 dev eth0 nodad 2>"$work/log"; then changed "IPv6 address added with a second length: $(lengths -6)"; fi
ip -6 address replace 2001:db8:1::1/128 dev eth0 nodad preferred_lft 500 ||
  changed "the replacement is refused"
[[ $(lengths -6) = 2001:db8:1::1/64 ]] || changed "IPv6 is now: $(lengths -6)"
[[ $(ip -6 address show dev eth0 scope global) = *"preferred_lft 500sec"* ]] ||
  changed "the preferred lifetime is not taken"
[[ -n $(ip -6 route show 2001:db8:1::/64) ]] || changed "the route of the old length went"
ip address replace 10.1.0.1/32 dev eth0
[[ $(lengths -4) = "10.1.0.1/24 10.1.0.1/32" ]] || changed "IPv4 is now: $(lengths -4)"
echo "as described: replaced by 2001:db8:1::1/128 with success, the address is 2001:db8:1::1/64"
