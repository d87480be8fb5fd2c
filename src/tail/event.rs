//! Events of a change stream: what is asked of the server, and what each means to us.

use bson::{Document, RawDocument, doc};

use crate::key::Id;
use crate::raw;
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
pub(super) enum Event {
    Change {
        coll: String,
        id: Id,
        hint: Option<Vec<u8>>,
        created: bool,
        /// The transaction it was part of.
        transaction: Option<i64>,
    },
    Halt {
        coll: Option<String>,
        what: String,
    },
    /// Indexes or options changed.
    Schema,
    Nothing,
}

/// Reads one event; what is not synced, or only ours, asks for nothing.
pub(super) fn parse(event: &RawDocument, settings: &Settings, db: &str) -> Event {
    let kind = event.get_str("operationType").unwrap_or_default();
    if event.get_str("tag").is_ok_and(|tag| tag == "synced") {
        return Event::Nothing;
    }
    let coll = event
        .get_document("ns")
        .ok()
        .and_then(|ns| ns.get_str("coll").ok());
    match kind {
        "insert" | "update" | "replace" | "delete" => {
            let Some(coll) = coll.filter(|c| settings.is_synced(db, c)) else {
                return Event::Nothing;
            };
            let key = event
                .get_document("documentKey")
                .ok()
                .and_then(|k| raw::get(k.as_bytes(), b"_id"));
            let Some(id) = key.map(|e| Id::from_element(&e)) else {
                return Event::Nothing;
            };
            let hint = match kind {
                "delete" => Some(b"d".to_vec()),
                "update" => match event.get_document("updateDescription") {
                    Ok(d) if queue::only_sync_fields(d.as_bytes(), &settings.sync_fields) => {
                        return Event::Nothing;
                    }
                    Ok(d) => Some([b"u", d.as_bytes()].concat()),
                    Err(_) => None,
                },
                _ => None,
            };
            Event::Change {
                coll: coll.to_owned(),
                id,
                hint,
                created: kind == "insert",
                transaction: transaction(event),
            }
        }
        "drop" | "rename" => match coll.filter(|c| settings.is_synced(db, c)) {
            Some(coll) => Event::Halt {
                coll: Some(coll.to_owned()),
                what: format!("was {}", past(kind)),
            },
            None => Event::Nothing,
        },
        "create" | "createIndexes" | "dropIndexes" | "modify" => {
            match coll.filter(|c| settings.is_synced(db, c)) {
                Some(_) => Event::Schema,
                None => Event::Nothing,
            }
        }
        "dropDatabase" => Event::Halt {
            coll: None,
            what: "was dropped".into(),
        },
        _ => Event::Nothing,
    }
}

/// A number for the transaction of an event; only events of transactions have one (seen on 6.0).
fn transaction(event: &RawDocument) -> Option<i64> {
    let number = event.get_i64("txnNumber").ok()?;
    let session = event.get_document("lsid").ok()?;
    let mut both = session.as_bytes().to_vec();
    both.extend_from_slice(&number.to_le_bytes());
    Some(i64::from_le_bytes(
        xxhash_rust::xxh3::xxh3_64(&both).to_le_bytes(),
    ))
}

fn past(kind: &str) -> &'static str {
    if kind == "rename" {
        "renamed"
    } else {
        "dropped"
    }
}
