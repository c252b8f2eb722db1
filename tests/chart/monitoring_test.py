"""What is scraped, which alerts there are, and the dashboard."""

import re
import subprocess
import tempfile
import unittest
from pathlib import Path

import yaml

from chart import CHART, ROOT, render

ALERTS = yaml.safe_load((CHART / "files/alerts.yaml").read_text())


def alerts(groups):
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def monitoring(kind, **values):
    key = kind[0].lower() + kind[1:]
    return render({"metrics": {key: {"enabled": True, **values}}}).one(kind)


class Monitors(unittest.TestCase):
    def test_both_take_what_a_prometheus_wants(self):
        values = {
            "namespace": "monitoring",
            "labels": {"release": "kube"},
            "annotations": {"a": "b"},
            "interval": "15s",
            "scrapeTimeout": "5s",
            "relabelings": [{"targetLabel": "cluster", "replacement": "x"}],
            "metricRelabelings": [{"action": "labeldrop", "regex": "pod"}],
        }
        for kind, endpoints in [("ServiceMonitor", "endpoints"), ("PodMonitor", "podMetricsEndpoints")]:
            found = monitoring(kind, **values)
            meta, [endpoint] = found["metadata"], found["spec"][endpoints]
            self.assertEqual((meta["namespace"], meta["labels"]["release"]), ("monitoring", "kube"))
            self.assertEqual((endpoint["interval"], endpoint["scrapeTimeout"]), ("15s", "5s"))
            self.assertEqual(endpoint["relabelings"][-1], values["relabelings"][0])
            self.assertEqual(endpoint["metricRelabelings"], values["metricRelabelings"])

    def test_the_operators_is_found_from_any_namespace(self):
        found = monitoring("ServiceMonitor", namespace="monitoring")["spec"]
        self.assertEqual(found["namespaceSelector"], {"matchNames": ["sys"]})
        self.assertTrue(found["endpoints"][0]["honorLabels"])

    def test_the_trainers_in_all_namespaces_or_in_those_that_are_watched(self):
        self.assertEqual(monitoring("PodMonitor")["spec"]["namespaceSelector"], {"any": True})
        objects = render({"metrics": {"podMonitor": {"enabled": True}}, "watchNamespaces": ["a", "b"]})
        self.assertEqual(objects.one("PodMonitor")["spec"]["namespaceSelector"], {"matchNames": ["a", "b"]})

    def test_each_of_64_workers_is_scraped_and_nothing_else_of_a_pod(self):
        [endpoint] = monitoring("PodMonitor")["spec"]["podMetricsEndpoints"]
        self.assertNotIn("port", endpoint, "all ports are candidates")
        keep = endpoint["relabelings"][0]
        self.assertEqual(keep["action"], "keep")
        # As Prometheus does it: values joined by a semicolon, and the expression anchored on both sides.
        labels = {"__meta_kubernetes_pod_container_name": 0, "__meta_kubernetes_pod_container_port_name": 1}
        order = [labels[name] for name in keep["sourceLabels"]]

        def kept(container, port):
            return bool(re.fullmatch(keep["regex"], ";".join([container, port][i] for i in order)))

        workers = ["metrics"] + [f"metrics-{rank}" for rank in range(1, 64)]
        self.assertTrue(all(kept("trainer", port) for port in workers))
        for other in [("istio-proxy", "metrics"), ("trainer", "rendezvous"), ("trainer", "metrics-x"), ("trainer", "")]:
            self.assertFalse(kept(*other))

    def test_containers_and_their_ports_have_the_names_by_which_they_are_kept(self):
        source = "".join(p.read_text() for p in (ROOT / "operator/src").rglob("*.rs"))
        for name in ['"metrics".into()', 'format!("metrics-{rank}")', 'CONTAINER: &str = "trainer"']:
            self.assertIn(name, source)


class Rules(unittest.TestCase):
    def test_they_are_those_of_the_file(self):
        found = alerts(monitoring("PrometheusRule")["spec"]["groups"])
        self.assertEqual(set(found), set(alerts(ALERTS["groups"])))
        for name, rule in alerts(ALERTS["groups"]).items():
            if name != "RLHFOperatorDown":
                self.assertEqual(found[name], rule)

    def test_a_release_misses_its_own_operator_and_no_other(self):
        def down(release="op", **values):
            objects = render({"metrics": {"prometheusRule": {"enabled": True, **values}}}, release=release)
            rule = alerts(objects.one("PrometheusRule")["spec"]["groups"])["RLHFOperatorDown"]
            return rule["expr"], rule["for"]

        self.assertEqual(down(), ('absent(rlhf_operator_leader{namespace="sys",job="op-rlhf-operator"})', "5m"))
        self.assertIn('job="other-rlhf-operator"', down(release="other")[0])
        self.assertIn('job="scraped"', down(job="scraped")[0])

    def test_the_job_label_is_that_of_the_service_which_the_monitor_scrapes(self):
        objects = render({"metrics": {k: {"enabled": True} for k in ("serviceMonitor", "prometheusRule")}})
        rule = alerts(objects.one("PrometheusRule")["spec"]["groups"])["RLHFOperatorDown"]
        service = objects.one("Service")["metadata"]
        self.assertIn(f'namespace="{service["namespace"]}",job="{service["name"]}"', rule["expr"])

    def test_what_a_cluster_adds_and_leaves_out(self):
        own = {"name": "own", "rules": [{"alert": "Own", "expr": "vector(1)"}]}
        found = monitoring(
            "PrometheusRule",
            namespace="monitoring",
            labels={"release": "kube"},
            annotations={"a": "b"},
            alertLabels={"team": "ml", "severity": "none"},
            runbookUrl="https://wiki.example/",
            disabled=["RLHFJobStartsSlowly"],
            additionalGroups=[own],
        )
        meta, groups = found["metadata"], found["spec"]["groups"]
        self.assertEqual((meta["namespace"], meta["labels"]["release"], meta["annotations"]["a"]), ("monitoring", "kube", "b"))
        self.assertEqual(groups[-1], own)
        rules = alerts(groups[:-1])
        self.assertNotIn("RLHFJobStartsSlowly", rules)
        for name, rule in rules.items():
            self.assertEqual(rule["labels"]["team"], "ml")
            self.assertIn(rule["labels"]["severity"], ("critical", "warning"), "a severity is its alert's own")
            self.assertEqual(rule["annotations"]["runbook_url"], f"https://wiki.example/{name}")

    def test_prometheus_reads_them_and_misses_the_one_that_is_gone_of_two(self):
        def series(release, values):
            return {"series": f'rlhf_operator_leader{{namespace="sys",job="{release}-rlhf-operator"}}', "values": values}

        def down(at, releases):
            firing = 'ALERTS{alertname="RLHFOperatorDown",alertstate="firing"}'
            labels = [{"labels": f'{{job="{r}-rlhf-operator"}}', "value": 1} for r in releases]
            return {"expr": f"count by (job) ({firing})", "eval_time": at, "exp_samples": labels}

        with tempfile.TemporaryDirectory() as folder:
            for release in ("a", "b", "never"):
                objects = render({"metrics": {"prometheusRule": {"enabled": True}}}, release=release)
                rules = {"groups": objects.one("PrometheusRule")["spec"]["groups"]}
                (Path(folder) / f"{release}.yaml").write_text(yaml.safe_dump(rules))
            test = {
                "interval": "1m",
                "input_series": [series("a", "1x60"), series("b", "1x10 stale")],
                "promql_expr_test": [down("4m", []), down("9m", ["never"]), down("30m", ["b", "never"])],
            }
            tests = {"rule_files": ["a.yaml", "b.yaml", "never.yaml"], "evaluation_interval": "1m", "tests": [test]}
            (Path(folder) / "test.yaml").write_text(yaml.safe_dump(tests))
            command = ["promtool", "test", "rules", "test.yaml"]
            answer = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
            self.assertEqual(answer.returncode, 0, answer.stdout + answer.stderr)

    def test_every_alert_is_told_in_the_readme_and_can_be_left_out(self):
        schema = yaml.safe_load((CHART / "values.schema.json").read_text())
        rule = schema["properties"]["metrics"]["properties"]["prometheusRule"]["properties"]
        self.assertEqual(set(rule["disabled"]["items"]["enum"]), set(alerts(ALERTS["groups"])))
        readme = (CHART / "README.md").read_text()
        for name in alerts(ALERTS["groups"]):
            self.assertIn(f"| `{name}` |", readme)

    def test_they_ask_for_series_that_there_are(self):
        shown = "".join((ROOT / package / "METRICS.md").read_text() for package in ("operator", "trainer-image"))
        for name, rule in alerts(ALERTS["groups"]).items():
            for series in re.findall(r"\brlhf_(?!job\b)\w+", rule["expr"]):
                self.assertIn(f"| `{series}` |", shown, name)

    def test_every_alert_has_cases_in_which_it_fires_and_in_which_it_is_silent(self):
        tests = yaml.safe_load((ROOT / "tests/prometheus/alerts_test.yaml").read_text())["tests"]
        cases = [case for test in tests for case in test.get("alert_rule_test", [])]
        for name in alerts(ALERTS["groups"]):
            fires = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == name}
            self.assertEqual(fires, {True, False}, name)


class Dashboard(unittest.TestCase):
    def test_where_grafanas_sidecar_looks(self):
        on = {"enabled": True, "namespace": "grafana", "labels": {"grafana_dashboard": "yes"}, "annotations": {"folder": "ML"}}
        found = render({"dashboard": on}).one("ConfigMap")
        meta = found["metadata"]
        self.assertEqual((meta["namespace"], meta["labels"]["grafana_dashboard"], meta["annotations"]), ("grafana", "yes", {"folder": "ML"}))
        self.assertEqual(found["data"]["rlhf-job.json"].strip(), (CHART / "files/dashboards/rlhf-job.json").read_text().strip())


if __name__ == "__main__":
    unittest.main()
