//! What the link may carry, and when (`[link]`).

#![allow(clippy::unwrap_used)] // clippy sees only the functions marked #[test] as tests

mod common;

use std::time::{Duration, Instant};

use common::{SOON, World, wait_until};
use mongodb::bson::{Binary, Document, doc, spec::BinarySubtype};

#[tokio::test(flavor = "multi_thread")]
async fn a_limited_link_carries_no_more_than_its_rate() {
    let world = World::new("max_rate").await;
    let settings = world.settings().set("link.max_rate", "\"32KiB\"");
    let daemon = world.start_with(settings).await;
    world.wait_converged(&daemon).await;

    let docs: Vec<Document> = (0..100)
        .map(|i| {
            let bytes: Vec<u8> = (0..2048).map(|_| rand::random()).collect();
            let subtype = BinarySubtype::Generic;
            doc! {"_id": i, "scan": Binary { subtype, bytes }}
        })
        .collect();
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
