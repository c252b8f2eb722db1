//! The API server's own record of who wrote what.

use crate::scene::Scene;
use crate::tools::cache;
use anyhow::Context;
use jiff::Timestamp;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// A write that the API server has answered; dry runs are none.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Write {
    /// `create`, `update`, `patch`, `delete` or `deletecollection`.
    pub verb: String,
    /// When it was asked for.
    #[serde(rename = "requestReceivedTimestamp")]
    pub asked: Timestamp,
    /// When it was answered.
    #[serde(rename = "stageTimestamp")]
    pub at: Timestamp,
    stage: String,
    user: User,
    object_ref: Option<ObjectRef>,
    response_status: Option<Status>,
    #[serde(default, rename = "requestURI")]
    uri: String,
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

#[derive(Clone, Debug, Deserialize)]
struct Status {
    #[serde(default)]
    code: u16,
}

impl Write {
    /// What was written, such as `update rlhfjobs/status sentiment`.
    pub fn describe(&self) -> String {
        format!("{} {}", self.kind(), self.name()).trim_end().to_owned()
    }

    /// Verb and resource, such as `update rlhfjobs/status`.
    pub fn kind(&self) -> String {
        let ObjectRef { resource, subresource, .. } = self.object_ref.clone().unwrap_or_default();
        let part = if subresource.is_empty() { String::new() } else { format!("/{subresource}") };
        format!("{} {resource}{part}", self.verb)
    }

    /// Whether it is of this verb and resource, such as `update` and `rlhfjobs/status`.
    pub fn is(&self, verb: &str, resource: &str) -> bool {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let of = |o: &ObjectRef| o.resource == resource && o.subresource == subresource;
        self.verb == verb && self.object_ref.as_ref().is_some_and(of)
    }

    /// The namespace of what was written, if it has one.
    pub fn namespace(&self) -> &str {
        self.object_ref.as_ref().map_or("", |o| &o.namespace)
    }

    /// The name of what was written, if its writer gave it one.
    pub fn name(&self) -> &str {
        self.object_ref.as_ref().map_or("", |o| &o.name)
    }

    /// The pod whose token the writer had.
    pub fn pod(&self) -> Option<&str> {
        self.extra("authentication.kubernetes.io/pod-name")
    }

    /// The id of the token that the writer had, if it is an account's.
    pub fn token(&self) -> Option<&str> {
        self.extra("authentication.kubernetes.io/credential-id")
    }

    fn extra(&self, key: &str) -> Option<&str> {
        self.user.extra.get(key)?.first().map(String::as_str)
    }

    /// Whether it was done.
    pub fn is_done(&self) -> bool {
        (200..300).contains(&self.code())
    }

    /// Whether whoever asked was gone before the answer, which may have been either.
    pub fn is_cut_off(&self) -> bool {
        self.code() == 504
    }

    /// The status code of the answer.
    pub fn code(&self) -> u16 {
        self.response_status.as_ref().map_or(0, |s| s.code)
    }

    /// Whether it renews the lease, which a leader does whether it has work or not.
    pub fn is_lease(&self) -> bool {
        self.object_ref.as_ref().is_some_and(|o| o.resource == "leases")
    }

    /// Whether it asks only what a write would do.
    fn is_dry_run(&self) -> bool {
        self.uri.contains("dryRun=All")
    }

    /// Whether a user wrote it.
    pub fn is_by(&self, user: &str) -> bool {
        self.user.username == user
    }

    fn is_in(&self, namespace: &str) -> bool {
        let is = |o: &ObjectRef| o.namespace == namespace || (o.resource == "namespaces" && o.name == namespace);
        self.object_ref.as_ref().is_some_and(is)
    }
}

/// The log, read on from where it was left.
struct Log {
    lines: BufReader<File>,
    /// A line of which the API server has not written the end.
    begun: String,
}

impl Log {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        Ok(Self { lines: BufReader::new(file), begun: String::new() })
    }

    /// What was added and is wanted; only lines with `text` in them are looked at.
    fn read_on(&mut self, text: &str, wanted: impl Fn(&Write) -> bool) -> anyhow::Result<Vec<Write>> {
        let mut found = Vec::new();
        while self.lines.read_line(&mut self.begun)? > 0 && self.begun.ends_with('\n') {
            let line = std::mem::take(&mut self.begun);
            if line.contains(text) {
                let write: Write =
                    serde_json::from_str(&line).with_context(|| format!("the audit log's line {line}"))?;
                found.extend(Some(write).filter(|w| w.stage == "ResponseComplete" && !w.is_dry_run() && wanted(w)));
            }
        }
        Ok(found)
    }
}

/// All writes of one user, of which more come.
pub struct Writes {
    log: Log,
    user: String,
    /// Those so far.
    pub all: Vec<Write>,
}

impl Writes {
    /// From the log's start.
    ///
    /// # Errors
    /// There is no log.
    pub fn of(user: &str, path: &Path) -> anyhow::Result<Self> {
        Ok(Self { log: Log::open(path)?, user: user.into(), all: Vec::new() })
    }

    /// Reads what was added, and gives all.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn read_on(&mut self) -> anyhow::Result<&[Write]> {
        self.all.extend(self.log.read_on(&self.user, |w| w.is_by(&self.user))?);
        Ok(&self.all)
    }

    /// Of which kind how many are, refused ones apart.
    pub fn by_kind(&self) -> BTreeMap<String, usize> {
        let mut kinds = BTreeMap::new();
        for write in &self.all {
            let refused = if write.code() < 400 { String::new() } else { format!(" ({})", write.code()) };
            *kinds.entry(format!("{}{refused}", write.kind())).or_insert(0) += 1;
        }
        kinds
    }
}

/// The writes to a namespace since it was last made, in the order of their answers: an earlier run on the same cluster may
/// have had one of the same name.
pub fn writes(namespace: &str) -> Vec<Write> {
    let log = Log::open(&cache().join("cluster/log/audit.log"));
    let mut writes = log.and_then(|mut log| log.read_on(namespace, |w| w.is_in(namespace))).expect("an audit log");
    let made = writes.iter().rposition(|w| w.kind() == "create namespaces").unwrap_or(0);
    writes.split_off(made)
}

/// Writes of a scene's operators to the scene's namespace that were asked for by another pod than the one that had written the
/// lease last.
pub fn writes_without_lease(scene: &Scene) -> Vec<Write> {
    let account = scene.operator.account();
    let mut leases = writes(&scene.operator.namespace);
    leases.retain(|w| w.is_lease() && w.is_by(&account) && w.is_done());
    leases.sort_by_key(|w| w.asked);
    let holder = |at: Timestamp| leases.iter().take_while(|lease| lease.asked <= at).last().and_then(Write::pod);
    operators_writes(scene).into_iter().filter(|w| w.pod().is_none() || holder(w.asked) != w.pod()).collect()
}

/// The writes of a scene's operator to the scene's namespace.
pub fn operators_writes(scene: &Scene) -> Vec<Write> {
    let account = scene.operator.account();
    writes(&scene.namespace).into_iter().filter(|w| w.is_by(&account)).collect()
}
