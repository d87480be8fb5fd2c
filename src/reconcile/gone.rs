//! Deletions that a comparison found, and documents that only base still knows.
//!
//! What one side deleted while nobody looked is kept apart until the whole collection was compared:
//! only then their number tells a clean-up from an accident. What both sides deleted has to leave base:
//! left there, a new document with that `_id` would look like an edit of a deleted one.

use std::sync::Arc;

use chrono::Utc;

use crate::decide::Side;
use crate::failure::Failure;
use crate::key::{Id, Key};
use crate::settle::store_failed;
use crate::shared::Shared;
use crate::store::queue::{self, Change};
use crate::store::{base, walks};

/// Documents handled in one transaction.
const CHUNK: u32 = 2000;

/// Deletions that a comparison found in one collection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Losses {
    /// Documents that the local side has no more, which the remote still has.
    pub(super) local: u64,
    /// The reverse.
    pub(super) remote: u64,
    /// Documents that base knows, the deleted ones included.
    pub(super) known: u64,
}

/// Counts the deletions found in a collection, none of which is queued yet.
pub(super) async fn losses(shared: &Shared, ns: u32) -> Result<Losses, Failure> {
    let counted = shared.store.call(move |c| {
        let [local, remote] = walks::count_gone(c, ns)?;
        if local + remote == 0 {
            return Ok(Losses::default());
        }
        let known = walks::count_base(c, ns)?;
        Ok(Losses {
            local,
            remote,
            known,
        })
    });
    counted.await.map_err(store_failed)
}

/// Queues the deletions of a collection; the worker looks at each once more.
pub(super) async fn queue(shared: &Shared, ns: u32) -> Result<(), Failure> {
    loop {
        let now = Utc::now().timestamp_millis();
        let moved = shared
            .store
            .call(move |c| walks::queue_gone(c, ns, CHUNK, now));
        if moved.await.map_err(store_failed)? == 0 {
            return Ok(());
        }
        shared.wake.notify_one();
    }
}

/// Queues what base knows and neither side has any more.
pub(super) async fn queue_vanished(
    shared: &Arc<Shared>,
    (db, coll): (&str, &str),
    ns: u32,
) -> Result<(), Failure> {
    let mut after = Vec::new();
    loop {
        let from = after.clone();
        let looked = shared
            .store
            .call(move |c| base::keys_after(c, ns, &from, CHUNK));
        let rows = looked.await.map_err(store_failed)?;
        let Some((last, _)) = rows.last() else {
            return Ok(());
        };
        after = last.as_bytes().to_vec();
        let known: Vec<(Key, Id)> = rows
            .into_iter()
            .filter_map(|(key, content)| Some((key, Id::of(&content?)?)))
            .collect();
        let ids = known.iter().map(|(_, id)| id);
        let there = shared.local.read_ids(db, coll, ns, ids).await?;
        let gone: Vec<(Key, Id)> = known
            .into_iter()
            .filter(|(key, _)| !there.contains(key))
            .collect();
        if gone.is_empty() {
            continue;
        }
        let queued = shared.store.call(move |c| {
            let mut changes = Vec::new();
            for (key, id) in gone {
                // What one side still has was met by the comparison.
                if !walks::is_gone(c, &key)?
                    && queue::get_row(c, Side::Local, &key)?.is_none()
                    && queue::get_row(c, Side::Remote, &key)?.is_none()
                {
                    changes.push(Change {
                        key,
                        id,
                        hint: None,
                    });
                }
            }
            queue::enqueue(c, Side::Remote, &changes, Utc::now().timestamp_millis())
        });
        queued.await.map_err(store_failed)?;
        shared.wake.notify_one();
    }
}
