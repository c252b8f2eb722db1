//! The right of one attempt to write what a stage leaves on the volume.
//!
//! An attempt that was given up, because its node is cut off, may still run. So each attempt takes a lease when it starts: the
//! next number, as a file that can be made only once. The highest number holds; numbers only grow, so who comes back late
//! never holds again. Rank 0 checks that it still holds before it gives anything its final name, and else ends the attempt
//! without touching anything.

use crate::error::{Error, Result};
use crate::files;
use rlhf_api::report::ExitCode;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the names of leases begin with; their numbers follow.
const PREFIX: &str = "lease-";
/// How often a lease that is just being written is read again, and after what time.
const READS: u32 = 20;
const READ_AGAIN: Duration = Duration::from_millis(100);

/// Who took a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Holder {
    /// The UID of the job. A job that is made anew may go on with a run of another.
    pub job_uid: String,
    /// The attempt's number in that job.
    pub attempt: u32,
}

/// A lease that was taken. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Lease {
    /// The folder where leases lie, and who holds this one; `None` where nothing is shared.
    held: Option<(PathBuf, Holder)>,
    number: u32,
}

impl Lease {
    /// Takes the lease of the folder `dir`. Where the disk is full, what earlier attempts left unfinished in the folders
    /// `unfinished` goes first: else what they left would keep each later attempt from coming to remove it.
    ///
    /// # Errors
    /// A later attempt of the same job holds it ([`ExitCode::PeerLost`]), or storage failed: who held it before holds it still.
    pub fn take(dir: &Path, holder: Holder, unfinished: &[&Path]) -> Result<Self> {
        files::make_dir(dir)?;
        let mut has_made_room = false;
        loop {
            let newest = newest(dir)?;
            if let Some(other) = newest.map(|number| read(dir, number)).transpose()?.flatten()
                && other.job_uid == holder.job_uid
                && other.attempt > holder.attempt
            {
                return Err(lost(dir, &holder, Some(other)));
            }
            let number = newest.unwrap_or_default() + 1;
            match make(&path(dir, number), &holder) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(e) if is_full(&e) && !has_made_room => {
                    has_made_room = true;
                    unfinished.iter().try_for_each(|dir| files::remove_unfinished(dir, newest.unwrap_or_default()))?;
                    continue;
                }
                Err(e) => return Err(Error::storage(&path(dir, number), e)),
            }
            let lease = Self { held: Some((dir.to_path_buf(), holder.clone())), number };
            // Where somebody took the next one meanwhile, and removed the one with this number before it was made again.
            match self::newest(dir)? == Some(number) {
                true => return lease.remove_older().map(|()| lease),
                false => files::remove_file(&path(dir, number))?,
            }
        }
    }

    /// The lease with this number in the folder `dir`, which rank 0 has taken for all ranks of the attempt.
    pub fn of_first(dir: &Path, holder: Holder, number: u32) -> Self {
        Self { held: Some((dir.to_path_buf(), holder)), number }
    }

    /// The number of the lease of a folder that was taken last, and who took it, where that is known; `None` where none was.
    ///
    /// # Errors
    /// Storage failed.
    pub fn holder(dir: &Path) -> Result<Option<(u32, Option<Holder>)>> {
        if !dir.is_dir() {
            return Ok(None);
        }
        newest(dir)?.map(|number| Ok((number, read(dir, number)?))).transpose()
    }

    /// Its number: later leases of the same folder have higher ones.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Makes sure that it still holds.
    ///
    /// # Errors
    /// A later one was taken ([`ExitCode::PeerLost`]), or storage failed.
    pub fn check(&self) -> Result<()> {
        let Some((dir, holder)) = &self.held else { return Ok(()) };
        let own = path(dir, self.number);
        // To open a file is to ask the server of a network volume, while a listing may be old; so who takes a lease removes
        // the ones before.
        let there = match File::open(&own) {
            Ok(_) => true,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::StaleNetworkFileHandle) => false,
            Err(e) => return Err(Error::storage(&own, e)),
        };
        let newest = newest(dir)?;
        if there && newest == Some(self.number) {
            return Ok(());
        }
        let other = newest.filter(|number| *number > self.number).map(|number| read(dir, number)).transpose()?;
        Err(lost(dir, holder, other.flatten()))
    }

    /// Why an attempt that failed with this error has failed: who takes over removes what the one before was writing, which then
    /// sees storage fail.
    pub fn cause_of(&self, error: Error) -> Error {
        match self.check() {
            Err(lost) if error.exit == ExitCode::Storage && lost.exit == ExitCode::PeerLost => lost,
            _ => error,
        }
    }

    fn remove_older(&self) -> Result<()> {
        let Some((dir, _)) = &self.held else { return Ok(()) };
        for number in numbers(dir)?.into_iter().filter(|number| *number < self.number) {
            files::remove_file(&path(dir, number))?;
        }
        Ok(())
    }
}

fn path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{PREFIX}{number}"))
}

fn numbers(dir: &Path) -> Result<Vec<u32>> {
    let names = files::names(dir)?;
    Ok(names.iter().filter_map(|name| name.strip_prefix(PREFIX)?.parse().ok()).collect())
}

fn newest(dir: &Path) -> Result<Option<u32>> {
    Ok(numbers(dir)?.into_iter().max())
}

/// Makes a lease, if nobody has made this one. One that cannot be written is not there.
fn make(path: &Path, holder: &Holder) -> std::io::Result<bool> {
    let text = serde_json::to_vec(holder)?;
    let write = |mut file: File| file.write_all(&text).and_then(|()| file.sync_all());
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(file) => write(file).map(|()| true).inspect_err(|_| {
            // The first error is the one to tell. It is gone for who looks: an empty lease would hold in nobody's name.
            let _ = std::fs::remove_file(path);
        }),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(e),
    }
}

fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// Who holds a lease; `None` where it is gone, or whoever made it got no further.
fn read(dir: &Path, number: u32) -> Result<Option<Holder>> {
    let path = path(dir, number);
    for _ in 0..READS {
        match std::fs::read(&path) {
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(holder) => return Ok(Some(holder)),
                Err(_) => std::thread::sleep(READ_AGAIN),
            },
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::storage(&path, e)),
        }
    }
    Ok(None)
}

fn lost(dir: &Path, holder: &Holder, other: Option<Holder>) -> Error {
    let other = match other {
        Some(other) if other.job_uid == holder.job_uid => format!("attempt {}", other.attempt),
        Some(other) => format!("the job with UID {}", other.job_uid),
        None => "another attempt".into(),
    };
    Error::new(
        ExitCode::PeerLost,
        format!("{other} has taken over {}: attempt {} writes nothing any more", dir.display(), holder.attempt),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(job_uid: &str, attempt: u32) -> Holder {
        Holder { job_uid: job_uid.into(), attempt }
    }

    fn take(dir: &Path, job_uid: &str, attempt: u32) -> Result<Lease> {
        Lease::take(dir, holder(job_uid, attempt), &[])
    }

    fn lost_to(error: &Error, other: &str) {
        assert_eq!(error.exit, ExitCode::PeerLost, "{error}");
        assert!(error.message.starts_with(&format!("{other} has taken over")), "{error}");
    }

    #[test]
    fn the_last_to_take_it_holds_and_the_others_never_again() {
        let dir = tempfile::tempdir().unwrap();
        let first = take(dir.path(), "u", 1).unwrap();
        first.check().unwrap();
        let second = take(dir.path(), "u", 2).unwrap();
        second.check().unwrap();
        lost_to(&first.check().unwrap_err(), "attempt 2");
        lost_to(&take(dir.path(), "u", 1).unwrap_err(), "attempt 2");
        second.check().unwrap();
        assert_eq!((first.number(), second.number()), (1, 2));
        assert_eq!(files::names(dir.path()).unwrap(), ["lease-2"]);
        // The same attempt, started again.
        let again = take(dir.path(), "u", 2).unwrap();
        again.check().unwrap();
        lost_to(&second.check().unwrap_err(), "attempt 2");
    }

    #[test]
    fn a_job_made_anew_takes_it_whatever_its_attempt() {
        let dir = tempfile::tempdir().unwrap();
        let old = take(dir.path(), "u", 7).unwrap();
        let new = take(dir.path(), "v", 1).unwrap();
        new.check().unwrap();
        lost_to(&old.check().unwrap_err(), "the job with UID v");
        assert!(new.number() > old.number());
    }

    /// A file server may show an old listing: the lease itself is gone.
    #[test]
    fn a_lease_that_was_removed_does_not_hold() {
        let dir = tempfile::tempdir().unwrap();
        let lease = take(dir.path(), "u", 1).unwrap();
        std::fs::remove_file(dir.path().join("lease-1")).unwrap();
        lost_to(&lease.check().unwrap_err(), "another attempt");
    }

    #[test]
    fn one_whose_taker_died_halfway_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("lease-4"), "{\"jobUid").unwrap();
        let lease = take(dir.path(), "u", 1).unwrap();
        assert_eq!(lease.number(), 5);
        lease.check().unwrap();
    }

    #[test]
    fn of_many_that_take_it_at_once_exactly_one_holds() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let leases: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (1..=16).map(|attempt| scope.spawn(move || take(dir, "u", attempt))).collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap().ok()).collect()
        });
        let holding: Vec<_> = leases.iter().filter(|lease| lease.check().is_ok()).collect();
        assert_eq!(holding.len(), 1);
        assert_eq!(holding[0].held.as_ref().unwrap().1.attempt, 16);
    }

    #[test]
    fn every_rank_of_an_attempt_knows_whether_it_holds() {
        let dir = tempfile::tempdir().unwrap();
        let first = take(dir.path(), "u", 1).unwrap();
        let peers = Lease::of_first(dir.path(), holder("u", 1), first.number());
        peers.check().unwrap();
        let full = || Error::storage(Path::new("f"), "full");
        assert_eq!(peers.cause_of(full()).exit, ExitCode::Storage, "it still holds");
        let _second = take(dir.path(), "u", 2).unwrap();
        for lease in [first, peers] {
            lost_to(&lease.check().unwrap_err(), "attempt 2");
            lost_to(&lease.cause_of(full()), "attempt 2");
            assert_eq!(lease.cause_of(Error::bug("odd")).exit, ExitCode::Bug, "no matter of storage");
        }
    }

    #[test]
    fn where_nothing_is_shared_nobody_has_to_hold_one() {
        assert!(Lease::default().check().is_ok());
        assert_eq!(Lease::default().cause_of(Error::storage(Path::new("f"), "full")).exit, ExitCode::Storage);
    }
}
