//! Every strategy on every kind of conflict, through the real binary, on real servers: what it makes of
//! both sides, what it keeps, and what stops it.

use crate::common::conflict::*;
use crate::common::kit::dealt_with;
use crate::common::{World, wait_for};
use mongodb::bson::{Document, doc};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn both_modified_by_each_strategy() {
    let world = World::new("both_modified").await;
    let daemon = world.start().await;
    for (i, (body, want)) in [
        (
            json!({"strategy": "keep_local"}),
            doc! {"n": 2, "a": 2, "b": 1},
        ),
        (
            json!({"strategy": "keep_remote"}),
            doc! {"n": 3, "a": 1, "b": 3},
        ),
        (json!({"strategy": "merge"}), doc! {"n": 2, "a": 2, "b": 3}),
        (
            json!({"strategy": "merge", "newValue": "7", "notes": "counted"}),
            doc! {"n": 7, "a": 2, "b": 3},
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let id = i32::try_from(i).unwrap();
        modified(&world, &daemon, id).await;
        let conflict = open(&daemon, 1).await.remove(0);
        assert_eq!(
            (&conflict["kind"], &conflict["field"]),
            (&json!("both_modified"), &json!("n"))
        );
        assert_eq!(
            (&conflict["localValue"], &conflict["remoteValue"]),
            (&json!(2), &json!(3))
        );
        let before = both_versions(&world, id).await;
        let dry = resolved(&daemon, &conflict, with(&body, "dryRun", true)).await;
        assert_eq!(dry["dry_run"], true);
        assert_eq!(
            before,
            both_versions(&world, id).await,
            "a dry run writes nothing"
        );

        let done = resolved(&daemon, &conflict, body.clone()).await;
        assert_eq!(
            (&done["success"], &done["conflict_id"], &done["settled"]),
            (&json!(true), &conflict["_id"], &json!(true)),
            "{done}"
        );
        world.wait_converged(&daemon).await;
        let now = both(&world, "stock", id).await.unwrap();
        for (name, value) in &want {
            assert_eq!(now.get(name), Some(value), "{body} {name}: {now}");
        }
        assert_eq!(
            dry["result"]["document"]["n"],
            done["result"]["document"]["n"]
        );
        let record = record(&world, &conflict).await;
        assert_eq!(
            record.get_str("resolutionStrategy").unwrap(),
            body["strategy"].as_str().unwrap()
        );
        assert_eq!(
            record
                .get_document("localDocument")
                .unwrap()
                .get_i32("n")
                .ok(),
            Some(2),
            "R21"
        );
        assert_eq!(
            record
                .get_document("remoteDocument")
                .unwrap()
                .get_i32("n")
                .ok(),
            Some(3),
            "R21"
        );
        let again = resolve(&daemon, &conflict, body).await;
        assert_eq!(again.0, 200, "idempotent: {}", again.1);
        let other = resolve(
            &daemon,
            &conflict,
            json!({"strategy": "rename_local", "newValue": "x"}),
        )
        .await;
        assert_eq!(other.0, 409);
    }
    assert_eq!(daemon.status().await.unwrap()["unresolvedConflicts"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn insert_insert_by_each_strategy() {
    let world = World::new("insert_insert").await;
    let daemon = world.start().await;
    for (id, strategy, want) in [(1, "keep_local", 1), (2, "keep_remote", 2), (3, "merge", 1)] {
        apart(&daemon, async {
            let (local, remote) = (world.local.collection("c"), world.remote.collection("c"));
            local.insert_one(doc! {"_id": id, "v": 1}).await.unwrap();
            remote.insert_one(doc! {"_id": id, "v": 2}).await.unwrap();
        })
        .await;
        let conflict = open(&daemon, 1).await.remove(0);
        assert_eq!(conflict["kind"], "insert_insert");
        resolved(&daemon, &conflict, json!({"strategy": strategy})).await;
        world.wait_converged(&daemon).await;
        assert_eq!(
            both(&world, "c", id).await,
            Some(doc! {"_id": id, "v": want})
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_name_by_each_strategy() {
    for (strategy, value) in [
        ("rename_local", Some("john_b")),
        ("keep_local", Some("john_b")),
        ("merge", Some("john_b")),
        ("keep_remote", None),
        ("merge", None),
    ] {
        let world = World::new("taken_name").await;
        let daemon = world.start().await;
        let conflict = taken(&world, &daemon).await;
        assert_eq!(
            (&conflict["kind"], &conflict["field"]),
            (&json!("unique_field"), &json!("username"))
        );
        let mut body = json!({"strategy": strategy});
        if let Some(value) = value {
            if strategy != "merge" {
                let (status, answer) = resolve(&daemon, &conflict, body.clone()).await;
                assert_eq!(status, 400, "a value is needed: {answer}");
            }
            let (status, answer) =
                resolve(&daemon, &conflict, with(&body, "newValue", "john")).await;
            assert_eq!(status, 400, "the taken one: {answer}");
            body["newValue"] = value.into();
        }
        resolved(&daemon, &conflict, body).await;
        world.wait_converged(&daemon).await;
        let (one, two) = (
            both(&world, "admins", 1).await,
            both(&world, "admins", 2).await,
        );
        match (strategy, value) {
            (_, Some(value)) => {
                assert_eq!(one, Some(doc! {"_id": 1, "username": value, "phone": 1}));
                assert_eq!(two, Some(doc! {"_id": 2, "username": "john", "mail": 2}));
            }
            ("merge", None) => {
                assert_eq!(one, None);
                assert_eq!(
                    two,
                    Some(doc! {"_id": 2, "username": "john", "mail": 2, "phone": 1})
                );
            }
            _ => {
                assert_eq!(one, None, "the record has it");
                assert_eq!(two, Some(doc! {"_id": 2, "username": "john", "mail": 2}));
                let record = record(&world, &conflict).await;
                assert_eq!(
                    record
                        .get_document("localDocument")
                        .unwrap()
                        .get_i32("phone")
                        .ok(),
                    Some(1)
                );
            }
        }
        assert_eq!(daemon.status().await.unwrap()["unresolvedConflicts"], 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_is_taken_or_refused_is_found_out_before_anything_is_written() {
    let world = World::new("value_checked").await;
    let daemon = world.start().await;
    let conflict = taken(&world, &daemon).await;
    // Taken on the remote side only, and not here yet.
    apart(&daemon, async {}).await;
    daemon.post("/api/sync/pause", json!({})).await.unwrap();
    world
        .remote
        .collection("admins")
        .insert_one(doc! {"_id": 3, "username": "jane"})
        .await
        .unwrap();
    let rename = |name: &str| json!({"strategy": "rename_local", "newValue": name});
    let (status, answer) = resolve(&daemon, &conflict, rename("jane")).await;
    assert_eq!(status, 409, "{answer}");
    assert!(
        answer["detail"].as_str().unwrap().contains("remote side"),
        "{answer}"
    );
    let validator = doc! {"username": {"$not": {"$regex": "^x"}}};
    let command = doc! {"collMod": "admins", "validator": validator};
    world.remote.run_command(command).await.unwrap();
    let (status, answer) = resolve(&daemon, &conflict, rename("xavier")).await;
    assert_eq!(status, 409, "{answer}");
    assert!(
        answer["detail"].as_str().unwrap().contains("validator"),
        "{answer}"
    );
    let one = get(&world, "local", "admins", 1).await.unwrap();
    assert_eq!(one.get_str("username").ok(), Some("john"));
    daemon.post("/api/sync/resume", json!({})).await.unwrap();
    resolved(&daemon, &conflict, rename("john_2")).await;
    world.wait_converged(&daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_whose_cause_is_gone_closes_itself() {
    let world = World::new("cause_gone").await;
    let daemon = world.start().await;
    modified(&world, &daemon, 1).await;
    let first = open(&daemon, 1).await.remove(0);
    // Somebody makes both sides alike by hand.
    set(&world.local, "stock", 1, doc! {"n": 3, "a": 1, "b": 3}).await;
    let note = record(&world, &first).await;
    assert_eq!(note.get_str("resolvedBy").ok(), Some("sangam"));
    assert!(note.get_str("notes").unwrap().contains("cause is gone"));
    world.wait_converged(&daemon).await;

    for side in ["local", "remote"] {
        let world = World::new("cause_gone_unique").await;
        let daemon = world.start().await;
        let conflict = taken(&world, &daemon).await;
        let (db, id) = if side == "local" {
            (&world.local, 1)
        } else {
            (&world.remote, 2)
        };
        if side == "local" {
            // The document itself goes away.
            db.collection::<Document>("admins")
                .delete_one(doc! {"_id": id})
                .await
                .unwrap();
        } else {
            set(db, "admins", id, doc! {"username": "jim"}).await;
        }
        record(&world, &conflict).await;
        world.wait_converged(&daemon).await;
        assert_eq!(daemon.status().await.unwrap()["unresolvedConflicts"], 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_document_is_tried_again_or_given_up() {
    let world = World::new("refused").await;
    world
        .remote
        .create_collection("v")
        .validator(doc! {"n": {"$lt": 10}})
        .await
        .unwrap();
    let daemon = world
        .start_with(world.settings().set("sync.max_retries", "1"))
        .await;
    for (id, strategy) in [(1, "keep_local"), (2, "keep_remote")] {
        world
            .local
            .collection("v")
            .insert_one(doc! {"_id": id, "n": 50})
            .await
            .unwrap();
        let conflict = open(&daemon, 1).await.remove(0);
        assert_eq!(conflict["kind"], "rejected");
        if strategy == "keep_local" {
            let (status, answer) = resolve(&daemon, &conflict, json!({"strategy": strategy})).await;
            assert_eq!(status, 409, "still refused: {answer}");
            let command = doc! {"collMod": "v", "validator": {"n": {"$lt": 100}}};
            world.remote.run_command(command).await.unwrap();
            // The refused try put the document back into the queue, so the worker may be first.
            let (status, answer) = resolve(&daemon, &conflict, json!({"strategy": strategy})).await;
            // Either way the document must be on both sides, which is asked for below.
            assert!([200, 409].contains(&status), "{status} {answer}");
        } else {
            resolved(&daemon, &conflict, json!({"strategy": strategy})).await;
        }
        world.wait_converged(&daemon).await;
        let want = (strategy == "keep_local").then(|| doc! {"_id": id, "n": 50});
        assert_eq!(both(&world, "v", id).await, want);
        let command = doc! {"collMod": "v", "validator": {"n": {"$lt": 10}}};
        world.remote.run_command(command).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_collection_comes_back_or_goes_on_the_other_side_too() {
    for (strategy, left) in [("keep_remote", 5), ("keep_local", 0)] {
        let world = World::new("dropped").await;
        let daemon = world
            .start_with(world.settings().set("sync.mass_delete_percent", "0"))
            .await;
        let docs: Vec<Document> = (0..5).map(|i| doc! {"_id": i, "v": i}).collect();
        world
            .local
            .collection("gone")
            .insert_many(docs)
            .await
            .unwrap();
        world.wait_converged(&daemon).await;
        dealt_with(&daemon).await;
        world
            .local
            .collection::<Document>("gone")
            .drop()
            .await
            .unwrap();
        let conflict = open(&daemon, 1).await.remove(0);
        assert_eq!(conflict["kind"], "collection_dropped");
        assert_eq!(daemon.status().await.unwrap()["unresolvedConflicts"], 1);
        let (status, _) = resolve(&daemon, &conflict, json!({"strategy": "merge"})).await;
        assert_eq!(status, 400);
        let dry = resolved(
            &daemon,
            &conflict,
            json!({"strategy": strategy, "dryRun": true}),
        )
        .await;
        assert_eq!(dry["result"]["documents"], 5);
        resolved(&daemon, &conflict, json!({"strategy": strategy})).await;
        wait_for("both sides have it or not", async || {
            let count = |db: &mongodb::Database| {
                let coll = db.collection::<Document>("gone");
                async move { coll.count_documents(doc! {}).await.unwrap() }
            };
            count(&world.local).await == left && count(&world.remote).await == left
        })
        .await;
        world.wait_converged(&daemon).await;
        assert_eq!(daemon.status().await.unwrap()["unresolvedConflicts"], 0);
        if strategy == "keep_local" {
            let (status, answer) = undo(&daemon, &conflict, json!({})).await;
            assert_eq!(status, 200, "{answer}");
            world.wait_converged(&daemon).await;
            assert_eq!(both(&world, "gone", 3).await, Some(doc! {"_id": 3, "v": 3}));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_settles_its_field_before_it_is_a_conflict() {
    let world = World::new("field_rule").await;
    let settings = world
        .settings()
        .set("sync.rules.stock.n", "\"sum_of_changes\"");
    let daemon = world.start_with(settings).await;
    // 1 became 2 here and 3 there: one more, and two more.
    modified(&world, &daemon, 1).await;
    world.wait_converged(&daemon).await;
    let want = doc! {"_id": 1, "n": 4, "a": 2, "b": 3};
    assert_eq!(both(&world, "stock", 1).await, Some(want));
    assert_eq!(daemon.status().await.unwrap()["totalConflicts"], 0);
}
