//! Brings files onto the volume, each from where it stopped, and holds each against what its place says of it.

use super::Patience;
use super::cache::Place;
use super::origin::{Check, Fault, File, Listing, Origin};
use super::turn::Turn;
use crate::error::{Error, Result};
use crate::files;
use crate::hex::hex;
use crate::telemetry::{Fetched, Telemetry};
use rlhf_api::report::ExitCode;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Bytes that are read at a time.
const CHUNK: usize = 1 << 20;
/// What a file is called until all of it has come.
const PART: &str = "part";
/// How often it is told how far it is, and how often in the log.
const TELL: Duration = Duration::from_secs(1);
const LOG: Duration = Duration::from_secs(30);

/// Brings all of a place's files into its folder for what is not yet whole.
///
/// # Errors
/// The volume has no room, a file is not what it should be, or its place did not answer.
pub(super) fn all(
    origin: &dyn Origin,
    listing: &Listing,
    place: &Place,
    turn: &Turn,
    mut pace: Pace<'_>,
    patience: Patience,
) -> Result<()> {
    let dir = place.partial();
    files::make_dir(&dir)?;
    let there: Vec<u64> = listing.files.iter().map(|file| there(&dir, file)).collect();
    check_room(
        listing.files.iter().map(|f| f.size).sum::<u64>().saturating_sub(there.iter().sum()),
        place.free_bytes()?,
    )?;
    for (file, there) in listing.files.iter().zip(there) {
        let whole = dir.join(&file.name);
        if whole.exists() {
            pace.found(there);
            continue;
        }
        let part = files::sibling(&whole, PART);
        files::make_dir(part.parent().unwrap_or(&dir))?;
        one(origin, file, &part, turn, &mut pace, patience).map_err(|e| e.context(&file.name))?;
        turn.check()?;
        std::fs::rename(&part, &whole).map_err(|e| Error::storage(&whole, e))?;
    }
    Ok(())
}

/// The bytes of a file that have come already.
fn there(dir: &Path, file: &File) -> u64 {
    let whole = dir.join(&file.name);
    let size = |path: &Path| std::fs::metadata(path).map(|m| m.len()).ok();
    size(&whole).or_else(|| size(&files::sibling(&whole, PART))).unwrap_or_default().min(file.size)
}

fn check_room(needed: u64, free: u64) -> Result<()> {
    if needed <= free {
        return Ok(());
    }
    Err(Error::new(
        ExitCode::Storage,
        format!(
            "{} are to come and the volume has {} left; make room, such as by removing what no job uses from its folder cache",
            Bytes(needed),
            Bytes(free)
        ),
    ))
}

/// Brings one file, twice where the first is not what it should be.
fn one(
    origin: &dyn Origin,
    file: &File,
    part: &Path,
    turn: &Turn,
    pace: &mut Pace<'_>,
    patience: Patience,
) -> Result<()> {
    let mut wrong = None;
    for _ in 0..2 {
        let found = fill(origin, file, part, turn, pace, patience)?;
        let Some(why) = mismatch(&file.check, &found) else { return Ok(()) };
        tracing::warn!("{}: {why}", file.name);
        pace.take_back(file.size);
        files::remove_file(part)?;
        wrong = Some(why);
    }
    Err(Error::input(wrong.unwrap_or_default()))
}

/// Where a file is not what it should be, in words.
fn mismatch(check: &Check, found: &Hash) -> Option<String> {
    let (name, wanted, found) = match (check, found) {
        (Check::Sha256(wanted), Hash::Sha256(found)) => ("SHA-256", wanted, found.hex()),
        (Check::Git(wanted), Hash::Git(found)) => ("Git name", wanted, found.hex()),
        _ => return None,
    };
    (!found.eq_ignore_ascii_case(wanted))
        .then(|| format!("what came has the {name} {found}, and should have {wanted}: it was changed on its way, or is not what was named"))
}

/// A hash that grows with the bytes.
#[derive(Clone)]
enum Hash {
    Sha256(Hasher<Sha256>),
    Git(Hasher<Sha1>),
    None,
}

#[derive(Clone)]
struct Hasher<D>(D);

impl<D: Digest + Clone> Hasher<D> {
    fn hex(&self) -> String {
        hex(&self.0.clone().finalize())
    }
}

impl Hash {
    fn new(file: &File) -> Self {
        match file.check {
            Check::Sha256(_) => Hash::Sha256(Hasher(Sha256::new())),
            Check::Git(_) => Hash::Git(Hasher(Sha1::new_with_prefix(format!("blob {}\0", file.size)))),
            Check::Tag(_) => Hash::None,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Hash::Sha256(hasher) => hasher.0.update(bytes),
            Hash::Git(hasher) => hasher.0.update(bytes),
            Hash::None => {}
        }
    }
}

/// Goes on with a file until all of it is there, and gives its hash.
fn fill(
    origin: &dyn Origin,
    file: &File,
    part: &Path,
    turn: &Turn,
    pace: &mut Pace<'_>,
    patience: Patience,
) -> Result<Hash> {
    let storage = |e: std::io::Error| Error::storage(part, e);
    let mut options = OpenOptions::new();
    let mut out = options.read(true).write(true).create(true).truncate(false).open(part).map_err(storage)?;
    if out.metadata().map_err(storage)?.len() > file.size {
        out.set_len(0).map_err(storage)?;
    }
    let mut hash = Hash::new(file);
    let mut buffer = vec![0; CHUNK];
    let mut have = 0;
    loop {
        let n = out.read(&mut buffer).map_err(storage)?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        have += n as u64;
        pace.found(n as u64);
    }
    let mut failed = 0;
    while have < file.size {
        let before = have;
        let mut copy = || -> std::result::Result<(), Fault> {
            let mut opened = origin.open(file, have)?;
            if opened.from != have {
                if opened.from != 0 {
                    return Err(Fault::passing(format!("byte {have} was asked for, and {} came", opened.from)));
                }
                // It knows only whole files.
                out.seek(SeekFrom::Start(0)).map_err(storage)?;
                pace.take_back(have);
                (have, hash) = (0, Hash::new(file));
            }
            while have < file.size {
                let most = usize::try_from(file.size - have).unwrap_or(CHUNK).min(CHUNK);
                let n = opened
                    .bytes
                    .read(&mut buffer[..most])
                    .map_err(|e| Fault::passing(format!("it was cut after {have} of {} bytes: {e}", file.size)))?;
                if n == 0 {
                    return Err(Fault::passing(format!("it ended after {have} of {} bytes", file.size)));
                }
                out.write_all(&buffer[..n]).map_err(storage)?;
                hash.update(&buffer[..n]);
                have += n as u64;
                if pace.add(n as u64) {
                    turn.check()?;
                }
            }
            Ok(())
        };
        if let Err(fault) = copy() {
            failed = if have > before { 1 } else { failed + 1 };
            fault.wait(failed, patience, pace.telemetry)?;
            turn.check()?;
        }
    }
    out.sync_all().map_err(storage)?;
    Ok(hash)
}

/// How far it is.
pub(super) struct Pace<'a> {
    what: String,
    telemetry: &'a Telemetry,
    all: u64,
    /// Bytes that are there, and those of them that came since `begun`.
    done: u64,
    came: u64,
    begun: Instant,
    told: Option<Instant>,
    logged: Instant,
}

impl<'a> Pace<'a> {
    pub fn new(what: &str, listing: &Listing, telemetry: &'a Telemetry) -> Self {
        let all = listing.files.iter().map(|file| file.size).sum();
        let now = Instant::now();
        Self { what: what.into(), telemetry, all, done: 0, came: 0, begun: now, told: None, logged: now }
    }

    /// Counts bytes, and says whether it is time to look around.
    fn add(&mut self, bytes: u64) -> bool {
        self.done += bytes;
        self.came += bytes;
        if self.told.is_some_and(|told| told.elapsed() < TELL) {
            return false;
        }
        self.told = Some(Instant::now());
        let seconds = self.begun.elapsed().as_secs_f64();
        let left = self.all.saturating_sub(self.done);
        let eta = (seconds > 1.0 && self.came > 0).then(|| (left as f64 * seconds / self.came as f64) as u64);
        let doing = format!("fetching {}: {} of {}", self.what, Bytes(self.done), Bytes(self.all));
        if self.logged.elapsed() >= LOG {
            self.logged = Instant::now();
            tracing::info!(eta_seconds = eta, "{doing}");
        }
        self.telemetry.fetched(Fetched { doing, bytes: self.done, of: self.all, eta_seconds: eta });
        true
    }

    /// Counts bytes that had come before.
    fn found(&mut self, bytes: u64) {
        self.done += bytes;
        self.telemetry.alive();
    }

    fn take_back(&mut self, bytes: u64) {
        self.done = self.done.saturating_sub(bytes);
    }
}

/// Bytes as people write them.
struct Bytes(u64);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes = self.0 as f64;
        match self.0 {
            0..1_000 => write!(f, "{} bytes", self.0),
            1_000..1_000_000 => write!(f, "{:.1} kB", bytes / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.1} MB", bytes / 1e6),
            _ => write!(f, "{:.2} GB", bytes / 1e9),
        }
    }
}
