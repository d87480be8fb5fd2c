//! Open conflicts, stamps that are due, and records on their way into the local database.

use rusqlite::{Connection, OptionalExtension, params};

use crate::key::{Id, Key};

/// Puts a record on its way: `coll` in the local database gets `doc` under `_id` = `id`.
pub fn put_record(c: &Connection, coll: &str, id: &[u8; 12], doc: &[u8]) -> rusqlite::Result<()> {
    c.prepare_cached("INSERT OR REPLACE INTO records(id, coll, doc) VALUES(?,?,?)")?.execute(params![id, coll, doc])?;
    Ok(())
}

/// Some records that wait: id, collection, document.
pub fn waiting_records(c: &Connection, limit: u32) -> rusqlite::Result<Vec<(Vec<u8>, String, Vec<u8>)>> {
    c.prepare_cached("SELECT id, coll, doc FROM records LIMIT ?")?
        .query_map([limit], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?)))?
        .collect()
}

/// Forgets a record that was written as it stands here.
pub fn drop_record(c: &Connection, id: &[u8], doc: &[u8]) -> rusqlite::Result<()> {
    c.prepare_cached("DELETE FROM records WHERE id = ? AND doc = ?")?.execute(params![id, doc])?;
    Ok(())
}

/// The open conflict of a key: its record's id and kind.
pub fn open_conflict(c: &Connection, key: &Key) -> rusqlite::Result<Option<([u8; 12], String)>> {
    c.prepare_cached("SELECT conflict, kind FROM open_conflicts WHERE key = ?")?
        .query_row([key.as_bytes()], |r| Ok((r.get(0)?, r.get(1)?)))
        .optional()
}

/// Notes that a key waits on a conflict.
pub fn put_open_conflict(c: &Connection, key: &Key, id: &[u8; 12], kind: &str) -> rusqlite::Result<()> {
    c.prepare_cached("INSERT OR REPLACE INTO open_conflicts(key, conflict, kind) VALUES(?,?,?)")?.execute(params![
        key.as_bytes(),
        id,
        kind
    ])?;
    Ok(())
}

/// Closes the conflict of a key and frees all keys that wait on it. Its record's id, if there was one.
pub fn close_conflict(c: &Connection, key: &Key) -> rusqlite::Result<Option<[u8; 12]>> {
    let Some((id, _)) = open_conflict(c, key)? else { return Ok(None) };
    for table in ["outbox", "inbox"] {
        c.prepare_cached(&format!(
            "UPDATE {table} SET held = NULL, reason = NULL, next_at = 0, attempts = 0 WHERE held = 'conflict'
             AND key IN (SELECT key FROM open_conflicts WHERE conflict = ?)"
        ))?
        .execute([id])?;
    }
    c.prepare_cached("DELETE FROM open_conflicts WHERE conflict = ?")?.execute([id])?;
    Ok(Some(id))
}

/// Number of conflicts that are open.
pub fn count_open(c: &Connection) -> rusqlite::Result<u64> {
    c.query_row("SELECT count(DISTINCT conflict) FROM open_conflicts", [], |r| r.get(0))
}

/// Marks a document whose sync fields have to be brought up to date.
pub fn put_stamp(c: &Connection, key: &Key, id: &Id) -> rusqlite::Result<()> {
    c.prepare_cached("INSERT INTO stamps(key, id) VALUES(?,?) ON CONFLICT(key) DO UPDATE SET gen = gen + 1")?
        .execute(params![key.as_bytes(), id.to_bytes()])?;
    Ok(())
}

/// Marks every document of the outbox: they are pending for longer than usual.
pub fn stamp_outbox(c: &Connection) -> rusqlite::Result<usize> {
    c.execute("INSERT OR IGNORE INTO stamps(key, id) SELECT key, id FROM outbox", [])
}

/// Some documents whose sync fields are due: key, `_id`, number of the request.
pub fn due_stamps(c: &Connection, limit: u32) -> rusqlite::Result<Vec<(Key, Id, i64)>> {
    c.prepare_cached("SELECT key, id, gen FROM stamps LIMIT ?")?
        .query_map([limit], |r| {
            Ok((Key::from_bytes(r.get(0)?), Id::from_bytes(r.get_ref(1)?.as_blob()?), r.get(2)?))
        })?
        .collect()
}

/// Forgets a stamp request unless it was asked for again since.
pub fn drop_stamp(c: &Connection, key: &Key, request: i64) -> rusqlite::Result<()> {
    c.prepare_cached("DELETE FROM stamps WHERE key = ? AND gen = ?")?.execute(params![key.as_bytes(), request])?;
    Ok(())
}
