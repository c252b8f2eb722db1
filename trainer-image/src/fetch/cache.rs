//! What was fetched, on the volume: `cache/<key>` is a place at a revision, whole or not there; `cache/<key>.partial` is what has
//! come of it so far. A run sees it by a link, and has a note beside it of the revision.

use super::free_bytes;
use super::origin::Listing;
use crate::error::{Error, Result};
use crate::files;
use crate::hex::hex;
use rlhf_api::source::{self, Remote};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The folder of the cache, below the volume.
const CACHE: &str = "cache";
/// In a place's folder: where its files are from.
const RECORD: &str = ".source.json";

/// Where a run looks for what it names.
pub(super) struct Cache<'a> {
    volume: &'a Path,
    remote: &'a Remote,
}

/// A place at a revision.
#[derive(Clone, Debug)]
pub(super) struct Place {
    volume: PathBuf,
    key: String,
}

/// Where something is from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    pub source: String,
    pub revision: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<Recorded>,
}

/// A file, as its place told of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Recorded {
    pub name: String,
    pub size: u64,
}

impl<'a> Cache<'a> {
    pub fn new(volume: &'a Path, remote: &'a Remote) -> Self {
        Self { volume, remote }
    }

    fn link(&self) -> PathBuf {
        self.volume.join(&self.remote.path)
    }

    fn note(&self) -> PathBuf {
        files::sibling(&self.link(), "json")
    }

    /// Whether the run sees it already.
    pub fn is_there(&self) -> Result<bool> {
        Ok(self.pinned()?.is_some() && self.link().is_dir())
    }

    /// The revision with which the run has begun.
    pub fn pinned(&self) -> Result<Option<String>> {
        let note = self.note();
        match std::fs::read(&note) {
            Ok(text) => {
                let record: Record =
                    serde_json::from_slice(&text).map_err(|e| Error::input(format!("{}: {e}", note.display())))?;
                Ok(Some(record.revision))
            }
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
            Err(e) => Err(Error::storage(&note, e)),
        }
    }

    /// Where a revision of it, as this server has it, lies for all jobs. What it is called in the job, such as a branch, has no
    /// part in it; but a web file's name has, by which a stage looks for it.
    pub fn place(&self, revision: &str, server: &str) -> Place {
        let place = source::Place::of(&self.remote.uri);
        let name = place.and_then(|place| place.file_name()).unwrap_or_default();
        let what = match place {
            Some(source::Place::Hub { repository, file, .. }) => ["hub", repository, file.unwrap_or_default()],
            Some(source::Place::Bucket { scheme, bucket, key }) => [scheme, bucket, key],
            Some(source::Place::Web { .. }) | None => ["web", &name, ""],
        };
        let kind = if self.remote.is_model { "model" } else { "file" };
        let what = [what[0], what[1], what[2], kind, revision, server];
        let hash = Sha256::digest(what.join("\0"));
        let key = hex(&hash[..16]);
        Place { volume: self.volume.to_path_buf(), key }
    }

    /// Lets the run see it.
    pub fn show(&self, place: &Place, revision: &str) -> Result<()> {
        let link = self.link();
        files::make_dir(link.parent().unwrap_or(self.volume))?;
        let record = Record { source: self.remote.shown(), revision: revision.into(), files: vec![] };
        write(&self.note(), &record)?;
        let up = "../".repeat(self.remote.path.split('/').count() - 1);
        let fresh = files::sibling(&link, "new");
        files::remove_file(&fresh)?;
        let made = std::os::unix::fs::symlink(format!("{up}{CACHE}/{}", place.key), &fresh);
        made.and_then(|()| std::fs::rename(&fresh, &link))
            .map_err(|e| Error::storage(&link, format!("a link cannot be made: {e}")))
    }
}

impl Place {
    /// The folder with all of it.
    pub fn dir(&self) -> PathBuf {
        self.volume.join(CACHE).join(&self.key)
    }

    /// The folder with what has come so far.
    pub fn partial(&self) -> PathBuf {
        files::sibling(&self.dir(), "partial")
    }

    /// The folder in which those who fetch it take turns.
    pub fn turns(&self) -> PathBuf {
        files::sibling(&self.dir(), "turns")
    }

    pub fn is_whole(&self) -> bool {
        self.dir().is_dir()
    }

    /// Bytes that are left on the volume.
    pub fn free_bytes(&self) -> Result<u64> {
        free_bytes(&self.volume)
    }

    /// Gives what has come its name.
    pub fn publish(&self, uri: &str, listing: &Listing) -> Result<()> {
        let files = listing.files.iter().map(|file| Recorded { name: file.name.clone(), size: file.size }).collect();
        let record = Record { source: uri.into(), revision: listing.revision.clone(), files };
        write(&self.partial().join(RECORD), &record)?;
        match std::fs::rename(self.partial(), self.dir()) {
            Ok(()) => files::sync_dir(&self.volume.join(CACHE)),
            // Who was taken for dead has done the same.
            Err(_) if self.is_whole() => Ok(()),
            Err(e) => Err(Error::storage(&self.dir(), e)),
        }
    }
}

fn write(path: &Path, record: &Record) -> Result<()> {
    files::write(path, &serde_json::to_vec_pretty(record).map_err(|e| Error::bug(e.to_string()))?)
}
