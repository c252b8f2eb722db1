//! Models for tests: a config, and weights that fit it.

use super::export::stored;
use super::{HeadKind, read_config};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Tensors by name: shape and bytes.
pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

/// The weights that this config asks for, all small numbers and no two tensors alike.
pub(crate) fn weights(dir: &Path, config: &Value, dtype: Dtype) -> Tensors {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let (_, family, spec) = read_config(dir).unwrap();
    let entries = spec.segments().into_iter().flat_map(|s| stored(family, &spec, s, HeadKind::Lm));
    let tensor = |(i, (entry, shape)): (usize, (super::families::HfTensor, Vec<i64>))| {
        let shape: Vec<usize> = shape.into_iter().map(|n| n as usize).collect();
        (entry.name, (shape.clone(), numbers(shape.iter().product(), i, dtype)))
    };
    entries.enumerate().map(tensor).collect()
}

/// So many numbers as bytes.
pub(crate) fn numbers(count: usize, seed: usize, dtype: Dtype) -> Vec<u8> {
    let value = |i: usize| 0.01 * ((i * 7 + seed * 13) % 31) as f32 - 0.15;
    let bytes = |i: usize| match dtype {
        Dtype::BF16 => half::bf16::from_f32(value(i)).to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32(value(i)).to_le_bytes().to_vec(),
        _ => value(i).to_le_bytes().to_vec(),
    };
    (0..count).flat_map(bytes).collect()
}

/// Writes weights into a model's folder.
pub(crate) fn write_weights(dir: &Path, tensors: &Tensors, dtype: Dtype) {
    let views =
        tensors.iter().map(|(name, (shape, bytes))| (name, TensorView::new(dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

/// Writes a model with this config.
pub(crate) fn write_model(dir: &Path, config: &Value) {
    let tensors = weights(dir, config, Dtype::F32);
    write_weights(dir, &tensors, Dtype::F32);
}
