//! The special tokens of a model: what begins, ends and pads its sequences, and what is one token wherever a text spells it.
//!
//! As in `transformers` 5: names stand in `tokenizer_config.json` (and, where that lists no `added_tokens_decoder`, in
//! `special_tokens_map.json`, which then comes first), else ids in `generation_config.json` or `config.json`. Whatever is
//! named becomes a special token, also where `tokenizer.json` does not list it among its added ones.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tokenizers::AddedToken;

const CONFIG: &str = "tokenizer_config.json";
const MAP: &str = "special_tokens_map.json";
const ID_FILES: [&str; 2] = ["generation_config.json", "config.json"];
/// The names of single special tokens; a field that ends in `_token` is one too.
const NAMED: &str = "_token";
const LISTS: [&str; 2] = ["extra_special_tokens", "additional_special_tokens"];

/// A tokenizer's special tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SpecialTokens {
    pub bos: Option<i64>,
    /// What is written at the end of a sequence.
    pub eos: i64,
    /// Every token that ends an answer, `eos` among them.
    pub ends: BTreeSet<i64>,
    pub pad: i64,
    /// The tokens' texts under the names that chat templates know them by, such as `bos_token`.
    pub texts: BTreeMap<String, String>,
    /// What is odd about them and no error.
    pub warnings: Vec<String>,
}

/// The JSON files of a model's folder that speak of special tokens; empty where they are missing.
pub(super) struct Files {
    /// Files with names, the first of which counts.
    names: Vec<(&'static str, Map<String, Value>)>,
    /// Files with ids, the first of which counts.
    ids: Vec<(&'static str, Map<String, Value>)>,
}

impl Files {
    pub fn read(dir: &Path) -> Result<Self> {
        let load = |name: &'static str| Ok((name, read_object(&dir.join(name))?));
        let mut names = vec![load(CONFIG)?];
        if names[0].1.get("added_tokens_decoder").is_none() {
            names.insert(0, load(MAP)?);
        }
        Ok(Self { names, ids: ID_FILES.into_iter().map(load).collect::<Result<_>>()? })
    }

    /// `tokenizer_config.json`.
    pub fn config(&self) -> &Map<String, Value> {
        self.file(CONFIG)
    }

    /// `config.json`.
    pub fn model(&self) -> &Map<String, Value> {
        self.file("config.json")
    }

    fn file(&self, name: &str) -> &Map<String, Value> {
        static EMPTY: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
        self.names.iter().chain(&self.ids).find(|(n, _)| *n == name).map_or(&EMPTY, |(_, fields)| fields)
    }

    /// Makes every token that the files name a special one of `inner`. Says whether that changed it.
    pub fn add_tokens(&self, dir: &Path, inner: &mut tokenizers::Tokenizer) -> Result<bool> {
        let known: BTreeSet<String> = inner.get_added_tokens_decoder().into_values().map(|t| t.content).collect();
        let mut listed = self.decoder(dir)?;
        listed.retain(|_, token| !known.contains(&token.content));
        let mut tokens: Vec<AddedToken> = listed.values().cloned().collect();
        // A token that has no id yet would get one that no embedding stands for.
        let has_id = |text: &str, inner: &tokenizers::Tokenizer| inner.token_to_id(text).is_some();
        for text in self.texts() {
            let new = !known.contains(&text) && !tokens.iter().any(|t| t.content == text);
            if new && has_id(&text, inner) {
                tokens.push(AddedToken::from(text, true));
            }
        }
        if tokens.is_empty() {
            return Ok(false);
        }
        let wrong = |what: String| Error::input(format!("{}: {what}", dir.join(CONFIG).display()));
        inner.add_tokens(tokens).map_err(|e| wrong(format!("added_tokens_decoder: {e}")))?;
        for (id, token) in listed {
            let actual = inner.token_to_id(&token.content);
            if actual != Some(id) {
                return Err(wrong(format!(
                    "added_tokens_decoder gives '{}' the id {id}, but tokenizer.json leaves it {}; use the tokenizer files as they were published together",
                    token.content,
                    actual.map_or("none".into(), |id| id.to_string())
                )));
            }
        }
        Ok(true)
    }

    /// The tokens of `added_tokens_decoder` with their ids, in the ids' order.
    fn decoder(&self, dir: &Path) -> Result<BTreeMap<u32, AddedToken>> {
        let Some(decoder) = self.config().get("added_tokens_decoder").filter(|v| !v.is_null()) else {
            return Ok(BTreeMap::new());
        };
        let wrong = |what: &str| Error::input(format!("{}: added_tokens_decoder {what}", dir.join(CONFIG).display()));
        let decoder = decoder.as_object().ok_or_else(|| wrong("is not an object"))?;
        let token = |(id, token): (&String, &Value)| {
            let id = id.parse().map_err(|_| wrong(&format!("has the key '{id}', which is not an id")))?;
            let text = token.get("content").and_then(Value::as_str);
            let text = text.ok_or_else(|| wrong(&format!("gives id {id} no 'content'")))?;
            let flag = |name: &str| token.get(name).and_then(Value::as_bool);
            let special = flag("special").unwrap_or(false);
            let added = AddedToken::from(text, special)
                .single_word(flag("single_word").unwrap_or(false))
                .lstrip(flag("lstrip").unwrap_or(false))
                .rstrip(flag("rstrip").unwrap_or(false))
                .normalized(flag("normalized").unwrap_or(!special));
            Ok((id, added))
        };
        decoder.iter().map(token).collect()
    }

    /// The texts of all special tokens that are named, alone or in lists.
    fn texts(&self) -> BTreeSet<String> {
        let single = |fields: &Map<String, Value>| -> Vec<String> {
            let tokens = fields.iter().filter(|(name, _)| name.ends_with(NAMED));
            tokens.filter_map(|(_, value)| text(value)).map(String::from).collect()
        };
        let listed = |fields: &Map<String, Value>| -> Vec<String> {
            let first = LISTS.iter().find_map(|list| fields.get(*list).filter(|v| !v.is_null()));
            let values: Vec<&Value> = match first {
                Some(Value::Array(list)) => list.iter().collect(),
                Some(Value::Object(named)) => named.values().collect(),
                _ => vec![],
            };
            values.into_iter().filter_map(text).map(String::from).collect()
        };
        self.names.iter().flat_map(|(_, fields)| single(fields).into_iter().chain(listed(fields))).collect()
    }

    /// Finds what begins, ends and pads a sequence.
    pub fn special(&self, dir: &Path, inner: &tokenizers::Tokenizer) -> Result<SpecialTokens> {
        let mut texts = BTreeMap::new();
        let mut find = |which: &str| -> Result<Option<i64>> {
            let found = match self.by_name(which, inner) {
                Ok(None) => self.by_id(which, inner),
                found => found,
            };
            let found = found.map_err(|what| Error::input(format!("{}/{what}", dir.display())))?;
            Ok(found.map(|(id, text)| {
                texts.insert(format!("{which}{NAMED}"), text);
                id
            }))
        };
        let (bos, eos) = (find("bos")?, find("eos")?);
        // Which token pads and which stands for the unknown changes no sample: what is not there is not missed.
        let pad = find("pad").unwrap_or_default();
        let _ = find("unk");
        let eos = eos.ok_or_else(|| {
            Error::input(format!(
                "{}: the tokenizer has no end-of-sequence token; name it as eos_token in tokenizer_config.json",
                dir.display()
            ))
        })?;
        self.named_texts(&mut texts);
        let (ends, warnings) = self.ends(eos, inner);
        Ok(SpecialTokens { bos, eos, ends, pad: pad.unwrap_or(eos), texts, warnings })
    }

    /// Adds the tokens of other names, which a template may ask for, such as `sep_token` or `image_token`.
    fn named_texts(&self, texts: &mut BTreeMap<String, String>) {
        for (name, value) in self.names.iter().flat_map(|(_, fields)| fields) {
            if let Some(text) = text(value).filter(|_| name.ends_with(NAMED)) {
                texts.entry(name.clone()).or_insert_with(|| text.to_string());
            }
        }
    }

    /// Every token at which generation ends in `transformers`: the tokenizer's and those of both files. An id that the
    /// tokenizer does not have is never drawn.
    fn ends(&self, eos: i64, inner: &tokenizers::Tokenizer) -> (BTreeSet<i64>, Vec<String>) {
        let special: BTreeSet<u32> = inner.get_added_tokens_decoder().into_keys().collect();
        let (mut ends, mut warnings) = (BTreeSet::from([eos]), vec![]);
        for (name, fields) in &self.ids {
            for id in ids(fields.get("eos_token_id")) {
                let Some(text) = inner.id_to_token(id) else { continue };
                if ends.insert(id.into()) && !special.contains(&id) {
                    warnings.push(format!(
                        "{name}: eos_token_id {id} is '{text}', an ordinary token, and yet it ends answers; if that is a left-over, write the id of eos_token there"
                    ));
                }
            }
        }
        (ends, warnings)
    }

    /// A token written as its text, plain or as an `AddedToken` object.
    fn by_name(&self, which: &str, inner: &tokenizers::Tokenizer) -> Found {
        let field = format!("{which}{NAMED}");
        for (name, fields) in &self.names {
            let Some(text) = fields.get(&field).and_then(text) else { continue };
            let id = inner
                .token_to_id(text)
                .ok_or_else(|| format!("{name}: {field} is '{text}', which tokenizer.json does not have"))?;
            return Ok(Some((id.into(), text.to_string())));
        }
        Ok(None)
    }

    /// A token written as its id, or as a list of ids of which the first counts.
    fn by_id(&self, which: &str, inner: &tokenizers::Tokenizer) -> Found {
        let field = format!("{which}{NAMED}_id");
        for (name, fields) in &self.ids {
            let Some(id) = ids(fields.get(&field)).first().copied() else { continue };
            match inner.id_to_token(id) {
                Some(text) => return Ok(Some((id.into(), text))),
                None if which == "eos" => {
                    return Err(format!("{name}: {field} is {id}, which tokenizer.json does not have"));
                }
                // What a config says by default.
                None => {}
            }
        }
        Ok(None)
    }
}

type Found = std::result::Result<Option<(i64, String)>, String>;

/// A token's text, written plainly or as an `AddedToken` object.
fn text(value: &Value) -> Option<&str> {
    value.get("content").unwrap_or(value).as_str()
}

/// One id or a list of them.
fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => vec![],
    }
}

/// A JSON object in a file; an empty one where there is no file.
pub(super) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(e) => return Err(Error::unreadable(path, &e)),
    };
    serde_json::from_str(&text).map_err(|e| Error::input(format!("{}: not a JSON object: {e}", path.display())))
}
