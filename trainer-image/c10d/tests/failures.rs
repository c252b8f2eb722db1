//! A lost or silent peer is an error on the others within the group's timeout, never a hang or an abort, and errors read
//! well.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod ranks;

use std::time::{Duration, Instant};

use c10d::{Error, ProcessGroup, ReduceOp};
use ranks::{PATIENCE, Rank};
use tch::{Device::Cpu, Kind, Tensor};

fn assert_readable(error: &Error) {
    let text = error.to_string();
    assert!(!text.is_empty() && !text.contains("Exception raised from") && !text.contains("frame #"), "{text}");
}

fn sum(group: &ProcessGroup, tensor: &Tensor) -> c10d::Result<()> {
    group.all_reduce(tensor, ReduceOp::Sum)?.wait()
}

#[test]
fn a_killed_peer_is_an_error_on_all_survivors() {
    let survive = |rank: Rank| {
        let group = rank.group(PATIENCE);
        let tensor = Tensor::zeros([4 << 20], (Kind::Float, Cpu));
        sum(&group, &tensor).unwrap();
        rank.signal(&format!("rank-{}-runs", rank.rank));
        // One collective after the other until the kill, which thus falls into one.
        let started = Instant::now();
        let error = loop {
            assert!(started.elapsed() < PATIENCE, "the peer was not missed");
            if let Err(error) = sum(&group, &tensor) {
                break error;
            }
        };
        assert!(matches!(error, Error::Distributed(_)), "{error:?}");
        assert_readable(&error);
        assert_readable(&sum(&group, &tensor).unwrap_err());
    };
    ranks::run_with("a_killed_peer_is_an_error_on_all_survivors", 3, survive, |parent| {
        (0..3).for_each(|rank| parent.start(rank));
        (0..3).for_each(|rank| parent.await_signal(&format!("rank-{rank}-runs")));
        parent.kill(1);
        parent.expect_success(0);
        parent.expect_success(2);
        let (status, _) = parent.finish(1);
        assert!(!status.success());
    });
}

#[test]
fn a_hung_peer_is_a_timeout() {
    ranks::run("a_hung_peer_is_a_timeout", 2, |rank| {
        let timeout = Duration::from_secs(5);
        let group = rank.group(timeout);
        group.barrier().unwrap();
        if rank.rank == 1 {
            return rank.await_signal("timed-out");
        }
        let started = Instant::now();
        let error = sum(&group, &Tensor::zeros([1000], (Kind::Float, Cpu))).unwrap_err();
        assert!(matches!(error, Error::Timeout(_)), "{error:?}");
        assert!(started.elapsed() >= timeout, "{:?}", started.elapsed());
        assert_readable(&error);
        rank.signal("timed-out");
    });
}

#[test]
fn a_peer_that_never_forms_the_group_is_a_timeout() {
    ranks::run("a_peer_that_never_forms_the_group_is_a_timeout", 2, |rank| {
        let store = rank.rendezvous().connect().unwrap();
        if rank.rank == 1 {
            return rank.await_signal("timed-out");
        }
        let error = ProcessGroup::gloo(&store.prefix("g/").unwrap(), 0, 2, "127.0.0.1", Duration::from_secs(1));
        let error = error.err().unwrap();
        assert!(matches!(error, Error::Timeout(_)), "{error:?}");
        assert_readable(&error);
        rank.signal("timed-out");
    });
}

#[test]
fn a_lost_store_is_an_error() {
    let body = |rank: Rank| {
        c10d::init(true);
        let store = rank.rendezvous().connect().unwrap();
        if rank.rank == 0 {
            rank.signal("serving");
            return rank.await_signal("never");
        }
        rank.signal("connected");
        rank.await_signal("killed");
        let error = store.get("x").unwrap_err();
        assert!(matches!(error, Error::Distributed(_)), "{error:?}");
        assert_readable(&error);
    };
    ranks::run_with("a_lost_store_is_an_error", 2, body, |parent| {
        (0..2).for_each(|rank| parent.start(rank));
        parent.await_signal("serving");
        parent.await_signal("connected");
        parent.kill(0);
        parent.finish(0);
        parent.signal("killed");
        parent.expect_success(1);
    });
}

/// Gloo throws in a thread of its own where ranks give different sizes: without a handler the process is gone by SIGABRT.
#[test]
fn an_exception_that_nobody_catches_is_told_and_gives_the_exit_code() {
    const CODE: i32 = 43;
    let body = |rank: Rank| {
        c10d::on_terminate(|error| {
            assert_readable(&error);
            println!("told: {error:?}");
            CODE
        });
        let group = rank.group(PATIENCE);
        group.barrier().unwrap();
        let tensor = Tensor::zeros([if rank.rank == 0 { 1000 } else { 2000 }], (Kind::Float, Cpu));
        let _ = sum(&group, &tensor);
        rank.await_signal("never");
    };
    ranks::run_with("an_exception_that_nobody_catches_is_told_and_gives_the_exit_code", 2, body, |parent| {
        (0..2).for_each(|rank| parent.start(rank));
        let (status, log) = parent.finish(0);
        let (status, log) = if status.code() == Some(CODE) { (status, log) } else { parent.finish(1) };
        assert!(status.code() == Some(CODE) && log.contains("told: ") && log.contains("gloo::"), "{status}\n{log}");
    });
}
