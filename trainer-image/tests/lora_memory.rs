//! What training by adapters costs in memory, by the counting allocator: the backbone once for all models on it, and
//! gradients and optimizer state for the adapters alone. It counts the whole process, so it is the only test here.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

use rlhf_api::stage::{Linear, Lora, Offload, Optimizer, Schedule, Strategy};
use rlhf_trainer::engine::{Backbone, ChunkLayout, Group, HEAD_SLICE_BYTES, Model, Placement, ScalarInit};
use rlhf_trainer::model::{Adapters, Batch, HeadKind, Segment, Source};
use std::path::Path;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// Bytes in tensors that outlive `make`, on the device and on the host.
fn cost<T>(make: impl FnOnce() -> T) -> (T, [i64; 2]) {
    let now = || {
        let allocated = c10d::allocated(Device::Cpu).unwrap();
        [allocated.device.current as i64, allocated.host.current as i64]
    };
    let before = now();
    let made = make();
    let after = now();
    (made, [after[0] - before[0], after[1] - before[1]])
}

fn train(model: &mut Model) {
    let batch = Batch::right_padded(&[&[5, 6, 7, 8]], Device::Cpu);
    model.backward(&batch, &[0, 1, 2], true, |out, _| Ok(out.f_square()?.f_mean(Kind::Float)?)).unwrap();
    let optimizer = Optimizer {
        learning_rate: 0.01,
        schedule: Schedule::Constant,
        warmup_ratio: 0.0,
        weight_decay: 0.0,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: None,
        max_grad_norm: 1.0,
    };
    model.step(&optimizer, 0.01).unwrap();
}

fn hidden(model: &Model) -> Tensor {
    model.hidden(&Batch::right_padded(&[&[5, 6, 7, 8], &[9, 1]], Device::Cpu)).unwrap()
}

#[test]
fn four_models_cost_one_backbone_and_their_adapters() {
    c10d::init(true);
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/models");
    let lora = Lora { rank: 2, alpha: None, dropout: 0.0, targets: Linear::ALL.to_vec() };
    for name in ["gpt2", "llama-gqa-untied"] {
        for offload in [Offload::None, Offload::Optimizer, Offload::Parameters] {
            let strategy = Strategy { offload, ..Strategy::default() };
            let placement =
                Placement { device: Device::Cpu, trainable: true, strategy, head_slice_bytes: HEAD_SLICE_BYTES };
            let source = Source::open(&models.join(name)).unwrap();
            let group = Rc::new(Group::alone());
            let bytes_of = |params| 4 * ChunkLayout::new(params).numel;
            let of_segment = |segment, head| bytes_of(source.spec.params(segment, head));
            let whole: i64 = source.spec.segments().into_iter().map(|s| of_segment(s, HeadKind::Lm)).sum();
            let adapters = source.spec.layers as i64 * bytes_of(source.spec.adapter_params(&lora));
            let scalar = of_segment(Segment::Head, HeadKind::Scalar);
            let check = |bytes: [i64; 2], expected: i64, what: &str| {
                assert_eq!(bytes.iter().sum::<i64>(), expected, "{name}, {offload:?}: {what}");
            };

            let (backbone, bytes) = cost(|| Backbone::load(&source, HeadKind::Lm, placement, &group).unwrap());
            let home = usize::from(offload == Offload::Parameters);
            check(bytes, whole, "the backbone");
            assert_eq!(bytes[1 - home], 0, "{name}, {offload:?}: the backbone lies in one place");

            // Values (twice where the master lies elsewhere), gradient and two moments.
            let master = i64::from(offload == Offload::Optimizer);
            let fresh = Adapters::fresh(&source.spec, &lora, 1).unwrap();
            let (mut actor, bytes) = cost(|| backbone.language_model(&fresh, 1).unwrap());
            check(bytes, (4 + master) * adapters, "the actor");

            let (reference, bytes) = cost(|| actor.without_adapters().unwrap());
            assert_eq!(bytes, [0, 0], "{name}, {offload:?}: the reference costs nothing");
            let base = hidden(&reference);
            assert_eq!(hidden(&actor), base, "fresh adapters change nothing");

            let init = ScalarInit { seed: 1, fold: None };
            let (mut critic, bytes) = cost(|| backbone.scalar_model(&source, init, Some(&fresh), true).unwrap());
            check(bytes, (4 + master) * (adapters + scalar), "the critic");
            let (reward, bytes) = cost(|| backbone.scalar_model(&source, init, Some(&fresh), false).unwrap());
            check(bytes, adapters + scalar, "the reward model");
            assert_eq!(hidden(&reward), base);

            (0..2).for_each(|_| [&mut actor, &mut critic].into_iter().for_each(train));
            assert_ne!(hidden(&actor), base, "the actor has learnt");
            assert_ne!(hidden(&critic), base, "the critic has learnt");
            assert_ne!(hidden(&critic), hidden(&actor), "each has its own adapters");
            assert_eq!(hidden(&reference), base, "what is frozen is as it was");
            assert_eq!(hidden(&reward), base, "a frozen model's adapters are as they were");
        }
    }
}
