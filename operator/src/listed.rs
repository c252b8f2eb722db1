//! Which of the operator's watches have listed everything once.
//!
//! A store's own `wait_until_ready` wakes one of those who wait on it and forgets the others (kube-runtime 5.0,
//! `DelayedInit`), and the controller waits on its store already; so passes and `/readyz` wait here. A pass waits for its
//! own part of the operator's scope alone: a namespace that cannot be read holds up no other.

use crate::scope::Scope;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::watch;

/// One of the operator's watches.
#[derive(Clone, Copy, Debug)]
pub enum Watch {
    /// RLHFJobs.
    RlhfJobs = 0b001,
    /// Their Jobs.
    Jobs = 0b010,
    /// The Jobs' pods.
    Pods = 0b100,
}

const ALL: u8 = Watch::RlhfJobs as u8 | Watch::Jobs as u8 | Watch::Pods as u8;

/// The watches that are done, by the part of the scope.
type Done = BTreeMap<Option<String>, u8>;

/// Shared by those who list and those who wait.
#[derive(Clone, Debug)]
pub struct Listed {
    scope: Scope,
    done: Arc<watch::Sender<Done>>,
}

impl Default for Listed {
    fn default() -> Self {
        Self::new(Scope::default())
    }
}

impl Listed {
    /// Nothing of a scope has been listed.
    pub fn new(scope: Scope) -> Self {
        let done = scope.parts().into_iter().map(|part| (part.map(str::to_owned), 0)).collect();
        Self { scope, done: Arc::new(watch::Sender::new(done)) }
    }

    /// A watch has listed everything in a part of the scope, and its store holds it.
    pub fn done(&self, part: Option<&str>, watch: Watch) {
        self.done.send_if_modified(|done| {
            let Some(done) = done.get_mut(&part.map(str::to_owned)) else { return false };
            let before = *done;
            *done |= watch as u8;
            *done != before
        });
    }

    /// Whether all watches have, everywhere.
    pub fn all(&self) -> bool {
        self.done.borrow().values().all(|done| *done == ALL)
    }

    /// Waits until all watches have listed what is in a namespace. Any number may wait.
    pub async fn wait(&self, namespace: &str) {
        let part = self.scope.part_of(namespace).map(str::to_owned);
        // The sender lives in `self`, so the wait cannot fail.
        _ = self.done.subscribe().wait_for(|done| done.get(&part) == Some(&ALL)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use futures::future::join_all;

    #[tokio::test]
    async fn everybody_who_waits_goes_on_once_all_is_listed() {
        let listed = Listed::default();
        let waiters: Vec<_> = (0..8)
            .map(|_| {
                tokio::spawn({
                    let listed = listed.clone();
                    async move { listed.wait("team").await }
                })
            })
            .collect();
        for watch in [Watch::Pods, Watch::Jobs, Watch::Pods] {
            listed.done(None, watch);
            tokio::task::yield_now().await;
            assert!(!listed.all() && waiters.iter().all(|w| !w.is_finished()));
        }
        listed.done(None, Watch::RlhfJobs);
        assert!(join_all(waiters).await.iter().all(Result::is_ok));
        listed.wait("team").await;
    }

    #[tokio::test]
    async fn a_namespace_that_cannot_be_listed_holds_up_no_other() {
        let listed = Listed::new(Scope::new(&["a".into(), "gone".into()], ""));
        for watch in [Watch::RlhfJobs, Watch::Jobs, Watch::Pods] {
            assert!(listed.wait("a").now_or_never().is_none());
            listed.done(Some("a"), watch);
        }
        assert!(listed.wait("a").now_or_never().is_some());
        assert!(listed.wait("gone").now_or_never().is_none() && !listed.all());
    }
}
