//! Files as people have them and want them: a stage is launched, and reads and writes what it is told to.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Volume, reward, sft};
use rlhf_trainer::model::Source;
use serde_json::json;
use std::path::Path;
use tch::Kind;

/// The rank with the other half of the model maps the file, too.
#[test]
fn a_model_as_torch_saves_it_trains_as_the_one_in_safetensors() {
    let train = |torch: bool| {
        let volume = Volume::new("llama-tied-headdim");
        if torch {
            let base = volume.path("models/base");
            std::fs::remove_file(base.join("model.safetensors")).unwrap();
            let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/pytorch/llama-tied-headdim.bin");
            std::fs::copy(golden, base.join("pytorch_model.bin")).unwrap();
        }
        let mut launch = sft().processes(2).with("/maxSteps", json!(3));
        launch.config["strategy"] = json!({"sharding": "zero3"});
        volume.succeed(&launch);
        volume.weights("sft")
    };
    assert!(train(true) == train(false), "the trained weights differ");
}

/// The stage after it begins with what the one before has written.
#[test]
fn stages_write_their_models_in_the_number_format_and_files_that_are_asked_for() {
    let volume = Volume::new("llama-gqa-untied");
    let mut first = sft().processes(2).with("/maxSteps", json!(2));
    first.config["strategy"] = json!({"sharding": "zero3", "precision": "bf16"});
    first.config["export"] = json!({"dtype": "bf16", "maxShardSize": "40k"});
    volume.succeed(&first);
    let model = Source::open(&volume.path("jobs/j/sft/model")).unwrap();
    assert_eq!((model.kind, model.config["dtype"].as_str()), (Kind::BFloat16, Some("bfloat16")));
    let shard = |i: u32| volume.path(&format!("jobs/j/sft/model/model-{i:05}-of-00002.safetensors"));
    assert!([1, 2].into_iter().all(|i| std::fs::metadata(shard(i)).unwrap().len() < 42_000));
    let mut second = reward().with("/maxSteps", json!(1));
    second.config["paths"]["startModel"] = json!("jobs/j/sft/model");
    volume.succeed(&second);
    assert_eq!(Source::open(&volume.path("jobs/j/reward/model")).unwrap().kind, Kind::BFloat16);
}
