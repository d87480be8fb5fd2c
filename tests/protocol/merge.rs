//! Both sides changed: merge by field, policies, what is kept on record (R19, R21).

use crate::common::kit::{
    Docs, body, both, conflicts_now, converged_without_conflict, cut, dealt_with, heal, queue,
    says, set, the_conflict, wait_closed, wait_content, wait_doc,
};
use crate::common::{Daemon, Settings, World, wait_for};
use mongodb::bson::{DateTime, Document, doc};

/// A world where document 1 of `c` was agreed on, then changed on both sides while the link was away.
async fn apart(
    test: &str,
    settings: impl FnOnce(Settings) -> Settings,
    agreed: Document,
    local: impl AsyncFnOnce(&Docs),
    remote: impl AsyncFnOnce(&Docs),
) -> (World, Daemon) {
    let world = World::new(test).await;
    let daemon = world.start_with(settings(world.settings())).await;
    let (here, there) = both(&world, "c");
    here.insert_one(agreed).await.unwrap();
    world.wait_converged(&daemon).await;
    cut(&world, &daemon).await;
    local(&here).await;
    remote(&there).await;
    heal(&world, &daemon).await;
    (world, daemon)
}

fn policy(name: &str) -> impl FnOnce(Settings) -> Settings {
    move |s| s.set("sync.conflict_resolution_strategy", &format!("{name:?}"))
}

fn v0() -> Document {
    doc! {"_id": 1, "v": "base", "other": 0}
}

async fn v_local(c: &Docs) {
    set(c, 1, doc! {"v": "local"}).await;
}

async fn v_remote(c: &Docs) {
    set(c, 1, doc! {"v": "remote"}).await;
}

/// Every version is on record whole (R21).
fn all_versions_kept(conflict: &Document) {
    let with = |v: &str| Some(doc! {"_id": 1, "v": v, "other": 0});
    assert_eq!(
        body(conflict, "localDocument"),
        with("local"),
        "{conflict:#?}"
    );
    assert_eq!(
        body(conflict, "remoteDocument"),
        with("remote"),
        "{conflict:#?}"
    );
    assert_eq!(
        body(conflict, "baseDocument"),
        with("base"),
        "{conflict:#?}"
    );
}

#[tokio::test]
async fn different_fields_are_merged_without_a_conflict() {
    // GIVEN both sides changed, added and removed different fields
    let agreed = doc! {"_id": 1, "a": 1, "b": 1, "c": 1, "d": 1};
    let (world, daemon) = apart(
        "fields",
        |s| s,
        agreed,
        async |c| {
            let update = doc! {"$set": {"a": 2, "new_l": {"x": 1}}, "$unset": {"c": ""}};
            c.update_one(doc! {"_id": 1}, update).await.unwrap();
        },
        async |c| {
            let update = doc! {"$set": {"b": 2, "new_r": [1]}, "$unset": {"d": ""}};
            c.update_one(doc! {"_id": 1}, update).await.unwrap();
        },
    )
    .await;
    // THEN both have all of it
    converged_without_conflict(&world, &daemon).await;
    let (here, _) = both(&world, "c");
    wait_doc(&here, 1, "the merge", |d| {
        let expected = doc! {"a": 2, "b": 2, "new_l": {"x": 1}, "new_r": [1]};
        expected.iter().all(|(k, v)| d.get(k) == Some(v))
            && !d.contains_key("c")
            && !d.contains_key("d")
    })
    .await;
}

#[tokio::test]
async fn the_later_updated_at_goes_with_a_merge() {
    let at = |s: i64| DateTime::from_millis(1_700_000_000_000 + s * 1000);
    let (world, daemon) = apart(
        "updated_at",
        |s| s,
        doc! {"_id": 1, "a": 1, "b": 1, "updatedAt": at(0)},
        async |c| set(c, 1, doc! {"a": 2, "updatedAt": at(20)}).await,
        async |c| set(c, 1, doc! {"b": 2, "updatedAt": at(10)}).await,
    )
    .await;
    converged_without_conflict(&world, &daemon).await;
    let (_, there) = both(&world, "c");
    let merged = doc! {"_id": 1, "a": 2, "b": 2, "updatedAt": at(20)};
    wait_content(&there, 1, merged).await;
}

#[tokio::test]
async fn the_same_change_on_both_sides_is_no_conflict() {
    let same = async |c: &Docs| set(c, 1, doc! {"v": "same"}).await;
    let (world, daemon) = apart("same", |s| s, v0(), same, same).await;
    converged_without_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn r19_manual_holds_that_document_only_and_a_repair_by_hand_closes_it() {
    // GIVEN the same field changed on both sides
    let (world, daemon) = apart("manual", |s| s, v0(), v_local, v_remote).await;
    let (here, there) = both(&world, "c");
    // THEN one conflict is on record with every version, and neither side is touched
    let conflict = the_conflict(&world, &daemon).await;
    assert_eq!(conflict.get_str("kind").unwrap(), "both_modified");
    assert_eq!(conflict.get_str("field").unwrap(), "v");
    assert_eq!(conflict.get_str("localValue").unwrap(), "local");
    assert_eq!(conflict.get_str("remoteValue").unwrap(), "remote");
    assert!(!conflict.get_bool("resolved").unwrap());
    all_versions_kept(&conflict);
    wait_content(&here, 1, doc! {"_id": 1, "v": "local", "other": 0}).await;
    wait_content(&there, 1, doc! {"_id": 1, "v": "remote", "other": 0}).await;
    wait_doc(&here, 1, "the app sees it", |d| {
        says(d, "syncStatus", "conflict")
    })
    .await;
    assert_eq!(daemon.status().await.unwrap()["unresolvedConflicts"], 1);
    // AND other documents of the collection flow both ways
    here.insert_one(doc! {"_id": 2}).await.unwrap();
    there.insert_one(doc! {"_id": 3}).await.unwrap();
    wait_content(&there, 2, doc! {"_id": 2}).await;
    wait_content(&here, 3, doc! {"_id": 3}).await;
    // WHEN someone makes them equal by hand
    set(&there, 1, doc! {"v": "local"}).await;
    // THEN it closes by itself
    wait_closed(&world, &daemon).await;
    world.wait_converged(&daemon).await;
    wait_doc(&here, 1, "the app sees it", |d| {
        says(d, "syncStatus", "synced")
    })
    .await;
    assert_eq!(world.conflicts().await.len(), 1);
}

#[tokio::test]
async fn r19_an_edit_of_a_held_document_updates_its_record() {
    let (world, daemon) = apart("held_edit", |s| s, v0(), v_local, v_remote).await;
    let (here, _) = both(&world, "c");
    the_conflict(&world, &daemon).await;
    // WHEN the document in conflict is edited again
    set(&here, 1, doc! {"v": "later"}).await;
    // THEN its record says so, and there is no second one
    wait_for("the new value on record", async || {
        says(&world.conflicts().await[0], "localValue", "later")
    })
    .await;
    the_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn r19_a_conflict_survives_a_restart() {
    let (world, mut daemon) = apart("restart", |s| s, v0(), v_local, v_remote).await;
    the_conflict(&world, &daemon).await;
    daemon.restart().await;
    all_versions_kept(&the_conflict(&world, &daemon).await);
    assert_eq!(daemon.status().await.unwrap()["unresolvedConflicts"], 1);
}

/// The policy settled it: both sides have `v`, every version is on record as resolved.
async fn settled(world: &World, daemon: &Daemon, strategy: &str, v: &str) {
    world.wait_converged(daemon).await;
    let conflict = the_conflict(world, daemon).await;
    assert!(conflict.get_bool("resolved").unwrap());
    assert_eq!(conflict.get_str("resolutionStrategy").unwrap(), strategy);
    assert_eq!(conflict.get_str("resolvedBy").unwrap(), "policy");
    all_versions_kept(&conflict);
    for c in [&world.local, &world.remote] {
        wait_content(&c.collection("c"), 1, doc! {"_id": 1, "v": v, "other": 0}).await;
    }
    assert_eq!(daemon.status().await.unwrap()["unresolvedConflicts"], 0);
}

#[tokio::test]
async fn r21_local_wins_and_keeps_every_version() {
    let (world, daemon) = apart("local_wins", policy("local_wins"), v0(), v_local, v_remote).await;
    settled(&world, &daemon, "local_wins", "local").await;
}

#[tokio::test]
async fn r21_remote_wins_and_keeps_every_version() {
    let (world, daemon) = apart(
        "remote_wins",
        policy("remote_wins"),
        v0(),
        v_local,
        v_remote,
    )
    .await;
    settled(&world, &daemon, "remote_wins", "remote").await;
}

#[tokio::test]
async fn a_policy_decides_only_the_field_in_conflict() {
    let (world, daemon) = apart(
        "only_field",
        policy("remote_wins"),
        doc! {"_id": 1, "v": 0, "a": 0},
        async |c| set(c, 1, doc! {"v": 1, "a": 1}).await,
        async |c| set(c, 1, doc! {"v": 2}).await,
    )
    .await;
    world.wait_converged(&daemon).await;
    let (here, _) = both(&world, "c");
    wait_content(&here, 1, doc! {"_id": 1, "v": 2, "a": 1}).await;
}

#[tokio::test]
async fn newest_wins_takes_the_later_updated_at_and_asks_without_one() {
    let at = |s: i64| DateTime::from_millis(1_700_000_000_000 + s * 1000);
    for (case, local, remote, winner) in [("l", 20, 10, "local"), ("r", 10, 20, "remote")] {
        let (world, daemon) = apart(
            &format!("newest_{case}"),
            policy("newest_wins"),
            doc! {"_id": 1, "v": "base", "updatedAt": at(0)},
            async |c| set(c, 1, doc! {"v": "local", "updatedAt": at(local)}).await,
            async |c| set(c, 1, doc! {"v": "remote", "updatedAt": at(remote)}).await,
        )
        .await;
        world.wait_converged(&daemon).await;
        let (here, _) = both(&world, "c");
        let won = doc! {"_id": 1, "v": winner, "updatedAt": at(20)};
        wait_content(&here, 1, won).await;
        let conflict = the_conflict(&world, &daemon).await;
        assert_eq!(
            conflict.get_str("resolutionStrategy").unwrap(),
            "newest_wins"
        );
    }
    // GIVEN documents without a date THEN nothing is guessed
    let (world, daemon) = apart(
        "newest_none",
        policy("newest_wins"),
        v0(),
        v_local,
        v_remote,
    )
    .await;
    let conflict = the_conflict(&world, &daemon).await;
    assert!(!conflict.get_bool("resolved").unwrap());
}

#[tokio::test]
async fn a_collections_own_policy_goes_before_the_global_one() {
    // GIVEN manual for everything, remote_wins for bookings
    let world = World::new("per_collection").await;
    let key = "sync.per_collection.bookings.conflict_resolution_strategy";
    let daemon = world
        .start_with(world.settings().set(key, "\"remote_wins\""))
        .await;
    for coll in ["bookings", "stock"] {
        world.local.collection(coll).insert_one(v0()).await.unwrap();
    }
    world.wait_converged(&daemon).await;
    // WHEN both collections clash
    cut(&world, &daemon).await;
    for coll in ["bookings", "stock"] {
        v_local(&world.local.collection(coll)).await;
        v_remote(&world.remote.collection(coll)).await;
    }
    heal(&world, &daemon).await;
    // THEN one is settled and the other waits
    let (bookings, _) = both(&world, "bookings");
    wait_content(&bookings, 1, doc! {"_id": 1, "v": "remote", "other": 0}).await;
    let all = conflicts_now(&world, &daemon).await;
    assert_eq!(all.len(), 2, "{all:#?}");
    for conflict in all {
        let settled = says(&conflict, "collection", "bookings");
        assert_eq!(
            conflict.get_bool("resolved").unwrap(),
            settled,
            "{conflict}"
        );
    }
}

async fn deletes(c: &Docs) {
    c.delete_one(doc! {"_id": 1}).await.unwrap();
}

/// One side deleted, the other edited, under that policy; what is left on both sides.
async fn delete_update(test: &str, strategy: &str, local_deletes: bool, left: Option<&str>) {
    let (world, daemon) = if local_deletes {
        apart(test, policy(strategy), v0(), deletes, v_remote).await
    } else {
        apart(test, policy(strategy), v0(), v_local, deletes).await
    };
    world.wait_converged(&daemon).await;
    let left = left.map(|v| doc! {"_id": 1, "v": v, "other": 0});
    for db in [&world.local, &world.remote] {
        wait_content(&db.collection("c"), 1, left.clone()).await;
    }
    let conflict = the_conflict(&world, &daemon).await;
    assert_eq!(conflict.get_str("kind").unwrap(), "delete_update");
    assert!(conflict.get_bool("resolved").unwrap());
    let (deleted, edited) = if local_deletes {
        ("localDocument", ("remoteDocument", "remote"))
    } else {
        ("remoteDocument", ("localDocument", "local"))
    };
    assert_eq!(body(&conflict, deleted), None);
    assert_eq!(
        body(&conflict, edited.0),
        Some(doc! {"_id": 1, "v": edited.1, "other": 0})
    );
    assert_eq!(body(&conflict, "baseDocument"), Some(v0()));
}

#[tokio::test]
async fn deleted_here_and_edited_there_keeps_the_edit_and_both_bodies() {
    delete_update("del_manual", "manual", true, Some("remote")).await;
    delete_update("del_newest", "newest_wins", true, Some("remote")).await;
    delete_update("del_local", "local_wins", true, None).await;
    delete_update("del_remote", "remote_wins", true, Some("remote")).await;
}

#[tokio::test]
async fn edited_here_and_deleted_there_keeps_the_edit_and_both_bodies() {
    delete_update("edit_manual", "manual", false, Some("local")).await;
    delete_update("edit_local", "local_wins", false, Some("local")).await;
    delete_update("edit_remote", "remote_wins", false, None).await;
}

#[tokio::test]
async fn the_same_id_created_on_both_sides_follows_the_policy() {
    for strategy in ["manual", "local_wins", "remote_wins"] {
        let (world, daemon) = apart(
            &format!("insert_{strategy}"),
            policy(strategy),
            doc! {"_id": 0},
            async |c| drop(c.insert_one(doc! {"_id": 1, "v": "local"}).await.unwrap()),
            async |c| drop(c.insert_one(doc! {"_id": 1, "v": "remote"}).await.unwrap()),
        )
        .await;
        let conflict = the_conflict(&world, &daemon).await;
        assert_eq!(conflict.get_str("kind").unwrap(), "insert_insert");
        assert_eq!(conflict.get_bool("resolved").unwrap(), strategy != "manual");
        let with = |v: &str| Some(doc! {"_id": 1, "v": v});
        assert_eq!(body(&conflict, "localDocument"), with("local"));
        assert_eq!(body(&conflict, "remoteDocument"), with("remote"));
        assert_eq!(body(&conflict, "baseDocument"), None);
        let (here, there) = both(&world, "c");
        if strategy != "manual" {
            world.wait_converged(&daemon).await;
        }
        wait_content(
            &here,
            1,
            with(if strategy == "remote_wins" {
                "remote"
            } else {
                "local"
            }),
        )
        .await;
        wait_content(
            &there,
            1,
            with(if strategy == "local_wins" {
                "local"
            } else {
                "remote"
            }),
        )
        .await;
    }
}

#[tokio::test]
async fn the_same_id_created_equal_on_both_sides_is_no_conflict() {
    let same = async |c: &Docs| drop(c.insert_one(doc! {"_id": 1, "v": "same"}).await.unwrap());
    let (world, daemon) = apart("insert_same", |s| s, doc! {"_id": 0}, same, same).await;
    converged_without_conflict(&world, &daemon).await;
}

/// Makes a collection on one side that takes only documents with a number `n`.
async fn only_numbers(db: &mongodb::Database) {
    let validator = doc! {"n": {"$type": "number"}};
    db.create_collection("c")
        .validator(validator)
        .await
        .unwrap();
}

#[tokio::test]
async fn r19_rejected_by_the_remotes_validator_is_parked_and_tried_when_it_changes() {
    // GIVEN a remote that refuses a document
    let world = World::new("rejected").await;
    only_numbers(&world.remote).await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1, "n": "text"}).await.unwrap();
    here.insert_one(doc! {"_id": 2, "n": 2}).await.unwrap();
    // THEN the other one arrives, and this one is parked with a reason
    wait_content(&there, 2, doc! {"_id": 2, "n": 2}).await;
    daemon.wait_status("failedDocuments", |n| *n == 1).await;
    // A look at the remote's validator lets it be tried once more.
    wait_for("it is set aside, and why is said", async || {
        let entries = queue(&daemon).await;
        assert_eq!(entries.len(), 1, "{entries:?}");
        let reason = entries[0]["reason"].as_str().unwrap_or_default();
        entries[0]["state"] == "failed" && reason.contains("remote database refuses the document")
    })
    .await;
    wait_for("a record", async || world.conflicts().await.len() == 1).await;
    let conflict = world.conflicts().await.remove(0);
    assert_eq!(conflict.get_str("kind").unwrap(), "rejected");
    assert_eq!(
        body(&conflict, "localDocument"),
        Some(doc! {"_id": 1, "n": "text"})
    );
    wait_doc(&here, 1, "the app sees it", |d| {
        says(d, "syncStatus", "failed")
    })
    .await;
    // WHEN it is put right
    set(&here, 1, doc! {"n": 1}).await;
    // THEN it is sent, and the record closes
    wait_closed(&world, &daemon).await;
    world.wait_converged(&daemon).await;
    wait_doc(&here, 1, "the app sees it", |d| {
        says(d, "syncStatus", "synced")
    })
    .await;
}

#[tokio::test]
async fn r19_rejected_by_the_local_validator_is_parked_and_tried_when_its_cause_is_gone() {
    // GIVEN a local database that refuses what comes from the remote
    let world = World::new("rejected_local").await;
    only_numbers(&world.local).await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    there
        .insert_one(doc! {"_id": 1, "n": "text"})
        .await
        .unwrap();
    there.insert_one(doc! {"_id": 2, "n": 2}).await.unwrap();
    wait_content(&here, 2, doc! {"_id": 2, "n": 2}).await;
    daemon.wait_status("failedDocuments", |n| *n == 1).await;
    // WHEN the validator is taken away and a sync asked for
    let open = doc! {"collMod": "c", "validator": {}};
    world.local.run_command(open).await.unwrap();
    dealt_with(&daemon).await;
    // THEN the document arrives
    wait_content(&here, 1, doc! {"_id": 1, "n": "text"}).await;
    wait_closed(&world, &daemon).await;
    world.wait_converged(&daemon).await;
}
