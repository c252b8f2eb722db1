#!/usr/bin/env bash
# Fetches the libtorch that the trainer is built against and runs on, from Python wheels pinned by version and sha256.
#
#   trainer-image/libtorch.sh          headers and a CPU runtime: what building, testing and the CPU image need
#   trainer-image/libtorch.sh --cuda   also the CUDA and NCCL headers, with which the c10d crate builds its NCCL half,
#                                      and a CUDA runtime in a folder of its own, which the CUDA image copies (3.4 GB)
#
# DIR (default .cache/libtorch) gets torch/{include,lib} and nvidia/cu13/{lib,include}; the CUDA runtime goes to DIR-cuda.
# The folders are laid out like site-packages because the libraries look for each other at $ORIGIN/../../nvidia/*/lib.
# What is there already in the pinned version is left alone, without a word.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
DIR=${DIR:-$ROOT/.cache/libtorch}

TORCH='torch==2.11.0 --hash=sha256:7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a'
CUPTI='nvidia-cuda-cupti==13.0.85 --hash=sha256:4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8'
CUDART='nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548'
NCCL='nvidia-nccl-cu13==2.28.9 --hash=sha256:e4553a30f34195f3fa1da02a6da3d6337d28f2003943aa0a3d247bbc25fefc42'

CPU_WHEELS="$TORCH
$CUPTI
$CUDART"

HEADER_WHEELS="$CUDART
$NCCL
nvidia-cuda-crt==13.0.88 --hash=sha256:2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4
nvidia-cuda-cccl==13.0.85 --hash=sha256:e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649"

# What torch 2.11.0 names in its own metadata (cuda-toolkit 13.0.2 and the rest), less what only Python uses.
RUNTIME_WHEELS="$CPU_WHEELS
$NCCL
nvidia-cublas==13.1.0.3 --hash=sha256:ee8722c1f0145ab246bccb9e452153b5e0515fd094c3678df50b2a0888b8b171
nvidia-cuda-nvrtc==13.0.88 --hash=sha256:ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575
nvidia-cudnn-cu13==9.19.0.56 --hash=sha256:d20e1734305e9d68889a96e3f35094d733ff1f83932ebe462753973e53a572bf
nvidia-cufft==12.0.0.61 --hash=sha256:6c44f692dce8fd5ffd3e3df134b6cdb9c2f72d99cf40b62c32dde45eea9ddad3
nvidia-cufile==1.15.1.6 --hash=sha256:08a3ecefae5a01c7f5117351c64f17c7c62efa5fffdbe24fc7d298da19cd0b44
nvidia-curand==10.4.0.35 --hash=sha256:1aee33a5da6e1db083fe2b90082def8915f30f3248d5896bcec36a579d941bfc
nvidia-cusolver==12.0.4.66 --hash=sha256:0a759da5dea5c0ea10fd307de75cdeb59e7ea4fcb8add0924859b944babf1112
nvidia-cusparse==12.6.3.3 --hash=sha256:2b3c89c88d01ee0e477cb7f82ef60a11a4bcd57b6b87c33f789350b59759360b
nvidia-cusparselt-cu13==0.8.0 --hash=sha256:25e30a8a7323935d4ad0340b95a0b69926eee755767e8e0b1cf8dd85b197d3fd
nvidia-nvjitlink==13.0.88 --hash=sha256:13a74f429e23b921c1109976abefacc69835f2f433ebd323d3946e11d804e47b
nvidia-nvshmem-cu13==3.4.5 --hash=sha256:290f0a2ee94c9f3687a02502f3b9299a9f9fe826e6d0287ee18482e78d495b80
nvidia-nvtx==13.0.85 --hash=sha256:4936d1d6780fbe68db454f5e72a42ff64d1fd6397df9f363ae786930fd5c1cd4"

# The platform is said, not guessed, so that every host fetches the files that the hashes are of.
TAGS=(--only-binary=:all: --implementation cp --python-version 3.11 --abi cp311)
for glibc in 2_28 2_27 2_25 2_18 2_17; do TAGS+=(--platform "manylinux_${glibc}_x86_64"); done
TAGS+=(--platform manylinux2014_x86_64)

say() { printf 'libtorch: %s\n' "$*"; }
die() { printf 'libtorch: %s\n' "$*" >&2; exit 1; }

# current STAMP PINS: whether STAMP was left by an earlier run with these very pins.
current() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }

# fetch FOLDER PINS: downloads the wheels into FOLDER and checks their hashes.
fetch() {
    mkdir -p "$1"
    printf '%s\n' "$2" > "$1/requirements.txt"
    python3 -m pip download --quiet --no-deps --require-hashes "${TAGS[@]}" -d "$1" -r "$1/requirements.txt" \
        || die "the wheels could not be fetched; see the message of pip above"
}

# replace NEW OLD: puts NEW in the place of OLD in two renames, so that a reader never meets a half-written folder.
replace() {
    rm -rf "$2.old"
    if [ -e "$2" ]; then mv -T "$2" "$2.old"; fi
    mv -T "$1" "$2"
    rm -rf "$2.old"
}

cpu() {
    local new=$DIR.new wheels=$DIR.new/wheels
    if current "$DIR/.cpu" "$CPU_WHEELS"; then return; fi
    say "fetching torch 2.11.0 (530 MB) and two CUDA wheels that its CPU part links (13 MB)"
    rm -rf "$new"
    fetch "$wheels" "$CPU_WHEELS"
    say "unpacking to $DIR"
    unzip -qo "$wheels"/torch-*.whl 'torch/include/*' torch/lib/libc10.so torch/lib/libtorch_cpu.so torch/lib/libgomp.so.1 -d "$new"
    unzip -qo "$wheels"/nvidia_cuda_cupti-*.whl nvidia/cu13/lib/libcupti.so.13 -d "$new"
    unzip -qo "$wheels"/nvidia_cuda_runtime-*.whl nvidia/cu13/lib/libcudart.so.13 -d "$new"
    strip --strip-unneeded "$new/torch/lib/libtorch_cpu.so"
    # torch-sys links -ltorch. The real one needs libtorch_cuda.so; an empty one does, as the linker drops it again.
    gcc -shared -x c /dev/null -Wl,-soname,libtorch.so -o "$new/torch/lib/libtorch.so"
    echo 2.11.0 > "$new/torch/build-version"
    rm -rf "$wheels"
    printf '%s\n' "$CPU_WHEELS" > "$new/.cpu"
    replace "$new" "$DIR"
}

headers() {
    local wheels=$DIR.wheels w
    if current "$DIR/.cuda-headers" "$HEADER_WHEELS"; then return; fi
    say "fetching the CUDA and NCCL headers (200 MB, nearly all of it NCCL's library)"
    rm -rf "$wheels"
    fetch "$wheels" "$HEADER_WHEELS"
    for w in "$wheels"/*.whl; do unzip -qo "$w" 'nvidia/*/include/*' -d "$DIR"; done
    rm -rf "$wheels"
    printf '%s\n' "$HEADER_WHEELS" > "$DIR/.cuda-headers"
}

runtime() {
    local dir=$DIR-cuda new=$DIR-cuda.new wheels=$DIR-cuda.new/wheels w
    if current "$dir/.cuda" "$RUNTIME_WHEELS"; then return; fi
    say "fetching the CUDA runtime (2.5 GB in 15 wheels)"
    rm -rf "$new"
    fetch "$wheels" "$RUNTIME_WHEELS"
    say "unpacking to $dir"
    unzip -qo "$wheels"/torch-*.whl 'torch/lib/*.so*' -x torch/lib/libtorch_python.so torch/lib/libshm.so -d "$new"
    for w in "$wheels"/nvidia_*.whl; do unzip -qo "$w" 'nvidia/*/lib/*.so*' -d "$new"; done
    strip --strip-unneeded "$new"/torch/lib/libtorch_{cpu,cuda,cuda_linalg}.so
    rm -rf "$wheels"
    printf '%s\n' "$RUNTIME_WHEELS" > "$new/.cuda"
    replace "$new" "$dir"
}

[ "$(uname -sm)" = "Linux x86_64" ] || die "the pinned wheels are for Linux on x86_64, this is $(uname -sm)"
for tool in python3 unzip strip gcc; do command -v "$tool" > /dev/null || die "$tool is missing; tests/cluster/install.sh installs it"; done
python3 -m pip --version > /dev/null 2>&1 || die "python3 has no pip; tests/cluster/install.sh installs it"
case ${1:-} in
    '') cpu ;;
    --cuda) cpu; headers; runtime ;;
    *) die "unknown argument $1; usage: libtorch.sh [--cuda]" ;;
esac
