//! Generalised advantage estimation with a critic (Schulman 2016), whitened as in Huang 2024.

use crate::stages::math::{gae, whiten};
use crate::stages::ppo::experience::Experience;

/// Advantages, returns and the critic's errors, from rewards and values of each token.
pub fn estimate(answers: &mut [Experience], rewards: &[Vec<f64>], gamma: f64, lambda: f64) {
    for (e, rewards) in answers.iter_mut().zip(rewards) {
        e.advantages = gae(rewards, &e.values, gamma, lambda);
        e.returns = e.advantages.iter().zip(&e.values).map(|(a, v)| a + v).collect();
        e.value_errors = e.advantages.clone();
    }
    whiten(&mut answers.iter_mut().map(|e| &mut e.advantages).collect::<Vec<_>>());
}
