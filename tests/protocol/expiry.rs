//! R15: what a side lets go of by itself is nobody's deletion; GridFS chunks go before their files.

use std::time::Duration;

use crate::common::kit::{
    both, content, converged_without_conflict, dealt_with, queue, wait_content, wait_reconciled,
};
use crate::common::{Daemon, World, wait_for};
use futures::TryStreamExt;
use mongodb::bson::{DateTime, Document, doc};
use serde_json::{Value, json};

async fn no_conflict(world: &World) {
    let found = world.conflicts().await;
    assert!(found.is_empty(), "{found:#?}");
}

fn json_of(daemon: &Daemon, args: &[&str]) -> (i32, Value) {
    let output = daemon.settings.cli(args);
    let answer = serde_json::from_slice(&output.stdout);
    (output.status.code().unwrap(), answer.unwrap())
}

fn in_secs(seconds: i64) -> DateTime {
    DateTime::from_millis(DateTime::now().timestamp_millis() + seconds * 1000)
}

// The link is served by other threads while a command runs on this one.
#[tokio::test(flavor = "multi_thread")]
async fn r15_what_expires_is_nobodys_deletion() {
    // GIVEN documents that expire on the local side alone
    let world = World::with_server_args("ttl", &["--setParameter", "ttlMonitorSleepSecs=1"]).await;
    let (here, there) = both(&world, "c");
    let ttl = doc! {"createIndexes": "c", "indexes": [{"key": {"at": 1}, "name": "at", "expireAfterSeconds": 0}]};
    world.local.run_command(ttl).await.unwrap();
    let mut daemon = world
        .start_with(world.settings().set("schema.sync", "\"report\""))
        .await;
    let soon = in_secs(5);
    let docs = (0..150).map(|n| doc! {"_id": format!("soon{n}"), "at": soon});
    here.insert_many(docs).await.unwrap();
    here.insert_one(doc! {"_id": "late", "at": in_secs(9999)})
        .await
        .unwrap();
    here.insert_one(doc! {"_id": "never"}).await.unwrap();
    wait_for("they arrive", async || {
        there.count_documents(doc! {}).await.unwrap() == 152
    })
    .await;
    // WHEN they expire, while the daemon runs
    wait_for("they expire", async || {
        here.count_documents(doc! {}).await.unwrap() == 2
    })
    .await;
    dealt_with(&daemon).await;
    // THEN the other side keeps them, nothing waits, nobody is asked, and a comparison changes nothing
    for _ in 0..2 {
        assert_eq!(there.count_documents(doc! {}).await.unwrap(), 152);
        assert_eq!(here.count_documents(doc! {}).await.unwrap(), 2);
        assert_eq!(queue(&daemon).await.len(), 0);
        no_conflict(&world).await;
        let (code, report) = json_of(&daemon, &["--json", "verify", "--fresh"]);
        assert_eq!((code, &report["equal"]), (0, &true.into()), "{report:#}");
        assert_eq!(report["total"]["expired"], 150, "{report:#}");
        let (_, plan) = json_of(&daemon, &["--json", "plan", "--compare"]);
        assert_eq!(plan["total"]["toRemote"]["deletes"], 0, "{plan:#}");
        daemon.restart().await;
        wait_reconciled(&daemon).await;
    }
    // WHEN one is prolonged on the other side THEN it comes back; an app's own deletion is carried over
    let prolong = doc! {"$set": {"at": in_secs(9999)}};
    there
        .update_one(doc! {"_id": "soon0"}, prolong)
        .await
        .unwrap();
    wait_for("it comes back", async || {
        content(&here, "soon0").await.unwrap().is_some()
    })
    .await;
    here.delete_one(doc! {"_id": "soon0"}).await.unwrap();
    here.delete_one(doc! {"_id": "late"}).await.unwrap();
    here.delete_one(doc! {"_id": "never"}).await.unwrap();
    for id in ["soon0", "late", "never"] {
        wait_content(&there, id, None).await;
    }
    // AND one that is gone from both is forgotten: made anew it is new
    there.delete_one(doc! {"_id": "soon1"}).await.unwrap();
    dealt_with(&daemon).await;
    here.insert_one(doc! {"_id": "soon1", "at": in_secs(9999)})
        .await
        .unwrap();
    wait_for("it arrives", async || {
        content(&there, "soon1").await.unwrap().is_some()
    })
    .await;
    no_conflict(&world).await;
    // WHEN the daemon was away while more expired, and the history is of no use THEN they stay, too
    let soon = in_secs(5);
    let docs = (0..30).map(|n| doc! {"_id": format!("away{n}"), "at": soon});
    here.insert_many(docs).await.unwrap();
    wait_for("they arrive", async || {
        there
            .count_documents(doc! {"_id": {"$regex": "^away"}})
            .await
            .unwrap()
            == 30
    })
    .await;
    daemon.terminate().await;
    wait_for("they expire", async || {
        here.count_documents(doc! {"_id": {"$regex": "^away"}})
            .await
            .unwrap()
            == 0
    })
    .await;
    daemon.restart().await;
    wait_reconciled(&daemon).await;
    let away = doc! {"_id": {"$regex": "^away"}};
    assert_eq!(there.count_documents(away).await.unwrap(), 30);
    no_conflict(&world).await;
    on_both_sides(&world, &daemon).await;
}

#[tokio::test]
async fn r15_expired_before_it_was_known_that_it_had_arrived() {
    // GIVEN a document whose daemon dies as soon as it is on the remote
    let args = ["--setParameter", "ttlMonitorSleepSecs=1"];
    let world = World::with_server_args("ttl_crash", &args).await;
    let (here, there) = both(&world, "c");
    let ttl = doc! {"createIndexes": "c", "indexes": [{"key": {"at": 1}, "name": "at", "expireAfterSeconds": 0}]};
    world.local.run_command(ttl).await.unwrap();
    here.insert_one(doc! {"_id": "never"}).await.unwrap();
    let settings = world.settings().set("schema.sync", "\"report\"");
    let mut daemon = world.start_with(settings.clone()).await;
    world.wait_converged(&daemon).await;
    daemon.kill9();
    here.insert_one(doc! {"_id": "soon", "at": in_secs(5)})
        .await
        .unwrap();
    let dying = settings
        .clone()
        .env("SANGAM_FAILPOINT", "after_write_before_ack:1");
    Daemon::spawn(&world, dying).wait_exit().await;
    assert_eq!(there.count_documents(doc! {}).await.unwrap(), 2);
    // WHEN it expires before the next one looks
    wait_for("it expires", async || {
        here.count_documents(doc! {}).await.unwrap() == 1
    })
    .await;
    let daemon = world.start_with(settings).await;
    dealt_with(&daemon).await;
    // THEN the remote keeps it
    assert_eq!(queue(&daemon).await.len(), 0);
    assert_eq!(there.count_documents(doc! {}).await.unwrap(), 2);
    no_conflict(&world).await;
}

/// What expires on both sides leaves nothing behind.
async fn on_both_sides(world: &World, daemon: &Daemon) {
    let (here, there) = both(world, "d");
    let ttl = doc! {"createIndexes": "d", "indexes": [{"key": {"at": 1}, "name": "at", "expireAfterSeconds": 0}]};
    for db in [&world.local, &world.remote] {
        db.run_command(ttl.clone()).await.unwrap();
    }
    here.insert_one(doc! {"_id": "keep"}).await.unwrap();
    wait_for("it arrives", async || {
        content(&there, "keep").await.unwrap().is_some()
    })
    .await;
    // WHEN documents of both sides expire
    for (c, n) in [(&here, 0), (&there, 50)] {
        let docs = (n..n + 50).map(|n| doc! {"_id": n, "at": in_secs(2)});
        c.insert_many(docs).await.unwrap();
    }
    wait_for("they arrive", async || {
        here.count_documents(doc! {}).await.unwrap() == 101
    })
    .await;
    wait_for("they expire", async || {
        here.count_documents(doc! {}).await.unwrap() + there.count_documents(doc! {}).await.unwrap()
            == 2
    })
    .await;
    dealt_with(daemon).await;
    // THEN nothing waits, and `_id`s can be used again
    assert_eq!(queue(daemon).await.len(), 0);
    for (c, n) in [(&here, 0), (&there, 50)] {
        c.insert_many((n..n + 50).map(|n| doc! {"_id": n, "again": true}))
            .await
            .unwrap();
    }
    wait_for("they are used again", async || {
        here.count_documents(doc! {}).await.unwrap() + there.count_documents(doc! {}).await.unwrap()
            == 202
    })
    .await;
    no_conflict(world).await;
}

#[tokio::test]
async fn r15_what_a_capped_collection_pushes_out_stays_on_the_other_side() {
    // GIVEN a capped collection on the local side
    let world = World::new("capped").await;
    let create = doc! {"create": "c", "capped": true, "size": 100_000, "max": 5};
    world.local.run_command(create).await.unwrap();
    let (here, there) = both(&world, "c");
    let daemon = world.start().await;
    // WHEN more is written than it holds
    for n in 0..12 {
        here.insert_one(doc! {"_id": n, "v": "x"}).await.unwrap();
        wait_for("it arrives", async || {
            content(&there, n).await.unwrap().is_some()
        })
        .await;
    }
    dealt_with(&daemon).await;
    wait_reconciled(&daemon).await;
    // THEN the other side keeps all
    assert_eq!(there.count_documents(doc! {}).await.unwrap(), 12);
    assert_eq!(here.count_documents(doc! {}).await.unwrap(), 5);
    assert_eq!(queue(&daemon).await.len(), 0);
    no_conflict(&world).await;
    // AND edits of what is still there go both ways
    here.update_one(doc! {"_id": 11}, doc! {"$set": {"v": "y"}})
        .await
        .unwrap();
    wait_content(&there, 11, doc! {"_id": 11, "v": "y"}).await;
    there
        .update_one(doc! {"_id": 10}, doc! {"$set": {"v": "z"}})
        .await
        .unwrap();
    wait_content(&here, 10, doc! {"_id": 10, "v": "z"}).await;
}

#[tokio::test]
async fn r15_gridfs_chunks_arrive_before_their_files() {
    // GIVEN files stored while nothing is moved, one of them large
    let world = World::new("gridfs").await;
    let daemon = world
        .start_with(world.settings().set("sync.batch_size", "3"))
        .await;
    daemon.post("/api/sync/pause", json!({})).await.unwrap();
    let files = world.local.collection::<Document>("fs.files");
    let chunks = world.local.collection::<Document>("fs.chunks");
    for file in 0..6 {
        let parts = if file == 0 { 40 } else { 3 };
        let part = |n: i32| doc! {"_id": format!("{file}.{n}"), "files_id": file, "n": n, "data": "x".repeat(20_000)};
        chunks.insert_many((0..parts).map(part)).await.unwrap();
        files
            .insert_one(doc! {"_id": file, "length": parts * 20_000, "parts": parts})
            .await
            .unwrap();
    }
    let slim = doc! {"$match": {"operationType": "insert"}};
    let stream = world.remote.watch().pipeline(vec![slim]).await.unwrap();
    // WHEN they are sent THEN at no time a file was there without all its chunks
    daemon.post("/api/sync/resume", json!({})).await.unwrap();
    converged_without_conflict(&world, &daemon).await;
    let mut seen: std::collections::HashMap<i32, i32> = Default::default();
    let mut complete = 0;
    let mut stream = stream.with_type::<Document>();
    while complete < 6 {
        let next = tokio::time::timeout(Duration::from_secs(60), stream.try_next()).await;
        let event = next.unwrap().unwrap().unwrap();
        let body = event.get_document("fullDocument").unwrap();
        match event.get_document("ns").unwrap().get_str("coll").unwrap() {
            "fs.chunks" => *seen.entry(body.get_i32("files_id").unwrap()).or_default() += 1,
            "fs.files" => {
                let file = body.get_i32("_id").unwrap();
                assert_eq!(
                    seen.get(&file).copied(),
                    Some(body.get_i32("parts").unwrap()),
                    "{file}"
                );
                complete += 1;
            }
            _ => {}
        }
    }
}
