//! The rows of a queue that are not held, in the order of their first change: of all collections
//! together, or of some of them.

use std::collections::VecDeque;

use rusqlite::{Connection, params};

use super::queue::{Row, table};
use crate::decide::Side;
use crate::key::{Id, Key};
use crate::order::Class;

/// A row as it stands in the queue.
pub(super) struct Found {
    pub(super) key: Key,
    pub(super) id: Id,
    pub(super) row: Row,
    pub(super) hint: Option<Vec<u8>>,
    pub(super) due: i64,
    /// Whether a write of the document is undecided.
    pub(super) intent: bool,
    /// Whether the other queue has the document, too.
    pub(super) other: bool,
}

/// What [`found`] takes of a queue. Where there is no intent, or nothing in the other queue, nobody has to look
/// for one of each document.
pub(super) fn columns(c: &Connection, of: Side) -> rusqlite::Result<String> {
    let (queue, other) = (table(of), table(of.other()));
    let has = |table: &str| {
        let any: bool = c
            .prepare_cached(&format!("SELECT EXISTS(SELECT 1 FROM {table})"))?
            .query_row([], |r| r.get(0))?;
        Ok::<_, rusqlite::Error>(match any {
            true => format!("EXISTS(SELECT 1 FROM {table} WHERE {table}.key = {queue}.key)"),
            false => "FALSE".into(),
        })
    };
    let (intent, other) = (has("intents")?, has(other)?);
    Ok(format!(
        "pos, key, id, seq, hint, attempts, at, next_at, {intent}, {other}"
    ))
}

pub(super) fn found(r: &rusqlite::Row<'_>) -> rusqlite::Result<Found> {
    Ok(Found {
        key: Key::from_bytes(r.get_ref(1)?.as_blob()?),
        id: Id::from_bytes(r.get_ref(2)?.as_blob()?),
        row: Row {
            pos: r.get(0)?,
            seq: r.get(3)?,
            attempts: r.get(5)?,
            at: r.get(6)?,
        },
        hint: r.get(4)?,
        due: r.get(7)?,
        intent: r.get(8)?,
        other: r.get(9)?,
    })
}

/// Makes the indexes by which a collection's rows are found in order, or drops them: who has no order
/// of collections does not pay for them. With a million rows that takes some seconds, once.
pub fn index(c: &Connection, wanted: bool) -> rusqlite::Result<()> {
    for table in ["outbox", "inbox"] {
        let sql = match wanted {
            // A key begins with the number of its collection.
            true => format!(
                "CREATE INDEX IF NOT EXISTS {table}_lanes ON {table}(substr(key, 1, 4), pos) WHERE held IS NULL"
            ),
            false => format!("DROP INDEX IF EXISTS {table}_lanes"),
        };
        c.execute_batch(&sql)?;
    }
    Ok(())
}

/// Rows that are not held of some collections (all, if empty) in both queues; no more than `most` of
/// each queue and collection are counted.
pub fn count(c: &Connection, only: &[u32], most: u32) -> rusqlite::Result<u64> {
    let mut all = 0;
    for of in [Side::Local, Side::Remote] {
        let count = |one: &str, ns: &[u8]| {
            c.prepare_cached(&format!(
                "SELECT min(?1, ifnull(sum(n), 0)) FROM counts WHERE queue = ?2 AND held = '' AND {one}"
            ))?
            .query_row(params![most, of as i64, ns], |r| r.get::<_, u64>(0))
        };
        if only.is_empty() {
            // Nothing comes before an empty one.
            all += count("ns >= ?3", &[])?;
        }
        for ns in only {
            all += count("ns = ?3", &ns.to_be_bytes())?;
        }
    }
    Ok(all)
}

/// One listed row: side of the change, key, `_id`, first seen, state, reason.
pub type Listed = (Side, Key, Id, i64, Option<String>, Option<String>);

/// The oldest rows of both queues; where collections go in an order, of each collection, and of what is
/// held.
pub fn list(c: &Connection, limit: u32, classes: &[Class]) -> rusqlite::Result<Vec<Listed>> {
    let collections = classes.iter().flat_map(|class| &class.namespaces);
    let collections: Vec<[u8; 4]> = collections.map(|ns| ns.to_be_bytes()).collect();
    let mut all = Vec::new();
    for of in [Side::Local, Side::Remote] {
        let mut add = |which: &str, ns: Option<[u8; 4]>| {
            let mut rows = c.prepare_cached(&format!(
                "SELECT key, id, at, held, reason FROM {} WHERE {which} ORDER BY pos LIMIT ?1",
                table(of)
            ))?;
            let rows = match ns {
                Some(ns) => rows
                    .query_map(params![limit, ns], |r| listed(of, r))?
                    .collect(),
                None => rows
                    .query_map([limit], |r| listed(of, r))?
                    .collect::<Result<Vec<_>, _>>(),
            };
            all.extend(rows?);
            Ok::<_, rusqlite::Error>(())
        };
        if collections.is_empty() {
            add("TRUE", None)?;
            continue;
        }
        for ns in &collections {
            add("held IS NULL AND substr(key, 1, 4) = ?2", Some(*ns))?;
        }
        add("held IS NOT NULL", None)?;
    }
    Ok(all)
}

fn listed(of: Side, r: &rusqlite::Row<'_>) -> rusqlite::Result<Listed> {
    Ok((
        of,
        Key::from_bytes(r.get_ref(0)?.as_blob()?),
        Id::from_bytes(r.get_ref(1)?.as_blob()?),
        r.get(2)?,
        r.get(3)?,
        r.get(4)?,
    ))
}

/// Rows read at first and at most at once; of one among many collections few are read, since most of what
/// is read ahead is for nothing then.
const CHUNK: std::ops::RangeInclusive<usize> = 32..=1024;

/// Rows of all collections, or of one.
struct Lane {
    ns: Option<u32>,
    after: i64,
    chunk: usize,
    ahead: VecDeque<Found>,
    ended: bool,
}

impl Lane {
    /// Position of the next row.
    fn next_pos(&mut self, c: &Connection, of: Side) -> rusqlite::Result<Option<i64>> {
        if self.ahead.is_empty() && !self.ended {
            self.read(c, of)?;
        }
        Ok(self.ahead.front().map(|found| found.row.pos))
    }

    fn read(&mut self, c: &Connection, of: Side) -> rusqlite::Result<()> {
        let one = match self.ns {
            Some(_) => "AND substr(key, 1, 4) = ?3",
            None => "",
        };
        let mut rows = c.prepare_cached(&format!(
            "SELECT {} FROM {} WHERE held IS NULL {one} AND pos > ?1 ORDER BY pos LIMIT ?2",
            columns(c, of)?,
            table(of)
        ))?;
        self.ahead.reserve(self.chunk);
        let most = i64::try_from(self.chunk).unwrap_or(i64::MAX);
        let rows = match self.ns {
            Some(ns) => rows.query_map(params![self.after, most, ns.to_be_bytes()], found)?,
            None => rows.query_map(params![self.after, most], found)?,
        };
        for row in rows {
            self.ahead.push_back(row?);
        }
        self.ended = self.ahead.len() < self.chunk;
        self.chunk = (self.chunk * 2).min(*CHUNK.end());
        if let Some(last) = self.ahead.back() {
            self.after = last.row.pos;
        }
        Ok(())
    }
}

/// Reads the rows of some collections in the order of their first change.
pub(super) struct Lanes {
    of: Side,
    lanes: Vec<Lane>,
}

impl Lanes {
    /// Behind a position, when so many rows are wanted; `only` empty: all collections.
    pub(super) fn new(of: Side, only: &[u32], after: i64, wanted: usize) -> Self {
        let lane = |ns| Lane {
            ns,
            after,
            chunk: match only.len() {
                0 | 1 => wanted.clamp(*CHUNK.start(), *CHUNK.end()),
                _ => *CHUNK.start(),
            },
            ahead: VecDeque::new(),
            ended: false,
        };
        let lanes = match only {
            [] => vec![lane(None)],
            only => only.iter().map(|ns| lane(Some(*ns))).collect(),
        };
        Self { of, lanes }
    }

    /// The next row.
    pub(super) fn next(&mut self, c: &Connection) -> rusqlite::Result<Option<Found>> {
        let mut next: Option<(i64, usize)> = None;
        for (n, lane) in self.lanes.iter_mut().enumerate() {
            if let Some(pos) = lane.next_pos(c, self.of)?
                && next.is_none_or(|(first, _)| pos < first)
            {
                next = Some((pos, n));
            }
        }
        Ok(next.and_then(|(_, n)| self.lanes[n].ahead.pop_front()))
    }
}
