//! Edits going out, the remote's changes coming in, and how long one change takes on its way.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mongodb::Database;
use mongodb::bson::{Document, RawDocumentBuf, doc, rawdoc};
use sangam::faultlink::Mode;
use tokio::task::JoinHandle;

use crate::bare::{self, BATCH};
use crate::common::{Daemon, World, wait_until};
use crate::drain::first_sync;
use crate::meter::{self, log_level};
use crate::table::{Rate, Table, Target};

const LONG: Duration = Duration::from_secs(600);

/// Bytes of the field that no edit touches.
const FILLER: usize = 2000;

async fn start(world: &World) -> Daemon {
    let settings = world
        .settings()
        .set("log.level", &log_level())
        .set("probe.interval", "\"200ms\"")
        .set("sync.stamp_documents", "false");
    let daemon = world.start_with(settings).await;
    first_sync(&daemon).await;
    daemon
}

/// Waits until both queues are empty.
async fn settled(daemon: &Daemon) {
    wait_until(LONG, "both queues are empty", async || {
        let status = daemon.status().await?;
        let waiting = (&status["pendingDocuments"], &status["pendingInbox"]);
        (*waiting.0 == 0 && *waiting.1 == 0)
            .then_some(())
            .ok_or(format!("{waiting:?}"))
    })
    .await;
}

async fn large(db: &Database, coll: &str, count: usize) {
    let coll = db.collection::<Document>(coll);
    for start in (0..count).step_by(BATCH) {
        let documents = (start..(start + BATCH).min(count)).map(|n| {
            let id = i64::try_from(n).expect("small");
            doc! {"_id": id, "state": "new", "text": format!("{n:0FILLER$}")}
        });
        coll.insert_many(documents).await.expect("inserted");
    }
}

/// Bare `$set`s of one field, in commands of [`BATCH`].
async fn sets(db: &Database, coll: &str, count: usize, state: &str) -> Rate {
    let commands: Vec<RawDocumentBuf> = (0..count)
        .step_by(BATCH)
        .map(|start| {
            let mut updates = mongodb::bson::RawArrayBuf::new();
            for n in start..(start + BATCH).min(count) {
                let id = i64::try_from(n).expect("small");
                updates.push(rawdoc! {"q": {"_id": id}, "u": {"$set": {"state": state}}});
            }
            rawdoc! {"update": coll, "updates": updates, "ordered": false}
        })
        .collect();
    bare::timed(db, commands, count).await
}

/// One field of each document was edited while the link was away.
pub(crate) async fn edits(table: &mut Table, scale: f64) {
    let count = (200_000.0 * scale) as usize;
    let world = World::with_oplogs("edits", 4096).await;
    let other = world.remote.client().database("bare");
    large(&other, "c", count).await;
    large(&world.local, "c", count).await;
    let daemon = start(&world).await;
    settled(&daemon).await;
    world.link.cut();
    daemon.wait_status("isOnline", |v| v == false).await;
    sets(&world.local, "c", count, "edited").await;
    wait_until(LONG, "all edits are queued", async || {
        let waiting = daemon.status().await?["pendingDocuments"].take();
        (waiting == count).then_some(()).ok_or(waiting.to_string())
    })
    .await;
    let before = sets(&other, "c", count, "before").await;
    let cpu = || {
        let servers = world.servers();
        let pids = [&servers.local, &servers.remote].map(|s| s.pid().expect("it runs"));
        [daemon.pid(), pids[0], pids[1]].map(|pid| meter::cpu(pid).as_secs_f64())
    };
    let idle = cpu();
    world.link.set(Mode::Pass);
    let began = Instant::now();
    settled(&daemon).await;
    let ours = Rate {
        documents: count as u64,
        took: began.elapsed(),
    };
    let busy = cpu();
    let after = sets(&other, "c", count, "after").await;
    let bare = cpu();
    let each = |now: f64, then: f64| (now - then) * 1e6 / count as f64;
    table.note(
        format!("{count} edits: CPU of daemon, local, remote; of remote for the bare ones"),
        format!(
            "{:.0}, {:.0}, {:.0}; {:.0} µs a document",
            each(busy[0], idle[0]),
            each(busy[1], idle[1]),
            each(busy[2], idle[2]),
            each(bare[2], busy[2])
        ),
    );
    table.ratio(
        format!("{count} edits of one field in 2 KB, against bare `$set` batches"),
        ours,
        before + after,
        Target::AtLeast(0.5),
    );
    world.wait_converged_within(LONG, &daemon).await;
}

/// The remote wrote while the link was away.
pub(crate) async fn apply(table: &mut Table, scale: f64) {
    let count = (200_000.0 * scale) as usize;
    let world = World::with_oplogs("apply", 2048).await;
    let other = world.servers().local.client().await.expect("a client");
    let other = other.database("bare");
    let daemon = start(&world).await;
    world.link.cut();
    daemon.wait_status("isOnline", |v| v == false).await;
    bare::fill(&world.remote, "bookings", 0, count).await;
    let before = bare::upserts(&other, "before", count).await;
    world.link.set(Mode::Pass);
    let began = Instant::now();
    let here = world.local.collection::<Document>("bookings");
    wait_until(LONG, "everything has come", async || {
        let n = here.estimated_document_count().await;
        let n = n.map_err(|e| e.to_string())?;
        (n >= count as u64).then_some(()).ok_or(n.to_string())
    })
    .await;
    settled(&daemon).await;
    let ours = Rate {
        documents: count as u64,
        took: began.elapsed(),
    };
    let after = bare::upserts(&other, "after", count).await;
    table.ratio(
        format!("{count} changes of the remote applied, against bare upserts"),
        ours,
        before + after,
        Target::AtLeast(0.6),
    );
    world.wait_converged_within(LONG, &daemon).await;
}

/// When each document was acknowledged, by `_id`.
type Acknowledged = Arc<Mutex<HashMap<i64, Instant>>>;

/// Milliseconds from the acknowledgement of each insert to its event in a change stream on `db`.
async fn watch(
    db: &Database,
    coll: &str,
    sent: Acknowledged,
    count: usize,
) -> JoinHandle<Vec<f64>> {
    let mut stream = db
        .collection::<Document>(coll)
        .watch()
        .await
        .expect("the stream opens");
    tokio::spawn(async move {
        let mut took = Vec::with_capacity(count);
        while took.len() < count {
            let Some(event) = stream.next_if_any().await.expect("an event") else {
                continue;
            };
            let now = Instant::now();
            let key = event.document_key.and_then(|key| key.get_i64("_id").ok());
            let sent = key.and_then(|id| sent.lock().expect("unpoisoned").remove(&id));
            if let Some(sent) = sent {
                took.push((now - sent).as_secs_f64() * 1000.0);
            }
        }
        took.sort_by(f64::total_cmp);
        took
    })
}

/// 500 inserts a second on both sides at once: from the acknowledgement to the other side's stream.
pub(crate) async fn latency(table: &mut Table, scale: f64) {
    let count = ((500.0 * 20.0 * scale) as usize).max(500);
    let world = World::with_oplogs("latency", 1024).await;
    let daemon = start(&world).await;
    let mut tasks = Vec::new();
    let mut watchers = Vec::new();
    for (way, here, there) in [
        ("local to remote", &world.local, &world.remote),
        ("remote to local", &world.remote, &world.local),
    ] {
        let coll = way.replace(' ', "_");
        let (crossing, same) = (Acknowledged::default(), Acknowledged::default());
        // What a stream on the writer's own side takes: no daemon can be faster.
        watchers.push((
            way,
            watch(there, &coll, crossing.clone(), count).await,
            watch(here, &coll, same.clone(), count).await,
        ));
        let coll = here.collection::<Document>(&coll);
        tasks.push(tokio::spawn(async move {
            let mut beat = tokio::time::interval(Duration::from_millis(2));
            for id in 0..i64::try_from(count).expect("small") {
                beat.tick().await;
                // Before the write is sent, in case its event comes before its answer.
                let now = Instant::now();
                for sent in [&crossing, &same] {
                    sent.lock().expect("unpoisoned").insert(id, now);
                }
                coll.insert_one(doc! {"_id": id, "n": 1})
                    .await
                    .expect("inserted");
            }
        }));
    }
    for task in tasks {
        task.await.expect("the writer ends");
    }
    for (way, crossing, same) in watchers {
        let (crossing, same) = (
            crossing.await.expect("all have come"),
            same.await.expect("all are seen"),
        );
        let at = |sorted: &[f64], part: f64| sorted[((sorted.len() - 1) as f64 * part) as usize];
        table.note(
            format!("{way}, 500/s each way: a change stream on the writer's own side, p50 / p99"),
            format!("{:.1} / {:.1} ms", at(&same, 0.5), at(&same, 0.99)),
        );
        for (name, part, most) in [("p50", 0.5, 20.0), ("p99", 0.99, 100.0)] {
            table.figure(
                format!("{way}, 500/s each way: write to visible, {name}"),
                at(&crossing, part),
                "ms",
                Target::Below(most),
            );
        }
    }
    settled(&daemon).await;
}
