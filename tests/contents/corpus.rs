//! R14: the whole published BSON corpus, documents at the limit, and `_id`s that are no text.

use crate::common::kit::{converged_without_conflict, queue, raw_docs};
use crate::common::odd::with_id;
use crate::common::{Daemon, World, wait_for, wait_until};
use mongodb::Database;
use mongodb::bson::{Document, RawDocumentBuf, doc};
use sangam::raw::{self, Writer};

/// The valid documents of the corpus: what they are, and their bytes (see `tests/bson-corpus`).
fn corpus() -> Vec<(String, Vec<u8>)> {
    let text = include_str!("../bson-corpus/valid.json");
    let all: Vec<(String, String)> = serde_json::from_str(text).unwrap();
    let bytes = |hex: &str| {
        let digit = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(digit).collect()
    };
    // A document has one `_id`, which is ours.
    let fields = |hex: &str| {
        let whole: Vec<u8> = bytes(hex);
        let mut w = Writer::new();
        let all = raw::elements(&whole).map(|e| e.unwrap());
        all.filter(|e| e.name != b"_id").for_each(|e| {
            w.whole(e.whole);
        });
        w.finish()
    };
    all.iter()
        .map(|(name, hex)| (name.clone(), fields(hex)))
        .collect()
}

async fn insert(db: &Database, coll: &str, docs: &[Vec<u8>]) {
    let mut w = Writer::new();
    w.str("insert", coll).open_array("documents");
    for (i, d) in docs.iter().enumerate() {
        w.doc(i.to_string(), d);
    }
    w.close();
    let reply = db.run_raw_command(w.command()).await.unwrap();
    assert!(!reply.contains_key("writeErrors"), "{reply}");
}

/// Contents of a side in the order of their names, without what Sangam stamped.
async fn contents(world: &World, db: &Database) -> Vec<Vec<u8>> {
    let docs = raw_docs(db, "c").await;
    let strip = |d: &RawDocumentBuf| sangam::compare::content(d, &world.fields).unwrap();
    docs.iter().map(strip).collect()
}

/// Both sides hold exactly these documents; compared as bytes alone, since no library decodes them.
async fn hold_bytes(world: &World, expected: &[Vec<u8>]) {
    let sync = ["syncedAt", "origin", "syncStatus"].map(|name| name.to_owned());
    let held = async |db: &Database| {
        let docs = raw_docs(db, "c").await;
        let strip = |d: &RawDocumentBuf| sangam::content::strip(d.as_bytes(), &sync).into_owned();
        docs.iter().map(strip).collect::<Vec<_>>()
    };
    wait_until(
        crate::common::SOON,
        "the same bytes on both sides",
        async || {
            let found = [held(&world.local).await, held(&world.remote).await];
            let good = |f: &Vec<Vec<u8>>| {
                f.len() == expected.len() && expected.iter().all(|d| f.contains(d))
            };
            found
                .iter()
                .all(good)
                .then_some(())
                .ok_or_else(|| format!("{found:?}"))
        },
    )
    .await;
}

async fn hold(world: &World, daemon: &Daemon, expected: &[Vec<u8>]) {
    converged_without_conflict(world, daemon).await;
    for db in [&world.local, &world.remote] {
        let found = contents(world, db).await;
        assert_eq!(found.len(), expected.len());
        for d in expected {
            let wanted = RawDocumentBuf::from_bytes(d.clone());
            assert!(found.contains(d), "{wanted:?} is not there");
        }
    }
}

#[tokio::test]
async fn r14_the_whole_bson_corpus_both_ways() {
    // GIVEN the corpus on either side before the first sync
    let world = World::new("corpus").await;
    let corpus = corpus();
    let of = |when: &str, from: &str| -> Vec<Vec<u8>> {
        let named = corpus.iter().enumerate();
        let named = named.map(|(n, (name, d))| with_id(&format!("{when} {from} {n} {name}"), d));
        named.collect()
    };
    let mut expected = Vec::new();
    let sides = [("local", &world.local), ("remote", &world.remote)];
    for (from, db) in sides {
        insert(db, "c", &of("before", from)).await;
        expected.extend(of("before", from));
    }
    let daemon = world.start().await;
    hold(&world, &daemon, &expected).await;
    // WHEN it is written again while the daemon runs THEN it arrives byte for byte
    for (from, db) in sides {
        insert(db, "c", &of("after", from)).await;
        expected.extend(of("after", from));
    }
    hold(&world, &daemon, &expected).await;
    // WHEN each gets a further field on the other side THEN that arrives
    for (from, db) in [("local", &world.remote), ("remote", &world.local)] {
        let theirs = doc! {"_id": {"$regex": format!(" {from} ")}};
        let c = db.collection::<Document>("c");
        c.update_many(theirs, doc! {"$set": {"added": 1.5}})
            .await
            .unwrap();
    }
    converged_without_conflict(&world, &daemon).await;
    let [here, there] = [
        contents(&world, &world.local).await,
        contents(&world, &world.remote).await,
    ];
    assert!(here == there);
    assert!(here.iter().all(|d| raw::get(d, b"added").is_some()));
}

#[tokio::test]
async fn r14_strings_that_are_no_utf8_even_as_id() {
    // GIVEN documents with such an `_id`, made on either side
    let world = World::new("no_utf8").await;
    let daemon = world.start().await;
    let with = |id: u8, n: i32| {
        let mut w = Writer::new();
        w.value("_id", 0x02, &[3, 0, 0, 0, 0xFF, id, 0]).i32("n", n);
        w.value(b"\xFEname", 0x02, &[2, 0, 0, 0, 0xC3, 0])
            .open("in")
            .value(b"\x80", 0x10, &[1, 0, 0, 0]);
        w.close();
        w.finish()
    };
    insert(&world.local, "c", &[with(1, 0)]).await;
    insert(&world.remote, "c", &[with(2, 0)]).await;
    hold_bytes(&world, &[with(1, 0), with(2, 0)]).await;
    // WHEN they wait THEN they can be listed; WHEN they are edited and deleted THEN that arrives
    daemon
        .post("/api/sync/pause", serde_json::json!({}))
        .await
        .unwrap();
    let edit = |db: Database| async move {
        let set = doc! {"$set": {"n": 1}};
        db.collection::<Document>("c")
            .update_many(doc! {}, set)
            .await
            .unwrap();
    };
    edit(world.local.clone()).await;
    wait_for("both wait", async || queue(&daemon).await.len() == 2).await;
    daemon
        .post("/api/sync/resume", serde_json::json!({}))
        .await
        .unwrap();
    hold_bytes(&world, &[with(1, 1), with(2, 1)]).await;
    world
        .remote
        .collection::<Document>("c")
        .delete_many(doc! {})
        .await
        .unwrap();
    hold_bytes(&world, &[]).await;
}
