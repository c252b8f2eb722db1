"""Names, labels and selectors: of any release, beside another, and where a tool writes labels of its own."""

import re
import unittest

from chart import everything, render

# What Kubernetes takes for the name of a Service, and of any other object.
SERVICE = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
OBJECT = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?)?")


def chosen(selector, labels):
    return all(labels.get(key) == value for key, value in selector.items())


class Names(unittest.TestCase):
    def test_every_name_that_helm_takes_for_a_release_gives_valid_names_and_labels(self):
        for release in ["op", "rlhf-1.0", "1team", "my.rlhf-operator", "rlhf-operator", "x" * 53, "7" + ".a" * 26]:
            for o in render(everything(), release=release):
                name, kind = o["metadata"]["name"], o["kind"]
                with self.subTest(release=release, kind=kind, name=name):
                    self.assertRegex(name, f"^{(SERVICE if kind in ('Service', 'Deployment') else OBJECT).pattern}$")
                    for label in o["metadata"]["labels"].values():
                        self.assertRegex(label, f"^{LABEL.pattern}$")

    def test_names_can_be_chosen(self):
        def service(release="op", **values):
            return render(values, release=release).one("Service")["metadata"]["name"]

        self.assertEqual(service(), "op-rlhf-operator")
        self.assertEqual(service(release="rlhf-operator"), "rlhf-operator")
        self.assertEqual(service(nameOverride="ml"), "op-ml")
        self.assertEqual(service(fullnameOverride="trainers"), "trainers")

    def test_labels_and_annotations_of_everything(self):
        objects = render({**everything(), "commonLabels": {"team": "ml", "app.kubernetes.io/name": "other"}})
        pod = objects.one("Deployment")["spec"]["template"]
        for meta in [o["metadata"] for o in objects] + [pod["metadata"]]:
            with self.subTest(meta["name"] if "name" in meta else "pod"):
                self.assertEqual(meta["labels"]["team"], "ml")
                self.assertEqual(meta["labels"]["app.kubernetes.io/name"], "rlhf-operator", "its own cannot be taken")
                self.assertEqual(meta["annotations"]["note"], "x")

    def test_a_pods_own_labels_do_not_take_those_by_which_it_is_selected(self):
        values = {"podLabels": {"app.kubernetes.io/instance": "other", "a": "b"}, "podAnnotations": {"c": "d"}}
        deployment = render(values).one("Deployment")
        meta = deployment["spec"]["template"]["metadata"]
        self.assertEqual((meta["labels"]["a"], meta["annotations"]["c"]), ("b", "d"))
        self.assertTrue(chosen(deployment["spec"]["selector"]["matchLabels"], meta["labels"]))

    def test_selectors_hold_where_argo_cd_writes_its_applications_name_over_the_instance(self):
        objects = render(everything())
        for o in objects:
            o["metadata"]["labels"]["app.kubernetes.io/instance"] = "an-application"
        pod = objects.one("Deployment")["spec"]["template"]["metadata"]["labels"]
        service = objects.one("Service")
        policy = objects.one("NetworkPolicy")["spec"]
        self.assertTrue(chosen(objects.one("Deployment")["spec"]["selector"]["matchLabels"], pod))
        self.assertTrue(chosen(service["spec"]["selector"], pod))
        self.assertTrue(chosen(policy["podSelector"]["matchLabels"], pod))
        self.assertTrue(chosen(objects.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"], pod))
        monitor = objects.one("ServiceMonitor")["spec"]
        self.assertTrue(chosen(monitor["selector"]["matchLabels"], service["metadata"]["labels"]))

    def test_two_releases_share_no_object_and_select_nothing_of_each_other(self):
        for one, other in [
            ({"release": "a"}, {"release": "b"}),
            # Of one name, each in its own team's namespace.
            ({"namespace": "team-a"}, {"namespace": "team-b"}),
        ]:
            values = {**everything(), "crds": {"enabled": False}}
            first, second = render(values, **one), render(values, **other)
            self.assertEqual(set(first.names()) & set(second.names()), set())
            if "release" in one:
                pod = second.one("Deployment")["spec"]["template"]["metadata"]["labels"]
                for selector in [
                    first.one("Service")["spec"]["selector"],
                    first.one("Deployment")["spec"]["selector"]["matchLabels"],
                ]:
                    self.assertFalse(chosen(selector, pod))
                service = second.one("Service")["metadata"]["labels"]
                self.assertFalse(chosen(first.one("ServiceMonitor")["spec"]["selector"]["matchLabels"], service))
            condition = [o.all("ValidatingAdmissionPolicy")[0]["spec"]["matchConditions"] for o in (first, second)]
            self.assertNotEqual(*condition)

    def test_a_release_has_a_class_and_a_lease_of_its_own(self):
        canary = render({"class": "canary"}, release="canary")
        self.assertEqual(canary.flag("class"), ["canary"])
        self.assertEqual(canary.flag("lease-name"), [canary.one("Lease")["metadata"]["name"]])
        self.assertEqual(render().flag("class"), [])


if __name__ == "__main__":
    unittest.main()
