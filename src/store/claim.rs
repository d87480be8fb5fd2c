//! Claiming rows of a queue for a batch.

use std::collections::{HashMap, HashSet};

use rusqlite::{CachedStatement, Connection, OptionalExtension, params};

use super::lanes::{Found, Lanes, columns, found};
use super::queue::{self, Row, Work, get_row, is_echo, table};
use super::sent::{self, Sent};
use super::{base, intents, transactions};
use crate::decide::Side;
use crate::key::{Key, KeySet};

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
    /// ms; nobody puts a row off for longer. One that is due later was put off by a clock that has been set
    /// back since.
    pub longest: i64,
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
    /// The commands that are under way.
    pub sent: Sent,
}

impl Claim {
    fn puts_off(&self, found: &Found) -> bool {
        found.due > self.now && found.due - self.now <= self.longest
    }
}

/// Claims the next keys of a queue that are not `busy`, drops rows that are only echoes, and tells
/// where the next claim continues: `None` at the end of the queue. The claimed keys are added to `busy`.
pub fn claim(
    c: &Connection,
    what: &Claim,
    busy: &mut KeySet,
) -> rusqlite::Result<(Vec<Work>, Option<i64>)> {
    sent::take_apart(c, &what.sent)?;
    let mut claiming = Claiming {
        c,
        what,
        base: base::marked(c)?,
        busy,
        works: Vec::with_capacity(what.limit.min(1024)),
        echoes: Vec::new(),
    };
    let outcome = claiming.fill().and_then(|at| {
        claiming.drop_echoes()?;
        Ok(at)
    });
    if outcome.is_err() {
        // A failed claim takes nothing.
        for work in &claiming.works {
            claiming.busy.remove(&work.key);
        }
    }
    Ok((claiming.works, outcome?))
}

struct Claiming<'a> {
    c: &'a Connection,
    what: &'a Claim,
    /// What reads base.
    base: CachedStatement<'a>,
    busy: &'a mut KeySet,
    works: Vec<Work>,
    /// Rows that leave: their events told only what base says already.
    echoes: Vec<(Key, Row)>,
}

impl Claiming<'_> {
    fn fill(&mut self) -> rusqlite::Result<Option<i64>> {
        let Self { c, what, .. } = *self;
        let mut at = what.after;
        // Rows passed over cost little, but a claim must end: the thread serves others too.
        let mut budget = 20_000_usize;
        let grouped = what.limit > 0 && transactions::any(c)?;
        let mut lanes = Lanes::new(what.of, &what.only, at, what.limit);
        while let Some(first) = lanes.next(c)? {
            if budget == 0 || what.limit > 0 && self.works.len() >= what.limit {
                return Ok(Some(at));
            }
            budget -= 1;
            at = first.row.pos;
            if what.puts_off(&first) {
                continue;
            }
            let transaction = match what.of {
                Side::Local if grouped => transactions::of(c, first.key.as_bytes())?,
                // It comes along when the outbox leads, with all that was written together with it.
                Side::Remote if grouped && transactions::waits(c, first.key.as_bytes())? => {
                    continue;
                }
                _ => None,
            };
            match transaction {
                None => self.take(first, None)?,
                Some(transaction) => self.together(first, transaction)?,
            }
        }
        Ok(None)
    }

    /// Claims a row, unless it is busy, not wanted, or an echo.
    fn take(&mut self, found: Found, transaction: Option<i64>) -> rusqlite::Result<()> {
        let Self { c, what, .. } = *self;
        let Found {
            key,
            id,
            row,
            hint,
            intent,
            other,
            ..
        } = found;
        if self.busy.contains(&key) || what.never.contains(&key.ns()) {
            return Ok(());
        }
        if let Some(first) = what.behind.get(&key.ns()) {
            // An echo is nothing to wait for.
            self.drop_echoes()?;
            if is_waiting(c, what.of, *first, row.pos)? {
                return Ok(());
            }
        }
        let (content, left) = base::next_marked(&mut self.base, &key)?;
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
            self.echoes.push((key, row));
            return Ok(());
        }
        if what.limit == 0 {
            return Ok(());
        }
        let (outbox, inbox) = match what.of {
            Side::Local => (Some(row), other),
            Side::Remote => (other, Some(row)),
        };
        self.busy.insert(key.clone());
        self.works.push(Work {
            key,
            id,
            outbox,
            inbox,
            base: content,
            left,
            transaction,
            intent,
        });
        Ok(())
    }

    /// Claims what is ready of a transaction, or nothing while a part of it is at work.
    fn together(&mut self, first: Found, transaction: i64) -> rusqlite::Result<()> {
        let Self { c, what, .. } = *self;
        let members = transactions::members(c, transaction)?;
        if members.iter().any(|key| self.busy.contains(key)) {
            return Ok(());
        }
        let mut ready = vec![];
        let mut row = c.prepare_cached(&format!(
            "SELECT {} FROM {} WHERE held IS NULL AND key = ?",
            columns(c, what.of)?,
            table(what.of)
        ))?;
        for key in members.iter().filter(|key| **key != first.key) {
            let member = row.query_row([key.as_bytes()], found).optional()?;
            ready.extend(member.filter(|m| !what.puts_off(m)));
        }
        ready.push(first);
        ready.sort_by_key(|m| m.row.pos);
        for member in ready {
            self.take(member, Some(transaction))?;
        }
        Ok(())
    }

    fn drop_echoes(&mut self) -> rusqlite::Result<()> {
        let mut rows: Vec<_> = self.echoes.iter().map(|(key, row)| (key, row)).collect();
        queue::remove_all(self.c, self.what.of, &mut rows)?;
        self.echoes.clear();
        Ok(())
    }
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
