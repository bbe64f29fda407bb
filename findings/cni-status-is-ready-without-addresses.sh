#!/bin/bash
# CNI: STATUS of the reference plugins reports a network as ready when no address is left.
#
# Seen with: reference plugins 1.10.0 (bridge, host-local; Go module), CNI specification 1.1.0,
# Linux 6.18.44.
#
# The specification lists exhausted addresses as a case for an error from STATUS, and has a plugin
# ask its IPAM plugin.
#
# We expected: an error from STATUS once all addresses of host-local's range are taken, because each
# ADD fails from then on.
#
# Observed: ADD fails with "no IP addresses available in range set"; STATUS of bridge and of
# host-local exits with 0. STATUS of bridge fails where host-local cannot be found, so it does ask.
#
# Who is hurt: clusters that rely on it. Runtimes derive the NetworkReady condition of a node from
# STATUS, so a full node stays Ready, the scheduler keeps placing pods on it, and they cannot start
# while other nodes have free addresses.
#
# What works: a pod limit of the node (maxPods) below the size of its range, and an alert on failing
# ADDs.
set -euo pipefail
changed() { echo "changed: $*" >&2; exit 1; }

if [[ $# = 0 ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  (
    export GOPATH=$work/go GOCACHE=$work/go/cache GOBIN=$work/bin GOFLAGS="-modcacherw -buildvcs=false"
    plugins=github.com/containernetworking/plugins/plugins
    go install $plugins/main/bridge@v1.10.0 $plugins/ipam/host-local@v1.10.0 2>"$work/log" ||
      { cat "$work/log" >&2; exit 2; }
  )
  unshare --net --mount --pid --fork --kill-child --mount-proc bash "$0" "$work"
  exit
fi

work=$1
export CNI_PATH=$work/bin CNI_IFNAME=eth0
mount -t tmpfs tmpfs /run
ip link set lo up
# Three addresses but for the gateway's: of a /29, two are left out by rangeEnd.
config=$(printf '{"cniVersion": "1.1.0", "name": "small", "type": "bridge", "bridge": "cni-test", "isGateway": true,
  "ipam": {"type": "host-local", "dataDir": "%s/reserved", "ranges": [[{"subnet": "10.5.0.0/29", "rangeEnd": "10.5.0.4"}]]}}' "$work")
add() {
  ip netns add "$1"
  CNI_COMMAND=ADD CNI_CONTAINERID=$1 CNI_NETNS=/run/netns/$1 "$work/bin/bridge" <<<"$config"
}

for container in one two three; do
  CNI_COMMAND=STATUS "$work/bin/bridge" <<<"$config" ||
    changed "STATUS fails before the range is full"
  add $container >"$work/log" || { cat "$work/log" >&2; exit 2; }
done
if add four >"$work/log"; then changed "a fourth address: $(<"$work/log")"; fi
[[ $(<"$work/log") = *"no IP addresses available in range set"* ]] ||
  changed "ADD says: $(<"$work/log")"
for plugin in bridge host-local; do
  said=$(CNI_COMMAND=STATUS "$work/bin/$plugin" <<<"$config") ||
    changed "STATUS of $plugin fails: $said"
  [[ -z $said ]] || changed "STATUS of $plugin says: $said"
done
mv "$work/bin/host-local" "$work/"
if CNI_COMMAND=STATUS "$work/bin/bridge" <<<"$config" >"$work/log"; then changed "bridge does not ask its IPAM plugin"; fi
echo "as described: no address is left, ADD fails, STATUS is content"
