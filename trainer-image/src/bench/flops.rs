//! Floating-point operations that a workload needs: multiply-adds of matrix products count two, everything else nothing.
//!
//! A decoded token costs one position, as its past is in the cache. (The 2023 benchmark charged a whole forward pass for each
//! new token, which overstates generation about a hundredfold.)

use crate::model::{HeadKind, ModelSpec, Segment};

/// Operations of a forward pass over one row of `tokens` tokens, without the head.
pub(super) fn forward(spec: &ModelSpec, tokens: u64) -> f64 {
    let matrices = |s| spec.params(s, HeadKind::Lm).into_iter().filter(|p| p.shape.len() == 2);
    let block: i64 = matrices(Segment::Block(0)).map(|p| p.shape.iter().product::<i64>()).sum();
    let (layers, tokens) = (spec.layers as f64, tokens as f64);
    let attention_width = (spec.heads * spec.head_dim) as f64;
    // Query times keys and weights times values, over the tokens up to each one.
    let attention = 4.0 * attention_width * tokens * (tokens + 1.0) / 2.0;
    layers * (2.0 * block as f64 * tokens + attention)
}

/// Operations of the head over some positions.
pub(super) fn head(spec: &ModelSpec, head: HeadKind, positions: u64) -> f64 {
    let width = if head == HeadKind::Lm { spec.vocab } else { 1 };
    2.0 * (spec.hidden * width) as f64 * positions as f64
}

/// Operations of forward and backward over one row, whose head looks at some positions: backward is twice forward, and
/// blocks that are run again cost once more.
pub(super) fn learn(spec: &ModelSpec, kind: HeadKind, tokens: u64, positions: u64, recompute: bool) -> f64 {
    let blocks = if recompute { 4.0 } else { 3.0 };
    blocks * forward(spec, tokens) + 3.0 * head(spec, kind, positions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forward_pass_costs_two_operations_a_parameter_and_token_and_the_attention() {
        let spec = memory_plan::preset("s").unwrap();
        // 12 h^2 parameters of matrices a block, 12 blocks.
        let matrices = 12.0 * 12.0 * 768.0 * 768.0;
        let attention = 12.0 * 4.0 * 768.0 * (512.0 * 513.0 / 2.0);
        assert_eq!(forward(&spec, 512), 2.0 * matrices * 512.0 + attention);
        assert_eq!(head(&spec, HeadKind::Lm, 10), 2.0 * 768.0 * 50257.0 * 10.0);
        let forward_and_head = forward(&spec, 512) + head(&spec, HeadKind::Lm, 512);
        assert_eq!(learn(&spec, HeadKind::Lm, 512, 512, false), 3.0 * forward_and_head);
    }
}
