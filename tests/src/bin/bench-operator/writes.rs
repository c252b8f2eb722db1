//! Writes to the API by one user, as the API server's audit log has them.

use anyhow::Context;
use jiff::Timestamp;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// A write that was answered.
pub struct Write {
    /// When.
    pub at: Timestamp,
    /// Verb and resource, such as `patch rlhfjobs/status`.
    pub kind: String,
    /// The status code.
    pub code: u16,
}

impl Write {
    /// Whether it renews the lease, which a leader does whether it has work or not.
    pub fn is_lease(&self) -> bool {
        self.kind.ends_with(" leases")
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    stage: String,
    verb: String,
    stage_timestamp: Timestamp,
    user: User,
    object_ref: Option<ObjectRef>,
    response_status: Option<Status>,
}

#[derive(Deserialize)]
struct User {
    username: String,
}

#[derive(Default, Deserialize)]
struct ObjectRef {
    #[serde(default)]
    resource: String,
    #[serde(default)]
    subresource: String,
}

#[derive(Deserialize)]
struct Status {
    #[serde(default)]
    code: u16,
}

/// The log, read on from where it was left.
pub struct Audit {
    log: BufReader<File>,
    /// A line that is not whole yet.
    begun: String,
    user: String,
    /// All that the user wrote so far.
    pub writes: Vec<Write>,
}

impl Audit {
    /// The log from its start.
    pub fn of(user: &str, path: &Path) -> anyhow::Result<Self> {
        let log = File::open(path).with_context(|| format!("{}", path.display()))?;
        Ok(Self { log: BufReader::new(log), begun: String::new(), user: user.into(), writes: Vec::new() })
    }

    /// Reads what was added.
    pub fn read_on(&mut self) -> anyhow::Result<&[Write]> {
        while self.log.read_line(&mut self.begun)? > 0 && self.begun.ends_with('\n') {
            let line = std::mem::take(&mut self.begun);
            if line.contains(&self.user) {
                self.take(serde_json::from_str(&line).with_context(|| format!("the audit log's line {line}"))?);
            }
        }
        Ok(&self.writes)
    }

    fn take(&mut self, line: Line) {
        if line.stage != "ResponseComplete" || line.user.username != self.user {
            return;
        }
        let ObjectRef { resource, subresource } = line.object_ref.unwrap_or_default();
        let part = if subresource.is_empty() { subresource } else { format!("/{subresource}") };
        let kind = format!("{} {resource}{part}", line.verb);
        self.writes.push(Write { at: line.stage_timestamp, kind, code: line.response_status.map_or(0, |s| s.code) });
    }

    /// Of which kind how many are, refused ones apart.
    pub fn by_kind(&self) -> BTreeMap<String, usize> {
        let mut kinds = BTreeMap::new();
        for write in &self.writes {
            let refused = if write.code < 400 { String::new() } else { format!(" ({})", write.code) };
            *kinds.entry(format!("{}{refused}", write.kind)).or_insert(0) += 1;
        }
        kinds
    }
}
