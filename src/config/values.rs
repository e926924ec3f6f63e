//! The types of settings: each has one text form, the same in the file, in the environment and in flags.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use catalog::tag::METRIC_NAME;
use catalog::{MatchOp, Secret, tables};
use engine::RetentionRule;

/// A type that settings can have.
pub trait Setting: Sized {
    /// What a value looks like, for the reference page.
    const KIND: &'static str;

    /// Reads the text form.
    ///
    /// # Errors
    /// A message that names what was seen and what is allowed.
    fn parse(text: &str) -> Result<Self, String>;

    /// The text form.
    fn show(&self) -> String;
}

impl Setting for String {
    const KIND: &'static str = "text";

    fn parse(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }

    fn show(&self) -> String {
        self.clone()
    }
}

impl Setting for PathBuf {
    const KIND: &'static str = "path";

    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() { Err("the path is empty".to_owned()) } else { Ok(Self::from(text)) }
    }

    fn show(&self) -> String {
        self.display().to_string()
    }
}

impl Setting for u64 {
    const KIND: &'static str = "whole number";

    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| format!("{text:?} is not a whole number of at least 0"))
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Setting for Secret {
    const KIND: &'static str = "secret text, or file:PATH for one that stands in a file";

    fn parse(text: &str) -> Result<Self, String> {
        Self::parse(text).map_err(|e| e.to_string())
    }

    /// Empty when there is none, and otherwise nothing that tells one from another.
    fn show(&self) -> String {
        if self.is_empty() { String::new() } else { self.to_string() }
    }
}

/// Several texts, of which none has a semicolon.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Texts(pub Vec<String>);

impl Setting for Texts {
    const KIND: &'static str = "list of texts; outside of the file one text, with semicolons between them";

    fn parse(text: &str) -> Result<Self, String> {
        Ok(Self(text.split(';').map(str::trim).filter(|t| !t.is_empty()).map(str::to_owned).collect()))
    }

    fn show(&self) -> String {
        self.0.join("; ")
    }
}

/// `true` or `false`; `on` and `off` mean the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switch(pub bool);

impl Setting for Switch {
    const KIND: &'static str = "true or false";

    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "true" | "on" => Ok(Self(true)),
            "false" | "off" => Ok(Self(false)),
            other => Err(format!("{other:?} is neither true (on) nor false (off)")),
        }
    }

    fn show(&self) -> String {
        self.0.to_string()
    }
}

/// A number of bytes, with an optional unit of 1024: `512MiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

const UNITS: [(&str, u32); 4] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];

impl Setting for Bytes {
    const KIND: &'static str = "bytes, such as 512MiB";

    fn parse(text: &str) -> Result<Self, String> {
        let (digits, shift) = UNITS
            .iter()
            .find_map(|(unit, shift)| text.strip_suffix(unit).map(|digits| (digits.trim_end(), *shift)))
            .unwrap_or((text, 0));
        let number: u64 = digits
            .parse()
            .map_err(|_| format!("{text:?} is not a number of bytes; allowed units are KiB, MiB, GiB, TiB"))?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| format!("{text:?} is more than 2^64 bytes"))
    }

    fn show(&self) -> String {
        let unit = UNITS.iter().rev().find(|(_, shift)| self.0 > 0 && self.0.is_multiple_of(1 << shift));
        unit.map_or_else(|| self.0.to_string(), |(unit, shift)| format!("{}{unit}", self.0 >> shift))
    }
}

/// A duration: a number with `ms`, `s`, `m`, `h` or `d`; without unit, seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seconds(pub f64);

impl Seconds {
    /// As a duration.
    pub fn duration(self) -> Duration {
        Duration::from_secs_f64(self.0)
    }

    /// As a limit that zero lifts.
    pub fn limit(self) -> Option<Duration> {
        (self.0 > 0.0).then(|| self.duration())
    }
}

impl Setting for Seconds {
    const KIND: &'static str = "duration, such as 30s, 10m or 1h";

    fn parse(text: &str) -> Result<Self, String> {
        let (number, factor) = [("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86400.0)]
            .iter()
            .find_map(|(unit, factor)| text.strip_suffix(unit).map(|number| (number, *factor)))
            .unwrap_or((text, 1.0));
        let seconds = number.parse::<f64>().map(|n| n * factor).ok();
        // 100 years: more than any use, and far from where a duration overflows.
        seconds
            .filter(|s| (0.0..=3.2e9).contains(s))
            .map(Self)
            .ok_or_else(|| format!("{text:?} is not a duration; allowed are numbers with ms, s, m, h or d"))
    }

    fn show(&self) -> String {
        [("d", 86400.0), ("h", 3600.0), ("m", 60.0), ("s", 1.0)]
            .iter()
            .find(|(_, factor)| self.0 > 0.0 && self.0 % factor == 0.0)
            .map_or_else(|| format!("{}ms", self.0 * 1000.0), |(unit, factor)| format!("{}{unit}", self.0 / factor))
    }
}

impl Setting for promql::Features {
    const KIND: &'static str = "names with commas between them";

    fn parse(text: &str) -> Result<Self, String> {
        text.parse()
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

/// How long some series are kept: `table{matchers}: duration`, separated by semicolons.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RetentionRules {
    text: String,
    /// What the text says.
    pub rules: Vec<RetentionRule>,
}

impl Setting for RetentionRules {
    const KIND: &'static str = "exceptions, such as `samples{namespace=\"dev\"}: 7d; exemplars: 30d`";

    fn parse(text: &str) -> Result<Self, String> {
        let rules = split(text, ';').into_iter().map(str::trim).filter(|rule| !rule.is_empty()).map(|rule| {
            let [selector, age] = split(rule, ':')[..] else {
                return Err(format!("{rule:?} is not of the form TABLE{{MATCHERS}}: DURATION"));
            };
            let mut matchers = promql::api::selector(selector.trim()).map_err(|e| format!("{selector:?}: {e}"))?;
            // A table is written as PromQL writes a metric.
            let name = matchers.iter().position(|m| (m.name(), m.op()) == (METRIC_NAME, MatchOp::Eq));
            let table =
                name.map(|at| matchers.remove(at)).and_then(|m| tables::by_name(m.value())).ok_or_else(|| {
                    let known = tables::all().map(|t| t.name).join(", ");
                    format!("{selector:?} does not begin with a table; there are {known}")
                })?;
            Ok(RetentionRule { table_id: table.id, matchers, age: Seconds::parse(age.trim())?.limit() })
        });
        Ok(Self { text: text.to_owned(), rules: rules.collect::<Result<_, String>>()? })
    }

    fn show(&self) -> String {
        self.text.clone()
    }
}

/// Splits a text at a separator, but not within quotes.
fn split(text: &str, separator: char) -> Vec<&str> {
    let (mut quote, mut escaped) = (None, false);
    text.split(|c| {
        match (quote, c) {
            _ if escaped => escaped = false,
            (Some('"' | '\''), '\\') => escaped = true,
            (Some(open), _) if open == c => quote = None,
            (None, '"' | '\'' | '`') => quote = Some(c),
            (None, _) => return c == separator,
            _ => {}
        }
        false
    })
    .collect()
}

/// Where a listener listens: an address with port, or nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen(Option<String>);

impl Listen {
    /// Listening at `address`, which is of the form `host:port`.
    pub fn at(address: &str) -> Self {
        Self(Some(address.to_owned()))
    }

    /// The address; none for `off`.
    pub fn address(&self) -> Option<&str> {
        self.0.as_deref()
    }

    /// Whether only this machine reaches it. A host name counts only when it is `localhost`: what another name means
    /// can change while the server runs.
    pub fn is_loopback(&self) -> bool {
        let Some(address) = &self.0 else { return true };
        match address.parse::<SocketAddr>() {
            Ok(SocketAddr::V4(v4)) => v4.ip().is_loopback(),
            Ok(SocketAddr::V6(v6)) => IpAddr::V6(*v6.ip()).to_canonical().is_loopback(),
            Err(_) => address.rsplit_once(':').is_some_and(|(host, _)| host == "localhost"),
        }
    }
}

impl Setting for Listen {
    const KIND: &'static str = "host:port, or off";

    fn parse(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self(None));
        }
        // A port alone would listen on every interface in most programs; here it is a mistake.
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(Self::at(text)),
            _ => Err(format!("{text:?} is not an address; allowed are host:port, such as 127.0.0.1:7300, and off")),
        }
    }

    fn show(&self) -> String {
        self.0.clone().unwrap_or_else(|| "off".to_owned())
    }
}

/// A filter for log lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Level(pub String);

impl Setting for Level {
    const KIND: &'static str = "log filter";

    fn parse(text: &str) -> Result<Self, String> {
        tracing_subscriber::EnvFilter::try_new(text).map_err(|e| format!("{text:?} is not a log filter: {e}"))?;
        Ok(Self(text.to_owned()))
    }

    fn show(&self) -> String {
        self.0.clone()
    }
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line, for log shippers.
    Json,
}

impl Setting for LogFormat {
    const KIND: &'static str = "text or json";

    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("{other:?} is neither text nor json")),
        }
    }

    fn show(&self) -> String {
        match self {
            Self::Text => "text".to_owned(),
            Self::Json => "json".to_owned(),
        }
    }
}

/// Where the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogPlace {
    /// In the data folder.
    Local,
    /// In the object store.
    Object,
}

impl Setting for LogPlace {
    const KIND: &'static str = "local or object";

    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "local" => Ok(Self::Local),
            "object" => Ok(Self::Object),
            other => Err(format!("{other:?} is neither local nor object")),
        }
    }

    fn show(&self) -> String {
        match self {
            Self::Local => "local".to_owned(),
            Self::Object => "object".to_owned(),
        }
    }
}
