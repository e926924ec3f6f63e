//! Text that must never be seen: passwords, tokens, URLs that carry either.
//!
//! [`Secret`] is the one type for them. It has no way to be printed or serialised by accident: `Debug` and `Display` give
//! `<secret>`, equality takes the same time wherever two values differ, and the bytes are overwritten when it is dropped.
//! [`Secret::expose`] is the one way to the text, so that its uses can be searched for and counted.

use std::fmt;

use subtle::ConstantTimeEq;
use zeroize::Zeroize;

use crate::{Error, Result};

/// What a secret prints as.
pub const HIDDEN: &str = "<secret>";

/// The prefix of a setting whose secret is in a file.
const FILE: &str = "file:";

/// The largest file that is taken for a secret: a mistyped path must not load a data file.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// A text that can't be printed.
#[derive(Clone, Default)]
pub struct Secret(String);

impl Secret {
    /// Wraps a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Reads a setting: the secret itself, or `file:PATH` for one that stands in a file, where an end of line after it
    /// is not part of it.
    ///
    /// # Errors
    /// `Invalid` for a file that can't be read, is larger than 64 KiB or is not text. Messages name the file and never
    /// what was read.
    pub fn parse(text: &str) -> Result<Self> {
        let Some(path) = text.strip_prefix(FILE) else { return Ok(Self::new(text)) };
        let unreadable = |e: std::io::Error| Error::invalid(format!("secret file {path:?}: {e}"));
        let metadata = std::fs::metadata(path).map_err(unreadable)?;
        if metadata.len() > FILE_BYTES_MAX {
            return Err(Error::invalid(format!(
                "secret file {path:?} has {} bytes, and at most {FILE_BYTES_MAX} are allowed",
                metadata.len()
            )));
        }
        let mut content = std::fs::read_to_string(path).map_err(unreadable)?;
        let secret = Self::new(content.trim_end_matches(['\r', '\n']));
        content.zeroize();
        Ok(secret)
    }

    /// The text itself. Whoever takes it must not let it reach a log, an error, a metric or an answer.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes().ct_eq(other.0.as_bytes()).into()
    }
}

impl Eq for Secret {}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_print_as_nothing() {
        let secret = Secret::new("canary-5d1");
        assert_eq!(format!("{secret} {secret:?} {:?} {:#?}", Some(&secret), [&secret]).matches("canary").count(), 0);
        assert_eq!(secret.to_string(), HIDDEN);
        assert_eq!(secret.expose(), "canary-5d1");
    }

    #[test]
    fn equality_is_that_of_texts() {
        let check = |a: &str, b: &str| assert_eq!(Secret::new(a) == Secret::new(b), a == b, "{a} {b}");
        check("", "");
        check("a", "a");
        check("a", "b");
        check("a", "ab");
        check("ab", "a");
    }

    #[test]
    fn secrets_come_from_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let text = format!("file:{}", path.display());
        let check = |content: &[u8], expected: Option<&str>| {
            std::fs::write(&path, content).unwrap();
            let read = Secret::parse(&text);
            assert_eq!(read.as_ref().ok().map(Secret::expose), expected, "{content:?}");
            if let Err(e) = read {
                assert!(e.to_string().contains("secret file"), "{e}");
            }
        };
        check(b"canary", Some("canary"));
        check(b"canary\n", Some("canary"));
        check(b"canary \r\n", Some("canary "));
        check(b"", Some(""));
        check(b"\xff", None);
        check(&[b'x'; (64 << 10) + 1], None);
        std::fs::remove_file(&path).unwrap();
        let missing = Secret::parse(&text).unwrap_err().to_string();
        assert!(missing.contains(&path.display().to_string()), "{missing}");
        assert_eq!(Secret::parse("plain").unwrap().expose(), "plain");
    }
}
