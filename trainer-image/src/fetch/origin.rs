//! What every place outside is asked: which files it has, and the bytes of one from somewhere on.

use crate::error::Error;
use std::io::Read;
use std::time::Duration;

/// What a place has.
#[derive(Clone, Debug)]
pub(super) struct Listing {
    /// Names what is there as it is now, and never anything else.
    pub revision: String,
    pub files: Vec<File>,
}

/// A file of a place.
#[derive(Clone, Debug)]
pub(super) struct File {
    /// Its path below the folder in which it comes to lie.
    pub name: String,
    /// By which the place knows it.
    pub key: String,
    pub size: u64,
    pub check: Check,
}

/// How it is known that a file is what it should be, beside its size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Check {
    /// The SHA-256 of it.
    Sha256(String),
    /// Git's name of it: the SHA-1 of its size and itself.
    Git(String),
    /// The place promises that all bytes are of the version with this tag.
    Tag(String),
}

/// Bytes of a file.
pub(super) struct Opened {
    /// The first of them: the one that was asked for, or 0 from who knows only whole files.
    pub from: u64,
    pub bytes: Box<dyn Read>,
}

/// Why a place did not answer.
#[derive(Debug)]
pub(super) enum Fault {
    /// Another try may do better, no sooner than after a time that the place may say.
    Passing { why: String, after: Option<Duration> },
    /// No other try will.
    Lasting(Error),
}

impl Fault {
    pub fn passing(why: impl Into<String>) -> Self {
        Fault::Passing { why: why.into(), after: None }
    }

    pub fn lasting(why: impl Into<String>) -> Self {
        Fault::Lasting(Error::input(why))
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Fault::Lasting(error)
    }
}

/// A place outside.
pub(super) trait Origin {
    /// Whose word it is what a revision holds; empty where a hash says it.
    fn server(&self) -> &str;

    /// What it has; where a run has begun with a revision, that one.
    fn list(&self, pinned: Option<&str>) -> Result<Listing, Fault>;

    /// A file from a byte on.
    fn open(&self, file: &File, from: u64) -> Result<Opened, Fault>;
}
