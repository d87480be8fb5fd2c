//! The walk: one collection on both sides, range by range of `_id`, and where they differ.
//!
//! This is what reconcile, the first sync and verify have in common. It only reads, keeps no state
//! and knows no base: a caller cuts a collection into ranges ([`Place::bounds`], [`Place::bound`]), compares each
//! ([`Place::exact`] or [`Place::cheap`], several at once if it likes) and is sent what was
//! [`Found`] through a channel, up to a thousand documents at a time; a slow receiver slows the walk.
//!
//! - **exact** reads every document of both sides once and compares contents byte for byte.
//! - **cheap** compares hashes that the servers compute (`$toHashedIndexKey`), reads nothing where they
//!   are the same, and narrows a range down to the documents where they are not. To such a hash 2.2
//!   and 2.9 are the same, and so are 1 and 1.0 of the same size: it is a hint, never a proof.
//!
//! Nothing here knows the server's order of `_id`s, nor their collation: ranges are `min` and `max` on the
//! `_id` index, bounds are documents that the servers name, and within a range documents are joined by
//! their key. So every type of `_id` and a mixture of them is covered. What was read on the two sides is
//! from two moments: a difference may be a change that is just on its way, so look again before
//! believing it (the worker does, with base; verify has to wait for the queues).

mod bounds;
mod exact;
mod hash;

use std::sync::Arc;

use bson::doc;
use bytes::Bytes;
use tokio::sync::mpsc;

use crate::decide::Side;
use crate::failure::Failure;
use crate::key::{Id, Key};
use crate::raw::Writer;
use crate::shared::{Settings, Shared, lock};
use crate::side::{Endpoint, READING, Rows};

/// Bytes of documents that one answer of a server shall hold: several cursors are open at once.
const ANSWER: u64 = 1 << 20;

/// Bytes of an average document where a server does not tell.
const USUAL: u64 = 1024;

/// The server's `NamespaceNotFound`.
const NO_SUCH_COLLECTION: i32 = 26;

/// Documents that are sent to the receiver together.
const SOME: usize = 1000;

/// From one `_id` (or the first) up to another one, which is left out (or to the end).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Range {
    /// The first `_id`; `None`: from the beginning.
    pub from: Option<Id>,
    /// The first `_id` that does not belong to it any more; `None`: to the end.
    pub to: Option<Id>,
}

/// What one side has of a document.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    /// No such document.
    Absent,
    /// It has this content (sync fields left out).
    Content(Vec<u8>),
    /// It has the document, whose content was not kept or never read.
    Unread,
}

impl Seen {
    /// Whether there is such a document.
    pub fn exists(&self) -> bool {
        *self != Self::Absent
    }
}

/// A document that the walk has met.
#[derive(Clone, Debug)]
pub enum Found {
    /// Both sides have this content (sync fields left out).
    Equal(Key, Bytes),
    /// They don't.
    Differs(Difference),
}

/// A document that is not the same on both sides.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Which one.
    pub key: Key,
    /// Its `_id`.
    pub id: Id,
    /// What the local side has.
    pub local: Seen,
    /// What the remote has.
    pub remote: Seen,
}

/// What comparing a range took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Documents, those that both sides have counted once.
    pub documents: u64,
    /// Of these, how many were equal by hash alone, and were not sent as [`Found`].
    pub by_hash: u64,
    /// Bytes of document bodies read from both sides.
    pub bytes: u64,
}

/// Receives what a walk finds.
pub type Finds = mpsc::Sender<Vec<Found>>;

/// One collection on both sides.
#[derive(Clone)]
pub struct Place {
    local: Arc<Endpoint>,
    remote: Arc<Endpoint>,
    db: String,
    coll: String,
    ns: u32,
    sync_fields: Vec<String>,
    size: Size,
    /// Documents of each side: local, remote.
    counts: [u64; 2],
}

/// How large a collection is, as its metadata have it: estimates.
#[derive(Clone, Copy, Debug, Default)]
pub struct Size {
    /// Documents on the side that has more.
    pub documents: u64,
    /// Bytes of an average document.
    pub average: u64,
}

impl Place {
    /// Prepares to compare a collection, which need not exist on both sides; asks for its size.
    pub async fn open(
        shared: &Shared,
        settings: &Settings,
        (db, coll): (&str, &str),
        ns: u32,
    ) -> Result<Self, Failure> {
        let mut place = Self {
            local: shared.local.clone(),
            remote: shared.endpoint(Side::Remote)?,
            db: db.to_owned(),
            coll: coll.to_owned(),
            ns,
            sync_fields: settings.sync_fields.clone(),
            size: Size::default(),
            counts: [0; 2],
        };
        let (local, remote) =
            tokio::join!(place.size_on(&place.local), place.size_on(&place.remote));
        shared.note(Side::Remote, &remote);
        let (local, remote) = (local?, remote?);
        place.size = Size {
            documents: local.documents.max(remote.documents),
            average: local.average.max(remote.average).max(1),
        };
        place.counts = [local.documents, remote.documents];
        if place.size.documents > 0 {
            let average = usize::try_from(place.size.average).unwrap_or(usize::MAX);
            lock(&shared.sizes).entry(ns).or_insert(average);
        }
        Ok(place)
    }

    /// Number of its namespace.
    pub fn ns(&self) -> u32 {
        self.ns
    }

    /// Its size, as estimated at the beginning.
    pub fn size(&self) -> Size {
        self.size
    }

    async fn size_on(&self, endpoint: &Arc<Endpoint>) -> Result<Size, Failure> {
        let mut w = Writer::new();
        w.str("aggregate", &self.coll).open_array("pipeline");
        w.open("0").open("$collStats").open("storageStats").close();
        w.close().close();
        w.open("1").open("$project");
        w.i32("storageStats.count", 1).i32("storageStats.size", 1);
        w.close().close().close().open("cursor").close();
        let mut size = Size::default();
        let asked = endpoint.query(&self.db, w.command(), |d| {
            let Ok(stats) = d.get_document("storageStats") else {
                return;
            };
            // An integer of either kind, or a double on some versions.
            let number = |name| {
                let value = stats.get(name).ok().flatten()?;
                let wide = value.as_i64().or(value.as_i32().map(i64::from));
                u64::try_from(wide.or(value.as_f64().map(|f| f as i64))?).ok()
            };
            // On a mongos, one answer a shard.
            let (count, bytes) = (number("count").unwrap_or(0), number("size").unwrap_or(0));
            size.documents += count;
            size.average = size.average.max(bytes / count.max(1));
        });
        match asked.await {
            Ok(()) => Ok(size),
            Err(f) if f.code == Some(NO_SUCH_COLLECTION) => Ok(size),
            // Not offered to us: then it has to do without the bytes.
            Err(f) if f.is_refusal() => {
                let count = doc! {"count": &self.coll};
                let counted = endpoint.run_doc(&self.db, count).await?;
                let n = counted.get_i32("n").map(i64::from);
                let n = n.or_else(|_| counted.get_i64("n")).unwrap_or(0);
                Ok(Size {
                    documents: u64::try_from(n).unwrap_or(0),
                    average: USUAL,
                })
            }
            Err(f) => Err(f),
        }
    }

    /// How many documents a range to be compared exactly should hold: little of the collection, so
    /// that a crash costs little, and few bytes.
    pub fn exact_range(&self) -> u64 {
        let by_bytes = (16 * ANSWER / self.size.average.max(1)).max(16);
        (self.size.documents / 128)
            .clamp(1000, 20_000)
            .min(by_bytes)
    }

    /// The same for a range to be compared by hash, which costs the servers' time only.
    pub fn cheap_range(&self) -> u64 {
        let by_bytes = (128 * ANSWER / self.size.average.max(1)).max(16);
        (self.size.documents / 32).clamp(4000, 50_000).min(by_bytes)
    }

    /// A `find` of a range, majority committed, in the order of the `_id` index.
    fn find(&self, range: &Range) -> Writer {
        let mut w = Writer::new();
        w.str("find", &self.coll).open("filter").close();
        w.open("hint").i32("_id", 1).close();
        for (name, id) in [("min", &range.from), ("max", &range.to)] {
            if let Some(id) = id {
                w.open(name).value("_id", id.kind, &id.value).close();
            }
        }
        w.open("readConcern").str("level", "majority").close();
        w
    }

    /// Documents of an answer that holds about [`ANSWER`] bytes.
    fn batch_size(&self) -> i32 {
        i32::try_from((ANSWER / self.size.average.max(1)).clamp(1, 10_000)).unwrap_or(1000)
    }

    async fn scan(
        &self,
        endpoint: &Arc<Endpoint>,
        range: &Range,
        ids_only: bool,
    ) -> Result<Rows, Failure> {
        let mut w = self.find(range);
        if ids_only {
            w.open("projection").i32("_id", 1).close();
            w.i32("batchSize", 10_000);
        } else {
            w.i32("batchSize", self.batch_size());
        }
        endpoint.cursor(&self.db, w.command(), READING).await
    }
}

/// What was found, on its way to the receiver.
struct Out<'a> {
    finds: &'a Finds,
    some: Vec<Found>,
    /// Bytes of bodies in `some`.
    bytes: usize,
}

impl<'a> Out<'a> {
    fn new(finds: &'a Finds) -> Self {
        Self {
            finds,
            some: Vec::with_capacity(SOME),
            bytes: 0,
        }
    }

    /// Adds to what is sent together; see [`Out::flush_if_full`].
    fn push(&mut self, found: Found) {
        self.bytes += match &found {
            Found::Equal(_, content) => content.len(),
            Found::Differs(_) => 0,
        };
        self.some.push(found);
    }

    /// Sends what there is, if it is enough.
    async fn flush_if_full(&mut self) -> Result<(), Failure> {
        if self.some.len() >= SOME || self.bytes > ANSWER as usize {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), Failure> {
        if self.some.is_empty() {
            return Ok(());
        }
        self.bytes = 0;
        let some = std::mem::replace(&mut self.some, Vec::with_capacity(SOME));
        // Nobody listens any more: whoever did has failed, and says why.
        let gone = |_| Failure::offline(crate::failure::Reason::Offline);
        self.finds.send(some).await.map_err(gone)
    }
}
