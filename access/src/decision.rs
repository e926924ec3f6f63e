//! The decision about a request: who asks, and whether that one may.

use std::collections::HashSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use axum::http::{HeaderMap, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use ring::hmac;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::credentials::{SECRET_BYTES_MAX, Sha256, User};
use crate::scram::Verifier;
use crate::throttle::Throttle;
use crate::{Credentials, Peer, Scope, Scopes};

/// Passwords that are checked at a time: each takes a processor for 20 ms and 19 MiB.
const CHECKS_MAX: usize = 2;
/// Passwords that wait for their check; more are told to come back.
const WAITING_MAX: usize = 64;
/// Passwords that are remembered as right, so that only the first request of a client waits.
const VERIFIED_MAX: usize = 1024;
/// The least time between two lines of the log about denials.
const LOG_INTERVAL: Duration = Duration::from_secs(1);
/// Of what was asked for a line says so much.
const WHAT_BYTES_MAX: usize = 256;

/// How many requests were denied, by reason.
pub type DeniedTotal = Family<Vec<(&'static str, &'static str)>, Counter>;

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    name: String,
    scopes: Scopes,
    /// Whether credentials were shown.
    known: bool,
}

impl Caller {
    /// The name of the token or user; `anonymous` without one.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether a route that needs `scope` is allowed.
    pub fn may(&self, scope: Scope) -> bool {
        self.scopes.allow(scope)
    }

    /// Whether this is somebody whose credentials were checked: where none are asked for, everybody may do everything, but
    /// nobody is known.
    pub fn is_known(&self) -> bool {
        self.known
    }

    fn anonymous(scopes: Scopes) -> Self {
        Self { name: "anonymous".to_owned(), scopes, known: false }
    }
}

/// Why a request is denied. The texts go to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// Nothing was presented.
    Missing,
    /// What was presented is nobody's.
    Wrong,
    /// The caller lacks this scope.
    Scope(Scope),
    /// The address failed too often; it is to come back after so many seconds.
    Throttled(u32),
    /// A page in a browser asks for a change.
    Origin,
    /// Too many passwords are being checked.
    Busy,
}

impl Denied {
    fn reason(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Wrong => "wrong",
            Self::Scope(_) => "scope",
            Self::Throttled(_) => "throttled",
            Self::Origin => "origin",
            Self::Busy => "busy",
        }
    }
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("credentials are needed: a bearer token, or a user and a password"),
            Self::Wrong => f.write_str("the credentials are not known"),
            Self::Scope(scope) => write!(f, "the credentials lack the scope {scope:?}", scope = scope.name()),
            Self::Throttled(seconds) => write!(f, "too many failed attempts from this address; wait {seconds} s"),
            Self::Origin => f.write_str("requests of web pages (with an Origin header) can't send or change anything"),
            Self::Busy => f.write_str("too many passwords are being checked; try again"),
        }
    }
}

/// What decides; cheap to clone.
#[derive(Debug, Clone)]
pub struct Access(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// None where nobody is asked for credentials.
    loaded: ArcSwapOption<Loaded>,
    /// Makes remembered passwords useless outside of this process.
    key: hmac::Key,
    throttle: Throttle,
    checks: Arc<Semaphore>,
    waiting: Semaphore,
    denied: DeniedTotal,
    /// When the last line about a denial was written, and how many were not written since.
    logged: Mutex<(Option<Instant>, u64)>,
}

/// Credentials, with what was found out about them; a reload forgets it.
#[derive(Debug)]
struct Loaded {
    credentials: Credentials,
    verified: Mutex<HashSet<Sha256>>,
}

/// What a client presents.
enum Presented<'a> {
    Token(&'a str),
    Password { user: &'a str, password: &'a str },
}

impl Access {
    /// Nobody is asked who they are.
    pub fn open() -> Self {
        Self::new(None)
    }

    /// Everybody is asked for one of these credentials, except on public routes.
    pub fn with(credentials: Credentials) -> Self {
        Self::new(Some(credentials))
    }

    fn new(credentials: Option<Credentials>) -> Self {
        let mut key = Sha256::default();
        // Without randomness passwords are remembered under a key that others could know; the hash is still one.
        let _ = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut key);
        Self(Arc::new(Inner {
            loaded: ArcSwapOption::from(credentials.map(Loaded::new)),
            key: hmac::Key::new(hmac::HMAC_SHA256, &key),
            throttle: Throttle::default(),
            checks: Arc::new(Semaphore::new(CHECKS_MAX)),
            waiting: Semaphore::new(WAITING_MAX),
            denied: DeniedTotal::default(),
            logged: Mutex::default(),
        }))
    }

    /// Takes other credentials from the next request on.
    pub fn replace(&self, credentials: Credentials) {
        self.0.loaded.store(Some(Loaded::new(credentials)));
    }

    /// Whether clients are asked who they are.
    pub fn asks(&self) -> bool {
        self.0.loaded.load().is_some()
    }

    /// The counter of denials, to be registered once.
    pub fn denied(&self) -> DeniedTotal {
        self.0.denied.clone()
    }

    pub(crate) fn knows_users(&self) -> bool {
        self.0.loaded.load().as_ref().is_some_and(|l| l.credentials.some_user().is_some())
    }

    /// Decides about an HTTP request.
    ///
    /// # Errors
    /// The reason why not.
    pub async fn check(&self, scope: Scope, headers: &HeaderMap, peer: Option<Peer>) -> Result<Caller, Denied> {
        if scope == Scope::Public {
            return Ok(Caller::anonymous(Scopes::default()));
        }
        // A browser adds the credentials that it remembers, or reaches a server that asks for none, on behalf of any
        // page that it shows. It says so with this header whenever a page can cause a change.
        if scope != Scope::Read && headers.contains_key(header::ORIGIN) {
            return Err(Denied::Origin);
        }
        let Some(loaded) = self.0.loaded.load_full() else {
            return Ok(Caller::anonymous(Scopes::default().with(Scope::Admin)));
        };
        let mut all = headers.get_all(header::AUTHORIZATION).iter();
        let (value, more) = (all.next().ok_or(Denied::Missing)?, all.next());
        // Two headers could be read differently by a proxy and by us.
        let value = value.to_str().ok().filter(|_| more.is_none());
        let (scheme, rest) = value.and_then(|v| v.trim().split_once(' ')).ok_or(Denied::Wrong)?;
        let rest = rest.trim();
        let caller = if scheme.eq_ignore_ascii_case("bearer") {
            self.identify(&loaded, Presented::Token(rest), peer).await?
        } else if scheme.eq_ignore_ascii_case("basic") {
            // Clients of Arrow Flight leave the padding out.
            let decoded = STANDARD_NO_PAD.decode(rest.trim_end_matches('='));
            let decoded = decoded.ok().and_then(|bytes| String::from_utf8(bytes).ok());
            let decoded = decoded.map(catalog::Secret::new).ok_or(Denied::Wrong)?;
            let (user, password) = decoded.expose().split_once(':').ok_or(Denied::Wrong)?;
            self.identify(&loaded, Presented::Password { user, password }, peer).await?
        } else {
            return Err(Denied::Wrong);
        };
        if caller.scopes.allow(scope) { Ok(caller) } else { Err(Denied::Scope(scope)) }
    }

    /// Decides about a client of another protocol, which sends a name and a password; instead of the password of a user
    /// it may be a token with the token's name.
    ///
    /// # Errors
    /// The reason why not.
    pub async fn log_in(&self, scope: Scope, user: &str, password: &str, peer: IpAddr) -> Result<Caller, Denied> {
        let Some(loaded) = self.0.loaded.load_full() else {
            return Ok(Caller::anonymous(Scopes::default().with(Scope::Admin)));
        };
        let named = loaded.credentials.token(password).filter(|t| t.name == user);
        let presented = match named {
            Some(_) => Presented::Token(password),
            None => Presented::Password { user, password },
        };
        let caller = self.identify(&loaded, presented, Some(Peer(peer))).await?;
        if caller.scopes.allow(scope) { Ok(caller) } else { Err(Denied::Scope(scope)) }
    }

    async fn identify(&self, loaded: &Loaded, presented: Presented<'_>, peer: Option<Peer>) -> Result<Caller, Denied> {
        let found = match presented {
            Presented::Token(token) => {
                let token = Some(token).filter(|t| t.len() <= SECRET_BYTES_MAX);
                let found = token.and_then(|t| loaded.credentials.token(t));
                // A right token passes from an address that guesses, too: tokens can't be guessed.
                found.map(|t| Caller { name: t.name.clone(), scopes: t.scopes, known: true })
            }
            Presented::Password { user, password } => self.password(loaded, user, password, peer).await?,
        };
        found.ok_or_else(|| {
            let wait = peer.and_then(|p| self.0.throttle.wait(p.0));
            if let (None, Some(peer)) = (wait, peer) {
                self.0.throttle.failed(peer.0);
            }
            wait.map_or(Denied::Wrong, Denied::Throttled)
        })
    }

    /// The user with this password, if it is right.
    async fn password(
        &self,
        loaded: &Loaded,
        name: &str,
        password: &str,
        peer: Option<Peer>,
    ) -> Result<Option<Caller>, Denied> {
        if name.len() + password.len() > 2 * SECRET_BYTES_MAX {
            return Ok(None);
        }
        let user = loaded.credentials.user(name);
        let caller = || user.map(|u| Caller { name: u.name.clone(), scopes: u.scopes, known: true });
        let remembered = self.remembered(name, password);
        let is_verified = || loaded.verified.lock().contains(&remembered);
        if is_verified() {
            return Ok(caller());
        }
        if let Some(seconds) = peer.and_then(|p| self.0.throttle.wait(p.0)) {
            return Err(Denied::Throttled(seconds));
        }
        let Some(hash) = user.or(loaded.credentials.some_user()).cloned() else { return Ok(None) };
        let right = {
            let _place = self.0.waiting.try_acquire().map_err(|_| Denied::Busy)?;
            let check = Arc::clone(&self.0.checks).acquire_owned().await.map_err(|_| Denied::Busy)?;
            // The requests of a client that come together all wait for the first one's check, no more.
            if is_verified() {
                return Ok(caller());
            }
            // A client that goes away must not make room for another check while its own runs on.
            verify(hash, password, check).await
        };
        if !right || user.is_none() {
            return Ok(None);
        }
        let mut verified = loaded.verified.lock();
        if verified.len() >= VERIFIED_MAX {
            verified.clear();
        }
        verified.insert(remembered);
        Ok(caller())
    }

    /// Who has this name, with the verifier of a user that has one.
    pub(crate) fn entry(&self, name: &str) -> Option<(Option<Verifier>, Caller)> {
        let loaded = self.0.loaded.load_full()?;
        let user = loaded.credentials.user(name).map(|u| (u.scram.clone(), u.name.clone(), u.scopes));
        let token = || loaded.credentials.named_token(name).map(|t| (None, t.name.clone(), t.scopes));
        user.or_else(token).map(|(verifier, name, scopes)| (verifier, Caller { name, scopes, known: true }))
    }

    /// Bytes that only this process can make out of these.
    pub(crate) fn keyed(&self, bytes: &[u8]) -> Sha256 {
        let mut out = Sha256::default();
        out.copy_from_slice(hmac::sign(&self.0.key, bytes).as_ref());
        out
    }

    /// Seconds that an address must wait, if it must.
    pub(crate) fn wait(&self, peer: IpAddr) -> Option<u32> {
        self.0.throttle.wait(peer)
    }

    /// Counts a failure of an address.
    pub(crate) fn failed(&self, peer: IpAddr) {
        self.0.throttle.failed(peer);
    }

    /// Whether a caller may do this.
    pub(crate) fn permit(&self, caller: &Caller, scope: Scope) -> Result<(), Denied> {
        if caller.scopes.allow(scope) { Ok(()) } else { Err(Denied::Scope(scope)) }
    }

    /// What stands for a name and its password in memory.
    fn remembered(&self, name: &str, password: &str) -> Sha256 {
        let mut context = hmac::Context::with_key(&self.0.key);
        context.update(&(name.len() as u64).to_le_bytes());
        context.update(name.as_bytes());
        context.update(password.as_bytes());
        let mut out = Sha256::default();
        out.copy_from_slice(context.sign().as_ref());
        out
    }

    /// Counts a denial, and writes a line about it unless one was written just before.
    pub fn count(&self, denied: Denied, peer: Option<Peer>, what: &str) {
        self.0.denied.get_or_create(&vec![("reason", denied.reason())]).inc();
        let suppressed = {
            let (mut logged, now) = (self.0.logged.lock(), Instant::now());
            if logged.0.is_some_and(|last| now - last < LOG_INTERVAL) {
                logged.1 += 1;
                return;
            }
            std::mem::replace(&mut *logged, (Some(now), 0)).1
        };
        let peer = peer.map(|p| p.0.to_string()).unwrap_or_default();
        // Who is not let in must not fill the log.
        let what = &what[..what.floor_char_boundary(WHAT_BYTES_MAX)];
        tracing::info!(reason = denied.reason(), peer, what, suppressed, "access denied");
    }
}

async fn verify(user: User, password: &str, check: tokio::sync::OwnedSemaphorePermit) -> bool {
    let password = catalog::Secret::new(password);
    let work = move || {
        let right = user.has_password(password.expose());
        drop(check);
        right
    };
    tokio::task::spawn_blocking(work).await.unwrap_or(false)
}

impl Loaded {
    fn new(credentials: Credentials) -> Arc<Self> {
        Arc::new(Self { credentials, verified: Mutex::default() })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::credentials::tests::{FILE, PASSWORD, READER, WRITER};

    pub fn base64(text: &str) -> String {
        base64::engine::general_purpose::STANDARD.encode(text)
    }

    fn access() -> Access {
        Access::with(Credentials::parse(FILE).unwrap())
    }

    const PEER: Option<Peer> = Some(Peer(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1))));

    async fn ask(access: &Access, scope: Scope, authorization: &[&str]) -> Result<String, Denied> {
        let mut headers = HeaderMap::new();
        for value in authorization {
            headers.append(header::AUTHORIZATION, value.parse().unwrap());
        }
        access.check(scope, &headers, PEER).await.map(|c| c.name)
    }

    #[tokio::test]
    async fn callers_are_found_by_what_they_present() {
        let access = access();
        let (bearer, root) = (format!("Bearer {READER}"), base64(&format!("root:{PASSWORD}")));
        let check = async |authorization: &[&str], expected: Result<&str, Denied>| {
            let found = ask(&access, Scope::Read, authorization).await;
            assert_eq!(found.as_deref().map_err(|d| *d), expected, "{authorization:?}");
        };
        check(&[], Err(Denied::Missing)).await;
        check(&[&bearer], Ok("reader")).await;
        check(&[&bearer.replace("Bearer", "BEARER ")], Ok("reader")).await;
        check(&[&bearer, &bearer], Err(Denied::Wrong)).await;
        check(&[&format!("Bearer {WRITER}")], Err(Denied::Scope(Scope::Read))).await;
        check(&[&format!("Basic {root}")], Ok("root")).await;
        check(&[&format!("Basic {}", root.trim_end_matches('='))], Ok("root")).await;
        check(&[&format!("Basic {}", base64("root:x"))], Err(Denied::Wrong)).await;
        check(&[&format!("Basic {}", base64(&format!("ghost:{PASSWORD}")))], Err(Denied::Wrong)).await;
        check(&[&format!("Basic {}", base64("root"))], Err(Denied::Wrong)).await;
        for malformed in ["", "Bearer", "Bearer ", "Basic", "Basic %", "Basic /w==", "Digest x", READER] {
            check(&[malformed], Err(Denied::Wrong)).await;
        }
        // A token is not a password over HTTP, and no password is a token.
        check(&[&format!("Basic {}", base64(&format!("reader:{READER}")))], Err(Denied::Wrong)).await;
        check(&[&format!("Bearer {PASSWORD}")], Err(Denied::Wrong)).await;
    }

    #[tokio::test]
    async fn other_protocols_take_names_with_passwords_or_tokens() {
        let access = access();
        let peer = IpAddr::from([192, 0, 2, 1]);
        let check = async |user: &str, password: &str, expected: Result<&str, Denied>| {
            let found = access.log_in(Scope::Read, user, password, peer).await;
            assert_eq!(found.as_ref().map(Caller::name).map_err(|d| *d), expected, "{user}");
        };
        check("root", PASSWORD, Ok("root")).await;
        check("reader", READER, Ok("reader")).await;
        check("root", READER, Err(Denied::Wrong)).await;
        check("reader", "", Err(Denied::Wrong)).await;
        check("writer", WRITER, Err(Denied::Scope(Scope::Read))).await;
        assert_eq!(Access::open().log_in(Scope::Read, "x", "", peer).await.unwrap().name(), "anonymous");
    }

    #[tokio::test]
    async fn addresses_that_guess_wait_and_right_ones_pass() {
        let access = access();
        let right = format!("Basic {}", base64(&format!("root:{PASSWORD}")));
        let mut throttled = 0;
        for n in 0..20 {
            let guess = ask(&access, Scope::Read, &[&format!("Bearer {n}")]).await;
            throttled += usize::from(matches!(guess, Err(Denied::Throttled(_))));
        }
        assert_eq!(throttled, 9, "ten failures are free, and the eleventh begins the wait");
        // A password that was never right before is not even looked at, and no sooner is it remembered than it passes.
        assert!(matches!(ask(&access, Scope::Read, &[&right]).await, Err(Denied::Throttled(_))));
        let other = Some(Peer(IpAddr::from([192, 0, 2, 2])));
        let headers = HeaderMap::from_iter([(header::AUTHORIZATION, right.parse().unwrap())]);
        assert!(access.check(Scope::Read, &headers, other).await.is_ok());
        assert_eq!(ask(&access, Scope::Read, &[&right]).await.as_deref(), Ok("root"));
        assert_eq!(ask(&access, Scope::Read, &[&format!("Bearer {READER}")]).await.as_deref(), Ok("reader"));
    }

    #[tokio::test]
    async fn a_reload_counts_at_once() {
        let access = access();
        let right = format!("Basic {}", base64(&format!("root:{PASSWORD}")));
        assert!(ask(&access, Scope::Admin, &[&right]).await.is_ok());
        let (tokens, _) = FILE.split_once("[[user]]").unwrap();
        access.replace(Credentials::parse(tokens).unwrap());
        assert_eq!(ask(&access, Scope::Admin, &[&right]).await, Err(Denied::Wrong));
        assert!(ask(&access, Scope::Read, &[&format!("Bearer {READER}")]).await.is_ok());
        assert!(!access.knows_users());
    }

    #[test]
    fn nothing_secret_is_printed() {
        let access = access();
        let text = format!("{access:?}");
        assert!(!text.contains(PASSWORD) && !text.contains(READER), "{text}");
    }
}
