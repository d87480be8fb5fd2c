//! What a walk found goes into base, outbox and inbox.

use std::sync::Arc;

use bytes::Bytes;
use chrono::Utc;

use crate::decide::Side;
use crate::expiry;
use crate::failure::Failure;
use crate::key::{Id, Key};
use crate::settle::store_failed;
use crate::shared::{Shared, lock};
use crate::store::queue::{self, Change};
use crate::store::{Packer, base, intents, walks};
use crate::touched::Watch;
use crate::walk::{Difference, Found, Seen};

/// A document ready for the store's thread, which has enough to do.
enum Entry {
    Equal(Equal),
    Differs {
        key: Key,
        id: Id,
        local: Hash,
        remote: Hash,
    },
}

/// One that both sides have alike.
struct Equal {
    key: Key,
    hash: u64,
    content: Bytes,
    /// As base keeps it; of a first sync, where it is wanted.
    encoded: Option<Vec<u8>>,
}

/// What is known of one side's content.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hash {
    Absent,
    Of(u64),
    Unknown,
}

impl Hash {
    fn of(seen: &Seen) -> Self {
        match seen {
            Seen::Absent => Self::Absent,
            Seen::Content(content) => Self::Of(base::hash(content)),
            Seen::Unread => Self::Unknown,
        }
    }

    /// Whether that side is known to hold what base says.
    fn is(self, base: Option<u64>) -> bool {
        self != Self::Unknown && self == base.map_or(Self::Absent, Self::Of)
    }
}

fn prepare(found: Found, packer: Option<&Packer<'_>>) -> Entry {
    match found {
        Found::Equal(key, content) => {
            let encoded = packer.map(|packer| packer.encode(&content));
            let hash = encoded.as_deref().and_then(base::hash_of);
            Entry::Equal(Equal {
                hash: hash.unwrap_or_else(|| base::hash(&content)),
                encoded,
                key,
                content,
            })
        }
        Found::Differs(Difference {
            key,
            id,
            local,
            remote,
        }) => Entry::Differs {
            key,
            id,
            local: Hash::of(&local),
            remote: Hash::of(&remote),
        },
    }
}

/// Takes in what was found, in one transaction; how many of the documents base knows. `watch` was
/// begun before the first of them was read; `first`: of which collection this is the first sync, so that
/// base is expected to know none.
pub(super) async fn take(
    shared: &Arc<Shared>,
    watch: &Watch,
    found: Vec<Found>,
    first: Option<u32>,
) -> Result<u64, Failure> {
    if let Some(ns) = first {
        shared.store.dictionaries().ready(ns).await;
    }
    let entries: Vec<Entry> = {
        let packer = first.map(|ns| shared.store.dictionaries().packer(ns));
        let prepare = |found| prepare(found, packer.as_ref());
        found.into_iter().map(prepare).collect()
    };
    let (context, watch) = (shared.clone(), watch.clone());
    let taken = shared.store.call(move |c| {
        let mut intake = Intake {
            c,
            shared: &context,
            watch: &watch,
            idle: walks::is_idle(c)?,
            // In this order: what is busy no more was noted before.
            at_rest: lock(&context.busy).is_empty() && watch.saw_none(),
            changes: [vec![], vec![]],
            known: 0,
        };
        for entry in intake.add(entries)? {
            intake.take(entry)?;
        }
        let now = Utc::now().timestamp_millis();
        for side in [Side::Local, Side::Remote] {
            queue::enqueue(c, side, &intake.changes[side as usize], now)?;
        }
        let any = intake.changes.iter().any(|changes| !changes.is_empty());
        Ok((intake.known, any))
    });
    let (known, any) = taken.await.map_err(store_failed)?;
    if any {
        shared.wake.notify_one();
    }
    Ok(known)
}

struct Intake<'a> {
    c: &'a rusqlite::Connection,
    shared: &'a Shared,
    watch: &'a Watch,
    idle: bool,
    /// Nobody has worked on any document since before these were read.
    at_rest: bool,
    /// By side: local, remote.
    changes: [Vec<Change>; 2],
    known: u64,
}

impl Intake<'_> {
    /// Puts documents that base is expected not to know into base, all together; what is left.
    fn add(&mut self, entries: Vec<Entry>) -> rusqlite::Result<Vec<Entry>> {
        let (mut new, mut left) = (Vec::with_capacity(entries.len()), Vec::new());
        for entry in entries {
            match entry {
                Entry::Equal(e) if e.encoded.is_some() && self.untouched(&e.key)? => new.push(e),
                entry => left.push(entry),
            }
        }
        let rows = new
            .iter()
            .filter_map(|e| Some((&e.key, e.encoded.as_deref()?)));
        let rows: Vec<_> = rows.collect();
        if base::add_encoded(self.c, &rows)? {
            self.known += new.len() as u64;
        } else {
            // It knows some: each is looked at.
            left.extend(new.into_iter().map(Entry::Equal));
        }
        Ok(left)
    }

    fn take(&mut self, entry: Entry) -> rusqlite::Result<()> {
        match entry {
            Entry::Equal(equal) => self.equal(equal),
            Entry::Differs {
                key,
                id,
                local,
                remote,
            } => self.differs(key, id, [local, remote]),
        }
    }

    /// Equal documents become base without a write.
    fn equal(&mut self, equal: Equal) -> rusqlite::Result<()> {
        let Equal {
            key,
            hash,
            content,
            encoded,
        } = equal;
        let c = self.c;
        let known = base::get_hash(c, &key)?;
        self.known += u64::from(known.is_some());
        if known == Some(hash) {
            return Ok(());
        }
        if known.is_none() && self.untouched(&key)? {
            self.known += 1;
            return match encoded {
                Some(encoded) => base::put_encoded(c, &key, Some(&encoded)),
                None => base::put(c, &key, Some(&content)),
            };
        }
        // Base is behind, or somebody is at it: the worker sees what is true now.
        if let Some(id) = Id::of(&content) {
            self.look(&[Side::Local, Side::Remote], &key, &id);
        }
        Ok(())
    }

    fn differs(&mut self, key: Key, id: Id, hashes: [Hash; 2]) -> rusqlite::Result<()> {
        let c = self.c;
        let known = base::get_hash(c, &key)?;
        self.known += u64::from(known.is_some());
        let missing = [Side::Local, Side::Remote]
            .into_iter()
            .find(|side| hashes[*side as usize] == Hash::Absent);
        if let (Some(side), Some(_)) = (missing, known) {
            let other = hashes[side.other() as usize];
            if other == Hash::Unknown || other.is(known) {
                if expiry::is_left(c, self.shared, &key, side)? {
                    return Ok(());
                }
                // A deletion, it seems: queued when all of them are counted (R13), unless an event
                // has brought it into a queue before.
                if self.watch.saw(&key) {
                    // The worker was at it since: what was read is from before, and no deletion.
                    self.look(&[Side::Remote], &key, &id);
                } else if !self.is_queued(&key)? {
                    walks::put_gone(c, &key, &id, side)?;
                }
                return Ok(());
            }
        }
        if hashes.contains(&Hash::Unknown) {
            // From the inbox the worker looks at both sides.
            self.look(&[Side::Remote], &key, &id);
            return Ok(());
        }
        for side in [Side::Local, Side::Remote] {
            if !hashes[side as usize].is(known) {
                self.look(&[side], &key, &id);
            }
        }
        Ok(())
    }

    fn look(&mut self, sides: &[Side], key: &Key, id: &Id) {
        for side in sides {
            self.changes[*side as usize].push(Change {
                key: key.clone(),
                id: id.clone(),
                hint: None,
            });
        }
    }

    fn is_queued(&self, key: &Key) -> rusqlite::Result<bool> {
        Ok(!self.idle
            && (queue::get_row(self.c, Side::Local, key)?.is_some()
                || queue::get_row(self.c, Side::Remote, key)?.is_some()))
    }

    /// Nobody has worked on the document since before it was read, and nothing waits for it.
    fn untouched(&self, key: &Key) -> rusqlite::Result<bool> {
        Ok(
            (self.at_rest || !lock(&self.shared.busy).contains(key) && !self.watch.saw(key))
                && (self.idle || !self.is_queued(key)? && !intents::is_open(self.c, key)?),
        )
    }
}
