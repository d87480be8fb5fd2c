//! Comparisons under way: what of each collection has been compared, so that a crash costs little,
//! and which documents were found to be gone.

use rusqlite::{Connection, OptionalExtension, params};

use super::intents;
use super::queue::{self, Change};
use crate::decide::Side;
use crate::key::{Id, Key};
use crate::walk::Range;

/// A range of a collection that is or was compared.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Its number within the collection, in the order in which ranges are cut.
    pub n: u32,
    /// What belongs to it.
    pub range: Range,
    /// Whether every document is read, or hashes are compared.
    pub exact: bool,
    /// Second turn: a comparison that began in the middle goes on from the first `_id`.
    pub wrapped: bool,
    /// What came of it, once it is done.
    pub done: Option<Tally>,
}

/// What came of comparing a range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Documents compared.
    pub documents: u64,
    /// Of these, those that base knows.
    pub known: u64,
    /// Bytes read from both sides.
    pub bytes: u64,
}

fn name(db: &str) -> String {
    format!("walk:{db}")
}

/// Begins the comparison of a database, or goes on with one that was interrupted, if it was asked for
/// by the same reason. When it began, ms since 1970.
pub fn begin(c: &Connection, db: &str, why: &str, now: i64) -> rusqlite::Result<i64> {
    let before: Option<String> = super::get_meta(c, &name(db))?;
    let before = before.as_deref().and_then(|text| text.split_once(' '));
    if let Some((began, reason)) = before
        && reason == why
        && let Ok(began) = began.parse()
    {
        return Ok(began);
    }
    forget(c, db)?;
    super::set_meta(c, &name(db), format!("{now} {why}"))?;
    Ok(now)
}

/// When the comparison of a database began that is under way, ms since 1970.
pub fn began(c: &Connection, db: &str) -> rusqlite::Result<Option<i64>> {
    let now: Option<String> = super::get_meta(c, &name(db))?;
    let began = now.as_deref().and_then(|text| text.split_once(' '));
    Ok(began.and_then(|(began, _)| began.parse().ok()))
}

/// Whether the comparison that began then for that reason was not forgotten meanwhile.
pub fn is_valid(c: &Connection, db: &str, why: &str, began: i64) -> rusqlite::Result<bool> {
    let now: Option<String> = super::get_meta(c, &name(db))?;
    Ok(now == Some(format!("{began} {why}")))
}

/// Forgets the comparison of a database: it is complete, or is to begin anew.
pub fn forget(c: &Connection, db: &str) -> rusqlite::Result<()> {
    c.execute("DELETE FROM meta WHERE k = ?", [name(db)])?;
    let mut namespaces = c.prepare_cached("SELECT n FROM namespaces WHERE db = ?")?;
    let namespaces: Vec<u32> = namespaces
        .query_map([db], |r| r.get(0))?
        .collect::<Result<_, _>>()?;
    for ns in namespaces {
        forget_parts(c, ns)?;
        let (first, end) = bounds(ns);
        c.execute(
            "DELETE FROM gone WHERE key >= ? AND key < ?",
            params![first, end],
        )?;
    }
    Ok(())
}

/// Forgets what was compared of one collection.
pub fn forget_parts(c: &Connection, ns: u32) -> rusqlite::Result<()> {
    c.prepare_cached("DELETE FROM walk WHERE ns = ?")?
        .execute([ns])?;
    Ok(())
}

fn bounds(ns: u32) -> (Vec<u8>, Vec<u8>) {
    (ns.to_be_bytes().to_vec(), (ns + 1).to_be_bytes().to_vec())
}

/// The ranges of a collection so far, in order.
pub fn parts(c: &Connection, ns: u32) -> rusqlite::Result<Vec<Part>> {
    let id = |bytes: Option<Vec<u8>>| bytes.map(|b| Id::from_bytes(&b));
    c.prepare_cached(
        "SELECT n, first, last, exact, wrapped, documents, known, bytes FROM walk WHERE ns = ? ORDER BY n",
    )?
    .query_map([ns], |r| {
        let documents: Option<u64> = r.get(5)?;
        let (known, bytes) = (r.get(6)?, r.get(7)?);
        Ok(Part {
            n: r.get(0)?,
            range: Range {
                from: id(r.get(1)?),
                to: id(r.get(2)?),
            },
            exact: r.get(3)?,
            wrapped: r.get(4)?,
            done: documents.map(|documents| Tally {
                documents,
                known,
                bytes,
            }),
        })
    })?
    .collect()
}

/// Stores a range as cut or done.
pub fn put_part(c: &Connection, ns: u32, part: &Part) -> rusqlite::Result<()> {
    let id = |id: &Option<Id>| id.as_ref().map(Id::to_bytes);
    let tally = part.done.unwrap_or_default();
    c.prepare_cached("INSERT OR REPLACE INTO walk(ns, n, first, last, exact, wrapped, documents, known, bytes) VALUES(?,?,?,?,?,?,?,?,?)")?
        .execute(params![
            ns,
            part.n,
            id(&part.range.from),
            id(&part.range.to),
            part.exact,
            part.wrapped,
            part.done.map(|t| t.documents),
            tally.known,
            tally.bytes
        ])?;
    Ok(())
}

/// Notes a document that base knows and that `side` has no more; it is queued once the whole
/// collection was compared.
pub fn put_gone(c: &Connection, key: &Key, id: &Id, side: Side) -> rusqlite::Result<()> {
    c.prepare_cached("INSERT OR REPLACE INTO gone(key, id, side) VALUES(?,?,?)")?
        .execute(params![key.as_bytes(), id.to_bytes(), side as i64])?;
    Ok(())
}

/// Whether a document was found to be gone from a side.
pub fn is_gone(c: &Connection, key: &Key) -> rusqlite::Result<bool> {
    c.prepare_cached("SELECT EXISTS(SELECT 1 FROM gone WHERE key = ?)")?
        .query_row([key.as_bytes()], |r| r.get(0))
}

/// How many documents of a collection each side has no more: local, remote.
pub fn count_gone(c: &Connection, ns: u32) -> rusqlite::Result<[u64; 2]> {
    let (first, end) = bounds(ns);
    let count = |side: Side| {
        c.prepare_cached("SELECT count(*) FROM gone WHERE key >= ? AND key < ? AND side = ?")?
            .query_row(params![first, end, side as i64], |r| r.get(0))
    };
    Ok([count(Side::Local)?, count(Side::Remote)?])
}

/// Puts the first documents of a collection that are gone into the queue of the side that lost them;
/// how many.
pub fn queue_gone(c: &Connection, ns: u32, most: u32, now: i64) -> rusqlite::Result<usize> {
    let (first, end) = bounds(ns);
    let some: Vec<(Change, i64)> = c
        .prepare_cached("SELECT key, id, side FROM gone WHERE key >= ? AND key < ? LIMIT ?")?
        .query_map(params![first, end, most], |r| {
            let change = Change {
                key: Key::from_bytes(r.get_ref(0)?.as_blob()?),
                id: Id::from_bytes(r.get_ref(1)?.as_blob()?),
                hint: Some(queue::LOOK_GONE.to_vec()),
            };
            Ok((change, r.get(2)?))
        })?
        .collect::<Result<_, _>>()?;
    for side in [Side::Local, Side::Remote] {
        let of_side = some.iter().filter(|(_, s)| *s == side as i64);
        let changes: Vec<Change> = of_side.map(|(change, _)| change.clone()).collect();
        queue::enqueue(c, side, &changes, now)?;
    }
    for (change, _) in &some {
        c.prepare_cached("DELETE FROM gone WHERE key = ?")?
            .execute([change.key.as_bytes()])?;
    }
    Ok(some.len())
}

/// Documents of a collection that base knows.
pub fn count_base(c: &Connection, ns: u32) -> rusqlite::Result<u64> {
    let (first, end) = bounds(ns);
    c.prepare_cached("SELECT count(*) FROM base WHERE key >= ? AND key < ?")?
        .query_row(params![first, end], |r| r.get(0))
}

/// Whether base knows any document of a collection.
pub fn has_base(c: &Connection, ns: u32) -> rusqlite::Result<bool> {
    let (first, end) = bounds(ns);
    let found: Option<i64> = c
        .prepare_cached("SELECT 1 FROM base WHERE key >= ? AND key < ? LIMIT 1")?
        .query_row(params![first, end], |r| r.get(0))
        .optional()?;
    Ok(found.is_some())
}

/// Whether both queues are empty and no write is undecided: then no document needs a second look.
pub fn is_idle(c: &Connection) -> rusqlite::Result<bool> {
    let queues = c
        .prepare_cached("SELECT EXISTS(SELECT 1 FROM outbox) OR EXISTS(SELECT 1 FROM inbox)")?
        .query_row([], |r| r.get::<_, bool>(0))?;
    Ok(!queues && !intents::any(c)?)
}
