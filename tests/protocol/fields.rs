//! Section 4: the sync fields, and that nobody trips over them.

use std::time::Duration;

use crate::common::kit::{
    both, converged_without_conflict, cut, heal, raw_docs, says, set, wait_content, wait_doc,
};
use crate::common::{Daemon, SOON, World, wait_until, yet};
use mongodb::bson::{DateTime, Document, Timestamp, doc};
use mongodb::{Client, Database};
use sangam::config::FieldNames;
use sangam::faultlink::Way;

/// Whether a document carries the three fields: when, where from, how.
fn stamped(d: &Document, origin: &str, status: &str) -> bool {
    d.get_datetime("syncedAt").is_ok() && says(d, "origin", origin) && says(d, "syncStatus", status)
}

#[tokio::test]
async fn what_is_pushed_is_stamped_on_both_sides_and_updated_at_stays() {
    let world = World::new("pushed").await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    let written = DateTime::from_millis(1_600_000_000_000);
    // WHEN the app writes documents, several at a time, and edits one
    let docs = (0..5).map(|i| doc! {"_id": i, "updatedAt": written});
    here.insert_many(docs).await.unwrap();
    world.wait_converged(&daemon).await;
    set(&here, 0, doc! {"v": 1}).await;
    converged_without_conflict(&world, &daemon).await;
    // THEN every one is stamped on both sides, and updatedAt is the app's
    for i in 0..5 {
        for c in [&here, &there] {
            let d = wait_doc(c, i, "stamped", |d| stamped(d, "local", "synced")).await;
            assert_eq!(d.get_datetime("updatedAt").unwrap(), &written);
        }
    }
}

#[tokio::test]
async fn what_is_pulled_is_stamped_with_its_origin() {
    let world = World::new("pulled").await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    let written = DateTime::from_millis(1_600_000_000_000);
    let docs = (0..5).map(|i| doc! {"_id": i, "updatedAt": written});
    there.insert_many(docs).await.unwrap();
    converged_without_conflict(&world, &daemon).await;
    set(&there, 0, doc! {"v": 1}).await;
    converged_without_conflict(&world, &daemon).await;
    for i in 0..5 {
        let d = wait_doc(&here, i, "stamped", |d| stamped(d, "remote", "synced")).await;
        assert_eq!(d.get_datetime("updatedAt").unwrap(), &written);
    }
}

#[tokio::test]
async fn their_names_are_configuration() {
    // GIVEN an app that spells them its own way
    let mut world = World::new("names").await;
    world.fields = FieldNames {
        updated_at: "updated_at".into(),
        synced_at: "synced_at".into(),
        origin: "sync_origin".into(),
        sync_status: "sync_status".into(),
    };
    let settings = world
        .settings()
        .set("fields.updated_at", "\"updated_at\"")
        .set("fields.synced_at", "\"synced_at\"")
        .set("fields.origin", "\"sync_origin\"")
        .set("fields.sync_status", "\"sync_status\"");
    let daemon = world.start_with(settings).await;
    let (here, there) = both(&world, "c");
    // WHEN documents are written whose content has the usual names
    here.insert_one(doc! {"_id": 1, "origin": "Pune", "syncStatus": "mine"})
        .await
        .unwrap();
    there
        .insert_one(doc! {"_id": 2, "origin": "Nasik"})
        .await
        .unwrap();
    world.wait_converged(&daemon).await;
    // THEN the configured ones are written, and the others are content
    for (c, id, origin) in [
        (&here, 1, "local"),
        (&there, 1, "local"),
        (&here, 2, "remote"),
    ] {
        let d = wait_doc(c, id, "stamped", |d| says(d, "sync_status", "synced")).await;
        assert!(d.get_datetime("synced_at").is_ok(), "{d}");
        assert!(says(&d, "sync_origin", origin), "{d}");
        assert!(!d.contains_key("syncedAt"), "{d}");
    }
    let d = there.find_one(doc! {"_id": 1}).await.unwrap().unwrap();
    assert!(
        says(&d, "origin", "Pune") && says(&d, "syncStatus", "mine"),
        "{d}"
    );
}

#[tokio::test]
async fn without_stamping_nothing_is_written_and_both_sides_are_byte_equal() {
    let world = World::new("unstamped").await;
    let settings = world.settings().set("sync.stamp_documents", "false");
    let daemon = world.start_with(settings).await;
    let (here, there) = both(&world, "c");
    let local = doc! {"_id": 1, "syncStatus": "the app's own", "v": 1};
    let remote = doc! {"_id": 2, "origin": "elsewhere", "syncedAt": DateTime::now()};
    here.insert_one(&local).await.unwrap();
    there.insert_one(&remote).await.unwrap();
    converged_without_conflict(&world, &daemon).await;
    cut(&world, &daemon).await;
    set(&here, 1, doc! {"syncStatus": "edited"}).await;
    daemon.wait_status("pendingDocuments", |n| *n == 1).await;
    heal(&world, &daemon).await;
    converged_without_conflict(&world, &daemon).await;
    let bytes = raw_docs(&world.local, "c").await;
    assert_eq!(bytes, raw_docs(&world.remote, "c").await);
    let edited = doc! {"_id": 1, "syncStatus": "edited", "v": 1};
    let expected = [edited, remote].map(|d| d.to_vec().unwrap());
    assert_eq!(
        bytes
            .into_iter()
            .map(|d| d.into_bytes())
            .collect::<Vec<_>>(),
        expected
    );
}

#[tokio::test]
async fn an_edit_is_pending_while_the_link_is_away() {
    // GIVEN a synced document and a link that is cut
    let world = World::new("pending").await;
    let daemon = world.start().await;
    let (here, _) = both(&world, "c");
    here.insert_one(doc! {"_id": 1, "v": 0}).await.unwrap();
    wait_doc(&here, 1, "synced", |d| stamped(d, "local", "synced")).await;
    cut(&world, &daemon).await;
    // WHEN it is edited and another is made
    set(&here, 1, doc! {"v": 1}).await;
    here.insert_many([doc! {"_id": 2}, doc! {"_id": 3}])
        .await
        .unwrap();
    // THEN the app sees them pending, and synced when the link is back
    for id in 1..=3 {
        wait_doc(&here, id, "pending", |d| says(d, "syncStatus", "pending")).await;
    }
    heal(&world, &daemon).await;
    for id in 1..=3 {
        wait_doc(&here, id, "synced", |d| stamped(d, "local", "synced")).await;
    }
    converged_without_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn an_edit_in_between_does_not_look_synced() {
    // GIVEN an edit on its way over a slow link
    let world = World::new("between").await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1, "v": 0}).await.unwrap();
    wait_doc(&here, 1, "synced", |d| stamped(d, "local", "synced")).await;
    world.link.delay(Way::Up, Duration::from_millis(1500));
    for v in 1..=3 {
        // WHEN it is edited again before the last edit has arrived
        set(&here, 1, doc! {"v": v, "syncStatus": "pending"}).await;
        daemon.wait_status("isSyncing", |s| *s == true).await;
    }
    // THEN whenever it looks synced, the remote has that very edit
    wait_until(SOON, "synced for good", async || {
        let mine = yet(here.find_one(doc! {"_id": 1}).await)?.unwrap();
        let theirs = yet(there.find_one(doc! {"_id": 1}).await)?.unwrap();
        if !says(&mine, "syncStatus", "synced") {
            return Err(format!("{mine}"));
        }
        assert_eq!(mine.get("v"), theirs.get("v"), "it looks synced and is not");
        mine.get_i32("v")
            .is_ok_and(|v| v == 3)
            .then_some(())
            .ok_or_else(|| format!("{mine}"))
    })
    .await;
}

#[tokio::test]
async fn an_app_that_writes_the_sync_fields_itself_changes_nothing() {
    // GIVEN a document that both sides have
    let world = World::new("apps_own").await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1, "v": 0}).await.unwrap();
    wait_doc(&here, 1, "synced", |d| stamped(d, "local", "synced")).await;
    // WHEN apps on both sides set nothing but sync fields, and then one edits
    set(&here, 1, doc! {"syncStatus": "pending"}).await;
    set(
        &there,
        1,
        doc! {"origin": "site 7", "syncedAt": DateTime::now()},
    )
    .await;
    there
        .update_one(doc! {"_id": 1}, doc! {"$unset": {"syncStatus": ""}})
        .await
        .unwrap();
    converged_without_conflict(&world, &daemon).await;
    set(&there, 1, doc! {"v": 1}).await;
    // THEN that edit meets no guard that trips over them
    wait_content(&here, 1, doc! {"_id": 1, "v": 1}).await;
    set(&here, 1, doc! {"v": 2}).await;
    wait_content(&there, 1, doc! {"_id": 1, "v": 2}).await;
    converged_without_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn an_app_that_saves_documents_whole_with_the_stamp_is_heard() {
    // GIVEN documents that both sides have
    let world = World::new("saved").await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    here.insert_many([doc! {"_id": 1, "v": 0}, doc! {"_id": 2, "v": 0}])
        .await
        .unwrap();
    world.wait_converged(&daemon).await;
    for (c, id) in [(&here, 1), (&there, 2)] {
        // WHEN an app saves one as it read it, with a change, and copies it to a new one
        let mut d = wait_doc(c, id, "synced", |d| says(d, "syncStatus", "synced")).await;
        d.insert("v", 1);
        c.replace_one(doc! {"_id": id}, &d).await.unwrap();
        d.insert("_id", id + 10);
        c.insert_one(d).await.unwrap();
    }
    // THEN the stamp in them hides neither
    for c in [&here, &there] {
        for id in [1, 2, 11, 12] {
            wait_content(c, id, doc! {"_id": id, "v": 1}).await;
        }
    }
    converged_without_conflict(&world, &daemon).await;
}

/// Time of the last write to the test's database, Sangam's own records left out.
async fn last_write(client: &Client, db: &Database) -> Option<Timestamp> {
    let oplog = client.database("local").collection::<Document>("oplog.rs");
    let own = ["conflict_logs", "sync_logs", "sync_config"].map(|c| format!("{}.{c}", db.name()));
    let ns = doc! {"$regex": format!("^{}\\.", db.name()), "$nin": own.to_vec()};
    let last = oplog.find_one(doc! {"ns": ns}).sort(doc! {"$natural": -1});
    last.await
        .unwrap()
        .map(|entry| entry.get_timestamp("ts").unwrap())
}

/// Waits until the probe has looked so many times.
async fn some_probes(daemon: &Daemon, count: u32) {
    let mut seen = daemon.status().await.unwrap()["link"]["lastCheck"].take();
    for _ in 0..count {
        let link = daemon.wait_status("link", |l| l["lastCheck"] != seen).await;
        seen = link["lastCheck"].clone();
    }
}

#[tokio::test]
async fn idle_after_convergence_nothing_is_written_on_either_side() {
    // GIVEN two sides that are equal and stamped
    let world = World::new("idle").await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    here.insert_many((0..20).map(|i| doc! {"_id": i, "v": 0}))
        .await
        .unwrap();
    there
        .insert_many((20..40).map(|i| doc! {"_id": i, "v": 0}))
        .await
        .unwrap();
    converged_without_conflict(&world, &daemon).await;
    set(&here, 0, doc! {"v": 1}).await;
    set(&there, 1, doc! {"v": 1}).await;
    converged_without_conflict(&world, &daemon).await;
    for id in 0..40 {
        wait_doc(&here, id, "synced", |d| says(d, "syncStatus", "synced")).await;
    }
    // WHEN the daemon goes on for a while
    some_probes(&daemon, 2).await;
    let before = (
        last_write(here.client(), &world.local).await,
        last_write(there.client(), &world.remote).await,
    );
    assert!(before.0.is_some() && before.1.is_some());
    some_probes(&daemon, 4).await;
    // THEN neither side was written to
    let after = (
        last_write(here.client(), &world.local).await,
        last_write(there.client(), &world.remote).await,
    );
    assert_eq!(before, after);
}
