//! Settings changed over the API: they go before the file, take effect at once and survive a restart.
//!
//! They are kept in the state store, which is there at every start, and shown in `sync_config` of the
//! local database.

use std::time::Duration;

use bson::Document;
use globset::Glob;
use rusqlite::Connection;
use serde_json::{Map, Value as Json, json};

use crate::config::{Config, Policy};
use crate::store::{self, records};

/// Name in the store.
const NAME: &str = "overrides";

/// `_id` of the record in `sync_config`.
const RECORD: [u8; 12] = *b"sync_config.";

/// Shortest and longest `syncIntervalMinutes`, as for `pull.interval`.
const MINUTES: std::ops::RangeInclusive<f64> = 1.0 / 60.0..=1440.0;

/// What the API calls a setting, and its key in the file.
pub const NAMES: [(&str, &str); 8] = [
    ("autoSyncEnabled", "sync.auto_sync_enabled"),
    ("syncIntervalMinutes", "pull.interval"),
    (
        "conflictResolutionStrategy",
        "sync.conflict_resolution_strategy",
    ),
    ("collectionsToSync", "sync.collections"),
    ("maxRetries", "sync.max_retries"),
    ("batchSize", "sync.batch_size"),
    ("collectionsFirst", "link.first"),
    ("collectionsLast", "link.last"),
];

/// Checked settings by the API's names.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Overrides(Map<String, Json>);

/// Of several databases, the settings in force, in the API's words.
pub fn shown(config: &Config) -> Map<String, Json> {
    let minutes = config.pull.interval.as_secs_f64() / 60.0;
    let minutes = if minutes.fract() == 0.0 {
        json!(minutes as u64)
    } else {
        json!(minutes)
    };
    let values = [
        json!(config.sync.auto_sync_enabled),
        minutes,
        json!(config.sync.conflict_resolution_strategy),
        json!(config.sync.collections),
        json!(config.sync.max_retries),
        json!(config.sync.batch_size),
        json!(config.link.first),
        json!(config.link.last),
    ];
    NAMES
        .iter()
        .map(|(name, _)| (*name).to_owned())
        .zip(values)
        .collect()
}

impl Overrides {
    /// What is kept.
    pub fn load(c: &Connection) -> rusqlite::Result<Self> {
        let text = store::get_meta::<String>(c, NAME)?.unwrap_or_default();
        Ok(Self::read(&text))
    }

    /// From the text that is kept; what came to harm, or what this version does not know, is left out.
    pub(crate) fn read(text: &str) -> Self {
        let mut kept: Map<String, Json> = serde_json::from_str(text).unwrap_or_default();
        let known = |name: &str| NAMES.iter().any(|(known, _)| *known == name);
        kept.retain(|name, value| known(name) && check(name, value).is_ok());
        Self(kept)
    }

    /// Keeps them, and puts the record for `sync_config` on its way.
    pub fn save(&self, c: &Connection, config: &Config, who: &str) -> rusqlite::Result<()> {
        store::set_meta(c, NAME, Json::Object(self.0.clone()).to_string())?;
        let mut record = Document::new();
        for (name, value) in shown(config) {
            record.insert(
                name,
                bson::Bson::try_from(value).unwrap_or(bson::Bson::Null),
            );
        }
        let names: Vec<&str> = self.names().collect();
        record.insert("changedHere", names);
        record.insert("updatedAt", bson::DateTime::now());
        record.insert("updatedBy", who);
        records::put_record(
            c,
            "sync_config",
            &RECORD,
            &record.to_vec().unwrap_or_default(),
        )
    }

    /// Names of the settings that are overridden.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Adds changes; `null` takes one back. The error says which setting is wrong and how to write it.
    pub fn change(&mut self, changes: &Map<String, Json>) -> Result<(), String> {
        let mut next = self.0.clone();
        for (name, value) in changes {
            if !NAMES.iter().any(|(known, _)| known == name) {
                let known: Vec<&str> = NAMES.iter().map(|(known, _)| *known).collect();
                return Err(format!(
                    "there is no setting {name:?}; there are {}",
                    known.join(", ")
                ));
            }
            if value.is_null() {
                next.remove(name);
                continue;
            }
            let value = &whole(value);
            check(name, value)
                .map_err(|wanted| format!("{name} must be {wanted}, but is {value}"))?;
            next.insert(name.clone(), value.clone());
        }
        self.0 = next;
        Ok(())
    }

    /// The configuration with these settings instead of the file's.
    pub fn apply(&self, mut config: Config) -> Config {
        for (name, value) in &self.0 {
            let number = value.as_u64().unwrap_or(0);
            match name.as_str() {
                "autoSyncEnabled" => config.sync.auto_sync_enabled = value == &Json::Bool(true),
                "syncIntervalMinutes" => {
                    let minutes = value.as_f64().unwrap_or(1.0);
                    config.pull.interval = Duration::from_secs_f64((minutes * 60.0).max(1.0));
                }
                "conflictResolutionStrategy" => {
                    if let Ok(policy) = serde_json::from_value::<Policy>(value.clone()) {
                        config.sync.conflict_resolution_strategy = policy;
                    }
                }
                "collectionsToSync" => config.sync.collections = list(value),
                "collectionsFirst" => config.link.first = list(value),
                "collectionsLast" => config.link.last = list(value),
                "maxRetries" => config.sync.max_retries = u32::try_from(number).unwrap_or(1000),
                "batchSize" => config.sync.batch_size = usize::try_from(number).unwrap_or(1000),
                _ => {}
            }
        }
        config
    }
}

/// `5.0` is the whole number 5, in JSON as in its schemas.
pub(crate) fn whole(value: &Json) -> Json {
    match value.as_f64() {
        Some(n) if value.is_f64() && n.fract() == 0.0 && (0.0..1e9).contains(&n) => json!(n as u64),
        _ => value.clone(),
    }
}

fn list(globs: &Json) -> Vec<String> {
    let globs = globs.as_array().into_iter().flatten();
    globs
        .filter_map(|g| g.as_str().map(str::to_owned))
        .collect()
}

fn are_globs(value: &Json) -> bool {
    value.as_array().is_some_and(|globs| {
        globs.len() <= 1000
            && globs.iter().all(|g| {
                g.as_str()
                    .is_some_and(|g| !g.is_empty() && Glob::new(g).is_ok())
            })
    })
}

fn check(name: &str, value: &Json) -> Result<(), &'static str> {
    let good = match name {
        "autoSyncEnabled" => value.is_boolean(),
        "syncIntervalMinutes" => value.as_f64().is_some_and(|m| MINUTES.contains(&m)),
        "conflictResolutionStrategy" => serde_json::from_value::<Policy>(value.clone()).is_ok(),
        "collectionsToSync" => are_globs(value) && value.as_array().is_some_and(|g| !g.is_empty()),
        "collectionsFirst" | "collectionsLast" => are_globs(value),
        "maxRetries" => value.as_u64().is_some_and(|n| n <= 1000),
        _ => value.as_u64().is_some_and(|n| (1..=10_000).contains(&n)),
    };
    if good {
        return Ok(());
    }
    Err(match name {
        "autoSyncEnabled" => "true or false",
        "syncIntervalMinutes" => "a number of minutes from 1/60 to 1440",
        "conflictResolutionStrategy" => "one of manual, newest_wins, local_wins, remote_wins",
        "collectionsToSync" => "a list of patterns such as [\"*\"]",
        "collectionsFirst" | "collectionsLast" => {
            "a list of patterns such as [\"bookings\"], or [] for none"
        }
        "maxRetries" => "a whole number from 0 to 1000",
        _ => "a whole number from 1 to 10000",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(json: Json) -> Map<String, Json> {
        json.as_object().unwrap().clone()
    }

    #[test]
    fn checked_settings_go_before_the_file_and_come_back() {
        let file = Config::from_toml("database = \"d\"\n[sync]\nbatch_size = 7").unwrap();
        let mut o = Overrides::default();
        let all = json!({"batchSize": 9, "syncIntervalMinutes": 0.5, "collectionsToSync": ["a*"],
            "conflictResolutionStrategy": "local_wins", "maxRetries": 0, "autoSyncEnabled": false,
            "collectionsFirst": ["bookings"], "collectionsLast": []});
        o.change(&changes(all.clone())).unwrap();
        assert_eq!(Json::Object(shown(&o.apply(file.clone()))), {
            let mut sorted = Map::new();
            for (name, _) in NAMES {
                sorted.insert(name.into(), all[name].clone());
            }
            Json::Object(sorted)
        });
        o.change(&changes(json!({"batchSize": null}))).unwrap();
        assert_eq!(o.apply(file).sync.batch_size, 7);
    }

    #[test]
    fn one_wrong_setting_changes_nothing() {
        for (bad, hint) in [
            (
                json!({"batchSize": 5, "maxRetries": -1}),
                "maxRetries must be",
            ),
            (json!({"batchSize": "5"}), "batchSize must be"),
            (json!({"batchSize": 0}), "from 1 to 10000"),
            (json!({"syncIntervalMinutes": 0}), "1440"),
            (json!({"collectionsToSync": []}), "patterns"),
            (json!({"collectionsToSync": ["["]}), "patterns"),
            (json!({"collectionsFirst": "bookings"}), "or [] for none"),
            (json!({"collectionsLast": [""]}), "or [] for none"),
            (json!({"conflictResolutionStrategy": "best"}), "newest_wins"),
            (json!({"batchsize": 1}), "there is no setting"),
        ] {
            let mut o = Overrides::default();
            let error = o.change(&changes(bad)).unwrap_err();
            assert!(error.contains(hint), "{error}");
            assert_eq!(o, Overrides::default());
        }
    }
}
