//! One pass over one job, once it has its turn: observe, decide, apply; and when the next is due.

use crate::apply::unsupported::{self, Why};
use crate::apply::{self, apply};
use crate::context::Context;
use crate::controller::Guarded;
use crate::decide::{Decision, Observed, decide};
use crate::deciding::Undecided;
use crate::metrics::Reason;
use crate::observe::{self, leave_out_blocked, observe, still_holds};
use futures::future::BoxFuture;
use jiff::Timestamp;
use kube::ResourceExt;
use kube::runtime::controller::Action;
use rlhf_api::job::RLHFJob;
use rlhf_api::names;
use std::sync::Arc;
use std::time::Duration;

/// A pass is a handful of requests. One that takes longer is given up, so that a silent API server holds up nothing.
const PASS_LIMIT: Duration = Duration::from_secs(30);
/// A change that is not there after so many looks is not on its way.
const STALE_IS_TOLD: u32 = 5;
/// When a job is looked at again of whose change its watch has not told, should it never tell.
const WATCH_IS_LATE: Duration = Duration::from_secs(5);

/// A pass that failed and is tried again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A read failed.
    #[error(transparent)]
    Observe(#[from] observe::Error),
    /// A write failed.
    #[error(transparent)]
    Apply(#[from] apply::Error),
    /// The watches have not told what is in the namespace. No pass was begun, and none waits for another's turn meanwhile.
    #[error(
        "the Jobs and pods of namespace {0} have not been listed for {limit} seconds; may the operator list them?",
        limit = PASS_LIMIT.as_secs()
    )]
    NotListed(String),
    /// The API server did not answer.
    #[error("the pass took longer than {} seconds", PASS_LIMIT.as_secs())]
    TimedOut,
    /// It could not be decided what follows.
    #[error(transparent)]
    Undecided(#[from] Undecided),
}

impl Error {
    /// The value of the metric's label.
    fn reason(&self) -> Reason {
        match self {
            Error::Observe(_) | Error::NotListed(_) => Reason::Observe,
            Error::Apply(error) if error.is_conflict() => Reason::Stale,
            Error::Apply(_) => Reason::Apply,
            Error::TimedOut => Reason::TimedOut,
            Error::Undecided(_) => Reason::Undecided,
        }
    }
}

/// One pass over one job, once it has its turn.
///
/// # Errors
/// A read or a write failed, or nothing could be decided.
pub async fn reconcile(guarded: Arc<Guarded>, ctx: Arc<Context>) -> Result<Action, Error> {
    // Many wait here, each of which keeps no more than this.
    let namespace = guarded.namespace().unwrap_or_default();
    if guarded.0.as_ref().is_ok_and(is_ours) {
        tokio::select! {
            listed = tokio::time::timeout(PASS_LIMIT, ctx.listed.wait(&namespace)) => {
                listed.map_err(|_| Error::NotListed(namespace.clone()))?;
            }
            () = ctx.turns.closed() => return Ok(Action::await_change()),
        }
    }
    let Some(_turn) = ctx.turns.take(&namespace).await else { return Ok(Action::await_change()) };
    let _measured = ctx.metrics.pass();
    let pass: BoxFuture<'static, _> = Box::pin(pass(guarded, ctx));
    tokio::time::timeout(PASS_LIMIT, pass).await.map_err(|_| Error::TimedOut)?
}

fn is_ours(job: &RLHFJob) -> bool {
    job.spec.managed_by.as_ref().is_none_or(|by| by == names::MANAGED_BY)
}

async fn pass(guarded: Arc<Guarded>, ctx: Arc<Context>) -> Result<Action, Error> {
    let job = match &guarded.0 {
        Ok(job) => job,
        Err(invalid) => return tell_undecodable(&guarded, &invalid.error, &ctx).await,
    };
    if !is_ours(job) {
        return Ok(Action::await_change());
    }
    if ctx.known.is_written_over(job) {
        // What follows from a status that is no more would only be refused. Its watch is about to tell of the next.
        return Ok(Action::requeue(WATCH_IS_LATE));
    }
    let now = ctx.clock.now();
    let observed = observe(job, &ctx, now).await?;
    let mut decision = match decision(&guarded, job, observed, now, &ctx).await {
        Ok(decision) => decision,
        Err(Undecided::Waits(wait)) => return Ok(Action::requeue(wait)),
        Err(undecided) => {
            let message = format!("{undecided}; it is tried again, less and less often");
            unsupported::tell(job, Why::Undecided, message, &ctx).await.map_err(not_told)?;
            return Err(undecided.into());
        }
    };
    match write(job, &mut decision, &ctx).await {
        Ok(true) => Ok(settled(job, &decision, &ctx)),
        // The next pass tells of it in status.
        Ok(false) => Ok(Action::requeue(Duration::ZERO)),
        Err(Error::Apply(error)) if error.is_conflict() => Ok(out_of_date(job, &decision, &error, &ctx).await),
        Err(Error::Apply(apply::Error::Gone)) => Ok(Action::await_change()),
        Err(error) => Err(error),
    }
}

/// What follows, by rules that run elsewhere.
async fn decision(
    guarded: &Arc<Guarded>,
    job: &RLHFJob,
    observed: Observed,
    now: Timestamp,
    ctx: &Arc<Context>,
) -> Result<Decision, Undecided> {
    let (of, with) = (guarded.clone(), ctx.clone());
    let rules = move || of.0.as_ref().map(|job| decide(job, &observed, &with.settings, now)).unwrap_or_default();
    let mut decision = ctx.deciding.decide(job, rules).await?;
    unsupported::take_back(&mut decision.status, job.metadata.generation);
    Ok(decision)
}

/// Writes what was decided, if it still holds. What is in the way of one stage's attempt is an error once all else is written.
async fn write(job: &RLHFJob, decision: &mut Decision, ctx: &Context) -> Result<bool, Error> {
    let mut in_the_way = None;
    if decision.touches_children() {
        if !still_holds(job, decision, ctx).await? {
            return Err(apply::Error::Stale.into());
        }
        in_the_way = leave_out_blocked(job, decision, ctx).await?;
    }
    if !ctx.leadership.holds() {
        // Another may lead by now. The process is about to end, and starts anew as a candidate.
        return Err(apply::Error::Stale.into());
    }
    let all_taken = apply(job, decision, ctx).await?;
    in_the_way.map_or(Ok(all_taken), |error| Err(error.into()))
}

/// When to look again after a pass that has done all.
fn settled(job: &RLHFJob, decision: &Decision, ctx: &Context) -> Action {
    match decision.requeue.and_then(|wait| Duration::try_from(wait).ok()) {
        Some(wait) => {
            ctx.retries.passed(job);
            Action::requeue(wait)
        }
        None => {
            if decision.status.phase.is_terminal() {
                ctx.known.ended(job);
            }
            // What was refused is tried again after a wait; where there is none, nothing is.
            ctx.retries.forget(&job.namespace().unwrap_or_default(), &job.name_any());
            Action::await_change()
        }
    }
}

/// When to look again after a decision that was out of date. What stays so is told: by the next pass, where something is in
/// the way of an attempt; a conflict with another writer, which may come from anywhere, by an event.
async fn out_of_date(job: &RLHFJob, decision: &Decision, error: &apply::Error, ctx: &Context) -> Action {
    ctx.metrics.failed(Reason::Stale);
    let (namespace, name) = (job.namespace().unwrap_or_default(), job.name_any());
    let (times, wait) = ctx.retries.stale(&namespace, &name);
    tracing::debug!(job = name, namespace, times, %error, "what was decided is out of date");
    if let apply::Error::InTheWay { stage, what } = error {
        let slot = decision.status.slot(stage).filter(|_| times >= STALE_IS_TOLD);
        slot.iter().for_each(|slot| ctx.retries.refused(job, slot, what.clone(), false));
    } else if times == STALE_IS_TOLD {
        let note = format!(
            "{times} passes in a row have decided on what had changed meanwhile: who writes to the job or its Jobs?"
        );
        apply::warn(job, "Conflict", note, ctx).await;
    }
    Action::requeue(wait)
}

/// Says on an object that it cannot be read. All that can be done for it is to wait for another version of it, or of this.
async fn tell_undecodable(guarded: &Guarded, error: &str, ctx: &Context) -> Result<Action, Error> {
    ctx.metrics.failed(Reason::Undecodable);
    tracing::warn!(
        job = guarded.name_any(),
        namespace = guarded.namespace(),
        error,
        "an RLHFJob cannot be read and is left alone"
    );
    let message = format!("this operator cannot read the object: {error}; is the CRD of another version?");
    unsupported::tell(guarded, Why::Undecodable, message, ctx).await.map_err(not_told)?;
    Ok(Action::await_change())
}

fn not_told(source: kube::Error) -> Error {
    match source {
        kube::Error::Api(status) if status.is_conflict() => apply::Error::Stale.into(),
        source => apply::Error::Api { what: "that a job is not supported".into(), source }.into(),
    }
}

/// How long to wait after a pass that failed.
pub fn error_policy(guarded: Arc<Guarded>, error: &Error, ctx: Arc<Context>) -> Action {
    ctx.metrics.failed(error.reason());
    let (namespace, name) = (guarded.namespace().unwrap_or_default(), guarded.name_any());
    // What a wait ends in needs no other.
    let wait = match error {
        Error::NotListed(_) => Duration::from_secs(1),
        _ => ctx.retries.failed(&namespace, &name),
    };
    tracing::warn!(job = name, namespace, %error, retry_seconds = wait.as_secs(), "a pass failed");
    Action::requeue(wait)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::tests::{Log, body, failure, lines, server};
    use crate::build::tests::job;
    use crate::deciding::Deciding;
    use crate::listed::Watch;
    use kube::core::DeserializeGuard;
    use serde_json::{Value, json};

    /// A process that has listed everything, and whose API server answers by a table.
    fn ready(answers: Vec<(&'static str, u16, Value)>) -> (Arc<Context>, Log) {
        let (ctx, log) = server(answers);
        [Watch::RlhfJobs, Watch::Jobs, Watch::Pods].into_iter().for_each(|watch| ctx.listed.done(None, watch));
        (Arc::new(ctx), log)
    }

    fn guarded(job: RLHFJob) -> Arc<Guarded> {
        Arc::new(DeserializeGuard(Ok(job)))
    }

    #[tokio::test]
    async fn a_status_that_stays_out_of_date_is_decided_on_less_and_less_often_and_told() {
        let (ctx, log) = ready(vec![("PATCH rlhfjobs/demo/status", 409, failure("Conflict", 409))]);
        let mut waits = Vec::new();
        for _ in 0..9 {
            waits.push(reconcile(guarded(job()), ctx.clone()).await.unwrap());
        }
        let wanted = [1, 2, 4, 8, 16, 32, 64, 128, 256].map(|seconds| Action::requeue(Duration::from_secs(seconds)));
        assert_eq!(waits, wanted);
        assert!(!lines(&log).contains(&"POST jobs".to_owned()));
        assert!(ctx.retries.troubles(&job()).is_empty(), "nothing refuses the job's objects");
        let told: Vec<_> = lines(&log).into_iter().filter(|line| line == "POST events").collect();
        assert_eq!(told.len(), 1, "it is told once");
        assert_eq!(body(&log, "POST events")["reason"], "Conflict");
    }

    #[tokio::test]
    async fn a_child_that_does_not_go_away_is_named_in_status() {
        let leaving = json!({"metadata": {"name": "x", "deletionTimestamp": "2026-01-01T00:00:00Z"}});
        let name = serde_json::to_value(&first_children().config_map).unwrap()["metadata"]["name"].clone();
        let line: &'static str = Box::leak(format!("GET configmaps/{}", name.as_str().unwrap()).into_boxed_str());
        let (ctx, log) = ready(vec![
            ("GET rlhfjobs/demo", 200, json!({"metadata": {"name": "demo", "resourceVersion": "7"}})),
            ("GET jobs", 200, json!({"metadata": {}, "items": []})),
            ("GET pods", 200, json!({"metadata": {}, "items": []})),
            (line, 200, leaving),
        ]);
        let mut job = job();
        job.status = Some(decide(&job, &Observed::default(), &ctx.settings, Timestamp::now()).status);
        for _ in 0..STALE_IS_TOLD {
            reconcile(guarded(job.clone()), ctx.clone()).await.unwrap();
        }
        assert!(!lines(&log).contains(&"POST events".to_owned()), "it is no conflict with another writer");
        log.lock().unwrap().clear();
        reconcile(guarded(job.clone()), ctx.clone()).await.unwrap();
        let told = body(&log, "PATCH rlhfjobs/demo/status").to_string();
        assert!(told.contains("is being deleted and not gone yet"), "{told}");
    }

    /// What is to be made for the tests' job first.
    fn first_children() -> crate::build::Children {
        crate::apply::tests::first().1.make.remove(0)
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_whose_namespace_is_not_listed_takes_nobodys_turn() {
        let (ctx, log) = server(vec![]);
        let scope = crate::scope::Scope::new(&["team".into(), "closed".into()], "");
        let ctx = Context { listed: crate::listed::Listed::new(scope), turns: crate::turns::Turns::new(1), ..ctx };
        [Watch::RlhfJobs, Watch::Jobs, Watch::Pods].into_iter().for_each(|watch| ctx.listed.done(Some("team"), watch));
        let ctx = Arc::new(ctx);
        let elsewhere = |namespace: &str| {
            let mut job = job();
            job.metadata.namespace = Some(namespace.into());
            guarded(job)
        };
        let waits = tokio::spawn(reconcile(elsewhere("closed"), ctx.clone()));
        tokio::task::yield_now().await;
        let begun = tokio::time::Instant::now();
        reconcile(elsewhere("team"), ctx.clone()).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        assert!(lines(&log).contains(&"POST jobs".to_owned()));
        let error = waits.await.unwrap().unwrap_err();
        assert!(matches!(&error, Error::NotListed(namespace) if namespace == "closed"), "{error}");
        assert_eq!(error_policy(elsewhere("closed"), &error, ctx.clone()), Action::requeue(Duration::from_secs(1)));
        // Nor does it keep the process from its end.
        let waits = tokio::spawn(reconcile(elsewhere("closed"), ctx.clone()));
        tokio::task::yield_now().await;
        ctx.turns.close();
        assert_eq!(waits.await.unwrap().unwrap(), Action::await_change());
    }

    #[tokio::test]
    async fn case_28_an_orphan_that_no_watch_tells_of_makes_no_hot_loop_and_is_told_in_status() {
        let orphan = json!({"metadata": {"name": "p", "uid": "p", "labels": {"rlhf.dev/attempt": "1", "rlhf.dev/stage": "prepare"},
            "annotations": {crate::view::INDEX_KEY: "0"}}, "status": {"phase": "Running"}});
        let (ctx, log) = ready(vec![
            ("GET rlhfjobs/demo", 200, json!({"metadata": {"name": "demo", "resourceVersion": "7"}})),
            ("GET jobs", 200, json!({"metadata": {}, "items": []})),
            ("GET pods", 200, json!({"metadata": {}, "items": [orphan]})),
        ]);
        let mut job = job();
        job.status = Some(decide(&job, &Observed::default(), &ctx.settings, Timestamp::now()).status);
        let mut waits = Vec::new();
        for _ in 0..5 {
            waits.push(reconcile(guarded(job.clone()), ctx.clone()).await.unwrap());
        }
        assert_eq!(waits.last(), Some(&Action::requeue(Duration::from_secs(16))), "{waits:?}");
        log.lock().unwrap().clear();
        reconcile(guarded(job.clone()), ctx.clone()).await.unwrap();
        let told = body(&log, "PATCH rlhfjobs/demo/status").to_string();
        assert!(told.contains("\"Waiting\"") && told.contains("no watch tells of"), "{told}");
        assert!(!lines(&log).contains(&"GET pods".to_owned()), "nothing is asked before the wait is over");
    }

    #[test]
    fn a_job_on_which_nothing_can_be_decided_in_time_gets_a_condition_and_is_left_for_a_while() {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
        runtime.block_on(async {
            // No decision begins while the one thread for them is taken.
            let (release, taken) = std::sync::mpsc::channel::<()>();
            tokio::task::spawn_blocking(move || taken.recv());
            let there = serde_json::to_value(job()).unwrap();
            let (ctx, log) = ready(vec![("GET rlhfjobs/demo", 200, there)]);
            let deciding = Deciding::within(Duration::from_millis(20));
            let ctx = Arc::new(Context { deciding, ..Arc::into_inner(ctx).unwrap() });
            let error = reconcile(guarded(job()), ctx.clone()).await.unwrap_err();
            assert!(matches!(error, Error::Undecided(Undecided::TooLong { .. })), "{error}");
            let patch = body(&log, "PATCH rlhfjobs/demo/status").to_string();
            assert!(patch.contains("\"Unsupported\"") && patch.contains("\"Undecided\""), "{patch}");
            assert!(lines(&log).contains(&"POST events".to_owned()));
            log.lock().unwrap().clear();
            let again = reconcile(guarded(job()), ctx.clone()).await.unwrap();
            assert_ne!(again, Action::await_change());
            assert!(lines(&log).is_empty(), "it is not tried again at once");
            drop(release);
        });
    }
}
