//! A small tokenizer for tests: an id for each printable ASCII character, and merges `a b` and `ab c`.

use super::Tokenizer;
use serde_json::{Map, Value, json};
use std::path::Path;
use tempfile::TempDir;

pub(crate) const PAD: i64 = 0;
pub(crate) const UNK: i64 = 1;
pub(crate) const BOS: i64 = 2;
pub(crate) const EOS: i64 = 3;
pub(crate) const TURN: i64 = 4;
pub(crate) const AB: i64 = 101;
pub(crate) const ABC: i64 = 102;
pub(crate) const VOCAB: usize = 103;
const SPECIAL: [&str; 5] = ["<pad>", "<unk>", "<bos>", "<eos>", "<turn>"];

/// The id of a character: those of the line break and of space to tilde follow the special tokens.
pub(crate) fn id(c: char) -> i64 {
    if c == '\n' { 5 } else { c as i64 - 32 + 6 }
}

/// The ids of a text in which no merge applies.
pub(crate) fn ids(text: &str) -> Vec<i64> {
    text.chars().map(id).collect()
}

/// A template in ChatML's manner.
pub(crate) const TEMPLATE: &str = "{% for m in messages %}\n{{ '<turn>' + m.role + ':' + m['content'].strip() + eos_token }}\n{% endfor %}\n{% if add_generation_prompt %}\n<turn>assistant:\n{%- endif %}";

/// `tokenizer.json`.
pub(crate) fn tokenizer_json() -> Value {
    let texts = SPECIAL
        .into_iter()
        .map(str::to_string)
        .chain(["\n".to_string()])
        .chain((' '..='~').map(String::from))
        .chain(["ab".into(), "abc".into()]);
    let vocab: Map<String, Value> = texts.enumerate().map(|(id, text)| (text, json!(id))).collect();
    let added = |(id, text): (usize, &str)| json!({"id": id, "content": text, "special": true, "normalized": false, "single_word": false, "lstrip": false, "rstrip": false});
    json!({
        "version": "1.0",
        // Both would falsify samples, and are to be switched off.
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
        "added_tokens": SPECIAL.into_iter().enumerate().map(added).collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["ab", "c"]], "unk_token": "<unk>", "fuse_unk": false}
    })
}

/// `tokenizer_config.json`.
pub(crate) fn config_json() -> Value {
    json!({"bos_token": "<bos>", "eos_token": {"content": "<eos>", "special": true}, "pad_token": "<pad>", "chat_template": TEMPLATE})
}

/// Writes a JSON file.
pub(crate) fn write(dir: &Path, name: &str, json: &Value) {
    std::fs::write(dir.join(name), json.to_string()).unwrap();
}

/// Writes both files.
pub(crate) fn write_tokenizer(dir: &Path) {
    write(dir, "tokenizer.json", &tokenizer_json());
    write(dir, "tokenizer_config.json", &config_json());
}

/// The tokenizer after `change` was applied to `tokenizer.json` and `tokenizer_config.json`.
pub(crate) fn changed(change: impl FnOnce(&mut Value, &mut Value)) -> (TempDir, crate::error::Result<Tokenizer>) {
    let dir = tempfile::tempdir().unwrap();
    let (mut tokenizer, mut config) = (tokenizer_json(), config_json());
    change(&mut tokenizer, &mut config);
    write(dir.path(), "tokenizer.json", &tokenizer);
    write(dir.path(), "tokenizer_config.json", &config);
    let loaded = Tokenizer::load(dir.path());
    (dir, loaded)
}

/// The tokenizer as it is; it puts nothing before a sequence.
pub(crate) fn plain() -> Tokenizer {
    changed(|_, _| ()).1.unwrap()
}

/// A post-processor that puts BOS before a sequence and EOS after it.
pub(crate) fn post_processor() -> Value {
    json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}, "<eos>": {"id": "<eos>", "ids": [EOS], "tokens": ["<eos>"]}}
    })
}

/// The tokenizer that begins each sequence with BOS.
pub(crate) fn with_bos() -> Tokenizer {
    changed(|tokenizer, _| tokenizer["post_processor"] = post_processor()).1.unwrap()
}

/// The tokenizer that knows no BOS.
pub(crate) fn without_bos() -> Tokenizer {
    changed(|_, config| config["bos_token"] = Value::Null).1.unwrap()
}
