//! Guarded writes: no write overwrites what we haven't seen (R6, R7, R8).
//!
//! A batch of writes to one collection becomes at most three commands: `delete`, `update`, `insert`,
//! each `ordered: false`, each statement a compare-and-set on the server. Creates are plain inserts
//! (the `_id` index is their guard); a change of few fields guards and sends only those; everything
//! else compares and replaces the whole document. Documents that none of these can carry exactly
//! (duplicate names, bodies too large for base and new in one command) go through a
//! transaction that reads, compares bytes and writes, see [`crate::exact`].

mod statement;

use std::borrow::Cow;

use bson::Document;

use crate::config::FieldNames;
use crate::content;
use crate::failure::{Class, Failure, class_of_code};
use crate::key::{Id, Key};
use crate::lease::AT_WORK;
use crate::raw::{self, Writer, index_name};
use crate::side::{Endpoint, MAX_TIME};
use statement::{delete_statement, fields_stage, whole_stages};
pub(crate) use statement::{query, refusal, timely};

/// Most bytes of statements in one command.
const COMMAND_BYTES: usize = 4 << 20;

/// From here on base and new together might not fit a command.
const HUGE: usize = 7 << 20;

/// The server's limit for a document, and nearly that for a command.
const LARGEST: usize = 16 << 20;

/// Bytes of a stamp beside the names of its fields.
const STAMP: usize = 36;

/// The server's `ConversionFailure`: what our guard raises.
const GUARD_FAILED: i32 = 241;

/// `$size` of what is no array: what a statement raises that comes after its fence.
const LATE: i32 = 17124;

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

impl Outcome {
    /// None of them was sent.
    pub(crate) fn unsent(writes: usize, failure: Failure) -> Self {
        Self {
            verdicts: vec![Verdict::Unknown { late: false }; writes],
            failure: Some(failure),
        }
    }
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
    writes: &[(&Write, &Form)],
    sync_fields: &[String],
    stamp: Option<Stamp<'_>>,
) -> Outcome {
    let mut outcome = Outcome {
        verdicts: vec![Verdict::Unknown { late: false }; writes.len()],
        failure: None,
    };
    // What they have locked would keep a write until the server's time is over.
    if let Err(failure) = endpoint.end_leftovers().await {
        outcome.failure = Some(failure);
        return outcome;
    }
    let fence = endpoint.fence();
    // An `insert` can't say up to when it may begin.
    let fenced: Vec<(&Write, &Form)>;
    let writes = match fence {
        Some(_) => {
            fenced = writes
                .iter()
                .map(|(w, f)| (*w, fenced_form(w, f)))
                .collect();
            &fenced
        }
        None => writes,
    };
    let most = endpoint.command_bytes(COMMAND_BYTES);
    for kind in [Kind::Delete, Kind::Update, Kind::Insert] {
        let mut batch = Batch::new(kind, coll, fence);
        for (i, (write, form)) in writes.iter().enumerate() {
            if Kind::of(form) != Some(kind) {
                continue;
            }
            if !batch.has_room(write) {
                let full = std::mem::replace(&mut batch, Batch::new(kind, coll, fence));
                full.send(endpoint, db, &mut outcome).await;
            }
            batch.push(i, write, form, sync_fields, stamp);
            if batch.bytes() >= most {
                let full = std::mem::replace(&mut batch, Batch::new(kind, coll, fence));
                full.send(endpoint, db, &mut outcome).await;
            }
        }
        batch.send(endpoint, db, &mut outcome).await;
    }
    for (i, (write, form)) in writes.iter().enumerate() {
        if **form == Form::Exact && !outcome.failure.as_ref().is_some_and(Failure::is_offline) {
            let (verdict, failure) =
                crate::exact::write(endpoint, (db, coll), write, sync_fields, stamp).await;
            outcome.verdicts[i] = verdict;
            outcome.failure = outcome.failure.or(failure);
        }
    }
    outcome
}

/// The form of a write that has to carry a fence.
fn fenced_form<'a>(write: &Write, form: &'a Form) -> &'a Form {
    match (form, &write.new) {
        (Form::Insert, Some(new)) if new.len() > HUGE || content::has_duplicates(new) => {
            &Form::Exact
        }
        (Form::Insert, _) => &Form::Create,
        (form, _) => form,
    }
}

/// How long the server may work at a command, in ms.
pub(crate) fn max_time(fence: Option<i64>) -> i32 {
    let most = fence.map_or(MAX_TIME, |_| AT_WORK);
    i32::try_from(most.as_millis()).expect("a few seconds")
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Delete,
    Update,
    Insert,
}

impl Kind {
    /// The command and its list.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Delete => ("delete", "deletes"),
            Self::Update => ("update", "updates"),
            Self::Insert => ("insert", "documents"),
        }
    }

    fn of(form: &Form) -> Option<Self> {
        Some(match form {
            Form::Insert => Self::Insert,
            Form::Create | Form::Fields(_) | Form::Whole(_) => Self::Update,
            Form::Delete => Self::Delete,
            Form::Exact => return None,
        })
    }
}

/// The commands of writes to one collection within a transaction, with the number of statements.
pub(crate) fn commands(
    coll: &str,
    writes: &[(&Write, &Form)],
    sync_fields: &[String],
    stamp: Option<Stamp<'_>>,
) -> Vec<(Kind, Writer, usize)> {
    let mut commands = Vec::new();
    for kind in [Kind::Delete, Kind::Update, Kind::Insert] {
        let mut batch = Batch::within_transaction(kind, coll);
        for (i, (write, form)) in writes.iter().enumerate() {
            if Kind::of(form) == Some(kind) {
                if !batch.has_room(write) {
                    let next = Batch::within_transaction(kind, coll);
                    let full = std::mem::replace(&mut batch, next);
                    commands.push((kind, full.w, full.order.len()));
                }
                batch.push(i, write, form, sync_fields, stamp);
                if batch.bytes() >= COMMAND_BYTES {
                    let next = Batch::within_transaction(kind, coll);
                    let full = std::mem::replace(&mut batch, next);
                    commands.push((kind, full.w, full.order.len()));
                }
            }
        }
        if !batch.order.is_empty() {
            commands.push((kind, batch.w, batch.order.len()));
        }
    }
    commands
}

struct Batch {
    kind: Kind,
    w: Writer,
    /// Index of each statement's write.
    order: Vec<usize>,
    /// Up to when the statements may begin. None within a transaction, which is fenced as a whole.
    fence: Option<i64>,
}

impl Batch {
    fn within_transaction(kind: Kind, coll: &str) -> Self {
        let (verb, list) = kind.words();
        let mut w = Writer::new();
        w.str(verb, coll).bool("ordered", true).open_array(list);
        Self {
            kind,
            w,
            order: vec![],
            fence: None,
        }
    }

    fn new(kind: Kind, coll: &str, fence: Option<i64>) -> Self {
        let mut w = Writer::new();
        let (verb, list) = kind.words();
        w.str(verb, coll).bool("ordered", false);
        w.i32("maxTimeMS", max_time(fence));
        w.open("writeConcern").str("w", "majority").close();
        w.open_array(list);
        Self {
            kind,
            w,
            order: vec![],
            fence,
        }
    }

    fn bytes(&self) -> usize {
        self.w.len()
    }

    /// Whether a write still fits the command; the first one always goes.
    fn has_room(&self, write: &Write) -> bool {
        let len = |d: &Option<Vec<u8>>| d.as_ref().map_or(0, Vec::len);
        self.order.is_empty() || self.bytes() + len(&write.expect) + len(&write.new) < LARGEST
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
        let stamp = write.new.as_deref().and_then(|new| fitting(new, stamp));
        self.order.push(i);
        match (form, &write.new) {
            (Form::Insert, Some(new)) => {
                self.w.doc(name, &stamped(new, stamp));
            }
            (Form::Delete, _) => {
                self.w.open(name);
                delete_statement(&mut self.w, write, sync_fields, self.fence);
                self.w.close();
            }
            (_, Some(new)) => {
                self.w.open(name);
                query(&mut self.w, &write.id);
                self.w.open_array("u");
                match (form, &write.expect) {
                    (Form::Fields(_), Some(expect)) => {
                        let with = (stamp, self.fence);
                        let document = (&write.id, expect.as_slice(), new.as_slice());
                        fields_stage(&mut self.w, document, sync_fields, with)
                    }
                    _ => {
                        let with = (stamp, self.fence);
                        whole_stages(&mut self.w, write, new, sync_fields, with)
                    }
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
                let (mut errors, mut late) = (0, false);
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
                    late |= e.get_i32("code").is_ok_and(|code| code == LATE);
                    errors += 1;
                }
                if let Some(lease) = endpoint.lease.get().filter(|_| late) {
                    lease.was_late(endpoint.side);
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
        // Not written, and what is there was not even looked at.
        LATE => Verdict::Unknown { late: false },
        _ if class_of_code(code) == Class::Transient => Verdict::Unknown { late: false },
        _ => Verdict::Rejected {
            code,
            message: e.get_str("errmsg").unwrap_or("refused").to_owned(),
        },
    }
}

/// The stamp, if a document of that content has room for it; otherwise it goes without.
fn fitting<'a>(content: &[u8], stamp: Option<Stamp<'a>>) -> Option<Stamp<'a>> {
    stamp.filter(|stamp| {
        let f = stamp.fields;
        let names = f.synced_at.len() + f.origin.len() + f.sync_status.len();
        content.len() + names + STAMP <= LARGEST
    })
}

/// A content with the sync fields at its end, if they have room there.
pub fn stamped<'a>(content: &'a [u8], stamp: Option<Stamp<'_>>) -> Cow<'a, [u8]> {
    let Some(stamp) = fitting(content, stamp) else {
        return content.into();
    };
    let mut w = Writer::new();
    for e in raw::elements(content).map_while(Result::ok) {
        w.whole(e.whole);
    }
    w.date(&stamp.fields.synced_at, stamp.server_now)
        .str(&stamp.fields.origin, stamp.origin)
        .str(&stamp.fields.sync_status, "synced");
    w.finish().into()
}

#[cfg(test)]
#[path = "guard_tests.rs"]
mod tests;
