//! States in plain sentences, the same in CLI, control file, log and systemd status.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::command::{RunStatus, Status, SyncRun, Trigger};
use crate::lease::Standing;

/// `12 sent, 3 fetched, 1 conflict in 0.4 s (completed)`.
pub fn run_sentence(run: &SyncRun) -> String {
    let mut sentence = format!(
        "{}: {} sent, {} fetched, {} in {}",
        run_status(run.status),
        sum(&run.local_to_remote),
        sum(&run.remote_to_local),
        count(sum(&run.conflicts), "conflict"),
        seconds(run.duration_seconds),
    );
    if let Some(error) = run.errors.first() {
        sentence.push_str("; ");
        sentence.push_str(&error.replace('\n', " "));
    }
    sentence
}

/// How things are, in one line.
pub fn status_sentence(status: &Status) -> String {
    let mut parts = vec![link(status)];
    if let Some(ha) = status.ha.as_ref().filter(|ha| ha.role != "holder") {
        parts.push(standing(ha));
    } else if status.is_paused {
        parts.push("paused".into());
    } else if let Some(progress) = &status.progress {
        parts.push(format!(
            "{} at {} of {} documents ({})",
            progress.what.replace('_', " "),
            progress.documents,
            progress.total,
            progress.collection
        ));
    } else if status.is_syncing {
        parts.push("syncing".into());
    }
    if !status.is_capturing {
        parts.push("not capturing local changes yet".into());
    }
    parts.push(match status.pending_documents + status.pending_inbox {
        0 => "nothing waits".into(),
        pending => format!("{} waiting", count(pending, "change")),
    });
    if status.unresolved_conflicts > 0 {
        parts.push(format!(
            "{} open",
            count(status.unresolved_conflicts, "conflict")
        ));
    }
    parts.join(", ")
}

/// Which of several daemons this is.
pub fn standing(ha: &Standing) -> String {
    match (ha.role.as_str(), &ha.holder, ha.since) {
        ("standby", Some(holder), Some(since)) => {
            format!(
                "standing by: {holder} works, for {}",
                age(since, Utc::now())
            )
        }
        ("standby", ..) => "standing by; nobody holds the lease at the moment".into(),
        ("taking_over", ..) => "taking over".into(),
        _ => format!("works as {}", ha.name),
    }
}

/// `online`, `offline since ... (reason)` or `remote not configured`.
pub fn link(status: &Status) -> String {
    if !status.is_configured {
        return "remote database not configured".into();
    }
    if status.is_online {
        return "online".into();
    }
    let reason = status
        .link
        .reason
        .as_deref()
        .map_or(String::new(), |r| format!(" ({})", r.replace('_', " ")));
    format!(
        "{} for {}{reason}",
        status.link.state,
        age(status.link.since, Utc::now())
    )
}

/// A run's state as it is written everywhere.
pub fn run_status(status: RunStatus) -> &'static str {
    match status {
        RunStatus::InProgress => "in progress",
        RunStatus::Completed => "completed",
        RunStatus::Partial => "partial",
        RunStatus::Failed => "failed",
    }
}

/// A run's cause.
pub fn trigger(trigger: Trigger) -> &'static str {
    match trigger {
        Trigger::Manual => "manual",
        Trigger::Automatic => "automatic",
        Trigger::Scheduled => "scheduled",
        Trigger::Reconnect => "reconnect",
        Trigger::Startup => "startup",
    }
}

/// Total over all collections.
pub fn sum(by_collection: &BTreeMap<String, u64>) -> u64 {
    by_collection.values().sum()
}

/// `1 conflict`, `2 conflicts`.
pub fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// `640 B`, `12 KiB`, `3.4 MiB`.
pub fn bytes(value: u64) -> String {
    let mut left = value as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if left < 1024.0 {
            let digits = usize::from(left < 10.0 && unit != "B");
            return format!("{left:.digits$} {unit}");
        }
        left /= 1024.0;
    }
    format!("{left:.1} TiB")
}

/// `0.4 s`, `2 m 5 s`.
pub fn seconds(value: f64) -> String {
    // Also false for NaN, which a broken clock could make.
    if !(0.0..1e15).contains(&value) {
        return "0.0 s".into();
    }
    if value < 60.0 {
        format!("{value:.1} s")
    } else {
        span(Duration::from_secs_f64(value))
    }
}

/// How long ago, in its two largest units; never negative.
pub fn age(then: DateTime<Utc>, now: DateTime<Utc>) -> String {
    span((now - then).to_std().unwrap_or_default())
}

/// A time in its two largest units.
pub fn span(value: Duration) -> String {
    let total = value.as_secs();
    let (days, hours, minutes, seconds) = (
        total / 86_400,
        total / 3600 % 24,
        total / 60 % 60,
        total % 60,
    );
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} m {seconds} s"),
        (0, _, _) => format!("{hours} h {minutes} m"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_have_two_units_and_are_never_negative() {
        let now = Utc::now();
        for (ago, text) in [
            (5, "5 s"),
            (65, "1 m 5 s"),
            (7300, "2 h 1 m"),
            (90_061, "1 d 1 h"),
            (-9, "0 s"),
        ] {
            assert_eq!(age(now - chrono::TimeDelta::seconds(ago), now), text);
        }
        assert_eq!(seconds(0.44), "0.4 s");
        assert_eq!(seconds(125.0), "2 m 5 s");
        assert_eq!(seconds(f64::NAN), "0.0 s");
        assert_eq!(
            (count(1, "conflict"), count(0, "conflict")),
            ("1 conflict".into(), "0 conflicts".into())
        );
    }
}
