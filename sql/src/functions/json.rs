//! The operators of PostgreSQL's type `json` on text: `->`, `->>`, `#>`, `#>>`, `?` and `@>`.
//!
//! A part of a text is the bytes that it has there, so numbers keep their digits and members their order, as with `json`
//! (not `jsonb`). Nothing is built: a text is walked until the part is found, and skipped without recursion. What is no
//! JSON up to there is null, since a column of logs need not be JSON in every row.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, StringBuilder};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Int64Type};
use datafusion::common::ScalarValue;
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDFImpl, Signature, Volatility};
use serde_json::Value;

/// The functions by the names that PostgreSQL's catalog has for the operators.
pub const FUNCTIONS: [(&str, Operator); 6] = [
    ("json_object_field", Operator::Part { text: false }),
    ("json_object_field_text", Operator::Part { text: true }),
    ("json_extract_path", Operator::Path { text: false }),
    ("json_extract_path_text", Operator::Path { text: true }),
    ("jsonb_exists", Operator::Exists),
    ("jsonb_contains", Operator::Contains),
];

/// What an operator does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operator {
    /// The member or element with a name or number; its text instead of its JSON.
    Part {
        /// Whether the text is wanted.
        text: bool,
    },
    /// The part at a path; its text instead of its JSON.
    Path {
        /// Whether the text is wanted.
        text: bool,
    },
    /// Whether there is a member, or an element that is a text.
    Exists,
    /// Whether the first contains the second.
    Contains,
}

/// One of the functions.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct JsonFunction {
    name: &'static str,
    operator: Operator,
    signature: Signature,
}

impl JsonFunction {
    /// The function with this name.
    pub fn new(name: &'static str, operator: Operator) -> Self {
        Self { name, operator, signature: Signature::user_defined(Volatility::Immutable) }
    }
}

fn is_text(kind: &DataType) -> bool {
    matches!(kind, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Null)
}

impl ScalarUDFImpl for JsonFunction {
    fn name(&self) -> &str {
        self.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, given: &[DataType]) -> Result<Vec<DataType>> {
        let wrong = || DataFusionError::Plan(format!("{} does not take {given:?}", self.name));
        let [json, rest @ ..] = given else { return Err(wrong()) };
        let right = match self.operator {
            Operator::Part { .. } => rest.len() == 1 && (is_text(&rest[0]) || rest[0].is_integer()),
            Operator::Path { .. } => rest.iter().all(is_text),
            Operator::Exists | Operator::Contains => rest.len() == 1 && is_text(&rest[0]),
        };
        if !right || !is_text(json) {
            return Err(wrong());
        }
        let kind = |k: &DataType| if k.is_integer() { DataType::Int64 } else { DataType::Utf8 };
        Ok(given.iter().map(kind).collect())
    }

    fn return_type(&self, _given: &[DataType]) -> Result<DataType> {
        Ok(match self.operator {
            Operator::Part { .. } | Operator::Path { .. } => DataType::Utf8,
            Operator::Exists | Operator::Contains => DataType::Boolean,
        })
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let constant = args.args.iter().all(|a| matches!(a, ColumnarValue::Scalar(_)));
        let rows = if constant { 1 } else { args.number_rows };
        let columns = args
            .args
            .iter()
            .map(|a| match a.data_type() {
                DataType::Int64 => a.to_array(rows),
                _ => Ok(cast(&a.to_array(rows)?, &DataType::Utf8)?),
            })
            .collect::<Result<Vec<ArrayRef>>>()?;
        let result = self.results(&columns, rows);
        Ok(if constant {
            ColumnarValue::Scalar(ScalarValue::try_from_array(&result, 0)?)
        } else {
            ColumnarValue::Array(result)
        })
    }
}

impl JsonFunction {
    fn results(&self, columns: &[ArrayRef], rows: usize) -> ArrayRef {
        let valid = |row: usize| columns.iter().all(|c| c.is_valid(row));
        let text = |i: usize, row: usize| columns[i].as_string::<i32>().value(row);
        match self.operator {
            Operator::Part { text: as_text } | Operator::Path { text: as_text } => {
                let mut out = StringBuilder::new();
                for row in 0..rows {
                    let part = valid(row).then(|| self.part(columns, row)).flatten();
                    match part {
                        Some(part) if as_text => out.append_option(text_of(part)),
                        part => out.append_option(part),
                    }
                }
                Arc::new(out.finish())
            }
            Operator::Exists => {
                let exists = |row: usize| valid(row).then(|| exists(text(0, row), text(1, row)));
                Arc::new((0..rows).map(exists).collect::<BooleanArray>())
            }
            Operator::Contains => {
                // The right side is mostly a constant.
                let mut last: Option<(&str, Option<Value>)> = None;
                let contains = (0..rows).map(|row| {
                    if !valid(row) {
                        return None;
                    }
                    let right = text(1, row);
                    if last.as_ref().is_none_or(|(known, _)| *known != right) {
                        last = Some((right, serde_json::from_str(right).ok()));
                    }
                    let right = last.as_ref().and_then(|(_, value)| value.as_ref())?;
                    let left: Value = serde_json::from_str(text(0, row)).ok()?;
                    Some(contains(&left, right, true))
                });
                Arc::new(contains.collect::<BooleanArray>())
            }
        }
    }

    fn part<'a>(&self, columns: &'a [ArrayRef], row: usize) -> Option<&'a str> {
        let mut part = columns[0].as_string::<i32>().value(row);
        for step in &columns[1..] {
            part = match step.data_type() {
                DataType::Int64 => element(part, step.as_primitive::<Int64Type>().value(row))?,
                _ => {
                    let step = step.as_string::<i32>().value(row);
                    match self.operator {
                        // A step of a path is a number where it comes to an array.
                        Operator::Path { .. } if part.trim_start().starts_with('[') => {
                            element(part, step.parse().ok()?)?
                        }
                        _ => member(part, step)?,
                    }
                }
            };
        }
        Walk::new(part).value()
    }
}

/// The steps of a path in PostgreSQL's form of an array of texts, `{a,1,"b c"}`.
///
/// # Errors
/// For what is no such form.
pub fn path(text: &str) -> Result<Vec<String>> {
    let wrong = || DataFusionError::Plan(format!("{text:?} is no path of JSON; {{a,b,0}} is one"));
    let inner = text.trim().strip_prefix('{').and_then(|t| t.strip_suffix('}')).ok_or_else(wrong)?;
    let (mut steps, mut step, mut quoted, mut was_quoted) = (Vec::new(), String::new(), false, false);
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => step.push(chars.next().ok_or_else(wrong)?),
            '"' if quoted => quoted = false,
            '"' if step.trim().is_empty() && !was_quoted => {
                step.clear();
                (quoted, was_quoted) = (true, true);
            }
            '"' => return Err(wrong()),
            ',' if !quoted => {
                let done = std::mem::take(&mut step);
                steps.push(if std::mem::take(&mut was_quoted) { done } else { done.trim().to_owned() });
            }
            '{' | '}' if !quoted => return Err(wrong()),
            // After a quoted step only blanks may come.
            c if was_quoted && !quoted => {
                if !c.is_whitespace() {
                    return Err(wrong());
                }
            }
            c => step.push(c),
        }
    }
    if quoted {
        return Err(wrong());
    }
    if !inner.trim().is_empty() {
        steps.push(if was_quoted { step } else { step.trim().to_owned() });
    }
    Ok(steps)
}

/// The text of a value: a text without its quotes, nothing for null, else its JSON.
fn text_of(part: &str) -> Option<std::borrow::Cow<'_, str>> {
    if part == "null" {
        return None;
    }
    Some(if part.starts_with('"') { unquoted(part)? } else { part.into() })
}

fn unquoted(part: &str) -> Option<std::borrow::Cow<'_, str>> {
    let inner = part.get(1..part.len().checked_sub(1)?)?;
    if inner.contains('\\') {
        return serde_json::from_str::<String>(part).ok().map(Into::into);
    }
    Some(inner.into())
}

/// A walk over a text, without recursion.
struct Walk<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Walk<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    fn peek(&mut self) -> Option<u8> {
        let bytes = self.text.as_bytes();
        while matches!(bytes.get(self.at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
        bytes.get(self.at).copied()
    }

    fn take(&mut self, wanted: u8) -> Option<()> {
        (self.peek()? == wanted).then(|| self.at += 1)
    }

    /// A text with its quotes.
    fn string(&mut self) -> Option<&'a str> {
        let bytes = self.text.as_bytes();
        self.take(b'"')?;
        let start = self.at - 1;
        loop {
            match bytes.get(self.at)? {
                b'"' => break,
                b'\\' => self.at += 2,
                _ => self.at += 1,
            }
        }
        self.at += 1;
        self.text.get(start..self.at)
    }

    /// Any value.
    fn value(&mut self) -> Option<&'a str> {
        let first = self.peek()?;
        let start = self.at;
        match first {
            b'"' => return self.string(),
            b'{' | b'[' => {
                let mut depth = 0usize;
                loop {
                    match self.peek()? {
                        b'"' => {
                            self.string()?;
                            continue;
                        }
                        b'{' | b'[' => depth += 1,
                        b'}' | b']' => depth -= 1,
                        _ => {}
                    }
                    self.at += 1;
                    if depth == 0 {
                        break;
                    }
                }
            }
            _ => {
                let scalar = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'+' | b'.');
                self.at += self.text.as_bytes()[start..].iter().take_while(|b| scalar(b)).count();
            }
        }
        self.text.get(start..self.at).filter(|v| !v.is_empty())
    }
}

fn member<'a>(json: &'a str, name: &str) -> Option<&'a str> {
    let mut walk = Walk::new(json);
    walk.take(b'{')?;
    let mut found = None;
    loop {
        if walk.peek()? == b'}' {
            return found;
        }
        let key = walk.string()?;
        walk.take(b':')?;
        let value = walk.value()?;
        // Of several members with one name the last counts.
        if unquoted(key)? == name {
            found = Some(value);
        }
        match walk.peek()? {
            b',' => walk.at += 1,
            b'}' => return found,
            _ => return None,
        }
    }
}

fn elements<'a>(json: &'a str, mut visit: impl FnMut(&'a str) -> bool) -> Option<()> {
    let mut walk = Walk::new(json);
    walk.take(b'[')?;
    loop {
        if walk.peek()? == b']' {
            return Some(());
        }
        if !visit(walk.value()?) {
            return Some(());
        }
        match walk.peek()? {
            b',' => walk.at += 1,
            b']' => return Some(()),
            _ => return None,
        }
    }
}

/// The element with this number, from the end when it is negative.
fn element(json: &str, index: i64) -> Option<&str> {
    let mut wanted = index;
    if index < 0 {
        let mut count = 0;
        elements(json, |_| {
            count += 1;
            true
        })?;
        wanted += count;
    }
    let (mut at, mut found) = (0, None);
    elements(json, |value| {
        if at == wanted {
            found = Some(value);
        }
        at += 1;
        found.is_none()
    })?;
    found
}

fn exists(json: &str, name: &str) -> bool {
    let is_name = |value: &str| value.starts_with('"') && unquoted(value).is_some_and(|v| v == name);
    match json.trim_start().as_bytes().first() {
        Some(b'{') => member(json, name).is_some(),
        Some(b'[') => {
            let mut found = false;
            let walked = elements(json, |value| {
                found |= is_name(value);
                !found
            });
            walked.is_some() && found
        }
        _ => is_name(json.trim()),
    }
}

/// Containment as `jsonb` has it: objects member by member, arrays element by element in any order, and at the top an
/// array also contains a scalar.
fn contains(left: &Value, right: &Value, top: bool) -> bool {
    match (left, right) {
        (Value::Object(left), Value::Object(right)) => {
            right.iter().all(|(k, r)| left.get(k).is_some_and(|l| contains(l, r, false)))
        }
        (Value::Array(left), Value::Array(right)) => right.iter().all(|r| left.iter().any(|l| contains(l, r, false))),
        (Value::Array(left), right) if top && !right.is_object() => left.contains(right),
        (Value::Number(left), Value::Number(right)) => left == right || left.as_f64() == right.as_f64(),
        (left, right) => left == right,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_the_bytes_that_they_are() {
        let json = r#" {"a": {"b":[1, 2.50,"x\"y", null ]}, "n":12345678901234567890123, "a\u0062":true, "n": -1e5} "#;
        let check = |got: Option<&str>, expected: Option<&str>| assert_eq!(got, expected);
        check(member(json, "a"), Some(r#"{"b":[1, 2.50,"x\"y", null ]}"#));
        check(member(json, "n"), Some("-1e5"));
        check(member(json, "ab"), Some("true"));
        check(member(json, "c"), None);
        let list = member(member(json, "a").unwrap(), "b").unwrap();
        check(element(list, 0), Some("1"));
        check(element(list, 1), Some("2.50"));
        check(element(list, -1), Some("null"));
        check(element(list, 4), None);
        check(element(list, -5), None);
        assert_eq!(text_of(element(list, 2).unwrap()).as_deref(), Some("x\"y"));
        assert_eq!(text_of("null"), None);
    }

    #[test]
    fn what_is_no_json_has_no_parts_and_ends_no_walk() {
        for bad in
            ["", "{", "{\"a", "{\"a\"", "{\"a\":", "{\"a\":}", "{\"a\":1", "{\"a\\", "nonsense", "[1,2}", "{\"a\" 1}"]
        {
            assert_eq!(member(bad, "b"), None, "{bad}");
            assert_eq!(element(bad, 5), None, "{bad}");
            assert!(!exists(bad, "b"), "{bad}");
        }
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(member(&deep, "a").map(str::len), Some(200_000));
    }

    #[test]
    fn existence_and_containment() {
        assert!(exists(r#"{"a":1}"#, "a") && !exists(r#"{"a":1}"#, "1"));
        assert!(exists(r#"["a","b"]"#, "b") && !exists("[1]", "1") && exists("\"a\"", "a"));
        let check = |left: &str, right: &str, expected: bool| {
            let value = |text: &str| serde_json::from_str::<Value>(text).unwrap();
            assert_eq!(contains(&value(left), &value(right), true), expected, "{left} @> {right}");
        };
        check(r#"{"a":1,"b":{"c":[1,2]}}"#, r#"{"b":{"c":[2]}}"#, true);
        check(r#"{"a":1}"#, r#"{"a":1.0}"#, true);
        check(r#"{"a":1}"#, r#"{"a":2}"#, false);
        check("[1,2]", "1", true);
        check("[[1,2]]", "[1]", false);
        check("{}", "{}", true);
    }

    #[test]
    fn paths_are_arrays_of_texts() {
        let check = |text: &str, expected: &[&str]| assert_eq!(path(text).unwrap(), expected, "{text}");
        check("{a,1,b}", &["a", "1", "b"]);
        check("{ a , \"b c\" ,\"d\\\"e\"}", &["a", "b c", "d\"e"]);
        check("{}", &[]);
        for bad in ["a", "{a", "{\"a}", "{{a}}", "{a\"b\"}", "{\"a\"b}"] {
            assert!(path(bad).is_err(), "{bad}");
        }
    }
}
