//! A control group for one server: less memory or processor than the machine has. Making one needs permission.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

const ROOT: &str = "/sys/fs/cgroup";

/// A group below the one that the tests run in, removed when it goes out of scope. Its server must have ended by then.
#[derive(Debug)]
pub struct Group {
    dir: PathBuf,
    /// Version 2 has one tree for all controllers and other names.
    unified: bool,
}

impl Group {
    /// A group that may use so much memory, page cache included.
    pub fn memory(bytes: u64) -> Option<Self> {
        let group = Self::new("memory")?;
        group.set(if group.unified { "memory.max" } else { "memory.limit_in_bytes" }, &bytes.to_string());
        Some(group)
    }

    /// A group for [`Group::limit_processor`].
    pub fn processor() -> Option<Self> {
        Self::new("cpu")
    }

    fn new(controller: &str) -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("thalweg-test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let made = parent(controller).and_then(|(parent, unified)| {
            if unified {
                let file = parent.join("cgroup.subtree_control");
                std::fs::write(&file, format!("+{controller}")).map_err(|e| format!("{}: {e}", file.display()))?;
            }
            let dir = parent.join(name);
            std::fs::create_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
            Ok(Self { dir, unified })
        });
        made.inspect_err(|why| eprintln!("skipped: no control group for {controller}: {why}")).ok()
    }

    /// Allows so many hundredths of one processor, from now on.
    pub fn limit_processor(&self, percent: u64) {
        let (period, quota) = (100_000, percent * 1000);
        if self.unified {
            self.set("cpu.max", &format!("{quota} {period}"));
        } else {
            self.set("cpu.cfs_period_us", &period.to_string());
            self.set("cpu.cfs_quota_us", &quota.to_string());
        }
    }

    /// What starts a server within the group.
    pub fn wrapper(&self) -> Vec<String> {
        let enter = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.dir.display());
        ["sh", "-c", &enter, "sh"].map(str::to_owned).to_vec()
    }

    /// How often the kernel killed a process of the group for want of memory.
    pub fn memory_kills(&self) -> u64 {
        let text = self.get(if self.unified { "memory.events" } else { "memory.oom_control" });
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok());
        count.expect("the kernel counts its kills")
    }

    fn set(&self, file: &str, text: &str) {
        std::fs::write(self.dir.join(file), text).unwrap_or_else(|e| panic!("{file} = {text}: {e}"));
    }

    fn get(&self, file: &str) -> String {
        std::fs::read_to_string(self.dir.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.dir);
    }
}

/// Our own group of a controller, and whether it lies in the tree of version 2.
fn parent(controller: &str) -> Result<(PathBuf, bool), String> {
    let own = std::fs::read_to_string("/proc/self/cgroup").map_err(|e| e.to_string())?;
    let lines = || own.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    if let Some((names, path)) = lines().find(|(names, _)| names.split(',').any(|name| name == controller)) {
        return Ok((Path::new(ROOT).join(names).join(path.trim_start_matches('/')), false));
    }
    let (_, path) = lines().find(|(names, _)| names.is_empty()).ok_or("no group of ours")?;
    Ok((Path::new(ROOT).join(path.trim_start_matches('/')), true))
}
