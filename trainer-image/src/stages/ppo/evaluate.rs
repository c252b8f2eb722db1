//! Held-out prompts answered and scored: is the actor better, and how far has it moved?

use super::Run;
use super::experience::{Experience, mean};
use crate::data::{Half, Prompt};
use crate::error::{Error, Result};
use crate::files;
use crate::stages::context::keyed;
use crate::telemetry::{Figure, Phase, RewardOf};
use crate::tokenizer::Tokenizer;
use rlhf_api::report::ExitCode;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// The stream of random draws that evaluations share, apart from every iteration's: the same draws each time, so that
/// two evaluations differ by the actor only.
const STREAM: u64 = u64::MAX;
/// Sampled texts that an evaluation logs.
const LOGGED: usize = 10;

/// Prompts that are never learnt from, and the tokenizer that makes their answers readable.
pub(super) struct HeldOut<'a> {
    pub prompts: Half<Prompt>,
    pub tokenizer: &'a Tokenizer,
}

impl Run<'_> {
    /// Evaluates between the first and the last iteration where the settings ask for it.
    pub(super) fn evaluate_if_due(&self, iteration: u64, held_out: &HeldOut<'_>) -> Result<()> {
        let every = u64::from(self.settings.eval_every_iterations);
        if every > 0 && iteration.is_multiple_of(every) && iteration < u64::from(self.settings.iterations) {
            self.evaluate(iteration, &format!("eval-{iteration}"), held_out)?;
        }
        Ok(())
    }

    /// Mean and deviation of the reward and mean KL on held-out prompts, after `iteration` iterations; the answers are
    /// written to `samples/<name>.jsonl` beside the stage's model.
    pub(super) fn evaluate(&self, iteration: u64, name: &str, held_out: &HeldOut<'_>) -> Result<BTreeMap<String, f64>> {
        if held_out.prompts.is_empty() {
            return Ok(BTreeMap::new());
        }
        let all = held_out.prompts.all();
        let prompts: Vec<(u64, Prompt)> = (0..).zip(held_out.prompts.rows(&all)?).collect();
        let stream = [self.context.config.seed, STREAM];
        let (answers, _) = self.roll_out(&prompts, stream, [Phase::Eval, Phase::Eval]).map_err(|e| match e.exit {
            ExitCode::NotFinite => e.context(format!("the evaluation after iteration {iteration}")),
            _ => e,
        })?;
        let reward = mean(&answers, |e| e.score);
        let figures = vec![
            (Figure::EvalReward, reward),
            (Figure::EvalRewardStd, mean(&answers, |e| (e.score - reward).powi(2)).sqrt()),
            (Figure::EvalKl, mean(&answers, |e| e.kl.iter().sum())),
        ];
        self.write_samples(name, held_out.tokenizer, &prompts, &answers)?;
        let rewards = self.mean_rewards(&answers);
        self.context.report_rewards(RewardOf::Evaluation, &rewards);
        self.context.report_evaluation(iteration, &figures)?;
        Ok(keyed(&figures).into_iter().chain(RewardOf::Evaluation.keyed(&rewards)).collect())
    }

    fn write_samples(
        &self,
        name: &str,
        tokenizer: &Tokenizer,
        prompts: &[(u64, Prompt)],
        answers: &[Experience],
    ) -> Result<()> {
        if !self.context.group.is_first() {
            return Ok(());
        }
        let mut text = String::new();
        for (i, ((_, prompt), answer)) in prompts.iter().zip(answers).enumerate() {
            let response = tokenizer.decode(answer.response())?;
            if i < LOGGED {
                tracing::info!(evaluation = name, reward = answer.score, prompt = prompt.text, response, "sample");
            }
            let names = self.models.rewards.iter().map(|scorer| scorer.name.clone());
            let rewards: Map<String, Value> = names.zip(answer.scores.iter().map(|score| json!(score))).collect();
            let line = json!({"prompt": prompt.text, "response": response, "reward": answer.score, "rewards": rewards});
            text.push_str(&serde_json::to_string(&line).map_err(|e| Error::bug(e.to_string()))?);
            text.push('\n');
        }
        let dir = self.context.stage_dir().join("samples");
        files::make_dir(&dir)?;
        self.context.lease().check()?;
        files::write(&dir.join(format!("{name}.jsonl")), text.as_bytes())
    }
}
