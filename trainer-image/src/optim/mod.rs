//! Learning-rate schedules. The optimizer itself is AdamW over flat chunks, in the engine.

use rlhf_api::stage::{Optimizer, Schedule};

/// The learning rate of step `step` (from 0) of `total`: a linear rise over the warm-up, then the schedule.
pub fn learning_rate(settings: &Optimizer, step: u64, total: u64) -> f64 {
    let warmup = (settings.warmup_ratio * total as f64).ceil();
    let step = step as f64;
    if step < warmup {
        return settings.learning_rate * (step + 1.0) / warmup;
    }
    let done = (step - warmup) / (total as f64 - warmup).max(1.0);
    settings.learning_rate
        * match settings.schedule {
            Schedule::Constant => 1.0,
            Schedule::Linear => 1.0 - done,
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(schedule: Schedule, warmup_ratio: f64) -> Optimizer {
        Optimizer {
            learning_rate: 1.0,
            schedule,
            warmup_ratio,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: None,
            max_grad_norm: 1.0,
        }
    }

    #[test]
    fn rises_over_the_warmup_and_falls_to_the_end() {
        let linear = settings(Schedule::Linear, 0.2);
        let rates: Vec<f64> = (0..10).map(|s| learning_rate(&linear, s, 10)).collect();
        assert_eq!(rates, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]);
        let cosine = settings(Schedule::Cosine, 0.0);
        assert!((learning_rate(&cosine, 5, 10) - 0.5).abs() < 1e-12);
        assert_eq!(learning_rate(&settings(Schedule::Constant, 0.0), 9, 10), 1.0);
    }
}
