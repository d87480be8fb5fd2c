//! What a primary shows that has just become one.

use futures::StreamExt;
use mongodb::Client;
use mongodb::bson::{Document, doc};
use sangam::mongod::MongoServer;

use crate::common::kit::{both, converged_without_conflict, dealt_with, set, three, wait_content};
use crate::common::{SOON, World, wait_until};

async fn admin_of(node: &MongoServer, command: Document) -> mongodb::error::Result<Document> {
    let uri = format!("mongodb://{}/?directConnection=true", node.address());
    let client = Client::with_uri_str(uri).await.unwrap();
    client.database("admin").run_command(command).await
}

/// Whether a member goes on learning what most members have.
async fn learns(node: &MongoServer, learns: bool) {
    let mode = if learns { "off" } else { "alwaysOn" };
    let command = doc! {"configureFailPoint": "disableSnapshotting", "mode": mode};
    admin_of(node, command).await.unwrap();
}

async fn wait_primary(node: &MongoServer) {
    wait_until(SOON, "a certain member is the primary", async || {
        let hello = admin_of(node, doc! {"hello": 1}).await;
        let hello = hello.map_err(|e| e.to_string())?;
        match hello.get_bool("isWritablePrimary") {
            Ok(true) => Ok(()),
            _ => Err(hello.to_string()),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r5_a_new_primary_that_knows_an_old_state_only_is_not_believed() {
    // GIVEN documents that both sides have, on the local side in a set of three
    let mut world = World::new("knows_less").await;
    let (nodes, client) = three(&world, &["--setParameter", "enableTestCommands=1"]).await;
    world.local = client.database(&world.name);
    let hosts: Vec<String> = nodes.iter().map(MongoServer::address).collect();
    let uri = format!("\"mongodb://{}/?replicaSet=rs_three\"", hosts.join(","));
    let mut daemon = world
        .start_with(world.settings().set("local.uri", &uri))
        .await;
    let (here, there) = both(&world, "c");
    let docs = (0..3).map(|id| doc! {"_id": id, "mine": 0, "theirs": 0});
    here.insert_many(docs).await.unwrap();
    world.wait_converged(&daemon).await;
    // AND a member that has their edits, but does not know that the others have them
    wait_primary(&nodes[0]).await;
    learns(&nodes[1], false).await;
    for id in 0..3 {
        set(&here, id, doc! {"mine": 1}).await;
        wait_content(&there, id, doc! {"_id": id, "mine": 1, "theirs": 0}).await;
    }
    dealt_with(&daemon).await;
    daemon.kill9();
    // WHEN it becomes the primary, the other side edits, and the daemon comes back
    let freeze = doc! {"replSetFreeze": 60};
    admin_of(&nodes[2], freeze).await.unwrap();
    // (The connection may end with it.)
    let down = doc! {"replSetStepDown": 60, "secondaryCatchUpPeriodSecs": 10};
    let _ = admin_of(&nodes[0], down).await;
    wait_primary(&nodes[1]).await;
    let mut events = there.watch().await.unwrap();
    for id in 0..3 {
        set(&there, id, doc! {"theirs": 1}).await;
    }
    daemon.respawn();
    daemon.wait_log("does not reach most members").await;
    learns(&nodes[1], true).await;
    // THEN what it showed at first was not taken for an edit
    for id in 0..3 {
        wait_content(&here, id, doc! {"_id": id, "mine": 1, "theirs": 1}).await;
    }
    converged_without_conflict(&world, &daemon).await;
    set(&there, 0, doc! {"mine": 9}).await;
    while let Some(event) = events.next().await {
        let fields = event.unwrap().update_description.unwrap().updated_fields;
        match fields.get_i32("mine") {
            Ok(9) => break,
            Ok(mine) => panic!("an old state was sent: {mine}"),
            Err(_) => {}
        }
    }
}
