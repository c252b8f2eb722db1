//! JSON Lines: one object a line, read as a stream. A file may be packed by gzip or Zstandard, which its first bytes say.

use super::files::DataFile;
use super::records::{Hashed, Place, Visit, Wanted};
use crate::error::{Error, Result};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// A longer line is a mistake, such as a whole file without line breaks, and is not read into memory.
const MAX_LINE_BYTES: usize = 64 << 20;

/// What some editors put before a text in UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Hands each line that is not blank to `visit`.
pub(super) fn read(data: &DataFile, file: Hashed, wanted: &Wanted, visit: Visit<'_>) -> Result<()> {
    let (path, expected) = (data.path.as_path(), &data.expected(wanted));
    let (mut reader, packed) = unpacked(path, file)?;
    let mut bytes = Vec::new();
    let mut first = true;
    for line in 1.. {
        bytes.clear();
        let limit = MAX_LINE_BYTES as u64 + 1;
        let failed = |e: std::io::Error| match packed {
            true => Place::Line(path, line).error(format!("the file cannot be unpacked: {e}")),
            false => Error::storage(path, e),
        };
        if reader.by_ref().take(limit).read_until(b'\n', &mut bytes).map_err(failed)? == 0 {
            break;
        }
        let text = match bytes.strip_prefix(BYTE_ORDER_MARK) {
            Some(text) if line == 1 => text,
            _ => &bytes,
        };
        if text.trim_ascii().is_empty() {
            continue;
        }
        if std::mem::take(&mut first) && text.trim_ascii_start().starts_with(b"[") {
            return Err(Place::Line(path, line).error(format!(
                "the file begins with an array, but a dataset is JSON Lines: write one object a line, as jq -c '.[]' makes of a file that is one array; expected {expected}"
            )));
        }
        let place = Place::Line(path, line);
        let cut = bytes.len() > MAX_LINE_BYTES && !bytes.ends_with(b"\n");
        let too_long =
            || place.error(format!("the line is longer than {} MiB; expected {expected}", MAX_LINE_BYTES >> 20));
        visit(place, if text.len() > MAX_LINE_BYTES { Err(too_long()) } else { Ok(text) })?;
        if cut {
            reader.skip_until(b'\n').map_err(failed)?;
        }
    }
    Ok(())
}

/// What is in a file, and whether it was packed.
fn unpacked(path: &Path, file: Hashed) -> Result<(Box<dyn BufRead>, bool)> {
    let failed = |e| Error::storage(path, e);
    let mut file = BufReader::new(file);
    let start = file.fill_buf().map_err(failed)?;
    let packed_by = |magic: &[u8]| start.starts_with(magic);
    let (gzip, zstd) = (packed_by(b"\x1f\x8b"), packed_by(b"\x28\xb5\x2f\xfd"));
    let reader: Box<dyn BufRead> = if gzip {
        Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(file)))
    } else if zstd {
        Box::new(BufReader::new(zstd::Decoder::with_buffer(file).map_err(failed)?))
    } else {
        Box::new(file)
    };
    Ok((reader, gzip || zstd))
}
