//! What must hold after the healing: a pure function of what was written and what is there.
//!
//! The storm and `tests/random_history` judge by it. It knows nothing of the daemon: only what the
//! applications were told, what is in the databases, and what `conflict_logs` says.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use mongodb::bson::Document;

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
}

impl Ledger {
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

/// The checker must be able to fail: one hand-made state for each problem.
#[cfg(test)]
mod tests {
    use super::*;
    use mongodb::bson::doc;

    fn put(seen: &mut Observed, document: Document) {
        for local in &mut seen.locals {
            put_one(local, document.clone());
        }
        put_one(&mut seen.remote, document);
    }

    fn put_one(side: &mut BTreeMap<String, (Vec<u8>, Document)>, document: Document) {
        let key = document.get_str("_id").unwrap().to_owned();
        side.insert(key, (document.to_vec().unwrap(), document));
    }

    fn good() -> (Ledger, Observed) {
        let mut ledger = Ledger::default();
        let mut seen = Observed {
            locals: vec![Documents::new(); 2],
            ..Observed::default()
        };
        ledger.acknowledge("L1", Side::Local(0), Some(7));
        ledger.acknowledge("R1", Side::Remote, None);
        ledger.acknowledge("C1", Side::Local(0), Some(1));
        ledger.acknowledge("C1", Side::Remote, Some(2));
        ledger.fields.insert(("B1".into(), Side::Local(0)), vec![3]);
        ledger
            .fields
            .insert(("B1".into(), Side::Remote), vec![4, 5]);
        ledger.swapped = ["a", "b"].map(String::from).into();
        put(&mut seen, doc! {"_id": "L1", "v": 7_i64});
        put(&mut seen, doc! {"_id": "C1", "v": 2_i64});
        put(&mut seen, doc! {"_id": "B1", "l0": 3_i64, "r": 5_i64});
        ledger.chains.insert("K1".into(), [1, 2].into());
        put(&mut seen, doc! {"_id": "K1", "h": [1_i64, 2_i64]});
        put(&mut seen, doc! {"_id": "U1", "u": "b"});
        put(&mut seen, doc! {"_id": "U2", "u": "a"});
        (ledger, seen)
    }

    /// Applies one change to the good state and returns the problems.
    fn after(change: impl FnOnce(&mut Observed)) -> Vec<Problem> {
        let (ledger, mut seen) = good();
        change(&mut seen);
        check(&ledger, &seen)
    }

    fn conflict(key: &str, open: bool) -> Conflict {
        Conflict {
            key: key.into(),
            open,
            ..Conflict::default()
        }
    }

    #[test]
    fn a_good_state_has_no_problems() {
        assert_eq!(after(|_| {}), []);
    }

    #[test]
    fn bytes_decide_about_divergence() {
        let found = after(|s| put_one(&mut s.locals[1], doc! {"_id": "C1", "v": 2_i32}));
        assert!(matches!(&found[..], [Problem::Diverged { key, .. }] if key == "C1"));
    }

    #[test]
    fn an_open_conflict_excuses_a_shared_key_and_no_other() {
        let diverge = |key: &str, open: bool| {
            let document = doc! {"_id": key, "v": 7_i64, "more": 1};
            after(|s| {
                put_one(&mut s.remote, document);
                s.conflicts.push(conflict(key, open));
            })
        };
        assert_eq!(diverge("C1", true), []);
        assert!(matches!(
            &diverge("C1", false)[..],
            [Problem::Diverged { .. }, Problem::Diverged { .. }]
        ));
        let own = diverge("L1", true);
        assert!(matches!(
            &own[..],
            [
                Problem::Diverged { .. },
                Problem::Diverged { .. },
                Problem::FalseConflict { .. }
            ]
        ));
    }

    #[test]
    fn a_lost_write_and_a_resurrected_delete() {
        let found = after(|s| put(s, doc! {"_id": "L1", "v": 6_i64}));
        assert!(matches!(&found[..], [Problem::Lost { found: Some(6), .. }]));
        let found = after(|s| put(s, doc! {"_id": "R1", "v": 6_i64}));
        assert!(matches!(&found[..], [Problem::Resurrected { .. }]));
    }

    #[test]
    fn a_lost_field() {
        let found = after(|s| put(s, doc! {"_id": "B1", "l0": 2_i64, "r": 4_i64}));
        assert!(matches!(
            &found[..],
            [Problem::LostField {
                side: Side::Local(0),
                ..
            }]
        ));
    }

    #[test]
    fn a_contested_key_needs_a_last_write_or_a_conflict() {
        let change = |s: &mut Observed| put(s, doc! {"_id": "C1", "v": 9_i64});
        assert!(matches!(&after(change)[..], [Problem::Contested { .. }]));
        let excused = after(|s| {
            change(s);
            s.conflicts.push(conflict("C1", false));
        });
        assert_eq!(excused, []);
    }

    #[test]
    fn a_broken_swap_and_a_stuck_queue() {
        let found = after(|s| put(s, doc! {"_id": "U1", "u": "tmp"}));
        assert!(matches!(&found[..], [Problem::Swaps { .. }]));
        let found = after(|s| s.outbox = 1);
        assert!(matches!(&found[..], [Problem::Stuck { .. }]));
    }

    #[test]
    fn an_unacknowledged_write_may_or_may_not_have_happened() {
        let (mut ledger, mut seen) = good();
        let before = ledger.attempt("L1", Side::Local(0), Some(8));
        assert_eq!(check(&ledger, &seen), []);
        put(&mut seen, doc! {"_id": "L1", "v": 8_i64});
        assert_eq!(check(&ledger, &seen), []);
        ledger.revert("L1", Side::Local(0), before);
        assert!(matches!(&check(&ledger, &seen)[..], [Problem::Lost { .. }]));
    }

    #[test]
    fn a_chained_write_is_in_the_document_or_on_record() {
        let overwrite = |s: &mut Observed| put(s, doc! {"_id": "K1", "h": [1_i64, 3_i64]});
        let found = after(overwrite);
        assert!(matches!(&found[..], [Problem::Unkept { missing, .. }] if *missing == [2]));
        let record = |local: [i64; 2], remote: &[i64]| Conflict {
            local: Some(doc! {"_id": "K1", "h": local.to_vec()}),
            remote: Some(doc! {"_id": "K1", "h": remote.to_vec()}),
            ..conflict("K1", false)
        };
        let kept = after(|s| {
            overwrite(s);
            s.conflicts.push(record([1, 2], &[1, 3]));
        });
        assert_eq!(kept, []);
        let found = after(|s| s.conflicts.push(record([1, 2], &[1])));
        assert!(matches!(&found[..], [Problem::FalseChainConflict { .. }]));
    }
}
