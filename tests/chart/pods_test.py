"""The operator's pods on other people's clusters, and what the operator is told of trainers'."""

import json
import re
import unittest

from chart import ROOT, Refused, render

DIGEST = "sha256:19b825993dbe80c61eec65de7e7096cd545a09a744d8d00f3dd117185ebb36f9"
OPENSHIFT = "security.openshift.io/v1"


class Images(unittest.TestCase):
    def images(self, values):
        objects = render(values)
        return objects.container["image"], objects.flag("trainer-image")[0]

    def test_both_by_registry_repository_tag_and_digest(self):
        for image, wanted in [
            ({}, "docker.io/rlhf/{}:0.1.0"),
            ({"tag": "1.2"}, "docker.io/rlhf/{}:1.2"),
            ({"digest": DIGEST}, "docker.io/rlhf/{}@" + DIGEST),
            ({"tag": "1.2", "digest": DIGEST}, "docker.io/rlhf/{}:1.2@" + DIGEST),
            ({"registry": "r.example:5000"}, "r.example:5000/rlhf/{}:0.1.0"),
            ({"registry": ""}, "rlhf/{}:0.1.0"),
            ({"repository": "r.example/team/x"}, "r.example/team/x:0.1.0"),
            ({"repository": "localhost/x"}, "localhost/x:0.1.0"),
            ({"registry": "r.example/mirror/", "repository": "x"}, "r.example/mirror/x:0.1.0"),
        ]:
            found = self.images({"image": image, "trainer": {"image": image}})
            self.assertEqual(found, (wanted.format("operator"), wanted.format("trainer")))

    def test_a_parents_registry_is_that_of_both(self):
        found = self.images({"global": {"imageRegistry": "r.example"}, "image": {"registry": "other.example"}})
        self.assertEqual(found, ("r.example/rlhf/operator:0.1.0", "r.example/rlhf/trainer:0.1.0"))

    def test_pull_policies(self):
        objects = render({"image": {"pullPolicy": "Always"}, "trainer": {"image": {"pullPolicy": "Never"}}})
        self.assertEqual(objects.container["imagePullPolicy"], "Always")
        self.assertEqual(objects.flag("trainer-image-pull-policy"), ["Never"])

    def test_pull_secrets_of_each_and_of_both(self):
        objects = render(
            {
                "global": {"imagePullSecrets": ["all", {"name": "both"}]},
                "imagePullSecrets": [{"name": "operator"}, {"name": "both"}],
                "trainer": {"imagePullSecrets": [{"name": "trainer"}, "all"]},
            }
        )
        self.assertEqual([s["name"] for s in objects.pod["imagePullSecrets"]], ["all", "both", "operator"])
        self.assertEqual(objects.flag("trainer-image-pull-secret"), ["all", "both", "trainer"])
        self.assertNotIn("imagePullSecrets", render().pod)
        self.assertEqual(render().flag("trainer-image-pull-secret"), [])

    def test_what_is_no_image_is_refused(self):
        for image in [{"digest": "latest"}, {"tag": "a b"}, {"repository": "x@" + DIGEST}, {"repository": ""}]:
            with self.assertRaisesRegex(Refused, "/image/"):
                render({"image": image})


class Security(unittest.TestCase):
    def test_by_default_the_operator_meets_restricted(self):
        objects = render()
        self.assertEqual(objects.pod["securityContext"]["seccompProfile"], {"type": "RuntimeDefault"})
        self.assertEqual(objects.pod["securityContext"]["runAsUser"], 65532)
        container = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
        self.assertEqual(objects.container["securityContext"], container)
        self.assertNotIn("--omit-user-ids", objects.args)

    def test_on_openshift_no_id_is_fixed_for_the_operator_and_for_trainers(self):
        values = {"podSecurityContext": {"fsGroup": 1000}, "securityContext": {"runAsUser": 5, "runAsGroup": 5}}
        for more, versions in [({}, [OPENSHIFT]), ({"omitUserIds": True}, [])]:
            objects = render({**values, **more}, api_versions=versions)
            for context in (objects.pod["securityContext"], objects.container["securityContext"]):
                self.assertFalse({"runAsUser", "runAsGroup", "fsGroup"} & set(context))
            self.assertTrue(objects.pod["securityContext"]["runAsNonRoot"])
            self.assertIn("--omit-user-ids", objects.args)
        kept = render({"omitUserIds": False}, api_versions=[OPENSHIFT])
        self.assertEqual(kept.pod["securityContext"]["runAsUser"], 65532)
        self.assertNotIn("--omit-user-ids", kept.args)

    def test_switched_off_nothing_is_fixed(self):
        objects = render({"podSecurityContext": None, "securityContext": None})
        self.assertNotIn("securityContext", objects.pod)
        self.assertNotIn("securityContext", objects.container)


class Pod(unittest.TestCase):
    def test_what_clusters_want_of_every_pod(self):
        spread = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
        objects = render(
            {
                "extraArgs": ["--http-port=8080"],
                "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
                "extraVolumes": [{"name": "ca", "configMap": {"name": "ca"}}],
                "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ssl/certs"}],
                "topologySpreadConstraints": [spread, {**spread, "labelSelector": {"matchLabels": {"a": "b"}}}],
                "nodeSelector": {"pool": "system"},
                "tolerations": [{"operator": "Exists"}],
                "affinity": {"nodeAffinity": {}},
                "priorityClassName": "system-cluster-critical",
                "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0}},
            }
        )
        pod, container = objects.pod, objects.container
        self.assertEqual(container["args"][-1], "--http-port=8080")
        self.assertEqual([e["name"] for e in container["env"]], ["RUST_LOG", "MALLOC_ARENA_MAX", "HTTPS_PROXY"])
        self.assertEqual(pod["volumes"][0]["name"], container["volumeMounts"][0]["name"])
        own, given = (c["labelSelector"]["matchLabels"] for c in pod["topologySpreadConstraints"])
        self.assertEqual(own, objects.one("Deployment")["spec"]["selector"]["matchLabels"])
        self.assertEqual(given, {"a": "b"})
        self.assertEqual((pod["nodeSelector"], pod["priorityClassName"]), ({"pool": "system"}, "system-cluster-critical"))
        self.assertEqual(objects.one("Deployment")["spec"]["strategy"]["rollingUpdate"], {"maxUnavailable": 0})

    def test_one_operator_is_replaced_at_once_and_several_one_by_one(self):
        strategy = [render({"replicas": n}).one("Deployment")["spec"]["strategy"]["type"] for n in (1, 2)]
        self.assertEqual(strategy, ["Recreate", "RollingUpdate"])

    def test_probes(self):
        container = render().container
        self.assertEqual(container["livenessProbe"]["httpGet"], {"path": "/healthz", "port": "http"})
        self.assertEqual(container["readinessProbe"]["httpGet"]["path"], "/readyz")
        self.assertNotIn("startupProbe", container)
        values = {"livenessProbe": {"failureThreshold": 9}, "readinessProbe": None, "startupProbe": {"periodSeconds": 1}}
        container = render(values).container
        self.assertEqual(container["livenessProbe"]["failureThreshold"], 9)
        self.assertEqual(container["startupProbe"]["httpGet"]["path"], "/healthz")
        self.assertNotIn("readinessProbe", container)

    def test_passes_end_before_kubernetes_kills(self):
        objects = render({"terminationGracePeriodSeconds": 90})
        self.assertEqual((objects.pod["terminationGracePeriodSeconds"], objects.flag("shutdown-seconds")), (90, ["85"]))
        self.assertEqual(render().flag("shutdown-seconds"), ["25"])

    def test_the_elections_times_and_concurrency(self):
        election = {"leaseDurationSeconds": 60, "renewDeadlineSeconds": 40, "retryPeriodSeconds": 5}
        objects = render({"leaderElection": election, "concurrency": 64})
        flags = ["lease-duration-seconds", "lease-renew-deadline-seconds", "lease-retry-period-seconds", "concurrency"]
        self.assertEqual([objects.flag(f) for f in flags], [["60"], ["40"], ["5"], ["64"]])
        self.assertEqual([render().flag(f) for f in flags], [["15"], ["10"], ["2"], ["24"]])

    def test_a_disruption_budget_by_one_of_two_numbers(self):
        def spec(**values):
            found = render({"podDisruptionBudget": {"enabled": True, **values}}).one("PodDisruptionBudget")["spec"]
            return {k: v for k, v in found.items() if k != "selector"}

        self.assertEqual(spec(), {"maxUnavailable": 1})
        self.assertEqual(spec(maxUnavailable=0), {"maxUnavailable": 0})
        self.assertEqual(spec(minAvailable=1), {"minAvailable": 1})
        self.assertEqual(spec(minAvailable="50%"), {"minAvailable": "50%"})


class Flags(unittest.TestCase):
    def test_the_operator_knows_every_flag(self):
        source = (ROOT / "operator/src/main.rs").read_text()
        fields = source.split("struct Args {")[1].split("\n}\n")[0]
        known = {name.replace("_", "-") for name in re.findall(r"^    (\w+): ", fields, re.MULTILINE)}
        allow = {"serviceAccountName": True, "volumes": True, "ipcLock": True}
        every = {
            "trainer": {"allow": allow, "gangScheduling": True, "imagePullSecrets": [{"name": "a"}]},
            "omitUserIds": True,
            "class": "a",
            "watchNamespaces": ["a"],
        }
        used = {flag.removeprefix("--").split("=")[0] for flag in render(every).args}
        self.assertEqual(used - known, set())
        # What a flag takes from the pod itself.
        self.assertEqual(known - used, {"host"})


class Networks(unittest.TestCase):
    def test_the_network_of_trainers(self):
        def policy(values=None):
            return [json.loads(text) for text in render(values).flag("network-policy")]

        [found] = policy()
        self.assertEqual(found["egress"], "All")
        [operator] = found["operator"]
        self.assertEqual(operator["namespaceSelector"]["matchLabels"], {"kubernetes.io/metadata.name": "sys"})
        self.assertEqual(operator["podSelector"]["matchLabels"]["app.kubernetes.io/instance"], "op")
        [prometheus] = found["prometheus"]
        self.assertEqual(prometheus["podSelector"]["matchLabels"], {"app.kubernetes.io/name": "prometheus"})
        self.assertEqual(found["dnsPorts"], [53, 5353])
        [found] = policy({"trainer": {"networkPolicy": {"dnsPorts": [8053]}}})
        self.assertEqual((found["dnsPorts"], found["egress"]), ([8053], "All"))
        self.assertEqual(policy({"trainer": {"networkPolicy": {"enabled": False}}}), [])
        self.assertEqual(len(policy({"trainer": None})), 1, "it is not lost with the rest")

    def test_the_network_of_the_operator(self):
        spec = render({"networkPolicy": {"enabled": True}}).one("NetworkPolicy")["spec"]
        self.assertEqual(spec["policyTypes"], ["Ingress", "Egress"])
        self.assertEqual(spec["ingress"][0]["ports"], [{"port": "http"}])
        dns, server, trainers = spec["egress"]
        self.assertIn({"port": 5353, "protocol": "UDP"}, dns["ports"])
        self.assertEqual(server, {"ports": [{"port": 443}, {"port": 6443}]})
        self.assertEqual(trainers["ports"], [{"port": 9400, "endPort": 9463}])
        self.assertEqual(trainers["to"][0]["namespaceSelector"], {})
        peer = {"ipBlock": {"cidr": "10.0.0.1/32"}}
        rule = {"to": [peer]}
        values = {"enabled": True, "dnsPorts": [8053], "apiServer": [peer], "prometheus": [], "extraEgress": [rule], "extraIngress": [{"from": [peer]}]}
        spec = render({"networkPolicy": values, "watchNamespaces": ["a", "b"]}).one("NetworkPolicy")["spec"]
        self.assertEqual(spec["ingress"], [{"from": [peer]}])
        self.assertEqual(spec["egress"][0]["ports"], [{"port": 8053, "protocol": p} for p in ("UDP", "TCP")])
        self.assertEqual(spec["egress"][1]["to"], [peer])
        names = [t["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for t in spec["egress"][2]["to"]]
        self.assertEqual((names, spec["egress"][3]), (["a", "b"], rule))
        spec = render({"networkPolicy": {"enabled": True, "egress": "All"}}).one("NetworkPolicy")["spec"]
        self.assertEqual((spec["policyTypes"], "egress" in spec), (["Ingress"], False))


if __name__ == "__main__":
    unittest.main()
