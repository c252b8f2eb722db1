//! The command `bench`, and the flags that it shares with `plan`. Both are run by hand, and print a table or, with `--json`,
//! one object in the last line.

use crate::bench::{self, Figures, Workload};
use crate::error::{Error, Result};
use crate::model::{Adapters, ModelSpec, read_config};
use clap::Args;
use rlhf_api::stage::{Linear, Lora, Offload, Precision, Recompute, Sharding, Strategy};
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// A strategy as flags.
#[derive(Args, Clone, Copy, Debug)]
pub struct StrategyFlags {
    /// ddp, zero1, zero2 or zero3.
    #[arg(long, value_parser = named::<Sharding>, default_value = "ddp")]
    sharding: Sharding,
    /// none, optimizer or parameters.
    #[arg(long, value_parser = named::<Offload>, default_value = "none")]
    offload: Offload,
    /// none or block.
    #[arg(long, value_parser = named::<Recompute>, default_value = "none")]
    recompute: Recompute,
    /// fp32, bf16 or fp16.
    #[arg(long, value_parser = named::<Precision>, default_value = "bf16")]
    precision: Precision,
}

impl From<StrategyFlags> for Strategy {
    fn from(flags: StrategyFlags) -> Self {
        let StrategyFlags { sharding, offload, recompute, precision } = flags;
        Self { sharding, offload, recompute, precision }
    }
}

/// Adapters as flags.
#[derive(Args, Clone, Debug)]
pub struct LoraFlags {
    /// Trains adapters of this rank on frozen weights, as `lora.rank` of a stage does; in PPO, on one backbone for all models.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    lora_rank: Option<u32>,
    /// The linears that get adapters, such as query,value; by default all.
    #[arg(long, value_delimiter = ',', value_parser = named::<Linear>, requires = "lora_rank")]
    lora_targets: Vec<Linear>,
}

impl LoraFlags {
    /// The adapters of a model of this shape, where there are to be some.
    pub(crate) fn of(&self, spec: &ModelSpec) -> Result<Option<Lora>> {
        let Some(rank) = self.lora_rank else { return Ok(None) };
        let targets = if self.lora_targets.is_empty() { Linear::ALL.to_vec() } else { self.lora_targets.clone() };
        let lora = Lora { rank, alpha: None, dropout: 0.0, targets };
        Adapters::check(spec, &lora)?;
        Ok(Some(lora))
    }
}

/// Parses a value as it is written in a manifest.
pub(crate) fn named<T: DeserializeOwned>(text: &str) -> std::result::Result<T, String> {
    serde_json::from_value(serde_json::Value::String(text.into())).map_err(|e| e.to_string())
}

/// The shape of a model by its key, or of the one in a folder.
pub(crate) fn shape(model: &str) -> Result<ModelSpec> {
    if let Some(spec) = memory_plan::preset(model) {
        return Ok(spec);
    }
    let dir = Path::new(model);
    if !dir.join("config.json").exists() {
        let keys: Vec<&str> = memory_plan::keys().collect();
        return Err(Error::config(format!(
            "--model {model}: neither a folder with a config.json nor one of {}",
            keys.join(", ")
        )));
    }
    Ok(read_config(dir)?.2)
}

/// The flags of `bench`.
#[derive(Args, Debug)]
pub struct BenchFlags {
    /// What to measure.
    workload: Workload,
    /// The models' shape: a key such as s, 8b or opt-1.3b, or a model's folder.
    #[arg(long)]
    model: String,
    /// Samples in a rollout or global batch, over all ranks.
    #[arg(long, default_value_t = 8)]
    batch: u32,
    /// Samples that a rank runs at a time; by default its whole share.
    #[arg(long)]
    micro: Option<u32>,
    #[command(flatten)]
    strategy: StrategyFlags,
    #[command(flatten)]
    lora: LoraFlags,
    /// Tokens of a prompt.
    #[arg(long, default_value_t = 400)]
    prompt_tokens: u32,
    /// Tokens of a response.
    #[arg(long, default_value_t = 112)]
    new_tokens: u32,
    /// Rounds that are counted, after one that is not.
    #[arg(long, default_value_t = 2)]
    rounds: u32,
    /// Measures what saves cost too, with sft and reward: they are written into a new folder in this one and removed.
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Prints one JSON object in the last line.
    #[arg(long)]
    json: bool,
}

/// Runs `bench`.
///
/// # Errors
/// As [`bench::run`].
pub fn bench(flags: &BenchFlags) -> Result<()> {
    for (flag, value) in
        [("--batch", flags.batch), ("--rounds", flags.rounds), ("--prompt-tokens", flags.prompt_tokens)]
    {
        if value == 0 {
            return Err(Error::config(format!("{flag} is 0: write at least 1")));
        }
    }
    let spec = shape(&flags.model)?;
    let options = bench::Options {
        workload: flags.workload,
        lora: flags.lora.of(&spec)?,
        spec,
        strategy: flags.strategy.into(),
        batch: flags.batch,
        micro: flags.micro.unwrap_or(flags.batch).max(1),
        prompt_tokens: flags.prompt_tokens,
        new_tokens: flags.new_tokens.max(1),
        rounds: flags.rounds,
        save: flags.save.clone(),
    };
    if let Some(figures) = bench::run(&options)? {
        if flags.json {
            println!("{}", serde_json::to_string(&figures).map_err(|e| Error::bug(e.to_string()))?);
        } else {
            print_figures(&figures);
        }
    }
    Ok(())
}

fn print_figures(figures: &Figures) {
    let mib = |bytes: u64| format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20));
    println!("samples/s            {:.3}", figures.samples_per_second);
    if let Some(tokens) = figures.new_tokens_per_second {
        println!("new tokens/s         {tokens:.1}");
    }
    println!("TFLOP/s              {:.3}", figures.tflops);
    println!("of a matrix product  {:.0} %", 100.0 * figures.utilisation);
    println!("peak on the device   {}", mib(figures.peak_device_bytes));
    println!("peak on the host     {}", mib(figures.peak_host_bytes));
    println!("sent a round         {}", mib(figures.sent_bytes));
    for (phase, seconds) in &figures.phase_seconds {
        println!("{phase:<20} {seconds:.3} s");
    }
    if let (Some(foreground), Some(stall)) = (figures.save_foreground_seconds, figures.save_stall_seconds) {
        println!("a save               {foreground:.3} s");
        println!("in the background    {stall:.3} s longer");
    }
}
