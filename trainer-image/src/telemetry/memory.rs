//! How much memory this process uses and how much it may: asked anew whenever metrics are rendered.

use std::fs;

/// Where the memory limit stands in cgroup v2 and in v1, seen from inside a container.
const LIMIT_FILES: [&str; 2] = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];

/// Bytes of one kind of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Memory {
    /// Taken now.
    pub current: u64,
    /// The most that was ever taken.
    pub peak: u64,
    /// What may be taken; `None` where nobody says.
    pub limit: Option<u64>,
}

/// Main memory: resident in this process, against the container's limit (the machine's memory where there is none).
pub(super) fn host() -> Memory {
    let cgroup = LIMIT_FILES.iter().find_map(|path| fs::read_to_string(path).ok()).unwrap_or_default();
    let machine = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    Memory { current: c10d::host_bytes(), peak: c10d::peak_host_bytes(), limit: limit_of(&cgroup, &machine) }
}

/// A CUDA device: what libtorch's allocator has taken from it, cached blocks included, as that is what runs out.
pub(super) fn device(index: usize) -> Option<Memory> {
    let memory = c10d::device_memory(index).ok()?;
    Some(Memory { current: memory.reserved, peak: memory.reserved_peak, limit: Some(memory.total) })
}

/// The limit that holds: `max` (v2), or a number beyond the machine (v1), means none.
fn limit_of(cgroup: &str, meminfo: &str) -> Option<u64> {
    let total_kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    let limit = cgroup.trim().parse::<u64>().ok();
    limit.into_iter().chain(total_kib.map(|kib| kib * 1024)).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_the_containers_or_the_machines() {
        let machine = "MemTotal:       24576 kB\nMemFree:         1024 kB\n";
        assert_eq!(limit_of("1048576\n", machine), Some(1 << 20));
        assert_eq!(limit_of("max\n", machine), Some(24 << 20));
        assert_eq!(limit_of("9223372036854771712\n", machine), Some(24 << 20));
        assert_eq!(limit_of("", ""), None);
    }

    #[test]
    fn this_process_uses_memory_below_its_limit() {
        let now = host();
        assert!(0 < now.current && now.current <= now.peak && Some(now.peak) < now.limit, "{now:?}");
    }
}
