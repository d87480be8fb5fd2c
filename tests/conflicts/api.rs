//! Conflicts and configuration over HTTP: shapes, errors, roles, pages, what a restart keeps.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::common::{Daemon, SOON, World, wait_until};
use mongodb::bson::{Document, doc, oid::ObjectId};
use serde_json::{Value, json};

/// Gives both sides other versions of `count` documents while nothing moves.
async fn clashes(world: &World, daemon: &Daemon, count: i32) {
    daemon.post("/api/sync/pause", json!({})).await.unwrap();
    for (db, v) in [(&world.local, "here"), (&world.remote, "there")] {
        let docs = (0..count).map(|i| doc! {"_id": i, "v": v, "w": 1, "updatedBy": "asha"});
        db.collection("c").insert_many(docs).await.unwrap();
    }
    daemon.post("/api/sync/resume", json!({})).await.unwrap();
    let limit = Duration::from_secs(120);
    daemon
        .wait_status_within(limit, "unresolvedConflicts", |v| v == &json!(count))
        .await;
}

async fn list(daemon: &Daemon, query: &str) -> Vec<Value> {
    let answer = daemon
        .get(&format!("/api/sync/conflicts{query}"))
        .await
        .unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.body.as_array().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_has_the_agreed_names_and_the_detail_says_what_each_strategy_does() {
    let world = World::new("api_shape").await;
    let daemon = world.start().await;
    clashes(&world, &daemon, 1).await;
    let one = wait_until(SOON, "it is listed", async || {
        list(&daemon, "?resolved=false")
            .await
            .pop()
            .ok_or_else(|| "none".to_owned())
    })
    .await;
    for (name, want) in [
        ("collection", json!("c")),
        ("kind", json!("insert_insert")),
        ("localId", json!(0)),
        ("remoteId", json!(0)),
        ("field", json!("v")),
        ("localValue", json!("here")),
        ("remoteValue", json!("there")),
        ("resolved", json!(false)),
        ("resolutionStrategy", json!(null)),
        ("resolvedAt", json!(null)),
        ("resolvedBy", json!(null)),
        ("baseDocument", json!(null)),
    ] {
        assert_eq!(one[name], want, "{name}: {one}");
    }
    assert!(one["timestamp"].as_str().unwrap().ends_with('Z') && one["notes"].is_string());
    assert_eq!(
        (&one["localDocument"]["v"], &one["remoteDocument"]["v"]),
        (&json!("here"), &json!("there"))
    );

    let id = one["_id"].as_str().unwrap();
    let detail = daemon
        .get(&format!("/api/sync/conflicts/{id}"))
        .await
        .unwrap()
        .body;
    let field = |name: &str| {
        detail["fields"]
            .as_array()
            .unwrap()
            .iter()
            .find(|f| f["name"] == name)
            .cloned()
            .unwrap()
    };
    assert_eq!(
        (&field("v")["differs"], &field("w")["differs"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(detail["changes"]["local"]["by"], "asha");
    let strategies = detail["strategies"].as_array().unwrap();
    let of = |name: &str| strategies.iter().find(|s| s["strategy"] == name).unwrap();
    assert_eq!(of("keep_remote")["result"]["document"]["v"], "there");
    assert_eq!(of("merge")["result"]["document"]["v"], "here");
    assert_eq!(of("rename_local")["possible"], false);
    assert!(
        detail["recommendations"][0]["command"]
            .as_str()
            .unwrap()
            .contains(id)
    );

    let path = format!("/api/sync/conflicts/{id}/resolve");
    for (body, status) in [
        (json!({}), 400),
        (json!([]), 400),
        (json!({"strategy": "best"}), 400),
        (json!({"strategy": "keep_local", "newvalue": 1}), 400),
        (json!({"strategy": "keep_local", "newValue": 1}), 400),
        (json!({"strategy": "rename_local", "newValue": "x"}), 400),
        (json!({"strategy": "merge", "newValue": {"a": 1}}), 400),
        (
            json!({"strategy": "keep_local", "notes": "x".repeat(5000)}),
            400,
        ),
        (
            json!({"strategy": "keep_local", "version": "0000000000000000"}),
            409,
        ),
    ] {
        let answer = daemon.post(&path, body.clone()).await.unwrap();
        assert_eq!(answer.status, status, "{body}: {}", answer.body);
        assert!(answer.body["detail"].is_string());
    }
    for (path, status) in [
        ("/api/sync/conflicts/nonsense", 404),
        (&format!("/api/sync/conflicts/{}", ObjectId::new()), 404),
        ("/api/sync/conflicts?limit=0", 400),
        ("/api/sync/conflicts?limit=1001", 400),
        ("/api/sync/conflicts?resolved=maybe", 400),
        ("/api/sync/conflicts?after=x", 400),
        ("/api/sync/conflicts?kind=x", 400),
        ("/api/sync/conflicts?colection=c", 400),
    ] {
        assert_eq!(daemon.get(path).await.unwrap().status, status, "{path}");
    }
    let unknown = format!("/api/sync/conflicts/{}/resolve", ObjectId::new());
    let answer = daemon
        .post(&unknown, json!({"strategy": "keep_local"}))
        .await
        .unwrap();
    assert_eq!(answer.status, 404);
    let bulk = daemon
        .post("/api/sync/conflicts/resolve", json!({"strategy": "merge"}))
        .await
        .unwrap();
    assert_eq!(bulk.status, 400, "a filter is needed");

    let done = daemon
        .post(&path, json!({"strategy": "keep_remote", "notes": "hers"}))
        .await
        .unwrap();
    for name in [
        "success",
        "message",
        "conflict_id",
        "resolved_by",
        "resolved_at",
    ] {
        assert!(!done.body[name].is_null(), "{name}: {}", done.body);
    }
    let after = list(&daemon, "?resolved=true&collection=c").await.remove(0);
    assert_eq!(
        (&after["resolvedBy"], &after["notes"]),
        (&json!("api"), &json!("hers"))
    );
    assert_eq!(
        list(&daemon, "?resolved=true&collection=other").await.len(),
        0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_open_conflicts_stay_quick() {
    const COUNT: i32 = 10_000;
    let world = World::new("ten_thousand").await;
    let daemon = world
        .start_with(world.settings().set("log.level", "\"info\""))
        .await;
    clashes(&world, &daemon, COUNT).await;
    wait_until(Duration::from_secs(60), "all are on record", async || {
        let logs = world.local.collection::<Document>("conflict_logs");
        let count = logs.count_documents(doc! {}).await.unwrap();
        (count == 10_000).then_some(()).ok_or(format!("{count}"))
    })
    .await;
    let before = memory(&daemon);
    let began = Instant::now();
    let (mut after, mut middle) = (String::new(), String::new());
    let mut seen = std::collections::HashSet::new();
    loop {
        let page = list(&daemon, &format!("?resolved=false&limit=1000{after}")).await;
        let Some(last) = page.last() else { break };
        after = format!("&after={}", last["_id"].as_str().unwrap());
        if seen.len() == 5000 {
            middle.clone_from(&after);
        }
        seen.extend(page.iter().map(|c| c["_id"].as_str().unwrap().to_owned()));
    }
    let listed = began.elapsed();
    assert_eq!(seen.len(), 10_000, "each once");
    let began = Instant::now();
    let looked_at = looked_at(&world, async {
        let after = format!("?resolved=false&limit=50{middle}");
        assert_eq!(list(&daemon, &after).await.len(), 50);
    })
    .await;
    // A page costs what is on it, wherever it is.
    assert!(looked_at <= 51, "{looked_at} records read for a page of 50");
    let page = began.elapsed();
    let began = Instant::now();
    let bulk = json!({"strategy": "keep_local", "collection": "c", "max": 500});
    let answer = daemon
        .post("/api/sync/conflicts/resolve", bulk)
        .await
        .unwrap();
    assert_eq!(answer.body["resolved"], 500, "{}", answer.body);
    let bulk = began.elapsed();
    let began = Instant::now();
    let auto = daemon
        .post("/api/sync/conflicts/auto-resolve", json!({}))
        .await
        .unwrap();
    assert_eq!(auto.body["skipped"], 9500, "{}", auto.body["results"][0]);
    assert!(auto.body.get("next").is_none(), "there is nothing behind");
    in_slices(&daemon).await;
    let grown = memory(&daemon).saturating_sub(before);
    println!(
        "all listed {listed:?}, a page of 50 {page:?}, 500 resolved {bulk:?}, 9500 looked at by auto-resolve {:?}, {grown} KiB more",
        began.elapsed()
    );
    assert!(grown < 150 * 1024, "{grown} KiB");
}

/// What is left open in one slice does not come up in the next one.
async fn in_slices(daemon: &Daemon) {
    let mut seen = BTreeSet::new();
    let mut body = json!({"max": 10});
    for _ in 0..3 {
        let path = "/api/sync/conflicts/auto-resolve";
        let answer = daemon.post(path, body.clone()).await.unwrap();
        for one in answer.body["results"].as_array().unwrap() {
            let id = one["conflict_id"].as_str().unwrap().to_owned();
            assert!(seen.insert(id), "seen twice: {one}");
        }
        body["after"] = answer.body["next"].clone();
    }
    assert_eq!(seen.len(), 30);
    let nonsense = json!({"after": "behind the moon"});
    let answer = daemon.post("/api/sync/conflicts/auto-resolve", nonsense);
    assert_eq!(answer.await.unwrap().status, 400);
}

/// How many records the server reads from `conflict_logs` to find what is asked meanwhile.
async fn looked_at(world: &World, asked: impl Future<Output = ()>) -> i64 {
    let profile = |level: i32| world.local.run_command(doc! {"profile": level});
    profile(2).await.unwrap();
    asked.await;
    profile(0).await.unwrap();
    let found = world
        .local
        .collection::<Document>("system.profile")
        .find_one(doc! {"command.find": "conflict_logs"})
        .await
        .unwrap()
        .expect("the list asks by `find`");
    let number = found.get("docsExamined").unwrap();
    number.as_i64().or(number.as_i32().map(i64::from)).unwrap()
}

/// Highest resident memory of the daemon so far, KiB.
fn memory(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_change_at_once_and_survive_a_restart() {
    let world = World::new("api_config").await;
    let mut daemon = world.start().await;
    let bad = daemon
        .put(
            "/api/sync/config",
            json!({"batchSize": 5, "maxRetries": "x"}),
        )
        .await
        .unwrap();
    assert_eq!(bad.status, 400);
    assert!(bad.body["detail"].as_str().unwrap().contains("maxRetries"));
    let change = json!({"batchSize": 7, "conflictResolutionStrategy": "local_wins", "syncIntervalMinutes": 2.5});
    let answer = daemon.put("/api/sync/config", change).await.unwrap();
    assert_eq!(
        (answer.status, &answer.body["batchSize"]),
        (200, &json!(7)),
        "{}",
        answer.body
    );
    for round in 0..2 {
        let now = daemon.get("/api/sync/config").await.unwrap().body;
        assert_eq!(now["batchSize"], 7, "{round}");
        assert_eq!(now["conflictResolutionStrategy"], "local_wins");
        assert_eq!(now["syncIntervalMinutes"], 2.5);
        assert_eq!(now["changedHere"].as_array().unwrap().len(), 3);
        let id = round;
        daemon.post("/api/sync/pause", json!({})).await.unwrap();
        world
            .local
            .collection("c")
            .insert_one(doc! {"_id": id, "v": 1})
            .await
            .unwrap();
        world
            .remote
            .collection("c")
            .insert_one(doc! {"_id": id, "v": 2})
            .await
            .unwrap();
        daemon.post("/api/sync/resume", json!({})).await.unwrap();
        world.wait_converged(&daemon).await;
        let kept = world
            .remote
            .collection::<Document>("c")
            .find_one(doc! {"_id": id})
            .await
            .unwrap();
        assert_eq!(
            kept.unwrap().get_i32("v").unwrap(),
            1,
            "the new policy is in force"
        );
        daemon.restart().await;
    }
    let record = wait_until(SOON, "sync_config", async || {
        let found = world
            .local
            .collection::<Document>("sync_config")
            .find_one(doc! {})
            .await
            .unwrap();
        found.ok_or_else(|| "nothing".to_owned())
    })
    .await;
    assert_eq!(
        record.get_str("conflictResolutionStrategy").unwrap(),
        "local_wins"
    );
    let back = daemon
        .put("/api/sync/config", json!({"batchSize": null}))
        .await
        .unwrap();
    assert_eq!(back.body["batchSize"], 1000);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_have_names_and_roles() {
    let world = World::new("api_tokens").await;
    let settings = world
        .settings()
        .set("api.tokens.reader.token", "\"r\"")
        .set("api.tokens.reader.role", "\"read\"")
        .set("api.tokens.priya.token", "\"p\"");
    let settings = settings
        .token("boss")
        .set("api.tokens.reader.token", "\"r\"");
    let daemon = world.start_with(settings.clone()).await;
    let ask = async |token: &str, method: &str, path: &str| {
        let port = daemon.settings.api_port();
        let body = Some(json!({}));
        let body = if method == "GET" { None } else { body };
        crate::common::api::request(port, method, path, body, Some(token))
            .await
            .unwrap()
            .status
    };
    let path = "/api/sync/pause";
    let config = "/api/sync/config";
    for (token, method, path, status) in [
        ("r", "GET", "/api/sync/conflicts", 200),
        ("r", "POST", path, 403),
        ("p", "POST", path, 200),
        ("p", "PUT", config, 403),
        ("boss", "PUT", config, 200),
        ("x", "GET", "/api/sync/conflicts", 401),
    ] {
        assert_eq!(
            ask(token, method, path).await,
            status,
            "{token} {method} {path}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_description_covers_every_route() {
    let world = World::new("api_openapi").await;
    let daemon = world.start().await;
    let api = daemon.get("/openapi.json").await.unwrap().body;
    assert!(api["openapi"].as_str().unwrap().starts_with("3."));
    for (path, methods) in [
        ("/api/sync/sync", vec!["post"]),
        ("/api/sync/status", vec!["get"]),
        ("/api/sync/network-status", vec!["get"]),
        ("/api/sync/logs", vec!["get"]),
        ("/api/sync/queue", vec!["get"]),
        ("/api/sync/pause", vec!["post"]),
        ("/api/sync/resume", vec!["post"]),
        ("/api/sync/reconcile", vec!["post"]),
        ("/api/sync/config", vec!["get", "put"]),
        ("/api/sync/conflicts", vec!["get"]),
        ("/api/sync/conflicts/{id}", vec!["get"]),
        ("/api/sync/conflicts/{id}/resolve", vec!["post"]),
        ("/api/sync/conflicts/{id}/undo", vec!["post"]),
        ("/api/sync/conflicts/resolve", vec!["post"]),
        ("/api/sync/conflicts/auto-resolve", vec!["post"]),
        ("/healthz", vec!["get"]),
        ("/readyz", vec!["get"]),
        ("/metrics", vec!["get"]),
        ("/api/sync/session", vec!["get"]),
        ("/api/sync/overview", vec!["get"]),
        ("/api/sync/collections", vec!["get"]),
        ("/api/sync/history", vec!["get"]),
        ("/api/sync/events", vec!["get"]),
    ] {
        for method in methods {
            assert!(api["paths"][path][method].is_object(), "{method} {path}");
        }
    }
    let text = api.to_string();
    for name in ["SyncRun", "Status", "Resolution", "Many", "Problem"] {
        assert!(api["components"]["schemas"][name].is_object(), "{name}");
    }
    // Every reference leads somewhere.
    for part in text.split("#/components/schemas/").skip(1) {
        let name: String = part
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect();
        assert!(api["components"]["schemas"][&name].is_object(), "{name}");
    }
}
