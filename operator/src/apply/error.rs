//! What a write may end in, and what of it is for good.

use kube::core::Status;

/// A write that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What was decided is out of date; the next pass decides anew.
    #[error("the job or a child of it changed meanwhile")]
    Stale,
    /// Something that nobody has told of, or that does not go away, keeps a stage's attempt from being made.
    #[error("{what}")]
    InTheWay {
        /// The stage.
        stage: String,
        /// What is there, and what to do about it.
        what: String,
    },
    /// A child of this kind and name is on its way out.
    #[error("{0} is being deleted and not gone yet; do its finalizers hang?")]
    Leaving(String),
    /// The RLHFJob is gone.
    #[error("the job is gone")]
    Gone,
    /// Somebody else's object has a child's name.
    #[error("{what} exists and belongs to {owner}; delete or rename it, or give this RLHFJob another name")]
    Foreign {
        /// The object.
        what: String,
        /// Its owner.
        owner: String,
    },
    /// The API server refuses a child.
    #[error("{what} is refused by the API server: {}", status.message)]
    Refused {
        /// The child.
        what: String,
        /// The answer.
        status: Box<Status>,
    },
    /// What is to be written is no JSON.
    #[error("{what} cannot be written as JSON: {source}")]
    Json {
        /// The object.
        what: String,
        /// Why.
        source: serde_json::Error,
    },
    /// Any other answer, or none.
    #[error("cannot write {what}: {source}")]
    Api {
        /// What was written.
        what: String,
        /// The answer.
        source: kube::Error,
    },
}

impl Error {
    /// What became of a stage's object.
    pub(super) fn of(what: String, error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if is_refusal(&status) => Error::Refused { what, status },
            source => Error::Api { what, source },
        }
    }

    /// Whether the next pass may decide otherwise by itself, for something changes, or has.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Error::Stale | Error::InTheWay { .. })
    }

    /// Whether the write cannot succeed for what the job says: the API server itself finds a field invalid. What a policy, a
    /// quota or a webhook denies may be let through later, whatever code it answers with.
    pub fn is_of_the_spec(&self) -> bool {
        matches!(self, Error::Refused { status, .. } if is_invalid_field(status))
    }
}

/// Answers that stay the same until somebody changes something: invalid, forbidden, denied by a policy or a quota, or an
/// admission webhook that cannot be called.
fn is_refusal(status: &Status) -> bool {
    let no_webhook = status.code == 500 && status.message.contains("failed calling webhook");
    no_webhook || matches!(status.code, 400..500) && !matches!(status.code, 401 | 404 | 408 | 409 | 429)
}

/// Whether it is the API server's own validation that speaks, in the words that it has for that alone (`Job.batch "x" is
/// invalid: …`, and a cause for each field), and not a policy or webhook, which may answer 422 too (`jobs.batch "x" is
/// forbidden: ValidatingAdmissionPolicy …`, `admission webhook "w" denied the request: …`).
fn is_invalid_field(status: &Status) -> bool {
    let Some(details) = status.details.as_ref().filter(|_| status.is_invalid()) else { return false };
    let group = if details.group.is_empty() { String::new() } else { format!(".{}", details.group) };
    let begins = format!("{}{group} \"{}\" is invalid: ", details.kind, details.name);
    let names_fields = !details.causes.is_empty() && details.causes.iter().all(|cause| !cause.field.is_empty());
    names_fields && status.message.starts_with(&begins)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn refused(code: u16, reason: &str, message: &str, details: Value) -> Error {
        let status = json!({"code": code, "reason": reason, "message": message, "details": details});
        let status: Box<Status> = Box::new(serde_json::from_value(status).unwrap());
        Error::of("Job x".into(), kube::Error::Api(status))
    }

    #[test]
    fn only_a_field_that_the_api_server_itself_finds_invalid_is_for_good() {
        let job = |causes: Value| json!({"name": "x", "group": "batch", "kind": "Job", "causes": causes});
        let field = json!([{"reason": "FieldValueInvalid", "message": "Invalid value", "field": "spec.template.spec"}]);
        let policy = json!([{"message": "failed expression: false"}]);
        for (name, error, for_good) in [
            (
                "the schema",
                refused(
                    422,
                    "Invalid",
                    r#"Job.batch "x" is invalid: spec.template.spec: Invalid value: 8"#,
                    job(field.clone()),
                ),
                true,
            ),
            (
                "a validating admission policy, with its default reason",
                refused(
                    422,
                    "Invalid",
                    r#"jobs.batch "x" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no"#,
                    job(policy),
                ),
                false,
            ),
            (
                "a webhook that calls it invalid and names a field",
                refused(
                    422,
                    "Invalid",
                    r#"admission webhook "w.example" denied the request: Job.batch "x" is invalid: no"#,
                    job(field),
                ),
                false,
            ),
            (
                "a webhook by 400",
                refused(400, "BadRequest", r#"admission webhook "w" denied the request: no"#, json!({})),
                false,
            ),
            (
                "a quota",
                refused(403, "Forbidden", r#"jobs.batch "x" is forbidden: exceeded quota: q"#, json!({})),
                false,
            ),
            ("422 of somebody without words", refused(422, "Invalid", "", json!({})), false),
        ] {
            assert!(matches!(error, Error::Refused { .. }), "{name}: {error:?}");
            assert_eq!(error.is_of_the_spec(), for_good, "{name}");
        }
    }

    #[test]
    fn what_the_api_server_cannot_say_now_is_no_refusal() {
        for code in [401, 404, 408, 409, 429, 500, 503] {
            assert!(matches!(refused(code, "", "later", json!({})), Error::Api { .. }), "{code}");
        }
        let message = "Internal error occurred: failed calling webhook \"jobs.example\": connection refused";
        assert!(matches!(refused(500, "InternalError", message, json!({})), Error::Refused { .. }));
    }
}
