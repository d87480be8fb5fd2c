//! Metrics tell the truth, and readiness is about what is captured, not about what seems alive.

use std::time::Duration;

use crate::common::{Daemon, World, wait_until};
use mongodb::bson::{Document, doc};

/// The value of one series.
async fn metric(daemon: &Daemon, series: &str) -> Result<f64, String> {
    let answer = daemon.get("/metrics").await?;
    let text = answer.body.as_str().unwrap_or_default();
    text.lines()
        .find_map(|l| l.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
        .ok_or_else(|| format!("{series} is not in {text}"))
}

async fn wait_metric(daemon: &Daemon, series: &str, check: impl Fn(f64) -> bool) {
    wait_until(Duration::from_secs(60), series, async || {
        let value = metric(daemon, series).await?;
        check(value).then_some(()).ok_or_else(|| value.to_string())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_what_is_moved_and_lag_is_that_of_the_watermarks() {
    let world = World::new("metrics").await;
    let daemon = world.start().await;
    let (here, there) = (
        world.local.collection::<Document>("c"),
        world.remote.collection::<Document>("c"),
    );
    here.insert_many((0..20).map(|i| doc! {"_id": i, "v": 1}))
        .await
        .unwrap();
    there.insert_one(doc! {"_id": 100, "v": 1}).await.unwrap();
    world.wait_converged(&daemon).await;
    let sent = "sangam_documents_total{direction=\"local_to_remote\"}";
    wait_metric(&daemon, sent, |v| v == 20.0).await;
    let fetched = "sangam_documents_total{direction=\"remote_to_local\"}";
    wait_metric(&daemon, fetched, |v| v == 1.0).await;
    wait_metric(&daemon, "sangam_batch_documents_sum", |v| v >= 21.0).await;
    let lag = "sangam_lag_seconds{direction=\"local_to_remote\"}";
    wait_metric(&daemon, lag, |v| v == 0.0).await;

    world.link.cut();
    wait_metric(&daemon, "sangam_link_state{state=\"offline\"}", |v| {
        v == 1.0
    })
    .await;
    wait_metric(&daemon, lag, |v| v == 0.0).await;
    here.insert_one(doc! {"_id": 21}).await.unwrap();
    wait_metric(&daemon, lag, |v| v > 1.0).await;
    // Nobody knows what the remote holds by now.
    let lag_back = "sangam_lag_seconds{direction=\"remote_to_local\"}";
    wait_metric(&daemon, lag_back, |v| v > 1.0).await;
    let waiting = "sangam_queue_documents{queue=\"outbox\",state=\"waiting\"}";
    wait_metric(&daemon, waiting, |v| v == 1.0).await;
    wait_metric(&daemon, "sangam_oldest_unsynced_write_seconds", |v| v > 1.0).await;

    world.link.heal();
    wait_metric(&daemon, lag, |v| v == 0.0).await;
    wait_metric(&daemon, lag_back, |v| v == 0.0).await;
    wait_metric(&daemon, waiting, |v| v == 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_server_that_hangs_makes_the_daemon_unready() {
    let mut world = World::with_own_servers("stuck").await;
    let daemon = world.start().await;
    let ready = async || Ok::<_, String>(daemon.get("/readyz").await?.status);
    world.own_servers().local.suspend().unwrap();
    wait_until(Duration::from_secs(60), "unready", async || {
        let status = ready().await?;
        (status == 503)
            .then_some(())
            .ok_or_else(|| status.to_string())
    })
    .await;
    let alive = daemon.get("/healthz").await.unwrap();
    assert_eq!(alive.status, 200, "it is not the daemon that hangs");
    world.own_servers().local.cont().unwrap();
    wait_until(Duration::from_secs(60), "ready again", async || {
        let status = ready().await?;
        (status == 200)
            .then_some(())
            .ok_or_else(|| status.to_string())
    })
    .await;
}
