#!/usr/bin/env bash
# What the chart renders, for the values on which something hangs: which rights it asks for, and what it tells the
# operator. Needs .cache/bin/helm.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wrong=0
fail() { printf 'chart: %s\n' "$*" >&2; wrong=1; }
render() { .cache/bin/helm template op charts/rlhf-operator --namespace sys "$@"; }
# kinds VALUES...: the kinds of what is rendered, each once.
kinds() { render "$@" | sed -n 's/^kind: //p' | sort -u | paste -sd ' '; }

# is WHAT EXPECTED FOUND
is() { [ "$2" = "$3" ] || fail "$1: expected '$2', found '$3'"; }
# refused WHAT PART VALUES...: the values are refused, with an error that has PART in it.
refused() {
    local what=$1 part=$2 errors
    shift 2
    if errors=$(render "$@" 2>&1 > /dev/null); then fail "$what is accepted"; fi
    [[ $errors == *"$part"* ]] || fail "$what: expected an error with '$part', found: $errors"
}

# Cases 42 and 47: no webhook and no certificate, which could expire or come too late.
is "the default's kinds" \
    "ClusterRole ClusterRoleBinding CustomResourceDefinition Deployment Lease Role RoleBinding Secret Service ServiceAccount" "$(kinds)"
is "the kinds for one namespace" \
    "CustomResourceDefinition Deployment Lease Role RoleBinding Secret Service ServiceAccount" "$(kinds --set watchNamespace=team)"
scraped=(--set metrics.serviceMonitor.enabled=true --set metrics.podMonitor.enabled=true --set metrics.prometheusRule.enabled=true)
is "the kinds with every switch on" \
    "ClusterRole ClusterRoleBinding ConfigMap CustomResourceDefinition Deployment Lease PodMonitor PrometheusRule Role RoleBinding Secret Service ServiceAccount ServiceMonitor" \
    "$(kinds --set dashboard.enabled=true "${scraped[@]}")"
is "the kinds without definition and roles" "Deployment Lease Secret Service ServiceAccount" "$(kinds --set crds.enabled=false,rbac.create=false,rbac.aggregate=false)"

# rights VALUES...: what the operator may do, as `KIND NAMESPACE: resources verbs`, a rule a line.
rights() {
    render "$@" --show-only templates/rbac.yaml | awk '
        /^kind: / { kind = $2; space = "" }
        /^  namespace: / { space = " " $2 }
        /^    resources: / { sub(/^ *resources: /, ""); resources = $0 }
        /^    verbs: / { sub(/^ *verbs: /, ""); print kind space ": " resources " " $0 }'
}
for values in watchNamespace= watchNamespace=team; do
    found=$(rights --set "$values")
    where="ClusterRole"
    [ "$values" = watchNamespace= ] || where="Role team"
    grep -qxF "$where: [secrets] [create]" <<< "$found" || fail "$values: Secrets of jobs are not made only: $found"
    is "$values: further rights on Secrets" "Role sys: [secrets] [get, patch]" "$(grep -F '[secrets]' <<< "$found" | grep -vxF "$where: [secrets] [create]")"
    if grep -E '\*|escalate|bind|impersonate' <<< "$found"; then fail "$values: more rights than the operator needs"; fi
    is "$values: rights on pods, which the Job controller makes" "$where: [pods] [list, watch, delete]" "$(grep -F '[pods]' <<< "$found")"
done

for values in watchNamespace= watchNamespace=team; do
    gangs=(--set "$values" --set trainer.gangScheduling=true)
    is "$values: rights on PodGroups where there are no gangs" "" "$(rights --set "$values" | grep -F '[podgroups]' || true)"
    where=ClusterRole
    [ "$values" = watchNamespace= ] || where="Role team"
    is "$values: rights on PodGroups" "$where: [podgroups] [get, create, deletecollection]" "$(rights "${gangs[@]}" | grep -F '[podgroups]')"
    is "$values: the flag for gangs" 1 "$(render "${gangs[@]}" | grep -c -- '- --gang-scheduling$')"
done
is "no flag for gangs" 0 "$(render | grep -c -- '- --gang-scheduling$' || true)"

policy() { render "$@" | sed -n "s/^ *- --network-policy=//p"; }
is "the network of trainers" \
    '{"egress":"All","operator":[{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"sys"}},"podSelector":{"matchLabels":{"app.kubernetes.io/instance":"op","app.kubernetes.io/name":"rlhf-operator"}}}],"prometheus":[{"namespaceSelector":{},"podSelector":{"matchLabels":{"app.kubernetes.io/name":"prometheus"}}}]}' \
    "$(policy | sed "s/^'//; s/'$//")"
is "no network policy" "" "$(policy --set trainer.networkPolicy.enabled=false)"
refused "an egress of another name" "/trainer/networkPolicy/egress" --set trainer.networkPolicy.egress=None
refused "a peer that is none" "/trainer/networkPolicy/prometheus/0" --set 'trainer.networkPolicy.prometheus[0].pods=x'
refused "an unknown value" "additional properties" --set trainer.network=x
refused "several namespaces in one" "/watchNamespace" --set 'watchNamespace=a b'

# A PrometheusRule holds the rules as promtool reads them.
mkdir -p target
render --set metrics.prometheusRule.enabled=true,metrics.prometheusRule.labels.release=kube --show-only templates/prometheusrule.yaml > target/rule.yaml
grep -qx '    release: kube' target/rule.yaml || fail "the rule lacks the label by which Prometheus finds it"
sed -n '/^spec:/,$ { /^spec:/d; s/^  //; p }' target/rule.yaml > target/alerts.yaml
diff --unified --ignore-blank-lines charts/rlhf-operator/files/alerts.yaml target/alerts.yaml >&2 || fail "the rules change on their way through the chart"

exit "$wrong"
