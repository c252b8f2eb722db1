//! The figures that the plan is known by, and what must hold for every one.

use crate::placed::{Pieces, Setting};
use crate::*;
use proptest::prelude::*;
use rlhf_api::model::{HeadKind, Mlp, ModelSpec, Norm, Positions};
use rlhf_api::stage::{Linear, Lora, Offload, Precision, Recompute, Sharding, Strategy};

const GIB: u64 = 1 << 30;

fn ppo(model: ModelSpec, rows: u32) -> Task {
    let stage = Stage::ppo(Scorer::new(model.clone(), None), rows, 112);
    Task { stage, model, lora: None, rows, time: 512, dataset: 0.0 }
}

fn gpus(nodes: u32, devices: u32) -> Machines {
    Machines { nodes, devices, device_memory: Some(80 * GIB), host_memory: 1024 * GIB }
}

fn bf16() -> Fixed {
    Fixed { precision: Precision::Bf16, ..Fixed::default() }
}

#[test]
fn full_ppo_of_24_billion_parameters_fits_one_device_of_80_gib() {
    for rows in [1, 8, 64] {
        let chosen = choose(&ppo(preset("24b").unwrap(), rows), &gpus(1, 1), bf16()).unwrap();
        assert_eq!(chosen.plan.strategy.offload, Offload::Parameters);
        assert!(chosen.plan.device.total() < (80 * GIB) as f64 && chosen.plan.host.total() < (1024 * GIB) as f64);
    }
}

#[test]
fn full_ppo_of_175_billion_parameters_fits_64_devices_of_80_gib() {
    for rows in [1, 8] {
        let chosen = choose(&ppo(preset("175b").unwrap(), rows), &gpus(8, 8), bf16()).unwrap();
        let Strategy { sharding, offload, .. } = chosen.plan.strategy;
        assert_eq!((sharding, offload), (Sharding::Zero3, Offload::Optimizer));
    }
}

/// What the ColossalAI benchmark's sizes come to (fp32: 16 + 16 + 4 + 4 bytes a parameter; 16 bits: 18 + 18 + 2 + 2), all of it
/// on the device, or all on the host.
#[test]
fn a_rank_alone_needs_forty_bytes_a_parameter_for_ppo() {
    let model = preset("l").unwrap();
    let parameters = (model.parameter_count(HeadKind::Lm) + model.parameter_count(HeadKind::Scalar)) as f64 / 2.0;
    let task = ppo(model, 1);
    for precision in [Precision::Fp32, Precision::Bf16, Precision::Fp16] {
        let plan = |offload| estimate(&task, &gpus(1, 1), Strategy { precision, offload, ..Strategy::default() });
        let (on_device, on_host) = (plan(Offload::None), plan(Offload::Parameters));
        let DeviceBytes { parameters: copies, optimizer, gradients, .. } = on_device.device;
        let host = on_host.host.total() - on_host.host.loading;
        assert!((host / parameters - 40.0).abs() < 0.01, "{precision:?}: {}", host / parameters);
        let device = (copies + optimizer + gradients) / parameters;
        assert!((40.0..40.2).contains(&device), "{precision:?}: {device}");
        assert_eq!(on_host.device.parameters + on_host.device.optimizer, 0.0);
    }
}

/// No kernel for CUDA takes a mask and keys and values that heads share: a rollout's prompts are run with keys and values for each
/// head, beside those of a model without groups, and never with their matrix of weights.
#[test]
fn a_rollout_of_unequal_prompts_is_planned_as_a_gpu_runs_it() {
    let model = ModelSpec { kv_heads: 4, ..preset("8b").unwrap() };
    let lora = Lora { rank: 8, alpha: None, dropout: 0.0, targets: vec![Linear::Query] };
    let stage = Stage::ppo(Scorer::new(model.clone(), None), 64, 512);
    let strategy = Strategy { precision: Precision::Bf16, ..Strategy::default() };
    let task = |model: ModelSpec| Task { stage: stage.clone(), lora: Some(lora.clone()), time: 2048, ..ppo(model, 1) };
    let grouped = estimate(&task(model.clone()), &gpus(1, 1), strategy);
    assert_eq!(grouped.phase, "rollout");
    let (tokens, query) = (64.0 * 1536.0, (model.heads * model.head_dim) as f64);
    let spread = 2.0 * 2.0 * tokens * query;
    let single = estimate(&task(ModelSpec { kv_heads: model.heads, ..model }), &gpus(1, 1), strategy);
    let more = grouped.device.activations - single.device.activations;
    assert!((0.0..=spread).contains(&more), "{:?} beside {:?}", grouped.device, single.device);
}

#[test]
fn the_order_of_a_dataset_is_held_by_every_rank() {
    let task = Task { dataset: dataset_bytes(1 << 30), ..ppo(preset("s").unwrap(), 1) };
    let host = |task: &Task| estimate(task, &gpus(2, 8), Strategy::default()).host.total();
    let bytes = host(&task) - host(&Task { dataset: 0.0, ..task.clone() });
    assert!((bytes / GIB as f64 - 8.0 * 16.0).abs() < 1e-6, "{bytes}");
}

/// With adapters, four models need one backbone where the reward model was so trained too, and else two; the optimizer has the
/// adapters and the critic's head.
#[test]
fn adapters_need_one_backbone_or_two() {
    let model = preset("l").unwrap();
    let lora = Lora { rank: 8, alpha: None, dropout: 0.0, targets: Linear::ALL.to_vec() };
    let parameters = model.parameter_count(HeadKind::Lm) as f64;
    let adapters: i64 = model.adapter_params(&lora).iter().map(|p| p.shape.iter().product::<i64>()).sum();
    let adapters = adapters as f64 * model.layers as f64;
    for (reward_lora, backbones) in [(Some(lora.clone()), 1.0), (None, 2.0)] {
        let stage = Stage::ppo(Scorer::new(model.clone(), reward_lora), 1, 112);
        let task = Task { stage, lora: Some(lora.clone()), ..ppo(model.clone(), 1) };
        let strategy = Strategy { precision: Precision::Bf16, ..Strategy::default() };
        let DeviceBytes { parameters: copies, optimizer, .. } = estimate(&task, &gpus(1, 1), strategy).device;
        let sets = if backbones == 1.0 { 3.0 } else { 2.0 };
        let expected = 2.0 * (backbones * parameters + sets * adapters);
        assert!((copies / expected - 1.0).abs() < 0.001, "{backbones} backbones: {copies} bytes, not {expected}");
        assert!((optimizer / (12.0 * 2.0 * adapters) - 1.0).abs() < 0.01, "{optimizer} bytes of optimizer state");
    }
}

/// Parameters of a model with a language head, and of one with a scalar head.
fn sizes(model: &ModelSpec) -> [f64; 2] {
    [HeadKind::Lm, HeadKind::Scalar].map(|head| model.parameter_count(head) as f64)
}

#[test]
fn every_reward_model_of_whatever_shape_takes_its_room() {
    let (actor, judge) = (preset("l").unwrap(), preset("m").unwrap());
    let (liked, safe) = (Scorer::new(actor.clone(), None), Scorer { source: 1, ..Scorer::new(judge.clone(), None) });
    let copies = |reference: Option<&ModelSpec>, critic: Option<&Scorer>, rewards: &[&Scorer], lora: Option<&Lora>| {
        let rewards = rewards.iter().map(|r| (*r).clone()).collect();
        let (reference, critic) = (reference.cloned(), critic.cloned());
        let stage = Stage::Ppo { reference, critic, rewards, rollout_rows: 1, new_tokens: 112 };
        let task = Task { stage, lora: lora.cloned(), ..ppo(actor.clone(), 1) };
        let strategy = Strategy { precision: Precision::Bf16, ..Strategy::default() };
        estimate(&task, &gpus(1, 1), strategy).device.parameters / 2.0
    };
    let close = |elements: f64, expected: f64| {
        assert!((elements / expected - 1.0).abs() < 0.02, "{elements} elements, not {expected}");
    };
    let ([actor_lm, actor_scalar], [judge_lm, judge_scalar]) = (sizes(&actor), sizes(&judge));
    close(copies(None, Some(&liked), &[&liked, &safe], None), 2.0 * (actor_lm + actor_scalar) + judge_scalar);
    close(copies(Some(&judge), Some(&safe), &[&liked], None), actor_lm + judge_lm + judge_scalar + actor_scalar);
    close(copies(None, None, &[&liked, &safe], None), 2.0 * actor_lm + actor_scalar + judge_scalar);
    // With adapters: one backbone for the actor and what came of it, and one for each other reward model.
    let lora = Lora { rank: 1, alpha: None, dropout: 0.0, targets: vec![Linear::Query] };
    let adapted = Scorer { lora: Some(lora.clone()), ..liked.clone() };
    close(copies(None, Some(&adapted), &[&adapted, &safe], Some(&lora)), actor_lm + judge_scalar);
    close(copies(None, None, &[&adapted, &safe], Some(&lora)), actor_lm + judge_scalar);
    close(copies(None, Some(&safe), &[&safe, &safe, &adapted], Some(&lora)), actor_lm + judge_scalar);
    close(copies(Some(&judge), Some(&safe), &[&liked], Some(&lora)), actor_lm + judge_scalar + actor_scalar + judge_lm);
}

#[test]
fn what_does_not_fit_says_by_how_much_and_what_to_change() {
    let machines =
        |device: u64, host: u64| Machines { device_memory: Some(device * GIB), host_memory: host * GIB, ..gpus(1, 1) };
    let refusal = |task: &Task, machines| choose(task, &machines, bf16()).unwrap_err().to_string();
    let task = ppo(preset("8b").unwrap(), 8);
    let text = refusal(&task, machines(80, 64));
    assert!(
        text.contains("of 6 strategies") && text.contains("too much") && text.contains("hosts more memory"),
        "{text}"
    );
    let text = refusal(&task, machines(2, 1024));
    assert!(text.contains("GiB of 2.00 GiB on each device") && text.contains("devices with more memory"), "{text}");
    let text = refusal(&Task { rows: 512, stage: Stage::Sft, ..task.clone() }, machines(8, 1024));
    assert!(text.contains("lower the micro-batch"), "{text}");
    let long = Stage::ppo(Scorer::new(task.model.clone(), None), 64, 112);
    let text = refusal(&Task { rows: 1, stage: long, ..task }, machines(8, 1024));
    assert!(text.contains("fewer prompts in a rollout"), "{text}");
}

#[test]
fn a_cpu_is_its_own_device() {
    let task = ppo(preset("s").unwrap(), 1);
    let machines = |host_memory| Machines { nodes: 1, devices: 2, device_memory: None, host_memory };
    let strategy = Strategy::default();
    let plan = estimate(&task, &machines(GIB), strategy);
    let verdict = Verdict::new(plan, &machines(GIB));
    assert!(verdict.device_lacks == 0.0 && !verdict.fits());
    let need = plan.host.total() + 2.0 * (plan.device.total() + PROCESS_BYTES);
    let enough = machines((need / (1.0 - HOST_MARGIN)) as u64 + 1);
    assert!(Verdict::new(plan, &enough).fits());
}

#[test]
fn the_order_is_from_fast_to_frugal() {
    assert_eq!(strategies(bf16(), 1).len(), 6);
    let all = strategies(bf16(), 2);
    assert_eq!(all.len(), 24);
    assert!(all.is_sorted_by_key(|s| s.offload));
    let fixed = Fixed { sharding: Some(Sharding::Zero2), recompute: Some(Recompute::Block), ..bf16() };
    assert_eq!(strategies(fixed, 1).len(), 3);
    assert!(strategies(fixed, 1).iter().all(|s| s.sharding == Sharding::Zero2 && s.recompute == Recompute::Block));
}

prop_compose! {
    fn model()(
        (layers, heads, per_group, head_dim) in (4usize..40, 1i64..9, 1i64..4, 4i64..40),
        (vocab, ffn, llama, tied_head) in (100i64..40_000, 1i64..5, any::<bool>(), any::<bool>()),
    ) -> ModelSpec {
        let (kv_heads, heads, head_dim) = (heads, heads * per_group, 2 * head_dim);
        let hidden = heads * head_dim;
        ModelSpec {
            vocab, hidden, layers, heads, kv_heads, head_dim, ffn: ffn * hidden, max_positions: 4096,
            norm: if llama { Norm::Rms } else { Norm::Layer },
            norm_eps: 1e-5,
            positions: if llama { Positions::Rotary { theta: 1e4 } } else { Positions::Learned },
            mlp: if llama { Mlp::SwiGlu } else { Mlp::Gelu },
            qkv_bias: !llama, attention_output_bias: !llama, mlp_bias: !llama,
            tied_head,
            qk_norm: llama && tied_head,
            ..ModelSpec::default()
        }
    }
}

fn adapters() -> impl proptest::strategy::Strategy<Value = Option<Lora>> {
    use proptest::strategy::Strategy as _;
    let targets = prop::sample::subsequence(Linear::ALL.to_vec(), 1..=7);
    let lora = (1u32..65, prop_oneof![Just(0.0), Just(0.1)], targets);
    prop::option::of(lora.prop_map(|(rank, dropout, targets)| Lora { rank, alpha: None, dropout, targets }))
}

prop_compose! {
    fn task()(
        model in model(), rows in 1u32..17, time in 16u32..1024, stage in 0u8..3, rollout_rows in 1u32..100,
        lora in adapters(), reward_lora in adapters(), several in any::<bool>(), critic in any::<bool>(),
    ) -> Task {
        let stage = match stage {
            0 => Stage::Sft,
            1 => Stage::RewardModel,
            _ => {
                let scorer = Scorer::new(model.clone(), reward_lora);
                let other = Scorer { source: 1, lora: None, ..scorer.clone() };
                let rewards = if several { vec![scorer, other.clone()] } else { vec![scorer] };
                let reference = several.then(|| model.clone());
                Stage::Ppo { reference, critic: critic.then_some(other), rewards, rollout_rows, new_tokens: time / 3 }
            }
        };
        Task { stage, model, lora, rows, time, dataset: 0.0 }
    }
}

prop_compose! {
    fn machines()(nodes in 1u32..9, devices in 1u32..9, gpu in any::<bool>()) -> Machines {
        Machines { nodes, devices, device_memory: gpu.then_some(80 * GIB), host_memory: 1024 * GIB }
    }
}

prop_compose! {
    fn strategy()(
        sharding in prop::sample::select(vec![Sharding::Ddp, Sharding::Zero1, Sharding::Zero2, Sharding::Zero3]),
        offload in prop::sample::select(vec![Offload::None, Offload::Optimizer, Offload::Parameters]),
        recompute in prop::sample::select(vec![Recompute::None, Recompute::Block]),
        precision in prop::sample::select(vec![Precision::Fp32, Precision::Bf16, Precision::Fp16]),
    ) -> Strategy {
        Strategy { sharding, offload, recompute, precision }
    }
}

prop_compose! {
    /// Whatever numbers somebody may write into a report.
    fn any_model()(
        model in model(), layers in any::<usize>(), sizes in any::<[i64; 6]>(), positive in any::<bool>(),
    ) -> ModelSpec {
        let [vocab, hidden, heads, kv_heads, head_dim, ffn] =
            sizes.map(|n| if positive { n.checked_abs().unwrap_or(i64::MAX).max(1) } else { n });
        ModelSpec { vocab, hidden, layers, heads, kv_heads, head_dim, ffn, max_positions: vocab, ..model }
    }
}

prop_compose! {
    fn any_task()(
        task in task(), model in any_model(), other in any_model(), rank in any::<u32>(), rows in any::<u32>(), time in any::<u32>(),
        rollout in any::<[u32; 2]>(),
    ) -> Task {
        let [rollout_rows, new_tokens] = rollout;
        let ranked = |lora: Option<Lora>| lora.map(|lora| Lora { rank, ..lora });
        let stage = match task.stage {
            Stage::Ppo { reference, critic, rewards, .. } => {
                let scorer = |s: Scorer| Scorer { model: other.clone(), lora: ranked(s.lora), ..s };
                let rewards = rewards.into_iter().map(scorer).collect();
                let reference = reference.map(|_| other.clone());
                Stage::Ppo { reference, critic: critic.map(scorer), rewards, rollout_rows, new_tokens }
            }
            stage => stage,
        };
        Task { stage, model, lora: ranked(task.lora), rows, time, dataset: 0.0 }
    }
}

prop_compose! {
    fn any_machines()(
        nodes in any::<u32>(), devices in any::<u32>(), device_memory in any::<Option<u64>>(), host_memory in any::<u64>(),
    ) -> Machines {
        Machines { nodes, devices, device_memory, host_memory }
    }
}

#[test]
fn a_shape_that_no_machine_could_hold_is_answered_at_once() {
    let model = ModelSpec { layers: 1_000_000_000_000, vocab: 1_000_000_000_000_000, ..preset("24b").unwrap() };
    let started = std::time::Instant::now();
    let text = choose(&ppo(model.clone(), 8), &gpus(8, 8), bf16()).unwrap_err().to_string();
    assert!(text.contains("none of 24 strategies fits"), "{text}");
    assert_eq!(model.parameter_count(HeadKind::Lm), i64::MAX);
    // Twenty-four strategies of four models; a loop over the layers of one alone would take an hour.
    assert!(started.elapsed() < std::time::Duration::from_secs(10));
}

/// What lies on a device and a host all the time.
fn at_rest(plan: &Plan) -> (f64, f64) {
    let HostBytes { parameters, optimizer, gradients, .. } = plan.host;
    (plan.device.parameters + plan.device.optimizer, parameters + optimizer + gradients)
}

proptest! {
    #[test]
    fn every_retry_needs_less_of_the_device_and_keeps_what_is_fixed(
        task in task(), machines in machines(), strategy in strategy(), keep in any::<bool>(),
    ) {
        let fixed = Fixed { precision: strategy.precision, sharding: keep.then_some(strategy.sharding), ..Fixed::default() };
        let mut before = estimate(&task, &machines, strategy);
        let mut steps = 0;
        while let Some(next) = next_more_frugal(&task, &machines, before.strategy, fixed) {
            let need = |plan: &Plan| match machines.device_memory {
                Some(_) => plan.device.total(),
                None => f64::from(machines.devices) * plan.device.total() + plan.host.total(),
            };
            prop_assert!(need(&next.plan) < need(&before), "{:?} after {:?}", next.plan, before);
            prop_assert_eq!(next.plan.strategy.precision, strategy.precision);
            prop_assert!(!keep || next.plan.strategy.sharding == strategy.sharding);
            before = next.plan;
            steps += 1;
            prop_assert!(steps < 24);
        }
    }

    #[test]
    fn any_shape_is_answered_and_never_with_less_than_its_weights(
        task in any_task(), machines in any_machines(), strategy in strategy(),
    ) {
        let _ = choose(&task, &machines, bf16()).map_err(|e| e.to_string());
        next_more_frugal(&task, &machines, strategy, bf16());
        let plan = estimate(&task, &machines, strategy);
        let Verdict { device_lacks, host_lacks, .. } = Verdict::new(plan, &machines);
        prop_assert!(plan.device.total().is_finite() && plan.host.total().is_finite());
        prop_assert!(device_lacks >= 0.0 && host_lacks >= 0.0);
        let mut models = vec![&task.model];
        if let Stage::Ppo { reference, critic, rewards, .. } = &task.stage {
            models.extend(reference.iter().chain(rewards.iter().chain(critic).map(|scorer| &scorer.model)));
        }
        let sizes = |m: &ModelSpec| [m.vocab, m.hidden, m.heads, m.kv_heads, m.head_dim, m.ffn];
        let ModelSpec { hidden, ffn, layers, vocab, .. } = task.model.clone();
        if models.into_iter().all(|m| sizes(m).iter().all(|n| *n > 0)) {
            let weights = hidden as f64 * (vocab as f64 + ffn as f64 * layers as f64);
            let ranks = f64::from(machines.world_size().max(1));
            let held = plan.device.parameters * ranks + plan.host.parameters * f64::from(machines.nodes);
            prop_assert!(machines.devices == 0 || machines.nodes == 0 || held >= 0.99 * 2.0 * weights, "{} for {} weights", held, weights);
        }
    }

    /// Chunks are counted, never gone through: the same comes of going through them.
    #[test]
    fn so_many_chunks_are_as_many_single_ones(task in task(), strategy in strategy(), world in 1u32..9, gpu in any::<bool>()) {
        let setting = Setting { strategy, world: world.into(), gpu };
        for model in estimate::models(&task, setting) {
            for pieces in model.pieces() {
                let one = model.resident(Pieces { count: 1.0, ..pieces });
                let summed = (0..pieces.count as usize).fold((0.0, 0.0), |(d, h), _| (d + one.0.total(), h + one.1.total()));
                let (device, host) = model.resident(pieces);
                for (whole, summed) in [(device.total(), summed.0), (host.total(), summed.1)] {
                    prop_assert!((whole - summed).abs() <= 1e-9 * summed, "{} {}", whole, summed);
                }
            }
        }
    }

    #[test]
    fn sharding_and_offloading_more_never_keeps_more_on_the_device(
        task in task(), machines in machines(), strategy in strategy(),
    ) {
        let plan = |strategy| estimate(&task, &machines, strategy);
        let (device, host) = at_rest(&plan(strategy));
        for sharding in [Sharding::Ddp, Sharding::Zero1, Sharding::Zero2, Sharding::Zero3] {
            if sharding > strategy.sharding {
                let (less, less_host) = at_rest(&plan(Strategy { sharding, ..strategy }));
                prop_assert!(less <= device && less_host <= host);
            }
        }
        for offload in [Offload::None, Offload::Optimizer, Offload::Parameters] {
            if offload > strategy.offload {
                let (less, _) = at_rest(&plan(Strategy { offload, ..strategy }));
                prop_assert!(less <= device);
            }
        }
        let recompute = |recompute| plan(Strategy { recompute, ..strategy }).device.total();
        prop_assert!(recompute(Recompute::Block) <= recompute(Recompute::None));
    }

    #[test]
    fn more_of_anything_never_needs_less(task in task(), machines in machines(), strategy in strategy()) {
        let need = |task: &Task| {
            let plan = estimate(task, &machines, strategy);
            (plan.device.total(), plan.host.total())
        };
        let (device, host) = need(&task);
        let grown = |grow: &dyn Fn(&mut ModelSpec)| {
            let mut task = task.clone();
            grow(&mut task.model);
            if let Stage::Ppo { reference, critic, rewards, .. } = &mut task.stage {
                rewards.iter_mut().chain(critic).for_each(|scorer| grow(&mut scorer.model));
                reference.iter_mut().for_each(grow);
            }
            task
        };
        // A slice has so many bytes of logits: with a larger vocabulary it has fewer rows, and so holds fewer of their inputs.
        let inputs = f64::from(task.rows * task.time) * task.model.hidden as f64 * 4.0;
        for (larger, slack) in [
            (grown(&|m| m.layers += 1), 0.0),
            (grown(&|m| m.ffn += 16), 0.0),
            (grown(&|m| m.vocab += 160), inputs),
            (Task { rows: task.rows + 1, ..task.clone() }, 0.0),
        ] {
            let (d, h) = need(&larger);
            // And whole rows alone.
            let least = device * 0.999 - 16.0 * 40_000.0 * 4.0 - slack;
            prop_assert!(d >= least && h >= host, "{:?}: {} {} after {} {}", larger, d, h, device, host);
        }
    }

    #[test]
    fn more_ranks_never_need_more_of_what_is_sharded(task in task(), machines in machines(), strategy in strategy()) {
        prop_assume!(machines.world_size() > 1);
        let plan = |nodes| estimate(&task, &Machines { nodes, ..machines }, strategy);
        let (few, many) = (plan(machines.nodes), plan(2 * machines.nodes));
        // Chunks are padded to a multiple of the ranks.
        let padding = 100.0 * f64::from(machines.world_size()) * 16.0 * 16.0;
        prop_assert!(many.device.total() <= few.device.total() + padding);
        prop_assert!(many.host.total() <= few.host.total() + padding * f64::from(machines.devices));
        if strategy.sharding == Sharding::Zero3 {
            prop_assert!(at_rest(&many).0 <= 0.6 * at_rest(&few).0 + padding);
        }
    }

    #[test]
    fn what_is_chosen_fits_and_nothing_faster_does(
        task in task(), mut machines in machines(), device in 20u32..38, host in 28u32..42,
    ) {
        machines.device_memory = machines.device_memory.map(|_| 1 << device);
        machines.host_memory = 1 << host;
        let all = verdicts(&task, &machines, bf16());
        match choose(&task, &machines, bf16()) {
            Ok(chosen) => {
                prop_assert!(chosen.fits());
                let faster = all.iter().take_while(|v| v.plan.strategy != chosen.plan.strategy);
                prop_assert!(faster.into_iter().all(|v| !v.fits()));
            }
            Err(refused) => {
                prop_assert!(all.iter().all(|v| !v.fits()));
                let closest = refused.closest.unwrap();
                prop_assert!(closest.device_lacks + closest.host_lacks > 0.0);
                // With what it says to lack, it fits.
                let more = Machines {
                    device_memory: machines.device_memory.map(|m| m + (closest.device_lacks / (1.0 - DEVICE_MARGIN)) as u64 + 2),
                    host_memory: machines.host_memory + (closest.host_lacks / (1.0 - HOST_MARGIN)) as u64 + 2,
                    ..machines
                };
                prop_assert!(Verdict::new(closest.plan, &more).fits());
            }
        }
    }
}
