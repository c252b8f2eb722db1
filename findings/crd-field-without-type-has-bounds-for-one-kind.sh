#!/usr/bin/env bash
# Kubernetes 1.37 (k8s.io/apiextensions-apiserver v0.37.2): "a number, or a number as text" can be said in a CRD only
# by leaving the type out, and then bounds hold for one kind only.
#
# Guess: `anyOf: [{type: number}, {type: string}]` says it, as in any JSON Schema; x-kubernetes-int-or-string is the
# built-in way; and a field without a type is not allowed at all.
# Real: a type inside anyOf is refused ("must be empty to be structural"). int-or-string refuses 0.5. A field with
# x-kubernetes-preserve-unknown-fields may have no type, and may still have minimum, maximum and pattern: the bounds
# are checked for numbers and the pattern for texts, each passing over the other kind and everything else. So 2 is
# refused by `maximum: 1` while "2" passes, and true, a list and an object pass all of them.
#
# Why it matters: learning rates and coefficients come as numbers, as 1e-5, which some YAML readers take for text, and
# as "0.00001" from tools that avoid floats. The typeless field takes both, but the bounds in `kubectl explain` are
# not the ones in force, and a CEL rule of the object does not see the field ("undefined field"). The controller must
# check it again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$here/crd-check" && go build -buildvcs=false -o "$work/crd-check" .)

check() { # FIELD-SCHEMA OBJECT...
    {
        printf 'type: object\nproperties: {lr: %s}\n' "$1"
        shift
        printf -- '---\nspec: {lr: %s}\n' "$@"
    } | "$work/crd-check" | cut -c1-160
}

{
    check '{anyOf: [{type: number}, {type: string}], x-kubernetes-preserve-unknown-fields: true}' 0.5
    check '{x-kubernetes-int-or-string: true}' 1 '"0.5"' 0.5
    check '{x-kubernetes-preserve-unknown-fields: true, minimum: 0, maximum: 1, pattern: "^[0-9.e-]+$"}' 0.5 '"0.5"' 2 '"2"' fast true '[5]' '{a: 5}'
    printf 'type: object\nproperties: {lr: {x-kubernetes-preserve-unknown-fields: true}}\nx-kubernetes-validations: [{rule: self.lr != 2}]\n' | "$work/crd-check" | grep -oE 'schema|refused|undefined field .*' | paste -sd ' '
} | tee "$work/seen"

diff - "$work/seen" <<'END' || { echo "the behaviour has changed" >&2; exit 1; }
schema refused: spec.validation.openAPIV3Schema.properties[spec].properties[lr].anyOf[0].type: Forbidden: must be empty to be structural
schema accepted
spec: {lr: 1} accepted
spec: {lr: "0.5"} accepted
spec: {lr: 0.5} refused: spec.lr: Invalid value: "number": spec.lr in body must be of type integer,string: "number"
schema accepted
spec: {lr: 0.5} accepted
spec: {lr: "0.5"} accepted
spec: {lr: 2} refused: spec.lr: Invalid value: 2: spec.lr in body should be less than or equal to 1
spec: {lr: "2"} accepted
spec: {lr: fast} refused: spec.lr: Invalid value: "fast": spec.lr in body should match '^[0-9.e-]+$'
spec: {lr: true} accepted
spec: {lr: [5]} accepted
spec: {lr: {a: 5}} accepted
schema refused undefined field 'lr'
END
