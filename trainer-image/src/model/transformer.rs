//! The mathematics of each segment, over views of its parameters. Nothing here knows of ranks or shards.

use super::dropout::Dropout;
use super::{Mlp, ModelSpec, Norm, Param, Positions, rope};
use crate::error::{Error, Result};
use rlhf_api::stage::Linear;
use std::cell::OnceCell;
use tch::{Device, Kind, Tensor};

/// A segment's parameters, as views into its chunk.
#[derive(Debug)]
pub struct Params {
    list: Vec<(Param, Tensor)>,
}

impl Params {
    /// Pairs parameters with their tensors, in order.
    pub fn new(params: impl Iterator<Item = Param>, tensors: Vec<Tensor>) -> Self {
        Self { list: params.zip(tensors).collect() }
    }

    /// The parameter in this role.
    ///
    /// # Errors
    /// A bug: the segment has no such parameter.
    pub fn get(&self, param: Param) -> Result<&Tensor> {
        self.find(param).ok_or_else(|| Error::bug(format!("the segment has no parameter {param:?}")))
    }

    /// The parameter in this role, where the segment has one.
    pub fn find(&self, param: Param) -> Option<&Tensor> {
        self.list.iter().find(|(p, _)| *p == param).map(|(_, t)| t)
    }

    /// All tensors, in the segment's order.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.list.iter().map(|(_, t)| t)
    }

    /// The tensors that autograd follows, in the segment's order.
    pub fn trained(&self) -> impl Iterator<Item = &Tensor> {
        self.tensors().filter(|t| t.requires_grad())
    }

    fn norm(&self, spec: &ModelSpec, x: &Tensor, weight: Param, bias: Param) -> Result<Tensor> {
        let weight = self.get(weight)?;
        Ok(match spec.norm {
            Norm::Layer => x.f_layer_norm([spec.hidden], Some(weight), self.find(bias), spec.norm_eps, false)?,
            Norm::Rms => rms_norm(x, weight, spec.norm_eps)?,
        })
    }
}

/// Root-mean-square norm over the last dimension (Zhang and Sennrich 2019), in fp32.
fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let x32 = x.to_kind(Kind::Float);
    let variance = x32.f_square()?.f_mean_dim([-1].as_slice(), true, Kind::Float)?;
    let scaled = x32.f_mul(&(variance + eps).f_rsqrt()?)?.to_kind(x.kind());
    Ok(scaled.f_mul(weight)?)
}

/// What a block runs with: its own parameters, and its adapters where it has some.
#[derive(Clone, Copy, Debug)]
pub struct BlockParams<'p> {
    /// Its own parameters.
    pub base: &'p Params,
    /// Its adapters.
    pub adapter: Option<Adapter<'p>>,
}

/// A block's adapters (LoRA, Hu 2021).
#[derive(Clone, Copy, Debug)]
pub struct Adapter<'p> {
    /// A and B of each target.
    pub params: &'p Params,
    /// What their output is multiplied by.
    pub scale: f64,
    /// What is dropped of their inputs.
    pub dropout: Option<&'p Dropout>,
    /// The block's index, of which what is dropped depends.
    pub block: usize,
}

impl BlockParams<'_> {
    fn linear(&self, x: &Tensor, linear: Linear) -> Result<Tensor> {
        let (weight, bias) = Param::of(linear);
        let out = x.f_linear(self.base.get(weight)?, self.base.find(bias))?;
        Ok(match self.adapter.map(|adapter| adapter.run(x, linear)).transpose()?.flatten() {
            Some(adapted) => out.f_add(&adapted)?,
            None => out,
        })
    }
}

impl Adapter<'_> {
    /// What is added to the output of `linear`, where that is a target.
    fn run(&self, x: &Tensor, linear: Linear) -> Result<Option<Tensor>> {
        let (Some(a), Some(b)) = (self.params.find(Param::LoraA(linear)), self.params.find(Param::LoraB(linear)))
        else {
            return Ok(None);
        };
        let dropped = self.dropout.map(|dropout| dropout.apply(x, self.block, linear)).transpose()?;
        let inner = dropped.as_ref().unwrap_or(x).f_linear(a, None::<&Tensor>)?;
        Ok(Some(inner.f_linear(b, None::<&Tensor>)?.f_mul_scalar(self.scale)?))
    }
}

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
    fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
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
    rotary: Option<(Tensor, Tensor)>,
    mask: Option<Tensor>,
    causal: bool,
    /// The mask within the sliding window, once it is known over how many keys.
    windowed: OnceCell<Tensor>,
}

impl AttentionContext {
    /// The context of a pass over tokens at `positions` `[b, t]`.
    ///
    /// With a `mask` `[b, 1, t, keys]` (true: may see) it alone decides; without, the causal rule does,
    /// which for a single query over a cache means that it sees everything. Either way a model with a sliding window sees no
    /// further back than that. `kind` is the model's number format.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn new(spec: &ModelSpec, positions: &Tensor, mask: Option<&Tensor>, kind: Kind) -> Result<Self> {
        let rotary = match spec.positions {
            Positions::Rotary { theta } => Some(rope::tables(spec, theta, positions, kind)?),
            Positions::Learned => None,
        };
        let causal = mask.is_none() && positions.size()[1] > 1;
        Ok(Self { rotary, mask: mask.map(Tensor::shallow_clone), causal, windowed: OnceCell::new() })
    }

    /// What queries may see of the keys `[b, n, t, d]`: a mask where one is needed, and whether the causal rule holds beside it.
    fn sight(&self, spec: &ModelSpec, time: i64, keys: &Tensor) -> Result<(Option<&Tensor>, bool)> {
        let count = keys.size()[2];
        let Some(window) = spec.sliding_window.filter(|window| count > *window) else {
            return Ok((self.mask.as_ref(), self.causal));
        };
        if self.windowed.get().is_none() {
            let seen = window_mask(window, time, count, keys.device())?;
            let seen = match &self.mask {
                Some(mask) => seen.f_logical_and(mask)?,
                None => seen,
            };
            let _ = self.windowed.set(seen);
        }
        Ok((self.windowed.get(), false))
    }
}

/// `[1, 1, t, keys]`: the last `t` of so many tokens see themselves and those before them, `window` in all.
fn window_mask(window: i64, time: i64, keys: i64, device: Device) -> Result<Tensor> {
    let options = (Kind::Int64, device);
    let queries = Tensor::f_arange_start(keys - time, keys, options)?.f_unsqueeze(1)?;
    let back = queries.f_sub(&Tensor::f_arange(keys, options)?.f_unsqueeze(0)?)?;
    Ok(back.f_ge(0)?.f_logical_and(&back.f_lt(window)?)?.f_view([1, 1, time, keys])?)
}

/// Rotates the two halves of each head of `x` `[b, n, t, d]`.
fn rotate(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
    let half = x.size()[3] / 2;
    let turned = Tensor::f_cat(&[&x.f_narrow(3, half, half)?.f_neg()?, &x.f_narrow(3, 0, half)?], -1)?;
    Ok(x.f_mul(cos)?.f_add(&turned.f_mul(sin)?)?)
}

/// Token ids `[b, t]` and positions `[b, t]` to `[b, t, h]`.
///
/// # Errors
/// Where an id or a position is out of range, or libtorch fails.
pub fn embed(spec: &ModelSpec, params: &Params, tokens: &Tensor, positions: &Tensor) -> Result<Tensor> {
    let embedded = Tensor::f_embedding(params.get(Param::TokenEmbedding)?, tokens, -1, false, false)?;
    Ok(match params.find(Param::PositionEmbedding) {
        Some(table) => {
            let rows = position_rows(spec, positions)?;
            embedded.f_add(&Tensor::f_embedding(table, &rows, -1, false, false)?)?
        }
        None => embedded,
    })
}

/// The rows of the table of positions in which these stand.
///
/// # Errors
/// Where libtorch fails.
pub fn position_rows(spec: &ModelSpec, positions: &Tensor) -> Result<Tensor> {
    let offset = spec.position_offset;
    Ok(if offset == 0 { positions.shallow_clone() } else { positions.f_add_scalar(offset)? })
}

/// One block, `[b, t, h]` to `[b, t, h]`: pre-norm attention and feed-forward, each with its residual.
///
/// # Errors
/// Where libtorch fails.
pub fn block(
    spec: &ModelSpec,
    params: BlockParams<'_>,
    x: &Tensor,
    context: &AttentionContext,
    cache: Option<&mut LayerCache>,
) -> Result<Tensor> {
    let normed = params.base.norm(spec, x, Param::AttentionNormWeight, Param::AttentionNormBias)?;
    let x = x.f_add(&attention(spec, params, &normed, context, cache)?)?;
    let normed = params.base.norm(spec, &x, Param::MlpNormWeight, Param::MlpNormBias)?;
    Ok(x.f_add(&mlp(spec, params, &normed)?)?)
}

fn attention(
    spec: &ModelSpec,
    params: BlockParams<'_>,
    x: &Tensor,
    context: &AttentionContext,
    cache: Option<&mut LayerCache>,
) -> Result<Tensor> {
    let (rows, time) = (x.size()[0], x.size()[1]);
    let heads = |linear, count| -> Result<Tensor> {
        Ok(params.linear(x, linear)?.f_view([rows, time, count, spec.head_dim])?.f_transpose(1, 2)?)
    };
    let normed = |x: Tensor, weight| match params.base.find(weight) {
        Some(weight) => rms_norm(&x, weight, spec.norm_eps),
        None => Ok(x),
    };
    let mut queries = normed(heads(Linear::Query, spec.heads)?, Param::QueryNormWeight)?;
    let mut keys = normed(heads(Linear::Key, spec.kv_heads)?, Param::KeyNormWeight)?;
    let mut values = heads(Linear::Value, spec.kv_heads)?;
    if let Some(tables) = &context.rotary {
        queries = rotate(&queries, tables)?;
        keys = rotate(&keys, tables)?;
    }
    if let Some(cache) = cache {
        (keys, values) = cache.append(&keys, &values)?;
    }
    let mut grouped = spec.heads != spec.kv_heads;
    let (mask, causal) = context.sight(spec, time, &keys)?;
    if grouped && mask.is_some() && time > 1 && x.device().is_cuda() {
        // No kernel for CUDA takes a mask and shared heads at once but by the whole matrix of weights, as the plan knows.
        (keys, values, grouped) = (for_each_head(spec, &keys)?, for_each_head(spec, &values)?, false);
    }
    let mixed =
        Tensor::f_scaled_dot_product_attention(&queries, &keys, &values, mask, 0.0, causal, None::<f64>, grouped)?;
    let mixed = mixed.f_transpose(1, 2)?.f_reshape([rows, time, spec.heads * spec.head_dim])?;
    params.linear(&mixed, Linear::Output)
}

/// Keys or values `[b, kv_heads, t, d]` as `[b, heads, t, d]`, each beside the queries that share it.
fn for_each_head(spec: &ModelSpec, shared: &Tensor) -> Result<Tensor> {
    Ok(shared.f_repeat_interleave_self_int(spec.heads / spec.kv_heads, 1, None)?)
}

fn mlp(spec: &ModelSpec, params: BlockParams<'_>, x: &Tensor) -> Result<Tensor> {
    let up = params.linear(x, Linear::Up)?;
    let inner = match spec.mlp {
        Mlp::SwiGlu => params.linear(x, Linear::Gate)?.f_silu()?.f_mul(&up)?,
        Mlp::Gelu => up.f_gelu("tanh")?,
        Mlp::Relu => up.f_relu()?,
    };
    params.linear(&inner, Linear::Down)
}

/// Final norm and output head over selected positions `[n, h]`: logits `[n, v]` or scalars `[n]`, always in fp32.
/// `tied` is the token embedding where the model's head is tied to it.
///
/// # Errors
/// Where libtorch fails.
pub fn head(spec: &ModelSpec, params: &Params, tied: Option<&Tensor>, x: &Tensor) -> Result<Tensor> {
    let normed = params.norm(spec, x, Param::FinalNormWeight, Param::FinalNormBias)?;
    if let Some(weight) = params.find(Param::ScalarHeadWeight) {
        // In fp32: a score's rounding goes straight into a loss, and this costs next to nothing.
        let fp32 = |t: &Tensor| t.f_to_kind(Kind::Float);
        let bias = params.find(Param::ScalarHeadBias).map(fp32).transpose()?;
        return Ok(fp32(&normed)?.f_linear(&fp32(weight)?, bias.as_ref())?.f_squeeze_dim(-1)?);
    }
    let weight = match tied {
        Some(weight) => weight,
        None => params.get(Param::LmHeadWeight)?,
    };
    let rows = weight.size()[0];
    let weight = match spec.known_tokens {
        // The rows after these stand for no token.
        Some(known) if known < rows => &weight.f_narrow(0, 0, known)?,
        _ => weight,
    };
    Ok(normed.f_linear(weight, None::<&Tensor>)?.to_kind(Kind::Float))
}

#[cfg(test)]
mod tests {
    use super::*;

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
