//! The models' forward, backward and generation against implementations that share no code with them: `transformers`
//! for random models of both families, glassllm's own NumPy code for a trained one. See `tests/golden/README.md`.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

use rlhf_api::stage::{Recompute, Strategy};
use rlhf_trainer::engine::{Backbone, Group, HEAD_SLICE_BYTES, Model, Placement, ScalarInit, SegmentValues};
use rlhf_trainer::lease::Lease;
use rlhf_trainer::model::{
    Adapters, Batch, Format, HeadKind, ModelWriter, Param, SHARD_BYTES, Scores, Segment, Source, read_adapters,
    write_adapters,
};
use rlhf_trainer::rollout::{Decoding, Request, generate};
use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use tch::{Device, Kind, Reduction, Tensor};

const CAUSAL: [&str; 3] = ["gpt2", "llama-gqa-untied", "llama-tied-headdim"];
/// Models of further families, and with stretched rotary frequencies.
const FAMILIES: [&str; 13] = [
    "llama-linear",
    "llama-dynamic",
    "llama-llama3",
    "llama-yarn",
    "mistral",
    "qwen2",
    "qwen3",
    "opt",
    "opt-350m",
    "bloom",
    "gemma2",
    "gemma3",
    "qwen2-windows",
];
/// fp32 against fp32 with other kernels: logits are of the order of 10, so this is a few units in the last place.
const LOGIT_TOLERANCE: f64 = 2e-4;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

fn model_dir(name: &str) -> PathBuf {
    golden().join("models").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden().join(name)).unwrap()).unwrap()
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    let bytes = std::fs::read(golden().join(name)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |view: safetensors::tensor::TensorView<'_>| {
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        Tensor::from_data_size(view.data(), &shape, Kind::Float)
    };
    file.tensors().into_iter().map(|(name, view)| (name, read(view))).collect()
}

fn load(dir: &Path, head: HeadKind, recompute: Recompute) -> Model {
    load_sliced(dir, head, recompute, HEAD_SLICE_BYTES)
}

fn load_sliced(dir: &Path, head: HeadKind, recompute: Recompute, head_slice_bytes: i64) -> Model {
    let strategy = Strategy { recompute, ..Strategy::default() };
    let placement = Placement { device: Device::Cpu, trainable: true, strategy, head_slice_bytes };
    let init = ScalarInit { seed: 0, fold: None };
    Model::load(&Source::open(dir).unwrap(), head, init, placement, &Rc::new(Group::alone())).unwrap()
}

fn ids(row: &Value) -> Vec<i64> {
    row.as_array().unwrap().iter().map(|x| x.as_i64().unwrap()).collect()
}

fn rows(json: &Value) -> Vec<Vec<i64>> {
    json.as_array().unwrap().iter().map(ids).collect()
}

/// Logits at every real token, row after row.
fn logits(model: &Model, batch: &Batch) -> Vec<Tensor> {
    let hidden = model.hidden(batch).unwrap();
    let of_row = |row: usize| {
        let at: Vec<i64> = (0..batch.lengths[row]).map(|i| batch.flat_index(row, i)).collect();
        let mut parts = Vec::new();
        model
            .visit_head(&hidden, &at, |out, _| {
                parts.push(out.shallow_clone());
                Ok(())
            })
            .unwrap();
        Tensor::cat(&parts, 0)
    };
    (0..batch.lengths.len()).map(of_row).collect()
}

fn gap(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

#[test]
fn logits_equal_those_of_transformers_under_any_padding() {
    let rows = rows(&json("transformers.json")["ids"]);
    let rows: Vec<&[i64]> = rows.iter().map(Vec::as_slice).collect();
    let expected = tensors("transformers.safetensors");
    for name in CAUSAL {
        let model = load(&model_dir(name), HeadKind::Lm, Recompute::None);
        let right = logits(&model, &Batch::right_padded(&rows, Device::Cpu));
        let left = logits(&model, &Batch::left_padded(&rows, Device::Cpu));
        let packed = logits(&model, &Batch::packed(&rows, Device::Cpu));
        for (i, row) in rows.iter().enumerate() {
            let alone = logits(&model, &Batch::right_padded(&[row], Device::Cpu)).remove(0);
            let reference = &expected[&format!("{name}.alone.{i}")];
            let all =
                [("alone", &alone), ("right-padded", &right[i]), ("left-padded", &left[i]), ("packed", &packed[i])];
            for (how, actual) in all {
                assert!(
                    gap(actual, reference) < LOGIT_TOLERANCE,
                    "{name}, row {i} {how}: off by {}",
                    gap(actual, reference)
                );
            }
        }
    }
}

#[test]
fn greedy_generation_equals_that_of_transformers() {
    let golden_values = json("transformers.json");
    let prompts = rows(&golden_values["ids"]);
    let requests: Vec<Request<'_>> = prompts.iter().map(|r| Request { prompt: r, id: 0 }).collect();
    for name in CAUSAL {
        let model = load(&model_dir(name), HeadKind::Lm, Recompute::None);
        let responses = generate(&model, &requests, &Decoding::Greedy, &[], 8, &|| false).unwrap();
        let actual: Vec<Vec<i64>> = responses.into_iter().map(|r| r.tokens).collect();
        assert_eq!(actual, rows(&golden_values["causal"][name]["greedy"]), "{name}");
    }
}

/// Every family, as the ones above: logits under any padding, loss and gradients, greedy tokens, and a copy on disk.
#[test]
fn every_family_computes_what_transformers_computes() {
    let golden_values = json("families.json");
    let rows = rows(&golden_values["ids"]);
    let rows: Vec<&[i64]> = rows.iter().map(Vec::as_slice).collect();
    let expected = tensors("families.safetensors");
    for name in FAMILIES {
        let model = load(&model_dir(name), HeadKind::Lm, Recompute::None);
        let right = logits(&model, &Batch::right_padded(&rows, Device::Cpu));
        let left = logits(&model, &Batch::left_padded(&rows, Device::Cpu));
        let packed = logits(&model, &Batch::packed(&rows, Device::Cpu));
        for (i, row) in rows.iter().enumerate() {
            let alone = logits(&model, &Batch::right_padded(&[row], Device::Cpu)).remove(0);
            let reference = &expected[&format!("{name}.alone.{i}")];
            let all =
                [("alone", &alone), ("right-padded", &right[i]), ("left-padded", &left[i]), ("packed", &packed[i])];
            for (how, actual) in all {
                let off = gap(actual, reference);
                assert!(off < LOGIT_TOLERANCE, "{name}, row {i} {how}: off by {off}");
            }
        }
        let case = &golden_values["causal"][name];
        let requests: Vec<Request<'_>> = rows.iter().map(|r| Request { prompt: r, id: 0 }).collect();
        let new_tokens = golden_values["new_tokens"].as_u64().unwrap() as usize;
        let responses = generate(&model, &requests, &Decoding::Greedy, &[], new_tokens, &|| false).unwrap();
        let actual: Vec<Vec<i64>> = responses.into_iter().map(|r| r.tokens).collect();
        assert_eq!(actual, self::rows(&case["greedy"]), "{name}");
        compare_with_scoring(name, &model, &requests, new_tokens);
        for recompute in [Recompute::None, Recompute::Block] {
            let mut model = load(&model_dir(name), HeadKind::Lm, recompute);
            let loss = run_backward(&mut model, &rows);
            let wanted = case["loss"].as_f64().unwrap();
            assert!((loss - wanted).abs() < 1e-5 * wanted, "{name}: loss {loss}, expected {wanted}");
            let source = Source::open(&model_dir(name)).unwrap();
            assert!(source.warnings.is_empty(), "{name}: {:?}", source.warnings);
            compare_gradients(name, &source, &mut model, &case["gradient_norms"]);
        }
        let source = Source::open(&model_dir(name)).unwrap();
        let copy = tempfile::tempdir().unwrap();
        export(&copy.path().join("model"), &source, &model, SHARD_BYTES);
        same_weights(&model_dir(name), &copy.path().join("model"));
    }
}

/// Rows that lie in one are learnt as if each stood alone, in every family: as its own loss and gradients.
#[test]
fn rows_that_are_packed_into_one_have_the_loss_and_gradients_that_they_have_apart() {
    let [causal, families] = ["transformers.json", "families.json"].map(json);
    let all = CAUSAL.iter().map(|name| (name, &causal)).chain(FAMILIES.iter().map(|name| (name, &families)));
    for (name, golden_values) in all {
        let rows = rows(&golden_values["ids"]);
        let rows: Vec<&[i64]> = rows.iter().map(Vec::as_slice).collect();
        let case = &golden_values["causal"][name];
        let (source, wanted) = (Source::open(&model_dir(name)).unwrap(), case["loss"].as_f64().unwrap());
        for recompute in [Recompute::None, Recompute::Block] {
            let mut model = load(&model_dir(name), HeadKind::Lm, recompute);
            let loss = run_backward_over(&mut model, &Batch::packed(&rows, Device::Cpu), &rows);
            assert!((loss - wanted).abs() < 1e-5 * wanted, "{name}: loss {loss}, expected {wanted}");
            compare_gradients(name, &source, &mut model, &case["gradient_norms"]);
        }
    }
}

/// What a rollout says of its tokens, token by token over the cache, is what scoring the whole sequences says.
fn compare_with_scoring(name: &str, model: &Model, requests: &[Request<'_>], new_tokens: usize) {
    let responses = generate(model, requests, &Decoding::Greedy, &[], new_tokens, &|| false).unwrap();
    let whole: Vec<Vec<i64>> = requests.iter().zip(&responses).map(|(q, r)| [q.prompt, &r.tokens].concat()).collect();
    let whole: Vec<&[i64]> = whole.iter().map(Vec::as_slice).collect();
    let scored = logits(model, &Batch::right_padded(&whole, Device::Cpu));
    for ((request, response), logits) in requests.iter().zip(&responses).zip(&scored) {
        for (i, (token, log_p)) in response.tokens.iter().zip(&response.log_p).enumerate() {
            let law = logits.get((request.prompt.len() + i) as i64 - 1).log_softmax(-1, Kind::Double);
            let off = (law.double_value(&[*token]) - log_p).abs();
            assert!(off < 1e-4, "{name}, token {i} after {} of the prompt: off by {off}", request.prompt.len());
        }
    }
}

/// Both folders hold the same tensors, bit for bit.
fn same_weights(one: &Path, other: &Path) {
    let read = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    let (one, other) = (read(one), read(other));
    let (one, other) = (SafeTensors::deserialize(&one).unwrap(), SafeTensors::deserialize(&other).unwrap());
    assert_eq!(one.len(), other.len());
    for (name, tensor) in one.tensors() {
        assert_eq!(tensor.data(), other.tensor(&name).unwrap().data(), "{name}");
    }
}

/// A vocabulary that is larger than the tokenizer's: no token beyond it is drawn, or counted in a probability.
#[test]
fn tokens_that_there_are_not_are_neither_drawn_nor_counted() {
    let rows = rows(&json("transformers.json")["ids"]);
    let rows: Vec<&[i64]> = rows.iter().map(Vec::as_slice).collect();
    for name in CAUSAL {
        let whole = load(&model_dir(name), HeadKind::Lm, Recompute::None);
        let mut source = Source::open(&model_dir(name)).unwrap();
        source.spec.known_tokens = Some(40);
        let placement = Placement {
            device: Device::Cpu,
            trainable: true,
            strategy: Default::default(),
            head_slice_bytes: HEAD_SLICE_BYTES,
        };
        let init = ScalarInit { seed: 0, fold: None };
        let known = Model::load(&source, HeadKind::Lm, init, placement, &Rc::new(Group::alone())).unwrap();
        let batch = Batch::right_padded(&rows, Device::Cpu);
        for (a, b) in logits(&whole, &batch).iter().zip(&logits(&known, &batch)) {
            assert_eq!(b.size()[1], 40);
            assert!(gap(&a.narrow(1, 0, 40), b) < LOGIT_TOLERANCE);
        }
        let requests: Vec<Request<'_>> = rows.iter().map(|r| Request { prompt: r, id: 0 }).collect();
        let draw = |model: &Model| generate(model, &requests, &Decoding::Greedy, &[], 8, &|| false).unwrap();
        let beyond = |model: &Model| draw(model).iter().flat_map(|r| &r.tokens).filter(|t| **t >= 40).count();
        assert!(beyond(&whole) > 0, "{name}: the likeliest of all tokens are among those that there are not");
        assert_eq!(beyond(&known), 0, "{name}");
        for (response, logits) in draw(&known).iter().zip(&logits(&whole, &batch)) {
            let last = logits.get(-1).narrow(0, 0, 40);
            assert_eq!(response.tokens[0], last.argmax(0, false).int64_value(&[]), "{name}");
            let log_p = last.log_softmax(0, Kind::Double).max().double_value(&[]);
            assert!((response.log_p[0] - log_p).abs() < 1e-4, "{name}: {} is not {log_p}", response.log_p[0]);
        }
    }
}

/// Rows leave the batch one by one as they end, and the ones that stay must not notice.
#[test]
fn a_row_that_ends_changes_nothing_for_the_others() {
    let golden_values = json("transformers.json");
    let prompts = rows(&golden_values["ids"]);
    let requests: Vec<Request<'_>> = prompts.iter().map(|r| Request { prompt: r, id: 0 }).collect();
    for name in CAUSAL {
        let model = load(&model_dir(name), HeadKind::Lm, Recompute::None);
        let whole = rows(&golden_values["causal"][name]["greedy"]);
        for eos in whole.iter().flat_map(|r| [r[0], r[2], r[5]]) {
            for (response, full) in
                generate(&model, &requests, &Decoding::Greedy, &[eos], 8, &|| false).unwrap().iter().zip(&whole)
            {
                let end = full.iter().position(|&t| t == eos);
                assert_eq!(response.tokens, full[..end.map_or(8, |e| e + 1)], "{name}, end token {eos}");
                assert_eq!(response.ended, end.is_some());
            }
        }
    }
}

#[test]
fn loss_and_every_gradient_equal_those_of_transformers() {
    let golden_values = json("transformers.json");
    let rows = rows(&golden_values["ids"]);
    let rows: Vec<&[i64]> = rows.iter().map(Vec::as_slice).collect();
    for name in CAUSAL {
        // The second slice size gives the head three positions at a time.
        for (recompute, slice) in [(Recompute::None, HEAD_SLICE_BYTES), (Recompute::Block, 3 * 97 * 4)] {
            let mut model = load_sliced(&model_dir(name), HeadKind::Lm, recompute, slice);
            let loss = run_backward(&mut model, &rows);
            let expected = golden_values["causal"][name]["loss"].as_f64().unwrap();
            assert!((loss - expected).abs() < 1e-5 * expected, "{name}: loss {loss}, expected {expected}");
            compare_gradients(
                name,
                &Source::open(&model_dir(name)).unwrap(),
                &mut model,
                &golden_values["causal"][name]["gradient_norms"],
            );
        }
    }
}

fn run_backward(model: &mut Model, rows: &[&[i64]]) -> f64 {
    run_backward_over(model, &Batch::right_padded(rows, Device::Cpu), rows)
}

fn run_backward_over(model: &mut Model, batch: &Batch, rows: &[&[i64]]) -> f64 {
    let predicting = rows.iter().enumerate().flat_map(|(r, row)| (0..row.len() as i64 - 1).map(move |i| (r, i)));
    let at: Vec<i64> = predicting.map(|(r, i)| batch.flat_index(r, i)).collect();
    let targets: Vec<i64> = rows.iter().flat_map(|row| row[1..].iter().copied()).collect();
    let mut loss = 0.0;
    model
        .backward(batch, &at, true, |logits, range| {
            let sum = logits.cross_entropy_loss(
                &Tensor::from_slice(&targets[range]),
                None::<&Tensor>,
                Reduction::Sum,
                -100,
                0.0,
            ) / at.len() as f64;
            loss += sum.double_value(&[]);
            Ok(sum)
        })
        .unwrap();
    loss
}

fn compare_gradients(name: &str, source: &Source, model: &mut Model, expected: &Value) {
    let mut seen = 0;
    for (segment, chunk) in source.spec.segments().into_iter().zip(model.trained_mut()) {
        let specs = source.spec.params(segment, HeadKind::Lm);
        let gradients = chunk.gradients().unwrap();
        for entry in source.family.tensors(segment) {
            let parts: Vec<&Tensor> = entry
                .parts
                .iter()
                .filter_map(|p| Some(&gradients[specs.iter().position(|s| s.param == *p)?]))
                .collect();
            let Some(expected) = expected[&entry.name].as_f64().filter(|_| !parts.is_empty()) else { continue };
            let norm = parts.iter().map(|g| g.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt();
            // Below that it is rounding: a key's bias moves all scores of a query alike, so that its true gradient is 0.
            assert!(
                (norm - expected).abs() < 1e-4 * expected + 1e-5,
                "{name}, {}: gradient norm {norm}, expected {expected}",
                entry.name
            );
            seen += 1;
        }
    }
    assert_eq!(seen, expected.as_object().unwrap().len(), "{name}: every gradient is compared");
}

#[test]
fn scores_equal_those_of_sequence_classifiers() {
    let golden_values = json("transformers.json");
    let rows = rows(&golden_values["ids"]);
    let rows: Vec<&[i64]> = rows.iter().map(Vec::as_slice).collect();
    for name in ["gpt2-score", "llama-score", "opt-350m-score"] {
        let model = load(&model_dir(name), HeadKind::Scalar, Recompute::None);
        let expected: Vec<f64> = golden_values["classifiers"][name]["scores"]
            .as_array()
            .unwrap()
            .iter()
            .map(|x| x.as_f64().unwrap())
            .collect();
        for batch in [Batch::right_padded(&rows, Device::Cpu), Batch::left_padded(&rows, Device::Cpu)] {
            let ends: Vec<i64> = (0..rows.len()).map(|r| batch.flat_index(r, batch.lengths[r] - 1)).collect();
            let actual = model.scalars(&batch, &ends).unwrap();
            assert!(
                actual.iter().zip(&expected).all(|(a, e)| (a - e).abs() < 1e-5),
                "{name}: {actual:?}, expected {expected:?}"
            );
        }
    }
}

/// Needs the trained model that `tests/assets/fetch.sh` makes; `make test` runs it first.
#[test]
fn logits_of_a_trained_model_equal_those_of_its_own_code() {
    let dir = golden().join("../../.cache/assets/volume/models/glassllm");
    assert!(dir.join("config.json").exists(), "{} is missing: run tests/assets/fetch.sh", dir.display());
    let expected = tensors("glassllm.safetensors");
    let model = load(&dir, HeadKind::Lm, Recompute::None);
    for case in json("glassllm.json")["forward"].as_array().unwrap() {
        let actual = logits(&model, &Batch::right_padded(&[&ids(&case["ids"])], Device::Cpu)).remove(0);
        let off = gap(&actual, &expected[case["logits"].as_str().unwrap()]);
        assert!(off < LOGIT_TOLERANCE, "{}: off by {off}", case["text"]);
    }
}

/// Writes a model, adapters merged, in files of at most so many bytes.
fn export(dir: &Path, source: &Source, model: &Model, shard_bytes: u64) {
    let format = Format { kind: source.kind, shard_bytes };
    let mut writer = ModelWriter::create(dir, source, model.head_kind(), format, &Lease::default()).unwrap();
    model.parameters(source, |part| writer.write(part.segment, &part.values)).unwrap();
    writer.finish(Scores::default(), |_| Ok(())).unwrap();
}

#[test]
fn a_written_model_is_the_one_that_was_read() {
    let scalar = [("gpt2-score", HeadKind::Scalar), ("llama-score", HeadKind::Scalar)];
    for (name, head) in CAUSAL.map(|n| (n, HeadKind::Lm)).into_iter().chain(scalar) {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        let model = load(&model_dir(name), head, Recompute::None);
        let source = Source::open(&model_dir(name)).unwrap();
        export(&target, &source, &model, SHARD_BYTES);
        let read = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
        let (before, file) = (read(&model_dir(name)), read(&target));
        let (before, after) = (SafeTensors::deserialize(&before).unwrap(), SafeTensors::deserialize(&file).unwrap());
        let names = |file: &SafeTensors<'_>| {
            let mut names: Vec<String> = file.names().into_iter().map(String::from).collect();
            names.sort_unstable();
            names
        };
        assert_eq!(names(&before), names(&after), "{name}: the same tensors");
        assert!(
            names(&before).iter().all(|n| before.tensor(n).unwrap().data() == after.tensor(n).unwrap().data()),
            "{name}: the same bytes"
        );
        let format = HashMap::from([("format".to_string(), "pt".to_string())]);
        assert!(file == safetensors::serialize(after.tensors(), Some(format)).unwrap(), "{name}: the library's layout");
    }
}

/// The shards in a folder, by name.
fn shards(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|n| n.ends_with(".safetensors")).collect();
    names.sort_unstable();
    names
}

#[test]
fn a_model_in_shards_is_the_one_in_a_single_file() {
    for name in CAUSAL {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        let (source, model) =
            (Source::open(&model_dir(name)).unwrap(), load(&model_dir(name), HeadKind::Lm, Recompute::None));
        export(&target, &source, &model, 40_000);
        let files = shards(&target);
        assert!(files.len() > 2, "{files:?}");
        assert_eq!(files[0], format!("model-00001-of-{:05}.safetensors", files.len()));
        let index: Value =
            serde_json::from_slice(&std::fs::read(target.join("model.safetensors.index.json")).unwrap()).unwrap();
        let (mut tensors, mut bytes) = (0, 0);
        for file in &files {
            let content = std::fs::read(target.join(file)).unwrap();
            let shard = SafeTensors::deserialize(&content).unwrap();
            let size: usize = shard.iter().map(|(_, t)| t.data().len()).sum();
            assert!(size <= 40_000 || shard.len() == 1, "{name}: {file} has {size} bytes");
            assert!(shard.names().iter().all(|n| index["weight_map"][n] == file.as_str()), "{name}, {file}");
            (tensors, bytes) = (tensors + shard.len(), bytes + size);
        }
        assert_eq!(index["weight_map"].as_object().unwrap().len(), tensors);
        assert_eq!(index["metadata"]["total_size"], bytes);
        let read = Source::open(&target).unwrap();
        for segment in source.spec.segments() {
            let of = |source: &Source| -> Vec<Tensor> {
                source.segment(segment, HeadKind::Lm).unwrap().into_iter().flatten().collect()
            };
            assert_eq!(of(&read), of(&source), "{name}, {segment:?}");
        }
    }
}

#[test]
fn a_missing_shard_and_a_wrong_index_are_told_in_one_line() {
    let name = "gpt2";
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("model");
    let source = Source::open(&model_dir(name)).unwrap();
    export(&target, &source, &load(&model_dir(name), HeadKind::Lm, Recompute::None), 40_000);
    let index = target.join("model.safetensors.index.json");
    let whole: Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    let files = shards(&target);
    let moved = "transformer.ln_f.weight";
    let with = |pointer: &str, value: Value| {
        let mut changed = whole.clone();
        changed[pointer] = value;
        changed
    };
    let map = |file: Value| {
        let mut map = whole["weight_map"].clone();
        map[moved] = file;
        with("weight_map", map)
    };
    for (content, parts) in [
        (map(files[0].clone().into()), ["'weight_map' says", moved]),
        (map("../model.safetensors".into()), ["not the name of a file", moved]),
        (map(7.into()), ["not the name of a file", moved]),
        (map("model-x.safetensors".into()), ["a shard of", "model-x.safetensors"]),
        (with("weight_map", Value::Null), ["'weight_map' is missing", "index.json"]),
    ] {
        std::fs::write(&index, content.to_string()).unwrap();
        let error = Source::open(&target).unwrap_err();
        assert_eq!(error.exit.code(), 65, "{error}");
        let text = error.to_string();
        assert!(!text.contains('\n') && parts.iter().all(|part| text.contains(part)), "{parts:?} in {text}");
    }
    std::fs::write(&index, whole.to_string()).unwrap();
    std::fs::remove_file(target.join(&files[1])).unwrap();
    let text = Source::open(&target).unwrap_err().to_string();
    assert!(text.contains("a shard of") && text.contains(&files[1]) && !text.contains('\n'), "{text}");
}

const ADAPTED: [&str; 3] = ["gpt2", "llama-gqa-untied", "bloom"];
/// Those whose queries, keys and values are one module to PEFT, with one A.
const FUSED: [&str; 2] = ["gpt2", "bloom"];

/// The golden model of this name with the adapters in a folder.
fn adapted(name: &str, adapters: &Path) -> (Source, Model) {
    let source = Source::open(&model_dir(name)).unwrap();
    let adapters = read_adapters(adapters, source.family, &source.spec).unwrap();
    let placement = Placement {
        device: Device::Cpu,
        trainable: true,
        strategy: Strategy::default(),
        head_slice_bytes: HEAD_SLICE_BYTES,
    };
    let backbone = Backbone::load(&source, HeadKind::Lm, placement, &Rc::new(Group::alone())).unwrap();
    let model = backbone.language_model(&adapters, 0).unwrap();
    (source, model)
}

fn compare_with_peft(name: &str, how: &str, model: &Model) {
    let (rows, expected) = (rows(&json("transformers.json")["ids"]), tensors("peft.safetensors"));
    for (i, row) in rows.iter().enumerate() {
        let actual = logits(model, &Batch::right_padded(&[row], Device::Cpu)).remove(0);
        let off = gap(&actual, &expected[&format!("{name}.{how}.{i}")]);
        assert!(off < LOGIT_TOLERANCE, "{name}, row {i}, {how}: off by {off}");
    }
}

#[test]
fn logits_with_adapters_and_of_the_merged_model_equal_those_of_peft() {
    for name in ADAPTED {
        let (source, model) = adapted(name, &golden().join("adapters").join(name));
        compare_with_peft(name, "adapter", &model);
        let folder = tempfile::tempdir().unwrap();
        let merged = folder.path().join("model");
        export(&merged, &source, &model, SHARD_BYTES);
        compare_with_peft(name, "merged", &load(&merged, HeadKind::Lm, Recompute::None));
        // The live model is as it was.
        compare_with_peft(name, "adapter", &model);
    }
}

#[test]
fn written_adapters_are_those_that_were_read() {
    for name in ADAPTED {
        let theirs = golden().join("adapters").join(name);
        let (source, model) = adapted(name, &theirs);
        let folder = tempfile::tempdir().unwrap();
        let ours = folder.path().join("adapter");
        let mut adapters = Adapters { lora: model.lora().unwrap().clone(), blocks: vec![] };
        let mut take = |part: SegmentValues| {
            adapters.blocks.extend(part.adapters);
            Ok(())
        };
        model.parameters(&source, &mut take).unwrap();
        write_adapters(&ours, &adapters, &source, "base", None, &Lease::default()).unwrap();
        compare_with_peft(name, "adapter", &adapted(name, &ours).1);
        let read = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
        let (ours, theirs) = (read(&ours), read(&theirs));
        let (ours, theirs) = (SafeTensors::deserialize(&ours).unwrap(), SafeTensors::deserialize(&theirs).unwrap());
        let mut names = ours.names();
        names.sort_unstable();
        let mut expected = theirs.names();
        expected.sort_unstable();
        assert_eq!(names, expected, "{name}: PEFT's names");
        // Queries, keys and values share one A there, and are written with one each.
        let same = names.iter().filter(|n| !n.contains("c_attn") && !n.contains("query_key_value"));
        assert!(same.clone().count() > 0);
        for tensor in same {
            assert!(ours.tensor(tensor).unwrap().data() == theirs.tensor(tensor).unwrap().data(), "{name}, {tensor}");
        }
    }
}

#[test]
fn loss_and_every_gradient_of_adapters_equal_those_of_peft() {
    let rows = rows(&json("transformers.json")["ids"]);
    let rows: Vec<&[i64]> = rows.iter().map(Vec::as_slice).collect();
    for name in ADAPTED {
        let expected = &json("peft.json")["cases"][name];
        let (source, mut model) = adapted(name, &golden().join("adapters").join(name));
        let (loss, reference) = (run_backward(&mut model, &rows), expected["loss"].as_f64().unwrap());
        assert!((loss - reference).abs() < 1e-5 * reference, "{name}: loss {loss}, expected {reference}");
        let lora = model.lora().unwrap().clone();
        let shared = if FUSED.contains(&name) { 2 * source.spec.layers as i64 * 3 * source.spec.hidden } else { 0 };
        assert_eq!(Some(model.trained_parameters() - shared), expected["trained_parameters"].as_i64(), "{name}");
        let params: Vec<Param> = source.spec.adapter_params(&lora).iter().map(|s| s.param).collect();
        let mut seen = 0;
        for (block, chunk) in model.trained_mut().enumerate() {
            let gradients = chunk.gradients().unwrap();
            let of = |param| &gradients[params.iter().position(|p| *p == param).unwrap()];
            for entry in source.family.tensors(Segment::Block(block)) {
                let Some(linears) = entry.parts.iter().map(|p| p.as_weight()).collect::<Option<Vec<_>>>() else {
                    continue;
                };
                let module = format!("base_model.model.{}", entry.name.strip_suffix(".weight").unwrap());
                // What shares one A there has its gradients added up.
                let a = linears.iter().map(|l| of(Param::LoraA(*l)).shallow_clone()).reduce(|x, y| x + y).unwrap();
                let b = Tensor::cat(&linears.iter().map(|l| of(Param::LoraB(*l))).collect::<Vec<_>>(), 0);
                for (factor, gradient) in [("A", a), ("B", b)] {
                    let key = format!("{module}.lora_{factor}.default.weight");
                    let expected = expected["gradient_norms"][&key].as_f64().unwrap();
                    let norm = gradient.norm().double_value(&[]);
                    assert!((norm - expected).abs() < 1e-4 * expected, "{name}, {key}: {norm}, expected {expected}");
                    seen += 1;
                }
            }
        }
        assert_eq!(seen, expected["gradient_norms"].as_object().unwrap().len(), "{name}: every gradient is compared");
    }
}
