//! Ranks meet although they come at different times, and say who is missing where they do not. (Names that resolve late
//! are tested beside the code, where the lookup can be replaced.)
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod ranks;

use std::time::{Duration, Instant};

use c10d::{Error, Rendezvous};
use ranks::{Rank, free_port, wait_until};

#[test]
fn rank_0_may_come_late() {
    let body = |rank: Rank| {
        c10d::init(true);
        rank.signal(&format!("rank-{}-runs", rank.rank));
        let store = rank.rendezvous().connect().unwrap();
        store.set(&format!("from-{}", rank.rank), &[rank.rank as u8, 0, 255]).unwrap();
        for other in 0..rank.world_size {
            assert_eq!(store.get(&format!("from-{other}")).unwrap(), [other as u8, 0, 255]);
        }
        // The server stays until all have read.
        store.add("done", 1).unwrap();
        wait_until("all ranks", || rank.rank != 0 || store.add("done", 0).unwrap() == i64::from(rank.world_size));
    };
    ranks::run_with("rank_0_may_come_late", 3, body, |parent| {
        (1..3).for_each(|rank| parent.start(rank));
        (1..3).for_each(|rank| parent.await_signal(&format!("rank-{rank}-runs")));
        let late = Instant::now() + Duration::from_secs(2);
        wait_until("rank 0's time", || Instant::now() > late);
        parent.start(0);
        (0..3).for_each(|rank| parent.expect_success(rank));
    });
}

fn alone(rank: u32, host: &str, deadline: Duration) -> Error {
    c10d::init(true);
    let meeting = Rendezvous { host: host.into(), port: free_port(), rank, world_size: 3, attempt: 4, deadline };
    meeting.connect().err().unwrap()
}

fn assert_says(error: &Error, parts: &[&str]) {
    let Error::Timeout(text) = error else { panic!("{error:?}") };
    assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    assert!(!text.contains("Exception raised from") && !text.contains("frame #"), "{text}");
}

#[test]
fn missing_ranks_are_named() {
    let error = alone(0, "127.0.0.1", Duration::from_secs(3));
    assert_says(&error, &["of 3 ranks of attempt 4, these did not come in 3s: 1, 2"]);
}

#[test]
fn a_name_that_never_resolves_is_named() {
    let error = alone(1, "no-such-host.invalid", Duration::from_secs(1));
    assert_says(&error, &["rank 1 did not find rank 0 at no-such-host.invalid:", "does not resolve"]);
}

#[test]
fn a_server_that_never_comes_is_named() {
    let error = alone(2, "127.0.0.1", Duration::from_secs(1));
    assert_says(&error, &["rank 2 did not find rank 0 at 127.0.0.1:"]);
}
