//! Comparing one range and taking in what was found.

use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::mpsc;

use super::settle;
use crate::decide::Side;
use crate::failure::Failure;
use crate::settle::store_failed;
use crate::shared::{Shared, lock};
use crate::store::walks::{self, Part, Tally};
use crate::walk::{Count, Found, Place};

/// Parts of a range on their way to the disk at once.
const AT_ONCE: usize = 2;

/// One range being compared.
pub(super) struct RangeTask {
    pub(super) shared: Arc<Shared>,
    pub(super) place: Arc<Place>,
    pub(super) part: Part,
    /// Of a first sync, where base is expected to know nothing.
    pub(super) first: bool,
    /// Number of the collection in the meter.
    pub(super) number: usize,
}

impl RangeTask {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (shared, number) = (self.shared.clone(), self.number);
        let first = self.first.then(|| self.place.ns());
        let watch = shared.touched.watch();
        let (finds, mut found) = mpsc::channel(2);
        let walked = async move {
            let range = &self.part.range;
            let outcome = if self.part.exact {
                self.place.exact(range, &finds).await
            } else {
                match self.place.cheap(range, &finds).await {
                    // A server that can't hash: read the documents.
                    Err(f) if f.is_refusal() => self.place.exact(range, &finds).await,
                    other => other,
                }
            };
            self.shared.note(Side::Remote, &outcome);
            drop(finds);
            outcome.map(|count| (count, self))
        };
        let taken = async move {
            let (mut sent, mut known) = (Count::default(), 0);
            // While some are on their way to the disk, the next ones are packed.
            let found = stream::poll_fn(|cx| found.poll_recv(cx)).map(|some| async {
                let counted = count(&some);
                let known = settle::take(&shared, &watch, some, first).await?;
                Ok::<_, Failure>((counted, known))
            });
            let mut found = std::pin::pin!(found.buffered(AT_ONCE));
            while let Some((counted, more)) = found.try_next().await? {
                known += more;
                add(&shared, number, counted);
                sent.documents += counted.documents;
                sent.bytes += counted.bytes;
            }
            Ok::<_, Failure>((sent, known))
        };
        let ((count, task), (sent, known)) = tokio::try_join!(walked, taken)?;
        let rest = Count {
            documents: count.documents.saturating_sub(sent.documents),
            bytes: count.bytes.saturating_sub(sent.bytes),
            by_hash: 0,
        };
        add(&task.shared, number, rest);
        let (ns, mut part) = (task.place.ns(), task.part);
        part.done = Some(Tally {
            documents: count.documents,
            known: known + count.by_hash,
            bytes: count.bytes,
        });
        let stored = task
            .shared
            .store
            .call(move |c| walks::put_part(c, ns, &part));
        stored.await.map_err(store_failed)
    }
}

fn count(some: &[Found]) -> Count {
    let bytes = some.iter().map(|f| match f {
        Found::Equal(_, content) => 2 * content.len() as u64,
        Found::Differs(_) => 0,
    });
    Count {
        documents: some.len() as u64,
        bytes: bytes.sum(),
        by_hash: 0,
    }
}

fn add(shared: &Shared, number: usize, counted: Count) {
    if let Some(meter) = lock(&shared.progress).as_mut() {
        meter.add(number, counted.documents, counted.bytes);
    }
}
