//! `rlhf-trainer`: the program in the trainer's container.
//!
//! `launch` starts the workers of a pod, `worker` is one of them, `prepare` checks a job before any device is taken. Each
//! ends with an exit code of the contract, and this is the one place that prints why.

use clap::{Args, Parser, Subcommand};
use rlhf_api::config::{CONFIG_DIR, CONFIG_FILE, HTTP_PORT, PrepareConfig, SECRETS_DIR};
use rlhf_api::names::PREPARE;
use rlhf_api::report::{ExitCode, Output, TerminationMessage};
use rlhf_trainer::commands::{self, BenchFlags};
use rlhf_trainer::environment::Environment;
use rlhf_trainer::plan_command::{self, PlanFlags};
use rlhf_trainer::prepare::{self, StageReport};
use rlhf_trainer::telemetry::{Telemetry, logging};
use rlhf_trainer::try_command::{self, GenerateFlags, ScoreFlags};
use rlhf_trainer::{config_file, ending, fetch, launch, worker};
use std::path::{Path, PathBuf};

/// Supervised fine-tuning, reward-model training and PPO on libtorch.
#[derive(Parser)]
#[command(name = "rlhf-trainer", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Starts one worker for each local rank and turns their ends into one: the entry of a trainer container.
    Launch {
        #[command(flatten)]
        config: ConfigFlag,
        #[command(flatten)]
        http: HttpFlag,
        #[command(flatten)]
        termination: TerminationFlag,
    },
    /// Runs one rank of a stage.
    Worker {
        #[command(flatten)]
        config: ConfigFlag,
        #[command(flatten)]
        http: HttpFlag,
    },
    /// Measures a workload on models of random weights.
    Bench {
        #[command(flatten)]
        flags: BenchFlags,
    },
    /// Says what each strategy needs on device and host, and which is the fastest that fits.
    Plan {
        #[command(flatten)]
        flags: PlanFlags,
    },
    /// Answers a prompt with a model on this machine.
    Generate {
        #[command(flatten)]
        flags: GenerateFlags,
    },
    /// Says what a model thinks of given tokens: their log-probabilities, or a reward model's score.
    Score {
        #[command(flatten)]
        flags: ScoreFlags,
    },
    /// Checks the models and data of all of a job's stages.
    Prepare {
        #[command(flatten)]
        config: ConfigFlag,
        #[command(flatten)]
        http: HttpFlag,
        #[command(flatten)]
        termination: TerminationFlag,
    },
}

#[derive(Args)]
struct ConfigFlag {
    /// The config file.
    #[arg(long, value_name = "FILE", default_value_os_t = Path::new(CONFIG_DIR).join(CONFIG_FILE))]
    config: PathBuf,
}

#[derive(Args)]
struct HttpFlag {
    /// The first worker's port for /metrics, /progress and /healthz; local rank r takes this plus r. 0: none.
    #[arg(long, value_name = "PORT", default_value_t = HTTP_PORT)]
    http_port: u16,
}

#[derive(Args)]
struct TerminationFlag {
    /// Where the termination message is written. Default: Kubernetes' own file, if there is one.
    #[arg(long, value_name = "FILE")]
    termination_file: Option<PathBuf>,
}

fn main() -> std::process::ExitCode {
    let message = match Cli::try_parse() {
        Ok(cli) => run(cli.command),
        Err(error) => {
            let wrong = error.use_stderr();
            // Nothing can be done where even the terminal is gone.
            let _ = error.print();
            return exit(if wrong { ExitCode::BadConfig.code() } else { ExitCode::Done.code() });
        }
    };
    if message.code != ExitCode::Done.code() {
        tracing::error!(
            code = message.code,
            reason = message.reason,
            rank = message.rank,
            step = message.step,
            "{}",
            message.message
        );
    }
    exit(message.code)
}

fn exit(code: i32) -> std::process::ExitCode {
    std::process::ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

fn run(command: Command) -> TerminationMessage {
    let options =
        |config: ConfigFlag, http: HttpFlag| worker::Options { config: config.config, http_port: http.http_port };
    match command {
        Command::Launch { config, http, termination } => {
            leave(termination, logged(|| launch::run(&options(config, http))))
        }
        Command::Worker { config, http } => logged(|| worker::run(&options(config, http))),
        Command::Bench { flags } => by_hand(|| commands::bench(&flags)),
        Command::Plan { flags } => by_hand(|| plan_command::plan(&flags)),
        Command::Generate { flags } => by_hand(|| try_command::generate(&flags)),
        Command::Score { flags } => by_hand(|| try_command::score(&flags)),
        Command::Prepare { config, http, termination } => {
            leave(termination, logged(|| prepare(&options(config, http))))
        }
    }
}

/// Does what a person asked for at a terminal.
fn by_hand(work: impl FnOnce() -> rlhf_trainer::error::Result<()>) -> TerminationMessage {
    logged(|| {
        ending::message(
            ending::guard(|| work().map(|()| Output { path: String::new(), metrics: Default::default() })),
            None,
            None,
        )
    })
}

/// Does `work` with logging on.
fn logged(work: impl FnOnce() -> TerminationMessage) -> TerminationMessage {
    match logging::init() {
        Ok(()) => work(),
        Err(error) => {
            eprintln!("rlhf-trainer: {error}");
            ending::message(Err(error), None, None)
        }
    }
}

/// Writes the pod's last word to its termination file.
fn leave(flag: TerminationFlag, message: TerminationMessage) -> TerminationMessage {
    if let Err(error) = ending::write_termination_file(flag.termination_file.as_deref(), &message) {
        tracing::error!("the termination message is lost: {error}");
    }
    message
}

fn prepare(options: &worker::Options) -> TerminationMessage {
    let mut prepared = None;
    let result = ending::guard(|| {
        let environment = Environment::from_process()?;
        let config = config_file::read::<PrepareConfig>(&options.config)?;
        config.warn_of_unknown();
        let config = config.value;
        let telemetry = Telemetry::new(&config.job, PREPARE, environment.attempt, 0, 1)?;
        worker::serve(options.http_port, 0, &telemetry)?;
        let setting = fetch::Setting {
            volume: environment.volume.clone(),
            secrets: SECRETS_DIR.into(),
            attempt: environment.attempt,
            hub: std::env::var("HF_ENDPOINT").ok().filter(|endpoint| !endpoint.is_empty()),
            patience: fetch::Patience::default(),
        };
        fetch::run(&config, &setting, &telemetry)?;
        let report = prepare::run(&config, &environment.volume, &telemetry)?;
        prepared = Some(Box::new(report.prepared()?));
        Ok(Output { path: job_dir(&config), metrics: report.stages.iter().flat_map(counts).collect() })
    });
    TerminationMessage { prepared, ..ending::message(result, None, None) }
}

/// The job's folder below the volume: a stage's model is two levels below it.
fn job_dir(config: &PrepareConfig) -> String {
    let output = config.stages.first().map(|stage| Path::new(&stage.paths.output));
    output.and_then(|path| path.parent()?.parent()).map(|dir| dir.display().to_string()).unwrap_or_default()
}

/// A stage's dataset in figures, such as `sft.train`.
fn counts(report: &StageReport) -> Vec<(String, f64)> {
    let data = &report.dataset;
    let named = [
        ("records", data.records),
        ("train", data.train),
        ("eval", data.eval),
        ("dropped", data.dropped),
        ("truncated", data.truncated),
        ("tokens", data.tokens),
        ("longestTokens", data.longest_tokens),
        ("sequences", data.sequences),
    ];
    // What there is nothing of is not told: the message has to be short.
    let rare = [("empty", data.empty), ("withoutTarget", data.without_target), ("unusable", data.unusable)];
    let named = named.into_iter().chain(rare.into_iter().filter(|(_, n)| *n > 0));
    named.map(|(name, n)| (format!("{}.{name}", report.stage), n as f64)).collect()
}
