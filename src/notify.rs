//! Tells systemd how things are: READY=1 once local changes are captured, WATCHDOG=1 while the
//! event loops are alive, and a sentence for `systemctl status`.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::handle::Handle;
use crate::words;

const TICK: Duration = Duration::from_millis(500);
const STATUS_EVERY: Duration = Duration::from_secs(5);

/// While not ready but alive, the start may take this much longer: a local server that is away for an
/// hour is waited for, a hung start is not.
const EXTEND_START_MICROSECONDS: u32 = 60_000_000;

/// Runs until cancelled. Without systemd there is nobody to tell and nothing is done.
pub async fn run(handle: Handle, cancel: CancellationToken) {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return cancel.cancelled().await;
    }
    let work = async { tokio::join!(beat(&handle), tell_status(&handle)) };
    cancel.run_until_cancelled(work).await;
    send(&[
        NotifyState::Stopping,
        NotifyState::Status("stopping; what is queued stays on disk"),
    ]);
}

async fn beat(handle: &Handle) {
    // Twice as often as asked, and at least every tick.
    let watchdog = sd_notify::watchdog_enabled().map(|period| (period / 2).min(TICK));
    let mut ticks = interval(watchdog.unwrap_or(TICK));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ready = false;
    loop {
        ticks.tick().await;
        if !handle.is_alive() {
            // No word to systemd: its watchdog restarts us.
            tracing::error!("an event loop is stuck");
            continue;
        }
        if !ready && handle.is_capturing() {
            ready = true;
            send(&[NotifyState::Ready]);
        }
        if !ready {
            send(&[NotifyState::ExtendTimeoutUsec(EXTEND_START_MICROSECONDS)]);
        }
        if watchdog.is_some() {
            send(&[NotifyState::Watchdog]);
        }
    }
}

async fn tell_status(handle: &Handle) {
    let mut ticks = interval(STATUS_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = String::new();
    loop {
        ticks.tick().await;
        let asked = handle.clone();
        // In a task of its own: a driver's call must not be dropped half-way.
        let asking = tokio::spawn(async move { Box::pin(asked.status()).await });
        let Ok(Ok(Ok(status))) = timeout(STATUS_EVERY, asking).await else {
            continue;
        };
        let sentence = words::status_sentence(&status);
        if sentence != told {
            send(&[NotifyState::Status(&sentence)]);
            told = sentence;
        }
    }
}

fn send(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "systemd could not be told");
    }
}
