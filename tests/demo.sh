#!/usr/bin/env bash
# One RLHFJob from nothing to a trained model, as `make demo` runs it: fine-tuning, reward model and PPO on real text.
#
#   tests/demo.sh         builds what is missing, starts a one-node Kubernetes on this machine, installs the operator,
#                         runs the example, shows its progress and compares the model before and after PPO
#   tests/demo.sh down    leaves nothing running
#
#   MODEL              glassllm (the default; examples/sentiment.yaml) or smollm2 (examples/smollm2.yaml)
#   DEMO_KUBECONFIG    use the cluster of this kubeconfig instead. It must be able to pull the images
#                      $IMAGE_PREFIX/operator:$IMAGE_TAG and $IMAGE_PREFIX/trainer:$IMAGE_TAG (docker.io/rlhf and dev by
#                      default), and to make a volume of 20 GiB of the class DEMO_STORAGE_CLASS (the cluster's default)
#                      with DEMO_ACCESS_MODE (ReadWriteMany; ReadWriteOnce does where there is one node)
#   DEMO_TIMEOUT       seconds for the job, 3600 by default
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
here=$root/tests/demo
cache=$root/.cache
work=$cache/demo
namespace=demo
release=rlhf-operator
system=rlhf-system
image_prefix=${IMAGE_PREFIX:-docker.io/rlhf}
image_tag=${IMAGE_TAG:-dev}

say() { printf '\n== %s\n' "$*"; }
die() { printf 'demo: %s\n' "$*" >&2; exit 1; }

# pick_example: the manifest and the job's name for MODEL.
pick_example() {
    case ${MODEL:-glassllm} in
        glassllm) manifest=$root/examples/sentiment.yaml ;;
        smollm2) manifest=$root/examples/smollm2.yaml ;;
        *) die "MODEL is '$MODEL'; it can be glassllm or smollm2" ;;
    esac
    job=$(awk '$1 == "name:" { print $2; exit }' "$manifest")
}

# use_cluster: sets KUBECONFIG, and puts kubectl and helm on PATH.
use_cluster() {
    export PATH=$cache/bin:$PATH
    if [ -n "${DEMO_KUBECONFIG:-}" ]; then
        [ -f "$DEMO_KUBECONFIG" ] || die "DEMO_KUBECONFIG: there is no file $DEMO_KUBECONFIG"
        export KUBECONFIG=$DEMO_KUBECONFIG
    else
        export KUBECONFIG=$cache/cluster/admin.conf
    fi
}

# kubectl and helm come with the local cluster's binary; on a foreign cluster those of the machine do.
need_clients() {
    if ! command -v kubectl > /dev/null || ! command -v helm > /dev/null; then "$root/tests/cluster/kubebox.sh"; fi
    kubectl version > /dev/null 2>&1 || die "the cluster of $KUBECONFIG does not answer: $(kubectl version 2>&1 | tail -n 1)"
}

local_cluster() {
    say "what this machine lacks"
    "$root/tests/cluster/install.sh"
    "$root/tests/cluster/kubebox.sh"
    "$root/trainer-image/libtorch.sh"
    say "building the operator and the trainer"
    # The same set of crates as every other target builds, so that none is compiled twice with other features.
    (cd "$root" && cargo build --release --locked --workspace --bins)
    say "a one-node Kubernetes"
    "$root/tests/cluster/up.sh"
    "$root/tests/cluster/images.sh"
}

foreign_cluster() {
    say "the cluster of $DEMO_KUBECONFIG, with the images $image_prefix/{operator,trainer}:$image_tag"
    need_clients
}

install_operator() {
    local build=()
    say "the operator"
    # The image's tag stays the same when it is built anew; this makes the pod a new one.
    if [ -z "${DEMO_KUBECONFIG:-}" ]; then build=(--set-string "podAnnotations.build=$(sha256sum < "$root/target/release/rlhf-operator" | cut -c 1-16)"); fi
    # Helm refuses a release in the middle of whose last change it was stopped.
    if helm status "$release" --namespace "$system" 2> /dev/null | grep '^STATUS: pending-' > /dev/null; then
        helm uninstall "$release" --namespace "$system" --wait > /dev/null
    fi
    helm upgrade --install "$release" "$root/charts/rlhf-operator" --namespace "$system" --create-namespace \
        --set image.repository="$image_prefix/operator" --set image.tag="$image_tag" \
        --set trainer.image.repository="$image_prefix/trainer" --set trainer.image.tag="$image_tag" "${build[@]}" \
        --wait --timeout 3m > "$work/helm.log" 2>&1 || { cat "$work/helm.log" >&2; die "helm could not install the operator"; }
    kubectl get deployment --namespace "$system"
}

in_files() { kubectl exec --namespace "$namespace" --stdin files -- "$@"; }

# fill_in FILE: the manifest with this script's values in it.
fill_in() {
    local class="storageClassName: ${DEMO_STORAGE_CLASS:-}"
    sed -e "s|\${TRAINER_IMAGE}|$image_prefix/trainer:$image_tag|" -e "s|\${VOLUME_DIR}|$work/volume|" \
        -e "s|\${ACCESS_MODE}|${DEMO_ACCESS_MODE:-ReadWriteMany}|" \
        -e "s|\${STORAGE_CLASS}|${DEMO_STORAGE_CLASS:+$class}|" "$here/$1"
}

# prepare_volume: the claim, and on it the models and data; what an earlier run of the job left there goes.
prepare_volume() {
    say "model and text on a volume"
    kubectl delete rlhfjob "$job" --namespace "$namespace" --ignore-not-found --cascade foreground --timeout 3m
    fill_in volume.yaml | kubectl apply --filename - > /dev/null
    if [ -n "${DEMO_KUBECONFIG:-}" ]; then
        fill_in claim-dynamic.yaml | kubectl apply --filename - > /dev/null
    else
        install -d -o 65532 -g 65532 "$work/volume"
        fill_in claim-local.yaml | kubectl apply --filename - > /dev/null
    fi
    kubectl wait pod files --namespace "$namespace" --for condition=Ready --timeout 5m > /dev/null ||
        die "the pod that fills the volume did not start: $(kubectl get pod files --namespace "$namespace" --output 'jsonpath={.status.containerStatuses[0].state.waiting}{.status.conditions[?(@.type=="PodScheduled")].message}')"
    in_files sh -c "rm -rf /data/jobs/$job-*"
    tar --directory "$cache/assets/volume" --create data "models/${MODEL:-glassllm}" |
        in_files tar --directory /data --extract --no-same-owner --no-same-permissions
}

# explain_failure: what a user needs to see of a job that did not succeed.
explain_failure() {
    kubectl get rlhfjob "$job" --namespace "$namespace" --output \
        'jsonpath={.status.phase}{": "}{.status.message}{"\n"}{range .status.stages[*]}{.name}{": "}{.lastFailure.message}{"\n"}{end}' >&2
    kubectl logs --namespace "$namespace" --selector "rlhf.dev/job=$job" --prefix --tail 30 --max-log-requests 32 >&2 || true
    die "the job $job did not succeed; what its pods last said is above"
}

run_job() {
    say "the job: $manifest"
    kubectl apply --namespace "$namespace" --filename "$manifest"
    python3 "$here/progress.py" "$namespace" "$job" --timeout "${DEMO_TIMEOUT:-3600}" || explain_failure
}

compare() {
    local model
    say "before and after PPO"
    kubectl get rlhfjob "$job" --namespace "$namespace" --output json > "$work/job.json"
    model=$(kubectl get rlhfjob "$job" --namespace "$namespace" --output 'jsonpath={.status.stages[?(@.name=="ppo")].output.path}')
    rm -rf "$work/samples"
    in_files tar --directory "/data/$(dirname "$model")" --create samples | tar --directory "$work" --extract --no-same-owner
    "$cache/venv/bin/python" "$here/judge.py" "$work/samples/eval-before.jsonl" "$work/samples/eval-after.jsonl" --status "$work/job.json"
    printf '\nThe trained model is on the volume in %s' "$model"
    if [ -z "${DEMO_KUBECONFIG:-}" ]; then printf ', here %s' "$work/volume/$model"; fi
    printf '.\nLook around with KUBECONFIG=%s %s/bin/kubectl; stop everything with make demo-down.\n' "$KUBECONFIG" "$cache"
}

up() {
    pick_example
    use_cluster
    mkdir -p "$work"
    if [ -n "${DEMO_KUBECONFIG:-}" ]; then foreign_cluster; else local_cluster; fi
    say "models and text"
    if [ "${MODEL:-glassllm}" = smollm2 ]; then "$root/tests/assets/fetch.sh" smollm2; else "$root/tests/assets/fetch.sh"; fi
    install_operator
    prepare_volume
    run_job
    compare
}

# down: the local cluster goes with all that is in it; from a foreign one, what the demo put there.
down() {
    use_cluster
    if [ -z "${DEMO_KUBECONFIG:-}" ]; then exec "$root/tests/cluster/down.sh"; fi
    need_clients
    kubectl delete rlhfjob --all --namespace "$namespace" --ignore-not-found --cascade foreground --timeout 3m || true
    kubectl delete namespace "$namespace" --ignore-not-found --timeout 3m
    helm uninstall "$release" --namespace "$system" --ignore-not-found --wait
    kubectl delete namespace "$system" --ignore-not-found --timeout 3m
}

case ${1-} in
    '') up ;;
    down) down ;;
    *) die "unknown argument '$1': give nothing, or 'down'" ;;
esac
