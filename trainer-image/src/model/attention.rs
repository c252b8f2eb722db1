//! Attention between its linears: who sees whom, the past that generation keeps, and how scores become weights.

use super::{ModelSpec, Positions, rope};
use crate::error::Result;
use std::cell::OnceCell;
use tch::{Device, Kind, Tensor};

/// Keys and values of one block's past tokens `[b, kv_heads, capacity, d]`, of which the first `filled` columns count.
#[derive(Debug)]
pub struct LayerCache {
    keys: Tensor,
    values: Tensor,
    filled: i64,
}

impl LayerCache {
    /// An empty cache for `rows` rows of up to `capacity` tokens, in the model's number format.
    ///
    /// # Errors
    /// Where the device has no room.
    pub fn new(spec: &ModelSpec, rows: i64, capacity: i64, kind: Kind, device: Device) -> Result<Self> {
        let shape = [rows, spec.kv_heads, capacity, spec.head_dim];
        let make = || Tensor::f_zeros(shape, (kind, device));
        Ok(Self { keys: make()?, values: make()?, filled: 0 })
    }

    /// Keeps only the rows at these indices.
    ///
    /// # Errors
    /// Where the device has no room.
    pub fn keep_rows(&mut self, rows: &Tensor) -> Result<()> {
        self.keys = self.keys.f_index_select(0, rows)?;
        self.values = self.values.f_index_select(0, rows)?;
        Ok(())
    }

    /// Appends `[b, kv_heads, t, d]` and returns all keys and values so far.
    pub(super) fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let time = keys.size()[2];
        self.keys.f_narrow(2, self.filled, time)?.f_copy_(keys)?;
        self.values.f_narrow(2, self.filled, time)?.f_copy_(values)?;
        self.filled += time;
        Ok((self.keys.f_narrow(2, 0, self.filled)?, self.values.f_narrow(2, 0, self.filled)?))
    }
}

/// What attention needs beside a block's input, the same for every block of one pass.
#[derive(Debug)]
pub struct AttentionContext {
    rotary: Option<Rotary>,
    /// That of blocks with a window, where it is another.
    local: Option<Rotary>,
    mask: Option<Tensor>,
    causal: bool,
    /// The lengths of the sequences that lie one after the other in the one row, where they do.
    spans: Option<Vec<i64>>,
    kind: Kind,
    /// What blocks without and with a window see, once it is known of how many keys.
    sights: [OnceCell<Tensor>; 2],
}

/// Cosines and sines `[b, 1, t, d]`.
type Rotary = (Tensor, Tensor);

impl AttentionContext {
    /// The context of a pass over tokens at `positions` `[b, t]`.
    ///
    /// With a `mask` `[b, 1, t, keys]` (true: may see) it alone decides; without, the causal rule does,
    /// which for a single query over a cache means that it sees everything. Either way a block with a sliding window sees no
    /// further back than that. `kind` is the model's number format.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn new(spec: &ModelSpec, positions: &Tensor, mask: Option<&Tensor>, kind: Kind) -> Result<Self> {
        let rotary = match spec.positions {
            Positions::Rotary { theta } => {
                Some(rope::tables(spec.head_dim, theta, spec.rope_scaling, positions, kind)?)
            }
            Positions::Alibi | Positions::Learned => None,
        };
        let local =
            spec.local_theta.map(|theta| rope::tables(spec.head_dim, theta, None, positions, kind)).transpose()?;
        let causal = mask.is_none() && positions.size()[1] > 1;
        let sights = [OnceCell::new(), OnceCell::new()];
        Ok(Self { rotary, local, mask: mask.map(Tensor::shallow_clone), causal, spans: None, kind, sights })
    }

    /// The same for one row in which sequences of these lengths lie one after the other, none of which sees another.
    pub fn with_spans(self, spans: Option<&[i64]>) -> Self {
        Self { spans: spans.map(<[i64]>::to_vec), ..self }
    }

    /// Turns queries or keys `[b, n, t, d]` of a block by their positions, where these are rotary.
    pub(super) fn turn(&self, spec: &ModelSpec, block: usize, x: Tensor) -> Result<Tensor> {
        let local = self.local.as_ref().filter(|_| spec.window(block).is_some());
        match local.or(self.rotary.as_ref()) {
            Some(tables) => rotate(&x, tables),
            None => Ok(x),
        }
    }

    /// What queries may see of the keys `[b, n, t, d]`: a mask (with ALiBi, what is added to the scores) where one is needed, and
    /// whether the causal rule holds beside it.
    fn sight(&self, spec: &ModelSpec, block: usize, time: i64, keys: &Tensor) -> Result<(Option<Tensor>, bool)> {
        let count = keys.size()[2];
        let window = spec.window(block).filter(|window| count > *window);
        let alibi = spec.positions == Positions::Alibi;
        // Only a fused kernel knows the causal rule.
        let spelt_out = alibi || (self.causal && spec.traits.attention_cap.is_some());
        if window.is_none() && !spelt_out {
            return Ok((self.mask.as_ref().map(Tensor::shallow_clone), self.causal));
        }
        // What is seen within a sequence is the beginning of what is within a longer one.
        let longest = self.spans.as_ref().and_then(|spans| spans.iter().copied().max());
        let (part, time, count) = match longest {
            Some(longest) => (Some(count), longest, longest),
            None => (None, time, count),
        };
        let sight = &self.sights[usize::from(window.is_some())];
        if sight.get().is_none() {
            let back = distances(time, count, keys.device())?;
            let seen =
                back.f_ge(0)?.f_logical_and(&back.f_lt(window.unwrap_or(count))?)?.f_view([1, 1, time, count])?;
            let seen = match &self.mask {
                Some(mask) => seen.f_logical_and(mask)?,
                None => seen,
            };
            let _ = sight.set(if alibi { falling(spec.heads, &back, &seen, self.kind)? } else { seen });
        }
        let sight = sight.get().map(|sight| match part {
            Some(part) if part < count => sight.f_narrow(2, 0, part)?.f_narrow(3, 0, part),
            _ => Ok(sight.shallow_clone()),
        });
        Ok((sight.transpose()?, false))
    }
}

/// `[t, keys]`: how far back from the last `t` of so many tokens each of them stands.
fn distances(time: i64, keys: i64, device: Device) -> Result<Tensor> {
    let options = (Kind::Int64, device);
    let queries = Tensor::f_arange_start(keys - time, keys, options)?.f_unsqueeze(1)?;
    Ok(queries.f_sub(&Tensor::f_arange(keys, options)?.f_unsqueeze(0)?)?)
}

/// What ALiBi adds to the scores of what is seen `[b, 1, t, keys]`, at distances `back` `[t, keys]`: `[b, heads, t, keys]`.
fn falling(heads: i64, back: &Tensor, seen: &Tensor, kind: Kind) -> Result<Tensor> {
    let slopes = Tensor::from_slice(&slopes(heads)).to_device(back.device()).f_view([1, heads, 1, 1])?;
    let bias = slopes.f_mul(&back.f_to_kind(Kind::Float)?.f_neg()?)?.f_to_kind(kind)?;
    Ok(bias.f_masked_fill(&seen.f_logical_not()?, f64::NEG_INFINITY)?)
}

/// By how much each head's scores fall with a step back: a geometric series for a power of two, and between its terms, from
/// the first on, those of twice as many for the heads beyond one (Press 2022, and the code beside it).
fn slopes(heads: i64) -> Vec<f32> {
    let series = |of: f64, power: i64| 2f64.powf(-8.0 / of * power as f64) as f32;
    let whole = 1i64 << heads.ilog2();
    let first = (1..=whole).map(|i| series(whole as f64, i));
    first.chain((0..heads - whole).map(|i| series(2.0 * whole as f64, 2 * i + 1))).collect()
}

/// Rotates the two halves of each head of `x` `[b, n, t, d]`.
fn rotate(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
    let half = x.size()[3] / 2;
    let turned = Tensor::f_cat(&[&x.f_narrow(3, half, half)?.f_neg()?, &x.f_narrow(3, 0, half)?], -1)?;
    Ok(x.f_mul(cos)?.f_add(&turned.f_mul(sin)?)?)
}

/// What each query `[b, heads, t, d]` of a block takes from the values that it sees: `[b, heads, t, d]`.
pub(super) fn mix(
    spec: &ModelSpec,
    block: usize,
    context: &AttentionContext,
    queries: &Tensor,
    keys: Tensor,
    values: Tensor,
) -> Result<Tensor> {
    let Some(spans) = &context.spans else {
        return mix_all(spec, block, context, queries, keys, values);
    };
    // Each sequence by itself: one pass over all with a mask would look at every pair of them only to leave it out.
    let parts = |x: &Tensor| x.f_split_with_sizes(spans, 2);
    let all = parts(queries)?.into_iter().zip(parts(&keys)?).zip(parts(&values)?);
    let mixed = all.map(|((q, k), v)| mix_all(spec, block, context, &q, k, v)).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::f_cat(&mixed, 2)?)
}

/// The same of sequences that have a row each.
fn mix_all(
    spec: &ModelSpec,
    block: usize,
    context: &AttentionContext,
    queries: &Tensor,
    mut keys: Tensor,
    mut values: Tensor,
) -> Result<Tensor> {
    let time = queries.size()[2];
    let mut grouped = spec.heads != spec.kv_heads;
    let (mask, causal) = context.sight(spec, block, time, &keys)?;
    let masked_on_gpu = mask.is_some() && time > 1 && queries.device().is_cuda();
    if grouped && (masked_on_gpu || spec.traits.attention_cap.is_some()) {
        // No kernel for CUDA takes a mask and shared heads at once but by the whole matrix of weights, as the plan knows; nor
        // does the product by which scores are capped.
        (keys, values, grouped) = (for_each_head(spec, &keys)?, for_each_head(spec, &values)?, false);
    }
    if let Some(limit) = spec.traits.attention_cap {
        return capped(spec, limit, mask.as_ref(), queries, &keys, &values);
    }
    let scale = spec.query_scale;
    Ok(Tensor::f_scaled_dot_product_attention(queries, &keys, &values, mask, 0.0, causal, scale, grouped)?)
}

/// Attention with soft-capped scores (Gemma 2), by the whole matrix of weights.
fn capped(
    spec: &ModelSpec,
    limit: f64,
    mask: Option<&Tensor>,
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
) -> Result<Tensor> {
    let scale = spec.query_scale.unwrap_or_else(|| (spec.head_dim as f64).powf(-0.5));
    let mut scores = queries.f_matmul(&keys.f_transpose(2, 3)?)?;
    let _ = scores.f_mul_scalar_(scale)?;
    scores = cap(scores, limit)?;
    if let Some(seen) = mask {
        let _ = scores.f_masked_fill_(&seen.f_logical_not()?, f64::NEG_INFINITY)?;
    }
    scores = scores.f_softmax(-1, Kind::Float)?;
    Ok(scores.f_to_kind(queries.kind())?.f_matmul(values)?)
}

/// `limit tanh(x / limit)`, which is near `x` where that is small. Writes over `x`, which must be nobody else's.
pub(super) fn cap(mut x: Tensor, limit: f64) -> Result<Tensor> {
    let _ = x.f_div_scalar_(limit)?;
    Ok(x.f_tanh_()?.f_mul_scalar(limit)?)
}

/// Keys or values `[b, kv_heads, t, d]` as `[b, heads, t, d]`, each beside the queries that share it.
fn for_each_head(spec: &ModelSpec, shared: &Tensor) -> Result<Tensor> {
    Ok(shared.f_repeat_interleave_self_int(spec.heads / spec.kv_heads, 1, None)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `_get_alibi_slopes` of transformers 5.24 has them.
    #[test]
    fn slopes_are_a_series_and_beyond_a_power_of_two_what_lies_between() {
        assert_eq!(slopes(1), [0.00390625]);
        assert_eq!(slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
        assert_eq!(slopes(3), [0.0625, 0.00390625, 0.25]);
        let twelve = slopes(12);
        let beyond = [0.707_106_77, 0.353_553_4, 0.176_776_7, 0.088_388_35];
        assert!(
            twelve[..8] == slopes(8) && twelve[8..].iter().zip(beyond).all(|(a, e)| (a - e).abs() < 1e-7),
            "{twelve:?}"
        );
    }

    #[test]
    fn keys_and_values_for_each_head_are_those_that_heads_share() {
        let spec = ModelSpec { heads: 6, kv_heads: 2, ..memory_plan::preset("8b").unwrap() };
        let random = |heads| Tensor::randn([2, heads, 5, 4], (Kind::Float, Device::Cpu));
        let (queries, keys, values) = (random(6), random(2), random(2));
        let mask = Tensor::ones([5, 5], (Kind::Bool, Device::Cpu)).tril(0).view([1, 1, 5, 5]);
        let attend = |keys: &Tensor, values: &Tensor, grouped| {
            Tensor::scaled_dot_product_attention(&queries, keys, values, Some(&mask), 0.0, false, None::<f64>, grouped)
        };
        let spread = |t: &Tensor| for_each_head(&spec, t).unwrap();
        let gap = (attend(&keys, &values, true) - attend(&spread(&keys), &spread(&values), false)).abs().max();
        assert!(gap.double_value(&[]) < 1e-6, "{gap:?}");
    }
}
