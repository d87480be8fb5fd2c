//! Dictionaries: what the documents of a collection have in common, kept once.
//!
//! A document of a few hundred bytes has little in itself to compress; names of fields, shape and
//! usual values stand in its neighbours. When enough of a collection's contents went by, a zstd
//! dictionary is trained on them, and base packs with it from then on: a fifth of the bytes in a
//! fifth of the time. zstd writes the number of the dictionary into what it packs; a
//! dictionary is on disk before anything refers to it, and stays.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::Duration;

use rusqlite::{Connection, params};
use tokio::sync::Notify;
use zstd::zstd_safe::{self, CCtx, CDict, DCtx, DDict};

use crate::shared::lock;

/// Bytes of contents that a dictionary is trained on.
const SAMPLE: usize = 256 << 10;

/// And how many contents at least.
const SAMPLES: usize = 100;

/// Bytes of samples held for all collections together.
const ALL_SAMPLES: usize = 4 << 20;

/// A larger content compresses well by itself.
const LARGE: usize = 16 << 10;

/// Bytes of a dictionary.
const SIZE: usize = 16 << 10;

/// Dictionaries in use at once; each takes about 150 KB of memory.
const MOST: usize = 64;

/// How long somebody waits for a dictionary.
const PATIENCE: Duration = Duration::from_secs(1);

/// The fastest level of the usual ones, with a dictionary and without.
const LEVEL: i32 = 1;

struct Dictionary {
    bytes: Vec<u8>,
    pack: OnceLock<CDict<'static>>,
    unpack: OnceLock<DDict<'static>>,
}

#[derive(Default)]
struct Known {
    by_ns: HashMap<u32, Arc<Dictionary>>,
    by_number: HashMap<u32, Arc<Dictionary>>,
}

/// Contents of one collection, with their bytes.
#[derive(Default)]
struct Sample {
    contents: Vec<Vec<u8>>,
    bytes: usize,
}

#[derive(Default)]
struct Samples {
    of: HashMap<u32, Sample>,
    bytes: usize,
    /// Collections that are being trained for, or can't be.
    done: HashSet<u32>,
    /// Of these, those being trained for.
    training: HashSet<u32>,
}

/// The dictionaries of one store.
#[derive(Default)]
pub(crate) struct Dictionaries {
    known: RwLock<Known>,
    samples: Mutex<Samples>,
    due: AtomicBool,
    /// Told when training is over.
    trained: Notify,
}

thread_local! {
    // Making a context costs more than all the rest for a document of a few hundred bytes.
    static PACKER: RefCell<(CCtx<'static>, Vec<u8>)> = RefCell::new((CCtx::create(), Vec::new()));
    static UNPACKER: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
    // Of the store whose thread this is.
    static MINE: RefCell<Arc<Dictionaries>> = RefCell::default();
}

impl Dictionaries {
    /// Reads those of a state file.
    pub(crate) fn load(c: &Connection) -> rusqlite::Result<Self> {
        let dictionaries = Self::default();
        let mut rows = c.prepare("SELECT ns, bytes FROM dictionaries ORDER BY number")?;
        let rows = rows.query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?;
        for row in rows {
            let (ns, bytes) = row?;
            dictionaries.learned(ns, bytes);
        }
        Ok(dictionaries)
    }

    /// Makes these the ones of the calling thread.
    pub(crate) fn adopt(self: Arc<Self>) {
        MINE.set(self);
    }

    /// Those of the calling thread.
    pub(super) fn mine() -> Arc<Self> {
        MINE.with_borrow(Arc::clone)
    }

    fn learned(&self, ns: u32, bytes: Vec<u8>) {
        let Some(number) = zstd_safe::get_dict_id(&bytes) else {
            return;
        };
        let dictionary = Arc::new(Dictionary {
            bytes,
            pack: OnceLock::new(),
            unpack: OnceLock::new(),
        });
        let mut known = self.known.write().unwrap_or_else(|e| e.into_inner());
        known.by_number.insert(number.get(), dictionary.clone());
        known.by_ns.insert(ns, dictionary);
    }

    /// What packs contents of a collection now; with no dictionary yet, they go to the samples.
    pub(crate) fn packer(&self, ns: u32) -> Packer<'_> {
        let known = self.known.read().unwrap_or_else(|e| e.into_inner());
        Packer {
            with: known.by_ns.get(&ns).cloned(),
            samples: known.by_ns.len() < MOST,
            all: self,
            ns,
        }
    }

    /// The content of a frame of no more than `size` bytes, packed with a dictionary or without.
    pub(super) fn unpack(&self, frame: &[u8], size: usize) -> Option<Vec<u8>> {
        let mut content = Vec::with_capacity(size);
        let Some(number) = zstd_safe::get_dict_id_from_frame(frame) else {
            let unpacked = UNPACKER.with_borrow_mut(|c| c.decompress(&mut content, frame));
            return unpacked.ok().map(|_| content);
        };
        let known = self.known.read().unwrap_or_else(|e| e.into_inner());
        let dictionary = known.by_number.get(&number.get())?.clone();
        drop(known);
        let unpack = dictionary
            .unpack
            .get_or_init(|| DDict::create(&dictionary.bytes));
        UNPACKER
            .with_borrow_mut(|c| c.decompress_using_ddict(&mut content, frame, unpack))
            .ok()?;
        Some(content)
    }

    fn sample(&self, ns: u32, content: &[u8]) {
        let mut samples = lock(&self.samples);
        if content.len() > LARGE || samples.done.contains(&ns) {
            return;
        }
        if samples.bytes > ALL_SAMPLES {
            // Very many small collections: whichever fills first from here on.
            samples.of.clear();
            samples.bytes = 0;
        }
        samples.bytes += content.len();
        let of = samples.of.entry(ns).or_default();
        of.bytes += content.len();
        of.contents.push(content.to_vec());
        if of.contents.len() >= SAMPLES && of.bytes >= SAMPLE {
            samples.done.insert(ns);
            samples.training.insert(ns);
            self.due.store(true, Ordering::Relaxed);
        }
    }

    /// Whether [`Dictionaries::train`] has something to do; says so once.
    pub(super) fn is_due(&self) -> bool {
        self.due.load(Ordering::Relaxed) && self.due.swap(false, Ordering::Relaxed)
    }

    /// Trains what is due; takes a tenth of a second for each.
    pub(super) fn train(&self) -> Vec<(u32, Vec<u8>)> {
        let taken: Vec<_> = {
            let mut samples = lock(&self.samples);
            let Samples {
                of, bytes, done, ..
            } = &mut *samples;
            let taken = of.extract_if(|ns, _| done.contains(ns));
            taken
                .inspect(|(_, sample)| *bytes -= sample.bytes)
                .collect()
        };
        let trained = taken.into_iter().filter_map(|(ns, sample)| {
            // It fails on contents that have nothing in common; then there is nothing to gain.
            let bytes = zstd::dict::from_samples(&sample.contents, SIZE).ok()?;
            zstd_safe::get_dict_id(&bytes).map(|_| (ns, bytes))
        });
        trained.collect()
    }

    /// Training is over, with a dictionary or without.
    pub(super) fn trained(&self) {
        lock(&self.samples).training.clear();
        self.trained.notify_waiters();
    }

    /// Waits while a collection's dictionary is being trained, for a moment at most. Whoever packs very
    /// many gains by it: without a dictionary each takes five times as long.
    pub(crate) async fn ready(&self, ns: u32) {
        let over = self.trained.notified();
        if lock(&self.samples).training.contains(&ns) {
            // Too long is no harm: what is packed without one can be read as well.
            let _ = tokio::time::timeout(PATIENCE, over).await;
        }
    }

    /// Takes dictionaries into use that are on disk.
    pub(super) fn use_stored(&self, trained: Vec<(u32, Vec<u8>)>) {
        for (ns, bytes) in trained {
            self.learned(ns, bytes);
        }
    }
}

/// Packs contents of one collection.
pub(crate) struct Packer<'a> {
    all: &'a Dictionaries,
    ns: u32,
    with: Option<Arc<Dictionary>>,
    /// Whether another dictionary may be trained.
    samples: bool,
}

impl Packer<'_> {
    /// Packs a content with the dictionary of its collection, as one zstd frame that `keep` is given.
    /// `None`: there is none yet; the content goes to the samples.
    pub(super) fn pack<T>(&self, content: &[u8], keep: impl FnOnce(&[u8]) -> T) -> Option<T> {
        let Some(dictionary) = &self.with else {
            if self.samples {
                self.all.sample(self.ns, content);
            }
            return None;
        };
        let pack = dictionary
            .pack
            .get_or_init(|| CDict::create(&dictionary.bytes, LEVEL));
        compress(content, Some(pack), keep)
    }
}

/// A content as one zstd frame, given to `keep`.
pub(super) fn compress<T>(
    content: &[u8],
    with: Option<&CDict<'_>>,
    keep: impl FnOnce(&[u8]) -> T,
) -> Option<T> {
    PACKER.with_borrow_mut(|(context, scratch)| {
        scratch.clear();
        scratch.reserve(zstd_safe::compress_bound(content.len()));
        let packed = match with {
            Some(dictionary) => context.compress_using_cdict(scratch, content, dictionary),
            None => context.compress(scratch, content, LEVEL),
        };
        let packed = packed.ok().map(|_| keep(scratch));
        if scratch.capacity() > 1 << 20 {
            *scratch = Vec::new();
        }
        packed
    })
}

/// Stores dictionaries.
pub(super) fn put(c: &Connection, trained: &[(u32, Vec<u8>)]) -> rusqlite::Result<()> {
    let mut insert = c.prepare_cached("INSERT INTO dictionaries(ns, bytes) VALUES(?, ?)")?;
    for (ns, bytes) in trained {
        insert.execute(params![ns, bytes])?;
    }
    Ok(())
}
