//! What of a job lies outside of its volume: who fetches it, with which Secret, and where stages find it.

use super::*;
use rlhf_api::reference::VOLUME_SCHEME;
use rlhf_api::source;

/// A model of the hub and a dataset of a bucket, each with a Secret.
fn remote() -> RLHFJob {
    let mut job = job();
    job.spec.model =
        serde_json::from_value(json!({"source": "hf://org/name@main", "secretRef": {"name": "hub"}})).unwrap();
    let dataset = json!({"source": "s3://bucket/data/d.jsonl", "evalSource": "volume://data/e.jsonl", "secretRef": {"name": "s3"}});
    job.spec.stages[0].sft.as_mut().unwrap().dataset = serde_json::from_value(dataset).unwrap();
    job
}

fn entry<T: serde::de::DeserializeOwned>(children: &Children, name: &str) -> T {
    serde_json::from_str(&children.config_map.data.as_ref().unwrap()[name]).unwrap()
}

#[test]
fn the_secrets_of_sources_are_in_prepares_pod_and_nowhere_else() {
    let job = remote();
    let prepare = build(&job, 0, 1);
    let volumes: Vec<_> = pod(&prepare).volumes.unwrap().into_iter().filter_map(|v| v.secret?.secret_name).collect();
    assert_eq!(volumes, ["hub", "s3"]);
    let mounts = container(&prepare).volume_mounts.unwrap();
    let mounts: Vec<_> = mounts.iter().filter(|m| m.mount_path.starts_with("/etc/rlhf-secrets/")).collect();
    assert_eq!(
        mounts.iter().map(|m| m.mount_path.as_str()).collect::<Vec<_>>(),
        ["/etc/rlhf-secrets/hub", "/etc/rlhf-secrets/s3"]
    );
    assert!(mounts.iter().all(|m| m.read_only == Some(true)));
    let items = pod(&prepare).volumes.unwrap().into_iter().find_map(|v| v.secret).unwrap().items.unwrap();
    assert!(items.iter().all(|item| item.key != "token"), "no token of an account");
    let policy = include_str!("../../../../charts/rlhf-operator/templates/admissionpolicy.yaml");
    assert!(items.iter().all(|item| policy.contains(&format!("'{}'", item.key))), "the chart's policy lets it");
    assert!(container(&prepare).env.unwrap().iter().all(|e| e.value_from.is_none()), "no environment holds one");
    for stage in 1..4 {
        let children = build(&job, stage, 1);
        assert!(pod(&children).volumes.unwrap().iter().all(|v| v.secret.is_none()), "stage {stage}");
        let told = serde_json::to_string(&children.job).unwrap();
        assert!(!told.contains("rlhf-secrets") && !told.contains("\"hub\""), "stage {stage}");
    }
    assert!(pod(&build(&super::job(), 0, 1)).volumes.unwrap().iter().all(|v| v.secret.is_none()));
}

#[test]
fn stages_find_on_the_volume_what_prepare_brings_there() {
    let job = remote();
    let children = build(&job, 0, 1);
    let config: PrepareConfig = entry(&children, "prepare.json");
    let told: Vec<_> = config.remote.iter().map(|r| (r.field.as_str(), r.is_model, r.secret.as_deref())).collect();
    assert_eq!(
        told,
        [("spec.model.source", true, Some("hub")), ("spec.stages[tune].sft.dataset.source", false, Some("s3"))]
    );
    let tune: StageConfig = entry(&children, "tune.json");
    assert_eq!(tune.paths.base_model, config.remote[0].path);
    assert_eq!(config.models, [config.remote[0].path.clone()]);
    let dataset = tune.kind.dataset().1;
    assert_eq!(dataset.source, Some(format!("{VOLUME_SCHEME}{}/d.jsonl", config.remote[1].path)));
    assert_eq!((dataset.eval_source.as_deref(), &dataset.secret_ref), (Some("volume://data/e.jsonl"), &None));
    assert_eq!(config.remote[0].path, source::folder(&job.run_dir(), "hf://org/name@main"));
}

#[test]
fn a_held_in_network_lets_prepare_out_where_it_has_to_fetch_and_nobody_else() {
    let outside = |job: &RLHFJob, index: usize, rules: NetworkRules| {
        let settings = Settings { network: Some(rules), ..settings() };
        children(job, Task::all(job).nth(index).unwrap(), FIRST, &settings).unwrap()
    };
    let children = outside(&remote(), 0, rules("Restricted"));
    let policy = children.outside.clone().unwrap();
    let spec = serde_json::to_value(policy.spec.unwrap()).unwrap();
    assert_eq!(spec["podSelector"]["matchLabels"][names::LABEL_STAGE], names::PREPARE);
    assert_eq!((&spec["policyTypes"], &spec["egress"]), (&json!(["Egress"]), &json!([{}])));
    assert_eq!(spec["ingress"], Value::Null);
    assert!(children.needed().unwrap().iter().any(|child| Some(&child.name) == policy.metadata.name.as_ref()));
    assert!(outside(&remote(), 1, rules("Restricted")).outside.is_none());
    assert!(outside(&remote(), 0, rules("All")).outside.is_none());
    assert!(outside(&super::job(), 0, rules("Restricted")).outside.is_none());
}

#[test]
fn what_is_no_place_of_a_model_or_of_records_is_refused_by_its_field() {
    let mut job = remote();
    job.spec.model.source = Some("hf://datasets/a/b/c".into());
    let error = check(&job, &settings()).unwrap_err().to_string();
    assert!(error.contains("spec.model.source `hf://datasets/a/b/c` is no location of a model"), "{error}");
    let mut job = remote();
    job.spec.stages[0].sft.as_mut().unwrap().dataset.source = Some("hf://a/b".into());
    let error = check(&job, &settings()).unwrap_err().to_string();
    assert!(error.contains("spec.stages[tune].sft.dataset.source `hf://a/b` is no location of a file"), "{error}");
}
