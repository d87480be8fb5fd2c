//! The statements of guarded writes, as the server takes them.

use super::{Stamp, Write};
use crate::content::{self, Diff};
use crate::key::Id;
use crate::raw::{Element, Writer, index_name};

pub(super) fn query(w: &mut Writer, id: &Id) {
    w.open("q")
        .open("_id")
        .value("$eq", id.kind, &id.value)
        .close()
        .close();
}

fn literal(w: &mut Writer, name: &str, e: &Element<'_>) {
    w.open(name).value("$literal", e.kind, e.value).close();
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

/// Raises [`GUARD_FAILED`]. Not a constant, or an optimiser could raise it ahead of time.
pub(crate) fn refusal(w: &mut Writer, name: &str) {
    w.open(name)
        .open("$toInt")
        .open_array("$concat")
        .str("0", "SYNC_MODIFIED_");
    w.open("1")
        .str("$type", "$_id")
        .close()
        .close()
        .close()
        .close();
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

pub(super) fn fields_stage(
    w: &mut Writer,
    id: &Id,
    expect: &[u8],
    new: &[u8],
    (stamp, fence): (Option<Stamp<'_>>, Option<i64>),
) {
    let diff = content::diff(expect, new).unwrap_or_default();
    w.open("0").open("$set");
    let mut first = true;
    for (e, _) in &diff.set {
        w.open(e.name);
        if first {
            w.open_array("$cond");
            timely(w, "0", fence, |w, name| guard(w, name, id, &diff));
            literal(w, "1", e);
            refusal(w, "2");
            w.close();
        } else {
            w.value("$literal", e.kind, e.value);
        }
        w.close();
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
    stamp_fields(w, stamp);
    w.close().close();
}

/// Every field that differs still has the value we saw.
fn guard(w: &mut Writer, name: &str, id: &Id, diff: &Diff<'_>) {
    let path = |e: &Element<'_>| [b"$".as_slice(), e.name].concat();
    w.open(name).open_array("$and");
    let mut n = 0;
    let mut seen_one = false;
    let olds = diff
        .set
        .iter()
        .map(|(e, old)| (e, old.as_ref()))
        .chain(diff.unset.iter().map(|e| (e, Some(e))));
    for (e, old) in olds {
        w.open(index_name(n)).open_array("$eq");
        match old {
            Some(old) => {
                w.bytes_str("0", &path(e));
                literal(w, "1", old);
                seen_one = true;
            }
            None => {
                w.open("0").bytes_str("$type", &path(e)).close();
                w.str("1", "missing");
            }
        }
        w.close().close();
        n += 1;
    }
    if !seen_one {
        // The upsert starts from a bare `_id`: without this a new field would raise a deleted document.
        let mut bare = Writer::new();
        bare.value("_id", id.kind, &id.value);
        w.open(index_name(n)).open_array("$ne").str("0", "$$ROOT");
        literal_doc(w, "1", &bare.finish());
        w.close().close();
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
