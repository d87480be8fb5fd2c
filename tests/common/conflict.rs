//! Conflicts made on purpose, and what is done with them.

use mongodb::IndexModel;
use mongodb::bson::{Bson, Document, doc, oid::ObjectId};
use mongodb::options::IndexOptions;
use serde_json::{Value, json};

use super::{Daemon, SOON, World, wait_until};

/// Writes on both sides while nothing moves, then lets the daemon find out.
pub async fn apart(daemon: &Daemon, writes: impl Future<Output = ()>) {
    assert_eq!(
        daemon
            .post("/api/sync/pause", json!({}))
            .await
            .unwrap()
            .status,
        200
    );
    writes.await;
    assert_eq!(
        daemon
            .post("/api/sync/resume", json!({}))
            .await
            .unwrap()
            .status,
        200
    );
}

/// Waits for so many open conflicts; the newest first.
pub async fn open(daemon: &Daemon, count: usize) -> Vec<Value> {
    wait_until(SOON, "open conflicts", async || {
        let answer = daemon.get("/api/sync/conflicts?resolved=false").await?;
        let found = answer.body.as_array().cloned().unwrap_or_default();
        if found.len() == count {
            return Ok(found);
        }
        Err(format!("{} open: {}", found.len(), answer.body))
    })
    .await
}

pub async fn resolve(daemon: &Daemon, conflict: &Value, body: Value) -> (u16, Value) {
    let id = conflict["_id"].as_str().unwrap();
    let answer = daemon
        .post(&format!("/api/sync/conflicts/{id}/resolve"), body)
        .await
        .unwrap();
    (answer.status, answer.body)
}

pub async fn resolved(daemon: &Daemon, conflict: &Value, body: Value) -> Value {
    let (status, body) = resolve(daemon, conflict, body).await;
    assert_eq!(status, 200, "{body}");
    body
}

pub async fn undo(daemon: &Daemon, conflict: &Value, body: Value) -> (u16, Value) {
    let id = conflict["_id"].as_str().unwrap();
    let answer = daemon
        .post(&format!("/api/sync/conflicts/{id}/undo"), body)
        .await
        .unwrap();
    (answer.status, answer.body)
}

pub async fn get(world: &World, side: &str, coll: &str, id: impl Into<Bson>) -> Option<Document> {
    let db = if side == "local" {
        &world.local
    } else {
        &world.remote
    };
    let found = db
        .collection::<Document>(coll)
        .find_one(doc! {"_id": id.into()})
        .await
        .unwrap();
    found.map(|mut d| {
        for name in ["syncedAt", "origin", "syncStatus"] {
            d.remove(name);
        }
        d
    })
}

pub async fn both(world: &World, coll: &str, id: impl Into<Bson>) -> Option<Document> {
    let id = id.into();
    let local = get(world, "local", coll, id.clone()).await;
    assert_eq!(local, get(world, "remote", coll, id).await);
    local
}

pub async fn set(db: &mongodb::Database, coll: &str, id: i32, fields: Document) {
    let coll = db.collection::<Document>(coll);
    let done = coll
        .update_one(doc! {"_id": id}, doc! {"$set": fields})
        .await
        .unwrap();
    assert_eq!(done.matched_count, 1);
}

/// One document changed on both sides in the field `n`, and each side in one more.
pub async fn modified(world: &World, daemon: &Daemon, id: i32) {
    let coll = world.local.collection::<Document>("stock");
    coll.insert_one(doc! {"_id": id, "n": 1, "a": 1, "b": 1})
        .await
        .unwrap();
    world.wait_converged(daemon).await;
    apart(daemon, async {
        set(&world.local, "stock", id, doc! {"n": 2, "a": 2}).await;
        set(&world.remote, "stock", id, doc! {"n": 3, "b": 3}).await;
    })
    .await;
}

pub async fn unique_usernames(world: &World) {
    for db in [&world.local, &world.remote] {
        let options = IndexOptions::builder().unique(true).build();
        let index = IndexModel::builder()
            .keys(doc! {"username": 1})
            .options(options)
            .build();
        db.collection::<Document>("admins")
            .create_index(index)
            .await
            .unwrap();
    }
}

/// The same username on both sides, under the `_id`s 1 (local) and 2 (remote).
pub async fn taken(world: &World, daemon: &Daemon) -> Value {
    unique_usernames(world).await;
    world.wait_converged(daemon).await;
    apart(daemon, async {
        let (local, remote) = (
            world.local.collection("admins"),
            world.remote.collection("admins"),
        );
        local
            .insert_one(doc! {"_id": 1, "username": "john", "phone": 1})
            .await
            .unwrap();
        remote
            .insert_one(doc! {"_id": 2, "username": "john", "mail": 2})
            .await
            .unwrap();
    })
    .await;
    open(daemon, 1).await.remove(0)
}

pub async fn record(world: &World, conflict: &Value) -> Document {
    let id = ObjectId::parse_str(conflict["_id"].as_str().unwrap()).unwrap();
    let logs = world.local.collection::<Document>("conflict_logs");
    wait_until(SOON, "the record is written", async || {
        let found = logs.find_one(doc! {"_id": id}).await.unwrap().unwrap();
        if found.get_bool("resolved").unwrap() {
            return Ok(found);
        }
        Err(format!("{found}"))
    })
    .await
}

pub fn with(body: &Value, name: &str, value: impl Into<Value>) -> Value {
    let mut body = body.clone();
    body[name] = value.into();
    body
}

pub async fn both_versions(world: &World, id: i32) -> [Option<Document>; 2] {
    [
        get(world, "local", "stock", id).await,
        get(world, "remote", "stock", id).await,
    ]
}
