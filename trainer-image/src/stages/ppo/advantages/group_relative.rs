//! Group relative policy optimisation (GRPO: Shao 2024, "DeepSeekMath", section 4.1; without scale Dr. GRPO: Liu 2025).
//!
//! It is GAE without a critic: what an answer was expected to be worth is the mean over the prompt's answers. Unlike RLOO it counts
//! the answer itself, and divides by the answers' deviation.

use crate::stages::math::moments;
use rlhf_api::stage::GroupScale;

/// Keeps a group whose answers are all alike from a division by zero, as in TRL and verl.
const EPSILON: f64 = 1e-4;

/// Advantages of answers, by what they are worth; `samples` after each other are to the same prompt. Deviations are those of
/// samples, with `n - 1`.
pub fn estimate(worth: &[f64], samples: usize, scale: GroupScale) -> Vec<f64> {
    let (_, of_all) = mean_and_deviation(worth);
    let mut advantages = Vec::with_capacity(worth.len());
    for group in worth.chunks(samples.max(1)) {
        let (mean, of_group) = mean_and_deviation(group);
        let by = match scale {
            GroupScale::Group => of_group + EPSILON,
            GroupScale::Batch => of_all + EPSILON,
            GroupScale::None => 1.0,
        };
        advantages.extend(group.iter().map(|own| (own - mean) / by));
    }
    advantages
}

/// The mean, and the deviation of samples.
fn mean_and_deviation(numbers: &[f64]) -> (f64, f64) {
    let (mean, variance) = moments([numbers].into_iter());
    let others = numbers.len().saturating_sub(1).max(1) as f64;
    (mean, (variance * numbers.len() as f64 / others).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `GRPOTrainer` of TRL 1.16 has them with `scale_rewards` group, batch and none, worked out with `torch.std`.
    #[test]
    fn an_answer_counts_against_the_groups_mean_by_the_asked_deviation() {
        let worth = [1.0, 2.0, 6.0, 0.5, 0.5, 2.0];
        let golden = |scale, wanted: [f64; 6]| {
            let found = estimate(&worth, 3, scale);
            found.iter().zip(wanted).for_each(|(a, b)| assert!((a - b).abs() < 1e-5, "{scale:?}: {found:?}"));
        };
        golden(GroupScale::None, [-2.0, -1.0, 3.0, -0.5, -0.5, 1.0]);
        golden(GroupScale::Group, [-0.755900, -0.377950, 1.133851, -0.577284, -0.577284, 1.154567]);
        golden(GroupScale::Batch, [-0.964439, -0.482220, 1.446659, -0.241110, -0.241110, 0.482220]);
        assert_eq!(estimate(&[3.0; 4], 2, GroupScale::Group), [0.0; 4], "answers that are alike teach nothing");
    }
}
