//! R16: unique values: what only looks like a clash is untied, what is one is recorded once.

use std::time::{Duration, Instant};

use crate::common::kit::{
    Docs, body, both, conflicts_now, converged_without_conflict, cut, heal, index, set,
    the_conflict, wait_closed, wait_content,
};
use crate::common::{Daemon, SOON, Settings, World, wait_for};
use mongodb::IndexModel;
use mongodb::bson::{Document, doc};
use mongodb::options::{Collation, IndexOptions};
use sangam::faultlink::{AfterLoss, Mode};

fn unique(keys: Document) -> IndexModel {
    let options = IndexOptions::builder().unique(true).build();
    IndexModel::builder().keys(keys).options(options).build()
}

/// Documents `_id` 1.. with these usernames, on both sides, under a unique index.
async fn users(
    test: &str,
    names: &[&str],
    settings: impl FnOnce(Settings) -> Settings,
) -> (World, Daemon) {
    let world = World::new(test).await;
    index(&world, "c", unique(doc! {"u": 1})).await;
    let (here, _) = both(&world, "c");
    let docs = (1..)
        .zip(names)
        .map(|(i, u)| doc! {"_id": i, "u": u, "pad": "x".repeat(100)});
    here.insert_many(docs).await.unwrap();
    let daemon = world.start_with(settings(world.settings())).await;
    world.wait_converged(&daemon).await;
    (world, daemon)
}

/// Gives the documents 1.. these usernames in one transaction.
async fn rename(c: &Docs, names: &[&str]) {
    let mut session = c.client().start_session().await.unwrap();
    session.start_transaction().await.unwrap();
    for parking in [true, false] {
        for (i, u) in (1..).zip(names) {
            let u = if parking {
                format!("parked{i}")
            } else {
                (*u).to_owned()
            };
            c.update_one(doc! {"_id": i}, doc! {"$set": {"u": u}})
                .session(&mut session)
                .await
                .unwrap();
        }
    }
    session.commit_transaction().await.unwrap();
}

async fn names(c: &Docs, count: i32) -> Vec<String> {
    let mut names = Vec::new();
    for i in 1..=count {
        let d = c.find_one(doc! {"_id": i}).await.unwrap().unwrap();
        names.push(d.get_str("u").unwrap().to_owned());
    }
    names
}

/// Renames on one side, while the link is there and while it is away, and expects no conflict.
async fn renamed(test: &str, from: &[&str], to: &[&str], batch: u32) {
    let set_batch = |s: Settings| s.set("sync.batch_size", &batch.to_string());
    for on_remote in [false, true] {
        let (world, daemon) = users(&format!("{test}_{on_remote}"), from, set_batch).await;
        let (here, there) = both(&world, "c");
        let c = if on_remote { &there } else { &here };
        let count = i32::try_from(from.len()).unwrap();
        // WHEN they change hands in a transaction
        rename(c, to).await;
        // THEN the other side follows
        converged_without_conflict(&world, &daemon).await;
        assert_eq!(names(&here, count).await, to);
        assert_eq!(names(&there, count).await, to);
        // AND back, offline
        cut(&world, &daemon).await;
        rename(c, from).await;
        heal(&world, &daemon).await;
        converged_without_conflict(&world, &daemon).await;
        assert_eq!(names(&here, count).await, from);
        assert_eq!(names(&there, count).await, from);
    }
}

#[tokio::test]
async fn r16_a_swap_is_no_conflict() {
    renamed("swap", &["a", "b"], &["b", "a"], 1000).await;
}

#[tokio::test]
async fn r16_a_swap_across_batches_is_no_conflict() {
    renamed("swap_batches", &["a", "b"], &["b", "a"], 1).await;
}

#[tokio::test]
async fn r16_a_ring_of_four_is_no_conflict() {
    renamed("ring", &["a", "b", "c", "d"], &["d", "a", "b", "c"], 1000).await;
}

#[tokio::test]
async fn r16_a_chain_is_no_conflict() {
    renamed("chain", &["a", "b", "c", "d"], &["b", "c", "d", "e"], 1000).await;
    renamed(
        "chain_batches",
        &["a", "b", "c", "d"],
        &["b", "c", "d", "e"],
        1,
    )
    .await;
}

#[tokio::test]
async fn r16_a_name_taken_over_from_a_deleted_document_is_no_conflict() {
    for (batch, on_remote) in [("1000", false), ("1", false), ("1000", true), ("1", true)] {
        let test = format!("takeover_{batch}_{on_remote}");
        let (world, daemon) = users(&test, &["a", "b"], |s| s.set("sync.batch_size", batch)).await;
        let (here, there) = both(&world, "c");
        let c = if on_remote { &there } else { &here };
        // GIVEN an edit that comes before them in the queue, offline
        cut(&world, &daemon).await;
        // WHEN a new document takes the name of one that is deleted, and one of an existing
        c.update_one(doc! {"_id": 2}, doc! {"$set": {"pad": 1}})
            .await
            .unwrap();
        c.delete_one(doc! {"_id": 1}).await.unwrap();
        c.insert_one(doc! {"_id": 0, "u": "a"}).await.unwrap();
        set(c, 2, doc! {"u": "z"}).await;
        c.insert_one(doc! {"_id": -1, "u": "b"}).await.unwrap();
        heal(&world, &daemon).await;
        // THEN all arrives
        converged_without_conflict(&world, &daemon).await;
        wait_content(&here, 1, None).await;
        wait_content(&there, 0, doc! {"_id": 0, "u": "a"}).await;
    }
}

#[tokio::test]
async fn r16_the_same_name_taken_on_both_sides_is_one_conflict_and_stops_nothing_else() {
    // GIVEN two documents with the same username, made on either side
    let (world, daemon) = users("taken", &["a"], |s| s).await;
    let (here, there) = both(&world, "c");
    cut(&world, &daemon).await;
    here.insert_one(doc! {"_id": "l", "u": "same"})
        .await
        .unwrap();
    there
        .insert_one(doc! {"_id": "r", "u": "same"})
        .await
        .unwrap();
    heal(&world, &daemon).await;
    // THEN it is one conflict, with both documents
    let conflict = the_conflict(&world, &daemon).await;
    assert_eq!(conflict.get_str("kind").unwrap(), "unique_field");
    assert_eq!(conflict.get_str("field").unwrap(), "u");
    assert_eq!(conflict.get_str("localId").unwrap(), "l");
    assert_eq!(conflict.get_str("remoteId").unwrap(), "r");
    assert_eq!(conflict.get_str("localValue").unwrap(), "same");
    assert_eq!(
        body(&conflict, "localDocument"),
        Some(doc! {"_id": "l", "u": "same"})
    );
    assert_eq!(
        body(&conflict, "remoteDocument"),
        Some(doc! {"_id": "r", "u": "same"})
    );
    assert_eq!(daemon.status().await.unwrap()["unresolvedConflicts"], 1);
    // AND others are synced
    here.insert_one(doc! {"_id": "l2", "u": "l2"})
        .await
        .unwrap();
    there
        .insert_one(doc! {"_id": "r2", "u": "r2"})
        .await
        .unwrap();
    wait_content(&there, "l2", doc! {"_id": "l2", "u": "l2"}).await;
    wait_content(&here, "r2", doc! {"_id": "r2", "u": "r2"}).await;
    assert_eq!(conflicts_now(&world, &daemon).await.len(), 1);
    // WHEN one of them is renamed by hand
    set(&here, "l", doc! {"u": "another"}).await;
    // THEN both arrive and it is closed
    wait_closed(&world, &daemon).await;
    world.wait_converged(&daemon).await;
    wait_content(&there, "l", doc! {"_id": "l", "u": "another"}).await;
    wait_content(&here, "r", doc! {"_id": "r", "u": "same"}).await;
    assert_eq!(world.conflicts().await.len(), 1);
}

#[tokio::test]
async fn r16_renaming_the_remote_one_by_hand_frees_both() {
    let (world, daemon) = users("freed", &["a"], |s| s).await;
    let (here, there) = both(&world, "c");
    cut(&world, &daemon).await;
    here.insert_one(doc! {"_id": "l", "u": "same"})
        .await
        .unwrap();
    there
        .insert_one(doc! {"_id": "r", "u": "same"})
        .await
        .unwrap();
    heal(&world, &daemon).await;
    the_conflict(&world, &daemon).await;
    set(&there, "r", doc! {"u": "other"}).await;
    wait_closed(&world, &daemon).await;
    world.wait_converged(&daemon).await;
    wait_content(&there, "l", doc! {"_id": "l", "u": "same"}).await;
    wait_content(&here, "r", doc! {"_id": "r", "u": "other"}).await;
}

#[tokio::test]
async fn r16_deleting_the_blocker_frees_the_other() {
    let (world, daemon) = users("blocker_gone", &["a"], |s| s).await;
    let (here, there) = both(&world, "c");
    cut(&world, &daemon).await;
    here.insert_one(doc! {"_id": "l", "u": "same"})
        .await
        .unwrap();
    there
        .insert_one(doc! {"_id": "r", "u": "same"})
        .await
        .unwrap();
    heal(&world, &daemon).await;
    the_conflict(&world, &daemon).await;
    there.delete_one(doc! {"_id": "r"}).await.unwrap();
    wait_closed(&world, &daemon).await;
    world.wait_converged(&daemon).await;
    wait_content(&there, "l", doc! {"_id": "l", "u": "same"}).await;
}

/// Two documents that clash under `model` and two that don't.
async fn clash(
    test: &str,
    model: IndexModel,
    [l, r]: [Document; 2],
    fine: [Document; 2],
    field: &str,
) {
    let world = World::new(test).await;
    index(&world, "c", model).await;
    let daemon = world.start().await;
    world.wait_converged(&daemon).await;
    let (here, there) = both(&world, "c");
    cut(&world, &daemon).await;
    let with = |id: &str, d: &Document| {
        let mut with = doc! {"_id": id};
        with.extend(d.clone());
        with
    };
    here.insert_many([with("l", &l), with("fine l", &fine[0])])
        .await
        .unwrap();
    there
        .insert_many([with("r", &r), with("fine r", &fine[1])])
        .await
        .unwrap();
    heal(&world, &daemon).await;
    let conflict = the_conflict(&world, &daemon).await;
    assert_eq!(
        conflict.get_str("kind").unwrap(),
        "unique_field",
        "{conflict:#?}"
    );
    assert_eq!(conflict.get_str("field").unwrap(), field);
    assert_eq!(conflict.get_str("localId").unwrap(), "l");
    assert_eq!(conflict.get_str("remoteId").unwrap(), "r");
    wait_content(&there, "fine l", with("fine l", &fine[0])).await;
    wait_content(&here, "fine r", with("fine r", &fine[1])).await;
    there.delete_one(doc! {"_id": "r"}).await.unwrap();
    wait_closed(&world, &daemon).await;
    world.wait_converged(&daemon).await;
}

#[tokio::test]
async fn r16_a_compound_index() {
    clash(
        "compound",
        unique(doc! {"hall": 1, "day": 1}),
        [
            doc! {"hall": 1, "day": 1, "by": "l"},
            doc! {"hall": 1, "day": 1, "by": "r"},
        ],
        [doc! {"hall": 1, "day": 2}, doc! {"hall": 2, "day": 1}],
        "hall,day",
    )
    .await;
}

#[tokio::test]
async fn r16_an_index_on_an_embedded_field() {
    clash(
        "embedded",
        unique(doc! {"a.b": 1}),
        [
            doc! {"a": {"b": 1}, "by": "l"},
            doc! {"a": {"b": 1}, "by": "r"},
        ],
        [doc! {"a": {"b": 2}}, doc! {"a": {"b": 3}}],
        "a.b",
    )
    .await;
}

#[tokio::test]
async fn r16_a_partial_index() {
    let options = IndexOptions::builder()
        .unique(true)
        .partial_filter_expression(doc! {"active": true})
        .build();
    clash(
        "partial",
        IndexModel::builder()
            .keys(doc! {"u": 1})
            .options(options)
            .build(),
        [
            doc! {"u": 1, "active": true, "by": "l"},
            doc! {"u": 1, "active": true, "by": "r"},
        ],
        [
            doc! {"u": 1, "active": false, "by": "l"},
            doc! {"u": 1, "by": "r"},
        ],
        "u",
    )
    .await;
}

#[tokio::test]
async fn r16_a_collated_index() {
    let collation = Collation::builder()
        .locale("en")
        .strength(mongodb::options::CollationStrength::Secondary)
        .build();
    let options = IndexOptions::builder()
        .unique(true)
        .collation(collation)
        .build();
    clash(
        "collated",
        IndexModel::builder()
            .keys(doc! {"u": 1})
            .options(options)
            .build(),
        [doc! {"u": "Arjun"}, doc! {"u": "ARJUN"}],
        [doc! {"u": "bhima"}, doc! {"u": "Nakula"}],
        "u",
    )
    .await;
}

#[tokio::test]
async fn r16_unique_fields_without_an_index() {
    // GIVEN no index, but [unique_fields]
    let world = World::new("configured").await;
    let daemon = world
        .start_with(world.settings().set("unique_fields.c", "[\"u\"]"))
        .await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1, "u": "a"}).await.unwrap();
    world.wait_converged(&daemon).await;
    cut(&world, &daemon).await;
    here.insert_many([
        doc! {"_id": "l", "u": "same"},
        doc! {"_id": "l2", "u": "l2"},
    ])
    .await
    .unwrap();
    there
        .insert_many([doc! {"_id": "r", "u": "same"}, doc! {"_id": "r2"}])
        .await
        .unwrap();
    heal(&world, &daemon).await;
    // THEN the clash is found all the same, and others flow
    let conflict = the_conflict(&world, &daemon).await;
    assert_eq!(conflict.get_str("kind").unwrap(), "unique_field");
    wait_content(&there, "l2", doc! {"_id": "l2", "u": "l2"}).await;
    wait_content(&here, "r2", doc! {"_id": "r2"}).await;
    wait_content(&there, "l", None).await;
    // WHEN one is renamed THEN both arrive
    set(&here, "l", doc! {"u": "free"}).await;
    wait_closed(&world, &daemon).await;
    world.wait_converged(&daemon).await;
}

#[tokio::test]
async fn r16_a_swap_of_unique_fields_without_an_index_is_no_conflict() {
    let world = World::new("configured_swap").await;
    let daemon = world
        .start_with(world.settings().set("unique_fields.c", "[\"u\"]"))
        .await;
    let (here, there) = both(&world, "c");
    here.insert_many([doc! {"_id": 1, "u": "a"}, doc! {"_id": 2, "u": "b"}])
        .await
        .unwrap();
    world.wait_converged(&daemon).await;
    rename(&here, &["b", "a"]).await;
    converged_without_conflict(&world, &daemon).await;
    assert_eq!(names(&there, 2).await, ["b", "a"]);
}

#[tokio::test]
async fn r16_a_conflict_whose_cause_goes_before_it_is_on_record_closes_by_itself() {
    // GIVEN a name that is unique on the remote alone, and a daemon that takes its time between
    // finding a clash and putting it on record
    let world = World::new("before_record").await;
    let (here, there) = both(&world, "c");
    there.create_index(unique(doc! {"u": 1})).await.unwrap();
    let gate = world.dir().join("gate");
    std::fs::write(&gate, b"").unwrap();
    let settings = world
        .settings()
        .set("schema.sync", "\"report\"")
        // A pull would come by and look again.
        .set("pull.interval", "\"1h\"")
        .env("SANGAM_STALL", &format!("clash_found:{}", gate.display()));
    let daemon = world.start_with(settings).await;
    here.insert_one(doc! {"_id": 1, "u": "john"}).await.unwrap();
    world.wait_converged(&daemon).await;
    // WHEN a second document takes the name, and the first one lets go of it just then
    here.insert_one(doc! {"_id": 2, "u": "john"}).await.unwrap();
    wait_for("the clash is found", async || {
        gate.with_extension("reached").exists()
    })
    .await;
    set(&there, 1, doc! {"u": "johanna"}).await;
    wait_content(&here, 1, doc! {"_id": 1, "u": "johanna"}).await;
    std::fs::remove_file(&gate).unwrap();
    // THEN the conflict does not outlive its cause
    wait_content(&there, 2, doc! {"_id": 2, "u": "john"}).await;
    wait_closed(&world, &daemon).await;
    world.wait_converged(&daemon).await;
}

#[tokio::test]
async fn r16_a_transaction_that_a_lost_link_leaves_open_blocks_nothing() {
    // GIVEN a remote that would keep an abandoned transaction, and its documents locked, for an hour
    let args = ["--setParameter", "transactionLifetimeLimitSeconds=3600"];
    let world = World::with_server_args("left_open", &args).await;
    index(&world, "c", unique(doc! {"u": 1})).await;
    let (here, there) = both(&world, "c");
    let docs = (1..).zip(["a", "b"]).map(|(i, u)| doc! {"_id": i, "u": u});
    here.insert_many(docs).await.unwrap();
    let daemon = world.start().await;
    world.wait_converged(&daemon).await;
    // WHEN the link is lost in the middle of one (documents are deleted there only)
    cut(&world, &daemon).await;
    for (i, u) in [(1, "parked"), (2, "a"), (1, "b")] {
        set(&here, i, doc! {"u": u}).await;
    }
    world.link.set(Mode::Pass);
    world.link.lose_next_reply("delete", AfterLoss::CutLink);
    world.link.wait_lost_replies(1).await;
    wait_for("it is given up", async || {
        daemon.log().contains("a batch failed")
    })
    .await;
    // (What follows are plain writes.)
    set(&here, 1, doc! {"u": "c"}).await;
    set(&here, 2, doc! {"u": "d"}).await;
    heal(&world, &daemon).await;
    // THEN what comes after it arrives
    converged_without_conflict(&world, &daemon).await;
    assert_eq!(names(&there, 2).await, ["c", "d"]);
}

#[tokio::test]
async fn r16_a_ring_whose_transactions_happen_without_an_answer_is_no_conflict() {
    // GIVEN a remote that carries out transactions and then says that it can't tell
    let args = ["--setParameter", "enableTestCommands=1"];
    let world = World::with_server_args("ring_unanswered", &args).await;
    index(&world, "c", unique(doc! {"u": 1})).await;
    let (here, there) = both(&world, "c");
    let mut ring = ["a", "b", "c", "d"];
    let docs = (1..).zip(ring).map(|(i, u)| doc! {"_id": i, "u": u});
    here.insert_many(docs).await.unwrap();
    let daemon = world.start().await;
    world.wait_converged(&daemon).await;
    let admin = world.remote.client().database("admin");
    let unsure = doc! {
        "configureFailPoint": "failCommand", "mode": {"activationProbability": 0.7},
        "data": {
            "failCommands": ["commitTransaction"], "appName": "sangam",
            "writeConcernError": {"code": 189, "codeName": "PrimarySteppedDown", "errmsg": "stepped down"},
        },
    };
    admin.run_command(unsure).await.unwrap();
    // WHEN names go round all the while, also between a commit and the next look
    world.link.round_trip(Duration::from_millis(60));
    let deadline = Instant::now() + SOON;
    let interrupted = || daemon.log().contains("a transaction was interrupted");
    let mut more = 20;
    while more > 0 && Instant::now() < deadline {
        more -= i32::from(interrupted());
        ring.rotate_right(1);
        // One by one: what the daemon sees of it at a moment is a ring it has to untie.
        for parking in ["parked-", ""] {
            for (i, u) in (1..).zip(ring) {
                set(&here, i, doc! {"u": format!("{parking}{u}")}).await;
            }
        }
    }
    assert!(interrupted());
    let sure = doc! {"configureFailPoint": "failCommand", "mode": "off"};
    admin.run_command(sure).await.unwrap();
    world.link.round_trip(Duration::ZERO);
    // THEN they end up the same, and nobody is asked
    converged_without_conflict(&world, &daemon).await;
    assert_eq!(names(&there, 4).await, ring);
}
