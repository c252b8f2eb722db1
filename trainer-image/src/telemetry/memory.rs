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

/// Main memory that can still be taken, of the container or of the machine, whichever has less; `None` where nobody says. What
/// the kernel can drop, such as cached files, counts as free.
pub fn host_room() -> Option<u64> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    room_of(&read("/sys/fs/cgroup/memory.max"), &read("/sys/fs/cgroup/memory.stat"), &read("/proc/meminfo"))
}

fn room_of(cgroup_limit: &str, cgroup_stat: &str, meminfo: &str) -> Option<u64> {
    let field = |text: &str, name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok())
    };
    let machine = field(meminfo, "MemAvailable:").map(|kib| kib * 1024);
    let limit = cgroup_limit.trim().parse::<u64>().ok();
    let container = limit.zip(field(cgroup_stat, "anon ")).map(|(limit, anon)| limit.saturating_sub(anon));
    machine.into_iter().chain(container).min()
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
    fn the_room_is_what_container_and_machine_both_have() {
        let machine = "MemTotal:       24576 kB\nMemAvailable:   4096 kB\n";
        let stat = "anon 1048576\nfile 999999999\n";
        assert_eq!(room_of("max\n", stat, machine), Some(4 << 20));
        assert_eq!(room_of("3145728\n", stat, machine), Some(2 << 20));
        assert_eq!(room_of("1024\n", stat, machine), Some(0));
        assert_eq!(room_of("", "", ""), None);
    }

    #[test]
    fn this_process_uses_memory_below_its_limit() {
        let now = host();
        assert!(0 < now.current && now.current <= now.peak && Some(now.peak) < now.limit, "{now:?}");
    }
}
