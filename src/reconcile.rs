//! Reconcile: compares the two databases whole, against base, and queues what differs.
//!
//! The first sync is the same thing with no base. What asks for it is a flag in the store, with a
//! reason; it is dropped once everything that differed is settled, so a crash or an outage on the way
//! only means to go on. `pass` goes through a database by ranges, several at once, and keeps on disk
//! which are done; `settle` puts what the [walk](crate::walk) finds into base, outbox and inbox, for the
//! worker to decide; `gone` keeps deletions apart until their number is known. "Missing" is never read
//! as "deleted" without a base (R11).
//!
//! Every document is read where events were missed for certain and at a first sync. Otherwise hashes are
//! compared, and each night a part of the documents is read all the same (`pull.exact_nights`).

mod cutter;
mod gone;
mod pass;
mod range;
mod settle;

pub(crate) use pass::{first_name, load};

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bson::doc;
use chrono::Utc;

use crate::command::{RunStatus, SyncRun, Trigger};
use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::progress::Meter;
use crate::runs;
use crate::settle::store_failed;
use crate::shared::{Settings, Shared, lock};
use crate::store::{self, queue, walks};
use crate::tail::reconcile_name;
use crate::{adopt, loss, selection};

/// Why a database is compared that was never compared before.
const FIRST_SYNC: &str = "first sync";

/// Why a database is compared when its time has come.
const SCHEDULED: &str = "scheduled";

/// Why a database is compared because a person wants it: by hashes, or every document.
const ASKED: &str = "asked for";
/// See [`ASKED`].
const ASKED_EXACTLY: &str = "asked for, exactly";

/// A local server that is away for so long ends the wait for what has to be written to it.
const LOCAL_AWAY: Duration = Duration::from_secs(15);

/// So many rows are not done in a moment: they are counted less often.
const MANY: u32 = 2000;

/// How long a comparison waits for streams that are not open.
const OPENING: Duration = Duration::from_secs(15);

/// Runs until the daemon ends: reconciles what asks for it, and everything now and then.
pub async fn run(shared: Arc<Shared>) -> Result<(), Failure> {
    loop {
        let every = shared.settings().config.pull.reconcile;
        tokio::select! {
            () = shared.cancel.cancelled() => return Ok(()),
            () = shared.reconcile.notified() => {}
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
        let degraded = shared.degraded.load(std::sync::atomic::Ordering::Relaxed);
        if degraded || shared.is_quiet() || !shared.may_work() || !streams_ready(&shared) {
            continue;
        }
        if adopt::is_under_way(&shared).await? && !shared.runs.is_owned() {
            if shared.withholds() {
                continue;
            }
            match adopt::go_on(&shared, Trigger::Startup).await {
                Ok(_) => {}
                Err(failure) if failure.class == Class::Fatal => return Err(failure),
                Err(failure) => {
                    tracing::warn!(%failure, "adopting was interrupted; it goes on when the link is back");
                    continue;
                }
            }
        }
        // A standby compares only where it has missed something: the link is one for all.
        if !shared.withholds() && due(&shared, every).await? {
            for db in &shared.settings().config.databases {
                ask(&shared, db, SCHEDULED).await?;
            }
        }
        let asked = asked(&shared).await?;
        if asked.is_empty() || shared.runs.is_owned() || shared.adopting.load(Ordering::Acquire) {
            continue;
        }
        let first = asked.iter().any(|(_, why)| why == FIRST_SYNC);
        let trigger = if first {
            Trigger::Startup
        } else {
            Trigger::Scheduled
        };
        match reconcile(&shared, trigger, &asked).await {
            Ok(_) => {}
            Err(failure) if failure.class == Class::Fatal => return Err(failure),
            Err(failure) => {
                tracing::warn!(%failure, "comparing the databases was interrupted; it starts again when the link is back")
            }
        }
    }
}

/// Changes must be captured before anything is compared, or those made meanwhile would be missed.
fn streams_ready(shared: &Shared) -> bool {
    shared.streams_open(Side::Local) && (!shared.follows() || shared.streams_open(Side::Remote))
}

/// Waits until changes are captured; streams that are opened anew, say, take a moment.
async fn capturing(shared: &Shared) -> Result<(), Failure> {
    let began = tokio::time::Instant::now();
    // Where the link is gone, the comparison itself says so.
    while !streams_ready(shared) && shared.may_work() && !shared.cancel.is_cancelled() {
        if began.elapsed() > OPENING {
            let side = match shared.streams_open(Side::Local) {
                true => Side::Remote,
                false => Side::Local,
            };
            return Err(Failure::timeout().of(side));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Events of a database were missed: all of it is to be compared, what was compared so far as well, since
/// it may have changed unseen. Inside a call.
pub(crate) fn missed(c: &rusqlite::Connection, db: &str, why: &str) -> rusqlite::Result<()> {
    walks::forget(c, db)?;
    store::set_meta(c, &reconcile_name(db), why)
}

/// Asks for a reconcile of a database, unless one is asked for already.
pub async fn ask(shared: &Shared, db: &str, why: &'static str) -> Result<(), Failure> {
    let flag = reconcile_name(db);
    let asked = shared
        .store
        .call(move |c| match store::get_meta::<String>(c, &flag)? {
            Some(_) => Ok(()),
            None => store::set_meta(c, &flag, why),
        });
    asked.await.map_err(store_failed)
}

/// Asks for a reconcile of every database because a person wants it; what is asked for then, and why.
pub(crate) async fn ask_now(
    shared: &Shared,
    exact: bool,
) -> Result<Vec<(String, String)>, Failure> {
    for db in &shared.settings().config.databases {
        let flag = reconcile_name(db);
        let asking = shared
            .store
            .call(move |c| match store::get_meta::<String>(c, &flag)? {
                Some(why) if !exact || reads_all(&why) => Ok(()),
                _ => store::set_meta(c, &flag, if exact { ASKED_EXACTLY } else { ASKED }),
            });
        asking.await.map_err(store_failed)?;
    }
    asked(shared).await
}

/// Whether a comparison for that reason reads every document: where events were missed for certain, a
/// hash is not enough.
fn reads_all(why: &str) -> bool {
    ![SCHEDULED, ASKED, "a halt was lifted", selection::CHANGED].contains(&why)
}

async fn asked(shared: &Shared) -> Result<Vec<(String, String)>, Failure> {
    let databases = shared.settings().config.databases.clone();
    let found = shared.store.call(move |c| {
        let mut asked = Vec::new();
        for db in databases {
            if let Some(why) = store::get_meta::<String>(c, &reconcile_name(&db))? {
                asked.push((db, why));
            }
        }
        Ok(asked)
    });
    found.await.map_err(store_failed)
}

async fn due(shared: &Shared, every: Duration) -> Result<bool, Failure> {
    if every.is_zero() {
        return Ok(false);
    }
    let last: Option<i64> = shared
        .store
        .get_meta("last_reconcile")
        .await
        .map_err(store_failed)?;
    let every = i64::try_from(every.as_millis()).unwrap_or(i64::MAX);
    Ok(last.is_some_and(|last| Utc::now().timestamp_millis().saturating_sub(last) > every))
}

/// Compares the databases that ask for it and waits until what differed is settled.
pub async fn reconcile(
    shared: &Arc<Shared>,
    trigger: Trigger,
    asked: &[(String, String)],
) -> Result<SyncRun, Failure> {
    let Some(before) = shared.runs.begin(trigger, vec![]) else {
        return Err(Failure::from_code(0, "a run is at work"));
    };
    let outcome = async {
        if let Some(run) = before {
            shared
                .store
                .call(move |c| runs::record(c, &run))
                .await
                .map_err(store_failed)?;
        }
        compare_all(shared, asked).await
    }
    .await;
    if let Err(failure) = &outcome {
        shared.runs.error(failure.to_string());
    }
    let status = if outcome.is_ok() {
        RunStatus::Completed
    } else {
        RunStatus::Failed
    };
    let run = shared
        .runs
        .end(status)
        .unwrap_or_else(|| unreachable!("the run was begun above"));
    let record = run.clone();
    shared
        .store
        .call(move |c| runs::record(c, &record))
        .await
        .map_err(store_failed)?;
    outcome.map(|()| run)
}

/// The same inside a run that is at work already: what was asked for is compared now.
pub async fn settle_asked(shared: &Arc<Shared>) -> Result<(), Failure> {
    let asked = asked(shared).await?;
    compare_all(shared, &asked).await
}

async fn compare_all(shared: &Arc<Shared>, asked: &[(String, String)]) -> Result<(), Failure> {
    let outcome = async {
        capturing(shared).await?;
        let selection = shared.store.call(selection::kept).await;
        let selection = selection.map_err(store_failed)?;
        let mut compared = Vec::new();
        let first = asked.iter().any(|(_, why)| why == FIRST_SYNC);
        *lock(&shared.progress) = Some(Meter::new(if first { "first_sync" } else { "reconcile" }));
        shared.failpoints.stall("comparing").await;
        crate::schema::before_data(shared).await?;
        for (db, why) in asked {
            tracing::info!(db, why, "comparing both databases");
            let began = pass::compare(shared, db, why).await?;
            compared.push((db.clone(), why.clone(), began));
        }
        let seq = shared
            .store
            .call(queue::last_seq)
            .await
            .map_err(store_failed)?;
        drained(shared, seq, &[]).await?;
        // Only now is the request safe to forget: the queue holds what is left.
        let now = Utc::now().timestamp_millis();
        let cleared = shared.store.call(move |c| {
            for (db, why, began) in &compared {
                if !walks::is_valid(c, db, why, *began)? {
                    // Events were missed meanwhile: once more, from the beginning.
                    return Ok(());
                }
                pass::forget(c, db)?;
                if selection::compared(c, (db, why), selection.as_ref())? {
                    c.execute(
                        "DELETE FROM meta WHERE k = ? AND v = ?",
                        [&reconcile_name(db), why],
                    )?;
                }
            }
            if let Some(began) = compared.iter().map(|(_, _, began)| *began).min() {
                store::set_meta(c, "compared_from", began)?;
            }
            loss::forget_confirmed(c)?;
            store::set_meta(c, "last_reconcile", now)
        });
        cleared.await.map_err(store_failed)
    }
    .await;
    *lock(&shared.progress) = None;
    outcome?;
    // What is left has been decided as a first sync.
    lock(&shared.first_sync).clear();
    lock(&shared.comparing).clear();
    pass::load(shared).await.map_err(store_failed)
}

/// Waits until nothing queued up to `seq` is ready any more; an outage ends the wait.
pub async fn drained(shared: &Arc<Shared>, seq: i64, only: &[u32]) -> Result<(), Failure> {
    shared.wake.notify_one();
    let mut local_seen = tokio::time::Instant::now();
    loop {
        let halted: Vec<u32> = lock(&shared.halted).all().iter().copied().collect();
        let only = only.to_vec();
        let left = shared
            .store
            .call(move |c| queue::ready_up_to(c, seq, (&only, &halted), MANY + 1))
            .await
            .map_err(store_failed)?;
        if left == 0 {
            return Ok(());
        }
        if shared.streams_open(Side::Local) {
            local_seen = tokio::time::Instant::now();
        } else if local_seen.elapsed() > LOCAL_AWAY {
            return Err(Failure::timeout().of(Side::Local));
        }
        if shared.paused.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(Failure::paused());
        }
        if !shared.may_work() {
            return Err(Failure::offline(
                shared
                    .link
                    .snapshot()
                    .reason
                    .unwrap_or(crate::failure::Reason::Offline),
            ));
        }
        tokio::select! {
            () = shared.cancel.cancelled() => return Err(Failure::offline(crate::failure::Reason::Offline)),
            () = tokio::time::sleep(Duration::from_millis(if left > u64::from(MANY) { 100 } else { 15 })) => {}
        }
    }
}

/// Names of the collections of a database that can be synced; views and time series are left out,
/// with one warning (R15).
pub async fn collections(
    shared: &Shared,
    settings: &Settings,
    side: Side,
    db: &str,
) -> Result<Vec<String>, Failure> {
    let endpoint = shared.endpoint(side)?;
    let command = doc! {"listCollections": 1, "nameOnly": false};
    let raw =
        bson::RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("listCollections"))?;
    let mut names = Vec::new();
    let mut left_out = Vec::new();
    endpoint
        .query(db, raw, |c| {
            let Ok(name) = c.get_str("name") else { return };
            if settings.is_synced(db, name) {
                if c.get_str("type").is_ok_and(|t| t == "collection") {
                    names.push(name.to_owned());
                } else {
                    left_out.push(name.to_owned());
                }
            }
        })
        .await?;
    for name in left_out {
        if lock(&shared.left_out).insert((db.to_owned(), name.clone())) {
            tracing::warn!(
                db,
                collection = name,
                "views and time series are not synced"
            );
        }
    }
    names.sort();
    Ok(names)
}
