//! What a process uses, from `/proc`, and what a server has done.

use std::time::Duration;

use mongodb::Database;
use mongodb::bson::{Document, Timestamp, doc};

/// Processor time that a process has used.
pub(crate) fn cpu(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Behind the name in brackets: state is field 3, utime 14, stime 15, in ticks of 10 ms.
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_whitespace()
        .collect();
    let ticks = |n: usize| fields.get(n - 3).and_then(|f| f.parse::<u64>().ok());
    Duration::from_millis((ticks(14).unwrap_or(0) + ticks(15).unwrap_or(0)) * 10)
}

/// Resident memory of a process in MB: now, and at its highest.
pub(crate) fn memory(pid: u32) -> (f64, f64) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kilobytes = |name: &str| {
        status
            .lines()
            .find_map(|l| {
                l.strip_prefix(name)?
                    .split_whitespace()
                    .next()?
                    .parse()
                    .ok()
            })
            .unwrap_or(0.0)
    };
    (kilobytes("VmRSS:") / 1024.0, kilobytes("VmHWM:") / 1024.0)
}

/// Resident memory of a process by kind, in words.
pub(crate) fn memory_kinds(pid: u32) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kinds: Vec<String> = status
        .lines()
        .filter(|l| l.starts_with("RssAnon:") || l.starts_with("RssFile:"))
        .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    kinds.join(", ")
}

/// The time of the last entry in a server's oplog.
pub(crate) async fn oplog_end(db: &Database) -> Timestamp {
    let oplog = db.client().database("local");
    let last = oplog
        .collection::<Document>("oplog.rs")
        .find_one(doc! {})
        .sort(doc! {"$natural": -1})
        .await
        .expect("the oplog can be read")
        .expect("it is never empty");
    last.get_timestamp("ts").expect("every entry has one")
}

/// Entries of a server's oplog after `since`, the server's own no-ops left out.
pub(crate) async fn writes_since(db: &Database, since: Timestamp) -> u64 {
    let oplog = db.client().database("local");
    oplog
        .collection::<Document>("oplog.rs")
        .count_documents(doc! {"ts": {"$gt": since}, "op": {"$ne": "n"}, "ns": {"$not": {"$regex": "^config\\."}}})
        .await
        .expect("the oplog can be read")
}

/// How much the daemon shall log, as a TOML value: `info`, or what `SANGAM_BENCH_LOG` says.
pub(crate) fn log_level() -> String {
    format!(
        "{:?}",
        std::env::var("SANGAM_BENCH_LOG").unwrap_or("info".into())
    )
}
