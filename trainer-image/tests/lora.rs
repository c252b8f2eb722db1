//! Stages that train adapters, as the real `rlhf-trainer launch` runs them: what they write, and what PPO starts from.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

mod common;

use common::{Volume, ppo, reward, sft};
use rlhf_trainer::model::{HeadKind, Segment, Source, base_of, merge_adapters, read_adapters};
use safetensors::SafeTensors;
use serde_json::json;
use std::fs;
use tch::Tensor;

const FAMILIES: [&str; 2] = ["gpt2", "llama-gqa-untied"];

/// The model beside the adapters is its start with them merged in, and nothing else: not a bit of what was frozen differs.
#[test]
fn the_written_model_is_the_start_with_the_written_adapters() {
    for family in FAMILIES {
        for precision in ["fp32", "bf16"] {
            let volume = Volume::new(family);
            let strategy = json!({"precision": precision});
            volume.succeed(&sft().lora(json!({"rank": 3, "targets": ["query", "output", "down"]})).strategy(strategy));
            let (start, model) = (volume.path("models/base"), volume.path("jobs/j/sft/model"));
            let adapter = volume.path("jobs/j/sft/adapter");
            assert_eq!(base_of(&adapter).unwrap().as_deref(), Some("models/base"));
            let (start, model) = (Source::open(&start).unwrap(), Source::open(&model).unwrap());
            let adapters = read_adapters(&adapter, start.family, &start.spec).unwrap();
            let mut moved = 0;
            for segment in start.spec.segments() {
                let read = |source: &Source| -> Vec<Tensor> {
                    source.segment(segment, HeadKind::Lm).unwrap().into_iter().flatten().collect()
                };
                let (before, after, merged) = (read(&start), read(&model), read(&start));
                let params = start.spec.params(segment, HeadKind::Lm);
                if let Segment::Block(block) = segment {
                    merge_adapters(&adapters.lora, &adapters.blocks[block], &start.spec, &params, &merged).unwrap();
                }
                for (((param, before), after), merged) in params.iter().zip(&before).zip(&after).zip(&merged) {
                    let gap = (after - merged).abs().max().double_value(&[]);
                    assert!(gap < 1e-6, "{family}, {segment:?}, {:?}: off by {gap}", param.param);
                    moved += usize::from(after != before);
                }
            }
            assert_eq!(moved, 3 * start.spec.layers, "{family}: each target has moved, and nothing else");
        }
    }
}

#[test]
fn checkpoints_hold_what_is_trained() {
    let volume = Volume::new("gpt2");
    volume.succeed(&reward().lora(json!({"rank": 2})));
    let source = Source::open(&volume.path("models/base")).unwrap();
    let bytes = fs::read(volume.path("jobs/j/reward/checkpoints/step-20/rank-00000.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    // Values and two moments of each block's adapters and of the head.
    assert_eq!(file.names().len(), 3 * (source.spec.layers + 1));
    let saved: usize = file.iter().map(|(_, t)| t.shape().iter().product::<usize>()).sum();
    assert!((saved as i64) < source.spec.parameter_count(HeadKind::Lm), "{saved} numbers");
}

/// How many backbones a PPO stage says that it holds: one where critic and reward share the actor's.
fn backbones(shared: bool) -> &'static str {
    if shared { "backbones=1" } else { "backbones=2" }
}

/// The actor starts as the reference, to the last bit, and the critic as the reward model: with adapters of the job's own, and
/// on the reward model's, which shares the actor's backbone.
#[test]
fn ppo_starts_from_the_reference_and_shares_what_is_frozen() {
    for family in FAMILIES {
        for (reward, shared) in [(reward().lora(json!({"rank": 2})), true), (reward(), false)] {
            let volume = Volume::new(family);
            volume.succeed(&reward);
            assert_eq!(volume.path("jobs/j/reward/adapter").exists(), shared);
            let launch = ppo().lora(json!({}));
            let end = volume.succeed(&launch);
            assert!(end.log.contains(backbones(shared)), "{}", end.log);
            assert_eq!(volume.curve("ppo", "kl")[0], 0.0, "{family}");
            assert!(volume.curve("ppo", "kl").iter().skip(1).any(|kl| *kl != 0.0), "{family}: the actor moves");
            assert!(volume.adapter_weights("ppo").unwrap().len() < volume.weights("ppo").len());
        }
    }
}

/// The reward model's score from its adapters is that of its merged weights.
#[test]
fn sharing_a_backbone_changes_no_score() {
    for family in FAMILIES {
        let volume = Volume::new(family);
        volume.succeed(&reward().lora(json!({"rank": 2, "alpha": 16})));
        let launch = ppo().lora(json!({"rank": 2, "alpha": 16}));
        let run = |adapter: bool| {
            let copy = Volume::new(family);
            copy.copy_job(&volume);
            if !adapter {
                fs::remove_dir_all(copy.path("jobs/j/reward/adapter")).unwrap();
            }
            let end = copy.succeed(&launch);
            assert!(end.log.contains(backbones(adapter)), "{}", end.log);
            copy.curve("ppo", "reward")[0]
        };
        let (shared, merged) = (run(true), run(false));
        assert!((shared - merged).abs() < 1e-4, "{family}: {shared} and {merged}");
    }
}

#[test]
fn a_stage_that_trains_the_whole_model_leaves_no_adapters_of_a_run_before() {
    let volume = Volume::new("gpt2");
    volume.succeed(&sft().lora(json!({})));
    assert!(volume.path("jobs/j/sft/adapter").exists());
    fs::remove_dir_all(volume.path("jobs/j/sft/checkpoints")).unwrap();
    volume.succeed(&sft().adopting(2));
    assert!(!volume.path("jobs/j/sft/adapter").exists());
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let volume = Volume::new("gpt2");
    let end = volume.run(&sft().lora(json!({"targets": ["gate"]})));
    assert_eq!(end.code, Some(64), "{}", end.log);
    assert!(end.message["message"].as_str().unwrap().contains("lora.targets"), "{}", end.message);
    volume.succeed(&reward());
    let end = volume.run(&ppo().lora(json!({"dropout": 0.1})));
    assert_eq!(end.code, Some(64), "{}", end.log);
    assert!(end.message["message"].as_str().unwrap().contains("ppo.lora.dropout"), "{}", end.message);
}
