//! Halted collections: a dropped or renamed collection is never propagated silently (R13).

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bson::{RawDocumentBuf, doc};

use crate::batch::{Item, Namespace, Planned, State};
use crate::config::OnDrop;
use crate::decide::{Kind, Side};
use crate::failure::Failure;
use crate::settle;
use crate::shared::{Shared, lock};
use crate::store::{self, StoreError, records};
use crate::tail;

const PREFIX: &str = "halted:";

/// Loads what was halted before this start.
pub async fn load(shared: &Shared) -> Result<(), StoreError> {
    let rows: Vec<(String, String)> = shared
        .store
        .call(|c| {
            c.prepare("SELECT k, v FROM meta WHERE k LIKE 'halted:%'")?
                .query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?
                .collect()
        })
        .await?;
    for (name, why) in rows {
        if let Some(ns) = name.strip_prefix(PREFIX).and_then(|n| n.parse().ok()) {
            lock(&shared.halted).insert(ns);
            shared.notice(&name, Some(why));
        }
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
        let record = doc! {
            "collection": &shown, "kind": Kind::CollectionDropped.name(), "notes": &why,
            "timestamp": bson::DateTime::now(), "resolved": false,
        };
        let bytes = record.to_vec().unwrap_or_default();
        let name = format!("{PREFIX}{ns}");
        let kept = why.clone();
        shared
            .store
            .call(move |c| {
                store::set_meta(c, &name, kept)?;
                let total: i64 = store::get_meta(c, "conflicts_total")?.unwrap_or(0);
                store::set_meta(c, "conflicts_total", total + 1)?;
                records::put_record(
                    c,
                    "conflict_logs",
                    &bson::oid::ObjectId::new().bytes(),
                    &bytes,
                )
            })
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
