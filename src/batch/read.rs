//! Reading a batch's documents, within a limit of bytes.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Item, Namespace, State};
use crate::decide::Side;
use crate::failure::Failure;
use crate::key::{Id, KeyMap};
use crate::receipt;
use crate::shared::{Shared, lock};
use crate::side::Endpoint;

/// Most bytes of documents that one side contributes to a batch.
const BYTES: usize = 8 << 20;

/// Reads what has to be known. Both sides at once, a collection after the other.
pub(super) async fn read(
    shared: &Arc<Shared>,
    items: &mut [Item],
    again: bool,
) -> Result<(), Failure> {
    let mut by_ns: HashMap<u32, Vec<usize>> = HashMap::new();
    for (i, item) in items.iter_mut().enumerate() {
        if item.state == State::Look {
            item.remote_known = again || item.work.inbox.is_some() || item.work.intent.is_some();
            by_ns.entry(item.ns.number).or_default().push(i);
        }
    }
    let remote = shared.endpoint(Side::Remote)?;
    for indexes in by_ns.into_values() {
        let ns = items[indexes[0]].ns.clone();
        let ids: Vec<Id> = indexes.iter().map(|i| items[*i].work.id.clone()).collect();
        let known: Vec<bool> = indexes.iter().map(|i| items[*i].remote_known).collect();
        let there: Vec<Id> = ids
            .iter()
            .zip(&known)
            .filter(|(_, k)| **k)
            .map(|(id, _)| id.clone())
            .collect();
        let local_read = read_some(shared, &shared.local, &ns, &ids);
        let remote_read = read_some(shared, &remote, &ns, &there);
        let (local, remote) = tokio::join!(local_read, remote_read);
        if !there.is_empty() {
            shared.note(Side::Remote, &remote);
        }
        let (mut local, locals) = local?;
        let (mut remote, mut remotes) = remote?;
        for (at, i) in indexes.into_iter().enumerate() {
            let item = &mut items[i];
            item.local = local.remove(&item.work.key);
            item.remote = remote.remove(&item.work.key);
            let read = at < locals && (!known[at] || remotes > 0);
            remotes -= usize::from(known[at] && remotes > 0);
            if !read {
                // Large documents: the rest stays in the queue for the next batch.
                item.state = State::Done;
            }
        }
    }
    ask_receipts(shared, items).await
}

/// Asks for the outcome of writes that left a receipt, where it is not known.
async fn ask_receipts(shared: &Shared, items: &mut [Item]) -> Result<(), Failure> {
    let settings = shared.settings();
    for side in [Side::Local, Side::Remote] {
        let mut asked = Vec::new();
        for (i, item) in items.iter().enumerate() {
            let intent = item.work.intent.as_ref().filter(|i| i.side == side);
            let receipt = intent.and_then(|intent| intent.receipt);
            asked.extend(
                receipt
                    .filter(|_| item.state == State::Look)
                    .map(|r| (i, r)),
            );
        }
        if asked.is_empty() {
            continue;
        }
        let endpoint = shared.endpoint(side)?;
        // What is still open would tell nothing yet, and then happen.
        endpoint.end_leftovers().await?;
        let receipts: Vec<_> = asked.iter().map(|(_, receipt)| *receipt).collect();
        let happened = receipt::happened(&endpoint, settings.records_db(), &receipts).await;
        shared.note(side, &happened);
        for ((i, _), happened) in asked.into_iter().zip(happened?) {
            items[i].happened = Some(happened);
        }
    }
    Ok(())
}

/// Reads the first documents of a list, as many as fit [`BYTES`]; the number that was asked for. Of a
/// collection nobody has read yet, a few come first to learn how large they are.
async fn read_some(
    shared: &Shared,
    endpoint: &Arc<Endpoint>,
    ns: &Namespace,
    ids: &[Id],
) -> Result<(KeyMap<Vec<u8>>, usize), Failure> {
    const FIRST: usize = 16;
    // Half of what would fit, since some are larger than others.
    let size = lock(&shared.sizes).get(&ns.number).copied();
    let first = size.map_or(FIRST, |size| (BYTES / 2 / size.max(1)).max(FIRST));
    let mut found = KeyMap::default();
    let (mut asked, mut bytes) = (0, 0);
    while asked < ids.len() && (asked == 0 || bytes < BYTES) {
        let fit = if asked == 0 {
            first
        } else {
            (BYTES - bytes) * asked / bytes.max(1)
        };
        let next = &ids[asked..ids.len().min(asked + fit.max(1))];
        let some = endpoint
            .read(&ns.db, &ns.coll, ns.number, next.iter())
            .await?;
        asked += next.len();
        bytes += some.values().map(Vec::len).sum::<usize>();
        match found.is_empty() {
            true => found = some,
            false => found.extend(some),
        }
    }
    if !found.is_empty() {
        lock(&shared.sizes).insert(ns.number, bytes / found.len());
    }
    Ok((found, asked))
}
