//! Every rule of the custom resource definition lets through what it should and refuses what it should, with
//! its own message.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod rules;

use kube_cel::Validator;
use rlhf_api::job::{RLHFJob, crd};
use rules::Case;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

fn cases() -> Vec<Case> {
    rules::cases(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rules"))
}

fn schema() -> Value {
    let version = crd().spec.versions.remove(0);
    serde_json::to_value(version.schema.unwrap().open_api_v3_schema.unwrap()).unwrap()
}

/// A manifest with the defaults that the API server would fill in, as long as it has the right fields: reading is lenient,
/// and the API server, asked to be strict, is not.
fn defaulted(manifest: &Value) -> Result<Value, String> {
    if let Some(path) = unknown(&schema()["properties"]["spec"], &manifest["spec"], "spec") {
        return Err(format!("unknown field {path}"));
    }
    let job: RLHFJob = serde_json::from_value(manifest.clone()).map_err(|e| e.to_string())?;
    Ok(serde_json::to_value(job).unwrap())
}

/// The first field that the schema does not have.
fn unknown(schema: &Value, value: &Value, path: &str) -> Option<String> {
    match value {
        Value::Object(fields) if schema["properties"].is_object() => fields.iter().find_map(|(name, value)| {
            let path = format!("{path}.{name}");
            schema["properties"].get(name).map_or(Some(path.clone()), |schema| unknown(schema, value, &path))
        }),
        Value::Array(items) => items.iter().find_map(|item| unknown(&schema["items"], item, path)),
        _ => None,
    }
}

/// The answers to a case, none where it is accepted.
fn answers(case: &Case) -> Vec<String> {
    let stored = case.stored.as_ref().map(|s| defaulted(s).unwrap());
    match defaulted(&case.manifest).map(|manifest| Validator::new().validate(&schema(), &manifest, stored.as_ref())) {
        Err(error) => vec![error],
        Ok(Ok(())) => vec![],
        Ok(Err(errors)) => errors.iter().map(|e| e.to_string()).collect(),
    }
}

#[test]
fn each_case_is_accepted_or_refused_with_its_message_alone() {
    for case in cases() {
        let answers = answers(&case);
        match &case.refused {
            None => assert!(answers.is_empty(), "{}: {answers:#?}", case.path.display()),
            Some(message) => assert!(
                answers.len() == 1 && answers[0].contains(message),
                "{}: expected only {message:?}, got {answers:#?}",
                case.path.display()
            ),
        }
    }
}

#[test]
fn each_rule_has_a_case_that_it_refuses() {
    let refused: BTreeSet<String> = cases().into_iter().filter_map(|c| c.refused).collect();
    let mut messages = BTreeSet::new();
    visit(&schema(), &mut |node| {
        for rule in node["x-kubernetes-validations"].as_array().into_iter().flatten() {
            messages.insert(rule["message"].as_str().expect("a rule without a message").to_owned());
        }
    });
    assert!(messages.len() > 15, "the rules are gone: {messages:#?}");
    let untested: Vec<_> = messages.difference(&refused).collect();
    assert!(untested.is_empty(), "{untested:#?}");
}

#[test]
fn the_api_server_knows_every_format_and_no_field_may_be_null() {
    visit(&schema(), &mut |node| {
        let format = node["format"].as_str().unwrap_or("date-time");
        assert!(["date-time", "double", "int32", "int64"].contains(&format), "format {format}");
        assert!(node["nullable"].is_null(), "nullable: {node}");
    });
}

#[test]
fn every_number_and_every_length_of_the_spec_is_bounded() {
    let mut open = Vec::new();
    bounds(&schema()["properties"]["spec"], "spec", &mut open);
    assert!(open.is_empty(), "without bounds: {open:#?}");
}

/// Collects what has no bounds: integers and decimals on both sides, and the lengths of texts, lists and maps. What Kubernetes' own types
/// hold is bounded where the pod is made.
fn bounds(schema: &Value, path: &str, open: &mut Vec<String>) {
    const OF_KUBERNETES: [&str; 9] = [
        "affinity",
        "topologySpreadConstraints",
        "tolerations",
        "resourceClaims",
        "env",
        "volumes",
        "volumeMounts",
        "imagePullSecrets",
        "resources",
    ];
    let lacks = |keys: &[&str]| keys.iter().any(|key| schema[*key].is_null());
    let decimal = schema["type"].is_null() && schema["x-kubernetes-preserve-unknown-fields"] == true;
    let unbounded = match schema["type"].as_str() {
        Some("integer" | "number") => lacks(&["minimum", "maximum"]),
        Some("string") => schema["enum"].is_null() && lacks(&["maxLength"]),
        Some("array") => lacks(&["maxItems"]),
        Some("object") => !schema["additionalProperties"].is_null() && lacks(&["maxProperties"]),
        _ => decimal && lacks(&["minimum", "maximum", "pattern"]),
    };
    if unbounded {
        open.push(path.into());
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        if !OF_KUBERNETES.contains(&name.as_str()) {
            bounds(field, &format!("{path}.{name}"), open);
        }
    }
    if schema["items"].is_object() {
        bounds(&schema["items"], &format!("{path}[]"), open);
    }
}

#[test]
fn stages_and_rewards_are_lists_by_name() {
    let schema = schema();
    let stages = &schema["properties"]["spec"]["properties"]["stages"];
    let rewards = &stages["items"]["properties"]["ppo"]["properties"]["rewards"];
    for list in [stages, rewards] {
        assert_eq!(list["x-kubernetes-list-type"], "map");
        assert_eq!(list["x-kubernetes-list-map-keys"], serde_json::json!(["name"]));
    }
}

/// A manifest whose every decimal is text means the same.
#[test]
fn every_decimal_of_the_spec_may_be_text() {
    fn as_text(schema: &Value, value: &mut Value, count: &mut usize) {
        let decimal = schema["type"].is_null() && schema["x-kubernetes-preserve-unknown-fields"] == true;
        match value {
            Value::Number(n) if decimal => {
                *count += 1;
                *value = Value::String(n.to_string());
            }
            Value::Object(fields) => fields.iter_mut().for_each(|(k, v)| as_text(&schema["properties"][k], v, count)),
            Value::Array(items) => items.iter_mut().for_each(|v| as_text(&schema["items"], v, count)),
            _ => {}
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rules/accepted-every-field.yaml");
    let case = cases().into_iter().find(|c| c.path == path).unwrap();
    let numbers = defaulted(&case.manifest).unwrap();
    let (mut text, mut count) = (numbers.clone(), 0);
    as_text(&schema(), &mut text, &mut count);
    assert!(count > 30, "{count} decimals");
    assert_eq!(defaulted(&text).unwrap(), numbers);
    let job: RLHFJob = serde_json::from_value(text).unwrap();
    assert_eq!(rlhf_api::job::out_of_range(&job), None);
}

#[test]
fn a_decimal_that_is_text_is_bounded_too() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rules/accepted-every-field.yaml");
    let mut manifest = cases().into_iter().find(|c| c.path == path).unwrap().manifest;
    manifest["spec"]["stages"][0]["sft"]["optimizer"]["learningRate"] = "2".into();
    let job: RLHFJob = serde_json::from_value(manifest).unwrap();
    let said = rlhf_api::job::out_of_range(&job).unwrap();
    assert_eq!(said, "spec.stages[sft].sft.optimizer.learningRate is 2, and must be at least 0 at most 1");
}

/// A definition of another version may have fields and kinds that are not known here.
#[test]
fn reading_is_lenient() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rules/accepted-every-field.yaml");
    let mut manifest = cases().into_iter().find(|c| c.path == path).unwrap().manifest;
    manifest["spec"]["later"] = true.into();
    manifest["spec"]["stages"][0]["sft"]["later"] = "x".into();
    let unknown_kind = serde_json::json!({"name": "later", "laterKind": {"a": 1}});
    manifest["spec"]["stages"].as_array_mut().unwrap().push(unknown_kind);
    let job: RLHFJob = serde_json::from_value(manifest).unwrap();
    assert!(job.spec.stages[0].kind().is_some() && job.spec.stages[5].kind().is_none());
}

#[test]
fn the_committed_definition_is_the_generated_one() {
    let generated = Command::new(env!("CARGO_BIN_EXE_crdgen")).output().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("rlhfjob.yaml");
    let committed = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert!(generated.status.success() && !generated.stdout.is_empty());
    assert!(committed == generated.stdout, "{} is out of date; run `make generate`", path.display());
}

fn visit(node: &Value, see: &mut impl FnMut(&Value)) {
    match node {
        Value::Object(fields) => {
            see(node);
            fields.values().for_each(|child| visit(child, see));
        }
        Value::Array(items) => items.iter().for_each(|item| visit(item, see)),
        _ => {}
    }
}
