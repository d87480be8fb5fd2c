//! The smallest history that still fails: shorter, and with fewer kinds of faults and of writers.
//!
//! What the processes make of a seed differs from run to run. So the same history is run again first,
//! and one that does not come back is said to be so; a smaller one counts when it fails in the same
//! way, and gets a second run before it is given up.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::faults::{Counts, Kind};
use super::history::Outcome;
use super::plan::Plan;
use super::{attempt, folder};

/// Runs in which a failure has to come back at all.
const AGAIN: usize = 4;
/// Runs of a smaller history before it counts as one that does not fail.
const TRIES: usize = 2;
/// Runs of the smallest one, to say how often it fails.
const PROOFS: usize = 3;
/// No history is shorter.
const SHORTEST: Duration = Duration::from_secs(4);

/// Runs smaller histories and says whether they fail as the first one did.
pub struct Judge<'a> {
    program: &'a Path,
    /// Where the last one that failed so is kept.
    root: &'a Path,
    kinds: BTreeSet<&'static str>,
    /// What struck in the first one.
    struck: Counts,
    deadline: Instant,
}

impl<'a> Judge<'a> {
    pub fn new(program: &'a Path, root: &'a Path, first: &Outcome, limit: Duration) -> Self {
        Self {
            program,
            root,
            kinds: first.problems.iter().map(|p| p.kind).collect(),
            struck: first.faults.clone(),
            deadline: Instant::now() + limit,
        }
    }

    /// Makes it smaller for as long as there is time; what is to be said of it in the end.
    pub async fn minimise(&self, first: &Plan) -> Result<String> {
        let name = first.name();
        let kinds: Vec<&str> = self.kinds.iter().copied().collect();
        println!("storm: {name}: does it fail again ({})?", kinds.join(", "));
        let Some(tries) = self.fails(first, AGAIN).await? else {
            let verdict = format!(
                "did not come back in {AGAIN} runs of the same seed: it takes luck besides; look at the logs of the first"
            );
            println!("storm: {name}: {verdict}");
            return Ok(verdict);
        };
        println!("storm: {name}: it came back in run {tries}");
        let plan = self
            .without_parts(self.shorter(first.clone()).await?)
            .await?;
        let plan = self.shorter(plan).await?;
        let mut failed = 0;
        for _ in 0..PROOFS {
            failed += usize::from(self.fails_once(&plan).await?);
        }
        let found = match Instant::now() < self.deadline {
            true => "smallest found",
            false => "smallest found when the time was over",
        };
        let verdict = format!(
            "{found}, failed in {failed} of {PROOFS} more runs: {}",
            plan.command()
        );
        println!("storm: {name}: {verdict}");
        println!("storm: {name}: its logs: {}", self.kept(&plan).display());
        Ok(verdict)
    }

    /// Half as long, and half of that, for as long as it fails.
    async fn shorter(&self, mut plan: Plan) -> Result<Plan> {
        while plan.chaos / 2 >= SHORTEST {
            let shorter = plan.smaller(&plan.without, plan.chaos / 2);
            if !self.is_enough(&shorter).await? {
                break;
            }
            plan = shorter;
        }
        Ok(plan)
    }

    /// Without half of what there is, then without quarters, and at last without single parts.
    async fn without_parts(&self, mut plan: Plan) -> Result<Plan> {
        // What was not there in the first one is not what it takes.
        let mut without = plan.without.clone();
        let faults = Kind::ALL.iter().map(|kind| kind.name());
        let unseen = faults.filter(|name| !self.struck.contains_key(name));
        without.extend(unseen.chain(plan.idle()).map(String::from));
        let fewer = plan.smaller(&without, plan.chaos);
        if self.is_enough(&fewer).await? {
            plan = fewer;
        }
        let mut size = plan.left().len().div_ceil(2);
        while size > 0 {
            let mut rest = plan.left();
            while !rest.is_empty() {
                let part: Vec<&str> = rest.drain(..size.min(rest.len())).collect();
                let mut without = plan.without.clone();
                without.extend(part.iter().map(ToString::to_string));
                let smaller = plan.smaller(&without, plan.chaos);
                if self.is_enough(&smaller).await? {
                    plan = smaller;
                }
            }
            size /= 2;
        }
        Ok(plan)
    }

    /// Whether this smaller one fails, too. When the time is over, none does.
    async fn is_enough(&self, plan: &Plan) -> Result<bool> {
        if Instant::now() >= self.deadline || plan.left().is_empty() {
            return Ok(false);
        }
        let start = Instant::now();
        let fails = self.fails(plan, TRIES).await?.is_some();
        println!(
            "storm: {}: {} s, {} part{}: {} ({:.0} s)",
            plan.name(),
            plan.chaos.as_secs(),
            plan.left().len(),
            if plan.left().len() == 1 { "" } else { "s" },
            if fails { "fails" } else { "does not fail" },
            start.elapsed().as_secs_f64(),
        );
        Ok(fails)
    }

    /// In which of that many runs it fails first.
    async fn fails(&self, plan: &Plan, tries: usize) -> Result<Option<usize>> {
        for n in 1..=tries {
            if self.fails_once(plan).await? {
                return Ok(Some(n));
            }
        }
        Ok(None)
    }

    async fn fails_once(&self, plan: &Plan) -> Result<bool> {
        let root = self.root.join("smaller");
        let outcome = attempt(plan, self.program, &root).await?;
        let fails = outcome.problems.iter().any(|p| self.kinds.contains(p.kind));
        if fails {
            let kept = self.kept(plan);
            if kept.exists() {
                std::fs::remove_dir_all(&kept)?;
            }
            std::fs::rename(folder(plan, &root), kept)?;
        }
        Ok(fails)
    }

    fn kept(&self, plan: &Plan) -> PathBuf {
        let mut path = folder(plan, self.root).into_os_string();
        path.push("-smallest");
        path.into()
    }
}
