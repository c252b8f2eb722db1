#!/usr/bin/env bash
# Every test: installs and fetches what is missing, builds once, then the tests of the crates (units, golden values, laws),
# then those on a real cluster, which is started for them and stopped again unless it ran before. Both kinds run even when
# the first has failures. Ends with the runners' closing lines and their sum.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
logs=$root/.cache/logs
mkdir -p "$logs"

step() { printf '\n== %(%T)T %s\n' -1 "$*"; }

step "what this machine lacks"
tests/cluster/install.sh
trainer-image/libtorch.sh
tests/cluster/kubebox.sh
tests/assets/fetch.sh

# The libraries that the tests' programs link; and several ranks share the cores, so that each computes on one thread.
export LD_LIBRARY_PATH=$root/.cache/libtorch/torch/lib OMP_NUM_THREADS=1

step "building"
cargo build --release --locked --workspace --all-targets
cargo test --release --locked --workspace --test cluster --no-run

failed=0
step "the crates' tests"
cargo test --release --locked --workspace --no-fail-fast 2>&1 | tee "$logs/test-crates.log" || failed=1

step "a cluster"
was_up=1
[ -f .cache/cluster/run/kubelet.pid ] || was_up=
if [ -z "$was_up" ]; then trap tests/cluster/down.sh EXIT; fi
tests/cluster/up.sh
tests/cluster/images.sh operator trainer kueue
export KUBECONFIG=$root/.cache/cluster/admin.conf PATH=$root/.cache/bin:$PATH
tests/cluster/smoke.sh | tee "$logs/test-smoke.log" || failed=1

step "the tests on the cluster"
cargo test --release --locked --workspace --test cluster --no-fail-fast 2>&1 | tee "$logs/test-cluster.log" || failed=1

if [ -z "$was_up" ]; then
    trap - EXIT
    tests/cluster/down.sh || failed=1
fi

step "closing lines"
grep -hE '^test result: |^[0-9]+ passed, [0-9]+ failed$|^left out: ' "$logs"/test-{crates,smoke,cluster}.log | grep -v ' 0 passed; 0 failed; 0 ignored' || true
awk '/^test result: / { gsub(/;/, ""); passed += $4; failed += $6; skipped += $8 }
     /^[0-9]+ passed, [0-9]+ failed$/ { passed += $1; failed += $3 }
     END { printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped; exit passed == 0 }' \
    "$logs"/test-{crates,smoke,cluster}.log
exit "$failed"
