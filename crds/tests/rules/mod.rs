//! The admission rules by example, one manifest a file: for the test beside this folder, which runs the rules
//! in an interpreter, and for the cluster test, which asks an API server.
//!
//! A file's first line is a comment: `accepted`, or `refused:` and a part of the answer. Of two documents the
//! first is stored and the second is its update, of which the first line speaks.

use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A manifest, and what becomes of it.
pub struct Case {
    /// The file.
    pub path: PathBuf,
    /// The job that exists already, where the case is an update.
    pub stored: Option<Value>,
    /// The manifest that is applied.
    pub manifest: Value,
    /// A part of the answer with which it is refused, or `None` where it is accepted.
    pub refused: Option<String>,
}

/// The cases in a folder, by file name.
pub fn cases(folder: &Path) -> Vec<Case> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "yaml"));
    paths.sort();
    paths.into_iter().map(case).collect()
}

fn case(path: PathBuf) -> Case {
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let refused = refusal(text.lines().next().unwrap_or_default(), &path);
    let parsed = serde_yaml_ng::Deserializer::from_str(&text).map(Value::deserialize).collect::<Result<Vec<_>, _>>();
    let mut documents = parsed.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let manifest = documents.pop().unwrap_or_else(|| panic!("{}: has no document", path.display()));
    Case { stored: documents.pop(), manifest, refused, path }
}

fn refusal(first_line: &str, path: &Path) -> Option<String> {
    if first_line == "# accepted" {
        return None;
    }
    let message = first_line.strip_prefix("# refused: ");
    let message =
        message.unwrap_or_else(|| panic!("{}: begins neither '# accepted' nor '# refused: '", path.display()));
    Some(message.to_owned())
}
