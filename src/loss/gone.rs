//! Collections that are gone, and databases that are suddenly empty.

use std::sync::Arc;
use std::time::Instant;

use bson::{Document, RawDocumentBuf, doc};
use rusqlite::{Connection, params};

use crate::config::OnDrop;
use crate::decide::{Kind, Side};
use crate::failure::Failure;
use crate::halt;
use crate::lift::confirmed_name;
use crate::settle::store_failed;
use crate::shared::{Settings, Shared};
use crate::store;

/// A database that lost all its documents is held when it had so many.
const EMPTIED: u64 = 20;

/// Halts a collection that a side no longer has, as was seen at `since` or later.
pub(super) async fn gone(
    shared: &Arc<Shared>,
    settings: &Settings,
    (side, ns): (Side, u32),
    (db, coll): (&str, &str),
    since: Instant,
) -> Result<(), Failure> {
    let shown = settings.display(db, coll);
    let why = format!(
        "collection {shown} does not exist any more on the {} side (dropped or renamed, or another server answers there); \
         it is not synced until you decide (nothing was deleted on the other side)",
        side.name()
    );
    let what = (Kind::CollectionDropped, side);
    halt::put_in_place(shared, (ns, shown), what, since, why)
        .await
        .map_err(store_failed)
}

/// The number of documents of a collection as its server keeps it. After a crash of the server that
/// number may be wrong, down to nothing: nothing is counted again, document by document.
pub(crate) async fn count_on(
    shared: &Shared,
    side: Side,
    db: &str,
    coll: &str,
) -> Result<u64, Failure> {
    match counted(shared, side, db, doc! {"count": coll}).await? {
        0 => {
            let each = doc! {"count": coll, "query": {"_id": {"$exists": true}}};
            counted(shared, side, db, each).await
        }
        n => Ok(n),
    }
}

async fn counted(shared: &Shared, side: Side, db: &str, count: Document) -> Result<u64, Failure> {
    let answer = shared.endpoint(side)?.run_doc(db, count).await;
    shared.note(side, &answer);
    let answer = answer?;
    let n = answer
        .get_i32("n")
        .map(i64::from)
        .or_else(|_| answer.get_i64("n"))
        .or_else(|_| answer.get_f64("n").map(|n| n as i64));
    Ok(n.ok().and_then(|n| u64::try_from(n).ok()).unwrap_or(0))
}

pub(super) async fn is_gone(
    shared: &Shared,
    side: Side,
    db: &str,
    coll: &str,
) -> Result<bool, Failure> {
    let command = doc! {"listCollections": 1, "nameOnly": true, "filter": {"name": coll}};
    let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("listCollections"))?;
    let mut found = false;
    let endpoint = shared.endpoint(side)?;
    endpoint.query(db, raw, |_| found = true).await?;
    Ok(!found)
}

/// Before a comparison: halts collections that base knows and a side no longer has, and all of a
/// database whose collections on one side are all empty. Nothing else may tell of either: a drop where
/// nothing is followed, a blank server under the old name. `known` is from `since` or later, and from
/// before the `names` on both sides were listed: the worker may have made a collection since.
pub(crate) async fn before_comparison(
    shared: &Arc<Shared>,
    settings: &Settings,
    (db, mut known): (&str, Vec<Known>),
    names: [&[String]; 2],
    since: Instant,
) -> Result<(), Failure> {
    if settings.config.sync.on_drop == OnDrop::Propagate {
        return Ok(());
    }
    known.retain(|(_, coll, _)| settings.is_synced(db, coll));
    for side in [Side::Local, Side::Remote] {
        let mut left = 0;
        for (ns, coll, confirmed) in &known {
            let listed = names[side as usize].contains(coll);
            // It may have come to be since the names were listed: by a document of the other side.
            if !listed && is_gone(shared, side, db, coll).await? {
                if confirmed.as_deref() != Some(side.name()) {
                    gone(shared, settings, (side, *ns), (db, coll), since).await?;
                }
            } else {
                left += count_on(shared, side, db, coll).await?;
            }
        }
        if left == 0 {
            emptied(shared, settings, side, (db, &known), since).await?;
        }
    }
    Ok(())
}

/// Halts every collection of a database that has no document left on a side.
async fn emptied(
    shared: &Arc<Shared>,
    settings: &Settings,
    side: Side,
    (db, known): (&str, &[Known]),
    since: Instant,
) -> Result<(), Failure> {
    let numbers: Vec<u32> = known.iter().map(|(ns, ..)| *ns).collect();
    let had = shared.store.call(move |c| {
        let mut had = 0;
        for ns in numbers {
            let (low, high) = (ns.to_be_bytes().to_vec(), (ns + 1).to_be_bytes().to_vec());
            let some = "SELECT count(*) FROM (SELECT 1 FROM base WHERE key >= ? AND key < ?
                 AND substr(body, 1, 1) < x'10' LIMIT ?)";
            let some: u64 = c
                .prepare_cached(some)?
                .query_row(params![low, high, EMPTIED], |r| r.get(0))?;
            had += some;
        }
        Ok(had)
    });
    if had.await.map_err(store_failed)? < EMPTIED {
        return Ok(());
    }
    for (ns, coll, confirmed) in known {
        if confirmed.as_deref() == Some(side.name()) {
            continue;
        }
        let shown = settings.display(db, coll);
        let why = format!(
            "collection {shown}: the whole database is suddenly empty on the {} side (a wrong or blank server, perhaps); \
             it is not synced until you decide (nothing was deleted on the other side)",
            side.name()
        );
        let what = (Kind::MassDelete, side);
        halt::put_in_place(shared, (*ns, shown), what, since, why)
            .await
            .map_err(store_failed)?;
    }
    Ok(())
}

/// A collection that base knows documents of: number, name, the side whose loss is confirmed.
pub(crate) type Known = (u32, String, Option<String>);

/// The collections of a database that base knows.
pub(crate) fn known(c: &Connection, db: &str) -> rusqlite::Result<Vec<Known>> {
    let mut named = c.prepare_cached("SELECT n, coll FROM namespaces WHERE db = ? ORDER BY n")?;
    let named = named.query_map([db], |r| Ok((r.get::<_, u32>(0)?, r.get::<_, String>(1)?)))?;
    let mut found = Vec::new();
    for row in named {
        let (ns, coll) = row?;
        let (low, high) = (ns.to_be_bytes().to_vec(), (ns + 1).to_be_bytes().to_vec());
        let any: bool = c
            .prepare_cached("SELECT EXISTS(SELECT 1 FROM base WHERE key >= ? AND key < ?)")?
            .query_row(params![low, high], |r| r.get(0))?;
        if any {
            found.push((ns, coll, store::get_meta(c, &confirmed_name(ns))?));
        }
    }
    Ok(found)
}
