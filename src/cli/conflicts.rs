//! `sangam conflicts`: the inbox, one conflict side by side, and undo.

use std::collections::BTreeMap;
use std::process::ExitCode;

use chrono::{DateTime, Local, Utc};
use owo_colors::OwoColorize;
use serde_json::{Value, json};

use super::ask::id_text;
use super::resolve::outcome;
use super::table::{pairs, table};
use super::{ConflictsArgs, ConflictsCommand, Failure, Output};
use crate::client::{Client, encoded};
use crate::resolve::Resolution;
use crate::words;

/// Longest value shown in a line.
const WIDEST: usize = 60;

pub(super) async fn conflicts(
    client: Client,
    args: ConflictsArgs,
    output: Output,
) -> Result<ExitCode, Failure> {
    match &args.command {
        None => list(client, args, output).await,
        Some(ConflictsCommand::Show { id }) => {
            let found: Value = client
                .get(&format!("/api/sync/conflicts/{}", encoded(id)))
                .await?;
            output.answer(&found, || detail(&found, Utc::now()));
            Ok(ExitCode::SUCCESS)
        }
        Some(ConflictsCommand::Undo { id, value }) => {
            let path = format!("/api/sync/conflicts/{}/undo", encoded(id));
            let body = value.as_ref().map(|v| json!({ "newValue": v }));
            let done: Resolution = client.post(&path, body).await?;
            output.answer(&done, || outcome(&done));
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn list(client: Client, args: ConflictsArgs, output: Output) -> Result<ExitCode, Failure> {
    let mut path = format!("/api/sync/conflicts?limit={}", args.limit);
    if !args.all {
        path.push_str("&resolved=false");
    }
    for (name, value) in [("collection", &args.collection), ("after", &args.after)] {
        if let Some(value) = value {
            path.push_str(&format!("&{name}={}", encoded(value)));
        }
    }
    let (found, total, next): (Vec<Value>, u64, Option<String>) = client.page(&path).await?;
    let open = found
        .iter()
        .filter(|c| c["resolved"] == json!(false))
        .count();
    let answer = json!({ "conflicts": found, "total": total, "next": next });
    output.answer(&answer, || {
        let mut text = listing(&found, total, args.all, Utc::now());
        if let Some(next) = next {
            let mut command = format!("sangam conflicts --after {next}");
            if args.all {
                command.push_str(" --all");
            }
            if let Some(collection) = &args.collection {
                command.push_str(&format!(" --collection {collection}"));
            }
            text.push_str(&format!("There are more: {command}\n"));
        }
        text
    });
    Ok(ExitCode::from(if open > 0 { 3 } else { 0 }))
}

fn listing(found: &[Value], total: u64, all: bool, now: DateTime<Utc>) -> String {
    if found.is_empty() {
        return if all {
            "no conflicts on record"
        } else {
            "no open conflicts"
        }
        .into();
    }
    let word = if all { "conflict" } else { "open conflict" };
    let mut text = format!("{}\n", words::count(total, word).bold());
    let mut groups: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for conflict in found {
        let collection = conflict["collection"].as_str().unwrap_or("?");
        groups.entry(collection).or_default().push(conflict);
    }
    for (collection, conflicts) in groups {
        text.push_str(&format!("\n{} ({})\n", collection.bold(), conflicts.len()));
        for conflict in conflicts {
            text.push_str(&indented(&entry(conflict, now)));
        }
    }
    text.push_str("\nOne of them in detail: sangam conflicts show ID\n");
    text
}

fn indented(text: &str) -> String {
    text.lines()
        .map(|line| format!("  {line}").trim_end().to_owned() + "\n")
        .collect()
}

fn entry(conflict: &Value, now: DateTime<Utc>) -> String {
    let text = |name: &str| conflict[name].as_str().unwrap_or_default();
    let kind = text("kind").replace('_', " ");
    let mut rows = vec![("Kind", kind)];
    if !text("field").is_empty() {
        rows.push(("Field", text("field").replace(',', ", ")));
    }
    for (label, value, id) in [
        ("Local", "localValue", "localId"),
        ("Remote", "remoteValue", "remoteId"),
    ] {
        if conflict[id].is_null() && text("kind") != "delete_update" {
            continue;
        }
        let has_field = !text("field").is_empty();
        rows.push((label, one_side(&conflict[id], &conflict[value], has_field)));
    }
    rows.push(("Since", since(conflict, "timestamp", now)));
    if !text("notes").is_empty() {
        rows.push(("Notes", text("notes").to_owned()));
    }
    if conflict["resolved"] == json!(true) {
        let how = text("resolutionStrategy");
        let done = since(conflict, "resolvedAt", now);
        rows.push((
            "Resolved",
            format!("{how}, by {}, {done}", text("resolvedBy"))
                .green()
                .to_string(),
        ));
        if !conflict["undoneAt"].is_null() {
            rows.push(("Undone", since(conflict, "undoneAt", now)));
        }
    }
    let mut out = format!("{}\n{}", text("_id").cyan(), indented(&pairs(&rows)));
    out.push_str(&advice(conflict));
    out.push('\n');
    out
}

fn one_side(id: &Value, value: &Value, has_field: bool) -> String {
    if id.is_null() {
        return "no such document".into();
    }
    let id = format!("document {}", id_text(id));
    if has_field {
        format!("{} ({id})", short(value))
    } else {
        id
    }
}

fn advice(conflict: &Value) -> String {
    let Some(ways) = conflict["recommendations"]
        .as_array()
        .filter(|w| !w.is_empty())
    else {
        return String::new();
    };
    let mut text = "What you can do:\n".to_owned();
    for (i, way) in ways.iter().enumerate() {
        text.push_str(&format!(
            "  {}. {}\n     {}\n",
            i + 1,
            way["reason"].as_str().unwrap_or_default(),
            way["command"].as_str().unwrap_or_default().bold()
        ));
    }
    indented(&text)
}

/// A value in one line.
fn short(value: &Value) -> String {
    let text = match value {
        Value::Null => "nothing".to_owned(),
        Value::String(text) => text.clone(),
        Value::Object(map) if map.len() == 1 => match map.iter().next() {
            Some((name, Value::String(text))) if name.starts_with('$') => text.clone(),
            _ => value.to_string(),
        },
        other => other.to_string(),
    };
    if text.chars().count() > WIDEST {
        let cut: String = text.chars().take(WIDEST - 1).collect();
        return format!("{cut}…");
    }
    text
}

fn since(conflict: &Value, name: &str, now: DateTime<Utc>) -> String {
    let time = conflict[name]
        .as_str()
        .and_then(|t| DateTime::parse_from_rfc3339(t).ok());
    time.map_or_else(String::new, |t| {
        let local = t.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S");
        format!("{local} ({} ago)", words::age(t.with_timezone(&Utc), now))
    })
}

fn detail(conflict: &Value, now: DateTime<Utc>) -> String {
    let collection = conflict["collection"].as_str().unwrap_or("?");
    let mut text = format!("{}\n{}", collection.bold(), entry(conflict, now));
    if let Some(fields) = conflict["fields"].as_array().filter(|f| !f.is_empty()) {
        let cell = |row: &Value, side: &str| match &row[side] {
            Value::Null => String::new(),
            value => short(value),
        };
        let rows = fields.iter().map(|row| {
            let differs = row["differs"] == json!(true);
            vec![
                if differs { "*" } else { "" }.to_owned(),
                row["name"].as_str().unwrap_or_default().to_owned(),
                cell(row, "local"),
                cell(row, "base"),
                cell(row, "remote"),
                match row["changedBy"].as_str() {
                    None | Some("none") => String::new(),
                    Some(side) => side.to_owned(),
                },
            ]
        });
        let heading = ["", "field", "local", "before", "remote", "changed by"];
        text.push_str(&format!("{}\n", table(&heading, rows)));
    }
    for side in ["local", "remote"] {
        text.push_str(&change(side, &conflict["changes"][side], now));
    }
    if let Some(ways) = conflict["strategies"].as_array() {
        text.push_str("\nWhat each strategy would result in:\n");
        for way in ways {
            let name = way["strategy"].as_str().unwrap_or_default();
            let mut summary = way["summary"].as_str().unwrap_or_default().to_owned();
            if way["possible"] == json!(false) {
                summary = format!("not possible: {summary}");
            } else if let Some(value) = way["suggestedValue"].as_str() {
                summary = format!("with --value {value}: {summary}");
            }
            text.push_str(&format!("  {name:13} {summary}\n"));
        }
        let id = conflict["_id"].as_str().unwrap_or("ID");
        text.push_str(&format!(
            "\nTry one without writing: sangam resolve {id} --strategy STRATEGY --dry-run\n"
        ));
    }
    text
}

fn change(side: &str, change: &Value, now: DateTime<Utc>) -> String {
    if change.is_null() {
        return String::new();
    }
    let fields: Vec<&str> = change["fields"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let what = if change["deleted"] == json!(true) {
        "deleted the document".to_owned()
    } else if change["created"] == json!(true) {
        "created the document".to_owned()
    } else if fields.is_empty() {
        "changed nothing".to_owned()
    } else {
        format!("changed {}", fields.join(", "))
    };
    let mut text = format!("The {side} side {what}");
    if !change["at"].is_null() {
        text.push_str(&format!(", {}", since(change, "at", now)));
    }
    if !change["by"].is_null() {
        text.push_str(&format!(", by {}", short(&change["by"])));
    }
    text + "\n"
}
