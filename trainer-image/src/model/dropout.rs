//! Dropout whose draws are a pure function of where they fall: the seed, the optimizer step, the row's tokens, the block, the
//! linear, the token's place in its row, the feature. A block that runs again for its backward drops the same, and so does
//! a resumed run, on any number of ranks and in micro-batches of any size.

use super::Batch;
use crate::error::Result;
use crate::random::bits;
use rlhf_api::stage::Linear;
use tch::{Kind, Tensor};

/// What is dropped in one pass over a batch whose rows are padded at their ends.
#[derive(Debug)]
pub struct Dropout {
    rate: f64,
    /// One a row.
    rows: Vec<u64>,
}

/// The bits of a draw that is compared with the rate.
const DRAW: u32 = 53;

impl Dropout {
    /// Drops `rate` of what comes in, as `seed` and `step` say.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn new(rate: f64, seed: u64, step: u64, batch: &Batch) -> Result<Self> {
        let tokens = Vec::<Vec<i64>>::try_from(batch.tokens.f_to_device(tch::Device::Cpu)?)?;
        let coordinates = |(i, row): (usize, &Vec<i64>)| {
            let real = row.iter().take(batch.lengths.get(i).map_or(0, |n| *n as usize));
            bits(&[seed, step].into_iter().chain(real.map(|t| *t as u64)).collect::<Vec<_>>())
        };
        Ok(Self { rate, rows: tokens.iter().enumerate().map(coordinates).collect() })
    }

    /// `x` `[b, t, in]` without what is dropped, scaled so that its mean stays.
    pub(super) fn apply(&self, x: &Tensor, block: usize, linear: Linear) -> Result<Tensor> {
        let keys: Vec<i64> = self.rows.iter().map(|row| bits(&[*row, block as u64, linear as u64]) as i64).collect();
        let (time, width) = (x.size()[1], x.size()[2]);
        let keys = Tensor::from_slice(&keys).f_view([-1, 1, 1])?.f_to_device(x.device())?;
        let counter = Tensor::f_arange(time * width, (Kind::Int64, x.device()))?.f_view([1, time, width])?;
        let kept = draws(&keys, &counter)?.f_ge((self.rate * (1u64 << DRAW) as f64) as i64)?;
        Ok(x.f_mul(&kept.f_to_kind(x.kind())?)?.f_div_scalar(1.0 - self.rate)?)
    }
}

/// For each counter under each key a whole number that is uniform below `2^DRAW`: SplitMix64 (Steele 2014) with the key as
/// its state.
fn draws(keys: &Tensor, counter: &Tensor) -> Result<Tensor> {
    // Shifts of int64 keep the sign, so what they bring in from the left is masked away.
    let shifted = |z: &Tensor, by: i64| -> Result<Tensor> {
        Ok(z.f_bitwise_right_shift_tensor_scalar(by)?.f_bitwise_and((1i64 << (64 - by)) - 1)?)
    };
    let mix = |z: Tensor, by: i64, factor: u64| -> Result<Tensor> {
        Ok(z.f_bitwise_xor_tensor(&shifted(&z, by)?)?.f_mul_scalar(factor as i64)?)
    };
    let z = counter.f_mul_scalar(0x9e37_79b9_7f4a_7c15u64 as i64)?.f_add(keys)?;
    let z = mix(mix(z, 30, 0xbf58_476d_1ce4_e5b9)?, 27, 0x94d0_49bb_1331_11eb)?;
    shifted(&z.f_bitwise_xor_tensor(&shifted(&z, 31)?)?, 64 - i64::from(DRAW))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn masked(rows: &[&[i64]], rate: f64, step: u64, width: i64) -> Tensor {
        let batch = Batch::right_padded(rows, Device::Cpu);
        let ones = Tensor::ones([batch.rows(), batch.time(), width], (Kind::Float, Device::Cpu));
        Dropout::new(rate, 1, step, &batch).unwrap().apply(&ones, 2, Linear::Up).unwrap()
    }

    #[test]
    fn a_row_loses_the_same_in_every_batch_and_something_else_at_every_step() {
        let together = masked(&[&[5, 6], &[7, 8, 9, 4]], 0.5, 3, 8);
        assert_eq!(together.get(0).narrow(0, 0, 2), masked(&[&[5, 6]], 0.5, 3, 8).get(0));
        assert_eq!(together.get(1), masked(&[&[7, 8, 9, 4]], 0.5, 3, 8).get(0));
        assert_ne!(together.get(1), masked(&[&[7, 8, 9, 4]], 0.5, 4, 8).get(0));
    }

    #[test]
    fn the_rate_is_what_is_dropped_and_the_mean_stays() {
        for rate in [0.1, 0.5, 0.9] {
            let row: Vec<i64> = (0..50).collect();
            let out = masked(&[&row], rate, 0, 2000);
            let zero = out.eq(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
            assert!((zero - rate).abs() < 0.01, "{zero} of {rate}");
            assert!((out.mean(Kind::Double).double_value(&[]) - 1.0).abs() < 0.05);
        }
    }
}
