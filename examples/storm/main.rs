//! A storm: the real daemon on real servers while everything that can fail does, for as long as
//! asked. See `docs/storm.md`.
//!
//! ```text
//! cargo run --release --example storm -- --seed 1 --hours 2
//! ```
//!
//! A campaign is one history after another, each a seed and a profile. A history starts servers and
//! daemons, lets applications write on every side while links, processes, disks and clocks fail,
//! heals everything, and judges by a ledger of its own ([`check`]). A history that fails is run
//! again without one part after another, to find the smallest one that still fails.

#![allow(unreachable_pub)] // modules of a program, some of which a test shares

mod check;
mod cluster;
mod daemon;
mod faults;
mod history;
mod minimise;
mod plan;
mod restore;
mod scene;
mod writers;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};

use faults::Counts;
use history::{Outcome, Trouble};
use plan::{Plan, Profile};

/// Runs histories of faults against the real daemon and judges how they end.
#[derive(Parser)]
struct Args {
    /// The first seed; each history takes the next one.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long to go on.
    #[arg(long, default_value_t = 0.0)]
    hours: f64,
    /// How long to go on, beside the hours.
    #[arg(long, default_value_t = 0.0)]
    minutes: f64,
    /// At most so many histories.
    #[arg(long)]
    histories: Option<u64>,
    /// Only these profiles; otherwise all in turn.
    #[arg(long, value_delimiter = ',')]
    profile: Vec<Profile>,
    /// Seconds for which things go wrong in one history.
    #[arg(long, default_value_t = 30)]
    chaos: u64,
    /// Leaves kinds of faults and writers out, by name.
    #[arg(long, value_delimiter = ',')]
    without: Vec<String>,
    /// Leaves out all but these.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Minutes to spend on making a failed history smaller.
    #[arg(long, default_value_t = 15.0)]
    minimise: f64,
    /// Where to work; what failed is kept there.
    #[arg(long, default_value = "target/storm")]
    dir: PathBuf,
}

/// Sums over a campaign.
#[derive(Default)]
struct Summary {
    histories: u64,
    writes: u64,
    conflicts: usize,
    faults: Counts,
    failed: Vec<String>,
    convergence: Vec<Duration>,
    peak_kib: u64,
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let without = left_out(&args)?;
    let program = daemon::program()?;
    if cluster::Clock::library().is_none() {
        println!(
            "storm: libfaketime is not installed (apt-get install faketime): all clocks are right"
        );
    }
    std::fs::create_dir_all(&args.dir)?;
    let root = args.dir.canonicalize()?;
    let limit = Duration::from_secs_f64(args.hours * 3600.0 + args.minutes * 60.0);
    let most = args
        .histories
        .unwrap_or(if limit.is_zero() { 1 } else { u64::MAX });
    let profiles = match &args.profile[..] {
        [] => Profile::value_variants(),
        named => named,
    };
    let (start, mut sum) = (Instant::now(), Summary::default());
    for n in 0..most {
        if !limit.is_zero() && start.elapsed() >= limit {
            break;
        }
        let profile = profiles[n as usize % profiles.len()];
        let chaos = Duration::from_secs(args.chaos);
        let plan = Plan::new(args.seed + n, profile, &without, chaos);
        let outcome = attempt(&plan, &program, &root).await?;
        report(&plan, &outcome, &folder(&plan, &root));
        let smaller = if !outcome.problems.is_empty() && args.minimise > 0.0 {
            let limit = Duration::from_secs_f64(args.minimise * 60.0);
            let judge = minimise::Judge::new(&program, &root, &outcome, limit);
            Some(judge.minimise(&plan).await?)
        } else {
            None
        };
        sum.add(&plan, outcome, smaller);
    }
    sum.print(start.elapsed());
    Ok(if sum.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn left_out(args: &Args) -> Result<BTreeSet<String>> {
    let parts = plan::parts();
    for name in args.without.iter().chain(&args.only) {
        ensure!(
            parts.contains(&name.as_str()),
            "there is no {name}; there are {}",
            parts.join(", ")
        );
    }
    let mut without: BTreeSet<String> = args.without.iter().cloned().collect();
    if !args.only.is_empty() {
        let others = parts.iter().filter(|p| !args.only.iter().any(|o| o == *p));
        without.extend(others.map(ToString::to_string));
    }
    Ok(without)
}

/// Where a history has its things.
fn folder(plan: &Plan, root: &Path) -> PathBuf {
    root.join(plan.name().replace(' ', "-"))
}

/// Runs one history; its folder stays if it failed.
async fn attempt(plan: &Plan, program: &Path, root: &Path) -> Result<Outcome> {
    let dir = folder(plan, root);
    if dir.exists() {
        std::fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
    }
    std::fs::create_dir_all(&dir)?;
    let outcome = match Box::pin(history::run(plan, program, &dir)).await {
        Ok(outcome) => outcome,
        Err(error) => Outcome {
            problems: vec![Trouble::unjudged(&error)],
            ..Outcome::default()
        },
    };
    if outcome.problems.is_empty() {
        std::fs::remove_dir_all(&dir)?;
    } else {
        drop_data(&dir)?;
    }
    Ok(outcome)
}

/// Says how it went.
fn report(plan: &Plan, outcome: &Outcome, dir: &Path) {
    let name = plan.name();
    println!(
        "storm: {name}: {} writes, {} conflicts, together after {:.1} s, {} MiB, {} problems, {:.0} s; {} stamp={} follow={} restored={:?} clocks={} {:?}",
        outcome.writes,
        outcome.conflicts,
        outcome.convergence.as_secs_f64(),
        outcome.peak_kib >> 10,
        outcome.problems.len(),
        outcome.took.as_secs_f64(),
        plan.policy,
        plan.stamp,
        plan.follow,
        plan.restored,
        !plan.clocks.is_empty(),
        outcome.faults,
    );
    for problem in &outcome.problems {
        println!("storm: {name}: FAILED: {}", problem.text);
    }
    if !outcome.problems.is_empty() {
        println!("storm: {name}: logs in {}", dir.display());
        println!("storm: {name}: again: {}", plan.command());
    }
}

/// Of a history that failed, logs and records are kept, not the servers' hundreds of megabytes.
fn drop_data(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let data = entry?.path().join("data");
        if data.is_dir() {
            std::fs::remove_dir_all(data)?;
        }
    }
    Ok(())
}

impl Summary {
    fn add(&mut self, plan: &Plan, outcome: Outcome, smaller: Option<String>) {
        self.histories += 1;
        self.writes += outcome.writes;
        self.conflicts += outcome.conflicts;
        self.peak_kib = self.peak_kib.max(outcome.peak_kib);
        for (name, count) in outcome.faults {
            *self.faults.entry(name).or_default() += count;
        }
        if outcome.problems.is_empty() {
            self.convergence.push(outcome.convergence);
        } else {
            self.failed.push(plan.command());
            self.failed.extend(smaller.map(|text| format!("  {text}")));
        }
    }

    fn print(&mut self, took: Duration) {
        self.convergence.sort();
        let of = |part: usize| {
            let at = self.convergence.len().saturating_sub(1) * part / 100;
            self.convergence.get(at).map_or(0.0, Duration::as_secs_f64)
        };
        println!(
            "storm: {} histories in {:.1} min, {} acknowledged writes, {} conflicts; together again after {:.1} s (half of them), {:.1} s (all); at most {} MiB",
            self.histories,
            took.as_secs_f64() / 60.0,
            self.writes,
            self.conflicts,
            of(50),
            of(100),
            self.peak_kib >> 10
        );
        println!("storm: faults: {:?}", self.faults);
        match &self.failed[..] {
            [] => println!("storm: nothing failed"),
            failed => println!(
                "storm: {} FAILED:\n  {}",
                self.histories as usize - self.convergence.len(),
                failed.join("\n  ")
            ),
        }
    }
}
