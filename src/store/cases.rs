//! What `resolve` must know of each open conflict, without asking the local database.

use rusqlite::{Connection, OptionalExtension, params};

use crate::key::{Id, Key};

/// An open conflict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// `_id` of its record in `conflict_logs`.
    pub id: [u8; 12],
    /// `_id` of the document on the local side; `None`: there is none.
    pub local: Option<Id>,
    /// The same on the remote.
    pub remote: Option<Id>,
    /// Fields in conflict.
    pub fields: Vec<String>,
    /// Version of both documents when a person last saw them.
    pub seen: i64,
}

/// Keeps a case. Of one that is known already, what a person saw stays as it was.
pub fn put(c: &Connection, case: &Case) -> rusqlite::Result<()> {
    c.prepare_cached(
        "INSERT INTO cases(conflict, local, remote, fields, seen) VALUES(?1,?2,?3,?4,?5)
         ON CONFLICT(conflict) DO UPDATE SET local = ?2, remote = ?3, fields = ?4",
    )?
    .execute(params![
        case.id,
        case.local.as_ref().map(Id::to_bytes),
        case.remote.as_ref().map(Id::to_bytes),
        case.fields.join("\0"),
        case.seen
    ])?;
    Ok(())
}

/// An open conflict by its id, with its kind and the keys that wait on it.
pub fn get(c: &Connection, id: &[u8; 12]) -> rusqlite::Result<Option<(Case, String, Vec<Key>)>> {
    let case = c
        .prepare_cached("SELECT local, remote, fields, seen FROM cases WHERE conflict = ?")?
        .query_row([id], |r| {
            let side = |i| -> rusqlite::Result<Option<Id>> {
                Ok(r.get_ref(i)?.as_blob_or_null()?.map(Id::from_bytes))
            };
            let fields: String = r.get(2)?;
            Ok(Case {
                id: *id,
                local: side(0)?,
                remote: side(1)?,
                fields: fields
                    .split('\0')
                    .filter(|f| !f.is_empty())
                    .map(str::to_owned)
                    .collect(),
                seen: r.get(3)?,
            })
        })
        .optional()?;
    let Some(case) = case else { return Ok(None) };
    let mut kind = String::new();
    let mut keys = Vec::new();
    let mut rows = c.prepare_cached("SELECT key, kind FROM open_conflicts WHERE conflict = ?")?;
    let mut rows = rows.query([id])?;
    while let Some(r) = rows.next()? {
        keys.push(Key::from_bytes(r.get_ref(0)?.as_blob()?));
        kind = r.get(1)?;
    }
    Ok((!keys.is_empty()).then_some((case, kind, keys)))
}

/// Notes that a person has seen a version of an open conflict.
pub fn saw(c: &Connection, id: &[u8; 12], version: i64) -> rusqlite::Result<()> {
    c.prepare_cached("UPDATE cases SET seen = ?2 WHERE conflict = ?1 AND seen <> ?2")?
        .execute(params![id, version])?;
    Ok(())
}

/// Forgets a case that is closed.
pub fn forget(c: &Connection, id: &[u8; 12]) -> rusqlite::Result<()> {
    c.prepare_cached("DELETE FROM cases WHERE conflict = ?")?
        .execute([id])?;
    Ok(())
}

/// Ids of open conflicts behind `after`, in order: of this kind and these namespaces, if given.
pub fn page(
    c: &Connection,
    after: &[u8],
    kind: Option<&str>,
    namespaces: Option<&[u32]>,
    limit: usize,
) -> rusqlite::Result<Vec<[u8; 12]>> {
    let mut rows = c.prepare_cached(
        "SELECT conflict, key FROM open_conflicts WHERE conflict > ?1 AND (?2 IS NULL OR kind = ?2)
         ORDER BY conflict",
    )?;
    let mut rows = rows.query(params![after, kind])?;
    let mut found: Vec<[u8; 12]> = Vec::new();
    while let Some(r) = rows.next()? {
        let id: [u8; 12] = r.get(0)?;
        let ns = Key::from_bytes(r.get_ref(1)?.as_blob()?).ns();
        if namespaces.is_some_and(|wanted| !wanted.contains(&ns)) || found.last() == Some(&id) {
            continue;
        }
        if found.len() == limit {
            break;
        }
        found.push(id);
    }
    Ok(found)
}
