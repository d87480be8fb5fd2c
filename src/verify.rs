//! Verify: proves the two sides equal, or says what differs. Writes nothing but its own notes.
//!
//! Every document of both sides is read, range by range; where it stands is on disk, so that an
//! interrupted verify goes on. What differs at the first look is only a suspicion, since apps go on
//! writing: it is looked at again once the streams have passed that point. Then it counts only if no
//! queue knows of it and both sides hold what they held before. What waits (queued, in conflict, set
//! aside) is counted apart.

mod report;
mod suspects;

pub use report::{Difference, Last, Proof, Report, Request, Tally};
pub(crate) use suspects::rules;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::command::CommandError;
use crate::extent::{self, Extent};
use crate::failure::{Failure, Reason};
use crate::key::Id;
use crate::progress::Meter;
use crate::settle::store_failed;
use crate::shared::{Shared, lock};
use crate::store::{self, differences};
use crate::walk::{Found, Place, Range};
use crate::{pull, reconcile};

/// Name under which it is kept how far a verify is.
const UNDER_WAY: &str = "verify";
/// Name of the last report.
const LAST: &str = "verified";
/// Name of the last proof.
const PROOF: &str = "proof";

/// Differences that a report lists; all of them are counted.
const LISTED: u32 = 1000;

/// How far a verify is, as it is kept on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    started: DateTime<Utc>,
    only: Vec<String>,
    /// The collections that are done.
    done: Vec<Tally>,
    /// The one at work.
    at: Tally,
    /// Where its next range begins.
    from: Option<Vec<u8>>,
}

/// Verifies and waits for the end. One at a time.
pub async fn verify(shared: &Arc<Shared>, request: Request) -> Result<Report, CommandError> {
    let only = request.collections.clone().unwrap_or_default();
    extent::check(&shared.settings(), &only)?;
    if shared.verifying_now.swap(true, Ordering::AcqRel) {
        return Err(CommandError::Refused(
            "a verify is already running; see `sangam status`".into(),
        ));
    }
    let outcome = run(shared, &request, only).await;
    *lock(&shared.verifying) = None;
    shared.verifying_now.store(false, Ordering::Release);
    if let Err(failure) = &outcome {
        tracing::warn!(%failure, "verify was interrupted; the next one goes on from here");
    }
    Ok(outcome?)
}

/// The report of the last verify.
pub async fn last(shared: &Shared) -> Result<Option<Report>, CommandError> {
    let text = shared.store.get_meta::<String>(LAST).await?;
    Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
}

/// For `status`: the last verify and the last proof, inside a call.
pub fn summary(c: &rusqlite::Connection) -> rusqlite::Result<(Option<Last>, Option<Proof>)> {
    let report: Option<String> = store::get_meta(c, "verified_short")?;
    let proof: Option<String> = store::get_meta(c, PROOF)?;
    let last = report.and_then(|text| serde_json::from_str(&text).ok());
    Ok((
        last,
        proof.and_then(|text| serde_json::from_str(&text).ok()),
    ))
}

async fn begin(
    shared: &Shared,
    request: &Request,
    only: Vec<String>,
) -> Result<(State, bool), Failure> {
    let text = shared.store.get_meta::<String>(UNDER_WAY).await;
    let before: Option<State> = text
        .map_err(store_failed)?
        .and_then(|text| serde_json::from_str(&text).ok());
    if let Some(state) = before.filter(|s| !request.fresh && s.only == only) {
        return Ok((state, true));
    }
    let state = State {
        started: Utc::now(),
        only,
        done: vec![],
        at: Tally::default(),
        from: None,
    };
    let kept = state.clone();
    let begun = shared.store.call(move |c| {
        differences::forget(c)?;
        keep(c, &kept)
    });
    begun.await.map_err(store_failed)?;
    Ok((state, false))
}

fn keep(c: &rusqlite::Connection, state: &State) -> rusqlite::Result<()> {
    store::set_meta(
        c,
        UNDER_WAY,
        serde_json::to_string(state).unwrap_or_default(),
    )
}

async fn run(
    shared: &Arc<Shared>,
    request: &Request,
    only: Vec<String>,
) -> Result<Report, Failure> {
    let settings = shared.settings();
    let (mut state, resumed) = begin(shared, request, only).await?;
    *lock(&shared.verifying) = Some(Meter::new("verify"));
    let all = extent::of(shared, &settings, &state.only).await?;
    let mut places = Vec::new();
    for extent in all {
        let names = (extent.db.as_str(), extent.coll.as_str());
        let place = Place::open(shared, &settings, names, extent.ns).await?;
        let before = state
            .done
            .iter()
            .chain([&state.at])
            .find(|t| t.collection == extent.shown);
        let (documents, bytes) = before.map_or((0, 0), |t| (t.documents, t.bytes));
        let open = |m: &mut Meter| {
            m.open(
                extent.shown.clone(),
                place.size().documents,
                documents,
                bytes,
            )
        };
        let number = lock(&shared.verifying).as_mut().map_or(0, open);
        places.push((extent, place, number));
    }
    for (extent, place, number) in places {
        if !state.done.iter().any(|t| t.collection == extent.shown) {
            if state.at.collection != extent.shown {
                state.at = Tally {
                    collection: extent.shown.clone(),
                    held: extent.halted,
                    ..Tally::default()
                };
                state.from = None;
            }
            if !extent.halted {
                walk(shared, request, (&place, number), &mut state).await?;
                shared.failpoints.crash("verify_walked");
                let found = judge(shared, &extent).await?;
                state.at.add(&found);
            }
            state.done.push(std::mem::take(&mut state.at));
            state.from = None;
            let kept = state.clone();
            let stored = shared.store.call(move |c| keep(c, &kept));
            stored.await.map_err(store_failed)?;
        }
        if let Some(meter) = lock(&shared.verifying).as_mut() {
            meter.finish(number);
        }
    }
    report(shared, state, resumed).await
}

/// Reads a collection on both sides, from where the state says.
async fn walk(
    shared: &Arc<Shared>,
    request: &Request,
    (place, number): (&Place, usize),
    state: &mut State,
) -> Result<(), Failure> {
    // `Some(None)` is the beginning; a collection that was walked to its end is told by its flag.
    if state.at.held || state.from.as_deref() == Some(&[]) {
        return Ok(());
    }
    let most = [
        request.max_documents_per_second,
        request
            .max_bytes_per_second
            .map(|b| b / (2 * place.size().average.max(1))),
    ];
    let most = most.into_iter().flatten().min().unwrap_or(u64::MAX).max(1);
    let documents = place.exact_range().min(most);
    loop {
        if shared.cancel.is_cancelled() || !shared.link.is_online() {
            return Err(Failure::offline(
                shared.link.snapshot().reason.unwrap_or(Reason::Offline),
            ));
        }
        let began = Instant::now();
        let from = state.from.as_deref().map(Id::from_bytes);
        let to = place.bound(from.as_ref(), None, documents).await?;
        let range = Range {
            from,
            to: to.clone(),
        };
        let mut suspects = Vec::new();
        let count = extent::compare(shared, place, &range, |found| {
            if let Found::Differs(d) = found {
                suspects.push((d.key, d.id));
            }
        })
        .await?;
        state.at.documents += count.documents;
        state.at.bytes += count.bytes;
        state.from = Some(to.as_ref().map_or_else(Vec::new, Id::to_bytes));
        let kept = state.clone();
        let stored = shared.store.call(move |c| {
            differences::suspect(c, &suspects)?;
            keep(c, &kept)
        });
        stored.await.map_err(store_failed)?;
        shared.failpoints.crash("verify_range");
        if let Some(meter) = lock(&shared.verifying).as_mut() {
            meter.add(number, count.documents, count.bytes);
        }
        if to.is_none() {
            return Ok(());
        }
        rest(shared, request, (count.documents, count.bytes), began).await;
    }
}

/// Waits as long as the limits ask for what was read.
async fn rest(shared: &Shared, request: &Request, read: (u64, u64), began: Instant) {
    let seconds = |n: u64, limit: Option<u64>| limit.map_or(0.0, |l| n as f64 / l.max(1) as f64);
    let wanted = seconds(read.0, request.max_documents_per_second)
        .max(seconds(read.1, request.max_bytes_per_second));
    let left = Duration::from_secs_f64(wanted).saturating_sub(began.elapsed());
    tokio::select! {
        () = shared.cancel.cancelled() => {}
        () = tokio::time::sleep(left) => {}
    }
}

/// Looks again at what seemed to differ in a collection.
async fn judge(shared: &Arc<Shared>, extent: &Extent) -> Result<Tally, Failure> {
    if !shared.follows() {
        // What the timestamps tell of is on its way then, and no riddle.
        pull::pull(shared, true).await?;
    }
    let ns = extent.ns;
    loop {
        let page = shared
            .store
            .call(move |c| differences::suspects(c, ns, suspects::PAGE));
        let page = page.await.map_err(store_failed)?;
        if page.is_empty() {
            break;
        }
        let verdicts = suspects::judge(shared, extent, page).await?;
        let stored = shared
            .store
            .call(move |c| verdicts.iter().try_for_each(|v| differences::put(c, v)));
        stored.await.map_err(store_failed)?;
    }
    let counted = shared.store.call(move |c| differences::count(c, ns));
    let mut tally = Tally::default();
    for (kind, n) in counted.await.map_err(store_failed)? {
        match kind.as_str() {
            "only_local" => tally.only_local = n,
            "only_remote" => tally.only_remote = n,
            "different" => tally.different = n,
            "conflict" => tally.in_conflict = n,
            "failed" => tally.set_aside = n,
            "expired" => tally.expired = n,
            _ => tally.waiting += n,
        }
    }
    Ok(tally)
}

async fn report(shared: &Shared, state: State, resumed: bool) -> Result<Report, Failure> {
    let mut total = Tally::default();
    state.done.iter().for_each(|t| total.add(t));
    let settings = shared.settings();
    let listed = shared.store.call(move |c| differences::list(c, LISTED));
    let listed = listed.await.map_err(store_failed)?;
    let differences = listed.into_iter().map(|d| {
        let (db, coll) = shared.store.namespace_name(d.key.ns()).unwrap_or_default();
        Difference {
            collection: settings.display(&db, &coll),
            id: crate::conflicts::id_json(&d.id),
            kind: d.kind,
            repair: d.repair,
        }
    });
    let report = Report {
        equal: total.differences() == 0 && !total.held,
        started: state.started,
        ended: Utc::now(),
        resumed,
        total,
        collections: state.done,
        differences: differences.collect(),
    };
    store_report(shared, &report, state.only.is_empty()).await?;
    tracing::info!(
        equal = report.equal,
        documents = report.total.documents,
        differences = report.total.differences(),
        waiting = report.total.known(),
        "verified"
    );
    Ok(report)
}

async fn store_report(shared: &Shared, report: &Report, whole: bool) -> Result<(), Failure> {
    let short = Last {
        at: report.ended,
        equal: report.equal,
        documents: report.total.documents,
        differences: report.total.differences(),
        waiting: report.total.known(),
    };
    let proof = (report.equal && whole).then(|| Proof {
        at: report.ended,
        documents: report.total.documents,
        waiting: report.total.known(),
    });
    let text = serde_json::to_string(report).unwrap_or_default();
    let short = serde_json::to_string(&short).unwrap_or_default();
    let stored = shared.store.call(move |c| {
        store::set_meta(c, LAST, text)?;
        store::set_meta(c, "verified_short", short)?;
        if let Some(proof) = proof {
            store::set_meta(c, PROOF, serde_json::to_string(&proof).unwrap_or_default())?;
        }
        c.execute("DELETE FROM meta WHERE k = ?", [UNDER_WAY])
    });
    stored.await.map(|_| ()).map_err(store_failed)
}

/// Mends the differences of the last verify: the worker looks at each and decides as always. Waits until
/// it has, and looks whether they are gone.
pub async fn repair(shared: &Arc<Shared>) -> Result<Report, CommandError> {
    let Some(before) = last(shared).await? else {
        return Err(CommandError::Refused(
            "nothing was verified yet; run `sangam verify` first".into(),
        ));
    };
    if shared.verifying_now.swap(true, Ordering::AcqRel) {
        return Err(CommandError::Refused(
            "a verify is running; wait for it".into(),
        ));
    }
    let outcome = mend(shared, before).await;
    shared.verifying_now.store(false, Ordering::Release);
    Ok(outcome?)
}

async fn mend(shared: &Arc<Shared>, before: Report) -> Result<Report, Failure> {
    let seq = shared.store.call(|c| {
        differences::queue(c)?;
        store::queue::last_seq(c)
    });
    let seq = seq.await.map_err(store_failed)?;
    tracing::info!(
        differences = before.total.differences(),
        "repairing what differs"
    );
    shared.wake.notify_one();
    reconcile::drained(shared, seq, &[]).await?;
    let settings = shared.settings();
    let mut state = State {
        started: before.started,
        only: vec![],
        done: vec![],
        at: Tally::default(),
        from: None,
    };
    let mut now = std::collections::HashMap::new();
    for extent in extent::of(shared, &settings, &[]).await? {
        now.insert(extent.shown.clone(), judge(shared, &extent).await?);
    }
    for tally in before.collections {
        let mut found = now.remove(&tally.collection).unwrap_or_default();
        found.collection.clone_from(&tally.collection);
        (found.documents, found.bytes, found.held) = (tally.documents, tally.bytes, tally.held);
        state.done.push(found);
    }
    report(shared, state, false).await
}
