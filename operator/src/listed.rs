//! Which of the operator's watches have listed everything once.
//!
//! A store's own `wait_until_ready` wakes one of those who wait on it and forgets the others (kube-runtime 5.0,
//! `DelayedInit`), and the controller waits on its store already; so passes and `/readyz` wait here.

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

/// Shared by those who list and those who wait.
#[derive(Clone, Debug)]
pub struct Listed(Arc<watch::Sender<u8>>);

impl Default for Listed {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }
}

impl Listed {
    /// A watch has listed everything, and its store holds it.
    pub fn done(&self, watch: Watch) {
        self.0.send_if_modified(|done| {
            let before = *done;
            *done |= watch as u8;
            *done != before
        });
    }

    /// Whether all watches have.
    pub fn all(&self) -> bool {
        *self.0.borrow() == ALL
    }

    /// Waits until all watches have. Any number may wait.
    pub async fn wait(&self) {
        // The sender lives in `self`, so the wait cannot fail.
        _ = self.0.subscribe().wait_for(|done| *done == ALL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::future::join_all;

    #[tokio::test]
    async fn everybody_who_waits_goes_on_once_all_is_listed() {
        let listed = Listed::default();
        let waiters: Vec<_> = (0..8)
            .map(|_| {
                tokio::spawn({
                    let listed = listed.clone();
                    async move { listed.wait().await }
                })
            })
            .collect();
        for watch in [Watch::Pods, Watch::Jobs, Watch::Pods] {
            listed.done(watch);
            tokio::task::yield_now().await;
            assert!(!listed.all() && waiters.iter().all(|w| !w.is_finished()));
        }
        listed.done(Watch::RlhfJobs);
        assert!(join_all(waiters).await.iter().all(Result::is_ok));
        listed.wait().await;
    }
}
