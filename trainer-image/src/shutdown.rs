//! Being asked to stop. SIGTERM and SIGINT ask; more of them ask nothing new.
//!
//! Who is told: the launcher hears the pod's signal and passes it on to every worker; a worker looks at
//! [`Shutdown::requested`] between micro-batches, between decoded tokens and at each step's edge. Who is waited for: everyone, since a worker ends by itself once its
//! checkpoint is written. How long: as long as the kubelet allows (`terminationGracePeriodSeconds`), after which it kills.

use crate::error::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::signal::unix::{SignalKind, signal};

/// Whether this process was asked to stop. Clones share the answer.
#[derive(Clone, Debug, Default)]
pub struct Shutdown(Arc<AtomicBool>);

impl Shutdown {
    /// Listens for SIGTERM and SIGINT from now on. Until then they end the process.
    ///
    /// # Errors
    /// The system refuses a thread or a signal handler.
    pub fn listen(&self) -> Result<()> {
        let told = self.clone();
        on_signal(move || {
            if !told.0.swap(true, Ordering::Relaxed) {
                tracing::info!("asked to stop: what is unfinished is given up, what is whole is saved");
            }
        })
    }

    /// Whether the process was asked to stop.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Asks it to stop, as a signal does.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Calls `act`, in a thread of its own, at every SIGTERM or SIGINT. Once this returns no such signal is lost.
///
/// # Errors
/// The system refuses a thread or a signal handler.
pub(crate) fn on_signal(mut act: impl FnMut() + Send + 'static) -> Result<()> {
    let failed = |e: std::io::Error| Error::bug(format!("signals cannot be handled: {e}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(failed)?;
    let entered = runtime.enter();
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate()).map_err(failed)?, signal(SignalKind::interrupt()).map_err(failed)?);
    drop(entered);
    let span = tracing::Span::current();
    let listen = async move {
        while tokio::select! { s = terminate.recv() => s, s = interrupt.recv() => s }.is_some() {
            span.in_scope(&mut act);
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || runtime.block_on(listen)).map(drop).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Signal, getpid, kill_process};
    use std::sync::mpsc::channel;
    use std::time::Duration;

    #[test]
    fn signals_ask_once_and_do_not_end_the_process() {
        let (sender, heard) = channel();
        on_signal(move || sender.send(()).unwrap_or_default()).unwrap();
        let shutdown = Shutdown::default();
        shutdown.listen().unwrap();
        assert!(!shutdown.requested());
        for signal in [Signal::TERM, Signal::INT, Signal::TERM] {
            kill_process(getpid(), signal).unwrap();
            heard.recv_timeout(Duration::from_secs(10)).unwrap();
        }
        let clone = shutdown.clone();
        let asked = (0..1000).any(|_| {
            clone.requested() || {
                std::thread::sleep(Duration::from_millis(10));
                false
            }
        });
        assert!(asked);
    }

    #[test]
    fn it_can_be_asked_without_a_signal() {
        let shutdown = Shutdown::default();
        let loop_side = shutdown.clone();
        shutdown.request();
        assert!(loop_side.requested());
    }
}
