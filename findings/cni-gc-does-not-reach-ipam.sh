#!/bin/bash
# CNI: GC on a network of the reference plugins succeeds and releases no address, although
# host-local supports it.
#
# Seen with: reference plugins 1.10.0 (bridge, ptp, host-local, portmap; Go module), CNI
# specification 1.1.0, Linux 6.18.44.
#
# The specification requires a plugin to forward GC to the plugins that it delegates to. GC is the
# way to release what will never get a DEL.
#
# We expected: with three attachments made and one of them listed as valid, GC on bridge with
# host-local releases the addresses of the other two, because host-local 1.10.0 implements GC.
#
# Observed: bridge and ptp exit with 0, print nothing, and do not call host-local: all three
# addresses stay reserved. Calling host-local directly, with the same configuration, releases two.
# portmap exits with 0 as well, and the host port of an attachment that is no longer valid still
# leads to its address. (libcni hides this while its cache is intact, because its GC first sends DEL
# for the attachments that it remembers. It cannot do so for those it does not: after /var/lib/cni
# was cleared or restored, or in a runtime without a cache.)
#
# Who is hurt: nodes whose runtime lost track of sandboxes, which is when GC matters. The range of a
# node runs out of addresses after some such losses, and the operator who finds that GC is
# implemented and exits with 0 looks elsewhere.
#
# What works: call the IPAM plugin with GC directly, or compare its reservations with what runs.
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
    export GOPATH=$work/go GOCACHE=$work/go/cache GOBIN=$work/bin GOFLAGS="-modcacherw -buildvcs=false"
    plugins=github.com/containernetworking/plugins/plugins
    go install $plugins/main/bridge@v1.10.0 $plugins/main/ptp@v1.10.0 $plugins/ipam/host-local@v1.10.0 $plugins/meta/portmap@v1.10.0 2>"$work/log" ||
      { cat "$work/log" >&2; exit 2; }
  )
  unshare --net --mount --pid --fork --kill-child --mount-proc bash "$0" "$work"
  exit
fi

work=$1
export LD_LIBRARY_PATH=$work/usr/lib/x86_64-linux-gnu PATH=$work/usr/sbin:$PATH CNI_PATH=$work/bin CNI_IFNAME=eth0
mount -t tmpfs tmpfs /run
ip link set lo up
valid='"cni.dev/valid-attachments": [{"containerID": "one", "ifname": "eth0"}]'
# The configuration of a network of this name and plugin; $3 is more of it.
config() {
  printf '{"cniVersion": "1.1.0", "name": "%s", "type": "%s", "bridge": "cni-test", "ipMasq": false, %s
    "ipam": {"type": "host-local", "dataDir": "%s/reserved", "ranges": [[{"subnet": "10.5.0.0/24"}]]}}' "$1" "$2" "${3:+$3,}" "$work"
}
reserved() { (cd "$work/reserved/$1" && echo 10.*); }

for plugin in bridge ptp; do
  for container in one two three; do
    ip netns add $plugin-$container
    config net-$plugin $plugin | CNI_COMMAND=ADD CNI_CONTAINERID=$container CNI_NETNS=/run/netns/$plugin-$container "$work/bin/$plugin" >"$work/log" ||
      { cat "$work/log" >&2; exit 2; }
  done
  [[ $(reserved net-$plugin) = "10.5.0.2 10.5.0.3 10.5.0.4" ]] ||
    { echo "reserved: $(reserved net-$plugin)" >&2; exit 2; }
  said=$(config net-$plugin $plugin "$valid" | CNI_COMMAND=GC "$work/bin/$plugin" 2>&1) ||
    changed "GC of $plugin fails: $said"
  [[ -z $said ]] || changed "GC of $plugin says: $said"
  [[ $(reserved net-$plugin) = "10.5.0.2 10.5.0.3 10.5.0.4" ]] ||
    changed "GC of $plugin left: $(reserved net-$plugin)"
  config net-$plugin $plugin "$valid" | CNI_COMMAND=GC "$work/bin/host-local" ||
    changed "GC of host-local fails"
  [[ $(reserved net-$plugin) = 10.5.0.2 ]] ||
    changed "GC of host-local left: $(reserved net-$plugin)"
done

# portmap in a chain, for the attachment "two", which is not valid later.
portmap() {
  printf '{"cniVersion": "1.1.0", "name": "ports", "type": "portmap", "backend": "nftables", "capabilities": {"portMappings": true}, %s}' "$2" |
    CNI_COMMAND=$1 CNI_CONTAINERID=two CNI_NETNS=/run/netns/bridge-two "$work/bin/portmap"
}
portmap ADD '"runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]},
  "prevResult": {"cniVersion": "1.1.0", "interfaces": [{"name": "eth0", "sandbox": "/run/netns/bridge-two"}], "ips": [{"address": "10.5.0.3/24", "interface": 0}]}' >"$work/log"
rule="tcp dport 8080 dnat to 10.5.0.3:80"
[[ $(nft list ruleset) = *"$rule"* ]] || { echo "portmap made: $(nft list ruleset)" >&2; exit 2; }
portmap GC "$valid" || changed "GC of portmap fails"
[[ $(nft list ruleset) = *"$rule"* ]] || changed "GC of portmap left: $(nft list ruleset)"
echo "as described: GC of bridge, ptp and portmap succeeded and cleaned nothing up, GC of host-local freed two addresses"
