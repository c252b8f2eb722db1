//! The driver: watches, and one pass over one job as observe, decide, apply.

use crate::apply::{self, apply};
use crate::children::{Child, Children};
use crate::context::Context;
use crate::decide::decide;
use crate::listed::{Listed, Watch};
use crate::metrics::Reason;
use crate::observe::{self, observe, still_holds};
use crate::scope::Scope;
use crate::watches::{Gathered, Part, watch};
use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::core::DeserializeGuard;
use kube::runtime::controller::{Action, Config};
use kube::runtime::events::{Event, EventType};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::{Controller, WatchStreamExt, watcher};
use kube::{Resource, ResourceExt};
use rlhf_api::job::RLHFJob;
use rlhf_api::names;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// A gang's pods change together; their events are answered by one pass.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// A pass is a handful of requests. One that takes longer is given up, so that a silent API server holds up nothing.
const PASS_LIMIT: Duration = Duration::from_secs(30);
/// After a pass that met a change in flight, for the case that the change's own event is not coming.
const AFTER_CHANGE: Duration = Duration::from_secs(1);

/// An RLHFJob, or what could not be read as one.
pub type Guarded = DeserializeGuard<RLHFJob>;

/// A pass that failed and is tried again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A read failed.
    #[error(transparent)]
    Observe(#[from] observe::Error),
    /// A write failed.
    #[error(transparent)]
    Apply(#[from] apply::Error),
    /// The API server did not answer.
    #[error("the pass took longer than {} seconds", PASS_LIMIT.as_secs())]
    TimedOut,
}

impl Error {
    /// The value of the metric's label.
    fn reason(&self) -> Reason {
        match self {
            Error::Observe(_) => Reason::Observe,
            Error::Apply(apply::Error::Stale) => Reason::Stale,
            Error::Apply(_) => Reason::Apply,
            Error::TimedOut => Reason::TimedOut,
        }
    }
}

/// One pass over one job.
pub async fn reconcile(guarded: Arc<Guarded>, ctx: Arc<Context>) -> Result<Action, Error> {
    let _measured = ctx.metrics.pass();
    match &guarded.0 {
        Ok(job) => tokio::time::timeout(PASS_LIMIT, pass(job, &ctx)).await.map_err(|_| Error::TimedOut)?,
        Err(invalid) => {
            ctx.metrics.failed(Reason::Undecodable);
            let error = &invalid.error;
            tracing::warn!(
                job = guarded.name_any(),
                namespace = guarded.namespace(),
                error,
                "an RLHFJob cannot be read and is left alone"
            );
            tell_undecodable(&guarded, error, &ctx).await;
            Ok(Action::await_change())
        }
    }
}

async fn pass(job: &RLHFJob, ctx: &Context) -> Result<Action, Error> {
    if job.spec.managed_by.as_ref().is_some_and(|by| by != names::MANAGED_BY) {
        return Ok(Action::await_change());
    }
    let now = whole_seconds(Timestamp::now());
    let observed = observe(job, ctx).await?;
    let decision = decide(job, &observed, &ctx.settings, now);
    if decision.touches_children() && !still_holds(job, &decision, ctx).await? {
        return Err(apply::Error::Stale.into());
    }
    if !ctx.leadership.holds() {
        // Another may lead by now. The process is about to end, and starts anew as a candidate.
        return Ok(Action::requeue(AFTER_CHANGE));
    }
    match apply(job, &decision, ctx).await {
        Ok(true) => {}
        // The next pass tells of it in status.
        Ok(false) => return Ok(Action::requeue(Duration::ZERO)),
        Err(apply::Error::Gone) => return Ok(Action::await_change()),
        Err(error) => return Err(error.into()),
    }
    match decision.requeue.and_then(|wait| Duration::try_from(wait).ok()) {
        Some(wait) => {
            ctx.retries.passed(job);
            Ok(Action::requeue(wait))
        }
        None => {
            // What was refused is tried again after a wait; where there is none, nothing is.
            ctx.retries.forget(&job.namespace().unwrap_or_default(), &job.name_any());
            Ok(Action::await_change())
        }
    }
}

/// Kubernetes counts in whole seconds, and so do the times in status.
fn whole_seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

async fn tell_undecodable(guarded: &Guarded, error: &str, ctx: &Context) {
    let event = Event {
        type_: EventType::Warning,
        reason: "Undecodable".into(),
        note: Some(crate::classify::bounded(format!(
            "this operator cannot read the object: {error}; is the CRD of another version?"
        ))),
        action: "Reconcile".into(),
        secondary: None,
    };
    if let Err(error) = ctx.recorder.publish(&event, &guarded.object_ref(&())).await {
        tracing::warn!(%error, "an event was lost");
    }
}

fn error_policy(guarded: Arc<Guarded>, error: &Error, ctx: Arc<Context>) -> Action {
    ctx.metrics.failed(error.reason());
    let (namespace, name) = (guarded.namespace().unwrap_or_default(), guarded.name_any());
    if matches!(error, Error::Apply(apply::Error::Stale)) {
        tracing::debug!(job = name, namespace, %error, "decides anew");
        return Action::requeue(AFTER_CHANGE);
    }
    let wait = ctx.retries.failed(&namespace, &name);
    tracing::warn!(job = name, namespace, %error, retry_seconds = wait.as_secs(), "a pass failed");
    Action::requeue(wait)
}

/// The stores and streams of one run of the operator.
#[derive(Default)]
pub struct Watches {
    rlhf_jobs: Gathered<Guarded>,
    jobs: Children<Job>,
    pods: Children<Pod>,
}

impl Watches {
    /// The children that the watches will tell of, for the context.
    pub fn children(&self) -> (Children<Job>, Children<Pod>) {
        (self.jobs.clone(), self.pods.clone())
    }

    /// A reader of the RLHFJobs.
    pub fn rlhf_jobs(&self) -> Store<Guarded> {
        self.rlhf_jobs.as_reader()
    }

    /// The run itself, with so many passes at the same time, each over another job. It ends only after `shutdown`.
    pub fn run(
        self,
        ctx: Arc<Context>,
        scope: &Scope,
        concurrency: u16,
        shutdown: impl Future<Output = ()> + Send + Sync + 'static,
    ) -> BoxFuture<'static, ()> {
        let Self { mut rlhf_jobs, jobs, pods } = self;
        let (client, listed) = (&ctx.client, &ctx.listed);
        let children = watcher::Config::default().labels(names::LABEL_JOB_UID);
        let jobs = watched(watch(client, scope, &children), jobs, Watch::Jobs, listed.clone());
        let pods = watched(watch(client, scope, &children), pods, Watch::Pods, listed.clone());
        let store = rlhf_jobs.as_reader();
        rlhf_jobs.begin(scope);
        let own = watch(client, scope, &watcher::Config::default().labels(&scope.selector()));
        let own = own.map(|(part, event): (Part, watcher::Event<Guarded>)| (part, without_writers(event)));
        let own = own.inspect(move |(part, event)| rlhf_jobs.take(part, event));
        let own = tell(own, Watch::RlhfJobs, listed.clone()).applied_objects();
        let controller = Controller::for_stream(own, store)
            .with_config(Config::default().concurrency(concurrency).debounce(DEBOUNCE))
            .watches_stream(jobs, |job| owner(&job))
            .watches_stream(pods, |pod| owner(&pod))
            .graceful_shutdown_on(shutdown);
        let run = controller.run(reconcile, error_policy, ctx.clone()).for_each(move |result| {
            if let Err(kube::runtime::controller::Error::ObjectNotFound(gone)) = &result {
                let namespace = gone.namespace.as_deref().unwrap_or_default();
                ctx.retries.forget(namespace, &gone.name);
                ctx.metrics.forget(namespace, &gone.name);
            }
            std::future::ready(())
        });
        run.boxed()
    }
}

/// Takes out who wrote which field and, from `kubectl apply`, the manifest once more: half of an object, and not looked
/// at here.
fn without_writers(mut event: watcher::Event<Guarded>) -> watcher::Event<Guarded> {
    if let watcher::Event::Apply(job) | watcher::Event::InitApply(job) | watcher::Event::Delete(job) = &mut event {
        job.managed_fields_mut().clear();
        job.annotations_mut().remove("kubectl.kubernetes.io/last-applied-configuration");
    }
    event
}

/// The watch of one kind of child, whose events come after what they tell is known.
fn watched<K>(
    events: impl Stream<Item = (Part, watcher::Event<K>)> + Send,
    children: Children<K>,
    watch: Watch,
    listed: Listed,
) -> impl Stream<Item = Result<K, watcher::Error>> + Send
where
    K: Child<View: Send> + Send + Sync + 'static,
{
    tell(events.inspect(move |(part, event)| children.take(part, event)), watch, listed).touched_objects()
}

/// Tells when a watch, whose events are known by now, has listed everything in a part of the scope.
fn tell<K>(
    events: impl Stream<Item = (Part, watcher::Event<K>)> + Send,
    watch: Watch,
    listed: Listed,
) -> impl Stream<Item = Result<watcher::Event<K>, watcher::Error>> + Send {
    events.map(move |(part, event)| {
        if matches!(event, watcher::Event::InitDone) {
            listed.done(part.as_deref(), watch);
        }
        Ok(event)
    })
}

/// The job that a child's labels name. Only the label is looked at here; whose child it is, a pass finds out.
fn owner(child: &impl Resource) -> Option<ObjectRef<Guarded>> {
    let name = child.meta().labels.as_ref()?.get(names::LABEL_JOB)?;
    Some(ObjectRef::new(name).within(child.meta().namespace.as_deref()?))
}
