//! Documents that a side lets go of by itself: expired by a TTL index, or pushed out of a capped
//! collection (R15).
//!
//! That is nobody's deletion, so it is not carried over. An event does not say why a document was
//! deleted. So: in a capped collection every deletion counts as an eviction; under a TTL index one
//! that came when the document was due, by the date in base and the time of the event, counts as
//! expiry, unless it was part of a transaction, which the server's own deletions never are. Base keeps
//! such a document with a mark for the side that let go of it. While the other side leaves it as base
//! has it, nothing is done; once that changes it, it is new to the side that let go.

use std::collections::HashSet;

use crate::decide::{Side, View};
use crate::key::Key;
use crate::raw::{self, ARRAY, DOCUMENT};
use crate::schema::{Ttl, Volatile};
use crate::shared::Shared;
use crate::store::base;
use crate::store::intents;
use crate::store::queue::{self, Change};

/// BSON type byte of a date.
const DATE: u8 = 0x09;

/// An event's time is in whole seconds, so a document may seem to have gone a second too soon.
const GRACE_MS: i64 = 1000;

/// Whether a document with this content goes by itself, at a time in ms since 1970.
pub fn goes_by_itself(volatile: &Volatile, content: &[u8], at: i64) -> bool {
    volatile.capped
        || volatile
            .ttl
            .iter()
            .any(|ttl| due(content, ttl).is_some_and(|due| due <= at.saturating_add(GRACE_MS)))
}

/// When a document is due, ms since 1970: the earliest date under the field.
fn due(content: &[u8], ttl: &Ttl) -> Option<i64> {
    let mut earliest = None;
    dates(content, &ttl.field, &mut |at| {
        earliest = Some(earliest.map_or(at, |e: i64| e.min(at)));
    });
    Some(earliest?.saturating_add(ttl.seconds.saturating_mul(1000)))
}

/// The dates under a path, arrays on the way and at its end included.
fn dates(document: &[u8], path: &str, each: &mut impl FnMut(i64)) {
    let (name, rest) = match path.split_once('.') {
        Some((name, rest)) => (name, Some(rest)),
        None => (path, None),
    };
    let Some(found) = raw::get(document, name.as_bytes()) else {
        return;
    };
    match (found.kind, rest) {
        (DATE, None) => each(millis(found.value)),
        (DOCUMENT, Some(rest)) => dates(found.value, rest, each),
        (ARRAY, rest) => {
            for item in raw::elements(found.value).map_while(Result::ok) {
                match (item.kind, rest) {
                    (DATE, None) => each(millis(item.value)),
                    (DOCUMENT, Some(rest)) => dates(item.value, rest, each),
                    _ => {}
                }
            }
        }
        _ => {}
    }
}

fn millis(value: &[u8]) -> i64 {
    value.try_into().map_or(i64::MAX, i64::from_le_bytes)
}

/// A deletion on a side, as an event told it: marks base if the document went by itself, and whether
/// it did.
fn deleted(
    c: &rusqlite::Connection,
    (side, key): (Side, &Key),
    volatile: &Volatile,
    at: i64,
) -> rusqlite::Result<bool> {
    let (content, left) = base::get_marked(c, key)?;
    let by_itself = content
        .as_deref()
        .is_some_and(|content| goes_by_itself(volatile, content, at));
    match (by_itself, left) {
        // Gone from both by itself: nobody needs to know of it any more.
        (true, Some(other)) if other != side => base::put(c, key, None)?,
        (true, _) => base::mark_left(c, key, Some(side))?,
        (false, Some(marked)) if marked == side => base::mark_left(c, key, None)?,
        (false, _) => {}
    }
    Ok(by_itself)
}

/// What is left of changes once those are taken out that tell of nothing but a document that went by
/// itself. `gone` are deletions where that may be: index of the change, how documents go, when it was.
pub(crate) fn without_expired(
    c: &rusqlite::Connection,
    side: Side,
    changes: Vec<Change>,
    gone: &[(usize, Volatile, i64)],
) -> rusqlite::Result<Vec<Change>> {
    if gone.is_empty() {
        return Ok(changes);
    }
    let mut expired = HashSet::new();
    for (at, volatile, when) in gone {
        let key = &changes[*at].key;
        let waits = queue::get_row(c, side, key)?.is_some() || intents::is_open(c, key)?;
        if deleted(c, (side, key), volatile, *when)? && !waits {
            expired.insert(key.clone());
        }
    }
    // A document that was changed, too, is looked at.
    let alone = |key: &Key| changes.iter().filter(|c| c.key == *key).count() == 1;
    expired.retain(alone);
    Ok(changes
        .into_iter()
        .filter(|change| !expired.contains(&change.key))
        .collect())
}

/// Whether a document that differs is to stay so: the marked side let go of it by itself, and the other
/// side has left it as it was.
pub(crate) fn is_at_rest(left: Option<Side>, view: View<'_>) -> bool {
    match left {
        None => false,
        Some(Side::Local) => view.local.is_none() && view.remote == view.base,
        Some(Side::Remote) => view.remote.is_none() && view.local == view.base,
    }
}

/// Whether a side that lacks a document let go of it by itself, so that nothing is to be done while
/// the other side leaves it as it is. What went while nobody watched (the history was lost) is judged
/// by the present time.
pub(crate) fn is_left(
    c: &rusqlite::Connection,
    shared: &Shared,
    key: &Key,
    side: Side,
) -> rusqlite::Result<bool> {
    let (content, left) = base::get_marked(c, key)?;
    if left == Some(side) {
        return Ok(true);
    }
    let (Some(volatile), Some(content)) = (shared.schema.volatile(side, key.ns()), content) else {
        return Ok(false);
    };
    // A row means that its event was seen, and told otherwise.
    if queue::get_row(c, side, key)?.is_some() {
        return Ok(false);
    }
    let now = chrono::Utc::now().timestamp_millis() + shared.offset(side);
    let by_itself = goes_by_itself(&volatile, &content, now);
    if by_itself {
        base::mark_left(c, key, Some(side))?;
    }
    Ok(by_itself)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::{DateTime, Document, doc};

    fn due_at(content: Document, field: &str) -> Option<i64> {
        let ttl = Ttl {
            field: field.into(),
            seconds: 10,
        };
        due(&content.to_vec().unwrap(), &ttl)
    }

    #[test]
    fn the_earliest_date_counts() {
        let at = DateTime::from_millis;
        assert_eq!(due_at(doc! {"at": at(5000)}, "at"), Some(15_000));
        assert_eq!(
            due_at(doc! {"at": [at(9000), 1, at(7000)]}, "at"),
            Some(17_000)
        );
        let nested = doc! {"a": [{"b": {"c": at(3)}}, {"b": {"c": at(1)}}, {"b": 1}]};
        assert_eq!(due_at(nested, "a.b.c"), Some(10_001));
        for none in [
            doc! {},
            doc! {"at": 1},
            doc! {"at": "2020-01-01"},
            doc! {"at": {"x": at(1)}},
        ] {
            assert_eq!(due_at(none, "at"), None);
        }
    }

    #[test]
    fn only_what_is_due_goes_by_itself() {
        let volatile = |capped| Volatile {
            ttl: vec![Ttl {
                field: "at".into(),
                seconds: 10,
            }],
            capped,
        };
        let content = doc! {"at": DateTime::from_millis(5000)}.to_vec().unwrap();
        assert!(!goes_by_itself(&volatile(false), &content, 13_000));
        assert!(goes_by_itself(&volatile(false), &content, 15_000));
        assert!(goes_by_itself(&volatile(true), &content, 0));
    }
}
