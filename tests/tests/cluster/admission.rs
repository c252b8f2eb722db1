//! What the API server takes and refuses, asked as users ask it.

#[path = "../../../crds/tests/rules/mod.rs"]
mod rules;

use e2e::manifest::{Manifest, example, manifests};
use e2e::tools::{kubectl, kubectl_with, root};
use e2e::{Scene, on_the_cluster};
use kube::ResourceExt;
use kube::api::DeleteParams;
use rlhf_api::job::RLHFJob;
use rules::Case;
use serde_json::{Value, json};

async fn ask(scene: &Scene, case: &Case) -> Result<(), String> {
    let Some(stored) = &case.stored else { return scene.ask(&case.manifest, None).await };
    let name = scene.apply(Manifest(stored.clone())).await.name_any();
    let answer = scene.ask(&case.manifest, Some(&name)).await;
    let jobs = scene.api::<RLHFJob>();
    jobs.delete(&name, &DeleteParams::default()).await.expect("the stored job can be deleted");
    scene.await_object(&jobs, &name, |job: Option<&RLHFJob>| job.is_none()).await;
    answer
}

#[test]
fn each_wrong_manifest_is_refused_with_the_message_of_its_rule() {
    on_the_cluster(async |scene| {
        let mut wrong = Vec::new();
        let cases = rules::cases(&root().join("crds/tests/rules"));
        assert!(cases.iter().filter(|c| c.refused.is_some()).count() > 25, "the cases are gone");
        for case in cases {
            let answer = ask(scene, &case).await;
            let as_expected = match (&case.refused, &answer) {
                (None, answer) => answer.is_ok(),
                (Some(message), answer) => answer.as_ref().is_err_and(|said| said.contains(message)),
            };
            if !as_expected {
                wrong.push(format!("{}: expected {:?}, got: {answer:?}", case.path.display(), case.refused));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    });
}

#[test]
fn case_10_what_is_out_of_range_is_refused_with_its_field() {
    on_the_cluster(async |scene| {
        for (pointer, value) in [
            ("/spec/compute/nodes", json!(0)),
            ("/spec/compute/nodes", json!(-1)),
            ("/spec/compute/devicesPerNode", json!(65)),
            ("/spec/compute/deviceMemory", json!("80GB")),
            ("/spec/strategy/offload", json!("disk")),
            ("/spec/stages/0/sft/maxLength", json!(1)),
            ("/spec/stages/0/sft/batch/globalSize", json!(0)),
            ("/spec/stages/0/sft/optimizer/learningRate", json!(-0.1)),
            ("/spec/stages/2/ppo/kl/coefficient", json!("a little")),
            ("/spec/failurePolicy/maxRestarts", json!(101)),
        ] {
            let mut manifest = example().0;
            let (parent, field) = pointer.rsplit_once('/').expect("a pointer");
            for key in ["strategy", "failurePolicy"] {
                manifest["spec"][key] = json!({});
            }
            manifest.pointer_mut(parent).unwrap_or_else(|| panic!("the example has no {parent}"))[field] = value;
            let answer = scene.ask(&manifest, None).await;
            assert!(answer.as_ref().is_err_and(|said| said.contains(field)), "{pointer}: {answer:?}");
        }
    });
}

#[test]
fn each_example_is_accepted_without_a_warning() {
    on_the_cluster(async |scene| {
        let examples = manifests("examples");
        assert!(examples.len() > 1, "the examples are gone");
        for (path, manifest) in examples {
            let apply = ["apply", "--namespace", &scene.namespace, "--dry-run=server", "--filename", "-"];
            let answer = kubectl_with(&apply, &manifest).await;
            assert!(answer.ok && !answer.errors.contains("Warning"), "{path}: {}", answer.errors);
        }
    });
}

/// The paths below a schema of OpenAPI that say nothing of what they are. What is in Kubernetes' own types it explains itself.
fn unexplained(schema: &Value, path: &str, found: &mut Vec<String>) {
    const OF_KUBERNETES: [&str; 7] =
        ["affinity", "topologySpreadConstraints", "tolerations", "resourceClaims", "env", "volumes", "volumeMounts"];
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        if field["description"].as_str().is_none_or(str::is_empty) {
            found.push(path.clone());
        }
        if OF_KUBERNETES.contains(&name.as_str()) {
            continue;
        }
        for inner in [field, &field["items"], &field["additionalProperties"]] {
            unexplained(inner, &path, found);
        }
    }
}

#[test]
fn the_definition_explains_every_field_to_users() {
    on_the_cluster(async |_| {
        let published = kubectl(&["get", "--raw", "/openapi/v3/apis/rlhf.dev/v1alpha1"]).await.good();
        let published: Value = serde_json::from_str(&published).expect("OpenAPI is JSON");
        let job = &published["components"]["schemas"]["dev.rlhf.v1alpha1.RLHFJob"]["properties"];
        assert!(job["spec"]["properties"]["stages"]["items"]["properties"]["ppo"].is_object(), "{job}");
        let mut found = Vec::new();
        for part in ["spec", "status"] {
            unexplained(&job[part], part, &mut found);
        }
        assert_eq!(found, Vec::<String>::new());
        let answer = kubectl(&["explain", "rlhfjob.spec.stages.ppo.kl"]).await.good();
        assert!(answer.contains("coefficient") && answer.contains("penalty"), "{answer}");
    });
}
