"""The values themselves: their schema, what is null, a parent chart, the package, and the README's table."""

import os
import subprocess
import tempfile
import unittest
from pathlib import Path

import yaml

from chart import CHART, HELM, Refused, defaults, everything, render, text
from values_table import in_readme

SCHEMA = yaml.safe_load((CHART / "values.schema.json").read_text())


def maps(values, path=()):
    """The paths of all maps and lists in the values."""
    for key, value in values.items():
        if isinstance(value, (dict, list)):
            yield path + (key,)
        if isinstance(value, dict):
            yield from maps(value, path + (key,))


def at(path, value):
    return {path[0]: at(path[1:], value)} if path else value


def over(base, other):
    """One set of values over another, as Helm merges them."""
    if not (isinstance(base, dict) and isinstance(other, dict)):
        return other
    return {**base, **{key: over(base.get(key), value) for key, value in other.items()}}


class Null(unittest.TestCase):
    def test_any_map_or_list_may_be_null(self):
        for path in maps(defaults()):
            with self.subTest(".".join(path)):
                values = over(everything(), at(path, None))
                self.assertTrue(render(values).one("Deployment"))

    def test_null_does_not_take_away_what_protects(self):
        objects = render({k: None for k in ("trainer", "rbac", "admissionPolicy", "serviceAccount", "crds")})
        whole = render()
        self.assertEqual(objects.names(), render({"crds": {"enabled": True}}).names())
        self.assertEqual(objects.one("ClusterRole", "sys.op-rlhf-operator"), whole.one("ClusterRole", "sys.op-rlhf-operator"))


class Schema(unittest.TestCase):
    def test_it_knows_every_value_and_no_other(self):
        def compare(values, schema, path):
            schema = SCHEMA["definitions"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
            known = schema.get("properties")
            if not isinstance(values, dict) or known is None:
                return
            extra = {"claims", "limits"} if path == "resources" else set()
            if path not in ("updateStrategy", "livenessProbe", "readinessProbe", "startupProbe"):
                self.assertEqual(set(values), set(known) - (extra - set(values)), path)
            for key, value in values.items():
                if key in known:
                    compare(value, known[key], f"{path}.{key}".strip("."))

        compare(defaults(), SCHEMA, "")

    def test_what_is_wrong_is_refused_where_it_stands(self):
        for values, part in [
            ({"trainer": {"network": "x"}}, "additional properties 'network'"),
            ({"watchNamespace": "a"}, "additional properties 'watchNamespace'"),
            ({"trainer": {"networkPolicy": {"egress": "None"}}}, "/trainer/networkPolicy/egress"),
            ({"trainer": {"networkPolicy": {"prometheus": [{"pods": "x"}]}}}, "/trainer/networkPolicy/prometheus/0"),
            ({"trainer": {"networkPolicy": {"dnsPorts": ["dns"]}}}, "/trainer/networkPolicy/dnsPorts/0"),
            ({"networkPolicy": {"dnsPorts": [0]}}, "/networkPolicy/dnsPorts/0"),
            ({"watchNamespaces": ["a b"]}, "/watchNamespaces/0"),
            ({"watchNamespaces": "a"}, "/watchNamespaces"),
            ({"class": "a,b"}, "/class"),
            ({"replicas": -1}, "/replicas"),
            ({"concurrency": 0}, "/concurrency"),
            ({"terminationGracePeriodSeconds": 1}, "/terminationGracePeriodSeconds"),
            ({"metrics": {"podMonitor": {"interval": "often"}}}, "/metrics/podMonitor/interval"),
            ({"metrics": {"prometheusRule": {"disabled": ["RLHFTypo"]}}}, "/metrics/prometheusRule/disabled/0"),
            ({"extraEnv": [{"value": "x"}]}, "/extraEnv/0"),
            ({"podDisruptionBudget": {"minAvailable": "many"}}, "/podDisruptionBudget/minAvailable"),
            ({"enabled": False}, "/enabled"),
            ({"serviceAccount": {"create": False}}, "serviceAccount.name must name an existing account"),
        ]:
            with self.subTest(part), self.assertRaises(Refused) as refused:
                render(values)
            self.assertIn(part, str(refused.exception))


class Packaging(unittest.TestCase):
    def helm(self, *args, folder="."):
        answer = subprocess.run([HELM, *args], cwd=folder, check=False, capture_output=True, text=True)
        self.assertEqual(answer.returncode, 0, answer.stdout + answer.stderr)
        return answer.stdout

    def test_lint_finds_nothing(self):
        self.helm("lint", "--strict", "--quiet", str(CHART))

    def test_the_package_renders_as_the_folder_does(self):
        with tempfile.TemporaryDirectory() as folder:
            self.helm("package", str(CHART), folder=folder)
            [package] = Path(folder).glob("rlhf-operator-*.tgz")
            self.assertEqual(text(everything(), chart=package), text(everything()))

    def test_a_parent_chart_switches_it_and_gives_it_its_globals(self):
        with tempfile.TemporaryDirectory() as folder:
            parent = Path(folder)
            (parent / "charts").mkdir()
            (parent / "charts/rlhf-operator").symlink_to(CHART)
            condition = {"name": "rlhf-operator", "version": "*", "condition": "rlhf-operator.enabled"}
            chart = {"apiVersion": "v2", "name": "platform", "version": "0.0.1", "dependencies": [condition]}
            (parent / "Chart.yaml").write_text(yaml.safe_dump(chart))
            shared = {"imageRegistry": "r.example", "storageClass": "fast"}
            (parent / "values.yaml").write_text(yaml.safe_dump({"global": shared}))

            def rendered(**values):
                return self.helm("template", "p", folder, "--set", ",".join(f"{k}={v}" for k, v in values.items()))

            objects = list(yaml.safe_load_all(rendered(**{"rlhf-operator.enabled": "true"})))
            [deployment] = [o for o in objects if o and o["kind"] == "Deployment"]
            self.assertEqual(deployment["spec"]["template"]["spec"]["containers"][0]["image"], "r.example/rlhf/operator:0.1.0")
            off = rendered(**{"rlhf-operator.enabled": "false"})
            self.assertEqual([o for o in yaml.safe_load_all(off) if o], [])

    def test_the_notes_say_what_runs_and_how_to_see_it(self):
        def notes(*more):
            args = ["install", "op", str(CHART), "--namespace", "sys", "--dry-run=client", *more]
            return self.helm(*args).split("NOTES:")[1]

        plain = notes()
        self.assertIn("RLHFJobs of all namespaces that have no label rlhf.dev/class", plain)
        self.assertIn("services/op-rlhf-operator:http/proxy/readyz", plain)
        self.assertNotIn("admissionPolicy", plain)
        other = notes("--set", "watchNamespaces={a,b},class=canary,admissionPolicy.enabled=false")
        self.assertIn("RLHFJobs of a, b that have the label rlhf.dev/class: canary", other)
        self.assertIn("admissionPolicy.enabled is false", other)


class Readme(unittest.TestCase):
    def test_its_table_is_that_of_the_values(self):
        path = CHART / "README.md"
        wanted = in_readme(path.read_text())
        if "UPDATE_DOCS" in os.environ:
            path.write_text(wanted)
        self.assertEqual(path.read_text(), wanted, "out of date: UPDATE_DOCS=1 tests/chart.sh writes it anew")


if __name__ == "__main__":
    unittest.main()
