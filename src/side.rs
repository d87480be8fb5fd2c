//! One of the two databases: its client, commands with deadlines, reads by `_id`, its identity.

mod distance;
mod patience;
mod process;
mod recency;
mod rows;
mod sessions;

use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bson::{Document, RawDocumentBuf, Timestamp, doc};
use mongodb::Client;
use mongodb::event::EventHandler;
use mongodb::event::sdam::SdamEvent;
use mongodb::options::{ClientOptions, Compressor};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::Notify;

use crate::budget::Budget;
use crate::decide::Side;
use crate::failure::{Class, Failure, Reason};
use crate::key::{Id, Key, KeyMap, KeySet};
use crate::lease::{self, Lease};
use crate::raw::{Writer, index_name};
use crate::store::Store;

use distance::Distance;
use patience::Patience;
pub use patience::{LONG, PROMPT, READING};
use process::Processes;
pub use process::watch;
pub use rows::{Answer, Rows};
use sessions::Sessions;

/// The server ends an operation of ours after this; far above what a batch takes (R4).
pub const MAX_TIME: Duration = Duration::from_secs(5);

/// A write whose answer was lost may still land until this much time has passed (R4).
pub const AMBIGUOUS_FOR: Duration = Duration::from_secs(7);

/// Slowest link on which a batch still gets its answer before the deadline, in bytes per second.
const SLOWEST: u64 = 4 * 1024;

/// How long to wait for the answer to a command of that size: above [`MAX_TIME`], so that the
/// server has given up before we do.
pub fn deadline(bytes: usize) -> Duration {
    Duration::from_secs(12) + Duration::from_secs(bytes as u64 / SLOWEST)
}

/// A connected database server (a replica set).
pub struct Endpoint {
    /// Which one.
    pub side: Side,
    client: RwLock<Client>,
    /// To make another client.
    options: ClientOptions,
    /// The servers' processes, as heartbeats tell.
    processes: Arc<Processes>,
    /// As the answers to [`Endpoint::hello`] tell.
    distance: Distance,
    /// What the last failed heartbeat said: server selection itself only says "timeout".
    last_heartbeat: Arc<Mutex<Option<Reason>>>,
    sessions: Arc<Sessions>,
    /// Where open transactions are on record.
    pub journal: OnceLock<Store>,
    /// What may go over the link; without one, anything.
    pub budget: OnceLock<Arc<Budget>>,
    /// With high availability on: whether this daemon is the one that writes.
    pub lease: OnceLock<Arc<Lease>>,
    patience: Patience,
    /// The latest time that most members are known to have reached.
    told: Mutex<Option<Timestamp>>,
    /// Told when a heartbeat fails: sooner than any operation would notice.
    pub trouble: Arc<Notify>,
}

impl Endpoint {
    /// Parses the URI (an SRV name is looked up now) and makes a client; connects lazily.
    pub async fn connect(
        side: Side,
        uri: &SecretString,
        timeout: Duration,
    ) -> Result<Self, Failure> {
        Self::connect_as("sangam", side, uri, timeout).await
    }

    /// The same under another name, by which the server's operator tells programs apart.
    pub async fn connect_as(
        name: &str,
        side: Side,
        uri: &SecretString,
        timeout: Duration,
    ) -> Result<Self, Failure> {
        let mut options = ClientOptions::parse(uri.expose_secret())
            .await
            .map_err(|e| match e.kind.as_ref() {
                mongodb::error::ErrorKind::DnsResolve { .. } => {
                    Failure::offline(Reason::Dns).of(side)
                }
                mongodb::error::ErrorKind::InvalidTlsConfig { .. } => {
                    Failure::offline(Reason::Tls).of(side)
                }
                _ => Failure::fatal("the URI can't be used"),
            })?;
        options.app_name = Some(name.into());
        options.server_selection_timeout = Some(timeout);
        options
            .connect_timeout
            .get_or_insert(timeout.max(Duration::from_secs(2)));
        options.max_pool_size.get_or_insert(24);
        options.heartbeat_freq.get_or_insert(Duration::from_secs(5));
        if side == Side::Remote && options.compressors.is_none() {
            options.compressors = Some(vec![
                Compressor::Zstd { level: Some(3) },
                Compressor::Zlib { level: None },
            ]);
        }
        let last_heartbeat = Arc::new(Mutex::new(None));
        let seen = last_heartbeat.clone();
        let trouble = Arc::new(Notify::new());
        let alarm = trouble.clone();
        let processes = Arc::new(Processes::default());
        let met = processes.clone();
        options.sdam_event_handler = Some(EventHandler::callback(move |event| {
            let found = match event {
                SdamEvent::ServerHeartbeatFailed(e) => match Failure::from(&e.failure).class {
                    Class::Offline(reason) => Some(reason),
                    _ => Some(Reason::Offline),
                },
                SdamEvent::ServerHeartbeatSucceeded(e) => {
                    met.met(&e.server_address.to_string(), &e.reply);
                    None
                }
                _ => return,
            };
            if found.is_some() {
                alarm.notify_one();
            }
            *seen
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner) = found;
        }));
        let client = Client::with_options(options.clone()).map_err(Failure::from)?;
        Ok(Self {
            side,
            client: RwLock::new(client),
            options,
            processes,
            distance: Distance::default(),
            last_heartbeat,
            sessions: Arc::default(),
            journal: OnceLock::new(),
            patience: Patience::default(),
            told: Mutex::default(),
            budget: OnceLock::new(),
            lease: OnceLock::new(),
            trouble,
        })
    }

    /// The driver's client.
    pub fn client(&self) -> Client {
        let client = self.client.read();
        client.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A driver error, with the reason that the last heartbeat saw where the error has none.
    pub fn failure(&self, error: &mongodb::error::Error) -> Failure {
        let mut failure = Failure::from(error).of(self.side);
        if failure.class == Class::Offline(Reason::Timeout)
            && let Some(reason) = *self
                .last_heartbeat
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
        {
            failure.class = Class::Offline(reason);
        }
        failure
    }

    /// Runs a command, when the budget allows it. An unanswered one is given up after [`deadline`],
    /// its connection with it.
    pub async fn run(&self, db: &str, command: RawDocumentBuf) -> Result<Document, Failure> {
        if let Some(budget) = self.budget.get() {
            budget.pay(command.as_bytes().len()).await;
        }
        self.run_now(db, command).await
    }

    /// Every command of ours but those of transactions goes through here, so that no write can forget
    /// to ask whether this daemon may.
    async fn run_now(&self, db: &str, command: RawDocumentBuf) -> Result<Document, Failure> {
        let write = lease::is_write(&command);
        if write {
            self.is_known()?;
        }
        let lease = self.lease.get().filter(|_| write);
        let pass = lease.map(|lease| lease.begin(self.side)).transpose()?;
        let outcome = self.run_through(db, command).await;
        if let Ok(answer) = &outcome
            && write
        {
            self.told_by(answer);
        }
        let answered = outcome.as_ref().err().is_none_or(|f| f.answered);
        if let Some(pass) = pass.filter(|_| answered) {
            pass.answered();
        }
        outcome
    }

    /// Whether a write may begin, where it does not go through [`Endpoint::run`].
    pub fn may_write(&self) -> Result<(), Failure> {
        self.is_known()?;
        self.lease
            .get()
            .map_or(Ok(()), |lease| lease.may_write(self.side))
    }

    /// With high availability on, up to when a statement may begin, ms since 1970 by this server's
    /// clock: past that it must refuse itself.
    pub fn fence(&self) -> Option<i64> {
        self.lease.get().map(|lease| lease.deadline(self.side))
    }

    /// A small command of the lease itself, which opens the gate that others go through.
    pub(crate) async fn run_past(&self, db: &str, command: Document) -> Result<Document, Failure> {
        let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("command"))?;
        let answer = self.run_through(db, raw).await?;
        self.told_by(&answer);
        Ok(answer)
    }

    async fn run_through(&self, db: &str, command: RawDocumentBuf) -> Result<Document, Failure> {
        let wait = deadline(command.as_bytes().len());
        let db = self.client().database(db);
        let mut task = tokio::spawn(async move { db.run_raw_command(command).await });
        match tokio::time::timeout(wait, &mut task).await {
            Ok(Ok(outcome)) => outcome.map_err(|e| self.failure(&e)),
            Ok(Err(_)) => Err(Failure::fatal("a driver call was cancelled")),
            Err(_) => {
                task.abort();
                Err(Failure::timeout().of(self.side))
            }
        }
    }

    /// Most bytes of a command, at most `most`.
    pub fn command_bytes(&self, most: usize) -> usize {
        self.budget
            .get()
            .map_or(most, |budget| budget.command_bytes(most))
    }

    /// Runs a small command given as a document; it does not wait for the budget.
    pub async fn run_doc(&self, db: &str, command: Document) -> Result<Document, Failure> {
        let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("command"))?;
        self.run_now(db, raw).await
    }

    /// What comes within the time that `usual` should do for.
    async fn within<T>(
        &self,
        usual: Duration,
        answer: impl Future<Output = T>,
    ) -> Result<T, Failure> {
        let wait = self.patience.for_(usual);
        tokio::time::timeout(wait, answer).await.map_err(|_| {
            self.patience.in_vain(wait);
            Failure::timeout().of(self.side)
        })
    }

    /// Runs a command that answers with a cursor, each time within `usual`; its documents as bytes.
    pub async fn cursor(
        self: &Arc<Self>,
        db: &str,
        command: RawDocumentBuf,
        usual: Duration,
    ) -> Result<Rows, Failure> {
        if let Some(budget) = self.budget.get() {
            budget.pay(command.as_bytes().len()).await;
        }
        let db = self.client().database(db);
        // Boxed: a driver's call is large, and callers nest.
        let opening = Box::pin(async { db.run_raw_cursor_command(command).batch().await });
        let cursor = self.within(usual, opening).await?;
        let cursor = cursor.map_err(|e| self.failure(&e))?;
        Ok(Rows::new(self.clone(), cursor, usual))
    }

    /// The same, all documents to `each` as they come; the server may take its time.
    pub async fn query(
        self: &Arc<Self>,
        db: &str,
        command: RawDocumentBuf,
        each: impl FnMut(RawDocumentBuf),
    ) -> Result<(), Failure> {
        self.query_within(LONG, (db, command), each).await
    }

    async fn query_within(
        self: &Arc<Self>,
        usual: Duration,
        (db, command): (&str, RawDocumentBuf),
        mut each: impl FnMut(RawDocumentBuf),
    ) -> Result<(), Failure> {
        let mut rows = self.cursor(db, command, usual).await?;
        while let Some(found) = rows.next().await? {
            each(found);
        }
        Ok(())
    }

    /// Reads documents of one collection by `_id`, majority committed and never older than what was told
    /// before: an event whose document looks unchanged would be taken for an echo. Absent ones are left
    /// out.
    pub async fn read(
        self: &Arc<Self>,
        db: &str,
        coll: &str,
        ns: u32,
        ids: impl Iterator<Item = &Id>,
    ) -> Result<KeyMap<Vec<u8>>, Failure> {
        let mut w = Writer::new();
        w.str("find", coll)
            .open("filter")
            .open("_id")
            .open_array("$in");
        let mut count = 0;
        for id in ids {
            w.value(index_name(count), id.kind, &id.value);
            count += 1;
        }
        w.close().close().close();
        w.i32("batchSize", i32::try_from(count + 1).unwrap_or(i32::MAX));
        self.put_concern(&mut w);
        let mut found = KeyMap::with_capacity_and_hasher(count, Default::default());
        if count == 0 {
            return Ok(found);
        }
        self.query_within(PROMPT, (db, w.command()), |doc| {
            if let Some(id) = Id::of(doc.as_bytes()) {
                found.insert(Key::new(ns, &id), doc.into_bytes());
            }
        })
        .await?;
        // After it: the driver may have asked again, and another process.
        self.is_known()?;
        Ok(found)
    }

    /// Which of these documents there are, majority committed.
    pub async fn read_ids(
        self: &Arc<Self>,
        db: &str,
        coll: &str,
        ns: u32,
        ids: impl Iterator<Item = &Id>,
    ) -> Result<KeySet, Failure> {
        let mut w = Writer::new();
        w.str("find", coll).open("filter").open("_id");
        w.open_array("$in");
        for (i, id) in ids.enumerate() {
            w.value(index_name(i), id.kind, &id.value);
        }
        w.close().close().close();
        w.open("projection").i32("_id", 1).close();
        self.put_concern(&mut w);
        let mut found = KeySet::default();
        self.query_within(PROMPT, (db, w.command()), |doc| {
            found.extend(Id::of(doc.as_bytes()).map(|id| Key::new(ns, &id)));
        })
        .await?;
        self.is_known()?;
        Ok(found)
    }

    /// Asks whether the server is there and usable: `hello`, then the identity.
    pub async fn hello(&self) -> Result<Hello, Failure> {
        let began = Instant::now();
        let reply = self.run_doc("admin", doc! {"hello": 1}).await?;
        let half_way = began.elapsed() / 2;
        self.distance.answered(half_way * 2);
        let set = reply.get_str("setName").ok().map(str::to_owned);
        // A mongos has no set name but answers `isdbgrid`.
        if set.is_none() && reply.get_str("msg").ok() != Some("isdbgrid") {
            return Err(Failure::offline(Reason::NotAReplicaSet).of(self.side));
        }
        let now = chrono::Utc::now().timestamp_millis();
        let theirs = reply
            .get_datetime("localTime")
            .map_or(now, |t| t.timestamp_millis());
        Ok(Hello {
            clock_offset_ms: theirs + i64::try_from(half_way.as_millis()).unwrap_or(0) - now,
            operation_time: reply.get_timestamp("operationTime").ok(),
            writable: reply.get_bool("isWritablePrimary").unwrap_or(false),
            set_name: set.unwrap_or_else(|| "mongos".into()),
        })
    }

    /// Whether it takes long until an answer is back, so that much should be under way at once.
    pub fn is_far(&self) -> bool {
        self.distance.is_far()
    }

    /// What tells this cluster from another one (R12): the replica set's id, made when it was
    /// initiated, or its name and members where a small tier does not tell.
    pub async fn identity(&self) -> Result<String, Failure> {
        match self.run_doc("admin", doc! {"replSetGetConfig": 1}).await {
            Ok(reply) => {
                if let Ok(id) = reply
                    .get_document("config")
                    .and_then(|c| c.get_document("settings"))
                    .and_then(|s| s.get_object_id("replicaSetId"))
                {
                    return Ok(id.to_hex());
                }
            }
            Err(f) if f.is_offline() || f.class == Class::Transient => return Err(f),
            Err(_) => {}
        }
        // Without the right to read the configuration, the election id's upper half and the set's name remain.
        let reply = self.run_doc("admin", doc! {"hello": 1}).await?;
        Ok(reply.get_str("setName").unwrap_or("mongos").to_owned())
    }
}

/// Answer of [`Endpoint::hello`].
#[derive(Clone, Debug)]
pub struct Hello {
    /// The server's clock minus ours, in ms, half the round trip allowed for.
    pub clock_offset_ms: i64,
    /// Time of the last operation in the server's oplog.
    pub operation_time: Option<bson::Timestamp>,
    /// Whether it takes writes now.
    pub writable: bool,
    /// Name of the replica set.
    pub set_name: String,
}
