//! Legacy: what the holder before may have written, and this daemon has not seen settled.
//!
//! Before a holder writes documents it puts down, in the local database, a token for each: digests of
//! the document key with the side, and of the content that it shall have there. To the next holder these are
//! what intents are to a daemon that starts again (R3): a side that holds just what was to be written
//! there holds it by the last holder's hand, so that content is the base, however the other side has
//! changed since. Without them an edit that was sent and taken back at once would come back, and an
//! edit that followed one just sent would be a false conflict.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use bson::oid::ObjectId;
use bson::spec::BinarySubtype;
use bson::{Binary, DateTime, RawDocumentBuf, doc};

use super::{COLLECTION, Lease};
use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::guard::Write;
use crate::key::Key;
use crate::shared::lock;
use crate::side::Endpoint;

/// How long a token is kept while its writer lives, in ms: far longer than a standby is behind.
const KEEP: i64 = 120_000;

/// Half a token: which document on which side, and which content.
type Half = [u8; 16];

/// What is known of the last holder's writes.
#[derive(Debug, Default)]
pub(crate) struct Legacy {
    /// Contents that a document was to have on a side, in the order of the writes.
    written: Mutex<HashMap<Half, Vec<Half>>>,
    /// From the take-over until all of it is settled.
    open: AtomicBool,
}

fn half(hash: &blake3::Hasher) -> Half {
    let mut half = Half::default();
    half.copy_from_slice(&hash.finalize().as_bytes()[..16]);
    half
}

/// Which document on which side.
fn place(side: Side, (db, coll): (&str, &str), key: &Key) -> Half {
    let mut hash = blake3::Hasher::new();
    for part in [db.as_bytes(), &[0], coll.as_bytes(), &[0, side as u8]] {
        hash.update(part);
    }
    // The number of the namespace is each daemon's own.
    hash.update(&key.as_bytes()[4..]);
    half(&hash)
}

/// A content without sync fields; `None`: no such document.
fn content_of(content: Option<&[u8]>) -> Half {
    let mut hash = blake3::Hasher::new();
    hash.update(&[u8::from(content.is_some())]);
    hash.update(content.unwrap_or_default());
    half(&hash)
}

impl Legacy {
    /// Whether anything of the last holder may be unsettled: both sides are to be read then.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// What the last holder was about to write to a document and this daemon has not settled. Only at
    /// the first look: from then on this daemon knows the document by itself.
    pub(crate) fn take(&self, ns: (&str, &str), key: &Key, base: Option<&[u8]>) -> Written {
        let mut written = lock(&self.written);
        let base = content_of(base);
        let mut of = |side| {
            let mut all = written.remove(&place(side, ns, key)).unwrap_or_default();
            // Up to what this daemon has seen settled it is old.
            let old = all.iter().rposition(|content| *content == base);
            all.drain(..old.map_or(0, |at| at + 1));
            all
        };
        Written([of(Side::Local), of(Side::Remote)])
    }

    /// All is settled.
    pub(super) fn close(&self) {
        self.open.store(false, Ordering::Release);
        lock(&self.written).clear();
    }
}

/// What the last holder was about to write to one document, by side.
pub(crate) struct Written([Vec<Half>; 2]);

impl Written {
    /// Whether that side was to have this content.
    pub(crate) fn holds(&self, side: Side, content: Option<&[u8]>) -> bool {
        let all = &self.0[side as usize];
        !all.is_empty() && all.contains(&content_of(content))
    }
}

/// Puts down what is about to be written to one collection, acknowledged by a majority. After a failure
/// nothing may be sent; it says nothing of the side that was to be written to.
pub(crate) async fn announce(
    lease: &Lease,
    side: Side,
    ns: (&str, &str),
    writes: impl Iterator<Item = &Write>,
) -> Result<(), Failure> {
    let local = lease.local.upgrade();
    let (Some(local), Some((epoch, now))) = (local, lease.term_and_time()) else {
        return Err(Failure::standby());
    };
    let tokens: Vec<u8> = writes
        .flat_map(|w| [place(side, ns, &w.key), content_of(w.new.as_deref())].concat())
        .collect();
    let note = doc! {
        "_id": ObjectId::new(), "of": &lease.pair, "at": DateTime::from_millis(now),
        "epoch": epoch, "n": lease.announced.fetch_add(1, Ordering::Relaxed),
        "tokens": Binary { subtype: BinarySubtype::Generic, bytes: tokens },
    };
    let command = doc! {
        "insert": COLLECTION, "documents": [note], "maxTimeMS": 3000,
        "writeConcern": {"w": "majority", "wtimeout": 3000},
    };
    let reply = local.run_doc(&lease.db, command).await;
    let reply = reply.map_err(|failure| Failure {
        class: Class::Transient,
        answered: true,
        ..failure
    })?;
    if reply.contains_key("writeErrors") || reply.contains_key("writeConcernError") {
        return Err(
            Failure::from_code(64, "what is to be written can't be put down").of(Side::Local),
        );
    }
    Ok(())
}

/// Reads what the last holder has left.
pub(super) async fn load(
    lease: &Lease,
    local: &std::sync::Arc<Endpoint>,
) -> Result<usize, Failure> {
    let command = doc! {
        "find": COLLECTION, "filter": {"of": &lease.pair, "tokens": {"$exists": true}},
        "projection": {"tokens": 1}, "sort": {"epoch": 1, "n": 1}, "readConcern": {"level": "majority"},
    };
    let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("find"))?;
    let (mut found, mut count): (HashMap<Half, Vec<Half>>, _) = (HashMap::new(), 0);
    let each = |d: RawDocumentBuf| {
        let tokens = d.get_binary("tokens").map(|tokens| tokens.bytes);
        for token in tokens.unwrap_or_default().chunks_exact(32) {
            let (place, content) = token.split_at(16);
            if let (Ok(place), Ok(content)) = (place.try_into(), content.try_into()) {
                found.entry(place).or_default().push(content);
                count += 1;
            }
        }
    };
    local.query(&lease.db, raw, each).await?;
    *lock(&lease.legacy.written) = found;
    lease.legacy.open.store(true, Ordering::Release);
    Ok(count)
}

/// Forgets what is long settled everywhere.
pub(super) async fn prune(lease: &Lease, local: &Endpoint) -> Result<(), Failure> {
    let Some((_, now)) = lease.term_and_time() else {
        return Ok(());
    };
    let old = doc! {"of": &lease.pair, "at": {"$lt": DateTime::from_millis(now - KEEP)}};
    let command = doc! {"delete": COLLECTION, "deletes": [{"q": old, "limit": 0}]};
    local.run_doc(&lease.db, command).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Id;

    fn key(ns: u32, n: i32) -> Key {
        let id = Id::of(&doc! {"_id": n}.to_vec().unwrap()).unwrap();
        Key::new(ns, &id)
    }

    #[test]
    fn a_place_tells_documents_and_sides_apart_but_not_daemons() {
        let this = place(Side::Local, ("d", "c"), &key(1, 1));
        assert_eq!(this, place(Side::Local, ("d", "c"), &key(7, 1)));
        for other in [
            place(Side::Remote, ("d", "c"), &key(1, 1)),
            place(Side::Local, ("d", "cc"), &key(1, 1)),
            place(Side::Local, ("d", "c"), &key(1, 2)),
        ] {
            assert_ne!(this, other);
        }
        assert_ne!(content_of(None), content_of(Some(b"")));
    }

    #[test]
    fn only_what_was_written_after_base_counts_and_only_once() {
        let ns = ("d", "c");
        let legacy = Legacy::default();
        let all = [Some("1"), None, Some("2"), Some("3")];
        let all = all.map(|c: Option<&str>| content_of(c.map(str::as_bytes)));
        let at = place(Side::Remote, ns, &key(1, 1));
        lock(&legacy.written).insert(at, all.to_vec());
        let written = legacy.take(ns, &key(1, 1), None);
        assert!(!written.holds(Side::Remote, Some(b"1")) && !written.holds(Side::Remote, None));
        assert!(written.holds(Side::Remote, Some(b"2")) && written.holds(Side::Remote, Some(b"3")));
        assert!(!written.holds(Side::Local, Some(b"2")));
        let again = legacy.take(ns, &key(1, 1), None);
        assert!(!again.holds(Side::Remote, Some(b"2")));
    }
}
