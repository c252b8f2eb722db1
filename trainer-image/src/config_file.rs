//! Reading the config that the operator mounts, with its place in the file where something is wrong.

use crate::error::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_ignored::Path;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// A config and what it hashes to.
#[derive(Debug)]
pub struct ConfigFile<T> {
    /// What the file says.
    pub value: T,
    /// Fields that it has and this version does not know, such as `kind.sft.lorra`.
    pub unknown: Vec<String>,
    /// SHA-256 of its bytes, and of settings that came by another way: ranks that agree on it were given the same config.
    pub digest: [u8; 32],
}

impl<T> ConfigFile<T> {
    /// The config with a setting that came by another way, which becomes part of what ranks agree on.
    ///
    /// # Errors
    /// The setting cannot be written as JSON.
    pub fn with<S: Serialize>(mut self, setting: S, set: impl FnOnce(&mut T, S)) -> Result<Self> {
        let text = serde_json::to_vec(&setting).map_err(|e| Error::bug(e.to_string()))?;
        self.digest = Sha256::new().chain_update(self.digest).chain_update(text).finalize().into();
        set(&mut self.value, setting);
        Ok(self)
    }

    /// Says which fields are not followed. They are no error: the operator may be newer than this image, and what a job may ask
    /// for is the API server's to check.
    pub fn warn_of_unknown(&self) {
        for field in &self.unknown {
            tracing::warn!(
                field,
                "the config has a field that this version of the trainer does not know, and does not follow"
            );
        }
    }
}

/// Reads and checks a JSON config.
///
/// # Errors
/// The file cannot be read, or does not have the form: exit code 64 with path, line and column.
pub fn read<T: DeserializeOwned>(path: &std::path::Path) -> Result<ConfigFile<T>> {
    let bytes = std::fs::read(path).map_err(|e| {
        Error::config(format!(
            "{}: {e}; the operator mounts the config there, --config names another file",
            path.display()
        ))
    })?;
    let wrong = |e: serde_json::Error| Error::config(format!("{}: {e}", path.display()));
    let (mut json, mut unknown) = (serde_json::Deserializer::from_slice(&bytes), Vec::new());
    let whole: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let value = serde_ignored::deserialize(&mut json, |field| unknown.push(place(&field, &whole).0.join(".")))
        .map_err(wrong)?;
    json.end().map_err(wrong)?;
    Ok(ConfigFile { value, unknown, digest: Sha256::digest(&bytes).into() })
}

/// The keys that lead through a file to a field, and what stands there. The path of `serde_ignored` leaves out which variant of
/// an enum was chosen, which is the only key of the object at that place.
fn place<'v>(path: &Path<'_>, whole: &'v Value) -> (Vec<String>, Option<&'v Value>) {
    let below = |parent: &Path<'_>, key: &str| {
        let (mut keys, at) = place(parent, whole);
        keys.push(key.to_owned());
        (keys, at)
    };
    match path {
        Path::Root => (vec![], Some(whole)),
        Path::Seq { parent, index } => {
            let (keys, at) = below(parent, &index.to_string());
            (keys, at.and_then(|at| at.get(index)))
        }
        Path::Map { parent, key } => {
            let (keys, at) = below(parent, key);
            (keys, at.and_then(|at| at.get(key)))
        }
        Path::Some { parent } | Path::NewtypeStruct { parent } => place(parent, whole),
        Path::NewtypeVariant { parent } => {
            let (mut keys, at) = place(parent, whole);
            let chosen = at.and_then(Value::as_object).and_then(|object| object.iter().next());
            keys.extend(chosen.map(|(variant, _)| variant.clone()));
            (keys, chosen.map(|(_, value)| value))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rlhf_api::config::JobRef;
    use std::fs;

    #[test]
    fn an_error_names_file_line_and_column() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let read_text = |text: &str| {
            fs::write(&path, text).unwrap();
            read::<JobRef>(&path)
        };
        let missing = read::<JobRef>(&path).unwrap_err();
        assert!(
            missing.exit.code() == 64
                && missing.message.contains("config.json")
                && missing.message.contains("--config"),
            "{missing}"
        );
        for (text, part) in
            [("{\n  \"name\": }", "line 2 column 11"), (r#"{"namespace": "a", "name": "b"}"#, "missing field `uid`")]
        {
            let error = read_text(text).unwrap_err();
            assert!(
                error.exit.code() == 64 && error.message.contains(part) && error.message.contains("config.json"),
                "{error}"
            );
        }
        let newer = read_text(r#"{"namespace": "a", "name": "b", "uid": "c", "colour": {"hue": 1}}"#).unwrap();
        assert_eq!((newer.value.name.as_str(), newer.unknown), ("b", vec!["colour".to_owned()]));
        assert!(read_text(r#"{"namespace": "a", "name": "b", "uid": "c"} x"#).unwrap_err().message.contains("column"));
        let good = read_text(r#"{"namespace": "a", "name": "b", "uid": "c"}"#).unwrap();
        assert_eq!((good.value.name.as_str(), good.unknown.len()), ("b", 0));
        let set = |name: &str| {
            let good = read_text(r#"{"namespace": "a", "name": "b", "uid": "c"}"#).unwrap();
            good.with(name, |config, name| config.name = name.to_owned()).unwrap()
        };
        assert_eq!((set("x").value.name.as_str(), set("x").digest), ("x", set("x").digest));
        assert!(set("x").digest != set("y").digest && set("x").digest != good.digest);
        assert_ne!(good.digest, read_text(r#"{"namespace": "a", "name": "b", "uid":  "c"}"#).unwrap().digest);
    }

    #[test]
    fn an_unknown_field_is_named_as_it_stands_in_the_file() {
        #[derive(serde::Deserialize)]
        #[allow(dead_code)]
        struct Inner {
            known: u32,
        }
        #[derive(serde::Deserialize)]
        #[allow(dead_code)]
        #[serde(rename_all = "camelCase")]
        enum Choice {
            OneOf(Box<Inner>),
            Other(Inner),
        }
        #[derive(serde::Deserialize)]
        #[allow(dead_code)]
        struct Outer {
            choice: Choice,
            list: Vec<Option<Choice>>,
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let text = r#"{"choice": {"oneOf": {"known": 1, "a": 2}}, "list": [null, {"other": {"b": {"c": 1}, "known": 1}}], "d": 1}"#;
        fs::write(&path, text).unwrap();
        assert_eq!(read::<Outer>(&path).unwrap().unknown, ["choice.oneOf.a", "list.1.other.b", "d"]);
    }
}
