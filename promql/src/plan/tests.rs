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
    check_error("sum(", "parse error");
    check_error("mad_over_time(m[5m])", "function \"mad_over_time\" is not enabled");
    check_error("{a=\"b\" or c=\"d\"}", "unexpected \"or\"");
    check_error(&format!("{}1{}", "(".repeat(600), ")".repeat(600)), "nested too deeply");
    check_error(&format!("{}1{}", "(".repeat(100_000), ")".repeat(100_000)), "more than 1000 operators");
    check_error(&format!("{}1", "-".repeat(100_000)), "more than 1000 operators");
    check_error(&format!("1{}", " or 1".repeat(100_000)), "more than 1000 operators");
    check_error(&format!("1{}", "+1".repeat(900)), "nested too deeply");
    let long = format!("m{{a=~\"{}\"}} # {}", "a-b|(c)".repeat(2000), "-".repeat(2000));
    assert!(plan(&long, &EvalOptions::instant(0)).is_ok());
}
