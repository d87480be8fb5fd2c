//! Logging: `[log]` to a `tracing` subscriber, once for the process.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{LogConfig, LogFormat};

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Starts logging to stderr or the journal. A second call in a process changes nothing, so that
/// tests may run several daemons.
pub fn init(config: &LogConfig) {
    let filter = filter(&config.level);
    let registry = tracing_subscriber::registry().with(filter);
    let plain = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let started = match config.format {
        LogFormat::Json => registry.with(plain.json().flatten_event(true)).try_init(),
        LogFormat::Text => {
            let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            registry
                .with(plain.with_ansi(colour).with_target(false))
                .try_init()
        }
        LogFormat::Journald => match tracing_journald::layer() {
            Ok(journal) => registry.with(journal).try_init(),
            Err(error) => {
                let started = registry.with(plain.with_ansi(false)).try_init();
                tracing::warn!(%error, "no systemd journal here; logging to standard error");
                started
            }
        },
    };
    // Another daemon of this process was first; its subscriber serves both.
    drop(started);
}

/// A bare level is ours; the driver's and the web server's chatter starts at `warn`.
fn filter(level: &str) -> EnvFilter {
    if LEVELS.contains(&level) {
        return EnvFilter::new(match level {
            "off" | "error" => level.to_owned(),
            _ => format!("warn,sangam={level}"),
        });
    }
    EnvFilter::try_new(level).unwrap_or_else(|_| EnvFilter::new("warn,sangam=info"))
}

/// Checks `[log] level`; the error says what is allowed.
pub(crate) fn check_level(level: &str) -> Result<(), String> {
    let is_filter = level.contains('=') && EnvFilter::try_new(level).is_ok();
    if is_filter || LEVELS.contains(&level) {
        return Ok(());
    }
    Err(format!(
        "must be error, warn, info, debug or trace, or a filter such as \"warn,sangam=debug\", but is {level:?}"
    ))
}
