//! The command `plan`: what each strategy needs on device and host, which ones fit, and which is the fastest of these. It
//! computes from shapes alone and never touches a device.

use crate::commands::{LoraFlags, named, shape};
use crate::error::{Error, Result};
use clap::{Args, ValueEnum};
use memory_plan::{
    DeviceBytes, Fixed, HostBytes, Machines, Named, Scorer, Stage, Task, Verdict, dataset_bytes, fastest, parse_bytes,
    verdicts,
};
use rlhf_api::stage::{Offload, Precision, Recompute, Sharding};
use serde_json::{Value, json};
use std::fmt::Write;

/// The stages by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum StageName {
    /// Supervised fine-tuning.
    Sft,
    /// Reward-model training.
    Reward,
    /// PPO with four models of the same shape.
    Ppo,
}

/// The flags of `plan`.
#[derive(Args, Debug)]
pub struct PlanFlags {
    /// The model's shape: a key such as s, 8b or opt-1.3b, or a folder with a config.json.
    #[arg(long)]
    model: String,
    /// The stage.
    #[arg(long)]
    stage: StageName,
    /// Machines.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    nodes: u32,
    /// Devices of each machine.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    devices: u32,
    /// Memory of each device, such as 80Gi. Without it the CPU computes, and all lies in host memory.
    #[arg(long, value_parser = memory)]
    device_memory: Option<u64>,
    /// Memory of each machine, such as 1Ti.
    #[arg(long, value_parser = memory)]
    host_memory: u64,
    /// Rows that a rank runs through a model at a time.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Tokens of a row; in PPO of prompt and response together.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..))]
    length: u32,
    /// Tokens of a response in PPO.
    #[arg(long, default_value_t = 112, value_parser = clap::value_parser!(u32).range(1..))]
    new_tokens: u32,
    /// Responses of a rollout over all ranks in PPO; by default --batch for each rank.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rollout_batch: Option<u32>,
    #[command(flatten)]
    lora: LoraFlags,
    /// Only this sharding: ddp, zero1, zero2 or zero3.
    #[arg(long, value_parser = named::<Sharding>)]
    sharding: Option<Sharding>,
    /// Only this offloading: none, optimizer or parameters.
    #[arg(long, value_parser = named::<Offload>)]
    offload: Option<Offload>,
    /// Only this recomputation: none or block.
    #[arg(long, value_parser = named::<Recompute>)]
    recompute: Option<Recompute>,
    /// fp32, bf16 or fp16.
    #[arg(long, value_parser = named::<Precision>, default_value = "bf16")]
    precision: Precision,
    /// Tokens of the dataset.
    #[arg(long, default_value_t = 0)]
    dataset_tokens: u64,
    /// Prints one JSON object in the last line.
    #[arg(long)]
    json: bool,
}

impl From<&PlanFlags> for Fixed {
    fn from(flags: &PlanFlags) -> Self {
        let PlanFlags { precision, sharding, offload, recompute, .. } = *flags;
        Self { precision, sharding, offload, recompute }
    }
}

fn memory(text: &str) -> std::result::Result<u64, String> {
    parse_bytes(text).ok_or_else(|| "not an amount of memory such as 80Gi or 1Ti".into())
}

/// Runs `plan`.
///
/// # Errors
/// The model or a flag is wrong. That nothing fits is an answer, not an error.
pub fn plan(flags: &PlanFlags) -> Result<()> {
    let (task, machines) = question(flags)?;
    let verdicts = verdicts(&task, &machines, flags.into());
    let answer = fastest(&verdicts, &machines);
    let (chosen, reason) = match &answer {
        Ok(verdict) => (Some(verdict), None),
        Err(error) => (error.closest.as_deref(), Some(error.to_string())),
    };
    let chosen = chosen.ok_or_else(|| Error::bug("no strategy is left to plan for"))?;
    if flags.json {
        println!("{}", object(chosen, reason.as_deref())?);
        return Ok(());
    }
    print!("{}", table(&verdicts, answer.is_ok().then_some(chosen)));
    match reason {
        Some(reason) => println!("{reason}"),
        None => println!("chosen: {}", Named(&chosen.plan.strategy)),
    }
    Ok(())
}

fn question(flags: &PlanFlags) -> Result<(Task, Machines)> {
    let model = shape(&flags.model)?;
    if i64::from(flags.length) > model.max_positions {
        let (length, most) = (flags.length, model.max_positions);
        return Err(Error::config(format!("--length {length}: the model knows {most} positions")));
    }
    let lora = flags.lora.of(&model)?;
    let machines = Machines {
        nodes: flags.nodes,
        devices: flags.devices,
        device_memory: flags.device_memory,
        host_memory: flags.host_memory,
    };
    let stage = match flags.stage {
        StageName::Sft => Stage::Sft,
        StageName::Reward => Stage::RewardModel,
        StageName::Ppo if flags.new_tokens >= flags.length => {
            let (new, all) = (flags.new_tokens, flags.length);
            return Err(Error::config(format!("--new-tokens {new} leaves no room for a prompt in --length {all}")));
        }
        StageName::Ppo => {
            let rows = flags.rollout_batch.map_or(flags.batch, |rows| rows.div_ceil(machines.world_size()));
            Stage::ppo(Scorer::new(model.clone(), lora.clone()), rows, flags.new_tokens)
        }
    };
    let dataset = dataset_bytes(flags.dataset_tokens / u64::from(flags.length.max(1)));
    Ok((Task { stage, model, lora, rows: flags.batch, time: flags.length, dataset }, machines))
}

/// The answer as one JSON object: what was chosen or, where nothing fits, what comes closest.
fn object(verdict: &Verdict, reason: Option<&str>) -> Result<Value> {
    let plan = &verdict.plan;
    let categories =
        |bytes: std::result::Result<Value, serde_json::Error>| bytes.map_err(|e| Error::bug(e.to_string()));
    Ok(json!({
        "fits": verdict.fits(),
        "setting": plan.strategy,
        "device_bytes": plan.device.total() as u64,
        "host_bytes": plan.host.total() as u64,
        "device": whole(categories(serde_json::to_value(plan.device))?),
        "host": whole(categories(serde_json::to_value(plan.host))?),
        "phase": plan.phase,
        "device_lacks_bytes": verdict.device_lacks.ceil() as u64,
        "host_lacks_bytes": verdict.host_lacks.ceil() as u64,
        "checkpoint_copies_bytes": plan.checkpoint_copies as u64,
        "checkpoint_copies_fit": verdict.copies_fit,
        "reason": reason,
    }))
}

/// The same object with whole numbers.
fn whole(categories: Value) -> Value {
    match categories {
        Value::Object(map) => {
            map.into_iter().map(|(name, bytes)| (name, json!(bytes.as_f64().unwrap_or_default() as u64))).collect()
        }
        other => other,
    }
}

/// One line for each strategy, in GiB; a star marks the chosen one.
fn table(verdicts: &[Verdict], chosen: Option<&Verdict>) -> String {
    let gib = |bytes: f64| bytes / f64::from(1 << 30);
    let mut text = format!(
        "GiB {:<44}|{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>10} |{:>9}{:>9}{:>9}{:>9}{:>10} |\n",
        "",
        "params",
        "fetched",
        "optim",
        "grads",
        "activ",
        "logits",
        "cache",
        "DEVICE",
        "params",
        "optim",
        "grads",
        "loading",
        "HOST"
    );
    for verdict in verdicts {
        let plan = &verdict.plan;
        let DeviceBytes { parameters, fetched, optimizer, gradients, activations, logits, cache } = plan.device;
        let device = [parameters, fetched, optimizer, gradients, activations, logits, cache];
        let HostBytes { parameters, optimizer, gradients, loading, dataset } = plan.host;
        let host = [parameters, optimizer, gradients, loading + dataset];
        let star = if chosen.is_some_and(|c| c.plan.strategy == plan.strategy) { '*' } else { ' ' };
        let columns = |bytes: &[f64]| bytes.iter().fold(String::new(), |line, b| line + &format!("{:>9.2}", gib(*b)));
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            " {star}  {:<44}|{}{:>10.2} |{}{:>10.2} | {}",
            Named(&plan.strategy).to_string(),
            columns(&device),
            gib(plan.device.total()),
            columns(&host),
            gib(plan.host.total()),
            room(verdict)
        );
    }
    text
}

/// Whether it fits, or by how much not.
fn room(verdict: &Verdict) -> String {
    let gib = |bytes: f64| format!("{:.2}", bytes / f64::from(1 << 30));
    let lacks: Vec<String> = [("device", verdict.device_lacks), ("host", verdict.host_lacks)]
        .into_iter()
        .filter(|(_, bytes)| *bytes > 0.0)
        .map(|(name, bytes)| format!("{name} lacks {}", gib(bytes)))
        .collect();
    match (lacks.is_empty(), verdict.copies_fit) {
        (false, _) => lacks.join(", "),
        (true, true) => "fits".into(),
        (true, false) => {
            format!("fits, without {} for copies of a checkpoint", gib(verdict.plan.checkpoint_copies))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        flags: PlanFlags,
    }

    fn flags(text: &str) -> PlanFlags {
        Cli::try_parse_from(std::iter::once("plan").chain(text.split_whitespace())).unwrap().flags
    }

    fn answer(text: &str) -> (Vec<Verdict>, Value) {
        let flags = flags(text);
        let (task, machines) = question(&flags).unwrap();
        let verdicts = verdicts(&task, &machines, (&flags).into());
        let object = match fastest(&verdicts, &machines) {
            Ok(verdict) => object(&verdict, None),
            Err(error) => object(error.closest.as_deref().unwrap(), Some(&error.to_string())),
        };
        (verdicts, object.unwrap())
    }

    #[test]
    fn the_object_says_what_was_chosen_and_its_categories_add_up() {
        let (_, object) =
            answer("--model 24b --stage ppo --nodes 1 --devices 1 --device-memory 80Gi --host-memory 1Ti");
        assert_eq!(object["fits"], true, "{object}");
        assert_eq!(object["setting"]["offload"], "parameters");
        for (total, parts) in [("device_bytes", "device"), ("host_bytes", "host")] {
            let sum: u64 = object[parts].as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum();
            assert!(sum > 0 && object[total].as_u64().unwrap().abs_diff(sum) < 8, "{object}");
        }
        assert!(object["device_bytes"].as_u64().unwrap() < 80 << 30);
    }

    #[test]
    fn nothing_that_fits_is_an_answer_too() {
        let (verdicts, object) = answer("--model 24b --stage ppo --device-memory 80Gi --host-memory 64Gi");
        assert_eq!(object["fits"], false);
        assert!(object["host_lacks_bytes"].as_u64().unwrap() > 0);
        assert!(object["reason"].as_str().unwrap().contains("give hosts more memory"), "{object}");
        let table = table(&verdicts, None);
        assert_eq!(table.lines().count(), 1 + verdicts.len());
        assert!(table.contains("device lacks") && table.contains("host lacks") && !table.contains('*'), "{table}");
    }

    #[test]
    fn the_table_marks_the_chosen_strategy_alone() {
        let (verdicts, _) =
            answer("--model 175b --stage ppo --nodes 8 --devices 8 --device-memory 80Gi --host-memory 1Ti");
        let table = table(&verdicts, verdicts.iter().find(|v| v.fits()));
        assert_eq!(table.matches('*').count(), 1, "{table}");
        assert!(table.lines().any(|l| l.trim_start().starts_with("* ") && l.contains("fits")), "{table}");
    }

    #[test]
    fn flags_that_make_no_sense_are_refused() {
        for (text, part) in [
            ("--model 9b --stage sft --host-memory 1Ti", "neither a folder"),
            ("--model s --stage sft --host-memory 1Ti --length 2048", "knows 1024 positions"),
            ("--model s --stage ppo --host-memory 1Ti --length 100", "no room for a prompt"),
        ] {
            let error = question(&flags(text)).unwrap_err();
            assert!(error.message.contains(part), "{text}: {error}");
        }
        for text in ["--model s --stage sft --host-memory lots", "--model s --stage sft --host-memory 1Ti --nodes 0"] {
            assert!(Cli::try_parse_from(std::iter::once("plan").chain(text.split_whitespace())).is_err(), "{text}");
        }
    }
}
