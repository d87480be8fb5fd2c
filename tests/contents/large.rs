//! R14, R19: documents up to the server's limit, and what has no room any more.

use crate::common::World;
use crate::common::kit::{
    Docs, PATIENT, body, both, converged_without_conflict, cut, heal, the_conflict, wait_content,
};
use mongodb::bson::{Document, doc};
use serde_json::json;

#[tokio::test]
async fn r14_documents_up_to_the_servers_limit() {
    // GIVEN documents of 16 MiB less the stamp on either side
    let world = roomy("huge").await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    let huge =
        |id: &str, letter: &str| doc! {"_id": id, "big": letter.repeat((16 << 20) - 300), "n": 0};
    here.insert_one(huge("l", "a")).await.unwrap();
    there.insert_one(huge("r", "b")).await.unwrap();
    converged_without_conflict(&world, &daemon).await;
    // WHEN a small field changes, and all of it
    let set = doc! {"$set": {"n": 1}};
    here.update_one(doc! {"_id": "r"}, set.clone())
        .await
        .unwrap();
    there.update_one(doc! {"_id": "l"}, set).await.unwrap();
    converged_without_conflict(&world, &daemon).await;
    here.replace_one(doc! {"_id": "l"}, huge("l", "c"))
        .await
        .unwrap();
    there
        .replace_one(doc! {"_id": "r"}, huge("r", "d"))
        .await
        .unwrap();
    // THEN both sides have it
    converged_without_conflict(&world, &daemon).await;
    assert_eq!(here.count_documents(doc! {}).await.unwrap(), 2);
}

/// A document of exactly the server's limit.
fn full(id: &str, letter: &str) -> Document {
    let with = |big: String| doc! {"_id": id, "big": big, "n": 0};
    let rest = with(String::new()).to_vec().unwrap().len();
    with(letter.repeat((16 << 20) - rest))
}

/// A world whose servers have room for many large documents at once.
async fn roomy(test: &str) -> World {
    let world = World::with_oplogs(test, 990).await;
    for db in [&world.local, &world.remote] {
        let cache = doc! {"setParameter": 1, "wiredTigerEngineRuntimeConfig": "cache_size=1G"};
        let admin = db.client().database("admin");
        admin.run_command(cache).await.unwrap();
    }
    world
}

#[tokio::test]
async fn r14_documents_without_room_for_the_sync_fields_arrive_without_them() {
    // GIVEN documents of exactly 16 MiB among small ones, and large ones, all queued at once
    let world = roomy("full").await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    let large = |id: &str| doc! {"_id": id, "a": "a".repeat(6 << 20)};
    here.insert_many([large("m"), doc! {"_id": "grows", "n": 0}])
        .await
        .unwrap();
    converged_without_conflict(&world, &daemon).await;
    daemon.post("/api/sync/pause", json!({})).await.unwrap();
    let small = |from: &str| {
        let docs = (0..50).map(|i| doc! {"_id": format!("{from}{i}"), "pad": "x".repeat(2000)});
        docs.collect::<Vec<_>>()
    };
    here.insert_many(small("l")).await.unwrap();
    for one in [full("l", "a"), large("l large"), large("l large too")] {
        here.insert_one(one).await.unwrap();
    }
    there.insert_one(full("r", "b")).await.unwrap();
    there.insert_many(small("r")).await.unwrap();
    // WHEN they are carried over THEN they are there byte for byte, and only those have no sync fields
    daemon.post("/api/sync/resume", json!({})).await.unwrap();
    converged_without_conflict(&world, &daemon).await;
    let stamped = async |c: &Docs, id: &str| {
        let found = c.find_one(doc! {"_id": id}).await.unwrap().unwrap();
        found.contains_key("syncStatus")
    };
    assert!(!stamped(&there, "l").await && !stamped(&here, "r").await);
    assert!(stamped(&there, "l49").await && stamped(&there, "l large too").await);
    // WHEN one is edited, one shrinks, and one that had sync fields fills up
    let set = doc! {"$set": {"n": 1}};
    there.update_one(doc! {"_id": "l"}, set).await.unwrap();
    let shrink = doc! {"$set": {"big": "small"}};
    here.update_one(doc! {"_id": "r"}, shrink).await.unwrap();
    here.replace_one(doc! {"_id": "grows"}, full("grows", "g"))
        .await
        .unwrap();
    // THEN that arrives
    converged_without_conflict(&world, &daemon).await;
    assert!(stamped(&there, "r").await && !stamped(&there, "grows").await);
    // WHEN both sides add to a document what has room on each, but not together
    cut(&world, &daemon).await;
    for (c, name) in [(&here, "b"), (&there, "c")] {
        let add = doc! {"$set": {name: name.repeat(6 << 20)}};
        c.update_one(doc! {"_id": "m"}, add).await.unwrap();
    }
    heal(&world, &daemon).await;
    // THEN it is set aside with the reason, and others go on
    let conflict = the_conflict(&world, &daemon).await;
    assert_eq!(conflict.get_str("kind").unwrap(), "rejected");
    let notes = conflict.get_str("notes").unwrap();
    assert!(
        notes.contains("refuses the document") && notes.contains("16MB"),
        "{notes}"
    );
    here.insert_one(doc! {"_id": "after"}).await.unwrap();
    wait_content(&there, "after", doc! {"_id": "after"}).await;
    // AND it goes on when there is room again
    let room = doc! {"$unset": {"a": 1}};
    here.update_one(doc! {"_id": "m"}, room).await.unwrap();
    world.wait_converged_within(PATIENT, &daemon).await;
    daemon.wait_status("unresolvedConflicts", |n| *n == 0).await;
}

#[tokio::test]
async fn r19_a_conflict_of_large_values_is_put_on_record_and_stops_no_other() {
    // GIVEN a large field that both sides change
    let world = World::new("large_clash").await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1, "v": 0}).await.unwrap();
    world.wait_converged(&daemon).await;
    cut(&world, &daemon).await;
    for (c, letter) in [(&here, "a"), (&there, "b")] {
        let set = doc! {"$set": {"v": letter.repeat(7 << 20)}};
        c.update_one(doc! {"_id": 1}, set).await.unwrap();
    }
    heal(&world, &daemon).await;
    // THEN it is on record with both documents, and so is the next one
    let conflict = the_conflict(&world, &daemon).await;
    for (name, letter) in [("localDocument", "a"), ("remoteDocument", "b")] {
        let v = body(&conflict, name).unwrap();
        assert!(v.get_str("v").unwrap() == letter.repeat(7 << 20), "{name}");
    }
    assert!(
        conflict
            .get_str("localValue")
            .unwrap()
            .contains("too large")
    );
    let listed = daemon.get("/api/sync/conflicts").await.unwrap();
    assert_eq!(listed.status, 200, "{}", listed.body);
}
