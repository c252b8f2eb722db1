//! The bounds of decimals that were written as text, which a schema checks in numbers only.

use super::RLHFJob;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use serde_json::Value;
use std::sync::LazyLock;

static SPEC: LazyLock<Option<JSONSchemaProps>> = LazyLock::new(|| {
    let version = super::crd().spec.versions.into_iter().next()?;
    version.schema?.open_api_v3_schema?.properties?.remove("spec")
});

/// The first number of a job's spec that is out of its bounds: where it stands, what it is, and what it may be.
pub fn out_of_range(job: &RLHFJob) -> Option<String> {
    let spec = serde_json::to_value(&job.spec).ok()?;
    first(SPEC.as_ref()?, &spec, "spec")
}

fn first(schema: &JSONSchemaProps, value: &Value, path: &str) -> Option<String> {
    match value {
        Value::Number(number) => {
            let number = number.as_f64()?;
            let (least, most) = (schema.minimum, schema.maximum);
            let outside = least.is_some_and(|l| number < l) || most.is_some_and(|m| number > m);
            let bound = |bound: Option<f64>, words: &str| bound.map(|b| format!(" {words} {b}")).unwrap_or_default();
            outside.then(|| {
                format!("{path} is {number}, and must be{}{}", bound(least, "at least"), bound(most, "at most"))
            })
        }
        Value::Object(fields) => fields.iter().find_map(|(name, value)| {
            let field = schema.properties.as_ref().and_then(|p| p.get(name));
            let other = || match schema.additional_properties.as_ref()? {
                JSONSchemaPropsOrBool::Schema(values) => Some(&**values),
                JSONSchemaPropsOrBool::Bool(_) => None,
            };
            first(field.or_else(other)?, value, &format!("{path}.{name}"))
        }),
        Value::Array(items) => {
            let Some(JSONSchemaPropsOrArray::Schema(schema)) = &schema.items else { return None };
            items.iter().enumerate().find_map(|(i, item)| first(schema, item, &format!("{path}[{}]", name_of(item, i))))
        }
        _ => None,
    }
}

fn name_of(item: &Value, index: usize) -> String {
    item.get("name").and_then(Value::as_str).map_or_else(|| index.to_string(), str::to_owned)
}
