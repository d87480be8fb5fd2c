//! Unique values: an index error is tentative until the blocker is known (R16).
//!
//! The document in the way may itself be about to let go of the value: then both are written in one
//! transaction, which also unties cycles (a swap of usernames). Only a blocker that stays is a
//! conflict. Works from the write error's key pattern, so compound, partial and collated indexes do.

mod blocker;
pub(crate) mod configured;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::batch::{Item, Namespace, State};
use crate::conflicts::{self, Found};
use crate::content::strip;
use crate::decide::{Decision, Rules, Side, Target, View, decide};
use crate::exact;
use crate::failure::Failure;
use crate::guard::{Duplicate, Verdict, Write};
use crate::key::{Id, Key, KeySet};
use crate::lease::{Entry, journal};
use crate::receipt;
use crate::settle::store_failed;
use crate::shared::{Settings, Shared, lock};
use crate::side::Endpoint;
use crate::store::base;
use crate::store::intents::{self, Intent};
use crate::store::queue::{self, Work};
use crate::store::records;

/// How long a document is waited for that another batch works on.
const BORROWING: Duration = Duration::from_secs(3);

/// Longest chain of documents that pass a value on; beyond it the first one is retried later.
const LONGEST: usize = 64;

/// Unties or records every clash of a batch.
pub(crate) async fn untie_all(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &mut [Item],
) -> Result<(), Failure> {
    let mine: KeySet = items.iter().map(|i| i.work.key.clone()).collect();
    for i in 0..items.len() {
        let State::Clash(clash) = items[i].state.clone() else {
            continue;
        };
        let (side, write, dup) = *clash;
        let ns = items[i].ns.clone();
        let knot = Knot {
            shared,
            settings,
            side,
            db: &ns.db,
            coll: &ns.coll,
            ns: ns.number,
            mine: &mine,
        };
        let (answer, borrowed) = knot.untie(&items[i].work, write, dup).await;
        {
            let mut busy = lock(&shared.busy);
            for key in &borrowed {
                busy.remove(key);
            }
        }
        match answer? {
            Answer::Untied(keys) => {
                for item in items
                    .iter_mut()
                    .filter(|item| keys.contains(&item.work.key))
                {
                    item.state = State::Done;
                    shared.runs.moved(
                        side,
                        &item.ns.shown,
                        1,
                        item.local.as_ref().map_or(0, Vec::len),
                    );
                }
                shared.stamp.notify_one();
            }
            Answer::Again(why) => {
                tracing::debug!(key = ?items[i].work.key, why, "a unique value is in the way");
                items[i].state = State::Look;
            }
            Answer::Interrupted(intents) => {
                tracing::debug!(key = ?items[i].work.key, "a transaction was interrupted");
                // Whether it happened is asked before anything else is decided, of every document in it.
                for item in items.iter_mut() {
                    if let Some((_, intent)) = intents.iter().find(|(k, _)| *k == item.work.key) {
                        let late = shared.late_until(&item.work.key, intent).is_some();
                        item.work.intent = Some(intent.clone());
                        item.state = if late { State::Done } else { State::Look };
                    }
                }
            }
            Answer::Busy => {
                // By chance, or those of a cycle that each hold one would meet again and again.
                let wait = Duration::from_millis(rand::random_range(200..1_500));
                crate::settle::put_back(shared, vec![items[i].work.claim_only()], wait).await?;
                items[i].state = State::Done;
            }
            Answer::Conflict(blocker, dup) => {
                shared.failpoints.stall("clash_found").await;
                record(shared, &items[i], side, &blocker, &dup).await?;
                items[i].state = State::Done;
            }
        }
    }
    Ok(())
}

async fn record(
    shared: &Arc<Shared>,
    item: &Item,
    side: Side,
    blocker: &[u8],
    dup: &Duplicate,
) -> Result<(), Failure> {
    let ours = match side {
        Side::Remote => item.local.clone(),
        Side::Local => item.remote.clone(),
    };
    let Some(id) = Id::of(blocker) else {
        return Ok(());
    };
    let other = Key::new(item.ns.number, &id);
    let shown = item.ns.shown.clone();
    let found = Found::unique(
        &item.work,
        shown.clone(),
        side,
        &ours.unwrap_or_default(),
        (other, blocker),
        (dup, &item.ns.sync_fields),
    );
    let work = item.work.clone();
    let is_new = shared
        .store
        .call(move |c| conflicts::open(c, &found, &work))
        .await
        .map_err(store_failed)?;
    if is_new {
        shared.runs.conflict(&shown);
        shared.metrics.conflict(crate::decide::Kind::UniqueField);
    }
    shared.stamp.notify_one();
    look_again(shared, &item.ns, side, (&id, blocker)).await
}

/// Whoever held the value may have let go of it before the conflict was on record, and then freed
/// nobody: what is held is looked at again, unless the document in the way is as it was.
async fn look_again(
    shared: &Arc<Shared>,
    ns: &Namespace,
    side: Side,
    (id, blocker): (&Id, &[u8]),
) -> Result<(), Failure> {
    let key = Key::new(ns.number, id);
    let now = match shared.endpoint(side) {
        Ok(endpoint) => {
            let ids = std::iter::once(id);
            endpoint.read(&ns.db, &ns.coll, ns.number, ids).await
        }
        Err(failure) => Err(failure),
    };
    shared.note(side, &now);
    let content = |d: &[u8]| strip(d, &ns.sync_fields).into_owned();
    // Without an answer it is looked at again when the link is back.
    let stays = now.is_ok_and(|now| now.get(&key).map(|d| content(d)) == Some(content(blocker)));
    if !stays {
        let freed = shared.store.call(move |c| records::free_waiting(c, &key));
        freed.await.map_err(store_failed)?;
        shared.wake.notify_one();
    }
    Ok(())
}

enum Answer {
    /// These keys are written.
    Untied(KeySet),
    /// Something moved: look again.
    Again(&'static str),
    /// It is not known whether these writes happened.
    Interrupted(Vec<(Key, Intent)>),
    /// A document in the way is being worked on: all is let go of, and tried again later.
    Busy,
    /// This document keeps the value.
    Conflict(Vec<u8>, Box<Duplicate>),
}

/// What becomes of a document in the way.
enum Blocker {
    /// The other side's version is about to replace it.
    LetsGo(Box<Member>),
    /// It keeps the value; its version on the other side.
    Stays(Option<Vec<u8>>),
    /// A write of ours to it may still happen.
    Unknown,
}

struct Member {
    work: Work,
    write: Write,
}

struct Knot<'a> {
    shared: &'a Arc<Shared>,
    settings: &'a Settings,
    /// Where the value is in the way.
    side: Side,
    db: &'a str,
    coll: &'a str,
    ns: u32,
    /// Keys of the batch, which nobody else works on.
    mine: &'a KeySet,
}

impl Knot<'_> {
    /// Follows the blockers until one stays (a conflict) or all let go (one transaction). Also the
    /// keys that were borrowed from other batches' reach on the way.
    async fn untie(
        &self,
        work: &Work,
        write: Write,
        dup: Duplicate,
    ) -> (Result<Answer, Failure>, Vec<Key>) {
        let mut borrowed = Vec::new();
        let answer = self.follow(work, write, dup, &mut borrowed).await;
        (answer, borrowed)
    }

    /// Takes a key for the batch that works on `own`. One that another batch holds is waited for, but
    /// only by the smaller key: of a cycle of documents whose batches each hold one, the greatest
    /// lets go, and the others can go on. Bounded, since the batch keeps others waiting meanwhile.
    async fn borrow(&self, own: &Key, key: &Key) -> bool {
        let deadline = Instant::now() + BORROWING;
        loop {
            if lock(&self.shared.busy).insert(key.clone()) {
                return true;
            }
            if own.as_bytes() > key.as_bytes() || Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn follow(
        &self,
        work: &Work,
        write: Write,
        mut dup: Duplicate,
        borrowed: &mut Vec<Key>,
    ) -> Result<Answer, Failure> {
        let endpoint = self.shared.endpoint(self.side)?;
        let mut chain = vec![Member {
            work: work.clone(),
            write,
        }];
        let mut blocked = 0;
        loop {
            let Some(new) = chain[blocked].write.new.clone() else {
                return Ok(Answer::Again("a deletion can't be in the way"));
            };
            let known: KeySet = chain.iter().map(|m| m.write.key.clone()).collect();
            let Some(blocker) = self.blocker(&endpoint, &new, &dup, &known).await? else {
                if chain.len() == 1 {
                    // Whoever held the value has let go of it since.
                    return Ok(Answer::Again("let go of since"));
                }
                return self.write_chain(&endpoint, chain).await;
            };
            let Some(id) = Id::of(&blocker) else {
                return Ok(Answer::Again("a document without _id"));
            };
            let key = Key::new(self.ns, &id);
            if !self.mine.contains(&key) && !borrowed.contains(&key) {
                if !self.borrow(&work.key, &key).await {
                    return Ok(Answer::Busy);
                }
                // Whoever held it may have written it meanwhile: what was read before is no proof.
                borrowed.push(key);
                continue;
            }
            match self.member(key, id.clone(), &blocker).await? {
                Blocker::LetsGo(member) => chain.push(*member),
                Blocker::Stays(there) if blocked == 0 => {
                    let wanted = &chain[0].write;
                    let still = self.still_clash(wanted, &id, there.as_deref()).await?;
                    return Ok(if still {
                        Answer::Conflict(blocker, Box::new(dup))
                    } else {
                        Answer::Again("the value has changed hands since")
                    });
                }
                Blocker::Stays(_) | Blocker::Unknown => {
                    return Ok(Answer::Again("a later holder keeps its value"));
                }
            }
            if chain.len() > LONGEST {
                return Ok(Answer::Again("a long chain"));
            }
            // The new member's own value may be taken as well; the same index is asked about.
            blocked = chain.len() - 1;
            match &chain[blocked].write.new {
                Some(new) => dup = self.same_index(&dup, new),
                None => return self.write_chain(&endpoint, chain).await,
            }
        }
    }

    /// The blocker as a member of the chain, if the other side's version of it is about to replace it.
    async fn member(&self, key: Key, id: Id, blocker: &[u8]) -> Result<Blocker, Failure> {
        let other = self.shared.endpoint(self.side.other())?;
        let k = key.clone();
        let stored = self.shared.store.call(move |c| {
            let rows = (
                queue::get_row(c, Side::Local, &k)?,
                queue::get_row(c, Side::Remote, &k)?,
            );
            Ok((base::get(c, &k)?, rows, intents::is_open(c, &k)?))
        });
        let (base, (outbox, inbox), undecided) = stored.await.map_err(store_failed)?;
        if undecided {
            return Ok(Blocker::Unknown);
        }
        let mut read = other
            .read(self.db, self.coll, self.ns, std::iter::once(&id))
            .await?;
        let there = read.remove(&key);
        let fields = &self.settings.sync_fields;
        let (here, there) = (
            strip(blocker, fields),
            there.as_deref().map(|d| strip(d, fields)),
        );
        let (local, remote) = match self.side {
            Side::Remote => (there.as_deref(), Some(here.as_ref())),
            Side::Local => (Some(here.as_ref()), there.as_deref()),
        };
        let rules = Rules {
            policy: self.settings.policy(self.coll),
            updated_at: &self.settings.config.fields.updated_at,
            skew_ms: self.shared.skew_ms(),
            first_sync: false,
            fields: self.settings.config.sync.rules.get(self.coll),
            base_may_lag: self.settings.base_may_lag(),
        };
        let replaces = match self.side {
            Side::Remote => Target::Local,
            Side::Local => Target::Remote,
        };
        if decide(
            View {
                local,
                base: base.as_deref(),
                remote,
            },
            rules,
        ) != Decision::Settle(replaces, None)
        {
            return Ok(Blocker::Stays(there.map(Cow::into_owned)));
        }
        let write = Write {
            key: key.clone(),
            id: id.clone(),
            expect: Some(here.to_vec()),
            new: there.as_deref().map(<[u8]>::to_vec),
        };
        Ok(Blocker::LetsGo(Box::new(Member {
            work: Work {
                key,
                id,
                outbox,
                inbox,
                base,
                left: None,
                transaction: None,
                intent: None,
            },
            write,
        })))
    }

    /// Whether the wanted document and the one in the way are still on the other side as they were
    /// seen, both at one moment: the value may have changed hands since one of them was read.
    async fn still_clash(
        &self,
        wanted: &Write,
        blocker: &Id,
        there: Option<&[u8]>,
    ) -> Result<bool, Failure> {
        let other = self.shared.endpoint(self.side.other())?;
        let both = [&wanted.id, blocker];
        let now = other
            .read(self.db, self.coll, self.ns, both.into_iter())
            .await?;
        let content = |id: &Id| {
            let found = now.get(&Key::new(self.ns, id));
            found.map(|d| strip(d, &self.settings.sync_fields))
        };
        Ok(content(&wanted.id).as_deref() == wanted.new.as_deref()
            && content(blocker).as_deref() == there)
    }

    /// Writes all members in one transaction, with their intents stored before it.
    async fn write_chain(
        &self,
        endpoint: &Arc<Endpoint>,
        chain: Vec<Member>,
    ) -> Result<Answer, Failure> {
        let epoch = self.shared.store.epoch();
        let side = self.side;
        let rules = self.settings.config.sync.rules.get(self.coll);
        let receipt = match chain.iter().any(|m| receipt::is_needed(&m.write, rules)) {
            true => receipt::take(self.shared, side).await?,
            false => None,
        };
        let intents: Vec<_> = chain
            .iter()
            .map(|m| {
                let new = m.write.new.clone();
                (
                    m.write.key.clone(),
                    Intent {
                        side,
                        base_after: new.clone(),
                        new,
                        digest: None,
                        fields: None,
                        epoch,
                        receipt,
                    },
                )
            })
            .collect();
        let kept = intents.clone();
        self.shared
            .store
            .call(move |c| {
                kept.iter()
                    .try_for_each(|(key, intent)| intents::put(c, key, intent))
            })
            .await
            .map_err(store_failed)?;
        let entry = |(m, (key, intent)): (&Member, &(Key, Intent))| {
            let id = m.write.id.clone();
            (
                key.clone(),
                Entry::of(id, m.work.base.clone(), intent.clone()),
            )
        };
        let entries = match self.shared.lease() {
            Some(_) => chain.iter().zip(&intents).map(entry).collect(),
            None => vec![],
        };
        let unsent = journal::announce(self.shared, entries).await.err();
        let writes: Vec<_> = chain
            .iter()
            .map(|m| ((self.db, self.coll), &m.write))
            .collect();
        let stamp = self.shared.stamp_for(self.settings, side);
        let with = exact::With {
            sync_fields: &self.settings.sync_fields,
            stamp,
            receipt: receipt.map(|receipt| (self.settings.records_db(), receipt)),
        };
        let (verdict, failure) = match unsent {
            Some(failure) => (Verdict::Unknown { late: false }, Some(failure)),
            None => exact::write_together(endpoint, &writes, with).await,
        };
        self.shared.receipts.ended(side, receipt, &verdict);
        self.shared.failpoints.crash("after_write_before_ack");
        self.shared.note(side, &failure.clone().map_or(Ok(()), Err));
        let keys: KeySet = chain.iter().map(|m| m.write.key.clone()).collect();
        let decided = |done: bool| {
            if let Some(lease) = self.shared.lease() {
                intents
                    .iter()
                    .for_each(|(key, _)| lease.journal().decided(key, done));
            }
        };
        match verdict {
            Verdict::Done => {
                let stamping = self.settings.config.sync.stamp_documents && side == Side::Remote;
                self.shared
                    .store
                    .call(move |c| written(c, &chain, stamping))
                    .await
                    .map_err(store_failed)?;
                decided(true);
                Ok(Answer::Untied(keys))
            }
            Verdict::Unknown { late } => {
                // The intents stay, with the documents as well: the next look asks whether it happened.
                if late {
                    keys.iter().for_each(|key| self.shared.set_late(key));
                }
                failure
                    .filter(Failure::is_offline)
                    .map_or(Ok(Answer::Interrupted(intents)), Err)
            }
            refused => {
                let forget: Vec<Key> = keys.into_iter().collect();
                let forget_count = forget.len();
                let verdict_name = match refused {
                    Verdict::Modified => "a document changed meanwhile",
                    Verdict::Duplicate(_) => "another value is taken",
                    _ => "rejected",
                };
                self.shared
                    .store
                    .call(move |c| forget.iter().try_for_each(|key| intents::forget(c, key)))
                    .await
                    .map_err(store_failed)?;
                decided(false);
                tracing::debug!(documents = forget_count, what = verdict_name, "untying");
                Ok(Answer::Again("the transaction was refused"))
            }
        }
    }
}

fn written(c: &rusqlite::Connection, chain: &[Member], stamping: bool) -> rusqlite::Result<()> {
    for m in chain {
        let key = &m.write.key;
        base::put(c, key, m.write.new.as_deref())?;
        intents::forget(c, key)?;
        conflicts::overruled(c, key)?;
        for (side, row) in [(Side::Local, &m.work.outbox), (Side::Remote, &m.work.inbox)] {
            if let Some(row) = row {
                queue::remove(c, side, key, row.seq)?;
            }
        }
        conflicts::close_if_open(c, key)?;
        if stamping && m.write.new.is_some() {
            records::put_stamp(c, key, &m.work.id)?;
        }
    }
    Ok(())
}
