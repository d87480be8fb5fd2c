//! Vitals: the figures of one moment, for metrics, history, notifications and the dashboard.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use chrono::{DateTime, Utc};
use rusqlite::Connection;
use serde::Deserialize;

use crate::decide::Side;
use crate::disk;
use crate::shared::{Shared, lock};
use crate::store::queue::{self, Counts};
use crate::store::{self, StoreError};
use crate::watermark;

/// Names under which the last verify and the last proof are kept, each as JSON with the time `at`.
const VERIFIED: &str = "verified";
const PROOF: &str = "proof";

/// What is kept of a verify, as far as it matters here.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Kept {
    at: DateTime<Utc>,
    /// Documents that differed and nothing explained.
    #[serde(default)]
    differences: u64,
}

fn kept(c: &Connection, name: &str) -> rusqlite::Result<Option<Kept>> {
    let text = store::get_meta::<String>(c, name)?;
    Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
}

/// Watermarks of one side's changes, in seconds since 1970 by that side's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mark {
    /// The newest operation that is known of.
    pub source: Option<f64>,
    /// Up to when everything is on the other side or held with a reason.
    pub applied: Option<f64>,
    /// Seconds between the two; while the source can't be asked, between now and the second.
    pub lag: f64,
}

/// The figures.
#[derive(Clone, Debug, Default)]
pub struct Vitals {
    /// When they were taken, ms since 1970.
    pub at: i64,
    /// Local changes that wait.
    pub outbox: Counts,
    /// Remote changes that wait.
    pub inbox: Counts,
    /// Watermarks of the changes of the local side, and of the remote's.
    pub marks: [Mark; 2],
    /// Open conflicts by kind.
    pub conflicts: BTreeMap<String, u64>,
    /// Halted collections.
    pub halted: u64,
    /// The queue or the disk is at its limit.
    pub degraded: bool,
    /// Most bytes for the queues.
    pub queue_limit: u64,
    /// Bytes of the state file.
    pub state_bytes: u64,
    /// Free bytes on its disk, where that can be told.
    pub free_disk: Option<u64>,
    /// Free bytes that are never touched.
    pub disk_reserve: u64,
    /// When both sides were last compared whole, ms since 1970.
    pub compared: Option<i64>,
    /// When both sides were last proven equal, ms since 1970.
    pub verified: Option<i64>,
    /// When the last verify ended (ms since 1970), and how many documents differed.
    pub last_verify: Option<(i64, u64)>,
}

impl Vitals {
    /// When the oldest change that waits was noted, ms since 1970.
    pub fn oldest(&self) -> Option<i64> {
        [self.outbox.oldest, self.inbox.oldest]
            .into_iter()
            .flatten()
            .min()
    }

    /// How much of their limit the queues take.
    pub fn queue_share(&self) -> f64 {
        let used = (self.outbox.all + self.inbox.all) * disk::ROW;
        used as f64 / self.queue_limit.max(1) as f64
    }

    /// The longer of both lags, in seconds.
    pub fn lag(&self) -> f64 {
        self.marks[0].lag.max(self.marks[1].lag)
    }
}

/// Takes the figures.
pub async fn take(shared: &Shared) -> Result<Vitals, StoreError> {
    let (outbox, inbox, conflicts, compared, verifies) = shared
        .store
        .call(|c| {
            let mut kinds = BTreeMap::new();
            let mut rows = c.prepare_cached(
                "SELECT kind, count(DISTINCT conflict) FROM open_conflicts GROUP BY kind",
            )?;
            for row in rows.query_map([], |r| Ok((r.get::<_, String>(0)?, r.get(1)?)))? {
                let (kind, n) = row?;
                kinds.insert(kind, n);
            }
            for (_, halt) in crate::halt::all(c)? {
                *kinds.entry(halt.kind.name().to_owned()).or_default() += 1;
            }
            Ok((
                queue::counts(c, Side::Local)?,
                queue::counts(c, Side::Remote)?,
                kinds,
                store::get_meta::<i64>(c, "last_reconcile")?,
                (kept(c, PROOF)?, kept(c, VERIFIED)?),
            ))
        })
        .await?;
    let (proof, verified) = verifies;
    let limits = shared.settings().config.queue.clone();
    let mark = |side, queue: &Counts| mark(shared, side, queue.oldest);
    Ok(Vitals {
        at: Utc::now().timestamp_millis(),
        marks: [mark(Side::Local, &outbox), mark(Side::Remote, &inbox)],
        outbox,
        inbox,
        conflicts,
        halted: lock(&shared.halted).all().len() as u64,
        degraded: shared.degraded.load(Ordering::Relaxed),
        queue_limit: limits.max_bytes,
        state_bytes: shared.store.bytes_on_disk(),
        free_disk: disk::free_bytes(shared.store.dir()),
        disk_reserve: limits.min_free_disk,
        compared,
        verified: proof.map(|k| k.at.timestamp_millis()),
        last_verify: verified.map(|k| (k.at.timestamp_millis(), k.differences)),
    })
}

/// `oldest`: when the oldest change of that side that waits was noted, ms by our clock.
fn mark(shared: &Shared, side: Side, oldest: Option<i64>) -> Mark {
    let watermark = lock(&shared.watermarks)[side as usize].clone();
    let now = (Utc::now().timestamp_millis() + shared.offset(side)) as f64 / 1000.0;
    let waits = oldest.map(|at| (at + shared.offset(side)) as f64 / 1000.0);
    let source = watermark.source.map(|t| f64::from(t.time));
    // Without a stream, the last pull or comparison is all there is; its age is what `waits` shows.
    let Some(seen) = watermark::seen(shared, side) else {
        let lag = waits.map_or(0.0, |at| (now - at).max(0.0));
        return Mark {
            source,
            applied: waits,
            lag,
        };
    };
    let mut applied = f64::from(seen.time);
    let mut lag = match watermark.source {
        Some(source) if watermark.is_heard() => {
            if (seen.time, seen.increment) >= (source.time, source.increment) {
                0.0
            } else {
                (f64::from(source.time) - applied).max(0.0)
            }
        }
        _ => (now - applied).max(0.0),
    };
    if let Some(waits) = waits {
        lag = lag.max(now - waits);
        applied = applied.min(waits);
    }
    Mark {
        source,
        applied: Some(applied),
        lag,
    }
}
