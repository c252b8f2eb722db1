//! The trainer's one error type: what was wrong, and which exit code tells the operator what to do about it.

use rlhf_api::report::ExitCode;

/// An error that ends a worker. Its message says what was wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
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

    /// An invariant of the trainer does not hold (exit code 70).
    pub fn bug(message: impl Into<String>) -> Self {
        Self::new(ExitCode::Bug, message)
    }

    /// Reading or writing `path` failed (exit code 74).
    pub fn storage(path: &std::path::Path, error: impl std::fmt::Display) -> Self {
        Self::new(ExitCode::Storage, format!("{}: {error}", path.display()))
    }
}

/// The first line of a libtorch message: the rest is a C++ backtrace.
fn without_backtrace(message: &str) -> &str {
    message.split("\nException raised from").next().unwrap_or(message).trim_end()
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        let text = error.to_string();
        let text = without_backtrace(&text);
        let exit = if text.contains("out of memory") { ExitCode::DeviceOutOfMemory } else { ExitCode::Bug };
        Self::new(exit, format!("libtorch: {text}"))
    }
}

impl From<c10d::Error> for Error {
    fn from(error: c10d::Error) -> Self {
        let exit = match &error {
            c10d::Error::Distributed(_) | c10d::Error::Timeout(_) => ExitCode::PeerLost,
            c10d::Error::OutOfMemory(_) => ExitCode::DeviceOutOfMemory,
            c10d::Error::NotImplemented(_) | c10d::Error::Torch(_) => ExitCode::Bug,
        };
        Self::new(exit, error.to_string())
    }
}
