//! Signals: TERM and INT stop (a second one at once), HUP reloads, USR1 syncs, USR2 logs the status.

use std::io;

use futures::StreamExt;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook_tokio::Signals;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::command::Command;
use crate::dispatch::Dispatcher;

/// More than this many signals waiting for an answer are merged, as the kernel does.
const WAITING: usize = 16;

/// Installs the handlers before anything slow is done, so that a start can be interrupted. `stop` is
/// cancelled by the first TERM or INT; other signals come out of the receiver as commands.
pub fn install(stop: CancellationToken) -> io::Result<mpsc::Receiver<Command>> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2])?;
    let (sender, receiver) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        while let Some(signal) = signals.next().await {
            let command = match signal {
                SIGHUP => Command::Reload,
                SIGUSR1 => Command::Sync {
                    collections: Vec::new(),
                },
                SIGUSR2 => Command::Status,
                _ if stop.is_cancelled() => {
                    tracing::warn!("second signal: stopping at once; what is queued stays on disk");
                    std::process::exit(128 + signal);
                }
                _ => {
                    tracing::info!("stopping; a second signal stops at once");
                    stop.cancel();
                    continue;
                }
            };
            if sender.try_send(command).is_err() {
                tracing::debug!(signal, "too many signals at once; this one is left out");
            }
        }
    });
    Ok(receiver)
}

/// Carries out what the signals ask for and logs what came of it.
pub async fn run(
    mut commands: mpsc::Receiver<Command>,
    dispatcher: Dispatcher,
    cancel: CancellationToken,
) {
    while let Some(Some(command)) = cancel.run_until_cancelled(commands.recv()).await {
        let dispatcher = dispatcher.clone();
        // Not awaited here: a status must be answered while a long sync is going on.
        tokio::spawn(async move {
            let name = format!("{command:?}");
            let answer = dispatcher.execute_to_line(command).await;
            tracing::info!(command = name, "{answer}");
        });
    }
}
