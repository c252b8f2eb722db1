//! The API server's own record of who wrote what.

use crate::tools::cache;
use crate::{RELEASE, SYSTEM};
use serde::Deserialize;
use std::collections::BTreeMap;

/// A write that the API server has answered.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Write {
    /// `create`, `update`, `patch`, `delete` or `deletecollection`.
    pub verb: String,
    stage: String,
    user: User,
    object_ref: Option<ObjectRef>,
}

#[derive(Clone, Debug, Deserialize)]
struct User {
    username: String,
    #[serde(default)]
    extra: BTreeMap<String, Vec<String>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct ObjectRef {
    resource: String,
    subresource: String,
    namespace: String,
    name: String,
}

impl Write {
    /// What was written, such as `patch rlhfjobs/status sentiment`.
    pub fn describe(&self) -> String {
        let ObjectRef { resource, subresource, name, .. } = self.object_ref.clone().unwrap_or_default();
        let part = if subresource.is_empty() { String::new() } else { format!("/{subresource}") };
        format!("{} {resource}{part} {name}", self.verb).trim_end().to_owned()
    }

    /// The pod whose token the writer had.
    pub fn pod(&self) -> Option<&str> {
        self.user.extra.get("authentication.kubernetes.io/pod-name")?.first().map(String::as_str)
    }

    /// Verb and resource.
    pub fn kind(&self) -> String {
        self.describe().split(' ').take(2).collect::<Vec<_>>().join(" ")
    }
}

/// The writes to a namespace since it was last made, in the order of their answers: an earlier run on the same cluster may
/// have had one of the same name.
pub fn writes(namespace: &str) -> Vec<Write> {
    let path = cache().join("cluster/log/audit.log");
    let log = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    // The API server may be in the middle of its last line.
    let whole = log.rsplit_once('\n').map_or("", |(lines, _)| lines);
    let parse =
        |line: &str| serde_json::from_str::<Write>(line).unwrap_or_else(|e| panic!("{}: {e}: {line}", path.display()));
    let all =
        whole.lines().filter(|line| line.contains(namespace)).map(parse).filter(|w| w.stage == "ResponseComplete");
    let mut writes: Vec<Write> =
        all.filter(|w| w.object_ref.as_ref().is_some_and(|o| o.namespace == namespace)).collect();
    let made = writes.iter().rposition(|w| w.kind() == "create namespaces").unwrap_or(0);
    writes.split_off(made)
}

/// The operator's writes to a namespace.
pub fn operators_writes(namespace: &str) -> Vec<Write> {
    let account = format!("system:serviceaccount:{SYSTEM}:{RELEASE}");
    writes(namespace).into_iter().filter(|w| w.user.username == account).collect()
}
