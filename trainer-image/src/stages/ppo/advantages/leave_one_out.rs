//! REINFORCE leave-one-out (Kool 2019; Ahmadian 2024, "Back to basics", equation 9).
//!
//! It is GAE without a critic: what an answer was expected to be worth is the mean of what the prompt's other answers are worth,
//! and the whole answer is one action.

/// Advantages of answers, by what they are worth; `samples` after each other are to the same prompt.
pub fn estimate(worth: &[f64], samples: usize) -> Vec<f64> {
    let mut advantages = Vec::with_capacity(worth.len());
    for group in worth.chunks(samples.max(1)) {
        let (sum, others) = (group.iter().sum::<f64>(), group.len() as f64 - 1.0);
        advantages.extend(group.iter().map(|own| own - (sum - own) / others.max(1.0)));
    }
    advantages
}

#[cfg(test)]
mod tests {
    use super::estimate;

    /// As `RLOOTrainer` of TRL 1.16 has them: `(sum - own) / (generations - 1)` is the baseline.
    #[test]
    fn an_answer_counts_against_the_mean_of_the_others() {
        assert_eq!(estimate(&[1.0, 2.0, 6.0, 0.0, 0.0, 0.0], 3), [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]);
        // Kool 2019: that is the difference to the mean of all, times n / (n - 1); and the group's sum is 0.
        let worth = [0.3, -1.7, 2.25, 0.9];
        let mean = worth.iter().sum::<f64>() / 4.0;
        let advantages = estimate(&worth, 4);
        advantages.iter().zip(worth).for_each(|(a, w)| assert!((a - 4.0 / 3.0 * (w - mean)).abs() < 1e-12));
        assert!(advantages.iter().sum::<f64>().abs() < 1e-12);
    }
}
