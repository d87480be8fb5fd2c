//! A state file that came to harm in its contents: a garbled stream position costs a comparison,
//! never a change.

use std::time::Duration;

use crate::common::kit::{PATIENT, both, converged_without_conflict, dealt_with, wait_content};
use crate::common::{Daemon, World, wait_for};
use mongodb::bson::{DateTime, Document, doc};
use rusqlite::{Connection, params};

/// What becomes of a token.
type Garble = dyn Fn(Vec<u8>) -> Vec<u8>;

/// Changes the saved stream positions of a daemon that is away.
fn garble(daemon: &Daemon, how: &Garble) {
    let state = Connection::open(daemon.state_dir().join("sangam.db")).unwrap();
    state.busy_timeout(Duration::from_secs(5)).unwrap();
    let tokens: Vec<(String, Vec<u8>)> = state
        .prepare("SELECT k, v FROM meta WHERE k LIKE 'token:%'")
        .unwrap()
        .query_map([], |r| Ok((r.get(0)?, r.get(1)?)))
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    assert_eq!(tokens.len(), 2, "one of each side");
    for (name, token) in tokens {
        let change = "UPDATE meta SET v = ? WHERE k = ?";
        state.execute(change, params![how(token), name]).unwrap();
    }
}

/// A token with other text in it.
fn saying(text: impl Fn(&str) -> String) -> impl Fn(Vec<u8>) -> Vec<u8> {
    move |token| {
        let token = Document::from_reader(token.as_slice()).unwrap();
        let data = text(token.get_str("_data").unwrap());
        doc! {"_data": data}.to_vec().unwrap()
    }
}

#[tokio::test]
async fn a_garbled_stream_position_costs_a_comparison_and_no_change() {
    let world = World::new("garbled").await;
    let mut daemon = world.start().await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": 0}).await.unwrap();
    world.wait_converged(&daemon).await;
    let half = saying(|data| data[..data.len() / 2].into());
    let no_hex = saying(|data| data.replace('2', "z"));
    let other_kind = saying(|data| format!("97{}", &data[2..]));
    let empty = saying(|_| String::new());
    let garbled: [(&str, &Garble); 8] = [
        ("no document", &|_| b"no document".to_vec()),
        ("cut", &|token| token[..token.len() - 7].to_vec()),
        ("nothing", &|_| vec![]),
        ("a number", &|_| doc! {"_data": 7}.to_vec().unwrap()),
        ("half", &half),
        ("no hex", &no_hex),
        ("another kind", &other_kind),
        ("empty", &empty),
    ];
    for (n, (what, how)) in (1..).zip(garbled) {
        println!("{what}");
        // GIVEN changes on both sides while the daemon is away, and a damaged position
        daemon.kill9();
        here.insert_one(doc! {"_id": format!("here {n}")})
            .await
            .unwrap();
        there
            .insert_one(doc! {"_id": format!("there {n}")})
            .await
            .unwrap();
        garble(&daemon, how);
        // WHEN it comes back THEN nothing is missing
        daemon.restart().await;
        world.wait_converged_within(PATIENT, &daemon).await;
        let count = here.count_documents(doc! {}).await.unwrap();
        assert_eq!(count, 1 + 2 * n, "{what}");
    }
    converged_without_conflict(&world, &daemon).await;
}

/// Whether every range that was begun has been compared.
fn compared(daemon: &Daemon) -> bool {
    let state = Connection::open(daemon.state_dir().join("sangam.db")).unwrap();
    state.busy_timeout(Duration::from_secs(5)).unwrap();
    let count = "SELECT count(*), count(documents) FROM walk";
    let (begun, done): (i64, i64) = state
        .query_row(count, [], |r| Ok((r.get(0)?, r.get(1)?)))
        .unwrap();
    begun > 0 && begun == done
}

/// Garbles the saved position of the remote's stream.
fn forget_position(daemon: &Daemon) {
    let state = Connection::open(daemon.state_dir().join("sangam.db")).unwrap();
    state.busy_timeout(Duration::from_secs(5)).unwrap();
    let change = "UPDATE meta SET v = x'' WHERE k LIKE 'token:remote:%'";
    assert_eq!(state.execute(change, []).unwrap(), 1);
}

#[tokio::test]
async fn r11_history_lost_again_while_a_comparison_waits_for_its_end() {
    let args = ["--setParameter", "enableTestCommands=1"];
    let world = World::with_server_args("lost_twice", &args).await;
    let settings = world.settings().set("sync.stamp_documents", "false");
    let mut daemon = world.start_with(settings).await;
    let (here, there) = both(&world, "c");
    // No date that anybody bumps: fetching by timestamp must not help.
    let date = DateTime::from_millis(1_600_000_000_000);
    here.insert_many((0..50).map(|n| doc! {"_id": n, "v": 0, "updatedAt": date}))
        .await
        .unwrap();
    world.wait_converged(&daemon).await;
    dealt_with(&daemon).await;
    daemon.kill9();
    // GIVEN a comparison after lost history that has seen everything and is not over: the remote takes
    // its time for a document
    let admin = there.client().database("admin");
    let slow = doc! {
        "configureFailPoint": "failCommand", "mode": "alwaysOn",
        "data": {"failCommands": ["insert"], "blockConnection": true, "blockTimeMS": 8000, "appName": "sangam"},
    };
    admin.run_command(slow).await.unwrap();
    let (elsewhere, _) = both(&world, "d");
    elsewhere.insert_one(doc! {"_id": "waits"}).await.unwrap();
    forget_position(&daemon);
    daemon.restart().await;
    wait_for("everything is compared", async || compared(&daemon)).await;
    daemon.kill9();
    // WHEN the remote changes and its history is lost once more
    let change = doc! {"$set": {"v": 1}};
    there.update_one(doc! {"_id": 20}, change).await.unwrap();
    // A stream that begins anew begins with the last write.
    there.insert_one(doc! {"_id": "later"}).await.unwrap();
    forget_position(&daemon);
    let fast = doc! {"configureFailPoint": "failCommand", "mode": "off"};
    admin.run_command(fast).await.unwrap();
    daemon.restart().await;
    // THEN that is found, too
    world.wait_converged_within(PATIENT, &daemon).await;
    converged_without_conflict(&world, &daemon).await;
    wait_content(&here, 20, doc! {"_id": 20, "v": 1, "updatedAt": date}).await;
}
