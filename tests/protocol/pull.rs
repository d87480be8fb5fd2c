//! R18: fetching by timestamp, where the remote's change stream isn't followed.

use crate::common::kit::{
    both, content, converged_without_conflict, dealt_with, set, wait_content, wait_doc,
    wait_reconciled,
};
use crate::common::{Daemon, SOON, Settings, World, wait_until};
use mongodb::Client;
use mongodb::bson::{DateTime, Document, doc};
use sangam::mongod::MongoServer;

const DAY: i64 = 86_400_000;

fn ago(days: i64) -> DateTime {
    DateTime::from_millis(DateTime::now().timestamp_millis() - days * DAY)
}

fn unfollowed(settings: Settings) -> Settings {
    settings.set("pull.follow", "false")
}

/// A daemon without the remote's stream, past its first sync.
async fn pulling(test: &str) -> (World, Daemon) {
    let world = World::new(test).await;
    let (here, _) = both(&world, "c");
    here.insert_one(doc! {"_id": 0, "updatedAt": ago(1)})
        .await
        .unwrap();
    let daemon = world.start_with(unfollowed(world.settings())).await;
    world.wait_converged(&daemon).await;
    dealt_with(&daemon).await;
    (world, daemon)
}

#[tokio::test]
async fn r18_nothing_is_fetched_that_the_first_comparison_is_about_to_read() {
    // GIVEN two equal databases, and a daemon that is held up before it compares them
    let world = World::new("before_first").await;
    let dir = tempfile::tempdir().unwrap();
    let server = MongoServer::start(dir.path(), None, "rs_asked")
        .await
        .unwrap();
    let remote = Client::with_uri_str(server.direct_uri()).await.unwrap();
    let remote = remote.database(world.local.name());
    let (here, there) = (
        world.local.collection::<Document>("c"),
        remote.collection("c"),
    );
    for c in [&here, &there] {
        let docs = (0..50).map(|i| doc! {"_id": i, "updatedAt": ago(2)});
        c.insert_many(docs).await.unwrap();
    }
    let by_date = doc! {"$exists": true};
    let finds = doc! {"command.find": "c", "command.filter.updatedAt": by_date};
    let profile = doc! {"profile": 2, "filter": &finds};
    remote.run_command(profile).await.unwrap();
    let gate = world.dir().join("gate");
    std::fs::write(&gate, b"").unwrap();
    let settings = unfollowed(world.settings())
        .set("pull.interval", "\"200ms\"")
        .set("remote.uri", &format!("{:?}", server.direct_uri()))
        .env("SANGAM_STALL", &format!("comparing:{}", gate.display()));
    let _daemon = world.start_with(settings).await;
    // WHEN it has looked for changes a few times
    wait_until(SOON, "it looked for changes", async || {
        let status = remote.run_command(doc! {"serverStatus": 1}).await.unwrap();
        let commands = status
            .get_document("metrics")
            .unwrap()
            .get_document("commands");
        let lists = commands.unwrap().get_document("listCollections").unwrap();
        let n = lists.get_i64("total").unwrap();
        (n > 10).then_some(()).ok_or_else(|| format!("{n} times"))
    })
    .await;
    // THEN no document was read that will be read again
    let found = remote.collection::<Document>("system.profile");
    assert_eq!(found.count_documents(finds).await.unwrap(), 0);
    // AND what changes from then on arrives
    std::fs::remove_file(&gate).unwrap();
    set(&there, 7, doc! {"v": 1, "updatedAt": ago(0)}).await;
    wait_doc(&here, 7, "pulled", |d| d.get_i32("v").is_ok_and(|v| v == 1)).await;
}

#[tokio::test]
async fn r18_inserts_and_edits_with_a_date_are_pulled() {
    let (world, daemon) = pulling("pulled").await;
    let (here, there) = both(&world, "c");
    assert_eq!(daemon.status().await.unwrap()["isFollowing"], false);
    // WHEN the remote gets documents, one of them in a collection of its own
    there
        .insert_one(doc! {"_id": 1, "v": 1, "updatedAt": ago(0)})
        .await
        .unwrap();
    let (new_here, new_there) = both(&world, "new");
    new_there
        .insert_one(doc! {"_id": 1, "updatedAt": ago(0)})
        .await
        .unwrap();
    // THEN they arrive, and so does an edit
    wait_doc(&here, 1, "pulled", |d| d.get_i32("v").is_ok_and(|v| v == 1)).await;
    wait_doc(&new_here, 1, "pulled", |_| true).await;
    set(&there, 1, doc! {"v": 2, "updatedAt": ago(0)}).await;
    wait_doc(&here, 1, "pulled", |d| d.get_i32("v").is_ok_and(|v| v == 2)).await;
    // AND what is pushed meanwhile isn't taken for a change of the remote's
    here.insert_one(doc! {"_id": 2, "updatedAt": ago(0)})
        .await
        .unwrap();
    set(&here, 1, doc! {"v": 3, "updatedAt": ago(0)}).await;
    wait_doc(&there, 1, "pushed", |d| {
        d.get_i32("v").is_ok_and(|v| v == 3)
    })
    .await;
    converged_without_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn r18_a_date_in_the_far_future_poisons_nothing() {
    let (world, daemon) = pulling("future").await;
    let (here, there) = both(&world, "c");
    // GIVEN a document from a clock that is far ahead
    there
        .insert_one(doc! {"_id": "ahead", "updatedAt": ago(-3650)})
        .await
        .unwrap();
    there
        .insert_one(doc! {"_id": "beside", "updatedAt": ago(0)})
        .await
        .unwrap();
    wait_doc(&here, "beside", "pulled", |_| true).await;
    dealt_with(&daemon).await;
    // WHEN others come later THEN they arrive
    there
        .insert_one(doc! {"_id": "after", "updatedAt": ago(0)})
        .await
        .unwrap();
    wait_doc(&here, "after", "pulled", |_| true).await;
    // AND itself with a reconcile at the latest
    wait_reconciled(&daemon).await;
    wait_doc(&here, "ahead", "reconciled", |_| true).await;
    converged_without_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn r18_documents_without_a_date_are_swept() {
    let (world, daemon) = pulling("swept").await;
    let (here, there) = both(&world, "c");
    let documents = [
        doc! {"_id": "missing", "v": 0},
        doc! {"_id": "null", "v": 0, "updatedAt": null},
        doc! {"_id": "text", "v": 0, "updatedAt": "2024-01-01T00:00:00Z"},
        doc! {"_id": "number", "v": 0, "updatedAt": 1_700_000_000_000_i64},
    ];
    // WHEN documents come whose field is missing or no date, and are edited
    there.insert_many(&documents).await.unwrap();
    for d in &documents {
        wait_content(&here, d.get_str("_id").unwrap(), d.clone()).await;
    }
    for d in &documents {
        set(&there, d.get_str("_id").unwrap(), doc! {"v": 1}).await;
    }
    // THEN they arrive
    for mut d in documents {
        d.insert("v", 1);
        wait_content(&here, d.get_str("_id").unwrap().to_owned(), d).await;
    }
    converged_without_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn r18_what_a_pull_cannot_see_is_said_and_comes_with_a_reconcile() {
    let (world, daemon) = pulling("unseen").await;
    let (here, there) = both(&world, "c");
    there
        .insert_one(doc! {"_id": 1, "v": 0, "updatedAt": ago(2)})
        .await
        .unwrap();
    wait_reconciled(&daemon).await;
    world.wait_converged(&daemon).await;
    // GIVEN a deletion on the remote, and an edit that leaves the date as it was
    there.delete_one(doc! {"_id": 0}).await.unwrap();
    set(&there, 1, doc! {"v": 1}).await;
    // THEN status says that such things wait for the next reconcile
    daemon
        .wait_status("notices", |n| n.to_string().contains("deletions there"))
        .await;
    // WHEN that comes THEN both arrive
    wait_reconciled(&daemon).await;
    wait_content(&here, 0, None).await;
    wait_doc(&here, 1, "reconciled", |d| {
        d.get_i32("v").is_ok_and(|v| v == 1)
    })
    .await;
    converged_without_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn r18_another_sites_old_work_is_seen_by_its_time_of_arrival() {
    // GIVEN two sites on one remote, the second without a stream
    let world = World::new("sites").await;
    let dir = tempfile::tempdir().unwrap();
    let second = MongoServer::start(dir.path(), None, "rs_second")
        .await
        .unwrap();
    let mut first_site = world.start_with(world.settings().label("first")).await;
    let settings = unfollowed(world.settings().label("second"))
        .set("site", "\"second\"")
        .set("local.uri", &format!("{:?}", second.uri()))
        .set(
            "remote.uri",
            &format!("{:?}", world.servers().remote.direct_uri()),
        );
    let second_site = world.start_with(settings).await;
    let (here, there) = both(&world, "c");
    let beyond = second
        .client()
        .await
        .unwrap()
        .database(&world.name)
        .collection::<Document>("c");
    here.insert_one(doc! {"_id": 0, "updatedAt": ago(8)})
        .await
        .unwrap();
    wait_doc(&beyond, 0, "first sync", |_| true).await;
    dealt_with(&second_site).await;
    // WHEN the first is away while its app works, and brings it in a week later
    first_site.kill9();
    here.insert_one(doc! {"_id": 1, "v": 1, "updatedAt": ago(7)})
        .await
        .unwrap();
    set(&here, 0, doc! {"v": 1, "updatedAt": ago(7)}).await;
    first_site.restart().await;
    wait_doc(&there, 1, "pushed", |_| true).await;
    // THEN the second sees it all the same
    for id in [0, 1] {
        wait_doc(&beyond, id, "pulled", |d| {
            d.get_i32("v").is_ok_and(|v| v == 1)
        })
        .await;
    }
    // AND no site takes the other's stamps for changes
    converged_without_conflict(&world, &first_site).await;
    for id in [0, 1] {
        let mine = content(&here, id).await.unwrap();
        wait_content(&there, id, mine.clone()).await;
        wait_content(&beyond, id, mine).await;
    }
    let conflicts = beyond
        .client()
        .database(&world.name)
        .collection::<Document>("conflict_logs");
    assert_eq!(conflicts.count_documents(doc! {}).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn r18_a_remote_that_refuses_its_stream_is_pulled_and_followed_once_it_may_be() {
    // GIVEN a remote that lets nobody watch it, and different documents on the two sides
    let args = ["--setParameter", "enableTestCommands=1"];
    let world = World::with_server_args("no_stream", &args).await;
    let admin = world.remote.client().database("admin");
    let refuse = doc! {
        "configureFailPoint": "failCommand", "mode": "alwaysOn",
        "data": {"failCommands": ["aggregate"], "errorCode": 13, "appName": "sangam"},
    };
    admin.run_command(refuse).await.unwrap();
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    there.insert_one(doc! {"_id": 2}).await.unwrap();
    // WHEN a daemon that would follow it starts
    let daemon = world.start().await;
    // THEN the first sync takes place all the same, what comes later is pulled, and status says so
    world.wait_converged(&daemon).await;
    assert_eq!(daemon.status().await.unwrap()["isFollowing"], false);
    there
        .insert_one(doc! {"_id": 3, "updatedAt": ago(0)})
        .await
        .unwrap();
    wait_doc(&here, 3, "pulled", |d| d.contains_key("updatedAt")).await;
    daemon
        .wait_status("notices", |n| n.to_string().contains("by timestamp"))
        .await;
    // AND a reconcile reads what it may not have hashed
    there.insert_one(doc! {"_id": 4}).await.unwrap();
    wait_reconciled(&daemon).await;
    wait_doc(&here, 4, "reconciled", |_| true).await;
    // AND once it may be watched, deletions arrive as they happen
    let allow = doc! {"configureFailPoint": "failCommand", "mode": "off"};
    admin.run_command(allow).await.unwrap();
    daemon
        .wait_status("isFollowing", |f| *f == serde_json::json!(true))
        .await;
    there.delete_one(doc! {"_id": 2}).await.unwrap();
    wait_until(crate::common::SOON, "the deletion", async || {
        let left = here.count_documents(doc! {"_id": 2}).await;
        let left = left.map_err(|e| e.to_string())?;
        (left == 0).then_some(()).ok_or_else(|| left.to_string())
    })
    .await;
}
