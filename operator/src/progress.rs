//! How far a running stage is: `GET /progress` of rank 0, by its pod's address.
//!
//! A pod is asked at most once a period, whether it answers or not; between two questions the last answer stands.
//! So passes that come for other reasons neither flood the trainer nor change the status. What trainers tell is written to
//! the API server, so where many run the period is longer, and all of them together cause so many writes a second on average.
//! No pass waits for an answer: a pass has the pod asked and goes by what it last told, and another follows the answer.
//! Questions share places as passes do, so that a namespace of silent trainers holds up the figures of no other.
//! One that does not answer is asked half as often. Where most do not, it is not they: something lies between the operator
//! and them, which is said once.
//! Pods are not trusted: an answer is bounded in time and size. Trainers in turn answer only who has the key of their job.

use crate::decide::PROGRESS_PERIOD;
use crate::turns::Turns;
use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use rlhf_api::config::HTTP_PORT;
use rlhf_api::report::{MAX_DOCUMENT_BYTES, Progress, Unbelievable};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many pods are asked a second on average, all together.
const ASKED_A_SECOND: u32 = 10;
/// How many pods are asked at the same time.
const AT_ONCE: usize = 32;
/// A trainer answers from memory; one that takes longer is too busy to be waited for.
const TIMEOUT: Duration = Duration::from_secs(2);
/// A pod that is not asked for so long after it was due is forgotten. Longer than any pause after failed passes.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);

/// A trainer that has not answered for so long counts as silent.
const SILENT_AFTER: Duration = Duration::from_secs(60);
/// Fewer than so many silent trainers say nothing about the operator.
const FEWEST: usize = 3;

/// A trainer that may be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trainer {
    /// Its job.
    pub of: JobName,
    /// Its pod's name.
    pub pod: String,
    /// Its pod's address.
    pub ip: String,
    /// The key that it answers to.
    pub key: String,
}

/// A job by its names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobName {
    /// Its namespace.
    pub namespace: String,
    /// Its name in there.
    pub name: String,
}

/// What is remembered of a pod.
#[derive(Default)]
struct Pod {
    /// The last question that is over.
    asked: Option<Asked>,
    /// Whether it is being asked.
    asking: bool,
}

/// A question and what came of it.
#[derive(Clone)]
struct Asked {
    /// When it was last asked.
    at: Instant,
    /// After which time it is due again.
    period: Duration,
    /// Its last answer.
    answer: Option<Progress>,
    /// Since when it has been asked in vain.
    silent_since: Option<Instant>,
    /// When it last told something new.
    news_at: Instant,
}

/// What is known of a pod's progress.
#[derive(Debug, Default)]
pub struct Heard {
    /// What it last told.
    pub progress: Option<Progress>,
    /// For how long it had not answered when it was last asked; `None` if it answered then.
    pub silent_for: Option<Duration>,
    /// For how long it had told this process nothing new when it was last asked, by a clock that nobody sets.
    pub unchanged_for: Duration,
    /// How long until it is to be asked again.
    pub ask_again: Duration,
}

/// By namespace and pod name.
type Pods = HashMap<(String, String), Pod>;

/// Asks trainers how far they are. Clones share what they know.
#[derive(Clone)]
pub struct ProgressReader {
    client: reqwest::Client,
    port: u16,
    pods: Arc<Mutex<Pods>>,
    /// Whose question is next.
    turns: Turns,
    /// Told of each question that is over.
    over: UnboundedSender<JobName>,
    /// Whether it has been said that most trainers are silent, and they still are.
    is_cut_off: Arc<AtomicBool>,
}

/// How many trainers are asked, and how many of those have not answered for a while.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trainers {
    /// Trainers that are asked.
    pub asked: usize,
    /// Those that have been asked in vain for a minute.
    pub silent: usize,
}

impl Trainers {
    /// Whether most are silent, so that it is the operator that cannot reach them.
    pub fn says_cut_off(self) -> bool {
        self.silent >= FEWEST && 2 * self.silent > self.asked
    }
}

/// An answer that was not used.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("no answer: {0}")]
    Http(#[from] reqwest::Error),
    #[error("the answer has more than {MAX_DOCUMENT_BYTES} bytes")]
    TooLong,
    #[error("not a progress document: {0}")]
    Document(#[from] Unbelievable),
}

impl Asked {
    /// After another question, which may have had no answer.
    fn after(last: Option<Self>, answer: Option<Progress>, period: Duration) -> Self {
        let at = Instant::now();
        let period = if answer.is_some() { period } else { 2 * period };
        let Some(last) = last else {
            return Self { at, period, silent_since: answer.is_none().then_some(at), answer, news_at: at };
        };
        let Some(answer) = answer else {
            return Self { at, period, silent_since: last.silent_since.or(Some(at)), ..last };
        };
        let news = last.answer.as_ref().is_none_or(|old| old.advanced(&answer));
        Self { at, period, silent_since: None, news_at: if news { at } else { last.news_at }, answer: Some(answer) }
    }

    /// Whether somebody still asks for it: of a pod that has ended nobody does.
    fn is_live(&self) -> bool {
        self.at.elapsed() < self.period + PROGRESS_PERIOD.unsigned_abs()
    }

    /// Whether somebody may ask for it again.
    fn is_remembered(&self) -> bool {
        self.at.elapsed() < self.period + FORGOTTEN_AFTER
    }

    fn is_silent(&self) -> bool {
        self.silent_since.is_some_and(|since| self.at.duration_since(since) >= SILENT_AFTER)
    }

    fn heard(&self) -> Heard {
        Heard {
            progress: self.answer.clone(),
            silent_for: self.silent_since.map(|since| self.at.duration_since(since)),
            unchanged_for: self.at.duration_since(self.news_at),
            ask_again: self.period.saturating_sub(self.at.elapsed()),
        }
    }
}

fn live(pods: &Pods) -> impl Iterator<Item = &Asked> {
    pods.values().filter_map(|pod| pod.asked.as_ref()).filter(|asked| asked.is_live())
}

fn count(pods: &Pods) -> Trainers {
    live(pods).fold(Trainers::default(), |all, one| Trainers {
        asked: all.asked + 1,
        silent: all.silent + usize::from(one.is_silent()),
    })
}

/// How often each of so many pods is asked.
fn period(pods: usize) -> Duration {
    let all = Duration::from_secs(1) * u32::try_from(pods).unwrap_or(u32::MAX) / ASKED_A_SECOND;
    all.max(PROGRESS_PERIOD.unsigned_abs())
}

impl ProgressReader {
    /// A reader of the contract's port, and the jobs of which a trainer has been asked: each wants a pass.
    ///
    /// # Errors
    /// No client can be made.
    pub fn new() -> Result<(Self, UnboundedReceiver<JobName>), reqwest::Error> {
        Self::on_port(HTTP_PORT)
    }

    fn on_port(port: u16) -> Result<(Self, UnboundedReceiver<JobName>), reqwest::Error> {
        // Pods are reached directly: a proxy of the environment is for the world outside, and a redirect would let a
        // pod choose whom the operator asks.
        let client = reqwest::Client::builder()
            .timeout(TIMEOUT)
            .no_proxy()
            // A connection kept to every gang costs more memory than all else that is known of its job.
            .pool_max_idle_per_host(0)
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        let (over, jobs) = unbounded();
        let turns = Turns::new(AT_ONCE);
        Ok((Self { client, port, pods: Arc::default(), turns, over, is_cut_off: Arc::default() }, jobs))
    }

    /// What the trainer last told. It is asked, beside the pass, if that is a period old.
    pub fn heard(&self, trainer: &Trainer) -> Heard {
        let mut pods = self.lock();
        let pod = pods.entry((trainer.of.namespace.clone(), trainer.pod.clone())).or_default();
        if let Some(asked) = pod.asked.as_ref().filter(|asked| asked.at.elapsed() < asked.period) {
            return asked.heard();
        }
        if !std::mem::replace(&mut pod.asking, true) {
            tokio::spawn(self.clone().question(trainer.clone()));
        }
        let last = pod.asked.as_ref().map(Asked::heard).unwrap_or_default();
        Heard { ask_again: PROGRESS_PERIOD.unsigned_abs(), ..last }
    }

    /// Asks a trainer when it is its turn, and keeps what comes of it.
    async fn question(self, trainer: Trainer) {
        let Trainer { of, pod, ip, key } = trainer;
        let turn = self.turns.take(&of.namespace).await;
        let answer = self.ask(&ip, &key).await;
        drop(turn);
        let answer = answer.inspect_err(|error| tracing::debug!(namespace = of.namespace, pod, %error, "no progress"));
        let mut pods = self.lock();
        pods.retain(|_, pod| pod.asking || pod.asked.as_ref().is_some_and(Asked::is_remembered));
        let period = period(live(&pods).count());
        let entry = pods.entry((of.namespace.clone(), pod)).or_default();
        *entry = Pod { asked: Some(Asked::after(entry.asked.take(), answer.ok(), period)), asking: false };
        let trainers = count(&pods);
        drop(pods);
        self.tell_cut_off(trainers);
        // Nobody listens in a process that is about to end.
        _ = self.over.unbounded_send(of);
    }

    /// How many trainers answer, for the metrics.
    pub fn trainers(&self) -> Trainers {
        count(&self.lock())
    }

    fn tell_cut_off(&self, Trainers { asked, silent }: Trainers) {
        let is = Trainers { asked, silent }.says_cut_off();
        match (self.is_cut_off.swap(is, Ordering::Relaxed), is) {
            (false, true) => tracing::error!(
                asked,
                silent,
                "most trainers do not answer, and nobody is restarted for it; does a NetworkPolicy keep the operator from port {HTTP_PORT} of the trainers' pods?"
            ),
            (true, false) => tracing::info!(asked, silent, "most trainers answer again"),
            _ => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pods> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(&self, ip: &str, key: &str) -> Result<Progress, Error> {
        let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
        let url = format!("http://{host}:{}/progress", self.port);
        let mut response = self.client.get(url).bearer_auth(key).send().await?.error_for_status()?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            if body.len() + chunk.len() > MAX_DOCUMENT_BYTES {
                return Err(Error::TooLong);
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Progress::parse(&body)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::http::{HeaderMap, StatusCode};
    use axum::routing::get;
    use futures::StreamExt;
    use std::sync::atomic::AtomicUsize;

    const KEY: &str = "the job's key";
    const PERIOD: Duration = Duration::from_secs(10);

    /// A pod whose every answer is `body`; returns its port and how often it was asked.
    async fn pod(body: String) -> (u16, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let answer = move |headers: HeaderMap| {
            count.fetch_add(1, Ordering::SeqCst);
            let knows = headers.get("authorization").is_some_and(|a| *a == format!("Bearer {KEY}"));
            std::future::ready(if knows { (StatusCode::OK, body) } else { (StatusCode::UNAUTHORIZED, String::new()) })
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move { axum::serve(listener, Router::new().route("/progress", get(answer))).await });
        (port, asked)
    }

    fn trainer(namespace: &str, pod: &str) -> Trainer {
        let of = JobName { namespace: namespace.into(), name: "demo".into() };
        Trainer { of, pod: pod.into(), ip: "127.0.0.1".into(), key: KEY.into() }
    }

    #[tokio::test]
    async fn a_pod_is_asked_once_a_period_and_its_answer_stands() {
        let (port, asked) = pod(r#"{"step": 3, "totalSteps": 9, "metrics": {"loss": 1.5}}"#.into()).await;
        let (reader, mut over) = ProgressReader::on_port(port).unwrap();
        let trainer = trainer("ns", "pod");
        for _ in 0..3 {
            let Heard { progress, ask_again, .. } = reader.heard(&trainer);
            assert!(progress.is_none() && ask_again == PROGRESS_PERIOD.unsigned_abs(), "nobody waits for the answer");
        }
        assert_eq!(over.next().await, Some(trainer.of.clone()), "its job is looked at once there is one");
        for _ in 0..3 {
            let Heard { progress, silent_for, ask_again, .. } = reader.heard(&trainer);
            let progress = progress.unwrap();
            assert!(ask_again <= PROGRESS_PERIOD.unsigned_abs() && silent_for.is_none());
            assert_eq!((progress.step, progress.total_steps, progress.metrics["loss"]), (3, 9, 1.5));
        }
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        // A period later it is asked anew, and what it last told stands meanwhile.
        reader.lock().values_mut().for_each(|pod| pod.asked.as_mut().unwrap().period = Duration::ZERO);
        assert_eq!(reader.heard(&trainer).progress.unwrap().step, 3);
        over.next().await.unwrap();
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn a_pod_that_does_not_answer_is_not_asked_again_at_once() {
        let (port, asked) = pod("not json".into()).await;
        let (reader, mut over) = ProgressReader::on_port(port).unwrap();
        let trainer = trainer("ns", "pod");
        reader.heard(&trainer);
        over.next().await.unwrap();
        for _ in 0..2 {
            let heard = reader.heard(&trainer);
            assert!(heard.progress.is_none() && heard.silent_for.is_some(), "{heard:?}");
        }
        assert_eq!(asked.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_namespace_of_silent_trainers_holds_up_the_figures_of_no_other() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (reader, mut over) = ProgressReader::on_port(listener.local_addr().unwrap().port()).unwrap();
        let (speaks, _) = pod(r#"{"step": 3, "totalSteps": 9}"#.into()).await;
        // Nobody takes these connections.
        (0..10 * AT_ONCE).for_each(|n| _ = reader.heard(&trainer("silent", &n.to_string())));
        let other = ProgressReader { port: speaks, ..reader.clone() };
        other.heard(&trainer("team", "pod"));
        let mut silent = 0;
        while over.next().await.unwrap().namespace != "team" {
            silent += 1;
        }
        assert!(silent <= 2 * AT_ONCE, "{silent} silent ones were waited for first, of {}", 10 * AT_ONCE);
        assert_eq!(reader.heard(&trainer("team", "pod")).progress.unwrap().step, 3);
    }

    #[test]
    fn the_period_grows_with_the_pods_so_that_ten_are_asked_a_second() {
        for (pods, seconds) in [(0, 10), (1, 10), (100, 10), (101, 10), (1000, 100), (50_000, 5000)] {
            assert_eq!(period(pods).as_secs(), seconds, "{pods}");
        }
    }

    #[test]
    fn news_are_what_moves_by_work_alone_and_silence_is_none() {
        let told = |step, eta| Some(Progress { step, eta_seconds: Some(eta), ..Progress::default() });
        let first = Asked::after(None, told(1, 9), PERIOD);
        let since = |asked: &Asked| (asked.news_at, asked.silent_since.is_some());
        let same = Asked::after(Some(first.clone()), told(1, 8), PERIOD);
        assert_eq!(since(&same), (first.news_at, false), "the estimate moves by itself");
        let silent = Asked::after(Some(same), None, PERIOD);
        assert_eq!((since(&silent), silent.answer.clone()), ((first.news_at, true), told(1, 8)));
        let still = Asked::after(Some(silent.clone()), None, PERIOD);
        assert_eq!(still.silent_since, silent.silent_since);
        let step = Asked::after(Some(still), told(2, 7), PERIOD);
        assert_eq!((step.news_at, step.silent_since), (step.at, None));
        assert!(Asked::after(None, None, PERIOD).silent_since.is_some());
        assert_eq!((silent.period, step.period), (2 * PERIOD, PERIOD), "who does not answer is asked half as often");
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(first.heard().unchanged_for, Duration::ZERO, "nobody has asked since");
        assert_eq!(Asked::after(None, None, PERIOD).heard().silent_for, Some(Duration::ZERO));
        let twice = Asked::after(Some(silent.clone()), None, PERIOD).heard();
        assert!(twice.silent_for.is_some_and(|time| time >= Duration::from_millis(20)));
    }

    #[tokio::test]
    async fn where_most_trainers_are_silent_it_is_the_operator_and_that_is_noted_once() {
        let (reader, mut over) = ProgressReader::on_port(1).unwrap();
        let long_ago = Instant::now().checked_sub(2 * SILENT_AFTER).unwrap();
        let keep = |pod: String, asked| {
            reader.lock().insert(("ns".into(), pod), Pod { asked: Some(asked), asking: false });
        };
        let silent = |i: usize| {
            let asked = Asked { silent_since: Some(long_ago), ..Asked::after(None, None, PERIOD) };
            keep(format!("silent-{i}"), asked);
        };
        (0..2).for_each(silent);
        keep("speaks".into(), Asked::after(None, Some(Progress::default()), PERIOD));
        assert_eq!(reader.trainers(), Trainers { asked: 3, silent: 2 });
        assert!(!reader.trainers().says_cut_off(), "two may be silent by themselves");
        (2..4).for_each(silent);
        assert!(reader.trainers().says_cut_off());
        reader.heard(&trainer("ns", "another"));
        over.next().await.unwrap();
        assert!(reader.is_cut_off.load(Ordering::SeqCst));
        (0..4).for_each(|i| _ = reader.lock().remove(&("ns".to_owned(), format!("silent-{i}"))));
        reader.heard(&trainer("ns", "more"));
        over.next().await.unwrap();
        assert!(!reader.is_cut_off.load(Ordering::SeqCst));
    }

    #[tokio::test]
    async fn without_the_jobs_key_there_is_no_answer() {
        let (port, _) = pod(r#"{"step": 3, "totalSteps": 9}"#.into()).await;
        let (reader, _) = ProgressReader::on_port(port).unwrap();
        assert!(reader.ask("127.0.0.1", KEY).await.is_ok());
        let error = reader.ask("127.0.0.1", "another").await.unwrap_err().to_string();
        assert!(error.contains("401") && !error.contains("another"), "{error}");
    }

    #[tokio::test]
    async fn an_answer_is_bounded() {
        let (port, _) =
            pod(format!(r#"{{"step": 1, "totalSteps": 1, "x": "{}"}}"#, "y".repeat(MAX_DOCUMENT_BYTES))).await;
        let (reader, _) = ProgressReader::on_port(port).unwrap();
        assert!(matches!(reader.ask("127.0.0.1", KEY).await, Err(Error::TooLong)));
        let (port, _) =
            pod(format!(r#"{{"step": 1, "totalSteps": 1, "metrics": {{"{}": 1}}}}"#, "y".repeat(999))).await;
        let answer = ProgressReader::on_port(port).unwrap().0.ask("127.0.0.1", KEY).await.unwrap();
        assert!(answer.metrics.is_empty());
    }
}
