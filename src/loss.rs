//! Losses: deletions that come in masses, and collections that are gone (R13).
//!
//! A deletion is carried over like any other change, unless too much goes at once: more than
//! `sync.mass_delete_percent` of a collection, and at least [`FEWEST`] documents. What counts is what
//! waits in the queue, not what one batch happens to hold: a growing crowd of deletions is let grow up
//! first. Of a long queue only what was deleted within about two minutes counts together, so that a
//! fortnight of ordinary deletions, made offline, is no mass. What one side has lost for good reasons
//! and a person has confirmed passes.

mod count;
mod gone;

pub(crate) use count::is_mass;
use count::{any_unknown, deletions};
pub(crate) use gone::{before_comparison, count_on, known};
use gone::{gone, is_gone};

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use crate::batch::{Item, Namespace, Planned, State};
use crate::config::OnDrop;
use crate::decide::{Kind, Side};
use crate::failure::Failure;
use crate::halt;
use crate::key::{Key, KeySet};
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

/// Takes deletions out of a batch that must not be carried over without a person's word, or not yet; or
/// that were planned by what was so before a person gave it.
pub(crate) async fn hold(
    shared: &Arc<Shared>,
    items: &mut [Item],
    planned: &mut Vec<Planned>,
) -> Result<(), Failure> {
    let since = Instant::now();
    let overtaken = mark(shared, items, planned).await?;
    let mut left: HashMap<Duration, Vec<Work>> = HashMap::new();
    take_out(items, planned, &mut left, |_, key| {
        overtaken.contains(key).then_some(Duration::ZERO)
    });
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
            let verdict = judge(shared, (from, since), ns, count).await?;
            let decided = lock(&shared.halted).was_lifted(ns.number, since);
            entry.insert(match decided {
                true => Verdict::Hold(QUIET),
                false => verdict,
            });
        }
    }
    take_out(items, planned, &mut left, |from, key| {
        match verdicts.get(&(from, key.ns())) {
            Some(Verdict::Hold(wait)) => Some(*wait),
            _ => None,
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

/// Takes deletions out of a batch, by the side where they happened and the key, that are to wait.
fn take_out(
    items: &mut [Item],
    planned: &mut Vec<Planned>,
    left: &mut HashMap<Duration, Vec<Work>>,
    wait: impl Fn(Side, &Key) -> Option<Duration>,
) {
    planned.retain(|p| {
        let item = &mut items[p.item];
        let deletes = p.write.new.is_none();
        match wait(p.side.other(), &item.work.key) {
            Some(wait) if deletes => {
                item.state = State::Done;
                left.entry(wait).or_default().push(item.work.claim_only());
                false
            }
            _ => true,
        }
    });
}

/// Marks the rows of deletions as such before any is judged: one that only said "look" would not be
/// among those that wait, and a loss that comes in several batches would be judged by one of them.
/// Returns the keys whose rows are others by now than those that were claimed: there is news of them,
/// a person's decision that they shall come back, perhaps.
async fn mark(
    shared: &Arc<Shared>,
    items: &[Item],
    planned: &[Planned],
) -> Result<KeySet, Failure> {
    let claims: Vec<(Side, Key, Option<i64>)> = (planned.iter())
        .filter(|p| p.write.new.is_none())
        .map(|p| {
            let (from, work) = (p.side.other(), &items[p.item].work);
            let row = match from {
                Side::Local => &work.outbox,
                Side::Remote => &work.inbox,
            };
            (from, work.key.clone(), row.as_ref().map(|row| row.seq))
        })
        .collect();
    if claims.is_empty() {
        return Ok(KeySet::default());
    }
    let marking = shared.store.call(move |c| {
        let (mut marked, mut overtaken) = (HashSet::new(), KeySet::default());
        for (from, key, claimed) in claims {
            if queue::get_row(c, from, &key)?.map(|row| row.seq) != claimed {
                overtaken.insert(key);
            } else if let Some(seq) = claimed
                && queue::mark_gone(c, from, &key, seq)?
            {
                marked.insert((from, key.ns()));
            }
        }
        Ok((marked, overtaken))
    });
    let (marked, overtaken) = marking.await.map_err(store_failed)?;
    let mut losses = lock(&shared.losses);
    for (from, n) in marked {
        losses.of(from, n).changed = Instant::now();
    }
    Ok(overtaken)
}

async fn judge(
    shared: &Arc<Shared>,
    (from, since): (Side, Instant),
    ns: &Namespace,
    count: u64,
) -> Result<Verdict, Failure> {
    let n = ns.number;
    if lock(&shared.halted).contains(n) {
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
    shared.failpoints.stall("judged").await;
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
        gone(shared, &settings, (from, n), (&ns.db, &ns.coll), since).await?;
        return Ok(Verdict::Hold(QUIET));
    }
    if lock(&shared.comparing).contains(&n) {
        // How much is gone is known when the comparison is through.
        return Ok(Verdict::Hold(COMPARED));
    }
    mass(shared, &settings, (from, since), ns, count).await
}

/// Whether the drop of a collection is told by a stream.
fn tells(shared: &Shared, side: Side) -> bool {
    side == Side::Local || shared.follows()
}

/// Judges by number.
async fn mass(
    shared: &Arc<Shared>,
    settings: &Settings,
    (from, since): (Side, Instant),
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
    halt::put_in_place(shared, what, (Kind::MassDelete, from), since, why)
        .await
        .map_err(store_failed)?;
    Ok(Verdict::Hold(QUIET))
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
