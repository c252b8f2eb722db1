//! The mathematics of each segment, over views of its parameters. Nothing here knows of ranks or shards.

use super::attention::{cap, mix};
use super::dropout::Dropout;
use super::{Mlp, ModelSpec, Norm, Param};
use crate::error::{Error, Result};
use rlhf_api::stage::Linear;
use tch::{Kind, Tensor};

pub use super::attention::{AttentionContext, LayerCache};

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
            Norm::Rms => rms_norm(spec, x, weight)?,
        })
    }
}

/// Root-mean-square norm over the last dimension (Zhang and Sennrich 2019), in fp32.
fn rms_norm(spec: &ModelSpec, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let x32 = x.to_kind(Kind::Float);
    let variance = x32.f_square()?.f_mean_dim([-1].as_slice(), true, Kind::Float)?;
    let scaled = x32.f_mul(&(variance + spec.norm_eps).f_rsqrt()?)?;
    if spec.traits.norms_from_one {
        return Ok(scaled.f_mul(&weight.f_to_kind(Kind::Float)?.f_add_scalar(1.0)?)?.f_to_kind(x.kind())?);
    }
    Ok(scaled.to_kind(x.kind()).f_mul(weight)?)
}

/// What a block runs with: its own parameters, and its adapters where it has some.
#[derive(Clone, Copy, Debug)]
pub struct BlockParams<'p> {
    /// Its own parameters.
    pub base: &'p Params,
    /// Its adapters.
    pub adapter: Option<Adapter<'p>>,
    /// Which block it is.
    pub index: usize,
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

/// Token ids `[b, t]` and positions `[b, t]` to `[b, t, h]`.
///
/// # Errors
/// Where an id or a position is out of range, or libtorch fails.
pub fn embed(spec: &ModelSpec, params: &Params, tokens: &Tensor, positions: &Tensor) -> Result<Tensor> {
    let embedded = refine(spec, params, &token_rows(params, tokens)?)?;
    Ok(match params.find(Param::PositionEmbedding) {
        Some(table) => {
            let rows = position_rows(spec, positions)?;
            embedded.f_add(&Tensor::f_embedding(table, &rows, -1, false, false)?)?
        }
        None => embedded,
    })
}

/// The rows of the token embedding for ids `[b, t]`.
///
/// # Errors
/// Where an id is out of range, or libtorch fails.
pub fn token_rows(params: &Params, tokens: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_embedding(params.get(Param::TokenEmbedding)?, tokens, -1, false, false)?)
}

/// What becomes of rows of the token embedding on their way to the first block.
///
/// # Errors
/// Where libtorch fails.
pub fn refine(spec: &ModelSpec, params: &Params, rows: &Tensor) -> Result<Tensor> {
    let mut x = scale_embedding(spec, rows)?;
    if let Some(weight) = params.find(Param::EmbedProjection) {
        x = x.f_linear(weight, None::<&Tensor>)?;
    }
    if params.find(Param::EmbedNormWeight).is_some() {
        x = params.norm(spec, &x, Param::EmbedNormWeight, Param::EmbedNormBias)?;
    }
    Ok(x)
}

/// Rows of the token embedding, or their gradient, times what they are multiplied by, which has their number format.
///
/// # Errors
/// Where libtorch fails.
pub fn scale_embedding(spec: &ModelSpec, rows: &Tensor) -> Result<Tensor> {
    match spec.embed_scale {
        Some(scale) => Ok(rows.f_mul(&Tensor::f_full([1], scale, (rows.kind(), rows.device()))?)?),
        None => Ok(rows.shallow_clone()),
    }
}

/// The rows of the table of positions in which these stand.
///
/// # Errors
/// Where libtorch fails.
pub fn position_rows(spec: &ModelSpec, positions: &Tensor) -> Result<Tensor> {
    let offset = spec.position_offset;
    Ok(if offset == 0 { positions.shallow_clone() } else { positions.f_add_scalar(offset)? })
}

/// One block, `[b, t, h]` to `[b, t, h]`: attention and feed-forward, each with its residual and its norms.
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
    let norms = [Param::AttentionNormWeight, Param::AttentionNormBias, Param::AttentionPostNormWeight];
    let x = residual(spec, params.base, x, norms, |x| attention(spec, params, x, context, cache))?;
    let norms = [Param::MlpNormWeight, Param::MlpNormBias, Param::MlpPostNormWeight];
    residual(spec, params.base, &x, norms, |x| mlp(spec, params, x))
}

/// `x` and what a `part` of the block makes of it, with their norms: weight and bias of one, weight of what is added.
fn residual(
    spec: &ModelSpec,
    params: &Params,
    x: &Tensor,
    [weight, bias, post]: [Param; 3],
    part: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    if spec.norms_after {
        return params.norm(spec, &x.f_add(&part(x)?)?, weight, bias);
    }
    let added = part(&params.norm(spec, x, weight, bias)?)?;
    let added = match params.find(post) {
        Some(weight) => rms_norm(spec, &added, weight)?,
        None => added,
    };
    Ok(x.f_add(&added)?)
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
    let turned = |x: Tensor, norm| {
        let x = match params.base.find(norm) {
            Some(weight) => rms_norm(spec, &x, weight)?,
            None => x,
        };
        context.turn(spec, params.index, x)
    };
    let queries = turned(heads(Linear::Query, spec.heads)?, Param::QueryNormWeight)?;
    let mut keys = turned(heads(Linear::Key, spec.kv_heads)?, Param::KeyNormWeight)?;
    let mut values = heads(Linear::Value, spec.kv_heads)?;
    if let Some(cache) = cache {
        (keys, values) = cache.append(&keys, &values)?;
    }
    let mixed = mix(spec, params.index, context, &queries, keys, values)?;
    let mixed = mixed.f_transpose(1, 2)?.f_reshape([rows, time, spec.heads * spec.head_dim])?;
    params.linear(&mixed, Linear::Output)
}

fn mlp(spec: &ModelSpec, params: BlockParams<'_>, x: &Tensor) -> Result<Tensor> {
    let up = params.linear(x, Linear::Up)?;
    let inner = match spec.mlp {
        Mlp::SwiGlu => {
            let gate = params.linear(x, Linear::Gate)?;
            let gate = if spec.gelu_gate { gate.f_gelu("tanh")? } else { gate.f_silu()? };
            gate.f_mul(&up)?
        }
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
    let mut normed = match params.find(Param::FinalNormWeight) {
        Some(_) => params.norm(spec, x, Param::FinalNormWeight, Param::FinalNormBias)?,
        None => x.shallow_clone(),
    };
    if let Some(weight) = params.find(Param::HeadProjection) {
        normed = normed.f_linear(weight, None::<&Tensor>)?;
    }
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
    let logits = normed.f_linear(weight, None::<&Tensor>)?.to_kind(Kind::Float);
    Ok(match spec.traits.logit_cap {
        Some(limit) => cap(logits, limit)?,
        None => logits,
    })
}
