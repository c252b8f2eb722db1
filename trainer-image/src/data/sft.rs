//! Samples for supervised fine-tuning.

use super::jsonl::{self, Record};
use super::split::{Collector, Split};
use crate::error::Result;
use crate::tokenizer::{Begin, Message, Tokenizer};
use rlhf_api::stage::{Sft, SftFormat};
use serde_json::Value;
use std::path::Path;

/// A sequence to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SftSample {
    /// Its ids.
    pub tokens: Vec<i64>,
    /// Which of them are to be predicted from those before them; never the first.
    pub target: Vec<bool>,
}

/// Reads the records at `path`. Samples longer than `maxLength` lose their end; one that has no target left is dropped.
///
/// # Errors
/// Names the file, line and field of a record that cannot be used; or says that none can.
pub fn load_sft(path: &Path, settings: &Sft, tokenizer: &Tokenizer, seed: u64) -> Result<Split<SftSample>> {
    let mut samples = Collector::new(seed);
    jsonl::read(path, expected(settings.format), |record| {
        let whole = encode(record, settings, tokenizer)?;
        let length = whole.tokens.len();
        match cut(whole, settings.max_length as usize) {
            Some(sample) => {
                let kept = sample.tokens.len();
                samples.keep(&record.line.to_le_bytes(), sample, [kept], kept < length);
            }
            None => samples.drop_record(),
        }
        Ok(())
    })?;
    let why = format!("no target token is left within maxLength {}; raise maxLength", settings.max_length);
    samples.split(path, settings.dataset.eval_fraction, &why)
}

fn expected(format: SftFormat) -> &'static str {
    match format {
        SftFormat::Text => r#"{"text": string} (format text)"#,
        SftFormat::PromptCompletion => r#"{"prompt": string, "completion": string} (format promptCompletion)"#,
        SftFormat::Instruction => {
            r#"{"instruction": string, "input": string or left out, "output": string} (format instruction)"#
        }
        SftFormat::Chat => r#"{"messages": [{"role": string, "content": string}, ...]} (format chat)"#,
    }
}

/// The whole sample, nothing cut.
fn encode(record: &Record<'_>, settings: &Sft, tokenizer: &Tokenizer) -> Result<SftSample> {
    let mut sample = match settings.format {
        SftFormat::Text => {
            let text = record.text("text")?;
            let tokens = record.located(tokenizer.encode(text, Begin::Yes))?;
            join(Vec::new(), tokens, tokenizer.eos())
        }
        SftFormat::PromptCompletion => {
            let (prompt, completion) = (record.text("prompt")?, record.text("completion")?);
            record.located(encode_pair(prompt, completion, tokenizer))?
        }
        SftFormat::Instruction => {
            let (prompt, output) = (instruction_prompt(record)?, record.text("output")?);
            record.located(encode_pair(&prompt, output, tokenizer))?
        }
        SftFormat::Chat => {
            let chat = record.located(tokenizer.encode_chat(&messages(record)?))?;
            SftSample { tokens: chat.tokens, target: chat.target }
        }
    };
    if settings.train_on_prompt {
        sample.target.fill(true);
    }
    if let Some(first) = sample.target.first_mut() {
        *first = false;
    }
    Ok(sample)
}

fn encode_pair(prompt: &str, completion: &str, tokenizer: &Tokenizer) -> Result<SftSample> {
    Ok(join(tokenizer.encode_prompt(prompt)?, tokenizer.encode(completion, Begin::No)?, tokenizer.eos()))
}

/// A prompt's ids, then a completion's and EOS, which are the targets.
fn join(mut tokens: Vec<i64>, completion: Vec<i64>, eos: i64) -> SftSample {
    let mut target = vec![false; tokens.len()];
    tokens.extend(completion);
    tokens.push(eos);
    target.resize(tokens.len(), true);
    SftSample { tokens, target }
}

/// The sample within `max_length` tokens, or `None` where no target is left.
fn cut(mut sample: SftSample, max_length: usize) -> Option<SftSample> {
    sample.tokens.truncate(max_length);
    sample.target.truncate(max_length);
    sample.target.contains(&true).then_some(sample)
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

/// The dialogue of a record, in which the assistant speaks at least once.
fn messages(record: &Record<'_>) -> Result<Vec<Message>> {
    let list = record.list("messages")?;
    let part = |i: usize, message: &Value, field: &str| {
        let name = format!("messages[{i}].{field}");
        let value = message.get(field).ok_or_else(|| record.missing(&name))?;
        value.as_str().map(str::to_string).ok_or_else(|| record.mistyped(&name, value, "a string"))
    };
    let messages = list
        .iter()
        .enumerate()
        .map(|(i, m)| Ok(Message { role: part(i, m, "role")?, content: part(i, m, "content")? }));
    let messages = messages.collect::<Result<Vec<_>>>()?;
    if messages.iter().any(Message::is_assistant) {
        return Ok(messages);
    }
    let roles: Vec<&str> = messages.iter().map(|m| m.role.as_str()).collect();
    Err(record.error(format!(
        "no message has the role 'assistant', so there is nothing to learn; the roles are [{}]",
        roles.join(", ")
    )))
}
