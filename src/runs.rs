//! Sync runs: what was moved, folded into one record a burst, never one a document.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use chrono::Utc;
use rusqlite::Connection;

use crate::command::{RunStatus, SyncRun, Trigger};
use crate::decide::Side;
use crate::shared::lock;
use crate::store::{self, records};

/// A burst ends when nothing has moved for this long.
const QUIET: Duration = Duration::from_secs(2);

/// A burst that does not end is recorded in pieces of this length.
const LONGEST: Duration = Duration::from_secs(60);

/// The run at work, if any.
#[derive(Default)]
pub struct Runs {
    current: Mutex<Option<Current>>,
    last: Mutex<Option<SyncRun>>,
}

struct Current {
    run: SyncRun,
    began: Instant,
    moved: Instant,
    /// A person or a task waits for it and ends it.
    owned: bool,
}

fn empty(trigger: Trigger, collections: Vec<String>) -> SyncRun {
    SyncRun {
        start_time: Utc::now(),
        end_time: None,
        status: RunStatus::InProgress,
        trigger,
        collections,
        local_to_remote: Default::default(),
        remote_to_local: Default::default(),
        conflicts: Default::default(),
        errors: vec![],
        duration_seconds: 0.0,
        bytes_transferred: 0,
    }
}

impl Runs {
    fn with(&self, change: impl FnOnce(&mut SyncRun)) {
        let mut current = lock(&self.current);
        let now = Instant::now();
        let current = current.get_or_insert_with(|| Current {
            run: empty(Trigger::Automatic, vec![]),
            began: now,
            moved: now,
            owned: false,
        });
        current.moved = now;
        change(&mut current.run);
    }

    /// So many documents, of so many bytes in all, were written to `to`.
    pub fn moved(&self, to: Side, collection: &str, documents: usize, bytes: usize) {
        self.with(|run| {
            let counts = match to {
                Side::Remote => &mut run.local_to_remote,
                Side::Local => &mut run.remote_to_local,
            };
            *counts.entry(collection.to_owned()).or_default() += documents as u64;
            run.bytes_transferred += bytes as u64;
        });
    }

    /// A conflict was found.
    pub fn conflict(&self, collection: &str) {
        self.with(|run| *run.conflicts.entry(collection.to_owned()).or_default() += 1);
    }

    /// Something went wrong; the same words are kept once.
    pub fn error(&self, text: String) {
        let mut current = lock(&self.current);
        if let Some(current) = current.as_mut()
            && current.run.errors.len() < 20
            && !current.run.errors.contains(&text)
        {
            current.run.errors.push(text);
        }
    }

    /// Begins a run that its owner ends; the burst before it is handed back for the record.
    /// `None` while another owned run is at work.
    pub fn begin(&self, trigger: Trigger, collections: Vec<String>) -> Option<Option<SyncRun>> {
        let mut current = lock(&self.current);
        if current.as_ref().is_some_and(|c| c.owned) {
            return None;
        }
        let before = current.take().map(|c| close(c, RunStatus::Completed));
        let now = Instant::now();
        *current = Some(Current {
            run: empty(trigger, collections),
            began: now,
            moved: now,
            owned: true,
        });
        Some(before)
    }

    /// Ends an owned run.
    pub fn end(&self, status: RunStatus) -> Option<SyncRun> {
        let ended = close(lock(&self.current).take()?, status);
        *lock(&self.last) = Some(ended.clone());
        Some(ended)
    }

    /// Ends a burst that went quiet or grew long.
    pub fn end_if_quiet(&self) -> Option<SyncRun> {
        let mut current = lock(&self.current);
        let c = current.as_ref()?;
        if c.owned || (c.moved.elapsed() < QUIET && c.began.elapsed() < LONGEST) {
            return None;
        }
        let ended = close(current.take()?, RunStatus::Completed);
        *lock(&self.last) = Some(ended.clone());
        Some(ended)
    }

    /// The run at work, with its counts so far.
    pub fn now(&self) -> Option<SyncRun> {
        lock(&self.current).as_ref().map(|c| SyncRun {
            duration_seconds: c.began.elapsed().as_secs_f64(),
            ..c.run.clone()
        })
    }

    /// Whether a run is at work.
    pub fn is_running(&self) -> bool {
        lock(&self.current).is_some()
    }

    /// Whether a run with an owner is at work.
    pub fn is_owned(&self) -> bool {
        lock(&self.current).as_ref().is_some_and(|c| c.owned)
    }

    /// Whether the run at work is one that a person asked for.
    pub fn is_manual(&self) -> bool {
        lock(&self.current)
            .as_ref()
            .is_some_and(|c| c.run.trigger == Trigger::Manual)
    }

    /// The last run that ended.
    pub fn last(&self) -> Option<SyncRun> {
        lock(&self.last).clone()
    }

    /// Restores the last run after a restart.
    pub fn set_last(&self, run: SyncRun) {
        *lock(&self.last) = Some(run);
    }
}

fn close(current: Current, status: RunStatus) -> SyncRun {
    let mut run = current.run;
    // A burst's length is from its first to its last movement, not the quiet after it.
    let length = if current.owned {
        current.began.elapsed()
    } else {
        current.moved - current.began
    };
    run.duration_seconds = length.as_secs_f64();
    run.end_time = Some(run.start_time + chrono::Duration::from_std(length).unwrap_or_default());
    run.status = match status {
        RunStatus::Completed if !run.errors.is_empty() || !run.conflicts.is_empty() => {
            RunStatus::Partial
        }
        status => status,
    };
    let touched = run
        .local_to_remote
        .keys()
        .chain(run.remote_to_local.keys())
        .chain(run.conflicts.keys());
    for name in touched.cloned().collect::<std::collections::BTreeSet<_>>() {
        if !run.collections.contains(&name) {
            run.collections.push(name);
        }
    }
    run
}

/// Puts a run on record, inside a store call.
pub fn record(c: &Connection, run: &SyncRun) -> rusqlite::Result<()> {
    let doc = bson::serialize_to_document(run).unwrap_or_default();
    let mut doc = doc;
    // Dates as dates, so that the TTL index and the owner's tools see them as such.
    doc.insert(
        "startTime",
        bson::DateTime::from_millis(run.start_time.timestamp_millis()),
    );
    doc.insert(
        "endTime",
        run.end_time
            .map(|t| bson::DateTime::from_millis(t.timestamp_millis())),
    );
    let bytes = doc.to_vec().unwrap_or_default();
    records::put_record(c, "sync_logs", &bson::oid::ObjectId::new().bytes(), &bytes)?;
    if run.status != RunStatus::Failed {
        let total: i64 = store::get_meta(c, "runs_completed")?.unwrap_or(0);
        store::set_meta(c, "runs_completed", total + 1)?;
    }
    store::set_meta(
        c,
        "last_run",
        serde_json::to_string(run).unwrap_or_default(),
    )
}
