//! What goes wrong: the links in one task, the processes and disks in another, at the same time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use mongodb::bson::doc;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sangam::faultlink::{AfterLoss, FaultLink, Mode, Way};

use super::cluster::{self, Clock, Cluster};
use super::daemon::Daemon;
use super::plan::Plan;

/// No small disk is larger.
const LARGEST_DISK_MB: u32 = 800;

/// The file that fills a disk.
pub const FILLER: &str = "filler";

macro_rules! kinds {
    ($($kind:ident $name:literal $weight:literal $group:ident,)*) => {
        /// A kind of fault.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Kind { $($kind,)* }

        impl Kind {
            pub const ALL: &'static [Kind] = &[$(Kind::$kind,)*];

            /// As on the command line and in the summary.
            pub fn name(self) -> &'static str {
                match self { $(Kind::$kind => $name,)* }
            }

            fn weight(self) -> u32 {
                match self { $(Kind::$kind => $weight,)* }
            }

            fn group(self) -> Group {
                match self { $(Kind::$kind => Group::$group,)* }
            }
        }
    };
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Group {
    Link,
    Process,
}

kinds! {
    Cut "cut" 15 Link,
    Refuse "refuse" 5 Link,
    Stall "stall" 12 Link,
    LoseReply "lose_reply" 25 Link,
    LoseAll "lose_all_replies" 5 Link,
    Delay "delay" 8 Link,
    Throttle "throttle" 6 Link,
    Flap "flap" 5 Link,
    KillDaemon "kill_daemon" 14 Process,
    KillTwice "kill_daemon_twice" 8 Process,
    StopDaemon "suspend_daemon" 6 Process,
    EndDaemon "end_daemon" 4 Process,
    KillServer "kill_server" 12 Process,
    KillServerTwice "kill_server_twice" 5 Process,
    StopServer "suspend_server" 8 Process,
    StepDown "step_down" 10 Process,
    Rollback "rollback" 12 Process,
    RollOverLocal "roll_over_local" 5 Process,
    RollOverRemote "roll_over_remote" 5 Process,
    RollOverBoth "roll_over_both" 3 Process,
    FillState "fill_state_disk" 6 Process,
    FillServer "fill_server_disk" 4 Process,
    ClockJump "clock_jump" 6 Process,
}

/// How often each kind struck.
pub type Counts = BTreeMap<&'static str, u64>;

/// What there is to break.
pub struct Targets<'a> {
    pub daemons: &'a mut [Daemon],
    pub locals: &'a mut [Cluster],
    pub remote: &'a mut Cluster,
    pub clocks: &'a [Option<Clock>],
    /// Small disks: of the states, and of the first local server.
    pub state_disk: bool,
    pub server_disk: Option<&'a Path>,
}

fn draw(rng: &mut StdRng, group: Group) -> Kind {
    let mine = || Kind::ALL.iter().filter(|kind| kind.group() == group);
    let mut ticket = rng.random_range(0..mine().map(|kind| kind.weight()).sum());
    for kind in mine() {
        if ticket < kind.weight() {
            return *kind;
        }
        ticket -= kind.weight();
    }
    Kind::Cut
}

/// Chance for one fault, so that leaving it out leaves the others as they are.
fn of_its_own(rng: &mut StdRng) -> StdRng {
    StdRng::seed_from_u64(rng.random())
}

async fn pause(rng: &mut StdRng, millis: std::ops::Range<u64>) {
    tokio::time::sleep(Duration::from_millis(rng.random_range(millis))).await;
}

/// Breaks the links until `deadline`, then heals them.
pub async fn break_links(plan: &Plan, links: &[FaultLink], deadline: Instant) -> Counts {
    let mut rng = plan.rng(1);
    let mut counts = Counts::new();
    while Instant::now() < deadline && !links.is_empty() {
        let link = &links[rng.random_range(0..links.len())];
        let kind = draw(&mut rng, Group::Link);
        let mut own = of_its_own(&mut rng);
        if plan.has(kind) {
            *counts.entry(kind.name()).or_default() += 1;
            break_link(&mut own, kind, link).await;
        }
        pause(&mut rng, 100..900).await;
    }
    for link in links {
        link.heal();
        if link.lost_replies() > 0 {
            *counts.entry("replies_lost").or_default() += link.lost_replies();
        }
    }
    counts
}

async fn break_link(rng: &mut StdRng, kind: Kind, link: &FaultLink) {
    match kind {
        Kind::Cut => {
            link.cut();
            pause(rng, 50..3000).await;
        }
        Kind::Refuse => {
            link.set(Mode::Refuse);
            pause(rng, 100..2000).await;
        }
        Kind::Stall => {
            link.set(Mode::Stall);
            pause(rng, 50..4000).await;
            // Half of the stalled lines recover, the others turn out to be dead.
            if rng.random_bool(0.5) {
                link.cut();
            }
        }
        Kind::LoseReply => {
            let commands = ["update", "update", "delete", "commitTransaction", "find"];
            let command = commands[rng.random_range(0..commands.len())];
            let after = match rng.random_range(0..3) {
                0 => AfterLoss::CutLink,
                1 => AfterLoss::Silence,
                _ => AfterLoss::Reset,
            };
            link.lose_next_reply(command, after);
            pause(rng, 100..1200).await;
            link.disarm();
        }
        Kind::LoseAll => {
            link.set(Mode::LoseReplies);
            pause(rng, 100..1500).await;
            link.cut();
        }
        Kind::Delay => {
            let most = [20, 100, 600][rng.random_range(0..3)];
            link.round_trip(Duration::from_millis(rng.random_range(0..most)));
        }
        Kind::Throttle => {
            // 64 kbit/s, or much more.
            let rate = [8_000, 8_000, 100_000][rng.random_range(0..3)];
            for way in [Way::Up, Way::Down] {
                link.throttle(way, rate);
            }
            pause(rng, 1000..6000).await;
            for way in [Way::Up, Way::Down] {
                link.throttle(way, 0);
            }
        }
        _ => {
            for _ in 0..rng.random_range(2..7) {
                link.cut();
                tokio::time::sleep(Duration::from_millis(500)).await;
                link.set(Mode::Pass);
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }
    link.set(Mode::Pass);
}

/// Breaks processes and disks until `deadline`. Servers may be dead or suspended after it; daemons run.
pub async fn break_processes(
    plan: &Plan,
    targets: &mut Targets<'_>,
    deadline: Instant,
) -> Result<Counts> {
    let mut rng = plan.rng(2);
    let mut counts = Counts::new();
    while Instant::now() < deadline {
        let kind = draw(&mut rng, Group::Process);
        let mut own = of_its_own(&mut rng);
        if plan.has(kind) && strike(&mut own, kind, targets).await? {
            *counts.entry(kind.name()).or_default() += 1;
        }
        pause(&mut rng, 100..1200).await;
        for daemon in &mut *targets.daemons {
            daemon.look_after()?;
        }
    }
    Ok(counts)
}

/// Whether the fault could happen here.
async fn strike(rng: &mut StdRng, kind: Kind, targets: &mut Targets<'_>) -> Result<bool> {
    let several = targets.daemons.len() > targets.locals.len();
    let mut site = rng.random_range(0..targets.daemons.len());
    if several && rng.random_bool(0.6) {
        // The one that works is the one whose end matters.
        for (n, daemon) in targets.daemons.iter().enumerate() {
            if daemon.works().await {
                site = n;
            }
        }
    }
    let remote = rng.random_bool(0.4);
    let node: usize = rng.random_range(0..6);
    let daemon = &mut targets.daemons[site];
    match kind {
        Kind::KillDaemon => {
            daemon.kill9()?;
            let away = absence(rng.random_bool(0.5) && several, 0..1500);
            pause(rng, away).await;
        }
        Kind::KillTwice => {
            daemon.kill9()?;
            daemon.respawn()?;
            // While it opens its state, connects, or works off what the first kill left.
            pause(rng, 20..1200).await;
            daemon.kill9()?;
        }
        Kind::StopDaemon => {
            daemon.signal("STOP")?;
            let away = absence(rng.random_bool(0.7) && several, 50..4000);
            pause(rng, away).await;
            daemon.signal("CONT")?;
        }
        Kind::EndDaemon => daemon.terminate().await?,
        Kind::RollOverLocal | Kind::RollOverRemote | Kind::RollOverBoth => {
            return roll_over(rng, kind, targets, (site, node)).await;
        }
        Kind::FillState => {
            if !targets.state_disk {
                return Ok(false);
            }
            let filler = targets.daemons[site].state_dir().join(FILLER);
            fill(&filler);
            pause(rng, 500..4000).await;
            std::fs::remove_file(filler)?;
        }
        Kind::FillServer => {
            let Some(folder) = targets.server_disk else {
                return Ok(false);
            };
            let filler = folder.join(FILLER);
            fill(&filler);
            pause(rng, 1000..4000).await;
            std::fs::remove_file(filler)?;
            targets.locals[0].heal().await?;
        }
        Kind::ClockJump => {
            let wrong: Vec<&Clock> = targets.clocks.iter().flatten().collect();
            if wrong.is_empty() {
                return Ok(false);
            }
            let most = [60, 3600, 3 * 86_400][rng.random_range(0..3)];
            wrong[node % wrong.len()].set(rng.random_range(-most..=most))?;
        }
        _ => {
            let local = site % targets.locals.len();
            let cluster = match targets.locals.get_mut(local) {
                Some(local) if !remote => local,
                _ => &mut *targets.remote,
            };
            return strike_cluster(rng, kind, cluster, node).await;
        }
    }
    Ok(true)
}

/// What remembers its position is away while an oplog, or both, forget it. Applications go on, also
/// deleting on both sides what nobody will tell of.
async fn roll_over(
    rng: &mut StdRng,
    kind: Kind,
    targets: &mut Targets<'_>,
    (site, node): (usize, usize),
) -> Result<bool> {
    let (here, far) = (kind != Kind::RollOverRemote, kind != Kind::RollOverLocal);
    for (n, daemon) in targets.daemons.iter_mut().enumerate() {
        if far || n == site {
            daemon.kill9()?;
        }
    }
    let with_server = rng.random_bool(0.3);
    let of_site = site % targets.locals.len();
    let local = here.then_some(&mut targets.locals[of_site]);
    let mut all = true;
    for cluster in local.into_iter().chain(far.then_some(&mut *targets.remote)) {
        if with_server {
            kill_server(rng, cluster, node).await?;
        }
        cluster.heal().await?;
        // An error is a full or failing server: no fault of this kind then.
        all &= cluster
            .roll_over(Duration::from_secs(20))
            .await
            .unwrap_or(false);
    }
    Ok(all)
}

/// How long a daemon is away, in ms: usually short, or long enough for another one to take over.
fn absence(long: bool, short: std::ops::Range<u64>) -> std::ops::Range<u64> {
    if long { 9_000..16_000 } else { short }
}

async fn strike_cluster(
    rng: &mut StdRng,
    kind: Kind,
    cluster: &mut Cluster,
    node: usize,
) -> Result<bool> {
    match kind {
        Kind::KillServer => kill_server(rng, cluster, node).await?,
        Kind::KillServerTwice => {
            kill_server(rng, cluster, node).await?;
            kill_server(rng, cluster, node).await?;
        }
        Kind::StopServer => {
            let n = node % cluster.nodes.len();
            cluster.nodes[n].suspend()?;
            pause(rng, 100..5000).await;
            cluster.nodes[n].cont()?;
        }
        Kind::StepDown => {
            if cluster.nodes.len() < 3 {
                return Ok(false);
            }
            let primary = cluster.wait_primary().await?;
            let admin = cluster.nodes[primary].client().await?.database("admin");
            let command =
                doc! {"replSetStepDown": 5, "secondaryCatchUpPeriodSecs": 1, "force": true};
            // The connection may end with it.
            let _ = tokio::time::timeout(Duration::from_secs(5), admin.run_command(command)).await;
        }
        Kind::Rollback => {
            if cluster.nodes.len() < 3 {
                return Ok(false);
            }
            // The primary goes on alone for a moment, then dies; the others elect another one, and
            // what the majority never had is rolled back when the old one returns.
            let primary = cluster.wait_primary().await?;
            let others: Vec<usize> = (0..3).filter(|n| *n != primary).collect();
            for n in &others {
                cluster.nodes[*n].suspend()?;
            }
            pause(rng, 200..1500).await;
            cluster.nodes[primary].kill9()?;
            for n in &others {
                cluster.nodes[*n].cont()?;
            }
            if rng.random_bool(0.7) {
                cluster.wait_primary().await?;
                pause(rng, 0..2000).await;
            }
            cluster::restart(&mut cluster.nodes[primary]).await?;
            cluster.wait_primary().await?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

async fn kill_server(rng: &mut StdRng, cluster: &mut Cluster, node: usize) -> Result<()> {
    let n = node % cluster.nodes.len();
    cluster.nodes[n].kill9()?;
    pause(rng, 0..2500).await;
    cluster::restart(&mut cluster.nodes[n]).await
}

/// Takes all of a small disk. Never more than that: if it is not what it is taken for, the
/// machine's own disk must not suffer.
fn fill(path: &Path) {
    let Ok(mut file) = File::create(path) else {
        return;
    };
    let block = vec![7; 64 * 1024];
    for _ in 0..LARGEST_DISK_MB * 16 {
        // Ends with the error that is wanted here.
        if file.write_all(&block).is_err() {
            break;
        }
    }
    let _ = file.write_all(&[7; 4096]);
}

/// A small disk: a `tmpfs`, where mounting is allowed. Unmounted when dropped.
pub struct SmallDisk {
    pub path: PathBuf,
}

impl SmallDisk {
    /// `None` where it is not allowed.
    pub fn mount(path: PathBuf, megabytes: u32) -> Result<Option<Self>> {
        std::fs::create_dir_all(&path)?;
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={megabytes}m"), "tmpfs"])
            .arg(&path)
            .stderr(std::process::Stdio::null())
            .status();
        Ok(mounted.is_ok_and(|s| s.success()).then_some(Self { path }))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that is just ending may still hold it.
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(&self.path)
            .status();
    }
}
