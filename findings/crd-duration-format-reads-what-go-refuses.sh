#!/usr/bin/env bash
# Kubernetes 1.37 (k8s.io/apiextensions-apiserver v0.37.2): a CRD field with `format: duration` takes texts that no
# controller reads, and reads some as another time.
#
# Guess: the format is Go's, as of every duration in Kubernetes ("1h30m"), and what the API server lets in, a
# controller can parse; ISO 8601 ("P2DT3H") is either refused or understood.
# Real: the API server searches the text for numbers with units and ignores the rest. "1 day", "2 weeks" and "1 h
# banana" pass, and so does "P2DT3H", which rules then see as three hours: the two days are dropped. "1M" is one
# minute. Go's own parser, behind metav1.Duration, refuses all of these.
#
# Why it matters: a job with `timeout: P2DT3H` passes admission and the CRD's own rules (more than 1 h, say), and then
# either the controller cannot decode the object, or one with an ISO parser takes it as 51 hours while the rule saw 3.
# Pin durations with a `pattern` and do not trust the format.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$here/crd-check" && go build -buildvcs=false -o "$work/crd-check" .)

# Each text with the time, in Go's words, that a rule holds against it.
pairs=(1h30m=90m 1M=1m "1 day=24h" "2 weeks=336h" "1 h banana=1h" P1D=24h P2DT3H=51h P2DT3H=3h "1 month=720h")
{
    cat <<'YAML'
type: object
properties: {timeout: {type: string, format: duration}, is: {type: string, format: duration}}
x-kubernetes-validations: [{rule: self.timeout == self.is, message: another time}]
YAML
    for pair in "${pairs[@]}"; do
        printf -- '---\nspec: {timeout: "%s", is: %s}\n' "${pair%=*}" "${pair#*=}"
    done
} | "$work/crd-check" | cut -c1-160 | tee "$work/seen"
cat >"$work/parse.go" <<'GO'
package main

import (
	"fmt"
	"os"
	"time"
)

func main() {
	for _, text := range os.Args[1:] {
		_, err := time.ParseDuration(text)
		fmt.Printf("Go reads %q: %v\n", text, err == nil)
	}
}
GO
go run "$work/parse.go" "${pairs[@]%=*}" | tee -a "$work/seen"

diff - "$work/seen" <<'END' || { echo "the behaviour has changed" >&2; exit 1; }
schema accepted
spec: {timeout: "1h30m", is: 90m} accepted
spec: {timeout: "1M", is: 1m} accepted
spec: {timeout: "1 day", is: 24h} accepted
spec: {timeout: "2 weeks", is: 336h} accepted
spec: {timeout: "1 h banana", is: 1h} accepted
spec: {timeout: "P1D", is: 24h} accepted
spec: {timeout: "P2DT3H", is: 51h} refused: spec: Invalid value: another time
spec: {timeout: "P2DT3H", is: 3h} accepted
spec: {timeout: "1 month", is: 720h} refused: spec.timeout: Invalid value: "1 month": spec.timeout in body must be of type duration: "1 month"
Go reads "1h30m": true
Go reads "1M": false
Go reads "1 day": false
Go reads "2 weeks": false
Go reads "1 h banana": false
Go reads "P1D": false
Go reads "P2DT3H": false
Go reads "P2DT3H": false
Go reads "1 month": false
END
