//! The history behind the dashboard's charts: a sample a minute, folded into coarser ones, so that a
//! year takes a few thousand small rows; and when the link came and went.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};

use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::link::{Snapshot, State};
use crate::metrics::Moved;
use crate::settle::store_failed;
use crate::shared::{Shared, lock};
use crate::store::StoreError;
use crate::vitals;

/// A sample a minute.
const EVERY: Duration = Duration::from_secs(60);

/// Length of a row's span in seconds, and for how long such rows are kept: a day by the minute,
/// a fortnight by the quarter of an hour, 400 days by the six hours. 4400 rows in all.
const STEPS: [(i64, i64); 3] = [(60, 86_400), (900, 14 * 86_400), (21_600, 400 * 86_400)];

/// Most changes of the link that are kept.
const LINK_ROWS: i64 = 2000;

/// What happened within a span: the highest of what is a level, the sum of what is a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Sample {
    /// Begin of the span, seconds since 1970.
    pub at: i64,
    /// Documents in the outbox.
    pub outbox: u64,
    /// Documents in the inbox.
    pub inbox: u64,
    /// Lag in seconds, the longer of both directions.
    pub lag: f64,
    /// Documents written to the remote.
    pub sent: u64,
    /// Documents written to the local database.
    pub fetched: u64,
    /// Bytes of the documents sent.
    pub sent_bytes: u64,
    /// Bytes of the documents fetched.
    pub fetched_bytes: u64,
    /// Open conflicts.
    pub conflicts: u64,
}

/// When the link came or went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LinkChange {
    /// When.
    pub at: DateTime<Utc>,
    /// Whether the remote answers since then.
    pub online: bool,
    /// Why not; as `reason` of the link.
    pub reason: Option<String>,
}

/// Answer to `history`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct History {
    /// Length of each span in seconds.
    pub step_seconds: i64,
    /// Oldest first; spans without a sample are missing.
    pub samples: Vec<Sample>,
    /// The last changes of the link, newest first.
    pub link: Vec<LinkChange>,
}

/// Adds a sample to all steps and drops what is too old, inside a call.
pub fn add(c: &Connection, s: &Sample) -> rusqlite::Result<()> {
    for (step, keep) in STEPS {
        c.prepare_cached(
            "INSERT INTO history VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10) ON CONFLICT(step, at) DO UPDATE SET
             outbox = max(outbox, ?3), inbox = max(inbox, ?4), lag = max(lag, ?5), sent = sent + ?6,
             fetched = fetched + ?7, sent_bytes = sent_bytes + ?8, fetched_bytes = fetched_bytes + ?9,
             conflicts = max(conflicts, ?10)",
        )?
        .execute(params![
            step,
            s.at - s.at.rem_euclid(step),
            s.outbox,
            s.inbox,
            s.lag,
            s.sent,
            s.fetched,
            s.sent_bytes,
            s.fetched_bytes,
            s.conflicts
        ])?;
        // A clock that was years ahead for a while must not leave rows behind, either.
        c.prepare_cached("DELETE FROM history WHERE step = ? AND (at < ? OR at > ?)")?
            .execute([step, s.at - keep, s.at + keep])?;
    }
    Ok(())
}

/// The samples of the last `hours`, by the finest step that reaches so far back.
pub fn read(c: &Connection, hours: u32, now: i64) -> rusqlite::Result<History> {
    let span = i64::from(hours) * 3600;
    let (step, _) = STEPS
        .into_iter()
        .find(|(_, keep)| *keep >= span)
        .unwrap_or(STEPS[STEPS.len() - 1]);
    let mut rows = c.prepare_cached(
        "SELECT at, outbox, inbox, lag, sent, fetched, sent_bytes, fetched_bytes, conflicts
         FROM history WHERE step = ? AND at > ? ORDER BY at",
    )?;
    let samples = rows.query_map([step, now - span - step], |r| {
        Ok(Sample {
            at: r.get(0)?,
            outbox: r.get(1)?,
            inbox: r.get(2)?,
            lag: r.get(3)?,
            sent: r.get(4)?,
            fetched: r.get(5)?,
            sent_bytes: r.get(6)?,
            fetched_bytes: r.get(7)?,
            conflicts: r.get(8)?,
        })
    })?;
    let samples = samples.collect::<Result<_, _>>()?;
    let mut rows =
        c.prepare_cached("SELECT at, online, reason FROM link_history ORDER BY n DESC LIMIT 200")?;
    let link = rows.query_map([], |r| {
        Ok(LinkChange {
            at: DateTime::from_timestamp(r.get(0)?, 0).unwrap_or_default(),
            online: r.get(1)?,
            reason: r.get(2)?,
        })
    })?;
    Ok(History {
        step_seconds: step,
        samples,
        link: link.collect::<Result<_, _>>()?,
    })
}

/// Puts a change of the link on record; a second look at the same outage only says more of it.
fn add_link(c: &Connection, at: i64, online: bool, reason: Option<&str>) -> rusqlite::Result<()> {
    let last = c
        .query_row(
            "SELECT n, online FROM link_history ORDER BY n DESC LIMIT 1",
            [],
            |r| Ok((r.get::<_, i64>(0)?, r.get::<_, bool>(1)?)),
        )
        .optional()?;
    if let Some((n, before)) = last
        && before == online
    {
        // The same outage; what is known of its reason grows.
        c.execute(
            "UPDATE link_history SET reason = ? WHERE n = ?",
            params![reason, n],
        )?;
        return Ok(());
    }
    c.execute(
        "INSERT INTO link_history(at, online, reason) VALUES(?, ?, ?)",
        params![at, online, reason],
    )?;
    c.execute(
        "DELETE FROM link_history WHERE n <= (SELECT max(n) FROM link_history) - ?",
        [LINK_ROWS],
    )?;
    Ok(())
}

/// When documents of each collection were last moved, ms since 1970.
pub fn activity(c: &Connection) -> rusqlite::Result<HashMap<String, i64>> {
    c.prepare_cached("SELECT collection, at FROM activity")?
        .query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?
        .collect()
}

/// Runs until the daemon ends.
pub async fn run(shared: Arc<Shared>) -> Result<(), Failure> {
    let mut link = shared.link.subscribe();
    let mut due = tokio::time::Instant::now() + EVERY;
    loop {
        let state = link.borrow_and_update().clone();
        noted(note_link(&shared, state).await)?;
        tokio::select! {
            () = shared.cancel.cancelled() => return Ok(()),
            _ = link.changed() => {}
            () = tokio::time::sleep_until(due) => {
                due += EVERY;
                noted(sample(&shared).await)?;
            }
        }
    }
}

/// A full disk costs samples; anything else is the store's end.
fn noted(outcome: Result<(), StoreError>) -> Result<(), Failure> {
    match outcome.map_err(store_failed) {
        Err(failure) if failure.class == Class::Fatal => Err(failure),
        Err(failure) => {
            tracing::debug!(%failure, "no sample");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

async fn note_link(shared: &Shared, link: Snapshot) -> Result<(), StoreError> {
    let online = match link.state {
        State::Online => true,
        State::Offline { .. } => false,
        // Nothing is certain yet.
        State::Interrupted | State::NotConfigured => return Ok(()),
    };
    let reason = link.reason.map(crate::failure::Reason::name);
    let at = link.since.timestamp();
    shared
        .store
        .call(move |c| add_link(c, at, online, reason))
        .await
}

async fn sample(shared: &Shared) -> Result<(), StoreError> {
    let now = vitals::take(shared).await?;
    let moved = shared.metrics.take_moved();
    let [fetched, sent]: [Moved; 2] = [moved[Side::Local as usize], moved[Side::Remote as usize]];
    let sample = Sample {
        at: now.at / 1000,
        outbox: now.outbox.all,
        inbox: now.inbox.all,
        lag: now.lag(),
        sent: sent.documents,
        fetched: fetched.documents,
        sent_bytes: sent.bytes,
        fetched_bytes: fetched.bytes,
        conflicts: now.conflicts.values().sum(),
    };
    let active = std::mem::take(&mut *lock(&shared.activity));
    shared
        .store
        .call(move |c| {
            add(c, &sample)?;
            for (collection, at) in &active {
                c.prepare_cached("INSERT OR REPLACE INTO activity VALUES(?, ?)")?
                    .execute(params![collection, at])?;
            }
            Ok(())
        })
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> Connection {
        let c = Connection::open_in_memory().unwrap();
        c.execute_batch(crate::store::TABLES).unwrap();
        c
    }

    fn at(at: i64) -> Sample {
        Sample {
            at,
            outbox: u64::try_from(at / 60 % 7).unwrap(),
            sent: 2,
            ..Sample::default()
        }
    }

    #[test]
    fn two_years_by_the_minute_take_a_bounded_number_of_rows() {
        let c = store();
        c.execute_batch("BEGIN").unwrap();
        let start = 1_700_000_000;
        // Every minute of the last days; every hour before, as the rows that matter are the same.
        let end = start + 2 * 366 * 86_400;
        for t in (start..end - 3 * 86_400).step_by(3600) {
            add(&c, &at(t)).unwrap();
        }
        for t in (end - 3 * 86_400..end).step_by(60) {
            add(&c, &at(t)).unwrap();
        }
        let rows: i64 = c
            .query_row("SELECT count(*) FROM history", [], |r| r.get(0))
            .unwrap();
        assert!(rows < 4500, "{rows} rows");
        let year = read(&c, 366 * 24, end).unwrap();
        assert_eq!(year.step_seconds, 21_600);
        assert!(year.samples.len() > 1450, "{}", year.samples.len());
        let day = read(&c, 24, end).unwrap();
        assert_eq!((day.step_seconds, day.samples.len()), (60, 1440));
        let week = read(&c, 24 * 7, end).unwrap();
        let quarter = week.samples[week.samples.len() - 2];
        assert_eq!(quarter.sent, 30, "a flow adds up");
        assert_eq!(quarter.outbox, 6, "of a level the highest counts");
    }

    #[test]
    fn a_clock_that_jumps_leaves_no_rows_in_the_future() {
        let c = store();
        add(&c, &at(4_000_000_000)).unwrap();
        add(&c, &at(1_700_000_000)).unwrap();
        let rows: i64 = c
            .query_row("SELECT count(*) FROM history", [], |r| r.get(0))
            .unwrap();
        assert_eq!(rows, 3);
    }

    #[test]
    fn the_link_is_recorded_when_it_changes() {
        let c = store();
        for (t, online, reason) in [
            (1, true, None),
            (2, true, None),
            (3, false, Some("dns")),
            (4, false, Some("dns")),
            (5, false, Some("timeout")),
            (6, true, None),
        ] {
            add_link(&c, t, online, reason).unwrap();
        }
        let link = read(&c, 1, 100).unwrap().link;
        let times: Vec<i64> = link.iter().map(|l| l.at.timestamp()).collect();
        assert_eq!(times, [6, 3, 1]);
        assert_eq!(link[1].reason.as_deref(), Some("timeout"));
    }
}
