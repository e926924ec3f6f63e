//! How subcommands reach a running server: its address, the token they show, and whom they trust.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use catalog::{Error, Secret};
use clap::Args;
use reqwest::redirect::Policy;
use reqwest::{Certificate, Client, ClientBuilder, Identity, Method, RequestBuilder, Url};

/// A server and how to be let in.
#[derive(Debug, Args)]
pub struct Server {
    /// The server's HTTP address.
    #[arg(long, env = "THALWEG_SERVER", default_value = "http://127.0.0.1:7300", value_name = "URL")]
    server: String,
    /// Token to show, or better file:PATH of one: what stands on a command line can be seen by everybody on the machine.
    #[arg(long, env = "THALWEG_TOKEN", hide_env_values = true, value_parser = token, value_name = "TOKEN")]
    token: Option<Secret>,
    /// PEM file with the certificates of authorities to trust, besides those of the system.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// PEM file with the client's certificate and its private key.
    #[arg(long, value_name = "FILE")]
    client_cert: Option<PathBuf>,
}

impl Server {
    /// A request for a path, with the token.
    ///
    /// # Errors
    /// As [`Server::url`] and [`Server::client`].
    pub fn request(&self, method: Method, path: &str) -> Result<RequestBuilder> {
        let request = self.client()?.request(method, self.url(path)?);
        Ok(match self.token() {
            Some(token) => request.bearer_auth(token.expose()),
            None => request,
        })
    }

    /// The token, if there is one.
    pub fn token(&self) -> Option<&Secret> {
        self.token.as_ref().filter(|t| !t.is_empty())
    }

    /// The URL of a path.
    ///
    /// # Errors
    /// An address that is none.
    pub fn url(&self, path: &str) -> Result<Url> {
        // Not quoted: an address can hold a password by mistake.
        let Ok(url) = Url::parse(&format!("{}{path}", self.server.trim_end_matches('/'))) else {
            bail!("the server's address is no URL; it must be of the form http://host:port or https://host:port");
        };
        if !["http", "https"].contains(&url.scheme()) {
            bail!("the server's address must begin with http:// or https://");
        }
        Ok(url)
    }

    /// The address as messages show it.
    pub fn address(&self) -> String {
        Url::parse(&self.server).map_or_else(|_| "the address given".to_owned(), |u| u.origin().ascii_serialization())
    }

    /// A client that trusts whom it should.
    ///
    /// # Errors
    /// Files that can't be read or hold no certificates.
    pub fn client(&self) -> Result<Client> {
        let mut builder = self.builder()?;
        if let Some(path) = &self.client_cert {
            let identity = Identity::from_pem(&read(path)?);
            builder = builder.identity(identity.context("the --client-cert file is not a certificate with its key")?);
        }
        Ok(builder.build()?)
    }

    /// What a client of any server begins with: the authorities to trust.
    ///
    /// # Errors
    /// Files that can't be read or hold no certificates.
    pub fn builder(&self) -> Result<ClientBuilder> {
        // A token is for this server alone: neither a proxy nor another server that it points to may see it.
        let mut builder = Client::builder().no_proxy().redirect(Policy::none()).use_rustls_tls();
        if let Some(path) = &self.ca {
            for certificate in Certificate::from_pem_bundle(&read(path)?).context("the --ca file is not PEM")? {
                builder = builder.add_root_certificate(certificate);
            }
        }
        Ok(builder)
    }
}

/// Reads a token: the text itself, or `file:PATH` for one that stands in a file.
///
/// # Errors
/// Those of [`Secret::parse`], and a file that holds something else as well, such as all that `token new` prints.
pub fn token(text: &str) -> catalog::Result<Secret> {
    let token = Secret::parse(text)?;
    match text.strip_prefix("file:") {
        Some(path) if token.expose().contains(char::is_control) => {
            Err(Error::invalid(format!("secret file {path:?} must hold the token alone, on one line")))
        }
        _ => Ok(token),
    }
}

fn read(path: &PathBuf) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_stands_alone_in_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let text = format!("file:{}", path.display());
        let check = |content: &str, expected: Option<&str>| {
            std::fs::write(&path, content).unwrap();
            match (token(&text), expected) {
                (Ok(token), Some(expected)) => assert_eq!(token.expose(), expected),
                (Err(e), None) => {
                    let said = e.to_string();
                    assert!(said.contains(path.to_str().unwrap()) && said.contains("the token alone"), "{said}");
                    assert!(!said.contains("canary"), "{said}");
                }
                (read, expected) => panic!("{content:?}: {read:?}, not {expected:?}"),
            }
        };
        check("canary", Some("canary"));
        check("canary\r\n", Some("canary"));
        check("canary\n\n[[token]]\nname = \"a\"\n", None);
        check("canary\tcanary", None);
        assert_eq!(token("canary").unwrap().expose(), "canary");
    }
}
