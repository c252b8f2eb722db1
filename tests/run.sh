#!/usr/bin/env bash
# Every test: installs and fetches what is missing, builds once, then the tests of the crates (units, golden values, laws),
# then those on a real cluster, which is started for them and stopped again unless it ran before. Both kinds run even when
# the first has failures, and what failed among others is tried once more alone, and named. What waits for no other part is
# made beside it. Ends with the runners' closing lines and their sum.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
logs=$root/.cache/logs
mkdir -p "$logs"
# shellcheck source=tests/steps.sh
source tests/steps.sh

# Kubernetes and Kueue, and what the images are built on.
# shellcheck disable=SC2317 # `beside` calls it
programs() {
    tests/cluster/kubebox.sh
    tests/cluster/kueue.sh
    tests/cluster/images.sh --build base pause
}

# The cluster with the product's images in it, and its own test.
# shellcheck disable=SC2317
cluster() {
    tests/cluster/up.sh
    tests/cluster/images.sh operator trainer kueue
    if ! tests/cluster/smoke.sh 2>&1 | tee "$logs/test-smoke.log"; then touch "$logs/smoke-failed"; fi
}

# again KIND: tries what failed of a kind of tests once more.
again() { tests/again.sh "$logs/test-$1.log" 2>&1 | tee "$logs/test-$1.log.again" || failed=1; }

step "what this machine lacks"
tests/cluster/install.sh
beside programs
trainer-image/libtorch.sh
tests/assets/fetch.sh

# The libraries that the tests' programs link; and several ranks share the cores, so that each computes on one thread.
export LD_LIBRARY_PATH=$root/.cache/libtorch/torch/lib OMP_NUM_THREADS=1

step "building"
cargo build --release --locked --workspace --all-targets
cargo test --release --locked --workspace --test cluster --no-run
joined programs

failed=0
was_up=1
[ -f .cache/cluster/run/kubelet.pid ] || was_up=
if [ -z "$was_up" ]; then at_exit tests/cluster/down.sh; fi
rm -f "$logs/test-smoke.log" "$logs/smoke-failed" "$logs"/test-{crates,cluster}.log.again
beside cluster

step "the crates' tests"
cargo test --release --locked --workspace --no-fail-fast 2>&1 | tee "$logs/test-crates.log" || again crates

step "a cluster"
joined cluster
[ ! -e "$logs/smoke-failed" ] || failed=1

step "the tests on the cluster"
export KUBECONFIG=$root/.cache/cluster/admin.conf PATH=$root/.cache/bin:$PATH
# They wait most of the time, and see to it themselves which of them run side by side.
rm -f "$logs/test-cluster-times.log"
RUST_TEST_THREADS=100 cargo test --release --locked --workspace --test cluster --no-fail-fast 2>&1 | tee "$logs/test-cluster.log" || again cluster

step "the end of the cluster"
if [ -z "$was_up" ]; then
    at_exit
    tests/cluster/down.sh || failed=1
fi

step "closing lines"
took
grep -hE '^failed beside others' "$logs"/test-{crates,cluster}.log.again 2> /dev/null || true
grep -hE '^test result: |^[0-9]+ passed, [0-9]+ failed$|^left out: ' "$logs"/test-{crates,smoke,cluster}.log | grep -v ' 0 passed; 0 failed; 0 ignored' || true
touch "$logs"/test-{crates,cluster}.log.again
awk 'FILENAME ~ /again$/ { if (/^failed beside others, passed alone: /) { passed++; failed-- } next }
     /^test result: / { gsub(/;/, ""); passed += $4; failed += $6; skipped += $8 }
     /^[0-9]+ passed, [0-9]+ failed$/ { passed += $1; failed += $3 }
     END { printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped; exit passed == 0 }' \
    "$logs"/test-{crates,smoke,cluster}.log "$logs"/test-{crates,cluster}.log.again
exit "$failed"
