//! The configuration: `sangam.toml`, then the environment over it.
//!
//! Durations are written as `30s` or `5m`, sizes as `1GiB`. An unknown key or a value out of range
//! is refused with the file, the line and the nearest valid key, before anything is touched.

mod build;
mod keys;
mod load;
#[cfg(test)]
mod tests;
pub(crate) mod uri;
mod value;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::rules::FieldRules;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

pub use load::{ConfigError, Origin};

use build::build;
use keys::KEYS;
use load::{Settings, Surroundings};
use value::Value;

/// Environment variables that name the configuration file, and the folder of the credentials.
const FILE_VARIABLE: &str = "SANGAM_CONFIG";
const CREDENTIALS_VARIABLE: &str = "CREDENTIALS_DIRECTORY";

/// The environment variables that go before the configuration file. Who starts a daemon that may touch
/// no database but its own takes them all away.
pub fn variables() -> impl Iterator<Item = &'static str> {
    let of_keys = KEYS.iter().filter_map(|key| key.env);
    of_keys.chain([FILE_VARIABLE, CREDENTIALS_VARIABLE])
}

/// Everything the daemon is told; each field has the default named in `config/sangam.toml`.
#[derive(Clone, Debug)]
pub struct Config {
    /// Databases kept equal; the same names on both sides. Never empty.
    pub databases: Vec<String>,
    /// Where `sangam.db` lives.
    pub state_dir: PathBuf,
    /// Name of this installation; several sites may share a remote.
    pub site: String,
    /// URI of the database on the premises.
    pub local_uri: SecretString,
    /// URI of the database in the cloud; `None` means "remote database not configured".
    pub remote_uri: Option<SecretString>,
    /// What is synced and how.
    pub sync: SyncConfig,
    /// What is done so that both sides have the same indexes and options.
    pub schema_sync: SchemaSync,
    /// Fields that must be unique by collection, beside what the unique indexes say.
    pub unique_fields: BTreeMap<String, Vec<String>>,
    /// Names of the sync fields in documents.
    pub fields: FieldNames,
    /// How the link is probed.
    pub probe: ProbeConfig,
    /// How remote changes are fetched.
    pub pull: PullConfig,
    /// What the link may carry, and when.
    pub link: crate::budget::LinkConfig,
    /// Backoff of everything that is retried.
    pub retry: RetryConfig,
    /// Limits of the state directory.
    pub queue: QueueConfig,
    /// Control file.
    pub control_file: Option<PathBuf>,
    /// Several daemons on one pair.
    pub ha: HaConfig,
    /// HTTP API.
    pub api: ApiConfig,
    /// Who is told what, and the heartbeat.
    pub notify: NotifyConfig,
    /// Logging.
    pub log: LogConfig,
    /// Age at which `sync_logs` records expire.
    pub log_retention: Duration,
}

/// `[sync]`
#[derive(Clone, Debug)]
pub struct SyncConfig {
    /// Globs of the collections to sync.
    pub collections: Vec<String>,
    /// Globs of the collections to leave out; wins over `collections`.
    pub exclude: Vec<String>,
    /// `false`: changes are queued but sent only when a sync is asked for.
    pub auto_sync_enabled: bool,
    /// What to do when both sides changed the same field.
    pub conflict_resolution_strategy: Policy,
    /// Most documents in one batch.
    pub batch_size: usize,
    /// Tries of one rejected document before it is parked as failed.
    pub max_retries: u32,
    /// Whether Sangam keeps the sync fields in documents current.
    pub stamp_documents: bool,
    /// Share of a collection (percent) whose deletion at once is held; 0 turns the guard off.
    pub mass_delete_percent: u8,
    /// What a dropped or renamed collection does.
    pub on_drop: OnDrop,
    /// Policy by collection.
    pub per_collection: BTreeMap<String, Policy>,
    /// Rules for single fields, by collection.
    pub rules: BTreeMap<String, FieldRules>,
}

/// What settles a clash on one field that both sides changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// Record a conflict and wait for a person.
    Manual,
    /// The side with the later `updatedAt` (clock skew corrected) wins.
    NewestWins,
    /// The local version wins.
    LocalWins,
    /// The remote version wins.
    RemoteWins,
}

/// What a dropped, renamed collection or database does on the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnDrop {
    /// Halt that collection and ask.
    Hold,
    /// Do the same on the other side.
    Propagate,
}

/// `[schema] sync`: what is done so that both sides have the same indexes and options.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SchemaSync {
    /// Nothing; what differs is reported.
    Report,
    /// Indexes of one side come to exist on the other.
    Indexes,
    /// Collections' options, too, and changes of both.
    Full,
}

/// `[fields]`: names of the sync fields, as the app spells them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldNames {
    /// When the app last changed the document; content, merged by the later value.
    pub updated_at: String,
    /// When Sangam last brought both sides together.
    pub synced_at: String,
    /// `local` or `remote`.
    pub origin: String,
    /// `pending`, `synced`, `conflict` or `failed`.
    pub sync_status: String,
}

impl Default for FieldNames {
    fn default() -> Self {
        Self {
            updated_at: "updatedAt".into(),
            synced_at: "syncedAt".into(),
            origin: "origin".into(),
            sync_status: "syncStatus".into(),
        }
    }
}

/// `[probe]`
#[derive(Clone, Debug)]
pub struct ProbeConfig {
    /// Time between probes; in an outage the backoff grows up to this.
    pub interval: Duration,
    /// Deadline of a probe.
    pub timeout: Duration,
}

/// `[pull]`
#[derive(Clone, Debug)]
pub struct PullConfig {
    /// Time between timestamp pulls where the remote is not followed.
    pub interval: Duration,
    /// Whether to tail the remote's change stream.
    pub follow: bool,
    /// Time between reconciles; zero turns them off.
    pub reconcile: Duration,
    /// Reconciles by schedule in which every document is read once; 0: none is read but where hashes
    /// differ.
    pub exact_nights: u64,
}

/// `[retry]`
#[derive(Clone, Debug)]
pub struct RetryConfig {
    /// First delay.
    pub initial: Duration,
    /// Longest delay.
    pub max: Duration,
}

/// `[queue]`
#[derive(Clone, Debug)]
pub struct QueueConfig {
    /// Most bytes of the state file.
    pub max_bytes: u64,
    /// Free space (bytes) on its file system that is never touched.
    pub min_free_disk: u64,
}

/// `[ha]`
#[derive(Clone, Debug)]
pub struct HaConfig {
    /// Whether other daemons may run on the same pair, of which one works.
    pub enabled: bool,
    /// How this one is called.
    pub name: String,
}

/// `[api]`
#[derive(Clone, Debug)]
pub struct ApiConfig {
    /// Address and port, e.g. `127.0.0.1:8840`; empty turns the API off.
    pub listen: String,
    /// Bearer token of the administrator; this or a named one is required beyond loopback.
    pub token: Option<SecretString>,
    /// Further tokens by name.
    pub tokens: BTreeMap<String, NamedToken>,
    /// Unix socket beside the address; `None` turns it off.
    pub socket: Option<PathBuf>,
    /// Files of certificate chain and key (PEM): the address then speaks TLS.
    pub tls: Option<(PathBuf, PathBuf)>,
}

/// `[api.tokens.NAME]`
#[derive(Clone, Debug)]
pub struct NamedToken {
    /// The secret.
    pub token: SecretString,
    /// What it allows.
    pub role: crate::api::Role,
}

/// `[notify]`
#[derive(Clone, Debug)]
pub struct NotifyConfig {
    /// Where events are posted as JSON.
    pub webhook: Option<SecretString>,
    /// A program with its arguments that gets each event as JSON on its standard input; empty: none.
    pub command: Vec<String>,
    /// How long the link must be away before that is told.
    pub offline_after: Duration,
    /// Shortest time between two events of one kind.
    pub min_interval: Duration,
    /// Asked for now and then, but only while all is well.
    pub heartbeat: Option<SecretString>,
    /// Time between two heartbeats.
    pub heartbeat_interval: Duration,
}

/// `[log]`
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// `text`, `json` or `journald`.
    pub format: LogFormat,
    /// A `tracing` level or filter, e.g. `info` or `sangam=debug`.
    pub level: String,
}

/// `[log] format`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// A JSON object a line.
    Json,
    /// Straight to the systemd journal.
    Journald,
}

/// A configuration together with where each of its values came from, for `sangam config`.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// What the daemon runs by.
    pub config: Config,
    settings: Settings,
}

/// A line of `sangam config`.
#[derive(Clone, Debug, Serialize)]
pub struct ConfigEntry {
    /// As in the file, e.g. `sync.batch_size`.
    pub key: String,
    /// The value in JSON; of a secret only what is safe to show.
    pub value: serde_json::Value,
    /// `default`, `file, line 12`, `environment, DATABASE_NAME`, `credential, remote_uri`.
    pub origin: String,
    /// Whether `value` was shortened because it is a secret.
    pub redacted: bool,
    /// The value as a person reads it.
    #[serde(skip)]
    pub text: String,
}

impl Config {
    /// Reads `path`, else `$SANGAM_CONFIG`, else the first of `./sangam.toml`,
    /// `./config/sangam.toml`, `/etc/sangam/sangam.toml` that exists; over it `.env`, systemd
    /// credentials and the environment. Touches no network and changes nothing.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        Loaded::load(path).map(|loaded| loaded.config)
    }

    /// Reads a configuration from a text alone: no file, no environment.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let mut settings = Settings::defaults();
        settings.add_toml(text, "sangam.toml")?;
        settings.file = Some(PathBuf::from("sangam.toml"));
        build(&settings)
    }
}

impl Loaded {
    /// As [`Config::load`].
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        Self::load_in(path, &Surroundings::of_this_process())
    }

    fn load_in(path: Option<&Path>, around: &Surroundings) -> Result<Self, ConfigError> {
        let settings = Settings::load(path, around)?;
        Ok(Self {
            config: build(&settings)?,
            settings,
        })
    }

    /// The file that was read, if there was one.
    pub fn file(&self) -> Option<&Path> {
        self.settings.file.as_deref()
    }

    /// Every secret that is set, to be kept out of what leaves this machine.
    pub fn secrets(&self) -> Vec<SecretString> {
        let mut all: Vec<SecretString> = Vec::new();
        for setting in self.settings.values.values().filter(|s| s.key.secret) {
            match &setting.value {
                Value::Text(text) if !text.is_empty() => all.push(text.as_str().into()),
                Value::List(words) => {
                    // Of `--token=abc` also the latter alone.
                    let args = words.iter().skip(1).map(String::as_str);
                    let args =
                        args.flat_map(|arg| [Some(arg), arg.split_once('=').map(|(_, v)| v)]);
                    all.extend(args.flatten().map(SecretString::from));
                }
                _ => {}
            }
        }
        // The one from the file of `token_file` is in no setting.
        all.extend(self.config.api.token.clone());
        all
    }

    /// Every key with its value and origin, in the order of the example file; secrets redacted.
    pub fn entries(&self) -> Vec<ConfigEntry> {
        KEYS.iter()
            .flat_map(|key| {
                self.settings
                    .values
                    .iter()
                    .filter(move |(_, s)| std::ptr::eq(s.key, key))
            })
            .map(|(path, setting)| {
                let shown = match &setting.value {
                    Value::Text(text) if setting.key.secret => {
                        Value::Text(redact(setting.key, text))
                    }
                    // Of a command which program it is; an argument may be a token.
                    Value::List(words) if setting.key.secret => {
                        let hidden = words.iter().skip(1).map(|_| "***".to_owned());
                        Value::List(words.iter().take(1).cloned().chain(hidden).collect())
                    }
                    other => other.clone(),
                };
                ConfigEntry {
                    key: load::dotted(path),
                    value: shown.to_json(),
                    origin: setting.origin.to_string(),
                    redacted: shown != setting.value,
                    text: shown.to_string(),
                }
            })
            .collect()
    }
}

impl ApiConfig {
    /// The address to listen on; `None` when the API is turned off.
    pub fn address(&self) -> Option<SocketAddr> {
        listen_address(&self.listen).ok().flatten()
    }
}

fn redact(key: &keys::Key, secret: &str) -> String {
    match key.kind {
        value::Kind::Uri => uri::redact(secret),
        _ if secret.is_empty() => String::new(),
        _ => "***".into(),
    }
}

/// A URI without user, password and options, fit for logs and for people.
pub fn redact_uri(uri: &SecretString) -> String {
    uri::redact(uri.expose_secret())
}

/// `ADDRESS:PORT`; `localhost` is taken as 127.0.0.1, since no name is looked up here.
fn listen_address(text: &str) -> Result<Option<SocketAddr>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let local = text
        .strip_prefix("localhost:")
        .and_then(|port| port.parse().ok());
    local
        .map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
        .or_else(|| text.parse().ok())
        .map(Some)
        .ok_or_else(|| {
            format!("must be an address and a port such as \"127.0.0.1:8840\", but is {text:?}")
        })
}
