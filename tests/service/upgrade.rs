//! State files of earlier versions: each opens, with everything in it.
//!
//! `tests/fixtures/state-format-N.db.zst` is the state file of a daemon of the last version with that
//! format, in the middle of its work. Until the format is released, it is made anew with
//! `cargo test --test service upgrade -- --ignored`; after that it stays as it is for ever.

use std::path::{Path, PathBuf};

use crate::common::kit::{Docs, PATIENT, both, cut, dealt_with, fill, index, set};
use crate::common::{Daemon, World, wait_until};
use mongodb::IndexModel;
use mongodb::bson::{Document, doc};
use mongodb::options::IndexOptions;
use rusqlite::Connection;
use sangam::decide::Side;
use sangam::key::{Id, Key};
use sangam::overrides::Overrides;
use sangam::store::{Store, base, lanes, queue, records};
use serde_json::json;

/// The newest format.
const NEWEST: u32 = 2;

fn fixture(format: u32) -> PathBuf {
    let name = format!("tests/fixtures/state-format-{format}.db.zst");
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// A state directory with the file of that format.
fn unpacked(format: u32, dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    let packed = std::fs::read(fixture(format)).expect("each format has its fixture");
    let bytes = zstd::decode_all(packed.as_slice()).unwrap();
    std::fs::write(dir.join("sangam.db"), bytes).unwrap();
}

/// Tables, indexes and triggers of a state file, however they are written.
fn tables(dir: &Path) -> Vec<String> {
    let c = Connection::open(dir.join("sangam.db")).unwrap();
    let mut sql = c
        .prepare("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type, name")
        .unwrap();
    let sql = sql.query_map([], |r| r.get::<_, String>(0)).unwrap();
    let words = |s: String| s.split_whitespace().collect::<Vec<_>>().join(" ");
    sql.map(|s| words(s.unwrap())).collect()
}

#[tokio::test]
async fn a_state_file_of_every_format_opens_with_everything_in_it() {
    let fresh = tempfile::tempdir().unwrap();
    drop(Store::open(fresh.path()).unwrap());
    let files = std::fs::read_dir(fixture(1).parent().unwrap()).unwrap();
    assert_eq!(
        files.count(),
        NEWEST as usize,
        "one fixture for each format"
    );
    for format in 1..=NEWEST {
        let dir = tempfile::tempdir().unwrap();
        unpacked(format, dir.path());
        // WHEN it is opened THEN it is neither put aside nor refused, and has the tables of a new one
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.put_aside(), None, "{format}");
        assert_eq!(tables(dir.path()), tables(fresh.path()), "{format}");
        let of = async |coll: &str| {
            let dbs =
                store.call(|c| c.query_row("SELECT db FROM namespaces LIMIT 1", [], |r| r.get(0)));
            let db: String = dbs.await.unwrap();
            store.namespace(&db, coll).await.unwrap()
        };
        let (c, users, strict, lost) = (
            of("c").await,
            of("users").await,
            of("strict").await,
            of("lost").await,
        );
        let found = store.call(move |conn| {
            // What both sides agreed on
            let key = |ns, id: mongodb::bson::Bson| {
                let raw = doc! {"_id": id}.to_vec().unwrap();
                Key::new(ns, &Id::of(&raw).unwrap())
            };
            let agreed = base::get(conn, &key(c, 10.into()))?.unwrap();
            let agreed = Document::from_reader(agreed.as_slice()).unwrap();
            assert_eq!(agreed, doc! {"_id": 10, "v": 0});
            let large = base::get(conn, &key(c, "large".into()))?.unwrap();
            assert!(large.len() > 5000, "a content that is kept compressed");
            // AND what waits: two documents of a transaction, a deletion, a remote one
            let out = queue::counts(conn, Side::Local)?;
            let inn = queue::counts(conn, Side::Remote)?;
            assert_eq!(
                (out.failed, queue::count_of(conn, strict)?),
                (1, 1),
                "{out:?}"
            );
            assert!(
                out.conflict >= 2 && out.all >= 6 && inn.all >= 2,
                "{out:?} {inn:?}"
            );
            let together = "SELECT count(*) FROM transactions";
            assert_eq!(conn.query_row(together, [], |r| r.get::<_, i64>(0))?, 2);
            let mut oldest = lanes::list(conn, 100, &[])?;
            oldest.retain(|row| row.1 == key(c, 3.into()));
            assert_eq!(oldest.len(), 1, "the deletion");
            // AND the conflicts, the collection on hold, the settings of the API
            assert_eq!(records::count_open(conn)?, 3);
            let kind = |k: &Key| records::open_conflict(conn, k).map(|o| o.map(|o| o.kind));
            assert_eq!(kind(&key(c, 7.into()))?.as_deref(), Some("both_modified"));
            assert_eq!(
                kind(&key(users, 1.into()))?.as_deref(),
                Some("unique_field")
            );
            assert_eq!(kind(&key(strict, 1.into()))?.as_deref(), Some("rejected"));
            let held = sangam::halt::all(conn)?;
            assert_eq!(held.iter().map(|(ns, _)| *ns).collect::<Vec<_>>(), [lost]);
            let names: Vec<String> = Overrides::load(conn)?.names().map(Into::into).collect();
            assert_eq!(names, ["batchSize"]);
            // AND where the streams were, and the history of the dashboard
            let tokens = "SELECT count(*) FROM meta WHERE k LIKE 'token:%'";
            assert_eq!(conn.query_row(tokens, [], |r| r.get::<_, i64>(0))?, 2);
            let link = "SELECT count(*) FROM link_history";
            assert!(conn.query_row(link, [], |r| r.get::<_, i64>(0))? > 0);
            Ok(())
        });
        found.await.unwrap();
    }
}

#[tokio::test]
async fn a_daemon_goes_on_with_an_old_state_or_says_what_is_in_the_way() {
    // GIVEN an old state, which belongs to other databases than these
    let world = World::new("old_state").await;
    let settings = world.settings();
    let mut daemon = Daemon::spawn(&world, settings);
    daemon.kill9();
    let _ = std::fs::remove_dir_all(daemon.state_dir());
    unpacked(1, &daemon.state_dir());
    // WHEN a daemon starts on it THEN it opens the file, and refuses the databases (R12)
    daemon.settings = (daemon.settings.clone()).set("database", "\"fixture\"");
    daemon.respawn();
    assert_eq!(daemon.wait_exit().await.code(), Some(78));
    daemon.wait_log("reconcile --adopt").await;
    // WHEN the file is of a newer format THEN that is refused, with both versions and the remedy
    let file = daemon.state_dir().join("sangam.db");
    let c = Connection::open(&file).unwrap();
    c.execute_batch("PRAGMA user_version=1000; UPDATE meta SET v = '9.8.7' WHERE k = 'written_by'")
        .unwrap();
    drop(c);
    daemon.respawn();
    assert_eq!(daemon.wait_exit().await.code(), Some(78));
    let log = daemon.log();
    for part in [
        "sangam 9.8.7 (format 1000)",
        env!("CARGO_PKG_VERSION"),
        "move the file away",
    ] {
        assert!(log.contains(part), "{part}: {log}");
    }
}

/// Makes the fixture of the newest format: the state of a real daemon with something of everything.
#[tokio::test]
#[ignore = "makes a file that is committed"]
async fn make_the_fixture() {
    let mut world = World::new("fixture").await;
    world.name = "fixture".into();
    world.local = world.local.client().database("fixture");
    world.remote = world.remote.client().database("fixture");
    let mut daemon = world.start().await;
    // Unique names and a validator on the remote
    let unique = IndexOptions::builder().unique(true).build();
    let by_name = IndexModel::builder()
        .keys(doc! {"u": 1})
        .options(unique)
        .build();
    index(&world, "users", by_name).await;
    let strict = doc! {"create": "strict", "validator": {"n": {"$gt": 0}}};
    world.remote.run_command(strict).await.unwrap();
    let (here, there) = fill(&world, &daemon, "c", 30).await;
    fill(&world, &daemon, "lost", 5).await;
    here.insert_one(doc! {"_id": "large", "text": "to and fro ".repeat(500)})
        .await
        .unwrap();
    world.wait_converged_within(PATIENT, &daemon).await;
    let settings = json!({"batchSize": 500});
    assert_eq!(
        daemon
            .put("/api/sync/config", settings)
            .await
            .unwrap()
            .status,
        200
    );
    // A collection on hold, a document that is refused, two kinds of conflict
    cut(&world, &daemon).await;
    let users: (Docs, Docs) = both(&world, "users");
    users.0.insert_one(doc! {"_id": 1, "u": "a"}).await.unwrap();
    users.1.insert_one(doc! {"_id": 2, "u": "a"}).await.unwrap();
    set(&here, 7, doc! {"v": 1}).await;
    set(&there, 7, doc! {"v": 2}).await;
    let refused: Docs = world.local.collection("strict");
    refused.insert_one(doc! {"_id": 1, "n": 0}).await.unwrap();
    world
        .local
        .collection::<Document>("lost")
        .drop()
        .await
        .unwrap();
    world.link.heal();
    daemon.wait_status("unresolvedConflicts", |n| *n == 4).await;
    // The run that follows an outage tries what was refused once more.
    dealt_with(&daemon).await;
    daemon.wait_status("failedDocuments", |n| *n == 1).await;
    // What waits
    let paused = daemon.post("/api/sync/pause", json!({})).await.unwrap();
    assert_eq!(paused.status, 200);
    here.delete_one(doc! {"_id": 3}).await.unwrap();
    here.insert_one(doc! {"_id": "waits"}).await.unwrap();
    there.insert_one(doc! {"_id": "waits there"}).await.unwrap();
    let mut session = world.local.client().start_session().await.unwrap();
    session.start_transaction().await.unwrap();
    for id in [20, 21] {
        here.update_one(doc! {"_id": id}, doc! {"$set": {"v": 9}})
            .session(&mut session)
            .await
            .unwrap();
    }
    session.commit_transaction().await.unwrap();
    let file = daemon.state_dir().join("sangam.db");
    wait_until(PATIENT, "all of it is queued", async || {
        let c = Connection::open(&file).unwrap();
        let count = |sql| c.query_row(sql, [], |r| r.get::<_, i64>(0)).unwrap();
        let counts = (
            count("SELECT count(*) FROM transactions"),
            count("SELECT count(*) FROM outbox WHERE held IS NULL"),
            count("SELECT count(*) FROM inbox WHERE held IS NULL"),
        );
        (counts.0 == 2 && counts.1 >= 4 && counts.2 >= 1)
            .then_some(())
            .ok_or_else(|| format!("{counts:?}"))
    })
    .await;
    assert!(daemon.terminate().await.success());
    // Folded into one file, and as small as it gets
    let small = world.dir().join("small.db");
    let c = Connection::open(&file).unwrap();
    c.execute("VACUUM INTO ?", [small.to_str()]).unwrap();
    let packed = zstd::encode_all(std::fs::read(&small).unwrap().as_slice(), 19).unwrap();
    std::fs::create_dir_all(fixture(NEWEST).parent().unwrap()).unwrap();
    std::fs::write(fixture(NEWEST), packed).unwrap();
    world.local.drop().await.unwrap();
    world.remote.drop().await.unwrap();
}
