//! Dropout whose draws are a pure function of where they fall: the seed, the optimizer step, the row's tokens, the block, the
//! linear, the token's place in its row, the feature. A block that runs again for its backward drops the same, and so does
//! a resumed run, on any number of ranks and in micro-batches of any size.

use super::Batch;
use crate::error::Result;
use crate::random::bits;
use rlhf_api::stage::Linear;
use tch::{Device, Kind, Tensor};

/// What is dropped in one pass over a batch whose rows are padded at their ends, or lie in one.
#[derive(Debug)]
pub struct Dropout {
    rate: f64,
    /// One a row.
    rows: Vec<u64>,
    /// Of rows that lie in one, the row of each token and its place in it, `[1, t]` each.
    packed: Option<[Tensor; 2]>,
}

/// The bits of a draw that is compared with the rate.
const DRAW: u32 = 53;

impl Dropout {
    /// Drops `rate` of what comes in, as `seed` and `step` say.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn new(rate: f64, seed: u64, step: u64, batch: &Batch) -> Result<Self> {
        let host = batch.tokens.f_to_device(Device::Cpu)?;
        let tokens: Vec<Vec<i64>> = match batch.spans() {
            Some(spans) => {
                let rows = host.f_split_with_sizes(spans, 1)?;
                rows.iter().map(|row| Ok(Vec::try_from(row.f_flatten(0, -1)?)?)).collect::<Result<_>>()?
            }
            None => Vec::try_from(host)?,
        };
        let coordinates = |(i, row): (usize, &Vec<i64>)| {
            let real = row.iter().take(batch.lengths.get(i).map_or(0, |n| *n as usize));
            bits(&[seed, step].into_iter().chain(real.map(|t| *t as u64)).collect::<Vec<_>>())
        };
        let rows = tokens.iter().enumerate().map(coordinates).collect();
        let packed = batch.spans().map(|spans| -> Result<_> {
            let row_of: Vec<i64> =
                (0..).zip(spans).flat_map(|(row, n)| std::iter::repeat_n(row, *n as usize)).collect();
            let row_of = Tensor::from_slice(&row_of).f_view([1, -1])?.f_to_device(batch.tokens.device())?;
            Ok([row_of, batch.positions.shallow_clone()])
        });
        Ok(Self { rate, rows, packed: packed.transpose()? })
    }

    /// `x` `[b, t, in]` without what is dropped, scaled so that its mean stays.
    pub(super) fn apply(&self, x: &Tensor, block: usize, linear: Linear) -> Result<Tensor> {
        let keys: Vec<i64> = self.rows.iter().map(|row| bits(&[*row, block as u64, linear as u64]) as i64).collect();
        let (time, width) = (x.size()[1], x.size()[2]);
        let keys = Tensor::from_slice(&keys).f_to_device(x.device())?;
        let options = (Kind::Int64, x.device());
        let (keys, counter) = match &self.packed {
            None => (keys.f_view([-1, 1, 1])?, Tensor::f_arange(time * width, options)?.f_view([1, time, width])?),
            Some([row_of, places]) => {
                let first = places.f_unsqueeze(-1)?.f_mul_scalar(width)?;
                let counter = first.f_add(&Tensor::f_arange(width, options)?)?;
                (keys.f_index_select(0, &row_of.f_flatten(0, -1)?)?.f_view([1, time, 1])?, counter)
            }
        };
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
    fn rows_that_lie_in_one_lose_the_same_as_alone() {
        let (rows, rate): ([&[i64]; 2], _) = ([&[5, 6], &[7, 8, 9]], 0.5);
        let ones = Tensor::ones([1, 5, 8], (Kind::Float, Device::Cpu));
        let dropout = Dropout::new(rate, 1, 3, &Batch::packed(&rows, Device::Cpu)).unwrap();
        let packed = dropout.apply(&ones, 2, Linear::Up).unwrap().get(0);
        assert_eq!(packed.narrow(0, 0, 2), masked(&rows[..1], rate, 3, 8).get(0));
        assert_eq!(packed.narrow(0, 2, 3), masked(&rows[1..], rate, 3, 8).get(0));
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
