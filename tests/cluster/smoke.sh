#!/usr/bin/env bash
# Checks that the running cluster can do what the project's pods need of it, without the project: two restricted pods of an
# Indexed Job find each other by the DNS of a headless Service and speak, also through a Service's own address; a pod that
# is not restricted is refused; logs, termination messages and the audit log are there.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=tests/cluster/common.sh
source "$HERE/common.sh"

NAMESPACE=smoke
passed=0
failed=0
check() { # WHAT COMMAND...
    if "${@:2}"; then
        passed=$((passed + 1))
        say "ok: $1"
    else
        failed=$((failed + 1))
        say "FAILED: $1"
    fi
}
clear_up() { kubectl delete namespace "$NAMESPACE" --ignore-not-found --wait --timeout 60s > /dev/null; }

# Rank 1 sends its name to rank 0 at ADDRESS; rank 0 answers "hello NAME". Perl is in every Debian.
job() {
    cat <<'E'
apiVersion: v1
kind: Service
metadata: {name: gang, namespace: smoke}
spec: {clusterIP: None, publishNotReadyAddresses: true, selector: {app: gang}, ports: [{port: 7000}]}
---
apiVersion: v1
kind: Service
metadata: {name: rank0, namespace: smoke}
spec: {selector: {app: gang, batch.kubernetes.io/job-completion-index: "0"}, publishNotReadyAddresses: true, ports: [{port: 7000}]}
---
apiVersion: batch/v1
kind: Job
metadata: {name: gang, namespace: smoke}
spec:
  completionMode: Indexed
  completions: 2
  parallelism: 2
  backoffLimit: 0
  template:
    metadata: {labels: {app: gang}}
    spec:
      subdomain: gang
      restartPolicy: Never
      automountServiceAccountToken: false
      securityContext: {runAsNonRoot: true, runAsUser: 65532, runAsGroup: 65532, fsGroup: 65532, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: main
        image: docker.io/rlhf/base:bookworm
        securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
        resources: {requests: {cpu: 50m, memory: 32Mi}, limits: {memory: 64Mi}}
        command: [perl, -MIO::Socket::INET, -e]
        args:
        - |
          $| = 1; open(my $end, ">", "/dev/termination-log") or die;
          sub peer { my ($name) = @_; for (1..100) { my $s = IO::Socket::INET->new("$name:7000"); return $s if $s; select(undef, undef, undef, 0.2) } die "no $name" }
          if ($ENV{JOB_COMPLETION_INDEX} == 0) {
            my $l = IO::Socket::INET->new(LocalPort => 7000, Listen => 5, ReuseAddr => 1) or die "listen: $!";
            for (1..2) { my $c = $l->accept; my $n = <$c>; print "met $n"; print $c "hello $n"; close $c }
          } else {
            for my $name ("gang-0.gang", "rank0") { my $s = peer($name); print $s "rank1\n"; my $answer = <$s>; print "$name says $answer"; die unless $answer eq "hello rank1\n" }
          }
          print $end "done"; close $end;
E
}
met() { [ "$(kubectl -n "$NAMESPACE" logs -l batch.kubernetes.io/job-completion-index=1 --tail -1)" = $'gang-0.gang says hello rank1\nrank0 says hello rank1' ]; }
messages() {
    [ "$(kubectl -n "$NAMESPACE" get pods -l app=gang -o 'jsonpath={.items[*].status.containerStatuses[0].state.terminated.message}')" = "done done" ]
}
refused() {
    local answer
    answer=$(kubectl -n "$NAMESPACE" run loose --image docker.io/rlhf/base:bookworm 2>&1) && return 1
    grep -q 'violates PodSecurity "restricted' <<< "$answer"
}
audited() { grep -q '"verb":"\(create\|patch\)".*"resource":"jobs","namespace":"smoke","name":"gang"' "$STATE/log/audit.log"; }
finished() {
    kubectl -n "$NAMESPACE" wait --for=condition=Complete job/gang --timeout 90s > /dev/null && return 0
    kubectl -n "$NAMESPACE" get pods,events -o wide >&2
    return 1
}

"$HERE/images.sh" base
trap clear_up EXIT
clear_up
kubectl create namespace "$NAMESPACE" > /dev/null
kubectl label namespace "$NAMESPACE" pod-security.kubernetes.io/enforce=restricted > /dev/null
await 30 "the default service account" kubectl -n "$NAMESPACE" get serviceaccount default || die "namespace $NAMESPACE got no service account"
job | kubectl apply -f - > /dev/null
check "an Indexed Job of two restricted pods completes" finished
check "they met by headless DNS name and through a Service's address" met
check "their termination messages are read" messages
check "a pod that is not restricted is refused" refused
check "the audit log has the job" audited
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
