//! Legacy: what the holder before may have written, and this daemon has not seen settled.
//!
//! Before a holder writes documents it puts down, in the local database, a token for each: a digest of
//! the document key, the side and the content that it shall have there. To the next holder these are
//! what intents are to a daemon that starts again (R3): a side that holds just what was to be written
//! there holds it by the last holder's hand, so that content is the base, however the other side has
//! changed since. Without them an edit that was sent and taken back at once would come back, and an
//! edit that followed one just sent would be a false conflict.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use bson::oid::ObjectId;
use bson::spec::BinarySubtype;
use bson::{Binary, DateTime, RawDocumentBuf, doc};

use super::{COLLECTION, Lease};
use crate::decide::Side;
use crate::failure::Failure;
use crate::guard::Write;
use crate::key::Key;
use crate::shared::lock;
use crate::side::Endpoint;

/// How long a token is kept while its writer lives, in ms: far longer than a standby is behind.
const KEEP: i64 = 120_000;

/// Bytes of a token.
const TOKEN: usize = 16;

type Token = [u8; TOKEN];

/// What is known of the last holder's writes.
#[derive(Debug, Default)]
pub(crate) struct Legacy {
    tokens: Mutex<HashSet<Token>>,
    /// From the take-over until all of it is settled.
    open: AtomicBool,
}

/// `content` without sync fields; `None`: no such document.
fn token(side: Side, (db, coll): (&str, &str), key: &Key, content: Option<&[u8]>) -> Token {
    let mut hash = blake3::Hasher::new();
    for part in [db.as_bytes(), &[0], coll.as_bytes(), &[0, side as u8]] {
        hash.update(part);
    }
    // The number of the namespace is each daemon's own.
    let id = &key.as_bytes()[4..];
    hash.update(&(id.len() as u64).to_le_bytes()).update(id);
    hash.update(&[u8::from(content.is_some())]);
    hash.update(content.unwrap_or_default());
    let mut token = [0; TOKEN];
    token.copy_from_slice(&hash.finalize().as_bytes()[..TOKEN]);
    token
}

impl Legacy {
    /// Whether anything of the last holder may be unsettled: both sides are to be read then.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Whether the last holder was about to give the document this content on that side.
    pub(crate) fn holds(&self, side: Side, ns: (&str, &str), key: &Key, content: Option<&[u8]>) -> bool {
        self.is_open() && lock(&self.tokens).contains(&token(side, ns, key, content))
    }

    /// All is settled.
    pub(super) fn close(&self) {
        self.open.store(false, Ordering::Release);
        lock(&self.tokens).clear();
    }
}

/// Puts down what is about to be written to one collection, acknowledged by a majority.
pub(crate) async fn announce(
    lease: &Lease,
    side: Side,
    ns: (&str, &str),
    writes: impl Iterator<Item = &Write>,
) -> Result<(), Failure> {
    let (Some(local), Some(now)) = (lease.local.upgrade(), lease.local_time()) else {
        return Err(Failure::standby());
    };
    let tokens: Vec<u8> = writes
        .flat_map(|w| token(side, ns, &w.key, w.new.as_deref()))
        .collect();
    let note = doc! {
        "_id": ObjectId::new(), "of": &lease.pair, "at": DateTime::from_millis(now),
        "tokens": Binary { subtype: BinarySubtype::Generic, bytes: tokens },
    };
    let command = doc! {
        "insert": COLLECTION, "documents": [note], "maxTimeMS": 3000,
        "writeConcern": {"w": "majority", "wtimeout": 3000},
    };
    let reply = local.run_doc(&lease.db, command).await?;
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
        "projection": {"tokens": 1}, "readConcern": {"level": "majority"},
    };
    let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("find"))?;
    let mut found = HashSet::new();
    let each = |d: RawDocumentBuf| {
        if let Ok(tokens) = d.get_binary("tokens") {
            found.extend(
                tokens
                    .bytes
                    .chunks_exact(TOKEN)
                    .filter_map(|t| Token::try_from(t).ok()),
            );
        }
    };
    local.query(&lease.db, raw, each).await?;
    let count = found.len();
    *lock(&lease.legacy.tokens) = found;
    lease.legacy.open.store(true, Ordering::Release);
    Ok(count)
}

/// Forgets what is long settled everywhere.
pub(super) async fn prune(lease: &Lease, local: &Endpoint) -> Result<(), Failure> {
    let Some(now) = lease.local_time() else {
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

    #[test]
    fn a_token_tells_documents_sides_and_contents_apart_but_not_daemons() {
        let id = |n: i32| Id::of(&doc! {"_id": n}.to_vec().unwrap()).unwrap();
        let this = token(Side::Local, ("d", "c"), &Key::new(1, &id(1)), Some(b"x"));
        assert_eq!(
            this,
            token(Side::Local, ("d", "c"), &Key::new(7, &id(1)), Some(b"x"))
        );
        for other in [
            token(Side::Remote, ("d", "c"), &Key::new(1, &id(1)), Some(b"x")),
            token(Side::Local, ("d", "cc"), &Key::new(1, &id(1)), Some(b"x")),
            token(Side::Local, ("d", "c"), &Key::new(1, &id(2)), Some(b"x")),
            token(Side::Local, ("d", "c"), &Key::new(1, &id(1)), Some(b"")),
            token(Side::Local, ("d", "c"), &Key::new(1, &id(1)), None),
        ] {
            assert_ne!(this, other);
        }
    }
}
