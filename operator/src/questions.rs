//! How often events are read.
//!
//! They are in no watch of the API server's, which looks through all of a namespace's for each question. So an answer stands for
//! a while, and all jobs together ask only so often: where many wait at once, as when a cluster is full, most go by what they
//! last heard.

use crate::view::Wait;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// For how long an answer stands.
const STANDS: Duration = Duration::from_secs(30);
/// Between two questions on average, all jobs together.
const BETWEEN: Duration = Duration::from_millis(500);
/// How many may be asked at once after a pause.
const AT_ONCE: u32 = 10;
/// Of what has not been asked about for so long nothing is remembered.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);

#[derive(Default)]
struct State {
    /// What was answered about the object with a UID, and when.
    answers: HashMap<String, (Instant, Option<Wait>)>,
    /// When the next question would be asked if all came evenly.
    due: Option<Instant>,
}

/// What events have told, and whether more may be asked.
#[derive(Default)]
pub struct Questions(Mutex<State>);

impl Questions {
    /// What is known of the object with this UID, or leave to ask, which is to be [`answered`](Self::answered).
    pub fn last(&self, uid: &str) -> Option<Option<Wait>> {
        self.last_at(uid, Instant::now())
    }

    fn last_at(&self, uid: &str, now: Instant) -> Option<Option<Wait>> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, answer) = state.answers.get(uid).cloned().unzip();
        let stands = at.is_some_and(|at| now.duration_since(at) < STANDS);
        let pause = now.checked_sub(BETWEEN * AT_ONCE).unwrap_or(now);
        let due = state.due.map_or(pause, |due| due.max(pause));
        if stands || due > now {
            return Some(answer.flatten());
        }
        state.due = Some(due + BETWEEN);
        None
    }

    /// Keeps an answer.
    pub fn answered(&self, uid: &str, answer: Option<Wait>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.answers.retain(|_, (at, _)| at.elapsed() < FORGOTTEN_AFTER);
        state.answers.insert(uid.to_owned(), (Instant::now(), answer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_stands_for_a_while_and_all_together_ask_only_so_often() {
        let (questions, now) = (Questions::default(), Instant::now());
        let wait = Some(Wait::new("FailedMount", "no such folder".to_owned()));
        assert_eq!(questions.last_at("a", now), None, "it is asked");
        questions.answered("a", wait.clone());
        assert_eq!(questions.last_at("a", now), Some(wait.clone()));
        let asked = |now| (0..100).filter(|n| questions.last_at(&n.to_string(), now).is_none()).count();
        assert!((1..=AT_ONCE as usize).contains(&asked(now)));
        assert_eq!(asked(now), 0);
        assert_eq!(questions.last_at("b", now), Some(None), "nothing is known of it, and it is not its turn");
        assert_eq!(asked(now + 2 * BETWEEN), 2);
        let later = now + STANDS + BETWEEN;
        assert_eq!(questions.last_at("a", later), None, "it is asked anew");
        assert!((1..=AT_ONCE as usize).contains(&asked(later)));
        assert_eq!(questions.last_at("a", later), Some(wait), "what was last heard stands while it may not be asked");
    }
}
