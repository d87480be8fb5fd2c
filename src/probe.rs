//! The probe: finds out whether the remote answers, and why not.
//!
//! Runs in an outage, with growing delays up to `probe.interval`, and online when nothing was heard
//! for an interval. It also makes the remote's client (an SRV name is looked up lazily), checks the
//! remote's identity (R12) and measures the clocks (R17).

use std::sync::Arc;
use std::time::Duration;

use crate::decide::Side;
use crate::failure::{Class, Failure, Reason};
use crate::metrics::Retried;
use crate::retry::Retry;
use crate::shared::Shared;
use crate::side::Endpoint;

/// A skew that a person must know of, in ms (R17).
const SKEW_WARNING: i64 = 60_000;

/// Runs until the daemon ends. Without a remote there is nothing to probe but the local clock.
pub async fn run(shared: Arc<Shared>) -> Result<(), Failure> {
    let config = shared.settings().config.clone();
    let Some(uri) = config.remote_uri.clone() else {
        shared.cancel.cancelled().await;
        return Ok(());
    };
    let fresh = || {
        Retry::between(
            config.retry.initial.min(config.probe.interval),
            config.probe.interval,
        )
    };
    let mut retry = fresh();
    let mut link = shared.link.subscribe();
    loop {
        let online = shared.link.is_online();
        let wait = if !online || shared.link.silent_for() >= config.probe.interval {
            match probe(&shared, &uri, config.probe.timeout).await {
                Ok(()) => {
                    retry = fresh();
                    shared.link.heard();
                    config.probe.interval
                }
                Err(failure) if failure.class == Class::Fatal => return Err(failure),
                Err(failure) => {
                    shared.metrics.retried(Retried::Probe);
                    let delay = retry.next_delay();
                    let reason = match failure.class {
                        Class::Offline(reason) => reason,
                        _ => Reason::Offline,
                    };
                    shared.link.probe_failed(reason, delay);
                    delay
                }
            }
        } else {
            config
                .probe
                .interval
                .saturating_sub(shared.link.silent_for())
                .max(Duration::from_millis(50))
        };
        tokio::select! {
            () = shared.cancel.cancelled() => return Ok(()),
            () = tokio::time::sleep(wait) => {}
            // Traffic that fails asks for a probe at once.
            () = async {
                loop {
                    if link.changed().await.is_err() { std::future::pending::<()>().await; }
                    if link.borrow_and_update().state == crate::link::State::Interrupted { return; }
                }
            }, if online => {}
            // A broken heartbeat is noticed before any operation fails.
            () = async {
                match shared.remote() {
                    Some(remote) => remote.trouble.notified().await,
                    None => std::future::pending().await,
                }
            }, if online => shared.link.failed(&Failure::offline(Reason::Offline)),
        }
    }
}

async fn probe(
    shared: &Arc<Shared>,
    uri: &secrecy::SecretString,
    timeout: Duration,
) -> Result<(), Failure> {
    let answer = async {
        let endpoint = match shared.remote() {
            Some(endpoint) => endpoint,
            None => Arc::new(Endpoint::connect(Side::Remote, uri, timeout).await?),
        };
        let hello = endpoint.hello().await?;
        shared.set_offset(Side::Remote, hello.clock_offset_ms);
        if let Ok(local) = shared.local.hello().await {
            shared.set_offset(Side::Local, local.clock_offset_ms);
        }
        let skew = shared.skew_ms();
        let text = || {
            format!(
                "the clocks of the two servers differ by {} s; set them right, or `newest_wins` picks by a guess",
                skew.abs() / 1000
            )
        };
        shared.notice("clock", (skew.abs() > SKEW_WARNING).then(text));
        if shared.remote().is_none() {
            crate::identity::check(shared, &endpoint).await?;
            endpoint.journal.get_or_init(|| shared.store.clone());
            endpoint.budget.get_or_init(|| shared.budget.clone());
            if let Some(lease) = shared.lease() {
                endpoint.lease.get_or_init(|| lease.clone());
            }
            endpoint.end_leftovers().await?;
            shared.set_remote(endpoint);
        }
        Ok(())
    };
    // The server selection has `timeout` itself; a half-open link needs the outer one.
    tokio::time::timeout(timeout * 2, answer)
        .await
        .unwrap_or_else(|_| Err(Failure::timeout()))
}
