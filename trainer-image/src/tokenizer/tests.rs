use super::fixture::*;
use super::{Begin, ChatSample, Message, Tokenizer};
use serde_json::{Value, json};

fn chat(turns: &[(&str, &str)]) -> Vec<Message> {
    turns.iter().map(|(role, content)| Message { role: role.to_string(), content: content.to_string() }).collect()
}

fn template(source: &str) -> Tokenizer {
    changed(|_, config| config["chat_template"] = json!(source)).1.unwrap()
}

#[test]
fn text_becomes_ids_and_ids_text() {
    let tokenizer = plain();
    assert_eq!(tokenizer.encode("abcab z", Begin::Yes).unwrap(), [ABC, AB, id(' '), id('z')]);
    assert_eq!(tokenizer.encode("é", Begin::No).unwrap(), [UNK]);
    assert_eq!(tokenizer.decode(&[BOS, ABC, id(' '), EOS, AB, PAD]).unwrap(), "abc ab");
    assert_eq!(tokenizer.vocab_size(), VOCAB);
    assert_eq!(tokenizer.decode(&[-1]).unwrap_err().exit.code(), 70);
}

#[test]
fn what_tokenizer_json_asks_to_cut_or_pad_is_not_done() {
    let text = "x".repeat(20);
    assert_eq!(plain().encode(&text, Begin::Yes).unwrap(), ids(&text));
    assert_eq!(plain().encode("x", Begin::Yes).unwrap(), ids("x"));
}

/// Decoding and encoding again is not the identity: this is why samples keep ids and never pass through text.
#[test]
fn pieces_encoded_apart_keep_their_ids() {
    let tokenizer = plain();
    let apart = [tokenizer.encode("a", Begin::Yes).unwrap(), tokenizer.encode("bc", Begin::No).unwrap()].concat();
    assert_eq!(apart, ids("abc"));
    assert_eq!(tokenizer.encode(&tokenizer.decode(&apart).unwrap(), Begin::Yes).unwrap(), [ABC]);
}

#[test]
fn bos_stands_at_the_beginning_only_and_once() {
    let tokenizer = with_bos();
    assert_eq!(tokenizer.encode("x", Begin::Yes).unwrap(), [BOS, id('x')]);
    assert_eq!(tokenizer.encode("x", Begin::No).unwrap(), [id('x')]);
    assert_eq!(tokenizer.encode("<bos>x", Begin::Yes).unwrap(), [BOS, id('x')]);
    assert_eq!(tokenizer.encode("", Begin::Yes).unwrap(), [BOS]);
    assert_eq!(plain().encode("x", Begin::Yes).unwrap(), [id('x')]);
    assert_eq!(plain().encode_prompt("").unwrap(), [BOS]);
    assert_eq!(without_bos().encode_prompt("").unwrap(), [0i64; 0]);
}

#[test]
fn the_post_processor_says_what_begins_a_sequence_unless_the_config_does() {
    let processor = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}, "<eos>": {"id": "<eos>", "ids": [EOS], "tokens": ["<eos>"]}}
    });
    let (_dir, tokenizer) = changed(|tokenizer, _| tokenizer["post_processor"] = processor.clone());
    assert_eq!(tokenizer.unwrap().encode("x", Begin::Yes).unwrap(), [BOS, id('x')]);
    let (_dir, tokenizer) = changed(|tokenizer, config| {
        tokenizer["post_processor"] = processor;
        config["add_bos_token"] = json!(false);
    });
    assert_eq!(tokenizer.unwrap().encode("x", Begin::Yes).unwrap(), [id('x')]);
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
        (
            changed(|_, config| (config["bos_token"], config["add_bos_token"]) = (Value::Null, json!(true))).1,
            vec!["add_bos_token", "bos_token"],
        ),
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
    assert_eq!(
        idioms.render_chat(&chat(&[("system", "<b>"), ("user", "x| y"), ("assistant", "z")]), false).unwrap(),
        "    <bos><B>\n1y2z1"
    );
}

#[test]
fn a_templates_date_never_changes_and_generation_tags_have_no_effect() {
    let tokenizer = template(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}\n{%- generation -%}\n {{ m.content }}\n{% endgeneration %}\n{% endfor %}",
    );
    assert_eq!(tokenizer.render_chat(&chat(&[("user", "x")]), false).unwrap(), "26 Jul 2024x\n");
    assert!(template("{{ strftime_now('%') }}").render_chat(&[], false).unwrap_err().message.contains("refuses"));
}

#[test]
fn the_template_is_taken_from_its_own_file_or_from_a_list() {
    let (dir, _) = changed(|_, config| {
        config["chat_template"] = json!([{"name": "tools", "template": "no"}, {"name": "default", "template": "list"}])
    });
    assert_eq!(Tokenizer::load(dir.path()).unwrap().render_chat(&[], false).unwrap(), "list");
    std::fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(Tokenizer::load(dir.path()).unwrap().render_chat(&[], false).unwrap(), "file");
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
    assert_eq!(sample.tokens, tokenizer.encode(&tokenizer.render_chat(&messages, false).unwrap(), Begin::No).unwrap());
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
fn a_token_that_begins_before_the_turn_belongs_to_the_prompt() {
    let tokenizer = template(
        "{% for m in messages %}{{ 'U' if m.role == 'user' else 'a' }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}",
    );
    let sample = tokenizer.encode_chat(&chat(&[("user", "x"), ("assistant", "bz")])).unwrap();
    assert_eq!(sample.tokens, [id('U'), id('x'), AB, id('z'), EOS]);
    assert_eq!(targets(&sample), [id('z'), EOS]);
}

#[test]
fn a_trained_model_gets_the_tokenizers_files() {
    let (from, tokenizer) = changed(|_, _| ());
    write(from.path(), "generation_config.json", &json!({"eos_token_id": EOS}));
    write(from.path(), "config.json", &json!({}));
    let to = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer.unwrap();
    tokenizer.copy_files(to.path()).unwrap();
    let mut names: Vec<String> =
        std::fs::read_dir(to.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]);
    assert_eq!(Tokenizer::load(to.path()).unwrap().encode("abc", Begin::Yes).unwrap(), [ABC]);
    assert_eq!(tokenizer.copy_files(&to.path().join("missing")).unwrap_err().exit.code(), 74);
    drop(from);
    assert!(tokenizer.copy_files(to.path()).unwrap_err().message.contains("tokenizer.json"));
}
