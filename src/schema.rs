//! Indexes and options of collections: what one side has comes to exist on the other.
//!
//! A task of its own looks at both sides at the start, when a stream tells of a change, and before
//! each comparison (so that on a first sync indexes come before data). What is to be done is decided
//! by [`plan`], from three trees; nothing is ever dropped. An index of a collection that holds
//! documents is built in the background, for as long as it takes. What can't be done, or is not to be
//! done without a person, is a [`Finding`]: kept in the state store, shown by `sangam schema`, and
//! told in `status`.

mod build;
mod definition;
mod findings;
mod plan;
mod read;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chrono::Utc;
use tokio::sync::Notify;

use crate::config::SchemaSync;
use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::settle::store_failed;
use crate::shared::{Settings, Shared, lock};
use crate::store::definitions::{self, Tree};
use crate::store::{self, StoreError};

use build::{Build, Refusal};
pub use definition::{Definition, Index, Ttl};
use findings::Findings;
pub use findings::{Finding, FindingKind, Report};
use plan::{Step, Trees, plan};

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

/// Runs until the daemon ends.
pub async fn run(shared: Arc<Shared>) -> Result<(), Failure> {
    let mut builder = build::Builder::default();
    let mut wanted = Some(Ask::default());
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

/// A look at one collection.
struct One<'a> {
    shared: &'a Arc<Shared>,
    settings: &'a Settings,
    names: (&'a str, &'a str),
    ns: u32,
    ask: Ask,
    /// What was refused before.
    known: &'a [Refusal],
    /// What is refused now.
    refusals: &'a mut Vec<Refusal>,
    findings: &'a mut Findings,
}

impl One<'_> {
    async fn look(
        &mut self,
        local: Option<&Definition>,
        remote: Option<&Definition>,
    ) -> Result<(), Failure> {
        let shared = self.shared;
        let ns = self.ns;
        let seen = [local.cloned(), remote.cloned()];
        let base = shared
            .store
            .call(move |c| {
                let [local, remote] = &seen;
                definitions::put(c, ns, Tree::Seen(Side::Local), local.as_ref())?;
                definitions::put(c, ns, Tree::Seen(Side::Remote), remote.as_ref())?;
                definitions::get(c, ns, Tree::Base)
            })
            .await
            .map_err(store_failed)?;
        note_volatile(shared, ns, Side::Local, local);
        note_volatile(shared, ns, Side::Remote, remote);
        if lock(&shared.halted).contains(&ns) {
            return Ok(());
        }
        let trees = Trees {
            local,
            base: base.as_ref(),
            remote,
        };
        let (steps, agreed) = plan(trees, self.settings.config.schema_sync);
        for step in steps {
            self.step(step).await?;
        }
        self.pull_index(remote).await?;
        if agreed != base {
            let stored = shared
                .store
                .call(move |c| definitions::put(c, ns, Tree::Base, agreed.as_ref()));
            stored.await.map_err(store_failed)?;
        }
        Ok(())
    }

    /// Whether something may be made now, by configuration or because a person asked.
    fn may_make(&self) -> bool {
        let config = &self.settings.config;
        self.shared.may_work()
            && (self.ask.create
                || (config.schema_sync != SchemaSync::Report && config.sync.auto_sync_enabled))
    }

    async fn step(&mut self, step: Step) -> Result<(), Failure> {
        match step {
            Step::Create { on, options } if self.may_make() => {
                let (db, coll) = self.names;
                build::create_collection(self.shared, on, (db, coll), options)
                    .await
                    .or_else(|f| self.refused(on, None, f))
            }
            Step::Modify { on, change } if self.may_make() => {
                let (db, coll) = self.names;
                let what = change.keys().cloned().collect::<Vec<_>>().join(", ");
                build::modify(self.shared, on, (db, coll), change)
                    .await
                    .or_else(|f| self.refused(on, Some(what), f))
            }
            Step::Create { on, .. } => {
                self.find(
                    FindingKind::Missing,
                    on,
                    None,
                    "the collection is not there".into(),
                );
                Ok(())
            }
            Step::Modify { on, change } => {
                let what = change.keys().cloned().collect::<Vec<_>>().join(", ");
                let text = format!("{what} changed on the {} side", on.other().name());
                self.find(FindingKind::Options, on, None, text);
                Ok(())
            }
            Step::Index { on, index } => self.index(on, index, FindingKind::Missing).await,
            Step::Dropped { on, index } if self.ask.create => {
                self.index(on, index, FindingKind::Dropped).await
            }
            Step::Dropped { on, index } => {
                let text = format!(
                    "both sides had it; it was dropped on the {} side. `sangam schema --create` makes it \
                     there again; or drop it on the {} side, too",
                    on.name(),
                    on.other().name()
                );
                self.find(FindingKind::Dropped, on, Some(&index.name), text);
                Ok(())
            }
            Step::Differ {
                name,
                what,
                changed,
            } => {
                let text = format!(
                    "the two sides have it with other {}{}; drop the wrong one, and it is made like the other",
                    what.join(", "),
                    changed_text(changed)
                );
                self.findings
                    .add(self.shown(), None, FindingKind::Differs, Some(name), text);
                Ok(())
            }
            Step::Options { what, changed } => {
                let text = format!(
                    "the collection's {} differ{}",
                    what.join(", "),
                    changed_text(changed)
                );
                self.findings
                    .add(self.shown(), None, FindingKind::Options, None, text);
                Ok(())
            }
        }
    }

    /// Makes an index now if the collection is empty there, or puts it down for the builder.
    async fn index(&mut self, on: Side, index: Index, kind: FindingKind) -> Result<(), Failure> {
        let build = Build {
            side: on,
            db: self.names.0.to_owned(),
            coll: self.names.1.to_owned(),
            index,
        };
        if let Some(refusal) = self.known.iter().find(|r| r.is_about(&build))
            && !self.ask.retry
            && !self.ask.create
        {
            self.findings.refused(self.shown(), refusal);
            self.refusals.push(refusal.clone());
            return Ok(());
        }
        if !self.may_make() {
            let text = format!("the {} side has it", on.other().name());
            self.find(kind, on, Some(&build.index.name), text);
            return Ok(());
        }
        if !self.ask.create
            && let Some(ttl) = build.index.ttl()
            && build::holds_due(self.shared, &build, &ttl).await?
        {
            let text = format!(
                "with it the {} side would delete documents that are due already; if that is meant, \
                 `sangam schema --create` makes it",
                on.name()
            );
            self.find(FindingKind::WouldExpire, on, Some(&build.index.name), text);
            return Ok(());
        }
        if !build::is_empty(self.shared, &build).await? {
            let mut builds = lock(&self.shared.schema.builds);
            if !builds.contains(&build) {
                builds.push(build);
            }
            return Ok(());
        }
        match build::create(self.shared, &build).await {
            Ok(()) => Ok(()),
            Err(failure) if failure.class == Class::Rejected => {
                let refusal = Refusal::new(&build, &failure);
                self.findings.refused(self.shown(), &refusal);
                self.refusals.push(refusal);
                Ok(())
            }
            Err(failure) => Err(failure),
        }
    }

    /// A timestamp pull of a large collection reads all of it without an index on the timestamp.
    async fn pull_index(&mut self, remote: Option<&Definition>) -> Result<(), Failure> {
        const LARGE: u64 = 1000;
        let Some(remote) = remote.filter(|_| !self.shared.follows()) else {
            return Ok(());
        };
        let (db, coll) = self.names;
        let fields = &self.settings.config.fields;
        let stamped = self.settings.config.sync.stamp_documents;
        let needed = [&fields.updated_at, &fields.synced_at];
        for field in needed.into_iter().take(if stamped { 2 } else { 1 }) {
            if remote.indexes.iter().any(|i| i.serves(field))
                || build::count(self.shared, Side::Remote, (db, coll)).await? < LARGE
            {
                continue;
            }
            let index = Index {
                name: format!("{field}_1"),
                key: bson::doc! {field: 1},
                options: bson::Document::new(),
            };
            if self.ask.create {
                self.index(Side::Remote, index, FindingKind::NoPullIndex)
                    .await?;
            } else {
                let text = format!(
                    "changes are asked for by {field}, and without an index on it each time the whole \
                     collection is read; `sangam schema --create` makes it"
                );
                self.find(
                    FindingKind::NoPullIndex,
                    Side::Remote,
                    Some(&index.name),
                    text,
                );
            }
        }
        Ok(())
    }

    fn shown(&self) -> String {
        self.settings.display(self.names.0, self.names.1)
    }

    fn find(&mut self, kind: FindingKind, on: Side, index: Option<&str>, text: String) {
        self.findings
            .add(self.shown(), Some(on), kind, index.map(str::to_owned), text);
    }

    /// A refusal of what is no index: reported, and tried again at the next look.
    fn refused(&mut self, on: Side, what: Option<String>, failure: Failure) -> Result<(), Failure> {
        if failure.class != Class::Rejected && failure.code != Some(crate::failure::UNAUTHORIZED) {
            return Err(failure);
        }
        let what = what.unwrap_or_else(|| "making the collection".into());
        let text = format!(
            "{what}: the {} database refuses it: {failure}{}",
            on.name(),
            findings::hint(failure.code)
        );
        self.find(FindingKind::Refused, on, None, text);
        Ok(())
    }
}

fn changed_text(changed: Option<Side>) -> String {
    changed.map_or(String::new(), |side| {
        format!(" (the {} side changed since both agreed)", side.name())
    })
}
