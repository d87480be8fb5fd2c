//! The first sync: what both databases already hold is brought into agreement.

use crate::common::kit::{
    Docs, PATIENT, both, conflicts_now, converged_without_conflict, dealt_with, wait_content,
};
use crate::common::{Daemon, World, wait_until};
use mongodb::bson::{DateTime, Document, doc};
use sangam::compare::compare;
use sangam::faultlink::Way;

async fn fill(c: &Docs, ids: std::ops::Range<i32>, from: &str) {
    for first in ids.clone().step_by(2000) {
        let last = (first + 2000).min(ids.end);
        let docs = (first..last).map(|i| doc! {"_id": i, "from": from, "pad": "x".repeat(60)});
        c.insert_many(docs).await.unwrap();
    }
}

async fn count(c: &Docs) -> u64 {
    c.count_documents(doc! {}).await.unwrap()
}

/// Equal, only local, only remote, and (where `differ`) different documents.
async fn mixed(here: &Docs, there: &Docs, differ: bool) {
    for c in [here, there] {
        c.insert_many((0..10).map(|i| doc! {"_id": i, "same": true}))
            .await
            .unwrap();
    }
    here.insert_many((10..20).map(|i| doc! {"_id": i}))
        .await
        .unwrap();
    there
        .insert_many((20..30).map(|i| doc! {"_id": i}))
        .await
        .unwrap();
    if differ {
        for (c, v) in [(here, "local"), (there, "remote")] {
            c.insert_one(doc! {"_id": 99, "v": v}).await.unwrap();
        }
    }
}

#[tokio::test]
async fn equal_ones_stay_and_what_one_side_has_goes_to_the_other() {
    let world = World::new("mixed").await;
    let (here, there) = both(&world, "c");
    mixed(&here, &there, false).await;
    let daemon = world.start().await;
    converged_without_conflict(&world, &daemon).await;
    assert_eq!(count(&here).await, 30);
    // AND from now on each is known: deletes and edits arrive, and nothing comes back
    for (id, c) in [(1, &here), (2, &there), (11, &there), (21, &here)] {
        c.delete_one(doc! {"_id": id}).await.unwrap();
    }
    converged_without_conflict(&world, &daemon).await;
    assert_eq!((count(&here).await, count(&there).await), (26, 26));
}

#[tokio::test]
async fn different_ones_follow_the_policy_and_every_version_is_kept() {
    for (policy, left) in [
        ("manual", ["local", "remote"]),
        ("local_wins", ["local", "local"]),
        ("remote_wins", ["remote", "remote"]),
    ] {
        let world = World::new(&format!("different_{policy}")).await;
        let (here, there) = both(&world, "c");
        mixed(&here, &there, true).await;
        let key = "sync.conflict_resolution_strategy";
        let daemon = world
            .start_with(world.settings().set(key, &format!("{policy:?}")))
            .await;
        for (c, v) in [(&here, left[0]), (&there, left[1])] {
            wait_content(c, 99, doc! {"_id": 99, "v": v}).await;
        }
        for c in [&here, &there] {
            wait_content(c, 29, doc! {"_id": 29}).await;
            wait_content(c, 19, doc! {"_id": 19}).await;
        }
        let conflicts = conflicts_now(&world, &daemon).await;
        assert_eq!(conflicts.len(), 1, "{conflicts:#?}");
        assert_eq!(conflicts[0].get_str("kind").unwrap(), "insert_insert");
        assert_eq!(
            conflicts[0].get_bool("resolved").unwrap(),
            policy != "manual"
        );
        for (body, v) in [("localDocument", "local"), ("remoteDocument", "remote")] {
            assert_eq!(
                conflicts[0]
                    .get_document(body)
                    .unwrap()
                    .get_str("v")
                    .unwrap(),
                v
            );
        }
    }
}

#[tokio::test]
async fn documents_that_differ_in_sync_fields_alone_are_equal() {
    let world = World::new("stamps_alone").await;
    let (here, there) = both(&world, "c");
    let stamps = doc! {"_id": 1, "v": 1, "syncStatus": "synced", "syncedAt": DateTime::now()};
    here.insert_one(doc! {"_id": 1, "v": 1, "origin": "local"})
        .await
        .unwrap();
    there.insert_one(stamps).await.unwrap();
    let daemon = world.start().await;
    converged_without_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn several_databases_each_on_their_own() {
    // GIVEN two databases with the same collections
    let world = World::new("several").await;
    let name = format!("{}_b", world.name);
    let second = [&world.local, &world.remote].map(|db| db.client().database(&name));
    let (here, there) = both(&world, "c");
    let (here_b, there_b) = (second[0].collection("c"), second[1].collection("c"));
    mixed(&here, &there, false).await;
    fill(&here_b, 0..5, "b").await;
    let databases = format!("[{:?}, {name:?}]", world.name);
    let daemon = world
        .start_with(world.settings().set("database", &databases))
        .await;
    converged_without_conflict(&world, &daemon).await;
    let both_equal = async || {
        compare(&second[0], &second[1], &world.fields, &[])
            .await
            .unwrap()
    };
    wait_until(PATIENT, "the second is equal", async || {
        both_equal()
            .await
            .is_equal()
            .then_some(())
            .ok_or_else(|| "no".into())
    })
    .await;
    assert_eq!((count(&here).await, count(&there_b).await), (30, 5));
    // WHEN documents with the same `_id` change in both THEN neither gets into the other
    here.delete_one(doc! {"_id": 1}).await.unwrap();
    there_b
        .insert_one(doc! {"_id": 100, "from": "b"})
        .await
        .unwrap();
    wait_content(&there, 1, None).await;
    wait_content(&here_b, 100, doc! {"_id": 100, "from": "b"}).await;
    dealt_with(&daemon).await;
    assert_eq!((count(&here).await, count(&there_b).await), (29, 6));
    let records = second[0].list_collection_names().await.unwrap();
    assert_eq!(
        records,
        ["c"],
        "records are kept in the first database only"
    );
}

const LARGE: i32 = 20_000;

/// 20,000 documents on each side, half of them the same.
async fn large(test: &str) -> World {
    let world = World::new(test).await;
    let (here, there) = both(&world, "c");
    tokio::join!(
        fill(&here, 0..LARGE, "both"),
        fill(&there, LARGE / 2..LARGE, "both")
    );
    fill(&there, LARGE..LARGE + LARGE / 2, "remote").await;
    world
}

async fn large_is_equal(world: &World, daemon: &Daemon) {
    converged_without_conflict(world, daemon).await;
    let (here, there) = both(world, "c");
    let all = u64::try_from(LARGE + LARGE / 2).unwrap();
    assert_eq!((count(&here).await, count(&there).await), (all, all));
}

/// Waits until the first sync has moved something but not all of it.
async fn half_way(world: &World) {
    let (_, there) = both(world, "c");
    wait_until(PATIENT, "half way", async || {
        let n = there.estimated_document_count().await.unwrap();
        (n > 20_500).then_some(()).ok_or_else(|| format!("{n}"))
    })
    .await;
    assert!(
        count(&there).await < 30_000,
        "it was too quick to be interrupted"
    );
}

#[tokio::test]
async fn large_ones_both_ways() {
    let world = large("large").await;
    let daemon = world.start().await;
    // WHEN applications write while it goes on
    half_way(&world).await;
    let (here, there) = both(&world, "c");
    here.update_many(doc! {"_id": {"$lt": 50}}, doc! {"$set": {"v": 1}})
        .await
        .unwrap();
    there
        .update_many(doc! {"_id": {"$gte": LARGE}}, doc! {"$set": {"v": 2}})
        .await
        .unwrap();
    large_is_equal(&world, &daemon).await;
    assert_eq!(there.count_documents(doc! {"v": 1}).await.unwrap(), 50);
    assert_eq!(here.count_documents(doc! {"v": 2}).await.unwrap(), 10_000);
}

#[tokio::test]
async fn interrupted_by_kill_9_it_starts_again_and_loses_nothing() {
    let world = large("killed").await;
    let mut daemon = world.start().await;
    half_way(&world).await;
    daemon.kill9();
    let (here, there) = both(&world, "c");
    here.delete_one(doc! {"_id": 1}).await.unwrap();
    here.insert_one(doc! {"_id": -1}).await.unwrap();
    there.delete_one(doc! {"_id": LARGE + 1}).await.unwrap();
    there.insert_one(doc! {"_id": -2}).await.unwrap();
    daemon.restart().await;
    large_is_equal(&world, &daemon).await;
}

#[tokio::test]
async fn interrupted_by_the_link_it_goes_on_when_that_is_back() {
    let world = large("cut").await;
    let daemon = world.start().await;
    half_way(&world).await;
    world.link.cut();
    daemon.wait_status("isOnline", |v| *v == false).await;
    let (here, _) = both(&world, "c");
    here.update_one(doc! {"_id": 2}, doc! {"$set": {"v": 1}})
        .await
        .unwrap();
    world.link.heal();
    large_is_equal(&world, &daemon).await;
    wait_content(&world.remote.collection::<Document>("c"), -1, None).await;
}

#[tokio::test]
async fn under_manual_the_newer_stays_and_the_older_is_kept_on_record() {
    let world = World::new("newer").await;
    let (here, there) = both(&world, "c");
    let at = |day: i64| DateTime::from_millis(1_700_000_000_000 + day * 86_400_000);
    for (id, local, remote) in [(1, 2, 1), (2, 1, 2)] {
        here.insert_one(doc! {"_id": id, "v": "local", "updatedAt": at(local)})
            .await
            .unwrap();
        there
            .insert_one(doc! {"_id": id, "v": "remote", "updatedAt": at(remote)})
            .await
            .unwrap();
    }
    // One without a date on one side: nobody knows which is newer.
    here.insert_one(doc! {"_id": 3, "v": "local", "updatedAt": at(1)})
        .await
        .unwrap();
    there
        .insert_one(doc! {"_id": 3, "v": "remote"})
        .await
        .unwrap();
    let daemon = world.start().await;
    for c in [&here, &there] {
        wait_content(c, 1, doc! {"_id": 1, "v": "local", "updatedAt": at(2)}).await;
        wait_content(c, 2, doc! {"_id": 2, "v": "remote", "updatedAt": at(2)}).await;
    }
    let conflicts = conflicts_now(&world, &daemon).await;
    assert_eq!(conflicts.len(), 3, "{conflicts:#?}");
    for conflict in &conflicts {
        let id = conflict.get_i32("localId").unwrap();
        assert_eq!(conflict.get_str("kind").unwrap(), "insert_insert");
        assert_eq!(conflict.get_bool("resolved").unwrap(), id != 3);
        for (body, v) in [("localDocument", "local"), ("remoteDocument", "remote")] {
            let body = conflict.get_document(body).unwrap();
            assert_eq!(body.get_str("v").unwrap(), v, "{id}");
        }
        if id != 3 {
            let strategy = conflict.get_str("resolutionStrategy").unwrap();
            assert_eq!(strategy, "newest_wins");
        }
    }
    // AND after the first sync the clock decides nothing any more
    world.link.cut();
    daemon.wait_status("isOnline", |v| *v == false).await;
    for (c, v) in [(&here, "local"), (&there, "remote")] {
        c.insert_one(doc! {"_id": 4, "v": v, "updatedAt": at(3)})
            .await
            .unwrap();
    }
    world.link.heal();
    daemon.wait_status("isOnline", |v| *v == true).await;
    daemon.wait_status("unresolvedConflicts", |n| *n == 2).await;
}

#[tokio::test]
async fn killed_it_goes_on_where_it_was() {
    // GIVEN 30,000 equal documents and a slow link
    let world = World::new("resumed").await;
    let (here, there) = both(&world, "c");
    tokio::join!(
        fill(&here, 0..30_000, "both"),
        fill(&there, 0..30_000, "both")
    );
    world.link.throttle(Way::Down, 300_000);
    let mut daemon = world.start().await;
    let compared = async |daemon: &Daemon, least: u64| {
        wait_until(PATIENT, "it compares", async || {
            let status = daemon.status().await?;
            let progress = &status["progress"];
            match progress["documents"].as_u64() {
                Some(n) if n >= least => Ok((n, progress.clone())),
                _ => Err(status.to_string()),
            }
        })
        .await
    };
    let (before, progress) = compared(&daemon, 12_000).await;
    assert_eq!(progress["what"], "first_sync");
    assert_eq!(progress["total"], 30_000);
    let c = &progress["collections"][0];
    assert_eq!((&c["collection"], &c["done"]), (&"c".into(), &false.into()));
    assert!(progress["rate"].as_f64().unwrap() > 0.0, "{progress}");
    assert!(progress["secondsLeft"].as_u64().is_some(), "{progress}");
    assert!(progress["bytes"].as_u64().unwrap() > 500_000, "{progress}");
    daemon.kill9();
    // WHEN it starts again, though the applications went on writing
    here.update_one(doc! {"_id": 5}, doc! {"$set": {"v": 1}})
        .await
        .unwrap();
    there.delete_one(doc! {"_id": 100}).await.unwrap();
    daemon.restart().await;
    // THEN it has lost no more than the ranges at work
    let (after, _) = compared(&daemon, 1).await;
    assert!(after + 5000 > before, "{after} of {before} are left");
    world.link.heal();
    converged_without_conflict(&world, &daemon).await;
    assert_eq!(count(&here).await, 29_999);
    assert_eq!(there.count_documents(doc! {"v": 1}).await.unwrap(), 1);
}

/// Waits until a collection has so many documents, the same on both sides.
async fn wait_equal(world: &World, coll: &str, wanted: u64) {
    let (here, there) = both(world, coll);
    wait_until(PATIENT, &format!("{coll} is equal"), async || {
        let counts = (count(&here).await, count(&there).await);
        (counts == (wanted, wanted))
            .then_some(())
            .ok_or_else(|| format!("{counts:?}"))
    })
    .await;
}

#[tokio::test]
async fn a_collection_that_joins_is_compared_at_once() {
    // GIVEN documents on either side in three collections of which one is synced, and no comparison
    // until tomorrow
    let world = World::new("joins").await;
    for name in ["synced", "named", "excluded"] {
        let (here, there) = both(&world, name);
        here.insert_one(doc! {"_id": "here"}).await.unwrap();
        there.insert_one(doc! {"_id": "there"}).await.unwrap();
    }
    let settings = world
        .settings()
        .set("sync.collections", "[\"synced\", \"excluded\"]")
        .set("sync.exclude", "[\"excluded\"]");
    let mut daemon = world.start_with(settings).await;
    wait_equal(&world, "synced", 2).await;
    dealt_with(&daemon).await;
    let (named, excluded) = (both(&world, "named"), both(&world, "excluded"));
    assert_eq!((count(&named.0).await, count(&excluded.1).await), (1, 1));
    // WHEN another one is named over the API THEN it is compared at once
    let all = serde_json::json!({"collectionsToSync": ["synced", "named", "excluded"]});
    let answer = daemon.put("/api/sync/config", all).await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    wait_equal(&world, "named", 2).await;
    // WHEN one is no longer excluded THEN so is that, and what happens there is seen from now on
    daemon.settings = daemon.settings.clone().set("sync.exclude", "[]");
    daemon.settings.write();
    daemon.signal("HUP");
    wait_equal(&world, "excluded", 2).await;
    dealt_with(&daemon).await;
    excluded.0.insert_one(doc! {"_id": 1}).await.unwrap();
    excluded.1.insert_one(doc! {"_id": 2}).await.unwrap();
    wait_equal(&world, "excluded", 4).await;
    // WHEN it is excluded for a while, and joins by a change of the file and a start
    dealt_with(&daemon).await;
    daemon.settings = (daemon.settings.clone()).set("sync.exclude", "[\"excluded\"]");
    daemon.restart().await;
    excluded.0.delete_one(doc! {"_id": 2}).await.unwrap();
    excluded.1.insert_one(doc! {"_id": 3}).await.unwrap();
    let update = doc! {"$set": {"v": 1.5}};
    let edited = excluded
        .1
        .update_one(doc! {"_id": 1}, update)
        .await
        .unwrap();
    assert_eq!(edited.modified_count, 1);
    dealt_with(&daemon).await;
    assert_eq!(count(&excluded.0).await, 3);
    daemon.settings = daemon.settings.clone().set("sync.exclude", "[]");
    daemon.restart().await;
    // THEN what happened meanwhile is carried over, the deletion as well
    wait_content(&excluded.0, 1, doc! {"_id": 1, "v": 1.5}).await;
    wait_content(&excluded.1, 2, None).await;
    wait_equal(&world, "excluded", 4).await;
    converged_without_conflict(&world, &daemon).await;
}
