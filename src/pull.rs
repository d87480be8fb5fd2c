//! Pull: the periodic delta pull by timestamp, where the remote can't be followed (R18).
//!
//! Two cursors over each collection: `updatedAt`, which the apps write, and with stamping `syncedAt`,
//! the remote's own time of arrival, since what another site pushes after a week offline carries an
//! old `updatedAt`. The range is from the last pull's server time less an overlap up to the server's
//! now, so a far-future date can't poison it. Documents without a date are swept separately. It can't
//! see deletes: those come with the next reconcile, and `status` says so.

use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;

use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::key::{Id, Key};
use crate::order;
use crate::raw::Writer;
use crate::reconcile::collections;
use crate::settle::store_failed;
use crate::shared::{Settings, Shared};
use crate::side::LONG;
use crate::store::queue::{self, Change};
use crate::store::{self, walks};

/// Commits may become visible this much later than their timestamp, clocks and long transactions allowed for.
const OVERLAP_MS: i64 = 60_000;

/// Documents without a date are looked for every so many pulls.
const SWEEP_EVERY: u64 = 10;

/// Keys put into the inbox at once.
const KEYS: usize = 1000;

/// Runs until the daemon ends.
pub async fn run(shared: Arc<Shared>) -> Result<(), Failure> {
    let mut pulls = 0;
    loop {
        let interval = shared.settings().config.pull.interval;
        tokio::select! {
            () = shared.cancel.cancelled() => return Ok(()),
            () = tokio::time::sleep(interval) => {}
        }
        let blind = !shared.follows() || !shared.streams_open(Side::Remote);
        shared.notice(
            "pull",
            (!shared.follows() && shared.link.is_online()).then(|| {
                "the remote's changes are fetched by timestamp: deletions there, and edits that leave updatedAt as it was, \
                 arrive with the next reconcile only"
                    .to_owned()
            }),
        );
        if !blind
            || shared.is_quiet()
            || !shared.may_work()
            || !shared.settings().config.sync.auto_sync_enabled
        {
            continue;
        }
        match pull(&shared, pulls % SWEEP_EVERY == 0).await {
            Ok(()) => pulls += 1,
            Err(failure) if failure.class == Class::Fatal => return Err(failure),
            Err(failure) => tracing::debug!(%failure, "pull"),
        }
    }
}

/// One pull of every collection.
pub async fn pull(shared: &Arc<Shared>, sweep: bool) -> Result<(), Failure> {
    let settings = shared.settings();
    for db in &settings.config.databases {
        let mut found = collections(shared, &settings, Side::Remote, db).await?;
        found.sort_by_cached_key(|coll| settings.order.rank(db, coll));
        for coll in found {
            let rank = settings.order.rank(db, &coll);
            let pulling = pull_collection(shared, &settings, db, &coll, sweep);
            let outcome = order::at(rank, pulling).await;
            shared.note(Side::Remote, &outcome);
            outcome?;
        }
    }
    Ok(())
}

async fn pull_collection(
    shared: &Arc<Shared>,
    settings: &Settings,
    db: &str,
    coll: &str,
    sweep: bool,
) -> Result<(), Failure> {
    let ns = shared
        .store
        .namespace(db, coll)
        .await
        .map_err(store_failed)?;
    let mark = format!("pull:{ns}");
    // The server's clock as of now; measured by the probe, which runs at least once an interval.
    let now = Utc::now().timestamp_millis() + shared.offset(Side::Remote);
    let Some((last, compared)) = last(shared, db, &mark).await? else {
        return Ok(());
    };
    let from = last - OVERLAP_MS;
    let fields = &settings.config.fields;
    let mut cursors = vec![&fields.updated_at];
    if settings.config.sync.stamp_documents {
        cursors.push(&fields.synced_at);
    }
    for field in cursors {
        let mut w = Writer::new();
        w.str("find", coll)
            .open("filter")
            .open(field)
            .date("$gt", from)
            .date("$lte", now)
            .close()
            .close();
        w.open("sort").i32(field, 1).i32("_id", 1).close();
        queue_found(shared, db, ns, w).await?;
    }
    if sweep && compared {
        let mut w = Writer::new();
        w.str("find", coll)
            .open("filter")
            .open(&fields.updated_at)
            .open("$not")
            .str("$type", "date");
        w.close().close().close();
        queue_found(shared, db, ns, w).await?;
    }
    shared
        .store
        .set_meta(&mark, now)
        .await
        .map_err(store_failed)
}

/// When the last pull of a collection was, in the server's time; before the first one, when the
/// comparison began that has seen all that was there before. And whether that comparison is over.
/// `None`: it is still to begin, and every document fetched now would only be read twice.
async fn last(shared: &Shared, db: &str, mark: &str) -> Result<Option<(i64, bool)>, Failure> {
    let (db, mark) = (db.to_owned(), mark.to_owned());
    let asked = shared.store.call(move |c| {
        let compared: Option<i64> = store::get_meta(c, "compared_from")?;
        let last = match store::get_meta(c, &mark)?.or(compared) {
            Some(last) => Some(last),
            None => walks::began(c, &db)?,
        };
        Ok(last.map(|last| (last, compared.is_some())))
    });
    asked.await.map_err(store_failed)
}

async fn queue_found(
    shared: &Arc<Shared>,
    db: &str,
    ns: u32,
    mut w: Writer,
) -> Result<(), Failure> {
    w.open("projection")
        .i32("_id", 1)
        .close()
        .open("readConcern")
        .str("level", "majority")
        .close();
    let remote = shared.endpoint(Side::Remote)?;
    let mut rows = remote.cursor(db, w.command(), LONG).await?;
    let mut changes = Vec::new();
    loop {
        let next = rows.next().await?;
        let ended = next.is_none();
        if let Some(id) = next.and_then(|d| Id::of(d.as_bytes())) {
            changes.push(Change {
                key: Key::new(ns, &id),
                id,
                hint: None,
            });
        }
        if changes.len() >= KEYS || ended {
            let batch = std::mem::take(&mut changes);
            let now = Utc::now().timestamp_millis();
            shared
                .store
                .call(move |c| queue::enqueue(c, Side::Remote, &batch, now))
                .await
                .map_err(store_failed)?;
            shared.wake.notify_one();
        }
        if ended {
            return Ok(());
        }
        // What was queued is worked off before more is fetched: memory and inbox stay small.
        tokio::time::sleep(Duration::ZERO).await;
    }
}
