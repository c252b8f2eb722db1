//! What a stage's dataset is made of, where it lies once it is tokenised, and how it comes there.
//!
//! It lies in the stage's folder, under the hash of all that it was made from: the bytes of the files, the tokenizer, the settings
//! that matter and the trainer's version. So what changes makes another, and what is mapped never changes. Prepare makes it;
//! where prepare did not run, or a file has changed since, rank 0 does.

use super::files::Files;
use super::store::{Header, MadeFrom, Source, Store, VERSION, Written};
use super::{prompts, rankings, sft};
use crate::error::{Error, Result};
use crate::files::{self, NewDir};
use crate::hex::hex;
use crate::lease::Lease;
use crate::run::Run;
use crate::tokenizer::Tokenizer;
use rlhf_api::config::StageConfig;
use rlhf_api::stage::StageKind;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How the names of datasets begin; a hash follows.
const PREFIX: &str = "data-";
/// How long a rank looks for what rank 0 says that it has made: some network volumes show it late.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// What a stage's dataset is made of.
#[derive(Debug)]
pub struct Recipe<'a> {
    stage: &'a StageConfig,
    files: Files,
    /// The folder of the stage's run.
    dir: PathBuf,
    /// That of the tokenizer.
    tokenizer: PathBuf,
}

impl<'a> Recipe<'a> {
    /// That of a stage whose job's volume is mounted at `volume`.
    ///
    /// # Errors
    /// A source is no location on the volume, or there is none.
    pub fn of(stage: &'a StageConfig, volume: &Path) -> Result<Self> {
        let files = Files::of(volume, stage.kind.dataset().1)?;
        let dir = Run::new(stage, volume).dir().to_path_buf();
        Ok(Self { stage, files, dir, tokenizer: volume.join(&stage.paths.base_model) })
    }

    /// The dataset, made now where it is not there; only then the tokenizer is loaded.
    ///
    /// # Errors
    /// A record or a file cannot be used, a dataset that is there is damaged, or storage failed.
    pub fn find_or_make(&self, lease: &Lease) -> Result<Store> {
        let recipe = self.hash()?;
        match self.find(&recipe)? {
            Some(store) => {
                tracing::info!(dataset = %self.dir.display(), "the dataset is tokenised already");
                Ok(store)
            }
            None => self.make(recipe, lease, &Tokenizer::load(&self.tokenizer)?),
        }
    }

    /// The dataset that rank 0 has found or made, by the beginning of its name's hash; `None` where this rank does not see it.
    ///
    /// # Errors
    /// It is damaged, or storage failed.
    pub fn made(&self, name: u64) -> Result<Option<Store>> {
        let (dir, started) = (self.dir.join(format!("{PREFIX}{name:016x}")), Instant::now());
        loop {
            match Store::open(&dir)? {
                None if started.elapsed() < PATIENCE => std::thread::sleep(LOOK_AGAIN),
                found => return Ok(found),
            }
        }
    }

    /// A dataset that was made so from files that are still the same.
    fn find(&self, recipe: &str) -> Result<Option<Store>> {
        for name in files::names(&self.dir)? {
            // One that is being written has more to its name.
            if !name.starts_with(PREFIX) || name.contains('.') {
                continue;
            }
            // What was made otherwise, by another version or of other settings, is nobody's trouble here.
            let dir = self.dir.join(name);
            if Header::recipe(&dir).as_deref() != Some(recipe) {
                continue;
            }
            let Some(store) = Store::open(&dir)? else { continue };
            if self.files.are(&store.made_from().files)? {
                return Ok(Some(store));
            }
        }
        Ok(None)
    }

    fn make(&self, recipe: String, lease: &Lease, tokenizer: &Tokenizer) -> Result<Store> {
        files::make_dir(&self.dir)?;
        // Its name is known once its files have been read. Of two that make it at once, each has a folder of its own.
        let dir = NewDir::create(&self.dir.join(format!("{PREFIX}new-{}", unique())), lease)?;
        let (written, sources) = self.read(tokenizer, Some(dir.path()))?;
        let made_from = MadeFrom { recipe, files: sources };
        let target = self.dir.join(format!("{PREFIX}{:016x}", name(&made_from)));
        written.seal(dir.path(), made_from)?;
        dir.publish_as(&target)?;
        Store::open(&target)?.ok_or_else(|| Error::bug("a dataset that was just written is not there"))
    }

    /// Reads the records and tokenises them, into a folder or into memory.
    fn read(&self, tokenizer: &Tokenizer, to: Option<&Path>) -> Result<(Written, Vec<Source>)> {
        let seed = self.stage.seed;
        match &self.stage.kind {
            StageKind::Sft(settings) => sft::read(&self.files, settings, tokenizer, seed, to),
            StageKind::RewardModel(settings) => rankings::read(&self.files, settings, tokenizer, seed, to),
            StageKind::Ppo(settings) => prompts::read(&self.files, settings, tokenizer, seed, to),
        }
    }

    /// Hash of all that a dataset depends on but for the files' bytes.
    fn hash(&self) -> Result<String> {
        let settings = match &self.stage.kind {
            StageKind::Sft(s) => {
                json!({"sft": [s.dataset, s.format, s.max_length, s.train_on_prompt, s.row_tokens()]})
            }
            StageKind::RewardModel(s) => json!({"rewardModel": [s.dataset, s.max_length]}),
            StageKind::Ppo(s) => json!({"ppo": [s.prompts, s.max_prompt_length]}),
        };
        let tokenizer = hex(&Tokenizer::fingerprint(&self.tokenizer)?);
        let all = json!([VERSION, env!("CARGO_PKG_VERSION"), settings, self.stage.seed, tokenizer]);
        Ok(hex(&Sha256::digest(all.to_string())))
    }
}

impl Store {
    /// The beginning of its name's hash, by which [`Recipe::made`] finds it.
    pub fn name(&self) -> u64 {
        name(self.made_from())
    }

    /// Hash of the bytes of the file that it was made from; of several, of their hashes.
    pub fn file(&self) -> [u8; 32] {
        self.made_from().file()
    }
}

/// The beginning of the hash of all that a dataset was made from.
fn name(made_from: &MadeFrom) -> u64 {
    let mut hasher = Sha256::new().chain_update(&made_from.recipe);
    made_from.files.iter().for_each(|file| hasher.update(&file.sha256));
    hasher.finalize().iter().take(8).fold(0, |name, byte| name << 8 | u64::from(*byte))
}

/// Tells a process's work from that of others.
fn unique() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{:x}-{}", now.as_nanos(), std::process::id())
}
