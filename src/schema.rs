//! Indexes and options of collections: what one side has comes to exist on the other.
//!
//! A task of its own looks at both sides at the start, when a stream tells of a change, and before
//! each comparison (so that on a first sync indexes come before data). What is to be done is decided
//! by `plan`, from three trees; nothing is ever dropped. An index of a collection that holds
//! documents is built in the background, for as long as it takes. What can't be done, or is not to be
//! done without a person, is a [`Finding`]: kept in the state store, shown by `sangam schema`, and
//! told in `status`.

mod build;
mod definition;
mod findings;
mod one;
mod plan;
mod read;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chrono::Utc;
use tokio::sync::Notify;

use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::settle::store_failed;
use crate::shared::{Shared, lock};
use crate::store::definitions::{self, Tree};
use crate::store::{self, StoreError};

use build::Build;
pub use definition::{Definition, Index, Ttl};
use findings::Findings;
pub use findings::{Finding, FindingKind, Report};
use one::One;

/// Changes of indexes come in bursts: one look for all.
const GATHER: Duration = Duration::from_millis(300);

/// How often a look that failed is tried again, and builds are looked after.
const TICK: Duration = Duration::from_secs(5);

/// Name under which the last report is kept.
const REPORT: &str = "schema_report";

/// Documents that vanish from a side without anybody deleting them (R15).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Volatile {
    /// By what they expire.
    pub ttl: Vec<Ttl>,
    /// The oldest make room for new ones.
    pub capped: bool,
}

/// What the daemon knows of indexes and options.
#[derive(Default)]
pub struct State {
    /// Asks for a look.
    pub wake: Notify,
    /// Collections of a side whose documents vanish by themselves, by namespace.
    volatile: Mutex<HashMap<(Side, u32), Volatile>>,
    /// What the last look found.
    report: Mutex<Report>,
    /// One look at a time.
    looking: tokio::sync::Mutex<()>,
    /// Indexes that are to be built, and those that are at it.
    builds: Mutex<Vec<Build>>,
}

/// What a look is to do beside what it always does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ask {
    /// What failed before is tried again.
    pub retry: bool,
    /// A person asked that everything that is missing be made.
    pub create: bool,
}

impl State {
    /// How documents of a collection vanish by themselves on a side, if they do.
    pub fn volatile(&self, side: Side, ns: u32) -> Option<Volatile> {
        lock(&self.volatile).get(&(side, ns)).cloned()
    }
}

/// Loads what the run before knew: capture must know from its first event which documents expire.
pub async fn load(shared: &Shared) -> Result<(), StoreError> {
    let (seen, text) = shared
        .store
        .call(|c| {
            let text: Option<String> = store::get_meta(c, REPORT)?;
            Ok((definitions::seen(c)?, text))
        })
        .await?;
    for (ns, side, definition) in seen {
        note_volatile(shared, ns, side, Some(&definition));
    }
    if let Some(report) = text.and_then(|t| serde_json::from_str(&t).ok()) {
        tell(shared, &report);
        *lock(&shared.schema.report) = report;
    }
    Ok(())
}

/// Learns how documents of a side vanish by themselves, before its events are read (R15).
pub async fn learn(shared: &Arc<Shared>, side: Side, db: &str) -> Result<(), Failure> {
    let endpoint = shared.endpoint(side)?;
    for (coll, definition) in read::definitions(&endpoint, &shared.settings(), db).await? {
        let ns = shared
            .store
            .namespace(db, &coll)
            .await
            .map_err(store_failed)?;
        note_volatile(shared, ns, side, Some(&definition));
    }
    Ok(())
}

/// Runs until the daemon ends.
pub async fn run(shared: Arc<Shared>) -> Result<(), Failure> {
    let mut builder = build::Builder::default();
    let mut wanted = Some(Ask::default());
    let mut link = shared.link.subscribe();
    loop {
        if let Some(ask) = wanted.filter(|_| shared.link.is_online() && shared.remote().is_some()) {
            match look(&shared, ask).await {
                Ok(_) => wanted = None,
                Err(failure) if failure.class == Class::Fatal => return Err(failure),
                Err(failure) => {
                    tracing::debug!(%failure, "the indexes of both sides could not be compared");
                }
            }
        }
        builder.start(&shared);
        tokio::select! {
            () = shared.cancel.cancelled() => return Ok(()),
            () = shared.schema.wake.notified() => {
                tokio::time::sleep(GATHER).await;
                wanted = Some(Ask::default());
            }
            built = builder.next(), if !builder.is_idle() => {
                build::done(&shared, built?).await?;
                wanted = Some(Ask::default());
            }
            _ = link.changed(), if wanted.is_some() && !shared.link.is_online() => {}
            () = tokio::time::sleep(TICK) => {}
        }
    }
}

/// Before documents are compared or moved for the first time: what can be made at once is made.
pub async fn before_data(shared: &Arc<Shared>) -> Result<(), Failure> {
    match look(
        shared,
        Ask {
            retry: true,
            create: false,
        },
    )
    .await
    {
        Ok(_) => Ok(()),
        Err(failure) if failure.class == Class::Fatal || failure.is_offline() => Err(failure),
        Err(failure) => {
            // Documents are worth more than indexes; the task looks again.
            tracing::warn!(%failure, "the indexes of both sides could not be compared");
            shared.schema.wake.notify_one();
            Ok(())
        }
    }
}

/// What the last look found.
pub fn report(shared: &Shared) -> Report {
    let mut report = lock(&shared.schema.report).clone();
    report.sync = shared.settings().config.schema_sync;
    report.building = lock(&shared.schema.builds)
        .iter()
        .map(|b| b.shown(&shared.settings()))
        .collect();
    report
}

/// Looks at both sides, makes what can be made at once, has the rest built in the background, and
/// says what is left.
pub async fn look(shared: &Arc<Shared>, ask: Ask) -> Result<Report, Failure> {
    if shared.withholds() {
        // Whoever holds the lease makes what is missing.
        return Ok(self::report(shared));
    }
    let _one = shared.schema.looking.lock().await;
    let settings = shared.settings();
    let mut findings = Findings::default();
    let known = build::refusals(shared).await?;
    let mut refusals = Vec::new();
    for db in &settings.config.databases {
        let remote = shared.endpoint(Side::Remote)?;
        let (local, remote) = tokio::join!(
            read::definitions(&shared.local, &settings, db),
            read::definitions(&remote, &settings, db)
        );
        shared.note(Side::Remote, &remote);
        let (local, remote) = (local?, remote?);
        let mut names: Vec<&String> = local.keys().chain(remote.keys()).collect();
        names.sort();
        names.dedup();
        for coll in &names {
            let ns = shared
                .store
                .namespace(db, coll)
                .await
                .map_err(store_failed)?;
            let mut one = One {
                shared,
                settings: &settings,
                names: (db, coll),
                ns,
                ask,
                known: &known,
                refusals: &mut refusals,
                findings: &mut findings,
            };
            one.look(local.get(*coll), remote.get(*coll)).await?;
        }
        forget_absent(shared, db, &local, &remote).await?;
    }
    // A refusal lasts until what it is about is gone or made; others are of no interest any more.
    build::keep_refusals(shared, refusals).await?;
    let report = Report {
        checked_at: Some(Utc::now()),
        sync: settings.config.schema_sync,
        findings: findings.all,
        building: vec![],
    };
    let text = serde_json::to_string(&report).unwrap_or_default();
    shared
        .store
        .set_meta(REPORT, text)
        .await
        .map_err(store_failed)?;
    tell(shared, &report);
    *lock(&shared.schema.report) = report;
    // Somebody may wait for what was just put down to be built.
    if !lock(&shared.schema.builds).is_empty() && ask != Ask::default() {
        shared.schema.wake.notify_one();
    }
    Ok(self::report(shared))
}

fn tell(shared: &Shared, report: &Report) {
    shared.notice("schema", report.notice());
}

/// Collections that neither side has any more.
async fn forget_absent(
    shared: &Shared,
    db: &str,
    local: &BTreeMap<String, Definition>,
    remote: &BTreeMap<String, Definition>,
) -> Result<(), Failure> {
    let mut gone = Vec::new();
    let known = shared.store.call(definitions::namespaces).await;
    for ns in known.map_err(store_failed)? {
        let Some((of, coll)) = shared.store.namespace_name(ns) else {
            continue;
        };
        if of == db && !local.contains_key(&coll) && !remote.contains_key(&coll) {
            gone.push(ns);
        }
    }
    for ns in &gone {
        for side in [Side::Local, Side::Remote] {
            note_volatile(shared, *ns, side, None);
        }
    }
    let forgotten = shared.store.call(move |c| {
        for ns in &gone {
            for tree in [
                Tree::Seen(Side::Local),
                Tree::Seen(Side::Remote),
                Tree::Base,
            ] {
                definitions::put(c, *ns, tree, None)?;
            }
        }
        Ok(())
    });
    forgotten.await.map_err(store_failed)
}

fn note_volatile(shared: &Shared, ns: u32, side: Side, definition: Option<&Definition>) {
    let volatile = definition.map(|d| Volatile {
        ttl: d.ttl(),
        capped: d.is_capped(),
    });
    let mut all = lock(&shared.schema.volatile);
    match volatile.filter(|v| *v != Volatile::default()) {
        Some(volatile) => all.insert((side, ns), volatile),
        None => all.remove(&(side, ns)),
    };
}
