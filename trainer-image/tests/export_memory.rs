//! What writing a model takes in memory, by the counting allocator: on rank 0 a segment, on others next to nothing, however many
//! segments there are. It counts the whole process, in which the ranks are threads, so it is the only test here.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

use c10d::{ProcessGroup, Rendezvous};
use rlhf_api::stage::{Linear, Lora, Offload, Precision, Sharding, Strategy};
use rlhf_trainer::engine::{Backbone, ChunkLayout, Group, HEAD_SLICE_BYTES, Model, Placement, ScalarInit};
use rlhf_trainer::lease::Lease;
use rlhf_trainer::model::families::Layout;
use rlhf_trainer::model::{Adapters, Format, HeadKind, ModelWriter, Scores, Segment, Source, read_config};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use std::net::TcpListener;
use std::path::Path;
use std::rc::Rc;
use std::sync::Mutex;
use std::time::Duration;
use tch::{Device, Tensor};

/// Six blocks, which have tensors larger than the pieces in which they are written.
fn write_source(dir: &Path) {
    let config = json!({
        "model_type": "gpt2", "vocab_size": 2048, "n_embd": 768, "n_layer": 6, "n_head": 8, "n_positions": 64,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let (_, family, spec) = read_config(dir).unwrap();
    let mut shapes = Vec::new();
    for segment in spec.segments() {
        let params = spec.params(segment, HeadKind::Lm);
        for entry in family.tensors(segment) {
            let parts: Vec<_> = params.iter().filter(|p| entry.parts.contains(&p.param)).collect();
            if parts.is_empty() {
                continue;
            }
            let mut shape: Vec<usize> = parts[0].shape.iter().map(|&n| n as usize).collect();
            shape[0] *= parts.len();
            if entry.layout == Layout::Transposed {
                shape.reverse();
            }
            shapes.push((entry.name, shape));
        }
    }
    let largest = shapes.iter().map(|(_, shape)| shape.iter().product::<usize>()).max().unwrap();
    let values: Vec<u8> = (0..largest).flat_map(|i| (i as f32).sin().to_le_bytes()).collect();
    let tensors = shapes.iter().map(|(name, shape)| {
        let bytes = &values[..4 * shape.iter().product::<usize>()];
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(tensors, None, &dir.join("model.safetensors")).unwrap();
}

/// How a model is trained that is then written.
#[derive(Clone, Copy, Debug)]
struct Case {
    ranks: u32,
    strategy: Strategy,
    lora: bool,
}

fn load(case: Case, source: &Source, group: Group) -> Model {
    let placement =
        Placement { device: Device::Cpu, trainable: true, strategy: case.strategy, head_slice_bytes: HEAD_SLICE_BYTES };
    let group = Rc::new(group);
    if !case.lora {
        return Model::load(source, HeadKind::Lm, ScalarInit { seed: 0, fold: None }, placement, &group).unwrap();
    }
    let lora = Lora { rank: 4, alpha: None, dropout: 0.0, targets: Linear::ALL.to_vec() };
    let adapters = Adapters::fresh(&source.spec, &lora, 1).unwrap();
    Backbone::load(source, HeadKind::Lm, placement, &group).unwrap().language_model(&adapters, 1).unwrap()
}

/// Writes the model; returns the bytes that came to lie on host and device at the peak.
fn export(case: Case, source: &Source, target: &Path) -> [u64; 2] {
    let before = Mutex::new([0; 2]);
    let now = |peak: bool| {
        let c10d::Allocated { device, host } = c10d::allocated(Device::Cpu).unwrap();
        if peak { [host.peak, device.peak] } else { [host.current, device.current] }
    };
    ranks(case.ranks, |rank, group| {
        let model = load(case, source, group);
        let group = model.group();
        group.barrier().unwrap();
        if rank == 0 {
            c10d::reset_peaks(Device::Cpu).unwrap();
            *before.lock().unwrap() = now(false);
        }
        group.barrier().unwrap();
        let format = Format { kind: source.kind, shard_bytes: 100_000_000 };
        let mut writer =
            (rank == 0).then(|| ModelWriter::create(target, source, HeadKind::Lm, format, &Lease::default()).unwrap());
        model.parameters(source, |part| writer.as_mut().unwrap().write(part.segment, &part.values)).unwrap();
        if let Some(writer) = writer {
            writer.finish(Scores::default(), |_| Ok(())).unwrap();
        }
        group.barrier().unwrap();
    });
    let (before, after) = (before.into_inner().unwrap(), now(true));
    [after[0] - before[0], after[1] - before[1]]
}

/// The ranks as threads, each with its group.
fn ranks(count: u32, run: impl Fn(u32, Group) + Sync) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let rank = |rank: u32| {
        let peers = (count > 1).then(|| {
            let deadline = Duration::from_secs(60);
            let store =
                Rendezvous { host: "127.0.0.1".into(), port, rank, world_size: count, attempt: 1, deadline }.connect();
            ProcessGroup::gloo(&store.unwrap(), rank, count, "127.0.0.1", deadline).unwrap()
        });
        run(rank, Group::new(peers, rank, count, Device::Cpu).unwrap());
    };
    std::thread::scope(|scope| {
        (0..count).for_each(|r| {
            drop(scope.spawn({
                let rank = &rank;
                move || rank(r)
            }))
        })
    });
}
#[test]
fn writing_a_model_takes_a_segment_of_host_memory() {
    const MIB: u64 = 1 << 20;
    c10d::init(true);
    let folder = tempfile::tempdir().unwrap();
    write_source(folder.path());
    let source = Source::open(folder.path()).unwrap();
    let segment = 4 * ChunkLayout::new(source.spec.params(Segment::Block(0), HeadKind::Lm)).numel as u64;
    let strategy = |sharding, offload, precision| Strategy { sharding, offload, precision, ..Strategy::default() };
    let case = |ranks, lora, strategy| Case { ranks, strategy, lora };
    for case in [
        case(1, false, strategy(Sharding::Ddp, Offload::None, Precision::Fp32)),
        case(1, false, strategy(Sharding::Ddp, Offload::Parameters, Precision::Bf16)),
        case(1, true, strategy(Sharding::Ddp, Offload::None, Precision::Bf16)),
        case(2, false, strategy(Sharding::Zero3, Offload::None, Precision::Fp32)),
        case(2, false, strategy(Sharding::Zero3, Offload::Parameters, Precision::Bf16)),
        case(2, true, strategy(Sharding::Zero3, Offload::Parameters, Precision::Fp32)),
    ] {
        let target = folder.path().join("written");
        let [host, device] = export(case, &source, &target);
        println!("{case:?}: {} KiB on the host, {} KiB on the device", host >> 10, device >> 10);
        // Three pieces or a product of adapters beside the segment; on each device, a slice of all ranks' parts, which gloo
        // gathers into buffers of its own.
        assert!(host <= segment + 24 * MIB, "{case:?}: {host} bytes on the host, a segment has {segment}");
        assert!(device <= u64::from(case.ranks) * 25 * MIB, "{case:?}: {device} bytes on the device");
        let written = Source::open(&target).unwrap();
        for segment in source.spec.segments() {
            let of = |source: &Source| -> Vec<Tensor> {
                source.segment(segment, HeadKind::Lm).unwrap().into_iter().flatten().collect()
            };
            assert_eq!(of(&written), of(&source), "{case:?}, {segment:?}");
        }
    }
}
