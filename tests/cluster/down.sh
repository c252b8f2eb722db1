#!/usr/bin/env bash
# Stops the cluster that up.sh started and removes what it left on the machine: processes, mounts, network namespaces,
# the bridge, packet filter rules and address sets, control groups, sysctls. Kept are the image store, the logs and all of
# .cache else. Does nothing when there is nothing; fails, and names it, when something of the cluster is still there afterwards.
set -euo pipefail
# shellcheck source=tests/cluster/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# stop NAME...: asks each part to end, all at once, and waits; a part that has not ended after 20 s is killed.
stop() {
    local part pid
    for part in "$@"; do
        if pid=$(pid_of "$part"); then kill "$pid" 2> /dev/null || true; fi
    done
    for part in "$@"; do
        if ! await 20 "$part" gone "$part"; then
            pid=$(pid_of "$part") && kill -KILL "$pid"
            await 5 "$part" gone "$part" || die "$part (process $pid) cannot be stopped"
        fi
        rm -f "$STATE/run/$part.pid"
    done
}
gone() { ! pid_of "$1"; }

# The control groups of all pods of the machine, in both layouts: there is one kubelet on a machine, and it was ours.
pod_groups() { find /sys/fs/cgroup -maxdepth 3 -type d -name kubepods 2> /dev/null; }
pod_processes() { find /sys/fs/cgroup -path '*/kubepods/*' -name cgroup.procs -exec cat {} + 2> /dev/null | sort -u || true; }
no_tasks() { [ -z "$(ctr tasks ls -q)" ]; }

# shims: containerd's per-pod processes of this cluster; each has our socket on its command line.
shims() {
    local file
    for file in /proc/[0-9]*/cmdline; do
        if tr '\0' '\n' 2> /dev/null < "$file" | grep -qxF -- "$SOCKET"; then basename "$(dirname "$file")"; fi
    done
}

stop_pods() {
    local processes
    processes=$(pod_processes)
    if [ -n "$processes" ]; then xargs -r kill -KILL <<< "$processes" 2> /dev/null || true; fi
    if pid_of containerd > /dev/null; then
        await 20 "the end of the pods" no_tasks || true
        ctr containers ls -q | xargs -r -I{} "$(type -P ctr)" -a "$SOCKET" -n k8s.io containers rm {} > /dev/null
    fi
}

our_mounts() { awk -v d="$STATE/" 'index($2, d) == 1 { print $2 }' /proc/mounts | sort -r; }

# Namespaces of pods: those that have an address of the pods' network.
our_namespaces() {
    local name
    for name in $(ip netns list 2> /dev/null | awk '/^cni-/ { print $1 }'); do
        if [ -n "$(ip -n "$name" -4 -o address show to "$POD_CIDR" 2> /dev/null)" ]; then echo "$name"; fi
    done
}

# unhook COMMAND TABLE: the rules that take Kubernetes' and our own chains and jumps out again, as input for COMMAND-restore.
unhook() {
    "$1-save" -t "$2" 2> /dev/null | awk '
        /^:KUBE-/ { chain = substr($1, 2); chains[chain]; print "-F " chain }
        /^-A / && $2 !~ /^KUBE-/ && (/ -j KUBE-/ || /--comment rlhf-cluster /) { sub(/^-A/, "-D"); print }
        END { for (chain in chains) print "-X " chain }'
}

# proxy_tables: those of kube-proxy, as the family and the name of each.
proxy_tables() { nft list tables 2> /dev/null | sed -nE 's/^table (ip6?) kube-proxy$/\1 kube-proxy/p' || true; }

packet_filter() {
    local command table rules
    for command in iptables ip6tables; do
        for table in filter nat mangle raw; do
            rules=$(unhook "$command" "$table")
            [ -n "$rules" ] || continue
            printf '*%s\n%s\nCOMMIT\n' "$table" "$rules" | "$command-restore" --noflush
        done
    done
}

# address_sets: those that kube-router makes for its rules.
address_sets() { ipset list -name 2> /dev/null | grep -E '^(KUBE-SRC|KUBE-DST|TMP)-[A-Z2-7]{16}$' || true; }

# left: names each thing of the cluster that is still on the machine.
left() {
    local name command table
    shims | sed 's/^/process /'
    pod_processes | sed 's/^/process of a pod /'
    our_mounts | sed 's/^/mount /'
    our_namespaces | sed 's/^/network namespace /'
    pod_groups | sed 's/^/control group /'
    if ip link show "$BRIDGE" > /dev/null 2>&1; then echo "bridge $BRIDGE"; fi
    for name in $(compgen -G "$STATE/run/*.pid" || true); do
        name=$(basename "$name" .pid)
        if pid_of "$name" > /dev/null; then echo "process of $name"; fi
    done
    for command in iptables ip6tables; do
        for table in filter nat mangle raw; do unhook "$command" "$table" | sed "s/^/rule of $command -t $table: /"; done
    done
    proxy_tables | sed 's/^/packet filter table /'
    address_sets | sed 's/^/address set /'
}

clear_machine() {
    shims | xargs -r kill -KILL 2> /dev/null || true
    our_mounts | xargs -r umount -l
    our_namespaces | xargs -r -n 1 ip netns delete
    if ip link show "$BRIDGE" > /dev/null 2>&1; then ip link delete "$BRIDGE"; fi
    packet_filter
    proxy_tables | xargs -r -L 1 nft delete table
    # The kernel lets none go that a rule refers to.
    address_sets | xargs -r -n 1 ipset destroy
    pod_groups | while read -r group; do find "$group" -depth -type d -exec rmdir {} +; done
    if [ -f "$STATE/run/sysctls" ]; then sysctl -q -p "$STATE/run/sysctls" > /dev/null || true; fi
    rm -rf /var/lib/cni/results/rlhf-pods-*
    # The kubelet links each container's log from here, whatever its own folder.
    find /var/log/containers -lname "$STATE/*" -delete 2> /dev/null || true
}

# orphaned: our bridge is here without a kubelet: the cluster of another checkout, whose processes were ended from outside.
orphaned() { ip link show "$BRIDGE" > /dev/null 2>&1 && no_kubelet; }
no_kubelet() { [ -z "$(ss -Hltn 'sport = :10250')" ]; }

command -v ss > /dev/null || exit 0 # never started: install.sh has not run
need_root
if [ "${1:-}" != --locked ]; then
    mkdir -p "$CACHE"
    exec 9> "$CACHE/cluster.lock"
    flock 9
fi
# up.sh makes this folder before it touches the machine, and here it goes last.
if [ ! -d "$STATE/run" ] && ! orphaned; then exit 0; fi
say "stopping the cluster"
stop kubelet proxy firewall coredns scheduler controllers
# A process that is ending has no command line any more, but its port still for a moment.
await 10 "the kubelet's port" no_kubelet || die "another kubelet runs on this machine (port 10250): its pods cannot be told from ours, so nothing more is touched"
stop_pods
stop apiserver containerd
stop etcd
clear_machine
remains=$(left)
[ -z "$remains" ] || die "the cluster is stopped, but this is still there: $remains"
# What pods mounted is unmounted, or `left` would have named it: their data is not reached from here.
rm -rf --one-file-system "$STATE"/{pki,cni,etcd,kubelet,containerd/state,*.conf,Corefile,audit.yaml}
rm -rf "$STATE/run"
say "stopped; nothing of it is left running"
