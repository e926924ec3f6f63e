//! Tests of the file catalog: commits, restarts, numbers, and what DuckLake readers find.

use object_store::memory::InMemory;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection, SqliteConnection};

use super::*;
use crate::ManualClock;

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

/// A data folder and a bucket, of which a crash takes nothing.
struct Fixture {
    dir: tempfile::TempDir,
    store: Arc<dyn ObjectStore>,
    clock: Arc<ManualClock>,
}

impl Fixture {
    fn new() -> Self {
        let clock = Arc::new(ManualClock::new(HOUR));
        Self { dir: tempfile::tempdir().unwrap(), store: Arc::new(InMemory::new()), clock }
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("catalog.sqlite")
    }

    fn opening<'a>(&self, index: Option<Box<dyn Index>>, format1: Option<&'a Path>) -> Opening<'a> {
        let (store, clock) = (self.store.clone(), self.clock.clone());
        let entropy = Arc::new(SystemEntropy);
        Opening { store, database: "default", entropy, seed: 42, index, format1, clock }
    }

    fn index(&self) -> Option<Box<dyn Index>> {
        Some(Box::new(SqlIndex::sqlite(&self.path(), "/data/store/default/", 42)))
    }

    async fn open(&self) -> Result<(FileCatalog, State)> {
        FileCatalog::open(self.opening(self.index(), Some(&self.path()))).await
    }

    /// Everything that the SQL catalog says of visible files.
    async fn contents(&self) -> String {
        self.sql(
            "SELECT json_array(
                 (SELECT json_group_array(json_array(id, path, row_count, seq_max)) FROM
                     (SELECT * FROM thalweg_file ORDER BY id)),
                 (SELECT json_group_array(json_array(id, path)) FROM (SELECT * FROM thalweg_part ORDER BY id)),
                 (SELECT json_group_array(json_array(metric, json)) FROM (SELECT * FROM thalweg_metadata ORDER BY metric)),
                 (SELECT json_group_array(json) FROM (SELECT json FROM thalweg_delete ORDER BY id)),
                 (SELECT json_group_array(json_array(data_file_id, table_id, path, record_count)) FROM
                     (SELECT * FROM ducklake_data_file WHERE end_snapshot IS NULL ORDER BY data_file_id)),
                 (SELECT json_group_array(json_array(table_id, record_count, file_size_bytes)) FROM
                     (SELECT * FROM ducklake_table_stats ORDER BY table_id)),
                 (SELECT count(*) FROM ducklake_file_column_stats s JOIN ducklake_data_file f USING (data_file_id)
                     WHERE end_snapshot IS NULL))",
        )
        .await
    }

    async fn sql<T>(&self, query: &'static str) -> T
    where
        T: Send + Unpin + sqlx::Type<sqlx::Sqlite> + for<'r> sqlx::Decode<'r, sqlx::Sqlite>,
    {
        let mut c = connect(&self.path()).await;
        sqlx::query_scalar(query).fetch_one(&mut c).await.unwrap()
    }

    async fn run(&self, statement: &'static str) {
        let mut c = connect(&self.path()).await;
        sqlx::raw_sql(statement).execute(&mut c).await.unwrap();
    }
}

async fn connect(path: &Path) -> SqliteConnection {
    SqliteConnectOptions::new().filename(path).create_if_missing(true).connect().await.unwrap()
}

fn stripped(files: &[DataFile]) -> Vec<DataFile> {
    files.iter().map(|f| DataFile { columns: Vec::new(), ..f.clone() }).collect()
}

#[tokio::test]
async fn a_commit_is_there_after_reopening() {
    let f = Fixture::new();
    let (catalog, state) = f.open().await.unwrap();
    let first = 1 << 32;
    assert_eq!(state, State { seed: 42, next_id: first, next_seq: 1, ..State::default() });
    assert_eq!((catalog.next_id(), catalog.next_id(), catalog.next_seq()), (first, first + 1, 1));
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
    let files: i64 = f.sql("SELECT count(*) FROM ducklake_data_file").await;
    assert_eq!(files, 5, "earlier snapshots still show what left");
    assert!(catalog.purge(3 * HOUR).await.unwrap().is_empty(), "superseded at that time, not before");
    catalog.close().await;

    let (catalog, state) = f.open().await.unwrap();
    let old = ["samples/20000/1.parquet", "samples/20000/2.parquet", "tag_sets/20000/3.parquet"];
    assert_eq!(state.superseded, old.map(|p| (p.to_owned(), 3 * HOUR)));
    assert_eq!((state.files, state.parts), (stripped(&commit.add), commit.add_parts));
    let counts = |f: &Fixture| {
        let files = f.sql::<i64>("SELECT count(*) FROM ducklake_data_file");
        let stats = f.sql::<i64>("SELECT count(*) FROM ducklake_file_column_stats");
        let snapshots = f.sql::<i64>("SELECT count(*) FROM ducklake_snapshot");
        futures::executor::block_on(futures::future::join3(files, stats, snapshots))
    };
    assert_eq!(counts(&f), (2, 2, 1), "what left before is not shown any more");
    let paths = catalog.purge(4 * HOUR).await.unwrap();
    assert_eq!(paths, old);
    assert_eq!(catalog.purge(4 * HOUR).await.unwrap(), old, "until forgotten");
    assert_eq!(catalog.superseded().await.unwrap(), old);
    catalog.forget(&paths).await.unwrap();
    assert!(catalog.purge(9 * HOUR).await.unwrap().is_empty());
    assert!(catalog.superseded().await.unwrap().is_empty());
}

/// Whatever the clock said for a while, what left before something that is old is old.
#[tokio::test]
async fn what_left_while_the_clock_was_ahead_goes_with_what_leaves_later() {
    const YEAR_2100: i64 = 4_102_444_800_000;
    let f = Fixture::new();
    let (catalog, _) = f.open().await.unwrap();
    catalog.commit(&Commit { add: vec![file(1, 1)], ..Commit::default() }, 2 * HOUR).await.unwrap();
    for i in 1..20 {
        let now_ms = if i == 2 { YEAR_2100 } else { (2 + i) * HOUR };
        let commit = Commit { add: vec![file(i + 1, 1)], remove: vec![i], ..Commit::default() };
        catalog.commit(&commit, now_ms).await.unwrap();
        let old = catalog.purge(now_ms.min((2 + i) * HOUR)).await.unwrap();
        catalog.forget(&old).await.unwrap();
        let superseded = catalog.superseded().await.unwrap().len();
        let files: i64 = f.sql("SELECT count(*) FROM ducklake_data_file").await;
        let snapshots: i64 = f.sql("SELECT count(*) FROM ducklake_snapshot").await;
        assert!(superseded <= 2 && files <= 3 && snapshots <= 2, "{i}: {superseded}, {files}, {snapshots}");
    }
}

#[tokio::test]
async fn whoever_waits_to_know_the_owner_is_told_when_the_catalog_closes() {
    let f = Fixture::new();
    let (catalog, _) = f.open().await.unwrap();
    catalog.confirm().await.unwrap();
    // As a commit does while the store can't be reached.
    let journal = catalog.journal.lock().await;
    let both = async { tokio::join!(catalog.confirm(), catalog.close()) };
    let (confirmed, ()) = tokio::time::timeout(Duration::from_secs(10), both).await.expect("an answer");
    assert_eq!(confirmed.unwrap_err().kind(), crate::ErrorKind::Unavailable);
    drop(journal);
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
    let mut last = 0;
    for _ in 0..3 {
        let (catalog, state) = f.open().await.unwrap();
        assert!(state.next_id > last, "{} was given before", state.next_id);
        for _ in 0..20_000 {
            last = catalog.next_id();
        }
    }
}

#[tokio::test]
async fn a_sql_catalog_that_is_not_ours_is_made_anew() {
    let f = Fixture::new();
    let (catalog, _) = f.open().await.unwrap();
    let delete = Delete {
        id: 9,
        seq: 2,
        table_id: 1,
        matchers: vec![Matcher::new("job", crate::MatchOp::Re, "a|b").unwrap()],
        start_ms: i64::MIN,
        end_ms: 5,
        created_ms: HOUR,
    };
    let commit = Commit {
        add: vec![file(1, 1), file(2, 2), file(3, 2)],
        add_parts: vec![part(4, 2), part(5, 2)],
        metadata: vec![("up".to_owned(), "{}".to_owned())],
        add_deletes: vec![delete.clone()],
        ..Commit::default()
    };
    catalog.commit(&commit, 2 * HOUR).await.unwrap();
    let commit = Commit { remove: vec![1], remove_parts: vec![5], ..Commit::default() };
    catalog.commit(&commit, 3 * HOUR).await.unwrap();
    assert_eq!(catalog.behind(), 0);
    catalog.close().await;
    let contents = f.contents().await;
    assert!(contents.contains("samples/20000/2.parquet") && contents.contains("a|b"), "{contents}");

    let full = {
        let (catalog, _) = f.open().await.unwrap();
        let journal = catalog.journal.lock().await;
        (journal.state().clone(), journal.place().number)
    };
    let differences = async || f.index().unwrap().differences(&full.0, full.1).await.unwrap();
    assert_eq!(differences().await, Some(vec![]));
    f.run("UPDATE thalweg_file SET seq_max = seq_max + 1 WHERE id = 2").await;
    f.run("UPDATE ducklake_data_file SET record_count = 7 WHERE data_file_id = 3").await;
    f.run("DELETE FROM thalweg_delete").await;
    let told = differences().await.unwrap();
    assert_eq!(told.len(), 5, "{told:#?}");
    assert!(
        ["samples/20000/2.parquet", "samples/20000/3.parquet", "delete 9"]
            .iter()
            .all(|p| told.iter().any(|t| t.contains(p)))
    );
    assert_eq!(f.index().unwrap().differences(&full.0, full.1 + 1).await.unwrap(), None, "it stands elsewhere");
    std::fs::remove_file(f.path()).unwrap();
    assert_eq!((differences().await, f.path().exists()), (None, false));
    std::fs::write(f.path(), "not a database, but text of some length").unwrap();
    assert!(differences().await.unwrap()[0].contains("damaged"));

    let check = async |what: &str| {
        let (catalog, state) = f.open().await.unwrap();
        assert_eq!((catalog.behind(), f.contents().await), (0, contents.clone()), "{what}");
        assert_eq!(state.deletes, std::slice::from_ref(&delete));
        catalog.close().await;
    };
    check("as it was").await;
    std::fs::remove_file(f.path()).unwrap();
    check("deleted").await;
    std::fs::write(f.path(), "not a database, but text of some length").unwrap();
    check("another file").await;
    f.run(r#"UPDATE thalweg_setting SET "value" = '43' WHERE "key" = 'seed'"#).await;
    check("of another database").await;
    f.run(r#"UPDATE thalweg_setting SET "value" = '99' WHERE "key" = 'format'"#).await;
    check("of another version").await;
    f.run(r#"UPDATE thalweg_setting SET "value" = '3:00000000000000000000000000000007' WHERE "key" = 'place'"#).await;
    check("of another history").await;
    f.run("DROP TABLE thalweg_part").await;
    f.run(r#"DELETE FROM thalweg_setting WHERE "key" = 'place'"#).await;
    check("half gone").await;
    let bytes = std::fs::read(f.path()).unwrap();
    let garbled: Vec<u8> = bytes.iter().enumerate().map(|(i, b)| if i < 1024 { *b } else { b ^ 0x55 }).collect();
    std::fs::write(f.path(), garbled).unwrap();
    check("damaged").await;

    // By hand, too.
    std::fs::remove_file(f.path()).unwrap();
    let state = FileCatalog::rebuild(f.store.clone(), "default", HOUR, |_| Ok(f.index())).await.unwrap();
    assert_eq!((state.files.len(), f.contents().await), (2, contents.clone()));
}

#[tokio::test]
async fn a_locked_sql_catalog_holds_up_no_commit() {
    let f = Fixture::new();
    let (catalog, _) = f.open().await.unwrap();
    let mut other = connect(&f.path()).await;
    let lock = other.begin_with("BEGIN IMMEDIATE").await.unwrap();
    for i in 1..4 {
        catalog.commit(&Commit { add: vec![file(i, 1)], ..Commit::default() }, HOUR).await.unwrap();
    }
    catalog.follow().await;
    assert_eq!(catalog.behind(), 3);
    lock.rollback().await.unwrap();
    catalog.follow().await;
    assert_eq!(catalog.behind(), 0);
    catalog.commit(&Commit { add: vec![file(4, 1)], ..Commit::default() }, HOUR).await.unwrap();
    let files: i64 = f.sql("SELECT count(*) FROM ducklake_data_file").await;
    assert_eq!((files, catalog.behind()), (4, 0));
    catalog.close().await;

    // Locked while the server starts, and for longer than entries are kept for it.
    let lock = other.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let (catalog, _) = f.open().await.unwrap();
    for i in 5..10 + BACKLOG_MAX as i64 {
        catalog.commit(&Commit { add: vec![file(i, 1)], ..Commit::default() }, HOUR).await.unwrap();
    }
    lock.rollback().await.unwrap();
    catalog.follow().await;
    let files: i64 = f.sql("SELECT count(*) FROM ducklake_data_file WHERE end_snapshot IS NULL").await;
    assert_eq!((files, catalog.behind()), (9 + BACKLOG_MAX as i64, 0));
}

/// An index in memory whose calls fail from time to time, before or after they are done.
#[derive(Debug)]
struct Flaky {
    shared: Arc<parking_lot::Mutex<(Option<Place>, State)>>,
    entropy: crate::SeededEntropy,
}

impl Flaky {
    /// Does it, or not, and says so, or not.
    fn call(&self, work: impl FnOnce(&mut (Option<Place>, State))) -> Result<()> {
        let mut bytes = [0; 1];
        self.entropy.fill(&mut bytes)?;
        let lost = || Error::unavailable("the connection is lost");
        if bytes[0] % 8 == 0 {
            return Err(lost());
        }
        work(&mut self.shared.lock());
        if bytes[0] % 8 == 1 { Err(lost()) } else { Ok(()) }
    }
}

#[async_trait::async_trait]
impl Index for Flaky {
    async fn place(&mut self, _: i64) -> Result<Option<Place>> {
        self.call(|_| {})?;
        Ok(self.shared.lock().0)
    }

    async fn replace(&mut self, state: &State, place: Place, _: i64) -> Result<()> {
        self.call(|shared| *shared = (Some(place), state.clone()))
    }

    async fn apply(&mut self, from: Place, entry: &Entry) -> Result<()> {
        let mut stands = true;
        self.call(|shared| {
            stands = shared.0 == Some(from) || shared.0 == Some(entry.place());
            if shared.0 == Some(from) {
                shared.1.apply(&entry.commit, entry.time_ms);
                shared.0 = Some(entry.place());
            }
        })?;
        if stands { Ok(()) } else { Err(Error::unavailable("it stands elsewhere")) }
    }

    async fn expire(&mut self, _: i64) -> Result<()> {
        self.call(|_| {})
    }

    async fn close(&mut self) {}
}

#[tokio::test]
async fn an_index_that_fails_at_any_call_gets_every_entry_once() {
    for seed in 0..50 {
        let f = Fixture::new();
        let shared = Arc::new(parking_lot::Mutex::new((None, State::default())));
        let mut id = 0;
        for _ in 0..3 {
            let index = Flaky { shared: shared.clone(), entropy: crate::SeededEntropy::new(seed + 100 * id as u64) };
            let (catalog, _) = FileCatalog::open(f.opening(Some(Box::new(index)), None)).await.unwrap();
            for _ in 0..10 {
                id += 1;
                let remove = if id % 3 == 0 { vec![id - 1] } else { vec![] };
                catalog.commit(&Commit { add: vec![file(id, 1)], remove, ..Commit::default() }, HOUR).await.unwrap();
                catalog.purge(HOUR).await.unwrap();
            }
            while catalog.behind() > 0 {
                catalog.follow().await;
            }
            let journal = catalog.journal.lock().await;
            let (place, mut state) = shared.lock().clone();
            // What no entry says.
            state.seed = 42;
            state.next_id = journal.state().next_id;
            assert_eq!((place, &state), (Some(journal.place()), journal.state()), "seed {seed}");
        }
    }
}

/// Tables of a catalog of format 1, as far as they are read, with two files, of which one was replaced.
const FORMAT_1: &str = r#"
    CREATE TABLE ducklake_file_column_stats (data_file_id BIGINT, table_id BIGINT, column_id BIGINT,
        column_size_bytes BIGINT, value_count BIGINT, null_count BIGINT, min_value VARCHAR, max_value VARCHAR,
        contains_nan BIGINT, extra_stats VARCHAR);
    CREATE TABLE thalweg_setting ("key" VARCHAR NOT NULL PRIMARY KEY, "value" VARCHAR NOT NULL) WITHOUT ROWID;
    CREATE TABLE thalweg_table (table_id INTEGER PRIMARY KEY, version BIGINT NOT NULL);
    CREATE TABLE thalweg_file (id INTEGER PRIMARY KEY, table_id BIGINT NOT NULL, path VARCHAR NOT NULL,
        day BIGINT NOT NULL, level BIGINT NOT NULL, row_count BIGINT NOT NULL, byte_count BIGINT NOT NULL,
        footer_bytes BIGINT NOT NULL, ts_min BIGINT NOT NULL, ts_max BIGINT NOT NULL, metric_min BIGINT NOT NULL,
        metric_max BIGINT NOT NULL, seq_min BIGINT NOT NULL, seq_max BIGINT NOT NULL, crc32 BIGINT NOT NULL);
    CREATE TABLE thalweg_part (id INTEGER PRIMARY KEY, path VARCHAR NOT NULL, day BIGINT NOT NULL,
        set_count BIGINT NOT NULL, byte_count BIGINT NOT NULL, footer_bytes BIGINT NOT NULL, seq BIGINT NOT NULL,
        crc32 BIGINT NOT NULL);
    CREATE TABLE thalweg_removed (id INTEGER PRIMARY KEY, path VARCHAR NOT NULL, removed_ms BIGINT NOT NULL);
    CREATE TABLE thalweg_metadata (metric VARCHAR NOT NULL PRIMARY KEY, json VARCHAR NOT NULL) WITHOUT ROWID;
    INSERT INTO thalweg_setting VALUES ('format', '1'), ('seed', '42'), ('next_id', '10004'), ('next_seq', '8');
    INSERT INTO thalweg_table VALUES (1, 1);
    INSERT INTO thalweg_file VALUES (3, 1, 'samples/20000/3.parquet', 20000, 1, 1000, 4096, 512, -5, 1728000000000,
        -9223372036854775808, 9223372036854775807, 7, 7, 4294967295);
    INSERT INTO ducklake_file_column_stats VALUES (3, 1001, 90, 100, 1000, 0, '-9', '9', NULL, NULL),
        (3, 1001, 2, 100, 1000, 0, '2024-10-04 00:00:00.000+00', '2024-10-04 01:00:00.000+00', NULL, NULL);
    INSERT INTO thalweg_part VALUES (2, 'tag_sets/20000/2.parquet', 20000, 10, 100, 50, 7, 1);
    INSERT INTO thalweg_removed VALUES (1, 'samples/20000/1.parquet', 3600000);
    INSERT INTO thalweg_metadata VALUES ('up', '{}');
"#;

#[tokio::test]
async fn a_catalog_of_format_1_becomes_a_journal() {
    let f = Fixture::new();
    f.run(FORMAT_1).await;
    let old_metadata = object_store::path::Path::from("default/meta/1.json");
    f.store.put(&old_metadata, r#"["up",{}]"#.into()).await.unwrap();
    for opening in 1..3 {
        let (catalog, state) = f.open().await.unwrap();
        let metadata = vec![("up".to_owned(), "{}".to_owned())];
        let superseded = vec![("samples/20000/1.parquet".to_owned(), HOUR)];
        let expected = State {
            files: stripped(&[file(3, 7)]),
            parts: vec![part(2, 7)],
            seed: 42,
            next_id: opening << 32,
            next_seq: 8,
            superseded,
            metadata,
            ..State::default()
        };
        assert_eq!(state, expected);
        assert_eq!(catalog.journal.lock().await.state().files, [file(3, 7)], "with its statistics");
        assert!(f.contents().await.contains("samples/20000/3.parquet"));
        catalog.close().await;
        assert!(f.store.head(&old_metadata).await.is_err(), "the journal has it now");
    }
    let other = Fixture::new();
    other.run(FORMAT_1).await;
    other.run(r#"UPDATE thalweg_setting SET "value" = '43' WHERE "key" = 'seed'"#).await;
    assert_eq!(other.open().await.unwrap_err().kind(), crate::ErrorKind::Corrupt);
}

#[tokio::test]
async fn rows_without_a_journal_are_refused() {
    let f = Fixture::new();
    let rows = object_store::path::Path::from("default/samples/20000/1.parquet");
    f.store.put(&rows, "x".into()).await.unwrap();
    let error = f.open().await.unwrap_err();
    assert!(error.kind() == crate::ErrorKind::Corrupt && error.message().contains(rows.as_ref()), "{error}");
    let error = FileCatalog::rebuild(f.store.clone(), "default", HOUR, |_| Ok(None)).await.unwrap_err();
    assert_eq!(error.kind(), crate::ErrorKind::NotFound);
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
async fn a_reader_holds_up_no_commit_and_keeps_what_it_began_with() {
    let f = Fixture::new();
    let (catalog, _) = f.open().await.unwrap();
    let mut reader = connect(&f.path()).await;
    let mut tx = reader.begin().await.unwrap();
    const FILES: &str = "SELECT count(*) FROM ducklake_data_file";
    let files: i64 = sqlx::query_scalar(FILES).fetch_one(&mut *tx).await.unwrap();
    for i in 1..4 {
        catalog.commit(&Commit { add: vec![file(i, 1)], ..Commit::default() }, HOUR).await.unwrap();
    }
    let again: i64 = sqlx::query_scalar(FILES).fetch_one(&mut *tx).await.unwrap();
    assert_eq!((files, again, catalog.behind()), (0, 0, 3), "the SQL catalog waits for its reader");
    tx.rollback().await.unwrap();
    catalog.follow().await;
    let now: i64 = sqlx::query_scalar(FILES).fetch_one(&mut reader).await.unwrap();
    assert_eq!((now, catalog.behind()), (3, 0));
}

/// SQLite's write-ahead log has an index that is mapped into memory: on a full disk touching it ends the process.
#[tokio::test]
async fn nothing_of_the_sql_catalog_is_mapped_into_memory() {
    let f = Fixture::new();
    let mapped = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|l| l.contains(&f.path().display().to_string())).map(str::to_owned).collect::<Vec<_>>()
    };
    let beside = || {
        let entries = std::fs::read_dir(f.dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        entries.filter(|n| n.ends_with("-shm") || n.ends_with("-wal")).collect::<Vec<_>>()
    };
    let (catalog, _) = f.open().await.unwrap();
    catalog.commit(&Commit { add: vec![file(1, 1)], ..Commit::default() }, HOUR).await.unwrap();
    assert_eq!((mapped(), beside()), (vec![], vec![]));
    catalog.close().await;
    // As an earlier version left it, which was killed.
    let mode: String = f.sql("PRAGMA journal_mode = WAL").await;
    assert_eq!(mode, "wal");
    let mut killed = connect(&f.path()).await;
    sqlx::raw_sql("UPDATE thalweg_setting SET \"value\" = \"value\"").execute(&mut killed).await.unwrap();
    assert_eq!(beside().len(), 2);
    let old = tempfile::tempdir().unwrap();
    for suffix in ["", "-wal", "-shm"] {
        let name = format!("catalog.sqlite{suffix}");
        std::fs::copy(f.dir.path().join(&name), old.path().join(&name)).unwrap();
    }
    drop(killed);
    let f = Fixture { dir: old, store: f.store.clone(), clock: f.clock.clone() };
    let (catalog, _) = f.open().await.unwrap();
    assert_eq!(catalog.behind(), 0);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains(&f.path().display().to_string()), "{maps}");
    let mode: String = f.sql("PRAGMA journal_mode").await;
    assert_eq!(mode, "delete", "which is what a rollback journal is called without a connection");
}

#[tokio::test]
async fn a_journal_that_lost_its_newest_entries_is_noticed() {
    let f = Fixture::new();
    let (catalog, _) = f.open().await.unwrap();
    for i in 1..4 {
        catalog.commit(&Commit { add: vec![file(i, 1)], ..Commit::default() }, HOUR).await.unwrap();
    }
    catalog.close().await;
    let entry = |number: u64| object_store::path::Path::from(format!("default/journal/{number:020}"));
    f.store.delete(&entry(4)).await.unwrap();
    let check = async |missing: &[u64]| {
        let error = f.open().await.unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Corrupt);
        assert!(missing.iter().all(|n| error.message().contains(&entry(*n).to_string())), "{error}");
    };
    check(&[4]).await;
    f.store.delete(&entry(3)).await.unwrap();
    check(&[3, 4]).await;
    // Whoever accepts the loss says so.
    FileCatalog::rebuild(f.store.clone(), "default", HOUR, |_| Ok(f.index())).await.unwrap();
    let (catalog, state) = f.open().await.unwrap();
    assert_eq!((state.files.len(), catalog.behind()), (1, 0));
}

#[tokio::test]
async fn the_database_is_small() {
    let f = Fixture::new();
    let (catalog, _) = f.open().await.unwrap();
    for i in 0..10 {
        let commit = Commit { add: vec![file(2 * i + 1, 1)], add_parts: vec![part(2 * i + 2, 1)], ..Commit::default() };
        catalog.commit(&commit, HOUR).await.unwrap();
    }
    let sizes: Vec<u64> =
        std::fs::read_dir(f.dir.path()).unwrap().map(|e| e.unwrap()).map(|e| e.metadata().unwrap().len()).collect();
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
