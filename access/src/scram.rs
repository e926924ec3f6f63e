//! SCRAM-SHA-256 (RFC 5802, RFC 7677): a client proves that it knows a password without sending it.
//!
//! The server keeps a [`Verifier`], from which the password can't be had back but by trying, and with which nobody can
//! log in. A name that nobody has is asked the same questions, with a salt of its own that stays the same.

use std::net::IpAddr;
use std::num::NonZeroU32;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use catalog::{Error, Result, Secret};
use ring::rand::SecureRandom as _;
use ring::{digest, hmac, pbkdf2};
use subtle::ConstantTimeEq as _;

use crate::Scope;
use crate::credentials::{SECRET_BYTES_MAX, Sha256};
use crate::decision::{Access, Caller, Denied};

/// The name of the mechanism, which a verifier begins with.
pub const MECHANISM: &str = "SCRAM-SHA-256";
/// Rounds of hashing for new verifiers, as PostgreSQL's: clients pay for them at each login.
const ITERATIONS: u32 = 4096;
/// Most rounds of a verifier: clients would wait for seconds.
const ITERATIONS_MAX: u32 = 1_000_000;

/// What the server knows of a password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    stored_key: Sha256,
    server_key: Sha256,
}

impl Verifier {
    /// For a password.
    fn new(password: &str, salt: Vec<u8>, iterations: u32) -> Self {
        let mut salted = Sha256::default();
        let rounds = NonZeroU32::new(iterations).unwrap_or(NonZeroU32::MIN);
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, &salt, password.as_bytes(), &mut salted);
        let stored_key = hash(&sign(&salted, b"Client Key"));
        Self { iterations, salt, stored_key, server_key: sign(&salted, b"Server Key") }
    }

    /// From `SCRAM-SHA-256$<iterations>:<salt>$<stored key>:<server key>`, PostgreSQL's form.
    pub fn parse(text: &str) -> Option<Self> {
        let (salt, keys) = text.strip_prefix(MECHANISM)?.strip_prefix('$')?.split_once('$')?;
        let ((iterations, salt), (stored, server)) = (salt.split_once(':')?, keys.split_once(':')?);
        let key = |text: &str| Sha256::try_from(STANDARD.decode(text).ok()?).ok();
        let iterations = iterations.parse().ok().filter(|i| (1..=ITERATIONS_MAX).contains(i))?;
        let salt = STANDARD.decode(salt).ok().filter(|s| !s.is_empty())?;
        Some(Self { iterations, salt, stored_key: key(stored)?, server_key: key(server)? })
    }

    fn text(&self) -> String {
        let [salt, stored, server] = [&self.salt[..], &self.stored_key, &self.server_key].map(|b| STANDARD.encode(b));
        format!("{MECHANISM}${}:{salt}${stored}:{server}", self.iterations)
    }
}

/// The verifier of a password for the file of credentials.
///
/// # Errors
/// `Invalid` for an empty password and one of more than 1024 bytes; `Internal` without randomness.
pub fn scram_verifier(password: &Secret) -> Result<String> {
    let length = password.expose().len();
    if !(1..=SECRET_BYTES_MAX).contains(&length) {
        return Err(Error::invalid(format!("the password has {length} bytes; 1 to {SECRET_BYTES_MAX} are allowed")));
    }
    Ok(Verifier::new(password.expose(), random::<16>()?.to_vec(), ITERATIONS).text())
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let filled = ring::rand::SystemRandom::new().fill(&mut bytes);
    filled.map_err(|_| Error::internal("the machine gives no random numbers"))?;
    Ok(bytes)
}

fn sign(key: &[u8], text: &[u8]) -> Sha256 {
    let mut out = Sha256::default();
    out.copy_from_slice(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text).as_ref());
    out
}

fn hash(bytes: &[u8]) -> Sha256 {
    let mut out = Sha256::default();
    out.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    out
}

/// How a name logs in over a protocol that knows SCRAM.
#[derive(Debug)]
pub enum Login {
    /// By these messages.
    Scram(Scram),
    /// By [`Access::log_in`]: its entry has no verifier, as those of tokens have none.
    Password,
}

impl Access {
    /// Begins the login of a name. A name that nobody has can't be told from a user with a verifier.
    ///
    /// # Errors
    /// `Throttled` for an address that failed too often.
    pub fn begin_login(&self, name: &str, peer: IpAddr) -> Result<Login, Denied> {
        let entry = self.entry(name);
        let (verifier, caller) = match entry {
            Some((None, _)) => return Ok(Login::Password),
            Some((Some(verifier), caller)) => (verifier, Some(caller)),
            None => {
                let made_up = self.keyed(name.as_bytes());
                let (stored_key, server_key) = (self.keyed(&made_up), Sha256::default());
                (Verifier { iterations: ITERATIONS, salt: made_up[..16].to_vec(), stored_key, server_key }, None)
            }
        };
        if let Some(seconds) = self.wait(peer) {
            return Err(Denied::Throttled(seconds));
        }
        Ok(Login::Scram(Scram { access: self.clone(), peer, verifier, caller }))
    }
}

/// A login of which no message was seen.
#[derive(Debug)]
pub struct Scram {
    access: Access,
    peer: IpAddr,
    verifier: Verifier,
    caller: Option<Caller>,
}

/// A login that waits for the client's proof.
#[derive(Debug)]
pub struct Challenged {
    scram: Scram,
    /// How the client's last message begins.
    expected: String,
    /// The messages that both sides sign, but for the last.
    signed: String,
}

impl Scram {
    /// Takes the client's first message; gives the answer to send.
    ///
    /// # Errors
    /// `Wrong` for a message that is none, or one that insists on binding to the connection's encryption.
    pub fn challenge(self, message: &str) -> Result<(Challenged, String), Denied> {
        let nonce = random::<18>().map_err(|_| Denied::Busy)?;
        self.challenge_with(message, &STANDARD.encode(nonce))
    }

    fn challenge_with(self, message: &str, nonce: &str) -> Result<(Challenged, String), Denied> {
        // A header in two parts, of which the second may name another user to act for; then the name and a nonce.
        let mut parts = message.splitn(3, ',');
        let (binding, actor, bare) = (parts.next(), parts.next(), parts.next().ok_or(Denied::Wrong)?);
        if !matches!((binding, actor), (Some("n" | "y"), Some(""))) {
            return Err(Denied::Wrong);
        }
        let mut fields = bare.split(',');
        let (name, theirs) = (fields.next(), fields.next().and_then(|r| r.strip_prefix("r=")));
        let theirs =
            theirs.filter(|n| !n.is_empty() && name.is_some_and(|n| n.starts_with("n="))).ok_or(Denied::Wrong)?;
        let answer =
            format!("r={theirs}{nonce},s={},i={}", STANDARD.encode(&self.verifier.salt), self.verifier.iterations);
        let header = &message[..message.len() - bare.len()];
        let expected = format!("c={},r={theirs}{nonce}", STANDARD.encode(header));
        Ok((Challenged { scram: self, expected, signed: format!("{bare},{answer}") }, answer))
    }
}

impl Challenged {
    /// Takes the client's last message; gives who it is and the answer that proves the server's knowledge.
    ///
    /// # Errors
    /// `Wrong` for a proof that is none, which counts against the address; `Scope` for a user who may not do this.
    pub fn finish(self, scope: Scope, message: &str) -> Result<(Caller, String), Denied> {
        let Scram { access, peer, verifier, caller } = self.scram;
        let server_signature = || {
            let (unproven, proof) = message.rsplit_once(",p=")?;
            if unproven != self.expected {
                return None;
            }
            let signed = format!("{},{unproven}", self.signed);
            let proof = Sha256::try_from(STANDARD.decode(proof).ok()?).ok()?;
            let signature = sign(&verifier.stored_key, signed.as_bytes());
            let mut client_key = proof;
            client_key.iter_mut().zip(signature).for_each(|(key, bits)| *key ^= bits);
            let proven = bool::from(hash(&client_key).ct_eq(&verifier.stored_key));
            proven.then(|| sign(&verifier.server_key, signed.as_bytes()))
        };
        let Some((signature, caller)) = server_signature().zip(caller) else {
            access.failed(peer);
            return Err(Denied::Wrong);
        };
        access.permit(&caller, scope)?;
        Ok((caller, format!("v={}", STANDARD.encode(signature))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Credentials;

    /// The exchange of RFC 7677.
    const FIRST: &str = "n,,n=user,r=rOprNGfwEbeRWgbNEkqO";
    const NONCE: &str = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
    const CHALLENGE: &str = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
    const LAST: &str = "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
                        p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
    const END: &str = "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=";

    fn access() -> Access {
        let salt = STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
        let verifier = Verifier::new("pencil", salt, 4096).text();
        let argon2 = crate::hash_password(&Secret::new("pencil")).unwrap();
        let user = format!("[[user]]\nname = 'user'\nargon2 = '{argon2}'\nscram = '{verifier}'\nscopes = ['read']\n");
        let old = format!("[[user]]\nname = 'old'\nargon2 = '{argon2}'\nscopes = ['read']\n");
        Access::with(Credentials::parse(&format!("{user}{old}")).unwrap())
    }

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn exchange(access: &Access, name: &str, scope: Scope, last: &str) -> Result<String, Denied> {
        let Login::Scram(scram) = access.begin_login(name, PEER)? else { panic!("{name} has a verifier") };
        let (challenged, _) = scram.challenge_with(FIRST, NONCE)?;
        challenged.finish(scope, last).map(|(caller, end)| format!("{} {end}", caller.name()))
    }

    #[test]
    fn a_proof_is_known_and_answered() {
        let access = access();
        let Ok(Login::Scram(scram)) = access.begin_login("user", PEER) else { panic!("the user has a verifier") };
        assert_eq!(scram.challenge_with(FIRST, NONCE).unwrap().1, CHALLENGE);
        let check = |name: &str, scope: Scope, last: &str, expected: Result<&str, Denied>| {
            assert_eq!(exchange(&access, name, scope, last).as_deref().map_err(|d| *d), expected, "{name} {last}");
        };
        check("user", Scope::Read, LAST, Ok(&format!("user {END}")));
        check("user", Scope::Write, LAST, Err(Denied::Scope(Scope::Write)));
        check("ghost", Scope::Read, LAST, Err(Denied::Wrong));
        for wrong in
            ["", "c=biws", &LAST.replace("p=d", "p=e"), &LAST.replace("biws", "eSws"), &LAST.replace("NGf", "NGg")]
        {
            check("user", Scope::Read, wrong, Err(Denied::Wrong));
        }
        assert!(matches!(access.begin_login("old", PEER), Ok(Login::Password)));
    }

    #[test]
    fn first_messages_that_are_none() {
        let access = access();
        for first in
            ["", "n,,", "n,,n=user", "n,,r=x", "n,,n=user,r=", "p=tls-unique,,n=user,r=x", "n,a=other,n=user,r=x"]
        {
            let Ok(Login::Scram(scram)) = access.begin_login("user", PEER) else { panic!("the user has a verifier") };
            assert_eq!(scram.challenge(first).map(|c| c.1).unwrap_err(), Denied::Wrong, "{first}");
        }
    }

    #[test]
    fn names_that_nobody_has_look_like_users_and_guesses_are_slowed_down() {
        let access = access();
        let challenge = |name: &str| {
            let Ok(Login::Scram(scram)) = access.begin_login(name, PEER) else { panic!("{name} is challenged") };
            scram.challenge_with(FIRST, NONCE).unwrap().1
        };
        assert_eq!(challenge("ghost"), challenge("ghost"));
        assert_ne!(challenge("ghost"), challenge("other"));
        assert_eq!(challenge("ghost").len(), CHALLENGE.len());
        for _ in 0..11 {
            assert_eq!(exchange(&access, "ghost", Scope::Read, LAST), Err(Denied::Wrong));
        }
        assert!(matches!(access.begin_login("user", PEER), Err(Denied::Throttled(_))));
    }

    #[test]
    fn verifiers_are_read_as_written() {
        let text = scram_verifier(&Secret::new("pencil")).unwrap();
        assert_eq!(Verifier::parse(&text).map(|v| v.text()), Some(text.clone()));
        assert_ne!(scram_verifier(&Secret::new("pencil")).unwrap(), text, "each has a salt of its own");
        for wrong in ["", "SCRAM-SHA-256", &text.replace("4096", "0"), &text.replace("4096", "9999999"), &text[..90]] {
            assert_eq!(Verifier::parse(wrong), None, "{wrong}");
        }
        assert!(scram_verifier(&Secret::new("")).is_err());
    }
}
