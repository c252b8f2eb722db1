//! The hub's routes: which commit a revision is, which files it has, and their bytes.
//!
//! (<https://huggingface.co/docs/hub/api>: `/api/models/{id}/revision/{revision}`, `/api/models/{id}/tree/{commit}`,
//! `/{id}/resolve/{commit}/{path}`; those of datasets begin with `datasets`.) A file that Git LFS keeps has its SHA-256, any other
//! Git's own name.

use super::client::{Asked, Client};
use super::origin::{Check, Fault, File, Listing, Opened, Origin};
use super::secret::Secret;
use crate::error::{Error, Result};
use rlhf_api::source::Place;
use serde::Deserialize;

/// Where the hub answers.
const HUB: &str = "https://huggingface.co";
/// Pages of a listing, at most.
const PAGES: usize = 100;
/// A folder of a model that is looked into.
const TEMPLATES: &str = "additional_chat_templates";

/// A repository of the hub.
pub(super) struct Hub {
    client: Client,
    asked: Asked,
    endpoint: String,
    repository: String,
    revision: String,
    /// The file of a dataset, and its name on the volume.
    file: Option<(String, String)>,
}

#[derive(Deserialize)]
struct Commit {
    sha: String,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    oid: String,
    size: u64,
    path: String,
    lfs: Option<Large>,
}

#[derive(Deserialize)]
struct Large {
    oid: String,
    size: u64,
}

impl Hub {
    pub fn new(
        client: &Client,
        secret: Option<&Secret>,
        endpoint: Option<&str>,
        repository: &str,
        revision: Option<&str>,
        file: Option<&str>,
    ) -> Result<Self> {
        let token = secret.map(|secret| secret.need("HF_TOKEN")).transpose()?;
        // A token goes where the Secret says and nowhere else: else who writes a job could have it sent to themselves.
        let own = secret.and_then(|secret| secret.get("HF_ENDPOINT"));
        let endpoint = if secret.is_some() { own.as_deref() } else { endpoint };
        let endpoint = endpoint.unwrap_or(HUB).trim_end_matches('/').to_owned();
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(Error::config(format!("HF_ENDPOINT '{endpoint}' is no address; write https://host")));
        }
        let of_file = |path: &str| Some((path.to_owned(), Place::Hub { repository, revision, file }.file_name()?));
        Ok(Self {
            client: client.clone(),
            asked: Asked::new(secret, token, "the hub"),
            endpoint,
            repository: repository.into(),
            revision: revision.unwrap_or("main").into(),
            file: file.and_then(of_file),
        })
    }

    fn kind(&self) -> &'static str {
        if self.file.is_some() { "datasets" } else { "models" }
    }

    fn api(&self, rest: &str) -> String {
        format!("{}/api/{}/{}/{rest}", self.endpoint, self.kind(), self.repository)
    }

    /// All entries of a folder.
    fn entries(&self, commit: &str, folder: &str) -> std::result::Result<Vec<Entry>, Fault> {
        let mut next = Some(self.api(format!("tree/{commit}/{folder}").trim_end_matches('/')));
        let mut all = Vec::new();
        for _ in 0..PAGES {
            let Some(url) = next else { return Ok(all) };
            let (page, link) = self.client.json::<Vec<Entry>>(&url, &self.asked)?;
            all.extend(page);
            // The token goes to no other server, and half a listing is none.
            if let Some(other) = link.as_ref().filter(|link| !link.starts_with(&format!("{}/", self.endpoint))) {
                let other = other.split('?').next().unwrap_or_default();
                return Err(Fault::lasting(format!(
                    "the hub at {} goes on listing its files at {other}, another server, which is not asked",
                    self.endpoint
                )));
            }
            next = link;
        }
        Err(Fault::lasting(format!("its folder '{folder}' has more files than can be listed")))
    }

    fn file(&self, commit: &str, entry: Entry, name: String) -> File {
        let route = if self.file.is_some() { "/datasets" } else { "" };
        let key = format!("{}{route}/{}/resolve/{commit}/{}", self.endpoint, self.repository, escaped(&entry.path));
        match entry.lfs {
            Some(Large { oid, size }) => File { name, key, size, check: Check::Sha256(oid) },
            None => File { name, key, size: entry.size, check: Check::Git(entry.oid) },
        }
    }
}

/// A path as a part of an address.
fn escaped(path: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-~=+".contains(&b);
    path.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

impl Origin for Hub {
    fn server(&self) -> &str {
        &self.endpoint
    }

    fn list(&self, pinned: Option<&str>) -> std::result::Result<Listing, Fault> {
        let revision = pinned.unwrap_or(&self.revision);
        let Commit { sha: commit } = self.client.json(&self.api(&format!("revision/{revision}")), &self.asked)?.0;
        if commit.is_empty() || !commit.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(Fault::lasting(format!("the hub at {} names no commit of revision {revision}", self.endpoint)));
        }
        let files = match &self.file {
            Some((path, name)) => {
                let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
                let found = self.entries(&commit, folder)?.into_iter().find(|e| e.kind == "file" && e.path == *path);
                let missing = || Fault::lasting(format!("revision {revision} (commit {commit}) has no file {path}"));
                vec![self.file(&commit, found.ok_or_else(missing)?, name.clone())]
            }
            None => {
                let mut entries = self.entries(&commit, "")?;
                if entries.iter().any(|entry| entry.kind == "directory" && entry.path == TEMPLATES) {
                    entries.extend(self.entries(&commit, TEMPLATES)?);
                }
                let files = entries.into_iter().filter(|entry| entry.kind == "file");
                files
                    .map(|entry| {
                        let name = entry.path.clone();
                        self.file(&commit, entry, name)
                    })
                    .collect()
            }
        };
        Ok(Listing { revision: commit, files })
    }

    fn open(&self, file: &File, from: u64) -> std::result::Result<Opened, Fault> {
        self.client.open(&file.key, &self.asked, from)
    }
}
