//! The driver: what the operator watches, and what each event leads to: a [pass](crate::pass) over one job.

use crate::children::{Child, Children};
use crate::context::Context;
use crate::listed::{Listed, Watch};
use crate::pass::{error_policy, reconcile};
use crate::progress::JobName;
use crate::scope::Scope;
use crate::watches::{Gathered, Part, watch};
use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::core::DeserializeGuard;
use kube::runtime::controller::Config;
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
/// An RLHFJob, or what could not be read as one.
pub type Guarded = DeserializeGuard<RLHFJob>;

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

    /// The run itself, with so many passes at the same time, each over another job, and one for each job that `asked` tells
    /// of. It ends only after `shutdown`.
    pub fn run(
        self,
        ctx: Arc<Context>,
        scope: &Scope,
        asked: impl Stream<Item = JobName> + Send + 'static,
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
            // Whose turn it is, [`Turns`](crate::turns::Turns) say: the controller itself would take jobs as they come.
            .with_config(Config::default().concurrency(0).debounce(DEBOUNCE))
            .watches_stream(jobs, |job| owner(&job))
            .watches_stream(pods, |pod| owner(&pod))
            .reconcile_on(asked.map(|JobName { namespace, name }| ObjectRef::new(&name).within(&namespace)))
            .graceful_shutdown_on({
                let turns = ctx.turns.clone();
                async move {
                    shutdown.await;
                    turns.close();
                }
            });
        let run = controller.run(reconcile, error_policy, ctx.clone()).for_each(move |result| {
            if let Err(kube::runtime::controller::Error::ObjectNotFound(gone)) = &result {
                let namespace = gone.namespace.as_deref().unwrap_or_default();
                ctx.retries.forget(namespace, &gone.name);
                ctx.known.forget(namespace, &gone.name);
                ctx.deciding.forget(namespace, &gone.name);
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

/// The watch of one kind of child, whose events come after what they tell is known, if that is anything new.
fn watched<K>(
    events: impl Stream<Item = (Part, watcher::Event<K>)> + Send,
    children: Children<K>,
    watch: Watch,
    listed: Listed,
) -> impl Stream<Item = Result<K, watcher::Error>> + Send
where
    K: Child<View: Send> + Send + Sync + 'static,
{
    let news = events.filter(move |(part, event)| std::future::ready(children.take(part, event)));
    tell(news, watch, listed).touched_objects()
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
