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

/// A manifest with the defaults that the API server would fill in, as long as it has the right fields.
fn defaulted(manifest: &Value) -> Result<Value, String> {
    let job: RLHFJob = serde_json::from_value(manifest.clone()).map_err(|e| e.to_string())?;
    Ok(serde_json::to_value(job).unwrap())
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
