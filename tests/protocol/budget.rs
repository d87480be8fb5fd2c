//! What the link may carry, and when (`[link]`).

use std::time::{Duration, Instant};

use crate::common::{Daemon, SOON, Settings, World, wait_until};
use mongodb::Collection;
use mongodb::bson::{Binary, Document, doc, spec::BinarySubtype};
use sangam::faultlink::{Mode, Way};

/// Documents that no compression makes smaller.
fn scans(ids: std::ops::Range<i32>, size: usize) -> Vec<Document> {
    let doc = |i| {
        let bytes: Vec<u8> = (0..size).map(|_| rand::random()).collect();
        let subtype = BinarySubtype::Generic;
        doc! {"_id": i, "scan": Binary { subtype, bytes }}
    };
    ids.map(doc).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limited_link_carries_no_more_than_its_rate() {
    let world = World::new("max_rate").await;
    let settings = world.settings().set("link.max_rate", "\"32KiB\"");
    let daemon = world.start_with(settings).await;
    world.wait_converged(&daemon).await;

    let docs = scans(0..100, 2048);
    let began = Instant::now();
    let scans = world.local.collection::<Document>("scans");
    scans.insert_many(docs).await.unwrap();
    world
        .wait_converged_within(Duration::from_secs(120), &daemon)
        .await;
    // 200 KiB, of which the first command (64 KiB at most) is free: at least 4 s at this rate. However
    // slow the machine is, it can't be faster.
    let took = began.elapsed();
    assert!(took > Duration::from_secs(4), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_quiet_hours_changes_wait_unless_somebody_asks() {
    let world = World::new("quiet_hours").await;
    let always = "[\"00:00-12:00\", \"12:00-00:00\"]";
    let settings = world.settings().set("link.quiet_hours", always);
    let daemon = world.start_with(settings).await;
    let guests = world.local.collection::<Document>("guests");
    guests.insert_one(doc! {"_id": 1}).await.unwrap();
    daemon
        .wait_status("pendingDocuments", |n| *n == serde_json::json!(1))
        .await;
    let status = daemon.status().await.unwrap();
    assert!(status.to_string().contains("quiet hours"), "{status}");
    // Longer than a change takes, several times over.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let there = world.remote.collection::<Document>("guests");
    assert_eq!(there.find_one(doc! {}).await.unwrap(), None);

    let run = daemon.sync().await;
    assert_eq!(run["status"], "completed", "{run}");
    wait_until(SOON, "the guest is there", async || {
        match there.find_one(doc! {"_id": 1}).await {
            Ok(Some(_)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

/// Entries of the log that wait on each side, and their bytes: at 64 KiB a second, some 50 seconds each way.
const LOGS: i32 = 6000;
const LOG_BYTES: usize = 512;

/// So that what is under way at once is little beside what waits.
fn small_batches(world: &World) -> Settings {
    world.settings().set("sync.batch_size", "50")
}

/// A collection on both sides.
fn both(world: &World, name: &str) -> [Collection<Document>; 2] {
    [&world.local, &world.remote].map(|side| side.collection(name))
}

/// Waits until both sides have all bookings, and makes sure that half of the log entries still wait.
async fn bookings_overtake(world: &World, logs: &[String]) {
    let bookings = 100;
    wait_until(SOON, "all bookings are on both sides", async || {
        for side in both(world, "bookings") {
            let found = side
                .count_documents(doc! {})
                .await
                .map_err(|e| e.to_string())?;
            if found != bookings {
                return Err(format!("{found} of {bookings}"));
            }
        }
        Ok(())
    })
    .await;
    let mut there = 0;
    for log in logs {
        let there_of = both(world, log)[1].count_documents(doc! {}).await;
        there += there_of.unwrap() - LOGS as u64 / logs.len() as u64;
    }
    assert!(there < LOGS as u64 / 2, "{there} log entries went before");
}

async fn insert(collection: &Collection<Document>, docs: Vec<Document>) {
    collection.insert_many(docs).await.unwrap();
}

/// Nothing is on its way while documents of the log are written on both sides; then the link is slow.
async fn backlog(world: &World, daemon: &Daemon) {
    world.link.cut();
    daemon.wait_status("isOnline", |v| *v == false).await;
    let [here, there] = both(world, "logs");
    insert(&here, scans(0..LOGS, LOG_BYTES)).await;
    insert(&there, scans(LOGS..2 * LOGS, LOG_BYTES)).await;
    let all = serde_json::json!(LOGS);
    daemon.wait_status("pendingDocuments", |n| *n == all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bookings_overtake_a_backlog_of_logs_on_a_slow_link() {
    let world = World::new("order").await;
    let settings = small_batches(&world).set("link.first", "[\"bookings\"]");
    let daemon = world.start_with(settings).await;
    world.wait_converged(&daemon).await;
    backlog(&world, &daemon).await;
    for way in [Way::Up, Way::Down] {
        world.link.throttle(way, 64 << 10);
    }
    world.link.set(Mode::Pass);
    let [logs, _] = both(&world, "logs");
    wait_until(SOON, "log entries move", async || {
        match logs.find_one(doc! {"_id": {"$gte": LOGS}}).await {
            Ok(Some(_)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let [here, there] = both(&world, "bookings");
    insert(&here, scans(0..50, 64)).await;
    insert(&there, scans(50..100, 64)).await;
    bookings_overtake(&world, &["logs".into()]).await;
    // What goes last goes all the same.
    world.link.heal();
    world.wait_converged(&daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_order_counts_for_what_waits_already_and_within_the_budget() {
    let world = World::new("reorder").await;
    let settings = small_batches(&world).set("link.max_rate", "\"64KiB\"");
    let daemon = world.start_with(settings).await;
    world.wait_converged(&daemon).await;
    backlog(&world, &daemon).await;
    let [here, there] = both(&world, "bookings");
    insert(&here, scans(0..50, 64)).await;
    insert(&there, scans(50..100, 64)).await;
    let all = serde_json::json!(LOGS + 50);
    daemon.wait_status("pendingDocuments", |n| *n == all).await;

    let queue = || daemon.settings.cli(&["--json", "queue", "--limit", "5"]);
    let first = |output: std::process::Output| {
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        answer["entries"][0]["collection"]
            .as_str()
            .map(str::to_owned)
    };
    assert_eq!(first(queue()).as_deref(), Some("logs"));
    let set = daemon.settings.cli(&["config", "set", "link.last", "logs"]);
    assert!(set.status.success(), "{set:?}");
    assert_eq!(first(queue()).as_deref(), Some("bookings"));

    let began = Instant::now();
    let before = world.link.bytes(Way::Up);
    world.link.set(Mode::Pass);
    bookings_overtake(&world, &["logs".into()]).await;
    // The first commands are free: 64 KiB each of a batch, and what two seconds allow.
    let sent = world.link.bytes(Way::Up) - before;
    let allowed = (began.elapsed().as_secs_f64() + 12.0) * f64::from(64 << 10);
    assert!((sent as f64) < allowed, "{sent} of {allowed}");
    let none = serde_json::json!({"collectionsLast": null});
    assert_eq!(
        daemon.put("/api/sync/config", none).await.unwrap().status,
        200
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_sync_goes_through_collections_in_their_order() {
    let world = World::new("first_order").await;
    // By name the logs would be the first; four collections are compared at a time.
    let names: Vec<String> = (0..10).map(|n| format!("access_log{n}")).collect();
    let each = LOGS / 10;
    for name in &names {
        let [here, there] = both(&world, name);
        insert(&here, scans(0..each, LOG_BYTES)).await;
        insert(&there, scans(each..2 * each, LOG_BYTES)).await;
    }
    let [here, there] = both(&world, "bookings");
    insert(&here, scans(0..50, 64)).await;
    insert(&there, scans(50..100, 64)).await;
    for way in [Way::Up, Way::Down] {
        world.link.throttle(way, 64 << 10);
    }
    let settings = small_batches(&world).set("link.first", "[\"bookings\"]");
    let daemon = world.start_with(settings).await;
    bookings_overtake(&world, &names).await;
    world.link.heal();
    world.wait_converged(&daemon).await;
}
