//! Prompts for PPO.

use super::dialogue;
use super::files::{DataFile, Files, Kept, Outcome};
use super::records::{self, Record, Wanted};
use super::store::{Plan, Source, Stored, Written};
use super::summary::About;
use crate::error::Result;
use crate::tokenizer::Tokenizer;
use rlhf_api::stage::Ppo;
use std::path::Path;

const WANTED: Wanted = Wanted {
    fields: &["prompt", "messages", "tools", "chat_template_kwargs"],
    expected: r#"{"prompt": string}, or {"prompt": [message, ...]} or {"messages": [message, ...]}"#,
};

/// A prompt to be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Its ids, at least one.
    pub tokens: Vec<i64>,
    /// Its text as the record has it, or as the chat template renders it, nothing cut.
    pub text: String,
}

impl Stored for Prompt {
    fn sequences(&self) -> Vec<&[i64]> {
        vec![&self.tokens]
    }

    fn text(&self) -> Option<&str> {
        Some(&self.text)
    }

    fn of(sequences: Vec<Vec<i64>>, _: Vec<bool>, text: &str) -> Self {
        Self { tokens: sequences.concat(), text: text.into() }
    }
}

/// Reads the records of files. Prompts longer than `maxPromptLength` lose their beginning, but not their BOS; an empty
/// prompt is BOS alone.
///
/// # Errors
/// Names the file, line and field of a record that cannot be used; or says that there is none.
pub(super) fn read(
    files: &Files,
    settings: &Ppo,
    tokenizer: &Tokenizer,
    seed: u64,
    to: Option<&Path>,
) -> Result<(Written, Vec<Source>)> {
    let plan = Plan { seed, eval_fraction: 0.0, why_dropped: "", packing: None };
    files.read(&WANTED, &plan, to, |record| {
        let (text, tokens) = encode(record, tokenizer)?;
        if tokens.is_empty() {
            return Err(record.error("the prompt is empty, and the tokenizer has no beginning-of-sequence token that could stand for it; write a prompt"));
        }
        let length = tokens.len();
        let tokens = keep_end(tokens, settings.max_prompt_length as usize, tokenizer.begin_length());
        let about = About { truncated: tokens.len() < length, empty: false };
        let key = Some(text.clone().into_bytes());
        Ok(Outcome::Kept(Kept { items: vec![Prompt { tokens, text }], key, prompt: None, about }))
    })
}

/// The prompts of a file, whole, each with at least one token or as the tokenizer leaves it.
///
/// # Errors
/// Names the line and field of a record that cannot be used.
pub fn read_dialogues(path: &Path, tokenizer: &Tokenizer) -> Result<Vec<Vec<i64>>> {
    let mut all = Vec::new();
    records::each(&DataFile::alone(path), &WANTED, |record| {
        all.push(encode(&record, tokenizer)?.1);
        Ok(())
    })?;
    Ok(all)
}

/// A record's prompt as text and as tokens. A dialogue is rendered with the prompt for an answer.
fn encode(record: &Record<'_>, tokenizer: &Tokenizer) -> Result<(String, Vec<i64>)> {
    let field = if record.get("prompt").is_none() && record.get("messages").is_some() { "messages" } else { "prompt" };
    if !dialogue::is_one(record, field) {
        let text = record.text("prompt")?;
        return Ok((text.to_string(), record.located(tokenizer.encode_prompt(text))?));
    }
    let dialogue = dialogue::read(record, field)?.dialogue;
    if dialogue.messages.last().is_none_or(|last| last.is_assistant()) {
        return Err(record.error(format!(
            "field '{field}' ends with an answer, or has no message at all; a prompt ends with what is to be answered"
        )));
    }
    record.located(tokenizer.encode_chat_prompt(&dialogue))
}

/// The last tokens of a prompt, `max_length` in all with the `begin` ids that begin every sequence, where there is room for both.
fn keep_end(mut tokens: Vec<i64>, max_length: usize, begin: usize) -> Vec<i64> {
    let begin = if begin < max_length { begin } else { 0 };
    let excess = tokens.len().saturating_sub(max_length);
    tokens.drain(begin..begin + excess);
    tokens
}
