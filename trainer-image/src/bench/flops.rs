//! Floating-point operations that a workload needs: multiply-adds of matrix products count two, everything else nothing.
//!
//! A decoded token costs one position, as its past is in the cache. (The 2023 benchmark charged a whole forward pass for each
//! new token, which overstates generation about a hundredfold.)

use crate::model::{HeadKind, ModelSpec, ParamSpec, Segment};
use rlhf_api::stage::Lora;

/// Operations of a forward pass over one row of `tokens` tokens, without head and adapters.
pub(super) fn forward(spec: &ModelSpec, tokens: u64) -> f64 {
    matrices(spec, tokens) + attention(spec, tokens)
}

fn matrices(spec: &ModelSpec, tokens: u64) -> f64 {
    2.0 * spec.layers as f64 * elements(&spec.params(Segment::Block(0), HeadKind::Lm)) * tokens as f64
}

fn elements(params: &[ParamSpec]) -> f64 {
    params.iter().filter(|p| p.shape.len() == 2).map(|p| p.shape.iter().product::<i64>() as f64).sum()
}

/// Query times keys and weights times values, over the tokens up to each one.
fn attention(spec: &ModelSpec, tokens: u64) -> f64 {
    let (width, tokens) = ((spec.heads * spec.head_dim) as f64, tokens as f64);
    spec.layers as f64 * 4.0 * width * tokens * (tokens + 1.0) / 2.0
}

/// Operations of a forward pass of adapters over one row.
pub(super) fn adapters(spec: &ModelSpec, lora: Option<&Lora>, tokens: u64) -> f64 {
    let block = lora.map_or(0.0, |lora| elements(&spec.adapter_params(lora)));
    2.0 * spec.layers as f64 * block * tokens as f64
}

/// Operations of the head over some positions.
pub(super) fn head(spec: &ModelSpec, head: HeadKind, positions: u64) -> f64 {
    let width = if head == HeadKind::Lm { spec.vocab } else { 1 };
    2.0 * (spec.embed_width() * width) as f64 * positions as f64
}

/// How a model learns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Learning<'a> {
    /// Blocks run again in backward.
    pub recompute: bool,
    /// What is trained, if not all.
    pub lora: Option<&'a Lora>,
}

/// Operations of forward and backward over one row, whose head looks at some positions: backward is twice forward, and
/// blocks that are run again cost once more. Of frozen weights there are no gradients, which is half of their backward.
pub(super) fn learn(spec: &ModelSpec, kind: HeadKind, tokens: u64, positions: u64, learning: Learning<'_>) -> f64 {
    let again = f64::from(u8::from(learning.recompute));
    let weights = if learning.lora.is_some() { 2.0 } else { 3.0 };
    let head_weights = if kind == HeadKind::Scalar { 3.0 } else { weights };
    let trained = attention(spec, tokens) + adapters(spec, learning.lora, tokens);
    (weights + again) * matrices(spec, tokens) + (3.0 + again) * trained + head_weights * head(spec, kind, positions)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rlhf_api::stage::Linear;

    #[test]
    fn a_forward_pass_costs_two_operations_a_parameter_and_token_and_the_attention() {
        let spec = memory_plan::preset("s").unwrap();
        // 12 h^2 parameters of matrices a block, 12 blocks.
        let matrices = 2.0 * 12.0 * 12.0 * 768.0 * 768.0;
        let attention = 12.0 * 4.0 * 768.0 * (512.0 * 513.0 / 2.0);
        assert_eq!(forward(&spec, 512), matrices * 512.0 + attention);
        assert_eq!(head(&spec, HeadKind::Lm, 10), 2.0 * 768.0 * 50257.0 * 10.0);
        let forward_and_head = forward(&spec, 512) + head(&spec, HeadKind::Lm, 512);
        let whole = Learning { recompute: false, lora: None };
        assert_eq!(learn(&spec, HeadKind::Lm, 512, 512, whole), 3.0 * forward_and_head);
        let lora = Lora { rank: 8, alpha: None, dropout: 0.0, targets: Linear::ALL.to_vec() };
        // A and B of four matrices of h x h, and of two between h and 4 h.
        let adapters = 3.0 * 12.0 * 2.0 * (8.0 * 768.0 * (4.0 * 2.0 + 2.0 * 5.0)) * 512.0;
        let frozen = 2.0 * (matrices * 512.0 + head(&spec, HeadKind::Lm, 512)) + 3.0 * attention + adapters;
        let by_adapters = Learning { lora: Some(&lora), ..whole };
        assert_eq!(learn(&spec, HeadKind::Lm, 512, 512, by_adapters), frozen);
    }
}
