//! What trainers are told, and specs of which nothing is made.

use super::*;

#[test]
fn configs_say_where_each_stage_starts_and_writes() {
    let config = |index| -> StageConfig {
        let job = job();
        let data = build(&job, index, 1).config_map.data.unwrap();
        serde_json::from_str(&data[&config::entry(Task::all(&job).nth(index).unwrap())]).unwrap()
    };
    let (tune, judge, act) = (config(1), config(2), config(3));
    assert_eq!(tune.paths.start_model, "models/base");
    assert_eq!(tune.paths.output, "jobs/demo-01234567/tune/model");
    assert_eq!(judge.paths.start_model, "models/base");
    assert_eq!(act.paths.start_model, tune.paths.output);
    assert_eq!(act.paths.reward_models, [("liked".to_owned(), judge.paths.output.clone())].into());
    assert_eq!(act.paths.critic_model, Some(judge.paths.output));
    assert_eq!(act.paths.reference_model, Some(tune.paths.output.clone()));
    assert_eq!(act.paths.base_model, "models/base");
    assert_eq!(act.paths.checkpoints, "jobs/demo-01234567/act/checkpoints");
    assert_eq!((tune.seed, act.seed), (42, 7));
    assert_eq!(act.job.namespace, "team");
}

#[test]
fn a_stage_whose_advantages_need_no_critic_is_told_of_none() {
    let mut job = job();
    let ppo = job.spec.stages[2].ppo.as_mut().unwrap();
    ppo.advantage = serde_json::from_value(json!({"leaveOneOut": {}})).unwrap();
    (ppo.critic_optimizer, ppo.samples_per_prompt) = (None, 4);
    let data = build(&job, 3, 1).config_map.data.unwrap();
    let told: StageConfig = serde_json::from_str(&data["act.json"]).unwrap();
    assert_eq!(told.paths.critic_model, None);
    assert!(matches!(told.kind, rlhf_api::stage::StageKind::Ppo(ppo) if ppo.samples_per_prompt == 4));
}

#[test]
fn a_stage_is_told_how_its_model_is_written() {
    let mut job = job();
    job.spec.stages[1].export = serde_json::from_value(json!({"dtype": "bf16", "maxShardSize": "2G"})).unwrap();
    let data = build(&job, 0, 1).config_map.data.unwrap();
    let told = |task: &str| serde_json::from_str::<serde_json::Value>(&data[task]).unwrap()["export"].clone();
    assert_eq!(told("judge.json"), json!({"dtype": "bf16", "maxShardSize": "2G"}));
    assert_eq!(told("act.json"), json!({}));
}

#[test]
fn every_file_of_a_dataset_is_on_the_volume() {
    let with = |dataset: serde_json::Value| {
        let mut job = job();
        job.spec.stages[0].sft.as_mut().unwrap().dataset = serde_json::from_value(dataset).unwrap();
        check(&job, &settings()).map_err(|e| e.to_string())
    };
    let two = |second: &str| json!({"sources": [{"source": "volume://a.jsonl"}, {"source": second}]});
    assert!(with(two("volume://b.parquet")).is_ok());
    let error = with(two("volume://../b")).unwrap_err();
    assert!(error.contains("spec.stages[tune].sft.dataset.sources[1].source `volume://../b`"), "{error}");
    let error = with(json!({"source": "volume://a.jsonl", "evalSource": "volume://.b"})).unwrap_err();
    assert!(error.contains("spec.stages[tune].sft.dataset.evalSource"), "{error}");
}

#[test]
fn prepare_is_told_every_stage_in_order() {
    let children = build(&job(), 0, 1);
    assert_eq!(children.config_map.immutable, Some(true));
    let config: PrepareConfig = serde_json::from_str(&children.config_map.data.unwrap()["prepare.json"]).unwrap();
    assert_eq!(config.stages.iter().map(|s| s.stage.as_str()).collect::<Vec<_>>(), ["tune", "judge", "act"]);
}

#[test]
fn another_config_has_another_name() {
    let mut changed = job();
    changed.spec.stages[0].checkpoint.every_steps += 1;
    let name = |job: &RLHFJob| build(job, 1, 1).config_map.metadata.name;
    assert_ne!(name(&job()), name(&changed));
    assert_eq!(name(&job()), name(&job()));
}

#[test]
fn what_the_chart_has_to_allow_is_refused_by_the_switchs_name() {
    let account = with_compute(json!({"podTemplate": {"serviceAccountName": "trainer"}}));
    let message = check(&account, &settings()).unwrap_err().to_string();
    assert!(
        message.contains("serviceAccountName") && message.contains("trainer.allow.serviceAccountName"),
        "{message}"
    );
    let volumes = with_compute(json!({"podTemplate": {"volumes": [{"name": "x", "emptyDir": {}}], "ipcLock": true}}));
    let all = Allowances { service_accounts: true, volumes: true, ipc_lock: true };
    for job in [account, volumes] {
        assert!(check(&job, &settings()).is_err());
        assert!(check(&job, &Settings { allow: all, ..settings() }).is_ok());
    }
}

#[test]
fn references_that_do_not_fit_are_errors_that_name_the_field() {
    let mut later = job();
    later.spec.stages.swap(0, 2);
    let message = check(&later, &settings()).unwrap_err().to_string();
    assert!(message.starts_with("spec.stages[act].ppo.start must be a policy"), "{message}");
    let mut dropout = job();
    let lora = serde_json::from_value(json!({"dropout": 0.1})).unwrap();
    dropout.spec.stages[2].ppo.as_mut().unwrap().lora = Some(lora);
    assert!(check(&dropout, &settings()).unwrap_err().to_string().contains("dropout must be 0"));
    let mut range = job();
    range.spec.stages[0].sft.as_mut().unwrap().optimizer.learning_rate = 2.0;
    assert!(check(&range, &settings()).unwrap_err().to_string().contains("learningRate is 2"));
}

#[test]
fn a_spec_that_admission_would_have_refused_is_an_error_that_names_the_field() {
    let mut no_kind = job();
    no_kind.spec.stages[0].sft = None;
    assert_eq!(
        check(&no_kind, &settings()).unwrap_err().to_string(),
        "spec.stages[tune] must have exactly one of sft, rewardModel and ppo"
    );
    let mut bad_path = job();
    bad_path.spec.model.source = Some("volume://../b".into());
    let message = check(&bad_path, &settings()).unwrap_err().to_string();
    assert!(message.starts_with("spec.model.source `volume://../b` is no location of a model"), "{message}");
    assert!(check(&job(), &settings()).is_ok());
}
