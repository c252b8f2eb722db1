#!/usr/bin/env python3
"""Runs a real Prometheus beside a running RLHFJob until every expression of the dashboard has returned data.

Figures come and go with the stages that report them, so the check watches a whole job: start it when the job is
applied. It ends with 0 as soon as each expression has returned a finite number at least once, and with 1, naming
those that have not, when the time is up. It needs Debian's `prometheus` and a kubectl on the PATH, and to reach
pods by their addresses.

    dashboard_check.py --kubeconfig admin.conf --namespace default --job sentiment --timeout 1200
"""

import argparse
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
DASHBOARD = HERE.parent.parent / "charts/rlhf-operator/files/dashboards/rlhf-job.json"
POLL_SECONDS = 2
# Grafana makes it at least four scrape intervals, so that a rate has two samples to work with.
RATE_INTERVAL = "8s"
# What the chart's monitors select: pods by label, and their ports by name.
MONITORED = [("app.kubernetes.io/name=rlhf-operator", "http"), ("rlhf.dev/job", r"metrics(-[0-9]+)?")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kubeconfig", help="the cluster's; by default kubectl's own")
    parser.add_argument("--namespace", default="default", help="the RLHFJob's namespace")
    parser.add_argument("--job", required=True, help="the RLHFJob's name")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for the whole check")
    parser.add_argument("--dashboard", type=Path, default=DASHBOARD)
    return parser.parse_args()


def expressions(dashboard, variables):
    """Every expression of the dashboard with its panel's title, variables filled in, each once."""
    found = {}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            found.setdefault(fill_in(target["expr"], variables), panel["title"])
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found.setdefault(fill_in(choices(variable["query"]["query"]), variables), f"variable {variable['name']}")
    return found


def choices(query):
    """What a variable offers, label_values(SERIES, LABEL), as an expression."""
    match = re.fullmatch(r"label_values\((.*), *(\w+)\)", query)
    if not match:
        sys.exit(f"dashboard check: only label_values(series, label) is known, not {query}")
    return f"count by ({match[2]}) ({match[1]})"


def fill_in(expr, variables):
    for name, value in variables.items():
        expr = expr.replace(f"${name}", value)
    if "$" in expr:
        sys.exit(f"dashboard check: an unknown variable in {expr}")
    return expr


def discover(kubeconfig):
    """The endpoints that the chart's monitors would have Prometheus scrape, as file discovery wants them."""
    found = []
    for selector, port_name in MONITORED:
        command = ["kubectl", "get", "pods", "--all-namespaces", "--selector", selector, "--field-selector", "status.phase=Running", "--output", "json"]
        if kubeconfig:
            command += ["--kubeconfig", kubeconfig]
        answer = subprocess.run(command, check=False, stdout=subprocess.PIPE)
        if answer.returncode != 0:
            sys.exit("dashboard check: kubectl could not list the pods")
        found += [endpoint for pod in json.loads(answer.stdout)["items"] for endpoint in endpoints(pod, port_name)]
    return found


def endpoints(pod, port_name):
    for container in pod["spec"]["containers"]:
        for port in container.get("ports", []):
            if pod["status"].get("podIP") and re.fullmatch(port_name, port.get("name", "")):
                yield {
                    "targets": [f"{pod['status']['podIP']}:{port['containerPort']}"],
                    "labels": {
                        "namespace": pod["metadata"]["namespace"],
                        "pod": pod["metadata"]["name"],
                        "container": container["name"],
                        "endpoint": port["name"],
                    },
                }


class Prometheus:
    """A Prometheus on a free port, with its data in a folder that goes with it."""

    def __init__(self):
        self.binary = shutil.which("prometheus") or sys.exit("dashboard check: no prometheus on the PATH: apt-get install prometheus")
        self.folder = tempfile.TemporaryDirectory(prefix="dashboard-check-")
        self.path = Path(self.folder.name)
        self.targets = []

    def __enter__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = "127.0.0.1:%d" % free.getsockname()[1]
        self.url = f"http://{address}/api/v1"
        shutil.copy(HERE / "prometheus.yml", self.path)
        command = [self.binary, f"--config.file={self.path}/prometheus.yml", f"--storage.tsdb.path={self.path}/data", f"--web.listen-address={address}"]
        with (self.path / "log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.folder.cleanup()

    def scrape(self, targets):
        if targets == self.targets:
            return
        for new in [t for t in targets if t not in self.targets]:
            print(f"scrapes {new['labels']['pod']}, port {new['labels']['endpoint']}", flush=True)
        self.targets = targets
        (self.path / "targets.new").write_text(json.dumps(targets))
        (self.path / "targets.new").rename(self.path / "targets.json")

    def query(self, expr):
        """The values that an expression has now; none while the server does not answer yet."""
        if self.process.poll() is not None:
            sys.exit(f"dashboard check: prometheus ended:\n{(self.path / 'log').read_text()}")
        try:
            with urllib.request.urlopen(f"{self.url}/query?{urllib.parse.urlencode({'query': expr})}", timeout=30) as answer:
                return [float(sample["value"][1]) for sample in json.load(answer)["data"]["result"]]
        except urllib.error.HTTPError as error:
            if error.code != 503:
                sys.exit(f"dashboard check: {expr}: {error.read().decode()}")
        except OSError:
            pass
        return []


def check(prometheus, wanted, kubeconfig, timeout):
    """Polls until nothing is wanted any more or the time is up; what is left has not returned data."""
    end = time.monotonic() + timeout
    left = dict(wanted)
    while left and time.monotonic() < end:
        prometheus.scrape(discover(kubeconfig))
        seen = [expr for expr in left if any(map(math.isfinite, prometheus.query(expr)))]
        for expr in seen:
            del left[expr]
        if seen:
            print(f"{len(wanted) - len(left)} of {len(wanted)} expressions have returned data", flush=True)
        if left:
            time.sleep(POLL_SECONDS)
    return left


def main():
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("dashboard check: told to stop"))
    variables = {"__rate_interval": RATE_INTERVAL, "namespace": args.namespace, "job": args.job, "stage": ".*"}
    wanted = expressions(json.loads(args.dashboard.read_text()), variables)
    with Prometheus() as prometheus:
        left = check(prometheus, wanted, args.kubeconfig, args.timeout)
    for expr, panel in left.items():
        print(f"no data: {panel}: {expr}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
