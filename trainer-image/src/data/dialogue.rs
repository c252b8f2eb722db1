//! Dialogues in records: lists of messages, with the tools and template variables beside them.
//!
//! Whatever a message says is handed to the template, as `transformers` does; a key that neither templates nor the trainer
//! know is an error, since what it says would be lost without a word.

use super::records::{Record, kind};
use crate::error::{Error, Result};
use crate::tokenizer::{Dialogue, Message};
use serde_json::{Map, Value};

/// The keys of a message that templates know.
const TO_TEMPLATE: [&str; 8] =
    ["role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking"];
/// Whether the turn is learnt: 0 or 1.
const WEIGHT: &str = "weight";
/// Those of a record beside the messages.
const TOOLS: &str = "tools";
const VARIABLES: &str = "chat_template_kwargs";

/// A record's dialogue.
pub(super) struct Found {
    pub dialogue: Dialogue,
    /// How many of its messages the record gives as the prompt.
    pub given: usize,
    /// Whether an answer in it says nothing at all.
    pub empty: bool,
}

impl Found {
    /// Makes sure that there is something to learn from.
    pub fn needs_answer(&self, record: &Record<'_>) -> Result<()> {
        if self.dialogue.messages.iter().any(Message::is_assistant) {
            return Ok(());
        }
        let roles: Vec<&str> = self.dialogue.messages.iter().map(|m| m.role.as_str()).collect();
        Err(record.error(format!(
            "no message has the role 'assistant', so there is nothing to learn; the roles are [{}]",
            roles.join(", ")
        )))
    }

    /// Makes sure that the assistant has the last word.
    pub fn needs_last_word(&self, record: &Record<'_>, field: &str) -> Result<()> {
        match self.dialogue.messages.last() {
            Some(last) if last.is_assistant() => Ok(()),
            last => Err(record.error(format!(
                "field '{field}' ends with a message of the role '{}', but what is compared are the assistant's answers",
                last.map_or("none", |m| &m.role)
            ))),
        }
    }
}

/// Whether a field holds messages rather than a text.
pub(super) fn is_one(record: &Record<'_>, field: &str) -> bool {
    record.get(field).is_some_and(Value::is_array)
}

/// The dialogue in one field.
pub(super) fn read(record: &Record<'_>, field: &str) -> Result<Found> {
    with(record, messages(record, field)?, 0)
}

/// The dialogue of the messages in `prompt`, whose answers are given, and of those in another field.
pub(super) fn prompt_and(record: &Record<'_>, field: &str) -> Result<Found> {
    let (mut all, empty) = match record.get("prompt") {
        Some(_) => (messages(record, "prompt")?.0, false),
        None => (vec![], false),
    };
    all.iter_mut().for_each(|message| message.learnt = false);
    let given = all.len();
    let (answers, no_answer) = messages(record, field)?;
    all.extend(answers);
    with(record, (all, empty || no_answer), given)
}

fn with(record: &Record<'_>, (messages, empty): (Vec<Message>, bool), given: usize) -> Result<Found> {
    let mut dialogue = Dialogue { messages, ..Dialogue::default() };
    if let Some(tools) = record.get(TOOLS) {
        if !tools.is_array() {
            return Err(record.mistyped(TOOLS, tools, "an array"));
        }
        dialogue.tools = record.ordered(TOOLS)?;
    }
    if let Some(variables) = record.get(VARIABLES) {
        let names = variables.as_object().ok_or_else(|| record.mistyped(VARIABLES, variables, "an object"))?;
        let values = record.ordered(VARIABLES)?.unwrap_or_default();
        for name in names.keys() {
            let value = values.get_attr(name).map_err(|e| record.error(e))?;
            dialogue.variables.insert(name.clone(), value);
        }
    }
    Ok(Found { dialogue, given, empty })
}

/// The messages in a field, and whether an answer among them is empty.
fn messages(record: &Record<'_>, field: &str) -> Result<(Vec<Message>, bool)> {
    let list = record.list(field)?;
    let ordered = record.ordered(field)?.unwrap_or_default();
    let mut empty = false;
    let read = |(i, message): (usize, &Value)| {
        let at = Place { record, name: format!("{field}[{i}]") };
        let fields = message.as_object().ok_or_else(|| record.mistyped(&at.name, message, "an object"))?;
        let role = at.check(fields)?;
        let value = ordered.get_item_by_index(i).map_err(|e| record.error(e))?;
        let mut values = Vec::new();
        for key in value.try_iter().map_err(|e| record.error(e))? {
            let (name, value) = (key.to_string(), value.get_item(&key).map_err(|e| record.error(e))?);
            if name != WEIGHT {
                values.push((name, value));
            }
        }
        let message = Message::new(role, values, at.learnt(fields)?);
        empty |= message.is_assistant() && says_nothing(fields);
        Ok(message)
    };
    let messages = list.iter().enumerate().map(read).collect::<Result<Vec<_>>>()?;
    Ok((messages, empty))
}

/// Whether a message has neither a text nor thoughts nor calls.
fn says_nothing(fields: &Map<String, Value>) -> bool {
    let blank = |value: &Value| match value {
        Value::Null => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    fields.iter().filter(|(name, _)| !["role", "name", WEIGHT].contains(&name.as_str())).all(|(_, value)| blank(value))
}

/// A message of a record, for what is wrong with it.
struct Place<'r, 'f> {
    record: &'r Record<'f>,
    name: String,
}

impl Place<'_, '_> {
    /// Checks a message's keys and their types, and returns its role.
    fn check<'m>(&self, fields: &'m Map<String, Value>) -> Result<&'m str> {
        if let Some(key) = fields.keys().find(|key| !TO_TEMPLATE.contains(&key.as_str()) && *key != WEIGHT) {
            return Err(self.record.error(format!(
                "field '{}.{key}' is a key that nothing understands; a message may have {}, {WEIGHT}",
                self.name,
                TO_TEMPLATE.join(", ")
            )));
        }
        let role = fields.get("role").ok_or_else(|| self.missing("role"))?;
        let role = role.as_str().ok_or_else(|| self.mistyped("role", role, "a string"))?;
        for key in ["name", "tool_call_id", "reasoning_content", "reasoning", "thinking"] {
            if let Some(value) = fields.get(key).filter(|v| !v.is_string() && !v.is_null()) {
                return Err(self.mistyped(key, value, "a string"));
            }
        }
        let calls = fields.get("tool_calls").filter(|v| !v.is_null());
        if let Some(calls) = calls.filter(|v| !v.is_array()) {
            return Err(self.mistyped("tool_calls", calls, "an array"));
        }
        self.check_content(fields.get("content"), calls.is_some())?;
        Ok(role)
    }

    /// A message's content is a text, or a list of parts that are texts. A message that calls tools may have none.
    fn check_content(&self, content: Option<&Value>, calls: bool) -> Result<()> {
        match content {
            Some(Value::String(_)) => Ok(()),
            None | Some(Value::Null) if calls => Ok(()),
            None => Err(self.missing("content")),
            Some(Value::Array(parts)) => parts.iter().enumerate().try_for_each(|(i, part)| {
                let name = format!("content[{i}]");
                match part.get("type").and_then(Value::as_str) {
                    Some("text") if part.get("text").is_some_and(Value::is_string) => Ok(()),
                    Some(other) if other != "text" => Err(self.record.error(format!(
                        "field '{}.{name}' is of the type '{other}'; a part of a message can be a text, as {{\"type\": \"text\", \"text\": string}}",
                        self.name
                    ))),
                    _ => Err(self.mistyped(&name, part, "{\"type\": \"text\", \"text\": string}")),
                }
            }),
            Some(other) => Err(self.mistyped("content", other, "a string")),
        }
    }

    fn learnt(&self, fields: &Map<String, Value>) -> Result<bool> {
        match fields.get(WEIGHT).filter(|v| !v.is_null()) {
            None => Ok(true),
            Some(weight) => match weight.as_f64() {
                Some(0.0) => Ok(false),
                Some(1.0) => Ok(true),
                _ => Err(self.record.error(format!(
                    "field '{}.{WEIGHT}' is {}, but a turn is learnt (1) or not (0)",
                    self.name,
                    if weight.is_number() { weight.to_string() } else { kind(weight).into() }
                ))),
            },
        }
    }

    fn missing(&self, key: &str) -> Error {
        self.record.missing(&format!("{}.{key}", self.name))
    }

    fn mistyped(&self, key: &str, value: &Value, wanted: &str) -> Error {
        self.record.mistyped(&format!("{}.{key}", self.name), value, wanted)
    }
}
