//! `sangam resolve` and `sangam auto-resolve`.

use std::process::ExitCode;

use owo_colors::OwoColorize;
use serde_json::{Value, json};

use super::table::table;
use super::{Failure, Output, ResolveArgs};
use crate::client::{Client, ClientError, encoded};
use crate::many::Many;
use crate::resolve::Resolution;
use crate::words;

pub(super) async fn resolve(
    client: Client,
    args: ResolveArgs,
    output: Output,
) -> Result<ExitCode, Failure> {
    let strategy = args.strategy.name();
    let Some(id) = &args.id else {
        let body = json!({
            "strategy": strategy, "collection": args.collection, "kind": args.kind,
            "notes": args.notes, "max": args.max, "dryRun": args.dry_run,
        });
        let many: Many = client
            .post("/api/sync/conflicts/resolve", Some(body))
            .await?;
        return Ok(show_many(&many, args.dry_run, output));
    };
    let body = json!({
        "strategy": strategy, "newValue": args.value, "notes": args.notes,
        "version": args.version_seen, "dryRun": args.dry_run,
    });
    let path = format!("/api/sync/conflicts/{}/resolve", encoded(id));
    let done: Resolution = match client.post(&path, Some(body)).await {
        Ok(done) => done,
        Err(ClientError::Refused {
            detail,
            state: Some(state),
            ..
        }) => return Err(changed(&detail, id, &state)),
        Err(error) => return Err(error.into()),
    };
    output.answer(&done, || outcome(&done));
    Ok(ExitCode::SUCCESS)
}

/// Nothing was written: what the values are now, and where to look.
fn changed(detail: &str, id: &str, state: &Value) -> Failure {
    let value = |name: &str| match &state[name] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let mut message = detail.to_owned();
    if let Some(field) = state["field"].as_str() {
        message.push_str(&format!(
            "\n  {field} is now {} on the local side, {} on the remote side",
            value("localValue"),
            value("remoteValue")
        ));
    }
    Failure::new(message, Some(&format!("sangam conflicts show {id}")), 1)
}

pub(super) fn outcome(done: &Resolution) -> String {
    if done.dry_run {
        let mut text = format!("{} {}\n", "would do:".bold(), done.message);
        for (name, label) in [
            ("document", "The document would be"),
            ("otherDocument", "The other one would be"),
            ("documents", "Documents concerned"),
        ] {
            match done.result.get(name) {
                None => {}
                Some(Value::Null) => text.push_str(&format!("{label} deleted\n")),
                Some(value) => text.push_str(&format!("{label}: {value}\n")),
            }
        }
        text.push_str("Nothing was written.\n");
        return text;
    }
    let mut text = format!("{} {}\n", "done:".green().bold(), done.message);
    text.push_str(if done.settled {
        "Both sides are equal in this.\n"
    } else {
        "The rest follows by itself; `sangam status` shows what still waits.\n"
    });
    if done.strategy != "undo" {
        text.push_str(&format!(
            "Take it back: sangam conflicts undo {}\n",
            done.conflict_id
        ));
    }
    text.push_str("What else is open: sangam conflicts\n");
    text
}

pub(super) async fn auto(
    client: Client,
    max: Option<u64>,
    collection: Option<String>,
    output: Output,
) -> Result<ExitCode, Failure> {
    let body = json!({ "max": max, "collection": collection });
    let many: Many = client
        .post("/api/sync/conflicts/auto-resolve", Some(body))
        .await?;
    Ok(show_many(&many, false, output))
}

fn show_many(many: &Many, dry_run: bool, output: Output) -> ExitCode {
    output.answer(many, || {
        let mut text = String::new();
        if !many.results.is_empty() {
            let rows = many.results.iter().map(|one| {
                vec![
                    one.conflict_id.clone(),
                    one.outcome.clone(),
                    one.strategy.clone().unwrap_or_default(),
                    one.message.clone(),
                ]
            });
            text.push_str(&table(&["conflict", "outcome", "strategy", "what"], rows));
            text.push_str("\n\n");
        }
        text.push_str(&format!(
            "{} resolved, {} skipped (manual needed), {} failed\n",
            words::count(many.resolved, "conflict").green(),
            many.skipped,
            many.failed
        ));
        if dry_run {
            text.push_str("Nothing was written.\n");
        }
        if many.skipped + many.failed > 0 {
            text.push_str("See what is left with `sangam conflicts`.\n");
        }
        text
    });
    ExitCode::from(if many.skipped + many.failed > 0 { 3 } else { 0 })
}
