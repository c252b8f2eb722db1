//! The trainer: supervised fine-tuning, reward-model training and PPO on libtorch, one process a device.
//!
//! From outside in: [`launch`] starts the workers of a pod and turns their ends into one; [`stages`] are the
//! algorithms; [`engine`] runs models segment by segment over shards and ranks; [`model`] knows the
//! architectures; [`rollout`] generates; the rest is what it says.

pub mod bench;
pub mod checkpoint;
pub mod commands;
pub mod config_file;
pub mod data;
pub mod ending;
pub mod engine;
pub mod environment;
pub mod error;
pub mod fetch;
pub mod files;
pub mod hex;
pub mod launch;
pub mod lease;
pub mod model;
pub mod optim;
pub mod plan_command;
pub mod prepare;
pub mod random;
pub mod rollout;
pub mod run;
pub mod safetensors_header;
pub mod shutdown;
pub mod stages;
pub mod telemetry;
pub mod tokenizer;
pub mod try_command;
pub mod worker;
