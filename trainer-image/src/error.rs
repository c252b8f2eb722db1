//! The trainer's one error type: what was wrong, and which exit code tells the operator what to do about it.

use rlhf_api::report::ExitCode;

/// An error that ends a worker. Its message says what was wrong, where, and what to do.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// How the process ends.
    pub exit: ExitCode,
    /// What was wrong, where, and what to do.
    pub message: String,
}

/// A result with the trainer's error.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error that ends the process with `exit`.
    pub fn new(exit: ExitCode, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    /// The config, a flag or the environment is wrong (exit code 64).
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(ExitCode::BadConfig, message)
    }

    /// A data or model file is wrong (exit code 65).
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(ExitCode::BadInput, message)
    }

    /// A file that a user gave could not be read. One that is missing or may not be read is the user's to mend (exit code
    /// 65); anything else is the storage's (74).
    pub fn unreadable(path: &std::path::Path, error: &std::io::Error) -> Self {
        use std::io::ErrorKind::{IsADirectory, NotADirectory, NotFound, PermissionDenied};
        match error.kind() {
            NotFound | PermissionDenied | IsADirectory | NotADirectory => {
                Self::input(format!("{}: {error}", path.display()))
            }
            _ => Self::storage(path, error),
        }
    }

    /// The same error, with what was being done put before its message.
    pub fn context(self, what: impl std::fmt::Display) -> Self {
        Self { message: format!("{what}: {}", self.message), ..self }
    }

    /// An invariant of the trainer does not hold (exit code 70).
    pub fn bug(message: impl Into<String>) -> Self {
        Self::new(ExitCode::Bug, message)
    }

    /// Reading or writing `path` failed (exit code 74).
    pub fn storage(path: &std::path::Path, error: impl std::fmt::Display) -> Self {
        Self::new(ExitCode::Storage, format!("{}: {error}", path.display()))
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        c10d::Error::from(error).into()
    }
}

impl From<c10d::Error> for Error {
    fn from(error: c10d::Error) -> Self {
        let exit = match &error {
            c10d::Error::Distributed(_) | c10d::Error::Timeout(_) => ExitCode::PeerLost,
            // Every attempt would find the same, so it is not the retryable loss of a peer.
            c10d::Error::Disagreement(_) => ExitCode::BadConfig,
            c10d::Error::OutOfMemory(_) => ExitCode::DeviceOutOfMemory,
            c10d::Error::Device(_) => ExitCode::DeviceLost,
            c10d::Error::NotImplemented(_) | c10d::Error::Torch(_) => ExitCode::Bug,
        };
        Self::new(exit, error.to_string())
    }
}
