#!/usr/bin/env bash
# tokenizers 0.23.3: the ids that tokenizer.json gives to added tokens are not the ids that one gets.
#
# Guess: `"added_tokens": [{"id": 10, "content": "<eos>"}, ...]` means that <eos> is 10, and a token that is added
# later gets an id that is free.
# Real: the ids are only right where they go on from the size of the model's vocabulary without a gap and in order.
# Otherwise the tokens are numbered anew, by their order in the file, from the number of entries of the vocabulary,
# and no error or warning reaches Python. And where the vocabulary itself has a gap, `add_tokens` counts entries too:
# the new token gets an id that another token already has, and decoding that id gives only the new one.
#
# Why it matters: vocabularies are padded and tokens are taken out of them, so gaps are real. config.json still says
# eos_token_id 10, the embedding row trained as <eos> is row 10, but the text is encoded with 3: the model never sees
# its own end. A trainer in another language that believes the file disagrees with every user of the library. Compare
# every added token's id with the file after loading; size embeddings by the highest id, not the count.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3

"$work/venv/bin/python" - <<'PY'
import json
from tokenizers import Tokenizer


def tokenizer(vocab, added):
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return Tokenizer.from_str(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        "added_tokens": [dict(id=i, content=text, **flags) for i, text in added],
    }))


def seen(label, got, want):
    print(f"{label}: {got}")
    assert got == want, f"{label}: the behaviour has changed, it was {want}"


words = {"<unk>": 0, "hi": 1, "yo": 2}
text = "hi <eos> <pad>"
seen("file says 3, 4 (no gap)       ", tokenizer(words, [(3, "<eos>"), (4, "<pad>")]).encode(text).ids, [1, 3, 4])
gap = tokenizer(words, [(10, "<eos>"), (12, "<pad>")])
seen("file says 10, 12 (a gap)      ", gap.encode(text).ids, [1, 3, 4])
seen("the same, saved again         ", [t["id"] for t in json.loads(gap.to_str())["added_tokens"]], [3, 4])
seen("file says 4, 3 (out of order) ", tokenizer(words, [(4, "<eos>"), (3, "<pad>")]).encode(text).ids, [1, 3, 4])

holed = tokenizer({"<unk>": 0, "hi": 1, "yo": 3}, [])
seen("vocabulary 0, 1, 3: its size  ", holed.get_vocab_size(), 3)
holed.add_tokens(["<new>"])
seen("ids of yo and of the new token", (holed.token_to_id("yo"), holed.token_to_id("<new>")), (3, 3))
seen("'yo' encoded and decoded      ", holed.decode(holed.encode("yo").ids), "<new>")
PY
