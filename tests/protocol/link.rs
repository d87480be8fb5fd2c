//! R20 and the start: no link state is final, every reason is named, bad set-ups are refused clearly.

use crate::common::kit::{
    both, converged_without_conflict, cut, dealt_with, heal, set, wait_content,
};
use crate::common::{Daemon, Settings, World, wait_for, wait_until};
use mongodb::bson::{Document, doc};
use sangam::faultlink::{FaultLink, Mode};
use sangam::mongod::{MongoServer, ServerOptions};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

/// Waits until the link is offline for this reason.
async fn wait_reason(daemon: &Daemon, reason: &str) {
    let link = daemon
        .wait_status("link", |l| l["state"] == "offline" && l["reason"] == reason)
        .await;
    let message = link["message"].as_str().unwrap();
    assert!(message.len() > 20, "a sentence for a person: {message}");
    assert!(
        link["nextProbe"].is_string(),
        "there is always a next probe"
    );
}

#[tokio::test]
async fn r20_started_offline_it_captures_queues_and_syncs_when_the_link_comes() {
    // GIVEN a remote that can't be reached, and data on both sides
    let world = World::new("offline").await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": "before"}).await.unwrap();
    there.insert_one(doc! {"_id": "remote"}).await.unwrap();
    world.link.cut();
    let mut daemon = world.start().await;
    // (the stream may begin with "before", if that was the server's last operation)
    // WHEN the app works, over a restart of the daemon too
    wait_reason(&daemon, "refused").await;
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    daemon
        .wait_status("pendingDocuments", |n| {
            [1, 2].map(serde_json::Value::from).contains(n)
        })
        .await;
    daemon.restart().await;
    here.insert_one(doc! {"_id": 2}).await.unwrap();
    daemon
        .wait_status("pendingDocuments", |n| {
            [2, 3].map(serde_json::Value::from).contains(n)
        })
        .await;
    let answer = daemon
        .post("/api/sync/sync", serde_json::json!({}))
        .await
        .unwrap();
    assert_eq!(
        answer.status, 503,
        "a sync says that it can't: {}",
        answer.body
    );
    // THEN everything is synced when the link comes
    world.link.heal();
    converged_without_conflict(&world, &daemon).await;
    assert_eq!(there.count_documents(doc! {}).await.unwrap(), 4);
}

#[tokio::test]
async fn r20_a_link_that_returns_wakes_everything_and_is_a_run_of_its_own() {
    // GIVEN edits on both sides while the link is away
    let world = World::new("reconnect").await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    let logs = world.local.collection::<Document>("sync_logs");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    world.wait_converged(&daemon).await;
    for round in 0..3 {
        cut(&world, &daemon).await;
        set(&here, 1, doc! {"l": round}).await;
        set(&there, 1, doc! {"r": round}).await;
        daemon.wait_status("pendingDocuments", |n| *n == 1).await;
        // WHEN it is back, and no further write comes
        world.link.heal();
        // THEN both arrive
        wait_content(&here, 1, doc! {"_id": 1, "l": round, "r": round}).await;
        wait_content(&there, 1, doc! {"_id": 1, "l": round, "r": round}).await;
        // AND the run is on record
        wait_for("a run for each return", async || {
            let runs = logs.count_documents(doc! {"trigger": "reconnect"}).await;
            runs.unwrap() == u64::try_from(round).unwrap() + 1
        })
        .await;
    }
    let run = logs
        .find_one(doc! {"trigger": "reconnect"})
        .await
        .unwrap()
        .unwrap();
    assert_eq!(run.get_str("status").unwrap(), "completed", "{run}");
    converged_without_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn r20_a_half_open_link_is_a_timeout_and_heals() {
    let world = World::new("stalled").await;
    let daemon = world.start().await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    world.wait_converged(&daemon).await;
    // WHEN the line is dead but nobody says so
    world.link.set(Mode::Stall);
    wait_reason(&daemon, "timeout").await;
    here.insert_one(doc! {"_id": 2}).await.unwrap();
    there.insert_one(doc! {"_id": 3}).await.unwrap();
    // THEN it is noticed, and all is well when it lives again
    heal(&world, &daemon).await;
    converged_without_conflict(&world, &daemon).await;
}

/// A daemon that has another remote; it captures all the same.
async fn with_remote(world: &World, uri: &str) -> Daemon {
    world
        .start_with(world.settings().set("remote.uri", &format!("{uri:?}")))
        .await
}

#[tokio::test]
async fn r20_a_name_that_cant_be_resolved_is_dns() {
    for uri in [
        "mongodb://nowhere.invalid/?directConnection=true",
        "mongodb+srv://nowhere.invalid/",
    ] {
        let world = World::new("dns").await;
        // A resolver without a network takes its time.
        let settings = world
            .settings()
            .set("probe.interval", "\"10s\"")
            .set("probe.timeout", "\"10s\"")
            .set("remote.uri", &format!("{uri:?}"));
        let daemon = world.start_with(settings).await;
        wait_reason(&daemon, "dns").await;
    }
}

#[tokio::test]
async fn r20_a_standalone_remote_is_not_a_replica_set() {
    let dir = tempfile::tempdir().unwrap();
    let options = ServerOptions {
        set_name: None,
        ..ServerOptions::default()
    };
    let server = MongoServer::start_with(dir.path(), options).await.unwrap();
    let world = World::new("standalone_remote").await;
    let daemon = with_remote(&world, &server.direct_uri()).await;
    wait_reason(&daemon, "not_a_replica_set").await;
}

async fn server_with_users(dir: &tempfile::TempDir) -> MongoServer {
    let options = ServerOptions {
        auth: Some(("admin".into(), "right-secret".into())),
        ..ServerOptions::default()
    };
    MongoServer::start_with(dir.path(), options).await.unwrap()
}

#[tokio::test]
async fn r20_a_wrong_remote_password_is_bad_credentials_until_it_is_right() {
    // GIVEN a remote with users, and a link to it
    let dir = tempfile::tempdir().unwrap();
    let server = server_with_users(&dir).await;
    let link = FaultLink::open(server.address()).await.unwrap();
    let world = World::new("credentials").await;
    let mut daemon = with_remote(&world, &link.uri_as("admin", "wrong-secret")).await;
    wait_reason(&daemon, "bad_credentials").await;
    let (here, _) = both(&world, "c");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    daemon.wait_status("pendingDocuments", |n| *n == 1).await;
    // WHEN it is corrected
    let uri = link.uri_as("admin", "right-secret");
    daemon.settings = daemon
        .settings
        .clone()
        .set("remote.uri", &format!("{uri:?}"));
    daemon.restart().await;
    // THEN what waited is sent, and no secret was ever written down (R23)
    let there = server
        .client()
        .await
        .unwrap()
        .database(&world.name)
        .collection("c");
    wait_content(&there, 1, doc! {"_id": 1}).await;
    let status = daemon.status().await.unwrap().to_string();
    for secret in ["wrong-secret", "right-secret"] {
        assert!(!daemon.log().contains(secret) && !status.contains(secret));
    }
}

/// A port that does something with each connection; its address.
async fn port(answer: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(answer).await;
        }
    });
    address.to_string()
}

#[tokio::test]
async fn r20_what_speaks_no_tls_is_tls() {
    let world = World::new("tls").await;
    let address = port(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    let daemon = with_remote(
        &world,
        &format!("mongodb://{address}/?tls=true&directConnection=true"),
    )
    .await;
    wait_reason(&daemon, "tls").await;
}

#[tokio::test]
async fn r20_the_local_server_away_at_the_start_is_waited_for() {
    // GIVEN a local server that is not there yet
    let mut world = World::with_own_servers("local_away").await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    world.own_servers().local.stop().await.unwrap();
    let daemon = Daemon::spawn(&world, world.settings());
    // THEN the daemon says so, is alive and not ready
    daemon
        .wait_status("notices", |n| {
            n.to_string().contains("waiting for the local database")
        })
        .await;
    assert_eq!(daemon.get("/healthz").await.unwrap().status, 200);
    assert_eq!(daemon.get("/readyz").await.unwrap().status, 503);
    // WHEN it comes THEN all is well
    world.own_servers().local.restart().await.unwrap();
    daemon.wait_ready().await;
    converged_without_conflict(&world, &daemon).await;
    wait_content(&there, 1, doc! {"_id": 1}).await;
}

#[tokio::test]
async fn r20_the_local_server_away_in_the_middle_is_waited_for() {
    // GIVEN a daemon at work whose local server dies
    let mut world = World::with_own_servers("local_dies").await;
    let mut daemon = world.start().await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    world.wait_converged(&daemon).await;
    world.own_servers().local.kill9().unwrap();
    daemon.wait_status("isCapturing", |v| *v == false).await;
    // WHEN the remote goes on
    there.insert_one(doc! {"_id": 2}).await.unwrap();
    set(&there, 1, doc! {"v": 1}).await;
    daemon.wait_status("pendingInbox", |n| *n == 2).await;
    assert!(daemon.exit_status().is_none());
    // What can't be answered says whose fault it is.
    let away = daemon.get("/api/sync/logs").await.unwrap();
    let why = away.body["detail"].as_str().unwrap();
    assert_eq!(away.status, 503, "{why}");
    assert!(
        why.contains("local database") && !why.contains("remote"),
        "{why}"
    );
    let run = daemon.post("/api/sync/sync", serde_json::json!({})).await;
    let run = run.unwrap();
    let why = run.body["detail"].as_str().unwrap();
    assert_eq!(run.status, 503, "{why}");
    assert!(
        why.contains("local database") && !why.contains("remote"),
        "{why}"
    );
    world.own_servers().local.restart().await.unwrap();
    // THEN what came meanwhile arrives
    wait_content(&here, 2, doc! {"_id": 2}).await;
    converged_without_conflict(&world, &daemon).await;
}

/// Starts the daemon and expects it to refuse with exit code 78 and these words.
async fn refused(world: &World, settings: Settings, words: &[&str]) {
    Daemon::spawn(world, settings).refuses(words).await;
}

#[tokio::test]
async fn a_standalone_local_server_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let options = ServerOptions {
        set_name: None,
        ..ServerOptions::default()
    };
    let server = MongoServer::start_with(dir.path(), options).await.unwrap();
    let world = World::new("standalone").await;
    let settings = world
        .settings()
        .set("local.uri", &format!("{:?}", server.uri()));
    refused(&world, settings, &["--replSet rs0", "rs.initiate()"]).await;
}

#[tokio::test]
async fn a_wrong_local_password_is_refused_and_not_told() {
    let dir = tempfile::tempdir().unwrap();
    let server = server_with_users(&dir).await;
    let world = World::new("local_password").await;
    let uri = server.uri().replace("right-secret", "wrong-secret");
    let settings = world
        .settings()
        .label("wrong")
        .set("local.uri", &format!("{uri:?}"));
    let mut daemon = Daemon::spawn(&world, settings);
    daemon.refuses(&["user or password"]).await;
    assert!(!daemon.log().contains("wrong-secret"));
}

#[tokio::test]
async fn a_second_daemon_on_the_same_state_is_refused_and_disturbs_nothing() {
    let world = World::new("second").await;
    let daemon = world.start().await;
    let (here, _) = both(&world, "c");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    // The same state, but a configuration and a port of its own.
    let state = format!("{:?}", daemon.state_dir());
    let second = world.settings().label("second").set("state_dir", &state);
    refused(&world, second, &["state"]).await;
    here.insert_one(doc! {"_id": 2}).await.unwrap();
    converged_without_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn a_damaged_state_file_is_put_aside_and_nothing_is_lost() {
    for damage in ["cut", "garbled", "empty"] {
        // GIVEN work that was done while the daemon was away, and a damaged state file
        let world = World::new(damage).await;
        let mut daemon = world.start().await;
        let (here, there) = both(&world, "c");
        here.insert_many((0..200).map(|i| doc! {"_id": i, "v": 0, "pad": "x".repeat(200)}))
            .await
            .unwrap();
        world.wait_converged(&daemon).await;
        assert!(daemon.terminate().await.success());
        here.insert_one(doc! {"_id": "l"}).await.unwrap();
        there.insert_one(doc! {"_id": "r"}).await.unwrap();
        let file = daemon.state_dir().join("sangam.db");
        let state = rusqlite::Connection::open(&file).unwrap();
        let whole = state.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |r| {
            r.get::<_, i32>(0)
        });
        assert_eq!(whole.unwrap(), 0, "everything is in the one file");
        drop(state);
        let mut bytes = std::fs::read(&file).unwrap();
        match damage {
            "cut" => bytes.truncate(bytes.len() / 2),
            "empty" => bytes.clear(),
            _ => bytes.iter_mut().skip(100).for_each(|b| *b = !*b),
        }
        std::fs::write(&file, bytes).unwrap();
        daemon.restart().await;
        // THEN it is kept aside and named, and a comparison finds everything
        converged_without_conflict(&world, &daemon).await;
        assert_eq!(there.count_documents(doc! {}).await.unwrap(), 202);
        if damage != "empty" {
            let status = daemon.status().await.unwrap();
            assert!(
                status["notices"].to_string().contains("put aside as"),
                "{status}"
            );
            let aside = std::fs::read_dir(daemon.state_dir()).unwrap();
            let aside = aside.filter(|f| {
                f.as_ref()
                    .unwrap()
                    .file_name()
                    .to_string_lossy()
                    .contains("damaged")
            });
            assert!(aside.count() >= 1);
        }
    }
}

#[tokio::test]
async fn without_a_remote_it_queues_and_says_so() {
    // GIVEN no remote at all
    let world = World::new("no_remote").await;
    let mut daemon = world.start_with(world.settings().unset("remote.uri")).await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    let status = wait_until(crate::common::SOON, "queued", async || {
        let status = daemon.status().await?;
        (status["pendingDocuments"] == 1)
            .then_some(status.clone())
            .ok_or_else(|| status.to_string())
    })
    .await;
    assert_eq!(status["isConfigured"], false);
    assert!(
        status["notices"]
            .to_string()
            .contains("remote database not configured"),
        "{status}"
    );
    let answer = daemon
        .post("/api/sync/sync", serde_json::json!({}))
        .await
        .unwrap();
    assert_eq!(answer.status, 503, "{}", answer.body);
    // WHEN one is configured THEN all is synced
    daemon.settings = world.settings();
    daemon.restart().await;
    wait_content(&there, 1, doc! {"_id": 1}).await;
    converged_without_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn paused_it_queues_and_resumed_it_goes_on() {
    let world = World::new("paused").await;
    let mut daemon = world.start().await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    world.wait_converged(&daemon).await;
    dealt_with(&daemon).await;
    // GIVEN a pause, which outlives a restart
    daemon
        .post("/api/sync/pause", serde_json::json!({}))
        .await
        .unwrap();
    daemon.restart().await;
    // WHEN both sides change
    set(&here, 1, doc! {"l": 1}).await;
    set(&there, 1, doc! {"r": 1}).await;
    daemon.wait_status("pendingDocuments", |n| *n == 1).await;
    daemon.wait_status("pendingInbox", |n| *n == 1).await;
    assert_eq!(there.count_documents(doc! {"l": 1}).await.unwrap(), 0);
    for order in ["sync", "reconcile"] {
        let path = format!("/api/sync/{order}");
        let refused = daemon.post(&path, serde_json::json!({})).await.unwrap();
        let why = refused.body["detail"].as_str().unwrap().to_owned();
        assert_eq!(refused.status, 409, "{order}: {why}");
        assert!(why.contains("sangam resume"), "{order}: {why}");
    }
    // THEN nothing is moved until it is resumed
    daemon
        .post("/api/sync/resume", serde_json::json!({}))
        .await
        .unwrap();
    converged_without_conflict(&world, &daemon).await;
    wait_content(&here, 1, doc! {"_id": 1, "l": 1, "r": 1}).await;
}
