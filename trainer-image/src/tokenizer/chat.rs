//! Chat templates: Jinja as `transformers` runs it, and which part of a rendered dialogue the assistant said.
//!
//! Templates that ask for today's date by `strftime_now` get a fixed one, so that a sample is the same on every rank and
//! after every restart. The tag `{% generation %}`, by which a template may mark what the assistant says, is read as a
//! block without effect: what the assistant says is found by comparing renderings, which works with and without it.

use crate::error::{Error, Result};
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

const TEMPLATE: &str = "chat_template";
const TEMPLATE_FILE: &str = "chat_template.jinja";
const ASSISTANT: &str = "assistant";
/// The date that Llama 3's template takes where there is no other.
const STAND_IN_DATE: jiff::civil::DateTime = jiff::civil::datetime(2024, 7, 26, 0, 0, 0, 0);

/// One turn of a dialogue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// Whether the assistant speaks.
    pub fn is_assistant(&self) -> bool {
        self.role == ASSISTANT
    }
}

/// A dialogue as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatSample {
    /// The dialogue's ids.
    pub tokens: Vec<i64>,
    /// Which of them the assistant said.
    pub target: Vec<bool>,
}

impl ChatSample {
    /// Marks the tokens that begin in a span of the text, up to the last `eos` in it.
    pub(super) fn new(tokens: Vec<i64>, offsets: &[(usize, usize)], spans: &[Range<usize>], eos: i64) -> Self {
        let mut target = vec![false; tokens.len()];
        for span in spans {
            // A trimmed blank before the span has the empty offsets (span.start, span.start).
            let inside = |&(start, end): &(usize, usize)| span.contains(&start) && end > span.start;
            let Some(first) = offsets.iter().position(inside) else { continue };
            let length = offsets[first..].iter().take_while(|o| inside(o)).count();
            let said = &tokens[first..first + length];
            let length = said.iter().rposition(|&t| t == eos).map_or(length, |last| last + 1);
            target[first..first + length].fill(true);
        }
        Self { tokens, target }
    }

    /// Appends `eos` as a target, unless the last thing said is one.
    pub(super) fn end_with(&mut self, eos: i64) {
        let last = self.target.iter().rposition(|&t| t);
        if last.and_then(|i| self.tokens.get(i)) != Some(&eos) {
            self.tokens.push(eos);
            self.target.push(true);
        }
    }
}

/// A model's chat template, or why there is none. Only rendering fails: most stages need no template.
#[derive(Debug)]
pub(super) struct ChatTemplate(std::result::Result<Environment<'static>, String>);

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
            environment(text)
                .map_err(|e| format!("{}: the chat template cannot be used: {}", dir.display(), reason(&e)))
        }))
    }

    /// Renders a dialogue.
    pub(super) fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        texts: &BTreeMap<String, String>,
    ) -> Result<String> {
        let environment = self.0.as_ref().map_err(Error::input)?;
        let run = || {
            let given = context! { messages, add_generation_prompt, tools => (), documents => () };
            environment.get_template(TEMPLATE)?.render(context! { ..given, ..minijinja::Value::from_serialize(texts) })
        };
        run().map_err(|e| Error::input(format!("the chat template refuses this dialogue: {}", reason(&e))))
    }

    /// The rendered dialogue and the bytes in it that are the assistant's turns.
    pub(super) fn assistant_spans(
        &self,
        messages: &[Message],
        texts: &BTreeMap<String, String>,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let whole = self.render(messages, false, texts)?;
        let mut spans = Vec::new();
        for (i, message) in messages.iter().enumerate().filter(|(_, m)| m.is_assistant()) {
            let before = self.render(&messages[..i], true, texts)?;
            let with = self.render(&messages[..=i], false, texts)?;
            if !with.starts_with(&before) || !whole.starts_with(&with) {
                return Err(Error::input(format!(
                    "the chat template does not render the beginning of this dialogue as the beginning of its rendering (at message {}, {}), \
                     so what is to be learnt cannot be told from the prompt; use a template that does, or dialogues with one answer",
                    i + 1,
                    message.role
                )));
            }
            spans.push(before.len()..with.len());
        }
        Ok((whole, spans))
    }
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
fn environment(template: String) -> std::result::Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
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
    environment.add_template_owned(TEMPLATE, without_generation_tags(template))?;
    Ok(environment)
}

/// The template with the tags of `{% generation %}` as those of a block that is always rendered.
fn without_generation_tags(mut template: String) -> String {
    for (open, close) in [("{%", "%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}")] {
        for (tag, instead) in [("generation", "if true"), ("endgeneration", "endif")] {
            template = template.replace(&format!("{open} {tag} {close}"), &format!("{open} {instead} {close}"));
        }
    }
    template
}

fn reason(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    error.line().map_or(what.clone(), |line| format!("{what} (template line {line})"))
}
