#!/usr/bin/env bash
# Starts a real one-node Kubernetes on this machine: etcd, API server, controller manager, scheduler, kubelet on
# containerd, kube-proxy, CoreDNS, and kube-router's firewall, which enforces NetworkPolicies. Returns when the node is Ready,
# DNS answers and policies hold; does nothing when that is so already.
#
# Needs root. State is in .cache/cluster: admin.conf (the kubeconfig), log/ (one file a part; audit.log has every write
# to the API), containerd/ (images outlive down.sh, so that they are imported once). Each start is an empty cluster.
#
# up.sh --control-plane starts etcd, API server, controller manager and scheduler alone: a cluster whose nodes somebody
# else plays. Nodes are then not given up for want of heartbeats.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=tests/cluster/common.sh
source "$HERE/common.sh"

SERVICE_CIDR=10.96.0.0/16
SERVICE_IP=10.96.0.1
PARTS=(etcd apiserver containerd coredns controllers scheduler kubelet proxy firewall)
ONLY_CONTROL_PLANE=
PORTS=(2379 2380 6443 10248 10249 10250 10256 10257 10259)
# The kubelet and kube-proxy set the rest of these themselves; down.sh puts all back.
SYSCTLS=(net.ipv4.ip_forward net.bridge.bridge-nf-call-iptables net.ipv4.conf.all.route_localnet
    vm.overcommit_memory kernel.panic kernel.panic_on_oops)

api_ready() { [ "$(kubectl get --raw /readyz)" = ok ]; }
node_ready() { [ "$(kubectl get node node1 -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = True ]; }
dns_ready() { curl -sf -o /dev/null "http://$NODE_IP:8181/ready"; }
# Its last rule ends the first pass over all pods and policies.
firewall_ready() {
    iptables -C KUBE-ROUTER-FORWARD -m comment --comment "rule to explicitly ACCEPT traffic that comply to network policies" \
        -m mark --mark 0x20000/0x20000 -j ACCEPT
}
account_ready() { kubectl get serviceaccount default -n default; }

healthy() {
    local part
    for part in "${PARTS[@]}"; do pid_of "$part" > /dev/null || return 1; done
    api_ready > /dev/null 2>&1 || return 1
    [ -n "$ONLY_CONTROL_PLANE" ] || { node_ready && dns_ready && firewall_ready; } > /dev/null 2>&1
}

check_path() {
    # A unix socket's path has at most 107 bytes, and the kubelet's is the longest here.
    [ ${#STATE} -le 72 ] || die "the path of this repository is too long for unix sockets: $ROOT; use a shorter one"
    [[ $STATE != *[[:space:]]* ]] || die "the path of this repository has a space in it: $ROOT; use another one"
}

check_ports() {
    local port owner
    for port in "${PORTS[@]}"; do
        owner=$(ss -Hltnp "sport = :$port" | grep -o '"[^"]*",pid=[0-9]*' | head -n 1 || true)
        if [ -n "$(ss -Hltn "sport = :$port")" ]; then
            die "port $port is taken by ${owner:-a program of another user}; the cluster needs it: stop that program first"
        fi
    done
    if [ -n "$(ip -4 -o address show to 10.244.0.0/16)" ]; then
        die "this machine has an address in 10.244.0.0/16 already, which the pods need: $(ip -4 -o address show to 10.244.0.0/16 | head -n 1)"
    fi
}

# start NAME COMMAND...: a part in a session of its own, with none of our caller's files open.
start() {
    local name=$1
    shift
    (
        cd "$STATE"
        for file in "/proc/$BASHPID/fd/"*; do
            file=${file##*/}
            if [ "$file" -gt 2 ]; then eval "exec $file>&-"; fi
        done
        exec setsid "$@" > "log/$name.log" 2>&1 < /dev/null
    ) &
    echo $! > "$STATE/run/$name.pid"
    STARTED+=("$name")
}
STARTED=()

# check_parts WHAT: a part that ended will not come back, so waiting for WHAT ends too.
check_parts() {
    local part
    for part in "${STARTED[@]}"; do
        kill -0 "$(cat "$STATE/run/$part.pid")" 2> /dev/null && continue
        tail -n 15 "$STATE/log/$part.log" >&2
        die "$part ended while $1 was awaited; the last lines of $STATE/log/$part.log are above"
    done
}

# must SECONDS WHAT COMMAND...: await, or give up with what to look at.
must() {
    await "$@" || die "$2 did not come within $1 s; the logs are in $STATE/log. 'make cluster-down' clears up"
}

certificates() {
    cd "$STATE/pki"
    local key=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
    openssl req -x509 "${key[@]}" -keyout ca.key -out ca.crt -days 365 -subj /CN=rlhf-test-ca 2> /dev/null
    sign() { openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -out "$1.crt" -days 365 "${@:2}" 2> /dev/null; }
    cat > san <<E
subjectAltName=DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:localhost,IP:127.0.0.1,IP:$SERVICE_IP,IP:$NODE_IP
extendedKeyUsage=serverAuth
E
    openssl req "${key[@]}" -keyout apiserver.key -out apiserver.csr -subj /CN=kube-apiserver 2> /dev/null
    sign apiserver -extfile san
    openssl req "${key[@]}" -keyout kubelet-client.key -out kubelet-client.csr \
        -subj /O=system:masters/CN=kube-apiserver-kubelet-client 2> /dev/null
    sign kubelet-client
    openssl ecparam -name prime256v1 -genkey -noout -out sa.key
}

# account FILE USER GROUP: a token for USER, known to the API server, and a kubeconfig FILE that uses it.
account() {
    local token
    token=$(openssl rand -hex 16)
    printf '%s,%s,%s,"%s"\n' "$token" "$2" "$2" "$3" >> "$STATE/pki/tokens.csv"
    cat > "$STATE/$1" <<E
apiVersion: v1
kind: Config
clusters: [{name: rlhf-test, cluster: {server: "https://127.0.0.1:6443", certificate-authority: "$STATE/pki/ca.crt"}}]
users: [{name: "$2", user: {token: "$token"}}]
contexts: [{name: rlhf-test, context: {cluster: rlhf-test, user: "$2"}}]
current-context: rlhf-test
E
    chmod 600 "$STATE/$1"
}

accounts() {
    account admin.conf admin system:masters
    account kubelet.conf system:node:node1 system:nodes
    account controllers.conf system:kube-controller-manager ''
    account scheduler.conf system:kube-scheduler ''
    account proxy.conf system:kube-proxy system:node-proxier
}

network() {
    local name value
    for name in "${SYSCTLS[@]}"; do
        if value=$(sysctl -n "$name" 2> /dev/null); then echo "$name=$value"; fi
    done > "$STATE/run/sysctls"
    sysctl -qw net.ipv4.ip_forward=1
    # Without it neither a Service's address nor a policy works between pods of one bridge; absent where the module is not
    # loaded.
    modprobe br_netfilter 2> /dev/null || true
    sysctl -qw net.bridge.bridge-nf-call-iptables=1 2> /dev/null || true
    ip link add "$BRIDGE" type bridge
    ip address add "$NODE_IP/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
    # Other software (Docker, for one) makes the kernel drop what is forwarded.
    iptables -I FORWARD -s "$POD_CIDR" -m comment --comment rlhf-cluster -j ACCEPT
    iptables -I FORWARD -d "$POD_CIDR" -m comment --comment rlhf-cluster -j ACCEPT
    cat > "$STATE/cni/10-bridge.conflist" <<E
{"cniVersion": "1.0.0", "name": "rlhf-pods", "plugins": [
  {"type": "bridge", "bridge": "$BRIDGE", "isGateway": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$STATE/cni/addresses", "ranges": [[{"subnet": "$POD_CIDR"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
E
}

# PodGroups, for gangs.
GATES=GenericWorkload=true

# start_control_plane FLAG...: with FLAGs for the API server.
start_control_plane() {
    start etcd etcd --data-dir "$STATE/etcd" --unsafe-no-fsync --listen-peer-urls http://127.0.0.1:2380 \
        --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379
    cat > "$STATE/audit.yaml" <<'E'
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: Metadata, verbs: [create, update, patch, delete, deletecollection]}
- {level: None}
E
    local pki=$STATE/pki
    start apiserver "$BOX" kube-apiserver --etcd-servers http://127.0.0.1:2379 --secure-port 6443 --bind-address 0.0.0.0 \
        --advertise-address "$NODE_IP" --tls-cert-file "$pki/apiserver.crt" --tls-private-key-file "$pki/apiserver.key" \
        --client-ca-file "$pki/ca.crt" --kubelet-client-certificate "$pki/kubelet-client.crt" \
        --kubelet-client-key "$pki/kubelet-client.key" --token-auth-file "$pki/tokens.csv" \
        --service-account-key-file "$pki/sa.key" --service-account-signing-key-file "$pki/sa.key" \
        --service-account-issuer https://kubernetes.default.svc --service-cluster-ip-range "$SERVICE_CIDR" \
        --authorization-mode Node,RBAC --allow-privileged=true --kubelet-preferred-address-types InternalIP \
        --audit-policy-file "$STATE/audit.yaml" --audit-log-path "$STATE/log/audit.log" --audit-log-maxsize 2000 "$@"
}

start_dns() {
    cat > "$STATE/Corefile" <<E
.:53 {
  bind $NODE_IP
  ready $NODE_IP:8181
  errors
  kubernetes cluster.local in-addr.arpa {
    kubeconfig $STATE/admin.conf
    ttl 1
  }
}
E
    start coredns "$BOX" coredns -conf "$STATE/Corefile"
}

# start_controllers FLAG...: with FLAGs for the controller manager.
start_controllers() {
    start controllers "$BOX" kube-controller-manager --kubeconfig "$STATE/controllers.conf" \
        --authentication-kubeconfig "$STATE/controllers.conf" --authorization-kubeconfig "$STATE/controllers.conf" \
        --service-account-private-key-file "$STATE/pki/sa.key" --root-ca-file "$STATE/pki/ca.crt" \
        --use-service-account-credentials --leader-elect=false --allocate-node-cidrs=false --kube-api-qps 300 --kube-api-burst 600 "$@"
}

# start_scheduler FLAG...: with FLAGs for the scheduler.
start_scheduler() {
    start scheduler "$BOX" kube-scheduler --kubeconfig "$STATE/scheduler.conf" --leader-elect=false \
        --authentication-kubeconfig "$STATE/scheduler.conf" --authorization-kubeconfig "$STATE/scheduler.conf" \
        --kube-api-qps 300 --kube-api-burst 600 "$@"
}

start_containerd() {
    cat > "$STATE/containerd/config.toml" <<E
version = 2
root = "$STATE/containerd/root"
state = "$STATE/containerd/state"
[grpc]
  address = "$SOCKET"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/rlhf/pause:dev"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$STATE/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
E
    start containerd containerd --config "$STATE/containerd/config.toml"
}

start_node() {
    echo 'nameserver 127.0.0.1' > "$STATE/resolv.conf"
    cat > "$STATE/kubelet/config.yaml" <<E
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: unix://$SOCKET
podLogsDir: $STATE/log/pods
clusterDomain: cluster.local
clusterDNS: ["$NODE_IP"]
resolvConf: $STATE/resolv.conf
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $STATE/pki/ca.crt}}
authorization: {mode: Webhook}
evictionHard: {nodefs.available: "1%", imagefs.available: "1%", memory.available: 50Mi}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
syncFrequency: 5s
E
    start kubelet "$BOX" kubelet --config "$STATE/kubelet/config.yaml" --kubeconfig "$STATE/kubelet.conf" \
        --hostname-override node1 --node-ip "$NODE_IP" --root-dir "$STATE/kubelet" --cert-dir "$STATE/kubelet/pki"
    # In tables of its own: the firewall writes the whole filter table of iptables, and what it lets through meets no rule there
    # any more, such as those that refuse connections to a Service without endpoints.
    start proxy "$BOX" kube-proxy --kubeconfig "$STATE/proxy.conf" --hostname-override node1 --proxy-mode nftables \
        --cluster-cidr "$POD_CIDR" --conntrack-max-per-core 0 --conntrack-tcp-timeout-established 0 --conntrack-tcp-timeout-close-wait 0
}

# start_firewall: once the node is known, whose pods it asks for.
start_firewall() {
    start firewall "$BOX" kube-router --kubeconfig "$STATE/admin.conf" --hostname-override node1 \
        --service-cluster-ip-range "$SERVICE_CIDR"
}

start_all() {
    # The node's sandbox image is built before anything runs, so that a failure leaves nothing to clear up.
    "$HERE/images.sh" --build pause
    network
    say "starting etcd, the API server and containerd"
    start_control_plane --feature-gates "$GATES" --runtime-config scheduling.k8s.io/v1beta1=true
    start_containerd
    must 60 "the API server" api_ready
    must 30 "containerd" ctr version
    "$HERE/images.sh" pause
    say "starting the controllers, DNS and the node"
    start_dns
    start_controllers --feature-gates "$GATES"
    start_scheduler --feature-gates "$GATES"
    start_node
    must 90 "node1" node_ready
    start_firewall
    must 30 "DNS" dns_ready
    must 30 "the firewall" firewall_ready
}

start_only_control_plane() {
    say "starting etcd, the API server, the controllers and the scheduler"
    # Watches from the start on, as kwok makes them, need an etcd of 3.4.25 or newer, unless they are done in the old way.
    # Webhooks are called at their pods' addresses: nothing answers for those of Services here.
    start_control_plane --feature-gates WatchList=false --enable-aggregator-routing
    must 60 "the API server" api_ready
    start_controllers --node-monitor-grace-period 24h
    start_scheduler
}

case ${1:-} in
    '') ;;
    --control-plane) ONLY_CONTROL_PLANE=1 PARTS=(etcd apiserver controllers scheduler) ;;
    *) die "usage: up.sh [--control-plane]" ;;
esac
need_root
check_path
"$HERE/install.sh"
"$HERE/kubebox.sh"
exec 9> "$CACHE/cluster.lock"
flock 9
if healthy; then say "the cluster is up; KUBECONFIG=$KUBECONFIG"; exit 0; fi
"$HERE/down.sh" --locked
check_ports
rm -rf "$STATE/log"
mkdir -p "$STATE"/{pki,run,log,cni,etcd,containerd,kubelet}
(certificates)
accounts
if [ -n "$ONLY_CONTROL_PLANE" ]; then start_only_control_plane; else start_all; fi
must 30 "the default service account" account_ready
say "the cluster is up; KUBECONFIG=$KUBECONFIG"
