"""What the operator may do, what holds it back, and that nothing of the chart expires."""

import unittest

import yaml

from chart import everything, render

OPERATOR = ["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"]


def rules(objects):
    """Every rule with where it holds: "ClusterRole" or "Role NAMESPACE"."""
    for o in objects:
        if o["kind"] in ("ClusterRole", "Role") and not o["metadata"]["name"].endswith(("-viewer", "-editor")):
            where = " ".join([o["kind"], o["metadata"].get("namespace", "")]).strip()
            for rule in o["rules"]:
                yield where, rule


def verbs(objects, resource):
    return {where: rule["verbs"] for where, rule in rules(objects) if resource in rule["resources"]}


class Kinds(unittest.TestCase):
    """Cases 42 and 47: no webhook and no certificate, which could expire or come too late."""

    POLICIES = ["ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"]
    ALWAYS = ["Deployment", "Lease", "Secret", "Service", "ServiceAccount"]

    def test_by_default(self):
        wanted = self.ALWAYS + self.POLICIES + OPERATOR + ["CustomResourceDefinition"]
        self.assertEqual(render({"crds": {"enabled": True}}).kinds(), sorted(wanted))

    def test_with_every_switch_on(self):
        more = ["ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "PrometheusRule", "ServiceMonitor"]
        wanted = self.ALWAYS + self.POLICIES + OPERATOR + ["CustomResourceDefinition"] + more
        self.assertEqual(render(everything()).kinds(), sorted(wanted))

    def test_with_namespaces_nothing_is_the_clusters_but_definition_and_policies(self):
        values = {"watchNamespaces": ["team"]}
        wanted = sorted(self.ALWAYS + self.POLICIES + ["Role", "RoleBinding"])
        self.assertEqual(render(values).kinds(), wanted)
        without = render({**values, "admissionPolicy": {"enabled": False}})
        self.assertTrue(all("namespace" in o["metadata"] for o in without))

    def test_without_definition_roles_and_policies(self):
        off = {"rbac": {"create": False, "aggregate": False}, "admissionPolicy": {"enabled": False}}
        self.assertEqual(render(off).kinds(), self.ALWAYS)

    def test_the_definition_is_kept_only_where_it_is_told(self):
        for keep in (True, False):
            crd = render({"crds": {"enabled": True, "keep": keep}}).one("CustomResourceDefinition")
            policy = crd["metadata"].get("annotations", {}).get("helm.sh/resource-policy")
            self.assertEqual(policy, "keep" if keep else None)
            key = render({"crds": {"enabled": False, "keep": keep}}).one("Secret")
            self.assertEqual(key["metadata"].get("annotations", {}).get("helm.sh/resource-policy"), policy)
            self.assertEqual(crd["metadata"]["name"], "rlhfjobs.rlhf.dev")


class Roles(unittest.TestCase):
    def everywhere(self):
        yield "ClusterRole", render({"trainer": {"gangScheduling": True}})
        yield "Role team", render({"trainer": {"gangScheduling": True}, "watchNamespaces": ["team"]})

    def test_secrets_are_made_and_none_is_read_but_its_own(self):
        for where, objects in self.everywhere():
            self.assertEqual(verbs(objects, "secrets"), {where: ["create"], "Role sys": ["get", "patch"]})
            own = [rule for at, rule in rules(objects) if at == "Role sys" and "secrets" in rule["resources"]]
            self.assertEqual(own[0]["resourceNames"], ["op-rlhf-operator-key"])

    def test_nothing_is_granted_by_a_star_and_no_role_is_given_away(self):
        for _, objects in self.everywhere():
            for _, rule in rules(objects):
                self.assertNotIn("*", rule["apiGroups"] + rule["resources"] + rule["verbs"])
                self.assertFalse({"escalate", "bind", "impersonate"} & set(rule["verbs"]))

    def test_the_job_controller_makes_pods(self):
        for where, objects in self.everywhere():
            self.assertEqual(verbs(objects, "pods"), {where: ["list", "watch", "delete"]})
            self.assertEqual(verbs(objects, "configmaps"), {where: ["get", "create"]})
            self.assertEqual(verbs(objects, "rlhfjobs/status"), {where: ["patch"]})

    def test_pod_groups_only_where_there_are_gangs(self):
        self.assertEqual(verbs(render(), "podgroups"), {})
        for where, objects in self.everywhere():
            self.assertEqual(verbs(objects, "podgroups"), {where: ["get", "create", "deletecollection"]})
            self.assertIn("--gang-scheduling", objects.args)
        self.assertNotIn("--gang-scheduling", render().args)

    def test_of_several_namespaces_each_has_the_same_role(self):
        objects = render({"watchNamespaces": ["a", "b", "a"]})
        self.assertEqual(objects.flag("watch-namespace"), ["a", "b"])
        name = "sys.op-rlhf-operator"
        roles = {o["metadata"]["namespace"]: o["rules"] for o in objects.all("Role") if o["metadata"]["name"] == name}
        self.assertEqual(set(roles), {"a", "b"})
        self.assertEqual(roles["a"], roles["b"])
        bindings = [o for o in objects.all("RoleBinding") if o["metadata"]["name"] == name]
        self.assertEqual({o["metadata"]["namespace"] for o in bindings}, {"a", "b"})
        for binding in bindings:
            self.assertEqual(binding["roleRef"]["name"], name)
            account = {"kind": "ServiceAccount", "name": "op-rlhf-operator", "namespace": "sys"}
            self.assertEqual(binding["subjects"], [account])
        self.assertEqual(verbs(objects, "nodes"), {}, "nodes are the cluster's")

    def test_every_binding_names_a_role_that_is_there(self):
        for _, objects in self.everywhere():
            there = {(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects}
            for o in objects.all("RoleBinding") + objects.all("ClusterRoleBinding"):
                role = o["roleRef"]
                self.assertIn((role["kind"], o["metadata"].get("namespace"), role["name"]), there)

    def test_people_get_their_roles_by_aggregation(self):
        roles = {o["metadata"]["name"]: o for o in render().all("ClusterRole")}
        viewer, editor = roles["sys.op-rlhf-operator-viewer"], roles["sys.op-rlhf-operator-editor"]
        self.assertEqual(viewer["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-view"], "true")
        self.assertEqual(editor["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-admin"], "true")
        self.assertNotIn("rlhfjobs/status", editor["rules"][0]["resources"])

    def test_an_account_of_somebody_elses_is_used_and_not_made(self):
        values = {"serviceAccount": {"create": False, "name": "theirs"}}
        objects = render(values)
        self.assertEqual(objects.all("ServiceAccount"), [])
        self.assertEqual(objects.pod["serviceAccountName"], "theirs")
        names = {s["name"] for o in objects if o["kind"].endswith("RoleBinding") for s in o["subjects"]}
        self.assertEqual(names, {"theirs"})
        for policy in objects.all("ValidatingAdmissionPolicy"):
            self.assertIn(":sys:theirs'", policy["spec"]["matchConditions"][0]["expression"])


class Policies(unittest.TestCase):
    """That they are there and for whom. What they let through, the API server is asked: tests/tests/cluster/account.rs."""

    def test_every_policy_is_bound_and_holds_for_the_operator_alone(self):
        objects = render()
        policies, bindings = (objects.all(f"ValidatingAdmissionPolicy{kind}") for kind in ("", "Binding"))
        self.assertEqual([p["metadata"]["name"] for p in policies], [b["spec"]["policyName"] for b in bindings])
        self.assertTrue(all(b["spec"] == {"policyName": b["spec"]["policyName"], "validationActions": ["Deny"]} for b in bindings))
        operator = "request.userInfo.username == 'system:serviceaccount:sys:op-rlhf-operator'"
        for policy in policies:
            self.assertEqual([c["expression"] for c in policy["spec"]["matchConditions"]], [operator])
            self.assertEqual(policy["spec"]["failurePolicy"], "Fail")
            self.assertTrue(all(v["message"] for v in policy["spec"]["validations"]))

    def test_whatever_the_operator_may_write_a_policy_looks_at(self):
        writes = {"create", "update", "patch", "delete", "deletecollection"}
        # Where the worst is a false word: its own Lease, events, and what a job's status says. Of Secrets, its own.
        harmless = {"leases", "events", "rlhfjobs/status", "rlhfjobs/finalizers"}
        objects = render({"trainer": {"gangScheduling": True}})
        looked_at = set()
        for policy in objects.all("ValidatingAdmissionPolicy"):
            for rule in policy["spec"]["matchConstraints"]["resourceRules"]:
                looked_at |= set(rule["resources"])
        for _, rule in rules(objects):
            if writes & set(rule["verbs"]):
                self.assertLessEqual(set(rule["resources"]) - harmless, looked_at)

    def test_the_switches_of_the_trainer_open_the_policies_too(self):
        def jobs(**allow):
            objects = render({"trainer": {"allow": allow}})
            found = yaml.safe_dump(objects.one("ValidatingAdmissionPolicy", "sys.op-rlhf-operator.jobs")["spec"], width=10**6)
            return found, objects.args

        found, args = jobs()
        self.assertIn("a in []", found)
        self.assertIn("in ['', 'default']", found.replace("''", "'").replace("['", "['").replace("in [', ", "in ['', "))
        self.assertNotIn("has(v.csi)", found)
        self.assertFalse([a for a in args if a.startswith("--allow")])
        for switch, flag, opened in [
            ("ipcLock", "--allow-ipc-lock", "IPC_LOCK"),
            ("volumes", "--allow-volumes", "has(v.csi)"),
            ("serviceAccountName", "--allow-service-accounts", None),
        ]:
            found, args = jobs(**{switch: True})
            self.assertEqual([a for a in args if a.startswith("--allow")], [flag])
            if opened:
                self.assertIn(opened, found)
            else:
                self.assertNotIn("have no account", found)


if __name__ == "__main__":
    unittest.main()
