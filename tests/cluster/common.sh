# shellcheck shell=bash
# shellcheck disable=SC2034 # what is set here is used by the scripts that source this
# For the scripts of this folder: where things are, and how they speak. Everything lies under the repository's .cache, which
# may be a link to another disk: the kernel tells of mounts and processes by their real paths.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
CACHE=$(realpath -m "$ROOT/.cache")
STATE=$CACHE/cluster
BOX=$CACHE/bin/kubebox
SOCKET=$STATE/containerd/containerd.sock
# The node's own address on the bridge of the pods; DNS, the API server and the kubelet answer there.
BRIDGE=rlhf0
NODE_IP=10.244.0.1
POD_CIDR=10.244.0.0/24
export KUBECONFIG=$STATE/admin.conf

# Nothing ends without a word.
set -E
trap 'printf "%s: line %s failed: %s\n" "$(basename "$0" .sh)" "$LINENO" "$BASH_COMMAND" >&2' ERR

say() { printf '%(%T)T %s: %s\n' -1 "$(basename "$0" .sh)" "$*"; }
die() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2; exit 1; }
need_root() { [ "$(id -u)" = 0 ] || die "run this as root: kubelet and containerd need it"; }

kubectl() { "$BOX" kubectl "$@"; }
ctr() { command ctr -a "$SOCKET" -n k8s.io "$@"; }

# go_program NAME PACKAGE WHAT FLAG...: builds PACKAGE, with the versions of the Go module in this folder's NAME, into
# .cache/bin/NAME. Does nothing while the sources are those of the last build. Says WHAT it builds.
go_program() {
    local name=$1 package=$2 what=$3 out=$CACHE/bin/$1 log=$CACHE/logs/$1.log inputs total packages sources
    shift 3
    mkdir -p "$CACHE/bin" "$CACHE/logs"
    export CGO_ENABLED=0
    cd "$ROOT/tests/cluster/$name" || return
    # Whoever comes second waits, and finds it done.
    exec 7> "$CACHE/bin/$name.lock"
    flock 7
    mapfile -t sources < <(compgen -G '*.go' || true; printf '%s\n' go.mod go.sum)
    inputs=$({ go version; echo "$*"; sha256sum "${sources[@]}"; } | sha256sum | cut -d' ' -f1)
    if [ -x "$out" ] && [ "$(cat "$out.inputs" 2> /dev/null)" = "$inputs" ]; then
        exec 7>&-
        return
    fi
    say "building $what"
    packages=$(go list -deps "$package") || die "go could not list the packages; its message is above"
    total=$(wc -l <<< "$packages")
    # With -v, go names each package as it compiles it; those that its cache holds are not named. What a debugger needs, and a
    # compiler that is short of memory, would take a third of the time.
    GOGC=400 go build -v -gcflags=all=-dwarf=false "$@" -o "$out.new" "$package" 2>&1 | tee "$log" | awk -v name="$name" -v total="$total" \
        '/^[a-z0-9.]+(\/[^ ]*)?$/ { if (++n % 100 == 0) { printf "%s: %d of at most %d packages\n", name, n, total; fflush() } }' \
        || { grep -v '^[a-z0-9./_-]*$' "$log" | tail -n 20 >&2; die "the build failed; the log is $log"; }
    mv "$out.new" "$out"
    echo "$inputs" > "$out.inputs"
    exec 7>&-
    say "built $out, $(du -m "$out" | cut -f1) MB"
}

# pid_of NAME: the process id of a running part of the cluster; fails when it does not run. A number that belongs to
# another program by now (after a reboot, say) is not taken: each part has the state folder on its command line.
pid_of() {
    local pid
    pid=$(cat "$STATE/run/$1.pid" 2> /dev/null) || return 1
    tr '\0' ' ' 2> /dev/null < "/proc/$pid/cmdline" | grep -qF -- "$STATE/" || return 1
    printf '%s\n' "$pid"
}

# await SECONDS WHAT COMMAND...: polls until COMMAND succeeds; fails when SECONDS have passed.
await() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" > /dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        check_parts "$what"
        sleep 0.2
    done
}

# check_parts WHAT: overridden by up.sh, where a part that ended makes further waiting pointless.
check_parts() { :; }
