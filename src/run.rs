//! `sangam run`: the daemon with everything around it, in the foreground, until told to stop.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::api::{self, Guard, Listener};
use crate::config::{Config, Loaded};
use crate::daemon::{self, DaemonError};
use crate::dispatch::Dispatcher;
use crate::{control, notify, signals};

/// Why the daemon did not start, or ended though nobody stopped it.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The engine can't start, or ended; it knows why.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The API's address can't be taken.
    #[error("the API can't listen on {address}: {source}")]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// Certificate or key can't be used.
    #[error("the API can't speak TLS: {0}")]
    Tls(String),
    /// The API would be open to other machines without a token.
    #[error("the API can't listen on {0} without a token")]
    Open(SocketAddr),
    /// Signal handlers can't be installed.
    #[error("signals can't be received: {0}")]
    Signals(std::io::Error),
    /// A part of the daemon ended outside a shutdown.
    #[error(
        "the part `{0}` ended unexpectedly; the daemon stops, so that the service manager starts it anew"
    )]
    Ended(&'static str),
}

impl RunError {
    /// Exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Daemon(error) => error.exit_code(),
            Self::Open(_) | Self::Tls(_) => crate::config::ConfigError::EXIT_CODE,
            _ => 1,
        }
    }

    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Daemon(error) => error.hint().map(|hint| hint.to_string()),
            Self::Listen { source, .. } if source.kind() == std::io::ErrorKind::AddrInUse => Some(
                "another program, perhaps another sangam, has this address; stop it or set api.listen \
                 to another port"
                    .into(),
            ),
            Self::Listen { .. } => Some("set api.listen to an address of this machine".into()),
            Self::Tls(_) => Some(
                "api.tls_cert and api.tls_key must be PEM files that belong together and that the daemon may read"
                    .into(),
            ),
            Self::Open(_) => Some("set SANGAM_API_TOKEN, or listen on 127.0.0.1".into()),
            _ => None,
        }
    }
}

/// Runs until TERM or INT. `file` is what `--config` named, for `reload`.
///
/// The state is opened first, so that a second daemon on it is told so, then the API is bound; no
/// database has been contacted when an error of either comes back. Stopping doesn't drain: what is queued is on disk.
pub async fn run(loaded: Loaded, file: Option<PathBuf>) -> Result<(), RunError> {
    let config = loaded.config;
    let stop = CancellationToken::new();
    let commands = signals::install(stop.clone()).map_err(RunError::Signals)?;

    let Some(started) = stop
        .run_until_cancelled(Box::pin(daemon::start(config.clone())))
        .await
    else {
        return Ok(());
    };
    let daemon = started?;
    let api = bind(&config).await?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        databases = config.databases.join(","),
        site = config.site,
        api = config.api.listen,
        "starting"
    );
    let control_file = config.control_file.clone();
    let socket = config.api.socket.clone();
    let dispatcher = Dispatcher::new(daemon.handle(), config, file);

    let mut parts: JoinSet<&'static str> = JoinSet::new();
    parts.spawn(named(
        "signals",
        signals::run(commands, dispatcher.clone(), stop.clone()),
    ));
    parts.spawn(named("notify", notify::run(daemon.handle(), stop.clone())));
    if let Some(path) = control_file {
        parts.spawn(named(
            "control",
            control::run(path, dispatcher.clone(), stop.clone()),
        ));
    }
    if let Some(listener) = socket.as_deref().and_then(bind_socket) {
        let serving = api::serve(
            listener,
            dispatcher.clone(),
            Guard::of_socket(),
            stop.clone(),
        );
        parts.spawn(named("socket", async move { drop(serving.await) }));
    }
    if let Some((listener, guard)) = api {
        let serving = api::serve(listener, dispatcher, guard, stop.clone());
        parts.spawn(named("api", async move { drop(serving.await) }));
    }

    let engine = Box::pin(daemon.run_until(stop.clone()));
    let ended = tokio::select! {
        ended = engine => ended.map_err(RunError::from),
        part = first_unexpected(&mut parts, &stop) => Err(RunError::Ended(part)),
    };
    let asked = stop.is_cancelled();
    stop.cancel();
    while parts.join_next().await.is_some() {}
    match ended {
        Ok(()) if !asked => Err(RunError::Ended("engine")),
        other => other,
    }
}

/// Without the socket the address remains, so a failure is no reason to stop.
fn bind_socket(path: &Path) -> Option<Listener> {
    Listener::unix(path)
        .inspect_err(|error| {
            tracing::warn!(%error, path = %path.display(), "the API's socket can't be made; set api.socket to another place");
        })
        .ok()
}

async fn bind(config: &Config) -> Result<Option<(Listener, Guard)>, RunError> {
    let Some(address) = config.api.address() else {
        return Ok(None);
    };
    let guard = Guard::new(address, &config.api).ok_or(RunError::Open(address))?;
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| RunError::Listen { address, source })?;
    let listener = match &config.api.tls {
        Some((cert, key)) => Listener::tls(listener, cert, key).map_err(RunError::Tls)?,
        None => Listener::Tcp(listener),
    };
    Ok(Some((listener, guard)))
}

async fn named(name: &'static str, part: impl Future<Output = ()>) -> &'static str {
    part.await;
    name
}

/// The name of a part that ended or panicked though nothing was stopped; else waits for ever.
async fn first_unexpected(
    parts: &mut JoinSet<&'static str>,
    stop: &CancellationToken,
) -> &'static str {
    loop {
        match parts.join_next().await {
            Some(_) if stop.is_cancelled() => {}
            Some(Ok(name)) => return name,
            Some(Err(_)) => return "a part that panicked",
            None => std::future::pending().await,
        }
    }
}
