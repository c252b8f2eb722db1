//! The workload of ColossalAI's 2023 dummy benchmark, on this engine: models of random weights, prompts of 400 random tokens,
//! sequences of 512, three passes of learning over a rollout.
//!
//! It runs the very code of the stages, without their data and files. The first round warms up and is not counted. Speed is
//! told beside that of a plain matrix product in the same run, so that a figure means something on any machine.

mod flops;
mod save;

use crate::data::{Half, Prompt, Ranking, SftSample};
use crate::engine::{Backbone, Group, HEAD_SLICE_BYTES, Model, Placement};
use crate::environment::Environment;
use crate::error::{Error, Result};
use crate::model::{Adapters, HeadKind, ModelSpec, ScoreNormalisation};
use crate::rollout::{Decoding, Request, generate};
use crate::shutdown::Shutdown;
use crate::stages::Context;
use crate::stages::ppo::{Models, Run, Scorer};
use crate::stages::reward_model::PairwiseLogistic;
use crate::stages::sft::CrossEntropy;
use crate::stages::supervised::{Objective, make_step};
use crate::telemetry::{Phase, Telemetry};
use crate::{random, worker};
use flops::Learning;
use rlhf_api::config::StageConfig;
use rlhf_api::stage::{Lora, Optimizer, Ppo, Recompute, Sampling, StageKind, Strategy};
use save::Saves;
use serde::Serialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// Seeds what is drawn.
const SEED: u64 = 42;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Workload {
    /// Rollout, scoring and learning with four models.
    Ppo,
    /// The same without a critic: eight answers to each prompt, or a rollout's of one where eight do not divide it.
    Grpo,
    /// Steps of supervised fine-tuning.
    Sft,
    /// Steps of reward-model training on pairs.
    Reward,
    /// Generation alone.
    Generate,
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The workload.
    pub workload: Workload,
    /// The models' shape.
    pub spec: ModelSpec,
    /// How they are placed.
    pub strategy: Strategy,
    /// The adapters that are trained on frozen weights, where models are not trained whole.
    pub lora: Option<Lora>,
    /// Samples in a rollout or global batch, over all ranks.
    pub batch: u32,
    /// Samples that a rank runs at a time.
    pub micro: u32,
    /// Tokens of a prompt.
    pub prompt_tokens: u32,
    /// Tokens of a response, all of which are generated.
    pub new_tokens: u32,
    /// Rounds that are counted.
    pub rounds: u32,
    /// A folder to save into, where the cost of saves is to be measured too.
    pub save: Option<PathBuf>,
}

impl Options {
    fn has_critic(&self) -> bool {
        self.workload != Workload::Grpo
    }
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Samples a second, over all phases and ranks.
    pub samples_per_second: f64,
    /// Tokens drawn a second of rollout, over all ranks; absent where nothing is generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_tokens_per_second: Option<f64>,
    /// Floating-point operations a second of a rank, in units of 10^12.
    pub tflops: f64,
    /// These over those of a matrix product in the same number format.
    pub utilisation: f64,
    /// The matrix product's, in units of 10^12 a second.
    pub gemm_tflops: f64,
    /// The most bytes in tensors on rank 0's device.
    pub peak_device_bytes: u64,
    /// The most bytes in rank 0's tensors in host memory.
    pub peak_host_bytes: u64,
    /// Bytes that rank 0 sent in collectives, a round.
    pub sent_bytes: u64,
    /// Seconds of a round by phase.
    pub phase_seconds: BTreeMap<&'static str, f64>,
    /// Seconds until a save is whole that training waits for; absent where saves were not measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_foreground_seconds: Option<f64>,
    /// Seconds by which a save that goes on in the background lengthens training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_stall_seconds: Option<f64>,
}

/// Runs a workload; rank 0 gets the figures.
///
/// # Errors
/// The options or the environment are wrong, the device has no room, or a peer was lost.
pub fn run(options: &Options) -> Result<Option<Figures>> {
    let tokens = i64::from(options.prompt_tokens) + i64::from(options.new_tokens);
    if tokens > options.spec.max_positions {
        let most = options.spec.max_positions;
        return Err(Error::config(format!("{tokens} tokens a sample, but the model knows {most} positions")));
    }
    if options.save.is_some() && !matches!(options.workload, Workload::Sft | Workload::Reward) {
        return Err(Error::config("--save: saves are measured with the workloads sft and reward"));
    }
    c10d::init(true);
    let context = context(options)?;
    let rounds = Rounds { options, context: &context };
    let (counted, operations) = match options.workload {
        Workload::Ppo | Workload::Grpo => rounds.ppo(rounds.models()?)?,
        Workload::Sft => rounds.sft(rounds.model(HeadKind::Lm)?)?,
        Workload::Reward => rounds.reward(rounds.model(HeadKind::Scalar)?)?,
        Workload::Generate => rounds.generate(&rounds.model(HeadKind::Lm)?)?,
    };
    let figures = counted.figures(options, &context, operations)?;
    Ok(context.group.is_first().then_some(figures))
}

/// A stage's surroundings, with neither volume nor data.
fn context(options: &Options) -> Result<Context> {
    let environment = Environment::from_process()?;
    let mut settings: Ppo = serde_json::from_value(json!({
        "rewards": [{"name": "reward", "model": {"stage": "reward"}}], "prompts": {"source": "volume://none"}, "iterations": options.rounds + 1,
        "rolloutBatchSize": options.batch, "batch": {"globalSize": options.batch, "microSize": options.micro},
        "epochs": 3, "maxPromptLength": options.prompt_tokens, "maxNewTokens": options.new_tokens,
        "sampling": {"topK": 50}, "kl": {"coefficient": 0.1},
        "actorOptimizer": {"learningRate": 5e-6}, "criticOptimizer": {"learningRate": 5e-6},
    }))
    .map_err(|e| Error::bug(e.to_string()))?;
    if !options.has_critic() {
        settings.advantage =
            serde_json::from_value(json!({"groupRelative": {}})).map_err(|e| Error::bug(e.to_string()))?;
        settings.critic_optimizer = None;
        settings.samples_per_prompt = if options.batch.is_multiple_of(8) { 8 } else { options.batch };
    }
    let folder = options.save.as_ref().map(|dir| dir.join("bench-checkpoints"));
    let checkpoints = folder.map(std::path::absolute).transpose().map_err(|e| Error::config(format!("--save: {e}")))?;
    let checkpoints = checkpoints.unwrap_or_default();
    let config: StageConfig = serde_json::from_value(json!({
        "job": {"namespace": "", "name": "bench", "uid": ""}, "stage": "bench", "kind": StageKind::Ppo(Box::new(settings)),
        "strategy": options.strategy, "seed": SEED, "collectiveTimeoutSeconds": 1800,
        "paths": {"baseModel": "", "startModel": "", "output": "", "checkpoints": checkpoints},
    }))
    .map_err(|e| Error::bug(e.to_string()))?;
    let (rank, world_size) = (environment.rank(), environment.world_size());
    let telemetry = Telemetry::new(&config.job, &config.stage, 1, rank, world_size)?;
    let device = worker::device(environment.local_rank, environment.devices)?;
    let peers = worker::meet(&environment, &config, &[0; 32], device, &|word| tracing::warn!("waiting: {word}"))?;
    let group = Rc::new(Group::new(peers, rank, world_size, device)?);
    Ok(Context::new(config, environment, group, telemetry, Shutdown::default(), device))
}

/// What rounds took.
struct Counted {
    seconds: f64,
    phases: Vec<(&'static str, f64)>,
    sent: u64,
    memory: c10d::Allocated,
    saves: Option<Saves>,
}

struct Rounds<'a> {
    options: &'a Options,
    context: &'a Context,
}

impl Rounds<'_> {
    fn placement(&self, trainable: bool) -> Placement {
        let (device, strategy) = (self.context.device, self.options.strategy);
        Placement { device, trainable, strategy, head_slice_bytes: HEAD_SLICE_BYTES }
    }

    fn whole(&self, head: HeadKind, trainable: bool) -> Result<Model> {
        Model::random(&self.options.spec, head, self.placement(trainable), &self.context.group)
    }

    fn backbone(&self, head: HeadKind, lora: &Lora) -> Result<(Backbone, Adapters)> {
        let spec = &self.options.spec;
        Ok((
            Backbone::random(spec, head, self.placement(false), &self.context.group)?,
            Adapters::fresh(spec, lora, SEED)?,
        ))
    }

    /// The model of a workload that has one, which is trained where the workload trains.
    fn model(&self, head: HeadKind) -> Result<Model> {
        let Some(lora) = &self.options.lora else {
            return self.whole(head, self.options.workload != Workload::Generate);
        };
        let (backbone, fresh) = self.backbone(head, lora)?;
        match head {
            HeadKind::Lm => backbone.language_model(&fresh, SEED),
            HeadKind::Scalar => backbone.random_scalar_model(&fresh, SEED, true),
        }
    }

    /// The models of PPO. With adapters all of them share a backbone, as where the reward model was so trained too.
    fn models(&self) -> Result<Models> {
        let score = ScoreNormalisation { mean: 0.0, std: 1.0 };
        let critic = self.options.has_critic().then_some(());
        let scorer = |model| Scorer { name: "reward".into(), weight: 1.0, model, score };
        let Some(lora) = &self.options.lora else {
            return Ok(Models {
                actor: self.whole(HeadKind::Lm, true)?,
                critic: critic.map(|()| self.whole(HeadKind::Scalar, true)).transpose()?,
                reference: self.whole(HeadKind::Lm, false)?,
                rewards: vec![scorer(self.whole(HeadKind::Scalar, false)?)],
            });
        };
        let (backbone, fresh) = self.backbone(HeadKind::Lm, lora)?;
        let actor = backbone.language_model(&fresh, SEED)?;
        Ok(Models {
            critic: critic.map(|()| backbone.random_scalar_model(&fresh, SEED, true)).transpose()?,
            rewards: vec![scorer(backbone.random_scalar_model(&fresh, SEED, false)?)],
            reference: actor.without_adapters()?,
            actor,
        })
    }

    fn learning(&self) -> Learning<'_> {
        let recompute = self.options.strategy.recompute == Recompute::Block;
        Learning { recompute, lora: self.options.lora.as_ref() }
    }

    /// Operations of a forward pass over a whole row.
    fn forward(&self) -> f64 {
        let (spec, tokens) = (&self.options.spec, self.tokens());
        flops::forward(spec, tokens) + flops::adapters(spec, self.options.lora.as_ref(), tokens)
    }

    /// Runs one round to warm up, and then those that count.
    fn count(&self, mut round: impl FnMut(u64) -> Result<()>) -> Result<Counted> {
        round(0)?;
        let phases = || Phase::ALL.map(|p| (p.label(), self.context.telemetry.phase_seconds(p)));
        let (before, sent, started) = (phases(), self.context.group.bytes_sent(), Instant::now());
        (1..=u64::from(self.options.rounds)).try_for_each(&mut round)?;
        self.context.group.barrier()?;
        let n = f64::from(self.options.rounds);
        Ok(Counted {
            seconds: started.elapsed().as_secs_f64() / n,
            phases: phases()
                .iter()
                .zip(before)
                .map(|((name, after), (_, before))| (*name, (after - before) / n))
                .collect(),
            sent: (self.context.group.bytes_sent() - sent) / u64::from(self.options.rounds),
            memory: c10d::allocated(self.context.device)?,
            saves: None,
        })
    }

    fn ppo(&self, models: Models) -> Result<(Counted, f64)> {
        let StageKind::Ppo(settings) = &self.context.config.kind else {
            return Err(Error::bug("a bench's config is that of PPO"));
        };
        let prompts: Vec<Prompt> =
            self.rows(self.options.prompt_tokens).map(|tokens| Prompt { tokens, text: String::new() }).collect();
        let (prompts, _) = Half::held(&prompts)?;
        // No token ends a response.
        let mut run = Run::new(self.context, settings, vec![], models)?;
        let counted = self.count(|round| run.iterate(round, &prompts).map(drop))?;
        let (spec, new) = (&self.options.spec, u64::from(self.options.new_tokens));
        let (tokens, learning) = (self.tokens(), self.learning());
        let rollout = self.forward() + flops::head(spec, HeadKind::Lm, new);
        // The reference has no adapters.
        let critics = if self.options.has_critic() { 1.0 } else { 0.0 };
        let score = (2.0 + critics) * self.forward()
            + flops::forward(spec, tokens)
            + 2.0 * flops::head(spec, HeadKind::Lm, new);
        let learn = f64::from(settings.epochs)
            * (flops::learn(spec, HeadKind::Lm, tokens, new, learning)
                + critics * flops::learn(spec, HeadKind::Scalar, tokens, new, learning));
        Ok((counted, rollout + score + learn))
    }

    fn sft(&self, model: Model) -> Result<(Counted, f64)> {
        let samples: Vec<SftSample> = self
            .rows(self.tokens() as u32)
            .map(|tokens| SftSample { target: vec![true; tokens.len()], tokens })
            .collect();
        let (train, held_out) = Half::held(&samples)?;
        let objective = CrossEntropy { train, held_out, micro_size: self.options.micro as usize };
        let counted = self.learn(model, &objective)?;
        Ok((counted, flops::learn(&self.options.spec, HeadKind::Lm, self.tokens(), self.tokens(), self.learning())))
    }

    fn reward(&self, model: Model) -> Result<(Counted, f64)> {
        let mut rows = self.rows(self.tokens() as u32);
        let rankings: Vec<Ranking> = std::iter::from_fn(|| {
            let (better, worse) = (rows.next()?, rows.next()?);
            Some(Ranking { responses: vec![better, worse] })
        })
        .collect();
        let micro_size = (self.options.micro as usize / 2).max(1);
        let (train, held_out) = Half::held(&rankings)?;
        let objective = PairwiseLogistic { train, held_out, micro_size, centering: 0.0 };
        let counted = self.learn(model, &objective)?;
        Ok((counted, flops::learn(&self.options.spec, HeadKind::Scalar, self.tokens(), 1, self.learning())))
    }

    fn learn(&self, mut model: Model, objective: &impl Objective) -> Result<Counted> {
        let optimizer: Optimizer =
            serde_json::from_value(json!({"learningRate": 5e-6})).map_err(|e| Error::bug(e.to_string()))?;
        let all: Vec<usize> = (0..objective.records()).collect();
        let step = |model: &mut Model| make_step(self.context, model, objective, &all, (&optimizer, 5e-6)).map(drop);
        let mut counted = self.count(|_| step(&mut model))?;
        if self.options.save.is_some() {
            let measured = save::measure(self.context, self.options.rounds, &mut model, counted.seconds, step)?;
            counted.saves = Some(measured);
        }
        Ok(counted)
    }

    fn generate(&self, model: &Model) -> Result<(Counted, f64)> {
        let prompts: Vec<Vec<i64>> = self.rows(self.options.prompt_tokens).collect();
        let requests: Vec<Request<'_>> = (0..).zip(&prompts).map(|(id, prompt)| Request { prompt, id }).collect();
        let requests: Vec<Request<'_>> = self.context.group.share(&requests).into_iter().copied().collect();
        let counted = self.count(|round| {
            let sampling = Sampling { top_k: 50, ..Sampling::default() };
            let decoding = Decoding::Sample { sampling, stream: [SEED, round] };
            let stop = || self.context.asked_to_stop();
            let work = || generate(model, &requests, &decoding, &[], self.options.new_tokens as usize, &stop);
            self.context.telemetry.phase(Phase::Rollout, work).map(drop)
        })?;
        let (spec, new) = (&self.options.spec, u64::from(self.options.new_tokens));
        Ok((counted, self.forward() + flops::head(spec, HeadKind::Lm, new)))
    }

    fn tokens(&self) -> u64 {
        u64::from(self.options.prompt_tokens) + u64::from(self.options.new_tokens)
    }

    /// A batch of rows of random tokens.
    fn rows(&self, tokens: u32) -> impl Iterator<Item = Vec<i64>> {
        let vocab = self.options.spec.vocab as f64;
        (0..u64::from(self.options.batch))
            .map(move |row| (0..u64::from(tokens)).map(|i| (random::uniform(&[SEED, row, i]) * vocab) as i64).collect())
    }
}

impl Counted {
    /// The figures of a round that took `operations` floating-point operations a sample.
    fn figures(self, options: &Options, context: &Context, operations: f64) -> Result<Figures> {
        let batch = f64::from(options.batch);
        let gemm_tflops = gemm(context.device, options)? / 1e12;
        let tflops = operations * batch / f64::from(context.group.world_size()) / self.seconds / 1e12;
        let phase_seconds: BTreeMap<_, _> = self.phases.into_iter().filter(|(_, seconds)| *seconds > 0.0).collect();
        let rollout = phase_seconds.get(Phase::Rollout.label());
        Ok(Figures {
            samples_per_second: batch / self.seconds,
            new_tokens_per_second: rollout.map(|seconds| batch * f64::from(options.new_tokens) / seconds),
            tflops,
            utilisation: tflops / gemm_tflops,
            gemm_tflops,
            peak_device_bytes: self.memory.device.peak,
            peak_host_bytes: self.memory.host.peak,
            sent_bytes: self.sent,
            phase_seconds,
            save_foreground_seconds: self.saves.map(|s| s.foreground),
            save_stall_seconds: self.saves.map(|s| s.stall),
        })
    }
}

/// Operations a second of a square matrix product, the best of five.
fn gemm(device: Device, options: &Options) -> Result<f64> {
    let n: i64 = if device.is_cuda() { 8192 } else { 2048 };
    let kind = Placement { device, trainable: false, strategy: options.strategy, head_slice_bytes: 0 }.kind();
    let (a, b) =
        (Tensor::f_randn([n, n], (Kind::Float, device))?.to_kind(kind), Tensor::f_ones([n, n], (kind, device))?);
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let started = Instant::now();
        let product = a.f_matmul(&b)?;
        // Reading a number waits for the device.
        product.f_double_value(&[0, 0])?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(2.0 * (n as f64).powi(3) / best)
}
