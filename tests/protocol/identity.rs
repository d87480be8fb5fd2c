//! R12: the state belongs to two databases and no others, and not to what they were once.

use std::path::Path;

use crate::common::kit::{both, converged_without_conflict, wait_content};
use crate::common::{Daemon, World};
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{self, Binary, Document, Timestamp, doc};
use mongodb::{ClusterTime, Collection, IndexModel};
use sangam::mongod::MongoServer;

/// Starts the daemon and expects it to refuse: exit code 78, and these words.
async fn refused(daemon: &mut Daemon, words: &[&str]) {
    daemon.respawn();
    daemon.refuses(words).await;
}

#[tokio::test]
async fn r12_the_state_of_another_database_is_refused_before_anything_changes() {
    // GIVEN state made with these two servers
    let world = World::new("r12").await;
    let settings = world.settings();
    let mut daemon = world.start_with(settings.clone()).await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    world.wait_converged(&daemon).await;
    assert!(daemon.terminate().await.success());
    here.insert_one(doc! {"_id": 2}).await.unwrap();
    // WHEN it is started with another local database
    let quoted = |uri: String| format!("{uri:?}");
    let (local, remote) = (&world.servers().local, &world.servers().remote);
    daemon.settings = settings
        .clone()
        .set("local.uri", &quoted(remote.direct_uri()));
    // THEN it says which one, and what to do
    refused(
        &mut daemon,
        &["the local database is another one", "reconcile --adopt"],
    )
    .await;
    // AND the same with another remote
    daemon.settings = settings
        .clone()
        .set("remote.uri", &quoted(local.direct_uri()));
    refused(&mut daemon, &["the remote database is another one"]).await;
    assert_eq!(
        there.count_documents(doc! {}).await.unwrap(),
        1,
        "nothing was changed"
    );
    // AND with its own pair it goes on
    daemon.settings = settings;
    daemon.restart().await;
    converged_without_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn r12_adopt_takes_a_replaced_database_and_deletes_nothing() {
    // GIVEN a remote that was replaced by an empty one
    let world = World::new("r12_adopt").await;
    let settings = world.settings();
    let mut daemon = world.start_with(settings.clone()).await;
    let (here, _) = both(&world, "c");
    here.insert_many([doc! {"_id": 1}, doc! {"_id": 2}])
        .await
        .unwrap();
    world.wait_converged(&daemon).await;
    assert!(daemon.terminate().await.success());
    let dir = tempfile::tempdir().unwrap();
    let other = MongoServer::start(dir.path(), None, "rs_other")
        .await
        .unwrap();
    let client = other.client().await.unwrap();
    let there = client.database(&world.name).collection::<Document>("c");
    there.insert_one(doc! {"_id": 3}).await.unwrap();
    let uri = format!("{:?}", other.direct_uri());
    daemon.settings = settings.set("remote.uri", &uri);
    refused(&mut daemon, &["the remote database is another one"]).await;
    // WHEN that is said to be intended
    let adopted = daemon.settings.cli(&["reconcile", "--adopt"]);
    assert!(adopted.status.success(), "{adopted:?}");
    daemon.restart().await;
    // THEN both are compared as on the first day
    for id in 1..=3 {
        wait_content(&there, id, doc! {"_id": id}).await;
        wait_content(&here, id, doc! {"_id": id}).await;
    }
}

#[tokio::test]
async fn r12_leaving_a_collection_out_is_not_taken_for_a_restored_server() {
    // GIVEN a stream whose last event was of one collection
    let world = World::new("r12_exclude").await;
    let mut daemon = world.start().await;
    let (kept, left_out) = (both(&world, "kept"), both(&world, "left_out"));
    for c in [&kept.0, &left_out.0] {
        c.insert_one(doc! {"_id": 1}).await.unwrap();
        world.wait_converged(&daemon).await;
    }
    // WHEN that collection is left out from now on
    let settings = daemon.settings.clone();
    daemon.settings = settings.set("sync.exclude", "[\"left_out\"]");
    daemon.restart().await;
    // THEN the others go on
    kept.0.insert_one(doc! {"_id": 2}).await.unwrap();
    kept.1.insert_one(doc! {"_id": 3}).await.unwrap();
    wait_content(&kept.1, 2, doc! {"_id": 2}).await;
    wait_content(&kept.0, 3, doc! {"_id": 3}).await;
}

fn copy(from: &Path, to: &Path) {
    let copied = std::process::Command::new("cp")
        .arg("-r")
        .arg(from)
        .arg(to)
        .status();
    assert!(copied.unwrap().success());
}

/// A write at a time of the server's own counting, right after `time`, if nothing comes between.
async fn write_after(c: &Collection<Document>, time: Timestamp, document: Document) {
    let signature = doc! {"hash": Binary { subtype: BinarySubtype::Generic, bytes: vec![0; 20] }, "keyId": 0_i64};
    let time = doc! {"clusterTime": time, "signature": signature};
    let time: ClusterTime = bson::deserialize_from_document(time).unwrap();
    let mut session = c.client().start_session().await.unwrap();
    session.advance_cluster_time(&time);
    c.insert_one(document).session(&mut session).await.unwrap();
}

/// Whether the oplog has an entry of that time.
async fn has_entry(c: &Collection<Document>, time: Timestamp) -> bool {
    let local = c.client().database("local");
    let oplog = local.collection::<Document>("oplog.rs");
    oplog.find_one(doc! {"ts": time}).await.unwrap().is_some()
}

/// The time of the oplog entry that inserted a document.
async fn time_of(c: &Collection<Document>, id: i32) -> Timestamp {
    let local = c.client().database("local");
    let oplog = local.collection::<Document>("oplog.rs");
    let filter = doc! {"op": "i", "ns": c.namespace().to_string(), "o._id": id};
    let entry = oplog.find_one(filter).await.unwrap();
    entry.unwrap().get_timestamp("ts").unwrap()
}

async fn put_back_between_two_starts(local: bool, same_time: bool) {
    // GIVEN a backup of one server, and a state that has seen more than that
    let mut world = World::with_own_servers("r12_backup").await;
    let mut daemon = world.start().await;
    let (here, _) = both(&world, "c");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    world.wait_converged(&daemon).await;
    daemon.kill9();
    let backup = world.dir().join("backup");
    let servers = world.own_servers();
    let server = if local {
        &mut servers.local
    } else {
        &mut servers.remote
    };
    server.stop().await.unwrap();
    let data = server.dir().join("data");
    copy(&data, &backup);
    server.restart().await.unwrap();
    daemon.restart().await;
    let (here, there) = both(&world, "c");
    let ahead = if local { here } else { there };
    // A time that the server's clock does not reach, so that it counts up from there.
    let mut before = time_of(&ahead, 1).await;
    before.time += 3600;
    if same_time {
        write_after(&ahead, before, doc! {"_id": 2}).await;
    } else {
        ahead.insert_one(doc! {"_id": 2}).await.unwrap();
    }
    converged_without_conflict(&world, &daemon).await;
    daemon.kill9();
    let time = time_of(&ahead, 2).await;
    // WHEN the server is restored from it
    let servers = world.own_servers();
    let server = if local {
        &mut servers.local
    } else {
        &mut servers.remote
    };
    server.kill9().unwrap();
    std::fs::remove_dir_all(&data).unwrap();
    copy(&backup, &data);
    server.restart().await.unwrap();
    if same_time {
        // AND gives the same time to something else
        let client = server.client().await.unwrap();
        let ahead = client.database(&world.name).collection("c");
        let before = Timestamp {
            increment: time.increment - 1,
            ..time
        };
        write_after(&ahead, before, doc! {"_id": 3}).await;
        // The server may have put a word of its own there first; it is another one just as well.
        assert!(has_entry(&ahead, time).await);
    }
    // THEN its silence isn't taken for peace
    refused(
        &mut daemon,
        &["restored from a backup", "reconcile --adopt"],
    )
    .await;
}

#[tokio::test]
async fn r12_a_server_restored_from_a_backup_is_refused() {
    put_back_between_two_starts(true, false).await;
    put_back_between_two_starts(false, false).await;
}

#[tokio::test]
async fn r12_a_restored_server_that_counts_its_times_anew_is_refused() {
    put_back_between_two_starts(true, true).await;
    put_back_between_two_starts(false, true).await;
}

#[tokio::test]
async fn r12_whatever_was_seen_last_is_found_again() {
    let world = World::new("r12_last").await;
    let mut daemon = world.start().await;
    let (_, there) = both(&world, "c");
    let database = there.client().database(&world.name);
    // GIVEN a last event of each kind on the remote
    for kind in [
        "insert",
        "many",
        "update",
        "delete",
        "transaction",
        "large transaction",
        "index",
        "create",
    ] {
        match kind {
            "insert" => drop(there.insert_one(doc! {"_id": 1}).await.unwrap()),
            "many" => {
                let many = (10..500).map(|n| doc! {"_id": n});
                there.insert_many(many).await.unwrap();
            }
            "update" => {
                let update = doc! {"$set": {"a": 1}};
                there.update_one(doc! {"_id": 1}, update).await.unwrap();
            }
            "delete" => drop(there.delete_one(doc! {"_id": 1}).await.unwrap()),
            "transaction" | "large transaction" => {
                // More than 16 MB are several entries of the oplog.
                let (first, bytes) = if kind == "transaction" {
                    (1000, 10)
                } else {
                    (2000, 9 << 20)
                };
                let mut session = there.client().start_session().await.unwrap();
                session.start_transaction().await.unwrap();
                for n in 0..3 {
                    let large = doc! {"_id": first + n, "a": "a".repeat(bytes)};
                    there.insert_one(large).session(&mut session).await.unwrap();
                }
                session.commit_transaction().await.unwrap();
            }
            "index" => {
                let index = IndexModel::builder().keys(doc! {"a": 1}).build();
                there.create_index(index).await.unwrap();
            }
            _ => database.create_collection("d").await.unwrap(),
        }
        world.wait_converged(&daemon).await;
        // WHEN the daemon is started anew THEN it goes on
        assert!(daemon.terminate().await.success());
        daemon.restart().await;
    }
    there.insert_one(doc! {"_id": 3000}).await.unwrap();
    converged_without_conflict(&world, &daemon).await;
}

/// Which server is put back. Those that the driver knows as a primary, by its election, it never takes
/// again once it is one of an earlier election; past that it goes on as if nothing had happened.
#[derive(Clone, Copy)]
enum PutBack {
    Local,
    Remote,
    RemotePastElections,
}

async fn put_back_under_a_running_daemon(which: PutBack) {
    let mut world = World::with_own_servers("r12_running").await;
    let servers = world.servers();
    let uri = match which {
        PutBack::RemotePastElections => world.link.uri(),
        _ => servers.remote.uri(),
    };
    let settings = world.settings().set("remote.uri", &format!("{uri:?}"));
    let mut daemon = world.start_with(settings).await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    world.wait_converged(&daemon).await;
    // GIVEN a backup of one server, which has been started anew since, and more was written
    let backup = world.dir().join("backup");
    let servers = world.own_servers();
    let server = match which {
        PutBack::Local => &mut servers.local,
        _ => &mut servers.remote,
    };
    let data = server.dir().join("data");
    server.stop().await.unwrap();
    copy(&data, &backup);
    for _ in 0..2 {
        server.restart().await.unwrap();
    }
    let (first, second) = match which {
        PutBack::Local => (&here, &there),
        _ => (&there, &here),
    };
    first.insert_one(doc! {"_id": 2}).await.unwrap();
    wait_content(second, 2, doc! {"_id": 2}).await;
    first.delete_one(doc! {"_id": 1}).await.unwrap();
    converged_without_conflict(&world, &daemon).await;
    // WHEN it is put back while the daemon runs
    let servers = world.own_servers();
    let server = match which {
        PutBack::Local => &mut servers.local,
        _ => &mut servers.remote,
    };
    server.stop().await.unwrap();
    std::fs::remove_dir_all(&data).unwrap();
    copy(&backup, &data);
    server.restart().await.unwrap();
    // THEN the daemon notices, and the other side stays as it is
    let words = ["restored from a backup", "reconcile --adopt"];
    daemon.refuses(&words).await;
    assert_eq!(second.count_documents(doc! {}).await.unwrap(), 1);
    wait_content(second, 2, doc! {"_id": 2}).await;
}

#[tokio::test]
async fn r12_a_server_restored_under_a_running_daemon_is_refused() {
    let each = [
        PutBack::Local,
        PutBack::Remote,
        PutBack::RemotePastElections,
    ];
    futures::future::join_all(each.map(put_back_under_a_running_daemon)).await;
}
