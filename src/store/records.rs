//! Open conflicts, stamps that are due, and records on their way into the local database.

use rusqlite::{Connection, OptionalExtension, params};

use crate::key::{Id, Key};

/// Puts a record on its way: in `coll` of the local database the record `id` gets the fields of `doc`.
pub fn put_record(c: &Connection, coll: &str, id: &[u8; 12], doc: &[u8]) -> rusqlite::Result<()> {
    c.prepare_cached("INSERT INTO records(id, coll, doc) VALUES(?,?,?)")?
        .execute(params![id, coll, doc])?;
    Ok(())
}

/// A record on its way.
#[derive(Debug)]
pub struct Waiting {
    /// Its number, for [`drop_record`].
    pub n: i64,
    /// `_id` of the record.
    pub id: Vec<u8>,
    /// Collection in the local database.
    pub coll: String,
    /// Fields to set.
    pub doc: Vec<u8>,
}

/// The records that have waited longest.
pub fn waiting_records(c: &Connection, limit: u32) -> rusqlite::Result<Vec<Waiting>> {
    c.prepare_cached("SELECT n, id, coll, doc FROM records ORDER BY n LIMIT ?")?
        .query_map([limit], |r| {
            Ok(Waiting {
                n: r.get(0)?,
                id: r.get(1)?,
                coll: r.get(2)?,
                doc: r.get(3)?,
            })
        })?
        .collect()
}

/// Forgets a record that was written.
pub fn drop_record(c: &Connection, n: i64) -> rusqlite::Result<()> {
    c.prepare_cached("DELETE FROM records WHERE n = ?")?
        .execute([n])?;
    Ok(())
}

/// Keeps the record of a clash before the write that settles it: an answer that is lost, or a crash,
/// must not take what the write replaced from the record (R21). `gone`: digest of that content.
pub fn put_overruled(
    c: &Connection,
    key: &Key,
    doc: &[u8],
    gone: Option<&[u8; 32]>,
) -> rusqlite::Result<()> {
    c.prepare_cached("INSERT OR REPLACE INTO overruled(key, doc, gone) VALUES(?,?,?)")?
        .execute(params![key.as_bytes(), doc, gone.map(|g| g.as_slice())])?;
    Ok(())
}

/// Whether any such record waits.
pub fn any_overruled(c: &Connection) -> rusqlite::Result<bool> {
    c.prepare_cached("SELECT EXISTS(SELECT 1 FROM overruled)")?
        .query_row([], |r| r.get(0))
}

/// The keys of all records kept ahead.
pub fn overruled_keys(c: &Connection) -> rusqlite::Result<Vec<Key>> {
    c.prepare_cached("SELECT key FROM overruled")?
        .query_map([], |r| Ok(Key::from_bytes(r.get_ref(0)?.as_blob()?)))?
        .collect()
}

/// A record kept ahead, and the digest of what its write replaces.
pub type Overruled = (Vec<u8>, Option<Vec<u8>>);

/// The record that [`put_overruled`] keeps for a document.
pub fn overruled(c: &Connection, key: &Key) -> rusqlite::Result<Option<Overruled>> {
    c.prepare_cached("SELECT doc, gone FROM overruled WHERE key = ?")?
        .query_row([key.as_bytes()], |r| Ok((r.get(0)?, r.get(1)?)))
        .optional()
}

/// Takes the record that [`put_overruled`] kept.
pub fn take_overruled(c: &Connection, key: &Key) -> rusqlite::Result<Option<Overruled>> {
    c.prepare_cached("DELETE FROM overruled WHERE key = ? RETURNING doc, gone")?
        .query_row([key.as_bytes()], |r| Ok((r.get(0)?, r.get(1)?)))
        .optional()
}

/// A conflict that a key waits on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenConflict {
    /// `_id` of its record in `conflict_logs`.
    pub id: [u8; 12],
    /// Its kind.
    pub kind: String,
    /// The document that holds the unique value.
    pub other: Option<Key>,
}

/// The open conflict of a key.
pub fn open_conflict(c: &Connection, key: &Key) -> rusqlite::Result<Option<OpenConflict>> {
    c.prepare_cached("SELECT conflict, kind, other FROM open_conflicts WHERE key = ?")?
        .query_row([key.as_bytes()], |r| {
            let other: Option<Vec<u8>> = r.get(2)?;
            Ok(OpenConflict {
                id: r.get(0)?,
                kind: r.get(1)?,
                other: other.as_deref().map(Key::from_bytes),
            })
        })
        .optional()
}

/// Notes that a key waits on a conflict.
pub fn put_open_conflict(
    c: &Connection,
    key: &Key,
    conflict: &OpenConflict,
) -> rusqlite::Result<()> {
    c.prepare_cached(
        "INSERT OR REPLACE INTO open_conflicts(key, conflict, kind, other) VALUES(?,?,?,?)",
    )?
    .execute(params![
        key.as_bytes(),
        conflict.id,
        conflict.kind,
        conflict.other.as_ref().map(Key::as_bytes)
    ])?;
    Ok(())
}

/// Closes the conflict of a key and frees all keys that wait on it. Its record's id, if there was one.
pub fn close_conflict(c: &Connection, key: &Key) -> rusqlite::Result<Option<[u8; 12]>> {
    let Some(OpenConflict { id, .. }) = open_conflict(c, key)? else {
        return Ok(None);
    };
    for table in ["outbox", "inbox"] {
        c.prepare_cached(&format!(
            "UPDATE {table} SET held = NULL, reason = NULL, next_at = 0, attempts = 0 WHERE held = 'conflict'
             AND key IN (SELECT key FROM open_conflicts WHERE conflict = ?)"
        ))?
        .execute([id])?;
    }
    c.prepare_cached("DELETE FROM open_conflicts WHERE conflict = ?")?
        .execute([id])?;
    super::cases::forget(c, &id)?;
    Ok(Some(id))
}

/// Frees the documents that clash with a value that `other` held: it has changed since.
pub fn free_waiting(c: &Connection, other: &Key) -> rusqlite::Result<()> {
    let waits: bool = c
        .prepare_cached("SELECT EXISTS(SELECT 1 FROM open_conflicts WHERE other = ?)")?
        .query_row([other.as_bytes()], |r| r.get(0))?;
    if waits {
        for table in ["outbox", "inbox"] {
            c.prepare_cached(&format!(
                "UPDATE {table} SET held = NULL, reason = NULL, next_at = 0 WHERE held = 'conflict'
                 AND key IN (SELECT key FROM open_conflicts WHERE other = ?)"
            ))?
            .execute([other.as_bytes()])?;
        }
    }
    Ok(())
}

/// Whether any conflict is open: as a rule none is, and that is one look for a whole batch.
pub fn any_open(c: &Connection) -> rusqlite::Result<bool> {
    c.prepare_cached("SELECT EXISTS(SELECT 1 FROM open_conflicts)")?
        .query_row([], |r| r.get(0))
}

/// Number of conflicts that are open.
pub fn count_open(c: &Connection) -> rusqlite::Result<u64> {
    c.query_row(
        "SELECT count(DISTINCT conflict) FROM open_conflicts",
        [],
        |r| r.get(0),
    )
}

/// Marks a document whose sync fields have to be brought up to date.
pub fn put_stamp(c: &Connection, key: &Key, id: &Id) -> rusqlite::Result<()> {
    c.prepare_cached(
        "INSERT INTO stamps(key, id) VALUES(?,?) ON CONFLICT(key) DO UPDATE SET gen = gen + 1",
    )?
    .execute(params![key.as_bytes(), id.to_bytes()])?;
    Ok(())
}

/// Marks documents of the outbox: they are pending for longer than usual. Continues behind the
/// position where the last call ended, also of an earlier run; `false` at the end.
pub fn stamp_outbox(c: &Connection, most: u32) -> rusqlite::Result<bool> {
    let from = super::get_meta::<i64>(c, STAMPED_TO)?.unwrap_or(0);
    let to: Option<i64> = c
        .prepare_cached(
            "SELECT max(pos) FROM (SELECT pos FROM outbox WHERE pos > ? ORDER BY pos LIMIT ?)",
        )?
        .query_row([from, i64::from(most)], |r| r.get(0))?;
    let Some(to) = to else { return Ok(false) };
    c.prepare_cached(
        "INSERT OR IGNORE INTO stamps(key, id) SELECT key, id FROM outbox WHERE pos > ? AND pos <= ?",
    )?
    .execute([from, to])?;
    super::set_meta(c, STAMPED_TO, to)?;
    Ok(true)
}

/// Up to this position of the outbox every document was marked as pending.
const STAMPED_TO: &str = "stamped_to";

/// Some documents whose sync fields are due: key, `_id`, number of the request.
pub fn due_stamps(c: &Connection, limit: u32) -> rusqlite::Result<Vec<(Key, Id, i64)>> {
    c.prepare_cached("SELECT key, id, gen FROM stamps LIMIT ?")?
        .query_map([limit], |r| {
            Ok((
                Key::from_bytes(r.get_ref(0)?.as_blob()?),
                Id::from_bytes(r.get_ref(1)?.as_blob()?),
                r.get(2)?,
            ))
        })?
        .collect()
}

/// Forgets a stamp request unless it was asked for again since.
pub fn drop_stamp(c: &Connection, key: &Key, request: i64) -> rusqlite::Result<()> {
    c.prepare_cached("DELETE FROM stamps WHERE key = ? AND gen = ?")?
        .execute(params![key.as_bytes(), request])?;
    Ok(())
}
