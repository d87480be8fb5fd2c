//! Random histories against the real daemon: several applications write on both sides while the
//! link fails and daemon and servers are killed; then everything is healed and checked.
//!
//! `SANGAM_SEED=7` runs one seed, `SANGAM_SEEDS=50` the first fifty, `SANGAM_MUTATION=no_intent`
//! takes one rule away (the run must then fail). A seed fixes what is tried and when; what the
//! processes make of it varies from run to run.

#![allow(clippy::unwrap_used, unreachable_pub)]

#[path = "../common/mod.rs"]
mod common;

#[allow(dead_code, reason = "the storm uses the rest")]
#[path = "../../examples/storm/check.rs"]
mod check;
mod faults;
#[path = "../../examples/storm/scene.rs"]
mod scene;
#[allow(dead_code, reason = "the storm uses the rest")]
#[path = "../../examples/storm/writers.rs"]
mod writers;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use check::{Ledger, Observed, Problem, Side, check};
use common::{Daemon, Settings, World};
use mongodb::Client;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use scene::{conflict, documents, prepare};
use tokio::task::JoinHandle;
use writers::{PARTS, RULES, Shared, WRITERS_A_SIDE, Writer};

/// Each takes one rule of the protocol away.
const MUTATIONS: [&str; 8] = [
    "base_first",
    "no_intent",
    "lww_silent",
    "unguarded",
    "token_first",
    "stamp",
    "clear_noseq",
    "no_receipt",
];

/// Places where the daemon may abort, with a probability each.
const FAILPOINTS: [&str; 5] = [
    "before_write",
    "after_write_before_ack",
    "after_base",
    "enq_before_token",
    "after_token",
];

/// How long the applications write.
const CHAOS: Duration = Duration::from_secs(15);
/// How long the daemon has to bring everything together afterwards.
const HEALING: Duration = Duration::from_secs(60);
/// A wrong state that doesn't change for so long is final.
const FINAL: Duration = Duration::from_secs(8);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_end_equal_with_nothing_lost() {
    let mutation = std::env::var("SANGAM_MUTATION").unwrap_or_default();
    let seeds = match number("SANGAM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SANGAM_SEEDS").unwrap_or(2),
    };
    let mut failed = Vec::new();
    for seed in seeds {
        let problems = history(seed, &mutation).await;
        for problem in &problems {
            println!("seed {seed}: {problem}");
        }
        if !problems.is_empty() {
            failed.push(seed);
        }
    }
    assert!(failed.is_empty(), "failed: SANGAM_SEED={failed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "many minutes: proves that the check sees each missing rule"]
async fn every_mutation_is_seen() {
    let seeds = number("SANGAM_SEEDS").unwrap_or(10);
    let mut unseen = Vec::new();
    let only = std::env::var("SANGAM_MUTATION").unwrap_or_default();
    for mutation in MUTATIONS {
        if !only.is_empty() && !only.split(',').any(|name| name == mutation) {
            continue;
        }
        let mut seen = false;
        for seed in 0..seeds {
            let problems = history(seed, mutation).await;
            if let Some(problem) = problems.first() {
                println!("{mutation}: seen with seed {seed}: {problem}");
                seen = true;
                break;
            }
        }
        if !seen {
            unseen.push(mutation);
        }
    }
    assert!(unseen.is_empty(), "not seen in {seeds} seeds: {unseen:?}");
}

/// Writers and ledger agree with each other when nobody syncs, a killed server included.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ledger_is_right_about_one_side() {
    let mut world = World::with_own_servers("ledger").await;
    let shared = Shared::new(prepare(&[&world.local], &world.remote).await.unwrap());
    let tasks = start_writers(&world, Side::Local(0), 1, &shared).await;
    for target in [300, 600] {
        common::wait_for("some writes", async || {
            shared.counter.load(Ordering::Relaxed) > target
        })
        .await;
        world.own_servers().local.kill9().unwrap();
        world.own_servers().local.restart().await.unwrap();
    }
    shared.stop.store(true, Ordering::Relaxed);
    for task in tasks {
        assert!(task.await.unwrap() > 0);
    }
    let local = documents(&world.local).await.unwrap();
    let seen = Observed {
        remote: local.clone(),
        locals: vec![local],
        ..Observed::default()
    };
    let ledger = shared.ledger.lock().unwrap().clone();
    assert_eq!(check(&ledger, &seen), []);
}

/// One history: chaos, healing, check.
async fn history(seed: u64, mutation: &str) -> Vec<Problem> {
    let start = Instant::now();
    println!("seed {seed} {mutation}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut world = World::with_own_servers("history").await;
    let ledger = prepare(&[&world.local], &world.remote).await.unwrap();
    let settings = settings(&world, seed, mutation);
    let with_failpoints = settings
        .clone()
        .env("SANGAM_FAILPOINT", &failpoints(&mut rng));

    // GIVEN both sides equal and a daemon that is not yet disturbed
    let mut daemon = world.start_with(settings.clone()).await;
    world.wait_converged(&daemon).await;
    daemon.settings = with_failpoints;
    daemon.restart().await;

    // WHEN applications write while everything fails
    let mut shared = Shared::new(ledger);
    if mutation == "no_receipt" {
        // The rule matters to these alone.
        let others = PARTS.iter().filter(|part| !["count", "set"].contains(part));
        shared.without = Arc::new(others.map(ToString::to_string).collect());
    }
    let mut tasks = start_writers(&world, Side::Local(0), seed, &shared).await;
    tasks.extend(start_writers(&world, Side::Remote, seed, &shared).await);
    let faults = faults::run(&mut rng, &mut world, &mut daemon, CHAOS).await;
    if mutation == "token_first" {
        // The rule matters only to a crash at this very point, and only to what nobody writes again.
        let crash = settings
            .clone()
            .env("SANGAM_FAILPOINT", "enq_before_token:1");
        crash_over_a_backlog(&mut daemon, crash, &shared).await;
    }
    shared.stop.store(true, Ordering::Relaxed);
    let mut writes = 0;
    for task in tasks {
        writes += task.await.expect("a writer doesn't panic");
    }

    // THEN it all comes together
    daemon.settings = settings;
    daemon.restart().await;
    let ledger = shared.ledger.lock().unwrap().clone();
    let problems = settle(&world, &daemon, &ledger).await;
    println!(
        "seed {seed} {mutation}: {writes} writes, {faults}, {} problems, {:.0} s",
        problems.len(),
        start.elapsed().as_secs_f64()
    );
    if !problems.is_empty() && mutation.is_empty() {
        let kept = std::env::temp_dir().join(format!("sangam-history-{seed}.log"));
        let _ = std::fs::copy(daemon.log_path(), &kept);
        println!("seed {seed}: the daemon's log is {}", kept.display());
        for conflict in world.conflicts().await {
            let key = conflict.get_str("localId").or(conflict.get_str("remoteId"));
            let blamed = |p: &Problem| key.as_ref().is_ok_and(|key| p.to_string().contains(*key));
            if problems.iter().any(blamed) {
                println!("seed {seed}: {conflict}");
            }
        }
    }
    problems
}

/// The daemon is away while much is written, and ends at once when it reads of that.
async fn crash_over_a_backlog(daemon: &mut Daemon, crash: Settings, shared: &Shared) {
    daemon.kill9();
    let most = shared.counter.load(Ordering::Relaxed) + 300;
    common::wait_for("some writes", async || {
        shared.counter.load(Ordering::Relaxed) > most
    })
    .await;
    shared.stop.store(true, Ordering::Relaxed);
    daemon.settings = crash;
    daemon.respawn();
    daemon.wait_exit().await;
}

async fn start_writers(
    world: &World,
    side: Side,
    seed: u64,
    shared: &Shared,
) -> Vec<JoinHandle<u64>> {
    let server = match side {
        Side::Local(_) => &world.servers().local,
        Side::Remote => &world.servers().remote,
    };
    let uri = server.direct_uri() + "&w=majority&serverSelectionTimeoutMS=3000";
    let mut tasks = Vec::new();
    for index in 0..WRITERS_A_SIDE {
        let client = Client::with_uri_str(&uri).await.expect("a client");
        let writer = Writer::new(side, index, client, &world.name, shared.clone()).seeded(seed);
        tasks.push(tokio::spawn(writer.run()));
    }
    tasks
}

fn settings(world: &World, seed: u64, mutation: &str) -> Settings {
    let policy = if seed % 4 == 3 {
        "manual"
    } else {
        "remote_wins"
    };
    let stamp = mutation == "stamp" || seed % 3 != 1;
    let settings = world
        .settings()
        .set("sync.conflict_resolution_strategy", &format!("{policy:?}"))
        .set("sync.stamp_documents", &stamp.to_string())
        // The guard against mass deletes has tests of its own; here a few documents are all.
        .set("sync.mass_delete_percent", "0");
    let with_rule = |settings: Settings, (field, rule): (&str, &str)| {
        settings.set(&format!("sync.rules.c.{field}"), &format!("{rule:?}"))
    };
    let settings = RULES.into_iter().fold(settings, with_rule);
    if mutation.is_empty() {
        return settings;
    }
    settings.env("SANGAM_MUTATION", mutation)
}

/// `name:probability,…` for a random choice of failpoints.
fn failpoints(rng: &mut StdRng) -> String {
    let chosen = FAILPOINTS.iter().filter(|_| rng.random_bool(0.7));
    let named: Vec<String> = chosen.map(|name| format!("{name}:0.004")).collect();
    named.join(",")
}

/// Looks until all is well twice in a row, or is wrong and no longer changes.
async fn settle(world: &World, daemon: &Daemon, ledger: &Ledger) -> Vec<Problem> {
    let deadline = Instant::now() + HEALING;
    let mut last: Vec<Problem> = Vec::new();
    let mut since = Instant::now();
    loop {
        let (problems, calm) = match observe(world, daemon).await {
            Ok(seen) => (check(ledger, &seen), seen.outbox + seen.inbox == 0),
            Err(error) => {
                assert!(Instant::now() < deadline, "cannot look: {error:#}");
                since = Instant::now();
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        if problems != last {
            since = Instant::now();
        }
        let unchanged = since.elapsed();
        if problems.is_empty() && unchanged > Duration::from_secs(2) {
            return problems;
        }
        if !problems.is_empty() && (calm && unchanged > FINAL || Instant::now() > deadline) {
            return problems;
        }
        last = problems;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn observe(world: &World, daemon: &Daemon) -> anyhow::Result<Observed> {
    let status = daemon.status().await.map_err(anyhow::Error::msg)?;
    let conflicts = world.conflicts().await;
    Ok(Observed {
        outbox: status["pendingDocuments"].as_u64().unwrap_or(u64::MAX),
        inbox: status["pendingInbox"].as_u64().unwrap_or(u64::MAX),
        locals: vec![documents(&world.local).await?],
        remote: documents(&world.remote).await?,
        conflicts: conflicts.iter().map(conflict).collect(),
    })
}
