//! The command line: the daemon itself (`run`) and everything that asks it.
//!
//! Answers go to standard output, as aligned tables or, with `--json`, as JSON of a stable shape;
//! errors and logs go to standard error. Colours only on a terminal, and never with NO_COLOR.

mod args;
mod ask;
mod bundle;
mod config;
mod conflicts;
mod doctor;
mod init;
mod lone;
mod plan;
mod progress;
mod resolve;
mod schema;
mod sync;
mod table;
mod verify;

use std::io::Write;
use std::process::ExitCode;

use clap::CommandFactory as _;
use owo_colors::OwoColorize;
use serde::Serialize;

use crate::client::{Client, ClientError};
use crate::command::CommandError;
use crate::config::{ConfigError, Loaded};
use crate::daemon::DaemonError;
use crate::run::{self, RunError};
pub use args::{
    Args, Command, ConfigCommand, ConflictsArgs, ConflictsCommand, InitArgs, ResolveArgs, SyncArgs,
    VerifyArgs,
};

/// A command that failed: one paragraph, what to do about it, and the exit code.
#[derive(Debug)]
pub struct Failure {
    message: String,
    hint: Option<String>,
    exit_code: u8,
}

impl Failure {
    /// Ctrl-C, as shells have it.
    const INTERRUPTED: u8 = 130;

    fn new(message: impl ToString, hint: Option<&str>, exit_code: u8) -> Self {
        Self {
            message: message.to_string(),
            hint: hint.map(str::to_owned),
            exit_code,
        }
    }

    /// Writes the failure to standard error; the exit code of the process.
    pub fn report(&self, json: bool) -> ExitCode {
        let mut stderr = anstream::stderr().lock();
        // Standard error may be closed; the exit code still tells.
        let _ = if json {
            let body = serde_json::json!({
                "detail": self.message, "hint": self.hint, "exitCode": self.exit_code,
            });
            writeln!(stderr, "{body}")
        } else {
            let hint = self
                .hint
                .as_ref()
                .map_or(String::new(), |hint| format!("\n{} {hint}", "hint:".bold()));
            writeln!(stderr, "{} {}{hint}", "error:".red().bold(), self.message)
        };
        ExitCode::from(self.exit_code)
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::new(error, None, ConfigError::EXIT_CODE)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::new(&error, error.hint(), error.exit_code())
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        Self::new(&error, error.hint().as_deref(), error.exit_code())
    }
}

impl From<DaemonError> for Failure {
    fn from(error: DaemonError) -> Self {
        RunError::from(error).into()
    }
}

impl From<CommandError> for Failure {
    fn from(error: CommandError) -> Self {
        let exit_code = match error {
            CommandError::NotConfigured | CommandError::Offline(_) | CommandError::LocalAway(_) => {
                69
            }
            CommandError::BadRequest(_) => 2,
            _ => 1,
        };
        Self::new(error, None, exit_code)
    }
}

/// Where answers go.
#[derive(Clone, Copy, Debug)]
struct Output {
    json: bool,
}

impl Output {
    /// The answer as JSON, or as text for people. A closed pipe (`| head`) is no error.
    fn answer<T: Serialize>(self, value: &T, text: impl FnOnce() -> String) {
        let text = if self.json {
            serde_json::to_string_pretty(value).unwrap_or_else(|error| {
                format!("{{\"detail\": \"the answer can't be written as JSON: {error}\"}}")
            })
        } else {
            text()
        };
        let _ = writeln!(anstream::stdout().lock(), "{}", text.trim_end());
    }
}

/// Carries out a command other than `demo`, which brings its own servers and configuration.
pub async fn run(args: Args) -> Result<ExitCode, Failure> {
    let output = Output { json: args.json };
    let command = match args.command {
        Command::Completions { shell } => return Ok(completions(shell)),
        Command::Man => return man(),
        Command::Init(init) => return Box::pin(init::init(init, output)).await,
        command => command,
    };
    let loaded = Loaded::load(args.config.as_deref())?;
    let client = Client::new(&loaded.config.api);
    match command {
        Command::Run => {
            crate::log::init(&loaded.config.log);
            Box::pin(run::run(loaded, args.config)).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Sync(sync) if sync.dry_run => {
            plan::plan(client, &sync.collections, false, output).await
        }
        Command::Plan {
            collections,
            compare,
        } => plan::plan(client, &collections, compare, output).await,
        Command::Verify(args) => verify::verify(client, args, output).await,
        Command::Sync(sync) => Box::pin(sync::sync(loaded.config, client, sync, output)).await,
        Command::Reconcile {
            adopt: None, exact, ..
        } => sync::reconcile(client, exact, output).await,
        Command::Reconcile {
            adopt: Some(mode),
            yes,
            ..
        } => Box::pin(plan::adopt(&loaded.config, client, (mode, yes), output)).await,
        Command::Status => ask::status(client, output).await,
        Command::Schema { create } => schema::schema(client, create, output).await,
        Command::Healthcheck => ask::healthcheck(client, output).await,
        Command::Queue { limit } => ask::queue(client, limit, output).await,
        Command::Logs { limit } => ask::logs(client, limit, output).await,
        Command::Pause => ask::order(client, "/api/sync/pause", output).await,
        Command::Resume => ask::order(client, "/api/sync/resume", output).await,
        Command::Conflicts(conflicts) => conflicts::conflicts(client, conflicts, output).await,
        Command::Resolve(resolve) => resolve::resolve(client, resolve, output).await,
        Command::AutoResolve { max, collection } => {
            resolve::auto(client, max, collection, output).await
        }
        Command::Completions { shell } => Ok(completions(shell)),
        Command::Man => man(),
        Command::Config { command: None } => config::list(&loaded, client, output).await,
        Command::Config {
            command: Some(ConfigCommand::Set { key, value }),
        } => config::set(client, &key, Some(&value), output).await,
        Command::Config {
            command: Some(ConfigCommand::Unset { key }),
        } => config::set(client, &key, None, output).await,
        Command::Config {
            command: Some(ConfigCommand::Get { key }),
        } => config::get(&loaded, client, &key, output).await,
        Command::Doctor => doctor::doctor(&loaded, client, output).await,
        Command::SupportBundle { to, log } => {
            bundle::bundle(&loaded, client, (to, log), output).await
        }
        Command::Init(_) | Command::Demo { .. } => Err(Failure::new(
            "this needs no configuration and was started before",
            None,
            1,
        )),
    }
}

fn completions(shell: clap_complete::Shell) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "sangam", &mut script);
    // A closed pipe is no error.
    let _ = std::io::stdout().lock().write_all(&script);
    ExitCode::SUCCESS
}

fn man() -> Result<ExitCode, Failure> {
    let mut page = Vec::new();
    let made = clap_mangen::Man::new(Args::command()).render(&mut page);
    made.map_err(|error| Failure::new(error, None, 1))?;
    // The subcommands, each as a page of its own behind the first.
    let mut all = Args::command();
    all.build();
    for sub in all.get_subcommands().filter(|sub| sub.get_name() != "help") {
        let made = clap_mangen::Man::new(sub.clone()).render(&mut page);
        made.map_err(|error| Failure::new(error, None, 1))?;
    }
    let _ = std::io::stdout().lock().write_all(&page);
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definitions_are_consistent() {
        Args::command().debug_assert();
    }
}
