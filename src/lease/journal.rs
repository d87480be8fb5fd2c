//! The journal: what the holder of the lease knows and others would need, put down in the local database.
//!
//! A base of its own is not enough for a daemon that takes over: it settles a document when it sees both
//! sides equal, and of a document that both sides edit all the time, or with no link to the remote, it
//! never does. So before the holder writes documents it puts down, in one note, base and intent of each;
//! and afterwards, with the next note or a moment later, what became of them. Who stands by keeps its own
//! base up with that ([`heir`](super::heir)), and to the next holder whatever is left open is what an
//! intent is to a daemon that starts again (R3).
//!
//! Notes are numbered within a term. The first of a term repeats what is open of those before, so that the
//! others need not look any further back.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bson::spec::BinarySubtype;
use bson::{Binary, DateTime, Document, doc};

use super::entry::{self, Entry, Place, Run};
use super::{COLLECTION, Lease};
use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::key::{Id, Key, KeyMap, KeySet};
use crate::settle::store_failed;
use crate::shared::{Shared, lock};
use crate::store::{base, intents, queue, records, sent};

/// Bytes of entries in one note, before they are packed.
const NOTE_BYTES: usize = 4 << 20;

/// Bytes of notes in one command.
const COMMAND_BYTES: usize = 16 << 20;

/// Most documents whose new base is told at once.
const TOLD: usize = 1000;

/// What this daemon has put down, and has to.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    open: Mutex<Open>,
    /// From the take-over until all that was left is settled.
    inherited: AtomicBool,
}

#[derive(Debug, Default)]
struct Open {
    /// The term that is written for, and the number of its next note.
    term: Option<(i64, i64)>,
    /// Where the last entry of a document stands whose outcome is not known yet, and whether there is a
    /// record with it.
    undecided: KeyMap<(Place, bool)>,
    /// Outcomes that are told once the record is in the database: until then others have to see to it.
    unrecorded: Vec<(Place, bool)>,
    /// Outcomes that are not put down yet.
    outcomes: Vec<Run>,
    /// Documents whose base has changed without an entry, and when it did, by `changes`.
    told: KeyMap<(Id, u64)>,
    changes: u64,
}

impl Open {
    /// Whether base of a document has not changed again since this was made.
    fn is_as_told(&self, key: &Key, entry: &Entry) -> bool {
        self.told.get(key).is_some_and(|(_, n)| *n == entry.change)
    }
}

/// A note on its way.
struct Note {
    n: i64,
    document: Document,
    bytes: usize,
}

impl Journal {
    /// Whether anything of the last holder may be unsettled: both sides are to be read then.
    pub(crate) fn inherits(&self) -> bool {
        self.inherited.load(Ordering::Acquire)
    }

    /// From now on something may be unsettled, or nothing is any more.
    pub(super) fn set_inherits(&self, inherits: bool) {
        self.inherited.store(inherits, Ordering::Release);
    }

    /// A term begins; `unbroken`: nobody else has worked since the last one of ours.
    pub(super) fn begin(&self, epoch: i64, unbroken: bool) {
        let mut open = lock(&self.open);
        if !unbroken {
            *open = Open::default();
        }
        open.term = Some((epoch, 0));
    }

    /// The term is over.
    pub(super) fn end(&self) {
        lock(&self.open).term = None;
        self.set_inherits(false);
    }

    /// What became of a write, once that is in the store.
    pub(crate) fn decided(&self, key: &Key, done: bool) {
        let mut open = lock(&self.open);
        match open.undecided.remove(key) {
            Some((place, true)) => open.unrecorded.push((place, done)),
            Some((place, false)) => Run::add(&mut open.outcomes, place, done),
            None => {}
        }
    }

    /// How many outcomes wait for their records.
    pub(crate) fn unrecorded(&self) -> usize {
        lock(&self.open).unrecorded.len()
    }

    /// The records of so many outcomes are in the database.
    pub(crate) fn recorded(&self, count: usize) {
        let mut open = lock(&self.open);
        let count = count.min(open.unrecorded.len());
        let told: Vec<_> = open.unrecorded.drain(..count).collect();
        for (place, done) in told {
            Run::add(&mut open.outcomes, place, done);
        }
    }

    /// Nothing of what was undecided ever will be: base stays as it is.
    pub(crate) fn forgotten(&self) {
        let mut open = lock(&self.open);
        let places: Vec<Place> = open
            .undecided
            .drain()
            .map(|(_, (place, _))| place)
            .collect();
        for place in places {
            Run::add(&mut open.outcomes, place, false);
        }
    }

    /// Base of a document has changed without an entry. The number of the change.
    pub(crate) fn tell(&self, key: &Key, id: &Id) -> u64 {
        let mut open = lock(&self.open);
        open.changes += 1;
        let change = open.changes;
        if open.term.is_some() {
            open.told.insert(key.clone(), (id.clone(), change));
        }
        change
    }

    /// The first place whose outcome is not put down.
    pub(super) fn first_open(&self) -> Option<(i64, i64)> {
        let open = lock(&self.open);
        let undecided = open.undecided.values().chain(&open.unrecorded);
        let undecided = undecided.map(|(place, _)| (place.epoch, place.n));
        let untold = open.outcomes.iter().map(|run| (run.epoch, run.n));
        undecided.chain(untold).min()
    }
}

/// Makes notes of entries: numbers them, and remembers which outcomes are owed. The outcomes that are
/// known go with the first.
fn notes(
    shared: &Shared,
    lease: &Lease,
    entries: &[(Key, Entry)],
    closes: bool,
) -> Result<Vec<Note>, Failure> {
    let Some((_, now)) = lease.term_and_time() else {
        return Err(Failure::standby());
    };
    let mut by_ns: BTreeMap<u32, Vec<&(Key, Entry)>> = BTreeMap::new();
    for entry in entries {
        by_ns.entry(entry.0.ns()).or_default().push(entry);
    }
    let mut parts: Vec<(u32, Vec<&(Key, Entry)>)> = Vec::new();
    for (ns, all) in by_ns {
        let mut bytes = NOTE_BYTES;
        for entry in all {
            match parts.last_mut() {
                Some((_, part)) if bytes < NOTE_BYTES => part.push(entry),
                _ => {
                    bytes = 0;
                    parts.push((ns, vec![entry]));
                }
            }
            bytes += entry.1.bytes();
        }
    }
    let packed: Vec<_> = parts
        .iter()
        .map(|(_, part)| entry::pack(part.iter().map(|(_, entry)| entry)))
        .collect();
    let mut open = lock(&lease.journal.open);
    let Some((epoch, first)) = open.term else {
        return Err(Failure::standby());
    };
    let told = |(key, entry): &(Key, Entry)| entry.intent.is_some() || open.is_as_told(key, entry);
    if !entries.iter().all(told) {
        // What was announced meanwhile says more: all of it is read again.
        return Err(Failure::standby());
    }
    let mut notes = Vec::with_capacity(parts.len() + 1);
    let mut next = first;
    let mut empty = || {
        let n = next;
        next += 1;
        let document = doc! {
            "_id": id_of(lease, (epoch, n)), "of": &lease.pair, "by": &lease.me,
            "at": DateTime::from_millis(now), "epoch": epoch, "n": n, "count": 0_i32,
        };
        Note {
            n,
            document,
            bytes: 300,
        }
    };
    for ((ns, part), packed) in parts.iter().zip(packed) {
        let Some((db, coll)) = shared.store.namespace_name(*ns) else {
            continue;
        };
        let mut note = empty();
        note.bytes += packed.len();
        let count = i32::try_from(part.len()).unwrap_or(i32::MAX);
        note.document.insert("count", count);
        note.document.extend(doc! {"db": db, "coll": coll});
        note.document.insert("entries", binary(packed));
        for (at, (key, entry)) in (0..).zip(part) {
            let n = note.n;
            let place = Place { epoch, n, at };
            if entry.intent.is_none() {
                // There is nothing to decide: base is as it says.
                Run::add(&mut open.outcomes, place, false);
                continue;
            }
            open.told.remove(key);
            let owed = (place, entry.record.is_some());
            if let Some((old, _)) = open.undecided.insert(key.clone(), owed) {
                // Whatever became of it, this entry says more.
                Run::add(&mut open.outcomes, old, false);
            }
        }
        notes.push(note);
    }
    if notes.is_empty() && (closes || !open.outcomes.is_empty()) {
        notes.push(empty());
    }
    open.term = Some((epoch, next));
    let outcomes = std::mem::take(&mut open.outcomes);
    if let Some(first) = notes.first_mut() {
        first.bytes += outcomes.len() * Run::BYTES;
        first
            .document
            .insert("outcomes", binary(Run::pack(&outcomes)));
    }
    if let Some(last) = notes.last_mut().filter(|_| closes) {
        last.document.insert("closes", true);
    }
    Ok(notes)
}

fn binary(bytes: Vec<u8>) -> Binary {
    Binary {
        subtype: BinarySubtype::Generic,
        bytes,
    }
}

/// `_id` of a note: they sort by term and number, which is -1 before the first.
pub(super) fn id_of(lease: &Lease, (epoch, n): (i64, i64)) -> String {
    format!("note:{}:{epoch:016x}:{:016x}", lease.pair, n + 1)
}

/// Puts notes down, acknowledged by a majority. After a failure nothing of them may be sent; it says
/// nothing of the side that was to be written to.
async fn put(lease: &Lease, notes: Vec<Note>) -> Result<(), Failure> {
    let Some(local) = lease.local.upgrade() else {
        return Err(Failure::standby());
    };
    let mut outcome = Ok(());
    let mut waiting = notes.iter().peekable();
    while outcome.is_ok() && waiting.peek().is_some() {
        let (mut some, mut bytes) = (Vec::new(), 0);
        while let Some(note) =
            waiting.next_if(|note| some.is_empty() || bytes + note.bytes < COMMAND_BYTES)
        {
            bytes += note.bytes;
            some.push(note.document.clone());
        }
        let command = doc! {
            "insert": COLLECTION, "documents": some, "maxTimeMS": 10_000,
            "writeConcern": {"w": "majority", "wtimeout": 10_000},
        };
        let reply = local.run_doc(&lease.db, command).await;
        outcome = match reply {
            Ok(reply)
                if reply.contains_key("writeErrors") || reply.contains_key("writeConcernError") =>
            {
                let what = "what is to be written can't be put down";
                Err(Failure::from_code(64, what).of(Side::Local))
            }
            Ok(_) => Ok(()),
            Err(failure) => Err(Failure {
                class: Class::Transient,
                answered: true,
                ..failure
            }),
        };
    }
    if outcome.is_err() {
        take_back(&lease.journal, &notes);
    }
    outcome
}

/// Nothing of these notes was sent, whether they are there or not.
fn take_back(journal: &Journal, notes: &[Note]) {
    let mut open = lock(&journal.open);
    for note in notes {
        let epoch = note.document.get_i64("epoch").unwrap_or(0);
        let carried = note.document.get_binary_generic("outcomes");
        open.outcomes
            .extend(Run::unpack(carried.map(Vec::as_slice).unwrap_or_default()));
        open.undecided
            .retain(|_, (place, _)| (place.epoch, place.n) != (epoch, note.n));
        open.outcomes.push(Run::void(epoch, note.n));
    }
}

/// Puts down what is about to be written, if others may have to go on with it.
pub(crate) async fn announce(
    shared: &Arc<Shared>,
    entries: Vec<(Key, Entry)>,
) -> Result<(), Failure> {
    let Some(lease) = shared.lease().filter(|_| !entries.is_empty()) else {
        return Ok(());
    };
    let notes = notes(shared, lease, &entries, false)?;
    put(lease, notes).await
}

/// Puts down what became of writes, and where base has changed without one.
pub(super) async fn flush(shared: &Arc<Shared>, lease: &Lease) -> Result<(), Failure> {
    let told: Vec<(Key, (Id, u64))> = {
        let open = lock(&lease.journal.open);
        if open.told.is_empty() && open.outcomes.is_empty() {
            return Ok(());
        }
        let told = open.told.iter().take(TOLD);
        told.map(|(key, change)| (key.clone(), change.clone()))
            .collect()
    };
    let reading = shared.store.call(move |c| {
        let read = |(key, (id, change))| {
            let base = base::get(c, &key)?;
            Ok((key, Entry::told(id, base, change)))
        };
        told.into_iter()
            .map(read)
            .collect::<rusqlite::Result<Vec<_>>>()
    });
    let entries = reading.await.map_err(store_failed)?;
    let notes = notes(shared, lease, &entries, false)?;
    put(lease, notes).await?;
    let mut open = lock(&lease.journal.open);
    for (key, entry) in &entries {
        if open.is_as_told(key, entry) {
            open.told.remove(key);
        }
    }
    Ok(())
}

/// Begins the notes of a term with all that is open of those before it: what this daemon does not know
/// itself, and what it has not told (`owed`).
pub(super) async fn open(
    shared: &Arc<Shared>,
    lease: &Arc<Lease>,
    owed: Vec<(Key, Id)>,
) -> Result<(), Failure> {
    if shared.store.sent().any() || lease.at_work.load(Ordering::Acquire) > 0 {
        // What becomes of these is about to be known.
        return Err(Failure::standby());
    }
    let (context, holder) = (shared.clone(), lease.clone());
    let noting = shared.store.call(move |c| {
        sent::take_apart(c, context.store.sent())?;
        let mut entries = Vec::new();
        for key in intents::keys(c)? {
            let Some(intent) = intents::get(c, &key)? else {
                continue;
            };
            let base = base::get(c, &key)?;
            let body = [&base, &intent.new, &intent.base_after];
            let body = body.into_iter().flatten().find_map(|d| Id::of(d));
            if let Some(id) = body.or(queue::id_of(c, &key)?) {
                let entry = Entry::of(id, base, intent);
                let entry = match records::overruled(c, &key)? {
                    Some((record, gone)) => {
                        let gone = gone.and_then(|gone| gone.try_into().ok());
                        entry.with_record(&record, gone)
                    }
                    None => entry,
                };
                entries.push((key, entry));
            }
        }
        // A document may be owed more than once.
        let mut told: KeySet = entries.iter().map(|(key, _)| key.clone()).collect();
        for (key, id) in owed {
            if told.insert(key.clone()) {
                let base = base::get(c, &key)?;
                let change = holder.journal.tell(&key, &id);
                entries.push((key, Entry::told(id, base, change)));
            }
        }
        // On the store's thread, so that no outcome comes in between.
        Ok(notes(&context, &holder, &entries, true))
    });
    put(lease, noting.await.map_err(store_failed)??).await
}
