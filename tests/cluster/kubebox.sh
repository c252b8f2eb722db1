#!/usr/bin/env bash
# Builds kubebox, one binary with all of Kubernetes that the cluster needs, and the wrappers kubectl and helm beside it,
# into .cache/bin. Does nothing while the sources are those of the last build. The first build takes minutes: it compiles Kubernetes.
set -euo pipefail
# shellcheck source=tests/cluster/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

mkdir -p "$CACHE/bin"

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
version=$(awk '$1 == "k8s.io/kubernetes" { print $2 }' "$ROOT/tests/cluster/kubebox/go.mod")
IFS=. read -r major minor _ <<< "${version#v}"
v=k8s.io/component-base/version
go_program kubebox . "Kubernetes $version (six to ten minutes on two cores when Go's cache is cold)" \
    -trimpath -ldflags "-s -w -X $v.gitVersion=$version -X $v.gitMajor=$major -X $v.gitMinor=$minor"
