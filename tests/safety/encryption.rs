//! TLS as `curl` and our own client see it: who is trusted, certificates that change, clients that must show one.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

use super::{READER, auth_file, bearer, thalweg, write};
use crate::harness::{Process, free_port, program, wait_for};

/// An authority and what it signs.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.distinguished_name.push(DnType::CommonName, "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate for this machine, and its key.
    fn sign(&self) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).expect("parameters");
        // A certificate with its authority's name would be taken for one that signed itself.
        params.distinguished_name.push(DnType::CommonName, "machine");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }
}

/// A server with TLS; the harness's own client speaks none.
struct Encrypted {
    address: SocketAddr,
    postgres: String,
    dir: TempDir,
    _server: Process,
}

impl Encrypted {
    fn start(authority: &Authority, client_ca: Option<&Authority>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folder = dir.path();
        let (certificate, key) = authority.sign();
        let (certificate, key) = (write(folder, "cert.pem", &certificate), write(folder, "key.pem", &key));
        write(folder, "ca.pem", &authority.pem);
        let auth = write(folder, "auth.toml", &auth_file());
        let mut settings = format!("tls_cert = '{certificate}'\ntls_key = '{key}'\nauth_file = '{auth}'\n");
        if let Some(client_ca) = client_ca {
            settings += &format!("tls_client_ca = '{}'\n", write(folder, "client-ca.pem", &client_ca.pem));
            let (certificate, key) = client_ca.sign();
            write(folder, "client.pem", &format!("{certificate}{key}"));
        }
        let config = write(folder, "thalweg.toml", &settings);
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let (http, grpc) = (address.to_string(), format!("127.0.0.1:{}", free_port()));
        let data = folder.join("data").display().to_string();
        let arguments = ["serve", "--config", &config, "--data-dir", &data, "--http", &http, "--grpc", &grpc];
        let postgres = format!("127.0.0.1:{}", free_port());
        let arguments = arguments.into_iter().chain(["--postgres", &postgres]);
        let server = Process::start(Path::new(env!("CARGO_BIN_EXE_thalweg")), arguments, &folder.join("log"));
        let encrypted = Self { address, postgres, dir, _server: server };
        wait_for("readiness", || encrypted.curl("/-/ready", &encrypted.identity()).status.success().then_some(()));
        encrypted
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// What `curl` needs to be let in.
    fn identity(&self) -> Vec<String> {
        let client = self.path("client.pem");
        if Path::new(&client).exists() { vec!["--cert".to_owned(), client] } else { Vec::new() }
    }

    fn curl(&self, path: &str, arguments: &[String]) -> Output {
        Command::new("curl")
            .args(["--silent", "--show-error", "--fail", "--noproxy", "*", "--cacert", &self.path("ca.pem")])
            .args(arguments)
            .arg(format!("https://{}{path}", self.address))
            .output()
            .expect("curl runs")
    }
}

fn args(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|a| (*a).to_owned()).collect()
}

#[test]
fn answers_are_encrypted_and_certificates_change() {
    if program("curl").is_none() {
        return;
    }
    let authority = Authority::new();
    let server = Encrypted::start(&authority, None);
    let header = format!("Authorization: {}", bearer(READER));
    let asked = |arguments: &[&str]| server.curl("/metrics", &args(arguments));
    assert!(asked(&["--header", &header]).status.success());
    assert!(asked(&["--header", &header, "--http1.1"]).status.success());
    assert!(!asked(&[]).status.success(), "credentials are needed over TLS, too");
    assert!(!asked(&["--header", &header, "--tls-max", "1.1"]).status.success());
    let version = server.curl("/-/ready", &args(&["--output", "/dev/null", "--write-out", "%{http_version}"]));
    assert_eq!(String::from_utf8_lossy(&version.stdout), "2");
    let plain = Command::new("curl").args(["--silent", &format!("http://{}/-/ready", server.address)]).output();
    assert!(!plain.expect("curl runs").status.success(), "the port answers without TLS");

    // Our own client.
    let (url, ca, token) = (format!("https://{}", server.address), server.path("ca.pem"), READER);
    let query = ["query", "promql", "1+1", "--server", &url];
    let with_ca = [&query[..], &["--ca", &ca]].concat();
    let answer = thalweg(&with_ca, &[("THALWEG_TOKEN", token)]);
    assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
    let refused = thalweg(&with_ca, &[]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("credentials are needed"));
    let untrusted = thalweg(&query, &[("THALWEG_TOKEN", token)]);
    assert!(String::from_utf8_lossy(&untrusted.stderr).contains("cannot reach a server"));

    // A certificate of another authority takes the place of the first, and what is no certificate does not.
    let other = Authority::new();
    let (certificate, key) = other.sign();
    write(server.dir.path(), "key.pem", &key);
    write(server.dir.path(), "cert.pem", &certificate);
    write(server.dir.path(), "ca.pem", &other.pem);
    wait_for("the other certificate", || server.curl("/-/ready", &[]).status.success().then_some(()));
    write(server.dir.path(), "cert.pem", "nothing");
    wait_for("the failure", || {
        let metrics = asked(&["--header", &header]);
        let text = String::from_utf8_lossy(&metrics.stdout).into_owned();
        text.contains("thalweg_reload_failed{what=\"tls\"} 1").then_some(())
    });
}

#[test]
fn clients_without_a_certificate_are_not_heard() {
    if program("curl").is_none() {
        return;
    }
    let (authority, clients) = (Authority::new(), Authority::new());
    let server = Encrypted::start(&authority, Some(&clients));
    assert!(server.curl("/-/ready", &server.identity()).status.success());
    assert!(!server.curl("/-/ready", &[]).status.success(), "a client without a certificate was answered");
    // One that somebody else signed.
    let (certificate, key) = authority.sign();
    let stranger = write(server.dir.path(), "stranger.pem", &format!("{certificate}{key}"));
    assert!(!server.curl("/-/ready", &args(&["--cert", &stranger])).status.success());
    // A certificate lets in; credentials allow.
    assert!(!server.curl("/metrics", &server.identity()).status.success());
    let header = ["--header".to_owned(), format!("Authorization: {}", bearer(READER))];
    assert!(server.curl("/metrics", &[&server.identity()[..], &header].concat()).status.success());
    let url = format!("https://{}", server.address);
    let (ca, client) = (server.path("ca.pem"), server.path("client.pem"));
    let query = ["query", "sql", "SELECT 1", "--server", &url, "--ca", &ca, "--client-cert", &client];
    let answer = thalweg(&query, &[("THALWEG_TOKEN", READER)]);
    assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
    // Nor does a PostgreSQL client get around it without TLS.
    let Some(psql) = program("psql") else { return };
    let url = format!("postgres://reader@{}/thalweg?sslmode=disable", server.postgres);
    let mut command = Command::new(&psql);
    command.args(["-w", "-X", "-c", "SELECT 1", &url]).env("PGPASSWORD", READER);
    let asked = command.output().expect("psql runs");
    let said = String::from_utf8_lossy(&asked.stderr);
    assert!(!asked.status.success() && said.contains("only takes connections with TLS"), "{said}");
}
