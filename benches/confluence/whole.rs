//! The two databases whole: the first sync of equal ones, going on after a kill, and reconcile.

use std::time::{Duration, Instant};

use mongodb::Database;
use mongodb::bson::{Document, RawDocumentBuf, doc};
use sangam::faultlink::Way;

use crate::bare;
use crate::common::{Daemon, World, wait_until, yet};
use crate::drain::first_sync;
use crate::meter::{self, log_level};
use crate::table::{Rate, Table, Target};

const LONG: Duration = Duration::from_secs(1800);

/// The same bookings on both sides.
async fn both_filled(test: &str, count: usize) -> World {
    let world = World::with_oplogs(test, 256).await;
    for start in (0..count).step_by(bare::BATCH) {
        let end = (start + bare::BATCH).min(count);
        let docs: Vec<Document> = (start..end).map(bare::booking).collect();
        let into = |db: &Database| db.collection::<Document>("bookings");
        let (here, there) = (into(&world.local), into(&world.remote));
        let (a, b) = tokio::join!(here.insert_many(&docs), there.insert_many(&docs));
        a.expect("inserted here");
        b.expect("inserted there");
    }
    world
}

/// Reads everything with the driver and does nothing with it.
async fn read_bare(db: &Database) -> Rate {
    let began = Instant::now();
    let all = db.collection::<RawDocumentBuf>("bookings");
    let mut cursor = all
        .find(doc! {})
        .sort(doc! {"_id": 1})
        .await
        .expect("a cursor");
    let mut documents = 0;
    while cursor.advance().await.expect("a document") {
        documents += 1;
    }
    Rate {
        documents,
        took: began.elapsed(),
    }
}

fn since(now: [Duration; 2], then: [Duration; 2]) -> [Duration; 2] {
    [
        now[0].saturating_sub(then[0]),
        now[1].saturating_sub(then[1]),
    ]
}

fn crossed(world: &World) -> u64 {
    world.link.bytes(Way::Up) + world.link.bytes(Way::Down)
}

/// Waits until the comparison has got so far; how far it is.
async fn compared(daemon: &Daemon, least: u64) -> u64 {
    wait_until(LONG, "it compares", async || {
        let status = daemon.status().await?;
        match status["progress"]["documents"].as_u64() {
            Some(n) if n >= least => Ok(n),
            n => Err(format!("{n:?}")),
        }
    })
    .await
}

/// First sync of equal databases: against reading both bare, and killed half-way.
pub(crate) async fn first(table: &mut Table, scale: f64) {
    let count = (1_000_000.0 * scale) as usize;
    let world = both_filled("first", count).await;
    let case = format!("first sync of {count} equal documents");
    let there = bare::compressed(&world.link.uri()).await;
    let there = there.database(&world.name);
    let servers = || {
        let servers = world.servers();
        [&servers.local, &servers.remote].map(|s| meter::cpu(s.pid().expect("it runs")))
    };
    let idle = servers();
    let before = [read_bare(&world.local).await, read_bare(&there).await];
    let bare = since(servers(), idle);
    let (here_too, there_too) = tokio::join!(read_bare(&world.local), read_bare(&there));
    let settings = world.settings().set("log.level", &log_level());
    let idle = servers();
    let (began, bytes) = (Instant::now(), crossed(&world));
    let mut daemon = world.start_with(settings.clone()).await;
    let pid = daemon.pid();
    first_sync(&daemon).await;
    let ours = Rate {
        documents: count as u64,
        took: began.elapsed(),
    };
    let bytes = crossed(&world) - bytes;
    let (cpu, memory) = (meter::cpu(pid), meter::memory(pid).1);
    let busy = since(servers(), idle);
    let state: u64 = ["sangam.db", "sangam.db-wal"]
        .map(|name| std::fs::metadata(daemon.state_dir().join(name)).map_or(0, |m| m.len()))
        .iter()
        .sum();
    table.note(
        format!("{case}: state file"),
        format!("{:.0} B a document", state as f64 / count as f64),
    );
    daemon.kill9();
    let after = [read_bare(&world.local).await, read_bare(&there).await];
    let (local, remote) = (before[0] + after[0], before[1] + after[1]);
    table.note(
        format!("{case}: bare reads of local, of remote, before and after"),
        format!("{local}, {remote}"),
    );
    table.ratio(
        format!("{case}, against the slower bare read"),
        ours,
        local.slower(remote),
        Target::AtLeast(0.5),
    );
    table.ratio(
        format!("{case}, against the slower bare read when both sides are read at once"),
        ours,
        here_too.slower(there_too),
        Target::AtLeast(0.5),
    );
    let both = Rate {
        documents: local.documents,
        took: local.took + remote.took,
    };
    table.ratio(
        format!("{case}, against one bare read after the other"),
        ours,
        both,
        Target::None,
    );
    let each = |cpu: Duration| cpu.as_secs_f64() * 1e6 / count as f64;
    table.note(
        format!("{case}: CPU of daemon, local server, remote server"),
        format!(
            "{:.1}, {:.1}, {:.1} µs a document",
            each(cpu),
            each(busy[0]),
            each(busy[1])
        ),
    );
    table.note(
        format!("{case}: CPU of local server, of remote server for the bare reads"),
        format!("{:.1}, {:.1} µs a document", each(bare[0]), each(bare[1])),
    );
    table.note(
        format!("{case}: bytes over the link"),
        format!("{:.0} B a document", bytes as f64 / count as f64),
    );
    table.figure(
        format!("{case}: highest memory"),
        memory,
        "MB",
        Target::Below(200.0),
    );
    // Killed half-way, with a state of its own.
    let mut daemon = world.start_with(settings.label("killed")).await;
    let done = compared(&daemon, count as u64 / 2).await;
    daemon.kill9();
    daemon.restart().await;
    let from = compared(&daemon, 1).await;
    first_sync(&daemon).await;
    let share = |n: u64| n as f64 * 100.0 / count as f64;
    table.figure(
        format!("{case}, killed at {:.0} %: done anew", share(done)),
        share(done.saturating_sub(from)),
        "%",
        Target::Below(5.0),
    );
}

/// First sync of a collection, and of one ten times as large.
pub(crate) async fn growth(table: &mut Table, scale: f64) {
    let mut rates = Vec::new();
    for count in [100_000.0, 1_000_000.0] {
        let count = (count * scale) as usize;
        let world = both_filled("growth", count).await;
        let settings = world.settings().set("log.level", &log_level());
        let began = Instant::now();
        let daemon = world.start_with(settings).await;
        first_sync(&daemon).await;
        rates.push(Rate {
            documents: count as u64,
            took: began.elapsed(),
        });
    }
    table.ratio(
        "first sync of ten times as many, documents a second",
        rates[1],
        rates[0],
        Target::AtLeast(0.9),
    );
}

/// Reconcile of equal databases: by hash, and reading everything.
pub(crate) async fn reconcile(table: &mut Table, scale: f64) {
    let count = (1_000_000.0 * scale) as usize;
    let world = both_filled("reconcile", count).await;
    let settings = world.settings().set("log.level", &log_level());
    let daemon = world.start_with(settings).await;
    first_sync(&daemon).await;
    unchanged(table, &world, &daemon, count).await;
    for exact in [false, true] {
        let (began, before) = (Instant::now(), crossed(&world));
        wait_until(LONG, "a reconcile", async || {
            let body = serde_json::json!({ "exact": exact });
            let answer = yet(daemon.post("/api/sync/reconcile", body).await)?;
            match answer.status {
                200 => Ok(()),
                status => Err(format!("{status}: {}", answer.body)),
            }
        })
        .await;
        let took = began.elapsed().as_secs_f64();
        let bytes = crossed(&world) - before;
        let how = if exact { "exact" } else { "by hash" };
        let case = format!("reconcile of {count} equal documents, {how}");
        table.note(format!("{case}: time"), format!("{took:.1} s"));
        table.note(
            format!("{case}: bytes over the link"),
            format!("{:.0} kB", bytes as f64 / 1000.0),
        );
    }
    let memory = meter::memory(daemon.pid()).1;
    let case = format!("first sync and reconciles of {count}: highest memory");
    table.figure(case, memory, "MB", Target::Below(200.0));
}

/// What it costs to look for changes where there are none.
async fn unchanged(table: &mut Table, world: &World, daemon: &Daemon, count: usize) {
    let case = format!("{count} unchanged documents");
    // Free memory is given back within a minute.
    tokio::time::sleep(Duration::from_secs(60)).await;
    let (began, before) = (Instant::now(), crossed(world));
    let answer = daemon.post("/api/sync/sync", serde_json::json!({})).await;
    assert_eq!(answer.expect("an answer").status, 200);
    table.figure(
        format!("{case}: a pull"),
        began.elapsed().as_secs_f64(),
        "s",
        Target::Below(0.2),
    );
    table.figure(
        format!("{case}: a pull, bytes over the link"),
        (crossed(world) - before) as f64 / 1000.0,
        "kB",
        Target::Below(100.0),
    );
    table.figure(
        format!("{case}: memory after a minute"),
        meter::memory(daemon.pid()).0,
        "MB",
        Target::Below(40.0),
    );
}
