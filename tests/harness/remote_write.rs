//! A remote-write client, 1.0 and 2.0: just enough protobuf for float samples.

use std::io;

use super::{Client, Response, Server};

/// A series with its samples: milliseconds and values.
#[derive(Debug, Clone)]
pub struct Series {
    /// Sorted by name, `__name__` among them.
    pub labels: Vec<(String, String)>,
    /// Time in milliseconds, value.
    pub samples: Vec<(i64, f64)>,
}

/// A series of a metric.
pub fn series(metric: &str, labels: &[(&str, &str)], samples: &[(i64, f64)]) -> Series {
    let mut labels: Vec<(String, String)> = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    labels.push(("__name__".to_owned(), metric.to_owned()));
    labels.sort();
    Series { labels, samples: samples.to_vec() }
}

/// Writes a number of 7 bits a byte.
pub fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Writes a field that states its length.
pub fn field(out: &mut Vec<u8>, number: u8, body: &[u8]) {
    out.push(number << 3 | 2);
    varint(out, body.len() as u64);
    out.extend_from_slice(body);
}

/// The message, not compressed.
pub fn message(series: &[Series]) -> Vec<u8> {
    let mut out = Vec::new();
    for one in series {
        let mut body = Vec::new();
        for (name, value) in &one.labels {
            let mut label = Vec::new();
            field(&mut label, 1, name.as_bytes());
            field(&mut label, 2, value.as_bytes());
            field(&mut body, 1, &label);
        }
        for (ts, value) in &one.samples {
            field(&mut body, 2, &sample(*ts, *value));
        }
        field(&mut out, 1, &body);
    }
    out
}

/// The message of remote write 2.0, not compressed: texts once each, series with references to them.
pub fn message_v2(series: &[Series]) -> Vec<u8> {
    let mut symbols = vec![""];
    let mut bodies = Vec::new();
    for one in series {
        let mut references = Vec::new();
        for text in one.labels.iter().flat_map(|(name, value)| [name, value]) {
            let known = symbols.iter().position(|s| s == text);
            varint(&mut references, known.unwrap_or(symbols.len()) as u64);
            if known.is_none() {
                symbols.push(text);
            }
        }
        let mut body = Vec::new();
        field(&mut body, 1, &references);
        for (ts, value) in &one.samples {
            field(&mut body, 2, &sample(*ts, *value));
        }
        bodies.push(body);
    }
    let mut out = Vec::new();
    symbols.iter().for_each(|symbol| field(&mut out, 4, symbol.as_bytes()));
    bodies.iter().for_each(|body| field(&mut out, 5, body));
    out
}

fn sample(ts: i64, value: f64) -> Vec<u8> {
    let mut sample = vec![1 << 3 | 1];
    sample.extend_from_slice(&value.to_le_bytes());
    sample.push(2 << 3);
    varint(&mut sample, ts as u64);
    sample
}

/// Snappy's block format, as remote write wants it.
pub fn snappy(message: &[u8]) -> Vec<u8> {
    snap::raw::Encoder::new().compress_vec(message).expect("less than 4 GiB")
}

/// The headers of remote write 1.0.
pub const HEADERS: [(&str, &str); 3] = [
    ("Content-Type", "application/x-protobuf"),
    ("Content-Encoding", "snappy"),
    ("X-Prometheus-Remote-Write-Version", "0.1.0"),
];

/// The headers of remote write 2.0.
pub const HEADERS_V2: [(&str, &str); 3] = [
    ("Content-Type", "application/x-protobuf;proto=io.prometheus.write.v2.Request"),
    ("Content-Encoding", "snappy"),
    ("X-Prometheus-Remote-Write-Version", "2.0.0"),
];

impl Client {
    /// Writes series in the form of remote write 2.0; the caller judges the answer.
    pub fn write_v2(&mut self, series: &[Series]) -> io::Result<Response> {
        self.request("POST", "/api/v1/write", &HEADERS_V2, &snappy(&message_v2(series)))
    }

    /// Writes series with a token.
    pub fn write_as(&mut self, token: &str, series: &[Series]) -> Response {
        let bearer = format!("Bearer {token}");
        let headers: Vec<_> = HEADERS.into_iter().chain([("Authorization", bearer.as_str())]).collect();
        self.request("POST", "/api/v1/write", &headers, &snappy(&message(series))).expect("the server is up")
    }

    /// Writes series; the caller judges the answer.
    pub fn write(&mut self, series: &[Series]) -> io::Result<Response> {
        self.request("POST", "/api/v1/write", &HEADERS, &snappy(&message(series)))
    }
}

impl Server {
    /// Writes series, which must succeed.
    pub fn write(&self, series: &[Series]) {
        let response = self.client().write(series).expect("the server is up");
        assert_eq!(response.status, 204, "{}", response.text());
    }
}
