//! Tensors that somebody reads while training goes on.
//!
//! What a checkpoint keeps does not change until the optimizer's next step, so its writer reads the very tensors that are
//! trained; only what it has not read by then is copied first (as DataStates-LLM does, Maurya 2024). Training waits for
//! nothing but a copy.

use crate::error::Result;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch::{Device, Kind, Tensor};

/// A flat fp32 tensor `[n]` as it was when it was lent, read once from its start to its end.
pub struct Lent {
    numel: usize,
    rest: Mutex<Rest>,
}

/// What is still to be read.
struct Rest {
    tensor: Tensor,
    /// Whether nobody else has the tensor.
    copied: bool,
}

impl Lent {
    pub(super) fn new(tensor: &Tensor) -> Result<Arc<Self>> {
        let tensor = tensor.f_detach()?.f_view([-1])?;
        Ok(Arc::new(Self { numel: tensor.numel(), rest: Mutex::new(Rest { tensor, copied: false }) }))
    }

    /// Elements of the whole.
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// Copies the next elements into the start of `buffer` and tells how many bytes they are: as many as it has room for, 0
    /// after the last.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn read(&self, buffer: &mut [u8]) -> Result<usize> {
        let mut rest = self.rest();
        let next = rest.tensor.numel().min(buffer.len() / size_of::<f32>());
        if next > 0 {
            let piece = rest.tensor.f_narrow(0, 0, next as i64)?.f_to_device(Device::Cpu)?;
            piece.f_copy_data_u8(&mut buffer[..next * size_of::<f32>()], next)?;
            rest.tensor = rest.tensor.f_narrow(0, next as i64, (rest.tensor.numel() - next) as i64)?;
        }
        Ok(next * size_of::<f32>())
    }

    /// Copies what lies on a GPU into host memory, where neither training waits for its reader's copies nor the reader for
    /// training: both would queue on the device's one default stream.
    ///
    /// # Errors
    /// Where the host has no room.
    pub fn leave_device(&self) -> Result<()> {
        let on_host = self.rest().tensor.device() == Device::Cpu;
        if on_host { Ok(()) } else { self.keep() }
    }

    /// Copies what is still to be read into host memory, so that the tensor may change.
    ///
    /// # Errors
    /// Where the host has no room.
    pub(super) fn keep(&self) -> Result<()> {
        let mut rest = self.rest();
        if !rest.copied {
            rest.tensor = c10d::on_host(|| rest.tensor.f_to_device_(Device::Cpu, Kind::Float, false, true))?;
            rest.copied = true;
        }
        Ok(())
    }

    /// A panic while it was held left a tensor that is whole.
    fn rest(&self) -> MutexGuard<'_, Rest> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(lent: &Lent, piece: usize) -> Vec<f32> {
        let (mut bytes, mut buffer) = (Vec::new(), vec![0; piece]);
        while let n @ 1.. = lent.read(&mut buffer).unwrap() {
            bytes.extend_from_slice(&buffer[..n]);
        }
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    #[test]
    fn what_was_lent_is_read_as_it_was_though_it_changes_before_and_between_reads() {
        let values: Vec<f32> = (0..1000u16).map(f32::from).collect();
        for read_before in [0, 40, 3996, 4000] {
            let mut tensor = Tensor::from_slice(&values);
            let lent = Lent::new(&tensor).unwrap();
            let mut buffer = vec![0; read_before];
            assert_eq!(lent.read(&mut buffer).unwrap(), read_before);
            lent.keep().unwrap();
            let _ = tensor.f_fill_(-1.0).unwrap();
            assert_eq!(all(&lent, 64), values[read_before / 4..]);
        }
        let lent = Lent::new(&Tensor::from_slice(&values)).unwrap();
        assert_eq!((lent.numel(), all(&lent, 33)), (1000, values));
    }
}
