//! Settling: what became of a batch goes into the store, a transaction a step (R2, R3).

use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;

use crate::batch::{self, Item, Planned, State};
use crate::config::Policy;
use crate::conflicts::{self, Found};
use crate::decide::{Kind, Side};
use crate::failure::{Class, Failure};
use crate::guard::{Form, Verdict};
use crate::key::Key;
use crate::metrics::Retried;
use crate::retry::delay_of_attempt;
use crate::shared::{Settings, Shared, lock};
use crate::store::base::{self, Intent};
use crate::store::queue::{self, Change, Row, Work};
use crate::store::records;

/// What is known of a document without a write.
pub(crate) enum Settlement {
    /// Both sides are equal; `base` is the new one, if it changes.
    Agreed {
        work: Work,
        base: Option<Option<Vec<u8>>>,
        /// Both sides were read, so a conflict of this key is over.
        close: bool,
        stamp: bool,
    },
    /// A clash waits for a person.
    Held { work: Work, found: Box<Found> },
    /// A write that may have happened did.
    Landed {
        work: Work,
        intent: Intent,
        /// The side that has let go of it by itself since (R15).
        left: Option<Side>,
    },
    /// It did not, and can't any more, or somebody has written since: what stands there now.
    NotLanded { key: Key, now: Option<Vec<u8>> },
    /// It may still happen.
    Deferred { work: Work, wait: Duration },
}

impl Settlement {
    /// One side let go of the document by itself; base stays.
    pub(crate) fn left(work: &Work) -> Self {
        Self::Agreed {
            work: work.claim_only(),
            base: None,
            close: false,
            stamp: false,
        }
    }
}

/// The store failing is ours, not a side's. A full disk is waited out (R22); anything else ends the
/// process, and the next start looks at the file.
pub(crate) fn store_failed(e: crate::store::StoreError) -> Failure {
    let mut failure = Failure::fatal(e.to_string());
    if e.is_disk() {
        failure.class = Class::Transient;
    }
    failure
}

/// Stores settlements, all in one transaction.
pub(crate) async fn commit(
    shared: &Arc<Shared>,
    settlements: Vec<Settlement>,
) -> Result<(), Failure> {
    if settlements.is_empty() {
        return Ok(());
    }
    let now = Utc::now().timestamp_millis();
    let no_seq = shared.failpoints.mutated("clear_noseq");
    let held: Vec<(String, Kind)> = shared
        .store
        .call(move |c| {
            let mut new_conflicts = Vec::new();
            let any_open = records::any_open(c)?;
            for settlement in &settlements {
                match settlement {
                    Settlement::Agreed {
                        work,
                        base,
                        close,
                        stamp,
                    } => {
                        if let Some(content) = base {
                            base::put(c, &work.key, content.as_deref())?;
                        }
                        if !*close && records::open_conflict(c, &work.key)?.is_some() {
                            // Only a look at both sides can tell that the conflict is over.
                            let change = Change {
                                key: work.key.clone(),
                                id: work.id.clone(),
                                hint: None,
                            };
                            queue::enqueue(c, Side::Remote, &[change], now)?;
                        }
                        remove_rows(c, work, no_seq)?;
                        if *close && any_open {
                            conflicts::close_if_open(c, &work.key)?;
                        }
                        if *stamp {
                            records::put_stamp(c, &work.key, &work.id)?;
                        }
                    }
                    Settlement::Held { work, found } => {
                        if conflicts::open(c, found, work)? {
                            new_conflicts.push((found.collection.clone(), found.kind));
                        }
                    }
                    Settlement::Landed { work, intent, left } => {
                        base::put(c, &work.key, intent.base_after.as_deref())?;
                        if left.is_some() {
                            base::mark_left(c, &work.key, *left)?;
                        }
                        base::drop_intent(c, &work.key)?;
                        conflicts::overruled(c, &work.key)?;
                        // Nobody knows which events of it are still owed, nor whether the stamp was lost.
                        records::put_stamp(c, &work.key, &work.id)?;
                    }
                    Settlement::NotLanded { key, now } => {
                        base::drop_intent(c, key)?;
                        conflicts::perhaps_overruled(c, key, now.as_deref())?;
                    }
                    Settlement::Deferred { work, wait } => {
                        let until = now + i64::try_from(wait.as_millis()).unwrap_or(i64::MAX / 2);
                        for side in [Side::Local, Side::Remote] {
                            queue::defer(
                                c,
                                side,
                                &work.key,
                                until,
                                false,
                                Some("waits until a lost answer can't matter any more"),
                            )?;
                        }
                    }
                }
            }
            Ok(new_conflicts)
        })
        .await
        .map_err(store_failed)?;
    count_conflicts(shared, held);
    shared.stamp.notify_one();
    Ok(())
}

fn count_conflicts(shared: &Shared, found: Vec<(String, Kind)>) {
    for (collection, kind) in found {
        shared.runs.conflict(&collection);
        shared.metrics.conflict(kind);
    }
}

fn remove_rows(c: &rusqlite::Connection, work: &Work, no_seq: bool) -> rusqlite::Result<()> {
    if no_seq {
        // The mutation `clear_noseq`: a key made dirty again in flight is forgotten.
        for table in ["outbox", "inbox"] {
            c.execute(
                &format!("DELETE FROM {table} WHERE key = ?"),
                [work.key.as_bytes()],
            )?;
        }
        return Ok(());
    }
    for (side, row) in [(Side::Local, &work.outbox), (Side::Remote, &work.inbox)] {
        if let Some(row) = row {
            queue::remove(c, side, &work.key, row.seq)?;
        }
    }
    Ok(())
}

/// What a write of a batch may leave behind: its intent, and the record of the clash it settles.
struct Ahead {
    key: Key,
    intent: Intent,
    /// The record, and the digest of what the write replaces.
    overruled: Option<(Vec<u8>, Option<[u8; 32]>)>,
}

/// Stores the intents of a batch before its first write (R3), and the records of the clashes that
/// these writes settle (R21).
pub(crate) async fn put_intents(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &[Item],
    planned: impl Iterator<Item = &Planned>,
) -> Result<(), Failure> {
    let epoch = shared.store.epoch();
    let updated_at = &settings.config.fields.updated_at;
    let base_first = shared.failpoints.mutated("base_first");
    let no_intent = shared.failpoints.mutated("no_intent");
    let ahead: Vec<Ahead> = planned
        .map(|p| Ahead {
            key: p.write.key.clone(),
            intent: p.intent(epoch, updated_at),
            overruled: p.clash.as_ref().map(|clash| {
                let item = &items[p.item];
                let strategy = policy_name(settings.policy(&item.ns.coll), clash.kind);
                let found = batch::overruled(item, clash);
                let record = conflicts::settled_by_policy(&found, strategy, p.write.new.as_deref());
                (record, p.write.expect.as_deref().map(base::digest))
            }),
        })
        .collect();
    shared
        .store
        .call(move |c| {
            let stale = records::any_overruled(c)?;
            for Ahead {
                key,
                intent,
                overruled,
            } in &ahead
            {
                if base_first {
                    base::put(c, key, intent.base_after.as_deref())?;
                }
                if !no_intent {
                    base::put_intent(c, key, intent)?;
                }
                match overruled {
                    Some((record, gone)) => records::put_overruled(c, key, record, gone.as_ref())?,
                    None if stale => drop(records::take_overruled(c, key)?),
                    None => {}
                }
            }
            Ok(())
        })
        .await
        .map_err(store_failed)
}

/// Name of what settled a clash, in its record.
fn policy_name(policy: Policy, kind: Kind) -> &'static str {
    match policy {
        Policy::Manual if kind == Kind::DeleteUpdate => "keep_update",
        // Without a person only a first sync goes by the clock.
        Policy::Manual | Policy::NewestWins => "newest_wins",
        Policy::LocalWins => "local_wins",
        Policy::RemoteWins => "remote_wins",
    }
}

/// One verdict with all that its settlement needs, free of borrows.
struct Settled {
    work: Work,
    planned: Planned,
    /// The new base as the store keeps it, if the write was done.
    base: Option<Vec<u8>>,
    verdict: Verdict,
    /// Somebody else's insert was taken for the echo of this one, which failed.
    missed: bool,
    /// Collection and kind of the clash that it settled.
    overruled: Option<(String, Kind)>,
    rejected: Option<Found>,
}

impl Settled {
    /// A change that asks for a look at the document.
    fn look(&self) -> Change {
        Change {
            key: self.planned.write.key.clone(),
            id: self.work.id.clone(),
            hint: None,
        }
    }
}

/// Stores what became of the writes of one side and collection, and moves the items on.
pub(crate) async fn verdicts(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &mut [Item],
    group: Vec<Planned>,
    verdicts: Vec<Verdict>,
) -> Result<(), Failure> {
    let epoch = shared.store.epoch();
    let updated_at = settings.config.fields.updated_at.as_str();
    let max_retries = settings.config.sync.max_retries;
    let mut settled = Vec::with_capacity(group.len());
    let mut indexes = Vec::with_capacity(group.len());
    let mut losses = Vec::new();
    let now = Utc::now().timestamp_millis();
    for (planned, verdict) in group.into_iter().zip(verdicts) {
        let item = &mut items[planned.item];
        indexes.push(planned.item);
        let mut overruled = None;
        let mut refused = None;
        let mut base = None;
        item.state = match &verdict {
            Verdict::Done => {
                let bytes = planned.write.new.as_ref().map_or(0, Vec::len);
                shared.runs.moved(planned.side, &item.ns.shown, bytes);
                match (&planned.write.expect, &planned.write.new) {
                    (_, None) => {
                        losses.push((Some(planned.side.other()), planned.write.key.clone()));
                    }
                    (None, _) => losses.push((None, planned.write.key.clone())),
                    _ => {}
                }
                let row = match planned.side {
                    Side::Remote => &item.work.outbox,
                    Side::Local => &item.work.inbox,
                };
                let waited = row.as_ref().map_or(0, |r| now - r.at);
                shared.metrics.moved(planned.side, bytes, waited);
                lock(&shared.activity).insert(item.ns.shown.clone(), now);
                let clash = planned.clash.as_ref();
                overruled = clash.map(|clash| (item.ns.shown.clone(), clash.kind));
                let dictionaries = shared.store.dictionaries();
                let ns = planned.write.key.ns();
                let after = planned.base_after.as_deref();
                base = after.map(|content| dictionaries.encode(ns, content));
                if planned.last {
                    State::Done
                } else {
                    item.work.base.clone_from(&planned.base_after);
                    State::Look
                }
            }
            Verdict::Modified => State::Look,
            Verdict::Duplicate(dup) => State::Clash(Box::new((
                planned.side,
                planned.write.clone(),
                (**dup).clone(),
            ))),
            Verdict::Rejected { code, message } => {
                shared.metrics.retried(Retried::Document);
                refused = Some(batch::rejected(item, planned.side, *code, message));
                State::Done
            }
            Verdict::Unknown { late } => {
                item.work.intent = Some(planned.intent(epoch, updated_at));
                if *late {
                    shared.set_late(&item.work.key);
                    State::Done
                } else {
                    State::Look
                }
            }
        };
        let missed = planned.form == Form::Insert
            && shared
                .echoes
                .settled(planned.side, &planned.write.key, verdict == Verdict::Done);
        settled.push(Settled {
            work: item.work.claim_only(),
            planned,
            base,
            verdict,
            missed,
            overruled,
            rejected: refused,
        });
    }
    let retry = settings.config.retry.clone();
    let stamping = settings.config.sync.stamp_documents;
    let no_seq = shared.failpoints.mutated("clear_noseq");
    let (rows, conflicts) = shared
        .store
        .call(move |c| {
            let mut rows = Vec::with_capacity(settled.len());
            let mut conflicts = Vec::new();
            let any_open = records::any_open(c)?;
            for s in &settled {
                rows.push(None);
                let key = &s.planned.write.key;
                if s.missed {
                    let now = Utc::now().timestamp_millis();
                    queue::enqueue(c, s.planned.side, &[s.look()], now)?;
                }
                match &s.verdict {
                    Verdict::Done => {
                        done(c, s, stamping, no_seq)?;
                        if s.planned.last && any_open {
                            conflicts::close_if_open(c, key)?;
                        }
                        conflicts.extend(s.overruled.clone());
                        if !s.planned.last {
                            let now = Utc::now().timestamp_millis();
                            queue::enqueue(c, Side::Remote, &[s.look()], now)?;
                            *rows.last_mut().expect("pushed above") =
                                queue::get_row(c, Side::Remote, key)?;
                        }
                    }
                    Verdict::Modified => not_done(c, key)?,
                    // It may yet be done, in a transaction; its record waits for that.
                    Verdict::Duplicate(_) => base::drop_intent(c, key)?,
                    Verdict::Rejected { message, .. } => {
                        not_done(c, key)?;
                        conflicts.extend(refuse(c, s, message, max_retries, &retry)?);
                    }
                    Verdict::Unknown { .. } => {}
                }
            }
            Ok((rows, conflicts))
        })
        .await
        .map_err(store_failed)?;
    if !losses.is_empty() {
        let mut counted = lock(&shared.losses);
        for (deleted_on, key) in &losses {
            match deleted_on {
                Some(side) => counted.deleted(*side, key),
                None => counted.created(key),
            }
        }
    }
    for (index, row) in indexes.into_iter().zip(rows) {
        if row.is_some() {
            items[index].work.inbox = row;
        }
    }
    count_conflicts(shared, conflicts);
    if stamping {
        shared.stamp.notify_one();
    }
    Ok(())
}

/// The server said that it did not write.
fn not_done(c: &rusqlite::Connection, key: &Key) -> rusqlite::Result<()> {
    base::drop_intent(c, key)?;
    records::take_overruled(c, key).map(drop)
}

fn done(
    c: &rusqlite::Connection,
    s: &Settled,
    stamping: bool,
    no_seq: bool,
) -> rusqlite::Result<()> {
    let p = &s.planned;
    let key = &p.write.key;
    base::put_encoded(c, key, s.base.as_deref())?;
    base::drop_intent(c, key)?;
    conflicts::overruled(c, key)?;
    if p.last {
        remove_rows(c, &s.work, no_seq)?;
        if stamping && p.side == Side::Remote {
            records::put_stamp(c, key, &s.work.id)?;
        }
    }
    Ok(())
}

/// A refused document: tried again a few times, then parked with its reason (R19).
fn refuse(
    c: &rusqlite::Connection,
    s: &Settled,
    message: &str,
    max_retries: u32,
    retry: &crate::config::RetryConfig,
) -> rusqlite::Result<Option<(String, Kind)>> {
    let attempts = s
        .work
        .outbox
        .as_ref()
        .or(s.work.inbox.as_ref())
        .map_or(0, |r: &Row| r.attempts)
        + 1;
    if attempts < max_retries.max(1) {
        let delay =
            i64::try_from(delay_of_attempt(retry, attempts).as_millis()).unwrap_or(i64::MAX / 2);
        let due = Utc::now().timestamp_millis() + delay;
        for (side, row) in [(Side::Local, &s.work.outbox), (Side::Remote, &s.work.inbox)] {
            if row.is_some() {
                queue::defer(c, side, &s.work.key, due, true, Some(message))?;
            }
        }
        return Ok(None);
    }
    let Some(found) = &s.rejected else {
        return Ok(None);
    };
    let is_new = conflicts::open(c, found, &s.work)?;
    conflicts::hold(c, &s.work, "failed", &found.notes)?;
    Ok(is_new.then(|| (found.collection.clone(), found.kind)))
}

/// Puts back what has to wait for whoever holds the lease. The longer it has waited, the longer it is
/// left alone: each look reads both sides.
pub(crate) async fn withhold(shared: &Arc<Shared>, left: Vec<Work>) -> Result<(), Failure> {
    defer_all(shared, left, |now, row| {
        ((now - row.at) / 4).clamp(1_000, 60_000)
    })
    .await
}

/// Puts back what a batch could not finish; it is looked at again after `wait`.
pub(crate) async fn put_back(
    shared: &Arc<Shared>,
    left: Vec<Work>,
    wait: Duration,
) -> Result<(), Failure> {
    let wait = i64::try_from(wait.as_millis()).unwrap_or(0);
    defer_all(shared, left, move |_, _| wait).await
}

/// Puts rows off, each for as many ms as `wait` says of the time now and the row.
async fn defer_all(
    shared: &Arc<Shared>,
    left: Vec<Work>,
    wait: impl Fn(i64, &Row) -> i64 + Send + 'static,
) -> Result<(), Failure> {
    if left.is_empty() {
        return Ok(());
    }
    let now = Utc::now().timestamp_millis();
    let deferring = shared.store.call(move |c| {
        for work in &left {
            for (side, row) in [(Side::Local, &work.outbox), (Side::Remote, &work.inbox)] {
                if let Some(row) = row {
                    queue::defer(c, side, &work.key, now + wait(now, row), false, None)?;
                }
            }
        }
        Ok(())
    });
    deferring.await.map_err(store_failed)
}
