#!/usr/bin/env bash
# Builds kubebox, one binary with all of Kubernetes that the cluster needs, and the wrappers kubectl and helm beside it,
# into .cache/bin. Does nothing while the sources are those of the last build. The first build takes minutes: it compiles Kubernetes.
set -euo pipefail
# shellcheck source=tests/cluster/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SOURCE=$ROOT/tests/cluster/kubebox
LOG=$CACHE/logs/kubebox.log
mkdir -p "$CACHE/bin" "$CACHE/logs"

for program in kubectl helm; do
    cat > "$CACHE/bin/$program" <<W
#!/bin/sh
# Speaks to the test cluster unless KUBECONFIG says otherwise.
bin=\$(dirname "\$0")
conf=\$bin/../cluster/admin.conf
if [ -z "\$KUBECONFIG" ] && [ -f "\$conf" ]; then export KUBECONFIG="\$conf"; fi
exec "\$bin/kubebox" $program "\$@"
W
    chmod +x "$CACHE/bin/$program"
done

# The version that Kubernetes reports of itself is that of its module.
version=$(awk '$1 == "k8s.io/kubernetes" { print $2 }' "$SOURCE/go.mod")
IFS=. read -r major minor _ <<< "${version#v}"
v=k8s.io/component-base/version
flags=(-trimpath -ldflags "-s -w -X $v.gitVersion=$version -X $v.gitMajor=$major -X $v.gitMinor=$minor")
export CGO_ENABLED=0

inputs=$(cd "$SOURCE" && { go version; echo "${flags[*]}"; sha256sum main.go go.mod go.sum; } | sha256sum | cut -d' ' -f1)
if [ -x "$BOX" ] && [ "$(cat "$BOX.inputs" 2> /dev/null)" = "$inputs" ]; then exit 0; fi

cd "$SOURCE"
say "building Kubernetes $version (eight minutes on two cores when Go's cache is cold)"
packages=$(go list -deps .) || die "go could not list the packages; its message is above"
total=$(wc -l <<< "$packages")
# With -v, go names each package as it compiles it; those that its cache holds are not named.
go build -v "${flags[@]}" -o "$BOX.new" . 2>&1 | tee "$LOG" | awk -v total="$total" \
    '/^[a-z0-9.]+(\/[^ ]*)?$/ { if (++n % 100 == 0) { printf "kubebox: %d of at most %d packages\n", n, total; fflush() } }' \
    || { grep -v '^[a-z0-9./_-]*$' "$LOG" | tail -n 20 >&2; die "the build failed; the log is $LOG"; }
mv "$BOX.new" "$BOX"
echo "$inputs" > "$BOX.inputs"
say "built $BOX, $(du -m "$BOX" | cut -f1) MB"
