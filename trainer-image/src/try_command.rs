//! The commands `generate` and `score`, by which a person tries a checkpoint on one device: what it answers, and what it
//! thinks of given tokens. With `--json` each prints one object a line, else text.

use crate::commands::named;
use crate::data::read_dialogues;
use crate::engine::{Group, HEAD_SLICE_BYTES, Model, Placement, ScalarInit};
use crate::error::{Error, Result};
use crate::model::{Batch, HeadKind, Source};
use crate::rollout::{Decoding, Request, generate as answer};
use crate::stages::math::log_probabilities;
use crate::tokenizer::Tokenizer;
use crate::worker;
use clap::Args;
use rlhf_api::stage::{Precision, Sampling, Strategy};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::rc::Rc;
use tch::{Kind, Tensor};

/// The model and how it runs.
#[derive(Args, Debug)]
struct ModelFlags {
    /// The model's folder.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// fp32, bf16 or fp16.
    #[arg(long, value_parser = named::<Precision>, default_value = "fp32")]
    precision: Precision,
    /// Prints one JSON object a line, and nothing after the last.
    #[arg(long)]
    json: bool,
}

/// The flags of `generate`.
#[derive(Args, Debug)]
pub struct GenerateFlags {
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    prompt: PromptFlags,
    /// Takes the most likely token each time.
    #[arg(long, conflicts_with_all = ["temperature", "top_p", "top_k", "seed"])]
    greedy: bool,
    /// Logits are divided by this.
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Draws from the smallest set of tokens whose probability reaches this.
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Draws from this many most likely tokens; 0: from all.
    #[arg(long, default_value_t = 0)]
    top_k: u32,
    /// Seeds the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// New tokens at most.
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
}

/// What is to be answered.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct PromptFlags {
    /// A text.
    #[arg(long)]
    prompt: Option<String>,
    /// Token ids, such as 1,2,3.
    #[arg(long, value_delimiter = ',', value_name = "IDS")]
    prompt_tokens: Vec<i64>,
    /// A JSON Lines file of dialogues, `{"messages": [...]}`, each of which is answered.
    #[arg(long, value_name = "FILE")]
    chat: Option<PathBuf>,
}

/// The flags of `score`.
#[derive(Args, Debug)]
pub struct ScoreFlags {
    #[command(flatten)]
    model: ModelFlags,
    /// Token ids, such as 1,2,3.
    #[arg(long, value_delimiter = ',', value_name = "IDS", required = true)]
    tokens: Vec<i64>,
}

/// A model in a folder, and its tokenizer where it has one.
struct Loaded {
    source: Source,
    tokenizer: Option<Tokenizer>,
}

impl Loaded {
    fn open(flags: &ModelFlags) -> Result<Self> {
        c10d::init(true);
        let mut source = Source::open(&flags.model)?;
        let tokenizer =
            flags.model.join("tokenizer.json").exists().then(|| Tokenizer::load(&flags.model)).transpose()?;
        source.spec.known_tokens = tokenizer.as_ref().map(|t| t.vocab_size() as i64);
        let said = source.warnings.iter().chain(tokenizer.iter().flat_map(Tokenizer::warnings));
        said.for_each(|warning| tracing::warn!("{}: {warning}", flags.model.display()));
        Ok(Self { source, tokenizer })
    }

    fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Error::input(format!("{}: no tokenizer.json; ask in tokens, by --prompt-tokens", self.source.dir.display()))
        })
    }

    fn load(&self, head: HeadKind, precision: Precision) -> Result<Model> {
        let strategy = Strategy { precision, ..Strategy::default() };
        let device = worker::device(0, 0)?;
        let placement = Placement { device, trainable: false, strategy, head_slice_bytes: HEAD_SLICE_BYTES };
        let init = ScalarInit { seed: 0, fold: None };
        Model::load(&self.source, head, init, placement, &Rc::new(Group::alone()))
    }

    /// Makes sure that the model has an embedding for every token.
    fn check(&self, flag: &str, tokens: &[i64]) -> Result<()> {
        let vocab = self.source.spec.vocab;
        match tokens.iter().find(|id| !(0..vocab).contains(*id)) {
            Some(id) => {
                Err(Error::config(format!("{flag}: {id} is no token of this model, which has 0 to {}", vocab - 1)))
            }
            None if tokens.len() as i64 > self.source.spec.max_positions => {
                let most = self.source.spec.max_positions;
                Err(Error::config(format!("{flag}: {} tokens, but the model knows {most} positions", tokens.len())))
            }
            None => Ok(()),
        }
    }
}

/// Runs `generate`.
///
/// # Errors
/// A flag, the model or a record is wrong, or libtorch fails.
pub fn generate(flags: &GenerateFlags) -> Result<()> {
    if !(flags.temperature > 0.0 && flags.top_p > 0.0 && flags.top_p <= 1.0) {
        return Err(Error::config("--temperature must be above 0, and --top-p above 0 and at most 1"));
    }
    let loaded = Loaded::open(&flags.model)?;
    loaded.source.check_language_head()?;
    let prompts = prompts(&loaded, &flags.prompt)?;
    for prompt in &prompts {
        loaded.check("the prompt", prompt)?;
    }
    let model = loaded.load(HeadKind::Lm, flags.model.precision)?;
    let decoding = if flags.greedy {
        Decoding::Greedy
    } else {
        let sampling = Sampling { temperature: flags.temperature, top_p: flags.top_p, top_k: flags.top_k };
        Decoding::Sample { sampling, stream: [flags.seed, 0] }
    };
    let ends = loaded.tokenizer.as_ref().map(Tokenizer::ends).unwrap_or_default();
    let requests: Vec<Request<'_>> = (0..).zip(&prompts).map(|(id, prompt)| Request { prompt, id }).collect();
    for response in answer(&model, &requests, &decoding, &ends, flags.max_new_tokens, &|| false)? {
        let text = loaded.tokenizer.as_ref().map(|t| t.decode(&response.tokens)).transpose()?;
        if flags.model.json {
            println!("{}", json!({"tokens": response.tokens, "text": text, "ended": response.ended}));
        } else {
            println!("{}", text.unwrap_or_else(|| format!("{:?}", response.tokens)));
        }
    }
    Ok(())
}

fn prompts(loaded: &Loaded, flags: &PromptFlags) -> Result<Vec<Vec<i64>>> {
    let prompts = match flags {
        PromptFlags { prompt: Some(text), .. } => vec![loaded.tokenizer()?.encode_prompt(text)?],
        PromptFlags { chat: Some(file), .. } => read_dialogues(file, loaded.tokenizer()?)?,
        PromptFlags { prompt_tokens, .. } => vec![prompt_tokens.clone()],
    };
    if prompts.iter().any(Vec::is_empty) {
        return Err(Error::config("the prompt has no tokens, and the tokenizer has none that could begin a sequence"));
    }
    Ok(prompts)
}

/// Runs `score`: the log-probability of each token after the first, whose place is null; with a reward model its score at the
/// last token, normalised as in training.
///
/// # Errors
/// A flag or the model is wrong, or libtorch fails.
pub fn score(flags: &ScoreFlags) -> Result<()> {
    let loaded = Loaded::open(&flags.model)?;
    loaded.check("--tokens", &flags.tokens)?;
    let (mut log_probs, mut score) = (Value::Null, Value::Null);
    if loaded.source.has_score_head() {
        let model = loaded.load(HeadKind::Scalar, flags.model.precision)?;
        let batch = Batch::right_padded(&[&flags.tokens], model.device());
        let raw = model.scalars(&batch, &[flags.tokens.len() as i64 - 1])?;
        let normal = |raw: f64| loaded.source.score.map_or(raw, |s| (raw - s.mean) / s.std);
        score = json!(raw.first().copied().map(normal));
    } else {
        loaded.source.check_language_head()?;
        let model = loaded.load(HeadKind::Lm, flags.model.precision)?;
        log_probs = json!(token_log_probs(&model, &flags.tokens)?);
    }
    if flags.model.json {
        println!("{}", json!({"tokens": flags.tokens, "log_probs": log_probs, "score": score}));
    } else {
        println!("{}", if score.is_null() { log_probs } else { score });
    }
    Ok(())
}

/// The log-probability of each token, in fp32; of the first there is none.
fn token_log_probs(model: &Model, tokens: &[i64]) -> Result<Vec<Option<f64>>> {
    let batch = Batch::right_padded(&[tokens], model.device());
    let before: Vec<i64> = (0..tokens.len() as i64 - 1).collect();
    let mut all = vec![None];
    model.visit_head(&model.hidden(&batch)?, &before, |logits, range| {
        let next = &tokens[range.start + 1..range.end + 1];
        // A token that the head does not speak of has no probability.
        let known = logits.size()[1];
        let asked: Vec<i64> = next.iter().map(|&id| id.min(known - 1)).collect();
        let (chosen, _) = log_probabilities(logits, &Tensor::from_slice(&asked).to_device(logits.device()), 1.0)?;
        let chosen = Vec::<f64>::try_from(chosen.f_to_kind(Kind::Double)?)?;
        all.extend(chosen.into_iter().zip(next).map(|(log_p, &id)| (id < known).then_some(log_p)));
        Ok(())
    })?;
    Ok(all)
}
