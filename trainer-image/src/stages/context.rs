//! What every stage needs beside its settings: its place, its peers, its paths, and whom to tell.

use super::export;
use crate::checkpoint::{Checkpoints, DataHashes, Headroom, Kept, Restored, Saving};
use crate::data::{Recipe, Store};
use crate::engine::{Backbone, Group, HEAD_SLICE_BYTES, LossScale, Model, Placement, ScalarInit};
use crate::environment::Environment;
use crate::error::{Error, Result};
use crate::files;
use crate::lease::{Holder, Lease};
use crate::model::{Adapters, HeadKind, ScoreNormalisation, Source};
use crate::run::{Done, Run, RunId};
use crate::shutdown::Shutdown;
use crate::telemetry::{Figure, Phase, RewardOf, Telemetry};
use crate::tokenizer::Tokenizer;
use rlhf_api::config::{KeepCheckpoints, StageConfig};
use rlhf_api::report::{Checkpoint, ExitCode, Output};
use serde_json::{Map, Value, json};
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use tch::Device;

/// A file beside the stage's model with one JSON line for each step: the stage's learning curves.
const HISTORY: &str = "metrics.jsonl";

/// What rank 0 finds as a stage begins.
enum Begun {
    Done(Done),
    Goes(RunId, Lease),
}

/// How a stop in the middle of a step finds the whole steps before it.
pub enum Edge {
    /// In a checkpoint, or there are none.
    Saved,
    /// In what was kept.
    Kept(Box<Kept>),
    /// Not at all: host memory has no room to keep them.
    NoRoom,
}

/// A worker's surroundings.
pub struct Context {
    /// The stage's config.
    pub config: StageConfig,
    /// This process's place.
    pub environment: Environment,
    /// The ranks that train together.
    pub group: Rc<Group>,
    /// Whom to tell about progress.
    pub telemetry: Telemetry,
    /// Whether the process was asked to stop.
    pub shutdown: Shutdown,
    /// The device of this worker.
    pub device: Device,
    /// What [`Context::dataset`] found.
    data: OnceCell<DataHashes>,
    /// What [`Context::begin`] found: the run, and the right to write.
    begun: OnceCell<(RunId, Lease)>,
    /// What checkpoints know of host memory.
    headroom: Headroom,
    /// The checkpoint that is being written.
    saving: RefCell<Option<Saving>>,
    /// Whether a request to stop is heard. (In a bench it ends the process.)
    listens: Cell<bool>,
    /// Scores by each reward that the next line of the learning curves is to have.
    rewards: RefCell<Vec<(String, f64)>>,
    /// When the last checkpoint was begun, or the process.
    saved_at: Cell<Instant>,
}

impl Context {
    /// The surroundings of a worker that is about to run its stage.
    pub fn new(
        config: StageConfig,
        environment: Environment,
        group: Rc<Group>,
        telemetry: Telemetry,
        shutdown: Shutdown,
        device: Device,
    ) -> Self {
        Self {
            config,
            environment,
            group,
            telemetry,
            shutdown,
            device,
            data: OnceCell::new(),
            begun: OnceCell::new(),
            headroom: Headroom::default(),
            saving: RefCell::new(None),
            listens: Cell::new(false),
            rewards: RefCell::default(),
            saved_at: Cell::new(Instant::now()),
        }
    }

    /// Begins the stage, or goes on with it: makes sure that its folder holds no other run, and takes the right to write there.
    /// Where the stage is done already, this is how it ended. Every rank must call it.
    ///
    /// # Errors
    /// What was begun in the folder is another run, a later attempt has taken over, storage failed, or a peer was lost.
    pub fn begin(&self) -> Result<Option<Output>> {
        let run = self.run();
        let holder = Holder { job_uid: self.config.job.uid.clone(), attempt: self.environment.attempt };
        let (mut found, checkpoints, obsolete) = (None, self.path(&self.config.paths.checkpoints), self.obsolete());
        self.group.while_first(|| {
            found = Some(find(&run, holder.clone(), &checkpoints, obsolete.as_deref())?);
            Ok(())
        })?;
        let told = match &found {
            Some(Begun::Goes(id, lease)) => [i64::from(lease.number()), (*id).into()],
            Some(Begun::Done(done)) => [0, done.step.cast_signed()],
            None => [0, 0],
        };
        let [number, id] = [self.group.from_first(told[0])?, self.group.from_first(told[1])?];
        let lease = match found {
            Some(Begun::Done(done)) => return Ok(Some(self.already(done.step, done.output))),
            Some(Begun::Goes(_, lease)) => lease,
            // As rank 0 says, whose word on the figures is the stage's: this rank may see the volume as it was.
            None if number == 0 => {
                let output = Output { path: self.config.paths.output.clone(), metrics: BTreeMap::new() };
                return Ok(Some(self.already(id.cast_unsigned(), output)));
            }
            None => Lease::of_first(run.dir(), holder, u32::try_from(number).unwrap_or_default()),
        };
        let _ = self.begun.set((id.into(), lease));
        Ok(None)
    }

    /// The folder of checkpoints that nobody needs once the stage is done, where they are not to stay.
    fn obsolete(&self) -> Option<PathBuf> {
        let running = self.config.keep_checkpoints == KeepCheckpoints::Running;
        running.then(|| self.path(&self.config.paths.checkpoints))
    }

    /// Tells of a stage that an attempt before has brought to its end.
    fn already(&self, step: u64, output: Output) -> Output {
        tracing::info!(step, path = output.path, "the stage is done already: its output is on the volume");
        self.telemetry.set_total_steps(step);
        self.telemetry.resume_at(step);
        output
    }

    /// Says that the stage has left all that it leaves, and removes the checkpoints that are not to stay. Every rank must call
    /// it.
    ///
    /// # Errors
    /// A later attempt has taken over, storage failed, or a peer was lost.
    pub fn complete(&self, output: &Output) -> Result<()> {
        let (run, (id, lease), step) = (self.run(), self.begun(), self.telemetry.progress().step);
        let obsolete = self.obsolete();
        self.group.while_first(|| {
            lease.check()?;
            run.finish(id, step, output)?;
            // Only then: until then an attempt that starts goes on from them.
            remove_obsolete(obsolete.as_deref());
            Ok(())
        })?;
        if obsolete.is_some() {
            self.telemetry.no_checkpoint();
        }
        Ok(())
    }

    fn run(&self) -> Run {
        Run::new(&self.config, &self.environment.volume)
    }

    fn begun(&self) -> (RunId, Lease) {
        self.begun.get().cloned().unwrap_or_default()
    }

    /// The right to write what the stage leaves. What is to get its final name asks it first.
    pub fn lease(&self) -> Lease {
        self.begun().1
    }

    /// The stage's dataset, as prepare has tokenised it; where it has not, or a file has changed since, rank 0 does it now.
    /// Checkpoints are told of it: a run on other data would go on with other batches than the ones it has not seen yet. Every
    /// rank must call it.
    ///
    /// # Errors
    /// What is wrong with the dataset, the ranks see different ones, storage failed, or a peer was lost.
    pub fn dataset(&self) -> Result<Arc<Store>> {
        let recipe = Recipe::of(&self.config, &self.environment.volume)?;
        let (lease, mut found) = (self.lease(), None);
        self.group.while_first(|| {
            found = Some(recipe.find_or_make(&lease)?);
            Ok(())
        })?;
        let name = self.group.from_first(found.as_ref().map_or(0, |store| store.name().cast_signed()))?;
        let store = match found {
            Some(store) => Some(store),
            None => recipe.made(name.cast_unsigned())?,
        };
        let digest = store.as_ref().map_or([0; 32], Store::digest);
        let digests = self.group.gather_digests(&digest)?;
        let other = digests.iter().position(|other| *other != digests[0]);
        let (Some(store), None) = (store, other) else {
            return Err(Error::input(format!(
                "the ranks have read different data (rank {} not what rank 0 has): do not change a dataset while a stage starts, and mount the same volume in all pods",
                other.unwrap_or_default()
            )));
        };
        let _ = self.data.set(DataHashes { rows: store.rows(), file: store.file() });
        Ok(Arc::new(store))
    }

    /// A path below the volume.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.environment.volume.join(relative)
    }

    /// The stage's own folder, which holds its model, checkpoints, samples and learning curves.
    pub fn stage_dir(&self) -> PathBuf {
        self.run().dir().to_path_buf()
    }

    /// The job's tokenizer.
    ///
    /// # Errors
    /// Names the file that is missing or wrong.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Tokenizer::load(&self.path(&self.config.paths.base_model))
    }

    /// Loads a model as the stage's strategy places it. `fold` is folded into a scalar head.
    ///
    /// # Errors
    /// Names the file or tensor that is wrong, or says that the device has no room.
    pub fn load(
        &self,
        source: &Source,
        head: HeadKind,
        trainable: bool,
        fold: Option<ScoreNormalisation>,
    ) -> Result<Model> {
        Model::load(source, head, self.scalar_init(fold), self.placement(trainable), &self.group)
    }

    /// Loads what models with adapters share, as the stage's strategy places it.
    ///
    /// # Errors
    /// Names the file or tensor that is wrong, or says that the device has no room.
    pub fn backbone(&self, source: &Source, head: HeadKind) -> Result<Backbone> {
        Backbone::load(source, head, self.placement(false), &self.group)
    }

    fn placement(&self, trainable: bool) -> Placement {
        let strategy = self.config.strategy.unwrap_or_default();
        Placement { device: self.device, trainable, strategy, head_slice_bytes: HEAD_SLICE_BYTES }
    }

    /// What a scalar head starts from.
    pub fn scalar_init(&self, fold: Option<ScoreNormalisation>) -> ScalarInit {
        ScalarInit { seed: self.config.seed, fold }
    }

    /// The model from which the stage starts, as it lies on disk, and loaded to be trained with this head: whole, or by
    /// adapters where the stage asks for them.
    ///
    /// # Errors
    /// Names the file or tensor that is wrong, or says that the device has no room.
    pub fn start_model(&self, head: HeadKind) -> Result<(Source, Model)> {
        let source = Source::open(&self.path(&self.config.paths.start_model))?;
        let seed = self.config.seed;
        let model = match self.config.kind.lora() {
            None => self.load(&source, head, true, None)?,
            Some(lora) => {
                Adapters::check(&source.spec, lora)?;
                let backbone = self.backbone(&source, head)?;
                let adapters = Adapters::fresh(&source.spec, lora, seed)?;
                match head {
                    HeadKind::Lm => backbone.language_model(&adapters, seed)?,
                    HeadKind::Scalar => {
                        backbone.scalar_model(&source, self.scalar_init(None), Some(&adapters), true)?
                    }
                }
            }
        };
        tracing::info!(parameters = model.trained_parameters(), "the model is loaded");
        Ok((source, model))
    }

    /// The stage's checkpoints.
    pub fn checkpoints(&self) -> Checkpoints {
        let data = self.data.get().copied().unwrap_or_default();
        let (run, lease) = self.begun();
        Checkpoints::new(&self.config, &self.environment, run, &lease, data, &self.headroom)
    }

    /// Resumes from the newest checkpoint, if there is one, and says so. From here on the stage listens for requests to
    /// stop.
    ///
    /// # Errors
    /// As [`Checkpoints::restore`].
    pub fn restore(&self, total_steps: u64, models: &mut [(&str, &mut Model)]) -> Result<Option<Restored>> {
        self.telemetry.set_total_steps(total_steps);
        let restored = self.checkpoints().restore(&self.group, models)?;
        if let Some(restored) = &restored {
            tracing::info!(step = restored.step, checkpoint = restored.checkpoint.path, "resumed");
            self.telemetry.resume_at(restored.step);
            self.telemetry.checkpoint(restored.checkpoint.clone());
        }
        self.headroom.loaded();
        self.shutdown.listen()?;
        self.listens.set(true);
        self.telemetry.makes_steps();
        Ok(restored)
    }

    /// Whether this rank was asked to stop. Whatever takes long asks at each micro-batch and each token, so that to ask is
    /// also a sign of life.
    pub fn asked_to_stop(&self) -> bool {
        self.telemetry.alive();
        self.shutdown.requested()
    }

    /// Gives up an unfinished step or evaluation where any rank was asked to stop, so that a stop does not have to wait
    /// for its end. Every rank must call it.
    ///
    /// # Errors
    /// [`ExitCode::Terminated`] on all ranks, or a peer was lost.
    pub fn stop_point(&self) -> Result<()> {
        match self.group.any(self.asked_to_stop())? {
            true => Err(Error::new(ExitCode::Terminated, "stopped on request")),
            false => Ok(()),
        }
    }

    /// Saves what `step` whole steps have made, where that is not done yet, if `result` says that a stop interrupted the
    /// next one. The models must be as those steps have left them. Every rank must call it.
    ///
    /// # Errors
    /// What `result` says, or where saving failed.
    pub fn save_if_stopped<T>(
        &self,
        result: Result<T>,
        step: u64,
        models: &[(&str, &Model)],
        state: &Value,
    ) -> Result<T> {
        if result.as_ref().is_err_and(|e| e.exit == ExitCode::Terminated) {
            self.finish_save(true)?;
            if step > 0 && self.telemetry.progress().checkpoint.is_none_or(|c| c.step != step) {
                self.telemetry.checkpoint(self.start_save(step, models, state)?.finish(&self.group)?);
            }
        }
        result
    }

    /// Keeps what `step` whole steps have made while the next step changes the models piece by piece, so that
    /// [`Context::save_kept_if_stopped`] can save it. `None` where there is nothing to save that is not saved, or being saved,
    /// anyhow; `Edge::NoRoom` where host memory has no room for the copies. Every rank must call it.
    ///
    /// # Errors
    /// Where libtorch failed or a peer was lost.
    pub fn keep_edge(&self, step: u64, models: &[(&str, &Model)], state: &Value) -> Result<Edge> {
        let saved = self.saving.borrow().as_ref().map(Saving::step);
        let saved = saved.or_else(|| self.telemetry.progress().checkpoint.map(|c| c.step));
        if step == 0 || saved == Some(step) || !self.listens.get() {
            return Ok(Edge::Saved);
        }
        let kept = self.checkpoints().keep(&self.group, step, models, state)?;
        Ok(kept.map_or(Edge::NoRoom, |kept| Edge::Kept(Box::new(kept))))
    }

    /// Saves what was kept at the step's edge if `result` says that a stop interrupted the step. Every rank must call it.
    ///
    /// # Errors
    /// What `result` says, or where saving failed.
    pub fn save_kept_if_stopped<T>(&self, result: Result<T>, edge: Edge) -> Result<T> {
        if result.as_ref().is_err_and(|e| e.exit == ExitCode::Terminated) {
            self.finish_save(true)?;
            if let Edge::Kept(kept) = edge {
                let saving = self.checkpoints().write(&self.group, *kept, self.teller())?;
                self.telemetry.checkpoint(saving.finish(&self.group)?);
            }
        }
        result
    }

    /// Ends a stage. Where it was stopped or its numbers are not finite, which all ranks find together, the save in flight
    /// is finished first, and the error also says what is kept. Every rank must call it.
    ///
    /// # Errors
    /// What `result` says, or where saving failed.
    pub fn conclude<T>(&self, result: Result<T>) -> Result<T> {
        let Err(Error { exit: exit @ (ExitCode::Terminated | ExitCode::NotFinite), message }) = result else {
            return result;
        };
        self.finish_save(true)?;
        let kept = match self.telemetry.progress().checkpoint {
            Some(checkpoint) => format!("the last checkpoint is of step {}", checkpoint.step),
            None => "there is no checkpoint yet".into(),
        };
        Err(Error::new(exit, format!("{message}; {kept}")))
    }

    /// Starts saving where a checkpoint is due after `step` of `total` steps, and ends the worker where it was asked to
    /// stop. A save goes on while training does; it is waited for at the next one, at a stop and at the last step. `stop` is
    /// what all ranks agreed on.
    ///
    /// # Errors
    /// [`ExitCode::Terminated`] after a stop, or where saving failed.
    pub fn step_edge(&self, step: u64, total: u64, stop: bool, models: &[(&str, &Model)], state: &Value) -> Result<()> {
        let by_step = step.is_multiple_of(u64::from(self.config.checkpoint.every_steps)) || step == total;
        let due = self.is_time_to_save()? || by_step;
        self.telemetry.phase(Phase::Checkpoint, || {
            self.finish_save(due || stop)?;
            if due || stop {
                self.saved_at.set(Instant::now());
                let saving = self.start_save(step, models, state)?;
                *self.saving.borrow_mut() = Some(saving);
                self.finish_save(stop || step == total)?;
            }
            Ok::<_, Error>(())
        })?;
        if stop && step < total {
            return Err(Error::new(ExitCode::Terminated, format!("stopped on request after step {step} of {total}")));
        }
        Ok(())
    }

    /// Whether the last checkpoint was begun as long ago as the policy allows, by rank 0's clock. Every rank must call it.
    fn is_time_to_save(&self) -> Result<bool> {
        let Some(seconds) = self.config.checkpoint.every_seconds else { return Ok(false) };
        self.group.any(self.group.is_first() && self.saved_at.get().elapsed().as_secs() >= seconds.into())
    }

    fn start_save(&self, step: u64, models: &[(&str, &Model)], state: &Value) -> Result<Saving> {
        self.checkpoints().start_save(&self.group, step, models, state, self.teller())
    }

    /// Tells of a checkpoint that is whole.
    fn teller(&self) -> impl FnOnce(Checkpoint) + Send + 'static {
        let telemetry = self.telemetry.clone();
        move |checkpoint| telemetry.checkpoint(checkpoint)
    }

    /// Ends the save in flight, if there is one and it is whole, or in any case where it must.
    fn finish_save(&self, must: bool) -> Result<()> {
        let Some(mut saving) = self.saving.take() else { return Ok(()) };
        if !must && !saving.is_whole(&self.group)? {
            *self.saving.borrow_mut() = Some(saving);
            return Ok(());
        }
        self.telemetry.checkpoint(saving.finish(&self.group)?);
        Ok(())
    }

    /// Tells about a finished step: metrics, progress, and a line of the stage's learning curves.
    ///
    /// # Errors
    /// Where storage failed, or a later attempt has taken over.
    pub fn report(&self, step: u64, figures: &[(Figure, f64)]) -> Result<()> {
        self.telemetry.record_step(step, figures);
        self.append_history(step, figures)
    }

    /// Tells the mean score by each reward, with the step or evaluation that is reported next.
    pub fn report_rewards(&self, of: RewardOf, rewards: &[(String, f64)]) {
        self.telemetry.record_rewards(of, rewards);
        self.rewards.replace(of.keyed(rewards).collect());
    }

    /// Tells about an evaluation after `step` steps.
    ///
    /// # Errors
    /// Where storage failed, a later attempt has taken over, or a figure is not finite.
    pub fn report_evaluation(&self, step: u64, figures: &[(Figure, f64)]) -> Result<()> {
        self.telemetry.record(figures);
        self.append_history(step, figures)?;
        match figures.iter().find(|(_, value)| !value.is_finite()) {
            Some((figure, value)) => Err(Error::new(
                ExitCode::NotFinite,
                format!("the evaluation after step {step} gave {} = {value}", figure.key()),
            )),
            None => Ok(()),
        }
    }

    /// Tells that a model's step was skipped, as the gradient of `norm` (or that of another model, if this is finite) was not
    /// finite, and which batch it was.
    pub fn skipped(&self, name: &str, model: &Model, norm: f64, batch: &str) {
        self.telemetry.skipped_step();
        match model.loss_scale() {
            Some(LossScale { scale, .. }) => {
                tracing::info!(model = name, norm, batch, scale, "a step was skipped, as a gradient overflowed fp16");
            }
            None => tracing::warn!(
                model = name,
                norm,
                batch,
                "a step was skipped, as a gradient is not finite: look at this batch"
            ),
        }
    }

    fn append_history(&self, step: u64, figures: &[(Figure, f64)]) -> Result<()> {
        if !self.group.is_first() {
            return Ok(());
        }
        let mut line: Map<String, Value> = figures.iter().map(|(f, v)| (f.key().to_string(), json!(v))).collect();
        line.extend(self.rewards.take().into_iter().map(|(key, value)| (key, json!(value))));
        line.insert("step".into(), json!(step));
        line.insert("attempt".into(), json!(self.environment.attempt));
        let dir = self.stage_dir();
        files::make_dir(&dir)?;
        // The curves of a later attempt are its own.
        self.lease().check()?;
        files::append_line(&dir.join(HISTORY), &Value::Object(line).to_string())
    }

    /// Writes the trained model in Hugging Face layout, with the job's tokenizer, and beside it the adapters where it was
    /// trained by some; rank 0 does.
    ///
    /// # Errors
    /// Where storage failed or a peer was lost.
    pub fn export(
        &self,
        model: &Model,
        source: &Source,
        score: Option<ScoreNormalisation>,
        metrics: BTreeMap<String, f64>,
    ) -> Result<Output> {
        self.stop_point().map_err(|e| e.context("before the model was written"))?;
        let head = model.head_kind();
        export::write(self, model, source, score)?;
        if self.group.is_first() {
            let kind = if head == HeadKind::Lm { "language model" } else { "reward model" };
            tracing::info!(path = self.config.paths.output, "wrote the {kind}");
        }
        Ok(Output { path: self.config.paths.output.clone(), metrics })
    }
}

/// What rank 0 finds as a stage begins, whose checkpoints lie in `checkpoints`. One that is done has no need of those in
/// `obsolete`.
fn find(run: &Run, holder: Holder, checkpoints: &Path, obsolete: Option<&Path>) -> Result<Begun> {
    let done = match run.done()? {
        Some(done) => done,
        None => {
            let lease = Lease::take(run.dir(), holder, &[run.dir(), checkpoints])?;
            files::remove_unfinished(run.dir(), lease.number())?;
            // The attempt that held it until now may have come to its end meanwhile.
            match run.done()? {
                Some(done) => done,
                None => {
                    let id = run.begin()?;
                    run.unfinish()?;
                    return Ok(Begun::Goes(id, lease));
                }
            }
        }
    };
    // The attempt that ended the stage may not have come to it.
    remove_obsolete(obsolete);
    Ok(Begun::Done(done))
}

/// Removes checkpoints that nobody needs any more. They are room on the volume and nothing more, so the stage does not fail
/// where they cannot be removed.
fn remove_obsolete(checkpoints: Option<&Path>) {
    if let Some(Err(error)) = checkpoints.map(files::remove_dir) {
        tracing::warn!("checkpoints that nobody needs any more are left: {error}");
    }
}

/// Figures by their keys, as an output carries them.
pub fn keyed(figures: &[(Figure, f64)]) -> BTreeMap<String, f64> {
    figures.iter().map(|(f, v)| (f.key().to_string(), *v)).collect()
}
