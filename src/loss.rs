//! Losses: deletions that come in masses, and collections that are gone (R13).
//!
//! A deletion is carried over like any other change, unless too much goes at once: more than
//! `sync.mass_delete_percent` of a collection, and at least [`FEWEST`] documents. What counts is what
//! waits in the queue, not what one batch happens to hold: a growing crowd of deletions is let grow up
//! first. Of a long queue only what was deleted within about two minutes counts together, so that a
//! fortnight of ordinary deletions, made offline, is no mass. What one side has lost for good reasons
//! and a person has confirmed passes.

mod gone;

pub(crate) use gone::{before_comparison, count_on, known};
use gone::{gone, is_gone};

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::{Connection, params};

use crate::batch::{Item, Namespace, Planned, State};
use crate::config::OnDrop;
use crate::decide::{Kind, Side};
use crate::failure::Failure;
use crate::halt;
use crate::key::Key;
use crate::lift::confirmed_name;
use crate::settle::{self, store_failed};
use crate::shared::{Settings, Shared, lock};
use crate::store;
use crate::store::queue::{self, Work};
use crate::tail;

/// Fewer deletions are never a mass (R13).
pub const FEWEST: u64 = 100;

/// So few at once go without waiting for more of a mass that may just begin.
const FEW: u64 = 20;

/// Deletions that were carried over count together with those that wait for this long.
const WINDOW: Duration = Duration::from_secs(10);

/// A crowd has come to its end when it has not grown for this long.
const QUIET: Duration = Duration::from_millis(700);

/// How long deletions wait at a time while their collection is being compared.
const COMPARED: Duration = Duration::from_secs(2);

/// Longest wait for the end of a crowd.
const CROWD: Duration = Duration::from_secs(5);

/// How long the event of a drop may take until it is read.
const PATIENCE: Duration = Duration::from_secs(10);

/// Keys of new documents that are remembered for a collection; more would only be exempt from a count.
const MOST_CREATED: usize = 20_000;

/// What was deleted lately, by the side that deleted and the collection.
#[derive(Debug, Default)]
pub struct Losses {
    recent: HashMap<(Side, u32), Recent>,
}

#[derive(Debug)]
struct Recent {
    since: Instant,
    /// Carried over since, of what was there before.
    deleted: u64,
    /// Hashes of keys created since: what comes and goes is no loss.
    created: HashSet<u64>,
    crowd: Option<Crowd>,
    /// Counts that began before this are not believed.
    changed: Instant,
    /// The last count of what waits, when it began, and how long it may be believed.
    counted: Option<(Waiting, Instant, Duration)>,
}

/// What waits in a queue of one collection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Waiting {
    /// Deletions; see [`deletions`].
    deletions: u64,
    /// Whether there are documents that nobody has looked at, which may be gone, too.
    unknown: bool,
}

#[derive(Debug)]
struct Crowd {
    since: Instant,
    grew: Instant,
    size: u64,
}

impl Losses {
    fn of(&mut self, side: Side, ns: u32) -> &mut Recent {
        let now = Instant::now();
        let recent = self.recent.entry((side, ns)).or_insert_with(|| Recent {
            since: now,
            deleted: 0,
            created: HashSet::new(),
            crowd: None,
            changed: now,
            counted: None,
        });
        if now.duration_since(recent.since) > WINDOW {
            (recent.since, recent.deleted) = (now, 0);
            recent.created.clear();
        }
        recent
    }

    /// A deletion that happened on `from` was carried over.
    pub fn deleted(&mut self, from: Side, key: &Key) {
        let recent = self.of(from, key.ns());
        if !recent.created.remove(&hash(key)) {
            recent.deleted += 1;
        }
    }

    /// Documents of a collection were created on one side and carried over.
    pub fn created<'a>(&mut self, ns: u32, keys: impl Iterator<Item = &'a Key> + Clone) {
        for side in [Side::Local, Side::Remote] {
            let created = &mut self.of(side, ns).created;
            let room = MOST_CREATED.saturating_sub(created.len());
            created.extend(keys.clone().take(room).map(hash));
        }
    }
}

fn hash(key: &Key) -> u64 {
    xxhash_rust::xxh3::xxh3_64(key.as_bytes())
}

impl Recent {
    /// Whether more deletions are likely to be on their way.
    fn is_growing(&mut self, waiting: u64, unknown: bool) -> bool {
        let now = Instant::now();
        let crowd = self.crowd.get_or_insert(Crowd {
            since: now,
            grew: now,
            size: waiting,
        });
        if waiting > crowd.size {
            crowd.grew = now;
        }
        crowd.size = waiting;
        let grows = unknown || now.duration_since(crowd.grew) < QUIET;
        grows && now.duration_since(crowd.since) < CROWD
    }
}

/// What to do with the deletions of one side and collection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Pass,
    /// Look at them again after a while; or never, if their collection is halted meanwhile.
    Hold(Duration),
}

/// Takes deletions out of a batch that must not be carried over without a person's word, or not yet.
pub(crate) async fn hold(
    shared: &Arc<Shared>,
    items: &mut [Item],
    planned: &mut Vec<Planned>,
) -> Result<(), Failure> {
    mark(shared, items, planned).await?;
    let mut verdicts: HashMap<(Side, u32), Verdict> = HashMap::new();
    let mut counts: HashMap<(Side, u32), u64> = HashMap::new();
    for p in planned.iter().filter(|p| p.write.new.is_none()) {
        *counts
            .entry((p.side.other(), items[p.item].ns.number))
            .or_default() += 1;
    }
    for p in planned.iter().filter(|p| p.write.new.is_none()) {
        let (from, ns) = (p.side.other(), &items[p.item].ns);
        if let Entry::Vacant(entry) = verdicts.entry((from, ns.number)) {
            let count = counts[&(from, ns.number)];
            entry.insert(judge(shared, from, ns, count).await?);
        }
    }
    let mut left: HashMap<Duration, Vec<Work>> = HashMap::new();
    planned.retain(|p| {
        let (from, item) = (p.side.other(), &mut items[p.item]);
        match verdicts.get(&(from, item.ns.number)) {
            Some(Verdict::Hold(wait)) if p.write.new.is_none() => {
                item.state = State::Done;
                let work = item.work.claim_only();
                left.entry(*wait).or_default().push(work);
                false
            }
            _ => true,
        }
    });
    for (wait, works) in left {
        settle::put_back(shared, works, wait).await?;
    }
    for ((from, n), verdict) in verdicts {
        if verdict != Verdict::Pass {
            // What is judged next shall not be judged by a count from before.
            lock(&shared.losses).of(from, n).changed = Instant::now();
        }
    }
    Ok(())
}

/// Marks the rows of deletions as such before any is judged: one that only said "look" would not be
/// among those that wait, and a loss that comes in several batches would be judged by one of them.
async fn mark(shared: &Arc<Shared>, items: &[Item], planned: &[Planned]) -> Result<(), Failure> {
    let claims: Vec<(Side, Key, i64)> = (planned.iter())
        .filter(|p| p.write.new.is_none())
        .filter_map(|p| {
            let (from, work) = (p.side.other(), &items[p.item].work);
            let row = match from {
                Side::Local => &work.outbox,
                Side::Remote => &work.inbox,
            };
            Some((from, work.key.clone(), row.as_ref()?.seq))
        })
        .collect();
    if claims.is_empty() {
        return Ok(());
    }
    let marking = shared.store.call(move |c| {
        let mut marked = HashSet::new();
        for (from, key, seq) in &claims {
            if queue::mark_gone(c, *from, key, *seq)? {
                marked.insert((*from, key.ns()));
            }
        }
        Ok(marked)
    });
    let marked = marking.await.map_err(store_failed)?;
    let mut losses = lock(&shared.losses);
    for (from, n) in marked {
        losses.of(from, n).changed = Instant::now();
    }
    Ok(())
}

async fn judge(
    shared: &Arc<Shared>,
    from: Side,
    ns: &Namespace,
    count: u64,
) -> Result<Verdict, Failure> {
    let n = ns.number;
    if lock(&shared.halted).contains(&n) {
        return Ok(Verdict::Hold(QUIET));
    }
    let confirmed = shared
        .store
        .get_meta::<String>(&confirmed_name(n))
        .await
        .map_err(store_failed)?;
    if confirmed.is_some_and(|side| side == from.name()) {
        return Ok(Verdict::Pass);
    }
    let settings = shared.settings();
    if is_vanished(shared, from, ns).await? {
        if settings.config.sync.on_drop == OnDrop::Propagate {
            return Ok(Verdict::Pass);
        }
        // A queue is read by state, which is ahead of the events, and would carry a drop over one
        // document at a time. The event says more than we know, so it is given time to come.
        if tells(shared, from) && !tail::catch_up(shared, from, PATIENCE).await {
            return Ok(Verdict::Hold(QUIET));
        }
        gone(shared, &settings, (from, n), (&ns.db, &ns.coll)).await?;
        return Ok(Verdict::Hold(QUIET));
    }
    if lock(&shared.comparing).contains(&n) {
        // How much is gone is known when the comparison is through.
        return Ok(Verdict::Hold(COMPARED));
    }
    mass(shared, &settings, from, ns, count).await
}

/// Whether the drop of a collection is told by a stream.
fn tells(shared: &Shared, side: Side) -> bool {
    side == Side::Local || shared.follows()
}

/// Judges by number.
async fn mass(
    shared: &Arc<Shared>,
    settings: &Settings,
    from: Side,
    ns: &Namespace,
    count: u64,
) -> Result<Verdict, Failure> {
    let percent = u64::from(settings.config.sync.mass_delete_percent);
    if percent == 0 {
        return Ok(Verdict::Pass);
    }
    let n = ns.number;
    let known = {
        let mut losses = lock(&shared.losses);
        let recent = losses.of(from, n);
        recent
            .counted
            .filter(|(_, began, valid)| *began > recent.changed && began.elapsed() < *valid)
            .map(|(waiting, ..)| waiting)
    };
    let waiting = match known {
        Some(waiting) => waiting,
        None => {
            let began = Instant::now();
            let counting = shared.store.call(move |c| {
                Ok(Waiting {
                    deletions: deletions(c, from, n)?,
                    unknown: any_unknown(c, from, n)?,
                })
            });
            let waiting = counting.await.map_err(store_failed)?;
            // A long count is not taken for every batch.
            let valid = (began.elapsed() * 11).min(Duration::from_secs(30));
            lock(&shared.losses).of(from, n).counted = Some((waiting, began, valid));
            waiting
        }
    };
    let (loss, growing) = {
        let mut losses = lock(&shared.losses);
        let recent = losses.of(from, n);
        let deletions = waiting.deletions.max(count);
        let loss = deletions + recent.deleted;
        if loss < FEWEST && deletions < FEW {
            recent.crowd = None;
            return Ok(Verdict::Pass);
        }
        (loss, recent.is_growing(deletions, waiting.unknown))
    };
    if growing {
        return Ok(Verdict::Hold(QUIET));
    }
    if loss < FEWEST {
        lock(&shared.losses).of(from, n).crowd = None;
        return Ok(Verdict::Pass);
    }
    let there = count_on(shared, from.other(), &ns.db, &ns.coll).await?;
    let before = there + lock(&shared.losses).of(from, n).deleted;
    if !is_mass(loss, before, percent) {
        return Ok(Verdict::Pass);
    }
    let (side, other) = (from.name(), from.other().name());
    let why = format!(
        "collection {}: {loss} of {before} documents were deleted on the {side} side at once, more than {percent} % \
         (sync.mass_delete_percent); it is not synced until you decide (the {other} side still has what waits)",
        ns.shown
    );
    let what = (n, ns.shown.clone());
    halt::put_in_place(shared, what, (Kind::MassDelete, from), why)
        .await
        .map_err(store_failed)?;
    Ok(Verdict::Hold(QUIET))
}

/// Whether so many deletions, of so many documents, are too many at once.
pub(crate) fn is_mass(deletions: u64, documents: u64, percent: u64) -> bool {
    deletions >= FEWEST && deletions.saturating_mul(100) > percent.saturating_mul(documents)
}

/// Deletions of a collection that wait and would be carried over; of many, those of the two fullest
/// minutes in a row.
fn deletions(c: &Connection, from: Side, ns: u32) -> rusqlite::Result<u64> {
    let (low, high) = (ns.to_be_bytes().to_vec(), (ns + 1).to_be_bytes().to_vec());
    let (t, other) = (queue::table(from), queue::table(from.other()));
    let gone = queue::GONE;
    let all: u64 = c
        .prepare_cached(&format!(
            "SELECT count(*) FROM {t} WHERE {gone} AND key >= ? AND key < ?"
        ))?
        .query_row(params![low, high], |r| r.get(0))?;
    if all < FEWEST {
        return Ok(all);
    }
    // Echoes of our own deletions have no base any more; what both sides deleted is no loss.
    let mut minutes = c.prepare_cached(&format!(
        "SELECT CASE hint WHEN x'44' THEN 0 ELSE at / 60000 END AS minute, count(*) FROM {t} WHERE {gone} AND key >= ? AND key < ?
         AND EXISTS(SELECT 1 FROM base WHERE base.key = {t}.key)
         AND NOT EXISTS(SELECT 1 FROM {other} AS o WHERE o.key = {t}.key AND o.hint IN (x'64', x'44'))
         GROUP BY minute ORDER BY minute"
    ))?;
    let rows = minutes.query_map(params![low, high], |r| {
        Ok((r.get::<_, i64>(0)?, r.get::<_, u64>(1)?))
    })?;
    let (mut found, mut most, mut last) = (0, 0, (i64::MIN, 0));
    for row in rows {
        let (minute, count) = row?;
        if minute == 0 {
            // Found by a comparison, or changed before: nobody knows when it was deleted.
            found = count;
            continue;
        }
        let before = if last.0.saturating_add(1) == minute {
            last.1
        } else {
            0
        };
        most = most.max(before + count);
        last = (minute, count);
    }
    Ok(most + found)
}

/// Whether documents wait to be looked at of which nobody has said how they are.
fn any_unknown(c: &Connection, from: Side, ns: u32) -> rusqlite::Result<bool> {
    let (low, high) = (ns.to_be_bytes().to_vec(), (ns + 1).to_be_bytes().to_vec());
    c.prepare_cached(&format!(
        "SELECT EXISTS(SELECT 1 FROM {} WHERE held IS NULL AND hint IS NULL AND key >= ? AND key < ?)",
        queue::table(from)
    ))?
    .query_row(params![low, high], |r| r.get(0))
}

async fn is_vanished(shared: &Shared, side: Side, ns: &Namespace) -> Result<bool, Failure> {
    is_gone(shared, side, &ns.db, &ns.coll).await
}

/// A comparison that the last run of the daemon did not finish has queued a part of what is gone: the
/// rest is waited for.
pub async fn load(shared: &Shared) -> Result<(), store::StoreError> {
    let databases = shared.settings().config.databases.clone();
    let unfinished = shared.store.call(move |c| {
        let mut found = Vec::new();
        for db in databases {
            if store::get_meta::<String>(c, &tail::reconcile_name(&db))?.is_some() {
                let mut numbers = c.prepare_cached("SELECT n FROM namespaces WHERE db = ?")?;
                for n in numbers.query_map([&db], |r| r.get::<_, u32>(0))? {
                    found.push(n?);
                }
            }
        }
        Ok(found)
    });
    let unfinished = unfinished.await?;
    lock(&shared.comparing).extend(unfinished);
    Ok(())
}

/// Forgets confirmed losses once a comparison has carried them over, inside a call.
pub fn forget_confirmed(c: &Connection) -> rusqlite::Result<()> {
    c.execute(
        "DELETE FROM meta WHERE k LIKE 'loss\\_confirmed:%' ESCAPE '\\'",
        [],
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use bson::doc;

    use super::*;
    use crate::key::Id;
    use crate::store::Store;
    use crate::store::base;
    use crate::store::queue::Change;

    fn change(n: i32, hint: &[u8]) -> Change {
        let id = Id::of(&doc! {"_id": n}.to_vec().unwrap()).unwrap();
        Change {
            key: Key::new(1, &id),
            id,
            hint: Some(hint.to_vec()),
        }
    }

    /// Queues deletions of local documents that base knows; each number is deleted at its time.
    async fn queued(gone: Vec<(i32, i64)>, both: bool) -> u64 {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store
            .call(move |c| {
                for (n, at) in gone {
                    let change = change(n, b"d");
                    base::put(c, &change.key, Some(&doc! {"_id": n}.to_vec().unwrap()))?;
                    queue::enqueue(c, Side::Local, std::slice::from_ref(&change), at)?;
                    if both {
                        queue::enqueue(c, Side::Remote, &[change], at)?;
                    }
                }
                deletions(c, Side::Local, 1)
            })
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn a_fortnight_of_deletions_is_no_mass_but_a_minute_of_them_is() {
        let minute = 60_000;
        let slow = (0..2000).map(|n| (n, (1_000 + i64::from(n) * 10) * minute));
        assert_eq!(queued(slow.collect(), false).await, 1);
        let fast = (0..2000).map(|n| (n, 1_000 * minute + i64::from(n) * 50));
        assert_eq!(queued(fast.collect(), false).await, 2000);
    }

    #[tokio::test]
    async fn what_both_sides_deleted_is_no_loss() {
        let gone = (0..500).map(|n| (n, 60_000)).collect();
        assert_eq!(queued(gone, true).await, 0);
    }

    #[tokio::test]
    async fn a_deletion_after_an_edit_counts_and_an_edit_after_it_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let counted = store.call(|c| {
            for n in 0..200 {
                let change = change(n, b"d");
                base::put(c, &change.key, Some(&doc! {"_id": n}.to_vec().unwrap()))?;
                let look = Change {
                    hint: None,
                    ..change.clone()
                };
                queue::enqueue(c, Side::Local, std::slice::from_ref(&look), 0)?;
                queue::enqueue(c, Side::Local, &[change], 60_000)?;
                if n < 50 {
                    queue::enqueue(c, Side::Local, &[look], 60_000)?;
                }
            }
            deletions(c, Side::Local, 1)
        });
        assert_eq!(counted.await.unwrap(), 150);
    }
}
