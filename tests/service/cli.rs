//! The commands that ask how things are and make them move: what they print (against snapshots), how
//! they say how far they are, and how they end.

use std::fs::File;
use std::process::Stdio;

use crate::common::conflict::{apart, modified, open};
use crate::common::snapshot::{cli, snapshot, timeless};
use crate::common::{SOON, World, wait_until};
use mongodb::bson::{Document, doc};
use sangam::faultlink::Way;
use sangam::process::Child;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread")]
async fn how_things_are_reads_for_a_person() {
    let world = World::new("cli_reads").await;
    let settings = world.settings().set("sync.max_retries", "0");
    let daemon = world.start_with(settings).await;
    let quiet = |text: &str| timeless(&text.replace(&world.name, "temple_db"));
    // How many bursts the writes before fell into is chance.
    let steady = |text: &str| {
        let lines = text.lines().map(|line| match line.split_once("  ") {
            Some(("Syncs", _)) => "Syncs      <number> completed".to_owned(),
            Some(("Last sync", _)) => line.replace("partial", "completed"),
            _ => line.to_owned(),
        });
        quiet(&(lines.collect::<Vec<_>>().join("\n") + "\n"))
    };
    let validator = doc! {"n": {"$lt": 10}};
    let refusing = world.remote.create_collection("v").validator(validator);
    refusing.await.unwrap();
    modified(&world, &daemon, 1).await;
    open(&daemon, 1).await;
    world
        .local
        .collection("v")
        .insert_one(doc! {"_id": 1, "n": 50})
        .await
        .unwrap();
    open(&daemon, 2).await;
    apart(&daemon, async {
        let (local, remote) = (world.local.collection("c"), world.remote.collection("c"));
        for i in 0..3 {
            local.insert_one(doc! {"_id": i}).await.unwrap();
        }
        remote.insert_one(doc! {"_id": 9}).await.unwrap();
        daemon.wait_status("pendingDocuments", |n| *n == 5).await;
        daemon.wait_status("pendingInbox", |n| *n == 2).await;
        let (code, text) = cli(&daemon, &["status"]);
        assert_eq!(code, 0, "{text}");
        snapshot("status_paused", &steady(&text));
        let (code, text) = cli(&daemon, &["queue"]);
        assert_eq!(code, 0, "{text}");
        snapshot("queue", &quiet(&text));
        let (code, text) = cli(&daemon, &["sync"]);
        assert_eq!(code, 1, "paused: {text}");
        snapshot("sync_paused", &quiet(&text));
        // Nothing may move by itself before the sync that is looked at.
        let change = json!({"autoSyncEnabled": false});
        daemon.put("/api/sync/config", change).await.unwrap();
    })
    .await;
    let (code, text) = cli(&daemon, &["sync", "--collections", "c"]);
    assert_eq!(code, 0, "{text}");
    snapshot("sync", &quiet(&text));
    let (code, text) = cli(&daemon, &["logs", "--limit", "1"]);
    assert_eq!(code, 0, "{text}");
    snapshot("logs", &quiet(&text));
    let change = json!({"autoSyncEnabled": null});
    daemon.put("/api/sync/config", change).await.unwrap();
    daemon.wait_status("pendingDocuments", |n| *n == 2).await;
    daemon.wait_status("pendingInbox", |n| *n == 1).await;
    daemon.wait_status("isSyncing", |v| *v == false).await;
    let (code, text) = cli(&daemon, &["status"]);
    assert_eq!(code, 0, "{text}");
    snapshot("status", &steady(&text));
    let (code, text) = cli(&daemon, &["sync", "--collections", "login_attempts"]);
    assert_eq!((code, text.contains("not among")), (2, true), "{text}");

    let change = json!({"batchSize": 7});
    daemon.put("/api/sync/config", change).await.unwrap();
    let (code, text) = cli(&daemon, &["config"]);
    assert_eq!(code, 0, "{text}");
    let shown = [
        "KEY",
        "database",
        "sync.auto_sync_enabled",
        "sync.batch_size",
    ];
    let rows = text.lines().filter(|line| {
        let key = line.split_whitespace().next();
        key.is_some_and(|key| shown.contains(&key))
    });
    let columns = rows.map(|row| row.split_whitespace().collect::<Vec<_>>().join(" "));
    snapshot(
        "config",
        &quiet(&(columns.collect::<Vec<_>>().join("\n") + "\n")),
    );

    world.link.cut();
    daemon.wait_status("isOnline", |v| *v == false).await;
    daemon
        .wait_status("link", |l| l["state"] == "offline")
        .await;
    let (code, text) = cli(&daemon, &["sync"]);
    assert_eq!(code, 69, "{text}");
    assert!(text.contains("cannot be reached"), "{text}");
}

/// A command whose output goes to files, and that may be stopped.
fn started(daemon: &crate::common::Daemon, world: &World, args: &[&str]) -> Child {
    let file = |name: &str| File::create(world.dir().join(name)).unwrap();
    let mut command = daemon.settings.command();
    command.args(args).stdin(Stdio::null());
    command.stdout(file("out")).stderr(file("err"));
    Child::spawn(&mut command).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_sync_says_how_far_it_is_and_ctrl_c_ends_only_the_watching() {
    let world = World::new("cli_progress").await;
    let settings = world.settings().set("sync.batch_size", "2");
    let daemon = world.start_with(settings).await;
    world.wait_converged(&daemon).await;
    let read = |name: &str| std::fs::read_to_string(world.dir().join(name)).unwrap_or_default();
    // A line on which this takes minutes.
    apart(&daemon, async {
        let c = world.local.collection::<Document>("c");
        for i in 0..200 {
            let noise: String = (0..4000).map(|_| rand::random_range('!'..'~')).collect();
            c.insert_one(doc! {"_id": i, "noise": noise}).await.unwrap();
        }
        world.link.throttle(Way::Up, 20_000);
    })
    .await;
    let mut sync = started(&daemon, &world, &["sync"]);
    let line = wait_until(SOON, "a line says how far it is", async || {
        let text = read("err");
        let line = text.lines().find(|line| line.contains(" documents"));
        line.map(str::to_owned).ok_or(text)
    })
    .await;
    // Some may have gone before the line became slow.
    let total = line
        .split(" of ")
        .nth(1)
        .and_then(|of| of.split(' ').next());
    let total: u32 = total.and_then(|n| n.parse().ok()).expect(&line);
    assert!(
        line.starts_with("moving: ") && (100..=200).contains(&total),
        "{line}"
    );

    sync.signal("INT").unwrap();
    let ended = sync.wait(SOON).await.unwrap().expect("it ends");
    assert_eq!(ended.code(), Some(130), "{}", read("err"));
    assert!(
        read("err").contains("the daemon goes on"),
        "{}",
        read("err")
    );
    assert_eq!(read("out"), "");
    let status = daemon.status().await.unwrap();
    assert_eq!(status["isSyncing"], true, "{status}");
    world.link.throttle(Way::Up, 0);
    world.wait_converged(&daemon).await;
    wait_until(
        SOON,
        "the run that was asked for is on record",
        async || {
            let runs = daemon.get("/api/sync/logs").await?.body;
            let mut runs = runs.as_array().into_iter().flatten();
            let found =
                runs.any(|run: &Value| run["trigger"] == "manual" && run["status"] == "completed");
            found.then_some(()).ok_or_else(|| "not yet".to_owned())
        },
    )
    .await;
}
