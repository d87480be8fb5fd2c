//! Rules of the owner's for single fields that both sides changed, applied before anything is called a
//! conflict. Pure.
//!
//! A rule that does not fit the values at hand (a text under `max` on one side, a field that one side
//! removed) decides nothing: the field is in conflict then, as if there were no rule.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use crate::decide::Side;
use crate::raw::{self, Element, Writer, index_name};

/// What a field becomes that both sides changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldRule {
    /// The larger number, later date or text further down the alphabet.
    Max,
    /// The smaller one.
    Min,
    /// Numbers: what each side added since base is added up.
    SumOfChanges,
    /// Arrays as sets: what either side added is in, what either removed is out.
    Union,
    /// Arrays that only grow: the remote's new items, then the local ones.
    Append,
    /// The local value.
    Local,
    /// The remote value.
    Remote,
    /// The value of the side with the later `updatedAt`.
    Newest,
}

/// Rules by field.
pub type FieldRules = BTreeMap<String, FieldRule>;

/// Names in the configuration.
pub const NAMES: &[&str] = &[
    "max",
    "min",
    "sum_of_changes",
    "union",
    "append",
    "local",
    "remote",
    "newest",
];

impl FieldRule {
    /// Whether it adds up what both sides did, so that to apply it twice to one change is wrong.
    pub fn adds(self) -> bool {
        matches!(self, Self::SumOfChanges | Self::Union | Self::Append)
    }

    /// By its name in the configuration.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "max" => Self::Max,
            "min" => Self::Min,
            "sum_of_changes" => Self::SumOfChanges,
            "union" => Self::Union,
            "append" => Self::Append,
            "local" => Self::Local,
            "remote" => Self::Remote,
            "newest" => Self::Newest,
            _ => return None,
        })
    }
}

/// What a rule made of two values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Combined {
    /// The value of that side, or its absence.
    Of(Side),
    /// A value of its own: type byte and bytes.
    New(u8, Vec<u8>),
}

/// The three values of a field; `None`: the document has no such field.
#[derive(Clone, Copy, Debug)]
pub struct Three<'a> {
    /// On the local side.
    pub local: Option<Element<'a>>,
    /// What both sides had agreed on.
    pub base: Option<Element<'a>>,
    /// On the remote.
    pub remote: Option<Element<'a>>,
    /// Whether there is a base document at all.
    pub has_base: bool,
    /// The side with the later `updatedAt`, if both tell.
    pub newest: Option<Side>,
}

/// Applies a rule. `None`: it does not fit.
pub fn combine(rule: FieldRule, three: Three<'_>) -> Option<Combined> {
    let values = || Some((three.local?, three.remote?));
    match rule {
        FieldRule::Local => Some(Combined::Of(Side::Local)),
        FieldRule::Remote => Some(Combined::Of(Side::Remote)),
        FieldRule::Newest => three.newest.map(Combined::Of),
        FieldRule::Max | FieldRule::Min => {
            let (local, remote) = values()?;
            let order = compare(&local, &remote)?;
            let wanted = if rule == FieldRule::Max {
                Ordering::Greater
            } else {
                Ordering::Less
            };
            // Equal in value but not in type: the remote's, which all sites share.
            Some(Combined::Of(if order == wanted {
                Side::Local
            } else {
                Side::Remote
            }))
        }
        FieldRule::SumOfChanges => {
            let (local, remote) = values()?;
            sum(&local, three.base.as_ref(), &remote, three.has_base)
        }
        FieldRule::Union => {
            let (local, remote) = values()?;
            union(&local, three.base.as_ref(), &remote)
        }
        FieldRule::Append => {
            let (local, remote) = values()?;
            append(&local, three.base.as_ref(), &remote)
        }
    }
}

#[derive(Clone, Copy)]
enum Number {
    Int(i64),
    Double(f64),
}

fn number(e: &Element<'_>) -> Option<Number> {
    Some(match e.kind {
        0x10 => Number::Int(i32::from_le_bytes(e.value.try_into().ok()?).into()),
        0x12 => Number::Int(i64::from_le_bytes(e.value.try_into().ok()?)),
        0x01 => Number::Double(f64::from_le_bytes(e.value.try_into().ok()?)),
        _ => return None,
    })
}

fn as_double(n: Number) -> f64 {
    match n {
        Number::Int(i) => i as f64,
        Number::Double(d) => d,
    }
}

fn compare(a: &Element<'_>, b: &Element<'_>) -> Option<Ordering> {
    match (number(a), number(b)) {
        (Some(Number::Int(a)), Some(Number::Int(b))) => return Some(a.cmp(&b)),
        (Some(a), Some(b)) => return as_double(a).partial_cmp(&as_double(b)),
        _ => {}
    }
    if a.kind != b.kind {
        return None;
    }
    match a.kind {
        0x09 => {
            let millis = |e: &Element<'_>| Some(i64::from_le_bytes(e.value.try_into().ok()?));
            Some(millis(a)?.cmp(&millis(b)?))
        }
        0x02 => Some(raw::text(a)?.cmp(raw::text(b)?)),
        0x08 => Some(a.value.cmp(b.value)),
        _ => None,
    }
}

/// `local + remote - base`: both sides' changes. Without a base document nobody knows what changed.
fn sum(
    local: &Element<'_>,
    base: Option<&Element<'_>>,
    remote: &Element<'_>,
    has_base: bool,
) -> Option<Combined> {
    let (l, r) = (number(local)?, number(remote)?);
    let b = match base {
        Some(base) => number(base)?,
        None if has_base => Number::Int(0),
        None => return None,
    };
    if let (Number::Int(l), Number::Int(r), Number::Int(b)) = (l, r, b) {
        let total = i64::try_from(i128::from(l) + i128::from(r) - i128::from(b)).ok()?;
        let narrow = [local.kind, remote.kind] == [0x10, 0x10];
        return Some(match i32::try_from(total) {
            Ok(small) if narrow => Combined::New(0x10, small.to_le_bytes().to_vec()),
            _ => Combined::New(0x12, total.to_le_bytes().to_vec()),
        });
    }
    let total = as_double(l) + as_double(r) - as_double(b);
    total
        .is_finite()
        .then(|| Combined::New(0x01, total.to_le_bytes().to_vec()))
}

/// An item of an array: type byte and bytes.
type Item<'a> = (u8, &'a [u8]);

fn items<'a>(e: &Element<'a>) -> Option<Vec<Item<'a>>> {
    (e.kind == raw::ARRAY).then_some(())?;
    raw::elements(e.value)
        .map(|e| e.ok().map(|e| (e.kind, e.value)))
        .collect()
}

fn array(items: &[Item<'_>]) -> Combined {
    let mut w = Writer::new();
    for (i, (kind, value)) in items.iter().enumerate() {
        w.value(index_name(i), *kind, value);
    }
    Combined::New(raw::ARRAY, w.finish())
}

fn union(
    local: &Element<'_>,
    base: Option<&Element<'_>>,
    remote: &Element<'_>,
) -> Option<Combined> {
    let (l, r) = (items(local)?, items(remote)?);
    let b = base.and_then(items).unwrap_or_default();
    let mut all: Vec<Item<'_>> = Vec::new();
    for item in r.iter().chain(&l) {
        let removed = b.contains(item) && !(l.contains(item) && r.contains(item));
        if !removed && !all.contains(item) {
            all.push(*item);
        }
    }
    Some(array(&all))
}

fn append(
    local: &Element<'_>,
    base: Option<&Element<'_>>,
    remote: &Element<'_>,
) -> Option<Combined> {
    let (mut l, mut r) = (items(local)?, items(remote)?);
    let b = base.and_then(items).unwrap_or_default();
    if !l.starts_with(&b) || !r.starts_with(&b) {
        return None;
    }
    r.extend(l.drain(b.len()..));
    Some(array(&r))
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
