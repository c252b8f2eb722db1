//! Advantages of a rollout's tokens, by the estimator that the settings name. Each is a file of its own, and a line here.
//!
//! What an answer is worth is its score less the KL penalty of its tokens, where that is in the rewards.

mod gae;
mod group_relative;
mod leave_one_out;
mod reinforce_plus_plus;

use super::experience::Experience;
use crate::stages::math::token_rewards;
use rlhf_api::stage::{Estimator, KlPlace, Ppo};

/// Estimates the advantages of a scored rollout, in which the answers to a prompt follow each other.
pub(super) fn estimate(answers: &mut [Experience], settings: &Ppo, by: Estimator, kl_coefficient: f64) {
    let penalty = if settings.kl.place == KlPlace::Reward { kl_coefficient } else { 0.0 };
    let rewards: Vec<Vec<f64>> = answers.iter().map(|e| token_rewards(e.score, &e.kl, penalty)).collect();
    let worth = || rewards.iter().map(|of_tokens| of_tokens.iter().sum()).collect::<Vec<f64>>();
    let samples = settings.samples_per_prompt as usize;
    match by {
        Estimator::Gae(by) => gae::estimate(answers, &rewards, settings.gamma, by.lambda),
        Estimator::LeaveOneOut => whole(answers, &leave_one_out::estimate(&worth(), samples)),
        Estimator::GroupRelative(by) => whole(answers, &group_relative::estimate(&worth(), samples, by.scale)),
        Estimator::ReinforcePlusPlus => reinforce_plus_plus::estimate(answers, &rewards, settings.gamma),
    }
}

/// Each token of an answer has the answer's advantage.
fn whole(answers: &mut [Experience], advantages: &[f64]) {
    for (e, advantage) in answers.iter_mut().zip(advantages) {
        e.advantages = vec![*advantage; e.response_len()];
    }
}
