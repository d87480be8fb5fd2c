//! The running daemon against its own description, by schemathesis. Python's part: `.ci/openapi`
//! installs it and runs this; `cargo test` alone leaves it out.

#![allow(clippy::unwrap_used)] // clippy sees only the functions marked #[test] as tests

mod common;

use std::process::Command;

use common::World;
use common::conflict::*;
use mongodb::bson::{Document, doc};

/// What the input is made from, unless SANGAM_SEED says otherwise: a failure comes back with the next run.
const SEED: &str = "20240229";

/// Conflicts of several kinds, so that there is something to list, show, resolve and undo.
async fn conflicts(world: &World, daemon: &common::Daemon) {
    unique_usernames(world).await;
    let validator = doc! {"n": {"$lt": 10}};
    let refusing = world.remote.create_collection("v").validator(validator);
    refusing.await.unwrap();
    for i in 0..6 {
        let one = doc! {"_id": i, "n": 1, "a": 1, "b": 1};
        let stock = world.local.collection::<Document>("stock");
        stock.insert_one(one).await.unwrap();
    }
    world.wait_converged(daemon).await;
    apart(daemon, async {
        for i in 0..6 {
            set(&world.local, "stock", i, doc! {"n": 2}).await;
            set(&world.remote, "stock", i, doc! {"n": 3}).await;
        }
        for (db, id) in [(&world.local, 1), (&world.remote, 2)] {
            let one = doc! {"_id": id, "username": "john"};
            db.collection("admins").insert_one(one).await.unwrap();
        }
        let one = doc! {"_id": 1, "n": 50};
        world.local.collection("v").insert_one(one).await.unwrap();
    })
    .await;
    open(daemon, 8).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs schemathesis; run .ci/openapi"]
async fn the_api_does_what_its_description_says() {
    let schemathesis = std::env::var("SCHEMATHESIS").expect("SCHEMATHESIS names the program");
    let world = World::new("openapi").await;
    let settings = world.settings().token("correct horse");
    let settings = settings.set("sync.max_retries", "0");
    let daemon = world.start_with(settings).await;
    conflicts(&world, &daemon).await;
    let port = daemon.settings.api_port();
    let seed = std::env::var("SANGAM_SEED").unwrap_or(SEED.into());
    let mut asked = Command::new(schemathesis);
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/.ci/schemathesis.toml");
    asked
        .current_dir(world.dir())
        .args([
            "--config-file",
            config,
            "run",
            "--no-color",
            "--seed",
            &seed,
        ])
        .args(["--header", "Authorization: Bearer correct horse"])
        .arg(format!("http://127.0.0.1:{port}/openapi.json"));
    let ended = tokio::task::spawn_blocking(move || asked.status()).await;
    assert!(
        ended.unwrap().unwrap().success(),
        "schemathesis found something"
    );
    // Whatever it asked for, the daemon is alive and well.
    assert_eq!(daemon.get("/readyz").await.unwrap().status, 200);
    let log = daemon.log();
    assert!(!log.contains("panicked"), "the daemon's log has a panic");
}
