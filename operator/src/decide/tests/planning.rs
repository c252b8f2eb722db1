//! What follows from a strategy that is left to the operator.

use super::*;
use rlhf_api::job::PlanSource;
use rlhf_api::report::{DatasetShape, Prepared};
use rlhf_api::stage::{Offload, Recompute, Sharding};
use serde_json::{Value, json};

const AUTO: &str = "auto";

/// A job of GPT-2's shape on two pods.
fn on(compute: Value, strategy: Value) -> Case {
    let mut case = Case::new();
    case.job.spec.compute = serde_json::from_value(compute).unwrap();
    case.job.spec.strategy = serde_json::from_value(strategy).unwrap();
    for stage in &mut case.job.spec.stages {
        let lengths =
            [stage.sft.as_mut().map(|s| &mut s.max_length), stage.reward_model.as_mut().map(|s| &mut s.max_length)];
        lengths.into_iter().flatten().for_each(|length| *length = 1024);
    }
    case
}

fn all_auto() -> Value {
    json!({"sharding": AUTO, "offload": AUTO, "recompute": AUTO, "precision": "bf16"})
}

fn gpus(memory: &str) -> Value {
    json!({"nodes": 2, "devicesPerNode": 1, "deviceMemory": memory, "resources": {"limits": {"memory": "64Gi"}}})
}

pub(in crate::decide) fn word_of_prepare(longest_tokens: u32) -> TerminationMessage {
    let dataset =
        |stage: &str, sequences| DatasetShape { stage: stage.into(), longest_tokens, sequences, records: 0, tokens: 0 };
    let datasets = vec![dataset("tune", 1), dataset("judge", 2), dataset("act", 1)];
    let prepared = Prepared { models: vec![memory_plan::preset("s").unwrap()], datasets };
    TerminationMessage {
        code: 0,
        reason: "Done".into(),
        message: String::new(),
        rank: None,
        step: None,
        checkpoint: None,
        output: None,
        prepared: Some(Box::new(prepared)),
    }
}

fn prepare(case: &mut Case, longest_tokens: u32) {
    case.pass();
    case.see("prepare", 1, JobState::Complete, &[ended(0, Some(word_of_prepare(longest_tokens)))]);
    case.pass();
}

fn env_of(case: &Case, index: usize) -> String {
    let pod = case.last.make[index].job.spec.clone().unwrap().template.spec.unwrap();
    let env = pod.containers[0].env.clone().unwrap();
    env.into_iter().find(|e| e.name == rlhf_api::config::env::STRATEGY).unwrap().value.unwrap()
}

#[test]
fn every_stage_is_planned_once_prepare_is_done_and_its_ranks_are_told() {
    let mut case = on(gpus("80Gi"), all_auto());
    prepare(&mut case, 512);
    for stage in ["tune", "judge", "act"] {
        let plan = case.slot(stage).plan.unwrap();
        assert_eq!((plan.source, plan.strategy.offload), (PlanSource::Auto, Offload::None), "{stage}");
        assert_eq!((plan.device_memory_bytes, plan.host_memory_bytes), (Some(80 << 30), Some(64 << 30)));
        assert!(plan.device_bytes > 1 << 30 && plan.device_bytes < 80 << 30, "{plan:?}");
    }
    assert_eq!(case.made(), ["tune-1", "judge-1"]);
    let told: rlhf_api::stage::Strategy = serde_json::from_str(&env_of(&case, 0)).unwrap();
    assert_eq!(told, case.slot("tune").plan.unwrap().strategy);
    case.assert_quiet();
}

#[test]
fn less_memory_takes_a_more_frugal_setting_and_what_is_written_stays() {
    let plan = |memory: &str, strategy: Value| {
        let mut case = on(gpus(memory), strategy);
        prepare(&mut case, 512);
        (case.slot("act").plan.map(|p| p.strategy), case.status().phase)
    };
    let (large, _) = plan("80Gi", all_auto());
    let (small, _) = plan("3Gi", all_auto());
    let (kept, _) = plan("3Gi", json!({"offload": AUTO, "recompute": AUTO, "sharding": "ddp", "precision": "bf16"}));
    assert_eq!(large.unwrap().offload, Offload::None);
    assert!(small.unwrap().offload > Offload::None || small.unwrap().sharding == Sharding::Zero3, "{small:?}");
    assert_eq!((kept.unwrap().sharding, kept.unwrap().offload > Offload::None), (Sharding::Ddp, true));
}

#[test]
fn the_datas_longest_sequence_counts_and_not_what_would_be_allowed() {
    let bytes = |longest| {
        let mut case = on(gpus("80Gi"), json!({}));
        prepare(&mut case, longest);
        case.slot("tune").plan.unwrap().device_bytes
    };
    assert!(bytes(64) < bytes(1024) && bytes(1024) == bytes(4096), "maxLength is 1024");
}

#[test]
fn a_job_of_which_a_later_stage_fits_nowhere_is_refused_before_an_earlier_one_starts() {
    let mut case = on(gpus("80Gi"), all_auto());
    case.job.spec.stages[2].compute = serde_json::from_value(gpus("100Mi")).unwrap();
    prepare(&mut case, 512);
    assert_eq!((case.status().phase, case.condition("Failed")), (Phase::Failed, Some(("True", "DoesNotFit"))));
    let message = case.status().message.clone().unwrap();
    assert!(message.starts_with("stage act: none of ") && message.contains("too much"), "{message}");
    assert_eq!((case.slot("tune").attempt, case.made().len()), (0, 0));
}

fn without_memory() -> Case {
    on(json!({"nodes": 2, "devicesPerNode": 1, "resources": {"limits": {"memory": "64Gi"}}}), all_auto())
}

fn tell_memory(case: &mut Case, known: DeviceMemory) {
    case.observed.device_memory = ["tune", "judge", "act"].map(|s| (s.to_owned(), known)).into();
}

#[test]
fn memory_that_nobody_tells_is_asked_for_and_a_nodes_label_tells_it() {
    let (waits, fails) = (("Waiting", "DeviceMemoryUnknown"), ("Failed", "DoesNotFit"));
    for (known, (condition, reason)) in [(DeviceMemory::Untold, waits), (DeviceMemory::Unreadable, fails)] {
        let mut case = without_memory();
        tell_memory(&mut case, known);
        prepare(&mut case, 512);
        assert_eq!(case.condition(condition), Some(("True", reason)), "{known:?}");
        assert!(case.made().is_empty());
        let message = case.status().message.clone().unwrap();
        let wanted = ["write compute.deviceMemory", "nvidia.com/gpu.memory"];
        assert!(wanted.iter().all(|words| message.contains(words)), "{message}");
    }
    let mut case = without_memory();
    tell_memory(&mut case, DeviceMemory::Bytes(40 << 30));
    prepare(&mut case, 512);
    assert_eq!(case.slot("act").plan.unwrap().device_memory_bytes, Some(40 << 30));
}

#[test]
fn a_pool_without_nodes_yet_is_waited_for() {
    let mut case = without_memory();
    tell_memory(&mut case, DeviceMemory::NoNode);
    prepare(&mut case, 512);
    assert_eq!(
        (case.status().phase, case.condition("Waiting")),
        (Phase::Waiting, Some(("True", "DeviceMemoryUnknown")))
    );
    assert!(case.status().message.as_deref().unwrap().contains("there is no node yet on which its pods can run"));
    assert_eq!((case.made().len(), case.last.requeue), (0, Some(SignedDuration::from_secs(60))));
    case.now = at(1_000_000);
    case.assert_quiet();
    tell_memory(&mut case, DeviceMemory::Bytes(80 << 30));
    case.pass();
    assert_eq!(case.made(), ["tune-1", "judge-1"]);
}

#[test]
fn a_wait_for_nodes_is_no_active_time_and_ends_by_the_pending_timeout() {
    for (known, reason) in [
        (DeviceMemory::NoNode, "DeviceMemoryUnknown"),
        (DeviceMemory::Untold, "DeviceMemoryUnknown"),
        (DeviceMemory::Bytes(100 << 20), "DeviceMemoryTooSmall"),
    ] {
        let mut case = without_memory();
        case.job.spec.active_deadline_seconds = Some(100);
        tell_memory(&mut case, known);
        prepare(&mut case, 512);
        assert_eq!((case.status().active_since, case.slot("tune").pending_since), (None, Some(at(0))), "{known:?}");
        case.now = at(1_000_000);
        case.assert_quiet();
        assert_eq!(case.condition("Waiting"), Some(("True", reason)), "no deadline runs meanwhile");
        let mut patient = case.again();
        tell_memory(&mut patient, DeviceMemory::Bytes(80 << 30));
        patient.pass();
        assert_eq!((patient.made(), patient.slot("tune").pending_since), (names(["tune-1", "judge-1"]), None));
        assert_eq!(patient.status().active_since, Some(at(1_000_000)));
        let mut suspended = case.again();
        suspended.job.spec.suspend = true;
        suspended.job.spec.failure_policy.pending_timeout_seconds = Some(1);
        suspended.pass();
        assert_eq!((suspended.status().phase, suspended.slot("tune").pending_since), (Phase::Suspended, None));
        // Who does not want to wait for ever says so.
        case.job.spec.failure_policy.pending_timeout_seconds = Some(1_000_001);
        case.assert_quiet();
        assert_eq!(case.last.requeue, Some(SignedDuration::from_secs(1)));
        case.now = at(1_000_001);
        case.pass();
        assert_eq!(case.condition("Failed"), Some(("True", "PendingTimeoutExceeded")), "{known:?}");
        let message = case.status().message.clone().unwrap();
        let wanted = format!("(1000001 s): {reason}: stage tune: ");
        assert!(message.starts_with("given up: tune: ") && message.contains(&wanted), "{message}");
        assert_eq!((case.slot("tune").phase, case.made().len()), (StagePhase::Stopped, 0));
    }
}

#[test]
fn nodes_that_tell_of_too_little_are_waited_out_and_what_the_spec_says_is_final() {
    let mut case = without_memory();
    tell_memory(&mut case, DeviceMemory::Bytes(100 << 20));
    prepare(&mut case, 512);
    assert_eq!(
        (case.status().phase, case.condition("Waiting")),
        (Phase::Waiting, Some(("True", "DeviceMemoryTooSmall")))
    );
    let message = case.status().message.clone().unwrap();
    for words in ["stage tune: none of ", "the smallest of the nodes", "compute.podTemplate.nodeSelector"] {
        assert!(message.contains(words), "{message}");
    }
    assert_eq!((case.made().len(), case.last.requeue), (0, Some(SignedDuration::from_secs(60))));
    case.assert_quiet();
    tell_memory(&mut case, DeviceMemory::Bytes(80 << 30));
    case.pass();
    assert_eq!(case.made(), ["tune-1", "judge-1"]);
    // More memory of devices does not help where pods may use too little of their nodes'.
    let mut host = on(json!({"nodes": 2, "devicesPerNode": 1, "resources": {"limits": {"memory": "1Mi"}}}), all_auto());
    tell_memory(&mut host, DeviceMemory::Bytes(80 << 30));
    prepare(&mut host, 512);
    assert_eq!(host.condition("Failed"), Some(("True", "DoesNotFit")));
    let mut written = on(gpus("100Mi"), all_auto());
    prepare(&mut written, 512);
    assert_eq!(written.condition("Failed"), Some(("True", "DoesNotFit")));
}

#[test]
fn what_was_changed_during_a_suspension_is_planned_anew_and_what_was_not_keeps_its_plan() {
    let mut case = on(gpus("80Gi"), all_auto());
    prepare(&mut case, 512);
    case.see("tune", 1, JobState::Failed, &[ended(71, None), ended(75, None)]);
    case.pass();
    let frugal = case.slot("tune").plan;
    assert_eq!(frugal.unwrap().source, PlanSource::MoreFrugal);
    let turn = |case: &mut Case, suspend: bool| {
        case.job.spec.suspend = suspend;
        case.job.metadata.generation = case.job.metadata.generation.map(|g| g + 1);
        case.now += SignedDuration::from_secs(100);
        case.observed.stages.clear();
        case.pass();
    };
    turn(&mut case, true);
    turn(&mut case, false);
    assert_eq!(case.slot("tune").plan, frugal, "a suspension alone does not forget that memory ran out");
    turn(&mut case, true);
    case.job.spec.strategy = serde_json::from_value(json!({"sharding": "zero3", "precision": "fp32"})).unwrap();
    turn(&mut case, false);
    let plan = case.slot("tune").plan.unwrap();
    assert_eq!((plan.source, plan.strategy.sharding), (PlanSource::Spec, Sharding::Zero3));
    let told: rlhf_api::stage::Strategy = serde_json::from_str(&env_of(&case, 0)).unwrap();
    assert_eq!(told, plan.strategy);
    turn(&mut case, true);
    case.job.spec.compute.nodes = 8;
    turn(&mut case, false);
    assert!(case.slot("tune").plan.unwrap().device_bytes < plan.device_bytes, "it is spread over more devices");
}

#[test]
fn no_stage_keeps_an_outdated_plan_because_an_earlier_one_cannot_be_planned_yet() {
    let mut case = without_memory();
    tell_memory(&mut case, DeviceMemory::Bytes(80 << 30));
    prepare(&mut case, 512);
    let mut changed = all_auto();
    changed["precision"] = json!("fp32");
    case.job.spec.strategy = serde_json::from_value(changed).unwrap();
    case.job.metadata.generation = case.job.metadata.generation.map(|g| g + 1);
    tell_memory(&mut case, DeviceMemory::NoNode);
    case.pass();
    assert_eq!(case.condition("Waiting"), Some(("True", "DeviceMemoryUnknown")));
    tell_memory(&mut case, DeviceMemory::Bytes(80 << 30));
    case.pass();
    for stage in ["tune", "judge", "act"] {
        let precision = case.slot(stage).plan.unwrap().strategy.precision;
        assert_eq!(precision, rlhf_api::stage::Precision::Fp32, "{stage}");
    }
}

#[test]
fn a_written_strategy_is_never_refused_but_said_to_be_too_large() {
    let mut case = on(gpus("1Gi"), json!({}));
    prepare(&mut case, 512);
    assert_eq!((case.status().phase, case.made().len()), (Phase::Waiting, 2));
    assert_eq!(case.events().iter().filter(|e| **e == "MayNotFit").count(), 3, "{:?}", case.events());
    assert_eq!(case.slot("tune").plan.unwrap().source, PlanSource::Spec);
    case.assert_quiet();
}

/// What a plan takes in all.
fn need(slot: &StageStatus) -> u64 {
    slot.plan.map(|p| p.device_bytes).unwrap()
}

#[test]
fn an_attempt_out_of_device_memory_is_followed_by_one_that_takes_less_until_nothing_takes_less_and_no_count_bounds_that()
 {
    let mut case = on(gpus("80Gi"), all_auto());
    case.job.spec.failure_policy.max_restarts = 0;
    prepare(&mut case, 512);
    for attempt in 1..40 {
        let before = case.slot("tune").clone();
        case.see("tune", attempt, JobState::Failed, &[ended(71, None), ended(75, None)]);
        case.pass();
        if case.status().phase == Phase::Failed {
            let message = case.status().message.clone().unwrap();
            assert!(message.contains("takes less memory than ddp, offload parameters, recompute block"), "{message}");
            assert_eq!(case.condition("Failed"), Some(("True", "DeviceOutOfMemory")));
            assert!(attempt > 3);
            return;
        }
        let after = case.slot("tune").clone();
        assert!(need(&after) < need(&before), "{after:?}");
        assert_eq!((after.plan.unwrap().source, after.restarts.total), (PlanSource::MoreFrugal, attempt));
        let said = &case.last.notices.iter().find(|n| n.event == Event::AttemptFailed).unwrap().note;
        assert!(said.contains("; the next attempt takes "), "{said}");
        case.now += SignedDuration::from_secs(400);
        case.observed.stages.remove("tune");
        case.pass();
        assert_eq!(case.slot("tune").attempt, attempt + 1);
    }
    panic!("no end");
}

#[test]
fn only_lack_of_memory_changes_a_plan_and_on_cpu_a_kill_for_memory_is_lack_of_it() {
    let on_cpu = json!({"nodes": 2, "resources": {"limits": {"memory": "64Gi"}}});
    for (compute, code, killed, changes) in [
        (gpus("80Gi"), 74, false, false),
        (gpus("80Gi"), 137, true, false),
        (on_cpu.clone(), 137, true, true),
        (on_cpu, 71, false, true),
    ] {
        let mut case = on(compute.clone(), all_auto());
        prepare(&mut case, 512);
        let before = case.slot("tune").plan;
        let end = |oom_killed| {
            PodState::Ended(Box::new(End { code: Some(code), oom_killed, at: Some(at(5)), ..End::default() }))
        };
        case.see("tune", 1, JobState::Failed, &[end(killed), ended(75, None)]);
        case.pass();
        assert_eq!(case.slot("tune").plan != before, changes, "{compute} {code}");
        assert_eq!(case.slot("tune").phase, StagePhase::Pending);
    }
}

#[test]
fn a_written_strategy_is_tried_again_as_it_is() {
    let mut case = on(gpus("80Gi"), json!({"recompute": "block"}));
    prepare(&mut case, 512);
    case.see("tune", 1, JobState::Failed, &[ended(71, None), ended(75, None)]);
    case.pass();
    let slot = case.slot("tune");
    assert_eq!((slot.phase, slot.restarts.total), (StagePhase::Pending, 1));
    assert_eq!(slot.plan.unwrap().strategy.recompute, Recompute::Block);
}

#[test]
fn prepare_runs_again_where_its_last_word_is_needed_and_lost() {
    let mut case = on(gpus("80Gi"), all_auto());
    case.pass();
    case.see("prepare", 1, JobState::Complete, &[]);
    case.pass();
    assert_eq!((case.slot("prepare").phase, case.slot("prepare").disruptions), (StagePhase::Pending, 1));
    case.now = at(10);
    case.observed.stages.clear();
    case.pass();
    assert_eq!(case.made(), ["prepare-2"]);
    let mut case = on(gpus("80Gi"), json!({}));
    case.pass();
    case.see("prepare", 1, JobState::Complete, &[]);
    case.pass();
    assert_eq!((case.slot("prepare").phase, case.slot("tune").plan), (StagePhase::Succeeded, None));
    assert_eq!(case.made(), ["tune-1", "judge-1"]);
}

/// A pod that ended well, by what its kubelet tells of the last word.
fn ended_well(word: &str) -> PodState {
    let said = json!({"metadata": {"name": "p", "uid": "p", "labels": {api_names::LABEL_STAGE: "prepare", api_names::LABEL_ATTEMPT: "1"},
        "annotations": {view::INDEX_KEY: "0"}}, "status": {"phase": "Succeeded", "containerStatuses": [{
        "name": view::CONTAINER, "ready": false, "restartCount": 0, "image": "i", "imageID": "",
        "state": {"terminated": {"exitCode": 0, "reason": "Completed", "message": word}}}]}});
    PodView::parse(&serde_json::from_value(said).unwrap()).unwrap().state
}

#[test]
fn a_word_of_prepare_that_cannot_be_used_is_an_unexpected_exit_and_told() {
    let mut doubted = serde_json::to_value(word_of_prepare(64)).unwrap();
    doubted["prepared"]["models"][0]["layers"] = json!(0);
    let mut untold = word_of_prepare(64);
    untold.prepared = None;
    for (word, why) in [
        ("Segmentation fault in a plugin".to_owned(), "is not believed: it is no document of the contract"),
        (doubted.to_string(), "is not believed: layers is 0, and must be from 1"),
        (untold.to_bounded_json(), "tells nothing of models and data"),
        (String::new(), "is empty"),
    ] {
        let mut case = on(gpus("80Gi"), all_auto());
        case.job.spec.failure_policy.max_restarts = 1;
        case.pass();
        case.see("prepare", 1, JobState::Complete, &[ended_well(&word)]);
        case.pass();
        let slot = case.slot("prepare");
        assert_eq!((slot.phase, slot.restarts.total, slot.disruptions), (StagePhase::Pending, 1, 0), "{word}");
        let failure = slot.last_failure.clone().unwrap();
        assert_eq!((failure.reason.as_str(), failure.code), ("UnexpectedExit", Some(0)));
        assert!(failure.message.contains(why), "{}", failure.message);
        case.now = at(20);
        case.pass();
        case.see("prepare", 2, JobState::Complete, &[ended_well(&word)]);
        case.pass();
        assert_eq!(case.condition("Failed"), Some(("True", "RestartsExhausted")));
        assert!(case.status().message.as_deref().unwrap().contains(why));
    }
}
