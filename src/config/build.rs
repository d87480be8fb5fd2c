//! From checked values to [`Config`].

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;

use super::load::{ConfigError, Setting, Settings};
use super::value::Value;
use super::{
    ApiConfig, Config, FieldNames, HaConfig, LogConfig, LogFormat, NamedToken, NotifyConfig,
    OnDrop, Policy, ProbeConfig, PullConfig, QueueConfig, RetryConfig, SchemaSync, SyncConfig,
};
use crate::api::Role;
use crate::budget::{Hours, LinkConfig};
use crate::rules::{FieldRule, FieldRules};

/// From checked values to the configuration; what is left to check is what concerns two keys.
pub(super) fn build(settings: &Settings) -> Result<Config, ConfigError> {
    let read = Reader { settings };
    let Some(Value::List(databases)) = settings.get(&["database"]).map(|s| &s.value) else {
        return Err(ConfigError::new(
            "no database is named; set `database = \"NAME\"` in sangam.toml or the environment \
             variable DATABASE_NAME to the database that is to be kept equal",
        ));
    };
    let local_uri = read.text(&["local", "uri"]);
    if local_uri.is_empty() {
        return Err(settings.error(
            &["local", "uri"],
            "is empty; set it (or MONGODB_LOCAL_URL) to the MongoDB server in this building",
        ));
    }
    let remote_uri = read.text(&["remote", "uri"]);
    if remote_uri == local_uri {
        return Err(settings.error(
            &["remote", "uri"],
            "is the same as local.uri; Sangam keeps two different servers equal",
        ));
    }
    let config = Config {
        databases: databases.clone(),
        state_dir: read.text(&["state_dir"]).into(),
        site: read.text(&["site"]),
        local_uri: local_uri.into(),
        remote_uri: some(remote_uri).map(Into::into),
        sync: read.sync(),
        schema_sync: match read.text(&["schema", "sync"]).as_str() {
            "report" => SchemaSync::Report,
            "full" => SchemaSync::Full,
            _ => SchemaSync::Indexes,
        },
        unique_fields: read.lists_by_collection("unique_fields"),
        fields: FieldNames {
            updated_at: read.text(&["fields", "updated_at"]),
            synced_at: read.text(&["fields", "synced_at"]),
            origin: read.text(&["fields", "origin"]),
            sync_status: read.text(&["fields", "sync_status"]),
        },
        probe: ProbeConfig {
            interval: read.duration(&["probe", "interval"]),
            timeout: read.duration(&["probe", "timeout"]),
        },
        pull: PullConfig {
            interval: read.duration(&["pull", "interval"]),
            follow: read.bool(&["pull", "follow"]),
            reconcile: read.duration(&["pull", "reconcile"]),
            exact_nights: read.int(&["pull", "exact_nights"]),
        },
        link: read.link()?,
        retry: RetryConfig {
            initial: read.duration(&["retry", "initial"]),
            max: read.duration(&["retry", "max"]),
        },
        queue: QueueConfig {
            max_bytes: read.size(&["queue", "max_bytes"]),
            min_free_disk: read.size(&["queue", "min_free_disk"]),
        },
        ha: HaConfig {
            enabled: read.bool(&["ha", "enabled"]),
            name: some(read.text(&["ha", "name"])).unwrap_or_else(host_name),
        },
        control_file: some(read.text(&["control", "file"])).map(PathBuf::from),
        api: ApiConfig {
            listen: read.text(&["api", "listen"]),
            token: read.token()?,
            tokens: read.tokens()?,
            socket: some(read.text(&["api", "socket"]))
                .map(|name| PathBuf::from(read.text(&["state_dir"])).join(name)),
            tls: read.tls()?,
        },
        notify: NotifyConfig {
            webhook: some(read.text(&["notify", "webhook"])).map(Into::into),
            command: read.list(&["notify", "command"]),
            offline_after: read.duration(&["notify", "offline_after"]),
            min_interval: read.duration(&["notify", "min_interval"]),
            heartbeat: some(read.text(&["notify", "heartbeat"])).map(Into::into),
            heartbeat_interval: read.duration(&["notify", "heartbeat_interval"]),
        },
        log: LogConfig {
            format: match read.text(&["log", "format"]).as_str() {
                "json" => LogFormat::Json,
                "journald" => LogFormat::Journald,
                _ => LogFormat::Text,
            },
            level: read.text(&["log", "level"]),
        },
        log_retention: read.duration(&["log_retention"]),
    };
    check_together(settings, &config)?;
    Ok(config)
}

fn check_together(settings: &Settings, config: &Config) -> Result<(), ConfigError> {
    let FieldNames {
        updated_at,
        synced_at,
        origin,
        sync_status,
    } = &config.fields;
    let names = [updated_at, synced_at, origin, sync_status];
    if let Some(twice) = names
        .iter()
        .enumerate()
        .find(|(i, name)| names[..*i].contains(name))
    {
        let key = ["updated_at", "synced_at", "origin", "sync_status"][twice.0];
        return Err(settings.error(
            &["fields", key],
            format!(
                "is {:?}, but another key of [fields] has that name already",
                twice.1
            ),
        ));
    }
    if config.retry.initial > config.retry.max {
        return Err(settings.error(&["retry", "max"], "must not be shorter than retry.initial"));
    }
    let open = config
        .api
        .address()
        .is_some_and(|address| !address.ip().is_loopback());
    if open && config.api.token.is_none() && config.api.tokens.is_empty() {
        return Err(settings.error(
            &["api", "listen"],
            format!(
                "is {:?}, which other machines can reach, but there is no token; set \
                 SANGAM_API_TOKEN (or api.token) to a long random text, or listen on 127.0.0.1",
                config.api.listen
            ),
        ));
    }
    Ok(())
}

/// What this machine is called.
fn host_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// Typed access. Every path has a default in the example file and every value has passed the check
/// of its key, so that nothing can be missing or of another type here; a test builds the defaults.
struct Reader<'a> {
    settings: &'a Settings,
}

const CHECKED: &str = "the example file has every key, and values have the type of their key";

impl Reader<'_> {
    fn value(&self, path: &[&str]) -> &Value {
        &self.settings.get(path).expect(CHECKED).value
    }

    fn text(&self, path: &[&str]) -> String {
        match self.value(path) {
            Value::Text(text) => text.clone(),
            other => unreachable!("{CHECKED}: {path:?} is {other:?}"),
        }
    }

    fn token(&self) -> Result<Option<SecretString>, ConfigError> {
        if let Some(token) = some(self.text(&["api", "token"])) {
            return Ok(Some(token.into()));
        }
        let Some(file) = some(self.text(&["api", "token_file"])) else {
            return Ok(None);
        };
        let path = ["api", "token_file"];
        let problem = |what: String| self.settings.error(&path, what);
        let about = std::fs::metadata(&file)
            .map_err(|e| problem(format!("is {file:?}, which can't be read: {e}")))?;
        if about.permissions().mode() & 0o077 != 0 {
            return Err(problem(format!(
                "is {file:?}, which others than its owner may read; run: chmod 600 {file}"
            )));
        }
        let text = std::fs::read_to_string(&file)
            .map_err(|e| problem(format!("is {file:?}, which can't be read: {e}")))?;
        match text.trim() {
            "" => Err(problem(format!("is {file:?}, which is empty"))),
            token => Ok(Some(token.to_owned().into())),
        }
    }

    fn tokens(&self) -> Result<BTreeMap<String, NamedToken>, ConfigError> {
        let mut tokens = BTreeMap::new();
        let of_tokens = self
            .settings
            .values
            .iter()
            .filter(|(path, _)| path.len() == 4 && path[0] == "api" && path[1] == "tokens");
        for (path, _) in of_tokens {
            let name = path[2].as_str();
            let text = |key: &str| match self.settings.get(&["api", "tokens", name, key]) {
                Some(Setting {
                    value: Value::Text(text),
                    ..
                }) => Some(text.clone()),
                _ => None,
            };
            let Some(token) = text("token") else {
                let path = ["api", "tokens", name, "role"];
                return Err(self.settings.error(&path, "stands there without a token"));
            };
            let role = Role::named(text("role").as_deref().unwrap_or("operate"));
            let token = token.into();
            tokens.insert(name.to_owned(), NamedToken { token, role });
        }
        Ok(tokens)
    }

    fn tls(&self) -> Result<Option<(PathBuf, PathBuf)>, ConfigError> {
        let file = |key| some(self.text(&["api", key])).map(PathBuf::from);
        match (file("tls_cert"), file("tls_key")) {
            (Some(cert), Some(key)) => Ok(Some((cert, key))),
            (None, None) => Ok(None),
            (Some(_), None) => Err(self
                .settings
                .error(&["api", "tls_cert"], "needs api.tls_key beside it")),
            (None, Some(_)) => Err(self
                .settings
                .error(&["api", "tls_key"], "needs api.tls_cert beside it")),
        }
    }

    fn bool(&self, path: &[&str]) -> bool {
        matches!(self.value(path), Value::Bool(true))
    }

    fn int<T: TryFrom<i64>>(&self, path: &[&str]) -> T {
        match self.value(path) {
            Value::Int(number) => T::try_from(*number)
                .ok()
                .expect("the key's range fits its field"),
            other => unreachable!("{CHECKED}: {path:?} is {other:?}"),
        }
    }

    fn duration(&self, path: &[&str]) -> Duration {
        match self.value(path) {
            Value::Duration(duration) => *duration,
            other => unreachable!("{CHECKED}: {path:?} is {other:?}"),
        }
    }

    fn size(&self, path: &[&str]) -> u64 {
        match self.value(path) {
            Value::Size(bytes) => *bytes,
            other => unreachable!("{CHECKED}: {path:?} is {other:?}"),
        }
    }

    fn list(&self, path: &[&str]) -> Vec<String> {
        match self.value(path) {
            Value::List(items) => items.clone(),
            other => unreachable!("{CHECKED}: {path:?} is {other:?}"),
        }
    }

    fn link(&self) -> Result<LinkConfig, ConfigError> {
        for key in ["max_rate", "quiet_rate"] {
            if (1..1024).contains(&self.size(&["link", key])) {
                return Err(self.settings.error(
                    &["link", key],
                    "must be \"0\" or at least \"1KiB\": below that nothing would ever arrive",
                ));
            }
        }
        let hours = self.list(&["link", "quiet_hours"]);
        Ok(LinkConfig {
            max_rate: self.size(&["link", "max_rate"]),
            quiet_hours: hours.iter().filter_map(|text| Hours::parse(text)).collect(),
            quiet_rate: self.size(&["link", "quiet_rate"]),
            first: self.list(&["link", "first"]),
            last: self.list(&["link", "last"]),
        })
    }

    /// `[section]` with a list for each collection.
    fn lists_by_collection(&self, section: &str) -> BTreeMap<String, Vec<String>> {
        let of_section = self
            .settings
            .values
            .iter()
            .filter(|(path, _)| path[0] == section);
        of_section
            .filter_map(|(path, setting)| match &setting.value {
                Value::List(items) => Some((path[1].clone(), items.clone())),
                _ => None,
            })
            .collect()
    }

    fn rules(&self) -> BTreeMap<String, FieldRules> {
        let mut rules: BTreeMap<String, FieldRules> = BTreeMap::new();
        for (path, setting) in &self.settings.values {
            if let ([sync, section, collection, field], Value::Text(name)) =
                (path.as_slice(), &setting.value)
                && (sync.as_str(), section.as_str()) == ("sync", "rules")
                && let Some(rule) = FieldRule::named(name)
            {
                let of_collection = rules.entry(collection.clone()).or_default();
                of_collection.insert(field.clone(), rule);
            }
        }
        rules
    }

    fn sync(&self) -> SyncConfig {
        let per_collection = self.settings.values.iter().filter_map(|(path, setting)| {
            match (path.as_slice(), &setting.value) {
                ([sync, per, collection, _], Value::Text(name))
                    if sync == "sync" && per == "per_collection" =>
                {
                    Some((collection.clone(), Policy::named(name)))
                }
                _ => None,
            }
        });
        SyncConfig {
            collections: self.list(&["sync", "collections"]),
            exclude: self.list(&["sync", "exclude"]),
            auto_sync_enabled: self.bool(&["sync", "auto_sync_enabled"]),
            conflict_resolution_strategy: Policy::named(
                &self.text(&["sync", "conflict_resolution_strategy"]),
            ),
            batch_size: self.int(&["sync", "batch_size"]),
            max_retries: self.int(&["sync", "max_retries"]),
            stamp_documents: self.bool(&["sync", "stamp_documents"]),
            mass_delete_percent: self.int(&["sync", "mass_delete_percent"]),
            on_drop: match self.text(&["sync", "on_drop"]).as_str() {
                "propagate" => OnDrop::Propagate,
                _ => OnDrop::Hold,
            },
            per_collection: per_collection.collect(),
            rules: self.rules(),
        }
    }
}

impl Policy {
    /// The policy of a name that has passed the key's check.
    fn named(name: &str) -> Self {
        match name {
            "newest_wins" => Self::NewestWins,
            "local_wins" => Self::LocalWins,
            "remote_wins" => Self::RemoteWins,
            _ => Self::Manual,
        }
    }
}
