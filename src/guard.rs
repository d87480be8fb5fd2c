//! Guarded writes: no write overwrites what we haven't seen (R6, R7, R8).
//!
//! A batch of writes to one collection becomes at most three commands: `delete`, `update`, `insert`,
//! each `ordered: false`, each statement a compare-and-set on the server. Creates are plain inserts
//! (the `_id` index is their guard); a change of few fields guards and sends only those; everything
//! else compares and replaces the whole document. Documents that none of these can carry exactly
//! (duplicate names, bodies too large for base and new in one command) go through a
//! transaction that reads, compares bytes and writes, see [`crate::exact`].

use bson::Document;

use crate::config::FieldNames;
use crate::content::{self, Diff};
use crate::failure::{Class, Failure, class_of_code};
use crate::key::{Id, Key};
use crate::raw::{self, Element, Writer, index_name};
use crate::side::{Endpoint, MAX_TIME};

/// Most bytes of statements in one command.
const COMMAND_BYTES: usize = 4 << 20;

/// From here on base and new together might not fit a command.
const HUGE: usize = 7 << 20;

/// The server's `ConversionFailure`: what our guard raises.
const GUARD_FAILED: i32 = 241;

/// One document to be brought from what we have seen to what it shall be.
#[derive(Clone, Debug, PartialEq)]
pub struct Write {
    /// Which document.
    pub key: Key,
    /// Its `_id`.
    pub id: Id,
    /// The content we believe is there; `None`: no such document.
    pub expect: Option<Vec<u8>>,
    /// The content it shall have; `None`: deleted.
    pub new: Option<Vec<u8>>,
}

/// The sync fields that go with a content (see the design, section 4).
#[derive(Clone, Copy, Debug)]
pub struct Stamp<'a> {
    /// Their names.
    pub fields: &'a FieldNames,
    /// `local` or `remote`: where the content comes from.
    pub origin: &'static str,
    /// The server's clock as we know it, ms since 1970; for inserts, which can't say `$$NOW`.
    pub server_now: i64,
}

/// How a write is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// `insert`.
    Insert,
    /// An upsert by pipeline: `insert` would fill in a top-level `Timestamp(0, 0)`.
    Create,
    /// Guard and set these top-level fields.
    Fields(Vec<Vec<u8>>),
    /// Compare and replace the whole document; the names of the fields that differ.
    Whole(Vec<Vec<u8>>),
    /// `delete`.
    Delete,
    /// A transaction of its own.
    Exact,
}

impl Form {
    /// Names of the fields written, where a landed write can be told by them alone.
    pub fn fields(&self) -> Option<&[Vec<u8>]> {
        match self {
            Self::Fields(names) | Self::Whole(names) if !names.is_empty() => Some(names),
            _ => None,
        }
    }
}

/// What became of one write.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// It is there, acknowledged by a majority.
    Done,
    /// The document is not what we believed; nothing was written.
    Modified,
    /// A unique index other than `_id` stands in the way; nothing was written.
    Duplicate(Box<Duplicate>),
    /// The server refuses the document; nothing was written.
    Rejected {
        /// The server's code.
        code: i32,
        /// The server's words; may contain values, so only for `conflict_logs` (R23).
        message: String,
    },
    /// It may have happened. `late`: it may even happen from now on (R4).
    Unknown {
        /// No answer came.
        late: bool,
    },
}

/// A violated unique index, from the write error.
#[derive(Clone, Debug, PartialEq)]
pub struct Duplicate {
    /// The index's keys.
    pub pattern: Document,
    /// The values in the way, under those names; collation keys where the index has a collation.
    pub value: Document,
    /// The index's collation, if it has one.
    pub collation: Option<Document>,
}

/// Verdicts in the order of the writes, and what went wrong on the way.
#[derive(Debug)]
pub struct Outcome {
    /// One for each write.
    pub verdicts: Vec<Verdict>,
    /// The failure behind `Unknown` verdicts.
    pub failure: Option<Failure>,
}

/// Chooses the form of a write. With `sync_fields` the documents there may hold more than the content.
pub fn form(write: &Write, sync_fields: &[String]) -> Form {
    let (expect, new) = match (&write.expect, &write.new) {
        (None, None) => return Form::Delete,
        (None, Some(new)) => {
            return if has_zero_timestamp(new) {
                Form::Create
            } else {
                Form::Insert
            };
        }
        (Some(expect), None) if !sync_fields.is_empty() && content::has_duplicates(expect) => {
            return Form::Exact;
        }
        (Some(expect), None) if expect.len() > HUGE => return Form::Exact,
        (Some(_), None) => return Form::Delete,
        (Some(expect), Some(new)) => (expect, new),
    };
    // Not by pipeline: working out the difference for its oplog, a server (seen on 6.0.5) takes two
    // fields of one name for a broken invariant and aborts.
    if content::has_duplicates(expect) || content::has_duplicates(new) {
        return Form::Exact;
    }
    let Ok(diff) = content::diff(expect, new) else {
        return Form::Exact;
    };
    let names: Vec<_> = diff.names().map(<[u8]>::to_vec).collect();
    let by_field = !names.is_empty()
        && raw::elements(expect).count() > 1
        && names.iter().all(|n| is_plain(n))
        && content::apply(expect, &diff) == *new;
    let field_bytes = content::size(&diff) + names.iter().map(|n| n.len() + 60).sum::<usize>();
    if by_field && field_bytes < expect.len() + new.len() + 60 {
        return if field_bytes > 2 * HUGE {
            Form::Exact
        } else {
            Form::Fields(names)
        };
    }
    if expect.len() + new.len() < 2 * HUGE {
        Form::Whole(names)
    } else {
        Form::Exact
    }
}

/// A name that `$set` and `$name` paths take literally.
fn is_plain(name: &[u8]) -> bool {
    !name.is_empty()
        && name != b"_id"
        && name[0] != b'$'
        && !name.contains(&b'.')
        && std::str::from_utf8(name).is_ok()
}

fn has_zero_timestamp(doc: &[u8]) -> bool {
    raw::elements(doc)
        .flatten()
        .any(|e| e.kind == 0x11 && e.value.iter().all(|b| *b == 0))
}

/// Carries out writes to one collection; see the module's text. The forms are those of [`form`].
pub async fn write(
    endpoint: &Endpoint,
    (db, coll): (&str, &str),
    writes: &[(Write, Form)],
    sync_fields: &[String],
    stamp: Option<Stamp<'_>>,
) -> Outcome {
    let mut outcome = Outcome {
        verdicts: vec![Verdict::Unknown { late: false }; writes.len()],
        failure: None,
    };
    for kind in [Kind::Delete, Kind::Update, Kind::Insert] {
        let mut batch = Batch::new(kind, coll);
        for (i, (write, form)) in writes.iter().enumerate() {
            if Kind::of(form) != Some(kind) {
                continue;
            }
            batch.push(i, write, form, sync_fields, stamp);
            if batch.bytes() >= COMMAND_BYTES {
                let full = std::mem::replace(&mut batch, Batch::new(kind, coll));
                full.send(endpoint, db, &mut outcome).await;
            }
        }
        batch.send(endpoint, db, &mut outcome).await;
    }
    for (i, (write, form)) in writes.iter().enumerate() {
        if *form == Form::Exact && !outcome.failure.as_ref().is_some_and(Failure::is_offline) {
            let (verdict, failure) =
                crate::exact::write(endpoint, (db, coll), write, sync_fields, stamp).await;
            outcome.verdicts[i] = verdict;
            outcome.failure = outcome.failure.or(failure);
        }
    }
    outcome
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Delete,
    Update,
    Insert,
}

impl Kind {
    fn of(form: &Form) -> Option<Self> {
        Some(match form {
            Form::Insert => Self::Insert,
            Form::Create | Form::Fields(_) | Form::Whole(_) => Self::Update,
            Form::Delete => Self::Delete,
            Form::Exact => return None,
        })
    }
}

struct Batch {
    kind: Kind,
    w: Writer,
    /// Index of each statement's write.
    order: Vec<usize>,
}

impl Batch {
    fn new(kind: Kind, coll: &str) -> Self {
        let mut w = Writer::new();
        let (verb, list) = match kind {
            Kind::Delete => ("delete", "deletes"),
            Kind::Update => ("update", "updates"),
            Kind::Insert => ("insert", "documents"),
        };
        w.str(verb, coll).bool("ordered", false);
        w.i32(
            "maxTimeMS",
            i32::try_from(MAX_TIME.as_millis()).expect("a few seconds"),
        );
        w.open("writeConcern").str("w", "majority").close();
        w.open_array(list);
        Self {
            kind,
            w,
            order: vec![],
        }
    }

    fn bytes(&self) -> usize {
        self.w.len()
    }

    fn push(
        &mut self,
        i: usize,
        write: &Write,
        form: &Form,
        sync_fields: &[String],
        stamp: Option<Stamp<'_>>,
    ) {
        let name = index_name(self.order.len());
        self.order.push(i);
        match (form, &write.new) {
            (Form::Insert, Some(new)) => {
                self.w.doc(name, &stamped(new, stamp));
            }
            (Form::Delete, _) => {
                self.w.open(name);
                delete_statement(&mut self.w, write, sync_fields);
                self.w.close();
            }
            (_, Some(new)) => {
                self.w.open(name);
                query(&mut self.w, &write.id);
                self.w.open_array("u");
                match (form, &write.expect) {
                    (Form::Fields(_), Some(expect)) => {
                        fields_stage(&mut self.w, &write.id, expect, new, stamp)
                    }
                    _ => whole_stages(&mut self.w, write, new, sync_fields, stamp),
                }
                self.w.close().bool("upsert", true).close();
            }
            // `form` answers Delete for every write without a new content.
            (_, None) => unreachable!("a deletion has the form Delete"),
        }
    }

    async fn send(self, endpoint: &Endpoint, db: &str, outcome: &mut Outcome) {
        if self.order.is_empty() {
            return;
        }
        if let Some(failure) = &outcome.failure
            && failure.is_offline()
        {
            // Not sent at all: nothing can land later.
            return;
        }
        match endpoint.run(db, self.w.command()).await {
            Ok(reply) => {
                let majority = !reply.contains_key("writeConcernError");
                let n = reply.get_i32("n").unwrap_or(0);
                for i in &self.order {
                    outcome.verdicts[*i] = if majority {
                        Verdict::Done
                    } else {
                        Verdict::Unknown { late: false }
                    };
                }
                let mut errors = 0;
                for e in reply
                    .get_array("writeErrors")
                    .map(Vec::as_slice)
                    .unwrap_or_default()
                {
                    let Some(e) = e.as_document() else { continue };
                    let Some(i) = e
                        .get_i32("index")
                        .ok()
                        .and_then(|i| self.order.get(usize::try_from(i).ok()?))
                    else {
                        continue;
                    };
                    outcome.verdicts[*i] = verdict_of(e);
                    errors += 1;
                }
                if self.kind == Kind::Delete
                    && n + errors < i32::try_from(self.order.len()).unwrap_or(i32::MAX)
                {
                    // Some were not there as we believed; the reply does not say which (R8).
                    for i in &self.order {
                        if outcome.verdicts[*i] == Verdict::Done {
                            outcome.verdicts[*i] = Verdict::Unknown { late: false };
                        }
                    }
                }
            }
            Err(failure) => {
                for i in &self.order {
                    outcome.verdicts[*i] = match failure.class {
                        Class::Rejected => Verdict::Rejected {
                            code: failure.code.unwrap_or(0),
                            message: failure.what.clone(),
                        },
                        _ => Verdict::Unknown {
                            late: !failure.answered,
                        },
                    };
                }
                outcome.failure = Some(failure);
            }
        }
    }
}

/// A write error of the server as a verdict.
pub fn verdict_of(e: &Document) -> Verdict {
    let code = e.get_i32("code").unwrap_or(0);
    match code {
        GUARD_FAILED => Verdict::Modified,
        11000 | 11001 => {
            let pattern = e.get_document("keyPattern").cloned().unwrap_or_default();
            if pattern.len() == 1 && pattern.contains_key("_id") {
                return Verdict::Modified;
            }
            Verdict::Duplicate(Box::new(Duplicate {
                pattern,
                value: e.get_document("keyValue").cloned().unwrap_or_default(),
                collation: e.get_document("collation").cloned().ok(),
            }))
        }
        _ if class_of_code(code) == Class::Transient => Verdict::Unknown { late: false },
        _ => Verdict::Rejected {
            code,
            message: e.get_str("errmsg").unwrap_or("refused").to_owned(),
        },
    }
}

/// A content with the sync fields at its end.
pub fn stamped(content: &[u8], stamp: Option<Stamp<'_>>) -> Vec<u8> {
    let Some(stamp) = stamp else {
        return content.to_vec();
    };
    let mut w = Writer::new();
    for e in raw::elements(content).map_while(Result::ok) {
        w.whole(e.whole);
    }
    w.date(&stamp.fields.synced_at, stamp.server_now)
        .str(&stamp.fields.origin, stamp.origin)
        .str(&stamp.fields.sync_status, "synced");
    w.finish()
}

fn query(w: &mut Writer, id: &Id) {
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

fn fields_stage(w: &mut Writer, id: &Id, expect: &[u8], new: &[u8], stamp: Option<Stamp<'_>>) {
    let diff = content::diff(expect, new).unwrap_or_default();
    w.open("0").open("$set");
    let mut first = true;
    for (e, _) in &diff.set {
        w.open(e.name);
        if first {
            w.open_array("$cond");
            guard(w, "0", id, &diff);
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
            guard(w, "0", id, &diff);
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

fn whole_stages(
    w: &mut Writer,
    write: &Write,
    new: &[u8],
    sync_fields: &[String],
    stamp: Option<Stamp<'_>>,
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
    w.open("0").open_array("$eq").str("0", "$$ROOT");
    literal_doc(w, "1", write.expect.as_deref().unwrap_or(&bare));
    w.close().close();
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

fn delete_statement(w: &mut Writer, write: &Write, sync_fields: &[String]) {
    w.open("q")
        .open("_id")
        .value("$eq", write.id.kind, &write.id.value)
        .close();
    if let Some(expect) = &write.expect {
        w.open("$expr").open_array("$eq");
        stripped_root(w, "0", sync_fields);
        literal_doc(w, "1", expect);
        w.close().close();
    }
    w.close().i32("limit", 1);
}

#[cfg(test)]
#[path = "guard_tests.rs"]
mod tests;
