//! A local transaction reaches the remote as one, where it can.

use std::collections::{HashMap, HashSet};

use crate::common::kit::{
    content, converged_without_conflict, cut, dealt_with, heal, wait_content,
};
use crate::common::{World, wait_until};
use mongodb::bson::{Bson, Document, doc};
use mongodb::change_stream::ChangeStream;
use serde_json::json;

/// Events of the remote with the transaction they were part of, if any.
async fn watch(world: &World) -> ChangeStream<Document> {
    let slim = doc! {"$project": {"operationType": 1, "ns": 1, "documentKey": 1, "lsid": 1, "txnNumber": 1}};
    let stream = world.remote.watch().pipeline(vec![slim]).await.unwrap();
    stream.with_type()
}

/// Reads until each of these documents was written; the transactions that wrote them, by document.
async fn transactions(
    stream: &mut ChangeStream<Document>,
    ids: &[&str],
) -> HashMap<String, HashSet<String>> {
    let mut found: HashMap<String, HashSet<String>> = HashMap::new();
    wait_until(
        crate::common::SOON,
        "the events of the remote",
        async || {
            while let Some(event) = crate::common::yet(stream.next_if_any().await)? {
                let Ok(key) = event.get_document("documentKey") else {
                    continue;
                };
                let Ok(id) = key.get_str("_id") else { continue };
                let number = event
                    .get("txnNumber")
                    .map(|n| format!("{n} of {}", event.get_document("lsid").unwrap()));
                found.entry(id.into()).or_default().extend(number);
            }
            ids.iter()
                .all(|id| found.contains_key(*id))
                .then_some(())
                .ok_or_else(|| format!("{found:?}"))
        },
    )
    .await;
    found
}

/// All of them were written by one transaction.
fn are_one(found: &HashMap<String, HashSet<String>>, ids: &[&str]) {
    let first = &found[ids[0]];
    assert_eq!(first.len(), 1, "{found:?}");
    for id in ids {
        assert_eq!(&found[*id], first, "{id}: {found:?}");
    }
}

/// Carries out writes in one local transaction: collection, `_id`, new fields or deletion.
async fn transact(world: &World, writes: &[(&str, &str, Option<Document>)]) {
    let client = world.local.client();
    let mut session = client.start_session().await.unwrap();
    session.start_transaction().await.unwrap();
    for (coll, id, fields) in writes {
        let c = world.local.collection::<Document>(coll);
        match fields {
            Some(fields) => {
                let update = c.update_one(doc! {"_id": *id}, doc! {"$set": fields.clone()});
                update.upsert(true).session(&mut session).await.unwrap();
            }
            None => {
                c.delete_one(doc! {"_id": *id})
                    .session(&mut session)
                    .await
                    .unwrap();
            }
        }
    }
    session.commit_transaction().await.unwrap();
}

#[tokio::test]
async fn a_transaction_arrives_as_one() {
    // GIVEN accounts on both sides, and a transaction over two collections among ordinary writes,
    // while the link is cut
    let world = World::new("one").await;
    let daemon = world.start().await;
    let accounts = world.local.collection::<Document>("accounts");
    let start =
        ["a", "b", "gone"].map(|id| doc! {"_id": id, "balance": 100, "note": "x".repeat(200)});
    accounts.insert_many(start).await.unwrap();
    converged_without_conflict(&world, &daemon).await;
    cut(&world, &daemon).await;
    let mut stream = watch(&world).await;
    let crowd = |from: i32| (from..from + 300).map(|n| doc! {"_id": format!("n{n}")});
    accounts.insert_many(crowd(0)).await.unwrap();
    let all = ["a", "b", "gone", "made"];
    transact(
        &world,
        &[
            ("accounts", "a", Some(doc! {"balance": 70})),
            ("accounts", "b", Some(doc! {"balance": 130})),
            ("accounts", "gone", None),
            ("journal", "made", Some(doc! {"amount": 30})),
        ],
    )
    .await;
    accounts.insert_many(crowd(300)).await.unwrap();
    // AND one of its documents changed again afterwards, and one on the remote meanwhile
    let again = doc! {"$set": {"balance": 140}};
    accounts.update_one(doc! {"_id": "b"}, again).await.unwrap();
    let there = world.remote.collection::<Document>("accounts");
    there
        .update_one(doc! {"_id": "a"}, doc! {"$set": {"seen": true}})
        .await
        .unwrap();
    transactions(&mut stream, &["a"]).await;
    // WHEN the link is back THEN one remote transaction wrote them all, of each the newest state
    heal(&world, &daemon).await;
    let mut found = transactions(&mut stream, &all).await;
    found.get_mut("a").unwrap().remove("");
    are_one(&found, &all);
    converged_without_conflict(&world, &daemon).await;
    let b = content(&there, "b").await.unwrap().unwrap();
    assert_eq!(b.get("balance"), Some(&Bson::Int32(140)));
    assert_eq!(there.count_documents(doc! {}).await.unwrap(), 602);
    assert!(found["n7"].is_empty(), "ordinary writes are no transaction");
    // WHEN two transactions share a document, both before either went THEN they go as one
    daemon.post("/api/sync/pause", json!({})).await.unwrap();
    transact(
        &world,
        &[
            ("accounts", "x", Some(doc! {"v": 1})),
            ("accounts", "shared", Some(doc! {"v": 1})),
        ],
    )
    .await;
    transact(
        &world,
        &[
            ("accounts", "shared", Some(doc! {"v": 2})),
            ("journal", "y", Some(doc! {"v": 2})),
        ],
    )
    .await;
    let all = ["x", "shared", "y"];
    crate::common::wait_for("both transactions wait", async || {
        let waiting = crate::common::kit::queue(&daemon).await;
        let waits = |id: &&str| waiting.iter().any(|entry| entry["id"] == **id);
        all.iter().all(waits)
    })
    .await;
    daemon.post("/api/sync/resume", json!({})).await.unwrap();
    are_one(&transactions(&mut stream, &all).await, &all);
    converged_without_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn a_document_that_is_refused_does_not_hold_back_its_transaction() {
    // GIVEN a remote whose validator will refuse one document, and a unique value that is taken there
    let world = World::new("refused").await;
    let create = doc! {"create": "c", "validator": {"n": {"$not": {"$gt": 9}}}};
    world.remote.run_command(create).await.unwrap();
    let daemon = world
        .start_with(world.settings().set("sync.max_retries", "1"))
        .await;
    // WHEN a transaction writes it with others
    transact(
        &world,
        &[
            ("c", "good", Some(doc! {"n": 1})),
            ("c", "bad", Some(doc! {"n": 10})),
            ("d", "other", Some(doc! {"n": 10})),
        ],
    )
    .await;
    // THEN the others arrive, and it is parked with its reason
    let (c, d) = (world.remote.collection("c"), world.remote.collection("d"));
    wait_content(&c, "good", doc! {"_id": "good", "n": 1}).await;
    wait_content(&d, "other", doc! {"_id": "other", "n": 10}).await;
    daemon.wait_status("failedDocuments", |n| *n == 1).await;
    assert_eq!(content(&c, "bad").await.unwrap(), None);
    // WHEN it is put right THEN it follows
    let put_right = doc! {"$set": {"n": 2}};
    world
        .local
        .collection::<Document>("c")
        .update_one(doc! {"_id": "bad"}, put_right)
        .await
        .unwrap();
    wait_content(&c, "bad", doc! {"_id": "bad", "n": 2}).await;
    dealt_with(&daemon).await;
}

#[tokio::test]
async fn r3_a_transaction_whose_answer_was_lost_is_not_sent_twice() {
    // GIVEN a daemon that dies after a remote transaction, before it knows
    let world = World::new("crash").await;
    let mut daemon = world.start().await;
    daemon.post("/api/sync/pause", json!({})).await.unwrap();
    transact(
        &world,
        &[
            ("c", "a", Some(doc! {"v": 1})),
            ("d", "b", Some(doc! {"v": 1})),
        ],
    )
    .await;
    daemon.settings = daemon
        .settings
        .clone()
        .env("SANGAM_FAILPOINT", "after_write_before_ack:1.0");
    daemon.restart().await;
    daemon.post("/api/sync/resume", json!({})).await.unwrap();
    daemon.wait_exit().await;
    // WHEN the documents are changed on both sides before it is back
    let (c, d) = (
        world.local.collection::<Document>("c"),
        world.remote.collection::<Document>("d"),
    );
    c.update_one(doc! {"_id": "a"}, doc! {"$set": {"v": 2}})
        .await
        .unwrap();
    d.update_one(doc! {"_id": "b"}, doc! {"$set": {"w": 3}})
        .await
        .unwrap();
    daemon.settings = daemon.settings.clone().env("SANGAM_FAILPOINT", "");
    daemon.restart().await;
    // THEN nothing is taken for a conflict
    converged_without_conflict(&world, &daemon).await;
    wait_content(
        &world.local.collection("d"),
        "b",
        doc! {"_id": "b", "v": 1, "w": 3},
    )
    .await;
}
