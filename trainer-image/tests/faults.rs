//! Faults of the world around a trainer, each with the real program: lost and hung peers, late names and ports, full disks,
//! wrong data and numbers, and requests to stop at the worst time. Each ends in its exit code with a line that says what and
//! where, and the next attempt goes on from the last checkpoint.
//!
//! Where a fault needs a mount, it is made in a user and mount namespace of the pod's own, so that no test needs
//! privileges or touches the machine. (Damaged checkpoints are in `resume.rs`, refused configs and a killed worker's pod in
//! `launch.rs`, collectives alone in `c10d/tests`.)

#![allow(clippy::unwrap_used, clippy::panic)] // tests and what they are made of fail by panicking

mod common;

use common::{
    Finished, Launch, Pod, Running, Volume, fetch, finished, free_port, ppo, reward, rewound, sft, wait_until,
};
use rustix::process::{Signal, kill_process};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

/// Trains for very long, saves every second step, and waits five seconds for a peer.
fn endless(launch: Launch) -> Launch {
    let mut launch = launch.with("/epochs", json!(100_000)).with("/maxSteps", json!(1_000_000));
    launch.config["checkpoint"] = json!({"everySteps": 2, "keep": 3});
    launch.config["collectiveTimeoutSeconds"] = json!(5);
    launch
}

/// Two pods of one worker each that train together, past their second checkpoint.
fn two_pods(volume: &Volume) -> [Running; 2] {
    let port = free_port();
    let pods = [0, 1].map(|node| volume.start_as(&endless(sft()), &Pod::of_gang(node, 2, port)));
    wait_until("five steps", || volume.curve("sft", "loss").len() >= 5);
    pods
}

/// Checks that the next attempt goes on from the newest checkpoint, for three more steps.
fn goes_on(volume: &Volume, launch: Launch) {
    goes_on_as(volume, launch, 2);
}

/// The same of an attempt with this number.
fn goes_on_as(volume: &Volume, launch: Launch, attempt: u32) {
    let last = *volume.checkpoints("sft").last().unwrap();
    volume.succeed(&launch.with("/maxSteps", json!(last + 3)).adopting(attempt));
    assert_eq!(volume.trained("sft", attempt.into()), [last + 1, last + 2, last + 3]);
}

/// Checks that a pod ended because its peer was lost, and knows the newest checkpoint.
fn lost_its_peer(volume: &Volume, pod: &Finished) {
    pod.expect(75, "PeerLost", &[]);
    assert!(!pod.message["message"].as_str().unwrap().is_empty());
    assert!(volume.checkpoints("sft").contains(&pod.checkpoint().unwrap()), "{}", pod.message);
}

#[test]
fn a_rank_killed_in_a_collective_is_named_and_missed() {
    let volume = Volume::new("gpt2");
    let [pod_0, pod_1] = two_pods(&volume);
    // Once its peer has stopped, rank 0 gets no further than into the next collective.
    kill_process(pod_1.worker(0), Signal::STOP).unwrap();
    let mut steps = 0;
    wait_until("rank 0 to wait for its peer", || {
        sleep(Duration::from_millis(200));
        let before = std::mem::replace(&mut steps, volume.curve("sft", "loss").len());
        steps == before
    });
    kill_process(pod_1.worker(0), Signal::KILL).unwrap();
    lost_its_peer(&volume, &pod_0.wait());
    let killed = pod_1.wait();
    killed.expect(137, "Killed", &["rank 1", "SIGKILL", "memory limit"]);
    assert_eq!(killed.message["rank"], 1);
    goes_on(&volume, endless(sft()));
}

#[test]
fn a_rank_that_hangs_is_given_up_after_the_collective_timeout() {
    let volume = Volume::new("gpt2");
    let [pod_0, pod_1] = two_pods(&volume);
    kill_process(pod_1.worker(0), Signal::STOP).unwrap();
    lost_its_peer(&volume, &pod_0.wait());
    // When it goes on, it finds that the others have gone.
    kill_process(pod_1.worker(0), Signal::CONT).unwrap();
    pod_1.wait().expect(75, "PeerLost", &[]);
    goes_on(&volume, endless(sft()));
}

/// An attempt that was given up while its node was cut off, and its successor, at work at once.
#[test]
fn an_attempt_that_was_given_up_publishes_nothing_any_more() {
    let volume = Volume::new("gpt2");
    // One rank alone: no peer's absence tells it that it was given up.
    let zombie = volume.start(&endless(sft()));
    wait_until("five steps", || volume.curve("sft", "loss").len() >= 5);
    kill_process(zombie.worker(0), Signal::STOP).unwrap();
    let before = *volume.checkpoints("sft").last().unwrap();
    let pod = Pod { name: "-second".into(), ..Pod::default() };
    let second = volume.start_as(&endless(sft().processes(2)).attempt(2), &pod);
    wait_until("three checkpoints of the second attempt", || volume.checkpoints("sft")[0] > before);
    kill_process(zombie.worker(0), Signal::CONT).unwrap();
    zombie.wait().expect(75, "PeerLost", &["attempt 2 has taken over", "attempt 1 writes nothing any more"]);
    let attempts: Vec<u64> = volume.history("sft").iter().filter_map(|line| line["attempt"].as_u64()).collect();
    assert!(
        attempts.is_sorted(),
        "the learning curves of the first attempt end where the second's begin: {attempts:?}"
    );
    let found = volume.checkpoints("sft");
    assert!(found.iter().all(|step| *step > before), "those of the second attempt alone: {found:?}");
    let meanwhile = *found.last().unwrap();
    wait_until("more checkpoints", || volume.checkpoints("sft")[0] > meanwhile);
    second.signal(Signal::TERM);
    let end = second.wait();
    end.expect(143, "Terminated", &[]);
    assert_eq!(volume.checkpoints("sft").last().copied(), end.checkpoint());
    // One that starts late is refused as well.
    let late = volume.run(&endless(sft()).attempt(1));
    late.expect(75, "PeerLost", &["attempt 2 has taken over"]);
    goes_on_as(&volume, endless(sft()), 3);
}

#[test]
fn the_owner_of_the_store_is_missed_in_training_and_at_the_rendezvous() {
    let volume = Volume::new("gpt2");
    let [pod_0, pod_1] = two_pods(&volume);
    kill_process(pod_0.worker(0), Signal::KILL).unwrap();
    pod_0.wait().expect(137, "Killed", &["rank 0"]);
    pod_1.wait().expect(75, "PeerLost", &[]);
    goes_on(&volume, endless(sft()));

    // The third never comes.
    let port = free_port();
    let [pod_0, pod_1] = [0, 1].map(|node| volume.start_as(&sft(), &Pod::of_gang(node, 3, port)));
    wait_until("rank 1 to be connected for a while", || {
        connected_to(port) && {
            sleep(Duration::from_millis(300));
            connected_to(port)
        }
    });
    kill_process(pod_0.worker(0), Signal::KILL).unwrap();
    pod_0.wait().expect(137, "Killed", &["rank 0"]);
    pod_1.wait().expect(75, "PeerLost", &["rank 1"]);
}

/// Whether any process on this machine has two connections to a port of it: rank 0's own, and another's.
fn connected_to(port: u16) -> bool {
    let remote = format!(":{port:04X} 01 ");
    let tables = ["tcp", "tcp6"].map(|t| fs::read_to_string(format!("/proc/net/{t}")).unwrap_or_default());
    tables.concat().matches(&remote).count() >= 2
}

#[test]
fn a_name_and_a_port_may_come_late() {
    let volume = Volume::new("gpt2");
    let hosts = volume.path("hosts");
    fs::write(&hosts, "127.0.0.1 localhost\n").unwrap();
    fs::write(volume.path("resolv.conf"), "").unwrap();
    let own_names =
        "mount --bind \"$0/hosts\" /etc/hosts && mount --bind \"$0/resolv.conf\" /etc/resolv.conf && exec \"$@\"";
    let root = volume.path("").display().to_string();
    let port = free_port();
    let late = Pod::of_gang(1, 2, port)
        .env("MASTER_ADDR", "trainer-0.late")
        .under(&["unshare", "-rm", "sh", "-c", own_names, &root]);
    let short = sft().with("/maxSteps", json!(3));
    let pod_1 = volume.start_as(&short, &late);
    wait_until("rank 1 to look for rank 0", || pod_1.log().contains("waiting for 2 ranks at trainer-0.late"));
    // Time for a few tries without the name, and then without anybody at the port.
    sleep(Duration::from_secs(1));
    fs::OpenOptions::new().append(true).open(&hosts).unwrap().write_all(b"127.0.0.1 trainer-0.late\n").unwrap();
    sleep(Duration::from_secs(1));
    let pod_0 = volume.start_as(&short, &Pod::of_gang(0, 2, port));
    pod_0.wait().expect(0, "Done", &[]);
    pod_1.wait().expect(0, "Done", &[]);
}

/// The rendezvous goes on for long; what it waits for is said meanwhile.
#[test]
fn a_rendezvous_says_what_it_waits_for() {
    let volume = Volume::new("gpt2");
    let port = free_port();
    let alone = |node: u32, host: &str| {
        let pod = Pod { http_port: free_port(), ..Pod::of_gang(node, 3, port) }.env("MASTER_ADDR", host);
        (pod.http_port, volume.start_as(&sft(), &pod))
    };
    let waits = [
        (alone(0, "127.0.0.1"), "ranks that have not come: 1, 2"),
        (alone(2, "no-such-host.invalid"), "the name no-such-host.invalid does not resolve"),
    ];
    for ((http_port, pod), word) in waits {
        let doing = || -> Option<String> {
            let progress: Value = serde_json::from_str(&fetch(http_port, "/progress")?).ok()?;
            Some(progress["doing"].as_str()?.to_owned())
        };
        wait_until("a word about the wait", || doing().is_some_and(|doing| doing.contains(word)));
        assert_eq!(fetch(http_port, "/healthz").as_deref(), Some("ok"));
        assert!(pod.log().contains(word), "{}", pod.log());
    }
}

#[test]
fn a_full_disk_is_said_and_the_checkpoints_before_are_whole() {
    let mut launch = sft().processes(2);
    launch.config["checkpoint"] = json!({"everySteps": 4, "keep": 100});
    let whole = finished("gpt2", &launch);

    // A volume with room for two checkpoints of 370 KB; what is left on it is copied before it goes with its namespace.
    let volume = Volume::new("gpt2");
    let (jobs, left) = (volume.path("jobs"), volume.path("left"));
    fs::create_dir_all(&jobs).unwrap();
    let small_disk = "mount -t tmpfs -o size=1M none \"$0/jobs\" || exit; \"$@\"; code=$?; cp -a \"$0/jobs\" \"$0/left\"; exit $code";
    let root = volume.path("").display().to_string();
    let pod = Pod::default().under(&["unshare", "-rm", "sh", "-c", small_disk, &root]);
    let end = volume.start_as(&launch, &pod).wait();
    end.expect(74, "StorageFailed", &["No space left on device", "checkpoints/step-12"]);
    assert_eq!(end.checkpoint(), Some(8));

    fs::remove_dir(&jobs).unwrap();
    fs::rename(left, jobs).unwrap();
    assert_eq!(volume.checkpoints("sft"), [4, 8]);
    volume.succeed(&launch.attempt(2));
    assert_eq!(volume.trained("sft", 2).first(), Some(&9));
    assert!(volume.weights("sft") == whole.weights("sft"));
}

/// A disk that was too small for a while: each attempt removes what those before it left, and needs no more room than it would
/// have needed alone.
#[test]
fn a_disk_that_was_full_heals() {
    // Room for two checkpoints of 370 KB, of which another takes most while the first two attempts run, which are as alone in
    // their namespace as pods are.
    let (volume, _) = on_a_small_disk(
        "mount -t tmpfs -o size=850k none \"$0/jobs\" && head -c 300k /dev/zero > \"$0/jobs/other\" || exit; \
        RLHF_ATTEMPT=1 \"$@\"; one=$?; RLHF_ATTEMPT=2 \"$@\"; two=$?; \
        find \"$0/jobs\" -name '*.tmp' > \"$0/unfinished\"; \
        rm \"$0/jobs/other\"; RLHF_ATTEMPT=3 \"$@\"; three=$?; \
        cp -a \"$0/jobs\" \"$0/left\"; echo $one $two $three > \"$0/ends\"; exit $three",
    );
    assert_eq!(fs::read_to_string(volume.path("ends")).unwrap(), "74 74 0\n");
    assert_eq!(fs::read_to_string(volume.path("unfinished")).unwrap(), "", "a failed save removes its own");
}

/// A killed attempt has left the disk without a byte: not even the lease of the next one can be written before what it left has
/// gone. What is no attempt's stays in the way, and is told.
#[test]
fn a_disk_that_a_killed_attempt_has_filled_heals() {
    let (volume, end) = on_a_small_disk(
        "mount -t tmpfs -o size=1M none \"$0/jobs\" && mkdir -p \"$0/jobs/j/sft/checkpoints\" && cd \"$0/jobs/j/sft\" || exit; \
        echo '{\"jobUid\": \"u\", \"attempt\": 1}' > lease-1; \
        head -c 2M /dev/zero > other; RLHF_ATTEMPT=2 \"$@\"; two=$?; ls > \"$0/listed\"; rm other; \
        for dir in checkpoints/step-8.lease-1.tmp model.lease-1.tmp; do mkdir $dir; head -c 2M /dev/zero > $dir/part; done; \
        RLHF_ATTEMPT=3 \"$@\"; three=$?; \
        cp -a \"$0/jobs\" \"$0/left\"; echo $two $three > \"$0/ends\"; exit $three",
    );
    assert!(end.log.contains("lease-2: No space left on device"), "{}", end.log);
    assert_eq!(fs::read_to_string(volume.path("ends")).unwrap(), "74 0\n");
    // The lease that cannot be written is not there: that of the attempt before holds.
    assert_eq!(fs::read_to_string(volume.path("listed")).unwrap(), "checkpoints\nlease-1\nother\n");
}

/// Fine-tuning that keeps one checkpoint, by a shell's `script` that mounts a small disk over the volume's `jobs` where nobody
/// else sees it, makes attempts by `"$@"`, and leaves a copy of `jobs` in `left`. It ends with what a run that has room ends with.
fn on_a_small_disk(script: &str) -> (Volume, Finished) {
    let mut launch = sft();
    launch.config["checkpoint"] = json!({"everySteps": 4, "keep": 1});
    let whole = finished("gpt2", &launch);
    let volume = Volume::new("gpt2");
    let (jobs, left) = (volume.path("jobs"), volume.path("left"));
    fs::create_dir_all(&jobs).unwrap();
    let root = volume.path("").display().to_string();
    let pod = Pod::default().under(&["unshare", "-rm", "sh", "-c", script, &root]);
    let end = volume.start_as(&launch, &pod).wait();
    end.expect(0, "Done", &[]);
    fs::remove_dir(&jobs).unwrap();
    fs::rename(left, jobs).unwrap();
    assert!(volume.weights("sft") == whole.weights("sft"));
    (volume, end)
}

/// What a killed attempt left goes before anything is written, by whichever attempt comes next.
#[test]
fn what_killed_attempts_left_is_removed_at_the_start_of_the_next() {
    let volume = rewound(&finished("gpt2", &sft()), "gpt2", "sft", 10);
    let checkpoints = volume.path("jobs/j/sft/checkpoints");
    // The finished run had the first lease, so that the next has the second.
    for (name, lease) in [("step-12", 1), ("step-14", 1), ("step-16", 9)] {
        fs::create_dir(checkpoints.join(format!("{name}.lease-{lease}.tmp"))).unwrap();
    }
    let running = volume.start(&endless(sft()).adopting(3));
    wait_until("the start", || running.log().contains("resumed"));
    let names = fs::read_dir(&checkpoints).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let unfinished: Vec<String> = names.filter(|name| name.ends_with(".tmp") && !name.contains("lease-2")).collect();
    assert_eq!(unfinished, ["step-16.lease-9.tmp"], "that of a later lease is not touched");
    drop(running);
}

#[test]
fn ranks_that_read_different_data_do_not_train() {
    let (one, other) = (Volume::new("gpt2"), Volume::new("gpt2"));
    let data = other.path("data/sft.jsonl");
    fs::write(&data, fs::read_to_string(&data).unwrap().replacen("w1", "w2", 1)).unwrap();
    let port = free_port();
    let pods = [(0, &one), (1, &other)].map(|(node, volume)| volume.start_as(&sft(), &Pod::of_gang(node, 2, port)));
    for pod in pods {
        pod.wait().expect(65, "BadInput", &["the ranks have read different data", "rank 1"]);
    }
}

/// Overwrites numbers of one of a model's tensors.
fn poison(volume: &Volume, model: &str, tensor: &str, number: f32, of: impl Fn(usize) -> bool) {
    let path = volume.path(model).join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let (start, end) = metadata.info(tensor).unwrap().data_offsets;
    let numbers = bytes[header + 8 + start..header + 8 + end].chunks_exact_mut(4);
    numbers.enumerate().filter(|(i, _)| of(*i)).for_each(|(_, b)| b.copy_from_slice(&number.to_le_bytes()));
    fs::write(&path, bytes).unwrap();
}

/// A model one of whose words has an embedding from which nothing finite comes, and 24 records, of which those that `bad` says
/// have that word.
fn poisoned(bad: impl Fn(i64) -> bool) -> Volume {
    let volume = Volume::new("llama-gqa-untied");
    let record = |i: i64| json!({"prompt": if bad(i) { "zzz" } else { "w1" }, "completion": format!(" w{i}")});
    let records: Vec<String> = (0..24).map(|i| record(i).to_string()).collect();
    fs::write(volume.path("data/sft.jsonl"), records.join("\n")).unwrap();
    poison(&volume, "models/base", "model.embed_tokens.weight", 3e38, |i| i / 32 == 94);
    volume
}

#[test]
fn a_batch_that_is_not_finite_is_skipped_and_named_with_its_step_and_records() {
    for precision in ["fp32", "bf16"] {
        let volume = poisoned(|i| i == 17);
        let launch = sft().processes(2).with("/dataset/evalFraction", json!(0.0)).with("/epochs", json!(2));
        let launch = launch.strategy(json!({"precision": precision, "sharding": "zero1"}));
        let end = volume.succeed(&launch);
        // Four steps an epoch, and in each of the two one that was skipped.
        let made = volume.trained("sft", 1);
        let skipped: Vec<u64> = (1..=8).filter(|step| !made.contains(step)).collect();
        assert_eq!((made.len(), skipped.len()), (6, 2));
        for step in skipped {
            let line =
                end.log.lines().find(|l| l.contains("a step was skipped") && l.contains(&format!("step {step}, ")));
            assert!(line.is_some_and(|l| l.contains("17") && l.contains("NaN") && l.contains("WARN")), "{}", end.log);
        }
        assert!(common::numbers(&volume.weights("sft")).iter().all(|x| x.is_finite()));
    }
}

#[test]
fn a_run_whose_batches_are_not_finite_ends_after_a_few() {
    let volume = poisoned(|i| i > 0);
    let mut launch = sft().processes(2).with("/dataset/evalFraction", json!(0.0)).with("/epochs", json!(9));
    launch.config["checkpoint"] = json!({"everySteps": 1});
    let end = volume.run(&launch);
    end.expect(76, "NotFinite", &["5 batches before", "step 6, records [", "NaN"]);
    assert_eq!((end.checkpoint(), volume.trained("sft", 1)), (Some(5), vec![]), "{}", end.message);
    // The next attempt has no more to spare.
    let end = volume.run(&launch.attempt(2));
    end.expect(76, "NotFinite", &["5 batches before", "step 6, records [", "NaN"]);
    assert_eq!((end.checkpoint(), volume.trained("sft", 2)), (Some(5), vec![]), "{}", end.message);
}

#[test]
fn weights_that_are_not_finite_are_refused_and_scores_found_by_the_first_evaluation_or_iteration() {
    let volume = Volume::new("llama-gqa-untied");
    poison(&volume, "models/base", "model.norm.weight", f32::NAN, |i| i == 0);
    volume.run(&sft()).expect(65, "BadInput", &["'model.norm.weight' holds NaN or infinity"]);

    let volume = finished("llama-gqa-untied", &reward());
    poison(&volume, "jobs/j/reward/model", "score.weight", 3e38, |_| true);
    let parts = ["the reward model 'liked' gave the score", "to the prompt \"w"];
    let told = |end: Finished, place: &str| end.expect(76, "NotFinite", &[&parts[..], &[place]].concat());
    told(volume.run(&ppo()), "the evaluation after iteration 0");
    // A clipped or replaced score is no more finite than it was.
    let blind = ppo().processes(2).with("/prompts/evalFraction", json!(0.0)).with("/clipReward", json!(2.0));
    told(volume.run(&blind.with("/missingEosPenalty", json!(-1.0)).adopting(1)), "iteration 1");
}

#[test]
fn a_stop_before_training_ends_at_once() {
    let volume = Volume::new("gpt2");
    let alone = volume.start_as(&sft(), &Pod::of_gang(0, 2, free_port()));
    wait_until("the rendezvous", || alone.log().contains("waiting for 2 ranks"));
    alone.signal(Signal::TERM);
    alone.wait().expect(143, "Terminated", &["rank 0", "before training began"]);

    let data = fs::read_to_string(volume.path("data/sft.jsonl")).unwrap() + "\n";
    fs::write(volume.path("data/sft.jsonl"), data.repeat(5000)).unwrap();
    let loading = volume.start(&endless(sft().processes(2)));
    wait_until("data to be loaded", || loading.log().contains("training starts"));
    loading.signal(Signal::TERM);
    loading.wait().expect(143, "Terminated", &["before training began"]);
}

#[test]
fn a_stop_in_a_save_leaves_no_half_checkpoint() {
    let volume = Volume::new("gpt2");
    let mut launch = endless(sft().processes(2));
    launch.config["checkpoint"] = json!({"everySteps": 1, "keep": 2});
    let running = volume.start(&launch);
    let checkpoints = volume.path("jobs/j/sft/checkpoints");
    let names = || -> Vec<String> {
        let entries = fs::read_dir(&checkpoints).into_iter().flatten();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    };
    wait_until("a save after the third", || {
        (0..2000).any(|_| volume.checkpoints("sft").last() > Some(&3) && names().iter().any(|n| n.ends_with(".tmp")))
    });
    running.signal(Signal::TERM);
    let end = running.wait();
    end.expect(143, "Terminated", &["the last checkpoint is of step"]);
    assert_eq!(end.message["step"].as_u64(), end.checkpoint());
    assert_eq!(volume.checkpoints("sft").last().copied(), end.checkpoint());
    assert!(names().iter().all(|name| !name.ends_with(".tmp")), "{:?}", names());
    goes_on(&volume, launch);
}

#[test]
fn a_stop_of_one_pod_stops_all_after_the_same_step() {
    let volume = Volume::new("gpt2");
    let pods = two_pods(&volume);
    pods[1].signal(Signal::TERM);
    let ends = pods.map(Running::wait);
    for end in &ends {
        end.expect(143, "Terminated", &["stopped on request"]);
    }
    assert!(ends[0].checkpoint() == ends[1].checkpoint() && ends[0].message["step"] == ends[1].message["step"]);
    assert_eq!(ends[0].message["step"].as_u64(), ends[0].checkpoint());
    goes_on(&volume, endless(sft()).processes(2));
}

#[test]
fn a_stop_in_a_long_step_gives_it_up() {
    let volume = Volume::new("gpt2");
    let data = fs::read_to_string(volume.path("data/sft.jsonl")).unwrap() + "\n";
    fs::write(volume.path("data/sft.jsonl"), data.repeat(500)).unwrap();
    let launch = sft().processes(2).with("/dataset/evalFraction", json!(0.0)).with("/maxSteps", json!(3));
    volume.succeed(&launch);
    // The same records, in a step that takes a minute.
    let long = launch.with("/batch", json!({"globalSize": 30_000, "microSize": 1})).with("/maxSteps", json!(9));
    let running = volume.start(&long.adopting(2));
    wait_until("the long step", || running.log().matches("resumed").count() == 2);
    stop_with(running, 3);
    assert_eq!(volume.trained("sft", 2), [0; 0]);
}

/// Sends SIGTERM and checks the end: 143, and a checkpoint of `step`.
fn stop_with(running: Running, step: u64) {
    running.signal(Signal::TERM);
    let end = running.wait();
    end.expect(143, "Terminated", &[&format!("the last checkpoint is of step {step}")]);
    assert_eq!(end.checkpoint(), Some(step), "{}", end.message);
}

/// PPO on many prompts, of which a share is held out, that saves only at the end and at a stop.
fn long_ppo(volume: &Volume, strategy: Value) -> Launch {
    let prompts: Vec<String> =
        (0..3000).map(|i| json!({"prompt": format!("w{} w{}", i % 90, i / 90)}).to_string()).collect();
    fs::write(volume.path("data/prompts.jsonl"), prompts.join("\n")).unwrap();
    let mut launch = ppo().processes(2).strategy(strategy);
    launch.config["checkpoint"] = json!({"everySteps": 100});
    launch
}

#[test]
fn a_stop_in_an_evaluation_or_a_rollout_of_ppo_saves_the_whole_iterations() {
    for strategy in [json!({}), json!({"sharding": "zero3"})] {
        let volume = finished("llama-gqa-untied", &reward());
        let evaluating = long_ppo(&volume, strategy.clone())
            .with("/prompts/evalFraction", json!(0.8))
            .with("/evalEveryIterations", json!(1));
        let running = volume.start(&evaluating);
        wait_until("the first iteration", || !volume.trained("ppo", 1).is_empty());
        stop_with(running, 1);

        // Long rollouts, of which little is learnt.
        let rolling =
            evaluating.with("/evalEveryIterations", json!(0)).with("/rolloutBatchSize", json!(6000)).adopting(2);
        let rolling = rolling.with("/batch", json!({"globalSize": 6000, "microSize": 1500})).with("/epochs", json!(1));
        let running = volume.start(&rolling);
        wait_until("the second iteration", || !volume.trained("ppo", 2).is_empty());
        stop_with(running, 2);
        assert_eq!(volume.trained("ppo", 2), [2]);
        let running = volume.start(&rolling.attempt(3));
        wait_until("the third iteration", || !volume.trained("ppo", 3).is_empty());
        assert_eq!(volume.trained("ppo", 3), [3]);
        drop(running);
    }
}

/// The iterations before are kept at their edge, however long ago the last checkpoint was: here it is due after a hundred. What is
/// learnt by half is not in them.
#[test]
fn a_stop_while_ppo_learns_saves_the_whole_iterations() {
    let frugal = json!({"sharding": "zero3", "offload": "parameters"});
    for strategy in [json!({}), json!({"sharding": "zero2"}), frugal] {
        // Iterations nearly all of which is learning, and more of them than this test may be late by.
        let mut launch = ppo().processes(2).strategy(strategy).with("/epochs", json!(40)).with("/iterations", json!(6));
        launch.config["checkpoint"] = json!({"everySteps": 100});
        let whole = finished("gpt2", &launch);
        let volume = finished("gpt2", &reward());
        let pod = Pod { http_port: free_port(), ..Pod::default() };
        let running = volume.start_as(&launch, &pod);
        wait_until("the third iteration", || volume.trained("ppo", 1).len() >= 2);
        let before = scored_seconds(pod.http_port);
        wait_until("answers to be scored", || scored_seconds(pod.http_port) > before);
        running.signal(Signal::TERM);
        let end = running.wait();
        // Two, unless this test was slow to see that the third had begun.
        let whole_iterations = volume.trained("ppo", 1).len() as u64;
        assert!((2..6).contains(&whole_iterations), "{}", end.log);
        end.expect(143, "Terminated", &[&format!("the last checkpoint is of step {whole_iterations}")]);
        assert_eq!(end.checkpoint(), Some(whole_iterations));
        volume.succeed(&launch.attempt(2));
        assert_eq!(volume.trained("ppo", 2), (whole_iterations + 1..=6).collect::<Vec<_>>());
        assert!(volume.weights("ppo") == whole.weights("ppo"), "it goes on as if it had never been stopped");
    }
}

/// Seconds that the worker on this port has scored answers.
fn scored_seconds(port: u16) -> f64 {
    let metrics = fetch(port, "/metrics").unwrap_or_default();
    let line = metrics.lines().find(|l| l.starts_with("rlhf_phase_seconds_total{") && l.contains("phase=\"score\""));
    line.and_then(|l| l.rsplit(' ').next()?.parse().ok()).unwrap_or_default()
}

#[test]
fn a_stop_in_the_export_lets_the_model_become_whole() {
    let volume = Volume::new("gpt2");
    // The export copies the tokenizer's files, and waits at this one until somebody writes into it.
    let pipe = volume.path("models/base/merges.txt");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let running = volume.start(&sft().processes(2));
    let unfinished = volume.path("jobs/j/sft/model.lease-1.tmp/config.json");
    wait_until("the export", || unfinished.exists());
    running.signal(Signal::TERM);
    wait_until("the signal to arrive", || running.log().matches("asked to stop: what is").count() == 2);
    assert!(!volume.path("jobs/j/sft/model").exists());
    fs::write(pipe, "").unwrap();
    running.wait().expect(0, "Done", &[]);
    assert!(!common::numbers(&volume.weights("sft")).is_empty());
}

/// Runs two workers with a /dev of their own: `/dev/shm` of one MiB, and the devices named in `extra`.
fn with_small_shm(volume: &Volume, extra: &str) -> Finished {
    let own_dev = "d=\"$0/dev\"; mkdir \"$d\" && mount -t tmpfs none \"$d\" || exit; \
        for f in null zero urandom random; do touch \"$d/$f\" && mount --bind \"/dev/$f\" \"$d/$f\" || exit; done; \
        mkdir \"$d/shm\" && mount -t tmpfs -o size=1M none \"$d/shm\" || exit; \
        for f in $1; do touch \"$d/$f\"; done; shift; mount --rbind \"$d\" /dev && exec \"$@\"";
    let root = volume.path("").display().to_string();
    let pod = Pod::default().under(&["unshare", "-rm", "sh", "-c", own_dev, &root, extra]);
    volume.start_as(&sft().processes(2).with("/maxSteps", json!(2)), &pod).wait()
}

#[test]
fn devices_that_were_given_and_cannot_be_used_are_an_error() {
    let volume = Volume::new("gpt2");
    let end = volume.start_as(&sft().processes(2), &Pod::default().env("RLHF_DEVICES", 2)).wait();
    end.expect(64, "BadConfig", &["given 2 devices", "CUDA is not available", "libtorch_cuda.so"]);
    assert!(volume.history("sft").is_empty());
    let trains = Pod::default().env("RLHF_DEVICES", 0);
    volume.start_as(&sft().with("/maxSteps", json!(2)), &trains).wait().expect(0, "Done", &[]);
}

#[test]
fn gpu_workers_need_shared_memory_and_others_do_not() {
    let refused = with_small_shm(&Volume::new("gpt2"), "nvidiactl");
    refused.expect(64, "BadConfig", &["/dev/shm has 1024 KiB", "emptyDir"]);
    with_small_shm(&Volume::new("gpt2"), "").expect(0, "Done", &[]);
}

#[test]
fn memory_that_cannot_be_had_is_said_with_where() {
    let volume = Volume::new("gpt2");
    let data = fs::read_to_string(volume.path("data/sft.jsonl")).unwrap() + "\n";
    fs::write(volume.path("data/sft.jsonl"), data.repeat(200)).unwrap();
    let small = sft().with("/dataset/evalFraction", json!(0.0)).with("/maxSteps", json!(2));
    volume.succeed(&small);
    // One step on 12000 records at once needs 1.3 GB of addresses, of which the program itself takes 0.6.
    let large = small.with("/batch", json!({"globalSize": 12_000, "microSize": 12_000})).with("/maxSteps", json!(3));
    let limited = Pod::default().under(&["prlimit", "--as=900000000"]);
    let end = volume.start_as(&large.clone().adopting(2), &limited).wait();
    end.expect(71, "DeviceOutOfMemory", &["can't allocate memory", "step 3, records ["]);
    assert_eq!(end.checkpoint(), Some(2));
    volume.succeed(&large.attempt(3));
    assert_eq!(volume.trained("sft", 3), [3]);
}
