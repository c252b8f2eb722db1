//! Supervised fine-tuning: cross entropy on the response's tokens, averaged over the valid tokens of the whole
//! global batch (InstructGPT, section 3.5).

use super::context::{Context, keyed};
use super::supervised::{self, Objective, Schedule, part};
use crate::data::{Half, SftSample};
use crate::engine::Model;
use crate::error::Result;
use crate::model::{Batch, HeadKind};
use crate::telemetry::{Figure, Phase};
use rlhf_api::report::Output;
use rlhf_api::stage::Sft;
use tch::{Reduction, Tensor};

/// The summed loss of targets over the global batch's targets.
pub(crate) struct CrossEntropy {
    /// Samples to learn from, in rows.
    pub train: Half<SftSample>,
    /// Samples to evaluate on.
    pub held_out: Half<SftSample>,
    /// Rows that a rank runs at a time.
    pub micro_size: usize,
}

/// Samples as a batch, the positions that predict a target, and those targets.
fn collate(samples: &[SftSample], packed: bool, device: tch::Device) -> (Batch, Vec<i64>, Vec<i64>) {
    let rows: Vec<&[i64]> = samples.iter().map(|s| s.tokens.as_slice()).collect();
    let batch = if packed { Batch::packed(&rows, device) } else { Batch::right_padded(&rows, device) };
    let (mut positions, mut targets) = (Vec::new(), Vec::new());
    for (row, sample) in samples.iter().enumerate() {
        for i in (1..sample.tokens.len()).filter(|&i| sample.target[i]) {
            positions.push(batch.flat_index(row, i as i64 - 1));
            targets.push(sample.tokens[i]);
        }
    }
    (batch, positions, targets)
}

impl CrossEntropy {
    /// How many tokens of some rows are to be learnt.
    fn targets(rows: &Half<SftSample>, of: impl IntoIterator<Item = usize>) -> Result<usize> {
        of.into_iter().map(|row| rows.target_count(row)).sum()
    }
}

/// The softmax is over all rows of the output matrix, as in `transformers`, those of a padded vocabulary included that stand for
/// no token: learning makes these unlikely, for whoever runs the model and draws from all. (PPO and generation leave them out,
/// [`crate::model::ModelSpec::known_tokens`].)
fn summed_loss(logits: &Tensor, targets: &[i64]) -> Result<Tensor> {
    let targets = Tensor::from_slice(targets).to_device(logits.device());
    Ok(logits.f_cross_entropy_loss(&targets, None::<&Tensor>, Reduction::Sum, -100, 0.0)?)
}

impl Objective for CrossEntropy {
    fn backward(&self, context: &Context, model: &mut Model, global_batch: &[usize]) -> Result<Vec<f64>> {
        let valid = Self::targets(&self.train, global_batch.iter().copied())?.max(1) as f64;
        let share: Vec<usize> = context.group.share(global_batch).into_iter().copied().collect();
        let (mut loss, mut tokens) = (0.0, 0);
        let rounds = context.group.rounds(global_batch.len(), self.micro_size);
        for i in 0..rounds {
            context.stop_point()?;
            let samples = self.train.rows(part(&share, i, self.micro_size))?;
            let (batch, positions, targets) = collate(&samples, self.train.is_packed(), model.device());
            tokens += batch.lengths.iter().sum::<i64>();
            model.backward(&batch, &positions, i + 1 == rounds, |logits, range| {
                let slice = summed_loss(logits, &targets[range])? / valid;
                loss += slice.f_double_value(&[])?;
                Ok(slice)
            })?;
        }
        Ok(vec![tokens as f64, loss])
    }

    fn records(&self) -> usize {
        self.train.len()
    }

    fn figures(&self, sums: &[f64]) -> Vec<(Figure, f64)> {
        vec![(Figure::Loss, sums[1]), (Figure::Perplexity, sums[1].exp())]
    }

    /// Mean cross entropy and perplexity.
    fn evaluate(&self, context: &Context, model: &Model) -> Result<Vec<(Figure, f64)>> {
        if self.held_out.is_empty() {
            return Ok(vec![]);
        }
        let share: Vec<usize> = context.group.share(&self.held_out.all()).into_iter().copied().collect();
        let mut sums = [0.0, Self::targets(&self.held_out, share.iter().copied())? as f64];
        for i in 0..context.group.rounds(self.held_out.len(), self.micro_size) {
            context.stop_point()?;
            let samples = self.held_out.rows(part(&share, i, self.micro_size))?;
            let (batch, positions, targets) = collate(&samples, self.held_out.is_packed(), model.device());
            model.visit_head(&model.hidden(&batch)?, &positions, |logits, range| {
                sums[0] += summed_loss(logits, &targets[range])?.f_double_value(&[])?;
                Ok(())
            })?;
        }
        context.group.sum(&mut sums)?;
        let loss = sums[0] / sums[1].max(1.0);
        Ok(vec![(Figure::EvalLoss, loss), (Figure::EvalPerplexity, loss.exp())])
    }
}

pub(super) fn run(context: &Context, settings: &Sft) -> Result<Output> {
    let data = context.telemetry.phase(Phase::Data, || context.dataset())?;
    let (train, held_out) = (Half::train(&data), Half::eval(&data));
    let (source, mut model) = context.start_model(HeadKind::Lm)?;
    let micro_size = settings.batch.micro_size as usize;
    let schedule = Schedule {
        records: train.len(),
        epochs: settings.epochs,
        max_steps: settings.max_steps,
        batch: &settings.batch,
        seed: context.config.seed,
    };
    let objective = CrossEntropy { train, held_out, micro_size };
    let figures = supervised::train(context, &schedule, &settings.optimizer, &mut model, &objective)?;
    context.export(&model, &source, None, keyed(&figures))
}
