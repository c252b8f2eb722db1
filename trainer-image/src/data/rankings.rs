//! Preferences and rankings for reward models.

use super::jsonl::{self, Record};
use super::split::{Collector, Split};
use crate::error::Result;
use crate::tokenizer::{Begin, Tokenizer};
use rlhf_api::stage::RewardModel;
use std::collections::HashSet;
use std::path::Path;

const EXPECTED: &str = r#"{"prompt": string, "chosen": string, "rejected": string}, or whole dialogues {"chosen": string, "rejected": string}, or {"prompt": string, "ranked": [best, ..., worst]}"#;

/// Two or more responses to one prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranking {
    /// Whole sequences (prompt, response and, unless cut, EOS), the best first.
    pub responses: Vec<Vec<i64>>,
}

/// Reads the records at `path`. Sequences longer than `maxLength` lose their end; a record of whose responses two are
/// then the same is dropped.
///
/// A whole dialogue is encoded as one text. Its prompt decides only the split: it is what the two dialogues begin with
/// in common, up to the last line break in it, so that responses that open alike do not hide that the prompt is the same.
///
/// # Errors
/// Names the file, line and field of a record that cannot be used; or says that none can.
pub fn load_rankings(path: &Path, settings: &RewardModel, tokenizer: &Tokenizer, seed: u64) -> Result<Split<Ranking>> {
    let mut rankings = Collector::new(seed);
    let max_length = settings.max_length as usize;
    jsonl::read(path, EXPECTED, |record| {
        let (prompt, mut responses) = encode(record, tokenizer)?;
        let truncated = responses.iter().any(|r| r.len() > max_length);
        responses.iter_mut().for_each(|r| r.truncate(max_length));
        if responses.iter().collect::<HashSet<_>>().len() < responses.len() {
            rankings.drop_record();
        } else {
            let lengths: Vec<usize> = responses.iter().map(Vec::len).collect();
            rankings.keep(prompt.as_bytes(), Ranking { responses }, lengths, truncated);
        }
        Ok(())
    })?;
    let why = format!(
        "within maxLength {max_length} their responses are the same; raise maxLength, or check that the responses differ"
    );
    rankings.split(path, settings.dataset.eval_fraction, &why)
}

/// A record's prompt and its whole sequences, nothing cut.
fn encode<'a>(record: &'a Record<'_>, tokenizer: &Tokenizer) -> Result<(&'a str, Vec<Vec<i64>>)> {
    if record.get("ranked").is_none() && record.get("prompt").is_none() {
        let dialogues = [record.text("chosen")?, record.text("rejected")?];
        let sequences = dialogues.iter().map(|text| with_eos(tokenizer.encode_prompt(text)?, tokenizer)).collect();
        return Ok((common_prompt(dialogues), record.located(sequences)?));
    }
    let (text, responses) = (record.text("prompt")?, responses(record)?);
    let prompt = record.located(tokenizer.encode_prompt(text))?;
    let join =
        |response: &&str| with_eos([prompt.as_slice(), &tokenizer.encode(response, Begin::No)?].concat(), tokenizer);
    Ok((text, record.located(responses.iter().map(join).collect())?))
}

fn with_eos(mut tokens: Vec<i64>, tokenizer: &Tokenizer) -> Result<Vec<i64>> {
    tokens.push(tokenizer.eos());
    Ok(tokens)
}

/// The responses' texts, the best first.
fn responses<'a>(record: &'a Record<'_>) -> Result<Vec<&'a str>> {
    if record.get("ranked").is_none() {
        return Ok(vec![record.text("chosen")?, record.text("rejected")?]);
    }
    let list = record.list("ranked")?;
    if list.len() < 2 {
        return Err(record.error(format!(
            "field 'ranked' has {} responses; a ranking needs two or more, the best first",
            list.len()
        )));
    }
    let text = |(i, value): (usize, &'a serde_json::Value)| {
        value.as_str().ok_or_else(|| record.mistyped(&format!("ranked[{i}]"), value, "a string"))
    };
    list.iter().enumerate().map(text).collect()
}

/// What two dialogues begin with in common, up to and with the last line break in it if there is one.
fn common_prompt([a, b]: [&str; 2]) -> &str {
    let common =
        a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y).map_or(a.len().min(b.len()), |((i, _), _)| i);
    let common = &a[..common];
    common.rfind('\n').map_or(common, |at| &common[..=at])
}
