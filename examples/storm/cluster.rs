//! A replica set of one or three servers, each with a clock of its own.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mongodb::Client;
use mongodb::bson::{Document, Timestamp, doc};
use mongodb::options::ClientOptions;
use sangam::mongod::{MongoServer, ServerOptions};
use sangam::process::Child;

/// A machine that has not come back by then won't.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// What a cluster is made of.
pub struct Shape {
    pub name: String,
    pub nodes: usize,
    pub oplog_mb: u32,
    /// Where to keep the data of the only node, if not in the cluster's own folder.
    pub data: Option<PathBuf>,
}

/// A replica set; its servers end with it.
pub struct Cluster {
    pub name: String,
    pub nodes: Vec<MongoServer>,
}

impl Cluster {
    /// Starts the servers and waits for a primary.
    pub async fn start(dir: &Path, shape: &Shape, clocks: &[Option<Clock>]) -> Result<Self> {
        let mut nodes = Vec::new();
        for i in 0..shape.nodes {
            let folder = match &shape.data {
                Some(folder) => folder.clone(),
                None => dir.join(format!("{}-{i}", shape.name)),
            };
            let clock = clocks.get(i).and_then(Option::as_ref);
            let options = ServerOptions {
                set_name: Some(shape.name.clone()),
                oplog_mb: shape.oplog_mb,
                // The oplog is kept back to the last checkpoint: let there be many.
                extra_args: ["--syncdelay", "2"].map(String::from).into(),
                env: clock.map(Clock::env).unwrap_or_default(),
                initiate: shape.nodes == 1,
                ..ServerOptions::default()
            };
            nodes.push(MongoServer::start_with(&folder, options).await?);
        }
        let cluster = Self {
            name: shape.name.clone(),
            nodes,
        };
        if shape.nodes > 1 {
            cluster.initiate().await?;
        }
        cluster.wait_primary().await?;
        Ok(cluster)
    }

    async fn initiate(&self) -> Result<()> {
        let members: Vec<Document> = self
            .nodes
            .iter()
            .enumerate()
            .map(|(i, node)| doc! {"_id": i as i32, "host": node.address()})
            .collect();
        let config = doc! {
            "_id": &self.name,
            "members": members,
            "settings": {"electionTimeoutMillis": 2000, "heartbeatIntervalMillis": 500,
                "catchUpTimeoutMillis": 3000},
        };
        let admin = self.nodes[0].client().await?.database("admin");
        admin
            .run_command(doc! {"replSetInitiate": config})
            .await
            .context("replSetInitiate")?;
        Ok(())
    }

    /// For applications and the daemon: finds the primary by itself.
    pub fn uri(&self) -> String {
        let hosts: Vec<String> = self.nodes.iter().map(MongoServer::address).collect();
        format!("mongodb://{}/?replicaSet={}", hosts.join(","), self.name)
    }

    /// A client that doesn't wait for ever when there is no primary. It takes no primary of an
    /// earlier election than it has seen: whoever puts a server back to a backup needs another one.
    pub async fn client(&self) -> Result<Client> {
        let uri = self.uri() + "&serverSelectionTimeoutMS=3000";
        Ok(Client::with_uri_str(uri).await?)
    }

    /// Which node says that it is the primary.
    pub async fn primary(&self) -> Option<usize> {
        for (i, node) in self.nodes.iter().enumerate() {
            if let Ok(true) = is_primary(node).await {
                return Some(i);
            }
        }
        None
    }

    /// Waits for a primary.
    pub async fn wait_primary(&self) -> Result<usize> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(primary) = self.primary().await {
                return Ok(primary);
            }
            ensure!(Instant::now() < deadline, "{} has no primary", self.name);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Starts again what is dead, continues what is suspended, waits for all of them.
    pub async fn heal(&mut self) -> Result<()> {
        for node in &mut self.nodes {
            if node.is_running() {
                node.cont()?;
            } else {
                restart(node).await?;
            }
        }
        self.wait_primary().await?;
        Ok(())
    }

    /// Writes elsewhere until the oplog no longer reaches back to now; whether it got there.
    pub async fn roll_over(&self, limit: Duration) -> Result<bool> {
        let client = self.client().await?;
        let admin = client.database("admin");
        let hello = admin.run_command(doc! {"hello": 1}).await?;
        let now = hello.get_timestamp("operationTime")?;
        let junk = client.database("junk").collection::<Document>("c");
        let deadline = Instant::now() + limit;
        let mut rolled = false;
        while !rolled && Instant::now() < deadline {
            let megabytes = (0..6).map(|_| doc! {"x": "x".repeat(2 << 20)});
            junk.insert_many(megabytes).await?;
            admin.run_command(doc! {"fsync": 1}).await?;
            let oldest = oldest(&client).await?;
            rolled = (oldest.time, oldest.increment) > (now.time, now.increment);
        }
        client.database("junk").drop().await?;
        Ok(rolled)
    }
}

/// Starts a dead server again; a second time, if it ends at once (a port not yet free).
pub async fn restart(node: &mut MongoServer) -> Result<()> {
    if node.restart().await.is_err() {
        tokio::time::sleep(Duration::from_secs(1)).await;
        node.restart().await?;
    }
    Ok(())
}

async fn is_primary(node: &MongoServer) -> Result<bool> {
    let mut options = ClientOptions::parse(node.direct_uri()).await?;
    options.server_selection_timeout = Some(Duration::from_millis(500));
    options.connect_timeout = Some(Duration::from_millis(500));
    let client = Client::with_options(options)?;
    let admin = client.database("admin");
    let asked = admin.run_command(doc! {"hello": 1});
    let hello = tokio::time::timeout(Duration::from_secs(1), asked).await??;
    Ok(hello.get_bool("isWritablePrimary").unwrap_or(false))
}

async fn oldest(client: &Client) -> Result<Timestamp> {
    let oplog = client.database("local").collection::<Document>("oplog.rs");
    let first = oplog.find_one(doc! {}).sort(doc! {"$natural": 1}).await?;
    Ok(first.context("an empty oplog")?.get_timestamp("ts")?)
}

/// A clock that is wrong: a file that `libfaketime` reads every second.
#[derive(Clone, Debug)]
pub struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    /// Where Debian's package `faketime` puts the library, if it is installed.
    pub fn library() -> Option<PathBuf> {
        let folders = [
            "/usr/lib/x86_64-linux-gnu",
            "/usr/lib/aarch64-linux-gnu",
            "/usr/lib",
        ];
        folders
            .iter()
            .map(|folder| Path::new(folder).join("faketime/libfaketime.so.1"))
            .find(|path| path.is_file())
    }

    /// A clock `offset` seconds off.
    pub fn new(library: &Path, file: PathBuf, offset: i64) -> Result<Self> {
        let clock = Self {
            library: library.into(),
            file,
        };
        clock.set(offset)?;
        Ok(clock)
    }

    /// Whether a program starts with it: where `libfaketime` meets an allocator other than the C
    /// library's, both wait for each other.
    pub async fn suits(&self, program: &Path) -> Result<bool> {
        let mut command = Command::new(program);
        command
            .arg("--version")
            .envs(self.env())
            .stdout(Stdio::null());
        let mut child = Child::spawn(&mut command)?;
        Ok(child.wait(Duration::from_secs(10)).await?.is_some())
    }

    /// Lets the clock jump.
    pub fn set(&self, offset: i64) -> Result<()> {
        Ok(std::fs::write(&self.file, format!("{offset:+}s\n"))?)
    }

    /// What makes a process believe it.
    pub fn env(&self) -> Vec<(String, String)> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        [
            ("LD_PRELOAD", text(&self.library)),
            ("FAKETIME_TIMESTAMP_FILE", text(&self.file)),
            ("FAKETIME_CACHE_DURATION", "1".into()),
            // Deadlines are not what is to go wrong here.
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
            ("DONT_FAKE_MONOTONIC", "1".into()),
        ]
        .map(|(name, value)| (name.into(), value))
        .into()
    }
}
