//! R10 to R13: what a change stream can't carry, lost history, foreign state, dropped collections.

use crate::common::kit::{
    PATIENT, both, conflicts_now, converged_without_conflict, dealt_with, raw_docs, set,
    the_conflict, wait_content, wait_reconciled,
};
use crate::common::{World, wait_for, wait_until, yet};
use mongodb::bson::{Document, Timestamp, doc};
use sangam::mongod::MongoServer;

const MB: usize = 1 << 20;

fn letters(letter: &str, bytes: usize) -> String {
    letter.repeat(bytes)
}

#[tokio::test]
async fn r10_a_9_mb_update_goes_through_and_so_does_what_follows() {
    // GIVEN a document of 9 MB
    let world = World::new("r10").await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1, "big": letters("a", 9 * MB), "n": 0})
        .await
        .unwrap();
    world.wait_converged_within(PATIENT, &daemon).await;
    // WHEN all of it changes on one side and then the other, with smaller ones behind it
    for (c, letter) in [(&here, "b"), (&there, "c")] {
        set(c, 1, doc! {"big": letters(letter, 9 * MB)}).await;
        c.insert_one(doc! {"_id": format!("behind {letter}")})
            .await
            .unwrap();
        converged_without_conflict(&world, &daemon).await;
    }
    // THEN both sides have it, and no stream had to be opened again
    assert_eq!(here.count_documents(doc! {}).await.unwrap(), 3);
    assert!(!daemon.log().contains("changes can't be read"));
    assert_eq!(daemon.log().matches("reading changes").count(), 2);
}

#[tokio::test]
async fn r13_a_dropped_collection_is_held_and_the_other_side_stays() {
    for local in [true, false] {
        // GIVEN two collections on both sides
        let world = World::new("r13").await;
        let mut daemon = world.start().await;
        for coll in ["kept", "lost"] {
            let c = world.local.collection::<Document>(coll);
            c.insert_many([doc! {"_id": 1}, doc! {"_id": 2}])
                .await
                .unwrap();
        }
        world.wait_converged(&daemon).await;
        // WHEN one is dropped on one side
        let (dropper, other) = match local {
            true => (&world.local, &world.remote),
            false => (&world.remote, &world.local),
        };
        dropper.collection::<Document>("lost").drop().await.unwrap();
        // THEN a conflict asks, and nothing is deleted on the other side
        daemon.wait_status("unresolvedConflicts", |n| *n == 1).await;
        let conflict = the_conflict(&world, &daemon).await;
        assert_eq!(conflict.get_str("kind").unwrap(), "collection_dropped");
        assert_eq!(conflict.get_str("collection").unwrap(), "lost");
        assert_eq!(raw_docs(other, "lost").await.len(), 2);
        // AND other collections go on, over a restart and a reconcile too
        daemon.restart().await;
        wait_reconciled(&daemon).await;
        set(&other.collection("kept"), 1, doc! {"v": 1}).await;
        wait_content(&dropper.collection("kept"), 1, doc! {"_id": 1, "v": 1}).await;
        dealt_with(&daemon).await;
        assert_eq!(raw_docs(other, "lost").await.len(), 2);
        assert_eq!(raw_docs(dropper, "lost").await.len(), 0);
        let status = daemon.status().await.unwrap();
        assert!(
            status["notices"]
                .to_string()
                .contains("collection lost was dropped"),
            "{status}"
        );
        assert_eq!(conflicts_now(&world, &daemon).await.len(), 1);
    }
}

#[tokio::test]
async fn r13_what_was_queued_before_a_drop_deletes_nothing() {
    // GIVEN edits that wait in the queue
    let world = World::new("r13_queued").await;
    let mut daemon = world.start().await;
    let (here, there) = both(&world, "c");
    let docs = || (0..20).map(|i| doc! {"_id": i, "v": 0});
    here.insert_many(docs()).await.unwrap();
    world.wait_converged(&daemon).await;
    daemon
        .post("/api/sync/pause", serde_json::json!({}))
        .await
        .unwrap();
    here.update_many(doc! {}, doc! {"$set": {"v": 1}})
        .await
        .unwrap();
    daemon.wait_status("pendingDocuments", |n| *n == 20).await;
    daemon.kill9();
    // WHEN the collection is dropped, and capture has much to read before it comes to that
    let many = (0..30_000).map(|i| doc! {"_id": i});
    world
        .local
        .collection("many")
        .insert_many(many)
        .await
        .unwrap();
    here.drop().await.unwrap();
    daemon.respawn();
    wait_until(crate::common::SOON, "it goes on", async || {
        let answer = daemon
            .post("/api/sync/resume", serde_json::json!({}))
            .await?;
        (answer.status == 200)
            .then_some(())
            .ok_or_else(|| answer.body.to_string())
    })
    .await;
    // THEN that is a drop like any other
    daemon.wait_status("unresolvedConflicts", |n| *n == 1).await;
    daemon
        .wait_status_within(PATIENT, "pendingDocuments", |n| *n == 20)
        .await;
    assert_eq!(there.count_documents(doc! {"v": 0}).await.unwrap(), 20);
}

#[tokio::test]
async fn r13_a_renamed_collection_is_held_and_the_other_side_stays() {
    let world = World::new("r13_rename").await;
    let daemon = world.start().await;
    let (here, _) = both(&world, "before");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    world.wait_converged(&daemon).await;
    let name = |coll: &str| format!("{}.{coll}", world.name);
    let rename = doc! {"renameCollection": name("before"), "to": name("after")};
    here.client()
        .database("admin")
        .run_command(rename)
        .await
        .unwrap();
    daemon.wait_status("unresolvedConflicts", |n| *n == 1).await;
    dealt_with(&daemon).await;
    assert_eq!(raw_docs(&world.remote, "before").await.len(), 1);
}

#[tokio::test]
async fn r10_r13_a_dropped_database_is_held_and_the_stream_survives_it() {
    for local in [true, false] {
        // GIVEN a synced collection
        let world = World::new("r10_drop_db").await;
        let daemon = world.start().await;
        world
            .local
            .collection("c")
            .insert_one(doc! {"_id": 1})
            .await
            .unwrap();
        world.wait_converged(&daemon).await;
        // WHEN the whole database is dropped on one side
        let (dropper, other) = match local {
            true => (&world.local, &world.remote),
            false => (&world.remote, &world.local),
        };
        dropper.drop().await.unwrap();
        daemon.wait_status("unresolvedConflicts", |n| *n == 1).await;
        // THEN the other side is intact, and a new collection is synced from and to it
        let (here, there) = both(&world, "new");
        here.insert_one(doc! {"_id": "l"}).await.unwrap();
        there.insert_one(doc! {"_id": "r"}).await.unwrap();
        wait_content(&there, "l", doc! {"_id": "l"}).await;
        wait_content(&here, "r", doc! {"_id": "r"}).await;
        dealt_with(&daemon).await;
        assert_eq!(raw_docs(other, "c").await.len(), 1);
    }
}

#[tokio::test]
async fn r13_with_propagate_a_drop_empties_the_other_side() {
    let world = World::new("r13_propagate").await;
    let settings = world.settings().set("sync.on_drop", "\"propagate\"");
    let daemon = world.start_with(settings).await;
    let (here, there) = both(&world, "lost");
    here.insert_many([doc! {"_id": 1}, doc! {"_id": 2}])
        .await
        .unwrap();
    world.wait_converged(&daemon).await;
    here.drop().await.unwrap();
    wait_for("no document is left", async || {
        there.count_documents(doc! {}).await.unwrap() == 0
    })
    .await;
    converged_without_conflict(&world, &daemon).await;
}

/// Time of the oldest entry in a server's oplog.
async fn oldest(server: &MongoServer) -> Result<Timestamp, String> {
    let client = yet(server.client().await)?;
    let oplog = client.database("local").collection::<Document>("oplog.rs");
    let first = yet(oplog.find_one(doc! {}).sort(doc! {"$natural": 1}).await)?;
    let first = first.ok_or("an empty oplog")?;
    yet(first.get_timestamp("ts"))
}

/// Writes elsewhere until the oplog no longer reaches back to now.
async fn roll_over(server: &MongoServer) {
    let client = server.client().await.unwrap();
    let hello = client
        .database("admin")
        .run_command(doc! {"hello": 1})
        .await
        .unwrap();
    let now = hello.get_timestamp("operationTime").unwrap();
    let junk = client.database("junk").collection::<Document>("c");
    wait_until(PATIENT, "the oplog rolls over", async || {
        let megabytes = (0..8).map(|_| doc! {"x": letters("x", 2 * MB)});
        yet(junk.insert_many(megabytes).await)?;
        // The oplog is kept back to the last checkpoint.
        yet(client
            .database("admin")
            .run_command(doc! {"fsync": 1})
            .await)?;
        let oldest = oldest(server).await?;
        ((oldest.time, oldest.increment) > (now.time, now.increment))
            .then_some(())
            .ok_or_else(|| format!("{oldest} is before {now}"))
    })
    .await;
    client.database("junk").drop().await.unwrap();
}

#[tokio::test]
async fn r11_history_lost_while_away_nothing_is_lost_or_raised() {
    // GIVEN ten documents on both sides, and a daemon that is away
    // (An oplog is kept back to the last checkpoint: let there be one each second.)
    let world = World::with_server_args("r11", &["--syncdelay", "1"]).await;
    let mut daemon = world.start().await;
    let (here, there) = both(&world, "c");
    here.insert_many((1..=10).map(|i| doc! {"_id": i, "v": 0}))
        .await
        .unwrap();
    world.wait_converged(&daemon).await;
    daemon.kill9();
    // WHEN both sides change, and both oplogs forget about it
    here.delete_one(doc! {"_id": 1}).await.unwrap();
    set(&here, 2, doc! {"v": "local"}).await;
    here.insert_one(doc! {"_id": 11}).await.unwrap();
    there.delete_one(doc! {"_id": 3}).await.unwrap();
    set(&there, 4, doc! {"v": "remote"}).await;
    there.insert_one(doc! {"_id": 12}).await.unwrap();
    for c in [&here, &there] {
        c.delete_one(doc! {"_id": 5}).await.unwrap();
    }
    let servers = world.servers();
    tokio::join!(roll_over(&servers.local), roll_over(&servers.remote));
    daemon.restart().await;
    // THEN a comparison against base finds all of it: deletes are known as such
    converged_without_conflict(&world, &daemon).await;
    for (id, wanted) in [
        (1, None),
        (2, Some(doc! {"_id": 2, "v": "local"})),
        (3, None),
        (4, Some(doc! {"_id": 4, "v": "remote"})),
        (5, None),
        (11, Some(doc! {"_id": 11})),
        (12, Some(doc! {"_id": 12})),
    ] {
        wait_content(&here, id, wanted.clone()).await;
        wait_content(&there, id, wanted).await;
    }
    assert!(
        daemon
            .log()
            .contains("the oplog no longer holds our position")
    );
    // AND what both sides deleted in the gap is forgotten: its `_id` is free
    here.insert_one(doc! {"_id": 5, "v": "anew"}).await.unwrap();
    converged_without_conflict(&world, &daemon).await;
    wait_content(&there, 5, doc! {"_id": 5, "v": "anew"}).await;
}
