//! The admission rules that speak of more than one field, in CEL.

use super::MAX_STAGES;
use crate::reference::Produces;
use crate::stage::StageKind;
use kube::core::Rule;

/// Keeps a field as it was when the job was created.
pub(super) fn immutable(field: &str) -> Rule {
    Rule::new("self == oldSelf").message(fixed(field).as_str())
}

/// As [`immutable`], for a field of the spec that may be absent: a rule that stands at such a field itself is not
/// asked when it is added or taken away.
pub(super) fn immutable_option(field: &str) -> Rule {
    Rule::new(unchanged(field)).message(fixed(field).as_str())
}

fn unchanged(field: &str) -> String {
    let has = format!("has(self.{field})");
    format!("{has} == has(oldSelf.{field}) && (!{has} || self.{field} == oldSelf.{field})")
}

fn fixed(field: &str) -> String {
    format!(
        "{field} cannot change once the job exists; delete the job and create it again with the new {field} (with the same storage.runPath it goes on from its checkpoints)"
    )
}

/// What says where and how, and not what is learnt, may change while nothing runs.
pub(super) fn changes_while_suspended() -> Rule {
    let of_stages = ["compute", "strategy"].map(|field| {
        let all = |spec: &str| format!("{spec}.stages.map(s, has(s.{field}) ? [s.{field}] : [])");
        format!("{} == {}", all("self"), all("oldSelf"))
    });
    let of_job = ["prepare", "compute", "strategy"].map(|field| format!("self.{field} == oldSelf.{field}"));
    let checkpoints = "self.stages.map(s, s.checkpoint) == oldSelf.stages.map(s, s.checkpoint)".to_owned();
    let all: Vec<_> = of_job.into_iter().chain(of_stages).chain([checkpoints]).collect();
    // Where stages come, go or change places another rule speaks.
    let same = "self.stages.map(s, s.name) != oldSelf.stages.map(s, s.name)";
    Rule::new(format!("oldSelf.suspend || {same} || ({})", all.join(" && "))).message(
        "prepare, compute, strategy and checkpoint can change only while the job is suspended; set suspend to true first",
    )
}

/// Stages stay as they were, and where they were.
pub(super) fn same_stages() -> Rule {
    let same = every("self[i].name == oldSelf[i].name");
    Rule::new(format!("size(self) == size(oldSelf) && {same}")).message(
        "stages cannot come, go or change places once the job exists; delete the job and create it again (with the same storage.runPath it goes on from its checkpoints)",
    )
}

/// What a stage learns stays as it was.
pub(super) fn same_stage() -> Rule {
    let kinds = StageKind::ALL.map(|(field, _)| unchanged(field));
    let fields: Vec<_> =
        kinds.into_iter().chain([unchanged("dependsOn"), "self.seed == oldSelf.seed".into()]).collect();
    Rule::new(format!("({})", fields.join(") && ("))).message(fixed("what a stage learns").as_str())
}

/// A stage does one thing.
pub(super) fn one_kind() -> Rule {
    let names = StageKind::ALL.map(|(field, _)| field);
    let has = names.map(|field| format!("has(self.{field})")).join(", ");
    let (last, others) = names.split_last().unwrap_or((&"", &[]));
    let message = format!("a stage has exactly one of {} and {last}; make a stage of each", others.join(", "));
    Rule::new(format!("[{has}].filter(x, x).size() == 1")).message(message.as_str())
}

/// The job's own model is no stage's.
pub(super) fn model_is_a_source() -> Rule {
    Rule::new("!has(self.stage)").message("spec.model exists before the stages; write its source")
}

/// Wherever a stage has the reference, it names an earlier stage with that output. Earlier keeps the graph free of circles,
/// whatever kinds there are.
pub(super) fn references(field: &str, output: Produces) -> Rule {
    let member = format!("self[i].{field}");
    let mut path = String::from("self[i]");
    let mut parts: Vec<_> = field
        .split('.')
        .map(|part| {
            path = format!("{path}.{part}");
            format!("has({path})")
        })
        .collect();
    parts.push(format!("has({member}.stage)"));
    let fits = earlier(&format!("{member}.stage"), &puts_out(output));
    Rule::new(every(&format!("!({}) || {fits}", parts.join(" && "))))
        .message(unfit(&format!("{field}.stage"), output).as_str())
}

/// As [`references`], for the models among a stage's rewards.
pub(super) fn reward_references() -> Rule {
    let output = Produces::RewardModel;
    let fits = earlier("r.model.stage", &puts_out(output));
    let of_rewards = format!("self[i].ppo.rewards.all(r, !has(r.model) || !has(r.model.stage) || {fits})");
    Rule::new(every(&format!("!has(self[i].ppo) || {of_rewards}")))
        .message(unfit("ppo.rewards[].model.stage", output).as_str())
}

/// An order without a model leads to earlier stages, too.
pub(super) fn dependencies() -> Rule {
    let of_names = format!("self[i].dependsOn.all(d, {})", earlier("d", "true"));
    Rule::new(every(&format!("!has(self[i].dependsOn) || {of_names}")))
        .message("dependsOn names no earlier stage of this job; name stages that stand before this one")
}

/// The places that stages can have. CEL counts a list's places by no other means of which it can bound the cost.
fn places() -> String {
    let all: Vec<_> = (0..MAX_STAGES).map(|place| place.to_string()).collect();
    format!("[{}]", all.join(","))
}

/// `rule` holds of every stage, which it calls `self[i]`.
fn every(rule: &str) -> String {
    format!("{}.all(i, i >= size(self) || ({rule}))", places())
}

/// There is a stage of this name before stage `i`, of which `rule` holds under the name `self[j]`.
fn earlier(name: &str, rule: &str) -> String {
    format!("{}.exists(j, j < i && self[j].name == {name} && ({rule}))", places())
}

fn puts_out(output: Produces) -> String {
    let kinds = StageKind::ALL.iter().filter(|(_, produces)| *produces == output);
    kinds.map(|(field, _)| format!("has(self[j].{field})")).collect::<Vec<_>>().join(" || ")
}

fn unfit(field: &str, output: Produces) -> String {
    let kinds = StageKind::ALL.iter().filter(|(_, produces)| *produces == output);
    let kinds = kinds.map(|(field, _)| *field).collect::<Vec<_>>().join(" or ");
    format!(
        "{field} names no earlier stage of this job that puts out {} ({kinds}); name one that stands before this one, or write a source",
        output.words()
    )
}

/// What is to fit has to fit into something: a container's limit of memory, and not what its node happens to have.
pub(super) fn memory_is_known() -> Rule {
    let limited = |compute: &str| format!("has({compute}.resources.limits) && 'memory' in {compute}.resources.limits");
    let auto = ["sharding", "offload", "recompute"]
        .map(|f| format!("(has(s.strategy) && has(s.strategy.{f}) ? s.strategy.{f} : self.strategy.{f}) == 'auto'"))
        .join(" || ");
    Rule::new(format!(
        "self.stages.all(s, !({auto}) || ({}) || (has(s.compute) && {}))",
        limited("self.compute"),
        limited("s.compute")
    ))
    .message("strategy has a setting that is auto, which needs compute.resources.limits.memory; write how much memory a pod may use, or write the setting")
}

/// The devices of stage `s`.
const DEVICES: &str = "(has(s.compute.devicesPerNode) ? s.compute.devicesPerNode : self.compute.devicesPerNode)";

pub(super) fn stage_device_memory() -> Rule {
    of_stages(&format!("!has(s.compute.deviceMemory) || {DEVICES} > 0")).message(
        "a stage's compute.deviceMemory is the memory of each device, and it has none; set devicesPerNode, or leave out deviceMemory",
    )
}

pub(super) fn stage_cpu_workers() -> Rule {
    of_stages(&format!("!has(s.compute.cpuWorkersPerNode) || s.compute.cpuWorkersPerNode == 1 || {DEVICES} == 0")).message(
        "a stage's compute.cpuWorkersPerNode is for training on CPU, with devices there is one worker each; set devicesPerNode to 0 beside it, or leave it out",
    )
}

pub(super) fn stage_resources() -> Rule {
    let name = "(has(s.compute.deviceResource) ? s.compute.deviceResource : self.compute.deviceResource)";
    let counts = |side: &str| format!("(has(s.compute.resources.{side}) && {name} in s.compute.resources.{side})");
    of_stages(&format!("!{} && !{}", counts("limits"), counts("requests"))).message(
        "a stage's compute.resources must not count devices; set devicesPerNode, from which their requests and limits are made",
    )
}

fn of_stages(rule: &str) -> Rule {
    Rule::new(format!("self.stages.all(s, !has(s.compute) || ({rule}))"))
}
