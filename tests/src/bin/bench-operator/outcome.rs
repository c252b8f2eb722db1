//! What jobs come to with which nobody meddles: each has succeeded, by one attempt at each stage, for which one Job was made.

use anyhow::bail;
use e2e::audit::Write;
use kube::ResourceExt;
use rlhf_api::job::{Phase, RLHFJob, StagePhase, StageStatus};
use rlhf_api::names;
use std::collections::{HashMap, HashSet};

/// So many faults are printed.
const TOLD: usize = 20;

/// Whether an operator's write made a Job, and was told so.
pub fn made_a_job(write: &Write) -> bool {
    write.is("create", "jobs") && write.is_done()
}

/// How often a Job was made, by its path. Whoever is killed is not told what becomes of what it has asked for: the audit log has
/// that as cut off, done or not. It was done where nothing else made a Job that is there.
fn made(writes: &[Write]) -> HashMap<String, usize> {
    let mut made = HashMap::new();
    let path = |write: &Write| format!("{}/{}", write.namespace(), write.name());
    for write in writes.iter().filter(|write| made_a_job(write)) {
        *made.entry(path(write)).or_default() += 1;
    }
    for write in writes.iter().filter(|write| write.is("create", "jobs") && write.is_cut_off()) {
        made.entry(path(write)).or_insert(1);
    }
    made
}

/// What was lost or doubled of jobs of so many stages, by what status says and by the Jobs that the operator ever made in
/// their namespaces.
pub fn faults(jobs: &[RLHFJob], stages: usize, writes: &[Write]) -> Vec<String> {
    let made = made(writes);
    let mut wanted = HashSet::new();
    let mut faults = Vec::new();
    for job in jobs {
        let slots = job.status.iter().flat_map(|s| s.slots());
        let attempts: Vec<_> = slots.map(|slot| first_attempt(job, slot)).collect();
        let fault = |what: String| format!("{}: {what}", path(job, &job.name_any()));
        faults.extend(of_status(job, stages).into_iter().map(fault));
        for attempt in &attempts {
            match made.get(attempt).copied().unwrap_or(0) {
                1 => {}
                times => faults.push(fault(format!("Job {attempt} was made {times} times"))),
            }
        }
        wanted.extend(attempts);
    }
    faults.extend(made.keys().filter(|name| !wanted.contains(*name)).map(|name| format!("Job {name} is one too many")));
    faults
}

/// Prints the first faults and fails, if there are any.
pub fn refuse(faults: &[String]) -> anyhow::Result<()> {
    let Some(first) = faults.first() else { return Ok(()) };
    println!("\nlost or doubled");
    faults.iter().take(TOLD).for_each(|fault| println!("  {fault}"));
    bail!("{} things were lost or doubled, such as: {first}", faults.len())
}

/// The name of the Job of a stage's first attempt.
pub fn attempt_name(job: &RLHFJob, slot: &StageStatus) -> String {
    names::attempt(&job.name_any(), &job.uid().unwrap_or_default(), &slot.name, 1)
}

fn first_attempt(job: &RLHFJob, slot: &StageStatus) -> String {
    path(job, &attempt_name(job, slot))
}

fn path(job: &RLHFJob, name: &str) -> String {
    format!("{}/{name}", job.namespace().unwrap_or_default())
}

/// What is wrong in a job's status.
fn of_status(job: &RLHFJob, stages: usize) -> Vec<String> {
    let status = job.status.clone().unwrap_or_default();
    let mut faults: Vec<_> = status.slots().filter_map(of_slot).collect();
    if status.phase != Phase::Succeeded {
        faults.push(format!("it is {:?}: {}", status.phase, status.message.clone().unwrap_or_default()));
    }
    if status.slots().count() != stages + 1 {
        faults.push(format!("status has {} stages beside prepare, not {stages}", status.stages.len()));
    }
    if (status.restarts, status.disruptions) != (0, 0) {
        faults.push(format!("{} restarts and {} disruptions in all", status.restarts, status.disruptions));
    }
    if let Some(slot) = status.stages.iter().find(|s| s.output.is_none()) {
        faults.push(format!("{}: no output", slot.name));
    }
    faults
}

fn of_slot(slot: &StageStatus) -> Option<String> {
    let StageStatus { name, phase, attempt, restarts, disruptions, .. } = slot;
    let ends: Vec<_> = slot.attempts.iter().map(|record| (record.number, record.reason.as_str())).collect();
    let is_right = *phase == StagePhase::Succeeded && *attempt == 1 && *disruptions == 0;
    let never_again = restarts.total == 0 && restarts.since_progress == 0 && ends == [(1, "Done")];
    (!is_right || !never_again).then(|| {
        let restarts = restarts.total;
        format!("{name}: {phase:?}, attempt {attempt}, {restarts} restarts, {disruptions} disruptions, ends {ends:?}")
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use e2e::manifest::example;
    use serde_json::{Value, json};

    /// A job of one stage that went well, under a change.
    pub fn job(change: impl Fn(&mut Value)) -> RLHFJob {
        let slot = |name: &str| {
            json!({"name": name, "phase": "Succeeded", "attempt": 1, "restarts": {"total": 0}, "disruptions": 0,
                "output": {"path": "p"},
                "attempts": [{"number": 1, "end": "2026-01-01T00:00:00Z", "reason": "Done"}]})
        };
        let mut job = example().only(&["sft"]).0;
        job["metadata"] = json!({"name": "a", "namespace": "team", "uid": "u"});
        job["status"] = json!({"phase": "Succeeded", "prepare": slot("prepare"), "stages": [slot("sft")]});
        change(&mut job);
        serde_json::from_value(job).unwrap()
    }

    /// What the audit log has of a write that was asked for and answered at these milliseconds.
    pub fn write(user: &str, verb: &str, resource: &str, name: &str, times: [u32; 2]) -> Write {
        answered(201, user, verb, resource, name, times)
    }

    fn answered(code: u16, user: &str, verb: &str, resource: &str, name: &str, [asked, at]: [u32; 2]) -> Write {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let time = |ms: u32| format!("2026-01-01T00:00:{:02}.{:03}Z", ms / 1000, ms % 1000);
        serde_json::from_value(json!({
            "verb": verb, "stage": "ResponseComplete", "user": {"username": user}, "responseStatus": {"code": code},
            "objectRef": {"resource": resource, "subresource": subresource, "namespace": "team", "name": name},
            "requestReceivedTimestamp": time(asked), "stageTimestamp": time(at),
        }))
        .unwrap()
    }

    fn made(stages: &[&str]) -> Vec<Write> {
        answers(&stages.iter().map(|stage| (*stage, 201)).collect::<Vec<_>>())
    }

    /// The creations of stages' Jobs, with the codes of their answers.
    fn answers(stages: &[(&str, u16)]) -> Vec<Write> {
        let name = |stage: &str| names::attempt("a", "u", stage, 1);
        let create = |(stage, code): &(&str, u16)| answered(*code, "operator", "create", "jobs", &name(stage), [0, 1]);
        stages.iter().map(create).collect()
    }

    #[test]
    fn a_job_whose_creator_was_killed_before_the_answer_was_made_once() {
        let good = [job(|_| ())];
        assert!(faults(&good, 1, &answers(&[("prepare", 201), ("sft", 504)])).is_empty());
        assert!(faults(&good, 1, &answers(&[("prepare", 504), ("sft", 504), ("sft", 409)])).is_empty());
        let twice = faults(&good, 1, &answers(&[("prepare", 201), ("sft", 201), ("sft", 504), ("sft", 201)]));
        assert!(twice.len() == 1 && twice[0].contains("was made 2 times"), "{twice:?}");
    }

    #[test]
    fn a_job_that_went_well_has_no_fault_and_each_that_was_lost_or_doubled_is_named() {
        let good = [job(|_| ())];
        assert!(faults(&good, 1, &made(&["prepare", "sft"])).is_empty());
        for (writes, wanted) in [
            (made(&["prepare"]), "was made 0 times"),
            (made(&["prepare", "sft", "sft"]), "was made 2 times"),
            (made(&["prepare", "sft", "other"]), "is one too many"),
        ] {
            let found = faults(&good, 1, &writes);
            assert!(found.len() == 1 && found[0].contains(wanted), "{found:?}");
        }
        assert!(refuse(&[]).is_ok() && refuse(&["x".into()]).is_err());
    }

    #[test]
    fn every_count_of_a_status_is_looked_at() {
        let writes = made(&["prepare", "sft"]);
        for (pointer, value) in [
            ("/status/phase", json!("Running")),
            ("/status/restarts", json!(1)),
            ("/status/stages/0/attempt", json!(2)),
            ("/status/stages/0/restarts", json!({"total": 1})),
            ("/status/prepare/disruptions", json!(1)),
            ("/status/stages/0/attempts", json!([])),
            ("/status/stages/0/output", json!(null)),
            ("/status/stages/0/phase", json!("Running")),
        ] {
            let change = |job: &mut Value| match job.pointer_mut(pointer) {
                Some(place) => *place = value.clone(),
                None => job["status"]["restarts"] = value.clone(),
            };
            let found = faults(&[job(change)], 1, &writes);
            assert!(found.len() == 1 && found[0].starts_with("team/a: "), "{pointer}: {found:?}");
        }
        assert_eq!(faults(&[job(|_| ())], 2, &writes).len(), 1, "a stage is missing");
    }
}
