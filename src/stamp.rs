//! Stamping: keeps the sync fields of local documents current, behind the traffic.
//!
//! A stamp says what the store knows *now* (pending, synced, conflict, failed) and is guarded by the
//! whole document as read, so that an edit that came in between never looks synced. Documents with
//! duplicate names are left alone: no pipeline can carry them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::content::{has_duplicates, strip};
use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::guard::{self, Verdict};
use crate::key::{Id, Key, KeyMap, KeySet};
use crate::raw::{self, Writer, index_name};
use crate::settle::store_failed;
use crate::shared::{Settings, Shared, lock};
use crate::store::queue;
use crate::store::{base, records};

/// Documents stamped in one command.
const BATCH: u32 = 1000;

/// Bytes of documents in one command, which has each of them in its guard; a larger one goes alone.
const BYTES: usize = 8 << 20;

/// Longest wait for the traffic to pause, before each command.
const PATIENCE: Duration = Duration::from_secs(2);

/// Runs until the daemon ends.
pub async fn run(shared: Arc<Shared>) -> Result<(), Failure> {
    loop {
        tokio::select! {
            () = shared.cancel.cancelled() => return Ok(()),
            () = shared.stamp.notified() => {}
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
        loop {
            // Between any two commands, or a long drain would share the server with its stamps.
            pause_in_traffic(&shared).await;
            match stamp_some(&shared).await {
                Ok(0) => break,
                Ok(_) => {}
                Err(failure) if failure.class == Class::Fatal => return Err(failure),
                Err(failure) => {
                    tracing::debug!(%failure, "stamping waits");
                    break;
                }
            }
        }
    }
}

/// Waits until few documents move, but not for ever.
async fn pause_in_traffic(shared: &Shared) {
    let began = tokio::time::Instant::now();
    while shared.in_flight.load(Ordering::Relaxed) > 1
        && began.elapsed() < PATIENCE
        && !shared.cancel.is_cancelled()
    {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What a document's fields shall say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Synced(Side),
    Pending,
    Conflict,
    Failed,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Self::Synced(_) => "synced",
            Self::Pending => "pending",
            Self::Conflict => "conflict",
            Self::Failed => "failed",
        }
    }
}

struct Due {
    key: Key,
    id: Id,
    request: i64,
    status: Status,
    base: Option<Vec<u8>>,
}

fn due(c: &rusqlite::Connection) -> rusqlite::Result<Vec<Due>> {
    let mut all = Vec::new();
    for (key, id, request) in records::due_stamps(c, BATCH)? {
        let held: Option<Option<String>> = {
            use rusqlite::OptionalExtension as _;
            c.prepare_cached("SELECT held FROM outbox WHERE key = ? UNION ALL SELECT held FROM inbox WHERE key = ? LIMIT 1")?
                .query_row([key.as_bytes(), key.as_bytes()], |r| r.get(0))
                .optional()?
        };
        let outbox = queue::get_row(c, Side::Local, &key)?;
        let status = match held {
            Some(Some(held)) if held == "failed" => Status::Failed,
            Some(Some(_)) => Status::Conflict,
            _ if outbox.is_some() => Status::Pending,
            _ => Status::Synced(Side::Local),
        };
        let base = base::get(c, &key)?;
        all.push(Due {
            key,
            id,
            request,
            status,
            base,
        });
    }
    Ok(all)
}

async fn stamp_some(shared: &Arc<Shared>) -> Result<usize, Failure> {
    let settings = shared.settings();
    let due = shared.store.call(due).await.map_err(store_failed)?;
    let mut again: KeySet = KeySet::default();
    if settings.config.sync.stamp_documents {
        let mut by_ns: HashMap<u32, Vec<&Due>> = HashMap::new();
        for d in &due {
            by_ns.entry(d.key.ns()).or_default().push(d);
        }
        for (ns, due) in by_ns {
            let Some((db, coll)) = shared.store.namespace_name(ns) else {
                continue;
            };
            // As large as documents of this collection were when last read.
            let size = lock(&shared.sizes).get(&ns).copied().unwrap_or(0);
            for chunk in due.chunks((BYTES / size.max(1)).clamp(1, BATCH as usize)) {
                let docs = shared
                    .local
                    .read(&db, &coll, ns, chunk.iter().map(|d| &d.id))
                    .await?;
                if shared.stands_by() {
                    again.extend(not_as_due(&settings, chunk, &docs));
                    continue;
                }
                for part in parts(chunk, &docs) {
                    again.extend(write(shared, &settings, (&db, &coll), part, &docs).await?);
                }
            }
        }
    }
    let context = shared.clone();
    let forgotten = shared.store.call(move |c| {
        let mut count = 0;
        for d in due.iter().filter(|d| !again.contains(&d.key)) {
            // Whoever works on the document may have read it before it was called pending, and would
            // leave it so: the request stays until that is over.
            if d.status == Status::Pending
                && (lock(&context.busy).contains(&d.key)
                    || queue::get_row(c, Side::Local, &d.key)?.is_none())
            {
                continue;
            }
            if d.status == Status::Pending {
                // An echo would leave unseen, and the document would stay pending.
                queue::forget_hint(c, Side::Local, &d.key)?;
            }
            records::drop_stamp(c, &d.key, d.request)?;
            count += 1;
        }
        Ok(count)
    });
    forgotten.await.map_err(store_failed)
}

/// Cuts a chunk so that the documents of each part fit one command.
fn parts<'a, 'd>(chunk: &'a [&'d Due], docs: &KeyMap<Vec<u8>>) -> Vec<&'a [&'d Due]> {
    let mut parts = vec![];
    let (mut begin, mut bytes) = (0, 0);
    for (i, d) in chunk.iter().enumerate() {
        let size = docs.get(&d.key).map_or(0, Vec::len);
        if i > begin && bytes + size > BYTES {
            parts.push(&chunk[begin..i]);
            (begin, bytes) = (i, 0);
        }
        bytes += size;
    }
    parts.push(&chunk[begin..]);
    parts
}

/// Documents whose fields don't say what they shall: on a standby they wait, for it or its holder.
fn not_as_due(settings: &Settings, due: &[&Due], docs: &KeyMap<Vec<u8>>) -> Vec<Key> {
    let status = settings.config.fields.sync_status.as_bytes();
    let differs = |d: &&&Due| {
        let says = docs.get(&d.key).map(|doc| raw::get(doc, status));
        says.is_some_and(|e| e.as_ref().and_then(raw::text) != Some(d.status.name()))
    };
    due.iter().filter(differs).map(|d| d.key.clone()).collect()
}

/// Stamps a part. The documents that were not as read any more: their stamp is still due.
async fn write(
    shared: &Shared,
    settings: &Settings,
    (db, coll): (&str, &str),
    due: &[&Due],
    docs: &KeyMap<Vec<u8>>,
) -> Result<Vec<Key>, Failure> {
    let fields = &settings.config.fields;
    let fence = shared.local.fence();
    let mut w = Writer::new();
    w.str("update", coll).bool("ordered", false);
    w.i32("maxTimeMS", guard::max_time(fence));
    // The next look reads what a majority has: it must not miss this stamp.
    w.open("writeConcern").str("w", "majority").close();
    w.open_array("updates");
    let mut stamped = Vec::new();
    for d in due {
        let Some(doc) = docs.get(&d.key) else {
            continue;
        };
        let says = raw::get(doc, fields.sync_status.as_bytes());
        let says = says.as_ref().and_then(raw::text);
        let current = says == Some(d.status.name()) && !matches!(d.status, Status::Synced(_));
        // Synced only if the document still is what both sides agreed on: an edit whose event is
        // still on its way must not look synced.
        let stale = matches!(d.status, Status::Synced(_))
            && d.base.as_deref() != Some(strip(doc, &settings.sync_fields).as_ref());
        if current || stale || has_duplicates(doc) {
            continue;
        }
        w.open(index_name(stamped.len()));
        guard::query(&mut w, &d.id);
        w.open_array("u")
            .open("0")
            .open("$replaceWith")
            .open_array("$cond");
        guard::timely(&mut w, "0", fence, |w, name| {
            w.open(name)
                .open_array("$eq")
                .str("0", "$$ROOT")
                .open("1")
                .doc("$literal", doc)
                .close()
                .close()
                .close();
        });
        w.open("1")
            .open_array("$mergeObjects")
            .str("0", "$$ROOT")
            .open("1")
            .str(&fields.sync_status, d.status.name());
        if let Status::Synced(origin) = d.status {
            w.str(&fields.synced_at, "$$NOW")
                .str(&fields.origin, origin.name());
        }
        w.close().close().close();
        // Not `$$ROOT`: what came in between may have duplicate names, and be written changed.
        guard::refusal(&mut w, "2");
        w.close();
        // `$replaceWith`, its stage, the pipeline, the statement.
        w.close().close().close().close();
        stamped.push(d.key.clone());
    }
    w.close();
    let mut again = Vec::new();
    if stamped.is_empty() {
        return Ok(again);
    }
    let reply = match shared.local.run(db, w.command()).await {
        // Not allowed, say: the next command fares no better, and the content is unharmed.
        Err(failure) if failure.class == Class::Rejected => {
            shared.notice(
                "stamps",
                Some(format!(
                    "the sync fields of local documents can't be written: {failure}"
                )),
            );
            return Ok(again);
        }
        reply => reply?,
    };
    shared.notice("stamps", None);
    for error in reply.get_array("writeErrors").into_iter().flatten() {
        let Some(error) = error.as_document() else {
            continue;
        };
        let index = error
            .get_i32("index")
            .ok()
            .and_then(|i| usize::try_from(i).ok());
        match (guard::verdict_of(error), index.and_then(|i| stamped.get(i))) {
            // The second: it came too late for a lease.
            (Verdict::Modified | Verdict::Unknown { .. }, Some(key)) => again.push(key.clone()),
            // A validator of the app's own may refuse the sync fields; the content is unharmed.
            _ => tracing::debug!(coll, "a document could not be stamped"),
        }
    }
    Ok(again)
}
