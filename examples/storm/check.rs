//! What must hold after the healing: a pure function of what was written and what is there.
//!
//! The storm and `tests/random_history` judge by it. It knows nothing of the daemon: only what the
//! applications were told, what is in the databases, and what `conflict_logs` says.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use mongodb::bson::{Bson, Document};

/// Where an application writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// The local database of a site, counted from 0.
    Local(u8),
    Remote,
}

/// A value of `v`; `None` is "no such document".
pub type Value = Option<i64>;

/// What the applications wrote. More than one value: the last writes were not acknowledged, so
/// each may or may not have happened.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// By document and writing side: keys that one side writes (`L…`, `R…`) and shared keys (`C…`).
    pub values: BTreeMap<(String, Side), Vec<Value>>,
    /// By document and side: the side's own field of a shared document (`B…`).
    pub fields: BTreeMap<(String, Side), Vec<i64>>,
    /// All values of the unique field `u` that are swapped among the `U…` documents.
    pub swapped: BTreeSet<String>,
    /// By chained document (`K…`): the numbers that were added to its history `h`, acknowledged.
    pub chains: BTreeMap<String, BTreeSet<i64>>,
    /// By document that all sides count in (`N…`): what was added, and what may have been added.
    pub counts: BTreeMap<String, (i64, i64)>,
    /// By document and item of its set `set`: whether it may be in.
    pub items: BTreeMap<(String, i64), Vec<bool>>,
}

impl Ledger {
    /// Before something is added to a count: from now on it may have been.
    pub fn may_count(&mut self, key: &str, more: i64) {
        self.counts.entry(key.into()).or_default().1 += more;
    }

    /// It was added for certain (`true`), or for certain not.
    pub fn counted(&mut self, key: &str, more: i64, was: bool) {
        let (sure, maybe) = self.counts.entry(key.into()).or_default();
        *maybe -= more;
        *sure += if was { more } else { 0 };
    }

    /// Before a write: from now on it may have happened. Returns what to put back if it didn't.
    pub fn attempt(&mut self, key: &str, side: Side, value: Value) -> Vec<Value> {
        let entry = self.values.entry((key.into(), side)).or_default();
        let before = entry.clone();
        if before.is_empty() {
            entry.push(None);
        }
        entry.push(value);
        before
    }

    /// The write was acknowledged.
    pub fn acknowledge(&mut self, key: &str, side: Side, value: Value) {
        self.values.insert((key.into(), side), vec![value]);
    }

    /// The write certainly did nothing.
    pub fn revert(&mut self, key: &str, side: Side, before: Vec<Value>) {
        if before.is_empty() {
            self.values.remove(&(key.into(), side));
        } else {
            self.values.insert((key.into(), side), before);
        }
    }
}

/// A record in `conflict_logs`.
#[derive(Clone, Debug, Default)]
pub struct Conflict {
    pub key: String,
    pub open: bool,
    /// Both versions, as the record keeps them.
    pub local: Option<Document>,
    pub remote: Option<Document>,
}

/// Documents by `_id`, without sync fields, as bytes and decoded.
pub type Documents = BTreeMap<String, (Vec<u8>, Document)>;

/// What is there after the healing.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The local databases, by site.
    pub locals: Vec<Documents>,
    pub remote: Documents,
    /// Of all sites.
    pub conflicts: Vec<Conflict>,
    /// Documents still in outbox and inbox, of all sites.
    pub outbox: u64,
    pub inbox: u64,
}

/// A broken promise.
#[derive(Clone, Debug, PartialEq)]
pub enum Problem {
    /// The two sides hold different bytes.
    Diverged {
        key: String,
        local: Option<Document>,
        remote: Option<Document>,
    },
    /// A write of a key that only one side writes is not there.
    Lost {
        key: String,
        wanted: Vec<Value>,
        found: Value,
    },
    /// A deleted document came back.
    Resurrected { key: String, found: Value },
    /// A side's own field of a shared document is not what it wrote last.
    LostField {
        key: String,
        side: Side,
        wanted: Vec<i64>,
        found: Value,
    },
    /// A shared key without a conflict holds what neither side wrote last.
    Contested {
        key: String,
        wanted: Vec<Value>,
        found: Value,
    },
    /// The swapped unique values are no longer exactly those.
    Swaps { found: Vec<String> },
    /// A conflict where nobody was in anybody's way.
    FalseConflict { key: String },
    /// A count that both sides added to is not the sum of what was added.
    Miscounted {
        key: String,
        least: i64,
        most: i64,
        found: Value,
    },
    /// A set that both sides changed lacks what was put in, or has what was taken out, or has it twice.
    WrongSet {
        key: String,
        item: i64,
        wanted: Vec<bool>,
        found: usize,
    },
    /// The queue did not empty.
    Stuck { outbox: u64, inbox: u64 },
    /// Acknowledged writes of a chained document that neither led to what is there now nor are in
    /// a version that `conflict_logs` keeps.
    Unkept { key: String, missing: Vec<i64> },
    /// A conflict of two versions of which one was made from the other.
    FalseChainConflict {
        key: String,
        local: Vec<i64>,
        remote: Vec<i64>,
    },
}

impl Problem {
    /// What sort of promise it is.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Diverged { .. } => "diverged",
            Self::Lost { .. } => "lost",
            Self::Resurrected { .. } => "resurrected",
            Self::LostField { .. } => "lost_field",
            Self::Contested { .. } => "contested",
            Self::Swaps { .. } => "swaps",
            Self::FalseConflict { .. } => "false_conflict",
            Self::Miscounted { .. } => "miscounted",
            Self::WrongSet { .. } => "wrong_set",
            Self::Stuck { .. } => "stuck",
            Self::Unkept { .. } => "unkept",
            Self::FalseChainConflict { .. } => "false_chain_conflict",
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Everything that is wrong; empty if all is well.
pub fn check(ledger: &Ledger, seen: &Observed) -> Vec<Problem> {
    let mut problems = Vec::new();
    let open: BTreeSet<&str> = seen
        .conflicts
        .iter()
        .filter(|c| c.open && is_shared(&c.key))
        .map(|c| c.key.as_str())
        .collect();
    divergence(seen, &open, &mut problems);
    values(ledger, seen, &mut problems);
    fields(ledger, seen, &mut problems);
    swaps(ledger, seen, &mut problems);
    chains(ledger, seen, &mut problems);
    counts(ledger, seen, &mut problems);
    sets(ledger, seen, &mut problems);
    let mut false_conflicts: Vec<&str> = seen
        .conflicts
        .iter()
        .map(|c| c.key.as_str())
        .filter(|key| !is_shared(key))
        .collect();
    false_conflicts.dedup();
    problems.extend(
        false_conflicts
            .into_iter()
            .map(|key| Problem::FalseConflict { key: key.into() }),
    );
    // A document with an open conflict may wait in the queues of a site, and only that.
    let held = (open.len() * seen.locals.len()) as u64;
    if seen.outbox > held || seen.inbox > held {
        problems.push(Problem::Stuck {
            outbox: seen.outbox,
            inbox: seen.inbox,
        });
    }
    problems
}

/// Only shared keys may be in conflict.
fn is_shared(key: &str) -> bool {
    key.starts_with(['C', 'K'])
}

fn divergence(seen: &Observed, open: &BTreeSet<&str>, problems: &mut Vec<Problem>) {
    for here in &seen.locals {
        let keys: BTreeSet<&String> = here.keys().chain(seen.remote.keys()).collect();
        for key in keys {
            let (local, remote) = (here.get(key), seen.remote.get(key));
            if local.map(|d| &d.0) != remote.map(|d| &d.0) && !open.contains(key.as_str()) {
                problems.push(Problem::Diverged {
                    key: key.clone(),
                    local: local.map(|d| d.1.clone()),
                    remote: remote.map(|d| d.1.clone()),
                });
            }
        }
    }
}

fn values(ledger: &Ledger, seen: &Observed, problems: &mut Vec<Problem>) {
    let value = |key: &String| seen.remote.get(key).and_then(|d| d.1.get_i64("v").ok());
    let in_conflict: BTreeSet<&String> = seen.conflicts.iter().map(|c| &c.key).collect();
    let mut shared: BTreeMap<&String, Vec<Value>> = BTreeMap::new();
    for ((key, _), wanted) in &ledger.values {
        if is_shared(key) {
            shared.entry(key).or_default().extend(wanted);
            continue;
        }
        let found = value(key);
        if wanted.contains(&found) {
            continue;
        }
        problems.push(if wanted.iter().all(Option::is_none) {
            Problem::Resurrected {
                key: key.clone(),
                found,
            }
        } else {
            Problem::Lost {
                key: key.clone(),
                wanted: wanted.clone(),
                found,
            }
        });
    }
    for (key, wanted) in shared {
        let found = value(key);
        if !wanted.contains(&found) && !in_conflict.contains(key) {
            problems.push(Problem::Contested {
                key: key.clone(),
                wanted,
                found,
            });
        }
    }
}

fn fields(ledger: &Ledger, seen: &Observed, problems: &mut Vec<Problem>) {
    for ((key, side), wanted) in &ledger.fields {
        let name = field_of(*side);
        let document = seen.remote.get(key);
        let found = document.and_then(|d| d.1.get_i64(&name).ok());
        if !found.is_some_and(|found| wanted.contains(&found)) {
            problems.push(Problem::LostField {
                key: key.clone(),
                side: *side,
                wanted: wanted.clone(),
                found,
            });
        }
    }
}

/// The field of shared documents that a side writes.
pub fn field_of(side: Side) -> String {
    match side {
        Side::Local(site) => format!("l{site}"),
        Side::Remote => "r".into(),
    }
}

fn swaps(ledger: &Ledger, seen: &Observed, problems: &mut Vec<Problem>) {
    let documents = seen.remote.iter().filter(|(key, _)| key.starts_with('U'));
    let mut found: Vec<String> = documents
        .map(|(_, d)| d.1.get_str("u").unwrap_or("absent").to_owned())
        .collect();
    found.sort();
    if !found.iter().eq(ledger.swapped.iter()) {
        problems.push(Problem::Swaps { found });
    }
}

/// A chained document's history, oldest first. It is in the document itself, added to by the server
/// in the same statement as every other change: so it says what a version was made from.
fn history(document: &Document) -> Vec<i64> {
    let array = document.get_array("h");
    array.map_or(vec![], |h| h.iter().filter_map(|n| n.as_i64()).collect())
}

fn chains(ledger: &Ledger, seen: &Observed, problems: &mut Vec<Problem>) {
    for (key, acknowledged) in &ledger.chains {
        let mut kept = BTreeSet::new();
        let of_key = seen.conflicts.iter().filter(|c| c.key == *key);
        for conflict in of_key {
            let [local, remote] = [&conflict.local, &conflict.remote]
                .map(|body| body.as_ref().map(history).unwrap_or_default());
            kept.extend(local.iter().chain(&remote));
            if local.starts_with(&remote) || remote.starts_with(&local) {
                problems.push(Problem::FalseChainConflict {
                    key: key.clone(),
                    local,
                    remote,
                });
            }
        }
        for side in seen.locals.iter().chain([&seen.remote]) {
            kept.extend(side.get(key).map(|d| history(&d.1)).unwrap_or_default());
        }
        let missing: Vec<i64> = acknowledged.difference(&kept).copied().collect();
        if !missing.is_empty() {
            problems.push(Problem::Unkept {
                key: key.clone(),
                missing,
            });
        }
    }
}

fn counts(ledger: &Ledger, seen: &Observed, problems: &mut Vec<Problem>) {
    for (key, (sure, maybe)) in &ledger.counts {
        let document = seen.remote.get(key);
        let found = document.and_then(|d| d.1.get_i64("sum").ok());
        if !found.is_some_and(|found| (*sure..=sure + maybe).contains(&found)) {
            problems.push(Problem::Miscounted {
                key: key.clone(),
                least: *sure,
                most: sure + maybe,
                found,
            });
        }
    }
}

fn sets(ledger: &Ledger, seen: &Observed, problems: &mut Vec<Problem>) {
    for ((key, item), wanted) in &ledger.items {
        let document = seen.remote.get(key);
        let set = document.and_then(|d| d.1.get_array("set").ok());
        let same = |i: &&Bson| i.as_i64() == Some(*item);
        let found = set.map_or(0, |set| set.iter().filter(same).count());
        if found > 1 || !wanted.contains(&(found == 1)) {
            problems.push(Problem::WrongSet {
                key: key.clone(),
                item: *item,
                wanted: wanted.clone(),
                found,
            });
        }
    }
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
