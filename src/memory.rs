//! The process's memory: the allocator and its settings, how much memory there is, and how much is used.

use std::path::Path;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Gives freed pages back to the kernel after a second instead of ten, from a thread of the allocator's own: an
/// observability database lives beside what it observes. Few arenas, since each keeps free pages of its own.
#[expect(unsafe_code, reason = "the allocator reads its settings from a symbol of this name before main")]
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static MALLOC_CONF: &[u8; 70] = b"background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0,narenas:4\0";

/// Bytes that the process may use: the smaller of the machine's memory and the limit of its control group.
pub fn available() -> u64 {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
    });
    let group = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .find_map(|path| std::fs::read_to_string(Path::new(path)).ok()?.trim().parse::<u64>().ok());
    // Without either (no Linux) 4 GiB is what a small machine has.
    machine.into_iter().chain(group).min().unwrap_or(4 << 30)
}

/// What the kernel says of this process.
#[derive(Debug)]
pub struct Process {
    /// User and system time.
    pub cpu_seconds: f64,
    /// Resident bytes.
    pub resident: u64,
    /// Open file descriptors.
    pub open_files: usize,
    /// Threads.
    pub threads: u64,
}

impl Process {
    /// Reads `/proc/self`; nothing where there is none.
    pub fn read() -> Option<Self> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        // The second field is the program's name in parentheses and may hold spaces; the third follows the last one.
        let fields: Vec<&str> = stat.get(stat.rfind(')')? + 2..)?.split(' ').collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        // Linux counts in units of 1/100 s and pages of 4 KiB on every machine that this runs on.
        Some(Self {
            cpu_seconds: (field(14)? + field(15)?) as f64 / 100.0,
            resident: field(24)? * 4096,
            threads: field(20)?,
            open_files: std::fs::read_dir("/proc/self/fd").ok()?.count(),
        })
    }
}
