//! One rank's file of a checkpoint: its range of every chunk of every model.

use super::manifest::FileEntry;
use crate::engine::{Chunk, Lent, Model, part};
use crate::error::{Error, Result};
use crate::hex::hex;
use crate::{files, safetensors_header};
use safetensors::tensor::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// Bytes that are on their way at a time: few enough for a core's cache.
const PIECE_BYTES: usize = 512 << 10;

/// The file of a rank.
pub(super) fn name(rank: u32) -> String {
    format!("rank-{rank:05}.safetensors")
}

fn key(model: &str, chunk: usize, part: &str) -> String {
    format!("{model}.{chunk}.{part}")
}

/// Lends what this rank keeps of the models, by its names in the rank's file.
pub(super) fn lend(models: &[(&str, &Model)]) -> Result<Vec<(String, Arc<Lent>)>> {
    let mut all = Vec::new();
    for (model_name, model) in models {
        for (i, chunk) in model.trained().enumerate() {
            all.extend(Chunk::SAVED.iter().map(|part| key(model_name, i, part)).zip(chunk.lend()?));
        }
    }
    Ok(all)
}

/// Bytes of what this rank keeps of the models.
pub(super) fn bytes(models: &[(&str, &Model)]) -> u64 {
    let chunks = models.iter().flat_map(|(_, model)| model.trained());
    chunks.map(|chunk| chunk.saved_numel() as u64 * Chunk::SAVED.len() as u64 * size_of::<f32>() as u64).sum()
}

/// The file that holds the hash of a rank's file, and is there once that is whole.
pub(super) fn seal(rank: u32) -> String {
    format!("rank-{rank:05}.sha256")
}

/// Writes and flushes a rank's file into `dir`, and seals it.
pub(super) fn write(dir: &Path, rank: u32, lent: Vec<(String, Arc<Lent>)>) -> Result<()> {
    let path = dir.join(name(rank));
    let header = safetensors_header::fp32(lent.iter().map(|(name, l)| (name.as_str(), vec![l.numel()])), None)?;
    let mut out = Hashing { file: File::create(&path).map_err(|e| Error::storage(&path, e))?, hash: Sha256::new() };
    let mut write = |bytes: &[u8]| out.write(bytes).map_err(|e| Error::storage(&path, e));
    write(&header)?;
    let mut buffer = vec![0; PIECE_BYTES];
    // What was copied goes as soon as it is written.
    for (_, lent) in lent {
        while let bytes @ 1.. = lent.read(&mut buffer)? {
            write(&buffer[..bytes])?;
        }
    }
    out.file.sync_all().map_err(|e| Error::storage(&path, e))?;
    files::write(&dir.join(seal(rank)), hex(&out.hash.finalize()).as_bytes())
}

/// Removes what a rank has written into `dir`, whole or not, and rank 0 the folder where nothing else is in it. (Another rank's
/// failed save would be told as the loss of its folder.)
pub(super) fn remove(dir: &Path, rank: u32) -> Result<()> {
    let seal = dir.join(seal(rank));
    for path in [dir.join(name(rank)), files::sibling(&seal, "tmp"), seal] {
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(Error::storage(&path, e)),
            _ => {}
        }
    }
    if rank > 0 {
        return Ok(());
    }
    match std::fs::remove_dir(dir) {
        // It may be gone already where another attempt has taken over.
        Err(e) if !matches!(e.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::NotFound) => {
            Err(Error::storage(dir, e))
        }
        _ => Ok(()),
    }
}

/// A file that is hashed while it is written.
struct Hashing {
    file: File,
    hash: Sha256,
}

impl Hashing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.hash.update(bytes);
        self.file.write_all(bytes)
    }
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
