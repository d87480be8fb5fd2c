//! Every key of `sangam.toml`: its name and what may stand in it. The defaults are those of
//! `config/sangam.toml`, which is compiled in, so that the file an administrator reads can't differ
//! from what the program does.

use std::time::Duration;

use super::value::Kind;

/// The shipped example; its values are the defaults.
pub(super) const DEFAULTS: &str = include_str!("../../config/sangam.toml");

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const MIB: u64 = 1 << 20;

/// A key. A `*` in its path stands for a collection's name.
#[derive(Debug)]
pub(super) struct Key {
    pub path: &'static [&'static str],
    pub kind: Kind,
    /// Never shown.
    pub secret: bool,
    /// Environment variable that goes before the file.
    pub env: Option<&'static str>,
    /// Name of the systemd credential.
    pub credential: Option<&'static str>,
}

const fn key(path: &'static [&'static str], kind: Kind) -> Key {
    Key {
        path,
        kind,
        secret: false,
        env: None,
        credential: None,
    }
}

const POLICIES: &[&str] = &["manual", "newest_wins", "local_wins", "remote_wins"];

/// In the order in which `sangam config` lists them.
pub(super) static KEYS: &[Key] = &[
    Key {
        env: Some("DATABASE_NAME"),
        ..key(&["database"], Kind::Databases)
    },
    key(&["state_dir"], Kind::Text { empty: false }),
    key(&["site"], Kind::Text { empty: false }),
    key(
        &["log_retention"],
        Kind::Duration {
            min: DAY,
            max: Duration::from_secs(3650 * 86_400),
            zero: false,
        },
    ),
    Key {
        secret: true,
        env: Some("MONGODB_LOCAL_URL"),
        credential: Some("local_uri"),
        ..key(&["local", "uri"], Kind::Uri)
    },
    Key {
        secret: true,
        env: Some("MONGODB_CLOUD_URL"),
        credential: Some("remote_uri"),
        ..key(&["remote", "uri"], Kind::Uri)
    },
    key(&["sync", "collections"], Kind::Globs),
    key(&["sync", "exclude"], Kind::Globs),
    key(&["sync", "auto_sync_enabled"], Kind::Bool),
    key(
        &["sync", "conflict_resolution_strategy"],
        Kind::OneOf(POLICIES),
    ),
    key(
        &["sync", "batch_size"],
        Kind::Int {
            min: 1,
            max: 10_000,
        },
    ),
    key(&["sync", "max_retries"], Kind::Int { min: 0, max: 1000 }),
    key(&["sync", "stamp_documents"], Kind::Bool),
    key(
        &["sync", "mass_delete_percent"],
        Kind::Int { min: 0, max: 100 },
    ),
    key(&["sync", "on_drop"], Kind::OneOf(&["hold", "propagate"])),
    key(
        &[
            "sync",
            "per_collection",
            "*",
            "conflict_resolution_strategy",
        ],
        Kind::OneOf(POLICIES),
    ),
    key(
        &["sync", "rules", "*", "*"],
        Kind::OneOf(crate::rules::NAMES),
    ),
    key(
        &["schema", "sync"],
        Kind::OneOf(&["report", "indexes", "full"]),
    ),
    key(&["unique_fields", "*"], Kind::Fields),
    key(&["fields", "updated_at"], Kind::Field),
    key(&["fields", "synced_at"], Kind::Field),
    key(&["fields", "origin"], Kind::Field),
    key(&["fields", "sync_status"], Kind::Field),
    key(
        &["probe", "interval"],
        Kind::Duration {
            min: Duration::from_millis(100),
            max: DAY,
            zero: false,
        },
    ),
    key(
        &["probe", "timeout"],
        Kind::Duration {
            min: Duration::from_millis(100),
            max: Duration::from_secs(300),
            zero: false,
        },
    ),
    key(
        &["pull", "interval"],
        Kind::Duration {
            min: Duration::from_millis(100),
            max: DAY,
            zero: false,
        },
    ),
    key(&["pull", "follow"], Kind::Bool),
    key(
        &["pull", "reconcile"],
        Kind::Duration {
            min: SECOND,
            max: Duration::from_secs(366 * 86_400),
            zero: true,
        },
    ),
    key(&["pull", "exact_nights"], Kind::Int { min: 0, max: 366 }),
    key(&["link", "max_rate"], Kind::Size { min: 0 }),
    key(&["link", "quiet_hours"], Kind::Hours),
    key(&["link", "quiet_rate"], Kind::Size { min: 0 }),
    key(&["link", "first"], Kind::Globs),
    key(&["link", "last"], Kind::Globs),
    key(
        &["retry", "initial"],
        Kind::Duration {
            min: MILLISECOND,
            max: MINUTE,
            zero: false,
        },
    ),
    key(
        &["retry", "max"],
        Kind::Duration {
            min: MILLISECOND,
            max: DAY,
            zero: false,
        },
    ),
    key(&["queue", "max_bytes"], Kind::Size { min: MIB }),
    key(&["queue", "min_free_disk"], Kind::Size { min: 0 }),
    key(&["control", "file"], Kind::Text { empty: true }),
    key(&["ha", "enabled"], Kind::Bool),
    key(&["ha", "name"], Kind::Text { empty: true }),
    key(&["api", "listen"], Kind::Listen),
    Key {
        secret: true,
        env: Some("SANGAM_API_TOKEN"),
        credential: Some("api_token"),
        ..key(&["api", "token"], Kind::Text { empty: true })
    },
    key(&["api", "token_file"], Kind::Text { empty: true }),
    Key {
        secret: true,
        ..key(
            &["api", "tokens", "*", "token"],
            Kind::Text { empty: false },
        )
    },
    key(
        &["api", "tokens", "*", "role"],
        Kind::OneOf(&["read", "operate", "admin"]),
    ),
    key(&["api", "socket"], Kind::Text { empty: true }),
    key(&["api", "tls_cert"], Kind::Text { empty: true }),
    key(&["api", "tls_key"], Kind::Text { empty: true }),
    Key {
        secret: true,
        credential: Some("notify_webhook"),
        ..key(&["notify", "webhook"], Kind::WebAddress)
    },
    key(&["notify", "command"], Kind::Words),
    key(
        &["notify", "offline_after"],
        Kind::Duration {
            min: SECOND,
            max: Duration::from_secs(366 * 86_400),
            zero: false,
        },
    ),
    key(
        &["notify", "min_interval"],
        Kind::Duration {
            min: SECOND,
            max: Duration::from_secs(31 * 86_400),
            zero: true,
        },
    ),
    Key {
        secret: true,
        credential: Some("notify_heartbeat"),
        ..key(&["notify", "heartbeat"], Kind::WebAddress)
    },
    key(
        &["notify", "heartbeat_interval"],
        Kind::Duration {
            min: SECOND,
            max: DAY,
            zero: false,
        },
    ),
    key(
        &["log", "format"],
        Kind::OneOf(&["text", "json", "journald"]),
    ),
    key(&["log", "level"], Kind::LogLevel),
];
