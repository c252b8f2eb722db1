#!/usr/bin/env bash
# Builds container images from the shipped Dockerfiles and, when the cluster is up, brings them into its containerd.
#
#   tests/cluster/images.sh [--build] [IMAGE...]     IMAGE: operator, trainer (the default is these two), trainer-cuda, kueue, base, pause
#
# --build only builds. The base of the images is a Debian made here with debootstrap and passed as the Dockerfiles' BASE,
# so no registry is needed. What goes into an image is staged in .cache/images/IMAGE, binaries from target/release stripped;
# an image whose inputs have not changed is neither built nor imported again.
set -euo pipefail
# shellcheck source=tests/cluster/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

IMAGES=$CACHE/images
BASE=docker.io/rlhf/base:bookworm
# Not needed in a container; Debian's own slim image leaves most of the same out.
UNUSED=(usr/share/{doc,info,lintian,locale,man} var/cache/apt var/cache/debconf var/lib/apt/lists var/log)

store() { buildah --root "$IMAGES/store" --runroot "$IMAGES/run" --storage-driver overlay --storage-opt overlay.skip_mount_home=true "$@"; }

reference() {
    case $1 in
        base) echo "$BASE" ;;
        trainer-cuda) echo docker.io/rlhf/trainer:dev-cuda ;;
        *) echo "docker.io/rlhf/$1:dev" ;;
    esac
}

# Each stage_IMAGE FOLDER fills FOLDER, the build's context. make_IMAGE, where there is one, adds what takes long to make
# and follows from the rest; it runs only when the image is built.

stage_pause() {
    gcc -Os -static -o "$1/pause" "$ROOT/tests/cluster/pause.c"
    printf 'FROM scratch\nCOPY pause /pause\nENTRYPOINT ["/pause"]\n' > "$1/Dockerfile"
}

stage_kueue() {
    "$ROOT/tests/cluster/kueue.sh"
    cp -l "$CACHE/bin/kueue" "$1/manager"
    # Its chart names the program so.
    printf 'FROM scratch\nCOPY manager /manager\nUSER 65532:65532\nENTRYPOINT ["/manager"]\n' > "$1/Dockerfile"
}

stage_base() {
    printf 'FROM scratch\n# bookworm less %s\nADD root.tar /\nCMD ["bash"]\n' "${UNUSED[*]}" > "$1/Dockerfile"
}

make_base() {
    local mirror path
    need_root
    # From where this machine gets its own packages. The $(...) is apt-get's.
    # shellcheck disable=SC2016
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' | head -n 1)
    say "making a Debian base image with debootstrap (a minute or two)"
    # shellcheck disable=SC2086 # no mirror, no argument
    debootstrap --variant=minbase bookworm "$1/root" $mirror > "$IMAGES/debootstrap.log" 2>&1 \
        || { tail -n 5 "$IMAGES/debootstrap.log" >&2; die "debootstrap failed; its log is $IMAGES/debootstrap.log"; }
    for path in "${UNUSED[@]}"; do find "$1/root/$path" -mindepth 1 -delete; done
    tar -C "$1/root" --one-file-system -cf "$1/root.tar" .
    rm -rf "$1/root"
}

# binary NAME FOLDER: a built program, stripped, into FOLDER.
binary() {
    [ -x "$ROOT/target/release/$1" ] || die "target/release/$1 is missing; build it first: cargo build --release --bin $1"
    strip -o "$2/$1" "$ROOT/target/release/$1"
}

stage_operator() {
    binary rlhf-operator "$1"
    cp "$ROOT/operator/Dockerfile" "$1/"
}

stage_trainer() {
    local lib
    "$ROOT/trainer-image/libtorch.sh"
    mkdir -p "$1/libtorch/torch/lib" "$1/libtorch/nvidia/cu13/lib"
    for lib in torch/lib/lib{c10,torch_cpu}.so torch/lib/libgomp.so.1 nvidia/cu13/lib/lib{cudart,cupti}.so.13; do
        cp -l "$CACHE/libtorch/$lib" "$1/libtorch/$lib"
    done
    binary rlhf-trainer "$1"
    cp /usr/bin/tini-static "$1/tini"
    cp "$ROOT/trainer-image/Dockerfile" "$1/"
}

stage_trainer-cuda() {
    "$ROOT/trainer-image/libtorch.sh" --cuda
    # The constructor's name stands in the program only when c10d's NCCL half is embedded in it.
    grep -qF 16ProcessGroupNCCLC "$ROOT/target/release/rlhf-trainer" \
        || die "target/release/rlhf-trainer was built without NCCL; the headers are here now: cargo build --release --bin rlhf-trainer"
    mkdir "$1/libtorch"
    cp -rl "$CACHE"/libtorch-cuda/{torch,nvidia} "$1/libtorch/"
    binary rlhf-trainer "$1"
    cp /usr/bin/tini-static "$1/tini"
    cp "$ROOT/trainer-image/Dockerfile" "$1/"
}

# inputs IMAGE: a hash of everything that the image is made of.
inputs() {
    (
        cd "$IMAGES/$1"
        find . -type f -print0 | sort -z | xargs -0 sha256sum
        case $1 in base | pause | kueue) ;; *) store images --quiet --no-trunc "$BASE" ;; esac
    ) | sha256sum | cut -d' ' -f1
}

build() {
    local image=$1 context=$IMAGES/$1 reference hash options=()
    reference=$(reference "$image")
    rm -rf "$context"
    mkdir -p "$context"
    "stage_$image" "$context"
    hash=$(inputs "$image")
    if [ "$(cat "$IMAGES/$image.inputs" 2> /dev/null)" = "$hash" ] && store inspect "$reference" > /dev/null 2>&1; then return; fi
    if declare -F "make_$image" > /dev/null; then "make_$image" "$context"; fi
    case $image in
        operator) options=(--build-arg "BASE=$BASE") ;;
        trainer) options=(--build-arg "BASE=$BASE" --target cpu) ;;
        trainer-cuda) options=(--build-arg "BASE=$BASE" --target cuda) ;;
    esac
    store bud --quiet --layers --pull=never --timestamp 0 "${options[@]}" -t "$reference" "$context" > "$IMAGES/$image.log" 2>&1 \
        || { tail -n 20 "$IMAGES/$image.log" >&2; die "$image could not be built; the log is $IMAGES/$image.log"; }
    store rmi --prune --force > /dev/null
    echo "$hash" > "$IMAGES/$image.inputs"
    say "built $reference, $(store images --format '{{.Size}}' "$reference")"
}

import() {
    local image=$1 reference hash archive=$IMAGES/$1.tar
    reference=$(reference "$image")
    hash=$(cat "$IMAGES/$image.inputs")
    if ctr images list "name==$reference" | grep -qF "inputs=$hash"; then return; fi
    store push --quiet "$reference" "docker-archive:$archive:$reference" > /dev/null
    ctr images import "$archive" > /dev/null
    ctr images label "$reference" "inputs=$hash" > /dev/null
    rm -f "$archive"
    say "imported $reference"
}

only_build=
if [ "${1:-}" = --build ]; then only_build=1; shift; fi
[ $# -gt 0 ] || set -- operator trainer
mkdir -p "$IMAGES"
exec 8> "$IMAGES/lock"
flock 8
for image in "$@"; do
    declare -F "stage_$image" > /dev/null || die "there is no image $image; there are operator, trainer, trainer-cuda, kueue, base and pause"
done
if [ "$*" != pause ]; then build base; fi
for image in "$@"; do
    if [ "$image" != base ]; then build "$image"; fi
done
if [ -n "$only_build" ]; then exit 0; fi
if ! pid_of containerd > /dev/null; then say "the cluster is down: built, not imported"; exit 0; fi
for image in "$@"; do import "$image"; done
