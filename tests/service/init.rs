//! `sangam init` from outside, without a person: what it writes, what it makes of the local server.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::common::{SOON, World, wait_until};
use mongodb::bson::doc;
use sangam::mongod::{MongoServer, ServerOptions};
use sangam::process::Child;

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sangam"));
    for name in ["MONGODB_LOCAL_URL", "MONGODB_CLOUD_URL", "DATABASE_NAME"] {
        command.env_remove(name);
    }
    command
        .current_dir(dir)
        .arg("init")
        .args(args)
        .stdin(Stdio::null());
    command
}

fn init(dir: &Path, args: &[&str]) -> Output {
    command(dir, args).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[tokio::test(flavor = "multi_thread")]
async fn init_writes_what_the_daemon_reads_and_keeps_passwords_apart() {
    let world = World::new("init").await;
    let dir = tempfile::tempdir().unwrap();
    let local = world.servers().local.uri();
    let nowhere = "mongodb://u:planted@127.0.0.1:1/";
    let args = ["--database", "a_db", "--local", &local, "--remote", nowhere];
    let output = init(dir.path(), &args);
    let told = text(&output);
    assert!(output.status.success(), "{told}");
    assert!(told.contains("answers (replica set rs_local)"), "{told}");
    assert!(told.contains("can't be used"), "the remote is away: {told}");
    assert!(
        told.contains("db.createRole({") && told.contains("db: \"a_db\""),
        "{told}"
    );
    assert!(!told.contains("planted"), "R23: {told}");
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    assert!(
        !read("sangam.toml").contains("planted"),
        "{}",
        read("sangam.toml")
    );
    assert!(read(".env").contains("MONGODB_CLOUD_URL='mongodb://u:planted@127.0.0.1:1/'"));
    let mode = std::fs::metadata(dir.path().join(".env"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);

    // Nothing is overwritten, and without a name for the database nothing is guessed.
    let again = init(dir.path(), &args);
    assert_eq!(again.status.code(), Some(1), "{}", text(&again));
    let unnamed = init(tempfile::tempdir().unwrap().path(), &["--local", &local]);
    assert_eq!(unnamed.status.code(), Some(2), "{}", text(&unnamed));
    let other = tempfile::tempdir().unwrap();
    let away = ["--database", "d", "--local", "mongodb://127.0.0.1:1/"];
    let away = init(other.path(), &away);
    assert_eq!(away.status.code(), Some(69), "{}", text(&away));
    assert!(!other.path().join("sangam.toml").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn init_makes_a_replica_set_of_one_if_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let (data, place) = (dir.path().join("data"), dir.path().join("place"));
    std::fs::create_dir(&place).unwrap();
    let options = ServerOptions {
        set_name: None,
        ..ServerOptions::default()
    };
    let mut alone = MongoServer::start_with(&data, options).await.unwrap();
    let uri = format!("mongodb://{}/?replicaSet=rs0", alone.address());
    let args = ["--database", "d", "--local", &uri, "--initiate"];
    let told = init(&place, &args);
    assert_eq!(told.status.code(), Some(69));
    assert!(text(&told).contains("--replSet rs0"), "{}", text(&told));
    assert!(!text(&told).contains("keyFile"), "{}", text(&told));

    // Started as told, it only waits for the word.
    let _waiting = start_again(&mut alone, &["--replSet", "rs0"]).await;
    let untold = init(&place, &["--database", "d", "--local", &uri]);
    assert_eq!(untold.status.code(), Some(69));
    assert!(
        text(&untold).contains("--initiate makes it one"),
        "{}",
        text(&untold)
    );
    let told = init(&place, &["--database", "d", "--local", &uri, "--initiate"]);
    assert!(told.status.success(), "{}", text(&told));
    takes_writes(&uri).await;
}

/// An administrator at work: what `init` says is done to the letter while it waits.
#[tokio::test(flavor = "multi_thread")]
async fn init_says_what_to_change_and_waits_for_the_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (config, place) = (dir.path().join("mongod.conf"), dir.path().join("place"));
    std::fs::create_dir(&place).unwrap();
    let replication = "replication:\n  oplogSizeMB: 64\n";
    let security = "security:\n  authorization: enabled\n";
    std::fs::write(&config, format!("{replication}{security}")).unwrap();
    let options = ServerOptions {
        set_name: None,
        auth: Some(("root".into(), "planted".into())),
        extra_args: vec!["--config".into(), config.display().to_string()],
        ..ServerOptions::default()
    };
    let mut alone = MongoServer::start_with(&dir.path().join("data"), options)
        .await
        .unwrap();
    let nobody = format!("mongodb://{}/?replicaSet=rs0", alone.address());
    let refused = init(
        &place,
        &["--database", "d", "--local", &nobody, "--initiate"],
    );
    assert_eq!(refused.status.code(), Some(69));
    let why = "give the address with its administrator's name and password";
    assert!(text(&refused).contains(why), "{}", text(&refused));

    let uri = format!(
        "mongodb://root:planted@{}/?authSource=admin&replicaSet=rs0",
        alone.address()
    );
    let args = ["--database", "d", "--local", &uri, "--initiate", "--wait"];
    let mut waiting = command(&place, &args)
        .arg("5m")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(waiting.stdout.take().unwrap()).lines();
    let said: Vec<String> = lines
        .by_ref()
        .map(Result::unwrap)
        .take_while(|line| !line.contains("Waiting for the restart"))
        .collect();
    let said = said.join("\n");
    assert!(said.contains(config.to_str().unwrap()), "{said}");
    assert!(
        said.contains("replication:      # is there already"),
        "{said}"
    );
    assert!(said.contains("openssl rand -base64 756"), "{said}");
    let named = |what: &str| {
        let found = said.lines().find(|l| l.trim().starts_with(what));
        found
            .unwrap_or_else(|| panic!("no {what} in {said}"))
            .trim()
    };
    let (set, key_file) = (named("replSetName:"), named("keyFile:"));
    // Where this test may write.
    let key = dir.path().join("key");
    let key_file = key_file.replace("/etc/mongod.keyfile", key.to_str().unwrap());
    std::fs::write(&key, "as good as any random text").unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o400)).unwrap();
    let changed = format!("{replication}  {set}\n{security}  {key_file}\n");
    std::fs::write(&config, changed).unwrap();
    let _restarted = start_again(&mut alone, &[]).await;

    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    let rest = rest.join("\n");
    assert!(waiting.wait().unwrap().success(), "{rest}");
    assert!(rest.contains("is now the replica set rs0"), "{rest}");
    assert!(!(said + &rest).contains("planted"), "R23");
    assert!(place.join("sangam.toml").exists());
    takes_writes(&uri).await;
}

/// Ends a server and starts it anew with the same arguments and these.
async fn start_again(server: &mut MongoServer, more: &[&str]) -> Child {
    let process = Path::new("/proc").join(server.pid().unwrap().to_string());
    let program = std::fs::read_link(process.join("exe")).unwrap();
    let line = std::fs::read_to_string(process.join("cmdline")).unwrap();
    let line: Vec<&str> = line.trim_end_matches('\0').split('\0').skip(1).collect();
    server.kill9().unwrap();
    let mut command = Command::new(program);
    command.args(line).args(more).stdout(Stdio::null());
    let child = Child::spawn(&mut command).unwrap();
    wait_until(SOON, "mongod listens", async || {
        let reached = tokio::net::TcpStream::connect(server.address()).await;
        reached.map(|_| ()).map_err(|e| e.to_string())
    })
    .await;
    child
}

async fn takes_writes(uri: &str) {
    let client = mongodb::Client::with_uri_str(uri).await.unwrap();
    wait_until(SOON, "it takes writes", async || {
        let written = client
            .database("d")
            .collection("c")
            .insert_one(doc! {"_id": 1})
            .await;
        written.map(|_| ()).map_err(|e| e.to_string())
    })
    .await;
}
