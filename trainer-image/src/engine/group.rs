//! The ranks that train together. With one rank every collective is the identity and costs nothing.

use crate::error::{Error, Result};
use c10d::{ProcessGroup, ReduceOp, SideStream, Work};
use rlhf_api::report::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// Bytes of all ranks that [`Group::gather_on_first`] moves at a time.
const GATHERED_BYTES: i64 = 8 << 20;

/// The tensor in fp32 in host memory: itself, where it is that already.
pub(super) fn on_host(tensor: &Tensor) -> Result<Tensor> {
    c10d::on_host(|| Ok(tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?))
}

/// A gathering in flight.
#[must_use = "what is gathered is there only after finish()"]
pub struct Gather {
    work: Option<Work>,
    /// Where the collective writes, and where that goes, if it cannot write there itself.
    staged: Option<(Tensor, Tensor)>,
}

impl Gather {
    /// Waits until the whole is there.
    ///
    /// # Errors
    /// A peer was lost.
    pub fn finish(self) -> Result<()> {
        if let Some(work) = self.work {
            work.wait()?;
        }
        if let Some((staging, mut whole)) = self.staged {
            whole.f_copy_(&staging)?;
        }
        Ok(())
    }
}

/// A reduce-scatter in flight.
#[must_use = "the sum is there only after finish()"]
pub struct Scatter {
    work: Option<Work>,
    /// The parts to add up, one a row (or one part alone).
    received: Tensor,
}

impl Scatter {
    /// Waits, and returns this rank's part of the sum `[n]`.
    ///
    /// # Errors
    /// A peer was lost.
    pub fn finish(self) -> Result<Tensor> {
        if let Some(work) = self.work {
            work.wait()?;
        }
        match self.received.size()[..] {
            [_] => Ok(self.received),
            [1, n] => Ok(self.received.f_view([n])?),
            _ => Ok(self.received.f_sum_dim_intlist([0].as_slice(), false, Kind::Float)?),
        }
    }
}

/// This rank and its peers.
pub struct Group {
    peers: Option<ProcessGroup>,
    rank: u32,
    world_size: u32,
    /// Where the process group's tensors live: NCCL takes only those of its device.
    device: Device,
    side: SideStream,
}

impl Group {
    /// A group over a process group whose collectives take tensors on `device`, or `None` for a rank alone.
    ///
    /// # Errors
    /// The device is not there.
    pub fn new(peers: Option<ProcessGroup>, rank: u32, world_size: u32, device: Device) -> Result<Self> {
        Ok(Self { peers, rank, world_size, device, side: SideStream::new(device)? })
    }

    /// A rank alone, on the CPU.
    pub fn alone() -> Self {
        Self { peers: None, rank: 0, world_size: 1, device: Device::Cpu, side: SideStream::default() }
    }

    /// Where copies between this rank's device and its host run beside what the device computes.
    pub fn side(&self) -> &SideStream {
        &self.side
    }

    /// This rank, from 0.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// All ranks.
    pub fn world_size(&self) -> u32 {
        self.world_size
    }

    /// Whether this rank writes what is written once.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// This rank's part of a list that every rank holds: each `world_size`-th element.
    pub fn share<'a, T>(&self, all: &'a [T]) -> Vec<&'a T> {
        all.iter().skip(self.rank as usize).step_by(self.world_size as usize).collect()
    }

    /// How often every rank runs where `total` elements are shared and each rank takes `size` of its own at a time: as often
    /// as the rank with the most. Ranks that have nothing left run a batch of nothing, since collectives pair up by order.
    pub fn rounds(&self, total: usize, size: usize) -> usize {
        total.div_ceil(self.world_size as usize).div_ceil(size.max(1))
    }

    /// Starts gathering equal parts of all ranks `[n]` into `whole` `[world_size * n]`, in rank order. `part` may be this
    /// rank's own part of `whole`.
    ///
    /// # Errors
    /// A peer was lost.
    pub fn start_gather(&self, whole: &Tensor, part: &Tensor) -> Result<Gather> {
        let Some(peers) = &self.peers else {
            if whole.data_ptr() != part.data_ptr() {
                whole.shallow_clone().f_copy_(part)?;
            }
            return Ok(Gather { work: None, staged: None });
        };
        if self.takes(whole) {
            // A part on the host comes in the device's order, without a wait of the host.
            let part = part.f_to_device_(whole.device(), part.kind(), true, false)?;
            return Ok(Gather { work: Some(peers.all_gather(whole, &part)?), staged: None });
        }
        let staging = Tensor::f_empty(whole.size(), (whole.kind(), self.device))?;
        let work = peers.all_gather(&staging, &part.f_to_device(self.device)?)?;
        Ok(Gather { work: Some(work), staged: Some((staging, whole.shallow_clone())) })
    }

    /// Equal parts of all ranks `[n]`, in rank order and in fp32 in host memory `[world_size * n]`, on rank 0 alone. They come in
    /// slices, so that no device, and no other rank's host, needs much room for them. Every rank calls it.
    ///
    /// # Errors
    /// A peer was lost.
    pub fn gather_on_first(&self, part: &Tensor) -> Result<Option<Tensor>> {
        if self.peers.is_none() {
            return Ok(Some(on_host(part)?));
        }
        let (n, world) = (part.size()[0], i64::from(self.world_size));
        let empty = || Ok::<_, Error>(Tensor::f_empty([world, n], (Kind::Float, Device::Cpu))?);
        let whole = self.is_first().then(|| c10d::on_host(empty)).transpose()?;
        let step = (GATHERED_BYTES / world / part.kind().elt_size_in_bytes() as i64).max(1);
        for start in (0..n).step_by(step as usize) {
            let len = step.min(n - start);
            let received = Tensor::f_empty([world * len], (part.kind(), self.device))?;
            self.start_gather(&received, &part.f_narrow(0, start, len)?)?.finish()?;
            if let Some(whole) = &whole {
                whole.f_narrow(1, start, len)?.f_copy_(&received.f_view([world, len])?)?;
            }
        }
        whole.map(|whole| Ok(whole.f_view([-1])?)).transpose()
    }

    /// Starts summing `whole` `[world_size * n]` over the ranks, of which this rank gets its own part `[n]`.
    ///
    /// # Errors
    /// A peer was lost.
    pub fn start_scatter(&self, whole: &Tensor) -> Result<Scatter> {
        let Some(peers) = &self.peers else { return Ok(Scatter { work: None, received: whole.shallow_clone() }) };
        let whole = whole.f_to_device(self.device)?;
        let n = whole.size()[0] / i64::from(self.world_size);
        let options = (whole.kind(), self.device);
        if self.device.is_cuda() {
            let received = Tensor::f_empty([1, n], options)?;
            let work = peers.reduce_scatter(&received, &whole, ReduceOp::Sum)?;
            return Ok(Scatter { work: Some(work), received });
        }
        // Gloo's reduce-scatter costs more than its all-reduce. Exchanging the parts and adding them here is faster, adds in
        // a fixed order, and rounds 16-bit gradients once.
        let received = Tensor::f_empty([i64::from(self.world_size), n], options)?;
        let work = peers.all_to_all(&received, &whole)?;
        Ok(Scatter { work: Some(work), received })
    }

    /// Whether collectives take a tensor where it lies.
    fn takes(&self, tensor: &Tensor) -> bool {
        tensor.device() == self.device
    }

    /// Bytes that this rank has sent in collectives since the start, by the algorithms' own counts.
    pub fn bytes_sent(&self) -> u64 {
        self.peers.as_ref().map_or(0, ProcessGroup::bytes_sent)
    }

    /// Starts summing `tensor` over the ranks, in place.
    ///
    /// # Errors
    /// A peer was lost.
    pub fn start_sum(&self, tensor: &Tensor) -> Result<Option<Work>> {
        self.peers.as_ref().map(|p| Ok(p.all_reduce(tensor, ReduceOp::Sum)?)).transpose()
    }

    /// Sums numbers over the ranks, in place.
    ///
    /// # Errors
    /// A peer was lost.
    pub fn sum(&self, values: &mut [f64]) -> Result<()> {
        let Some(peers) = &self.peers else { return Ok(()) };
        let tensor = Tensor::from_slice(values).f_to_device(self.device)?;
        peers.all_reduce(&tensor, ReduceOp::Sum)?.wait()?;
        tensor.f_to_device(Device::Cpu)?.f_copy_data(values, values.len())?;
        Ok(())
    }

    /// Whether any rank says so.
    ///
    /// # Errors
    /// A peer was lost.
    pub fn any(&self, here: bool) -> Result<bool> {
        let mut votes = [f64::from(u8::from(here))];
        self.sum(&mut votes)?;
        Ok(votes[0] > 0.0)
    }

    /// Rank 0's number, on every rank.
    ///
    /// # Errors
    /// A peer was lost.
    pub fn from_first(&self, value: i64) -> Result<i64> {
        let Some(peers) = &self.peers else { return Ok(value) };
        let tensor = Tensor::from_slice(&[value]).f_to_device(self.device)?;
        peers.broadcast(&tensor, 0)?.wait()?;
        Ok(tensor.f_int64_value(&[0])?)
    }

    /// Rows `[n, c]` of every rank, rank after rank: `[world_size * n, c]`, on the CPU where there are peers. Every rank must give the same shape.
    ///
    /// # Errors
    /// A peer was lost.
    pub fn gather_rows(&self, rows: &Tensor) -> Result<Tensor> {
        let Some(peers) = &self.peers else { return Ok(rows.shallow_clone()) };
        let [n, columns] = rows.size()[..] else {
            return Err(Error::bug(format!("gather_rows wants [rows, columns], got {:?}", rows.size())));
        };
        let rows = rows.f_to_device(self.device)?.f_contiguous()?;
        let all = Tensor::f_empty([n * i64::from(self.world_size), columns], (rows.kind(), self.device))?;
        peers.all_gather(&all, &rows)?.wait()?;
        Ok(all.f_to_device(Device::Cpu)?)
    }

    /// A 32-byte digest of every rank, in rank order.
    ///
    /// # Errors
    /// A peer was lost.
    pub fn gather_digests(&self, digest: &[u8; 32]) -> Result<Vec<[u8; 32]>> {
        let row = Tensor::from_slice(digest).f_to_kind(Kind::Int64)?.f_view([1, 32])?;
        let all = self.gather_rows(&row)?.f_to_kind(Kind::Uint8)?.f_flatten(0, -1)?;
        let bytes = Vec::<u8>::try_from(all)?;
        Ok(bytes.chunks_exact(32).map(|c| std::array::from_fn(|i| c[i])).collect())
    }

    /// Rank 0 does some work, however long it takes, while the others wait: they exchange a flag every second, so that no
    /// collective runs into its time limit.
    ///
    /// # Errors
    /// On rank 0 what the work fails with; on the others that rank 0 failed, or that a peer was lost.
    pub fn while_first(&self, work: impl FnOnce() -> Result<()> + Send) -> Result<()> {
        let Some(_) = &self.peers else { return work() };
        if !self.is_first() {
            loop {
                let mut votes = [0.0, 0.0];
                self.sum(&mut votes)?;
                match votes {
                    [_, failed] if failed > 0.0 => {
                        return Err(Error::new(ExitCode::PeerLost, "rank 0 failed; its own message says why"));
                    }
                    [done, _] if done > 0.0 => return Ok(()),
                    _ => {}
                }
            }
        }
        std::thread::scope(|scope| {
            let (working, ended) = channel::<()>();
            let worker = scope.spawn(move || {
                // It is dropped as the work ends, in whatever way.
                let _working = working;
                work()
            });
            while ended.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
                self.sum(&mut [0.0, 0.0])?;
            }
            let result = worker.join().unwrap_or_else(|_| Err(Error::bug("rank 0's work panicked")));
            self.sum(&mut [1.0, f64::from(u8::from(result.is_err()))])?;
            result
        })
    }

    /// Waits until every rank is here.
    ///
    /// # Errors
    /// A peer was lost.
    pub fn barrier(&self) -> Result<()> {
        self.peers.as_ref().map_or(Ok(()), |p| Ok(p.barrier()?))
    }
}
