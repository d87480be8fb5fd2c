//! The daemon as the demo's child: started from this very program, asked over its API.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::place::Place;
use super::watch;
use crate::client::Client;
use crate::command::{Queue, Status};
use crate::config::{self, ApiConfig};
use crate::process::{self, Child};

/// A running daemon; killed when dropped.
#[derive(Debug)]
pub(super) struct Daemon {
    child: Mutex<Child>,
    client: Client,
    log: PathBuf,
}

impl Daemon {
    /// Starts the daemon with the folder's configuration, its log in the folder's log file.
    pub(super) fn start(place: &Place) -> Result<Self> {
        let program = std::env::current_exe().context("this program's own file is not known")?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(place.log_file())
            .with_context(|| format!("cannot write {}", place.log_file().display()))?;
        let mut command = Command::new(&program);
        // The demo's daemon must never touch another database.
        for name in config::variables() {
            command.env_remove(name);
        }
        command
            .arg("--config")
            .arg(place.config_file())
            .arg("run")
            // Not the caller's folder, which may have an `.env`.
            .current_dir(place.dir())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = Child::spawn(&mut command)
            .with_context(|| format!("cannot run {}", program.display()))?;
        let api = ApiConfig {
            listen: place.api_address(),
            token: None,
            tokens: Default::default(),
            socket: None,
            tls: None,
        };
        Ok(Self {
            child: Mutex::new(child),
            client: Client::new(&api),
            log: place.log_file(),
        })
    }

    /// The process id.
    pub(super) fn id(&self) -> u32 {
        self.child().id()
    }

    /// An error if the daemon has ended.
    pub(super) fn must_run(&self) -> Result<()> {
        if let Some(status) = self.child().exit_status()? {
            bail!("the daemon has ended with {}", process::describe(status));
        }
        Ok(())
    }

    /// Why the daemon has ended, once it has.
    pub(super) async fn ended(&self) -> anyhow::Error {
        loop {
            if let Err(error) = self.must_run() {
                return error;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// `GET /api/sync/status`.
    pub(super) async fn status(&self) -> Result<Status> {
        Ok(self.client.get("/api/sync/status").await?)
    }

    /// Documents that wait for the line or are on their way, without those that a conflict or a
    /// refusal holds back.
    pub(super) async fn waiting(&self) -> Result<u64> {
        // More than all of the tour's, so that no held one is missed.
        let queue: Queue = self.client.get("/api/sync/queue?limit=1000").await?;
        let held = queue.entries.iter().filter(|e| e.state != "waiting");
        let held = u64::try_from(held.count())?;
        Ok((queue.outbox + queue.inbox).saturating_sub(held))
    }

    /// Waits until the daemon captures local changes.
    pub(super) async fn ready(&self) -> Result<()> {
        watch::until("the daemon notes changes", async || {
            Ok(self.status().await?.is_capturing.then_some(()))
        })
        .await
    }

    /// The last lines of the log.
    pub(super) fn log_tail(&self, lines: usize) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// SIGTERM, and waits for the end.
    pub(super) async fn stop(self) -> Result<()> {
        let mut child = self
            .child
            .into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let status = child.terminate(Duration::from_secs(10)).await?;
        ensure!(
            status.success(),
            "the daemon ended with {}",
            process::describe(status)
        );
        Ok(())
    }

    fn child(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
