//! Gradients, the optimizer step, mapped and resized storages, and CUDA's absence, in one process.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use c10d::{AdamW, Error, ProcessGroup, Store};
use memmap2::Mmap;
use tch::{Device::Cpu, Kind, Tensor};

fn leaf(tensor: &Tensor) -> Tensor {
    tensor.detach().set_requires_grad(true)
}

fn assert_readable(error: &Error) {
    let text = error.to_string();
    assert!(!text.is_empty() && !text.contains("Exception raised from") && !text.contains("frame #"), "{text}");
}

// ---------------------------------------------------------------- autograd

/// A residual block: `x + gelu(norm(x) w1) w2`, x `[batch, dim]`.
fn block(x: &Tensor, p: &[Tensor]) -> Tensor {
    x + x
        .layer_norm([x.size()[1]], None::<Tensor>, None::<Tensor>, 1e-5, false)
        .matmul(&p[0])
        .gelu("none")
        .matmul(&p[1])
}

fn parameters(blocks: i64, dim: i64) -> Vec<Vec<Tensor>> {
    tch::manual_seed(1);
    let weight = || Tensor::randn([dim, dim], (Kind::Float, Cpu)) / (dim as f64).sqrt();
    (0..blocks).map(|_| vec![weight(), weight()]).collect()
}

#[test]
fn block_wise_gradients_are_bitwise_the_plain_ones() {
    let params = parameters(4, 64);
    let input = Tensor::randn([8, 64], (Kind::Float, Cpu));

    let leaves: Vec<Vec<Tensor>> = params.iter().map(|p| p.iter().map(leaf).collect()).collect();
    leaves.iter().fold(input.shallow_clone(), |x, p| block(&x, p)).square().mean(Kind::Float).backward();

    // Each block again from its saved input, last first, with the gradient that comes from the block above.
    let mut inputs = vec![input];
    for p in &params {
        inputs.push(tch::no_grad(|| block(inputs.last().unwrap(), p)));
    }
    let output = leaf(&inputs[4]);
    let loss = output.square().mean(Kind::Float);
    let mut incoming = c10d::grad(&[&loss], &[], &[&output], false).unwrap()[0].take().unwrap();
    for i in (0..4).rev() {
        let (x, p) = (leaf(&inputs[i]), params[i].iter().map(leaf).collect::<Vec<_>>());
        let y = block(&x, &p);
        let mut grads = c10d::grad(&[&y], &[&incoming], &[&x, &p[0], &p[1]], false).unwrap();
        for j in 0..2 {
            assert!(grads[j + 1].as_ref().unwrap().equal(&leaves[i][j].grad()), "block {i}, parameter {j}");
        }
        incoming = grads[0].take().unwrap();
    }
}

#[test]
fn grad_keeps_the_graph_if_told_and_tells_unused_inputs() {
    let (a, b) = (leaf(&Tensor::from(3.0)), leaf(&Tensor::from(5.0)));
    let y = &a * &a;
    let first = c10d::grad(&[&y], &[&Tensor::from(10.0)], &[&a, &b], true).unwrap();
    assert_eq!(first[0].as_ref().unwrap().double_value(&[]), 60.0);
    assert!(first[1].is_none());
    assert!(c10d::grad(&[&y], &[], &[&a], false).unwrap()[0].is_some());
    let freed = c10d::grad(&[&y], &[], &[&a], false).unwrap_err();
    assert!(matches!(&freed, Error::Torch(m) if m.contains("second time")), "{freed:?}");
    assert_readable(&freed);
    let error = c10d::grad(&[&y], &[&a, &b], &[&a], false).unwrap_err();
    assert_eq!(error, Error::Torch("grad: 2 incoming gradients for 1 outputs".into()));
}

// ---------------------------------------------------------------- optimizer

const ADAMW: AdamW = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };

/// The update as the paper has it, in f64.
fn adamw_by_ops(w: &AdamW, p: &Tensor, g: &Tensor, m: &Tensor, v: &Tensor, step: i32) -> (Tensor, Tensor, Tensor) {
    let p = p * (1.0 - w.lr * w.weight_decay);
    let m = m * w.beta1 + g * (1.0 - w.beta1);
    let v = v * w.beta2 + g.square() * (1.0 - w.beta2);
    let m_hat = &m / (1.0 - w.beta1.powi(step));
    let v_hat = &v / (1.0 - w.beta2.powi(step));
    (p - m_hat / (v_hat.sqrt() + w.epsilon) * w.lr, m, v)
}

#[test]
fn adamw_equals_its_definition_over_views_of_a_flat_buffer() {
    tch::manual_seed(2);
    let n = 10_007;
    let flat = Tensor::randn([4 * n], (Kind::Float, Cpu)).abs();
    let part = |i: i64| flat.narrow(0, i * n, n);
    let (param, grad, exp_avg, exp_avg_sq) = (part(0), part(1), part(2), part(3));
    let (_, _) = (exp_avg.shallow_clone().zero_(), exp_avg_sq.shallow_clone().zero_());
    let double = |t: &Tensor| t.to_kind(Kind::Double);
    let mut expected = (double(&param), double(&exp_avg), double(&exp_avg_sq));
    for step in 1..=10 {
        grad.shallow_clone().copy_(&Tensor::randn([n], (Kind::Float, Cpu)));
        let (p, m, v) = &expected;
        expected = adamw_by_ops(&ADAMW, p, &double(&grad), m, v, step);
        ADAMW.step(&param, &grad, &exp_avg, &exp_avg_sq, step.into()).unwrap();
    }
    for (name, found, expected) in
        [("param", &param, &expected.0), ("exp_avg", &exp_avg, &expected.1), ("exp_avg_sq", &exp_avg_sq, &expected.2)]
    {
        let difference = (double(found) - expected).abs().max().double_value(&[]);
        assert!(difference < 1e-5, "{name} is off by {difference}");
    }
}

#[test]
fn adamw_refuses_what_its_kernel_would_misread() {
    let tensor = |shape: &[i64], kind| Tensor::zeros(shape, (kind, Cpu));
    let good = tensor(&[4, 4], Kind::Float);
    let refused = |param: &Tensor, grad: &Tensor, step, part: &str| {
        let error = ADAMW.step(param, grad, &good, &good, step).unwrap_err();
        assert!(matches!(&error, Error::Torch(m) if m.contains(part)), "{error:?}");
    };
    refused(&good, &tensor(&[4, 4], Kind::BFloat16), 1, "grad must be contiguous fp32, and is contiguous BFloat16");
    refused(&good, &good.tr(), 1, "grad must be contiguous fp32, and is not contiguous Float");
    refused(&good, &tensor(&[16], Kind::Float), 1, "grad is [16] on Cpu, param [4, 4] on Cpu");
    refused(&good, &good, 0, "steps are counted from 1");
}

// ---------------------------------------------------------------- storage

fn mapped(bytes: &[u8]) -> Arc<Mmap> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    c10d::map_file(file.path()).unwrap()
}

#[test]
fn a_mapped_tensor_lives_as_long_as_its_last_view() {
    let values: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let map = mapped(&bytes);
    let weak = Arc::downgrade(&map);
    let tensor = c10d::from_mmap(map, 400, &[9, 100], Kind::Float).unwrap();
    assert_eq!(tensor.double_value(&[0, 0]), 100.0);
    assert_eq!(c10d::storage_bytes(&tensor), 3600);
    let view = tensor.narrow(0, 8, 1);
    drop(tensor);
    assert_eq!(view.double_value(&[0, 99]), 999.0);
    assert!(weak.upgrade().is_some());
    drop(view);
    assert!(weak.upgrade().is_none(), "the map outlived its tensors");
}

#[test]
fn mapped_bytes_off_alignment_are_copied() {
    let map = mapped(&[0, 1, 0, 0, 0, 2, 0, 0, 0]);
    let weak = Arc::downgrade(&map);
    let tensor = c10d::from_mmap(map, 1, &[2], Kind::Int).unwrap();
    assert!(tensor.equal(&Tensor::from_slice(&[1i32, 2])));
    assert!(weak.upgrade().is_none());
}

#[test]
fn tensors_beyond_a_map_are_refused() {
    let map = mapped(&[0; 64]);
    let cases = [(0, vec![17]), (4, vec![4, 4]), (usize::MAX, vec![1]), (0, vec![-1]), (0, vec![i64::MAX, i64::MAX])];
    for (offset, shape) in cases {
        let error = c10d::from_mmap(map.clone(), offset, &shape, Kind::Float).unwrap_err();
        assert!(matches!(&error, Error::Torch(m) if m.contains("not within 64 bytes")), "{error:?}");
    }
    assert_eq!(c10d::from_mmap(map.clone(), 64, &[0], Kind::Float).unwrap().numel(), 0);
    assert!(matches!(c10d::from_mmap(map, 0, &[1], Kind::QInt8), Err(Error::NotImplemented(_))));
}

#[test]
fn a_storage_goes_and_comes_back_under_its_views() {
    let mut flat = Tensor::ones([1 << 20], (Kind::Float, Cpu));
    let view = flat.narrow(0, 1000, 24).view([4, 6]);
    assert_eq!(c10d::storage_bytes(&flat), 4 << 20);
    c10d::resize_storage(&flat, 0).unwrap();
    assert_eq!(c10d::storage_bytes(&view), 0);
    c10d::resize_storage(&flat, 4 << 20).unwrap();
    let _ = flat.fill_(3.0);
    assert_eq!(view.sum(Kind::Float).double_value(&[]), 72.0);
}

#[test]
fn sizes_that_a_tensor_would_reach_beyond_are_refused() {
    let flat = Tensor::ones([100], (Kind::Float, Cpu));
    let error = c10d::resize_storage(&flat.narrow(0, 50, 50), 399).unwrap_err();
    assert!(matches!(&error, Error::Torch(m) if m.contains("too small for its tensor, which needs 400")), "{error:?}");
    let mapped = c10d::from_mmap(mapped(&[0; 64]), 0, &[16], Kind::Float).unwrap();
    let error = c10d::resize_storage(&mapped, 0).unwrap_err();
    assert!(matches!(&error, Error::Torch(m) if m.contains("cannot be resized")), "{error:?}");
}

#[test]
fn memory_that_is_not_there_is_an_error_of_its_own() {
    let tensor = Tensor::ones([1], (Kind::Float, Cpu));
    let error = c10d::resize_storage(&tensor, 1 << 50).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory(_)), "{error:?}");
    assert_readable(&error);
    let error = Error::from(Tensor::f_zeros([1 << 50], (Kind::Float, Cpu)).unwrap_err());
    assert!(matches!(error, Error::OutOfMemory(_)), "{error:?}");
    assert_readable(&error);
}

#[test]
fn tensors_are_counted_where_they_were_taken() {
    c10d::init(true);
    // Other tests of this process allocate too, but nothing of this size in these domains at once.
    const SIZE: u64 = 1 << 28;
    let now = || c10d::allocated(Cpu).unwrap();
    let close = |bytes: u64, expected: u64| bytes.abs_diff(expected) < SIZE / 2;
    let before = now();
    let bytes = |n: u64| Tensor::zeros([n as i64], (Kind::Uint8, Cpu));
    let device = bytes(SIZE);
    let host = c10d::on_host(|| bytes(2 * SIZE));
    let both = now();
    assert!(close(both.device.current, before.device.current + SIZE), "{before:?} {both:?}");
    assert!(close(both.host.current, before.host.current + 2 * SIZE), "{before:?} {both:?}");
    c10d::resize_storage(&host, 0).unwrap();
    assert!(close(now().host.current, before.host.current));
    drop((device, host));
    let after = now();
    assert!(close(after.device.current, before.device.current) && after.device.peak >= both.device.current);
    c10d::reset_peaks(Cpu).unwrap();
    assert!(close(now().host.peak, before.host.current), "{:?}", now());
}

#[test]
fn host_memory_is_counted() {
    let before = c10d::host_bytes();
    let tensor = Tensor::ones([64 << 20], (Kind::Uint8, Cpu));
    assert!(before > 1 << 20 && c10d::peak_host_bytes() >= before + (32 << 20));
    drop(tensor);
    // The recent peak forgets what is given back, and the peak does not.
    drop(std::hint::black_box(vec![1_u8; 256 << 20]));
    let peak = c10d::peak_host_bytes();
    assert!(c10d::restart_recent_peak());
    assert!(c10d::recent_peak_host_bytes() + (128 << 20) < peak && c10d::peak_host_bytes() >= peak);
    assert!((1..=c10d::recent_peak_host_bytes()).contains(&c10d::anonymous_host_bytes()));
}

// ---------------------------------------------------------------- CUDA, errors

/// On a machine with CUDA: NCCL with one rank. On any other: clean errors that say why.
#[test]
fn cuda_works_or_says_why_not() {
    c10d::init(true);
    let store = Store::tcp("127.0.0.1", 0, true, 0, Duration::from_secs(5));
    let group = |store: &Store| ProcessGroup::nccl(store, 0, 1, 0, Duration::from_secs(60));
    if c10d::has_cuda() {
        let tensor = Tensor::ones([1 << 20], (Kind::BFloat16, tch::Device::Cuda(0)));
        let group = group(&store.unwrap()).unwrap();
        group.all_reduce(&tensor, c10d::ReduceOp::Sum).unwrap().wait().unwrap();
        group.agree("configuration", &[1; 32]).unwrap();
        group.barrier().unwrap();
        assert_eq!(tensor.sum(Kind::Float).double_value(&[]), f64::from(1 << 20));
        let memory = c10d::device_memory(0).unwrap();
        assert!(memory.allocated >= 2 << 20 && memory.allocated_peak >= memory.allocated);
        assert!(memory.reserved >= memory.allocated && memory.total > memory.free);
    } else {
        for error in [group(&store.unwrap()).err().unwrap(), c10d::device_memory(0).unwrap_err()] {
            let Error::NotImplemented(text) = &error else { panic!("{error:?}") };
            assert!(text.starts_with("CUDA is not available: "), "{text}");
            assert_readable(&error);
        }
    }
}

#[test]
fn errors_of_tch_lose_their_backtrace() {
    let (a, b) = (Tensor::ones([2, 3], (Kind::Float, Cpu)), Tensor::ones([2, 3], (Kind::Float, Cpu)));
    let error = Error::from(a.f_matmul(&b).unwrap_err());
    assert_eq!(error.to_string(), "mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)");
}
