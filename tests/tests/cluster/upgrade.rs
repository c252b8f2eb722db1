//! The chart is installed over another version, or beside one.

use e2e::manifest::example;
use e2e::tools::{kubectl, kubectl_with, root};
use e2e::{RELEASE, SYSTEM, change_definition, eventually, install, on_the_cluster_alone, operator_pods, uninstall};
use kube::ResourceExt;
use serde_json::json;

const FIELD: &str = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/ttlSecondsAfterFinished";

#[test]
fn case_8_no_field_is_dropped_without_a_word() {
    on_the_cluster_alone(async |scene| {
        install(true).await;
        let mut misspelt = example();
        misspelt.0["spec"]["ttlSecondsAfterFinish"] = json!(60);
        let args = ["apply", "--namespace", &scene.namespace, "--filename", "-"];
        let refused = kubectl_with(&args, &misspelt.0).await;
        assert!(
            !refused.ok && refused.errors.contains("unknown field \"spec.ttlSecondsAfterFinish\""),
            "{}",
            refused.errors
        );

        change_definition(json!({"op": "remove", "path": FIELD})).await;
        kubectl(&["delete", "pods", "--all", "--namespace", SYSTEM]).await.good();
        let told = async || {
            let (_, pods) = operator_pods(scene).await;
            for pod in pods.iter().map(ResourceExt::name_any) {
                for run in [["logs", &pod].as_slice(), &["logs", &pod, "--previous"]] {
                    let logs = kubectl(&[run, &["--namespace", SYSTEM]].concat()).await.output;
                    if logs.contains("lacks spec.ttlSecondsAfterFinished, which the API server would drop") {
                        return true;
                    }
                }
            }
            false
        };
        eventually("the operator's word on the definition", 60, told).await;

        let current = root().join("crds/rlhfjob.yaml").display().to_string();
        kubectl(&["apply", "--server-side", "--force-conflicts", "--filename", &current]).await.good();
        let deployment = format!("deployment/{RELEASE}");
        kubectl(&["rollout", "status", &deployment, "--namespace", SYSTEM, "--timeout", "90s"]).await.good();
        uninstall().await;
    });
}

#[test]
fn case_43_an_upgrade_keeps_the_key_of_running_trainers() {
    on_the_cluster_alone(async |_| {
        let secret = format!("{RELEASE}-key");
        let key = async || {
            kubectl(&["get", "secret", &secret, "--namespace", SYSTEM, "--output", "jsonpath={.data}"]).await.good()
        };
        install(true).await;
        let first = key().await;
        assert!(!first.is_empty(), "the first operator makes a key");
        install(true).await;
        assert!(key().await == first, "an upgrade has changed the key");
        uninstall().await;
    });
}
