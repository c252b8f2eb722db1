//! The rules in a small world that does its worst.
//!
//! In a [`cluster`] of the API's own objects the operator's passes see caches that lag each on their own, and crash between
//! any two writes. They see through the parsers of [`crate::view`], as real ones do. After every step the promises of
//! [`super`] are checked; at the end the world turns friendly, and the job must come to its end.

mod cluster;

use self::cluster::{Api, Ending, GRACE, Stranger, view as pod_view};
use super::*;
use crate::build::tests::{job, settings};
use crate::classify::Reason;
use crate::decide::tests::planning::word_of_prepare;
use crate::view::{JobView, PodView};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt;
use proptest::prelude::*;
use rlhf_api::choice::Choice;
use rlhf_api::job::{Phase, StagePhase, StagePlan};
use rlhf_api::report::Progress;

const STALL_SECONDS: u32 = 900;

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
    /// What every rank 0 that runs says.
    told: Option<u64>,
    /// Nodes whose kubelets do nothing any more, and those of them that somebody has declared to be down.
    lost: Vec<String>,
    out_of_service: Vec<String>,
    /// Whether the API server refuses Jobs now, and for good.
    refuses: Option<bool>,
    /// What it has refused, with the time of the next try.
    troubles: Vec<(Trouble, i64)>,
    /// A pod that was taken for lost while it may have run.
    hasty: Option<String>,
    /// A stage that runs for the operator although it has seen every trainer of it end well.
    missed: Option<String>,
    /// What a prepare that ends well says.
    word: String,
}

#[derive(Clone, Debug)]
enum Step {
    /// A pass. Each cache first catches up by its share of what it lacks; the pass crashes after some writes.
    Pass { caught_up: [u8; 3], writes: u8 },
    /// The Job controller looks at everything.
    JobController,
    /// A kubelet moves one pod on; a trainer that ends does so in this way.
    Kubelet { pod: u8, ending: Ending },
    /// The garbage collector removes what waits for it.
    Collect,
    /// Somebody deletes a pod.
    DeletePod { pod: u8, force: bool },
    /// Somebody deletes a Job: in the foreground, the background, or leaving its pods.
    DeleteJob { job: u8, how: u8 },
    /// Somebody makes a pod with the labels of one of the job's.
    Strangers { job: u8, stranger: Stranger },
    /// Somebody sets `spec.suspend`.
    Suspend(bool),
    /// A queue lets a Job run, or stops it.
    Queue { job: u8, suspended: bool },
    /// The API server begins to refuse Jobs, perhaps for good, or ceases to.
    Refuse(Option<bool>),
    /// A pod's node is lost: no kubelet will ever move it on.
    LoseNode { pod: u8 },
    /// The cluster deletes the pods of lost nodes.
    Evict,
    /// Somebody declares the lost nodes to be down.
    Taint,
    /// Rank 0 of every stage tells a step, or tells nothing new.
    Tell { step: Option<u8> },
    /// Time passes.
    Wait(u16),
    /// Somebody sets the operator's clock, to so many minutes before or after the time.
    Clock(i16),
}

fn ending() -> impl Strategy<Value = Ending> {
    let code = |code| Just(Ending::Code(code));
    prop_oneof![
        6 => code(0), 2 => code(75), 2 => code(143), 2 => code(137), 1 => code(1), 1 => code(70), 1 => code(65),
        1 => code(71), 2 => prop_oneof![Just(0), Just(1), Just(71), Just(75)].prop_map(Ending::SidecarLives),
        1 => Just(Ending::Muddled), 1 => Just(Ending::SidecarFails), 1 => Just(Ending::Evicted),
        1 => Just(Ending::Disrupted), 1 => Just(Ending::Refused), 1 => Just(Ending::Lost),
    ]
}

fn stranger() -> impl Strategy<Value = Stranger> {
    prop_oneof![Just(Stranger::OfAJob), Just(Stranger::OfAReplicaSet), Just(Stranger::Bare)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => (any::<[u8; 3]>(), prop_oneof![3 => Just(255u8), 1 => 0..6u8]).prop_map(|(caught_up, writes)| Step::Pass { caught_up, writes }),
        8 => Just(Step::JobController),
        12 => (any::<u8>(), ending()).prop_map(|(pod, ending)| Step::Kubelet { pod, ending }),
        4 => Just(Step::Collect),
        1 => (any::<u8>(), any::<bool>()).prop_map(|(pod, force)| Step::DeletePod { pod, force }),
        1 => (any::<u8>(), 0..3u8).prop_map(|(job, how)| Step::DeleteJob { job, how }),
        1 => (any::<u8>(), stranger()).prop_map(|(job, stranger)| Step::Strangers { job, stranger }),
        1 => any::<bool>().prop_map(Step::Suspend),
        2 => (any::<u8>(), any::<bool>()).prop_map(|(job, suspended)| Step::Queue { job, suspended }),
        1 => prop_oneof![2 => Just(None), 3 => Just(Some(false)), 1 => Just(Some(true))].prop_map(Step::Refuse),
        1 => any::<u8>().prop_map(|pod| Step::LoseNode { pod }),
        1 => Just(Step::Evict),
        1 => Just(Step::Taint),
        2 => prop::option::of(any::<u8>()).prop_map(|step| Step::Tell { step }),
        2 => (0..400u16).prop_map(Step::Wait),
        1 => (-400..400i16).prop_map(Step::Clock),
    ]
}

impl World {
    fn new() -> Self {
        let mut job = job();
        job.spec.failure_policy.max_restarts = 1;
        job.spec.failure_policy.max_disruptions = 1;
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
            told: None,
            lost: vec![],
            out_of_service: vec![],
            refuses: None,
            troubles: vec![],
            hasty: None,
            missed: None,
            word: word_of_prepare(64).to_bounded_json(),
        }
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + self.seconds).unwrap()
    }

    fn take(&mut self, step: &Step) {
        self.seconds += 1;
        let now = self.now();
        match step {
            Step::Pass { caught_up, writes } => self.pass(*caught_up, *writes),
            Step::JobController => self.api.job_controller(now),
            Step::Kubelet { pod, ending } => self.api.kubelet(*pod, *ending, &self.lost, &self.word, now),
            Step::Collect => self.api.collect(now),
            Step::DeletePod { pod, force } => self.api.meddle_with_pod(*pod, *force, now),
            Step::DeleteJob { job, how } => self.api.meddle_with_job(*job, *how, now),
            Step::Strangers { job, stranger } => self.api.strangers(*job, *stranger, now),
            Step::Suspend(suspend) => {
                self.api.job.spec.suspend = *suspend;
                self.api.bump();
            }
            Step::Queue { job, suspended } => self.api.queue(*job, *suspended),
            Step::Refuse(how) => self.refuses = *how,
            Step::LoseNode { pod } => {
                let i = usize::from(*pod) % self.api.pods.len().max(1);
                self.lost.extend(self.api.pods.get(i).and_then(|p| pod_view(p).node));
            }
            Step::Evict => {
                let on_lost = |p: &PodView| p.node.as_ref().is_some_and(|n| self.lost.contains(n));
                let all = self.api.pods.iter().map(|p| pod_view(p)).filter(on_lost);
                for pod in all.collect::<Vec<_>>() {
                    self.api.delete_pod(&pod.uid, now);
                }
            }
            Step::Taint => self.out_of_service = self.lost.clone(),
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

    /// A pod as the operator sees it, which knows of its deletion since it was asked for.
    fn parsed(&self, pod: &k8s_openapi::api::core::v1::Pod) -> PodView {
        let view = pod_view(pod);
        let asked = view.deletion_requested;
        PodView { deleting_for: asked.map_or(SignedDuration::ZERO, |at| self.now().duration_since(at)), ..view }
    }

    /// As [`crate::observe::observe`] does: from caches, and from the API server where those cannot tell.
    fn observe(&self, job: &RLHFJob, jobs: &Api, pods: &Api) -> Observed {
        let pods = || pods.pods.iter().map(|p| self.parsed(p)).collect();
        let mut jobs: Vec<JobView> = jobs.jobs.iter().map(|j| cluster::job_view(j)).collect();
        let status = job.status.clone().unwrap_or_default();
        let mut seen = view::stages(job, jobs.clone(), pods());
        for slot in ask::live(&status) {
            if ask::for_job(slot, seen.entry(slot.name.clone()).or_default()) {
                let name = view::attempt(job, &slot.name, slot.attempt);
                let found = self.api.jobs.iter().find(|j| j.name_any() == name).map(|j| cluster::job_view(j));
                jobs.retain(|j| found.as_ref().is_none_or(|f| f.uid != j.uid));
                jobs.extend(found);
            }
        }
        seen = view::stages(job, jobs, pods());
        for view in seen.values_mut() {
            view.unchanged_for = Some(SignedDuration::from_secs(self.seconds - self.news_at));
            view.progress = self.told.map(|step| Progress {
                step,
                metrics: [("loss".to_owned(), 0.5)].into(),
                ..Default::default()
            });
        }
        let made = |t: &Trouble| seen.get(&t.stage).is_some_and(|view| view.job(t.attempt).is_some());
        let troubles = self.troubles.iter().filter(|(t, _)| !made(t)).map(|(t, due)| {
            let retry_after = SignedDuration::from_secs((due - self.seconds).max(0));
            Trouble { retry_after, ..t.clone() }
        });
        let down =
            |node: &String| if self.out_of_service.contains(node) { NodeState::OutOfService } else { NodeState::There };
        let nodes = ask::for_nodes(&seen).into_iter().map(|node| (node.clone(), down(&node))).collect();
        Observed { troubles: troubles.collect(), nodes, stages: seen, device_memory: BTreeMap::new() }
    }

    /// As [`crate::observe::still_holds`] and [`crate::observe::leave_out_blocked`].
    fn still_holds(&self, job: &RLHFJob, decision: &mut Decision) -> bool {
        let clear = |c: &Children| {
            let (jobs, pods) = self.api.of_stage(&c.stage);
            let attempt = c.job.labels()[names::LABEL_ATTEMPT].parse().unwrap();
            c.first || view::stages(job, jobs, pods).get(&c.stage).is_none_or(|view| view.is_clear_for(attempt))
        };
        let written = job.status.as_ref() != Some(&decision.status);
        let current = job.metadata.resource_version == self.api.job.metadata.resource_version;
        decision.make.retain(clear);
        written || current
    }

    /// One pass of the operator: observe from lagging caches, decide, write until the crash.
    fn pass(&mut self, caught_up: [u8; 3], mut writes: u8) {
        let latest = self.history.len() - 1;
        for (seen, share) in self.seen.iter_mut().zip(caught_up) {
            *seen += (latest - *seen) * usize::from(share) / 255;
        }
        let [job, jobs, pods] = self.seen.map(|i| &self.history[i]);
        let job = job.job.clone();
        let observed = self.observe(&job, jobs, pods);
        let now = self.now();
        let mut decision = decide(&job, &observed, &settings(), now + SignedDuration::from_secs(self.clock));
        let outdated = newer_child(&job.status.clone().unwrap_or_default(), &observed).is_some();
        let done = |slot: &&StageStatus| slot.phase == StagePhase::Running && all_ended_well(slot, &observed);
        let missed = decision.status.slots().find(done).map(|slot| slot.name.clone()).filter(|_| !outdated);
        self.missed = self.missed.take().or(missed);
        if decision.touches_children() && !self.still_holds(&job, &mut decision) {
            return;
        }
        let mut crashed = || writes.checked_sub(1).map(|left| writes = left).is_none();
        if job.status.as_ref() != Some(&decision.status) {
            if crashed() || job.metadata.resource_version != self.api.job.metadata.resource_version {
                return;
            }
            self.api.job.status = Some(decision.status.clone());
            self.api.bump();
        }
        for child in &decision.delete {
            if crashed() {
                return;
            }
            self.api.delete_job(&child.uid, child.version.as_ref(), now);
        }
        for pod in &decision.orphans {
            if crashed() {
                return;
            }
            self.api.delete_pod(&pod.uid, now);
        }
        for pod in &decision.lost {
            if crashed() {
                return;
            }
            self.give_up(pod);
            if crashed() {
                return;
            }
            self.api.remove(&pod.uid);
        }
        for children in &decision.make {
            if crashed() {
                return;
            }
            self.make(children, &decision.status);
        }
    }

    fn give_up(&mut self, pod: &PodRef) {
        let down = pod.node.as_ref().is_some_and(|node| self.out_of_service.contains(node));
        let early = |p: &PodView| p.deleting_for < SignedDuration::from_secs(GRACE) + LOST_AFTER;
        let found = self.api.pods.iter().map(|p| self.parsed(p)).find(|p| p.uid == pod.uid);
        if found.is_some_and(|p| !down || early(&p)) {
            self.hasty.get_or_insert_with(|| pod.name.clone());
        }
        self.api.declare_failed(&pod.uid);
    }

    fn make(&mut self, children: &Children, status: &RLHFJobStatus) {
        let attempt = status.slot(&children.stage).map_or(0, |s| s.attempt);
        self.troubles.retain(|(t, _)| t.stage != children.stage);
        match self.refuses {
            None => self.api.create(&children.job, self.now()),
            Some(permanent) => {
                let trouble = Trouble {
                    stage: children.stage.clone(),
                    attempt,
                    message: "the API server says no".into(),
                    retry_after: SignedDuration::ZERO,
                    permanent,
                    is_news: true,
                };
                self.troubles.push((trouble, self.seconds + 5));
            }
        }
    }

    fn status(&self) -> RLHFJobStatus {
        self.api.job.status.clone().unwrap_or_default()
    }

    /// The promises that hold in every state.
    fn check(&self, before: &RLHFJobStatus) -> Result<(), TestCaseError> {
        let after = self.status();
        prop_assert_eq!(&self.hasty, &None, "a pod is taken for lost that may run");
        prop_assert_eq!(&self.missed, &None, "every trainer has ended well");
        let text = serde_json::to_string(&after).unwrap();
        prop_assert!(!text.contains("foreign words"), "what somebody else's pod says is believed: {text}");
        for stage in ["prepare", "tune", "judge", "act"] {
            self.check_stage(stage, before, &after)?;
        }
        let holds = |kind: &str| after.conditions.iter().any(|c| c.type_ == kind && c.status == "True");
        prop_assert_eq!(holds(names::CONDITION_COMPLETE), after.phase == Phase::Succeeded);
        prop_assert_eq!(holds(names::CONDITION_FAILED), after.phase == Phase::Failed);
        prop_assert_eq!(holds(names::CONDITION_STALLED), after.phase == Phase::Failed);
        let runs = after.stages.iter().any(|s| s.phase == StagePhase::Running);
        prop_assert!(after.phase != Phase::Running || runs, "it runs while nothing does");
        let passing = [names::CONDITION_SUSPENDED, names::CONDITION_WAITING, names::CONDITION_ATTEMPT_STALLED];
        let passing = passing.into_iter().chain([names::CONDITION_RECONCILING]);
        prop_assert!(!after.phase.is_terminal() || !passing.into_iter().any(holds), "{:?}", after.conditions);
        prop_assert!(after.phase != Phase::Waiting || holds(names::CONDITION_WAITING), "{:?}", after.conditions);
        let open =
            |s: &StageStatus| matches!(s.phase, StagePhase::Pending | StagePhase::Starting | StagePhase::Running);
        prop_assert!(!after.phase.is_terminal() || !after.slots().any(open), "{:?}", after);
        if before.phase.is_terminal() {
            prop_assert_eq!(before, &after, "a terminal job stays as it is");
        }
        prop_assert_eq!(after.restarts, after.slots().map(|s| s.restarts.total).sum::<u32>());
        Ok(())
    }

    fn check_stage(&self, stage: &str, before: &RLHFJobStatus, after: &RLHFJobStatus) -> Result<(), TestCaseError> {
        let (jobs, pods) = self.api.of_stage(stage);
        let live_jobs = jobs.iter().filter(|j| !j.deleting && !j.finished()).map(|j| j.attempt);
        let ours = pods.iter().filter(|p| !p.name.starts_with(cluster::FOREIGN));
        let live_pods = ours.filter(|p| p.ended().is_none()).map(|p| p.attempt);
        let live: std::collections::BTreeSet<_> = live_jobs.chain(live_pods).collect();
        prop_assert!(live.len() <= 1, "{stage}: attempts {live:?} are live");
        let slot = |s: &RLHFJobStatus| s.slot(stage).cloned().unwrap_or_default();
        let (old, new) = (slot(before), slot(after));
        let grows = |count: fn(&StageStatus) -> u32| count(&new) >= count(&old);
        prop_assert!(grows(|s| s.attempt) && grows(|s| s.restarts.total), "{stage}: {old:?} -> {new:?}");
        prop_assert!(grows(|s| s.disruptions) && grows(|s| s.bugs), "{stage}: {old:?} -> {new:?}");
        prop_assert!(new.restarts.since_progress <= 1 && new.disruptions <= 1, "{stage}: budgets are kept: {new:?}");
        prop_assert!(
            new.attempt <= 1 + new.restarts.total + new.disruptions,
            "{stage}: each attempt has its reason: {new:?}"
        );
        prop_assert!(new.attempts.len() <= rlhf_api::job::MAX_ATTEMPTS, "{stage}: {new:?}");
        let newest = jobs.iter().map(|j| j.attempt).max();
        prop_assert!(
            newest.unwrap_or(0) <= new.attempt,
            "{stage}: attempt {newest:?} was made before its number was written"
        );
        prop_assert!(stage == "prepare" || new.attempt == 0 || new.plan.is_some(), "{stage} started without a plan");
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
        if matches!(old.phase, StagePhase::Succeeded | StagePhase::Failed | StagePhase::Stopped) {
            prop_assert_eq!(old, new, "a final stage stays as it is");
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        let finished = self.api.jobs.iter().all(|j| cluster::job_view(j).finished());
        self.status().phase.is_terminal() && finished
    }

    /// Everybody does their part, and pods succeed where their nodes are not lost.
    fn friendly_steps(&self) -> Vec<Step> {
        let mut steps = vec![Step::Suspend(false), Step::Clock(0), Step::Refuse(None)];
        let well = |pod| Step::Kubelet { pod, ending: Ending::Code(0) };
        for _ in 0..60 {
            steps.extend([Step::Wait(301), Step::Pass { caught_up: [255; 3], writes: 255 }]);
            steps.extend((0..4).map(|job| Step::Queue { job, suspended: false }));
            steps.push(Step::JobController);
            steps.extend((0..16).flat_map(|pod| [well(pod), well(0)]));
            steps.extend([Step::JobController, Step::Collect, Step::Evict, Step::Taint]);
        }
        steps
    }
}

/// Whether every pod that the attempt's Job wants is there, and its trainer has ended well.
fn all_ended_well(slot: &StageStatus, observed: &Observed) -> bool {
    let Some(view) = observed.stages.get(&slot.name) else { return false };
    let ended = |job: &JobView| view.pods.iter().filter(|p| p.attempt == job.attempt && p.succeeded()).count();
    let lingers = view.pods.iter().any(|p| p.attempt == slot.attempt && p.ended().is_none());
    !lingers && view.job(slot.attempt).is_some_and(|job| job.pods > 0 && ended(job) >= job.pods as usize)
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
