//! Matchers: the predicates on tags that all query languages come down to.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::LazyLock;

use parking_lot::Mutex;
use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, TagSet};

/// How a matcher compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MatchOp {
    /// `=`
    #[serde(rename = "=")]
    Eq,
    /// `!=`
    #[serde(rename = "!=")]
    Ne,
    /// `=~`, anchored at both ends
    #[serde(rename = "=~")]
    Re,
    /// `!~`, anchored at both ends
    #[serde(rename = "!~")]
    Nre,
}

impl MatchOp {
    /// As it is written.
    pub fn symbol(self) -> &'static str {
        match self {
            Self::Eq => "=",
            Self::Ne => "!=",
            Self::Re => "=~",
            Self::Nre => "!~",
        }
    }
}

/// Longest pattern accepted, in bytes.
pub const PATTERN_BYTES_MAX: usize = 64 * 1024;
/// Longest program that a pattern may become, in bytes.
const PROGRAM_BYTES_MAX: usize = 4 << 20;
/// Most bytes that the programs of all patterns of one request may have: some thousand usual patterns.
const PROGRAMS_BYTES_MAX: usize = 64 << 20;

/// A predicate on one tag. An absent tag has the empty text as its value. Stored as `[name, op, value]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(into = "(String, MatchOp, String)", try_from = "(String, MatchOp, String)")]
pub struct Matcher {
    name: String,
    op: MatchOp,
    value: String,
    regex: Option<Compiled>,
}

impl PartialEq for Matcher {
    fn eq(&self, other: &Self) -> bool {
        (self.op, &self.name, &self.value) == (other.op, &other.name, &other.value)
    }
}

impl Eq for Matcher {}

impl std::hash::Hash for Matcher {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (self.op, &self.name, &self.value).hash(state);
    }
}

impl PartialOrd for Matcher {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some((&self.name, self.op as u8, &self.value).cmp(&(&other.name, other.op as u8, &other.value)))
    }
}

impl From<Matcher> for (String, MatchOp, String) {
    fn from(m: Matcher) -> Self {
        (m.name, m.op, m.value)
    }
}

impl TryFrom<(String, MatchOp, String)> for Matcher {
    type Error = Error;

    fn try_from((name, op, value): (String, MatchOp, String)) -> Result<Self> {
        Self::new(name, op, value)
    }
}

impl Matcher {
    /// A matcher.
    ///
    /// # Errors
    /// `Invalid` when the pattern does not compile or is longer than [`PATTERN_BYTES_MAX`].
    pub fn new(name: impl Into<String>, op: MatchOp, value: impl Into<String>) -> Result<Self> {
        let (name, value) = (name.into(), value.into());
        let regex = match op {
            MatchOp::Eq | MatchOp::Ne => None,
            MatchOp::Re | MatchOp::Nre => Some(compile(&value)?),
        };
        Ok(Self { name, op, value, regex })
    }

    /// A matcher for one value.
    pub fn equal(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { name: name.into(), op: MatchOp::Eq, value: value.into(), regex: None }
    }

    /// The same for another tag.
    #[must_use]
    pub fn of(self, name: impl Into<String>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// The tag's key.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it compares.
    pub fn op(&self) -> MatchOp {
        self.op
    }

    /// The value or pattern.
    pub fn value(&self) -> &str {
        &self.value
    }

    /// Whether a tag value matches; pass the empty text for an absent tag.
    pub fn matches(&self, value: &str) -> bool {
        let regex = || self.regex.as_ref().is_some_and(|r| r.regex.is_match(value));
        match self.op {
            MatchOp::Eq => value == self.value,
            MatchOp::Ne => value != self.value,
            MatchOp::Re => regex(),
            MatchOp::Nre => !regex(),
        }
    }

    /// The values that it may hold for, when these are few and known: of `=`, and of patterns such as `a|b` or `(a|b)`.
    pub fn values(&self) -> Option<Vec<Cow<'_, str>>> {
        match self.op {
            MatchOp::Eq => Some(vec![Cow::Borrowed(&self.value)]),
            MatchOp::Re => alternatives(&self.value),
            MatchOp::Ne | MatchOp::Nre => None,
        }
    }

    /// What all values begin with that it holds for, as far as that is easily seen.
    pub fn prefix(&self) -> String {
        match self.op {
            MatchOp::Eq => self.value.clone(),
            MatchOp::Re => literal_prefix(&self.value),
            MatchOp::Ne | MatchOp::Nre => String::new(),
        }
    }

    /// Whether a tag set matches.
    pub fn matches_set(&self, tags: &TagSet) -> bool {
        self.matches(tags.get(&self.name).unwrap_or(""))
    }
}

/// Counts the patterns of one request: each is bounded, and so are all together, in the memory that they take and in the
/// time that it takes to compile them.
#[derive(Debug, Default)]
pub struct Patterns {
    bytes: usize,
}

impl Patterns {
    /// Notes a matcher.
    ///
    /// # Errors
    /// `LimitExceeded` when there are too many.
    pub fn add(&mut self, matcher: &Matcher) -> Result<()> {
        matcher.regex.as_ref().map_or(Ok(()), |r| self.note(r))
    }

    /// As [`anchored`], and notes the pattern.
    ///
    /// # Errors
    /// As there, and when there are too many.
    pub fn anchored(&mut self, pattern: &str) -> Result<Regex> {
        let compiled = compile(pattern)?;
        self.note(&compiled)?;
        Ok(compiled.regex)
    }

    fn note(&mut self, compiled: &Compiled) -> Result<()> {
        self.bytes += compiled.bytes_max;
        if self.bytes > PROGRAMS_BYTES_MAX {
            return Err(Error::limit_exceeded(format!(
                "regular expressions of {} MiB when compiled; at most {} MiB are allowed in one request",
                self.bytes.div_ceil(1 << 20),
                PROGRAMS_BYTES_MAX >> 20
            )));
        }
        Ok(())
    }
}

/// A character of a pattern.
enum Letter {
    /// It stands for itself.
    Literal(char),
    Bar,
    /// Anything else, which begins at this place.
    Other(usize),
}

/// The characters of a pattern up to the first that is neither literal nor `|`.
fn letters(pattern: &str) -> impl Iterator<Item = Letter> {
    let mut chars = pattern.char_indices();
    let mut ended = false;
    std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let (at, c) = chars.next()?;
        let letter = match c {
            '|' => Letter::Bar,
            '\\' => match chars.next() {
                Some((_, c)) if c.is_ascii_punctuation() => Letter::Literal(c),
                _ => Letter::Other(at),
            },
            '.' | '+' | '*' | '?' | '(' | ')' | '[' | ']' | '{' | '}' | '^' | '$' => Letter::Other(at),
            c => Letter::Literal(c),
        };
        ended = matches!(letter, Letter::Other(_));
        Some(letter)
    })
}

/// The texts of a pattern that is nothing but texts with `|` between them, perhaps in brackets.
fn alternatives(pattern: &str) -> Option<Vec<Cow<'_, str>>> {
    let inner = pattern.strip_prefix('(').and_then(|p| p.strip_suffix(')'));
    let inner = inner.map(|p| p.strip_prefix("?:").unwrap_or(p));
    let mut texts = vec![String::new()];
    for letter in letters(inner.unwrap_or(pattern)) {
        match letter {
            Letter::Literal(c) => texts.last_mut()?.push(c),
            Letter::Bar => texts.push(String::new()),
            Letter::Other(_) => return None,
        }
    }
    Some(texts.into_iter().map(Cow::Owned).collect())
}

/// The text with which a pattern without alternatives begins.
fn literal_prefix(pattern: &str) -> String {
    if pattern.contains('|') {
        return String::new();
    }
    let mut prefix = String::new();
    for letter in letters(pattern) {
        match letter {
            Letter::Literal(c) => prefix.push(c),
            Letter::Bar => return String::new(),
            Letter::Other(at) => {
                // The character before may be there no time at all.
                if pattern[at..].starts_with(['*', '?', '{']) {
                    prefix.pop();
                }
            }
        }
    }
    prefix
}

/// A pattern's program, and what it has at most.
#[derive(Debug, Clone)]
struct Compiled {
    regex: Regex,
    bytes_max: usize,
}

/// Compiles `^(?s:pattern)$`, as Prometheus anchors matchers and `label_replace`.
///
/// # Errors
/// `Invalid` when it does not compile or is too long.
pub fn anchored(pattern: &str) -> Result<Regex> {
    compile(pattern).map(|compiled| compiled.regex)
}

fn compile(pattern: &str) -> Result<Compiled> {
    if pattern.len() > PATTERN_BYTES_MAX {
        return Err(Error::invalid(format!(
            "regular expression of {} bytes; at most {PATTERN_BYTES_MAX} are allowed",
            pattern.len()
        )));
    }
    if let Some(regex) = KEPT.lock().get(pattern) {
        return Ok(Compiled { regex, bytes_max: KEPT_BYTES });
    }
    let builder = |pattern: &str| RegexBuilder::new(&format!("^(?s:{pattern})$"));
    let small = |pattern: &str| builder(pattern).size_limit(KEPT_BYTES).dfa_size_limit(KEPT_DFA_BYTES).build();
    if let Ok(regex) = small(pattern) {
        KEPT.lock().put(pattern, regex.clone());
        return Ok(Compiled { regex, bytes_max: KEPT_BYTES });
    }
    let large = |pattern: &str| builder(pattern).size_limit(PROGRAM_BYTES_MAX).build();
    large(pattern)
        .or_else(|e| large(&with_literal_braces(pattern)).map_err(|_| e))
        .map(|regex| Compiled { regex, bytes_max: PROGRAM_BYTES_MAX })
        .map_err(|e| Error::invalid(format!("regular expression {pattern:?} does not compile")).with_source(e))
}

/// Compiled patterns: dashboards ask the same ones again and again, each is compiled several times on its way through a
/// query, and for a pattern with classes that takes longer than to try it on a thousand values (of 1.25 ms for a query
/// with two of them over 1,000 series, 0.7 ms were compilation).
static KEPT: LazyLock<Mutex<Kept>> = LazyLock::new(Mutex::default);

/// Most patterns that are kept, and most bytes of each: of its program, and of the automaton that is built while it is
/// used, which every thread has. So all of them take some 20 MiB per thread at the very most, and usually a hundredth.
const KEPT_MAX: usize = 64;
const KEPT_BYTES: usize = 64 << 10;
const KEPT_DFA_BYTES: usize = 256 << 10;

/// Patterns with the time of their last use, counted in uses.
#[derive(Default)]
struct Kept {
    patterns: HashMap<String, (Regex, u64), foldhash::fast::RandomState>,
    uses: u64,
}

impl Kept {
    fn get(&mut self, pattern: &str) -> Option<Regex> {
        self.uses += 1;
        let (regex, used) = self.patterns.get_mut(pattern)?;
        *used = self.uses;
        Some(regex.clone())
    }

    /// Keeps a pattern; the longest unused goes.
    fn put(&mut self, pattern: &str, regex: Regex) {
        if self.patterns.len() >= KEPT_MAX
            && let Some(oldest) = self.patterns.iter().min_by_key(|(_, (_, used))| *used).map(|(p, _)| p.clone())
        {
            self.patterns.remove(&oldest);
        }
        self.patterns.insert(pattern.to_owned(), (regex, self.uses));
    }
}

/// The pattern with braces escaped that do not repeat anything: in Go they stand for themselves, here they are an error.
fn with_literal_braces(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len() + 8);
    let mut chars = pattern.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => {
                out.push(c);
                // `\p{Greek}` and `\x{10ffff}` have braces of their own.
                let own = pattern[at + 1..].strip_prefix(['p', 'P', 'x']).filter(|rest| rest.starts_with('{'));
                let end = own.and_then(|rest| rest.find('}')).unwrap_or(0);
                out.extend(chars.by_ref().take(if end > 0 { end + 2 } else { 1 }).map(|(_, c)| c));
            }
            '{' if !repeats(&pattern[at + 1..]) => out.push_str("\\{"),
            c => out.push(c),
        }
    }
    out
}

/// Whether a counted repetition stands behind an opening brace.
fn repeats(rest: &str) -> bool {
    let Some((inner, _)) = rest.split_once('}') else { return false };
    let (least, most) = inner.split_once(',').unwrap_or((inner, ""));
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    !least.is_empty() && digits(least) && digits(most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tag::tag_set;

    #[test]
    fn values() {
        use MatchOp::{Eq, Ne, Nre, Re};
        let check = |op, pattern: &str, value: &str, expected: bool| {
            let m = Matcher::new("k", op, pattern).unwrap();
            assert_eq!(m.matches(value), expected, "{op:?} {pattern:?} {value:?}");
            let tags = tag_set(&[("j", "other"), ("k", value)]).unwrap();
            assert_eq!(m.matches_set(&tags), expected, "{op:?} {pattern:?} {tags:?}");
        };
        check(Eq, "a", "a", true);
        check(Eq, "a", "ab", false);
        check(Eq, "", "", true);
        check(Ne, "a", "a", false);
        check(Ne, "a", "", true);
        check(Re, "a|b.*", "a", true);
        check(Re, "a|b.*", "bcd", true);
        check(Re, "a|b.*", "xa", false);
        check(Re, "b", "abc", false);
        check(Re, ".*", "", true);
        check(Re, ".+", "", false);
        check(Re, "a.c", "a\nc", true);
        check(Re, "a{b}|{}", "a{b}", true);
        check(Re, "a{b}|{}", "{}", true);
        check(Re, "a{2}{", "aa{", true);
        check(Re, "\\p{Greek}{x", "\u{3b1}{x", true);
        check(Re, "(?i)A", "a", true);
        check(Re, "\u{e9}.", "\u{e9}\u{1f600}", true);
        check(Nre, "a.*", "b", true);
        check(Nre, "a.*", "abc", false);
        check(Nre, "", "", false);
    }

    #[test]
    fn values_and_prefixes_are_seen() {
        use MatchOp::{Eq, Ne, Nre, Re};
        let check = |op, pattern: &str, values: Option<&[&str]>, prefix: &str| {
            let m = Matcher::new("k", op, pattern).unwrap();
            let found = m.values();
            let found = found.as_ref().map(|v| v.iter().map(|c| &**c).collect::<Vec<_>>());
            assert_eq!((found.as_deref(), &*m.prefix()), (values, prefix), "{op:?} {pattern:?}");
            for value in values.unwrap_or_default() {
                assert!(m.matches(value), "{op:?} {pattern:?} {value:?}");
            }
        };
        check(Eq, "a.b", Some(&["a.b"]), "a.b");
        check(Ne, "a", None, "");
        check(Nre, "a|b", None, "");
        check(Re, "a|bc", Some(&["a", "bc"]), "");
        check(Re, "(a|b\\.c|)", Some(&["a", "b.c", ""]), "");
        check(Re, "(?:a|b)", Some(&["a", "b"]), "");
        check(Re, "a\\-b", Some(&["a-b"]), "a-b");
        check(Re, "10\\.0\\..+", None, "10.0.");
        check(Re, "ab*", None, "a");
        check(Re, "ab?c", None, "a");
        check(Re, "ab{0,2}", None, "a");
        check(Re, "ab+", None, "ab");
        check(Re, "\u{e9}\u{fc}*", None, "\u{e9}");
        check(Re, "a(b|c)", None, "");
        check(Re, "(a)(b)", None, "");
        check(Re, "(?i)a", None, "");
        check(Re, "(?i:a)", None, "");
        check(Re, "ab\\d", None, "ab");
        check(Re, "a^b", None, "a");
        check(Re, "(a|b).*", None, "");
        check(Re, "", Some(&[""]), "");
    }

    #[test]
    fn kept_patterns_are_bounded() {
        let mut kept = Kept::default();
        let regex = Regex::new("a").unwrap();
        for i in 0..3 * KEPT_MAX {
            assert!(kept.get(&i.to_string()).is_none());
            kept.put(&i.to_string(), regex.clone());
            assert!(kept.get("0").is_some(), "what is in use stays");
        }
        assert_eq!(kept.patterns.len(), KEPT_MAX);
        assert!(kept.get("1").is_none() && kept.get(&(3 * KEPT_MAX - 1).to_string()).is_some());
        // Too large to be kept, and compiled all the same.
        let large = anchored(r"\pL{50}").unwrap();
        assert!(large.is_match(&"é".repeat(50)) && KEPT.lock().get(r"\pL{50}").is_none());
    }

    #[test]
    fn the_patterns_of_a_request_are_bounded() {
        let large = Matcher::new("k", MatchOp::Re, r"\pL{50}").unwrap();
        let (mut patterns, most) = (Patterns::default(), PROGRAMS_BYTES_MAX / PROGRAM_BYTES_MAX);
        for _ in 0..most {
            patterns.add(&large).unwrap();
            patterns.add(&Matcher::equal("k", "v")).unwrap();
        }
        let error = patterns.anchored("a").unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::LimitExceeded);
        assert!(error.to_string().contains("of 65 MiB when compiled; at most 64 MiB"), "{error}");
        let mut patterns = Patterns::default();
        assert!((0..PROGRAMS_BYTES_MAX / KEPT_BYTES).all(|i| patterns.anchored(&i.to_string()).is_ok()));
    }

    #[test]
    fn bad_patterns() {
        for pattern in ["(", "a{99999999}", "[", "\\8", &"a".repeat(PATTERN_BYTES_MAX + 1)] {
            let error = Matcher::new("k", MatchOp::Re, pattern).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::Invalid, "{error}");
        }
        Matcher::new("k", MatchOp::Eq, "(").unwrap();
    }

    #[test]
    fn stored_form() {
        let check = |op, value: &str, text: &str| {
            let m = Matcher::new("k", op, value).unwrap();
            assert_eq!(serde_json::to_string(&m).unwrap(), text);
            assert_eq!(serde_json::from_str::<Matcher>(text).unwrap(), m);
        };
        check(MatchOp::Eq, "a\"b", r#"["k","=","a\"b"]"#);
        check(MatchOp::Ne, "", r#"["k","!=",""]"#);
        check(MatchOp::Re, "a|b", r#"["k","=~","a|b"]"#);
        check(MatchOp::Nre, "x.*", r#"["k","!~","x.*"]"#);
        for bad in [r#"["k","=~","("]"#, r#"["k","~","a"]"#, r#"["k","="]"#] {
            assert!(serde_json::from_str::<Matcher>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn equal_matchers_hash_alike() {
        let m = |op, value: &str| Matcher::new("k", op, value).unwrap();
        assert_eq!(m(MatchOp::Re, "a"), m(MatchOp::Re, "a"));
        assert_ne!(m(MatchOp::Re, "a"), m(MatchOp::Eq, "a"));
        let hash = |m: Matcher| std::hash::BuildHasher::hash_one(&foldhash::fast::FixedState::default(), m);
        assert_eq!(hash(m(MatchOp::Re, "a")), hash(m(MatchOp::Re, "a")));
        assert_ne!(hash(m(MatchOp::Re, "a")), hash(m(MatchOp::Re, "b")));
    }
}
