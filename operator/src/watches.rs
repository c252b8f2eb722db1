//! One watch of a kind for each part of the operator's scope, told as one stream.
//!
//! A watch that fails is tried again by itself: one namespace that cannot be read, since its role or itself is gone, keeps
//! nothing from the others.

use crate::scope::{Scope, api_of};
use backon::ExponentialBuilder;
use futures::stream::{Stream, StreamExt, select_all};
use k8s_openapi::NamespaceResourceScope;
use kube::runtime::reflector::{self, Lookup, ObjectRef, Store};
use kube::runtime::watcher::{Config, Event, ExponentialBackoff};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

/// What is watched by one watch: a namespace, or all (`None`).
pub(crate) type Part = Option<Arc<str>>;

/// What the watches of a kind tell, each with the part of which it tells.
pub(crate) fn watch<K>(
    client: &Client,
    scope: &Scope,
    config: &Config,
) -> impl Stream<Item = (Part, Event<K>)> + Send + use<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let parts = scope.parts().into_iter().map(|part| {
        let events = watcher(api_of::<K>(client, part), config.clone()).backoff(watch_backoff());
        let part: Part = part.map(Arc::from);
        events.filter_map(move |event| ready(told(part.clone(), event))).boxed()
    });
    select_all(parts)
}

fn told<K: Resource<DynamicType = ()>>(part: Part, event: watcher::Result<Event<K>>) -> Option<(Part, Event<K>)> {
    match event {
        Ok(event) => Some((part, event)),
        Err(error) => {
            let namespace = part.as_deref().unwrap_or("all");
            tracing::warn!(%error, kind = %K::kind(&()), namespace, "a watch failed and is started again");
            None
        }
    }
}

/// A watch that fails is tried again soon, for as long as it takes: without it the operator is blind, and a few watches are
/// no burden for an API server that has just come back. (kube's own default waits for up to 30 s.)
fn watch_backoff() -> ExponentialBackoff {
    let (first, longest) = (Duration::from_millis(200), Duration::from_secs(5));
    let builder =
        ExponentialBuilder::new().with_min_delay(first).with_max_delay(longest).with_factor(2.0).with_jitter();
    builder.without_max_times().into()
}

/// The objects of a kind in all parts of a scope. kube's own reflector takes the end of any list for the end of the only
/// one, and forgets what the other watches have told.
pub(crate) struct Gathered<K: 'static + Lookup<DynamicType = ()> + Clone> {
    writer: reflector::store::Writer<K>,
    /// What the lists that are not at their ends have told.
    listing: HashMap<Part, HashSet<ObjectRef<K>>>,
}

impl<K: 'static + Lookup<DynamicType = ()> + Clone> Default for Gathered<K> {
    fn default() -> Self {
        Self { writer: reflector::store::Writer::default(), listing: HashMap::new() }
    }
}

impl<K: 'static + Lookup<DynamicType = ()> + Clone> Gathered<K> {
    /// A reader of the objects.
    pub fn as_reader(&self) -> Store<K> {
        self.writer.as_reader()
    }

    /// Takes in what the watch of a part tells.
    pub fn take(&mut self, part: &Part, event: &Event<K>) {
        let Some(namespace) = part else { return self.writer.apply_watcher_event(event) };
        match event {
            Event::Apply(_) | Event::Delete(_) => self.writer.apply_watcher_event(event),
            Event::Init => _ = self.listing.insert(part.clone(), HashSet::new()),
            Event::InitApply(object) => {
                self.listing.entry(part.clone()).or_default().insert(object.to_object_ref(()));
                self.writer.apply_watcher_event(&Event::Apply(object.clone()));
            }
            Event::InitDone => {
                let listed = self.listing.remove(part).unwrap_or_default();
                self.retain(namespace, &listed);
            }
        }
    }

    /// Where each namespace is watched by itself, objects are in the store from when they are told on, and it counts as
    /// ready at once; passes wait for [`crate::listed::Listed`], which knows of parts. The one list of all namespaces comes
    /// into the store at its end, for which the controller waits.
    pub fn begin(&mut self, scope: &Scope) {
        if scope.parts() != [None] {
            self.writer.apply_watcher_event(&Event::Init);
            self.writer.apply_watcher_event(&Event::InitDone);
        }
    }

    /// Forgets what a list of the namespace no longer has.
    fn retain(&mut self, namespace: &str, listed: &HashSet<ObjectRef<K>>) {
        let is_gone = |o: &Arc<K>| {
            let found = o.to_object_ref(());
            found.namespace.as_deref() == Some(namespace) && !listed.contains(&found)
        };
        for gone in self.as_reader().state().into_iter().filter(is_gone) {
            self.writer.apply_watcher_event(&Event::Delete((*gone).clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use http::{Request, Response};
    use k8s_openapi::api::core::v1::Pod;
    use kube::client::Body;
    use serde_json::json;

    fn pod(namespace: &str, name: &str) -> Pod {
        serde_json::from_value(json!({"metadata": {"namespace": namespace, "name": name}})).unwrap()
    }

    fn names(pods: &Gathered<Pod>) -> Vec<String> {
        let full = |p: &Arc<Pod>| [&p.metadata.namespace, &p.metadata.name].map(|n| n.clone().unwrap()).join("/");
        let mut names: Vec<_> = pods.as_reader().state().iter().map(full).collect();
        names.sort();
        names
    }

    fn is_ready(pods: &Gathered<Pod>) -> bool {
        pods.as_reader().wait_until_ready().now_or_never().is_some()
    }

    #[test]
    fn a_list_of_one_namespace_changes_nothing_of_another() {
        let (a, b): (Part, Part) = (Some("a".into()), Some("b".into()));
        let mut pods = Gathered::default();
        pods.begin(&Scope::new(&["a".into(), "b".into()], ""));
        assert!(is_ready(&pods));
        for (part, event, wanted) in [
            (&a, Event::Init, vec![]),
            (&b, Event::Init, vec![]),
            (&a, Event::InitApply(pod("a", "1")), vec!["a/1"]),
            (&b, Event::InitApply(pod("b", "1")), vec!["a/1", "b/1"]),
            (&a, Event::InitApply(pod("a", "2")), vec!["a/1", "a/2", "b/1"]),
            (&b, Event::InitDone, vec!["a/1", "a/2", "b/1"]),
            (&a, Event::InitDone, vec!["a/1", "a/2", "b/1"]),
            (&b, Event::Apply(pod("b", "2")), vec!["a/1", "a/2", "b/1", "b/2"]),
            // Deleted while the watch was away.
            (&a, Event::Init, vec!["a/1", "a/2", "b/1", "b/2"]),
            (&a, Event::InitApply(pod("a", "2")), vec!["a/1", "a/2", "b/1", "b/2"]),
            (&a, Event::InitDone, vec!["a/2", "b/1", "b/2"]),
            (&b, Event::Delete(pod("b", "1")), vec!["a/2", "b/2"]),
        ] {
            pods.take(part, &event);
            assert_eq!(names(&pods), wanted, "{event:?}");
        }
    }

    #[test]
    fn a_list_of_all_namespaces_replaces_everything() {
        let mut pods = Gathered::default();
        pods.begin(&Scope::default());
        for event in [Event::Init, Event::InitApply(pod("a", "1")), Event::InitDone] {
            assert!(!is_ready(&pods), "a pass would not find what it is for");
            pods.take(&None, &event);
        }
        assert!(is_ready(&pods));
        assert_eq!(names(&pods), ["a/1"]);
        for event in [Event::Init, Event::InitApply(pod("b", "1")), Event::InitDone] {
            pods.take(&None, &event);
        }
        assert_eq!(names(&pods), ["b/1"]);
    }

    #[tokio::test]
    async fn a_namespace_that_may_not_be_read_keeps_nothing_from_another() {
        let service = tower::service_fn(async |request: Request<Body>| {
            let path = request.uri().path().to_owned();
            let watches = request.uri().query().unwrap_or_default().contains("watch=true");
            let (code, body) = match (path.as_str(), watches) {
                ("/api/v1/namespaces/a/pods", false) => (
                    200,
                    json!({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"},
                        "items": [pod("a", "1")]}),
                ),
                (_, true) => std::future::pending().await,
                _ => (403, json!({"kind": "Status", "status": "Failure", "reason": "Forbidden", "code": 403})),
            };
            let body = Body::from(body.to_string().into_bytes());
            Ok::<_, tower::BoxError>(Response::builder().status(code).body(body).unwrap())
        });
        let scope = Scope::new(&["gone".into(), "a".into()], "");
        let mut events = watch::<Pod>(&Client::new(service, "sys"), &scope, &Config::default());
        let mut pods = Gathered::default();
        pods.begin(&scope);
        loop {
            let (part, event) = events.next().await.unwrap();
            pods.take(&part, &event);
            if part.as_deref() == Some("a") && matches!(event, Event::InitDone) {
                break;
            }
        }
        assert_eq!(names(&pods), ["a/1"]);
    }
}
