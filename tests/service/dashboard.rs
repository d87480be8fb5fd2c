//! What the dashboard is served from, and who is told what happens.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::kit::{both, dealt_with};
use crate::common::{World, wait_until};
use mongodb::bson::doc;
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(60);

/// One request without a body; the head of the answer, and the connection to read on from.
fn ask(port: u16, path: &str, headers: &str) -> (String, BufReader<TcpStream>) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\n{headers}\r\n").unwrap();
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(reader.read_line(&mut head).unwrap(), 0, "{head}");
    }
    (head.to_lowercase(), reader)
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_are_strict_and_events_come_as_things_change() {
    let world = World::new("pages").await;
    let daemon = world.start().await;
    let port = daemon.settings.api_port();
    let host = "host: localhost\r\n";
    for path in ["/", "/app.js", "/app.css", "/api/sync/status", "/nothing"] {
        let (head, _) = ask(port, path, host);
        for line in [
            "x-content-type-options: nosniff",
            "referrer-policy: no-referrer",
            "frame-ancestors 'none'",
            "default-src 'none'",
        ] {
            assert!(head.contains(line), "{path}: {line} is not in {head}");
        }
        assert!(!head.contains("unsafe"), "{path}: {head}");
    }
    let (head, _) = ask(port, "/app.js", host);
    let tag = head.lines().find_map(|l| l.strip_prefix("etag: ")).unwrap();
    let (head, _) = ask(port, "/app.js", &format!("{host}if-none-match: {tag}\r\n"));
    assert!(head.starts_with("http/1.1 304"), "{head}");
    // A name that somebody else's DNS server gave to this address; a page of another site.
    let (head, _) = ask(port, "/api/sync/events", "host: evil.example\r\n");
    assert!(head.starts_with("http/1.1 403"), "{head}");
    let elsewhere = format!("{host}sec-fetch-site: cross-site\r\n");
    let (head, _) = ask(port, "/api/sync/events", &elsewhere);
    assert!(head.starts_with("http/1.1 403"), "{head}");

    let session = daemon.get("/api/sync/session").await.unwrap();
    assert_eq!(session.body["role"], "admin");
    let (here, _) = both(&world, "c");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    dealt_with(&daemon).await;
    wait_until(LONG, "the collection is counted", async || {
        let list = daemon.get("/api/sync/collections").await?.body;
        let one = &list[0];
        let right = one["collection"] == "c"
            && (&one["local"], &one["remote"], &one["pending"])
                == (&json!(1), &json!(1), &json!(0))
            && one["lastChange"].is_string();
        right.then_some(()).ok_or_else(|| list.to_string())
    })
    .await;
    let past = daemon.get("/api/sync/history?hours=24").await.unwrap().body;
    assert_eq!(past["stepSeconds"], 60);
    assert_eq!(past["link"][0]["online"], true, "{past}");
    for hours in ["0", "x", "9601"] {
        let answer = daemon
            .get(&format!("/api/sync/history?hours={hours}"))
            .await;
        assert_eq!(answer.unwrap().status, 400, "{hours}");
    }

    let (head, mut events) = ask(port, "/api/sync/events", host);
    assert!(head.contains("content-type: text/event-stream"), "{head}");
    world.link.cut();
    let offline = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(events.read_line(&mut line).unwrap(), 0, "the stream ended");
            if let Some(data) = line.strip_prefix("data: ") {
                let overview: Value = serde_json::from_str(data).unwrap();
                if overview["status"]["isOnline"] == false {
                    return overview;
                }
            }
        }
    });
    let overview = tokio::time::timeout(LONG, offline).await.unwrap().unwrap();
    assert!(overview["queueLimitDocuments"].as_u64().unwrap() > 1000);
    world.link.heal();
}

/// Keeps what is posted to it; answers as `status` says.
struct Ear {
    port: u16,
    heard: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Ear {
    fn open() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let heard: Arc<Mutex<Vec<(String, Value)>>> = Arc::default();
        let keep = heard.clone();
        std::thread::spawn(move || {
            let mut refused = false;
            for stream in listener.incoming() {
                let mut reader = BufReader::new(stream.unwrap());
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head).unwrap() > 0 {}
                let lower = head.to_lowercase();
                let length = lower
                    .lines()
                    .find_map(|l| l.strip_prefix("content-length: "));
                let mut body = vec![0; length.map_or(0, |n| n.trim().parse().unwrap())];
                reader.read_exact(&mut body).unwrap();
                let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
                // The first one fails: it must come again.
                let fails = path == "/hook" && !refused;
                refused |= fails;
                let answer = if fails { "500 no" } else { "204 ok" };
                let said = format!("HTTP/1.1 {answer}\r\ncontent-length: 0\r\n\r\n");
                let _ = reader.get_mut().write_all(said.as_bytes());
                if !fails {
                    let event = serde_json::from_slice(&body).unwrap_or_default();
                    keep.lock().unwrap().push((path, event));
                }
            }
        });
        Self { port, heard }
    }

    fn events(&self, path: &str) -> Vec<Value> {
        let heard = self.heard.lock().unwrap();
        let of = heard.iter().filter(|(p, _)| p == path);
        of.map(|(_, event)| event.clone()).collect()
    }

    async fn wait(&self, name: &str) -> Value {
        wait_until(LONG, name, async || {
            let events = self.events("/hook");
            let found = events.iter().find(|e| e["event"] == name).cloned();
            found.ok_or_else(|| format!("{events:?}"))
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn people_are_told_once_by_webhook_and_command_and_the_heart_beats() {
    let world = World::new("told").await;
    let ear = Ear::open();
    let (script, told) = (world.dir().join("tell"), world.dir().join("told"));
    let text = format!("#!/bin/sh\ncat >> {told:?}\necho >> {told:?}\n");
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let address = |path: &str| format!("\"http://127.0.0.1:{}{path}\"", ear.port);
    let settings = world
        .settings()
        .set("notify.webhook", &address("/hook"))
        .set("notify.command", &format!("[{script:?}]"))
        .set("notify.offline_after", "\"1s\"")
        .set("notify.min_interval", "\"0s\"")
        .set("notify.heartbeat", &address("/alive"))
        .set("notify.heartbeat_interval", "\"1s\"");
    let mut daemon = world.start_with(settings).await;
    wait_until(LONG, "a heartbeat", async || {
        let beats = ear.events("/alive").len();
        (beats > 0).then_some(()).ok_or_else(|| "none".into())
    })
    .await;

    let (here, there) = both(&world, "c");
    daemon.post("/api/sync/pause", json!({})).await.unwrap();
    for (c, v) in [(&here, "secret-here"), (&there, "secret-there")] {
        c.insert_one(doc! {"_id": 1, "v": v}).await.unwrap();
    }
    daemon.post("/api/sync/resume", json!({})).await.unwrap();
    let event = ear.wait("conflicts").await;
    assert_eq!(event["details"]["new"], 1, "{event}");
    assert_eq!(event["databases"][0], world.name.as_str());
    assert!(!event.to_string().contains("secret-"), "{event}");

    world.link.cut();
    ear.wait("offline").await;
    daemon.restart().await;
    world.link.heal();
    ear.wait("online").await;
    let events = ear.events("/hook");
    for name in ["conflicts", "offline", "online"] {
        // A kill between a delivery and its record delivers the same one again.
        let of = events.iter().filter(|e| e["event"] == name);
        let ids: std::collections::BTreeSet<String> = of.map(|e| e["id"].to_string()).collect();
        assert_eq!(ids.len(), 1, "{name} is told once: {events:?}");
    }
    let by_command = std::fs::read_to_string(&told).unwrap();
    let lines: Vec<Value> = by_command
        .lines()
        .filter(|l| !l.is_empty())
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert!(lines.iter().any(|e| e["event"] == "conflicts"), "{lines:?}");
}
