//! Cutting a collection into ranges.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::decide::Side;
use crate::failure::Failure;
use crate::key::Id;
use crate::settle::store_failed;
use crate::shared::Shared;
use crate::store::walks::{self, Part};
use crate::walk::{Place, Range};

/// Cuts a collection into ranges, in the order of `_id`. A comparison that reads a part of the documents
/// begins where the last one ended, and goes round.
pub(super) struct Cutter {
    shared: Arc<Shared>,
    place: Arc<Place>,
    start: Option<Id>,
    /// Documents that are still to be compared exactly.
    exact: u64,
    next: u32,
    /// Where the next range begins.
    at: Option<Id>,
    wrapped: bool,
    ended: bool,
    /// Where the next ranges end, as a sample has it; `None`: not asked yet.
    ready: Option<VecDeque<Id>>,
}

impl Cutter {
    /// Begins at `start` (or the first `_id`), behind the ranges that were cut before. So many documents
    /// are still to be compared exactly.
    pub(super) fn new(
        shared: &Arc<Shared>,
        place: &Arc<Place>,
        start: Option<Id>,
        exact: u64,
        before: &[Part],
    ) -> Self {
        let mut cutter = Self {
            shared: shared.clone(),
            place: place.clone(),
            at: start.clone(),
            start,
            exact,
            next: 0,
            wrapped: false,
            ended: false,
            ready: None,
        };
        if let Some(last) = before.last() {
            cutter.next = last.n + 1;
            cutter.wrapped = last.wrapped;
            cutter.advance(last.range.to.clone());
        }
        cutter
    }

    /// The next range, stored as begun.
    pub(super) async fn cut(&mut self) -> Result<Option<Part>, Failure> {
        if self.ended {
            return Ok(None);
        }
        let exact = self.exact > 0;
        let documents = if exact {
            self.place.exact_range()
        } else {
            self.place.cheap_range()
        };
        let limit = self.start.clone().filter(|_| self.wrapped);
        // A small collection is one range; asking where it ends would only cost a round trip.
        let whole = self.at.is_none() && limit.is_none() && self.place.size().documents < documents;
        let to = if whole {
            None
        } else if let Some(bound) = self.sampled(documents).await? {
            Some(bound)
        } else {
            let bound = self
                .place
                .bound(self.at.as_ref(), limit.as_ref(), documents)
                .await;
            self.shared.note(Side::Remote, &bound);
            bound?
        };
        let part = Part {
            n: self.next,
            range: Range {
                from: self.at.clone(),
                to: to.clone().or(limit),
            },
            exact,
            wrapped: self.wrapped,
            done: None,
        };
        self.next += 1;
        self.exact = self.exact.saturating_sub(documents);
        self.advance(to);
        let (ns, stored) = (self.place.ns(), part.clone());
        self.shared
            .store
            .call(move |c| walks::put_part(c, ns, &stored))
            .await
            .map_err(store_failed)?;
        Ok(Some(part))
    }

    /// Where the next range ends, where a sample was to say: of all ranges alike, from first to last.
    async fn sampled(&mut self, documents: u64) -> Result<Option<Id>, Failure> {
        let ready = match &mut self.ready {
            Some(ready) => ready,
            None => {
                let alike = self.start.is_none() && matches!(self.exact, 0 | u64::MAX);
                let mut bounds = None;
                if alike {
                    let asked = self.place.bounds(self.at.as_ref(), documents).await;
                    self.shared.note(Side::Remote, &asked);
                    bounds = asked?;
                }
                self.ready.insert(bounds.unwrap_or_default().into())
            }
        };
        Ok(ready.pop_front())
    }

    fn advance(&mut self, to: Option<Id>) {
        let at_end = to.is_none() || (self.wrapped && to == self.start);
        self.at = to;
        if at_end {
            self.ended = self.wrapped || self.start.is_none();
            self.wrapped = true;
            self.at = None;
        }
    }
}
