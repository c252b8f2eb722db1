//! REINFORCE++ (Hu 2025).
//!
//! It is GAE with lambda 1 and without a critic: a token's advantage is the discounted sum of the rewards from it on, and what was
//! expected is the mean over the rollout, by whitening.

use crate::stages::math::{gae, whiten};
use crate::stages::ppo::experience::Experience;

/// Advantages from the rewards of each token.
pub fn estimate(answers: &mut [Experience], rewards: &[Vec<f64>], gamma: f64) {
    for (e, rewards) in answers.iter_mut().zip(rewards) {
        e.advantages = gae(rewards, &vec![0.0; rewards.len()], gamma, 1.0);
    }
    whiten(&mut answers.iter_mut().map(|e| &mut e.advantages).collect::<Vec<_>>());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_counts_what_follows_from_it_against_the_rollouts_mean() {
        let mut answers = vec![Experience::default(), Experience::default()];
        estimate(&mut answers, &[vec![0.0, 2.0], vec![1.0]], 0.5);
        // Returns are 1, 2 and 1: mean 4/3, population deviation sqrt(2/9).
        let scale = (2.0f64 / 9.0 + 1e-8).sqrt();
        let wanted = [(1.0 - 4.0 / 3.0) / scale, (2.0 - 4.0 / 3.0) / scale, (1.0 - 4.0 / 3.0) / scale];
        let found = [&answers[0].advantages[..], &answers[1].advantages[..]].concat();
        found.iter().zip(wanted).for_each(|(a, b)| assert!((a - b).abs() < 1e-9, "{found:?}"));
    }
}
