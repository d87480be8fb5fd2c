//! Comparing both databases whole: what differs is found, told from what was deleted, and mended.
//!
//! The remote's stream isn't followed here and `updatedAt` is left alone, so nothing else sees the changes.

use crate::common::kit::{
    Docs, both, conflicts_now, content, dealt_with, set, the_conflict, wait_content,
};
use crate::common::{Daemon, SOON, Settings, World, wait_until};
use mongodb::bson::{Bson, DateTime, Document, doc, oid::ObjectId};
use sangam::faultlink::Way;
use serde_json::{Value, json};

fn long_ago() -> DateTime {
    DateTime::from_millis(1_600_000_000_000)
}

fn blind(world: &World) -> Settings {
    world.settings().set("pull.follow", "false")
}

/// Compares everything now: by hash, or every document.
async fn reconcile(daemon: &Daemon, exact: bool) {
    wait_until(SOON, "a reconcile", async || {
        let body = json!({ "exact": exact });
        let answer = daemon.post("/api/sync/reconcile", body).await?;
        (answer.status == 200)
            .then_some(())
            .ok_or_else(|| answer.body.to_string())
    })
    .await;
}

async fn fill(c: &Docs, ids: std::ops::Range<i32>) {
    let docs = ids.map(|i| doc! {"_id": i, "n": i, "amount": 2.2, "updatedAt": long_ago()});
    c.insert_many(docs).await.unwrap();
}

/// Equal on both sides and known: 2,500 documents, so that there are several ranges.
async fn known(test: &str, also: impl FnOnce(Settings) -> Settings) -> (World, Daemon) {
    let world = World::new(test).await;
    let (here, there) = both(&world, "c");
    tokio::join!(fill(&here, 0..2500), fill(&there, 0..2500));
    let daemon = world.start_with(also(blind(&world))).await;
    dealt_with(&daemon).await;
    (world, daemon)
}

#[tokio::test]
async fn hashes_find_each_kind_of_change_and_read_only_that() {
    let (world, daemon) = known("cheap", |s| s).await;
    let (here, there) = both(&world, "c");
    // WHEN nothing differs THEN next to nothing crosses the link
    let crossed = || world.link.bytes(Way::Up) + world.link.bytes(Way::Down);
    let before = crossed();
    reconcile(&daemon, false).await;
    let took = crossed() - before;
    assert!(took < 40_000, "{took} bytes for 2,500 equal documents");
    // WHEN the remote changes unseen: a field, the type of a number, a deletion, a new document
    set(&there, 7, doc! {"n": -7}).await;
    set(&there, 1200, doc! {"n": 1200.0}).await;
    there.delete_one(doc! {"_id": 2000}).await.unwrap();
    there
        .insert_one(doc! {"_id": 9000, "updatedAt": long_ago()})
        .await
        .unwrap();
    let before = crossed();
    reconcile(&daemon, false).await;
    let took = crossed() - before;
    // THEN all of it arrives, and the rest was not read
    let kept = |i: i32, n: Bson| doc! {"_id": i, "n": n, "amount": 2.2, "updatedAt": long_ago()};
    assert_eq!(content(&here, 7).await, Ok(Some(kept(7, Bson::Int32(-7)))));
    let typed = content(&here, 1200).await;
    assert_eq!(typed, Ok(Some(kept(1200, Bson::Double(1200.0)))));
    assert_eq!(content(&here, 2000).await, Ok(None));
    assert!(content(&here, 9000).await.unwrap().is_some());
    assert!(took < 150_000, "{took} bytes for four changes");
    assert_eq!(conflicts_now(&world, &daemon).await.len(), 0);
}

// The link runs in this process: waiting for the command must not stop it.
#[tokio::test(flavor = "multi_thread")]
async fn what_hashes_cannot_see_is_found_by_reading() {
    let (world, daemon) = known("exactly", |s| s.set("pull.exact_nights", "0")).await;
    let (here, there) = both(&world, "c");
    let amount = async |c: &Docs| {
        let found = content(c, 1700).await.unwrap().unwrap();
        found.get_f64("amount").unwrap()
    };
    // WHEN a fraction changes THEN a hash is the same
    set(&there, 1700, doc! {"amount": 2.9}).await;
    reconcile(&daemon, false).await;
    assert_eq!(amount(&here).await, 2.2);
    // AND reading finds it
    let asked = daemon.settings.cli(&["reconcile", "--exact"]);
    assert!(asked.status.success(), "{asked:?}");
    assert_eq!(amount(&here).await, 2.9);
}

#[tokio::test]
async fn a_part_is_read_each_time_until_all_was() {
    let (world, _daemon) = known("rotation", |s| {
        s.set("pull.reconcile", "\"1s\"")
            .set("pull.exact_nights", "3")
    })
    .await;
    let (here, there) = both(&world, "c");
    for id in [3, 1100, 2499] {
        set(&there, id, doc! {"amount": 2.9}).await;
    }
    for id in [3, 1100, 2499] {
        let wanted = doc! {"_id": id, "n": id, "amount": 2.9, "updatedAt": long_ago()};
        wait_content(&here, id, wanted).await;
    }
}

#[tokio::test]
async fn one_night_after_another_a_small_collection_is_compared() {
    let world = World::new("nights").await;
    let (here, _) = both(&world, "c");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    let settings = world.settings().set("pull.reconcile", "\"1s\"");
    let mut daemon = world.start_with(settings).await;
    // The second one begins where the first one ended, which was at the end.
    wait_until(SOON, "three comparisons by schedule", async || {
        assert_eq!(daemon.exit_status(), None);
        let runs = daemon.get("/api/sync/logs?limit=20").await?.body;
        let runs = runs.as_array().cloned().unwrap_or_default();
        let done = |run: &&Value| run["trigger"] == "scheduled" && run["status"] == "completed";
        let done = runs.iter().filter(done).count();
        (done >= 3).then_some(()).ok_or_else(|| format!("{done}"))
    })
    .await;
}

#[tokio::test]
async fn r13_a_collection_that_is_gone_is_held_though_no_stream_told() {
    let (world, daemon) = known("gone", |s| s).await;
    let (here, there) = both(&world, "c");
    there.drop().await.unwrap();
    reconcile(&daemon, false).await;
    let conflict = the_conflict(&world, &daemon).await;
    assert_eq!(conflict.get_str("kind").unwrap(), "collection_dropped");
    assert_eq!(here.count_documents(doc! {}).await.unwrap(), 2500);
    // AND once a person says that it is meant, it goes here, too
    let id = conflict.get_object_id("_id").unwrap().to_hex();
    let path = format!("/api/sync/conflicts/{id}/resolve");
    let decided = daemon.post(&path, json!({"strategy": "keep_remote"})).await;
    assert_eq!(decided.unwrap().status, 200);
    wait_until(SOON, "the documents are gone", async || {
        let n = here.count_documents(doc! {}).await.unwrap();
        (n == 0).then_some(()).ok_or_else(|| n.to_string())
    })
    .await;
    // AND a collection of that name may come back
    here.insert_one(doc! {"_id": 1, "new": true}).await.unwrap();
    wait_content(&there, 1, doc! {"_id": 1, "new": true}).await;
    reconcile(&daemon, false).await;
    assert_eq!(here.count_documents(doc! {}).await.unwrap(), 1);
}

#[tokio::test]
async fn ids_of_every_type_mixed_over_several_ranges() {
    let world = World::new("mixed_ids").await;
    // GIVEN collections that sort s9 before s10, enough of them for ranges to be cut by a sample, and
    // some documents that are on one side only
    let ids = |i: i32| -> Vec<Bson> {
        vec![
            i.into(),
            (f64::from(i) + 0.5).into(),
            format!("s{i}").into(),
            doc! {"a": i, "b": {"c": "x"}}.into(),
            ObjectId::from_bytes(
                [i.to_be_bytes(), [7; 4], i.to_le_bytes()]
                    .concat()
                    .try_into()
                    .unwrap(),
            )
            .into(),
            DateTime::from_millis(i64::from(i)).into(),
            mongodb::bson::Timestamp {
                time: 1,
                increment: u32::try_from(i).unwrap(),
            }
            .into(),
        ]
    };
    for db in [&world.local, &world.remote] {
        let collation = doc! {"locale": "en", "numericOrdering": true};
        let create = doc! {"create": "c", "collation": collation};
        db.run_command(create).await.unwrap();
    }
    let (here, there) = both(&world, "c");
    let mut all: Vec<Bson> = (0..600).flat_map(ids).collect();
    all.extend([
        Bson::MinKey,
        Bson::MaxKey,
        Bson::Null,
        true.into(),
        false.into(),
    ]);
    let part = |leave: usize| {
        let some = all.iter().enumerate().filter(move |(i, _)| i % 70 != leave);
        some.map(|(i, id)| doc! {"_id": id.clone(), "i": i as i64})
            .collect::<Vec<_>>()
    };
    here.insert_many(part(1)).await.unwrap();
    there.insert_many(part(2)).await.unwrap();
    let daemon = world.start_with(blind(&world)).await;
    world.wait_converged(&daemon).await;
    let count = all.len() as u64;
    assert_eq!(here.count_documents(doc! {}).await.unwrap(), count);
    // AND a comparison by hash finds one that changed, whatever its `_id`
    reconcile(&daemon, false).await;
    for id in [
        all[3].clone(),
        all[2001].clone(),
        Bson::MinKey,
        Bson::MaxKey,
    ] {
        let one = doc! {"_id": id};
        there
            .update_one(one, doc! {"$set": {"i": -1}})
            .await
            .unwrap();
    }
    there.delete_one(doc! {"_id": Bson::Null}).await.unwrap();
    reconcile(&daemon, false).await;
    assert_eq!(here.count_documents(doc! {"i": -1}).await.unwrap(), 4);
    assert_eq!(here.count_documents(doc! {}).await.unwrap(), count - 1);
    assert_eq!(conflicts_now(&world, &daemon).await.len(), 0);
}

#[tokio::test]
async fn collections_that_are_empty_or_on_one_side_only() {
    let world = World::new("one_sided").await;
    let (here, there) = both(&world, "theirs");
    fill(&there, 0..2500).await;
    world.local.create_collection("empty").await.unwrap();
    let (ours, ours_there) = both(&world, "ours");
    fill(&ours, 0..10).await;
    let daemon = world.start_with(blind(&world)).await;
    world.wait_converged(&daemon).await;
    assert_eq!(here.count_documents(doc! {}).await.unwrap(), 2500);
    assert_eq!(ours_there.count_documents(doc! {}).await.unwrap(), 10);
    reconcile(&daemon, false).await;
    reconcile(&daemon, true).await;
    let found: Vec<Document> = conflicts_now(&world, &daemon).await;
    assert_eq!(found.len(), 0, "{found:?}");
}
