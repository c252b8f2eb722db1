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

/// Who waits is told for whom or what, before it gives up.
#[test]
fn a_wait_says_what_it_is_for() {
    c10d::init(true);
    let words = |rank: u32, host: &str| {
        let deadline = Duration::from_secs(11);
        let meeting = Rendezvous { host: host.into(), port: free_port(), rank, world_size: 3, attempt: 4, deadline };
        let heard = std::cell::RefCell::new(Vec::new());
        assert!(meeting.connect_telling(&|word| heard.borrow_mut().push(word.to_owned())).is_err());
        heard.into_inner()
    };
    std::thread::scope(|scope| {
        let waits = [
            (0, "127.0.0.1", ["ranks that have not come: 1, 2", "for 10 s"]),
            (1, "127.0.0.1", ["refuses connections", "for 10 s"]),
            (2, "no-such-host.invalid", ["the name no-such-host.invalid does not resolve", "for 10 s"]),
        ];
        for (rank, host, parts) in waits {
            scope.spawn(move || {
                let heard = words(rank, host);
                assert!(heard.iter().any(|word| parts.iter().all(|part| word.contains(part))), "{heard:?}");
            });
        }
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
    assert_says(&error, &["rank 2 did not find rank 0 at 127.0.0.1:", "refuses connections"]);
}

/// Packets to it are dropped, as a network policy does: its queue of connections is full and nobody takes one.
#[test]
fn a_server_that_does_not_answer_is_told_from_one_that_is_not_there() {
    let mute = Mute::new();
    c10d::init(true);
    let deadline = Duration::from_secs(5);
    let meeting =
        Rendezvous { host: "127.0.0.1".into(), port: mute.port, rank: 1, world_size: 2, attempt: 1, deadline };
    assert_says(
        &meeting.connect().err().unwrap(),
        &["rank 1 did not find rank 0", "did not answer within", "network policy"],
    );
}

/// A port that takes no more connections.
struct Mute {
    port: u16,
    _listener: std::net::TcpListener,
    _queue: Vec<std::net::TcpStream>,
}

impl Mute {
    fn new() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // The kernel drops what comes once the queue is full: that is when a connection is not made at once.
        let connect = || std::net::TcpStream::connect_timeout(&address, Duration::from_millis(300)).ok();
        let queue = std::iter::from_fn(connect).take(10_000).collect();
        Self { port: address.port(), _listener: listener, _queue: queue }
    }
}

#[test]
fn a_rank_that_waits_names_those_that_are_missing() {
    let body = |rank: Rank| {
        c10d::init(true);
        // Rank 0's store goes with it, so it gives up last.
        let deadline = Duration::from_secs(if rank.rank == 0 { 20 } else { 3 });
        let error = Rendezvous { world_size: 3, deadline, ..rank.rendezvous() }.connect().err().unwrap();
        if rank.rank == 0 {
            assert_says(&error, &["these did not come in 20s: 2"]);
        } else {
            assert_says(&error, &["rank 1 is here, but not all 3 ranks of attempt 1 in 3s (missing: 2)"]);
        }
    };
    ranks::run("a_rank_that_waits_names_those_that_are_missing", 2, body);
}
