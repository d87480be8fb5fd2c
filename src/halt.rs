//! Halted collections: a dropped or renamed collection is never propagated silently (R13).
//!
//! A halt is a row of `meta` and a conflict on record. It is lifted by a resolution alone: the side
//! that is kept is then carried over by a reconcile.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use bson::doc;
use bson::oid::ObjectId;
use rusqlite::Connection;
use serde::{Deserialize, Serialize};

use crate::config::OnDrop;
use crate::decide::{Kind, Side};
use crate::reconcile;
use crate::shared::{Shared, lock};
use crate::store::definitions::{self, Tree};
use crate::store::{self, StoreError, records};

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

/// Which namespaces are halted, and when halts were lifted.
#[derive(Debug, Default)]
pub struct Halted {
    now: HashSet<u32>,
    lifted: HashMap<u32, Instant>,
}

impl Halted {
    /// Whether a namespace is halted.
    pub fn contains(&self, ns: u32) -> bool {
        self.now.contains(&ns)
    }

    /// All that are halted.
    pub fn all(&self) -> &HashSet<u32> {
        &self.now
    }

    /// Whether a halt was lifted after `since`: what was seen by then says nothing any more about what
    /// a side has lost, for a person has decided about it.
    pub fn was_lifted(&self, ns: u32, since: Instant) -> bool {
        self.lifted.get(&ns).is_some_and(|at| *at >= since)
    }

    /// Halts a namespace for what was seen at `since` or later; whether it was not halted, and had not
    /// been decided about meanwhile.
    fn begin(&mut self, ns: u32, since: Instant) -> bool {
        !self.was_lifted(ns, since) && self.now.insert(ns)
    }

    fn end(&mut self, ns: u32) {
        self.lifted.insert(ns, Instant::now());
        self.now.remove(&ns);
    }
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
    lock(&shared.halted).end(ns);
    shared.notice(&format!("{PREFIX}{ns}"), None);
}

/// Loads what was halted before this start.
pub async fn load(shared: &Shared) -> Result<(), StoreError> {
    for (ns, halt) in shared.store.call(all).await? {
        lock(&shared.halted).now.insert(ns);
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
        let why = format!("a collection of the {} database {what}", side.name());
        let name = db.to_owned();
        let asked = shared
            .store
            .call(move |c| reconcile::missed(c, &name, &why));
        asked.await?;
        shared.reconcile.notify_one();
        return Ok(());
    }
    let names: HashSet<String> = match coll {
        Some(coll) => HashSet::from([coll.to_owned()]),
        None => known(shared, db).await?,
    };
    for coll in names {
        let ns = shared.store.namespace(db, &coll).await?;
        if lock(&shared.halted).contains(ns) {
            continue;
        }
        let shown = settings.display(db, &coll);
        let why = format!(
            "collection {shown} {what} on the {} side; it is not synced until you decide (nothing was deleted on the other side)",
            side.name()
        );
        let (what, now) = ((Kind::CollectionDropped, side), Instant::now());
        put_in_place(shared, (ns, shown), what, now, why).await?;
    }
    Ok(())
}

/// Halts one collection, given with the name it is shown by; the side is the one that lost its
/// documents, as was seen at `since` or later. Without effect on one that is halted, or that a person
/// has decided about meanwhile.
pub async fn put_in_place(
    shared: &Arc<Shared>,
    (ns, shown): (u32, String),
    (kind, side): (Kind, Side),
    since: Instant,
    why: String,
) -> Result<(), StoreError> {
    if !lock(&shared.halted).begin(ns, since) {
        return Ok(());
    }
    let conflict = ObjectId::new();
    let (brings_back, carries_over) = match side {
        Side::Local => ("keep_remote", "keep_local"),
        Side::Remote => ("keep_local", "keep_remote"),
    };
    let why = format!(
        "{why}: `sangam resolve {conflict} --strategy {brings_back}` brings the documents back, \
         `--strategy {carries_over}` deletes them on the other side, too"
    );
    let halt = Halt {
        why: why.clone(),
        conflict,
        kind,
        side,
    };
    let placed = shared.store.call(move |c| put(c, ns, &shown, &halt)).await;
    if placed.is_err() {
        lock(&shared.halted).now.remove(&ns);
    }
    placed?;
    shared.notice(&format!("{PREFIX}{ns}"), Some(why));
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
