//! One rank's file of a checkpoint: its range of every chunk of every model.

use super::manifest::{self, FileEntry};
use crate::engine::{Chunk, Model, part};
use crate::error::{Error, Result};
use crate::files;
use crate::model::Outgoing;
use safetensors::tensor::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// The file of a rank.
pub(super) fn name(rank: u32) -> String {
    format!("rank-{rank:05}.safetensors")
}

fn key(model: &str, chunk: usize, part: &str) -> String {
    format!("{model}.{chunk}.{part}")
}

/// What this rank keeps of the models, by its names in the rank's file. Copies lie in host memory until they are written;
/// without, a piece changes as training goes on.
pub(super) fn pieces(models: &[(&str, &Model)], copied: bool) -> Result<Vec<(String, Outgoing)>> {
    let mut outgoing = Vec::new();
    for (model_name, model) in models {
        for (i, chunk) in model.trained().enumerate() {
            for (part, piece) in chunk.saved()? {
                let piece = c10d::on_host(|| piece.f_to_device_(Device::Cpu, Kind::Float, false, copied))?;
                outgoing.push((key(model_name, i, part), Outgoing::new(&piece)?));
            }
        }
    }
    Ok(outgoing)
}

/// Bytes of what this rank keeps of the models.
pub(super) fn bytes(models: &[(&str, &Model)]) -> Result<u64> {
    let chunks = models.iter().flat_map(|(_, model)| model.trained());
    let sizes = chunks.map(|chunk| Ok(chunk.saved()?.iter().map(|(_, t)| t.numel() * size_of::<f32>()).sum::<usize>()));
    Ok(sizes.sum::<Result<usize>>()? as u64)
}

/// The file that holds the hash of a rank's file, and is there once that is whole.
pub(super) fn seal(rank: u32) -> String {
    format!("rank-{rank:05}.sha256")
}

/// Writes and flushes a rank's file into `dir`, and seals it.
pub(super) fn write(dir: &Path, rank: u32, pieces: Vec<(String, Outgoing)>) -> Result<()> {
    let path = dir.join(name(rank));
    safetensors::serialize_to_file(pieces, None, &path).map_err(|e| Error::storage(&path, e))?;
    let flushed = File::open(&path).and_then(|f| f.sync_all()).and_then(|()| manifest::sha256(&path));
    let digest = flushed.map_err(|e| Error::storage(&path, e))?;
    files::write(&dir.join(seal(rank)), manifest::hex(&digest).as_bytes())
}

/// Fills a model's chunks from the ranges in all ranks' files, whatever world size wrote them.
pub(super) fn read(dir: &Path, files: &[FileEntry], model_name: &str, model: &mut Model) -> Result<()> {
    let world_size = files.len() as u32;
    for (rank, file) in (0u32..).zip(files) {
        let path = dir.join(&file.name);
        let pieces = Pieces::open(&path)?;
        for (i, chunk) in model.trained_mut().enumerate() {
            let range = part(chunk.numel(), rank, world_size);
            for name in Chunk::SAVED {
                let piece = pieces.tensor(&key(model_name, i, name), range.end - range.start)?;
                chunk.restore(name, range.start, &piece)?;
            }
        }
    }
    Ok(())
}

/// A file mapped into memory, and where its tensors lie: type, shape and the byte at which they start.
struct Pieces {
    path: std::path::PathBuf,
    map: Arc<memmap2::Mmap>,
    tensors: HashMap<String, (Dtype, Vec<usize>, usize)>,
}

impl Pieces {
    fn open(path: &Path) -> Result<Self> {
        let map = c10d::map_file(path).map_err(|e| Error::storage(path, e))?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| Error::storage(path, e))?;
        let tensors = metadata
            .tensors()
            .into_iter()
            .map(|(name, t)| (name, (t.dtype, t.shape.clone(), header + 8 + t.data_offsets.0)))
            .collect();
        Ok(Self { path: path.to_path_buf(), map, tensors })
    }

    fn tensor(&self, key: &str, elements: i64) -> Result<Tensor> {
        match self.tensors.get(key) {
            Some((Dtype::F32, shape, offset)) if shape[..] == [elements as usize] => {
                Ok(c10d::from_mmap(self.map.clone(), *offset, &[elements], Kind::Float)?)
            }
            Some((dtype, shape, _)) => {
                Err(Error::storage(&self.path, format!("'{key}' is {dtype:?} {shape:?}, not F32 [{elements}]")))
            }
            None => Err(Error::storage(&self.path, format!("'{key}' is missing"))),
        }
    }
}
