//! Runs the body of a test as several ranks, each a process of its own: the test binary starts itself once a rank, with
//! the rank in the environment, and the body runs there.
#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::env;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use c10d::{ProcessGroup, Rendezvous};

/// No rank of any test takes longer, even on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);
const HOST: &str = "127.0.0.1";

/// What a rank's process knows.
pub struct Rank {
    pub rank: u32,
    pub world_size: u32,
    port: u16,
    dir: PathBuf,
}

impl Rank {
    fn from_env() -> Option<Rank> {
        let number = |name: &str| env::var(name).ok().map(|text| text.parse::<u32>().unwrap());
        Some(Rank {
            rank: number("C10D_TEST_RANK")?,
            world_size: number("C10D_TEST_WORLD_SIZE")?,
            port: number("C10D_TEST_PORT")?.try_into().unwrap(),
            dir: env::var_os("C10D_TEST_DIR")?.into(),
        })
    }

    pub fn rendezvous(&self) -> Rendezvous {
        Rendezvous {
            host: HOST.into(),
            port: self.port,
            rank: self.rank,
            world_size: self.world_size,
            attempt: 1,
            deadline: PATIENCE,
        }
    }

    pub fn group(&self, timeout: Duration) -> ProcessGroup {
        c10d::init(true);
        tch::set_num_threads(1);
        let store = self.rendezvous().connect().unwrap();
        ProcessGroup::gloo(&store, self.rank, self.world_size, HOST, timeout).unwrap()
    }

    /// Shows `name` to the other processes of the test.
    pub fn signal(&self, name: &str) {
        File::create(self.dir.join(name)).unwrap();
    }

    pub fn await_signal(&self, name: &str) {
        wait_until(name, || self.dir.join(name).exists());
    }
}

/// The process that starts the ranks.
pub struct Parent {
    test: String,
    world_size: u32,
    port: u16,
    dir: tempfile::TempDir,
    children: Vec<Option<Child>>,
}

impl Parent {
    pub fn start(&mut self, rank: u32) {
        let log = File::create(self.log(rank)).unwrap();
        let child = Command::new(env::current_exe().unwrap())
            .args([self.test.as_str(), "--exact", "--nocapture", "--test-threads=1"])
            .env("C10D_TEST_RANK", rank.to_string())
            .env("C10D_TEST_WORLD_SIZE", self.world_size.to_string())
            .env("C10D_TEST_PORT", self.port.to_string())
            .env("C10D_TEST_DIR", self.dir.path())
            .env("OMP_NUM_THREADS", "1")
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.children[rank as usize] = Some(child);
    }

    pub fn await_signal(&self, name: &str) {
        wait_until(name, || self.dir.path().join(name).exists());
    }

    pub fn signal(&self, name: &str) {
        File::create(self.dir.path().join(name)).unwrap();
    }

    /// SIGKILL.
    pub fn kill(&mut self, rank: u32) {
        self.children[rank as usize].as_mut().unwrap().kill().unwrap();
    }

    /// The rank's end, and what it printed.
    pub fn finish(&mut self, rank: u32) -> (ExitStatus, String) {
        let child = self.children[rank as usize].as_mut().unwrap();
        let mut status = None;
        wait_until(&format!("rank {rank} to end"), || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        (status.unwrap(), fs::read_to_string(self.log(rank)).unwrap())
    }

    pub fn expect_success(&mut self, rank: u32) {
        let (status, log) = self.finish(rank);
        assert!(status.success(), "rank {rank} of {}: {status}\n{log}", self.world_size);
    }

    fn log(&self, rank: u32) -> PathBuf {
        self.dir.path().join(format!("rank-{rank}.log"))
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        for child in self.children.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs `body` as `world_size` ranks, all of which must succeed. `test` is the name of the test function.
pub fn run(test: &str, world_size: u32, body: impl FnOnce(Rank)) {
    run_with(test, world_size, body, |parent| {
        (0..world_size).for_each(|rank| parent.start(rank));
        (0..world_size).for_each(|rank| parent.expect_success(rank));
    });
}

/// As [`run`], with `parent` to start, disturb and judge the ranks.
pub fn run_with(test: &str, world_size: u32, body: impl FnOnce(Rank), parent: impl FnOnce(&mut Parent)) {
    if let Some(rank) = Rank::from_env() {
        return body(rank);
    }
    let children = (0..world_size).map(|_| None).collect();
    let dir = tempfile::tempdir().unwrap();
    parent(&mut Parent { test: test.into(), world_size, port: free_port(), dir, children });
}

/// A port that nobody has, outside the range from which the system takes ports for clients.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = std::process::id() % 10_000;
    loop {
        let port = 20_000 + (start as u16 + NEXT.fetch_add(1, Ordering::Relaxed)) % 10_000;
        if TcpListener::bind(("0.0.0.0", port)).is_ok() {
            return port;
        }
    }
}

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        sleep(Duration::from_millis(10));
    }
}
