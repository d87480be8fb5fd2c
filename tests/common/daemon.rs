//! The real binary, configured, started, killed and asked.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use sangam::config;
use sangam::process::{Child, Port, free_port};
use serde_json::Value;

use super::api::{self, Answer};
use super::{SOON, World, wait_until};

/// The program under test. `SANGAM_BINARY` names another build of it, such as one for another
/// processor behind a script that emulates that.
pub fn program() -> PathBuf {
    let own = || PathBuf::from(env!("CARGO_BIN_EXE_sangam"));
    std::env::var_os("SANGAM_BINARY").map_or_else(own, PathBuf::from)
}

/// A configuration file in the making, with short times.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Section (empty: top level) → key → TOML value.
    keys: BTreeMap<String, BTreeMap<String, String>>,
    env: Vec<(String, String)>,
    token: Option<String>,
    port: Arc<Port>,
    dir: PathBuf,
    label: String,
}

impl Settings {
    pub fn new(world: &World) -> Self {
        let port = Arc::new(free_port().expect("a free port"));
        let listen = format!("\"127.0.0.1:{}\"", port.number());
        let dir = world.dir().to_path_buf();
        let quoted = |text: &str| format!("{text:?}");
        let path = |name: &str| quoted(dir.join(name).to_str().expect("UTF-8"));
        let (state, control) = (path("state"), path("control"));
        let settings = Self {
            keys: BTreeMap::new(),
            env: vec![],
            token: None,
            port,
            dir: dir.clone(),
            label: "sangam".into(),
        };
        settings
            .set("database", &quoted(&world.name))
            .set("state_dir", &state)
            .set("site", "\"local\"")
            .set("local.uri", &quoted(&world.servers().local.uri()))
            .set("remote.uri", &quoted(&world.link.uri()))
            .set("sync.conflict_resolution_strategy", "\"manual\"")
            .set("probe.interval", "\"1s\"")
            .set("probe.timeout", "\"1s\"")
            .set("pull.interval", "\"1s\"")
            .set("retry.initial", "\"50ms\"")
            .set("retry.max", "\"1s\"")
            .set("queue.min_free_disk", "\"1MiB\"")
            .set("control.file", &control)
            .set("api.listen", &listen)
            .set("log.level", "\"info,sangam=debug\"")
            .mutated()
    }

    /// Sets one key, `section.key` or `key`, to a TOML value (strings in quotes).
    pub fn set(mut self, key: &str, value: &str) -> Self {
        let (section, key) = key.rsplit_once('.').unwrap_or(("", key));
        let section = self.keys.entry(section.into()).or_default();
        section.insert(key.into(), value.into());
        self
    }

    /// `SANGAM_MUTATION=no_intent cargo test` takes one rule away everywhere: a test of it must fail.
    fn mutated(self) -> Self {
        match std::env::var("SANGAM_MUTATION") {
            Ok(mutation) => self.env("SANGAM_MUTATION", &mutation),
            Err(_) => self,
        }
    }

    /// Leaves a key out.
    pub fn unset(mut self, key: &str) -> Self {
        let (section, key) = key.rsplit_once('.').unwrap_or(("", key));
        if let Some(section) = self.keys.get_mut(section) {
            section.remove(key);
        }
        self
    }

    /// Sets an environment variable of the daemon.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Requires a bearer token, and sends it.
    pub fn token(mut self, token: &str) -> Self {
        self.token = Some(token.into());
        self.set("api.token", &format!("{token:?}"))
    }

    /// Names configuration, state and log files, where a test has several daemons.
    pub fn label(mut self, label: &str) -> Self {
        self.label = label.into();
        let state = self.dir.join(format!("{label}-state"));
        let control = self.dir.join(format!("{label}-control"));
        self.set("state_dir", &format!("{state:?}"))
            .set("control.file", &format!("{control:?}"))
    }

    /// Where the API listens.
    pub fn api_port(&self) -> u16 {
        self.port.number()
    }

    /// The configuration file's text.
    pub fn toml(&self) -> String {
        let mut text = String::new();
        for (section, keys) in &self.keys {
            if !section.is_empty() {
                let _ = writeln!(text, "\n[{section}]");
            }
            for (key, value) in keys {
                let _ = writeln!(text, "{key} = {value}");
            }
        }
        text
    }

    fn file(&self, suffix: &str) -> PathBuf {
        self.dir.join(format!("{}.{suffix}", self.label))
    }

    /// Writes the configuration file and returns where it is.
    pub fn write(&self) -> PathBuf {
        let path = self.file("toml");
        std::fs::write(&path, self.toml()).expect("the configuration can be written");
        path
    }

    /// The binary with this configuration and environment; arguments follow.
    pub fn command(&self) -> Command {
        let mut command = Command::new(program());
        for name in
            config::variables().chain(["SANGAM_MUTATION", "SANGAM_FAILPOINT", "SANGAM_STALL"])
        {
            command.env_remove(name);
        }
        command
            .current_dir(&self.dir)
            .envs(self.env.iter().map(|(k, v)| (k, v)))
            .arg("--config")
            .arg(self.file("toml"));
        command
    }

    /// Runs one command of the CLI to its end.
    pub fn cli(&self, args: &[&str]) -> Output {
        self.write();
        self.command()
            .args(args)
            .stdin(Stdio::null())
            .output()
            .expect("the binary runs")
    }
}

/// A daemon; its log is printed if the test fails, and it is killed at the end.
pub struct Daemon {
    pub settings: Settings,
    child: Child,
}

impl Daemon {
    /// Starts the daemon and returns at once.
    pub fn spawn(_world: &World, settings: Settings) -> Self {
        settings.write();
        let child = launch(&settings);
        Self { settings, child }
    }

    /// The folder with the state file.
    pub fn state_dir(&self) -> PathBuf {
        let quoted = &self.settings.keys[""]["state_dir"];
        PathBuf::from(quoted.trim_matches('"'))
    }

    /// Where the control file is expected.
    pub fn control_file(&self) -> PathBuf {
        let quoted = &self.settings.keys["control"]["file"];
        PathBuf::from(quoted.trim_matches('"'))
    }

    /// `kill -9`.
    pub fn kill9(&mut self) {
        self.child.kill9().expect("the daemon can be killed");
    }

    /// SIGTERM, and waits for the end.
    pub async fn terminate(&mut self) -> ExitStatus {
        let ended = self.child.terminate(SOON).await;
        ended.expect("the daemon can be stopped")
    }

    /// Sends a signal by name (`HUP`, `USR1`, …).
    pub fn signal(&mut self, name: &str) {
        self.child.signal(name).expect("the signal can be sent");
    }

    /// How the daemon ended, if it did.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.exit_status().expect("the daemon can be watched")
    }

    /// Waits for the daemon to end by itself.
    pub async fn wait_exit(&mut self) -> ExitStatus {
        let ended = self.child.wait(SOON).await.expect("it can be watched");
        ended.expect("the daemon ends by itself")
    }

    /// Waits for the daemon to refuse: exit code 78, and these words in its log.
    pub async fn refuses(&mut self, words: &[&str]) {
        let ended = self.wait_exit().await;
        assert_eq!(ended.code(), Some(78), "{}", self.log());
        for word in words {
            assert!(self.log().contains(word), "{word}: {}", self.log());
        }
    }

    /// Starts the daemon again (killing it first if it runs) with the same state and waits until
    /// it captures.
    pub async fn restart(&mut self) {
        self.respawn();
        self.wait_ready().await;
    }

    /// [`Daemon::restart`] without waiting.
    pub fn respawn(&mut self) {
        self.kill9();
        self.settings.write();
        self.child = launch(&self.settings);
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything the daemon has logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// The log file.
    pub fn log_path(&self) -> PathBuf {
        self.settings.file("log")
    }

    /// Waits until local changes are being captured.
    pub async fn wait_ready(&self) {
        wait_until(SOON, "the daemon captures", async || {
            match self.get("/readyz").await?.status {
                200 => Ok(()),
                status => Err(format!("/readyz says {status}")),
            }
        })
        .await;
    }

    /// `GET`.
    pub async fn get(&self, path: &str) -> Result<Answer, String> {
        self.ask("GET", path, None).await
    }

    /// `POST` with a JSON body.
    pub async fn post(&self, path: &str, body: Value) -> Result<Answer, String> {
        self.ask("POST", path, Some(body)).await
    }

    /// `PUT` with a JSON body.
    pub async fn put(&self, path: &str, body: Value) -> Result<Answer, String> {
        self.ask("PUT", path, Some(body)).await
    }

    async fn ask(&self, method: &str, path: &str, body: Option<Value>) -> Result<Answer, String> {
        let token = self.settings.token.as_deref();
        api::request(self.settings.api_port(), method, path, body, token)
            .await
            .map_err(|error| format!("{error:#}"))
    }

    /// `GET /api/sync/status`.
    pub async fn status(&self) -> Result<Value, String> {
        let answer = self.get("/api/sync/status").await?;
        match answer.status {
            200 => Ok(answer.body),
            status => Err(format!("status says {status}: {}", answer.body)),
        }
    }

    /// `POST /api/sync/sync`: the run.
    pub async fn sync(&self) -> Value {
        let answer = self.post("/api/sync/sync", serde_json::json!({})).await;
        let answer = answer.expect("the API answers");
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.body
    }

    /// Waits until the status field `key` satisfies `check`; returns it.
    pub async fn wait_status(&self, key: &str, check: impl Fn(&Value) -> bool) -> Value {
        self.wait_status_within(SOON, key, check).await
    }

    /// [`Daemon::wait_status`] with a time of its own.
    pub async fn wait_status_within(
        &self,
        limit: Duration,
        key: &str,
        check: impl Fn(&Value) -> bool,
    ) -> Value {
        wait_until(limit, key, async || {
            let value = self.status().await?[key].take();
            if check(&value) {
                return Ok(value);
            }
            Err(format!("{key} is {value}"))
        })
        .await
    }

    /// Waits until the log has a line with this text.
    pub async fn wait_log(&self, text: &str) {
        wait_until(SOON, text, async || {
            let found = self.log().contains(text);
            found.then_some(()).ok_or_else(|| "not logged".into())
        })
        .await;
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.child.kill9();
            eprintln!("--- end of {}'s log", self.settings.label);
            eprintln!("{}", tail(&self.log_path(), 150));
            eprintln!("--- configuration\n{}", self.settings.toml());
        }
    }
}

fn launch(settings: &Settings) -> Child {
    let log = File::options()
        .create(true)
        .append(true)
        .open(settings.file("log"))
        .expect("the log can be written");
    let mut command = settings.command();
    command
        .arg("run")
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a second handle"))
        .stderr(log);
    Child::spawn(&mut command).expect("the binary starts")
}

/// The last lines of a file.
fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
