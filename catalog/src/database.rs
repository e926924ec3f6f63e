//! What a database is: its description, the one object of its bucket that is made before all others.

use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode};
use serde::{Deserialize, Serialize};

use crate::journal::{FOLDERS, retried};
use crate::{Error, Result, tables};

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
/// `Corrupt` when it does not parse, or when only it is missing; `Invalid` when a newer version made it; store errors.
pub async fn open(store: &dyn ObjectStore, database: &str, new_seed: u64) -> Result<Description> {
    let location = Path::from(format!("{database}/database.json"));
    let read = || async {
        match store.get(&location).await {
            Ok(found) => Ok(Some(found.bytes().await?)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(Error::from(e)),
        }
    };
    let what = format!("read {location}");
    let mut text = retried(&what, read).await?;
    if text.is_none() {
        let left = retried(&format!("list {database}"), || remains(store, database)).await?;
        // Another node may have made it, and what is there, since it was looked for.
        text = retried(&what, read).await?;
        match (&text, left) {
            (None, Some(left)) => {
                return Err(Error::corrupt(format!(
                    "{location} is missing, but {left} exists; put it back from a backup of the bucket"
                )));
            }
            (None, None) => {
                create(store, &location, new_seed).await?;
                // Whether it was there before or a lost answer had made it: what is there counts.
                text = retried(&what, read).await?;
            }
            _ => {}
        }
    }
    let text = text.ok_or_else(|| Error::unavailable(format!("{location} was made and can't be found")))?;
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

async fn create(store: &dyn ObjectStore, location: &Path, seed: u64) -> Result<()> {
    let made = Description { format: FORMAT, seed };
    let text = serde_json::to_vec(&made).map_err(|e| Error::internal("description of the database").with_source(e))?;
    let create = || async {
        match store.put_opts(location, text.clone().into(), PutMode::Create.into()).await {
            Ok(_) | Err(object_store::Error::AlreadyExists { .. }) => Ok(()),
            Err(e) => Err(Error::from(e)),
        }
    };
    retried(&format!("create {location}"), create).await
}

/// An object of the journal or of a table, should there be one: a new description would give its codes another seed.
async fn remains(store: &dyn ObjectStore, database: &str) -> Result<Option<Path>> {
    for folder in FOLDERS.into_iter().chain(tables::all().iter().map(|t| t.name)) {
        let folder = Path::from(format!("{database}/{folder}"));
        if let Some(object) = store.list(Some(&folder)).try_next().await? {
            return Ok(Some(object.location));
        }
    }
    Ok(None)
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
    async fn a_description_that_alone_is_gone_is_not_made_anew() {
        for left in ["db/checkpoints/00000000000000000000", "db/samples/20000/1.parquet"] {
            let store = InMemory::new();
            open(&store, "db", 1).await.unwrap();
            store.put(&Path::from(left), "x".into()).await.unwrap();
            store.delete(&Path::from("db/database.json")).await.unwrap();
            let error = open(&store, "db", 2).await.unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::Corrupt);
            assert!(
                error.message().contains("db/database.json is missing") && error.message().contains(left),
                "{error}"
            );
            assert!(store.head(&Path::from("db/database.json")).await.is_err(), "nothing is in its place");
        }
    }
}
