//! What stands before the tensors of a safetensors file, for files that are written tensor by tensor: the `safetensors` crate
//! writes whole files only.

use crate::error::{Error, Result};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use std::collections::HashMap;

/// As [`header`], for fp32 tensors.
///
/// # Errors
/// As [`header`].
pub fn fp32<'a>(
    tensors: impl IntoIterator<Item = (&'a str, Vec<usize>)>,
    metadata: Option<HashMap<String, String>>,
) -> Result<Vec<u8>> {
    header(Dtype::F32, tensors, metadata)
}

/// The length and the header of a file of tensors of one type that follow one another in this order, with their names and
/// shapes, as bytes. Where `metadata` is given, it is part of the header.
///
/// # Errors
/// Where there can be no such header, which is a bug.
pub fn header<'a>(
    dtype: Dtype,
    tensors: impl IntoIterator<Item = (&'a str, Vec<usize>)>,
    metadata: Option<HashMap<String, String>>,
) -> Result<Vec<u8>> {
    let mut end = 0;
    let infos = tensors.into_iter().map(|(name, shape)| {
        let start = end;
        end += shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (name.to_string(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    });
    let failed = |e: String| Error::bug(format!("a safetensors header: {e}"));
    let metadata = Metadata::new(metadata, infos.collect()).map_err(|e| failed(e.to_string()))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|e| failed(e.to_string()))?;
    // Tensors begin at a multiple of 8, where they can be mapped.
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok([&(header.len() as u64).to_le_bytes(), &header[..]].concat())
}
