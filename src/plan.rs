//! Plan: what a sync would do. Reads both sides and decides, and writes nothing anywhere.
//!
//! Of what is queued as a rule; of everything that differs where a comparison is due or asked for. With
//! a way to adopt, what `reconcile --adopt` would do.

mod clash;

use std::collections::BTreeMap;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::adopt::Mode;
use crate::command::{CommandError, SyncRun};
use crate::content::strip;
use crate::daemon::reconcile_pending;
use crate::decide::{self, Decision, Kind, Side, Target, View};
use crate::expiry;
use crate::extent::{self, Extent};
use crate::failure::Failure;
use crate::key::{Id, Key, KeyMap};
use crate::loss;
use crate::settle::store_failed;
use crate::shared::{Settings, Shared, lock};
use crate::store::{base, queue};
use crate::verify::rules;
use crate::walk::{Found, Place, Range};
use crate::words;

/// Documents decided together.
const CHUNK: usize = 500;

/// What to plan.
#[derive(Clone, Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Request {
    /// Compare both databases whole instead of looking at what is queued
    #[serde(default)]
    pub compare: bool,
    /// Only this collection; several with commas between
    #[serde(default)]
    pub collections: Option<String>,
    /// What `reconcile --adopt` would do in this way; compares
    #[serde(default)]
    pub adopt: Option<Mode>,
}

/// What would be written to one side.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Writes {
    /// Documents that come to be.
    pub creates: u64,
    /// Documents that change.
    pub updates: u64,
    /// Documents that go.
    pub deletes: u64,
    /// Bytes of the documents written, before compression.
    pub bytes: u64,
}

impl Writes {
    fn add(&mut self, other: &Self) {
        self.creates += other.creates;
        self.updates += other.updates;
        self.deletes += other.deletes;
        self.bytes += other.bytes;
    }

    fn documents(&self) -> u64 {
        self.creates + self.updates + self.deletes
    }
}

/// What would become of one collection.
#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Outlook {
    /// Its name.
    pub collection: String,
    /// Written to the remote.
    pub to_remote: Writes,
    /// Written to the local database.
    pub to_local: Writes,
    /// Documents whose changes of both sides are joined; counted as updates of both sides, too.
    pub merges: u64,
    /// Documents that both sides changed and that the policy settles, with both versions on record.
    pub settled_by_policy: u64,
    /// Documents that would wait for a person's decision.
    pub conflicts: u64,
    /// Documents whose unique value another document on the other side has.
    pub unique_clashes: u64,
    /// Documents that wait for a person already, in conflict or set aside.
    pub held: u64,
    /// The deletions would be held until a person confirms them (R13).
    pub deletes_held: bool,
    /// The whole collection waits for a person's word: nothing of it moves.
    pub halted: bool,
}

impl Outlook {
    fn add(&mut self, other: &Self) {
        self.to_remote.add(&other.to_remote);
        self.to_local.add(&other.to_local);
        self.merges += other.merges;
        self.settled_by_policy += other.settled_by_policy;
        self.conflicts += other.conflicts;
        self.unique_clashes += other.unique_clashes;
        self.held += other.held;
        self.deletes_held |= other.deletes_held;
        self.halted |= other.halted;
    }

    fn is_nothing(&self) -> bool {
        let moved = self.to_remote.documents() + self.to_local.documents();
        moved + self.conflicts + self.held == 0 && !self.halted
    }
}

/// What was moved lately, by the last runs that moved enough to tell.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rate {
    /// Documents a second.
    pub documents_per_second: f64,
    /// Bytes a second.
    pub bytes_per_second: f64,
}

/// What a sync would do.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// When it was made.
    pub at: DateTime<Utc>,
    /// `queue` or `comparison`.
    pub source: String,
    /// Sums over all collections.
    pub total: Outlook,
    /// By collection, those of which nothing would move left out.
    pub collections: Vec<Outlook>,
    /// How fast it has gone lately; `None` while nobody can tell.
    pub rate: Option<Rate>,
    /// Time at that rate in seconds.
    pub seconds: Option<f64>,
}

/// Makes a plan. The remote has to be reachable.
pub async fn plan(shared: &Arc<Shared>, request: &Request) -> Result<Plan, CommandError> {
    let settings = shared.settings();
    if settings.config.remote_uri.is_none() {
        return Err(CommandError::NotConfigured);
    }
    let only: Vec<String> = request
        .collections
        .iter()
        .flat_map(|names| names.split(','))
        .map(str::to_owned)
        .collect();
    extent::check(&settings, &only)?;
    let all = extent::of(shared, &settings, &only).await?;
    let compare = request.compare || request.adopt.is_some() || reconcile_pending(shared).await?;
    let mut made = BTreeMap::new();
    for extent in all {
        let mut draft = Draft::new(shared, &settings, &extent, request.adopt).await?;
        if extent.halted && request.adopt.is_none() {
            draft.outlook.halted = true;
        } else if compare {
            draft.by_comparison().await?;
        } else {
            draft.by_queue().await?;
        }
        let outlook = draft.finish().await?;
        if !outlook.is_nothing() {
            made.insert(extent.shown, outlook);
        }
    }
    let mut total = Outlook::default();
    made.values().for_each(|o| total.add(o));
    let rate = rate(&crate::recorder::logs(shared, 50).await?);
    let documents = total.to_remote.documents() + total.to_local.documents();
    let bytes = total.to_remote.bytes + total.to_local.bytes;
    let seconds = rate.as_ref().map(|r| {
        let by_documents = documents as f64 / r.documents_per_second;
        by_documents.max(bytes as f64 / r.bytes_per_second.max(1.0))
    });
    Ok(Plan {
        at: Utc::now(),
        source: if compare { "comparison" } else { "queue" }.into(),
        total,
        collections: made.into_values().collect(),
        rate,
        seconds,
    })
}

/// Of the last runs that moved a hundred documents or more.
fn rate(runs: &[SyncRun]) -> Option<Rate> {
    let moved = |r: &SyncRun| words::sum(&r.local_to_remote) + words::sum(&r.remote_to_local);
    let telling = runs.iter().filter(|r| moved(r) >= 100).take(5);
    let (documents, bytes, seconds) = telling.fold((0, 0, 0.0), |(d, b, s), r| {
        (
            d + moved(r),
            b + r.bytes_transferred,
            s + r.duration_seconds.max(0.05),
        )
    });
    (documents > 0).then(|| Rate {
        documents_per_second: documents as f64 / seconds,
        bytes_per_second: bytes as f64 / seconds,
    })
}

/// A document to be decided: what each side holds, and base.
struct Case {
    key: Key,
    local: Option<Vec<u8>>,
    base: Option<Vec<u8>>,
    remote: Option<Vec<u8>>,
}

/// The plan of one collection in the making.
struct Draft<'a> {
    shared: &'a Arc<Shared>,
    settings: &'a Settings,
    extent: &'a Extent,
    adopt: Option<Mode>,
    outlook: Outlook,
    /// Unique indexes by side: local, remote.
    indexes: [Vec<clash::Index>; 2],
}

impl<'a> Draft<'a> {
    async fn new(
        shared: &'a Arc<Shared>,
        settings: &'a Settings,
        extent: &'a Extent,
        adopt: Option<Mode>,
    ) -> Result<Self, Failure> {
        let mut indexes = [vec![], vec![]];
        for side in [Side::Local, Side::Remote] {
            indexes[side as usize] = clash::indexes(shared, side, extent).await?;
        }
        Ok(Self {
            shared,
            settings,
            extent,
            adopt,
            outlook: Outlook {
                collection: extent.shown.clone(),
                ..Outlook::default()
            },
            indexes,
        })
    }

    /// Decides what waits in the queues.
    async fn by_queue(&mut self) -> Result<(), Failure> {
        let (ns, mut after) = (self.extent.ns, Vec::new());
        loop {
            let from = after.clone();
            let rows = self
                .shared
                .store
                .call(move |c| queue::of_namespace(c, ns, &from, CHUNK));
            let rows = rows.await.map_err(store_failed)?;
            let Some(last) = rows.last() else {
                return Ok(());
            };
            after = last.key.as_bytes().to_vec();
            self.outlook.held += rows.iter().filter(|r| r.held).count() as u64;
            let open: Vec<(Key, Id)> = rows
                .into_iter()
                .filter(|r| !r.held)
                .map(|r| (r.key, r.id))
                .collect();
            self.look(&open).await?;
        }
    }

    /// Decides all that differs.
    async fn by_comparison(&mut self) -> Result<(), Failure> {
        let extent = self.extent;
        let names = (extent.db.as_str(), extent.coll.as_str());
        let place = Place::open(self.shared, self.settings, names, extent.ns).await?;
        let mut from = None;
        loop {
            let to = place
                .bound(from.as_ref(), None, place.exact_range())
                .await?;
            let range = Range {
                from: from.take(),
                to: to.clone(),
            };
            let mut open = Vec::new();
            extent::compare(self.shared, &place, &range, |found| {
                if let Found::Differs(d) = found {
                    open.push((d.key, d.id));
                }
            })
            .await?;
            for some in open.chunks(CHUNK) {
                self.look(some).await?;
            }
            match to {
                Some(id) => from = Some(id),
                None => return Ok(()),
            }
        }
    }

    /// Reads documents on both sides and decides them.
    async fn look(&mut self, some: &[(Key, Id)]) -> Result<(), Failure> {
        let (shared, extent) = (self.shared, self.extent);
        let (here, there) = extent.read(shared, some.iter().map(|(_, id)| id)).await?;
        let keys: Vec<Key> = some.iter().map(|(key, _)| key.clone()).collect();
        let known = shared.store.call(move |c| {
            keys.into_iter()
                .map(|key| {
                    let standing = crate::store::differences::standing(c, &key)?;
                    Ok((base::get_marked(c, &key)?, standing, key))
                })
                .collect::<rusqlite::Result<Vec<_>>>()
        });
        let mut writes = [vec![], vec![]];
        for ((base, left), standing, key) in known.await.map_err(store_failed)? {
            use crate::store::differences::Standing::{Conflict, Failed};
            if matches!(standing, Conflict | Failed) && self.adopt.is_none() {
                self.outlook.held += 1;
                continue;
            }
            let content = |found: &KeyMap<Vec<u8>>| {
                found
                    .get(&key)
                    .map(|d| strip(d, &self.settings.sync_fields).into_owned())
            };
            let (local, remote) = (content(&here), content(&there));
            let view = View {
                local: local.as_deref(),
                base: base.as_deref(),
                remote: remote.as_deref(),
            };
            if self.adopt.is_none() && expiry::is_at_rest(left, view) {
                continue;
            }
            let base = match self.adopt {
                None => base,
                Some(Mode::Merge) => None,
                Some(Mode::Local) => remote.clone(),
                Some(Mode::Remote) => local.clone(),
            };
            let case = Case {
                key,
                local,
                base,
                remote,
            };
            self.decide(case, &mut writes);
        }
        for side in [Side::Local, Side::Remote] {
            let clashes = clash::count(
                shared,
                (side, extent),
                &self.indexes[side as usize],
                &writes[side as usize],
            );
            self.outlook.unique_clashes += clashes.await?;
        }
        Ok(())
    }

    /// Decides one document and counts what it comes to; what would be written, by side.
    fn decide(&mut self, case: Case, writes: &mut [Vec<(Key, Vec<u8>)>; 2]) {
        let mut rules = rules(self.shared, self.settings, &self.extent.coll);
        rules.first_sync = self.adopt == Some(Mode::Merge);
        let view = View {
            local: case.local.as_deref(),
            base: case.base.as_deref(),
            remote: case.remote.as_deref(),
        };
        let (target, clash) = match decide::decide(view, rules) {
            Decision::Agree => return,
            Decision::Hold(_) => {
                self.outlook.conflicts += 1;
                return;
            }
            Decision::Settle(target, clash) => (target, clash),
        };
        self.outlook.settled_by_policy +=
            u64::from(clash.is_some_and(|c| c.kind != Kind::UniqueField));
        let mut write = |side: Side, old: Option<&[u8]>, new: Option<&[u8]>| {
            let counted = match side {
                Side::Local => &mut self.outlook.to_local,
                Side::Remote => &mut self.outlook.to_remote,
            };
            match (old, new) {
                (_, None) => counted.deletes += 1,
                (None, Some(_)) => counted.creates += 1,
                _ => counted.updates += 1,
            }
            if let Some(new) = new {
                counted.bytes += new.len() as u64;
                writes[side as usize].push((case.key.clone(), new.to_vec()));
            }
        };
        match &target {
            Target::Local => write(Side::Remote, view.remote, view.local),
            Target::Remote => write(Side::Local, view.local, view.remote),
            Target::Merged(merged) => {
                write(Side::Remote, view.remote, Some(merged));
                write(Side::Local, view.local, Some(merged));
                self.outlook.merges += 1;
            }
        }
    }

    async fn finish(mut self) -> Result<Outlook, Failure> {
        let percent = u64::from(self.settings.config.sync.mass_delete_percent);
        if self.adopt.is_none() && percent > 0 {
            for (side, deletes) in [
                (Side::Local, self.outlook.to_local.deletes),
                (Side::Remote, self.outlook.to_remote.deletes),
            ] {
                if deletes >= loss::FEWEST {
                    let names = (self.extent.db.as_str(), self.extent.coll.as_str());
                    let there = loss::count_on(self.shared, side, names.0, names.1).await?;
                    self.outlook.deletes_held |= loss::is_mass(deletes, there, percent);
                }
            }
        }
        self.outlook.halted |=
            lock(&self.shared.halted).contains(self.extent.ns) && self.adopt.is_none();
        Ok(self.outlook)
    }
}
