//! What is gone from both sides is forgotten after a comparison (R11).
//!
//! A comparison meets what at least one side holds. A document that both deleted while nobody
//! looked would stay in base for ever, and a new one with its `_id` would look like an edit here
//! against a deletion there.

use std::collections::HashSet;
use std::sync::Arc;

use crate::decide::Side;
use crate::failure::Failure;
use crate::key::{Id, Key};
use crate::raw::{Writer, index_name};
use crate::settle::store_failed;
use crate::shared::{Shared, lock};
use crate::side::Endpoint;
use crate::store::base;
use crate::store::queue;

/// Documents looked up at once.
const CHUNK: usize = 1000;

/// Forgets base of the documents of a collection that neither side holds. `met` is how many documents
/// with a base the comparison met: if that is all, nothing has to be looked for.
pub(crate) async fn forget(
    shared: &Arc<Shared>,
    names: (&str, &str),
    ns: u32,
    met: u64,
) -> Result<(), Failure> {
    let count = shared.store.call(move |c| base::count_of(c, ns));
    if count.await.map_err(store_failed)? <= met {
        return Ok(());
    }
    let remote = shared.endpoint(Side::Remote)?;
    let mut after = None;
    loop {
        let from = after.clone();
        let chunk = shared
            .store
            .call(move |c| base::some_of(c, ns, from.as_ref(), CHUNK));
        let mut chunk = chunk.await.map_err(store_failed)?;
        let Some((last, _)) = chunk.last() else {
            return Ok(());
        };
        after = Some(last.clone());
        for endpoint in [&shared.local, &remote] {
            let held = held(endpoint, names, ns, &chunk).await;
            shared.note(endpoint.side, &held);
            let held = held?;
            chunk.retain(|(key, _)| !held.contains(key));
        }
        let context = shared.clone();
        let dropped = shared.store.call(move |c| {
            for (key, _) in &chunk {
                // One that is queued or being written is about to be decided.
                let at_work = lock(&context.busy).contains(key)
                    || queue::get_row(c, Side::Local, key)?.is_some()
                    || queue::get_row(c, Side::Remote, key)?.is_some()
                    || base::get_intent(c, key)?.is_some();
                if !at_work {
                    base::put(c, key, None)?;
                }
            }
            Ok(())
        });
        dropped.await.map_err(store_failed)?;
    }
}

/// Which of these documents a side holds.
async fn held(
    endpoint: &Arc<Endpoint>,
    (db, coll): (&str, &str),
    ns: u32,
    documents: &[(Key, Id)],
) -> Result<HashSet<Key>, Failure> {
    let mut found = HashSet::new();
    if documents.is_empty() {
        return Ok(found);
    }
    let mut w = Writer::new();
    w.str("find", coll)
        .open("filter")
        .open("_id")
        .open_array("$in");
    for (i, (_, id)) in documents.iter().enumerate() {
        w.value(index_name(i), id.kind, &id.value);
    }
    w.close().close().close();
    w.open("projection").i32("_id", 1).close();
    w.open("readConcern").str("level", "majority").close();
    endpoint
        .query(db, w.command(), |d| {
            found.extend(Id::of(d.as_bytes()).map(|id| Key::new(ns, &id)));
        })
        .await?;
    Ok(found)
}
