//! The law that holds the engine up: however a run is split over processes, micro-batches and recomputation, its first
//! twenty losses and its final parameters are those of the plain run, within the rounding of fp32.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

mod common;

use common::{FAMILIES, Launch, Volume, ppo, relative_gap, reward, sft};
use serde_json::json;

/// Over twenty steps of fp32. Relative for parameters and figures above one; figures below are sums of terms of the order
/// of one that nearly cancel, so for them it is absolute.
const TOLERANCE: f64 = 1e-5;

/// The ways to split a run, by name.
fn settings(plain: Launch) -> Vec<(&'static str, Launch)> {
    vec![
        ("2 processes", plain.clone().processes(2)),
        ("4 processes, micro-batches of 1", plain.clone().processes(4).micro(1)),
        ("micro-batches of 4", plain.clone().micro(4)),
        ("recompute", plain.clone().recompute("block")),
        ("2 processes, micro-batches of 2, recompute", plain.processes(2).micro(2).recompute("block")),
    ]
}

fn close(what: &str, actual: &[f64], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (step, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!((a - e).abs() <= TOLERANCE * e.abs().max(1.0), "{what}, step {}: {a}, expected {e}", step + 1);
    }
}

/// Runs a stage plainly and in every split, on volumes that `prepare` has filled, and compares the figures.
fn holds(family: &str, plain: &Launch, figures: &[&str], prepare: impl Fn(&Volume)) {
    let stage = plain.config["stage"].as_str().unwrap().to_string();
    let run = |launch: &Launch| {
        let volume = Volume::new(family);
        prepare(&volume);
        volume.succeed(launch);
        volume
    };
    let expected = run(plain);
    for (name, launch) in settings(plain.clone()) {
        let what = format!("{stage}, {family}, {name}");
        let actual = run(&launch);
        for figure in figures {
            let curve = expected.curve(&stage, figure);
            assert!(!curve.is_empty(), "{stage} tells no {figure}");
            close(&format!("{what}, {figure}"), &actual.curve(&stage, figure), &curve);
        }
        let gap = relative_gap(&actual.weights(&stage), &expected.weights(&stage));
        println!("{what}: parameters within {gap:.1e}");
        assert!(gap <= TOLERANCE, "{what}: parameters differ by {gap}");
    }
}

#[test]
fn supervised_fine_tuning_does_not_depend_on_how_it_is_split() {
    for family in FAMILIES {
        holds(family, &sft(), &["loss", "evalLoss"], |_| {});
    }
}

#[test]
fn reward_model_training_does_not_depend_on_how_it_is_split() {
    for family in FAMILIES {
        holds(family, &reward(), &["loss", "accuracy", "margin", "evalAccuracy"], |_| {});
    }
}

#[test]
fn ppo_does_not_depend_on_how_it_is_split() {
    for family in FAMILIES {
        let trained = Volume::new(family);
        trained.succeed(&reward());
        let figures = ["reward", "kl", "policyLoss", "valueLoss", "clipFraction", "responseLength", "evalReward"];
        holds(family, &ppo(), &figures, |volume| volume.copy_job(&trained));
    }
}

#[test]
fn ppo_with_every_option_does_not_depend_on_how_it_is_split() {
    let trained = Volume::new("gpt2");
    trained.succeed(&reward());
    let options = ppo()
        .with("/entropyCoefficient", json!(0.01))
        .with("/targetKl", json!(0.001))
        .with("/missingEosPenalty", json!(-1.0))
        .with("/clipReward", json!(2.0))
        .with("/sampling", json!({"temperature": 0.8, "topK": 20, "topP": 0.9}));
    holds("gpt2", &options, &["reward", "kl", "policyLoss", "approxKl"], |volume| volume.copy_job(&trained));
}

/// At learning rate 0 nothing may move: not with another temperature, micro-batch, process count or estimator.
#[test]
fn at_learning_rate_zero_the_ratio_is_one_and_nothing_is_clipped() {
    let trained = Volume::new("gpt2");
    trained.succeed(&reward());
    let still =
        ppo().with("/actorOptimizer/learningRate", json!(0.0)).with("/criticOptimizer/learningRate", json!(0.0));
    let warm = still.clone().with("/sampling", json!({"temperature": 0.7}));
    for launch in [
        still.clone(),
        still.clone().micro(1),
        still.processes(2),
        warm.clone(),
        warm.with("/kl/estimator", json!("k3")).micro(5),
    ] {
        let volume = Volume::new("gpt2");
        volume.copy_job(&trained);
        volume.succeed(&launch);
        for figure in ["kl", "clipFraction", "ratio"] {
            assert_eq!(volume.curve("ppo", figure).len(), 5, "{figure} is told at each iteration");
        }
        let largest = |figure: &str| volume.curve("ppo", figure).into_iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        assert_eq!(largest("kl"), 0.0, "{launch:?}");
        assert_eq!(largest("clipFraction"), 0.0, "{launch:?}");
        // Another batch shape may round the last bit of a logit otherwise: 1e-6 is that bit, through the softmax.
        let off = volume.curve("ppo", "ratio").into_iter().fold(0.0, |m: f64, r| m.max((r - 1.0).abs()));
        assert!(off < 1e-6, "ratio off by {off}: {launch:?}");
    }
}
