//! The server as a child process.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;

use tempfile::TempDir;

use super::{Client, wait_for};

/// A running server.
#[derive(Debug)]
pub struct Server {
    child: Child,
    dir: Arc<TempDir>,
    arguments: Vec<String>,
    log: PathBuf,
    /// Where HTTP is served.
    pub http: SocketAddr,
    /// Where PostgreSQL clients connect.
    pub postgres: SocketAddr,
    /// Where gRPC is served.
    pub grpc: SocketAddr,
    expected: Vec<String>,
    /// One log per start within the folder.
    starts: usize,
}

impl Server {
    /// A server with an empty database, ready.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same with further flags.
    pub fn start_with(arguments: &[&str]) -> Self {
        let dir = Arc::new(tempfile::tempdir().expect("a temporary folder"));
        Self::start_in(dir, arguments.iter().map(|a| (*a).to_owned()).collect(), 0)
    }

    fn start_in(dir: Arc<TempDir>, arguments: Vec<String>, starts: usize) -> Self {
        let log = dir.path().join(format!("log.{starts}"));
        let out = dir.path().join(format!("out.{starts}"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_thalweg"))
            .args(["serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--postgres", "127.0.0.1:0"])
            .arg("--data-dir")
            .arg(dir.path().join("data"))
            .args(&arguments)
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::null())
            .stdout(File::create(&out).expect("a file for the output"))
            .stderr(File::create(&log).expect("a file for the log"))
            .spawn()
            .expect("the server starts");
        let lines = wait_for("the server's first lines", || {
            let text = std::fs::read_to_string(&out).ok()?;
            if let Some(status) = child.try_wait().expect("a child has a state") {
                panic!("the server ended with {status}: {}", std::fs::read_to_string(&log).unwrap_or_default());
            }
            text.contains("\ndata ").then_some(text)
        });
        let address = |before: &str| -> SocketAddr {
            let rest =
                lines[lines.find(before).expect("the first lines name the address") + before.len()..].trim_start();
            let end = rest.find(['/', '\n']).expect("an address ends");
            rest[..end].parse().expect("an address")
        };
        let (http, postgres, grpc) = (address("http://"), address("postgres://"), address("gRPC"));
        let server = Self { child, dir, arguments, log, http, postgres, grpc, expected: Vec::new(), starts };
        wait_for("readiness", || {
            let ready = Client::new(server.http).try_get("/-/ready").ok()?;
            (ready.status == 200).then_some(())
        });
        server
    }

    /// A client of its HTTP listener.
    pub fn client(&self) -> Client {
        Client::new(self.http)
    }

    /// A warning or error whose line contains `text` is part of the test.
    pub fn expect_log(&mut self, text: &str) {
        self.expected.push(text.to_owned());
    }

    /// What it logged since its start.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).expect("the log is readable")
    }

    /// The data folder.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes everything in memory to data files.
    pub fn flush(&self) {
        let response = self.client().post("/api/v1/admin/flush", &[], b"");
        assert_eq!(response.status, 204, "{}", response.text());
    }

    /// Compacts all data files.
    pub fn compact(&self) {
        let response = self.client().post("/api/v1/admin/compact", &[], b"");
        assert_eq!(response.status, 204, "{}", response.text());
    }

    /// The rows of a SQL query as CSV lines, without the header.
    pub fn sql(&self, query: &str) -> Vec<String> {
        let response =
            self.client().post("/api/v1/sql?format=csv", &[("Content-Type", "text/plain")], query.as_bytes());
        assert_eq!(response.status, 200, "{query}: {}", response.text());
        response.text().lines().skip(1).map(str::to_owned).collect()
    }

    /// SIGKILL, then a start on the same folder.
    pub fn kill_and_restart(mut self) -> Self {
        self.kill();
        self.check_log();
        Self::start_in(Arc::clone(&self.dir), self.arguments.clone(), self.starts + 1)
    }

    /// SIGKILL, then `damage`, then a start on the same folder, where the log may warn of the damage.
    pub fn kill_and_damage(mut self, damage: impl FnOnce(&Path)) -> Self {
        self.kill();
        self.check_log();
        damage(&self.data_dir());
        let mut next = Self::start_in(Arc::clone(&self.dir), self.arguments.clone(), self.starts + 1);
        next.expect_log("wal");
        next
    }

    /// SIGTERM, then the exit status.
    pub fn terminate(&mut self) -> ExitStatus {
        signal(self.pid(), "TERM");
        self.child.wait().expect("a child has a state")
    }

    /// SIGTERM, then a start on the same folder.
    pub fn stop_and_restart(mut self) -> Self {
        let status = self.terminate();
        assert!(status.success(), "the server stopped with {status}: {}", self.log());
        self.check_log();
        Self::start_in(Arc::clone(&self.dir), self.arguments.clone(), self.starts + 1)
    }

    /// Waits for a server that was told to stop, then starts it again on the same folder.
    pub fn wait_and_restart(mut self) -> Self {
        // However it ended, by its own will or by a signal that came in time, it must start again.
        self.child.wait().expect("a child has a state");
        Self::start_in(Arc::clone(&self.dir), self.arguments.clone(), self.starts + 1)
    }

    fn kill(&mut self) {
        // It may have ended already, which is no failure here.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn check_log(&self) {
        let unexpected: Vec<String> = self
            .log()
            .lines()
            .filter(|line| [" WARN ", " ERROR ", "panicked"].iter().any(|level| line.contains(level)))
            .filter(|line| !self.expected.iter().any(|text| line.contains(text)))
            .map(str::to_owned)
            .collect();
        assert!(unexpected.is_empty(), "unexpected lines in the server's log:\n{}", unexpected.join("\n"));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- log of the server at {}\n{}", self.http, self.log());
        } else {
            self.check_log();
        }
    }
}

/// Sends a signal to a process by its id.
pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).status();
    assert!(status.is_ok_and(|s| s.success()), "cannot send SIG{name} to {pid}");
}
