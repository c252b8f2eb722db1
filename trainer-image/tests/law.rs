//! The law that holds the engine up: however a run is spread over processes, micro-batches and memory, its first twenty
//! losses and its final parameters are those of the plain run, within the rounding of fp32.
//!
//! By default a cross section of all settings runs, in which each strategy meets each kind of split. With `LAW=all` in the
//! environment (`make test-law`) every combination does, with `LAW=2/12` the second of twelve parts of them.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

mod common;

use common::{FAMILIES, Launch, Volume, ppo, relative_gap, reward, sft};
use serde_json::{Value, json};

/// Over twenty steps of fp32. Relative for parameters and figures above one; figures below are sums of terms of the order
/// of one that nearly cancel, so for them it is absolute.
const TOLERANCE: f64 = 1e-5;

/// The same for adapters. They begin at zero, so that all of a number is what training made of it, and Adam divides a gradient
/// by its own size: one that nearly vanishes is mostly rounding, and moves its number as far as any other. The parameters of a
/// whole model hide that behind where they began. Seen: up to 1.2e-5.
const ADAPTER_TOLERANCE: f64 = 1e-4;

/// A way to run a stage.
#[derive(Clone, Copy, Debug)]
struct Setting {
    sharding: &'static str,
    offload: &'static str,
    recompute: &'static str,
    processes: u32,
    micro: u32,
}

impl Setting {
    /// Every combination.
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for sharding in ["ddp", "zero1", "zero2", "zero3"] {
            for offload in ["none", "optimizer", "parameters"] {
                for recompute in ["none", "block"] {
                    for processes in [1, 2, 4] {
                        for micro in [6, 2, 1] {
                            all.push(Self { sharding, offload, recompute, processes, micro });
                        }
                    }
                }
            }
        }
        all
    }

    /// Every combination, or a cross section of them that is spread over the families: each strategy with two processes, one
    /// in four of them with one or with four too, and the other settings in turn.
    fn chosen(family: &str) -> Vec<Self> {
        let all = Self::all();
        let law = std::env::var("LAW").unwrap_or_default();
        if law == "all" {
            return all;
        }
        if let Some((part, parts)) = law.split_once('/') {
            let (part, parts): (usize, usize) = (part.parse().unwrap(), parts.parse().unwrap());
            return all.into_iter().skip(part - 1).step_by(parts).collect();
        }
        let family = FAMILIES.iter().position(|f| *f == family).unwrap();
        let section = |(i, s): (usize, &Self)| {
            let strategy = i / 18;
            if strategy % FAMILIES.len() != family {
                return None;
            }
            let (recompute, micro) = (["none", "block"][strategy % 2], [2, 1, 6, 2, 1][strategy % 5]);
            let processes =
                s.processes == 2 || (s.processes == 1 && strategy % 4 == 1) || (s.processes == 4 && strategy % 4 == 3);
            (s.recompute == recompute && s.micro == micro && processes).then_some(*s)
        };
        all.iter().enumerate().filter_map(section).collect()
    }

    fn name(&self) -> String {
        let Self { sharding, offload, recompute, processes, micro } = self;
        format!("{sharding}, offload {offload}, recompute {recompute}, {processes} processes, micro-batches of {micro}")
    }

    fn apply(&self, launch: Launch) -> Launch {
        let strategy = json!({"sharding": self.sharding, "offload": self.offload, "recompute": self.recompute});
        launch.strategy(strategy).processes(self.processes).micro(self.micro)
    }
}

fn close(what: &str, actual: &[f64], expected: &[f64]) {
    // A norm sums the rounding of every gradient, at parameters that themselves differ by the tolerance; a wrong scale is far off.
    let tolerance = if what.ends_with("gradNorm") { 10.0 * TOLERANCE } else { TOLERANCE };
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (step, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!((a - e).abs() <= tolerance * e.abs().max(1.0), "{what}, step {}: {a}, expected {e}", step + 1);
    }
}

/// Runs a stage plainly and in every split, on volumes that `prepare` has filled, and compares the figures.
fn holds(family: &str, plain: &Launch, figures: &[&str], prepare: impl Fn(&Volume)) {
    holds_for(&Setting::chosen(family), family, plain, figures, prepare);
}

fn holds_for(settings: &[Setting], family: &str, plain: &Launch, figures: &[&str], prepare: impl Fn(&Volume)) {
    let stage = plain.config["stage"].as_str().unwrap().to_string();
    let run = |launch: &Launch| {
        let volume = Volume::new(family);
        prepare(&volume);
        volume.succeed(launch);
        volume
    };
    let expected = run(plain);
    for setting in settings {
        let what = format!("{stage}, {family}, {}", setting.name());
        let actual = run(&setting.apply(plain.clone()));
        for figure in figures {
            let curve = expected.curve(&stage, figure);
            assert!(!curve.is_empty(), "{stage} tells no {figure}");
            close(&format!("{what}, {figure}"), &actual.curve(&stage, figure), &curve);
        }
        let gap = relative_gap(&actual.weights(&stage), &expected.weights(&stage));
        println!("{what}: parameters within {gap:.1e}");
        assert!(gap <= TOLERANCE, "{what}: parameters differ by {gap}");
        if let Some(adapters) = expected.adapter_weights(&stage) {
            let gap = relative_gap(&actual.adapter_weights(&stage).unwrap(), &adapters);
            println!("{what}: adapters within {gap:.1e}");
            assert!(gap <= ADAPTER_TOLERANCE, "{what}: adapters differ by {gap}");
        }
    }
}

#[test]
fn supervised_fine_tuning_does_not_depend_on_how_it_is_split() {
    for family in FAMILIES {
        holds(family, &sft(), &["loss", "gradNorm", "evalLoss"], |_| {});
    }
}

/// Packed rows are split like any others; and a step over all samples is the same step, packed or not.
#[test]
fn packed_samples_are_learnt_as_those_that_stand_alone() {
    let packed = |launch: Launch| launch.with("/packing", json!({"length": 30}));
    let setting = |sharding, processes, micro| Setting {
        sharding,
        offload: "none",
        recompute: ["none", "block"][processes as usize % 2],
        processes,
        micro,
    };
    let settings = [setting("ddp", 2, 2), setting("zero3", 2, 1), setting("zero2", 1, 1)];
    holds_for(&settings, "llama-gqa-untied", &packed(sft()), &["loss", "gradNorm", "evalLoss"], |_| {});
    for family in FAMILIES {
        let of_all = |launch: Launch| launch.with("/batch/globalSize", json!(64)).with("/maxSteps", json!(4));
        let [apart, together] = [of_all(sft()), packed(of_all(sft()))].map(|launch| {
            let volume = Volume::new(family);
            volume.succeed(&launch);
            volume
        });
        for figure in ["loss", "gradNorm", "evalLoss"] {
            let what = format!("{family}, packed, {figure}");
            close(&what, &together.curve("sft", figure), &apart.curve("sft", figure));
        }
        let gap = relative_gap(&together.weights("sft"), &apart.weights("sft"));
        assert!(gap <= TOLERANCE, "{family}: parameters differ by {gap}");
    }
}

#[test]
fn reward_model_training_does_not_depend_on_how_it_is_split() {
    for family in FAMILIES {
        holds(family, &reward(), &["loss", "accuracy", "margin", "gradNorm", "evalAccuracy"], |_| {});
    }
}

#[test]
fn ppo_does_not_depend_on_how_it_is_split() {
    for family in FAMILIES {
        let trained = Volume::new(family);
        trained.succeed(&reward());
        holds(family, &ppo(), &PPO_FIGURES, |volume| volume.copy_job(&trained));
    }
}

/// What is compared of a PPO stage.
const PPO_FIGURES: [&str; 9] = [
    "reward",
    "kl",
    "policyLoss",
    "valueLoss",
    "clipFraction",
    "responseLength",
    "gradNorm",
    "criticGradNorm",
    "evalReward",
];

/// Clipping divides a gradient by its own norm and so hides a wrong scale, as Adam does after some steps: without it, and with
/// an epsilon of the gradients' own size, a gradient that is summed twice is another run.
#[test]
fn gradients_that_are_not_clipped_do_not_depend_on_how_they_are_split() {
    let unclipped = |launch: Launch, optimizers: &[&str]| {
        optimizers.iter().fold(launch, |launch, optimizer| {
            launch
                .with(&format!("/{optimizer}/maxGradNorm"), json!(1e6))
                .with(&format!("/{optimizer}/epsilon"), json!(1e-2))
        })
    };
    let family = "llama-gqa-untied";
    holds_for(&FEW, family, &unclipped(sft(), &["optimizer"]), &["loss", "gradNorm", "evalLoss"], |_| {});
    let scored = unclipped(reward(), &["optimizer"]);
    holds_for(&FEW, family, &scored, &["loss", "margin", "gradNorm"], |_| {});
    let trained = Volume::new(family);
    trained.succeed(&reward());
    let both = unclipped(ppo(), &["actorOptimizer", "criticOptimizer"]);
    holds_for(&FEW, family, &both, &PPO_FIGURES, |volume| volume.copy_job(&trained));
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

/// Group relative policy optimisation as in its paper: no critic, several answers to a prompt, the KL penalty in the loss. Unclipped,
/// so that a wrong scale of its gradient shows.
#[test]
fn what_has_no_critic_does_not_depend_on_how_it_is_split() {
    let family = "llama-gqa-untied";
    let trained = Volume::new(family);
    trained.succeed(&reward());
    let figures = ["reward", "kl", "policyLoss", "clipFraction", "responseLength", "gradNorm", "evalReward"];
    let relative = without_critic(json!({"groupRelative": {}}), 3)
        .with("/kl", json!({"coefficient": 0.5, "estimator": "k3", "place": "loss"}))
        .with("/actorOptimizer/maxGradNorm", json!(1e6));
    holds_for(&FEW, family, &relative, &figures, |volume| volume.copy_job(&trained));
    for (advantage, samples) in [(json!({"leaveOneOut": {}}), 2), (json!({"reinforcePlusPlus": {}}), 1)] {
        holds_for(&FEW[..1], family, &without_critic(advantage, samples), &figures, |volume| volume.copy_job(&trained));
    }
}

/// A stage of PPO whose advantages need no critic.
fn without_critic(advantage: Value, samples: u32) -> Launch {
    let mut launch = ppo().with("/advantage", advantage).with("/samplesPerPrompt", json!(samples));
    let settings = launch.config["kind"]["ppo"].as_object_mut().unwrap();
    assert!(settings.remove("criticOptimizer").is_some());
    launch.config["paths"].as_object_mut().unwrap().remove("criticModel");
    launch
}

/// Nothing is there of a critic that is not needed, and a penalty in the loss pulls the actor back.
#[test]
fn without_a_critic_none_is_kept_and_the_loss_holds_the_actor_near_the_reference() {
    let trained = Volume::new("gpt2");
    trained.succeed(&reward());
    let mut kl = Vec::new();
    for coefficient in [0.0, 100.0] {
        let volume = Volume::new("gpt2");
        volume.copy_job(&trained);
        let launch = without_critic(json!({"groupRelative": {"scale": "none"}}), 4)
            .with("/epochs", json!(4))
            .with("/kl", json!({"coefficient": coefficient, "estimator": "k3", "place": "loss"}));
        volume.succeed(&launch);
        for figure in ["criticGradNorm", "valueLoss", "explainedVariance", "criticLearningRate"] {
            assert!(volume.curve("ppo", figure).is_empty(), "{figure} is none of this stage's");
        }
        let manifest = volume.path("jobs/j/ppo/checkpoints").join(format!("step-{}", volume.checkpoints("ppo")[0]));
        let names: Vec<_> = std::fs::read_dir(manifest).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(names.iter().all(|name| !name.to_string_lossy().contains("critic")), "{names:?}");
        kl.push(volume.curve("ppo", "kl").into_iter().fold(0.0, f64::max));
    }
    assert!(kl[1] < 0.5 * kl[0], "{kl:?}");
}

/// Settings for what is compared with the plain run under few: stages that train adapters, and further families.
const FEW: [Setting; 3] = [
    Setting { sharding: "zero3", offload: "parameters", recompute: "block", processes: 2, micro: 2 },
    Setting { sharding: "zero1", offload: "none", recompute: "none", processes: 2, micro: 1 },
    Setting { sharding: "ddp", offload: "optimizer", recompute: "none", processes: 1, micro: 2 },
];

/// Embeddings that are normalised, projected or scaled have a backward of their own, for which a rank fetches them once more.
#[test]
fn embeddings_that_go_through_something_do_not_depend_on_how_they_are_split() {
    for family in ["bloom", "opt-350m", "gemma3"] {
        holds_for(&FEW, family, &sft(), &["loss", "gradNorm", "evalLoss"], |_| {});
    }
    holds_for(&FEW, "opt-350m", &reward(), &["loss", "margin", "gradNorm"], |_| {});
}

#[test]
fn adapters_do_not_depend_on_how_they_are_trained() {
    for family in ["gpt2", "llama-gqa-untied"] {
        let dropped = json!({"rank": 4, "dropout": 0.1});
        holds_for(&FEW, family, &sft().lora(dropped.clone()), &["loss", "gradNorm", "evalLoss"], |_| {});
        let some = json!({"rank": 4, "alpha": 4, "targets": ["query", "value", "up"]});
        let scored = reward().lora(some.clone());
        let figures = ["loss", "accuracy", "margin", "gradNorm", "evalAccuracy"];
        holds_for(&FEW, family, &scored, &figures, |_| {});
        // The reward model by adapters from the actor's start, with which it then shares a backbone; and trained whole.
        for (reward, settings) in [(scored, &FEW[..]), (reward(), &FEW[..1])] {
            let trained = Volume::new(family);
            trained.succeed(&reward);
            let adapted = ppo().lora(json!({"rank": 4}));
            holds_for(settings, family, &adapted, &PPO_FIGURES, |volume| volume.copy_job(&trained));
        }
    }
}

/// 16 bits round, so their runs cannot equal those of fp32; they must stay beside them, under the plainest and under the most
/// frugal strategy. In fp16 the loss scale finds its place in the first steps, of which it skips some: later steps lag.
#[test]
fn sixteen_bits_learn_what_thirty_two_do() {
    for family in FAMILIES {
        let curve = |strategy: Value, processes| {
            let volume = Volume::new(family);
            volume.succeed(&sft().strategy(strategy).processes(processes).micro(2));
            volume.curve("sft", "loss")
        };
        let expected = curve(json!({}), 1);
        for (precision, tolerance) in [("bf16", 0.02), ("fp16", 0.1)] {
            let frugal =
                json!({"precision": precision, "sharding": "zero3", "offload": "parameters", "recompute": "block"});
            for (strategy, processes) in [(json!({"precision": precision}), 1), (frugal, 2)] {
                let actual = curve(strategy.clone(), processes);
                let gap = actual.iter().zip(&expected).map(|(a, e)| (a - e).abs() / e).fold(0.0, f64::max);
                println!("{family}, {strategy}: losses within {gap:.1e}");
                assert!(
                    actual.len() == expected.len() && gap < tolerance,
                    "{family}, {strategy}: {actual:?}, fp32 {expected:?}"
                );
            }
        }
    }
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

/// What the sampler had of each token, one by one over a cache and padded on the left, is what scoring has of it, whole and padded
/// on the right: another position, mask or temperature in one of them would show here, and nowhere else.
#[test]
fn the_sampler_and_the_scoring_give_a_drawn_token_the_same_probability() {
    for family in FAMILIES {
        let trained = Volume::new(family);
        trained.succeed(&reward());
        // fp32's rounding through a softmax; 16 bits round a logit of about 4 by as much as 2^-7 and 2^-10 of it.
        for (precision, tolerance) in [("fp32", 2e-5), ("bf16", 0.1), ("fp16", 0.02)] {
            for (sampling, processes) in [(json!({}), 2), (json!({"temperature": 0.7, "topK": 30, "topP": 0.95}), 1)] {
                let volume = Volume::new(family);
                volume.copy_job(&trained);
                let launch = ppo().with("/iterations", json!(2)).with("/sampling", sampling.clone()).micro(5);
                volume.succeed(&launch.strategy(json!({"precision": precision})).processes(processes));
                let (mean, most) = (volume.curve("ppo", "samplerGap"), volume.curve("ppo", "samplerGapMax"));
                println!("{family}, {precision}, {sampling}: mean {mean:?}, at most {most:?}");
                assert!(mean.len() == 2 && mean.iter().zip(&most).all(|(mean, most)| mean <= most));
                assert!(most.iter().all(|most| *most < tolerance), "{family}, {precision}: off by up to {most:?}");
            }
        }
    }
}

/// A critic that starts as a reward model that was trained with dropout has none itself.
#[test]
fn a_critic_drops_nothing_though_its_reward_model_was_trained_so() {
    let trained = Volume::new("gpt2");
    trained.succeed(&reward().lora(json!({"rank": 4, "dropout": 0.5})));
    let still = ppo()
        .with("/actorOptimizer/learningRate", json!(0.0))
        .with("/criticOptimizer/learningRate", json!(0.0))
        .lora(json!({"rank": 4}));
    let run = |dropout: f64| {
        let volume = Volume::new("gpt2");
        volume.copy_job(&trained);
        let path = volume.path("jobs/j/reward/adapter/adapter_config.json");
        let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(config["lora_dropout"], 0.5);
        config["lora_dropout"] = json!(dropout);
        std::fs::write(&path, config.to_string()).unwrap();
        volume.succeed(&still);
        volume.curve("ppo", "criticGradNorm")
    };
    let (dropped, whole) = (run(0.5), run(0.0));
    assert!(whole.len() == 5 && whole.iter().all(|norm| *norm > 0.0));
    assert_eq!(dropped, whole);
}

/// Supervised stages take torch's epsilon and PPO that of Ziegler 2019, unless they are told another.
#[test]
fn adams_epsilon_is_by_default_what_its_stage_wants() {
    let trained = Volume::new("gpt2");
    trained.succeed(&reward());
    let weights = |launch: Launch| {
        let volume = Volume::new("gpt2");
        volume.copy_job(&trained);
        volume.succeed(&launch);
        volume.weights(launch.config["stage"].as_str().unwrap())
    };
    let [small, large] = [1e-8, 1e-5].map(|epsilon| json!(epsilon));
    let sft_with = |epsilon: &Value| weights(sft().with("/optimizer/epsilon", epsilon.clone()));
    let plain = sft_with(&Value::Null);
    assert!(plain == sft_with(&small) && plain != sft_with(&large));
    let ppo_with = |epsilon: &Value| {
        let both = ppo().with("/actorOptimizer/epsilon", epsilon.clone());
        weights(both.with("/criticOptimizer/epsilon", epsilon.clone()))
    };
    let plain = ppo_with(&Value::Null);
    assert!(plain == ppo_with(&large) && plain != ppo_with(&small));
}
