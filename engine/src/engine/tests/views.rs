//! Views: that they are kept, that snapshots have their own, and how many there may be.

use catalog::{ErrorKind, View};

use super::*;

fn view(name: &str, definition: &str) -> View {
    let (name, definition) = (name.to_owned(), definition.to_owned());
    View { name, definition, columns: vec![], owner: "me".to_owned(), created_ms: NOW }
}

fn definitions(engine: &Engine) -> Vec<(String, String)> {
    engine.views().values().map(|v| (v.name.clone(), v.definition.clone())).collect()
}

fn pair(name: &str, definition: &str) -> (String, String) {
    (name.to_owned(), definition.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn views_are_kept_and_snapshots_have_their_own() {
    let (dir, store) = (tempfile::tempdir().unwrap(), bucket());
    let engine = open(dir.path(), &store).await;
    assert!(engine.create_view(view("b", "SELECT 1"), false).await.unwrap());
    assert!(engine.create_view(view("a", "SELECT 2"), false).await.unwrap());
    let snapshot = engine.snapshot().await;
    assert!(!engine.create_view(view("a", "SELECT 3"), false).await.unwrap());
    assert!(engine.create_view(view("a", "SELECT 3"), true).await.unwrap());
    assert!(engine.drop_views(vec!["b".to_owned(), "none".to_owned()]).await.unwrap());
    assert!(!engine.drop_views(vec!["b".to_owned()]).await.unwrap());
    assert_eq!(definitions(&snapshot), [pair("a", "SELECT 2"), pair("b", "SELECT 1")]);
    assert_eq!(definitions(&snapshot.present()), [pair("a", "SELECT 3")]);
    // Nothing is shut down: what was acknowledged is in the journal.
    let elsewhere = tempfile::tempdir().unwrap();
    assert_eq!(definitions(&open(elsewhere.path(), &store).await), [pair("a", "SELECT 3")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn views_have_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), &bucket()).await;
    let refused = |made: Result<bool>, expected: &str| {
        let e = made.expect_err(expected);
        assert!(e.kind() == ErrorKind::LimitExceeded && e.message().contains(expected), "{e}");
    };
    refused(engine.create_view(view("v", &"x".repeat(64 << 10)), false).await, "65536 are allowed");
    let long = "x".repeat(60 << 10);
    let mut made = 0;
    let e = loop {
        match engine.create_view(view(&format!("v{made}"), &long), false).await {
            Ok(_) => made += 1,
            e => break e,
        }
    };
    refused(e, "4194304 are allowed");
    assert_eq!(made, (4 << 20) / (long.len() + 3));
    // A replaced one does not count.
    assert!(engine.create_view(view("v0", &long), true).await.unwrap());
    assert!(engine.drop_views((0..made).map(|i| format!("v{i}")).collect()).await.unwrap());
    for i in 0..1000 {
        engine.create_view(view(&format!("v{i}"), "SELECT 1"), false).await.unwrap();
    }
    refused(engine.create_view(view("v", "SELECT 1"), false).await, "at most 1000 views");
    assert!(engine.create_view(view("v7", "SELECT 2"), true).await.unwrap());
}
