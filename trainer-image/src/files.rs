//! Writes that are whole or absent: a sibling is written and flushed, then renamed, and the folder is flushed.

use crate::error::{Error, Result};
use crate::lease::Lease;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Writes one file over what was there.
///
/// # Errors
/// Names the path where storage failed; the file is then as it was, and nothing is left beside it.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = sibling(path, "tmp");
    let run = || {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    run().map_err(|e: std::io::Error| {
        // On a full disk it would take room that others need. The first error is the one to tell.
        let _ = fs::remove_file(&temporary);
        Error::storage(path, e)
    })
}

/// Appends one line to a file, made where it is missing.
///
/// # Errors
/// Names the path where storage failed; no part of the line is then in the file, which the next one would go on with.
pub fn append_line(path: &Path, line: &str) -> Result<()> {
    let run = || {
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        let before = file.metadata()?.len();
        file.write_all(format!("{line}\n").as_bytes()).inspect_err(|_| {
            let _ = file.set_len(before);
        })
    };
    run().map_err(|e: std::io::Error| Error::storage(path, e))
}

/// Makes a folder and its parents.
///
/// # Errors
/// Names the path where storage failed.
pub fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| Error::storage(path, e))
}

/// Removes a folder and what is in it; one that is not there is fine.
///
/// # Errors
/// Names the path where storage failed.
pub fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::storage(path, e)),
        _ => Ok(()),
    }
}

/// Removes a file; one that is not there is fine.
///
/// # Errors
/// Names the path where storage failed.
pub fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::storage(path, e)),
        _ => Ok(()),
    }
}

/// The names of what lies in a folder; of one that is not there, none.
///
/// # Errors
/// Names the path where storage failed.
pub fn names(dir: &Path) -> Result<Vec<String>> {
    let failed = |e| Error::storage(dir, e);
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        entries => entries.map_err(failed)?,
    };
    entries.map(|e| Ok(e.map_err(failed)?.file_name().into_string().unwrap_or_default())).collect()
}

/// Opens a file for reading. A pipe, a device, a socket or a folder is refused by what it is: to open or to read it may take
/// for ever, or is of no use.
///
/// # Errors
/// It cannot be opened, or is no file.
pub fn open(path: &Path) -> std::io::Result<File> {
    let refuse = |metadata: &fs::Metadata| match special(metadata.file_type()) {
        None => Ok(()),
        Some(kind) => Err(std::io::Error::other(format!("it is {kind}, not a file"))),
    };
    refuse(&fs::metadata(path)?)?;
    // What was a file a moment ago may be a pipe now.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    refuse(&file.metadata()?)?;
    Ok(file)
}

/// What a file is that is none.
pub fn special(file_type: fs::FileType) -> Option<&'static str> {
    [
        (file_type.is_dir(), "a folder"),
        (file_type.is_fifo(), "a named pipe"),
        (file_type.is_socket(), "a socket"),
        (file_type.is_char_device() || file_type.is_block_device(), "a device"),
    ]
    .into_iter()
    .find_map(|(is, name)| is.then_some(name))
}

/// Flushes every file in a folder and the folder itself.
///
/// # Errors
/// Names the path where storage failed.
pub fn sync_dir(path: &Path) -> Result<()> {
    let run = || {
        for entry in fs::read_dir(path)? {
            File::open(entry?.path())?.sync_all()?;
        }
        File::open(path)?.sync_all()
    };
    run().map_err(|e: std::io::Error| Error::storage(path, e))
}

/// Moves a finished folder to its place, if the lease still holds, and flushes the parent. What was there is moved aside first
/// and removed last; [`remove_unfinished`] puts it back where this came no further.
///
/// # Errors
/// Names the path where storage failed, or the lease was lost; what was there is then as it was.
pub fn publish_dir(finished: &Path, target: &Path, lease: &Lease) -> Result<()> {
    lease.check()?;
    let old = sibling(target, &format!("lease-{}.{ASIDE}", lease.number()));
    remove_dir(&old)?;
    if target.exists() {
        fs::rename(target, &old).map_err(|e| Error::storage(target, e))?;
    }
    fs::rename(finished, target).map_err(|e| {
        // The first error is the one to tell.
        let _ = fs::rename(&old, target);
        Error::storage(target, e)
    })?;
    remove_dir(&old)?;
    target.parent().map_or(Ok(()), sync_folder)
}

/// Flushes the names in a folder.
fn sync_folder(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::storage(dir, e))
}

/// A folder that is filled beside its place and moved there once it is whole. Until then, what was there is as it was.
///
/// The lease is in its name, so that an attempt that is given up and not gone yet fills another folder.
#[derive(Debug)]
pub struct NewDir {
    temporary: PathBuf,
    target: PathBuf,
    lease: Lease,
}

impl NewDir {
    /// An empty folder that is to become `target` if the lease still holds then. What an earlier one under the same lease left
    /// is removed.
    ///
    /// # Errors
    /// Names the path where storage failed.
    pub fn create(target: &Path, lease: &Lease) -> Result<Self> {
        let temporary = unfinished(target, lease);
        remove_dir(&temporary)?;
        make_dir(&temporary)?;
        Ok(Self { temporary, target: target.to_path_buf(), lease: lease.clone() })
    }

    /// Where it is filled.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Flushes what is in it and moves it to its place. To flush may take minutes, so the lease is asked after it.
    ///
    /// # Errors
    /// Names the path where storage failed, or the lease was lost; what was there is then as it was.
    pub fn publish(self) -> Result<()> {
        sync_dir(&self.temporary)?;
        publish_dir(&self.temporary, &self.target, &self.lease)
    }

    /// The same where its name is known only now, and names what is in it: where another was faster, that stays, for it may be in
    /// use.
    ///
    /// # Errors
    /// As [`NewDir::publish`].
    pub fn publish_as(self, target: &Path) -> Result<()> {
        sync_dir(&self.temporary)?;
        self.lease.check()?;
        match fs::rename(&self.temporary, target) {
            Err(e) if matches!(e.kind(), std::io::ErrorKind::AlreadyExists | std::io::ErrorKind::DirectoryNotEmpty) => {
                Ok(())
            }
            Err(e) => Err(Error::storage(target, e)),
            Ok(()) => target.parent().map_or(Ok(()), sync_folder),
        }
    }
}

/// What was not published is removed; after it was, there is nothing.
impl Drop for NewDir {
    fn drop(&mut self) {
        if let Err(error) = remove_dir(&self.temporary) {
            tracing::warn!("an unfinished folder is left: {error}");
        }
    }
}

/// Fills a new folder beside `target` and moves it there once it is whole.
///
/// # Errors
/// What `fill` fails with, the path where storage failed, or that the lease was lost; `target` is then as it was.
pub fn replace_dir(target: &Path, lease: &Lease, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let dir = NewDir::create(target, lease)?;
    fill(dir.path())?;
    dir.publish()
}

/// Where what is to become `target` is written under a lease.
pub fn unfinished(target: &Path, lease: &Lease) -> PathBuf {
    sibling(target, &format!("lease-{}.{BEING_FILLED}", lease.number()))
}

/// Removes what interrupted writers under this lease and those before it have left in `dir`, which may have filled the disk,
/// and puts back what they had moved aside for what did not come. What a later lease writes is not touched: this process may
/// be one that should be gone.
///
/// # Errors
/// Names the path where storage failed.
pub fn remove_unfinished(dir: &Path, lease: u32) -> Result<()> {
    let names = names(dir)?;
    let ours = |left: &Left<'_>| left.lease <= lease && dir.join(left.name).is_dir();
    let mut all: Vec<Left<'_>> = names.iter().filter_map(|name| Left::of(name)).filter(ours).collect();
    // Of what was moved aside for one target, the last to have its name gets it back.
    all.sort_by_key(|left| std::cmp::Reverse(left.lease));
    for Left { name, target, state, .. } in all {
        let (path, target) = (dir.join(name), dir.join(target));
        if state == ASIDE && !target.exists() {
            fs::rename(&path, target).map_err(|e| Error::storage(&path, e))?;
        } else {
            remove_dir(&path)?;
        }
    }
    Ok(())
}

/// How the name of a folder ends that is being filled, and of one that makes place for it.
const BEING_FILLED: &str = "tmp";
const ASIDE: &str = "old";

/// What the name of a folder says that a writer has left.
struct Left<'n> {
    name: &'n str,
    /// What it was to become, or was.
    target: &'n str,
    lease: u32,
    state: &'n str,
}

impl<'n> Left<'n> {
    fn of(name: &'n str) -> Option<Self> {
        let Some((target, rest)) = name.rsplit_once(".lease-") else {
            // Trainers before this layout moved aside under no lease, so nobody who holds one writes there.
            let target = name.strip_suffix(ASIDE)?.strip_suffix('.').filter(|target| !target.is_empty())?;
            return Some(Self { name, target, lease: 0, state: ASIDE });
        };
        let (lease, state) = rest.split_once('.')?;
        let known = [BEING_FILLED, ASIDE].contains(&state);
        known.then_some(Self { name, target, lease: lease.parse().ok()?, state })
    }
}

/// The path beside `path` with `.suffix` added to its name.
pub fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{suffix}"));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::Holder;
    use rlhf_api::report::ExitCode;

    #[test]
    fn what_is_no_file_is_refused_at_once_by_what_it_is() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            at("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", at("link")).unwrap();
        fs::write(at("file"), "x").unwrap();
        for (path, kind) in [
            (at("pipe"), "a named pipe"),
            (at("socket"), "a socket"),
            (at("link"), "a device"),
            (root.path().to_path_buf(), "a folder"),
        ] {
            assert_eq!(open(&path).unwrap_err().to_string(), format!("it is {kind}, not a file"));
        }
        assert!(open(&at("file")).is_ok());
        assert_eq!(open(&at("none")).unwrap_err().kind(), std::io::ErrorKind::NotFound);
    }

    #[test]
    fn a_folder_is_replaced_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let (target, lease) = (root.path().join("model"), Lease::default());
        replace_dir(&target, &lease, |dir| write(&dir.join("a"), b"1")).unwrap();
        let failed = replace_dir(&target, &lease, |dir| {
            write(&dir.join("b"), b"2")?;
            Err(Error::bug("stopped halfway"))
        });
        assert_eq!(failed.unwrap_err().message, "stopped halfway");
        assert_eq!(names(root.path()).unwrap(), ["model"]);
        assert_eq!(fs::read(target.join("a")).unwrap(), b"1");
        replace_dir(&target, &lease, |dir| write(&dir.join("b"), b"2")).unwrap();
        assert!(!target.join("a").exists() && target.join("b").exists());
    }

    #[test]
    fn who_has_lost_the_lease_moves_nothing_and_removes_only_its_own() {
        let root = tempfile::tempdir().unwrap();
        let (target, leases) = (root.path().join("model"), root.path().join("leases"));
        let take = |attempt| Lease::take(&leases, Holder { job_uid: "u".into(), attempt }, &[]).unwrap();
        let old = NewDir::create(&target, &take(1)).unwrap();
        let lease = take(2);
        let new = NewDir::create(&target, &lease).unwrap();
        write(&old.path().join("a"), b"1").unwrap();
        write(&new.path().join("b"), b"2").unwrap();
        assert_eq!(old.publish().unwrap_err().exit, ExitCode::PeerLost);
        assert!(!target.exists() && new.path().join("b").exists());
        new.publish().unwrap();
        assert!(target.join("b").exists());
    }

    #[test]
    fn what_this_lease_and_earlier_ones_left_unfinished_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let all = ["lease-2", "model", "model.lease-1.tmp", "model.lease-2.tmp", "model.lease-3.tmp", "x.tmp"];
        all.iter().for_each(|name| make_dir(&root.path().join(name)).unwrap());
        remove_unfinished(root.path(), 2).unwrap();
        let mut left = names(root.path()).unwrap();
        left.sort_unstable();
        assert_eq!(left, ["lease-2", "model", "model.lease-3.tmp", "x.tmp"]);
        remove_unfinished(&root.path().join("none"), 2).unwrap();
    }

    /// A writer may end between moving aside what was there and giving its work the name.
    #[test]
    fn what_was_moved_aside_is_put_back_where_nothing_came_for_it() {
        let root = tempfile::tempdir().unwrap();
        let all = ["model.lease-1.old", "model.lease-1.tmp", "step-4", "step-4.lease-2.old", "step-8.lease-3.old"];
        all.iter().for_each(|name| make_dir(&root.path().join(name)).unwrap());
        write(&root.path().join("model.lease-1.old/config.json"), b"1").unwrap();
        remove_unfinished(root.path(), 2).unwrap();
        let mut left = names(root.path()).unwrap();
        left.sort_unstable();
        assert_eq!(left, ["model", "step-4", "step-8.lease-3.old"]);
        assert!(root.path().join("model/config.json").exists());
    }

    /// As earlier trainers did: else it would lie there for ever, or the stage begin anew beside its own checkpoint.
    #[test]
    fn what_was_moved_aside_under_no_lease_is_put_back_or_removed_too() {
        let root = tempfile::tempdir().unwrap();
        let all = ["model", "model.old", "step-4.old", "step-8.lease-1.old", "step-8.old", "x.lease-y.old", ".old"];
        all.iter().for_each(|name| make_dir(&root.path().join(name)).unwrap());
        write(&root.path().join("step-4.old/manifest.json"), b"4").unwrap();
        write(&root.path().join("step-8.lease-1.old/manifest.json"), b"8").unwrap();
        write(&root.path().join("notes.old"), b"no folder").unwrap();
        remove_unfinished(root.path(), 1).unwrap();
        let mut left = names(root.path()).unwrap();
        left.sort_unstable();
        assert_eq!(left, [".old", "model", "notes.old", "step-4", "step-8", "x.lease-y.old"]);
        assert_eq!(fs::read(root.path().join("step-4/manifest.json")).unwrap(), b"4");
        assert_eq!(fs::read(root.path().join("step-8/manifest.json")).unwrap(), b"8", "the last of two");
    }

    #[test]
    fn what_cannot_take_its_place_leaves_what_was_there() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        make_dir(&target).unwrap();
        let error = publish_dir(&root.path().join("none"), &target, &Lease::default()).unwrap_err();
        assert_eq!(error.exit, ExitCode::Storage, "{error}");
        assert_eq!(names(root.path()).unwrap(), ["model"]);
    }
}
