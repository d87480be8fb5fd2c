//! Settling: what became of a batch goes into the store, a transaction a step (R2, R3).

mod verdicts;

use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;

use crate::batch::{self, Item, Planned};
use crate::config::Policy;
use crate::conflicts::{self, Found};
use crate::decide::{Kind, Side};
use crate::failure::{Class, Failure};
use crate::key::{Id, Key};
use crate::lease::{Entry, Journal};
use crate::shared::{Settings, Shared};
use crate::store::base;
use crate::store::intents::{self, Intent};
use crate::store::queue::{self, Change, Row, Work};
use crate::store::records;
use crate::store::sent::{self, Ticket};

pub(crate) use verdicts::verdicts;

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
        /// Sides that let go of such a document by themselves by now.
        due: Vec<Side>,
    },
    /// It did not, and can't any more, or somebody has written since: what stands there now.
    NotLanded { key: Key, now: Option<Vec<u8>> },
    /// Nothing can be decided yet; why, for people.
    Deferred {
        work: Work,
        wait: Duration,
        why: &'static str,
    },
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
    let told: Vec<Told> = match shared.lease() {
        Some(_) => settlements.iter().filter_map(Told::of).collect(),
        None => vec![],
    };
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
                    Settlement::Landed {
                        work,
                        intent,
                        left,
                        due,
                    } => {
                        base::put(c, &work.key, intent.base_after.as_deref())?;
                        // A deletion that came since it was read was judged without base.
                        let mut left = *left;
                        for side in due {
                            if left.is_none() && queue::is_gone(c, *side, &work.key)? {
                                left = Some(*side);
                            }
                        }
                        if left.is_some() {
                            base::mark_left(c, &work.key, left)?;
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
                    Settlement::Deferred { work, wait, why } => {
                        let until = now + i64::try_from(wait.as_millis()).unwrap_or(i64::MAX / 2);
                        for side in [Side::Local, Side::Remote] {
                            queue::defer(c, side, &work.key, until, false, Some(why))?;
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
    if let Some(lease) = shared.lease() {
        told.iter().for_each(|told| told.tell(lease.journal()));
    }
    count_conflicts(shared, held);
    shared.stamp.notify_one();
    Ok(())
}

/// What other daemons are to know of a settlement.
enum Told {
    /// Both sides are equal, and base has changed.
    Agreed(Key, Id),
    /// A write that may have happened did.
    Landed(Key, Id),
    /// It did not.
    NotLanded(Key),
}

impl Told {
    fn of(settlement: &Settlement) -> Option<Self> {
        match settlement {
            Settlement::Agreed { base: None, .. } => None,
            Settlement::Agreed { work, .. } => {
                Some(Self::Agreed(work.key.clone(), work.id.clone()))
            }
            Settlement::Landed { work, .. } => {
                Some(Self::Landed(work.key.clone(), work.id.clone()))
            }
            Settlement::NotLanded { key, .. } => Some(Self::NotLanded(key.clone())),
            Settlement::Held { .. } | Settlement::Deferred { .. } => None,
        }
    }

    fn tell(&self, journal: &Journal) {
        match self {
            Self::Agreed(key, id) => {
                journal.tell(key, id);
            }
            Self::Landed(key, id) => {
                journal.decided(key, true);
                // What it wrote may be known by its digest alone: base says it.
                journal.tell(key, id);
            }
            Self::NotLanded(key) => journal.decided(key, false),
        }
    }
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

impl Work {
    fn rows(&self) -> Rows<'_> {
        (&self.key, (self.outbox.as_ref(), self.inbox.as_ref()))
    }
}

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
/// transactions in a row for each document, since their outcome may be open for long. With high
/// availability on, also what other daemons are to know of them.
pub(crate) async fn put_intents(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &[Item],
    commands: &[Vec<Planned>],
    transactions: &[Vec<Planned>],
) -> Result<(Vec<Option<Ticket>>, Vec<(Key, Entry)>), Failure> {
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
    let entries = match shared.lease() {
        Some(_) => {
            let all = commands.iter().chain(transactions).flatten();
            let entry = |(p, a): (&Planned, &Ahead)| {
                let base = items[p.item].work.base.clone();
                let entry = Entry::of(p.write.id.clone(), base, p.whole_intent(epoch, updated_at));
                let entry = match &a.overruled {
                    Some((record, gone)) => entry.with_record(record, *gone),
                    None => entry,
                };
                (p.write.key.clone(), entry)
            };
            all.zip(&ahead).map(entry).collect()
        }
        None => vec![],
    };
    let tickets = shared
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
        .map_err(store_failed)?;
    Ok((tickets, entries))
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
