//! The worker: claims keys in the order of their first change and keeps several batches in flight.
//!
//! Never two batches hold the same key. Batches are sized by documents; while the link is away or
//! `pause` is in force nothing is claimed. Stopping does not drain: the queue is on disk.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use chrono::Utc;
use tokio::task::JoinSet;

use crate::batch;
use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::metrics::Retried;
use crate::retry::Retry;
use crate::shared::{Settings, Shared, lock};
use crate::store::claim::{self, Claim};
use crate::store::queue::{self, Work};

/// Most batches in flight; enough to hide a round trip of 100 ms at full batches.
const BATCHES: usize = 6;

/// How often rows that were put off are looked for.
const TICK: Duration = Duration::from_millis(250);

/// Longest pause after a batch that failed for another reason than the link.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Up to so many rows echoes are looked for while offline; in a long queue a few don't matter.
const FEW: u64 = 5000;

/// Where a queue is to be read on.
struct Queue {
    /// Whose changes it holds.
    of: Side,
    after: i64,
    /// Nothing was found to the end since the last wake-up.
    at_end: bool,
}

/// Both queues from their heads; remote changes first, they are fewer as a rule.
fn start() -> [Queue; 2] {
    [Side::Remote, Side::Local].map(|of| Queue {
        of,
        after: 0,
        at_end: false,
    })
}

/// Runs until the daemon ends.
pub async fn run(shared: Arc<Shared>) -> Result<(), Failure> {
    let mut batches: JoinSet<Result<(), Failure>> = JoinSet::new();
    let mut queues = start();
    let mut retry = Retry::new(&shared.settings().config.retry);
    let mut rest = Instant::now();
    loop {
        let closed = shared.budget.closed_until().map(|until| {
            format!(
                "quiet hours: changes are noted, and move from {} on; `sangam sync` moves them now",
                until.format("%H:%M")
            )
        });
        shared.notice("quiet", closed);
        if !may_work(&shared) {
            let mut link = shared.link.subscribe();
            tokio::select! {
                () = shared.cancel.cancelled() => break,
                Some(done) = batches.join_next() => drop(finished(&shared, done, &mut retry)?),
                _ = link.changed() => {}
                () = shared.wake.notified() => {}
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
            match drop_echoes(&shared).await {
                Err(failure) if failure.class != Class::Transient => return Err(failure),
                _ => {}
            }
            queues = start();
            continue;
        }
        while batches.len() < BATCHES && rest <= Instant::now() {
            let works = match claim(&shared, &mut queues).await {
                Ok(Some(works)) => works,
                Ok(None) => break,
                // The state's disk is full: it is waited out, with what is under way (R22).
                Err(failure) if failure.class == Class::Transient => {
                    tracing::debug!(%failure, "nothing can be claimed");
                    rest = Instant::now() + retry.next_delay().min(LONGEST_PAUSE);
                    break;
                }
                Err(failure) => return Err(failure),
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
                if let Some(pause) = finished(&shared, done, &mut retry)? {
                    rest = Instant::now() + pause;
                }
            }
            () = shared.wake.notified() => {}
            () = tokio::time::sleep(TICK) => {}
        }
        // Something came, was put back, or let go of a key: both queues are worth a look again.
        queues.iter_mut().for_each(|q| q.at_end = false);
    }
    // Their writes are under way; their intents are on disk whether we see the answers or not.
    batches.detach_all();
    Ok(())
}

fn may_work(shared: &Shared) -> bool {
    let automatic = shared.settings().config.sync.auto_sync_enabled || shared.runs.is_owned();
    let resting = shared.is_quiet() || shared.adopting.load(Ordering::Acquire);
    automatic && shared.may_work() && !resting
}

/// What to do after a batch: `Some` is how long to claim nothing.
fn finished(
    shared: &Shared,
    done: Result<Result<(), Failure>, tokio::task::JoinError>,
    retry: &mut Retry,
) -> Result<Option<Duration>, Failure> {
    match done {
        Ok(Ok(())) => {
            retry.reset();
            Ok(None)
        }
        Ok(Err(failure)) if failure.class == Class::Fatal => Err(failure),
        Ok(Err(failure)) => {
            tracing::debug!(%failure, "a batch failed");
            if !failure.is_offline() {
                shared.metrics.retried(Retried::Batch);
                shared.runs.error(failure.to_string());
            }
            // An outage is the link's business, which wakes us the moment it is over.
            Ok((!failure.is_offline()).then(|| retry.next_delay().min(LONGEST_PAUSE)))
        }
        Err(e) if e.is_cancelled() => Ok(None),
        Err(e) => Err(Failure::fatal(format!("a batch panicked: {e}"))),
    }
}

/// The next batch. The queues take turns, so that a long one does not starve the other.
async fn claim(
    shared: &Arc<Shared>,
    queues: &mut [Queue; 2],
) -> Result<Option<Vec<Work>>, Failure> {
    let settings = shared.settings();
    for turn in 0..queues.len() {
        let q = &mut queues[turn];
        if q.at_end {
            continue;
        }
        let what = what(shared, &settings, q, settings.config.sync.batch_size);
        let (context, taken) = (shared.clone(), Arc::new(Mutex::new(Vec::new())));
        let noted = taken.clone();
        let claimed = shared
            .store
            .call(move |c| {
                let claimed = claim::claim(c, &what, &mut lock(&context.busy))?;
                lock(&noted).extend(claimed.0.iter().map(|work| work.key.clone()));
                Ok(claimed)
            })
            .await;
        let (works, next) = match claimed {
            Ok(claimed) => claimed,
            Err(error) => {
                // The claim was not committed: nobody works on these.
                let mut busy = lock(&shared.busy);
                for key in lock(&taken).iter() {
                    busy.remove(key);
                }
                return Err(crate::settle::store_failed(error));
            }
        };
        match next {
            Some(after) => q.after = after,
            None => {
                // Rows that were busy or put off stand before the end: the next round sees them.
                q.after = 0;
                q.at_end = works.is_empty();
            }
        }
        if !works.is_empty() {
            queues.rotate_left(turn + 1);
            return Ok(Some(works));
        }
    }
    Ok(None)
}

fn what(shared: &Shared, settings: &Settings, queue: &Queue, limit: usize) -> Claim {
    Claim {
        of: queue.of,
        after: queue.after,
        limit,
        now: Utc::now().timestamp_millis(),
        only: vec![],
        never: lock(&shared.halted).clone(),
        sync_fields: settings.sync_fields.clone(),
        behind: shared.store.buckets(),
    }
}

/// While nothing may be moved, the events of what was moved before still arrive: they don't wait
/// for anything and shall not be counted as if they did.
async fn drop_echoes(shared: &Arc<Shared>) -> Result<(), Failure> {
    let settings = shared.settings();
    let queued = shared
        .store
        .call(|c| Ok(queue::counts(c, Side::Local)?.all + queue::counts(c, Side::Remote)?.all));
    if queued.await.map_err(crate::settle::store_failed)? > FEW {
        return Ok(());
    }
    for queue in start() {
        let (what, context) = (what(shared, &settings, &queue, 0), shared.clone());
        let dropped = shared
            .store
            .call(move |c| claim::claim(c, &what, &mut lock(&context.busy)));
        dropped.await.map_err(crate::settle::store_failed)?;
    }
    Ok(())
}
