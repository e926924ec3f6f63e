//! Texts to plans, as EXPLAIN shows them.

use super::*;

fn check(text: &str, expected: &str) {
    let planned = plan(text, &EvalOptions::range(0, 60_000, 15_000)).unwrap_or_else(|e| panic!("{text}: {e}"));
    let shown = planned.plan.expect("a plan").display_indent().to_string();
    let expected: Vec<&str> = expected.lines().map(str::trim_end).filter(|l| !l.is_empty()).collect();
    assert_eq!(shown.lines().collect::<Vec<_>>(), expected, "{text}");
}

fn check_error(text: &str, expected: &str) {
    let e = plan(text, &EvalOptions::range(0, 60_000, 15_000)).expect_err(text);
    assert!(e.message.contains(expected), "{text}: {}", e.message);
}

#[test]
fn plans_are_small() {
    check(
        "sum by (job) (rate(m{a!=\"b\"}[5m] offset 1m))",
        "
PromAggregate: Sum by(job) steps=5
  PromSelect: Rate {__name__=\"m\", a!=\"b\"}[300000ms] offset 60000ms steps=5
",
    );
    check(
        "rate({job=~\".+\"}[5m])",
        "
PromMerge:  steps=5
  PromSelect: Rate {job=~\".+\"}[300000ms] steps=5
",
    );
    check(
        "m @ 100 * 2 > time()",
        "
PromBinary: > steps=5
  PromRepeat:  steps=5
    PromBinary: * steps=1
      PromSelect: Instant {__name__=\"m\"}[300000ms] @ 100000ms steps=1
      PromNumber: 2 steps=1
  PromTime:  steps=5
",
    );
    check(
        "max_over_time(m[1m:10s])",
        "
PromSubquery: Max [60000ms:10000ms] steps=5
  PromSelect: Instant {__name__=\"m\"}[300000ms] steps=12
",
    );
}

#[test]
fn errors_say_what_is_wrong() {
    check_error("m[5m]", "invalid expression type \"range vector\" for range query, must be Scalar or instant Vector");
    check_error("\"m\"", "invalid expression type \"string\" for range query, must be Scalar or instant Vector");
    check_error("sum(", "1:5: parse error: unclosed left parenthesis");
    check_error("rate(m[step() - 20])", "7:18: duration must be greater than 0");
    check_error("m offset (1 / (range() - 1m))", "10:27: division by zero");
    check_error(&format!("1{}", "+1".repeat(900)), "nested too deeply: at most 512 levels");
    let long = format!("m{{a=~\"{}\"}} # {}", "a-b|(c)".repeat(2000), "-".repeat(2000));
    assert!(plan(&long, &EvalOptions::instant(0)).is_ok());
}

#[test]
fn durations_are_computed() {
    check(
        "rate(m[step() * 4] offset -(range() / 2))",
        "
PromSelect: Rate {__name__=\"m\"}[60000ms] offset -30000ms steps=5
",
    );
    check(
        "max_over_time(m[max_of(1m, 2 * step()):min_of(10s, range())] @ start())",
        "
PromRepeat:  steps=5
  PromSubquery: Max [60000ms:10000ms] steps=1
    PromSelect: Instant {__name__=\"m\"}[300000ms] steps=6
",
    );
}
