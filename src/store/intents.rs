//! Intents: writes that may have happened (R3).
//!
//! Of a write that changed some fields only the difference to base is kept: base stands in the same file
//! and stays as it is until the intent is decided. Where it did not, the digest of the content is left,
//! which is enough to tell whether the content stands there.

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension};

use super::base::{self, decode, encode_plain};
use super::sent;
use super::together::Together;
use crate::content::{self, Diff};
use crate::decide::Side;
use crate::key::Key;
use crate::raw::{self, Writer};
use crate::receipt::Receipt;

/// Only the digest of a content; the marker of its stored form (see [`base`] for the others).
const DIGEST: u8 = 2;
/// The digest of a content, and its difference to base.
const DELTA: u8 = 3;

const DIGEST_BYTES: usize = 16;

/// The digest of no content.
const NOBODYS: [u8; DIGEST_BYTES] = [0; DIGEST_BYTES];

/// Tells contents apart without keeping them. Nobody who could make up two contents of one digest would
/// gain by it: both would be his own.
pub fn digest(content: &[u8]) -> [u8; DIGEST_BYTES] {
    xxhash_rust::xxh3::xxh3_128(content).to_le_bytes()
}

/// A write that was about to be sent (R3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intent {
    /// Where it was written.
    pub side: Side,
    /// The content written; `None` is a deletion, unless there is a `digest`.
    pub new: Option<Vec<u8>>,
    /// The digest of a content that is not kept: of a create, or of a change whose base is gone. If that
    /// content is there, base becomes it.
    pub digest: Option<[u8; DIGEST_BYTES]>,
    /// What base becomes if it happened.
    pub base_after: Option<Vec<u8>>,
    /// Names of the fields it set or removed, when it was sent by field; NUL-separated.
    pub fields: Option<Vec<Vec<u8>>>,
    /// Run of the daemon that sent it.
    pub epoch: i64,
    /// What its transaction leaves behind where it happened; with it nothing is guessed.
    pub receipt: Option<Receipt>,
}

fn side_number(side: Side) -> i64 {
    match side {
        Side::Local => 0,
        Side::Remote => 1,
    }
}

/// An intent as the store keeps it.
#[derive(Debug)]
pub struct Kept {
    pub(super) side: i64,
    pub(super) new: Option<Vec<u8>>,
    pub(super) base_after: Option<Vec<u8>>,
    pub(super) after_is_new: bool,
    pub(super) fields: Option<Vec<u8>>,
    pub(super) epoch: i64,
    pub(super) receipt: Option<Vec<u8>>,
}

impl Intent {
    /// As it is kept. `stored` is the document's base as it stands in the store.
    pub fn kept(&self, stored: Option<&[u8]>) -> Kept {
        let after_is_new = self.base_after == self.new;
        let new = match (&self.digest, self.new.as_deref()) {
            (Some(digest), _) => Some([[DIGEST].as_slice(), digest].concat()),
            (None, Some(new)) => {
                // Where a receipt tells that it happened, the content may have changed since: a digest would
                // not do.
                let by_fields = after_is_new && self.fields.is_some() && self.receipt.is_none();
                let delta = stored.filter(|_| by_fields).and_then(|b| delta(b, new));
                Some(delta.unwrap_or_else(|| encode_plain(new)))
            }
            (None, None) => None,
        };
        Kept {
            side: side_number(self.side),
            new,
            base_after: match after_is_new {
                true => None,
                false => self.base_after.as_deref().map(encode_plain),
            },
            after_is_new,
            fields: self.fields.as_ref().map(|f| f.join(&0)),
            epoch: self.epoch,
            receipt: self.receipt.map(|receipt| receipt.to_bytes().to_vec()),
        }
    }
}

/// Names of the two parts of a stored difference.
const SET: &str = "s";
const UNSET: &str = "u";

/// The stored form of a content that differs little from base.
fn delta(base: &[u8], new: &[u8]) -> Option<Vec<u8>> {
    let diff = content::diff(base, new).ok()?;
    if content::size(&diff) > new.len() / 2 || content::apply(base, &diff) != new {
        return None;
    }
    let mut w = Writer::new();
    w.open(SET);
    for (e, _) in &diff.set {
        w.whole(e.whole);
    }
    w.close().open(UNSET);
    for e in &diff.unset {
        w.whole(e.whole);
    }
    Some([[DELTA].as_slice(), &digest(new), &w.finish()].concat())
}

/// The content that a stored difference makes of base.
fn applied(base: &[u8], delta: &[u8]) -> Option<Vec<u8>> {
    let (set, unset) = (
        raw::get(delta, SET.as_bytes())?,
        raw::get(delta, UNSET.as_bytes())?,
    );
    let set = content::fields(set.value).ok()?;
    let diff = Diff {
        set: set
            .into_iter()
            .map(|e| (e, raw::get(base, e.name)))
            .collect(),
        unset: content::fields(unset.value).ok()?,
    };
    Some(content::apply(base, &diff))
}

const PUT: Together = Together {
    head: "INSERT OR REPLACE INTO intents(key, side, new, base_after, after_is_new, fields, epoch, receipt) VALUES ",
    row: "(?,?,?,?,?,?,?,?)",
    tail: "",
};

/// Stores intents; each replaces one of its key that was decided.
pub fn put_all(c: &Connection, rows: &[(&Key, &Kept)]) -> rusqlite::Result<()> {
    PUT.run(c, rows, |(key, kept)| {
        [
            ValueRef::Blob(key.as_bytes()),
            ValueRef::Integer(kept.side),
            blob(kept.new.as_ref()),
            blob(kept.base_after.as_ref()),
            ValueRef::Integer(kept.after_is_new.into()),
            blob(kept.fields.as_ref()),
            ValueRef::Integer(kept.epoch),
            blob(kept.receipt.as_ref()),
        ]
    })?;
    Ok(())
}

fn blob(bytes: Option<&Vec<u8>>) -> ValueRef<'_> {
    bytes.map_or(ValueRef::Null, |bytes| ValueRef::Blob(bytes))
}

/// Stores an intent, replacing one that was decided.
pub fn put(c: &Connection, key: &Key, intent: &Intent) -> rusqlite::Result<()> {
    put_all(c, &[(key, &intent.kept(None))])
}

/// The undecided intent of a key.
pub fn get(c: &Connection, key: &Key) -> rusqlite::Result<Option<Intent>> {
    let kept = c
        .prepare_cached(
            "SELECT side, new, base_after, after_is_new, fields, epoch, receipt FROM intents WHERE key = ?",
        )?
        .query_row([key.as_bytes()], |r| {
            Ok(Kept {
                side: r.get(0)?,
                new: r.get(1)?,
                base_after: r.get(2)?,
                after_is_new: r.get(3)?,
                fields: r.get(4)?,
                epoch: r.get(5)?,
                receipt: r.get(6)?,
            })
        })
        .optional()?;
    let Some(kept) = kept else { return Ok(None) };
    let (new, digest) = match kept.new.as_deref() {
        Some([DIGEST, digest @ ..]) => (None, digest.try_into().ok()),
        Some([DELTA, rest @ ..]) => of_delta(c, key, rest)?,
        plain => (plain.and_then(decode), None),
    };
    // Damaged, it must not read as a deletion.
    let digest = match (&new, digest) {
        (None, None) if kept.new.is_some() => Some(NOBODYS),
        (_, digest) => digest,
    };
    let base_after = match kept.after_is_new {
        true => new.clone(),
        false => kept.base_after.as_deref().and_then(decode),
    };
    let fields = kept.fields.as_deref();
    Ok(Some(Intent {
        side: if kept.side == 0 {
            Side::Local
        } else {
            Side::Remote
        },
        new,
        digest,
        base_after,
        fields: fields.map(|f| f.split(|b| *b == 0).map(<[u8]>::to_vec).collect()),
        epoch: kept.epoch,
        receipt: kept.receipt.as_deref().and_then(Receipt::of_bytes),
    }))
}

/// A content, or its digest.
type Content = (Option<Vec<u8>>, Option<[u8; DIGEST_BYTES]>);

fn of_delta(c: &Connection, key: &Key, stored: &[u8]) -> rusqlite::Result<Content> {
    let Some((wanted, delta)) = stored.split_first_chunk::<DIGEST_BYTES>() else {
        return Ok((None, None));
    };
    let base = base::get(c, key)?;
    let new = base.and_then(|base| applied(&base, delta));
    Ok(match new.filter(|new| digest(new) == *wanted) {
        Some(new) => (Some(new), None),
        None => (None, Some(*wanted)),
    })
}

/// The keys of all intents that have a row of their own.
pub fn keys(c: &Connection) -> rusqlite::Result<Vec<Key>> {
    c.prepare_cached("SELECT key FROM intents")?
        .query_map([], |r| Ok(Key::from_bytes(r.get_ref(0)?.as_blob()?)))?
        .collect()
}

/// Whether a key has an undecided intent.
pub fn is_open(c: &Connection, key: &Key) -> rusqlite::Result<bool> {
    let kept = c
        .prepare_cached("SELECT EXISTS(SELECT 1 FROM intents WHERE key = ?)")?
        .query_row([key.as_bytes()], |r| r.get(0))?;
    Ok(kept || sent::has(c, key)?)
}

/// Whether any write is undecided.
pub fn any(c: &Connection) -> rusqlite::Result<bool> {
    c.prepare_cached("SELECT EXISTS(SELECT 1 FROM intents) OR EXISTS(SELECT 1 FROM sent)")?
        .query_row([], |r| r.get(0))
}

/// Forgets all of them.
pub fn forget_every(c: &Connection) -> rusqlite::Result<()> {
    c.execute_batch("DELETE FROM intents; DELETE FROM sent")
}

/// The receipts of all undecided intents; one with a receipt has a row of its own from the start.
pub fn receipts(c: &Connection) -> rusqlite::Result<Vec<Receipt>> {
    let mut rows = c.prepare("SELECT receipt FROM intents WHERE receipt IS NOT NULL")?;
    let found = rows.query_map([], |r| Ok(Receipt::of_bytes(r.get_ref(0)?.as_blob()?)))?;
    Ok(found
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .flatten()
        .collect())
}

/// Forgets the intent of a key: it was decided.
pub fn forget(c: &Connection, key: &Key) -> rusqlite::Result<()> {
    forget_all(c, &[key])
}

const FORGET: Together = Together {
    head: "DELETE FROM intents WHERE key IN (",
    row: "?",
    tail: ")",
};

/// The same for many keys.
pub fn forget_all(c: &Connection, keys: &[&Key]) -> rusqlite::Result<()> {
    FORGET
        .run(c, keys, |key| [ValueRef::Blob(key.as_bytes())])
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Id;
    use crate::store::Store;
    use bson::{Document, doc};

    fn bytes(d: Document) -> Vec<u8> {
        d.to_vec().unwrap()
    }

    fn large(fields: Document) -> Vec<u8> {
        let mut all = doc! {"_id": 1, "text": "x".repeat(2000)};
        all.extend(fields);
        bytes(all)
    }

    fn intent(new: &[u8], fields: &[&str]) -> Intent {
        Intent {
            side: Side::Remote,
            new: Some(new.to_vec()),
            digest: None,
            base_after: Some(new.to_vec()),
            fields: Some(fields.iter().map(|f| f.as_bytes().to_vec()).collect()),
            epoch: 1,
            receipt: None,
        }
    }

    /// What the store gives back of an intent that was kept beside one base and is read beside another;
    /// and how many bytes of it were kept.
    async fn kept(intent: &Intent, then: &[u8], now: Option<&[u8]>) -> (Intent, usize) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let key = Key::new(1, &Id::of(&bytes(doc! {"_id": 1})).unwrap());
        let (kept, now) = (intent.kept(Some(then)), now.map(<[u8]>::to_vec));
        let size = kept.new.as_ref().map_or(0, Vec::len);
        let read = store.call(move |c| {
            base::put(c, &key, now.as_deref())?;
            put_all(c, &[(&key, &kept)])?;
            get(c, &key)
        });
        (read.await.unwrap().unwrap(), size)
    }

    #[tokio::test]
    async fn r3_of_a_small_change_the_difference_is_kept() {
        let base = large(doc! {"a": 1, "b": 2, "c": {"x": 1}});
        for new in [
            large(doc! {"a": 7, "b": 2, "c": {"x": 1}}),
            large(doc! {"a": 1, "c": {"x": 2}, "d": "new"}),
            large(doc! {}),
        ] {
            let intent = intent(&new, &["a", "b", "c", "d"]);
            let (read, size) = kept(&intent, &base, Some(&base)).await;
            assert_eq!(read, intent);
            assert!(size < 150, "{size} bytes");
        }
    }

    #[tokio::test]
    async fn r3_what_no_difference_by_field_tells_is_kept_whole() {
        let base = large(doc! {"a": 1, "b": 2});
        let reordered = large(doc! {"b": 2, "a": 1});
        let mut other = intent(&large(doc! {"a": 7}), &["a"]);
        other.base_after = Some(base.clone());
        for intent in [intent(&reordered, &["a"]), other] {
            let (read, size) = kept(&intent, &base, Some(&base)).await;
            assert_eq!(read, intent);
            assert!(size > 2000, "{size} bytes");
        }
    }

    #[tokio::test]
    async fn r3_beside_another_base_the_digest_is_left() {
        let base = large(doc! {"a": 1, "b": 2});
        let new = large(doc! {"a": 7, "b": 2});
        let other = large(doc! {"a": 1, "b": 3});
        for now in [None, Some(other.as_slice())] {
            let (read, _) = kept(&intent(&new, &["a"]), &base, now).await;
            assert_eq!((read.new, read.base_after), (None, None));
            assert_eq!(read.digest, Some(digest(&new)));
        }
    }
}
