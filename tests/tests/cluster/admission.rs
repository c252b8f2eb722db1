//! What the API server takes and refuses, asked as users ask it.

#[path = "../../../crds/tests/rules/mod.rs"]
mod rules;

use e2e::manifest::{example, manifests};
use e2e::tools::{Answer, kubectl, kubectl_with, root};
use e2e::{Scene, on_the_cluster};
use kube::api::DeleteParams;
use rlhf_api::job::RLHFJob;
use rules::Case;
use serde_json::{Value, json};

async fn apply(scene: &Scene, manifest: &Value, really: bool) -> Answer {
    let dry_run = if really { "--dry-run=none" } else { "--dry-run=server" };
    kubectl_with(&["apply", "--namespace", &scene.namespace, dry_run, "--filename", "-"], manifest).await
}

async fn ask(scene: &Scene, case: &Case) -> Answer {
    let Some(stored) = &case.stored else { return apply(scene, &case.manifest, false).await };
    apply(scene, stored, true).await.good();
    let answer = apply(scene, &case.manifest, false).await;
    let name = stored["metadata"]["name"].as_str().expect("a manifest has a name");
    let jobs = scene.api::<RLHFJob>();
    jobs.delete(name, &DeleteParams::default()).await.expect("the stored job can be deleted");
    scene.await_object(&jobs, name, 60, |job: Option<&RLHFJob>| job.is_none()).await;
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
            let as_expected = match &case.refused {
                None => answer.ok,
                Some(message) => !answer.ok && answer.errors.contains(message),
            };
            if !as_expected {
                wrong.push(format!("{}: expected {:?}, got: {}", case.path.display(), case.refused, answer.errors));
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
            let answer = apply(scene, &manifest, false).await;
            assert!(!answer.ok && answer.errors.contains(field), "{pointer}: {}", answer.errors);
        }
    });
}

#[test]
fn each_example_is_accepted_without_a_warning() {
    on_the_cluster(async |scene| {
        let examples = manifests("examples");
        assert!(examples.len() > 1, "the examples are gone");
        for (path, manifest) in examples {
            let answer = apply(scene, &manifest, false).await;
            assert!(answer.ok && !answer.errors.contains("Warning"), "{path}: {}", answer.errors);
        }
    });
}

#[test]
fn the_definition_explains_every_field_to_users() {
    on_the_cluster(async |_| {
        let answer = kubectl(&["explain", "rlhfjob.spec", "--recursive"]).await.good();
        assert!(answer.contains("rolloutBatchSize") && answer.contains("claimName"), "{answer}");
        let answer = kubectl(&["explain", "rlhfjob.spec.stages.ppo.kl"]).await.good();
        assert!(answer.contains("coefficient") && answer.contains("penalty"), "{answer}");
    });
}
