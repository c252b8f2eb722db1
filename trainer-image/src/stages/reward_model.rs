//! Reward-model training from rankings (InstructGPT, section 3.4): a scalar at the last real token, a pairwise
//! logistic loss over all pairs of a ranking, and a normalisation of the score at the end (Huang 2024, detail 8).

use super::context::{Context, keyed};
use super::math::ranking_loss;
use super::supervised::{self, Objective, Schedule, part};
use crate::data::{Half, Ranking};
use crate::engine::Model;
use crate::error::Result;
use crate::model::{Batch, HeadKind, ScoreNormalisation};
use crate::telemetry::{Figure, Phase};
use rlhf_api::report::Output;
use rlhf_api::stage::RewardModel;
use std::ops::Range;
use tch::{Kind, Tensor};

/// Records whose responses give the score's normalisation, as many as Ziegler 2019 fits gain and bias on.
const REFERENCE_RECORDS: usize = 256;

/// The mean loss of rankings over the global batch.
pub(crate) struct PairwiseLogistic {
    /// Rankings to learn from.
    pub train: Half<Ranking>,
    /// Rankings to evaluate on.
    pub held_out: Half<Ranking>,
    /// Rankings that a rank runs at a time.
    pub micro_size: usize,
    /// Coefficient of the squared mean score.
    pub centering: f64,
}

/// All responses of some rankings as one batch, where each one's score is read, and which belong together.
fn collate(rankings: &[Ranking], device: tch::Device) -> (Batch, Vec<i64>, Vec<Range<usize>>) {
    let rows: Vec<&[i64]> = rankings.iter().flat_map(|r| r.responses.iter().map(Vec::as_slice)).collect();
    let batch = Batch::right_padded(&rows, device);
    let last = batch.lengths.iter().enumerate().map(|(row, n)| batch.flat_index(row, n - 1)).collect();
    let mut start = 0;
    let spans = rankings.iter().map(|r| {
        start += r.responses.len();
        start - r.responses.len()..start
    });
    (batch, last, spans.collect())
}

/// Share of a ranking's pairs that are in order (a tie counts half), and the mean gap between better and worse.
fn agreement(scores: &[f64]) -> (f64, f64) {
    let pairs = (0..scores.len()).flat_map(|i| (i + 1..scores.len()).map(move |j| scores[i] - scores[j]));
    let (mut right, mut gap, mut count) = (0.0, 0.0, 0.0);
    for d in pairs {
        right += if d > 0.0 {
            1.0
        } else if d == 0.0 {
            0.5
        } else {
            0.0
        };
        gap += d;
        count += 1.0;
    }
    (right / f64::max(count, 1.0), gap / f64::max(count, 1.0))
}

impl Objective for PairwiseLogistic {
    fn backward(&self, context: &Context, model: &mut Model, global_batch: &[usize]) -> Result<Vec<f64>> {
        let rankings = global_batch.len() as f64;
        let share: Vec<usize> = context.group.share(global_batch).into_iter().copied().collect();
        let mut sums = vec![0.0; 4];
        let rounds = context.group.rounds(global_batch.len(), self.micro_size);
        for i in 0..rounds {
            context.stop_point()?;
            let mine = self.train.rows(part(&share, i, self.micro_size))?;
            let (batch, ends, spans) = collate(&mine, model.device());
            sums[0] += batch.lengths.iter().sum::<i64>() as f64;
            model.backward(&batch, &ends, i + 1 == rounds, |scores, _| {
                let losses = spans
                    .iter()
                    .map(|s| ranking_loss(&scores.f_narrow(0, s.start as i64, s.len() as i64)?, self.centering))
                    .collect::<Result<Vec<_>>>()?;
                let loss = Tensor::f_stack(&losses, 0)?.f_sum(Kind::Float)? / rankings;
                sums[1] += loss.f_double_value(&[])?;
                let scores = Vec::<f64>::try_from(scores.f_detach()?.f_to_kind(Kind::Double)?)?;
                for (right, gap) in spans.iter().map(|s| agreement(&scores[s.clone()])) {
                    sums[2] += right / rankings;
                    sums[3] += gap / rankings;
                }
                Ok(loss)
            })?;
        }
        Ok(sums)
    }

    fn records(&self) -> usize {
        self.train.len()
    }

    fn figures(&self, sums: &[f64]) -> Vec<(Figure, f64)> {
        vec![(Figure::Loss, sums[1]), (Figure::Accuracy, sums[2]), (Figure::Margin, sums[3])]
    }

    /// Accuracy and loss, the latter without centering.
    fn evaluate(&self, context: &Context, model: &Model) -> Result<Vec<(Figure, f64)>> {
        if self.held_out.is_empty() {
            return Ok(vec![]);
        }
        let mut sums = [0.0; 2];
        for row in scores(context, model, &self.held_out, &self.held_out.all(), self.micro_size)? {
            let (right, _) = agreement(&row);
            sums[0] += right;
            sums[1] += ranking_loss(&Tensor::from_slice(&row), 0.0)?.f_double_value(&[])?;
        }
        context.group.sum(&mut sums)?;
        let n = self.held_out.len() as f64;
        Ok(vec![(Figure::EvalAccuracy, sums[0] / n), (Figure::EvalLoss, sums[1] / n)])
    }
}

/// Each ranking's scores, for this rank's share of some of the rankings.
fn scores(
    context: &Context,
    model: &Model,
    rankings: &Half<Ranking>,
    some: &[usize],
    micro_size: usize,
) -> Result<Vec<Vec<f64>>> {
    let mut all = Vec::new();
    let share: Vec<usize> = context.group.share(some).into_iter().copied().collect();
    for i in 0..context.group.rounds(some.len(), micro_size) {
        context.stop_point()?;
        let (batch, ends, spans) = collate(&rankings.rows(part(&share, i, micro_size))?, model.device());
        let flat = model.scalars(&batch, &ends)?;
        all.extend(spans.into_iter().map(|s| flat[s].to_vec()));
    }
    Ok(all)
}

/// Mean and standard deviation of the scores of reference responses: held-out ones, or the first trained ones
/// where none are held out.
fn normalisation(
    context: &Context,
    model: &Model,
    train: &Half<Ranking>,
    eval: &Half<Ranking>,
    micro_size: usize,
) -> Result<ScoreNormalisation> {
    let from = if eval.is_empty() { train } else { eval };
    let some: Vec<usize> = (0..from.len().min(REFERENCE_RECORDS)).collect();
    let flat = scores(context, model, from, &some, micro_size)?.concat();
    let mut sums = [flat.len() as f64, flat.iter().sum()];
    context.group.sum(&mut sums)?;
    let (count, mean) = (sums[0].max(1.0), sums[1] / sums[0].max(1.0));
    let mut squares = [flat.iter().map(|s| (s - mean).powi(2)).sum()];
    context.group.sum(&mut squares)?;
    let std = (squares[0] / count).sqrt();
    // Scores that are all the same have nothing to be scaled by.
    Ok(ScoreNormalisation { mean, std: if std > 1e-6 * mean.abs().max(1.0) { std } else { 1.0 } })
}

pub(super) fn run(context: &Context, settings: &RewardModel) -> Result<Output> {
    let data = context.telemetry.phase(Phase::Data, || context.dataset())?;
    let (train, held_out) = (Half::train(&data), Half::eval(&data));
    let (source, mut model) = context.start_model(HeadKind::Scalar)?;
    let micro_size = settings.batch.micro_size as usize;
    let schedule = Schedule {
        records: train.len(),
        epochs: settings.epochs,
        max_steps: settings.max_steps,
        batch: &settings.batch,
        seed: context.config.seed,
    };
    let centering = settings.centering_coefficient;
    let objective = PairwiseLogistic { train: train.clone(), held_out: held_out.clone(), micro_size, centering };
    let figures = supervised::train(context, &schedule, &settings.optimizer, &mut model, &objective)?;
    let score =
        context.telemetry.phase(Phase::Eval, || normalisation(context, &model, &train, &held_out, micro_size))?;
    // The exported layout has no place for the head's bias, so it moves into the normalisation's mean.
    let score = ScoreNormalisation { mean: score.mean - model.scalar_bias()?, ..score };
    context.export(&model, &source, Some(score), keyed(&figures))
}
