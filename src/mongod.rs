//! A MongoDB server of our own, for the demo and the tests: a replica set of one node on loopback.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mongodb::bson::{Document, doc};
use mongodb::{Client, options::ClientOptions};

use crate::process::{self, Child, Port, free_port};

mod fetch;

pub use fetch::find_or_fetch;

/// A server that doesn't answer in this time after its start won't.
const START_LIMIT: Duration = Duration::from_secs(60);

/// What to start; `Default` is a replica set `rs0` without authentication on a free port.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Port on loopback; `None` takes a free one.
    pub port: Option<u16>,
    /// Replica set name; `None` starts a standalone server, which has no change streams.
    pub set_name: Option<String>,
    /// Name and password of an administrator: turns authentication on.
    pub auth: Option<(String, String)>,
    /// Size of the oplog in MB.
    pub oplog_mb: u32,
    /// Further arguments for `mongod`.
    pub extra_args: Vec<String>,
    /// Further environment of `mongod`.
    pub env: Vec<(String, String)>,
    /// Whether to make it a set of its own and wait until it takes writes. `false` for a member of
    /// a larger set, which somebody else initiates: then it only has to answer.
    pub initiate: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            port: None,
            set_name: Some("rs0".into()),
            auth: None,
            oplog_mb: 64,
            extra_args: vec![],
            env: vec![],
            initiate: true,
        }
    }
}

/// A running (or stopped, or killed) server. Dropping it kills it; its data stays in its folder.
#[derive(Debug)]
pub struct MongoServer {
    binary: PathBuf,
    dir: PathBuf,
    port: u16,
    /// Where the port was chosen here: nobody else chooses it, also while the server is dead.
    claim: Option<Port>,
    options: ServerOptions,
    child: Option<Child>,
}

impl MongoServer {
    /// Starts a replica set of one node with its data in `dir` and waits until it takes writes.
    pub async fn start(dir: &Path, port: Option<u16>, set_name: &str) -> Result<Self> {
        Self::start_with(
            dir,
            ServerOptions {
                port,
                set_name: Some(set_name.into()),
                ..ServerOptions::default()
            },
        )
        .await
    }

    /// Starts a server as told and waits until it takes writes.
    pub async fn start_with(dir: &Path, options: ServerOptions) -> Result<Self> {
        let binary = tokio::task::spawn_blocking(find_or_fetch)
            .await
            .context("looking for the MongoDB server")??;
        std::fs::create_dir_all(dir.join("data"))
            .with_context(|| format!("cannot create {}", dir.display()))?;
        if options.auth.is_some() && options.set_name.is_some() {
            write_key_file(&dir.join("keyfile"))?;
        }
        let mut server = Self {
            binary,
            dir: dir.to_path_buf(),
            port: 0,
            claim: None,
            options,
            child: None,
        };
        // A program that knows nothing of claims may take the port before the server gets to it.
        let mut tries = if server.options.port.is_some() { 1 } else { 3 };
        loop {
            server.port = match server.options.port {
                Some(port) => port,
                None => server.claim.insert(free_port()?).number(),
            };
            tries -= 1;
            match server.launch().await {
                Ok(()) => break,
                Err(error) if tries == 0 => return Err(error),
                Err(_) => {}
            }
        }
        Ok(server)
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The port on loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The folder with data and log.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The server's log file.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("mongod.log")
    }

    /// The process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Whether the server runs, suspended or not.
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(Child::is_running)
    }

    /// URI for applications: credentials and replica set included where there are any.
    pub fn uri(&self) -> String {
        match &self.options.set_name {
            Some(set) => format!("{}?replicaSet={set}{}", self.uri_base(), self.auth_params()),
            None => self.direct_uri(),
        }
    }

    /// URI that takes this node as it is, without looking for its replica set.
    pub fn direct_uri(&self) -> String {
        let auth = self.auth_params();
        format!("{}?directConnection=true{auth}", self.uri_base())
    }

    fn uri_base(&self) -> String {
        match &self.options.auth {
            Some((user, password)) => {
                format!("mongodb://{user}:{password}@{}/", self.address())
            }
            None => format!("mongodb://{}/", self.address()),
        }
    }

    fn auth_params(&self) -> &'static str {
        match self.options.auth {
            Some(_) => "&authSource=admin",
            None => "",
        }
    }

    /// A new client for this server, on the runtime that calls.
    pub async fn client(&self) -> Result<Client> {
        Ok(Client::with_uri_str(self.direct_uri()).await?)
    }

    /// `kill -9`.
    pub fn kill9(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill9()?;
        }
        Ok(())
    }

    /// Stops the server in order (SIGTERM), or kills it after 20 s.
    pub async fn stop(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.terminate(Duration::from_secs(20)).await?;
        }
        Ok(())
    }

    /// Starts the server again on the same port and data, killing it first if it runs.
    pub async fn restart(&mut self) -> Result<()> {
        self.kill9()?;
        self.launch().await
    }

    /// SIGSTOP: the server holds its connections and answers nothing.
    pub fn suspend(&mut self) -> Result<()> {
        self.signal("STOP")
    }

    /// SIGCONT, after `suspend`.
    pub fn cont(&mut self) -> Result<()> {
        self.signal("CONT")
    }

    fn signal(&mut self, name: &str) -> Result<()> {
        let child = self.child.as_mut().context("the server isn't running")?;
        Ok(child.signal(name)?)
    }

    fn arguments(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec!["--dbpath".into(), self.dir.join("data").into()];
        let mut arg = |s: &str| args.push(s.into());
        for fixed in [
            "--bind_ip",
            "127.0.0.1",
            "--nounixsocket",
            "--wiredTigerCacheSizeGB",
            "0.25",
            "--setParameter",
            "diagnosticDataCollectionEnabled=false",
        ] {
            arg(fixed);
        }
        arg("--port");
        arg(&self.port.to_string());
        if let Some(set) = &self.options.set_name {
            arg("--replSet");
            arg(set);
            arg("--oplogSize");
            arg(&self.options.oplog_mb.to_string());
        }
        for extra in &self.options.extra_args {
            arg(extra);
        }
        match (&self.options.auth, &self.options.set_name) {
            (Some(_), Some(_)) => {
                args.push("--keyFile".into());
                args.push(self.dir.join("keyfile").into());
            }
            (Some(_), None) => args.push("--auth".into()),
            (None, _) => {}
        }
        args
    }

    async fn launch(&mut self) -> Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .with_context(|| format!("cannot write {}", self.log_path().display()))?;
        let child = Child::spawn(
            Command::new(&self.binary)
                .args(self.arguments())
                .envs(self.options.env.iter().map(|(name, value)| (name, value)))
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log),
        )
        .with_context(|| format!("cannot run {}", self.binary.display()))?;
        self.child = Some(child);
        let outcome = self.wait_until_writable().await;
        if outcome.is_err() {
            self.kill9()?;
        }
        outcome
    }

    async fn wait_until_writable(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        // Until the first administrator exists, only a connection without credentials is let in.
        let uri = format!("mongodb://{}/?directConnection=true", self.address());
        let mut options = ClientOptions::parse(uri).await?;
        options.server_selection_timeout = Some(Duration::from_millis(500));
        options.connect_timeout = Some(Duration::from_secs(2));
        let admin = Client::with_options(options)?.database("admin");
        loop {
            let child = self.child.as_mut().context("the server isn't running")?;
            if let Some(status) = child.exit_status()? {
                bail!(
                    "the MongoDB server ended at its start with {}; its log is {}",
                    process::describe(status),
                    self.log_path().display()
                );
            }
            ensure!(
                Instant::now() < deadline,
                "the MongoDB server didn't become writable within {} s; its log is {}",
                START_LIMIT.as_secs(),
                self.log_path().display()
            );
            match admin.run_command(doc! {"hello": 1}).await {
                Ok(_) if !self.is_ours(&admin).await => {
                    bail!("another MongoDB server has port {}", self.port)
                }
                Ok(_) if !self.options.initiate => return Ok(()),
                Ok(hello) if is_writable(&hello) => break,
                Ok(hello) => {
                    if hello.get_str("setName").is_err() {
                        self.initiate(&admin).await?;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
        self.create_administrator(&admin).await
    }

    /// Whether what answers on our port is our child: that may just be finding the port taken.
    async fn is_ours(&self, admin: &mongodb::Database) -> bool {
        match admin.run_command(doc! {"serverStatus": 1}).await {
            Ok(status) => status.get_i64("pid").ok() == self.pid().map(i64::from),
            // It may not be asked without a password.
            Err(_) => true,
        }
    }

    async fn initiate(&self, admin: &mongodb::Database) -> Result<()> {
        let Some(set) = &self.options.set_name else {
            return Ok(());
        };
        let config = doc! {
            "_id": set,
            "members": [{"_id": 0, "host": self.address()}],
            "settings": {"electionTimeoutMillis": 1000},
        };
        match admin.run_command(doc! {"replSetInitiate": config}).await {
            Ok(_) => Ok(()),
            // Already initiated (a restart), or the node isn't ready to say so yet; and once there
            // is an administrator this connection may not ask.
            Err(error) if matches!(code(&error), Some(23 | 13 | 94)) => Ok(()),
            Err(error) => Err(error).context("replSetInitiate failed"),
        }
    }

    async fn create_administrator(&self, admin: &mongodb::Database) -> Result<()> {
        let Some((user, password)) = &self.options.auth else {
            return Ok(());
        };
        let command = doc! {"createUser": user, "pwd": password, "roles": ["root"]};
        match admin.run_command(command).await {
            Ok(_) => Ok(()),
            // After the first start the exception for localhost is over: the user exists.
            Err(error) if matches!(code(&error), Some(13 | 51003)) => Ok(()),
            Err(error) => Err(error).context("the administrator could not be created"),
        }
    }
}

fn is_writable(hello: &Document) -> bool {
    hello.get_bool("isWritablePrimary").unwrap_or(false)
}

fn code(error: &mongodb::error::Error) -> Option<i32> {
    match error.kind.as_ref() {
        mongodb::error::ErrorKind::Command(command) => Some(command.code),
        _ => None,
    }
}

fn write_key_file(path: &Path) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    if path.exists() {
        return Ok(());
    }
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    let key: String = (0..64)
        .map(|_| char::from(rand::random_range(b'a'..=b'z')))
        .collect();
    file.write_all(key.as_bytes())?;
    Ok(())
}
