//! Settling: what became of a batch goes into the store, a transaction a step (R2, R3).

use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;

use crate::batch::{self, Item, Planned, State, Then};
use crate::config::Policy;
use crate::conflicts::{self, Found};
use crate::decide::{Kind, Side};
use crate::echo;
use crate::failure::{Class, Failure};
use crate::guard::Verdict;
use crate::key::Key;
use crate::metrics::Retried;
use crate::moved::Moved;
use crate::retry::delay_of_attempt;
use crate::shared::{Settings, Shared, lock};
use crate::store::base;
use crate::store::intents::{self, Intent, Kept};
use crate::store::queue::{self, Change, Row, Work};
use crate::store::records;
use crate::store::sent::{self, Ticket};

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
                        work, close, stamp, ..
                    } => {
                        if any_open && !*close && records::open_conflict(c, &work.key)?.is_some() {
                            // Only a look at both sides can tell that the conflict is over.
                            let change = Change {
                                key: work.key.clone(),
                                id: work.id.clone(),
                                hint: None,
                            };
                            queue::enqueue(c, Side::Remote, &[change], now)?;
                        }
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
                        intents::forget(c, &work.key)?;
                        conflicts::overruled(c, &work.key)?;
                        // Nobody knows which events of it are still owed, nor whether the stamp was lost.
                        records::put_stamp(c, &work.key, &work.id)?;
                    }
                    Settlement::NotLanded { key, now } => {
                        intents::forget(c, key)?;
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
            // Last: what landed may have been edited since, the same on both sides.
            agreed(c, &settlements, no_seq)?;
            Ok(new_conflicts)
        })
        .await
        .map_err(store_failed)?;
    count_conflicts(shared, held);
    shared.stamp.notify_one();
    Ok(())
}

/// Where both sides are equal, base follows, and the rows leave.
fn agreed(
    c: &rusqlite::Connection,
    settlements: &[Settlement],
    no_seq: bool,
) -> rusqlite::Result<()> {
    let agreed = settlements.iter().filter_map(|s| match s {
        Settlement::Agreed { work, base, .. } => Some((work, base)),
        _ => None,
    });
    for (work, base) in agreed.clone() {
        if let Some(content) = base {
            base::put(c, &work.key, content.as_deref())?;
        }
    }
    remove_rows(c, agreed.map(|(work, _)| work.rows()), no_seq)
}

fn count_conflicts(shared: &Shared, found: Vec<(String, Kind)>) {
    for (collection, kind) in found {
        shared.runs.conflict(&collection);
        shared.metrics.conflict(kind);
    }
}

/// A document's rows in the outbox and in the inbox.
type Rows<'a> = (&'a Key, (Option<&'a Row>, Option<&'a Row>));

fn remove_rows<'a>(
    c: &rusqlite::Connection,
    rows: impl Iterator<Item = Rows<'a>>,
    no_seq: bool,
) -> rusqlite::Result<()> {
    let (mut local, mut remote) = (Vec::new(), Vec::new());
    for (key, (outbox, inbox)) in rows {
        if no_seq {
            // The mutation `clear_noseq`: a key made dirty again in flight is forgotten.
            for of in [Side::Local, Side::Remote] {
                if let Some(row) = queue::get_row(c, of, key)? {
                    queue::remove(c, of, key, row.seq)?;
                }
            }
            continue;
        }
        local.extend(outbox.map(|row| (key, row)));
        remote.extend(inbox.map(|row| (key, row)));
    }
    queue::remove_all(c, Side::Local, &mut local)?;
    queue::remove_all(c, Side::Remote, &mut remote)
}

/// What a write of a batch may leave behind beside its intent.
struct Ahead {
    key: Key,
    /// The record of the clash it settles, and the digest of what the write replaces.
    overruled: Option<(Vec<u8>, Option<[u8; 32]>)>,
    /// The mutation `base_first`: what base becomes.
    base_first: Option<Option<Vec<u8>>>,
}

/// Stores the intents of a batch before its first write (R3), and the records of the clashes that
/// these writes settle (R21): those of each command in one row, whose ticket is the answer; those of
/// transactions in a row for each document, since their outcome may be open for long.
pub(crate) async fn put_intents(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &[Item],
    commands: &[Vec<Planned>],
    transactions: &[Vec<Planned>],
) -> Result<Vec<Option<Ticket>>, Failure> {
    let epoch = shared.store.epoch();
    let updated_at = &settings.config.fields.updated_at;
    let base_first = shared.failpoints.mutated("base_first");
    let no_intent = shared.failpoints.mutated("no_intent");
    let kept = |p: &Planned| {
        let base = items[p.item].work.base.as_deref();
        p.intent(epoch, updated_at).kept(base)
    };
    let packed: Vec<_> = commands
        .iter()
        .map(|command| {
            let kept: Vec<_> = command.iter().map(|p| (&p.write.key, kept(p))).collect();
            sent::pack(kept.iter().map(|(key, kept)| (*key, kept)))
        })
        .collect();
    let rows: Vec<_> = transactions
        .iter()
        .flatten()
        .map(|p| (p.write.key.clone(), kept(p)))
        .collect();
    let among = shared.store.sent().clone();
    let ahead: Vec<Ahead> = commands
        .iter()
        .chain(transactions)
        .flatten()
        .map(|p| Ahead {
            key: p.write.key.clone(),
            base_first: base_first.then(|| p.base_after().map(<[u8]>::to_vec)),
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
            let mut tickets = Vec::with_capacity(packed.len());
            for packed in &packed {
                let ticket = (!no_intent).then(|| sent::put(c, &among, packed));
                tickets.push(ticket.transpose()?);
            }
            if !no_intent {
                let rows: Vec<_> = rows.iter().map(|(key, kept)| (key, kept)).collect();
                intents::put_all(c, &rows)?;
            }
            for a in &ahead {
                if let Some(after) = &a.base_first {
                    base::put(c, &a.key, after.as_deref())?;
                }
                match &a.overruled {
                    Some((record, gone)) => {
                        records::put_overruled(c, &a.key, record, gone.as_ref())?;
                    }
                    None if stale => drop(records::take_overruled(c, &a.key)?),
                    None => {}
                }
            }
            Ok(tickets)
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
    /// Rows of the document as they were claimed.
    outbox: Option<Row>,
    inbox: Option<Row>,
    planned: Planned,
    /// The new base as the store keeps it, if the write was done.
    base: Option<Vec<u8>>,
    verdict: Verdict,
    /// Somebody else's insert was taken for the echo of this one, which failed.
    missed: bool,
    /// What stays of its intent, where it had no row of its own.
    open: Option<Kept>,
    /// Collection and kind of the clash that it settled.
    overruled: Option<(String, Kind)>,
    /// What is put on record of a document that is refused, and its claim.
    rejected: Option<Box<(Found, Work)>>,
}

impl Settled {
    /// What stays of its intent.
    fn open(&self) -> Option<(&Key, &Kept)> {
        Some((&self.planned.write.key, self.open.as_ref()?))
    }

    /// A change that asks for a look at the document.
    fn look(&self) -> Change {
        Change {
            key: self.planned.write.key.clone(),
            id: self.planned.write.id.clone(),
            hint: None,
        }
    }

    fn rows(&self) -> Rows<'_> {
        let rows = (self.outbox.as_ref(), self.inbox.as_ref());
        (&self.planned.write.key, rows)
    }
}

impl Work {
    fn rows(&self) -> Rows<'_> {
        (&self.key, (self.outbox.as_ref(), self.inbox.as_ref()))
    }
}

/// Stores what became of the writes of one side and collection, and moves the items on. With a ticket, all
/// their intents are in its row.
pub(crate) async fn verdicts(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &mut [Item],
    group: Vec<Planned>,
    verdicts: Vec<Verdict>,
    ticket: Option<Ticket>,
) -> Result<(), Failure> {
    let epoch = shared.store.epoch();
    let updated_at = settings.config.fields.updated_at.as_str();
    let max_retries = settings.config.sync.max_retries;
    let mut settled = Vec::with_capacity(group.len());
    let mut indexes = Vec::with_capacity(group.len());
    let (mut deleted, mut created) = (Vec::new(), Vec::new());
    let mut moved = Moved::default();
    let ns = group.first().map_or(0, |p| p.write.key.ns());
    let packer = shared.store.dictionaries().packer(ns);
    let now = Utc::now().timestamp_millis();
    for (planned, verdict) in group.into_iter().zip(verdicts) {
        let item = &mut items[planned.item];
        indexes.push(planned.item);
        let mut overruled = None;
        let mut refused = None;
        let mut base = None;
        let mut open = None;
        item.state = match &verdict {
            Verdict::Done => {
                let bytes = planned.write.new.as_ref().map_or(0, Vec::len);
                match (&planned.write.expect, &planned.write.new) {
                    (_, None) => {
                        deleted.push((planned.side.other(), planned.write.key.clone()));
                    }
                    (None, _) => created.push(planned.write.key.clone()),
                    _ => {}
                }
                let row = match planned.side {
                    Side::Remote => &item.work.outbox,
                    Side::Local => &item.work.inbox,
                };
                let waited = row.as_ref().map_or(0, |r| now - r.at);
                moved.add(planned.side, &item.ns, bytes, waited);
                let clash = planned.clash.as_ref();
                overruled = clash.map(|clash| (item.ns.shown.clone(), clash.kind));
                base = planned.base_after().map(|content| packer.encode(content));
                match &planned.then {
                    Then::Written => State::Done,
                    Then::Base(after) => {
                        item.work.base.clone_from(after);
                        State::Look
                    }
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
                let found = batch::rejected(item, planned.side, *code, message);
                refused = Some(Box::new((found, item.work.claim_only())));
                State::Done
            }
            Verdict::Unknown { late } => {
                let intent = planned.intent(epoch, updated_at);
                open = Some(intent.kept(item.work.base.as_deref()));
                item.work.intent = Some(intent);
                if *late {
                    shared.set_late(&item.work.key);
                    State::Done
                } else {
                    State::Look
                }
            }
        };
        let missed = echo::is_known(&planned.form)
            && shared
                .echoes
                .settled(planned.side, &planned.write.key, verdict == Verdict::Done);
        settled.push(Settled {
            outbox: item.work.outbox.clone(),
            inbox: item.work.inbox.clone(),
            planned,
            base,
            verdict,
            missed,
            open: open.filter(|_| ticket.is_some()),
            overruled,
            rejected: refused,
        });
    }
    moved.tell(shared, now);
    let retry = settings.config.retry.clone();
    let stamping = settings.config.sync.stamp_documents;
    let no_seq = shared.failpoints.mutated("clear_noseq");
    let row = ticket.as_ref().map(|ticket| ticket.n);
    let (rows, conflicts) = shared
        .store
        .call(move |c| {
            let mut rows = Vec::with_capacity(settled.len());
            let mut conflicts = Vec::new();
            let any_open = records::any_open(c)?;
            done(c, &settled, stamping, no_seq)?;
            match row {
                Some(row) => {
                    sent::answered(c, row)?;
                    let open = settled.iter().filter_map(Settled::open);
                    intents::put_all(c, &open.collect::<Vec<_>>())?;
                }
                None => intents::forget_all(c, &answered(&settled))?,
            }
            for s in &settled {
                rows.push(None);
                let key = &s.planned.write.key;
                if s.missed {
                    let now = Utc::now().timestamp_millis();
                    queue::enqueue(c, s.planned.side, &[s.look()], now)?;
                }
                match &s.verdict {
                    Verdict::Done => {
                        if s.planned.is_last() && any_open {
                            conflicts::close_if_open(c, key)?;
                        }
                        conflicts.extend(s.overruled.clone());
                        if !s.planned.is_last() {
                            let now = Utc::now().timestamp_millis();
                            queue::enqueue(c, Side::Remote, &[s.look()], now)?;
                            *rows.last_mut().expect("pushed above") =
                                queue::get_row(c, Side::Remote, key)?;
                        }
                    }
                    // The server said that it did not write.
                    Verdict::Modified => drop(records::take_overruled(c, key)?),
                    // It may yet be done, in a transaction; its record waits for that.
                    Verdict::Duplicate(_) => {}
                    Verdict::Rejected { message, .. } => {
                        records::take_overruled(c, key)?;
                        conflicts.extend(refuse(c, s, message, max_retries, &retry)?);
                    }
                    Verdict::Unknown { .. } => {}
                }
            }
            Ok((rows, conflicts))
        })
        .await
        .map_err(store_failed)?;
    if !deleted.is_empty() || !created.is_empty() {
        let mut counted = lock(&shared.losses);
        for (side, key) in &deleted {
            counted.deleted(*side, key);
        }
        counted.created(ns, created.iter());
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

/// Keys of the writes that the server has told what became of them.
fn answered(settled: &[Settled]) -> Vec<&Key> {
    let answered = |s: &&Settled| !matches!(s.verdict, Verdict::Unknown { .. });
    let keys = settled.iter().filter(answered);
    keys.map(|s| &s.planned.write.key).collect()
}

/// What was written is base now, and leaves the queues.
fn done(
    c: &rusqlite::Connection,
    settled: &[Settled],
    stamping: bool,
    no_seq: bool,
) -> rusqlite::Result<()> {
    let done = || settled.iter().filter(|s| s.verdict == Verdict::Done);
    let bases = done().filter_map(|s| Some((&s.planned.write.key, s.base.as_deref()?)));
    base::put_all_encoded(c, &bases.collect::<Vec<_>>())?;
    for s in done().filter(|s| s.base.is_none()) {
        base::put_encoded(c, &s.planned.write.key, None)?;
    }
    if records::any_overruled(c)? {
        done().try_for_each(|s| conflicts::overruled(c, &s.planned.write.key))?;
    }
    let last = || done().filter(|s| s.planned.is_last());
    remove_rows(c, last().map(Settled::rows), no_seq)?;
    for s in last().filter(|s| stamping && s.planned.side == Side::Remote) {
        records::put_stamp(c, &s.planned.write.key, &s.planned.write.id)?;
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
    let (key, (outbox, inbox)) = s.rows();
    let attempts = outbox.or(inbox).map_or(0, |row| row.attempts) + 1;
    if attempts < max_retries.max(1) {
        let delay =
            i64::try_from(delay_of_attempt(retry, attempts).as_millis()).unwrap_or(i64::MAX / 2);
        let due = Utc::now().timestamp_millis() + delay;
        for (side, row) in [(Side::Local, outbox), (Side::Remote, inbox)] {
            if row.is_some() {
                queue::defer(c, side, key, due, true, Some(message))?;
            }
        }
        return Ok(None);
    }
    let Some((found, work)) = s.rejected.as_deref() else {
        return Ok(None);
    };
    let is_new = conflicts::open(c, found, work)?;
    conflicts::hold(c, work, "failed", &found.notes)?;
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
