//! A backup of one side, made before the storm and put back after it.
//!
//! Nothing of what that side has seen since is left, but for what the other side got of it, and the
//! daemon has to notice: it ends, with the remedy. Told which side is right, it brings everything
//! together again, while applications go on there and links and the daemon itself fail.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rand::Rng;
use sangam::mongod::MongoServer;

use super::check::{Ledger, Side};
use super::cluster::{self, Cluster};
use super::daemon::Daemon;
use super::faults::{self, Counts};
use super::history::{start_writers, stop_writers};
use super::plan::Plan;
use super::writers::Shared;
use sangam::faultlink::FaultLink;

/// For so long applications and faults go on after the restore.
const AFTER: Duration = Duration::from_secs(10);

/// What has to be running.
pub struct Stage<'a> {
    pub daemon: &'a mut Daemon,
    pub local: &'a mut Cluster,
    pub remote: &'a mut Cluster,
    pub links: &'a [FaultLink],
}

impl Stage<'_> {
    fn cluster(&mut self, side: Side) -> &mut Cluster {
        match side {
            Side::Local(_) => self.local,
            Side::Remote => self.remote,
        }
    }
}

/// A copy of a server's data, as a snapshot of its disk would be.
pub struct Backup {
    side: Side,
    at: PathBuf,
}

impl Backup {
    /// Copies the data of the only server of a side, which stands still meanwhile.
    pub fn make(cluster: &mut Cluster, side: Side, dir: &Path) -> Result<Self> {
        let node = &mut cluster.nodes[0];
        let at = dir.join("backup");
        node.suspend()?;
        let copied = copy(&data(node), &at);
        node.cont()?;
        copied?;
        std::fs::remove_file(at.join("mongod.lock"))?;
        Ok(Self { side, at })
    }

    /// Puts it back, and sees that the daemon refuses it and then, told who is right, makes both sides
    /// equal to the other one. Returns what applications have written there by then, and the faults.
    pub async fn restore(
        &self,
        plan: &Plan,
        stage: &mut Stage<'_>,
        shared: Shared,
    ) -> Result<(Ledger, Counts)> {
        // It must be noticed by one that runs as well as by one that is started after it.
        let runs = plan.rng(4).random_bool(0.5);
        if !runs {
            stage.daemon.kill9()?;
        }
        let node = &mut stage.cluster(self.side).nodes[0];
        node.kill9()?;
        let data = data(node);
        std::fs::remove_dir_all(&data)?;
        copy(&self.at, &data)?;
        cluster::restart(node).await?;
        stage.cluster(self.side).wait_primary().await?;

        let right = match self.side {
            Side::Local(_) => Side::Remote,
            Side::Remote => Side::Local(0),
        };
        shared.stop.store(false, Ordering::Relaxed);
        let tasks = start_writers(stage.cluster(right), right, plan, &shared).await?;
        if !runs {
            stage.daemon.respawn()?;
        }
        stage.daemon.ends_with("restored from a backup").await?;
        let way = if right == Side::Remote {
            "remote"
        } else {
            "local"
        };
        stage.daemon.cli(&["reconcile", "--adopt", way, "--yes"])?;
        stage.daemon.respawn()?;
        let deadline = Instant::now() + AFTER;
        let daemon = &mut *stage.daemon;
        let (counts, killed) = tokio::join!(
            faults::break_links(plan, stage.links, deadline),
            kill_now_and_then(plan, daemon, deadline)
        );
        killed?;
        stop_writers(&shared, tasks).await?;
        stage.daemon.look_after()?;
        let ledger = shared.ledger.lock().unwrap_or_else(|e| e.into_inner());
        Ok((ledger.clone(), counts))
    }
}

async fn kill_now_and_then(plan: &Plan, daemon: &mut Daemon, deadline: Instant) -> Result<()> {
    let mut rng = plan.rng(3);
    while Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(rng.random_range(200..4000))).await;
        daemon.kill9()?;
        daemon.look_after()?;
    }
    Ok(())
}

fn data(node: &MongoServer) -> PathBuf {
    node.dir().join("data")
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status()?;
    ensure!(status.success(), "{} can't be copied", from.display());
    Ok(())
}

/// What goes on where the storm ended.
pub fn go_on(ledger: &Ledger, counter: i64, plan: &Plan) -> Shared {
    let mut shared = Shared::new(ledger.clone());
    shared.counter.store(counter, Ordering::Relaxed);
    shared.without = Arc::new(plan.without.clone());
    shared
}
