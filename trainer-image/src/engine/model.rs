//! A model placed on a device: inference, segment-wise backward, and optimizer steps.

use super::chunk::Chunk;
use super::group::Group;
use super::layout::ChunkLayout;
use crate::error::{Error, Result};
use crate::model::transformer::{self, AttentionContext, LayerCache};
use crate::model::{Batch, HeadKind, ModelSpec, Param, Segment, Source};
use c10d::AdamW;
use rlhf_api::report::ExitCode;
use rlhf_api::stage::{Optimizer, Recompute};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// The usual [`Placement::head_slice_bytes`]: 64 MiB, large enough for the kernels and small beside a model.
pub const HEAD_SLICE_BYTES: i64 = 64 << 20;

/// Where a model is placed and how it is run.
#[derive(Clone, Copy, Debug)]
pub struct Placement {
    /// The device that holds and runs it.
    pub device: Device,
    /// Whether it is trained. A frozen model has only its parameters.
    pub trainable: bool,
    /// What is kept of the forward pass for the backward pass.
    pub recompute: Recompute,
    /// The head runs over as many positions at a time as give logits of this size.
    pub head_slice_bytes: i64,
}

/// What a scalar head starts from where the checkpoint has none.
#[derive(Clone, Copy, Debug)]
pub struct ScalarInit {
    /// Seeds the weight, drawn from N(0, 1/(h+1)) (Stiennon 2020).
    pub seed: u64,
}

/// A model's chunks, in segment order, on one device.
pub struct Model {
    spec: ModelSpec,
    head: HeadKind,
    chunks: Vec<Chunk>,
    placement: Placement,
    updates: i64,
}

/// What forward keeps of one block for its backward.
struct Kept {
    input: Tensor,
    output: Option<Tensor>,
}

impl Model {
    /// Loads a model from disk, its scalar head drawn anew where the checkpoint has none.
    ///
    /// # Errors
    /// Names the tensor or file that is wrong, or says that the device has no room.
    pub fn load(source: &Source, head: HeadKind, init: ScalarInit, placement: Placement) -> Result<Self> {
        let mut chunks = Vec::new();
        for segment in source.spec.segments() {
            let specs = source.spec.params(segment, head);
            let values = source.segment(segment, head)?;
            let values: Vec<Tensor> = values
                .into_iter()
                .zip(&specs)
                .map(|(v, s)| v.map_or_else(|| scalar_init(&source.spec, s.param, &s.shape, init), Ok))
                .collect::<Result<_>>()?;
            chunks.push(Chunk::new(ChunkLayout::new(specs), &values, placement.device, placement.trainable)?);
        }
        Ok(Self { spec: source.spec.clone(), head, chunks, placement, updates: 0 })
    }

    /// The model's shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// What stands on top.
    pub fn head_kind(&self) -> HeadKind {
        self.head
    }

    /// The device that holds it.
    pub fn device(&self) -> Device {
        self.placement.device
    }

    /// Optimizer steps made so far.
    pub fn updates(&self) -> i64 {
        self.updates
    }

    /// The chunks in segment order.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Says how many optimizer steps a restored state has seen.
    pub fn set_updates(&mut self, updates: i64) {
        self.updates = updates;
    }

    /// The parameters by segment, as views.
    pub fn parameters(&self) -> Vec<(Segment, Vec<Tensor>)> {
        self.spec
            .segments()
            .into_iter()
            .zip(&self.chunks)
            .map(|(s, c)| (s, c.params().tensors().map(Tensor::shallow_clone).collect()))
            .collect()
    }

    fn head_chunk(&self) -> &Chunk {
        &self.chunks[self.spec.layers + 1]
    }

    fn tied(&self) -> Result<Option<&Tensor>> {
        let tied = self.head == HeadKind::Lm && self.spec.tied_head;
        tied.then(|| self.chunks[0].params().get(Param::TokenEmbedding)).transpose()
    }

    /// The last block's output `[b, t, h]`, without a graph.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn hidden(&self, batch: &Batch) -> Result<Tensor> {
        let context = AttentionContext::new(&self.spec, &batch.positions, batch.mask.as_ref())?;
        self.run(&batch.tokens, &batch.positions, &context, None)
    }

    /// As [`Model::hidden`] for the next tokens `[b, t]` of rows whose past is in `caches` (one a block), which grow by them.
    /// `mask` `[b, 1, t, past + t]` says what each may see; without one, a single token sees
    /// everything and several see what the causal rule allows.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn hidden_cached(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        mask: Option<&Tensor>,
        caches: &mut [LayerCache],
    ) -> Result<Tensor> {
        let context = AttentionContext::new(&self.spec, positions, mask)?;
        self.run(tokens, positions, &context, Some(caches))
    }

    fn run(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        context: &AttentionContext,
        mut caches: Option<&mut [LayerCache]>,
    ) -> Result<Tensor> {
        tch::no_grad(|| {
            let mut x = transformer::embed(self.chunks[0].params(), tokens, positions)?;
            for i in 0..self.spec.layers {
                let cache = caches.as_deref_mut().and_then(|c| c.get_mut(i));
                x = transformer::block(&self.spec, self.chunks[i + 1].params(), &x, context, cache)?;
            }
            Ok(x)
        })
    }

    /// Runs the head over `rows` (indices into the flattened `[b * t]` of `hidden`), slice by slice: `visit` gets the
    /// head's output (logits `[n, v]` or scalars `[n]`) and which of `rows` it belongs to.
    ///
    /// # Errors
    /// Where libtorch or `visit` fails.
    pub fn visit_head(
        &self,
        hidden: &Tensor,
        rows: &[i64],
        mut visit: impl FnMut(&Tensor, Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let flat = hidden.f_reshape([-1, self.spec.hidden])?;
        tch::no_grad(|| {
            for range in self.slices(rows.len()) {
                let x = flat.f_index_select(0, &self.indices(&rows[range.clone()]))?;
                visit(&transformer::head(&self.spec, self.head_chunk().params(), self.tied()?, &x)?, range)?;
            }
            Ok(())
        })
    }

    /// A scalar model's output at `rows` of a batch.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn scalars(&self, batch: &Batch, rows: &[i64]) -> Result<Vec<f64>> {
        let mut all = Vec::with_capacity(rows.len());
        self.visit_head(&self.hidden(batch)?, rows, |out, _| {
            all.extend(Vec::<f64>::try_from(out.f_to_kind(Kind::Double)?)?);
            Ok(())
        })?;
        Ok(all)
    }

    fn indices(&self, rows: &[i64]) -> Tensor {
        Tensor::from_slice(rows).to_device(self.placement.device)
    }

    fn slices(&self, rows: usize) -> Vec<Range<usize>> {
        let width = if self.head == HeadKind::Lm { self.spec.vocab } else { 1 };
        let step = (self.placement.head_slice_bytes / (width * size_of::<f32>() as i64)).max(1) as usize;
        (0..rows).step_by(step).map(|start| start..(start + step).min(rows)).collect()
    }

    /// Forward and backward over one micro-batch: adds the gradients of the sum of `loss` over slices of `rows`.
    ///
    /// `loss` gets the head's output for a slice and which of `rows` it is, and returns a scalar tensor. With `last`
    /// (the step's last micro-batch on this rank) each chunk's reduction starts as soon as its gradient is whole.
    ///
    /// # Errors
    /// Where libtorch or `loss` fails, or a peer was lost.
    pub fn backward(
        &mut self,
        group: &Group,
        batch: &Batch,
        rows: &[i64],
        last: bool,
        loss: impl FnMut(&Tensor, Range<usize>) -> Result<Tensor>,
    ) -> Result<()> {
        let context = AttentionContext::new(&self.spec, &batch.positions, batch.mask.as_ref())?;
        let (mut kept, output) = self.forward_kept(batch, &context)?;
        let mut upstream = self.head_backward(&output, rows, loss)?;
        self.reduce_if(last, self.spec.layers + 1, group)?;
        while let Some(segment) = kept.pop() {
            let i = kept.len();
            upstream = self.block_backward(i, segment, &upstream, &context)?;
            self.reduce_if(last, i + 1, group)?;
        }
        self.embed_backward(batch, &upstream)?;
        self.reduce_if(last, 0, group)
    }

    /// A step's last micro-batch on a rank that has no data for it: takes part in the reductions, in their order.
    ///
    /// # Errors
    /// A peer was lost.
    pub fn backward_nothing(&mut self, group: &Group) -> Result<()> {
        (0..self.chunks.len()).rev().try_for_each(|i| self.reduce_if(true, i, group))
    }

    fn reduce_if(&mut self, last: bool, chunk: usize, group: &Group) -> Result<()> {
        if last { self.chunks[chunk].start_reduction(group) } else { Ok(()) }
    }

    fn forward_kept(&self, batch: &Batch, context: &AttentionContext) -> Result<(Vec<Kept>, Tensor)> {
        let mut kept = Vec::with_capacity(self.spec.layers);
        let mut x = tch::no_grad(|| transformer::embed(self.chunks[0].params(), &batch.tokens, &batch.positions))?;
        for i in 0..self.spec.layers {
            let input = x.f_detach()?.f_set_requires_grad(true)?;
            let run = || transformer::block(&self.spec, self.chunks[i + 1].params(), &input, context, None);
            let (output, keep) = match self.placement.recompute {
                Recompute::Block => (tch::no_grad(run)?, false),
                Recompute::None => (run()?, true),
            };
            x = output.f_detach()?;
            kept.push(Kept { input, output: keep.then_some(output) });
        }
        Ok((kept, x))
    }

    /// The gradient with regard to `hidden` `[b, t, h]`; those of the head (and of a tied embedding) are accumulated.
    fn head_backward(
        &mut self,
        hidden: &Tensor,
        rows: &[i64],
        mut loss: impl FnMut(&Tensor, Range<usize>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let flat = hidden.f_reshape([-1, self.spec.hidden])?;
        let mut upstream = flat.f_zeros_like()?;
        for range in self.slices(rows.len()) {
            let indices = self.indices(&rows[range.clone()]);
            let x = flat.f_index_select(0, &indices)?.f_set_requires_grad(true)?;
            let tied = self.tied()?;
            let out = transformer::head(&self.spec, self.head_chunk().params(), tied, &x)?;
            let value = loss(&out, range)?;
            let inputs: Vec<&Tensor> =
                std::iter::once(&x).chain(self.head_chunk().params().tensors()).chain(tied).collect();
            let mut gradients = c10d::grad(&[&value], &[&value.f_ones_like()?], &inputs, false)?;
            let of_tied = tied.is_some().then(|| gradients.pop()).flatten();
            self.chunks[self.spec.layers + 1].accumulate(&gradients[1..])?;
            self.chunks[0].accumulate(&of_tied)?;
            if let Some(gradient) = gradients[0].take() {
                let _ = upstream.f_index_add_(0, &indices, &gradient)?;
            }
        }
        Ok(upstream.f_view_as(hidden)?)
    }

    fn block_backward(
        &mut self,
        i: usize,
        kept: Kept,
        upstream: &Tensor,
        context: &AttentionContext,
    ) -> Result<Tensor> {
        let output = match kept.output {
            Some(output) => output,
            None => transformer::block(&self.spec, self.chunks[i + 1].params(), &kept.input, context, None)?,
        };
        let inputs: Vec<&Tensor> = std::iter::once(&kept.input).chain(self.chunks[i + 1].params().tensors()).collect();
        let mut gradients = c10d::grad(&[&output], &[upstream], &inputs, false)?;
        self.chunks[i + 1].accumulate(&gradients[1..])?;
        gradients[0].take().ok_or_else(|| Error::bug("a block's output does not depend on its input"))
    }

    fn embed_backward(&mut self, batch: &Batch, upstream: &Tensor) -> Result<()> {
        let output = transformer::embed(self.chunks[0].params(), &batch.tokens, &batch.positions)?;
        let inputs: Vec<&Tensor> = self.chunks[0].params().tensors().collect();
        let gradients = c10d::grad(&[&output], &[upstream], &inputs, false)?;
        self.chunks[0].accumulate(&gradients)
    }

    /// Waits for the reductions, clips by the global norm and makes one AdamW step; returns the norm before clipping.
    ///
    /// # Errors
    /// Where a peer was lost, or the gradient is not finite (the parameters are then as they were).
    pub fn step(&mut self, settings: &Optimizer, learning_rate: f64) -> Result<f64> {
        let norms = self.chunks.iter_mut().map(Chunk::finish_reduction).collect::<Result<Vec<_>>>()?;
        let norms: Vec<Tensor> = norms.into_iter().flatten().collect();
        let norm = Tensor::f_stack(&norms, 0)?.f_sum(Kind::Double)?.f_sqrt()?.f_double_value(&[])?;
        if !norm.is_finite() {
            return Err(Error::new(
                ExitCode::NotFinite,
                format!("the gradient's norm is {norm} at optimizer step {}", self.updates + 1),
            ));
        }
        // As torch.nn.utils.clip_grad_norm_.
        let scale = (settings.max_grad_norm / (norm + 1e-6)).min(1.0);
        let adamw = AdamW {
            lr: learning_rate,
            beta1: settings.beta1,
            beta2: settings.beta2,
            epsilon: settings.epsilon,
            weight_decay: 0.0,
        };
        self.updates += 1;
        for chunk in &mut self.chunks {
            chunk.optimize(&adamw, settings.weight_decay, scale, self.updates)?;
        }
        Ok(norm)
    }

    /// Rewrites a scalar head `w x + b` as `(w x + b - mean) / std`, so that a critic starts in units of normalised scores.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn fold_normalisation(&mut self, mean: f64, std: f64) -> Result<()> {
        let params = self.head_chunk().params();
        let (weight, bias) = (params.get(Param::ScalarHeadWeight)?, params.get(Param::ScalarHeadBias)?);
        tch::no_grad(|| {
            let _ = weight.shallow_clone().f_div_scalar_(std)?;
            let _ = bias.shallow_clone().f_sub_scalar_(mean)?.f_div_scalar_(std)?;
            Ok(())
        })
    }
}

/// The scalar head's start: weight from N(0, 1/(h+1)), bias 0.
fn scalar_init(spec: &ModelSpec, param: Param, shape: &[i64], init: ScalarInit) -> Result<Tensor> {
    if param != Param::ScalarHeadWeight {
        return Ok(Tensor::f_zeros(shape, (Kind::Float, Device::Cpu))?);
    }
    let numel: i64 = shape.iter().product();
    let std = 1.0 / ((spec.hidden + 1) as f64).sqrt();
    let values: Vec<f32> = (0..numel).map(|i| (std * crate::random::normal(&[init.seed, i as u64])) as f32).collect();
    Ok(Tensor::from_slice(&values).f_view(shape)?)
}
