//! Indexes and options: what one side has comes to exist on the other, and the rest is reported.

use crate::common::kit::{cut, heal};
use crate::common::{Daemon, World, wait_until};
use futures::TryStreamExt;
use mongodb::Database;
use mongodb::bson::{Bson, DateTime, Document, doc};
use serde_json::{Value, json};

/// Specs of the indexes of a collection by name, without what servers add.
async fn indexes(db: &Database, coll: &str) -> Vec<Document> {
    let command = doc! {"listIndexes": coll};
    let Ok(cursor) = db.run_cursor_command(command).await else {
        return vec![];
    };
    let mut all: Vec<Document> = cursor.try_collect().await.unwrap();
    all.sort_by_key(|i| i.get_str("name").unwrap().to_owned());
    all
}

async fn names(db: &Database, coll: &str) -> Vec<String> {
    let all = indexes(db, coll).await;
    all.iter()
        .map(|i| i.get_str("name").unwrap().into())
        .collect()
}

async fn make(db: &Database, coll: &str, index: Document) {
    let command = doc! {"createIndexes": coll, "indexes": [index]};
    db.run_command(command).await.unwrap();
}

async fn wait_equal(world: &World, coll: &str, count: usize) {
    wait_until(
        crate::common::SOON,
        "the same indexes on both sides",
        async || {
            let (here, there) = (
                indexes(&world.local, coll).await,
                indexes(&world.remote, coll).await,
            );
            (here == there && here.len() == count)
                .then_some(())
                .ok_or_else(|| format!("{here:#?}\n{there:#?}"))
        },
    )
    .await;
}

/// What `sangam schema` finds now.
async fn look(daemon: &Daemon, create: bool) -> Vec<Value> {
    let answer = daemon
        .post("/api/sync/schema", json!({"create": create}))
        .await
        .unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.body["findings"].as_array().unwrap().clone()
}

async fn wait_finding(daemon: &Daemon, kind: &str) -> Value {
    wait_until(crate::common::SOON, kind, async || {
        let answer = daemon.get("/api/sync/schema").await?;
        let all = answer.body["findings"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let found = all.iter().find(|f| f["kind"] == kind);
        found.cloned().ok_or_else(|| format!("{}", answer.body))
    })
    .await
}

fn kinds() -> Vec<Document> {
    vec![
        doc! {"key": {"a": 1, "b": -1}, "name": "compound"},
        doc! {"key": {"u": 1}, "name": "unique", "unique": true},
        doc! {"key": {"s": 1}, "name": "sparse", "sparse": true},
        doc! {"key": {"p": 1}, "name": "partial", "unique": true,
        "partialFilterExpression": {"p": {"$gt": 5}, "q": {"$exists": true}}},
        doc! {"key": {"at": 1}, "name": "ttl", "expireAfterSeconds": 864_000},
        doc! {"key": {"c": 1}, "name": "collated", "collation": {"locale": "de", "strength": 2}},
        doc! {"key": {"t": "text", "x": "text", "z": 1}, "name": "text", "weights": {"t": 5},
        "default_language": "german"},
        doc! {"key": {"g": "2dsphere"}, "name": "sphere"},
        doc! {"key": {"f": "2d"}, "name": "flat", "min": -10, "max": 10, "bits": 20},
        doc! {"key": {"$**": 1}, "name": "wild", "wildcardProjection": {"w.x": 1}},
        doc! {"key": {"h": "hashed"}, "name": "hashed"},
        doc! {"key": {"i": 1}, "name": "hidden", "hidden": true},
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn indexes_of_all_kinds_come_to_exist_on_the_other_side() {
    // GIVEN indexes of every kind on either side, before the daemon has ever run, one of a collection
    // with documents
    let world = World::new("kinds").await;
    let kinds = kinds();
    for (i, index) in kinds.iter().enumerate() {
        let db = if i % 2 == 0 {
            &world.local
        } else {
            &world.remote
        };
        make(db, "c", index.clone()).await;
    }
    let full = world.local.collection::<Document>("full");
    full.insert_many((0..50).map(|n| doc! {"_id": n, "n": n}))
        .await
        .unwrap();
    make(
        &world.local,
        "full",
        doc! {"key": {"n": 1}, "name": "n", "unique": true},
    )
    .await;
    let mut daemon = world.start().await;
    // THEN both sides get all of them
    wait_equal(&world, "c", kinds.len() + 1).await;
    wait_equal(&world, "full", 2).await;
    world.wait_converged(&daemon).await;
    // WHEN one is made while the daemon runs, and others on both sides while the link is cut
    make(
        &world.local,
        "full",
        doc! {"key": {"later": 1}, "name": "later"},
    )
    .await;
    wait_equal(&world, "full", 3).await;
    cut(&world, &daemon).await;
    make(&world.local, "full", doc! {"key": {"l": 1}, "name": "l"}).await;
    make(&world.remote, "full", doc! {"key": {"r": 1}, "name": "r"}).await;
    heal(&world, &daemon).await;
    // THEN they follow, and nothing is left to be said
    wait_equal(&world, "full", 5).await;
    assert_eq!(look(&daemon, false).await, [] as [Value; 0]);
    // WHEN one is dropped on one side while the daemon is away THEN the other keeps it, and it is said
    daemon.terminate().await;
    world
        .remote
        .run_command(doc! {"dropIndexes": "full", "index": "later"})
        .await
        .unwrap();
    daemon.restart().await;
    let found = wait_finding(&daemon, "dropped").await;
    assert_eq!(
        (&found["index"], &found["side"]),
        (&json!("later"), &json!("remote"))
    );
    let status = daemon
        .wait_status("notices", |n| n.to_string().contains("full.later"))
        .await;
    assert!(status.to_string().contains("sangam schema"), "{status}");
    assert!(names(&world.local, "full").await.contains(&"later".into()));
    // AND --create makes it again
    let output = daemon.settings.cli(&["schema", "--create"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}{said}");
    wait_equal(&world, "full", 5).await;
    // WHEN it is dropped on both sides THEN it is gone
    for db in [&world.local, &world.remote] {
        db.run_command(doc! {"dropIndexes": "full", "index": "later"})
            .await
            .unwrap();
    }
    assert_eq!(look(&daemon, false).await, [] as [Value; 0]);
    assert_eq!(names(&world.local, "full").await.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_made_is_reported_and_lasts() {
    // GIVEN clashing definitions, and a unique index over values that clash on the other side
    let world = World::new("clash").await;
    make(&world.local, "c", doc! {"key": {"a": 1}, "name": "x"}).await;
    make(&world.remote, "c", doc! {"key": {"b": 1}, "name": "x"}).await;
    make(&world.local, "c", doc! {"key": {"k": 1}, "name": "k_1"}).await;
    make(
        &world.remote,
        "c",
        doc! {"key": {"k": 1}, "name": "k_ttl", "expireAfterSeconds": 9},
    )
    .await;
    let twice = world.remote.collection::<Document>("twice");
    twice
        .insert_many((0..3).map(|n| doc! {"_id": n, "v": "same"}))
        .await
        .unwrap();
    let mut daemon = world.start().await;
    world.wait_converged(&daemon).await;
    world
        .local
        .run_command(doc! {"delete": "twice", "deletes": [{"q": {}, "limit": 0}]})
        .await
        .unwrap();
    daemon.post("/api/sync/pause", json!({})).await.unwrap();
    make(
        &world.local,
        "twice",
        doc! {"key": {"v": 1}, "name": "v", "unique": true},
    )
    .await;
    twice
        .insert_many((3..6).map(|n| doc! {"_id": n, "v": "same"}))
        .await
        .unwrap();
    daemon.post("/api/sync/resume", json!({})).await.unwrap();
    // THEN each is found
    look(&daemon, false).await;
    let refused = wait_finding(&daemon, "refused").await;
    assert_eq!(
        (&refused["index"], &refused["side"]),
        (&json!("v"), &json!("remote"))
    );
    assert!(
        refused["detail"].as_str().unwrap().contains("same value"),
        "{refused}"
    );
    let found = look(&daemon, false).await;
    let differ: Vec<_> = found.iter().filter(|f| f["kind"] == "differs").collect();
    assert_eq!(differ.len(), 2, "{found:#?}");
    assert_eq!(names(&world.local, "c").await, ["_id_", "k_1", "x"]);
    assert_eq!(names(&world.remote, "c").await, ["_id_", "k_ttl", "x"]);
    // AND told after a restart, even without the remote; the command exits 3
    world.link.cut();
    daemon.restart().await;
    let answer = daemon.get("/api/sync/schema").await.unwrap();
    assert_eq!(
        answer.body["findings"].as_array().unwrap().len(),
        3,
        "{}",
        answer.body
    );
    heal(&world, &daemon).await;
    let output = daemon.settings.cli(&["schema"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{said}");
    // WHEN the documents are put right THEN --create makes it
    twice.delete_many(doc! {}).await.unwrap();
    look(&daemon, true).await;
    wait_until(crate::common::SOON, "the unique index", async || {
        let names = names(&world.remote, "twice").await;
        names
            .contains(&"v".into())
            .then_some(())
            .ok_or("not there".into())
    })
    .await;
}

#[tokio::test]
async fn report_makes_nothing_and_full_makes_options_too() {
    // GIVEN report
    let world = World::new("modes").await;
    make(&world.local, "c", doc! {"key": {"a": 1}, "name": "a"}).await;
    let mut daemon = world
        .start_with(world.settings().set("schema.sync", "\"report\""))
        .await;
    let found = wait_finding(&daemon, "missing").await;
    assert_eq!(
        (&found["index"], &found["canCreate"]),
        (&json!("a"), &json!(true))
    );
    world.wait_converged(&daemon).await;
    assert_eq!(names(&world.remote, "c").await, [] as [&str; 0]);
    // WHEN it becomes full, with a validator, a capped collection and a collation
    let valid = doc! {"create": "valid", "validator": {"n": {"$type": "number"}}, "validationAction": "warn"};
    world.local.run_command(valid).await.unwrap();
    world
        .remote
        .run_command(doc! {"create": "capped", "capped": true, "size": 4096, "max": 3})
        .await
        .unwrap();
    world
        .local
        .run_command(doc! {"create": "german", "collation": {"locale": "de"}})
        .await
        .unwrap();
    daemon.settings = daemon.settings.clone().set("schema.sync", "\"full\"");
    daemon.restart().await;
    // THEN all is the same on both sides
    wait_equal(&world, "c", 2).await;
    let same = async |coll: &str, check: &dyn Fn(&Document) -> bool| {
        wait_until(crate::common::SOON, coll, async || {
            let mut both = vec![];
            for db in [&world.local, &world.remote] {
                let found = db
                    .list_collections()
                    .filter(doc! {"name": coll})
                    .await
                    .unwrap();
                let found: Vec<_> = found.try_collect().await.unwrap();
                both.push(
                    found
                        .first()
                        .map(|c| mongodb::bson::serialize_to_document(&c.options).unwrap()),
                );
            }
            let good = both[0] == both[1] && both[0].as_ref().is_some_and(check);
            good.then_some(()).ok_or_else(|| format!("{both:#?}"))
        })
        .await;
    };
    same("valid", &|o| {
        o.get("validationAction") == Some(&"warn".into())
    })
    .await;
    same("capped", &|o| {
        o.get("max") == Some(&Bson::Int64(3)) || o.get("max") == Some(&Bson::Int32(3))
    })
    .await;
    same("german", &|o| {
        o.get_document("collation").unwrap().get("locale") == Some(&"de".into())
    })
    .await;
    assert_eq!(look(&daemon, false).await, [] as [Value; 0]);
    // WHEN options change on one side THEN the other follows
    let change =
        doc! {"collMod": "valid", "validator": {"n": {"$gt": 0}}, "validationAction": "error"};
    world.remote.run_command(change).await.unwrap();
    same("valid", &|o| o.to_string().contains("$gt")).await;
    let hide = doc! {"collMod": "c", "index": {"name": "a", "hidden": true}};
    world.local.run_command(hide).await.unwrap();
    wait_until(crate::common::SOON, "hidden on both sides", async || {
        let there = indexes(&world.remote, "c").await;
        let hidden = there.iter().any(|i| i.get("hidden") == Some(&true.into()));
        hidden.then_some(()).ok_or_else(|| format!("{there:?}"))
    })
    .await;
    // WHEN both change it differently THEN that is said
    cut(&world, &daemon).await;
    for (db, n) in [(&world.local, 1), (&world.remote, 2)] {
        db.run_command(doc! {"collMod": "valid", "validator": {"n": n}})
            .await
            .unwrap();
    }
    heal(&world, &daemon).await;
    let found = wait_finding(&daemon, "options").await;
    assert!(
        found["detail"].as_str().unwrap().contains("validator"),
        "{found}"
    );
}

#[tokio::test]
async fn an_index_that_would_delete_documents_at_once_is_held() {
    // GIVEN documents on the remote that would be due
    let world = World::new("would_expire").await;
    let old = world.remote.collection::<Document>("old");
    let date = DateTime::from_millis(DateTime::now().timestamp_millis() - 7_200_000);
    old.insert_many((0..3).map(|n| doc! {"_id": n, "at": date}))
        .await
        .unwrap();
    let ttl = doc! {"key": {"at": 1}, "name": "ttl", "expireAfterSeconds": 3600};
    make(&world.local, "old", ttl).await;
    // WHEN the daemon sees the index THEN it is not made there without a person
    let daemon = world.start().await;
    let found = wait_finding(&daemon, "would_expire").await;
    assert_eq!(
        (&found["index"], &found["side"]),
        (&json!("ttl"), &json!("remote"))
    );
    assert_eq!(names(&world.remote, "old").await, ["_id_"]);
    // AND is made with one
    look(&daemon, true).await;
    wait_equal(&world, "old", 2).await;
}

#[tokio::test]
async fn an_index_that_the_pull_needs_is_asked_for() {
    // GIVEN a large collection on a remote that is not followed
    let world = World::new("pull_index").await;
    let c = world.remote.collection::<Document>("c");
    c.insert_many((0..1200).map(|n| doc! {"_id": n, "updatedAt": DateTime::now()}))
        .await
        .unwrap();
    let daemon = world
        .start_with(world.settings().set("pull.follow", "false"))
        .await;
    let found = wait_finding(&daemon, "no_pull_index").await;
    assert_eq!(found["index"], "updatedAt_1");
    world.wait_converged(&daemon).await;
    // WHEN it is created THEN nothing is left
    look(&daemon, true).await;
    wait_until(crate::common::SOON, "both indexes", async || {
        let names = names(&world.remote, "c").await;
        let there = names.len() == 3;
        there.then_some(()).ok_or_else(|| format!("{names:?}"))
    })
    .await;
    assert!(
        !look(&daemon, false)
            .await
            .iter()
            .any(|f| f["kind"] == "no_pull_index")
    );
}
