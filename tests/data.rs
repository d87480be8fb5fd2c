//! R14, R15: any BSON survives byte for byte in both directions; what can't be synced is left out.

#![allow(clippy::unwrap_used)]

mod common;

use common::kit::{
    both, converged_without_conflict, cut, heal, raw_docs, the_conflict, wait_content,
};
use common::{Daemon, World, wait_for};
use mongodb::Database;
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{
    Binary, Bson, DateTime, DbPointer, Decimal128, Document, JavaScriptCodeWithScope,
    RawDocumentBuf, Regex, Timestamp, doc, oid::ObjectId,
};
use sangam::raw::{self, Writer};

/// Puts a document into a database exactly as it is; `insert` would fill in a `Timestamp(0, 0)`.
async fn put(db: &Database, coll: &str, document: &[u8]) {
    let id = raw::get(document, b"_id").unwrap();
    let mut w = Writer::new();
    if raw::elements(document).any(|e| e.is_ok_and(|e| e.kind == 0x11)) {
        w.str("update", coll).open_array("updates").open("0");
        w.open("q").value("_id", id.kind, id.value).close();
        w.open_array("u").open("0").open("$replaceWith");
        w.doc("$literal", document).close().close().close();
        w.bool("upsert", true).close().close();
    } else {
        w.str("insert", coll)
            .open_array("documents")
            .doc("0", document)
            .close();
    }
    let reply = db.run_raw_command(w.command()).await.unwrap();
    assert!(!reply.contains_key("writeErrors"), "{reply}");
    assert!(
        raw_docs(db, coll)
            .await
            .iter()
            .any(|d| d.as_bytes() == document)
    );
}

fn decimal(text: &str) -> Decimal128 {
    text.parse().unwrap()
}

fn decimals(texts: &[&str]) -> Bson {
    texts
        .iter()
        .map(|t| Bson::Decimal128(decimal(t)))
        .collect::<Vec<_>>()
        .into()
}

/// A value of every type, and of some more than one.
fn values() -> Vec<(&'static str, Bson)> {
    let binary = |subtype, bytes: &[u8]| {
        Bson::Binary(Binary {
            subtype,
            bytes: bytes.to_vec(),
        })
    };
    let code = "function() { return x; }".to_owned();
    vec![
        ("double", 0.1.into()),
        ("minus zero", (-0.0).into()),
        ("nan", f64::NAN.into()),
        (
            "nan with payload",
            f64::from_bits(0x7ff8_0000_dead_beef).into(),
        ),
        ("infinity", f64::NEG_INFINITY.into()),
        ("tiny", f64::from_bits(1).into()),
        ("string", "नमस्ते \0 zero".into()),
        ("empty string", "".into()),
        (
            "document",
            Bson::Document(doc! {"b": 1, "a": {"c": [1, {"d": 2}]}}),
        ),
        (
            "array",
            Bson::Array(vec![1.into(), 1_i64.into(), 1.0.into(), Bson::Null]),
        ),
        ("binary", binary(BinarySubtype::Generic, &[0, 1, 255])),
        ("uuid", binary(BinarySubtype::Uuid, &[7; 16])),
        ("own binary", binary(BinarySubtype::UserDefined(0x80), &[])),
        ("object id", ObjectId::from_bytes([9; 12]).into()),
        ("bool", false.into()),
        ("date", DateTime::from_millis(-1).into()),
        ("far date", DateTime::from_millis(i64::MAX).into()),
        ("null", Bson::Null),
        (
            "regex",
            Regex {
                pattern: "^a".try_into().unwrap(),
                options: "imx".try_into().unwrap(),
            }
            .into(),
        ),
        ("code", Bson::JavaScriptCode(code.clone())),
        (
            "scoped",
            JavaScriptCodeWithScope {
                code,
                scope: doc! {"x": 1},
            }
            .into(),
        ),
        ("symbol", Bson::Symbol("sym".into())),
        ("int", i32::MIN.into()),
        ("long", i64::MAX.into()),
        (
            "timestamp",
            Timestamp {
                time: 1,
                increment: 2,
            }
            .into(),
        ),
        (
            "zero timestamp",
            Timestamp {
                time: 0,
                increment: 0,
            }
            .into(),
        ),
        (
            "cohorts",
            decimals(&["1", "1.0", "1.00", "1E0", "-0", "0E+3", "NaN", "Infinity"]),
        ),
        ("one", decimal("1").into()),
        ("one point zero", decimal("1.0").into()),
        ("decimal nan", decimal("NaN").into()),
        ("min key", Bson::MinKey),
        ("max key", Bson::MaxKey),
        ("undefined", Bson::Undefined),
    ]
}

/// Documents that are hard to carry, without `_id`.
fn odd() -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>)> = values()
        .into_iter()
        .map(|(name, v)| (name.into(), doc! {"v": v, "w": 1}.to_vec().unwrap()))
        .collect();
    let mut add = |name: &str, fill: &dyn Fn(&mut Writer)| {
        let mut w = Writer::new();
        fill(&mut w);
        all.push((name.into(), w.finish()));
    };
    add("empty", &|_| {});
    add("duplicate names", &|w| {
        w.i32("a", 1).i32("b", 2).i32("a", 3);
    });
    add("duplicate names within", &|w| {
        w.open("d").i32("a", 1).i32("a", 2).close();
    });
    add("dollar", &|w| {
        w.i32("$set", 1)
            .str("$ref", "$$ROOT")
            .open("x")
            .i32("$gt", 1)
            .close();
    });
    add("dotted", &|w| {
        w.i32("a.b", 1)
            .i32(".", 2)
            .i32("a.", 3)
            .open("a")
            .i32("b", 4)
            .close();
    });
    add("empty name", &|w| {
        w.i32("", 1).open("x").str("", "").close();
    });
    add("expression", &|w| {
        w.str("v", "$_id")
            .open("u")
            .str("$literal", "x")
            .close()
            .str("n", "$$NOW");
    });
    add("zero timestamps", &|w| {
        w.value("t", 0x11, &[0; 8])
            .open("in")
            .value("t", 0x11, &[0; 8])
            .close();
    });
    add("numeric names", &|w| {
        w.i32("0", 1)
            .i32("1", 2)
            .open("a")
            .i32("10", 1)
            .i32("2", 2)
            .close();
    });
    all
}

/// A document with a string `_id` and these fields.
fn with_id(id: &str, fields: &[u8]) -> Vec<u8> {
    let mut w = Writer::new();
    w.str("_id", id);
    for e in raw::elements(fields) {
        w.whole(e.unwrap().whole);
    }
    w.finish()
}

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
        let json = serde_json::json!({"$dbPointer": {"$ref": "db.c", "$id": {"$oid": "64e000000000000000000000"}}});
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
        let answer = daemon
            .post("/api/sync/reconcile", serde_json::json!({}))
            .await;
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
async fn r14_documents_up_to_the_servers_limit() {
    // GIVEN documents of 16 MiB less the stamp on either side
    let world = World::new("huge").await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    let huge =
        |id: &str, letter: &str| doc! {"_id": id, "big": letter.repeat((16 << 20) - 300), "n": 0};
    here.insert_one(huge("l", "a")).await.unwrap();
    there.insert_one(huge("r", "b")).await.unwrap();
    converged_without_conflict(&world, &daemon).await;
    // WHEN a small field changes, and all of it
    let set = doc! {"$set": {"n": 1}};
    here.update_one(doc! {"_id": "r"}, set.clone())
        .await
        .unwrap();
    there.update_one(doc! {"_id": "l"}, set).await.unwrap();
    converged_without_conflict(&world, &daemon).await;
    here.replace_one(doc! {"_id": "l"}, huge("l", "c"))
        .await
        .unwrap();
    there
        .replace_one(doc! {"_id": "r"}, huge("r", "d"))
        .await
        .unwrap();
    // THEN both sides have it
    converged_without_conflict(&world, &daemon).await;
    assert_eq!(here.count_documents(doc! {}).await.unwrap(), 2);
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
