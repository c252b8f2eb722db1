//! A dataset's files: found again as long as what they were made from is the same, and checked.

use super::*;
use crate::data::{Recipe, SftSample};
use crate::files;
use crate::hex::hex;
use crate::lease::Lease;
use crate::tokenizer::fixture::{changed, write_tokenizer};
use rlhf_api::config::StageConfig;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::time::{Duration, SystemTime};
use tempfile::TempDir;

fn stage(change: impl FnOnce(&mut Value)) -> StageConfig {
    let mut config = json!({
        "job": {"namespace": "n", "name": "j", "uid": "u"}, "stage": "tune", "seed": 1, "collectiveTimeoutSeconds": 60,
        "kind": {"sft": {
            "dataset": {"source": "volume://d.jsonl", "evalFraction": 0.3}, "format": "text", "epochs": 1,
            "batch": {"globalSize": 8}, "maxLength": 64, "optimizer": {"learningRate": 0.001}
        }},
        "paths": {"baseModel": "m", "startModel": "m", "output": "runs/x/tune/model", "checkpoints": "runs/x/tune/checkpoints"},
    });
    change(&mut config);
    serde_json::from_value(config).unwrap()
}

/// A volume with a tokenizer and a dataset.
fn volume() -> TempDir {
    let volume = tempfile::tempdir().unwrap();
    fs::create_dir(volume.path().join("m")).unwrap();
    write_tokenizer(&volume.path().join("m"));
    write_data(volume.path(), "a");
    volume
}

fn write_data(volume: &Path, text: &str) {
    let lines: String = (0..20).map(|i| format!("{}\n", json!({"text": format!("{text}{i}")}))).collect();
    fs::write(volume.join("d.jsonl"), lines).unwrap();
}

/// When the dataset was last written.
fn date(volume: &Path, seconds: u64) {
    let file = File::options().write(true).open(volume.join("d.jsonl")).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
}

fn find_or_make(volume: &Path, stage: &StageConfig) -> Result<Store> {
    Recipe::of(stage, volume).unwrap().find_or_make(&Lease::default())
}

/// The datasets in the stage's folder.
fn all(volume: &Path) -> Vec<String> {
    let mut names = files::names(&volume.join("runs/x/tune")).unwrap();
    names.sort_unstable();
    names
}

#[test]
fn a_dataset_is_made_once_and_again_where_what_it_was_made_from_is_another() {
    let volume = volume();
    let path = volume.path();
    date(path, 1_000_000);
    let same = stage(|_| ());
    let first = find_or_make(path, &same).unwrap();
    assert_eq!(all(path), [format!("data-{:016x}", first.name())]);
    assert_eq!((first.summary().train + first.summary().eval, first.rows() == [0; 32]), (20, false));
    // As long as length and time are the same it is not read again: here it has changed behind them.
    write_data(path, "b");
    date(path, 1_000_000);
    let again = find_or_make(path, &same).unwrap();
    assert_eq!((again.name(), again.digest()), (first.name(), first.digest()));
    // Where they are not, its bytes say.
    write_data(path, "a");
    date(path, 2_000_000);
    assert_eq!(find_or_make(path, &same).unwrap().name(), first.name());
    write_data(path, "b");
    date(path, 3_000_000);
    let other = find_or_make(path, &same).unwrap();
    assert!(other.name() != first.name() && other.file() != first.file() && other.rows() != first.rows());
    assert_eq!(all(path).len(), 2);
    // What is mapped stays as it was.
    let half: Half<SftSample> = Half::train(&Arc::new(first));
    assert_eq!(half.rows(&half.all()).unwrap().len(), half.len());
    // Settings that do not matter change nothing, and those that do make another.
    let names = |change: &dyn Fn(&mut Value)| find_or_make(path, &stage(change)).unwrap().name();
    assert_eq!(names(&|c| c["kind"]["sft"]["epochs"] = json!(5)), other.name());
    let changes: [&dyn Fn(&mut Value); 4] = [
        &|c| c["seed"] = json!(2),
        &|c| c["kind"]["sft"]["maxLength"] = json!(3),
        &|c| c["kind"]["sft"]["dataset"]["evalFraction"] = json!(0.1),
        &|c| c["kind"]["sft"]["packing"] = json!({}),
    ];
    for change in changes {
        assert_ne!(names(change), other.name());
    }
    let tokenizer = changed(|_, config| config["eos_token"] = json!("<turn>")).0;
    for name in files::names(tokenizer.path()).unwrap() {
        fs::copy(tokenizer.path().join(&name), path.join("m").join(&name)).unwrap();
    }
    assert_ne!(find_or_make(path, &same).unwrap().name(), other.name());
}

#[test]
fn what_a_killed_attempt_left_is_no_dataset_and_goes() {
    let volume = volume();
    let dir = volume.path().join("runs/x/tune");
    let left = dir.join("data-new-17-4.lease-0.tmp");
    fs::create_dir_all(&left).unwrap();
    fs::write(left.join("tokens"), [7; 9]).unwrap();
    let made = find_or_make(volume.path(), &stage(|_| ())).unwrap();
    files::remove_unfinished(&dir, 0).unwrap();
    assert_eq!(all(volume.path()), [format!("data-{:016x}", made.name())]);
    // Nor is anything left where the records cannot be used.
    fs::write(volume.path().join("d.jsonl"), "{}\n").unwrap();
    find_or_make(volume.path(), &stage(|_| ())).unwrap_err();
    assert_eq!(all(volume.path()).len(), 1);
}

#[test]
fn files_that_are_not_as_they_were_written_are_told_in_one_line() {
    let volume = volume();
    let stage = stage(|_| ());
    let name = find_or_make(volume.path(), &stage).unwrap().name();
    let dir = volume.path().join(format!("runs/x/tune/data-{name:016x}"));
    let damage = |file: &str, change: &dyn Fn(&mut Vec<u8>), parts: &[&str]| {
        let path = dir.join(file);
        let whole = fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        change(&mut bytes);
        fs::write(&path, bytes).unwrap();
        let found = find_or_make(volume.path(), &stage);
        fs::write(&path, whole).unwrap();
        let error = found.unwrap_err();
        let always = ["the tokenised dataset is damaged", "delete its folder", file];
        let said = parts.iter().chain(&always).all(|part| error.message.contains(part));
        assert!(error.exit.code() == 65 && said, "{error}");
        assert!(!error.message.contains('\n'), "{error}");
    };
    damage("tokens", &|bytes| bytes.truncate(bytes.len() - 1), &["bytes and should have"]);
    damage("train", &Vec::clear, &["0 bytes and should have"]);
    damage("dataset.json", &|bytes| bytes[20] ^= 1, &["its header is not what its hash says"]);
    damage("dataset.json", &Vec::clear, &["its header"]);
    damage("dataset.json", &|bytes| bytes.insert(0, 0xff), &["its header"]);
    let header = |from: &str, to: &str| {
        let (from, to) = (from.to_owned(), to.to_owned());
        move |bytes: &mut Vec<u8>| {
            let line = String::from_utf8(bytes.clone()).unwrap().lines().next().unwrap().replacen(&from, &to, 1);
            *bytes = format!(
                "{line}\n{}\n",
                hex(&<[u8; 32]>::from(sha2::Digest::finalize(sha2::Digest::chain_update(
                    <sha2::Sha256 as sha2::Digest>::new(),
                    &line
                ))))
            )
            .into_bytes();
        }
    };
    damage(
        "dataset.json",
        &header("\"version\":1", "\"version\":7"),
        &["of version 7, not 'rlhf-dataset' of version 1"],
    );
    damage("dataset.json", &header("rlhf-dataset", "other"), &["it is 'other'"]);
    // Numbers that lead nowhere are told when they are met, and nothing is read beyond an end.
    let ends = dir.join("sequences");
    let mut bytes = fs::read(&ends).unwrap();
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&ends, bytes).unwrap();
    let half: Half<SftSample> = Half::train(&Arc::new(find_or_make(volume.path(), &stage).unwrap()));
    let error = half.rows(&half.all()).unwrap_err();
    assert!(error.exit.code() == 65 && error.message.contains("its parts do not fit together"), "{error}");
}
