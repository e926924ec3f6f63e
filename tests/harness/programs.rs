//! Other programs: real clients, Prometheus, DuckDB. One that is missing skips its test, except where `CI` is set.

use std::ffi::OsStr;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// A port that nobody listens on. Another process could take it before it is used; none of ours does.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound listener has an address").port()
}

/// The path of a program, or nothing when it is not installed and the test is to be skipped.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file());
    found.or_else(|| skip(&format!("{name} is not installed")))
}

/// A library below the folders of the system's libraries, or nothing when it is not installed.
pub fn library(name: &str) -> Option<PathBuf> {
    let folders = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"];
    let found = folders.iter().map(|dir| Path::new(dir).join(name)).find(|file| file.is_file());
    found.or_else(|| skip(&format!("{name} is not installed")))
}

/// A Python that can import DuckDB, or nothing when there is none and the test is to be skipped.
pub fn python() -> Option<PathBuf> {
    python_with("duckdb")
}

/// A Python that can import a module, or nothing when there is none and the test is to be skipped.
pub fn python_with(module: &str) -> Option<PathBuf> {
    let python = std::env::var_os("TEST_PYTHON").map_or_else(
        || {
            let target = Path::new(env!("CARGO_BIN_EXE_thalweg")).ancestors().nth(2);
            target.expect("the binary lies in a target folder").join("venv/bin/python")
        },
        PathBuf::from,
    );
    let imports = Command::new(&python).args(["-c", &format!("import {module}")]).output();
    if imports.is_ok_and(|o| o.status.success()) { Some(python) } else { skip(&format!("Python has no {module}")) }
}

fn skip(why: &str) -> Option<PathBuf> {
    assert!(std::env::var("CI").is_err(), "{why}, and in CI nothing is skipped");
    eprintln!("skipped: {why}");
    None
}

/// Runs a program to its end; it must succeed. Gives its standard output.
pub fn run<S: AsRef<OsStr>>(program: &Path, arguments: impl IntoIterator<Item = S>) -> String {
    let output = output(program, arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} failed: {stderr}", program.display());
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a program to its end.
pub fn output<S: AsRef<OsStr>>(program: &Path, arguments: impl IntoIterator<Item = S>) -> Output {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("cannot run {}: {e}", program.display()))
}

/// A program in the background, killed when it goes out of scope.
#[derive(Debug)]
pub struct Process(pub Child);

impl Process {
    /// Starts it with its output in a file.
    pub fn start<S: AsRef<OsStr>>(program: &Path, arguments: impl IntoIterator<Item = S>, log: &Path) -> Self {
        let log = File::create(log).expect("a file for the output");
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle of the file"))
            .stderr(log)
            .spawn();
        Self(child.unwrap_or_else(|e| panic!("cannot run {}: {e}", program.display())))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
