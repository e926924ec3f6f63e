//! Backups of a database and of those that go on from them.

use super::*;
use crate::backup::{self, Place};

fn place(store: &Arc<dyn ObjectStore>) -> Place {
    Place { store: store.clone(), database: "default".to_owned() }
}

async fn open(dir: &Path, store: &Arc<dyn ObjectStore>) -> Engine {
    let components = Components { entropy: Arc::new(catalog::SystemEntropy), ..components(store) };
    Engine::open(settings(dir), components, Extensions::default()).await.unwrap()
}

async fn store_rows(engine: &Engine, rows: &[(&str, i64, f64)]) {
    engine.write(request(engine, rows)).await.unwrap();
    engine.flush().await.unwrap();
}

/// A database that was restored gives the names that the one before gave after the backup.
#[tokio::test]
async fn a_restored_database_leaves_newer_backups_as_they_are() {
    let entropy: Arc<dyn Entropy> = Arc::new(catalog::SystemEntropy);
    let back_up = async |from: &Arc<dyn ObjectStore>, to: &Arc<dyn ObjectStore>, seconds: i64| {
        backup::create(&place(from), &place(to), &entropy, NOW + seconds * 1000, &|_| {}).await
    };
    let (store, backups, dir) = (bucket(), bucket(), tempfile::tempdir().unwrap());
    let engine = open(dir.path(), &store).await;
    store_rows(&engine, &[("a", NOW, 1.0)]).await;
    engine.shutdown(Duration::from_secs(10)).await.unwrap();
    let first = back_up(&store, &backups, 1).await.unwrap();
    let engine = open(dir.path(), &store).await;
    store_rows(&engine, &[("a", NOW + 1, 2.0)]).await;
    back_up(&store, &backups, 2).await.unwrap();
    let names: Vec<String> = engine.files().unwrap().iter().map(|f| f.1.path.clone()).collect();
    store_rows(&engine, &[("b", NOW, 3.0)]).await;
    back_up(&store, &backups, 3).await.unwrap();

    // What differs in one value, and has as many bytes; and what has not.
    for rows in [&[("a", NOW + 1, 4.0)][..], &[("a", NOW + 1, 4.5), ("c", NOW, 0.25)]] {
        let (restored, dir) = (bucket(), tempfile::tempdir().unwrap());
        backup::restore(&place(&backups), &first, &place(&restored), &|_| {}).await.unwrap();
        let engine = open(dir.path(), &restored).await;
        store_rows(&engine, rows).await;
        assert_eq!(engine.files().unwrap().iter().map(|f| f.1.path.clone()).collect::<Vec<_>>(), names);
        let refused = back_up(&restored, &backups, 4).await.unwrap_err();
        assert_eq!(refused.kind(), catalog::ErrorKind::Invalid);
        assert!(refused.message().contains(&names[1]) && refused.message().contains("place"), "{refused}");
        for name in backup::names(&place(&backups)).await.unwrap() {
            let manifest = backup::load(&place(&backups), &name).await.unwrap();
            assert_eq!(backup::check(&place(&backups), &manifest, &|_| {}).await.unwrap(), [""; 0], "{name}");
        }
        let elsewhere = bucket();
        let made = back_up(&restored, &elsewhere, 5).await.unwrap();
        assert_eq!(backup::check(&place(&elsewhere), &made, &|_| {}).await.unwrap(), [""; 0]);
    }
    assert_eq!(backup::names(&place(&backups)).await.unwrap().len(), 3);
    // The one that it all began with goes on there.
    store_rows(&engine, &[("b", NOW + 1, 4.0)]).await;
    back_up(&store, &backups, 6).await.unwrap();
}
