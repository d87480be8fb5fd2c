//! The command line: the daemon itself (`run`) and everything that asks it.
//!
//! Answers go to standard output, as aligned tables or, with `--json`, as JSON of a stable shape;
//! errors and logs go to standard error. Colours only on a terminal, and never with NO_COLOR.

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
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, Parser, Subcommand};
use owo_colors::OwoColorize;
use serde::Serialize;

use crate::adopt::Mode;
use crate::client::{Client, ClientError};
use crate::command::CommandError;
use crate::config::{ConfigError, Loaded};
use crate::daemon::DaemonError;
use crate::decide::Kind;
use crate::resolution::Strategy;
use crate::run::{self, RunError};

/// Keeps a local MongoDB database and one in the cloud equal, both ways.
#[derive(Debug, Parser)]
#[command(name = "sangam", version, after_help = EXIT_CODES)]
pub struct Args {
    /// Configuration file [default: $SANGAM_CONFIG, ./sangam.toml, ./config/sangam.toml or
    /// /etc/sangam/sangam.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Answer in JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but conflicts or differences \
    are open; 69 the remote database or the daemon can't be reached; 78 bad configuration; 130 stopped by Ctrl-C.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon in the foreground
    Run,
    /// Send and fetch everything now
    Sync(SyncArgs),
    /// Say how things are
    Status,
    /// Whether the daemon answers and its tasks run: exit code 0 or 1. For a container's HEALTHCHECK
    Healthcheck,
    /// List the changes that wait
    Queue {
        /// Most entries to list
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
        limit: u32,
    },
    /// Stop moving changes; they go on being noted
    Pause,
    /// Undo `pause`
    Resume,
    /// List the last syncs
    Logs {
        /// Most entries to list
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
        limit: u32,
    },
    /// List the conflicts that wait for a decision, with what can be done about each
    Conflicts(ConflictsArgs),
    /// Settle a conflict, or all that fit
    Resolve(ResolveArgs),
    /// Settle the conflicts that need no person
    AutoResolve {
        /// At most so many
        #[arg(long, value_name = "N")]
        max: Option<u64>,
        /// Only of this collection
        #[arg(long, value_name = "C")]
        collection: Option<String>,
    },
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
    /// Show each setting, its value and where it comes from
    Config {
        /// What to show
        #[command(subcommand)]
        command: Option<ConfigCommand>,
    },
    /// Compare both databases as a whole and mend what differs
    Reconcile {
        /// Forget what was known of the databases, as after one was replaced or restored, and make
        /// them equal: `local` or `remote` names the side that is right, `merge` keeps what either
        /// has and deletes nothing. Says first what it will do
        #[arg(long, conflicts_with = "exact", value_enum, value_name = "WAY", num_args = 0..=1, default_missing_value = "merge")]
        adopt: Option<Mode>,
        /// Don't ask
        #[arg(long, requires = "adopt")]
        yes: bool,
        /// Read every document; without it, checksums are compared, which don't see every change of a
        /// fraction
        #[arg(long)]
        exact: bool,
    },
    /// Compare indexes and options of both databases
    Schema {
        /// Make what is missing: indexes dropped on one side, refused before, or needed by the pull
        #[arg(long)]
        create: bool,
    },
    /// Say what a sync would do; nothing is written
    Plan {
        /// Only these collections
        #[arg(long, num_args = 1.., value_name = "NAME")]
        collections: Vec<String>,
        /// Compare both databases whole instead of looking at what is queued
        #[arg(long)]
        compare: bool,
    },
    /// Prove both databases equal, or list what differs
    Verify(VerifyArgs),
    /// Write a configuration by asking, and test the connections meanwhile
    Init(InitArgs),
    /// Look at everything that Sangam stands on, and say what to do about what is wrong
    Doctor,
    /// Pack what somebody who helps needs to see; passwords and values of documents are taken out
    SupportBundle {
        /// Where to write it [default: sangam-support-TIME.tar.gz]
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
        /// The daemon's log, where it is not in the systemd journal
        #[arg(long, value_name = "FILE")]
        log: Option<PathBuf>,
    },
    /// Show Sangam at work on two databases of its own
    Demo {
        /// End after the tour instead of staying up
        #[arg(long)]
        once: bool,
        /// Keep the data in this folder
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

/// `sangam init`
#[derive(Debug, clap::Args)]
pub struct InitArgs {
    /// Where to write it [default: sangam.toml]
    #[arg(long, value_name = "FILE")]
    pub to: Option<PathBuf>,
    /// The database to keep equal; several with commas between
    #[arg(long, value_name = "NAME")]
    pub database: Option<String>,
    /// Address of the local database
    #[arg(long, value_name = "URI")]
    pub local: Option<String>,
    /// Address of the remote database
    #[arg(long, value_name = "URI")]
    pub remote: Option<String>,
    /// Name of this place
    #[arg(long, value_name = "NAME")]
    pub site: Option<String>,
    /// Make the local server a replica set of one. Of a standalone server, say what to change in
    /// its configuration, wait until it was restarted, and make it one then
    #[arg(long)]
    pub initiate: bool,
    /// How long to wait for that restart, such as 10m [default: until Ctrl-C at a terminal, else
    /// not at all]
    #[arg(long, value_name = "DURATION", requires = "initiate", value_parser = humantime::parse_duration)]
    pub wait: Option<Duration>,
    /// Write it even if the local database can't be used
    #[arg(long)]
    pub force: bool,
    /// Ask nothing; what is not given has its default
    #[arg(long)]
    pub yes: bool,
}

/// `sangam sync`
#[derive(Debug, clap::Args)]
pub struct SyncArgs {
    /// Only these collections
    #[arg(long, num_args = 1.., value_name = "NAME")]
    pub collections: Vec<String>,
    /// Make one pass in this process instead of asking the daemon
    #[arg(long)]
    pub once: bool,
    /// Only say what would happen, as `plan` does
    #[arg(long, conflicts_with = "once")]
    pub dry_run: bool,
}

/// `sangam verify`
#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    /// Only these collections
    #[arg(long, num_args = 1.., value_name = "NAME")]
    pub collections: Vec<String>,
    /// Begin anew instead of going on with one that was interrupted
    #[arg(long)]
    pub fresh: bool,
    /// Read no more documents a second
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_documents: Option<u64>,
    /// Read no more bytes a second, of both sides together
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_bytes: Option<u64>,
    /// Mend what differs, after saying how and asking
    #[arg(long)]
    pub repair: bool,
    /// Don't ask
    #[arg(long, requires = "repair")]
    pub yes: bool,
}

/// `sangam conflicts`
#[derive(Debug, clap::Args)]
pub struct ConflictsArgs {
    /// Resolved ones, too
    #[arg(long)]
    pub all: bool,
    /// Only of this collection
    #[arg(long, value_name = "C")]
    pub collection: Option<String>,
    /// Most conflicts to list
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub limit: u32,
    /// List on after the conflict with this id
    #[arg(long, value_name = "ID")]
    pub after: Option<String>,
    /// What else
    #[command(subcommand)]
    pub command: Option<ConflictsCommand>,
}

/// `sangam conflicts ...`
#[derive(Debug, Subcommand)]
pub enum ConflictsCommand {
    /// Show one side by side, and what each strategy would result in
    Show {
        /// Its id, as listed
        id: String,
    },
    /// Put back what a resolution or a policy discarded
    Undo {
        /// Its id, as listed with --all
        id: String,
        /// A new value for the field in conflict, where the old one is taken meanwhile
        #[arg(long, value_name = "V")]
        value: Option<String>,
    },
}

/// `sangam resolve`
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("which").required(true).multiple(true).args(["id", "collection", "kind"]))]
pub struct ResolveArgs {
    /// Id of the conflict, as listed
    #[arg(conflicts_with_all = ["collection", "kind"])]
    pub id: Option<String>,
    /// How
    #[arg(long, value_enum)]
    pub strategy: Strategy,
    /// A value for the field in conflict; of several fields, as JSON
    #[arg(long, value_name = "V", requires = "id", allow_hyphen_values = true)]
    pub value: Option<String>,
    /// Words for the record
    #[arg(long, value_name = "N")]
    pub notes: Option<String>,
    /// Only say what would happen
    #[arg(long)]
    pub dry_run: bool,
    /// The version that was looked at (see --json); if a side changed since, nothing is written
    #[arg(long, value_name = "VERSION", requires = "id")]
    pub version_seen: Option<String>,
    /// All open conflicts of this collection
    #[arg(long, value_name = "C")]
    pub collection: Option<String>,
    /// All open conflicts of this kind
    #[arg(long, value_enum, value_name = "K")]
    pub kind: Option<Kind>,
    /// At most so many
    #[arg(long, value_name = "N", conflicts_with = "id")]
    pub max: Option<u64>,
}

/// `sangam config ...`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Change one value in the running daemon; it goes before the file's, also after a restart
    Set {
        /// As in the file, e.g. sync.batch_size, or as in the API, e.g. batchSize
        key: String,
        /// As in the file, without quotes
        value: String,
    },
    /// Go back to the file's value
    Unset {
        /// As for `set`
        key: String,
    },
    /// Show one value
    Get {
        /// As in the file, e.g. sync.batch_size
        key: String,
    },
}

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
