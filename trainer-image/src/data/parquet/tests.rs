//! Tables that pyarrow has written.

use super::super::tests::{self, load_prompts, load_rankings, load_sft};
use crate::error::Result;
use crate::tokenizer::fixture::plain;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/parquet").join(name)
}

/// Everything that is read of a file, as text.
fn all<T: std::fmt::Debug>(load: impl Fn(&Path) -> Result<tests::Split<T>>, name: &str) -> String {
    let path = golden(name);
    let mut split = load(&path).unwrap();
    let bytes: [u8; 32] = Sha256::digest(std::fs::read(path).unwrap()).into();
    assert_eq!(std::mem::take(&mut split.file), bytes, "{name}: the hash is that of the file's bytes");
    format!("{split:?}")
}

#[test]
fn a_table_is_read_as_its_rows_in_json_lines() {
    let chat = tests::sft("chat", 400, 0.3);
    let asked = tests::ppo(400, 0.3);
    let pairs = tests::reward(32, 0.3);
    let json = tests::as_json();
    for suffix in [".parquet", ".jsonl"] {
        assert!(all(|p| load_sft(p, &chat, &plain(), 1), &format!("dialogues{suffix}")).contains("records: 3"));
    }
    let same = |load: &dyn Fn(&str) -> String, name: &str| {
        assert_eq!(load(&format!("{name}.parquet")), load(&format!("{name}.jsonl")), "{name}");
    };
    same(&|name| all(|p| load_sft(p, &chat, &plain(), 1), name), "dialogues");
    // What the template is given, word for word: names, calls, tools, and no null.
    same(&|name| all(|p| load_prompts(p, &asked, &json, 1), name), "asked");
    let text = all(|p| load_prompts(p, &asked, &json, 1), "asked.parquet");
    assert!(text.contains("tool_call_id") && text.contains("parameters") && !text.contains("null"), "{text}");
    same(&|name| all(|p| load_rankings(p, &pairs, &plain(), 1), name), "pairs");
}

fn refused(name: &str, parts: &[&str]) {
    let path = golden(name);
    let result = match name {
        "bytes.parquet" => load_sft(&path, &tests::sft("text", 9, 0.0), &plain(), 1).map(drop),
        _ => load_prompts(&path, &tests::ppo(9, 0.0), &plain(), 1).map(drop),
    };
    let error = result.unwrap_err();
    assert_eq!(error.exit.code(), 65, "{error}");
    assert!(error.message.contains(name) && parts.iter().all(|part| error.message.contains(part)), "{error}");
}

#[test]
fn what_is_wrong_with_a_table_is_told_with_its_row() {
    refused("null.parquet", &[": row 2: field 'prompt' is null, not a string; expected {\"prompt\": string}"]);
    refused("bytes.parquet", &[": row 2: a column holds bytes that are no text in UTF-8", "(format text)"]);
    refused("brotli.parquet", &["cannot be read", "brotli"]);
    refused("empty.parquet", &["the file has no record"]);
}

#[test]
fn columns_may_have_other_names_and_bad_rows_be_skipped() {
    let mut settings = tests::ppo(9, 0.0);
    settings.prompts.fields = [("prompt".to_string(), "chosen".to_string())].into();
    let split = load_prompts(&golden("pairs.parquet"), &settings, &plain(), 1).unwrap();
    assert_eq!((split.train.len(), split.train[0].text.as_str()), (300, "c0"));
    let mut settings = tests::ppo(9, 0.0);
    settings.prompts.on_bad_record = rlhf_api::stage::OnBadRecord::Skip;
    let split = load_prompts(&golden("null.parquet"), &settings, &plain(), 1).unwrap();
    assert_eq!((split.train.len(), split.summary.bad), (1, 1));
    let mut settings = tests::sft("text", 9, 0.0);
    settings.dataset.on_bad_record = rlhf_api::stage::OnBadRecord::Skip;
    assert_eq!(load_sft(&golden("bytes.parquet"), &settings, &plain(), 1).unwrap().summary.bad, 1);
}

#[test]
fn a_table_without_the_columns_says_which_it_has() {
    let error = load_sft(&golden("pairs.parquet"), &tests::sft("chat", 9, 0.0), &plain(), 1).unwrap_err();
    let columns = "has the columns [prompt, chosen, rejected, score, image], and none that is looked for";
    assert!(error.message.contains(columns) && error.message.contains("(format chat)"), "{error}");
    let error = load_sft(&golden("pairs.parquet"), &tests::sft("promptCompletion", 9, 0.0), &plain(), 1).unwrap_err();
    assert!(error.message.contains(": row 1: field 'completion' is missing"), "{error}");
}

/// Some of what is damaged makes the library panic.
#[test]
fn a_damaged_table_is_an_error_or_read_and_never_anything_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.parquet");
    let whole = std::fs::read(golden("dialogues.parquet")).unwrap();
    let settings = tests::sft("chat", 400, 0.0);
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        load_sft(&path, &settings, &plain(), 1)
    };
    let cut = read(&whole[..whole.len() - 9]).unwrap_err();
    assert!(cut.exit.code() == 65 && cut.message.contains("the Parquet file cannot be read"), "{cut}");
    let mut errors = 0;
    for at in (4..whole.len()).step_by(3) {
        for flip in [0x01, 0x80] {
            let mut bytes = whole.clone();
            bytes[at] ^= flip;
            if let Err(error) = read(&bytes) {
                errors += 1;
                assert!(error.exit.code() == 65 && error.message.contains("d.parquet"), "{error}");
            }
        }
    }
    assert!(errors > 100, "{errors}");
}

/// A table of texts of which one is none: the library takes it for the table's end, and tells all of it.
#[test]
fn a_text_that_is_not_utf_8_is_a_bad_record_like_others() {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.parquet");
    let schema = "message m { required binary text (UTF8); required binary other (UTF8); }";
    let schema = std::sync::Arc::new(parse_message_type(schema).unwrap());
    let mut writer =
        SerializedFileWriter::new(std::fs::File::create(&path).unwrap(), schema, Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let wrong = [&b"\xff\xfe"[..], &b"secret".repeat(1000)].concat();
    for texts in [[b"x".to_vec(), wrong, b"z".to_vec()], [b"1".to_vec(), b"2".to_vec(), b"3".to_vec()]] {
        let texts = texts.map(ByteArray::from);
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    let mut settings = tests::sft("text", 9, 0.0);
    let error = load_sft(&path, &settings, &plain(), 1).unwrap_err();
    let said = error.message.contains("d.parquet: row 2: a column holds bytes that are no text in UTF-8");
    assert!(said && error.message.len() < 500 && !error.message.contains("secret"), "{error}");
    settings.dataset.on_bad_record = rlhf_api::stage::OnBadRecord::Skip;
    let split = load_sft(&path, &settings, &plain(), 1).unwrap();
    let texts: Vec<_> = split.train.iter().map(|s| plain().decode(&s.tokens).unwrap()).collect();
    assert_eq!((texts, split.summary.bad), (vec!["x".to_string(), "z".to_string()], 1));
}
