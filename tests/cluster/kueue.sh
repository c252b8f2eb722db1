#!/usr/bin/env bash
# Builds Kueue, which queues Jobs, into .cache/bin, and lays its Helm chart beside it (.cache/kueue/chart): the release that
# the Go module kueue names, as it is. Does nothing when that is done.
set -euo pipefail
# shellcheck source=tests/cluster/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$ROOT/tests/cluster/kueue"
version=$(awk '$1 == "sigs.k8s.io/kueue" { print $2 }' go.mod)
go_program kueue sigs.k8s.io/kueue/cmd/kueue "Kueue $version (three minutes on two cores when Go's cache is cold)" \
    -trimpath -ldflags "-s -w -X sigs.k8s.io/kueue/pkg/version.GitVersion=$version"

chart=$CACHE/kueue/chart
if [ "$(cat "$chart.version" 2> /dev/null)" != "$version" ]; then
    rm -rf "$chart"
    mkdir -p "$chart"
    cp -r --no-preserve=mode "$(go list -m -f '{{.Dir}}' sigs.k8s.io/kueue)/charts/kueue/." "$chart"
    echo "$version" > "$chart.version"
fi
