//! `sangam sync` and `sangam reconcile`.

use std::collections::BTreeSet;
use std::process::ExitCode;

use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::ask::coloured;
use super::progress::{Source, watch};
use super::table::table;
use super::{Failure, Output, SyncArgs};
use crate::client::{Client, ClientError};
use crate::command::{RunStatus, SyncRun, Trigger};
use crate::config::{Config, LogConfig, LogFormat};
use crate::{daemon, signals, words};

/// Through the daemon; in this process when none runs, or when `--once` asks for it.
pub(super) async fn sync(
    config: Config,
    client: Client,
    args: SyncArgs,
    output: Output,
) -> Result<ExitCode, Failure> {
    if !args.once {
        let body = json!({ "collections": args.collections });
        let asked = client.post::<SyncRun>("/api/sync/sync", Some(body));
        match watch(Source::Daemon(&client), asked, output).await? {
            // Nobody is there. If a daemon runs all the same, it holds the state and start says so.
            Err(ClientError::Off | ClientError::Unreachable { refused: true, .. }) => {}
            answer => return Ok(show(&answer?, output)),
        }
    }
    let run = Box::pin(in_process(config, &args.collections, output)).await?;
    Ok(show(&run, output))
}

pub(super) async fn reconcile(
    client: Client,
    exact: bool,
    output: Output,
) -> Result<ExitCode, Failure> {
    let body = json!({ "exact": exact });
    let asked = client.post::<SyncRun>("/api/sync/reconcile", Some(body));
    let run = watch(Source::Daemon(&client), asked, output).await??;
    Ok(show(&run, output))
}

/// Starts the engine, makes one pass, stops it. Ctrl-C stops it early; nothing is lost by that.
async fn in_process(
    config: Config,
    collections: &[String],
    output: Output,
) -> Result<SyncRun, Failure> {
    // What goes wrong belongs on the screen; the daemon's chatter doesn't.
    crate::log::init(&LogConfig {
        format: LogFormat::Text,
        level: "warn".into(),
    });
    let stop = CancellationToken::new();
    // Kept: it closes when dropped, and the handlers are for `stop` only.
    let _commands = signals::install(stop.clone()).map_err(crate::run::RunError::Signals)?;
    let daemon = stop
        .run_until_cancelled(Box::pin(daemon::start(config)))
        .await
        .ok_or_else(interrupted)??;
    let handle = daemon.handle();
    let engine = tokio::spawn(Box::pin(daemon.run_until(stop.clone())));
    let pass = Box::pin(handle.sync(Trigger::Manual, collections));
    let watched = watch(Source::Here(&handle), pass, output);
    let run = stop.run_until_cancelled(watched).await;
    stop.cancel();
    let ended = engine.await;
    match (run, ended) {
        (_, Ok(Err(error))) => Err(error.into()),
        (Some(run), _) => Ok(run??),
        (None, _) => Err(interrupted()),
    }
}

fn interrupted() -> Failure {
    Failure::new(
        "interrupted; what was not moved waits for the next sync",
        None,
        Failure::INTERRUPTED,
    )
}

pub(super) fn show(run: &SyncRun, output: Output) -> ExitCode {
    output.answer(run, || text(run));
    exit_code(run)
}

fn exit_code(run: &SyncRun) -> ExitCode {
    ExitCode::from(match run.status {
        RunStatus::Failed => 1,
        RunStatus::Partial => 3,
        _ if words::sum(&run.conflicts) > 0 => 3,
        RunStatus::Completed | RunStatus::InProgress => 0,
    })
}

fn text(run: &SyncRun) -> String {
    let touched: BTreeSet<&String> = run
        .local_to_remote
        .keys()
        .chain(run.remote_to_local.keys())
        .chain(run.conflicts.keys())
        .collect();
    let mut text = String::new();
    if !touched.is_empty() {
        let rows = touched.iter().map(|&name| {
            let of = |counts: &std::collections::BTreeMap<String, u64>| {
                counts.get(name).unwrap_or(&0).to_string()
            };
            vec![
                name.clone(),
                of(&run.local_to_remote),
                of(&run.remote_to_local),
                of(&run.conflicts),
            ]
        });
        text.push_str(&table(
            &["collection", "sent", "fetched", "conflicts"],
            rows,
        ));
        text.push_str("\n\n");
    }
    text.push_str(&format!(
        "{}: {} sent, {} fetched, {} in {}\n",
        coloured(run.status),
        words::sum(&run.local_to_remote),
        words::sum(&run.remote_to_local),
        words::count(words::sum(&run.conflicts), "conflict"),
        words::seconds(run.duration_seconds),
    ));
    for error in &run.errors {
        text.push_str(&format!("! {error}\n"));
    }
    if words::sum(&run.conflicts) > 0 {
        text.push_str("See the conflicts with `sangam conflicts`.\n");
    }
    text
}
