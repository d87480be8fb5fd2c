//! What the dashboard shows at a glance: status with the figures around it, and the collections.

use std::collections::{BTreeMap, BTreeSet};

use bson::doc;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::command::{CommandError, Status};
use crate::decide::Side;
use crate::disk;
use crate::failure::Failure;
use crate::handle::Handle;
use crate::history;
use crate::order::Goes;
use crate::reconcile;
use crate::shared::{Settings, Shared, lock};
use crate::store::queue;
use crate::vitals;

/// Answer to `overview`, and what the live events carry.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Overview {
    /// How things are.
    pub status: Status,
    /// Open conflicts by kind.
    pub conflicts_by_kind: BTreeMap<String, u64>,
    /// Most documents that can wait before changes are only noted as a whole.
    pub queue_limit_documents: u64,
    /// The same by the disk's free space.
    pub disk_limit_documents: Option<u64>,
    /// Free space above the reserve, in bytes.
    pub disk_headroom_bytes: Option<u64>,
    /// When both databases were last compared whole.
    pub last_compared: Option<DateTime<Utc>>,
    /// When they were last proven equal by a verify.
    pub last_verified: Option<DateTime<Utc>>,
    /// Documents that differed at the last verify.
    pub verify_differences: u64,
}

/// A collection with its counts.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CollectionState {
    /// Its name, `db.collection` when several databases are synced.
    pub collection: String,
    /// Documents in the local database; `None` while it can't be asked.
    pub local: Option<u64>,
    /// The same of the remote.
    pub remote: Option<u64>,
    /// Its changes that wait, both ways, conflicts included.
    pub pending: u64,
    /// When documents of it were last moved.
    pub last_change: Option<DateTime<Utc>>,
    /// It is held until a person decides.
    pub halted: bool,
    /// `first` or `last`, where `[link]` names it so.
    pub goes: Option<Goes>,
}

fn instant(ms: Option<i64>) -> Option<DateTime<Utc>> {
    ms.and_then(DateTime::from_timestamp_millis)
}

/// How things are, with the figures around it.
pub async fn take(handle: &Handle) -> Result<Overview, CommandError> {
    let status = handle.status().await?;
    let vitals = vitals::take(handle.shared()).await?;
    let headroom = vitals
        .free_disk
        .map(|free| free.saturating_sub(vitals.disk_reserve));
    Ok(Overview {
        status,
        conflicts_by_kind: vitals.conflicts,
        queue_limit_documents: vitals.queue_limit / disk::ROW,
        disk_limit_documents: headroom.map(|bytes| bytes / disk::ROW),
        disk_headroom_bytes: headroom,
        last_compared: instant(vitals.compared),
        last_verified: instant(vitals.verified),
        verify_differences: vitals.last_verify.map_or(0, |(_, n)| n),
    })
}

/// Every synced collection that is on either side.
pub async fn collections(shared: &Shared) -> Result<Vec<CollectionState>, CommandError> {
    let settings = shared.settings();
    let mut found = BTreeMap::new();
    for db in &settings.config.databases {
        // Either side may be away; what it has is then unknown.
        let here = reconcile::collections(shared, &settings, Side::Local, db).await;
        let there = match shared.link.is_online() {
            true => reconcile::collections(shared, &settings, Side::Remote, db).await,
            false => Ok(vec![]),
        };
        let names: BTreeSet<String> = [here?, there.unwrap_or_default()]
            .concat()
            .into_iter()
            .collect();
        for coll in names {
            let local = count(shared, Side::Local, db, &coll).await.ok();
            let remote = match shared.link.is_online() {
                true => count(shared, Side::Remote, db, &coll).await.ok(),
                false => None,
            };
            let shown = settings.display(db, &coll);
            let ns = shared.store.namespace(db, &coll).await?;
            found.insert(ns, (shown, local, remote));
        }
    }
    with_activity(shared, &settings, found).await
}

type Counted = BTreeMap<u32, (String, Option<u64>, Option<u64>)>;

async fn with_activity(
    shared: &Shared,
    settings: &Settings,
    found: Counted,
) -> Result<Vec<CollectionState>, CommandError> {
    let numbers: Vec<u32> = found.keys().copied().collect();
    let (waiting, mut active) = shared
        .store
        .call(move |c| {
            let waiting = numbers.iter().map(|n| queue::count_of(c, *n));
            let waiting: Vec<u64> = waiting.collect::<Result<_, _>>()?;
            Ok((waiting, history::activity(c)?))
        })
        .await?;
    active.extend(lock(&shared.activity).clone());
    let halted = lock(&shared.halted).all().clone();
    let mut states: Vec<_> = found
        .into_iter()
        .zip(waiting)
        .map(
            |((ns, (collection, local, remote)), pending)| CollectionState {
                last_change: instant(active.get(&collection).copied()),
                goes: goes(settings, &collection),
                halted: halted.contains(&ns),
                collection,
                local,
                remote,
                pending,
            },
        )
        .collect();
    states.sort_by(|a, b| a.collection.cmp(&b.collection));
    let synced = |s: &CollectionState| {
        let (db, coll) = settings.names_of(&s.collection);
        settings.is_synced(&db, &coll)
    };
    states.retain(synced);
    Ok(states)
}

fn goes(settings: &Settings, shown: &str) -> Option<Goes> {
    let (db, coll) = settings.names_of(shown);
    settings.order.goes(&db, &coll)
}

/// By the collection's own records, not by counting: this may be asked often.
async fn count(shared: &Shared, side: Side, db: &str, coll: &str) -> Result<u64, Failure> {
    let endpoint = shared.endpoint(side)?;
    let counted = endpoint.run_doc(db, doc! {"count": coll}).await;
    shared.note(side, &counted);
    let counted = counted?;
    let n = counted.get_i32("n").map(i64::from);
    let n = n.or_else(|_| counted.get_i64("n")).unwrap_or(0);
    Ok(u64::try_from(n).unwrap_or(0))
}
