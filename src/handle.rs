//! What API, control file and signals ask of a running daemon.

mod conflicts;
mod schema;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use crate::adopt::Mode;
use crate::command::{
    CommandError, NetworkStatus, Queue, QueueEntry, RunStatus, Status, SyncRun, Trigger,
};
use crate::config::Config;
use crate::conflicts::id_json;
use crate::daemon::reconcile_pending;
use crate::decide::Side;
use crate::failure::{Class, Failure, PAUSED, Reason, STANDBY};
use crate::order::{self, Rank};
use crate::progress::Meter;
use crate::settle::store_failed;
use crate::shared::{Shared, lock};
use crate::store::{self, StoreError, lanes, queue, records};
use crate::{
    adopt, plan, pull, reconcile, recorder, runs, selection, tail, verify, vitals, watermark,
};

/// A running daemon, as the API, the control file and the signals see it. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl From<Failure> for CommandError {
    fn from(failure: Failure) -> Self {
        match failure.class {
            Class::Offline(_) if failure.side == Some(Side::Local) => {
                Self::LocalAway(failure.to_string())
            }
            Class::Offline(_) => Self::Offline(failure.to_string()),
            _ if matches!(failure.code, Some(PAUSED | STANDBY)) => {
                Self::Refused(failure.to_string())
            }
            _ => Self::Failed(failure.to_string()),
        }
    }
}

impl From<StoreError> for CommandError {
    fn from(e: StoreError) -> Self {
        Self::Failed(e.to_string())
    }
}

fn time(ms: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(ms).unwrap_or_default()
}

impl Handle {
    /// A handle on what all tasks share.
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// What all tasks share.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Sends and fetches everything now and waits until it is done; the run's counts. The work goes
    /// on if the caller stops waiting.
    pub async fn sync(
        &self,
        trigger: Trigger,
        collections: &[String],
    ) -> Result<SyncRun, CommandError> {
        let (handle, collections) = (self.clone(), collections.to_vec());
        let task = tokio::spawn(async move { handle.sync_now(trigger, collections).await });
        task.await
            .map_err(|e| CommandError::Failed(e.to_string()))?
    }

    async fn sync_now(
        &self,
        trigger: Trigger,
        collections: Vec<String>,
    ) -> Result<SyncRun, CommandError> {
        let shared = &self.shared;
        let settings = shared.settings();
        let config = &settings.config;
        if config.remote_uri.is_none() {
            return Err(CommandError::NotConfigured);
        }
        self.takes_orders()?;
        self.not_paused()?;
        let mut only = Vec::new();
        for name in &collections {
            let (db, coll) = config
                .databases
                .iter()
                .find_map(|db| {
                    name.strip_prefix(&format!("{db}."))
                        .map(|c| (db.clone(), c))
                })
                .unwrap_or((config.databases[0].clone(), name));
            if !settings.is_synced(&db, coll) {
                return Err(CommandError::BadRequest(format!(
                    "{name} is not among the collections that are synced"
                )));
            }
            only.push(shared.store.namespace(&db, coll).await?);
        }
        self.wait_online().await?;
        if shared.adopting.load(Ordering::Acquire) {
            return Err(CommandError::Busy);
        }
        let Some(before) = shared.runs.begin(trigger, collections) else {
            return Err(CommandError::Busy);
        };
        let outcome = self.everything(trigger, &only, before).await;
        if let Err(failure) = &outcome {
            shared.runs.error(failure.to_string());
        }
        let status = if outcome.is_ok() {
            RunStatus::Completed
        } else {
            RunStatus::Failed
        };
        let Some(run) = shared.runs.end(status) else {
            return Err(CommandError::Failed("the run was lost".into()));
        };
        let record = run.clone();
        shared.store.call(move |c| runs::record(c, &record)).await?;
        outcome.map_err(CommandError::from)?;
        Ok(run)
    }

    async fn everything(
        &self,
        trigger: Trigger,
        only: &[u32],
        before: Option<SyncRun>,
    ) -> Result<(), Failure> {
        let shared = &self.shared;
        let waiting = shared
            .store
            .call(move |c| {
                if let Some(run) = &before {
                    runs::record(c, run)?;
                }
                queue::retry_all(c)?;
                queue::last_seq(c)
            })
            .await
            .map_err(store_failed)?;
        let patience = Duration::from_secs(10);
        // The first sync comes before everything else.
        let began = tokio::time::Instant::now();
        while !shared.streams_open(Side::Local) && began.elapsed() < patience {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if !shared.streams_open(Side::Local) {
            return Err(Failure::timeout().of(Side::Local));
        }
        if shared.follows() {
            let (local, remote) = tokio::join!(
                tail::catch_up(shared, Side::Local, patience),
                tail::catch_up(shared, Side::Remote, patience)
            );
            if (!local || !remote) && trigger != Trigger::Reconnect {
                shared.runs.error(
                    "the change streams are behind; what they have not seen yet follows by itself"
                        .into(),
                );
            }
        } else {
            tail::catch_up(shared, Side::Local, patience).await;
            pull::pull(shared, true).await?;
        }
        if reconcile_pending(shared).await? {
            reconcile::settle_asked(shared).await?;
        }
        if trigger == Trigger::Reconnect && !shared.link.is_online() {
            // Gone again: the run is over with what waited when the link came back.
            return reconcile::drained(shared, waiting, only).await;
        }
        let seq = shared
            .store
            .call(queue::last_seq)
            .await
            .map_err(store_failed)?;
        reconcile::drained(shared, seq, only).await
    }

    async fn wait_online(&self) -> Result<(), CommandError> {
        let shared = &self.shared;
        let limit = shared.settings().config.probe.timeout * 2 + Duration::from_secs(1);
        let online = async {
            // A probe that has failed since has the last word.
            let mut link = shared.link.subscribe();
            loop {
                let now = link.borrow_and_update().clone();
                match now.state {
                    crate::link::State::Online => return Ok(()),
                    crate::link::State::Offline { .. } => return Err(now.reason),
                    _ => {}
                }
                if link.changed().await.is_err() {
                    return Err(None);
                }
            }
        };
        match tokio::time::timeout(limit, online).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(reason)) => Err(CommandError::Offline(
                reason.unwrap_or(Reason::Offline).message().into(),
            )),
            Err(_) => Err(CommandError::Offline(Reason::Timeout.message().into())),
        }
    }

    /// How things are.
    pub async fn status(&self) -> Result<Status, CommandError> {
        let shared = &self.shared;
        let settings = shared.settings();
        let (outbox, inbox, open, total, completed) = shared
            .store
            .look(|c| {
                Ok((
                    queue::counts(c, Side::Local)?,
                    queue::counts(c, Side::Remote)?,
                    records::count_open(c)?,
                    store::get_meta::<i64>(c, "conflicts_total")?.unwrap_or(0),
                    store::get_meta::<i64>(c, "runs_completed")?.unwrap_or(0),
                ))
            })
            .await?;
        let halted = lock(&shared.halted).all().len() as u64;
        let link = shared.link.snapshot();
        let last = shared.runs.last();
        let oldest = [outbox.oldest, inbox.oldest].into_iter().flatten().min();
        let mut notices: Vec<(String, String)> =
            lock(&shared.notices).clone().into_iter().collect();
        notices.sort();
        let comparing = lock(&shared.progress).as_ref().map(Meter::snapshot);
        let verifying = lock(&shared.verifying).as_ref().map(Meter::snapshot);
        let (last_verify, last_proof) = shared.store.look(verify::summary).await?;
        Ok(Status {
            last_sync_time: last.as_ref().and_then(|r| r.end_time),
            last_sync_status: last.as_ref().map(|r| r.status),
            last_sync_duration: last.as_ref().map(|r| r.duration_seconds),
            total_syncs_completed: u64::try_from(completed).unwrap_or(0),
            total_conflicts: u64::try_from(total).unwrap_or(0),
            unresolved_conflicts: open + halted,
            pending_documents: outbox.all,
            pending_inbox: inbox.all,
            held_documents: outbox.conflict + outbox.failed + inbox.conflict + inbox.failed,
            failed_documents: outbox.failed + inbox.failed,
            is_online: link.is_online(),
            is_syncing: shared.in_flight.load(Ordering::Relaxed) > 0 || shared.runs.is_owned(),
            is_configured: settings.config.remote_uri.is_some(),
            ha: shared.lease().map(|lease| lease.standing()),
            is_paused: shared.paused.load(Ordering::Relaxed),
            is_capturing: self.is_capturing(),
            is_following: shared.follows() && shared.streams_open(Side::Remote),
            link: link.status(),
            lag_seconds: oldest.map_or(0.0, |at| {
                ((Utc::now().timestamp_millis() - at).max(0) as f64) / 1000.0
            }),
            oldest_unsynced: oldest.map(time),
            clock_skew: shared.remote().map(|_| shared.skew_ms()),
            current_run: shared.runs.now(),
            progress: comparing.or(verifying),
            last_proof,
            last_verify,
            notices: notices.into_iter().map(|(_, text)| text).collect(),
            databases: settings.config.databases.clone(),
            site: settings.config.site.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
        })
    }

    /// The link in the replaced service's words.
    pub fn network_status(&self) -> NetworkStatus {
        let link = self.shared.link.snapshot();
        NetworkStatus {
            is_running: true,
            is_online: link.is_online(),
            last_check: link.last_check,
            check_interval_seconds: self.shared.settings().config.probe.interval.as_secs_f64(),
        }
    }

    /// The last `limit` sync runs, newest first.
    pub async fn logs(&self, limit: i64) -> Result<Vec<SyncRun>, CommandError> {
        // The newest ones may still be on their way into the database.
        let mut indexed = true;
        recorder::flush(&self.shared, &mut indexed).await?;
        Ok(recorder::logs(&self.shared, limit).await?)
    }

    /// The first `limit` waiting documents, in the order in which they go: the oldest, or by the order
    /// of their collections, and then those that are held.
    pub async fn queue(&self, limit: u32) -> Result<Queue, CommandError> {
        let shared = &self.shared;
        let settings = shared.settings();
        let classes = shared.classes();
        let halted = lock(&shared.halted).all().clone();
        let (listed, outbox, inbox) = shared
            .store
            .call(move |c| {
                Ok((
                    lanes::list(c, limit, &classes)?,
                    queue::counts(c, Side::Local)?.all,
                    queue::counts(c, Side::Remote)?.all,
                ))
            })
            .await?;
        let by_age = settings.order.is_level();
        let mut entries: Vec<_> = listed
            .into_iter()
            .map(|(side, key, id, at, held, reason)| {
                let (db, coll) = shared.store.namespace_name(key.ns()).unwrap_or_default();
                let rank = settings.order.rank(&db, &coll);
                let decide =
                    || "its collection waits for your decision (`sangam conflicts`)".into();
                let place = (held.is_some() && !by_age, rank, at);
                let entry = QueueEntry {
                    queue: queue::table(side).into(),
                    collection: settings.display(&db, &coll),
                    id: id_json(&id),
                    since: time(at),
                    state: held.unwrap_or_else(|| "waiting".into()),
                    reason: reason.or_else(|| halted.contains(&key.ns()).then(decide)),
                };
                (place, entry)
            })
            .collect();
        entries.sort_by_key(|(place, _)| *place);
        entries.truncate(limit as usize);
        let entries = entries.into_iter().map(|(_, entry)| entry).collect();
        Ok(Queue {
            outbox,
            inbox,
            entries,
        })
    }

    /// Stops sending and applying until `resume`; survives a restart.
    pub async fn pause(&self) -> Result<(), CommandError> {
        self.set_paused(true).await
    }

    /// Undoes `pause`.
    pub async fn resume(&self) -> Result<(), CommandError> {
        self.set_paused(false).await
    }

    /// Of several daemons only the one that works takes orders; the error names it.
    pub(crate) fn takes_orders(&self) -> Result<(), CommandError> {
        match self.shared.lease().filter(|_| self.shared.stands_by()) {
            Some(lease) => Err(CommandError::Refused(lease.refusal())),
            None => Ok(()),
        }
    }

    fn not_paused(&self) -> Result<(), CommandError> {
        match self.shared.paused.load(Ordering::Relaxed) {
            true => Err(CommandError::Refused(
                "syncing is paused; run `sangam resume` first".into(),
            )),
            false => Ok(()),
        }
    }

    async fn set_paused(&self, paused: bool) -> Result<(), CommandError> {
        self.takes_orders()?;
        self.shared.store.set_meta("paused", paused).await?;
        self.shared.paused.store(paused, Ordering::Relaxed);
        self.shared.wake.notify_one();
        tracing::info!("{}", if paused { "paused" } else { "resumed" });
        Ok(())
    }

    /// Compares both sides whole against base and mends what differs; `exact` reads every document.
    pub async fn reconcile(&self, exact: bool) -> Result<SyncRun, CommandError> {
        let handle = self.clone();
        let task = tokio::spawn(async move {
            let shared = &handle.shared;
            if shared.settings().config.remote_uri.is_none() {
                return Err(CommandError::NotConfigured);
            }
            handle.takes_orders()?;
            handle.not_paused()?;
            handle.wait_online().await?;
            if shared.runs.is_owned() {
                return Err(CommandError::Busy);
            }
            let asked = reconcile::ask_now(shared, exact).await?;
            Ok(reconcile::reconcile(shared, Trigger::Manual, &asked).await?)
        });
        task.await
            .map_err(|e| CommandError::Failed(e.to_string()))?
    }

    /// Makes both sides equal in that way, whatever was known of them before.
    pub async fn adopt(&self, mode: Mode, who: &str) -> Result<SyncRun, CommandError> {
        let (handle, who) = (self.clone(), who.to_owned());
        let task = tokio::spawn(async move {
            handle.takes_orders()?;
            handle.wait_online().await?;
            adopt::adopt(&handle.shared, mode, &who).await
        });
        task.await
            .map_err(|e| CommandError::Failed(e.to_string()))?
    }

    /// Proves both sides equal, or says what differs.
    pub async fn verify(&self, request: verify::Request) -> Result<verify::Report, CommandError> {
        self.reach().await?;
        // It only looks: on a short budget what has to move goes first.
        order::at(Rank::MAX, verify::verify(&self.shared, request)).await
    }

    /// Mends what the last verify found.
    pub async fn repair(&self) -> Result<verify::Report, CommandError> {
        self.takes_orders()?;
        self.reach().await?;
        verify::repair(&self.shared).await
    }

    /// The report of the last verify.
    pub async fn last_verify(&self) -> Result<Option<verify::Report>, CommandError> {
        verify::last(&self.shared).await
    }

    /// What a sync would do.
    pub async fn plan(&self, request: &plan::Request) -> Result<plan::Plan, CommandError> {
        self.reach().await?;
        plan::plan(&self.shared, request).await
    }

    async fn reach(&self) -> Result<(), CommandError> {
        if self.shared.settings().config.remote_uri.is_none() {
            return Err(CommandError::NotConfigured);
        }
        self.wait_online().await
    }

    /// Takes a new configuration; what can't change while running (databases, state_dir, URIs) is an error.
    pub async fn reload(&self, config: Config) -> Result<(), CommandError> {
        use secrecy::ExposeSecret as _;
        let now = self.shared.settings();
        let same = |a: &Option<secrecy::SecretString>, b: &Option<secrecy::SecretString>| {
            a.as_ref().map(|s| s.expose_secret().to_owned())
                == b.as_ref().map(|s| s.expose_secret().to_owned())
        };
        let fixed = [
            ("database", now.config.databases == config.databases),
            ("state_dir", now.config.state_dir == config.state_dir),
            (
                "local.uri",
                now.config.local_uri.expose_secret() == config.local_uri.expose_secret(),
            ),
            (
                "remote.uri",
                same(&now.config.remote_uri, &config.remote_uri),
            ),
            (
                "ha.enabled",
                now.config.ha.enabled == config.ha.enabled && now.config.ha.name == config.ha.name,
            ),
            ("fields", now.config.fields == config.fields),
            (
                "sync.stamp_documents",
                now.config.sync.stamp_documents == config.sync.stamp_documents,
            ),
        ];
        if let Some((name, _)) = fixed.into_iter().find(|(_, same)| !same) {
            return Err(CommandError::BadRequest(format!(
                "{name} can't change while the daemon runs; restart it"
            )));
        }
        self.shared.set_config(config);
        let settings = self.shared.settings();
        let noted = self
            .shared
            .store
            .call(move |c| selection::note(c, &settings));
        noted.await?;
        self.shared.wake.notify_one();
        self.shared.reconcile.notify_one();
        Ok(())
    }

    /// Whether local changes are being captured (`/readyz`, `READY=1`).
    pub fn is_capturing(&self) -> bool {
        let stuck = lock(&self.shared.watermarks)[Side::Local as usize]
            .is_stuck(watermark::patience(&self.shared), Instant::now());
        self.shared.streams_open(Side::Local) && !stuck
    }

    /// The figures for Prometheus.
    pub async fn metrics(&self) -> Result<String, CommandError> {
        let status = self.status().await?;
        let vitals = vitals::take(&self.shared).await?;
        Ok(self.shared.metrics.render(&status, &vitals))
    }

    /// Whether the event loops are alive (`/healthz`, `WATCHDOG=1`).
    pub fn is_alive(&self) -> bool {
        !self.shared.cancel.is_cancelled()
    }
}
