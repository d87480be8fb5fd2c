//! Watching a database until something shows in it, and everything else that is waited for.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use mongodb::Database;
use mongodb::bson::{Bson, Document, doc};

/// How long anything in the demo may take before it counts as not coming.
pub(super) const PATIENCE: Duration = Duration::from_secs(90);
/// Time between two looks where a latency is measured.
const CLOSE_LOOK: Duration = Duration::from_millis(2);
/// Time between two looks elsewhere.
const LOOK: Duration = Duration::from_millis(20);

/// Documents by which one sees that a change has arrived.
#[derive(Clone, Debug)]
pub(super) struct Sign {
    pub(super) database: Database,
    pub(super) collection: &'static str,
    pub(super) filter: Document,
    /// How many documents match once it has arrived.
    pub(super) expected: u64,
}

impl Sign {
    /// These documents are there.
    pub(super) fn present(database: &Database, collection: &'static str, ids: &[Bson]) -> Self {
        Self::of(database, collection, ids, doc! {}, ids.len())
    }

    /// These documents are gone.
    pub(super) fn absent(database: &Database, collection: &'static str, ids: &[Bson]) -> Self {
        Self::of(database, collection, ids, doc! {}, 0)
    }

    /// These documents are there with these values.
    pub(super) fn changed(
        database: &Database,
        collection: &'static str,
        ids: &[Bson],
        values: Document,
    ) -> Self {
        Self::of(database, collection, ids, values, ids.len())
    }

    fn of(
        database: &Database,
        collection: &'static str,
        ids: &[Bson],
        values: Document,
        expected: usize,
    ) -> Self {
        let mut filter = doc! {"_id": {"$in": ids}};
        filter.extend(values);
        Self {
            database: database.clone(),
            collection,
            filter,
            expected: expected as u64,
        }
    }

    async fn shows(&self) -> Result<bool> {
        let collection = self.database.collection::<Document>(self.collection);
        let found = collection.count_documents(self.filter.clone()).await?;
        Ok(found == self.expected)
    }
}

/// Waits until all signs show; the time that has passed since `since`.
pub(super) async fn watch(what: &str, signs: &[Sign], since: Instant) -> Result<Duration> {
    let mut left = signs;
    until_within(PATIENCE, CLOSE_LOOK, what, async || {
        while let [sign, rest @ ..] = left {
            if !sign.shows().await? {
                return Ok(None);
            }
            left = rest;
        }
        Ok(Some(since.elapsed()))
    })
    .await
}

/// Looks until there is a value. An error of a look counts as "not yet" and is named at the end.
pub(super) async fn until<T>(
    what: &str,
    look: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    until_within(PATIENCE, LOOK, what, look).await
}

async fn until_within<T>(
    limit: Duration,
    pause: Duration,
    what: &str,
    mut look: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let why = match tokio::time::timeout(left.max(CLOSE_LOOK), look()).await {
            Ok(Ok(Some(value))) => return Ok(value),
            Ok(Ok(None)) => None,
            Ok(Err(error)) => Some(format!("{error:#}")),
            Err(_) => Some("the last look got no answer".into()),
        };
        if Instant::now() >= deadline {
            let why = why.map_or_else(String::new, |why| format!(" ({why})"));
            bail!("{what}, within {} s{why}", limit.as_secs());
        }
        tokio::time::sleep(pause).await;
    }
}

/// The middle and the largest of some durations.
pub(super) fn typical_and_slowest(times: &[Duration]) -> (Duration, Duration) {
    let mut sorted = times.to_vec();
    sorted.sort();
    let middle = sorted.get(sorted.len() / 2).copied().unwrap_or_default();
    (middle, sorted.last().copied().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_does_not_come_is_named_with_its_last_reason() {
        let limit = Duration::from_millis(20);
        let outcome = until_within(limit, LOOK, "the tide", async || -> Result<Option<()>> {
            bail!("low water")
        });
        let error = outcome.await.unwrap_err().to_string();
        assert_eq!(error, "the tide, within 0 s (low water)");

        let outcome = until_within(limit, LOOK, "the tide", async || {
            std::future::pending::<Result<Option<()>>>().await
        });
        let error = outcome.await.unwrap_err().to_string();
        assert!(error.contains("no answer"), "{error}");
    }

    #[tokio::test]
    async fn what_comes_after_an_error_counts() {
        let mut looks = 0;
        let seen = until("the tide", async || {
            looks += 1;
            match looks {
                1 => bail!("fog"),
                2 => Ok(None),
                _ => Ok(Some(looks)),
            }
        });
        assert_eq!(seen.await.unwrap(), 3);
    }

    #[test]
    fn the_middle_of_an_odd_number_of_times() {
        let ms = Duration::from_millis;
        assert_eq!(typical_and_slowest(&[ms(9), ms(1), ms(5)]), (ms(5), ms(9)));
        assert_eq!(typical_and_slowest(&[]), (ms(0), ms(0)));
    }
}
