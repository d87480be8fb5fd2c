//! `sangam doctor` from outside: what it says of a healthy pair, and of each thing that is wrong.

use std::os::unix::fs::PermissionsExt as _;

use crate::common::World;
use mongodb::bson::{DateTime, doc};
use sangam::mongod::{MongoServer, ServerOptions};
use serde_json::Value;

/// Runs it: exit code, findings.
fn examine(settings: &crate::common::Settings) -> (i32, Vec<Value>) {
    settings.write();
    let mut command = settings.command();
    let output = command.args(["--json", "doctor"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let report: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let findings = report["findings"].as_array().unwrap().clone();
    (output.status.code().unwrap(), findings)
}

fn find<'a>(findings: &'a [Value], words: &str) -> &'a Value {
    let found = findings
        .iter()
        .find(|f| f["what"].as_str().unwrap().contains(words));
    found.unwrap_or_else(|| panic!("nothing about {words:?} in {findings:#?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_pair_has_no_problem_and_what_is_odd_has_a_remedy() {
    let world = World::new("doctor").await;
    let settings = world
        .settings()
        .set("unique_fields.admins", "[\"username\"]");
    let daemon = world.start_with(settings.clone()).await;
    let admins = world.local.collection("admins");
    admins
        .insert_one(doc! {"_id": 1, "username": "a"})
        .await
        .unwrap();
    let fine = doc! {"_id": 1, "updatedAt": DateTime::now()};
    world
        .local
        .collection("fine")
        .insert_one(fine)
        .await
        .unwrap();
    world.wait_converged(&daemon).await;
    let (code, findings) = examine(&settings);
    assert_eq!(code, 3, "warnings only: {findings:#?}");
    for f in &findings {
        assert_ne!(f["level"], "problem", "{f}");
        let advised = f["level"] == "good" || !f["fix"].as_array().unwrap().is_empty();
        assert!(advised && (f["level"] == "good" || f["why"] != ""), "{f}");
    }
    for words in [
        "is valid",
        "can be written",
        "runs, version",
        "changes of",
        "ms apart",
    ] {
        assert_eq!(find(&findings, words)["level"], "good", "{words}");
    }
    let unique = find(
        &findings,
        "admins.username has no unique index on the remote side",
    );
    assert!(
        unique["fix"][0].as_str().unwrap().contains("createIndex"),
        "{unique}"
    );
    let undated = find(&findings, "without a date in updatedAt");
    let what = undated["what"].as_str().unwrap();
    assert!(
        what.contains(".admins") && !what.contains(".fine"),
        "{what}"
    );

    // For a person, with the same in words.
    let output = settings.cli(&["doctor"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("why: ") && text.contains("type: ") && text.contains("0 problems"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_told_with_cause_and_remedy_and_no_secret() {
    let world = World::new("doctor_bad").await;
    let dir = tempfile::tempdir().unwrap();
    let options = ServerOptions {
        set_name: None,
        ..ServerOptions::default()
    };
    let alone = MongoServer::start_with(dir.path(), options).await.unwrap();
    let port = sangam::process::free_port().unwrap();
    let nobody = port.number();
    let remote = format!(
        "\"mongodb://boss:s3cr3t-word@127.0.0.1:{}/?directConnection=true\"",
        nobody
    );
    let settings = world
        .settings()
        .set("local.uri", &format!("{:?}", alone.uri()))
        .set("remote.uri", &remote)
        .set("state_dir", "\"/no/such/folder\"");
    let path = settings.write();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let (code, findings) = examine(&settings);
    assert_eq!(code, 1);
    let fix = |words: &str| find(&findings, words)["fix"].to_string();
    assert!(fix("others may read it").contains("chmod 600"));
    assert!(fix("/no/such/folder can't be read").contains("mkdir"));
    assert!(fix("no daemon runs").contains("systemctl start"));
    assert!(fix("standalone").contains("rs.initiate()"));
    assert!(fix(&format!("127.0.0.1:{nobody} can't be reached")).contains("nc -vz"));
    let all = format!("{findings:?}");
    assert!(
        !all.contains("s3cr3t-word") && !all.contains("boss"),
        "R23: {all}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_support_bundle_has_no_secret_and_no_value() {
    let world = World::new("bundle").await;
    let settings = world
        .settings()
        .token("planted-token")
        .set("api.tokens.desk.token", "\"planted-desk\"")
        .set(
            "notify.command",
            "[\"/bin/true\", \"--key=planted-argument\"]",
        )
        .set("sync.max_retries", "0");
    let uri = world.link.uri_as("planted-user", "planted%2Dpassword");
    let daemon = world.start_with(settings).await;
    crate::common::conflict::unique_usernames(&world).await;
    let validator = doc! {"n": {"$lt": 10}};
    let refusing = world.remote.create_collection("v").validator(validator);
    refusing.await.unwrap();
    world.wait_converged(&daemon).await;
    let refused = doc! {"_id": "planted-id", "n": 50, "text": "planted-value"};
    world
        .local
        .collection("v")
        .insert_one(refused)
        .await
        .unwrap();
    crate::common::conflict::open(&daemon, 1).await;
    crate::common::conflict::apart(&daemon, async {
        for (db, id) in [(&world.local, "planted-l"), (&world.remote, "planted-r")] {
            let one = doc! {"_id": id, "username": "planted-name"};
            db.collection("admins").insert_one(one).await.unwrap();
        }
    })
    .await;
    crate::common::conflict::open(&daemon, 2).await;
    let log = world.dir().join("some.log");
    let line = format!(
        "{}\ncould not reach {uri}\nBearer planted-token\nplanted-password\nplanted-argument\n",
        daemon.log()
    );
    std::fs::write(&log, line).unwrap();
    let to = world.dir().join("bundle.tar.gz");
    let args = [
        "support-bundle",
        "--to",
        to.to_str().unwrap(),
        "--log",
        log.to_str().unwrap(),
    ];
    let settings = daemon
        .settings
        .clone()
        .set("remote.uri", &format!("{uri:?}"));
    let output = settings.cli(&args);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        std::fs::metadata(&to).unwrap().permissions().mode() & 0o777,
        0o600
    );

    let file = std::fs::File::open(&to).unwrap();
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(file));
    let mut all = std::collections::BTreeMap::new();
    for entry in archive.entries().unwrap() {
        use std::io::Read as _;
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        all.insert(name, text);
    }
    for (name, text) in &all {
        for line in text.lines() {
            assert!(!line.contains("planted"), "{name}: {line}");
        }
    }
    for (name, words) in [
        ("versions.json", env!("CARGO_PKG_VERSION")),
        ("config.json", "sync.batch_size"),
        ("status.json", "unresolvedConflicts"),
        ("queue.json", "waiting"),
        ("conflicts.json", "unique_field"),
        ("runs.json", "startTime"),
        ("doctor.json", "findings"),
        ("sangam.log", "INFO"),
    ] {
        let text = &all[&format!("sangam-support/{name}")];
        assert!(text.contains(words), "{name}: {text}");
    }
}
