//! Carries out a [`Command`], whichever way it came: control file, signal or API.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use serde_json::{Map, Value};

use crate::command::{Command, CommandError, RunStatus, Status, SyncRun, Trigger};
use crate::config::Config;
use crate::handle::Handle;
use crate::words;

/// What came of a command.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// A sync or reconcile ended.
    Run(Box<SyncRun>),
    /// How things are.
    Status(Box<Status>),
    /// Done; a sentence that says so.
    Done(&'static str),
}

/// The one place where commands meet the daemon. Cheap to clone.
#[derive(Clone)]
pub struct Dispatcher {
    handle: Handle,
    /// As the file has it.
    config: Arc<RwLock<Config>>,
    file: Option<PathBuf>,
    /// One change of the configuration at a time.
    changing: Arc<tokio::sync::Mutex<()>>,
}

impl Dispatcher {
    /// `file` is what `--config` named; `reload` reads it, or looks in the usual places, again.
    pub fn new(handle: Handle, config: Config, file: Option<PathBuf>) -> Self {
        Self {
            handle,
            config: Arc::new(RwLock::new(config)),
            file,
            changing: Arc::default(),
        }
    }

    /// The daemon.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Changes settings over the API: in force at once, and kept.
    pub async fn change(
        &self,
        changes: &Map<String, Value>,
        who: &str,
    ) -> Result<(), CommandError> {
        let _one = self.changing.lock().await;
        let mut overrides = self.handle.overrides().await?;
        overrides
            .change(changes)
            .map_err(CommandError::BadRequest)?;
        let file = self
            .config
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        self.handle.reload(overrides.apply(file)).await?;
        self.handle.save_overrides(overrides, who).await
    }

    /// Carries out a command and waits for its end. The work goes on when the caller is dropped: a
    /// client that hangs up must not leave a write half-way.
    pub async fn execute(&self, command: Command) -> Result<Outcome, CommandError> {
        let this = self.clone();
        tokio::spawn(async move { Box::pin(this.carry_out(command)).await })
            .await
            .unwrap_or_else(|_| Err(CommandError::Failed("the daemon is stopping".into())))
    }

    async fn carry_out(&self, command: Command) -> Result<Outcome, CommandError> {
        match command {
            Command::Sync { collections } => {
                let run = self.handle.sync(Trigger::Manual, &collections).await?;
                Ok(Outcome::Run(Box::new(run)))
            }
            Command::Reconcile { exact } => {
                let run = self.handle.reconcile(exact).await?;
                Ok(Outcome::Run(Box::new(run)))
            }
            Command::Adopt { mode, who } => {
                let run = self.handle.adopt(mode, &who).await?;
                Ok(Outcome::Run(Box::new(run)))
            }
            Command::Status => Ok(Outcome::Status(Box::new(self.handle.status().await?))),
            Command::Pause => {
                self.handle.pause().await?;
                Ok(Outcome::Done(
                    "paused: changes are noted, but nothing is moved until `resume`",
                ))
            }
            Command::Resume => {
                self.handle.resume().await?;
                Ok(Outcome::Done("resumed"))
            }
            Command::Reload => {
                let config = Config::load(self.file.as_deref())
                    .map_err(|error| CommandError::BadRequest(error.to_string()))?;
                let _one = self.changing.lock().await;
                let overrides = self.handle.overrides().await?;
                self.handle.reload(overrides.apply(config.clone())).await?;
                *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
                Ok(Outcome::Done("the configuration was read again"))
            }
        }
    }

    /// Carries out a command and puts what came of it in one line, for the control file and the log.
    pub async fn execute_to_line(&self, command: Command) -> String {
        match self.execute(command).await {
            Ok(outcome) => outcome.line(),
            Err(error) => format!("error: {error}").replace('\n', " "),
        }
    }
}

impl Outcome {
    /// One line for a person; starts with `error:` if the run failed.
    pub fn line(&self) -> String {
        match self {
            Self::Done(sentence) => (*sentence).to_owned(),
            Self::Status(status) => words::status_sentence(status),
            Self::Run(run) if run.status == RunStatus::Failed => {
                format!("error: {}", words::run_sentence(run))
            }
            Self::Run(run) => words::run_sentence(run),
        }
    }
}
