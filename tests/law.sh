#!/usr/bin/env bash
# The law over every combination of strategy, world size, micro-batch and family: for each stage 216 runs a family, each
# compared with the plain one. `make test` runs a cross section of them. LAW=2/12 runs the second of twelve parts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tests/cluster/install.sh
trainer-image/libtorch.sh
export LD_LIBRARY_PATH=$PWD/.cache/libtorch/torch/lib OMP_NUM_THREADS=1
LAW=${LAW:-all} exec cargo test --release --locked --package rlhf-trainer --test law -- --nocapture
