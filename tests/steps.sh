# shellcheck shell=bash
# For check.sh and run.sh: their steps, how long each took, and what is done beside them. Sourced in the repository's root.

STEPS=()
# step WHAT: says what comes now.
step() {
    STEPS+=("$SECONDS $1")
    printf '\n== %(%T)T %s\n' -1 "$1"
}

# took: how long the steps so far have taken.
took() {
    local i begun next
    for ((i = 0; i + 1 < ${#STEPS[@]}; i++)); do
        begun=${STEPS[i]%% *} next=${STEPS[i + 1]%% *}
        printf '%5d s  %s\n' $((next - begun)) "${STEPS[i]#* }"
    done
}

declare -A BESIDE=()
# beside FUNCTION: runs it while the script goes on; its output goes to a log.
beside() {
    mkdir -p .cache/logs
    # As a process group of its own, so that it can be ended with all that it has started.
    set -m
    (
        trap - EXIT
        "$1"
    ) > ".cache/logs/$1.log" 2>&1 < /dev/null &
    BESIDE[$1]=$!
    set +m
}

# joined FUNCTION: waits for its end and shows what it said; where it failed, so does the script.
joined() {
    local result=0
    wait "${BESIDE[$1]}" || result=$?
    unset "BESIDE[$1]"
    cat ".cache/logs/$1.log"
    [ "$result" = 0 ] || { printf '%s failed; what it said is above\n' "$1" >&2; exit "$result"; }
}

AT_EXIT=()
# at_exit [COMMAND...]: what the end of the script calls for, in place of what it called for before.
at_exit() { AT_EXIT=("$@"); }

finish() {
    local result=$? name
    trap - EXIT
    for name in "${!BESIDE[@]}"; do
        kill -- "-${BESIDE[$name]}" 2> /dev/null || true
        wait "${BESIDE[$name]}" 2> /dev/null || true
    done
    if [ ${#AT_EXIT[@]} -gt 0 ]; then "${AT_EXIT[@]}"; fi
    exit "$result"
}
trap finish EXIT
