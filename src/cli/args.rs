//! The commands and their arguments, as `--help` and the manual page show them.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::adopt::Mode;
use crate::decide::Kind;
use crate::resolution::Strategy;

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
