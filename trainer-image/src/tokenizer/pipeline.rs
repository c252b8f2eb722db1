//! Which pipeline turns text into tokens: that of `tokenizer.json`, or that of the class that `tokenizer_config.json` names.
//!
//! In `transformers` 5 a few classes build their own normalizer, pre-tokenizer and decoder round the vocabulary, the merges
//! and the post-processor of `tokenizer.json`, and drop what else the file says (`models/*/tokenization_*.py` of 5.24). What
//! serves a model then tokenizes by the class, so training does the same; a trained model is written with the pipeline that
//! it was trained with, and a class that keeps it.

use serde_json::{Map, Value, json};

/// The class that keeps whatever `tokenizer.json` says, in `transformers` 4 and 5.
pub(super) const GENERIC: &str = "PreTrainedTokenizerFast";

/// Qwen 2's pre-tokenizer in `transformers`, by which the class splits.
const QWEN_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Parts of `tokenizer.json` that a class may write over.
const PARTS: [&str; 3] = ["normalizer", "pre_tokenizer", "decoder"];

/// A class that builds its own pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Llama,
    Gpt2,
    Qwen2,
    Gemma,
}

impl Class {
    fn named(name: &str) -> Option<Self> {
        match name.strip_suffix("Fast").unwrap_or(name) {
            "LlamaTokenizer" => Some(Class::Llama),
            "GPT2Tokenizer" => Some(Class::Gpt2),
            "Qwen2Tokenizer" => Some(Class::Qwen2),
            "GemmaTokenizer" => Some(Class::Gemma),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Class::Llama => "LlamaTokenizer",
            Class::Gpt2 => "GPT2Tokenizer",
            Class::Qwen2 => "Qwen2Tokenizer",
            Class::Gemma => "GemmaTokenizer",
        }
    }

    /// What `AutoTokenizer` makes of a folder with these files (`models/auto/tokenization_auto.py` of 5.24).
    fn of(tokenizer: &Value, config: &Map<String, Value>, model: &Map<String, Value>) -> Option<Self> {
        let text = |fields: &Map<String, Value>, name: &str| fields.get(name).and_then(Value::as_str).map(String::from);
        let model_type = text(model, "model_type").unwrap_or_default();
        // What the model's own family has: a class, the generic one, or nothing.
        let of_family = match model_type.as_str() {
            "gpt2" | "opt" => Some(Some(Class::Gpt2)),
            "qwen2" | "qwen3" => Some(Some(Class::Qwen2)),
            "gemma" | "gemma2" | "gemma3_text" => Some(Some(Class::Gemma)),
            "mistral" => Some(None),
            _ => None,
        };
        let Some(named) = text(config, "tokenizer_class").or_else(|| text(model, "tokenizer_class")) else {
            return of_family.flatten();
        };
        let class = Class::named(&named);
        if class == Some(Class::Llama) && model_type != "qwen2" && is_byte_level(tokenizer) {
            return None;
        }
        match of_family {
            Some(None) => None,
            // Its published tokenizers name wrong classes.
            Some(family) if model_type == "qwen2" => family,
            _ => class,
        }
    }

    /// The parts of its pipeline, in the order of [`PARTS`], and the settings of the model that it fixes.
    fn pipeline(self, config: &Map<String, Value>) -> ([Value; 3], Value) {
        let flag = |name: &str| config.get(name).and_then(Value::as_bool);
        let byte_level = |prefix: bool, regex: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": regex});
        let byte_decoder = byte_level(true, true);
        let blanks = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let (fallback, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
        match self {
            Class::Llama => {
                let prefix = flag("add_prefix_space").unwrap_or(true);
                let scheme = match (prefix, flag("legacy").unwrap_or(false)) {
                    (false, _) => "never",
                    (true, true) => "always",
                    (true, false) => "first",
                };
                let mut decoders = vec![blanks, fallback, fuse];
                if prefix {
                    decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
                }
                let split = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
                let parts = [Value::Null, split, json!({"type": "Sequence", "decoders": decoders})];
                (parts, json!({"unk_token": null, "fuse_unk": true, "byte_fallback": true}))
            }
            Class::Gpt2 => {
                let split = byte_level(flag("add_prefix_space").unwrap_or(false), true);
                (
                    [Value::Null, split, byte_decoder],
                    json!({"unk_token": null, "fuse_unk": false, "byte_fallback": false}),
                )
            }
            Class::Qwen2 => {
                let words =
                    json!({"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated", "invert": false});
                let bytes = byte_level(flag("add_prefix_space").unwrap_or(false), false);
                let split = json!({"type": "Sequence", "pretokenizers": [words, bytes]});
                let parts = [json!({"type": "NFC"}), split, byte_decoder];
                (parts, json!({"unk_token": null, "fuse_unk": false, "byte_fallback": false}))
            }
            Class::Gemma => {
                let normalizer = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
                let split = json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false});
                let decoder = json!({"type": "Sequence", "decoders": [blanks, fallback, fuse]});
                let unknown = config.get("unk_token").and_then(|t| t.get("content").unwrap_or(t).as_str());
                let settings =
                    json!({"unk_token": unknown.unwrap_or("<unk>"), "fuse_unk": true, "byte_fallback": true});
                ([normalizer, split, decoder], settings)
            }
        }
    }
}

fn is_byte_level(tokenizer: &Value) -> bool {
    ["pre_tokenizer", "decoder"].iter().any(|part| {
        let part = &tokenizer[*part];
        let named = |value: &Value| value["type"] == "ByteLevel";
        let inner = ["pretokenizers", "decoders"].iter().filter_map(|list| part[*list].as_array()).flatten();
        named(part) || inner.into_iter().any(named)
    })
}

/// Whether a class may have its say.
pub(super) fn has_class(config: &Map<String, Value>, model: &Map<String, Value>) -> bool {
    Class::of(&Value::Null, config, model).is_some()
}

/// Lets the class beat the file, as `transformers` 5 does. Where that changes what text becomes, says so.
pub(super) fn apply_class(
    tokenizer: &mut Value,
    config: &Map<String, Value>,
    model: &Map<String, Value>,
) -> Option<String> {
    let class = Class::of(tokenizer, config, model)?;
    if tokenizer["model"]["type"] != "BPE" {
        return None;
    }
    let (parts, settings) = class.pipeline(config);
    let encodes =
        |tokenizer: &Value| (without_trimming(&tokenizer["normalizer"]), without_trimming(&tokenizer["pre_tokenizer"]));
    let before = encodes(tokenizer);
    for (name, part) in PARTS.into_iter().zip(parts) {
        tokenizer[name] = part;
    }
    let settings = settings.as_object().cloned().unwrap_or_default();
    for (name, value) in settings {
        tokenizer["model"][name] = value;
    }
    (before != encodes(tokenizer)).then(|| {
        format!(
            "tokenizer_class {0} has its own normalizer and pre-tokenizer, which are not those of tokenizer.json; the class counts here, as in transformers 5, and the trained model is written with {GENERIC} and what was used. If the file is right, write \"tokenizer_class\": \"{GENERIC}\" into tokenizer_config.json",
            class.name()
        )
    })
}

/// A part without what changes offsets only, and without a sequence of one.
fn without_trimming(part: &Value) -> Value {
    match part {
        Value::Object(fields) => {
            for list in ["pretokenizers", "normalizers"] {
                if let Some([one]) = fields.get(list).and_then(Value::as_array).map(Vec::as_slice) {
                    return without_trimming(one);
                }
            }
            let kept = fields.iter().filter(|(name, _)| *name != "trim_offsets");
            Value::Object(kept.map(|(name, value)| (name.clone(), without_trimming(value))).collect())
        }
        Value::Array(list) => Value::Array(list.iter().map(without_trimming).collect()),
        other => other.clone(),
    }
}
