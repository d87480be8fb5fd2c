//! The worker: claims keys by the rank of their collection, within a rank in the order of their first
//! change, and keeps several batches in flight.
//!
//! Never two batches hold the same key. Batches are sized by documents; while the link is away or
//! `pause` is in force nothing is claimed. Stopping does not drain: the queue is on disk.

mod heads;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use chrono::Utc;
use tokio::task::{self, JoinSet};

use crate::batch;
use crate::config::RetryConfig;
use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::metrics::Retried;
use crate::order::{self, Rank};
use crate::retry::Retry;
use crate::shared::{Shared, lock};
use crate::store::claim::{self, Claim};
use crate::store::queue;
use heads::{Batch, Heads, Limits};

/// Most batches in flight. One of a better rank than all of them goes beside them: it must not wait for
/// what a slow link takes minutes to carry.
const BATCHES: usize = 6;

/// The same where answers take long: enough to hide a round trip of 100 ms, and what a batch does before
/// and after it.
const FAR_BATCHES: usize = 12;

/// How often rows that were put off are looked for.
const TICK: Duration = Duration::from_millis(250);

/// Longest pause after a batch that failed for another reason than the link.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Up to so many rows echoes are looked for while offline; in a long queue a few don't matter.
const FEW: u64 = 5000;

/// Runs until the daemon ends.
pub async fn run(shared: Arc<Shared>) -> Result<(), Failure> {
    let mut batches = Batches::default();
    let mut heads = Heads::new();
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
                Some(done) = batches.next() => drop(finished(&shared, done, &mut retry)?),
                _ = link.changed() => {}
                () = shared.wake.notified() => {}
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
            match drop_echoes(&shared).await {
                Err(failure) if failure.class != Class::Transient => return Err(failure),
                _ => {}
            }
            heads.restart();
            continue;
        }
        while rest <= Instant::now() {
            let limits = batches.limits(&shared);
            let batch = match heads.claim(&shared, limits).await {
                Ok(Some(batch)) => batch,
                Ok(None) => break,
                // The state's disk is full: it is waited out, with what is under way (R22).
                Err(failure) if failure.class == Class::Transient => {
                    tracing::debug!(%failure, "nothing can be claimed");
                    rest = Instant::now() + retry.next_delay().min(LONGEST_PAUSE);
                    break;
                }
                Err(failure) => return Err(failure),
            };
            batches.start(&shared, batch);
        }
        tokio::select! {
            () = shared.cancel.cancelled() => break,
            Some(done) = batches.next() => {
                if let Some(pause) = finished(&shared, done, &mut retry)? {
                    rest = Instant::now() + pause;
                }
            }
            () = shared.wake.notified() => {}
            () = tokio::time::sleep(TICK) => {}
        }
        heads.wake();
    }
    // Their writes are under way; their intents are on disk whether we see the answers or not.
    batches.tasks.detach_all();
    Ok(())
}

type Done = Result<Result<(), Failure>, task::JoinError>;

/// The batches in flight.
#[derive(Default)]
struct Batches {
    tasks: JoinSet<Result<(), Failure>>,
    /// Rank of each, and whether it was claimed by age.
    ranks: HashMap<task::Id, (Rank, bool)>,
}

impl Batches {
    /// What may be claimed beside them.
    fn limits(&self, shared: &Shared) -> Limits {
        let most = shared.settings().config.sync.batch_size;
        let best = self.ranks.values().map(|(rank, _)| *rank).min();
        let at_once = match shared.remote().is_some_and(|r| r.is_far()) {
            true => FAR_BATCHES,
            false => BATCHES,
        };
        let full = self.tasks.len() >= at_once;
        Limits {
            most,
            better_than: best.filter(|_| full),
            aged: !full && self.ranks.values().all(|(_, aged)| !aged),
        }
    }

    fn start(&mut self, shared: &Arc<Shared>, batch: Batch) {
        let Batch { works, rank, aged } = batch;
        shared.in_flight.fetch_add(1, Ordering::Relaxed);
        let shared = shared.clone();
        let task = self.tasks.spawn(order::at(rank, async move {
            let outcome = batch::process(&shared, works).await;
            shared.in_flight.fetch_sub(1, Ordering::Relaxed);
            outcome
        }));
        self.ranks.insert(task.id(), (rank, aged));
    }

    /// The next that ends; `None` if there is none.
    async fn next(&mut self) -> Option<Done> {
        let (id, done) = match self.tasks.join_next_with_id().await? {
            Ok((id, done)) => (id, Ok(done)),
            Err(error) => (error.id(), Err(error)),
        };
        self.ranks.remove(&id);
        Some(done)
    }
}

fn may_work(shared: &Shared) -> bool {
    let automatic = shared.settings().config.sync.auto_sync_enabled || shared.runs.is_owned();
    let resting = shared.is_quiet() || shared.adopting.load(Ordering::Acquire);
    automatic && shared.may_work() && !resting
}

/// What to do after a batch: `Some` is how long to claim nothing.
fn finished(shared: &Shared, done: Done, retry: &mut Retry) -> Result<Option<Duration>, Failure> {
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

/// Beyond a delay of `[retry]`: the longest wait for whoever holds the lease, and twice over.
const BEYOND: Duration = Duration::from_secs(120);

/// The longest that a row is put off, in ms.
fn longest(retry: &RetryConfig) -> i64 {
    let longest = retry.max.saturating_mul(2).saturating_add(BEYOND);
    i64::try_from(longest.as_millis()).unwrap_or(i64::MAX)
}

/// A claim of any collection, from the beginning of the outbox.
fn what(shared: &Shared, limit: usize) -> Claim {
    Claim {
        of: Side::Local,
        after: 0,
        limit,
        now: Utc::now().timestamp_millis(),
        longest: longest(&shared.settings().config.retry),
        only: vec![],
        never: lock(&shared.halted).all().clone(),
        sync_fields: shared.settings().sync_fields.clone(),
        behind: shared.store.buckets(),
        sent: shared.store.sent().clone(),
    }
}

/// While nothing may be moved, the events of what was moved before still arrive: they don't wait
/// for anything and shall not be counted as if they did.
async fn drop_echoes(shared: &Arc<Shared>) -> Result<(), Failure> {
    let queued = shared.store.call(queue::count_all);
    if queued.await.map_err(crate::settle::store_failed)? > FEW {
        return Ok(());
    }
    for of in [Side::Remote, Side::Local] {
        let context = shared.clone();
        let what = Claim {
            of,
            ..what(shared, 0)
        };
        let dropped = shared
            .store
            .call(move |c| claim::claim(c, &what, &mut lock(&context.busy)));
        dropped.await.map_err(crate::settle::store_failed)?;
    }
    Ok(())
}
