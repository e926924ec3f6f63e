//! A PostgreSQL server of a test's own.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::programs::output;
use super::{Process, free_port, program, run, wait_for};

/// A running PostgreSQL.
#[derive(Debug)]
pub struct Postgres {
    dir: TempDir,
    port: u16,
    programs: PathBuf,
    /// `None` while it is down.
    process: Option<Process>,
}

impl Postgres {
    /// An empty one, or nothing when it is not installed and the test is to be skipped.
    pub fn start() -> Option<Self> {
        let programs = programs()?;
        let dir = tempfile::tempdir().expect("a temporary folder");
        if root() {
            // It refuses to run as root.
            std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("permissions of the folder");
            run(&program("chown")?, ["nobody".as_ref(), dir.path().as_os_str()]);
        }
        let mut postgres = Self { dir, port: free_port(), programs, process: None };
        let data = postgres.data();
        let words = postgres.words("initdb", &["-D", &data, "-U", "thalweg", "-A", "trust", "-E", "UTF8", "--no-sync"]);
        run(Path::new(&words[0]), &words[1..]);
        postgres.restart();
        Some(postgres)
    }

    fn data(&self) -> String {
        self.dir.path().join("data").display().to_string()
    }

    /// The command line of one of its programs, by an unprivileged user.
    fn words(&self, name: &str, arguments: &[&str]) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        if root() {
            words.extend(["/usr/bin/setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"].map(String::from));
        }
        words.push(self.programs.join(name).display().to_string());
        words.extend(arguments.iter().map(|a| (*a).to_owned()));
        words
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts it again and waits until it answers.
    pub fn restart(&mut self) {
        let (data, port) = (self.data(), self.port.to_string());
        let dir = self.dir.path().display().to_string();
        let words = self.words(
            "postgres",
            &["-D", &data, "-p", &port, "-k", &dir, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"],
        );
        let log = self.dir.path().join("log");
        wait_for("PostgreSQL", || {
            let ended = self.process.as_mut().is_none_or(|p| p.0.try_wait().is_ok_and(|status| status.is_some()));
            if ended {
                // What a killed one left running keeps its memory for a moment.
                self.process = Some(Process::start(Path::new(&words[0]), &words[1..], &log));
            }
            let answer = output(&self.programs.join("psql"), [self.url().as_str(), "-Atc", "SELECT 1"]);
            answer.status.success().then_some(())
        });
    }

    /// As a URL.
    pub fn url(&self) -> String {
        format!("postgres://thalweg@127.0.0.1:{}/postgres", self.port)
    }

    /// As DuckDB wants it.
    pub fn connection(&self) -> String {
        format!("dbname=postgres host=127.0.0.1 port={} user=thalweg", self.port)
    }

    /// The rows of a query, columns separated by `|`.
    pub fn sql(&self, query: &str) -> Vec<String> {
        let out = run(&self.programs.join("psql"), [self.url().as_str(), "-Atc", query]);
        out.lines().map(str::to_owned).collect()
    }
}

/// Where its programs are: Debian keeps those of a server out of the path.
fn programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let debian = versions.map(|v| v.path().join("bin")).filter(|bin| bin.join("initdb").is_file()).max();
    debian.or_else(|| program("initdb").and_then(|p| p.parent().map(Path::to_owned)))
}

fn root() -> bool {
    run(Path::new("/usr/bin/id"), ["-u"]).trim() == "0"
}
