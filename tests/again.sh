#!/usr/bin/env bash
# again.sh LOG: runs the tests that failed in LOG, the output of `cargo test`, once more, each alone. Two cores are shared by
# many tests: what failed among them for want of time passes alone, what is wrong fails again, and both are told. Fails where
# one fails again, and where LOG tells of more failures than chance explains, or of none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
MOST=5

# Of which target a test is, stands in the line that cargo writes before the target's tests.
failed=$(awk '/^ +Running unittests / { target = $3 ~ /lib\.rs$/ ? "--lib" : "--bins" }
    /^ +Running tests\// { target = $2; sub(/\/main\.rs$/, "", target); sub(/.*\//, "", target); sub(/\.rs$/, "", target); target = "--test=" target }
    /^ +Doc-tests / { target = "--doc" }
    /^test .* \.\.\. FAILED$/ { print target, $2 }' "$1")
count=$(grep -c . <<< "$failed" || true)
if [ "$count" = 0 ] || grep -qE "process didn't exit successfully: .*\(signal: " "$1"; then
    echo "what failed was more than a test; see above"
    exit 1
fi
if [ "$count" -gt "$MOST" ]; then
    echo "$count tests failed; more than $MOST are not tried again"
    exit 1
fi
result=0
while read -r target name; do
    if cargo test --release --locked --workspace "$target" -- --exact "$name" < /dev/null | tee /dev/stderr |
        grep -xF "test $name ... ok" > /dev/null; then
        echo "failed beside others, passed alone: $name"
    else
        echo "failed beside others and alone: $name"
        result=1
    fi
done <<< "$failed"
exit "$result"
