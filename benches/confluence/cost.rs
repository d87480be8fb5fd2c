//! What the daemon costs: idle, with a large backlog, and on the wire.

use std::time::{Duration, Instant};

use mongodb::bson::{Document, doc, rawdoc};
use sangam::faultlink::Way;

use crate::bare;
use crate::common::{World, wait_until};
use crate::drain::first_sync;
use crate::meter::{self, log_level};
use crate::table::{Table, Target};

const LONG: Duration = Duration::from_secs(1800);

/// Bytes of the text that an edit sets.
const TITLE: usize = 40;

/// A minute of nothing after convergence.
pub(crate) async fn idle(table: &mut Table, scale: f64) {
    let world = World::with_oplogs("idle", 512).await;
    // As installed, not with the short intervals of the tests.
    let mut settings = world.settings().set("log.level", &log_level());
    for key in [
        "probe.interval",
        "probe.timeout",
        "pull.interval",
        "retry.initial",
        "retry.max",
    ] {
        settings = settings.unset(key);
    }
    let daemon = world.start_with(settings).await;
    bare::fill(&world.local, "bookings", 0, 10_000).await;
    bare::fill(&world.remote, "events", 0, 10_000).await;
    world.wait_converged_within(LONG, &daemon).await;
    wait_until(LONG, "all look synced", async || {
        let mut n = 0;
        for coll in ["bookings", "events"] {
            let coll = world.local.collection::<Document>(coll);
            let open = coll.count_documents(doc! {"syncStatus": {"$ne": "synced"}});
            n += open.await.map_err(|e| e.to_string())?;
        }
        (n == 0).then_some(()).ok_or(n.to_string())
    })
    .await;
    // A burst is folded into one record within a minute of its end.
    let minute = Duration::from_secs_f64(60.0 * scale.max(0.2));
    tokio::time::sleep(minute).await;
    let pid = daemon.pid();
    let (local, remote) = (
        meter::oplog_end(&world.local).await,
        meter::oplog_end(&world.remote).await,
    );
    let (cpu, began) = (meter::cpu(pid), Instant::now());
    tokio::time::sleep(minute).await;
    let cpu = (meter::cpu(pid) - cpu).as_secs_f64() / began.elapsed().as_secs_f64();
    println!("   {}", meter::memory_kinds(pid));
    let local = meter::writes_since(&world.local, local).await;
    let remote = meter::writes_since(&world.remote, remote).await;
    let case = format!("idle for {:.0} s", minute.as_secs_f64());
    table.figure(
        format!("{case}: writes on the local side"),
        local as f64,
        "",
        Target::Below(1.0),
    );
    table.figure(
        format!("{case}: writes on the remote"),
        remote as f64,
        "",
        Target::Below(1.0),
    );
    table.figure(
        format!("{case}: CPU of one core"),
        cpu * 100.0,
        "%",
        Target::Below(1.0),
    );
    table.figure(
        format!("{case}: resident memory"),
        meter::memory(pid).0,
        "MB",
        Target::Below(40.0),
    );
}

/// A backlog of a million documents, and a start on top of it.
pub(crate) async fn backlog(table: &mut Table, scale: f64) {
    let count = (1_000_000.0 * scale) as usize;
    let world = World::with_oplogs("backlog", 4096).await;
    let mut daemon = world
        .start_with(world.settings().set("log.level", &log_level()))
        .await;
    first_sync(&daemon).await;
    world.link.cut();
    daemon.wait_status("isOnline", |v| v == false).await;
    let tickets = world.local.collection::<Document>("tickets");
    for start in (0..count).step_by(bare::BATCH) {
        let batch = (start..(start + bare::BATCH).min(count))
            .map(|n| doc! {"_id": n as i64, "gate": "east", "n": n as i64, "updatedAt": mongodb::bson::DateTime::now()});
        tickets
            .insert_many(batch)
            .await
            .expect("the documents are inserted");
    }
    wait_until(LONG, "everything is queued", async || {
        let waiting = daemon.status().await?["pendingDocuments"].take();
        (waiting == count).then_some(()).ok_or(waiting.to_string())
    })
    .await;
    let case = format!("backlog of {count}");
    let peak = meter::memory(daemon.pid()).1;
    table.figure(
        format!("{case}: highest memory while queueing"),
        peak,
        "MB",
        Target::Below(150.0),
    );
    daemon.kill9();
    let began = Instant::now();
    daemon.restart().await;
    let took = began.elapsed().as_secs_f64();
    table.figure(format!("{case}: next start"), took, "s", Target::Below(2.0));
    daemon.status().await.expect("it answers");
    let peak = meter::memory(daemon.pid()).1;
    table.figure(
        format!("{case}: memory after that start"),
        peak,
        "MB",
        Target::Below(150.0),
    );
    world.link.heal();
    wait_until(LONG, "everything is sent", async || {
        let waiting = daemon.status().await?["pendingDocuments"].take();
        (waiting == 0).then_some(()).ok_or(waiting.to_string())
    })
    .await;
    let peak = meter::memory(daemon.pid()).1;
    table.figure(
        format!("{case}: highest memory while sending"),
        peak,
        "MB",
        Target::Below(150.0),
    );
}

/// Text that does not compress: figures shall be what is sent, not what zstd makes of it.
fn noise(length: usize) -> String {
    (0..length)
        .map(|_| char::from(rand::random_range(b'!'..=b'~')))
        .collect()
}

/// One field changed in documents of 10 KB.
pub(crate) async fn wire(table: &mut Table, scale: f64) {
    let count = (2000.0 * scale) as usize;
    let world = World::with_oplogs("wire", 512).await;
    let coll = world
        .local
        .collection::<mongodb::bson::RawDocumentBuf>("texts");
    for n in 0..count {
        let new = rawdoc! {"_id": n as i64, "title": "a", "text": noise(10_000), "updatedAt": mongodb::bson::DateTime::now()};
        coll.insert_one(new).await.expect("it is inserted");
    }
    let daemon = world
        .start_with(world.settings().set("log.level", &log_level()))
        .await;
    world.wait_converged_within(LONG, &daemon).await;
    let case = "one field of a 10 KB document";
    let fields = rawdoc! {"title": noise(TITLE), "updatedAt": mongodb::bson::DateTime::now()};
    // Without the length in front of a document and the zero behind it.
    let changed = fields.as_bytes().len() - 5;
    for (how, backlog) in [("in a backlog", true), ("as they come", false)] {
        if backlog {
            world.link.cut();
            daemon.wait_status("isOnline", |v| v == false).await;
        }
        let bytes = || world.link.bytes(Way::Up) + world.link.bytes(Way::Down);
        let before = bytes();
        for n in 0..count {
            let edit = doc! {"$set": {"title": noise(TITLE)}, "$currentDate": {"updatedAt": true}};
            let edited = coll.update_one(doc! {"_id": n as i64}, edit).await;
            edited.expect("it is edited");
        }
        world.link.heal();
        // The echoes on the stream count too; so do connecting anew and looking for changes.
        world.wait_converged_within(LONG, &daemon).await;
        let each = (bytes() - before) as f64 / count as f64;
        table.note(format!("{case}, {how}: both ways"), format!("{each:.0} B"));
        // One by one, a command carries as many as the writer made meanwhile: a matter of luck.
        let target = if backlog {
            Target::Below(3.0)
        } else {
            Target::None
        };
        table.figure(
            format!("{case}, {how}: over the {changed} B of the changed fields"),
            each / changed as f64,
            "times",
            target,
        );
    }
}
