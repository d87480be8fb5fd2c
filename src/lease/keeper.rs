//! Keeping the lease: renewing it, watching it, taking it, and opening both sides to its new holder.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bson::{Document, doc};
use tokio::time::timeout;

use super::document::{self, Found};
use super::{GRACE, Lease, RENEW, SILENCE, State, Term, VALID, at_work, clock, heir, journal};
use crate::daemon::reconcile_pending;
use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::settle::store_failed;
use crate::shared::{Shared, lock};
use crate::store::{queue, records};
use crate::{halt, tail};

/// How often a standby looks, and a holder tries again.
const LOOK: Duration = Duration::from_millis(400);

/// Longest wait for one command about the lease.
const PATIENCE: Duration = Duration::from_secs(3);

/// How often the remote's clock is read: ours and its drift apart far less than [`SILENCE`] meanwhile.
const REMOTE_CLOCK: i64 = 60_000;

/// How often what everybody has read is cut off.
const PRUNE: i64 = 30_000;

/// How often who stands by reads on.
const FOLLOW: i64 = 1000;

/// Under this name the store keeps the last term that was ours.
const LAST_TERM: &str = "lease_term";

/// What a standby has seen of the lease.
#[derive(Debug, Default)]
struct Watch {
    seen: Option<(i64, i64)>,
    /// Since when it stands still, by [`clock`].
    since: i64,
    /// Since when it can be read without a gap.
    readable: Option<i64>,
}

impl Watch {
    fn saw(&mut self, found: &Found, now: i64) {
        let seen = Some((found.epoch, found.beat));
        if seen != self.seen {
            (self.seen, self.since) = (seen, now);
        }
        self.readable.get_or_insert(now);
    }

    /// Whether nothing has moved for so long.
    fn is_silent(&self, now: i64, time: i64) -> bool {
        let readable = self.readable.is_some_and(|since| now - since >= GRACE);
        readable && now - self.since >= time
    }
}

impl Lease {
    /// The term, if one is held (be it out of time).
    fn term(&self) -> Option<Term> {
        lock(&self.state).term.clone()
    }

    /// The number of the term, and the local server's time at the last renewal, ms since 1970.
    pub(super) fn term_and_time(&self) -> Option<(i64, i64)> {
        let state = lock(&self.state);
        let term = state.term.as_ref()?;
        Some((term.epoch, term.until[0]? - VALID))
    }

    /// What is to be promised for the remote: when a command that is sent before the next renewal may
    /// begin there at the latest, with its time at work.
    fn promise_of_remote(&self, now: i64) -> i64 {
        let allowance = self.allowance.load(Ordering::Relaxed);
        let state = lock(&self.state);
        let known = state
            .remote_clock
            .filter(|(_, at)| now - at < 2 * REMOTE_CLOCK);
        known.map_or(0, |(time, at)| time + now - at + allowance + at_work())
    }

    fn renewed(&self, sent: i64, found: &Found) {
        let mut state = lock(&self.state);
        let State {
            term, remote_clock, ..
        } = &mut *state;
        let Some(term) = term.as_mut().filter(|t| t.epoch == found.epoch) else {
            return;
        };
        if sent > term.valid_until {
            tracing::info!("the lease is renewed after a gap");
            *remote_clock = None;
        }
        term.valid_until = sent + VALID;
        term.until = found.until.map(|until| Some(until - at_work()));
    }

    fn stand_down(&self) {
        lock(&self.state).term = None;
        self.journal.end();
    }
}

async fn in_time<T>(asked: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let answer = timeout(PATIENCE, asked).await;
    answer.unwrap_or_else(|_| Err(Failure::timeout().of(Side::Local)))
}

/// Holds the lease or watches it, until the daemon ends.
pub(crate) async fn run(shared: Arc<Shared>) -> Result<(), Failure> {
    let Some(lease) = shared.lease().cloned() else {
        shared.cancel.cancelled().await;
        return Ok(());
    };
    let mut watch = Watch::default();
    loop {
        let pause = match lease.term() {
            Some(term) => {
                watch = Watch::default();
                keep(&shared, &lease, &term).await
            }
            None => match stand_by(&shared, &lease, &mut watch).await {
                Ok(taken) if taken => Duration::ZERO,
                Ok(_) => LOOK,
                Err(failure) if failure.class == Class::Fatal => return Err(failure),
                Err(failure) => {
                    tracing::debug!(%failure, "the lease can't be read");
                    watch.readable = None;
                    LOOK
                }
            },
        };
        tokio::select! {
            () = shared.cancel.cancelled() => return Ok(()),
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Renews; how long to wait before the next time.
async fn keep(shared: &Shared, lease: &Lease, term: &Term) -> Duration {
    let sent = clock();
    let paused = shared.paused.load(Ordering::Relaxed);
    let promise = lease.promise_of_remote(sent);
    let renewal = document::renew(lease, &shared.local, (term.epoch, promise), paused);
    match in_time(renewal).await {
        Ok(Some(found)) => {
            lease.renewed(sent, &found);
            RENEW
        }
        Ok(None) => {
            lease.stand_down();
            tracing::warn!("another daemon has taken the lease: standing by");
            Duration::ZERO
        }
        Err(failure) => {
            tracing::debug!(%failure, "the lease can't be renewed");
            LOOK
        }
    }
}

/// Looks at the lease, and takes it if it is free. Whether it was taken.
async fn stand_by(
    shared: &Arc<Shared>,
    lease: &Arc<Lease>,
    watch: &mut Watch,
) -> Result<bool, Failure> {
    let Some(found) = in_time(document::look(lease, &shared.local)).await? else {
        in_time(document::create(lease, &shared.local)).await?;
        return Ok(false);
    };
    watch.saw(&found, clock());
    let holder = found
        .holder
        .as_ref()
        .map(|(_, name, since)| (name.clone(), *since));
    let known = std::mem::replace(&mut lock(&lease.state).holder, holder.clone());
    if let Some((name, _)) = holder.filter(|_| known != lock(&lease.state).holder) {
        tracing::info!(holder = name, "standing by");
    }
    // `pause` is about the pair, not about the daemon that was told.
    if !found.first && found.paused != shared.paused.swap(found.paused, Ordering::Relaxed) {
        let kept = shared.store.set_meta("paused", found.paused).await;
        kept.map_err(store_failed)?;
    }
    let mine = |(holder, _, _): &(String, String, i64)| *holder == lease.me;
    // Who has more to catch up with lets others go first.
    let late = match is_up_to_date(shared).await? {
        true => 0,
        false => GRACE,
    };
    let free = match &found.holder {
        Some(holder) => mine(holder) || watch.is_silent(clock(), SILENCE + late),
        None => found.first || late == 0 || watch.is_silent(clock(), late),
    };
    if !free || lock(&lease.state).leaving {
        return Ok(false);
    }
    let sent = clock();
    let Some(taken) = in_time(document::take(lease, &shared.local, &found)).await? else {
        return Ok(false);
    };
    let last: Option<i64> = shared
        .store
        .get_meta(LAST_TERM)
        .await
        .map_err(store_failed)?;
    let unbroken = found.first || last == Some(found.epoch);
    if unbroken {
        settled(shared, taken.epoch).await?;
    }
    lease.journal.begin(taken.epoch, unbroken);
    let mut state = lock(&lease.state);
    state.remote_clock = None;
    state.lost = [0; 2];
    state.term = Some(Term {
        epoch: taken.epoch,
        since: taken.holder.map_or(0, |h| h.2),
        valid_until: sent + VALID,
        until: [Some(taken.until[0] - at_work()), None],
        open: [false; 2],
        unbroken,
        remote_busy_until: taken.until[1],
    });
    drop(state);
    tracing::info!(term = taken.epoch, unbroken, "took the lease");
    Ok(true)
}

/// Nothing of anybody else's is left up to this term: when we take the next one, too, there is nothing
/// to inherit. (Not said before all is settled: a new holder may die before.)
async fn settled(shared: &Shared, term: i64) -> Result<(), Failure> {
    let kept = shared.store.set_meta(LAST_TERM, term).await;
    kept.map_err(store_failed)
}

/// Whether this daemon has compared everything and sees what changes.
async fn is_up_to_date(shared: &Shared) -> Result<bool, Failure> {
    Ok(shared.streams_open(Side::Local) && !reconcile_pending(shared).await?)
}

/// Opens both sides to a new holder, keeps the remote's clock known, and settles what the last holder
/// left. Runs until the daemon ends.
pub(crate) async fn adopt_sides(shared: Arc<Shared>) -> Result<(), Failure> {
    let Some(lease) = shared.lease().cloned() else {
        shared.cancel.cancelled().await;
        return Ok(());
    };
    let (mut pruned, mut followed, mut said) = (clock(), 0, 0);
    loop {
        tokio::select! {
            () = shared.cancel.cancelled() => return Ok(()),
            () = tokio::time::sleep(LOOK / 2) => {}
        }
        let Some(term) = lease.term().filter(|t| clock() < t.valid_until) else {
            if lease.term().is_none() && clock() - followed > FOLLOW {
                followed = clock();
                let say = followed - said > PRUNE;
                match heir::follow(&shared, &lease, say).await {
                    Ok(()) if say => said = followed,
                    Ok(()) => {}
                    Err(failure) => tracing::debug!(%failure, "the journal can't be read"),
                }
            }
            continue;
        };
        let outcome = async {
            if !term.open[Side::Local as usize] {
                open_local(&shared, &lease, &term).await?;
            }
            let with_remote = shared.settings().config.remote_uri.is_some();
            if with_remote && shared.link.is_online() {
                open_remote(&shared, &lease, &term).await?;
            }
            journal::flush(&shared, &lease).await?;
            if lease.works() && lease.journal.inherits() {
                settle_inheritance(&shared, &lease, &term).await?;
            }
            if clock() - pruned > PRUNE {
                pruned = clock();
                heir::prune(&lease, &shared.local).await?;
            }
            Ok(())
        };
        match outcome.await {
            Ok(()) => {}
            Err(Failure {
                class: Class::Fatal,
                what,
                ..
            }) => return Err(Failure::fatal(what)),
            Err(failure) => tracing::debug!(%failure, "a side is not open to us yet"),
        }
    }
}

fn open(shared: &Shared, lease: &Lease, term: &Term, side: Side) {
    let mut state = lock(&lease.state);
    if let Some(now) = state.term.as_mut().filter(|t| t.epoch == term.epoch) {
        now.open[side as usize] = true;
    }
    drop(state);
    tracing::info!(side = side.name(), term = term.epoch, "open to this daemon");
    shared.wake.notify_one();
    shared.stamp.notify_one();
    shared.reconcile.notify_one();
    shared.schema.wake.notify_one();
}

async fn open_local(shared: &Arc<Shared>, lease: &Arc<Lease>, term: &Term) -> Result<(), Failure> {
    document::raise_fence(lease, &shared.local, term.epoch).await?;
    if !term.unbroken {
        let undecided = heir::take_over(shared, lease).await?;
        tracing::info!(undecided, "another daemon worked before");
        lease.journal.set_inherits(true);
        let ours = shared.store.call(begin_anew).await.map_err(store_failed)?;
        close_records(shared, ours).await?;
    }
    let owed = heir::owed(shared, lease).await?;
    journal::open(shared, lease, owed).await?;
    open(shared, lease, term, Side::Local);
    Ok(())
}

async fn open_remote(shared: &Arc<Shared>, lease: &Arc<Lease>, term: &Term) -> Result<(), Failure> {
    let Some(remote) = shared.remote() else {
        return Ok(());
    };
    let known = lock(&lease.state).remote_clock;
    if known.is_none_or(|(_, at)| clock() - at > REMOTE_CLOCK) {
        // Read before the answer's time: on the safe side, deadlines come too early.
        let hello = remote.run_doc("admin", doc! {"hello": 1}).await;
        shared.note(Side::Remote, &hello);
        let time = hello?
            .get_datetime("localTime")
            .map(|t| t.timestamp_millis());
        if let Ok(time) = time {
            lock(&lease.state).remote_clock = Some((time, clock()));
        }
    }
    let Some((time, at)) = lock(&lease.state).remote_clock else {
        return Ok(());
    };
    let over = time + clock() - at > term.remote_busy_until;
    if term.open[Side::Remote as usize] || !term.open[Side::Local as usize] || !over {
        return Ok(());
    }
    let raised = document::raise_fence(lease, &remote, term.epoch).await;
    shared.note(Side::Remote, &raised);
    raised?;
    open(shared, lease, term, Side::Remote);
    Ok(())
}

/// What the last holder wrote is settled once both streams are past the take-over and nothing waits
/// that was queued by then.
async fn settle_inheritance(
    shared: &Arc<Shared>,
    lease: &Lease,
    term: &Term,
) -> Result<(), Failure> {
    let patience = Duration::from_secs(2);
    let local = tail::catch_up(shared, Side::Local, patience).await;
    let remote = !shared.follows() || tail::catch_up(shared, Side::Remote, patience).await;
    if !local || !remote {
        return Ok(());
    }
    let seq = shared
        .store
        .call(queue::last_seq)
        .await
        .map_err(store_failed)?;
    let halted: Vec<u32> = lock(&shared.halted).all().iter().copied().collect();
    while lease.works() && !shared.cancel.is_cancelled() {
        let halted = halted.clone();
        let waiting = shared
            .store
            .call(move |c| queue::ready_up_to(c, seq, (&[], &halted), 1));
        if waiting.await.map_err(store_failed)? == 0 {
            settled(shared, term.epoch).await?;
            lease.journal.set_inherits(false);
            tracing::info!("all that the last holder left is settled");
            return Ok(());
        }
        journal::flush(shared, lease).await?;
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// Conflicts that were open when we last held the lease may be settled or others by now: whatever is in
/// conflict is found again. The records of ours; those of halts go on.
fn begin_anew(c: &rusqlite::Connection) -> rusqlite::Result<Vec<bson::oid::ObjectId>> {
    let ids: Vec<[u8; 12]> = c
        .prepare("SELECT DISTINCT conflict FROM open_conflicts")?
        .query_map([], |r| r.get(0))?
        .collect::<Result<_, _>>()?;
    let closed = handed_over().to_vec().unwrap_or_default();
    for id in &ids {
        records::put_record(c, "conflict_logs", id, &closed)?;
    }
    c.execute_batch(
        "DELETE FROM open_conflicts; DELETE FROM cases;
         UPDATE outbox SET held = NULL, reason = NULL, attempts = 0, next_at = 0 WHERE held IS NOT NULL OR next_at > 0;
         UPDATE inbox SET held = NULL, reason = NULL, attempts = 0, next_at = 0 WHERE held IS NOT NULL OR next_at > 0;",
    )?;
    Ok(halt::all(c)?
        .into_iter()
        .map(|(_, halt)| halt.conflict)
        .collect())
}

fn handed_over() -> Document {
    doc! {
        "resolved": true, "resolvedAt": bson::DateTime::now(), "resolvedBy": "sangam",
        "resolutionStrategy": "handed_over",
        "notes": "another daemon took over; what is still in conflict has a record of its own",
    }
}

/// Closes what the last holder had open on record, but for these.
async fn close_records(shared: &Shared, but: Vec<bson::oid::ObjectId>) -> Result<(), Failure> {
    let command = doc! {
        "update": "conflict_logs", "writeConcern": {"w": "majority"}, "maxTimeMS": 3000,
        "updates": [{"q": {"resolved": false, "_id": {"$nin": but}}, "u": {"$set": handed_over()}, "multi": true}],
    };
    let settings = shared.settings();
    // Past the gate: it opens when this is done.
    let answer = shared
        .local
        .run_past(settings.records_db(), command)
        .await?;
    if answer.contains_key("writeErrors") {
        return Err(Failure::from_code(
            64,
            "open conflicts can't be handed over",
        ));
    }
    Ok(())
}

/// Gives the lease back at a clean end, so that a standby takes it at once.
pub(crate) async fn hand_over(shared: &Arc<Shared>) {
    let Some(lease) = shared.lease() else {
        return;
    };
    lock(&lease.state).leaving = true;
    let quiet = async {
        while lease.at_work.load(Ordering::Acquire) > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let quiet = timeout(Duration::from_millis(1500), quiet).await.is_ok();
    if let Err(failure) = in_time(journal::flush(shared, lease)).await {
        tracing::debug!(%failure, "the last outcomes are not put down");
    }
    let (epoch, until) = {
        let state = lock(&lease.state);
        let Some(term) = state.term.as_ref().filter(|t| clock() < t.valid_until) else {
            return;
        };
        let left = |side: usize| match (quiet, state.lost[side]) {
            (true, 0) => 0,
            (true, lost) => lost + at_work(),
            (false, _) => term.until[side].map_or(0, |until| until + at_work()),
        };
        // What the holder before us may have at work on a side that was never opened to us.
        let remote = if term.open[1] {
            left(1)
        } else {
            term.remote_busy_until
        };
        (term.epoch, [left(0), remote])
    };
    match in_time(document::give_back(lease, &shared.local, (epoch, until))).await {
        Ok(()) => tracing::info!("gave the lease back"),
        Err(failure) => tracing::debug!(%failure, "the lease could not be given back; it runs out"),
    }
}
