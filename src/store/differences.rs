//! What a verify has found so far: suspects first, then what each turned out to be.

use rusqlite::{Connection, OptionalExtension, params};

use super::queue::{self, Change};
use crate::decide::Side;
use crate::key::{Id, Key};

/// A document that a verify has judged.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Which one.
    pub key: Key,
    /// Its `_id`.
    pub id: Id,
    /// `equal`, `only_local`, `only_remote`, `different`, `conflict`, `failed`, `waiting`.
    pub kind: String,
    /// What a repair would do.
    pub repair: String,
}

/// What the queues know of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing.
    Idle,
    /// It is to be worked on, or a write of it is undecided.
    Queued,
    /// It is in conflict.
    Conflict,
    /// It was refused.
    Failed,
}

const REAL: &str = "kind IN ('only_local', 'only_remote', 'different')";

/// Forgets everything: a verify begins anew.
pub fn forget(c: &Connection) -> rusqlite::Result<()> {
    c.execute("DELETE FROM differences", []).map(|_| ())
}

/// Notes documents that seem to differ.
pub fn suspect(c: &Connection, found: &[(Key, Id)]) -> rusqlite::Result<()> {
    let mut put = c.prepare_cached("INSERT OR REPLACE INTO differences(key, id) VALUES(?, ?)")?;
    for (key, id) in found {
        put.execute(params![key.as_bytes(), id.to_bytes()])?;
    }
    Ok(())
}

fn bounds(ns: u32) -> (Vec<u8>, Vec<u8>) {
    (ns.to_be_bytes().to_vec(), (ns + 1).to_be_bytes().to_vec())
}

/// Some documents of a collection that are not judged yet.
pub fn suspects(c: &Connection, ns: u32, most: u32) -> rusqlite::Result<Vec<(Key, Id)>> {
    let (first, end) = bounds(ns);
    c.prepare_cached(
        "SELECT key, id FROM differences WHERE kind IS NULL AND key >= ? AND key < ? LIMIT ?",
    )?
    .query_map(params![first, end, most], |r| {
        Ok((
            Key::from_bytes(r.get_ref(0)?.as_blob()?),
            Id::from_bytes(r.get_ref(1)?.as_blob()?),
        ))
    })?
    .collect()
}

/// Keeps a verdict; what turned out to be equal is forgotten.
pub fn put(c: &Connection, verdict: &Verdict) -> rusqlite::Result<()> {
    if verdict.kind == "equal" {
        c.prepare_cached("DELETE FROM differences WHERE key = ?")?
            .execute([verdict.key.as_bytes()])?;
        return Ok(());
    }
    c.prepare_cached("UPDATE differences SET kind = ?, repair = ? WHERE key = ?")?
        .execute(params![
            verdict.kind,
            verdict.repair,
            verdict.key.as_bytes()
        ])?;
    Ok(())
}

/// How many documents of a collection were found of each kind.
pub fn count(c: &Connection, ns: u32) -> rusqlite::Result<Vec<(String, u64)>> {
    let (first, end) = bounds(ns);
    c.prepare_cached(
        "SELECT kind, count(*) FROM differences WHERE kind IS NOT NULL AND key >= ? AND key < ? GROUP BY kind",
    )?
    .query_map(params![first, end], |r| Ok((r.get(0)?, r.get(1)?)))?
    .collect()
}

/// The first differences that nothing explains.
pub fn list(c: &Connection, most: u32) -> rusqlite::Result<Vec<Verdict>> {
    c.prepare_cached(&format!(
        "SELECT key, id, kind, repair FROM differences WHERE {REAL} ORDER BY key LIMIT ?"
    ))?
    .query_map([most], |r| {
        Ok(Verdict {
            key: Key::from_bytes(r.get_ref(0)?.as_blob()?),
            id: Id::from_bytes(r.get_ref(1)?.as_blob()?),
            kind: r.get(2)?,
            repair: r.get(3)?,
        })
    })?
    .collect()
}

/// Queues everything that differs, and makes suspects of it again.
pub fn queue(c: &Connection) -> rusqlite::Result<()> {
    let now = chrono::Utc::now().timestamp_millis();
    let changes: Vec<Change> = list(c, u32::MAX)?
        .into_iter()
        .map(|d| Change {
            // A deletion counts as one (R13).
            hint: d
                .repair
                .starts_with("delete_")
                .then(|| queue::LOOK_GONE.to_vec()),
            key: d.key,
            id: d.id,
        })
        .collect();
    let gone_here = |c: &&Change| c.hint.is_some();
    let (lost, others): (Vec<&Change>, Vec<&Change>) = changes.iter().partition(gone_here);
    // From the inbox the worker looks at both sides; a deletion is queued by the side that lost it.
    let others: Vec<Change> = others.into_iter().cloned().collect();
    queue::enqueue(c, Side::Local, &others, now)?;
    queue::enqueue(c, Side::Remote, &others, now)?;
    for change in lost {
        let repair: String = c
            .prepare_cached("SELECT repair FROM differences WHERE key = ?")?
            .query_row([change.key.as_bytes()], |r| r.get(0))?;
        let (loser, other) = match repair.as_str() {
            "delete_remote" => (Side::Local, Side::Remote),
            _ => (Side::Remote, Side::Local),
        };
        let look = Change {
            hint: None,
            ..change.clone()
        };
        queue::enqueue(c, loser, std::slice::from_ref(change), now)?;
        queue::enqueue(c, other, &[look], now)?;
    }
    c.execute(
        "UPDATE differences SET kind = NULL, repair = NULL WHERE kind IS NOT NULL",
        [],
    )
    .map(|_| ())
}

/// What the queues know of a document.
pub fn standing(c: &Connection, key: &Key) -> rusqlite::Result<Standing> {
    let mut found = Standing::Idle;
    for table in ["outbox", "inbox"] {
        let held: Option<Option<String>> = c
            .prepare_cached(&format!("SELECT held FROM {table} WHERE key = ?"))?
            .query_row([key.as_bytes()], |r| r.get(0))
            .optional()?;
        match held {
            Some(Some(held)) if held == "failed" => found = Standing::Failed,
            Some(Some(_)) if found != Standing::Failed => found = Standing::Conflict,
            Some(None) if found == Standing::Idle => found = Standing::Queued,
            _ => {}
        }
    }
    if found == Standing::Idle && super::intents::is_open(c, key)? {
        found = Standing::Queued;
    }
    Ok(found)
}
