//! The driver: what the operator watches, and what each event leads to: a [pass](crate::pass) over one job.

use crate::children::{Child, Children};
use crate::context::Context;
use crate::listed::{Listed, Watch};
use crate::pass::{error_policy, reconcile};
use backon::ExponentialBuilder;
use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt, TryStreamExt};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::core::DeserializeGuard;
use kube::runtime::controller::Config;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::ExponentialBackoff;
use kube::runtime::{Controller, WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use rlhf_api::job::RLHFJob;
use rlhf_api::names;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// Passes that run at the same time, each over another job.
pub const CONCURRENCY: usize = 16;
/// A gang's pods change together; their events are answered by one pass.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// An RLHFJob, or what could not be read as one.
pub type Guarded = DeserializeGuard<RLHFJob>;

/// The API of a kind in the watched namespace, or in all.
pub(crate) fn scoped<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// The stores and streams of one run of the operator.
#[derive(Default)]
pub struct Watches {
    rlhf_jobs: reflector::store::Writer<Guarded>,
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

    /// The run itself, which ends only after `shutdown`.
    pub fn run(
        self,
        ctx: Arc<Context>,
        namespace: Option<&str>,
        shutdown: impl Future<Output = ()> + Send + Sync + 'static,
    ) -> BoxFuture<'static, ()> {
        let client = &ctx.client;
        let listed = ctx.listed.clone();
        let jobs = watched(scoped(client, namespace), self.jobs, Watch::Jobs, listed.clone());
        let pods = watched(scoped(client, namespace), self.pods, Watch::Pods, listed.clone());
        let store = self.rlhf_jobs.as_reader();
        let stream = watcher(scoped::<Guarded>(client, namespace), watcher::Config::default())
            .backoff(watch_backoff())
            .modify(forget_writers)
            .reflect(self.rlhf_jobs);
        let stream = tell(stream, Watch::RlhfJobs, listed).applied_objects();
        let controller = Controller::for_stream(stream, store)
            // Whose turn it is, [`Turns`](crate::turns::Turns) say: the controller itself would take jobs as they come.
            .with_config(Config::default().concurrency(0).debounce(DEBOUNCE))
            .watches_stream(jobs, |job| owner(&job))
            .watches_stream(pods, |pod| owner(&pod))
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
            } else if let Err(kube::runtime::controller::Error::QueueError(error)) = &result {
                tracing::warn!(%error, "a watch failed and is started again");
            }
            std::future::ready(())
        });
        run.boxed()
    }
}

/// Takes out who wrote which field and, from `kubectl apply`, the manifest once more: half of an object, and not looked
/// at here.
fn forget_writers(job: &mut Guarded) {
    job.managed_fields_mut().clear();
    job.annotations_mut().remove("kubectl.kubernetes.io/last-applied-configuration");
}

/// A watch that fails is tried again soon, for as long as it takes: without it the operator is blind, and three watches are
/// no burden for an API server that has just come back. (kube's own default waits for up to 30 s.)
fn watch_backoff() -> ExponentialBackoff {
    let (first, longest) = (Duration::from_millis(200), Duration::from_secs(5));
    let builder =
        ExponentialBuilder::new().with_min_delay(first).with_max_delay(longest).with_factor(2.0).with_jitter();
    builder.without_max_times().into()
}

/// The watch of one kind of child, whose events come after what they tell is known.
fn watched<K>(
    api: Api<K>,
    children: Children<K>,
    watch: Watch,
    listed: Listed,
) -> impl Stream<Item = Result<K, watcher::Error>> + Send
where
    K: Child<View: Send> + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
{
    let stream = watcher(api, watcher::Config::default().labels(names::LABEL_JOB_UID))
        .backoff(watch_backoff())
        .inspect_ok(move |event| children.take(event));
    tell(stream, watch, listed).touched_objects()
}

/// Tells when a watch, whose events are known by now, has listed everything.
fn tell<K>(
    events: impl Stream<Item = Result<watcher::Event<K>, watcher::Error>> + Send,
    watch: Watch,
    listed: Listed,
) -> impl Stream<Item = Result<watcher::Event<K>, watcher::Error>> + Send {
    events.inspect_ok(move |event| {
        if matches!(event, watcher::Event::InitDone) {
            listed.done(watch);
        }
    })
}

/// The job that a child's labels name. Only the label is looked at here; whose child it is, a pass finds out.
fn owner(child: &impl Resource) -> Option<ObjectRef<Guarded>> {
    let name = child.meta().labels.as_ref()?.get(names::LABEL_JOB)?;
    Some(ObjectRef::new(name).within(child.meta().namespace.as_deref()?))
}
