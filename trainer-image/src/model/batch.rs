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
    /// Tokens of each row that was given.
    pub lengths: Vec<i64>,
    time: i64,
    placed: Placed,
}

/// Where rows lie in the tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Placed {
    /// Each in a row of its own, with the pads at its end.
    AtStart,
    /// Each in a row of its own, with the pads before it.
    AtEnd,
    /// One after the other in one row, without pads.
    InTurn,
}

impl Batch {
    /// Rows padded at their ends. The causal rule alone hides the pads from every real token. Without rows it is a batch of
    /// nothing, for a rank that takes part in a pass it has no data for: one pad, as kernels want elements.
    pub fn right_padded(rows: &[&[i64]], device: Device) -> Self {
        Self::padded(rows, Placed::AtStart, device)
    }

    /// Rows padded at their beginnings, so that generation goes on at the same column in each.
    pub fn left_padded(rows: &[&[i64]], device: Device) -> Self {
        Self::padded(rows, Placed::AtEnd, device)
    }

    /// Rows one after the other in one row without a pad, each with its own positions and, by [`Batch::spans`], its own sight.
    pub fn packed(rows: &[&[i64]], device: Device) -> Self {
        if rows.is_empty() {
            return Self::right_padded(rows, device);
        }
        let positions: Vec<i64> = rows.iter().flat_map(|row| 0..row.len() as i64).collect();
        let tensor = |data: &[i64]| Tensor::from_slice(data).view([1, -1]).to_device(device);
        let lengths = rows.iter().map(|row| row.len() as i64).collect();
        let time = positions.len() as i64;
        let (tokens, positions) = (tensor(&rows.concat()), tensor(&positions));
        Self { tokens, positions, mask: None, lengths, time, placed: Placed::InTurn }
    }

    /// The lengths of the rows that lie in one, none of which sees another; `None` where each row has one of its own.
    pub fn spans(&self) -> Option<&[i64]> {
        (self.placed == Placed::InTurn).then_some(&self.lengths[..])
    }

    fn padded(rows: &[&[i64]], placed: Placed, device: Device) -> Self {
        let left = placed == Placed::AtEnd;
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
        Self { tokens: tensor(&tokens), positions: tensor(&positions), mask, lengths, time: time as i64, placed }
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
        match self.placed {
            Placed::AtStart => row as i64 * self.time + index,
            Placed::AtEnd => row as i64 * self.time + self.time - self.lengths[row] + index,
            Placed::InTurn => self.lengths[..row].iter().sum::<i64>() + index,
        }
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
