use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use secrecy::ExposeSecret;

use super::keys::{DEFAULTS, KEYS};
use super::load::{Settings, Surroundings};
use super::{Config, ConfigEntry, FieldNames, Loaded, LogFormat, OnDrop, Policy};

const NAMED: &str = "database = \"temple_db\"\n";

fn config(text: &str) -> Config {
    Config::from_toml(&format!("{NAMED}{text}")).unwrap()
}

/// The message for a file of which `text` starts on line 2.
fn error(text: &str) -> String {
    Config::from_toml(&format!("{NAMED}{text}"))
        .unwrap_err()
        .to_string()
}

/// A folder with files, and variables.
fn load(files: &[(&str, &str)], variables: &[(&str, &str)]) -> Result<Loaded, String> {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let mut variables: BTreeMap<String, String> = variables
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_string()))
        .collect();
    if let Some(credentials) = variables.get_mut("CREDENTIALS_DIRECTORY") {
        *credentials = folder.path().join(&*credentials).display().to_string();
    }
    let around = Surroundings {
        variables,
        directory: folder.path().to_owned(),
    };
    Loaded::load_in(None, &around).map_err(|error| error.to_string())
}

fn entry(loaded: &Loaded, key: &str) -> ConfigEntry {
    loaded
        .entries()
        .into_iter()
        .find(|entry| entry.key == key)
        .unwrap()
}

#[test]
fn the_example_file_has_every_key_and_the_promised_defaults() {
    let mut settings = Settings::default();
    settings.add_toml(DEFAULTS, "config/sangam.toml").unwrap();
    for key in KEYS.iter().filter(|key| !key.path.contains(&"*")) {
        assert!(
            settings.get(key.path).is_some(),
            "config/sangam.toml lacks {:?}",
            key.path
        );
    }
    for shown in [
        "# [sync.per_collection.bookings]",
        "# admins = [\"username\"]",
    ] {
        assert!(DEFAULTS.contains(shown), "config/sangam.toml lacks {shown}");
    }

    let config = Config::from_toml(NAMED).unwrap();
    assert_eq!(config.databases, ["temple_db"]);
    assert_eq!(config.state_dir, Path::new("/var/lib/sangam"));
    assert_eq!(config.site, "local");
    assert_eq!(
        config.local_uri.expose_secret(),
        "mongodb://127.0.0.1:27017/?replicaSet=rs0"
    );
    assert!(config.remote_uri.is_none());
    assert_eq!(config.sync.collections, ["*"]);
    assert_eq!(config.sync.exclude, ["login_attempts", "user_sessions"]);
    assert!(config.sync.auto_sync_enabled && config.sync.stamp_documents && config.pull.follow);
    assert_eq!(config.sync.conflict_resolution_strategy, Policy::Manual);
    assert_eq!((config.sync.batch_size, config.sync.max_retries), (1000, 3));
    assert_eq!(config.sync.mass_delete_percent, 20);
    assert_eq!(config.sync.on_drop, OnDrop::Hold);
    assert!(config.sync.per_collection.is_empty() && config.unique_fields.is_empty());
    assert_eq!(config.fields, FieldNames::default());
    assert_eq!(config.probe.interval, Duration::from_secs(30));
    assert_eq!(config.probe.timeout, Duration::from_secs(5));
    assert_eq!(config.pull.interval, Duration::from_secs(60));
    assert_eq!(config.pull.reconcile, Duration::from_secs(86_400));
    assert_eq!(config.retry.initial, Duration::from_millis(500));
    assert_eq!(config.retry.max, Duration::from_secs(300));
    assert_eq!(config.queue.max_bytes, 1 << 30);
    assert_eq!(config.queue.min_free_disk, 512 << 20);
    assert_eq!(
        config.control_file.as_deref(),
        Some(Path::new("/run/sangam/control"))
    );
    assert_eq!(config.api.address().unwrap().to_string(), "127.0.0.1:8840");
    assert!(config.api.token.is_none());
    assert_eq!(
        (config.log.format, config.log.level.as_str()),
        (LogFormat::Text, "info")
    );
    assert_eq!(config.log_retention, Duration::from_secs(90 * 86_400));
}

#[test]
fn values_are_read_as_written() {
    let config = config(
        r#"
        site = "hall"
        unique_fields = { admins = ["username"], "fs.files" = ["filename"] }
        [remote]
        uri = "mongodb+srv://u:p%40ss@cluster0.abcde.mongodb.net/?retryWrites=true"
        [sync]
        collections = ["book*", "admins", "admins"]
        per_collection.bookings.conflict_resolution_strategy = "newest_wins"
        [sync.per_collection."fs.files"]
        conflict_resolution_strategy = "remote_wins"
        [pull]
        reconcile = "0s"
        interval = "1h 30m"
        [queue]
        max_bytes = "2 GB"
        [control]
        file = ""
        [api]
        listen = "localhost:9000"
        "#,
    );
    assert_eq!(config.unique_fields["admins"], ["username"]);
    assert_eq!(config.unique_fields["fs.files"], ["filename"]);
    assert_eq!(config.sync.collections, ["book*", "admins"]);
    assert_eq!(config.sync.per_collection["bookings"], Policy::NewestWins);
    assert_eq!(config.sync.per_collection["fs.files"], Policy::RemoteWins);
    assert_eq!(config.pull.reconcile, Duration::ZERO);
    assert_eq!(config.pull.interval, Duration::from_secs(5400));
    assert_eq!(config.queue.max_bytes, 2_000_000_000);
    assert_eq!(config.control_file, None);
    assert!(config.api.address().unwrap().ip().is_loopback());
    let several = Config::from_toml("database = [\"temple_db\", \"library_db\"]").unwrap();
    assert_eq!(several.databases, ["temple_db", "library_db"]);
}

#[test]
fn unknown_keys_name_line_and_nearest_key() {
    for (text, line, nearest) in [
        ("[sync]\nbatchsize = 5", 3, "`sync.batch_size`"),
        ("[snyc]\nbatch_size = 5", 2, "`sync`"),
        ("[probe]\nintervall = \"5s\"", 3, "`probe.interval`"),
        ("batch_size = 5", 2, "`sync.batch_size`"),
        (
            "[sync.per_collection.b]\nconflict_resolution_stratgy = \"manual\"",
            3,
            "`sync.per_collection.b.conflict_resolution_strategy`",
        ),
        ("databse = \"x\"", 2, "`database`"),
    ] {
        let error = error(text);
        assert!(
            error.starts_with(&format!("sangam.toml, line {line}: there is no key")),
            "{error}"
        );
        assert!(
            error.contains(&format!("did you mean {nearest}?")),
            "{error}"
        );
    }
    assert!(error("zzzzzzzzzzzzzzzzzz = 1").contains("`sangam config` lists"));
}

#[test]
fn wrong_values_say_what_to_write() {
    for (text, expected) in [
        (
            "[sync]\nbatch_size = \"many\"",
            "line 3: `sync.batch_size` must be a whole number from 1 to 10000, but is a text",
        ),
        (
            "[sync]\nbatch_size = 0",
            "must be a whole number from 1 to 10000, but is 0",
        ),
        (
            "[sync]\nbatch_size = 99999999999999999999",
            "from 1 to 10000",
        ),
        (
            "[sync]\nmass_delete_percent = 101",
            "from 0 to 100, but is 101",
        ),
        (
            "[sync]\nauto_sync_enabled = \"yes\"",
            "must be true or false (without quotes), but is a text",
        ),
        ("[sync]\ncollections = \"*\"", "must be a list of texts"),
        (
            "[sync]\ncollections = [1]",
            "a list with something else than texts",
        ),
        ("[sync]\nexclude = [\"a[\"]", "has the bad pattern \"a[\""),
        (
            "[sync]\nconflict_resolution_strategy = \"newst_wins\"",
            "did you mean \"newest_wins\"?",
        ),
        (
            "[sync]\non_drop = \"ask\"",
            "must be one of hold, propagate",
        ),
        (
            "[probe]\ninterval = 30",
            "must be a duration in quotes such as \"30s\" or \"5m\", but is a number",
        ),
        ("[probe]\ninterval = \"-5s\"", "must be a duration such as"),
        ("[probe]\ninterval = \"soon\"", "but is \"soon\""),
        (
            "[probe]\ninterval = \"0s\"",
            "must be from 100ms to 1d, but is \"0s\"",
        ),
        ("[probe]\ninterval = \"2d\"", "must be from 100ms to 1d"),
        (
            "[probe]\ninterval = \"9999999999999999999y\"",
            "must be a duration such as",
        ),
        ("[pull]\nreconcile = \"1ms\"", "(or \"0s\" to turn it off)"),
        (
            "[retry]\ninitial = \"30s\"\nmax = \"10s\"",
            "line 4: retry.max must not be shorter",
        ),
        (
            "[queue]\nmax_bytes = \"1 elephant\"",
            "must be a size such as",
        ),
        ("[queue]\nmax_bytes = \"1KiB\"", "must be at least 1MiB"),
        (
            "[fields]\norigin = \"syncedAt\"",
            "another key of [fields] has that name",
        ),
        ("[fields]\norigin = \"a.b\"", "must be a plain field name"),
        ("[log]\nlevel = \"infoo\"", "must be error, warn, info"),
        (
            "[log]\nformat = \"xml\"",
            "must be one of text, json, journald",
        ),
        ("[api]\nlisten = \"8840\"", "must be an address and a port"),
        (
            "[api]\nlisten = \"0.0.0.0:8840\"",
            "line 3: api.listen is \"0.0.0.0:8840\", which other machines can reach",
        ),
        (
            "sync = 5",
            "line 2: `sync` must be a section, written as a line [sync]",
        ),
        ("site = \"\"", "`site` must not be empty"),
        ("[local]\nuri = \"\"", "local.uri is empty"),
        (
            "[remote]\nuri = \"mongodb://127.0.0.1:27017/?replicaSet=rs0\"",
            "is the same as local.uri",
        ),
        ("= 5", "line 2: this is not TOML"),
    ] {
        let error = error(text);
        assert!(error.contains(expected), "{text}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
    assert!(
        Config::from_toml("")
            .unwrap_err()
            .to_string()
            .contains("DATABASE_NAME")
    );
    for name in ["\"\"", "\"admin\"", "\"a b\"", "[]", "5"] {
        assert!(
            Config::from_toml(&format!("database = {name}")).is_err(),
            "{name}"
        );
    }
}

#[test]
fn secrets_are_in_no_error() {
    const URIS: &[&str] = &[
        "s3cret",
        "http://u:s3cret@h/",
        "mongodb://u:s3cret@@h/",
        "mongodb://u:s3cret/x@h/",
        "mongodb://u:s3cret:x@h/",
        "mongodb://u:s3cret?x@h/",
        "mongodb://u:s3cret%@h/",
        "mongodb://u:s3cret@h:port/",
        "mongodb://u:s3cret@/",
        "mongodb+srv://u:s3cret@h:27017/",
        "mongodb://u:s3cret@h/?w=s3cret&nosuchoption&maxPoolSize=s3cret",
        "mongodb://USER:PASSWORD@s3cret/",
    ];
    for uri in URIS {
        let in_file = error(&format!("[remote]\nuri = {uri:?}"));
        assert!(
            in_file.starts_with("sangam.toml, line 3: `remote.uri` "),
            "{uri}: {in_file}"
        );
        let as_section = error(&format!("remote = {uri:?}"));
        let in_variable =
            load(&[], &[("DATABASE_NAME", "d"), ("MONGODB_CLOUD_URL", uri)]).unwrap_err();
        for error in [in_file, as_section, in_variable] {
            assert!(!error.contains("s3cret"), "{error}");
        }
    }
    let dotenv = load(
        &[(".env", "MONGODB_CLOUD_URL='s3cret\n")],
        &[("DATABASE_NAME", "d")],
    )
    .unwrap_err();
    assert!(
        !dotenv.contains("s3cret") && dotenv.contains(".env"),
        "{dotenv}"
    );
    let not_toml = error("[api]\ntoken = s3cret");
    assert!(!not_toml.contains("s3cret"), "{not_toml}");
}

#[test]
fn precedence_is_file_dotenv_credential_environment() {
    let uri = |host: &str| format!("mongodb://u:s3cret@{host}/?tls=true");
    let file = format!("{NAMED}[remote]\nuri = {:?}", uri("file"));
    let dotenv = format!("MONGODB_CLOUD_URL='{}'\nUNRELATED=1\n", uri("dotenv"));
    let credential = uri("credential");
    let host = |loaded: &Loaded| entry(loaded, "remote.uri").text;

    let loaded = load(&[("sangam.toml", &file)], &[]).unwrap();
    assert_eq!(host(&loaded), "mongodb://***@file/");
    assert_eq!(entry(&loaded, "remote.uri").origin, "file, line 3");
    assert!(entry(&loaded, "remote.uri").redacted);

    let mut files = vec![("sangam.toml", file.as_str()), (".env", &dotenv)];
    let loaded = load(&files, &[]).unwrap();
    assert_eq!(host(&loaded), "mongodb://***@dotenv/");
    assert_eq!(
        entry(&loaded, "remote.uri").origin,
        ".env, MONGODB_CLOUD_URL"
    );

    files.push(("credentials/remote_uri", &credential));
    let loaded = load(&files, &[("CREDENTIALS_DIRECTORY", "credentials")]).unwrap();
    assert_eq!(
        entry(&loaded, "remote.uri").origin,
        "credential, remote_uri"
    );

    let variables = [
        ("CREDENTIALS_DIRECTORY", "credentials"),
        ("MONGODB_CLOUD_URL", &uri("environment")),
        ("DATABASE_NAME", "a, b"),
        ("SANGAM_API_TOKEN", "s3cret"),
    ];
    let loaded = load(&files, &variables).unwrap();
    assert_eq!(host(&loaded), "mongodb://***@environment/");
    assert_eq!(
        entry(&loaded, "remote.uri").origin,
        "environment, MONGODB_CLOUD_URL"
    );
    assert_eq!(loaded.config.databases, ["a", "b"]);
    assert_eq!(entry(&loaded, "api.token").text, "***");
    assert!(!format!("{:?} {:?}", loaded.entries(), loaded.config).contains("s3cret"));

    let loaded = load(&files, &[("MONGODB_CLOUD_URL", "")]).unwrap();
    assert_eq!(
        host(&loaded),
        "mongodb://***@dotenv/",
        "an empty variable is as good as none"
    );
}

#[test]
fn the_file_is_found_in_its_places() {
    let of = |site: &str| format!("{NAMED}site = {site:?}");
    let (here, folder, named) = (of("here"), of("folder"), of("named"));
    let files = [
        ("sangam.toml", here.as_str()),
        ("config/sangam.toml", &folder),
        ("other.toml", &named),
    ];
    assert_eq!(load(&files, &[]).unwrap().config.site, "here");
    assert_eq!(load(&files[1..], &[]).unwrap().config.site, "folder");
    assert_eq!(
        load(&files, &[("SANGAM_CONFIG", "other.toml")])
            .unwrap()
            .config
            .site,
        "named"
    );
    let missing = load(&files, &[("SANGAM_CONFIG", "missing.toml")]).unwrap_err();
    assert!(
        missing.contains("missing.toml can't be read") && missing.contains("--config"),
        "{missing}"
    );
}

#[test]
fn entries_are_as_in_the_file() {
    let loaded = load(&[("sangam.toml", NAMED)], &[]).unwrap();
    for (key, text) in [
        ("log_retention", "90d"),
        ("pull.reconcile", "1d"),
        ("retry.initial", "500ms"),
        ("queue.max_bytes", "1GiB"),
        ("sync.exclude", "login_attempts, user_sessions"),
        ("api.token", ""),
    ] {
        assert_eq!(entry(&loaded, key).text, text);
        assert_eq!(entry(&loaded, key).origin, "default");
    }
    assert_eq!(entry(&loaded, "database").origin, "file, line 1");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(150))]

    #[test]
    fn anything_around_the_file_is_read_or_refused_without_a_secret(
        before in "[ -~ॐ\n]{0,20}", after in "[ -~ॐ\n]{0,20}", name in proptest::sample::select(&[
            "MONGODB_LOCAL_URL", "MONGODB_CLOUD_URL", "DATABASE_NAME", "SANGAM_API_TOKEN",
        ][..]),
    ) {
        const SECRET: &str = "hUnTeR2hUnTeR2";
        let value = format!("{before}{SECRET}{after}");
        let line = format!("{name}={value}\n");
        for loaded in [
            load(&[("sangam.toml", NAMED), (".env", &line)], &[]),
            load(&[("sangam.toml", NAMED)], &[(name, &value)]),
            load(&[("sangam.toml", NAMED), ("secrets/remote_uri", &value)], &[("CREDENTIALS_DIRECTORY", "secrets")]),
        ] {
            match loaded {
                // A database's name is no secret.
                Err(error) if name != "DATABASE_NAME" => {
                    proptest::prop_assert!(!error.contains(SECRET), "{error}");
                }
                Err(_) => {}
                Ok(loaded) => {
                    let shown = loaded.entries().into_iter().filter(|e| e.key != "database");
                    let shown: Vec<String> = shown.map(|e| format!("{} {}", e.value, e.text)).collect();
                    proptest::prop_assert!(!shown.concat().contains(SECRET), "{shown:?}");
                }
            }
        }
    }
}
