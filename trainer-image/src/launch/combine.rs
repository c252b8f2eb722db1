//! From the ends of a pod's workers to the pod's own: a pure function.
//!
//! The cause is the first worker, by time, that failed by its own fault. A stop that was asked for counts before a peer's
//! loss, and what the launcher stopped itself is never a cause.

use crate::ending;
use crate::error::Error;
use rlhf_api::report::{ExitCode, TerminationMessage};
use rustix::process::{Signal, WaitStatus};

/// The exit code of a pod whose worker was killed by a signal: 128 and SIGKILL's number, as shells have it.
const KILLED: i32 = 137;
/// The reason that goes with it.
const KILLED_REASON: &str = "Killed";

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Code(i32),
    Signal(i32),
}

impl From<WaitStatus> for Ending {
    fn from(status: WaitStatus) -> Self {
        status.terminating_signal().map_or(Self::Code(status.exit_status().unwrap_or_default()), Self::Signal)
    }
}

impl Ending {
    /// The pod's exit code if this is the cause of its end. SIGTERM before the stage runs stops a worker at once.
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => ExitCode::from_code(code).unwrap_or(ExitCode::Bug).code(),
            Self::Signal(signal) if signal == Signal::TERM.as_raw() => ExitCode::Terminated.code(),
            Self::Signal(_) => KILLED,
        }
    }
}

/// A worker that has ended.
pub(super) struct End {
    pub rank: u32,
    pub ending: Ending,
    pub report: Option<TerminationMessage>,
    /// The launcher had stopped it because another worker failed.
    pub stopped: bool,
}

/// The pod's last word, from its workers' ends in the order of time.
pub(super) fn combine(ends: &[End]) -> TerminationMessage {
    match ends.iter().filter(|e| e.ending != Ending::Code(0)).min_by_key(|e| guilt(e)) {
        Some(cause) => with_progress(of_failure(cause), ends),
        None => {
            let first = ends.iter().min_by_key(|e| e.rank);
            let lost = || {
                ending::message(
                    Err(Error::bug("the first worker ended well, but its report is lost")),
                    first.map(|e| e.rank),
                    None,
                )
            };
            first.and_then(|e| e.report.clone()).unwrap_or_else(lost)
        }
    }
}

/// Orders failures by whose fault they are, 0 first: its own, a stop that was asked for, a peer's, the launcher's.
fn guilt(end: &End) -> u8 {
    match ExitCode::from_code(end.ending.code()) {
        _ if end.stopped => 3,
        Some(ExitCode::PeerLost) => 2,
        Some(ExitCode::Terminated) => 1,
        _ => 0,
    }
}

fn of_failure(end: &End) -> TerminationMessage {
    let code = end.ending.code();
    let told = end.report.clone().filter(|r| end.ending == Ending::Code(r.code));
    let reason = ExitCode::from_code(code).map_or(KILLED_REASON, ExitCode::reason);
    let untold = || TerminationMessage {
        code,
        reason: reason.into(),
        message: explain(end),
        rank: None,
        step: None,
        checkpoint: None,
        output: None,
        prepared: None,
    };
    TerminationMessage { rank: Some(end.rank), ..told.unwrap_or_else(untold) }
}

/// What can be said of a worker that left no word.
fn explain(end: &End) -> String {
    let rank = end.rank;
    match end.ending {
        Ending::Code(code) => format!(
            "the worker of rank {rank} ended with exit code {code} and left no report; its log has the last lines"
        ),
        Ending::Signal(signal) if signal == Signal::TERM.as_raw() => {
            format!("the worker of rank {rank} was stopped by SIGTERM before training began")
        }
        Ending::Signal(signal) => {
            format!("the worker of rank {rank} was killed by signal {signal} ({}){}", signal_name(signal), hint(signal))
        }
    }
}

/// What usually lies behind a signal.
fn hint(signal: i32) -> &'static str {
    match Signal::from_named_raw(signal) {
        Some(Signal::KILL) => {
            "; if nobody sent it, the pod reached its memory limit: raise it, or lower batch.microSize"
        }
        Some(Signal::BUS) => {
            "; a mapped file could not be read or memory-backed storage is full: look at the volume and at the size of /dev/shm"
        }
        _ => "; its log has the last lines",
    }
}

pub(super) fn signal_name(signal: i32) -> &'static str {
    match Signal::from_named_raw(signal) {
        Some(Signal::KILL) => "SIGKILL",
        Some(Signal::TERM) => "SIGTERM",
        Some(Signal::BUS) => "SIGBUS",
        Some(Signal::SEGV) => "SIGSEGV",
        Some(Signal::ABORT) => "SIGABRT",
        Some(Signal::ILL) => "SIGILL",
        Some(Signal::FPE) => "SIGFPE",
        _ => "no common one",
    }
}

/// Adds how far the stage got, which a killed worker could not say but its peers could.
fn with_progress(mut message: TerminationMessage, ends: &[End]) -> TerminationMessage {
    let reports = || ends.iter().filter_map(|e| e.report.as_ref());
    message.step = message.step.or_else(|| reports().filter_map(|r| r.step).max());
    message.checkpoint =
        message.checkpoint.take().or_else(|| reports().filter_map(|r| r.checkpoint.clone()).max_by_key(|c| c.step));
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use rlhf_api::report::{Checkpoint, MAX_TERMINATION_BYTES, Output};

    /// A worker's end with the report that goes with it, as workers write it.
    fn told(rank: u32, exit: ExitCode, step: u64) -> End {
        let output =
            (exit == ExitCode::Done).then(|| Output { path: format!("model-{rank}"), metrics: Default::default() });
        let checkpoint = (step > 0).then(|| Checkpoint { step, path: format!("step-{step}") });
        let message = format!("word of {rank}");
        let blamed = output.is_none().then_some(rank);
        let report = TerminationMessage {
            code: exit.code(),
            reason: exit.reason().into(),
            message,
            rank: blamed,
            step: Some(step),
            checkpoint,
            output,
            prepared: None,
        };
        End { rank, ending: Ending::Code(exit.code()), report: Some(report), stopped: false }
    }

    fn untold(rank: u32, ending: Ending) -> End {
        End { rank, ending, report: None, stopped: false }
    }

    fn stopped(end: End) -> End {
        End { stopped: true, ..end }
    }

    #[test]
    fn the_cause_is_the_first_worker_that_failed_by_its_own_fault() {
        use ExitCode::*;
        let kill = |rank| untold(rank, Ending::Signal(9));
        let table = vec![
            ("all done", vec![told(1, Done, 9), told(0, Done, 9)], 0, "Done", None),
            ("one bad input", vec![told(0, BadInput, 0)], 65, "BadInput", Some(0)),
            ("a bug, then its peer", vec![told(1, Bug, 3), told(0, PeerLost, 3)], 70, "Bug", Some(1)),
            ("a peer before the cause", vec![told(0, PeerLost, 3), told(1, Bug, 3)], 70, "Bug", Some(1)),
            ("two causes: the first", vec![told(2, NotFinite, 3), told(0, Storage, 3)], 76, "NotFinite", Some(2)),
            (
                "a stop before a lost peer",
                vec![told(0, PeerLost, 3), told(1, Terminated, 3)],
                143,
                "Terminated",
                Some(1),
            ),
            ("a cause before a stop", vec![told(1, Terminated, 3), told(0, Storage, 3)], 74, "StorageFailed", Some(0)),
            ("peers elsewhere were lost", vec![told(1, PeerLost, 3), told(0, PeerLost, 3)], 75, "PeerLost", Some(1)),
            ("one done, one lost", vec![told(0, Done, 3), told(1, PeerLost, 3)], 75, "PeerLost", Some(1)),
            ("killed", vec![kill(1), told(0, PeerLost, 3)], 137, "Killed", Some(1)),
            (
                "a lost peer, the rest stopped by us",
                vec![told(0, PeerLost, 3), stopped(told(1, Terminated, 3))],
                75,
                "PeerLost",
                Some(0),
            ),
            (
                "bad data, the rest killed by us",
                vec![told(2, BadInput, 0), stopped(kill(0)), stopped(kill(1))],
                65,
                "BadInput",
                Some(2),
            ),
            (
                "stopped before training",
                vec![untold(0, Ending::Signal(15)), told(1, PeerLost, 0)],
                143,
                "Terminated",
                Some(0),
            ),
            ("an unknown exit code", vec![untold(0, Ending::Code(1))], 70, "Bug", Some(0)),
            ("a code without its report", vec![untold(0, Ending::Code(71))], 71, "DeviceOutOfMemory", Some(0)),
        ];
        for (name, ends, code, reason, rank) in table {
            let message = combine(&ends);
            assert_eq!((message.code, message.reason.as_str(), message.rank), (code, reason, rank), "{name}");
            assert_eq!(message.output.is_some(), code == 0, "{name}");
            assert!(!message.message.is_empty() || code == 0, "{name}");
        }
    }

    #[test]
    fn success_is_told_by_the_first_rank_of_the_pod() {
        let done = combine(&[told(5, ExitCode::Done, 9), told(4, ExitCode::Done, 9)]);
        assert_eq!(done.output.unwrap().path, "model-4");
        let lost = combine(&[untold(0, Ending::Code(0))]);
        assert!(lost.code == 70 && lost.message.contains("report is lost"), "{lost:?}");
    }

    #[test]
    fn a_killed_worker_is_named_with_its_signal_and_its_peers_say_how_far_it_got() {
        let message =
            combine(&[untold(3, Ending::Signal(9)), told(0, ExitCode::PeerLost, 8), told(1, ExitCode::PeerLost, 7)]);
        assert!(
            ["rank 3", "signal 9 (SIGKILL)", "memory limit"].iter().all(|part| message.message.contains(part)),
            "{message:?}"
        );
        assert_eq!((message.step, message.checkpoint.map(|c| c.step)), (Some(8), Some(8)));
        let bus = combine(&[untold(0, Ending::Signal(7))]);
        assert!(bus.message.contains("SIGBUS") && bus.message.contains("/dev/shm"), "{bus:?}");
    }

    #[test]
    fn a_report_that_does_not_fit_the_exit_code_is_not_believed() {
        let crashed_after = End { ending: Ending::Signal(6), ..told(0, ExitCode::Done, 9) };
        let message = combine(&[crashed_after]);
        assert!(message.code == 137 && message.output.is_none() && message.message.contains("SIGABRT"), "{message:?}");
        assert_eq!(message.step, Some(9));
    }

    #[test]
    fn the_combined_word_fits_what_kubernetes_keeps() {
        let mut end = told(0, ExitCode::BadInput, 1);
        end.report.as_mut().unwrap().message = "line ".repeat(5000);
        let message = combine(&[end]);
        assert!(message.to_bounded_json().len() <= MAX_TERMINATION_BYTES);
    }
}
