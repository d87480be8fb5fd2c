//! Watermarks: up to when a database has changed, and up to when we have dealt with that.
//!
//! Lag is the distance of the two, never a matter of whether something seems alive: a change stream
//! that is open and brings nothing while its database moves on is stuck, and counts as not capturing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bson::Timestamp;

use crate::decide::Side;
use crate::failure::Failure;
use crate::shared::{Shared, lock};

/// How often the local database is asked how far it is.
const EVERY: Duration = Duration::from_secs(2);

/// What is known of one side.
#[derive(Clone, Debug, Default)]
pub struct Watermark {
    /// Time of the newest operation the server told of.
    pub source: Option<Timestamp>,
    /// A time that the stream has not reached, since when, and where it was then.
    behind: Option<(Timestamp, Instant, Option<Timestamp>)>,
    /// Since when the server does not answer.
    silent: Option<Instant>,
}

fn order(t: Timestamp) -> (u32, u32) {
    (t.time, t.increment)
}

impl Watermark {
    /// The server told how far it is, or did not answer; `seen` is how far its stream has been read.
    pub fn look(&mut self, told: Option<Timestamp>, seen: Option<Timestamp>, now: Instant) {
        match told {
            Some(_) => (self.source, self.silent) = (told, None),
            None => drop(self.silent.get_or_insert(now)),
        }
        let reached = |target: Timestamp| seen.is_some_and(|s| order(s) >= order(target));
        match self.behind {
            // What moves is not stuck, however far behind.
            Some((target, _, at)) if !reached(target) && at == seen => {}
            _ => {
                self.behind = self
                    .source
                    .filter(|source| !reached(*source))
                    .map(|source| (source, now, seen));
            }
        }
    }

    /// Whether for so long nothing was read though there is something, or nothing was heard at all.
    pub fn is_stuck(&self, patience: Duration, now: Instant) -> bool {
        let for_long = |since: Instant| now.saturating_duration_since(since) > patience;
        self.silent.is_some_and(for_long)
            || self.behind.is_some_and(|(_, since, _)| for_long(since))
    }

    /// Whether the server answered when it was last asked.
    pub fn is_heard(&self) -> bool {
        self.source.is_some() && self.silent.is_none()
    }
}

/// How long a stream may stand still before it counts as stuck.
pub fn patience(shared: &Shared) -> Duration {
    let probe = &shared.settings().config.probe;
    probe.interval + probe.timeout * 2
}

/// How far every stream of a side has been read.
pub fn seen(shared: &Shared, side: Side) -> Option<Timestamp> {
    let databases = shared.settings().config.databases.clone();
    let streams = lock(&shared.streams);
    let each = databases
        .into_iter()
        .map(|db| streams.get(&(side, db)).and_then(|s| s.seen));
    // One that has read nothing makes the whole unknown.
    each.collect::<Option<Vec<_>>>()?
        .into_iter()
        .min_by_key(|t| order(*t))
}

/// Runs until the daemon ends.
pub async fn run(shared: Arc<Shared>) -> Result<(), Failure> {
    let mut asked_remote = None::<Instant>;
    loop {
        look(&shared, Side::Local).await;
        let every = shared.settings().config.probe.interval;
        if asked_remote.is_none_or(|at| at.elapsed() >= every) {
            asked_remote = Some(Instant::now());
            look(&shared, Side::Remote).await;
        }
        tokio::select! {
            () = shared.cancel.cancelled() => return Ok(()),
            () = tokio::time::sleep(EVERY.min(every)) => {}
        }
    }
}

async fn look(shared: &Arc<Shared>, side: Side) {
    let told = match shared.endpoint(side) {
        Ok(endpoint) if side == Side::Local || shared.link.is_online() => {
            let limit = shared.settings().config.probe.timeout * 2;
            // In a task of its own: a driver's call must not be dropped half-way.
            let asking = tokio::spawn(async move { endpoint.hello().await });
            match tokio::time::timeout(limit, asking).await {
                Ok(Ok(Ok(hello))) => hello.operation_time,
                _ => None,
            }
        }
        _ => None,
    };
    let seen = seen(shared, side);
    lock(&shared.watermarks)[side as usize].look(told, seen, Instant::now());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(time: u32) -> Option<Timestamp> {
        Some(Timestamp { time, increment: 1 })
    }

    #[test]
    fn a_stream_that_stands_still_while_its_database_moves_is_stuck() {
        let (start, patience) = (Instant::now(), Duration::from_secs(40));
        let after = |s: u64| start + Duration::from_secs(s);
        let mut mark = Watermark::default();
        for (second, told, seen, stuck) in [
            (0, at(100), at(100), false),
            (10, at(110), at(100), false),
            (30, at(130), at(105), false), // behind, but moving
            (60, at(160), at(105), false),
            (71, at(171), at(105), true), // 41 s in one place
            (80, at(180), at(180), false),
            (200, at(180), at(180), false), // nothing to read for two minutes
            (210, None, at(180), false),
            (251, None, at(180), true), // the server says nothing
            (260, at(190), at(191), false),
        ] {
            mark.look(told, seen, after(second));
            assert_eq!(mark.is_stuck(patience, after(second)), stuck, "at {second}");
        }
    }

    #[test]
    fn a_stream_that_never_read_anything_is_stuck_after_a_while() {
        let start = Instant::now();
        let mut mark = Watermark::default();
        mark.look(at(100), None, start);
        let later = start + Duration::from_secs(41);
        mark.look(at(141), None, later);
        assert!(mark.is_stuck(Duration::from_secs(40), later));
    }
}
