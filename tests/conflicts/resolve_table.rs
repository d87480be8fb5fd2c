//! Every strategy on every kind of conflict between documents or about a whole collection, cell by cell;
//! and resolutions under a daemon that is killed from outside.

use crate::common::conflict::*;
use crate::common::{Daemon, SOON, World, wait_until};
use mongodb::bson::{Document, doc};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

/// What a cell comes to.
enum Comes {
    /// This status and these words; nothing is written.
    No(u16, &'static str),
    /// The document on both sides afterwards; `None`: it is gone from both.
    To(Option<Document>),
    /// So many documents in the collection on both sides.
    Count(u64),
}
use Comes::{Count, No, To};

/// Makes a conflict of a kind around the number `id`; its collection, and the `_id` it is about.
async fn make(world: &World, daemon: &Daemon, kind: &str, id: i32) -> (String, Value) {
    let name = |text: &str| text.to_owned();
    let coll = match kind {
        "both_modified" => {
            modified(world, daemon, id).await;
            name("stock")
        }
        "insert_insert" => {
            apart(daemon, async {
                for (db, v) in [(&world.local, 1), (&world.remote, 2)] {
                    let one = doc! {"_id": id, "v": v};
                    db.collection("c").insert_one(one).await.unwrap();
                }
            })
            .await;
            name("c")
        }
        "unique_field" => {
            apart(daemon, async {
                let username = format!("user{id}");
                for (db, id, own) in [(&world.local, id, "l"), (&world.remote, 1000 + id, "r")] {
                    let one = doc! {"_id": id, "username": &username, own: 1};
                    db.collection("admins").insert_one(one).await.unwrap();
                }
            })
            .await;
            name("admins")
        }
        "rejected" => {
            let one = doc! {"_id": id, "n": 50};
            world.local.collection("v").insert_one(one).await.unwrap();
            name("v")
        }
        "collection_dropped" => {
            let coll = format!("gone{id}");
            let docs = (0..3).map(|i| doc! {"_id": i});
            let gone = world.local.collection::<Document>(&coll);
            gone.insert_many(docs).await.unwrap();
            world.remote_has(&coll, 3).await;
            gone.drop().await.unwrap();
            coll
        }
        other => unreachable!("{other}"),
    };
    let conflict = wait_until(SOON, "the conflict", async || {
        let query = format!("/api/sync/conflicts?resolved=false&collection={coll}");
        let found = daemon.get(&query).await?.body;
        found.get(0).cloned().ok_or_else(|| found.to_string())
    })
    .await;
    assert_eq!(conflict["kind"], kind);
    (coll, conflict)
}

impl World {
    async fn remote_has(&self, coll: &str, count: u64) {
        wait_until(SOON, "the remote has them", async || {
            let remote = self.remote.collection::<Document>(coll);
            let found = remote.count_documents(doc! {}).await.unwrap();
            (found == count).then_some(()).ok_or(format!("{found}"))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_strategy_on_each_kind() {
    let world = World::new("each_cell").await;
    let settings = world.settings().set("sync.max_retries", "0");
    let settings = settings.set("sync.mass_delete_percent", "0");
    let daemon = world.start_with(settings).await;
    unique_usernames(&world).await;
    let refusing = world.remote.create_collection("v");
    refusing.validator(doc! {"n": {"$lt": 10}}).await.unwrap();
    world.wait_converged(&daemon).await;

    let stock =
        |n: i32, a: i32, b: i32| move |id: i32| To(Some(doc! {"_id": id, "n": n, "a": a, "b": b}));
    let v = |v: i32| move |id: i32| To(Some(doc! {"_id": id, "v": v}));
    let no = |status: u16, words: &'static str| move |_: i32| No(status, words);
    let renamed = |id: i32| To(Some(doc! {"_id": id, "username": "new", "l": 1}));
    type Cell<'a> = (&'a str, &'a str, Option<Value>, Box<dyn Fn(i32) -> Comes>);
    let cell =
        |kind, strategy, value: Option<Value>, comes: Box<dyn Fn(i32) -> Comes>| -> Cell<'_> {
            (kind, strategy, value, comes)
        };
    let new = || Some(json!("new"));
    let table: Vec<Cell<'_>> = vec![
        cell(
            "both_modified",
            "rename_local",
            new(),
            Box::new(no(400, "for a unique value")),
        ),
        cell(
            "both_modified",
            "keep_local",
            new(),
            Box::new(no(400, "takes no value")),
        ),
        cell(
            "both_modified",
            "keep_remote",
            new(),
            Box::new(no(400, "takes no value")),
        ),
        cell(
            "both_modified",
            "merge",
            new(),
            Box::new(no(400, "whole number")),
        ),
        cell(
            "both_modified",
            "keep_local",
            None,
            Box::new(stock(2, 2, 1)),
        ),
        cell(
            "both_modified",
            "keep_remote",
            None,
            Box::new(stock(3, 1, 3)),
        ),
        cell("both_modified", "merge", None, Box::new(stock(2, 2, 3))),
        cell(
            "both_modified",
            "merge",
            Some(json!(7)),
            Box::new(stock(7, 2, 3)),
        ),
        cell(
            "insert_insert",
            "rename_local",
            new(),
            Box::new(no(400, "for a unique value")),
        ),
        cell(
            "insert_insert",
            "keep_local",
            Some(json!(5)),
            Box::new(no(400, "takes no value")),
        ),
        cell("insert_insert", "keep_local", None, Box::new(v(1))),
        cell("insert_insert", "keep_remote", None, Box::new(v(2))),
        cell("insert_insert", "merge", None, Box::new(v(1))),
        cell("insert_insert", "merge", Some(json!(5)), Box::new(v(5))),
        cell(
            "unique_field",
            "rename_local",
            None,
            Box::new(no(400, "needs a new value")),
        ),
        cell(
            "unique_field",
            "keep_local",
            None,
            Box::new(no(400, "needs a new value")),
        ),
        cell(
            "unique_field",
            "rename_local",
            Some(json!([5])),
            Box::new(no(400, "must be a text")),
        ),
        cell("unique_field", "rename_local", new(), Box::new(renamed)),
        cell(
            "unique_field",
            "keep_local",
            Some(json!("other")),
            Box::new(|id| To(Some(doc! {"_id": id, "username": "other", "l": 1}))),
        ),
        cell(
            "unique_field",
            "merge",
            Some(json!("third")),
            Box::new(|id| To(Some(doc! {"_id": id, "username": "third", "l": 1}))),
        ),
        cell("unique_field", "merge", None, Box::new(|_| To(None))),
        cell("unique_field", "keep_remote", None, Box::new(|_| To(None))),
        cell(
            "rejected",
            "rename_local",
            new(),
            Box::new(no(400, "for a unique value")),
        ),
        cell(
            "rejected",
            "merge",
            Some(json!(5)),
            Box::new(no(400, "no document that could take")),
        ),
        cell("rejected", "keep_local", None, Box::new(no(409, "refuse"))),
        cell("rejected", "merge", None, Box::new(no(409, "refuse"))),
        cell("rejected", "keep_remote", None, Box::new(|_| To(None))),
        cell(
            "collection_dropped",
            "rename_local",
            None,
            Box::new(no(400, "whole collection")),
        ),
        cell(
            "collection_dropped",
            "merge",
            None,
            Box::new(no(400, "whole collection")),
        ),
        cell(
            "collection_dropped",
            "keep_local",
            Some(json!(1)),
            Box::new(no(400, "takes no value")),
        ),
        cell(
            "collection_dropped",
            "keep_local",
            None,
            Box::new(|_| Count(0)),
        ),
        cell(
            "collection_dropped",
            "keep_remote",
            None,
            Box::new(|_| Count(3)),
        ),
    ];
    let mut left: Option<(&str, i32, String, Value)> = None;
    for (number, (kind, strategy, value, comes)) in table.into_iter().enumerate() {
        let id = i32::try_from(number).unwrap();
        // A conflict that nothing came of serves the next cell, too.
        let (id, coll, conflict) = match left.take() {
            Some((of, id, coll, conflict)) if of == kind => (id, coll, conflict),
            _ => {
                let (coll, conflict) = make(&world, &daemon, kind, id).await;
                (id, coll, conflict)
            }
        };
        let what = format!("{kind} {strategy} {value:?}");
        let mut body = json!({"strategy": strategy});
        if let Some(value) = value {
            body["newValue"] = value;
        }
        let (dry, _) = resolve(&daemon, &conflict, with(&body, "dryRun", true)).await;
        match comes(id) {
            No(status, words) => {
                let (got, answer) = resolve(&daemon, &conflict, body).await;
                assert_eq!(got, status, "{what}: {answer}");
                let why = answer["detail"].as_str().unwrap();
                assert!(why.contains(words), "{what}: {why}");
                left = Some((kind, id, coll, conflict));
            }
            To(want) => {
                assert_eq!(dry, 200, "{what}");
                resolved(&daemon, &conflict, body).await;
                wait_until(SOON, &what, async || {
                    let local = get(&world, "local", &coll, id).await;
                    let remote = get(&world, "remote", &coll, id).await;
                    let good = local == want && remote == want;
                    good.then_some(()).ok_or(format!("{local:?} {remote:?}"))
                })
                .await;
                let record = record(&world, &conflict).await;
                assert_eq!(record.get_str("resolutionStrategy").ok(), Some(strategy));
            }
            Count(count) => {
                assert_eq!(dry, 200, "{what}");
                resolved(&daemon, &conflict, body).await;
                world.remote_has(&coll, count).await;
                world.wait_converged(&daemon).await;
            }
        }
    }
    world.wait_converged(&daemon).await;
    assert_eq!(daemon.status().await.unwrap()["unresolvedConflicts"], 0);

    // A deletion against an edit is never open: the edit stays at once, on record, and can be undone.
    let coll = world.local.collection::<Document>("d");
    coll.insert_one(doc! {"_id": 1, "v": 1}).await.unwrap();
    world.wait_converged(&daemon).await;
    apart(&daemon, async {
        coll.delete_one(doc! {"_id": 1}).await.unwrap();
        set(&world.remote, "d", 1, doc! {"v": 2}).await;
    })
    .await;
    world.wait_converged(&daemon).await;
    let closed = wait_until(SOON, "it is on record", async || {
        let found = daemon
            .get("/api/sync/conflicts?kind=delete_update")
            .await?
            .body;
        found.get(0).cloned().ok_or_else(|| found.to_string())
    })
    .await;
    for strategy in ["rename_local", "keep_local", "keep_remote", "merge"] {
        let (status, answer) = resolve(&daemon, &closed, json!({"strategy": strategy})).await;
        assert_eq!(status, 409, "{answer}");
        assert!(
            answer["detail"].as_str().unwrap().contains("undo"),
            "{answer}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_from_outside_in_the_middle_of_resolutions_leaves_nothing_half() {
    const COUNT: i32 = 60;
    let seed = std::env::var("SANGAM_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let seed: u64 = seed.unwrap_or_else(rand::random);
    println!("SANGAM_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let world = World::new("kill_9").await;
    let mut daemon = world.start().await;
    let docs = (0..COUNT).map(|i| doc! {"_id": i, "n": 1, "a": 1, "b": 1});
    let stock = world.local.collection::<Document>("stock");
    stock.insert_many(docs).await.unwrap();
    world.wait_converged(&daemon).await;
    apart(&daemon, async {
        for i in 0..COUNT {
            set(&world.local, "stock", i, doc! {"n": 2, "a": 2}).await;
            set(&world.remote, "stock", i, doc! {"n": 3, "b": 3}).await;
        }
    })
    .await;
    let conflicts = open(&daemon, 60).await;
    // A line long enough that a kill falls between its two ends.
    world.link.round_trip(std::time::Duration::from_millis(20));
    let bulk = json!({"strategy": "merge", "collection": "stock"});
    let mut kills = 0;
    loop {
        daemon.wait_status("isOnline", |v| *v == true).await;
        let before = daemon.status().await.unwrap()["unresolvedConflicts"]
            .as_u64()
            .unwrap();
        if before == 0 {
            break;
        }
        let asked = daemon.post("/api/sync/conflicts/resolve", bulk.clone());
        let pause = std::time::Duration::from_millis(rng.random_range(0..150));
        tokio::select! {
            // Whether it came to an end tells nothing: the next turn looks.
            _ = asked => {}
            () = tokio::time::sleep(pause) => {}
        }
        if kills < 6 {
            kills += 1;
            daemon.kill9();
            daemon.restart().await;
        }
    }
    world.wait_converged(&daemon).await;
    for (i, conflict) in conflicts.iter().enumerate() {
        let record = record(&world, conflict).await;
        assert_eq!(
            record.get_str("resolutionStrategy").ok(),
            Some("merge"),
            "{i}"
        );
    }
    for i in 0..COUNT {
        let want = doc! {"_id": i, "n": 2, "a": 2, "b": 3};
        assert_eq!(both(&world, "stock", i).await, Some(want), "seed {seed}");
    }
    assert_eq!(world.conflicts().await.len(), 60, "no record twice");
}
