//! R1 to R5: what is captured, sent and acknowledged survives every crash.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use crate::common::kit::{
    Docs, PATIENT, body, both, conflicts_now, content, converged_without_conflict, cut, dealt_with,
    set, wait_content,
};
use crate::common::{Daemon, World, wait_for};
use futures::TryStreamExt;
use mongodb::bson::{Document, doc};
use sangam::faultlink::{AfterLoss, Mode, Way};

/// A document that both sides have agreed on.
async fn agreed(world: &World, daemon: &Daemon, document: Document) {
    let (here, _) = both(world, "c");
    here.insert_one(document).await.unwrap();
    world.wait_converged(daemon).await;
}

/// Runs a daemon that aborts at `point`, does `change`, and waits for the abort.
async fn abort_at(world: &World, point: &str, change: impl AsyncFnOnce()) {
    let armed = world
        .settings()
        .env("SANGAM_FAILPOINT", &format!("{point}:1"));
    // The event is there before the daemon: it may die before it says that it is ready.
    change().await;
    let mut daemon = Daemon::spawn(world, armed);
    let ended = daemon.wait_exit().await;
    assert_eq!(ended.signal(), Some(6), "{point} aborts: {ended}");
}

#[tokio::test]
async fn r3_a_write_that_landed_and_was_edited_alike_on_both_sides_leaves_no_old_base() {
    // GIVEN a write that reached the remote, and a daemon that died before it heard so. (Whatever makes
    // it look once more would put right what this is about.)
    let world = World::new("r3_alike").await;
    let settings = (world.settings())
        .set("pull.follow", "false")
        .set("pull.interval", "\"1h\"")
        .set("sync.stamp_documents", "false");
    let (here, there) = both(&world, "c");
    let mut daemon = world.start_with(settings.clone()).await;
    agreed(&world, &daemon, doc! {"_id": 1, "v": 0}).await;
    dealt_with(&daemon).await;
    daemon.kill9();
    set(&here, 1, doc! {"v": 1}).await;
    let armed = settings.clone();
    let armed = armed.env("SANGAM_FAILPOINT", "after_write_before_ack:1");
    Daemon::spawn(&world, armed).wait_exit().await;
    wait_content(&there, 1, doc! {"_id": 1, "v": 1}).await;
    // WHEN both sides are edited alike before the next one has seen the remote
    for c in [&here, &there] {
        set(c, 1, doc! {"more": 5}).await;
    }
    here.insert_one(doc! {"_id": 2}).await.unwrap();
    world.link.cut();
    let daemon = world.start_with(settings).await;
    let pending = "pendingDocuments";
    daemon
        .wait_status_within(PATIENT, pending, |n| *n == 2)
        .await;
    world.link.heal();
    daemon
        .wait_status_within(PATIENT, pending, |n| *n == 0)
        .await;
    // THEN that is what they agree on: taking it back is an edit
    let back = here.update_one(doc! {"_id": 1}, doc! {"$unset": {"more": ""}});
    assert_eq!(back.await.unwrap().modified_count, 1);
    wait_content(&there, 1, doc! {"_id": 1, "v": 1}).await;
}

#[tokio::test]
async fn r1_killed_between_events_and_token_no_event_is_lost() {
    // GIVEN a daemon that has synced once
    let world = World::new("r1").await;
    let mut daemon = world.start().await;
    agreed(&world, &daemon, doc! {"_id": 0}).await;
    daemon.kill9();
    let (here, there) = both(&world, "c");
    // WHEN it dies in and after the transaction with events and token
    let mut points = vec!["enq_before_token", "after_token"];
    if std::env::var("SANGAM_MUTATION").is_ok_and(|m| m == "token_first") {
        points = vec!["token_before_enq"];
    }
    for (i, point) in (1..).zip(points) {
        for (c, side) in [(&here, "local"), (&there, "remote")] {
            abort_at(&world, point, async || {
                let new = doc! {"_id": format!("{side} {i}")};
                c.insert_one(new).await.unwrap();
            })
            .await;
            // THEN the next one has the event
            let mut daemon = world.start().await;
            converged_without_conflict(&world, &daemon).await;
            daemon.kill9();
        }
    }
}

#[tokio::test]
async fn r1_the_position_survives_a_clean_stop_and_nothing_is_compared_anew() {
    // GIVEN a daemon that was stopped in order
    let world = World::new("r1_clean").await;
    let mut daemon = world.start().await;
    agreed(&world, &daemon, doc! {"_id": 0}).await;
    assert!(daemon.terminate().await.success());
    // WHEN both sides change while it is away
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 1}).await.unwrap();
    there.delete_one(doc! {"_id": 0}).await.unwrap();
    daemon.restart().await;
    // THEN the streams tell, without a comparison of everything
    converged_without_conflict(&world, &daemon).await;
    wait_content(&here, 0, None).await;
    assert_eq!(daemon.log().matches("comparing both databases").count(), 1);
}

#[tokio::test]
async fn r2_edited_in_flight_stays_queued() {
    // GIVEN an edit whose acknowledgement is on its way
    let world = World::new("r2").await;
    let daemon = world.start().await;
    agreed(&world, &daemon, doc! {"_id": 1, "v": 0}).await;
    let (here, there) = both(&world, "c");
    world.link.delay(Way::Down, Duration::from_secs(3));
    set(&here, 1, doc! {"v": 1}).await;
    wait_content(&there, 1, doc! {"_id": 1, "v": 1}).await;
    // WHEN the document is edited again before it arrives (the second document shows that the
    // second edit has been captured)
    set(&here, 1, doc! {"v": 2}).await;
    here.insert_one(doc! {"_id": 2}).await.unwrap();
    daemon.wait_status("pendingDocuments", |n| *n == 2).await;
    world.link.heal();
    // THEN the second edit is sent as well
    converged_without_conflict(&world, &daemon).await;
    wait_content(&there, 1, doc! {"_id": 1, "v": 2}).await;
}

/// Loses the answer to `command` while `first` is synced, then does `second` offline; both must
/// come out as if nothing had happened.
async fn lost_ack(command: &str, first: impl AsyncFnOnce(&Docs), second: impl AsyncFnOnce(&Docs)) {
    // GIVEN a write that the remote carried out and whose answer got lost
    let world = World::new(&format!("r3_{command}")).await;
    let daemon = world.start().await;
    agreed(
        &world,
        &daemon,
        doc! {"_id": 1, "v": 0, "pad": "x".repeat(200)},
    )
    .await;
    let (here, _) = both(&world, "c");
    world.link.lose_next_reply(command, AfterLoss::CutLink);
    first(&here).await;
    world.link.wait_lost_replies(1).await;
    // WHEN the application writes the document again
    second(&here).await;
    world.link.heal();
    // THEN that is no conflict with our own first write
    converged_without_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn r3_lost_ack_then_local_edit_is_no_conflict() {
    let edit = async |v: i32, c: &Docs| set(c, 1, doc! {"v": v}).await;
    lost_ack(
        "update",
        async |c| edit(1, c).await,
        async |c| edit(2, c).await,
    )
    .await;
}

#[tokio::test]
async fn r3_lost_ack_of_an_insert_then_local_edit_is_no_conflict() {
    lost_ack(
        "insert",
        async |c| drop(c.insert_one(doc! {"_id": 2, "v": 1}).await.unwrap()),
        async |c| set(c, 2, doc! {"v": 2}).await,
    )
    .await;
}

#[tokio::test]
async fn r3_lost_ack_of_a_delete_then_insert_is_no_conflict() {
    lost_ack(
        "delete",
        async |c| {
            c.delete_one(doc! {"_id": 1}).await.unwrap();
        },
        async |c| drop(c.insert_one(doc! {"_id": 1, "v": "again"}).await.unwrap()),
    )
    .await;
}

#[tokio::test]
async fn r3_lost_ack_then_local_edit_then_the_remote_changes_another_field() {
    // GIVEN a lost answer
    let world = World::new("r3_merge").await;
    let daemon = world.start().await;
    agreed(&world, &daemon, doc! {"_id": 1, "v": 0, "w": 0}).await;
    let (here, there) = both(&world, "c");
    world.link.lose_next_reply("update", AfterLoss::CutLink);
    set(&here, 1, doc! {"v": 1}).await;
    world.link.wait_lost_replies(1).await;
    // WHEN both sides go on, in different fields
    set(&here, 1, doc! {"v": 2}).await;
    set(&there, 1, doc! {"w": 7}).await;
    world.link.heal();
    // THEN the result has both
    converged_without_conflict(&world, &daemon).await;
    wait_content(&here, 1, doc! {"_id": 1, "v": 2, "w": 7}).await;
}

#[tokio::test]
async fn r3_lost_ack_and_killed_then_local_edit_is_no_conflict() {
    // GIVEN a lost answer, and a daemon that is killed before it knows
    let world = World::new("r3_killed").await;
    let mut daemon = world.start().await;
    // Large enough that only the difference to base is kept of the edit.
    let with = |v: i32| doc! {"_id": 1, "v": v, "pad": "x".repeat(200)};
    agreed(&world, &daemon, with(0)).await;
    let (here, there) = both(&world, "c");
    world.link.lose_next_reply("update", AfterLoss::Silence);
    set(&here, 1, doc! {"v": 1}).await;
    world.link.wait_lost_replies(1).await;
    daemon.kill9();
    wait_content(&there, 1, with(1)).await;
    // WHEN the document is edited before the daemon is back
    set(&here, 1, doc! {"v": 2}).await;
    daemon.restart().await;
    // THEN its intent tells that the first write was its own
    converged_without_conflict(&world, &daemon).await;
    wait_content(&there, 1, with(2)).await;
}

#[tokio::test]
async fn r4_a_write_that_lands_late_overwrites_nothing() {
    // GIVEN a write that hangs in a half-open link until the daemon gives it up
    let world = World::new("r4").await;
    let daemon = world.start().await;
    agreed(&world, &daemon, doc! {"_id": 1, "v": 0}).await;
    let (here, there) = both(&world, "c");
    world.link.set(Mode::Stall);
    set(&here, 1, doc! {"v": 1}).await;
    daemon.wait_status("isSyncing", |v| *v == true).await;
    daemon.wait_status("isSyncing", |v| *v == false).await;
    assert_eq!(daemon.status().await.unwrap()["pendingDocuments"], 1);
    // WHEN the document is edited and what hung goes on its way
    set(&here, 1, doc! {"v": 2}).await;
    world.link.set(Mode::Pass);
    // THEN the last edit is what both sides have
    converged_without_conflict(&world, &daemon).await;
    wait_content(&there, 1, doc! {"_id": 1, "v": 2}).await;
}

#[tokio::test]
async fn r4_what_may_still_land_is_waited_for_before_the_next_look() {
    // GIVEN a remote that carries the next two updates out late, though their sender is gone
    let args = ["--setParameter", "enableTestCommands=1"];
    let world = World::with_server_args("r4_late", &args).await;
    let daemon = world.start().await;
    agreed(&world, &daemon, doc! {"_id": 1, "v": 0}).await;
    let (here, there) = both(&world, "c");
    let late = doc! {"configureFailPoint": "failCommand", "mode": {"times": 2}, "data": {
        "failCommands": ["update"], "appName": "sangam", "blockConnection": true, "blockTimeMS": 3000,
    }};
    let remote = there.client().database("admin");
    remote.run_command(late).await.unwrap();
    // WHEN the line breaks under the first and the document is edited again
    set(&here, 1, doc! {"v": 1}).await;
    daemon.wait_status("isSyncing", |v| *v == true).await;
    let ops = doc! {"currentOp": 1, "appName": "sangam", "command.update": "c"};
    wait_for("the remote has it", async || {
        let found = remote.run_command(ops.clone()).await.unwrap();
        !found.get_array("inprog").unwrap().is_empty()
    })
    .await;
    world.link.reset_connections();
    set(&here, 1, doc! {"v": 2}).await;
    // THEN the first is known for our own when it lands
    converged_without_conflict(&world, &daemon).await;
    wait_content(&there, 1, doc! {"_id": 1, "v": 2}).await;
}

/// What both sides must hold in the end: `_id` → value; absent ones were deleted.
type Ledger = BTreeMap<String, i32>;

/// Inserts, edits and deletes of one side's own documents, each acknowledged.
async fn application(c: &Docs, side: &str, round: i32, ledger: &mut Ledger) {
    for i in 0..20 {
        let id = format!("{side}-{round}-{i}");
        c.insert_one(doc! {"_id": &id, "v": round}).await.unwrap();
        ledger.insert(id, round);
    }
    for i in 0..5 {
        let (edited, deleted) = (
            format!("{side}-{}-{i}", round - 1),
            format!("{side}-{}-{}", round - 1, i + 10),
        );
        if round > 1 && ledger.remove(&deleted).is_some() {
            c.delete_one(doc! {"_id": &deleted}).await.unwrap();
            set(c, &edited, doc! {"v": round}).await;
            ledger.insert(edited, round);
        }
    }
}

async fn everything(c: &Docs) -> Ledger {
    let all: Vec<Document> = c.find(doc! {}).await.unwrap().try_collect().await.unwrap();
    let entry = |d: Document| (d.get_str("_id").unwrap().into(), d.get_i32("v").unwrap());
    all.into_iter().map(entry).collect()
}

#[tokio::test]
async fn r5_killed_in_turn_both_sides_end_equal_and_nothing_is_lost_or_raised() {
    // GIVEN applications that write on both sides
    let mut world = World::with_own_servers("r5").await;
    let mut daemon = world.start().await;
    let (here, there) = both(&world, "c");
    let mut ledger = Ledger::new();
    for (round, victim) in (1..).zip(["nobody", "daemon", "local", "remote", "link", "daemon"]) {
        application(&here, "local", round, &mut ledger).await;
        application(&there, "remote", round, &mut ledger).await;
        // WHEN one part dies in the middle of it
        match victim {
            "daemon" => daemon.kill9(),
            "local" => world.own_servers().local.kill9().unwrap(),
            "remote" => world.own_servers().remote.kill9().unwrap(),
            "link" => cut(&world, &daemon).await,
            _ => {}
        }
        if victim != "local" {
            application(&here, "l2", round, &mut ledger).await;
        }
        if victim != "remote" {
            application(&there, "r2", round, &mut ledger).await;
        }
        match victim {
            "daemon" => daemon.restart().await,
            "local" => world.own_servers().local.restart().await.unwrap(),
            "remote" => world.own_servers().remote.restart().await.unwrap(),
            "link" => world.link.heal(),
            _ => {}
        }
        // THEN after healing both sides hold what was acknowledged, and nothing else
        world.wait_converged_within(PATIENT, &daemon).await;
        assert_eq!(everything(&here).await, ledger, "after {victim}");
    }
    converged_without_conflict(&world, &daemon).await;
}

#[tokio::test]
async fn r5_aborted_at_every_point_of_a_batch() {
    let world = World::new("r5_points").await;
    let mut daemon = world.start().await;
    agreed(&world, &daemon, doc! {"_id": "edited", "l": 0, "r": 0}).await;
    agreed(&world, &daemon, doc! {"_id": "deleted", "v": 0}).await;
    daemon.kill9();
    let (here, there) = both(&world, "c");
    for (v, point) in (1..).zip(["before_write", "after_write_before_ack", "after_base"]) {
        for (c, field) in [(&here, "l"), (&there, "r")] {
            // GIVEN a daemon that aborts at this point of its first batch
            abort_at(&world, point, async || {
                set(c, "edited", doc! {field: v}).await;
                let new = doc! {"_id": format!("{field}{v}")};
                c.insert_one(new).await.unwrap();
                c.delete_one(doc! {"_id": "deleted"}).await.unwrap();
            })
            .await;
            // WHEN the application goes on before it is back
            set(c, "edited", doc! {field: v + 10}).await;
            let again = doc! {"_id": "deleted", "again": format!("{field}{v}")};
            c.insert_one(&again).await.unwrap();
            // THEN everything arrives, and nothing is taken for somebody else's
            let mut daemon = world.start().await;
            converged_without_conflict(&world, &daemon).await;
            wait_content(&there, "deleted", again).await;
            daemon.kill9();
        }
    }
}

#[tokio::test]
async fn r5_the_servers_killed_together_come_back_to_what_was_acknowledged() {
    // GIVEN documents on both sides
    let mut world = World::with_own_servers("r5_both").await;
    let mut daemon = world.start().await;
    let (here, there) = both(&world, "c");
    let mut ledger = Ledger::new();
    application(&here, "local", 1, &mut ledger).await;
    application(&there, "remote", 1, &mut ledger).await;
    // WHEN the power fails for everything at once
    daemon.kill9();
    world.own_servers().local.kill9().unwrap();
    world.own_servers().remote.kill9().unwrap();
    daemon.respawn();
    world.own_servers().remote.restart().await.unwrap();
    world.own_servers().local.restart().await.unwrap();
    // THEN the daemon that was there first finds both
    daemon.wait_ready().await;
    wait_for("both sides hold it all", async || {
        everything(&there).await == ledger
    })
    .await;
    converged_without_conflict(&world, &daemon).await;
    assert_eq!(everything(&here).await, ledger);
}

/// Both sides change the same field, the policy overwrites the remote's version, the answer gets
/// lost, `then` happens; returns the remote versions on record.
async fn overwritten(test: &str, then: impl AsyncFnOnce(&Docs, &Docs)) -> Vec<i32> {
    let world = World::new(test).await;
    let policy = "sync.conflict_resolution_strategy";
    let settings = world.settings().set(policy, "\"local_wins\"");
    let daemon = world.start_with(settings).await;
    agreed(&world, &daemon, doc! {"_id": 1, "v": 0}).await;
    let (here, there) = both(&world, "c");
    cut(&world, &daemon).await;
    set(&here, 1, doc! {"v": 1}).await;
    set(&there, 1, doc! {"v": 2}).await;
    // The first try doesn't know the remote's version yet and is refused.
    for lost in 1.. {
        world.link.lose_next_reply("update", AfterLoss::CutLink);
        world.link.set(Mode::Pass);
        world.link.wait_lost_replies(lost).await;
        if content(&there, 1).await == Ok(Some(doc! {"_id": 1, "v": 1})) {
            break;
        }
    }
    then(&here, &there).await;
    world.link.heal();
    world.wait_converged_within(PATIENT, &daemon).await;
    let versions = conflicts_now(&world, &daemon).await;
    let v = |record: &Document| {
        body(record, "remoteDocument")
            .unwrap()
            .get_i32("v")
            .unwrap()
    };
    versions.iter().map(v).collect()
}

#[tokio::test]
async fn r21_what_was_overwritten_is_on_record_though_the_answer_got_lost() {
    let found = overwritten("r21_lost", async |_, _| {}).await;
    assert_eq!(found, [2]);
}

#[tokio::test]
async fn r21_what_was_overwritten_is_on_record_though_somebody_wrote_since() {
    let found = overwritten("r21_since", async |_, there| {
        set(there, 1, doc! {"v": 5}).await;
    })
    .await;
    assert_eq!(found, [2, 5]);
}
