#!/usr/bin/env bash
# The trainer's benches on this machine: each setting beside the one it is compared with, in the same run. Prints every
# bench's figures as JSON and then the ratios. MODEL is a key or a model's folder; by default GPT-2 small.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tests/cluster/install.sh
trainer-image/libtorch.sh
export LD_LIBRARY_PATH=$PWD/.cache/libtorch/torch/lib
cargo build --release --locked --package rlhf-trainer --bin rlhf-trainer
model=${MODEL:-s}
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

# bench NAME ARGUMENT...: runs one and keeps its figures under NAME.
bench() {
    local name=$1
    shift
    printf '%-24s' "$name"
    target/release/rlhf-trainer bench "$@" --model "$model" --json | tail -n 1 | tee "$results/$name"
}

# ratio NAME OTHER FIELD TEXT [OTHER_FIELD]: FIELD of NAME over that, or OTHER_FIELD, of OTHER.
ratio() {
    python3 - "$results/$1" "$results/$2" "$3" "${5:-$3}" "$4" << 'END'
import functools, json, sys
value = lambda path, field: functools.reduce(dict.get, field.split("."), json.load(open(path)))
print(f"{sys.argv[5]}: {value(sys.argv[1], sys.argv[3]) / value(sys.argv[2], sys.argv[4]):.2f}")
END
}

bench fp32 sft --batch 4 --micro 2 --precision fp32
bench bf16 sft --batch 4 --micro 2
bench bf16-recompute sft --batch 4 --micro 2 --recompute block
bench fp32-offload sft --batch 4 --micro 2 --precision fp32 --offload optimizer
bench bf16-offload sft --batch 4 --micro 2 --offload optimizer
# A core is left for the writing, as where training computes on a GPU.
OMP_NUM_THREADS=$(($(nproc) > 1 ? $(nproc) - 1 : 1)) bench bf16-saves sft --batch 1 --micro 1 --rounds 8 --save "$results"
bench ppo-frugal ppo --batch 1 --rounds 1 --offload parameters --recompute block

printf '\n'
ratio bf16 fp32 samples_per_second "samples a second, bf16 over fp32"
ratio bf16-recompute bf16 phase_seconds.train "time of a step, recompute block over none"
ratio fp32-offload fp32 phase_seconds.train "time of a step, offload optimizer over none, fp32"
ratio bf16-offload bf16 phase_seconds.train "time of a step, offload optimizer over none, bf16"
ratio bf16-saves bf16-saves save_stall_seconds "what a save in the background costs training, over the save alone" save_foreground_seconds
python3 -c 'import json, sys; print("peak on the device of PPO with four models:", json.load(open(sys.argv[1]))["peak_device_bytes"] // 10**6, "MB")' \
    "$results/ppo-frugal"
