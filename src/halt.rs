//! Halted collections: a dropped or renamed collection is never propagated silently (R13).
//!
//! A halt is a row of `meta` and a conflict on record. It is lifted by a resolution alone: the side
//! that is kept is then carried over by a reconcile.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bson::oid::ObjectId;
use bson::{RawDocumentBuf, doc};
use rusqlite::Connection;
use serde::{Deserialize, Serialize};

use crate::batch::{Item, Namespace, Planned, State};
use crate::config::OnDrop;
use crate::decide::{Kind, Side};
use crate::failure::Failure;
use crate::settle;
use crate::shared::{Shared, lock};
use crate::store::definitions::{self, Tree};
use crate::store::{self, StoreError, records};
use crate::tail;

const PREFIX: &str = "halted:";

/// Why a collection is halted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Halt {
    /// A sentence for a person.
    pub why: String,
    /// `_id` of its record in `conflict_logs`.
    pub conflict: ObjectId,
    /// `collection_dropped` or `mass_delete`.
    pub kind: Kind,
    /// The side that lost its documents.
    pub side: Side,
}

/// Every halt by namespace number.
pub fn all(c: &Connection) -> rusqlite::Result<Vec<(u32, Halt)>> {
    let mut rows = c.prepare_cached("SELECT k, v FROM meta WHERE k LIKE 'halted:%'")?;
    let rows = rows.query_map([], |r| Ok((r.get::<_, String>(0)?, r.get::<_, String>(1)?)))?;
    let mut found = Vec::new();
    for row in rows {
        let (name, text) = row?;
        let ns = name.strip_prefix(PREFIX).and_then(|n| n.parse().ok());
        if let (Some(ns), Ok(halt)) = (ns, serde_json::from_str(&text)) {
            found.push((ns, halt));
        }
    }
    Ok(found)
}

/// Puts a halt and its record in place, inside a call. Without effect on one that is halted.
pub fn put(c: &Connection, ns: u32, collection: &str, halt: &Halt) -> rusqlite::Result<()> {
    let name = format!("{PREFIX}{ns}");
    if store::get_meta::<String>(c, &name)?.is_some() {
        return Ok(());
    }
    let record = doc! {
        "collection": collection, "kind": halt.kind.name(), "notes": &halt.why,
        "localId": null, "remoteId": null, "field": null, "localValue": null, "remoteValue": null,
        "side": halt.side.name(), "timestamp": bson::DateTime::now(), "resolved": false,
        "resolutionStrategy": null, "resolvedAt": null, "resolvedBy": null,
    };
    store::set_meta(c, &name, serde_json::to_string(halt).unwrap_or_default())?;
    let total: i64 = store::get_meta(c, "conflicts_total")?.unwrap_or(0);
    store::set_meta(c, "conflicts_total", total + 1)?;
    let bytes = record.to_vec().unwrap_or_default();
    records::put_record(c, "conflict_logs", &halt.conflict.bytes(), &bytes)
}

/// Takes a halt back, inside a call; [`Shared::halted`] follows by [`forget`].
pub fn lift(c: &Connection, ns: u32) -> rusqlite::Result<()> {
    c.execute("DELETE FROM meta WHERE k = ?", [format!("{PREFIX}{ns}")])?;
    // Indexes that went with the collection were not dropped one by one: they come back with it.
    definitions::put(c, ns, Tree::Base, None)
}

/// Lets the tasks work on a collection again.
pub fn forget(shared: &Shared, ns: u32) {
    lock(&shared.halted).remove(&ns);
    shared.notice(&format!("{PREFIX}{ns}"), None);
}

/// Loads what was halted before this start.
pub async fn load(shared: &Shared) -> Result<(), StoreError> {
    for (ns, halt) in shared.store.call(all).await? {
        lock(&shared.halted).insert(ns);
        shared.notice(&format!("{PREFIX}{ns}"), Some(halt.why));
    }
    Ok(())
}

/// Halts a collection, or every known one of a database, and puts it on record; with
/// `on_drop = "propagate"` the queue is left to carry the loss over by reconcile.
pub async fn halt(
    shared: &Arc<Shared>,
    side: Side,
    db: &str,
    coll: Option<&str>,
    what: &str,
) -> Result<(), StoreError> {
    let settings = shared.settings();
    if settings.config.sync.on_drop == OnDrop::Propagate {
        let flag = crate::tail::reconcile_name(db);
        let why = format!("a collection of the {} database {what}", side.name());
        shared.store.set_meta(&flag, why).await?;
        shared.reconcile.notify_one();
        return Ok(());
    }
    let names: HashSet<String> = match coll {
        Some(coll) => HashSet::from([coll.to_owned()]),
        None => known(shared, db).await?,
    };
    for coll in names {
        let ns = shared.store.namespace(db, &coll).await?;
        if lock(&shared.halted).contains(&ns) {
            continue;
        }
        let shown = settings.display(db, &coll);
        let why = format!(
            "collection {shown} {what} on the {} side; it is not synced until you decide (nothing was deleted on the other side)",
            side.name()
        );
        let halt = Halt {
            why: why.clone(),
            conflict: ObjectId::new(),
            kind: Kind::CollectionDropped,
            side,
        };
        shared
            .store
            .call(move |c| put(c, ns, &shown, &halt))
            .await?;
        lock(&shared.halted).insert(ns);
        shared.notice(&format!("{PREFIX}{ns}"), Some(why));
    }
    Ok(())
}

async fn known(shared: &Shared, db: &str) -> Result<HashSet<String>, StoreError> {
    let db = db.to_owned();
    shared
        .store
        .call(move |c| {
            c.prepare("SELECT coll FROM namespaces WHERE db = ?")?
                .query_map([&db], |r| r.get(0))?
                .collect()
        })
        .await
}

/// How long the event of a drop may take until it is read.
const PATIENCE: Duration = Duration::from_secs(10);

/// Takes deletions out of a batch whose whole collection is gone from the side they come from and
/// whose drop the stream has not told yet: a queue is read by state, which is ahead of the events,
/// and would carry the drop over one document at a time (R13).
pub(crate) async fn hold_vanished(
    shared: &Arc<Shared>,
    items: &mut [Item],
    planned: &mut Vec<Planned>,
) -> Result<(), Failure> {
    if shared.settings().config.sync.on_drop == OnDrop::Propagate {
        return Ok(());
    }
    let mut held: HashMap<(Side, u32), bool> = HashMap::new();
    for p in planned.iter().filter(|p| p.write.new.is_none()) {
        let (from, ns) = (p.side.other(), &items[p.item].ns);
        if let Entry::Vacant(entry) = held.entry((from, ns.number)) {
            let vanished = is_vanished(shared, from, ns).await?;
            entry.insert(vanished && !is_known(shared, from, ns).await);
        }
    }
    let mut left = Vec::new();
    planned.retain(|p| {
        let item = &mut items[p.item];
        let hold = p.write.new.is_none() && held[&(p.side.other(), item.ns.number)];
        if hold {
            item.state = State::Done;
            left.push(item.work.clone());
        }
        !hold
    });
    settle::put_back(shared, left, Duration::from_secs(1)).await
}

async fn is_vanished(shared: &Shared, side: Side, ns: &Namespace) -> Result<bool, Failure> {
    let command = doc! {"listCollections": 1, "nameOnly": true, "filter": {"name": &ns.coll}};
    let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("listCollections"))?;
    let mut found = false;
    let endpoint = shared.endpoint(side)?;
    endpoint.query(&ns.db, raw, |_| found = true).await?;
    Ok(!found)
}

/// Whether the drop was told and somebody has decided since; where nothing tells, there is nothing
/// to wait for.
async fn is_known(shared: &Shared, side: Side, ns: &Namespace) -> bool {
    let told = side == Side::Local || shared.follows();
    !told
        || tail::catch_up(shared, side, PATIENCE).await
            && !lock(&shared.halted).contains(&ns.number)
}
