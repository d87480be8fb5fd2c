//! What became of the writes of a command, or of a transaction.

use std::sync::Arc;

use chrono::Utc;

use super::{Rows, count_conflicts, remove_rows, store_failed};
use crate::batch::{self, Item, Planned, State, Then};
use crate::conflicts::{self, Found};
use crate::decide::{Kind, Side};
use crate::echo;
use crate::failure::Failure;
use crate::guard::Verdict;
use crate::key::Key;
use crate::metrics::Retried;
use crate::moved::Moved;
use crate::retry::delay_of_attempt;
use crate::shared::{Settings, Shared, lock};
use crate::store::base;
use crate::store::intents::{self, Kept};
use crate::store::queue::{self, Change, Row, Work};
use crate::store::records;
use crate::store::sent::{self, Ticket};

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

    /// Whether the write was done, if the server has told.
    fn decided(&self) -> Option<(Key, bool)> {
        let told = !matches!(self.verdict, Verdict::Unknown { .. });
        told.then(|| {
            (
                self.planned.write.key.clone(),
                self.verdict == Verdict::Done,
            )
        })
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
    // Not before it is in the store.
    let decided: Vec<(Key, bool)> = match shared.lease() {
        Some(_) => settled.iter().filter_map(Settled::decided).collect(),
        None => vec![],
    };
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
    if let Some(lease) = shared.lease() {
        for (key, done) in &decided {
            lease.journal().decided(key, *done);
        }
    }
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
