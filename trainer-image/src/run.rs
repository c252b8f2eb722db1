//! A stage's run: the folder on the volume that holds what it was begun with, which attempt may write, and whether it is done.
//!
//! The folder is the run's identity. A job that is made anew with the same run path goes on where the run was: from its last
//! checkpoint, or, where the stage is done, at its end. It must be asked to do the same, though; what changes memory and speed
//! alone may differ.

use crate::error::{Error, Result};
use crate::files;
use rlhf_api::config::{StageConfig, StagePaths};
use rlhf_api::report::Output;
use rlhf_api::stage::{Export, StageKind};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fmt::{self, Display, Formatter};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The file with what a run was begun with.
const BEGUN: &str = "run.json";
/// The file that is there once everything that the stage leaves is.
const DONE: &str = "output.json";
/// Differences between two configs that are named.
const NAMED: usize = 3;

/// What a stage is asked to do, as far as what it leaves depends on it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Asked {
    stage: String,
    kind: StageKind,
    seed: u64,
    paths: StagePaths,
    #[serde(default)]
    export: Export,
}

/// Tells a run from others that were begun in the same folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunId(u64);

impl Display for RunId {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl From<RunId> for String {
    fn from(id: RunId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for RunId {
    type Error = std::num::ParseIntError;

    fn try_from(text: String) -> std::result::Result<Self, Self::Error> {
        u64::from_str_radix(&text, 16).map(Self)
    }
}

/// As ranks tell it each other.
impl From<i64> for RunId {
    fn from(bits: i64) -> Self {
        Self(bits.cast_unsigned())
    }
}

impl From<RunId> for i64 {
    fn from(id: RunId) -> Self {
        id.0.cast_signed()
    }
}

/// A run as it was begun.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Begun {
    id: RunId,
    #[serde(flatten)]
    asked: Asked,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Done {
    /// The run's id.
    run: RunId,
    /// The stage's last step.
    pub step: u64,
    /// Where its model is, and its last figures.
    pub output: Output,
}

/// The folder of a run.
#[derive(Clone, Debug)]
pub struct Run {
    dir: PathBuf,
    /// The stage's model.
    model: PathBuf,
    asked: Asked,
}

impl Run {
    /// The run of a stage on the volume.
    pub fn new(config: &StageConfig, volume: &Path) -> Self {
        let StageConfig { stage, kind, seed, paths, export, .. } = config.clone();
        let model = volume.join(&paths.output);
        let dir = model.parent().map_or(model.clone(), PathBuf::from);
        Self { dir, model, asked: Asked { stage, kind, seed, paths, export } }
    }

    /// The folder: the stage's model, checkpoints, samples and learning curves lie in it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes sure that what was begun in the folder, if anything was, is what is asked for.
    ///
    /// # Errors
    /// Says what differs, or where storage failed.
    pub fn check(&self) -> Result<()> {
        self.begun().map(|_| ())
    }

    /// The id of the run that was begun here, or begins now.
    ///
    /// # Errors
    /// As [`Run::check`].
    pub fn begin(&self) -> Result<RunId> {
        if let Some(begun) = self.begun()? {
            return Ok(begun.id);
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut hash = Sha256::new().chain_update(json(&self.asked)?.to_string());
        hash.update(now.as_nanos().to_le_bytes());
        hash.update(std::process::id().to_le_bytes());
        let id = RunId(hash.finalize().iter().take(8).fold(0, |id, byte| id << 8 | u64::from(*byte)));
        let begun = Begun { id, asked: self.asked.clone() };
        files::make_dir(&self.dir)?;
        files::write(&self.dir.join(BEGUN), pretty(&begun)?.as_bytes())?;
        Ok(begun.id)
    }

    /// How the run ended, if it has.
    ///
    /// # Errors
    /// As [`Run::check`].
    pub fn done(&self) -> Result<Option<Done>> {
        let Some(begun) = self.begun()? else { return Ok(None) };
        let done: Option<Done> = read(&self.dir.join(DONE))?;
        let Some(done) = done.filter(|done| done.run == begun.id) else { return Ok(None) };
        // A volume that fails says nothing of the model: it may be there.
        let config = self.model.join("config.json");
        let there = config.try_exists().map_err(|e| Error::storage(&config, e))?;
        Ok(there.then_some(done))
    }

    /// Says that the run `id` has left all that it leaves.
    ///
    /// # Errors
    /// Where storage failed.
    pub fn finish(&self, id: RunId, step: u64, output: &Output) -> Result<()> {
        let done = Done { run: id, step, output: output.clone() };
        files::write(&self.dir.join(DONE), pretty(&done)?.as_bytes())
    }

    /// Takes back what [`Run::finish`] said: some of what it left is gone, and made again.
    ///
    /// # Errors
    /// Where storage failed.
    pub fn unfinish(&self) -> Result<()> {
        files::remove_file(&self.dir.join(DONE))
    }

    fn begun(&self) -> Result<Option<Begun>> {
        let Some(begun) = read::<Begun>(&self.dir.join(BEGUN))? else { return Ok(None) };
        let (mut there, mut here) = (json(&begun.asked)?, json(&self.asked)?);
        [&mut there, &mut here].into_iter().for_each(forget_speed);
        let mut differences = Vec::new();
        compare("", &there, &here, &mut differences);
        if differences.is_empty() {
            return Ok(Some(begun));
        }
        let more = differences.len().saturating_sub(NAMED);
        differences.truncate(NAMED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        Err(Error::config(format!(
            "{} holds a run of stage '{}' that was begun otherwise: {}{more}; ask for the same, choose another storage.runPath, or delete the folder",
            self.dir.display(),
            self.asked.stage,
            differences.join(", ")
        )))
    }
}

/// Leaves out what changes memory and speed, but not what is learnt.
fn forget_speed(asked: &mut Value) {
    let kinds = asked.get_mut("kind").and_then(Value::as_object_mut);
    for settings in kinds.into_iter().flat_map(|kinds| kinds.values_mut()) {
        if let Some(batch) = settings.get_mut("batch").and_then(Value::as_object_mut) {
            batch.remove("microSize");
        }
    }
}

/// Collects where two documents differ.
fn compare(at: &str, there: &Value, here: &Value, differences: &mut Vec<String>) {
    match (there, here) {
        (Value::Object(a), Value::Object(b)) => {
            let added = b.keys().filter(|key| !a.contains_key(*key));
            for key in a.keys().chain(added) {
                let at = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                compare(&at, a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null), differences);
            }
        }
        _ if there == here => {}
        _ => differences.push(format!("{at} was {there} and is {here}")),
    }
}

fn json<T: Serialize>(value: &T) -> Result<Value> {
    serde_json::to_value(value).map_err(|e| Error::bug(e.to_string()))
}

fn pretty<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string_pretty(value).map_err(|e| Error::bug(e.to_string()))
}

/// A document on the volume, if there is one.
fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| Error::input(format!("{}: {e}; delete the stage's folder to start it anew", path.display()))),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::storage(path, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(change: impl FnOnce(&mut Value)) -> StageConfig {
        let mut config = json!({
            "job": {"namespace": "n", "name": "j", "uid": "u"}, "stage": "tune", "seed": 1, "collectiveTimeoutSeconds": 60,
            "kind": {"sft": {
                "dataset": {"source": "volume://d.jsonl"}, "epochs": 1, "batch": {"globalSize": 8}, "maxLength": 64,
                "optimizer": {"learningRate": 0.001}
            }},
            "paths": {"baseModel": "models/m", "startModel": "models/m", "output": "runs/x/tune/model", "checkpoints": "runs/x/tune/checkpoints"},
        });
        change(&mut config);
        serde_json::from_value(config).unwrap()
    }

    #[test]
    fn a_run_is_told_by_its_folder_and_what_is_asked_of_it() {
        let volume = tempfile::tempdir().unwrap();
        let run = |change: fn(&mut Value)| Run::new(&config(change), volume.path());
        let first = run(|_| ());
        first.check().unwrap();
        assert!(first.done().unwrap().is_none());
        let id = first.begin().unwrap();
        assert_eq!((id.to_string().len(), first.dir()), (16, volume.path().join("runs/x/tune").as_path()));
        // Another job, another attempt, and what changes speed alone.
        let same: [fn(&mut Value); 4] = [
            |_| (),
            |c| c["job"]["uid"] = json!("v"),
            |c| c["kind"]["sft"]["batch"]["microSize"] = json!(2),
            |c| (c["collectiveTimeoutSeconds"], c["checkpoint"]) = (json!(5), json!({"everySteps": 3})),
        ];
        for change in same {
            assert_eq!(run(change).begin().unwrap(), id);
        }
        type Change = (fn(&mut Value), &'static [&'static str]);
        let other: [Change; 4] = [
            (
                |c| c["kind"]["sft"]["optimizer"]["learningRate"] = json!(0.01),
                &["kind.sft.optimizer.learningRate was 0.001 and is 0.01"],
            ),
            (
                |c| (c["seed"], c["kind"]["sft"]["maxSteps"]) = (json!(2), json!(9)),
                &["kind.sft.maxSteps was null and is 9", "seed was 1 and is 2"],
            ),
            (
                |c| c["kind"]["sft"]["dataset"] = json!({"source": "volume://other.jsonl"}),
                &["\"volume://d.jsonl\" and is \"volume://other.jsonl\""],
            ),
            (|c| c["export"] = json!({"dtype": "bf16"}), &["export.dtype was null and is \"bf16\""]),
        ];
        for (change, parts) in other {
            let error = run(change).begin().unwrap_err();
            assert_eq!(error.exit.code(), 64);
            assert!(
                parts.iter().all(|p| error.message.contains(p)) && error.message.contains("storage.runPath"),
                "{error}"
            );
        }
        // A later version of the trainer knows a setting more, and its default is what was meant.
        let path = first.dir().join(BEGUN);
        let mut begun: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        begun["kind"]["sft"].as_object_mut().unwrap().remove("trainOnPrompt").unwrap();
        begun.as_object_mut().unwrap().remove("export").unwrap();
        std::fs::write(&path, begun.to_string()).unwrap();
        assert_eq!(first.begin().unwrap(), id);
    }

    #[test]
    fn it_is_done_once_it_says_so_and_its_model_is_there() {
        let volume = tempfile::tempdir().unwrap();
        let run = Run::new(&config(|_| ()), volume.path());
        let id = run.begin().unwrap();
        assert_eq!(RunId::from(i64::from(id)), id);
        let output = Output { path: "runs/x/tune/model".into(), metrics: [("evalLoss".to_owned(), 0.5)].into() };
        run.finish(id, 20, &output).unwrap();
        assert!(run.done().unwrap().is_none(), "there is no model");
        let model = volume.path().join("runs/x/tune/model");
        files::make_dir(&model).unwrap();
        std::fs::write(model.join("config.json"), "{}").unwrap();
        let done = run.done().unwrap().unwrap();
        assert_eq!((done.step, done.output), (20, output.clone()));
        run.unfinish().unwrap();
        assert!(run.done().unwrap().is_none());
        // Where the volume fails, nobody knows, and the stage is not begun anew.
        run.finish(id, 20, &output).unwrap();
        std::fs::remove_dir_all(&model).unwrap();
        std::os::unix::fs::symlink(&model, &model).unwrap();
        let error = run.done().unwrap_err();
        assert!(error.exit.code() == 74 && error.message.contains("config.json"), "{error}");
        std::fs::remove_file(&model).unwrap();
        files::make_dir(&model).unwrap();
        std::fs::write(model.join("config.json"), "{}").unwrap();
        assert!(run.done().unwrap().is_some());
        // What another run in the same folder left does not count.
        run.finish(RunId(7), 20, &output).unwrap();
        assert!(run.done().unwrap().is_none());
    }

    #[test]
    fn a_file_that_is_not_one_of_a_run_is_named() {
        let volume = tempfile::tempdir().unwrap();
        let run = Run::new(&config(|_| ()), volume.path());
        files::make_dir(run.dir()).unwrap();
        std::fs::write(run.dir().join(BEGUN), "{").unwrap();
        let error = run.begin().unwrap_err();
        assert!(error.exit.code() == 65 && error.message.contains("run.json"), "{error}");
    }
}
