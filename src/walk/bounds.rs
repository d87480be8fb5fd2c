//! Where a collection is cut into ranges.
//!
//! Exactly ([`Place::bound`]), a server walks its `_id` index over all that is in a range. Of a large
//! collection a sample tells well enough ([`Place::bounds`]), for a hundredth of that work.

use std::sync::Arc;

use crate::failure::Failure;
use crate::key::{Id, Key};
use crate::raw::{self, Writer, index_name};
use crate::side::Endpoint;

use super::{Place, Range};

/// Sampled documents that make a range: the number of documents in a range then varies by a quarter.
const A_RANGE: u64 = 16;

/// A collection of fewer ranges is cut exactly: the work is small.
const FEWEST: u64 = 4;

/// Most documents that are sampled; a collection of more ranges than these make is cut exactly.
const MOST: u64 = 16_384;

/// Most bytes of sampled `_id`s: they go back to a server, to be put in order.
const MOST_BYTES: usize = 8 << 20;

impl Place {
    /// Cuts all that comes after an `_id` (or all there is) into ranges of about so many documents of
    /// either side: where each but the last one ends, in order. `None` where a sample would not do.
    pub async fn bounds(
        &self,
        after: Option<&Id>,
        documents: u64,
    ) -> Result<Option<Vec<Id>>, Failure> {
        let wanted = self.size.documents / documents.max(1);
        if wanted < FEWEST || wanted * 2 * A_RANGE > MOST {
            return Ok(None);
        }
        let share = |of: u64| of * A_RANGE / documents.max(1);
        let (here, there) = tokio::join!(
            self.sample(&self.local, share(self.counts[0])),
            self.sample(&self.remote, share(self.counts[1]))
        );
        let (here, there) = match (here, there) {
            (Err(f), _) | (_, Err(f)) if f.is_refusal() => return Ok(None),
            (here, there) => (here?, there?),
        };
        if here
            .iter()
            .chain(&there)
            .map(|id| id.value.len())
            .sum::<usize>()
            > MOST_BYTES
        {
            return Ok(None);
        }
        // Which comes first is a server's to say: one that has documents of this collection.
        let endpoint = if here.is_empty() {
            &self.remote
        } else {
            &self.local
        };
        let marked = [
            after.map(std::slice::from_ref).unwrap_or_default(),
            &here,
            &there,
        ];
        let sorted = self.sorted(endpoint, marked).await?;
        Ok(Some(cut(self.ns, sorted)))
    }

    /// The `_id`s of about `n` documents, each about as likely as any other. Asked once, a server (seen on
    /// 6.0.5) that has just taken in many prefers some of them by ten times, and arranges them meanwhile
    /// so that the next answer is even: the second one counts.
    async fn sample(&self, endpoint: &Arc<Endpoint>, n: u64) -> Result<Vec<Id>, Failure> {
        self.sample_once(endpoint, n).await?;
        self.sample_once(endpoint, n).await
    }

    async fn sample_once(&self, endpoint: &Arc<Endpoint>, n: u64) -> Result<Vec<Id>, Failure> {
        let mut found = Vec::new();
        if n == 0 {
            return Ok(found);
        }
        let mut w = Writer::new();
        w.str("aggregate", &self.coll).open_array("pipeline");
        w.open("0").open("$sample");
        w.value("size", 0x12, &n.to_le_bytes()).close().close();
        w.open("1").open("$project").i32("_id", 1).close().close();
        w.close().open("cursor").i32("batchSize", 10_000).close();
        let asked = endpoint.query(&self.db, w.command(), |d| {
            found.extend(Id::of(d.as_bytes()))
        });
        asked.await?;
        Ok(found)
    }

    /// Three lists of `_id`s as one, in a server's order; each with the number of its list.
    async fn sorted(
        &self,
        endpoint: &Arc<Endpoint>,
        lists: [&[Id]; 3],
    ) -> Result<Vec<(usize, Id)>, Failure> {
        let mut w = Writer::new();
        w.str("aggregate", &self.coll).open_array("pipeline");
        w.open("0").i32("$limit", 1).close();
        w.open("1")
            .open("$project")
            .i32("_id", 0)
            .open("all")
            .open_array("$literal");
        let all = lists
            .iter()
            .enumerate()
            .flat_map(|(of, ids)| ids.iter().map(move |id| (of, id)));
        for (i, (of, id)) in (0..).zip(all) {
            w.open(index_name(i)).value("id", id.kind, &id.value);
            w.i32("of", i32::try_from(of).unwrap_or(0)).close();
        }
        w.close().close().close().close();
        w.open("2").str("$unwind", "$all").close();
        w.open("3").open("$sort").i32("all.id", 1).close().close();
        w.open("4").str("$replaceWith", "$all").close();
        w.close().open("cursor").i32("batchSize", 10_000).close();
        let mut sorted = Vec::new();
        let asked = endpoint.query(&self.db, w.command(), |d| {
            let of = raw::get(d.as_bytes(), b"of").and_then(|e| e.value.first().copied());
            let id = raw::get(d.as_bytes(), b"id").map(|e| Id::from_element(&e));
            if let (Some(of), Some(id)) = (of, id) {
                sorted.push((usize::from(of), id));
            }
        });
        asked.await?;
        Ok(sorted)
    }

    /// Where a range that begins at `from` ends if neither side shall have more than `documents` in
    /// it; `None`: they have no more than that up to `to`. One question to each side.
    pub async fn bound(
        &self,
        from: Option<&Id>,
        to: Option<&Id>,
        documents: u64,
    ) -> Result<Option<Id>, Failure> {
        let within = Range {
            from: from.cloned(),
            to: to.cloned(),
        };
        let (local, remote) = tokio::join!(
            self.nth(&self.local, &within, documents),
            self.nth(&self.remote, &within, documents)
        );
        let (here, there) = match (local?, remote?) {
            (Some(here), Some(there)) => (here, there),
            (here, there) => return Ok(here.or(there)),
        };
        if here == there {
            return Ok(Some(here));
        }
        // Which comes first is the server's to say.
        let before = Range {
            from: from.cloned(),
            to: Some(there.clone()),
        };
        let sooner = self.nth(&self.local, &before, documents).await?;
        Ok(Some(sooner.unwrap_or(there)))
    }

    /// The `_id` behind the first `n` of a range; `None` where there are no more.
    pub(super) async fn nth(
        &self,
        endpoint: &Arc<Endpoint>,
        range: &Range,
        n: u64,
    ) -> Result<Option<Id>, Failure> {
        let mut w = self.find(range);
        w.open("projection").i32("_id", 1).close();
        w.value("skip", 0x12, &n.to_le_bytes()).i32("limit", 1);
        let mut found = None;
        let asked = endpoint.query(&self.db, w.command(), |d| found = Id::of(d.as_bytes()));
        asked.await?;
        Ok(found)
    }
}

/// Ends a range wherever enough has come of either side. List 0 holds where all of it begins.
fn cut(ns: u32, sorted: Vec<(usize, Id)>) -> Vec<Id> {
    let (mut counts, mut last, mut bounds) = ([0u64; 3], None, Vec::new());
    for (of, id) in sorted {
        let key = Key::new(ns, &id);
        counts[of] += 1;
        if of == 0 {
            (counts, last, bounds) = ([0; 3], Some(key), Vec::new());
        } else if counts[1].max(counts[2]) >= A_RANGE && last.as_ref() != Some(&key) {
            (counts, last) = ([0; 3], Some(key));
            bounds.push(id);
        }
    }
    bounds
}

#[cfg(test)]
mod tests {
    use bson::doc;

    use super::*;

    fn id(n: i32) -> Id {
        Id::of(&doc! {"_id": n}.to_vec().unwrap()).unwrap()
    }

    fn cut_at(sorted: impl IntoIterator<Item = (usize, i32)>) -> Vec<Id> {
        cut(1, sorted.into_iter().map(|(of, n)| (of, id(n))).collect())
    }

    #[test]
    fn a_range_ends_where_enough_has_come_of_either_side() {
        let one_side = (1..=40).map(|n| (1, n));
        assert_eq!(cut_at(one_side), [id(16), id(32)]);
        let both = (1..=40).map(|n| (1 + (n % 2) as usize, n));
        assert_eq!(cut_at(both), [id(31)]);
        let apart = (1..=40).map(|n| (if n <= 20 { 1 } else { 2 }, n));
        assert_eq!(cut_at(apart), [id(16), id(36)]);
    }

    #[test]
    fn it_begins_behind_what_was_cut_before_and_no_range_is_empty() {
        let behind = (1..=40).map(|n| (usize::from(n != 20), n));
        assert_eq!(cut_at(behind), [id(36)]);
        // A sample may hold a document several times.
        let again = std::iter::repeat_n((1, 7), 40);
        assert_eq!(cut_at(again), [id(7)]);
        let begin = std::iter::once((0, 7)).chain(std::iter::repeat_n((2, 7), 40));
        assert_eq!(cut_at(begin), []);
    }
}
