"""Renders the chart as `helm template` does, and reads what comes out."""

import functools
import json
import os
import subprocess
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/rlhf-operator"
HELM = os.environ.get("HELM", str(ROOT / ".cache/bin/helm"))
# libyaml's parser is ten times as fast; the definition of RLHFJobs is long.
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Refused(Exception):
    """Helm does not render these values."""


@functools.cache
def _template(values, release, namespace, api_versions, chart):
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(values)
        file.flush()
        command = [HELM, "template", release, chart, "--namespace", namespace, "--values", file.name]
        for version in api_versions:
            command += ["--api-versions", version]
        answer = subprocess.run(command, check=False, capture_output=True, text=True)
    if answer.returncode != 0:
        raise Refused(answer.stderr)
    return answer.stdout


def text(values=None, release="op", namespace="sys", api_versions=(), chart=CHART):
    """What Helm renders of the values; the definition of RLHFJobs only where a test asks for it."""
    values = {"crds": {"enabled": False}, **(values or {})}
    return _template(json.dumps(values), release, namespace, tuple(api_versions), str(chart))


class Objects(list):
    """Rendered objects, found by kind and name."""

    def all(self, kind):
        return [o for o in self if o["kind"] == kind]

    def one(self, kind, name=None):
        found = [o for o in self.all(kind) if name in (None, o["metadata"]["name"])]
        assert len(found) == 1, f"{len(found)} objects {kind} {name or ''}"
        return found[0]

    def names(self):
        return sorted(f"{o['kind']} {o['metadata'].get('namespace', '')}/{o['metadata']['name']}" for o in self)

    def kinds(self):
        return sorted({o["kind"] for o in self})

    @property
    def pod(self):
        return self.one("Deployment")["spec"]["template"]["spec"]

    @property
    def container(self):
        return self.pod["containers"][0]

    @property
    def args(self):
        return self.container["args"]

    def flag(self, name):
        """The values of a flag of the operator's."""
        return [a.split("=", 1)[1] for a in self.args if a.startswith(f"--{name}=")]


def render(values=None, **more):
    return Objects(o for o in yaml.load_all(text(values, **more), Loader) if o)


def defaults():
    return yaml.load((CHART / "values.yaml").read_text(), Loader)


def everything():
    """Values with every switch on."""
    on = {"enabled": True}
    return {
        "commonLabels": {"team": "ml"},
        "commonAnnotations": {"note": "x"},
        "metrics": {"serviceMonitor": on, "podMonitor": on, "prometheusRule": on},
        "dashboard": on,
        "podDisruptionBudget": on,
        "networkPolicy": on,
        "replicas": 2,
        "crds": {"enabled": True},
    }
