//! Metrics for Prometheus. Counters and histograms are fed where the work is done; gauges are set
//! when they are asked for, from the [`Vitals`] of that moment. `docs/metrics.md` is made from here.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::command::Status;
use crate::decide::{Kind, Side};
use crate::shared::lock;
use crate::vitals::Vitals;

/// The text's media type.
pub const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = Vec<(&'static str, &'static str)>;
type Figure = Family<Labels, Gauge<f64, AtomicU64>>;
type Count = Family<Labels, Counter>;
type Spread = Family<Labels, Histogram, fn() -> Histogram>;

/// Gauges: name and meaning. `direction` is `local_to_remote` or `remote_to_local` everywhere.
const FIGURES: &[(&str, &str)] = &[
    ("sangam_build_info", "1; the label tells the version"),
    (
        "sangam_capturing",
        "1 while every change of the local database is being noted, 0 when that is stuck",
    ),
    (
        "sangam_following",
        "1 while the remote tells of its changes at once",
    ),
    ("sangam_paused", "1 while syncing is paused"),
    (
        "sangam_standby",
        "1 while another daemon holds the lease, or nobody does",
    ),
    (
        "sangam_queue_limit_reached",
        "1 while the queue or the disk is at its limit and changes are only noted as a whole",
    ),
    (
        "sangam_link_state",
        "1 for the state the link to the remote is in",
    ),
    (
        "sangam_link_since_timestamp_seconds",
        "Since when the link is in that state",
    ),
    (
        "sangam_queue_documents",
        "Documents in the outbox and the inbox, by what they wait for",
    ),
    (
        "sangam_queue_limit_ratio",
        "Share of queue.max_bytes that the queues take",
    ),
    (
        "sangam_oldest_unsynced_write_seconds",
        "Age of the oldest write that is not on the other side yet; 0 when there is none",
    ),
    (
        "sangam_lag_seconds",
        "How far the applied watermark is behind the source's; while the source can't be asked, behind now",
    ),
    (
        "sangam_source_watermark_timestamp_seconds",
        "Time of the newest operation that a database was seen to have",
    ),
    (
        "sangam_applied_watermark_timestamp_seconds",
        "Up to when the changes of a database have been dealt with",
    ),
    (
        "sangam_conflicts_open",
        "Conflicts that wait for a person, by kind",
    ),
    (
        "sangam_collections_halted",
        "Collections that are held until a person decides",
    ),
    (
        "sangam_notices",
        "Things a person must know of; status spells them out",
    ),
    (
        "sangam_clock_skew_seconds",
        "Clock of the remote minus clock of the local server",
    ),
    ("sangam_state_bytes", "Size of the state file with its log"),
    (
        "sangam_disk_free_bytes",
        "Free space on the disk of the state directory",
    ),
    (
        "sangam_disk_headroom_bytes",
        "Free space above queue.min_free_disk",
    ),
    (
        "sangam_last_sync_timestamp_seconds",
        "End of the last sync run",
    ),
    (
        "sangam_last_compared_timestamp_seconds",
        "End of the last comparison of both databases as a whole; 0 when there was none",
    ),
    (
        "sangam_last_verified_timestamp_seconds",
        "When both databases were last proven equal; 0 when they never were",
    ),
    (
        "sangam_verify_differences",
        "Documents that differed at the last verify",
    ),
];

/// All metrics of one daemon.
pub struct Metrics {
    registry: Registry,
    figures: BTreeMap<&'static str, Figure>,
    documents: Count,
    bytes: Count,
    conflicts: Count,
    retries: Count,
    link_changes: Count,
    batch_documents: Spread,
    batch_seconds: Spread,
    delay: Spread,
    /// Documents and bytes since the last look, by direction; for the history.
    moved: Mutex<[Moved; 2]>,
}

/// What was moved in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Documents.
    pub documents: u64,
    /// Bytes of their bodies.
    pub bytes: u64,
}

/// What was tried again.
#[derive(Clone, Copy, Debug)]
pub enum Retried {
    /// A batch that failed for another reason than the link.
    Batch,
    /// A document that was refused.
    Document,
    /// A change stream that broke.
    Stream,
    /// A probe of the link.
    Probe,
}

impl Retried {
    const ALL: [Self; 4] = [Self::Batch, Self::Document, Self::Stream, Self::Probe];

    fn name(self) -> &'static str {
        match self {
            Self::Batch => "batch",
            Self::Document => "document",
            Self::Stream => "stream",
            Self::Probe => "probe",
        }
    }
}

/// The way a document takes that is written to a side.
pub fn direction(to: Side) -> &'static str {
    match to {
        Side::Remote => "local_to_remote",
        Side::Local => "remote_to_local",
    }
}

fn towards(to: Side) -> Labels {
    vec![("direction", direction(to))]
}

const KINDS: [Kind; 8] = [
    Kind::BothModified,
    Kind::InsertInsert,
    Kind::DeleteUpdate,
    Kind::UniqueField,
    Kind::Rejected,
    Kind::CollectionDropped,
    Kind::MassDelete,
    Kind::Adopted,
];

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let mut figures = BTreeMap::new();
        for (name, help) in FIGURES {
            let figure = Figure::default();
            registry.register(*name, *help, figure.clone());
            figures.insert(*name, figure);
        }
        let documents = Count::default();
        registry.register(
            "sangam_documents",
            "Documents written, by direction",
            documents.clone(),
        );
        let bytes = Count::default();
        registry.register(
            "sangam_document_bytes",
            "Bytes of those documents, before compression and before unchanged fields are left out",
            bytes.clone(),
        );
        let conflicts = Count::default();
        registry.register(
            "sangam_conflicts",
            "Conflicts found since the start, by kind",
            conflicts.clone(),
        );
        let retries = Count::default();
        registry.register(
            "sangam_retries",
            "What had to be tried again",
            retries.clone(),
        );
        let link_changes = Count::default();
        registry.register(
            "sangam_link_changes",
            "How often the link went into a state",
            link_changes.clone(),
        );
        let batch_documents =
            Spread::new_with_constructor(|| Histogram::new(exponential_buckets(1.0, 4.0, 8)));
        registry.register(
            "sangam_batch_documents",
            "Documents in a batch",
            batch_documents.clone(),
        );
        let seconds = || Histogram::new(exponential_buckets(0.005, 3.0, 10));
        let batch_seconds = Spread::new_with_constructor(seconds);
        registry.register(
            "sangam_batch_duration_seconds",
            "Time from the first look at a batch until all of it is settled",
            batch_seconds.clone(),
        );
        let delay =
            Spread::new_with_constructor(|| Histogram::new(exponential_buckets(0.05, 4.0, 12)));
        registry.register(
            "sangam_delay_seconds",
            "Time from when a change was noted until the other side had it",
            delay.clone(),
        );
        let metrics = Self {
            registry,
            figures,
            documents,
            bytes,
            conflicts,
            retries,
            link_changes,
            batch_documents,
            batch_seconds,
            delay,
            moved: Mutex::default(),
        };
        metrics.begin();
        metrics
    }
}

impl Metrics {
    /// Every series is there from the start, with 0: a rate needs a beginning.
    fn begin(&self) {
        for to in [Side::Remote, Side::Local] {
            drop(self.documents.get_or_create(&towards(to)));
            drop(self.bytes.get_or_create(&towards(to)));
            drop(self.delay.get_or_create(&towards(to)));
        }
        for kind in KINDS {
            drop(self.conflicts.get_or_create(&vec![("kind", kind.name())]));
        }
        for what in Retried::ALL {
            drop(self.retries.get_or_create(&vec![("of", what.name())]));
        }
        for state in crate::link::STATES {
            drop(self.link_changes.get_or_create(&vec![("state", state)]));
        }
        drop(self.batch_documents.get_or_create(&vec![]));
        drop(self.batch_seconds.get_or_create(&vec![]));
    }

    /// Documents of so many bytes in all were written to `to`, each so many ms after its change was noted.
    pub fn moved(&self, to: Side, bytes: usize, waited_ms: &[i64]) {
        let labels = towards(to);
        let documents = waited_ms.len() as u64;
        self.documents.get_or_create(&labels).inc_by(documents);
        self.bytes.get_or_create(&labels).inc_by(bytes as u64);
        let delay = self.delay.get_or_create(&labels);
        for waited in waited_ms {
            let waited = Duration::from_millis(u64::try_from(*waited).unwrap_or(0));
            delay.observe(waited.as_secs_f64());
        }
        let moved = &mut lock(&self.moved)[to as usize];
        moved.documents += documents;
        moved.bytes += bytes as u64;
    }

    /// A batch was worked through.
    pub fn batch(&self, documents: usize, took: Duration) {
        self.batch_documents
            .get_or_create(&vec![])
            .observe(documents as f64);
        self.batch_seconds
            .get_or_create(&vec![])
            .observe(took.as_secs_f64());
    }

    /// A conflict was put on record.
    pub fn conflict(&self, kind: Kind) {
        self.conflicts
            .get_or_create(&vec![("kind", kind.name())])
            .inc();
    }

    /// Something is tried again.
    pub fn retried(&self, what: Retried) {
        self.retries.get_or_create(&vec![("of", what.name())]).inc();
    }

    /// The link went into another state.
    pub fn link_changed(&self, state: &'static str) {
        self.link_changes
            .get_or_create(&vec![("state", state)])
            .inc();
    }

    /// What was moved since the last call: to the local side, to the remote.
    pub fn take_moved(&self) -> [Moved; 2] {
        std::mem::take(&mut lock(&self.moved))
    }

    fn set(&self, name: &'static str, labels: &[(&'static str, &'static str)], value: f64) {
        let figure = self.figures.get(name);
        debug_assert!(figure.is_some(), "{name} is not in FIGURES");
        if let Some(figure) = figure {
            figure.get_or_create(&labels.to_vec()).set(value);
        }
    }

    /// The text that Prometheus reads.
    pub fn render(&self, status: &Status, vitals: &Vitals) -> String {
        let flag = |on: bool| f64::from(u8::from(on));
        let seconds = |ms: Option<i64>| ms.map_or(0.0, |ms| ms as f64 / 1000.0);
        let instant =
            |t: Option<chrono::DateTime<chrono::Utc>>| seconds(t.map(|t| t.timestamp_millis()));
        self.set(
            "sangam_build_info",
            &[("version", env!("CARGO_PKG_VERSION"))],
            1.0,
        );
        self.set("sangam_capturing", &[], flag(status.is_capturing));
        self.set("sangam_following", &[], flag(status.is_following));
        self.set("sangam_paused", &[], flag(status.is_paused));
        let standby = status.ha.as_ref().is_some_and(|ha| ha.role != "holder");
        self.set("sangam_standby", &[], flag(standby));
        self.set("sangam_queue_limit_reached", &[], flag(vitals.degraded));
        for state in crate::link::STATES {
            let is_in = flag(status.link.state == state);
            self.set("sangam_link_state", &[("state", state)], is_in);
        }
        self.set(
            "sangam_link_since_timestamp_seconds",
            &[],
            instant(Some(status.link.since)),
        );
        for (queue, counts) in [("outbox", &vitals.outbox), ("inbox", &vitals.inbox)] {
            let held = counts.conflict + counts.failed;
            for (state, n) in [
                ("waiting", counts.all.saturating_sub(held)),
                ("conflict", counts.conflict),
                ("failed", counts.failed),
            ] {
                let labels = [("queue", queue), ("state", state)];
                self.set("sangam_queue_documents", &labels, n as f64);
            }
        }
        self.set("sangam_queue_limit_ratio", &[], vitals.queue_share());
        let oldest = vitals
            .oldest()
            .map_or(0.0, |at| (vitals.at - at).max(0) as f64 / 1000.0);
        self.set("sangam_oldest_unsynced_write_seconds", &[], oldest);
        for to in [Side::Remote, Side::Local] {
            let (way, mark) = (direction(to), &vitals.marks[to.other() as usize]);
            let labels = [("direction", way)];
            self.set("sangam_lag_seconds", &labels, mark.lag);
            let source = [("database", to.other().name())];
            self.set(
                "sangam_source_watermark_timestamp_seconds",
                &source,
                mark.source.unwrap_or(0.0),
            );
            self.set(
                "sangam_applied_watermark_timestamp_seconds",
                &source,
                mark.applied.unwrap_or(0.0),
            );
        }
        for kind in KINDS {
            let open = vitals.conflicts.get(kind.name()).copied().unwrap_or(0);
            let labels = [("kind", kind.name())];
            self.set("sangam_conflicts_open", &labels, open as f64);
        }
        self.set("sangam_collections_halted", &[], vitals.halted as f64);
        self.set("sangam_notices", &[], status.notices.len() as f64);
        self.set("sangam_clock_skew_seconds", &[], seconds(status.clock_skew));
        self.set("sangam_state_bytes", &[], vitals.state_bytes as f64);
        if let Some(free) = vitals.free_disk {
            self.set("sangam_disk_free_bytes", &[], free as f64);
            let headroom = free as f64 - vitals.disk_reserve as f64;
            self.set("sangam_disk_headroom_bytes", &[], headroom);
        }
        self.set(
            "sangam_last_sync_timestamp_seconds",
            &[],
            instant(status.last_sync_time),
        );
        self.set(
            "sangam_last_compared_timestamp_seconds",
            &[],
            seconds(vitals.compared),
        );
        self.set(
            "sangam_last_verified_timestamp_seconds",
            &[],
            seconds(vitals.verified),
        );
        self.set(
            "sangam_verify_differences",
            &[],
            vitals.last_verify.map_or(0, |(_, n)| n) as f64,
        );
        let mut text = String::new();
        // Writing to a string can't fail.
        let _ = encode(&mut text, &self.registry);
        // A series without labels is as a person would write it.
        text.replace("{} ", " ")
    }
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
