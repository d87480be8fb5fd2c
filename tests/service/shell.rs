//! The outer shell of the real binary, as far as it needs no database: API, control file, signals,
//! words to systemd. The local server is away all the time, which must not keep any of them from
//! answering.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A daemon on a port of its own, in a folder of its own, killed when dropped.
struct Daemon {
    child: Child,
    address: SocketAddr,
    folder: tempfile::TempDir,
    /// What systemd would hear.
    systemd: UnixDatagram,
}

impl Daemon {
    fn start(token: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let address = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let closed = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let toml = format!(
            "database = \"d\"\nstate_dir = {:?}\n[local]\nuri = \"mongodb://{closed}/?replicaSet=rs0\"\n\
             [api]\nlisten = \"{address}\"\n[control]\nfile = {:?}\n[log]\nlevel = \"debug\"\n",
            folder.path().join("state"),
            folder.path().join("control"),
        );
        std::fs::write(folder.path().join("sangam.toml"), toml).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_sangam"));
        command
            .arg("run")
            .current_dir(&folder)
            .env_clear()
            .env("HOME", folder.path())
            .env("NOTIFY_SOCKET", folder.path().join("systemd"))
            .env("WATCHDOG_USEC", "1000000");
        let systemd = UnixDatagram::bind(folder.path().join("systemd")).unwrap();
        systemd.set_nonblocking(true).unwrap();
        if let Some(token) = token {
            command.env("SANGAM_API_TOKEN", token);
        }
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let child = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let mut daemon = Self {
            child,
            address,
            folder,
            systemd,
        };
        daemon.wait("the API", |daemon| {
            TcpStream::connect(daemon.address).is_ok()
        });
        daemon
    }

    /// Waits for a state, with a deadline; on failure the log is shown.
    fn wait(&mut self, what: &str, mut reached: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !reached(self) {
            assert!(
                Instant::now() < deadline,
                "waited in vain for {what}\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Status and body of the answer to a raw request.
    fn send(&self, request: &str) -> (u16, Value) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, Value) {
        let host = if headers.contains("Host:") {
            ""
        } else {
            "Host: localhost\r\n"
        };
        let length = body.len();
        self.send(&format!(
            "{method} {path} HTTP/1.1\r\n{host}{headers}Connection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        ))
    }

    fn signal(&self, name: &str) {
        let done = Command::new("kill")
            .arg(format!("-{name}"))
            .arg(self.child.id().to_string())
            .status();
        assert!(done.unwrap().success());
    }

    fn ended(&mut self) -> Option<i32> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("still running\n{}", self.log());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn every_error_has_its_status_and_a_detail() {
    let daemon = Daemon::start(None);
    let large = format!("{{\"collections\": [\"{}\"]}}", "x".repeat(1 << 20));
    for (method, path, body, expected) in [
        ("GET", "/nowhere", "", 404),
        ("GET", "/api/sync/nowhere", "", 404),
        ("DELETE", "/api/sync/status", "", 405),
        ("GET", "/api/sync/sync", "", 405),
        ("POST", "/healthz", "", 405),
        ("POST", "/api/sync/sync", "{", 400),
        ("POST", "/api/sync/sync", "[]", 400),
        ("POST", "/api/sync/sync", "{\"collections\": 5}", 400),
        ("POST", "/api/sync/sync", "{\"collection\": [\"a\"]}", 400),
        ("POST", "/api/sync/sync", &large, 413),
        ("GET", "/api/sync/logs?limit=0", "", 400),
        ("GET", "/api/sync/logs?limit=-1", "", 400),
        ("GET", "/api/sync/logs?limit=x", "", 400),
        ("GET", "/api/sync/queue?limit=99999999999", "", 400),
        ("GET", "/readyz", "", 503),
    ] {
        let (status, answer) = daemon.ask(method, path, "", body);
        assert_eq!(status, expected, "{method} {path}: {answer}");
        assert!(answer["detail"].is_string(), "{method} {path}: {answer}");
    }
    assert_eq!(
        daemon.ask("GET", "/healthz", "", ""),
        (200, json!({"status": "alive"}))
    );
    assert_eq!(
        daemon.ask("GET", "/api/sync/config", "", ""),
        (
            200,
            json!({"autoSyncEnabled": true, "syncIntervalMinutes": 1, "conflictResolutionStrategy": "manual",
                   "collectionsToSync": ["*"], "maxRetries": 3, "batchSize": 1000,
                   "collectionsFirst": [], "collectionsLast": []})
        )
    );
}

#[test]
fn without_a_token_only_this_machine_by_name_and_no_other_sites_page() {
    let daemon = Daemon::start(None);
    let evil = "Host: evil.example\r\n";
    assert_eq!(daemon.ask("GET", "/api/sync/config", evil, "").0, 403);
    assert_eq!(daemon.ask("GET", "/nowhere", evil, "").0, 403);
    assert_eq!(daemon.ask("GET", "/healthz", evil, "").0, 200);
    assert_eq!(
        daemon
            .ask(
                "POST",
                "/api/sync/pause",
                "Origin: https://evil.example\r\n",
                ""
            )
            .0,
        403
    );
}

#[test]
fn with_a_token_only_who_knows_it() {
    let daemon = Daemon::start(Some("correct"));
    for (headers, expected) in [
        ("", 401),
        ("Authorization: Bearer wrong\r\n", 401),
        ("Authorization: Bearer correct\r\n", 200),
        (
            "Authorization: Bearer correct\r\nHost: temple.example\r\n",
            200,
        ),
    ] {
        let (status, answer) = daemon.ask("GET", "/api/sync/config", headers, "");
        assert_eq!(status, expected, "{headers}: {answer}");
    }
    assert_eq!(
        daemon.ask("GET", "/nowhere", "", "").0,
        401,
        "who doesn't know it learns nothing"
    );
    assert_eq!(daemon.ask("GET", "/healthz", "", "").0, 200);
    assert!(!daemon.log().contains("correct"));
}

#[test]
fn term_stops_it_with_0_and_the_port_is_free_again() {
    let mut daemon = Daemon::start(None);
    // A client that never finishes its request must not hold it up.
    let mut idle = TcpStream::connect(daemon.address).unwrap();
    idle.write_all(b"GET /healthz HTTP/1.1\r\n").unwrap();
    daemon.signal("TERM");
    assert_eq!(daemon.ended(), Some(0), "{}", daemon.log());
    assert!(TcpListener::bind(daemon.address).is_ok());
}

fn second(folder: &std::path::Path, state: Option<&str>) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sangam"));
    command.arg("run").current_dir(folder).env_clear();
    if let Some(state) = state {
        let old = std::fs::read_to_string(folder.join("sangam.toml")).unwrap();
        let new = old.replace("/state", state);
        assert_ne!(old, new, "the configuration names its state");
        std::fs::write(folder.join("second.toml"), new).unwrap();
        command.args(["--config", "second.toml"]);
    }
    let output = command.output().unwrap();
    (
        output.status.code(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn a_second_daemon_on_the_state_is_told_so() {
    let first = Daemon::start(None);
    let (code, stderr) = second(first.folder.path(), None);
    assert_eq!(code, Some(78), "{stderr}");
    assert!(
        stderr.contains("another sangam already works in"),
        "{stderr}"
    );
}

#[test]
fn a_second_daemon_on_the_address_is_told_so() {
    let first = Daemon::start(None);
    let (code, stderr) = second(first.folder.path(), Some("/other-state"));
    assert_eq!(code, Some(1), "{stderr}");
    assert!(
        stderr.contains("perhaps another sangam") && stderr.contains("api.listen"),
        "{stderr}"
    );
}

#[test]
fn the_control_file_is_answered_line_by_line_within_seconds() {
    let mut daemon = Daemon::start(None);
    let result = daemon.file("control.result");
    std::fs::write(daemon.file("control"), "dance\npause\n\nresume\n").unwrap();
    daemon.wait("the result", |_| result.exists());
    let answer = std::fs::read_to_string(&result).unwrap();
    let lines: Vec<&str> = answer.lines().collect();
    assert_eq!(lines.len(), 3, "{answer}");
    assert!(
        lines[0].starts_with("error: there is no command \"dance\""),
        "{answer}"
    );
    assert!(
        lines[1].starts_with("paused") && lines[2].starts_with("resumed"),
        "{answer}"
    );
    assert_eq!(
        std::fs::read(daemon.file("control")).unwrap(),
        b"",
        "the file is emptied"
    );
}

#[test]
fn hup_reloads_and_a_bad_file_changes_nothing() {
    let mut daemon = Daemon::start(None);
    let file = daemon.file("sangam.toml");
    let good = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{good}[sync]\nbatch_size = 0\n")).unwrap();
    daemon.signal("HUP");
    daemon.wait("the refusal", |daemon| {
        daemon
            .log()
            .contains("must be a whole number from 1 to 10000")
    });
    assert_eq!(
        daemon.ask("GET", "/api/sync/config", "", "").1["batchSize"],
        1000
    );

    std::fs::write(&file, format!("{good}[sync]\nbatch_size = 77\n")).unwrap();
    daemon.signal("HUP");
    daemon.wait("the new value", |daemon| {
        daemon.ask("GET", "/api/sync/config", "", "").1["batchSize"] == 77
    });
}

#[test]
fn a_second_signal_stops_at_once() {
    let mut daemon = Daemon::start(None);
    // A request whose body never comes is waited for when stopping, for a while.
    let mut half = TcpStream::connect(daemon.address).unwrap();
    half.write_all(
        b"POST /api/sync/sync HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    )
    .unwrap();
    daemon.wait("the API to work on it", |daemon| {
        daemon.ask("GET", "/healthz", "", "").0 == 200
    });
    daemon.signal("INT");
    daemon.wait("the first to be taken", |daemon| {
        daemon.log().contains("a second signal stops at once")
    });
    daemon.signal("TERM");
    assert_eq!(daemon.ended(), Some(128 + 15), "{}", daemon.log());
}

#[test]
fn systemd_hears_that_it_lives_but_is_not_ready_and_when_it_stops() {
    let mut daemon = Daemon::start(None);
    let mut heard = String::new();
    for expected in ["EXTEND_TIMEOUT_USEC=", "WATCHDOG=1"] {
        daemon.wait(expected, |daemon| {
            listen(&daemon.systemd, &mut heard);
            heard.contains(expected)
        });
    }
    daemon.signal("TERM");
    assert_eq!(daemon.ended(), Some(0));
    listen(&daemon.systemd, &mut heard);
    assert!(heard.contains("STOPPING=1"), "{heard}");
    assert!(
        !heard.contains("READY=1"),
        "nothing is captured while the local server is away: {heard}"
    );
}

/// Everything said so far.
fn listen(socket: &UnixDatagram, heard: &mut String) {
    let mut buffer = [0; 4096];
    while let Ok(length) = socket.recv(&mut buffer) {
        heard.push_str(&String::from_utf8_lossy(&buffer[..length]));
        heard.push('\n');
    }
}
