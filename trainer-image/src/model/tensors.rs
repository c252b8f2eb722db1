//! The tensors of a folder in Hugging Face layout: `model.safetensors` or `pytorch_model.bin`, or shards of either with an index.
//!
//! Files are mapped into memory, and one tensor is copied at a time, so that a rank reads only what it needs.

use crate::error::{Error, Result};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use tch::{Kind, Tensor};

pub(super) const WEIGHTS: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// How weights lie in a folder, and who finds those of one file.
struct Layout {
    single: &'static str,
    index: &'static str,
    locate: fn(&Path, &mut HashMap<String, Location>) -> Result<()>,
}

/// In the order in which they are looked for.
const LAYOUTS: [Layout; 2] = [
    Layout { single: WEIGHTS, index: INDEX, locate },
    Layout { single: "pytorch_model.bin", index: "pytorch_model.bin.index.json", locate: super::torch::locate },
];

/// A tensor in a file that is mapped into memory.
#[derive(Debug)]
pub(super) struct Location {
    pub map: Arc<Mmap>,
    /// Of its first number, in bytes.
    pub offset: usize,
    pub shape: Vec<i64>,
    /// How far apart its numbers are, where they do not follow one another: in numbers, for each dimension.
    pub strides: Option<Vec<i64>>,
    pub dtype: Dtype,
}

impl Location {
    /// Its shape, as in the file.
    pub fn shape(&self) -> &[i64] {
        &self.shape
    }

    /// Whether both hold the same numbers, written alike.
    pub fn equals(&self, other: &Self) -> bool {
        let bytes = |l: &Self| {
            let length = l.shape.iter().map(|&n| n as usize).product::<usize>() * l.dtype.bitsize() / 8;
            l.offset..l.offset + length
        };
        let alike = self.dtype == other.dtype && self.shape == other.shape && self.strides == other.strides;
        let same = Arc::ptr_eq(&self.map, &other.map) && self.offset == other.offset;
        match (alike, &self.strides) {
            (true, _) if same => true,
            (true, None) => self.map.get(bytes(self)) == other.map.get(bytes(other)),
            _ => false,
        }
    }

    /// The tensor where it lies.
    fn view(&self, kind: Kind) -> Result<Tensor> {
        let Some(strides) = &self.strides else {
            return Ok(c10d::from_mmap(self.map.clone(), self.offset, &self.shape, kind)?);
        };
        let numel = super::torch::span(&self.shape, strides).unwrap_or_default();
        let all = c10d::from_mmap(self.map.clone(), self.offset, &[numel], kind)?;
        Ok(all.f_as_strided(&self.shape, strides, None)?)
    }

    /// An fp32 copy of the tensor called `name` in a file in `dir`.
    pub fn copy(&self, dir: &Path, name: &str) -> Result<Tensor> {
        let error = |what: String| Error::input(format!("{}: tensor '{name}' {what}", dir.display()));
        let kind = kind_of(self.dtype)
            .ok_or_else(|| Error::input(format!("{}: {}", dir.display(), unsupported(name, self.dtype))))?;
        let copy = self.view(kind)?.f_to_dtype(Kind::Float, false, true)?.f_contiguous()?;
        // The extremes are not finite where any number is not, and finding them takes no memory.
        if copy.numel() > 0 {
            let (least, most) = copy.f_aminmax(None, false)?;
            if !(least.f_double_value(&[])?.is_finite() && most.f_double_value(&[])?.is_finite()) {
                return Err(error("holds NaN or infinity".into()));
            }
        }
        Ok(copy)
    }
}

/// The tensors of a model: those of its one file, or of the shards that its index names, each where the index says.
pub(super) fn locate_all(dir: &Path) -> Result<HashMap<String, Location>> {
    let there = |layout: &&Layout| dir.join(layout.single).exists() || dir.join(layout.index).exists();
    let found = LAYOUTS.iter().find(there);
    if let Some(error) = super::peft::not_a_model(dir).filter(|_| found.is_none()) {
        return Err(error);
    }
    let Layout { single, index, locate } = found.unwrap_or(&LAYOUTS[0]);
    let (single, index) = (dir.join(single), dir.join(index));
    let mut tensors = HashMap::new();
    if single.exists() || !index.exists() {
        locate(&single, &mut tensors)?;
        return Ok(tensors);
    }
    for (file, names) in read_index(&index)? {
        let mut shard = HashMap::new();
        locate(&dir.join(&file), &mut shard).map_err(|e| e.context(format!("a shard of {}", index.display())))?;
        for name in names {
            let location = shard.remove(&name).ok_or_else(|| {
                Error::input(format!("{}: tensor '{name}' is not in '{file}', as 'weight_map' says", index.display()))
            })?;
            tensors.insert(name, location);
        }
    }
    Ok(tensors)
}

/// An index's shards, and the tensors that are in each.
fn read_index(index: &Path) -> Result<BTreeMap<String, Vec<String>>> {
    let wrong = |what: String| Error::input(format!("{}: {what}", index.display()));
    let text = std::fs::read_to_string(index).map_err(|e| Error::unreadable(index, &e))?;
    let json: Value = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| wrong("field 'weight_map' is missing or not an object".into()))?;
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, file) in map {
        let file = file.as_str().filter(|f| !f.is_empty() && !f.contains(['/', '\\']) && !f.starts_with('.'));
        let file = file.ok_or_else(|| {
            wrong(format!(
                "'weight_map' gives tensor '{name}' {}, which is not the name of a file beside it",
                map[name]
            ))
        })?;
        shards.entry(file.into()).or_default().push(name.clone());
    }
    Ok(shards)
}

/// Adds the tensors of one safetensors file, every range checked by its header's own rules.
pub(super) fn locate(path: &Path, tensors: &mut HashMap<String, Location>) -> Result<()> {
    let wrong = |e: &dyn std::fmt::Display| Error::input(format!("{}: {e}", path.display()));
    let map = c10d::map_file(path).map_err(|e| Error::unreadable(path, &e))?;
    let (header, metadata): (usize, Metadata) = SafeTensors::read_metadata(&map).map_err(|e| wrong(&e))?;
    for (name, info) in metadata.tensors() {
        let shape = info.shape.iter().map(|&n| n as i64).collect();
        let offset = header + 8 + info.data_offsets.0;
        tensors.insert(name, Location { map: map.clone(), offset, shape, strides: None, dtype: info.dtype });
    }
    Ok(())
}

/// A tensor's number format, or what is wrong with that or with its shape.
pub(super) fn kind_as_asked(name: &str, location: &Location, shape: &[i64]) -> std::result::Result<Kind, String> {
    if location.shape != shape {
        return Err(format!("tensor '{name}' has shape {:?}, but config.json asks for {shape:?}", location.shape));
    }
    kind_of(location.dtype).ok_or_else(|| unsupported(name, location.dtype))
}

fn unsupported(name: &str, dtype: Dtype) -> String {
    format!("tensor '{name}' has type {dtype:?}; F32, F16 and BF16 are supported")
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        _ => None,
    }
}
