//! Halted collections: a dropped or renamed collection is never propagated silently (R13).

use std::collections::HashSet;
use std::sync::Arc;

use bson::doc;

use crate::config::OnDrop;
use crate::decide::{Kind, Side};
use crate::shared::{Shared, lock};
use crate::store::{self, StoreError, records};

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
