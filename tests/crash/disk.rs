//! A file system for one server, which can lose power or be filled. Making one needs root.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// A mounted file system, unmounted and removed when it goes out of scope.
#[derive(Debug)]
pub struct Disk {
    dir: TempDir,
    /// What `mount` is told besides the mount point.
    mount: Vec<String>,
}

impl Disk {
    /// An ext4 on a loop device, or nothing where that can't be made. No registry offers root, so CI skips it too.
    pub fn ext4(mib: u64) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let image = dir.path().join("image");
        File::create(&image).and_then(|f| f.set_len(mib << 20)).expect("a sparse file");
        let path = image.display().to_string();
        // No blocks are kept back for root, who the server is here.
        let made = command("mkfs.ext4", &["-q", "-F", "-m", "0", &path]);
        let mount = ["-o", "loop", &path].map(str::to_owned).to_vec();
        made.and_then(|()| Self::mounted(dir, mount)).inspect_err(|why| eprintln!("skipped: {why}")).ok()
    }

    /// A file system in memory, or nothing where that can't be made.
    pub fn tmpfs(mib: u64) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mount = ["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"].map(str::to_owned).to_vec();
        Self::mounted(dir, mount).inspect_err(|why| eprintln!("skipped: {why}")).ok()
    }

    fn mounted(dir: TempDir, mount: Vec<String>) -> Result<Self, String> {
        let disk = Self { dir, mount };
        std::fs::create_dir(disk.point()).expect("a folder to mount at");
        disk.mount()?;
        Ok(disk)
    }

    fn point(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }

    fn mount(&self) -> Result<(), String> {
        let point = self.point().display().to_string();
        let arguments: Vec<&str> = self.mount.iter().map(String::as_str).chain([point.as_str()]).collect();
        command("mount", &arguments)
    }

    fn unmount(&self) -> Result<(), String> {
        command("umount", &[&self.point().display().to_string()])
    }

    /// Where a server may put its data.
    pub fn data_dir(&self) -> PathBuf {
        self.point().join("data")
    }

    /// From now on nothing reaches the disk, not even what the kernel has in its journal: what was not synced is lost at
    /// the next [`Disk::power_on`].
    pub fn cut_power(&self) {
        // EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH (fs/ext4/ext4.h).
        let script = "import fcntl, os, struct, sys\n\
                      fd = os.open(sys.argv[1], os.O_RDONLY)\n\
                      fcntl.ioctl(fd, 0x8004587D, struct.pack('I', 2))";
        let cut = command("python3", &["-c", script, &self.point().display().to_string()]);
        cut.expect("the file system can be shut down");
    }

    /// Mounts it anew, after the server has ended.
    pub fn power_on(&self) {
        self.unmount().and_then(|()| self.mount()).expect("the file system can be mounted again");
    }

    /// Leaves no byte free.
    pub fn fill(&self) {
        let mut ballast = File::options().create(true).append(true).open(self.ballast()).expect("a ballast file");
        for size in [1 << 20, 4096, 1] {
            let chunk = vec![0xaa; size];
            loop {
                match ballast.write_all(&chunk) {
                    Ok(()) => {}
                    Err(e) if e.kind() == ErrorKind::StorageFull => break,
                    Err(e) => panic!("cannot fill the disk: {e}"),
                }
            }
        }
        // Blocks are given to the file when it is synced, at the latest.
        let _ = ballast.sync_all();
    }

    /// Gives back what [`Disk::fill`] took.
    pub fn free(&self) {
        std::fs::remove_file(self.ballast()).expect("a ballast file");
    }

    fn ballast(&self) -> PathBuf {
        self.point().join("ballast")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // A process that still holds a file there would keep the mount; lazily, it goes with the last of them.
        let _ = command("umount", &["-l", &self.point().display().to_string()]);
    }
}

/// Copies a folder with all that is in it.
pub fn copy(from: &Path, to: &Path) {
    command("cp", &["-a", &from.display().to_string(), &to.display().to_string()]).expect("a copy of the folder");
}

fn command(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output().map_err(|e| format!("{program}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim_end()))
}
