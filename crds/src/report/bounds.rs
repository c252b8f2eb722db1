//! What a pod says, within bounds.
//!
//! Numbers are those of machines that exist: none of them makes a sum overflow or a loop long. What is out of bounds in a
//! figure is left out, and a shape out of bounds is refused whole, since it is planned with.

use super::{Checkpoint, DatasetShape, Prepared, Progress, TerminationMessage};
use crate::model::{ModelSpec, Positions};

/// Most bytes of a document that are read.
pub const MAX_DOCUMENT_BYTES: usize = 64 * 1024;
/// Most steps of a stage.
const MAX_STEPS: u64 = 1_000_000_000_000;
/// The highest count of signs of life: the largest whole number that every reader of JSON knows exactly.
const MAX_ACTIVITY: u64 = 1 << 53;
/// The longest estimate that is told, a century in seconds.
const MAX_SECONDS: u64 = 3_155_760_000;
/// Most figures of a document, and most characters of a figure's name.
const MAX_FIGURES: usize = 128;
const MAX_NAME: usize = 64;
/// Most characters of a message, and of a path.
const MAX_TEXT: usize = 4096;
/// Most characters of what a trainer says that it does.
const MAX_DOING: usize = 512;
/// Most blocks of a model.
pub const MAX_LAYERS: usize = 1 << 12;
/// Most models and datasets of a job.
const MAX_SHAPES: usize = 64;

/// What a pod said cannot be taken at its word.
#[derive(Debug, thiserror::Error)]
pub enum Unbelievable {
    /// It is longer than any such document.
    #[error("it has {0} bytes, and at most {MAX_DOCUMENT_BYTES} are read")]
    Long(usize),
    /// It is no such document.
    #[error("it is no document of the contract: {0}")]
    Json(#[from] serde_json::Error),
    /// A number of a shape is out of its bounds.
    #[error("{field} is {value}, and must be from {least} to {most}")]
    Number {
        /// The field.
        field: &'static str,
        /// What it says.
        value: i64,
        /// The least that is believed.
        least: i64,
        /// The most that is believed.
        most: i64,
    },
    /// There are more shapes than a job has models and datasets.
    #[error("it has {0} shapes, and a job has at most {MAX_SHAPES}")]
    Many(usize),
}

impl Progress {
    /// Reads a document of a pod.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &[u8]) -> Result<Self, Unbelievable> {
        Ok(read::<Self>(text)?.bounded())
    }

    fn bounded(mut self) -> Self {
        self.step = self.step.min(MAX_STEPS);
        self.total_steps = self.total_steps.min(MAX_STEPS);
        self.activity = self.activity.min(MAX_ACTIVITY);
        self.eta_seconds = self.eta_seconds.filter(|eta| *eta <= MAX_SECONDS);
        if let Some(doing) = &mut self.doing {
            truncate(doing, MAX_DOING);
        }
        bound_figures(&mut self.metrics);
        self.checkpoint = self.checkpoint.and_then(bounded_checkpoint);
        self
    }
}

impl TerminationMessage {
    /// Reads the last word of a pod. A shape that cannot be believed is not in what is returned, but beside it.
    ///
    /// # Errors
    /// It is no such document.
    pub fn parse(text: &[u8]) -> Result<(Self, Option<Unbelievable>), Unbelievable> {
        let mut word: Self = read(text)?;
        truncate(&mut word.reason, MAX_NAME);
        truncate(&mut word.message, MAX_TEXT);
        word.step = word.step.map(|step| step.min(MAX_STEPS));
        word.checkpoint = word.checkpoint.and_then(bounded_checkpoint);
        if let Some(output) = &mut word.output {
            truncate(&mut output.path, MAX_TEXT);
            bound_figures(&mut output.metrics);
        }
        let doubt = word.prepared.as_ref().and_then(|prepared| prepared.check().err());
        if doubt.is_some() {
            word.prepared = None;
        }
        Ok((word, doubt))
    }
}

impl Prepared {
    /// Whether everything that is planned with is within bounds.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check(&self) -> Result<(), Unbelievable> {
        let count = self.models.len().max(self.datasets.len());
        if count > MAX_SHAPES {
            return Err(Unbelievable::Many(count));
        }
        self.models.iter().try_for_each(ModelSpec::check)?;
        self.datasets.iter().try_for_each(DatasetShape::check)
    }
}

impl DatasetShape {
    fn check(&self) -> Result<(), Unbelievable> {
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        within("records", number(self.records), 0, 1 << 50)?;
        within("tokens", number(self.tokens), 0, 1 << 50)?;
        within("longestTokens", self.longest_tokens.into(), 0, 1 << 30)?;
        within("sequences", self.sequences.into(), 0, 1 << 20)
    }
}

impl ModelSpec {
    /// Whether the shape is one that a model can have: far beyond the largest there are, and far from where sums overflow.
    ///
    /// # Errors
    /// The first number that is out of its bounds.
    pub fn check(&self) -> Result<(), Unbelievable> {
        within("vocab", self.vocab, 1, 1 << 26)?;
        within("hidden", self.hidden, 1, 1 << 20)?;
        within("layers", i64::try_from(self.layers).unwrap_or(i64::MAX), 1, MAX_LAYERS as i64)?;
        within("heads", self.heads, 1, 1 << 14)?;
        within("kvHeads", self.kv_heads, 1, self.heads)?;
        within("headDim", self.head_dim, 1, 1 << 16)?;
        within("ffn", self.ffn, 1, 1 << 22)?;
        within("maxPositions", self.max_positions, 1, 1 << 30)?;
        let finite = |number: f64| number.is_finite() && (0.0..=1e18).contains(&number);
        let rotary = match self.positions {
            Positions::Rotary { theta } => finite(theta),
            Positions::Alibi | Positions::Learned => true,
        };
        within("traits.embedWidth", self.embed_width(), 1, 1 << 20)?;
        let caps = [self.traits.attention_cap, self.traits.logit_cap].into_iter().flatten().all(finite);
        let numbers = [("normEps", finite(self.norm_eps)), ("ropeTheta", rotary), ("traits", caps)];
        let wrong = numbers.into_iter().find(|(_, right)| !right);
        wrong.map_or(Ok(()), |(field, _)| {
            Err(Unbelievable::Number { field, value: i64::MAX, least: 0, most: i64::MAX - 1 })
        })
    }
}

fn within(field: &'static str, value: i64, least: i64, most: i64) -> Result<(), Unbelievable> {
    if (least..=most).contains(&value) { Ok(()) } else { Err(Unbelievable::Number { field, value, least, most }) }
}

fn read<T: serde::de::DeserializeOwned>(text: &[u8]) -> Result<T, Unbelievable> {
    if text.len() > MAX_DOCUMENT_BYTES {
        return Err(Unbelievable::Long(text.len()));
    }
    Ok(serde_json::from_slice(text)?)
}

fn bound_figures(figures: &mut std::collections::BTreeMap<String, f64>) {
    figures.retain(|name, value| value.is_finite() && name.len() <= MAX_NAME);
    while figures.len() > MAX_FIGURES {
        figures.pop_last();
    }
}

fn bounded_checkpoint(checkpoint: Checkpoint) -> Option<Checkpoint> {
    (checkpoint.step <= MAX_STEPS && checkpoint.path.len() <= MAX_TEXT).then_some(checkpoint)
}

fn truncate(text: &mut String, most: usize) {
    if let Some((end, _)) = text.char_indices().nth(most) {
        text.truncate(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn shape() -> Value {
        json!({"vocab": 50257, "hidden": 768, "layers": 12, "heads": 12, "kvHeads": 12, "headDim": 64, "ffn": 3072,
            "maxPositions": 1024, "norm": "layer", "normEps": 1e-5, "mlp": "gelu", "qkvBias": true,
            "attentionOutputBias": true, "mlpBias": true, "tiedHead": true})
    }

    fn said(model: Value) -> (TerminationMessage, Option<Unbelievable>) {
        let word = json!({"code": 0, "reason": "Done", "message": "", "prepared": {"models": [model], "datasets": []}});
        TerminationMessage::parse(word.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_shape_is_believed_only_within_bounds() {
        assert!(said(shape()).0.prepared.is_some());
        for field in ["vocab", "hidden", "layers", "heads", "kvHeads", "headDim", "ffn", "maxPositions"] {
            for wrong in [0i64, 1_000_000_000_000] {
                let mut model = shape();
                model[field] = wrong.into();
                let (word, doubt) = said(model);
                assert!(word.prepared.is_none() && word.reason == "Done", "{field} {wrong}");
                let doubt = doubt.unwrap().to_string();
                assert!(doubt.contains("must be from"), "{field} {wrong}: {doubt}");
            }
        }
        let mut model = shape();
        model["normEps"] = json!(1e300);
        assert!(said(model).1.is_some());
        let with = |traits: Value| {
            let mut model = shape();
            model["traits"] = traits;
            said(model)
        };
        assert!(with(json!({"embedWidth": 512, "normsAround": 1.0, "attentionCap": 50})).0.prepared.is_some());
        for wrong in [json!({"embedWidth": 0}), json!({"embedWidth": 1u64 << 40}), json!({"logitCap": -1.0})] {
            assert!(with(wrong.clone()).0.prepared.is_none(), "{wrong}");
        }
    }

    #[test]
    fn figures_and_texts_are_bounded() {
        let mut metrics: serde_json::Map<_, _> = (0..500).map(|i| (format!("m{i}"), json!(i))).collect();
        metrics.insert("x".repeat(1000), json!(1));
        let told = json!({"step": u64::MAX, "totalSteps": u64::MAX, "etaSeconds": u64::MAX, "activity": u64::MAX, "metrics": metrics, "doing": "d".repeat(9999)});
        let progress = Progress::parse(told.to_string().as_bytes()).unwrap();
        assert_eq!((progress.step, progress.eta_seconds, progress.metrics.len()), (MAX_STEPS, None, MAX_FIGURES));
        assert_eq!(progress.doing.map(|doing| doing.len()), Some(MAX_DOING));
        assert_eq!(progress.activity, MAX_ACTIVITY);
        assert!(progress.metrics.keys().all(|name| name.len() <= MAX_NAME));
        let word = json!({"code": 65, "reason": "r".repeat(9999), "message": "\u{fc}".repeat(9999), "step": u64::MAX});
        let (word, doubt) = TerminationMessage::parse(word.to_string().as_bytes()).unwrap();
        assert_eq!((word.reason.len(), word.message.chars().count(), word.step), (64, 4096, Some(MAX_STEPS)));
        assert!(doubt.is_none());
        assert!(matches!(Progress::parse(&vec![b' '; MAX_DOCUMENT_BYTES + 1]), Err(Unbelievable::Long(_))));
        assert!(matches!(Progress::parse(b"nonsense"), Err(Unbelievable::Json(_))));
    }
}
