//! Texts as Go writes and reads them, which the wording of errors and the printed form depend on: quoted strings,
//! floats, numbers and durations.

/// A quoted text, as `%q` prints it.
pub(crate) fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    quote_into(&mut out, text);
    out
}

/// As [`quote`], appended.
pub(crate) fn quote_into(out: &mut String, text: &str) {
    out.push('"');
    text.chars().for_each(|c| escaped(out, c, '"'));
    out.push('"');
}

/// As [`quote`] for what may not be a text.
pub(crate) fn quote_bytes(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut out = String::from("\"");
    for chunk in bytes.utf8_chunks() {
        chunk.valid().chars().for_each(|c| escaped(&mut out, c, '"'));
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out.push('"');
    out
}

/// A character in single quotes; none stands for the end of the text.
pub(crate) fn quote_char(c: Option<char>) -> String {
    let mut out = String::from("'");
    escaped(&mut out, c.unwrap_or(char::REPLACEMENT_CHARACTER), '\'');
    out.push('\'');
    out
}

/// A character by number and, when it can be seen, by its look.
pub(crate) fn code_point(c: char) -> String {
    let code = u32::from(c);
    if is_printable(c) { format!("U+{code:04X} '{c}'") } else { format!("U+{code:04X}") }
}

fn escaped(out: &mut String, c: char, quote: char) {
    use std::fmt::Write as _;
    let simple = match c {
        '\x07' => 'a',
        '\x08' => 'b',
        '\x0c' => 'f',
        '\n' => 'n',
        '\r' => 'r',
        '\t' => 't',
        '\x0b' => 'v',
        '\\' => '\\',
        c if c == quote => c,
        c if is_printable(c) => return out.push(c),
        c => {
            let code = u32::from(c);
            let _ = match code {
                0..0x20 | 0x7f => write!(out, "\\x{code:02x}"),
                0..0x1_0000 => write!(out, "\\u{code:04x}"),
                _ => write!(out, "\\U{code:08x}"),
            };
            return;
        }
    };
    out.push('\\');
    out.push(simple);
}

fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return !c.is_ascii_control();
    }
    // The standard library tells by how it prints a text; at the start it also escapes what combines with the character
    // before.
    format!("a{c}").escape_debug().any(|shown| shown == c)
}

/// A float as `strconv.FormatFloat(v, 'f', -1, 64)` prints it.
pub(crate) fn plain_float(v: f64) -> String {
    if v.is_nan() {
        "NaN".into()
    } else if v.is_infinite() {
        if v > 0.0 { "+Inf".into() } else { "-Inf".into() }
    } else {
        format!("{v}")
    }
}

/// A float as `%v` and `%g` print it.
pub(crate) fn float(v: f64) -> String {
    if !v.is_finite() {
        return plain_float(v);
    }
    let exponent = format!("{v:e}");
    let Some((mantissa, e)) = exponent.split_once('e') else { return exponent };
    let e: i32 = e.parse().unwrap_or(0);
    if (-4..6).contains(&e) {
        return format!("{v}");
    }
    format!("{mantissa}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs())
}

/// A float as `%f` prints it.
pub(crate) fn fixed_float(v: f64) -> String {
    if v.is_finite() { format!("{v:.6}") } else { plain_float(v) }
}

/// The number that a text of the lexer's number form means, or the words of `strconv` for why it is none.
pub(crate) fn parse_number(text: &str) -> Result<f64, String> {
    if let Some(integer) = parse_integer(text) {
        return Ok(integer as f64);
    }
    let failed = |why: &str| Err(format!("strconv.ParseFloat: parsing {}: {why}", quote(text)));
    if text.eq_ignore_ascii_case("inf") {
        return Ok(f64::INFINITY);
    }
    if text.eq_ignore_ascii_case("nan") {
        return Ok(f64::NAN);
    }
    if !underscores_separate(text) || is_hex(text) {
        return failed("invalid syntax");
    }
    let v: Result<f64, _> = if text.contains('_') { text.replace('_', "").parse() } else { text.parse() };
    match v {
        Ok(v) if v.is_finite() => Ok(v),
        Ok(_) => failed("value out of range"),
        Err(_) => failed("invalid syntax"),
    }
}

fn is_hex(text: &str) -> bool {
    text.starts_with("0x") || text.starts_with("0X")
}

/// A whole number that fits, in decimal, in hexadecimal after `0x`, in octal after `0`.
fn parse_integer(text: &str) -> Option<i64> {
    let (digits, base) = if is_hex(text) {
        (&text[2..], 16)
    } else if text.len() > 1 && text.starts_with('0') {
        (&text[1..], 8)
    } else {
        (text, 10)
    };
    if !text.contains('_') {
        return i64::from_str_radix(digits, base).ok();
    }
    if !underscores_separate(text) {
        return None;
    }
    i64::from_str_radix(&digits.replace('_', ""), base).ok()
}

/// Underscores stand between digits, or between the base and a digit.
fn underscores_separate(text: &str) -> bool {
    let hex = is_hex(text);
    let (mut digit, mut underscore) = (false, false);
    for (i, b) in text.bytes().enumerate() {
        let prefix = hex && i < 2;
        if b == b'_' {
            if !digit {
                return false;
            }
            (digit, underscore) = (false, true);
        } else if prefix || b.is_ascii_digit() || (hex && b.is_ascii_hexdigit()) {
            (digit, underscore) = (true, false);
        } else {
            if underscore {
                return false;
            }
            (digit, underscore) = (false, false);
        }
    }
    !underscore
}

/// Units of durations from large to small, in milliseconds.
const UNITS: [(&str, i64); 7] = [
    ("y", 365 * 86_400_000),
    ("w", 7 * 86_400_000),
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1000),
    ("ms", 1),
];

/// A duration such as `1h30m` in milliseconds, or why it is none.
pub(crate) fn parse_duration(text: &str) -> Result<i64, String> {
    let invalid = || format!("not a valid duration string: {}", quote(text));
    let out_of_range = || "duration out of range".to_owned();
    let (mut rest, mut total, mut units) = (text, 0i64, &UNITS[..]);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).filter(|end| *end > 0).ok_or_else(invalid)?;
        let (number, tail) = rest.split_at(digits);
        let (unit, tail) = tail.split_at(tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len()));
        rest = tail;
        let number: u64 = number.parse().map_err(|_| invalid())?;
        if !UNITS.iter().any(|(name, _)| *name == unit) {
            return Err(format!("unknown unit {} in duration {}", quote(unit), quote(text)));
        }
        let at = units.iter().position(|(name, _)| *name == unit).ok_or_else(invalid)?;
        let ms = i64::try_from(number).ok().and_then(|n| n.checked_mul(units[at].1)).ok_or_else(out_of_range)?;
        total = total.checked_add(ms).filter(|ms| *ms <= i64::MAX / 1_000_000).ok_or_else(out_of_range)?;
        units = &units[at + 1..];
    }
    if text.is_empty() { Err("empty duration string".to_owned()) } else { Ok(total) }
}

/// Appends a duration that is not negative, such as `1h30m`.
pub(crate) fn duration_into(out: &mut String, mut ms: i64) {
    if ms == 0 {
        return out.push_str("0s");
    }
    for (unit, length) in UNITS {
        // Weeks and years only when nothing remains: 90d reads easier than 12w6d.
        let whole = matches!(unit, "y" | "w");
        if ms >= length && !(whole && ms % length != 0) {
            out.push_str(&format!("{}{unit}", ms / length));
            ms %= length;
        }
    }
}

/// The text that a quoted one of valid form means.
pub(crate) fn unquote(quoted: &str) -> Result<String, String> {
    let not_text = |_| format!("error unquoting string {}: it is not valid UTF-8", quote(quoted));
    String::from_utf8(unquote_bytes(quoted)?).map_err(not_text)
}

/// As [`unquote`]; escapes may give bytes that are no text.
pub(crate) fn unquote_bytes(quoted: &str) -> Result<Vec<u8>, String> {
    let failed = |why: &str| Err(format!("error unquoting string {}: {why}", quote(quoted)));
    let inner = &quoted[1..quoted.len() - 1];
    if quoted.starts_with('`') || !inner.contains('\\') {
        return Ok(inner.as_bytes().to_owned());
    }
    // Escapes may give bytes that are UTF-8 only together.
    let mut bytes = Vec::with_capacity(inner.len());
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            continue;
        }
        let Some(kind) = chars.next() else { return failed("invalid syntax") };
        let (digits, base, first) = match kind {
            'x' => (2, 16, 0),
            'u' => (4, 16, 0),
            'U' => (8, 16, 0),
            '0'..='7' => (2, 8, kind.to_digit(8).unwrap_or(0)),
            other => {
                bytes.push(match other {
                    'a' => 7,
                    'b' => 8,
                    'f' => 12,
                    'n' => b'\n',
                    'r' => b'\r',
                    't' => b'\t',
                    'v' => 11,
                    '\\' | '"' | '\'' => other as u8,
                    _ => return failed("invalid syntax"),
                });
                continue;
            }
        };
        let mut code = first;
        for _ in 0..digits {
            let Some(digit) = chars.next().and_then(|c| c.to_digit(base)) else { return failed("invalid syntax") };
            code = code * base + digit;
        }
        match (kind, char::from_u32(code)) {
            ('u' | 'U', Some(c)) => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            ('u' | 'U', None) => return failed("invalid syntax"),
            _ => bytes.push(code as u8),
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let check = |text: &str, expected: Option<f64>| {
            let got = parse_number(text).ok();
            assert!(
                got == expected || got.zip(expected).is_some_and(|(a, b)| a.is_nan() && b.is_nan()),
                "{text}: {got:?}"
            );
        };
        check("1", Some(1.0));
        check("0x1F", Some(31.0));
        check("0x_1f", Some(31.0));
        check("0755", Some(493.0));
        check("089", Some(89.0));
        check("1_000", Some(1000.0));
        check("1_2.3_4e1_1", Some(12.34e11));
        check("0_7", Some(7.0));
        check(".5", Some(0.5));
        check("5.", Some(5.0));
        check("1e3", Some(1000.0));
        check("iNf", Some(f64::INFINITY));
        check("NAN", Some(f64::NAN));
        check("18446744073709551616", Some(18446744073709551616.0));
        check("1e400", None);
        check("0xffffffffffffffffff", None);
        check("1__0", None);
        check("1_", None);
    }

    #[test]
    fn durations() {
        let check =
            |text: &str, expected: Result<i64, &str>| assert_eq!(parse_duration(text), expected.map_err(str::to_owned));
        check("1h30m", Ok(5_400_000));
        check("1y2w3d4h5m6s7ms", Ok((((365 + 14 + 3) * 24 + 4) * 3600 + 5 * 60 + 6) * 1000 + 7));
        check("5m1h", Err("not a valid duration string: \"5m1h\""));
        check("5m1m", Err("not a valid duration string: \"5m1m\""));
        check("5y1hs", Err("unknown unit \"hs\" in duration \"5y1hs\""));
        check("300y", Err("duration out of range"));
        let shown = |ms: i64| {
            let mut out = String::new();
            duration_into(&mut out, ms);
            out
        };
        assert_eq!(shown(0), "0s");
        assert_eq!(shown(90 * 86_400_000), "90d");
        assert_eq!(shown(14 * 86_400_000), "2w");
        assert_eq!(shown(5_400_250), "1h30m250ms");
    }

    #[test]
    fn texts() {
        assert_eq!(quote("a\"\n\u{e9}\u{7f}\u{a0}\u{301}"), "\"a\\\"\\n\u{e9}\\x7f\\u00a0\u{301}\"");
        assert_eq!(quote_char(Some('\'')), "'\\''");
        assert_eq!(code_point('c'), "U+0063 'c'");
        let check = |quoted: &str, expected: &str| assert_eq!(unquote(quoted).as_deref(), Ok(expected));
        check("'a\\n\\x41\\101\\u00e9\\U0001f980\\''", "a\nAA\u{e9}\u{1f980}'");
        check("\"\\xe2\\x82\\xac\"", "\u{20ac}");
        check("`a\\n`", "a\\n");
        assert!(unquote("\"\\xff\"").is_err());
        assert_eq!(unquote_bytes("\"a\\xffz\"").as_deref(), Ok(&b"a\xffz"[..]));
        assert_eq!(quote_bytes(b"a\xff\"z"), "\"a\\xff\\\"z\"");
    }

    #[test]
    fn floats() {
        for (v, expected) in [
            (1e21, "1e+21"),
            (1234567.0, "1.234567e+06"),
            (123456.0, "123456"),
            (0.5, "0.5"),
            (1e-7, "1e-07"),
            (0.0, "0"),
        ] {
            assert_eq!(float(v), expected);
        }
        assert_eq!(plain_float(1e21), "1000000000000000000000");
        assert_eq!(fixed_float(f64::INFINITY), "+Inf");
        assert_eq!(fixed_float(0.5), "0.500000");
    }
}
