//! Generation with a key and value cache, over the same segments that train.
//!
//! Prompts are padded on the left so that every row goes on at the same column; token ids are kept and never
//! made again from text. What is drawn for a row depends on its own coordinates only (see [`crate::random`]),
//! not on the rank that draws it (the batch it is in can only round the last bit of a probability).

mod sampler;

pub use sampler::Decoding;
use sampler::Drawn;

use crate::engine::Model;
use crate::error::{Error, Result};
use crate::model::Batch;
use crate::model::transformer::LayerCache;
use memory_plan::ROLLOUT_ROWS;
use tch::{Kind, Tensor};

/// A prompt and the number under which its random draws are made.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The prompt's tokens, at least one.
    pub prompt: &'a [i64],
    /// The row's coordinate in random draws.
    pub id: u64,
}

/// What a model answered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Response {
    /// The new tokens, the end-of-sequence token included.
    pub tokens: Vec<i64>,
    /// Their log-probabilities under the model's whole law at the temperature of decoding, as the sampler had them.
    pub log_p: Vec<f64>,
    /// Whether the last token ends the sequence.
    pub ended: bool,
}

/// Answers every request with at most `max_new_tokens` tokens, stopping at any of `ends`. Where `stop` says so (on any of the ranks
/// that must run the model together), it ends before the next token, and answers are short or missing.
///
/// # Errors
/// Where prompt and answer exceed the model's positions, or libtorch fails.
pub fn generate(
    model: &Model,
    requests: &[Request<'_>],
    decoding: &Decoding,
    ends: &[i64],
    max_new_tokens: usize,
    stop: &dyn Fn() -> bool,
) -> Result<Vec<Response>> {
    let mut responses = Vec::with_capacity(requests.len());
    let mut parts = requests.chunks(ROLLOUT_ROWS as usize);
    loop {
        let part = parts.next();
        if !goes_on(model, part.is_some(), stop)? {
            return Ok(responses);
        }
        match part {
            Some(part) => {
                let generation = Generation::start(model, part, max_new_tokens)?;
                responses.extend(generation.run(decoding, ends, max_new_tokens, stop)?);
            }
            None => keep_step(model, decoding, ends, max_new_tokens, stop)?,
        }
    }
}

/// Whether any of the ranks that must run the model together is `busy` and none is to stop; on a rank that runs it alone,
/// whether that holds here.
fn goes_on(model: &Model, busy: bool, stop: &dyn Fn() -> bool) -> Result<bool> {
    let mut votes = [busy, stop()].map(|vote| f64::from(u8::from(vote)));
    if model.runs_in_step() {
        model.group().sum(&mut votes)?;
    }
    Ok(votes[0] > 0.0 && votes[1] == 0.0)
}

/// Runs the model as often as the other ranks do, over a row that nobody asked for.
fn keep_step(
    model: &Model,
    decoding: &Decoding,
    ends: &[i64],
    max_new_tokens: usize,
    stop: &dyn Fn() -> bool,
) -> Result<()> {
    let mut generation = Generation::start(model, &[Request { prompt: &[0], id: 0 }], max_new_tokens)?;
    generation.responses[0].ended = true;
    generation.run(decoding, ends, max_new_tokens, stop)?;
    Ok(())
}

/// Rows that are generated together. `active[i]` says which request row `i` of the tensors answers: rows that
/// have ended are dropped from the tensors once they are half of them.
struct Generation<'a> {
    model: &'a Model,
    requests: &'a [Request<'a>],
    caches: Vec<LayerCache>,
    /// Which columns of the cache each row may see `[b, capacity]`, where any row is padded.
    visible: Option<Tensor>,
    active: Vec<usize>,
    columns: i64,
    /// The last position's output `[b, h]`.
    hidden: Tensor,
    responses: Vec<Response>,
}

impl<'a> Generation<'a> {
    /// Runs the prompts through the model.
    fn start(model: &'a Model, requests: &'a [Request<'a>], max_new_tokens: usize) -> Result<Self> {
        let rows: Vec<&[i64]> = requests.iter().map(|r| r.prompt).collect();
        let batch = Batch::left_padded(&rows, model.device());
        let (time, capacity) = (batch.time(), batch.time() + max_new_tokens as i64);
        if batch.lengths.contains(&0) || capacity > model.spec().max_positions {
            return Err(Error::config(format!(
                "prompts of 1 to {time} tokens and {max_new_tokens} new ones do not fit {} positions",
                model.spec().max_positions
            )));
        }
        let mut caches = (0..model.spec().layers)
            .map(|_| LayerCache::new(model.spec(), batch.rows(), capacity, model.kind(), model.device()))
            .collect::<Result<Vec<_>>>()?;
        let hidden = model.hidden_cached(&batch.tokens, &batch.positions, batch.mask.as_ref(), &mut caches)?;
        let visible = batch.mask.as_ref().map(|mask| columns_seen(mask, capacity)).transpose()?;
        let responses = vec![Response::default(); requests.len()];
        Ok(Self {
            model,
            requests,
            caches,
            visible,
            active: (0..requests.len()).collect(),
            columns: time,
            hidden: hidden.f_select(1, time - 1)?,
            responses,
        })
    }

    fn run(
        mut self,
        decoding: &Decoding,
        ends: &[i64],
        max_new_tokens: usize,
        stop: &dyn Fn() -> bool,
    ) -> Result<Vec<Response>> {
        for step in 0..max_new_tokens {
            let drawn = self.draw(decoding, step)?;
            for (&request, (&token, &log_p)) in self.active.iter().zip(drawn.tokens.iter().zip(&drawn.log_p)) {
                let response = &mut self.responses[request];
                if !response.ended {
                    response.tokens.push(token);
                    response.log_p.push(log_p);
                    response.ended = ends.contains(&token);
                }
            }
            let going = self.active.iter().filter(|&&r| !self.responses[r].ended).count();
            if !goes_on(self.model, going > 0, stop)? || step + 1 == max_new_tokens {
                break;
            }
            let next = self.drop_ended(drawn.tokens, going)?;
            self.advance(&next)?;
        }
        Ok(self.responses)
    }

    /// One token for each row still in the tensors.
    fn draw(&self, decoding: &Decoding, step: usize) -> Result<Drawn> {
        let rows: Vec<i64> = (0..self.active.len() as i64).collect();
        let mut all = Drawn::default();
        self.model.visit_head(&self.hidden, &rows, |logits, range| {
            let ids: Vec<u64> = self.active[range].iter().map(|&r| self.requests[r].id).collect();
            let Drawn { tokens, log_p } = decoding.pick(logits, &ids, step as u64)?;
            all.tokens.extend(tokens);
            all.log_p.extend(log_p);
            Ok(())
        })?;
        Ok(all)
    }

    /// Drops ended rows from the tensors where they are at least half; returns the tokens of the rows that are left.
    fn drop_ended(&mut self, next: Vec<i64>, going: usize) -> Result<Vec<i64>> {
        if going * 2 > self.active.len() || self.active.len() == 1 {
            return Ok(next);
        }
        let mut keep: Vec<usize> = (0..self.active.len()).filter(|&i| !self.responses[self.active[i]].ended).collect();
        if keep.is_empty() {
            // Other ranks go on, and this one with them.
            keep.push(0);
        }
        let rows =
            Tensor::from_slice(&keep.iter().map(|&i| i as i64).collect::<Vec<_>>()).to_device(self.model.device());
        self.caches.iter_mut().try_for_each(|c| c.keep_rows(&rows))?;
        self.visible = self.visible.as_ref().map(|v| v.f_index_select(0, &rows)).transpose()?;
        self.active = keep.iter().map(|&i| self.active[i]).collect();
        Ok(keep.into_iter().map(|i| next[i]).collect())
    }

    /// Runs the drawn tokens through the model.
    fn advance(&mut self, next: &[i64]) -> Result<()> {
        let position =
            |&request: &usize| (self.requests[request].prompt.len() + self.responses[request].tokens.len()) as i64 - 1;
        let positions: Vec<i64> = self.active.iter().map(position).collect();
        let column = |data: &[i64]| Tensor::from_slice(data).view([-1, 1]).to_device(self.model.device());
        self.columns += 1;
        let mask = self
            .visible
            .as_ref()
            .map(|v| Ok::<_, Error>(v.f_narrow(1, 0, self.columns)?.f_unsqueeze(1)?.f_unsqueeze(1)?))
            .transpose()?;
        let hidden = self.model.hidden_cached(&column(next), &column(&positions), mask.as_ref(), &mut self.caches)?;
        self.hidden = hidden.f_select(1, 0)?;
        Ok(())
    }
}

/// From the prompts' mask `[b, 1, t, t]`, the cache columns each row may see `[b, capacity]`: its real tokens and all new ones.
fn columns_seen(mask: &Tensor, capacity: i64) -> Result<Tensor> {
    let (rows, time) = (mask.size()[0], mask.size()[3]);
    let prompt = mask.f_select(2, time - 1)?.f_squeeze_dim(1)?;
    let new = Tensor::f_ones([rows, capacity - time], (Kind::Bool, mask.device()))?;
    Ok(Tensor::f_cat(&[&prompt, &new], 1)?)
}
