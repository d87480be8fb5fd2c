//! Where both queues are to be read on, by the rank of collections.
//!
//! Better ranks are claimed first, and no batch has documents of two ranks, unless one transaction
//! wrote them. Of every [`AGED`] batches one takes what has waited longest, whatever its rank, so that
//! a stream of better ones stops nobody for ever.

use std::sync::{Arc, Mutex};

use rusqlite::Connection;

use crate::decide::Side;
use crate::failure::Failure;
use crate::key::KeySet;
use crate::order::{Class, Rank};
use crate::shared::{Shared, lock};
use crate::store::claim::{self, Claim};
use crate::store::lanes;
use crate::store::queue::Work;

/// One batch of so many is claimed by age.
const AGED: usize = 8;

/// Where a queue is to be read on.
#[derive(Clone, Copy, Debug, Default)]
struct Head {
    after: i64,
    /// Nothing was found to the end since the last wake-up.
    at_end: bool,
}

/// Collections of one rank with a head for each queue.
#[derive(Debug)]
struct Lane {
    class: Class,
    /// By side: local, remote.
    heads: [Head; 2],
}

impl Lane {
    fn new(class: Class) -> Self {
        Self {
            class,
            heads: Default::default(),
        }
    }
}

/// What may be claimed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Most documents.
    pub(super) most: usize,
    /// Only ranks better than this one.
    pub(super) better_than: Option<Rank>,
    /// Whether it may be the turn of what has waited longest.
    pub(super) aged: bool,
}

impl Limits {
    fn bars(&self, rank: Rank) -> bool {
        self.better_than.is_some_and(|best| rank >= best)
    }
}

/// A claimed batch.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) works: Vec<Work>,
    /// The best rank in it.
    pub(super) rank: Rank,
    /// Whether it was claimed by age.
    pub(super) aged: bool,
}

/// The heads of both queues, by rank.
#[derive(Debug)]
pub(super) struct Heads {
    /// Best rank first. Never empty.
    lanes: Vec<Lane>,
    /// All collections, by age.
    oldest: Lane,
    /// Batches claimed since the last one by age.
    since_aged: usize,
    /// The queue that comes first: they take turns, so that a long one does not starve the other.
    turn: Side,
    /// Whether the store has the indexes for more than one lane; `None`: not known.
    indexed: Option<bool>,
}

impl Heads {
    /// Remote changes come first, they are fewer as a rule.
    pub(super) fn new() -> Self {
        Self {
            lanes: vec![Lane::new(Class::all())],
            oldest: Lane::new(Class::all()),
            since_aged: 0,
            turn: Side::Remote,
            indexed: None,
        }
    }

    /// From the beginning.
    pub(super) fn restart(&mut self) {
        for lane in self.all() {
            lane.heads = Default::default();
        }
    }

    /// Something came, was put back, or let go of a key: all ends are worth a look again.
    pub(super) fn wake(&mut self) {
        for lane in self.all() {
            lane.heads.iter_mut().for_each(|head| head.at_end = false);
        }
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Lane> {
        self.lanes.iter_mut().chain([&mut self.oldest])
    }

    /// Takes the order and the collections as they are now.
    fn arrange(&mut self, classes: Vec<Class>) {
        if !classes.iter().eq(self.lanes.iter().map(|lane| &lane.class)) {
            self.lanes = classes.into_iter().map(Lane::new).collect();
        }
    }

    /// The next batch.
    pub(super) async fn claim(
        &mut self,
        shared: &Arc<Shared>,
        limits: Limits,
    ) -> Result<Option<Batch>, Failure> {
        self.arrange(shared.classes());
        if limits.bars(self.lanes[0].class.rank) {
            return Ok(None);
        }
        let what = super::what(shared, limits.most);
        let mut heads = std::mem::replace(self, Self::new());
        let (context, taken) = (shared.clone(), Arc::new(Mutex::new(Vec::new())));
        let noted = taken.clone();
        let claimed = shared
            .store
            .call(move |c| {
                let batch = heads.claim_in(c, what, limits, &mut lock(&context.busy))?;
                let works = batch.iter().flat_map(|batch| &batch.works);
                lock(&noted).extend(works.map(|work| work.key.clone()));
                Ok((heads, batch))
            })
            .await;
        match claimed {
            Ok((heads, batch)) => {
                *self = heads;
                Ok(batch)
            }
            Err(error) => {
                // The claim was not committed: nobody works on these.
                let mut busy = lock(&shared.busy);
                for key in lock(&taken).iter() {
                    busy.remove(key);
                }
                Err(crate::settle::store_failed(error))
            }
        }
    }

    fn claim_in(
        &mut self,
        c: &Connection,
        mut what: Claim,
        limits: Limits,
        busy: &mut KeySet,
    ) -> rusqlite::Result<Option<Batch>> {
        let ranked = self.lanes.len() > 1;
        if self.indexed != Some(ranked) {
            lanes::index(c, ranked)?;
            self.indexed = Some(ranked);
        }
        let by_age = ranked && limits.aged && self.since_aged >= AGED - 1;
        if by_age && let Some(works) = self.oldest.claim(c, &mut what, self.turn, busy)? {
            self.since_aged = 0;
            return Ok(Some(self.batch(works, true)));
        }
        for n in 0..self.lanes.len() {
            let lane = &mut self.lanes[n];
            if limits.bars(lane.class.rank) {
                break;
            }
            if let Some(works) = lane.claim(c, &mut what, self.turn, busy)? {
                self.since_aged += 1;
                return Ok(Some(self.batch(works, false)));
            }
        }
        Ok(None)
    }

    fn batch(&mut self, (of, works): (Side, Vec<Work>), aged: bool) -> Batch {
        self.turn = of.other();
        let has = |class: &Class| {
            let named = |work: &Work| class.namespaces.contains(&work.key.ns());
            class.namespaces.is_empty() || works.iter().any(named)
        };
        let best = self.lanes.iter().find(|lane| has(&lane.class));
        let rank = best.map_or(0, |lane| lane.class.rank);
        Batch { works, rank, aged }
    }
}

impl Lane {
    /// The next documents of either queue, and of which.
    fn claim(
        &mut self,
        c: &Connection,
        what: &mut Claim,
        turn: Side,
        busy: &mut KeySet,
    ) -> rusqlite::Result<Option<(Side, Vec<Work>)>> {
        what.only.clone_from(&self.class.namespaces);
        for of in [turn, turn.other()] {
            let head = &mut self.heads[of as usize];
            if head.at_end {
                continue;
            }
            (what.of, what.after) = (of, head.after);
            let (works, next) = claim::claim(c, what, busy)?;
            match next {
                Some(after) => head.after = after,
                None => {
                    // Rows that were busy or put off stand before the end: the next round sees them.
                    head.after = 0;
                    head.at_end = works.is_empty();
                }
            }
            if !works.is_empty() {
                return Ok(Some((of, works)));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
#[path = "heads_tests.rs"]
mod tests;
