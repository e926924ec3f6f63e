//! The process's memory: the allocator and its settings, how much memory there is, and how much is used.

use std::path::Path;
use std::time::{Duration, Instant};

use engine::memory::Kind;
use engine::{Engine, Memory};
use tikv_jemalloc_ctl::{Access as _, AsName as _, epoch, stats};
use tokio_util::sync::CancellationToken;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Milliseconds after which freed pages go back to the kernel; as in the settings below.
const DIRTY_DECAY_MS: isize = 1000;

/// Gives freed pages back to the kernel after a second instead of ten, from a thread of the allocator's own: an
/// observability database lives beside what it observes. Few arenas, since each keeps free pages of its own;
/// and one for all that is large, or what one query has freed would lie idle in an arena while the next one fills
/// another.
#[expect(unsafe_code, reason = "the allocator reads its settings from a symbol of this name before main")]
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static MALLOC_CONF: &[u8; 96] =
    b"background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0,narenas:4,oversize_threshold:262144\0";

/// What goes to the arena of large pieces, and more; see `oversize_threshold`.
const OVERSIZE: usize = 512 << 10;

/// After so long it is said again that there is too little memory.
const TOLD_AGAIN: Duration = Duration::from_secs(10);

/// Arenas beyond this number are not ours to look after; see `narenas`.
const ARENAS_MAX: u32 = 16;

/// Tells the engine what the process really holds, until `stopping`: on a thread of its own, which no work holds up. When
/// free pages that the allocator keeps for later make the process larger than it may be, they go back to the kernel at
/// once.
///
/// # Errors
/// There can be no more threads.
pub fn watch(engine: Engine, stopping: CancellationToken) -> std::io::Result<()> {
    keep_large();
    let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
    // Much takes as long as a query needs to fill it again, so who gives back is not who watches.
    let stopped = stopping.clone();
    let purge = move || {
        while !stopped.is_cancelled() {
            std::thread::park();
            purge();
        }
    };
    let purger = thread("thalweg-purge").spawn(purge)?.thread().clone();
    let watch = move || {
        let mut told: Option<Instant> = None;
        while !stopping.is_cancelled() {
            // Numbers are of the moment of the last advance.
            let held = epoch::advance().and_then(|_| Ok((stats::allocated::read()?, stats::resident::read()?)));
            let Ok((allocated, resident)) = held else { break };
            let again = engine.observe(allocated);
            let limit = engine.memory().limit();
            if resident > limit && resident - allocated.min(resident) > limit / 8 {
                purger.unpark();
            }
            if allocated.max(resident) > limit / 8 * 9 && told.is_none_or(|at| at.elapsed() >= TOLD_AGAIN) {
                tell(engine.memory(), allocated, resident);
                told = Some(Instant::now());
            }
            std::thread::sleep(again);
        }
        purger.unpark();
    };
    thread("thalweg-memory").spawn(watch).map(drop)
}

/// Keeps freed pages of large pieces as long as those of others. The allocator makes their arena with the first of them,
/// and would give each piece back when it is freed.
fn keep_large() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(OVERSIZE)));
    purge();
}

/// Says what the memory is used for that is more than there should be.
fn tell(memory: &Memory, allocated: usize, resident: usize) {
    let kinds = Kind::ALL.map(|kind| format!("{} {}", kind.name(), memory.held(kind))).join(", ");
    tracing::warn!(allocated, resident, limit = memory.limit(), kinds, "more memory is held than memory_limit");
}

/// Gives all free pages back to the kernel.
fn purge() {
    for arena in 0..ARENAS_MAX {
        let name = format!("arena.{arena}.dirty_decay_ms\0");
        // Setting the time to zero gives back what has been kept so far.
        for decay_ms in [0isize, DIRTY_DECAY_MS] {
            if name.as_bytes().name().write(decay_ms).is_err() {
                return;
            }
        }
    }
}

/// Bytes that the process may use: the smaller of the machine's memory and the limits of its control groups.
pub fn available() -> u64 {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
    });
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let groups = group_limits(&groups, |path| std::fs::read_to_string(path).ok()?.trim().parse().ok());
    // Without either (no Linux) 4 GiB is what a small machine has.
    machine.into_iter().chain(groups).min().unwrap_or(4 << 30)
}

/// The memory limits of the groups that `/proc/self/cgroup` names and of all above them. In a container whose groups
/// have names of their own the path leads nowhere, and the topmost group is the container's.
fn group_limits(groups: &str, read: impl Fn(&Path) -> Option<u64>) -> Vec<u64> {
    let mut limits = Vec::new();
    for line in groups.lines() {
        // number:controllers:path, without controllers in version 2.
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            all if all.split(',').any(|c| c == "memory") => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => continue,
        };
        let group = Path::new(root).join(path.trim_start_matches('/'));
        let above = group.ancestors().take_while(|dir| dir.starts_with(root));
        limits.extend(above.filter_map(|dir| read(&dir.join(file))));
    }
    limits
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_of_all_groups_above_count() {
        let check = |groups: &str, expected: &[u64]| {
            let read = |path: &Path| match path.to_str()? {
                "/sys/fs/cgroup/memory.max" => Some(1),
                "/sys/fs/cgroup/a/memory.max" => Some(2),
                "/sys/fs/cgroup/a/b/memory.max" => Some(3),
                "/sys/fs/cgroup/memory/memory.limit_in_bytes" => Some(4),
                "/sys/fs/cgroup/memory/c/memory.limit_in_bytes" => Some(5),
                _ => None,
            };
            assert_eq!(group_limits(groups, read), expected, "{groups:?}");
        };
        check("0::/a/b\n", &[3, 2, 1]);
        check("0::/", &[1]);
        check("0::/gone/in/here", &[1]);
        check("9:name=systemd:/\n4:memory:/c\n2:cpu,cpuacct:/c\n0::/a", &[5, 4, 2, 1]);
        check("", &[]);
        check("nonsense", &[]);
    }
}
