//! One pass over a database: its collections, cut into ranges, several compared at once.
//!
//! A range is on disk before it is compared and marked when its documents are in base or queue, so an
//! interrupted pass goes on with what is left. What changes behind it comes by the streams.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use chrono::Utc;
use futures::StreamExt as _;
use tokio::task::JoinSet;

use super::cutter::Cutter;
use super::range::RangeTask;
use super::{collections, gone};
use crate::decide::Side;
use crate::failure::{Failure, Reason};
use crate::key::Id;
use crate::loss;
use crate::order::{self, Class, Rank};
use crate::progress::Meter;
use crate::selection;
use crate::settle::store_failed;
use crate::shared::{Settings, Shared, lock};
use crate::store::walks::{self, Part, Tally};
use crate::store::{self, StoreError, lanes, queue};
use crate::walk::Place;

/// Ranges compared at once.
const AT_ONCE: usize = 4;

/// Collections whose sizes are asked for at once.
const ASKED_AT_ONCE: usize = 8;

/// While more documents than this wait in a queue, nothing is compared: they would only fill the disk.
const WAITING: u32 = 20_000;

/// A collection whose queue does not move for so long is not waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// The same for those of a better rank, whose documents may be slow to go.
const MORE_PATIENCE: Duration = Duration::from_secs(60);

/// Name under which a collection's first comparison is on record until it is over.
pub(crate) fn first_name(ns: u32) -> String {
    format!("first:{ns}")
}

/// Name under which the `_id` is kept up to which a collection was compared exactly.
fn exact_name(ns: u32) -> String {
    format!("exact:{ns}")
}

/// Loads which collections are in their first sync.
pub(crate) async fn load(shared: &Shared) -> Result<(), StoreError> {
    let found: Vec<u32> = shared
        .store
        .call(|c| {
            let mut names = c.prepare("SELECT k FROM meta WHERE k LIKE 'first:%'")?;
            let names = names.query_map([], |r| r.get::<_, String>(0))?;
            let numbers = names.map(|n| Ok(n?.trim_start_matches("first:").parse().unwrap_or(0)));
            numbers.collect()
        })
        .await?;
    lock(&shared.first_sync).extend(found);
    Ok(())
}

/// A collection to be compared.
struct Collection {
    place: Arc<Place>,
    db: String,
    name: String,
    /// Its number in the meter.
    number: usize,
    first: bool,
    /// Base knows it, but its events were missed.
    missed: bool,
    /// Its place in the order.
    rank: Rank,
}

/// Compares one database with base; what differs is queued when this returns.
pub(super) async fn compare(shared: &Arc<Shared>, db: &str, why: &str) -> Result<i64, Failure> {
    let settings = shared.settings();
    let (name, reason) = (db.to_owned(), why.to_owned());
    let now = Utc::now().timestamp_millis() + shared.offset(Side::Remote);
    let began = shared
        .store
        .call(move |c| walks::begin(c, &name, &reason, now))
        .await
        .map_err(store_failed)?;
    let pass = Pass {
        shared,
        settings: &settings,
        db,
        why,
    };
    let all = pass.open().await?;
    let mut work: VecDeque<(&Collection, bool)> = all
        .iter()
        .map(|c| (c, c.first || c.missed || super::reads_all(why)))
        .collect();
    while !work.is_empty() {
        pass.drive(&work).await?;
        let mut again = VecDeque::new();
        for (collection, exact) in work {
            if pass.finish(collection, exact).await? == Outcome::BaseLacks {
                again.push_back((collection, true));
            }
        }
        work = again;
    }
    Ok(began)
}

/// A comparison of a database is over, and all that differed is settled: inside the call that drops the
/// flag which asked for it.
pub(super) fn forget(c: &rusqlite::Connection, db: &str) -> rusqlite::Result<()> {
    walks::forget(c, db)?;
    c.execute(
        "DELETE FROM meta WHERE k IN (SELECT 'first:' || n FROM namespaces WHERE db = ?)",
        [db],
    )?;
    Ok(())
}

#[derive(PartialEq, Eq)]
enum Outcome {
    Done,
    /// There are equal documents that base does not know: they have to be read.
    BaseLacks,
}

struct Pass<'a> {
    shared: &'a Arc<Shared>,
    settings: &'a Settings,
    db: &'a str,
    why: &'a str,
}

impl Pass<'_> {
    /// The collections to be compared, with their sizes; those that vanished are halted.
    async fn open(&self) -> Result<Vec<Collection>, Failure> {
        let (shared, settings) = (self.shared, self.settings);
        let (db, since) = (self.db.to_owned(), Instant::now());
        let known = shared.store.call(move |c| loss::known(c, &db)).await;
        let known = known.map_err(store_failed)?;
        let here = collections(shared, settings, Side::Local, self.db).await?;
        let there = collections(shared, settings, Side::Remote, self.db).await;
        shared.note(Side::Remote, &there);
        let there = there?;
        let names = [here.as_slice(), &there];
        loss::before_comparison(shared, settings, (self.db, known), names, since).await?;
        let names: BTreeSet<String> = here.into_iter().chain(there).collect();
        let mut known = Vec::new();
        for name in names {
            let ns = shared
                .store
                .namespace(self.db, &name)
                .await
                .map_err(store_failed)?;
            if !lock(&shared.halted).contains(ns) {
                known.push((name, ns, self.begin(ns).await?));
            }
        }
        known.sort_by_cached_key(|(name, ..)| settings.order.rank(self.db, name));
        let places = known.into_iter().map(|(name, ns, first)| async move {
            let place = Place::open(shared, settings, (self.db, &name), ns).await;
            place.map(|place| (name, place, first))
        });
        let places: Vec<_> = futures::stream::iter(places)
            .buffered(ASKED_AT_ONCE)
            .collect()
            .await;
        let mut all = Vec::new();
        for place in places {
            let (name, place, (first, missed)) = place?;
            let ns = place.ns();
            let parts = shared.store.call(move |c| walks::parts(c, ns)).await;
            let tallies = parts.map_err(store_failed)?;
            let tallies = tallies.iter().filter_map(|part| part.done);
            let (documents, bytes) =
                tallies.fold((0, 0), |(d, b), t| (d + t.documents, b + t.bytes));
            let shown = settings.display(self.db, &name);
            let total = place.size().documents;
            let number = lock(&shared.progress)
                .as_mut()
                .map_or(0, |m: &mut Meter| m.open(shown, total, documents, bytes));
            all.push(Collection {
                place: Arc::new(place),
                db: self.db.to_owned(),
                rank: settings.order.rank(self.db, &name),
                name,
                number,
                first,
                missed,
            });
        }
        Ok(all)
    }

    /// Whether this is the collection's first sync; if so, it is on record until that is over. And
    /// whether its events were missed.
    async fn begin(&self, ns: u32) -> Result<(bool, bool), Failure> {
        let asked = self.why == super::FIRST_SYNC;
        let found = self.shared.store.call(move |c| {
            let name = first_name(ns);
            let first =
                asked || store::get_meta::<i64>(c, &name)?.is_some() || !walks::has_base(c, ns)?;
            if first {
                store::set_meta(c, &name, 1)?;
            }
            Ok((first, selection::is_missed(c, ns)?))
        });
        let (first, missed) = found.await.map_err(store_failed)?;
        if first {
            lock(&self.shared.first_sync).insert(ns);
        }
        Ok((first, missed))
    }

    /// Compares all that is left of these collections.
    async fn drive(&self, work: &VecDeque<(&Collection, bool)>) -> Result<(), Failure> {
        let mut tasks: JoinSet<Result<(), Failure>> = JoinSet::new();
        let mut before: Option<Rank> = None;
        for (collection, exact) in work {
            let rank = collection.rank;
            if before.replace(rank).is_some_and(|before| before < rank) {
                // What goes before is compared and gone before anything else takes of the link.
                while let Some(task) = tasks.join_next().await {
                    ended(Some(task))?;
                }
                self.room(rank, false).await?;
            }
            let ns = collection.place.ns();
            let parts = self.shared.store.call(move |c| walks::parts(c, ns)).await;
            let parts = parts.map_err(store_failed)?;
            let open = parts.iter().filter(|p| p.done.is_none()).cloned();
            let mut open: VecDeque<Part> = open.collect();
            let mut cutter = self.cutter(collection, *exact, &parts).await?;
            loop {
                let part = match open.pop_front() {
                    Some(part) => part,
                    None => match cutter.cut().await? {
                        Some(part) => part,
                        None => break,
                    },
                };
                self.room(rank, true).await?;
                while tasks.len() >= AT_ONCE {
                    ended(tasks.join_next().await)?;
                }
                let task = RangeTask {
                    shared: self.shared.clone(),
                    place: collection.place.clone(),
                    part,
                    first: collection.first,
                    number: collection.number,
                };
                tasks.spawn(order::at(rank, task.run()));
            }
        }
        while let Some(task) = tasks.join_next().await {
            ended(Some(task))?;
        }
        Ok(())
    }

    async fn cutter(
        &self,
        collection: &Collection,
        exact: bool,
        parts: &[Part],
    ) -> Result<Cutter, Failure> {
        let place = &collection.place;
        let nights = self.settings.config.pull.exact_nights;
        let share = place.size().documents.div_ceil(nights.max(1));
        let ns = place.ns();
        let at = self.shared.store.get_meta::<Vec<u8>>(&exact_name(ns)).await;
        let start = at.map_err(store_failed)?.map(|id| Id::from_bytes(&id));
        let rotates = !exact && self.why == super::SCHEDULED && nights > 0;
        let cut: u64 = parts.iter().filter(|p| p.exact).count() as u64;
        let share = (share + place.exact_range()).saturating_sub(cut * place.exact_range());
        let documents = match (exact, rotates) {
            (true, _) => u64::MAX,
            (false, true) => share,
            (false, false) => 0,
        };
        let start = start.filter(|_| rotates);
        Ok(Cutter::new(self.shared, place, start, documents, parts))
    }

    /// Waits while much is queued of this rank and better ones, or while anything is of better ones
    /// alone; an error when there is no use to wait.
    async fn room(&self, rank: Rank, own: bool) -> Result<(), Failure> {
        let (most, patience) = match own {
            true => (WAITING, PATIENCE),
            false => (0, MORE_PATIENCE),
        };
        let counts = |class: &Class| class.rank < rank || own && class.rank == rank;
        let (mut least, mut since) = (u64::MAX, tokio::time::Instant::now());
        loop {
            if self.shared.paused.load(Ordering::Relaxed) {
                return Err(Failure::paused());
            }
            if self.shared.cancel.is_cancelled() || !self.shared.may_work() {
                let reason = self.shared.link.snapshot().reason;
                return Err(Failure::offline(reason.unwrap_or(Reason::Offline)));
            }
            if self.shared.is_quiet() {
                since = tokio::time::Instant::now();
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
            let mut classes = self.shared.classes();
            classes.retain(counts);
            let waiting = self.shared.store.call(move |c| {
                let waiting = |class: &Class| lanes::count(c, &class.namespaces, most + 1);
                classes.iter().map(waiting).sum::<rusqlite::Result<u64>>()
            });
            let waiting = waiting.await.map_err(store_failed)?;
            if waiting < least {
                (least, since) = (waiting, tokio::time::Instant::now());
            }
            // Rows of a halted collection stay: they must not stop the others.
            if waiting <= u64::from(most) || since.elapsed() > patience {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// All ranges of a collection are compared: queues what is gone.
    async fn finish(&self, collection: &Collection, exact: bool) -> Result<Outcome, Failure> {
        let (shared, ns) = (self.shared, collection.place.ns());
        let first = collection.first;
        let counted = shared.store.call(move |c| {
            let parts = walks::parts(c, ns)?;
            let tallies = parts.iter().filter_map(|p| p.done);
            let tally = tallies.fold(Tally::default(), |sum, t| Tally {
                documents: sum.documents + t.documents,
                known: sum.known + t.known,
                bytes: sum.bytes + t.bytes,
            });
            let in_base = if first { 0 } else { walks::count_base(c, ns)? };
            // Documents in conflict have no base, and need none.
            let queued = if tally.documents > in_base {
                queue::count_of(c, ns)?
            } else {
                0
            };
            Ok((parts, tally, in_base, queued))
        });
        let (parts, tally, in_base, queued) = counted.await.map_err(store_failed)?;
        if !first && !exact && in_base + queued < tally.documents {
            tracing::info!(
                collection = collection.name,
                "more documents than are known; reading all of them"
            );
            let forgotten = shared.store.call(move |c| walks::forget_parts(c, ns));
            forgotten.await.map_err(store_failed)?;
            return Ok(Outcome::BaseLacks);
        }
        if !first && in_base > tally.known {
            gone::queue_vanished(shared, (&collection.db, &collection.name), ns).await?;
        }
        let losses = gone::losses(shared, ns).await?;
        if losses != gone::Losses::default() {
            tracing::info!(
                collection = collection.name,
                local = losses.local,
                remote = losses.remote,
                known = losses.known,
                "documents were deleted while nobody looked"
            );
        }
        // Until all of them are queued, none is carried over: it is their number that counts.
        lock(&shared.comparing).insert(ns);
        gone::queue(shared, ns).await?;
        lock(&shared.comparing).remove(&ns);
        if let Some(last) = parts.iter().rfind(|p| p.exact && !exact) {
            let at = last.range.to.as_ref().map(Id::to_bytes);
            let stored = shared.store.set_meta(&exact_name(ns), at).await;
            stored.map_err(store_failed)?;
        }
        if let Some(meter) = lock(&shared.progress).as_mut() {
            meter.finish(collection.number);
        }
        Ok(Outcome::Done)
    }
}

fn ended(task: Option<Result<Result<(), Failure>, tokio::task::JoinError>>) -> Result<(), Failure> {
    match task {
        None => Ok(()),
        Some(Ok(outcome)) => outcome,
        Some(Err(e)) if e.is_cancelled() => Err(Failure::offline(Reason::Offline)),
        Some(Err(e)) => Err(Failure::fatal(format!("comparing a range panicked: {e}"))),
    }
}
