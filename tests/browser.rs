//! The dashboard in a real browser, over two real databases and a link that breaks.
//!
//! `tests/browser/dashboard.mjs` drives the browser and says in JSON lines what it wants done to the
//! databases and the link. Ignored by a plain `cargo test`, since it needs Node and Chromium:
//! `.ci/browser` fetches what is missing and runs it.

#![allow(clippy::unwrap_used)] // clippy sees only the functions marked #[test] as tests

mod common;

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::time::Duration;

use chrono::Utc;
use common::{Daemon, Settings, World, wait_until};
use mongodb::Database;
use mongodb::bson::{Bson, Document};
use sangam::history::{self, Sample};
use sangam::store::Store;
use serde_json::{Value, json};

const TOKEN: &str = "a-token-for-the-browser";

/// A day as a temple has it, with an outage in the night: charts are drawn from something.
async fn with_a_past(world: &World) {
    let store = Store::open(&world.dir().join("state")).unwrap();
    let now = Utc::now().timestamp();
    let sample = move |minute: i64| {
        let hour = (minute / 60) % 24;
        let away = (1040..1230).contains(&minute);
        let busy = if (6..20).contains(&hour) { 1 } else { 0 };
        let wave = u64::try_from((minute * 7919) % 11).unwrap();
        let queued = if away {
            u64::try_from(minute - 1040).unwrap() * 3
        } else {
            wave / 8
        };
        let caught_up = u64::from((1230..1234).contains(&minute)) * 150;
        Sample {
            at: now - 86_400 + minute * 60,
            outbox: queued,
            inbox: wave / 9,
            lag: if away {
                (minute - 1040) as f64 * 60.0
            } else {
                wave as f64 / 10.0
            },
            sent: if away { 0 } else { busy * wave + caught_up },
            fetched: if away { 0 } else { busy * (wave / 2) },
            ..Sample::default()
        }
    };
    let outage = [
        (-400_000, 1, None),
        (-21_600, 0, Some("dns")),
        (-10_200, 1, None),
    ];
    let written = store.call(move |c| {
        for minute in 0..1436 {
            history::add(c, &sample(minute))?;
        }
        for (ago, online, reason) in outage {
            c.execute(
                "INSERT INTO link_history(at, online, reason) VALUES(?, ?, ?)",
                (now + ago, online, reason),
            )?;
        }
        Ok(())
    });
    written.await.unwrap();
}

fn documents(value: &Value) -> Vec<Document> {
    let each = value.as_array().into_iter().flatten();
    each.map(document).collect()
}

fn document(value: &Value) -> Document {
    match Bson::try_from(value.clone()).unwrap() {
        Bson::Document(d) => d,
        other => panic!("{other} is no document"),
    }
}

/// Settings of one of two daemons on the pair, which shares the work with the other.
fn settings(world: &World, name: &str) -> Settings {
    world
        .settings()
        .token(TOKEN)
        .set("log.level", "\"info\"")
        .set("ha.enabled", "true")
        .set("ha.name", &format!("{name:?}"))
}

fn address(daemon: &Daemon) -> String {
    format!("http://localhost:{}", daemon.settings.api_port())
}

/// What the script plays with.
struct Stage {
    world: World,
    office: Daemon,
    attic: Option<Daemon>,
}

/// Does what the script asks for; the answer.
async fn carry_out(stage: &mut Stage, wish: &Value) -> Result<Value, String> {
    let world = &stage.world;
    let text = |name: &str| wish[name].as_str().unwrap_or_default();
    let db: &Database = match text("side") {
        "remote" => &world.remote,
        _ => &world.local,
    };
    let coll = db.collection::<Document>(text("coll"));
    let failed = |e: mongodb::error::Error| e.to_string();
    match text("do") {
        "cut" => world.link.cut(),
        "heal" => world.link.heal(),
        "insert" => {
            let docs = documents(&wish["docs"]);
            coll.insert_many(docs).await.map_err(failed)?;
        }
        "update" => {
            let (filter, change) = (document(&wish["filter"]), document(&wish["change"]));
            coll.update_many(filter, change).await.map_err(failed)?;
        }
        "find" => {
            let found = coll.find_one(document(&wish["filter"])).await;
            return Ok(json!(
                found
                    .map_err(failed)?
                    .map(|d| Bson::from(d).into_relaxed_extjson())
            ));
        }
        "equal" => {
            wait_until(Duration::from_secs(60), "both sides equal", async || {
                let found = world.compare().await.map_err(|e| format!("{e:#}"))?;
                found
                    .is_equal()
                    .then_some(())
                    .ok_or_else(|| common::describe(&found))
            })
            .await;
        }
        "status" => return stage.office.status().await,
        "second" => {
            let settings = settings(world, "attic").label("attic");
            let attic = world.start_with(settings).await;
            return Ok(json!(address(stage.attic.insert(attic))));
        }
        "stop" => {
            assert!(stage.office.terminate().await.success());
        }
        "start" => stage.office.restart().await,
        "stop the second" => {
            let mut attic = stage.attic.take().ok_or("there is no second one")?;
            assert!(attic.terminate().await.success());
            assert!(!attic.log().contains(TOKEN), "the token is in the log");
        }
        other => return Err(format!("unknown wish {other}")),
    }
    Ok(Value::Null)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Node and Chromium; .ci/browser runs it"]
async fn the_dashboard_in_a_browser() {
    let world = World::new("temple").await;
    with_a_past(&world).await;
    let office = world.start_with(settings(&world, "office")).await;
    let mut stage = Stage {
        world,
        office,
        attic: None,
    };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/browser/dashboard.mjs");
    let mut node = Command::new("node")
        .arg(script)
        .arg(address(&stage.office))
        .arg(TOKEN)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("node runs");
    let mut input = node.stdin.take().unwrap();
    let output = BufReader::new(node.stdout.take().unwrap());
    let mut lines = output.lines();
    loop {
        // Reading blocks this thread alone; the others go on.
        let (line, rest) = tokio::task::spawn_blocking(move || (lines.next(), lines))
            .await
            .unwrap();
        lines = rest;
        let Some(line) = line else { break };
        let line = line.unwrap();
        let Ok(wish) = serde_json::from_str::<Value>(&line) else {
            println!("{line}");
            continue;
        };
        let answer = match carry_out(&mut stage, &wish).await {
            Ok(value) => json!({ "ok": value }),
            Err(error) => json!({ "error": error }),
        };
        writeln!(input, "{answer}").unwrap();
    }
    let status = node.wait().unwrap();
    assert!(status.success(), "the browser's part failed: {status}");
    assert!(
        !stage.office.log().contains(TOKEN),
        "the token is in the log"
    );
}
