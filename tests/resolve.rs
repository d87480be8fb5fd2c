//! Every strategy on every kind of conflict, through the real binary, on real servers: what it makes of
//! both sides, what it keeps, what stops it, and what a crash in the middle leaves.

#![allow(clippy::unwrap_used)] // clippy sees only the functions marked #[test] as tests

mod common;

use common::{Daemon, SOON, World, wait_for, wait_until};
use mongodb::IndexModel;
use mongodb::bson::{Bson, DateTime, Document, doc, oid::ObjectId};
use mongodb::options::IndexOptions;
use serde_json::{Value, json};

/// Writes on both sides while nothing moves, then lets the daemon find out.
async fn apart(daemon: &Daemon, writes: impl Future<Output = ()>) {
    assert_eq!(
        daemon
            .post("/api/sync/pause", json!({}))
            .await
            .unwrap()
            .status,
        200
    );
    writes.await;
    assert_eq!(
        daemon
            .post("/api/sync/resume", json!({}))
            .await
            .unwrap()
            .status,
        200
    );
}

/// Waits for so many open conflicts; the newest first.
async fn open(daemon: &Daemon, count: usize) -> Vec<Value> {
    wait_until(SOON, "open conflicts", async || {
        let answer = daemon.get("/api/sync/conflicts?resolved=false").await?;
        let found = answer.body.as_array().cloned().unwrap_or_default();
        if found.len() == count {
            return Ok(found);
        }
        Err(format!("{} open: {}", found.len(), answer.body))
    })
    .await
}

async fn resolve(daemon: &Daemon, conflict: &Value, body: Value) -> (u16, Value) {
    let id = conflict["_id"].as_str().unwrap();
    let answer = daemon
        .post(&format!("/api/sync/conflicts/{id}/resolve"), body)
        .await
        .unwrap();
    (answer.status, answer.body)
}

async fn resolved(daemon: &Daemon, conflict: &Value, body: Value) -> Value {
    let (status, body) = resolve(daemon, conflict, body).await;
    assert_eq!(status, 200, "{body}");
    body
}

async fn undo(daemon: &Daemon, conflict: &Value, body: Value) -> (u16, Value) {
    let id = conflict["_id"].as_str().unwrap();
    let answer = daemon
        .post(&format!("/api/sync/conflicts/{id}/undo"), body)
        .await
        .unwrap();
    (answer.status, answer.body)
}

async fn get(world: &World, side: &str, coll: &str, id: impl Into<Bson>) -> Option<Document> {
    let db = if side == "local" {
        &world.local
    } else {
        &world.remote
    };
    let found = db
        .collection::<Document>(coll)
        .find_one(doc! {"_id": id.into()})
        .await
        .unwrap();
    found.map(|mut d| {
        for name in ["syncedAt", "origin", "syncStatus"] {
            d.remove(name);
        }
        d
    })
}

async fn both(world: &World, coll: &str, id: impl Into<Bson>) -> Option<Document> {
    let id = id.into();
    let local = get(world, "local", coll, id.clone()).await;
    assert_eq!(local, get(world, "remote", coll, id).await);
    local
}

async fn set(db: &mongodb::Database, coll: &str, id: i32, fields: Document) {
    let coll = db.collection::<Document>(coll);
    let done = coll
        .update_one(doc! {"_id": id}, doc! {"$set": fields})
        .await
        .unwrap();
    assert_eq!(done.matched_count, 1);
}

/// One document changed on both sides in the field `n`, and each side in one more.
async fn modified(world: &World, daemon: &Daemon, id: i32) {
    let coll = world.local.collection::<Document>("stock");
    coll.insert_one(doc! {"_id": id, "n": 1, "a": 1, "b": 1})
        .await
        .unwrap();
    world.wait_converged(daemon).await;
    apart(daemon, async {
        set(&world.local, "stock", id, doc! {"n": 2, "a": 2}).await;
        set(&world.remote, "stock", id, doc! {"n": 3, "b": 3}).await;
    })
    .await;
}

async fn unique_usernames(world: &World) {
    for db in [&world.local, &world.remote] {
        let options = IndexOptions::builder().unique(true).build();
        let index = IndexModel::builder()
            .keys(doc! {"username": 1})
            .options(options)
            .build();
        db.collection::<Document>("admins")
            .create_index(index)
            .await
            .unwrap();
    }
}

/// The same username on both sides, under the `_id`s 1 (local) and 2 (remote).
async fn taken(world: &World, daemon: &Daemon) -> Value {
    unique_usernames(world).await;
    world.wait_converged(daemon).await;
    apart(daemon, async {
        let (local, remote) = (
            world.local.collection("admins"),
            world.remote.collection("admins"),
        );
        local
            .insert_one(doc! {"_id": 1, "username": "john", "phone": 1})
            .await
            .unwrap();
        remote
            .insert_one(doc! {"_id": 2, "username": "john", "mail": 2})
            .await
            .unwrap();
    })
    .await;
    open(daemon, 1).await.remove(0)
}

async fn record(world: &World, conflict: &Value) -> Document {
    let id = ObjectId::parse_str(conflict["_id"].as_str().unwrap()).unwrap();
    let logs = world.local.collection::<Document>("conflict_logs");
    wait_until(SOON, "the record is written", async || {
        let found = logs.find_one(doc! {"_id": id}).await.unwrap().unwrap();
        if found.get_bool("resolved").unwrap() {
            return Ok(found);
        }
        Err(format!("{found}"))
    })
    .await
}

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

fn with(body: &Value, name: &str, value: impl Into<Value>) -> Value {
    let mut body = body.clone();
    body[name] = value.into();
    body
}

async fn both_versions(world: &World, id: i32) -> [Option<Document>; 2] {
    [
        get(world, "local", "stock", id).await,
        get(world, "remote", "stock", id).await,
    ]
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
async fn a_side_that_changed_since_it_was_shown_stops_the_resolution() {
    let world = World::new("changed_since").await;
    let daemon = world.start().await;
    modified(&world, &daemon, 1).await;
    let conflict = open(&daemon, 1).await.remove(0);
    for (side, db) in [("remote", &world.remote), ("local", &world.local)] {
        set(db, "stock", 1, doc! {"n": 50}).await;
        // Whether or not the daemon has noticed: what counts is what was shown.
        let (status, answer) = resolve(&daemon, &conflict, json!({"strategy": "keep_local"})).await;
        assert_eq!(status, 409, "{side}: {answer}");
        assert_eq!(
            answer["conflict"][format!("{side}Value")],
            json!(50),
            "{answer}"
        );
        assert_eq!(
            get(&world, side, "stock", 1)
                .await
                .unwrap()
                .get_i32("n")
                .ok(),
            Some(50)
        );
        if side == "remote" {
            // The answer showed the new state, so it counts from now on; a version of before does not.
            let version = conflict["version"].clone();
            let stale = json!({"strategy": "keep_local", "version": version});
            assert_eq!(resolve(&daemon, &conflict, stale).await.0, 409);
            set(db, "stock", 1, doc! {"n": 3}).await;
            daemon
                .get(&format!(
                    "/api/sync/conflicts/{}",
                    conflict["_id"].as_str().unwrap()
                ))
                .await
                .unwrap();
        }
    }
    resolved(&daemon, &conflict, json!({"strategy": "keep_local"})).await;
    world.wait_converged(&daemon).await;
    assert_eq!(
        both(&world, "stock", 1).await.unwrap().get_i32("n").ok(),
        Some(50)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn undo_puts_back_what_was_discarded_and_leaves_later_edits() {
    let world = World::new("undo").await;
    let daemon = world.start().await;
    for (id, strategy, back) in [(1, "keep_remote", 2), (2, "keep_local", 3), (3, "merge", 3)] {
        modified(&world, &daemon, id).await;
        let conflict = open(&daemon, 1).await.remove(0);
        assert_eq!(
            undo(&daemon, &conflict, json!({})).await.0,
            409,
            "still open"
        );
        resolved(&daemon, &conflict, json!({"strategy": strategy})).await;
        world.wait_converged(&daemon).await;
        set(&world.remote, "stock", id, doc! {"later": true}).await;
        world.wait_converged(&daemon).await;
        let (status, answer) = undo(&daemon, &conflict, json!({})).await;
        assert_eq!(status, 200, "{answer}");
        world.wait_converged(&daemon).await;
        let now = both(&world, "stock", id).await.unwrap();
        assert_eq!(
            (now.get_i32("n").ok(), now.get_bool("later").ok()),
            (Some(back), Some(true)),
            "{strategy}"
        );
        assert_eq!(
            undo(&daemon, &conflict, json!({})).await.0,
            409,
            "only once"
        );

        let id_of = conflict["_id"].as_str().unwrap();
        let shown = daemon
            .get(&format!("/api/sync/conflicts/{id_of}"))
            .await
            .unwrap()
            .body;
        let (status, answer) = undo(&daemon, &json!({"_id": shown["undoneIn"]}), json!({})).await;
        assert_eq!(status, 200, "an undo can be undone: {answer} {shown}");
        world.wait_converged(&daemon).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn undo_of_a_document_given_up_needs_a_free_name() {
    let world = World::new("undo_unique").await;
    let daemon = world.start().await;
    let conflict = taken(&world, &daemon).await;
    resolved(&daemon, &conflict, json!({"strategy": "keep_remote"})).await;
    world.wait_converged(&daemon).await;
    let (status, answer) = undo(&daemon, &conflict, json!({})).await;
    assert_eq!(status, 409, "{answer}");
    let (status, answer) = undo(&daemon, &conflict, json!({"newValue": "john_back"})).await;
    assert_eq!(status, 200, "{answer}");
    world.wait_converged(&daemon).await;
    let one = both(&world, "admins", 1).await;
    assert_eq!(
        one,
        Some(doc! {"_id": 1, "username": "john_back", "phone": 1})
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_policy_discarded_can_be_put_back() {
    let world = World::new("undo_policy").await;
    let daemon = world
        .start_with(
            world
                .settings()
                .set("sync.conflict_resolution_strategy", "\"remote_wins\""),
        )
        .await;
    modified(&world, &daemon, 1).await;
    world.wait_converged(&daemon).await;
    assert_eq!(
        both(&world, "stock", 1).await.unwrap().get_i32("n").ok(),
        Some(3)
    );
    let list = wait_until(SOON, "the record", async || {
        let found = daemon.get("/api/sync/conflicts?resolved=true").await?.body;
        found.get(0).cloned().ok_or_else(|| found.to_string())
    })
    .await;
    assert_eq!(
        (&list["resolutionStrategy"], &list["resolvedBy"]),
        (&json!("remote_wins"), &json!("policy"))
    );
    let (status, answer) = undo(&daemon, &list, json!({})).await;
    assert_eq!(status, 200, "{answer}");
    world.wait_converged(&daemon).await;
    let now = both(&world, "stock", 1).await.unwrap();
    assert_eq!(
        (now.get_i32("n").ok(), now.get_i32("b").ok()),
        (Some(2), Some(3))
    );

    // A deletion that lost against a change is carried out after all.
    apart(&daemon, async {
        world
            .local
            .collection::<Document>("stock")
            .delete_one(doc! {"_id": 1})
            .await
            .unwrap();
        set(&world.remote, "stock", 1, doc! {"n": 9}).await;
    })
    .await;
    world.wait_converged(&daemon).await;
    assert_eq!(
        both(&world, "stock", 1).await.unwrap().get_i32("n").ok(),
        Some(9)
    );
    let deleted = wait_until(SOON, "the second record", async || {
        let found = daemon
            .get("/api/sync/conflicts?kind=delete_update")
            .await?
            .body;
        found.get(0).cloned().ok_or_else(|| found.to_string())
    })
    .await;
    assert_eq!(undo(&daemon, &deleted, json!({})).await.0, 200);
    world.wait_converged(&daemon).await;
    assert_eq!(both(&world, "stock", 1).await, None);
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
        }
        resolved(&daemon, &conflict, json!({"strategy": strategy})).await;
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
async fn a_daemon_killed_in_the_middle_finishes_or_forgets_never_half() {
    for point in ["ruling_stored", "ruling_written", "ruling_done"] {
        for strategy in ["keep_local", "keep_remote", "merge", "unique"] {
            let world = World::new("killed").await;
            let mut daemon = world.start().await;
            let conflict = if strategy == "unique" {
                taken(&world, &daemon).await
            } else {
                modified(&world, &daemon, 1).await;
                open(&daemon, 1).await.remove(0)
            };
            daemon.settings = daemon
                .settings
                .clone()
                .env("SANGAM_FAILPOINT", &format!("{point}:1.0"));
            daemon.restart().await;
            daemon.wait_status("isOnline", |v| v == &json!(true)).await;
            let name = if strategy == "unique" {
                "merge"
            } else {
                strategy
            };
            let id = conflict["_id"].as_str().unwrap();
            let path = format!("/api/sync/conflicts/{id}/resolve");
            let asked = daemon.post(&path, json!({"strategy": name})).await;
            assert!(asked.is_err(), "{point} {strategy}: {asked:?}");
            daemon.wait_exit().await;
            daemon.settings = daemon.settings.clone().env("SANGAM_FAILPOINT", "");
            daemon.restart().await;
            let record = record(&world, &conflict).await;
            assert_eq!(
                record.get_str("resolutionStrategy").ok(),
                Some(name),
                "{point} {strategy}"
            );
            world.wait_converged(&daemon).await;
            if strategy == "unique" {
                assert_eq!(both(&world, "admins", 1).await, None);
                let two = both(&world, "admins", 2).await.unwrap();
                assert_eq!(two.get_i32("phone").ok(), Some(1), "{point}: {two}");
            } else {
                let want = if strategy == "keep_remote" { 3 } else { 2 };
                assert_eq!(
                    both(&world, "stock", 1).await.unwrap().get_i32("n").ok(),
                    Some(want),
                    "{point} {strategy}"
                );
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_on_both_sides_race_with_resolutions_and_lose_nothing() {
    let world = World::new("race").await;
    let daemon = world.start().await;
    modified(&world, &daemon, 1).await;
    open(&daemon, 1).await;
    // Each writer counts up in a field of its own, and now and then in the common one.
    let writer = |db: mongodb::Database, own: &'static str| async move {
        let coll = db.collection::<Document>("stock");
        for i in 1..=60 {
            let mut inc = doc! {own: 1};
            if i % 10 == 0 {
                inc.insert("n", 1);
            }
            coll.update_one(doc! {"_id": 1}, doc! {"$inc": inc})
                .await
                .unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(15)).await;
        }
    };
    let writers = async {
        tokio::join!(
            writer(world.local.clone(), "own_l"),
            writer(world.remote.clone(), "own_r")
        )
    };
    let (mut written, mut stopped) = (0, 0);
    let resolver = async {
        for _ in 0..80 {
            let found = daemon
                .get("/api/sync/conflicts?resolved=false")
                .await
                .unwrap()
                .body;
            if let Some(conflict) = found.get(0) {
                match resolve(&daemon, conflict, json!({"strategy": "merge"})).await {
                    (200, _) => written += 1,
                    (409, _) => stopped += 1,
                    other => panic!("{other:?}"),
                }
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::join!(writers, resolver);
    println!("{written} written, {stopped} stopped");
    wait_until(SOON, "the last conflict is settled", async || {
        let found = daemon.get("/api/sync/conflicts?resolved=false").await?.body;
        match found.get(0) {
            None => Ok(()),
            Some(conflict) => {
                resolve(&daemon, conflict, json!({"strategy": "merge"})).await;
                Err("one more".to_owned())
            }
        }
    })
    .await;
    world.wait_converged(&daemon).await;
    let end = both(&world, "stock", 1).await.unwrap();
    assert_eq!(
        (end.get_i32("own_l").ok(), end.get_i32("own_r").ok()),
        (Some(60), Some(60)),
        "{end}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn auto_resolve_and_bulk() {
    let world = World::new("auto").await;
    let daemon = world.start().await;
    unique_usernames(&world).await;
    let now = DateTime::now();
    let old = DateTime::from_millis(now.timestamp_millis() - 7_200_000);
    for i in 0..4 {
        let d = doc! {"_id": i, "n": 1, "updatedAt": old};
        world.local.collection("stock").insert_one(d).await.unwrap();
    }
    world.wait_converged(&daemon).await;
    apart(&daemon, async {
        for i in 0..4 {
            let (l, r) = if i < 2 { (old, now) } else { (now, old) };
            set(&world.local, "stock", i, doc! {"n": 2, "updatedAt": l}).await;
            set(&world.remote, "stock", i, doc! {"n": 3, "updatedAt": r}).await;
        }
        let (local, remote) = (
            world.local.collection("admins"),
            world.remote.collection("admins"),
        );
        local
            .insert_one(doc! {"_id": ObjectId::new(), "username": "john_admin"})
            .await
            .unwrap();
        remote
            .insert_one(doc! {"_id": 2, "username": "john_admin"})
            .await
            .unwrap();
    })
    .await;
    open(&daemon, 5).await;
    let answer = daemon
        .post("/api/sync/conflicts/auto-resolve", json!({}))
        .await
        .unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    let counts = ["resolved", "skipped", "failed"].map(|name| answer.body[name].as_u64().unwrap());
    assert_eq!(counts, [3, 2, 0], "{}", answer.body);
    open(&daemon, 2).await;
    let names = world
        .local
        .collection::<Document>("admins")
        .distinct("username", doc! {})
        .await
        .unwrap();
    assert_eq!(names.len(), 2);
    let renamed = names
        .iter()
        .filter_map(|n| n.as_str())
        .find(|n| *n != "john_admin")
        .unwrap();
    assert!(
        renamed.starts_with("john_admin_") && renamed.len() == 15,
        "{renamed}"
    );

    let bulk = json!({"strategy": "keep_local", "collection": "stock", "kind": "both_modified"});
    let answer = daemon
        .post("/api/sync/conflicts/resolve", bulk)
        .await
        .unwrap();
    assert_eq!(
        (answer.status, &answer.body["resolved"]),
        (200, &json!(2)),
        "{}",
        answer.body
    );
    world.wait_converged(&daemon).await;
    for (i, n) in [(0, 3), (1, 3), (2, 2), (3, 2)] {
        assert_eq!(
            both(&world, "stock", i).await.unwrap().get_i32("n").ok(),
            Some(n)
        );
    }
}
