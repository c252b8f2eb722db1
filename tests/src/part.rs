//! The processes of the control plane, for tests that disturb them.

use crate::tools::cache;
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A part of the cluster that `tests/cluster/up.sh` started, by its name there.
pub struct Part(&'static str);

impl Part {
    /// The API server.
    pub const API_SERVER: Part = Part("apiserver");
    /// The store behind it.
    pub const ETCD: Part = Part("etcd");

    /// Ends it with SIGKILL, and starts it again as it was.
    ///
    /// # Panics
    /// It does not run.
    #[allow(clippy::zombie_processes)] // The part outlives the test.
    pub fn kill_and_start(&self, meanwhile: impl FnOnce()) {
        let old = self.pid();
        let line = fs::read(format!("/proc/{}/cmdline", old.as_raw_pid())).expect("the part runs");
        let words: Vec<String> = line.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
        self.signal(Signal::KILL);
        while fs::read(format!("/proc/{}/cmdline", old.as_raw_pid())).is_ok_and(|line| !line.is_empty()) {
            std::thread::yield_now();
        }
        meanwhile();
        let state = cache().join("cluster");
        let log = fs::OpenOptions::new().append(true).open(state.join(format!("log/{}.log", self.0)));
        let log = log.expect("the part has a log");
        let program = words.first().expect("a process has a command line");
        // The last word ends with a zero, behind which is nothing.
        let child = Command::new(program)
            .args(&words[1..words.len() - 1])
            .current_dir(&state)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be opened twice"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap_or_else(|e| panic!("{program}: {e}"));
        fs::write(self.pid_file(), format!("{}\n", child.id())).expect("the part's number can be written");
    }

    /// Keeps it from running, until [`Part::go_on`].
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it run again.
    pub fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap_or_else(|e| panic!("{}: {e}", self.0));
    }

    fn pid(&self) -> Pid {
        let text = fs::read_to_string(self.pid_file()).unwrap_or_else(|e| panic!("{} does not run: {e}", self.0));
        text.trim().parse().ok().and_then(Pid::from_raw).unwrap_or_else(|| panic!("{}: '{text}' is no process", self.0))
    }

    fn pid_file(&self) -> PathBuf {
        cache().join(format!("cluster/run/{}.pid", self.0))
    }
}
