//! Tests of the file catalog: commits, restarts, numbers, and what DuckLake readers find.

use super::*;

const HOUR: i64 = 3_600_000;

fn file(id: i64, seq: u64) -> DataFile {
    let stats = |field_id, min: &str, max: &str| ColumnStats {
        field_id,
        bytes: 100,
        values: 1000,
        nulls: 0,
        min: Some(min.to_owned()),
        max: Some(max.to_owned()),
    };
    DataFile {
        id,
        table_id: 1,
        path: format!("samples/20000/{id}.parquet"),
        day: 20000,
        level: 1,
        rows: 1000,
        bytes: 4096,
        footer_bytes: 512,
        ts_min: -5,
        ts_max: 1_728_000_000_000,
        metric_min: i64::MIN,
        metric_max: i64::MAX,
        seq_min: seq,
        seq_max: seq,
        crc32: u32::MAX,
        columns: vec![stats(90, "-9", "9"), stats(2, "2024-10-04 00:00:00.000+00", "2024-10-04 01:00:00.000+00")],
    }
}

fn part(id: i64, seq: u64) -> TagPart {
    let path = crate::tag_parts::path(20000, id);
    TagPart { id, path, day: 20000, sets: 10, bytes: 100, footer_bytes: 50, seq, crc32: 1 }
}

struct Fixture {
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    async fn open(&self) -> Result<(FileCatalog, State)> {
        FileCatalog::open(&self.dir.path().join("catalog.sqlite"), "/data/store/default/", 42, HOUR).await
    }

    async fn sql<T>(&self, query: &'static str) -> T
    where
        T: Send + Unpin + sqlx::Type<sqlx::Sqlite> + for<'r> sqlx::Decode<'r, sqlx::Sqlite>,
    {
        let mut c = connect(&self.dir.path().join("catalog.sqlite")).await.unwrap();
        sqlx::query_scalar(query).fetch_one(&mut c).await.unwrap()
    }

    async fn run(&self, statement: &'static str) {
        let mut c = connect(&self.dir.path().join("catalog.sqlite")).await.unwrap();
        sqlx::raw_sql(statement).execute(&mut c).await.unwrap();
    }
}

fn stripped(files: &[DataFile]) -> Vec<DataFile> {
    files.iter().map(|f| DataFile { columns: Vec::new(), ..f.clone() }).collect()
}

#[tokio::test]
async fn a_commit_is_there_after_reopening() {
    let f = Fixture::new();
    let (catalog, state) = f.open().await.unwrap();
    assert_eq!(state, State { seed: 42, next_id: 1, next_seq: 1, ..State::default() });
    assert_eq!((catalog.next_id(), catalog.next_id(), catalog.next_seq()), (1, 2, 1));
    let metadata = vec![("up".to_owned(), "{\"kind\":\"gauge\"}".to_owned())];
    let commit = Commit { add: vec![file(1, 1)], add_parts: vec![part(2, 1)], metadata, ..Commit::default() };
    catalog.commit(&commit, 2 * HOUR).await.unwrap();
    let newer = vec![("up".to_owned(), "{}".to_owned())];
    catalog.commit(&Commit { metadata: newer.clone(), ..Commit::default() }, 2 * HOUR).await.unwrap();
    catalog.close().await;
    assert_eq!(catalog.commit(&commit, 0).await.unwrap_err().kind(), crate::ErrorKind::Unavailable);

    let (catalog, state) = f.open().await.unwrap();
    assert_eq!(state.files, stripped(&commit.add));
    assert_eq!(state.parts, commit.add_parts);
    assert_eq!((state.seed, state.next_seq, state.metadata), (42, 2, newer));
    assert!(state.next_id > 2);
    assert_eq!(catalog.next_id(), state.next_id);
    catalog.close().await;
    let snapshots: i64 = f.sql("SELECT count(*) FROM ducklake_snapshot").await;
    assert_eq!(snapshots, 2, "opening again and metadata change nothing for outside readers");
}

#[tokio::test]
async fn deletes_come_and_go() {
    let f = Fixture::new();
    let (catalog, _) = f.open().await.unwrap();
    let matchers = vec![Matcher::new("job", crate::MatchOp::Re, "a|b").unwrap()];
    let delete = Delete { id: 1, seq: 7, table_id: 1, matchers, start_ms: i64::MIN, end_ms: 5, created_ms: HOUR };
    catalog.commit(&Commit { add_deletes: vec![delete.clone()], ..Commit::default() }, HOUR).await.unwrap();
    catalog.close().await;
    let (catalog, state) = f.open().await.unwrap();
    assert_eq!((state.deletes, state.next_seq), (vec![delete], 8));
    catalog.commit(&Commit { remove_deletes: vec![1], ..Commit::default() }, HOUR).await.unwrap();
    catalog.close().await;
    assert_eq!(f.open().await.unwrap().1.deletes, []);
}

#[tokio::test]
async fn replaced_files_leave_in_steps() {
    let f = Fixture::new();
    let (catalog, _) = f.open().await.unwrap();
    let commit = Commit { add: vec![file(1, 1), file(2, 2)], add_parts: vec![part(3, 2)], ..Commit::default() };
    catalog.commit(&commit, 2 * HOUR).await.unwrap();
    let commit = Commit {
        add: vec![DataFile { seq_min: 1, ..file(4, 2) }],
        add_parts: vec![part(5, 2)],
        remove: vec![1, 2],
        remove_parts: vec![3],
        ..Commit::default()
    };
    catalog.commit(&commit, 3 * HOUR).await.unwrap();
    let rows: i64 = f.sql("SELECT record_count FROM ducklake_table_stats WHERE table_id = 1001").await;
    assert_eq!(rows, 1000);
    let again = Commit { remove: vec![1], ..Commit::default() };
    assert_eq!(catalog.commit(&again, 3 * HOUR).await.unwrap_err().kind(), crate::ErrorKind::Internal);
    assert!(catalog.purge(3 * HOUR).await.unwrap().is_empty(), "superseded at that time, not before");
    catalog.close().await;

    let (catalog, state) = f.open().await.unwrap();
    let old = ["samples/20000/1.parquet", "samples/20000/2.parquet", "tag_sets/20000/3.parquet"];
    assert_eq!(state.superseded, old.map(|p| (p.to_owned(), 3 * HOUR)));
    assert_eq!((state.files, state.parts), (stripped(&commit.add), commit.add_parts));
    let paths = catalog.purge(4 * HOUR).await.unwrap();
    assert_eq!(paths, old);
    let counts = |f: &Fixture| {
        let count = f.sql::<i64>("SELECT count(*) FROM ducklake_files_scheduled_for_deletion");
        let files = f.sql::<i64>("SELECT count(*) FROM ducklake_data_file");
        let stats = f.sql::<i64>("SELECT count(*) FROM ducklake_file_column_stats");
        let snapshots = f.sql::<i64>("SELECT count(*) FROM ducklake_snapshot");
        futures::executor::block_on(futures::future::join4(count, files, stats, snapshots))
    };
    assert_eq!(counts(&f), (3, 2, 2, 1));
    assert_eq!(catalog.purge(4 * HOUR).await.unwrap(), old, "until forgotten");
    catalog.forget(&paths).await.unwrap();
    assert!(catalog.purge(9 * HOUR).await.unwrap().is_empty());
    assert_eq!(counts(&f), (0, 2, 2, 1));
}

#[tokio::test]
async fn a_refused_commit_changes_nothing() {
    let f = Fixture::new();
    let (catalog, _) = f.open().await.unwrap();
    let commit = Commit { add: vec![file(1, 1), file(1, 1)], ..Commit::default() };
    assert!(catalog.commit(&commit, HOUR).await.is_err());
    assert!(catalog.commit(&Commit { add: vec![file(2, 1)], remove: vec![7], ..Commit::default() }, 0).await.is_err());
    catalog.close().await;
    let (_, state) = f.open().await.unwrap();
    assert_eq!((state.files, state.next_seq), (vec![], 1));
}

#[tokio::test]
async fn ids_are_not_given_twice_after_a_crash() {
    let f = Fixture::new();
    let (catalog, _) = f.open().await.unwrap();
    let mut last = 0;
    for round in 0..3 {
        for _ in 0..RESERVE - 1 {
            last = catalog.next_id();
        }
        catalog.commit(&Commit { add: vec![file(last, round)], ..Commit::default() }, HOUR).await.unwrap();
    }
    for _ in 0..RESERVE / 2 - 1 {
        last = catalog.next_id();
    }
    drop(catalog);
    let (_, state) = f.open().await.unwrap();
    assert!(state.next_id > last, "{} was given before", state.next_id);
}

#[tokio::test]
async fn newer_formats_are_refused() {
    for statement in [
        r#"UPDATE thalweg_setting SET "value" = '99' WHERE "key" = 'format'"#,
        "UPDATE thalweg_table SET version = 99 WHERE table_id = 1",
    ] {
        let f = Fixture::new();
        f.open().await.unwrap().0.close().await;
        f.run(statement).await;
        let error = f.open().await.unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Invalid, "{error}");
    }
    let f = Fixture::new();
    f.open().await.unwrap().0.close().await;
    f.run(r#"UPDATE thalweg_setting SET "value" = 'x' WHERE "key" = 'seed'"#).await;
    assert_eq!(f.open().await.unwrap_err().kind(), crate::ErrorKind::Corrupt);
    std::fs::write(f.dir.path().join("catalog.sqlite"), "not a database, but text of some length").unwrap();
    assert!(f.open().await.is_err());
}

#[tokio::test]
async fn a_changed_view_becomes_a_snapshot() {
    let f = Fixture::new();
    f.open().await.unwrap().0.close().await;
    f.run("UPDATE ducklake_view SET sql = 'SELECT 1' WHERE view_name = 'samples'").await;
    f.run("DELETE FROM ducklake_column WHERE column_name = 'value_double'").await;
    f.open().await.unwrap().0.close().await;
    let changes: String = f.sql("SELECT changes_made FROM ducklake_snapshot_changes WHERE snapshot_id = 1").await;
    assert_eq!(changes, "altered_table:1001,altered_view:100001");
}

#[tokio::test]
async fn readers_and_commits_do_not_wait_for_each_other() {
    let f = Fixture::new();
    let (catalog, _) = f.open().await.unwrap();
    let mut reader = connect(&f.dir.path().join("catalog.sqlite")).await.unwrap();
    let mut tx = reader.begin().await.unwrap();
    const FILES: &str = "SELECT count(*) FROM ducklake_data_file";
    let files: i64 = sqlx::query_scalar(FILES).fetch_one(&mut *tx).await.unwrap();
    for i in 1..4 {
        catalog.commit(&Commit { add: vec![file(i, 1)], ..Commit::default() }, HOUR).await.unwrap();
    }
    let again: i64 = sqlx::query_scalar(FILES).fetch_one(&mut *tx).await.unwrap();
    assert_eq!((files, again), (0, 0), "a reader keeps what it began with");
    tx.rollback().await.unwrap();
    let now: i64 = sqlx::query_scalar(FILES).fetch_one(&mut reader).await.unwrap();
    assert_eq!(now, 3);
}

#[tokio::test]
async fn the_database_is_small() {
    let f = Fixture::new();
    let (catalog, _) = f.open().await.unwrap();
    for i in 0..10 {
        let commit = Commit { add: vec![file(2 * i + 1, 1)], add_parts: vec![part(2 * i + 2, 1)], ..Commit::default() };
        catalog.commit(&commit, HOUR).await.unwrap();
    }
    let sizes: Vec<u64> = std::fs::read_dir(f.dir.path())
        .unwrap()
        .map(|e| e.unwrap())
        .filter(|e| !e.file_name().to_string_lossy().ends_with("-shm"))
        .map(|e| e.metadata().unwrap().len())
        .collect();
    assert!(sizes.iter().sum::<u64>() < 100_000, "{sizes:?} bytes");
}

#[test]
fn timestamps_as_text() {
    let check = |ms, expected: Option<&str>| assert_eq!(timestamp_text(ms).as_deref(), expected);
    check(0, Some("1970-01-01 00:00:00.000+00"));
    check(-1, Some("1969-12-31 23:59:59.999+00"));
    check(1_795_246_259_131, Some("2026-11-21 07:30:59.131+00"));
    check(i64::MAX, None);
    check(-100_000_000_000_000, None);
}
