//! An S3 server of another make (moto, a Python package), and a proxy that loses, delays and tears what goes through it.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;

use super::programs::python_with;
use super::{Client, Process, Random, Setup, free_port, wait_for};

/// Longer than the client waits for an answer, see [`S3::setup`].
const TOO_LATE: Duration = Duration::from_millis(2500);

/// A running S3 server with one empty bucket.
#[derive(Debug)]
pub struct S3 {
    _process: Process,
    /// With its log.
    _dir: TempDir,
    /// Where it listens.
    pub address: SocketAddr,
}

impl S3 {
    /// Starts one; nothing when it is not installed and the test is to be skipped.
    pub fn start() -> Option<Self> {
        let python = python_with("moto.server")?;
        let dir = tempfile::tempdir().expect("a temporary folder");
        let address: SocketAddr = ([127, 0, 0, 1], free_port()).into();
        let arguments = ["-m", "moto.server", "-H", "127.0.0.1", "-p", &address.port().to_string()];
        let process = Process::start(&python, arguments, &dir.path().join("log"));
        let mut client = Client::new(address);
        wait_for("a bucket", || client.request("PUT", "/bucket", &[], b"").ok().filter(|r| r.status == 200));
        Some(Self { _process: process, _dir: dir, address })
    }

    /// The store behind `address`, which is the server's or a proxy's.
    pub fn url(address: SocketAddr) -> String {
        format!("s3://bucket/prefix?endpoint=http://{address}&region=us-east-1")
    }

    /// A server of ours that keeps its data files behind `address`.
    pub fn setup(address: SocketAddr) -> Setup {
        let environment = [("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_TIMEOUT", "2s")];
        Setup {
            arguments: vec!["--object-store".to_owned(), Self::url(address)],
            environment: environment.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec(),
            ..Setup::default()
        }
    }

    /// The names of all objects.
    pub fn keys(&self) -> Vec<String> {
        let listed = Client::new(self.address).get("/bucket?list-type=2&max-keys=1000").text();
        let keys = listed.split("<Key>").skip(1).filter_map(|rest| rest.split_once("</Key>"));
        keys.map(|(key, _)| key.to_owned()).collect()
    }
}

/// What may happen to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The connection ends before the request is passed on.
    Cut,
    /// The request is carried out, and the connection ends before the answer.
    LostReply,
    /// The request is carried out, and the answer comes when nobody waits for it any more.
    LateReply,
    /// The server says that it can't keep up.
    SlowDown,
    /// Half of the answer's body arrives.
    Torn,
    /// The answer takes its time.
    Slow,
}

const FAULTS: [Fault; 6] = [Fault::Cut, Fault::LostReply, Fault::LateReply, Fault::SlowDown, Fault::Torn, Fault::Slow];

/// A proxy in front of a server.
#[derive(Debug)]
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    behind: SocketAddr,
    random: Mutex<Random>,
    percent: AtomicU64,
    /// Conditions of puts are dropped, as a careless server does.
    unconditional: AtomicBool,
    hits: Mutex<BTreeMap<Fault, usize>>,
    ended: AtomicBool,
}

impl Proxy {
    /// A proxy that passes everything on, until it is told otherwise.
    pub fn before(behind: SocketAddr, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound listener has an address");
        let shared = Arc::new(Shared {
            behind,
            random: Mutex::new(Random(seed)),
            percent: AtomicU64::new(0),
            unconditional: AtomicBool::new(false),
            hits: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                if accepting.ended.load(Ordering::Relaxed) {
                    return;
                }
                let shared = Arc::clone(&accepting);
                // A connection that breaks is what this is for.
                std::thread::spawn(move || drop(shared.pass(connection)));
            }
        });
        Self { address, shared }
    }

    /// So many of a hundred requests meet a fault from now on.
    pub fn faults(&self, percent: u64) {
        self.shared.percent.store(percent, Ordering::Relaxed);
    }

    /// Drops the conditions of puts from now on.
    pub fn forget_conditions(&self) {
        self.shared.unconditional.store(true, Ordering::Relaxed);
    }

    /// How often each fault happened.
    pub fn hits(&self) -> BTreeMap<Fault, usize> {
        self.shared.hits.lock().expect("no thread panicked").clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    /// Passes on one request; the connection ends after it.
    fn pass(&self, client: TcpStream) -> io::Result<()> {
        client.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut reader = BufReader::new(client.try_clone()?);
        let mut head = Vec::new();
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let (name, value) = line.split_once(':').unwrap_or((line.trim_end(), ""));
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse().map_err(|_| io::ErrorKind::InvalidData)?,
                "connection" => continue,
                "if-none-match" if self.unconditional.load(Ordering::Relaxed) => continue,
                "" => break,
                _ => {}
            }
            head.extend_from_slice(line.as_bytes());
        }
        head.extend_from_slice(b"connection: close\r\n\r\n");
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        self.answer(client, &head, &body)
    }

    fn answer(&self, mut client: TcpStream, head: &[u8], body: &[u8]) -> io::Result<()> {
        let fault = self.fault();
        match fault {
            Some(Fault::Cut) => return client.shutdown(Shutdown::Both),
            Some(Fault::SlowDown) => {
                let text = "<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>";
                let length = text.len();
                return write!(
                    client,
                    "HTTP/1.1 503 Slow Down\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{text}"
                );
            }
            Some(Fault::Slow) => std::thread::sleep(Duration::from_millis(300)),
            _ => {}
        }
        let mut server = TcpStream::connect(self.behind)?;
        server.write_all(head)?;
        server.write_all(body)?;
        let mut answer = Vec::new();
        server.read_to_end(&mut answer)?;
        match fault {
            Some(Fault::LostReply) => return client.shutdown(Shutdown::Both),
            Some(Fault::LateReply) => std::thread::sleep(TOO_LATE),
            Some(Fault::Torn) => {
                let begin = answer.windows(4).position(|w| w == b"\r\n\r\n").map_or(0, |at| at + 4);
                answer.truncate(begin + (answer.len() - begin) / 2);
            }
            _ => {}
        }
        client.write_all(&answer)
    }

    fn fault(&self) -> Option<Fault> {
        let mut random = self.random.lock().expect("no thread panicked");
        if random.below(100) >= self.percent.load(Ordering::Relaxed) {
            return None;
        }
        let fault = FAULTS[random.below(FAULTS.len() as u64) as usize];
        *self.hits.lock().expect("no thread panicked").entry(fault).or_default() += 1;
        Some(fault)
    }
}
