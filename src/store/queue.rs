//! Outbox and inbox: document keys that may differ, coalesced, in the order of their first change.

use std::collections::HashMap;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, params};

use super::intents::Intent;
use super::together::Together;
use super::transactions;
use crate::decide::Side;
use crate::key::{Id, Key};
use crate::raw;

/// Names of the namespaces by number. Numbers are never reused.
#[derive(Default)]
pub struct Namespaces {
    by_name: HashMap<(String, String), u32>,
    by_number: HashMap<u32, (String, String)>,
}

impl Namespaces {
    pub(super) fn load(c: &Connection) -> rusqlite::Result<Self> {
        let mut all = Self::default();
        let mut statement = c.prepare("SELECT n, db, coll FROM namespaces")?;
        let rows = statement.query_map([], |r| Ok((r.get(0)?, (r.get(1)?, r.get(2)?))))?;
        for row in rows {
            let (n, name): (u32, (String, String)) = row?;
            all.by_name.insert(name.clone(), n);
            all.by_number.insert(n, name);
        }
        Ok(all)
    }
}

impl super::Store {
    /// The number of a namespace; a new one is stored first.
    pub async fn namespace(&self, db: &str, coll: &str) -> Result<u32, super::StoreError> {
        let name = (db.to_owned(), coll.to_owned());
        if let Some(n) = self.lock_namespaces().by_name.get(&name) {
            return Ok(*n);
        }
        let wanted = name.clone();
        let n: u32 = self
            .call(move |c| {
                c.execute(
                    "INSERT OR IGNORE INTO namespaces(db, coll) VALUES(?, ?)",
                    params![wanted.0, wanted.1],
                )?;
                c.query_row(
                    "SELECT n FROM namespaces WHERE db = ? AND coll = ?",
                    params![wanted.0, wanted.1],
                    |r| r.get(0),
                )
            })
            .await?;
        let mut all = self.lock_namespaces();
        all.by_name.insert(name.clone(), n);
        all.by_number.insert(n, name);
        Ok(n)
    }

    /// Of every GridFS bucket: the number of its files and of its chunks.
    pub fn buckets(&self) -> HashMap<u32, u32> {
        let all = self.lock_namespaces();
        let pairs = all.by_name.iter().filter_map(|((db, coll), files)| {
            let bucket = coll.strip_suffix(".files")?;
            let chunks = all.by_name.get(&(db.clone(), format!("{bucket}.chunks")))?;
            Some((*files, *chunks))
        });
        pairs.collect()
    }

    /// All namespaces: number, database and collection.
    pub fn namespaces(&self) -> Vec<(u32, (String, String))> {
        let all = self.lock_namespaces();
        let pairs = all.by_number.iter();
        pairs.map(|(n, name)| (*n, name.clone())).collect()
    }

    /// Database and collection of a namespace number.
    pub fn namespace_name(&self, n: u32) -> Option<(String, String)> {
        self.lock_namespaces().by_number.get(&n).cloned()
    }

    fn lock_namespaces(&self) -> std::sync::MutexGuard<'_, Namespaces> {
        self.inner
            .namespaces
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The table of the queue that holds changes *of* that side: the outbox those of the local side.
pub fn table(of: Side) -> &'static str {
    match of {
        Side::Local => "outbox",
        Side::Remote => "inbox",
    }
}

/// A hint: look at the document, which is gone by the last we know. (Unlike `d`, which one event alone
/// says, it is never taken for an echo.)
pub const LOOK_GONE: &[u8] = b"D";

/// The condition for rows of documents that are gone, as the index has it.
pub const GONE: &str = "held IS NULL AND hint IN (x'64', x'44')";

/// A change seen on a stream, by a pull or by a reconcile.
#[derive(Clone, Debug)]
pub struct Change {
    /// Which document.
    pub key: Key,
    /// Its `_id` as the event had it.
    pub id: Id,
    /// What the event said; see [`is_echo`]. `None`: look at the document.
    pub hint: Option<Vec<u8>>,
}

/// Adds changes of one side; `at` in ms since 1970. A held key becomes ready again (R19).
/// An event that says nothing new is left out right here.
pub fn enqueue(c: &Connection, of: Side, changes: &[Change], at: i64) -> rusqlite::Result<()> {
    if changes.is_empty() {
        return Ok(());
    }
    let count = i64::try_from(changes.len()).unwrap_or(i64::MAX);
    let last: i64 = c
        .prepare_cached("UPDATE meta SET v = v + ? WHERE k = 'seq' RETURNING v")?
        .query_row([count], |r| r.get(0))?;
    let rows: Vec<_> = (last - count + 1..)
        .zip(changes)
        .map(|(seq, change)| (change, change.id.to_bytes(), seq))
        .collect();
    ADD[of as usize].run(c, &rows, |(change, id, seq)| {
        [
            ValueRef::Blob(change.key.as_bytes()),
            ValueRef::Blob(id),
            ValueRef::Integer(*seq),
            change
                .hint
                .as_deref()
                .map_or(ValueRef::Null, ValueRef::Blob),
            ValueRef::Integer(at),
        ]
    })?;
    Ok(())
}

const ADD_LOCAL: Together = Together {
    head: "INSERT INTO outbox(key, id, seq, hint, at) VALUES ",
    row: "(?,?,?,?,?)",
    tail: " ON CONFLICT(key) DO UPDATE SET seq = excluded.seq, \
           hint = CASE WHEN excluded.hint IN (x'64', x'44') THEN x'44' END, \
           held = NULL, reason = NULL, attempts = 0, next_at = 0",
};

/// By side of the change.
const ADD: [Together; 2] = [
    ADD_LOCAL,
    Together {
        head: "INSERT INTO inbox(key, id, seq, hint, at) VALUES ",
        ..ADD_LOCAL
    },
];

/// Whether an event only tells what base says already: an echo of our own write, as a rule.
///
/// Sound because the queue row is evaluated alone (several events of a key merge to "look") and
/// while no write of the key is under way: a state that differs from base later has a later event.
/// Inserts are not judged here: a document that was deleted and made anew may look like base.
/// Those of our own creates are known to [`crate::echo`].
pub fn is_echo(hint: &[u8], base: Option<&[u8]>, sync_fields: &[String]) -> bool {
    match (hint.split_first(), base) {
        (Some((b'd', _)), None) => true,
        (Some((b'u', description)), Some(base)) => update_is_in(description, base, sync_fields),
        _ => false,
    }
}

/// Whether an update description names only sync fields: no change to anyone.
pub fn only_sync_fields(description: &[u8], sync_fields: &[String]) -> bool {
    let is_sync = |name: &[u8]| sync_fields.iter().any(|f| f.as_bytes() == name);
    raw::elements(description).all(|part| {
        let Ok(part) = part else { return false };
        match part.name {
            b"updatedFields" => raw::elements(part.value).all(|e| e.is_ok_and(|e| is_sync(e.name))),
            b"removedFields" => raw::elements(part.value).all(|e| {
                e.is_ok_and(|e| raw::text(&e).is_some_and(|name| is_sync(name.as_bytes())))
            }),
            _ => raw::elements(part.value).next().is_none(),
        }
    })
}

fn update_is_in(description: &[u8], base: &[u8], sync_fields: &[String]) -> bool {
    let is_sync = |name: &[u8]| sync_fields.iter().any(|f| f.as_bytes() == name);
    raw::elements(description).all(|part| {
        let Ok(part) = part else { return false };
        match part.name {
            b"updatedFields" => raw::elements(part.value).all(|e| {
                // A dotted name is either a path or a name with a dot: look at the document then.
                e.is_ok_and(|e| {
                    is_sync(e.name)
                        || raw::get(base, e.name)
                            .is_some_and(|b| b.whole == e.whole && !e.name.contains(&b'.'))
                })
            }),
            b"removedFields" => raw::elements(part.value).all(|e| {
                e.is_ok_and(|e| {
                    raw::text(&e).is_some_and(|n| {
                        is_sync(n.as_bytes())
                            || (!n.contains('.') && raw::get(base, n.as_bytes()).is_none())
                    })
                })
            }),
            _ => raw::elements(part.value).next().is_none(),
        }
    })
}

/// A row of a queue as it was claimed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its place in the queue; no other row ever has it.
    pub pos: i64,
    /// Changes with every event of the key; a row leaves only with the number it was claimed with.
    pub seq: i64,
    /// Tries that were refused.
    pub attempts: u32,
    /// When the first change was seen, ms since 1970.
    pub at: i64,
}

/// A document key to be worked on, with all the store knows of it.
#[derive(Clone, Debug)]
pub struct Work {
    /// Which document.
    pub key: Key,
    /// Its `_id`.
    pub id: Id,
    /// Its row in the outbox.
    pub outbox: Option<Row>,
    /// Its row in the inbox.
    pub inbox: Option<Row>,
    /// The agreed content.
    pub base: Option<Vec<u8>>,
    /// The side that let go of the document by itself (R15).
    pub left: Option<Side>,
    /// The local transaction that wrote it.
    pub transaction: Option<i64>,
    /// A write that may have happened.
    pub intent: Option<Intent>,
}

impl Work {
    /// The claim without the bodies: all that is needed to give it back.
    pub fn claim_only(&self) -> Self {
        Self {
            key: self.key.clone(),
            id: self.id.clone(),
            outbox: self.outbox.clone(),
            inbox: self.inbox.clone(),
            base: None,
            left: None,
            transaction: None,
            intent: None,
        }
    }
}

/// The row of a key, if it is queued.
pub fn get_row(c: &Connection, of: Side, key: &Key) -> rusqlite::Result<Option<Row>> {
    c.prepare_cached(&format!(
        "SELECT pos, seq, attempts, at FROM {} WHERE key = ?",
        table(of)
    ))?
    .query_row([key.as_bytes()], |r| {
        Ok(Row {
            pos: r.get(0)?,
            seq: r.get(1)?,
            attempts: r.get(2)?,
            at: r.get(3)?,
        })
    })
    .optional()
}

/// Whether the last that a side told of a document is that it was deleted.
pub fn is_gone(c: &Connection, of: Side, key: &Key) -> rusqlite::Result<bool> {
    let sql = match of {
        Side::Local => {
            "SELECT EXISTS(SELECT 1 FROM outbox WHERE key = ? AND hint IN (x'64', x'44'))"
        }
        Side::Remote => {
            "SELECT EXISTS(SELECT 1 FROM inbox WHERE key = ? AND hint IN (x'64', x'44'))"
        }
    };
    c.prepare_cached(sql)?
        .query_row([key.as_bytes()], |r| r.get(0))
}

/// The `_id` of a key as its row in either queue has it.
pub fn id_of(c: &Connection, key: &Key) -> rusqlite::Result<Option<Id>> {
    c.prepare_cached(
        "SELECT id FROM outbox WHERE key = ?1 UNION ALL SELECT id FROM inbox WHERE key = ?1 LIMIT 1",
    )?
    .query_row([key.as_bytes()], |r| Ok(Id::from_bytes(r.get_ref(0)?.as_blob()?)))
    .optional()
}

/// Takes a row out if it is still the one that was claimed (R2).
pub fn remove(c: &Connection, of: Side, key: &Key, seq: i64) -> rusqlite::Result<()> {
    match get_row(c, of, key)? {
        Some(row) if row.seq == seq => remove_all(c, of, &mut [(key, &row)]),
        _ => Ok(()),
    }
}

/// The same for many rows, which are put into the order of their namespaces.
pub fn remove_all(c: &Connection, of: Side, rows: &mut [(&Key, &Row)]) -> rusqlite::Result<()> {
    rows.sort_by_key(|(key, _)| key.ns());
    for some in rows.chunk_by(|(a, _), (b, _)| a.ns() == b.ns()) {
        let ready = REMOVE_READY[of as usize].run(c, some, |(_, row)| place(row))?;
        uncount(c, of, some[0].0, "", ready)?;
        if ready < some.len() {
            // One that was held meanwhile leaves as well; one that came again stays.
            for (key, row) in some {
                let held = c
                    .prepare_cached(&format!(
                        "DELETE FROM {} WHERE pos = ? AND seq = ? RETURNING held",
                        table(of)
                    ))?
                    .query_row([row.pos, row.seq], |r| r.get::<_, Option<String>>(0))
                    .optional()?;
                if let Some(held) = held {
                    uncount(c, of, key, held.as_deref().unwrap_or_default(), 1)?;
                }
            }
        }
    }
    let keys = || rows.iter().map(|(key, _)| *key);
    match of {
        Side::Local => transactions::left(c, keys()),
        Side::Remote => Ok(()),
    }
}

fn place(row: &Row) -> [ValueRef<'static>; 2] {
    [ValueRef::Integer(row.pos), ValueRef::Integer(row.seq)]
}

/// Counts rows of a namespace no more.
fn uncount(c: &Connection, of: Side, key: &Key, held: &str, n: usize) -> rusqlite::Result<()> {
    c.prepare_cached("UPDATE counts SET n = n - ? WHERE queue = ? AND ns = ? AND held = ?")?
        .execute(params![n, of as i64, key.ns().to_be_bytes(), held])
        .map(drop)
}

// The rows are found by their places: `+` keeps SQLite from going by the index of ready rows.
const REMOVE_READY_LOCAL: Together = Together {
    head: "DELETE FROM outbox WHERE +held IS NULL AND (pos, seq) IN (VALUES ",
    row: "(?,?)",
    tail: ")",
};

/// By side of the change.
const REMOVE_READY: [Together; 2] = [
    REMOVE_READY_LOCAL,
    Together {
        head: "DELETE FROM inbox WHERE +held IS NULL AND (pos, seq) IN (VALUES ",
        ..REMOVE_READY_LOCAL
    },
];

/// Forgets what the event of a row said, so that it is looked at and not taken for an echo.
pub fn forget_hint(c: &Connection, of: Side, key: &Key) -> rusqlite::Result<()> {
    c.prepare_cached(&format!(
        "UPDATE {} SET hint = CASE WHEN hint IN (x'64', x'44') THEN x'44' END WHERE key = ? AND hint IS NOT NULL",
        table(of)
    ))?
    .execute([key.as_bytes()])?;
    Ok(())
}

/// Puts a row back for a later try, with a reason.
pub fn defer(
    c: &Connection,
    of: Side,
    key: &Key,
    next_at: i64,
    attempt: bool,
    reason: Option<&str>,
) -> rusqlite::Result<()> {
    c.prepare_cached(&format!(
        "UPDATE {} SET next_at = ?, attempts = attempts + ?, reason = ? WHERE key = ?",
        table(of)
    ))?
    .execute(params![next_at, attempt, reason, key.as_bytes()])?;
    Ok(())
}

/// Notes of a row that is still the one that was claimed that its document was found to be gone, so that
/// it counts among the deletions that wait. Whether that was news.
pub fn mark_gone(c: &Connection, of: Side, key: &Key, seq: i64) -> rusqlite::Result<bool> {
    let marked = c
        .prepare_cached(&format!(
            "UPDATE {} SET hint = x'44' WHERE key = ? AND seq = ?
             AND (hint IS NULL OR hint NOT IN (x'64', x'44'))",
            table(of)
        ))?
        .execute(params![key.as_bytes(), seq])?;
    Ok(marked > 0)
}

/// Holds a row that is still the one that was claimed: `conflict` or `failed`, with a reason (R19).
pub fn hold(
    c: &Connection,
    of: Side,
    key: &Key,
    seq: i64,
    held: &str,
    reason: &str,
) -> rusqlite::Result<()> {
    c.prepare_cached(&format!(
        "UPDATE {} SET held = ?, reason = ? WHERE key = ? AND seq = ?",
        table(of)
    ))?
    .execute(params![held, reason, key.as_bytes(), seq])?;
    Ok(())
}

/// Makes everything ready now; `failed` rows get another round of tries.
pub fn retry_all(c: &Connection) -> rusqlite::Result<()> {
    for table in ["outbox", "inbox"] {
        c.execute(
            &format!("UPDATE {table} SET next_at = 0 WHERE next_at > 0"),
            [],
        )?;
        c.execute(
            &format!(
                "UPDATE {table} SET held = NULL, attempts = 0, reason = NULL WHERE held = 'failed'"
            ),
            [],
        )?;
    }
    Ok(())
}

/// Counts of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All rows.
    pub all: u64,
    /// Rows of documents in conflict.
    pub conflict: u64,
    /// Rows of rejected documents.
    pub failed: u64,
    /// When the oldest row that is not held was first seen, ms since 1970.
    pub oldest: Option<i64>,
}

/// Counts of the queue with that side's changes. They are kept in the transaction that changes the rows: a
/// queue of a million costs no more than an empty one.
pub fn counts(c: &Connection, of: Side) -> rusqlite::Result<Counts> {
    let mut counts = Counts::default();
    let mut rows =
        c.prepare_cached("SELECT held, sum(n) FROM counts WHERE queue = ? GROUP BY held")?;
    let mut rows = rows.query([of as i64])?;
    while let Some(r) = rows.next()? {
        let n: u64 = r.get(1)?;
        counts.all += n;
        match r.get_ref(0)?.as_str()? {
            "conflict" => counts.conflict += n,
            "failed" => counts.failed += n,
            _ => {}
        }
    }
    counts.oldest = c
        .prepare_cached(&format!(
            "SELECT at FROM {} WHERE held IS NULL ORDER BY pos LIMIT 1",
            table(of)
        ))?
        .query_row([], |r| r.get(0))
        .optional()?;
    Ok(counts)
}

/// Rows of both queues.
pub fn count_all(c: &Connection) -> rusqlite::Result<u64> {
    c.prepare_cached("SELECT ifnull(sum(n), 0) FROM counts")?
        .query_row([], |r| r.get(0))
}

/// Rows of one namespace in both queues.
pub fn count_of(c: &Connection, ns: u32) -> rusqlite::Result<u64> {
    c.prepare_cached("SELECT ifnull(sum(n), 0) FROM counts WHERE queue IN (0, 1) AND ns = ?")?
        .query_row([ns.to_be_bytes()], |r| r.get(0))
}

/// Rows that are not held and were queued no later than sequence number `seq`: in the namespaces
/// `only` (all, if empty), never in those of `never`. Of each queue no more than `most` are counted.
pub fn ready_up_to(
    c: &Connection,
    seq: i64,
    (only, never): (&[u32], &[u32]),
    most: u32,
) -> rusqlite::Result<u64> {
    let list = |numbers: &[u32]| {
        let each = numbers.iter().map(|n| format!("x'{n:08x}'"));
        each.collect::<Vec<_>>().join(",")
    };
    let mut of = String::new();
    if !only.is_empty() {
        of += &format!(" AND substr(key, 1, 4) IN ({})", list(only));
    }
    if !never.is_empty() {
        of += &format!(" AND substr(key, 1, 4) NOT IN ({})", list(never));
    }
    let mut total = 0;
    for table in ["outbox", "inbox"] {
        let rows = format!("SELECT 1 FROM {table} WHERE held IS NULL AND seq <= ?{of} LIMIT ?");
        total += c
            .prepare_cached(&format!("SELECT count(*) FROM ({rows})"))?
            .query_row(params![seq, most], |r| r.get::<_, u64>(0))?;
    }
    Ok(total)
}

/// A queued document, whichever queue has it.
#[derive(Clone, Debug)]
pub struct Queued {
    /// Which one.
    pub key: Key,
    /// Its `_id`.
    pub id: Id,
    /// It is in conflict or set aside.
    pub held: bool,
}

/// Documents of a namespace in either queue, in the order of their keys, behind `after`.
pub fn of_namespace(
    c: &Connection,
    ns: u32,
    after: &[u8],
    most: usize,
) -> rusqlite::Result<Vec<Queued>> {
    let (first, end) = (ns.to_be_bytes().to_vec(), (ns + 1).to_be_bytes().to_vec());
    let after = if after.is_empty() { &first } else { after };
    c.prepare_cached(
        "SELECT key, id, max(held IS NOT NULL) FROM (
           SELECT * FROM (SELECT key, id, held FROM outbox WHERE key > ?1 AND key < ?2 ORDER BY key LIMIT ?3)
           UNION ALL
           SELECT * FROM (SELECT key, id, held FROM inbox WHERE key > ?1 AND key < ?2 ORDER BY key LIMIT ?3))
         GROUP BY key ORDER BY key LIMIT ?3",
    )?
    .query_map(
        params![after, end, i64::try_from(most).unwrap_or(i64::MAX)],
        |r| {
            Ok(Queued {
                key: Key::from_bytes(r.get_ref(0)?.as_blob()?),
                id: Id::from_bytes(r.get_ref(1)?.as_blob()?),
                held: r.get(2)?,
            })
        },
    )?
    .collect()
}

/// The sequence number of the last change queued.
pub fn last_seq(c: &Connection) -> rusqlite::Result<i64> {
    c.query_row("SELECT v FROM meta WHERE k = 'seq'", [], |r| r.get(0))
}
