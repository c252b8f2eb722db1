//! Checkpoints: a resumed run ends as the run that was never stopped, bit for bit, and a damaged checkpoint costs only
//! the steps since the one before.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

mod common;

use common::{Launch, Pod, Volume, finished, free_port, ppo, relative_gap, reward, rewound, sft, wait_until};
use serde_json::json;
use std::fs;
use std::process::Command;

#[test]
fn a_resumed_run_ends_bit_for_bit_as_one_that_was_never_stopped() {
    let frugal = json!({"sharding": "zero3", "offload": "parameters", "recompute": "block"});
    let runs = [
        (sft(), 10),
        (reward(), 10),
        (ppo(), 2),
        (sft().processes(2), 10),
        (ppo().processes(2), 2),
        (sft().strategy(json!({"precision": "fp16", "sharding": "zero1"})).processes(2), 10),
        (ppo().strategy(frugal.clone()).processes(2), 2),
        (sft().lora(json!({"dropout": 0.1})), 10),
        (reward().lora(json!({})).processes(2), 10),
        (ppo().lora(json!({})).strategy(frugal).processes(2), 2),
    ];
    for (launch, step) in runs {
        let stage = launch.config["stage"].as_str().unwrap().to_string();
        let whole = finished("llama-gqa-untied", &launch);
        let volume = rewound(&whole, "llama-gqa-untied", &stage, step);
        volume.succeed(&launch.clone().attempt(2));
        assert!(volume.weights(&stage) == whole.weights(&stage), "{stage}: the weights differ");
        if stage == "ppo" {
            assert_eq!(volume.curve("ppo", "klCoefficient"), whole.curve("ppo", "klCoefficient"));
        }
        let resumed = volume.trained(&stage, 2);
        assert_eq!(resumed.first(), Some(&(step + 1)), "{stage}: goes on after the checkpoint");
    }
}

#[test]
fn a_checkpoint_loads_under_another_world_size_and_another_strategy() {
    let frugal = json!({"sharding": "zero3", "offload": "optimizer"});
    let plain = sft().processes(2);
    for (first, second) in [
        (plain.clone(), sft().processes(3)),
        (plain.clone(), sft().processes(3).strategy(frugal.clone())),
        (plain.clone().strategy(frugal), sft()),
    ] {
        let whole = finished("gpt2", &first);
        let volume = rewound(&whole, "gpt2", "sft", 10);
        volume.succeed(&second.attempt(2));
        let gap = relative_gap(&volume.weights("sft"), &whole.weights("sft"));
        assert!(gap < 1e-5, "parameters differ by {gap}");
    }
}

#[test]
fn a_damaged_checkpoint_is_skipped_for_the_one_before() {
    let whole = finished("gpt2", &sft());
    type Damage = fn(&mut Vec<u8>);
    let damage: [(&str, Damage); 3] = [
        ("rank-00000.safetensors", |bytes| *bytes.last_mut().unwrap() ^= 1),
        ("rank-00000.safetensors", |bytes| bytes.truncate(bytes.len() / 2)),
        ("manifest.json", |bytes| bytes.truncate(10)),
    ];
    for (file, damage) in damage {
        let volume = rewound(&whole, "gpt2", "sft", 20);
        let path = volume.path("jobs/j/sft/checkpoints/step-20").join(file);
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        fs::write(&path, bytes).unwrap();
        let end = volume.succeed(&sft().attempt(2));
        assert!(volume.path("jobs/j/sft/checkpoints/step-20.damaged").exists(), "the damaged one is set aside");
        assert!(end.log.contains("skipping a checkpoint") && end.log.contains("step-20"), "{}", end.log);
        assert!(volume.weights("sft") == whole.weights("sft"));
    }
}

/// The launch as a job that is made anew with the same run path starts it.
fn anew(launch: &Launch) -> Launch {
    let mut launch = launch.clone();
    launch.config["job"] = json!({"namespace": "n", "name": "j", "uid": "another"});
    launch
}

#[test]
fn a_job_made_anew_goes_on_with_the_run_at_its_path() {
    // A rate that does not depend on where the run is to end, which the attempt in the middle is told otherwise.
    let launch = sft().processes(2).with("/optimizer/schedule", json!("constant"));
    let whole = finished("gpt2", &launch);
    let volume = rewound(&whole, "gpt2", "sft", 10);
    // The job before was at its seventh attempt.
    volume.succeed(&launch.clone().with("/maxSteps", json!(11)).adopting(7));
    fs::remove_dir_all(volume.path("jobs/j/sft/model")).unwrap();
    let end = volume.succeed(&anew(&launch).adopting(1));
    assert!(end.log.contains("resumed") && end.log.contains("step-11"), "{}", end.log);
    assert!(volume.weights("sft") == whole.weights("sft"));
}

#[test]
fn a_stage_that_is_done_ends_at_once_with_what_it_said() {
    let launch = sft().processes(2);
    let volume = Volume::new("gpt2");
    let first = volume.succeed(&launch);
    let lines = volume.history("sft").len();
    let written = fs::metadata(volume.path("jobs/j/sft/model/model.safetensors")).unwrap().modified().unwrap();
    for again in [anew(&launch), launch.clone().processes(1).micro(2).attempt(2)] {
        let end = volume.run(&again);
        end.expect(0, "Done", &[]);
        assert_eq!((&end.message["output"], &end.message["step"]), (&first.message["output"], &json!(20)));
        assert!(end.log.contains("the stage is done already"), "{}", end.log);
    }
    assert_eq!(volume.history("sft").len(), lines);
    assert_eq!(fs::metadata(volume.path("jobs/j/sft/model/model.safetensors")).unwrap().modified().unwrap(), written);
    // Without the model it is not done, whatever is said beside it.
    fs::remove_dir_all(volume.path("jobs/j/sft/model")).unwrap();
    volume.succeed(&launch.attempt(3));
    assert!(volume.path("jobs/j/sft/model/model.safetensors").exists());
}

/// A file server may show one pod what another does not see yet.
#[test]
fn that_a_stage_is_done_is_what_the_first_rank_sees() {
    let launch = sft();
    let (seen, unseen) = (finished("gpt2", &launch), Volume::new("gpt2"));
    let port = free_port();
    let pods = [(0, &seen), (1, &unseen)]
        .map(|(node, volume)| volume.start_as(&launch.clone().attempt(2), &Pod::of_gang(node, 2, port)));
    for pod in pods {
        let end = pod.wait();
        end.expect(0, "Done", &[]);
        assert!(end.log.contains("the stage is done already") && end.message["step"] == 20, "{}", end.log);
    }
}

#[test]
fn checkpoints_that_are_not_to_stay_go_once_the_output_is_whole() {
    let mut launch = sft().processes(2);
    launch.config["keepCheckpoints"] = json!("Running");
    let volume = Volume::new("gpt2");
    let end = volume.succeed(&launch);
    assert_eq!((end.checkpoint(), volume.path("jobs/j/sft/checkpoints").exists()), (None, false));
    assert!(volume.path("jobs/j/sft/model/model.safetensors").exists());
    // Nor do those that the attempt had no time to remove; and the stage is done where they cannot be.
    let left = volume.path("jobs/j/sft/checkpoints");
    fs::create_dir_all(left.join("step-20")).unwrap();
    let end = volume.succeed(&launch.clone().attempt(2));
    assert!(end.log.contains("the stage is done already") && !left.exists(), "{}", end.log);
    fs::write(&left, "no folder").unwrap();
    let end = volume.succeed(&launch.attempt(3));
    assert!(end.log.contains("checkpoints that nobody needs any more are left"), "{}", end.log);
}

#[test]
fn a_run_of_another_config_is_refused_with_what_differs() {
    let launch = sft();
    let volume = finished("gpt2", &launch);
    let weights = volume.weights("sft");
    let other = anew(&launch).with("/maxSteps", json!(40)).processes(2);
    let end = volume.run(&other);
    end.expect(64, "BadConfig", &["jobs/j/sft holds a run", "kind.sft.maxSteps was 20 and is 40", "storage.runPath"]);
    assert!(volume.weights("sft") == weights && volume.checkpoints("sft") == [10, 20]);
}

#[test]
fn sigterm_saves_at_the_next_step_and_the_next_attempt_goes_on() {
    let endless = sft().processes(2).with("/maxSteps", json!(100_000)).with("/epochs", json!(1000));
    let volume = Volume::new("gpt2");
    let running = volume.start(&endless);
    wait_until("five steps", || volume.curve("sft", "loss").len() >= 5);
    assert!(Command::new("kill").args(["-TERM", &running.child.id().to_string()]).status().unwrap().success());
    let end = running.wait();
    assert_eq!(
        (end.code, end.message["reason"].as_str()),
        (Some(143), Some("Terminated")),
        "{}\n{}",
        end.message,
        end.log
    );
    let step = end.message["checkpoint"]["step"].as_u64().unwrap();
    assert_eq!(end.message["step"].as_u64(), Some(step), "the last step is in the checkpoint");
    assert!(volume.path(end.message["checkpoint"]["path"].as_str().unwrap()).join("manifest.json").exists());

    let running = volume.start(&endless.attempt(2));
    wait_until("a step of the second attempt", || !volume.trained("sft", 2).is_empty());
    assert!(Command::new("kill").args(["-TERM", &running.child.id().to_string()]).status().unwrap().success());
    running.wait();
    assert_eq!(volume.trained("sft", 2).first(), Some(&(step + 1)));
}

#[test]
fn the_kept_checkpoints_are_the_newest() {
    let mut launch = sft();
    launch.config["checkpoint"] = json!({"everySteps": 4, "keep": 2});
    let volume = finished("gpt2", &launch);
    let mut left: Vec<String> = fs::read_dir(volume.path("jobs/j/sft/checkpoints"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["step-16", "step-20"]);
}

#[test]
fn a_run_on_other_data_does_not_resume() {
    let whole = finished("gpt2", &sft());
    let volume = rewound(&whole, "gpt2", "sft", 10);
    let data = volume.path("data/sft.jsonl");
    let shortened: Vec<String> = fs::read_to_string(&data).unwrap().lines().skip(1).map(String::from).collect();
    fs::write(&data, shortened.join("\n")).unwrap();
    let end = volume.run(&sft().attempt(2));
    assert_eq!(end.code, Some(65), "{}", end.log);
    end.expect(65, "BadInput", &["step-10", "a run on other data: put the dataset back"]);
}

/// As by an image that cuts or renders records otherwise: it is not the data that are to blame.
#[test]
fn a_run_that_read_the_same_data_otherwise_does_not_resume_and_is_told_apart() {
    let whole = finished("gpt2", &sft());
    let volume = rewound(&whole, "gpt2", "sft", 10);
    change_manifest(&volume, "sft", 10, |m| m["data"] = json!("0".repeat(64)));
    let end = volume.run(&sft().attempt(2));
    end.expect(65, "BadInput", &["step-10", "the same dataset otherwise", "another version of the trainer"]);
}

#[test]
fn a_language_model_is_no_reward_model() {
    let volume = Volume::new("gpt2");
    let mut launch = ppo();
    launch.config["paths"]["rewardModels"] = json!({"liked": "models/base"});
    launch.config["paths"]["criticModel"] = json!("models/base");
    let end = volume.run(&launch);
    assert_eq!(end.code, Some(65), "{}", end.log);
    assert!(end.message["message"].as_str().unwrap().contains("score.weight"), "{}", end.message);
}

/// The manifest of a stage's checkpoint, changed.
fn change_manifest(volume: &Volume, stage: &str, step: u64, change: impl FnOnce(&mut serde_json::Value)) {
    let path = volume.path(&format!("jobs/j/{stage}/checkpoints/step-{step}/manifest.json"));
    let mut manifest = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut manifest);
    fs::write(path, manifest.to_string()).unwrap();
}

/// As many numbers in another order are other models: an image that lays parameters out otherwise must not load them.
#[test]
fn a_checkpoint_of_another_layout_is_refused_and_one_that_does_not_tell_its_own_is_taken() {
    let whole = finished("gpt2", &sft());
    let resumed = |change: fn(&mut serde_json::Value)| {
        let volume = rewound(&whole, "gpt2", "sft", 10);
        change_manifest(&volume, "sft", 10, change);
        let end = volume.run(&sft().attempt(2));
        (volume, end)
    };
    let (_, other) = resumed(|m| m["models"]["model"]["layout"] = json!("0".repeat(64)));
    other.expect(65, "BadInput", &["step-10", "its parameters another order"]);
    let (volume, old) = resumed(|m| {
        m["models"]["model"].as_object_mut().unwrap().remove("layout").unwrap();
        m.as_object_mut().unwrap().remove("machine").unwrap();
    });
    old.expect(0, "Done", &[]);
    assert_eq!(volume.trained("sft", 2).first(), Some(&11));
    assert!(!old.log.contains("sums round otherwise"));
}

/// A newer trainer's checkpoint is whole: an older image that comes back must neither rename nor prune it.
#[test]
fn a_checkpoint_that_another_version_wrote_is_refused_and_kept() {
    let whole = finished("gpt2", &sft());
    type Change = fn(&mut serde_json::Value);
    let changes: [(Change, &str); 2] =
        [(|m| m["format"] = json!(4), "of format 4"), (|m| m["novelty"] = json!(1), "novelty")];
    for (change, said) in changes {
        let volume = rewound(&whole, "gpt2", "sft", 10);
        change_manifest(&volume, "sft", 10, change);
        let end = volume.run(&sft().processes(2).attempt(2));
        end.expect(65, "BadInput", &["step-10", said, "reads format 3", "storage.runPath"]);
        assert!(volume.path("jobs/j/sft/checkpoints/step-10/manifest.json").exists());
    }
}

#[test]
fn a_run_that_goes_on_with_other_threads_says_that_it_does_not_end_bit_for_bit() {
    let whole = finished("gpt2", &sft());
    let resumed = |threads: u32| {
        let volume = rewound(&whole, "gpt2", "sft", 10);
        let end = volume.start_as(&sft().attempt(2), &Pod::default().env("OMP_NUM_THREADS", threads)).wait();
        end.expect(0, "Done", &[]);
        (end.log, volume.weights("sft"))
    };
    let (log, weights) = resumed(1);
    assert!(!log.contains("sums round otherwise") && weights == whole.weights("sft"), "{log}");
    let (log, _) = resumed(2);
    let parts = ["1 ranks of 1 threads", "1 ranks of 2 threads", "sums round otherwise"];
    assert!(log.lines().any(|l| l.contains("WARN") && parts.iter().all(|part| l.contains(part))), "{log}");
}

/// A period in time is for stages whose steps are long: it is kept at the end of the step in which it ends.
#[test]
fn a_checkpoint_is_written_after_so_many_seconds_whatever_the_steps() {
    let mut launch = sft().processes(2).with("/maxSteps", json!(1_000_000)).with("/epochs", json!(1_000_000));
    launch.config["checkpoint"] = json!({"everySteps": 1_000_000, "everySeconds": 1, "keep": 100});
    let volume = Volume::new("gpt2");
    let running = volume.start(&launch);
    wait_until("three checkpoints", || volume.checkpoints("sft").len() >= 3);
    let steps = volume.curve("sft", "loss").len();
    drop(running);
    assert!(steps > 2 * volume.checkpoints("sft").len(), "{steps} steps, of which not every one was saved");
}
