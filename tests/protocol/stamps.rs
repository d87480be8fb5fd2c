//! The sync fields that the app sees (section 4 of the design).

use crate::common::{World, wait_until, yet};
use mongodb::bson::{DateTime, Document, doc};
use sangam::faultlink::Mode;

/// Counts the local documents whose `syncStatus` is this.
async fn count(world: &World, status: &str) -> Result<u64, String> {
    let orders = world.local.collection::<Document>("orders");
    yet(orders.count_documents(doc! {"syncStatus": status}).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn many_offline_edits_look_pending_and_then_synced() {
    let world = World::new("stamps").await;
    let daemon = world.start().await;
    world.wait_converged(&daemon).await;
    world.link.cut();
    daemon.wait_status("isOnline", |v| v == false).await;

    let at = DateTime::from_millis(1_700_000_000_000);
    let orders = world.local.collection::<Document>("orders");
    let many = (0..2500).map(|n| doc! {"_id": n, "sum": n * 2, "updatedAt": at});
    orders.insert_many(many).await.expect("they are inserted");
    wait_until(crate::common::SOON, "all look pending", async || {
        let n = count(&world, "pending").await?;
        (n == 2500).then_some(()).ok_or(n.to_string())
    })
    .await;

    world.link.set(Mode::Pass);
    wait_until(crate::common::SOON, "all look synced", async || {
        let n = count(&world, "synced").await?;
        (n == 2500).then_some(()).ok_or(n.to_string())
    })
    .await;
    world.wait_converged(&daemon).await;
    let untouched = orders.count_documents(doc! {"updatedAt": at, "origin": "local"});
    assert_eq!(
        untouched.await.expect("a count"),
        2500,
        "updatedAt is not ours"
    );
}
