//! Brings what lies outside of the volume onto it, before anything of a job is checked: models and files of the hub, of buckets
//! and of web addresses.
//!
//! What was brought lies in the volume's cache, in a folder that is named by the place and by an immutable revision of it: jobs
//! that use the same share it, and none sees another's half. A run sees its own by a link below its folder, which stays once it is
//! made, so that a run never changes its model while it goes on. Secrets are read here and nowhere else, from files that only
//! prepare's pod has.
//!
//! The hub's routes are few, and its files come by plain range requests, so they are spoken here: what a client would bring
//! beside them (a cache of its own layout, uploads, chunks) is not what a shared volume needs.

mod bucket;
mod cache;
mod choose;
mod client;
mod download;
mod hub;
mod origin;
mod secret;
mod turn;
mod web;

use crate::error::{Error, Result};
use crate::lease::Holder;
use crate::telemetry::Telemetry;
use cache::Cache;
use client::Client;
use download::Pace;
use origin::{Fault, Listing, Origin};
use rlhf_api::config::PrepareConfig;
use rlhf_api::report::ExitCode;
use rlhf_api::source::{Place, Remote};
use secret::Secret;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How patient it is.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Tries in a row that bring nothing before it gives up.
    pub tries: u32,
    /// The wait after the first of them; each further one takes twice as long, up to a minute.
    pub wait: Duration,
    /// Longest silence of a server.
    pub silence: Duration,
    /// How often who fetches shows that it lives.
    pub beat: Duration,
    /// Silence after which it counts as dead to who waits for the same.
    pub dead: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { tries: 8, wait: seconds(1), silence: seconds(60), beat: seconds(10), dead: seconds(60) }
    }
}

/// Where and as whom it fetches.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Where the job's volume is mounted.
    pub volume: PathBuf,
    /// Where the Secrets are.
    pub secrets: PathBuf,
    /// The attempt at prepare.
    pub attempt: u32,
    /// Where the hub answers, where no Secret says otherwise; `None`: at its own address.
    pub hub: Option<String>,
    /// How patient it is.
    pub patience: Patience,
}

/// Brings all that a job needs from outside onto the volume.
///
/// # Errors
/// Names the field, the place, and what to do.
pub fn run(config: &PrepareConfig, setting: &Setting, telemetry: &Telemetry) -> Result<()> {
    for remote in &config.remote {
        let holder = Holder { job_uid: config.job.uid.clone(), attempt: setting.attempt };
        one(remote, holder, setting, telemetry)
            .map_err(|e| e.context(format!("{} {}", remote.field, remote.shown())))?;
    }
    Ok(())
}

fn one(remote: &Remote, holder: Holder, setting: &Setting, telemetry: &Telemetry) -> Result<()> {
    let cache = Cache::new(&setting.volume, remote);
    if cache.is_there()? {
        tracing::info!("{} is on the volume already, at {}", remote.shown(), remote.path);
        return Ok(());
    }
    let secret = remote.secret.as_ref().map(|name| Secret::new(&setting.secrets, name)).transpose()?;
    let client = Client::new(secret.as_ref(), setting.patience)?;
    let origin = open(remote, &client, secret.as_ref(), setting)?;
    telemetry.doing(format!("asking what {} has", remote.shown()));
    let listing = patiently(setting.patience, telemetry, || origin.list(cache.pinned()?.as_deref()))?;
    let listing = checked(listing, remote)?;
    let place = cache.place(&listing.revision, origin.server());
    turn::alone(&place, holder, setting.patience, telemetry, |turn| {
        if !place.is_whole() {
            let pace = Pace::new(&remote.shown(), &listing, telemetry);
            download::all(&*origin, &listing, &place, turn, pace, setting.patience)?;
            place.publish(&remote.shown(), &listing)?;
        }
        Ok(())
    })?;
    cache.show(&place, &listing.revision)?;
    tracing::info!(
        revision = listing.revision,
        files = listing.files.len(),
        "{} is at {}",
        remote.shown(),
        remote.path
    );
    Ok(())
}

fn open(remote: &Remote, client: &Client, secret: Option<&Secret>, setting: &Setting) -> Result<Box<dyn Origin>> {
    let wrong = || Error::config("it is no location; write volume://, hf://, s3://, gs://, az:// or https://");
    let place = Place::of(&remote.uri).ok_or_else(wrong)?;
    let origin: Box<dyn Origin> = match place {
        Place::Hub { repository, revision, file } => {
            Box::new(hub::Hub::new(client, secret, setting.hub.as_deref(), repository, revision, file)?)
        }
        Place::Bucket { scheme, bucket, key } => {
            let name = place.file_name().filter(|_| !remote.is_model);
            Box::new(bucket::Bucket::new(client, secret, scheme, bucket, key, name)?)
        }
        Place::Web { url, sha256 } => {
            let name = place.file_name().ok_or_else(wrong)?;
            Box::new(web::Web::new(client, url, sha256, name))
        }
    };
    Ok(origin)
}

/// Of a model only what training reads, and no name that leads out of its folder.
fn checked(mut listing: Listing, remote: &Remote) -> Result<Listing> {
    if remote.is_model {
        listing.files = choose::of_model(listing.files).map_err(Error::input)?;
    }
    for file in &listing.files {
        let part = |part: &str| !part.is_empty() && !part.starts_with('.');
        if !file.name.split('/').all(part) || file.name.contains(['\\', '\0']) {
            return Err(Error::input(format!(
                "it has a file of the name {:?}, which the volume cannot have",
                file.name
            )));
        }
    }
    Ok(listing)
}

/// How often a wait shows that somebody waits.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);

/// Does it again, after a while, as long as its faults pass.
fn patiently<T>(
    patience: Patience,
    telemetry: &Telemetry,
    mut work: impl FnMut() -> std::result::Result<T, Fault>,
) -> Result<T> {
    let mut failed = 0;
    loop {
        match work() {
            Ok(done) => return Ok(done),
            Err(fault) => {
                failed += 1;
                fault.wait(failed, patience, telemetry)?;
            }
        }
    }
}

impl Fault {
    /// Waits until the next try, after `failed` that brought nothing.
    ///
    /// # Errors
    /// There is none: the fault does not pass, or has not for long.
    fn wait(self, failed: u32, patience: Patience, telemetry: &Telemetry) -> Result<()> {
        let (why, after) = match self {
            Fault::Lasting(error) => return Err(error),
            Fault::Passing { why, after } => (why, after),
        };
        if failed >= patience.tries {
            return Err(Error::new(
                ExitCode::Storage,
                format!("{why}, {failed} times in a row; it goes on from there next time"),
            ));
        }
        let own = patience.wait.saturating_mul(1 << (failed - 1).min(10)).min(Duration::from_secs(60));
        let wait = after.map_or(own, |after| after.clamp(own, Duration::from_secs(600)));
        tracing::warn!("{why}; trying again in {:.1} s", wait.as_secs_f64());
        // To wait as one was told to is no standstill.
        let started = std::time::Instant::now();
        while let Some(left) = wait.checked_sub(started.elapsed()).filter(|left| !left.is_zero()) {
            telemetry.alive();
            std::thread::sleep(left.min(SIGN_OF_LIFE));
        }
        Ok(())
    }
}

/// The bytes that a volume has left.
fn free_bytes(volume: &Path) -> Result<u64> {
    let found = rustix::fs::statvfs(volume).map_err(|e| Error::storage(volume, e))?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

#[cfg(test)]
mod tests;
