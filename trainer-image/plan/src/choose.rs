//! Which strategies fit, and which of them is the fastest.
//!
//! The order of preference, fastest first:
//! 1. Nothing is offloaded; then the optimizer (its step runs on the CPU); then parameters too (each use of a chunk copies it
//!    to the device).
//! 2. Within that, what shards without more to send (`ddp`, `zero1`), then what reduces gradients with each micro-batch
//!    (`zero2`); the same with every block run again in backward, a third more to compute; and last `zero3`, which gathers all
//!    parameters in each pass (in a rollout: for each token), without and with running blocks again.
//!
//! A rank alone has nothing to shard. The number format is not chosen here: it changes what is computed.

use crate::estimate::{Machines, Plan, Task, estimate};
use rlhf_api::stage::{Offload, Precision, Recompute, Sharding, Strategy};
use std::fmt::{self, Display, Formatter};

/// The share of a device's memory that plans leave to the driver, to libraries and to gaps between blocks.
pub const DEVICE_MARGIN: f64 = 0.08;

/// The share of host memory that plans leave to files' pages and to gaps between blocks.
pub const HOST_MARGIN: f64 = 0.05;

/// Host memory of a rank's process beside its tensors.
pub const PROCESS_BYTES: f64 = (512 << 20) as f64;

/// Less than this share of the bytes before counts as more frugal.
const LESS: f64 = 0.97;

/// What a user has fixed of a strategy; the rest is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fixed {
    /// The number format.
    pub precision: Precision,
    /// The sharding, where it is fixed.
    pub sharding: Option<Sharding>,
    /// The offloading, where it is fixed.
    pub offload: Option<Offload>,
    /// The recomputation, where it is fixed.
    pub recompute: Option<Recompute>,
}

impl Fixed {
    fn allows(&self, strategy: &Strategy) -> bool {
        self.precision == strategy.precision
            && self.sharding.is_none_or(|s| s == strategy.sharding)
            && self.offload.is_none_or(|o| o == strategy.offload)
            && self.recompute.is_none_or(|r| r == strategy.recompute)
    }
}

/// A plan against the memory there is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// The plan.
    pub plan: Plan,
    /// Bytes that each device lacks; 0 where it has enough, and where the CPU is the device.
    pub device_lacks: f64,
    /// Bytes that each host lacks; 0 where it has enough.
    pub host_lacks: f64,
    /// Whether a host has room for copies of what a checkpoint holds, so that it is written while training goes on.
    pub copies_fit: bool,
    /// The need in the scarcer memory as a share of what may be used of it.
    load: f64,
}

impl Verdict {
    /// Holds a plan against the memory of machines.
    pub fn new(plan: Plan, machines: &Machines) -> Self {
        let ranks = f64::from(machines.devices);
        let host_room = machines.host_memory as f64 * (1.0 - HOST_MARGIN);
        let mut host = plan.host.total() + ranks * PROCESS_BYTES;
        let mut device_lacks = 0.0;
        let mut load = 0.0;
        match machines.device_memory {
            Some(memory) => {
                let room = memory as f64 * (1.0 - DEVICE_MARGIN);
                device_lacks = (plan.device.total() - room).max(0.0);
                load = plan.device.total() / room.max(1.0);
            }
            None => host += ranks * plan.device.total(),
        }
        Self {
            plan,
            device_lacks,
            host_lacks: (host - host_room).max(0.0),
            copies_fit: host + plan.checkpoint_copies <= host_room,
            load: f64::max(load, host / host_room.max(1.0)),
        }
    }

    /// Whether there is room for it.
    pub fn fits(&self) -> bool {
        self.device_lacks == 0.0 && self.host_lacks == 0.0
    }
}

/// All strategies that what is fixed leaves, fastest first.
pub fn strategies(fixed: Fixed, world_size: u32) -> Vec<Strategy> {
    use Sharding::{Ddp, Zero1, Zero2, Zero3};
    let (none, block) = (Recompute::None, Recompute::Block);
    let alone = [(Ddp, none), (Ddp, block)];
    let many = [
        (Ddp, none),
        (Zero1, none),
        (Zero2, none),
        (Ddp, block),
        (Zero1, block),
        (Zero2, block),
        (Zero3, none),
        (Zero3, block),
    ];
    // Sharding among one rank is no choice, but may be fixed.
    let order = if world_size > 1 || fixed.sharding.is_some() { many.as_slice() } else { alone.as_slice() };
    [Offload::None, Offload::Optimizer, Offload::Parameters]
        .into_iter()
        .flat_map(|offload| {
            order.iter().map(move |&(sharding, recompute)| Strategy {
                sharding,
                offload,
                recompute,
                precision: fixed.precision,
            })
        })
        .filter(|strategy| fixed.allows(strategy))
        .collect()
}

/// Every strategy that what is fixed leaves, fastest first, and whether there is room for it.
pub fn verdicts(task: &Task, machines: &Machines, fixed: Fixed) -> Vec<Verdict> {
    strategies(fixed, machines.world_size())
        .into_iter()
        .map(|strategy| Verdict::new(estimate(task, machines, strategy), machines))
        .collect()
}

/// The fastest strategy that there is room for.
///
/// # Errors
/// None fits. The error says by how much the closest one fails, and what to change.
pub fn choose(task: &Task, machines: &Machines, fixed: Fixed) -> Result<Verdict, DoesNotFit> {
    fastest(&verdicts(task, machines, fixed), machines)
}

/// The first of some verdicts that fits.
///
/// # Errors
/// As [`choose`].
pub fn fastest(verdicts: &[Verdict], machines: &Machines) -> Result<Verdict, DoesNotFit> {
    let closest = || verdicts.iter().min_by(|a, b| a.load.total_cmp(&b.load)).map(|v| Box::new(*v));
    let found = verdicts.iter().find(|v| v.fits()).copied();
    found.ok_or_else(|| DoesNotFit { closest: closest(), tried: verdicts.len(), machines: *machines })
}

/// The strategy to try after `strategy` ran out of device memory although there seemed to be room: the next one in the order
/// of preference, of those that what is fixed leaves, that needs less on the device and that the host has room for.
pub fn next_more_frugal(task: &Task, machines: &Machines, strategy: Strategy, fixed: Fixed) -> Option<Verdict> {
    let need = |plan: &Plan| match machines.device_memory {
        Some(_) => plan.device.total(),
        None => f64::from(machines.devices) * plan.device.total() + plan.host.total(),
    };
    let before = need(&estimate(task, machines, strategy));
    let all = verdicts(task, machines, fixed);
    let start = all.iter().position(|v| v.plan.strategy == strategy).map_or(0, |i| i + 1);
    all.into_iter().skip(start).find(|v| v.host_lacks == 0.0 && need(&v.plan) < LESS * before)
}

/// No strategy has room.
#[derive(Clone, Debug, PartialEq)]
pub struct DoesNotFit {
    /// The one that comes closest; `None` where what is fixed leaves none.
    pub closest: Option<Box<Verdict>>,
    /// How many were tried.
    pub tried: usize,
    machines: Machines,
}

impl std::error::Error for DoesNotFit {}

impl Display for DoesNotFit {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Some(verdict) = &self.closest else { return write!(f, "no strategy is left to choose from") };
        let Verdict { plan, device_lacks, host_lacks, .. } = verdict.as_ref();
        write!(f, "none of {} strategies fits; the closest, {},", self.tried, Named(&plan.strategy))?;
        let (device, host) = (plan.device.total(), plan.host.total());
        match self.machines.device_memory {
            Some(memory) => {
                let memory = memory as f64;
                write!(f, " needs {} of {} on each device (in {})", gib(device), gib(memory), plan.phase)?;
                if *device_lacks > 0.0 {
                    write!(f, ", {} too much", gib(*device_lacks))?;
                }
                write!(f, " and {} of {}", gib(host), gib(self.machines.host_memory as f64))?;
            }
            None => {
                let all = host + f64::from(self.machines.devices) * device;
                write!(f, " needs {} of {}", gib(all), gib(self.machines.host_memory as f64))?;
            }
        }
        write!(f, " on each host")?;
        if *host_lacks > 0.0 {
            write!(f, ", {} too much", gib(*host_lacks))?;
        }
        write!(f, " (margins included): {}", self.advice(verdict))
    }
}

impl DoesNotFit {
    /// What would help the closest strategy most.
    fn advice(&self, verdict: &Verdict) -> &'static str {
        let device = &verdict.plan.device;
        let state = device.parameters + device.fetched + device.optimizer + device.gradients;
        let running = device.activations + device.logits;
        let on_device = verdict.device_lacks > 0.0 || self.machines.device_memory.is_none();
        if on_device && device.cache > state.max(running) {
            "answer fewer prompts in a rollout, or with fewer tokens; or use more devices"
        } else if on_device && running > state {
            "lower the micro-batch or the length of samples; or use devices with more memory"
        } else if on_device && verdict.host_lacks == 0.0 {
            "use more devices, devices with more memory, or a smaller model"
        } else {
            "give hosts more memory, use more hosts, or a smaller model"
        }
    }
}

/// A strategy in words.
pub struct Named<'a>(pub &'a Strategy);

impl Display for Named<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let sharding = match self.0.sharding {
            Sharding::Ddp => "ddp",
            Sharding::Zero1 => "zero1",
            Sharding::Zero2 => "zero2",
            Sharding::Zero3 => "zero3",
        };
        let offload = match self.0.offload {
            Offload::None => "none",
            Offload::Optimizer => "optimizer",
            Offload::Parameters => "parameters",
        };
        let recompute = match self.0.recompute {
            Recompute::None => "none",
            Recompute::Block => "block",
        };
        write!(f, "{sharding}, offload {offload}, recompute {recompute}")
    }
}

/// Bytes in words.
fn gib(bytes: f64) -> String {
    format!("{:.2} GiB", bytes / f64::from(1 << 30))
}
