//! Reconcile: compares the two databases whole, against base, and queues what differs.
//!
//! Both sides are read in the order of `_id`, in ranges that the local side's documents set (`min` and
//! `max` on the `_id` index, so that all types of `_id` are covered and the server's order is nobody
//! else's business). Memory is bounded by the range. Equal documents that no base knew become base
//! without a write; what differs goes into outbox and inbox, and the worker decides it. So "missing"
//! is never read as "deleted" without a base (R11). The first sync is the same thing with no base.

mod vanished;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bson::doc;
use chrono::Utc;

use crate::command::{RunStatus, SyncRun, Trigger};
use crate::content::strip;
use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::key::{Id, Key};
use crate::progress::Meter;
use crate::raw::Writer;
use crate::runs;
use crate::settle::store_failed;
use crate::shared::{Settings, Shared, lock};
use crate::side::Endpoint;
use crate::store::queue::{self, Change};
use crate::store::{self, base};
use crate::tail::reconcile_name;
use crate::{adopt, loss};

/// Documents of a range.
const RANGE: usize = 1000;

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
        if degraded || !shared.may_work() || !streams_ready(&shared) {
            continue;
        }
        if adopt::is_under_way(&shared).await? && !shared.runs.is_owned() {
            match adopt::go_on(&shared, Trigger::Startup).await {
                Ok(_) => {}
                Err(failure) if failure.class == Class::Fatal => return Err(failure),
                Err(failure) => {
                    tracing::warn!(%failure, "adopting was interrupted; it goes on when the link is back");
                    continue;
                }
            }
        }
        if due(&shared, every).await? {
            for db in &shared.settings().config.databases {
                ask(&shared, db, "scheduled").await?;
            }
        }
        let asked = asked(&shared).await?;
        if asked.is_empty() || shared.runs.is_owned() || shared.adopting.load(Ordering::Acquire) {
            continue;
        }
        let first = asked.iter().any(|(_, why)| why == "first sync");
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
        let began = Utc::now().timestamp_millis() + shared.offset(Side::Remote);
        let first = asked.iter().any(|(_, why)| why == "first sync");
        *lock(&shared.progress) = Some(Meter::new(if first { "first_sync" } else { "reconcile" }));
        for (db, why) in asked {
            tracing::info!(db, why, "comparing both databases");
            compare(shared, db).await?;
        }
        let seq = shared
            .store
            .call(queue::last_seq)
            .await
            .map_err(store_failed)?;
        drained(shared, seq, &[]).await?;
        // Only now is the request safe to forget: the queue holds what is left.
        let asked = asked.to_vec();
        let now = Utc::now().timestamp_millis();
        let cleared = shared.store.call(move |c| {
            for (db, why) in &asked {
                c.execute(
                    "DELETE FROM meta WHERE k = ? AND v = ?",
                    [&reconcile_name(db), why],
                )?;
            }
            loss::forget_confirmed(c)?;
            store::set_meta(c, "compared_from", began)?;
            store::set_meta(c, "last_reconcile", now)
        });
        cleared.await.map_err(store_failed)
    }
    .await;
    *lock(&shared.progress) = None;
    *lock(&shared.touched) = None;
    if outcome.is_ok() {
        lock(&shared.comparing).clear();
    }
    outcome
}

/// Waits until nothing queued up to `seq` is ready any more; an outage ends the wait.
pub async fn drained(shared: &Arc<Shared>, seq: i64, only: &[u32]) -> Result<(), Failure> {
    shared.wake.notify_one();
    loop {
        let halted: Vec<u32> = lock(&shared.halted).iter().copied().collect();
        let only = only.to_vec();
        let left = shared
            .store
            .call(move |c| queue::ready_up_to(c, seq, &only, &halted))
            .await
            .map_err(store_failed)?;
        if left == 0 {
            return Ok(());
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
            () = tokio::time::sleep(Duration::from_millis(if left > 2000 { 100 } else { 15 })) => {}
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

async fn compare(shared: &Arc<Shared>, db: &str) -> Result<(), Failure> {
    let settings = shared.settings();
    let mut names = collections(shared, &settings, Side::Local, db).await?;
    let there = collections(shared, &settings, Side::Remote, db).await?;
    loss::before_comparison(shared, &settings, db, [&names, &there]).await?;
    names.extend(there);
    names.sort();
    names.dedup();
    let mut numbers = Vec::new();
    for name in &names {
        let counted = shared.local.run_doc(db, doc! {"count": name}).await?;
        let total = u64::try_from(counted.get_i32("n").unwrap_or(0)).unwrap_or(0);
        let open = |m: &mut Meter| m.open(settings.display(db, name), total, 0, 0);
        numbers.push(lock(&shared.progress).as_mut().map_or(0, open));
    }
    for (coll, number) in names.iter().zip(numbers) {
        let ns = shared
            .store
            .namespace(db, coll)
            .await
            .map_err(store_failed)?;
        if lock(&shared.halted).contains(&ns) {
            continue;
        }
        let mut pass = Pass {
            shared,
            settings: &settings,
            db,
            coll,
            ns,
            seen: 0,
            bytes: 0,
            keys: Default::default(),
        };
        lock(&shared.comparing).insert(ns);
        let mut from = None;
        loop {
            *lock(&shared.touched) = Some(Default::default());
            let before = (pass.seen, pass.bytes);
            let next = pass.range(from.as_ref()).await?;
            if let Some(meter) = lock(&shared.progress).as_mut() {
                meter.add(number, pass.seen - before.0, pass.bytes - before.1);
            }
            match next {
                Some(id) => from = Some(id),
                None => break,
            }
        }
        if let Some(meter) = lock(&shared.progress).as_mut() {
            meter.finish(number);
        }
        vanished::queue(shared, ns, pass.keys).await?;
        lock(&shared.comparing).remove(&ns);
    }
    Ok(())
}

/// One collection being compared.
struct Pass<'a> {
    shared: &'a Arc<Shared>,
    settings: &'a Settings,
    db: &'a str,
    coll: &'a str,
    ns: u32,
    /// Documents compared.
    seen: u64,
    /// Bytes of both sides' documents.
    bytes: u64,
    /// Their keys, as hashes: 8 bytes a document.
    keys: HashSet<u64>,
}

type Pair = (Id, Option<Vec<u8>>, Option<Vec<u8>>);

impl Pass<'_> {
    /// Compares from one `_id` to the next bound, which it returns; `None` at the end.
    async fn range(&mut self, from: Option<&Id>) -> Result<Option<Id>, Failure> {
        let mut local: HashMap<Key, (Id, Vec<u8>)> = HashMap::new();
        let mut bound = None;
        let mut rows = self
            .scan(&self.shared.local, from, None, Some(RANGE + 1))
            .await?;
        while let Some(d) = rows.next().await? {
            let Some(id) = Id::of(d.as_bytes()) else {
                continue;
            };
            if local.len() == RANGE {
                bound = Some(id);
                break;
            }
            local.insert(Key::new(self.ns, &id), (id, d.into_bytes()));
        }
        let remote = self.shared.endpoint(Side::Remote)?;
        let rows = self.scan(&remote, from, bound.as_ref(), None).await;
        self.shared.note(Side::Remote, &rows);
        let mut rows = rows?;
        let mut pairs: Vec<Pair> = Vec::new();
        loop {
            let next = rows.next().await;
            self.shared.note(Side::Remote, &next);
            let Some(d) = next? else { break };
            let Some(id) = Id::of(d.as_bytes()) else {
                continue;
            };
            let here = local.remove(&Key::new(self.ns, &id)).map(|(_, d)| d);
            pairs.push((id, here, Some(d.into_bytes())));
            if pairs.len() >= RANGE {
                self.settle(std::mem::take(&mut pairs)).await?;
                // The documents of the local range stay valid: a change since has its event.
            }
        }
        pairs.extend(local.into_values().map(|(id, d)| (id, Some(d), None)));
        self.settle(pairs).await?;
        Ok(bound)
    }

    async fn scan(
        &self,
        endpoint: &Arc<Endpoint>,
        from: Option<&Id>,
        to: Option<&Id>,
        limit: Option<usize>,
    ) -> Result<crate::side::Rows, Failure> {
        let mut w = Writer::new();
        w.str("find", self.coll)
            .open("filter")
            .close()
            .open("hint")
            .i32("_id", 1)
            .close();
        for (name, id) in [("min", from), ("max", to)] {
            if let Some(id) = id {
                w.open(name).value("_id", id.kind, &id.value).close();
            }
        }
        if let Some(limit) = limit {
            w.i32("limit", i32::try_from(limit).unwrap_or(i32::MAX));
        }
        w.open("readConcern").str("level", "majority").close();
        endpoint.cursor(self.db, w.command()).await
    }

    /// Puts pairs into base or queue, in one transaction.
    async fn settle(&mut self, pairs: Vec<Pair>) -> Result<(), Failure> {
        if pairs.is_empty() {
            return Ok(());
        }
        self.seen += pairs.len() as u64;
        let bodies = pairs.iter().flat_map(|(_, l, r)| [l, r]).flatten();
        self.bytes += bodies.map(|d| d.len() as u64).sum::<u64>();
        let keys = pairs
            .iter()
            .map(|(id, _, _)| vanished::hash(&Key::new(self.ns, id)));
        self.keys.extend(keys);
        let ns = self.ns;
        let fields = self.settings.sync_fields.clone();
        let shared = self.shared.clone();
        let any = self.shared.store.call(move |c| {
            let mut changed = [Vec::new(), Vec::new()];
            let now = Utc::now().timestamp_millis();
            for (id, local, remote) in pairs {
                let key = Key::new(ns, &id);
                let local = local.as_deref().map(|d| strip(d, &fields));
                let remote = remote.as_deref().map(|d| strip(d, &fields));
                let base = base::get(c, &key)?;
                if local == base.as_deref().map(std::borrow::Cow::Borrowed) && local == remote {
                    continue;
                }
                let untouched = base.is_none()
                    && !lock(&shared.busy).contains(&key)
                    && lock(&shared.touched)
                        .as_ref()
                        .is_some_and(|t| !t.contains(&key))
                    && queue::get_row(c, Side::Local, &key)?.is_none()
                    && queue::get_row(c, Side::Remote, &key)?.is_none()
                    && base::get_intent(c, &key)?.is_none();
                if untouched && local == remote {
                    base::put(c, &key, local.as_deref())?;
                    continue;
                }
                let base = base.as_deref();
                for (side, there) in [(Side::Local, &local), (Side::Remote, &remote)] {
                    if there.as_deref() != base {
                        changed[side as usize].push(Change {
                            key: key.clone(),
                            id: id.clone(),
                            hint: there.is_none().then(|| queue::LOOK_GONE.to_vec()),
                        });
                    }
                }
            }
            queue::enqueue(c, Side::Local, &changed[0], now)?;
            queue::enqueue(c, Side::Remote, &changed[1], now)?;
            Ok(!(changed[0].is_empty() && changed[1].is_empty()))
        });
        if any.await.map_err(store_failed)? {
            self.shared.wake.notify_one();
        }
        Ok(())
    }
}
