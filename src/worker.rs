//! The worker: claims keys in the order of their first change and keeps several batches in flight.
//!
//! Never two batches hold the same key. Batches are sized by documents; while the link is away or
//! `pause` is in force nothing is claimed. Stopping does not drain: the queue is on disk.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use chrono::Utc;
use tokio::task::JoinSet;

use crate::batch;
use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::retry::Retry;
use crate::shared::{Shared, lock};
use crate::store::queue::{self, Claim, Work};

/// Most batches in flight; enough to hide a round trip of 100 ms at full batches.
const BATCHES: usize = 6;

/// How often rows that were put off are looked for.
const TICK: Duration = Duration::from_millis(250);

/// Where a queue is to be read on.
#[derive(Default)]
struct Cursor {
    after: i64,
    /// Nothing was found to the end since the last wake-up.
    at_end: bool,
}

/// Runs until the daemon ends.
pub async fn run(shared: Arc<Shared>) -> Result<(), Failure> {
    let mut batches: JoinSet<Result<(), Failure>> = JoinSet::new();
    let mut cursors = [Cursor::default(), Cursor::default()];
    let mut retry = Retry::new(&shared.settings().config.retry);
    loop {
        if !may_work(&shared) {
            let mut link = shared.link.subscribe();
            tokio::select! {
                () = shared.cancel.cancelled() => break,
                Some(done) = batches.join_next() => finished(&shared, done, &mut retry).await?,
                _ = link.changed() => {}
                () = shared.wake.notified() => {}
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
            cursors = Default::default();
            continue;
        }
        while batches.len() < BATCHES {
            let Some(works) = claim(&shared, &mut cursors).await? else {
                break;
            };
            shared.in_flight.fetch_add(1, Ordering::Relaxed);
            let shared = shared.clone();
            batches.spawn(async move {
                let outcome = batch::process(&shared, works).await;
                shared.in_flight.fetch_sub(1, Ordering::Relaxed);
                outcome
            });
        }
        tokio::select! {
            () = shared.cancel.cancelled() => break,
            Some(done) = batches.join_next() => {
                finished(&shared, done, &mut retry).await?;
                // What the batch put back, and keys that waited for it, may be ready now.
                cursors.iter_mut().for_each(|c| c.at_end = false);
            }
            () = shared.wake.notified() => cursors.iter_mut().for_each(|c| c.at_end = false),
            () = tokio::time::sleep(TICK) => cursors.iter_mut().for_each(|c| c.at_end = false),
        }
    }
    // Their writes are under way; their intents are on disk whether we see the answers or not.
    batches.detach_all();
    Ok(())
}

fn may_work(shared: &Shared) -> bool {
    let automatic = shared.settings().config.sync.auto_sync_enabled || shared.runs.is_owned();
    automatic && shared.may_work()
}

async fn finished(
    shared: &Shared,
    done: Result<Result<(), Failure>, tokio::task::JoinError>,
    retry: &mut Retry,
) -> Result<(), Failure> {
    match done {
        Ok(Ok(())) => retry.reset(),
        Ok(Err(failure)) if failure.class == Class::Fatal => return Err(failure),
        Ok(Err(failure)) => {
            tracing::debug!(%failure, "a batch failed");
            shared.runs.error(failure.to_string());
            tokio::time::sleep(retry.next_delay()).await;
        }
        Err(e) if e.is_cancelled() => {}
        Err(e) => return Err(Failure::fatal(format!("a batch panicked: {e}"))),
    }
    Ok(())
}

/// The next batch of either queue; remote changes first when both wait, they are fewer as a rule.
async fn claim(
    shared: &Arc<Shared>,
    cursors: &mut [Cursor; 2],
) -> Result<Option<Vec<Work>>, Failure> {
    let settings = shared.settings();
    for (side, cursor) in [Side::Remote, Side::Local]
        .into_iter()
        .zip(cursors.iter_mut())
    {
        if cursor.at_end {
            continue;
        }
        let what = Claim {
            of: side,
            after: cursor.after,
            limit: settings.config.sync.batch_size,
            now: Utc::now().timestamp_millis(),
            only: vec![],
            never: lock(&shared.halted).clone(),
            sync_fields: settings.sync_fields.clone(),
        };
        let context = shared.clone();
        let claimed = shared
            .store
            .call(move |c| queue::claim(c, &what, &mut lock(&context.busy)))
            .await;
        let (works, next) = claimed.map_err(crate::settle::store_failed)?;
        match next {
            Some(after) => cursor.after = after,
            None => {
                // Rows that were busy or put off stand before the end: the next round sees them.
                *cursor = Cursor {
                    after: 0,
                    at_end: works.is_empty(),
                };
            }
        }
        if !works.is_empty() {
            return Ok(Some(works));
        }
    }
    Ok(None)
}
