//! What makes one JSON document of another, as JSON Patch (RFC 6902).
//!
//! Only what differs is touched, element by element of lists too. So a status keeps what stands in it and this operator
//! does not know: a newer one may have written it, which takes over again.

use serde_json::{Map, Value, json};

/// The fields by one of which elements of a list are told apart.
const KEYS: [&str; 3] = ["name", "type", "number"];

/// The operations at and below a path that make `new` of `old`.
pub(super) fn changes(old: &Value, new: &Value, path: &str) -> Vec<Value> {
    let mut all = Vec::new();
    compare(old, new, path, &mut all);
    all
}

fn compare(old: &Value, new: &Value, path: &str, all: &mut Vec<Value>) {
    match (old, new) {
        _ if old == new => {}
        (Value::Object(old), Value::Object(new)) => objects(old, new, path, all),
        (Value::Array(old), Value::Array(new)) => lists(old, new, path, all),
        // An addition replaces what is there.
        _ => all.push(json!({"op": if is_element(path) { "replace" } else { "add" }, "path": path, "value": new})),
    }
}

/// Whether a path leads to an element of a list, before which an addition would put another.
fn is_element(path: &str) -> bool {
    path.rsplit('/').next().is_some_and(|last| last.parse::<usize>().is_ok())
}

fn objects(old: &Map<String, Value>, new: &Map<String, Value>, path: &str, all: &mut Vec<Value>) {
    let at = |key: &str| format!("{path}/{}", key.replace('~', "~0").replace('/', "~1"));
    for key in old.keys().filter(|key| !new.contains_key(*key)) {
        all.push(json!({"op": "remove", "path": at(key)}));
    }
    for (key, value) in new {
        match old.get(key) {
            Some(before) => compare(before, value, &at(key), all),
            None => all.push(json!({"op": "add", "path": at(key), "value": value})),
        }
    }
}

/// Elements that have gone are taken out, those that stay are compared, and the rest is put in. A list whose elements have
/// changed places is replaced as a whole.
fn lists(old: &[Value], new: &[Value], path: &str, all: &mut Vec<Value>) {
    let begun = all.len();
    let mut left: Vec<&Value> = old.iter().collect();
    for at in (0..left.len()).rev() {
        if !new.iter().any(|other| same(left[at], other)) {
            left.remove(at);
            all.push(json!({"op": "remove", "path": format!("{path}/{at}")}));
        }
    }
    for (at, element) in new.iter().enumerate() {
        match left.get(at) {
            Some(before) if same(before, element) => compare(before, element, &format!("{path}/{at}"), all),
            _ if left.iter().any(|before| same(before, element)) => {
                all.truncate(begun);
                all.push(json!({"op": "replace", "path": path, "value": new}));
                return;
            }
            _ => {
                left.insert(at, element);
                all.push(json!({"op": "add", "path": format!("{path}/{at}"), "value": element}));
            }
        }
    }
    // Of elements that are the same there may be fewer now.
    all.extend((new.len()..left.len()).rev().map(|at| json!({"op": "remove", "path": format!("{path}/{at}")})));
}

/// Whether two elements speak of the same thing.
pub(super) fn same(one: &Value, other: &Value) -> bool {
    let key = KEYS.iter().find(|key| one.get(**key).is_some());
    key.map_or_else(|| one == other, |key| one.get(*key) == other.get(*key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As the API server does it.
    fn patched(mut document: Value, operations: Vec<Value>) -> Value {
        let operations: json_patch::Patch = serde_json::from_value(operations.into()).unwrap();
        json_patch::patch(&mut document, &operations).unwrap();
        document
    }

    #[test]
    fn what_the_new_document_does_not_speak_of_stays() {
        let known = json!({"stages": [{"name": "a", "step": 1}, {"name": "b", "step": 1}], "message": "m",
            "attempts": [{"number": 1}, {"number": 2}]});
        let mut there = known.clone();
        there["newer"] = json!({"x": 1});
        there["stages"][1]["newer"] = json!(true);
        there["attempts"][1]["newer"] = json!(2);
        let new = json!({"stages": [{"name": "a", "step": 1}, {"name": "b", "step": 5, "a/b~": null}, {"name": "c"}],
            "attempts": [{"number": 2}, {"number": 3}], "conditions": [{"type": "Complete"}]});
        let mut wanted = new.clone();
        wanted["newer"] = there["newer"].clone();
        wanted["stages"][1]["newer"] = json!(true);
        wanted["attempts"][0]["newer"] = json!(2);
        assert_eq!(patched(there, changes(&known, &new, "")), wanted);
    }

    #[test]
    fn nothing_is_said_of_what_is_the_same_and_no_more_than_has_changed() {
        let old = json!({"a": [{"type": "x", "v": 1}], "b": {"c": 1}});
        assert!(changes(&old, &old, "/status").is_empty());
        let new = json!({"a": [{"type": "x", "v": 2}], "b": {"c": 1}});
        assert_eq!(changes(&old, &new, "/status"), [json!({"op": "add", "path": "/status/a/0/v", "value": 2})]);
    }

    fn document() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![Just(json!(1)), Just(json!("x")), Just(json!(null)), Just(json!([]))];
        leaf.prop_recursive(4, 40, 5, |inner| {
            let name = prop_oneof![Just("a"), Just("b"), Just("0"), Just("name"), Just("c/d")];
            prop_oneof![
                prop::collection::btree_map(name, inner.clone(), 0..4).prop_map(|map| json!(map)),
                prop::collection::vec(inner, 0..4).prop_map(Value::from),
            ]
        })
    }

    proptest! {
        #[test]
        fn the_changes_make_the_new_of_the_old(old in document(), new in document()) {
            // A status is an object.
            let (old, new) = (json!({"status": old}), json!({"status": new}));
            prop_assert_eq!(patched(old.clone(), changes(&old, &new, "")), new);
        }
    }
}
