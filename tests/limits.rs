//! Limits of queries: reaching one is an error in Prometheus's words.

use crate::harness::{Client, Response, Server};

fn instant(client: &mut Client, query: &str) -> Response {
    client.form("/api/v1/query", &[("query", query)])
}

/// Status, kind and text of a refusal.
fn refused(answer: &Response, status: u16, kind: &str, text: &str) {
    assert_eq!(answer.status, status, "{:.300}", answer.text());
    let json = answer.json();
    assert_eq!((json["status"].as_str(), json["errorType"].as_str()), (Some("error"), Some(kind)));
    let error = json["error"].as_str().expect("a text");
    assert!(error.contains(text), "{error:.300}");
}

#[test]
fn texts_and_patterns_are_limited() {
    let server = Server::start();
    let mut client = server.client();
    let patterns: String = (0..20).map(|i| format!(r#"a=~"{i}\\pL{{50}}","#)).collect();
    let text = "MiB when compiled; at most 64 MiB are allowed in one request";
    refused(&instant(&mut client, &format!("{{{patterns}}}")), 400, "bad_data", text);
    let replaced =
        (0..20).fold("m".to_owned(), |inner, i| format!(r#"label_replace({inner}, "x", "", "id", "{i}\\pL{{50}}")"#));
    refused(&instant(&mut client, &replaced), 422, "execution", text);
    let selectors: Vec<String> = (0..20).map(|i| format!(r#"m{{a=~"{i}\\pL{{50}}"}}"#)).collect();
    let pairs: Vec<(&str, &str)> = selectors.iter().map(|s| ("match[]", s.as_str())).collect();
    refused(&client.form("/api/v1/series", &pairs), 400, "bad_data", text);
    let long = format!(r#"{{a=~"{}"}}"#, "a".repeat(1 << 20));
    refused(
        &instant(&mut client, &long),
        400,
        "bad_data",
        "regular expression of 1048576 bytes; at most 65536 are allowed",
    );
    let balanced = (0..16).fold("m".to_owned(), |inner, _| format!("({inner} or {inner})"));
    refused(&instant(&mut client, &balanced), 400, "bad_data", "more than 20000 operands");
}
