//! The harness itself: if servers, link and comparison don't do what they say, no other test means
//! anything.

use std::time::Duration;

use crate::common::{World, wait_until};
use futures::TryStreamExt;
use mongodb::bson::{Document, doc};
use mongodb::options::ClientOptions;
use sangam::compare::How;
use sangam::faultlink::{AfterLoss, Mode, Way};
use sangam::mongod::{MongoServer, ServerOptions};

/// A client of the remote through the link, compressing with zstd as the daemon does.
async fn through_link(world: &World) -> mongodb::Database {
    let uri = format!("{}&compressors=zstd&retryWrites=false", world.link.uri());
    let mut options = ClientOptions::parse(uri).await.unwrap();
    options.server_selection_timeout = Some(Duration::from_secs(2));
    let client = mongodb::Client::with_options(options).unwrap();
    client.database(&world.name)
}

#[tokio::test]
async fn comparison_sees_every_kind_of_difference_and_no_sync_field() {
    let world = World::new("comparison").await;
    let local = world.local.collection::<Document>("c");
    let remote = world.remote.collection::<Document>("c");
    let same = doc! {"_id": 1, "v": 1};
    local.insert_one(&same).await.unwrap();
    let stamped = doc! {"_id": 1, "v": 1, "syncStatus": "synced", "origin": "local"};
    remote.insert_one(stamped).await.unwrap();
    assert!(world.compare().await.unwrap().is_equal());

    local.insert_one(doc! {"_id": 2}).await.unwrap();
    remote.insert_one(doc! {"_id": 3}).await.unwrap();
    local.insert_one(doc! {"_id": 4, "v": 1}).await.unwrap();
    remote
        .insert_one(doc! {"_id": 4, "v": 1_i64})
        .await
        .unwrap();
    let own = world.local.collection::<Document>("conflict_logs");
    own.insert_one(doc! {"_id": 1}).await.unwrap();

    let found = world.compare().await.unwrap();
    let hows: Vec<_> = found.differences.iter().map(|d| d.how).collect();
    assert_eq!(found.equal, 1);
    assert_eq!(hows, [How::OnlyLocal, How::OnlyRemote, How::Content]);
}

#[tokio::test]
async fn a_lost_reply_means_written_but_not_acknowledged() {
    let world = World::new("lost_reply").await;
    let through = through_link(&world).await;
    let remote = world.remote.collection::<Document>("c");
    through.run_command(doc! {"ping": 1}).await.unwrap();
    let (up, down) = (world.link.bytes(Way::Up), world.link.bytes(Way::Down));
    assert!(up > 0 && down > 0);

    world.link.lose_next_reply("update", AfterLoss::Reset);
    let upsert =
        doc! {"update": "c", "updates": [{"q": {"_id": 1}, "u": {"v": 1}, "upsert": true}]};
    let outcome = through.run_command(upsert).await;

    assert!(outcome.is_err(), "the client doesn't know: {outcome:?}");
    assert_eq!(world.link.lost_replies(), 1);
    assert_eq!(remote.count_documents(doc! {"_id": 1}).await.unwrap(), 1);
}

#[tokio::test]
async fn a_cut_link_fails_fast_and_heals() {
    let world = World::new("cut").await;
    let through = through_link(&world).await;
    through.run_command(doc! {"ping": 1}).await.unwrap();
    world.link.cut();
    assert!(through.run_command(doc! {"ping": 1}).await.is_err());
    world.link.heal();
    assert_eq!(world.link.mode(), Mode::Pass);
    through.run_command(doc! {"ping": 1}).await.unwrap();
}

#[tokio::test]
async fn a_killed_server_keeps_acknowledged_writes_and_its_address() {
    let mut world = World::with_own_servers("killed").await;
    let c = world.local.collection::<Document>("c");
    c.insert_one(doc! {"_id": 1}).await.unwrap();
    world.own_servers().local.kill9().unwrap();
    world.own_servers().local.restart().await.unwrap();
    world.own_servers().remote.suspend().unwrap();
    world.own_servers().remote.cont().unwrap();
    world.own_servers().remote.stop().await.unwrap();
    world.own_servers().remote.restart().await.unwrap();
    wait_until(crate::common::SOON, "the document", async || {
        crate::common::yet(c.find_one(doc! {"_id": 1}).await)?.ok_or_else(|| "gone".into())
    })
    .await;
}

#[tokio::test]
async fn a_server_with_authentication_lets_only_its_user_in() {
    let dir = tempfile::tempdir().unwrap();
    let options = ServerOptions {
        auth: Some(("admin".into(), "secret".into())),
        ..ServerOptions::default()
    };
    let mut server = MongoServer::start_with(dir.path(), options).await.unwrap();
    server.restart().await.unwrap();
    let client = server.client().await.unwrap();
    client.list_database_names().await.unwrap();
    let anonymous = format!("mongodb://{}/?directConnection=true", server.address());
    let anonymous = mongodb::Client::with_uri_str(anonymous).await.unwrap();
    assert!(anonymous.list_database_names().await.is_err());
}

#[tokio::test]
async fn a_standalone_server_has_no_change_streams() {
    let dir = tempfile::tempdir().unwrap();
    let options = ServerOptions {
        set_name: None,
        ..ServerOptions::default()
    };
    let server = MongoServer::start_with(dir.path(), options).await.unwrap();
    let c = server.client().await.unwrap().database("d").collection("c");
    c.insert_one(doc! {"_id": 1}).await.unwrap();
    let all: Vec<Document> = c.find(doc! {}).await.unwrap().try_collect().await.unwrap();
    assert_eq!(all.len(), 1);
    assert!(c.watch().await.is_err());
}
