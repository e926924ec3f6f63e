//! Session variables: what `SET` and `SHOW` speak of.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Result, SqlError};

/// The version of PostgreSQL whose behaviour clients may expect.
const POSTGRES_VERSION: &str = "15.0";

/// Most variables of names that clients make up.
const MADE_UP_MAX: usize = 100;
/// Most bytes of a value, and of a name that a client makes up with its value.
const VALUE_BYTES_MAX: usize = 8192;
/// Most savepoints of a transaction, and the bytes of the variables that differ between them.
const SAVEPOINTS_MAX: usize = 10_000;
const SAVED_BYTES_MAX: usize = 1 << 20;

/// A known variable: its name, its default, and what may be done with it.
struct Known {
    name: &'static str,
    default: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Any value.
    Free,
    /// Any value; clients are told of it.
    Reported,
    /// Can't be set; clients are told of it.
    Fixed,
    /// Can't be set.
    Internal,
    /// A duration, in milliseconds when without unit.
    Duration,
    /// A time zone.
    Zone,
    /// What statements of a transaction see of changes.
    Isolation,
}

const fn known(name: &'static str, default: &'static str, kind: Kind) -> Known {
    Known { name, default, kind }
}

/// In order of name, without regard to case.
const KNOWN: &[Known] = &[
    known("application_name", "", Kind::Reported),
    known("bytea_output", "hex", Kind::Free),
    known("client_encoding", "UTF8", Kind::Reported),
    known("client_min_messages", "notice", Kind::Free),
    known("DateStyle", "ISO, MDY", Kind::Reported),
    known("default_transaction_isolation", "repeatable read", Kind::Isolation),
    known("default_transaction_read_only", "on", Kind::Reported),
    known("extra_float_digits", "1", Kind::Free),
    known("idle_in_transaction_session_timeout", "0", Kind::Duration),
    known("idle_session_timeout", "0", Kind::Duration),
    known("in_hot_standby", "off", Kind::Fixed),
    known("integer_datetimes", "on", Kind::Fixed),
    known("IntervalStyle", "postgres", Kind::Reported),
    known("is_superuser", "off", Kind::Fixed),
    known("jit", "off", Kind::Free),
    known("lc_collate", "C", Kind::Internal),
    known("lc_ctype", "C", Kind::Internal),
    known("lc_messages", "C", Kind::Free),
    known("lc_monetary", "C", Kind::Free),
    known("lc_numeric", "C", Kind::Free),
    known("lc_time", "C", Kind::Free),
    known("lock_timeout", "0", Kind::Duration),
    known("max_identifier_length", "63", Kind::Internal),
    known("max_index_keys", "32", Kind::Internal),
    known("row_security", "on", Kind::Free),
    known("search_path", "\"$user\", public", Kind::Free),
    known("server_encoding", "UTF8", Kind::Fixed),
    known("server_version", "", Kind::Fixed),
    known("server_version_num", "150000", Kind::Internal),
    known("session_authorization", "", Kind::Fixed),
    known("standard_conforming_strings", "on", Kind::Reported),
    known("statement_timeout", "0", Kind::Duration),
    known("synchronize_seqscans", "on", Kind::Free),
    known("TimeZone", "UTC", Kind::Zone),
    known("transaction_isolation", "repeatable read", Kind::Isolation),
    known("transaction_read_only", "on", Kind::Free),
    known("xmloption", "content", Kind::Free),
];

fn find(name: &str) -> Option<&'static Known> {
    KNOWN.iter().find(|k| k.name.eq_ignore_ascii_case(name))
}

/// The variables of a session.
#[derive(Debug, Clone)]
pub struct Variables {
    user: String,
    /// Those that differ from their default, by lower-case name.
    values: BTreeMap<String, String>,
    /// What a rollback leads back to, within a transaction.
    before: Option<BTreeMap<String, String>>,
    /// Those that are set for the transaction alone, with the values to which its end leads back.
    local: BTreeMap<String, Option<String>>,
    /// Of the transaction, oldest first.
    savepoints: Vec<Savepoint>,
}

/// What a transaction may go back to.
#[derive(Debug, Clone)]
struct Savepoint {
    name: String,
    /// The same for those between which nothing was set.
    saved: Arc<Saved>,
}

/// What variables were.
#[derive(Debug, PartialEq, Eq)]
struct Saved {
    values: BTreeMap<String, String>,
    local: BTreeMap<String, Option<String>>,
}

impl Saved {
    fn bytes(&self) -> usize {
        let values = self.values.iter().map(|(k, v)| k.len() + v.len());
        let local = self.local.iter().map(|(k, v)| k.len() + v.as_ref().map_or(0, String::len));
        values.chain(local).sum()
    }
}

impl Variables {
    /// Defaults for a session of `user`.
    pub fn new(user: &str) -> Self {
        Self {
            user: user.to_owned(),
            values: BTreeMap::new(),
            before: None,
            local: BTreeMap::new(),
            savepoints: vec![],
        }
    }

    /// The user.
    pub fn user(&self) -> &str {
        &self.user
    }

    fn value(&self, known: &Known) -> String {
        if let Some(value) = self.values.get(&known.name.to_ascii_lowercase()) {
            return value.clone();
        }
        match known.name {
            "server_version" => server_version(),
            "session_authorization" => self.user.clone(),
            "transaction_isolation" => {
                self.values.get("default_transaction_isolation").map_or(known.default, String::as_str).to_owned()
            }
            _ => known.default.to_owned(),
        }
    }

    /// A variable's proper name and value.
    ///
    /// # Errors
    /// 42704 for an unknown name.
    pub fn get(&self, name: &str) -> Result<(String, String)> {
        if let Some(known) = find(name) {
            return Ok((known.name.to_owned(), self.value(known)));
        }
        let lower = name.to_ascii_lowercase();
        match self.values.get(&lower) {
            Some(value) => Ok((lower, value.clone())),
            None => Err(unknown(name)),
        }
    }

    /// Sets a variable, to its default when there is no value; returns its name and value if clients are to be told.
    ///
    /// # Errors
    /// 42704 for an unknown name, 22023 for a value that it can't have, 55P02 for a variable that can't be set.
    pub fn set(&mut self, name: &str, value: Option<&str>) -> Result<Option<(&'static str, String)>> {
        let lower = name.to_ascii_lowercase();
        let Some(known) = find(name) else {
            // A name with a dot belongs to whoever made it up.
            if !lower.contains('.') {
                return Err(unknown(name));
            }
            let made_up = self.values.keys().filter(|k| k.contains('.') && **k != lower).count();
            let length = lower.len() + value.map_or(0, str::len);
            if value.is_some() && (made_up >= MADE_UP_MAX || length > VALUE_BYTES_MAX) {
                let message = format!(
                    "a session keeps at most {MADE_UP_MAX} parameters of its own, of {VALUE_BYTES_MAX} bytes each"
                );
                return Err(SqlError::new("54000", message));
            }
            match value {
                Some(value) => self.values.insert(lower, value.to_owned()),
                None => self.values.remove(&lower),
            };
            return Ok(None);
        };
        if let Some(value) = value {
            let value = checked(known, value)?;
            self.values.insert(lower, value);
        } else {
            self.values.remove(&lower);
        }
        let told = matches!(known.kind, Kind::Reported | Kind::Zone);
        Ok(told.then(|| (known.name, self.value(known))))
    }

    /// Begins a transaction.
    pub fn begin(&mut self) {
        if self.before.is_none() {
            self.before = Some(self.values.clone());
        }
    }

    /// Ends a transaction.
    pub fn end(&mut self, committed: bool) {
        self.savepoints.clear();
        let local = std::mem::take(&mut self.local);
        match self.before.take() {
            Some(before) if !committed => self.values = before,
            _ => {
                for (name, value) in local {
                    match value {
                        Some(value) => self.values.insert(name, value),
                        None => self.values.remove(&name),
                    };
                }
            }
        }
    }

    /// How many savepoints the transaction has.
    pub fn savepoints(&self) -> usize {
        self.savepoints.len()
    }

    /// Makes a savepoint. There may be others of its name.
    ///
    /// # Errors
    /// 54000 when there are too many.
    pub fn savepoint(&mut self, name: &str) -> Result<()> {
        let now = Saved { values: self.values.clone(), local: self.local.clone() };
        let last = self.savepoints.last().map(|s| s.saved.clone()).filter(|saved| **saved == now);
        let mut distinct: Vec<&Arc<Saved>> = self.savepoints.iter().map(|s| &s.saved).collect();
        distinct.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let bytes =
            distinct.iter().map(|s| s.bytes()).sum::<usize>() + last.as_ref().map_or_else(|| now.bytes(), |_| 0);
        if self.savepoints.len() >= SAVEPOINTS_MAX || bytes > SAVED_BYTES_MAX {
            let message = format!(
                "a transaction has at most {SAVEPOINTS_MAX} savepoints, with {SAVED_BYTES_MAX} bytes of parameters"
            );
            return Err(SqlError::new("54000", message).hint("Release those that are not needed any more."));
        }
        self.savepoints.push(Savepoint { name: name.to_owned(), saved: last.unwrap_or_else(|| Arc::new(now)) });
        Ok(())
    }

    fn find_savepoint(&self, name: &str) -> Result<usize> {
        let missing = || SqlError::new("3B001", format!("savepoint \"{name}\" does not exist"));
        self.savepoints.iter().rposition(|s| s.name == name).ok_or_else(missing)
    }

    /// Forgets a savepoint and those after it.
    ///
    /// # Errors
    /// 3B001 when there is none of this name.
    pub fn release(&mut self, name: &str) -> Result<()> {
        self.savepoints.truncate(self.find_savepoint(name)?);
        Ok(())
    }

    /// Takes back what was set since a savepoint, which stays.
    ///
    /// # Errors
    /// 3B001 when there is none of this name.
    pub fn roll_back_to(&mut self, name: &str) -> Result<()> {
        let at = self.find_savepoint(name)?;
        let saved = &self.savepoints[at].saved;
        (self.values, self.local) = (saved.values.clone(), saved.local.clone());
        self.savepoints.truncate(at + 1);
        Ok(())
    }

    /// Sets a variable until the end of the transaction; outside of one that is at once.
    ///
    /// # Errors
    /// Those of [`Variables::set`].
    pub fn set_local(&mut self, name: &str, value: Option<&str>) -> Result<Option<(&'static str, String)>> {
        let lower = name.to_ascii_lowercase();
        let before = self.values.get(&lower).cloned();
        if self.before.is_none() {
            // The value is checked, and forgotten.
            self.set(name, value)?;
            match before {
                Some(before) => self.values.insert(lower, before),
                None => self.values.remove(&lower),
            };
            return Ok(None);
        }
        let told = self.set(name, value)?;
        self.local.entry(lower).or_insert(before);
        Ok(told)
    }

    /// Sets all variables to their defaults.
    pub fn reset(&mut self) {
        self.values.clear();
    }

    /// All known variables with their values.
    pub fn all(&self) -> impl Iterator<Item = (String, String)> + '_ {
        KNOWN.iter().map(|k| (k.name.to_owned(), self.value(k)))
    }

    /// Those that clients are told when they connect.
    pub fn reported(&self) -> Vec<(String, String)> {
        let told = |k: &&Known| matches!(k.kind, Kind::Reported | Kind::Fixed | Kind::Zone);
        KNOWN.iter().filter(told).map(|k| (k.name.to_owned(), self.value(k))).collect()
    }

    /// The deadline of statements; `None` when there is none.
    pub fn statement_timeout(&self) -> Option<Duration> {
        let value = self.values.get("statement_timeout")?;
        duration(value).filter(|d| !d.is_zero())
    }

    /// How long a client may be idle, within a transaction or outside; `None` for ever.
    pub fn idle_timeout(&self, in_transaction: bool) -> Option<Duration> {
        let name = if in_transaction { "idle_in_transaction_session_timeout" } else { "idle_session_timeout" };
        duration(self.values.get(name)?).filter(|d| !d.is_zero())
    }

    /// Whether all statements of a transaction see the same.
    pub fn repeatable(&self) -> bool {
        let level = ["transaction_isolation", "default_transaction_isolation"].iter().find_map(|n| self.values.get(*n));
        !level.is_some_and(|level| level.starts_with("read"))
    }

    /// The time zone.
    pub fn time_zone(&self) -> Arc<str> {
        self.values.get("timezone").map_or_else(|| Arc::from("UTC"), |z| Arc::from(z.as_str()))
    }

    /// The schema in which names without one are looked up: the first of `search_path` that isn't the user's own.
    pub fn schema(&self) -> String {
        let path = self.values.get("search_path").map_or("public", String::as_str);
        path.split(',')
            .map(|s| s.trim().trim_matches('"').to_owned())
            .find(|s| !s.is_empty() && s != "$user" && s != "pg_catalog")
            .unwrap_or_else(|| "public".to_owned())
    }
}

/// What `server_version` says.
pub fn server_version() -> String {
    format!("{POSTGRES_VERSION} (Thalweg {})", env!("CARGO_PKG_VERSION"))
}

/// What `version()` says.
pub fn version() -> String {
    format!("PostgreSQL {POSTGRES_VERSION} (Thalweg {})", env!("CARGO_PKG_VERSION"))
}

fn unknown(name: &str) -> SqlError {
    SqlError::new("42704", format!("unrecognized configuration parameter {name:?}"))
}

fn checked(known: &Known, value: &str) -> Result<String> {
    let invalid = || SqlError::new("22023", format!("invalid value for parameter {:?}: {value:?}", known.name));
    match known.kind {
        Kind::Fixed | Kind::Internal => {
            Err(SqlError::new("55P02", format!("parameter {:?} cannot be changed", known.name)))
        }
        Kind::Isolation => {
            let value = value.to_ascii_lowercase();
            let levels = ["read uncommitted", "read committed", "repeatable read", "serializable"];
            levels.contains(&&*value).then_some(value).ok_or_else(invalid)
        }
        Kind::Duration => duration(value).map(|_| value.to_owned()).ok_or_else(invalid),
        Kind::Zone => crate::session::is_time_zone(value).then(|| value.to_owned()).ok_or_else(invalid),
        _ if known.name == "client_encoding" => {
            let plain: String = value.chars().filter(char::is_ascii_alphanumeric).collect();
            let utf8 = ["utf8", "unicode", "auto"].contains(&plain.to_ascii_lowercase().as_str());
            utf8.then(|| "UTF8".to_owned()).ok_or_else(invalid)
        }
        _ if value.len() > VALUE_BYTES_MAX => Err(invalid()),
        Kind::Free | Kind::Reported => Ok(value.to_owned()),
    }
}

/// `500`, `500ms`, `5s`, `1min`, `1h`, `1d`.
fn duration(value: &str) -> Option<Duration> {
    let value = value.trim();
    let unit = value.find(|c: char| !c.is_ascii_digit()).unwrap_or(value.len());
    let (number, unit) = value.split_at(unit);
    let number: u64 = number.parse().ok()?;
    let millis = match unit.trim() {
        "" | "ms" => 1,
        "s" => 1_000,
        "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    number.checked_mul(millis).map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let check =
            |text: &str, expected: Option<u64>| assert_eq!(duration(text).map(|d| d.as_millis() as u64), expected);
        check("0", Some(0));
        check("500", Some(500));
        check("500ms", Some(500));
        check(" 5 s ", Some(5_000));
        check("2min", Some(120_000));
        check("-1", None);
        check("1y", None);
        check("", None);
        check("99999999999999999999", None);
    }

    #[test]
    fn the_end_of_a_transaction_takes_settings_back() {
        let mut v = Variables::new("me");
        v.set("lock_timeout", Some("1")).unwrap();
        let check = |v: &Variables, lock: &str, statement: &str| {
            let get = |name: &str| v.get(name).unwrap().1;
            assert_eq!((&*get("lock_timeout"), &*get("statement_timeout")), (lock, statement));
        };
        v.set_local("lock_timeout", Some("2")).unwrap();
        check(&v, "1", "0");
        assert_eq!(v.set_local("lock_timeout", Some("x")).unwrap_err().code, "22023");
        v.begin();
        v.set_local("lock_timeout", Some("2")).unwrap();
        v.set_local("lock_timeout", Some("3")).unwrap();
        v.set("statement_timeout", Some("4")).unwrap();
        check(&v, "3", "4");
        v.end(true);
        check(&v, "1", "4");
        v.begin();
        v.set("lock_timeout", Some("5")).unwrap();
        v.set_local("statement_timeout", Some("6")).unwrap();
        check(&v, "5", "6");
        v.end(false);
        check(&v, "1", "4");
    }

    #[test]
    fn variables_are_set_shown_and_reset() {
        let mut v = Variables::new("me");
        assert_eq!(v.get("TIMEZONE").unwrap(), ("TimeZone".to_owned(), "UTC".to_owned()));
        assert_eq!(v.set("timezone", Some("Europe/Berlin")).unwrap(), Some(("TimeZone", "Europe/Berlin".to_owned())));
        assert_eq!(&*v.time_zone(), "Europe/Berlin");
        assert_eq!(v.set("timezone", Some("Nowhere")).unwrap_err().code, "22023");
        assert_eq!(v.set("server_version", Some("1")).unwrap_err().code, "55P02");
        assert_eq!(v.set("nonsense", Some("1")).unwrap_err().code, "42704");
        assert_eq!(v.get("nonsense").unwrap_err().code, "42704");
        v.set("my.own", Some("x")).unwrap();
        assert_eq!(v.get("my.own").unwrap().1, "x");
        assert_eq!(v.set("my.large", Some(&"x".repeat(9000))).unwrap_err().code, "54000");
        assert_eq!(v.set("application_name", Some(&"x".repeat(9000))).unwrap_err().code, "22023");
        v.set("statement_timeout", Some("5s")).unwrap();
        assert_eq!(v.statement_timeout(), Some(Duration::from_secs(5)));
        assert_eq!(v.schema(), "public");
        v.set("search_path", Some("\"$user\", prometheus")).unwrap();
        assert_eq!(v.schema(), "prometheus");
        assert_eq!(v.idle_timeout(false), None);
        v.set("idle_session_timeout", Some("1min")).unwrap();
        assert_eq!((v.idle_timeout(false), v.idle_timeout(true)), (Some(Duration::from_secs(60)), None));
        v.reset();
        assert_eq!((v.statement_timeout(), &*v.time_zone(), v.schema().as_str()), (None, "UTC", "public"));
        assert_eq!(v.get("session_authorization").unwrap().1, "me");
    }
}
