//! One history: servers and daemons start, everything goes wrong, everything is healed and judged.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::TryStreamExt;
use mongodb::bson::{Document, doc};
use mongodb::{Client, Database};
use sangam::faultlink::FaultLink;
use tokio::task::JoinHandle;

use super::check::{Conflict, Ledger, Observed, Problem, Side, check};
use super::cluster::{Clock, Cluster, PATIENCE, Shape};
use super::daemon::{Daemon, Setup};
use super::faults::{self, Counts, SmallDisk, Targets};
use super::plan::{Plan, Profile};
use super::restore::{self, Backup, Stage};
use super::scene::{conflict, documents, prepare};
use super::writers::{Shared, WRITERS_A_SIDE, Writer};

/// How long the daemons have to bring everything together.
const HEALING: Duration = Duration::from_secs(150);
/// A wrong state that doesn't change for so long is final.
const FINAL: Duration = Duration::from_secs(15);
/// Bounds of a daemon that has so little to do: memory, state folder, log.
const MOST_MEMORY_KIB: u64 = 200 << 10;
const MOST_STATE: u64 = 32 << 20;
const MOST_LOG: u64 = 16 << 20;

/// Something that is wrong.
#[derive(Debug)]
pub struct Trouble {
    /// Of what kind: a smaller history has to fail in the same way.
    pub kind: &'static str,
    pub text: String,
}

impl Trouble {
    fn new(kind: &'static str, text: String) -> Self {
        Self { kind, text }
    }

    /// Nothing could be judged. That is a failure of its own.
    pub fn unjudged(error: &anyhow::Error) -> Self {
        Self::new("unjudged", format!("{error:#}"))
    }
}

/// What came of a history.
#[derive(Debug, Default)]
pub struct Outcome {
    pub problems: Vec<Trouble>,
    pub writes: u64,
    pub faults: Counts,
    pub conflicts: usize,
    /// From the end of the faults to the last difference gone.
    pub convergence: Duration,
    pub peak_kib: u64,
    pub log_bytes: u64,
    pub took: Duration,
}

/// Runs a plan in `dir`, which keeps logs and records if something is wrong.
pub async fn run(plan: &Plan, program: &Path, dir: &Path) -> Result<Outcome> {
    let start = Instant::now();
    let mut scene = Scene::start(plan, program, dir).await?;
    let mut outcome = Outcome::default();
    let ledger = scene.storm(plan, &mut outcome).await?;
    scene.heal(plan).await?;
    let (mut problems, convergence) = scene.settle(&ledger).await?;
    outcome.convergence = convergence;
    if let Some(backup) = scene.backup.take()
        && problems.is_empty()
    {
        problems = scene.restore(plan, &backup, &ledger, &mut outcome).await?;
    }
    outcome.problems = problems
        .iter()
        .map(|problem| Trouble::new(problem.kind(), problem.to_string()))
        .collect();
    scene.bounds(&mut outcome)?;
    outcome.conflicts = scene.records().await?.len();
    if !outcome.problems.is_empty() {
        scene.keep_records(dir).await?;
    }
    outcome.took = start.elapsed();
    Ok(outcome)
}

/// Everything that runs.
struct Scene {
    daemons: Vec<Daemon>,
    links: Vec<FaultLink>,
    locals: Vec<Cluster>,
    remote: Cluster,
    clocks: Vec<Option<Clock>>,
    /// Clients of the judge, which go past the links.
    local_dbs: Vec<Database>,
    remote_db: Database,
    ledger: Ledger,
    /// Of all values written.
    counter: i64,
    backup: Option<Backup>,
    /// Records that a restore took away.
    earlier: Vec<Document>,
    state_disk: bool,
    server_disk: Option<PathBuf>,
    // After the processes, which use them.
    _disks: Vec<SmallDisk>,
}

impl Scene {
    /// Equal sides and daemons that are not yet disturbed.
    async fn start(plan: &Plan, program: &Path, dir: &Path) -> Result<Self> {
        let library = Clock::library();
        let clocks: Vec<Option<Clock>> = plan
            .clocks
            .iter()
            .enumerate()
            .map(|(i, offset)| match (&library, offset) {
                (Some(library), Some(offset)) => {
                    Clock::new(library, dir.join(format!("clock{i}")), *offset).map(Some)
                }
                _ => Ok(None),
            })
            .collect::<Result<_>>()?;
        let mut disks = Vec::new();
        let mut server_disk = None;
        if plan.profile == Profile::Pair && !plan.without.contains("fill_server_disk") {
            let disk = SmallDisk::mount(dir.join("local-disk"), 700)?;
            server_disk = disk.as_ref().map(|disk| disk.path.clone());
            disks.extend(disk);
        }
        let clock = |i: usize| clocks.get(i).cloned().flatten();
        let takes_clocks = match clocks.iter().flatten().next() {
            Some(clock) => clock.suits(program).await?,
            None => true,
        };
        if !takes_clocks {
            println!("storm: this build of the daemon hangs with libfaketime: its clock is right");
        }
        let shape = |name: &str, nodes: usize, data: Option<PathBuf>| Shape {
            name: name.into(),
            nodes,
            oplog_mb: plan.oplog_mb,
            data,
        };
        let remote_clocks: Vec<_> = (0..plan.remote_nodes).map(|n| clock(3 + n)).collect();
        let remote_shape = shape("remote", plan.remote_nodes, None);
        let remote = Cluster::start(dir, &remote_shape, &remote_clocks).await?;
        let mut locals = Vec::new();
        for site in 0..plan.sites {
            let of_site: Vec<_> = (0..plan.local_nodes).map(|n| clock(4 + site + n)).collect();
            let data = server_disk.clone().filter(|_| site == 0);
            let shape = shape(&format!("local{site}"), plan.local_nodes, data);
            locals.push(Cluster::start(dir, &shape, &of_site).await?);
        }
        let (local_dbs, remote_db) = databases(&locals, &remote).await?;
        // A set just made may elect once more.
        let deadline = Instant::now() + PATIENCE;
        let ledger = loop {
            match prepare(&local_dbs.iter().collect::<Vec<_>>(), &remote_db).await {
                Ok(ledger) => break ledger,
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        };

        let (mut links, mut daemons) = (Vec::new(), Vec::new());
        let mut state_disk = true;
        for n in 0..plan.sites * plan.peers {
            let (site, peer) = (n / plan.peers, n % plan.peers);
            let remote_uri = if plan.remote_nodes == 1 {
                links.push(FaultLink::open(remote.nodes[0].address()).await?);
                links[n].uri()
            } else {
                // The driver finds the members past any proxy.
                remote.uri()
            };
            let state_dir = dir.join(format!("state{n}"));
            let disk = SmallDisk::mount(state_dir.clone(), 48)?;
            state_disk &= disk.is_some();
            disks.extend(disk);
            let wrong = clock(site).filter(|_| takes_clocks);
            let mut env = wrong.map(|clock| clock.env()).unwrap_or_default();
            if cfg!(debug_assertions) {
                env.push(("SANGAM_FAILPOINT".into(), plan.failpoints.clone()));
            }
            if let Ok(mutation) = std::env::var("SANGAM_MUTATION") {
                env.push(("SANGAM_MUTATION".into(), mutation));
            }
            let setup = Setup {
                site,
                peer: (plan.peers > 1).then_some(peer),
                local_uri: locals[site].uri(),
                remote_uri,
                state_dir,
                policy: plan.policy,
                stamp: plan.stamp,
                follow: plan.follow,
                env,
            };
            daemons.push(Daemon::start(program, dir, setup)?);
        }
        let mut scene = Self {
            daemons,
            links,
            locals,
            remote,
            clocks,
            local_dbs,
            remote_db,
            ledger,
            counter: 1,
            backup: None,
            earlier: vec![],
            state_disk,
            server_disk,
            _disks: disks,
        };
        for daemon in &mut scene.daemons {
            let deadline = Instant::now() + Duration::from_secs(120);
            while daemon.wait_ready().await.is_err() {
                // A failpoint may strike before the storm does.
                daemon.look_after()?;
                ensure!(Instant::now() < deadline, "a daemon doesn't get ready");
            }
        }
        let ledger = scene.ledger.clone();
        let (problems, _) = scene.settle(&ledger).await?;
        if let Some(problem) = problems.first() {
            bail!("before the storm: {problem}");
        }
        if let Some(side) = plan.restored {
            let cluster = match side {
                Side::Local(_) => &mut scene.locals[0],
                Side::Remote => &mut scene.remote,
            };
            scene.backup = Some(Backup::make(cluster, side, dir)?);
        }
        Ok(scene)
    }

    /// Applications write while everything fails.
    async fn storm(&mut self, plan: &Plan, outcome: &mut Outcome) -> Result<Ledger> {
        let shared = restore::go_on(&self.ledger, self.counter, plan);
        let mut tasks = Vec::new();
        for (site, local) in self.locals.iter().enumerate() {
            let side = Side::Local(u8::try_from(site)?);
            tasks.extend(start_writers(local, side, plan, &shared).await?);
        }
        tasks.extend(start_writers(&self.remote, Side::Remote, plan, &shared).await?);
        let deadline = Instant::now() + plan.chaos;
        let mut targets = Targets {
            daemons: &mut self.daemons,
            locals: &mut self.locals,
            remote: &mut self.remote,
            clocks: &self.clocks,
            state_disk: self.state_disk,
            server_disk: self.server_disk.as_deref(),
        };
        let (of_links, of_processes) = tokio::join!(
            faults::break_links(plan, &self.links, deadline),
            faults::break_processes(plan, &mut targets, deadline),
        );
        shared.stop.store(true, Ordering::Relaxed);
        outcome.faults = of_links;
        outcome.faults.extend(of_processes?);
        for cluster in self.locals.iter_mut().chain([&mut self.remote]) {
            cluster.heal().await?;
        }
        outcome.writes += stop_writers(&shared, tasks).await?;
        self.counter = shared.counter.load(Ordering::Relaxed);
        let ledger = shared.ledger.lock().unwrap_or_else(|e| e.into_inner());
        Ok(ledger.clone())
    }

    /// One side is put back to what it was before the storm; the other one is right.
    async fn restore(
        &mut self,
        plan: &Plan,
        backup: &Backup,
        ledger: &Ledger,
        outcome: &mut Outcome,
    ) -> Result<Vec<Problem>> {
        self.earlier = self.records().await?;
        let shared = restore::go_on(ledger, self.counter, plan);
        let mut stage = Stage {
            daemon: &mut self.daemons[0],
            local: &mut self.locals[0],
            remote: &mut self.remote,
            links: &self.links,
        };
        let (ledger, counts) = backup.restore(plan, &mut stage, shared).await?;
        (self.local_dbs, self.remote_db) = databases(&self.locals, &self.remote).await?;
        for (kind, count) in counts.into_iter().chain([("restore", 1)]) {
            *outcome.faults.entry(kind).or_default() += count;
        }
        Ok(self.settle(&ledger).await?.0)
    }

    /// Links and servers are well by now; what became of the daemons?
    async fn heal(&mut self, plan: &Plan) -> Result<()> {
        for daemon in &mut self.daemons {
            daemon.look_after()?;
            if plan.restart {
                daemon.terminate().await?;
                daemon.respawn()?;
            }
        }
        Ok(())
    }

    /// Looks until all is well for a while, or is wrong and no longer changes. Returns what is
    /// wrong, and after how long all was well first.
    async fn settle(&mut self, ledger: &Ledger) -> Result<(Vec<Problem>, Duration)> {
        let start = Instant::now();
        let mut last: Vec<Problem> = Vec::new();
        let mut since = start;
        loop {
            for daemon in &mut self.daemons {
                daemon.look_after()?;
            }
            let out_of_time = start.elapsed() > HEALING;
            let looked = tokio::time::timeout(Duration::from_secs(30), self.observe()).await;
            let (problems, calm) = match looked.context("no look").and_then(|seen| seen) {
                Ok(seen) => (check(ledger, &seen), is_calm(&seen)),
                Err(error) if out_of_time => bail!("cannot look: {error:#}"),
                Err(_) => {
                    since = Instant::now();
                    // A server that died before it had written down its last election holds one of the
                    // same number or less: the client that has seen the last one takes it no more.
                    (self.local_dbs, self.remote_db) =
                        databases(&self.locals, &self.remote).await?;
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    continue;
                }
            };
            if problems != last {
                since = Instant::now();
            }
            let unchanged = since.elapsed();
            if problems.is_empty() && unchanged > Duration::from_secs(2) {
                return Ok((problems, since - start));
            }
            if !problems.is_empty() && (calm && unchanged > FINAL || out_of_time) {
                return Ok((problems, start.elapsed()));
            }
            last = problems;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    async fn observe(&self) -> Result<Observed> {
        let mut seen = Observed::default();
        let mut working = 0;
        for daemon in &self.daemons {
            let status = daemon.status().await?;
            if status.ha.as_ref().is_some_and(|ha| ha.role != "holder") {
                // What is in conflict waits in its queue, too, for whoever works.
                continue;
            }
            working += 1;
            seen.outbox += status.pending_documents;
            seen.inbox += status.pending_inbox;
        }
        ensure!(
            working == self.locals.len(),
            "{working} daemons work at {} sites",
            self.locals.len()
        );
        for local in &self.local_dbs {
            seen.locals.push(documents(local).await?);
        }
        seen.remote = documents(&self.remote_db).await?;
        // What was put on record because one side was said to be right is no conflict.
        let adopted = |r: &&Document| r.get_str("kind").is_ok_and(|kind| kind == "adopted");
        let records = self.records().await?;
        seen.conflicts = records
            .iter()
            .filter(|r| !adopted(r))
            .map(conflict)
            .collect();
        let earlier = self.earlier.iter().map(conflict);
        seen.conflicts.extend(earlier.map(|conflict| Conflict {
            open: false,
            ..conflict
        }));
        Ok(seen)
    }

    /// `conflict_logs` of all sites.
    async fn records(&self) -> Result<Vec<Document>> {
        let mut all = Vec::new();
        for local in &self.local_dbs {
            let logs = local.collection::<Document>("conflict_logs");
            let found: Vec<Document> = logs.find(doc! {}).await?.try_collect().await?;
            all.extend(found);
        }
        Ok(all)
    }

    /// Memory, state and log stay small; no daemon ends by itself or panics.
    fn bounds(&mut self, outcome: &mut Outcome) -> Result<()> {
        for (site, daemon) in self.daemons.iter_mut().enumerate() {
            daemon.look_after()?;
            let log = daemon.log();
            let log_bytes = std::fs::metadata(&log)?.len();
            let state = daemon.state_bytes()?;
            outcome.peak_kib = outcome.peak_kib.max(daemon.peak_kib);
            outcome.log_bytes = outcome.log_bytes.max(log_bytes);
            for (what, is, most) in [
                ("memory in KiB", daemon.peak_kib, MOST_MEMORY_KIB),
                ("bytes of state", state, MOST_STATE),
                ("bytes of log", log_bytes, MOST_LOG),
            ] {
                if is > most {
                    let line = format!("site {site}: {is} {what}, more than {most}");
                    outcome.problems.push(Trouble::new("bounds", line));
                }
            }
            for end in daemon.own_ends.drain(..) {
                let line = format!("site {site} ended: {end}");
                outcome.problems.push(Trouble::new("ended", line));
            }
            if std::fs::read_to_string(&log)?.contains("panicked at") {
                let line = format!("site {site} panicked");
                outcome.problems.push(Trouble::new("panicked", line));
            }
        }
        Ok(())
    }

    /// For whoever looks into a failure.
    async fn keep_records(&self, dir: &Path) -> Result<()> {
        let mut text = String::new();
        for record in self.records().await? {
            text += &format!("{record}\n");
        }
        std::fs::write(dir.join("conflict_logs.txt"), text)?;
        Ok(())
    }
}

/// With clients made now, that go past the links.
async fn databases(locals: &[Cluster], remote: &Cluster) -> Result<(Vec<Database>, Database)> {
    let mut all = Vec::new();
    for local in locals {
        all.push(local.client().await?.database("storm"));
    }
    Ok((all, remote.client().await?.database("storm")))
}

/// Whether nothing waits but what a person has to decide.
fn is_calm(seen: &Observed) -> bool {
    let open = seen.conflicts.iter().filter(|c| c.open).count() as u64;
    seen.outbox + seen.inbox <= 2 * open
}

/// Starts the applications of one side.
pub async fn start_writers(
    cluster: &Cluster,
    side: Side,
    plan: &Plan,
    shared: &Shared,
) -> Result<Vec<JoinHandle<u64>>> {
    let mut tasks = Vec::new();
    for index in 0..WRITERS_A_SIDE {
        let client: Client = cluster.client().await?;
        let mut writer = Writer::new(side, index, client, "storm", shared.clone());
        if plan.hasty && cluster.nodes.len() > 1 && index == 1 {
            writer = writer.hasty();
        }
        tasks.push(tokio::spawn(writer.seeded(plan.seed).run()));
    }
    Ok(tasks)
}

/// Tells applications to stop, and waits for them; how many writes were acknowledged.
pub async fn stop_writers(shared: &Shared, tasks: Vec<JoinHandle<u64>>) -> Result<u64> {
    shared.stop.store(true, Ordering::Relaxed);
    let mut writes = 0;
    for task in tasks {
        let ended = tokio::time::timeout(Duration::from_secs(60), task).await;
        writes += ended.context("a writer hangs")??;
    }
    Ok(writes)
}
