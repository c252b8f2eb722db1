#!/usr/bin/env bash
# Builds kwok, which plays nodes and pods at the API server, into .cache/bin. Does nothing while the sources are those of
# the last build.
set -euo pipefail
# shellcheck source=tests/cluster/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

KWOK=$CACHE/bin/kwok
mkdir -p "$CACHE/bin"
cd "$ROOT/tests/cluster/kwok"
inputs=$({ go version; sha256sum go.mod go.sum; } | sha256sum | cut -d' ' -f1)
if [ -x "$KWOK" ] && [ "$(cat "$KWOK.inputs" 2> /dev/null)" = "$inputs" ]; then exit 0; fi
say "building kwok (three minutes on two cores when Go's cache is cold)"
CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$KWOK.new" sigs.k8s.io/kwok/cmd/kwok
mv "$KWOK.new" "$KWOK"
echo "$inputs" > "$KWOK.inputs"
say "built $KWOK, $(du -m "$KWOK" | cut -f1) MB"
