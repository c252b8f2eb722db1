//! The formulas of the algorithms as pure functions, each with its source.
//!
//! Rows hold valid tokens only: what lies past a response's end never enters, so it cannot leak.

use crate::error::Result;
use rlhf_api::stage::{Kl, KlEstimator};
use tch::{Kind, Tensor};

/// Log ratios are kept within this, as in verl: beyond it `exp` would overflow fp32, and clipping decides anyway.
const MAX_LOG_RATIO: f64 = 20.0;

/// An estimate of KL(actor || reference) at one sampled token, from `d = log p_actor - log p_reference` (Schulman 2020).
pub fn kl_estimate(estimator: KlEstimator, d: f64) -> f64 {
    match estimator {
        KlEstimator::K1 => d,
        KlEstimator::K2 => 0.5 * d * d,
        KlEstimator::K3 => (-d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).exp() - 1.0 + d,
    }
}

/// The same estimates `[n]` of log-probabilities under actor and reference `[n]`, to be learnt from (GRPO: Shao 2024, equation 4,
/// with k3).
///
/// # Errors
/// Where shapes do not fit.
pub fn kl_loss(estimator: KlEstimator, log_p: &Tensor, reference: &Tensor) -> Result<Tensor> {
    let d = log_p.f_sub(reference)?;
    match estimator {
        KlEstimator::K1 => Ok(d),
        KlEstimator::K2 => Ok(d.f_square()? * 0.5),
        KlEstimator::K3 => {
            let ratio = d.f_neg()?.f_clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)?.f_exp()?;
            Ok(ratio.f_add(&d)?.f_sub_scalar(1.0)?)
        }
    }
}

/// The adapted KL coefficient after `samples` responses whose KL was `kl` (Ziegler 2019, section 2.2). A batch counts for one
/// horizon at most: beyond five, the factor would fall below zero and pay the actor for leaving the reference.
pub fn adapted_kl_coefficient(settings: &Kl, coefficient: f64, kl: f64, samples: u32) -> f64 {
    match settings.target {
        None => coefficient,
        Some(target) => {
            let error = (kl / target - 1.0).clamp(-0.2, 0.2);
            let horizons = (f64::from(samples) / f64::from(settings.horizon)).min(1.0);
            coefficient * (1.0 + error * horizons)
        }
    }
}

/// Per-token rewards of one response: the KL penalty at every token and the score at the last (Ziegler 2019).
pub fn token_rewards(score: f64, kl: &[f64], coefficient: f64) -> Vec<f64> {
    let mut rewards: Vec<f64> = kl.iter().map(|k| -coefficient * k).collect();
    if let Some(last) = rewards.last_mut() {
        *last += score;
    }
    rewards
}

/// Generalised advantage estimation over one response (Schulman 2016, equation 16); the value past its end is 0.
pub fn gae(rewards: &[f64], values: &[f64], gamma: f64, lambda: f64) -> Vec<f64> {
    let mut advantages = vec![0.0; rewards.len()];
    let (mut next_value, mut next_advantage) = (0.0, 0.0);
    for t in (0..rewards.len()).rev() {
        let delta = rewards[t] + gamma * next_value - values[t];
        next_advantage = delta + gamma * lambda * next_advantage;
        next_value = values[t];
        advantages[t] = next_advantage;
    }
    advantages
}

/// Mean and population variance of all numbers in all rows.
pub fn moments<'a>(rows: impl Iterator<Item = &'a [f64]> + Clone) -> (f64, f64) {
    let count = rows.clone().map(<[f64]>::len).sum::<usize>().max(1) as f64;
    let mean = rows.clone().flatten().sum::<f64>() / count;
    let variance = rows.flatten().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
    (mean, variance)
}

/// Shifts and scales rows to mean 0 and variance 1 over all their tokens (Huang 2024, detail 12: population variance).
pub fn whiten(rows: &mut [&mut Vec<f64>]) {
    let (mean, variance) = moments(rows.iter().map(|r| r.as_slice()));
    let scale = 1.0 / (variance + 1e-8).sqrt();
    rows.iter_mut().for_each(|row| row.iter_mut().for_each(|x| *x = (*x - mean) * scale));
}

/// Share of the returns' variance that the values explain; 0 where the returns do not vary.
pub fn explained_variance<'a>(
    returns: impl Iterator<Item = &'a [f64]> + Clone,
    errors: impl Iterator<Item = &'a [f64]> + Clone,
) -> f64 {
    let (_, total) = moments(returns);
    let (_, left) = moments(errors);
    if total > 0.0 { 1.0 - left / total } else { 0.0 }
}

/// Log-probabilities `[n]` of `targets` `[n]` under logits `[n, v]` divided by `temperature`, and all
/// log-probabilities `[n, v]`, in fp32.
///
/// # Errors
/// Where shapes do not fit.
pub fn log_probabilities(logits: &Tensor, targets: &Tensor, temperature: f64) -> Result<(Tensor, Tensor)> {
    let scaled = if temperature == 1.0 { logits.shallow_clone() } else { logits.f_div_scalar(temperature)? };
    let all = scaled.f_log_softmax(-1, Kind::Float)?;
    let chosen = all.f_gather(-1, &targets.f_unsqueeze(-1)?, false)?.f_squeeze_dim(-1)?;
    Ok((chosen, all))
}

/// Entropy `[n]` in nats of distributions given as log-probabilities `[n, v]`.
///
/// # Errors
/// Where libtorch fails.
pub fn entropy(log_probabilities: &Tensor) -> Result<Tensor> {
    Ok(log_probabilities
        .f_exp()?
        .f_mul(log_probabilities)?
        .f_sum_dim_intlist([-1].as_slice(), false, Kind::Float)?
        .f_neg()?)
}

/// The clipped surrogate loss of each token `[n]` (Schulman 2017, equation 7), and the log probability ratios `[n]`.
///
/// # Errors
/// Where shapes do not fit.
pub fn policy_loss(log_p: &Tensor, old_log_p: &Tensor, advantages: &Tensor, clip: f64) -> Result<(Tensor, Tensor)> {
    let log_ratio = log_p.f_sub(old_log_p)?.f_clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)?;
    let ratio = log_ratio.f_exp()?;
    let surrogate = ratio.f_mul(advantages)?;
    let clipped = ratio.f_clamp(1.0 - clip, 1.0 + clip)?.f_mul(advantages)?;
    Ok((surrogate.f_minimum(&clipped)?.f_neg()?, log_ratio))
}

/// The clipped squared error of each value `[n]`, halved (Huang 2024, detail 9).
///
/// # Errors
/// Where shapes do not fit.
pub fn value_loss(values: &Tensor, old_values: &Tensor, returns: &Tensor, clip: f64) -> Result<Tensor> {
    let clipped = old_values.f_add(&values.f_sub(old_values)?.f_clamp(-clip, clip)?)?;
    let error = |v: &Tensor| v.f_sub(returns)?.f_square();
    Ok(error(values)?.f_maximum(&error(&clipped)?)? * 0.5)
}

/// The loss of one ranking, best first: `-log sigmoid(better - worse)` averaged over its pairs (InstructGPT, equation 1),
/// plus `centering` times the mean squared sum of a pair's scores. Finite for any gap.
///
/// # Errors
/// Where `scores` `[k]` has fewer than two numbers.
pub fn ranking_loss(scores: &Tensor, centering: f64) -> Result<Tensor> {
    let k = scores.size()[0];
    let pairs = Tensor::f_combinations(&Tensor::f_arange(k, (Kind::Int64, scores.device()))?, 2, false)?;
    let of = |column| scores.f_index_select(0, &pairs.f_select(1, column)?);
    let (better, worse) = (of(0)?, of(1)?);
    let loss = better.f_sub(&worse)?.f_log_sigmoid()?.f_neg()?.f_mean(Kind::Float)?;
    if centering == 0.0 {
        return Ok(loss);
    }
    Ok(loss.f_add(&(better.f_add(&worse)?.f_square()?.f_mean(Kind::Float)? * centering))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rlhf_api::stage::KlPlace;
    use serde_json::Value;

    fn golden() -> Value {
        serde_json::from_str(include_str!("../../../tests/golden/losses.json")).unwrap()
    }

    fn cases(name: &str) -> Vec<Value> {
        golden()[name]["cases"].as_array().unwrap().clone()
    }

    fn number(json: &Value) -> f64 {
        json.as_f64().unwrap()
    }

    /// The numbers of a field that the case's mask, if it has one, calls valid.
    fn valid(case: &Value, field: &str) -> Vec<f64> {
        let all = case[field].as_array().unwrap();
        let mask = case["mask"].as_array();
        all.iter().enumerate().filter(|(i, _)| mask.is_none_or(|m| m[*i] == 1)).map(|(_, x)| number(x)).collect()
    }

    fn tensor(case: &Value, field: &str) -> Tensor {
        Tensor::from_slice(&valid(case, field))
    }

    fn close(actual: f64, expected: f64) {
        assert!((actual - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{actual}, expected {expected}");
    }

    #[test]
    fn policy_losses_are_the_golden_ones() {
        for case in cases("policy_loss") {
            let (loss, log_ratio) = policy_loss(
                &tensor(&case, "logp"),
                &tensor(&case, "old_logp"),
                &tensor(&case, "advantages"),
                number(&case["clip_ratio"]),
            )
            .unwrap();
            close(loss.mean(Kind::Double).double_value(&[]), number(&case["loss"]));
            valid(&case, "ratios")
                .into_iter()
                .enumerate()
                .for_each(|(i, r)| close(log_ratio.double_value(&[i as i64]).exp(), r));
        }
    }

    #[test]
    fn a_log_ratio_out_of_range_gives_a_finite_loss_and_gradient() {
        for advantage in [1.0f32, -1.0] {
            let log_p = Tensor::from_slice(&[0.0f32]).set_requires_grad(true);
            let (loss, _) =
                policy_loss(&log_p, &Tensor::from_slice(&[-200.0f32]), &Tensor::from_slice(&[advantage]), 0.2).unwrap();
            loss.sum(Kind::Float).backward();
            assert!(loss.double_value(&[0]).is_finite() && log_p.grad().double_value(&[0]).is_finite());
        }
        assert!(kl_estimate(KlEstimator::K3, -900.0).is_finite());
    }

    #[test]
    fn value_losses_are_the_golden_ones() {
        for case in cases("value_loss") {
            let loss = value_loss(
                &tensor(&case, "values"),
                &tensor(&case, "old_values"),
                &tensor(&case, "returns"),
                number(&case["clip_value"]),
            )
            .unwrap();
            close(loss.mean(Kind::Double).double_value(&[]), number(&case["loss_with_half"]));
        }
    }

    #[test]
    fn advantages_are_the_golden_ones_and_nothing_leaks_from_past_the_end() {
        for case in cases("gae") {
            let values = valid(&case, "values");
            let advantages = gae(&valid(&case, "rewards"), &values, number(&case["gamma"]), number(&case["lambda"]));
            let expected = (valid(&case, "advantages"), valid(&case, "returns"));
            for i in 0..values.len() {
                close(advantages[i], expected.0[i]);
                close(advantages[i] + values[i], expected.1[i]);
            }
        }
    }

    #[test]
    fn whitening_uses_the_population_variance_of_all_valid_tokens() {
        let case = &golden()["whitening"];
        let all = valid(case, "values");
        let (mut one, mut two) = (vec![all[0]], all[1..].to_vec());
        let (mean, variance) = moments([one.as_slice(), two.as_slice()].into_iter());
        close(mean, number(&case["mean"]));
        close(variance, number(&case["variance"]));
        whiten(&mut [&mut one, &mut two]);
        [one, two].concat().into_iter().zip(valid(case, "whitened")).for_each(|(a, e)| close(a, e));
    }

    #[test]
    fn kl_estimators_and_controller_are_the_golden_ones() {
        for case in cases("kl_estimators") {
            for (name, estimator) in [("k1", KlEstimator::K1), ("k2", KlEstimator::K2), ("k3", KlEstimator::K3)] {
                close(kl_estimate(estimator, number(&case["d"])), number(&case[name]));
                let (log_p, reference) = (Tensor::from_slice(&[number(&case["d"]) - 1.5]), Tensor::from_slice(&[-1.5]));
                let loss = kl_loss(estimator, &log_p, &reference.to_kind(Kind::Double)).unwrap();
                close(loss.double_value(&[0]), number(&case[name]));
            }
        }
        let case = &golden()["adaptive_kl"];
        let kl = Kl {
            coefficient: number(&case["coefficient"]),
            estimator: KlEstimator::K1,
            place: KlPlace::Reward,
            target: Some(number(&case["target"])),
            horizon: number(&case["horizon"]) as u32,
        };
        close(
            adapted_kl_coefficient(&kl, kl.coefficient, number(&case["kl"]), number(&case["samples"]) as u32),
            number(&case["next_coefficient"]),
        );
    }

    #[test]
    fn the_kl_coefficient_keeps_its_sign_however_many_responses_a_batch_has() {
        let kl = Kl {
            coefficient: 0.1,
            estimator: KlEstimator::K1,
            place: KlPlace::Reward,
            target: Some(100.0),
            horizon: 2,
        };
        for samples in [2, 10, 11, 12, 4096] {
            for measured in [-50.0, 0.0, 1e9] {
                let next = adapted_kl_coefficient(&kl, 0.1, measured, samples);
                assert!((0.08 - 1e-12..=0.12 + 1e-12).contains(&next), "{samples} responses of KL {measured}: {next}");
            }
        }
    }

    #[test]
    fn the_ranking_loss_is_finite_for_any_gap_and_weighs_all_pairs_alike() {
        for case in cases("reward_loss") {
            let scores = Tensor::from_slice(&[number(&case["gap"]), 0.0]);
            close(ranking_loss(&scores, 0.0).unwrap().double_value(&[]), number(&case["loss"]));
        }
        let pair = |gap: f64| (1.0 + (-gap).exp()).ln();
        let three = ranking_loss(&Tensor::from_slice(&[2.0, 1.5, -1.0]), 0.0).unwrap().double_value(&[]);
        close(three, (pair(0.5) + pair(3.0) + pair(2.5)) / 3.0);
        close(ranking_loss(&Tensor::from_slice(&[2.0, 1.0]), 0.1).unwrap().double_value(&[]), pair(1.0) + 0.1 * 9.0);
    }

    #[test]
    fn entropies_are_the_golden_ones() {
        for case in cases("entropy") {
            let logits = tensor(&case, "logits").to_kind(Kind::Float).unsqueeze(0);
            close(entropy(&logits.log_softmax(-1, Kind::Float)).unwrap().double_value(&[0]), number(&case["entropy"]));
        }
    }

    #[test]
    fn the_score_is_added_once_and_the_penalty_everywhere() {
        assert_eq!(token_rewards(2.0, &[0.5, 0.25, 1.0], 0.1), vec![-0.05, -0.025, 2.0 - 0.1]);
        assert!(token_rewards(2.0, &[], 0.1).is_empty());
    }
}
