//! Where models and data come from: a path on the job's volume, or a place outside from which prepare brings them.
//!
//! A stage never meets such a place. Prepare brings what is there into a cache on the volume and shows it below the run's folder
//! at a path that follows from the location alone ([`path`]); that is where a stage's config says that it is.

use crate::config::volume_path;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A folder with a model: on the volume, in a repository of the hub, or below a prefix of a bucket.
pub const MODEL_PATTERN: &str = concat!(
    r"^(volume://[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*",
    r"|hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._-]*)?",
    r"|(s3|gs|az)://[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9_=+-][A-Za-z0-9._=+-]*)+)$",
);
/// A file with records: on the volume, in a dataset of the hub, in a bucket, or at a web address with its hash.
pub const FILE_PATTERN: &str = concat!(
    r"^(volume://[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*",
    r"|hf://datasets/[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._-]*)?(/[A-Za-z0-9_=+-][A-Za-z0-9._=+-]*)+",
    r"|(s3|gs|az)://[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9_=+-][A-Za-z0-9._=+-]*)+",
    r##"|https://[^ #?@/]+([/?][!-"$-~]*)?#sha256=[0-9a-f]{64})$"##,
);
/// Schemes of places outside of the volume.
const REMOTE: [&str; 5] = ["hf://", "s3://", "gs://", "az://", "https://"];
/// What stands before the repository of a dataset.
const DATASETS: &str = "datasets/";
/// What stands before a file's hash.
const SHA256: &str = "#sha256=";

/// What prepare is given of a Secret: entries that are made to open a place outside, and none that Kubernetes makes, such as the
/// `token` of an account. The chart's admission policy has the same.
pub const SECRET_ENTRIES: [&str; 12] = [
    "HF_TOKEN",
    "HF_ENDPOINT",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_ENDPOINT_URL",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "ca.crt",
];

/// A Secret in the job's namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub struct SecretRef {
    /// Its name.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"))]
    pub name: String,
}

/// What prepare brings onto the volume before it looks at anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Remote {
    /// The field that names it.
    pub field: String,
    /// Where it is, as the job says it.
    pub uri: String,
    /// Whether it is a model's folder; else it is a file.
    pub is_model: bool,
    /// Below the volume, the folder where it is to be seen.
    pub path: String,
    /// The Secret with what opens the place; prepare finds it mounted below [`crate::config::SECRETS_DIR`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
}

impl Remote {
    /// Where it is, for people: without what an address may be signed by.
    pub fn shown(&self) -> String {
        match (self.uri.split_once('?'), self.uri.rsplit_once('#')) {
            (Some((place, _)), Some((_, hash))) => format!("{place}#{hash}"),
            (Some((place, _)), None) => place.to_owned(),
            (None, _) => self.uri.clone(),
        }
    }
}

/// A place outside of the volume, in its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place<'a> {
    /// A repository of the hub.
    Hub {
        /// `org/name`.
        repository: &'a str,
        /// A branch, tag or commit.
        revision: Option<&'a str>,
        /// The file of a dataset; `None`: a model.
        file: Option<&'a str>,
    },
    /// What lies in a bucket, or an Azure container.
    Bucket {
        /// `s3`, `gs` or `az`.
        scheme: &'a str,
        /// Its name.
        bucket: &'a str,
        /// A file's key, or a folder's without a slash at its end.
        key: &'a str,
    },
    /// A file at a web address.
    Web {
        /// The address.
        url: &'a str,
        /// The SHA-256 of the file, in hexadecimal digits.
        sha256: &'a str,
    },
}

impl<'a> Place<'a> {
    /// The parts of a location; `None` where it is on the volume, or none at all.
    pub fn of(uri: &'a str) -> Option<Self> {
        let (scheme, rest) = uri.split_once("://")?;
        match scheme {
            "hf" => hub(rest),
            "s3" | "gs" | "az" => {
                let (bucket, key) = rest.split_once('/')?;
                (is_name(bucket) && are_parts(key)).then_some(Place::Bucket { scheme, bucket, key })
            }
            "https" => {
                let (url, sha256) = uri.split_once(SHA256)?;
                let is_hash = sha256.len() == 64 && sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
                let printable = url.bytes().all(|b| (33..127).contains(&b));
                let host = rest.split(['/', '?', '#']).next().filter(|host| !host.is_empty() && !host.contains('@'));
                (is_hash && printable && !url.contains('#') && host.is_some()).then_some(Place::Web { url, sha256 })
            }
            _ => None,
        }
    }

    /// Whether a model can lie there, which is a folder.
    pub fn can_be_model(&self) -> bool {
        matches!(self, Place::Hub { file: None, .. } | Place::Bucket { .. })
    }

    /// The name of the file there, as the volume has it; `None` where a repository is named.
    pub fn file_name(&self) -> Option<String> {
        let path = match self {
            Place::Hub { file, .. } => (*file)?,
            Place::Bucket { key, .. } => key,
            Place::Web { url, .. } => url.split(['?', '#']).next().unwrap_or(url).trim_end_matches('/'),
        };
        let name = path.rsplit('/').next().unwrap_or(path);
        let kept = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
        let name: String = name.chars().map(kept).collect();
        Some(name.trim_start_matches('.').chars().take(128).collect()).filter(|name: &String| !name.is_empty())
    }
}

fn hub(rest: &str) -> Option<Place<'_>> {
    let (rest, is_data) = match rest.strip_prefix(DATASETS) {
        Some(rest) => (rest, true),
        None => (rest, false),
    };
    let mut ends = rest.match_indices('/').map(|(at, _)| at);
    let (org, end) = (ends.next()?, ends.next());
    let (named, file) = match end {
        Some(end) => (rest.get(..end)?, rest.get(end + 1..)),
        None => (rest, None),
    };
    let (repository, revision) = match named.split_once('@') {
        Some((repository, revision)) => (repository, Some(revision)),
        None => (named, None),
    };
    let names = [repository.get(..org)?, repository.get(org + 1..)?];
    let good = names.into_iter().chain(revision).all(is_name) && file.is_none_or(are_parts);
    (good && is_data == file.is_some()).then_some(Place::Hub { repository, revision, file })
}

/// A part of a path that neither hides nor climbs.
fn is_part(part: &str) -> bool {
    !part.is_empty() && !part.starts_with('.') && part.chars().all(|c| c.is_ascii_alphanumeric() || "._=+-".contains(c))
}

fn is_name(name: &str) -> bool {
    is_part(name) && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && !name.contains(['=', '+'])
}

fn are_parts(path: &str) -> bool {
    path.split('/').all(is_part)
}

/// Whether a location has the scheme of a place outside of the volume.
pub fn is_remote(uri: &str) -> bool {
    REMOTE.iter().any(|scheme| uri.starts_with(scheme))
}

/// The folder below the volume in which a run sees what prepare has brought from a place outside.
pub fn folder(run_dir: &str, uri: &str) -> String {
    let hash: String = Sha256::digest(uri).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("{run_dir}/sources/{hash}")
}

/// Where a run finds a location, below the volume; `None` where it is none, or no place for what is looked for.
pub fn path(run_dir: &str, uri: &str, is_model: bool) -> Option<String> {
    if let Some(path) = volume_path(uri) {
        return Some(path.to_owned());
    }
    let (place, folder) = (Place::of(uri)?, folder(run_dir, uri));
    match is_model {
        true => place.can_be_model().then_some(folder),
        false => place.file_name().map(|name| format!("{folder}/{name}")),
    }
}

/// The rules of a location's text: one answer in words, where the pattern would give its own.
pub(crate) fn rules(is_model: bool) -> serde_json::Value {
    let schemes = if is_model { "volume, hf, s3, gs or az" } else { "volume, hf, s3, gs, az or https" };
    let begins: Vec<_> = std::iter::once("volume://")
        .chain(REMOTE)
        .filter(|scheme| !is_model || *scheme != "https://")
        .map(|scheme| format!("self.startsWith('{scheme}')"))
        .collect();
    let mut rules = vec![serde_json::json!({
        "rule": begins.join(" || "),
        "message": format!("a source is a location with one of the schemes {schemes}, such as volume://path"),
    })];
    if is_model {
        rules.push(serde_json::json!({
            "rule": "!self.startsWith('hf://datasets/')",
            "message": "a dataset is no model; write hf://organization/name",
        }));
    } else {
        rules.push(serde_json::json!({
            "rule": "!self.startsWith('hf://') || self.startsWith('hf://datasets/')",
            "message": "a model is no dataset; write hf://datasets/organization/name/path/to/file",
        }));
        rules.push(serde_json::json!({
            "rule": "!self.startsWith('https://') || self.contains('#sha256=')",
            "message": "what is fetched from a web address needs its hash behind it: https://host/file#sha256=<64 hexadecimal digits>",
        }));
    }
    serde_json::Value::Array(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn a_location_is_taken_apart() {
        let hub = |repository, revision, file| Some(Place::Hub { repository, revision, file });
        assert_eq!(Place::of("hf://Qwen/Qwen2.5-7B"), hub("Qwen/Qwen2.5-7B", None, None));
        assert_eq!(Place::of("hf://a/b@v1.0"), hub("a/b", Some("v1.0"), None));
        assert_eq!(Place::of("hf://datasets/a/b/c/d.parquet"), hub("a/b", None, Some("c/d.parquet")));
        assert_eq!(Place::of("hf://datasets/a/b@r/d.jsonl"), hub("a/b", Some("r"), Some("d.jsonl")));
        assert_eq!(Place::of("s3://b/k/l"), Some(Place::Bucket { scheme: "s3", bucket: "b", key: "k/l" }));
        let web = format!("https://h/x/d.jsonl?a=b#sha256={HASH}");
        assert_eq!(Place::of(&web), Some(Place::Web { url: "https://h/x/d.jsonl?a=b", sha256: HASH }));
        assert_eq!(Place::of(&web).unwrap().file_name().as_deref(), Some("d.jsonl"));
    }

    #[test]
    fn what_is_no_location_is_none_and_no_path_leaves_the_volume() {
        let long = format!("https://h/x#sha256={}", &HASH[1..]);
        let auth = format!("https://user:word@h/x#sha256={HASH}");
        for bad in [
            "hf://",
            "hf://a",
            "hf://a/",
            "hf:///a/b",
            "hf://a/b@",
            "hf://a/b/c",
            "hf://a/..",
            "hf://datasets/a/b",
            "hf://datasets/a",
            "hf://datasets/a/b/../c",
            "hf://datasets/a/b/",
            "s3://b",
            "s3://b/",
            "s3://b//k",
            "s3://b/../k",
            "s3:///k",
            "gs://b/.k",
            "https://h/x",
            "https://h/x#sha256=",
            "https://#sha256=",
            "ftp://h/x",
            "http://h/x",
            "a/b",
            "",
            "://",
            "hf://a/b@r@s",
            "hf://ä/b",
            "s3://b/k k",
            &long,
            &auth,
        ] {
            assert_eq!(Place::of(bad), None, "{bad}");
            assert_eq!(path("jobs/j", bad, false), None, "{bad}");
        }
        assert_eq!(path("jobs/j", "volume://a/b", true).as_deref(), Some("a/b"));
        assert_eq!(path("jobs/j", "hf://a/b", false), None, "a model is no file");
        assert_eq!(path("jobs/j", "hf://datasets/a/b/c", true), None, "a file is no model");
        let seen = path("jobs/j", "hf://datasets/a/b/c+d.jsonl", false).unwrap();
        assert!(volume_path(&format!("volume://{seen}")).is_some() && seen.ends_with("/c_d.jsonl"), "{seen}");
    }

    #[test]
    fn the_patterns_of_the_definition_and_the_parser_agree() {
        let web = format!("https://h.org/x/d.jsonl.gz#sha256={HASH}");
        let (model, file) = (regex::Regex::new(MODEL_PATTERN).unwrap(), regex::Regex::new(FILE_PATTERN).unwrap());
        for uri in [
            "volume://a/b",
            "hf://a/b",
            "hf://a/b@main",
            "hf://a/b@",
            "hf://a",
            "hf://datasets/a/b",
            "hf://datasets/a/b/c.jsonl",
            "hf://datasets/a/b@r/c/d.jsonl",
            "hf://datasets/a/b@r",
            "s3://bucket/k",
            "s3://bucket",
            "gs://b/a=1/x.parquet",
            "az://c/../x",
            "https://h/x",
            &web,
            "http://h/x",
            "x",
            "volume://../x",
        ] {
            assert_eq!(model.is_match(uri), path("r", uri, true).is_some(), "{uri} as a model");
            assert_eq!(file.is_match(uri), path("r", uri, false).is_some(), "{uri} as a file");
        }
    }
}
