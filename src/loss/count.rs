//! How many deletions wait in a queue, and how many are a mass.

use rusqlite::{Connection, params};

use super::FEWEST;
use crate::decide::Side;
use crate::store::queue;

/// Whether so many deletions, of so many documents, are too many at once.
pub(crate) fn is_mass(deletions: u64, documents: u64, percent: u64) -> bool {
    deletions >= FEWEST && deletions.saturating_mul(100) > percent.saturating_mul(documents)
}

/// Deletions of a collection that wait and would be carried over; of many, those of the two fullest
/// minutes in a row.
pub(super) fn deletions(c: &Connection, from: Side, ns: u32) -> rusqlite::Result<u64> {
    let (low, high) = (ns.to_be_bytes().to_vec(), (ns + 1).to_be_bytes().to_vec());
    let (t, other) = (queue::table(from), queue::table(from.other()));
    let gone = queue::GONE;
    let all: u64 = c
        .prepare_cached(&format!(
            "SELECT count(*) FROM {t} WHERE {gone} AND key >= ? AND key < ?"
        ))?
        .query_row(params![low, high], |r| r.get(0))?;
    if all < FEWEST {
        return Ok(all);
    }
    // Echoes of our own deletions have no base any more; what both sides deleted is no loss.
    let mut minutes = c.prepare_cached(&format!(
        "SELECT CASE hint WHEN x'44' THEN 0 ELSE at / 60000 END AS minute, count(*) FROM {t} WHERE {gone} AND key >= ? AND key < ?
         AND EXISTS(SELECT 1 FROM base WHERE base.key = {t}.key)
         AND NOT EXISTS(SELECT 1 FROM {other} AS o WHERE o.key = {t}.key AND o.hint IN (x'64', x'44'))
         GROUP BY minute ORDER BY minute"
    ))?;
    let rows = minutes.query_map(params![low, high], |r| {
        Ok((r.get::<_, i64>(0)?, r.get::<_, u64>(1)?))
    })?;
    let (mut found, mut most, mut last) = (0, 0, (i64::MIN, 0));
    for row in rows {
        let (minute, count) = row?;
        if minute == 0 {
            // Found by a comparison, or changed before: nobody knows when it was deleted.
            found = count;
            continue;
        }
        let before = if last.0.saturating_add(1) == minute {
            last.1
        } else {
            0
        };
        most = most.max(before + count);
        last = (minute, count);
    }
    Ok(most + found)
}

/// Whether documents wait to be looked at of which nobody has said how they are.
pub(super) fn any_unknown(c: &Connection, from: Side, ns: u32) -> rusqlite::Result<bool> {
    let (low, high) = (ns.to_be_bytes().to_vec(), (ns + 1).to_be_bytes().to_vec());
    c.prepare_cached(&format!(
        "SELECT EXISTS(SELECT 1 FROM {} WHERE held IS NULL AND hint IS NULL AND key >= ? AND key < ?)",
        queue::table(from)
    ))?
    .query_row(params![low, high], |r| r.get(0))
}

#[cfg(test)]
mod tests {
    use bson::doc;

    use super::*;
    use crate::key::{Id, Key};
    use crate::store::Store;
    use crate::store::base;
    use crate::store::queue::Change;

    fn change(n: i32, hint: &[u8]) -> Change {
        let id = Id::of(&doc! {"_id": n}.to_vec().unwrap()).unwrap();
        Change {
            key: Key::new(1, &id),
            id,
            hint: Some(hint.to_vec()),
        }
    }

    /// Queues deletions of local documents that base knows; each number is deleted at its time.
    async fn queued(gone: Vec<(i32, i64)>, both: bool) -> u64 {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store
            .call(move |c| {
                for (n, at) in gone {
                    let change = change(n, b"d");
                    base::put(c, &change.key, Some(&doc! {"_id": n}.to_vec().unwrap()))?;
                    queue::enqueue(c, Side::Local, std::slice::from_ref(&change), at)?;
                    if both {
                        queue::enqueue(c, Side::Remote, &[change], at)?;
                    }
                }
                deletions(c, Side::Local, 1)
            })
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn a_fortnight_of_deletions_is_no_mass_but_a_minute_of_them_is() {
        let minute = 60_000;
        let slow = (0..2000).map(|n| (n, (1_000 + i64::from(n) * 10) * minute));
        assert_eq!(queued(slow.collect(), false).await, 1);
        let fast = (0..2000).map(|n| (n, 1_000 * minute + i64::from(n) * 50));
        assert_eq!(queued(fast.collect(), false).await, 2000);
    }

    #[tokio::test]
    async fn what_both_sides_deleted_is_no_loss() {
        let gone = (0..500).map(|n| (n, 60_000)).collect();
        assert_eq!(queued(gone, true).await, 0);
    }

    #[tokio::test]
    async fn a_deletion_after_an_edit_counts_and_an_edit_after_it_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let counted = store.call(|c| {
            for n in 0..200 {
                let change = change(n, b"d");
                base::put(c, &change.key, Some(&doc! {"_id": n}.to_vec().unwrap()))?;
                let look = Change {
                    hint: None,
                    ..change.clone()
                };
                queue::enqueue(c, Side::Local, std::slice::from_ref(&look), 0)?;
                queue::enqueue(c, Side::Local, &[change], 60_000)?;
                if n < 50 {
                    queue::enqueue(c, Side::Local, &[look], 60_000)?;
                }
            }
            deletions(c, Side::Local, 1)
        });
        assert_eq!(counted.await.unwrap(), 150);
    }
}
