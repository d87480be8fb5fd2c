//! R14, R15: any BSON survives byte for byte in both directions; what can't be synced is left out.

use crate::common::kit::{
    both, converged_without_conflict, cut, dealt_with, heal, raw_docs, the_conflict, wait_content,
};
use crate::common::odd::{decimal, odd, put, values, with_id};
use crate::common::{Daemon, World, wait_for};
use mongodb::Database;
use mongodb::bson::{Bson, DateTime, DbPointer, Document, RawDocumentBuf, doc};
use sangam::raw::{self, Writer};
use serde_json::json;

/// The documents of a side without what Sangam stamped, in `_id` order.
async fn contents(world: &World, db: &Database) -> Vec<RawDocumentBuf> {
    let strip = |d: &RawDocumentBuf| sangam::compare::content(d, &world.fields).unwrap();
    let docs = raw_docs(db, "c").await;
    docs.iter()
        .map(|d| RawDocumentBuf::from_bytes(strip(d)).unwrap())
        .collect()
}

/// Both sides hold exactly these documents.
async fn hold(world: &World, daemon: &Daemon, mut expected: Vec<Vec<u8>>) {
    converged_without_conflict(world, daemon).await;
    expected.sort_by_key(|d| raw::get(d, b"_id").unwrap().value.to_vec());
    for db in [&world.local, &world.remote] {
        let mut found = contents(world, db).await;
        found.sort_by_key(|d| raw::get(d.as_bytes(), b"_id").unwrap().value.to_vec());
        for (found, expected) in found.iter().zip(&expected) {
            let wanted = RawDocumentBuf::from_bytes(expected.clone()).unwrap();
            assert_eq!(
                found.as_bytes(),
                expected,
                "\n{found:?}\nis not\n{wanted:?}"
            );
        }
        assert_eq!(found.len(), expected.len());
    }
}

async fn odd_documents_travel(stamp: bool) {
    // GIVEN odd documents on either side before the first sync, and more after it
    let mut world = World::new(&format!("odd_{stamp}")).await;
    if !stamp {
        world.fields.synced_at = "-".into();
        world.fields.origin = "-".into();
        world.fields.sync_status = "-".into();
    }
    let mut expected = Vec::new();
    let put_all = async |when: &str, expected: &mut Vec<Vec<u8>>| {
        for (db, from) in [(&world.local, "local"), (&world.remote, "remote")] {
            for (name, fields) in odd() {
                let d = with_id(&format!("{when} {from} {name}"), &fields);
                put(db, "c", &d).await;
                expected.push(d);
            }
        }
    };
    put_all("before", &mut expected).await;
    let settings = world
        .settings()
        .set("sync.stamp_documents", &stamp.to_string());
    let daemon = world.start_with(settings).await;
    // THEN they arrive byte for byte
    hold(&world, &daemon, expected.clone()).await;
    put_all("after", &mut expected).await;
    hold(&world, &daemon, expected.clone()).await;
    // WHEN a field is added to every one where it came from THEN that arrives as well
    for (from, db) in [("local", &world.local), ("remote", &world.remote)] {
        let mine = doc! {"_id": {"$regex": format!(" {from} ")}};
        let c = db.collection::<Document>("c");
        let update = doc! {"$set": {"added": 1.5}};
        c.update_many(mine, update).await.unwrap();
    }
    // The server itself decides what an update does to such documents: both sides must agree on it.
    converged_without_conflict(&world, &daemon).await;
    let (here, there) = (
        contents(&world, &world.local).await,
        contents(&world, &world.remote).await,
    );
    assert!(here == there);
    assert!(here.iter().all(|d| d.get("added").unwrap().is_some()));
    // WHEN they are deleted on the other side THEN they are gone on both
    for (from, db) in [("local", &world.remote), ("remote", &world.local)] {
        let theirs = doc! {"_id": {"$regex": format!(" {from} ")}};
        db.collection::<Document>("c")
            .delete_many(theirs)
            .await
            .unwrap();
    }
    hold(&world, &daemon, vec![]).await;
}

#[tokio::test]
async fn r14_odd_documents_travel_both_ways_byte_for_byte() {
    odd_documents_travel(true).await;
}

#[tokio::test]
async fn r14_odd_documents_travel_both_ways_byte_for_byte_without_stamping() {
    odd_documents_travel(false).await;
}

#[tokio::test]
async fn r14_one_odd_value_replaced_by_another() {
    // GIVEN a document for each value
    let world = World::new("replaced").await;
    let daemon = world.start().await;
    let values: Vec<Bson> = values().into_iter().map(|(_, v)| v).collect();
    let with = |i: usize, v: &Bson| {
        doc! {"_id": format!("{i}"), "v": v, "pad": "x".repeat(300)}
            .to_vec()
            .unwrap()
    };
    for (i, v) in values.iter().enumerate() {
        put(&world.local, "c", &with(i, v)).await;
    }
    let before: Vec<_> = values.iter().enumerate().map(|(i, v)| with(i, v)).collect();
    hold(&world, &daemon, before).await;
    for (round, db) in [(1, &world.local), (2, &world.remote)] {
        // WHEN each is replaced by the next one (1 by 1.0, NaN by another), on this side
        let mut after = Vec::new();
        for i in 0..values.len() {
            let v = &values[(i + round) % values.len()];
            let update = doc! {"$set": {"v": {"$literal": v}}};
            let c = db.collection::<Document>("c");
            c.update_one(doc! {"_id": format!("{i}")}, vec![update])
                .await
                .unwrap();
            after.push(with(i, v));
        }
        // THEN the other has exactly that
        hold(&world, &daemon, after).await;
    }
}

/// Every type that an `_id` can have.
fn ids() -> Vec<Bson> {
    let no_id = |v: &Bson| {
        matches!(
            v,
            Bson::Array(_) | Bson::RegularExpression(_) | Bson::Undefined
        )
    };
    let mut ids: Vec<Bson> = values()
        .into_iter()
        .map(|(_, v)| v)
        .filter(|v| !no_id(v))
        .collect();
    // The same `_id` to the server as another one of the list.
    let twice = |v: &Bson| match v {
        Bson::Double(v) => v.is_nan() && v.to_bits() != f64::NAN.to_bits(),
        Bson::Decimal128(d) => d.to_string() != "1",
        Bson::Timestamp(t) => t.time == 0,
        _ => false,
    };
    ids.retain(|v| !twice(v));
    ids.push(Bson::Document(doc! {"hall": 1, "day": "Monday"}));
    ids.push(DbPointerId::bson());
    ids
}

/// A DBPointer can only be made by deserializing one.
struct DbPointerId;

impl DbPointerId {
    fn bson() -> Bson {
        let json =
            json!({"$dbPointer": {"$ref": "db.c", "$id": {"$oid": "64e000000000000000000000"}}});
        let pointer: Bson = json.as_object().unwrap().clone().try_into().unwrap();
        assert!(matches!(pointer, Bson::DbPointer(DbPointer { .. })));
        pointer
    }
}

#[tokio::test]
async fn r14_every_type_of_id_both_ways() {
    let world = World::new("ids").await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    let ids = ids();
    // GIVEN documents with every type of `_id`, made on alternating sides
    for (i, id) in ids.iter().enumerate() {
        let c = if i % 2 == 0 { &here } else { &there };
        c.insert_one(doc! {"_id": id, "v": 0}).await.unwrap();
    }
    converged_without_conflict(&world, &daemon).await;
    let count = ids.len() as u64;
    assert_eq!(here.count_documents(doc! {}).await.unwrap(), count);
    // WHEN they are edited on the side where they were not made
    for (i, id) in ids.iter().enumerate() {
        let c = if i % 2 == 0 { &there } else { &here };
        let update = c.update_one(doc! {"_id": {"$eq": id}}, doc! {"$set": {"v": 1}});
        assert_eq!(update.await.unwrap().modified_count, 1, "{id}");
    }
    converged_without_conflict(&world, &daemon).await;
    assert_eq!(here.count_documents(doc! {"v": 1}).await.unwrap(), count);
    // AND a comparison of everything finds nothing to do, and their deletion arrives
    wait_for("a reconcile", async || {
        let answer = daemon.post("/api/sync/reconcile", json!({})).await;
        answer.is_ok_and(|a| a.status == 200)
    })
    .await;
    converged_without_conflict(&world, &daemon).await;
    for (i, id) in ids.iter().enumerate() {
        let c = if i % 2 == 0 { &there } else { &here };
        c.delete_one(doc! {"_id": {"$eq": id}}).await.unwrap();
    }
    converged_without_conflict(&world, &daemon).await;
    assert_eq!(here.count_documents(doc! {}).await.unwrap(), 0);
}

#[tokio::test]
async fn r14_numbers_of_other_types_are_the_same_id() {
    let forms: [Bson; 4] = [1.into(), 1_i64.into(), 1.0.into(), decimal("1.00").into()];
    for (i, (l, r)) in [(0, 2), (1, 3), (3, 0)].into_iter().enumerate() {
        // GIVEN the same number as `_id` in two types, made on either side, one key to the server
        let world = World::new(&format!("number_{i}")).await;
        let daemon = world.start().await;
        let (here, there) = both(&world, "c");
        here.insert_one(doc! {"_id": 0}).await.unwrap();
        world.wait_converged(&daemon).await;
        cut(&world, &daemon).await;
        here.insert_one(doc! {"_id": &forms[l], "v": "same"})
            .await
            .unwrap();
        there
            .insert_one(doc! {"_id": &forms[r], "v": "same"})
            .await
            .unwrap();
        heal(&world, &daemon).await;
        // THEN that is one clash on one document, not two documents
        let conflict = the_conflict(&world, &daemon).await;
        assert_eq!(conflict.get_str("kind").unwrap(), "insert_insert");
        // WHEN one is deleted and edited in its other form, by number
        there.delete_one(doc! {"_id": 1}).await.unwrap();
        wait_for("it closes", async || {
            world.compare().await.unwrap().is_equal()
        })
        .await;
        here.update_one(doc! {"_id": 1.0}, doc! {"$set": {"v": "edited"}})
            .await
            .unwrap();
        wait_content(&there, 1, doc! {"_id": &forms[l], "v": "edited"}).await;
    }
}

#[tokio::test]
async fn r21_odd_versions_are_kept_on_record_as_they_are() {
    // GIVEN odd documents that clash
    let world = World::new("odd_records").await;
    let daemon = world.start().await;
    daemon.post("/api/sync/pause", json!({})).await.unwrap();
    clashing(&world, 0).await;
    daemon.post("/api/sync/resume", json!({})).await.unwrap();
    let count = clashable().len();
    daemon
        .wait_status("unresolvedConflicts", |n| *n == count)
        .await;
    dealt_with(&daemon).await;
    records_hold_both_sides(&world).await;
    // WHEN both versions of each become others while they are held
    for round in 1..4 {
        daemon.post("/api/sync/pause", json!({})).await.unwrap();
        clashing(&world, round * 5 - 4).await;
        daemon.post("/api/sync/resume", json!({})).await.unwrap();
        dealt_with(&daemon).await;
        // THEN the records follow, and no server has come to harm
        records_hold_both_sides(&world).await;
    }
}

/// Odd documents, without those so large that comparing them over and over takes long.
fn clashable() -> Vec<(String, Vec<u8>)> {
    let small = |(_, d): &(String, Vec<u8>)| d.len() < 10_000;
    odd().into_iter().filter(small).collect()
}

/// Makes the documents anew on both sides, each with the odd fields of one `shift` behind it, and
/// different all the same.
async fn clashing(world: &World, shift: usize) {
    let odd = clashable();
    for (db, from) in [(&world.local, "local"), (&world.remote, "remote")] {
        db.collection::<Document>("c")
            .delete_many(doc! {})
            .await
            .unwrap();
        for (i, (name, _)) in odd.iter().enumerate() {
            let mut w = Writer::new();
            for e in raw::elements(&with_id(name, &odd[(i + shift) % odd.len()].1)) {
                w.whole(e.unwrap().whole);
            }
            w.str("from", from);
            put(db, "c", &w.finish()).await;
        }
    }
}

/// Each record has the two documents byte for byte, sync fields aside.
async fn records_hold_both_sides(world: &World) {
    for (db, body) in [
        (&world.local, "localDocument"),
        (&world.remote, "remoteDocument"),
    ] {
        let records = raw_docs(&world.local, "conflict_logs").await;
        let held: Vec<RawDocumentBuf> = records
            .iter()
            .map(|r| {
                sangam::compare::content(r.get_document(body).unwrap(), &world.fields).unwrap()
            })
            .map(|d| RawDocumentBuf::from_bytes(d).unwrap())
            .collect();
        for d in contents(world, db).await {
            assert!(held.contains(&d), "{body} of none: {d:?}");
        }
    }
}

#[tokio::test]
async fn r15_views_and_time_series_are_left_out_with_one_warning() {
    // GIVEN a view and a time series on either side, beside a collection
    let world = World::new("views").await;
    for (db, side) in [(&world.local, "local"), (&world.remote, "remote")] {
        let view = doc! {"create": format!("view_{side}"), "viewOn": "c", "pipeline": []};
        db.run_command(view).await.unwrap();
        let series = doc! {"create": format!("series_{side}"), "timeseries": {"timeField": "t"}};
        db.run_command(series).await.unwrap();
        let series = db.collection::<Document>(&format!("series_{side}"));
        series
            .insert_one(doc! {"t": DateTime::now(), "v": 1})
            .await
            .unwrap();
    }
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    there.insert_one(doc! {"_id": 2}).await.unwrap();
    // WHEN they are written to while the daemon runs
    let series = world.local.collection::<Document>("series_local");
    series
        .insert_one(doc! {"t": DateTime::now(), "v": 2})
        .await
        .unwrap();
    converged_without_conflict(&world, &daemon).await;
    // THEN the collection is synced and the others stay where they are, named once each
    assert_eq!(there.count_documents(doc! {}).await.unwrap(), 2);
    for (db, other) in [(&world.local, "remote"), (&world.remote, "local")] {
        let names = db.list_collection_names().await.unwrap();
        assert!(!names.iter().any(|n| n.ends_with(other)), "{names:?}");
    }
    for name in ["view_local", "series_local", "view_remote", "series_remote"] {
        let warnings = daemon.log();
        let warnings = warnings
            .lines()
            .filter(|l| l.contains("are not synced") && l.contains(name));
        assert_eq!(warnings.count(), 1, "{name}");
    }
}
