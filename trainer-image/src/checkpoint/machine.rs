//! What decides how sums are rounded, beside a stage's config: a run that goes on with another ends well, but not bit for bit as
//! it would have.

use serde::{Deserialize, Serialize};
use std::fmt;
use tch::Device;

/// CPU features by which the libraries under libtorch choose their matrix kernels.
const MATRIX_FEATURES: [&str; 3] = ["avx512_bf16", "avx512_fp16", "amx_tile"];

/// Ranks, threads and kernels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Machine {
    pub ranks: u32,
    /// Of each rank.
    pub threads: i32,
    pub kernels: String,
}

impl Machine {
    /// This process's own, whose models run on `device`.
    pub fn here(ranks: u32, device: Device) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let kernels = match device {
            Device::Cuda(_) => gpu().unwrap_or_else(|| "CUDA".into()),
            _ => cpu(&c10d::cpu_capability().unwrap_or_default(), &read("/proc/cpuinfo")),
        };
        Self { ranks, threads: tch::get_num_threads(), kernels }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ranks, threads, kernels } = self;
        write!(f, "{ranks} ranks of {threads} threads with kernels for {kernels}")
    }
}

/// The driver's name of the first GPU.
fn gpu() -> Option<String> {
    let mut folders = std::fs::read_dir("/proc/driver/nvidia/gpus").ok()?;
    let text = std::fs::read_to_string(folders.next()?.ok()?.path().join("information")).ok()?;
    text.lines().find_map(|line| Some(line.strip_prefix("Model:")?.trim().to_owned()))
}

/// libtorch's own choice, with the maker and the features by which its libraries choose.
fn cpu(capability: &str, cpuinfo: &str) -> String {
    let field = |name: &str| cpuinfo.lines().find_map(|line| Some(line.strip_prefix(name)?.split_once(':')?.1.trim()));
    let flags: Vec<&str> = field("flags").unwrap_or_default().split(' ').collect();
    let features = MATRIX_FEATURES.into_iter().filter(|feature| flags.contains(feature));
    let words: Vec<&str> = field("vendor_id").into_iter().chain([capability]).chain(features).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_is_told_by_what_its_kernels_are_chosen_by() {
        let info = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: X\nflags\t\t: fpu avx2 avx512f amx_tile\n\nprocessor\t: 1\n";
        assert_eq!(cpu("AVX512", info), "GenuineIntel AVX512 amx_tile");
        assert_eq!(cpu("DEFAULT", ""), "DEFAULT");
        let here = Machine::here(2, Device::Cpu);
        assert!(here.ranks == 2 && here.threads > 0 && !here.kernels.is_empty(), "{here}");
    }
}
