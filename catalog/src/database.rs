//! What a database is, kept in its bucket: its description and the metadata of metrics. With these and the footers of
//! its files the SQL file catalog can be made again.

use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Version of the database's layout in the bucket.
pub const FORMAT: u32 = 1;

/// The content of `<database>/database.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// [`FORMAT`] of the version that made it.
    pub format: u32,
    /// Seed of all codes; a text in JSON, whose numbers end at 2^53.
    #[serde(with = "seed_text")]
    pub seed: u64,
}

mod seed_text {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(seed: &u64, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(seed)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
        String::deserialize(d)?.parse().map_err(de::Error::custom)
    }
}

/// Reads the description of a database, creating it with `new_seed` on first use. Of several nodes that create it at the
/// same time one wins and all get its seed.
///
/// # Errors
/// `Corrupt` when it does not parse, `Invalid` when a newer version made it; store errors.
pub async fn open(store: &dyn ObjectStore, database: &str, new_seed: u64) -> Result<Description> {
    let location = Path::from(format!("{database}/database.json"));
    let made = Description { format: FORMAT, seed: new_seed };
    let text = serde_json::to_vec(&made).map_err(|e| Error::internal("description of the database").with_source(e))?;
    match store.put_opts(&location, text.into(), PutMode::Create.into()).await {
        Ok(_) => return Ok(made),
        Err(object_store::Error::AlreadyExists { .. }) => {}
        Err(e) => return Err(Error::from(e).context(&location)),
    }
    let text = store.get(&location).await?.bytes().await?;
    let found: Description = serde_json::from_slice(&text)
        .map_err(|e| Error::corrupt(format!("{location} does not parse")).with_source(e))?;
    if found.format > FORMAT {
        return Err(Error::invalid(format!(
            "{location} has format {}, which is newer than this version, which reads up to {FORMAT}",
            found.format
        )));
    }
    Ok(found)
}

/// Metric metadata as numbered objects, `<database>/meta/<n>.json`: one line `["<metric>", <json>]` per metric, later
/// objects and lines win. The file catalog holds the same for everyday use.
#[derive(Debug)]
pub struct MetadataLog {
    folder: Path,
    /// Numbers of the objects, ascending.
    numbers: Vec<u64>,
}

/// More objects than this become one.
const OBJECTS_MAX: usize = 64;

impl MetadataLog {
    /// Lists what is there.
    ///
    /// # Errors
    /// Of the store.
    pub async fn open(store: &dyn ObjectStore, database: &str) -> Result<Self> {
        let folder = Path::from(format!("{database}/meta"));
        let objects: Vec<_> = store.list(Some(&folder)).try_collect().await?;
        let number = |name: &str| name.strip_suffix(".json")?.parse().ok();
        let mut numbers: Vec<u64> = objects.iter().filter_map(|o| number(o.location.filename()?)).collect();
        numbers.sort_unstable();
        Ok(Self { folder, numbers })
    }

    /// Adds metadata: metric names and JSON values. Durable when it returns.
    ///
    /// # Errors
    /// `Invalid` when a value is not JSON; store errors, after which it may be tried again.
    pub async fn append(&mut self, store: &dyn ObjectStore, metadata: &[(String, String)]) -> Result<()> {
        if metadata.is_empty() {
            return Ok(());
        }
        let mut all = Vec::new();
        let replaced = if self.numbers.len() < OBJECTS_MAX { 0 } else { self.numbers.len() };
        if replaced > 0 {
            all = self.load(store).await?;
        }
        all.extend_from_slice(metadata);
        let number = self.numbers.last().map_or(1, |n| n + 1);
        store.put(&self.location(number), lines(&newest(all))?.into()).await?;
        self.numbers.push(number);
        // Only now: the new object says all that these said.
        while self.numbers.len() > 1 && replaced > 0 {
            match store.delete(&self.location(self.numbers[0])).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => self.numbers.remove(0),
                Err(e) => {
                    tracing::warn!(error = %e, "replaced metadata object was not deleted");
                    break;
                }
            };
        }
        Ok(())
    }

    /// All metadata, sorted by metric.
    ///
    /// # Errors
    /// `Corrupt` naming an object that does not parse; store errors.
    pub async fn load(&self, store: &dyn ObjectStore) -> Result<Vec<(String, String)>> {
        let mut all = Vec::new();
        for number in &self.numbers {
            let location = self.location(*number);
            let text = store.get(&location).await?.bytes().await?;
            for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
                let (metric, json): (String, serde_json::Value) = serde_json::from_slice(line)
                    .map_err(|e| Error::corrupt(format!("{location} does not parse")).with_source(e))?;
                all.push((metric, json.to_string()));
            }
        }
        Ok(newest(all))
    }

    fn location(&self, number: u64) -> Path {
        self.folder.clone().join(format!("{number}.json"))
    }
}

/// The last value of each metric, sorted by metric.
fn newest(mut all: Vec<(String, String)>) -> Vec<(String, String)> {
    all.reverse();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all.dedup_by(|a, b| a.0 == b.0);
    all
}

fn lines(metadata: &[(String, String)]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for (metric, json) in metadata {
        let wrong = |e: serde_json::Error| Error::invalid(format!("metadata of {metric:?} is not JSON")).with_source(e);
        let value: serde_json::Value = serde_json::from_str(json).map_err(wrong)?;
        serde_json::to_writer(&mut out, &(metric, value)).map_err(wrong)?;
        out.push(b'\n');
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    #[tokio::test]
    async fn the_first_seed_stays() {
        let store = InMemory::new();
        let seed = u64::MAX - 1;
        assert_eq!(open(&store, "db", seed).await.unwrap(), Description { format: 1, seed });
        assert_eq!(open(&store, "db", 5).await.unwrap().seed, seed);
        assert_eq!(open(&store, "other", 5).await.unwrap().seed, 5);
        let location = Path::from("db/database.json");
        let check = async |text: &'static str, kind| {
            store.put(&location, text.into()).await.unwrap();
            assert_eq!(open(&store, "db", 5).await.unwrap_err().kind(), kind, "{text}");
        };
        check(r#"{"format":99,"seed":"1","more":true}"#, crate::ErrorKind::Invalid).await;
        check(r#"{"format":1}"#, crate::ErrorKind::Corrupt).await;
        check("", crate::ErrorKind::Corrupt).await;
    }

    #[tokio::test]
    async fn newest_metadata_wins() {
        let store = InMemory::new();
        let mut log = MetadataLog::open(&store, "db").await.unwrap();
        let entry = |metric: &str, json: &str| (metric.to_owned(), json.to_owned());
        log.append(&store, &[entry("b", "1"), entry("a", r#"{"kind":"gauge"}"#), entry("b", "2")]).await.unwrap();
        assert!(log.append(&store, &[entry("x", "{")]).await.is_err());
        let mut log = MetadataLog::open(&store, "db").await.unwrap();
        for round in 0..3 * OBJECTS_MAX {
            log.append(&store, &[entry("c", &round.to_string())]).await.unwrap();
        }
        assert!(log.numbers.len() <= OBJECTS_MAX);
        let reopened = MetadataLog::open(&store, "db").await.unwrap();
        assert_eq!(reopened.numbers, log.numbers);
        let last = (3 * OBJECTS_MAX - 1).to_string();
        let expected = [entry("a", r#"{"kind":"gauge"}"#), entry("b", "2"), entry("c", &last)];
        assert_eq!(reopened.load(&store).await.unwrap(), expected);
        store.put(&reopened.location(999), "[1]".into()).await.unwrap();
        let reopened = MetadataLog::open(&store, "db").await.unwrap();
        assert_eq!(reopened.load(&store).await.unwrap_err().kind(), crate::ErrorKind::Corrupt);
    }
}
