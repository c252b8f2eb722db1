//! How soon the operator tells of a change: from the answer to kwok's write of a pod's status to the answer to the operator's
//! write of the job's status, by the API server's audit log.
//!
//! Of an attempt two changes are looked at, each of which the operator has to tell: the last of its pods runs, and the last of
//! them has ended. The write that tells is the job's first that was asked for after the change. One that a pass of the same
//! moment asks for and that was decided before the change was seen counts in its place; such passes have other reasons, such as
//! progress, and are rare.

use crate::outcome::attempt_name;
use anyhow::{Context, ensure};
use e2e::audit::Write;
use jiff::Timestamp;
use kube::ResourceExt;
use rlhf_api::job::{RLHFJob, StageStatus};
use serde::Serialize;
use std::collections::HashMap;

/// As whom kwok writes: it has the administrator's kubeconfig.
const KWOK: &str = "admin";

/// Times in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Times {
    pub count: usize,
    pub p50: f64,
    pub p95: f64,
    pub most: f64,
}

/// How soon changes were told, and what of that the API server took for the write itself.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Latency {
    pub told: Times,
    pub write: Times,
}

impl Times {
    fn of(mut all: Vec<f64>) -> anyhow::Result<Self> {
        all.sort_by(f64::total_cmp);
        let at = |part: f64| all.get((part * all.len().saturating_sub(1) as f64).round() as usize).copied();
        let known = at(0.5).zip(at(0.95)).zip(at(1.0));
        let ((p50, p95), most) = known.context("nothing was measured")?;
        Ok(Self { count: all.len(), p50, p95, most })
    }
}

/// Of these jobs, each of whose stages had one attempt; `writes` are those of everybody in their namespace.
pub fn measure(jobs: &[RLHFJob], writes: &[Write], operator: &str) -> anyhow::Result<Latency> {
    let pods = pods(writes);
    let statuses = statuses(writes, operator);
    let (mut told, mut taken) = (Vec::new(), Vec::new());
    for job in jobs {
        let name = job.name_any();
        let of_job = statuses.get(name.as_str()).map(Vec::as_slice).unwrap_or_default();
        for slot in job.status.iter().flat_map(|s| s.slots()) {
            for change in changes(job, slot, &pods)? {
                let write = of_job.iter().find(|write| write.asked > change);
                let write = write.with_context(|| format!("{name}: no status tells of {} at {change}", slot.name))?;
                told.push(milliseconds(change, write.at));
                taken.push(milliseconds(write.asked, write.at));
            }
        }
    }
    Ok(Latency { told: Times::of(told)?, write: Times::of(taken)? })
}

fn milliseconds(from: Timestamp, to: Timestamp) -> f64 {
    to.duration_since(from).as_secs_f64() * 1000.0
}

/// When the status of each pod was written, by the name of its Job, and its own.
type Pods<'a> = HashMap<&'a str, HashMap<&'a str, Vec<Timestamp>>>;

fn pods(writes: &[Write]) -> Pods<'_> {
    let mut pods = Pods::new();
    let statuses = writes.iter().filter(|w| w.is("patch", "pods/status") || w.is("update", "pods/status"));
    for write in statuses.filter(|w| w.is_by(KWOK) && w.is_done()) {
        // A pod's name ends with its index and with what makes it unique.
        let Some((attempt, _)) = write.name().rsplit_once('-').and_then(|(rest, _)| rest.rsplit_once('-')) else {
            continue;
        };
        pods.entry(attempt).or_default().entry(write.name()).or_default().push(write.at);
    }
    pods
}

/// The operator's writes of statuses by the job's name, in the order in which they were asked for.
fn statuses<'a>(writes: &'a [Write], operator: &str) -> HashMap<&'a str, Vec<&'a Write>> {
    let mut statuses: HashMap<&str, Vec<&Write>> = HashMap::new();
    let written = writes.iter().filter(|w| w.is("patch", "rlhfjobs/status") && w.is_by(operator) && w.is_done());
    written.for_each(|write| statuses.entry(write.name()).or_default().push(write));
    statuses.values_mut().for_each(|all| all.sort_by_key(|write| write.asked));
    statuses
}

/// When the last pod of a stage ran, and when the last had ended.
fn changes(job: &RLHFJob, slot: &StageStatus, pods: &Pods<'_>) -> anyhow::Result<[Timestamp; 2]> {
    let attempt = attempt_name(job, slot);
    let pods = pods.get(attempt.as_str()).with_context(|| format!("kwok has played no pod of {attempt}"))?;
    let odd = pods.iter().find(|(_, written)| written.len() < 2);
    ensure!(odd.is_none(), "kwok has not let this pod run and end: {odd:?}");
    let ran = pods.values().filter_map(|written| written.iter().min()).max();
    let ended = pods.values().filter_map(|written| written.iter().max()).max();
    let (ran, ended) = ran.zip(ended).with_context(|| format!("{attempt} has no pods"))?;
    Ok([*ran, *ended])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::tests::{job, write};
    use rlhf_api::names;

    const OPERATOR: &str = "operator";

    /// Pods of prepare (run at 1 s, ended at 2 s) and of sft (two, of which the last ran at 4 s and ended at 6 s), with what the
    /// operator wrote.
    fn log(told: &[[u32; 2]]) -> Vec<Write> {
        let pod = |stage: &str, index: u32| format!("{}-{index}-x2z4q", names::attempt("a", "u", stage, 1));
        let kwok = |stage, index, at| write(KWOK, "patch", "pods/status", &pod(stage, index), [at - 10, at]);
        let mut log = vec![kwok("prepare", 0, 1000), kwok("prepare", 0, 2000), kwok("sft", 0, 3000)];
        log.extend([kwok("sft", 1, 4000), kwok("sft", 1, 5000), kwok("sft", 0, 6000)]);
        log.push(write("system:kube-scheduler", "patch", "pods/status", &pod("sft", 0), [8000, 8000]));
        log.extend(told.iter().map(|times| write(OPERATOR, "patch", "rlhfjobs/status", "a", *times)));
        log
    }

    #[test]
    fn a_change_is_told_by_the_first_write_that_was_asked_for_after_it() {
        let told = [[1100, 1110], [1990, 2050], [2200, 2220], [4300, 4330], [6400, 6440]];
        let Latency { told, write } = measure(&[job(|_| ())], &log(&told), OPERATOR).unwrap();
        assert_eq!((told.count, told.p50.round(), told.most.round()), (4, 330.0, 440.0));
        assert_eq!((write.count, write.most.round()), (4, 40.0));
    }

    #[test]
    fn a_change_of_which_no_write_tells_is_an_error() {
        assert!(measure(&[job(|_| ())], &log(&[[1100, 1110], [2200, 2220], [4300, 4330]]), OPERATOR).is_err());
        assert!(measure(&[job(|_| ())], &[], OPERATOR).is_err());
    }

    #[test]
    fn parts_of_all_times_are_those_of_their_order() {
        let times = Times::of((0..=100).rev().map(f64::from).collect()).unwrap();
        assert_eq!((times.count, times.p50, times.p95, times.most), (101, 50.0, 95.0, 100.0));
        assert!(Times::of(Vec::new()).is_err());
    }
}
