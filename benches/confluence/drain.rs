//! How fast a backlog goes out when the link is back.

use std::time::{Duration, Instant};

use mongodb::bson::{Document, doc};
use sangam::faultlink::{Mode, Way};

use crate::bare;
use crate::common::{Daemon, World, wait_until};
use crate::meter::{self, log_level};
use crate::table::{Rate, Table, Target};

const LONG: Duration = Duration::from_secs(300);

/// What one drain came to.
struct Drain {
    rate: Rate,
    /// From the first document at the remote on.
    flowing: Rate,
    cpu: Duration,
    /// The same of the two servers.
    servers: [Duration; 2],
    /// How long until no document says `pending` any more.
    stamped: Option<Duration>,
}

async fn drain(world: &World, count: usize, rtt: Duration, stamp: bool) -> Drain {
    let settings = world
        .settings()
        .set("log.level", &log_level())
        .set("probe.interval", "\"200ms\"")
        .set("sync.stamp_documents", if stamp { "true" } else { "false" });
    let daemon = world.start_with(settings).await;
    first_sync(&daemon).await;
    world.link.cut();
    daemon.wait_status("isOnline", |v| v == false).await;
    bare::fill(&world.local, "bookings", 0, count).await;
    let queued = wait_until(LONG, "everything is queued", async || {
        let waiting = daemon.status().await?["pendingDocuments"].take();
        if waiting == count {
            return Ok(());
        }
        Err(format!("{waiting} in the queue"))
    });
    queued.await;
    let bookings = world.local.collection::<Document>("bookings");
    if stamp {
        wait_until(LONG, "all look pending", async || {
            let n = bookings.count_documents(doc! {"syncStatus": "pending"});
            let n = n.await.map_err(|e| e.to_string())?;
            (n == count as u64).then_some(()).ok_or(n.to_string())
        })
        .await;
    }
    let servers = || {
        let servers = world.servers();
        [&servers.local, &servers.remote].map(|s| meter::cpu(s.pid().expect("it runs")))
    };
    let (cpu, idle) = (meter::cpu(daemon.pid()), servers());
    world.link.round_trip(rtt);
    world.link.set(Mode::Pass);
    let began = Instant::now();
    let mut first = None;
    let there = world.remote.collection::<Document>("bookings");
    wait_until(LONG, "everything is at the remote", async || {
        let n = there.estimated_document_count().await;
        let n = n.map_err(|e| e.to_string())?;
        if n > 0 && first.is_none() {
            first = Some(Instant::now());
        }
        (n >= count as u64).then_some(()).ok_or(n.to_string())
    })
    .await;
    wait_empty(&daemon).await;
    let took = began.elapsed();
    let rate = |took| Rate {
        documents: count as u64,
        took,
    };
    let flowing = first.map_or(took, |at| took - (at - began));
    let cpu = meter::cpu(daemon.pid()) - cpu;
    let busy = servers();
    let servers = [busy[0] - idle[0], busy[1] - idle[1]];
    let mut stamped = None;
    if stamp {
        wait_until(LONG, "all look synced", async || {
            let n = bookings.count_documents(doc! {"syncStatus": {"$ne": "synced"}});
            let n = n.await.map_err(|e| e.to_string())?;
            (n == 0).then_some(()).ok_or(n.to_string())
        })
        .await;
        stamped = Some(began.elapsed());
    }
    world.wait_converged_within(LONG, &daemon).await;
    Drain {
        rate: rate(took),
        flowing: rate(flowing),
        cpu,
        servers,
        stamped,
    }
}

/// Waits until the first sync is over: what it would compare later is no part of a drain.
pub(crate) async fn first_sync(daemon: &Daemon) {
    wait_until(LONG, "the first sync is over", async || {
        let status = daemon.status().await?["lastSyncStatus"].take();
        (status == "completed")
            .then_some(())
            .ok_or(status.to_string())
    })
    .await;
}

async fn wait_empty(daemon: &Daemon) {
    wait_until(LONG, "the queue is empty", async || {
        let waiting = daemon.status().await?["pendingDocuments"].take();
        (waiting == 0).then_some(()).ok_or(waiting.to_string())
    })
    .await;
}

/// Without latency: against batched upserts, and against one document at a time.
pub(crate) async fn fast(table: &mut Table, scale: f64, stamp: bool) {
    let count = (200_000.0 * scale) as usize;
    let sample = (2000.0 * scale.max(0.1)) as usize;
    let how = if stamp { "stamped" } else { "unstamped" };
    let world = World::with_oplogs("drain", 2048).await;
    let other = world.remote.client().database("bare");
    let before = bare::upserts(&other, "before", count).await;
    let one = bare::one_at_a_time(
        &world
            .servers()
            .local
            .client()
            .await
            .expect("a client")
            .database("bare"),
        &other,
        sample,
    )
    .await;
    let ours = drain(&world, count, Duration::ZERO, stamp).await;
    let after = bare::upserts(&other, "after", count).await;
    let bare = before + after;
    let case = format!("drain of {count}, {how}");
    table.note(
        format!("{case}: bare upserts before and after"),
        format!("{before}, {after}"),
    );
    table.ratio(
        format!("{case}, against bare upserts"),
        ours.rate,
        bare,
        Target::AtLeast(0.7),
    );
    table.ratio(
        format!("{case}, from the first document on"),
        ours.flowing,
        bare,
        Target::None,
    );
    table.ratio(
        format!("{case}, against one at a time"),
        ours.rate,
        one,
        Target::AtLeast(30.0),
    );
    let each = |cpu: Duration| cpu.as_secs_f64() * 1e6 / count as f64;
    table.note(
        format!("{case}: CPU of daemon, local, remote"),
        format!(
            "{:.0}, {:.0}, {:.0} µs a document",
            each(ours.cpu),
            each(ours.servers[0]),
            each(ours.servers[1])
        ),
    );
    let through = bare::compressed(&world.link.uri()).await;
    let local = world.servers().local.client().await.expect("a client");
    let alone = bare::copy(&local.database("bare"), &through.database("bare"), count).await;
    table.figure(
        format!(
            "{case}: CPU of the daemon against the driver alone, which took {:.0} µs a document",
            each(alone)
        ),
        ours.cpu.as_secs_f64() / alone.as_secs_f64(),
        "times",
        Target::Below(2.0),
    );
    if let Some(stamped) = ours.stamped {
        let stamped = Rate {
            documents: count as u64,
            took: stamped,
        };
        table.ratio(
            format!("{case}, until all look synced"),
            stamped,
            bare,
            Target::None,
        );
    }
}

/// On a link with a round trip of 100 ms, and on one that carries 10 Mbit/s as well.
pub(crate) async fn far(table: &mut Table, scale: f64) {
    let count = (20_000.0 * scale) as usize;
    let rtt = Duration::from_millis(100);
    let world = World::with_oplogs("far", 2048).await;
    world.link.round_trip(rtt);
    let through = mongodb::Client::with_uri_str(world.link.uri())
        .await
        .expect("a client");
    let local = world.servers().local.client().await.expect("a client");
    let one = bare::one_at_a_time(&local.database("bare"), &through.database("bare"), 30).await;
    drop(through);
    world.link.round_trip(Duration::ZERO);
    let ours = drain(&world, count, rtt, true).await;
    let case = format!("drain of {count} at 100 ms");
    table.ratio(
        format!("{case}, against one at a time"),
        ours.rate,
        one,
        Target::AtLeast(300.0),
    );
    table.note(
        format!("{case}, from the first document on"),
        ours.flowing.to_string(),
    );
    drop(world);
    let count = (200_000.0 * scale) as usize;
    let world = World::with_oplogs("narrow", 2048).await;
    let narrow = 10_000_000 / 8;
    for way in [Way::Up, Way::Down] {
        world.link.throttle(way, narrow);
    }
    let before = world.link.bytes(Way::Up);
    let ours = drain(&world, count, rtt, false).await;
    // The comparison at the end is made on the servers, not through the link.
    let bytes = world.link.bytes(Way::Up) - before;
    let least = bytes as f64 / narrow as f64;
    let case = format!("drain of {count} at 100 ms and 10 Mbit/s");
    table.note(
        format!("{case}: sent"),
        format!("{:.0} B a document", bytes as f64 / count as f64),
    );
    table.figure(
        format!("{case}: time over bytes/bandwidth ({least:.1} s)"),
        ours.rate.took.as_secs_f64() / least,
        "times",
        Target::Below(1.5),
    );
}

/// A backlog of ten times the size, in a collection of ten times the size.
pub(crate) async fn growth(table: &mut Table, scale: f64) {
    let mut rates = Vec::new();
    for count in [20_000.0, 200_000.0] {
        let count = (count * scale) as usize;
        let world = World::with_oplogs("growth", 2048).await;
        rates.push(drain(&world, count, Duration::ZERO, false).await.flowing);
    }
    table.ratio(
        "drain of ten times as many, documents a second from the first one on",
        rates[1],
        rates[0],
        Target::AtLeast(0.9),
    );
}
