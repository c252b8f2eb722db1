//! Dialogues as chat templates get them.

use minijinja::Value;
use std::collections::BTreeMap;

const ASSISTANT: &str = "assistant";
/// Where the thoughts before an answer may stand, the name that templates know first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// One turn of a dialogue.
#[derive(Clone, Debug)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Whether the turn is to be learnt, where the assistant speaks.
    pub learnt: bool,
    /// All its fields, in their order.
    fields: Value,
}

impl Message {
    /// A turn with these fields, of which `role` is one. As in `transformers`, fields that are null count as absent, and
    /// thoughts are there under the names that templates look for.
    pub fn new(role: &str, fields: Vec<(String, Value)>, learnt: bool) -> Self {
        let mut fields: Vec<_> = fields.into_iter().filter(|(_, value)| !value.is_none()).collect();
        let find = |name: &str| fields.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone());
        if let Some(thoughts) = REASONING.iter().find_map(|name| find(name)) {
            if find(REASONING[1]).is_none() {
                fields.insert(0, (REASONING[1].into(), thoughts.clone()));
            }
            match fields.iter_mut().find(|(n, _)| n == REASONING[0]) {
                Some((_, value)) => *value = thoughts,
                None => fields.push((REASONING[0].into(), thoughts)),
            }
        }
        Self { role: role.into(), learnt, fields: fields.into_iter().collect() }
    }

    /// A turn with a text and nothing else.
    pub fn text(role: &str, content: &str) -> Self {
        let field = |name: &str, value: &str| (name.to_string(), Value::from(value));
        Self::new(role, vec![field("role", role), field("content", content)], true)
    }

    /// Whether the assistant speaks.
    pub fn is_assistant(&self) -> bool {
        self.role == ASSISTANT
    }

    /// Whether both say the same, learnt or not.
    pub fn says_what(&self, other: &Self) -> bool {
        self.role == other.role && self.fields == other.fields
    }

    /// What the template gets.
    pub(super) fn fields(&self) -> &Value {
        &self.fields
    }
}

/// A dialogue, and what else its template gets.
#[derive(Clone, Debug, Default)]
pub struct Dialogue {
    /// The turns.
    pub messages: Vec<Message>,
    /// Descriptions of the tools that the assistant may call.
    pub tools: Option<Value>,
    /// Further variables of the template, such as `enable_thinking`.
    pub variables: BTreeMap<String, Value>,
}
