//! Events of a change stream: what is asked of the server, and what each means to us.

use bson::{Document, RawDocument, doc};

use crate::key::Id;
use crate::raw::{self, Element};
use crate::shared::{Settings, Shared};
use crate::store::queue;

/// Largest update description that travels with an event, in bytes; larger ones mean "look".
const DESCRIPTION_BYTES: i32 = 2048;

/// What the server is asked to send: keys and operations, no bodies (R10).
pub(super) fn pipeline(shared: &Shared, settings: &Settings) -> Vec<Document> {
    // `$nin` lets events without a collection (invalidate, dropDatabase) through.
    let mut stages = vec![
        doc! {"$match": {"ns.coll": {"$nin": &settings.unwatched}}},
        doc! {"$project": {
            "operationType": 1, "ns": 1, "to": 1, "documentKey._id": 1, "clusterTime": 1,
            "wallTime": 1, "lsid.id": 1, "txnNumber": 1,
            "updateDescription": {"$cond": [
                {"$lt": [{"$bsonSize": {"$ifNull": ["$updateDescription", {}]}}, DESCRIPTION_BYTES]},
                "$updateDescription", "$$REMOVE",
            ]},
        }},
    ];
    if shared.failpoints.mutated("stamp") {
        // The mutation: an event whose document carries our stamp is taken for our own.
        let status = format!("$fullDocument.{}", settings.config.fields.sync_status);
        let body =
            doc! {"_id": 1, "ns": 1, "operationType": 1, "documentKey._id": 1, "tag": status};
        stages.truncate(1);
        stages.push(doc! {"$project": body});
    }
    stages
}

/// What one event asks for.
pub(super) enum Event<'a> {
    Change {
        coll: &'a str,
        id: Id,
        hint: Option<Vec<u8>>,
        created: bool,
        /// The transaction it was part of.
        transaction: Option<i64>,
    },
    Halt {
        coll: Option<&'a str>,
        what: String,
    },
    /// Indexes or options changed.
    Schema,
    Nothing,
}

/// What an event has, found in one pass.
#[derive(Default)]
struct Fields<'a> {
    kind: &'a str,
    coll: Option<&'a str>,
    id: Option<Element<'a>>,
    description: Option<&'a [u8]>,
    session: Option<&'a [u8]>,
    number: Option<i64>,
    tag: Option<&'a str>,
}

impl<'a> Fields<'a> {
    fn of(event: &'a RawDocument) -> Self {
        let mut all = Self::default();
        for e in raw::elements(event.as_bytes()).map_while(Result::ok) {
            match e.name {
                b"operationType" => all.kind = raw::text(&e).unwrap_or_default(),
                b"ns" => {
                    let coll = raw::get(e.value, b"coll");
                    all.coll = coll.as_ref().and_then(raw::text);
                }
                b"documentKey" => all.id = raw::get(e.value, b"_id"),
                b"updateDescription" if e.kind == raw::DOCUMENT => all.description = Some(e.value),
                b"lsid" => all.session = Some(e.value),
                b"txnNumber" => {
                    all.number = e.value.try_into().ok().map(i64::from_le_bytes);
                }
                b"tag" => all.tag = raw::text(&e),
                _ => {}
            }
        }
        all
    }

    /// A number for the transaction; only events of transactions have one (seen on 6.0).
    fn transaction(&self) -> Option<i64> {
        let mut both = self.session?.to_vec();
        both.extend_from_slice(&self.number?.to_le_bytes());
        let hash = xxhash_rust::xxh3::xxh3_64(&both);
        Some(i64::from_le_bytes(hash.to_le_bytes()))
    }
}

/// Reads one event; what is not synced, or only ours, asks for nothing.
pub(super) fn parse<'a>(
    event: &'a RawDocument,
    sync_fields: &[String],
    is_synced: impl FnOnce(&'a str) -> bool,
) -> Event<'a> {
    let fields = Fields::of(event);
    if fields.tag == Some("synced") {
        return Event::Nothing;
    }
    let kind = fields.kind;
    if kind == "dropDatabase" {
        return Event::Halt {
            coll: None,
            what: "was dropped".into(),
        };
    }
    let Some(coll) = fields.coll.filter(|c| is_synced(c)) else {
        return Event::Nothing;
    };
    match kind {
        "insert" | "update" | "replace" | "delete" => {
            let Some(id) = &fields.id else {
                return Event::Nothing;
            };
            let hint = match (kind, fields.description) {
                ("delete", _) => Some(b"d".to_vec()),
                ("update", Some(d)) if queue::only_sync_fields(d, sync_fields) => {
                    return Event::Nothing;
                }
                ("update", Some(d)) => Some([b"u", d].concat()),
                _ => None,
            };
            Event::Change {
                coll,
                id: Id::from_element(id),
                hint,
                created: kind == "insert",
                transaction: fields.transaction(),
            }
        }
        "drop" | "rename" => Event::Halt {
            coll: Some(coll),
            what: format!("was {}", past(kind)),
        },
        "create" | "createIndexes" | "dropIndexes" | "modify" => Event::Schema,
        _ => Event::Nothing,
    }
}

fn past(kind: &str) -> &'static str {
    if kind == "rename" {
        "renamed"
    } else {
        "dropped"
    }
}
