//! Prompts for PPO.

use super::jsonl;
use super::split::{Collector, Split};
use crate::error::Result;
use crate::tokenizer::Tokenizer;
use rlhf_api::stage::Ppo;
use std::path::Path;

const EXPECTED: &str = r#"{"prompt": string}"#;

/// A prompt to be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Its ids, at least one.
    pub tokens: Vec<i64>,
    /// Its text as the record has it, nothing cut.
    pub text: String,
}

/// Reads the records at `path`. Prompts longer than `maxPromptLength` lose their beginning, but not their BOS; an empty
/// prompt is BOS alone.
///
/// # Errors
/// Names the file, line and field of a record that cannot be used; or says that there is none.
pub fn load_prompts(path: &Path, settings: &Ppo, tokenizer: &Tokenizer, seed: u64) -> Result<Split<Prompt>> {
    let mut prompts = Collector::new(seed);
    jsonl::read(path, EXPECTED, |record| {
        let text = record.text("prompt")?;
        let tokens = record.located(tokenizer.encode_prompt(text))?;
        if tokens.is_empty() {
            return Err(record.error("the prompt is empty, and the tokenizer has no beginning-of-sequence token that could stand for it; write a prompt"));
        }
        let length = tokens.len();
        let tokens = keep_end(tokens, settings.max_prompt_length as usize, tokenizer.begin_length());
        let kept = tokens.len();
        prompts.keep(text.as_bytes(), Prompt { tokens, text: text.to_string() }, [kept], kept < length);
        Ok(())
    })?;
    prompts.split(path, settings.prompts.eval_fraction, "")
}

/// The last tokens of a prompt, `max_length` in all with the `begin` ids that begin every sequence, where there is room for both.
fn keep_end(mut tokens: Vec<i64>, max_length: usize, begin: usize) -> Vec<i64> {
    let begin = if begin < max_length { begin } else { 0 };
    let excess = tokens.len().saturating_sub(max_length);
    tokens.drain(begin..begin + excess);
    tokens
}
