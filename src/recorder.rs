//! Records on their way into the local database: `conflict_logs` and `sync_logs`.
//!
//! The store holds them until the local server has them, so a crash or an absent server loses none;
//! they are written by `_id`, so a repeat does no harm.

use std::sync::Arc;
use std::time::Duration;

use bson::doc;
use chrono::Utc;

use crate::failure::{Class, Failure};
use crate::identity;
use crate::lease::Journal;
use crate::raw::{Writer, index_name};
use crate::runs;
use crate::settle::store_failed;
use crate::shared::Shared;
use crate::store::{self, records};

/// Runs until the daemon ends; a second is soon enough for what people read.
pub async fn run(shared: Arc<Shared>) -> Result<(), Failure> {
    let mut indexed = false;
    while !shared.cancel.is_cancelled() {
        tokio::select! {
            () = shared.cancel.cancelled() => break,
            () = tokio::time::sleep(Duration::from_millis(300)) => {}
        }
        if let Some(run) = shared.runs.end_if_quiet() {
            tracing::info!(
                trigger = ?run.trigger, sent = run.local_to_remote.values().sum::<u64>(),
                fetched = run.remote_to_local.values().sum::<u64>(), conflicts = run.conflicts.values().sum::<u64>(), "synced"
            );
            shared
                .store
                .call(move |c| runs::record(c, &run))
                .await
                .map_err(store_failed)?;
        }
        match flush(&shared, &mut indexed).await {
            Ok(()) => {}
            Err(failure) if failure.class == Class::Fatal => return Err(failure),
            Err(failure) => tracing::debug!(%failure, "records wait"),
        }
    }
    Ok(())
}

/// Writes all records that wait.
pub async fn flush(shared: &Shared, indexed: &mut bool) -> Result<(), Failure> {
    if shared.stands_by() {
        // They keep until this daemon may write.
        return Ok(());
    }
    let _in_order = shared.flushing.lock().await;
    let journal = shared.lease().map(|lease| lease.journal());
    let owed = journal.map_or(0, Journal::unrecorded);
    loop {
        let waiting = shared
            .store
            .call(|c| records::waiting_records(c, 100))
            .await
            .map_err(store_failed)?;
        if waiting.is_empty() {
            if let Some(journal) = journal {
                journal.recorded(owed);
            }
            return Ok(());
        }
        if !*indexed {
            make_indexes(shared).await?;
            *indexed = true;
        }
        let db = shared.settings().records_db().to_owned();
        // One collection at a time, in order; a large record goes alone.
        let coll = waiting[0].coll.clone();
        let mut w = Writer::new();
        w.str("update", &coll)
            .bool("ordered", true)
            .open("writeConcern")
            .str("w", "majority")
            .close();
        w.open_array("updates");
        let mut taken = Vec::new();
        for record in waiting.iter().take_while(|r| r.coll == coll) {
            if !taken.is_empty() && w.len() + record.doc.len() > 8 << 20 {
                break;
            }
            w.open(index_name(taken.len()));
            w.open("q")
                .open("_id")
                .value("$eq", 0x07, &record.id)
                .close()
                .close();
            // Not by pipeline: bodies may have duplicate names, see `guard::form`.
            w.open("u").doc("$set", &record.doc).close();
            w.bool("upsert", true).close();
            taken.push(record.n);
        }
        let reply = shared.local.run(&db, w.command()).await?;
        if let Some(e) = reply
            .get_array("writeErrors")
            .ok()
            .and_then(|a| a.first()?.as_document())
        {
            let code = e.get_i32("code").unwrap_or(0);
            shared.notice(
                "records",
                Some(format!(
                    "records can't be written to {coll} in the local database (code {code})"
                )),
            );
            return Ok(());
        }
        // By this one a restored backup is told from the database that we know.
        let newest = (coll == "sync_logs").then(|| waiting[taken.len() - 1].id.clone());
        shared
            .store
            .call(move |c| {
                if let Some(last) = newest {
                    store::set_meta(c, identity::LAST_RECORD, last)?;
                }
                taken.iter().try_for_each(|n| records::drop_record(c, *n))
            })
            .await
            .map_err(store_failed)?;
    }
}

async fn make_indexes(shared: &Shared) -> Result<(), Failure> {
    let settings = shared.settings();
    let db = settings.records_db();
    let seconds = i64::try_from(settings.config.log_retention.as_secs()).unwrap_or(i64::MAX);
    let conflicts = doc! {"createIndexes": "conflict_logs", "indexes": [
        {"key": {"resolved": 1, "collection": 1, "timestamp": -1}, "name": "open"},
        {"key": {"localId": 1}, "name": "localId"},
        {"key": {"resolved": 1, "_id": -1}, "name": "page"},
        {"key": {"collection": 1, "_id": -1}, "name": "pageOfCollection"},
        {"key": {"parent": 1}, "name": "parent", "sparse": true},
    ]};
    let logs = doc! {"createIndexes": "sync_logs", "indexes": [
        {"key": {"startTime": -1}, "name": "startTime"},
        {"key": {"endTime": 1}, "name": "retention", "expireAfterSeconds": seconds},
    ]};
    shared.local.run_doc(db, conflicts).await?;
    match shared.local.run_doc(db, logs).await {
        // IndexOptionsConflict: the retention was changed since; the existing index is altered.
        Err(f) if f.code == Some(85) => {
            let change = doc! {"collMod": "sync_logs", "index": {"name": "retention", "expireAfterSeconds": seconds}};
            shared.local.run_doc(db, change).await.map(|_| ())
        }
        other => other.map(|_| ()),
    }
}

/// The last `limit` sync runs as they are on record, newest first.
pub async fn logs(shared: &Shared, limit: i64) -> Result<Vec<crate::command::SyncRun>, Failure> {
    let settings = shared.settings();
    let command =
        doc! {"find": "sync_logs", "sort": {"startTime": -1}, "limit": limit.clamp(1, 1000)};
    let raw = bson::RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("find"))?;
    let mut found = Vec::new();
    shared
        .local
        .query(settings.records_db(), raw, |d| found.push(d))
        .await?;
    let as_text = |d: &mut bson::Document, name: &str| {
        if let Ok(t) = d.get_datetime(name) {
            let text = chrono::DateTime::<Utc>::from_timestamp_millis(t.timestamp_millis())
                .map(|t| t.to_rfc3339());
            d.insert(name, text);
        }
    };
    Ok(found
        .iter()
        .filter_map(|raw| {
            let mut d = bson::Document::from_reader(raw.as_bytes()).ok()?;
            as_text(&mut d, "startTime");
            as_text(&mut d, "endTime");
            bson::deserialize_from_document(d).ok()
        })
        .collect())
}
