//! What a walk found goes into base, outbox and inbox.

use std::sync::Arc;

use chrono::Utc;

use crate::decide::Side;
use crate::expiry;
use crate::failure::Failure;
use crate::key::{Id, Key};
use crate::settle::store_failed;
use crate::shared::{Shared, lock};
use crate::store::queue::{self, Change};
use crate::store::{base, walks};
use crate::touched::Watch;
use crate::walk::{Difference, Found, Seen};

/// A document ready for the store's thread, which has enough to do.
enum Entry {
    Equal {
        key: Key,
        hash: u64,
        content: Vec<u8>,
        /// As base keeps it; of a first sync, where it is wanted.
        encoded: Option<Vec<u8>>,
    },
    Differs {
        key: Key,
        id: Id,
        local: Hash,
        remote: Hash,
    },
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

fn prepare(shared: &Shared, found: Found, first: bool) -> Entry {
    match found {
        Found::Equal(key, content) => Entry::Equal {
            hash: base::hash(&content),
            encoded: first.then(|| shared.store.dictionaries().encode(key.ns(), &content)),
            key,
            content,
        },
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
/// begun before the first of them was read; `first`: base is expected to know none.
pub(super) async fn take(
    shared: &Arc<Shared>,
    watch: &Watch,
    found: Vec<Found>,
    first: bool,
) -> Result<u64, Failure> {
    let entries: Vec<Entry> = found
        .into_iter()
        .map(|f| prepare(shared, f, first))
        .collect();
    let (context, watch) = (shared.clone(), watch.clone());
    let taken = shared.store.call(move |c| {
        let mut intake = Intake {
            c,
            shared: &context,
            watch: &watch,
            idle: walks::is_idle(c)?,
            changes: [vec![], vec![]],
            known: 0,
        };
        for entry in entries {
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
    /// By side: local, remote.
    changes: [Vec<Change>; 2],
    known: u64,
}

impl Intake<'_> {
    fn take(&mut self, entry: Entry) -> rusqlite::Result<()> {
        match entry {
            Entry::Equal {
                key,
                hash,
                content,
                encoded,
            } => self.equal(key, hash, &content, encoded),
            Entry::Differs {
                key,
                id,
                local,
                remote,
            } => self.differs(key, id, [local, remote]),
        }
    }

    /// Equal documents become base without a write.
    fn equal(
        &mut self,
        key: Key,
        hash: u64,
        content: &[u8],
        encoded: Option<Vec<u8>>,
    ) -> rusqlite::Result<()> {
        let c = self.c;
        if let Some(encoded) = &encoded
            && self.untouched(&key)?
            && base::add_encoded(c, &key, encoded)?
        {
            self.known += 1;
            return Ok(());
        }
        let known = base::get_hash(c, &key)?;
        self.known += u64::from(known.is_some());
        if known == Some(hash) {
            return Ok(());
        }
        if known.is_none() && self.untouched(&key)? {
            self.known += 1;
            return base::put(c, &key, Some(content));
        }
        // Base is behind, or somebody is at it: the worker sees what is true now.
        if let Some(id) = Id::of(content) {
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
        Ok(!lock(&self.shared.busy).contains(key)
            && !self.watch.saw(key)
            && (self.idle || !self.is_queued(key)? && base::get_intent(self.c, key)?.is_none()))
    }
}
