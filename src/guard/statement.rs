//! The statements of guarded writes, as the server takes them.

use super::{Stamp, Write};
use crate::content::{self, Diff};
use crate::key::Id;
use crate::raw::{self, Element, Writer, index_name};

/// The query of an update. By `{_id: id}` the server finds the document without planning a query, and
/// the whole update costs it half; `$eq` is for what would mean something else there.
pub(crate) fn query(w: &mut Writer, id: &Id) {
    w.open("q");
    if names_itself(id) {
        w.value("_id", id.kind, &id.value);
    } else {
        w.open("_id").value("$eq", id.kind, &id.value).close();
    }
    w.close();
}

fn names_itself(id: &Id) -> bool {
    match id.kind {
        // Strings, binary, ObjectIds, booleans, dates, integers.
        0x02 | 0x05 | 0x07 | 0x08 | 0x09 | 0x10 | 0x12 => true,
        raw::DOCUMENT => {
            let first = raw::elements(&id.value).next();
            first.is_some_and(|e| e.is_ok_and(|e| !e.name.is_empty() && e.name[0] != b'$'))
        }
        _ => false,
    }
}

/// A value as an expression. The server reads a plain one faster than a `$literal`.
fn literal(w: &mut Writer, name: impl AsRef<[u8]>, e: &Element<'_>) {
    if is_constant(e) {
        w.value(name, e.kind, e.value);
    } else {
        w.open(name).value("$literal", e.kind, e.value).close();
    }
}

/// Whether a value stands for itself in an expression.
fn is_constant(e: &Element<'_>) -> bool {
    match e.kind {
        // Behind its length.
        0x02 => e.value.get(4) != Some(&b'$'),
        // Numbers, binary, ObjectIds, booleans, dates, null.
        0x01 | 0x05 | 0x07 | 0x08 | 0x09 | 0x0A | 0x10 | 0x12 | 0x13 => true,
        _ => false,
    }
}

fn literal_doc(w: &mut Writer, name: &str, doc: &[u8]) {
    w.open(name).doc("$literal", doc).close();
}

/// A condition; with a `fence`, one that raises [`LATE`](super::LATE) past that time of the server.
pub(crate) fn timely(
    w: &mut Writer,
    name: &str,
    fence: Option<i64>,
    condition: impl FnOnce(&mut Writer, &str),
) {
    let Some(fence) = fence else {
        return condition(w, name);
    };
    w.open(name).open_array("$cond");
    w.open("0").open_array("$lt");
    w.str("0", "$$NOW").date("1", fence).close().close();
    condition(w, "1");
    // An `_id` is no array. Not a constant, see [`refusal`].
    w.open("2").str("$size", "$_id").close();
    w.close().close();
}

/// Raises [`GUARD_FAILED`](super::GUARD_FAILED): the name of a type is no number. Not a constant, or an
/// optimiser could raise it ahead of time.
pub(crate) fn refusal(w: &mut Writer, name: &str) {
    w.open(name).open("$toInt").str("$type", "$_id");
    w.close().close();
}

fn stamp_fields(w: &mut Writer, stamp: Option<Stamp<'_>>) {
    if let Some(stamp) = stamp {
        w.str(&stamp.fields.synced_at, "$$NOW");
        literal_str(w, &stamp.fields.origin, stamp.origin);
        literal_str(w, &stamp.fields.sync_status, "synced");
    }
}

fn literal_str(w: &mut Writer, name: &str, value: &str) {
    w.open(name).str("$literal", value).close();
}

/// The document: its `_id`, the content seen, the new one. Without a stamp the sync fields go, too:
/// there is no stamping, and none are named, or the document has no room for them.
pub(super) fn fields_stage(
    w: &mut Writer,
    (id, expect, new): (&Id, &[u8], &[u8]),
    sync_fields: &[String],
    (stamp, fence): (Option<Stamp<'_>>, Option<i64>),
) {
    let diff = content::diff(expect, new).unwrap_or_default();
    w.open("0").open("$set");
    let mut first = true;
    for (e, _) in &diff.set {
        if first {
            w.open(e.name).open_array("$cond");
            timely(w, "0", fence, |w, name| guard(w, name, id, &diff));
            literal(w, "1", e);
            refusal(w, "2");
            w.close().close();
        } else {
            literal(w, e.name, e);
        }
        first = false;
    }
    for e in &diff.unset {
        if first {
            w.open(e.name).open_array("$cond");
            timely(w, "0", fence, |w, name| guard(w, name, id, &diff));
            w.str("1", "$$REMOVE");
            refusal(w, "2");
            w.close().close();
        } else {
            w.str(e.name, "$$REMOVE");
        }
        first = false;
    }
    if stamp.is_none() {
        for name in sync_fields {
            w.str(name, "$$REMOVE");
        }
    }
    stamp_fields(w, stamp);
    w.close().close();
}

/// Every field that differs still has the value we saw.
fn guard(w: &mut Writer, name: &str, id: &Id, diff: &Diff<'_>) {
    let olds: Vec<_> = diff
        .set
        .iter()
        .map(|(e, old)| (e, old.as_ref()))
        .chain(diff.unset.iter().map(|e| (e, Some(e))))
        .collect();
    if let [(e, Some(old))] = olds.as_slice() {
        return as_seen(w, name, e, Some(old));
    }
    w.open(name).open_array("$and");
    for (n, (e, old)) in olds.iter().enumerate() {
        as_seen(w, &index_name(n), e, *old);
    }
    if olds.iter().all(|(_, old)| old.is_none()) {
        // The upsert starts from a bare `_id`: without this a new field would raise a deleted document.
        let mut bare = Writer::new();
        bare.value("_id", id.kind, &id.value);
        w.open(index_name(olds.len()))
            .open_array("$ne")
            .str("0", "$$ROOT");
        literal_doc(w, "1", &bare.finish());
        w.close().close();
    }
    w.close().close();
}

/// The field of `e` has the value `old`, or is missing.
fn as_seen(w: &mut Writer, name: &str, e: &Element<'_>, old: Option<&Element<'_>>) {
    let path = [b"$".as_slice(), e.name].concat();
    w.open(name).open_array("$eq");
    match old {
        Some(old) => {
            w.bytes_str("0", &path);
            literal(w, "1", old);
        }
        None => {
            w.open("0").bytes_str("$type", &path).close();
            w.str("1", "missing");
        }
    }
    w.close().close();
}

pub(super) fn whole_stages(
    w: &mut Writer,
    write: &Write,
    new: &[u8],
    sync_fields: &[String],
    (stamp, fence): (Option<Stamp<'_>>, Option<i64>),
) {
    let mut bare = Writer::new();
    bare.value("_id", write.id.kind, &write.id.value);
    let bare = bare.finish();
    let mut stage = 0;
    if !sync_fields.is_empty() && write.expect.is_some() {
        w.open(index_name(stage)).open_array("$unset");
        for (i, name) in sync_fields.iter().enumerate() {
            w.str(index_name(i), name);
        }
        w.close().close();
        stage += 1;
    }
    w.open(index_name(stage))
        .open("$replaceWith")
        .open_array("$cond");
    timely(w, "0", fence, |w, name| {
        w.open(name).open_array("$eq").str("0", "$$ROOT");
        literal_doc(w, "1", write.expect.as_deref().unwrap_or(&bare));
        w.close().close();
    });
    literal_doc(w, "1", new);
    refusal(w, "2");
    w.close().close().close();
    stage += 1;
    if stamp.is_some() {
        w.open(index_name(stage)).open("$set");
        stamp_fields(w, stamp);
        w.close().close();
    }
}

/// `$$ROOT` without the sync fields, as an expression.
fn stripped_root(w: &mut Writer, name: &str, sync_fields: &[String]) {
    match sync_fields.split_first() {
        None => {
            w.str(name, "$$ROOT");
        }
        Some((first, rest)) => {
            w.open(name).open("$unsetField").str("field", first);
            stripped_root(w, "input", rest);
            w.close().close();
        }
    }
}

pub(super) fn delete_statement(
    w: &mut Writer,
    write: &Write,
    sync_fields: &[String],
    fence: Option<i64>,
) {
    w.open("q")
        .open("_id")
        .value("$eq", write.id.kind, &write.id.value)
        .close();
    match &write.expect {
        Some(expect) => timely(w, "$expr", fence, |w, name| {
            w.open(name).open_array("$eq");
            stripped_root(w, "0", sync_fields);
            literal_doc(w, "1", expect);
            w.close().close();
        }),
        None if fence.is_some() => timely(w, "$expr", fence, |w, name| {
            w.bool(name, true);
        }),
        None => {}
    }
    w.close().i32("limit", 1);
}
