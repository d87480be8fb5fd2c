//! What the daemon can be told, from whichever way it comes: control file, signal, API, CLI.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A request to the running daemon. Control file, signals and API all produce this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Send and fetch everything now; an empty list means every collection.
    Sync {
        /// Collections to sync.
        collections: Vec<String>,
    },
    /// Stop sending and applying; capture goes on.
    Pause,
    /// Undo `Pause`.
    Resume,
    /// Read the configuration again.
    Reload,
    /// Say how things are.
    Status,
    /// Compare both sides whole against base.
    Reconcile {
        /// Read every document instead of comparing hashes.
        exact: bool,
    },
    /// Make both sides equal in that way, whatever was known of them before.
    Adopt {
        /// Which side is right.
        mode: crate::adopt::Mode,
        /// Who says so, for the record.
        who: String,
    },
}

/// Why a sync run was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    /// A person asked.
    Manual,
    /// Changes arrived.
    Automatic,
    /// The clock said so (pull, reconcile).
    Scheduled,
    /// The link came back.
    Reconnect,
    /// The daemon started.
    Startup,
}

/// State of a sync run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunStatus {
    /// Still going.
    InProgress,
    /// Everything asked for is done.
    Completed,
    /// Done, but something is held (conflict, rejected document).
    Partial,
    /// Could not be done; see `errors`.
    Failed,
}

/// One pass: the record in `sync_logs` and the answer to `sync`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SyncRun {
    /// When it began.
    pub start_time: DateTime<Utc>,
    /// When it ended; `None` while in progress.
    pub end_time: Option<DateTime<Utc>>,
    /// How it stands or ended.
    pub status: RunStatus,
    /// Why it was started.
    pub trigger: Trigger,
    /// Collections asked for or touched.
    pub collections: Vec<String>,
    /// Documents written to the remote, by collection.
    pub local_to_remote: BTreeMap<String, u64>,
    /// Documents written to the local database, by collection.
    pub remote_to_local: BTreeMap<String, u64>,
    /// Conflicts found, by collection.
    pub conflicts: BTreeMap<String, u64>,
    /// What went wrong, in words for a person.
    pub errors: Vec<String>,
    /// Wall time in seconds.
    pub duration_seconds: f64,
    /// Bytes of document bodies sent and fetched, before compression.
    pub bytes_transferred: u64,
}

/// State of the link as an owner understands it.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LinkStatus {
    /// `online`, `interrupted`, `offline` or `not_configured`.
    pub state: String,
    /// Since when it is in that state.
    pub since: DateTime<Utc>,
    /// `offline`, `dns`, `refused`, `timeout`, `tls`, `bad_credentials`, `ip_not_allowed`,
    /// `paused_or_over_quota`, `not_a_replica_set`; `None` when online.
    pub reason: Option<String>,
    /// A sentence for a person: what it means and what to do.
    pub message: Option<String>,
    /// When the next probe is due, while offline.
    pub next_probe: Option<DateTime<Utc>>,
    /// Last time the way to the remote was tried.
    pub last_check: Option<DateTime<Utc>>,
}

/// Answer to `status`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// End of the last sync run.
    pub last_sync_time: Option<DateTime<Utc>>,
    /// How it ended.
    pub last_sync_status: Option<RunStatus>,
    /// Its wall time in seconds.
    pub last_sync_duration: Option<f64>,
    /// Runs that completed, ever.
    pub total_syncs_completed: u64,
    /// Conflicts recorded, ever.
    pub total_conflicts: u64,
    /// Conflicts that still wait for a person.
    pub unresolved_conflicts: u64,
    /// Documents in the outbox.
    pub pending_documents: u64,
    /// Documents in the inbox.
    pub pending_inbox: u64,
    /// Queued documents that are held (in conflict or failed) and move only when settled or changed.
    pub held_documents: u64,
    /// Documents parked as failed (rejected), each with a reason in the queue listing.
    pub failed_documents: u64,
    /// Whether the remote answers.
    pub is_online: bool,
    /// Whether documents are being moved right now.
    pub is_syncing: bool,
    /// Whether the remote is configured at all.
    pub is_configured: bool,
    /// Which of several daemons on this pair works; `null` without high availability.
    #[serde(default)]
    pub ha: Option<crate::lease::Standing>,
    /// Whether `pause` is in force.
    pub is_paused: bool,
    /// Whether local changes are being captured.
    pub is_capturing: bool,
    /// Whether the remote's change stream is being followed.
    pub is_following: bool,
    /// The link.
    pub link: LinkStatus,
    /// Age in seconds of the oldest change not yet on the other side; 0 when equal.
    pub lag_seconds: f64,
    /// When that change was seen.
    pub oldest_unsynced: Option<DateTime<Utc>>,
    /// Clock of the remote minus ours, in milliseconds.
    pub clock_skew: Option<i64>,
    /// The sync run at work, with its counts so far.
    #[serde(default)]
    pub current_run: Option<SyncRun>,
    /// First sync or reconcile going on: collection, documents compared.
    pub progress: Option<Progress>,
    /// The last time both sides were proven equal by `verify`.
    #[serde(default)]
    pub last_proof: Option<crate::verify::Proof>,
    /// The last verify in short.
    #[serde(default)]
    pub last_verify: Option<crate::verify::Last>,
    /// States a person must know: history lost, held collections, disk.
    pub notices: Vec<String>,
    /// Names of the databases.
    pub databases: Vec<String>,
    /// This site.
    pub site: String,
    /// Version of the daemon.
    pub version: String,
}

/// How far a comparison is.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// `first_sync`, `reconcile`, `verify` or `adopt`.
    pub what: String,
    /// Collection at work; with several at once, the one that moved last.
    pub collection: String,
    /// Documents compared so far, all collections.
    pub documents: u64,
    /// Estimate of the total.
    pub total: u64,
    /// Bytes of documents read for it so far from both sides, before compression.
    pub bytes: u64,
    /// Documents a second, of late.
    pub rate: f64,
    /// Time left at that rate in seconds; `None` while nobody can tell.
    pub seconds_left: Option<u64>,
    /// The same by collection, in the order in which they are compared.
    pub collections: Vec<CollectionProgress>,
}

/// How far the comparison of one collection is.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CollectionProgress {
    /// Its name, `db.collection` when several databases are synced.
    pub collection: String,
    /// Documents compared so far.
    pub documents: u64,
    /// Estimate of the total; exact once it is done.
    pub total: u64,
    /// Bytes of documents read so far from both sides, before compression.
    pub bytes: u64,
    /// Whether all of it was compared.
    pub done: bool,
}

/// Answer to `network-status`; names as in the service it replaces.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NetworkStatus {
    /// The daemon runs.
    pub is_running: bool,
    /// The remote answers.
    pub is_online: bool,
    /// Last probe or traffic.
    pub last_check: Option<DateTime<Utc>>,
    /// `[probe] interval` in seconds.
    pub check_interval_seconds: f64,
}

/// One waiting document, as `queue` lists it.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct QueueEntry {
    /// `outbox` or `inbox`.
    pub queue: String,
    /// Collection, `db.collection` when several databases are synced.
    pub collection: String,
    /// `_id` as extended JSON.
    #[schema(value_type = Value)]
    pub id: serde_json::Value,
    /// When the change was first seen.
    pub since: DateTime<Utc>,
    /// `waiting`, `conflict` or `failed`.
    pub state: String,
    /// Why it is held, for `conflict` and `failed`; of one that waits, that its whole collection does.
    pub reason: Option<String>,
}

/// Answer to `queue`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Queue {
    /// Documents in the outbox, held ones included.
    pub outbox: u64,
    /// Documents in the inbox, held ones included.
    pub inbox: u64,
    /// The entries that go next (by the order of collections, else the oldest), as many as asked for.
    pub entries: Vec<QueueEntry>,
}

/// Why a command could not be carried out; the API turns it into a status code, the CLI into an exit code.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// Another sync run is going on (409).
    #[error("a sync is already running; wait for it or look at `sangam status`")]
    Busy,
    /// No `remote.uri` (503).
    #[error("remote database not configured; set remote.uri in sangam.toml or MONGODB_CLOUD_URL")]
    NotConfigured,
    /// The remote does not answer (503).
    #[error("the remote database cannot be reached: {0}")]
    Offline(String),
    /// The local database does not answer (503).
    #[error("the local database cannot be reached: {0}")]
    LocalAway(String),
    /// A collection that is not synced was named (400).
    #[error("{0}")]
    BadRequest(String),
    /// No such thing (404).
    #[error("{0}")]
    NotFound(String),
    /// It can't be done as things are (409).
    #[error("{0}")]
    Refused(String),
    /// Something changed since it was shown; nothing was written (409).
    #[error("{message}")]
    Changed {
        /// What to do.
        message: String,
        /// The new state, as the API shows it.
        state: Box<serde_json::Value>,
    },
    /// Anything else (500).
    #[error("{0}")]
    Failed(String),
}
