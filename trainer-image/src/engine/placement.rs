//! What a strategy's settings mean for one model: where its chunks live, in which number format, and who keeps what.

use crate::error::Result;
use crate::model::number_format;
use rlhf_api::stage::{Offload, Sharding, Strategy};
use tch::{Device, Kind, Tensor};

/// Where a model is placed and how it is run.
#[derive(Clone, Copy, Debug)]
pub struct Placement {
    /// The device that runs it.
    pub device: Device,
    /// Whether it is trained. A frozen model has only its parameters.
    pub trainable: bool,
    /// How it is spread, parked, run again and rounded.
    pub strategy: Strategy,
    /// The head runs over as many positions at a time as give fp32 logits of this size.
    pub head_slice_bytes: i64,
}

impl Placement {
    /// The number format of the working copy and of activations.
    pub fn kind(&self) -> Kind {
        number_format(self.strategy.precision)
    }

    /// Each rank keeps its part of the parameters only.
    pub(super) fn shards_parameters(&self) -> bool {
        self.strategy.sharding >= Sharding::Zero3
    }

    /// Each rank keeps its part of the gradients only.
    pub(super) fn shards_gradients(&self) -> bool {
        self.strategy.sharding >= Sharding::Zero2
    }

    /// Each rank keeps its part of the optimizer state only, and updates that part of the parameters.
    pub(super) fn shards_state(&self) -> bool {
        self.strategy.sharding >= Sharding::Zero1
    }

    /// Parameters lie in host memory and come to the device for each use.
    pub(super) fn streams(&self) -> bool {
        self.strategy.offload >= Offload::Parameters
    }

    /// Gradients and optimizer state lie in host memory.
    pub(super) fn state_on_host(&self) -> bool {
        self.strategy.offload >= Offload::Optimizer
    }

    /// A gradient is summed whole on the device over a step's micro-batches and reduced once. Otherwise each micro-batch's
    /// is reduced as soon as it is there, and summed where the optimizer wants it.
    pub(super) fn keeps_gradients(&self) -> bool {
        !self.shards_gradients() && !self.state_on_host()
    }

    /// Zeros `[numel]` in the memory of the optimizer state.
    pub(super) fn state_zeros(&self, numel: i64) -> Result<Tensor> {
        if self.state_on_host() { host_zeros(numel, Kind::Float, self.device) } else { self.device_zeros(numel) }
    }

    /// Zeros `[numel]` in the memory of parameters at rest.
    pub(super) fn home_zeros(&self, numel: i64) -> Result<Tensor> {
        if self.streams() {
            host_zeros(numel, self.kind(), self.device)
        } else {
            Ok(Tensor::f_zeros([numel], (self.kind(), self.device))?)
        }
    }

    fn device_zeros(&self, numel: i64) -> Result<Tensor> {
        Ok(Tensor::f_zeros([numel], (Kind::Float, self.device))?)
    }

    /// Whether an fp32 master copy would be the working copy itself: the same format in the same memory.
    pub(super) fn master_is_home(&self) -> bool {
        self.kind() == Kind::Float && self.streams() == self.state_on_host()
    }
}

/// Zeros `[numel]` in host memory; page-locked where the device is a GPU, which reads it without a copy in between.
fn host_zeros(numel: i64, kind: Kind, device: Device) -> Result<Tensor> {
    let zeros = c10d::on_host(|| Tensor::f_zeros([numel], (kind, Device::Cpu)))?;
    if let Device::Cuda(index) = device
        && !c10d::page_lock(&zeros, index)?
    {
        tracing::warn!(numel, "host memory could not be locked in place: copies to the GPU take longer");
    }
    Ok(zeros)
}
