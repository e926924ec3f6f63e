//! Views: queries under names. The journal keeps them, and all sessions see the same.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use catalog::{Commit, Error, Result, View};

use crate::Engine;
use crate::engine::Inner;

/// Most views that a database may have.
const VIEWS_MAX: usize = 1000;
/// Most bytes of the definition of one, and of all: the journal repeats them in each checkpoint.
const BYTES_MAX: usize = 64 << 10;
const BYTES_OF_ALL_MAX: usize = 4 << 20;

/// The views of a database.
#[derive(Debug)]
pub(crate) struct Views {
    by_name: ArcSwap<BTreeMap<String, Arc<View>>>,
    /// Held by who changes them.
    changing: tokio::sync::Mutex<()>,
}

impl Views {
    pub fn new(views: &[View]) -> Self {
        let by_name = views.iter().map(|v| (v.name.clone(), Arc::new(v.clone()))).collect();
        Self { by_name: ArcSwap::from_pointee(by_name), changing: tokio::sync::Mutex::default() }
    }

    /// All, by name.
    pub fn all(&self) -> Arc<BTreeMap<String, Arc<View>>> {
        self.by_name.load_full()
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, Arc<View>>)) {
        let mut by_name = BTreeMap::clone(&self.by_name.load());
        change(&mut by_name);
        self.by_name.store(Arc::new(by_name));
    }
}

/// What a view takes, about.
fn bytes(view: &View) -> usize {
    view.name.len() + view.definition.len() + view.columns.iter().map(String::len).sum::<usize>()
}

impl Engine {
    /// The views, by name; those that a snapshot has.
    pub fn views(&self) -> Arc<BTreeMap<String, Arc<View>>> {
        self.frozen_views().unwrap_or_else(|| self.inner().views.all())
    }

    /// Makes a view; durable when it returns. False, and nothing is made, when one of its name exists that shall not be
    /// replaced. It goes on when the caller goes away.
    ///
    /// # Errors
    /// `LimitExceeded` when there are too many or their definitions are too long; those of a commit.
    pub async fn create_view(&self, view: View, replace: bool) -> Result<bool> {
        let bytes = bytes(&view);
        if bytes > BYTES_MAX {
            return Err(Error::limit_exceeded(format!(
                "view \"{}\" has a definition of {bytes} bytes; {BYTES_MAX} are allowed",
                view.name
            )));
        }
        self.change_views(move |known| {
            let exists = known.contains_key(&view.name);
            if exists && !replace {
                return Ok(None);
            }
            if !exists && known.len() >= VIEWS_MAX {
                return Err(Error::limit_exceeded(format!("a database has at most {VIEWS_MAX} views")));
            }
            let others = known.values().filter(|v| v.name != view.name).map(|v| self::bytes(v)).sum::<usize>();
            if others + bytes > BYTES_OF_ALL_MAX {
                return Err(Error::limit_exceeded(format!(
                    "definitions of views would take {} bytes; {BYTES_OF_ALL_MAX} are allowed",
                    others + bytes
                )));
            }
            Ok(Some(Commit { views: vec![view], ..Commit::default() }))
        })
        .await
    }

    /// Drops those of the views that there are; durable when it returns. False when there is none of them.
    ///
    /// # Errors
    /// Those of a commit.
    pub async fn drop_views(&self, mut names: Vec<String>) -> Result<bool> {
        self.change_views(move |known| {
            names.retain(|name| known.contains_key(name));
            let some = !names.is_empty();
            Ok(some.then(|| Commit { drop_views: names, ..Commit::default() }))
        })
        .await
    }

    async fn change_views(
        &self,
        commit: impl FnOnce(&BTreeMap<String, Arc<View>>) -> Result<Option<Commit>> + Send + 'static,
    ) -> Result<bool> {
        let inner: Arc<Inner> = self.inner().clone();
        // What was begun may be made, and is then to be seen.
        let work = tokio::spawn(async move {
            let _changing = inner.views.changing.lock().await;
            let Some(commit) = commit(&inner.views.by_name.load())? else { return Ok(false) };
            inner.files.commit(&commit, inner.now_ms()).await?;
            inner.views.change(|by_name| {
                by_name.retain(|name, _| !commit.drop_views.contains(name));
                by_name.extend(commit.views.iter().map(|v| (v.name.clone(), Arc::new(v.clone()))));
            });
            Ok(true)
        });
        work.await.map_err(|e| Error::internal("change of a view did not end").with_source(e))?
    }
}
