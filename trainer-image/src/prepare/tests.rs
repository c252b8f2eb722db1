use super::*;
use crate::model::HeadKind;
use crate::model::fixture::{numbers, weights, write_model, write_weights};
use crate::tokenizer::fixture::{VOCAB, changed, post_processor, write, write_tokenizer};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::fs;
use tempfile::TempDir;

const POSITIONS: u32 = 64;

fn model_config() -> Value {
    json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": POSITIONS, "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": true
    })
}

/// A volume with a model and a dataset for each stage.
fn volume() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("models/m");
    fs::create_dir_all(&model).unwrap();
    write_model(&model, &model_config());
    write_tokenizer(&model);
    for (name, line) in [
        ("sft", r#"{"prompt": "x", "completion": "y"}"#),
        ("reward", r#"{"prompt": "x", "chosen": "y", "rejected": "z"}"#),
        ("ppo", r#"{"prompt": "x"}"#),
    ] {
        fs::write(dir.path().join(format!("{name}.jsonl")), format!("{line}\n").repeat(3)).unwrap();
    }
    dir
}

fn stages() -> [Value; 3] {
    let optimizer = json!({"learningRate": 0.1});
    let dataset = |name: &str| json!({"source": format!("volume://{name}.jsonl"), "evalFraction": 0.5});
    let supervised = |name: &str| json!({"dataset": dataset(name), "epochs": 1, "batch": {"globalSize": 8}, "maxLength": POSITIONS, "optimizer": optimizer});
    let ppo = json!({
        "rewards": [{"name": "liked", "model": {"stage": "reward"}}], "prompts": dataset("ppo"), "iterations": 1, "rolloutBatchSize": 8, "batch": {"globalSize": 8}, "maxPromptLength": POSITIONS - 4,
        "maxNewTokens": 4, "kl": {"coefficient": 0.1}, "actorOptimizer": optimizer, "criticOptimizer": optimizer
    });
    let stage = |name: &str, kind: Value| {
        let paths = json!({"baseModel": "models/m", "startModel": "models/m", "output": format!("jobs/j/{name}/model"), "checkpoints": format!("jobs/j/{name}/checkpoints")});
        json!({"job": {"namespace": "n", "name": "j", "uid": "u"}, "stage": name, "kind": kind, "seed": 1, "paths": paths, "collectiveTimeoutSeconds": 60})
    };
    [
        stage("sft", json!({"sft": supervised("sft")})),
        stage("reward", json!({"rewardModel": supervised("reward")})),
        stage("ppo", json!({"ppo": ppo})),
    ]
}

/// Prepares a job whose stages are `change`d.
fn prepare(volume: &Path, change: impl FnOnce(&mut [Value; 3])) -> Result<PrepareReport> {
    let mut stages = stages();
    change(&mut stages);
    let config = json!({"job": {"namespace": "n", "name": "j", "uid": "u"}, "stages": stages, "models": ["models/m"]});
    check_job(&serde_json::from_value(config).unwrap(), volume)
}

fn check_job(config: &PrepareConfig, volume: &Path) -> Result<PrepareReport> {
    run(config, volume, &Telemetry::new(&config.job, "prepare", 1, 0, 1)?)
}

#[test]
fn a_good_job_is_reported_stage_by_stage_and_leaves_its_folders_and_datasets() {
    let volume = volume();
    let report = prepare(volume.path(), |_| ()).unwrap();
    let figures: Vec<_> = report
        .stages
        .iter()
        .map(|s| (s.stage.as_str(), s.dataset.records, s.dataset.train + s.dataset.eval, s.dataset.tokens))
        .collect();
    assert_eq!(figures, [("sft", 3, 3, 9), ("reward", 3, 3, 18), ("ppo", 3, 3, 3)]);
    let prepared = report.prepared().unwrap();
    assert_eq!((prepared.models[0].vocab, prepared.models[0].layers), (VOCAB as i64, 1));
    let shapes: Vec<_> = prepared.datasets.iter().map(|d| (d.stage.as_str(), d.longest_tokens, d.sequences)).collect();
    assert_eq!(shapes, [("sft", 3, 1), ("reward", 3, 2), ("ppo", 1, 1)]);
    for stage in ["sft", "reward", "ppo"] {
        let dir = volume.path().join("jobs/j").join(stage);
        let mut names = files::names(&dir).unwrap();
        names.sort_unstable();
        assert!(names.len() == 2 && names[0] == "checkpoints" && names[1].starts_with("data-"), "{names:?}");
        assert_eq!(fs::read_dir(dir.join("checkpoints")).unwrap().count(), 0);
    }
}

/// The error of a job whose volume is changed by `break_it`.
fn broken(break_it: impl FnOnce(&Path)) -> Error {
    let volume = volume();
    break_it(volume.path());
    prepare(volume.path(), |_| ()).unwrap_err()
}

fn check(error: &Error, exit: i32, parts: &[&str]) {
    assert_eq!(error.exit.code(), exit, "{error}");
    assert!(parts.iter().all(|p| error.message.contains(p)), "{error}");
}

#[test]
fn a_bad_record_is_named_with_stage_file_and_line() {
    for (stage, line, field) in [
        ("sft", r#"{"prompt": "x"}"#, "completion"),
        ("reward", r#"{"prompt": "x", "chosen": 1, "rejected": ""}"#, "chosen"),
        ("ppo", "{}", "prompt"),
    ] {
        let error = broken(|volume| {
            let path = volume.join(format!("{stage}.jsonl"));
            let good = fs::read_to_string(&path).unwrap();
            fs::write(path, format!("{good}\n{line}\n")).unwrap();
        });
        check(&error, 65, &[&format!("stage '{stage}': "), &format!("{stage}.jsonl:5: "), &format!("field '{field}'")]);
    }
    check(
        &broken(|volume| fs::remove_file(volume.join("ppo.jsonl")).unwrap()),
        65,
        &["stage 'ppo'", "ppo.jsonl", "No such file"],
    );
    check(&broken(|volume| fs::write(volume.join("reward.jsonl"), "").unwrap()), 65, &["stage 'reward'", "no record"]);
}

#[test]
fn a_bad_model_is_named_with_its_file() {
    let in_model = |name: &'static str, change: fn(&Path)| broken(|volume| change(&volume.join("models/m").join(name)));
    check(&in_model("config.json", |p| fs::remove_file(p).unwrap()), 65, &["config.json"]);
    check(&in_model("tokenizer.json", |p| fs::remove_file(p).unwrap()), 65, &["tokenizer.json"]);
    check(&in_model("model.safetensors", |p| fs::remove_file(p).unwrap()), 65, &["model.safetensors"]);
    let cut = in_model("model.safetensors", |p| {
        let bytes = fs::read(p).unwrap();
        fs::write(p, &bytes[..bytes.len() - 1]).unwrap();
    });
    check(&cut, 65, &["model.safetensors"]);
    let lost_shard = in_model("model.safetensors", |p| {
        fs::rename(p, p.with_file_name("a.safetensors")).unwrap();
        write(
            p.parent().unwrap(),
            "model.safetensors.index.json",
            &json!({"weight_map": {"model.norm.weight": "a.safetensors", "u": "b.safetensors"}}),
        );
    });
    check(&lost_shard, 65, &["b.safetensors"]);
}

#[test]
fn sharded_weights_are_found_by_their_index() {
    let volume = volume();
    let model = volume.path().join("models/m");
    fs::rename(model.join("model.safetensors"), model.join("a.safetensors")).unwrap();
    let bytes = fs::read(model.join("a.safetensors")).unwrap();
    let names: Vec<String> =
        safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().map(|t| t.0).collect();
    let map: serde_json::Map<_, _> = names.into_iter().map(|name| (name, json!("a.safetensors"))).collect();
    write(&model, "model.safetensors.index.json", &json!({"weight_map": map}));
    prepare(volume.path(), |_| ()).unwrap();
}

/// A model of another origin beside the job's, which `change`s its folder; a reward model where it `scores`.
fn other_model(volume: &Path, name: &str, scores: bool, change: impl FnOnce(&Path)) {
    let dir = volume.join("models").join(name);
    fs::create_dir_all(&dir).unwrap();
    let mut config = model_config();
    (config["hidden_size"], config["num_hidden_layers"]) = (json!(16), json!(3));
    write_other(&dir, &config, scores);
    write_tokenizer(&dir);
    change(&dir);
}

fn write_other(dir: &Path, config: &Value, scores: bool) {
    let mut tensors = weights(dir, config, Dtype::F32);
    let head = if scores { "score.weight" } else { "u" };
    tensors.insert(head.into(), (vec![1, 16], numbers(16, 5, Dtype::F32)));
    write_weights(dir, &tensors, Dtype::F32);
}

/// Prepares a job whose PPO stage uses models of other origin.
fn prepare_with(volume: &Path, paths: Value, models: Value) -> Result<PrepareReport> {
    let mut stages = stages();
    for (name, path) in paths.as_object().unwrap() {
        stages[2]["paths"][name] = path.clone();
    }
    let config = json!({"job": {"namespace": "n", "name": "j", "uid": "u"}, "stages": stages, "models": models});
    check_job(&serde_json::from_value(config).unwrap(), volume)
}

#[test]
fn models_of_other_origin_are_told_in_the_order_of_the_config() {
    let volume = volume();
    other_model(volume.path(), "judge", true, |_| ());
    other_model(volume.path(), "wise", false, |_| ());
    let paths = json!({
        "startModel": "jobs/j/sft/model", "referenceModel": "models/wise", "criticModel": "jobs/j/reward/model",
        "rewardModels": {"liked": "jobs/j/reward/model", "safe": "models/judge"}
    });
    let report = prepare_with(volume.path(), paths, json!(["models/m", "models/judge", "models/wise"])).unwrap();
    let shapes: Vec<_> = report.prepared().unwrap().models.iter().map(|m| (m.hidden, m.layers)).collect();
    assert_eq!(shapes, [(8, 1), (16, 3), (16, 3)]);
}

#[test]
fn a_model_of_another_origin_must_fit_what_it_is_for() {
    let refused = |scores: bool, change: &dyn Fn(&Path), field: &str| {
        let volume = volume();
        other_model(volume.path(), "other", scores, change);
        let paths = match field {
            "rewardModels" => json!({field: {"liked": "models/other"}}),
            field => json!({field: "models/other"}),
        };
        prepare_with(volume.path(), paths, json!(["models/m", "models/other"])).unwrap_err()
    };
    for field in ["rewardModels", "criticModel"] {
        check(&refused(false, &|_| (), field), 65, &["stage 'ppo'", "models/other", "no tensor 'score.weight'"]);
    }
    for field in ["startModel", "referenceModel"] {
        check(&refused(true, &|_| (), field), 65, &["stage 'ppo'", "models/other", "it is a reward model"]);
    }
    let set = |name: &'static str, value: u32| {
        move |dir: &Path| {
            let mut config: Value = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
            config[name] = json!(value);
            write_other(dir, &config, true);
        }
    };
    let short = refused(true, &set("max_position_embeddings", POSITIONS - 1), "rewardModels");
    check(&short, 64, &["stage 'ppo'", "63 positions", "models/other"]);
    check(&refused(true, &set("vocab_size", VOCAB as u32 - 1), "criticModel"), 65, &["models/other", "must know all"]);
    let renamed = |dir: &Path| {
        let path = dir.join("tokenizer.json");
        let text = fs::read_to_string(&path).unwrap();
        let mut json: Value = serde_json::from_str(&text).unwrap();
        let vocab = json["model"]["vocab"].as_object_mut().unwrap();
        let token = vocab.iter().find(|(t, id)| t.len() == 1 && id.as_u64() > Some(0)).unwrap().0.clone();
        let id = vocab.remove(&token).unwrap();
        vocab.insert("another".into(), id);
        fs::write(&path, json.to_string()).unwrap();
    };
    check(&refused(true, &renamed, "rewardModels"), 65, &["models/other", "same tokenizer", "another"]);
    let nameless = |dir: &Path| fs::remove_file(dir.join("tokenizer.json")).unwrap();
    check(&refused(true, &nameless, "criticModel"), 65, &["models/other/tokenizer.json"]);
}

#[test]
fn what_a_pods_last_word_cannot_tell_is_refused() {
    let volume = volume();
    let report = prepare(volume.path(), |_| ()).unwrap();
    let many = PrepareReport { models: vec![report.models[0].clone(); 40], stages: report.stages };
    check(&many.prepared().unwrap_err(), 64, &["40 models and 3 stages", "split it into jobs"]);
}

#[test]
fn what_is_no_file_in_a_models_folder_is_named() {
    for name in ["model.safetensors", "tokenizer_config.json", "whatever"] {
        let error = broken(|volume| {
            let path = volume.join("models/m").join(name);
            let _ = fs::remove_file(&path);
            drop(std::os::unix::net::UnixListener::bind(path).unwrap());
        });
        check(&error, 65, &[name, "a socket, not a file"]);
    }
    check(
        &broken(|volume| {
            fs::remove_file(volume.join("sft.jsonl")).unwrap();
            std::os::unix::fs::symlink("/dev/zero", volume.join("sft.jsonl")).unwrap();
        }),
        65,
        &["stage 'sft'", "sft.jsonl", "a device, not a file"],
    );
}

/// At the run path lies what another job has begun.
#[test]
fn a_run_of_another_config_is_refused_before_any_device_is_taken() {
    let volume = volume();
    let config: StageConfig = serde_json::from_value(stages()[1].clone()).unwrap();
    Run::new(&config, volume.path()).begin().unwrap();
    prepare(volume.path(), |_| ()).unwrap();
    let error = prepare(volume.path(), |s| s[1]["kind"]["rewardModel"]["epochs"] = json!(2)).unwrap_err();
    check(&error, 64, &["stage 'reward'", "kind.rewardModel.epochs was 1 and is 2"]);
}

#[test]
fn what_a_newer_operator_asks_for_is_refused_and_not_done_as_if_it_were_not_there() {
    let volume = volume();
    let with = |field: &str, value: Value| {
        prepare(volume.path(), |stages| stages[2]["kind"]["ppo"][field] = value.clone()).unwrap_err()
    };
    let error = with("advantage", json!({"optimalTransport": {}}));
    check(&error, 64, &["stage 'ppo'", "ppo.advantage says something that this version of the trainer does not know"]);
    let error = with("rewards", json!([{"name": "tests", "http": {"url": "https://x"}}]));
    check(&error, 64, &["stage 'ppo'", "ppo.rewards[tests]"]);
}

#[test]
fn a_token_without_an_embedding_is_refused_where_a_record_has_it() {
    let fewer = |tokens: usize| {
        let volume = volume();
        let mut config = model_config();
        config["vocab_size"] = json!(tokens);
        write_model(&volume.path().join("models/m"), &config);
        prepare(volume.path(), |_| ())
    };
    // The tokenizer's last ids stand for nothing that a record has.
    assert!(fewer(VOCAB - 2).is_ok());
    check(&fewer(96).unwrap_err(), 65, &["models/m", "stage 'reward'", "'z' (id 96)", "vocab_size 96"]);
}

#[test]
fn a_length_beyond_the_models_positions_is_refused_with_the_setting_to_lower() {
    let volume = volume();
    let with = |stage: usize, kind: &str, setting: &str| {
        prepare(volume.path(), |stages| stages[stage]["kind"][kind][setting] = json!(POSITIONS + 1)).unwrap_err()
    };
    check(&with(0, "sft", "maxLength"), 64, &["stage 'sft'", "maxLength 65", "64 positions"]);
    check(&with(1, "rewardModel", "maxLength"), 64, &["stage 'reward'", "maxLength 65", "64 positions"]);
    check(
        &with(2, "ppo", "maxPromptLength"),
        64,
        &["stage 'ppo'", "maxPromptLength 65 plus maxNewTokens 4", "64 positions"],
    );
}

#[test]
fn a_size_of_shards_that_is_none_is_refused_before_any_device_is_taken() {
    let volume = volume();
    prepare(volume.path(), |stages| stages[0]["export"] = json!({"dtype": "bf16", "maxShardSize": "2G"})).unwrap();
    let error = prepare(volume.path(), |stages| stages[2]["export"] = json!({"maxShardSize": "2GB"})).unwrap_err();
    check(&error, 64, &["stage 'ppo'", "export.maxShardSize '2GB'", "512Mi"]);
}

#[test]
fn a_source_outside_the_volume_is_refused() {
    let volume = volume();
    let error = prepare(volume.path(), |stages| {
        stages[0]["kind"]["sft"]["dataset"]["source"] = json!("volume://../etc/passwd")
    })
    .unwrap_err();
    check(&error, 64, &["stage 'sft'", "volume://../etc/passwd"]);
}

#[test]
fn a_volume_that_cannot_be_written_is_named() {
    check(&broken(|volume| fs::write(volume.join("jobs"), "").unwrap()), 74, &["jobs/j/sft"]);
    let volume = volume();
    fs::create_dir_all(volume.path().join("jobs/j/reward/checkpoints").join(PROBE)).unwrap();
    check(&prepare(volume.path(), |_| ()).unwrap_err(), 74, &["jobs/j/reward/checkpoints/.rlhf-probe"]);
    let no_stages = PrepareConfig {
        job: serde_json::from_value(json!({"namespace": "n", "name": "j", "uid": "u"})).unwrap(),
        stages: vec![],
        models: vec![],
        remote: vec![],
    };
    check(&check_job(&no_stages, volume.path()).unwrap_err(), 64, &["no stages"]);
}

#[test]
fn a_tokenizer_that_begins_with_bos_still_counts_within_the_lengths() {
    let volume = volume();
    let (dir, _) = changed(|tokenizer, _| tokenizer["post_processor"] = post_processor());
    fs::copy(dir.path().join("tokenizer.json"), volume.path().join("models/m/tokenizer.json")).unwrap();
    let report = prepare(volume.path(), |_| ()).unwrap();
    assert_eq!(report.stages.iter().map(|s| s.dataset.longest_tokens).collect::<Vec<_>>(), [4, 4, 2]);
}

#[test]
fn adapters_without_a_target_in_the_model_are_refused() {
    let volume = volume();
    let gpt2 = json!({"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS});
    write_model(&volume.path().join("models/m"), &gpt2);
    let with = |targets: Value| prepare(volume.path(), |s| s[0]["kind"]["sft"]["lora"] = json!({"targets": targets}));
    check(&with(json!(["gate"])).unwrap_err(), 64, &["stage 'sft'", "lora.targets"]);
    assert!(with(json!(["gate", "up"])).is_ok());
}

/// GPT-2's smallest, 124 million parameters, as the engine lays them out.
#[test]
fn the_room_that_a_stage_takes_is_that_of_its_checkpoints_and_its_model() {
    let model = memory_plan::preset("s").unwrap();
    let parameters = model.parameter_count(HeadKind::Lm).unsigned_abs();
    let room = |i: usize, kind: tch::Kind, change: &dyn Fn(&mut Value)| {
        let mut stage = stages()[i].clone();
        (stage["checkpoint"], stage["keepCheckpoints"]) = (json!({"keep": 3}), json!("Running"));
        change(&mut stage);
        room::of(&serde_json::from_value(stage).unwrap(), models::Trained { model: &model, critic: Some(&model), kind })
    };
    // A value and two moments of each number; the paddings between parameters come to little.
    let about = |bytes: u64, numbers: u64| (12 * numbers..12 * numbers + 60_000).contains(&bytes);
    let (float, half) = (tch::Kind::Float, tch::Kind::BFloat16);
    let sft = room(0, float, &|_| ());
    assert!(about(sft.checkpoint, parameters), "{sft:?}");
    assert_eq!((sft.most, sft.output, sft.stays), (4 * sft.checkpoint, 4 * parameters, sft.output));
    // Weights are written in their start's format, whatever the optimizer keeps.
    let small = room(0, half, &|_| ());
    assert_eq!((small.checkpoint, small.output), (sft.checkpoint, 2 * parameters));
    let kept = room(0, float, &|stage| stage["keepCheckpoints"] = json!("Always"));
    assert_eq!((kept.most, kept.stays), (sft.most, 3 * sft.checkpoint + sft.output));
    let sharded = room(0, float, &|stage| stage["strategy"] = json!({"sharding": "zero3", "offload": "parameters"}));
    assert_eq!(sharded, sft, "a strategy says only which rank writes what");
    // Actor and critic.
    assert!(about(room(2, float, &|_| ()).checkpoint, 2 * parameters));
    // Rank 8 on each of a block's six matrices: 8 (768 + 768) of four, 8 (768 + 3072) of two. The model is then larger than a checkpoint.
    let adapted = room(0, float, &|stage| stage["kind"]["sft"]["lora"] = json!({"rank": 8}));
    let adapters = 12 * 8 * (4 * 1536 + 2 * 3840);
    assert!(about(adapted.checkpoint, adapters), "{adapted:?}");
    assert_eq!(adapted.output, 4 * (parameters + adapters));
    assert_eq!(adapted.most, 3 * adapted.checkpoint + adapted.output);
}

#[test]
fn stages_that_follow_each_other_take_the_room_of_one_and_what_those_before_leave() {
    let [sft, reward, mut ppo] = stages();
    let most = |stages: [&Value; 3], rooms: [(u64, u64); 3]| {
        let stages = stages.map(|stage| serde_json::from_value::<StageConfig>(stage.clone()).unwrap());
        let room = |(most, stays)| room::Room { checkpoint: 0, output: 0, most, stays };
        let all: Vec<_> = stages.iter().zip(rooms.map(room)).collect();
        room::most(&all)
    };
    assert_eq!(most([&sft, &reward, &ppo], [(100, 10), (50, 10), (80, 10)]), 230, "all at once");
    (ppo["paths"]["startModel"], ppo["paths"]["rewardModels"]) =
        (json!("jobs/j/sft/model"), json!({"liked": "jobs/j/reward/model"}));
    assert_eq!(most([&sft, &reward, &ppo], [(100, 10), (50, 10), (80, 10)]), 150, "the first two side by side");
    let mut after = reward.clone();
    after["paths"]["startModel"] = json!("jobs/j/sft/model");
    assert_eq!(most([&sft, &after, &ppo], [(100, 10), (50, 10), (80, 10)]), 100);
    assert_eq!(most([&sft, &after, &ppo], [(100, 40), (50, 10), (80, 10)]), 130);
    // The two at the side of PPO follow each other, and yet both count: a bound.
    let alone = stages()[2].clone();
    assert_eq!(most([&sft, &after, &alone], [(100, 10), (50, 10), (80, 10)]), 230);
    assert_eq!(room::most(&[]), 0);
}
