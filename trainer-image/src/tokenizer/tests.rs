use super::fixture::*;
use super::{ChatSample, Dialogue, Message, Tokenizer};
use serde_json::{Value, json};

fn chat(turns: &[(&str, &str)]) -> Dialogue {
    let messages = turns.iter().map(|(role, content)| Message::text(role, content)).collect();
    Dialogue { messages, ..Dialogue::default() }
}

fn template(source: &str) -> Tokenizer {
    changed(|_, config| config["chat_template"] = json!(source)).1.unwrap()
}

#[test]
fn text_becomes_ids_and_ids_text() {
    let tokenizer = plain();
    assert_eq!(tokenizer.encode("abcab z").unwrap(), [ABC, AB, id(' '), id('z')]);
    assert_eq!(tokenizer.encode("é").unwrap(), [UNK]);
    assert_eq!(tokenizer.decode(&[BOS, ABC, id(' '), EOS, AB, PAD]).unwrap(), "abc ab");
    assert_eq!(tokenizer.vocab_size(), VOCAB);
    assert_eq!(tokenizer.decode(&[-1]).unwrap_err().exit.code(), 70);
}

#[test]
fn what_tokenizer_json_asks_to_cut_or_pad_is_not_done() {
    let text = "x".repeat(20);
    assert_eq!(plain().encode(&text).unwrap(), ids(&text));
    assert_eq!(plain().encode("x").unwrap(), ids("x"));
}

#[test]
fn a_prompt_and_a_response_are_encoded_as_one_text() {
    let pair = |tokenizer: &Tokenizer, prompt: &str, response: &str| {
        let pair = tokenizer.encode_pair(prompt, response).unwrap();
        (pair.tokens, pair.prompt_len)
    };
    assert_eq!(pair(&plain(), "xy", "z"), (ids("xyz"), 2));
    // A token that holds an end of both is the response's, so that nothing of it is lost.
    assert_eq!(pair(&plain(), "xa", "bcz"), (vec![id('x'), ABC, id('z')], 1));
    assert_eq!(pair(&plain(), "xy", ""), (ids("xy"), 2));
    assert_eq!(pair(&plain(), "", "z"), (vec![BOS, id('z')], 1));
    assert_eq!(pair(&without_bos(), "", "z"), (ids("z"), 0));
    assert_eq!(pair(&with_bos(), "x", "z"), (vec![BOS, id('x'), id('z')], 2));
    assert_eq!(pair(&with_bos(), "<bos>x", "z"), (vec![BOS, id('x'), id('z')], 2));
    assert_eq!(pair(&with_bos(), "", "z"), (vec![BOS, id('z')], 1));
}

/// What Llama 2's tokenizer.json says: a blank before each text, blanks as U+2581.
#[test]
fn the_blank_before_a_text_does_not_come_between_prompt_and_response() {
    let normalizer = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": " "}]});
    let tokenizer = changed(|tokenizer, _| tokenizer["normalizer"] = normalizer).1.unwrap();
    assert_eq!(tokenizer.encode("xy").unwrap(), ids(" xy"));
    assert_eq!(tokenizer.encode_pair("x", "yz").unwrap().tokens, ids(" xyz"));
    assert_eq!(tokenizer.encode_pair("x", "yz").unwrap().prompt_len, 2);
}

/// GPT-2's post-processor cuts blanks off offsets, which must not move the border.
#[test]
fn offsets_count_as_they_are_before_the_post_processor() {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = changed(|tokenizer, _| {
        tokenizer["pre_tokenizer"] = byte_level.clone();
        tokenizer["post_processor"] = byte_level;
        let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        let blank = vocab.remove(" ").unwrap();
        vocab.insert("Ġ".into(), blank);
    });
    let tokenizer = tokenizer.1.unwrap();
    assert_eq!(tokenizer.encode_pair("x ", "y").unwrap().prompt_len, 2);
    assert_eq!(tokenizer.encode_pair("x", " ").unwrap().prompt_len, 1);
}

#[test]
fn a_sequence_ends_once_whichever_token_ends_it() {
    let ended = |tokenizer: &Tokenizer, text: &str| {
        let mut tokens = tokenizer.encode(text).unwrap();
        tokenizer.end(&mut tokens);
        tokens
    };
    assert_eq!(ended(&plain(), "x"), [id('x'), EOS]);
    assert_eq!(ended(&plain(), "x<eos>"), [id('x'), EOS]);
    assert_eq!(ended(&plain(), "x<turn>"), [id('x'), TURN, EOS]);
    let (dir, _) = changed(|_, _| ());
    write(dir.path(), "generation_config.json", &json!({"eos_token_id": [TURN, 7_000]}));
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!((tokenizer.eos(), tokenizer.ends()), (EOS, vec![EOS, TURN]));
    assert_eq!(ended(&tokenizer, "x<turn>"), [id('x'), TURN]);
    assert!(tokenizer.warnings().is_empty());
    write(dir.path(), "config.json", &json!({"eos_token_id": id('x')}));
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(tokenizer.ends(), [EOS, TURN, id('x')]);
    assert!(
        tokenizer.warnings()[0].contains("config.json: eos_token_id") && tokenizer.warnings()[0].contains("ordinary")
    );
}

#[test]
fn bos_stands_at_the_beginning_only_and_once() {
    let tokenizer = with_bos();
    assert_eq!(tokenizer.encode("x").unwrap(), [BOS, id('x')]);
    assert_eq!(tokenizer.encode("<bos>x").unwrap(), [BOS, id('x')]);
    assert_eq!(tokenizer.encode("").unwrap(), [BOS]);
    assert_eq!(plain().encode("x").unwrap(), [id('x')]);
    assert_eq!(plain().encode_prompt("").unwrap(), [BOS]);
    assert_eq!(without_bos().encode_prompt("").unwrap(), [0i64; 0]);
}

/// As in transformers 5.24, where `add_bos_token` beside a `tokenizer.json` changes nothing.
#[test]
fn the_post_processor_says_what_begins_a_sequence_and_the_config_does_not() {
    for add_bos in [json!(true), json!(false), Value::Null] {
        let of = |processor: Value| {
            let (_dir, tokenizer) = changed(|tokenizer, config| {
                tokenizer["post_processor"] = processor;
                config["add_bos_token"] = add_bos.clone();
            });
            tokenizer.unwrap().encode("x").unwrap()
        };
        assert_eq!(of(post_processor()), [BOS, id('x')]);
        assert_eq!(of(Value::Null), [id('x')]);
    }
}

/// As in transformers 5.24, which adds what `added_tokens_decoder` and the named tokens say to the tokenizer's own.
#[test]
fn whatever_is_named_special_is_one_token() {
    let special = |change: &dyn Fn(&mut Value)| {
        let (_dir, tokenizer) = changed(|tokenizer, config| {
            tokenizer["added_tokens"] = json!([]);
            change(config);
        });
        tokenizer.unwrap().encode("x<eos><turn>").unwrap()
    };
    let apart = |text: &str| text.chars().map(id).collect::<Vec<_>>();
    assert_eq!(special(&|_| ()), [vec![id('x'), EOS], apart("<turn>")].concat());
    let with_turn = vec![id('x'), EOS, TURN];
    assert_eq!(
        special(&|c| c["added_tokens_decoder"] = json!({"4": {"content": "<turn>", "special": true}})),
        with_turn
    );
    assert_eq!(special(&|c| c["additional_special_tokens"] = json!(["<turn>"])), with_turn);
    assert_eq!(special(&|c| c["extra_special_tokens"] = json!({"turn_token": "<turn>"})), with_turn);
    assert_eq!(special(&|c| c["turn_token"] = json!("<turn>")), with_turn);
    let wrong = changed(|_, c| c["added_tokens_decoder"] = json!({"9": {"content": "<new>"}})).1.unwrap_err();
    assert!(wrong.message.contains("added_tokens_decoder gives '<new>' the id 9"), "{wrong}");
    // One beyond the vocabulary that nothing uses is no harm.
    let (_dir, pad) = changed(|_, c| c["pad_token"] = json!("<nowhere>"));
    assert_eq!(pad.unwrap().pad(), EOS);
}

/// Expected ids: transformers 5.24 with the same files ('2024' is one token by GPT2Tokenizer, four by the file's Digits).
#[test]
fn the_class_beats_the_file_and_the_export_keeps_what_was_used() {
    let digits = json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]});
    let of = |class: Value| {
        changed(|tokenizer, config| {
            tokenizer["pre_tokenizer"] = digits.clone();
            tokenizer["model"]["vocab"]["20"] = json!(VOCAB);
            tokenizer["model"]["merges"] = json!([["2", "0"]]);
            config["tokenizer_class"] = class;
        })
    };
    for class in [Value::Null, json!("PreTrainedTokenizerFast"), json!("BloomTokenizerFast"), json!("LlamaTokenizer")] {
        let (_dir, tokenizer) = of(class.clone());
        let tokenizer = tokenizer.unwrap();
        assert_eq!(tokenizer.encode("20").unwrap(), ids("20"), "{class}");
        assert!(tokenizer.warnings().is_empty());
    }
    let (_dir, tokenizer) = of(json!("GPT2TokenizerFast"));
    let tokenizer = tokenizer.unwrap();
    assert_eq!(tokenizer.encode("20").unwrap(), [VOCAB as i64]);
    assert!(tokenizer.warnings()[0].contains("tokenizer_class GPT2Tokenizer"), "{:?}", tokenizer.warnings());
    let to = tempfile::tempdir().unwrap();
    tokenizer.copy_files(to.path(), None).unwrap();
    let exported = Tokenizer::load(to.path()).unwrap();
    assert_eq!(exported.encode("20").unwrap(), [VOCAB as i64]);
    assert!(exported.warnings().is_empty());
    let config: Value =
        serde_json::from_slice(&std::fs::read(to.path().join("tokenizer_config.json")).unwrap()).unwrap();
    assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
}

#[test]
fn special_tokens_are_found_in_the_first_file_that_names_them() {
    let tokenizer = plain();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (Some(BOS), EOS, PAD));

    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "tokenizer.json", &tokenizer_json());
    write(dir.path(), "config.json", &json!({"eos_token_id": UNK, "bos_token_id": null}));
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (None, UNK, UNK));
    write(dir.path(), "generation_config.json", &json!({"eos_token_id": [TURN, EOS], "bos_token_id": BOS}));
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (Some(BOS), TURN, TURN));
    write(dir.path(), "special_tokens_map.json", &json!({"eos_token": "<eos>"}));
    assert_eq!(Tokenizer::load(dir.path()).unwrap().eos(), EOS);
}

#[test]
fn a_wrong_tokenizer_is_an_error_that_names_file_and_field() {
    let missing = tempfile::tempdir().unwrap();
    let cases: Vec<(crate::error::Result<Tokenizer>, Vec<&str>)> = vec![
        (Tokenizer::load(missing.path()), vec!["tokenizer.json", "No such file"]),
        (changed(|tokenizer, _| *tokenizer = json!({"model": 1})).1, vec!["tokenizer.json"]),
        (changed(|_, config| *config = json!([])).1, vec!["tokenizer_config.json", "not a JSON object"]),
        (
            changed(|_, config| config["eos_token"] = json!("<end>")).1,
            vec!["tokenizer_config.json", "eos_token", "'<end>'"],
        ),
        (changed(|_, config| config["eos_token"] = Value::Null).1, vec!["end-of-sequence", "eos_token"]),
    ];
    for (result, names) in cases {
        let error = result.unwrap_err();
        assert_eq!(error.exit.code(), 65, "{error}");
        assert!(names.iter().all(|n| error.message.contains(n)), "{error}");
    }
}

#[test]
fn a_template_renders_as_in_transformers() {
    let messages = chat(&[("user", "  hi "), ("assistant", "yo")]);
    let text = "<turn>user:hi<eos>\n<turn>assistant:yo<eos>\n";
    assert_eq!(plain().render_chat(&messages, false).unwrap(), text);
    assert_eq!(plain().render_chat(&messages, true).unwrap(), format!("{text}<turn>assistant:"));

    let idioms = template(concat!(
        "{%- set ns = namespace(last=-1) -%}\n    {# a comment #}\n{%- for m in messages if m.role != 'system' -%}{%- set ns.last = loop.index0 -%}{%- endfor -%}\n",
        "{%- macro say(m) -%}{{ m.content.split('|')[-1].lstrip() | trim }}{%- endmacro -%}\n",
        "{% if tools is iterable and tools | length > 0 %}\n{{ tools | tojson }}\n{% endif %}\n",
        "{% if messages[0]['role'] == 'system' and not messages[0].content.startswith('no') %}\n    {{ bos_token + messages[0]['content'].upper() }}\n{% endif %}\n",
        "{% for m in messages[1:] %}\n{{- loop.index ~ say(m) -}}\n{% endfor %}\n{{ ns.last }}"
    ));
    let parts = template("{{ messages[0].content | trim }}{{ messages[0].content | string }}");
    let list: minijinja::Value = serde_json::from_str(r#"[{"type": "text", "text": "x"}]"#).unwrap();
    let asked = Message::new("user", vec![("role".into(), "user".into()), ("content".into(), list)], true);
    let dialogue = Dialogue { messages: vec![asked], ..Dialogue::default() };
    assert_eq!(parts.render_chat(&dialogue, false).unwrap(), "[{'type': 'text', 'text': 'x'}]".repeat(2));
    assert_eq!(
        idioms.render_chat(&chat(&[("system", "<b>"), ("user", "x| y"), ("assistant", "z")]), false).unwrap(),
        "    <bos><B>\n1y2z1"
    );
}

#[test]
fn a_templates_date_never_changes_and_generation_tags_leave_nothing() {
    for (open, close) in [("{%- generation -%}", "{% endgeneration %}"), ("{%generation%}", "{%endgeneration%}")] {
        let source = format!(
            "{{{{ strftime_now('%d %b %Y') }}}}{{% for m in messages %}}\n{open}\n {{{{ m.content }}}}\n{close}\n{{% endfor %}}"
        );
        let text = template(&source).render_chat(&chat(&[("user", "x")]), false).unwrap();
        assert_eq!(text.replace([' ', '\n'], ""), "26Jul2024x", "{open}");
    }
    assert!(
        template("{{ strftime_now('%') }}").render_chat(&chat(&[]), false).unwrap_err().message.contains("refuses")
    );
}

/// As `return_assistant_tokens_mask` of transformers 5.24.
#[test]
fn generation_tags_say_what_is_learnt() {
    let source = "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}{% endif %};{% endfor %}";
    let dialogue = chat(&[("user", "x"), ("assistant", "y"), ("user", "q"), ("assistant", "z")]);
    let sample = template(source).encode_chat(&dialogue).unwrap();
    assert_eq!(targets(&sample), [id('y'), EOS, id('z'), EOS]);
    assert_eq!(
        sample.tokens.len(),
        template(source).encode(&template(source).render_chat(&dialogue, false).unwrap()).unwrap().len()
    );
    let mut muted = chat(&[("user", "x"), ("assistant", "y"), ("user", "q"), ("assistant", "z")]);
    muted.messages[1].learnt = false;
    assert_eq!(targets(&template(source).encode_chat(&muted).unwrap()), [id('z'), EOS]);
    let half = template("{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}e{% endgeneration %}");
    assert!(half.encode_chat(&muted).unwrap_err().message.contains("weight 0"));
}

/// What DeepSeek's and Phi's templates do: a generation prompt that opens a thought, and an end token after the last turn only.
#[test]
fn a_generation_prompt_or_an_end_that_only_one_rendering_has_is_allowed() {
    let source = "{% for m in messages %}<turn>{{ m.role[0] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<turn>a{T}{% else %}<eos>{% endif %}";
    let sample = template(source)
        .encode_chat(&chat(&[("user", "x"), ("assistant", "y"), ("user", "q"), ("assistant", "z")]))
        .unwrap();
    assert_eq!(targets(&sample), [id('y'), id('z'), EOS]);
    assert_eq!(
        sample.tokens,
        [vec![TURN], ids("ux"), vec![TURN], ids("ay"), vec![TURN], ids("uq"), vec![TURN], ids("az"), vec![EOS]]
            .concat()
    );
}

#[test]
fn the_template_is_taken_from_its_own_file_or_from_a_list() {
    let (dir, _) = changed(|_, config| {
        config["chat_template"] = json!([{"name": "tools", "template": "no"}, {"name": "default", "template": "list"}])
    });
    assert_eq!(Tokenizer::load(dir.path()).unwrap().render_chat(&chat(&[]), false).unwrap(), "list");
    std::fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(Tokenizer::load(dir.path()).unwrap().render_chat(&chat(&[]), false).unwrap(), "file");
}

#[test]
fn a_template_that_fails_says_why() {
    let hi = chat(&[("user", "hi"), ("assistant", "x")]);
    for (tokenizer, names) in [
        (
            template("{{ raise_exception('roles must alternate') }}"),
            vec!["refuses this dialogue", "roles must alternate"],
        ),
        (template("{% if %}"), vec!["cannot be used", "line 1"]),
        (
            changed(|_, config| config["chat_template"] = Value::Null).1.unwrap(),
            vec!["no chat template", "chat_template.jinja"],
        ),
        (template("{{ messages.nothing.at_all }}"), vec!["refuses this dialogue"]),
        (
            template("{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}"),
            vec!["at message 2, assistant", "beginning of its rendering"],
        ),
    ] {
        let error = tokenizer.encode_chat(&hi).unwrap_err();
        assert!(names.iter().all(|n| error.message.contains(n)), "{error}");
    }
}

fn targets(sample: &ChatSample) -> Vec<i64> {
    sample.tokens.iter().zip(&sample.target).filter_map(|(&token, &target)| target.then_some(token)).collect()
}

#[test]
fn only_what_the_assistant_says_and_its_end_are_targets() {
    let tokenizer = plain();
    let messages = chat(&[("user", "abc"), ("assistant", "abc"), ("user", "q"), ("assistant", "no")]);
    let sample = tokenizer.encode_chat(&messages).unwrap();
    assert_eq!(sample.tokens, tokenizer.encode(&tokenizer.render_chat(&messages, false).unwrap()).unwrap());
    assert_eq!(targets(&sample), [ABC, EOS, id('n'), id('o'), EOS]);
    // The line break after the last EOS is no target, and no second EOS is appended.
    assert_eq!(sample.tokens.last(), Some(&id('\n')));
}

#[test]
fn a_dialogue_without_eos_gets_one_if_the_assistant_ends_it() {
    let tokenizer = template(
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    );
    let sample = tokenizer.encode_chat(&chat(&[("user", "x"), ("assistant", "y")])).unwrap();
    assert_eq!(targets(&sample), [id('y'), id(';'), EOS]);
    let sample = tokenizer.encode_chat(&chat(&[("assistant", "y"), ("user", "x")])).unwrap();
    assert_eq!((targets(&sample), sample.tokens.last()), (ids("y;"), Some(&id(';'))));
}

#[test]
fn a_token_that_begins_before_the_turn_and_holds_some_of_it_is_learnt() {
    let tokenizer = template(
        "{% for m in messages %}{{ 'U' if m.role == 'user' else 'a' }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}",
    );
    let sample = tokenizer.encode_chat(&chat(&[("user", "x"), ("assistant", "bz")])).unwrap();
    assert_eq!(sample.tokens, [id('U'), id('x'), AB, id('z'), EOS]);
    assert_eq!(targets(&sample), [AB, id('z'), EOS]);
}

#[test]
fn a_trained_model_gets_the_tokenizers_files() {
    let (from, tokenizer) = changed(|_, _| ());
    write(from.path(), "generation_config.json", &json!({"eos_token_id": EOS}));
    write(from.path(), "config.json", &json!({}));
    let to = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer.unwrap();
    tokenizer.copy_files(to.path(), None).unwrap();
    let mut names: Vec<String> =
        std::fs::read_dir(to.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]);
    assert_eq!(Tokenizer::load(to.path()).unwrap().encode("abc").unwrap(), [ABC]);
    assert_eq!(tokenizer.copy_files(&to.path().join("missing"), None).unwrap_err().exit.code(), 74);
    drop(from);
    assert!(tokenizer.copy_files(to.path(), None).unwrap_err().message.contains("tokenizer.json"));
}
