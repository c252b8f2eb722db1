//! Leader election: of several operators one at a time works, the one whose name stands in a Lease.
//!
//! The rules are those of Kubernetes' own components (client-go, `tools/leaderelection`). Every write carries the
//! resource version that was read, so of two candidates one wins. A candidate trusts no clock but its own monotonic
//! one: a Lease is free once it has not changed for its duration *as this process saw it*, whatever times stand in it.
//! The holder gives up, and the process ends, when it could not renew the Lease for its renewal deadline, which is
//! shorter than the duration by more than a request takes. [`Leadership::holds`] turns false at the same time even
//! while the process is too busy, or was stopped, to notice. A holder that is told to stop clears its name, so that
//! the next one need not wait.
//!
//! kube-lease-manager 0.13 and kube-leader-election 0.44 were looked at and not taken: the first compares wall clocks
//! of different machines, the second writes without a resource version.

mod leadership;
mod times;

pub use leadership::Leadership;
pub use times::LeaseTimes;

use crate::metrics::Metrics;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::core::Status;
use kube::{Api, Client, ResourceExt};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// Why the holder has to stop.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    /// Another operator's name stands in the Lease.
    #[error("the lease is held by {0}")]
    Taken(String),
    /// The API server did not take a renewal in time.
    #[error("the lease could not be renewed for {} seconds", .0.as_secs())]
    NotRenewed(Duration),
}

/// One operator that wants to lead.
pub struct Candidate {
    api: Api<Lease>,
    name: String,
    /// Unlike that of any other process, this pod's earlier ones included.
    identity: String,
    leadership: Leadership,
    metrics: Arc<Metrics>,
    times: LeaseTimes,
    /// The Lease as it was last read or written.
    lease: Option<Lease>,
    /// Since when it is as it is, by this process's own clock.
    unchanged_since: Instant,
}

impl Candidate {
    /// A candidate for the Lease of a name in the client's own namespace.
    pub fn new(client: Client, name: &str, host: &str, leadership: Leadership, metrics: Arc<Metrics>) -> Self {
        let random = RandomState::new().build_hasher().finish();
        Self {
            api: Api::default_namespaced(client),
            name: name.into(),
            identity: format!("{host}_{random:016x}"),
            leadership,
            metrics,
            times: LeaseTimes::default(),
            lease: None,
            unchanged_since: Instant::now(),
        }
    }

    /// The same with other times.
    ///
    /// # Errors
    /// With them two might lead.
    pub fn with_times(self, times: LeaseTimes) -> Result<Self, String> {
        Ok(Self { times: times.check()?, ..self })
    }

    /// The name under which this process leads.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Waits until this process leads. What goes wrong on the way is logged and tried again.
    pub async fn acquire(&mut self) {
        let mut said = None;
        loop {
            match timeout(self.times.renew_deadline, self.try_acquire()).await {
                Ok(Ok(None)) => return,
                Ok(Ok(Some(holder))) if said.as_ref() != Some(&holder) => {
                    tracing::info!(holder, "stands by: another operator leads");
                    said = Some(holder);
                }
                Ok(Ok(Some(_))) => {}
                Ok(Err(error)) => tracing::warn!(%error, lease = self.name, "the lease cannot be read or written"),
                Err(_) => tracing::warn!(lease = self.name, "the API server does not answer about the lease"),
            }
            sleep(self.times.retry_period).await;
        }
    }

    /// Takes the Lease if it is free; otherwise says who holds it.
    async fn try_acquire(&mut self) -> kube::Result<Option<String>> {
        let found = self.metrics.api("get", self.api.get_opt(&self.name).await)?;
        let Some(found) = found else {
            let begun = Instant::now();
            let first = Lease {
                metadata: ObjectMeta { name: Some(self.name.clone()), ..Default::default() },
                spec: Some(self.claim(None)),
            };
            return match self.metrics.api("create", self.api.create(&PostParams::default(), &first).await) {
                Ok(made) => Ok(self.hold(made, begun)),
                Err(kube::Error::Api(s)) if s.is_already_exists() => Ok(Some("another that came first".into())),
                Err(error) => Err(error),
            };
        };
        self.see(found.clone());
        let spec = found.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.clone().unwrap_or_default();
        let theirs = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok()).map(Duration::from_secs);
        if !holder.is_empty()
            && self.unchanged_since.elapsed() < theirs.map_or(self.times.duration, |d| d.max(self.times.duration))
        {
            return Ok(Some(holder));
        }
        let begun = Instant::now();
        let claimed = Lease { spec: Some(self.claim(found.spec.as_ref())), ..found };
        match self.replace(&claimed).await {
            Ok(taken) => Ok(self.hold(taken, begun)),
            Err(kube::Error::Api(s)) if s.is_conflict() => Ok(Some("another that came first".into())),
            Err(error) => Err(error),
        }
    }

    /// Keeps the Lease until `stop`, and then clears it. Ends earlier only when the Lease is lost.
    pub async fn keep(mut self, stop: impl Future<Output = ()>) -> Result<(), Lost> {
        let renewals = async {
            let (mut wait, period, retry) =
                (self.times.renew_period(), self.times.renew_period(), self.times.retry_period);
            loop {
                sleep(wait).await;
                wait = if self.renew().await? { period } else { retry };
            }
        };
        let result: Result<(), Lost> = tokio::select! {
            lost = renewals => lost,
            () = stop => Ok(()),
        };
        self.leadership.ended();
        self.metrics.leads(false);
        if result.is_ok() {
            self.release().await;
        }
        result
    }

    /// Renews the Lease once; `false` if that is to be tried again soon.
    async fn renew(&mut self) -> Result<bool, Lost> {
        if !self.leadership.holds() {
            return Err(Lost::NotRenewed(self.times.renew_deadline));
        }
        let begun = Instant::now();
        match timeout(self.times.retry_period, self.try_renew()).await {
            Ok(Ok(lease)) => {
                self.hold(lease, begun);
                return Ok(true);
            }
            Ok(Err(kube::Error::Api(s))) if is_out_of_date(&s) => {
                let found = timeout(self.times.retry_period, self.api.get_opt(&self.name)).await;
                let found = found.ok().and_then(|answer| self.metrics.api("get", answer).ok());
                match found {
                    Some(Some(other)) if !holder(&other).is_empty() && holder(&other) != self.identity => {
                        return Err(Lost::Taken(holder(&other).into()));
                    }
                    // Somebody has touched, cleared or deleted it, and no other name stands in it.
                    Some(found) => self.lease = found,
                    None => {}
                }
            }
            Ok(Err(error)) => tracing::warn!(%error, lease = self.name, "the lease was not renewed"),
            Err(_) => tracing::warn!(lease = self.name, "the API server does not answer about the lease"),
        }
        Ok(false)
    }

    async fn try_renew(&self) -> kube::Result<Lease> {
        let Some(lease) = &self.lease else {
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..Default::default() };
            let lease = Lease { metadata, spec: Some(self.claim(None)) };
            return self.metrics.api("create", self.api.create(&PostParams::default(), &lease).await);
        };
        let mut renewed = lease.clone();
        let spec = renewed.spec.get_or_insert_default();
        spec.holder_identity = Some(self.identity.clone());
        // Candidates go by what stands there, and this process by its own deadline, which suits no other duration.
        spec.lease_duration_seconds = self.times.seconds();
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        self.replace(&renewed).await
    }

    /// Clears the Lease for the next one. A failure only makes that one wait.
    async fn release(&self) {
        let Some(mut lease) = self.lease.clone() else { return };
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = Some(String::new());
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        match timeout(self.times.retry_period, self.replace(&lease)).await {
            Ok(Ok(_)) => tracing::info!(lease = self.name, "released the lease"),
            Ok(Err(error)) => tracing::warn!(%error, lease = self.name, "the lease was not released"),
            Err(_) => tracing::warn!(lease = self.name, "the API server does not answer about the lease"),
        }
    }

    /// Writes the Lease under the resource version that it carries.
    async fn replace(&self, lease: &Lease) -> kube::Result<Lease> {
        self.metrics.api("update", self.api.replace(&self.name, &PostParams::default(), lease).await)
    }

    /// What stands in the Lease when this process takes it.
    fn claim(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: self.times.seconds(),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            lease_transitions: Some(before.and_then(|b| b.lease_transitions).unwrap_or(0).saturating_add(1)),
            ..Default::default()
        }
    }

    fn see(&mut self, lease: Lease) {
        let version = |l: &Lease| (l.uid(), l.resource_version());
        if self.lease.as_ref().is_none_or(|old| version(old) != version(&lease)) {
            self.unchanged_since = Instant::now();
        }
        self.lease = Some(lease);
    }

    /// This process holds the Lease by a write that began at a time.
    fn hold(&mut self, lease: Lease, begun: Instant) -> Option<String> {
        self.lease = Some(lease);
        self.leadership.renewed(begun + self.times.renew_deadline);
        self.metrics.leads(true);
        None
    }
}

/// Whether the Lease at the API server is not the one that was to be replaced.
fn is_out_of_date(status: &Status) -> bool {
    status.is_conflict() || status.is_not_found() || status.is_already_exists()
}

fn holder(lease: &Lease) -> &str {
    lease.spec.as_ref().and_then(|s| s.holder_identity.as_deref()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{Method, Request, Response};
    use http_body_util::BodyExt;
    use kube::client::Body;
    use serde_json::{Value, json};
    use std::sync::Mutex;

    const TIMES: [Duration; 3] = [Duration::from_secs(15), Duration::from_secs(10), Duration::from_secs(2)];
    const DURATION: Duration = TIMES[0];
    const RENEW_DEADLINE: Duration = TIMES[1];
    const RETRY_PERIOD: Duration = TIMES[2];

    /// An API server that holds one Lease, and may be out of reach.
    #[derive(Clone, Default)]
    struct Server(Arc<Mutex<State>>);

    #[derive(Default)]
    struct State {
        lease: Option<Value>,
        version: u64,
        holders: Vec<String>,
    }

    impl Server {
        fn answer(&self, method: &Method, body: Option<Value>) -> (u16, Value) {
            let mut state = self.0.lock().unwrap();
            let status = |code: u16, reason: &str| {
                (code, json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": ""}))
            };
            let (Some(mut new), old) = (body, state.lease.clone()) else {
                return state.lease.clone().map_or_else(|| status(404, "NotFound"), |lease| (200, lease));
            };
            match (&old, method) {
                (Some(_), &Method::POST) => return status(409, "AlreadyExists"),
                (None, &Method::PUT) => return status(404, "NotFound"),
                (Some(old), _) if old["metadata"]["resourceVersion"] != new["metadata"]["resourceVersion"] => {
                    return status(409, "Conflict");
                }
                _ => {}
            }
            state.version += 1;
            new["metadata"]["resourceVersion"] = json!(state.version.to_string());
            state.holders.push(new["spec"]["holderIdentity"].as_str().unwrap_or_default().into());
            state.lease = Some(new.clone());
            (200, new)
        }

        /// A client that reaches the server while `cut` is false.
        fn client(&self, cut: Arc<Mutex<bool>>) -> Client {
            let server = self.clone();
            let service = tower::service_fn(move |request: Request<Body>| {
                let (server, cut) = (server.clone(), cut.clone());
                async move {
                    if *cut.lock().unwrap() {
                        std::future::pending::<()>().await;
                    }
                    let (parts, body) = request.into_parts();
                    let bytes = body.collect().await.unwrap().to_bytes();
                    let (code, answer) = server.answer(&parts.method, serde_json::from_slice(&bytes).ok());
                    let body = Body::from(answer.to_string().into_bytes());
                    Ok::<_, tower::BoxError>(Response::builder().status(code).body(body).unwrap())
                }
            });
            Client::new(service, "system")
        }

        fn holder(&self) -> String {
            let state = self.0.lock().unwrap();
            state.lease.as_ref().unwrap()["spec"]["holderIdentity"].as_str().unwrap().to_owned()
        }

        fn candidate(&self, host: &str) -> (Candidate, Leadership, Arc<Mutex<bool>>) {
            let (leadership, cut) = (Leadership::default(), Arc::default());
            let metrics = Arc::new(Metrics::new().unwrap());
            (Candidate::new(self.client(Arc::clone(&cut)), "l", host, leadership.clone(), metrics), leadership, cut)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_candidates_one_leads_and_the_next_follows_at_once_when_it_stops() {
        let server = Server::default();
        let all: Vec<_> = (0..5).map(|n| server.candidate(&format!("op{n}"))).collect();
        let (stop, _) = tokio::sync::broadcast::channel::<String>(8);
        let mut leaderships = vec![];
        for (mut candidate, leadership, _) in all {
            leaderships.push((candidate.identity().to_owned(), leadership));
            let mut stopped = stop.subscribe();
            tokio::spawn(async move {
                candidate.acquire().await;
                let me = candidate.identity().to_owned();
                candidate.keep(async move { while stopped.recv().await.unwrap() != me {} }).await.unwrap();
            });
        }
        for round in 0..5 {
            sleep(Duration::from_secs(60)).await;
            let leaders: Vec<_> = leaderships.iter().filter(|(_, l)| l.holds()).map(|(name, _)| name.clone()).collect();
            assert_eq!(leaders, [server.holder()], "round {round}");
            stop.send(leaders[0].clone()).unwrap();
            sleep(RETRY_PERIOD * 2).await;
            assert_ne!(server.holder(), leaders[0]);
        }
        assert_eq!(server.holder(), "", "the last one has cleared it");
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_is_cut_off_stops_before_another_leads() {
        let server = Server::default();
        let (mut first, led, cut) = server.candidate("first");
        first.acquire().await;
        let kept = tokio::spawn(first.keep(std::future::pending()));
        let (mut second, leads, _) = server.candidate("second");
        let acquired = tokio::spawn(async move { second.acquire().await });
        sleep(Duration::from_secs(100)).await;
        assert!(led.holds() && !leads.holds() && !acquired.is_finished(), "renewals keep the other out");
        *cut.lock().unwrap() = true;
        let begun = Instant::now();
        assert!(matches!(kept.await.unwrap(), Err(Lost::NotRenewed(_))));
        assert!(!led.holds() && !leads.holds() && begun.elapsed() <= RENEW_DEADLINE + RETRY_PERIOD);
        acquired.await.unwrap();
        assert!(leads.holds() && begun.elapsed() <= DURATION + RETRY_PERIOD, "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn other_times_are_kept_to_and_such_with_which_two_might_lead_are_refused() {
        let seconds = |duration, renew_deadline, retry_period| LeaseTimes {
            duration: Duration::from_secs(duration),
            renew_deadline: Duration::from_secs(renew_deadline),
            retry_period: Duration::from_secs(retry_period),
        };
        assert_eq!(LeaseTimes::default().check(), Ok(seconds(15, 10, 2)));
        for times in [seconds(10, 10, 2), seconds(15, 14, 2), seconds(15, 3, 2), seconds(15, 10, 0)] {
            assert!(times.check().is_err(), "{times:?}");
        }
        let server = Server::default();
        let (first, led, cut) = server.candidate("first");
        let mut first = first.with_times(seconds(60, 40, 5)).unwrap();
        first.acquire().await;
        let kept = tokio::spawn(first.keep(std::future::pending()));
        let lease = server.0.lock().unwrap().lease.clone().unwrap();
        assert_eq!(lease["spec"]["leaseDurationSeconds"], 60);
        *cut.lock().unwrap() = true;
        sleep(Duration::from_secs(19)).await;
        assert!(led.holds());
        assert!(matches!(kept.await.unwrap(), Err(Lost::NotRenewed(_))) && !led.holds());
    }

    #[tokio::test(start_paused = true)]
    async fn leadership_ends_by_itself_in_a_process_that_does_not_run() {
        let server = Server::default();
        let (mut candidate, leadership, _) = server.candidate("stopped");
        candidate.acquire().await;
        assert!(leadership.holds());
        tokio::time::advance(RENEW_DEADLINE).await;
        assert!(!leadership.holds(), "nobody has renewed it, and nobody had to notice");
    }

    #[tokio::test(start_paused = true)]
    async fn times_in_the_lease_count_for_nothing_and_a_taken_one_is_given_up() {
        for renewed in ["1999-01-01T00:00:00.000000Z", "2999-01-01T00:00:00.000000Z"] {
            let server = Server::default();
            let spec = json!({"holderIdentity": "other", "leaseDurationSeconds": 15, "renewTime": renewed});
            server.answer(&Method::POST, Some(json!({"metadata": {"name": "l"}, "spec": spec})));
            let (mut candidate, leadership, _) = server.candidate("me");
            let begun = Instant::now();
            candidate.acquire().await;
            assert!((DURATION..=DURATION + RETRY_PERIOD).contains(&begun.elapsed()), "{:?}", begun.elapsed());
            let kept = tokio::spawn(candidate.keep(std::future::pending()));
            let mut lease = server.0.lock().unwrap().lease.clone().unwrap();
            lease["spec"]["holderIdentity"] = json!("thief");
            server.answer(&Method::PUT, Some(lease));
            assert!(matches!(kept.await.unwrap(), Err(Lost::Taken(by)) if by == "thief"));
            assert!(!leadership.holds());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_is_touched_or_deleted_by_hand_is_kept() {
        let server = Server::default();
        let (mut candidate, leadership, _) = server.candidate("me");
        let me = candidate.identity().to_owned();
        candidate.acquire().await;
        tokio::spawn(candidate.keep(std::future::pending()));
        let mut lease = server.0.lock().unwrap().lease.clone().unwrap();
        lease["metadata"]["annotations"] = json!({"note": "x"});
        server.answer(&Method::PUT, Some(lease));
        sleep(DURATION).await;
        assert!(leadership.holds() && server.holder() == me);
        server.0.lock().unwrap().lease = None;
        sleep(DURATION).await;
        assert!(leadership.holds() && server.holder() == me);
        assert!(server.0.lock().unwrap().holders.iter().all(|h| *h == me));
    }
}
