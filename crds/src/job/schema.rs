//! The custom resource definition as it is installed.

use super::RLHFJob;
use crate::decimal;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt;

/// The custom resource definition.
pub fn crd() -> CustomResourceDefinition {
    let mut crd = RLHFJob::crd();
    let schemas = crd.spec.versions.iter_mut().filter_map(|v| v.schema.as_mut()?.open_api_v3_schema.as_mut());
    for schema in schemas {
        visit(schema, &mut tidy);
        if let Some(spec) = schema.properties.as_mut().and_then(|p| p.get_mut("spec")) {
            visit(spec, &mut decimals);
            visit(spec, &mut short_of_words);
            visit(spec, &mut bounded_env);
        }
    }
    crd
}

/// Takes out of a schema what the API server should not see: the formats of unsigned integers, which it warns
/// of (`minimum` says as much), and `nullable`, without which a null counts as absent, so that a stage with
/// `sft: null` has no `sft`.
fn tidy(schema: &mut JSONSchemaProps) {
    schema.format.take_if(|format| format.starts_with("uint"));
    schema.nullable = None;
}

/// Lets a number be written as text, see [`decimal`]. A schema without a type takes any: the bounds and the pattern each speak
/// of their own type, and objects and lists are refused by having nothing in them.
fn decimals(schema: &mut JSONSchemaProps) {
    if schema.type_.as_deref() != Some("number") {
        return;
    }
    schema.type_ = None;
    schema.format = None;
    schema.x_kubernetes_preserve_unknown_fields = Some(true);
    schema.pattern = Some(decimal::PATTERN.into());
    schema.max_length = Some(decimal::MAX_LENGTH);
}

/// Leaves out what Kubernetes' own types say of their fields: those are explained by `kubectl explain pod.spec`, and are not
/// stored once for each place where they stand.
fn short_of_words(schema: &mut JSONSchemaProps) {
    const OF_KUBERNETES: [&str; 7] =
        ["affinity", "topologySpreadConstraints", "tolerations", "resourceClaims", "env", "volumes", "volumeMounts"];
    let fields = schema.properties.iter_mut().flatten().filter(|(name, _)| OF_KUBERNETES.contains(&name.as_str()));
    for (_, field) in fields {
        children(field).into_iter().for_each(|child| visit(child, &mut |s| s.description = None));
    }
}

/// Bounds environment variables, without which the API server cannot bound the cost of the rules that speak of them.
fn bounded_env(schema: &mut JSONSchemaProps) {
    let env = schema.properties.as_mut().and_then(|p| p.get_mut("env"));
    let Some(JSONSchemaPropsOrArray::Schema(variable)) = env.and_then(|env| env.items.as_mut()) else { return };
    for (name, field) in variable.properties.iter_mut().flatten() {
        match name.as_str() {
            "name" => field.max_length = Some(64),
            "value" => field.max_length = Some(4096),
            _ => {}
        }
    }
}

fn visit(schema: &mut JSONSchemaProps, see: &mut impl FnMut(&mut JSONSchemaProps)) {
    see(schema);
    children(schema).into_iter().for_each(|child| visit(child, see));
}

fn children(schema: &mut JSONSchemaProps) -> Vec<&mut JSONSchemaProps> {
    let mut all: Vec<_> = schema.properties.iter_mut().flat_map(|p| p.values_mut()).collect();
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        all.push(items);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        all.push(values);
    }
    all
}
