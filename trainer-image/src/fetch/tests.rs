//! Downloads from servers on loopback, with everything that goes wrong on the way.

mod server;

use super::*;
use rlhf_api::report::ExitCode;
use rlhf_api::source;
use server::{COMMIT, Server, Trouble};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::Path;
use std::time::Instant;
use tempfile::TempDir;

const QUICK: Patience = Patience {
    tries: 4,
    wait: Duration::from_millis(5),
    silence: Duration::from_secs(5),
    beat: Duration::from_millis(300),
    dead: Duration::from_secs(3),
};

/// Larger than a socket's buffers, so that a cut is one.
fn weights() -> Vec<u8> {
    (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn model() -> Server {
    let weights = weights();
    let server = Server::new(&[
        ("config.json", b"{}"),
        ("model.safetensors", &weights),
        ("pytorch_model.bin", b"the same again"),
        ("tokenizer.json", b"{\"a\": 1}"),
        ("q4.gguf", b"and again"),
    ]);
    server.with(|state| state.large.push("model.safetensors".into()));
    server
}

struct Volume {
    dir: TempDir,
    secrets: TempDir,
}

impl Volume {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), secrets: tempfile::tempdir().unwrap() }
    }

    fn secret(&self, name: &str, entries: &[(&str, &str)]) {
        fs::create_dir_all(self.secrets.path().join(name)).unwrap();
        for (entry, value) in entries {
            fs::write(self.secrets.path().join(name).join(entry), format!("{value}\n")).unwrap();
        }
    }

    fn fetch(&self, hub: &str, run: &str, uri: &str, secret: Option<&str>) -> Result<PathBuf> {
        self.fetch_by(hub, run, uri, secret, ("u", 1)).map(|(path, _)| path)
    }

    fn fetch_by(
        &self,
        hub: &str,
        run: &str,
        uri: &str,
        secret: Option<&str>,
        who: (&str, u32),
    ) -> Result<(PathBuf, Telemetry)> {
        let is_model = source::path(run, uri, false).is_none() || uri.ends_with("/model");
        let path = source::folder(run, uri);
        let remote = Remote {
            field: "spec.model.source".into(),
            uri: uri.into(),
            is_model,
            path: path.clone(),
            secret: secret.map(Into::into),
        };
        let job = serde_json::from_value(serde_json::json!({"namespace": "n", "name": "j", "uid": who.0})).unwrap();
        let config = PrepareConfig { job, stages: vec![], models: vec![], remote: vec![remote] };
        let setting = Setting {
            volume: self.dir.path().into(),
            secrets: self.secrets.path().into(),
            attempt: who.1,
            hub: Some(hub.into()),
            patience: QUICK,
        };
        let telemetry = Telemetry::new(&config.job, "prepare", 1, 0, 1)?;
        super::run(&config, &setting, &telemetry)?;
        Ok((self.dir.path().join(path), telemetry))
    }

    fn cached(&self) -> Vec<String> {
        let mut names = crate::files::names(&self.dir.path().join("cache")).unwrap();
        names.sort();
        names
    }
}

fn refused(error: &Error, exit: ExitCode, parts: &[&str]) {
    assert_eq!(error.exit, exit, "{error}");
    parts.iter().for_each(|part| assert!(error.message.contains(part), "{part} is not in: {error}"));
    assert!(!error.message.contains('\n'), "{error}");
}

const MODEL: &str = "hf://org/name";

#[test]
fn a_model_of_the_hub_is_fetched_once_and_shown_to_each_run_with_its_revision() {
    let (server, volume) = (model(), Volume::new());
    let (seen, telemetry) = volume.fetch_by(&server.url, "jobs/a", MODEL, None, ("u", 1)).unwrap();
    let mut names = crate::files::names(&seen).unwrap();
    names.sort();
    assert_eq!(names, [".source.json", "config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(fs::read(seen.join("model.safetensors")).unwrap(), weights());
    let note = fs::read_to_string(seen.with_extension("json")).unwrap();
    assert!(note.contains(COMMIT), "{note}");
    let progress = telemetry.progress();
    let all = (weights().len() + 2 + 8) as f64;
    assert_eq!(progress.metrics["bytesToFetch"], all);
    assert!(progress.activity > 0 && progress.metrics["fetchedBytes"] <= all);
    let (requests, files) = server.with(|s| (s.requests, s.asked.len()));
    // Another job: what the branch is has to be asked, no file.
    let other = volume.fetch(&server.url, "jobs/b", "hf://org/name@v1", None).unwrap();
    assert_eq!(fs::canonicalize(other).unwrap(), fs::canonicalize(&seen).unwrap());
    assert_eq!(server.with(|s| s.asked.len()), files);
    // The same run again: nothing.
    let asked = server.with(|s| s.requests);
    volume.fetch(&server.url, "jobs/a", MODEL, None).unwrap();
    assert_eq!(server.with(|s| s.requests), asked);
    assert!(asked > requests);
}

#[test]
fn a_run_keeps_its_revision_when_the_cache_was_emptied() {
    let (server, volume) = (model(), Volume::new());
    let seen = volume.fetch(&server.url, "jobs/a", MODEL, None).unwrap();
    fs::remove_dir_all(fs::canonicalize(&seen).unwrap()).unwrap();
    let note = seen.with_extension("json");
    let other = fs::read_to_string(&note).unwrap().replace(COMMIT, "ffff");
    fs::write(&note, &other).unwrap();
    let error = volume.fetch(&server.url, "jobs/a", MODEL, None).unwrap_err();
    refused(&error, ExitCode::BadInput, &["404"]);
    fs::write(&note, other.replace("ffff", COMMIT)).unwrap();
    let seen = volume.fetch(&server.url, "jobs/a", MODEL, None).unwrap();
    assert_eq!(fs::read(seen.join("model.safetensors")).unwrap(), weights());
}

#[test]
fn a_download_that_is_cut_goes_on_from_there() {
    let (server, volume) = (model(), Volume::new());
    // The config is asked for first, and comes.
    server.with(|s| s.trouble.extend([Trouble::Cut(99), Trouble::Cut(1_000_000), Trouble::Cut(700_000)]));
    let seen = volume.fetch(&server.url, "jobs/a", MODEL, None).unwrap();
    assert_eq!(fs::read(seen.join("model.safetensors")).unwrap(), weights());
    let ranges: Vec<_> =
        server.with(|s| s.asked.iter().filter(|a| a.0 == "model.safetensors").map(|a| a.1.clone()).collect());
    assert_eq!(ranges, [None, Some("bytes=1000000-".to_owned()), Some("bytes=1700000-".to_owned())]);
}

#[test]
fn the_next_attempt_goes_on_where_the_last_has_died() {
    let (server, volume) = (model(), Volume::new());
    server.with(|s| s.trouble.extend([Trouble::Cut(99), Trouble::Cut(1_500_000)]));
    server.with(|s| s.trouble.extend((0..4).map(|_| Trouble::Status(503, None))));
    let error = volume.fetch(&server.url, "jobs/a", MODEL, None).unwrap_err();
    refused(
        &error,
        ExitCode::Storage,
        &["spec.model.source hf://org/name: model.safetensors", "503", "4 times in a row"],
    );
    server.with(|s| s.asked.clear());
    let (seen, _) = volume.fetch_by(&server.url, "jobs/a", MODEL, None, ("u", 2)).unwrap();
    assert_eq!(fs::read(seen.join("model.safetensors")).unwrap(), weights());
    let asked = server.with(|s| s.asked.clone());
    assert_eq!(
        asked[0],
        ("model.safetensors".into(), Some("bytes=1500000-".into()), false),
        "and the config not again"
    );
}

#[test]
fn a_server_that_is_busy_is_asked_again_no_sooner_than_it_says() {
    let (server, volume) = (model(), Volume::new());
    server.with(|s| s.trouble.extend([Trouble::Status(429, Some("1")), Trouble::Status(503, None)]));
    let begun = Instant::now();
    volume.fetch(&server.url, "jobs/a", MODEL, None).unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(1));
}

#[test]
fn a_server_that_knows_no_ranges_is_read_from_the_start() {
    let (server, volume) = (model(), Volume::new());
    server.with(|s| s.trouble.extend([Trouble::Whole, Trouble::Cut(1_000_000), Trouble::Whole]));
    let seen = volume.fetch(&server.url, "jobs/a", MODEL, None).unwrap();
    assert_eq!(fs::read(seen.join("model.safetensors")).unwrap(), weights());
}

#[test]
fn what_was_changed_on_its_way_is_fetched_again_once_and_then_refused() {
    for (file, name) in [("config.json", "Git name"), ("model.safetensors", "SHA-256")] {
        let (server, volume) = (model(), Volume::new());
        let before = if file == "config.json" { vec![] } else { vec![Trouble::Whole] };
        server.with(|s| s.trouble.extend(before.iter().cloned().chain([Trouble::Changed])));
        let seen = volume.fetch(&server.url, "jobs/a", MODEL, None).unwrap();
        assert_eq!(fs::read(seen.join("model.safetensors")).unwrap(), weights());
        let volume = Volume::new();
        server.with(|s| s.trouble.extend(before.into_iter().chain([Trouble::Changed, Trouble::Changed])));
        let error = volume.fetch(&server.url, "jobs/a", MODEL, None).unwrap_err();
        refused(&error, ExitCode::BadInput, &[file, name, "should have"]);
        assert!(volume.cached().iter().all(|name| name.contains('.')), "nothing is whole: {:?}", volume.cached());
    }
}

#[test]
fn a_file_that_is_shorter_than_it_is_said_to_be_is_refused() {
    let (server, volume) = (Server::new(&[("d.jsonl", b"{}\n")]), Volume::new());
    server.with(|s| s.wrong_size = Some(9));
    let error = volume.fetch(&server.url, "jobs/a", "hf://datasets/org/name/d.jsonl", None).unwrap_err();
    refused(&error, ExitCode::Storage, &["d.jsonl", "it ended after 3 of 9 bytes", "4 times in a row"]);
    // One that is longer is cut, and has another hash.
    server.with(|s| s.wrong_size = Some(2));
    let error = Volume::new().fetch(&server.url, "jobs/a", "hf://datasets/org/name/d.jsonl", None).unwrap_err();
    refused(&error, ExitCode::BadInput, &["d.jsonl", "Git name"]);
}

#[test]
fn a_token_opens_what_is_closed_and_each_refusal_says_what_to_do() {
    let (server, volume) = (model(), Volume::new());
    server.with(|s| s.token = Some("hf_good".into()));
    let error = volume.fetch(&server.url, "jobs/a", MODEL, None).unwrap_err();
    refused(&error, ExitCode::BadInput, &["401", "private or gated", "secretRef"]);
    let requests = server.with(|s| s.requests);
    assert_eq!(requests, 1, "it is not asked again");
    volume.secret("old", &[("HF_TOKEN", "hf_expired"), ("HF_ENDPOINT", &server.url)]);
    let error = volume.fetch(&server.url, "jobs/a", MODEL, Some("old")).unwrap_err();
    refused(&error, ExitCode::BadInput, &["401", "Secret 'old'", "no longer"]);
    assert!(!error.message.contains("hf_"), "{error}");
    volume.secret("empty", &[("other", "x")]);
    refused(
        &volume.fetch(&server.url, "jobs/a", MODEL, Some("empty")).unwrap_err(),
        ExitCode::BadConfig,
        &["Secret 'empty'", "no entry HF_TOKEN"],
    );
    refused(
        &volume.fetch(&server.url, "jobs/a", MODEL, Some("none")).unwrap_err(),
        ExitCode::BadConfig,
        &["Secret 'none'"],
    );
    volume.secret("good", &[("HF_TOKEN", "hf_good"), ("HF_ENDPOINT", &server.url)]);
    // Of the hub it says where it is itself; what the environment says gets no token.
    let seen = volume.fetch("http://127.0.0.1:1", "jobs/a", MODEL, Some("good")).unwrap();
    assert!(server.with(|s| s.asked.iter().all(|a| a.2)));
    // No file of the volume has it.
    for name in crate::files::names(&seen).unwrap() {
        assert!(!String::from_utf8_lossy(&fs::read(seen.join(name)).unwrap()).contains("hf_good"));
    }
    let note = fs::read_to_string(seen.with_extension("json")).unwrap();
    assert!(!note.contains("hf_good"), "{note}");
    // Which was good for the listing, and is not for the files.
    let volume = Volume::new();
    volume.secret("good", &[("HF_TOKEN", "hf_good"), ("HF_ENDPOINT", &server.url)]);
    server.with(|s| s.trouble.extend([Trouble::Status(403, None)]));
    let error = volume.fetch(&server.url, "jobs/b", MODEL, Some("good")).unwrap_err();
    refused(&error, ExitCode::BadInput, &["config.json", "403", "Secret 'good'"]);
}

#[test]
fn what_is_not_there_is_told_by_its_name() {
    let (server, volume) = (model(), Volume::new());
    let refuse = |uri: &str, parts: &[&str]| {
        refused(&volume.fetch(&server.url, "jobs/a", uri, None).unwrap_err(), ExitCode::BadInput, parts)
    };
    refuse("hf://org/name@v9", &["hf://org/name@v9", "404", "revision"]);
    refuse("hf://datasets/org/name/none.jsonl", &["no file none.jsonl", COMMIT]);
    let bare = Server::new(&[("README.md", b"x")]);
    let error = volume.fetch(&bare.url, "jobs/a", MODEL, None).unwrap_err();
    refused(&error, ExitCode::BadInput, &["README.md", "model.safetensors"]);
    let nobody = volume.fetch("http://127.0.0.1:1", "jobs/a", MODEL, None).unwrap_err();
    refused(&nobody, ExitCode::Storage, &["the hub cannot be reached"]);
    let odd = volume.fetch("ftp://x", "jobs/a", MODEL, None).unwrap_err();
    refused(&odd, ExitCode::BadConfig, &["HF_ENDPOINT"]);
}

#[test]
fn a_volume_without_room_is_told_before_anything_comes() {
    let (server, volume) = (model(), Volume::new());
    server.with(|s| s.wrong_size = Some(1 << 60));
    let error = volume.fetch(&server.url, "jobs/a", MODEL, None).unwrap_err();
    refused(&error, ExitCode::Storage, &["are to come", "make room"]);
    assert_eq!(server.with(|s| s.asked.len()), 0);
}

#[test]
fn two_jobs_that_need_the_same_fetch_it_once() {
    let (server, volume) = (model(), Volume::new());
    std::thread::scope(|scope| {
        let (server, volume) = (&server, &volume);
        let jobs = ["a", "b", "c"].map(|job| {
            scope.spawn(move || volume.fetch_by(&server.url, &format!("jobs/{job}"), MODEL, None, (job, 1)))
        });
        for job in jobs {
            let (seen, _) = job.join().unwrap().unwrap();
            assert_eq!(fs::read(seen.join("model.safetensors")).unwrap(), weights());
        }
    });
    let fetched = server.with(|s| s.asked.iter().filter(|a| a.0 == "model.safetensors").count());
    assert_eq!(fetched, 1);
}

#[test]
fn one_that_died_while_it_fetched_is_replaced() {
    let (server, volume) = (model(), Volume::new());
    let seen = volume.fetch(&server.url, "jobs/a", MODEL, None).unwrap();
    let place = fs::canonicalize(&seen).unwrap();
    fs::remove_dir_all(&place).unwrap();
    // What a killed pod of another job leaves.
    let turns = crate::files::sibling(&place, "turns");
    let lease = crate::lease::Lease::take(&turns, Holder { job_uid: "dead".into(), attempt: 7 }, &[]).unwrap();
    fs::write(turns.join(format!("beat-{}", lease.number())), "12").unwrap();
    let begun = Instant::now();
    let (seen, _) = volume.fetch_by(&server.url, "jobs/b", MODEL, None, ("v", 1)).unwrap();
    assert!(begun.elapsed() >= QUICK.dead);
    assert!(lease.check().is_err() && seen.join("config.json").exists());
}

#[test]
fn a_web_address_is_what_its_hash_says() {
    let body = b"{\"text\": \"a\"}\n".repeat(1000);
    let hash: String = Sha256::digest(&body).iter().map(|b| format!("{b:02x}")).collect();
    let server = Server::new(&[("x/d.jsonl", &body)]);
    let (client, telemetry) = (
        Client::new(None, QUICK).unwrap(),
        Telemetry::new(
            &serde_json::from_value(serde_json::json!({"namespace": "n", "name": "j", "uid": "u"})).unwrap(),
            "prepare",
            1,
            0,
            1,
        )
        .unwrap(),
    );
    let fetch_as = |name: &str, hash: &str, volume: &Path| {
        let uri = format!("https://h/x/{name}?sig=private#sha256={hash}");
        let remote = Remote {
            field: "f".into(),
            uri: uri.clone(),
            is_model: false,
            path: source::folder("jobs/a", &uri),
            secret: None,
        };
        let origin = web::Web::new(&client, &format!("{}/x/d.jsonl", server.url), hash, name.into());
        let listing = patiently(QUICK, &telemetry, || origin.list(None))?;
        let cache = Cache::new(volume, &remote);
        let place = cache.place(&listing.revision, origin.server());
        turn::alone(&place, Holder { job_uid: "u".into(), attempt: 1 }, QUICK, &telemetry, |turn| {
            download::all(&origin, &listing, &place, turn, Pace::new(&remote.shown(), &listing, &telemetry), QUICK)?;
            place.publish(&remote.shown(), &listing)
        })?;
        cache.show(&place, &listing.revision)?;
        Ok::<_, Error>(volume.join(source::path("jobs/a", &uri, false).unwrap()))
    };
    let fetch = |hash: &str, volume: &Path| fetch_as("d.jsonl", hash, volume);
    let volume = Volume::new();
    server.with(|s| s.trouble.extend([Trouble::Whole, Trouble::Cut(500)]));
    let seen = fetch(&hash, volume.dir.path()).unwrap();
    assert_eq!(fs::read(&seen).unwrap(), body);
    let record = fs::read_to_string(seen.with_file_name(".source.json")).unwrap();
    assert!(record.contains("https://h/x/d.jsonl#sha256") && !record.contains("private"), "{record}");
    // The same file by another name is looked for by that.
    assert_eq!(fs::read(fetch_as("e.jsonl", &hash, volume.dir.path()).unwrap()).unwrap(), body);
    let error = fetch(&"0".repeat(64), volume.dir.path()).unwrap_err();
    refused(&error, ExitCode::BadInput, &["d.jsonl", "SHA-256", &hash]);
}

#[test]
fn a_folder_and_a_file_of_a_bucket_are_fetched_as_one_version() {
    let weights = weights();
    let server = Server::new(&[
        ("models/model/config.json", b"{}"),
        ("models/model/model.safetensors", &weights),
        ("models/model/old/x.bin", b"x"),
    ]);
    let volume = Volume::new();
    let keys = [
        ("AWS_ACCESS_KEY_ID", "id"),
        ("AWS_SECRET_ACCESS_KEY", "very-secret"),
        ("AWS_REGION", "here"),
        ("AWS_ENDPOINT_URL", &server.url),
    ];
    volume.secret("s3", &keys);
    server.with(|s| s.trouble.extend([Trouble::Status(503, None), Trouble::Cut(99), Trouble::Cut(1_000_000)]));
    let seen = volume.fetch("", "jobs/a", "s3://bucket/models/model", Some("s3")).unwrap();
    assert_eq!(fs::read(seen.join("model.safetensors")).unwrap(), weights);
    assert!(!seen.join("old").exists());
    assert!(server.with(|s| s.asked.iter().all(|a| a.2)), "each request is signed");
    let file = volume.fetch("", "jobs/a", "s3://bucket/models/model/config.json", Some("s3")).unwrap();
    assert_eq!(fs::read(file.join("config.json")).unwrap(), b"{}");
    // Another version of the same name is another place in the cache.
    server.with(|s| {
        s.tag = "\"tag-2\"".into();
        s.files.insert("models/model/config.json".into(), b"{ }".to_vec());
    });
    let file = volume.fetch("", "jobs/b", "s3://bucket/models/model/config.json", Some("s3")).unwrap();
    assert_eq!(fs::read(file.join("config.json")).unwrap(), b"{ }");
    server.with(|s| s.trouble.extend([Trouble::Status(403, None)]));
    let error = Volume::new();
    error.secret("s3", &keys);
    let error = error.fetch("", "jobs/a", "s3://bucket/models/model/config.json", Some("s3")).unwrap_err();
    refused(&error, ExitCode::BadInput, &["403", "Secret 's3'"]);
    assert!(!error.message.contains("very-secret"));
    let error = volume.fetch("", "jobs/a", "s3://bucket/none.jsonl", Some("s3")).unwrap_err();
    refused(&error, ExitCode::BadInput, &["404"]);
}
