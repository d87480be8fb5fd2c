//! What may stand in a key of `sangam.toml`: the kinds of values, their checks, how they are shown.

use std::fmt;
use std::time::Duration;

use toml::de::DeValue;

/// What may stand in a key.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// Any text; empty only where the flag says so.
    Text {
        empty: bool,
    },
    /// A MongoDB URI.
    Uri,
    /// One database name or a list of them.
    Databases,
    /// A list of globs.
    Globs,
    /// A list of times of the day, `18:00-21:30`.
    Hours,
    /// A list of field names.
    Fields,
    /// A field name.
    Field,
    Bool,
    Int {
        min: i64,
        max: i64,
    },
    /// `zero` stands for "off" and is allowed below `min`.
    Duration {
        min: Duration,
        max: Duration,
        zero: bool,
    },
    /// Bytes.
    Size {
        min: u64,
    },
    OneOf(&'static [&'static str]),
    /// `tracing` level or filter.
    LogLevel,
    /// `ADDRESS:PORT`, or empty.
    Listen,
    /// `http://` or `https://`, or empty.
    WebAddress,
    /// A program and its arguments; may be empty.
    Words,
}

/// A value that has passed its key's check.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Text(String),
    List(Vec<String>),
    Bool(bool),
    Int(i64),
    Duration(Duration),
    Size(u64),
}

/// As in the file, but lists on one line.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::List(items) => f.write_str(&items.join(", ")),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Int(value) => write!(f, "{value}"),
            Self::Duration(value) if value.is_zero() => f.write_str("0s"),
            Self::Duration(value) => f.write_str(&in_one_unit(*value)),
            Self::Size(value) => f.write_str(&size_text(*value)),
        }
    }
}

impl Value {
    /// For `--json`: durations and sizes as they are written in the file.
    pub(super) fn to_json(&self) -> serde_json::Value {
        match self {
            Self::List(items) => items.clone().into(),
            Self::Bool(value) => (*value).into(),
            Self::Int(value) => (*value).into(),
            other => other.to_string().into(),
        }
    }
}

/// `90d` rather than humantime's `2months 29days 3h`.
fn in_one_unit(value: Duration) -> String {
    let units = [
        ("d", 86_400_000u128),
        ("h", 3_600_000),
        ("m", 60_000),
        ("s", 1000),
        ("ms", 1),
    ];
    let millis = value.as_millis();
    units
        .iter()
        .find(|(_, size)| millis.is_multiple_of(*size))
        .map_or_else(
            || humantime::format_duration(value).to_string(),
            |(unit, size)| format!("{}{unit}", millis / size),
        )
}

const SIZES: &[(&str, u64)] = &[
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1000),
    ("B", 1),
];

fn size_text(bytes: u64) -> String {
    SIZES
        .iter()
        .find(|(_, unit)| bytes > 0 && bytes.is_multiple_of(*unit))
        .map_or_else(
            || format!("{bytes}B"),
            |(name, unit)| format!("{}{name}", bytes / unit),
        )
}

fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim();
    let factor = if unit.is_empty() {
        1
    } else {
        SIZES
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(unit))?
            .1
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

/// Checks a TOML value against its key. The error says what is wrong and what to write instead; it
/// never repeats a secret.
pub(super) fn check(kind: Kind, value: &DeValue<'_>) -> Result<Value, String> {
    let wrong_type = |wanted: &str| format!("must be {wanted}, but is {}", type_name(value));
    match kind {
        Kind::Bool => match value {
            DeValue::Boolean(value) => Ok(Value::Bool(*value)),
            _ => Err(wrong_type("true or false (without quotes)")),
        },
        Kind::Int { min, max } => {
            let range = format!("a whole number from {min} to {max}");
            let DeValue::Integer(number) = value else {
                return Err(wrong_type(&range));
            };
            i64::from_str_radix(&number.as_str().replace('_', ""), number.radix())
                .ok()
                .filter(|number| (min..=max).contains(number))
                .map(Value::Int)
                .ok_or_else(|| format!("must be {range}, but is {}", number.as_str()))
        }
        Kind::Words => strings(value, false)
            .map(Value::List)
            .ok_or_else(|| wrong_type("a list of texts such as [\"/usr/bin/tell\", \"-v\"]")),
        Kind::Databases | Kind::Globs | Kind::Hours | Kind::Fields => {
            let items = strings(value, matches!(kind, Kind::Databases))
                .ok_or_else(|| wrong_type("a list of texts such as [\"a\", \"b\"]"))?;
            list(kind, items)
        }
        _ => match value {
            DeValue::String(text) => check_text(kind, text),
            _ => Err(wrong_type(match kind {
                Kind::Duration { .. } => "a duration in quotes such as \"30s\" or \"5m\"",
                Kind::Size { .. } => "a size in quotes such as \"512MiB\" or \"1GiB\"",
                _ => "a text in quotes",
            })),
        },
    }
}

/// Checks a text: what a file has in quotes, an environment variable, a credential.
pub(super) fn check_text(kind: Kind, text: &str) -> Result<Value, String> {
    let as_text = || Ok(Value::Text(text.to_owned()));
    match kind {
        Kind::Databases => list(
            kind,
            text.split(',').map(|name| name.trim().to_owned()).collect(),
        ),
        Kind::Text { empty: false } if text.trim().is_empty() => Err("must not be empty".into()),
        Kind::Text { .. } => as_text(),
        Kind::Uri if text.is_empty() => as_text(),
        Kind::Uri => super::uri::check(text).map(|()| Value::Text(text.to_owned())),
        Kind::Field => field(text).map(|()| Value::Text(text.to_owned())),
        Kind::Duration { min, max, zero } => duration(text, min, max, zero),
        Kind::Size { min } => match parse_size(text) {
            Some(bytes) if bytes >= min => Ok(Value::Size(bytes)),
            Some(_) => Err(format!(
                "must be at least {}, but is {text}",
                size_text(min)
            )),
            None => Err(format!(
                "must be a size such as \"512MiB\" or \"1GiB\", but is {text:?}"
            )),
        },
        Kind::OneOf(names) if names.contains(&text) => as_text(),
        Kind::OneOf(names) => Err(format!(
            "must be one of {}, but is {text:?}{}",
            names.join(", "),
            nearest(text, names.iter().copied())
                .map_or(String::new(), |n| format!("; did you mean {n:?}?")),
        )),
        Kind::LogLevel => crate::log::check_level(text).map(|()| Value::Text(text.to_owned())),
        Kind::Listen => super::listen_address(text).map(|_| Value::Text(text.to_owned())),
        Kind::WebAddress if text.is_empty() || crate::outgoing::is_address(text) => as_text(),
        // Without the text: what comes after the host is a secret, as a rule.
        Kind::WebAddress => Err(
            "must be an address that begins with https:// or http://, without user and password"
                .into(),
        ),
        // Only reached for these kinds by a programming error: they have no variable or credential.
        Kind::Globs | Kind::Hours | Kind::Fields | Kind::Words | Kind::Bool | Kind::Int { .. } => {
            Err("can't be given as text".into())
        }
    }
}

fn duration(text: &str, min: Duration, max: Duration, zero: bool) -> Result<Value, String> {
    let parsed = match text.trim() {
        "0" => Duration::ZERO,
        other => humantime::parse_duration(other).map_err(|_| {
            format!(
                "must be a duration such as \"500ms\", \"30s\", \"5m\" or \"24h\", but is {text:?}"
            )
        })?,
    };
    if (min..=max).contains(&parsed) || (zero && parsed.is_zero()) {
        return Ok(Value::Duration(parsed));
    }
    let off = if zero {
        " (or \"0s\" to turn it off)"
    } else {
        ""
    };
    Err(format!(
        "must be from {} to {}{off}, but is {text:?}",
        in_one_unit(min),
        in_one_unit(max)
    ))
}

fn list(kind: Kind, items: Vec<String>) -> Result<Value, String> {
    for item in &items {
        match kind {
            Kind::Databases => database(item)?,
            Kind::Fields => field(item)?,
            Kind::Hours => {
                if crate::budget::Hours::parse(item).is_none() {
                    return Err(format!(
                        "must have times such as \"18:00-21:30\", but has {item:?}"
                    ));
                }
            }
            _ => {
                globset::Glob::new(item)
                    .map_err(|error| format!("has the bad pattern {item:?}: {}", error.kind()))?;
            }
        }
    }
    if items.is_empty() && matches!(kind, Kind::Databases) {
        return Err("must name at least one database".into());
    }
    let mut unique = Vec::with_capacity(items.len());
    for item in items {
        if !unique.contains(&item) {
            unique.push(item);
        }
    }
    Ok(Value::List(unique))
}

/// The server's own rules for database names.
fn database(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > 63 {
        return Err("must be a database name of 1 to 63 characters".into());
    }
    if ["admin", "local", "config"].contains(&name) {
        return Err(format!(
            "is {name:?}, a database of MongoDB itself that can't be synced"
        ));
    }
    match name.chars().find(|c| "/\\. \"$*<>:|?\0".contains(*c)) {
        Some(bad) => Err(format!(
            "is {name:?}, but a database name can't contain {bad:?}"
        )),
        None => Ok(()),
    }
}

fn field(name: &str) -> Result<(), String> {
    if name.is_empty() || name == "_id" || name.starts_with('$') || name.contains(['\0', '.']) {
        return Err(format!(
            "must be a plain field name (not empty, not _id, no dot, no leading $), but is {name:?}"
        ));
    }
    Ok(())
}

fn strings(value: &DeValue<'_>, one_is_enough: bool) -> Option<Vec<String>> {
    match value {
        DeValue::String(text) if one_is_enough => Some(vec![text.to_string()]),
        DeValue::Array(items) => items
            .iter()
            .map(|item| item.get_ref().as_str().map(str::to_owned))
            .collect(),
        _ => None,
    }
}

/// A TOML type in words.
pub(super) fn type_name(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a number without quotes",
        DeValue::Float(_) => "a number with a decimal point",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(items) if items.iter().all(|item| item.get_ref().is_str()) => "a list",
        DeValue::Array(_) => "a list with something else than texts in it",
        DeValue::Table(_) => "a section",
    }
}

/// The candidate that was probably meant, if any is near.
pub(super) fn nearest<'a>(
    word: &str,
    candidates: impl Iterator<Item = &'a str>,
) -> Option<&'a str> {
    candidates
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, candidate)| *distance <= (candidate.len().max(word.len()) / 3).max(2))
        .map(|(_, candidate)| candidate)
}
