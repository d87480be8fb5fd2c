//! The daemon: named tasks under a supervisor with a cancellation token.
//!
//! Any task that ends outside a shutdown ends the process, and systemd starts it again; the state is
//! on disk. Starting waits for the local server for as long as it takes, and needs no remote.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::command::{CommandError, Trigger};
use crate::config::Config;
use crate::decide::Side;
use crate::failure::{Class, Failure, MAX_TIME_EXPIRED, Reason, UNAUTHORIZED};
use crate::handle::Handle;
use crate::lease::Lease;
use crate::overrides::Overrides;
use crate::retry::Retry;
use crate::settle::store_failed;
use crate::shared::Shared;
use crate::side::Endpoint;
use crate::store::{Store, StoreError, records};
use crate::{
    adopt, disk, halt, history, identity, lease, loss, probe, pull, reconcile, recorder, ruling,
    schema, selection, side, stamp, tail, tell, watermark, worker,
};

/// Why the daemon could not start or had to end.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The state store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The local database can't be used as it is set up.
    #[error("the local database can't be used: {0}")]
    Local(&'static str),
    /// Databases and state do not belong together (R12), or another mistake that a restart won't mend.
    #[error("{0}")]
    Refused(String),
    /// A task ended that should not have.
    #[error("{0}")]
    Task(String),
}

impl DaemonError {
    /// Exit code: 78 for what a person has to put right, 1 for what a restart may mend.
    pub fn exit_code(&self) -> u8 {
        match self {
            // A service manager tries again until the disk is well.
            Self::Store(e) if e.is_disk() => 1,
            Self::Store(
                StoreError::Locked(_)
                | StoreError::Directory { .. }
                | StoreError::Newer { .. }
                | StoreError::Unknown { .. },
            )
            | Self::Local(_)
            | Self::Refused(_) => 78,
            Self::Store(_) | Self::Task(_) => 1,
        }
    }

    /// What to do, where the message does not say it already.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Store(e) if e.is_disk() => {
                Some("free some space on the state directory's disk, or make it writable")
            }
            Self::Task(_) => {
                Some("start it again; the state is on disk. If it happens again, look at the log")
            }
            _ => None,
        }
    }
}

/// A daemon whose state is open but whose tasks do not run yet.
pub struct Daemon {
    handle: Handle,
}

/// Opens the state. Contacts no server: that is [`Daemon::run_until`]'s business.
pub async fn start(config: Config) -> Result<Daemon, DaemonError> {
    let store = Store::open(&config.state_dir)?;
    let config = store.call(Overrides::load).await?.apply(config);
    let timeout = config.probe.timeout;
    let local = Endpoint::connect(Side::Local, &config.local_uri, timeout)
        .await
        .map_err(|f| DaemonError::Refused(format!("local.uri can't be used: {f}")))?;
    let shared = Shared::new(config, store, Arc::new(local), CancellationToken::new());
    shared.local.journal.get_or_init(|| shared.store.clone());
    if shared.settings().config.ha.enabled {
        let me = own_id(&shared.store).await?;
        let settings = shared.settings();
        let local = Arc::downgrade(&shared.local);
        shared.set_lease(Lease::new(&settings.config, me, local));
    }
    if let Some(aside) = shared.store.put_aside() {
        let text = format!(
            "the state file was damaged and put aside as {}; everything is compared anew, nothing is lost",
            aside.display()
        );
        shared.notice("state", Some(text));
    }
    let paused: Option<bool> = shared.store.get_meta("paused").await?;
    shared
        .paused
        .store(paused.unwrap_or(false), Ordering::Relaxed);
    if let Some(text) = shared.store.get_meta::<String>("last_run").await?
        && let Ok(run) = serde_json::from_str(&text)
    {
        shared.runs.set_last(run);
    }
    let settings = shared.settings();
    let noted = shared.store.call(move |c| selection::note(c, &settings));
    noted.await?;
    halt::load(&shared).await?;
    ruling::load(&shared).await?;
    reconcile::load(&shared).await?;
    schema::load(&shared).await?;
    loss::load(&shared).await?;
    adopt::load(&shared)
        .await
        .map_err(|f| DaemonError::Refused(f.to_string()))?;
    Ok(Daemon {
        handle: Handle::new(Arc::new(shared)),
    })
}

/// By this a daemon knows its own lease again after a restart.
async fn own_id(store: &Store) -> Result<String, StoreError> {
    const NAME: &str = "lease_holder";
    if let Some(known) = store.get_meta(NAME).await? {
        return Ok(known);
    }
    let new = bson::oid::ObjectId::new().to_hex();
    store.set_meta(NAME, new.clone()).await?;
    Ok(new)
}

/// Forgets the databases the state was made with: the next start takes them as they are, and makes
/// them equal in that way.
pub async fn adopt(config: &Config, mode: adopt::Mode) -> Result<(), DaemonError> {
    let store = Store::open(&config.state_dir)?;
    let adopted = store.call(move |c| {
        // Before the halts are forgotten: their conflicts are settled by it.
        adopt::begin(c, mode, "cli")?;
        identity::adopt(c)
    });
    Ok(adopted.await?)
}

impl Daemon {
    /// For API, signals and control file.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Runs until the token is cancelled or something ends that should not.
    pub async fn run_until(self, cancel: CancellationToken) -> Result<(), DaemonError> {
        let shared = self.handle.shared().clone();
        let inner = shared.cancel.clone();
        let _guard = inner.clone().drop_guard();
        tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            outcome = wait_for_local(&shared) => outcome?,
        }
        let settings = shared.settings();
        let config = &settings.config;
        let mut tasks: JoinSet<(&'static str, Result<(), Failure>)> = JoinSet::new();
        macro_rules! task {
            ($name:literal, $run:expr) => {
                tasks.spawn(lasting($name, shared.clone(), $run))
            };
        }
        for db in &config.databases {
            let db = db.clone();
            task!("capture", move |s| tail::run(s, Side::Local, db.clone()));
        }
        task!("lease", lease::run);
        task!("sides", lease::adopt_sides);
        task!("recorder", recorder::run);
        task!("stamper", stamp::run);
        task!("probe", probe::run);
        let handle = self.handle.clone();
        task!("watch", move |_| watch(handle.clone()));
        task!("history", history::run);
        let handle = self.handle.clone();
        task!("tell", move |_| tell::run(handle.clone()));
        task!("watermark", watermark::run);
        task!("local", |s| side::watch(s, Side::Local));
        task!("remote", |s| side::watch(s, Side::Remote));
        task!("disk", disk::run);
        if config.remote_uri.is_some() {
            if config.pull.follow {
                for db in &config.databases {
                    let db = db.clone();
                    task!("follow", move |s| tail::run(s, Side::Remote, db.clone()));
                }
            }
            task!("pull", pull::run);
            task!("worker", worker::run);
            task!("reconcile", reconcile::run);
            task!("rulings", ruling::run);
            task!("schema", schema::run);
        } else {
            shared.notice("remote", Some(CommandError::NotConfigured.to_string()));
        }
        let ended = tokio::select! {
            () = cancel.cancelled() => None,
            ended = tasks.join_next() => ended,
        };
        inner.cancel();
        let verdict = match ended {
            None => Ok(()),
            Some(Ok((name, Ok(())))) => Err(DaemonError::Task(format!(
                "the task {name} ended by itself"
            ))),
            Some(Ok((name, Err(failure)))) => Err(fatal(name, &failure)),
            Some(Err(e)) => Err(DaemonError::Task(format!("a task panicked: {e}"))),
        };
        // What is under way is on disk as intents; a short wait lets the tasks put their things down.
        let _ = tokio::time::timeout(Duration::from_secs(2), async {
            while tasks.join_next().await.is_some() {}
        })
        .await;
        lease::hand_over(&shared).await;
        verdict
    }
}

/// Runs a task; one that the state's full disk ended begins anew until there is room (R22).
async fn lasting<F: Future<Output = Result<(), Failure>>>(
    name: &'static str,
    shared: Arc<Shared>,
    run: impl Fn(Arc<Shared>) -> F,
) -> (&'static str, Result<(), Failure>) {
    loop {
        match run(shared.clone()).await {
            Err(failure) if failure.class == Class::Transient => {
                tracing::debug!(task = name, %failure, "begins anew");
                tokio::select! {
                    () = shared.cancel.cancelled() => return (name, Ok(())),
                    () = tokio::time::sleep(Duration::from_secs(1)) => {}
                }
            }
            outcome => return (name, outcome),
        }
    }
}

fn fatal(task: &str, failure: &Failure) -> DaemonError {
    if failure.class == Class::Fatal && failure.what.contains("reconcile --adopt") {
        return DaemonError::Refused(failure.what.clone());
    }
    DaemonError::Task(format!("the task {task} ended: {failure}"))
}

/// Waits for the local server, and says so; refuses what waiting can't mend.
async fn wait_for_local(shared: &Arc<Shared>) -> Result<(), DaemonError> {
    let mut retry = Retry::new(&shared.settings().config.retry);
    loop {
        let outcome = async {
            let hello = shared.local.hello().await?;
            shared.set_offset(Side::Local, hello.clock_offset_ms);
            identity::check(shared, &shared.local).await?;
            shared.local.end_leftovers().await
        }
        .await;
        match outcome {
            Ok(()) => {
                shared.notice("local", None);
                return Ok(());
            }
            Err(failure) => match failure.class {
                Class::Offline(Reason::NotAReplicaSet) => {
                    return Err(DaemonError::Local(Reason::NotAReplicaSet.message()));
                }
                Class::Offline(Reason::BadCredentials) => {
                    return Err(DaemonError::Local(
                        "it refuses user or password: correct them in local.uri",
                    ));
                }
                Class::Fatal => return Err(DaemonError::Refused(failure.what)),
                _ if failure.code == Some(UNAUTHORIZED) => {
                    return Err(DaemonError::Local(
                        "the user in local.uri may not read its state: give it the rights named in the README",
                    ));
                }
                _ => {
                    let why = match failure.code {
                        Some(MAX_TIME_EXPIRED) => failure.what.as_str(),
                        _ => "it does not answer (is mongod running?)",
                    };
                    let waiting = format!("waiting for the local database: {why}");
                    shared.notice("local", Some(waiting));
                }
            },
        }
        tokio::time::sleep(retry.next_delay().min(Duration::from_secs(5))).await;
    }
}

/// Small things that follow the link: waiting edits look pending offline, and a link that comes back
/// is a sync run of its own.
async fn watch(handle: Handle) -> Result<(), Failure> {
    let shared = handle.shared();
    let mut link = shared.link.subscribe();
    let mut was_offline = false;
    // The first time is no return: what waits from before is simply worked off.
    let mut was_online = false;
    loop {
        let online = link.borrow_and_update().is_online();
        if !online && !was_offline && shared.settings().config.sync.stamp_documents {
            // In parts: the store serves others too, and there may be a million.
            let some = |c: &_| records::stamp_outbox(c, 5000);
            while shared.store.call(some).await.map_err(store_failed)? {}
            shared.stamp.notify_one();
        }
        if online && was_offline && was_online {
            shared.wake.notify_one();
            shared.reconcile.notify_one();
            let (handle, first) = (handle.clone(), reconcile_pending(shared).await?);
            if !first {
                tokio::spawn(async move {
                    // Another run may still be on its way to notice that the link was gone.
                    while handle.shared().link.is_online() {
                        match handle.sync(Trigger::Reconnect, &[]).await {
                            Err(CommandError::Busy) => {
                                tokio::time::sleep(Duration::from_millis(100)).await;
                            }
                            Err(error) => {
                                tracing::debug!(%error, "run after reconnect");
                                break;
                            }
                            Ok(_) => break,
                        }
                    }
                });
            }
        }
        was_offline = !online;
        was_online |= online;
        tokio::select! {
            () = shared.cancel.cancelled() => return Ok(()),
            _ = link.changed() => {}
            () = tokio::time::sleep(Duration::from_millis(200)) => {}
        }
    }
}

/// Whether any database waits to be compared.
pub(crate) async fn reconcile_pending(shared: &Shared) -> Result<bool, Failure> {
    let pending = shared.store.call(|c| {
        c.query_row(
            "SELECT EXISTS(SELECT 1 FROM meta WHERE k LIKE 'reconcile:%')",
            [],
            |r| r.get::<_, bool>(0),
        )
    });
    pending.await.map_err(store_failed)
}
