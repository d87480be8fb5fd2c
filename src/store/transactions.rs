//! Which documents of the outbox were written by one transaction.
//!
//! The queue is by state, so a document that a later transaction wrote, too, joins both: they then go
//! together. A row leaves with its document's.

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, params};

use super::together::Together;
use crate::decide::Side;
use crate::key::Key;

/// Most documents that are kept together; of a larger transaction the rest follows by itself.
pub const MOST: usize = 1000;

/// Notes transactions of documents that were just queued.
pub fn note(c: &Connection, of: Side, found: &[(Key, i64)]) -> rusqlite::Result<()> {
    if of == Side::Remote || found.is_empty() {
        return Ok(());
    }
    let mut insert = c.prepare_cached(
        "INSERT OR REPLACE INTO transactions(key, t) SELECT ?1, ?2 WHERE EXISTS(SELECT 1 FROM outbox WHERE key = ?1)",
    )?;
    let mut join = c.prepare_cached("UPDATE transactions SET t = ?1 WHERE t = ?2")?;
    for (key, transaction) in found {
        match self::of(c, key.as_bytes())? {
            Some(other) if other == *transaction => continue,
            // A chain of transactions over one busy document must not grow without end.
            Some(other) if size(c, other)? + size(c, *transaction)? <= MOST => {
                join.execute([*transaction, other])?;
            }
            _ => {}
        }
        insert.execute(params![key.as_bytes(), transaction])?;
    }
    Ok(())
}

/// Whether any document waits as part of a transaction.
pub fn any(c: &Connection) -> rusqlite::Result<bool> {
    c.prepare_cached("SELECT EXISTS(SELECT 1 FROM transactions)")?
        .query_row([], |r| r.get(0))
}

/// Some of these keys have left the outbox: they are part of no transaction any more.
pub(super) fn left<'a>(
    c: &Connection,
    keys: impl Iterator<Item = &'a Key>,
) -> rusqlite::Result<()> {
    if !any(c)? {
        return Ok(());
    }
    LEFT.run(c, &keys.collect::<Vec<_>>(), |key| {
        [ValueRef::Blob(key.as_bytes())]
    })
    .map(drop)
}

const LEFT: Together = Together {
    head: "DELETE FROM transactions WHERE key IN (",
    row: "?",
    tail: ") AND NOT EXISTS(SELECT 1 FROM outbox WHERE outbox.key = transactions.key)",
};

/// The transaction of a key.
pub fn of(c: &Connection, key: &[u8]) -> rusqlite::Result<Option<i64>> {
    c.prepare_cached("SELECT t FROM transactions WHERE key = ?")?
        .query_row([key], |r| r.get(0))
        .optional()
}

/// Whether a key waits to be sent as part of a transaction.
pub fn waits(c: &Connection, key: &[u8]) -> rusqlite::Result<bool> {
    c.prepare_cached(
        "SELECT EXISTS(SELECT 1 FROM transactions JOIN outbox USING (key) WHERE key = ? AND held IS NULL)",
    )?
    .query_row([key], |r| r.get(0))
}

/// The first documents of a transaction.
pub fn members(c: &Connection, transaction: i64) -> rusqlite::Result<Vec<Key>> {
    c.prepare_cached("SELECT key FROM transactions WHERE t = ? LIMIT ?")?
        .query_map(params![transaction, most()], |r| {
            Ok(Key::from_bytes(r.get_ref(0)?.as_blob()?))
        })?
        .collect()
}

fn size(c: &Connection, transaction: i64) -> rusqlite::Result<usize> {
    c.prepare_cached("SELECT count(*) FROM (SELECT 1 FROM transactions WHERE t = ? LIMIT ?)")?
        .query_row(params![transaction, most()], |r| r.get(0))
}

fn most() -> i64 {
    i64::try_from(MOST).unwrap_or(i64::MAX)
}
