//! Stores of cloud providers, and whatever speaks the protocol of one of them.
//!
//! An URL names the place; its query may name what differs between installations of one protocol (see [`OPTIONS`]).
//! Everything else, credentials above all, comes from the environment variables that the provider's own tools read. No
//! request can hang for ever: each has a deadline, and repeated ones an end.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::ClientConfigKey;
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ObjectStore, RetryConfig};

use crate::{Error, Result};

/// Time for a connection to come up.
const CONNECT_TIMEOUT: &str = "5s";
/// Time for one request with its answer. A store that needs half a minute for each is ridden out.
const REQUEST_TIMEOUT: &str = "60s";
/// Time after which a request is not tried again.
const RETRY_TIMEOUT: Duration = Duration::from_secs(90);
/// Times that a request is tried again.
const RETRIES_MAX: usize = 8;

/// Keys that an URL's query may hold, by protocol.
const OPTIONS: [(Protocol, &[&str]); 3] = [
    (Protocol::S3, &["endpoint", "region", "virtual_hosted_style"]),
    (Protocol::Google, &["endpoint"]),
    (Protocol::Azure, &["endpoint", "account"]),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    S3,
    Google,
    Azure,
}

impl Protocol {
    fn of(scheme: &str) -> Option<Self> {
        match scheme {
            "s3" => Some(Self::S3),
            "gs" => Some(Self::Google),
            "az" | "abfs" | "abfss" => Some(Self::Azure),
            _ => None,
        }
    }

    fn options(self) -> &'static [&'static str] {
        OPTIONS.iter().find(|(protocol, _)| *protocol == self).map_or(&[], |(_, keys)| keys)
    }
}

/// The place that an URL names.
#[derive(Debug, PartialEq)]
pub(super) struct Place<'a> {
    protocol: Protocol,
    scheme: &'a str,
    /// Bucket or container; for Azure perhaps with the account.
    authority: &'a str,
    prefix: &'a str,
    options: Vec<(&'a str, &'a str)>,
}

impl<'a> Place<'a> {
    /// `None` when the scheme is not that of a cloud's protocol.
    pub fn parse(scheme: &'a str, rest: &'a str) -> Option<Result<Self>> {
        Some(Self::of(Protocol::of(scheme)?, scheme, rest))
    }

    fn of(protocol: Protocol, scheme: &'a str, rest: &'a str) -> Result<Self> {
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, prefix) = place.split_once('/').unwrap_or((place, ""));
        let here = format!("{scheme}://{place}");
        if authority.is_empty() {
            return Err(Error::invalid(format!("object store {here:?} names no bucket")));
        }
        let prefix = prefix.trim_matches('/');
        if prefix.split('/').any(|part| part == "." || part == "..") || prefix.contains("//") {
            return Err(Error::invalid(format!(
                "object store {here:?} has a prefix with an empty part, \".\" or \"..\""
            )));
        }
        let mut options = Vec::new();
        for option in query.split('&').filter(|o| !o.is_empty()) {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            if !protocol.options().contains(&key) || value.is_empty() {
                // The value is not repeated: it could be a credential in the wrong place.
                return Err(Error::invalid(format!(
                    "object store {here:?} has option {key:?} that is unknown or empty; known are {}; credentials come \
                     from environment variables",
                    protocol.options().join(", ")
                )));
            }
            options.push((key, value));
        }
        Ok(Self { protocol, scheme, authority, prefix, options })
    }

    /// The URL without options and with a slash at its end.
    pub fn location(&self) -> String {
        let slash = if self.prefix.is_empty() { "" } else { "/" };
        format!("{}://{}/{}{slash}", self.scheme, self.authority, self.prefix)
    }

    fn option(&self, key: &str) -> Option<&'a str> {
        self.options.iter().find(|(k, _)| *k == key).map(|(_, v)| *v)
    }

    /// Makes a client of the store; nothing is asked of it yet.
    pub fn open(&self) -> Result<Arc<dyn ObjectStore>> {
        let made = match self.protocol {
            Protocol::S3 => self.s3(),
            Protocol::Google => self.google(),
            Protocol::Azure => self.azure(),
        };
        let store = made
            .map_err(|e| Error::invalid(format!("object store {:?} is not usable", self.location())).with_source(e))?;
        Ok(if self.prefix.is_empty() { store } else { Arc::new(PrefixStore::new(store, self.prefix)) })
    }

    fn s3(&self) -> object_store::Result<Arc<dyn ObjectStore>> {
        let mut settings = client(AmazonS3ConfigKey::Client);
        settings.extend(environment("AWS_"));
        if let Some(endpoint) = self.option("endpoint") {
            settings.push((AmazonS3ConfigKey::Endpoint, endpoint.to_owned()));
            settings.push((AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp), plain(endpoint)));
        }
        if let Some(region) = self.option("region") {
            settings.push((AmazonS3ConfigKey::Region, region.to_owned()));
        }
        if let Some(style) = self.option("virtual_hosted_style") {
            settings.push((AmazonS3ConfigKey::VirtualHostedStyleRequest, style.to_owned()));
        }
        let builder = settings.into_iter().fold(AmazonS3Builder::new(), |b, (k, v)| b.with_config(k, v));
        Ok(Arc::new(builder.with_retry(retries()).with_bucket_name(self.authority).build()?))
    }

    fn google(&self) -> object_store::Result<Arc<dyn ObjectStore>> {
        let mut settings = client(GoogleConfigKey::Client);
        settings.extend(environment("GOOGLE_"));
        if let Some(endpoint) = self.option("endpoint") {
            settings.push((GoogleConfigKey::BaseUrl, endpoint.to_owned()));
            settings.push((GoogleConfigKey::Client(ClientConfigKey::AllowHttp), plain(endpoint)));
        }
        let builder = settings.into_iter().fold(GoogleCloudStorageBuilder::new(), |b, (k, v)| b.with_config(k, v));
        Ok(Arc::new(builder.with_retry(retries()).with_bucket_name(self.authority).build()?))
    }

    fn azure(&self) -> object_store::Result<Arc<dyn ObjectStore>> {
        let mut settings = client(AzureConfigKey::Client);
        settings.extend(environment("AZURE_"));
        if let Some(endpoint) = self.option("endpoint") {
            settings.push((AzureConfigKey::Endpoint, endpoint.to_owned()));
            settings.push((AzureConfigKey::Client(ClientConfigKey::AllowHttp), plain(endpoint)));
        }
        if let Some(account) = self.option("account") {
            settings.push((AzureConfigKey::AccountName, account.to_owned()));
        }
        let builder = settings.into_iter().fold(MicrosoftAzureBuilder::new(), |b, (k, v)| b.with_config(k, v));
        let url = format!("{}://{}", self.scheme, self.authority);
        Ok(Arc::new(builder.with_retry(retries()).with_url(url).build()?))
    }
}

/// Whether an endpoint is reached without TLS, which whoever writes `http://` has decided.
fn plain(endpoint: &str) -> String {
    endpoint.starts_with("http://").to_string()
}

/// Deadlines; variables such as `AWS_TIMEOUT` come after them and win.
fn client<K>(key: impl Fn(ClientConfigKey) -> K) -> Vec<(K, String)> {
    vec![
        (key(ClientConfigKey::ConnectTimeout), CONNECT_TIMEOUT.to_owned()),
        (key(ClientConfigKey::Timeout), REQUEST_TIMEOUT.to_owned()),
    ]
}

/// The variables of a provider that the library knows, in a fixed order.
fn environment<K: std::str::FromStr>(prefix: &str) -> Vec<(K, String)> {
    let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    let mut variables: Vec<(String, String)> = std::env::vars_os().filter_map(text).collect();
    variables.sort_unstable();
    variables.retain(|(name, value)| name.starts_with(prefix) && !value.is_empty());
    variables.into_iter().filter_map(|(name, value)| Some((name.to_ascii_lowercase().parse().ok()?, value))).collect()
}

fn retries() -> RetryConfig {
    let backoff =
        BackoffConfig { init_backoff: Duration::from_millis(100), max_backoff: Duration::from_secs(5), base: 2.0 };
    RetryConfig { backoff, max_retries: RETRIES_MAX, retry_timeout: RETRY_TIMEOUT }
}
