//! How far a comparison of the databases is: counted by whoever compares, shown by status and log.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::command::{CollectionProgress, Progress};

/// The rate is that of the last so many samples, a second apart.
const SAMPLES: usize = 15;

/// Time between two samples.
const SAMPLE: Duration = Duration::from_secs(1);

/// How often a long comparison says in the log how far it is.
const SAY: Duration = Duration::from_secs(60);

/// Counts of a comparison at work.
#[derive(Debug)]
pub struct Meter {
    what: &'static str,
    collections: Vec<CollectionProgress>,
    /// The one that moved last.
    current: usize,
    /// When, and how many documents had been compared by then.
    samples: VecDeque<(Instant, u64)>,
    said: Instant,
}

impl Meter {
    /// A comparison begins; `what` is `first_sync`, `reconcile` or `verify`.
    pub fn new(what: &'static str) -> Self {
        let now = Instant::now();
        Self {
            what,
            collections: vec![],
            current: 0,
            samples: VecDeque::from([(now, 0)]),
            said: now,
        }
    }

    /// A collection is going to be compared, of about `total` documents. `documents` and `bytes` were
    /// compared by an earlier run. Its number, for the other calls.
    pub fn open(&mut self, collection: String, total: u64, documents: u64, bytes: u64) -> usize {
        self.collections.push(CollectionProgress {
            collection,
            documents,
            total: total.max(documents),
            bytes,
            done: false,
        });
        for (_, before) in &mut self.samples {
            // What an earlier run did tells nothing of this one's speed.
            *before += documents;
        }
        self.collections.len() - 1
    }

    /// So many more documents of a collection were compared, and bytes read for it from both sides.
    pub fn add(&mut self, collection: usize, documents: u64, bytes: u64) {
        self.current = collection;
        let c = &mut self.collections[collection];
        c.documents += documents;
        c.bytes += bytes;
        c.total = c.total.max(c.documents);
        let now = Instant::now();
        if self
            .samples
            .back()
            .is_none_or(|(at, _)| now - *at >= SAMPLE)
        {
            let all = self.documents();
            self.samples.push_back((now, all));
            if self.samples.len() > SAMPLES {
                self.samples.pop_front();
            }
        }
        if now - self.said >= SAY {
            self.said = now;
            let progress = self.snapshot();
            tracing::info!(
                what = progress.what,
                documents = progress.documents,
                total = progress.total,
                bytes = progress.bytes,
                rate = progress.rate as u64,
                seconds_left = progress.seconds_left,
                "comparing {}",
                progress.collection
            );
        }
    }

    /// A collection is through: its total was an estimate.
    pub fn finish(&mut self, collection: usize) {
        let c = &mut self.collections[collection];
        c.total = c.documents;
        c.done = true;
    }

    fn documents(&self) -> u64 {
        self.collections.iter().map(|c| c.documents).sum()
    }

    /// As status shows it.
    pub fn snapshot(&self) -> Progress {
        let documents = self.documents();
        let total: u64 = self.collections.iter().map(|c| c.total).sum();
        let rate = self.samples.front().map_or(0.0, |(at, before)| {
            documents.saturating_sub(*before) as f64 / at.elapsed().as_secs_f64().max(0.001)
        });
        let left = (total - documents) as f64 / rate;
        Progress {
            what: self.what.into(),
            collection: self
                .collections
                .get(self.current)
                .map_or_else(String::new, |c| c.collection.clone()),
            documents,
            total,
            bytes: self.collections.iter().map(|c| c.bytes).sum(),
            rate,
            seconds_left: left.is_finite().then_some(left.ceil() as u64),
            collections: self.collections.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_over_collections_and_forgets_estimates() {
        let mut meter = Meter::new("first_sync");
        let a = meter.open("a".into(), 100, 0, 0);
        let b = meter.open("b".into(), 50, 20, 2000);
        meter.add(a, 90, 9000);
        meter.finish(a);
        meter.add(b, 40, 1000);
        let p = meter.snapshot();
        assert_eq!((p.documents, p.total, p.bytes), (150, 150, 12_000));
        assert_eq!(p.collection, "b");
        assert!(p.collections[a].done && !p.collections[b].done);
        assert_eq!(p.collections[b].total, 60, "more than the estimate");
        assert!(p.rate > 0.0);
        assert_eq!(p.seconds_left, Some(0));
    }

    #[test]
    fn nothing_yet_promises_nothing() {
        let mut meter = Meter::new("reconcile");
        meter.open("a".into(), 100, 40, 0);
        assert_eq!(meter.snapshot().seconds_left, None);
        assert_eq!(meter.snapshot().documents, 40);
    }
}
