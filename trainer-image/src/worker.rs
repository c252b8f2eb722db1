//! One rank: reads its config and environment, meets its peers, serves its telemetry, runs the stage, and leaves a report.
//!
//! Until data and models are loaded, SIGTERM ends the process at once, as there is nothing to save yet; from then on it
//! asks the stage to stop, with a checkpoint of what is whole ([`crate::shutdown`]).

use crate::engine::Group;
use crate::environment::Environment;
use crate::error::{Error, Result};
use crate::shutdown::Shutdown;
use crate::stages::{self, Context};
use crate::telemetry::{Telemetry, http, logging};
use crate::{config_file, ending};
use c10d::{ProcessGroup, Rendezvous};
use rlhf_api::config::{StageConfig, env};
use rlhf_api::report::{ExitCode, Output, TerminationMessage};
use rlhf_api::stage::Precision;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, ToSocketAddrs, UdpSocket};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tch::Device;

/// The environment variable that names the file for this worker's report. `launch` sets it.
pub const REPORT_FILE: &str = "RLHF_REPORT_FILE";

/// How long ranks wait for each other at the start: pods of one stage may have to wait for nodes and pull images of
/// several gigabytes, and names appear late.
const RENDEZVOUS_DEADLINE: Duration = Duration::from_secs(15 * 60);

/// How long the name of rank 0's host may be missing once the ranks have met, and the time between two looks.
const NAME_DEADLINE: Duration = Duration::from_secs(60);
const NAME_RETRY: Duration = Duration::from_millis(500);

/// What a worker is told by flags.
#[derive(Clone, Debug)]
pub struct Options {
    /// The config file.
    pub config: PathBuf,
    /// The port of local rank 0's HTTP server; local rank `r` takes this plus `r`. 0: no server.
    pub http_port: u16,
}

/// Runs this rank to its end. What happened is in the message, and in the file that [`REPORT_FILE`] names.
pub fn run(options: &Options) -> TerminationMessage {
    let (mut rank, telemetry) = (None, OnceLock::new());
    let result = ending::guard(|| {
        let environment = Environment::from_process()?;
        rank = Some(environment.rank());
        train(options, environment, &telemetry)
    });
    let message = ending::message(result, rank, telemetry.get().map(Telemetry::progress));
    report(&message);
    message
}

fn train(options: &Options, environment: Environment, shown: &OnceLock<Telemetry>) -> Result<Output> {
    let mut config = config_file::read::<StageConfig>(&options.config)?;
    if let Some(strategy) = environment.strategy {
        config = config.with(strategy, |config, strategy| config.strategy = Some(strategy))?;
    }
    if config.value.collective_timeout_seconds == 0 {
        return Err(Error::config(format!(
            "{}: collectiveTimeoutSeconds is 0, so every collective would fail: write at least 1",
            options.config.display()
        )));
    }
    let (rank, world_size) = (environment.rank(), environment.world_size());
    let _span = logging::worker_span(rank, &config.value.stage).entered();
    c10d::init(true);
    tch::set_num_threads(threads(std::env::var("OMP_NUM_THREADS").ok().as_deref(), environment.workers_per_node)?);
    let telemetry = Telemetry::new(&config.value.job, &config.value.stage, environment.attempt, rank, world_size)?;
    let telemetry = shown.get_or_init(|| telemetry).clone();
    end_with_a_word(rank, &telemetry);
    let device = device(environment.local_rank, environment.devices)?;
    if let Device::Cuda(index) = device {
        telemetry.watch_device(index);
    }
    let precision = config.value.strategy.map(|s| s.precision).unwrap_or_default();
    if device == Device::Cpu && !cpu_multiplies(precision) {
        tracing::warn!(
            ?precision,
            "this CPU has no instructions for this precision and takes a hundred times longer than for fp32: use precision: fp32"
        );
    }
    serve(options.http_port, environment.local_rank, &telemetry)?;
    let told = telemetry.clone();
    let waiting = move |word: &str| {
        tracing::warn!("waiting: {word}");
        told.doing(format!("waiting for the other ranks: {word}"));
    };
    let peers = meet(&environment, &config.value, &config.digest, device, &waiting)?;
    let group = Rc::new(Group::new(peers, rank, world_size, device)?);
    telemetry.doing("loading data and models");
    tracing::info!(
        attempt = environment.attempt,
        world_size,
        ?device,
        threads = tch::get_num_threads(),
        "training starts"
    );
    stages::run(Context::new(config.value, environment, group, telemetry, Shutdown::default(), device))
}

/// The device of a worker: the GPU of its local rank, or the CPU where there is none and none of the pod's `devices` is missed.
pub(crate) fn device(local_rank: u32, devices: u32) -> Result<Device> {
    c10d::require_devices(devices).map_err(|why| {
        Error::config(format!(
            "the pod was given {devices} devices and cannot use them: {why}; use the trainer's image for CUDA and a node whose driver suits it, or train on CPU (compute.devicesPerNode: 0)"
        ))
    })?;
    Ok(if c10d::has_cuda() { Device::Cuda(local_rank as usize) } else { Device::Cpu })
}

/// A thread of libtorch's own that fails ends the process: with a report, and not by SIGABRT without one. (NCCL's watchdog does
/// so where a peer is lost.)
fn end_with_a_word(rank: u32, telemetry: &Telemetry) {
    let (telemetry, span) = (telemetry.clone(), tracing::Span::current());
    c10d::on_terminate(move |error| {
        let _in = span.enter();
        let message = ending::message(Err(error.into()), Some(rank), Some(telemetry.progress()));
        tracing::error!(reason = message.reason, "a thread of libtorch failed: {}", message.message);
        report(&message);
        message.code
    });
}

/// Leaves the message where `launch` looks for it.
fn report(message: &TerminationMessage) {
    let file = std::env::var_os(REPORT_FILE).map(PathBuf::from);
    if let Some(Err(error)) = file.map(|path| ending::write_termination_file(Some(&path), message)) {
        tracing::error!("the report is lost: {error}");
    }
}

/// Whether libtorch has oneDNN multiply matrices of this precision on this CPU. Elsewhere it does so by plain loops.
pub fn cpu_multiplies(precision: Precision) -> bool {
    #[cfg(target_arch = "x86_64")]
    return match precision {
        Precision::Fp32 => true,
        Precision::Bf16 => is_x86_feature_detected!("avx512bw"),
        Precision::Fp16 => is_x86_feature_detected!("avx512fp16"),
    };
    #[cfg(not(target_arch = "x86_64"))]
    {
        _ = precision;
        true
    }
}

/// Threads for one worker: what `OMP_NUM_THREADS` says, or its share of the cores. More threads than cores are a hundred
/// times slower in small steps, as OpenMP's threads spin.
fn threads(wanted: Option<&str>, workers: u32) -> Result<i32> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let share = i32::try_from(cores / workers.max(1) as usize).unwrap_or(i32::MAX).max(1);
    match wanted.filter(|text| !text.is_empty()) {
        None => Ok(share),
        Some(text) => text.trim().parse().ok().filter(|n| *n > 0).ok_or_else(|| {
            Error::config(format!("environment variable OMP_NUM_THREADS: '{text}' is not a number of threads"))
        }),
    }
}

/// Serves what a process with this local rank tells, where a port is given.
///
/// # Errors
/// As [`http::serve`].
pub fn serve(first_port: u16, local_rank: u32, telemetry: &Telemetry) -> Result<()> {
    if first_port == 0 {
        return Ok(());
    }
    let port = u16::try_from(u32::from(first_port) + local_rank);
    let port = port.map_err(|_| {
        Error::config(format!("--http-port {first_port}: local rank {local_rank} would need a port beyond 65535"))
    })?;
    http::serve(port, telemetry.clone(), std::env::var(env::PROGRESS_KEY).ok().filter(|key| !key.is_empty()))
}

/// Meets the other ranks and makes sure that all have the same config; `None` for a rank alone. `waiting` hears from time to
/// time for whom or what.
pub(crate) fn meet(
    environment: &Environment,
    config: &StageConfig,
    digest: &[u8; 32],
    device: Device,
    waiting: &dyn Fn(&str),
) -> Result<Option<ProcessGroup>> {
    let (rank, world_size) = (environment.rank(), environment.world_size());
    if world_size == 1 {
        return Ok(None);
    }
    let (host, port) = (environment.master_addr.clone(), environment.master_port);
    tracing::info!("waiting for {world_size} ranks at {host}:{port}");
    let store =
        Rendezvous { host, port, rank, world_size, attempt: environment.attempt, deadline: RENDEZVOUS_DEADLINE }
            .connect_telling(waiting)?;
    let timeout = Duration::from_secs(config.collective_timeout_seconds.into());
    let group = match device {
        Device::Cuda(index) => ProcessGroup::nccl(&store, rank, world_size, index, timeout)?,
        _ => {
            let interface = address_towards(&environment.master_addr, port)?;
            ProcessGroup::gloo(&store, rank, world_size, &interface, timeout)?
        }
    };
    group.agree("config", digest)?;
    Ok(Some(group))
}

/// This machine's address on the way to `host`, where the other ranks can reach it too. Nothing is sent. On rank 0's own
/// machine the name may appear later than it did for the others, so it is looked up until it is there.
fn address_towards(host: &str, port: u16) -> Result<String> {
    let end = Instant::now() + NAME_DEADLINE;
    loop {
        match local_address(host, port) {
            Ok(address) => return Ok(address.to_string()),
            Err(_) if Instant::now() < end => std::thread::sleep(NAME_RETRY),
            Err(e) => {
                return Err(Error::new(
                    ExitCode::PeerLost,
                    format!("the name {host} of rank 0's host was not found in {NAME_DEADLINE:?}: {e}"),
                ));
            }
        }
    }
}

fn local_address(host: &str, port: u16) -> std::io::Result<IpAddr> {
    let target = (host, port).to_socket_addrs()?.next().ok_or(std::io::ErrorKind::NotFound)?;
    let any: IpAddr = if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(target)?;
    Ok(socket.local_addr()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_shared_among_workers_unless_told_otherwise() {
        let cores = std::thread::available_parallelism().unwrap().get();
        assert_eq!(threads(None, 1).unwrap() as usize, cores);
        assert_eq!(threads(Some(""), 1000).unwrap(), 1);
        assert_eq!(threads(Some("3"), 8).unwrap(), 3);
        for bad in ["0", "-1", "two"] {
            assert!(threads(Some(bad), 1).unwrap_err().message.contains(&format!("OMP_NUM_THREADS: '{bad}'")));
        }
    }

    #[test]
    fn the_interface_is_the_one_that_leads_to_rank_0() {
        assert_eq!(address_towards("127.0.0.1", 29500).unwrap(), "127.0.0.1");
        assert!(local_address("localhost", 29500).unwrap().is_loopback());
        assert!(local_address("no-such-host.invalid", 29500).is_err());
    }
}
