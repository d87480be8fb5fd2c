//! The heir: who stands by, and who takes over, going on with what the holder has put down in its
//! [`journal`](super::journal).
//!
//! Who stands by takes over base of every document whose write is decided, in the order of the notes. Who
//! takes the lease reads the rest as well; a write whose outcome is not known becomes an intent of its
//! own.

use std::collections::HashMap;
use std::sync::Arc;

use bson::{Document, RawDocumentBuf, doc};
use rusqlite::Connection;

use super::entry::{self, Entry, Run};
use super::journal::id_of;
use super::{COLLECTION, Lease};
use crate::decide::Side;
use crate::failure::Failure;
use crate::key::{Id, Key};
use crate::settle::store_failed;
use crate::shared::Shared;
use crate::side::Endpoint;
use crate::store::queue::{self, Change};
use crate::store::{self, base, intents, records};

/// Under this name the store keeps up to which note the journal was read.
const MARK: &str = "journal_read";

/// A note is kept for so long for a daemon that is away, in ms.
const KEEP: i64 = 600_000;

/// A note is cut off after so long whatever may be open, in ms.
const LONGEST: i64 = 24 * 3_600_000;

/// Notes read at once.
const AT_ONCE: usize = 3;

/// A note: the number of the term, and its own within that.
pub(super) type Mark = (i64, i64);

/// Before all notes.
const NOTHING: Mark = (0, -1);

/// A note without its entries.
#[derive(Clone, Debug, PartialEq)]
struct Header {
    at: Mark,
    /// Entries in it.
    count: u32,
    /// Put down by this daemon itself.
    mine: bool,
    /// Whatever is open of the terms before is repeated up to here.
    closes: bool,
}

/// The notes after a mark.
#[derive(Debug, Default)]
struct Notes {
    /// In their order.
    headers: Vec<Header>,
    /// What became of writes, by note.
    fates: HashMap<Mark, Vec<Run>>,
    /// Terms before this one are closed.
    closed: i64,
}

/// What is known of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Done,
    Not,
    Open,
}

impl Notes {
    fn add(&mut self, header: Header, outcomes: &[u8]) {
        if header.closes {
            self.closed = self.closed.max(header.at.0);
        }
        for run in Run::unpack(outcomes) {
            self.fates.entry((run.epoch, run.n)).or_default().push(run);
        }
        self.headers.push(header);
    }

    fn fate(&self, note: Mark, at: u32) -> Fate {
        let runs = self.fates.get(&note).map(Vec::as_slice).unwrap_or_default();
        match runs.iter().find(|run| (run.from..run.to).contains(&at)) {
            Some(run) if run.done => Fate::Done,
            Some(_) => Fate::Not,
            None => Fate::Open,
        }
    }

    fn is_void(&self, note: Mark) -> bool {
        let runs = self.fates.get(&note);
        runs.is_some_and(|runs| runs.contains(&Run::void(note.0, note.1)))
    }

    /// Up to which note all is decided, and none is missing that may come yet.
    fn decided(&self, mark: Mark) -> Mark {
        let mut at = mark;
        for header in &self.headers {
            let (epoch, n) = header.at;
            if epoch >= self.closed {
                if epoch > at.0 && at.0 >= self.closed {
                    return at;
                }
                let first = if epoch == at.0 { at.1 + 1 } else { 0 };
                if (first..n).any(|missing| !self.is_void((epoch, missing))) {
                    return at;
                }
                if (0..header.count).any(|i| self.fate(header.at, i) == Fate::Open) {
                    return at;
                }
            }
            at = header.at;
        }
        at
    }
}

/// Reads the heads of all notes after a mark.
async fn survey(lease: &Lease, local: &Arc<Endpoint>, mark: Mark) -> Result<Notes, Failure> {
    let command = doc! {
        "find": COLLECTION, "filter": after(lease, mark), "sort": {"_id": 1}, "projection": {"entries": 0},
        "readConcern": local.concern(),
    };
    let mut notes = Notes::default();
    let each = |d: RawDocumentBuf| {
        let (Ok(epoch), Ok(n)) = (d.get_i64("epoch"), d.get_i64("n")) else {
            return;
        };
        let header = Header {
            at: (epoch, n),
            count: d
                .get_i32("count")
                .map_or(0, |n| u32::try_from(n).unwrap_or(0)),
            mine: d.get_str("by").is_ok_and(|by| by == lease.me),
            closes: d.get_bool("closes").unwrap_or(false),
        };
        let outcomes = d.get_binary("outcomes").map(|outcomes| outcomes.bytes);
        notes.add(header, outcomes.unwrap_or_default());
    };
    local.query(&lease.db, raw_of(&command)?, each).await?;
    Ok(notes)
}

/// The notes after a mark.
fn after(lease: &Lease, mark: Mark) -> Document {
    doc! {"_id": {"$gt": id_of(lease, mark), "$lt": after_all(lease)}, "of": &lease.pair}
}

fn raw_of(command: &Document) -> Result<RawDocumentBuf, Failure> {
    RawDocumentBuf::try_from(command).map_err(|_| Failure::fatal("find"))
}

/// Behind the `_id` of every note.
fn after_all(lease: &Lease) -> String {
    format!("note:{}:~", lease.pair)
}

/// `_id` of the document that says up to which note the journal was cut off.
fn cut_id(lease: &Lease) -> String {
    format!("cut:{}", lease.pair)
}

/// `_id` of the document in which a daemon says up to which note it has read; without a name, what all
/// of them begin with.
fn seen_id(lease: &Lease, name: &str) -> String {
    format!("seen:{}:{name}", lease.pair)
}

async fn mark_of(shared: &Shared) -> Result<Mark, Failure> {
    let kept: Option<String> = shared.store.get_meta(MARK).await.map_err(store_failed)?;
    let mark = kept.and_then(|kept| {
        let (epoch, n) = kept.split_once(':')?;
        Some((epoch.parse().ok()?, n.parse().ok()?))
    });
    Ok(mark.unwrap_or(NOTHING))
}

fn set_mark(c: &Connection, (epoch, n): Mark) -> rusqlite::Result<()> {
    store::set_meta(c, MARK, format!("{epoch}:{n}"))
}

/// Takes over what the holder has decided since the last time, and says so; also without that, if `say`.
pub(super) async fn follow(
    shared: &Arc<Shared>,
    lease: &Arc<Lease>,
    say: bool,
) -> Result<(), Failure> {
    if lease.failpoints.mutated("no_journal") {
        return Ok(());
    }
    let mark = mark_of(shared).await?;
    let notes = survey(lease, &shared.local, mark).await?;
    let mut upto = notes.decided(mark);
    if upto == mark && !notes.headers.is_empty() {
        // What comes next may have been cut off while this daemon was away.
        let cut = cut(lease, &shared.local).await?;
        if cut > mark {
            tracing::warn!(
                "the holder waits for this daemon no longer: what it agreed on meanwhile is not known here"
            );
            let setting = shared.store.call(move |c| set_mark(c, cut));
            setting.await.map_err(store_failed)?;
            upto = cut;
        }
    } else if upto != mark {
        bring(shared, lease, &notes, (mark, upto), false).await?;
    }
    match say || upto != mark {
        true => say_seen(lease, &shared.local, upto).await,
        false => Ok(()),
    }
}

/// Takes over everything, for a term that begins. How many writes are open.
pub(super) async fn take_over(shared: &Arc<Shared>, lease: &Arc<Lease>) -> Result<usize, Failure> {
    // The mutation `no_journal`: what the holder before knew is lost with it.
    if lease.failpoints.mutated("no_journal") {
        return Ok(0);
    }
    let mark = mark_of(shared).await?;
    let notes = survey(lease, &shared.local, mark).await?;
    match notes.headers.last() {
        Some(last) => bring(shared, lease, &notes, (mark, last.at), true).await,
        None => Ok(0),
    }
}

/// Documents of which this daemon has put down that it would write them, and not what became of it: it
/// may have ended meanwhile.
pub(super) async fn owed(
    shared: &Arc<Shared>,
    lease: &Arc<Lease>,
) -> Result<Vec<(Key, Id)>, Failure> {
    let notes = survey(lease, &shared.local, NOTHING).await?;
    let is_open = |h: &&Header| (0..h.count).any(|i| notes.fate(h.at, i) == Fate::Open);
    let mine = notes
        .headers
        .iter()
        .filter(|h| h.mine && h.at.0 >= notes.closed)
        .filter(is_open)
        .map(|h| h.at);
    let mine: Vec<Mark> = mine.collect();
    let mut owed = Vec::new();
    for some in mine.chunks(AT_ONCE) {
        for (at, (db, coll), entries) in read(lease, &shared.local, some).await? {
            let ns = shared.store.namespace(&db, &coll).await;
            let ns = ns.map_err(store_failed)?;
            let open = (0..).zip(entries);
            let open = open.filter(|(i, _)| notes.fate(at, *i) == Fate::Open);
            owed.extend(open.map(|(_, entry)| (entry::key(ns, &entry), entry.id)));
        }
    }
    Ok(owed)
}

/// Brings base up to a note. How many writes are open.
async fn bring(
    shared: &Arc<Shared>,
    lease: &Lease,
    notes: &Notes,
    (mark, upto): (Mark, Mark),
    takes_over: bool,
) -> Result<usize, Failure> {
    let others: Vec<Mark> = notes
        .headers
        .iter()
        .filter(|h| h.at <= upto && h.count > 0 && !h.mine)
        .map(|h| h.at)
        .collect();
    let (mut open, mut reached) = (0, mark);
    for some in others.chunks(AT_ONCE) {
        let mut changes = Vec::new();
        for (at, names, entries) in read(lease, &shared.local, some).await? {
            let (db, coll) = &names;
            let ns = shared.store.namespace(db, coll).await;
            let ns = ns.map_err(store_failed)?;
            for (i, entry) in (0..).zip(entries) {
                let fate = notes.fate(at, i);
                // What is open of a term that is closed was never sent, or stands in a later note.
                if fate == Fate::Open && at.0 < notes.closed {
                    continue;
                }
                open += usize::from(fate == Fate::Open);
                changes.push((entry::key(ns, &entry), entry, fate));
            }
        }
        reached = *some.last().unwrap_or(&reached);
        let bringing = shared.store.call(move |c| {
            let mut looks = Vec::new();
            for (key, entry, fate) in changes {
                if bring_one(c, &key, &entry, fate, takes_over)? {
                    looks.push(Change {
                        key,
                        id: entry.id,
                        hint: None,
                    });
                }
            }
            let now = chrono::Utc::now().timestamp_millis();
            queue::enqueue(c, Side::Remote, &looks, now)?;
            set_mark(c, reached)
        });
        bringing.await.map_err(store_failed)?;
    }
    if reached != upto {
        let setting = shared.store.call(move |c| set_mark(c, upto));
        setting.await.map_err(store_failed)?;
    }
    shared.wake.notify_one();
    Ok(open)
}

/// Of one document. Whether both sides are to be looked at: what is known of it has changed.
fn bring_one(
    c: &Connection,
    key: &Key,
    entry: &Entry,
    fate: Fate,
    takes_over: bool,
) -> rusqlite::Result<bool> {
    let base = match fate {
        Fate::Done => entry.base_after(),
        Fate::Not | Fate::Open => entry.base.clone(),
    };
    let intent = entry.intent.as_ref().filter(|_| fate == Fate::Open);
    let mut look = intent.is_some();
    intents::forget(c, key)?;
    if let Some(content) = base
        && base::get(c, key)? != content
    {
        base::put(c, key, content.as_deref())?;
        look = true;
    }
    if let Some(intent) = intent {
        intents::put(c, key, intent)?;
    }
    // As a rule the holder has sent the record on its way; of its last ones nobody knows.
    if let Some((record, gone)) = entry.record.as_ref().filter(|_| takes_over)
        && fate == Fate::Open
    {
        records::put_overruled(c, key, record, gone.as_ref())?;
    }
    Ok(look)
}

/// Names of a collection: database and collection.
type Names = (String, String);

/// Reads the entries of notes, in their order. Those that can't be read are left out.
async fn read(
    lease: &Lease,
    local: &Arc<Endpoint>,
    notes: &[Mark],
) -> Result<Vec<(Mark, Names, Vec<Entry>)>, Failure> {
    let ids: Vec<String> = notes.iter().map(|at| id_of(lease, *at)).collect();
    let command = doc! {
        "find": COLLECTION, "filter": {"_id": {"$in": ids}}, "sort": {"_id": 1},
        "readConcern": local.concern(),
    };
    let mut found = Vec::new();
    let each = |d: RawDocumentBuf| {
        let text = |name: &str| d.get_str(name).unwrap_or_default().to_owned();
        let entries = d.get_binary("entries").ok();
        let entries = entries.and_then(|entries| entry::unpack(entries.bytes));
        if let (Ok(epoch), Ok(n), Some(entries)) = (d.get_i64("epoch"), d.get_i64("n"), entries) {
            found.push(((epoch, n), (text("db"), text("coll")), entries));
        }
    };
    local.query(&lease.db, raw_of(&command)?, each).await?;
    Ok(found)
}

/// Says up to which note this daemon has read: they are not kept for it any longer.
async fn say_seen(lease: &Lease, local: &Endpoint, (epoch, n): Mark) -> Result<(), Failure> {
    let set = vec![doc! {"$set": {"epoch": epoch, "n": n, "at": "$$NOW"}}];
    let statement = doc! {"q": {"_id": seen_id(lease, &lease.me)}, "u": set, "upsert": true};
    let command = doc! {"update": COLLECTION, "updates": [statement], "maxTimeMS": 3000};
    local.run_doc(&lease.db, command).await.map(|_| ())
}

async fn cut(lease: &Lease, local: &Arc<Endpoint>) -> Result<Mark, Failure> {
    let found = marks(lease, local, doc! {"_id": cut_id(lease)}).await?;
    Ok(found.into_iter().next().unwrap_or(NOTHING))
}

/// The marks in documents of the journal.
async fn marks(
    lease: &Lease,
    local: &Arc<Endpoint>,
    filter: Document,
) -> Result<Vec<Mark>, Failure> {
    let command = doc! {
        "find": COLLECTION, "filter": filter, "sort": {"_id": -1}, "projection": {"epoch": 1, "n": 1},
        "readConcern": local.concern(),
    };
    let mut found = Vec::new();
    let each = |d: RawDocumentBuf| {
        if let (Ok(epoch), Ok(n)) = (d.get_i64("epoch"), d.get_i64("n")) {
            found.push((epoch, n));
        }
    };
    local.query(&lease.db, raw_of(&command)?, each).await?;
    Ok(found)
}

/// What is that much older than now, or younger.
fn than(comparison: &str, ms: i64) -> Document {
    doc! {"$expr": {comparison: ["$at", {"$subtract": ["$$NOW", ms]}]}}
}

/// The last note that is older than that.
async fn last_before(
    lease: &Lease,
    local: &Arc<Endpoint>,
    ms: i64,
) -> Result<Option<Mark>, Failure> {
    let mut filter = after(lease, NOTHING);
    filter.extend(than("$lt", ms));
    Ok(marks(lease, local, filter).await?.into_iter().next())
}

/// Cuts off what everybody has read who was there lately; with nobody there, what is old.
pub(super) async fn prune(lease: &Lease, local: &Arc<Endpoint>) -> Result<(), Failure> {
    let prefix = seen_id(lease, "");
    let daemons = doc! {"$gte": &prefix, "$lt": format!("{prefix}~")};
    let mut others = than("$gte", KEEP);
    others.insert("_id", {
        let mut others = daemons.clone();
        others.insert("$ne", seen_id(lease, &lease.me));
        others
    });
    let upto = match marks(lease, local, others).await?.into_iter().min() {
        Some(least) => Some(least),
        None => last_before(lease, local, KEEP).await?,
    };
    let open = lease.journal.first_open();
    let upto = upto.map(|upto| open.map_or(upto, |(epoch, n)| upto.min((epoch, n - 1))));
    let upto = upto.max(last_before(lease, local, LONGEST).await?);
    let Some((epoch, n)) = upto.filter(|upto| *upto > NOTHING) else {
        return Ok(());
    };
    let statement = doc! {
        "q": {"_id": cut_id(lease)}, "u": {"$set": {"epoch": epoch, "n": n}}, "upsert": true,
    };
    let command = doc! {
        "update": COLLECTION, "updates": [statement], "writeConcern": {"w": "majority"}, "maxTimeMS": 3000,
    };
    local.run_doc(&lease.db, command).await?;
    let mut read = after(lease, NOTHING);
    read.insert(
        "_id",
        doc! {"$gt": id_of(lease, NOTHING), "$lte": id_of(lease, (epoch, n))},
    );
    // Of an earlier version.
    let tokens = doc! {"of": &lease.pair, "tokens": {"$exists": true}};
    let mut gone = than("$lt", LONGEST);
    gone.insert("_id", daemons);
    let deletes: Vec<_> = [read, tokens, gone]
        .into_iter()
        .map(|q| doc! {"q": q, "limit": 0})
        .collect();
    let command = doc! {"delete": COLLECTION, "deletes": deletes, "maxTimeMS": 10_000};
    local.run_doc(&lease.db, command).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::entry::Place;

    fn header(at: Mark, count: u32) -> Header {
        Header {
            at,
            count,
            mine: false,
            closes: at.1 == 0,
        }
    }

    fn run(at: Mark, from: u32, to: u32, done: bool) -> Run {
        Run {
            epoch: at.0,
            n: at.1,
            from,
            to,
            done,
        }
    }

    /// Notes with their outcomes.
    fn notes(all: &[(Header, &[Run])]) -> Notes {
        let mut notes = Notes::default();
        for (header, runs) in all {
            notes.add(header.clone(), &Run::pack(runs));
        }
        notes
    }

    #[test]
    fn a_standby_reads_up_to_the_first_write_that_is_open() {
        let all = notes(&[
            (header((5, 0), 0), &[]),
            (header((5, 1), 3), &[]),
            (
                header((5, 2), 2),
                &[run((5, 1), 0, 2, true), run((5, 1), 2, 3, false)],
            ),
            (header((5, 3), 0), &[run((5, 2), 1, 2, true)]),
        ]);
        assert_eq!(all.decided(NOTHING), (5, 1));
        assert_eq!(all.decided((5, 1)), (5, 1));
        let fates = [(1, 0), (1, 2), (2, 0)].map(|(n, at)| all.fate((5, n), at));
        assert_eq!(fates, [Fate::Done, Fate::Not, Fate::Open]);
    }

    #[test]
    fn a_standby_waits_for_a_note_that_may_come_yet() {
        let void = Run::void(5, 2);
        let mut all = vec![(header((5, 1), 0), [].as_slice()), (header((5, 3), 0), &[])];
        assert_eq!(notes(&all).decided((5, 0)), (5, 1));
        let told = [void];
        all.push((header((5, 4), 0), &told));
        assert_eq!(notes(&all).decided((5, 0)), (5, 4));
    }

    #[test]
    fn a_later_term_is_read_once_it_has_repeated_what_was_open() {
        let open = (header((5, 7), 1), [].as_slice());
        let later = |closes| {
            let first = Header {
                closes,
                ..header((6, 0), 0)
            };
            notes(&[open.clone(), (first, &[])])
        };
        assert_eq!(later(false).decided((5, 6)), (5, 6));
        assert_eq!(later(true).decided((5, 6)), (6, 0));
        let place = Place {
            epoch: 5,
            n: 7,
            at: 0,
        };
        let mut runs = Vec::new();
        Run::add(&mut runs, place, true);
        let first = Header {
            closes: false,
            ..header((6, 0), 0)
        };
        let decided = notes(&[open, (first, &runs)]);
        assert_eq!(
            decided.decided((5, 6)),
            (5, 7),
            "what else there is of 5 is not known"
        );
    }
}
