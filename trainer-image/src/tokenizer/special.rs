//! The begin, end and pad tokens: names in `tokenizer_config.json` or `special_tokens_map.json`, else ids in
//! `generation_config.json` or `config.json`. The first file that says something counts.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

const NAME_FILES: [&str; 2] = ["tokenizer_config.json", "special_tokens_map.json"];
const ID_FILES: [&str; 2] = ["generation_config.json", "config.json"];

/// A tokenizer's special tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SpecialTokens {
    pub bos: Option<i64>,
    pub eos: i64,
    pub pad: i64,
    /// The tokens' texts under the names that chat templates know them by, such as `bos_token`.
    pub texts: BTreeMap<String, String>,
}

/// A JSON file of the model's folder; empty where it is missing.
struct File<'a> {
    name: &'a str,
    fields: Map<String, Value>,
}

/// Reads the special tokens of the model in `dir`, and its `tokenizer_config.json`.
pub(super) fn read(dir: &Path, inner: &tokenizers::Tokenizer) -> Result<(SpecialTokens, Map<String, Value>)> {
    let load = |name: &'static str| read_object(&dir.join(name)).map(|fields| File { name, fields });
    let names: Vec<File<'_>> = NAME_FILES.into_iter().map(load).collect::<Result<_>>()?;
    let ids: Vec<File<'_>> = ID_FILES.into_iter().map(load).collect::<Result<_>>()?;
    let mut texts = BTreeMap::new();
    let mut find = |which: &str| -> Result<Option<i64>> {
        let found = match by_name(&names, which, inner) {
            Ok(None) => by_id(&ids, which, inner),
            found => found,
        };
        let found = found.map_err(|what| Error::input(format!("{}/{what}", dir.display())))?;
        Ok(found.map(|(id, text)| {
            texts.insert(format!("{which}_token"), text);
            id
        }))
    };
    let (bos, eos, pad) = (find("bos")?, find("eos")?, find("pad")?);
    find("unk")?;
    let eos = eos.ok_or_else(|| {
        Error::input(format!(
            "{}: the tokenizer has no end-of-sequence token; name it as eos_token in tokenizer_config.json",
            dir.display()
        ))
    })?;
    let config = names.into_iter().next().map(|f| f.fields).unwrap_or_default();
    Ok((SpecialTokens { bos, eos, pad: pad.unwrap_or(eos), texts }, config))
}

type Found = std::result::Result<Option<(i64, String)>, String>;

/// A token written as its text, plain or as an `AddedToken` object.
fn by_name(files: &[File<'_>], which: &str, inner: &tokenizers::Tokenizer) -> Found {
    let field = format!("{which}_token");
    for file in files {
        let value = file.fields.get(&field);
        let Some(text) = value.and_then(|v| v.get("content").unwrap_or(v).as_str()) else { continue };
        let id = inner
            .token_to_id(text)
            .ok_or_else(|| format!("{}: {field} is '{text}', which tokenizer.json does not have", file.name))?;
        return Ok(Some((id.into(), text.to_string())));
    }
    Ok(None)
}

/// A token written as its id, or as a list of ids of which the first counts.
fn by_id(files: &[File<'_>], which: &str, inner: &tokenizers::Tokenizer) -> Found {
    let field = format!("{which}_token_id");
    for file in files {
        let value = file.fields.get(&field);
        let Some(id) = value.and_then(|v| v.get(0).unwrap_or(v).as_u64()) else { continue };
        let text = u32::try_from(id).ok().and_then(|id| inner.id_to_token(id));
        let text = text.ok_or_else(|| format!("{}: {field} is {id}, which tokenizer.json does not have", file.name))?;
        return Ok(Some((id as i64, text)));
    }
    Ok(None)
}

fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(e) => return Err(Error::input(format!("{}: {e}", path.display()))),
    };
    serde_json::from_str(&text).map_err(|e| Error::input(format!("{}: not a JSON object: {e}", path.display())))
}
