//! Writing JSON straight into bytes, without a value tree and without a text per number.
//!
//! Numbers are written as Prometheus writes them: the shortest digits that read back to the same bits, without an
//! exponent from 1e-6 up to 1e21 and with one of at least two digits outside of that; times as seconds with at most
//! three decimals.

use crate::histogram::FloatHistogram;
use crate::labels::Pairs;

/// A sample's value between quotes.
pub(super) fn value(out: &mut Vec<u8>, v: f64) {
    out.push(b'"');
    number(out, v);
    out.push(b'"');
}

/// A number without quotes; not JSON for NaN and the infinities.
pub(super) fn number(out: &mut Vec<u8>, v: f64) {
    let whole = v as i64;
    // Below 2^53 every digit of an integer is one of its shortest digits.
    if whole as f64 == v && whole.unsigned_abs() < 1 << 53 && (whole != 0 || v.is_sign_positive()) {
        out.extend_from_slice(itoa::Buffer::new().format(whole).as_bytes());
    } else if v.is_finite() {
        fraction(out, v);
    } else if v.is_nan() {
        out.extend_from_slice(b"NaN");
    } else {
        out.extend_from_slice(if v > 0.0 { b"+Inf" } else { b"-Inf" });
    }
}

/// A finite number that is not a small integer. The formatter's own text is right between 1e-5 and 1e16; beyond, it
/// has an exponent, which is written out as digits up to Prometheus's bounds.
fn fraction(out: &mut Vec<u8>, v: f64) {
    let mut buffer = zmij::Buffer::new();
    let text = buffer.format_finite(v);
    let Some((mantissa, exponent)) = text.split_once('e') else {
        out.extend_from_slice(text.strip_suffix(".0").unwrap_or(text).as_bytes());
        return;
    };
    let (below_one, exponent) = match exponent.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, exponent.trim_start_matches('+')),
    };
    if !(1e-6..1e21).contains(&v.abs()) {
        out.extend_from_slice(mantissa.as_bytes());
        out.extend_from_slice(if below_one { b"e-" } else { b"e+" });
        if exponent.len() < 2 {
            out.push(b'0');
        }
        out.extend_from_slice(exponent.as_bytes());
        return;
    }
    if v < 0.0 {
        out.push(b'-');
    }
    let zeros = exponent.bytes().fold(0, |n, b| n * 10 + usize::from(b - b'0'));
    let digits = mantissa.bytes().filter(u8::is_ascii_digit);
    if below_one {
        out.extend_from_slice(b"0.");
        out.resize(out.len() + zeros - 1, b'0');
        out.extend(digits);
    } else {
        // At most 17 digits, and the exponent is 16 or more: none is behind the point.
        let whole = out.len() + zeros + 1;
        out.extend(digits);
        out.resize(whole, b'0');
    }
}

/// A time in milliseconds since the epoch as seconds.
pub(super) fn time(out: &mut Vec<u8>, ms: i64) {
    if ms < 0 {
        out.push(b'-');
    }
    let ms = ms.unsigned_abs();
    out.extend_from_slice(itoa::Buffer::new().format(ms / 1000).as_bytes());
    let millis = (ms % 1000) as u16;
    if millis != 0 {
        let digit = |n: u16| b'0' + (n % 10) as u8;
        out.extend_from_slice(&[b'.', digit(millis / 100), digit(millis / 10), digit(millis)]);
    }
}

/// An integer.
pub(super) fn integer(out: &mut Vec<u8>, v: u64) {
    out.extend_from_slice(itoa::Buffer::new().format(v).as_bytes());
}

/// A quoted text.
pub(super) fn text(out: &mut Vec<u8>, text: &str) {
    utf8(out, text.as_bytes());
}

/// A quoted text from bytes that are known to be UTF-8.
pub(super) fn utf8(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(b'"');
    // One branch-free pass over the bytes tells that nothing needs escaping, as in nearly every label.
    if !bytes.iter().fold(false, |any, b| any | special(*b)) {
        out.extend_from_slice(bytes);
    } else {
        escaped(out, bytes);
    }
    out.push(b'"');
}

fn special(b: u8) -> bool {
    (b < 0x20) | (b == b'"') | (b == b'\\')
}

fn escaped(out: &mut Vec<u8>, bytes: &[u8]) {
    let mut from = 0;
    for (i, &b) in bytes.iter().enumerate().filter(|(_, b)| special(**b)) {
        out.extend_from_slice(&bytes[from..i]);
        from = i + 1;
        match b {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            _ => {
                let hex = |n: u8| b"0123456789abcdef"[usize::from(n & 15)];
                out.extend_from_slice(&[b'\\', b'u', b'0', b'0', hex(b >> 4), hex(b)]);
            }
        }
    }
    out.extend_from_slice(&bytes[from..]);
}

/// A canonical tag set as an object.
pub(super) fn labels(out: &mut Vec<u8>, canonical: &[u8]) {
    out.push(b'{');
    for (i, pair) in Pairs::new(canonical).enumerate() {
        if i > 0 {
            out.push(b',');
        }
        utf8(out, pair.name);
        out.push(b':');
        utf8(out, pair.value);
    }
    out.push(b'}');
}

/// A native histogram: `{"count":"..","sum":"..","buckets":[[0,"lower","upper","count"]]}`. A bucket's first number says
/// which bounds belong to it: 0 the upper, 1 the lower, 2 none, 3 both.
pub(super) fn histogram(out: &mut Vec<u8>, h: &FloatHistogram) {
    out.extend_from_slice(br#"{"count":"#);
    value(out, h.count);
    out.extend_from_slice(br#","sum":"#);
    value(out, h.sum);
    let mut buckets = h.populated().peekable();
    if buckets.peek().is_some() {
        out.extend_from_slice(br#","buckets":"#);
        list(out, buckets, |out, b| {
            out.extend_from_slice(match (b.lower_inclusive, b.upper_inclusive) {
                (false, true) => b"[0,",
                (true, false) => b"[1,",
                (false, false) => b"[2,",
                (true, true) => b"[3,",
            });
            for (v, end) in [(b.lower, b','), (b.upper, b','), (b.count, b']')] {
                value(out, v);
                out.push(end);
            }
        });
    }
    out.push(b'}');
}

/// A list; `item` writes one element.
pub(super) fn list<T>(out: &mut Vec<u8>, items: impl IntoIterator<Item = T>, mut item: impl FnMut(&mut Vec<u8>, T)) {
    out.push(b'[');
    for (i, x) in items.into_iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        item(out, x);
    }
    out.push(b']');
}

/// A list of texts.
pub(super) fn texts<'a>(out: &mut Vec<u8>, items: impl IntoIterator<Item = &'a str>) {
    list(out, items, text);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(f: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        f(&mut out);
        String::from_utf8(out).expect("writers write UTF-8")
    }

    #[test]
    fn numbers() {
        let check = |v: f64, expected: &str| assert_eq!(written(|o| number(o, v)), expected, "{v:e}");
        check(0.0, "0");
        check(-0.0, "-0");
        check(1.0, "1");
        check(-1.0, "-1");
        check(0.1, "0.1");
        check(-2.5, "-2.5");
        check(1.5e-3, "0.0015");
        check(1e-5, "0.00001");
        check(1e-6, "0.000001");
        check(-1.25e-6, "-0.00000125");
        check(9.99e-7, "9.99e-07");
        check(1e-7, "1e-07");
        check(-1.5e-10, "-1.5e-10");
        check(5e-324, "5e-324");
        check(1e15, "1000000000000000");
        check(1.5e16, "15000000000000000");
        check(9007199254740991.0, "9007199254740991");
        check(9007199254740992.0, "9007199254740992");
        check(9007199254740994.0, "9007199254740994");
        check(-9223372036854775808.0, "-9223372036854776000");
        check(9223372036854775807.0, "9223372036854776000");
        check(123456789012345680.0, "123456789012345680");
        check(-1e20, "-100000000000000000000");
        check(1e21, "1e+21");
        check(-1.2345e21, "-1.2345e+21");
        check(f64::MAX, "1.7976931348623157e+308");
        check(f64::NAN, "NaN");
        check(f64::from_bits(0x7ff0_0000_0000_0002), "NaN");
        check(f64::INFINITY, "+Inf");
        check(f64::NEG_INFINITY, "-Inf");
        check(1435781430.781, "1435781430.781");
        check(0.30000000000000004, "0.30000000000000004");
        check(2251799813685249.5, "2251799813685249.5");
    }

    #[test]
    fn times() {
        let check = |ms: i64, expected: &str| assert_eq!(written(|o| time(o, ms)), expected);
        check(0, "0");
        check(1, "0.001");
        check(-1, "-0.001");
        check(-1500, "-1.500");
        check(1435781430781, "1435781430.781");
        check(1435781430000, "1435781430");
        check(1435781430050, "1435781430.050");
        check(1435781430999, "1435781430.999");
        check(i64::MIN, "-9223372036854775.808");
        check(i64::MAX, "9223372036854775.807");
    }

    #[test]
    fn texts_are_escaped() {
        let check = |s: &str, expected: &str| assert_eq!(written(|o| text(o, s)), expected);
        check("", r#""""#);
        check("plain", r#""plain""#);
        check("a\"b", r#""a\"b""#);
        check("\\", r#""\\""#);
        check("line\nfeed\r\t", r#""line\nfeed\r\t""#);
        check("\u{1}\u{1f}\u{7f}", "\"\\u0001\\u001f\u{7f}\"");
        check("naïve 🦀", "\"naïve 🦀\"");
    }

    #[test]
    fn label_sets() {
        let tags = catalog::tag::tag_set(&[("__name__", "up"), ("path", "C:\\\"x\"")]).expect("valid labels");
        assert_eq!(written(|o| labels(o, tags.as_bytes())), r#"{"__name__":"up","path":"C:\\\"x\""}"#);
        assert_eq!(written(|o| labels(o, &[])), "{}");
    }

    #[test]
    fn histograms() {
        use crate::histogram::{Bucket, CUSTOM};
        let of = |schema: i32, custom: &[f64]| FloatHistogram {
            schema,
            count: 6.0,
            sum: 3.5,
            positive: vec![
                Bucket { index: 0, count: 1.0 },
                Bucket { index: 1, count: 0.0 },
                Bucket { index: 2, count: 2.0 },
            ],
            custom: custom.into(),
            ..FloatHistogram::default()
        };
        let sides = FloatHistogram {
            zero_threshold: 0.001,
            zero_count: 2.0,
            negative: vec![Bucket { index: 1, count: 1.0 }],
            ..of(0, &[])
        };
        assert_eq!(
            written(|o| histogram(o, &sides)),
            r#"{"count":"6","sum":"3.5","buckets":[[1,"-2","-1","1"],[3,"-0.001","0.001","2"],[0,"0.5","1","1"],[0,"2","4","2"]]}"#
        );
        assert_eq!(
            written(|o| histogram(o, &of(CUSTOM, &[1.0, 5.0]))),
            r#"{"count":"6","sum":"3.5","buckets":[[3,"-Inf","1","1"],[0,"5","+Inf","2"]]}"#
        );
        assert_eq!(written(|o| histogram(o, &FloatHistogram::default())), r#"{"count":"0","sum":"0"}"#);
        let negative = FloatHistogram { zero_threshold: 0.5, zero_count: -1.0, ..FloatHistogram::default() };
        assert_eq!(
            written(|o| histogram(o, &negative)),
            r#"{"count":"0","sum":"0","buckets":[[3,"-0.5","0.5","-1"]]}"#
        );
    }

    proptest! {
        #[test]
        fn any_text_reads_back(s in any::<String>()) {
            let json = written(|o| text(o, &s));
            prop_assert_eq!(serde_json::from_str::<String>(&json).expect("valid JSON"), s);
        }

        #[test]
        fn any_number_reads_back_and_is_as_short_as_display(bits in any::<u64>()) {
            let v = f64::from_bits(bits);
            let text = written(|o| number(o, v));
            if v.is_nan() {
                prop_assert_eq!(text, "NaN");
            } else {
                prop_assert_eq!(text.parse::<f64>().expect("a number").to_bits(), bits);
                if v == 0.0 || (1e-6..1e21).contains(&v.abs()) {
                    // Both are shortest; where two are equally near they may differ in the last digit.
                    prop_assert_eq!(text.len(), format!("{v}").len());
                }
            }
        }

        #[test]
        fn everyday_numbers_have_the_digits_of_display(n in any::<i32>(), scale in 0i32..12, up in any::<bool>()) {
            let v = f64::from(n) * 10f64.powi(if up { scale } else { -scale });
            if v == 0.0 || (1e-6..1e21).contains(&v.abs()) {
                prop_assert_eq!(written(|o| number(o, v)), format!("{v}"));
            }
        }

        #[test]
        fn any_time_reads_back(ms in -9_000_000_000_000i64..9_000_000_000_000) {
            let seconds: f64 = written(|o| time(o, ms)).parse().expect("a number");
            prop_assert_eq!((seconds * 1000.0).round() as i64, ms);
        }
    }
}
