//! What people read: the job's one sentence, what it waits for, and its columns.

use super::facts::{Facts, Told, Unmade};
use super::status::is_active;
use super::{Event, Pass, Trouble};
use crate::classify::{MAX_BYTES, bounded, shortened};
use jiff::{SignedDuration, Timestamp};
use rlhf_api::job::{Phase, RLHFJobStatus, StagePhase, StageStatus};
use rlhf_api::report::Progress;

/// Bytes for the mark of a cut and for what stands between two sentences.
const BETWEEN: usize = 8;
/// The most that is said of a pod that its node does not end.
const STUCK_BYTES: usize = 400;
/// A trainer that has not answered for so long is said not to.
const SILENT: SignedDuration = SignedDuration::from_secs(120);

/// What something waits for.
pub(super) struct Waiting {
    /// One CamelCase word.
    pub reason: String,
    /// A sentence.
    pub text: String,
}

impl Waiting {
    fn new(reason: &str, text: String) -> Self {
        Self { reason: reason.into(), text }
    }
}

impl Pass<'_> {
    /// One sentence on where the job is. It holds no count and no time that moves by itself.
    pub(super) fn message(&self, status: &RLHFJobStatus) -> Option<String> {
        let stuck = status.slots().filter_map(|s| self.stuck_of(s));
        let said: Vec<_> = match status.phase {
            Phase::Suspended => vec!["suspended; set spec.suspend to false to go on".to_owned()],
            _ if self.job.spec.suspend => vec![SUSPENDING.to_owned()].into_iter().chain(stuck).collect(),
            _ => {
                let obstacle = self.obstacle.iter().map(|o| o.text.clone());
                obstacle.chain(status.slots().filter_map(|s| self.sentence(s))).chain(stuck).collect()
            }
        };
        let text = said.join("; ");
        (!text.is_empty()).then(|| bounded(text))
    }

    fn sentence(&self, slot: &StageStatus) -> Option<String> {
        let StageStatus { name, attempt, .. } = slot;
        if let Some(trouble) = self.observed.trouble(slot).filter(|_| slot.phase == StagePhase::Starting) {
            return Some(self.told(trouble));
        }
        match (slot.phase, &slot.last_failure) {
            (StagePhase::Running, _) => {
                let silent = self.view(name).silent_for.is_some_and(|time| time >= SILENT);
                let silent = if silent { ", and its rank 0 does not answer" } else { "" };
                Some(format!("{name} runs (attempt {attempt}{silent})"))
            }
            (StagePhase::Starting, _) => Some(match Facts::of(self, slot) {
                Facts::Unmade(Unmade { obstacle: Some(what), refusal: None }) => {
                    format!("{name}: attempt {attempt} waits for the pods of an earlier attempt to end: {what}")
                }
                facts => match facts.waiting() {
                    Some(told) => starting(slot, &told),
                    None => format!("{name}: attempt {attempt} starts"),
                },
            }),
            (StagePhase::Pending, Some(failure)) => Some(format!(
                "{name}: attempt {attempt} ended: {}: {}; the next follows{}",
                failure.reason,
                failure.message,
                slot.not_before.map(|t| format!(" at {}", seconds(t))).unwrap_or_default(),
            )),
            _ => None,
        }
    }

    /// What keeps something from going on that is not just about to.
    pub(super) fn first_wait(&self, status: &RLHFJobStatus) -> Option<Waiting> {
        let of_all = self.obstacle.iter().map(|o| Waiting::new(&o.reason, o.text.clone()));
        let stuck = status.slots().filter_map(|s| Some(Waiting::new("NodeLost", self.stuck_of(s)?)));
        let active = status.slots().filter(|s| is_active(s) && !self.job.spec.suspend);
        let waits = active.filter_map(|s| {
            let told = Facts::of(self, s).waiting()?;
            Some(Waiting::new(&told.wait.reason, starting(s, &told)))
        });
        of_all.chain(waits).chain(stuck).next()
    }

    /// What the job waits for where nothing keeps it from going on.
    pub(super) fn any_wait(&self, status: &RLHFJobStatus) -> Option<Waiting> {
        if self.job.spec.suspend {
            return Some(Waiting::new("Suspending", SUSPENDING.into()));
        }
        let of = |slot: &StageStatus| {
            let reason = match slot.phase {
                StagePhase::Starting if self.view(&slot.name).is_clear_for(slot.attempt) => "Starting",
                StagePhase::Starting if self.view(&slot.name).job(slot.attempt).is_some() => "Starting",
                StagePhase::Starting => "EarlierAttempt",
                StagePhase::Pending if slot.not_before.is_some() => "BackOff",
                _ => return None,
            };
            Some(Waiting::new(reason, self.sentence(slot)?))
        };
        status.slots().find_map(of)
    }

    /// A pod of the stage that its node does not end, and what to do about it.
    fn stuck_of(&self, slot: &StageStatus) -> Option<String> {
        let text = self.stuck(self.view(&slot.name))?;
        Some(shortened(format!("{}: {text}", slot.name), STUCK_BYTES))
    }

    /// Tells what is news to this process, unless a pass that failed afterwards has told it: then it stands in the message.
    pub(super) fn tell_troubles(&mut self, before: &RLHFJobStatus, status: &RLHFJobStatus) {
        for slot in status.slots() {
            let Some(trouble) = self.observed.trouble(slot).filter(|t| t.is_news) else { continue };
            let text = self.told(trouble);
            if !before.message.as_ref().is_some_and(|message| message.contains(&text)) {
                self.tell(Event::Blocked, text, self.about(slot));
            }
        }
    }

    /// Tells once of each pod that is stuck.
    pub(super) fn tell_stuck(&mut self, before: &RLHFJobStatus, status: &RLHFJobStatus) {
        for slot in status.slots() {
            let Some(text) = self.stuck_of(slot) else { continue };
            if !before.message.as_ref().is_some_and(|message| message.contains(&text)) {
                self.tell(Event::PodStuck, text, self.about(slot));
            }
        }
    }

    /// A trouble in words; where there are several, so short that the message has room for each.
    fn told(&self, trouble: &Trouble) -> String {
        let text = format!("{}, attempt {}: {}", trouble.stage, trouble.attempt, trouble.message);
        shortened(text, (MAX_BYTES / self.observed.troubles.len().max(1)).saturating_sub(BETWEEN))
    }
}

const SUSPENDING: &str = "to be suspended: waits until the pods have written a checkpoint and ended";

/// Why an attempt has not begun to run.
fn starting(slot: &StageStatus, told: &Told) -> String {
    format!("{}: attempt {} waits: {told}", slot.name, slot.attempt)
}

pub(super) fn progress(slot: &StageStatus) -> String {
    match &slot.progress {
        Some(p) if p.total_steps > 0 => format!("{}/{}", p.step, p.total_steps),
        Some(p) if p.step > 0 => p.step.to_string(),
        _ => "-".into(),
    }
}

pub(super) fn joined(parts: &[String]) -> Option<String> {
    (!parts.is_empty()).then(|| parts.join(","))
}

fn seconds(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The columns about the stage that runs.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Brief {
    pub figure: Option<String>,
    pub tokens_per_second: Option<u64>,
    pub eta: Option<String>,
}

/// What trainers tell that people judge a stage by, the most telling first.
const FIGURES: [&str; 2] = ["reward", "loss"];

/// Tokens per second that a column shows: none is slower, and none that is faster is true.
const SPEEDS: std::ops::Range<f64> = 0.0..1e15;

pub(super) fn brief(progress: &Progress) -> Brief {
    let figure = FIGURES.iter().find_map(|name| Some((name, progress.metrics.get(*name)?)));
    let tokens = progress.metrics.get("tokensPerSecond").filter(|n| SPEEDS.contains(n));
    Brief {
        figure: figure.map(|(name, value)| format!("{name} {value:.3}")),
        tokens_per_second: tokens.map(|n| n.round() as u64),
        eta: progress.eta_seconds.map(duration),
    }
}

/// Two units at most, such as `1h20m`.
fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, ..) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_columns_say_what_a_trainer_told_in_few_words() {
        let metrics = [("loss", 2.31234), ("tokensPerSecond", 41799.6), ("kl", 4.0)];
        let metrics = metrics.map(|(name, value)| (name.to_owned(), value)).into();
        let told = brief(&Progress { eta_seconds: Some(4800), metrics, ..Default::default() });
        let wanted = (Some("loss 2.312"), Some(41800), Some("1h20m"));
        assert_eq!((told.figure.as_deref(), told.tokens_per_second, told.eta.as_deref()), wanted);
        assert_eq!(brief(&Progress::default()), Brief::default());
        for wrong in [-1.0, f64::NAN, f64::INFINITY, 1e15, f64::MAX] {
            let metrics = [("tokensPerSecond".to_owned(), wrong)].into();
            assert_eq!(brief(&Progress { metrics, ..Default::default() }), Brief::default(), "{wrong}");
        }
        let times = [(5, "5s"), (65, "1m5s"), (3600, "1h0m"), (90_000, "1d1h")];
        assert!(times.iter().all(|(n, text)| duration(*n) == *text));
    }
}
