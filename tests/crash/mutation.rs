//! Requests with errors in them, for every decoder: recorded and made ones, with bytes flipped, cut, repeated and put
//! elsewhere. The server answers each and is as well afterwards. `CRASH_MUTATIONS` sets how many of each.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use super::hostile::memory;
use super::{extent, figures};
use crate::harness::remote_write::{HEADERS, HEADERS_V2, field, message, message_v2, snappy, varint};
use crate::harness::{Client, Random, Server, now_ms, series};

/// A bound against hanging.
const PATIENCE: Duration = Duration::from_secs(30);

/// Some small damage, or several.
fn mutate(original: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = original.to_vec();
    for _ in 0..=random.below(4) {
        if bytes.is_empty() {
            bytes.push(random.number() as u8);
        }
        let at = random.below(bytes.len() as u64) as usize;
        let length = (random.below(32) as usize).min(bytes.len() - at);
        match random.below(8) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.number() as u8,
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..at + length)),
            4 => {
                let again = bytes[at..at + length].to_vec();
                bytes.splice(at..at, again);
            }
            5 => {
                // As a length or a number that is far too large.
                bytes.splice(at..at + length.min(1), [0xff; 9].into_iter().chain([1]));
            }
            6 => {
                let interesting: [&[u8]; 6] = [&[0], &[0xff], &[0x7f, 0xff, 0xff, 0xff], b"'", b"\xc3\x28", b"((((("];
                let chosen = interesting[random.below(6) as usize];
                bytes.splice(at..at, chosen.iter().copied());
            }
            _ => {
                let other = random.below(bytes.len() as u64) as usize;
                bytes.swap(at, other);
            }
        }
    }
    bytes
}

/// One decoder: what it is sent unharmed, and how.
struct Target {
    name: &'static str,
    originals: Vec<Vec<u8>>,
    send: fn(&Server, &mut Client, &[u8]) -> Result<u16, String>,
}

fn post(client: &mut Client, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<u16, String> {
    let answer = client.request("POST", path, headers, body).map_err(|e| format!("no answer: {e}"))?;
    if answer.status >= 500 && answer.status != 503 && answer.status != 504 {
        return Err(format!("{} {:.300}", answer.status, answer.text()));
    }
    Ok(answer.status)
}

const FORM: [(&str, &str); 1] = [("Content-Type", "application/x-www-form-urlencoded")];

/// A form whose query is these bytes, which need not be text.
fn form(query: &[u8]) -> Vec<u8> {
    let encoded: String = url::form_urlencoded::byte_serialize(query).collect();
    format!("query={encoded}&start=0&end=600&step=60&time=60").into_bytes()
}

fn texts(all: &[&str]) -> Vec<Vec<u8>> {
    all.iter().map(|text| text.as_bytes().to_vec()).collect()
}

/// What a PostgreSQL client sends: a start, a statement, the extended protocol, an end.
fn postgres_session() -> Vec<u8> {
    let mut out = Vec::new();
    let mut start = 196_608u32.to_be_bytes().to_vec();
    start.extend_from_slice(b"user\0me\0database\0thalweg\0\0");
    out.extend_from_slice(&(start.len() as u32 + 4).to_be_bytes());
    out.extend_from_slice(&start);
    let mut send = |kind: u8, body: &[u8]| {
        out.push(kind);
        out.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
        out.extend_from_slice(body);
    };
    send(b'Q', b"SELECT 1, 'a'\0");
    send(b'P', b"s\0SELECT $1::int8 + 1\0\0\x01\0\0\0\x14");
    send(b'B', b"p\0s\0\0\x01\0\x01\0\x01\0\0\0\x08\0\0\0\0\0\0\0\x07\0\x01\0\x01");
    send(b'D', b"Pp\0");
    send(b'E', b"p\0\0\0\0\0");
    send(b'C', b"Ss\0");
    send(b'S', b"");
    send(b'X', b"");
    out
}

/// What a stranger can send: a start, a request for TLS before one, a request to cancel, a password.
fn first_messages() -> Vec<Vec<u8>> {
    let whole = postgres_session();
    let start = whole[..u32::from_be_bytes([whole[0], whole[1], whole[2], whole[3]]) as usize].to_vec();
    let tls = 80_877_103u32.to_be_bytes();
    let cancel = 80_877_102u32.to_be_bytes();
    vec![
        [&[0, 0, 0, 8], &tls[..], &start].concat(),
        [&[0, 0, 0, 16], &cancel[..], &[0, 0, 0, 1, 0, 0, 0, 2]].concat(),
        [&start[..], b"p\0\0\0\x0bsecret\0"].concat(),
        start,
    ]
}

fn send_postgres(server: &Server, bytes: &[u8]) -> Result<u16, String> {
    let talk = || -> std::io::Result<()> {
        let mut stream = TcpStream::connect(server.postgres)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(bytes)?;
        stream.shutdown(Shutdown::Write)?;
        // After the last byte there is nothing to wait for: the server answers what it understood and closes.
        stream.read_to_end(&mut Vec::new())?;
        Ok(())
    };
    match talk() {
        Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
            Err(format!("the connection stays open: {e}"))
        }
        // A connection that is reset in the middle is an answer as well.
        _ => Ok(400),
    }
}

/// Requests of remote read: for samples, and for chunks with all that a query can say.
fn remote_reads(now: i64) -> Vec<Vec<u8>> {
    let number = |out: &mut Vec<u8>, number: u8, value: i64| {
        out.push(number << 3);
        varint(out, value as u64);
    };
    let matchers = [(0, "__name__", "mutated"), (2, "job", "j|k"), (3, "item", "[5-9]"), (1, "other", "x")];
    let mut query = Vec::new();
    number(&mut query, 1, now - 3_600_000);
    number(&mut query, 2, now);
    for (op, name, value) in matchers {
        let mut matcher = Vec::new();
        number(&mut matcher, 1, op);
        field(&mut matcher, 2, name.as_bytes());
        field(&mut matcher, 3, value.as_bytes());
        field(&mut query, 3, &matcher);
    }
    let mut samples = Vec::new();
    field(&mut samples, 1, &query);
    let mut hints = Vec::new();
    number(&mut hints, 1, 15_000);
    field(&mut hints, 2, b"rate");
    number(&mut hints, 3, now - 3_600_000);
    number(&mut hints, 4, now);
    field(&mut hints, 5, b"job");
    number(&mut hints, 6, 1);
    number(&mut hints, 7, 300_000);
    field(&mut query, 4, &hints);
    let mut chunks = Vec::new();
    field(&mut chunks, 1, &query);
    field(&mut chunks, 1, &query);
    field(&mut chunks, 2, &[1, 0]);
    vec![samples, chunks]
}

const READ_HEADERS: [(&str, &str); 3] = [
    ("Content-Type", "application/x-protobuf"),
    ("Content-Encoding", "snappy"),
    ("X-Prometheus-Remote-Read-Version", "0.1.0"),
];

/// A message of Arrow Flight SQL as `Any` holds it.
fn any(kind: &str, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    field(&mut out, 1, format!("type.googleapis.com/arrow.flight.protocol.sql.{kind}").as_bytes());
    field(&mut out, 2, value);
    out
}

fn flight_descriptors() -> Vec<Vec<u8>> {
    let mut statement = Vec::new();
    field(&mut statement, 1, b"SELECT ts, value FROM samples WHERE metric = 'mutated' LIMIT 3");
    let mut tables = Vec::new();
    field(&mut tables, 1, b"thalweg");
    field(&mut tables, 2, b"pub%");
    field(&mut tables, 4, b"TABLE");
    tables.extend_from_slice(&[5 << 3, 1]);
    let commands =
        [("CommandStatementQuery", &statement[..]), ("CommandGetTables", &tables), ("CommandGetCatalogs", &[])];
    let descriptor = |(kind, body): (&str, &[u8])| {
        // The kind of descriptor that is a command.
        let mut out = vec![1 << 3, 2];
        field(&mut out, 2, &any(kind, body));
        out
    };
    commands.map(descriptor).to_vec()
}

fn flight_tickets() -> Vec<Vec<u8>> {
    let mut handle = Vec::new();
    field(&mut handle, 1, b"SELECT job, count(*) FROM prometheus.mutated GROUP BY job");
    let kinds = [
        ("TicketStatementQuery", &handle[..]),
        ("CommandPreparedStatementQuery", &handle),
        ("CommandGetDbSchemas", &[]),
    ];
    let ticket = |(kind, body): (&str, &[u8])| {
        let mut out = Vec::new();
        field(&mut out, 1, &any(kind, body));
        out
    };
    kinds.map(ticket).to_vec()
}

fn flight_actions() -> Vec<Vec<u8>> {
    let mut text = Vec::new();
    field(&mut text, 1, b"SELECT 1 AS one, $1::int8");
    let kinds = [
        ("CreatePreparedStatement", "ActionCreatePreparedStatementRequest"),
        ("ClosePreparedStatement", "ActionClosePreparedStatementRequest"),
    ];
    let action = |(name, kind): (&str, &str)| {
        let mut out = Vec::new();
        field(&mut out, 1, name.as_bytes());
        field(&mut out, 2, &any(kind, &text));
        out
    };
    kinds.map(action).to_vec()
}

/// One message to a method of Arrow Flight. An error before the first batch is in the answer's headers.
fn send_flight(server: &Server, method: &str, message: &[u8]) -> Result<u16, String> {
    static CALLS: LazyLock<(tokio::runtime::Runtime, reqwest::Client)> = LazyLock::new(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let client = reqwest::Client::builder().http2_prior_knowledge().timeout(PATIENCE).build();
        (runtime, client.expect("a client"))
    });
    let mut body = vec![0];
    body.extend_from_slice(&(message.len() as u32).to_be_bytes());
    body.extend_from_slice(message);
    let (runtime, client) = &*CALLS;
    let url = format!("http://{}/arrow.flight.protocol.FlightService/{method}", server.grpc);
    let call = async {
        let request = client.post(url).header("content-type", "application/grpc").header("te", "trailers").body(body);
        let answer = request.send().await?;
        let header = |name| answer.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        let (code, told) = (header("grpc-status"), header("grpc-message"));
        answer.bytes().await?;
        Ok::<_, reqwest::Error>((code, told))
    };
    match runtime.block_on(call).map_err(|e| format!("no answer: {e:?}"))? {
        // gRPC's libraries answer so to what is no message.
        (_, told) if told.contains("failed%20to%20decode%20Protobuf%20message") => Ok(400),
        // Unknown and internal: nobody thought of it.
        (code, told) if ["2", "13"].contains(&code.as_str()) => Err(format!("{code} {told:.300}")),
        (code, _) => Ok(if ["", "0"].contains(&code.as_str()) { 200 } else { 400 }),
    }
}

fn targets() -> Vec<Target> {
    let now = now_ms();
    let made: Vec<_> = (0..3)
        .map(|i| series("mutated", &[("item", &i.to_string()), ("job", "j")], &[(now, 1.5), (now - 1000, f64::NAN)]))
        .collect();
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/payloads/prometheus");
    let mut recorded = Vec::new();
    for entry in std::fs::read_dir(dir).expect("the recorded requests").flatten() {
        if entry.path().extension().is_some_and(|e| e == "body") {
            recorded.push(std::fs::read(entry.path()).expect("a readable body"));
        }
    }
    let inflate = |body: &Vec<u8>| snap::raw::Decoder::new().decompress_vec(body).expect("a recorded request is right");
    let promql = texts(&[
        r#"sum by (job, instance) (rate(m{job=~"a|b", instance!="x"}[5m] offset 1m))"#,
        r#"histogram_quantile(0.9, sum by (le) (rate(m_bucket[1h:30s] @ 100)))"#,
        r#"m{a="b"} / on(a) group_left(c) n unless ignoring(d) o > bool 1e3 and -2 ^ 3 % 4"#,
        r#"label_replace(topk(3, m), "dst", "$1", "src", "(.*)") or absent_over_time(up[2d3h])"#,
    ]);
    let sql = texts(&[
        "SELECT ts, value, tags['job'] FROM samples WHERE metric = 'm' AND ts > now() - interval '1 hour' ORDER BY 1 LIMIT 5",
        "SELECT job, count(*), avg(value) FROM prometheus.mutated GROUP BY job HAVING count(*) > 1",
        "WITH a AS (SELECT 1 AS x UNION ALL SELECT 2) SELECT CASE WHEN x > 1 THEN 'a' ELSE NULL END, x::text FROM a",
        "EXPLAIN SELECT date_trunc('hour', ts), max(value) OVER (PARTITION BY tags ORDER BY ts) FROM samples",
    ]);
    let paths = texts(&[
        "/api/v1/series?match[]=m%7Ba%3D%22b%22%7D&start=0&end=1e9&limit=10",
        "/api/v1/label/job/values?match[]=m&start=2026-01-01T00:00:00Z",
        "/api/v1/query_range?query=up&start=1&end=100&step=15s&timeout=1m",
        "/api/v1/query?query=1&time=1700000000.123",
    ]);
    vec![
        Target {
            name: "remote write 1.0 on the wire",
            originals: recorded.iter().cloned().chain([snappy(&message(&made))]).collect(),
            send: |_, client, bytes| post(client, "/api/v1/write", &HEADERS, bytes),
        },
        Target {
            name: "remote write 1.0 inflated",
            originals: recorded.iter().map(inflate).chain([message(&made)]).collect(),
            send: |_, client, bytes| post(client, "/api/v1/write", &HEADERS, &snappy(bytes)),
        },
        Target {
            name: "remote write 2.0 inflated",
            originals: vec![message_v2(&made)],
            send: |_, client, bytes| post(client, "/api/v1/write", &HEADERS_V2, &snappy(bytes)),
        },
        Target {
            name: "remote write 1.0 in zstd",
            originals: vec![zstd::encode_all(&message(&made)[..], 3).expect("zstd")],
            send: |_, client, bytes| {
                let headers = HEADERS.map(|(n, v)| if n == "Content-Encoding" { (n, "zstd") } else { (n, v) });
                post(client, "/api/v1/write", &headers, bytes)
            },
        },
        Target {
            name: "remote write 2.0 on the wire",
            originals: vec![snappy(&message_v2(&made))],
            send: |_, client, bytes| post(client, "/api/v1/write", &HEADERS_V2, bytes),
        },
        Target {
            name: "remote read on the wire",
            originals: remote_reads(now).iter().map(|m| snappy(m)).collect(),
            send: |_, client, bytes| post(client, "/api/v1/read", &READ_HEADERS, bytes),
        },
        Target {
            name: "remote read inflated",
            originals: remote_reads(now),
            send: |_, client, bytes| post(client, "/api/v1/read", &READ_HEADERS, &snappy(bytes)),
        },
        Target {
            name: "Flight SQL, descriptors",
            originals: flight_descriptors(),
            send: |server, _, bytes| send_flight(server, "GetFlightInfo", bytes),
        },
        Target {
            name: "Flight SQL, tickets",
            originals: flight_tickets(),
            send: |server, _, bytes| send_flight(server, "DoGet", bytes),
        },
        Target {
            name: "Flight SQL, actions",
            originals: flight_actions(),
            send: |server, _, bytes| send_flight(server, "DoAction", bytes),
        },
        Target {
            name: "PromQL",
            originals: promql,
            send: |_, client, bytes| post(client, "/api/v1/query_range", &FORM, &form(bytes)),
        },
        Target {
            name: "SQL over HTTP",
            originals: sql,
            send: |_, client, bytes| post(client, "/api/v1/sql?format=csv", &[("Content-Type", "text/plain")], bytes),
        },
        Target {
            name: "PostgreSQL",
            originals: vec![postgres_session()],
            send: |server, _, bytes| send_postgres(server, bytes),
        },
        Target {
            name: "PostgreSQL's first messages",
            originals: first_messages(),
            send: |server, _, bytes| send_postgres(server, bytes),
        },
        Target {
            name: "parameters",
            originals: paths,
            send: |_, client, bytes| {
                // What would end the request line is no path any more.
                let path: String = bytes.iter().filter(|b| b.is_ascii_graphic()).map(|b| char::from(*b)).collect();
                let answer = client.try_get(&format!("/{}", path.trim_start_matches('/')));
                match answer {
                    Ok(answer) if answer.status >= 500 && answer.status != 503 => {
                        Err(format!("{} {:.300}", answer.status, answer.text()))
                    }
                    Ok(answer) => Ok(answer.status),
                    Err(e) => Err(format!("no answer: {e}")),
                }
            },
        },
    ]
}

#[test]
fn damaged_requests_of_every_kind_are_answered() {
    let mutations = extent("CRASH_MUTATIONS", 60);
    for seed in 0..extent("CRASH_SEEDS", 1) {
        let mut random = Random(seed);
        let server = Server::start();
        let mut faults = Vec::new();
        for target in &targets() {
            let mut client = Client::with_timeout(server.http, PATIENCE);
            // What the first requests set up once is no growth.
            for original in &target.originals {
                if let Err(fault) = (target.send)(&server, &mut client, original) {
                    faults.push(format!("{}, unharmed: {fault}", target.name));
                }
            }
            let before = memory(server.pid(), "VmRSS:");
            let (mut slowest, mut refused) = (Duration::ZERO, 0);
            for number in 0..mutations {
                let original = &target.originals[random.below(target.originals.len() as u64) as usize];
                let bytes = mutate(original, &mut random);
                let begun = Instant::now();
                match (target.send)(&server, &mut client, &bytes) {
                    Ok(status) => refused += u64::from(status >= 400),
                    Err(fault) => {
                        let shown: String = bytes.iter().take(300).map(|b| b.escape_ascii().to_string()).collect();
                        faults.push(format!("{}, seed {seed}, mutation {number}: {fault}\n    {shown}", target.name));
                    }
                }
                slowest = slowest.max(begun.elapsed());
                if Client::new(server.http).try_get("/-/healthy").is_err() {
                    panic!("{}, seed {seed}, mutation {number}: the server is gone: {}", target.name, server.log());
                }
            }
            let after = memory(server.pid(), "VmRSS:");
            let cells = [
                ("mutations", mutations.to_string()),
                ("refused", refused.to_string()),
                ("slowest", format!("{:.2} s", slowest.as_secs_f64())),
                ("growth", format!("{} MiB", after.saturating_sub(before) >> 20)),
            ];
            figures(&format!("mutations, {}", target.name), seed, &cells);
        }
        assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
    }
}
