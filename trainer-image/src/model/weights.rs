//! Weights on their way to disk in Hugging Face layout, one tensor after another.
//!
//! Names and shapes are known before any value is, so every file's header is written first, and each tensor then goes to its
//! own place in pieces of a few MiB: writing takes no memory to speak of, and tensors may come in any order. Weights above a
//! shard's size are split as `transformers` splits them: tensors in order, a new file where one does not fit into the last.

use super::families::{HfTensor, Layout};
use super::tensors::{INDEX, WEIGHTS};
use crate::error::{Error, Result};
use crate::{files, safetensors_header};
use rlhf_api::report::ExitCode;
use safetensors::tensor::Dtype;
use serde_json::{Map, json};
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// The largest file of weights, if no tensor is larger: what `transformers` wrote until version 4.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// Bytes that are on their way at a time.
const PIECE_BYTES: usize = 8 << 20;

const FP32: usize = size_of::<f32>();

/// The tensors of a checkpoint that are still to come, and where they go.
pub(super) struct Weights {
    dir: PathBuf,
    files: Vec<String>,
    kind: Kind,
    places: HashMap<String, Place>,
    /// The file that was written to last.
    open: Option<(usize, File)>,
    buffer: Vec<u8>,
}

/// Where a tensor goes.
struct Place {
    file: usize,
    offset: u64,
    bytes: u64,
}

impl Weights {
    /// Begins the files of tensors of this kind, with these names and shapes, in `dir`, of at most `shard_bytes` each.
    pub(super) fn create(dir: &Path, tensors: &[(String, Vec<i64>)], kind: Kind, shard_bytes: u64) -> Result<Self> {
        let shards = split(tensors, kind, shard_bytes);
        let (dir, files) = (dir.into(), names(shards.len()));
        let mut weights = Self { dir, files, kind, places: HashMap::new(), open: None, buffer: vec![] };
        for (file, shard) in shards.into_iter().enumerate() {
            weights.begin(file, shard)?;
        }
        if weights.files.len() > 1 {
            weights.write_index(tensors)?;
        }
        Ok(weights)
    }

    /// Writes the header of a file, in which tensors lie in the order of their names.
    fn begin(&mut self, file: usize, mut shard: Vec<&(String, Vec<i64>)>) -> Result<()> {
        shard.sort();
        let named = shard.iter().map(|(name, shape)| (name.as_str(), shape.iter().map(|&n| n as usize).collect()));
        let metadata = Some(HashMap::from([("format".into(), "pt".into())]));
        let header = safetensors_header::header(dtype(self.kind), named, metadata)?;
        let mut end = header.len() as u64;
        for tensor in shard {
            let bytes = bytes(tensor, self.kind);
            self.places.insert(tensor.0.clone(), Place { file, offset: end, bytes });
            end += bytes;
        }
        let path = self.dir.join(&self.files[file]);
        let write = || {
            let out = File::create(&path)?;
            out.write_all_at(&header, 0)?;
            out.set_len(end)
        };
        write().map_err(|e| Error::storage(&path, e))
    }

    /// Writes which tensor is in which file.
    fn write_index(&self, tensors: &[(String, Vec<i64>)]) -> Result<()> {
        let map: BTreeMap<&str, &str> =
            self.places.iter().map(|(name, place)| (name.as_str(), self.files[place.file].as_str())).collect();
        let map: Map<_, _> = map.into_iter().map(|(name, file)| (name.to_string(), json!(file))).collect();
        let index = json!({"metadata": {"total_size": tensors.iter().map(|t| bytes(t, self.kind)).sum::<u64>()}, "weight_map": map});
        let text = serde_json::to_vec_pretty(&index).map_err(|e| Error::bug(e.to_string()))?;
        files::write(&self.dir.join(INDEX), &text)
    }

    /// Writes a tensor, which is made of `parts`.
    pub(super) fn write(&mut self, entry: &HfTensor, parts: &[&Tensor]) -> Result<()> {
        let place = self.places.remove(&entry.name);
        let place = place.ok_or_else(|| Error::bug(format!("nobody waits for the tensor '{}'", entry.name)))?;
        let mut offset = place.offset;
        let mut piece = |piece: Tensor| {
            offset += self.write_piece(place.file, offset, &piece)?;
            Ok(())
        };
        match entry.layout {
            Layout::Transposed => transposed(parts, &mut piece)?,
            // Who writes parts head by head has dealt them out.
            Layout::Rows | Layout::Heads => joined(parts, &mut piece)?,
        }
        if offset != place.offset + place.bytes {
            return Err(Error::bug(format!("the tensor '{}' has another size than its place", entry.name)));
        }
        Ok(())
    }

    fn write_piece(&mut self, file: usize, offset: u64, piece: &Tensor) -> Result<u64> {
        let path = self.dir.join(&self.files[file]);
        let failed = |e| Error::storage(&path, e);
        let out = match self.open.take() {
            Some((open, out)) if open == file => out,
            _ => OpenOptions::new().write(true).open(&path).map_err(failed)?,
        };
        let piece = piece.f_to_device(Device::Cpu)?.f_to_kind(self.kind)?.f_contiguous()?;
        if self.kind == Kind::Half
            && piece.numel() > 0
            && !piece.f_isfinite()?.f_all()?.f_int64_value(&[]).is_ok_and(|all| all == 1)
        {
            return Err(Error::new(
                ExitCode::NotFinite,
                format!(
                    "{}: a weight is too large for float16, in which the model is to be written; write export.dtype bf16 or fp32",
                    path.display()
                ),
            ));
        }
        let bytes = piece.numel() * self.kind.elt_size_in_bytes();
        self.buffer.resize(bytes.max(self.buffer.len()), 0);
        piece.f_copy_data_u8(&mut self.buffer[..bytes], piece.numel())?;
        out.write_all_at(&self.buffer[..bytes], offset).map_err(failed)?;
        self.open = Some((file, out));
        Ok(bytes as u64)
    }

    /// Makes sure that every tensor has come.
    pub(super) fn finish(self) -> Result<()> {
        match self.places.keys().min() {
            Some(name) => Err(Error::bug(format!("the tensor '{name}' has not come"))),
            None => Ok(()),
        }
    }
}

/// Parts below each other, piece after piece.
fn joined(parts: &[&Tensor], write: &mut impl FnMut(Tensor) -> Result<()>) -> Result<()> {
    for part in parts {
        let flat = part.f_reshape([-1])?;
        let numel = flat.size()[0];
        for (start, len) in ranges(numel, (PIECE_BYTES / FP32) as i64) {
            write(flat.f_narrow(0, start, len)?)?;
        }
    }
    Ok(())
}

/// Matrices `[out, in]` below each other, as `[in, out]`: some columns of each at a time.
fn transposed(parts: &[&Tensor], write: &mut impl FnMut(Tensor) -> Result<()>) -> Result<()> {
    let columns = parts.first().and_then(|p| p.size().get(1).copied()).unwrap_or_default();
    let rows: i64 = parts.iter().map(|p| p.size()[0]).sum();
    for (start, len) in ranges(columns, (PIECE_BYTES / FP32) as i64 / rows.max(1)) {
        let some = parts.iter().map(|p| Ok(p.f_narrow(1, start, len)?)).collect::<Result<Vec<_>>>()?;
        write(Tensor::f_cat(&some, 0)?.f_transpose(0, 1)?)?;
    }
    Ok(())
}

/// Ranges of at most `step` that cover `all`.
fn ranges(all: i64, step: i64) -> impl Iterator<Item = (i64, i64)> {
    let step = step.max(1);
    (0..all).step_by(step as usize).map(move |start| (start, step.min(all - start)))
}

fn bytes(tensor: &(String, Vec<i64>), kind: Kind) -> u64 {
    tensor.1.iter().map(|&n| n as u64).product::<u64>() * kind.elt_size_in_bytes() as u64
}

/// The kinds of numbers that weights are written in.
fn dtype(kind: Kind) -> Dtype {
    match kind {
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        _ => Dtype::F32,
    }
}

/// Which tensors go together.
fn split(tensors: &[(String, Vec<i64>)], kind: Kind, shard_bytes: u64) -> Vec<Vec<&(String, Vec<i64>)>> {
    let (mut shards, mut size) = (vec![vec![]], 0);
    for tensor in tensors {
        let bytes = bytes(tensor, kind);
        if size > 0 && size + bytes > shard_bytes {
            shards.push(vec![]);
            size = 0;
        }
        size += bytes;
        if let Some(last) = shards.last_mut() {
            last.push(tensor);
        }
    }
    shards
}

/// The names of so many files.
fn names(count: usize) -> Vec<String> {
    let Some((stem, extension)) = WEIGHTS.split_once('.').filter(|_| count > 1) else { return vec![WEIGHTS.into()] };
    (1..=count).map(|i| format!("{stem}-{i:05}-of-{count:05}.{extension}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_split_in_order_and_no_file_is_larger_than_it_may_be() {
        let tensor = |name: &str, numel: i64| (name.to_string(), vec![numel]);
        let tensors = [tensor("d", 2), tensor("c", 2), tensor("b", 9), tensor("a", 1), tensor("e", 3)];
        let named = |shard_bytes| -> Vec<String> {
            let shards = split(&tensors, Kind::Float, shard_bytes);
            shards.iter().map(|s| s.iter().map(|t| t.0.as_str()).collect()).collect()
        };
        assert_eq!(named(16), ["dc", "b", "ae"]);
        assert_eq!(named(8), ["d", "c", "b", "a", "e"]);
        assert_eq!(named(1000), ["dcbae"]);
        assert_eq!(names(1), ["model.safetensors"]);
        assert_eq!(names(2), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
    }

    #[test]
    fn pieces_of_any_size_give_the_bytes_of_the_whole() {
        // Larger than a piece in both directions.
        let parts = [
            Tensor::rand([1500, 1100], (Kind::Float, Device::Cpu)),
            Tensor::rand([1000, 1100], (Kind::Float, Device::Cpu)),
        ];
        let parts: Vec<&Tensor> = parts.iter().collect();
        let whole = Tensor::cat(&parts, 0);
        for (expected, cut) in [(whole.shallow_clone(), false), (whole.transpose(0, 1).contiguous(), true)] {
            let mut pieces = Vec::new();
            let mut take = |piece: Tensor| {
                assert!(piece.numel() * FP32 <= PIECE_BYTES);
                pieces.push(piece.contiguous().view([-1]));
                Ok(())
            };
            if cut { transposed(&parts, &mut take) } else { joined(&parts, &mut take) }.unwrap();
            assert!(pieces.len() > 1);
            assert_eq!(Tensor::cat(&pieces, 0), expected.view([-1]));
        }
    }

    #[test]
    fn what_has_not_come_and_what_nobody_waits_for_is_a_bug() {
        let folder = tempfile::tempdir().unwrap();
        let entry = |name: &str| HfTensor { name: name.into(), parts: vec![], layout: Layout::Rows };
        let value = Tensor::ones([2, 3], (Kind::Float, Device::Cpu));
        let expected = [("a".to_string(), vec![2, 3]), ("b".to_string(), vec![4])];
        let mut weights = Weights::create(folder.path(), &expected, Kind::Float, SHARD_BYTES).unwrap();
        weights.write(&entry("a"), &[&value]).unwrap();
        for (name, part) in [("a", "nobody waits"), ("b", "another size")] {
            let error = weights.write(&entry(name), &[&value]).unwrap_err();
            assert!(error.message.contains(part), "{error}");
        }
        let mut weights = Weights::create(folder.path(), &expected, Kind::Float, SHARD_BYTES).unwrap();
        weights.write(&entry("a"), &[&value]).unwrap();
        assert!(weights.finish().unwrap_err().message.contains("'b' has not come"));
    }
}
