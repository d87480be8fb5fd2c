//! Base: what both sides agreed on.

use rusqlite::types::ValueRef;
use rusqlite::{CachedStatement, Connection, OptionalExtension, params};

use super::dictionaries::{self, Dictionaries, Packer};
use super::together::Together;
use crate::decide::Side;
use crate::key::Key;

/// Below this a body is kept plain: zstd's frame would eat the gain.
const PLAIN_BELOW: usize = 96;
/// The same where there is a dictionary.
const PLAIN_BELOW_DICTIONARY: usize = 40;

/// A content kept plain; the marker of its stored form.
const PLAIN: u8 = 0;
/// A content kept compressed.
const ZSTD: u8 = 1;

/// Of a document in base that a side let go of by itself (R15): added to the marker.
const LEFT_LOCAL: u8 = 0x10;
/// The same for the remote.
const LEFT_REMOTE: u8 = 0x20;

/// 16 MiB is the server's limit for a document; its own bodies may exceed it by 16 KiB.
const LARGEST: u64 = 17 << 20;

const ADD: Together = Together {
    head: "INSERT OR IGNORE INTO base(key, body) VALUES ",
    row: "(?, ?)",
    tail: "",
};

const PUT: Together = Together {
    head: "INSERT OR REPLACE INTO base(key, body) VALUES ",
    ..ADD
};

/// A content of a collection as the store keeps it: marker, checksum, bytes (zstd unless it is small).
/// For the store's own thread.
pub(crate) fn encode(ns: u32, content: &[u8]) -> Vec<u8> {
    Dictionaries::mine().packer(ns).encode(content)
}

impl Packer<'_> {
    /// [`put_encoded`]'s form of a content of the collection.
    pub(crate) fn encode(&self, content: &[u8]) -> Vec<u8> {
        let keep =
            |packed: &[u8]| (packed.len() < content.len()).then(|| stored(ZSTD, content, packed));
        let packed = if content.len() < PLAIN_BELOW_DICTIONARY {
            None
        } else if let Some(packed) = self.pack(content, keep) {
            packed
        } else if content.len() < PLAIN_BELOW {
            None
        } else {
            dictionaries::compress(content, None, keep).flatten()
        };
        packed.unwrap_or_else(|| encode_plain(content))
    }
}

/// The same without compression, for what is gone again in a moment.
pub(super) fn encode_plain(content: &[u8]) -> Vec<u8> {
    stored(PLAIN, content, content)
}

fn stored(marker: u8, content: &[u8], bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() + 9);
    out.push(marker);
    out.extend_from_slice(&xxhash_rust::xxh3::xxh3_64(content).to_le_bytes());
    out.extend_from_slice(bytes);
    out
}

/// The reverse of `Dictionaries::encode`, on the store's own thread; `None` when the bytes were
/// damaged on disk.
pub fn decode(stored: &[u8]) -> Option<Vec<u8>> {
    let (marker, rest) = stored.split_first()?;
    let (sum, bytes) = rest.split_at_checked(8)?;
    let content = match *marker & !(LEFT_LOCAL | LEFT_REMOTE) {
        ZSTD => {
            let size = zstd::zstd_safe::get_frame_content_size(bytes).ok()??;
            let size = usize::try_from(Some(size).filter(|s| *s <= LARGEST)?).ok()?;
            Dictionaries::mine().unpack(bytes, size)?
        }
        PLAIN => bytes.to_vec(),
        _ => return None,
    };
    (xxhash_rust::xxh3::xxh3_64(&content).to_le_bytes() == *sum).then_some(content)
}

/// Tells contents apart without keeping them.
pub fn digest(content: &[u8]) -> [u8; 32] {
    *blake3::hash(content).as_bytes()
}

/// The base content of a key. A damaged row reads as no base.
pub fn get(c: &Connection, key: &Key) -> rusqlite::Result<Option<Vec<u8>>> {
    let row = c
        .prepare_cached("SELECT body FROM base WHERE key = ?")?
        .query_row([key.as_bytes()], |r| Ok(decode(r.get_ref(0)?.as_blob()?)))
        .optional()?;
    Ok(row.flatten())
}

/// The base content of a key, with the side that let go of the document by itself, if one did.
pub fn get_marked(c: &Connection, key: &Key) -> rusqlite::Result<(Option<Vec<u8>>, Option<Side>)> {
    next_marked(&mut marked(c)?, key)
}

/// What [`next_marked`] reads base with.
pub(super) fn marked(c: &Connection) -> rusqlite::Result<CachedStatement<'_>> {
    c.prepare_cached("SELECT body FROM base WHERE key = ?")
}

/// The same as [`get_marked`], of many keys one after the other.
pub(super) fn next_marked(
    marked: &mut CachedStatement<'_>,
    key: &Key,
) -> rusqlite::Result<(Option<Vec<u8>>, Option<Side>)> {
    let row = marked
        .query_row([key.as_bytes()], |r| {
            let body = r.get_ref(0)?.as_blob()?;
            let left = match body.first().map_or(0, |m| m & (LEFT_LOCAL | LEFT_REMOTE)) {
                LEFT_LOCAL => Some(Side::Local),
                LEFT_REMOTE => Some(Side::Remote),
                _ => None,
            };
            Ok((decode(body), left))
        })
        .optional()?;
    Ok(row.unwrap_or_default())
}

/// Marks a document in base as let go of by a side, or takes that back. A new content has no mark.
pub fn mark_left(c: &Connection, key: &Key, by: Option<Side>) -> rusqlite::Result<()> {
    let body: Option<Vec<u8>> = c
        .prepare_cached("SELECT body FROM base WHERE key = ?")?
        .query_row([key.as_bytes()], |r| r.get(0))
        .optional()?;
    let Some(mut body) = body else { return Ok(()) };
    if let Some(marker) = body.first_mut() {
        let mark = match by {
            Some(Side::Local) => LEFT_LOCAL,
            Some(Side::Remote) => LEFT_REMOTE,
            None => 0,
        };
        *marker = (*marker & !(LEFT_LOCAL | LEFT_REMOTE)) | mark;
    }
    put_encoded(c, key, Some(&body))
}

/// The hash that [`hash`] makes of the base content of a key, without reading the content.
pub fn get_hash(c: &Connection, key: &Key) -> rusqlite::Result<Option<u64>> {
    let row = c
        .prepare_cached("SELECT body FROM base WHERE key = ?")?
        .query_row([key.as_bytes()], |r| Ok(hash_of(r.get_ref(0)?.as_blob()?)))
        .optional()?;
    Ok(row.flatten())
}

/// What [`get_hash`] would tell of an encoded content.
pub fn hash_of(encoded: &[u8]) -> Option<u64> {
    let sum = encoded.get(1..9)?;
    Some(u64::from_le_bytes(sum.try_into().ok()?))
}

/// What [`get_hash`] would tell of that content.
pub fn hash(content: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(content)
}

/// Sets base where there is none; whether there was none for any of them.
pub fn add_encoded(c: &Connection, rows: &[(&Key, &[u8])]) -> rusqlite::Result<bool> {
    let added = ADD.run(c, rows, row)?;
    Ok(added == rows.len())
}

/// Sets base; `None` removes it.
pub fn put(c: &Connection, key: &Key, content: Option<&[u8]>) -> rusqlite::Result<()> {
    let encoded = content.map(|content| encode(key.ns(), content));
    put_encoded(c, key, encoded.as_deref())
}

/// The same with what `Dictionaries::encode` made of the content, so that the store's thread is spared it.
pub fn put_encoded(c: &Connection, key: &Key, encoded: Option<&[u8]>) -> rusqlite::Result<()> {
    match encoded {
        Some(encoded) => c
            .prepare_cached("INSERT OR REPLACE INTO base(key, body) VALUES(?, ?)")?
            .execute(params![key.as_bytes(), encoded])?,
        None => c
            .prepare_cached("DELETE FROM base WHERE key = ?")?
            .execute([key.as_bytes()])?,
    };
    Ok(())
}

/// The same for many keys.
pub fn put_all_encoded(c: &Connection, rows: &[(&Key, &[u8])]) -> rusqlite::Result<()> {
    PUT.run(c, rows, row).map(drop)
}

fn row<'a>((key, encoded): &'a (&Key, &[u8])) -> [ValueRef<'a>; 2] {
    [ValueRef::Blob(key.as_bytes()), ValueRef::Blob(encoded)]
}

/// Keys and contents of a namespace in the order of their bytes, behind `after` (empty: from the
/// first).
pub fn keys_after(
    c: &Connection,
    ns: u32,
    after: &[u8],
    limit: u32,
) -> rusqlite::Result<Vec<(Key, Option<Vec<u8>>)>> {
    let first = ns.to_be_bytes().to_vec();
    let end = (ns + 1).to_be_bytes().to_vec();
    let after = if after.is_empty() { &first } else { after };
    c.prepare_cached("SELECT key, body FROM base WHERE key > ? AND key < ? ORDER BY key LIMIT ?")?
        .query_map(params![after, end, limit], |r| {
            Ok((
                Key::from_bytes(r.get_ref(0)?.as_blob()?),
                decode(r.get_ref(1)?.as_blob()?),
            ))
        })?
        .collect()
}
