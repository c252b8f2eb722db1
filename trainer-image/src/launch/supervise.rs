//! Running workers to their end: signals in, ends out, and harder and harder words for those that outlive a failed one.

use super::combine::{End, Ending, signal_name};
use crate::error::{Error, Result};
use rlhf_api::report::ExitCode;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitStatus, kill_process};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// What the launcher waits for.
pub(super) enum Event {
    /// A signal asks the pod to stop.
    Asked,
    /// A child ended: a worker, or a process that lost its parent.
    Ended(Pid, Ending),
    /// There is no child left.
    Childless,
}

/// Waits for children, in a thread of its own, until there is none.
pub(super) fn reap(
    events: Sender<Event>,
    wait: impl Fn() -> rustix::io::Result<Option<(Pid, WaitStatus)>> + Send + 'static,
) -> Result<()> {
    let run = move || {
        loop {
            match wait() {
                Ok(Some((pid, status))) => events.send(Event::Ended(pid, status.into())).unwrap_or_default(),
                Ok(None) | Err(Errno::INTR) => {}
                Err(_) => return events.send(Event::Childless).unwrap_or_default(),
            }
        }
    };
    std::thread::Builder::new()
        .name("reaper".into())
        .spawn(run)
        .map(drop)
        .map_err(|e| Error::bug(format!("no thread to wait for workers: {e}")))
}

/// A worker that runs.
struct Worker {
    rank: u32,
    report: PathBuf,
}

/// How hard the launcher has tried to end the workers that are left.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Pressure {
    None,
    Noticing,
    Terminating,
    Killing,
}

/// The workers of this pod. What is left when it goes is killed.
#[derive(Default)]
pub(super) struct Gang(BTreeMap<i32, Worker>);

impl Gang {
    pub fn start(&mut self, rank: u32, command: &mut Command, report: PathBuf) -> Result<()> {
        let child =
            command.spawn().map_err(|e| Error::bug(format!("the worker of rank {rank} cannot be started: {e}")))?;
        self.0.insert(Pid::from_child(&child).as_raw_pid(), Worker { rank, report });
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        // One that has just ended cannot be told any more, and need not be.
        self.0
            .keys()
            .filter_map(|pid| Pid::from_raw(*pid))
            .for_each(|pid| kill_process(pid, signal).unwrap_or_default());
    }
}

impl Drop for Gang {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Waits until every worker has ended; their ends, in the order of time. `told` hears of the rank of each that ends before
/// the last one.
pub(super) fn supervise(
    mut gang: Gang,
    events: &Receiver<Event>,
    grace: Duration,
    mut told: impl FnMut(u32),
) -> Result<Vec<End>> {
    let (mut ends, mut pressure, mut deadline) = (Vec::new(), Pressure::None, None);
    while !gang.0.is_empty() {
        match next(events, deadline) {
            Ok(Event::Asked) => {
                tracing::info!("asked to stop: passing it on to {} workers", gang.0.len());
                gang.signal(Signal::TERM);
            }
            Ok(Event::Ended(pid, ending)) => {
                let Some(worker) = gang.0.remove(&pid.as_raw_pid()) else { continue };
                let end = ended(worker, ending, pressure >= Pressure::Terminating);
                if pressure == Pressure::None && !in_agreement(end.ending) {
                    (pressure, deadline) = (Pressure::Noticing, Some(Instant::now() + grace));
                }
                if !gang.0.is_empty() {
                    told(end.rank);
                }
                ends.push(end);
            }
            Err(RecvTimeoutError::Timeout) => (pressure, deadline) = press(&gang, pressure, grace),
            Ok(Event::Childless) | Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::bug("the system does not tell how the workers ended: is SIGCHLD ignored?"));
            }
        }
    }
    Ok(ends)
}

fn next(events: &Receiver<Event>, deadline: Option<Instant>) -> std::result::Result<Event, RecvTimeoutError> {
    match deadline {
        None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
        Some(deadline) => events.recv_timeout(deadline.saturating_duration_since(Instant::now())),
    }
}

/// Whether all workers end like this together: done, or stopped after a checkpoint that another may still be writing.
fn in_agreement(ending: Ending) -> bool {
    [ExitCode::Done, ExitCode::Terminated].map(ExitCode::code).contains(&ending.code())
}

/// The next harder step for workers that outlive a failed one, and when to take the one after it.
fn press(gang: &Gang, pressure: Pressure, grace: Duration) -> (Pressure, Option<Instant>) {
    let (signal, next, deadline) = match pressure {
        Pressure::None | Pressure::Noticing => (Signal::TERM, Pressure::Terminating, Some(Instant::now() + grace)),
        Pressure::Terminating | Pressure::Killing => (Signal::KILL, Pressure::Killing, None),
    };
    let ranks = gang.0.values().map(|w| w.rank.to_string()).collect::<Vec<_>>().join(", ");
    tracing::warn!("a worker failed and these run on: rank {ranks}; sending {}", signal_name(signal.as_raw()));
    gang.signal(signal);
    (next, deadline)
}

fn ended(worker: Worker, ending: Ending, stopped: bool) -> End {
    let Worker { rank, report } = worker;
    let report = std::fs::read(report).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    tracing::info!(?ending, "the worker of rank {rank} ended");
    End { rank, ending, report, stopped }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rlhf_api::report::TerminationMessage;
    use rustix::process::{WaitOptions, waitpgid};
    use std::os::unix::process::CommandExt;
    use std::sync::mpsc::channel;

    /// Runs one shell script a rank under supervision, in a process group of their own so that tests do not reap each
    /// other's children. `$REPORT` is the rank's report file. `asked` is sent once every script has made `$READY`.
    fn run(scripts: &[&str], asked: bool, grace: Duration) -> Vec<End> {
        let (dir, (sender, events)) = (tempfile::tempdir().unwrap(), channel());
        let (mut gang, mut group) = (Gang::default(), 0);
        let ready = |rank: usize| dir.path().join(format!("{rank}.ready"));
        for (rank, script) in scripts.iter().enumerate() {
            let report = dir.path().join(format!("{rank}.json"));
            let mut command = Command::new("bash");
            command.args(["-c", script]).env("REPORT", &report).env("READY", ready(rank)).process_group(group);
            gang.start(rank as u32, &mut command, report).unwrap();
            group = if rank == 0 { *gang.0.keys().next().unwrap() } else { group };
        }
        let group = Pid::from_raw(group).unwrap();
        reap(sender.clone(), move || waitpgid(group, WaitOptions::empty())).unwrap();
        if asked {
            let waiting = || (0..scripts.len()).any(|rank| !ready(rank).exists());
            (0..3000).take_while(|_| waiting()).for_each(|_| std::thread::sleep(Duration::from_millis(10)));
            sender.send(Event::Asked).unwrap();
        }
        supervise(gang, &events, grace, |_| ()).unwrap()
    }

    /// The ends in the order of time.
    fn told(ends: &[End]) -> Vec<(u32, Ending, bool)> {
        ends.iter().map(|e| (e.rank, e.ending, e.stopped)).collect()
    }

    fn by_rank(ends: &[End]) -> Vec<(u32, Ending, bool)> {
        let mut all = told(ends);
        all.sort_by_key(|(rank, _, _)| *rank);
        all
    }

    const LONG: Duration = Duration::from_secs(60);
    /// Enough for a shell to follow a signal on a busy machine.
    const SHORT: Duration = Duration::from_secs(3);
    /// Ends with 143 at SIGTERM, like a worker that has saved.
    const SAVES: &str = "trap 'exit 143' TERM; touch $READY; while :; do sleep 0.02; done";
    /// Ignores SIGTERM.
    const HANGS: &str = "trap '' TERM; touch $READY; while :; do sleep 0.02; done";

    #[test]
    fn all_ends_are_collected_with_their_reports() {
        let report = r#"echo '{"code": 0, "reason": "Done", "message": "", "step": 7}' > $REPORT"#;
        let ends = run(&[report, "exit 3", "kill -SEGV $$"], false, LONG);
        assert_eq!(
            by_rank(&ends),
            [(0, Ending::Code(0), false), (1, Ending::Code(3), false), (2, Ending::Signal(11), false)]
        );
        let first = ends.iter().find(|e| e.rank == 0).unwrap();
        assert_eq!(first.report.as_ref().map(|r: &TerminationMessage| r.step), Some(Some(7)));
        assert!(ends.iter().all(|e| e.rank == 0 || e.report.is_none()));
    }

    #[test]
    fn a_stop_is_passed_on_to_all_and_nobody_is_hurried() {
        let slow = "trap 'sleep 1; exit 143' TERM; touch $READY; while :; do sleep 0.02; done";
        let ends = run(&[slow, SAVES], true, Duration::from_millis(100));
        assert_eq!(by_rank(&ends), [(0, Ending::Code(143), false), (1, Ending::Code(143), false)]);
    }

    #[test]
    fn peers_that_notice_end_by_themselves() {
        let ends = run(&["sleep 0.3; exit 75", "exit 70"], false, LONG);
        assert_eq!(by_rank(&ends), [(0, Ending::Code(75), false), (1, Ending::Code(70), false)]);
    }

    #[test]
    fn peers_that_do_not_notice_are_stopped_and_then_killed() {
        let fails = "while ! ls ${READY%/*}/0.ready ${READY%/*}/1.ready >/dev/null 2>&1; do sleep 0.02; done; exit 65";
        let ends = run(&[SAVES, HANGS, fails], false, SHORT);
        assert_eq!(
            told(&ends),
            [(2, Ending::Code(65), false), (0, Ending::Code(143), true), (1, Ending::Signal(9), true)]
        );
    }

    #[test]
    fn children_that_end_unseen_are_an_error_and_not_a_wait_for_ever() {
        let (sender, events) = channel();
        let mut gang = Gang::default();
        gang.start(0, Command::new("true").process_group(0), PathBuf::new()).unwrap();
        let group = Pid::from_raw(*gang.0.keys().next().unwrap()).unwrap();
        waitpgid(group, WaitOptions::empty()).unwrap();
        reap(sender, move || waitpgid(group, WaitOptions::empty())).unwrap();
        assert!(supervise(gang, &events, LONG, |_| ()).is_err_and(|e| e.message.contains("SIGCHLD")));
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let error = Gang::default().start(4, &mut Command::new("/no/such/program"), PathBuf::new()).unwrap_err();
        assert!(error.message.contains("rank 4"), "{error}");
    }
}
