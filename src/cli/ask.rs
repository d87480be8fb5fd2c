//! Commands that ask the daemon and show its answer.

use std::process::ExitCode;

use chrono::{DateTime, Local, Utc};
use owo_colors::OwoColorize;
use serde_json::Value;

use super::table::{pairs, table};
use super::{Failure, Output};
use crate::client::Client;
use crate::command::{Queue, RunStatus, Status, SyncRun};
use crate::words;

pub(super) async fn status(client: Client, output: Output) -> Result<ExitCode, Failure> {
    let status: Status = client.get("/api/sync/status").await?;
    output.answer(&status, || status_text(&status, Utc::now()));
    Ok(ExitCode::SUCCESS)
}

/// A container's engine takes codes above 1 for its own, so there are only two here.
pub(super) async fn healthcheck(client: Client, output: Output) -> Result<ExitCode, Failure> {
    match client.get::<Value>("/healthz").await {
        Ok(answer) => {
            output.answer(&answer, || "alive".to_owned());
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Err(Failure::new(&error, error.hint(), 1)),
    }
}

pub(super) async fn queue(client: Client, limit: u32, output: Output) -> Result<ExitCode, Failure> {
    let queue: Queue = client
        .get(&format!("/api/sync/queue?limit={limit}"))
        .await?;
    output.answer(&queue, || queue_text(&queue, Utc::now()));
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn logs(client: Client, limit: u32, output: Output) -> Result<ExitCode, Failure> {
    let runs: Vec<SyncRun> = client.get(&format!("/api/sync/logs?limit={limit}")).await?;
    output.answer(&runs, || logs_text(&runs));
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn order(client: Client, path: &str, output: Output) -> Result<ExitCode, Failure> {
    let answer: Value = client.post(path, None).await?;
    output.answer(&answer, || {
        answer["message"].as_str().unwrap_or("done").to_owned()
    });
    Ok(ExitCode::SUCCESS)
}

fn status_text(status: &Status, now: DateTime<Utc>) -> String {
    let mut rows = vec![("Remote", remote(status, now)), ("Daemon", daemon(status))];
    if let Some(progress) = &status.progress {
        rows.push((
            "Comparing",
            format!(
                "{}: {} of {} documents, now {}",
                progress.what.replace('_', " "),
                progress.documents,
                progress.total,
                progress.collection
            ),
        ));
    }
    rows.push(("Last sync", last_sync(status, now)));
    rows.push((
        "Syncs",
        format!("{} completed", status.total_syncs_completed),
    ));
    if let Some(proof) = proof(status, now) {
        rows.push(("Verified", proof));
    }
    rows.push(("Waiting", waiting(status, now)));
    if status.failed_documents > 0 {
        let failed = words::count(status.failed_documents, "document");
        rows.push((
            "Set aside",
            format!("{} (see `sangam queue`)", failed.red()),
        ));
    }
    rows.push(("Conflicts", conflicts(status)));
    if let Some(skew) = status.clock_skew.filter(|skew| skew.abs() > 60_000) {
        rows.push((
            "Clocks",
            format!(
                "{}",
                format_args!(
                    "the remote's is {} off ours",
                    words::seconds(skew.abs() as f64 / 1000.0)
                )
                .yellow()
            ),
        ));
    }
    rows.push((
        "Databases",
        format!("{} (site {})", status.databases.join(", "), status.site),
    ));
    let mut text = pairs(&rows);
    for notice in &status.notices {
        text.push_str(&format!("{} {notice}\n", "!".yellow().bold()));
    }
    text
}

/// What the last verify has proven, and when both sides were last proven equal.
fn proof(status: &Status, now: DateTime<Utc>) -> Option<String> {
    let last = status.last_verify.as_ref()?;
    let documents = words::count(last.documents, "document");
    if last.equal {
        return Some(format!("equal {}, {documents}", words::age(last.at, now)));
    }
    let before = status.last_proof.as_ref().map_or(String::new(), |p| {
        format!("; last equal {}", words::age(p.at, now))
    });
    let found = words::count(last.differences, "difference");
    Some(format!(
        "{} {} in {documents}{before} (see `sangam verify`)",
        found.red(),
        words::age(last.at, now)
    ))
}

fn remote(status: &Status, now: DateTime<Utc>) -> String {
    if !status.is_configured {
        return format!(
            "{}; set remote.uri in sangam.toml or MONGODB_CLOUD_URL. Changes are noted meanwhile.",
            "not configured".yellow()
        );
    }
    if status.is_online {
        let how = if status.is_following {
            "changes arrive at once"
        } else {
            "changes are asked for at intervals"
        };
        return format!("configured, {}; {how}", "online".green());
    }
    let mut text = format!(
        "configured, {} for {}",
        status.link.state.replace('_', " ").red(),
        words::age(status.link.since, now)
    );
    let why = status
        .link
        .message
        .clone()
        .or_else(|| status.link.reason.as_deref().map(|r| r.replace('_', " ")));
    if let Some(why) = why {
        text.push_str(&format!("; {why}"));
    }
    if let Some(next) = status.link.next_probe {
        text.push_str(&format!(" (next try in {})", words::age(now, next)));
    }
    text
}

fn daemon(status: &Status) -> String {
    let standby = status.ha.as_ref().filter(|ha| ha.role != "holder");
    let doing = match (status.is_paused, status.is_syncing) {
        _ if standby.is_some() => standby.map(words::standing).unwrap_or_default(),
        (true, _) => format!("{} (`sangam resume` goes on)", "paused".yellow()),
        (false, true) => "syncing".to_owned(),
        (false, false) => "ready".to_owned(),
    };
    let capturing = if status.is_capturing {
        "local changes are being noted".to_owned()
    } else {
        format!("{}", "local changes are not being noted yet".red())
    };
    format!("{doing}; {capturing}; version {}", status.version)
}

fn last_sync(status: &Status, now: DateTime<Utc>) -> String {
    let Some(time) = status.last_sync_time else {
        return "never".into();
    };
    let mut text = format!("{} ago ({})", words::age(time, now), clock(time));
    if let Some(ended) = status.last_sync_status {
        text.push_str(&format!(", {}", coloured(ended)));
    }
    if let Some(duration) = status.last_sync_duration {
        text.push_str(&format!(", took {}", words::seconds(duration)));
    }
    text
}

fn waiting(status: &Status, now: DateTime<Utc>) -> String {
    if status.pending_documents + status.pending_inbox == 0 {
        return format!("{}", "nothing".green());
    }
    let oldest = status.oldest_unsynced.map_or(String::new(), |since| {
        format!(", the oldest since {}", words::age(since, now))
    });
    format!(
        "{} to send, {} to fetch{oldest}",
        status.pending_documents, status.pending_inbox
    )
}

fn conflicts(status: &Status) -> String {
    let total = format!("{} ever", status.total_conflicts);
    if status.unresolved_conflicts == 0 {
        return format!("{} ({total})", "none open".green());
    }
    let open = format!("{} open", status.unresolved_conflicts);
    format!(
        "{} ({total}); see them with `sangam conflicts`",
        open.yellow()
    )
}

fn queue_text(queue: &Queue, now: DateTime<Utc>) -> String {
    let mut text = format!("{} to send, {} to fetch\n", queue.outbox, queue.inbox);
    if queue.entries.is_empty() {
        return text;
    }
    let rows = queue.entries.iter().map(|entry| {
        vec![
            if entry.queue == "outbox" {
                "send"
            } else {
                "fetch"
            }
            .to_owned(),
            entry.collection.clone(),
            id_text(&entry.id),
            words::age(entry.since, now),
            entry.state.clone(),
            entry.reason.clone().unwrap_or_default(),
        ]
    });
    text.push_str(&table(
        &["way", "collection", "id", "since", "state", "reason"],
        rows,
    ));
    let listed = queue.entries.len() as u64;
    let all = queue.outbox + queue.inbox;
    if listed < all {
        text.push_str(&format!("\n... and {} more (--limit)", all - listed));
    }
    text
}

fn logs_text(runs: &[SyncRun]) -> String {
    if runs.is_empty() {
        return "no sync yet".into();
    }
    let rows = runs.iter().map(|run| {
        vec![
            clock(run.start_time),
            words::trigger(run.trigger).to_owned(),
            words::run_status(run.status).to_owned(),
            words::seconds(run.duration_seconds),
            words::sum(&run.local_to_remote).to_string(),
            words::sum(&run.remote_to_local).to_string(),
            words::sum(&run.conflicts).to_string(),
            run.errors.first().cloned().unwrap_or_default(),
        ]
    });
    table(
        &[
            "started",
            "trigger",
            "status",
            "took",
            "sent",
            "fetched",
            "conflicts",
            "error",
        ],
        rows,
    )
}

/// An `_id` as people write it: the hex of an ObjectId, else its extended JSON.
pub(super) fn id_text(id: &Value) -> String {
    match id {
        Value::String(text) => text.clone(),
        Value::Object(object) => match object.get("$oid").and_then(Value::as_str) {
            Some(hex) => hex.to_owned(),
            None => id.to_string(),
        },
        other => other.to_string(),
    }
}

fn clock(time: DateTime<Utc>) -> String {
    time.with_timezone(&Local)
        .format("%Y-%m-%d %H:%M:%S")
        .to_string()
}

pub(super) fn coloured(status: RunStatus) -> String {
    let word = words::run_status(status);
    match status {
        RunStatus::Completed => word.green().to_string(),
        RunStatus::Failed => word.red().to_string(),
        RunStatus::Partial | RunStatus::InProgress => word.yellow().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::TimeDelta;
    use serde_json::json;

    fn plain(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    fn sample(now: DateTime<Utc>) -> Status {
        let link = json!({"state": "online", "since": now, "reason": null, "message": null,
                          "nextProbe": null, "lastCheck": null});
        serde_json::from_value(json!({
            "lastSyncTime": now - TimeDelta::seconds(65), "lastSyncStatus": "partial", "lastSyncDuration": 1.23,
            "totalSyncsCompleted": 7, "totalConflicts": 3, "unresolvedConflicts": 1, "pendingDocuments": 0,
            "pendingInbox": 0, "heldDocuments": 0, "failedDocuments": 0, "isOnline": true, "isSyncing": false, "isConfigured": true,
            "ha": null, "isPaused": false, "isCapturing": true, "isFollowing": true, "link": link, "lagSeconds": 0.0,
            "oldestUnsynced": null, "clockSkew": 5, "progress": null, "notices": [], "databases": ["temple_db"],
            "site": "local", "version": "0.1.0",
        }))
        .unwrap()
    }

    #[test]
    fn status_reads_for_a_person() {
        let now = Utc::now();
        let mut status = sample(now);
        let text = plain(&status_text(&status, now));
        for expected in [
            "Remote     configured, online; changes arrive at once",
            "Daemon     ready; local changes are being noted",
            "1 m 5 s ago (",
            ", partial, took 1.2 s",
            "Syncs      7 completed",
            "Waiting    nothing",
            "Conflicts  1 open (3 ever); see them with `sangam conflicts`",
        ] {
            assert!(text.contains(expected), "{expected}:\n{text}");
        }

        status.is_online = false;
        status.link.state = "offline".into();
        status.link.since = now - TimeDelta::hours(50);
        status.link.message = Some("no internet here".into());
        status.link.next_probe = Some(now + TimeDelta::seconds(12));
        status.pending_documents = 4;
        status.oldest_unsynced = Some(now - TimeDelta::minutes(3));
        status.notices.push("history was lost".into());
        let text = plain(&status_text(&status, now));
        for expected in [
            "configured, offline for 2 d 2 h; no internet here (next try in 12 s)",
            "4 to send, 0 to fetch, the oldest since 3 m 0 s",
            "! history was lost",
        ] {
            assert!(text.contains(expected), "{expected}:\n{text}");
        }

        status.is_configured = false;
        assert!(plain(&status_text(&status, now)).contains("not configured; set remote.uri"));
    }

    #[test]
    fn queue_and_logs_are_tables() {
        let now = Utc::now();
        let queue: Queue = serde_json::from_value(json!({"outbox": 2, "inbox": 1, "entries": [{
            "queue": "outbox", "collection": "bookings", "id": {"$oid": "65a1b2c3d4e5f60718293a4b"},
            "since": now - TimeDelta::seconds(9), "state": "conflict", "reason": "two\nlines",
        }]}))
        .unwrap();
        let text = queue_text(&queue, now);
        assert!(
            text.contains("2 to send, 1 to fetch") && text.contains("... and 2 more"),
            "{text}"
        );
        let row = text.lines().find(|line| line.starts_with("send")).unwrap();
        assert!(
            row.contains("65a1b2c3d4e5f60718293a4b") && row.ends_with("two lines"),
            "{row}"
        );
        assert_eq!(logs_text(&[]), "no sync yet");
    }
}
