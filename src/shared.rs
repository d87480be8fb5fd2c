//! What all tasks of one daemon share. No globals: several daemons run in one test process.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Instant;

use bson::Timestamp;
use chrono::Utc;
use globset::{Glob, GlobSet, GlobSetBuilder};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::budget::Budget;
use crate::config::{Config, Policy};
use crate::decide::Side;
use crate::echo::Echoes;
use crate::failpoint::Failpoints;
use crate::failure::{Failure, Reason};
use crate::guard::Stamp;
use crate::halt::Halted;
use crate::key::{Key, KeyMap, KeySet};
use crate::lease::{self, Lease};
use crate::link::Link;
use crate::loss::Losses;
use crate::metrics::Metrics;
use crate::order::{Class, Order};
use crate::progress::Meter;
use crate::receipt::{self, Receipts};
use crate::runs::Runs;
use crate::side::{AMBIGUOUS_FOR, Endpoint};
use crate::store::Store;
use crate::store::intents::Intent;
use crate::touched::Touched;
use crate::watermark::Watermark;

/// Our own collections; never synced.
pub const OWN_COLLECTIONS: [&str; 5] = [
    "conflict_logs",
    "sync_logs",
    "sync_config",
    lease::COLLECTION,
    receipt::COLLECTION,
];

/// How far a stream has been read.
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamState {
    /// Whether it is open.
    pub open: bool,
    /// Everything up to this time is in the queue.
    pub seen: Option<Timestamp>,
}

/// Context of all tasks.
pub struct Shared {
    config: RwLock<Arc<Settings>>,
    /// The state store.
    pub store: Store,
    /// The local side.
    pub local: Arc<Endpoint>,
    remote: RwLock<Option<Arc<Endpoint>>>,
    /// The way to the remote.
    pub link: Link,
    /// What the link may carry now.
    pub budget: Arc<Budget>,
    /// Wakes the worker.
    pub wake: Notify,
    /// Wakes the reconciler.
    pub reconcile: Notify,
    /// Wakes the stamper.
    pub stamp: Notify,
    /// Keys that a batch is working on: never two writes for one document.
    pub busy: Mutex<KeySet>,
    /// Insert events of our own that are still to come.
    pub echoes: Echoes,
    /// Where transactions leave their receipts.
    pub receipts: Receipts,
    /// Tells comparisons which documents were worked on while they looked.
    pub touched: Touched,
    /// Bytes of an average document by namespace, as last read.
    pub sizes: Mutex<HashMap<u32, usize>>,
    /// Namespaces whose first comparison is not over: nothing is known of them but what they hold.
    pub first_sync: Mutex<HashSet<u32>>,
    /// Keys whose last write may still land (R4).
    late: Mutex<KeyMap<Instant>>,
    /// Batches at work.
    pub in_flight: AtomicUsize,
    /// State of the change streams by side and database.
    pub streams: Mutex<HashMap<(Side, String), StreamState>>,
    /// Woken when a stream has moved.
    pub stream_moved: Notify,
    /// Clock of a side minus ours in ms: local, remote.
    offsets: [AtomicI64; 2],
    /// The queue or the disk is at its limit (R22).
    pub degraded: AtomicBool,
    /// The remote offers no change stream.
    pub no_stream: AtomicBool,
    /// Whether `pause` is in force.
    pub paused: AtomicBool,
    /// Counts of the run at work.
    pub runs: Runs,
    /// First sync or reconcile at work.
    pub progress: Mutex<Option<Meter>>,
    /// A verify at work, how far it is.
    pub verifying: Mutex<Option<Meter>>,
    /// Base is being rewritten: nothing may be decided.
    pub adopting: AtomicBool,
    /// Whether a verify is at work.
    pub verifying_now: AtomicBool,
    /// What a person must know, by topic.
    pub notices: Mutex<HashMap<String, String>>,
    /// Namespaces that are halted (R13).
    pub halted: Mutex<Halted>,
    /// Namespaces that are being compared: what they lost is not known yet.
    pub comparing: Mutex<HashSet<u32>>,
    /// What was deleted lately.
    pub losses: Mutex<Losses>,
    /// Namespaces found on a side, and those that can't be synced (views, time series).
    pub left_out: Mutex<HashSet<(String, String)>>,
    /// Rulings whose outcome is not known yet; their documents stay in `busy` meanwhile.
    pub rulings: Mutex<Vec<[u8; 12]>>,
    /// Held while records are written to the local database: they must arrive in order.
    pub flushing: tokio::sync::Mutex<()>,
    /// What is known of indexes and options.
    pub schema: crate::schema::State,
    /// How far each side is, and how far its changes were read.
    pub watermarks: Mutex<[Watermark; 2]>,
    /// When documents of a collection were last moved (ms since 1970), since the last sample.
    pub activity: Mutex<HashMap<String, i64>>,
    /// For Prometheus.
    pub metrics: Arc<Metrics>,
    lease: OnceLock<Arc<Lease>>,
    /// Test-only crash points and mutations.
    pub failpoints: Failpoints,
    /// Ends everything.
    pub cancel: CancellationToken,
    started: Instant,
}

/// The configuration with what is derived from it.
pub struct Settings {
    /// As loaded.
    pub config: Config,
    /// Names of the sync fields; none without stamping.
    pub sync_fields: Vec<String>,
    /// Collections whose events the servers are asked to leave out: ours, and those that are excluded
    /// by their plain name. Globs are matched here.
    pub unwatched: Vec<String>,
    /// Which collections go first, and which last.
    pub order: Order,
    include: GlobSet,
    exclude: GlobSet,
}

impl Settings {
    /// Prepares a configuration for use.
    pub fn new(config: Config) -> Self {
        let sync_fields = if config.sync.stamp_documents {
            vec![
                config.fields.synced_at.clone(),
                config.fields.origin.clone(),
                config.fields.sync_status.clone(),
            ]
        } else {
            vec![]
        };
        let set = |globs: &[String]| {
            let mut builder = GlobSetBuilder::new();
            for glob in globs.iter().filter_map(|g| Glob::new(g).ok()) {
                builder.add(glob);
            }
            builder.build().unwrap_or_default()
        };
        let (include, exclude) = (set(&config.sync.collections), set(&config.sync.exclude));
        let plain = |g: &&String| !g.contains(['*', '?', '[', '{', '.', '\\']);
        let mut unwatched: Vec<_> = OWN_COLLECTIONS.iter().map(ToString::to_string).collect();
        unwatched.extend(config.sync.exclude.iter().filter(plain).cloned());
        let order = Order::new(&config.link.first, &config.link.last);
        Self {
            config,
            sync_fields,
            unwatched,
            order,
            include,
            exclude,
        }
    }

    /// Whether a collection is synced by name.
    pub fn is_synced(&self, db: &str, coll: &str) -> bool {
        let full = || format!("{db}.{coll}");
        self.config.databases.iter().any(|d| d == db)
            && !OWN_COLLECTIONS.contains(&coll)
            && !coll.starts_with("system.")
            && (self.include.is_match(coll) || self.include.is_match(full()))
            && !(self.exclude.is_match(coll) || self.exclude.is_match(full()))
    }

    /// The policy of a collection.
    pub fn policy(&self, coll: &str) -> Policy {
        self.config
            .sync
            .per_collection
            .get(coll)
            .copied()
            .unwrap_or(self.config.sync.conflict_resolution_strategy)
    }

    /// How a collection is called in records and answers.
    pub fn display(&self, db: &str, coll: &str) -> String {
        if self.config.databases.len() > 1 {
            format!("{db}.{coll}")
        } else {
            coll.to_owned()
        }
    }

    /// Database and collection of a name as [`Settings::display`] shows it.
    pub fn names_of(&self, shown: &str) -> (String, String) {
        let databases = &self.config.databases;
        let named = databases.iter().find_map(|db| {
            let coll = shown.strip_prefix(db.as_str())?.strip_prefix('.')?;
            Some((db.clone(), coll.to_owned()))
        });
        match named {
            Some(names) if databases.len() > 1 => names,
            _ => (databases[0].clone(), shown.to_owned()),
        }
    }

    /// Whether somebody else may have brought both sides to where they are: with high availability
    /// on, the one who worked before.
    pub fn base_may_lag(&self) -> bool {
        self.config.ha.enabled
    }

    /// The database that holds our records.
    pub fn records_db(&self) -> &str {
        &self.config.databases[0]
    }
}

/// A lock whose holder panicked still guards sound data here: every value is replaced whole.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Context over an opened store and a local side.
    pub fn new(
        config: Config,
        store: Store,
        local: Arc<Endpoint>,
        cancel: CancellationToken,
    ) -> Self {
        let configured = config.remote_uri.is_some();
        let metrics = Arc::new(Metrics::default());
        let budget = Arc::new(Budget::new(config.link.clone()));
        Self {
            config: RwLock::new(Arc::new(Settings::new(config))),
            store,
            local,
            remote: RwLock::new(None),
            link: Link::new(configured, metrics.clone()),
            budget,
            wake: Notify::new(),
            reconcile: Notify::new(),
            stamp: Notify::new(),
            busy: Mutex::default(),
            echoes: Echoes::default(),
            receipts: Receipts::default(),
            touched: Touched::default(),
            first_sync: Mutex::default(),
            sizes: Mutex::default(),
            late: Mutex::default(),
            in_flight: AtomicUsize::new(0),
            streams: Mutex::default(),
            stream_moved: Notify::new(),
            offsets: [AtomicI64::new(0), AtomicI64::new(0)],
            degraded: AtomicBool::new(false),
            no_stream: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            runs: Runs::default(),
            progress: Mutex::default(),
            verifying: Mutex::default(),
            adopting: AtomicBool::new(false),
            verifying_now: AtomicBool::new(false),
            notices: Mutex::default(),
            halted: Mutex::default(),
            comparing: Mutex::default(),
            losses: Mutex::default(),
            left_out: Mutex::default(),
            rulings: Mutex::default(),
            flushing: tokio::sync::Mutex::default(),
            schema: Default::default(),
            watermarks: Mutex::default(),
            activity: Mutex::default(),
            metrics,
            lease: OnceLock::new(),
            failpoints: Failpoints::from_env(),
            cancel,
            started: Instant::now(),
        }
    }

    /// The configuration in force.
    pub fn settings(&self) -> Arc<Settings> {
        self.config
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The known collections by rank, best first; halted ones are left out.
    pub fn classes(&self) -> Vec<Class> {
        let settings = self.settings();
        // Names are looked up only where some go before others.
        if settings.order.is_level() {
            return settings.order.classes([]);
        }
        let mut known = self.store.namespaces();
        let halted = lock(&self.halted);
        known.retain(|(n, _)| !halted.contains(*n));
        settings.order.classes(known)
    }

    /// Takes a new configuration.
    pub fn set_config(&self, config: Config) {
        self.budget.set(config.link.clone());
        let before = self.settings();
        let settings = Arc::new(Settings::new(config));
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = settings.clone();
        if before.unwatched != settings.unwatched {
            // They are opened anew, see [`Shared::open_stream`].
            for stream in lock(&self.streams).values_mut() {
                stream.open = false;
            }
        }
    }

    /// The remote side, once its URI could be resolved.
    pub fn remote(&self) -> Option<Arc<Endpoint>> {
        self.remote
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Keeps the remote side.
    pub fn set_remote(&self, endpoint: Arc<Endpoint>) {
        *self.remote.write().unwrap_or_else(PoisonError::into_inner) = Some(endpoint);
    }

    /// A side that can be asked, or why not.
    pub fn endpoint(&self, side: Side) -> Result<Arc<Endpoint>, Failure> {
        match side {
            Side::Local => Ok(self.local.clone()),
            Side::Remote => self
                .remote()
                .ok_or_else(|| Failure::offline(Reason::Offline)),
        }
    }

    /// Feeds the link with what an operation on a side came to.
    pub fn note<T>(&self, side: Side, outcome: &Result<T, Failure>) {
        match outcome {
            Ok(_) if side == Side::Remote => self.link.heard(),
            Err(failure) if side == Side::Remote => self.link.failed(failure),
            _ => {}
        }
    }

    /// Keeps a measured clock offset (ms).
    pub fn set_offset(&self, side: Side, ms: i64) {
        self.offsets[side as usize].store(ms, Ordering::Relaxed);
    }

    /// Clock of the remote minus clock of the local server, ms.
    pub fn skew_ms(&self) -> i64 {
        self.offset(Side::Remote) - self.offset(Side::Local)
    }

    /// Clock of a side minus ours, ms.
    pub fn offset(&self, side: Side) -> i64 {
        self.offsets[side as usize].load(Ordering::Relaxed)
    }

    /// The stamp for content written to `to`; `None` when documents are left alone.
    pub fn stamp_for<'a>(&self, settings: &'a Settings, to: Side) -> Option<Stamp<'a>> {
        settings.config.sync.stamp_documents.then(|| Stamp {
            fields: &settings.config.fields,
            origin: to.other().name(),
            server_now: Utc::now().timestamp_millis() + self.offset(to),
        })
    }

    /// Notes that the last write of a key may still land.
    pub fn set_late(&self, key: &Key) {
        lock(&self.late).insert(key.clone(), Instant::now());
    }

    /// Until when a write of that key may still land: one of ours now, or one of the run before.
    /// A link that was away may have held it back, so the time counts from its return (R4).
    pub fn late_until(&self, key: &Key, intent: &Intent) -> Option<Instant> {
        let now = Instant::now();
        let sent = if intent.epoch == self.store.epoch() {
            let mut late = lock(&self.late);
            if late.len() > 1000 {
                late.retain(|_, t| now < *t + AMBIGUOUS_FOR);
            }
            *late.get(key)?
        } else {
            self.started
        };
        let back = match intent.side {
            Side::Remote => self.link.online_since(),
            Side::Local => None,
        };
        let until = back.map_or(sent, |back| back.max(sent)) + AMBIGUOUS_FOR;
        Some(until).filter(|t| *t > now)
    }

    /// Tells a person something that lasts; `None` takes it back.
    pub fn notice(&self, topic: &str, text: Option<String>) {
        let mut notices = lock(&self.notices);
        match text {
            Some(text) => {
                if notices.get(topic) != Some(&text) {
                    tracing::warn!(topic, "{text}");
                }
                notices.insert(topic.to_owned(), text);
            }
            None => {
                notices.remove(topic);
            }
        }
    }

    /// Notes how far a stream is.
    pub fn stream_at(&self, side: Side, db: &str, seen: Option<Timestamp>) {
        self.set_stream(side, db, |state| state.seen = seen.or(state.seen));
    }

    /// Notes that a stream is closed.
    pub fn close_stream(&self, side: Side, db: &str) {
        self.set_stream(side, db, |state| state.open = false);
    }

    /// Notes that a stream is open which was asked for with these settings; unless they are others
    /// since, of which it would leave something out.
    pub fn open_stream(&self, side: Side, db: &str, settings: &Settings) {
        // Under the same lock as `set_config` closes it, so that one of the two sees the other.
        self.set_stream(side, db, |state| state.open = !self.is_stale(settings));
    }

    /// Whether a stream that was asked for with these settings leaves out what is wanted by now.
    pub fn is_stale(&self, settings: &Settings) -> bool {
        self.settings().unwatched != settings.unwatched
    }

    fn set_stream(&self, side: Side, db: &str, change: impl FnOnce(&mut StreamState)) {
        change(
            lock(&self.streams)
                .entry((side, db.to_owned()))
                .or_default(),
        );
        self.stream_moved.notify_waiters();
    }

    /// Whether the streams of a side are all open.
    pub fn streams_open(&self, side: Side) -> bool {
        let streams = lock(&self.streams);
        self.settings()
            .config
            .databases
            .iter()
            .all(|db| streams.get(&(side, db.clone())).is_some_and(|s| s.open))
    }

    /// Whether the remote's change stream is followed, by configuration and by what the remote offers.
    pub fn follows(&self) -> bool {
        self.settings().config.pull.follow && !self.no_stream.load(Ordering::Relaxed)
    }

    /// Whether the hours are quiet, so that nothing moves unless a person asked for it.
    pub fn is_quiet(&self) -> bool {
        self.budget.closed_until().is_some() && !self.runs.is_manual()
    }

    /// With high availability on, the lease of this pair.
    pub fn lease(&self) -> Option<&Arc<Lease>> {
        self.lease.get()
    }

    /// Turns high availability on, before any task runs.
    pub fn set_lease(&self, lease: Lease) {
        let lease = self.lease.get_or_init(|| Arc::new(lease));
        self.local.lease.get_or_init(|| lease.clone());
    }

    /// Whether another daemon works, or nobody does: decisions that need a write wait.
    pub fn withholds(&self) -> bool {
        self.lease().is_some_and(|lease| !lease.works())
    }

    /// The same as far as the local database alone is concerned: records, stamps, orders.
    pub fn stands_by(&self) -> bool {
        self.lease()
            .is_some_and(|lease| lease.may_write(Side::Local).is_err())
    }

    /// Whether documents may be moved now.
    pub fn may_work(&self) -> bool {
        self.link.is_online() && self.remote().is_some() && !self.paused.load(Ordering::Relaxed)
    }
}

/// The cluster time inside a resume token: seconds and increment stand behind the first byte.
pub fn token_time(token: &bson::RawDocument) -> Option<Timestamp> {
    let data = token.get_str("_data").ok()?;
    if !data.starts_with("82") {
        return None;
    }
    Some(Timestamp {
        time: u32::from_str_radix(data.get(2..10)?, 16).ok()?,
        increment: u32::from_str_radix(data.get(10..18)?, 16).ok()?,
    })
}
