//! Claiming rows of a queue for a batch.

use std::collections::{HashMap, HashSet};

use rusqlite::{Connection, OptionalExtension, params};

use super::lanes::{Found, Lanes, columns, found};
use super::queue::{Work, get_row, is_echo, table};
use super::{base, intents, transactions};
use crate::decide::Side;
use crate::key::Key;

/// What to claim.
pub struct Claim {
    /// Which queue leads.
    pub of: Side,
    /// Start behind this position.
    pub after: i64,
    /// Most keys; with 0, echoes are dropped and nothing is claimed. The documents of one transaction
    /// are claimed together even so.
    pub limit: usize,
    /// ms since 1970; rows due later are passed over.
    pub now: i64,
    /// Begin with documents of these namespaces only, of one rank as a rule; empty means all. What
    /// belongs to one transaction with them comes along from whichever namespace.
    pub only: Vec<u32>,
    /// Never these namespaces (held collections, not synced any more).
    pub never: HashSet<u32>,
    /// Names of the sync fields.
    pub sync_fields: Vec<String>,
    /// Namespaces whose documents wait for those of another that were changed before: GridFS files for
    /// their chunks (R15).
    pub behind: HashMap<u32, u32>,
}

/// Claims the next keys of a queue that are not `busy`, drops rows that are only echoes, and tells
/// where the next claim continues: `None` at the end of the queue. The claimed keys are added to `busy`.
pub fn claim(
    c: &Connection,
    what: &Claim,
    busy: &mut HashSet<Key>,
) -> rusqlite::Result<(Vec<Work>, Option<i64>)> {
    let mut works = Vec::new();
    let outcome = fill(c, what, busy, &mut works);
    if outcome.is_err() {
        // A failed claim takes nothing.
        for work in &works {
            busy.remove(&work.key);
        }
    }
    Ok((works, outcome?))
}

fn fill(
    c: &Connection,
    what: &Claim,
    busy: &mut HashSet<Key>,
    works: &mut Vec<Work>,
) -> rusqlite::Result<Option<i64>> {
    let mut at = what.after;
    // Rows passed over cost little, but a claim must end: the thread serves others too.
    let mut budget = 20_000_usize;
    let grouped = what.limit > 0 && transactions::any(c)?;
    let mut lanes = Lanes::new(what.of, &what.only, at, what.limit);
    while let Some(first) = lanes.next(c)? {
        if budget == 0 || what.limit > 0 && works.len() >= what.limit {
            return Ok(Some(at));
        }
        budget -= 1;
        at = first.pos;
        if first.due > what.now {
            continue;
        }
        let transaction = match what.of {
            Side::Local if grouped => transactions::of(c, first.key.as_bytes())?,
            // It comes along when the outbox leads, with all that was written together with it.
            Side::Remote if grouped && transactions::waits(c, first.key.as_bytes())? => continue,
            _ => None,
        };
        match transaction {
            None => works.extend(take(c, what, busy, (first, None))?),
            Some(transaction) => together(c, what, busy, works, (first, transaction))?,
        }
    }
    Ok(None)
}

/// Claims a row, unless it is busy, not wanted, or an echo.
fn take(
    c: &Connection,
    what: &Claim,
    busy: &mut HashSet<Key>,
    (found, transaction): (Found, Option<i64>),
) -> rusqlite::Result<Option<Work>> {
    let Found {
        pos,
        key,
        id,
        row,
        hint,
        intent,
        other,
        ..
    } = found;
    if busy.contains(&key) || what.never.contains(&key.ns()) {
        return Ok(None);
    }
    if let Some(first) = what.behind.get(&key.ns())
        && is_waiting(c, what.of, *first, pos)?
    {
        return Ok(None);
    }
    let (content, left) = base::get_marked(c, &key)?;
    let intent = match intent {
        true => intents::get(c, &key)?,
        false => None,
    };
    let other = match other {
        true => get_row(c, what.of.other(), &key)?,
        false => None,
    };
    if let Some(hint) = &hint
        && intent.is_none()
        && other.is_none()
        && is_echo(hint, content.as_deref(), &what.sync_fields)
    {
        c.prepare_cached(&format!("DELETE FROM {} WHERE key = ?", table(what.of)))?
            .execute([key.as_bytes()])?;
        return Ok(None);
    }
    if what.limit == 0 {
        return Ok(None);
    }
    let (outbox, inbox) = match what.of {
        Side::Local => (Some(row), other),
        Side::Remote => (other, Some(row)),
    };
    busy.insert(key.clone());
    Ok(Some(Work {
        key,
        id,
        outbox,
        inbox,
        base: content,
        left,
        transaction,
        intent,
    }))
}

/// Whether a document of a namespace stands in the queue before a position; one that is at work does.
fn is_waiting(c: &Connection, of: Side, ns: u32, before: i64) -> rusqlite::Result<bool> {
    let (low, high) = (ns.to_be_bytes().to_vec(), (ns + 1).to_be_bytes().to_vec());
    c.prepare_cached(&format!(
        "SELECT EXISTS(SELECT 1 FROM {} WHERE key >= ? AND key < ? AND pos < ? AND held IS NULL)",
        table(of)
    ))?
    .query_row(params![low, high, before], |r| r.get(0))
}

/// Claims what is ready of a transaction, or nothing while a part of it is at work.
fn together(
    c: &Connection,
    what: &Claim,
    busy: &mut HashSet<Key>,
    works: &mut Vec<Work>,
    (first, transaction): (Found, i64),
) -> rusqlite::Result<()> {
    let members = transactions::members(c, transaction)?;
    if members.iter().any(|key| busy.contains(key)) {
        return Ok(());
    }
    let mut ready = vec![];
    let mut row = c.prepare_cached(&format!(
        "SELECT {} FROM {} WHERE held IS NULL AND key = ?",
        columns(what.of),
        table(what.of)
    ))?;
    for key in members.iter().filter(|key| **key != first.key) {
        let member = row.query_row([key.as_bytes()], found).optional()?;
        ready.extend(member.filter(|m| m.due <= what.now));
    }
    ready.push(first);
    ready.sort_by_key(|m| m.pos);
    for member in ready {
        works.extend(take(c, what, busy, (member, Some(transaction)))?);
    }
    Ok(())
}
