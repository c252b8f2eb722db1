//! Files that torch has written, and files that it never would.

use super::*;
use crate::model::{HeadKind, Source, tensors};
use safetensors::tensor::Dtype;
use std::path::PathBuf;
use tch::{Device, Kind, Tensor};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/pytorch").join(name)
}

fn read(name: &str) -> HashMap<String, Location> {
    let mut found = HashMap::new();
    locate(&golden(name), &mut found).unwrap();
    found
}

#[test]
fn views_and_every_number_format_are_read_as_torch_reads_them() {
    let found = read("odd.bin");
    let copy = |name: &str| found[name].copy(Path::new("odd.bin"), name).unwrap();
    let numbers = Tensor::arange(24, (Kind::Float, Device::Cpu));
    let whole = numbers.view([4, 6]);
    assert_eq!(copy("whole"), whole);
    assert_eq!(copy("row"), whole.get(2));
    assert_eq!(copy("transposed"), whole.tr());
    assert!(copy("transposed").is_contiguous());
    assert_eq!(copy("every_third"), numbers.slice(0, 1, 24, 3));
    for name in ["half", "bfloat16"] {
        assert_eq!(copy(name), numbers.narrow(0, 0, 6), "{name}");
    }
    assert_eq!(copy("parameter"), numbers.narrow(0, 0, 2));
    assert_eq!((copy("scalar").size(), f64::try_from(copy("scalar")).unwrap()), (vec![], 5.0));
    assert_eq!(copy("empty").size(), [0, 3]);
    assert_eq!(copy("repeated"), numbers.narrow(0, 3, 1).expand([2, 3], false));
    assert_eq!((found["steps"].dtype, found["steps"].shape()), (Dtype::I64, &[1][..]));
    let error = found["steps"].copy(Path::new("odd.bin"), "steps").unwrap_err();
    assert!(error.message.contains("'steps' has type I64"), "{error}");
}

#[test]
fn tensors_of_one_storage_are_the_same() {
    let found = read("llama-tied-headdim.bin");
    let (head, embedding) = (&found["lm_head.weight"], &found["model.embed_tokens.weight"]);
    assert!(head.equals(embedding) && head.offset == embedding.offset);
    let odd = read("odd.bin");
    assert!(!odd["whole"].equals(&odd["transposed"]) && !odd["half"].equals(&odd["bfloat16"]));
    assert!(odd["transposed"].equals(&odd["transposed"]));
}

/// A folder with the config of a golden model and files that torch has written.
fn folder(model: &str, files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(golden("../models").join(model).join("config.json"), dir.path().join("config.json")).unwrap();
    for (from, to) in files {
        std::fs::copy(golden(from), dir.path().join(to)).unwrap();
    }
    dir
}

const SHARDED: [(&str, &str); 3] = [
    ("sharded/pytorch_model.bin.index.json", "pytorch_model.bin.index.json"),
    ("sharded/pytorch_model-00001-of-00002.bin", "pytorch_model-00001-of-00002.bin"),
    ("sharded/pytorch_model-00002-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
];

#[test]
fn a_model_of_torch_is_the_one_in_safetensors() {
    let single = folder("llama-tied-headdim", &[("llama-tied-headdim.bin", "pytorch_model.bin")]);
    let sharded = folder("gpt2", &SHARDED);
    for (dir, model, kind) in [(single, "llama-tied-headdim", Kind::Float), (sharded, "gpt2", Kind::BFloat16)] {
        let (read, other) =
            (Source::open(dir.path()).unwrap(), Source::open(&golden("../models").join(model)).unwrap());
        assert_eq!((read.kind, read.spec.tied_head, &read.warnings), (kind, true, &vec![]), "{model}");
        for segment in other.spec.segments() {
            let of = |source: &Source| source.segment(segment, HeadKind::Lm).unwrap().into_iter().flatten();
            assert_eq!(of(&read).count(), of(&other).count());
            for (a, b) in of(&read).zip(of(&other)) {
                assert_eq!(a, b.to_kind(kind).to_kind(Kind::Float), "{model}, {segment:?}");
            }
        }
    }
}

#[test]
fn a_model_of_torch_is_held_against_its_config() {
    let says = |dir: &tempfile::TempDir, parts: &[&str]| {
        let error = Source::open(dir.path()).unwrap_err();
        assert_eq!(error.exit.code(), 65, "{error}");
        assert!(parts.iter().all(|part| error.message.contains(part)), "{error}");
    };
    let bin = [("llama-tied-headdim.bin", "pytorch_model.bin")];
    let dir = folder("llama-tied-headdim", &bin);
    let path = dir.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"vocab_size\": 97", "\"vocab_size\": 98")).unwrap();
    says(&dir, &["tensor 'model.embed_tokens.weight' has shape [97, 32], but config.json asks for [98, 32]"]);
    says(&folder("llama-linear", &bin), &["has shape"]);
    std::fs::write(&path, text.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3")).unwrap();
    says(&dir, &["tensor 'model.layers.2.", "is missing"]);
    says(&folder("gpt2", &SHARDED[..2]), &["a shard of", "index.json", "pytorch_model-00002-of-00002.bin"]);
}

/// A stored zip file of these entries.
fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut out, mut directory) = (vec![], vec![]);
    for (name, bytes) in entries {
        let (offset, size, len) = (out.len() as u32, bytes.len() as u32, name.len() as u16);
        out.extend(b"PK\x03\x04");
        out.extend([0; 14]);
        [size, size].iter().for_each(|n| out.extend(n.to_le_bytes()));
        [len, 0].iter().for_each(|n| out.extend(n.to_le_bytes()));
        out.extend(name.bytes().chain(bytes.iter().copied()));
        directory.extend(b"PK\x01\x02");
        directory.extend([0; 16]);
        [size, size].iter().for_each(|n| directory.extend(n.to_le_bytes()));
        directory.extend(len.to_le_bytes());
        directory.extend([0; 12]);
        directory.extend(offset.to_le_bytes());
        directory.extend(name.bytes());
    }
    let (start, size, count) = (out.len() as u32, directory.len() as u32, entries.len() as u16);
    out.extend(directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    [count, count].iter().for_each(|n| out.extend(n.to_le_bytes()));
    [size, start].iter().for_each(|n| out.extend(n.to_le_bytes()));
    out.extend([0, 0]);
    out
}

/// What is said of a file with this content.
fn refused(content: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pytorch_model.bin");
    std::fs::write(&path, content).unwrap();
    let error = locate(&path, &mut HashMap::new()).unwrap_err();
    assert_eq!(error.exit.code(), 65, "{error}");
    assert!(error.message.contains("pytorch_model.bin") && !error.message.contains('\n'), "{error}");
    error.message
}

/// The same, of one with this pickle.
fn refused_pickle(pickle: &[u8]) -> String {
    refused(&zip(&[("m/data.pkl", pickle), ("m/data/0", &[0; 8])]))
}

/// A pickle of `{"w": tensor}`, whose tensor has these numbers in its storage, this offset, size and stride.
fn one_tensor(numel: u8, offset: u8, size: u8, stride: u8) -> Vec<u8> {
    let mut pickle = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK".to_vec();
    pickle.extend([
        numel, b't', b'Q', b'K', offset, b'K', size, 0x85, b'K', stride, 0x85, 0x89, b'}', b't', b'R', b's', b'.',
    ]);
    pickle
}

#[test]
fn a_pickle_that_calls_anything_else_is_refused_by_its_name() {
    for (pickle, name) in [
        (&b"\x80\x02cbuiltins\nprint\nX\x02\0\0\0hi\x85R."[..], "'builtins.print'"),
        (b"\x80\x04\x8c\x08builtins\x8c\x03len\x93\x8c\x02hi\x85R.", "'builtins.len'"),
        (b"\x80\x02}X\x01\0\0\0wctorch.serialization\nload\n)Rs.", "'torch.serialization.load'"),
        // Nothing is called here, and it could be in the next word.
        (b"\x80\x02cdatetime\ndate\n.", "'datetime.date'"),
    ] {
        let said = refused_pickle(pickle);
        assert!(
            said.contains(name) && said.contains("nothing of it was run") && said.contains("safetensors"),
            "{said}"
        );
    }
    for word in [&b"\x80\x02ccollections\nOrderedDict\n)\x81."[..], b"(ibuiltins\nprint\n.", b"(o.", b"\x82\x01."] {
        assert!(refused_pickle(word).contains("has the word 0x"), "{}", refused_pickle(word));
    }
}

#[test]
fn what_is_no_state_dict_is_told_by_what_it_is() {
    for (pickle, part) in [
        (&b"\x80\x02K\x07."[..], "holds a number, not the state_dict"),
        (b"\x80\x02}X\x05\0\0\0epochK\x03s.", "'epoch' in it is a number, not a tensor"),
        (b"\x80\x02}X\x05\0\0\0model}s.", "'model' in it is a dict, not a tensor"),
        (b"\x80\x02}K\x01K\x02s.", "where a text belongs"),
        (b"\x80\x02", "ends at byte 2"),
        (b"R.", "takes what is not there"),
        (b"(K\x01RK\x02.", "takes what is not there"),
        (b"t.", "ends what has not begun"),
        (b"h\x05.", "never remembered"),
        (b"q\x05.", "remembers what is not there"),
        (b"\x8a\x09111111111.", "more than 64 bits"),
        (b"X\xff\xff\xff\xffabc", "ends at byte 8"),
        (b"ccollections\nOrderedDict\nK\x01b.", "sets the state"),
        (b"ccollections\nOrderedDict\nK\x01\x85R.", "calls something"),
        (b"ctorch\nFloatStorage\nQ.", "where a tuple belongs"),
    ] {
        let said = refused_pickle(pickle);
        assert!(said.contains(part), "{said}");
    }
    // As deep as it is long; nothing may recurse over it.
    let deep = [&b"K\x01"[..], &vec![0x85; 1 << 20], b"."].concat();
    assert!(refused_pickle(&deep).contains("holds a tuple"));
}

#[test]
fn a_tensor_that_is_not_within_its_bytes_is_refused() {
    let mut found = HashMap::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.bin");
    std::fs::write(
        &path,
        zip(&[("m/data.pkl", &one_tensor(2, 1, 1, 1)), ("m/data/0", &[0, 0, 0, 0, 0, 0, 0x80, 0x3f])]),
    )
    .unwrap();
    locate(&path, &mut found).unwrap();
    assert_eq!(f64::try_from(found["w"].copy(&path, "w").unwrap()).unwrap(), 1.0);
    for (numel, offset, size, stride) in [(2, 1, 2, 1), (2, 0, 2, 2), (2, 0, 3, 1), (2, 2, 1, 1)] {
        let said = refused_pickle(&one_tensor(numel, offset, size, stride));
        assert!(said.contains("tensor 'w'") && said.contains("not within its 2 numbers"), "{said}");
    }
    assert!(refused_pickle(&one_tensor(3, 0, 1, 1)).contains("one of 3 numbers that have 8 bytes"));
    let elsewhere = zip(&[("m/data.pkl", &one_tensor(2, 0, 2, 1))]);
    assert!(refused(&elsewhere).contains("lacks its entry 'm/data/0'"));
    assert_eq!(span(&[i64::MAX, i64::MAX], &[0, 0]), None);
    assert_eq!(span(&[3], &[i64::MAX]), None);
    assert_eq!(span(&[2, 3], &[5, 1]), Some(8));
}

#[test]
fn a_damaged_file_is_told_in_one_line() {
    let whole = std::fs::read(golden("llama-tied-headdim.bin")).unwrap();
    assert!(refused(&whole[..whole.len() - 30]).contains("cut, or no zip file"));
    assert!(refused(b"\x80\x02\x8a\x0a").contains("torch writes since version 1.6"));
    assert!(refused(b"").contains("torch writes since"));
    let pickle = one_tensor(2, 0, 2, 1);
    let good = [("m/data.pkl", &pickle[..]), ("m/data/0", &[0; 8])];
    let with = |name, bytes| refused(&zip(&[good[0], good[1], (name, bytes)]));
    assert!(with("m/byteorder", b"big").contains("another order"));
    assert!(with("m/data/0", b"").contains("a name twice"));
    assert!(with("n/data.pkl", b"").contains("without the one data.pkl"));
    let mut packed = zip(&good);
    let entry = packed.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    packed[entry + 10] = 8;
    assert!(refused(&packed).contains("packed or encrypted"));
    let mut away = zip(&good);
    away[entry + 42] = 1;
    assert!(refused(&away).contains("is damaged"));
}

/// Whatever a byte becomes, the answer is an error or tensors within the file, and never anything else.
#[test]
fn no_change_of_a_byte_does_harm() {
    let pickle = one_tensor(2, 0, 2, 1);
    let whole = zip(&[("m/data.pkl", &pickle), ("m/data/0", &[0; 8]), ("m/byteorder", b"little")]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.bin");
    let mut good = 0;
    for (at, to) in (0..whole.len()).flat_map(|at| [0, 1, 0x7f, 0xff, b'R', b'Q', b't', b'('].map(|to| (at, to))) {
        let mut bytes = whole.clone();
        bytes[at] = to;
        std::fs::write(&path, bytes).unwrap();
        let mut found = HashMap::new();
        if locate(&path, &mut found).is_ok() {
            good += 1;
            found.iter().for_each(|(name, tensor)| drop(tensor.copy(&path, name)));
        }
    }
    assert!(good > 0);
    // Only safetensors are looked for in an adapter's folder.
    assert!(tensors::locate(&path, &mut HashMap::new()).is_err());
}
