//! Verify, plan and adopt: looking without touching, and saying which side is right.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::kit::{
    Docs, PATIENT, both, cut, dealt_with, fill, heal, index, raw_docs, set, wait_content, wait_doc,
};
use crate::common::{Daemon, World, wait_until};
use mongodb::IndexModel;
use mongodb::bson::{Bson, Document, doc};
use mongodb::options::IndexOptions;
use serde_json::{Value, json};

async fn post(daemon: &Daemon, path: &str, body: Value) -> Value {
    let answer = daemon.post(path, body).await.unwrap();
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    answer.body
}

async fn plan(daemon: &Daemon, query: &str) -> Value {
    let path = format!("/api/sync/plan?{query}");
    let answer = daemon.get(&path).await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.body
}

/// Writes on both sides until told to stop.
fn writers(world: &World) -> (Arc<AtomicBool>, tokio::task::JoinHandle<()>) {
    let stop = Arc::new(AtomicBool::new(false));
    let (flag, (here, there)) = (stop.clone(), both(world, "c"));
    let task = tokio::spawn(async move {
        let mut n = 0;
        while !flag.load(Ordering::Relaxed) {
            n += 1;
            for (c, id) in [(&here, n % 40), (&there, 40 + n % 40)] {
                let update = c.update_one(doc! {"_id": id}, doc! {"$set": {"v": n}});
                update.await.unwrap();
            }
            let new = format!("new {n}");
            here.insert_one(doc! {"_id": &new}).await.unwrap();
            if n % 3 == 0 {
                there.delete_one(doc! {"_id": &new}).await.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    });
    (stop, task)
}

/// Lets the daemon forget that these changes of `c` have happened.
async fn behind_the_back(world: &World, daemon: &mut Daemon, work: impl AsyncFnOnce()) {
    dealt_with(daemon).await;
    daemon.post("/api/sync/pause", json!({})).await.unwrap();
    // A batch that is at work is not broken off.
    daemon.wait_status("isSyncing", |v| *v == false).await;
    work().await;
    let (here, there) = both(world, "marks");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    there.insert_one(doc! {"_id": 2}).await.unwrap();
    wait_until(PATIENT, "all of it is queued", async || {
        let plan = plan(daemon, "collections=marks").await;
        let creates = |side: &str| plan["total"][side]["creates"] == 1;
        let both = creates("toRemote") && creates("toLocal");
        both.then_some(()).ok_or_else(|| plan.to_string())
    })
    .await;
    assert!(daemon.terminate().await.success());
    let store = rusqlite::Connection::open(daemon.state_dir().join("sangam.db")).unwrap();
    let ns = "SELECT n FROM namespaces WHERE coll = 'c'";
    let ns: u32 = store.query_row(ns, [], |r| r.get(0)).unwrap();
    for table in ["outbox", "inbox"] {
        let sql = format!("DELETE FROM {table} WHERE substr(key, 1, 4) = ?");
        store.execute(&sql, [ns.to_be_bytes()]).unwrap();
    }
    drop(store);
    daemon.restart().await;
    daemon.post("/api/sync/resume", json!({})).await.unwrap();
    daemon.wait_status("isOnline", |v| *v == true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_tells_differences_from_what_is_on_its_way() {
    // GIVEN documents on both sides, and differences that no event tells of
    let world = World::new("verify").await;
    let mut daemon = world.start().await;
    let (here, there) = fill(&world, &daemon, "c", 3000).await;
    behind_the_back(&world, &mut daemon, async || {
        here.delete_one(doc! {"_id": 1000}).await.unwrap();
        there.delete_one(doc! {"_id": 1001}).await.unwrap();
        set(&there, 1002, doc! {"v": "remote"}).await;
    })
    .await;
    // WHEN verify runs while apps write on both sides
    let (stop, task) = writers(&world);
    let report = post(&daemon, "/api/sync/verify", json!({"fresh": true})).await;
    // THEN it finds those and no others
    assert_eq!(report["equal"], false, "{report:#}");
    let mut found: Vec<(i64, &str, &str)> = (report["differences"].as_array().unwrap().iter())
        .map(|d| {
            (
                d["id"].as_i64().unwrap(),
                d["kind"].as_str().unwrap(),
                d["repair"].as_str().unwrap(),
            )
        })
        .collect();
    let wanted = vec![
        (1000, "only_remote", "delete_remote"),
        (1001, "only_local", "delete_local"),
        (1002, "different", "pull"),
    ];
    found.sort_unstable();
    assert_eq!(found, wanted, "{report:#}");
    let status = daemon.status().await.unwrap();
    assert_eq!(status["lastVerify"]["differences"], 3, "{status}");
    // AND repair mends them by base, after saying how
    let refused = daemon.settings.cli(&["verify", "--repair"]);
    assert_eq!(refused.status.code(), Some(3), "{refused:?}");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        said.contains("1 fetched from the remote") && said.contains("nothing was repaired"),
        "{said}"
    );
    assert!(there.find_one(doc! {"_id": 1000}).await.unwrap().is_some());
    let cli = daemon.settings.cli(&["verify", "--repair", "--yes"]);
    assert!(cli.status.success(), "{cli:?}");
    wait_content(&here, 1002, doc! {"_id": 1002, "v": "remote"}).await;
    wait_content(&there, 1000, None).await;
    wait_content(&here, 1001, None).await;
    // AND with writers still at it, both sides are proven equal
    let report = post(&daemon, "/api/sync/verify", json!({})).await;
    assert_eq!(report["equal"], true, "{report:#}");
    stop.store(true, Ordering::Relaxed);
    task.await.unwrap();
    let status = daemon.status().await.unwrap();
    let documents = status["lastProof"]["documents"].as_i64().unwrap();
    assert!(documents >= 2998, "{status}");
    let text = daemon.settings.cli(&["status"]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(
        text.contains("Verified") && text.contains("equal"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_goes_on_after_a_crash_and_knows_conflicts() {
    // GIVEN a conflict, and a daemon that dies in the middle of a verify
    let world = World::new("verify_crash").await;
    let mut daemon = world.start().await;
    let (here, there) = fill(&world, &daemon, "c", 5000).await;
    cut(&world, &daemon).await;
    set(&here, 7, doc! {"v": 1}).await;
    set(&there, 7, doc! {"v": 2}).await;
    heal(&world, &daemon).await;
    daemon.wait_status("unresolvedConflicts", |n| *n == 1).await;
    daemon.settings = daemon
        .settings
        .clone()
        .env("SANGAM_FAILPOINT", "verify_walked:1");
    daemon.restart().await;
    daemon.wait_status("isOnline", |v| *v == true).await;
    let died = daemon.post("/api/sync/verify", json!({})).await;
    assert!(died.is_err(), "{died:?}");
    daemon.wait_exit().await;
    daemon.settings = daemon.settings.clone().env("SANGAM_FAILPOINT", "");
    daemon.restart().await;
    daemon.wait_status("isOnline", |v| *v == true).await;
    // WHEN it is asked for again
    let report = post(&daemon, "/api/sync/verify", json!({})).await;
    // THEN it goes on where it was, counts every document once, and tells the conflict apart
    assert_eq!(report["resumed"], true, "{report:#}");
    assert_eq!(report["total"]["documents"], 5000, "{report:#}");
    assert_eq!(report["equal"], true, "{report:#}");
    assert_eq!(report["total"]["inConflict"], 1, "{report:#}");
    let cli = daemon.settings.cli(&["verify", "--max-documents", "20000"]);
    assert_eq!(cli.status.code(), Some(3), "{cli:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn plan_says_what_a_sync_then_does() {
    // GIVEN changes of every kind that wait
    let world = World::new("plan").await;
    let daemon = world.start().await;
    let unique = IndexOptions::builder().unique(true).build();
    let username = IndexModel::builder()
        .keys(doc! {"username": 1})
        .options(unique);
    index(&world, "users", username.build()).await;
    let (here, there) = fill(&world, &daemon, "c", 50).await;
    let users = both(&world, "users");
    dealt_with(&daemon).await;
    daemon.post("/api/sync/pause", json!({})).await.unwrap();
    here.insert_many([doc! {"_id": 100}, doc! {"_id": 101}])
        .await
        .unwrap();
    here.delete_one(doc! {"_id": 1}).await.unwrap();
    set(&here, 2, doc! {"v": 1}).await;
    there.insert_one(doc! {"_id": 200}).await.unwrap();
    there
        .delete_many(doc! {"_id": {"$in": [3, 4]}})
        .await
        .unwrap();
    set(&here, 5, doc! {"a": 1}).await;
    set(&there, 5, doc! {"b": 1}).await;
    set(&here, 6, doc! {"v": 1}).await;
    set(&there, 6, doc! {"v": 2}).await;
    users
        .0
        .insert_one(doc! {"_id": 1, "username": "john"})
        .await
        .unwrap();
    users
        .1
        .insert_one(doc! {"_id": 2, "username": "john"})
        .await
        .unwrap();
    daemon.wait_status("pendingDocuments", |n| *n == 7).await;
    daemon.wait_status("pendingInbox", |n| *n == 6).await;
    let before = (
        raw_docs(&world.local, "c").await,
        raw_docs(&world.remote, "c").await,
    );
    // WHEN it is planned, by the queue and by comparison
    for query in ["compare=false", "compare=true"] {
        let plan = plan(&daemon, query).await;
        let c = &plan["collections"][0];
        let counts = |side: &str| {
            let w = &c[side];
            [&w["creates"], &w["updates"], &w["deletes"]].map(|n| n.as_u64().unwrap())
        };
        assert_eq!(counts("toRemote"), [2, 2, 1], "{plan:#}");
        assert_eq!(counts("toLocal"), [1, 1, 2], "{plan:#}");
        assert_eq!(
            (&c["merges"], &c["conflicts"]),
            (&json!(1), &json!(1)),
            "{plan:#}"
        );
        assert_eq!(plan["collections"][1]["uniqueClashes"], 2, "{plan:#}");
    }
    let cli = daemon
        .settings
        .cli(&["sync", "--dry-run", "--collections", "c"]);
    assert_eq!(cli.status.code(), Some(3), "{cli:?}");
    let text = String::from_utf8_lossy(&cli.stdout).into_owned();
    assert!(
        text.contains("2 / 2 / 1") && text.contains("Nothing was written"),
        "{text}"
    );
    // THEN nothing has moved, and the sync does just that
    let now = (
        raw_docs(&world.local, "c").await,
        raw_docs(&world.remote, "c").await,
    );
    assert_eq!(before, now);
    daemon.post("/api/sync/resume", json!({})).await.unwrap();
    dealt_with(&daemon).await;
    daemon.wait_status("unresolvedConflicts", |n| *n == 2).await;
    let plan = plan(&daemon, "compare=true").await;
    assert_eq!(plan["total"]["toRemote"]["creates"], 0, "{plan:#}");
    assert_eq!(plan["collections"][0]["held"], 1, "{plan:#}");
}

/// Both sides apart by every kind of difference.
async fn apart(world: &World, daemon: &Daemon) -> (Docs, Docs) {
    let (here, there) = both(world, "c");
    here.insert_many((0..300).map(|i| doc! {"_id": i, "v": 0}))
        .await
        .unwrap();
    dealt_with(daemon).await;
    here.delete_many(doc! {"_id": {"$lt": 150}}).await.unwrap();
    here.insert_one(doc! {"_id": "only local"}).await.unwrap();
    there.insert_one(doc! {"_id": "only remote"}).await.unwrap();
    set(&here, 200, doc! {"v": "local"}).await;
    set(&there, 200, doc! {"v": "remote"}).await;
    (here, there)
}

#[tokio::test(flavor = "multi_thread")]
async fn r12_adopting_one_side_makes_the_other_equal_and_can_be_undone() {
    for local in [true, false] {
        // GIVEN two sides that differ, a mass of deletions among it
        let world = World::new("adopt").await;
        let settings = world.settings().set("sync.auto_sync_enabled", "false");
        let mut daemon = world.start_with(settings).await;
        let (here, there) = apart(&world, &daemon).await;
        let mode = if local { "local" } else { "remote" };
        let planned = plan(&daemon, &format!("adopt={mode}")).await;
        let (to, deletes) = if local {
            ("toRemote", 151)
        } else {
            ("toLocal", 1)
        };
        assert_eq!(planned["total"][to]["deletes"], deletes, "{planned:#}");
        let asked = daemon.settings.cli(&["reconcile", "--adopt", mode]);
        assert_eq!(asked.status.code(), Some(2), "{asked:?}");
        // WHEN one is adopted, and the daemon dies on the way, twice
        for point in ["adopt_range", "adopt_settling"] {
            daemon.settings = daemon
                .settings
                .clone()
                .env("SANGAM_FAILPOINT", &format!("{point}:1"));
            if point == "adopt_settling" {
                daemon.respawn();
            } else {
                daemon.restart().await;
                daemon.wait_status("isOnline", |v| *v == true).await;
                let file = daemon.control_file();
                std::fs::write(file, format!("reconcile --adopt {mode}\n")).unwrap();
            }
            daemon.wait_exit().await;
        }
        daemon.settings = daemon.settings.clone().env("SANGAM_FAILPOINT", "");
        daemon.restart().await;
        // THEN it is carried out all the same
        let wanted = if local { 151 } else { 301 };
        wait_until(PATIENT, "both sides equal", async || {
            let n = (
                here.count_documents(doc! {}).await.unwrap(),
                there.count_documents(doc! {}).await.unwrap(),
            );
            (n == (wanted, wanted))
                .then_some(())
                .ok_or(format!("{n:?}"))
        })
        .await;
        wait_content(&there, 200, doc! {"_id": 200, "v": mode}).await;
        let status = daemon.status().await.unwrap();
        assert_eq!(status["unresolvedConflicts"], 0, "{status}");
        // AND what was discarded is on record, each version once, and comes back
        dealt_with(&daemon).await;
        let records = world.conflicts().await;
        let parent = records
            .iter()
            .find(|r| r.get_str("collection").is_ok_and(|c| c == "*"));
        let parent = parent.unwrap().get_object_id("_id").unwrap();
        let children = records
            .iter()
            .filter(|r| r.get_object_id("parent").is_ok_and(|p| p == parent));
        assert_eq!(
            children.count(),
            if local { 152 } else { 2 },
            "{records:#?}"
        );
        daemon.settings = (daemon.settings.clone()).set("sync.auto_sync_enabled", "true");
        daemon.restart().await;
        daemon.wait_status("isOnline", |v| *v == true).await;
        let path = format!("/api/sync/conflicts/{}/undo", parent.to_hex());
        post(&daemon, &path, json!({})).await;
        let (id, other) = if local {
            ("only remote", "remote")
        } else {
            ("only local", "local")
        };
        wait_doc(&there, id, "it is back", |_| true).await;
        wait_content(&there, 200, doc! {"_id": 200, "v": other}).await;
        world.wait_converged_within(PATIENT, &daemon).await;
    }
}

/// Adopts while a mass of deletions and a dropped collection are held, both of the remote side.
async fn adopted_while_held(mode: &str) {
    // GIVEN a collection whose deletions are held, another one that was dropped, and edits that wait
    let world = World::new(&format!("held_{mode}")).await;
    let daemon = world.start().await;
    let (here, there) = fill(&world, &daemon, "c", 300).await;
    let (lost, lost_there) = fill(&world, &daemon, "lost", 30).await;
    // (All at once: a few that are seen first are no mass, and go.)
    post(&daemon, "/api/sync/pause", json!({})).await;
    there.delete_many(doc! {"_id": {"$lt": 200}}).await.unwrap();
    daemon
        .wait_status("pendingInbox", |n| n.as_u64() >= Some(200))
        .await;
    lost_there.drop().await.unwrap();
    post(&daemon, "/api/sync/resume", json!({})).await;
    daemon.wait_status("unresolvedConflicts", |n| *n == 2).await;
    here.insert_one(doc! {"_id": "new"}).await.unwrap();
    if mode != "merge" {
        // Without a side that is right, edits of the same document would be clashes.
        set(&here, 250, doc! {"v": "local"}).await;
        set(&there, 251, doc! {"v": "remote"}).await;
    }
    // WHEN the running daemon is told how to go on
    let told = (daemon.settings).cli(&["reconcile", "--adopt", mode, "--yes"]);
    assert!(told.status.success(), "{mode}: {told:?}");
    // THEN both sides are equal in that way
    let (c, l, edits) = match mode {
        "merge" => (301, 30, [Bson::from(0), Bson::from(0)]),
        "local" => (301, 30, [Bson::from("local"), Bson::from(0)]),
        _ => (100, 0, [Bson::from(0), Bson::from("remote")]),
    };
    world.wait_converged_within(PATIENT, &daemon).await;
    let counts = (
        here.count_documents(doc! {}).await.unwrap(),
        lost.count_documents(doc! {}).await.unwrap(),
    );
    assert_eq!(counts, (c, l), "{mode}");
    for (id, v) in [250, 251].into_iter().zip(edits) {
        let found = there.find_one(doc! {"_id": id}).await.unwrap();
        assert_eq!(found.unwrap().get("v"), Some(&v), "{mode}: {id}");
    }
    // AND nothing is held any more: what follows goes both ways, in both collections
    daemon.wait_status("unresolvedConflicts", |n| *n == 0).await;
    let status = daemon.status().await.unwrap();
    assert!(
        !status["notices"].to_string().contains("not synced until"),
        "{status}"
    );
    for (from, to) in [(&here, &there), (&lost_there, &lost)] {
        from.insert_one(doc! {"_id": "after"}).await.unwrap();
        wait_doc(to, "after", "what follows arrives", |_| true).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn r13_adopting_in_a_running_daemon_settles_what_it_holds() {
    tokio::join!(
        adopted_while_held("merge"),
        adopted_while_held("local"),
        adopted_while_held("remote")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn r12_adopting_settles_a_held_collection_and_keeps_later_edits() {
    // GIVEN a mass delete that is held
    let world = World::new("adopt_held").await;
    let daemon = world.start().await;
    let (here, there) = fill(&world, &daemon, "c", 300).await;
    there.delete_many(doc! {"_id": {"$lt": 200}}).await.unwrap();
    daemon.wait_status("unresolvedConflicts", |n| *n == 1).await;
    // WHEN the local side is adopted while apps write
    let (stop, task) = writers(&world);
    let run = post(&daemon, "/api/sync/adopt", json!({"mode": "local"})).await;
    assert_eq!(run["status"], "completed", "{run:#}");
    stop.store(true, Ordering::Relaxed);
    task.await.unwrap();
    // THEN it is there again on both sides, and nothing is held
    world.wait_converged_within(PATIENT, &daemon).await;
    let old = doc! {"_id": {"$gte": 80, "$lt": 300}};
    assert_eq!(there.count_documents(old.clone()).await.unwrap(), 220);
    assert_eq!(here.count_documents(old).await.unwrap(), 220);
    wait_until(PATIENT, "no collection is held", async || {
        let open: Vec<Document> = (world.conflicts().await.into_iter())
            .filter(|c| !c.get_bool("resolved").unwrap())
            .filter(|c| c.get_str("kind").unwrap() == "mass_delete")
            .collect();
        open.is_empty().then_some(()).ok_or(format!("{open:?}"))
    })
    .await;
    let bad = daemon
        .post("/api/sync/adopt", json!({"mode": "both"}))
        .await
        .unwrap();
    assert_eq!(bad.status, 400, "{}", bad.body);
}
