#!/usr/bin/env bash
# The operator with many jobs at once: a control plane of its own, nodes and pods played by kwok, and the release binary of
# the operator as a process. Prints a table, and as JSON in the last line. JOBS, STAGES, IDLE_SECONDS and FOREIGN_PODS
# change the size; PEER=1 measures Kubeflow Trainer first, with a TrainJob for each job. KILLS=10 kills the operator ten times
# on the way in place of all other measurements, and HOSTILE=1 sets a hostile namespace beside another.
# tests/src/bin/bench-operator says what is measured; operator/BENCHMARKS.md has results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# kwok gives pods addresses of this range, and this machine answers for all of them.
POD_CIDR=10.98.0.0/16

tests/cluster/install.sh
tests/cluster/kubebox.sh
tests/cluster/kwok.sh
cargo build --release --locked --workspace --bins
down() {
    ip route del local "$POD_CIDR" dev lo 2> /dev/null || true
    tests/cluster/down.sh
}
up() {
    tests/cluster/down.sh
    tests/cluster/up.sh --control-plane
    ip route replace local "$POD_CIDR" dev lo
}
trap down EXIT
if [ "${PEER:-0}" != 0 ]; then
    tests/cluster/peer.sh
    up
    target/release/bench-operator --peer "$@"
fi
up
target/release/bench-operator "$@"
