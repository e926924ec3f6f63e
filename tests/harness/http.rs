//! A blocking HTTP/1.1 client: one connection, kept while the server keeps it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// A client of one server.
#[derive(Debug)]
pub struct Client {
    address: SocketAddr,
    timeout: Duration,
    connection: Option<BufReader<TcpStream>>,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body without transfer encoding.
    pub body: Vec<u8>,
}

impl Response {
    /// The first header of this name, which is in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("no JSON ({e}): {}", self.text()))
    }
}

impl Client {
    /// A client without a connection yet.
    pub fn new(address: SocketAddr) -> Self {
        Self::with_timeout(address, Duration::from_secs(120))
    }

    /// The same, with how long it waits for an answer.
    pub fn with_timeout(address: SocketAddr, timeout: Duration) -> Self {
        Self { address, timeout, connection: None }
    }

    /// GET.
    pub fn get(&mut self, path: &str) -> Response {
        self.try_get(path).unwrap_or_else(|e| panic!("GET {path}: {e}"))
    }

    /// GET, when the server may be down.
    pub fn try_get(&mut self, path: &str) -> io::Result<Response> {
        self.request("GET", path, &[], b"")
    }

    /// POST.
    pub fn post(&mut self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        self.request("POST", path, headers, body).unwrap_or_else(|e| panic!("POST {path}: {e}"))
    }

    /// POST of a form.
    pub fn form(&mut self, path: &str, pairs: &[(&str, &str)]) -> Response {
        let body = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish();
        self.post(path, &[("Content-Type", "application/x-www-form-urlencoded")], body.as_bytes())
    }

    /// Any request. A kept connection that the server closed meanwhile is opened again once.
    pub fn request(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> io::Result<Response> {
        let kept = self.connection.is_some();
        let result = self.attempt(method, path, headers, body);
        if result.is_err() {
            self.connection = None;
        }
        match result {
            Err(_) if kept => self.attempt(method, path, headers, body).inspect_err(|_| self.connection = None),
            result => result,
        }
    }

    fn attempt(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> io::Result<Response> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => {
                let stream = TcpStream::connect_timeout(&self.address, Duration::from_secs(10))?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(self.timeout))?;
                none.insert(BufReader::new(stream))
            }
        };
        let mut head =
            format!("{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n", self.address, body.len());
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let stream = connection.get_mut();
        stream.write_all(head.as_bytes())?;
        // A server that refuses early may close before it has read all; its answer is there to be read all the same.
        let sent = stream.write_all(body);
        let response = read_response(connection, method == "HEAD");
        let response = match (sent, response) {
            (_, Ok(response)) => response,
            (Err(e), Err(_)) | (Ok(()), Err(e)) => return Err(e),
        };
        if response.header("connection") == Some("close") {
            self.connection = None;
        }
        Ok(response)
    }
}

fn read_response(connection: &mut BufReader<TcpStream>, no_body: bool) -> io::Result<Response> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut line = String::new();
    let mut next = |connection: &mut BufReader<TcpStream>| -> io::Result<String> {
        line.clear();
        if connection.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    };
    let status_line = next(connection)?;
    let status = status_line.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(|| bad("no status"))?;
    let mut headers = Vec::new();
    loop {
        let line = next(connection)?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut response = Response { status, headers, body: Vec::new() };
    if no_body || status == 204 || status == 304 {
        return Ok(response);
    }
    if response.header("transfer-encoding") == Some("chunked") {
        loop {
            let size = usize::from_str_radix(&next(connection)?, 16).map_err(|_| bad("no chunk size"))?;
            let begin = response.body.len();
            response.body.resize(begin + size, 0);
            connection.read_exact(&mut response.body[begin..])?;
            next(connection)?;
            if size == 0 {
                return Ok(response);
            }
        }
    }
    match response.header("content-length").and_then(|v| v.parse().ok()) {
        Some(length) => {
            response.body = vec![0; length];
            connection.read_exact(&mut response.body)?;
        }
        None => {
            connection.read_to_end(&mut response.body)?;
        }
    }
    Ok(response)
}
