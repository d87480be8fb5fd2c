//! Unique values: an index error is tentative until the blocker is known (R16).
//!
//! The document in the way may itself be about to let go of the value: then both are written in one
//! transaction, which also unties cycles (a swap of usernames). Only a blocker that stays is a
//! conflict. Works from the write error's key pattern, so compound, partial and collated indexes do.

use std::collections::HashSet;
use std::sync::Arc;

use bson::{Bson, Document, RawDocumentBuf, doc};

use crate::batch::{Item, Planned, State};
use crate::conflicts::{self, Found};
use crate::content::strip;
use crate::decide::{Decision, Rules, Side, Target, View, decide};
use crate::exact;
use crate::failure::Failure;
use crate::guard::{Duplicate, Verdict, Write};
use crate::key::{Id, Key};
use crate::raw::{self, Writer, index_name};
use crate::settle::store_failed;
use crate::shared::{Settings, Shared, lock};
use crate::side::Endpoint;
use crate::store::base::{self, Intent};
use crate::store::queue::{self, Work};
use crate::store::records;

/// Longest chain of documents that pass a value on; beyond it the first one is retried later.
const LONGEST: usize = 64;

/// Unties or records every clash of a batch.
pub(crate) async fn untie_all(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &mut [Item],
) -> Result<(), Failure> {
    let mine: HashSet<Key> = items.iter().map(|i| i.work.key.clone()).collect();
    for i in 0..items.len() {
        let State::Clash(side, write, dup) = items[i].state.clone() else {
            continue;
        };
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
                        item.local.as_ref().map_or(0, Vec::len),
                    );
                }
                shared.stamp.notify_one();
            }
            Answer::Again => items[i].state = State::Look,
            Answer::Conflict(blocker, dup) => {
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
    }
    shared.stamp.notify_one();
    Ok(())
}

enum Answer {
    /// These keys are written.
    Untied(HashSet<Key>),
    /// Something moved, or is being worked on: look again.
    Again,
    /// This document keeps the value.
    Conflict(Vec<u8>, Duplicate),
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
    mine: &'a HashSet<Key>,
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
                return Ok(Answer::Again);
            };
            let known: HashSet<Key> = chain.iter().map(|m| m.write.key.clone()).collect();
            let Some(blocker) = self.blocker(&endpoint, &new, &dup, &known).await? else {
                if chain.len() == 1 {
                    // Whoever held the value has let go of it since.
                    return Ok(Answer::Again);
                }
                return self.write_chain(&endpoint, chain).await;
            };
            let Some(id) = Id::of(&blocker) else {
                return Ok(Answer::Again);
            };
            let key = Key::new(self.ns, &id);
            if !self.mine.contains(&key) && !borrowed.contains(&key) {
                if !lock(&self.shared.busy).insert(key.clone()) {
                    return Ok(Answer::Again);
                }
                borrowed.push(key.clone());
            }
            let Some(member) = self.member(key, id, &blocker).await? else {
                return Ok(if blocked == 0 {
                    Answer::Conflict(blocker, dup)
                } else {
                    Answer::Again
                });
            };
            chain.push(member);
            if chain.len() > LONGEST {
                return Ok(Answer::Again);
            }
            // The new member's own value may be taken as well; the same index is asked about.
            blocked = chain.len() - 1;
            match &chain[blocked].write.new {
                Some(new) => dup = self.same_index(&dup, new),
                None => return self.write_chain(&endpoint, chain).await,
            }
        }
    }

    fn same_index(&self, dup: &Duplicate, new: &[u8]) -> Duplicate {
        let new = Document::from_reader(new).unwrap_or_default();
        let value = dup
            .pattern
            .keys()
            .map(|k| (k.clone(), at_path(&new, k)))
            .collect();
        Duplicate {
            pattern: dup.pattern.clone(),
            value,
            collation: dup.collation.clone(),
        }
    }

    /// A document other than those known that holds the values of `new` under that index.
    async fn blocker(
        &self,
        endpoint: &Arc<Endpoint>,
        new: &[u8],
        dup: &Duplicate,
        known: &HashSet<Key>,
    ) -> Result<Option<Vec<u8>>, Failure> {
        let spec = self.index(endpoint, &dup.pattern).await?;
        let mut filter = Document::new();
        // With a collation the error shows sort keys, not values: take those of the document.
        let values = if dup.collation.is_some() {
            self.same_index(dup, new).value
        } else {
            dup.value.clone()
        };
        for (name, value) in values {
            filter.insert(
                name,
                match value {
                    Bson::Array(several) => doc! {"$in": several},
                    one => doc! {"$eq": one},
                },
            );
        }
        let mut and = vec![filter];
        if let Some(partial) = spec
            .as_ref()
            .and_then(|s| s.get_document("partialFilterExpression").ok())
        {
            and.push(partial.clone());
        }
        let mut command = doc! {
            "find": self.coll, "filter": {"$and": and}, "limit": i32::try_from(known.len() + 2).unwrap_or(100),
            "readConcern": {"level": "majority"},
        };
        if let Some(collation) = spec
            .as_ref()
            .and_then(|s| s.get_document("collation").ok())
            .or(dup.collation.as_ref())
        {
            command.insert("collation", collation.clone());
        }
        let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("find"))?;
        let mut found = None;
        endpoint
            .query(self.db, raw, |d| {
                let unknown =
                    Id::of(d.as_bytes()).is_some_and(|id| !known.contains(&Key::new(self.ns, &id)));
                if unknown && found.is_none() {
                    found = Some(d.into_bytes());
                }
            })
            .await?;
        Ok(found)
    }

    async fn index(
        &self,
        endpoint: &Arc<Endpoint>,
        pattern: &Document,
    ) -> Result<Option<Document>, Failure> {
        let mut found = None;
        let raw = RawDocumentBuf::try_from(&doc! {"listIndexes": self.coll})
            .map_err(|_| Failure::fatal("listIndexes"))?;
        endpoint
            .query(self.db, raw, |d| {
                if let Ok(spec) = Document::from_reader(d.as_bytes())
                    && spec.get_document("key").is_ok_and(|k| k == pattern)
                    && spec.get_bool("unique").unwrap_or(false)
                {
                    found = Some(spec);
                }
            })
            .await?;
        Ok(found)
    }

    /// The blocker as a member of the chain, if the other side's version of it is about to replace it.
    async fn member(&self, key: Key, id: Id, blocker: &[u8]) -> Result<Option<Member>, Failure> {
        let other = self.shared.endpoint(self.side.other())?;
        let k = key.clone();
        let stored = self.shared.store.call(move |c| {
            let rows = (
                queue::get_row(c, Side::Local, &k)?,
                queue::get_row(c, Side::Remote, &k)?,
            );
            Ok((
                base::get(c, &k)?.0,
                rows,
                base::get_intent(c, &k)?.is_some(),
            ))
        });
        let (base, (outbox, inbox), undecided) = stored.await.map_err(store_failed)?;
        if undecided {
            return Ok(None);
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
            return Ok(None);
        }
        let write = Write {
            key: key.clone(),
            id: id.clone(),
            expect: Some(here.to_vec()),
            new: there.as_deref().map(<[u8]>::to_vec),
        };
        Ok(Some(Member {
            work: Work {
                key,
                id,
                outbox,
                inbox,
                base,
                intent: None,
            },
            write,
        }))
    }

    /// Writes all members in one transaction, with their intents stored before it.
    async fn write_chain(
        &self,
        endpoint: &Arc<Endpoint>,
        chain: Vec<Member>,
    ) -> Result<Answer, Failure> {
        let epoch = self.shared.store.epoch();
        let side = self.side;
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
                        fields: None,
                        epoch,
                    },
                )
            })
            .collect();
        self.shared
            .store
            .call(move |c| {
                intents
                    .iter()
                    .try_for_each(|(key, intent)| base::put_intent(c, key, intent))
            })
            .await
            .map_err(store_failed)?;
        let writes: Vec<_> = chain
            .iter()
            .map(|m| ((self.db, self.coll), &m.write))
            .collect();
        let stamp = self.shared.stamp_for(self.settings, side);
        let (verdict, failure) =
            exact::write_together(endpoint, &writes, &self.settings.sync_fields, stamp).await;
        self.shared.failpoints.crash("after_write_before_ack");
        self.shared.note(side, &failure.clone().map_or(Ok(()), Err));
        let keys: HashSet<Key> = chain.iter().map(|m| m.write.key.clone()).collect();
        match verdict {
            Verdict::Done => {
                let stamping = self.settings.config.sync.stamp_documents && side == Side::Remote;
                self.shared
                    .store
                    .call(move |c| written(c, &chain, stamping))
                    .await
                    .map_err(store_failed)?;
                Ok(Answer::Untied(keys))
            }
            Verdict::Unknown { late } => {
                // The intents stay: the next look asks whether it happened.
                if late {
                    keys.iter().for_each(|key| self.shared.set_late(key));
                }
                failure
                    .filter(Failure::is_offline)
                    .map_or(Ok(Answer::Again), Err)
            }
            _ => {
                let forget: Vec<Key> = keys.into_iter().collect();
                self.shared
                    .store
                    .call(move |c| forget.iter().try_for_each(|key| base::drop_intent(c, key)))
                    .await
                    .map_err(store_failed)?;
                Ok(Answer::Again)
            }
        }
    }
}

fn written(c: &rusqlite::Connection, chain: &[Member], stamping: bool) -> rusqlite::Result<()> {
    for m in chain {
        let key = &m.write.key;
        base::put(c, key, m.write.new.as_deref(), 0, 3)?;
        base::drop_intent(c, key)?;
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

/// The value at a dotted path, or null, as a unique index sees it.
fn at_path(doc: &Document, path: &str) -> Bson {
    let mut at = Bson::Document(doc.clone());
    for step in path.split('.') {
        at = match at {
            Bson::Document(mut d) => d.remove(step).unwrap_or(Bson::Null),
            Bson::Array(items) => {
                let inner = items
                    .iter()
                    .filter_map(Bson::as_document)
                    .map(|d| at_path(d, step));
                Bson::Array(inner.collect())
            }
            _ => Bson::Null,
        };
    }
    at
}

/// Takes writes out of a batch whose `[unique_fields]` value is taken, index or not.
pub(crate) async fn check_configured(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &mut [Item],
    planned: &mut Vec<Planned>,
) -> Result<(), Failure> {
    if settings.config.unique_fields.is_empty() {
        return Ok(());
    }
    let mut taken: Vec<(usize, Duplicate)> = Vec::new();
    for side in [Side::Local, Side::Remote] {
        for (coll, fields) in &settings.config.unique_fields {
            for field in fields {
                taken.extend(taken_values(shared, items, planned, side, coll, field).await?);
            }
        }
    }
    for (item, dup) in taken {
        let Some(at) = planned.iter().position(|p| p.item == item) else {
            continue;
        };
        let p = planned.remove(at);
        items[item].state = State::Clash(p.side, p.write, dup);
    }
    Ok(())
}

async fn taken_values(
    shared: &Arc<Shared>,
    items: &[Item],
    planned: &[Planned],
    side: Side,
    coll: &str,
    field: &str,
) -> Result<Vec<(usize, Duplicate)>, Failure> {
    let mut wanted = Vec::new();
    for p in planned
        .iter()
        .filter(|p| p.side == side && items[p.item].ns.coll == coll)
    {
        let value = |d: &Option<Vec<u8>>| {
            d.as_ref()
                .and_then(|d| raw::get(d, field.as_bytes()).map(|e| e.whole.to_vec()))
        };
        let new = value(&p.write.new);
        // A missing or null value is no value.
        if new.as_ref().is_some_and(|n| n[0] != 0x0A) && new != value(&p.write.expect) {
            wanted.push(p);
        }
    }
    let Some(first) = wanted.first() else {
        return Ok(vec![]);
    };
    let ns = &items[first.item].ns;
    let mut w = Writer::new();
    w.str("find", coll)
        .open("filter")
        .open(field)
        .open_array("$in");
    for (i, p) in wanted.iter().enumerate() {
        if let Some(e) = p
            .write
            .new
            .as_ref()
            .and_then(|d| raw::get(d, field.as_bytes()))
        {
            w.value(index_name(i), e.kind, e.value);
        }
    }
    w.close()
        .close()
        .close()
        .open("readConcern")
        .str("level", "majority")
        .close();
    w.open("projection").i32(field, 1).close();
    let mut holders: Vec<Vec<u8>> = Vec::new();
    let endpoint = shared.endpoint(side)?;
    endpoint
        .query(&ns.db, w.command(), |d| holders.push(d.into_bytes()))
        .await?;
    let mut taken = Vec::new();
    for p in wanted {
        let Some(new) = p
            .write
            .new
            .as_ref()
            .and_then(|d| raw::get(d, field.as_bytes()))
        else {
            continue;
        };
        let holder = holders.iter().find(|h| {
            raw::get(h, field.as_bytes()).is_some_and(|e| e.whole == new.whole)
                && Id::of(h).is_some_and(|id| Key::new(ns.number, &id) != p.write.key)
        });
        if holder.is_some() {
            let value = p
                .write
                .new
                .as_ref()
                .and_then(|d| Document::from_reader(d.as_slice()).ok())
                .unwrap_or_default();
            let value = doc! {field: at_path(&value, field)};
            taken.push((
                p.item,
                Duplicate {
                    pattern: doc! {field: 1},
                    value,
                    collation: None,
                },
            ));
        }
    }
    Ok(taken)
}
