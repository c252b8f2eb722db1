#!/usr/bin/env bash
# The static checks, cheapest first; the first that fails ends the run and says what is wrong.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The version of cargo-deny, which deny.toml is written for.
DENY=0.20.2

step() { printf '\n== %s\n' "$*"; }
die() { printf 'check: %s\n' "$*" >&2; exit 1; }

# free_of PACKAGE PATTERN: PACKAGE's program is built without any crate whose name matches PATTERN.
free_of() {
    local tree found
    tree=$(cargo tree --locked --package "$1" --edges normal,build --prefix none --format '{p}')
    if found=$(grep -E "^($2) " <<< "$tree"); then die "$1 must not depend on: $found"; fi
}

# same GENERATED COMMITTED
same() { diff -u "$2" "$1" || die "$2 is not what crds/src/job.rs says; run 'make generate'"; }

tests/cluster/install.sh

step "format"
cargo fmt --all --check

step "shell scripts"
git ls-files --cached --others --exclude-standard -z -- '*.sh' .ci/run | xargs -0 shellcheck --external-sources

step "the operator links no libtorch, the trainer no Kubernetes client"
free_of rlhf-operator 'tch|torch-sys|c10d'
free_of rlhf-trainer 'kube|kube-.*|k8s-openapi'

step "chart"
tests/cluster/kubebox.sh
tests/chart.sh

step "dependencies"
if [ "$(.cache/bin/cargo-deny --version 2> /dev/null)" != "cargo-deny $DENY" ]; then
    # Once, and not as its authors optimize it, which takes several times as long.
    CARGO_PROFILE_DEV_DEBUG=false cargo install --debug --quiet --locked --root .cache --version "$DENY" cargo-deny
fi
.cache/bin/cargo-deny --locked check --hide-inclusion-graph bans licenses sources

step "alert rules"
promtool check rules charts/rlhf-operator/files/alerts.yaml > /dev/null
promtool test rules tests/prometheus/alerts_test.yaml

step "generated files"
mkdir -p target
cargo run --release --locked --quiet --bin crdgen > target/rlhfjob.yaml
same target/rlhfjob.yaml crds/rlhfjob.yaml
same target/rlhfjob.yaml charts/rlhf-operator/files/rlhfjob.yaml

step "clippy"
trainer-image/libtorch.sh
cargo clippy --release --locked --workspace --all-targets -- --deny warnings
# Not among all targets, since it is not tested by default.
cargo clippy --release --locked --workspace --test cluster -- --deny warnings

step "documentation"
RUSTDOCFLAGS='--deny warnings' cargo doc --release --locked --workspace --no-deps --document-private-items
