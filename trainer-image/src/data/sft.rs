//! Samples for supervised fine-tuning.

use super::dialogue;
use super::files::{Files, Kept, Outcome};
use super::records::{Record, Wanted};
use super::store::{Plan, Source, Stored, Written};
use super::summary::{About, Dropped};
use crate::error::Result;
use crate::tokenizer::Tokenizer;
use rlhf_api::stage::{Sft, SftFormat};
use std::path::Path;

/// A sequence to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SftSample {
    /// Its ids.
    pub tokens: Vec<i64>,
    /// Which of them are to be predicted from those before them; never the first.
    pub target: Vec<bool>,
}

impl Stored for SftSample {
    fn sequences(&self) -> Vec<&[i64]> {
        vec![&self.tokens]
    }

    fn targets(&self) -> &[bool] {
        &self.target
    }

    fn of(sequences: Vec<Vec<i64>>, target: Vec<bool>, _: &str) -> Self {
        Self { tokens: sequences.concat(), target }
    }
}

/// Reads the records of files. Samples longer than `maxLength` lose their end, but where rows are packed a text is cut into
/// chunks, of which nothing is lost; a sample that has no target left is dropped.
///
/// # Errors
/// Names the file, line and field of a record that cannot be used; or says that none can.
pub(super) fn read(
    files: &Files,
    settings: &Sft,
    tokenizer: &Tokenizer,
    seed: u64,
    to: Option<&Path>,
) -> Result<(Written, Vec<Source>)> {
    let why = format!("no target token is left within maxLength {}; raise maxLength", settings.max_length);
    let packing = settings.row_tokens().map(|tokens| tokens as usize);
    let plan = Plan { seed, eval_fraction: 0.0, why_dropped: &why, packing };
    files.read(&wanted(settings.format), &plan, to, |record| {
        let Encoded { sample: whole, empty, prompt_len } = encode(record, settings, tokenizer)?;
        let prompt = whole.tokens.get(..prompt_len).filter(|prompt| prompt.len() > tokenizer.begin_length());
        let prompt = prompt.unwrap_or(&whole.tokens).iter().flat_map(|id| id.to_le_bytes()).collect();
        let (length, most) = (whole.tokens.len(), settings.max_length as usize);
        let chunked = packing.is_some() && settings.format == SftFormat::Text && length > most;
        let items: Vec<SftSample> = if chunked { chunks(&whole, most) } else { cut(whole, most).into_iter().collect() };
        let truncated = !chunked && items.iter().any(|sample| sample.tokens.len() < length);
        Ok(match items.is_empty() {
            true => Outcome::Dropped(Dropped::WithoutTarget),
            false => {
                let about = About { truncated, empty };
                Outcome::Kept(Kept { items, key: None, prompt: Some(prompt), about })
            }
        })
    })
}

fn wanted(format: SftFormat) -> Wanted {
    let (fields, expected): (&[&str], _) = match format {
        SftFormat::Text => (&["text"], r#"{"text": string} (format text)"#),
        SftFormat::PromptCompletion => (
            &["prompt", "completion", "tools", "chat_template_kwargs"],
            r#"{"prompt": string, "completion": string}, or both as lists of messages (format promptCompletion)"#,
        ),
        SftFormat::Instruction => (
            &["instruction", "input", "output"],
            r#"{"instruction": string, "input": string or left out, "output": string} (format instruction)"#,
        ),
        SftFormat::Chat => (
            &["messages", "tools", "chat_template_kwargs"],
            r#"{"messages": [{"role": string, "content": string}, ...], "tools": list or left out} (format chat)"#,
        ),
    };
    Wanted { fields, expected }
}

/// A record's whole sample, nothing cut, and whether a response in it is empty.
struct Encoded {
    sample: SftSample,
    empty: bool,
    /// Tokens before the first that answers; 0 of a text, which asks nothing.
    prompt_len: usize,
}

fn encode(record: &Record<'_>, settings: &Sft, tokenizer: &Tokenizer) -> Result<Encoded> {
    let mut muted = Vec::new();
    let (mut sample, empty) = match settings.format {
        SftFormat::Text => {
            let text = record.text("text")?;
            let mut tokens = record.located(tokenizer.encode(text))?;
            tokenizer.end(&mut tokens);
            (SftSample { target: vec![true; tokens.len()], tokens }, text.trim().is_empty())
        }
        SftFormat::PromptCompletion if dialogue::is_one(record, "prompt") => {
            let dialogue = dialogue::prompt_and(record, "completion")?;
            let empty = dialogue.empty;
            let chat = record.located(tokenizer.encode_chat(&dialogue.dialogue))?;
            // Answers in the prompt are given, whatever else is learnt.
            (SftSample { tokens: chat.tokens, target: chat.target }, empty)
        }
        SftFormat::PromptCompletion => {
            let (prompt, completion) = (record.text("prompt")?, record.text("completion")?);
            (record.located(pair(prompt, completion, tokenizer))?, completion.trim().is_empty())
        }
        SftFormat::Instruction => {
            let (prompt, output) = (instruction_prompt(record)?, record.text("output")?);
            (record.located(pair(&prompt, output, tokenizer))?, output.trim().is_empty())
        }
        SftFormat::Chat => {
            let dialogue = dialogue::read(record, "messages")?;
            dialogue.needs_answer(record)?;
            let chat = record.located(tokenizer.encode_chat(&dialogue.dialogue))?;
            muted = chat.muted;
            (SftSample { tokens: chat.tokens, target: chat.target }, dialogue.empty)
        }
    };
    let prompt_len = match settings.format {
        SftFormat::Text => 0,
        _ => sample.target.iter().position(|target| *target).unwrap_or_default(),
    };
    if settings.train_on_prompt {
        sample.target.fill(true);
        sample.target.iter_mut().zip(&muted).filter(|(_, muted)| **muted).for_each(|(target, _)| *target = false);
    }
    if let Some(first) = sample.target.first_mut() {
        *first = false;
    }
    Ok(Encoded { sample, empty, prompt_len })
}

/// A prompt, and a completion with its end, which is the target.
fn pair(prompt: &str, completion: &str, tokenizer: &Tokenizer) -> Result<SftSample> {
    let mut pair = tokenizer.encode_pair(prompt, completion)?;
    tokenizer.end(&mut pair.tokens);
    let target = (0..pair.tokens.len()).map(|i| i >= pair.prompt_len).collect();
    Ok(SftSample { tokens: pair.tokens, target })
}

/// The sample within `max_length` tokens, or `None` where no target is left.
fn cut(mut sample: SftSample, max_length: usize) -> Option<SftSample> {
    sample.tokens.truncate(max_length);
    sample.target.truncate(max_length);
    sample.target.contains(&true).then_some(sample)
}

/// A long text as samples of at most `max_length` tokens. Each begins with the last token of the one before, so that every
/// token but the text's first is learnt once.
fn chunks(whole: &SftSample, max_length: usize) -> Vec<SftSample> {
    let step = max_length.saturating_sub(1).max(1);
    let starts = (0..whole.tokens.len().saturating_sub(1)).step_by(step);
    let chunk = |start: usize| {
        let range = start..(start + max_length).min(whole.tokens.len());
        let mut target = whole.target[range.clone()].to_vec();
        target.iter_mut().take(1).for_each(|first| *first = false);
        SftSample { tokens: whole.tokens[range].to_vec(), target }
    };
    starts.map(chunk).collect()
}

/// The prompt of Stanford Alpaca (Taori 2023), in which an empty input has no section.
fn instruction_prompt(record: &Record<'_>) -> Result<String> {
    let instruction = record.text("instruction")?;
    let input = if record.get("input").is_some() { record.text("input")? } else { "" };
    let (context, section) = if input.is_empty() {
        ("", String::new())
    } else {
        (", paired with an input that provides further context", format!("### Input:\n{input}\n\n"))
    };
    Ok(format!(
        "Below is an instruction that describes a task{context}. Write a response that appropriately completes the request.\n\n\
         ### Instruction:\n{instruction}\n\n{section}### Response:"
    ))
}
