//! TLS of the listeners: certificate, key and, for clients that must show a certificate, their authority.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use arc_swap::ArcSwap;
use rustls::crypto::ring::default_provider;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::config::Config;

/// A client that has not agreed on keys after this long is a fault or an attack.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// What encrypts connections. New ones use what was loaded last.
#[derive(Debug)]
pub struct Tls {
    files: Files,
    current: ArcSwap<ServerConfig>,
}

/// The files that decide.
#[derive(Debug)]
pub struct Files {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

impl Tls {
    /// Loads the files.
    ///
    /// # Errors
    /// Files that can't be read or don't fit each other.
    pub fn open(files: Files) -> Result<Self> {
        let current = ArcSwap::from_pointee(files.load()?);
        Ok(Self { files, current })
    }

    /// Reads the files again. What was loaded before stays in use when they are broken.
    ///
    /// # Errors
    /// As [`Tls::open`].
    pub fn reload(&self) -> Result<()> {
        self.current.store(Arc::new(self.files.load()?));
        Ok(())
    }

    /// What agrees on keys with a client of the PostgreSQL protocol.
    pub fn postgres(&self) -> TlsAcceptor {
        let mut config = ServerConfig::clone(&self.current.load());
        config.alpn_protocols = vec![b"postgresql".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }

    /// Agrees on keys with a client.
    ///
    /// # Errors
    /// A client that speaks no TLS, shows no certificate where it must, or takes too long.
    pub async fn accept(&self, stream: TcpStream) -> Result<TlsStream<TcpStream>> {
        let handshake = TlsAcceptor::from(self.current.load_full()).accept(stream);
        Ok(tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await.context("no handshake in time")??)
    }
}

impl Files {
    /// What the settings say; none without `tls_cert`.
    ///
    /// # Errors
    /// Settings of which one needs another that is missing.
    pub fn of(config: &Config) -> Result<Option<Self>> {
        let path = |text: &String| Some(PathBuf::from(text)).filter(|_| !text.is_empty());
        match (path(&config.tls_cert), path(&config.tls_key), path(&config.tls_client_ca)) {
            (Some(certificate), Some(key), client_ca) => Ok(Some(Self { certificate, key, client_ca })),
            (None, None, None) => Ok(None),
            (None, None, Some(_)) => bail!("tls_client_ca needs tls_cert and tls_key"),
            _ => bail!("tls_cert and tls_key need each other"),
        }
    }

    /// Where they are.
    pub fn paths(&self) -> Vec<PathBuf> {
        let Self { certificate, key, client_ca } = self;
        [certificate, key].into_iter().chain(client_ca).cloned().collect()
    }

    fn load(&self) -> Result<ServerConfig> {
        let chain = certificates(&self.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .with_context(|| format!("cannot read the private key in {}", self.key.display()))?;
        let provider = Arc::new(default_provider());
        let builder =
            ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(path)? {
                    let added = roots.add(certificate);
                    added.with_context(|| format!("{} holds no authority's certificate", path.display()))?;
                }
                builder.with_client_cert_verifier(
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?,
                )
            }
        };
        let mut config = builder.with_single_cert(chain, key).with_context(|| {
            format!("certificate {} and key {} can't be used", self.certificate.display(), self.key.display())
        })?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

fn certificates(path: &PathBuf) -> Result<Vec<CertificateDer<'static>>> {
    let unreadable = || format!("cannot read certificates in {}", path.display());
    let all = CertificateDer::pem_file_iter(path).with_context(unreadable)?;
    let all: Vec<_> = all.collect::<Result<_, _>>().with_context(unreadable)?;
    ensure!(!all.is_empty(), "{} holds no certificate in PEM form", path.display());
    Ok(all)
}
