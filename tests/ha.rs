//! High availability: of two daemons on one pair exactly one works, and another one takes over with
//! all that the first had not sent. Who was thought dead writes nothing any more.

#![allow(clippy::unwrap_used)] // clippy sees only the functions marked #[test] as tests

mod common;

use std::path::PathBuf;
use std::time::Duration;

use mongodb::bson::{Document, doc};
use sangam::faultlink::FaultLink;
use sangam::mongod::MongoServer;
use serde_json::Value;

use common::kit::{self, PATIENT, both, set, three, wait_content};
use common::{Daemon, Settings, World, wait_for, wait_until};

/// Waiting out a lease, on a machine that is busy with other tests.
const TAKE_OVER: Duration = Duration::from_secs(90);

const STRATEGY: &str = "sync.conflict_resolution_strategy";

/// Settings of one of several daemons on the pair.
fn settings(world: &World, name: &str) -> Settings {
    world
        .settings()
        .label(name)
        .set("ha.enabled", "true")
        .set("ha.name", &format!("{name:?}"))
}

async fn wait_role(daemon: &Daemon, role: &str) {
    let is = |ha: &Value| ha["role"] == *role;
    daemon.wait_status_within(TAKE_OVER, "ha", is).await;
}

/// The first works, the second stands by and has settled everything.
async fn pair(world: &World, first: Settings) -> (Daemon, Daemon) {
    let a = world.start_with(first).await;
    wait_role(&a, "holder").await;
    let b = world.start_with(settings(world, "b")).await;
    let is_a = |ha: &Value| ha["role"] == "standby" && ha["holder"] == "a";
    b.wait_status_within(TAKE_OVER, "ha", is_a).await;
    (a, b)
}

#[tokio::test(flavor = "multi_thread")]
async fn exactly_one_works_and_a_clean_stop_hands_over() {
    let world = World::new("ha_one").await;
    let (mut a, b) = pair(&world, settings(&world, "a")).await;
    let (here, there) = kit::fill(&world, &a, "c", 20).await;
    set(&there, 3, doc! {"v": 7}).await;
    wait_content(&here, 3, doc! {"_id": 3, "v": 7}).await;
    // The one that stands by settles what the other one has done, and does nothing itself.
    world.wait_converged_within(PATIENT, &b).await;
    let moved = |metrics: String| {
        let moved = metrics
            .lines()
            .filter(|l| l.starts_with("sangam_documents_total{"));
        moved
            .map(|l| l.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
            .sum::<f64>()
    };
    // What it has read of the other one's journal is cut off.
    let journal = world.local.collection::<Document>("sangam_lease");
    wait_until(PATIENT, "the journal is cut off", async || {
        let left = journal.count_documents(doc! {"count": {"$gt": 0}}).await;
        match common::yet(left)? {
            0 => Ok(()),
            left => Err(format!("{left} notes are left")),
        }
    })
    .await;
    let metrics = b.get("/metrics").await.unwrap().body;
    assert_eq!(
        moved(metrics.as_str().unwrap().to_owned()),
        0.0,
        "{metrics}"
    );
    let ready = b.get("/readyz").await.unwrap();
    assert_eq!(
        (ready.status, &ready.body["status"]),
        (200, &Value::from("standby"))
    );
    for order in ["sync", "pause", "reconcile", "conflicts/auto-resolve"] {
        let answer = b
            .post(&format!("/api/sync/{order}"), serde_json::json!({}))
            .await
            .unwrap();
        assert_eq!(answer.status, 409, "{order}: {}", answer.body);
        let detail = answer.body["detail"].as_str().unwrap();
        assert!(detail.contains("a works"), "{order}: {detail}");
    }

    assert!(a.terminate().await.success());
    wait_role(&b, "holder").await;
    set(&here, 4, doc! {"v": 8}).await;
    wait_content(&there, 4, doc! {"_id": 4, "v": 8}).await;
    kit::converged_without_conflict(&world, &b).await;

    // The lease itself stays where it is: it is no document of the app's.
    a.restart().await;
    wait_role(&a, "standby").await;
    let copies = world.remote.collection::<Document>("sangam_lease");
    let copied = copies
        .count_documents(doc! {"holder": {"$exists": true}})
        .await;
    assert_eq!(copied.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_holder_is_replaced_with_all_that_it_had_not_sent() {
    let world = World::new("ha_kill").await;
    let (mut a, b) = pair(&world, settings(&world, "a")).await;
    let (here, there) = kit::fill(&world, &a, "c", 30).await;
    // A conflict that is open when the holder dies.
    world.link.cut();
    a.wait_status("isOnline", |v| *v == false).await;
    set(&here, 20, doc! {"v": "ours"}).await;
    set(&there, 20, doc! {"v": "theirs"}).await;
    world.link.heal();
    a.wait_status_within(PATIENT, "unresolvedConflicts", |n| *n == 1)
        .await;
    wait_until(PATIENT, "the conflict is on record", async || {
        let n = world.conflicts().await.len();
        (n == 1).then_some(()).ok_or_else(|| format!("{n} are"))
    })
    .await;
    b.wait_status_within(PATIENT, "pendingDocuments", |n| n.as_u64() <= Some(1))
        .await;

    world.link.cut();
    for daemon in [&a, &b] {
        daemon.wait_status("isOnline", |v| *v == false).await;
    }
    here.delete_many(doc! {"_id": {"$lt": 3}}).await.unwrap();
    set(&here, 10, doc! {"v": 1}).await;
    here.insert_one(doc! {"_id": 100, "v": 0}).await.unwrap();
    for daemon in [&a, &b] {
        daemon
            .wait_status("pendingDocuments", |n| n.as_u64() >= Some(5))
            .await;
    }
    a.kill9();
    wait_role(&b, "holder").await;
    world.link.heal();

    wait_content(&there, 10, doc! {"_id": 10, "v": 1}).await;
    wait_content(&there, 100, doc! {"_id": 100, "v": 0}).await;
    for gone in 0..3 {
        wait_content(&there, gone, None).await;
        wait_content(&here, gone, None).await;
    }
    // What was in conflict still is, once, in the new holder's hands.
    b.wait_status_within(PATIENT, "unresolvedConflicts", |n| *n == 1)
        .await;
    wait_until(PATIENT, "one open record", async || {
        let all = world.conflicts().await;
        let handed = all
            .iter()
            .filter(|c| kit::says(c, "resolutionStrategy", "handed_over"));
        let handed = handed.count();
        match (all.len(), handed) {
            (2, 1) => Ok(()),
            _ => Err(format!("{all:#?}")),
        }
    })
    .await;
    let open = world.conflicts().await;
    let open = open
        .iter()
        .find(|c| !c.get_bool("resolved").unwrap())
        .unwrap();
    let id = open.get_object_id("_id").unwrap().to_hex();
    let answer = b
        .post(
            &format!("/api/sync/conflicts/{id}/resolve"),
            serde_json::json!({"strategy": "keep_local"}),
        )
        .await
        .unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    a.restart().await;
    for daemon in [&b, &a] {
        world.wait_converged_within(PATIENT, daemon).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_dead_holder_had_just_sent_is_known_to_the_next_one() {
    just_sent("ha_legacy", async |_| {}).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_dead_holder_had_just_sent_is_known_though_the_next_one_died_as_well() {
    just_sent("ha_legacy_again", async |b| {
        b.kill9();
        b.restart().await;
        wait_role(b, "holder").await;
    })
    .await;
}

/// A holder sends edits and dies, while others are made; `then` happens to the next one before the
/// link is back.
async fn just_sent(test: &str, then: impl AsyncFn(&mut Daemon)) {
    let world = World::new(test).await;
    let (mut a, mut b) = pair(&world, settings(&world, "a")).await;
    let (here, there) = kit::fill(&world, &a, "c", 3).await;
    world.wait_converged_within(PATIENT, &b).await;
    // The one that stands by sees nothing of this but how it ends.
    b.signal("STOP");
    for id in [1, 2] {
        set(&here, id, doc! {"v": 1}).await;
        wait_content(&there, id, doc! {"_id": id, "v": 1}).await;
    }
    kit::cut(&world, &a).await;
    set(&here, 1, doc! {"v": 2}).await;
    set(&here, 2, doc! {"v": 0}).await;
    a.kill9();
    b.signal("CONT");
    wait_role(&b, "holder").await;
    then(&mut b).await;
    world.link.heal();
    for (id, v) in [(1, 2), (2, 0)] {
        for docs in [&there, &here] {
            wait_content(docs, id, doc! {"_id": id, "v": v}).await;
        }
    }
    kit::converged_without_conflict(&world, &b).await;
}

/// Settings of a daemon with a way of its own to the remote, and with rules for counting.
fn far_off(world: &World, name: &str, way: &FaultLink) -> Settings {
    counting(settings(world, name)).set("remote.uri", &format!("{:?}", way.uri()))
}

fn counting(settings: Settings) -> Settings {
    settings
        .set("sync.rules.c.n", "\"sum_of_changes\"")
        .set("sync.rules.c.tags", "\"union\"")
}

/// The first works; the second has seen everything so far, and has no link to the remote any more.
async fn one_without_a_link(world: &World) -> (Daemon, Daemon, FaultLink) {
    let way = FaultLink::open(world.servers().remote.address())
        .await
        .unwrap();
    let a = world.start_with(counting(settings(world, "a"))).await;
    wait_role(&a, "holder").await;
    let b = world.start_with(far_off(world, "b", &way)).await;
    wait_role(&b, "standby").await;
    kit::fill(world, &a, "c", 4).await;
    world.wait_converged_within(PATIENT, &b).await;
    way.cut();
    b.wait_status("isOnline", |v| *v == false).await;
    (a, b, way)
}

/// Waits until whoever stands by has read all that the holder has put down of documents so far.
async fn wait_told(world: &World) {
    let journal = world.local.collection::<Document>("sangam_lease");
    let place = |d: Document| (d.get_i64("epoch").unwrap(), d.get_i64("n").unwrap());
    let latest = async |filter: Document| {
        let found = journal.find_one(filter).sort(doc! {"epoch": -1, "n": -1});
        Ok::<_, String>(common::yet(found.await)?.map(place))
    };
    let last = latest(doc! {"count": {"$gt": 0}}).await.unwrap();
    wait_until(PATIENT, "it is told", async || {
        let seen = latest(doc! {"_id": {"$regex": "^seen:"}}).await?;
        (seen >= last)
            .then_some(())
            .ok_or_else(|| format!("{seen:?}, not {last:?}"))
    })
    .await;
}

async fn add(c: &kit::Docs, n: i32) {
    let update = doc! {"$inc": {"n": n}};
    c.update_one(doc! {"_id": 2}, update).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_over_knows_what_was_agreed_on_while_it_had_no_link() {
    let world = World::new("ha_no_link").await;
    let (mut a, b, way) = one_without_a_link(&world).await;
    let (here, there) = both(&world, "c");
    // GIVEN documents that both sides go on editing, which b never sees equal
    set(&here, 1, doc! {"v": 1}).await;
    wait_content(&there, 1, doc! {"_id": 1, "v": 1}).await;
    set(&there, 1, doc! {"w": 1}).await;
    wait_content(&here, 1, doc! {"_id": 1, "v": 1, "w": 1}).await;
    set(&here, 2, doc! {"n": 5, "tags": ["a", "b"]}).await;
    let wanted = doc! {"_id": 2, "v": 0, "n": 5, "tags": ["a", "b"]};
    wait_content(&there, 2, wanted).await;
    add(&there, 3).await;
    let wanted = doc! {"_id": 2, "v": 0, "n": 8, "tags": ["a", "b"]};
    wait_content(&here, 2, wanted).await;
    here.delete_one(doc! {"_id": 3}).await.unwrap();
    wait_content(&there, 3, None).await;
    here.insert_one(doc! {"_id": 9, "x": 1, "y": 1})
        .await
        .unwrap();
    wait_content(&there, 9, doc! {"_id": 9, "x": 1, "y": 1}).await;
    wait_told(&world).await;
    kit::cut(&world, &a).await;
    set(&here, 1, doc! {"v": 2}).await;
    set(&there, 1, doc! {"w": 2}).await;
    add(&here, 10).await;
    add(&there, 100).await;
    let tag = doc! {"$pull": {"tags": "a"}};
    there.update_one(doc! {"_id": 2}, tag).await.unwrap();
    there
        .insert_one(doc! {"_id": 3, "v": "anew"})
        .await
        .unwrap();
    set(&here, 9, doc! {"x": 2}).await;
    set(&there, 9, doc! {"y": 2}).await;
    // WHEN the holder dies
    a.kill9();
    wait_role(&b, "holder").await;
    way.heal();
    // THEN the next one merges as the first would have
    for docs in [&here, &there] {
        wait_content(docs, 1, doc! {"_id": 1, "v": 2, "w": 2}).await;
        let wanted = doc! {"_id": 2, "v": 0, "n": 118, "tags": ["b"]};
        wait_content(docs, 2, wanted).await;
        wait_content(docs, 3, doc! {"_id": 3, "v": "anew"}).await;
        wait_content(docs, 9, doc! {"_id": 9, "x": 2, "y": 2}).await;
    }
    kit::converged_without_conflict(&world, &b).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_starts_again_tells_what_it_had_not() {
    let world = World::new("ha_owed").await;
    let (mut a, b, way) = one_without_a_link(&world).await;
    let (here, there) = both(&world, "c");
    // GIVEN a holder that dies between its last write and telling the others what became of it
    let settings = a.settings.clone();
    a.kill9();
    a.settings = settings.clone().env("SANGAM_FAILPOINT", "after_base:1");
    a.restart().await;
    wait_role(&a, "holder").await;
    set(&here, 1, doc! {"v": 1}).await;
    a.wait_exit().await;
    wait_content(&there, 1, doc! {"_id": 1, "v": 1}).await;
    // AND that in two notes, as when the first one still waits for its record
    let journal = world.local.collection::<Document>("sangam_lease");
    let last = journal
        .find_one(doc! {"count": {"$gt": 0}})
        .sort(doc! {"_id": -1});
    let mut note = last.await.unwrap().unwrap();
    let n = note.get_i64("n").unwrap() + 1;
    let id = note.get_str("_id").unwrap();
    let id = format!("{}{:016x}", &id[..id.len() - 16], n + 1);
    note.extend(doc! {"_id": id, "n": n});
    journal.insert_one(note).await.unwrap();
    // WHEN it comes back, and dies for good later
    a.settings = settings;
    a.restart().await;
    wait_role(&a, "holder").await;
    world.wait_converged_within(PATIENT, &a).await;
    kit::cut(&world, &a).await;
    a.kill9();
    set(&here, 1, doc! {"v": 2}).await;
    wait_role(&b, "holder").await;
    way.heal();
    // THEN the next one knows that the first edit had arrived
    wait_content(&there, 1, doc! {"_id": 1, "v": 2}).await;
    kit::converged_without_conflict(&world, &b).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_policy_overwrote_is_on_record_once_though_its_holder_died() {
    let world = World::new("ha_record").await;
    let way = FaultLink::open(world.servers().remote.address())
        .await
        .unwrap();
    let wins = |settings: Settings| settings.set(STRATEGY, "\"local_wins\"");
    let mut a = world.start_with(wins(settings(&world, "a"))).await;
    wait_role(&a, "holder").await;
    let mut b = world.start_with(wins(far_off(&world, "b", &way))).await;
    wait_role(&b, "standby").await;
    let (here, there) = kit::fill(&world, &a, "c", 3).await;
    world.wait_converged_within(PATIENT, &b).await;
    // GIVEN a holder that settles a clash and dies before its record is in the database
    kit::cut(&world, &a).await;
    set(&here, 1, doc! {"v": "ours"}).await;
    set(&there, 1, doc! {"v": "theirs"}).await;
    let healthy = a.settings.clone();
    a.kill9();
    a.settings = healthy.clone().env("SANGAM_FAILPOINT", "after_base:1");
    world.link.heal();
    a.respawn();
    a.wait_exit().await;
    wait_content(&there, 1, doc! {"_id": 1, "v": "ours"}).await;
    assert!(world.conflicts().await.is_empty());
    // WHEN another one takes over THEN what was overwritten is on record
    wait_role(&b, "holder").await;
    let overwritten = |c: &Document| {
        let remote = c.get_document("remoteDocument").unwrap();
        remote.get_str("v").is_ok_and(|v| v == "theirs")
    };
    wait_until(PATIENT, "the record", async || {
        let all = world.conflicts().await;
        (all.len() == 1 && overwritten(&all[0]))
            .then_some(())
            .ok_or_else(|| format!("{all:#?}"))
    })
    .await;
    // AND it stays one record when the first one works again
    a.settings = healthy;
    a.restart().await;
    wait_role(&a, "standby").await;
    assert!(b.terminate().await.success());
    wait_role(&a, "holder").await;
    world.wait_converged_within(PATIENT, &a).await;
    assert_eq!(kit::conflicts_now(&world, &a).await.len(), 1);
}

/// Suspends the holder between its check that it may write and the write that `first` asks for, lets
/// the other one take over, does `then`, and lets the first go on. `then` has to leave both sides so
/// that the late write would pass its guard.
async fn suspended(test: &str, first: impl AsyncFn(&World), then: impl AsyncFn(&World, &Daemon)) {
    let world = World::new(test).await;
    let asked: PathBuf = world.dir().join("suspend");
    let point = format!("write_begun:{}", asked.display());
    // Its connections shall be good when it goes on, so that the late write does arrive.
    let patient = "&heartbeatFrequencyMS=600000&connectTimeoutMS=600000";
    let first_one = settings(&world, "a")
        .env("SANGAM_SUSPEND", &point)
        .set("remote.uri", &format!("{:?}", world.link.uri() + patient));
    let (mut a, b) = pair(&world, first_one).await;
    kit::fill(&world, &a, "c", 3).await;
    world.wait_converged_within(PATIENT, &b).await;

    std::fs::write(&asked, "").unwrap();
    first(&world).await;
    let stat = format!("/proc/{}/stat", a.pid());
    wait_for("the holder is suspended", async || {
        std::fs::read_to_string(&stat).unwrap().contains(") T ")
    })
    .await;
    wait_role(&b, "holder").await;
    then(&world, &b).await;
    world.wait_converged_within(PATIENT, &b).await;

    a.signal("CONT");
    wait_role(&a, "standby").await;
    for daemon in [&a, &b] {
        world.wait_converged_within(PATIENT, daemon).await;
    }
    let (here, there) = both(&world, "c");
    for docs in [here, there] {
        assert_eq!(
            kit::content(&docs, 1).await.unwrap(),
            Some(doc! {"_id": 1, "v": 0})
        );
        assert_eq!(kit::content(&docs, 9).await.unwrap(), None);
    }
    let conflicts = world.conflicts().await;
    assert!(conflicts.is_empty(), "a false conflict: {conflicts:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_update_is_refused() {
    let edit = async |world: &World| set(&both(world, "c").0, 1, doc! {"v": 1}).await;
    suspended("ha_update", edit, async |world, _| {
        let (here, there) = both(world, "c");
        wait_content(&there, 1, doc! {"_id": 1, "v": 1}).await;
        set(&here, 1, doc! {"v": 0}).await;
        wait_content(&there, 1, doc! {"_id": 1, "v": 0}).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_create_is_refused() {
    let insert = async |world: &World| {
        let (here, _) = both(world, "c");
        here.insert_one(doc! {"_id": 9, "v": 0}).await.unwrap();
    };
    suspended("ha_create", insert, async |world, _| {
        let (here, there) = both(world, "c");
        wait_content(&there, 9, doc! {"_id": 9, "v": 0}).await;
        there.delete_one(doc! {"_id": 9}).await.unwrap();
        wait_content(&here, 9, None).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_delete_is_refused() {
    let delete = async |world: &World| {
        both(world, "c")
            .0
            .delete_one(doc! {"_id": 1})
            .await
            .unwrap();
    };
    suspended("ha_delete", delete, async |world, _| {
        let (here, there) = both(world, "c");
        wait_content(&there, 1, None).await;
        there.insert_one(doc! {"_id": 1, "v": 0}).await.unwrap();
        wait_content(&here, 1, doc! {"_id": 1, "v": 0}).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_transaction_is_refused() {
    let edit = async |world: &World| {
        let mut session = world.local.client().start_session().await.unwrap();
        session.start_transaction().await.unwrap();
        for id in [1, 2] {
            let c = both(world, "c").0;
            let update = c.update_one(doc! {"_id": id}, doc! {"$set": {"v": 1}});
            update.session(&mut session).await.unwrap();
        }
        session.commit_transaction().await.unwrap();
    };
    suspended("ha_transaction", edit, async |world, _| {
        let (here, there) = both(world, "c");
        for id in [1, 2] {
            wait_content(&there, id, doc! {"_id": id, "v": 1}).await;
            set(&here, id, doc! {"v": 0}).await;
            wait_content(&there, id, doc! {"_id": id, "v": 0}).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lease_outlives_a_step_down() {
    let world = World::new("ha_step_down").await;
    let (nodes, client) = three(&world, &[]).await;
    let hosts: Vec<String> = nodes.iter().map(MongoServer::address).collect();
    let uri = format!("\"mongodb://{}/?replicaSet=rs_three\"", hosts.join(","));
    let start = async |name| {
        let settings = settings(&world, name).set("local.uri", &uri);
        let daemon = Daemon::spawn(&world, settings);
        wait_until(PATIENT, "it captures", async || {
            match daemon.get("/readyz").await?.status {
                200 => Ok(()),
                status => Err(status.to_string()),
            }
        })
        .await;
        daemon
    };
    let a = start("a").await;
    wait_role(&a, "holder").await;
    let b = start("b").await;
    wait_role(&b, "standby").await;
    let db = client.database(&world.name);
    let leases = db.collection::<Document>("sangam_lease");
    let term = async || {
        let found = leases.find_one(doc! {"holder": {"$exists": true}}).await;
        Ok::<_, String>(
            common::yet(found)?
                .ok_or("no lease")?
                .get_i64("epoch")
                .unwrap(),
        )
    };
    let before = wait_until(PATIENT, "a term", term).await;
    let down = doc! {"replSetStepDown": 5, "secondaryCatchUpPeriodSecs": 2, "force": true};
    // The connection may end with it.
    let _ = client.database("admin").run_command(down).await;
    let c = db.collection::<Document>("c");
    wait_until(PATIENT, "a write", async || {
        let written = c
            .update_one(doc! {"_id": 1}, doc! {"$set": {"v": 1}})
            .upsert(true);
        common::yet(written.await).map(|_| ())
    })
    .await;
    wait_content(&world.remote.collection("c"), 1, doc! {"_id": 1, "v": 1}).await;
    assert_eq!(wait_until(PATIENT, "a term", term).await, before);
    assert_eq!(a.status().await.unwrap()["ha"]["role"], "holder");
    assert_eq!(b.status().await.unwrap()["ha"]["role"], "standby");
}
