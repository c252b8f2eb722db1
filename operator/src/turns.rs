//! Whose turn it is. Passes over the jobs of all namespaces share a few places, and a namespace has no more than half of
//! them: free places go round the namespaces that wait, so that one with many jobs, or with slow ones, holds up itself.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{oneshot, watch};

/// The places, and who waits for one. Clones share them.
#[derive(Clone)]
pub struct Turns(Arc<Mutex<State>>);

struct State {
    free: usize,
    /// A namespace holds so many at most.
    most: usize,
    held: HashMap<String, usize>,
    /// Namespaces in the order in which they are next, each with those that wait in it.
    waiting: VecDeque<(String, VecDeque<oneshot::Sender<Turn>>)>,
    closed: watch::Sender<bool>,
}

/// A place, until it is dropped.
pub struct Turn {
    turns: Turns,
    namespace: String,
}

impl Turns {
    /// So many places, of which a namespace holds half at most.
    pub fn new(places: usize) -> Self {
        let most = (places / 2).max(1);
        let closed = watch::Sender::new(false);
        let state = State { free: places, most, held: HashMap::new(), waiting: VecDeque::new(), closed };
        Self(Arc::new(Mutex::new(state)))
    }

    /// Waits for a place; there is none any more once they are [closed](Self::close).
    pub async fn take(&self, namespace: &str) -> Option<Turn> {
        let mine = {
            let mut state = self.lock();
            if *state.closed.borrow() {
                return None;
            }
            state.enqueue(namespace)
        };
        self.hand_out();
        mine.await.ok()
    }

    /// Sends away all who wait, and all who come.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed.send_replace(true);
        state.waiting.clear();
    }

    /// Waits until they are closed, for who waits for something else before it takes a place.
    pub async fn closed(&self) {
        let mut closed = self.lock().closed.subscribe();
        // The sender lives in `self`, so the wait cannot fail.
        _ = closed.wait_for(|closed| *closed).await;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives free places to those who wait. One who waits no longer drops what it is given, which comes back here.
    fn hand_out(&self) {
        loop {
            let Some((waiter, namespace)) = self.lock().next() else { return };
            _ = waiter.send(Turn { turns: self.clone(), namespace });
        }
    }
}

impl State {
    fn enqueue(&mut self, namespace: &str) -> oneshot::Receiver<Turn> {
        let (send, receive) = oneshot::channel();
        match self.waiting.iter_mut().find(|(name, _)| name == namespace) {
            Some((_, waiters)) => waiters.push_back(send),
            None => self.waiting.push_back((namespace.to_owned(), [send].into())),
        }
        receive
    }

    /// Takes a place for the next who waits and may have one.
    fn next(&mut self) -> Option<(oneshot::Sender<Turn>, String)> {
        if self.free == 0 {
            return None;
        }
        let below = |name: &String| self.held.get(name).is_none_or(|held| *held < self.most);
        let at = self.waiting.iter().position(|(name, _)| below(name))?;
        let (namespace, mut waiters) = self.waiting.remove(at)?;
        let waiter = waiters.pop_front()?;
        if !waiters.is_empty() {
            self.waiting.push_back((namespace.clone(), waiters));
        }
        self.free -= 1;
        *self.held.entry(namespace.clone()).or_default() += 1;
        Some((waiter, namespace))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        {
            let mut state = self.turns.lock();
            state.free += 1;
            if let Some(held) = state.held.get_mut(&self.namespace) {
                *held -= 1;
                if *held == 0 {
                    state.held.remove(&self.namespace);
                }
            }
        }
        self.turns.hand_out();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::{Instant, sleep};

    const PASS: Duration = Duration::from_millis(100);

    /// How long a namespace's single job took for each of its passes, while another has jobs that are passed over as fast
    /// as there are places.
    async fn passes_beside(jobs: usize) -> Vec<Duration> {
        let turns = Turns::new(16);
        for _ in 0..jobs {
            let turns = turns.clone();
            tokio::spawn(async move {
                loop {
                    let _turn = turns.take("hostile").await;
                    sleep(30 * PASS).await;
                }
            });
        }
        sleep(PASS).await;
        let mut took = Vec::new();
        for _ in 0..20 {
            let begun = Instant::now();
            let _turn = turns.take("other").await;
            sleep(PASS).await;
            took.push(begun.elapsed());
        }
        took
    }

    #[tokio::test(start_paused = true)]
    async fn a_namespace_with_fifty_slow_jobs_leaves_anothers_passes_as_they_are() {
        let alone = passes_beside(0).await;
        let beside = passes_beside(50).await;
        let longest = |passes: &[Duration]| passes.iter().copied().max().unwrap();
        assert!(longest(&beside) < 2 * longest(&alone), "{beside:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_namespace_leaves_half_of_the_places_to_others() {
        for places in 1..=17 {
            let most = Turns::new(places).lock().most;
            assert!(most >= 1 && (places == 1 || 2 * most <= places), "{most} of {places}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn free_places_go_round_the_namespaces_that_wait() {
        let turns = Turns::new(1);
        let first = turns.take("a").await;
        let order = Arc::new(Mutex::new(String::new()));
        for namespace in ["a", "a", "a", "b", "b", "c"] {
            let (turns, order) = (turns.clone(), order.clone());
            tokio::spawn(async move {
                let _turn = turns.take(namespace).await;
                order.lock().unwrap().push_str(namespace);
            });
            tokio::task::yield_now().await;
        }
        drop(first);
        sleep(PASS).await;
        assert_eq!(*order.lock().unwrap(), "abcaba");
        assert!(turns.lock().held.is_empty() && turns.lock().waiting.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_waits_no_longer_costs_no_place_and_closed_turns_send_all_away() {
        let turns = Turns::new(1);
        let first = turns.take("a").await;
        assert!(tokio::time::timeout(PASS, turns.take("a")).await.is_err());
        drop(first);
        let second = turns.take("b").await;
        let waits = tokio::spawn({
            let turns = turns.clone();
            async move { turns.take("c").await.is_none() }
        });
        sleep(PASS).await;
        turns.close();
        assert!(waits.await.unwrap() && turns.take("d").await.is_none());
        drop(second);
        assert_eq!(turns.lock().free, 1);
    }
}
