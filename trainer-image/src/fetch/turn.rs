//! One at a time: of the jobs that need the same, one fetches it and the others wait.
//!
//! Who fetches holds a lease and shows by a file that it lives. One that shows nothing for long is taken for dead, and the next
//! goes on where it stopped. Should it live after all, it ends at its next look; until then both write the same bytes at the same
//! places, and what comes of it is checked as a whole.

use super::Patience;
use super::cache::Place;
use crate::error::{Error, Result};
use crate::files;
use crate::lease::{Holder, Lease};
use crate::telemetry::Telemetry;
use rlhf_api::report::ExitCode;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What shows that a holder lives.
const BEAT: &str = "beat";
/// Between two that find nobody there and take it, less time passes.
const SETTLED: Duration = Duration::from_millis(300);
/// What it says at its end.
const DONE: &str = "done";

/// The right to fetch.
pub(super) struct Turn {
    lease: Lease,
    stop: Option<(Sender<()>, JoinHandle<()>)>,
    beat: PathBuf,
}

/// Does `work` as the only one, as soon as nobody else does it or it is done.
pub(super) fn alone(
    place: &Place,
    holder: Holder,
    patience: Patience,
    telemetry: &Telemetry,
    mut work: impl FnMut(&Turn) -> Result<()>,
) -> Result<()> {
    loop {
        wait(place, &holder, patience, telemetry)?;
        if place.is_whole() {
            return Ok(());
        }
        let turn = Turn::take(&place.turns(), holder.clone(), patience)?;
        // Who came at the same moment has taken it by then, and only the last goes on.
        std::thread::sleep(patience.beat.min(SETTLED));
        match turn.check().and_then(|()| work(&turn)) {
            // Another took over, who works at the same.
            Err(error) if error.exit == ExitCode::PeerLost => {}
            result => return result,
        }
    }
}

/// Until whoever fetches it is done or dead.
fn wait(place: &Place, holder: &Holder, patience: Patience, telemetry: &Telemetry) -> Result<()> {
    let mut seen = None;
    let mut since = Instant::now();
    while !place.is_whole() {
        let Some((number, other)) = Lease::holder(&place.turns())? else { return Ok(()) };
        let beat = std::fs::read_to_string(place.turns().join(format!("{BEAT}-{number}"))).unwrap_or_default();
        // An earlier attempt of the same job has ended.
        let own = other.is_some_and(|other| other.job_uid == holder.job_uid);
        if own || beat == DONE {
            return Ok(());
        }
        let now = Some((number, beat));
        if now != seen {
            (seen, since) = (now, Instant::now());
            telemetry.alive();
        } else if since.elapsed() >= patience.dead {
            tracing::warn!(
                "whoever fetched it shows no sign of life for {} s; going on in its place",
                patience.dead.as_secs()
            );
            return Ok(());
        }
        telemetry.doing("waiting for another job, which fetches the same");
        std::thread::sleep(patience.beat.min(patience.dead / 4));
    }
    Ok(())
}

impl Turn {
    fn take(dir: &Path, holder: Holder, patience: Patience) -> Result<Self> {
        let lease = Lease::take(dir, holder, &[])?;
        let beat = dir.join(format!("{BEAT}-{}", lease.number()));
        remove_beats_but(dir, &beat)?;
        let (stop, stopped) = channel();
        let path = beat.clone();
        let show = move || {
            let mut count = 0u64;
            loop {
                count += 1;
                // One that cannot be written is missed by others, who then wait no longer.
                let _ = std::fs::write(&path, count.to_string());
                if stopped.recv_timeout(patience.beat) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("beat".into()).spawn(show);
        let thread = thread.map_err(|e| Error::bug(format!("no thread: {e}")))?;
        Ok(Self { lease, stop: Some((stop, thread)), beat })
    }

    /// Makes sure that nobody has taken over.
    pub fn check(&self) -> Result<()> {
        self.lease.check()
    }
}

fn remove_beats_but(dir: &Path, own: &Path) -> Result<()> {
    for name in files::names(dir)? {
        let path = dir.join(&name);
        if name.starts_with(BEAT) && path != own {
            files::remove_file(&path)?;
        }
    }
    Ok(())
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.stop.take() {
            drop(stop);
            let _ = thread.join();
        }
        // Where it cannot be said, others find out by waiting.
        let _ = std::fs::write(&self.beat, DONE);
    }
}
