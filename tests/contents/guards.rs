//! R13: losses that nobody may have meant are held until a person decides: deletions in masses,
//! a collection that is gone, a database that is suddenly empty.

use crate::common::kit::{
    Docs, PATIENT, both, conflicts_now, cut, dealt_with, fill, heal, raw_docs, set, the_conflict,
    wait_closed, wait_content, wait_reconciled,
};
use crate::common::{Daemon, World, wait_until};
use mongodb::bson::doc;
use serde_json::json;

async fn count(c: &Docs) -> u64 {
    c.count_documents(doc! {}).await.unwrap()
}

/// The one open conflict over the API.
async fn open(daemon: &Daemon) -> serde_json::Value {
    let answer = daemon.get("/api/sync/conflicts?resolved=false").await;
    let mut found = answer.unwrap().body.as_array().cloned().unwrap();
    assert_eq!(found.len(), 1, "{found:#?}");
    found.remove(0)
}

async fn resolve(daemon: &Daemon, strategy: &str) {
    let id = open(daemon).await["_id"].as_str().unwrap().to_owned();
    let path = format!("/api/sync/conflicts/{id}/resolve");
    let answer = daemon.post(&path, json!({ "strategy": strategy })).await;
    let answer = answer.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
}

async fn wait_count(c: &Docs, wanted: u64) {
    wait_until(PATIENT, "the number of documents", async || {
        let n = count(c).await;
        (n == wanted)
            .then_some(())
            .ok_or_else(|| format!("{n}, not {wanted}"))
    })
    .await;
}

#[tokio::test]
async fn r13_a_mass_delete_is_held_over_kill_9_until_it_is_confirmed() {
    for (local, offline) in [(true, false), (false, true)] {
        // GIVEN 1,500 documents on both sides
        let world = World::new("mass").await;
        let mut daemon = world.start().await;
        let (here, there) = fill(&world, &daemon, "c", 1500).await;
        // What comes and goes within seconds is no loss: these shall have been there.
        daemon.kill9();
        daemon.restart().await;
        dealt_with(&daemon).await;
        let (from, other) = if local {
            (&here, &there)
        } else {
            (&there, &here)
        };
        // WHEN nearly all of them are deleted on one side, and others edited
        if offline {
            cut(&world, &daemon).await;
        }
        from.delete_many(doc! {"_id": {"$gte": 20}}).await.unwrap();
        if offline {
            heal(&world, &daemon).await;
        }
        // THEN nothing is deleted on the other one: a conflict asks, and says what to type
        daemon
            .wait_status_within(PATIENT, "unresolvedConflicts", |n| *n == 1)
            .await;
        // (Of a live one, the first few may have gone before it was a mass.)
        let kept = count(other).await;
        assert!(kept == 1500 || !offline && kept > 1400, "{kept}");
        let conflict = the_conflict(&world, &daemon).await;
        assert_eq!(conflict.get_str("kind").unwrap(), "mass_delete");
        let notes = conflict.get_str("notes").unwrap();
        let side = if local { "local" } else { "remote" };
        let said = format!("1480 of 1500 documents were deleted on the {side} side");
        assert!(notes.contains(&said), "{notes}");
        let status = daemon.status().await.unwrap();
        let notices = status["notices"].to_string();
        assert!(notices.contains("sangam resolve "), "{notices}");
        // AND it stays so over a crash, a sync and a reconcile, while other collections go on
        daemon.kill9();
        daemon.restart().await;
        let (here, there) = both(&world, "another");
        here.insert_one(doc! {"_id": "here"}).await.unwrap();
        there.insert_one(doc! {"_id": "there"}).await.unwrap();
        wait_content(&there, "here", doc! {"_id": "here"}).await;
        wait_content(&here, "there", doc! {"_id": "there"}).await;
        dealt_with(&daemon).await;
        wait_reconciled(&daemon).await;
        assert_eq!(count(other).await, kept);
        // WHEN it is confirmed, THEN it is carried over, but for what was edited meanwhile
        set(other, 700, doc! {"v": 1}).await;
        set(from, 5, doc! {"v": 2}).await;
        resolve(&daemon, if local { "keep_local" } else { "keep_remote" }).await;
        wait_count(other, 21).await;
        wait_content(from, 700, doc! {"_id": 700, "v": 1}).await;
        wait_content(other, 5, doc! {"_id": 5, "v": 2}).await;
        // AND the next one is held again
        let more = (5000..5400).map(|i| doc! {"_id": i});
        from.insert_many(more).await.unwrap();
        wait_count(other, 421).await;
        dealt_with(&daemon).await;
        from.delete_many(doc! {"_id": {"$gte": 5000}})
            .await
            .unwrap();
        daemon
            .wait_status_within(PATIENT, "unresolvedConflicts", |n| *n == 1)
            .await;
        assert_eq!(count(other).await, 421);
    }
}

#[tokio::test]
async fn r13_a_mass_delete_is_taken_back_by_keeping_the_other_side() {
    let world = World::new("mass_back").await;
    let daemon = world.start().await;
    let (here, there) = fill(&world, &daemon, "c", 400).await;
    // Fewer than a fifth pass without a word, and so does a trickle.
    here.delete_many(doc! {"_id": {"$lt": 70}}).await.unwrap();
    wait_count(&there, 330).await;
    // One site deletes, in pieces that follow each other.
    for from in (100..400).step_by(60) {
        let piece = doc! {"_id": {"$gte": from, "$lt": from + 60}};
        there.delete_many(piece).await.unwrap();
    }
    daemon.wait_status("unresolvedConflicts", |n| *n == 1).await;
    let left = count(&here).await;
    resolve(&daemon, "keep_local").await;
    world.wait_converged_within(PATIENT, &daemon).await;
    assert_eq!(count(&there).await, left, "what was held came back");
    assert!(left > 230, "{left}");
    wait_closed(&world, &daemon).await;
}

#[tokio::test]
async fn r13_what_a_comparison_finds_deleted_is_held_as_a_whole() {
    // GIVEN a remote that is not followed
    let world = World::new("mass_reconcile").await;
    let settings = world.settings().set("pull.follow", "false");
    let daemon = world.start_with(settings).await;
    let (here, there) = fill(&world, &daemon, "c", 2500).await;
    let (lost, lost_there) = fill(&world, &daemon, "lost", 5).await;
    wait_reconciled(&daemon).await;
    // WHEN more than a fifth of a collection is deleted there, and another one dropped
    there.delete_many(doc! {"_id": {"$lt": 600}}).await.unwrap();
    lost_there.drop().await.unwrap();
    wait_reconciled(&daemon).await;
    // THEN both are held, and nothing is deleted here
    daemon.wait_status("unresolvedConflicts", |n| *n == 2).await;
    assert_eq!((count(&here).await, count(&lost).await), (2500, 5));
    let kinds: Vec<String> = (conflicts_now(&world, &daemon).await.iter())
        .map(|c| c.get_str("kind").unwrap().to_owned())
        .collect();
    assert!(
        kinds.contains(&"mass_delete".into()) && kinds.contains(&"collection_dropped".into()),
        "{kinds:?}"
    );
}

#[tokio::test]
async fn r13_a_mass_is_counted_over_batches_where_no_event_told_of_a_deletion() {
    // GIVEN a remote that is not followed, and documents that were there before
    let world = World::new("mass_looks").await;
    let mut daemon = world.start().await;
    let (here, there) = fill(&world, &daemon, "c", 2500).await;
    dealt_with(&daemon).await;
    daemon.kill9();
    let gate = world.dir().join("gate");
    std::fs::write(&gate, b"").unwrap();
    let settings = daemon.settings.clone().set("pull.follow", "false");
    daemon.settings = settings.env("SANGAM_STALL", &format!("claimed:{}", gate.display()));
    daemon.restart().await;
    // (All of them are younger than the overlap of two fetches.)
    daemon
        .wait_status_within(PATIENT, "pendingInbox", |n| *n == 2500)
        .await;
    // WHEN more than a fifth of them (more than one batch has, and no batch more than that) were
    // fetched, and deleted before anybody looked
    let some = doc! {"_id": {"$lt": 600}};
    there.delete_many(some).await.unwrap();
    std::fs::remove_file(gate).unwrap();
    // THEN it is held, though no batch held so many
    daemon
        .wait_status_within(PATIENT, "unresolvedConflicts", |n| *n == 1)
        .await;
    assert_eq!(open(&daemon).await["kind"], "mass_delete");
    // (A batch that held a few of them only may have come first: fewer than 100 are never a mass.)
    let left = count(&here).await;
    assert!(left > 2400, "{left}");
}

#[tokio::test]
async fn r13_a_remote_that_is_suddenly_empty_empties_nothing() {
    // GIVEN small collections, none of which would make a mass
    let world = World::new("emptied").await;
    let mut daemon = world.start().await;
    let (a, a_there) = fill(&world, &daemon, "a", 30).await;
    let (b, b_there) = fill(&world, &daemon, "b", 30).await;
    // (What it does not know yet to have arrived would only be sent again.)
    dealt_with(&daemon).await;
    daemon.kill9();
    // WHEN the remote lost them all while nobody looked (its stream is not there to tell)
    a_there.delete_many(doc! {}).await.unwrap();
    b_there.delete_many(doc! {}).await.unwrap();
    daemon.settings = daemon.settings.clone().set("pull.follow", "false");
    daemon.restart().await;
    wait_reconciled(&daemon).await;
    // THEN that is held, and says why
    daemon.wait_status("unresolvedConflicts", |n| *n == 2).await;
    dealt_with(&daemon).await;
    assert_eq!((count(&a).await, count(&b).await), (30, 30));
    let notices = daemon.status().await.unwrap()["notices"].to_string();
    assert!(
        notices.contains("suddenly empty on the remote side"),
        "{notices}"
    );
    assert_eq!(raw_docs(&world.remote, "a").await.len(), 0);
}
