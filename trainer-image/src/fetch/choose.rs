//! Which files of a model's repository are fetched: those that training reads. A repository often has the same weights in several
//! formats, of which one is enough.

use super::origin::File;

/// Files beside the weights, by their ends.
const BESIDE: [&str; 4] = [".json", ".txt", ".model", ".jinja"];
/// The folder whose files belong to the tokenizer.
const TEMPLATES: &str = "additional_chat_templates/";
/// Where weights are told of that are not fetched.
const TORCH_INDEX: &str = "pytorch_model.bin.index.json";

/// Those of a model's files that are needed.
///
/// # Errors
/// It is no model that can be read, in words.
pub(super) fn of_model(files: Vec<File>) -> Result<Vec<File>, String> {
    let has = |wanted: fn(&str) -> bool| files.iter().any(|file| wanted(&file.name));
    let weights: fn(&str) -> bool = if has(is_safetensors) { is_safetensors } else { is_torch };
    if !has(weights) {
        let some: Vec<_> = files.iter().map(|file| file.name.as_str()).take(5).collect();
        return Err(format!(
            "it has neither model.safetensors nor pytorch_model.bin, whole or in shards, but {}; name a model in the layout of transformers",
            if some.is_empty() { "nothing".into() } else { some.join(", ") }
        ));
    }
    if !files.iter().any(|file| file.name == "config.json" || file.name == "adapter_config.json") {
        return Err("it has no config.json; name a model in the layout of transformers".into());
    }
    let torch = has(is_safetensors);
    let needed = |name: &str| {
        let beside =
            !name.contains('/') && BESIDE.iter().any(|end| name.ends_with(end)) && !(torch && name == TORCH_INDEX);
        let template = name.strip_prefix(TEMPLATES).is_some_and(|rest| rest.ends_with(".jinja") && !rest.contains('/'));
        weights(name) || beside || template
    };
    Ok(files.into_iter().filter(|file| needed(&file.name)).collect())
}

fn is_safetensors(name: &str) -> bool {
    name == "adapter_model.safetensors" || is_whole_or_shard(name, "model", ".safetensors")
}

fn is_torch(name: &str) -> bool {
    is_whole_or_shard(name, "pytorch_model", ".bin")
}

/// Whether it is `model.end` or `model-00001-of-00002.end`: another variant, such as `model.fp16.end`, has the weights again.
fn is_whole_or_shard(name: &str, model: &str, end: &str) -> bool {
    let Some(middle) = name.strip_prefix(model).and_then(|rest| rest.strip_suffix(end)) else { return false };
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let shard = middle.strip_prefix('-').and_then(|rest| rest.split_once("-of-"));
    middle.is_empty() || shard.is_some_and(|(i, of)| number(i) && number(of))
}

#[cfg(test)]
mod tests {
    use super::super::origin::Check;
    use super::*;

    fn chosen(names: &[&str]) -> Result<Vec<String>, String> {
        let file =
            |name: &&str| File { name: (*name).into(), key: String::new(), size: 1, check: Check::Tag(String::new()) };
        of_model(names.iter().map(file).collect()).map(|files| files.into_iter().map(|file| file.name).collect())
    }

    #[test]
    fn weights_come_in_one_format_and_without_what_nobody_reads() {
        let shards =
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"];
        let beside = [
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "merges.txt",
            "tokenizer.model",
            "chat_template.jinja",
            "additional_chat_templates/tool.jinja",
        ];
        let unread = [
            "pytorch_model-00001-of-00001.bin",
            "pytorch_model.bin.index.json",
            "consolidated.safetensors",
            "model.fp16.safetensors",
            "flax_model.msgpack",
            "tf_model.h5",
            "q4.gguf",
            "original/params.json",
            "onnx/model.onnx",
            "README.md",
            "rust_model.ot",
            ".gitattributes",
        ];
        let all: Vec<_> = [&shards[..], &beside, &unread].concat();
        assert_eq!(chosen(&all).unwrap(), [&shards[..], &beside].concat());
        let old = ["config.json", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"];
        assert_eq!(chosen(&[&old[..], &["model.gguf", "training_args.bin"]].concat()).unwrap(), old);
    }

    #[test]
    fn what_is_no_model_is_told_by_what_it_has() {
        assert!(chosen(&["q4.gguf", "config.json"]).unwrap_err().contains("but q4.gguf, config.json"));
        assert!(chosen(&[]).unwrap_err().contains("but nothing"));
        assert!(chosen(&["model.safetensors"]).unwrap_err().contains("config.json"));
    }
}
