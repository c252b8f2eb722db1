//! Collectives over a fixed set of ranks: c10d's process groups, Gloo on CPU and NCCL on CUDA.
//!
//! Every collective is called by all ranks of the group, in the same order, with tensors of the same size and kind. It
//! starts at once and ends with [`Work::wait`]; several may be in flight. A lost or late peer is an error on every other
//! rank within the group's timeout, after which the group is dead and must be made anew, under another key prefix.
//!
//! **Gloo aborts the process when ranks pass different sizes** (it throws in a thread of its own). So all ranks first
//! [`ProcessGroup::agree`] on a digest of everything that decides sizes.

use std::cell::Cell;
use std::fmt::Write as _;
use std::ptr::{NonNull, null_mut};
use std::time::Duration;

use libc::c_int;
use tch::{Device, Kind, Tensor};

use crate::error::{c_index, c_string, check};
use crate::ffi::{self, ptr};
use crate::store::millis;
use crate::{Error, Result, Store, cuda};

/// How a reduction combines the ranks' values, element by element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    /// The sum.
    Sum,
    /// The mean; floating-point kinds only.
    Average,
    /// The least value.
    Min,
    /// The greatest value.
    Max,
}

impl ReduceOp {
    /// The value of `c10d::ReduceOp::RedOpType`.
    fn code(self) -> c_int {
        match self {
            ReduceOp::Sum => 0,
            ReduceOp::Average => 1,
            ReduceOp::Min => 3,
            ReduceOp::Max => 4,
        }
    }
}

/// One rank's end of a group. Collectives are numbered in the order of the calls, so one thread makes them.
pub struct ProcessGroup {
    handle: NonNull<ffi::CGroup>,
    rank: u32,
    world_size: u32,
    /// Where tensors of collectives lie.
    device: Device,
    sent: Cell<u64>,
}

// SAFETY: the handle is an owned intrusive pointer with an atomic count, and nothing in it is bound to a thread. (It is
// not `Sync`: the counter that pairs a collective with its peers is not atomic.)
unsafe impl Send for ProcessGroup {}

impl ProcessGroup {
    /// A group on CPU tensors. Connects all pairs of ranks, through `interface_host` on this side: a name or address of
    /// this machine that the other ranks can reach. `timeout` bounds this and every collective. Other groups of the same
    /// store need another prefix.
    pub fn gloo(store: &Store, rank: u32, world_size: u32, interface_host: &str, timeout: Duration) -> Result<Self> {
        let (c_rank, c_size, host) = (c_index(rank)?, c_index(world_size)?, c_string(interface_host)?);
        let mut out = null_mut();
        // SAFETY: the store and the string live through the call, which writes a new handle; the group keeps its own
        // reference of the store.
        let code =
            unsafe { ffi::c10d_group_gloo(store.as_ptr(), c_rank, c_size, host.as_ptr(), millis(timeout), &mut out) };
        check(code).map_err(|e| e.context(&format!("rank {rank} cannot form a Gloo group at {interface_host}")))?;
        Self::from_raw(out, rank, world_size, Device::Cpu)
    }

    /// A group on tensors of CUDA device `device`. [`Error::NotImplemented`] where this build or machine has no CUDA. As
    /// its collectives run on the device's stream, it is c10d's watchdog that notices a lost peer: at `timeout` it ends the
    /// process.
    pub fn nccl(store: &Store, rank: u32, world_size: u32, device: usize, timeout: Duration) -> Result<Self> {
        let out = cuda::nccl(store, c_index(rank)?, c_index(world_size)?, millis(timeout))?;
        Self::from_raw(out, rank, world_size, Device::Cuda(device))
    }

    fn from_raw(raw: *mut ffi::CGroup, rank: u32, world_size: u32, device: Device) -> Result<Self> {
        let handle = NonNull::new(raw).ok_or_else(|| Error::Torch("no process group was made".into()))?;
        Ok(ProcessGroup { handle, rank, world_size, device, sent: Cell::new(0) })
    }

    /// This process's place in the group, from 0.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// The number of ranks.
    pub fn world_size(&self) -> u32 {
        self.world_size
    }

    /// Bytes that this rank has sent in collectives on tensors, as their standard algorithms count them: of a tensor of n
    /// bytes over w ranks, n (w - 1) / w for all-gather, reduce-scatter and all-to-all, twice that for all-reduce.
    pub fn bytes_sent(&self) -> u64 {
        self.sent.get()
    }

    /// Counts a collective over a tensor that is `whole` on every rank, of which each part goes round `times` times.
    fn count(&self, whole: &Tensor, times: u64) {
        let bytes = (whole.numel() * whole.kind().elt_size_in_bytes()) as u64;
        let world = u64::from(self.world_size);
        self.sent.set(self.sent.get() + times * bytes * (world - 1) / world);
    }

    /// Replaces `tensor` by the reduction of all ranks' tensors. The result is the same, bit for bit, on all ranks.
    pub fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work> {
        let tensor = self.flat(tensor, "all_reduce")?;
        self.count(&tensor, 2);
        // SAFETY: group and tensor live through the call; the work keeps the tensor until it ends.
        self.start(|out| unsafe { ffi::c10d_group_all_reduce(self.raw(), ptr(&tensor), op.code(), out) }, [&tensor])
    }

    /// Writes all ranks' `input`s to `output`, in rank order: `input` of n elements, `output` of `world_size * n`.
    pub fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work> {
        self.expect_sizes("all_gather", output.numel(), input.numel() * self.size())?;
        let (output, input) = (self.flat(output, "all_gather")?, self.flat(input, "all_gather")?);
        self.count(&output, 1);
        // SAFETY: group and tensors live through the call; the work keeps the tensors until it ends.
        let start = |out| unsafe { ffi::c10d_group_all_gather(self.raw(), ptr(&output), ptr(&input), out) };
        self.start(start, [&output, &input])
    }

    /// Writes this rank's part of the reduction of all `input`s to `output`: `input` of `world_size * n` elements,
    /// `output` of n.
    pub fn reduce_scatter(&self, output: &Tensor, input: &Tensor, op: ReduceOp) -> Result<Work> {
        self.expect_sizes("reduce_scatter", input.numel(), output.numel() * self.size())?;
        let (output, input) = (self.flat(output, "reduce_scatter")?, self.flat(input, "reduce_scatter")?);
        self.count(&input, 1);
        // SAFETY: group and tensors live through the call; the work keeps the tensors until it ends.
        let start =
            |out| unsafe { ffi::c10d_group_reduce_scatter(self.raw(), ptr(&output), ptr(&input), op.code(), out) };
        self.start(start, [&output, &input])
    }

    /// Sends the r-th of `world_size` equal parts of `input` to rank r, and writes what rank r sent here to the r-th part
    /// of `output`.
    pub fn all_to_all(&self, output: &Tensor, input: &Tensor) -> Result<Work> {
        self.expect_sizes("all_to_all", output.numel(), input.numel() / self.size() * self.size())?;
        let (output, input) = (self.flat(output, "all_to_all")?, self.flat(input, "all_to_all")?);
        self.count(&input, 1);
        // SAFETY: group and tensors live through the call; the work keeps the tensors until it ends.
        let start = |out| unsafe { ffi::c10d_group_all_to_all(self.raw(), ptr(&output), ptr(&input), out) };
        self.start(start, [&output, &input])
    }

    /// Replaces `tensor` by that of rank `root`.
    pub fn broadcast(&self, tensor: &Tensor, root: u32) -> Result<Work> {
        let (tensor, root) = (self.flat(tensor, "broadcast")?, c_index(root)?);
        // SAFETY: group and tensor live through the call; the work keeps the tensor until it ends.
        self.start(|out| unsafe { ffi::c10d_group_broadcast(self.raw(), ptr(&tensor), root, out) }, [&tensor])
    }

    /// Returns when all ranks have called it.
    pub fn barrier(&self) -> Result<()> {
        let device = match self.device {
            Device::Cuda(index) => c_index(index)?,
            _ => -1,
        };
        // SAFETY: the group lives through the call.
        self.start(|out| unsafe { ffi::c10d_group_barrier(self.raw(), device, out) }, [])?.wait()
    }

    /// Makes sure that all ranks hold the same `digest` of `what` (a configuration, a plan). If they do not, every rank
    /// gets the same [`Error::Disagreement`], which names the ranks that differ from most.
    pub fn agree(&self, what: &str, digest: &[u8; 32]) -> Result<()> {
        let mine = Tensor::f_from_slice(digest)?.f_to_device(self.device)?;
        let all = Tensor::f_zeros([self.size() as i64, 32], (Kind::Uint8, self.device))?;
        self.all_gather(&all, &mine)?.wait()?;
        let mut bytes = vec![0u8; self.size() * 32];
        all.f_to_device(Device::Cpu)?.f_copy_data(&mut bytes, self.size() * 32)?;
        let digests: Vec<&[u8]> = bytes.chunks_exact(32).collect();
        match disagreement(&digests) {
            None => Ok(()),
            Some(who) => Err(Error::Disagreement(format!(
                "the ranks do not have the same {what}: {who}; give all ranks the same {what} and start again"
            ))),
        }
    }

    fn start<const N: usize>(
        &self,
        call: impl FnOnce(*mut *mut ffi::CWork) -> c_int,
        keep: [&Tensor; N],
    ) -> Result<Work> {
        let mut out = null_mut();
        check(call(&mut out))?;
        let handle = NonNull::new(out).ok_or_else(|| Error::Torch("no work was made".into()))?;
        Ok(Work { handle, _keep: keep.iter().map(|tensor| tensor.shallow_clone()).collect() })
    }

    /// A one-dimensional view of a tensor's memory. Gloo splits along the first dimension and ignores strides, so nothing
    /// else may reach it.
    fn flat(&self, tensor: &Tensor, call: &str) -> Result<Tensor> {
        if tensor.device() != self.device {
            let (has, wants) = (tensor.device(), self.device);
            return Err(Error::Torch(format!("{call}: the tensor is on {has:?}, the group works on {wants:?}")));
        }
        if !tensor.is_contiguous() {
            return Err(Error::Torch(format!("{call}: the tensor of shape {:?} is not contiguous", tensor.size())));
        }
        Ok(tensor.f_detach()?.f_view([-1])?)
    }

    fn expect_sizes(&self, call: &str, has: usize, wants: usize) -> Result<()> {
        if has == wants {
            return Ok(());
        }
        let world = self.world_size;
        Err(Error::Torch(format!("{call} over {world} ranks: a tensor has {has} elements and must have {wants}")))
    }

    fn size(&self) -> usize {
        self.world_size as usize
    }

    fn raw(&self) -> *mut ffi::CGroup {
        self.handle.as_ptr()
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        // SAFETY: the handle is owned, and freed once.
        unsafe { ffi::c10d_group_free(self.raw()) }
    }
}

/// A collective in flight. Its tensors must not be touched before [`Work::wait`] returns.
#[must_use = "a collective is complete only after wait()"]
pub struct Work {
    handle: NonNull<ffi::CWork>,
    /// The memory that the collective reads and writes.
    _keep: Vec<Tensor>,
}

// SAFETY: the handle is an owned intrusive pointer with an atomic count; waiting is allowed on any thread.
unsafe impl Send for Work {}

impl Work {
    /// Waits for the end, at most for the group's timeout. On CUDA it is the current stream that waits.
    pub fn wait(self) -> Result<()> {
        // SAFETY: the handle lives until `self` is dropped, after the call.
        check(unsafe { ffi::c10d_work_wait(self.handle.as_ptr()) })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: the handle is owned, and freed once.
        unsafe { ffi::c10d_work_free(self.handle.as_ptr()) }
    }
}

/// Says which ranks differ from the commonest digest (of equally common ones, the one of the lowest rank).
fn disagreement(digests: &[&[u8]]) -> Option<String> {
    let votes = |digest: &[u8]| digests.iter().filter(|other| **other == digest).count();
    let common = digests.iter().rev().max_by_key(|digest| votes(digest))?;
    let differing: Vec<usize> = (0..digests.len()).filter(|rank| digests[*rank] != *common).collect();
    let first = differing.first()?;
    let (names, verb) = match differing.as_slice() {
        [one] => (format!("rank {one}"), "differs"),
        many => (format!("ranks {}", many.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")), "differ"),
    };
    let model = digests.iter().position(|digest| digest == common)?;
    Some(format!("{names} {verb} from rank {model} ({} against {})", short(digests[*first]), short(common)))
}

/// The first four bytes, in hexadecimal.
fn short(digest: &[u8]) -> String {
    digest.iter().take(4).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
