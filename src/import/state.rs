//! What an import has stored, in a small file, so that it goes on where it stopped.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::batch::Position;

/// The file's version.
const VERSION: u64 = 1;

/// The state of one import.
#[derive(Debug, Clone)]
pub struct State {
    path: PathBuf,
    /// What is imported into what, in words: another import must not take this for its own.
    import: String,
    /// Units of which all is stored.
    done: BTreeSet<String>,
    /// The unit under way.
    unit: String,
    /// Series of it that are stored.
    items: u64,
}

impl State {
    /// Reads the file, or begins anew when there is none.
    ///
    /// # Errors
    /// A file that is unreadable, of another version, or of another import.
    pub fn open(path: &Path, import: &str) -> Result<Self> {
        let mut state = Self {
            path: path.to_owned(),
            import: import.to_owned(),
            done: BTreeSet::new(),
            unit: String::new(),
            items: 0,
        };
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(state),
            Err(e) => return Err(e).with_context(|| format!("cannot read state file {}", path.display())),
        };
        state.load(&text).with_context(|| format!("in state file {}", path.display()))?;
        Ok(state)
    }

    fn load(&mut self, text: &[u8]) -> Result<()> {
        let json: Value = serde_json::from_slice(text)?;
        ensure!(json["version"] == VERSION, "version is {}; {VERSION} is known", json["version"]);
        let Some(import) = json["import"].as_str() else { bail!("it does not say what was imported") };
        ensure!(
            import == self.import,
            "it belongs to another import ({import}); this is {}. Name another file with --state, or remove it",
            self.import
        );
        self.done =
            json["done"].as_array().into_iter().flatten().filter_map(|u| Some(u.as_str()?.to_owned())).collect();
        self.unit = json["unit"].as_str().unwrap_or_default().to_owned();
        self.items = json["items"].as_u64().unwrap_or(0);
        Ok(())
    }

    /// Whether all of a unit is stored.
    pub fn is_done(&self, unit: &str) -> bool {
        self.done.contains(unit)
    }

    /// Series of a unit that are stored.
    pub fn items(&self, unit: &str) -> u64 {
        if self.unit == unit { self.items } else { 0 }
    }

    /// All up to here is stored.
    pub fn reached(&mut self, position: &Position) {
        if position.end {
            self.done.insert(position.unit.clone());
        }
        self.unit.clone_from(&position.unit);
        self.items = position.items;
    }

    /// Writes the file.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn save(&self) -> Result<()> {
        let json = json!({
            "version": VERSION, "import": self.import, "done": self.done, "unit": self.unit, "items": self.items,
        });
        let mut next = self.path.clone().into_os_string();
        next.push(".new");
        std::fs::write(&next, format!("{json:#}\n"))
            .and_then(|()| std::fs::rename(&next, &self.path))
            .with_context(|| format!("cannot write state file {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_on_where_it_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let mut state = State::open(&path, "a into b").unwrap();
        assert_eq!((state.is_done("x"), state.items("x")), (false, 0));
        state.reached(&Position { unit: "x".to_owned(), items: 9, end: true });
        state.reached(&Position { unit: "y".to_owned(), items: 5, end: false });
        state.save().unwrap();
        let state = State::open(&path, "a into b").unwrap();
        assert_eq!((state.is_done("x"), state.is_done("y"), state.items("y")), (true, false, 5));
        let other = format!("{:#}", State::open(&path, "c into b").unwrap_err());
        assert!(other.contains("a into b") && other.contains("--state"), "{other}");
        std::fs::write(&path, r#"{"version": 2}"#).unwrap();
        assert!(format!("{:#}", State::open(&path, "a into b").unwrap_err()).contains("version is 2; 1 is known"));
        std::fs::write(&path, "no JSON").unwrap();
        assert!(State::open(&path, "a into b").is_err());
    }
}
