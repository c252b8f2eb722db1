//! Which tests run at the same time.

use std::sync::Mutex;
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// How often a waiting test looks again.
const POLL: Duration = Duration::from_millis(50);
/// Tests are begun one after the other; nobody goes out of turn for so long because the rest has not come yet. (Were it
/// too short, the tests would take longer and show the same.)
const ARRIVAL: Duration = Duration::from_secs(2);

/// What else may run beside a test. The first kind goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Others of this kind.
    Beside,
    /// Nothing.
    Alone,
    /// Nothing, and nothing follows but others of this kind: the control plane is not as it was.
    Last,
}

const KINDS: usize = 3;

/// Lets tests run by their kinds.
pub struct Turns {
    width: usize,
    queue: Mutex<Queue>,
}

struct Queue {
    first: Option<Instant>,
    waiting: [usize; KINDS],
    running: [usize; KINDS],
}

/// Held while a test runs.
pub struct Turn<'a> {
    turns: &'a Turns,
    kind: Kind,
}

impl Turns {
    /// For so many tests at a time.
    pub const fn new(width: usize) -> Self {
        Self { width, queue: Mutex::new(Queue { first: None, waiting: [0; KINDS], running: [0; KINDS] }) }
    }

    /// Waits for a test's turn.
    pub async fn take(&self, kind: Kind) -> Turn<'_> {
        self.with(|queue| queue.waiting[kind as usize] += 1);
        while !self.with(|queue| queue.admit(kind, self.width, Instant::now())) {
            sleep(POLL).await;
        }
        Turn { turns: self, kind }
    }

    fn with<T>(&self, change: impl FnOnce(&mut Queue) -> T) -> T {
        change(&mut self.queue.lock().expect("no test ends while it holds this"))
    }
}

impl Queue {
    /// Lets a waiting test run if it may.
    fn admit(&mut self, kind: Kind, width: usize, now: Instant) -> bool {
        let first = *self.first.get_or_insert(now);
        let own = kind as usize;
        let others: usize = (0..KINDS).filter(|k| *k != own).map(|k| self.running[k]).sum();
        let width = if kind == Kind::Beside { width } else { 1 };
        let earlier: usize = self.waiting[..own].iter().sum();
        let arrived = kind == Kind::Beside || now.duration_since(first) >= ARRIVAL;
        let may = arrived && others == 0 && earlier == 0 && self.running[own] < width;
        if may {
            self.waiting[own] -= 1;
            self.running[own] += 1;
        }
        may
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.with(|queue| queue.running[self.kind as usize] -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::{ARRIVAL, Kind, Queue};
    use std::time::Instant;

    #[test]
    fn kinds_go_one_after_the_other_and_all_but_the_first_alone() {
        let (now, later) = (Instant::now(), Instant::now() + ARRIVAL);
        let mut queue = Queue { first: None, waiting: [2, 2, 0], running: [0, 0, 0] };
        assert!(!queue.admit(Kind::Alone, 1, now), "others may come yet");
        assert!(queue.admit(Kind::Beside, 1, now));
        assert!(!queue.admit(Kind::Beside, 1, later), "one at a time");
        queue.running = [0, 0, 0];
        assert!(!queue.admit(Kind::Alone, 1, later), "one of the first kind waits");
        assert!(queue.admit(Kind::Beside, 2, later));
        assert!(!queue.admit(Kind::Alone, 2, later), "another runs");
        queue.running = [0, 0, 0];
        assert!(queue.admit(Kind::Alone, 2, later));
        assert!(!queue.admit(Kind::Alone, 2, later), "it is alone");
        queue.waiting[Kind::Beside as usize] += 1;
        assert!(!queue.admit(Kind::Beside, 2, later), "nothing runs beside it");
        (queue.waiting, queue.running) = ([0, 1, 1], [0, 0, 0]);
        assert!(!queue.admit(Kind::Last, 2, later), "one of the kind before waits");
        queue.waiting = [0, 0, 1];
        assert!(queue.admit(Kind::Last, 2, later));
    }
}
