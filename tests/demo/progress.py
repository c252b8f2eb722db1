#!/usr/bin/env python3
"""Follows an RLHFJob until it ends, one line for each thing that changes.

    progress.py NAMESPACE NAME [--timeout SECONDS]

Exits 0 when the job has Succeeded, 1 when it has Failed, 2 when the time is over. Uses `kubectl` from PATH.
"""
import argparse
import json
import subprocess
import sys
import time

POLL_SECONDS = 2
# A running stage is told of again when it has come this much further.
STEP_PERCENT = 10
# Figures of a stage, in the order in which they are shown, where it has them.
FIGURES = ("loss", "evalLoss", "evalPerplexity", "accuracy", "evalAccuracy", "reward", "evalReward", "kl", "evalKl",
           "tokensPerSecond", "rolloutTokensPerSecond")


def get_job(namespace, name):
    """The job's status, or None where the API server did not answer this time."""
    command = ["kubectl", "get", "rlhfjob", name, "--namespace", namespace, "--output", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except subprocess.SubprocessError as error:
        print((getattr(error, "stderr", None) or str(error)).strip(), file=sys.stderr)
        return None
    return json.loads(done.stdout).get("status", {})


def figures(metrics):
    """The figures that are there, for people."""
    short = lambda value: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"  # noqa: E731
    return "  ".join(f"{name} {short(metrics[name])}" for name in FIGURES if name in metrics)


def describe(stage):
    """(what is compared to know whether to print, the line) of one stage."""
    progress = stage.get("progress") or {}
    step, total = progress.get("step", 0), progress.get("totalSteps", 0)
    phase, attempt = stage.get("phase", "Pending"), stage.get("attempt", 0)
    key, line = (phase, attempt), f"{stage['name']:10} {phase:10}"
    if attempt > 1:
        line += f" attempt {attempt} "
    if phase == "Running" and total:
        key += (step * 100 // total // STEP_PERCENT,)
        line += f" {step:>4}/{total:<4} {figures(progress.get('metrics', {}))}"
    elif phase == "Succeeded":
        line += f" {figures((stage.get('output') or {}).get('metrics', {}))}"
    elif stage.get("lastFailure") and phase in ("Failed", "Pending"):
        line += f" {stage['lastFailure'].get('message', '')}"
    return key, line.rstrip()


class Teller:
    """Prints a line when what it is about has changed."""

    def __init__(self):
        self.start, self.told = time.monotonic(), {}

    def tell(self, about, key, line):
        if self.told.get(about) != key:
            self.told[about] = key
            print(f"[{time.monotonic() - self.start:4.0f}s] {line}", flush=True)


def follow(namespace, name, timeout):
    """Prints progress until the job ends; the exit code."""
    teller = Teller()
    while time.monotonic() - teller.start < timeout:
        status = get_job(namespace, name)
        if status is not None:
            for stage in filter(None, [status.get("prepare"), *status.get("stages", [])]):
                if stage.get("phase", "Pending") != "Pending" or stage.get("lastFailure"):
                    teller.tell(stage["name"], *describe(stage))
            phase = status.get("phase", "Pending")
            teller.tell("job", phase, f"{'job':10} {phase:10} {status.get('message', '')}".rstrip())
            if phase in ("Succeeded", "Failed"):
                return 0 if phase == "Succeeded" else 1
        time.sleep(POLL_SECONDS)
    print(f"the job has not ended after {timeout} s", file=sys.stderr)
    return 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("namespace")
    parser.add_argument("name")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds")
    args = parser.parse_args()
    sys.exit(follow(args.namespace, args.name, args.timeout))


if __name__ == "__main__":
    main()
