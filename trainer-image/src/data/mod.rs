//! Records on the volume become token sequences: JSON Lines or Parquet in, a training and an evaluation split out.
//!
//! - A file is read line by line, or row by row; a byte order mark and blank lines are skipped and fields that no format knows
//!   are ignored. The first record that cannot be used ends the reading with an error that names file, line or row, and field.
//! - Several files are one dataset, each with its weight; those for evaluation may lie in a file of their own.
//! - Prompt and response are encoded as one text, and dialogues as their template renders them. What is to be learnt or
//!   scored ends with an end token: one is appended where the text does not end in one.
//! - The split is a function of the seed and of the record's line or row (fine-tuning) or its prompt (rankings and
//!   prompts, so that no prompt is in both halves). It needs no random state.
//!
//! - What they become is written once, as files of tokens that every rank and attempt maps: a rank tokenises nothing, and holds
//!   no more of a dataset than a step needs.
//!
//! Nothing here touches a device.

mod dialogue;
mod files;
mod jsonl;
pub mod order;
mod packing;
mod parquet;
mod pipeline;
mod prompts;
mod rankings;
mod recipe;
mod records;
mod sft;
mod split;
mod store;
mod summary;

pub use prompts::{Prompt, read_dialogues};
pub use rankings::Ranking;
pub use recipe::Recipe;
pub use records::{records_read, signs_of_life};
pub use sft::SftSample;
pub use store::{Half, Store, Stored};
pub use summary::Summary;

#[cfg(test)]
mod tests;
