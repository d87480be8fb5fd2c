//! What the daemon is held against: the driver alone, and the one-document-at-a-time way.

use std::time::{Duration, Instant};

use futures::TryStreamExt as _;
use mongodb::bson::{DateTime, Document, RawDocumentBuf, doc, oid::ObjectId, rawdoc};

use mongodb::options::{ClientOptions, Compressor};
use mongodb::{Client, Database};

use crate::table::Rate;

/// Documents in one command.
pub(crate) const BATCH: usize = 1000;

/// A booking of about 500 bytes.
pub(crate) fn booking(n: usize) -> Document {
    doc! {
        "_id": ObjectId::new(),
        "booking_no": format!("BK-2024-{n:07}"),
        "devotee_name": format!("Lakshmi Narayanan {}", n % 7919),
        "email": format!("devotee{n}@example.org"),
        "phone": format!("+91-98{:08}", (n * 7919) % 100_000_000),
        "ritual": (["Abhishekam", "Archana", "Homam", "Kalyanam"][n % 4]),
        "nakshatra": (["Ashwini", "Bharani", "Krittika", "Rohini", "Mrigashira"][n % 5]),
        "amount": 501.0 + (n % 100) as f64,
        "paid": n.is_multiple_of(3),
        "slot": {"date": "2024-11-01", "hour": (n % 12) as i32, "hall": "east"},
        "notes": format!("prasadam for {} persons; sankalpam in the name of the whole family, \
                          please call before the ritual begins ({:x})", n % 40, n * 2_654_435_761),
        "createdAt": DateTime::now(),
        "updatedAt": DateTime::now(),
    }
}

/// A client of the same server that compresses, as the daemon does.
pub(crate) async fn compressed(uri: &str) -> Client {
    let mut options = ClientOptions::parse(uri).await.expect("a URI");
    options.compressors = Some(vec![Compressor::Zstd { level: Some(3) }]);
    Client::with_options(options).expect("a client")
}

/// Inserts documents into a collection, in commands of [`BATCH`].
pub(crate) async fn fill(db: &Database, coll: &str, from: usize, count: usize) {
    let coll = db.collection::<Document>(coll);
    for start in (from..from + count).step_by(BATCH) {
        let end = (start + BATCH).min(from + count);
        coll.insert_many((start..end).map(booking))
            .await
            .expect("the documents are inserted");
    }
}

/// Unguarded batched upserts of whole documents by the driver.
pub(crate) async fn upserts(db: &Database, coll: &str, count: usize) -> Rate {
    let mut commands = Vec::new();
    for start in (0..count).step_by(BATCH) {
        let mut updates = mongodb::bson::RawArrayBuf::new();
        for n in start..(start + BATCH).min(count) {
            let new = RawDocumentBuf::try_from(&booking(n)).expect("a document");
            let id = new.get_object_id("_id").expect("made above");
            updates.push(rawdoc! {"q": {"_id": id}, "u": new, "upsert": true});
        }
        commands.push(rawdoc! {"update": coll, "updates": updates, "ordered": false});
    }
    timed(db, commands, count).await
}

/// Sends commands one after the other, which write so many documents.
pub(crate) async fn timed(db: &Database, commands: Vec<RawDocumentBuf>, count: usize) -> Rate {
    let began = Instant::now();
    for command in commands {
        let reply = db.run_raw_command(command).await.expect("an answer");
        assert!(!reply.contains_key("writeErrors"), "{reply}");
    }
    Rate {
        documents: count as u64,
        took: began.elapsed(),
    }
}

/// CPU time that the driver alone takes for the calls of a drain: each document is read by its `_id`
/// and written to the remote, in batches, over a compressed connection, and its event there read as well.
/// Nothing is guarded, decided or kept.
pub(crate) async fn copy(from: &Database, to: &Database, count: usize) -> Duration {
    fill(from, "copied", 0, count).await;
    let ids: Vec<Document> = from
        .collection::<Document>("copied")
        .find(doc! {})
        .projection(doc! {"_id": 1})
        .await
        .expect("a cursor")
        .try_collect()
        .await
        .expect("documents");
    let source = from.collection::<RawDocumentBuf>("copied");
    let events = to.collection::<RawDocumentBuf>("copied").watch().await;
    let mut events = events
        .expect("the stream opens")
        .with_type::<RawDocumentBuf>();
    let began = crate::meter::cpu(std::process::id());
    let read = tokio::spawn(async move {
        let mut seen = 0;
        while seen < count {
            seen += usize::from(events.next_if_any().await.expect("an event").is_some());
        }
    });
    for some in ids.chunks(BATCH) {
        let some: Vec<_> = some.iter().filter_map(|d| d.get("_id")).collect();
        let mut found = source
            .find(doc! {"_id": {"$in": some}})
            .await
            .expect("a cursor");
        let mut updates = mongodb::bson::RawArrayBuf::new();
        while found.advance().await.expect("a document") {
            let new = found.current();
            let id = new.get_object_id("_id").expect("made above");
            updates.push(rawdoc! {"q": {"_id": id}, "u": new.to_owned(), "upsert": true});
        }
        let command = rawdoc! {"update": "copied", "updates": updates, "ordered": false};
        let reply = to.run_raw_command(command).await.expect("an answer");
        assert!(!reply.contains_key("writeErrors"), "{reply}");
    }
    read.await.expect("all events come");
    crate::meter::cpu(std::process::id()) - began
}

/// One document at a time: find it at the remote, write it there, mark it locally.
pub(crate) async fn one_at_a_time(local: &Database, remote: &Database, count: usize) -> Rate {
    fill(local, "one_by_one", 0, count).await;
    let (local, remote) = (
        local.collection::<Document>("one_by_one"),
        remote.collection::<Document>("one_by_one"),
    );
    let mut all = local.find(doc! {}).await.expect("a cursor");
    let began = Instant::now();
    while all.advance().await.expect("a document") {
        let document = all.deserialize_current().expect("BSON");
        let id = doc! {"_id": document.get_object_id("_id").expect("made above")};
        let there = remote.find_one(id.clone()).await.expect("an answer");
        assert!(there.is_none());
        remote.insert_one(document).await.expect("it is written");
        let mark = doc! {"$set": {"syncStatus": "synced", "syncedAt": DateTime::now()}};
        local.update_one(id, mark).await.expect("it is marked");
    }
    Rate {
        documents: count as u64,
        took: began.elapsed(),
    }
}
