//! Experience: answers to prompts with everything that learning needs to know about each token.

use super::Run;
use crate::data::Prompt;
use crate::engine::{Group, Model};
use crate::error::{Error, Result};
use crate::model::Batch;
use crate::rollout::{Decoding, Request, generate};
use crate::stages::math::{entropy, kl_estimate, log_probabilities};
use crate::telemetry::Phase;
use rlhf_api::report::ExitCode;
use std::time::Instant;
use tch::{Kind, Tensor};

/// Characters of a prompt that an error shows.
const PROMPT_CHARS: usize = 200;

/// One answered prompt. Vectors hold one number a response token.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Experience {
    /// Prompt and response.
    pub tokens: Vec<i64>,
    /// Tokens of the prompt.
    pub prompt_len: usize,
    /// Whether the response ends with the end-of-sequence token.
    pub ended: bool,
    /// The weighted sum of the rewards' scores, clipped or replaced as the settings ask.
    pub score: f64,
    /// The normalised score by each reward model.
    pub scores: Vec<f64>,
    /// Sum of the policy's entropies at the response's tokens.
    pub entropy: f64,
    /// Log-probability under the policy that drew the token, as scoring has it.
    pub log_p: Vec<f64>,
    /// Sum and maximum over tokens of the difference between that and what the sampler had.
    pub sampler_gap: [f64; 2],
    /// Log-probability under the reference.
    pub reference_log_p: Vec<f64>,
    /// Estimated KL to the reference (the settings' estimator).
    pub kl: Vec<f64>,
    /// The critic's value before the token; none without a critic.
    pub values: Vec<f64>,
    /// Advantages, as they enter the loss.
    pub advantages: Vec<f64>,
    /// Advantages before whitening plus values: what the critic should have said; none without a critic.
    pub returns: Vec<f64>,
    /// Returns minus values.
    pub value_errors: Vec<f64>,
}

impl Experience {
    /// Tokens of the response.
    pub fn response_len(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// The response's tokens.
    pub fn response(&self) -> &[i64] {
        &self.tokens[self.prompt_len..]
    }
}

/// The mean of something over responses.
pub(super) fn mean(experience: &[Experience], of: impl Fn(&Experience) -> f64) -> f64 {
    experience.iter().map(of).sum::<f64>() / experience.len().max(1) as f64
}

impl Run<'_> {
    /// Answers and scores prompts: each rank its share, every rank gets all, in the prompts' order. Also returns the
    /// tokens drawn a second over all ranks. `phases` are those to which answering and scoring count.
    pub(super) fn roll_out(
        &self,
        prompts: &[(u64, Prompt)],
        stream: [u64; 2],
        phases: [Phase; 2],
    ) -> Result<(Vec<Experience>, f64)> {
        let started = Instant::now();
        let decoding = Decoding::Sample { sampling: self.settings.sampling.clone(), stream };
        let share = self.context.group.share(prompts);
        let mut mine = self.context.telemetry.phase(phases[0], || self.answer(&share, &decoding))?;
        let seconds = started.elapsed().as_secs_f64();
        self.context.telemetry.phase(phases[1], || {
            let size = self.settings.batch.micro_size as usize;
            let mut parts = mine.chunks_mut(size);
            (0..self.context.group.rounds(prompts.len(), size)).try_for_each(|_| {
                // The first of these also ends the rollout of a rank that was asked to stop in it.
                self.context.stop_point()?;
                self.score(parts.next().unwrap_or_default())
            })
        })?;
        let columns = self.settings.max_prompt_length as usize + self.settings.max_new_tokens as usize;
        let shape = RowShape {
            max_tokens: columns,
            max_new: self.settings.max_new_tokens as usize,
            rewards: self.models.rewards.len(),
            critic: self.models.critic.is_some(),
        };
        let mut all = gather(&self.context.group, &mine, prompts.len(), shape)?;
        let estimator = self.settings.kl.estimator;
        for e in &mut all {
            let log_ratios = e.log_p.iter().zip(&e.reference_log_p).map(|(actor, reference)| actor - reference);
            e.kl = log_ratios.map(|d| kl_estimate(estimator, d)).collect();
        }
        // Every rank has all of them, so all find the same.
        all.iter().zip(prompts).try_for_each(|(e, (_, prompt))| self.check_finite(e, prompt))?;
        let drawn: usize = all.iter().map(Experience::response_len).sum();
        Ok((all, drawn as f64 / seconds))
    }

    fn answer(&self, prompts: &[&(u64, Prompt)], decoding: &Decoding) -> Result<Vec<Experience>> {
        let requests: Vec<Request<'_>> =
            prompts.iter().map(|(id, prompt)| Request { prompt: &prompt.tokens, id: *id }).collect();
        let max_new_tokens = self.settings.max_new_tokens as usize;
        let stop = || self.context.asked_to_stop();
        let responses = generate(&self.models.actor, &requests, decoding, &self.ends, max_new_tokens, &stop)?;
        let join = |(request, response): (&Request<'_>, crate::rollout::Response)| Experience {
            tokens: [request.prompt, &response.tokens].concat(),
            prompt_len: request.prompt.len(),
            ended: response.ended,
            log_p: response.log_p,
            ..Experience::default()
        };
        Ok(requests.iter().zip(responses).map(join).collect())
    }

    /// Scores one micro-batch of answers with all models.
    fn score(&self, part: &mut [Experience]) -> Result<()> {
        let rows: Vec<&[i64]> = part.iter().map(|e| e.tokens.as_slice()).collect();
        let batch = Batch::right_padded(&rows, self.models.actor.device());
        let states = states(&batch, part.iter());
        let temperature = self.settings.sampling.temperature;
        let mut entropies = Vec::with_capacity(states.len());
        let actor = token_scores(&self.models.actor, &batch, &states, part, temperature, Some(&mut entropies))?;
        let reference = token_scores(&self.models.reference, &batch, &states, part, temperature, None)?;
        let values = self.models.critic.as_ref().map(|critic| critic.scalars(&batch, &states)).transpose()?;
        let ends: Vec<i64> = (0..part.len()).map(|row| batch.flat_index(row, batch.lengths[row] - 1)).collect();
        let scores = self.models.scores(&batch, &ends)?;
        let mut start = 0;
        for (row, e) in part.iter_mut().enumerate() {
            let span = start..start + e.response_len();
            start = span.end;
            e.entropy = entropies[span.clone()].iter().sum();
            e.reference_log_p = reference[span.clone()].to_vec();
            let gaps = e.log_p.iter().zip(&actor[span.clone()]).map(|(sampled, scored)| (sampled - scored).abs());
            e.sampler_gap = gaps.fold([0.0, 0.0], |[sum, most], gap| [sum + gap, f64::max(most, gap)]);
            e.log_p = actor[span.clone()].to_vec();
            e.values = values.as_ref().map(|values| values[span].to_vec()).unwrap_or_default();
            e.scores = scores.iter().map(|of_rows| of_rows[row]).collect();
            e.score = self.shaped_score(self.models.weighted(&e.scores), e.ended);
        }
        Ok(())
    }

    /// Refuses numbers that nothing can be learnt from, by the model that gave them and the prompt.
    fn check_finite(&self, e: &Experience, prompt: &Prompt) -> Result<()> {
        let first = |numbers: &[f64]| numbers.iter().copied().find(|x| !x.is_finite());
        let scored = self.models.rewards.iter().zip(&e.scores).find(|(_, score)| !score.is_finite());
        let (what, number) = if let Some((scorer, score)) = scored {
            (format!("the reward model '{}' gave the score", scorer.name), *score)
        } else if !e.score.is_finite() {
            ("the rewards' weighted sum is".into(), e.score)
        } else if let Some(number) = first(&e.log_p) {
            ("the actor gave a token the log-probability".into(), number)
        } else if let Some(number) = first(&e.kl) {
            ("the reference model gave a token a log-probability from which its KL is".into(), number)
        } else if let Some(number) = first(&e.values) {
            ("the critic gave a token the value".into(), number)
        } else {
            return Ok(());
        };
        let text: String = prompt.text.chars().take(PROMPT_CHARS).collect();
        let message = format!("{what} {number} in the answer of {} tokens to the prompt {text:?}", e.response_len());
        Err(Error::new(ExitCode::NotFinite, message))
    }

    fn shaped_score(&self, score: f64, ended: bool) -> f64 {
        match (self.settings.missing_eos_penalty, self.settings.clip_reward) {
            (Some(penalty), _) if !ended => penalty,
            (_, Some(clip)) => score.clamp(-clip, clip),
            _ => score,
        }
    }
}

/// The positions whose outputs speak of each response token: the one before it.
pub(super) fn states<'e>(batch: &Batch, part: impl Iterator<Item = &'e Experience>) -> Vec<i64> {
    part.enumerate()
        .flat_map(|(row, e)| (e.prompt_len..e.tokens.len()).map(move |i| (row, i as i64 - 1)))
        .map(|(row, i)| batch.flat_index(row, i))
        .collect()
}

/// Log-probability of each response token; where asked, the entropy of the law it was drawn from is added to `entropies`.
fn token_scores(
    model: &Model,
    batch: &Batch,
    states: &[i64],
    part: &[Experience],
    temperature: f64,
    mut entropies: Option<&mut Vec<f64>>,
) -> Result<Vec<f64>> {
    let targets: Vec<i64> = part.iter().flat_map(|e| e.response().iter().copied()).collect();
    let mut log_ps = Vec::with_capacity(states.len());
    model.visit_head(&model.hidden(batch)?, states, |logits, range| {
        let targets = Tensor::from_slice(&targets[range]).to_device(logits.device());
        let (chosen, all) = log_probabilities(logits, &targets, temperature)?;
        log_ps.extend(Vec::<f64>::try_from(chosen.f_to_kind(Kind::Double)?)?);
        if let Some(entropies) = &mut entropies {
            entropies.extend(Vec::<f64>::try_from(entropy(&all)?.f_to_kind(Kind::Double)?)?);
        }
        Ok(())
    })?;
    Ok(log_ps)
}

/// How many numbers a row of any answer takes.
#[derive(Clone, Copy)]
struct RowShape {
    /// Tokens of prompt and response.
    max_tokens: usize,
    /// Tokens of the response.
    max_new: usize,
    /// Reward models.
    rewards: usize,
    /// Whether there is a critic.
    critic: bool,
}

impl RowShape {
    fn width(self) -> usize {
        HEADER + self.max_tokens + self.of_tokens() * self.max_new + self.rewards
    }

    /// Numbers of each of the response's tokens: two log-probabilities, and the critic's value.
    fn of_tokens(self) -> usize {
        if self.critic { 3 } else { 2 }
    }
}

/// Gives every rank the experience of all, in the order of the prompts: prompt `j` was answered by rank `j % world size`.
/// Rows travel padded to one size, since ranks must send equal shapes.
fn gather(group: &Group, mine: &[Experience], total: usize, shape: RowShape) -> Result<Vec<Experience>> {
    if group.world_size() == 1 {
        return Ok(mine.to_vec());
    }
    let (world, width) = (group.world_size() as usize, shape.width());
    let slots = total.div_ceil(world);
    let mut packed = vec![0f64; slots * width];
    for (e, row) in mine.iter().zip(packed.chunks_exact_mut(width)) {
        pack(e, row, shape);
    }
    let all = group.gather_rows(&Tensor::from_slice(&packed).f_view([slots as i64, width as i64])?)?;
    let all = Vec::<f64>::try_from(all.f_flatten(0, -1)?)?;
    (0..total).map(|j| unpack(&all[((j % world) * slots + j / world) * width..][..width], shape)).collect()
}

/// Numbers before a packed row's tokens: tokens, prompt length, ended, score, entropy, and the two of the sampler's gap.
const HEADER: usize = 7;

fn pack(e: &Experience, row: &mut [f64], shape: RowShape) {
    let RowShape { max_tokens, max_new, .. } = shape;
    row[..HEADER].copy_from_slice(&[
        e.tokens.len() as f64,
        e.prompt_len as f64,
        f64::from(u8::from(e.ended)),
        e.score,
        e.entropy,
        e.sampler_gap[0],
        e.sampler_gap[1],
    ]);
    let (tokens, rest) = row[HEADER..].split_at_mut(max_tokens);
    tokens.iter_mut().zip(&e.tokens).for_each(|(slot, &t)| *slot = t as f64);
    let (of_tokens, scores) = rest.split_at_mut(shape.of_tokens() * max_new);
    for (slots, values) in of_tokens.chunks_exact_mut(max_new).zip([&e.log_p, &e.reference_log_p, &e.values]) {
        slots[..values.len()].copy_from_slice(values);
    }
    scores.copy_from_slice(&e.scores);
}

fn unpack(row: &[f64], shape: RowShape) -> Result<Experience> {
    let RowShape { max_tokens, max_new, .. } = shape;
    let (len, prompt_len) = (row[0] as usize, row[1] as usize);
    if len > max_tokens || prompt_len > len || len - prompt_len > max_new {
        return Err(Error::bug(format!("a gathered row has {len} tokens, {prompt_len} of them in the prompt")));
    }
    let (tokens, rest) = row[HEADER..].split_at(max_tokens);
    let part = |i: usize| rest[i * max_new..][..len - prompt_len].to_vec();
    Ok(Experience {
        tokens: tokens[..len].iter().map(|&t| t as i64).collect(),
        prompt_len,
        ended: row[2] > 0.0,
        score: row[3],
        scores: rest[shape.of_tokens() * max_new..].to_vec(),
        entropy: row[4],
        sampler_gap: [row[5], row[6]],
        log_p: part(0),
        reference_log_p: part(1),
        values: if shape.critic { part(2) } else { vec![] },
        ..Experience::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_row_comes_back_as_it_was() {
        let e = Experience {
            tokens: vec![1, 50_000, 3],
            prompt_len: 1,
            ended: true,
            score: -0.5,
            scores: vec![0.5, -1.5],
            entropy: 2.25,
            sampler_gap: [0.5, 0.25],
            log_p: vec![-1.0, -2.0],
            reference_log_p: vec![-0.5, -2.25],
            values: vec![1.0, 3.0],
            ..Default::default()
        };
        let without_values = Experience { values: vec![], ..e.clone() };
        for (e, critic) in [(e, true), (without_values, false)] {
            let shape = RowShape { max_tokens: 6, max_new: 4, rewards: 2, critic };
            let mut row = vec![9.0; shape.width()];
            pack(&e, &mut row, shape);
            assert_eq!(unpack(&row, shape).unwrap(), e);
            row[0] = 7.0;
            assert!(unpack(&row, shape).is_err());
        }
    }
}
