//! `pytorch_model.bin`, as `torch.save` writes a `state_dict`: a zip file with a pickle that describes the tensors, and their
//! bytes, which are mapped and read where they lie when a tensor is asked for.
//!
//! A pickle can run code. Here nothing is run: what builds tensors is understood, and a file that asks for anything else is
//! refused with its name.

mod archive;
mod pickle;

use super::tensors::Location;
use crate::error::{Error, Result};
use memmap2::Mmap;
use pickle::Described;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

const PICKLE: &str = "/data.pkl";

/// Adds the tensors of one file, every number of whose description is held against the file.
pub(super) fn locate(path: &Path, tensors: &mut HashMap<String, Location>) -> Result<()> {
    let wrong = |e: String| Error::input(format!("{}: {e}", path.display()));
    let map = c10d::map_file(path).map_err(|e| Error::unreadable(path, &e))?;
    if !map.starts_with(b"PK") {
        return Err(wrong(
            "it is not what torch writes since version 1.6; load it with torch and save the model as safetensors (save_pretrained of transformers does)".into(),
        ));
    }
    let file = File::open(map).map_err(wrong)?;
    let described = pickle::tensors(file.entry(PICKLE).map_err(wrong)?.1).map_err(wrong)?;
    for (name, tensor) in described {
        let location = file.locate(&tensor).map_err(|e| wrong(format!("tensor '{name}' {e}")))?;
        tensors.insert(name, location);
    }
    Ok(())
}

/// A file's entries, which lie in one folder of it.
struct File {
    map: Arc<Mmap>,
    folder: String,
    entries: HashMap<String, Range<usize>>,
}

impl File {
    fn open(map: Arc<Mmap>) -> std::result::Result<Self, String> {
        let entries = archive::entries(&map)?;
        let mut folders = entries.keys().filter_map(|name| name.strip_suffix(PICKLE));
        let folder = match (folders.next(), folders.next()) {
            (Some(folder), None) => folder.to_string(),
            _ => return Err("it is a zip file without the one data.pkl of torch".into()),
        };
        let file = Self { map, folder, entries };
        match file.entry("/byteorder") {
            Ok((_, order)) if order != b"little" => {
                Err("its numbers have their bytes in another order than this machine's".into())
            }
            _ => Ok(file),
        }
    }

    /// Where an entry begins, and what is in it.
    fn entry(&self, name: &str) -> std::result::Result<(usize, &[u8]), String> {
        let range = self.entries.get(&format!("{}{name}", self.folder)).cloned();
        let entry = range.and_then(|range| Some((range.start, self.map.get(range)?)));
        entry.ok_or_else(|| format!("lacks its entry '{}{name}'", self.folder))
    }

    fn locate(&self, tensor: &Described) -> std::result::Result<Location, String> {
        let Described { storage, dtype, numel, offset, shape, strides } = tensor;
        let (start, bytes) = self.entry(&format!("/data/{storage}"))?;
        let size = dtype.bitsize() / 8;
        let stored = usize::try_from(*numel).ok().and_then(|numel| numel.checked_mul(size));
        if stored != Some(bytes.len()) {
            return Err(format!("is one of {numel} numbers that have {} bytes", bytes.len()));
        }
        let beyond = || format!("of shape {shape:?} with strides {strides:?} is not within its {numel} numbers");
        let span = span(shape, strides).ok_or_else(beyond)?;
        let offset = if span == 0 { 0 } else { *offset };
        if offset < 0 || offset.checked_add(span).is_none_or(|end| end > *numel) {
            return Err(beyond());
        }
        let strides = (!is_contiguous(shape, strides)).then(|| strides.clone());
        let offset = start + offset as usize * size;
        Ok(Location { map: self.map.clone(), offset, shape: shape.clone(), strides, dtype: *dtype })
    }
}

/// The numbers from a tensor's first to its last; `None` where there can be no such tensor.
pub(super) fn span(shape: &[i64], strides: &[i64]) -> Option<i64> {
    if shape.len() != strides.len() || shape.iter().chain(strides).any(|n| *n < 0) {
        return None;
    }
    // What is asked for by its shape is counted elsewhere, in numbers of 64 bits.
    shape.iter().try_fold(1i64, |numel, dim| numel.checked_mul(*dim))?.checked_mul(8)?;
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().zip(strides).try_fold(1i64, |span, (dim, stride)| span.checked_add((dim - 1).checked_mul(*stride)?))
}

/// Whether the numbers lie in the order of their indices, one after another.
fn is_contiguous(shape: &[i64], strides: &[i64]) -> bool {
    let mut next = 1i64;
    shape.contains(&0)
        || shape.iter().zip(strides).rev().all(|(dim, stride)| {
            let fits = *dim == 1 || *stride == next;
            next = next.saturating_mul(*dim);
            fits
        })
}

#[cfg(test)]
mod tests;
