//! The conflict inbox on the command line: what it prints (against snapshots) and how it exits.
//!
//! `SANGAM_SNAPSHOTS=write` writes what is printed to `tests/snapshots`, to be looked at and committed.

use crate::common::snapshot::{cli, masked, snapshot};
use crate::common::{Daemon, SOON, World, wait_until};
use mongodb::IndexModel;
use mongodb::bson::{DateTime, Document, doc};
use mongodb::options::IndexOptions;
use serde_json::{Value, json};

/// One taken username, one booking changed on both sides.
async fn two_conflicts(world: &World) -> (Daemon, String, String) {
    let daemon = world.start().await;
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
    let bookings = world.local.collection::<Document>("bookings");
    let hour = 3_600_000;
    let day = DateTime::parse_rfc3339_str("2026-01-05T08:00:00Z").unwrap();
    let at = |hours: i64| DateTime::from_millis(day.timestamp_millis() + hours * hour);
    bookings
        .insert_one(doc! {"_id": "B-17", "devotee": "Asha", "seats": 2, "updatedAt": at(0)})
        .await
        .unwrap();
    world.wait_converged(&daemon).await;
    daemon.post("/api/sync/pause", json!({})).await.unwrap();
    let change = async |db: &mongodb::Database, fields: Document| {
        let coll = db.collection::<Document>("bookings");
        coll.update_one(doc! {"_id": "B-17"}, doc! {"$set": fields})
            .await
            .unwrap();
    };
    change(
        &world.local,
        doc! {"seats": 3, "updatedAt": at(1), "updatedBy": "counter"},
    )
    .await;
    change(
        &world.remote,
        doc! {"seats": 4, "paid": true, "updatedAt": at(2)},
    )
    .await;
    let (local, remote) = (
        world.local.collection("admins"),
        world.remote.collection("admins"),
    );
    local
        .insert_one(doc! {"_id": 1, "username": "john_admin", "name": "John"})
        .await
        .unwrap();
    remote
        .insert_one(doc! {"_id": 2, "username": "john_admin", "name": "Johnny"})
        .await
        .unwrap();
    daemon.post("/api/sync/resume", json!({})).await.unwrap();
    let found = wait_until(SOON, "two conflicts", async || {
        let found = daemon.get("/api/sync/conflicts?resolved=false").await?.body;
        let all = found.as_array().cloned().unwrap_or_default();
        (all.len() == 2).then_some(all).ok_or(found.to_string())
    })
    .await;
    let id = |coll: &str| {
        let one: &Value = found.iter().find(|c| c["collection"] == coll).unwrap();
        one["_id"].as_str().unwrap().to_owned()
    };
    let (admins, bookings) = (id("admins"), id("bookings"));
    (daemon, admins, bookings)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_inbox_reads_for_a_person_and_its_commands_settle_it() {
    let world = World::new("cli_inbox").await;
    let (daemon, admins, bookings) = two_conflicts(&world).await;
    let ids = [admins.as_str(), bookings.as_str()];

    let (code, text) = cli(&daemon, &["conflicts"]);
    assert_eq!(code, 3, "open conflicts: {text}");
    snapshot("conflicts", &masked(&text, &ids));
    let (code, text) = cli(&daemon, &["conflicts", "--collection", "admins"]);
    assert_eq!(code, 3);
    assert!(!text.contains(&bookings), "{text}");
    let (code, json_text) = cli(&daemon, &["--json", "conflicts"]);
    let json: Value = serde_json::from_str(&json_text).unwrap();
    assert_eq!((code, &json["total"]), (3, &json!(2)));

    let (code, text) = cli(&daemon, &["conflicts", "show", &bookings]);
    assert_eq!(code, 0);
    snapshot("show_both_modified", &masked(&text, &ids));
    let (code, text) = cli(&daemon, &["conflicts", "show", &admins]);
    assert_eq!(code, 0);
    snapshot("show_unique", &masked(&text, &ids));

    let (code, text) = cli(
        &daemon,
        &["resolve", &bookings, "--strategy", "merge", "--dry-run"],
    );
    assert_eq!(code, 0, "{text}");
    snapshot("dry_run", &masked(&text, &ids));

    // The very command that was printed.
    let way = &json["conflicts"]
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["_id"] == ids[0])
        .unwrap()["recommendations"][0];
    let command = way["command"].as_str().unwrap();
    let args: Vec<&str> = command.split(' ').skip(1).collect();
    let (code, text) = cli(&daemon, &args);
    assert_eq!(code, 0, "{text}");
    snapshot("resolve", &masked(&text, &ids));

    let (code, text) = cli(
        &daemon,
        &[
            "resolve",
            "--collection",
            "bookings",
            "--kind",
            "both_modified",
            "--strategy",
            "keep_local",
        ],
    );
    assert_eq!(code, 0, "{text}");
    snapshot("resolve_bulk", &masked(&text, &ids));
    world.wait_converged(&daemon).await;
    let (code, text) = cli(&daemon, &["conflicts"]);
    assert_eq!((code, text.trim()), (0, "no open conflicts"));
    let (code, text) = cli(&daemon, &["conflicts", "undo", &bookings]);
    assert_eq!(code, 0, "{text}");
    world.wait_converged(&daemon).await;
    let bookings = world.remote.collection::<Document>("bookings");
    let now = bookings.find_one(doc! {}).await.unwrap().unwrap();
    assert_eq!(
        (now.get_i32("seats").unwrap(), now.get_bool("paid").unwrap()),
        (4, true)
    );
    let (code, text) = cli(&daemon, &["conflicts", "--all"]);
    assert_eq!(code, 0);
    assert!(
        text.contains("Resolved") && text.contains("Undone"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn auto_resolve_says_what_it_did_and_left() {
    let world = World::new("cli_auto").await;
    let (daemon, admins, bookings) = two_conflicts(&world).await;
    let (code, text) = cli(
        &daemon,
        &["auto-resolve", "--collection", "bookings", "--max", "5"],
    );
    assert_eq!(code, 0, "{text}");
    snapshot("auto_resolve", &masked(&text, &[&admins, &bookings]));
    let (code, text) = cli(&daemon, &["auto-resolve"]);
    assert_eq!(code, 3, "the age of the admin is not known: {text}");
    assert!(
        text.contains("0 conflicts resolved, 1 skipped (manual needed), 0 failed"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_wrong_has_its_words_and_exit_code() {
    let world = World::new("cli_wrong").await;
    let (mut daemon, admins, bookings) = two_conflicts(&world).await;
    for (args, code, words) in [
        (
            vec!["resolve", &bookings, "--strategy", "best"],
            2,
            "possible values",
        ),
        (vec!["resolve", &bookings], 2, "--strategy"),
        (vec!["resolve", "--strategy", "keep_local"], 2, "required"),
        (
            vec![
                "resolve",
                "ffffffffffffffffffffffff",
                "--strategy",
                "keep_local",
            ],
            1,
            "there is no conflict",
        ),
        (
            vec!["resolve", &admins, "--strategy", "rename_local"],
            2,
            "needs a new value",
        ),
        (
            vec![
                "resolve",
                &bookings,
                "--strategy",
                "merge",
                "--value",
                "many",
            ],
            2,
            "whole number",
        ),
        (vec!["conflicts", "undo", &bookings], 1, "still open"),
        (vec!["conflicts", "show", "x"], 1, "24 hex digits"),
        (
            vec!["config", "set", "sync.batch_size", "0"],
            2,
            "from 1 to 10000",
        ),
        (
            vec!["config", "set", "database", "x"],
            2,
            "can't be changed",
        ),
    ] {
        let (got, text) = cli(&daemon, &args);
        assert_eq!(got, code, "{args:?}: {text}");
        assert!(text.contains(words), "{args:?}: {text}");
    }
    let coll = world.remote.collection::<Document>("bookings");
    coll.update_one(doc! {}, doc! {"$set": {"seats": 9}})
        .await
        .unwrap();
    let (code, text) = cli(&daemon, &["resolve", &bookings, "--strategy", "keep_local"]);
    assert_eq!(code, 1);
    assert!(
        text.contains("changed since") && text.contains("9 on the remote side"),
        "{text}"
    );

    assert_eq!(
        cli(&daemon, &["config", "set", "sync.batch_size", "50"]).0,
        0
    );
    let (_, text) = cli(&daemon, &["config", "get", "sync.batch_size"]);
    assert_eq!(text.trim(), "50");
    let (_, text) = cli(&daemon, &["config"]);
    assert!(text.contains("API, instead of 1000"), "{text}");
    assert_eq!(cli(&daemon, &["config", "unset", "batchSize"]).0, 0);
    daemon.kill9();
    let (code, text) = cli(&daemon, &["conflicts"]);
    assert_eq!(code, 69, "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_serves_without_a_token_and_names_the_user() {
    let world = World::new("cli_socket").await;
    let daemon = Daemon::spawn(&world, world.settings().set("api.listen", "\"\""));
    wait_until(SOON, "the socket answers", async || {
        let (code, text) = cli(&daemon, &["status"]);
        (code == 0).then_some(()).ok_or(text)
    })
    .await;
    let socket = daemon.state_dir().join("api.sock");
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(
        std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let (code, text) = cli(&daemon, &["status"]);
    assert_eq!(code, 0, "{text}");
    assert_eq!(cli(&daemon, &["conflicts"]).0, 0);
}

#[test]
fn completions_and_manual_come_from_the_same_definitions() {
    for (args, words) in [
        (vec!["completions", "bash"], "auto-resolve"),
        (vec!["completions", "zsh"], "--strategy"),
        (vec!["completions", "fish"], "conflicts"),
        (vec!["man"], "auto\\-resolve"),
    ] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_sangam"))
            .args(&args)
            .output()
            .unwrap();
        assert!(output.status.success());
        assert!(
            String::from_utf8(output.stdout).unwrap().contains(words),
            "{args:?}"
        );
    }
}
