#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors with the same metadata give files of different bytes.
#
# Guess: saving the same state twice gives the same file. The tensors' order is fixed (by alignment, then by name), so
# the whole header should be.
# Real: with one metadata entry, yes. With two or more, `__metadata__` comes in the order of a randomly seeded hash
# map, anew at every call: three entries give up to six files, all valid and all equal when loaded. Their size is the
# same, their checksum is not.
#
# Why it matters: checkpoints that carry {"format": "pt", "step": ...} cannot be compared, deduplicated or addressed
# by the file's hash, and "the resumed run ends in the same file" fails at random, in 5 of 6 runs. Keep metadata to
# one entry (one JSON text, say), write the header yourself in sorted order, or hash the tensors.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 safetensors==0.8.0

"$work/venv/bin/python" - <<'PY'
import hashlib
import numpy as np
from safetensors.numpy import load, save

state = {"b": np.ones(3, np.float32), "a": np.zeros(2, np.float32)}
entries = {"format": "pt", "step": "7", "run": "first"}


def files(metadata):
    return {save(state, metadata=metadata) for _ in range(200)}


one, three = files({"format": "pt"}), files(entries)
print("one entry,     200 saves:", len(one), "file")
print("three entries, 200 saves:", len(three), "files, sizes", {len(f) for f in three})
for data in sorted(three):
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    print(" ", hashlib.sha256(data).hexdigest()[:12], header[: header.index(b"}") + 1].decode())
    assert all(np.array_equal(load(data)[name], state[name]) for name in state)
assert len(one) == 1, "the behaviour has changed: one entry was always the same file"
assert len(three) > 1, "the behaviour has changed: three entries give one file now"
PY
