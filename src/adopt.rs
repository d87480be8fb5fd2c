//! Adopt: after a database was replaced, restored or mistrusted, a person says which side is right.
//!
//! `local`: the remote is made equal to the local database. `remote`: the reverse. `merge`: what only one
//! side has is copied to the other, nothing is deleted, clashes go by policy.
//!
//! It is done by base alone: both databases are compared whole, and where they differ base becomes
//! what the side that is *not* right holds now, as if both had agreed on that and the other side had
//! changed it since. Carrying that over is then the worker's ordinary, guarded work; whatever changes
//! behind the comparison is an ordinary change. What is going to be discarded is put on record first
//! (R21). The worker rests while base is being rewritten. Where it stands is on disk at any moment, so a
//! crash only means to go on.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bson::doc;
use bson::oid::ObjectId;
use chrono::Utc;
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};

use crate::command::{CommandError, RunStatus, SyncRun, Trigger};
use crate::conflicts::{BODIES, put_result};
use crate::content::strip;
use crate::decide::{Kind, Side};
use crate::extent::{self, Extent};
use crate::failure::Failure;
use crate::key::{Id, Key};
use crate::lift::confirmed_name;
use crate::progress::Meter;
use crate::raw::Writer;
use crate::settle::store_failed;
use crate::shared::{Settings, Shared, lock};
use crate::side::AMBIGUOUS_FOR;
use crate::store::queue::{self, Change};
use crate::store::{self, base, intents, records};
use crate::walk::{Found, Place, Range};
use crate::{halt, loss, reconcile, runs};

/// Name under which it is kept how far it is.
const UNDER_WAY: &str = "adopt";

/// Documents taken in at once.
const CHUNK: usize = 500;

/// Which side is right.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The local database: the remote is made equal to it.
    Local,
    /// The remote: the local database is made equal to it.
    Remote,
    /// Both: what only one has is copied to the other; nothing is deleted.
    Merge,
}

impl Mode {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Remote => "remote",
            Self::Merge => "merge",
        }
    }

    /// By its name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Local, Self::Remote, Self::Merge]
            .into_iter()
            .find(|mode| mode.name() == name)
    }

    /// The side whose version goes.
    fn discarded(self) -> Option<Side> {
        match self {
            Self::Local => Some(Side::Remote),
            Self::Remote => Some(Side::Local),
            Self::Merge => None,
        }
    }

    /// What it does, in a sentence.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::Local => {
                "The local database counts: the remote is made equal to it. What only the remote has is deleted \
                 there, what differs is overwritten; each discarded version stays on record."
            }
            Self::Remote => {
                "The remote database counts: the local one is made equal to it. What only the local one has is \
                 deleted there, what differs is overwritten; each discarded version stays on record."
            }
            Self::Merge => {
                "Both databases count: what only one side has is copied to the other, nothing is deleted; \
                 clashes go by the conflict policy."
            }
        }
    }
}

/// How far it is, as kept on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    mode: Mode,
    who: String,
    /// `_id` of its record in `conflict_logs`, the parent of what was discarded.
    record: ObjectId,
    /// Namespaces that are compared.
    done: Vec<u32>,
    /// The one at work.
    ns: Option<u32>,
    /// Where its next range begins.
    from: Option<Vec<u8>>,
    /// Base is complete: what differs is being carried over.
    settling: bool,
    discarded: u64,
}

/// Begins to adopt, inside a call. Conflicts of whole collections are settled by it.
pub fn begin(c: &Connection, mode: Mode, who: &str) -> rusqlite::Result<()> {
    let state = State {
        mode,
        who: who.into(),
        record: ObjectId::new(),
        done: vec![],
        ns: None,
        from: None,
        settling: false,
        discarded: 0,
    };
    let now = bson::DateTime::now();
    let strategy = match mode {
        Mode::Local => "keep_local",
        Mode::Remote => "keep_remote",
        Mode::Merge => "merge",
    };
    for (ns, halt) in halt::all(c)? {
        let record = doc! {
            "resolved": true, "resolutionStrategy": strategy, "resolvedBy": who, "resolvedAt": now,
            "notes": format!("settled by `reconcile --adopt {}`", mode.name()),
        };
        let bytes = record.to_vec().unwrap_or_default();
        records::put_record(c, "conflict_logs", &halt.conflict.bytes(), &bytes)?;
        halt::lift(c, ns)?;
    }
    let record = doc! {
        "collection": "*", "kind": Kind::Adopted.name(), "notes": mode.sentence(),
        "localId": null, "remoteId": null, "field": null, "localValue": null, "remoteValue": null,
        "timestamp": now, "resolved": true, "resolutionStrategy": strategy, "resolvedAt": now,
        "resolvedBy": who,
    };
    let bytes = record.to_vec().unwrap_or_default();
    records::put_record(c, "conflict_logs", &state.record.bytes(), &bytes)?;
    keep(c, &state)
}

fn keep(c: &Connection, state: &State) -> rusqlite::Result<()> {
    store::set_meta(
        c,
        UNDER_WAY,
        serde_json::to_string(state).unwrap_or_default(),
    )
}

async fn state(shared: &Shared) -> Result<Option<State>, Failure> {
    let text = shared.store.get_meta::<String>(UNDER_WAY).await;
    let text = text.map_err(store_failed)?;
    Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
}

/// After a start: the worker rests until what an earlier run began is through.
pub async fn load(shared: &Shared) -> Result<(), Failure> {
    let resting = state(shared).await?.is_some_and(|s| !s.settling);
    shared.adopting.store(resting, Ordering::Release);
    Ok(())
}

/// Whether it was begun and is not through.
pub async fn is_under_way(shared: &Shared) -> Result<bool, Failure> {
    Ok(state(shared).await?.is_some())
}

/// Adopts in the running daemon, and waits until both sides are as asked for.
pub async fn adopt(shared: &Arc<Shared>, mode: Mode, who: &str) -> Result<SyncRun, CommandError> {
    if is_under_way(shared).await? {
        return Err(CommandError::Refused(
            "a database is being adopted already; see `sangam status`".into(),
        ));
    }
    if shared.paused.load(Ordering::Relaxed) {
        return Err(CommandError::BadRequest(
            "syncing is paused; run `sangam resume` first".into(),
        ));
    }
    if shared.runs.is_owned() {
        return Err(CommandError::Busy);
    }
    tracing::info!(mode = mode.name(), by = who, "adopting");
    let halted: Vec<u32> = lock(&shared.halted).all().iter().copied().collect();
    shared.adopting.store(true, Ordering::Release);
    let who = who.to_owned();
    let begun = shared.store.call(move |c| begin(c, mode, &who)).await;
    if begun.is_err() {
        shared.adopting.store(false, Ordering::Release);
    }
    begun?;
    for ns in halted {
        halt::forget(shared, ns);
    }
    shared.failpoints.crash("adopt_begun");
    Ok(go_on(shared, Trigger::Manual).await?)
}

/// Goes on with what was begun, as a run of its own.
pub async fn go_on(shared: &Arc<Shared>, trigger: Trigger) -> Result<SyncRun, Failure> {
    let Some(before) = shared.runs.begin(trigger, vec![]) else {
        return Err(Failure::from_code(0, "a run is at work"));
    };
    let outcome = async {
        if let Some(run) = before {
            let recorded = shared.store.call(move |c| runs::record(c, &run));
            recorded.await.map_err(store_failed)?;
        }
        carry_out(shared).await
    }
    .await;
    *lock(&shared.progress) = None;
    if let Err(failure) = &outcome {
        shared.runs.error(failure.to_string());
    }
    let status = match &outcome {
        Ok(()) => RunStatus::Completed,
        Err(_) => RunStatus::Failed,
    };
    let run = shared
        .runs
        .end(status)
        .unwrap_or_else(|| unreachable!("the run was begun above"));
    let record = run.clone();
    let recorded = shared.store.call(move |c| runs::record(c, &record));
    recorded.await.map_err(store_failed)?;
    outcome.map(|()| run)
}

async fn carry_out(shared: &Arc<Shared>) -> Result<(), Failure> {
    let Some(mut state) = state(shared).await? else {
        return Ok(());
    };
    if !state.settling {
        rest(shared).await?;
        compare(shared, &mut state).await?;
        state.settling = true;
        let (kept, side) = (state.clone(), state.mode.discarded().map(Side::other));
        let stored = shared.store.call(move |c| {
            for ns in &kept.done {
                match side {
                    Some(side) => store::set_meta(c, &confirmed_name(*ns), side.name())?,
                    // Without a base, clashes are those of a first sync.
                    None => store::set_meta(c, &reconcile::first_name(*ns), 1)?,
                }
            }
            keep(c, &kept)
        });
        stored.await.map_err(store_failed)?;
    }
    if state.mode == Mode::Merge {
        lock(&shared.first_sync).extend(&state.done);
    }
    shared.adopting.store(false, Ordering::Release);
    shared.failpoints.crash("adopt_settling");
    let seq = shared.store.call(queue::last_seq).await;
    reconcile::drained(shared, seq.map_err(store_failed)?, &[]).await?;
    let ended = shared.store.call(move |c| {
        loss::forget_confirmed(c)?;
        for ns in &state.done {
            let name = reconcile::first_name(*ns);
            c.execute("DELETE FROM meta WHERE k = ?", [name])?;
        }
        let done = doc! {"discarded": i64::try_from(state.discarded).unwrap_or(i64::MAX)};
        let bytes = done.to_vec().unwrap_or_default();
        records::put_record(c, "conflict_logs", &state.record.bytes(), &bytes)?;
        c.execute("DELETE FROM meta WHERE k = ?", [UNDER_WAY])
    });
    ended.await.map_err(store_failed)?;
    lock(&shared.first_sync).clear();
    reconcile::load(shared).await.map_err(store_failed)
}

/// Waits until no batch is at work, and until no write of ours can still land; what was undecided is
/// then whatever the databases hold.
async fn rest(shared: &Arc<Shared>) -> Result<(), Failure> {
    while shared.in_flight.load(Ordering::Acquire) > 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let undecided = shared.store.call(intents::any);
    if undecided.await.map_err(store_failed)? {
        tokio::time::sleep(AMBIGUOUS_FOR).await;
        let dropped = shared.store.call(intents::forget_every);
        dropped.await.map_err(store_failed)?;
        if let Some(lease) = shared.lease() {
            lease.journal().forgotten();
        }
    }
    Ok(())
}

async fn compare(shared: &Arc<Shared>, state: &mut State) -> Result<(), Failure> {
    let settings = shared.settings();
    *lock(&shared.progress) = Some(Meter::new("adopt"));
    for extent in extent::of(shared, &settings, &[]).await? {
        if state.done.contains(&extent.ns) {
            continue;
        }
        let names = (extent.db.as_str(), extent.coll.as_str());
        let place = Place::open(shared, &settings, names, extent.ns).await?;
        let open = |m: &mut Meter| m.open(extent.shown.clone(), place.size().documents, 0, 0);
        let number = lock(&shared.progress).as_mut().map_or(0, open);
        if state.ns != Some(extent.ns) {
            forget_base(shared, extent.ns).await?;
            (state.ns, state.from) = (Some(extent.ns), None);
        }
        loop {
            let from = state.from.as_deref().map(Id::from_bytes);
            let to = place
                .bound(from.as_ref(), None, place.exact_range())
                .await?;
            let range = Range {
                from,
                to: to.clone(),
            };
            let mut found = Vec::new();
            let mut equal = Vec::new();
            let count = extent::compare(shared, &place, &range, |f| match f {
                Found::Differs(d) => found.push((d.key, d.id)),
                Found::Equal(key, content) => {
                    let encoded = shared
                        .store
                        .dictionaries()
                        .packer(key.ns())
                        .encode(&content);
                    equal.push((key, encoded));
                }
            })
            .await?;
            let pass = Pass {
                shared,
                settings: &settings,
                extent: &extent,
            };
            for some in found.chunks(CHUNK) {
                state.discarded += pass.take(some, state).await?;
            }
            state.from = to.as_ref().map(Id::to_bytes);
            if to.is_none() {
                state.done.push(extent.ns);
                state.ns = None;
            }
            let kept = state.clone();
            let stored = shared.store.call(move |c| {
                for (key, content) in &equal {
                    base::put_encoded(c, key, Some(content))?;
                }
                keep(c, &kept)
            });
            stored.await.map_err(store_failed)?;
            shared.failpoints.crash("adopt_range");
            if let Some(meter) = lock(&shared.progress).as_mut() {
                meter.add(number, count.documents, count.bytes);
            }
            if to.is_none() {
                break;
            }
        }
        if let Some(meter) = lock(&shared.progress).as_mut() {
            meter.finish(number);
        }
    }
    Ok(())
}

/// Base of a collection begins anew, so that it knows nothing that neither side has.
async fn forget_base(shared: &Shared, ns: u32) -> Result<(), Failure> {
    loop {
        let (first, end) = (ns.to_be_bytes().to_vec(), (ns + 1).to_be_bytes().to_vec());
        let some = shared.store.call(move |c| {
            c.prepare_cached(
                "DELETE FROM base WHERE key IN (SELECT key FROM base WHERE key >= ? AND key < ? LIMIT 5000)",
            )?
            .execute(params![first, end])
        });
        if some.await.map_err(store_failed)? == 0 {
            return Ok(());
        }
    }
}

struct Pass<'a> {
    shared: &'a Arc<Shared>,
    settings: &'a Settings,
    extent: &'a Extent,
}

impl Pass<'_> {
    /// Takes in documents that differ; how many versions are going to be discarded.
    async fn take(&self, some: &[(Key, Id)], state: &State) -> Result<u64, Failure> {
        let (shared, extent, mode) = (self.shared, self.extent, state.mode);
        let (here, there) = extent.read(shared, some.iter().map(|(_, id)| id)).await?;
        let mut rows = Vec::with_capacity(some.len());
        let mut discarded = 0;
        for (key, id) in some {
            let of = |side: Side| match side {
                Side::Local => here.get(key),
                Side::Remote => there.get(key),
            };
            let whole = mode.discarded().and_then(of);
            let content = whole.map(|d| strip(d, &self.settings.sync_fields).into_owned());
            let keeps = mode.discarded().and_then(|side| of(side.other()));
            let record = whole.zip(mode.discarded()).map(|(doc, side)| {
                discarded += 1;
                self.record(state, (key, id), (side, doc), keeps.map(Vec::as_slice))
            });
            rows.push((key.clone(), id.clone(), content, record));
        }
        let stored = shared.store.call(move |c| {
            let mut changes = Vec::with_capacity(rows.len());
            for (key, id, content, record) in rows {
                if let Some((id, fields)) = &record {
                    records::put_record(c, "conflict_logs", id, fields)?;
                }
                base::put(c, &key, content.as_deref())?;
                changes.push(Change {
                    key,
                    id,
                    hint: None,
                });
            }
            let now = Utc::now().timestamp_millis();
            queue::enqueue(c, Side::Local, &changes, now)?;
            queue::enqueue(c, Side::Remote, &changes, now)
        });
        stored.await.map_err(store_failed)?;
        Ok(discarded)
    }

    /// The record of one discarded version; its id follows from the document, so that a repeat
    /// after a crash writes the same record.
    fn record(
        &self,
        state: &State,
        (key, id): (&Key, &Id),
        (side, doc): (Side, &[u8]),
        kept: Option<&[u8]>,
    ) -> ([u8; 12], Vec<u8>) {
        let parent = state.record.bytes();
        let hash = xxhash_rust::xxh3::xxh3_128(&[&parent, key.as_bytes()].concat()).to_be_bytes();
        let mut own = parent;
        own[4..].copy_from_slice(&hash[..8]);
        let (name, other) = (side.name(), side.other().name());
        let fields = &self.settings.sync_fields;
        let content = strip(doc, fields);
        // Both are needed for `undo`; of two very large ones the discarded version has to do.
        let kept = kept.map(|d| strip(d, fields));
        let beside = kept.as_deref().filter(|d| d.len() + content.len() < BODIES);
        let mut w = Writer::new();
        w.value("parent", 0x07, &parent)
            .str("collection", &self.extent.shown)
            .str("kind", Kind::Adopted.name())
            .value(format!("{name}Id"), id.kind, &id.value)
            .value(format!("{other}Id"), 0x0A, &[])
            .doc(format!("{name}Document"), &content);
        match beside {
            Some(kept) => w.doc(format!("{other}Document"), kept),
            None => w.value(format!("{other}Document"), 0x0A, &[]),
        };
        w.value("baseDocument", 0x0A, &[])
            .bool("resolved", true)
            .str(
                "resolutionStrategy",
                match side {
                    Side::Local => "keep_remote",
                    Side::Remote => "keep_local",
                },
            )
            .str("resolvedBy", &state.who)
            .date("resolvedAt", Utc::now().timestamp_millis())
            .date("timestamp", Utc::now().timestamp_millis());
        put_result(&mut w, beside);
        (own, w.finish())
    }
}
