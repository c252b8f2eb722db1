//! What a newer definition lets a job say and this version does not know.
//!
//! Reading is lenient: of a union that has a newer member nothing is left, and a newer scheme is a text like any other. Whoever
//! works by such a field asks here first, for what is taken as if it were not there is worse than what is refused.

use crate::reference::{ModelRef, VOLUME_SCHEME};
use crate::source::is_remote;
use crate::stage::{Dataset, Ppo, StageKind};

/// Whether a location has a scheme, and one that is not known here.
fn is_elsewhere(source: &str) -> bool {
    source.contains("://") && !source.starts_with(VOLUME_SCHEME) && !is_remote(source)
}

impl ModelRef {
    /// The member of which nothing is known here, below `field`: that is the field itself where it has none of those that are.
    pub fn unknown(&self, field: &str) -> Option<String> {
        match (&self.stage, &self.source) {
            (None, None) => Some(field.to_owned()),
            (_, Some(source)) if is_elsewhere(source) => Some(format!("{field}.source")),
            _ => None,
        }
    }
}

impl Dataset {
    /// As [`ModelRef::unknown`].
    fn unknown(&self, field: &str) -> Option<String> {
        let files = self.files();
        let elsewhere =
            files.iter().find(|(_, source)| is_elsewhere(source)).map(|(part, _)| format!("{field}.{part}"));
        let nowhere = self.source.is_none() && self.sources.is_empty();
        elsewhere.or_else(|| nowhere.then(|| field.to_owned()))
    }
}

impl Ppo {
    /// The first field of a stage of PPO that says how in a way that is not known here.
    fn unknown(&self) -> Option<String> {
        if self.advantage.estimator().is_none() {
            return Some("advantage".into());
        }
        let untold = self.rewards.iter().find(|reward| reward.model.is_none());
        untold.map(|reward| format!("rewards[{}]", reward.name))
    }
}

impl StageKind {
    /// The first field of a stage, such as `ppo.advantage`, that says something in a way that is not known here.
    pub fn unknown(&self) -> Option<String> {
        let (field, dataset) = self.dataset();
        let of_data = || dataset.unknown(&format!("{}.{field}", self.name()));
        let of_models = || self.models().iter().find_map(|named| named.model.unknown(&named.field));
        let own = match self {
            StageKind::Ppo(ppo) => ppo.unknown().map(|field| format!("{}.{field}", self.name())),
            StageKind::Sft(_) | StageKind::RewardModel(_) => None,
        };
        own.or_else(of_models).or_else(of_data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn ppo(change: impl FnOnce(&mut Value)) -> StageKind {
        let optimizer = json!({"learningRate": 1e-4});
        let mut ppo = json!({
            "start": {"stage": "sft"}, "rewards": [{"name": "liked", "model": {"source": "volume://models/rm"}}],
            "prompts": {"source": "volume://p.jsonl"}, "iterations": 2, "rolloutBatchSize": 8, "batch": {"globalSize": 8},
            "maxPromptLength": 8, "maxNewTokens": 8, "kl": {"coefficient": 0.1},
            "actorOptimizer": optimizer, "criticOptimizer": optimizer,
        });
        change(&mut ppo);
        StageKind::Ppo(serde_json::from_value(ppo).unwrap())
    }

    #[test]
    fn what_a_newer_definition_lets_a_stage_say_is_named() {
        assert_eq!(ppo(|_| ()).unknown(), None);
        type Change = fn(&mut Value);
        let cases: [(Change, &str); 9] = [
            (|p| p["advantage"] = json!({"optimalTransport": {}}), "ppo.advantage"),
            (|p| p["rewards"][0] = json!({"name": "tests", "http": {"url": "https://x"}}), "ppo.rewards[tests]"),
            (|p| p["start"] = json!({"hub": {}}), "ppo.start"),
            (|p| p["reference"] = json!({"source": "oci://a/b@main"}), "ppo.reference.source"),
            (|p| p["critic"] = json!({"source": "ftp://a/b"}), "ppo.critic.source"),
            (|p| p["rewards"][0]["model"] = json!({"source": "oci://a/b"}), "ppo.rewards[liked].model.source"),
            (|p| p["prompts"]["source"] = json!("oci://datasets/a"), "ppo.prompts.source"),
            (|p| p["prompts"] = json!({"sources": [{"source": "ftp://a/b"}]}), "ppo.prompts.sources[0].source"),
            (|p| p["prompts"] = json!({"generated": {}}), "ppo.prompts"),
        ];
        for (change, field) in cases {
            assert_eq!(ppo(change).unknown().as_deref(), Some(field));
        }
        let nowhere = ModelRef { source: Some("models/x".into()), ..ModelRef::default() };
        assert_eq!(nowhere.unknown("model"), None, "it is no location at all, which is wrong in every version");
    }
}
