#!/usr/bin/env bash
# Builds Kubeflow Trainer and the JobSet controller that it needs, with which tests/bench-operator.sh compares the operator,
# into .cache/bin, and lays their charts and a runtime in .cache/peer. Does nothing while the sources are those of the last build.
set -euo pipefail
# shellcheck source=tests/cluster/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TRAINER=$CACHE/bin/trainer-controller-manager
mkdir -p "$CACHE/bin"
cd "$ROOT/tests/cluster/peer"
inputs=$({ go version; sha256sum go.mod go.sum; } | sha256sum | cut -d' ' -f1)
if [ -x "$TRAINER" ] && [ "$(cat "$TRAINER.inputs" 2> /dev/null)" = "$inputs" ]; then exit 0; fi
say "building Kubeflow Trainer and JobSet (five minutes on two cores when Go's cache is cold)"
CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$CACHE/bin/" \
    github.com/kubeflow/trainer/v2/cmd/trainer-controller-manager sigs.k8s.io/jobset
folder() { go list -m -f '{{.Dir}}' "$1"; }
rm -rf "$CACHE/peer"
mkdir -p "$CACHE/peer"
cp -r "$(folder sigs.k8s.io/jobset)/charts/jobset" "$CACHE/peer/"
cp -r "$(folder github.com/kubeflow/trainer/v2)/charts/kubeflow-trainer" "$CACHE/peer/"
cp "$(folder github.com/kubeflow/trainer/v2)/manifests/base/runtimes/torch_distributed.yaml" "$CACHE/peer/"
chmod -R u+w "$CACHE/peer"
# The trainer's chart installs JobSet's as a part of it, and finds it here. Of what it would not install it wants the chart
# all the same, which no Go module has.
mkdir "$CACHE/peer/kubeflow-trainer/charts"
sed -i '/^- name: lws$/,/^$/d' "$CACHE/peer/kubeflow-trainer/Chart.yaml"
mv "$CACHE/peer/jobset" "$CACHE/peer/kubeflow-trainer/charts/"
echo "$inputs" > "$TRAINER.inputs"
