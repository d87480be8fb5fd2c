//! Documents that both sides deleted while nobody looked: only base still knows them.
//!
//! Left there, a new document with that `_id` would look like an edit of a deleted one.

use std::collections::HashSet;
use std::sync::Arc;

use chrono::Utc;

use crate::decide::Side;
use crate::failure::Failure;
use crate::key::{Id, Key};
use crate::settle::store_failed;
use crate::shared::Shared;
use crate::store::base;
use crate::store::queue::{self, Change};

/// Keys of base looked at in one transaction.
const CHUNK: u32 = 2000;

/// A key as it is remembered during a comparison. Two keys of one hash would only leave a row in base.
pub(super) fn hash(key: &Key) -> u64 {
    xxhash_rust::xxh3::xxh3_64(key.as_bytes())
}

/// Queues the keys of a namespace that base knows and the comparison has not met on either side; the
/// worker looks at both sides once more before it forgets them.
pub(super) async fn queue(shared: &Arc<Shared>, ns: u32, met: HashSet<u64>) -> Result<(), Failure> {
    let met = Arc::new(met);
    let mut after = Vec::new();
    loop {
        let (met, from) = (met.clone(), after.clone());
        let looked = shared.store.call(move |c| {
            let found = base::keys_after(c, ns, &from, CHUNK)?;
            let last = found.last().map(|(key, _)| key.as_bytes().to_vec());
            let vanished = found
                .into_iter()
                .filter(|(key, _)| !met.contains(&hash(key)));
            let changes: Vec<Change> = vanished
                .filter_map(|(key, content)| {
                    let id = Id::of(&content?)?;
                    Some(Change {
                        key,
                        id,
                        hint: None,
                    })
                })
                .collect();
            queue::enqueue(c, Side::Remote, &changes, Utc::now().timestamp_millis())?;
            Ok(last)
        });
        match looked.await.map_err(store_failed)? {
            Some(last) => after = last,
            None => break,
        }
    }
    shared.wake.notify_one();
    Ok(())
}
