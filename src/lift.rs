//! Lifting a halt: a person says which side of a dropped or largely deleted collection is right.
//!
//! `keep_local` and `keep_remote` name the side that is right. Where that is the side that lost its
//! documents, the loss is carried over by an ordinary reconcile: base still has them, so they read as
//! deleted, and what the other side changed since is kept. Every document about to go is put on record
//! first (R21). Where it is the other side, base forgets what is missing, so that it reads as new and
//! comes back. Either may be repeated after a crash: the halt is lifted last.

use std::sync::Arc;

use bson::oid::ObjectId;
use chrono::Utc;
use rusqlite::params;
use serde_json::json;

use crate::command::CommandError;
use crate::conflicts::put_result;
use crate::decide::Side;
use crate::halt::{self, Halt};
use crate::key::{Id, Key, KeySet};
use crate::raw::Writer;
use crate::resolution::Strategy;
use crate::resolve::{Request, Resolution};
use crate::settle::store_failed;
use crate::shared::Shared;
use crate::store::{self, base, records};
use crate::{reconcile, ruling};

/// Documents of base looked at together.
const CHUNK: usize = 500;

/// Name under which a confirmed loss is kept until the reconcile has carried it over.
pub fn confirmed_name(ns: u32) -> String {
    format!("loss_confirmed:{ns}")
}

/// Resolves the conflict of a halted collection.
pub async fn resolve(
    shared: &Arc<Shared>,
    (ns, halt): (u32, Halt),
    request: Request,
) -> Result<Resolution, CommandError> {
    let keep = match (request.strategy, &request.value) {
        (_, Some(_)) => {
            return Err(CommandError::BadRequest(
                "this conflict is about a whole collection, so it takes no value".into(),
            ));
        }
        (Strategy::KeepLocal, None) => Side::Local,
        (Strategy::KeepRemote, None) => Side::Remote,
        (other, None) => {
            return Err(CommandError::BadRequest(format!(
                "{} does not fit a whole collection; choose keep_local or keep_remote",
                other.name()
            )));
        }
    };
    let Some((db, coll)) = shared.store.namespace_name(ns) else {
        return Err(CommandError::Failed("the collection is not known".into()));
    };
    shared.endpoint(Side::Remote)?;
    let collection = shared.settings().display(&db, &coll);
    let pass = Pass {
        shared,
        ns,
        names: (&db, &coll),
        halt: &halt,
        carry_over: keep == halt.side,
        request: &request,
        collection: &collection,
    };
    let documents = pass.run().await?;
    let message = if pass.carry_over {
        format!(
            "{documents} documents that are missing on the {} side are deleted on the other side, too, unless they were changed there since",
            halt.side.name()
        )
    } else {
        format!(
            "{documents} documents that are missing on the {} side come back from the other side",
            halt.side.name()
        )
    };
    if !request.dry_run {
        pass.lift(&message).await?;
        tracing::info!(
            conflict = %halt.conflict, collection, strategy = request.strategy.name(), by = request.who,
            "conflict resolved"
        );
    }
    Ok(Resolution {
        success: true,
        message,
        conflict_id: halt.conflict.to_hex(),
        strategy: request.strategy.name().into(),
        resolved_by: request.who.clone(),
        resolved_at: (!request.dry_run).then(Utc::now),
        dry_run: request.dry_run,
        settled: false,
        result: json!({ "documents": documents }),
    })
}

struct Pass<'a> {
    shared: &'a Arc<Shared>,
    ns: u32,
    names: (&'a str, &'a str),
    halt: &'a Halt,
    carry_over: bool,
    request: &'a Request,
    collection: &'a str,
}

impl Pass<'_> {
    /// Goes through base in the order of its keys; how many documents the side lacks.
    async fn run(&self) -> Result<u64, CommandError> {
        let (shared, ns) = (self.shared, self.ns);
        let endpoint = shared.endpoint(self.halt.side)?;
        let mut after = ns.to_be_bytes().to_vec();
        let mut documents = 0;
        loop {
            let from = after.clone();
            let chunk = shared.store.call(move |c| chunk(c, ns, &from)).await?;
            let Some((last, _, _)) = chunk.last() else {
                return Ok(documents);
            };
            after = last.as_bytes().to_vec();
            let there = endpoint
                .read(
                    self.names.0,
                    self.names.1,
                    ns,
                    chunk.iter().map(|(_, id, _)| id),
                )
                .await;
            shared.note(self.halt.side, &there);
            let there: KeySet = there?.into_keys().collect();
            let missing: Vec<_> = chunk
                .into_iter()
                .filter(|(key, ..)| !there.contains(key))
                .collect();
            documents += missing.len() as u64;
            if !self.request.dry_run {
                self.keep(missing).await?;
            }
        }
    }

    /// Puts on record what is going to be deleted, or lets base forget what is to come back.
    async fn keep(&self, missing: Vec<(Key, Id, Vec<u8>)>) -> Result<(), CommandError> {
        let carry_over = self.carry_over;
        let kept: Vec<_> = missing
            .into_iter()
            .map(|(key, id, body)| {
                let record = carry_over.then(|| self.record(&key, &id, &body));
                (key, id, record)
            })
            .collect();
        let call = self.shared.store.call(move |c| {
            for (key, _, record) in &kept {
                match record {
                    Some((id, fields)) => records::put_record(c, "conflict_logs", id, fields)?,
                    None => base::put(c, key, None)?,
                }
            }
            let keys: Vec<(Key, Id)> = kept.into_iter().map(|(key, id, _)| (key, id)).collect();
            ruling::look_again(c, &keys)
        });
        Ok(call.await?)
    }

    /// The record of one document that goes; its id follows from the document, so that a repeat
    /// after a crash writes the same record.
    fn record(&self, key: &Key, id: &Id, body: &[u8]) -> ([u8; 12], Vec<u8>) {
        let parent = self.halt.conflict.bytes();
        let hash = xxhash_rust::xxh3::xxh3_128(&[&parent, key.as_bytes()].concat()).to_be_bytes();
        let mut own = parent;
        own[4..].copy_from_slice(&hash[..8]);
        let (name, other) = match self.halt.side {
            Side::Local => ("remote", "local"),
            Side::Remote => ("local", "remote"),
        };
        let mut w = Writer::new();
        w.value("parent", 0x07, &parent)
            .str("collection", self.collection)
            .str("kind", self.halt.kind.name())
            .value(format!("{name}Id"), id.kind, &id.value)
            .value(format!("{other}Id"), 0x0A, &[])
            .doc(format!("{name}Document"), body)
            .value(format!("{other}Document"), 0x0A, &[])
            .doc("baseDocument", body)
            .bool("resolved", true)
            .str("resolutionStrategy", self.request.strategy.name())
            .str("resolvedBy", &self.request.who)
            .date("resolvedAt", Utc::now().timestamp_millis())
            .date("timestamp", Utc::now().timestamp_millis());
        put_result(&mut w, None);
        (own, w.finish())
    }

    /// Closes the conflict and lets the collection go on, by way of a reconcile.
    async fn lift(&self, message: &str) -> Result<(), CommandError> {
        let (ns, id) = (self.ns, self.halt.conflict.bytes());
        let mut w = Writer::new();
        w.bool("resolved", true)
            .str("resolutionStrategy", self.request.strategy.name())
            .str("resolvedBy", &self.request.who)
            .date("resolvedAt", Utc::now().timestamp_millis())
            .str("notes", self.request.notes.as_deref().unwrap_or(message));
        let fields = w.finish();
        let confirmed = self.carry_over.then(|| self.halt.side.name());
        self.shared
            .store
            .call(move |c| {
                halt::lift(c, ns)?;
                if let Some(side) = confirmed {
                    store::set_meta(c, &confirmed_name(ns), side)?;
                }
                records::put_record(c, "conflict_logs", &id, &fields)
            })
            .await
            .map_err(store_failed)?;
        halt::forget(self.shared, ns);
        reconcile::ask(self.shared, self.names.0, "a halt was lifted").await?;
        self.shared.wake.notify_one();
        self.shared.reconcile.notify_one();
        Ok(())
    }
}

/// The next documents of a collection in base: key, `_id`, content.
fn chunk(
    c: &rusqlite::Connection,
    ns: u32,
    after: &[u8],
) -> rusqlite::Result<Vec<(Key, Id, Vec<u8>)>> {
    let mut rows =
        c.prepare_cached("SELECT key, body FROM base WHERE key > ? ORDER BY key LIMIT ?")?;
    let mut rows = rows.query(params![after, i64::try_from(CHUNK).unwrap_or(i64::MAX)])?;
    let mut found = Vec::new();
    while let Some(r) = rows.next()? {
        let key = Key::from_bytes(r.get_ref(0)?.as_blob()?);
        if key.ns() != ns {
            break;
        }
        let body = base::decode(r.get_ref(1)?.as_blob()?).unwrap_or_default();
        // A damaged row has no `_id` to ask for; the reconcile finds its document.
        if let Some(id) = Id::of(&body) {
            found.push((key, id, body));
        }
    }
    Ok(found)
}

/// Records of the documents that a lifted halt let go, for `undo`.
pub fn children(id: ObjectId) -> bson::Document {
    bson::doc! {"find": "conflict_logs", "filter": {"parent": id, "undoneAt": null}, "batchSize": 100}
}
