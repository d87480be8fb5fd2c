//! Resolutions among writers, crashes and second thoughts: nothing unseen is overwritten, nothing is
//! half done, everything can be taken back.

use crate::common::conflict::*;
use crate::common::kit::dealt_with;
use crate::common::{SOON, World, wait_until};
use mongodb::bson::{DateTime, Document, doc, oid::ObjectId};
use serde_json::json;

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
    let names = wait_until(SOON, "both names are here", async || {
        let admins = world.local.collection::<Document>("admins");
        let names = admins.distinct("username", doc! {}).await.unwrap();
        (names.len() == 2)
            .then_some(names)
            .ok_or_else(|| "one".to_owned())
    })
    .await;
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

#[tokio::test(flavor = "multi_thread")]
async fn what_was_under_way_when_a_collection_was_dropped_does_not_drop_it_again() {
    // A batch of an edit that has yet to look, and one that is about to carry deletions over.
    for stall in ["claimed", "judged"] {
        let world = World::new("dropped_once").await;
        let gate = world.dir().join("gate");
        let settings = world.settings().set("sync.mass_delete_percent", "0");
        let variable = format!("{stall}:{}", gate.display());
        let daemon = world
            .start_with(settings.env("SANGAM_STALL", &variable))
            .await;
        let gone = world.local.collection::<Document>("gone");
        let docs = (0..3).map(|i| doc! {"_id": i, "v": 1});
        gone.insert_many(docs).await.unwrap();
        world.wait_converged(&daemon).await;
        dealt_with(&daemon).await;
        std::fs::write(&gate, b"").unwrap();
        match stall {
            "claimed" => set(&world.local, "gone", 0, doc! {"v": 2}).await,
            _ => drop(gone.delete_many(doc! {}).await.unwrap()),
        }
        wait_until(SOON, "the batch waits", async || {
            let there = gate.with_extension("reached").exists();
            there.then_some(()).ok_or(String::from("it does not"))
        })
        .await;
        gone.drop().await.unwrap();
        let conflict = open(&daemon, 1).await.remove(0);
        assert_eq!(conflict["kind"], "collection_dropped");
        let queue = daemon.get("/api/sync/queue").await.unwrap().body;
        let why = queue["entries"][0]["reason"].as_str().unwrap();
        assert!(why.contains("waits for your decision"), "{queue}");
        resolved(&daemon, &conflict, json!({"strategy": "keep_remote"})).await;
        std::fs::remove_file(&gate).unwrap();
        wait_until(SOON, "the documents are back", async || {
            let back = gone.count_documents(doc! {}).await.unwrap();
            let state = daemon.status().await.unwrap();
            (back == 3).then_some(()).ok_or(format!("{back} {state}"))
        })
        .await;
        world.wait_converged(&daemon).await;
        let state = daemon.status().await.unwrap();
        assert_eq!(state["unresolvedConflicts"], 0, "{stall}: {state}");
        assert_eq!(state["totalConflicts"], 1, "{stall}: {state}");
    }
}
