//! PPO against several reward models, with models of other origin and shape, and stages that follow one of their own kind.

#![allow(clippy::unwrap_used, clippy::panic)] // tests and what they are made of fail by panicking

mod common;

use common::{Launch, Volume, finished, ppo, reward, sft};
use serde_json::{Value, json};
use std::fs;

/// A volume of Llamas whose stages `sft` and `reward` have run, with a reward model of GPT-2's kind that another job has
/// trained.
fn volume() -> Volume {
    let volume = finished("llama-gqa-untied", &reward());
    volume.succeed(&sft());
    let other = finished("gpt2", &reward());
    let (from, to) = (other.path("jobs/j/reward/model"), volume.path("models/judge"));
    fs::create_dir_all(&to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    volume
}

/// Two rewards, a reference that is not the actor's start, and a critic of another shape than the actor.
fn mixed() -> Launch {
    let mut launch = ppo().with(
        "/rewards",
        json!([
            {"name": "safe", "weight": -0.5, "model": {"source": "volume://models/judge"}},
            {"name": "liked", "weight": 2.0, "model": {"stage": "reward"}}
        ]),
    );
    let paths = &mut launch.config["paths"];
    paths["rewardModels"] = json!({"liked": "jobs/j/reward/model", "safe": "models/judge"});
    (paths["criticModel"], paths["referenceModel"]) = (json!("models/judge"), json!("jobs/j/sft/model"));
    launch
}

/// The figures of each iteration that must add up.
fn sums(volume: &Volume) -> Vec<[f64; 3]> {
    let figures = ["reward", "reward/liked", "reward/safe"].map(|figure| volume.curve("ppo", figure));
    (0..figures[0].len()).map(|i| [0, 1, 2].map(|f| figures[f][i])).collect()
}

#[test]
fn every_reward_is_told_and_counts_by_its_weight() {
    let volume = volume();
    let end = volume.succeed(&mixed());
    let whole = sums(&volume);
    assert_eq!(whole.len(), 5);
    for [all, liked, safe] in &whole {
        assert!((all - (2.0 * liked - 0.5 * safe)).abs() < 1e-9, "{all} of {liked} and {safe}");
        assert!(liked.abs() > 1e-6 && safe.abs() > 1e-6 && (liked - safe).abs() > 1e-6);
    }
    let metrics = &end.message["output"]["metrics"];
    for key in ["evalReward", "evalReward/liked", "evalReward/safe", "evalReward/likedBefore", "evalReward/safeBefore"]
    {
        assert!(metrics[key].is_f64(), "{key} in {metrics}");
    }
    let sample = fs::read_to_string(volume.path("jobs/j/ppo/samples/eval-after.jsonl")).unwrap();
    let sample: Value = serde_json::from_str(sample.lines().next().unwrap()).unwrap();
    let rewards = &sample["rewards"];
    let all = 2.0 * rewards["liked"].as_f64().unwrap() - 0.5 * rewards["safe"].as_f64().unwrap();
    assert!((all - sample["reward"].as_f64().unwrap()).abs() < 1e-9, "{sample}");
    // The actor starts away from the reference, and without one of its own at it.
    assert!(metrics["evalKlBefore"].as_f64().unwrap().abs() > 1e-3, "{metrics}");
    fs::remove_dir_all(volume.path("jobs/j/ppo")).unwrap();
    let mut plain = mixed();
    plain.config["paths"]["referenceModel"] = Value::Null;
    let end = volume.succeed(&plain.attempt(2));
    assert!(end.message["output"]["metrics"]["evalKlBefore"].as_f64().unwrap().abs() < 1e-6, "{}", end.message);
}

#[test]
fn it_is_the_same_on_two_ranks_and_frugal_ones() {
    let frugal = json!({"sharding": "zero3", "offload": "parameters", "recompute": "block"});
    let run = |launch: Launch| {
        let volume = volume();
        volume.succeed(&launch);
        sums(&volume)
    };
    let alone = run(mixed());
    for launch in [mixed().processes(2), mixed().processes(2).strategy(frugal)] {
        for (one, other) in alone.iter().zip(run(launch)) {
            assert!(one.iter().zip(&other).all(|(a, b)| (a - b).abs() < 1e-3), "{one:?} and {other:?}");
        }
    }
}

#[test]
fn adapters_share_the_backbone_of_what_came_of_the_actors_start() {
    let volume = volume();
    // The judge's critic and reward share one, which is not the actor's.
    let end = volume.succeed(&mixed().lora(json!({})));
    assert!(end.log.contains("backbones=3"), "{}", end.log);
    for [all, liked, safe] in sums(&volume) {
        assert!((all - (2.0 * liked - 0.5 * safe)).abs() < 1e-9);
    }
    // A reward model that was trained by adapters from the actor's start needs none of its own.
    ["reward", "ppo"].iter().for_each(|stage| fs::remove_dir_all(volume.path(&format!("jobs/j/{stage}"))).unwrap());
    volume.succeed(&reward().lora(json!({"dropout": 0.1})));
    let end = volume.succeed(&mixed().lora(json!({})));
    assert!(end.log.contains("backbones=2"), "{}", end.log);
}

#[test]
fn a_stage_follows_one_of_its_own_kind() {
    let volume = finished("gpt2", &ppo());
    volume.succeed(&sft());
    for (launch, start) in [(sft(), "jobs/j/sft/model"), (ppo(), "jobs/j/ppo/model")] {
        let mut again = launch;
        let name = format!("{}-again", again.config["stage"].as_str().unwrap());
        again.config["stage"] = json!(name);
        let paths = &mut again.config["paths"];
        paths["startModel"] = json!(start);
        (paths["output"], paths["checkpoints"]) =
            (json!(format!("jobs/j/{name}/model")), json!(format!("jobs/j/{name}/checkpoints")));
        volume.succeed(&again);
        let before = fs::read(volume.path(start).join("model.safetensors")).unwrap();
        assert!(volume.weights(&name) != before, "{name} has learnt something");
    }
}

#[test]
fn a_reward_without_its_model_is_named() {
    let volume = volume();
    let mut launch = mixed();
    launch.config["paths"]["rewardModels"] = json!({"liked": "jobs/j/reward/model"});
    volume.run(&launch).expect(64, "BadConfig", &["paths.rewardModels has no 'safe'"]);
    launch.config["paths"]["rewardModels"] = json!({"liked": "jobs/j/reward/model", "safe": "models/base"});
    volume.run(&launch.adopting(2)).expect(65, "BadInput", &["models/base", "no tensor 'score.weight'"]);
}
