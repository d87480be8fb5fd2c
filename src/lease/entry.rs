//! What the notes of the journal are made of. Pure.

use crate::decide::Side;
use crate::key::{Id, Key};
use crate::raw::{self, Writer, index_name};
use crate::receipt::Receipt;
use crate::store::intents::{Intent, digest};

/// Documents whose contents are larger together are put down without them: who takes over has of these
/// what it has settled itself.
const LARGE: usize = 4 << 20;

/// Most bytes of the entries of one note once they are unpacked.
const UNPACKED: usize = 64 << 20;

/// One document: what is about to be written, or what base has become without that.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    /// Its `_id`.
    pub(super) id: Id,
    /// Base as it stands; the outer `None`: too large to be put down.
    pub(super) base: Option<Option<Vec<u8>>>,
    /// The write; `None`: there is none, base has changed.
    pub(super) intent: Option<Intent>,
    /// The record of the clash that the write settles, and the digest of what it replaces (R21).
    pub(super) record: Option<(Vec<u8>, Option<[u8; 32]>)>,
    /// The number of that change, where there is no write; not put down.
    pub(super) change: u64,
}

fn len(content: &Option<Vec<u8>>) -> usize {
    content.as_ref().map_or(0, Vec::len)
}

impl Entry {
    /// A write that is about to be sent.
    pub(crate) fn of(id: Id, base: Option<Vec<u8>>, mut intent: Intent) -> Self {
        let mut base = Some(base);
        let bytes = base.as_ref().map_or(0, len) + len(&intent.new) + len(&intent.base_after);
        if bytes > LARGE {
            base = None;
            if let Some(new) = intent.new.take() {
                // Whether it happened can be told, and what base is then.
                intent.digest = Some(digest(&new));
                intent.base_after = None;
                intent.fields = None;
            }
        }
        Self {
            id,
            base,
            intent: Some(intent),
            record: None,
            change: 0,
        }
    }

    /// The same with the record of the clash that it settles.
    pub(crate) fn with_record(mut self, record: &[u8], gone: Option<[u8; 32]>) -> Self {
        self.record = (record.len() < LARGE).then(|| (record.to_vec(), gone));
        self
    }

    /// What base has become.
    pub(super) fn told(id: Id, base: Option<Vec<u8>>, change: u64) -> Self {
        let small = len(&base) < LARGE;
        Self {
            id,
            base: small.then_some(base),
            intent: None,
            record: None,
            change,
        }
    }

    /// What base is once the write is done; the outer `None`: that was too large to be put down.
    pub(super) fn base_after(&self) -> Option<Option<Vec<u8>>> {
        let intent = self.intent.as_ref()?;
        match intent.digest {
            Some(_) => None,
            None => Some(intent.base_after.clone()),
        }
    }

    /// Bytes that it takes, about.
    pub(super) fn bytes(&self) -> usize {
        let base = self.base.as_ref().map_or(0, len);
        let record = self.record.as_ref().map_or(0, |(record, _)| record.len());
        let intent = self.intent.as_ref();
        base + record + intent.map_or(0, |i| len(&i.new) + len(&i.base_after)) + 100
    }

    fn write(&self, w: &mut Writer) {
        w.value("id", self.id.kind, &self.id.value);
        match &self.base {
            Some(Some(base)) => w.doc("base", base),
            Some(None) => w,
            None => w.bool("large", true),
        };
        if let Some((record, gone)) = &self.record {
            w.doc("record", record);
            put_binary(w, "gone", gone.as_ref().map(|g| g.as_slice()));
        }
        let Some(intent) = &self.intent else { return };
        w.str("side", intent.side.name());
        if let Some(new) = &intent.new {
            w.doc("new", new);
        }
        match &intent.base_after {
            after if *after == intent.new => w.bool("after_is_new", true),
            Some(after) => w.doc("after", after),
            None => w,
        };
        put_binary(w, "digest", intent.digest.as_ref().map(|d| d.as_slice()));
        let fields = intent.fields.as_ref().map(|f| f.join(&0));
        put_binary(w, "fields", fields.as_deref());
        let receipt = intent.receipt.map(Receipt::to_bytes);
        put_binary(w, "receipt", receipt.as_deref());
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let content = |name: &str| raw::get(bytes, name.as_bytes()).map(|e| e.value.to_vec());
        let is = |name: &str| raw::get(bytes, name.as_bytes()).is_some();
        // Length and subtype stand in front.
        let binary = |name: &str| Some(raw::get(bytes, name.as_bytes())?.value.get(5..)?.to_vec());
        let side = raw::get(bytes, b"side").and_then(|e| raw::text(&e));
        let intent = side.map(|side| {
            let new = content("new");
            Intent {
                side: match side == Side::Local.name() {
                    true => Side::Local,
                    false => Side::Remote,
                },
                base_after: match is("after_is_new") {
                    true => new.clone(),
                    false => content("after"),
                },
                new,
                digest: binary("digest").and_then(|d| d.try_into().ok()),
                fields: binary("fields")
                    .map(|f| f.split(|b| *b == 0).map(<[u8]>::to_vec).collect()),
                // Not of this daemon's runs.
                epoch: 0,
                receipt: binary("receipt").and_then(|r| Receipt::of_bytes(&r)),
            }
        });
        Some(Self {
            id: Id::from_element(&raw::get(bytes, b"id")?),
            base: (!is("large")).then(|| content("base")),
            intent,
            record: content("record").map(|record| {
                let gone = binary("gone").and_then(|gone| gone.try_into().ok());
                (record, gone)
            }),
            change: 0,
        })
    }
}

fn put_binary(w: &mut Writer, name: &str, bytes: Option<&[u8]>) {
    if let Some(bytes) = bytes {
        let len = i32::try_from(bytes.len()).expect("a few names");
        let value = [&len.to_le_bytes(), [0].as_slice(), bytes].concat();
        w.value(name, 0x05, &value);
    }
}

/// Entries as a note carries them: a BSON array, packed with zstd.
pub(super) fn pack<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<u8> {
    let mut w = Writer::new();
    for (i, entry) in entries.enumerate() {
        w.open(index_name(i));
        entry.write(&mut w);
        w.close();
    }
    // Fails only without memory; what can't be read is left out by the others.
    zstd::bulk::compress(&w.finish(), 1).unwrap_or_default()
}

/// The reverse of [`pack`]; `None` when they can't be read.
pub(super) fn unpack(packed: &[u8]) -> Option<Vec<Entry>> {
    let raw = zstd::bulk::decompress(packed, UNPACKED).ok()?;
    raw::elements(&raw)
        .map(|e| Entry::read(e.ok()?.value))
        .collect()
}

/// Where an entry stands: term, number of the note, place within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) epoch: i64,
    pub(super) n: i64,
    pub(super) at: u32,
}

/// What became of writes whose entries stand one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) epoch: i64,
    pub(super) n: i64,
    /// The first, and the one after the last.
    pub(super) from: u32,
    pub(super) to: u32,
    pub(super) done: bool,
}

impl Run {
    /// Bytes of one in a note.
    pub(super) const BYTES: usize = 25;

    /// Of a whole note: nothing of it was sent, and it may not even be there.
    pub(super) fn void(epoch: i64, n: i64) -> Self {
        Self {
            epoch,
            n,
            from: 0,
            to: u32::MAX,
            done: false,
        }
    }

    /// Adds what became of one write.
    pub(super) fn add(runs: &mut Vec<Self>, place: Place, done: bool) {
        let next = |run: &&mut Self| {
            (run.epoch, run.n, run.to, run.done) == (place.epoch, place.n, place.at, done)
        };
        match runs.last_mut().filter(next) {
            Some(run) => run.to += 1,
            None => runs.push(Self {
                epoch: place.epoch,
                n: place.n,
                from: place.at,
                to: place.at + 1,
                done,
            }),
        }
    }

    /// As a note carries them.
    pub(super) fn pack(runs: &[Self]) -> Vec<u8> {
        let mut out = Vec::with_capacity(runs.len() * Self::BYTES);
        for run in runs {
            out.extend_from_slice(&run.epoch.to_le_bytes());
            out.extend_from_slice(&run.n.to_le_bytes());
            out.extend_from_slice(&run.from.to_le_bytes());
            out.extend_from_slice(&run.to.to_le_bytes());
            out.push(run.done.into());
        }
        out
    }

    /// The reverse of [`Run::pack`].
    pub(super) fn unpack(packed: &[u8]) -> Vec<Self> {
        let run = |bytes: &[u8]| {
            let (epoch, rest) = bytes.split_first_chunk::<8>()?;
            let (n, rest) = rest.split_first_chunk::<8>()?;
            let (from, rest) = rest.split_first_chunk::<4>()?;
            let (to, rest) = rest.split_first_chunk::<4>()?;
            Some(Self {
                epoch: i64::from_le_bytes(*epoch),
                n: i64::from_le_bytes(*n),
                from: u32::from_le_bytes(*from),
                to: u32::from_le_bytes(*to),
                done: rest.first().is_some_and(|done| *done != 0),
            })
        };
        packed.chunks_exact(Self::BYTES).filter_map(run).collect()
    }
}

/// The key of an entry's document in this daemon's own numbering.
pub(super) fn key(ns: u32, entry: &Entry) -> Key {
    Key::new(ns, &entry.id)
}

#[cfg(test)]
mod tests {
    use bson::doc;
    use bson::oid::ObjectId;

    use super::*;

    fn bytes(d: bson::Document) -> Vec<u8> {
        d.to_vec().unwrap()
    }

    fn intent(new: Option<Vec<u8>>, after: Option<Vec<u8>>) -> Intent {
        Intent {
            side: Side::Remote,
            new,
            digest: None,
            base_after: after,
            fields: Some(vec![b"a".to_vec(), b"b c".to_vec()]),
            epoch: 0,
            receipt: Some(Receipt {
                lane: ObjectId::new(),
                number: 7,
            }),
        }
    }

    #[test]
    fn entries_survive_a_note() {
        let (a, b) = (
            bytes(doc! {"_id": 1.5, "a": 1}),
            bytes(doc! {"_id": 1.5, "a": 2}),
        );
        let id = Id::of(&a).unwrap();
        let of = |base: Option<&Vec<u8>>, new: Option<&Vec<u8>>, after: Option<&Vec<u8>>| {
            Entry::of(
                id.clone(),
                base.cloned(),
                intent(new.cloned(), after.cloned()),
            )
        };
        let mut plain = of(Some(&a), Some(&b), Some(&b));
        if let Some(intent) = &mut plain.intent {
            (intent.side, intent.fields, intent.receipt) = (Side::Local, None, None);
        }
        let all = vec![
            plain,
            of(None, Some(&b), Some(&b)),
            of(Some(&a), None, None),
            of(Some(&a), Some(&b), Some(&a)),
            of(Some(&a), Some(&b), None),
            of(Some(&a), None, Some(&a)).with_record(&b, Some([7; 32])),
            of(Some(&a), Some(&b), Some(&b)).with_record(&b, None),
            Entry::told(id.clone(), Some(b.clone()), 0),
            Entry::told(id.clone(), None, 0),
        ];
        assert_eq!(unpack(&pack(all.iter())).unwrap(), all);
        assert_eq!(unpack(b"nonsense"), None);
    }

    #[test]
    fn of_large_contents_only_the_digest_is_put_down() {
        let large = bytes(doc! {"_id": 1, "a": "x".repeat(3 << 20)});
        let id = Id::of(&large).unwrap();
        let change = Entry::of(
            id.clone(),
            Some(large.clone()),
            intent(Some(large.clone()), Some(large.clone())),
        );
        let left = change.intent.clone().unwrap();
        assert_eq!((left.new, left.digest), (None, Some(digest(&large))));
        assert_eq!((change.base.clone(), change.base_after()), (None, None));
        assert_eq!(unpack(&pack([&change].into_iter())).unwrap(), [change]);
        let gone = Entry::of(
            id,
            Some([large.clone(), large].concat()),
            intent(None, None),
        );
        assert_eq!(gone.base_after(), Some(None), "of a deletion base is known");
    }

    #[test]
    fn outcomes_of_neighbours_are_one_run() {
        let place = |n, at| Place { epoch: 3, n, at };
        let mut runs = vec![Run::void(2, 9)];
        for (n, at, done) in [
            (1, 0, true),
            (1, 1, true),
            (1, 2, false),
            (1, 4, false),
            (2, 5, false),
        ] {
            Run::add(&mut runs, place(n, at), done);
        }
        let spans: Vec<_> = runs.iter().map(|r| (r.n, r.from, r.to, r.done)).collect();
        let wanted = [
            (9, 0, u32::MAX, false),
            (1, 0, 2, true),
            (1, 2, 3, false),
            (1, 4, 5, false),
            (2, 5, 6, false),
        ];
        assert_eq!(spans, wanted);
        assert_eq!(Run::unpack(&Run::pack(&runs)), runs);
    }
}
