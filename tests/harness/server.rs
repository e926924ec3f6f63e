//! The server as a child process.

use std::ffi::OsString;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::{Client, wait_for};

/// How a server is started, beyond free ports and a folder of its own.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Further flags of `serve`.
    pub arguments: Vec<String>,
    /// Where data lie, when not in the server's own temporary folder.
    pub data_dir: Option<PathBuf>,
    /// A program with its arguments that is given the server's command line and becomes the server.
    pub wrapper: Vec<String>,
    /// Environment variables.
    pub environment: Vec<(String, String)>,
    /// A warning or error whose line contains one of these is part of the test. A panic never is.
    pub expected: Vec<String>,
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// What is needed to start it again.
    down: Down,
    log: PathBuf,
    /// Where HTTP is served.
    pub http: SocketAddr,
    /// Where PostgreSQL clients connect.
    pub postgres: SocketAddr,
    /// Where gRPC is served.
    pub grpc: SocketAddr,
    /// From the start of the process until it was ready.
    pub ready_after: Duration,
}

/// A server that does not run.
#[derive(Debug, Clone)]
pub struct Down {
    dir: Arc<TempDir>,
    setup: Setup,
    /// One log per start within the folder.
    starts: usize,
}

impl Down {
    /// A server that never ran.
    pub fn new(setup: Setup) -> Self {
        Self { dir: Arc::new(tempfile::tempdir().expect("a temporary folder")), setup, starts: 0 }
    }

    /// The same server with its data elsewhere.
    pub fn moved(&self, data_dir: PathBuf) -> Self {
        Self::new(Setup { data_dir: Some(data_dir), ..self.setup.clone() })
    }

    /// The data folder.
    pub fn data_dir(&self) -> PathBuf {
        self.setup.data_dir.clone().unwrap_or_else(|| self.dir.path().join("data"))
    }

    /// A warning or error whose line contains `text` is part of the test from the next start on.
    pub fn expect_log(&mut self, text: &str) {
        self.setup.expected.push(text.to_owned());
    }

    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// The exit status and the log of a server that ended instead.
    pub fn try_start(mut self) -> Result<Server, String> {
        let dir = self.dir.path();
        let log = dir.join(format!("log.{}", self.starts));
        let out = dir.join(format!("out.{}", self.starts));
        self.starts += 1;
        let program = std::env::var_os("THALWEG_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_thalweg").into());
        let words = self.setup.wrapper.iter().map(OsString::from).chain([program]).collect::<Vec<_>>();
        let begun = Instant::now();
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .args(["serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--postgres", "127.0.0.1:0"])
            .arg("--data-dir")
            .arg(self.data_dir())
            .args(&self.setup.arguments)
            .envs(self.setup.environment.iter().map(|(k, v)| (k, v)))
            // The server would take it for a setting.
            .env_remove("THALWEG_BIN")
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::null())
            .stdout(File::create(&out).expect("a file for the output"))
            .stderr(File::create(&log).expect("a file for the log"))
            .spawn()
            .expect("the server starts");
        let mut ended = || {
            let status = child.try_wait().expect("a child has a state")?;
            Some(format!("the server ended with {status}: {}", std::fs::read_to_string(&log).unwrap_or_default()))
        };
        let lines = wait_for("the server's first lines", || {
            if let Some(how) = ended() {
                return Some(Err(how));
            }
            let text = std::fs::read_to_string(&out).ok()?;
            text.contains("\ndata ").then_some(Ok(text))
        })?;
        let address = |before: &str| -> SocketAddr {
            let rest =
                lines[lines.find(before).expect("the first lines name the address") + before.len()..].trim_start();
            let end = rest.find(['/', '\n']).expect("an address ends");
            rest[..end].parse().expect("an address")
        };
        let (http, postgres, grpc) = (address("http://"), address("postgres://"), address("gRPC"));
        wait_for("readiness", || {
            if let Some(how) = ended() {
                return Some(Err(how));
            }
            let ready = Client::new(http).try_get("/-/ready").ok()?;
            (ready.status == 200).then_some(Ok(()))
        })?;
        Ok(Server { child, down: self, log, http, postgres, grpc, ready_after: begun.elapsed() })
    }

    /// Starts it, which must succeed.
    pub fn start(self) -> Server {
        self.try_start().unwrap_or_else(|how| panic!("{how}"))
    }
}

impl Server {
    /// A server with an empty database, ready.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same with further flags.
    pub fn start_with(arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|a| (*a).to_owned()).collect();
        Down::new(Setup { arguments, ..Setup::default() }).start()
    }

    /// A client of its HTTP listener.
    pub fn client(&self) -> Client {
        Client::new(self.http)
    }

    /// What it logged since its start.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).expect("the log is readable")
    }

    /// The data folder.
    pub fn data_dir(&self) -> PathBuf {
        self.down.data_dir()
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

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child has a state")
    }

    /// SIGKILL to a server that must have been running.
    pub fn kill(mut self) -> Down {
        if let Some(status) = self.ended() {
            panic!("the server ended by itself with {status}: {}", self.log());
        }
        self.reap();
        self.check_log();
        self.down.clone()
    }

    /// SIGKILL, then `damage`, then a start on the same folder, where the log may warn of the damage.
    pub fn kill_and_damage(self, damage: impl FnOnce(&Path)) -> Self {
        let mut down = self.kill();
        damage(&down.data_dir());
        down.expect_log("wal");
        down.start()
    }

    /// SIGSTOP; none of its threads runs any more when this returns, also none that was in a call to the kernel.
    pub fn pause(&self) {
        signal(self.pid(), "STOP");
        let tasks = format!("/proc/{}/task", self.pid());
        wait_for("all threads to stop", || {
            let stopped = |task: std::fs::DirEntry| {
                let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                // The state follows the name, which stands in parentheses. A thread that has just ended has none.
                stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['T', 'Z', 'X']))
            };
            std::fs::read_dir(&tasks).expect("the server runs").flatten().all(stopped).then_some(())
        });
    }

    /// SIGCONT.
    pub fn resume(&self) {
        signal(self.pid(), "CONT");
    }

    /// SIGTERM, then the exit status.
    pub fn terminate(&mut self) -> ExitStatus {
        signal(self.pid(), "TERM");
        self.child.wait().expect("a child has a state")
    }

    /// What is needed to start it again, once it has ended.
    pub fn down(&self) -> Down {
        self.down.clone()
    }

    /// SIGTERM to a server that must end well.
    pub fn stop(mut self) -> Down {
        let status = self.terminate();
        assert!(status.success(), "the server stopped with {status}: {}", self.log());
        self.check_log();
        self.down.clone()
    }

    /// SIGTERM, then a start on the same folder.
    pub fn stop_and_restart(self) -> Self {
        self.stop().start()
    }

    /// Waits for a server that was told to stop, then starts it again on the same folder.
    pub fn wait_and_restart(mut self) -> Self {
        // However it ended, by its own will or by a signal that came in time, it must start again.
        self.child.wait().expect("a child has a state");
        self.down.clone().start()
    }

    fn reap(&mut self) {
        // It may have ended already, which is no failure here.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn check_log(&self) {
        let expected = |line: &str| self.down.setup.expected.iter().any(|text| line.contains(text));
        let unexpected: Vec<String> = self
            .log()
            .lines()
            .filter(|line| {
                let bad = [" WARN ", " ERROR "].iter().any(|level| line.contains(level));
                line.contains("panicked") || (bad && !expected(line))
            })
            .map(str::to_owned)
            .collect();
        assert!(unexpected.is_empty(), "unexpected lines in the server's log:\n{}", unexpected.join("\n"));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.reap();
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
