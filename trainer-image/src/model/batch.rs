//! Token rows of unequal length as one padded tensor, with the positions and the attention mask that follow.
//!
//! A row's tokens are known by where they start and how many there are, never by the pad id. Positions are
//! the exclusive cumulative sum of the mask, so a row gives the same numbers under left, right or no padding.

use tch::{Device, Kind, Tensor};

/// Padded rows of tokens.
#[derive(Debug)]
pub struct Batch {
    /// Token ids `[b, t]`.
    pub tokens: Tensor,
    /// Position of each token in its row `[b, t]`, 0 at pads.
    pub positions: Tensor,
    /// Which keys each query may see `[b, 1, t, t]`, or `None` where the causal rule alone says it.
    pub mask: Option<Tensor>,
    /// Tokens of each row.
    pub lengths: Vec<i64>,
    time: i64,
    left: bool,
}

impl Batch {
    /// Rows padded at their ends. The causal rule alone hides the pads from every real token. Without rows it is a batch of
    /// nothing, for a rank that takes part in a pass it has no data for: one pad, as kernels want elements.
    pub fn right_padded(rows: &[&[i64]], device: Device) -> Self {
        Self::padded(rows, false, device)
    }

    /// Rows padded at their beginnings, so that generation goes on at the same column in each.
    pub fn left_padded(rows: &[&[i64]], device: Device) -> Self {
        Self::padded(rows, true, device)
    }

    fn padded(rows: &[&[i64]], left: bool, device: Device) -> Self {
        let time = rows.iter().map(|r| r.len()).max().unwrap_or(1);
        let count = rows.len().max(1);
        let (mut tokens, mut positions) = (vec![0i64; count * time], vec![0i64; count * time]);
        for (i, row) in rows.iter().enumerate() {
            let start = i * time + if left { time - row.len() } else { 0 };
            tokens[start..start + row.len()].copy_from_slice(row);
            positions[start..start + row.len()].iter_mut().enumerate().for_each(|(p, slot)| *slot = p as i64);
        }
        let shape = [count as i64, time as i64];
        let tensor = |data: &[i64]| Tensor::from_slice(data).view(shape).to_device(device);
        let lengths: Vec<i64> = rows.iter().map(|r| r.len() as i64).collect();
        let needs_mask = left && lengths.iter().any(|&n| n != time as i64);
        let mask = needs_mask.then(|| left_mask(&lengths, time as i64, device));
        Self { tokens: tensor(&tokens), positions: tensor(&positions), mask, lengths, time: time as i64, left }
    }

    /// Rows of the tensors.
    pub fn rows(&self) -> i64 {
        self.tokens.size()[0]
    }

    /// Columns.
    pub fn time(&self) -> i64 {
        self.time
    }

    /// Where token `index` of row `row` stands in the flattened `[b * t]`.
    pub fn flat_index(&self, row: usize, index: i64) -> i64 {
        let start = if self.left { self.time - self.lengths[row] } else { 0 };
        row as i64 * self.time + start + index
    }
}

/// A query sees the real keys up to its own column, and itself. So a pad's query, which is never read, sees something: of
/// nothing some kernels make NaN, which the next block's attention would spread to real rows as 0 times NaN.
fn left_mask(lengths: &[i64], time: i64, device: Device) -> Tensor {
    let columns = Tensor::arange(time, (Kind::Int64, device));
    let starts = Tensor::from_slice(&lengths.iter().map(|n| time - n).collect::<Vec<_>>()).to_device(device);
    let real = columns.unsqueeze(0).ge_tensor(&starts.unsqueeze(1)).view([-1, 1, 1, time]);
    let causal = columns.unsqueeze(0).le_tensor(&columns.unsqueeze(1)).view([1, 1, time, time]);
    let own = columns.unsqueeze(0).eq_tensor(&columns.unsqueeze(1)).view([1, 1, time, time]);
    real.logical_and(&causal).logical_or(&own)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(t: &Tensor) -> Vec<i64> {
        Vec::try_from(t.flatten(0, -1)).unwrap()
    }

    #[test]
    fn positions_are_the_same_under_either_padding() {
        let rows: [&[i64]; 2] = [&[5, 6, 7], &[8]];
        let right = Batch::right_padded(&rows, Device::Cpu);
        assert_eq!((ids(&right.tokens), ids(&right.positions)), (vec![5, 6, 7, 8, 0, 0], vec![0, 1, 2, 0, 0, 0]));
        assert!(right.mask.is_none());
        let left = Batch::left_padded(&rows, Device::Cpu);
        assert_eq!((ids(&left.tokens), ids(&left.positions)), (vec![5, 6, 7, 0, 0, 8], vec![0, 1, 2, 0, 0, 0]));
        assert_eq!((left.flat_index(1, 0), right.flat_index(1, 0)), (5, 3));
        let mask = left.mask.as_ref().map(|m| ids(&m.to_kind(Kind::Int64))).unwrap();
        assert_eq!(mask[..9], [1, 0, 0, 1, 1, 0, 1, 1, 1]);
        // Pads see themselves alone.
        assert_eq!(mask[9..], [1, 0, 0, 0, 1, 0, 0, 0, 1]);
        let nothing = Batch::right_padded(&[], Device::Cpu);
        assert_eq!((nothing.rows(), nothing.time(), nothing.lengths.len()), (1, 1, 0));
    }
}
