#!/usr/bin/env bash
# Kubernetes 1.37 (k8s.io/apiextensions-apiserver v0.37.2): `format: int32` is enforced, `format: uint32` is not, so
# the API server stores numbers that a u32 cannot hold.
#
# Guess: the schema that a Rust operator derives from its types (i32 gives int32, u32 gives uint32 with minimum 0)
# lets in exactly what the types hold; or formats are never enforced.
# Real: int32, int64 and float are enforced beyond their JSON type. uint32, uint64 and uint16 are unknown formats,
# dropped without an error, and only `minimum` is left of them: 5000000000 and, for uint16, 70000 are stored.
#
# Why it matters: one such object, valid to the API server, cannot be decoded into the operator's own type: it sees an
# error in place of the object, and a list that holds it fails. Changing a field from i32 to u32 "to forbid negative
# numbers" removes the upper bound. Write `maximum` beside every unsigned field and test it against the server's
# validation.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$here/crd-check" && go build -buildvcs=false -o "$work/crd-check" .)

{
    cat <<'YAML'
type: object
properties:
  a: {type: integer, format: int32}
  b: {type: integer, format: uint32, minimum: 0}
  c: {type: integer, format: uint16, minimum: 0}
  d: {type: number, format: float}
YAML
    printf -- '---\nspec: {%s}\n' 'a: 2147483647' 'a: 2147483648' 'b: 4294967295' 'b: 4294967296' 'b: 5000000000' 'b: -1' 'c: 70000' 'd: 1e39'
} | "$work/crd-check" | cut -c1-150 | tee "$work/seen"

diff - "$work/seen" <<'END' || { echo "the behaviour has changed" >&2; exit 1; }
schema accepted
spec: {a: 2147483647} accepted
spec: {a: 2147483648} refused: <nil>: Invalid value: "": Checked value must be of type integer with format int32 in spec.a
spec: {b: 4294967295} accepted
spec: {b: 4294967296} accepted
spec: {b: 5000000000} accepted
spec: {b: -1} refused: spec.b: Invalid value: -1: spec.b in body should be greater than or equal to 0
spec: {c: 70000} accepted
spec: {d: 1e39} refused: <nil>: Invalid value: "": Checked value must be of type number with format float in spec.d
END
