#!/usr/bin/env bash
# Kueue v0.17.0 and JobSet v0.12.0 (their CRDs, by Kubernetes 1.37's validation): a JobSet with nine kinds of
# replicated job is valid, and Kueue has no valid Workload for it.
#
# Guess: Kueue supports JobSet, so a valid JobSet can be queued; limits, if any, are on pods.
# Real: a Workload has at most 8 podSets, in v1beta1 and v1beta2 alike, and Kueue makes one of each replicated job
# (pkg/controller/jobs/jobset in the same module); JobSet's list of replicated jobs has no limit near it. The ninth
# passes JobSet's schema and is refused only in the Workload, an object that the user never wrote.
#
# Why it matters: RLHF is what reaches nine kinds: actor, critic, reference, reward, rollout engines, environments,
# judge, data and a coordinator. A job that runs without a queue cannot be admitted through one. Operators that build
# on Kueue should bound the kinds of pods in one gang at 8, or queue parts apart, and say so at admission.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$here/crd-check" && go build -buildvcs=false -o "$work/crd-check" .)
cd "$work"
printf 'module probe\n\ngo 1.26\n' >go.mod
kueue=$(go mod download -json sigs.k8s.io/kueue@v0.17.0 | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
jobset=$(go mod download -json sigs.k8s.io/jobset@v0.12.0 | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')

jobset_of() { # N
    printf 'apiVersion: jobset.x-k8s.io/v1alpha2\nkind: JobSet\nmetadata: {name: rlhf}\nspec:\n  replicatedJobs:\n'
    for i in $(seq "$1"); do
        echo "  - {name: role-$i, groupName: default, replicas: 1, template: {spec: {template: {spec: {containers: [{name: main, image: trainer}]}}}}}"
    done
}
workload_of() { # N VERSION
    printf 'apiVersion: kueue.x-k8s.io/%s\nkind: Workload\nmetadata: {name: rlhf}\nspec:\n  podSets:\n' "$2"
    for i in $(seq "$1"); do
        echo "  - {name: role-$i, count: 1, template: {spec: {containers: [{name: main, image: trainer}]}}}"
    done
}
verdict() { # DIR FILE VERSION
    "$work/crd-check" -crd "$1/config/components/crd/bases/$2" -version "$3" | tail -1 | grep -oE '(accepted|refused: .*)$'
}

for n in 8 9; do
    echo "JobSet v1alpha2, $n replicated jobs: $(jobset_of "$n" | verdict "$jobset" jobset.x-k8s.io_jobsets.yaml v1alpha2)"
    for version in v1beta1 v1beta2; do
        echo "Workload $version, $n podSets: $(workload_of "$n" "$version" | verdict "$kueue" kueue.x-k8s.io_workloads.yaml "$version")"
    done
done | tee seen

diff - seen <<'END' || { echo "the behaviour has changed" >&2; exit 1; }
JobSet v1alpha2, 8 replicated jobs: accepted
Workload v1beta1, 8 podSets: accepted
Workload v1beta2, 8 podSets: accepted
JobSet v1alpha2, 9 replicated jobs: accepted
Workload v1beta1, 9 podSets: refused: spec.podSets: Too many: 9: must have at most 8 items
Workload v1beta2, 9 podSets: refused: spec.podSets: Too many: 9: must have at most 8 items
END
