//! Preferences and rankings for reward models.

use super::dialogue::{self, Found};
use super::files::{Files, Kept, Outcome};
use super::records::{Record, Wanted};
use super::store::{Plan, Source, Stored, Written};
use super::summary::{About, Dropped};
use crate::error::Result;
use crate::tokenizer::Tokenizer;
use rlhf_api::stage::RewardModel;
use std::collections::HashSet;
use std::path::Path;

const WANTED: Wanted = Wanted {
    fields: &["prompt", "chosen", "rejected", "ranked", "tools", "chat_template_kwargs"],
    expected: r#"{"prompt": string, "chosen": string, "rejected": string}, or whole dialogues {"chosen": string, "rejected": string}, each of these also as a list of messages, or {"prompt": string, "ranked": [best, ..., worst]}"#,
};

/// Two or more responses to one prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranking {
    /// Whole sequences (prompt, response and its end), the best first.
    pub responses: Vec<Vec<i64>>,
}

impl Stored for Ranking {
    fn sequences(&self) -> Vec<&[i64]> {
        self.responses.iter().map(Vec::as_slice).collect()
    }

    fn of(responses: Vec<Vec<i64>>, _: Vec<bool>, _: &str) -> Self {
        Self { responses }
    }
}

/// Reads the records of files. Of sequences longer than `maxLength` the prompt loses its beginning (but not its BOS), in all
/// of a record's sequences alike, so that each response is scored whole and at its end. Where a response has no room even so,
/// the prompt stays, and the sequences lose their ends; a record of whose responses two are then the same is dropped.
///
/// A whole dialogue is encoded as one text. Its prompt is what the dialogues begin with in common: of a text up to the last
/// line break in it, so that responses that open alike do not hide that the prompt is the same, and of messages those that are
/// the same, but no answer that ends a dialogue; where they have nothing in common, each record is split by itself.
///
/// # Errors
/// Names the file, line and field of a record that cannot be used; or says that none can.
pub(super) fn read(
    files: &Files,
    settings: &RewardModel,
    tokenizer: &Tokenizer,
    seed: u64,
    to: Option<&Path>,
) -> Result<(Written, Vec<Source>)> {
    let max_length = settings.max_length as usize;
    let why = format!(
        "within maxLength {max_length} their responses are the same; raise maxLength, or check that the responses differ"
    );
    let plan = Plan { seed, eval_fraction: 0.0, why_dropped: &why, packing: None };
    files.read(&WANTED, &plan, to, |record| {
        let Encoded { prompt, prompt_len, mut responses, empty } = encode(record, tokenizer)?;
        let excess = responses.iter().map(Vec::len).max().unwrap_or_default().saturating_sub(max_length);
        let begin = tokenizer.begin_length().min(prompt_len);
        // Of a prompt that is cut, its last token at least is left.
        if begin + excess < prompt_len {
            responses.iter_mut().for_each(|r| drop(r.drain(begin..begin + excess)));
        } else {
            responses.iter_mut().for_each(|r| r.truncate(max_length));
        }
        if responses.iter().collect::<HashSet<_>>().len() < responses.len() {
            return Ok(Outcome::Dropped(Dropped::Unusable));
        }
        let key = Some(prompt.into_bytes()).filter(|prompt| !prompt.is_empty());
        let about = About { truncated: excess > 0, empty };
        Ok(Outcome::Kept(Kept { items: vec![Ranking { responses }], key, prompt: None, about }))
    })
}

/// A record's whole sequences, nothing cut.
struct Encoded {
    /// The text that all begin with.
    prompt: String,
    /// The tokens of it, the same in all.
    prompt_len: usize,
    responses: Vec<Vec<i64>>,
    /// Whether a response says nothing.
    empty: bool,
}

impl Encoded {
    fn new(prompt: &str, most: usize, responses: Vec<Vec<i64>>, empty: bool) -> Self {
        let prompt_len = common_tokens(&responses).min(most);
        Self { prompt: prompt.into(), prompt_len, responses, empty }
    }
}

fn encode(record: &Record<'_>, tokenizer: &Tokenizer) -> Result<Encoded> {
    if dialogue::is_one(record, "chosen") {
        return dialogues(record, tokenizer);
    }
    if record.get("ranked").is_none() && record.get("prompt").is_none() {
        let dialogues = [record.text("chosen")?, record.text("rejected")?];
        let prompt = common_prompt(dialogues);
        let pair = |text: &&str| tokenizer.encode_pair(prompt, &text[prompt.len()..]);
        let pairs: Vec<_> = record.located(dialogues.iter().map(pair).collect())?;
        let empty = dialogues.iter().any(|text| text[prompt.len()..].trim().is_empty());
        return Ok(joined(prompt, pairs, tokenizer, empty));
    }
    let (prompt, responses) = (record.text("prompt")?, responses(record)?);
    let pairs = responses.iter().map(|response| tokenizer.encode_pair(prompt, response));
    let pairs: Vec<_> = record.located(pairs.collect())?;
    Ok(joined(prompt, pairs, tokenizer, responses.iter().any(|response| response.trim().is_empty())))
}

/// Pairs of one prompt and a response each, with their ends.
fn joined(prompt: &str, pairs: Vec<crate::tokenizer::Pair>, tokenizer: &Tokenizer, empty: bool) -> Encoded {
    let most = pairs.iter().map(|pair| pair.prompt_len).min().unwrap_or_default();
    let ended = |mut pair: crate::tokenizer::Pair| {
        tokenizer.end(&mut pair.tokens);
        pair.tokens
    };
    Encoded::new(prompt, most, pairs.into_iter().map(ended).collect(), empty)
}

/// Responses as messages, after a prompt of messages or as whole dialogues, whose prompt is the messages that they have in
/// common: answers may begin alike.
fn dialogues(record: &Record<'_>, tokenizer: &Tokenizer) -> Result<Encoded> {
    let read = |field: &str| -> Result<Found> {
        let found = dialogue::prompt_and(record, field)?;
        found.needs_last_word(record, field)?;
        Ok(found)
    };
    let all = [read("chosen")?, read("rejected")?];
    let given = if record.get("prompt").is_some() { all[0].given } else { common_messages(&all) };
    let encode = |found: &Found| record.located(tokenizer.encode_answered(&found.dialogue, given));
    let [chosen, rejected] = [encode(&all[0])?, encode(&all[1])?];
    let prompt = match [chosen.prompt.as_str(), rejected.prompt.as_str()] {
        [a, b] if a == b => a,
        prompts => common_prompt(prompts),
    };
    let most = chosen.pair.prompt_len.min(rejected.pair.prompt_len);
    let empty = all.iter().any(|found| found.empty);
    Ok(Encoded::new(prompt, most, vec![chosen.pair.tokens, rejected.pair.tokens], empty))
}

/// How many messages two dialogues begin with in common, without the last answer of either.
fn common_messages([a, b]: &[Found; 2]) -> usize {
    let (a, b) = (&a.dialogue.messages, &b.dialogue.messages);
    let most = a.len().min(b.len()).saturating_sub(1);
    a.iter().zip(b).take(most).take_while(|(x, y)| x.says_what(y)).count()
}

/// How many tokens all sequences begin with in common.
fn common_tokens(sequences: &[Vec<i64>]) -> usize {
    let Some((first, rest)) = sequences.split_first() else { return 0 };
    let common = |other: &Vec<i64>| first.iter().zip(other).take_while(|(a, b)| a == b).count();
    rest.iter().map(common).min().unwrap_or(first.len())
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
