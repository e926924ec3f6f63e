//! Tag sets and the codes that stand for them.
//!
//! A tag set is a canonical list of `key=value` pairs: sorted by key, keys unique, no empty key, no empty value (a label
//! with an empty value is a label that is absent). Its canonical form, hashed and stored, is for each pair
//! `varint(len key) key varint(len value) value`, in order. Its identity is the XXH3-128 hash of that form under the
//! database's seed; the low 64 bits are the [`Code`] that rows carry, the high 64 bits the check that is compared at
//! every lookup.

use std::cmp::Ordering;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::{Error, Result};

/// The key under which a metric's name is kept in its tag set.
pub const METRIC_NAME: &str = "__name__";

/// The 64-bit content-addressed integer that rows carry for a tag set. Stored as INT64 so that every Parquet reader
/// takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Code(pub i64);

/// The whole identity of a tag set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TagId {
    /// The low 64 bits of the hash.
    pub code: Code,
    /// The high 64 bits of the hash.
    pub check: i64,
}

/// Computes identities under one database's seed.
#[derive(Debug, Clone, Copy)]
pub struct TagHasher {
    seed: u64,
}

impl TagHasher {
    /// A hasher for the database with this seed (made once, when the database is created).
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The identity of canonical bytes.
    pub fn id(&self, canonical: &[u8]) -> TagId {
        let h = xxh3_128_with_seed(canonical, self.seed);
        TagId { code: Code(h as u64 as i64), check: (h >> 64) as u64 as i64 }
    }

    /// The hash under which an encoder remembers one wire form of a tag set. `domain` keeps protocols apart: equal
    /// bytes of two protocols need not mean equal tags.
    pub fn wire(&self, domain: u8, bytes: &[u8]) -> u128 {
        xxh3_128_with_seed(bytes, self.seed ^ (0x9e37_79b9_7f4a_7c15u64.wrapping_mul(u64::from(domain) + 1)))
    }
}

/// A canonical tag set; cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct TagSet(Arc<[u8]>);

impl TagSet {
    /// The empty tag set.
    pub fn empty() -> Self {
        Self(Arc::from([]))
    }

    /// Takes bytes that are known to be canonical (made by [`TagSetBuilder`]); use [`TagSet::check`] for stored bytes.
    pub fn from_canonical(bytes: impl Into<Arc<[u8]>>) -> Self {
        Self(bytes.into())
    }

    /// Checks that stored or received bytes are canonical.
    ///
    /// # Errors
    /// `Corrupt` when a length, UTF-8, order or uniqueness is violated.
    pub fn check(bytes: &[u8]) -> Result<Self> {
        let mut rest = bytes;
        let mut last: Option<&str> = None;
        while !rest.is_empty() {
            let key = take(&mut rest)?;
            let value = take(&mut rest)?;
            if key.is_empty() || value.is_empty() || last.is_some_and(|l| l >= key) {
                return Err(Error::corrupt(format!("tag set is not canonical at key {key:?}")));
            }
            last = Some(key);
        }
        Ok(Self(Arc::from(bytes)))
    }

    /// The canonical form.
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The pairs in key order.
    pub fn iter(&self) -> TagIter<'_> {
        TagIter { rest: &self.0 }
    }

    /// The keys in order, as bytes.
    pub fn keys(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.as_bytes();
        std::iter::from_fn(move || {
            // Canonical bytes hold whole pairs.
            let key = take_bytes(&mut rest).ok()?;
            take_bytes(&mut rest).ok()?;
            Some(key)
        })
    }

    /// The value of `key`, or `None` when absent.
    pub fn get(&self, key: &str) -> Option<&str> {
        get(&self.0, key)
    }

    /// The metric's name, or an empty text.
    pub fn metric(&self) -> &str {
        self.get(METRIC_NAME).unwrap_or("")
    }

    /// True without any pair.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl std::fmt::Debug for TagSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// The value of `key` in canonical bytes.
pub fn get<'a>(canonical: &'a [u8], key: &str) -> Option<&'a str> {
    // Keys are compared as bytes and only the value asked for is checked: matchers and label listings look at every
    // active tag set, where checking each text takes most of the time.
    let mut rest = canonical;
    while !rest.is_empty() {
        let name = take_bytes(&mut rest).ok()?;
        let value = take_bytes(&mut rest).ok()?;
        match name.cmp(key.as_bytes()) {
            Ordering::Less => {}
            Ordering::Equal => return std::str::from_utf8(value).ok(),
            Ordering::Greater => return None,
        }
    }
    None
}

/// Iterates over the pairs of canonical bytes.
#[derive(Debug, Clone)]
pub struct TagIter<'a> {
    rest: &'a [u8],
}

impl<'a> TagIter<'a> {
    /// Iterates over canonical bytes.
    pub fn new(canonical: &'a [u8]) -> Self {
        Self { rest: canonical }
    }
}

impl<'a> Iterator for TagIter<'a> {
    type Item = (&'a str, &'a str);

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        // Canonical bytes were checked when they were made or read; a failure here ends the list.
        let key = take(&mut self.rest).ok()?;
        let value = take(&mut self.rest).ok()?;
        Some((key, value))
    }
}

fn take<'a>(rest: &mut &'a [u8]) -> Result<&'a str> {
    std::str::from_utf8(take_bytes(rest)?).map_err(|e| Error::corrupt("tag set is not UTF-8").with_source(e))
}

fn take_bytes<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8]> {
    let short = || Error::corrupt("tag set ends within a pair");
    let mut len = 0usize;
    let mut shift = 0;
    loop {
        let (&b, tail) = rest.split_first().ok_or_else(short)?;
        *rest = tail;
        len |= usize::from(b & 0x7f) << shift;
        if b == 0 && shift > 0 {
            // The same tags in other bytes would have another code.
            return Err(Error::corrupt("tag set holds a length that is longer than need be"));
        }
        if b < 0x80 {
            break;
        }
        shift += 7;
        if shift > 28 {
            return Err(Error::corrupt("tag set holds a length of over 35 bits"));
        }
    }
    if len > rest.len() {
        return Err(short());
    }
    let (head, tail) = rest.split_at(len);
    *rest = tail;
    Ok(head)
}

/// Builds canonical bytes from pairs in any order.
#[derive(Debug, Default)]
pub struct TagSetBuilder {
    out: Vec<u8>,
}

impl TagSetBuilder {
    /// Canonicalises `pairs`: sorts them by key and leaves out those with an empty value.
    ///
    /// # Errors
    /// `Invalid` when a key is empty or occurs twice; the message names it.
    pub fn build<'b>(&'b mut self, pairs: &mut [(&str, &str)]) -> Result<&'b [u8]> {
        if !pairs.is_sorted_by(|a, b| a.0 < b.0) {
            pairs.sort_by(|a, b| a.0.cmp(b.0));
            if let Some(w) = pairs.windows(2).find(|w| w[0].0 == w[1].0) {
                return Err(Error::invalid(format!("label name {:?} occurs twice; names must be unique", w[0].0)));
            }
        }
        self.out.clear();
        for (key, value) in pairs.iter() {
            if key.is_empty() {
                return Err(Error::invalid("a label name is empty; names must have at least one character"));
            }
            if !value.is_empty() {
                put(&mut self.out, key);
                put(&mut self.out, value);
            }
        }
        Ok(&self.out)
    }
}

fn put(out: &mut Vec<u8>, text: &str) {
    let mut len = text.len();
    while len >= 0x80 {
        out.push(len as u8 | 0x80);
        len >>= 7;
    }
    out.push(len as u8);
    out.extend_from_slice(text.as_bytes());
}

/// A tag set from pairs in any order.
///
/// # Errors
/// As [`TagSetBuilder::build`].
pub fn tag_set(pairs: &[(&str, &str)]) -> Result<TagSet> {
    let mut pairs = pairs.to_vec();
    let mut builder = TagSetBuilder::default();
    builder.build(&mut pairs).map(|b| TagSet(Arc::from(b)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn canonical_forms() {
        let check = |pairs: &[(&str, &str)], expected: Result<&str, &str>| {
            let seen = tag_set(pairs).map(|t| format!("{t:?}"));
            match expected {
                Ok(text) => assert_eq!(seen.unwrap(), text),
                Err(text) => assert!(seen.unwrap_err().message().contains(text), "{pairs:?}"),
            }
        };
        check(&[], Ok("{}"));
        check(&[("b", "2"), ("a", "1")], Ok(r#"{"a": "1", "b": "2"}"#));
        check(&[("a", ""), ("b", "2")], Ok(r#"{"b": "2"}"#));
        check(&[("__name__", "up"), ("Z", "1")], Ok(r#"{"Z": "1", "__name__": "up"}"#));
        check(&[("b", "1"), ("a", "x"), ("b", "2")], Err("\"b\" occurs twice"));
        check(&[("a", "1"), ("a", "1")], Err("\"a\" occurs twice"));
        check(&[("", "1")], Err("a label name is empty"));
        check(&[("", "")], Err("a label name is empty"));
    }

    #[test]
    fn stored_bytes_are_checked() {
        let check = |bytes: &[u8], good: bool| assert_eq!(TagSet::check(bytes).is_ok(), good, "{bytes:?}");
        check(b"", true);
        check(b"\x01a\x01b", true);
        check(b"\x01a\x01b\x01b\x01c", true);
        check(b"\x01a\x01b\x01a\x01c", false);
        check(b"\x01b\x01b\x01a\x01c", false);
        check(b"\x00\x01b", false);
        check(b"\x01a\x00", false);
        check(b"\x01a", false);
        check(b"\x01a\x02b", false);
        check(b"\x01\xff\x01b", false);
        check(b"\x81\x00a\x01b", false);
        check(b"\xff\xff\xff\xff\xff\x01a", false);
    }

    #[test]
    fn identity_does_not_change() {
        // Stored files depend on these numbers.
        let id = |pairs: &[(&str, &str)]| TagHasher::new(42).id(tag_set(pairs).unwrap().as_bytes());
        assert_eq!(id(&[]), TagId { code: Code(4_331_629_317_196_124_516), check: 1_639_885_090_772_725_551 });
        assert_eq!(
            id(&[("__name__", "up")]),
            TagId { code: Code(-6_652_688_268_466_862_111), check: 6_310_486_846_387_942_971 }
        );
    }

    proptest! {
        #[test]
        fn pairs_come_back(map in proptest::collection::btree_map("\\PC{1,5}", "\\PC{0,200}", 0..8), seed: u64) {
            let mut pairs: Vec<(&str, &str)> = map.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            let sorted = tag_set(&pairs).unwrap();
            pairs.reverse();
            prop_assert_eq!(&tag_set(&pairs).unwrap(), &sorted);
            pairs.reverse();
            for (key, value) in &pairs {
                prop_assert_eq!(sorted.get(key).unwrap_or(""), *value);
            }
            prop_assert_eq!(sorted.get("not there, surely"), None);
            pairs.retain(|p| !p.1.is_empty());
            prop_assert_eq!(sorted.iter().collect::<Vec<_>>(), pairs);
            let stored = TagSet::check(sorted.as_bytes()).unwrap();
            let hasher = TagHasher::new(seed);
            prop_assert_eq!(hasher.id(stored.as_bytes()), hasher.id(sorted.as_bytes()));
        }

        /// Whatever is accepted is the one form of its pairs.
        #[test]
        fn any_bytes_are_refused_or_canonical(bytes in proptest::collection::vec(0u8..6, 0..16)) {
            if let Ok(set) = TagSet::check(&bytes) {
                let pairs: Vec<_> = set.iter().collect();
                let built = tag_set(&pairs).unwrap();
                prop_assert_eq!(built.as_bytes(), &bytes[..]);
            }
        }
    }
}
