//! Numbers and sets under a rule that adds up what both sides did: every change counts once, whatever
//! becomes of the answers (R3).

use std::os::unix::process::ExitStatusExt;

use crate::common::kit::{Docs, both, converged_without_conflict, cut, heal, wait_content};
use crate::common::{Daemon, SOON, Settings, World, wait_until};
use futures::TryStreamExt;
use mongodb::bson::{Document, doc};
use sangam::decide::Side;
use sangam::faultlink::AfterLoss;

fn settings(world: &World) -> Settings {
    world
        .settings()
        .set("sync.rules.stock.n", "\"sum_of_changes\"")
        .set("sync.rules.stock.tags", "\"union\"")
        // What an application writes beside the number must not help.
        .set("sync.stamp_documents", "false")
}

async fn begin(name: &str) -> (World, Daemon, Docs, Docs) {
    let world = World::new(name).await;
    let (here, there) = both(&world, "stock");
    let first = doc! {"_id": 1, "n": 10, "tags": ["a", "b"]};
    here.insert_one(first).await.unwrap();
    let daemon = world.start_with(settings(&world)).await;
    world.wait_converged(&daemon).await;
    (world, daemon, here, there)
}

async fn add(c: &Docs, n: i32) {
    let update = c.update_one(doc! {"_id": 1}, doc! {"$inc": {"n": n}});
    assert_eq!(update.await.unwrap().matched_count, 1);
}

async fn pull(c: &Docs, tag: &str) {
    let update = c.update_one(doc! {"_id": 1}, doc! {"$pull": {"tags": tag}});
    assert_eq!(update.await.unwrap().modified_count, 1);
}

async fn ends(world: &World, daemon: &Daemon, n: i32, tags: &[&str]) {
    converged_without_conflict(world, daemon).await;
    let wanted = doc! {"_id": 1, "n": n, "tags": tags};
    for db in [&world.local, &world.remote] {
        wait_content(&db.collection("stock"), 1, wanted.clone()).await;
    }
}

#[tokio::test]
async fn r3_counted_on_after_a_write_whose_answer_got_lost() {
    // GIVEN a count that reached the remote, the answer of which got lost
    let (world, daemon, here, there) = begin("counts_lost").await;
    world
        .link
        .lose_next_reply("commitTransaction", AfterLoss::CutLink);
    let both = doc! {"$inc": {"n": 3}, "$pull": {"tags": "a"}};
    here.update_one(doc! {"_id": 1}, both).await.unwrap();
    world.link.wait_lost_replies(1).await;
    wait_content(&there, 1, doc! {"_id": 1, "n": 13, "tags": ["b"]}).await;
    // WHEN both sides go on counting before the daemon can look
    add(&there, 5).await;
    add(&here, 1).await;
    world.link.heal();
    // THEN the first count is in it once, and what was taken out stays out
    ends(&world, &daemon, 19, &["b"]).await;
    let receipts = there.client().database(&world.name);
    let left = receipts.collection::<Document>("sangam_receipts");
    assert!(left.count_documents(doc! {}).await.unwrap() > 0);
}

#[tokio::test]
async fn r3_counted_on_after_a_create_whose_answer_got_lost() {
    // GIVEN a new number that reached the remote, the answer of which got lost
    let (world, daemon, here, there) = begin("counts_created").await;
    world
        .link
        .lose_next_reply("commitTransaction", AfterLoss::CutLink);
    here.insert_one(doc! {"_id": 2, "n": 0}).await.unwrap();
    world.link.wait_lost_replies(1).await;
    wait_content(&there, 2, doc! {"_id": 2, "n": 0}).await;
    // WHEN both sides count the same before the daemon can look
    for c in [&here, &there] {
        let count = c.update_one(doc! {"_id": 2}, doc! {"$inc": {"n": 1}});
        assert_eq!(count.await.unwrap().matched_count, 1);
    }
    world.link.heal();
    // THEN both count
    converged_without_conflict(&world, &daemon).await;
    for c in [&here, &there] {
        wait_content(c, 2, doc! {"_id": 2, "n": 2}).await;
    }
}

/// Runs a daemon that aborts at `point` on its way to `to`, where somebody counts before it is back.
async fn aborted(name: &str, to: Side, point: &str, meanwhile: i32) -> (World, Daemon) {
    let (world, mut daemon, here, there) = begin(name).await;
    daemon.kill9();
    let (from, to) = match to {
        Side::Local => (&there, &here),
        Side::Remote => (&here, &there),
    };
    add(from, 3).await;
    if point != "before_write" {
        pull(from, "a").await;
    }
    let armed = settings(&world).env("SANGAM_FAILPOINT", &format!("{point}:1"));
    let mut dying = Daemon::spawn(&world, armed);
    assert_eq!(dying.wait_exit().await.signal(), Some(6));
    add(to, meanwhile).await;
    let daemon = world.start_with(settings(&world)).await;
    (world, daemon)
}

#[tokio::test]
async fn r3_counted_on_after_a_crash_behind_the_write() {
    for (name, to) in [
        ("counts_behind_r", Side::Remote),
        ("counts_behind_l", Side::Local),
    ] {
        let (world, daemon) = aborted(name, to, "after_write_before_ack", 5).await;
        ends(&world, &daemon, 18, &["b"]).await;
    }
}

#[tokio::test]
async fn r3_somebody_else_counted_the_same_before_the_write_could_happen() {
    // The number there is what we were about to write, but it is somebody else's.
    for (name, to) in [
        ("counts_same_r", Side::Remote),
        ("counts_same_l", Side::Local),
    ] {
        let (world, daemon) = aborted(name, to, "before_write", 3).await;
        ends(&world, &daemon, 16, &["a", "b"]).await;
    }
}

#[tokio::test]
async fn two_sales_of_one_each_are_two() {
    // GIVEN no link
    let (world, daemon, here, there) = begin("counts_alike").await;
    cut(&world, &daemon).await;
    // WHEN both sides do exactly the same
    for c in [&here, &there] {
        add(c, -1).await;
        pull(c, "b").await;
    }
    heal(&world, &daemon).await;
    // THEN both count
    ends(&world, &daemon, 8, &["a"]).await;
}

#[tokio::test]
async fn many_numbers_some_of_which_are_hot() {
    const MANY: i32 = 250;
    // GIVEN many numbers on both sides, and no link
    let (world, daemon, here, there) = begin("counts_many").await;
    let more = (2..=MANY).map(|i| doc! {"_id": i, "n": 0});
    here.insert_many(more).await.unwrap();
    world.wait_converged(&daemon).await;
    cut(&world, &daemon).await;
    for c in [&here, &there] {
        let all = c.update_many(doc! {}, doc! {"$inc": {"n": 1}});
        assert_eq!(all.await.unwrap().modified_count, MANY as u64);
    }
    // WHEN the link returns while both sides go on counting a few of them
    world.link.heal();
    for _ in 0..60 {
        for c in [&here, &there] {
            let hot = c.update_many(doc! {"_id": {"$lte": 5}}, doc! {"$inc": {"n": 1}});
            assert_eq!(hot.await.unwrap().modified_count, 5);
        }
    }
    // THEN all of it counts, once
    converged_without_conflict(&world, &daemon).await;
    for c in [&here, &there] {
        wait_until(SOON, "every change", async || {
            let all = c.find(doc! {}).await.unwrap();
            let mut all: Vec<Document> = all.try_collect().await.unwrap();
            all.retain(|d| {
                let (id, n) = (d.get_i32("_id").unwrap(), d.get_i32("n").unwrap());
                let first = if id == 1 { 10 } else { 0 };
                n != first + 2 + if id <= 5 { 120 } else { 0 }
            });
            all.is_empty()
                .then_some(())
                .ok_or_else(|| format!("wrong: {all:?}"))
        })
        .await;
    }
}
