//! `sangam plan`, `sync --dry-run` and `reconcile --adopt`.

use std::io::Write as _;
use std::process::ExitCode;

use owo_colors::OwoColorize;
use serde_json::json;

use super::table::table;
use super::verify::agreed;
use super::{Failure, Output};
use crate::adopt::Mode;
use crate::client::{Client, ClientError, encoded};
use crate::command::SyncRun;
use crate::config::Config;
use crate::plan::{Outlook, Plan, Writes};
use crate::{daemon, words};

/// Asks for a plan.
async fn ask(
    client: &Client,
    collections: &[String],
    (compare, adopt): (bool, Option<Mode>),
) -> Result<Plan, ClientError> {
    let mut path = format!("/api/sync/plan?compare={compare}");
    if !collections.is_empty() {
        path.push_str(&format!("&collections={}", encoded(&collections.join(","))));
    }
    if let Some(mode) = adopt {
        path.push_str(&format!("&adopt={}", mode.name()));
    }
    client.get_slow(&path).await
}

pub(super) async fn plan(
    client: Client,
    collections: &[String],
    compare: bool,
    output: Output,
) -> Result<ExitCode, Failure> {
    let plan = ask(&client, collections, (compare, None)).await?;
    output.answer(&plan, || text(&plan));
    let open = plan.total.conflicts + plan.total.held + plan.total.unique_clashes > 0
        || plan.total.halted
        || plan.total.deletes_held;
    Ok(ExitCode::from(if open { 3 } else { 0 }))
}

/// Says what it will do, asks where something would be discarded, and does it: through the daemon, or,
/// where none runs, at its next start.
pub(super) async fn adopt(
    config: &Config,
    client: Client,
    (mode, yes): (Mode, bool),
    output: Output,
) -> Result<ExitCode, Failure> {
    let planned = match ask(&client, &[], (true, Some(mode))).await {
        Ok(plan) => Some(plan),
        Err(ClientError::Off | ClientError::Unreachable { refused: true, .. }) => None,
        Err(error) => return Err(error.into()),
    };
    if !output.json {
        let mut stderr = anstream::stderr().lock();
        // A closed standard error changes nothing.
        let _ = writeln!(stderr, "{}", mode.sentence());
        if let Some(plan) = &planned {
            let _ = writeln!(stderr, "{}", text(plan).trim_end());
        }
    }
    if mode != Mode::Merge && !yes && !agreed("Go on?") {
        return Err(Failure::new(
            "nothing was changed",
            Some("give --yes if that is what you want"),
            2,
        ));
    }
    if planned.is_some() {
        let body = json!({ "mode": mode });
        let run: SyncRun = client.post("/api/sync/adopt", Some(body)).await?;
        return Ok(super::sync::show(&run, output));
    }
    daemon::adopt(config, mode).await?;
    output.answer(&json!({ "adopted": true, "mode": mode }), || {
        format!(
            "The old state is forgotten. The next start compares both databases whole. {}",
            mode.sentence()
        )
    });
    Ok(ExitCode::SUCCESS)
}

fn row(o: &Outlook, name: String) -> Vec<String> {
    let writes = |w: &Writes| format!("{} / {} / {}", w.creates, w.updates, w.deletes);
    let remark = if o.halted {
        "waits for your decision"
    } else if o.deletes_held {
        "deletions would be held"
    } else {
        ""
    };
    vec![
        name,
        writes(&o.to_remote),
        words::bytes(o.to_remote.bytes),
        writes(&o.to_local),
        words::bytes(o.to_local.bytes),
        o.merges.to_string(),
        o.conflicts.to_string(),
        o.unique_clashes.to_string(),
        o.held.to_string(),
        remark.into(),
    ]
}

fn text(plan: &Plan) -> String {
    let from = match plan.source.as_str() {
        "queue" => "by what is queued; --compare looks at everything",
        _ => "by comparing both databases",
    };
    if plan.collections.is_empty() {
        return format!("{} ({from})\n", "Nothing to do".green());
    }
    let heading = [
        "collection",
        "to remote: new / changed / deleted",
        "bytes",
        "to local: new / changed / deleted",
        "bytes",
        "merges",
        "conflicts",
        "clashes",
        "held",
        "",
    ];
    let mut rows: Vec<Vec<String>> = plan
        .collections
        .iter()
        .map(|o| row(o, o.collection.clone()))
        .collect();
    if rows.len() > 1 {
        rows.push(row(&plan.total, "total".into()));
    }
    let mut text = table(&heading, rows);
    let time = match (plan.seconds, &plan.rate) {
        (Some(seconds), Some(rate)) => format!(
            "about {} at the last rate of {:.0} documents a second",
            words::seconds(seconds),
            rate.documents_per_second
        ),
        _ => "nobody can tell yet how long it takes".into(),
    };
    text.push_str(&format!(
        "\n\nPlanned {from}; {time}. Nothing was written.\n"
    ));
    text
}
