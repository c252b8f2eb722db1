#!/usr/bin/env bash
# Kubernetes 1.37 (k8s.io/apiextensions-apiserver v0.37.2): a CRD's CEL rule that looks up a place in a list made by
# `map` is refused as too dear, whatever the bounds.
#
# Guess: with maxItems 16 and maxLength 40 the rule "each stage's ref comes before it", said as `self.map(o,
# o.name).indexOf(...)`, costs some 16 x 16 short comparisons; the estimate is made from the bounds, so it is small.
# Real: the estimate takes the bounds of declared fields only. A list that an expression makes has no known length for
# `indexOf`, so each call is reckoned as if the list were huge: the CRD is refused, "exceeds budget by factor of more
# than 100x", and the advice in the message (add maxItems, maxLength) is followed already. The same rule over literal
# places [0, 1, ... 15], which looks dearer and clumsier, is accepted and works. `in` over the made list is accepted
# too.
#
# Why it matters: pipelines of stages (sft, rm, ppo) need order rules. Libraries that run rules in unit tests do not
# reckon costs, so that such a rule passes every test and the whole CRD is refused at install. Check schemas with the
# API server's own validation, and count by literal places.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$here/crd-check" && go build -buildvcs=false -o "$work/crd-check" .)

check() { # LABEL RULE OBJECT...
    local rule=$2
    printf '%s\n' "$1"
    shift 2
    {
        cat <<YAML
type: object
properties:
  stages:
    type: array
    maxItems: 16
    items:
      type: object
      required: [name]
      properties: {name: {type: string, maxLength: 40}, ref: {type: string, maxLength: 40}}
    x-kubernetes-validations:
    - message: a stage must come after what it refers to
      rule: "$rule"
YAML
        (($# == 0)) || printf -- '---\nspec: %s\n' "$@"
    } | "$work/crd-check" | cut -c1-191
}

places='[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15]'
{
    check "indexOf in a made list:" "self.all(s, !has(s.ref) || self.map(o, o.name).indexOf(s.ref) < self.map(o, o.name).indexOf(s.name))"
    check "in a made list:" "self.all(s, !has(s.ref) || s.ref in self.map(o, o.name))"
    check "literal places:" "$places.all(i, i >= size(self) || !has(self[i].ref) || $places.exists(j, j < i && self[j].name == self[i].ref))" \
        "{stages: [{name: sft}, {name: rm, ref: sft}]}" "{stages: [{name: sft, ref: rm}, {name: rm}]}"
} | tee "$work/seen"

diff - "$work/seen" <<'END' || { echo "the behaviour has changed" >&2; exit 1; }
indexOf in a made list:
schema refused: spec.validation.openAPIV3Schema.properties[spec].properties[stages].x-kubernetes-validations[0].rule: Forbidden: estimated rule cost exceeds budget by factor of more than 100x
in a made list:
schema accepted
literal places:
schema accepted
spec: {stages: [{name: sft}, {name: rm, ref: sft}]} accepted
spec: {stages: [{name: sft, ref: rm}, {name: rm}]} refused: spec.stages: Invalid value: a stage must come after what it refers to
END
