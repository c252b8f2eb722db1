use super::families::Family;
use super::fixture::*;
use super::*;
use crate::error::Error;
use crate::lease::Lease;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::path::Path;
use tch::{Kind, Tensor};
use tempfile::TempDir;

fn llama() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 32, "tie_word_embeddings": true, "torch_dtype": "bfloat16"
    })
}

/// A model with this config whose tensors were changed.
fn model(config: &Value, dtype: Dtype, change: impl FnOnce(&mut Tensors)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = weights(dir.path(), config, dtype);
    change(&mut tensors);
    write_weights(dir.path(), &tensors, dtype);
    dir
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

fn check(result: crate::error::Result<Source>, parts: &[&str]) {
    let error: Error = result.unwrap_err();
    assert_eq!(error.exit.code(), 65, "{error}");
    assert!(parts.iter().all(|part| error.message.contains(part)), "{error}");
}

/// The model can be used by who needs no score, and says why by nobody else.
fn no_score(source: &Source, parts: &[&str]) {
    assert!(!source.has_score_head());
    let error = source.check_score_head().unwrap_err();
    assert!(error.exit.code() == 65 && error.message.contains("not a reward model"), "{error}");
    for said in [&error.message, &source.warnings[0]] {
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    }
}

/// As transformers 5.24 does: "we will NOT tie them".
#[test]
fn two_heads_under_a_tied_flag_are_kept_apart_and_one_of_either_name_is_tied() {
    let open = |change: &dyn Fn(&mut Tensors)| {
        let dir = model(&llama(), Dtype::F32, change);
        let source = Source::open(dir.path()).unwrap();
        (dir, source)
    };
    let head = |source: &Source| {
        source.segment(Segment::Head, HeadKind::Lm).unwrap().into_iter().flatten().collect::<Vec<_>>()
    };
    let other = |t: &mut Tensors| drop(t.insert(HEAD.into(), (vec![12, 8], numbers(96, 99, Dtype::F32))));
    let (_dir, source) = open(&other);
    assert!(!source.spec.tied_head && source.config["tie_word_embeddings"] == json!(false));
    assert!(source.warnings[0].contains(HEAD) && source.warnings[0].contains("differ"), "{:?}", source.warnings);
    assert_eq!(head(&source).iter().map(Tensor::size).collect::<Vec<_>>(), [vec![12, 8], vec![8]]);

    let same = |t: &mut Tensors| drop(t.insert(HEAD.into(), t[EMBEDDING].clone()));
    let renamed = |t: &mut Tensors| {
        let embedding = t.remove(EMBEDDING).unwrap();
        t.insert(HEAD.into(), embedding);
    };
    for change in [&same as &dyn Fn(&mut Tensors), &renamed, &|_: &mut Tensors| ()] {
        let (_dir, source) = open(change);
        assert!(source.spec.tied_head && source.warnings.is_empty(), "{:?}", source.warnings);
        assert_eq!(head(&source).len(), 1);
        assert_eq!(source.segment(Segment::Embed, HeadKind::Lm).unwrap()[0].as_ref().unwrap().size(), [12, 8]);
    }
}

#[test]
fn a_tensor_that_is_missing_misshapen_or_not_used_is_named_before_anything_is_read() {
    let open = |change: &dyn Fn(&mut Tensors)| Source::open(model(&llama(), Dtype::F32, change).path());
    let query = "model.layers.0.self_attn.q_proj.weight";
    check(open(&|t| drop(t.remove(query))), &[query, "is missing"]);
    check(open(&|t| t.get_mut(query).unwrap().0 = vec![4, 16]), &[query, "[4, 16]", "[8, 8]"]);
    let bias = "model.layers.0.self_attn.q_proj.bias";
    let biased = |t: &mut Tensors| drop(t.insert(bias.into(), (vec![8], numbers(8, 1, Dtype::F32))));
    check(open(&biased), &[bias, "1 tensors", "attention_bias"]);
    let value_head =
        |t: &mut Tensors| drop(t.insert("v_head.summary.weight".into(), (vec![8], numbers(8, 1, Dtype::F32))));
    let source = open(&value_head).unwrap();
    assert!(source.warnings[0].contains("v_head.summary.weight"), "{:?}", source.warnings);
    let scored = |shape: Vec<usize>| {
        move |t: &mut Tensors| {
            let count = shape.iter().product();
            drop(t.insert("score.weight".into(), (shape.clone(), numbers(count, 3, Dtype::F32))))
        }
    };
    let reward_model = open(&scored(vec![1, 8])).unwrap();
    assert!(reward_model.has_score_head() && reward_model.check_score_head().is_ok());
    // A classifier of several labels can begin a policy, or a reward model with a head of its own.
    for shape in [vec![2, 8], vec![1, 9], vec![8]] {
        let source = open(&scored(shape.clone())).unwrap();
        no_score(&source, &["'score.weight'", &format!("{shape:?}"), "[1, 8]"]);
        let head = source.segment(Segment::Head, HeadKind::Scalar).unwrap();
        assert_eq!(head.iter().filter(|v| v.is_none()).count(), 2, "weight and bias are begun anew");
    }
    let buffer = |t: &mut Tensors| {
        drop(t.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (vec![2], numbers(2, 1, Dtype::F32))));
    };
    assert!(open(&buffer).unwrap().warnings.is_empty());
    let untied = json!({"tie_word_embeddings": false});
    let mut config = llama();
    config["tie_word_embeddings"] = untied["tie_word_embeddings"].clone();
    // A sequence classifier has no language model's head, and only who needs one misses it.
    let dir = model(&config, Dtype::F32, |t| drop(t.remove(HEAD)));
    let source = Source::open(dir.path()).unwrap();
    assert!(source.check_language_head().unwrap_err().message.contains(HEAD));
    assert!(Source::open(model(&config, Dtype::F32, |_| ()).path()).unwrap().check_language_head().is_ok());
}

#[test]
fn a_score_in_a_format_that_is_not_read_is_none_and_named() {
    let dir = model(&llama(), Dtype::F32, |_| ());
    let bytes = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let score = [0; 64];
    let score = safetensors::tensor::TensorView::new(Dtype::I64, vec![1, 8], &score).unwrap();
    let all = file.tensors().into_iter().chain([("score.weight".to_string(), score)]);
    safetensors::serialize_to_file(all, None, &dir.path().join("model.safetensors")).unwrap();
    no_score(&Source::open(dir.path()).unwrap(), &["'score.weight' has type I64", "F32, F16 and BF16"]);
}

/// What no model can have, or what contradicts itself: refused by its name, at once, whatever it would take to believe it.
#[test]
fn a_shape_that_cannot_be_is_refused() {
    let gpt2 = json!({"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2});
    let opt = json!({"model_type": "opt", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 8});
    let qwen3 = json!({"model_type": "qwen3", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8});
    let gemma3 = json!({"model_type": "gemma3_text", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8});
    let rope = |more: Value| {
        let mut all = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
        more.as_object().unwrap().iter().for_each(|(k, v)| all[k] = v.clone());
        all
    };
    let cases = [
        (llama(), "num_attention_heads", json!(3), "8 is no multiple of 3"),
        (llama(), "num_attention_heads", json!(16), "8 is no multiple of 16"),
        (gpt2.clone(), "n_head", json!(3), "8 is no multiple of 3"),
        (opt.clone(), "num_attention_heads", json!(5), "8 is no multiple of 5"),
        (llama(), "num_key_value_heads", json!(4), "kvHeads is 4"),
        (llama(), "num_key_value_heads", json!(0), "num_key_value_heads"),
        (llama(), "head_dim", json!(3), "is odd"),
        (llama(), "head_dim", json!(1 << 20), "headDim is 1048576"),
        (llama(), "num_hidden_layers", json!(0), "num_hidden_layers"),
        (llama(), "num_hidden_layers", json!(-1), "num_hidden_layers"),
        (llama(), "num_hidden_layers", json!(1e12), "num_hidden_layers"),
        (llama(), "num_hidden_layers", json!(1_000_000_000_000u64), "num_hidden_layers"),
        (llama(), "num_hidden_layers", json!(1 << 30), "layers is 1073741824"),
        (gpt2.clone(), "n_layer", json!(1 << 30), "layers is 1073741824"),
        (gemma3, "num_hidden_layers", json!(1 << 30), "layers is 1073741824"),
        (llama(), "vocab_size", json!(1 << 30), "vocab is 1073741824"),
        (llama(), "hidden_size", json!(1 << 30), "hidden is 1073741824"),
        (qwen3, "hidden_size", json!(1 << 30), "hidden is 1073741824"),
        (llama(), "intermediate_size", json!(1 << 30), "ffn is 1073741824"),
        (gpt2.clone(), "n_embd", json!(1 << 30), "hidden is 1073741824"),
        (opt.clone(), "word_embed_proj_dim", json!(1 << 30), "embedWidth is 1073741824"),
        (opt, "ffn_dim", json!(1 << 30), "ffn is 1073741824"),
        (llama(), "rms_norm_eps", json!(-1e-6), "rms_norm_eps is -0.000001"),
        (gpt2, "layer_norm_epsilon", json!(1e30), "layer_norm_epsilon"),
        (llama(), "rope_theta", json!(0), "rope_theta"),
        (llama(), "rope_theta", json!(-1e4), "rope_theta"),
        (llama(), "rope_parameters", rope(json!({"rope_theta": 0.0})), "rope_theta"),
        (llama(), "rope_parameters", rope(json!({"low_freq_factor": 4.0})), "low_freq_factor 4 must be below"),
        (
            llama(),
            "rope_parameters",
            rope(json!({"original_max_position_embeddings": 0})),
            "original_max_position_embeddings",
        ),
        (llama(), "rope_parameters", rope(json!({"rope_type": "yarn", "rope_theta": 1.0})), "rope_theta 1 must be"),
    ];
    for (mut config, field, value, part) in cases {
        config[field] = value.clone();
        let path = Path::new("m/config.json");
        let error = Family::read(&families::Config { path, json: &config }).err();
        let error = error.unwrap_or_else(|| panic!("{field} {value} was believed"));
        assert_eq!(error.exit.code(), 65, "{error}");
        assert!(
            error.message.starts_with("m/config.json: ") && error.message.contains(part),
            "{field} {value}: {error}"
        );
    }
}

#[test]
fn a_folder_that_holds_no_model_says_what_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), r#"{"base_model_name_or_path": "org/base"}"#).unwrap();
    check(Source::open(dir.path()), &["PEFT adapter of 'org/base'", "merge"]);
    std::fs::write(dir.path().join("config.json"), llama().to_string()).unwrap();
    check(Source::open(dir.path()), &["PEFT adapter of 'org/base'", "merge"]);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), llama().to_string()).unwrap();
    std::fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    check(
        Source::open(dir.path()),
        &["pytorch_model.bin: it is not what torch writes since version 1.6", "safetensors"],
    );
}

/// Writes the model of a folder, trained by nothing.
fn export(from: &Path, head: HeadKind, about: Scores, asked: Value) -> TempDir {
    let source = Source::open(from).unwrap();
    let to = tempfile::tempdir().unwrap();
    let format = Format::asked(&serde_json::from_value(asked).unwrap(), source.kind).unwrap();
    let mut writer = ModelWriter::create(&to.path().join("m"), &source, head, format, &Lease::default()).unwrap();
    for segment in source.spec.segments() {
        let values = source.segment(segment, head).unwrap();
        let shape = |i: usize| source.spec.params(segment, head)[i].shape.clone();
        let values: Vec<Tensor> = values
            .into_iter()
            .enumerate()
            .map(|(i, v)| v.unwrap_or_else(|| Tensor::zeros(shape(i), (Kind::Float, tch::Device::Cpu))))
            .collect();
        writer.write(segment, &values).unwrap();
    }
    writer.finish(about, |_| Ok(())).unwrap();
    to
}

#[test]
fn a_model_is_written_in_the_number_format_of_its_start_and_bit_for_bit() {
    for (dtype, name) in [(Dtype::BF16, "bfloat16"), (Dtype::F16, "float16"), (Dtype::F32, "float32")] {
        let start = model(&llama(), dtype, |_| ());
        let to = export(start.path(), HeadKind::Lm, Scores::default(), json!({}));
        let read = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
        let (a, b) = (read(start.path()), read(&to.path().join("m")));
        let (a, b) = (SafeTensors::deserialize(&a).unwrap(), SafeTensors::deserialize(&b).unwrap());
        assert_eq!(a.len(), b.len());
        for (name, tensor) in a.tensors() {
            let other = b.tensor(&name).unwrap();
            assert_eq!((tensor.dtype(), tensor.data()), (other.dtype(), other.data()), "{name}");
        }
        let config: Value = serde_json::from_slice(&std::fs::read(to.path().join("m/config.json")).unwrap()).unwrap();
        assert_eq!(config["torch_dtype"], name);
    }
}

#[test]
fn a_model_is_written_as_asked_for_whatever_its_start_is() {
    let mut config = llama();
    config.as_object_mut().unwrap().remove("torch_dtype");
    for (asked, kind, name) in
        [("fp32", Kind::Float, "float32"), ("bf16", Kind::BFloat16, "bfloat16"), ("fp16", Kind::Half, "float16")]
    {
        let start = model(&config, Dtype::F32, |_| ());
        let to = export(start.path(), HeadKind::Lm, Scores::default(), json!({"dtype": asked, "maxShardSize": "600"}));
        let (before, after) = (Source::open(start.path()).unwrap(), Source::open(&to.path().join("m")).unwrap());
        assert_eq!((after.kind, after.config["torch_dtype"].as_str()), (kind, Some(name)));
        assert!(to.path().join("m/model.safetensors.index.json").exists());
        for segment in before.spec.segments() {
            let of = |source: &Source| source.segment(segment, HeadKind::Lm).unwrap().into_iter().flatten();
            for (a, b) in of(&before).zip(of(&after)) {
                assert_eq!(a.to_kind(kind).to_kind(Kind::Float), b, "{asked}, {segment:?}");
            }
        }
    }
}

#[test]
fn a_size_of_shards_that_is_none_is_refused_and_a_weight_too_large_for_fp16_not_written_as_infinity() {
    let asked = |size: &str| {
        let asked = serde_json::from_value(json!({"maxShardSize": size})).unwrap();
        Format::asked(&asked, Kind::BFloat16).map(|format| (format.kind, format.shard_bytes))
    };
    assert_eq!(asked("1.5Gi").unwrap(), (Kind::BFloat16, 3 << 29));
    let error = asked("5GB").unwrap_err();
    assert!(error.exit.code() == 64 && error.message.contains("maxShardSize '5GB'"), "{error}");
    let large = |t: &mut Tensors| t.get_mut(EMBEDDING).unwrap().1[..4].copy_from_slice(&7e4f32.to_le_bytes());
    let start = model(&llama(), Dtype::F32, large);
    let source = Source::open(start.path()).unwrap();
    let format = Format { kind: Kind::Half, shard_bytes: SHARD_BYTES };
    let to = tempfile::tempdir().unwrap();
    let mut writer =
        ModelWriter::create(&to.path().join("m"), &source, HeadKind::Lm, format, &Lease::default()).unwrap();
    let values: Vec<Tensor> =
        source.segment(Segment::Embed, HeadKind::Lm).unwrap().into_iter().map(Option::unwrap).collect();
    let error = writer.write(Segment::Embed, &values).unwrap_err();
    assert!(error.message.contains("too large for float16") && error.message.contains("export.dtype"), "{error}");
}

#[test]
fn a_reward_model_says_how_its_scores_are_read() {
    let start = model(&llama(), Dtype::F32, |_| ());
    let to = export(start.path(), HeadKind::Scalar, Scores { normalisation: None, pad: Some(7) }, json!({}));
    let config: Value = serde_json::from_slice(&std::fs::read(to.path().join("m/config.json")).unwrap()).unwrap();
    assert_eq!(config["pad_token_id"], 7);
    assert_eq!(config["problem_type"], "regression");
    assert_eq!(config["architectures"], json!(["LlamaForSequenceClassification"]));
}

#[test]
fn what_is_not_supported_is_refused_by_the_fields_name_and_with_what_is() {
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut config = llama();
        change(&mut config);
        let path = Path::new("config.json");
        Family::read(&families::Config { path, json: &config }).unwrap_err().message
    };
    let says = |message: String, parts: &[&str]| assert!(parts.iter().all(|p| message.contains(p)), "{message}");
    says(
        refused(&|c| c["model_type"] = json!("t5")),
        &["model_type 't5'", "bloom, gemma2, gemma3_text, gpt2, llama, mistral, opt, qwen2, qwen3"],
    );
    says(
        refused(&|c| c["rope_scaling"] = json!({"type": "longrope"})),
        &["type 'longrope'", "default or linear or dynamic or llama3 or yarn"],
    );
    says(refused(&|c| c["rope_parameters"] = json!({"rope_type": "linear"})), &["'factor' is missing"]);
    says(
        refused(&|c| c["rope_parameters"] = json!({"rope_type": "default", "partial_rotary_factor": 0.5})),
        &["partial_rotary_factor"],
    );
    says(
        refused(&|c| {
            (c["model_type"], c["layer_types"], c["sliding_window"]) =
                (json!("mistral"), json!(["sliding_attention"]), Value::Null)
        }),
        &["layer_types"],
    );
    says(
        refused(&|c| {
            (c["model_type"], c["layer_types"], c["sliding_window"]) =
                (json!("mistral"), json!(["full_attention"]), json!(4))
        }),
        &["layer_types", "mistral"],
    );
    let qwen = |types: Value| {
        refused(&|c| {
            (c["model_type"], c["use_sliding_window"], c["layer_types"]) = (json!("qwen2"), json!(true), types.clone())
        })
    };
    says(
        qwen(json!(["chunked_attention"])),
        &["layer_types", "chunked_attention", "sliding_attention or full_attention"],
    );
    says(qwen(json!([])), &["layer_types has 0 entries for 1 blocks"]);
    let gemma = |of: &'static str, field: &'static str, value: Value| {
        refused(&|c| (c["model_type"], c[field]) = (json!(of), value.clone()))
    };
    says(gemma("gemma2", "hidden_activation", json!("gelu")), &["hidden_activation 'gelu'", "gelu_pytorch_tanh"]);
    says(gemma("gemma2", "use_bidirectional_attention", json!(true)), &["use_bidirectional_attention true"]);
    says(gemma("gemma2", "final_logit_softcapping", json!(0)), &["final_logit_softcapping"]);
    says(gemma("gemma2", "sliding_window", Value::Null), &["sliding_window is missing"]);
    says(gemma("gemma3_text", "attn_logit_softcapping", json!(50.0)), &["attn_logit_softcapping", "gemma3_text"]);
    says(gemma("gemma3_text", "rope_parameters", json!({"rope_theta": 1e6})), &["rope_parameters.full_attention"]);
    says(gemma("gemma3_text", "rope_scaling", json!({"rope_type": "longrope"})), &["rope_type 'longrope'"]);
    let local = json!({"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}});
    says(gemma("gemma3_text", "rope_parameters", local), &["rope_parameters.sliding_attention", "default"]);
    // The model that sees pictures, too, is another one.
    says(gemma("gemma3", "vision_config", json!({})), &["model_type 'gemma3'", "gemma3_text"]);
    says(refused(&|c| c["hidden_act"] = json!("gelu")), &["hidden_act 'gelu'", "silu"]);
    says(
        refused(&|c| {
            (c["model_type"], c["apply_residual_connection_post_layernorm"]) = (json!("bloom"), json!(true));
        }),
        &["apply_residual_connection_post_layernorm true", "must be false"],
    );
    let opt = |field: &str, value: Value| {
        let mut config = json!({"model_type": "opt", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 8});
        config[field] = value;
        let path = Path::new("config.json");
        Family::read(&families::Config { path, json: &config }).unwrap_err().message
    };
    says(opt("activation_function", json!("gelu")), &["activation_function 'gelu'", "relu"]);
    says(opt("layer_norm_elementwise_affine", json!(false)), &["layer_norm_elementwise_affine false", "must be true"]);
    says(opt("word_embed_proj_dim", json!(0)), &["word_embed_proj_dim"]);
}

/// Before version 5, and as hubs have it: no types of blocks, the bases apart, the scaling of the ones that see everything.
#[test]
fn gemma_3_is_read_as_both_versions_of_transformers_write_it() {
    let base = json!({
        "model_type": "gemma3_text", "vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 7, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 16, "sliding_window": 8,
    });
    let read = |more: Value| {
        let mut config = base.clone();
        more.as_object().unwrap().iter().for_each(|(k, v)| config[k] = v.clone());
        Family::read(&families::Config { path: Path::new("config.json"), json: &config }).unwrap().1
    };
    let old = read(json!({
        "rope_theta": 2e6, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }));
    let sliding = ["sliding_attention"; 5];
    let types: Vec<&str> = sliding.into_iter().chain(["full_attention", "sliding_attention"]).collect();
    let new = read(json!({
        "layer_types": types,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    }));
    assert_eq!(old, new);
    assert_eq!((old.full_blocks.as_slice(), old.window(0), old.window(5)), ([5].as_slice(), Some(8), None));
    let (silent, linear) = (read(json!({})), Some(RopeScaling::Linear { factor: 8.0 }));
    assert_eq!((old.local_theta, old.rope_scaling), (Some(2e4), linear));
    assert_eq!((silent.positions, silent.local_theta), (Positions::Rotary { theta: 1e6 }, Some(1e4)));
}
