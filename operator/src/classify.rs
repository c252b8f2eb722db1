//! How an attempt ended: from its pods' ends to one cause and to what is done about it.
//!
//! When one rank dies, the others lose a peer, and the Job controller stops the rest; so a gang's end leaves
//! several bad ends of which one is the cause. The cause is an end of a pod's own (an error, a kill, a
//! disruption), the earliest first; a clean stop by SIGTERM comes next, a lost peer after that, and last a pod that
//! was stopped only because another had failed. The exit codes are the trainer's contract
//! ([`rlhf_api::report::ExitCode`]).

use crate::view::{End, PodView};
use jiff::Timestamp;
use rlhf_api::job::Failure;
use rlhf_api::report::{ExitCode, Verdict};

/// The reasons that are not an exit code's: each with its word, and what the operator does about it.
macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $word:expr, $verdict:ident;)*) => {
        /// Why an attempt ended; its word stands in status, events and metrics.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason {
            /// The trainer's own exit code.
            Exit(ExitCode),
            $($(#[$doc])* $name,)*
        }

        impl Reason {
            /// Reasons that are not an exit code's.
            const OTHERS: &[Reason] = &[$(Reason::$name),*];

            /// The CamelCase word.
            pub const fn as_str(self) -> &'static str {
                match self {
                    Reason::Exit(code) => code.reason(),
                    $(Reason::$name => $word,)*
                }
            }

            /// What the operator does about it.
            pub const fn verdict(self) -> Verdict {
                match self {
                    // An attempt that ended badly although its trainers ended well was failed from outside.
                    Reason::Exit(ExitCode::Done) => Verdict::Retry,
                    Reason::Exit(code) => code.verdict(),
                    $(Reason::$name => Verdict::$verdict,)*
                }
            }
        }
    };
}

reasons! {
    /// The container passed its memory limit (host memory).
    OomKilled = "OOMKilled", Retry;
    /// A signal ended a worker or the container, and nobody had asked for the pod's deletion.
    Killed = "Killed", Retry;
    /// The kubelet evicted the pod for what it used itself: it passed a limit of its own.
    Evicted = "Evicted", Retry;
    /// The cluster took the pod's place (preemption, drain, eviction), or its node refused it.
    Disrupted = "Disrupted", Disruption;
    /// The pod's node is gone, or no longer does what it is told.
    NodeLost = NODE_LOST, Disruption;
    /// The node's runtime found the container gone, as after a loss of power.
    ContainerLost = "ContainerLost", Disruption;
    /// The pod or its Job was deleted by hand, or is gone without a trace.
    PodDeleted = "PodDeleted", Disruption;
    /// An exit code that is not in the contract, or a container that could not be run.
    UnexpectedExit = "UnexpectedExit", Retry;
    /// The attempt was stopped because the job failed elsewhere.
    Stopped = "Stopped", Fail;
    /// The API server refuses the attempt's objects for what the job says.
    Rejected = "Rejected", Fail;
    /// Not all pods ran in time although they had nodes.
    StartupDeadline = "StartupDeadlineExceeded", Retry;
    /// Not all pods had nodes, or might be made, in the time that the job allows for it.
    PendingTimeout = "PendingTimeoutExceeded", Fail;
    /// Prepare took longer than the job allows.
    PrepareDeadline = "PrepareDeadlineExceeded", Fail;
    /// The image's name is none, so that no pod will ever start.
    InvalidImageName = "InvalidImageName", Fail;
    /// No step was made for too long.
    Stalled = "Stalled", Retry;
}

impl Reason {
    /// The reason with this word; one that a later version wrote reads as unexpected.
    pub fn parse(word: &str) -> Self {
        let codes = ExitCode::ALL.into_iter().map(Reason::Exit);
        codes.chain(Self::OTHERS.iter().copied()).find(|r| r.as_str() == word).unwrap_or(Reason::UnexpectedExit)
    }

    /// How far the reason is from being the cause: lower is nearer.
    const fn distance(self) -> u8 {
        match self {
            Reason::Exit(ExitCode::Terminated) => 1,
            Reason::Exit(ExitCode::PeerLost) => 2,
            _ => 0,
        }
    }
}

/// The word for a lost node, also as the reason of the pod condition `DisruptionTarget` where the operator sets it.
pub const NODE_LOST: &str = "NodeLost";

/// The distance of a pod that was only stopped because the attempt had failed already.
const CLEANED_UP: u8 = 3;

/// The cause of an attempt's bad end. `recorded` is the cause that status names so far: pods may be gone by
/// the time their Job has failed, so what was seen of them earlier counts as much as what is left.
/// `None` while no pod of the attempt has ended badly.
pub fn cause<'a>(
    attempt: u32,
    pods: impl Iterator<Item = &'a PodView> + Clone,
    recorded: Option<&Failure>,
    now: Timestamp,
) -> Option<Failure> {
    let recorded = recorded.filter(|f| f.attempt == attempt);
    let seen = bad_ends(attempt, pods, recorded.map(|f| f.at), now);
    let recorded = recorded.map(|f| (Reason::parse(&f.reason).distance(), f.clone()));
    recorded.into_iter().chain(seen).min_by_key(|(distance, f)| (*distance, f.at)).map(|(_, f)| f)
}

/// The error of its own by which a pod ended of an attempt that was only told to stop; a stop that goes well is none, nor is
/// what it does to peers.
pub fn own_error<'a>(attempt: u32, pods: impl Iterator<Item = &'a PodView> + Clone, now: Timestamp) -> Option<Failure> {
    let own =
        |(distance, f): &(u8, Failure)| *distance == 0 && Reason::parse(&f.reason).verdict() != Verdict::Disruption;
    bad_ends(attempt, pods, None, now).filter(own).map(|(_, f)| f).min_by_key(|f| f.at)
}

/// The bad ends of an attempt's pods, each with how far it is from being the cause.
fn bad_ends<'a>(
    attempt: u32,
    pods: impl Iterator<Item = &'a PodView> + Clone,
    recorded_at: Option<Timestamp>,
    now: Timestamp,
) -> impl Iterator<Item = (u8, Failure)> {
    let bad = pods.filter(|p| p.failed());
    let first_end = bad.clone().filter_map(|p| p.ended()?.at).chain(recorded_at).min();
    bad.filter_map(move |pod| {
        let end = pod.ended()?;
        let failure = failure(attempt, pod, end, first_end, now);
        let reason = Reason::parse(&failure.reason);
        let told = reason != Reason::PodDeleted && cleaned_up(pod, end);
        Some((if told { CLEANED_UP } else { reason.distance() }, failure))
    })
}

/// The end of an attempt of which nothing is left to see.
pub fn vanished(attempt: u32, what: String, now: Timestamp) -> Failure {
    Failure {
        attempt,
        code: None,
        reason: Reason::PodDeleted.as_str().into(),
        pod: None,
        node: None,
        rank: None,
        message: what,
        at: now,
    }
}

/// The end of an attempt whose pod ended well and left no word that can be used, where one is needed.
pub fn wordless(attempt: u32, pod: &PodView, end: &End, now: Timestamp) -> Failure {
    let name = &pod.name;
    let why = match (&end.doubt, &end.word) {
        (Some(doubt), _) => format!("is not believed: {doubt}"),
        (None, Some(_)) => "tells nothing of models and data".to_owned(),
        (None, None) => "is empty".to_owned(),
    };
    let message = format!("pod {name} ended well, but its last word, with which strategies are chosen, {why}");
    let reason = Reason::UnexpectedExit.as_str().into();
    Failure { message: bounded(message), reason, ..failure(attempt, pod, end, None, now) }
}

/// Whether the pod's deletion was asked for before anything had failed, and so was not the Job controller's
/// tidying up. Times are whole seconds; a tie is read as a deletion by hand, which costs no restart.
fn deleted_by_hand(pod: &PodView, first_end: Option<Timestamp>) -> bool {
    pod.deletion_requested.is_some_and(|asked| first_end.is_none_or(|end| asked <= end))
}

/// Whether the pod ended because it was told to.
fn cleaned_up(pod: &PodView, end: &End) -> bool {
    let told = pod.deletion_requested.is_some_and(|asked| end.at.is_none_or(|at| asked <= at));
    told && pod.disruption.is_none() && pod.evicted.is_none() && matches!(end.code, Some(143 | 137) | None)
}

fn failure(attempt: u32, pod: &PodView, end: &End, first_end: Option<Timestamp>, now: Timestamp) -> Failure {
    let reason = reason(pod, end, first_end);
    Failure {
        attempt,
        code: end.code,
        reason: reason.as_str().into(),
        pod: Some(pod.name.clone()),
        node: pod.node.clone(),
        rank: end.word.as_ref().and_then(|w| w.rank),
        message: message(pod, end, reason),
        at: end.at.unwrap_or(now),
    }
}

/// One pod's reason. What the trainer says about config, data and numbers stands above everything, since another
/// attempt would end the same; a disruption explains any other end.
fn reason(pod: &PodView, end: &End, first_end: Option<Timestamp>) -> Reason {
    let exit = end.code.and_then(ExitCode::from_code);
    match (exit, end.code) {
        (Some(code), _) if code.verdict() == Verdict::Fail => Reason::Exit(code),
        _ if pod.disruption.as_deref().is_some_and(is_loss_of_node) => Reason::NodeLost,
        _ if pod.disruption.is_some() => Reason::Disrupted,
        _ if pod.evicted.is_some() => Reason::Evicted,
        _ if end.oom_killed => Reason::OomKilled,
        (Some(ExitCode::Terminated), _) | (_, Some(137) | None) if deleted_by_hand(pod, first_end) => {
            Reason::PodDeleted
        }
        _ if end.lost => Reason::ContainerLost,
        _ if end.spoiled_by.is_some() => Reason::UnexpectedExit,
        (Some(code), _) => Reason::Exit(code),
        (None, Some(code)) if signal(code).is_some() => Reason::Killed,
        (None, _) => Reason::UnexpectedExit,
    }
}

/// Whether a disruption's words begin with the operator's own reason, or with the one of Kubernetes for pods whose node
/// object is gone.
fn is_loss_of_node(disruption: &str) -> bool {
    [NODE_LOST, "DeletionByPodGC"].iter().any(|reason| disruption.starts_with(reason))
}

/// The signal that ended a container, as its runtime tells it.
fn signal(code: i32) -> Option<&'static str> {
    match code - 128 {
        4 => Some("SIGILL"),
        6 => Some("SIGABRT"),
        7 => Some("SIGBUS; is /dev/shm or the volume full?"),
        8 => Some("SIGFPE"),
        9 => Some("SIGKILL"),
        11 => Some("SIGSEGV"),
        1..=31 => Some("a signal"),
        _ => None,
    }
}

/// What was wrong, where: the trainer's own words where it left some.
fn message(pod: &PodView, end: &End, reason: Reason) -> String {
    let doubt =
        end.doubt.as_ref().map(|doubt| format!("; what it found cannot be believed: {doubt}")).unwrap_or_default();
    let word = end.word.as_ref().map(|word| format!("{}{doubt}", word.message));
    let own = word.or_else(|| end.text.clone()).filter(|m| !m.is_empty());
    let text = match (reason, &pod.disruption) {
        (Reason::Disrupted | Reason::NodeLost, Some(why)) => format!("pod {} was disrupted: {why}", pod.name),
        (Reason::PodDeleted, _) => format!("pod {} was deleted", pod.name),
        (Reason::Evicted, _) => {
            let why = pod.evicted.as_deref().unwrap_or_default();
            format!("pod {} was evicted for what it used itself: {why}; raise the limit in compute.resources", pod.name)
        }
        (Reason::ContainerLost, _) => {
            format!("the container of pod {} was lost with what ran it on its node", pod.name)
        }
        (Reason::UnexpectedExit, _) if let Some(other) = &end.spoiled_by => format!("pod {}: {other}", pod.name),
        (Reason::OomKilled, _) => {
            format!(
                "pod {} passed its memory limit; raise compute.resources.limits.memory or lower batch.microSize",
                pod.name
            )
        }
        (_, _) => own.unwrap_or_else(|| match end.code {
            Some(code) if let Some(signal) = signal(code) => {
                format!("pod {} was ended (exit code {code}) by {signal}", pod.name)
            }
            Some(code) => format!("pod {} ended with exit code {code} and left no message; see its log", pod.name),
            None => format!("pod {} ended before its container ran", pod.name),
        }),
    };
    bounded(text)
}

/// As long a text as status and events can carry.
pub const MAX_BYTES: usize = 1000;

/// Cuts a text to what status and events can carry.
pub fn bounded(text: String) -> String {
    shortened(text, MAX_BYTES)
}

/// Cuts a text after so many bytes.
pub fn shortened(mut text: String, bytes: usize) -> String {
    if text.len() > bytes {
        let cut = (0..=bytes).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        text.truncate(cut);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::PodState;
    use jiff::SignedDuration;
    use rlhf_api::report::TerminationMessage;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + second).unwrap()
    }

    /// A pod that ended at a second with a code (or without one).
    fn pod(index: u32, code: impl Into<Option<i32>>, second: i64) -> PodView {
        let code = code.into();
        PodView {
            name: format!("j-s-1-{index}"),
            uid: format!("u{index}"),
            owner: None,
            stage: "s".into(),
            attempt: 1,
            index,
            node: Some(format!("node{index}")),
            image_id: None,
            ip: None,
            created: at(0),
            deletion_requested: None,
            grace: SignedDuration::ZERO,
            deleting_for: SignedDuration::ZERO,
            disruption: None,
            evicted: None,
            lives_on: false,
            state: PodState::Ended(Box::new(End { code, at: Some(at(second)), ..End::default() })),
        }
    }

    impl PodView {
        fn deleted(mut self, second: i64) -> Self {
            self.deletion_requested = Some(at(second));
            self
        }
        fn disrupted(mut self) -> Self {
            self.disruption = Some("EvictionByEvictionAPI".into());
            self
        }
        fn lost(mut self) -> Self {
            self.disruption = Some("NodeLost: its node does not answer".into());
            self
        }
        fn oom(mut self) -> Self {
            if let PodState::Ended(end) = &mut self.state {
                end.oom_killed = true;
            }
            self
        }
        fn running(mut self) -> Self {
            self.state = PodState::Running;
            self
        }
    }

    fn verdict(pods: &[PodView]) -> (String, u32) {
        let failure = cause(1, pods.iter(), None, at(100)).unwrap();
        let index = failure.pod.unwrap().rsplit('-').next().unwrap().parse().unwrap();
        (failure.reason, index)
    }

    #[test]
    fn the_cause_is_found_among_the_ends_of_a_gang() {
        let cases: Vec<(&str, Vec<PodView>, &str, u32)> = vec![
            ("one end", vec![pod(0, 65, 1)], "BadInput", 0),
            ("a lost peer is never the cause beside an error", vec![pod(0, 75, 1), pod(1, 65, 2)], "BadInput", 1),
            ("a clean stop is never the cause beside an error", vec![pod(0, 143, 1), pod(1, 70, 2)], "Bug", 1),
            ("of two errors the earlier", vec![pod(0, 74, 3), pod(1, 71, 2)], "DeviceOutOfMemory", 1),
            ("all lost peers: the first", vec![pod(0, 75, 5), pod(1, 75, 4)], "PeerLost", 1),
            ("a clean stop explains a lost peer", vec![pod(0, 75, 1), pod(1, 143, 3)], "Terminated", 1),
            ("killed by a signal", vec![pod(0, 75, 3), pod(1, 137, 2)], "Killed", 1),
            ("out of host memory", vec![pod(0, 75, 1), pod(1, 137, 2).oom()], "OOMKilled", 1),
            ("a memory kill inside the pod", vec![pod(0, 71, 2).oom()], "OOMKilled", 0),
            ("an unknown code", vec![pod(0, 1, 1)], "UnexpectedExit", 0),
            ("no container ran", vec![pod(0, None, 1)], "UnexpectedExit", 0),
            ("a crash in native code", vec![pod(0, 75, 3), pod(1, 139, 2)], "Killed", 1),
            ("no signal has that number", vec![pod(0, 200, 1)], "UnexpectedExit", 0),
            ("its node is lost", vec![pod(0, 75, 1), pod(1, None, 2).lost()], "NodeLost", 1),
            ("drained", vec![pod(0, 75, 1), pod(1, 143, 2).disrupted()], "Disrupted", 1),
            ("drained without grace", vec![pod(0, 137, 2).disrupted()], "Disrupted", 0),
            ("bad data stands above a drain", vec![pod(0, 65, 2).disrupted()], "BadInput", 0),
            ("a bug during a drain is the drain's", vec![pod(0, 70, 2).disrupted()], "Disrupted", 0),
            ("deleted by hand, stopped cleanly", vec![pod(0, 75, 4), pod(1, 143, 5).deleted(3)], "PodDeleted", 1),
            (
                "deleted by hand, killed after its grace",
                vec![pod(0, 75, 4), pod(1, 137, 9).deleted(3)],
                "PodDeleted",
                1,
            ),
            ("an error of its own after a deletion", vec![pod(0, 74, 4).deleted(3)], "StorageFailed", 0),
            (
                "stopped by the Job controller after a peer was lost",
                vec![pod(0, 75, 2), pod(1, 143, 9).deleted(4)],
                "PeerLost",
                0,
            ),
            (
                "killed by the Job controller after an error",
                vec![pod(0, 1, 2), pod(1, 137, 9).deleted(4)],
                "UnexpectedExit",
                0,
            ),
            (
                "its error was told late, after its deletion",
                vec![pod(0, 75, 2), pod(1, 65, 1).deleted(3)],
                "BadInput",
                1,
            ),
            ("an end that is good does not count", vec![pod(0, 0, 1), pod(1, 75, 2)], "PeerLost", 1),
        ];
        for (name, pods, reason, index) in cases {
            assert_eq!(verdict(&pods), (reason.to_string(), index), "{name}");
            let reversed: Vec<_> = pods.into_iter().rev().collect();
            assert_eq!(verdict(&reversed), (reason.to_string(), index), "{name}, pods in the other order");
        }
    }

    #[test]
    fn nothing_has_ended_badly_while_pods_run_or_succeed() {
        assert_eq!(cause(1, [pod(0, 0, 1), pod(1, 1, 1).running()].iter(), None, at(9)), None);
    }

    #[test]
    fn evidence_that_is_gone_counts_by_its_record() {
        let early = cause(1, [pod(1, 65, 1)].iter(), None, at(2)).unwrap();
        let peer = [pod(0, 75, 0)];
        assert_eq!(cause(1, peer.iter(), Some(&early), at(3)).as_ref(), Some(&early));
        assert_eq!(cause(1, [].iter(), Some(&early), at(3)).as_ref(), Some(&early));
        let other_attempt = Failure { attempt: 7, ..early };
        assert_eq!(cause(1, peer.iter(), Some(&other_attempt), at(3)).unwrap().reason, "PeerLost");
    }

    #[test]
    fn a_better_cause_replaces_the_recorded_one() {
        let lost = cause(1, [pod(0, 75, 1)].iter(), None, at(2)).unwrap();
        assert_eq!(cause(1, [pod(1, 65, 3)].iter(), Some(&lost), at(4)).unwrap().reason, "BadInput");
    }

    #[test]
    fn the_record_does_not_change_while_nothing_new_is_seen() {
        let undated = PodView { state: PodState::Ended(Box::default()), ..pod(0, 1, 0) };
        let first = cause(1, [undated.clone()].iter(), None, at(5)).unwrap();
        assert_eq!(cause(1, [undated].iter(), Some(&first), at(50)), Some(first));
    }

    #[test]
    fn verdicts_follow_the_contract() {
        let table = [
            (Reason::Exit(ExitCode::BadConfig), Verdict::Fail),
            (Reason::Exit(ExitCode::BadInput), Verdict::Fail),
            (Reason::Exit(ExitCode::NotFinite), Verdict::Fail),
            (Reason::Exit(ExitCode::Bug), Verdict::RetryOnce),
            (Reason::Exit(ExitCode::DeviceOutOfMemory), Verdict::Retry),
            (Reason::Exit(ExitCode::DeviceLost), Verdict::Retry),
            (Reason::Exit(ExitCode::Storage), Verdict::Retry),
            (Reason::Exit(ExitCode::PeerLost), Verdict::Retry),
            (Reason::Exit(ExitCode::Terminated), Verdict::Disruption),
        ];
        let others = Reason::OTHERS.iter().map(|reason| (*reason, reason.verdict()));
        let table: Vec<_> = table.into_iter().chain(others).collect();
        for (reason, verdict) in table {
            assert_eq!(reason.verdict(), verdict, "{reason:?}");
            assert_eq!(Reason::parse(reason.as_str()), reason);
        }
        assert_eq!(Reason::parse("SomethingNew"), Reason::UnexpectedExit);
    }

    #[test]
    fn the_trainers_own_words_are_the_message() {
        let mut pod = pod(0, 65, 1);
        if let PodState::Ended(end) = &mut pod.state {
            end.word = Some(TerminationMessage {
                code: 65,
                reason: "BadInput".into(),
                message: "data/a.jsonl, line 3: no field `prompt`".into(),
                rank: Some(2),
                step: None,
                checkpoint: None,
                output: None,
                prepared: None,
            });
        }
        let failure = cause(1, [pod].iter(), None, at(9)).unwrap();
        assert_eq!(failure.message, "data/a.jsonl, line 3: no field `prompt`");
        assert_eq!((failure.rank, failure.node.as_deref(), failure.code), (Some(2), Some("node0"), Some(65)));
    }

    /// A pod as Kubernetes tells of it, with its trainer's container in a state.
    fn told(phase: &str, container: serde_json::Value, rest: serde_json::Value) -> PodView {
        let mut status = rest;
        status["phase"] = phase.into();
        // One that fails the pod although the trainer has ended well.
        let spoils = phase == "Failed" && container["terminated"]["exitCode"] == 0;
        let sidecar = if spoils {
            serde_json::json!({"terminated": {"exitCode": 1}})
        } else {
            serde_json::json!({"running": {}})
        };
        status["containerStatuses"] = serde_json::json!([
            {"name": "sidecar", "ready": true, "restartCount": 0, "image": "i", "imageID": "", "state": sidecar},
            {"name": crate::view::CONTAINER, "ready": false, "restartCount": 0, "image": "i", "imageID": "", "state": container},
        ]);
        let pod = serde_json::json!({
            "metadata": {"name": "j-s-1-0",
                "labels": {rlhf_api::names::LABEL_ATTEMPT: "1", rlhf_api::names::LABEL_STAGE: "s"},
                "annotations": {crate::view::INDEX_KEY: "0"}},
            "spec": {"containers": [], "nodeName": "node7"},
            "status": status,
        });
        PodView::parse(&serde_json::from_value(pod).unwrap()).unwrap()
    }

    #[test]
    fn case_14_15_and_44_what_kubernetes_tells_of_a_pod_becomes_a_reason_with_its_evidence() {
        use serde_json::json;
        let ended = |code: i32, reason: &str| json!({"terminated": {"exitCode": code, "reason": reason, "finishedAt": "2026-01-01T00:00:05Z"}});
        let target = |reason: &str| json!({"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "m"}]});
        let running = json!({"running": {}});
        let mut evicted_for_pressure = target("TerminationByKubelet");
        evicted_for_pressure["reason"] = json!("Evicted");
        evicted_for_pressure["conditions"][0]["message"] = json!("The node was low on resource: memory");
        for (phase, container, rest, reason, words) in [
            ("Failed", ended(137, "OOMKilled"), json!({}), "OOMKilled", "memory limit"),
            ("Failed", ended(137, "Error"), json!({}), "Killed", "SIGKILL"),
            ("Failed", ended(139, "Error"), json!({}), "Killed", "SIGSEGV"),
            ("Failed", ended(135, "Error"), json!({}), "Killed", "/dev/shm"),
            ("Failed", ended(134, "Error"), json!({}), "Killed", "SIGABRT"),
            ("Running", ended(71, "Error"), json!({}), "DeviceOutOfMemory", "71"),
            ("Failed", ended(128, "StartError"), json!({}), "UnexpectedExit", "StartError"),
            (
                "Failed",
                running.clone(),
                json!({"reason": "Evicted", "message": "Pod ephemeral local storage usage exceeds the total limit of containers 1Ki. "}),
                "Evicted",
                "exceeds the total limit",
            ),
            ("Failed", ended(137, "Error"), evicted_for_pressure, "Disrupted", "low on resource"),
            (
                "Failed",
                running.clone(),
                json!({"reason": "OutOfmemory", "message": "no room"}),
                "Disrupted",
                "OutOfmemory",
            ),
            ("Failed", running.clone(), json!({"reason": "OutOfcpu", "message": "m"}), "Disrupted", "OutOfcpu: m"),
            ("Failed", running.clone(), json!({"reason": "NodeAffinity", "message": "m"}), "Disrupted", "NodeAffinity"),
            (
                "Failed",
                running.clone(),
                json!({"reason": "UnexpectedAdmissionError", "message": "devices"}),
                "Disrupted",
                "UnexpectedAdmissionError: devices",
            ),
            ("Failed", running.clone(), json!({"reason": "NodeShutdown"}), "Disrupted", "NodeShutdown"),
            ("Failed", ended(137, "Error"), json!({"reason": "Terminated"}), "Disrupted", "Terminated"),
            ("Failed", running.clone(), json!({"reason": "DeadlineExceeded"}), "UnexpectedExit", "DeadlineExceeded"),
            ("Failed", ended(255, "Unknown"), json!({}), "ContainerLost", "lost"),
            ("Failed", ended(255, "Error"), json!({}), "ContainerLost", "lost"),
            ("Failed", ended(137, "ContainerStatusUnknown"), json!({}), "ContainerLost", "lost"),
            (
                "Failed",
                ended(0, "Completed"),
                json!({}),
                "UnexpectedExit",
                "container sidecar beside the trainer ended",
            ),
            ("Failed", ended(143, "Error"), target("PreemptionByScheduler"), "Disrupted", "PreemptionByScheduler: m"),
            ("Failed", ended(143, "Error"), target("DeletionByTaintManager"), "Disrupted", "DeletionByTaintManager"),
            ("Failed", ended(137, "Error"), target("EvictionByEvictionAPI"), "Disrupted", "EvictionByEvictionAPI"),
            ("Failed", ended(137, "Error"), target("TerminationByKubelet"), "Disrupted", "TerminationByKubelet"),
            ("Failed", running.clone(), target("DeletionByPodGC"), "NodeLost", "DeletionByPodGC"),
            ("Failed", running, target(NODE_LOST), "NodeLost", "NodeLost: m"),
        ] {
            let pod = told(phase, container.clone(), rest);
            let failure = cause(1, [pod].iter(), None, at(9)).unwrap();
            assert_eq!(failure.reason, reason, "{container}");
            assert!(failure.message.contains(words), "{container}: {}", failure.message);
            let place = (failure.pod.as_deref(), failure.node.as_deref());
            assert_eq!(place, (Some("j-s-1-0"), Some("node7")), "{container}");
        }
        let good = told("Succeeded", ended(0, "OOMKilled"), json!({}));
        assert!(good.succeeded(), "a child was killed for memory, and the trainer ended well");
        assert!(told("Running", ended(0, "Completed"), json!({})).succeeded(), "a sidecar runs on");
    }

    #[test]
    fn a_stop_that_goes_well_is_no_error_and_one_that_does_not_is() {
        let stopped = |code| [pod(0, 143, 9).deleted(3), pod(1, code, 9).deleted(3)];
        for (code, reason) in
            [(143, None), (137, None), (75, None), (74, Some("StorageFailed")), (65, Some("BadInput"))]
        {
            let found = own_error(1, stopped(code).iter(), at(10)).map(|f| f.reason);
            assert_eq!(found.as_deref(), reason, "{code}");
        }
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let cut = bounded("ä".repeat(2000));
        assert!(cut.len() <= 1003 && cut.ends_with('…'), "{}", cut.len());
    }
}
