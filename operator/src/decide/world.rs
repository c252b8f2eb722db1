//! The rules in a small world that does its worst.
//!
//! A model of the API server, the Job controller, kubelets and a user, in which the operator's passes see caches
//! that lag each on their own and crash between any two writes. After every step the promises of [`super`] are
//! checked; at the end the world turns friendly, and the job must come to its end.

use super::*;
use crate::build::tests::{job, settings};
use crate::classify::Reason;
use crate::decide::tests::planning::word_of_prepare;
use crate::view::{End, JobState, PodState, PodView};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt;
use proptest::prelude::*;
use rlhf_api::choice::Choice;
use rlhf_api::job::StagePlan;
use rlhf_api::names;
use rlhf_api::report::Progress;

const STALL_SECONDS: u32 = 900;

/// A Job at the API server.
#[derive(Clone)]
struct SimJob {
    stage: String,
    view: JobView,
}

/// A pod at the API server.
#[derive(Clone)]
struct SimPod {
    stage: String,
    job_uid: String,
    view: PodView,
    /// Whether the Job controller has yet to count it.
    tracked: bool,
    /// Whether its node is lost.
    lost: bool,
}

/// The grace of every deletion.
const GRACE: SignedDuration = SignedDuration::from_secs(120);

impl SimPod {
    fn delete(&mut self, now: Timestamp) {
        if self.view.deletion_requested.is_none() {
            (self.view.deletion_requested, self.view.grace) = (Some(now), GRACE);
        }
    }

    /// As the operator sees it, which knows of its deletion since it was asked for.
    fn seen(&self, now: Timestamp) -> PodView {
        let asked = self.view.deletion_requested;
        PodView { deleting_for: asked.map_or(SignedDuration::ZERO, |at| now.duration_since(at)), ..self.view.clone() }
    }
}

/// What the API server holds.
#[derive(Clone)]
struct Api {
    job: RLHFJob,
    version: u64,
    jobs: Vec<SimJob>,
    pods: Vec<SimPod>,
}

struct World {
    api: Api,
    /// Every state that a cache may still show.
    history: Vec<Api>,
    /// How far the caches of RLHFJobs, Jobs and pods are in `history`; they never go back.
    seen: [usize; 3],
    seconds: i64,
    /// How far the operator's clock is off.
    clock: i64,
    /// When rank 0 of a stage last told something new.
    news_at: i64,
    made: u64,
    /// What every rank 0 that runs says.
    told: Option<u64>,
    /// A pod that was taken for lost while its node had time to end it.
    hasty: Option<String>,
}

#[derive(Clone, Debug)]
enum Step {
    /// A pass. Each cache first catches up by its share of what it lacks; the pass crashes after some writes.
    Pass { caught_up: [u8; 3], writes: u8 },
    /// The Job controller looks at everything.
    JobController,
    /// A kubelet moves one pod on; a container that ends does so with the code.
    Kubelet { pod: u8, code: i32 },
    /// The garbage collector removes what waits for it.
    Collect,
    /// Somebody deletes a pod.
    DeletePod { pod: u8, force: bool },
    /// Somebody deletes a Job: in the foreground, the background, or leaving its pods.
    DeleteJob { job: u8, how: u8 },
    /// Somebody sets `spec.suspend`.
    Suspend(bool),
    /// A queue lets a Job run, or stops it.
    Queue { job: u8, suspended: bool },
    /// A pod's node is lost: no kubelet will ever move it on.
    LoseNode { pod: u8 },
    /// The cluster deletes the pods of lost nodes.
    Evict,
    /// Rank 0 of every stage tells a step, or tells nothing new.
    Tell { step: Option<u8> },
    /// Time passes.
    Wait(u16),
    /// Somebody sets the operator's clock, to so many minutes before or after the time.
    Clock(i16),
}

fn step() -> impl Strategy<Value = Step> {
    let code = prop_oneof![6 => Just(0), 2 => Just(75), 2 => Just(143), 2 => Just(137), 1 => Just(1), 1 => Just(70), 1 => Just(65), 1 => Just(71)];
    prop_oneof![
        10 => (any::<[u8; 3]>(), prop_oneof![3 => Just(255u8), 1 => 0..6u8]).prop_map(|(caught_up, writes)| Step::Pass { caught_up, writes }),
        8 => Just(Step::JobController),
        12 => (any::<u8>(), code).prop_map(|(pod, code)| Step::Kubelet { pod, code }),
        4 => Just(Step::Collect),
        1 => (any::<u8>(), any::<bool>()).prop_map(|(pod, force)| Step::DeletePod { pod, force }),
        1 => (any::<u8>(), 0..3u8).prop_map(|(job, how)| Step::DeleteJob { job, how }),
        1 => any::<bool>().prop_map(Step::Suspend),
        2 => (any::<u8>(), any::<bool>()).prop_map(|(job, suspended)| Step::Queue { job, suspended }),
        1 => any::<u8>().prop_map(|pod| Step::LoseNode { pod }),
        1 => Just(Step::Evict),
        2 => prop::option::of(any::<u8>()).prop_map(|step| Step::Tell { step }),
        2 => (0..400u16).prop_map(Step::Wait),
        1 => (-400..400i16).prop_map(Step::Clock),
    ]
}

impl Api {
    fn find(&self, uid: &str) -> Option<usize> {
        self.jobs.iter().position(|j| j.view.uid == uid)
    }

    fn pods_of(&self, uid: &str) -> impl Iterator<Item = &SimPod> {
        self.pods.iter().filter(move |p| p.job_uid == uid)
    }

    fn delete_pods_of(&mut self, uid: &str, now: Timestamp) {
        for pod in self.pods.iter_mut().filter(|p| p.job_uid == uid) {
            pod.delete(now);
            pod.tracked = false;
        }
    }
}

/// Changes with every change to a Job.
fn version(job: &JobView) -> String {
    format!("{job:?}")
}

impl World {
    fn new() -> Self {
        let mut job = job();
        job.spec.failure_policy.max_restarts = 2;
        job.spec.failure_policy.max_disruptions = 3;
        job.spec.failure_policy.startup_deadline_seconds = 600;
        job.spec.failure_policy.stall_seconds = STALL_SECONDS;
        job.spec.active_deadline_seconds = Some(30_000);
        job.spec.strategy.sharding = Choice::Auto;
        job.spec.strategy.offload = Choice::Auto;
        job.spec.compute.resources.limits = Some([("memory".to_owned(), Quantity("64Gi".into()))].into());
        job.metadata.resource_version = Some("0".into());
        let api = Api { job, version: 0, jobs: vec![], pods: vec![] };
        Self {
            history: vec![api.clone()],
            api,
            seen: [0; 3],
            seconds: 0,
            clock: 0,
            news_at: 0,
            made: 0,
            told: None,
            hasty: None,
        }
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + self.seconds).unwrap()
    }

    fn take(&mut self, step: &Step) {
        self.seconds += 1;
        match step {
            Step::Pass { caught_up, writes } => self.pass(*caught_up, *writes),
            Step::JobController => self.job_controller(),
            Step::Kubelet { pod, code } => self.kubelet(*pod, *code),
            Step::Collect => self.collect(),
            Step::DeletePod { pod, force } => self.delete_pod(*pod, *force),
            Step::DeleteJob { job, how } => self.delete_job(*job, *how),
            Step::Suspend(suspend) => {
                self.api.job.spec.suspend = *suspend;
                self.bump();
            }
            Step::Queue { job, suspended } => self.queue(*job, *suspended),
            Step::LoseNode { pod } => {
                let i = usize::from(*pod) % self.api.pods.len().max(1);
                if let Some(pod) = self.api.pods.get_mut(i) {
                    pod.lost = true;
                }
            }
            Step::Evict => {
                let now = self.now();
                self.api.pods.iter_mut().filter(|p| p.lost).for_each(|p| p.delete(now));
            }
            Step::Tell { step } => {
                let told = step.map(u64::from).or(self.told);
                if told != self.told {
                    (self.told, self.news_at) = (told, self.seconds);
                }
            }
            Step::Wait(seconds) => self.seconds += i64::from(*seconds),
            Step::Clock(minutes) => self.clock = 60 * i64::from(*minutes),
        }
        self.history.push(self.api.clone());
    }

    fn bump(&mut self) {
        self.api.version += 1;
        self.api.job.metadata.resource_version = Some(self.api.version.to_string());
    }

    /// One pass of the operator: observe from lagging caches, decide, write until the crash.
    fn pass(&mut self, caught_up: [u8; 3], mut writes: u8) {
        let latest = self.history.len() - 1;
        for (seen, share) in self.seen.iter_mut().zip(caught_up) {
            *seen += (latest - *seen) * usize::from(share) / 255;
        }
        let [job, jobs, pods] = self.seen.map(|i| &self.history[i]);
        let job = job.job.clone();
        let mut observed = Observed::default();
        for child in &jobs.jobs {
            let view = JobView { version: Some(version(&child.view)), ..child.view.clone() };
            observed.stages.entry(child.stage.clone()).or_default().jobs.push(view);
        }
        for pod in &pods.pods {
            observed.stages.entry(pod.stage.clone()).or_default().pods.push(pod.seen(self.now()));
        }
        for view in observed.stages.values_mut() {
            view.unchanged_for = Some(SignedDuration::from_secs(self.seconds - self.news_at));
            view.progress = self.told.map(|step| Progress {
                step,
                metrics: [("loss".to_owned(), 0.5)].into(),
                ..Default::default()
            });
        }
        self.ask_for_jobs(&job, &mut observed);
        let now = self.now() + SignedDuration::from_secs(self.clock);
        let decision = decide(&job, &observed, &settings(), now);
        if decision.touches_children() && !self.still_holds(&job, &decision) {
            return;
        }
        let mut crashed = || writes.checked_sub(1).map(|left| writes = left).is_none();
        if job.status.as_ref() != Some(&decision.status) {
            if crashed() || job.metadata.resource_version != self.api.job.metadata.resource_version {
                return;
            }
            self.api.job.status = Some(decision.status.clone());
            self.bump();
        }
        for child in &decision.delete {
            if crashed() {
                return;
            }
            if let Some(i) = self.api.find(&child.uid)
                && child.version.as_ref().is_none_or(|seen| *seen == version(&self.api.jobs[i].view))
            {
                self.api.jobs[i].view.deleting = true;
            }
        }
        for pod in &decision.lost {
            if crashed() {
                return;
            }
            let early = |p: &SimPod| p.seen(self.now()).deleting_for < GRACE + LOST_AFTER;
            if self.api.pods.iter().any(|p| p.view.uid == pod.uid && early(p)) {
                self.hasty.get_or_insert_with(|| pod.name.clone());
            }
            self.declare_failed(pod);
            if crashed() {
                return;
            }
            self.api.pods.retain(|p| p.view.uid != pod.uid || p.tracked);
        }
        for children in &decision.make {
            if crashed() {
                return;
            }
            self.create(children);
        }
    }

    fn declare_failed(&mut self, lost: &PodRef) {
        for pod in self.api.pods.iter_mut().filter(|p| p.view.uid == lost.uid) {
            pod.view.disruption = Some("NodeLost".into());
            pod.view.state = PodState::Ended(End { code: None, oom_killed: false, word: None, text: None, at: None });
        }
    }

    /// As [`crate::observe::observe`] does for a current attempt's Job of which the store may not tell all.
    fn ask_for_jobs(&self, job: &RLHFJob, observed: &mut Observed) {
        let status = job.status.clone().unwrap_or_default();
        for slot in status.slots() {
            let view = observed.stages.entry(slot.name.clone()).or_default();
            let live = matches!(slot.phase, StagePhase::Starting | StagePhase::Running);
            if live && view.lacks_word_of(slot) {
                let found = self.api.jobs.iter().find(|j| j.stage == slot.name && j.view.attempt == slot.attempt);
                view.learn(found.map(|j| j.view.clone()));
            }
        }
    }

    /// As [`crate::observe::still_holds`].
    fn still_holds(&self, job: &RLHFJob, decision: &Decision) -> bool {
        let clear = |c: &Children| {
            if c.first {
                return true;
            }
            let jobs = self.api.jobs.iter().filter(|j| j.stage == c.stage).map(|j| j.view.clone()).collect();
            let pods = self.api.pods.iter().filter(|p| p.stage == c.stage).map(|p| p.view.clone()).collect();
            let attempt = c.job.labels()[names::LABEL_ATTEMPT].parse().unwrap();
            StageView { jobs, pods, ..Default::default() }.is_clear_for(attempt)
        };
        let written = job.status.as_ref() != Some(&decision.status);
        let current = job.metadata.resource_version == self.api.job.metadata.resource_version;
        (written || current) && decision.make.iter().all(clear)
    }

    fn create(&mut self, children: &Children) {
        let name = children.job.name_any();
        if self.api.jobs.iter().any(|j| j.view.name == name) {
            return;
        }
        self.made += 1;
        let mut job = children.job.clone();
        job.metadata.uid = Some(format!("uid-{}", self.made));
        let view = JobView::parse(&job).unwrap();
        self.api.jobs.push(SimJob { stage: children.stage.clone(), view });
    }

    fn job_controller(&mut self) {
        let now = self.now();
        for i in 0..self.api.jobs.len() {
            if self.api.jobs[i].view.deleting || self.api.jobs[i].view.finished() {
                continue;
            }
            let own = &mut self.api.jobs[i].view;
            own.started = if own.suspended { None } else { own.started.or(Some(now)) };
            let SimJob { stage, view } = self.api.jobs[i].clone();
            let bad = |p: &SimPod| p.tracked && p.view.ended().is_some() && !p.view.succeeded();
            let state = &mut self.api.jobs[i].view.state;
            if *state == JobState::Active && self.api.pods.iter().any(|p| p.job_uid == view.uid && bad(p)) {
                *state = JobState::Failing;
            }
            if *state == JobState::Failing {
                self.stop(&view.uid, now);
                if self.api.pods_of(&view.uid).all(|p| p.view.ended().is_some()) {
                    self.api.jobs[i].view.state = JobState::Failed;
                }
                continue;
            }
            let succeeded = self.api.pods_of(&view.uid).filter(|p| p.view.succeeded()).count() as u32;
            let counted = &mut self.api.jobs[i].view.succeeded;
            *counted = (*counted).max(succeeded);
            if *counted >= view.pods {
                self.api.jobs[i].view.state = JobState::Complete;
            } else if view.suspended {
                self.stop(&view.uid, now);
            } else {
                self.fill(&stage, &view);
            }
        }
    }

    /// Deletes pods that have not ended, uncounted, as the Job controller does.
    fn stop(&mut self, uid: &str, now: Timestamp) {
        for pod in self.api.pods.iter_mut().filter(|p| p.job_uid == uid && p.view.ended().is_none()) {
            pod.delete(now);
            pod.tracked = false;
        }
    }

    /// Makes pods for the indexes that have none.
    fn fill(&mut self, stage: &str, job: &JobView) {
        for index in 0..job.pods {
            if self.api.pods_of(&job.uid).any(|p| p.view.index == index) {
                continue;
            }
            self.made += 1;
            let view = PodView {
                name: format!("{}-{index}-{}", job.name, self.made),
                uid: format!("uid-{}", self.made),
                attempt: job.attempt,
                index,
                node: None,
                ip: None,
                deletion_requested: None,
                grace: SignedDuration::ZERO,
                deleting_for: SignedDuration::ZERO,
                disruption: None,
                state: PodState::Waiting(None),
            };
            self.api.pods.push(SimPod {
                stage: stage.into(),
                job_uid: job.uid.clone(),
                view,
                tracked: true,
                lost: false,
            });
        }
    }

    fn kubelet(&mut self, pick: u8, code: i32) {
        let now = self.now();
        let live: Vec<_> = (0..self.api.pods.len())
            .filter(|i| self.api.pods[*i].view.ended().is_none() && !self.api.pods[*i].lost)
            .collect();
        let Some(&i) = live.get(usize::from(pick) % live.len().max(1)) else { return };
        let pod = &mut self.api.pods[i].view;
        let told = pod.deletion_requested.is_some();
        pod.state = match pod.state {
            PodState::Waiting(_) if !told => PodState::Running,
            _ => PodState::Ended(End {
                code: Some(if told && code == 0 { 143 } else { code }),
                oom_killed: false,
                word: (code == 0).then(|| word_of_prepare(64)),
                text: None,
                at: Some(now),
            }),
        };
    }

    /// Removes ended pods whose deletion was asked for, and Jobs that wait for nothing.
    fn collect(&mut self) {
        let now = self.now();
        for uid in self.api.jobs.iter().filter(|j| j.view.deleting).map(|j| j.view.uid.clone()).collect::<Vec<_>>() {
            self.api.delete_pods_of(&uid, now);
        }
        self.api.pods.retain(|p| p.view.deletion_requested.is_none() || p.view.ended().is_none() || p.tracked);
        let pods = self.api.pods.clone();
        self.api.jobs.retain(|j| !j.view.deleting || pods.iter().any(|p| p.job_uid == j.view.uid));
        let jobs: Vec<_> = self.api.jobs.iter().map(|j| (j.view.uid.clone(), j.view.state.clone())).collect();
        for pod in &mut self.api.pods {
            // Counted, or nobody is left to count.
            let owner = jobs.iter().find(|(uid, _)| *uid == pod.job_uid);
            pod.tracked &= owner.is_some_and(|(_, state)| *state == JobState::Active);
        }
    }

    fn delete_pod(&mut self, pick: u8, force: bool) {
        if self.api.pods.is_empty() {
            return;
        }
        let i = usize::from(pick) % self.api.pods.len();
        if force {
            self.api.pods.remove(i);
        } else {
            let now = self.now();
            self.api.pods[i].delete(now);
        }
    }

    fn delete_job(&mut self, pick: u8, how: u8) {
        if self.api.jobs.is_empty() {
            return;
        }
        let i = usize::from(pick) % self.api.jobs.len();
        match how {
            0 => self.api.jobs[i].view.deleting = true,
            _ => {
                let gone = self.api.jobs.remove(i);
                if how == 1 {
                    let now = self.now();
                    self.api.delete_pods_of(&gone.view.uid, now);
                }
            }
        }
    }

    fn queue(&mut self, pick: u8, suspended: bool) {
        let i = usize::from(pick) % self.api.jobs.len().max(1);
        if let Some(job) = self.api.jobs.get_mut(i).filter(|j| j.view.state == JobState::Active) {
            job.view.suspended = suspended;
        }
    }

    fn status(&self) -> RLHFJobStatus {
        self.api.job.status.clone().unwrap_or_default()
    }

    /// The promises that hold in every state.
    fn check(&self, before: &RLHFJobStatus) -> Result<(), TestCaseError> {
        let after = self.status();
        prop_assert_eq!(&self.hasty, &None, "a pod is taken for lost too soon");
        for stage in ["prepare", "tune", "judge", "act"] {
            let jobs = self.api.jobs.iter().filter(|j| j.stage == stage && !j.view.deleting && !j.view.finished());
            let pods = self.api.pods.iter().filter(|p| p.stage == stage && p.view.ended().is_none());
            let live: std::collections::BTreeSet<_> =
                jobs.map(|j| j.view.attempt).chain(pods.map(|p| p.view.attempt)).collect();
            prop_assert!(live.len() <= 1, "{stage}: attempts {live:?} are live");
            let slot = |s: &RLHFJobStatus| s.slot(stage).cloned().unwrap_or_default();
            let (old, new) = (slot(before), slot(&after));
            prop_assert!(
                new.attempt >= old.attempt && new.restarts.total >= old.restarts.total,
                "{stage}: {old:?} -> {new:?}"
            );
            prop_assert!(new.disruptions >= old.disruptions && new.bugs >= old.bugs, "{stage}: {old:?} -> {new:?}");
            prop_assert!(
                new.restarts.since_progress <= 2 && new.disruptions <= 3,
                "{stage}: budgets are kept: {new:?}"
            );
            prop_assert!(
                new.attempt <= 1 + new.restarts.total + new.disruptions,
                "{stage}: each attempt has its reason: {new:?}"
            );
            let newest = self.api.jobs.iter().filter(|j| j.stage == stage).map(|j| j.view.attempt).max();
            prop_assert!(
                newest.unwrap_or(0) <= new.attempt,
                "{stage}: attempt {newest:?} was made before its number was written"
            );
            prop_assert!(
                stage == "prepare" || new.attempt == 0 || new.plan.is_some(),
                "{stage} started without a plan"
            );
            let stalled = |s: &StageStatus| {
                s.last_failure.as_ref().filter(|f| f.reason == Reason::Stalled.as_str()).map(|f| f.attempt)
            };
            prop_assert!(
                stalled(&new).is_none()
                    || stalled(&old) == stalled(&new)
                    || self.seconds - self.news_at >= STALL_SECONDS.into(),
                "{stage}: an attempt that told something {} s ago is taken for stalled",
                self.seconds - self.news_at
            );
            if let (Some(old), Some(new)) = (old.plan, new.plan) {
                let need = |plan: StagePlan| plan.host_bytes + 2 * plan.device_bytes;
                prop_assert!(old == new || need(new) < need(old), "{stage}: {old:?} -> {new:?}");
            }
            if matches!(old.phase, StagePhase::Succeeded | StagePhase::Failed) {
                prop_assert_eq!(old, new, "a final stage stays as it is");
            }
        }
        let holds = |kind: &str| after.conditions.iter().any(|c| c.type_ == kind && c.status == "True");
        prop_assert_eq!(holds(names::CONDITION_COMPLETE), after.phase == Phase::Succeeded);
        prop_assert_eq!(holds(names::CONDITION_FAILED), after.phase == Phase::Failed);
        let passing = [names::CONDITION_SUSPENDED, names::CONDITION_WAITING, names::CONDITION_ATTEMPT_STALLED];
        prop_assert!(!after.phase.is_terminal() || !passing.into_iter().any(holds), "{:?}", after.conditions);
        if before.phase.is_terminal() {
            prop_assert_eq!(before, &after, "a terminal job stays as it is");
        }
        prop_assert_eq!(after.restarts, after.slots().map(|s| s.restarts.total).sum::<u32>());
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.status().phase.is_terminal() && self.api.jobs.iter().all(|j| j.view.finished())
    }

    /// Everybody does their part, and pods succeed where their nodes are not lost.
    fn friendly_steps(&self) -> Vec<Step> {
        let mut steps = vec![Step::Suspend(false), Step::Clock(0)];
        for _ in 0..60 {
            let everywhere =
                (0..16).flat_map(|pod| [Step::Kubelet { pod, code: 0 }, Step::Kubelet { pod: 0, code: 0 }]);
            steps.extend([Step::Wait(301), Step::Pass { caught_up: [255; 3], writes: 255 }]);
            steps.extend((0..4).map(|job| Step::Queue { job, suspended: false }));
            steps.push(Step::JobController);
            steps.extend(everywhere);
            steps.extend([Step::JobController, Step::Collect, Step::Evict]);
        }
        steps
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn case_11_whatever_happens_the_promises_hold_and_the_job_comes_to_its_end(steps in prop::collection::vec(step(), 0..150)) {
        let mut world = World::new();
        for step in &steps {
            let before = world.status();
            world.take(step);
            world.check(&before)?;
        }
        for step in world.friendly_steps() {
            if world.is_over() {
                break;
            }
            let before = world.status();
            world.take(&step);
            world.check(&before)?;
        }
        prop_assert!(world.status().phase.is_terminal(), "{:#?}", world.status());
        prop_assert!(world.is_over(), "no Job is left running");
        let quiet = decide(&world.api.job, &Observed::default(), &settings(), world.now());
        prop_assert!(Some(&quiet.status) == world.api.job.status.as_ref() && !quiet.touches_children());
    }
}
