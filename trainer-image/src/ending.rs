//! How a process ends: whatever happens becomes a [`TerminationMessage`], whose code is the process's exit code.
//!
//! A panic is a bug (exit code 70), unless libtorch panicked because memory ran out (71). Its message and place are kept by
//! a hook, as what unwinds carries no place, and a scoped thread's panic loses its message on the way.

use crate::error::{Error, Result};
use rlhf_api::report::{ExitCode, Output, Progress, TERMINATION_FILE, TerminationMessage};
use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook, take_hook};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::current;
use tch::TchError;

/// Does `work`; a panic in it, or in a thread that it joins, is an error with the panic's message and place.
///
/// # Errors
/// What `work` fails with, or its panic.
pub fn guard<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let first = Arc::new(Mutex::new(None));
    let (noted, outside, this_thread) = (first.clone(), take_hook(), current().id());
    set_hook(Box::new(move |info| {
        let error = of_panic(info);
        if current().id() != this_thread {
            tracing::error!("{error}");
        }
        noted.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }));
    let result = catch_unwind(AssertUnwindSafe(work));
    set_hook(outside);
    let noted = first.lock().unwrap_or_else(PoisonError::into_inner).take();
    result.unwrap_or_else(|_| Err(noted.unwrap_or_else(|| Error::bug("a panic without a message"))))
}

fn of_panic(info: &PanicHookInfo<'_>) -> Error {
    let place = info.location().map(|l| format!(" at {}:{}:{}", l.file(), l.line(), l.column()));
    panic_error(info.payload_as_str().unwrap_or("no message"), &place.unwrap_or_default())
}

/// The error for a panic's text. The calls of `tch` that do not return a result panic with the `Debug` form of one.
fn panic_error(text: &str, place: &str) -> Error {
    let text = text.replace("\\n", "\n");
    let text = text.split_once("Torch(\"").map_or(text.as_str(), |(_, inner)| inner.trim_end_matches("\")"));
    let Error { exit, message } = c10d::Error::from(TchError::Torch(text.to_owned())).into();
    Error::new(exit, format!("panic{place}: {message}"))
}

/// The last word of a process of `rank` that got as far as `progress` says.
pub fn message(result: Result<Output>, rank: Option<u32>, progress: Option<Progress>) -> TerminationMessage {
    let (exit, message, output) = match result {
        Ok(output) => (ExitCode::Done, String::new(), Some(output)),
        Err(Error { exit, message }) => (exit, message, None),
    };
    let rank = rank.filter(|_| output.is_none());
    let (step, checkpoint) = progress.map(|p| (p.step, p.checkpoint)).unzip();
    TerminationMessage {
        code: exit.code(),
        reason: exit.reason().into(),
        message,
        rank,
        step,
        checkpoint: checkpoint.flatten(),
        output,
        prepared: None,
    }
}

/// Writes a pod's last word to `file`, or to Kubernetes' own place if there is one.
///
/// # Errors
/// Names the file that cannot be written.
pub fn write_termination_file(file: Option<&Path>, message: &TerminationMessage) -> Result<()> {
    let path = file.unwrap_or(Path::new(TERMINATION_FILE));
    let opened = OpenOptions::new().write(true).truncate(true).create(file.is_some()).open(path);
    match opened.and_then(|mut f| f.write_all(message.to_bounded_json().as_bytes())) {
        Err(e) if file.is_none() && e.kind() == ErrorKind::NotFound => Ok(()),
        other => other.map_err(|e| Error::storage(path, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rlhf_api::report::{Checkpoint, MAX_TERMINATION_BYTES};

    /// The panic hook belongs to the process, so one test at a time guards.
    static ONE: Mutex<()> = Mutex::new(());

    #[test]
    fn a_panic_becomes_an_error_with_its_place() {
        let _one = ONE.lock();
        let error = guard::<()>(|| panic!("step {} is odd", 3)).unwrap_err();
        assert_eq!(error.exit.code(), 70);
        assert!(
            error.message.starts_with("panic at ")
                && error.message.contains("ending.rs:")
                && error.message.ends_with(": step 3 is odd"),
            "{error}"
        );
        let error = guard(|| std::thread::scope(|s| s.spawn(|| -> Result<()> { panic!("inside") }).join().unwrap()))
            .unwrap_err();
        assert!(error.message.ends_with(": inside"), "{error}");
        assert_eq!(guard(|| Ok(5)).unwrap(), 5);
        assert_eq!(guard::<()>(|| Err(Error::input("x"))).unwrap_err().exit.code(), 65);
    }

    #[test]
    fn libtorchs_panics_lose_their_backtrace_and_keep_their_kind() {
        let unwrapped =
            |text: &str| format!("called `Result::unwrap()` on an `Err` value: {:?}", TchError::Torch(text.into()));
        let trace = "\nException raised from f at /x/y.cpp:12 (most recent call first):\nframe #0: c10::Error";
        let shape = panic_error(
            &unwrapped(&format!("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5){trace}")),
            " at a.rs:1:2",
        );
        assert_eq!(
            (shape.exit.code(), shape.message.as_str()),
            (70, "panic at a.rs:1:2: mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")
        );
        let device = panic_error(&unwrapped(&format!("CUDA out of memory. Tried to allocate 2.00 GiB.{trace}")), "");
        assert_eq!(
            (device.exit.code(), device.message.as_str()),
            (71, "panic: CUDA out of memory. Tried to allocate 2.00 GiB.")
        );
        let short = panic_error(&unwrapped("no trace"), "");
        assert_eq!(short.message, "panic: no trace");
    }

    #[test]
    fn a_real_shape_error_of_libtorch_is_one_line() {
        let _one = ONE.lock();
        let (a, b) = (
            tch::Tensor::zeros([2, 3], (tch::Kind::Float, tch::Device::Cpu)),
            tch::Tensor::zeros([4, 5], (tch::Kind::Float, tch::Device::Cpu)),
        );
        let error = guard(|| Ok(a.matmul(&b))).unwrap_err();
        assert!(
            error.exit.code() == 70
                && error.message.ends_with("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
            "{error}"
        );
    }

    #[test]
    fn the_message_says_how_far_it_got() {
        let checkpoint = Checkpoint { step: 4, path: "c/step-4".into() };
        let progress = Progress { step: 5, checkpoint: Some(checkpoint.clone()), ..Default::default() };
        let failed = message(Err(Error::input("line 3: no prompt")), Some(1), Some(progress.clone()));
        assert_eq!(
            (failed.code, failed.reason.as_str(), failed.rank, failed.step, failed.checkpoint),
            (65, "BadInput", Some(1), Some(5), Some(checkpoint))
        );
        let done = message(Ok(Output { path: "m".into(), metrics: Default::default() }), Some(1), Some(progress));
        assert_eq!((done.code, done.rank, done.output.unwrap().path.as_str()), (0, None, "m"));
        assert_eq!(message(Err(Error::config("x")), None, None).step, None);
    }

    #[test]
    fn the_termination_file_holds_what_kubernetes_keeps() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("termination-log");
        std::fs::write(&path, "old ".repeat(9000)).unwrap();
        let long = message(Err(Error::bug("x".repeat(9000))), Some(0), None);
        write_termination_file(Some(&path), &long).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() <= MAX_TERMINATION_BYTES);
        assert_eq!(serde_json::from_str::<TerminationMessage>(&text).unwrap().code, 70);
        let error = write_termination_file(Some(&dir.path().join("no/such")), &long).unwrap_err();
        assert!(error.exit.code() == 74 && error.message.contains("no/such"), "{error}");
    }
}
