//! A generator's state can be taken and put back. Alone in its process, since the generator is the process's.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use c10d::Error;
use tch::{Device::Cpu, Kind, Tensor};

#[test]
fn a_random_state_repeats_its_draws() {
    let x = Tensor::ones([1000], (Kind::Float, Cpu));
    let state = c10d::rng::state(Cpu).unwrap();
    let draw = || x.dropout(0.5, true);
    let first = draw();
    c10d::rng::set_state(Cpu, &state).unwrap();
    assert!(first.equal(&draw()));
    assert!(matches!(c10d::rng::set_state(Cpu, &x), Err(Error::Torch(_))));
    assert!(matches!(c10d::rng::state(tch::Device::Mps), Err(Error::NotImplemented(_))));
}
