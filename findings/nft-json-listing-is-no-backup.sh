#!/bin/bash
# nft: the output of "nft -j list ruleset" is rejected by "nft -j -f", or restored incompletely.
#
# Seen with: nft 1.0.6 (Debian 12, 1.0.6-2+deb12u2) on Linux 6.18.44.
#
# We expected: loading the JSON listing restores what was listed, as loading the text listing does
# (checked here for the same rules).
#
# Observed, each in a table of its own:
#  a verdict map that jumps to a chain of its table     rejected: "No such file or directory"
#                                                       (the map is listed before the chain)
#  a set of "typeof vlan id" (an unnamed integer)       rejected: "unqualified type integer"
#  a map to address ranges (10.0.0.1-10.0.0.9)          rejected: "Value must be a singleton"
#  a map to "address . port"                            rejected: "Invalid map type"
#  comments of tables, chains, sets; auto-merge         accepted, but missing
#  counters of elements                                 accepted, but 0
#  family and times of a "ct timeout" object            accepted, but "l3proto inet" and no
#                                                       times: the kernel's defaults apply
#
# Who is hurt: anyone who saves rules as JSON, or edits them by listing, changing and loading
# (configuration tools, libraries that use the JSON interface). Either the restore after a reboot
# fails, and with it all tables, because it is one transaction; or it succeeds, and accounting,
# timeouts and merging have changed silently.
#
# What works: save and restore the text.
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

# Loads a table of this content and restores it from its text, which must change nothing. Leaves its JSON in $work/json and an empty ruleset.
save() {
  nft flush ruleset
  printf 'table inet t {\n%s\n}\n' "$1" | nft -f - || { echo "not loaded: $1" >&2; exit 2; }
  nft list ruleset >"$work/text"
  nft -j list ruleset >"$work/json"
  nft flush ruleset
  nft -f "$work/text"
  nft list ruleset | cmp - "$work/text" ||
    changed "the text restores something else: $(nft list ruleset)"
  nft flush ruleset
}
refused() { # CONTENT ERROR
  save "$1"
  if nft -j -f "$work/json" 2>"$work/log"; then changed "taken: $(nft list ruleset)"; fi
  [[ $(<"$work/log") = *"$2"* ]] || changed "another error for $1: $(<"$work/log")"
  [[ -z $(nft list ruleset) ]] || changed "a part of it is loaded"
}
lost() { # CONTENT ORIGINAL RESTORED: lines that only the one, and only the other has
  save "$1"
  nft -j -f "$work/json" || changed "refused: $1"
  nft list ruleset >"$work/restored"
  local original restored
  original=$(comm -23 <(sort "$work/text") <(sort "$work/restored") | xargs)
  restored=$(comm -13 <(sort "$work/text") <(sort "$work/restored") | xargs)
  [[ $original = "$2" && $restored = "$3" ]] || changed "$1: lost '$original', got '$restored'"
}

refused 'map m {
  type ipv4_addr : verdict
  elements = { 10.0.0.1 : jump c }
}
chain c {
}' "No such file or directory"
refused 'set s {
  typeof vlan id
  elements = { 5 }
}' "unqualified type integer"
refused 'map m {
  type ipv4_addr : interval ipv4_addr
  elements = { 1.1.1.1 : 10.0.0.1-10.0.0.9 }
}' "Value must be a singleton"
refused 'map m {
  type ipv4_addr : ipv4_addr . inet_service
  elements = { 1.1.1.1 : 10.0.0.1 . 80 }
}' "Invalid map type"
lost 'comment "of a table"
chain c {
  comment "of a chain"
}
set s {
  type ipv4_addr
  flags interval
  auto-merge
  comment "of a set"
}' 'auto-merge comment of a chain comment of a set comment of a table' ''
lost 'set s {
  type ipv4_addr
  counter
  elements = { 10.0.0.1 counter packets 7 bytes 700 }
}' 'elements = { 10.0.0.1 counter packets 7 bytes 700 }' 'elements = { 10.0.0.1 counter packets 0 bytes 0 }'
lost 'ct timeout long {
  protocol tcp
  l3proto ip
  policy = { established : 7200, close : 20 }
}' 'l3proto ip policy = { established : 7200, close : 20 }' 'l3proto inet policy = { }'
echo "as described: of seven tables four are refused and three have changed"
