//! Telling people what they must know, by webhook and by a command, and a heartbeat to whoever
//! watches over us from outside.
//!
//! What to tell is decided by [`Told::look`], which does no I/O: each topic is told once while it
//! lasts and never more often than `notify.min_interval`. What was told and what still waits to be
//! delivered is in the store, so that a restart repeats nothing and an outage loses nothing.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::time::timeout;

use crate::config::NotifyConfig;
use crate::failure::{Class, Failure};
use crate::handle::Handle;
use crate::link::State;
use crate::outgoing;
use crate::settle::store_failed;
use crate::shared::{Shared, lock};
use crate::store::{self, StoreError};
use crate::vitals;

/// How often is looked.
const EVERY: Duration = Duration::from_secs(2);
/// Time for the command.
const PATIENCE: Duration = Duration::from_secs(30);
/// First and longest wait before something is delivered again.
const AGAIN: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
/// Most events that wait for their delivery; the oldest go first.
const MOST: usize = 50;
/// Share of its limit from which the queue is near it, and below which it no longer is.
const NEAR: (f64, f64) = (0.8, 0.7);
/// How long capture may stand still untold: a server that restarts is no news.
const STUCK_FOR: Duration = Duration::from_secs(300);

/// Under this name what was told is kept.
const NAME: &str = "told";

/// What a person must know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// The same if it is delivered twice, as after a crash between delivery and its record.
    #[serde(default)]
    pub id: String,
    /// `conflicts`, `offline`, `online`, `queue`, `degraded`, `halted`, `capture` or `verify`.
    pub event: String,
    /// `info`, `warning` or `critical`.
    pub severity: String,
    /// A sentence.
    pub message: String,
    /// When.
    pub time: DateTime<Utc>,
    /// Which installation.
    pub site: String,
    /// Its databases.
    pub databases: Vec<String>,
    /// Figures; never content of documents.
    pub details: Value,
}

/// What is looked at.
#[derive(Clone, Debug, Default)]
pub struct Outlook {
    /// When, ms since 1970.
    pub at: i64,
    /// Conflicts that were opened after `Told::newest`.
    pub new_conflicts: u64,
    /// The newest open conflict.
    pub newest: Option<String>,
    /// All open conflicts.
    pub open_conflicts: u64,
    /// Since when the remote is away, ms since 1970, and why.
    pub offline: Option<(i64, String)>,
    /// Changes that wait.
    pub waiting: u64,
    /// Share of the queue's limit.
    pub queue_share: f64,
    /// Why the queue is at its limit.
    pub degraded: Option<String>,
    /// Why collections are halted.
    pub halted: Vec<String>,
    /// Whether changes are being captured.
    pub capturing: bool,
    /// When a verify ended, ms since 1970, and how many documents differed.
    pub verified: Option<(i64, u64)>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Topic {
    /// It lasts, and was told.
    told: bool,
    /// When it was last told, ms since 1970.
    last: i64,
    /// Since when it lasts, ms since 1970.
    since: Option<i64>,
}

/// What was told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Told {
    topics: BTreeMap<String, Topic>,
    /// The newest conflict that was told.
    newest: Option<String>,
    /// The end of the last verify that was looked at.
    verified: i64,
    /// Waits for the webhook.
    webhook: Vec<Event>,
    /// Waits for the command.
    command: Vec<Event>,
}

/// A topic that begins to last: its event's name, severity, sentence, figures.
type News = (&'static str, &'static str, String, Value);

impl Told {
    /// What is to be told now.
    pub fn look(&mut self, now: &Outlook, config: &NotifyConfig) -> Vec<News> {
        let mut news = Vec::new();
        let gap = millis(config.min_interval);
        let here = |lasts: bool| lasts.then_some(now.at);
        if self.due("conflicts", here(now.new_conflicts > 0), now.at, 0, gap) {
            self.newest.clone_from(&now.newest);
            // The next one is news again, though the older ones may still be open.
            self.topics.entry("conflicts".into()).or_default().told = false;
            news.push((
                "conflicts",
                "warning",
                format!(
                    "{} found that need a decision; {} open in all",
                    crate::words::count(now.new_conflicts, "new conflict"),
                    now.open_conflicts
                ),
                json!({"new": now.new_conflicts, "open": now.open_conflicts}),
            ));
        }
        let (since, why) = now.offline.clone().unzip();
        let was = self.topics.get("offline").is_some_and(|t| t.told);
        if self.due("offline", since, now.at, millis(config.offline_after), gap) {
            let since = self.topics.get("offline").and_then(|t| t.since);
            let since = since.and_then(DateTime::<Utc>::from_timestamp_millis);
            news.push((
                "offline",
                "warning",
                format!(
                    "the cloud database can't be reached: {}; {} safely",
                    why.unwrap_or_default(),
                    match now.waiting {
                        1 => "1 change waits".to_owned(),
                        n => format!("{n} changes wait"),
                    }
                ),
                json!({"since": since, "waiting": now.waiting}),
            ));
        } else if was && now.offline.is_none() {
            news.push((
                "online",
                "info",
                "the cloud database is reached again; what waited is being sent".into(),
                json!({"waiting": now.waiting}),
            ));
        }
        let was_near = self.topics.get("queue").is_some_and(|t| t.told);
        let near = now.queue_share >= if was_near { NEAR.1 } else { NEAR.0 };
        if self.due("queue", here(near), now.at, 0, gap) {
            let percent = (now.queue_share * 100.0).round();
            news.push((
                "queue",
                "warning",
                format!("the queue is at {percent} % of its limit (queue.max_bytes)"),
                json!({"percent": percent, "waiting": now.waiting}),
            ));
        }
        if self.due("degraded", here(now.degraded.is_some()), now.at, 0, gap) {
            let why = now.degraded.clone().unwrap_or_default();
            news.push(("degraded", "critical", why, json!({})));
        }
        if self.due("halted", here(!now.halted.is_empty()), now.at, 0, gap) {
            let count = now.halted.len();
            news.push((
                "halted",
                "critical",
                now.halted.join("; "),
                json!({"collections": count}),
            ));
        }
        if self.due(
            "capture",
            here(!now.capturing),
            now.at,
            millis(STUCK_FOR),
            gap,
        ) {
            news.push((
                "capture",
                "critical",
                "changes of the local database are not being noted: is MongoDB running?".into(),
                json!({}),
            ));
        }
        if let Some((at, differences)) = now.verified
            && at > self.verified
        {
            self.verified = at;
            if differences > 0 {
                news.push((
                    "verify",
                    "critical",
                    format!(
                        "the last check found {} that differ",
                        crate::words::count(differences, "document")
                    ),
                    json!({"differences": differences}),
                ));
            }
        }
        news
    }

    /// Whether a topic that lasts (since when, as far as this run knows) is to be told now: after
    /// `patience` (ms), `gap` after the last time. What lasts over a restart goes on where it was.
    fn due(&mut self, name: &str, lasts: Option<i64>, now: i64, patience: i64, gap: i64) -> bool {
        let topic = self.topics.entry(name.into()).or_default();
        let Some(began) = lasts else {
            (topic.told, topic.since) = (false, None);
            return false;
        };
        let since = *topic.since.get_or_insert(began);
        let tell = !topic.told
            && now - since >= patience
            && (topic.last == 0 || now - topic.last >= gap || now < topic.last);
        if tell {
            (topic.told, topic.last) = (true, now);
        }
        tell
    }
}

fn millis(d: Duration) -> i64 {
    i64::try_from(d.as_millis()).unwrap_or(i64::MAX)
}

fn load(c: &Connection) -> rusqlite::Result<Told> {
    let text = store::get_meta::<String>(c, NAME)?;
    Ok(text
        .and_then(|text| serde_json::from_str(&text).ok())
        .unwrap_or_default())
}

/// Runs until the daemon ends.
pub async fn run(handle: Handle) -> Result<(), Failure> {
    let shared = handle.shared().clone();
    let mut told = shared.store.call(load).await.map_err(store_failed)?;
    let mut couriers = [Courier::default(), Courier::default()];
    let mut heart = Heart::default();
    loop {
        let config = shared.settings().config.notify.clone();
        // Of several daemons, the one that works tells.
        let mute = config.webhook.is_none() && config.command.is_empty();
        if !mute && !shared.stands_by() {
            match round(&handle, &config, &mut told, &mut couriers).await {
                Ok(()) => {}
                Err(error) => {
                    let failure = store_failed(error);
                    if failure.class == Class::Fatal {
                        return Err(failure);
                    }
                }
            }
        }
        heart.beat(&handle, &config);
        tokio::select! {
            () = shared.cancel.cancelled() => return Ok(()),
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

async fn round(
    handle: &Handle,
    config: &NotifyConfig,
    told: &mut Told,
    couriers: &mut [Courier; 2],
) -> Result<(), StoreError> {
    let shared = handle.shared();
    let before = told.clone();
    let now = outlook(handle, told.newest.clone()).await?;
    let settings = shared.settings();
    for (event, severity, message, details) in told.look(&now, config) {
        tracing::info!(event, severity, "telling: {message}");
        let event = Event {
            id: bson::oid::ObjectId::new().to_hex(),
            event: event.into(),
            severity: severity.into(),
            message,
            time: Utc::now(),
            site: settings.config.site.clone(),
            databases: settings.config.databases.clone(),
            details,
        };
        for (wanted, waiting) in [
            (config.webhook.is_some(), &mut told.webhook),
            (!config.command.is_empty(), &mut told.command),
        ] {
            if wanted {
                // An older one of the same kind that nobody got is out of date.
                waiting.retain(|e| e.event != event.event);
                waiting.push(event.clone());
                waiting.drain(..waiting.len().saturating_sub(MOST));
            }
        }
    }
    let [web, command] = couriers;
    web.deliver(&mut told.webhook, |event| {
        let url = config.webhook.clone();
        async move {
            match url {
                Some(url) => outgoing::send(&url, Some(event))
                    .await
                    .map_err(|e| format!("notify.webhook {e}")),
                None => Ok(()),
            }
        }
    });
    command.deliver(&mut told.command, |event| {
        run_command(config.command.clone(), event)
    });
    if *told != before {
        let text = serde_json::to_string(told).unwrap_or_default();
        shared.store.set_meta(NAME, text).await?;
    }
    Ok(())
}

async fn outlook(handle: &Handle, newest_told: Option<String>) -> Result<Outlook, StoreError> {
    let shared = handle.shared();
    let vitals = vitals::take(shared).await?;
    let (new_conflicts, newest) = shared
        .store
        .call(move |c| {
            let after = newest_told.and_then(|hex| bson::oid::ObjectId::parse_str(hex).ok());
            let after = after.map_or([0; 12], |id| id.bytes());
            c.prepare_cached(
                "SELECT count(DISTINCT conflict), max(conflict) FROM open_conflicts WHERE conflict > ?",
            )?
            .query_row([after], |r| Ok((r.get(0)?, r.get::<_, Option<[u8; 12]>>(1)?)))
        })
        .await?;
    let link = shared.link.snapshot();
    let away = matches!(link.state, State::Offline { .. } | State::Interrupted);
    let why = link.reason.map_or("no answer", |r| r.message());
    let notices = lock(&shared.notices).clone();
    let halted = notices
        .iter()
        .filter(|(topic, _)| topic.starts_with("halted:"));
    Ok(Outlook {
        at: vitals.at,
        new_conflicts,
        newest: newest.map(|id| bson::oid::ObjectId::from_bytes(id).to_hex()),
        open_conflicts: vitals.conflicts.values().sum(),
        offline: away.then(|| (link.since.timestamp_millis(), why.to_owned())),
        waiting: vitals.outbox.all + vitals.inbox.all,
        queue_share: vitals.queue_share(),
        degraded: notices.get("disk").cloned(),
        halted: halted.map(|(_, why)| why.clone()).collect(),
        capturing: handle.is_capturing(),
        verified: vitals.last_verify,
    })
}

/// Delivers one event at a time, in order, and waits longer after each failure.
#[derive(Default)]
struct Courier {
    under_way: Option<tokio::task::JoinHandle<Result<(), String>>>,
    next: Option<tokio::time::Instant>,
    wait: Duration,
}

impl Courier {
    fn deliver<F>(&mut self, waiting: &mut Vec<Event>, send: impl FnOnce(Vec<u8>) -> F)
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        if let Some(task) = &self.under_way {
            if !task.is_finished() {
                return;
            }
            let done = self.under_way.take().map(futures::FutureExt::now_or_never);
            match done.flatten() {
                Some(Ok(Ok(()))) => {
                    if !waiting.is_empty() {
                        waiting.remove(0);
                    }
                    self.wait = Duration::ZERO;
                }
                Some(Ok(Err(why))) => {
                    tracing::warn!("a notification waits: {why}");
                    self.wait = (self.wait * 2).clamp(AGAIN.0, AGAIN.1);
                    self.next = Some(tokio::time::Instant::now() + self.wait);
                }
                _ => {}
            }
        }
        let is_due = self.next.is_none_or(|at| at <= tokio::time::Instant::now());
        if let Some(event) = waiting.first()
            && is_due
        {
            let body = serde_json::to_vec(event).unwrap_or_default();
            self.under_way = Some(tokio::spawn(send(body)));
        }
    }
}

/// Runs the command without a shell, the event as JSON on its standard input.
async fn run_command(words: Vec<String>, event: Vec<u8>) -> Result<(), String> {
    let Some((program, arguments)) = words.split_first() else {
        return Ok(());
    };
    let work = async {
        let mut child = tokio::process::Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(mut input) = child.stdin.take() {
            // A command that does not read its input is content without.
            let _ = input.write_all(&event).await;
        }
        child.wait().await
    };
    match timeout(PATIENCE, work).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("notify.command ended with {status}")),
        Ok(Err(error)) => Err(format!("notify.command can't be run: {error}")),
        Err(_) => Err("notify.command did not end in time".into()),
    }
}

/// The heartbeat: asked for only while all is well, so that whoever waits for it notices its absence.
#[derive(Default)]
struct Heart {
    next: Option<tokio::time::Instant>,
}

impl Heart {
    fn beat(&mut self, handle: &Handle, config: &NotifyConfig) {
        let now = tokio::time::Instant::now();
        let Some(url) = config.heartbeat.clone() else {
            return;
        };
        if !is_healthy(handle.shared(), handle) || self.next.is_some_and(|at| at > now) {
            return;
        }
        self.next = Some(now + config.heartbeat_interval);
        tokio::spawn(async move {
            if let Err(error) = outgoing::send(&url, None).await {
                tracing::debug!("notify.heartbeat {error}");
            }
        });
    }
}

fn is_healthy(shared: &Arc<Shared>, handle: &Handle) -> bool {
    handle.is_alive()
        && handle.is_capturing()
        && !shared.degraded.load(std::sync::atomic::Ordering::Relaxed)
}

#[cfg(test)]
#[path = "tell_tests.rs"]
mod tests;
