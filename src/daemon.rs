//! The daemon: one `JoinSet` of named tasks under a cancellation token.

use crate::command::{CommandError, NetworkStatus, Queue, Status, SyncRun, Trigger};
use crate::config::Config;

/// A running daemon, as the API, the control file and the signals see it. Cheap to clone.
#[derive(Clone)]
pub struct Handle;

impl Handle {
    /// Sends and fetches everything now and waits until it is done; the run's counts.
    pub async fn sync(
        &self,
        _trigger: Trigger,
        _collections: &[String],
    ) -> Result<SyncRun, CommandError> {
        Err(CommandError::Failed("not built yet".into()))
    }
    /// How things are.
    pub async fn status(&self) -> Result<Status, CommandError> {
        Err(CommandError::Failed("not built yet".into()))
    }
    /// The link in the replaced service's words.
    pub fn network_status(&self) -> NetworkStatus {
        NetworkStatus {
            is_running: true,
            is_online: false,
            last_check: None,
            check_interval_seconds: 30.0,
        }
    }
    /// The last `limit` sync runs, newest first.
    pub async fn logs(&self, _limit: i64) -> Result<Vec<SyncRun>, CommandError> {
        Ok(vec![])
    }
    /// The oldest `limit` waiting documents.
    pub async fn queue(&self, _limit: u32) -> Result<Queue, CommandError> {
        Ok(Queue::default())
    }
    /// Stops sending and applying until `resume`; survives a restart.
    pub async fn pause(&self) -> Result<(), CommandError> {
        Ok(())
    }
    /// Undoes `pause`.
    pub async fn resume(&self) -> Result<(), CommandError> {
        Ok(())
    }
    /// Compares both sides whole against base and mends what differs.
    pub async fn reconcile(&self) -> Result<SyncRun, CommandError> {
        Err(CommandError::Failed("not built yet".into()))
    }
    /// Takes a new configuration; what can't change while running (database, state_dir, URIs) is an error.
    pub async fn reload(&self, _config: Config) -> Result<(), CommandError> {
        Ok(())
    }
    /// Whether local changes are being captured (`/readyz`, `READY=1`).
    pub fn is_capturing(&self) -> bool {
        false
    }
    /// Whether the event loops are alive (`/healthz`, `WATCHDOG=1`).
    pub fn is_alive(&self) -> bool {
        true
    }
}

/// Stub until the engine lands.
#[derive(Debug, thiserror::Error)]
#[error("not built yet")]
pub struct StartError;

impl StartError {
    /// Exit code.
    pub fn exit_code(&self) -> u8 {
        1
    }
    /// What to do.
    pub fn hint(&self) -> Option<&str> {
        None
    }
}

/// Stub until the engine lands.
#[derive(Debug, thiserror::Error)]
#[error("not built yet")]
pub struct DaemonError;

/// Stub until the engine lands.
pub struct Daemon;

impl Daemon {
    /// The handle.
    pub fn handle(&self) -> Handle {
        Handle
    }
    /// Runs.
    pub async fn run_until(
        self,
        stop: tokio_util::sync::CancellationToken,
    ) -> Result<(), DaemonError> {
        stop.cancelled().await;
        Ok(())
    }
}

/// Stub until the engine lands.
pub async fn start(_config: Config) -> Result<Daemon, StartError> {
    Ok(Daemon)
}
