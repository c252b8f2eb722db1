//! Records on the volume become token sequences: JSON Lines or Parquet in, a training and an evaluation split out.
//!
//! - A file is read line by line, or row by row; a byte order mark and blank lines are skipped and fields that no format knows
//!   are ignored. The first record that cannot be used ends the reading with an error that names file, line or row, and field.
//! - Several files are one dataset, each with its weight; those for evaluation may lie in a file of their own.
//! - Prompt and response are encoded as one text, and dialogues as their template renders them. What is to be learnt or
//!   scored ends with an end token: one is appended where the text does not end in one.
//! - The split is a function of the seed and of the record's line or row (fine-tuning) or its prompt (rankings and
//!   prompts, so that no prompt is in both halves). It needs no random state and is the same on every rank.
//!
//! Nothing here touches a device.

mod dialogue;
mod files;
mod jsonl;
pub mod order;
mod parquet;
mod prompts;
mod rankings;
mod records;
mod sft;
mod split;

pub use files::Files;
pub use prompts::{Prompt, load_prompts, read_dialogues};
pub use rankings::{Ranking, load_rankings};
pub use records::records_read;
pub use sft::{SftSample, load_sft};
pub use split::{Split, Summary};

#[cfg(test)]
mod tests;
