//! A process's place among its peers, as the operator's environment variables give it.

use crate::error::{Error, Result};
use rlhf_api::config::{RENDEZVOUS_PORT, VOLUME_DIR, env};
use rlhf_api::stage::Strategy;
use std::path::PathBuf;

/// The environment variable that `launch` sets for each worker.
pub const LOCAL_RANK: &str = "LOCAL_RANK";

/// Where a pod or process stands in its stage's gang. Every field has a default that suits one process alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// Host of node rank 0, where the rendezvous store listens.
    pub master_addr: String,
    /// Port of the rendezvous store.
    pub master_port: u16,
    /// This pod's index.
    pub node_rank: u32,
    /// Pods of the stage.
    pub nodes: u32,
    /// Workers in each pod.
    pub workers_per_node: u32,
    /// Accelerators that the pod was given; 0: it trains on its CPU, or on what it finds.
    pub devices: u32,
    /// This worker's index in its pod; 0 in `launch`.
    pub local_rank: u32,
    /// The attempt's number, from 1.
    pub attempt: u32,
    /// Where the job's volume is mounted.
    pub volume: PathBuf,
    /// The attempt's strategy, where it is not left to the config.
    pub strategy: Option<Strategy>,
}

impl Environment {
    /// Reads the process environment.
    ///
    /// # Errors
    /// Names the variable and its value where one cannot be used.
    pub fn from_process() -> Result<Self> {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// Reads variables through `lookup`.
    ///
    /// # Errors
    /// As [`Environment::from_process`].
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let number = |name: &str, default: u32| match lookup(name).filter(|v| !v.is_empty()) {
            None => Ok(default),
            Some(text) => text
                .trim()
                .parse::<u32>()
                .map_err(|_| Error::config(format!("environment variable {name}: '{text}' is not a whole number"))),
        };
        let port = number(env::MASTER_PORT, RENDEZVOUS_PORT.into())?;
        let this = Self {
            master_addr: lookup(env::MASTER_ADDR).filter(|v| !v.is_empty()).unwrap_or_else(|| "127.0.0.1".into()),
            master_port: u16::try_from(port).map_err(|_| {
                Error::config(format!("environment variable {}: {port} is not a port", env::MASTER_PORT))
            })?,
            node_rank: number(env::NODE_RANK, 0)?,
            nodes: number(env::NNODES, 1)?,
            workers_per_node: number(env::NPROC_PER_NODE, 1)?,
            devices: number(env::DEVICES, 0)?,
            local_rank: number(LOCAL_RANK, 0)?,
            attempt: number(env::ATTEMPT, 1)?,
            volume: lookup(env::VOLUME).filter(|v| !v.is_empty()).unwrap_or_else(|| VOLUME_DIR.into()).into(),
            strategy: lookup(env::STRATEGY).filter(|v| !v.is_empty()).map(|text| strategy(&text)).transpose()?,
        };
        this.check()
    }

    fn check(self) -> Result<Self> {
        let below = |name: &str, value: u32, limit_name: &str, limit: u32| {
            if value < limit {
                Ok(())
            } else {
                Err(Error::config(format!(
                    "environment variable {name} is {value}, but {limit_name} is {limit}: ranks count from 0"
                )))
            }
        };
        below(env::NODE_RANK, self.node_rank, env::NNODES, self.nodes)?;
        below(LOCAL_RANK, self.local_rank, env::NPROC_PER_NODE, self.workers_per_node)?;
        if self.nodes.checked_mul(self.workers_per_node).is_none() {
            let (nodes, workers) = (self.nodes, self.workers_per_node);
            return Err(Error::config(format!(
                "{} is {nodes} and {} is {workers}: too many ranks",
                env::NNODES,
                env::NPROC_PER_NODE
            )));
        }
        Ok(self)
    }

    /// This worker's rank among all workers.
    pub fn rank(&self) -> u32 {
        self.node_rank * self.workers_per_node + self.local_rank
    }

    /// All workers of the stage.
    pub fn world_size(&self) -> u32 {
        self.nodes * self.workers_per_node
    }
}

fn strategy(text: &str) -> Result<Strategy> {
    serde_json::from_str(text)
        .map_err(|e| Error::config(format!("environment variable {}: '{text}' is no strategy: {e}", env::STRATEGY)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rlhf_api::stage::Sharding;

    fn read(pairs: &[(&str, &str)]) -> Result<Environment> {
        Environment::from_lookup(|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string()))
    }

    #[test]
    fn rank_counts_workers_node_by_node() {
        let e = read(&[("NODE_RANK", "2"), ("NNODES", "4"), ("NPROC_PER_NODE", "8"), ("LOCAL_RANK", "3")]).unwrap();
        assert_eq!((e.rank(), e.world_size()), (19, 32));
        let alone = read(&[]).unwrap();
        assert_eq!((alone.rank(), alone.world_size(), alone.attempt, alone.strategy), (0, 1, 1, None));
        let told = read(&[("RLHF_STRATEGY", r#"{"sharding":"zero3"}"#)]).unwrap();
        assert_eq!(told.strategy, Some(Strategy { sharding: Sharding::Zero3, ..Strategy::default() }));
    }

    #[test]
    fn a_wrong_variable_is_named_with_its_value() {
        for (pairs, names) in [
            (vec![("NODE_RANK", "x")], vec!["NODE_RANK", "'x'"]),
            (vec![("NODE_RANK", "2"), ("NNODES", "2")], vec!["NODE_RANK is 2", "NNODES is 2"]),
            (vec![("MASTER_PORT", "70000")], vec!["MASTER_PORT", "70000"]),
            (vec![("RLHF_STRATEGY", r#"{"sharding":"auto"}"#)], vec!["RLHF_STRATEGY", "`auto`", "`zero3`"]),
        ] {
            let error = read(&pairs).unwrap_err();
            assert_eq!(error.exit.code(), 64);
            assert!(names.iter().all(|n| error.message.contains(n)), "{error}");
        }
    }
}
