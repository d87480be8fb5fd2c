//! `sangam verify`.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use owo_colors::OwoColorize;
use serde_json::json;

use super::progress::{Source, watch};
use super::table::table;
use super::{Failure, Output, VerifyArgs};
use crate::client::Client;
use crate::verify::{Difference, Report};
use crate::words;

pub(super) async fn verify(
    client: Client,
    args: VerifyArgs,
    output: Output,
) -> Result<ExitCode, Failure> {
    let collections = Some(&args.collections).filter(|c| !c.is_empty());
    let body = json!({
        "collections": collections, "fresh": args.fresh,
        "maxDocumentsPerSecond": args.max_documents, "maxBytesPerSecond": args.max_bytes,
    });
    let asked = client.post::<Report>("/api/sync/verify", Some(body));
    let mut report = watch(Source::Daemon(&client), asked, output).await??;
    let found = report.total.differences();
    if args.repair && found > 0 {
        if !output.json {
            let mut stderr = anstream::stderr().lock();
            // A closed standard error changes nothing.
            let _ = writeln!(stderr, "{}\n{}", text(&report).trim_end(), intent(&report));
        }
        if !args.yes && !agreed("Repair?") {
            return Err(Failure::new(
                "nothing was repaired",
                Some("say yes, or give --yes, to repair what differs"),
                3,
            ));
        }
        let asked = client.post("/api/sync/verify/repair", None);
        report = watch(Source::Daemon(&client), asked, output).await??;
    }
    output.answer(&report, || text(&report));
    let open = found_open(&report);
    Ok(ExitCode::from(if open { 3 } else { 0 }))
}

/// Whether something is left for a person: differences, conflicts, documents set aside, held collections.
fn found_open(report: &Report) -> bool {
    let total = &report.total;
    !report.equal || total.in_conflict + total.set_aside > 0
}

/// Asks on the terminal; without one, the answer is no.
pub(super) fn agreed(question: &str) -> bool {
    if !std::io::stdin().is_terminal() {
        return false;
    }
    let mut stderr = anstream::stderr().lock();
    let _ = write!(stderr, "{question} [y/N] ");
    let _ = stderr.flush();
    let mut line = String::new();
    let read = std::io::stdin().read_line(&mut line);
    read.is_ok() && ["y", "yes"].contains(&line.trim().to_lowercase().as_str())
}

/// What a repair is going to do, by kind.
fn intent(report: &Report) -> String {
    let mut counts = std::collections::BTreeMap::new();
    for d in &report.differences {
        *counts.entry(d.repair.as_str()).or_insert(0_u64) += 1;
    }
    let parts: Vec<String> = counts
        .into_iter()
        .map(|(repair, n)| match repair {
            "push" => format!("{n} sent to the remote"),
            "pull" => format!("{n} fetched from the remote"),
            "delete_remote" => format!("{n} deleted on the remote, as they are on the local side"),
            "delete_local" => format!("{n} deleted on the local side, as they are on the remote"),
            "merge" => format!("{n} merged"),
            "conflict" => format!("{n} become conflicts for you to decide"),
            _ => format!("{n} looked at again"),
        })
        .collect();
    let more = report.total.differences() > report.differences.len() as u64;
    let first = if more { " (of the first listed)" } else { "" };
    format!("A repair would have{first}: {}.", parts.join(", "))
}

fn rows(differences: &[Difference]) -> impl Iterator<Item = Vec<String>> + '_ {
    differences.iter().take(20).map(|d| {
        let id = match &d.id {
            serde_json::Value::String(s) => s.clone(),
            other => other.to_string(),
        };
        vec![
            d.collection.clone(),
            d.kind.replace('_', " "),
            id,
            d.repair.replace('_', " "),
        ]
    })
}

fn text(report: &Report) -> String {
    let total = &report.total;
    let mut text = String::new();
    let telling = report
        .collections
        .iter()
        .filter(|t| t.differences() + t.known() > 0 || t.held);
    let telling: Vec<Vec<String>> = telling
        .map(|t| {
            vec![
                t.collection.clone(),
                t.documents.to_string(),
                t.only_local.to_string(),
                t.only_remote.to_string(),
                t.different.to_string(),
                t.waiting.to_string(),
                t.in_conflict.to_string(),
                t.set_aside.to_string(),
                t.expired.to_string(),
                if t.held { "held" } else { "" }.into(),
            ]
        })
        .collect();
    if !telling.is_empty() {
        let heading = [
            "collection",
            "documents",
            "only local",
            "only remote",
            "different",
            "waiting",
            "in conflict",
            "set aside",
            "expired",
            "",
        ];
        text.push_str(&table(&heading, telling));
        text.push_str("\n\n");
    }
    if !report.differences.is_empty() {
        let heading = ["collection", "difference", "id", "a repair would"];
        text.push_str(&table(&heading, rows(&report.differences)));
        text.push('\n');
        let more = total.differences().saturating_sub(20);
        if more > 0 {
            text.push_str(&format!("... and {more} more; --json lists 1,000\n"));
        }
        text.push('\n');
    }
    let at = report.ended.format("%Y-%m-%d %H:%M:%S UTC");
    let documents = words::count(total.documents, "document");
    let known = match total.known() {
        0 => String::new(),
        n => format!(", but for {n} known to wait"),
    };
    if report.equal {
        text.push_str(&format!(
            "{} at {at}: {documents}{known}\n",
            "equal".green()
        ));
    } else {
        let found = words::count(total.differences(), "difference");
        text.push_str(&format!(
            "{} at {at}: {found} in {documents}{known}\n",
            "not equal".red()
        ));
    }
    if total.differences() > 0 {
        text.push_str("`sangam verify --repair` mends it.\n");
    }
    if total.held || total.in_conflict > 0 {
        text.push_str("See what waits for you with `sangam conflicts`.\n");
    }
    text
}
