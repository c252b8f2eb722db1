#!/usr/bin/env bash
# safetensors 0.8.0, Python, safetensors.numpy: a transposed array is written with its elements in another order,
# without an error.
#
# Guess: `save({"w": w.T})` writes w.T, as safetensors 0.7.0 did, or is refused, since the documentation asks for
# contiguous arrays.
# Real: since 0.8.0 the shape of w.T is written over the memory of w as it lies. The file is well formed, the shape is
# right, the numbers are elsewhere. The same holds for a Fortran-ordered array.
#
# Why it matters: GPT-2's Conv1D keeps weights transposed, LoRA factors and lm_heads get transposed in every
# converter, and numpy's `.T` never copies. A square matrix even keeps its shape, so that no loader can tell. Export
# by numpy only after `np.ascontiguousarray`, and compare a file read back.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" numpy==2.4.6
for version in 0.7.0 0.8.0; do
    "${pip[@]}" --no-deps --target "$work/$version" "safetensors==$version"
done

cat >"$work/probe.py" <<'PY'
import sys
import numpy as np
import safetensors
from safetensors.numpy import load, save

w = np.arange(6, dtype=np.float32).reshape(2, 3)
cases = {"w": w, "w.T": w.T, "fortran": np.asfortranarray(w), "ascontiguousarray(w.T)": np.ascontiguousarray(w.T)}
wrong = []
print("safetensors", safetensors.__version__)
for name, array in cases.items():
    back = load(save({"t": array}))["t"]
    assert back.shape == array.shape
    same = np.array_equal(back, array)
    print(f"  {name:23} wanted {array.tolist()}  got {back.tolist()}  {'same' if same else 'OTHER'}")
    if not same:
        wrong.append(name)
want = [] if safetensors.__version__ == "0.7.0" else ["w.T", "fortran"]
sys.exit(0 if wrong == want else f"the behaviour has changed: wrong are {wrong}, were {want}")
PY
for version in 0.7.0 0.8.0; do
    PYTHONPATH="$work/$version" "$work/venv/bin/python" "$work/probe.py"
done
