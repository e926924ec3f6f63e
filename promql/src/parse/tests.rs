//! What is accepted, how errors are worded, and that printing and parsing are each other's inverse.

use proptest::prelude::*;

use super::*;
use ast::Kind;

const ALL: Features = Features {
    experimental_functions: true,
    delayed_name_removal: true,
    extended_range_selectors: true,
    binop_fill_modifiers: true,
    type_and_unit_labels: true,
};

fn tree(text: &str) -> Expr {
    parse(text, &ALL).unwrap_or_else(|e| panic!("{text}: {}", e.describe(text)))
}

/// Checks the printed form.
fn check(text: &str, expected: &str) {
    assert_eq!(tree(text).to_string(), expected, "{text}");
    assert_eq!(tree(expected).to_string(), expected, "printed form of {text}");
}

fn check_error_with(features: &Features, text: &str, expected: &str) {
    match parse(text, features) {
        Ok(e) => panic!("{text} is taken as {e}"),
        Err(e) => assert_eq!(e.describe(text), expected, "{text}"),
    }
}

fn check_error(text: &str, expected: &str) {
    check_error_with(&ALL, text, expected);
}

#[test]
fn operators_bind_as_they_should() {
    /// With parentheses around every operator.
    fn explicit(e: &Expr) -> String {
        match &e.kind {
            Kind::Binary(b) => format!("({} {} {})", explicit(&b.left), b.op.symbol(), explicit(&b.right)),
            Kind::Unary(u) => format!("({}{})", if u.negative { '-' } else { '+' }, explicit(&u.expr)),
            _ => e.to_string(),
        }
    }
    let check = |text: &str, expected: &str| assert_eq!(explicit(&tree(text)), expected, "{text}");
    check("a + b * c ^ d", "(a + (b * (c ^ d)))");
    check("a - b - c", "((a - b) - c)");
    check("a ^ b ^ c", "(a ^ (b ^ c))");
    check("-a ^ b", "(-(a ^ b))");
    check("-a * b", "((-a) * b)");
    check("a ^ -b * c", "((a ^ (-b)) * c)");
    check("a or b and c unless d or e", "((a or ((b and c) unless d)) or e)");
    check("a and b == c + d", "(a and (b == (c + d)))");
    check("a > b </ 3 >/ 2", "(((a > b) </ 3) >/ 2)");
    check("a atan2 b % c", "((a atan2 b) % c)");
    check("-a offset 5m", "(-a offset 5m)");
    check("- -1", "1");
    check("2 ^ -1", "(2 ^ -1)");
}

#[test]
fn printed_forms() {
    check("foo", "foo");
    check("sum", "sum");
    check("by + offset", "by + offset");
    check("and and and", "and and and");
    check("fill + fill_left", "fill + fill_left");
    check("a:b:c{}", "a:b:c");
    check("{\"a.b\", 'x.y'=`v`, z=~\"q+\",}", "{\"x.y\"=\"v\",__name__=\"a.b\",z=~\"q+\"}");
    check("up{job!='b\\n', a!~\"x\"} # comment", "up{a!~\"x\",job!=\"b\\n\"}");
    check("up{on=\"x\", sum=\"y\"}", "up{on=\"x\",sum=\"y\"}");
    check("SUM BY(job, on, \"a b\",) (up)", "sum by (job, on, \"a b\") (up)");
    check("sum(up) without ()", "sum without () (up)");
    check("sum by () (up)", "sum(up)");
    check("topk(3, up) by (a)", "topk by (a) (3, up)");
    check("count_values(\"v\", up)", "count_values(\"v\", up)");
    check("a[5m] offset -90s @ end()", "a[5m] @ end() offset -1m30s");
    check("a @ -1.5 offset 1w", "a @ -1.500 offset 1w");
    check("a[300] smoothed", "a[5m] smoothed");
    check("a anchored @ start()", "a @ start() anchored");
    check("sum(a)[1h30m:] offset 0.25", "sum(a)[1h30m:] offset 250ms");
    check("a[step() * 2 + (1m - 5)]", "a[step() * 2 + (1m - 5)]");
    check("a[max_of(range() / 10, 5m):min_of(step(), -1)]", "a[max_of(range() / 10, 5m):min_of(step(), -1)]");
    check("a offset -(2 * 5m) ^ 2", "a offset -(2 * 5m) ^ 2");
    check("a offset (5m) + 3", "a offset (5m) + 3");
    check("a offset step() + b", "a offset step() + b");
    check("a == bool on(x,) group_left(y) b", "a == bool on (x) group_left (y) b");
    check("a * ignoring() group_right b", "a * ignoring () group_right () b");
    check("a + fill(0) b", "a + fill (0) b");
    check("a + on (x) fill_right(-1e9) fill_left(+2m) b", "a + on (x) fill_left (120) fill_right (-1e+09) b");
    check("a or on () b", "a or on () b");
    check("0x1f + 1_000 + 0755 + .5e-3 + Inf + nAN", "31 + 1000 + 493 + 0.0005 + +Inf + NaN");
    check("vector(5m30s)", "vector(5m30s)");
    check("\"\\u00e9\\t'\"", "\"\u{e9}\\t'\"");
    check("info(a, {b=\"\"})", "info(a, {b=\"\"})");
    check("info(a, {})", "info(a, {})");
    check("step() + range() + start() + end() + min_of(1, 2)", "step() + range() + start() + end() + min_of(1, 2)");
    check("+a - +1", "+a - 1");
}

#[test]
fn errors_are_worded_as_in_prometheus() {
    check_error("", "unknown position: parse error: no expression found in input");
    check_error(" # nothing", "1:1: parse error: no expression found in input");
    check_error("sum(a) b", "1:8: parse error: unexpected identifier \"b\"");
    check_error("a +\n  *", "2:3: parse error: unexpected <op:*>");
    check_error("rate(a b)", "1:8: parse error: unexpected identifier \"b\"");
    check_error("avg(rate(a 5m))", "1:12: parse error: unexpected duration \"5m\" in aggregation");
    check_error(
        "a{b 'c'}",
        "1:5: parse error: unexpected string \"'c'\" in label matching, expected label matching operator",
    );
    check_error("a{'b' c}", "1:7: parse error: unexpected identifier \"c\" in label matching, expected \",\" or \"}\"");
    check_error(
        "a{b=\"c\" \"a long text\"}",
        "1:9: parse error: unexpected string \"\\\"a long te\"... in label matching, expected \",\" or \"}\"",
    );
    check_error(
        "a{b=~\"(\"}",
        "1:3: parse error: regular expression \"(\" does not compile: regex parse error:\n    ^(?s:()$\n     ^\nerror: unclosed group",
    );
    check_error("sum by (a, 3) (b)", "1:12: parse error: unexpected number \"3\" in grouping opts, expected label");
    check_error("sum by a (b)", "1:8: parse error: unexpected identifier \"a\" in grouping opts, expected \"(\"");
    check_error(
        "sum by (a b) (c)",
        "1:11: parse error: unexpected identifier \"b\" in grouping opts, expected \",\" or \")\"",
    );
    check_error("sum by ('') (b)", "1:9: parse error: invalid label name for grouping: \"\"");
    check_error(
        "a offset b",
        "1:10: parse error: unexpected identifier \"b\" in offset, expected number, duration, step(), or range()",
    );
    check_error("a @ (1)", "1:5: parse error: unexpected \"(\" in @, expected timestamp");
    check_error("a @ 1 @ 2", "1:1: parse error: @ <timestamp> may not be set multiple times");
    check_error("a[5m:1m", "1:8: parse error: unclosed left bracket");
    check_error(
        "a[5m 1m]",
        "1:6: parse error: unexpected duration \"1m\" in subquery or range, expected \":\" or \"]\"",
    );
    check_error("a[5m:1m 2m]", "1:9: parse error: unexpected duration \"2m\" in subquery selector, expected \"]\"");
    check_error("a[5m:)]", "1:7: parse error: unexpected right parenthesis ')'");
    check_error(
        "a[5m + ]",
        "1:8: parse error: unexpected \"]\" in subquery or range selector, expected number, duration, step(), or range()",
    );
    check_error("a[-step()][5m]", "1:11: parse error: ranges only allowed for vector selectors");
    check_error("a[1m]]", "1:6: parse error: unexpected right bracket ']'");
    check_error("nothing(1) $", "1:1: parse error: unknown function with name \"nothing\"");
    check_error("rate(a[5m],)", "1:11: parse error: trailing commas not allowed in function call args");
    check_error("sum() $", "1:7: parse error: unexpected character: '$'");
    check_error(
        "rate(a)",
        "1:6: parse error: expected type range vector in call to function \"rate\", got instant vector",
    );
    check_error("1 < 2", "1:3: parse error: comparisons between scalars must use BOOL modifier");
    check_error("a and 2", "1:1: parse error: set operator \"and\" not allowed in binary scalar expression");
    check_error("a + fill(1) 2", "1:1: parse error: filling in missing series only allowed between instant vectors");
    check_error("a or fill(1) b", "1:1: parse error: filling in missing series not allowed for set operators");
    check_error(
        "a + on(b) group_left(b) c",
        "1:3: parse error: label \"b\" must not occur in ON and GROUP clause at once",
    );
    check_error("'a' + b", "1:1: parse error: binary expression must contain only scalar and instant vector types");
    check_error("a{__name__='b'}", "1:1: parse error: metric name must not be set twice: \"a\" or \"b\"");
    check_error("round(a, 1, 2)", "1:1: parse error: expected at most 2 argument(s) in call to \"round\", got 3");
    check_error("label_join(a)", "1:1: parse error: expected at least 3 argument(s) in call to \"label_join\", got 1");
    check_error("a[5m:] anchored", "1:1: parse error: anchored modifier is not supported for subqueries");
    check_error("a smoothed anchored", "1:1: parse error: anchored and smoothed modifiers cannot be used together");
    check_error("\"\\q\"", "1:1: parse error: unknown escape sequence U+0071 'q'");
    check_error(
        "1e400",
        "1:1: parse error: error parsing number: strconv.ParseFloat: parsing \"1e400\": value out of range",
    );
    check_error("a[1m1h]", "1:3: parse error: not a valid duration string: \"1m1h\"");
    check_error("a offset 3000y", "1:10: parse error: duration out of range");
}

#[test]
fn what_is_off_is_refused() {
    let check = |text: &str, expected: &str| check_error_with(&Features::default(), text, expected);
    check("1 + mad_over_time(m[5m])", "1:5: parse error: function \"mad_over_time\" is not enabled");
    check(
        "1 + limitk(1, m)",
        "1:5: parse error: limitk() is experimental and must be enabled with --enable-feature=promql-experimental-functions",
    );
    check("1 + rate(m[5m] anchored)", "1:10: parse error: anchored modifier is experimental and not enabled");
    check("1 + m smoothed", "1:5: parse error: smoothed modifier is experimental and not enabled");
    check("1 + (a + fill(1) b)", "1:6: parse error: binop fill modifiers are experimental and not enabled");
    assert!(parse("m[5m + step()] offset -min_of(1, 2m)", &Features::default()).is_ok());
}

#[test]
fn nodes_know_their_places() {
    let text = "sum(rate(a[5m] offset 1m)) + b{c=\"d\"}";
    let e = tree(text);
    let mut seen = Vec::new();
    let mut todo = vec![&e];
    while let Some(e) = todo.pop() {
        seen.push(&text[e.span.start..e.span.end]);
        todo.extend(e.children());
    }
    let expected = [text, "b{c=\"d\"}", "sum(rate(a[5m] offset 1m))", "rate(a[5m] offset 1m)", "a[5m] offset 1m"];
    assert_eq!(seen, expected);
    let lines = Lines::new("a\nbc\n");
    let at = |at| lines.position(at).to_string();
    assert_eq!([at(0), at(1), at(2), at(3), at(5)], ["1:1", "1:2", "2:1", "2:2", "3:1"]);
}

#[test]
fn selectors_alone() {
    let check = |text: &str, expected: Result<&str, &str>| {
        let got = parse_selector(text).map(|s| {
            s.matchers.iter().map(|m| format!("{}{}{} ", m.name(), m.op().symbol(), m.value())).collect::<String>()
        });
        assert_eq!(
            got.as_deref().map(str::trim).map_err(|e| e.describe(text)),
            expected.map_err(str::to_owned),
            "{text}"
        );
    };
    check("up{a!=\"b\"}", Ok("a!=b __name__=up"));
    check("{}", Ok(""));
    check("up offset 5m", Err("1:4: parse error: unexpected <offset>"));
    check("rate(up)", Err("1:5: parse error: unexpected \"(\""));
    check("1", Err("1:1: parse error: unexpected number \"1\""));
}

#[test]
fn long_expressions_are_laid_out() {
    let check = |text: &str, expected: &str| {
        let got = print::within(&tree(text), 20);
        assert_eq!(got, expected, "{text}");
        assert_eq!(tree(&got).to_string(), tree(text).to_string());
    };
    check("sum by (a) (rate(b[5m]))", "sum by (a) (\n  rate(b[5m])\n)");
    check("aaaaaaaaaa + bbbbbbbbbb / on (c) d", "  aaaaaaaaaa\n+\n    bbbbbbbbbb\n  / on (c)\n    d");
    check("-(aaaaaaaaaa + bbbbbbbbbb)", "-(\n    aaaaaaaaaa\n  +\n    bbbbbbbbbb\n)");
    check("max_over_time(rate(aaaaaaaaaa[5m])[1h:1m])", "max_over_time(\n  rate(aaaaaaaaaa[5m])[1h:1m]\n)");
    check("topk(3, aaaaaaaaaaaaaaaa)", "topk(\n  3,\n  aaaaaaaaaaaaaaaa\n)");
    assert_eq!(print::pretty(&tree("a+b")), "a + b");
}

#[test]
fn trees_as_json() {
    let check = |text: &str, expected: serde_json::Value| assert_eq!(json::tree(&tree(text)), expected, "{text}");
    let selector = |name: &str| {
        serde_json::json!({"type": "vectorSelector", "name": name, "offset": 0, "offsetExpr": null, "timestamp": null, "startOrEnd": null, "anchored": false, "smoothed": false,
            "matchers": [{"name": "__name__", "value": name, "type": "="}]})
    };
    check(
        "(-a)",
        serde_json::json!({"type": "parenExpr", "expr": {"type": "unaryExpr", "op": "-", "expr": selector("a")}}),
    );
    check(
        "a / on (x) group_left (y) fill (2) b",
        serde_json::json!({"type": "binaryExpr", "op": "/", "lhs": selector("a"), "rhs": selector("b"), "bool": false,
            "matching": {"card": "many-to-one", "labels": ["x"], "on": true, "include": ["y"], "fillValues": {"lhs": 2.0, "rhs": 2.0}}}),
    );
    check(
        "max_over_time(a[5m:step()] @ 1.5 offset 1m)",
        serde_json::json!({"type": "call", "func": {"name": "max_over_time", "argTypes": ["matrix"], "variadic": 0, "returnType": "vector"},
            "args": [{"type": "subquery", "expr": selector("a"), "range": 300_000, "rangeExpr": null, "offset": 60_000, "offsetExpr": null, "step": 0,
                "stepExpr": {"type": "durationExpr", "op": "step", "lhs": null, "rhs": null, "wrapped": false}, "timestamp": 1500, "startOrEnd": null}]}),
    );
    check(
        "1 > bool 2",
        serde_json::json!({"type": "binaryExpr", "op": ">", "lhs": {"type": "numberLiteral", "val": "1"}, "rhs": {"type": "numberLiteral", "val": "2"}, "bool": true, "matching": null}),
    );
}

#[test]
fn depth_is_bounded() {
    let levels =
        |n: usize, before: &str, middle: &str, after: &str| format!("{}{middle}{}", before.repeat(n), after.repeat(n));
    for (before, middle, after) in [
        ("(", "1", ")"),
        ("abs(", "a", ")"),
        ("-", "a", ""),
        ("1 + ", "1", ""),
        ("2 ^ ", "1", ""),
        ("sum by (a) (", "a", ")"),
        ("", "a", "[5m:]"),
        ("", "a", " or a"),
    ] {
        let text = levels(if after == "[5m:]" { 1 } else { 256 }, before, middle, after);
        let e = tree(&text);
        let printed = e.to_string();
        assert_eq!(tree(&printed).to_string(), printed);
        assert!(!print::pretty(&e).is_empty() && json::tree(&e).is_object());
        if after != "[5m:]" {
            let text = levels(20_000, before, middle, after);
            let e = parse(&text, &ALL).expect_err("too deep");
            assert_eq!(e.message, format!("expression is nested too deeply: at most {DEPTH_MAX} levels"), "{before}");
        }
    }
    for text in [
        format!("a[{}5m{}]", "(".repeat(20_000), ")".repeat(20_000)),
        format!("a[5m{}]", " + 5m".repeat(20_000)),
        format!("a[5m{}]", " ^ 5m".repeat(20_000)),
        format!("a[{}5m]", "-".repeat(20_000)),
        format!("a offset {}5m", "-".repeat(20_000)),
        format!("a[{}1", "min_of(1, ".repeat(20_000)),
    ] {
        assert!(parse(&text, &ALL).is_err_and(|e| e.message.contains("nested too deeply")), "{}", &text[..20]);
    }
}

/// Expressions of all kinds, as texts.
fn expression() -> impl Strategy<Value = String> {
    let duration = prop_oneof![
        Just("5m".to_owned()),
        Just("90".to_owned()),
        Just("step()".to_owned()),
        Just("(1h + 3)".to_owned()),
        Just("max_of(1m, -2 * range())".to_owned()),
    ];
    let leaf = prop_oneof![
        any::<f64>().prop_filter("a literal has no sign", |v| v.is_sign_positive()).prop_map(go::plain_float),
        "[a-z_][a-z0-9_:]{0,4}x",
        "x_[a-z]{0,3}\\{(a=\"[ -~&&[^\"\\\\]]{0,4}\",)?b=~\"[a-z+.]{1,3}\",c!=\"\u{e9}?\"\\}",
        (duration.clone(), duration.clone())
            .prop_map(|(a, b)| format!("(x offset {a} @ 3) + sum_over_time(x[{b}] offset -(5m))")),
        duration.clone().prop_map(|d| format!("rate(x[{d}] smoothed)")),
    ];
    leaf.prop_recursive(6, 40, 3, move |inner| {
        let duration = duration.clone();
        prop_oneof![
            inner.clone().prop_map(|e| format!("({e})")),
            inner.clone().prop_map(|e| format!("-({e})")),
            inner.clone().prop_map(|e| format!("sum without (a, \"b.c\") (vector(1) * ({e}))")),
            inner.clone().prop_map(|e| format!("label_replace(vector(1) * ({e}), \"a\", '$1', `b`, \"(.*)\")")),
            (inner.clone(), duration).prop_map(|(e, d)| format!("max_over_time((vector(1) * ({e}))[{d}:{d}] @ end())")),
            (inner.clone(), inner.clone(), prop::sample::select(vec!["+", "-", "*", "/", "%", "^", "atan2"]))
                .prop_map(|(a, b, op)| format!("{a} {op} {b}")),
            (
                inner.clone(),
                inner,
                prop::sample::select(vec![
                    "and",
                    "or on (a)",
                    "== bool",
                    ">= on (a) group_left (b)",
                    "</",
                    "+ fill_left (3)"
                ])
            )
                .prop_map(|(a, b, op)| format!("(vector(1) * ({a})) {op} (vector(1) * ({b}))")),
        ]
    })
}

proptest! {
    #[test]
    fn printing_is_undone_by_parsing(text in expression()) {
        // Not all that can be written has the right types.
        if let Ok(e) = parse(&text, &ALL) {
            let printed = e.to_string();
            let again = parse(&printed, &ALL);
            prop_assert!(again.is_ok(), "{text}: {printed}: {again:?}");
            prop_assert_eq!(json::tree(&tree(&printed)), json::tree(&tree(&tree(&printed).to_string())));
            prop_assert_eq!(tree(&printed).to_string(), &printed[..]);
            prop_assert_eq!(tree(&print::within(&e, 30)).to_string(), printed);
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text in ".{0,60}", parts in prop::collection::vec(prop::sample::select(vec![
        "sum", "by", "(", ")", "[", "]", "{", "}", "5m", "1", "-", "+", "offset", "@", "a", ",", "=", "=~", "\"x\"", "step", ":", "bool", "on", "fill", "group_left", "start", "</", "'", "#", "\n", "anchored", "^",
    ]), 0..20)) {
        for text in [text, parts.join(" "), parts.concat()] {
            if let Err(e) = parse(&text, &ALL) {
                prop_assert!(e.at <= text.len() && !e.describe(&text).is_empty());
            }
            let _ = parse_selector(&text);
        }
    }
}
