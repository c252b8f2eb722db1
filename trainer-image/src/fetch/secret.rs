//! The Secret of a place, as its entries are mounted: never in an environment, a message or a log.

use crate::error::{Error, Result};
use std::fmt;
use std::path::{Path, PathBuf};

/// A Secret's entries, each read when it is asked for.
pub(super) struct Secret {
    pub name: String,
    dir: PathBuf,
}

/// Without what is in it.
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({})", self.name)
    }
}

impl Secret {
    /// The one of this name below the folder where all are mounted.
    ///
    /// # Errors
    /// It is not there.
    pub fn new(secrets: &Path, name: &str) -> Result<Self> {
        let dir = secrets.join(name);
        if !dir.is_dir() {
            return Err(Error::config(format!(
                "the Secret '{name}' is not mounted in prepare's pod at {}",
                dir.display()
            )));
        }
        Ok(Self { name: name.into(), dir })
    }

    /// What an entry says, without blanks and line ends around it; `None` where there is none, or nothing in it.
    pub fn get(&self, entry: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.dir.join(entry)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    /// What an entry says.
    ///
    /// # Errors
    /// There is none, or no such Secret, which looks the same from here.
    pub fn need(&self, entry: &str) -> Result<String> {
        let missing = || format!("the Secret '{}' has no entry {entry}, or is not there; write it", self.name);
        self.get(entry).ok_or_else(|| Error::config(missing()))
    }
}
