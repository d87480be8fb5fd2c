//! Conflicts on record: what clashed, all versions whole, and what settled it (R19, R21).

use bson::{Bson, oid::ObjectId};
use rusqlite::Connection;
use xxhash_rust::xxh3::xxh3_64;

use crate::content::strip;
use crate::decide::{self, Kind, Side};
use crate::guard::Duplicate;
use crate::key::{Id, Key};
use crate::raw::{self, Writer};
use crate::store;
use crate::store::base;
use crate::store::cases::{self, Case};
use crate::store::queue::{self, Work};
use crate::store::records::{self, OpenConflict};

/// Everything a record says of a clash.
#[derive(Clone, Debug)]
pub struct Found {
    /// Which document.
    pub key: Key,
    /// What kind of clash.
    pub kind: Kind,
    /// Collection as shown.
    pub collection: String,
    /// The document on the local side: its `_id`, whole, as it stands there.
    pub local: Option<(Id, Vec<u8>)>,
    /// The same on the remote.
    pub remote: Option<(Id, Vec<u8>)>,
    /// The content both had agreed on.
    pub base: Option<Vec<u8>>,
    /// Fields in conflict.
    pub fields: Vec<String>,
    /// The document that holds the unique value, for `unique_field`.
    pub other: Option<Key>,
    /// Words for a person.
    pub notes: String,
    /// Names of the sync fields, which are no part of the version.
    pub sync_fields: Vec<String>,
}

/// Most bytes of bodies in one record; a record is a document and has the server's limit of 16 MiB.
pub(crate) const BODIES: usize = 15 << 20;

/// Most bytes of a value shown by itself; the documents have it whole.
const VALUE: usize = 256 << 10;

impl Found {
    /// The clash of a unique index: `key` can't be written to `to`, where `blocker` holds the value.
    pub fn unique(
        work: &Work,
        collection: String,
        to: Side,
        ours: &[u8],
        (blocker, holder): (Key, &[u8]),
        (dup, sync_fields): (&Duplicate, &[String]),
    ) -> Self {
        let here = (work.id.clone(), ours.to_vec());
        let there = Id::of(holder).map(|id| (id, holder.to_vec()));
        let (local, remote) = match to {
            Side::Remote => (Some(here), there),
            Side::Local => (there, Some(here)),
        };
        let fields: Vec<String> = dup.pattern.keys().cloned().collect();
        let notes = format!(
            "{} is taken by another document on the {} side",
            fields.join(" + "),
            to.name()
        );
        Self {
            key: work.key.clone(),
            kind: Kind::UniqueField,
            collection,
            local,
            remote,
            base: work.base.clone(),
            fields,
            other: Some(blocker),
            notes,
            sync_fields: sync_fields.to_vec(),
        }
    }

    /// Version of both documents; see [`version`].
    fn version(&self) -> i64 {
        let doc = |side: &Option<(Id, Vec<u8>)>| side.as_ref().map(|d| d.1.clone());
        version(
            doc(&self.local).as_deref(),
            doc(&self.remote).as_deref(),
            &self.sync_fields,
        )
    }

    fn case(&self, id: [u8; 12]) -> Case {
        Case {
            id,
            local: self.local.as_ref().map(|d| d.0.clone()),
            remote: self.remote.as_ref().map(|d| d.0.clone()),
            fields: self.fields.clone(),
            seen: self.version(),
        }
    }

    fn record(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.str("collection", &self.collection)
            .str("kind", self.kind.name());
        id(&mut w, "localId", self.local.as_ref());
        id(&mut w, "remoteId", self.remote.as_ref());
        match self.fields.as_slice() {
            [] => {
                w.value("field", 0x0A, &[]);
            }
            fields => {
                w.str("field", &fields.join(","));
            }
        }
        value(&mut w, "localValue", self.local.as_ref(), &self.fields);
        value(&mut w, "remoteValue", self.remote.as_ref(), &self.fields);
        w.date("timestamp", chrono::Utc::now().timestamp_millis())
            .str("notes", &self.notes)
            .str("version", &version_text(self.version()));
        let bodies = [
            ("localDocument", self.local.as_ref().map(|d| d.1.as_slice())),
            (
                "remoteDocument",
                self.remote.as_ref().map(|d| d.1.as_slice()),
            ),
            ("baseDocument", self.base.as_deref()),
        ];
        let mut room = BODIES;
        for (name, body) in bodies {
            match body {
                Some(body) if body.len() < room => {
                    room -= body.len();
                    w.doc(name, body);
                }
                Some(_) => {
                    w.str(name, "too large for this record together with the others");
                }
                None => {
                    w.value(name, 0x0A, &[]);
                }
            }
        }
        w.finish()
    }
}

/// Tells two states of a conflict apart: a hash of both contents. A stamp is no change.
pub fn version(local: Option<&[u8]>, remote: Option<&[u8]>, sync_fields: &[String]) -> i64 {
    let part = |d: Option<&[u8]>| d.map_or(0, |d| xxh3_64(&strip(d, sync_fields)));
    let both = [part(local).to_le_bytes(), part(remote).to_le_bytes()].concat();
    i64::from_le_bytes(xxh3_64(&both).to_le_bytes())
}

/// A version as the API shows it.
pub fn version_text(version: i64) -> String {
    format!("{version:016x}")
}

fn id(w: &mut Writer, name: &str, side: Option<&(Id, Vec<u8>)>) {
    match side {
        Some((id, _)) => w.value(name, id.kind, &id.value),
        None => w.value(name, 0x0A, &[]),
    };
}

/// The value of the field in conflict; for several, a document of them.
fn value(w: &mut Writer, name: &str, side: Option<&(Id, Vec<u8>)>, fields: &[String]) {
    let at = |f: &String| side.and_then(|(_, doc)| raw::get(doc, f.as_bytes()));
    match fields {
        [one] => match at(one) {
            Some(e) if e.value.len() > VALUE => w.str(name, "too large to be shown by itself"),
            Some(e) => w.value(name, e.kind, e.value),
            None => w.value(name, 0x0A, &[]),
        },
        many => {
            w.open(name);
            for f in many {
                match at(f) {
                    Some(e) if e.value.len() > VALUE / many.len() => {
                        w.str(f, "too large to be shown by itself");
                    }
                    Some(e) => {
                        w.whole(e.whole);
                    }
                    None => {}
                }
            }
            w.close()
        }
    };
}

fn count(c: &Connection) -> rusqlite::Result<()> {
    let total: i64 = store::get_meta(c, "conflicts_total")?.unwrap_or(0);
    store::set_meta(c, "conflicts_total", total + 1)
}

/// Puts a conflict on record and holds the document's rows. A conflict that is on record already
/// gets the new values; a unique clash seen from the other document joins its record.
/// Whether it was a new one.
pub fn open(c: &Connection, found: &Found, work: &Work) -> rusqlite::Result<bool> {
    let known = records::open_conflict(c, &found.key)?;
    let partner = match &found.other {
        Some(other) if known.is_none() => {
            records::open_conflict(c, other)?.filter(|p| p.other.as_ref() == Some(&found.key))
        }
        _ => None,
    };
    let is_new = known.is_none() && partner.is_none();
    let id = known
        .as_ref()
        .or(partner.as_ref())
        .map_or_else(|| ObjectId::new().bytes(), |k| k.id);
    if partner.is_none() {
        records::put_record(c, "conflict_logs", &id, &with_open_fields(&found.record()))?;
        cases::put(c, &found.case(id))?;
    }
    if is_new {
        count(c)?;
    }
    let conflict = OpenConflict {
        id,
        kind: found.kind.name().into(),
        other: found.other.clone(),
    };
    records::put_open_conflict(c, &found.key, &conflict)?;
    hold(c, work, "conflict", &found.notes)?;
    records::put_stamp(c, &found.key, &work.id)?;
    Ok(is_new)
}

fn with_open_fields(record: &[u8]) -> Vec<u8> {
    let mut w = Writer::new();
    for e in raw::elements(record).map_while(Result::ok) {
        w.whole(e.whole);
    }
    w.bool("resolved", false);
    for name in ["resolutionStrategy", "resolvedAt", "resolvedBy"] {
        w.value(name, 0x0A, &[]);
    }
    w.finish()
}

/// Holds the rows of a key as they were claimed.
pub fn hold(c: &Connection, work: &Work, held: &str, reason: &str) -> rusqlite::Result<()> {
    for (side, row) in [(Side::Local, &work.outbox), (Side::Remote, &work.inbox)] {
        if let Some(row) = row {
            queue::hold(c, side, &work.key, row.seq, held, reason)?;
        }
    }
    Ok(())
}

/// The record of a clash that the policy settles, with every version (R21) and what comes of it. It
/// is kept before the write and goes on its way by [`overruled`] once the write may have happened.
pub fn settled_by_policy(found: &Found, strategy: &str, result: Option<&[u8]>) -> Vec<u8> {
    let mut w = Writer::new();
    for e in raw::elements(&found.record()).map_while(Result::ok) {
        w.whole(e.whole);
    }
    w.bool("resolved", true)
        .str("resolutionStrategy", strategy)
        .str("resolvedBy", "policy");
    put_result(&mut w, result);
    w.date("resolvedAt", chrono::Utc::now().timestamp_millis());
    w.finish()
}

/// The write that settles a clash by policy happened, or may have: its record goes on its way.
pub fn overruled(c: &Connection, key: &Key) -> rusqlite::Result<()> {
    if let Some((doc, _)) = records::take_overruled(c, key)? {
        records::put_record(c, "conflict_logs", &id_of(&doc), &doc)?;
        count(c)?;
    }
    Ok(())
}

/// `_id` of such a record. It follows from the record, for another daemon may have to write it as well:
/// its time, as in any ObjectId, then a digest.
fn id_of(record: &[u8]) -> [u8; 12] {
    let time = raw::get(record, b"resolvedAt").and_then(|e| decide::millis(&e));
    let seconds = u32::try_from(time.unwrap_or(0) / 1000).unwrap_or(0);
    let mut id = [0; 12];
    id[..4].copy_from_slice(&seconds.to_be_bytes());
    id[4..].copy_from_slice(&base::digest(record)[..8]);
    id
}

/// No answer came to that write, and its result is not to be seen: either it never happened, then
/// what it would have replaced is still there; or somebody has written since.
pub fn perhaps_overruled(c: &Connection, key: &Key, now: Option<&[u8]>) -> rusqlite::Result<()> {
    let Some((doc, gone)) = records::take_overruled(c, key)? else {
        return Ok(());
    };
    if gone.as_deref() != now.map(base::digest).as_ref().map(<[u8; 32]>::as_slice) {
        records::put_overruled(c, key, &doc, None)?;
        overruled(c, key)?;
    }
    Ok(())
}

/// The content that a resolution gave the document, for `undo`; left out where it has no room.
pub fn put_result(w: &mut Writer, result: Option<&[u8]>) {
    match result {
        Some(result) if w.len() + result.len() < BODIES => w.doc("resultDocument", result),
        Some(_) => w,
        None => w.value("resultDocument", 0x0A, &[]),
    };
}

/// Closes the open conflict of a key whose cause is gone, and frees who waited on it.
pub fn close_if_open(c: &Connection, key: &Key) -> rusqlite::Result<bool> {
    records::free_waiting(c, key)?;
    let Some(id) = records::close_conflict(c, key)? else {
        return Ok(false);
    };
    let mut w = Writer::new();
    w.bool("resolved", true)
        .str("resolutionStrategy", "none")
        .str("resolvedBy", "sangam");
    w.date("resolvedAt", chrono::Utc::now().timestamp_millis());
    w.str("notes", "the cause is gone: both sides agree again");
    records::put_record(c, "conflict_logs", &id, &w.finish())?;
    Ok(true)
}

/// An `_id` as extended JSON, for answers.
pub fn id_json(id: &Id) -> serde_json::Value {
    match id.to_bson() {
        Bson::String(s) => serde_json::Value::String(s),
        other => other.into_relaxed_extjson(),
    }
}
