//! Which collections go over the link first, and which last (`[link] first`, `last`).
//!
//! A collection's rank is looked up when something is about to go, and kept nowhere: a new order
//! counts at once for all that waits. Within a rank, what was changed first goes first.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::future::Future;

use globset::{Glob, GlobMatcher};
use serde::{Deserialize, Serialize};

/// Place in the order; a smaller one goes first. The first of `[link] first` has 0.
pub type Rank = usize;

/// The order of collections.
#[derive(Debug, Default)]
pub struct Order {
    first: Vec<GlobMatcher>,
    last: Vec<GlobMatcher>,
}

/// Whether a collection goes before or after those that `[link]` does not name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Goes {
    /// Before them.
    First,
    /// After them.
    Last,
}

/// The numbers of collections of one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// Their rank.
    pub rank: Rank,
    /// Which ones; empty: all there are.
    pub namespaces: Vec<u32>,
}

impl Class {
    /// All collections, none before another.
    pub fn all() -> Self {
        Self {
            rank: 0,
            namespaces: vec![],
        }
    }
}

impl Order {
    /// An order by patterns; what neither list names goes between them.
    pub fn new(first: &[String], last: &[String]) -> Self {
        let all = |globs: &[String]| {
            let globs = globs.iter().filter_map(|g| Glob::new(g).ok());
            globs.map(|g| g.compile_matcher()).collect()
        };
        Self {
            first: all(first),
            last: all(last),
        }
    }

    /// Whether no collection goes before another one.
    pub fn is_level(&self) -> bool {
        self.first.is_empty() && self.last.is_empty()
    }

    /// The rank of a collection. GridFS files wait for their chunks (R15), so these go with them.
    pub fn rank(&self, db: &str, coll: &str) -> Rank {
        let own = self.rank_by_name(db, coll);
        match coll.strip_suffix(".chunks") {
            Some(bucket) => own.min(self.rank_by_name(db, &format!("{bucket}.files"))),
            None => own,
        }
    }

    /// Where a collection goes, for people.
    pub fn goes(&self, db: &str, coll: &str) -> Option<Goes> {
        match self.rank(db, coll).cmp(&self.first.len()) {
            Ordering::Less => Some(Goes::First),
            Ordering::Equal => None,
            Ordering::Greater => Some(Goes::Last),
        }
    }

    fn rank_by_name(&self, db: &str, coll: &str) -> Rank {
        let full = format!("{db}.{coll}");
        let place = |globs: &[GlobMatcher]| {
            let named = |g: &GlobMatcher| g.is_match(coll) || g.is_match(&full);
            globs.iter().position(named)
        };
        let between = self.first.len();
        place(&self.first)
            .or_else(|| place(&self.last).map(|n| between + 1 + n))
            .unwrap_or(between)
    }

    /// These collections by rank, best first; a single class of all where none goes before another.
    pub fn classes(
        &self,
        namespaces: impl IntoIterator<Item = (u32, (String, String))>,
    ) -> Vec<Class> {
        if self.is_level() {
            return vec![Class::all()];
        }
        let mut by_rank: BTreeMap<Rank, Vec<u32>> = BTreeMap::new();
        for (n, (db, coll)) in namespaces {
            by_rank.entry(self.rank(&db, &coll)).or_default().push(n);
        }
        let classes = by_rank.into_iter().map(|(rank, mut namespaces)| {
            namespaces.sort_unstable();
            Class { rank, namespaces }
        });
        let classes: Vec<Class> = classes.collect();
        match classes.is_empty() {
            true => vec![Class::all()],
            false => classes,
        }
    }
}

tokio::task_local! {
    static RANK: Rank;
}

/// Does some work at a rank: what it sends waits behind better ones where the link's budget is short.
pub async fn at<F: Future>(rank: Rank, work: F) -> F::Output {
    RANK.scope(rank, work).await
}

/// The rank of the work at hand; what has none goes with the best.
pub fn rank() -> Rank {
    RANK.try_with(|rank| *rank).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(first: &[&str], last: &[&str]) -> Order {
        let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        Order::new(&owned(first), &owned(last))
    }

    #[test]
    fn the_lists_say_who_goes_before_whom() {
        let order = order(&["bookings", "pay*"], &["temple.scans", "logs", "*"]);
        let rank = |coll| order.rank("temple", coll);
        assert_eq!(rank("bookings"), 0);
        assert_eq!(rank("payments"), 1);
        assert_eq!((rank("scans"), rank("logs"), rank("guests")), (3, 4, 5));
        assert_eq!(order.goes("temple", "payments"), Some(Goes::First));
        assert_eq!(order.goes("temple", "guests"), Some(Goes::Last));
        // Whoever is first is not last as well.
        assert_eq!(order.rank("other", "scans"), 5);
    }

    #[test]
    fn chunks_go_with_their_files() {
        let order = order(&["photos.files"], &["films.chunks", "films.files"]);
        assert_eq!(order.rank("d", "photos.chunks"), 0);
        assert_eq!(order.rank("d", "films.chunks"), 2);
        assert_eq!(order.rank("d", "films.files"), 3);
    }

    #[test]
    fn classes_are_ranks_in_use() {
        let named = |n: u32, coll: &str| (n, ("d".to_owned(), coll.to_owned()));
        let all = || {
            [
                named(3, "logs"),
                named(2, "guests"),
                named(1, "rooms"),
                named(9, "bookings"),
            ]
        };
        let class = |rank, namespaces: &[u32]| Class {
            rank,
            namespaces: namespaces.to_vec(),
        };
        let found = order(&["bookings", "nothing"], &["logs"]).classes(all());
        assert_eq!(found, [class(0, &[9]), class(2, &[1, 2]), class(3, &[3])]);
        assert_eq!(Order::default().classes(all()), [class(0, &[])]);
        assert_eq!(order(&["a"], &[]).classes([]), [class(0, &[])]);
    }

    #[tokio::test]
    async fn work_knows_its_rank() {
        assert_eq!(rank(), 0);
        assert_eq!(at(3, async { rank() }).await, 3);
    }
}
