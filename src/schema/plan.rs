//! What is to be done so that both sides have the same indexes and options. Pure.
//!
//! Three trees again: an index on one side only is new if base does not know it, and is made on the
//! other; if base knows it, it was dropped there, and that is reported. Nothing is ever dropped.

use bson::{Document, doc};

use super::definition::{CHANGEABLE, Definition, Index, part, same_options};
use crate::config::SchemaSync;
use crate::decide::Side;

/// A collection as both sides have it, and as they last agreed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trees<'a> {
    /// On the local side, if it exists there.
    pub(super) local: Option<&'a Definition>,
    /// What both had; `None`: the collection never was on both.
    pub(super) base: Option<&'a Definition>,
    /// On the remote.
    pub(super) remote: Option<&'a Definition>,
}

impl<'a> Trees<'a> {
    fn of(&self, side: Side) -> Option<&'a Definition> {
        match side {
            Side::Local => self.local,
            Side::Remote => self.remote,
        }
    }
}

/// What is to be done, or said.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step {
    /// Make the collection with these options.
    Create {
        /// Where.
        on: Side,
        /// Its options.
        options: Document,
    },
    /// Make an index.
    Index {
        /// Where.
        on: Side,
        /// Which.
        index: Index,
    },
    /// `collMod` with these arguments.
    Modify {
        /// Where.
        on: Side,
        /// The arguments.
        change: Document,
    },
    /// The index was dropped on that side since both had it.
    Dropped {
        /// Where it is missing.
        on: Side,
        /// Which.
        index: Index,
    },
    /// Indexes of that name, or over those keys, differ.
    Differ {
        /// Their name, or both.
        name: String,
        /// What differs.
        what: Vec<String>,
        /// Which side changed since both agreed, where base tells.
        changed: Option<Side>,
    },
    /// Options of the collection differ.
    Options {
        /// Their names.
        what: Vec<String>,
        /// Which side changed since both agreed, where base tells.
        changed: Option<Side>,
    },
}

/// What to do about one collection, and what base becomes. With `sync = "report"` the steps only say
/// what is missing.
pub(super) fn plan(trees: Trees<'_>, sync: SchemaSync) -> (Vec<Step>, Option<Definition>) {
    let (local, remote) = match (trees.local, trees.remote) {
        (None, None) => return (vec![], None),
        (Some(local), Some(remote)) => (local, remote),
        (local, remote) => {
            // Once it was on both: it was dropped on one, which is a halt's business (R13).
            let steps = match (trees.base, local.or(remote)) {
                (None, Some(there)) => {
                    let on = if local.is_some() {
                        Side::Remote
                    } else {
                        Side::Local
                    };
                    made_anew(there, on, sync)
                }
                _ => vec![],
            };
            return (steps, trees.base.cloned());
        }
    };
    let nothing = Definition::default();
    let base = trees.base.unwrap_or(&nothing);
    let mut steps = Vec::new();
    let mut agreed = Definition::default();
    indexes((local, base, remote), sync, &mut steps, &mut agreed.indexes);
    let known = trees.base.map(|b| &b.options);
    agreed.options = collection_options((local, known, remote), sync, &mut steps);
    // Of an index that is being built nobody knows yet whether it will come to be.
    steps.retain(|step| match step {
        Step::Index { on, index } | Step::Dropped { on, index } => {
            let there = trees.of(*on).map(|d| d.building.as_slice());
            let here = trees.of(on.other()).map(|d| d.building.as_slice());
            let building =
                |names: Option<&[String]>| names.is_some_and(|names| names.contains(&index.name));
            !building(there) && !building(here)
        }
        _ => true,
    });
    (steps, Some(agreed))
}

/// A collection that only one side has and the other never had. Without options it comes to be with
/// its first index or document.
fn made_anew(there: &Definition, on: Side, sync: SchemaSync) -> Vec<Step> {
    let create = (sync == SchemaSync::Full).then(|| Step::Create {
        on,
        options: there.options.clone(),
    });
    let ready = there.indexes.iter();
    let ready = ready.filter(|index| !there.building.contains(&index.name));
    let indexes = ready.map(|index| Step::Index {
        on,
        index: index.clone(),
    });
    create.into_iter().chain(indexes).collect()
}

fn indexes(
    (local, base, remote): (&Definition, &Definition, &Definition),
    sync: SchemaSync,
    steps: &mut Vec<Step>,
    agreed: &mut Vec<Index>,
) {
    let mut here: Vec<&Index> = local.indexes.iter().collect();
    let mut there: Vec<&Index> = remote.indexes.iter().collect();
    let mut known: Vec<&Index> = base.indexes.iter().collect();
    let building = |index: &Index| {
        local.building.contains(&index.name) || remote.building.contains(&index.name)
    };
    // The same on both, first by name too, then by any name.
    for by_name in [true, false] {
        here.retain(|l| {
            let fits = |r: &&Index| l.is_alike(r) && (!by_name || l.name == r.name);
            let Some(at) = there.iter().position(fits) else {
                return true;
            };
            there.remove(at);
            if !building(l) {
                known.retain(|b| b.name != l.name && !b.is_alike(l));
                agreed.push((*l).clone());
            }
            false
        });
    }
    // What can't be both: one name, or one set of keys, with different options.
    for by_name in [true, false] {
        here.retain(|l| {
            let clash = |r: &&Index| {
                if by_name {
                    l.name == r.name
                } else {
                    l.is_over_same_keys(r)
                }
            };
            let Some(at) = there.iter().position(clash) else {
                return true;
            };
            let r = there.remove(at);
            let mut was = None;
            known.retain(|b| {
                let mine = b.name == l.name || b.name == r.name;
                if mine {
                    was = Some(*b);
                }
                !mine
            });
            agreed.extend(was.cloned());
            steps.push(differ(l, was, r, sync));
            false
        });
    }
    for (singles, on) in [(here, Side::Remote), (there, Side::Local)] {
        for index in singles {
            let was = known
                .iter()
                .position(|b| b.is_alike(index) || b.name == index.name);
            let index = index.clone();
            match was {
                Some(at) => {
                    agreed.push(known.remove(at).clone());
                    steps.push(Step::Dropped { on, index });
                }
                None => steps.push(Step::Index { on, index }),
            }
        }
    }
    // What is left of `known` is gone from both sides.
}

fn differ(local: &Index, was: Option<&Index>, remote: &Index, sync: SchemaSync) -> Step {
    let what = local.differing(remote);
    let changed = was.and_then(|was| match (was.is_alike(local), was.is_alike(remote)) {
        (true, false) => Some(Side::Remote),
        (false, true) => Some(Side::Local),
        _ => None,
    });
    let modifiable = what
        .iter()
        .all(|w| ["hidden", "expireAfterSeconds"].contains(&w.as_str()));
    if let (SchemaSync::Full, true, Some(changed)) = (sync, modifiable, changed) {
        let (from, to) = match changed {
            Side::Local => (local, remote),
            Side::Remote => (remote, local),
        };
        let mut index = doc! {"name": &to.name};
        for option in &what {
            match (option.as_str(), from.options.get(option)) {
                ("hidden", value) => {
                    index.insert("hidden", value.is_some());
                }
                (_, Some(value)) => {
                    index.insert("expireAfterSeconds", value.clone());
                }
                // A TTL index can't be made an ordinary one by collMod.
                (_, None) => index.clear(),
            }
        }
        if !index.is_empty() {
            return Step::Modify {
                on: changed.other(),
                change: doc! {"index": index},
            };
        }
    }
    let name = if local.name == remote.name {
        local.name.clone()
    } else {
        format!("{} / {}", local.name, remote.name)
    };
    Step::Differ {
        name,
        what,
        changed,
    }
}

/// Compares the options and returns those that both agree on.
fn collection_options(
    (local, base, remote): (&Definition, Option<&Document>, &Definition),
    sync: SchemaSync,
    steps: &mut Vec<Step>,
) -> Document {
    let mut agreed = Document::new();
    let groups = CHANGEABLE.iter().map(|g| Some(*g)).chain([None]);
    for group in groups {
        let (l, r) = (part(&local.options, group), part(&remote.options, group));
        let was = base.map(|b| part(b, group));
        if same_options(&l, &r) {
            agreed.extend(l);
            continue;
        }
        let changed =
            was.as_ref()
                .and_then(|was| match (same_options(was, &l), same_options(was, &r)) {
                    (true, false) => Some(Side::Remote),
                    (false, true) => Some(Side::Local),
                    _ => None,
                });
        agreed.extend(was.unwrap_or_default());
        match (sync, group, changed) {
            (SchemaSync::Full, Some(group), Some(changed)) => {
                let from = if changed == Side::Local { &l } else { &r };
                steps.push(Step::Modify {
                    on: changed.other(),
                    change: change_to(group, from),
                });
            }
            _ => {
                let all = l.keys().chain(r.keys().filter(|k| !l.contains_key(*k)));
                let differs = |k: &&String| {
                    let one = |d: &Document| part(d, Some(&[k.as_str()]));
                    !same_options(&one(&l), &one(&r))
                };
                steps.push(Step::Options {
                    what: all.filter(differs).cloned().collect(),
                    changed,
                });
            }
        }
    }
    agreed
}

/// Arguments of `collMod` that bring a group of options to `wanted`.
fn change_to(group: &[&str], wanted: &Document) -> Document {
    let mut change = Document::new();
    for name in group {
        let value = match (*name, wanted.get(*name)) {
            (_, Some(value)) => value.clone(),
            ("validator", None) => doc! {}.into(),
            ("validationLevel", None) => "strict".into(),
            ("validationAction", None) => "error".into(),
            ("changeStreamPreAndPostImages", None) => doc! {"enabled": false}.into(),
            (_, None) => "off".into(),
        };
        change.insert(*name, value);
    }
    change
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
