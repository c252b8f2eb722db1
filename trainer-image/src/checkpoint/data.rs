//! What a checkpoint says of the data that its run learns from.

use crate::error::Result;
use crate::files;
use crate::hex::hex;
use std::path::Path;

/// The file beside the manifest that holds the hash of the dataset's file. It is no field of the manifest, so that versions of
/// the trainer that do not know it can go on from the checkpoint.
const FILE: &str = "dataset.sha256";

/// Hashes of what a run learns from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DataHashes {
    /// Of the rows of tokens.
    pub rows: [u8; 32],
    /// Of the file's bytes.
    pub file: [u8; 32],
}

impl DataHashes {
    /// Writes into a checkpoint's folder what the manifest does not hold.
    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        files::write(&dir.join(FILE), hex(&self.file).as_bytes())
    }

    /// Why a checkpoint in `dir`, whose run has read other rows, has none of these, and what to do.
    pub(super) fn why_others(&self, dir: &Path) -> &'static str {
        match std::fs::read_to_string(dir.join(FILE)) {
            Ok(file) if file.trim() == hex(&self.file) => {
                "its run has read the same dataset otherwise, by another version of the trainer or with another tokenizer: go on with the image of that version and with that tokenizer"
            }
            Ok(_) => "it was written by a run on other data: put the dataset back as it was",
            Err(_) => {
                "it was written by a run on other data, or by another version of the trainer, which reads the same data otherwise: go on with that data and the image of that version"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_file_that_is_read_otherwise_is_told_from_another_file() {
        let dir = tempfile::tempdir().unwrap();
        let [before, otherwise] = [[1; 32], [2; 32]].map(|rows| DataHashes { rows, file: [7; 32] });
        let all = ["other data", "another version of the trainer"];
        let said = |now: DataHashes| all.map(|part| now.why_others(dir.path()).contains(part));
        assert_eq!(said(otherwise), [true, true], "checkpoints of before do not tell the file");
        before.write(dir.path()).unwrap();
        assert_eq!(said(otherwise), [false, true]);
        assert_eq!(said(DataHashes { file: [8; 32], ..otherwise }), [true, false]);
    }
}
