//! What the tests by rule have in common: documents of one side, waiting on their state, conflicts.

use std::time::Duration;

use futures::TryStreamExt;
use mongodb::bson::{Bson, Document, RawDocumentBuf, doc};
use mongodb::{Client, Collection, Database, IndexModel};
use sangam::mongod::{MongoServer, ServerOptions};
use serde_json::Value;

use super::{Daemon, SOON, World, wait_until, yet};

/// A collection of documents.
pub type Docs = Collection<Document>;

/// Longer than a lost answer may still matter (R4), with all that follows.
pub const PATIENT: Duration = Duration::from_secs(60);

/// A collection on the local side and on the remote.
pub fn both(world: &World, coll: &str) -> (Docs, Docs) {
    (world.local.collection(coll), world.remote.collection(coll))
}

/// A document without its sync fields.
pub async fn content(c: &Docs, id: impl Into<Bson>) -> Result<Option<Document>, String> {
    let found = yet(c.find_one(doc! {"_id": id.into()}).await)?;
    Ok(found.map(|mut d| {
        for field in ["syncedAt", "origin", "syncStatus"] {
            d.remove(field);
        }
        d
    }))
}

/// Waits until the content of a document is this one; `None`: until it is gone.
pub async fn wait_content(c: &Docs, id: impl Into<Bson>, wanted: impl Into<Option<Document>>) {
    let (id, wanted) = (id.into(), wanted.into());
    let what = format!("{}: {id} is {wanted:?}", c.namespace());
    wait_until(SOON, &what, async || {
        let found = content(c, id.clone()).await?;
        (found == wanted)
            .then_some(())
            .ok_or_else(|| format!("{found:?}"))
    })
    .await;
}

/// Waits until the document satisfies `check`, and returns it whole.
pub async fn wait_doc(
    c: &Docs,
    id: impl Into<Bson>,
    what: &str,
    check: impl Fn(&Document) -> bool,
) -> Document {
    let id = id.into();
    wait_until(SOON, what, async || {
        match yet(c.find_one(doc! {"_id": id.clone()}).await)? {
            Some(d) if check(&d) => Ok(d),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

/// Sets fields of one document, which must be there.
pub async fn set(c: &Docs, id: impl Into<Bson>, fields: Document) {
    let update = c.update_one(doc! {"_id": id.into()}, doc! {"$set": fields});
    assert_eq!(update.await.expect("an update").matched_count, 1);
}

/// Everything written so far on either side has been seen and dealt with; all records are written.
pub async fn dealt_with(daemon: &Daemon) {
    let body = || serde_json::json!({});
    wait_until(SOON, "a sync run to its end", async || {
        let answer = daemon.post("/api/sync/sync", body()).await?;
        match answer.status {
            200 => Ok(()),
            status => Err(format!("{status}: {}", answer.body)),
        }
    })
    .await;
    // Listing the runs writes the records that are still on their way.
    let logs = daemon.get("/api/sync/logs").await.expect("the API answers");
    assert_eq!(logs.status, 200, "{}", logs.body);
}

/// Both sides are equal, nothing waits, and no conflict was ever recorded.
pub async fn converged_without_conflict(world: &World, daemon: &Daemon) {
    world.wait_converged_within(PATIENT, daemon).await;
    dealt_with(daemon).await;
    let conflicts = world.conflicts().await;
    assert!(conflicts.is_empty(), "a false conflict: {conflicts:#?}");
}

/// The conflicts on record once everything has been dealt with.
pub async fn conflicts_now(world: &World, daemon: &Daemon) -> Vec<Document> {
    dealt_with(daemon).await;
    world.conflicts().await
}

/// The only conflict on record once everything has been dealt with.
pub async fn the_conflict(world: &World, daemon: &Daemon) -> Document {
    let mut found = conflicts_now(world, daemon).await;
    assert_eq!(found.len(), 1, "one conflict: {found:#?}");
    found.remove(0)
}

/// Waits until no conflict is open any more, in status and on record.
pub async fn wait_closed(world: &World, daemon: &Daemon) {
    daemon.wait_status("unresolvedConflicts", |n| *n == 0).await;
    wait_until(SOON, "every conflict is resolved on record", async || {
        let open = world.conflicts().await;
        let open = open
            .iter()
            .filter(|c| !c.get_bool("resolved").unwrap_or(false));
        match open.count() {
            0 => Ok(()),
            n => Err(format!("{n} are open")),
        }
    })
    .await;
}

/// Whether a field is that text.
pub fn says(d: &Document, field: &str, text: &str) -> bool {
    d.get_str(field).is_ok_and(|found| found == text)
}

/// A body in a conflict's record, without sync fields.
pub fn body(conflict: &Document, name: &str) -> Option<Document> {
    let mut d = conflict.get_document(name).ok()?.clone();
    for field in ["syncedAt", "origin", "syncStatus"] {
        d.remove(field);
    }
    Some(d)
}

/// Cuts the link and waits until the daemon knows.
pub async fn cut(world: &World, daemon: &Daemon) {
    world.link.cut();
    daemon.wait_status("isOnline", |v| *v == false).await;
}

/// Heals the link and waits until the daemon knows.
pub async fn heal(world: &World, daemon: &Daemon) {
    world.link.heal();
    daemon.wait_status("isOnline", |v| *v == true).await;
}

/// Makes the same index on both sides.
pub async fn index(world: &World, coll: &str, index: IndexModel) {
    for db in [&world.local, &world.remote] {
        let c = db.collection::<Document>(coll);
        c.create_index(index.clone()).await.expect("the index");
    }
}

/// All documents of a collection as bytes, by `_id`.
pub async fn raw_docs(db: &Database, coll: &str) -> Vec<RawDocumentBuf> {
    let c = db.collection::<RawDocumentBuf>(coll);
    let cursor = c.find(doc! {}).sort(doc! {"_id": 1}).await;
    let all = cursor.expect("a cursor").try_collect().await;
    all.expect("documents")
}

/// The entries of `queue`.
pub async fn queue(daemon: &Daemon) -> Vec<Value> {
    let answer = daemon
        .get("/api/sync/queue")
        .await
        .expect("the API answers");
    answer.body["entries"]
        .as_array()
        .cloned()
        .unwrap_or_default()
}

/// So many documents of a collection, on both sides.
pub async fn fill(world: &World, daemon: &Daemon, coll: &str, many: i32) -> (Docs, Docs) {
    let (here, there) = both(world, coll);
    here.insert_many((0..many).map(|i| doc! {"_id": i, "v": 0}))
        .await
        .unwrap();
    world.wait_converged_within(PATIENT, daemon).await;
    (here, there)
}

/// Compares everything now.
pub async fn wait_reconciled(daemon: &Daemon) {
    wait_until(PATIENT, "a reconcile", async || {
        let answer = daemon
            .post("/api/sync/reconcile", serde_json::json!({}))
            .await?;
        (answer.status == 200)
            .then_some(())
            .ok_or_else(|| answer.body.to_string())
    })
    .await;
}

/// A replica set of three servers, of which one becomes the primary, and a client of it.
pub async fn three(world: &World, arguments: &[&str]) -> (Vec<MongoServer>, Client) {
    let mut nodes = Vec::new();
    for i in 0..3 {
        let options = ServerOptions {
            set_name: Some("rs_three".into()),
            initiate: false,
            extra_args: arguments.iter().map(|a| String::from(*a)).collect(),
            ..ServerOptions::default()
        };
        let dir = world.dir().join(format!("three-{i}"));
        nodes.push(MongoServer::start_with(&dir, options).await.unwrap());
    }
    let member = |(i, node): (usize, &MongoServer)| doc! {"_id": i as i32, "host": node.address()};
    let members: Vec<Document> = nodes.iter().enumerate().map(member).collect();
    let config = doc! {"_id": "rs_three", "members": members,
    "settings": {"electionTimeoutMillis": 2000, "heartbeatIntervalMillis": 500}};
    let admin = nodes[0].client().await.unwrap().database("admin");
    admin
        .run_command(doc! {"replSetInitiate": config})
        .await
        .unwrap();
    let hosts: Vec<String> = nodes.iter().map(MongoServer::address).collect();
    let uri = format!("mongodb://{}/?replicaSet=rs_three", hosts.join(","));
    (nodes, Client::with_uri_str(uri).await.unwrap())
}
