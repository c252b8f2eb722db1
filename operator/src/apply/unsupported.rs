//! Says on an RLHFJob itself that this operator cannot work on it, where no status can be decided: on the object as the
//! API server has it, of which all else stays.

use super::changes::changes;
use super::events::send;
use super::status::{as_it_is, patch};
use crate::classify::bounded;
use crate::context::Context;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::Resource;
use kube::runtime::events::{Event, EventType};
use rlhf_api::job::RLHFJobStatus;
use rlhf_api::names::CONDITION_UNSUPPORTED;
use serde_json::{Value, json};

/// Why no status can be decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The object cannot be read as an RLHFJob.
    Undecodable,
    /// To decide on it took too long, or met a bug.
    Undecided,
}

impl Why {
    /// The condition's reason.
    pub const fn as_str(self) -> &'static str {
        match self {
            Why::Undecodable => "Undecodable",
            Why::Undecided => "Undecided",
        }
    }
}

/// Sets the condition, and tells of it if it says something new.
///
/// # Errors
/// The API server does not take it.
pub async fn tell(job: &impl Resource<DynamicType = ()>, why: Why, message: String, ctx: &Context) -> kube::Result<()> {
    let Some(there) = as_it_is(job, ctx).await? else { return Ok(()) };
    let before = there.data.get("status").cloned().unwrap_or_default();
    let message = bounded(message);
    let Some(status) = with_condition(&before, why, &message, job.meta().generation) else { return Ok(()) };
    patch(&there, &changes(&before, &status, "/status"), ctx).await?;
    let event = Event {
        type_: EventType::Warning,
        reason: why.as_str().into(),
        note: Some(message),
        action: "Reconcile".into(),
        secondary: None,
    };
    send(job, event, &ctx.recorder, ctx).await;
    Ok(())
}

/// The status with the condition, unless it says so already.
fn with_condition(before: &Value, why: Why, message: &str, generation: Option<i64>) -> Option<Value> {
    let mut status = if before.is_object() { before.clone() } else { json!({}) };
    let ours = |condition: &Value| condition["type"] == CONDITION_UNSUPPORTED;
    let conditions = status.get("conditions").and_then(Value::as_array).cloned().unwrap_or_default();
    let old = conditions.iter().find(|c| ours(c));
    let held = old.filter(|c| c["status"] == "True");
    if held.is_some_and(|c| c["reason"] == why.as_str() && c["message"] == message) {
        return None;
    }
    let since = held.and_then(|c| c["lastTransitionTime"].as_str()?.parse().ok());
    let condition = Condition {
        type_: CONDITION_UNSUPPORTED.into(),
        status: "True".into(),
        reason: why.as_str().into(),
        message: message.into(),
        observed_generation: generation,
        last_transition_time: Time(since.unwrap_or_else(Timestamp::now)),
    };
    let others = conditions.iter().filter(|c| !ours(c)).cloned();
    status["conditions"] = others.chain([json!(condition)]).collect();
    Some(status)
}

/// Takes the condition back in a status that could be decided after all.
pub fn take_back(status: &mut RLHFJobStatus, generation: Option<i64>) {
    let ours = |c: &&mut Condition| {
        let why = [Why::Undecodable, Why::Undecided].map(Why::as_str);
        c.type_ == CONDITION_UNSUPPORTED && c.status == "True" && why.contains(&c.reason.as_str())
    };
    if let Some(condition) = status.conditions.iter_mut().find(ours) {
        *condition = Condition {
            type_: CONDITION_UNSUPPORTED.into(),
            status: "False".into(),
            reason: "Supported".into(),
            message: "this operator works on the job".into(),
            observed_generation: generation,
            last_transition_time: Time(Timestamp::now()),
        };
    }
}
