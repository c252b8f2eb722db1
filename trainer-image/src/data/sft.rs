//! Samples for supervised fine-tuning.

use super::dialogue;
use super::files::Files;
use super::records::{Record, Wanted};
use super::split::{About, Dropped, Split};
use crate::error::Result;
use crate::tokenizer::Tokenizer;
use rlhf_api::stage::{Sft, SftFormat};

/// A sequence to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SftSample {
    /// Its ids.
    pub tokens: Vec<i64>,
    /// Which of them are to be predicted from those before them; never the first.
    pub target: Vec<bool>,
}

/// Reads the records of files. Samples longer than `maxLength` lose their end; one that has no target left is dropped.
///
/// # Errors
/// Names the file, line and field of a record that cannot be used; or says that none can.
pub fn load_sft(files: &Files, settings: &Sft, tokenizer: &Tokenizer, seed: u64) -> Result<Split<SftSample>> {
    let why = format!("no target token is left within maxLength {}; raise maxLength", settings.max_length);
    files.read(&wanted(settings.format), seed, &why, |record, samples| {
        let Encoded { sample: whole, empty } = encode(record, settings, tokenizer)?;
        let length = whole.tokens.len();
        match cut(whole, settings.max_length as usize) {
            Some(sample) => {
                let (tokens, truncated) = (sample.tokens.clone(), sample.tokens.len() < length);
                samples.keep(&record.key(), sample, [&tokens[..]], About { truncated, empty });
            }
            None => samples.drop_record(Dropped::WithoutTarget),
        }
        Ok(())
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
    if settings.train_on_prompt {
        sample.target.fill(true);
        sample.target.iter_mut().zip(&muted).filter(|(_, muted)| **muted).for_each(|(target, _)| *target = false);
    }
    if let Some(first) = sample.target.first_mut() {
        *first = false;
    }
    Ok(Encoded { sample, empty })
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
