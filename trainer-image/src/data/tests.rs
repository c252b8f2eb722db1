use super::files::Files;
use super::store::{MadeFrom, Source, Written};
use super::*;
use crate::error::Result;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::fixture::*;
use proptest::prelude::*;
use rlhf_api::stage::{Dataset, Ppo, RewardModel, Sft};
use serde_json::{Value, json};
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

fn dataset(eval: f64) -> Value {
    json!({"source": "volume://d.jsonl", "evalFraction": eval})
}

pub(super) fn sft(format: &str, max_length: u32, eval: f64) -> Sft {
    let optimizer = json!({"learningRate": 0.1});
    serde_json::from_value(json!({"dataset": dataset(eval), "format": format, "epochs": 1, "batch": {"globalSize": 1}, "maxLength": max_length, "optimizer": optimizer})).unwrap()
}

pub(super) fn reward(max_length: u32, eval: f64) -> RewardModel {
    let optimizer = json!({"learningRate": 0.1});
    serde_json::from_value(json!({"dataset": dataset(eval), "epochs": 1, "batch": {"globalSize": 1}, "maxLength": max_length, "optimizer": optimizer})).unwrap()
}

pub(super) fn ppo(max_prompt_length: u32, eval: f64) -> Ppo {
    let optimizer = json!({"learningRate": 0.1});
    serde_json::from_value(json!({
        "rewards": [{"name": "liked", "model": {"stage": "r"}}], "prompts": dataset(eval), "iterations": 1, "rolloutBatchSize": 1, "batch": {"globalSize": 1}, "maxPromptLength": max_prompt_length,
        "maxNewTokens": 1, "kl": {"coefficient": 0.1}, "actorOptimizer": optimizer, "criticOptimizer": optimizer
    }))
    .unwrap()
}

/// A dataset's one file, whatever the settings call it.
fn one(path: &Path, dataset: &Dataset) -> Files {
    let name = path.file_name().unwrap().to_str().unwrap();
    let dataset = Dataset { source: Some(format!("volume://{name}")), ..dataset.clone() };
    Files::of(path.parent().unwrap(), &dataset).unwrap()
}

/// A dataset with all its records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Split<T> {
    pub train: Vec<T>,
    pub eval: Vec<T>,
    pub summary: Summary,
    pub file: [u8; 32],
}

/// A dataset as `read` makes it, in memory: files are the store's own tests' matter.
fn made(read: impl FnOnce(Option<&Path>) -> Result<(Written, Vec<Source>)>) -> Result<Store> {
    let (written, files) = read(None)?;
    Ok(written.held(MadeFrom { recipe: "r".into(), files }))
}

fn split<T: Stored>(store: Store) -> Split<T> {
    let (summary, file, store) = (store.summary().clone(), store.file(), Arc::new(store));
    let all = |half: Half<T>| half.rows(&half.all()).unwrap();
    Split { train: all(Half::train(&store)), eval: all(Half::eval(&store)), summary, file }
}

fn sft_of(files: &Files, settings: &Sft, tokenizer: &Tokenizer, seed: u64) -> Result<Split<SftSample>> {
    made(|to| super::sft::read(files, settings, tokenizer, seed, to)).map(split)
}

fn rankings_of(files: &Files, settings: &RewardModel, tokenizer: &Tokenizer, seed: u64) -> Result<Split<Ranking>> {
    made(|to| super::rankings::read(files, settings, tokenizer, seed, to)).map(split)
}

fn prompts_of(files: &Files, settings: &Ppo, tokenizer: &Tokenizer, seed: u64) -> Result<Split<Prompt>> {
    made(|to| super::prompts::read(files, settings, tokenizer, seed, to)).map(split)
}

pub(super) fn load_sft(path: &Path, settings: &Sft, tokenizer: &Tokenizer, seed: u64) -> Result<Split<SftSample>> {
    sft_of(&one(path, &settings.dataset), settings, tokenizer, seed)
}

pub(super) fn load_rankings(
    path: &Path,
    settings: &RewardModel,
    tokenizer: &Tokenizer,
    seed: u64,
) -> Result<Split<Ranking>> {
    rankings_of(&one(path, &settings.dataset), settings, tokenizer, seed)
}

pub(super) fn load_prompts(path: &Path, settings: &Ppo, tokenizer: &Tokenizer, seed: u64) -> Result<Split<Prompt>> {
    prompts_of(&one(path, &settings.prompts), settings, tokenizer, seed)
}

/// A dataset file with this content.
fn file(content: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.jsonl");
    std::fs::write(&path, content).unwrap();
    (dir, path)
}

fn lines(records: &[Value]) -> String {
    records.iter().map(|r| format!("{r}\n")).collect()
}

fn read_sft(records: &[Value], settings: &Sft, tokenizer: &Tokenizer) -> Result<Split<SftSample>> {
    let (_dir, path) = file(lines(records));
    load_sft(&path, settings, tokenizer, 1)
}

fn read_rankings(records: &[Value], settings: &RewardModel, tokenizer: &Tokenizer) -> Result<Split<Ranking>> {
    let (_dir, path) = file(lines(records));
    load_rankings(&path, settings, tokenizer, 1)
}

fn read_prompts(records: &[Value], settings: &Ppo, tokenizer: &Tokenizer) -> Result<Split<Prompt>> {
    let (_dir, path) = file(lines(records));
    load_prompts(&path, settings, tokenizer, 1)
}

/// The one sample that a record becomes, as (ids, target ids).
fn sample(record: Value, settings: &Sft, tokenizer: &Tokenizer) -> (Vec<i64>, Vec<i64>) {
    let split = read_sft(&[record], settings, tokenizer).unwrap();
    let SftSample { tokens, target } = split.train.into_iter().next().unwrap();
    assert_eq!(tokens.len(), target.len());
    let targets = tokens.iter().zip(target).filter_map(|(&token, target)| target.then_some(token)).collect();
    (tokens, targets)
}

fn concat(parts: &[&[i64]]) -> Vec<i64> {
    parts.concat()
}

#[test]
fn every_token_of_a_text_but_the_first_is_a_target() {
    let settings = sft("text", 16, 0.0);
    assert_eq!(
        sample(json!({"text": "xyz"}), &settings, &plain()),
        (concat(&[&ids("xyz"), &[EOS]]), concat(&[&ids("yz"), &[EOS]]))
    );
    assert_eq!(
        sample(json!({"text": "xyz"}), &settings, &with_bos()),
        (concat(&[&[BOS], &ids("xyz"), &[EOS]]), concat(&[&ids("xyz"), &[EOS]]))
    );
}

#[test]
fn prompt_and_completion_are_one_text_and_eos_is_learnt() {
    let record = json!({"prompt": "xa", "completion": "bc", "id": 7});
    let mut settings = sft("promptCompletion", 16, 0.0);
    let tokens = vec![BOS, id('x'), ABC, EOS];
    assert_eq!(sample(record.clone(), &settings, &with_bos()), (tokens.clone(), vec![ABC, EOS]));
    settings.train_on_prompt = true;
    assert_eq!(sample(record, &settings, &with_bos()), (tokens.clone(), tokens[1..].to_vec()));
}

#[test]
fn eos_is_learnt_where_it_is_also_the_pad() {
    let tokenizer = changed(|_, config| config["pad_token"] = Value::Null).1.unwrap();
    assert_eq!(tokenizer.pad(), tokenizer.eos());
    assert_eq!(
        sample(json!({"prompt": "x", "completion": "y"}), &sft("promptCompletion", 16, 0.0), &tokenizer).1,
        [id('y'), EOS]
    );
}

#[test]
fn an_instruction_is_written_as_alpaca_writes_it() {
    let decode = |record: Value| {
        let (tokens, targets) = sample(record, &sft("instruction", 1000, 0.0), &plain());
        (plain().decode(&tokens).unwrap(), plain().decode(&targets).unwrap())
    };
    let plain = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:3".to_string();
    assert_eq!(decode(json!({"instruction": "Add.", "input": "", "output": "3"})), (plain.clone(), "3".into()));
    assert_eq!(decode(json!({"instruction": "Add.", "input": null, "output": "3"})).0, plain);
    assert_eq!(decode(json!({"instruction": "Add.", "output": "3"})).0, plain);
    let input = "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:3";
    assert_eq!(decode(json!({"instruction": "Add.", "input": "1 2", "output": "3"})).0, input);
}

#[test]
fn a_dialogue_is_rendered_and_the_assistant_is_learnt() {
    let record =
        json!({"messages": [{"role": "user", "content": "x", "name": "U"}, {"role": "assistant", "content": "y"}]});
    let mut settings = sft("chat", 100, 0.0);
    assert_eq!(sample(record.clone(), &settings, &plain()).1, [id('y'), EOS]);
    settings.train_on_prompt = true;
    let (tokens, targets) = sample(record, &settings, &plain());
    assert_eq!(targets, tokens[1..]);
}

#[test]
fn a_long_sample_loses_its_end_and_one_without_targets_is_dropped() {
    let record = |completion: &str| json!({"prompt": "xyz", "completion": completion});
    let split =
        read_sft(&[record("k"), record("kl"), record("klm")], &sft("promptCompletion", 5, 0.0), &plain()).unwrap();
    let tokens: Vec<_> = split.train.iter().map(|s| s.tokens.clone()).collect();
    assert_eq!(tokens, [concat(&[&ids("xyzk"), &[EOS]]), ids("xyzkl"), ids("xyzkl")]);
    assert_eq!(
        split.summary,
        Summary {
            records: 3,
            train: 3,
            truncated: 2,
            tokens: 15,
            longest_tokens: 5,
            sequences: 1,
            highest_id: id('z'),
            ..Default::default()
        }
    );

    let short = json!({"prompt": "x", "completion": "y"});
    let split = read_sft(&[record("k"), short], &sft("promptCompletion", 3, 0.5), &plain()).unwrap();
    assert_eq!(
        split.summary,
        Summary {
            records: 2,
            train: 1,
            dropped: 1,
            without_target: 1,
            tokens: 3,
            longest_tokens: 3,
            sequences: 1,
            highest_id: id('y'),
            ..Default::default()
        }
    );
    let error = read_sft(&[record("k"), record("l")], &sft("promptCompletion", 3, 0.0), &plain()).unwrap_err();
    assert!(
        ["d.jsonl", "2 dropped", "maxLength 3", "raise maxLength"].iter().all(|n| error.message.contains(n)),
        "{error}"
    );
}

#[test]
fn a_pair_a_ranking_and_whole_dialogues_become_sequences() {
    let records = [
        json!({"prompt": "xa", "chosen": "b", "rejected": ""}),
        json!({"prompt": "", "ranked": ["k", "l", "m"]}),
        json!({"chosen": "Q: x\nA: abc", "rejected": "Q: x\nA: k", "prompt": null}),
    ];
    let split = read_rankings(&records, &reward(32, 0.0), &plain()).unwrap();
    let sequences: Vec<_> = split.train.into_iter().map(|r| r.responses).collect();
    assert_eq!(sequences[0], [vec![id('x'), AB, EOS], concat(&[&ids("xa"), &[EOS]])]);
    assert_eq!(sequences[1], ["k", "l", "m"].map(|r| concat(&[&[BOS], &ids(r), &[EOS]])));
    assert_eq!(sequences[2], [concat(&[&ids("Q: x\nA: "), &[ABC, EOS]]), concat(&[&ids("Q: x\nA: k"), &[EOS]])]);
    assert_eq!(
        (split.summary.records, split.summary.tokens, split.summary.longest_tokens),
        (3, 3 + 3 + 9 + 10 + 10, 10)
    );
    assert_eq!(split.summary.empty, 1);
}

#[test]
fn responses_that_have_no_room_lose_their_ends_and_the_prompt_stays() {
    let record = json!({"prompt": "x", "chosen": "klmno", "rejected": "mlk"});
    let split = read_rankings(&[record], &reward(4, 0.0), &plain()).unwrap();
    assert_eq!(split.train, [Ranking { responses: vec![ids("xklm"), ids("xmlk")] }]);
    assert_eq!((split.summary.truncated, split.summary.dropped), (1, 0));
}

#[test]
fn a_long_ranking_loses_the_beginning_of_its_prompt_and_never_a_response_or_its_end() {
    let records = [
        json!({"prompt": "xyz", "chosen": "kl", "rejected": "k"}),
        json!({"prompt": "xyz", "chosen": "k", "rejected": "m"}),
        json!({"prompt": "x", "ranked": ["k", "m", "k"]}),
        json!({"prompt": "xyz", "chosen": "klm", "rejected": "k"}),
        json!({"chosen": "Q: x\nkl", "rejected": "Q: x\nk"}),
    ];
    let split = read_rankings(&records, &reward(4, 0.0), &plain()).unwrap();
    let ended = |text: &str| concat(&[&ids(text), &[EOS]]);
    // All sequences of a record lose the same.
    let expected = [["zkl", "zk"], ["yzk", "yzm"], ["\nkl", "\nk"]];
    assert_eq!(split.train, expected.map(|r| Ranking { responses: r.map(ended).to_vec() }));
    assert_eq!(
        split.summary,
        Summary {
            records: 5,
            train: 3,
            dropped: 2,
            unusable: 2,
            truncated: 3,
            tokens: 7 + 8 + 7,
            longest_tokens: 4,
            sequences: 2,
            highest_id: id('z'),
            ..Default::default()
        }
    );
    let bos = read_rankings(&records[1..2], &reward(4, 0.0), &with_bos()).unwrap();
    assert_eq!(bos.train[0].responses[0], [BOS, id('z'), id('k'), EOS]);
    let error = read_rankings(&records[3..4], &reward(4, 0.0), &plain()).unwrap_err();
    assert!(error.message.contains("maxLength 4") && error.message.contains("1 dropped"), "{error}");
}

#[test]
fn what_ends_already_is_not_ended_again() {
    let end = |text: &str| concat(&[&ids(text), &[EOS]]);
    let learn = |format, record| sample(record, &sft(format, 400, 0.0), &plain()).0;
    assert_eq!(learn("text", json!({"text": "x<eos>"})), end("x"));
    assert_eq!(learn("promptCompletion", json!({"prompt": "x", "completion": "y<eos>"})), end("xy"));
    let alpaca = learn("instruction", json!({"instruction": "x", "output": "y<eos>"}));
    assert_eq!(alpaca.iter().filter(|t| **t == EOS).count(), 1);
    let pair = json!({"prompt": "x", "chosen": "y<eos>", "rejected": "z"});
    let whole = json!({"chosen": "xy<eos>", "rejected": "xz<eos>"});
    let ranked = json!({"prompt": "x", "ranked": ["y<eos>", "z<eos>"]});
    let split = read_rankings(&[pair, whole, ranked], &reward(16, 0.0), &plain()).unwrap();
    assert!(split.train.iter().all(|r| r.responses == [end("xy"), end("xz")]), "{:?}", split.train);
}

#[test]
fn an_empty_response_is_counted_and_told() {
    let count = |format: &str, records: &[Value]| {
        let summary = read_sft(records, &sft(format, 400, 0.0), &plain()).unwrap().summary;
        (summary.empty, summary.warnings().iter().any(|w| w.contains("empty response")))
    };
    let completion = |text: &str| json!({"prompt": "x", "completion": text});
    assert_eq!(count("promptCompletion", &[completion(""), completion(" "), completion("y")]), (2, true));
    assert_eq!(count("promptCompletion", &[completion("y")]), (0, false));
    assert_eq!(count("instruction", &[json!({"instruction": "x", "output": ""})]), (1, true));
    let answer = |message: Value| json!({"messages": [{"role": "user", "content": "x"}, message]});
    assert_eq!(count("chat", &[answer(json!({"role": "assistant", "content": ""}))]), (1, true));
    let call =
        json!({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]});
    assert_eq!(count("chat", &[answer(call)]), (0, false));
}

#[test]
fn pairs_without_a_common_prompt_are_split_one_by_one() {
    let records: Vec<Value> =
        (0..40).map(|i| json!({"chosen": format!("a{i}"), "rejected": format!("b{i}")})).collect();
    let split = read_rankings(&records, &reward(16, 0.5), &plain()).unwrap();
    assert!(split.train.len() > 8 && split.eval.len() > 8, "{} {}", split.train.len(), split.eval.len());
    let records: Vec<Value> =
        (0..40).map(|i| json!({"prompt": "", "chosen": format!("a{i}"), "rejected": format!("b{i}")})).collect();
    let split = read_rankings(&records, &reward(16, 0.5), &plain()).unwrap();
    assert!(split.train.len() > 8 && split.eval.len() > 8, "{} {}", split.train.len(), split.eval.len());
}

#[test]
fn a_byte_order_mark_is_skipped_and_an_array_told_apart() {
    let line = r#"{"prompt": "x"}"#;
    let (_dir, path) = file(format!("\u{feff}{line}\r\n{line}\r\n"));
    assert_eq!(load_prompts(&path, &ppo(3, 0.0), &plain(), 0).unwrap().summary.records, 2);
    let (_dir, path) = file(format!("{line}\n\u{feff}{line}\n"));
    assert!(load_prompts(&path, &ppo(3, 0.0), &plain(), 0).unwrap_err().message.contains(":2: not JSON"));
    for array in [format!("[{line}, {line}]"), format!("[\n  {line},\n  {line}\n]\n"), format!("\u{feff}\n [{line}]")] {
        let (_dir, path) = file(array);
        let message = load_prompts(&path, &ppo(3, 0.0), &plain(), 0).unwrap_err().message;
        assert!(message.contains("begins with an array") && message.contains("jq -c '.[]'"), "{message}");
    }
}

/// Whatever is in it, and however much of it the reader wants to see at once.
#[test]
fn the_hash_is_that_of_the_files_bytes() {
    use sha2::{Digest, Sha256};
    let plain_text = "{\"prompt\": \"x\"}\n".repeat(3000);
    let packed = zstd::encode_all(plain_text.as_bytes(), 0).unwrap();
    for content in [plain_text.as_bytes(), &packed[..]] {
        let (_dir, path) = file(content);
        let hash: [u8; 32] = Sha256::digest(content).into();
        assert_eq!(load_prompts(&path, &ppo(3, 0.0), &plain(), 0).unwrap().file, hash);
    }
}

#[test]
fn a_packed_file_is_read_as_what_is_in_it() {
    use std::io::Write;
    let lines = format!("\u{feff}{}\n", r#"{"prompt": "x"}"#);
    let gzip = |text: &str| {
        let mut out = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        out.write_all(text.as_bytes()).unwrap();
        out.finish().unwrap()
    };
    let more = "{\"prompt\": \"y\"}\n";
    // Two members of gzip one after the other are one file.
    let zstd = zstd::encode_all([&lines[..], more].concat().as_bytes(), 0).unwrap();
    for packed in [[gzip(&lines), gzip(more)].concat(), zstd] {
        let (_dir, path) = file(&packed);
        let split = load_prompts(&path, &ppo(3, 0.0), &plain(), 0).unwrap();
        assert_eq!(split.train.iter().map(|p| p.text.as_str()).collect::<Vec<_>>(), ["x", "y"]);
        let (_dir, path) = file(&packed[..packed.len() - 3]);
        let error = load_prompts(&path, &ppo(3, 0.0), &plain(), 0).unwrap_err();
        assert!(error.exit.code() == 65 && error.message.contains("cannot be unpacked"), "{error}");
    }
    let (_dir, path) = file(b"PAR1\x15");
    assert!(
        load_prompts(&path, &ppo(3, 0.0), &plain(), 0).unwrap_err().message.contains("the Parquet file cannot be read")
    );
}

/// Messages as their template gets them: this one writes a message as JSON.
pub(super) fn as_json() -> Tokenizer {
    let template = "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m | tojson }}{% endfor %}{% if add_generation_prompt %}{{ mode or '' }}>{% endif %}";
    changed(|_, config| config["chat_template"] = json!(template)).1.unwrap()
}

fn rendered(record: Value) -> String {
    let split = read_prompts(&[record], &ppo(400, 0.0), &as_json()).unwrap();
    split.train[0].text.clone()
}

/// Expected: `apply_chat_template` of transformers 5.24, which leaves out nulls and repeats thoughts under the names that
/// templates look for.
#[test]
fn everything_a_message_says_reaches_the_template_in_its_order() {
    let line = r#"{"tools": [{"type": "f", "b": 1, "a": 1.0}], "messages": [{"role": "user", "content": [{"type": "text", "text": "é"}], "name": "U"}, {"content": null, "role": "assistant", "tool_calls": [{"z": 1, "a": {"y": 2, "b": []}}]}, {"role": "tool", "content": "3", "tool_call_id": "i"}]}"#;
    let (_dir, path) = file(line);
    let text = load_prompts(&path, &ppo(400, 0.0), &as_json(), 0).unwrap().train[0].text.clone();
    let expected = concat!(
        r#"[{"type": "f", "b": 1, "a": 1.0}]{"role": "user", "content": [{"type": "text", "text": "é"}], "name": "U"}"#,
        r#"{"role": "assistant", "tool_calls": [{"z": 1, "a": {"y": 2, "b": []}}]}{"role": "tool", "content": "3", "tool_call_id": "i"}>"#
    );
    assert_eq!(text, expected);
    let thought = rendered(
        json!({"prompt": [{"role": "assistant", "content": "a", "reasoning": "t"}, {"role": "user", "content": "b"}], "chat_template_kwargs": {"mode": "m"}}),
    );
    assert!(thought.contains(r#""thinking": "t""#) && thought.contains(r#""reasoning_content": "t""#), "{thought}");
    assert!(thought.ends_with("m>"), "{thought}");
}

#[test]
fn a_turn_of_weight_0_is_never_learnt() {
    let messages = json!([
        {"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0},
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "z", "weight": 1}
    ]);
    let mut settings = sft("chat", 100, 0.0);
    let record = json!({"messages": messages});
    assert_eq!(sample(record.clone(), &settings, &plain()).1, [id('z'), EOS]);
    settings.train_on_prompt = true;
    assert!(!sample(record, &settings, &plain()).1.contains(&id('y')));
    let none = json!({"messages": [{"role": "assistant", "content": "y", "weight": 0}]});
    let error = read_sft(&[none], &sft("chat", 100, 0.0), &plain()).unwrap_err();
    assert!(error.message.contains("1 dropped"), "{error}");
}

/// A job in chat form means the same in all three stages.
#[test]
fn dialogues_are_prompts_and_preferences_too() {
    let turn = |role: &str, text: &str| json!({"role": role, "content": text});
    let prompt = json!([turn("user", "x")]);
    let asked = read_prompts(&[json!({"prompt": prompt})], &ppo(99, 0.0), &plain()).unwrap().train.remove(0);
    assert_eq!(asked.text, "<turn>user:x<eos>\n<turn>assistant:");
    let answer = |text: &str| concat(&[&asked.tokens, &ids(text), &[EOS]]);
    let apart = json!({"prompt": prompt, "chosen": [turn("assistant", "y")], "rejected": [turn("assistant", "z")]});
    let whole = json!({"chosen": [turn("user", "x"), turn("assistant", "y")], "rejected": [turn("user", "x"), turn("assistant", "z")]});
    let split = read_rankings(&[apart, whole], &reward(99, 0.0), &plain()).unwrap();
    // As a rollout leaves it: nothing after the end token.
    assert!(split.train.iter().all(|r| r.responses == [answer("y"), answer("z")]), "{:?}", split.train);
    let learnt = json!({"prompt": [turn("assistant", "k"), turn("user", "x")], "completion": [turn("assistant", "y")]});
    assert_eq!(sample(learnt, &sft("promptCompletion", 99, 0.0), &plain()).1, [id('y'), EOS]);
    for (record, part) in
        [(json!({"prompt": [turn("assistant", "y")]}), "ends with an answer"), (json!({"messages": []}), "no message")]
    {
        let error = read_prompts(&[record], &ppo(99, 0.0), &plain()).unwrap_err();
        assert!(error.message.contains("d.jsonl:1: ") && error.message.contains(part), "{error}");
    }
    let unanswered = json!({"chosen": [turn("user", "x")], "rejected": [turn("user", "y")]});
    let error = read_rankings(&[unanswered], &reward(99, 0.0), &plain()).unwrap_err();
    assert!(error.message.contains("field 'chosen' ends with a message of the role 'user'"), "{error}");
}

/// Answers that begin alike are still answers: of what they say nothing is cut, and it does not tell one prompt from another.
#[test]
fn what_answers_begin_with_in_common_is_no_part_of_the_prompt() {
    let turn = |role: &str, text: &str| json!({"role": role, "content": text});
    let asked = turn("user", "ppp");
    let (good, bad) = ("same\nbeginning y", "same\nbeginning z");
    let apart = json!({"prompt": [asked], "chosen": [turn("assistant", good)], "rejected": [turn("assistant", bad)]});
    let whole = json!({"chosen": [asked, turn("assistant", good)], "rejected": [asked, turn("assistant", bad)]});
    let prompt = "<turn>user:ppp<eos>\n<turn>assistant:";
    let prompt_len = plain().encode(prompt).unwrap().len();
    let answer = |text: &str| concat(&[&plain().encode(text).unwrap(), &[EOS]]);
    for record in [apart, whole] {
        let split = |room: usize| read_rankings(std::slice::from_ref(&record), &reward(room as u32, 0.0), &plain());
        let room = answer(good).len() + 1;
        let cut = split(room).unwrap().train.remove(0).responses;
        assert_eq!(cut, [good, bad].map(|text| concat(&[&[id(':')], &answer(text)])));
        // No room for a token of the prompt: what is left of either is the same beginning.
        let error = split(room - 1).unwrap_err();
        assert!(error.message.contains("their responses are the same"), "{error}");
        assert!(split(prompt_len + room).unwrap().summary.truncated == 0);
    }
    let pair = |i: usize, line: &str| {
        let answer = |end: &str| [turn("user", &i.to_string()), turn("assistant", &format!("{line}\n{end}"))];
        json!({"chosen": answer("y"), "rejected": answer("z")})
    };
    let records: Vec<Value> = (0..40).flat_map(|i| [pair(i, "k"), pair(i, "q")]).collect();
    assert_no_question_is_in_both_halves(&records);
}

#[test]
fn a_long_prompt_keeps_its_end_and_its_bos() {
    let records = [json!({"prompt": "abcxyz"})];
    let tokens = |max: u32, tokenizer: &Tokenizer| {
        read_prompts(&records, &ppo(max, 0.0), tokenizer).unwrap().train.remove(0).tokens
    };
    assert_eq!(tokens(3, &plain()), ids("xyz"));
    assert_eq!(tokens(4, &plain()), concat(&[&[ABC], &ids("xyz")]));
    assert_eq!(tokens(3, &with_bos()), concat(&[&[BOS], &ids("yz")]));
    assert_eq!(tokens(1, &with_bos()), ids("z"));
    let split = read_prompts(&records, &ppo(3, 0.0), &plain()).unwrap();
    assert_eq!((split.train[0].text.as_str(), split.summary.truncated), ("abcxyz", 1));
}

#[test]
fn an_empty_prompt_is_bos_alone_or_an_error() {
    let records = [json!({"prompt": ""})];
    assert_eq!(read_prompts(&records, &ppo(3, 0.0), &plain()).unwrap().train[0].tokens, [BOS]);
    let error = read_prompts(&records, &ppo(3, 0.0), &without_bos()).unwrap_err();
    assert!(error.message.contains("d.jsonl:1: the prompt is empty"), "{error}");
}

#[test]
fn a_wrong_record_is_named_with_line_field_and_what_is_expected() {
    let messages = |m: Value| json!({"messages": m});
    for (format, record, names) in [
        ("text", json!({"txt": "x"}), vec!["field 'text' is missing", r#"{"text": string} (format text)"#]),
        ("promptCompletion", json!({"prompt": "x"}), vec!["field 'completion' is missing", "format promptCompletion"]),
        (
            "promptCompletion",
            json!({"prompt": "x", "completion": 3}),
            vec!["field 'completion' is a number, not a string"],
        ),
        ("promptCompletion", json!(["x"]), vec!["the file begins with an array", "expected {\"prompt\""]),
        (
            "instruction",
            json!({"instruction": "x", "output": "y", "input": {}}),
            vec!["field 'input' is an object, not a string"],
        ),
        ("chat", messages(json!("x")), vec!["field 'messages' is a string, not an array"]),
        (
            "chat",
            messages(json!([{"role": "user", "content": null}])),
            vec!["field 'messages[0].content' is null, not a string"],
        ),
        ("chat", messages(json!([{"content": "x"}])), vec!["field 'messages[0].role' is missing"]),
        (
            "chat",
            messages(json!([{"role": "assistant", "content": "x", "contnet": "y"}])),
            vec!["field 'messages[0].contnet' is a key that nothing understands", "tool_calls"],
        ),
        (
            "chat",
            messages(json!([{"role": "assistant", "content": "x", "weight": 0.5}])),
            vec!["field 'messages[0].weight' is 0.5"],
        ),
        (
            "chat",
            messages(json!([{"role": "user", "content": [{"type": "image", "url": "u"}]}])),
            vec!["field 'messages[0].content[0]' is of the type 'image'"],
        ),
        (
            "chat",
            json!({"messages": [{"role": "assistant", "content": "x"}], "tools": {}}),
            vec!["field 'tools' is an object"],
        ),
        (
            "chat",
            messages(json!([{"role": "gpt", "content": "x"}])),
            vec!["no message has the role 'assistant'", "[gpt]"],
        ),
        ("chat", messages(json!([])), vec!["no message has the role 'assistant'"]),
    ] {
        let (_dir, path) = file(format!("\n  \r\n{record}\n"));
        let error = load_sft(&path, &sft(format, 16, 0.0), &plain(), 0).unwrap_err();
        assert_eq!(error.exit.code(), 65);
        assert!(error.message.starts_with(&format!("{}:3: ", path.display())), "{error}");
        assert!(names.iter().all(|n| error.message.contains(n)), "{error}");
    }
    for (record, names) in [
        (json!({"prompt": "x", "chosen": "y"}), vec!["field 'rejected' is missing", "ranked"]),
        (json!({"chosen": ["y"], "rejected": "n"}), vec!["field 'chosen[0]' is a string, not an object"]),
        (json!({"prompt": "x", "ranked": ["y"]}), vec!["'ranked' has 1 responses"]),
        (json!({"prompt": "x", "ranked": ["y", 2]}), vec!["field 'ranked[1]' is a number"]),
        (json!({"ranked": ["y", "n"]}), vec!["field 'prompt' is missing"]),
    ] {
        let error = read_rankings(&[record], &reward(16, 0.0), &plain()).unwrap_err();
        assert!(names.iter().all(|n| error.message.contains(n)) && error.message.contains("d.jsonl:1: "), "{error}");
    }
}

#[test]
fn a_template_that_refuses_a_record_is_named_with_its_line() {
    let tokenizer = changed(|_, config| config["chat_template"] = json!("{{ raise_exception('no') }}")).1.unwrap();
    let record = json!({"messages": [{"role": "assistant", "content": "x"}]});
    let error = read_sft(&[record], &sft("chat", 16, 0.0), &tokenizer).unwrap_err();
    assert!(error.message.contains("d.jsonl:1: the chat template refuses this dialogue: no"), "{error}");
}

#[test]
fn a_file_that_cannot_be_used_is_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    for (name, what) in [("none", "No such file"), ("folder", "not a file")] {
        let path = dir.path().join(name);
        let error = load_prompts(&path, &ppo(3, 0.0), &plain(), 0).unwrap_err();
        assert!(
            error.exit.code() == 65 && error.message.contains(what) && error.message.contains("JSON Lines"),
            "{error}"
        );
    }
    let (_dir, path) = file(" \n\n");
    assert!(load_prompts(&path, &ppo(3, 0.0), &plain(), 0).unwrap_err().message.contains("the file has no record"));
    let (_dir, path) = file("{\"prompt\": \"x\"}\n{\"prompt\": \"\u{1}\"}");
    let error = load_prompts(&path, &ppo(3, 0.0), &plain(), 0).unwrap_err().message;
    assert!(
        error.contains(":2: not JSON: control character")
            && error.contains("at column 13")
            && !error.contains("line 1"),
        "{error}"
    );
    let (_dir, path) = file(format!("{{\"prompt\": \"{}\"}}", "x".repeat(64 << 20)));
    assert!(
        load_prompts(&path, &ppo(3, 0.0), &plain(), 0)
            .unwrap_err()
            .message
            .contains(":1: the line is longer than 64 MiB")
    );
}

#[test]
fn the_split_never_changes_between_versions() {
    let records: Vec<Value> = (0..20).map(|i| json!({"prompt": format!("p{i}")})).collect();
    let split = read_prompts(&records, &ppo(9, 0.2), &plain()).unwrap();
    let eval: Vec<&str> = split.eval.iter().map(|p| p.text.as_str()).collect();
    // sha256(seed 1 as eight little-endian bytes, then the prompt), its first eight bytes big-endian, below 0.2 * 2^64.
    assert_eq!(eval, ["p1", "p5", "p10", "p11", "p12"]);
    let records: Vec<Value> = (0..20).map(|i| json!({"text": format!("p{i}")})).collect();
    let split = read_sft(&records, &sft("text", 9, 0.2), &plain()).unwrap();
    let eval: Vec<String> = split.eval.iter().map(|s| plain().decode(&s.tokens).unwrap()).collect();
    // The same with the line's number, from 1, as eight little-endian bytes in the prompt's place.
    assert_eq!(eval, ["p1", "p3", "p6", "p10", "p11", "p17"]);
}

/// A volume with these files, and the settings of a stage that reads the dataset.
fn several(files: &[(&str, &[Value])], dataset: Value) -> (TempDir, Files) {
    let dir = tempfile::tempdir().unwrap();
    for (name, records) in files {
        std::fs::write(dir.path().join(name), lines(records)).unwrap();
    }
    let files = Files::of(dir.path(), &serde_json::from_value(dataset).unwrap()).unwrap();
    (dir, files)
}

fn texts_of(samples: &[SftSample]) -> Vec<String> {
    samples.iter().map(|s| plain().decode(&s.tokens).unwrap()).collect()
}

#[test]
fn several_files_are_one_dataset_and_each_counts_by_its_weight() {
    let records = |letter: &str| (0..200).map(|i| json!({"text": format!("{letter}{i}")})).collect::<Vec<_>>();
    let (a, b, c) = (records("a"), records("b"), records("c"));
    let dataset = json!({"evalFraction": 0.1, "sources": [
        {"source": "volume://a.jsonl"}, {"source": "volume://b.jsonl", "weight": 2.5}, {"source": "volume://c.jsonl", "weight": 0.25}
    ]});
    let files = [("a.jsonl", &a[..]), ("b.jsonl", &b[..]), ("c.jsonl", &c[..])];
    let load = |dataset: Value| {
        let (_dir, files) = several(&files, dataset);
        sft_of(&files, &sft("text", 9, 0.9), &plain(), 1).unwrap()
    };
    let split = load(dataset.clone());
    let (train, eval) = (texts_of(&split.train), texts_of(&split.eval));
    let of = |letter: &str, half: &[String]| half.iter().filter(|t| t.starts_with(letter)).cloned().collect::<Vec<_>>();
    let held_out = ["a", "b", "c"].map(|letter| of(letter, &eval).len());
    assert!(held_out.iter().all(|n| (8..40).contains(n)), "{held_out:?}");
    // The same lines of two files are no pair.
    let numbers = |letter: &str| of(letter, &eval).iter().map(|t| t[1..].to_string()).collect::<BTreeSet<_>>();
    assert_ne!(numbers("a"), numbers("b"));
    assert_eq!(of("a", &train).len() + held_out[0], 200, "every record once");
    let count = |text: &String| train.iter().filter(|t| *t == text).count();
    let of_b: BTreeSet<String> = of("b", &train).into_iter().collect();
    assert!(of_b.len() + held_out[1] == 200 && of_b.iter().all(|t| (2..=3).contains(&count(t))));
    let thrice = of_b.iter().filter(|t| count(t) == 3).count();
    assert!((60..120).contains(&thrice), "{thrice} of {}", of_b.len());
    assert!((30..60).contains(&of("c", &train).len()) && of("c", &train).iter().all(|t| count(t) == 1));
    assert!(train.iter().all(|t| !eval.contains(t)));
    assert_eq!(
        (split.summary.records, split.summary.train, split.summary.eval),
        (600, train.len() as u64, eval.len() as u64)
    );
    assert_eq!(split, load(dataset), "it is the same every time");
    // A file alone is read, and hashed, as it was before there could be several.
    let one = load(json!({"source": "volume://a.jsonl", "evalFraction": 0.1}));
    let same = load(json!({"sources": [{"source": "volume://a.jsonl"}], "evalFraction": 0.1}));
    assert_eq!(one, same);
    assert_eq!(of("a", &eval), texts_of(&one.eval), "a file's split does not depend on the others");
    assert_ne!(one.file, split.file);
}

#[test]
fn records_for_evaluation_may_lie_in_a_file_of_their_own() {
    let prompts =
        |letter: &str, n: usize| (0..n).map(|i| json!({"prompt": format!("{letter}{i}")})).collect::<Vec<_>>();
    let (train, eval) = (prompts("t", 30), prompts("e", 3));
    let dataset = json!({"source": "volume://t.jsonl", "evalSource": "volume://e.jsonl", "evalFraction": 0.5});
    let (_dir, files) = several(&[("t.jsonl", &train), ("e.jsonl", &eval)], dataset.clone());
    let split = prompts_of(&files, &ppo(9, 0.5), &plain(), 1).unwrap();
    assert_eq!(split.eval.iter().map(|p| p.text.as_str()).collect::<Vec<_>>(), ["e0", "e1", "e2"]);
    assert_eq!((split.train.len(), split.summary.records, split.summary.eval), (30, 33, 3));
    assert!(split.train.iter().all(|p| p.text.starts_with('t')));
    let (_dir, files) = several(&[("t.jsonl", &train), ("e.jsonl", &[])], dataset);
    let error = prompts_of(&files, &ppo(9, 0.5), &plain(), 1).unwrap_err();
    assert!(error.message.contains("e.jsonl: no record for evaluation is left"), "{error}");
}

#[test]
fn fields_may_have_other_names_and_are_told_by_both() {
    let turn = |role: &str, text: &str| json!({"role": role, "content": text});
    let records = [
        json!({"question": "x", "best": "y", "worst": "z", "prompt": 7}),
        json!({"question": [turn("user", "q")], "best": [turn("assistant", "k")], "worst": [turn("assistant", "l")]}),
    ];
    let fields = json!({"prompt": "question", "chosen": "best", "rejected": "worst"});
    let load = |records: &[Value], fields: &Value| {
        let dataset = json!({"evalFraction": 0, "sources": [{"source": "volume://d.jsonl", "fields": fields}]});
        let (_dir, files) = several(&[("d.jsonl", records)], dataset);
        rankings_of(&files, &reward(64, 0.0), &plain(), 1)
    };
    let plainly = [
        json!({"prompt": "x", "chosen": "y", "rejected": "z"}),
        json!({"prompt": [turn("user", "q")], "chosen": [turn("assistant", "k")], "rejected": [turn("assistant", "l")]}),
    ];
    assert_eq!(load(&records, &fields).unwrap().train, load(&plainly, &json!({})).unwrap().train);
    let error = load(&plainly, &fields).unwrap_err();
    let said = [":1: field 'chosen' is missing", "where chosen is called 'best', prompt is called 'question'"];
    assert!(said.iter().all(|part| error.message.contains(part)), "{error}");
    let error = load(&records, &json!({"completion": "best"})).unwrap_err();
    assert!(error.exit.code() == 64 && error.message.contains("'completion' is no field of such a record"), "{error}");
}

#[test]
fn bad_records_are_skipped_where_that_is_asked_for_and_counted_and_told() {
    let load = |content: &str, how: &str| {
        let (_dir, path) = file(content);
        let mut settings = sft("text", 9, 0.0);
        settings.dataset.on_bad_record = serde_json::from_value(json!(how)).unwrap();
        load_sft(&path, &settings, &plain(), 1)
    };
    let good = "{\"text\": \"x\"}\n{\"txt\": \"y\"}\n{\"text\": \"z\"\n{\"text\": \"w\"}\n[1]\n";
    assert!(load(good, "fail").unwrap_err().message.contains("d.jsonl:2: field 'text' is missing"));
    let split = load(good, "skip").unwrap();
    assert_eq!(texts_of(&split.train).concat(), "xw");
    assert_eq!((split.summary.records, split.summary.bad, split.summary.dropped), (5, 3, 3));
    let warnings = split.summary.warnings().concat();
    assert!(
        warnings.contains("3 of 5 records cannot be used and were skipped") && warnings.contains("d.jsonl:2: field"),
        "{warnings}"
    );
    let error = load("{}\n{}\n", "skip").unwrap_err();
    assert!(
        error.message.contains("no record can be used, 2 dropped, the first: ") && error.message.contains(":1: "),
        "{error}"
    );
    // Of a line that is too long nothing is taken for another.
    let long = format!("{{\"text\": \"{}\"}}\n{{\"text\": \"x\"}}\n", "{\"text\": 1}".repeat(6 << 20));
    let split = load(&long, "skip").unwrap();
    assert_eq!((split.summary.records, split.summary.bad, texts_of(&split.train).concat()), (2, 1, "x".into()));
    // What is wrong with the file is no record's.
    let packed = zstd::encode_all(good.as_bytes(), 0).unwrap();
    let (_dir, path) = file(&packed[..packed.len() - 3]);
    let mut settings = sft("text", 9, 0.0);
    settings.dataset.on_bad_record = serde_json::from_value(json!("skip")).unwrap();
    assert!(load_sft(&path, &settings, &plain(), 1).unwrap_err().message.contains("cannot be unpacked"));
}

fn skipping(dataset: Value) -> Value {
    let mut dataset = dataset;
    dataset["onBadRecord"] = json!("skip");
    dataset
}

/// As where a file's `fields` are wrong: what is left is another dataset than was meant.
#[test]
fn a_file_of_which_no_record_can_be_used_is_an_error_beside_others_too() {
    let (good, bad) = ([json!({"text": "x"})], [json!({"txt": "y"}), json!({"txt": "z"})]);
    let sources = json!([{"source": "volume://good.jsonl"}, {"source": "volume://bad.jsonl"}]);
    let several_files = skipping(json!({"sources": sources, "evalFraction": 0}));
    let own_eval = skipping(json!({"source": "volume://good.jsonl", "evalSource": "volume://bad.jsonl"}));
    for dataset in [several_files, own_eval] {
        let (_dir, files) = several(&[("good.jsonl", &good), ("bad.jsonl", &bad)], dataset);
        let error = sft_of(&files, &sft("text", 9, 0.0), &plain(), 1).unwrap_err();
        let parts =
            ["bad.jsonl: no record can be used, 2 dropped, the first: ", "bad.jsonl:1: field 'text' is missing"];
        assert!(error.exit.code() == 65 && parts.iter().all(|part| error.message.contains(part)), "{error}");
        assert!(!error.message.contains("good.jsonl"), "{error}");
    }
}

/// A weight is how often a number stands in a list, and not how often a record is kept.
#[test]
fn a_large_weight_repeats_numbers_and_no_tokens() {
    let records: Vec<Value> = (0..3).map(|i| json!({"text": format!("some text {i}")})).collect();
    let of = |weight: f64| {
        let dataset = json!({"evalFraction": 0, "sources": [{"source": "volume://d.jsonl", "weight": weight}]});
        let (_dir, files) = several(&[("d.jsonl", &records)], dataset);
        let dir = tempfile::tempdir().unwrap();
        let (all, _) = super::sft::read(&files, &sft("text", 99, 0.0), &plain(), 1, Some(dir.path())).unwrap();
        let bytes = |part: &str| std::fs::metadata(dir.path().join(part)).unwrap().len();
        (all.summary, bytes("tokens"), bytes("train"))
    };
    let ((once, tokens, order), (often, same, longer)) = (of(1.0), of(1000.0));
    assert_eq!((once.train, often.train, order, longer), (3, 3000, 12, 12000));
    assert!(tokens == same && once.tokens == often.tokens && tokens == 4 * once.tokens);
}

#[test]
fn a_share_of_a_files_records_is_drawn_record_by_record_and_is_never_none() {
    let pair = |i: usize| json!({"prompt": "q", "chosen": format!("a{i}"), "rejected": format!("b{i}")});
    let load = |weight: f64, count: usize, seed: u64| {
        let records: Vec<Value> = (0..count).map(pair).collect();
        let sources = json!([{"source": "volume://d.jsonl", "weight": weight}, {"source": "volume://e.jsonl"}]);
        let other = [json!({"prompt": "p", "chosen": "y", "rejected": "z"})];
        let dataset = json!({"evalFraction": 0, "sources": sources});
        let (_dir, files) = several(&[("d.jsonl", &records), ("e.jsonl", &other)], dataset);
        rankings_of(&files, &reward(32, 0.0), &plain(), seed).unwrap().train.len() - 1
    };
    let drawn = load(0.5, 200, 1);
    assert!((70..130).contains(&drawn), "of one prompt {drawn} of 200 are drawn");
    for seed in 0..20 {
        assert_eq!(load(0.001, 3, seed), 1);
    }
}

#[test]
fn a_file_of_which_an_epoch_has_nothing_is_told() {
    let (long, short) = ([json!({"prompt": "xyz", "completion": "k"})], [json!({"prompt": "x", "completion": "y"})]);
    let sources = json!([{"source": "volume://long.jsonl"}, {"source": "volume://short.jsonl"}]);
    let dataset = json!({"evalFraction": 0, "sources": sources});
    let (_dir, files) = several(&[("long.jsonl", &long), ("short.jsonl", &short)], dataset);
    let split = sft_of(&files, &sft("promptCompletion", 3, 0.0), &plain(), 1).unwrap();
    let told = split.summary.warnings().into_iter().find(|warning| warning.contains("none of its records"));
    assert!(split.train.len() == 1 && told.is_some_and(|told| told.contains("long.jsonl")), "{:?}", split.summary);
}

#[test]
fn what_is_asked_in_training_and_evaluation_is_counted_and_told() {
    let prompt = |p: &str| json!({"prompt": p, "completion": "c", "chosen": "c", "rejected": "r", "text": p});
    let (train, eval) = (["p1", "p2", "p2", "p3"].map(prompt), ["p2", "p2", "p4", "p1"].map(prompt));
    let dataset = json!({"source": "volume://t.jsonl", "evalSource": "volume://e.jsonl"});
    let (_dir, files) = several(&[("t.jsonl", &train), ("e.jsonl", &eval)], dataset);
    let tokenizer = plain();
    for summary in [
        prompts_of(&files, &ppo(9, 0.0), &tokenizer, 1).unwrap().summary,
        rankings_of(&files, &reward(9, 0.0), &tokenizer, 1).unwrap().summary,
        sft_of(&files, &sft("promptCompletion", 9, 0.0), &tokenizer, 1).unwrap().summary,
        sft_of(&files, &sft("text", 9, 0.0), &tokenizer, 1).unwrap().summary,
    ] {
        assert_eq!(summary.eval_in_training, 3);
        assert!(summary.warnings()[0].starts_with("3 of 8 records are for evaluation though their prompt"));
    }
    let other = json!({"source": "volume://t.jsonl", "evalFraction": 0.3});
    let (_dir, files) = several(&[("t.jsonl", &train)], other);
    assert_eq!(prompts_of(&files, &ppo(9, 0.3), &tokenizer, 1).unwrap().summary.eval_in_training, 0);
}

/// More than a thread takes at a time, with an error in the middle: it is the first in the file, whoever finds one first.
#[test]
fn records_come_in_their_files_order_whichever_thread_encodes_them() {
    let text = |i: usize| format!("{i} {}", "abc".repeat(i % 50));
    let mut records: Vec<Value> = (0..10_000).map(|i| json!({"text": text(i)})).collect();
    let settings = sft("text", 400, 0.0);
    let tokenizer = plain();
    let split = read_sft(&records, &settings, &tokenizer).unwrap();
    assert!(split.train.len() == records.len());
    assert!(split.train.iter().enumerate().all(|(i, s)| tokenizer.decode(&s.tokens).unwrap() == text(i)));
    (7000..10_000).for_each(|i| records[i] = json!({"text": i}));
    let error = read_sft(&records, &settings, &plain()).unwrap_err();
    assert!(error.message.contains("d.jsonl:7001: field 'text' is a number"), "{error}");
}

/// A table is read for its hash after its last record, and nobody may take that for a stall.
#[test]
fn to_hash_a_file_is_a_sign_of_life() {
    let (_dir, path) = file(vec![7; 5 << 20]);
    let before = signs_of_life();
    super::records::hash(&path).unwrap();
    assert!(signs_of_life() - before >= 5);
}

fn packed(format: &str, max_length: u32, row: u32) -> Sft {
    let mut settings = sft(format, max_length, 0.0);
    settings.packing = serde_json::from_value(json!({"length": row})).unwrap();
    settings
}

#[test]
fn samples_are_packed_into_rows_and_come_back_as_they_were() {
    let lengths = [4usize, 3, 6, 5, 2, 9, 2];
    let records: Vec<Value> = lengths.iter().map(|n| json!({"text": "k".repeat(n - 1)})).collect();
    let (_dir, path) = file(lines(&records));
    let settings = packed("text", 9, 10);
    let files = one(&path, &settings.dataset);
    let store = Arc::new(made(|to| super::sft::read(&files, &settings, &plain(), 1, to)).unwrap());
    let train: Half<SftSample> = Half::train(&store);
    let rows = (0..train.len()).map(|i| train.row(i).unwrap().iter().map(|s| s.tokens.len()).collect::<Vec<_>>());
    assert_eq!(rows.collect::<Vec<_>>(), [vec![9], vec![6, 4], vec![5, 3, 2], vec![2]]);
    assert!(train.is_packed() && !Half::<SftSample>::eval(&store).is_packed());
    let summary = store.summary();
    assert_eq!((summary.train, summary.packed_rows, summary.longest_tokens), (7, Some(4), 10));
    let targets: Vec<usize> = (0..4).map(|row| train.target_count(row).unwrap()).collect();
    assert_eq!(targets, [8, 8, 7, 1]);
    let apart = load_sft(&path, &sft("text", 9, 0.0), &plain(), 1).unwrap();
    let sorted = |mut samples: Vec<SftSample>| {
        samples.sort_by_key(|sample| sample.tokens.len());
        samples
    };
    assert_eq!(sorted(train.rows(&train.all()).unwrap()), sorted(apart.train));
    let off = Sft { packing: Some(rlhf_api::stage::Packing { enabled: false, length: None }), ..settings };
    assert_eq!(load_sft(&path, &off, &plain(), 1).unwrap().summary.packed_rows, None);
}

/// Nothing of it is lost: each token but the first is learnt once, after at least one that stands before it.
#[test]
fn a_long_text_is_cut_into_chunks_where_rows_are_packed() {
    for length in 1..30 {
        let text = "klmnopqrstuvwxyzklmnopqrstuvwxyz"[..length].to_string();
        let split = read_sft(&[json!({"text": text})], &packed("text", 7, 7), &plain()).unwrap();
        assert!(split.train.iter().all(|s| s.tokens.len() <= 7 && !s.target[0] && s.target[1..].iter().all(|t| *t)));
        let mut learnt: Vec<i64> = split.train.iter().flat_map(|s| s.tokens[1..].to_vec()).collect();
        let mut expected = concat(&[&ids(&text[1..]), &[EOS]]);
        [&mut learnt, &mut expected].into_iter().for_each(|ids| ids.sort_unstable());
        assert_eq!((learnt, split.summary.truncated), (expected, 0), "{length}");
    }
    // Other formats are cut as they are without packing: what follows the cut has lost its question.
    let record = json!({"prompt": "xy", "completion": "klmnopqrs"});
    let split = read_sft(&[record], &packed("promptCompletion", 7, 7), &plain()).unwrap();
    assert_eq!((split.train.len(), split.train[0].tokens.len(), split.summary.truncated), (1, 7, 1));
}

/// Of rankings whose first line is the question.
fn assert_no_question_is_in_both_halves(records: &[Value]) {
    let split = read_rankings(records, &reward(64, 0.5), &plain()).unwrap();
    let questions = |half: &[Ranking]| -> Vec<String> {
        let text = |r: &Ranking| plain().decode(&r.responses[0]).unwrap().split('\n').next().unwrap().to_string();
        half.iter().map(text).collect()
    };
    let (train, eval) = (questions(&split.train), questions(&split.eval));
    assert!(train.len() > 8 && eval.len() > 8 && train.iter().all(|q| !eval.contains(q)), "{train:?} {eval:?}");
}

#[test]
fn dialogues_with_the_same_prompt_are_in_the_same_half() {
    let pair = |i: usize, a: &str, b: &str| json!({"chosen": format!("Q: {i}\nA: {a}"), "rejected": format!("Q: {i}\nA: {b}")});
    let records: Vec<Value> = (0..40).flat_map(|i| [pair(i, "I do", "I don't"), pair(i, "x", "y")]).collect();
    assert_no_question_is_in_both_halves(&records);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn arbitrary_bytes_never_panic_and_an_error_names_the_line(
        good in 0usize..4,
        line in prop_oneof![
            prop::collection::vec(any::<u8>(), 1..80),
            "\\{\"(prompt|chosen|ranked|messages)\": ?[\\[\\]{}\":,a-z0-9\\\\]{0,20}\\}?".prop_map(String::into_bytes),
        ],
    ) {
        let broken = !line.trim_ascii().is_empty() && line.split(|&b| b == b'\n').any(|l| !l.trim_ascii().is_empty() && serde_json::from_slice::<Value>(l).is_err());
        let (_dir, path) = file([b"{\"prompt\": \"x\", \"chosen\": \"y\", \"rejected\": \"z\"}\n".repeat(good), line].concat());
        let tokenizer = plain();
        for result in [load_rankings(&path, &reward(16, 0.0), &tokenizer, 0).map(|_| ()), load_prompts(&path, &ppo(16, 0.0), &tokenizer, 0).map(|_| ())] {
            prop_assert!(!broken || result.is_err());
            if let Err(error) = result {
                prop_assert_eq!(error.exit.code(), 65);
                let rest = error.message.strip_prefix(&format!("{}:", path.display())).unwrap().to_string();
                let number: Option<usize> = rest.split(':').next().unwrap().parse().ok();
                prop_assert!(number.is_some_and(|n| n > good) || (good == 0 && rest.contains("no record")), "{}", error.message);
            }
        }
    }

    #[test]
    fn splits_are_disjoint_complete_and_stable(prompts in prop::collection::vec("[a-e]{0,2}", 1..60), fraction in 0.0f64..0.5, seed: u64) {
        let records: Vec<Value> = prompts.iter().map(|p| json!({"prompt": p})).collect();
        let (_dir, path) = file(lines(&records));
        let (settings, tokenizer) = (ppo(4, fraction), plain());
        let split = load_prompts(&path, &settings, &tokenizer, seed).unwrap();
        prop_assert_eq!(&split, &load_prompts(&path, &settings, &tokenizer, seed).unwrap());
        let texts = |half: &[Prompt]| half.iter().map(|p| p.text.clone()).collect::<Vec<_>>();
        let (train, eval) = (texts(&split.train), texts(&split.eval));
        prop_assert_eq!((split.summary.train as usize, split.summary.eval as usize), (train.len(), eval.len()));
        let count = |list: &[String]| list.iter().fold(HashMap::new(), |mut n, p| { *n.entry(p.clone()).or_insert(0) += 1; n });
        prop_assert_eq!(count(&[train.clone(), eval.clone()].concat()), count(&prompts));
        let (train, eval): (BTreeSet<_>, BTreeSet<_>) = (train.into_iter().collect(), eval.into_iter().collect());
        prop_assert!(train.is_disjoint(&eval) && !train.is_empty());
        prop_assert_eq!(eval.is_empty(), fraction <= 0.0 || train.len() + eval.len() < 2);
    }

    #[test]
    fn a_larger_fraction_holds_out_the_same_records_and_more(count in 2usize..100, seed: u64) {
        let records: Vec<Value> = (0..count).map(|i| json!({"text": format!("t{i}")})).collect();
        let (_dir, path) = file(lines(&records));
        let tokenizer = plain();
        let halves = [0.0, 0.02, 0.2, 0.5].map(|fraction| load_sft(&path, &sft("text", 16, fraction), &tokenizer, seed).unwrap());
        prop_assert!(halves[0].eval.is_empty());
        for pair in halves.windows(2) {
            prop_assert!(pair[0].eval.iter().all(|s| pair[1].eval.contains(s)));
            prop_assert!(!pair[1].eval.is_empty() && pair[1].train.len() + pair[1].eval.len() == count);
        }
    }
}
