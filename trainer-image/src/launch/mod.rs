//! The container's entry: starts one worker for each local rank and turns their ends into one.
//!
//! The launcher looks at what every worker needs before any starts, hands signals on, and waits. When a worker ends badly
//! the others get ten seconds to notice by themselves (a lost peer is an error of the next collective), then SIGTERM, then
//! SIGKILL. The cause of the pod's end is the first worker that failed by its own fault; peers that lost it are
//! consequences. As the container's first process it also reaps processes that lost their parents.
//!
//! It never calls torch: a process that has run a parallel operation cannot start others safely, and the launcher has no
//! use for a device.

mod combine;
mod supervise;

use crate::ending;
use crate::environment::{Environment, LOCAL_RANK};
use crate::error::{Error, Result};
use crate::shutdown::on_signal;
use crate::telemetry::http;
use crate::worker::{Options, REPORT_FILE};
use crate::{config_file, files};
use combine::combine;
use rlhf_api::config::{StageConfig, env};
use rlhf_api::report::TerminationMessage;
use rustix::process::{WaitOptions, wait};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Duration;
use supervise::{Event, Gang, reap, supervise};

/// What workers get to notice a peer's end, and then to follow SIGTERM.
const GRACE: Duration = Duration::from_secs(10);
/// What NCCL needs of shared memory; without it a GPU worker dies of SIGBUS in its first collective.
const MIN_SHM_BYTES: u64 = 64 << 20;

/// Runs the workers to their end and says how it was.
pub fn run(options: &Options) -> TerminationMessage {
    ending::guard(|| launch(options)).unwrap_or_else(|error| ending::message(Err(error), None, None))
}

fn launch(options: &Options) -> Result<TerminationMessage> {
    let (sender, events) = channel();
    let asked = sender.clone();
    on_signal(move || asked.send(Event::Asked).unwrap_or_default())?;
    let environment = Environment::from_process()?;
    preflight(&options.config, &environment)?;
    let reports = ReportDir::new()?;
    let mut gang = Gang::default();
    for local_rank in 0..environment.workers_per_node {
        let rank = environment.node_rank * environment.workers_per_node + local_rank;
        let report = reports.0.join(format!("{rank}.json"));
        gang.start(rank, &mut worker_command(options, local_rank, &report)?, report)?;
    }
    tracing::info!("started {} workers", environment.workers_per_node);
    reap(sender, || wait(WaitOptions::empty()))?;
    let first = environment.node_rank * environment.workers_per_node;
    let told = |rank| {
        if rank == first {
            answer_for_first(options.http_port);
        }
    };
    Ok(combine(&supervise(gang, &events, GRACE, told)?))
}

/// The kubelet asks the first worker whether the pod is well. Where that has ended and others go on, they may take long (to
/// write a checkpoint, to notice that a peer is gone) and are not to be killed for it.
fn answer_for_first(port: u16) {
    if port != 0
        && let Err(error) = http::serve_health(port)
    {
        tracing::warn!("nobody answers for the pod's health any more: {error}");
    }
}

fn worker_command(options: &Options, local_rank: u32, report: &Path) -> Result<Command> {
    let program =
        std::env::current_exe().map_err(|e| Error::bug(format!("the trainer's own path is not known: {e}")))?;
    let mut command = Command::new(program);
    command.arg("worker").arg("--config").arg(&options.config).arg("--http-port").arg(options.http_port.to_string());
    command.env(LOCAL_RANK, local_rank.to_string()).env(REPORT_FILE, report);
    if std::env::var_os("OMP_WAIT_POLICY").is_none() {
        // Spinning threads take the cores that other ranks compute on.
        command.env("OMP_WAIT_POLICY", "passive");
    }
    Ok(command)
}

/// Looks at what every worker needs, so that a mistake is one message and not one a rank.
fn preflight(config: &Path, environment: &Environment) -> Result<()> {
    config_file::read::<StageConfig>(config)?.warn_of_unknown();
    check_volume(&environment.volume)?;
    if environment.workers_per_node > 1 && Path::new("/dev/nvidiactl").exists() {
        let shm = rustix::fs::statvfs("/dev/shm").map_err(|e| Error::config(format!("/dev/shm: {e}; {MOUNT_SHM}")))?;
        check_shm(shm.f_blocks * shm.f_frsize)?;
    }
    Ok(())
}

const MOUNT_SHM: &str =
    "GPU workers of one pod exchange data there: mount an emptyDir with `medium: Memory` at /dev/shm";

fn check_shm(bytes: u64) -> Result<()> {
    if bytes >= MIN_SHM_BYTES {
        return Ok(());
    }
    Err(Error::config(format!("/dev/shm has {} KiB and needs {}; {MOUNT_SHM}", bytes >> 10, MIN_SHM_BYTES >> 10)))
}

fn check_volume(volume: &Path) -> Result<()> {
    let advice = format!("the job's volume must be mounted there ({} names another folder)", env::VOLUME);
    match std::fs::metadata(volume) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(Error::config(format!("{} is not a folder; {advice}", volume.display()))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Err(Error::config(format!("{}: {e}; {advice}", volume.display())))
        }
        Err(e) => Err(Error::storage(volume, e)),
    }
}

/// A folder for the workers' reports, gone when the launcher is.
struct ReportDir(PathBuf);

impl ReportDir {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("rlhf-launch-{}", std::process::id()));
        files::remove_dir(&path)?;
        files::make_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for ReportDir {
    fn drop(&mut self) {
        if let Err(error) = files::remove_dir(&self.0) {
            tracing::warn!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_shared_memory_is_refused_with_what_to_mount() {
        assert!(check_shm(MIN_SHM_BYTES).is_ok());
        let error = check_shm(MIN_SHM_BYTES - 1024).unwrap_err();
        assert!(
            error.exit.code() == 64 && error.message.contains("65535 KiB") && error.message.contains("emptyDir"),
            "{error}"
        );
    }

    #[test]
    fn the_volume_must_be_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        assert!(check_volume(dir.path()).is_ok());
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        for (path, exit, part) in [
            (file.clone(), 64, "is not a folder"),
            (dir.path().join("missing"), 64, "RLHF_VOLUME"),
            (file.join("below"), 74, "Not a directory"),
        ] {
            let error = check_volume(&path).unwrap_err();
            assert!(
                error.exit.code() == exit
                    && error.message.contains(part)
                    && error.message.contains(path.to_str().unwrap()),
                "{error}"
            );
        }
    }

    #[test]
    fn reports_lie_in_a_folder_that_goes_with_the_launcher() {
        let reports = ReportDir::new().unwrap();
        let path = reports.0.clone();
        std::fs::write(path.join("0.json"), "{}").unwrap();
        drop(reports);
        assert!(!path.exists());
    }

    #[test]
    fn a_worker_gets_its_place_and_its_flags() {
        let options = Options { config: "/c.json".into(), http_port: 9400 };
        let command = worker_command(&options, 3, Path::new("/r/3.json")).unwrap();
        let args: Vec<_> = command.get_args().collect();
        assert_eq!(args, ["worker", "--config", "/c.json", "--http-port", "9400"]);
        let set =
            |name: &str| command.get_envs().find(|(n, _)| *n == name).and_then(|(_, v)| v?.to_str().map(String::from));
        assert_eq!((set("LOCAL_RANK"), set("RLHF_REPORT_FILE")), (Some("3".into()), Some("/r/3.json".into())));
        assert_eq!(set("OMP_WAIT_POLICY").is_some(), std::env::var_os("OMP_WAIT_POLICY").is_none());
    }
}
