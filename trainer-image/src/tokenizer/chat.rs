//! Chat templates: Jinja as `transformers` runs it, and which part of a rendered dialogue the assistant said.
//!
//! Templates that ask for today's date by `strftime_now` get a fixed one, so that a sample is the same on every rank and
//! after every restart. Where a template marks by `{% generation %}` what the assistant says, the marks count; else it is
//! found by comparing renderings.

use super::dialogue::Dialogue;
use super::{json, overlapping};
use crate::error::{Error, Result};
use minijinja::{Environment, ErrorKind, context};
use regex::Regex;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::LazyLock;

const TEMPLATE: &str = "chat_template";
const TEMPLATE_FILE: &str = "chat_template.jinja";
/// The filter that stands for the block `generation`, and what it puts round the block: characters that Unicode keeps for
/// uses inside a program, so that no text has them.
const MARK: &str = "assistant_said";
const MARKS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];
/// The date that Llama 3's template takes where there is no other.
const STAND_IN_DATE: jiff::civil::DateTime = jiff::civil::datetime(2024, 7, 26, 0, 0, 0, 0);

/// A dialogue as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatSample {
    /// The dialogue's ids.
    pub tokens: Vec<i64>,
    /// Which of them the assistant said.
    pub target: Vec<bool>,
    /// Which of them are in no case to be learnt, as a turn's weight of 0 says.
    pub muted: Vec<bool>,
}

/// What the assistant says in one turn: where it stands in the rendered text, and whether it is to be learnt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    pub span: Range<usize>,
    pub learnt: bool,
}

impl ChatSample {
    /// Marks the tokens that hold any of a turn, up to the last of `ends` in it.
    pub(super) fn new(tokens: Vec<i64>, offsets: &[(usize, usize)], turns: &[Turn], ends: &BTreeSet<i64>) -> Self {
        let (mut target, mut muted) = (vec![false; tokens.len()], vec![false; tokens.len()]);
        for turn in turns {
            let Some(held) = overlapping(offsets, &turn.span) else { continue };
            let said = &tokens[held.clone()];
            let length = said.iter().rposition(|t| ends.contains(t)).map_or(said.len(), |last| last + 1);
            if turn.learnt {
                target[held.start..held.start + length].fill(true);
            } else {
                muted[held].fill(true);
            }
        }
        Self { tokens, target, muted }
    }

    /// Appends `eos`, unless the last thing said ends with one of `ends`. It is a target where the last turn is.
    pub(super) fn end_with(&mut self, eos: i64, ends: &BTreeSet<i64>, learnt: bool) {
        let last = (0..self.tokens.len()).rev().find(|&i| self.target[i] || self.muted[i]);
        let ended = last.is_some_and(|i| self.tokens[i..].iter().any(|t| ends.contains(t)));
        if !ended {
            self.tokens.push(eos);
            self.target.push(learnt);
            self.muted.push(!learnt);
        }
    }
}

/// A template that can be run.
#[derive(Debug)]
struct Compiled {
    environment: Environment<'static>,
    /// Whether the template marks what the assistant says.
    marks: bool,
}

/// A model's chat template, or why there is none. Only rendering fails: most stages need no template.
#[derive(Debug)]
pub(super) struct ChatTemplate(std::result::Result<Compiled, String>);

impl ChatTemplate {
    /// Takes `chat_template.jinja`, else the default template of `tokenizer_config.json`.
    pub(super) fn read(dir: &Path, config: &Map<String, Value>) -> Self {
        let file = dir.join(TEMPLATE_FILE);
        let source = match std::fs::read_to_string(&file) {
            Ok(text) => Ok(text),
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(format!("{}: {e}", file.display())),
            Err(_) => config.get(TEMPLATE).and_then(default_template).map(str::to_string).ok_or_else(|| {
                format!("{}: the tokenizer has no chat template; add {TEMPLATE_FILE}, or use another dataset format than chat", dir.display())
            }),
        };
        Self(source.and_then(|text| {
            compile(&text).map_err(|e| format!("{}: the chat template cannot be used: {}", dir.display(), reason(&e)))
        }))
    }

    pub(super) fn is_there(&self) -> bool {
        self.0.is_ok()
    }

    /// Renders the first `count` turns of a dialogue.
    pub(super) fn render(
        &self,
        dialogue: &Dialogue,
        count: usize,
        add_generation_prompt: bool,
        texts: &BTreeMap<String, String>,
    ) -> Result<String> {
        let marked = self.render_marked(dialogue, count, add_generation_prompt, texts)?;
        Ok(marked.replace(MARKS, ""))
    }

    fn render_marked(
        &self,
        dialogue: &Dialogue,
        count: usize,
        add_generation_prompt: bool,
        texts: &BTreeMap<String, String>,
    ) -> Result<String> {
        let Compiled { environment, .. } = self.0.as_ref().map_err(Error::input)?;
        let messages: Vec<_> = dialogue.messages.iter().take(count).map(|m| m.fields().clone()).collect();
        let run = || {
            let tools = &dialogue.tools;
            let given = context! { messages, add_generation_prompt, tools, documents => () };
            let variables = minijinja::Value::from_serialize(&dialogue.variables);
            let texts = minijinja::Value::from_serialize(texts);
            environment.get_template(TEMPLATE)?.render(context! { ..given, ..variables, ..texts })
        };
        run().map_err(|e| Error::input(format!("the chat template refuses this dialogue: {}", reason(&e))))
    }

    /// The rendered dialogue and the assistant's turns in it. `ends` are the texts of tokens that end an answer.
    pub(super) fn turns(
        &self,
        dialogue: &Dialogue,
        texts: &BTreeMap<String, String>,
        ends: &[String],
    ) -> Result<(String, Vec<Turn>)> {
        let whole = self.render_marked(dialogue, dialogue.messages.len(), false, texts)?;
        match &self.0 {
            Ok(Compiled { marks: true, .. }) => marked_turns(dialogue, &whole),
            _ => {
                let turns = self.compared_turns(dialogue, &whole, texts, ends)?;
                Ok((whole, turns))
            }
        }
    }

    /// Turns found by rendering the dialogue up to each, without it and with it.
    fn compared_turns(
        &self,
        dialogue: &Dialogue,
        whole: &str,
        texts: &BTreeMap<String, String>,
        ends: &[String],
    ) -> Result<Vec<Turn>> {
        let mut turns = Vec::new();
        for (i, message) in dialogue.messages.iter().enumerate().filter(|(_, m)| m.is_assistant()) {
            let last = i + 1 == dialogue.messages.len();
            let with = if last { whole.to_string() } else { self.render(dialogue, i + 1, false, texts)? };
            // A dialogue that ends here may close with an end token that one that goes on does not have here.
            let said = if whole.starts_with(&with) { Some(with.as_str()) } else { without_end(&with, whole, ends) };
            let start = self.turn_start(dialogue, i, &with, texts, ends);
            let (Some(said), Some(start)) = (said, start?) else {
                return Err(Error::input(format!(
                    "the chat template does not render the beginning of this dialogue as the beginning of its rendering (at message {}, {}), \
                     so what is to be learnt cannot be told from the prompt; use a template that does, or that marks it by generation tags, or dialogues with one answer",
                    i + 1,
                    message.role
                )));
            };
            turns.push(Turn { span: start..said.len(), learnt: message.learnt });
        }
        Ok(turns)
    }

    /// Where the turn at `index` begins in `with`, the rendering up to and with it: after the generation prompt, as far as
    /// that is rendered again (some templates open a thought in it that an answer without thoughts does not have).
    fn turn_start(
        &self,
        dialogue: &Dialogue,
        index: usize,
        with: &str,
        texts: &BTreeMap<String, String>,
        ends: &[String],
    ) -> Result<Option<usize>> {
        let prompted = self.render(dialogue, index, true, texts)?;
        if with.starts_with(&prompted) {
            return Ok(Some(prompted.len()));
        }
        // With no turn before, some templates have nothing to render, or refuse.
        let before = if index == 0 { String::new() } else { self.render(dialogue, index, false, texts)? };
        let open = if with.starts_with(&before) { Some(before.as_str()) } else { without_end(&before, with, ends) };
        let common = common_prefix(&prompted, with);
        Ok(open.filter(|open| common > open.len()).map(|_| common))
    }
}

/// What a rendering begins with that goes on as `whole` once its closing end token is taken away.
fn without_end<'a>(with: &'a str, whole: &str, ends: &[String]) -> Option<&'a str> {
    let closed = with.trim_end();
    let open = ends.iter().filter_map(|end| closed.strip_suffix(end.as_str()));
    open.filter(|open| whole.starts_with(open)).max_by_key(|open| open.len())
}

fn common_prefix(a: &str, b: &str) -> usize {
    a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y).map_or(a.len().min(b.len()), |((i, _), _)| i)
}

/// The rendered text without marks, and the turns that the marks enclose.
fn marked_turns(dialogue: &Dialogue, marked: &str) -> Result<(String, Vec<Turn>)> {
    let (mut text, mut spans, mut start) = (String::with_capacity(marked.len()), Vec::new(), None);
    for c in marked.chars() {
        match c {
            c if c == MARKS[0] => start = Some(text.len()),
            c if c == MARKS[1] => spans.extend(start.take().map(|start| start..text.len())),
            c => text.push(c),
        }
    }
    let answers: Vec<bool> = dialogue.messages.iter().filter(|m| m.is_assistant()).map(|m| m.learnt).collect();
    let one_each = answers.len() == spans.len();
    if !one_each && answers.contains(&false) {
        return Err(Error::input(format!(
            "a message has the weight 0, but the chat template marks {} parts by generation tags for {} answers, so which to leave out cannot be told",
            spans.len(),
            answers.len()
        )));
    }
    let turns = spans.into_iter().enumerate().map(|(i, span)| Turn { span, learnt: !one_each || answers[i] });
    Ok((text, turns.collect()))
}

/// A template as such, or the one named `default` in a list of named ones.
fn default_template(value: &Value) -> Option<&str> {
    let named =
        |list: &'_ Vec<Value>| list.iter().position(|t| t.get("name").and_then(Value::as_str) == Some("default"));
    match value {
        Value::Array(list) => list.get(named(list)?)?.get("template")?.as_str(),
        other => other.as_str(),
    }
}

/// Jinja with the settings and additions of `apply_chat_template`.
fn compile(template: &str) -> std::result::Result<Compiled, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(json::print);
    environment.add_filter("tojson", json::tojson);
    environment.add_filter("string", |value: minijinja::Value| json::string(&value));
    environment
        .add_filter("trim", |value: minijinja::Value, characters: Option<String>| json::trim(&value, characters));
    environment.add_filter(MARK, |text: String| format!("{}{text}{}", MARKS[0], MARKS[1]));
    // None can be iterated here, but not in Python.
    environment.add_test("iterable", |value: &minijinja::Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_function(
        "raise_exception",
        |message: String| -> std::result::Result<minijinja::Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    environment.add_function("strftime_now", |format: String| {
        let invalid = |e: jiff::Error| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string());
        jiff::fmt::strtime::format(format, STAND_IN_DATE).map_err(invalid)
    });
    let (template, marks) = marking(template);
    environment.add_template_owned(TEMPLATE, template)?;
    Ok(Compiled { environment, marks })
}

/// The template with the block `generation` as one that marks what it encloses, and whether there is one.
fn marking(template: &str) -> (String, bool) {
    #[allow(clippy::unwrap_used)] // a constant
    static TAG: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").unwrap());
    let replaced = TAG.replace_all(template, |tag: &regex::Captures<'_>| {
        let block = if tag.get(2).is_some() { "endfilter".to_string() } else { format!("filter {MARK}") };
        format!("{{%{} {block} {}%}}", &tag[1], &tag[3])
    });
    let marks = matches!(replaced, std::borrow::Cow::Owned(_));
    (replaced.into_owned(), marks)
}

fn reason(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    error.line().map_or(what.clone(), |line| format!("{what} (template line {line})"))
}
