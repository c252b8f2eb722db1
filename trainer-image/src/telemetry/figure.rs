//! The figures that stages report, in one table.
//!
//! A figure appears in three places under one name each: as a key of the progress document (and so in the
//! RLHFJob's status), as a Prometheus gauge, and as a field of the step's log line. The table below is the
//! only place that knows them; `METRICS.md` is rendered from it.

/// A figure's names and what it means.
struct Row {
    key: &'static str,
    metric: &'static str,
    help: &'static str,
}

macro_rules! figures {
    ($($variant:ident, $key:literal, $metric:literal, $help:literal;)*) => {
        /// A number that tells how training goes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Figure {
            $(#[doc = $help] $variant,)*
        }

        impl Figure {
            /// Every figure, in the table's order.
            pub const ALL: &[Figure] = &[$(Figure::$variant,)*];

            const fn row(self) -> Row {
                match self {
                    $(Figure::$variant => Row { key: $key, metric: $metric, help: $help },)*
                }
            }
        }

        /// Logs one line with a field for each figure that has a value.
        pub(super) fn log_line(message: &str, step: Option<(u64, u64)>, eta_seconds: Option<u64>, figures: &[(Figure, f64)]) {
            let value = |figure| figures.iter().rev().find(|(f, _)| *f == figure).map(|(_, v)| six_digits(*v));
            let (step, total_steps) = step.unzip();
            tracing::info!(step, total_steps, eta_seconds, $($key = value(Figure::$variant),)* "{message}");
        }
    };
}

figures! {
    Loss, "loss", "rlhf_loss", "Training loss of the step, over the whole global batch: nats a target token (sft), nats a comparison (rewardModel).";
    EvalLoss, "evalLoss", "rlhf_eval_loss", "Loss on the held-out records.";
    Perplexity, "perplexity", "rlhf_perplexity", "exp(loss) of the step (sft).";
    EvalPerplexity, "evalPerplexity", "rlhf_eval_perplexity", "exp(loss) on the held-out records (sft).";
    Accuracy, "accuracy", "rlhf_accuracy", "Share of the step's comparisons in which the preferred response scores higher (rewardModel).";
    EvalAccuracy, "evalAccuracy", "rlhf_eval_accuracy", "Share of the held-out comparisons in which the preferred response scores higher (rewardModel).";
    Margin, "margin", "rlhf_margin", "Mean score of the preferred response less that of the other (rewardModel).";
    Reward, "reward", "rlhf_reward", "Mean score of the rollout's responses, without the KL penalty (ppo).";
    RewardStd, "rewardStd", "rlhf_reward_std", "Standard deviation of the rollout's scores (ppo).";
    Kl, "kl", "rlhf_kl", "Mean over responses of the summed log-probability ratio of actor to reference, nats a response (ppo).";
    KlCoefficient, "klCoefficient", "rlhf_kl_coefficient", "Coefficient of the per-token KL penalty (ppo).";
    Entropy, "entropy", "rlhf_entropy", "Mean entropy of the actor's next-token law, nats a token (ppo).";
    SamplerGap, "samplerGap", "rlhf_sampler_gap", "Mean difference of a drawn token's log-probability between the sampler, which decodes with a cache, and the scoring that learning starts from, nats a token (ppo): what rounding makes, unless the two disagree.";
    SamplerGapMax, "samplerGapMax", "rlhf_sampler_gap_max", "The largest of these differences in the rollout, nats (ppo).";
    Ratio, "ratio", "rlhf_ratio", "Mean probability ratio of the actor to the rollout's policy (ppo).";
    ClipFraction, "clipFraction", "rlhf_clip_fraction", "Share of response tokens whose ratio was clipped (ppo).";
    ApproxKl, "approxKl", "rlhf_approx_kl", "Estimated KL of the rollout's policy to the actor, nats a token (ppo).";
    PolicyLoss, "policyLoss", "rlhf_policy_loss", "Clipped surrogate loss of the actor (ppo).";
    ValueLoss, "valueLoss", "rlhf_value_loss", "Clipped squared error of the critic, halved (ppo).";
    ExplainedVariance, "explainedVariance", "rlhf_explained_variance", "Share of the returns' variance that the critic explains (ppo).";
    ResponseLength, "responseLength", "rlhf_response_length", "Mean tokens a response (ppo).";
    EosFraction, "eosFraction", "rlhf_eos_fraction", "Share of responses that ended by themselves (ppo).";
    EvalReward, "evalReward", "rlhf_eval_reward", "Mean score of the responses to the held-out prompts (ppo).";
    EvalRewardStd, "evalRewardStd", "rlhf_eval_reward_std", "Standard deviation of the scores of the responses to the held-out prompts (ppo).";
    EvalKl, "evalKl", "rlhf_eval_kl", "KL of actor to reference on the held-out prompts, nats a response (ppo).";
    LearningRate, "learningRate", "rlhf_learning_rate", "Learning rate of the step (ppo: the actor's).";
    CriticLearningRate, "criticLearningRate", "rlhf_critic_learning_rate", "Learning rate of the critic (ppo).";
    GradNorm, "gradNorm", "rlhf_grad_norm", "Global L2 norm of the gradient before clipping (ppo: the actor's).";
    CriticGradNorm, "criticGradNorm", "rlhf_critic_grad_norm", "Global L2 norm of the critic's gradient before clipping (ppo).";
    TokensPerSecond, "tokensPerSecond", "rlhf_tokens_per_second", "Tokens trained on a second, over all ranks.";
    RolloutTokensPerSecond, "rolloutTokensPerSecond", "rlhf_rollout_tokens_per_second", "Tokens generated a second in the rollout, over all ranks (ppo).";
}

impl Figure {
    /// Its key in the progress document, in output metrics and in log lines.
    pub const fn key(self) -> &'static str {
        self.row().key
    }

    /// The name of its Prometheus gauge.
    pub const fn metric(self) -> &'static str {
        self.row().metric
    }

    /// What it means, in one sentence.
    pub const fn help(self) -> &'static str {
        self.row().help
    }
}

/// The mean score by each reward model, before its weight, under the rewards' names.
pub type Rewards = Vec<(String, f64)>;

/// Whose answers' scores by each reward are told. Their names are the job's, so they are no figures of the table: they are
/// labels of a metric, and stand behind a slash in keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RewardOf {
    /// Of an iteration's rollout: `reward/<name>`.
    Rollout,
    /// Of an evaluation: `evalReward/<name>`.
    Evaluation,
}

impl RewardOf {
    /// The scores under their keys in the progress document, in output metrics and in learning curves.
    pub fn keyed(self, rewards: &[(String, f64)]) -> impl Iterator<Item = (String, f64)> {
        let figure = match self {
            RewardOf::Rollout => Figure::Reward,
            RewardOf::Evaluation => Figure::EvalReward,
        };
        rewards.iter().map(move |(name, score)| (format!("{}/{name}", figure.key()), *score))
    }
}

/// Rounded to six significant digits: what a reader of a log can use.
fn six_digits(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn snake_case(key: &str) -> String {
        key.chars().flat_map(|c| [c.is_uppercase().then_some('_'), Some(c.to_ascii_lowercase())]).flatten().collect()
    }

    #[test]
    fn a_metric_is_named_after_the_progress_key() {
        for figure in Figure::ALL {
            assert_eq!(figure.metric(), format!("rlhf_{}", snake_case(figure.key())));
            assert_eq!(format!("{figure:?}").to_lowercase(), figure.key().to_lowercase());
            assert!(figure.help().ends_with('.'), "{figure:?}");
        }
        let keys: BTreeSet<_> = Figure::ALL.iter().map(|f| f.key()).collect();
        assert_eq!(keys.len(), Figure::ALL.len());
    }

    #[test]
    fn log_values_have_six_digits() {
        assert_eq!(six_digits(2.345_678_9), 2.34568);
        assert_eq!(six_digits(1.234_567_8e-7), 1.23457e-7);
        assert_eq!(six_digits(0.0), 0.0);
        assert!(six_digits(f64::NAN).is_nan());
        assert_eq!(six_digits(f64::INFINITY), f64::INFINITY);
    }
}
