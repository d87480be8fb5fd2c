//! The real binary at one site: configured, started, killed and asked.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sangam::client::Client;
use sangam::command::Status;
use sangam::config::{self, ApiConfig};
use sangam::process::{Child, Port, describe, free_port};

/// What differs between daemons.
pub struct Setup {
    pub site: usize,
    /// Which of several daemons of the site; `None` without high availability.
    pub peer: Option<usize>,
    pub local_uri: String,
    pub remote_uri: String,
    pub state_dir: PathBuf,
    pub policy: &'static str,
    pub stamp: bool,
    /// Whether remote changes come by its stream, or by timestamp and by comparisons.
    pub follow: bool,
    pub env: Vec<(String, String)>,
}

impl Setup {
    /// For files.
    fn label(&self) -> String {
        let peer = self.peer.map_or(String::new(), |n| format!("-{n}"));
        format!("site{}{peer}", self.site)
    }
}

/// A daemon; killed when dropped.
pub struct Daemon {
    program: PathBuf,
    dir: PathBuf,
    setup: Setup,
    child: Child,
    client: Client,
    /// Where it listens.
    port: Port,
    /// How it ended when nobody told it to.
    pub own_ends: Vec<String>,
    /// It was told to end.
    told: bool,
    /// Most memory it was seen to hold, in KiB.
    pub peak_kib: u64,
}

impl Daemon {
    /// Starts it and returns at once.
    pub fn start(program: &Path, dir: &Path, setup: Setup) -> Result<Self> {
        let port = free_port()?;
        let client = configure(dir, &setup, &port)?;
        let child = launch(program, dir, &setup)?;
        Ok(Self {
            program: program.into(),
            dir: dir.into(),
            setup,
            child,
            client,
            port,
            own_ends: vec![],
            told: false,
            peak_kib: 0,
        })
    }

    /// `kill -9`.
    pub fn kill9(&mut self) -> Result<()> {
        self.note();
        self.child.kill9()?;
        Ok(())
    }

    /// SIGTERM; in ten seconds it has ended.
    pub async fn terminate(&mut self) -> Result<()> {
        self.note();
        self.told = true;
        let ended = self.child.terminate(Duration::from_secs(10)).await?;
        // While it starts, before it listens to signals, one ends it as any program; and a failpoint may
        // be faster.
        if !ended.success() && ended.signal() != Some(15) && !killed(ended) {
            self.own_ends.push(format!("SIGTERM: {}", describe(ended)));
        }
        Ok(())
    }

    /// Sends a signal by name.
    pub fn signal(&mut self, name: &str) -> Result<()> {
        Ok(self.child.signal(name)?)
    }

    /// Waits until it ends by itself, and says so.
    pub async fn ends_with(&mut self, text: &str) -> Result<()> {
        let ended = self.child.wait(Duration::from_secs(90)).await?;
        let Some(status) = ended else {
            bail!("the daemon goes on, where it was expected to end: {text}");
        };
        self.told = true;
        let log = std::fs::read_to_string(self.log())?;
        let last: Vec<&str> = log.lines().rev().take(10).collect();
        ensure!(
            last.iter().any(|line| line.contains(text)),
            "the daemon ended ({}) and does not say: {text}",
            describe(status)
        );
        Ok(())
    }

    /// A command of the same binary, by the same configuration.
    pub fn cli(&self, args: &[&str]) -> Result<()> {
        let output = command(&self.program, &self.dir, &self.setup)
            .args(args)
            .stdin(Stdio::null())
            .output()?;
        ensure!(output.status.success(), "{args:?}: {output:?}");
        Ok(())
    }

    /// Starts it again, as it may also be running.
    pub fn respawn(&mut self) -> Result<()> {
        self.child.kill9()?;
        self.told = false;
        self.child = launch(&self.program, &self.dir, &self.setup)?;
        Ok(())
    }

    /// Starts it again if it has ended; notes it, if that was its own idea.
    pub fn look_after(&mut self) -> Result<()> {
        self.note();
        if let Some(status) = self.child.exit_status()? {
            if !self.told && !killed(status) {
                self.judge_end(status)?;
            }
            self.respawn()?;
        }
        Ok(())
    }

    /// Whether it had a reason to end: it says so, with the remedy, and there was nothing else that it
    /// could do. Its state can't be opened on a full disk, and a port may be taken.
    fn judge_end(&mut self, status: ExitStatus) -> Result<()> {
        let log = std::fs::read_to_string(self.log())?;
        let last = log.lines().next_back().unwrap_or_default();
        if last.starts_with("hint: another program, perhaps another sangam, has this address") {
            self.port = free_port()?;
            self.client = configure(&self.dir, &self.setup, &self.port)?;
        } else if !last.starts_with("hint: free some space") {
            self.own_ends.push(describe(status));
        }
        Ok(())
    }

    fn note(&mut self) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let peak = status.unwrap_or_default();
        let peak = peak.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        let kib = peak.and_then(|l| l.trim().trim_end_matches(" kB").parse().ok());
        self.peak_kib = self.peak_kib.max(kib.unwrap_or(0));
    }

    /// `GET /api/sync/status`.
    pub async fn status(&self) -> Result<Status> {
        Ok(self.client.get("/api/sync/status").await?)
    }

    /// Whether it is the one that works, of those of its site.
    pub async fn works(&self) -> bool {
        let asked = tokio::time::timeout(Duration::from_secs(1), self.status()).await;
        asked.is_ok_and(|s| s.is_ok_and(|s| s.ha.is_none_or(|ha| ha.role == "holder")))
    }

    /// Waits until it captures local changes.
    pub async fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(90);
        loop {
            match self.status().await {
                Ok(status) if status.is_capturing && status.is_online => return Ok(()),
                other if Instant::now() > deadline => {
                    let link = other.map(|s| format!("{:?}, {:?}", s.link, s.notices));
                    bail!(
                        "the daemon of site {} isn't ready: {link:?}",
                        self.setup.site
                    );
                }
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.dir.join(format!("{}.log", self.setup.label()))
    }

    /// Bytes in the state folder.
    pub fn state_bytes(&self) -> Result<u64> {
        let mut sum = 0;
        for entry in std::fs::read_dir(&self.setup.state_dir)? {
            let entry = entry?;
            if entry.file_name() != super::faults::FILLER {
                sum += entry.metadata()?.len();
            }
        }
        Ok(sum)
    }

    /// The state folder.
    pub fn state_dir(&self) -> &Path {
        &self.setup.state_dir
    }
}

/// By us, or by a failpoint of ours.
fn killed(status: ExitStatus) -> bool {
    matches!(status.signal(), Some(6 | 9))
}

/// Writes the configuration; a client for where it says.
fn configure(dir: &Path, setup: &Setup, port: &Port) -> Result<Client> {
    let listen = format!("127.0.0.1:{}", port.number());
    let toml = toml(dir, setup, &listen);
    std::fs::write(dir.join(format!("{}.toml", setup.label())), toml)?;
    Ok(Client::new(&ApiConfig {
        listen,
        token: None,
        tokens: Default::default(),
        socket: None,
        tls: None,
    }))
}

/// The binary with its configuration; arguments follow.
fn command(program: &Path, dir: &Path, setup: &Setup) -> Command {
    let mut command = Command::new(program);
    for name in config::variables() {
        command.env_remove(name);
    }
    command
        .arg("--config")
        .arg(dir.join(format!("{}.toml", setup.label())))
        .current_dir(dir)
        .envs(setup.env.iter().map(|(name, value)| (name, value)));
    command
}

fn launch(program: &Path, dir: &Path, setup: &Setup) -> Result<Child> {
    let log = File::options()
        .create(true)
        .append(true)
        .open(dir.join(format!("{}.log", setup.label())))?;
    let mut command = command(program, dir, setup);
    command
        .arg("run")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    Child::spawn(&mut command).with_context(|| format!("cannot run {}", program.display()))
}

fn toml(dir: &Path, setup: &Setup, listen: &str) -> String {
    let Setup {
        site,
        local_uri,
        remote_uri,
        state_dir,
        policy,
        stamp,
        follow,
        ..
    } = setup;
    // What a pull can't see comes with the next comparison, which must not be tomorrow's.
    let reconcile = if *follow { "24h" } else { "4s" };
    let control = dir.join(format!("control-{}", setup.label()));
    let (ha, name) = (setup.peer.is_some(), setup.label());
    let rules = super::writers::RULES.map(|(field, rule)| format!("{field} = \"{rule}\"\n"));
    let rules = rules.concat();
    format!(
        r#"database = "storm"
state_dir = {state_dir:?}
site = "site{site}"
[local]
uri = "{local_uri}"
[remote]
uri = "{remote_uri}"
[sync]
conflict_resolution_strategy = "{policy}"
stamp_documents = {stamp}
mass_delete_percent = 0
[sync.rules.c]
{rules}[probe]
interval = "1s"
timeout = "2s"
[pull]
interval = "1s"
follow = {follow}
reconcile = "{reconcile}"
exact_nights = 1
[retry]
initial = "50ms"
max = "2s"
[queue]
min_free_disk = "1MiB"
[control]
file = {control:?}
[api]
listen = "{listen}"
socket = ""
[ha]
enabled = {ha}
name = "{name}"
[log]
level = "info,sangam=debug"
"#
    )
}

/// The daemon's binary, of the same build as this program; built now if cargo is at hand.
pub fn program() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os("SANGAM_BINARY") {
        return Ok(named.into());
    }
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut build = Command::new(cargo);
        build.args(["build", "--locked", "--quiet", "--bin", "sangam"]);
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        // What cargo says to a program that it runs; a build script that watches these (ring's) would
        // have much built anew, here and at the next build outside.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
                build.env_remove(name);
            }
        }
        ensure!(build.status()?.success(), "the daemon can't be built");
    }
    // target/PROFILE/examples/storm
    let own = std::env::current_exe()?;
    let folder = own.parent().and_then(Path::parent).context("no folder")?;
    let path = folder.join("sangam");
    ensure!(
        path.is_file(),
        "{} is missing: cargo build --bin sangam, or set SANGAM_BINARY",
        path.display()
    );
    Ok(path)
}
