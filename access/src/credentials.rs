//! The file of credentials: tokens and users with their scopes, as hashes.
//!
//! ```toml
//! [[token]]
//! name = "prometheus"     # what logs call it
//! sha256 = "..."          # of the token, 64 hex digits
//! scopes = ["write"]      # read, write, admin
//!
//! [[user]]
//! name = "alice"
//! argon2 = "$argon2id$v=19$m=19456,t=2,p=1$..."
//! scram = "SCRAM-SHA-256$4096:..."     # for PostgreSQL clients
//! scopes = ["read"]
//! ```
//!
//! A token is random, so a plain hash keeps it safe and costs nothing to compare; a password is not, so its hash is
//! slow. Neither can be had back from the file. Messages name entries and never quote what stands in them, because what
//! stands there by mistake may be the secret itself.

use std::collections::HashSet;

use argon2::password_hash::rand_core::OsRng;
use argon2::password_hash::{PasswordHash, PasswordHasher as _, PasswordVerifier as _, SaltString};
use argon2::{Argon2, Params};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use catalog::{Error, Result, Secret};
use subtle::ConstantTimeEq as _;
use toml::de::{DeTable, DeValue};

use crate::scram::Verifier;
use crate::{Scope, Scopes};

/// Most entries: every token is compared for every request.
const ENTRIES_MAX: usize = 1000;
/// The shortest token that is hashed: 128 bits in hex.
const TOKEN_BYTES_MIN: usize = 32;
/// The longest token or password that is looked at.
pub(crate) const SECRET_BYTES_MAX: usize = 1024;
/// Most memory that checking a password may take, in KiB.
const ARGON2_KIB_MAX: u32 = 256 << 10;
/// Most passes over it.
const ARGON2_PASSES_MAX: u32 = 16;
/// What tokens begin with, so that scanners for leaked secrets know them.
const TOKEN_PREFIX: &str = "thw_";

/// SHA-256.
pub(crate) type Sha256 = [u8; 32];

/// Who may do what.
#[derive(Debug)]
pub struct Credentials {
    tokens: Vec<Token>,
    users: Vec<User>,
}

#[derive(Debug)]
pub(crate) struct Token {
    pub name: String,
    sha256: Sha256,
    pub scopes: Scopes,
}

#[derive(Debug, Clone)]
pub(crate) struct User {
    pub name: String,
    argon2: String,
    pub scram: Option<Verifier>,
    pub scopes: Scopes,
}

impl User {
    /// Whether this is the user's password. Takes some 20 ms of processor time, by design.
    pub fn has_password(&self, password: &str) -> bool {
        let hash = PasswordHash::new(&self.argon2);
        hash.is_ok_and(|hash| Argon2::default().verify_password(password.as_bytes(), &hash).is_ok())
    }
}

impl Credentials {
    /// Reads a file.
    ///
    /// # Errors
    /// `Invalid`, naming line and entry, for text that is not TOML, unknown keys, missing or malformed values, names or
    /// tokens that occur twice, and files without any entry, which would lock everybody out.
    pub fn parse(text: &str) -> Result<Self> {
        let line =
            |offset: usize| text.as_bytes()[..offset.min(text.len())].iter().filter(|b| **b == b'\n').count() + 1;
        let table = DeTable::parse(text).map_err(|e| {
            Error::invalid(format!("line {}: {}", e.span().map_or(1, |s| line(s.start)), e.message().trim_end()))
        })?;
        let (mut tokens, mut users) = (Vec::new(), Vec::new());
        for (kind, list) in table.get_ref() {
            let kind_line = line(kind.span().start);
            let kind = kind.get_ref().as_ref();
            if !["token", "user"].contains(&kind) {
                return Err(Error::invalid(format!(
                    "line {kind_line}: unknown table; [[token]] and [[user]] are known"
                )));
            }
            let DeValue::Array(list) = list.get_ref() else {
                return Err(Error::invalid(format!("line {kind_line}: write [[{kind}]], with two brackets")));
            };
            for entry in list.iter() {
                let at = |e: Error| e.context(format_args!("line {}: {kind}", line(entry.span().start)));
                let DeValue::Table(entry) = entry.get_ref() else {
                    return Err(at(Error::invalid("an entry is a table")));
                };
                if kind == "token" {
                    tokens.push(token(entry).map_err(at)?);
                } else {
                    users.push(user(entry).map_err(at)?);
                }
            }
        }
        let credentials = Self { tokens, users };
        credentials.check()?;
        Ok(credentials)
    }

    fn check(&self) -> Result<()> {
        let entries = self.tokens.len() + self.users.len();
        if entries == 0 || entries > ENTRIES_MAX {
            return Err(Error::invalid(format!("{entries} entries; 1 to {ENTRIES_MAX} are allowed")));
        }
        let mut names = HashSet::new();
        let all = self.tokens.iter().map(|t| &t.name).chain(self.users.iter().map(|u| &u.name));
        if let Some(twice) = all.into_iter().find(|name| !names.insert(*name)) {
            return Err(Error::invalid(format!("the name {twice:?} occurs twice")));
        }
        let mut hashes = HashSet::new();
        match self.tokens.iter().find(|t| !hashes.insert(t.sha256)) {
            Some(twice) => Err(Error::invalid(format!("the token of {:?} occurs twice", twice.name))),
            None => Ok(()),
        }
    }

    /// The entry of a token. Every entry is compared, and each in the same time.
    pub(crate) fn token(&self, token: &str) -> Option<&Token> {
        let hash = sha256(token);
        self.tokens.iter().fold(None, |found, entry| if entry.sha256.ct_eq(&hash).into() { Some(entry) } else { found })
    }

    /// The token of a name.
    pub(crate) fn named_token(&self, name: &str) -> Option<&Token> {
        self.tokens.iter().find(|t| t.name == name)
    }

    /// The user of a name.
    pub(crate) fn user(&self, name: &str) -> Option<&User> {
        self.users.iter().find(|u| u.name == name)
    }

    /// Some user: a password for a name that nobody has must take as long as one for a name that somebody has.
    pub(crate) fn some_user(&self) -> Option<&User> {
        self.users.first()
    }
}

fn token(entry: &DeTable<'_>) -> Result<Token> {
    let (name, hash, scopes) = fields(entry, "sha256", &[])?;
    let wrong = || Error::invalid(format!("{name:?}: sha256 must be 64 hex digits; `thalweg token hash` prints them"));
    if hash.len() != 64 || !hash.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    let mut sha256 = Sha256::default();
    for (i, byte) in sha256.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hash[2 * i..2 * i + 2], 16).map_err(|_| wrong())?;
    }
    Ok(Token { name, sha256, scopes })
}

fn user(entry: &DeTable<'_>) -> Result<User> {
    let (name, argon2, scopes) = fields(entry, "argon2", &["scram"])?;
    if name.contains(':') {
        return Err(Error::invalid("the name of a user can't hold a colon: basic authentication ends it there"));
    }
    let wrong = || Error::invalid(format!("{name:?}: argon2 must be a hash as `thalweg user hash` prints it"));
    let hash = PasswordHash::new(&argon2).map_err(|_| wrong())?;
    let params = Params::try_from(&hash).map_err(|_| wrong())?;
    if hash.algorithm != argon2::ARGON2ID_IDENT || hash.hash.is_none() || hash.salt.is_none() {
        return Err(wrong());
    }
    if params.m_cost() > ARGON2_KIB_MAX || params.t_cost() > ARGON2_PASSES_MAX {
        return Err(Error::invalid(format!(
            "{name:?}: argon2 with m={} and t={}; at most m={ARGON2_KIB_MAX} and t={ARGON2_PASSES_MAX} are allowed",
            params.m_cost(),
            params.t_cost()
        )));
    }
    let wrong = || Error::invalid(format!("{name:?}: scram must be a verifier as `thalweg user new` prints it"));
    let scram = match entry.get("scram").map(|v| v.get_ref().as_str()) {
        None => None,
        Some(text) => Some(text.and_then(Verifier::parse).ok_or_else(wrong)?),
    };
    Ok(User { name, argon2, scram, scopes })
}

/// The name, the hash and the scopes of an entry.
fn fields(entry: &DeTable<'_>, hash: &str, more: &[&str]) -> Result<(String, String, Scopes)> {
    let known = |key: &str| ["name", hash, "scopes"].contains(&key) || more.contains(&key);
    if entry.iter().any(|(key, _)| !known(key.get_ref().as_ref())) {
        let more: String = more.iter().map(|m| format!(", {m}")).collect();
        return Err(Error::invalid(format!("unknown key; name, {hash}{more} and scopes are known")));
    }
    let text = |key: &str| match entry.get(key).map(|v| v.get_ref().as_str()) {
        Some(Some(text)) if !text.is_empty() => Ok(text.to_owned()),
        _ => Err(Error::invalid(format!("{key} must be a text that is not empty"))),
    };
    let name = text("name")?;
    let list = match entry.get("scopes").map(|v| v.get_ref()) {
        Some(DeValue::Array(list)) if list.iter().next().is_some() => list,
        _ => return Err(Error::invalid(format!("{name:?}: scopes must be a list of read, write and admin"))),
    };
    let mut scopes = Scopes::default();
    for one in list.iter() {
        let known = Scope::GRANTED.into_iter().find(|s| one.get_ref().as_str() == Some(s.name()));
        let known =
            known.ok_or_else(|| Error::invalid(format!("{name:?}: unknown scope; read, write and admin are known")))?;
        scopes = scopes.with(known);
    }
    Ok((name, text(hash)?, scopes))
}

fn sha256(token: &str) -> Sha256 {
    let digest = ring::digest::digest(&ring::digest::SHA256, token.as_bytes());
    let mut out = Sha256::default();
    out.copy_from_slice(digest.as_ref());
    out
}

/// A new token of 256 random bits.
///
/// # Errors
/// `Internal` when the machine has no randomness to give.
pub fn new_token() -> Result<Secret> {
    let mut random = [0; 32];
    ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut random)
        .map_err(|_| Error::internal("the machine gives no random numbers"))?;
    Ok(Secret::new(format!("{TOKEN_PREFIX}{}", URL_SAFE_NO_PAD.encode(random))))
}

/// The hash of a token for the file of credentials.
///
/// # Errors
/// `Invalid` for a token so short that its hash could be turned back by trying, or too long.
pub fn hash_token(token: &Secret) -> Result<String> {
    let length = token.expose().len();
    if !(TOKEN_BYTES_MIN..=SECRET_BYTES_MAX).contains(&length) {
        return Err(Error::invalid(format!(
            "the token has {length} bytes; {TOKEN_BYTES_MIN} to {SECRET_BYTES_MAX} are allowed"
        )));
    }
    Ok(sha256(token.expose()).iter().map(|b| format!("{b:02x}")).collect())
}

/// The hash of a password for the file of credentials.
///
/// # Errors
/// `Invalid` for an empty password and one of more than 1024 bytes.
pub fn hash_password(password: &Secret) -> Result<String> {
    let length = password.expose().len();
    if !(1..=SECRET_BYTES_MAX).contains(&length) {
        return Err(Error::invalid(format!("the password has {length} bytes; 1 to {SECRET_BYTES_MAX} are allowed")));
    }
    let salt = SaltString::generate(&mut OsRng);
    let hash = Argon2::default().hash_password(password.expose().as_bytes(), &salt);
    hash.map(|h| h.to_string()).map_err(|e| Error::internal(format!("cannot hash the password: {e}")))
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub const READER: &str = "reader-0123456789abcdef0123456789abcdef";
    pub const WRITER: &str = "writer-0123456789abcdef0123456789abcdef";
    pub const PASSWORD: &str = "a pass:word";

    /// A reader, a writer, and the administrator `root`, whose hash is cheap to check.
    pub const FILE: &str = r#"
[[token]]
name = "reader"
sha256 = "11a21445dab18a8dac92c165872b754196685f769b926c9424c4311956011abc"
scopes = ["read"]

[[token]]
name = "writer"
sha256 = "9a5dd072cabfe42aebf8c97567a806c66b219fd029696398ec79576670891a8e"
scopes = ["write"]

[[user]]
name = "root"
argon2 = "$argon2id$v=19$m=8,t=1,p=1$i/rjzrpjPkv7PwuH6BpvgA$2mK/2NkT0cpEWzbPvxqQc/O3AH2PaziEVk4cPfkCnVw"
scopes = ["admin"]
"#;

    #[test]
    fn entries_are_read() {
        let credentials = Credentials::parse(FILE).unwrap();
        let reader = credentials.token(READER).unwrap();
        assert_eq!((&*reader.name, reader.scopes), ("reader", Scopes::default().with(Scope::Read)));
        assert_eq!(credentials.token(WRITER).unwrap().name, "writer");
        assert!(credentials.token("reader").is_none());
        let root = credentials.user("root").unwrap();
        assert!(root.has_password(PASSWORD) && !root.has_password("a pass") && !root.has_password(""));
        assert!(credentials.user("reader").is_none());
    }

    #[test]
    fn mistakes_are_named_and_not_quoted() {
        let check = |text: &str, expected: &str| {
            let error = Credentials::parse(text).expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
            assert!(!error.contains("canary"), "{text}: {error}");
        };
        let hash = "00".repeat(32);
        check("", "0 entries");
        check("x = 'canary", "line 1");
        check("canary = 1", "line 1: unknown table");
        check("token = 'canary'", "[[token]]");
        check("token = ['canary']", "an entry is a table");
        check("\n[token]\nname = 'canary'", "two brackets");
        check("[[token]]\nname = 'a'\nscopes = ['read']", "sha256 must be a text");
        check("[[token]]\nname = 'a'\ntoken = 'canary'", "unknown key");
        check("[[token]]\nname = 'a'\nsha256 = 'canary'\nscopes = ['read']", "\"a\": sha256 must be 64 hex digits");
        check(&format!("[[token]]\nname = 'a'\nsha256 = '{}'\nscopes = ['read']", "é".repeat(32)), "64 hex digits");
        check(&format!("[[token]]\nname = 'a'\nsha256 = '{hash}'\nscopes = ['canary']"), "unknown scope");
        check(&format!("[[token]]\nname = 'a'\nsha256 = '{hash}'\nscopes = []"), "scopes must be a list");
        check(&format!("[[token]]\nname = ''\nsha256 = '{hash}'\nscopes = ['read']"), "name must be a text");
        let two = |a: &str, b: &str| {
            [a, b].map(|n| format!("[[token]]\nname = '{n}'\nsha256 = '{hash}'\nscopes = ['read']\n")).concat()
        };
        check(&two("a", "a"), "\"a\" occurs twice");
        check(&two("a", "b"), "the token of \"b\" occurs twice");
        check("[[user]]\nname = 'a:b'\nargon2 = 'canary'\nscopes = ['read']", "colon");
        check("[[user]]\nname = 'a'\nargon2 = 'canary'\nscopes = ['read']", "\"a\": argon2 must be a hash");
        let costly = "$argon2id$v=19$m=99999999,t=2,p=1$c2FsdHNhbHQ$aGFzaGhhc2hoYXNoaGFzaA";
        check(&format!("[[user]]\nname = 'a'\nargon2 = '{costly}'\nscopes = ['read']"), "m=99999999");
    }

    #[test]
    fn hashes_fit_what_they_are_of() {
        let (token, password) = (new_token().unwrap(), Secret::new("correct horse"));
        assert_eq!(token.expose().len(), TOKEN_PREFIX.len() + 43);
        assert!(new_token().unwrap() != token);
        let text = format!(
            "[[token]]\nname = 't'\nsha256 = '{}'\nscopes = ['read']\n[[user]]\nname = 'u'\nargon2 = '{}'\nscopes = ['write']",
            hash_token(&token).unwrap(),
            hash_password(&password).unwrap()
        );
        let credentials = Credentials::parse(&text).unwrap();
        assert_eq!(credentials.token(token.expose()).unwrap().name, "t");
        assert!(credentials.user("u").unwrap().has_password("correct horse"));
        assert!(hash_token(&Secret::new("short")).is_err());
        assert!(hash_password(&Secret::default()).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(\\[\\[(token|user)\\]\\]\n|name = \".{0,3}\"\n|sha256 = |scopes = \\[\"read\"\\]\n|.{0,5}){0,8}") {
            let _ = Credentials::parse(&text);
        }
    }
}
