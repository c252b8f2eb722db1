"""Argo CD's word on an RLHFJob, by a Lua interpreter as Argo CD has one."""

import json
import subprocess
import unittest

from chart import CHART

SCRIPT = (CHART / "files/argocd-health.lua").read_text()


def lua(value):
    """A value as Lua writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"[{json.dumps(k)}] = {lua(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "{" + ", ".join(map(lua, value)) + "}"
    return json.dumps(value)


def health(status=None, generation=2):
    obj = {"metadata": {"generation": generation}, **({} if status is None else {"status": status})}
    script = f"local obj = {lua(obj)}\nlocal h = (function()\n{SCRIPT}\nend)()\nprint(h.status)\nprint(h.message)"
    answer = subprocess.run(["lua5.4", "-"], input=script, check=False, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return tuple(answer.stdout.split("\n")[:2])


def status(message="m", observed=2, **conditions):
    conditions = [{"type": kind, "status": held, "message": f"{kind} it is"} for kind, held in conditions.items()]
    return {"observedGeneration": observed, "message": message, "conditions": conditions}


class Health(unittest.TestCase):
    def test_each_status_has_the_health_that_people_expect(self):
        for wanted, given in [
            (("Progressing", "The operator has not looked at it yet"), None),
            (("Progressing", "sft runs"), status("sft runs", Reconciling="True", Complete="False", Failed="False")),
            (("Progressing", "no node"), status("no node", Waiting="True", Reconciling="True")),
            # Restarted after a stall: no failure of the job.
            (("Progressing", "m"), status(AttemptStalled="True", Reconciling="True", Stalled="False")),
            (("Healthy", "every stage succeeded"), status("every stage succeeded", Complete="True", Reconciling="False")),
            (("Degraded", "sft: no such file"), status("sft: no such file", Failed="True", Stalled="True")),
            (("Suspended", "m"), status(Suspended="True")),
            (("Degraded", "Unsupported it is"), status(Unsupported="True")),
            (("Progressing", "m"), {"message": "m"}),
            (("Progressing", ""), {}),
            # Resumed a moment ago.
            (("Progressing", "m"), status(observed=1, Suspended="True")),
            (("Healthy", "m"), status(observed=1, Complete="True")),
        ]:
            with self.subTest(given):
                self.assertEqual(health(given), wanted)


if __name__ == "__main__":
    unittest.main()
