//! The processes of the run: those that the bench starts, and what each one uses.

use anyhow::{Context, bail};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use tokio::process::{Child, Command};

/// The unit of times in /proc, which Linux has for every program.
const TICKS_A_SECOND: f64 = 100.0;

/// A program that the bench started. It ends with this value.
pub struct Part {
    name: &'static str,
    child: Child,
}

impl Part {
    /// Starts a program; what it says goes to the cluster's logs.
    pub fn start(name: &'static str, command: &mut Command, logs: &Path) -> anyhow::Result<Self> {
        let log = File::options().create(true).append(true).open(logs.join(format!("{name}.log")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).kill_on_drop(true);
        let child = command.spawn().with_context(|| format!("{name} cannot be started"))?;
        Ok(Self { name, child })
    }

    /// An error if the program has ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!("{} has ended ({status}); see .cache/cluster/log/{}.log", self.name, self.name),
            None => Ok(()),
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    /// Ends it with SIGKILL, and waits for its end.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        Ok(self.child.kill().await?)
    }
}

/// The control plane's processes by name, of which `up.sh` keeps the ids.
pub fn control_plane(state: &Path) -> anyhow::Result<BTreeMap<&'static str, u32>> {
    let id = |name| -> anyhow::Result<(&'static str, u32)> {
        let path = state.join("run").join(format!("{name}.pid"));
        let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        Ok((name, text.trim().parse()?))
    };
    ["apiserver", "controllers", "etcd", "scheduler"].into_iter().map(id).collect()
}

/// CPU time that a process has used, in seconds.
pub fn cpu_seconds(id: u32) -> anyhow::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat"))?;
    // After the program's name, which may have spaces and ends with the last bracket, user and system time are the 12th
    // and 13th.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    let times: Result<Vec<u64>, _> = fields.skip(11).take(2).map(str::parse).collect();
    Ok(times?.into_iter().sum::<u64>() as f64 / TICKS_A_SECOND)
}

/// A figure of `/proc/ID/status` that is in kB, in bytes.
fn status(id: u32, field: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{id}/status"))?;
    let value = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':')?.trim().strip_suffix(" kB"));
    let value = value.with_context(|| format!("/proc/{id}/status has no {field}"))?;
    Ok(value.parse::<u64>()? * 1024)
}

/// The memory that a process holds.
pub fn rss_bytes(id: u32) -> anyhow::Result<u64> {
    status(id, "VmRSS")
}

/// The most that it has held.
pub fn peak_rss_bytes(id: u32) -> anyhow::Result<u64> {
    status(id, "VmHWM")
}

/// The machine's load average over a minute.
pub fn load() -> anyhow::Result<f64> {
    let text = fs::read_to_string("/proc/loadavg")?;
    Ok(text.split(' ').next().unwrap_or_default().parse()?)
}
