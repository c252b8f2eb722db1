//! How a stage's models are placed: by the spec's strategy, the model's shape, and the memory there is.
//!
//! All stages are planned once prepare is done, so that a job of which a later stage fits nowhere is refused before an
//! earlier one has taken a device. Where memory runs out in spite of a plan, the next attempt takes the next setting
//! that takes less, within what the spec leaves open. The arithmetic is [`memory_plan`]'s, and so the trainer's own.

use super::status::is_active;
use super::transition::{pending_left, waited_too_long};
use super::{Defeat, DeviceMemory, Event, Pass};
use crate::build;
use crate::classify::Reason;
use crate::view::Wait;
use jiff::SignedDuration;
use memory_plan::{Fixed, Machines, Named, Scorer, Stage as StageShape, Task, Verdict};
use rlhf_api::job::RLHFJobStatus;
use rlhf_api::job::{Compute, PlanSource, Stage, StagePhase, StagePlan, StageStatus};
use rlhf_api::model::ModelSpec;
use rlhf_api::names;
use rlhf_api::reference::ModelRef;
use rlhf_api::report::{ExitCode, Prepared};
use rlhf_api::stage::{Lora, StageKind, Strategy};

/// The resource whose limit is a pod's host memory.
const MEMORY: &str = "memory";

/// What a stage trains, on what, and what the spec says of how.
struct Question {
    task: Task,
    machines: Machines,
    fixed: Fixed,
    /// As far as they are known, which `machines` cannot say.
    device_memory: Option<u64>,
    host_memory: Option<u64>,
}

/// Why a stage has no plan.
enum Unplanned {
    /// There is none, whatever the cluster has.
    Unfit(String),
    /// The cluster has nodes that tell too little, or none that tell; that may change.
    Waits(Wait),
}

/// How often nodes are asked that are not there yet.
const NODES_PERIOD: SignedDuration = SignedDuration::from_secs(60);

impl<'a> Pass<'a> {
    /// Keeps what prepare found out.
    pub(super) fn note_prepared(&self, status: &mut RLHFJobStatus) {
        if status.prepared.is_none()
            && let Some(slot) = status.prepare.as_ref().filter(|p| p.phase == StagePhase::Succeeded)
        {
            status.prepared = self.prepared(slot.attempt);
        }
    }

    /// What an attempt at prepare said that it found out.
    pub(super) fn prepared(&self, attempt: u32) -> Option<Prepared> {
        let mut ends = self.view(names::PREPARE).pods_of(attempt).filter_map(|p| p.ended());
        ends.find_map(|end| end.word.as_ref()?.prepared.as_deref().cloned())
    }

    /// Plans the stages that have no plan yet, or whose plan answers another question than the spec asks now. What the spec
    /// itself lets fit nowhere ends the job. What nodes tell is no more than what is so now: a pool may grow, and a node that
    /// has just come has not told yet. That is waited for, before anything takes a device.
    pub(super) fn plan_stages(&mut self, before: &RLHFJobStatus, status: &mut RLHFJobStatus) {
        let Some(prepared) = status.prepared.clone() else { return };
        let changed = before.observed_generation != status.observed_generation;
        // All of them at once, for only this pass knows of the change, and the planning may not come to the end.
        for slot in status.stages.iter_mut().filter(|_| changed) {
            if self.stage(&slot.name).is_some_and(|stage| self.is_outdated(slot, stage, &prepared)) {
                slot.plan = None;
            }
        }
        let nothing_runs = !status.slots().any(is_active);
        for slot in &mut status.stages {
            let Some(stage) = self.stage(&slot.name) else { continue };
            if slot.plan.is_some() {
                continue;
            }
            match self.plan(stage, &prepared) {
                Ok(plan) => {
                    slot.plan = plan;
                    if slot.phase == StagePhase::Pending {
                        slot.pending_since = None;
                    }
                }
                Err(Unplanned::Unfit(message)) => {
                    self.defeat = Some(Defeat { reason: "DoesNotFit", message });
                    return;
                }
                Err(Unplanned::Waits(wait)) => return self.await_nodes(slot, wait, nothing_runs),
            }
        }
    }

    /// Waits for nodes before a stage can be planned. That is no other wait than that of pods for room, and is bounded as it is,
    /// but for a job of which something runs.
    fn await_nodes(&mut self, slot: &mut StageStatus, wait: Wait, nothing_runs: bool) {
        let is_bounded = nothing_runs && !self.job.spec.suspend;
        if slot.phase == StagePhase::Pending {
            slot.pending_since = is_bounded.then(|| slot.pending_since.unwrap_or(self.now));
        }
        if is_bounded {
            if let Some(said) = waited_too_long(self, slot, || wait.to_string()) {
                let reason = Reason::PendingTimeout.as_str();
                let message = format!("given up: {}: {reason}: {said}", slot.name);
                self.defeat = Some(Defeat { reason, message });
                return;
            }
            pending_left(self, slot).iter().for_each(|left| self.decision.look_again(*left));
        }
        self.obstacle = Some(wait);
        self.decision.look_again(NODES_PERIOD);
    }

    /// Whether the spec has changed so that the plan is none of it any more: its settings, its memory, or what it takes on as
    /// many devices. Only the next attempt can have another.
    fn is_outdated(&self, slot: &StageStatus, stage: &Stage, prepared: &Prepared) -> bool {
        let made = self.view(&slot.name).job(slot.attempt).is_some_and(|job| !job.deleting);
        let waits = slot.phase == StagePhase::Pending || (slot.phase == StagePhase::Starting && !made);
        let (Some(plan), true) = (slot.plan, waits) else { return false };
        let Some(question) = self.question(stage, prepared, plan.device_memory_bytes) else { return true };
        let Fixed { precision, sharding, offload, recompute } = question.fixed;
        let now = memory_plan::estimate(&question.task, &question.machines, plan.strategy);
        let same = plan.strategy.precision == precision
            && sharding.is_none_or(|s| s == plan.strategy.sharding)
            && offload.is_none_or(|o| o == plan.strategy.offload)
            && recompute.is_none_or(|r| r == plan.strategy.recompute)
            && (plan.device_memory_bytes, plan.host_memory_bytes) == (question.device_memory, question.host_memory)
            && (plan.device_bytes, plan.host_bytes) == (now.device.total() as u64, now.host.total() as u64);
        !same
    }

    /// Whether a strategy of the job is left to the operator.
    pub(super) fn has_auto(&self) -> bool {
        self.job.spec.stages.iter().any(|stage| self.job.strategy(stage).has_auto())
    }

    /// The strategy that a stage's attempt is given.
    pub(super) fn strategy_of(&self, slot: &StageStatus) -> Option<Strategy> {
        let written = || self.job.strategy(self.stage(&slot.name)?).fixed();
        slot.plan.map(|plan| plan.strategy).or_else(written)
    }

    pub(super) fn stage(&self, name: &str) -> Option<&'a Stage> {
        self.job.spec.stages.iter().find(|s| s.name == name)
    }

    /// The strategy of a stage's first attempt; `None` where nothing is to be chosen and too little is known to tell what it
    /// takes.
    fn plan(&mut self, stage: &Stage, prepared: &Prepared) -> Result<Option<StagePlan>, Unplanned> {
        let spec = self.job.strategy(stage);
        let seen = self.observed.device_memory.get(&stage.name).copied();
        let known = if let Some(DeviceMemory::Bytes(bytes)) = seen { Some(bytes) } else { None };
        let Some(question) = self.question(stage, prepared, known) else {
            let unknown =
                format!("stage {}: prepare told nothing of its data, so no strategy can be chosen", stage.name);
            return if spec.has_auto() { Err(Unplanned::Unfit(unknown)) } else { Ok(None) };
        };
        let Some(strategy) = spec.fixed() else {
            question.require_memory(&stage.name, seen)?;
            let chosen = memory_plan::choose(&question.task, &question.machines, question.fixed);
            let chosen = chosen.map_err(|e| question.unfit(&format!("stage {}: {e}", stage.name), known.is_some()))?;
            return Ok(Some(question.answer(&chosen, PlanSource::Auto)));
        };
        let plan = memory_plan::estimate(&question.task, &question.machines, strategy);
        let verdict = Verdict::new(plan, &question.machines);
        if let Err(e) = memory_plan::fastest(&[verdict], &question.machines) {
            let note = format!("stage {} is started as its strategy says, but may run out of memory: {e}", stage.name);
            self.tell(Event::MayNotFit, note, Some(self.attempt(&stage.name, 1)));
        }
        Ok(Some(question.answer(&verdict, PlanSource::Spec)))
    }

    fn question(&self, stage: &Stage, prepared: &Prepared, known: Option<u64>) -> Option<Question> {
        let compute = self.job.compute(stage);
        let has_devices = compute.devices_per_node > 0;
        let written = compute.device_memory.as_deref().and_then(memory_plan::parse_bytes);
        let device_memory = written.or(known).filter(|_| has_devices);
        let host_memory = host_memory(&compute);
        let machines = Machines {
            nodes: compute.nodes,
            devices: compute.workers_per_node(),
            device_memory: has_devices.then_some(device_memory.unwrap_or(u64::MAX)),
            host_memory: host_memory.unwrap_or(u64::MAX),
        };
        let spec = self.job.strategy(stage);
        let fixed = Fixed {
            precision: spec.precision,
            sharding: spec.sharding.fixed(),
            offload: spec.offload.fixed(),
            recompute: spec.recompute.fixed(),
        };
        let task = self.task(stage, prepared, machines.world_size())?;
        Some(Question { task, machines, fixed, device_memory, host_memory })
    }

    /// After an attempt that ran out of memory: the plan of the next, or why there is none. `None` where memory is not
    /// the matter, or the spec leaves nothing open.
    pub(super) fn more_frugal(&self, slot: &StageStatus, reason: Reason) -> Option<Result<StagePlan, String>> {
        let stage = self.stage(&slot.name)?;
        let before = slot.plan.filter(|_| self.job.strategy(stage).has_auto())?;
        let prepared = self.job.status.as_ref()?.prepared.as_ref()?;
        let question = self.question(stage, prepared, before.device_memory_bytes)?;
        let on_cpu = question.machines.device_memory.is_none();
        let ran_out = reason == Reason::Exit(ExitCode::DeviceOutOfMemory) || (on_cpu && reason == Reason::OomKilled);
        if !ran_out {
            return None;
        }
        let Question { task, machines, fixed, .. } = &question;
        let next = memory_plan::next_more_frugal(task, machines, before.strategy, *fixed);
        Some(match next {
            Some(verdict) => Ok(question.answer(&verdict, PlanSource::MoreFrugal)),
            None => Err(format!(
                "no setting that the strategy leaves open takes less memory than {}: use more devices or larger ones, or a lower batch.microSize",
                Named(&before.strategy)
            )),
        })
    }

    /// The shape of a model: that of the model which existed before the job, of which it is made.
    fn shape(&self, model: &ModelRef, prepared: &Prepared) -> Option<ModelSpec> {
        let path = self.job.model_path(self.job.origin(model)?)?;
        let index = build::existing_models(self.job).iter().position(|p| *p == path)?;
        prepared.models.get(index).cloned()
    }

    /// The largest micro-batch that a rank can meet.
    fn task(&self, stage: &Stage, prepared: &Prepared, world_size: u32) -> Option<Task> {
        let data = prepared.datasets.iter().find(|d| d.stage == stage.name)?;
        let kind = stage.kind()?;
        let model = self.shape(kind.start().unwrap_or(&self.job.spec.model), prepared)?;
        let share = |size: u32| size.div_ceil(world_size);
        let (shape, rows, time) = match &kind {
            StageKind::Sft(s) => {
                let rows = s.batch.micro_size.min(share(s.batch.global_size));
                (StageShape::Sft, rows, s.longest_row().min(data.longest_tokens))
            }
            StageKind::RewardModel(s) => {
                let rankings = s.batch.micro_size.min(share(s.batch.global_size));
                let rows = rankings.saturating_mul(data.sequences.max(1));
                (StageShape::RewardModel, rows, s.max_length.min(data.longest_tokens))
            }
            StageKind::Ppo(s) => {
                let start = s.start.as_ref().unwrap_or(&self.job.spec.model);
                let reference = s.reference.as_ref().filter(|reference| *reference != start);
                let critic = s.critic_start();
                let refs: Vec<&ModelRef> = s.rewards.iter().filter_map(|r| r.model.as_ref()).chain(critic).collect();
                let scorer = |model: &ModelRef| {
                    let source = refs.iter().position(|other| *other == model)?;
                    Some(Scorer { model: self.shape(model, prepared)?, source, lora: self.shared_lora(model, start) })
                };
                let rewards = s.rewards.iter().filter_map(|r| r.model.as_ref()).map(scorer).collect::<Option<_>>()?;
                let shape = StageShape::Ppo {
                    reference: match reference {
                        Some(model) => Some(self.shape(model, prepared)?),
                        None => None,
                    },
                    critic: match critic {
                        Some(model) => Some(scorer(model)?),
                        None => None,
                    },
                    rewards,
                    rollout_rows: share(s.rollout_batch_size),
                    new_tokens: s.max_new_tokens,
                };
                let time = s.max_prompt_length.min(data.longest_tokens).saturating_add(s.max_new_tokens);
                (shape, s.batch.micro_size.min(share(s.batch.global_size)), time)
            }
        };
        let dataset = memory_plan::dataset_bytes(data.records);
        Some(Task { stage: shape, model, lora: kind.lora().cloned(), rows: rows.max(1), time: time.max(2), dataset })
    }

    /// The adapters of a reward model, where it was trained by some from the actor's start: their models then share a
    /// backbone.
    fn shared_lora(&self, reward: &ModelRef, start: &ModelRef) -> Option<Lora> {
        let reward = self.stage(reward.stage.as_ref()?)?.reward_model.as_ref()?;
        let from = reward.start.as_ref().unwrap_or(&self.job.spec.model);
        reward.lora.clone().filter(|_| from == start)
    }
}

impl Question {
    fn require_memory(&self, stage: &str, seen: Option<DeviceMemory>) -> Result<(), Unplanned> {
        let lacks = |why: &str| {
            let label = names::LABEL_DEVICE_MEMORY;
            format!(
                "stage {stage}: strategy is to be chosen, but the memory of a device is not known: {why} (label {label}); write compute.deviceMemory"
            )
        };
        let unknown = |text| Unplanned::Waits(Wait::new(Wait::MEMORY_UNKNOWN, text));
        if self.machines.device_memory.is_some() && self.device_memory.is_none() {
            return Err(match seen {
                Some(DeviceMemory::NoNode) | None => {
                    unknown(lacks("there is no node yet on which its pods can run and that tells it"))
                }
                Some(DeviceMemory::Unreadable) => {
                    Unplanned::Unfit(lacks("the operator watches one namespace and may not read nodes, which tell it"))
                }
                Some(DeviceMemory::Untold | DeviceMemory::Bytes(_)) => {
                    unknown(lacks("no node on which its pods can run tells it"))
                }
            });
        }
        if self.host_memory.is_none() {
            return Err(Unplanned::Unfit(format!(
                "stage {stage}: strategy is to be chosen, but compute.resources.limits.memory is no amount of memory; write one, such as 64Gi"
            )));
        }
        Ok(())
    }

    /// Why nothing was chosen. Where more memory of a device would do, and it is nodes that tell of too little, others may come.
    fn unfit(&self, message: &str, by_nodes: bool) -> Unplanned {
        let larger = Machines { device_memory: Some(u64::MAX), ..self.machines };
        if !by_nodes || memory_plan::choose(&self.task, &larger, self.fixed).is_err() {
            return Unplanned::Unfit(message.to_owned());
        }
        Unplanned::Waits(Wait::new(
            Wait::MEMORY_TOO_SMALL,
            format!(
                "{message}; so much has the smallest of the nodes on which its pods can run, and it waits for others: suspend the job to choose larger ones by compute.podTemplate.nodeSelector, or to write compute.deviceMemory"
            ),
        ))
    }

    fn answer(&self, verdict: &Verdict, source: PlanSource) -> StagePlan {
        StagePlan {
            strategy: verdict.plan.strategy,
            source,
            device_bytes: verdict.plan.device.total() as u64,
            host_bytes: verdict.plan.host.total() as u64,
            device_memory_bytes: self.device_memory,
            host_memory_bytes: self.host_memory,
        }
    }
}

/// What a pod may use, which is not what its node has.
fn host_memory(compute: &Compute) -> Option<u64> {
    let limit = compute.resources.limits.as_ref()?.get(MEMORY)?;
    memory_plan::parse_bytes(&limit.0)
}
