//! The harness: two real servers, a bad link, the real binary.
//!
//! Each test has a [`World`]: its own database name, folder and link, on servers that the tests of
//! one binary share (or on its own, if it kills or reconfigures them). Nothing sleeps to let
//! something happen: [`wait_until`] watches state until a deadline.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test binary uses its own part of this

pub mod api;
pub mod conflict;
pub mod daemon;
pub mod kit;
pub mod odd;
pub mod snapshot;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mongodb::bson::{Document, doc};
use mongodb::{Client, Database};
use sangam::compare::{Comparison, compare};
use sangam::config::FieldNames;
use sangam::faultlink::FaultLink;
use sangam::mongod::{MongoServer, ServerOptions};
use tempfile::TempDir;
use tokio::sync::OnceCell;

pub use daemon::{Daemon, Settings};

/// How long a test waits for something that should happen soon. Long, since a busy machine must not
/// fail a test: what works is seen as soon as it does.
pub const SOON: Duration = Duration::from_secs(90);

/// Size of an oplog where a test does not care.
const OPLOG_MB: u32 = 64;

/// A local and a remote replica set.
pub struct Servers {
    pub local: MongoServer,
    pub remote: MongoServer,
}

/// What every server here is started with, if nothing else is said.
fn options() -> ServerOptions {
    ServerOptions {
        oplog_mb: OPLOG_MB,
        ..ServerOptions::default()
    }
}

impl Servers {
    async fn start(dir: &Path, common: ServerOptions) -> Self {
        let (local_dir, remote_dir) = (dir.join("local"), dir.join("remote"));
        let options = |set: &str| ServerOptions {
            set_name: Some(set.into()),
            ..common.clone()
        };
        let (local, remote) = tokio::join!(
            MongoServer::start_with(&local_dir, options("rs_local")),
            MongoServer::start_with(&remote_dir, options("rs_remote")),
        );
        Self {
            local: local.expect("the local server starts"),
            remote: remote.expect("the remote server starts"),
        }
    }
}

/// The servers that all tests of this process share; they end with it.
async fn shared_servers() -> &'static Servers {
    static SERVERS: OnceCell<Servers> = OnceCell::const_new();
    SERVERS
        .get_or_init(|| async { Servers::start(&shared_dir(), options()).await })
        .await
}

/// A folder named for this process; folders of processes that are gone are removed.
fn shared_dir() -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("servers");
    for entry in std::fs::read_dir(&root).into_iter().flatten().flatten() {
        let process = Path::new("/proc").join(entry.file_name());
        if Path::new("/proc/self").exists() && !process.exists() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    root.join(std::process::id().to_string())
}

enum Hold {
    Shared(&'static Servers),
    Own(Box<Servers>),
}

/// What one test works on.
pub struct World {
    servers: Hold,
    /// Name of the test's database on both sides.
    pub name: String,
    /// The daemon's way to the remote server.
    pub link: FaultLink,
    /// The local database.
    pub local: Database,
    /// The remote database, past the link.
    pub remote: Database,
    /// Names of the sync fields, as the daemon is told them.
    pub fields: FieldNames,
    /// Collections that comparisons leave out.
    pub leave_out: Vec<&'static str>,
    dir: TempDir,
}

impl World {
    /// A world on the shared servers; `test` becomes part of the database's name.
    pub async fn new(test: &str) -> Self {
        Self::on(test, Hold::Shared(shared_servers().await), temp_dir()).await
    }

    /// A world on servers of its own, which the test may kill, suspend and restart.
    pub async fn with_own_servers(test: &str) -> Self {
        Self::with_servers(test, options()).await
    }

    /// A world on servers of its own with oplogs of that size.
    pub async fn with_oplogs(test: &str, oplog_mb: u32) -> Self {
        let options = ServerOptions {
            oplog_mb,
            ..options()
        };
        Self::with_servers(test, options).await
    }

    /// A world on servers of its own with further arguments.
    pub async fn with_server_args(test: &str, args: &[&str]) -> Self {
        let extra_args = args.iter().map(ToString::to_string).collect();
        let options = ServerOptions {
            extra_args,
            ..options()
        };
        Self::with_servers(test, options).await
    }

    async fn with_servers(test: &str, options: ServerOptions) -> Self {
        let dir = temp_dir();
        let servers = Servers::start(dir.path(), options).await;
        Self::on(test, Hold::Own(Box::new(servers)), dir).await
    }

    async fn on(test: &str, servers: Hold, dir: TempDir) -> Self {
        let both = servers.get();
        let test: String = test.chars().take(40).collect();
        let name = format!("{test}_{:06x}", rand::random_range(0..0x100_0000));
        let link = FaultLink::open(both.remote.address()).await;
        let local = both.local.client().await.expect("a client");
        let remote = both.remote.client().await.expect("a client");
        Self {
            link: link.expect("the link opens"),
            local: local.database(&name),
            remote: remote.database(&name),
            fields: FieldNames::default(),
            leave_out: vec![],
            servers,
            name,
            dir,
        }
    }

    /// The test's folder: configuration, state, logs.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The two servers.
    pub fn servers(&self) -> &Servers {
        self.servers.get()
    }

    /// The servers of a world `with_own_servers`, to kill and restart.
    pub fn own_servers(&mut self) -> &mut Servers {
        match &mut self.servers {
            Hold::Own(servers) => servers,
            Hold::Shared(_) => panic!("the servers are shared: use World::with_own_servers"),
        }
    }

    /// A further client of the local server.
    pub async fn local_client(&self) -> Client {
        self.servers().local.client().await.expect("a client")
    }

    /// Short times and everything else by default; see [`Settings::set`].
    pub fn settings(&self) -> Settings {
        Settings::new(self)
    }

    /// Starts a daemon with the default settings and waits until it captures.
    pub async fn start(&self) -> Daemon {
        self.start_with(self.settings()).await
    }

    /// Starts a daemon with these settings and waits until it captures.
    pub async fn start_with(&self, settings: Settings) -> Daemon {
        let daemon = Daemon::spawn(self, settings);
        daemon.wait_ready().await;
        daemon
    }

    /// Compares the two databases whole, sync fields and own collections left out.
    pub async fn compare(&self) -> anyhow::Result<Comparison> {
        compare(&self.local, &self.remote, &self.fields, &self.leave_out).await
    }

    /// Waits until both sides are equal and the daemon has nothing left to do.
    pub async fn wait_converged(&self, daemon: &Daemon) {
        self.wait_converged_within(SOON, daemon).await;
    }

    /// [`World::wait_converged`] with a time of its own.
    pub async fn wait_converged_within(&self, limit: Duration, daemon: &Daemon) {
        wait_until(limit, "both sides equal, queue empty", async || {
            self.converged(daemon).await
        })
        .await;
    }

    async fn converged(&self, daemon: &Daemon) -> Result<(), String> {
        at_rest(daemon).await?;
        let found = self.compare().await.map_err(|e| format!("{e:#}"))?;
        if !found.is_equal() {
            return Err(describe(&found));
        }
        // What made them equal may have come after the first question, and have no answer yet.
        at_rest(daemon).await
    }

    /// Records in `conflict_logs`, oldest first.
    pub async fn conflicts(&self) -> Vec<Document> {
        use futures::TryStreamExt;
        let logs = self.local.collection::<Document>("conflict_logs");
        let cursor = logs.find(doc! {}).sort(doc! {"timestamp": 1}).await;
        let cursor = cursor.expect("conflict_logs can be read");
        cursor.try_collect().await.expect("conflict_logs is BSON")
    }
}

impl Hold {
    fn get(&self) -> &Servers {
        match self {
            Self::Shared(servers) => servers,
            Self::Own(servers) => servers,
        }
    }
}

/// Whether nothing waits and the first sync is over.
async fn at_rest(daemon: &Daemon) -> Result<(), String> {
    let status = daemon.status().await?;
    for queue in ["pendingDocuments", "pendingInbox"] {
        if status[queue] != 0 {
            let waiting = daemon.get("/api/sync/queue").await?.body;
            return Err(format!("{queue} is {}: {waiting}", status[queue]));
        }
    }
    // What is written during a first sync is settled by its rules, not by those of every day.
    if status["lastSyncTime"].is_null() {
        return Err("the first sync is not over".into());
    }
    Ok(())
}

fn temp_dir() -> TempDir {
    tempfile::Builder::new()
        .prefix("sangam-test-")
        .tempdir()
        .expect("a temporary folder")
}

/// The first few differences of a comparison, in full.
pub fn describe(found: &Comparison) -> String {
    let mut text = format!("{} documents differ:", found.differences.len());
    for difference in found.differences.iter().take(5) {
        let show = |body: &Option<mongodb::bson::RawDocumentBuf>| match body {
            Some(body) => format!("{body:?}"),
            None => "absent".into(),
        };
        text += &format!(
            "\n  {} {:?}\n    local  {}\n    remote {}",
            difference.collection,
            difference.id,
            show(&difference.local),
            show(&difference.remote)
        );
    }
    text
}

/// Looks again and again until `check` is `Ok`, and returns its value; panics with its last reason
/// when `limit` has passed.
pub async fn wait_until<T>(
    limit: Duration,
    what: &str,
    mut check: impl AsyncFnMut() -> Result<T, String>,
) -> T {
    let deadline = Instant::now() + limit;
    loop {
        // One look may hang (a stalled link): it doesn't get more than what is left.
        let left = deadline.saturating_duration_since(Instant::now());
        let why = match tokio::time::timeout(left.max(Duration::from_secs(1)), check()).await {
            Ok(Ok(value)) => return value,
            Ok(Err(why)) => why,
            Err(_) => "the last look didn't come back".into(),
        };
        assert!(
            Instant::now() < deadline,
            "not within {limit:?}: {what}; last seen: {why}"
        );
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

/// [`wait_until`] for a plain condition.
pub async fn wait_for(what: &str, mut check: impl AsyncFnMut() -> bool) {
    wait_until(SOON, what, async || {
        check().await.then_some(()).ok_or_else(|| "no".into())
    })
    .await;
}

/// The value or why not yet, for [`wait_until`].
pub fn yet<T, E: std::fmt::Display>(result: Result<T, E>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}
