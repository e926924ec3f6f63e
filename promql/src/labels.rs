//! Operations on canonical tag sets as bytes: what PromQL does to labels, without decoding them to texts.
//!
//! Canonical bytes are sorted by name, so every subset of pairs, copied in order, is canonical again.

mod xxh64;

use catalog::tag::TagIter;

/// Labels that say what a metric is; they go when its name goes.
const METADATA: [&[u8]; 3] = [b"__name__", b"__type__", b"__unit__"];

/// One label in canonical bytes.
#[derive(Debug, Clone, Copy)]
pub struct Pair<'a> {
    /// Its name.
    pub name: &'a [u8],
    /// Its value, never empty.
    pub value: &'a [u8],
    /// Both with their lengths: what to copy.
    pub raw: &'a [u8],
}

/// Iterates over canonical bytes. Bytes that are not canonical end the iteration early.
#[derive(Debug, Clone)]
pub struct Pairs<'a>(&'a [u8]);

impl<'a> Pairs<'a> {
    /// Of a canonical tag set.
    pub fn new(labels: &'a [u8]) -> Self {
        Self(labels)
    }
}

fn length(bytes: &[u8], at: &mut usize) -> Option<usize> {
    let (mut len, mut shift) = (0usize, 0);
    loop {
        let b = *bytes.get(*at)?;
        *at += 1;
        len |= usize::from(b & 0x7f) << shift;
        if b < 0x80 {
            return Some(len);
        }
        shift += 7;
        if shift > 28 {
            return None;
        }
    }
}

impl<'a> Iterator for Pairs<'a> {
    type Item = Pair<'a>;

    #[inline]
    fn next(&mut self) -> Option<Pair<'a>> {
        if self.0.is_empty() {
            return None;
        }
        let bytes = self.0;
        let mut at = 0;
        let n = length(bytes, &mut at)?;
        let name = bytes.get(at..at + n)?;
        at += n;
        let n = length(bytes, &mut at)?;
        let value = bytes.get(at..at + n)?;
        at += n;
        let (raw, rest) = bytes.split_at(at);
        self.0 = rest;
        Some(Pair { name, value, raw })
    }
}

/// The value of a label; empty when absent.
pub fn get<'a>(labels: &'a [u8], name: &str) -> &'a str {
    let value = Pairs::new(labels).find(|p| p.name == name.as_bytes()).map_or(&[][..], |p| p.value);
    // Canonical bytes are UTF-8; damaged ones read as absent.
    std::str::from_utf8(value).unwrap_or("")
}

/// Appends the labels for which `keep` holds.
#[inline]
pub fn filter(labels: &[u8], out: &mut Vec<u8>, mut keep: impl FnMut(&[u8]) -> bool) {
    for pair in Pairs::new(labels) {
        if keep(pair.name) {
            out.extend_from_slice(pair.raw);
        }
    }
}

/// Appends the labels without the metric's name and metadata.
pub fn drop_name(labels: &[u8], out: &mut Vec<u8>) {
    filter(labels, out, |name| !METADATA.contains(&name));
}

/// The hash of a label set that Prometheus has, so that what is chosen by it is the same series.
///
/// It is XXH64 of names and values in order, each after its length: a byte, or 255 and three bytes from the least on.
pub fn hash(labels: &[u8]) -> u64 {
    let mut bytes = Vec::with_capacity(labels.len() + 8);
    for text in Pairs::new(labels).flat_map(|p| [p.name, p.value]) {
        match u8::try_from(text.len()) {
            Ok(short) if short < u8::MAX => bytes.push(short),
            _ => {
                bytes.push(u8::MAX);
                bytes.extend_from_slice(&(text.len() as u32).to_le_bytes()[..3]);
            }
        }
        bytes.extend_from_slice(text);
    }
    xxh64::hash(&bytes)
}

/// Whether a label goes when the metric's name goes.
pub fn is_metadata(name: &[u8]) -> bool {
    METADATA.contains(&name)
}

/// Which labels form a group or a matching signature.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, serde::Serialize, serde::Deserialize)]
pub struct Grouping {
    /// The names.
    pub labels: Vec<String>,
    /// True: all labels but these and the metric's name. False: these.
    pub without: bool,
}

impl Grouping {
    /// Whether a label belongs to the group's labels.
    #[inline]
    pub fn keeps(&self, name: &[u8]) -> bool {
        let listed = self.labels.iter().any(|l| l.as_bytes() == name);
        if self.without { !listed && name != b"__name__" } else { listed }
    }

    /// Appends the group's labels.
    #[inline]
    pub fn key(&self, labels: &[u8], out: &mut Vec<u8>) {
        if self.labels.is_empty() && !self.without {
            return;
        }
        filter(labels, out, |name| self.keeps(name));
    }
}

/// Appends `labels` with `name` set to `value`, or without it when `value` is empty.
pub fn set(labels: &[u8], name: &str, value: &str, out: &mut Vec<u8>) {
    let mut done = value.is_empty();
    for pair in Pairs::new(labels) {
        if !done && pair.name >= name.as_bytes() {
            put(out, name.as_bytes());
            put(out, value.as_bytes());
            done = true;
        }
        if pair.name != name.as_bytes() {
            out.extend_from_slice(pair.raw);
        }
    }
    if !done {
        put(out, name.as_bytes());
        put(out, value.as_bytes());
    }
}

fn put(out: &mut Vec<u8>, text: &[u8]) {
    let mut len = text.len();
    while len >= 0x80 {
        out.push(len as u8 | 0x80);
        len >>= 7;
    }
    out.push(len as u8);
    out.extend_from_slice(text);
}

/// The order in which Prometheus sorts label sets: pair by pair, name before value, the shorter first.
pub fn compare(a: &[u8], b: &[u8]) -> std::cmp::Ordering {
    let (mut a, mut b) = (Pairs::new(a), Pairs::new(b));
    loop {
        match (a.next(), b.next()) {
            (None, None) => return std::cmp::Ordering::Equal,
            (None, _) => return std::cmp::Ordering::Less,
            (_, None) => return std::cmp::Ordering::Greater,
            (Some(a), Some(b)) => {
                let order = a.name.cmp(b.name).then_with(|| a.value.cmp(b.value));
                if order.is_ne() {
                    return order;
                }
            }
        }
    }
}

/// Labels as Prometheus prints them in errors: `{a="b", c="d"}`.
pub fn display(labels: &[u8]) -> String {
    let mut out = String::from("{");
    for (i, (k, v)) in TagIter::new(labels).enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        let plain =
            k.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') && !k.starts_with(|c: char| c.is_ascii_digit());
        if plain {
            out.push_str(k);
        } else {
            out.push_str(&format!("{k:?}"));
        }
        out.push('=');
        out.push_str(&format!("{v:?}"));
    }
    out.push('}');
    out
}

#[cfg(test)]
mod tests {
    use catalog::tag::tag_set;

    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Vec<u8> {
        tag_set(pairs).expect("test labels").as_bytes().to_vec()
    }

    #[test]
    fn subsets_stay_canonical() {
        let all = of(&[("__name__", "m"), ("a", "1"), ("b", "2"), ("c", &"x".repeat(300))]);
        let check = |got: Vec<u8>, expected: &[(&str, &str)]| assert_eq!(got, of(expected));
        let with = |f: &dyn Fn(&mut Vec<u8>)| {
            let mut out = Vec::new();
            f(&mut out);
            out
        };
        let x = "x".repeat(300);
        check(with(&|o| drop_name(&all, o)), &[("a", "1"), ("b", "2"), ("c", &x)]);
        let by = Grouping { labels: vec!["b".into(), "a".into()], without: false };
        check(with(&|o| by.key(&all, o)), &[("a", "1"), ("b", "2")]);
        let without = Grouping { labels: vec!["b".into()], without: true };
        check(with(&|o| without.key(&all, o)), &[("a", "1"), ("c", &x)]);
        check(with(&|o| set(&all, "b", "", o)), &[("__name__", "m"), ("a", "1"), ("c", &x)]);
        check(with(&|o| set(&all, "aa", "9", o)), &[("__name__", "m"), ("a", "1"), ("aa", "9"), ("b", "2"), ("c", &x)]);
        check(with(&|o| set(&of(&[("a", "1")]), "z", "9", o)), &[("a", "1"), ("z", "9")]);
        check(with(&|o| set(&of(&[("a", "1")]), "a", "9", o)), &[("a", "9")]);
        assert_eq!(get(&all, "b"), "2");
        assert_eq!(display(&of(&[("a", "1"), ("b.c", "q\"")])), "{a=\"1\", \"b.c\"=\"q\\\"\"}");
    }

    #[test]
    fn order_is_by_pairs_not_by_bytes() {
        let order = |a: &[(&str, &str)], b: &[(&str, &str)]| compare(&of(a), &of(b));
        assert!(order(&[("a", "10")], &[("a", "2")]).is_lt());
        assert!(order(&[("a", "1")], &[("aa", "0")]).is_lt());
        assert!(order(&[("b", "1")], &[("aa", "0")]).is_gt());
        assert!(order(&[], &[("aa", "0")]).is_lt());
    }
}
