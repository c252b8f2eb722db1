//! What the watches tell of the children of all jobs, by the job's UID.
//!
//! A pass finds its job's children without a walk over all those of the cluster, and of each no more is kept than the
//! rules read: a [`JobView`] or a [`PodView`]. A reflector's store of whole objects, pruned or not, takes several times
//! that memory. What is found here carries the job's label and no more; whose child it is, [`crate::view::stages`] tells.

use crate::view::{JobView, PodView};
use crate::watches::Part;
use jiff::SignedDuration;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt};
use rlhf_api::names;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A kind of child.
pub trait Child: Resource<DynamicType = ()> {
    /// What the rules read of it.
    type View: Clone + PartialEq;
    /// What the rules read of it, if it has a child's labels.
    fn view(&self) -> Option<Self::View>;
    /// Notes for how long it has been known that its deletion was asked for.
    fn note_deleting(_: &mut Self::View, _for: Duration) {}
    /// Whether the rules could find anything else in the later view.
    fn is_news(earlier: &Self::View, later: &Self::View) -> bool {
        earlier != later
    }
}

impl Child for Job {
    type View = JobView;

    fn view(&self) -> Option<JobView> {
        JobView::parse(self)
    }

    /// The Job controller counts pods in its status, as the pods' own watch tells better.
    fn is_news(earlier: &JobView, later: &JobView) -> bool {
        JobView { version: later.version.clone(), ..earlier.clone() } != *later
    }
}

impl Child for Pod {
    type View = PodView;

    fn view(&self) -> Option<PodView> {
        PodView::parse(self)
    }

    fn note_deleting(view: &mut PodView, time: Duration) {
        view.deleting_for = time.try_into().unwrap_or(SignedDuration::MAX);
    }
}

/// All children of one kind. Clones share them.
pub struct Children<K: Child>(Arc<Mutex<Watched<K::View>>>);

impl<K: Child> Clone for Children<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K: Child> Default for Children<K> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Watched { known: Known::default(), listing: HashMap::new() })))
    }
}

struct Watched<V> {
    known: Known<V>,
    /// What the lists have told that are not at their ends, by the part of the scope.
    listing: HashMap<Part, Known<V>>,
}

struct Known<V> {
    /// By the child's own UID.
    children: HashMap<Arc<str>, Kept<V>>,
    /// Their UIDs by that of the job.
    families: HashMap<Arc<str>, Vec<Arc<str>>>,
}

struct Kept<V> {
    job: Arc<str>,
    namespace: String,
    /// Since when its deletion is known of.
    deleting_since: Option<Instant>,
    view: V,
}

impl<V: Clone> Kept<V> {
    fn view_now<K: Child<View = V>>(&self) -> V {
        let mut view = self.view.clone();
        if let Some(since) = self.deleting_since {
            K::note_deleting(&mut view, since.elapsed());
        }
        view
    }
}

impl<V> Default for Known<V> {
    fn default() -> Self {
        Self { children: HashMap::new(), families: HashMap::new() }
    }
}

impl<V> Known<V> {
    /// Whether it tells anything new.
    fn take<K: Child<View = V>>(&mut self, child: &K, deleting_since: Option<Instant>) -> bool {
        let Some(uid) = child.uid() else { return false };
        let before = self.remove(&uid);
        let (Some(job), Some(view)) = (child.labels().get(names::LABEL_JOB_UID), child.view()) else {
            return before.is_some();
        };
        let (uid, job): (Arc<str>, Arc<str>) = (uid.into(), job.as_str().into());
        let same = |kept: &Kept<V>| kept.job == job && kept.deleting_since == deleting_since;
        let is_news = before.is_none_or(|kept| !same(&kept) || K::is_news(&kept.view, &view));
        self.families.entry(job.clone()).or_default().push(uid.clone());
        let namespace = child.namespace().unwrap_or_default();
        self.children.insert(uid, Kept { job, namespace, deleting_since, view });
        is_news
    }

    /// Since when it is known that the child's deletion was asked for: from now on, if nothing has told of it before.
    fn deleting_since<K: Child<View = V>>(&self, child: &K) -> Option<Instant> {
        child.meta().deletion_timestamp.as_ref()?;
        let known = child.meta().uid.as_deref().and_then(|uid| self.children.get(uid)?.deleting_since);
        Some(known.unwrap_or_else(Instant::now))
    }

    /// What a list has told takes the place of what was known of a namespace, or of all.
    fn replace(&mut self, namespace: Option<&str>, listed: Self) {
        let Some(namespace) = namespace else { return *self = listed };
        let of_it = self.children.iter().filter(|(_, kept)| kept.namespace == namespace);
        for uid in of_it.map(|(uid, _)| uid.clone()).collect::<Vec<_>>() {
            self.remove(&uid);
        }
        self.children.extend(listed.children);
        for (job, children) in listed.families {
            self.families.entry(job).or_default().extend(children);
        }
    }

    fn remove(&mut self, uid: &str) -> Option<Kept<V>> {
        let kept = self.children.remove(uid)?;
        if let Some(family) = self.families.get_mut(&kept.job) {
            family.retain(|other| &**other != uid);
            if family.is_empty() {
                self.families.remove(&kept.job);
            }
        }
        Some(kept)
    }
}

impl<K: Child> Children<K> {
    fn lock(&self) -> MutexGuard<'_, Watched<K::View>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what the watch of a part of the scope tells. Until a list is at its end, what was known before stands. Says
    /// whether a pass could find anything else now: much changes in an object that no rule reads.
    pub(crate) fn take(&self, part: &Part, event: &Event<K>) -> bool {
        let mut watched = self.lock();
        let Watched { known, listing } = &mut *watched;
        match event {
            Event::Apply(child) => {
                let since = known.deleting_since(child);
                return known.take(child, since);
            }
            Event::Delete(child) => _ = known.remove(child.meta().uid.as_deref().unwrap_or_default()),
            Event::Init => _ = listing.insert(part.clone(), Known::default()),
            Event::InitApply(child) => {
                let since = known.deleting_since(child);
                listing.entry(part.clone()).or_default().take(child, since);
            }
            Event::InitDone => known.replace(part.as_deref(), listing.remove(part).unwrap_or_default()),
        }
        true
    }

    /// What carries a job's UID in its label.
    pub fn of(&self, job: &impl Resource) -> Vec<K::View> {
        let (namespace, uid) = (job.meta().namespace.as_deref(), job.meta().uid.as_deref());
        let watched = self.lock();
        let family = watched.known.families.get(uid.unwrap_or_default()).into_iter().flatten();
        let kept = family.filter_map(|child| watched.known.children.get(child));
        kept.filter(|k| namespace == Some(&k.namespace)).map(Kept::view_now::<K>).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::tests::job;
    use serde_json::{Value, json};

    /// A pod of the tests' job, as the API server has it.
    fn pod(uid: &str, change: impl Fn(&mut Value)) -> Pod {
        let mut pod = json!({"metadata": {
            "name": uid, "namespace": "team", "uid": uid,
            "labels": {names::LABEL_JOB_UID: "0123456789-abc", names::LABEL_STAGE: "tune", names::LABEL_ATTEMPT: "1"},
            "annotations": {crate::view::INDEX_KEY: "0"},
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": "j", "controller": true}],
        }});
        change(&mut pod);
        serde_json::from_value(pod).unwrap()
    }

    fn of_the_job(children: &Children<Pod>) -> Vec<String> {
        let mut names: Vec<_> =
            children.of(&job()).into_iter().map(|view| format!("{} {}", view.stage, view.name)).collect();
        names.sort();
        names
    }

    #[test]
    fn only_what_carries_a_jobs_labels_is_found() {
        let children = Children::<Pod>::default();
        for (name, path, value) in [
            ("of-another-job", "/metadata/labels/rlhf.dev~1job-uid", json!("another")),
            ("of-another-namespace", "/metadata/namespace", json!("other")),
            ("of-no-attempt", "/metadata/labels/rlhf.dev~1attempt", json!("first")),
        ] {
            children.take(&None, &Event::Apply(pod(name, |p| *p.pointer_mut(path).unwrap() = value.clone())));
        }
        assert!(of_the_job(&children).is_empty());
        children.take(&None, &Event::Apply(pod("a", |_| ())));
        assert_eq!(of_the_job(&children), ["tune a"]);
    }

    #[test]
    fn a_child_is_as_it_was_last_told_until_it_is_deleted_or_given_away() {
        let children = Children::default();
        let relabelled = |p: &mut Value| p["metadata"]["labels"][names::LABEL_JOB_UID] = json!("another");
        children.take(&None, &Event::Apply(pod("a", |_| ())));
        children.take(&None, &Event::Apply(pod("b", |_| ())));
        children.take(&None, &Event::Apply(pod("a", |p| p["spec"] = json!({"containers": [], "nodeName": "n"}))));
        assert_eq!(of_the_job(&children), ["tune a", "tune b"]);
        assert!(children.of(&job()).iter().any(|view| view.node.as_deref() == Some("n")));
        children.take(&None, &Event::Delete(pod("b", |_| ())));
        children.take(&None, &Event::Apply(pod("a", relabelled)));
        assert!(of_the_job(&children).is_empty());
        children.take(&None, &Event::Delete(pod("a", relabelled)));
        let watched = children.lock();
        assert!(watched.known.children.is_empty() && watched.known.families.is_empty());
    }

    #[test]
    fn what_no_rule_reads_is_no_news() {
        let pods = Children::default();
        let news = |change: fn(&mut Value)| pods.take(&None, &Event::Apply(pod("a", change)));
        let on_a_node = |p: &mut Value| p["spec"] = json!({"containers": [], "nodeName": "n"});
        assert!(news(|_| ()));
        assert!(!news(|p| p["metadata"]["finalizers"] = json!(["batch.kubernetes.io/job-tracking"])));
        assert!(news(on_a_node));
        assert!(!news(on_a_node));
        let deleted = |p: &mut Value| p["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert!(news(deleted) && !news(deleted));
        assert!(news(|p| p["metadata"]["labels"][names::LABEL_JOB_UID] = json!("another")));
        assert!(news(|p| _ = p["metadata"]["labels"].as_object_mut().map(serde_json::Map::clear)));
        assert!(pods.take(&None, &Event::Delete(pod("a", |_| ()))));

        let jobs = Children::default();
        let child = |version: &str, change: Value| {
            let mut job = serde_json::to_value(pod("j", |_| ())).unwrap();
            (job["apiVersion"], job["kind"]) = (json!("batch/v1"), json!("Job"));
            job["metadata"]["resourceVersion"] = json!(version);
            job["spec"] = json!({"completions": 4, "template": {}});
            job["status"] = change;
            serde_json::from_value::<Job>(job).unwrap()
        };
        let news = |version: &str, status: Value| jobs.take(&None, &Event::Apply(child(version, status)));
        assert!(news("1", json!({})));
        assert!(!news("2", json!({"active": 4, "ready": 2})));
        assert_eq!(jobs.of(&job())[0].version.as_deref(), Some("2"), "the next write is made under it");
        assert!(news("3", json!({"active": 3, "completedIndexes": "0"})));
    }

    #[test]
    fn a_deletion_is_known_from_the_first_word_of_it_on_through_changes_and_new_lists() {
        let children = Children::<Pod>::default();
        let deleting_for = || children.of(&job())[0].deleting_for;
        let deleted = |p: &mut Value| {
            p["metadata"]["deletionTimestamp"] = json!("2020-01-01T00:00:00Z");
        };
        children.take(&None, &Event::Apply(pod("a", |_| ())));
        assert_eq!(deleting_for(), SignedDuration::ZERO);
        children.take(&None, &Event::Apply(pod("a", deleted)));
        let first = deleting_for();
        assert!(first < SignedDuration::from_secs(60), "the API server's time, long ago, is not asked");
        std::thread::sleep(Duration::from_millis(20));
        let least = first + SignedDuration::from_millis(20);
        children.take(&None, &Event::Apply(pod("a", deleted)));
        assert!(deleting_for() >= least);
        for event in [Event::Init, Event::InitApply(pod("a", deleted)), Event::InitDone] {
            children.take(&None, &event);
            assert!(deleting_for() >= least);
        }
    }

    #[test]
    fn a_list_of_one_namespace_leaves_the_children_of_others() {
        let children = Children::default();
        let (team, other): (Part, Part) = (Some("team".into()), Some("other".into()));
        let elsewhere = |p: &mut Value| p["metadata"]["namespace"] = json!("other");
        let known = || {
            let watched = children.lock();
            let mut all: Vec<_> = watched.known.children.keys().map(ToString::to_string).collect();
            all.sort();
            all.join(" ")
        };
        for (part, event, wanted) in [
            (&team, Event::Init, ""),
            (&other, Event::Init, ""),
            (&team, Event::InitApply(pod("a", |_| ())), ""),
            (&other, Event::InitApply(pod("o", elsewhere)), ""),
            (&other, Event::InitDone, "o"),
            (&team, Event::InitDone, "a o"),
            (&team, Event::Init, "a o"),
            (&team, Event::InitDone, "o"),
        ] {
            children.take(part, &event);
            assert_eq!(known(), wanted);
        }
        assert_eq!(children.lock().known.families.len(), 1);
    }

    #[test]
    fn a_new_list_replaces_what_was_known_once_it_is_whole() {
        let children = Children::default();
        children.take(&None, &Event::Apply(pod("a", |_| ())));
        for (event, wanted) in [
            (Event::Init, "tune a"),
            (Event::InitApply(pod("b", |_| ())), "tune a"),
            (Event::Init, "tune a"),
            (Event::InitApply(pod("c", |_| ())), "tune a"),
            (Event::InitDone, "tune c"),
        ] {
            children.take(&None, &event);
            assert_eq!(of_the_job(&children), [wanted]);
        }
    }
}
