//! Making indexes: at once where a collection is empty, else in the background, one at a time a side.
//!
//! A build takes as long as it takes. When the link goes, or the daemon, the server builds on; asking
//! for the same index again joins the build that is under way, or finds it done.

use std::sync::Arc;
use std::time::Duration;

use bson::{Document, RawDocumentBuf, doc};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::definition::{Index, Ttl};
use super::findings::{Building, hint};
use crate::decide::Side;
use crate::failure::{Class, Failure, Reason};
use crate::settle::store_failed;
use crate::shared::{Settings, Shared, lock};

/// Name under which refusals are kept.
const REFUSALS: &str = "schema_refusals";

/// The server's `NamespaceExists`.
const NAMESPACE_EXISTS: i32 = 48;

/// Longest look for documents that are due.
const DUE_MS: i32 = 4000;

/// An index to be made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Build {
    pub(super) side: Side,
    pub(super) db: String,
    pub(super) coll: String,
    pub(super) index: Index,
}

impl Build {
    pub(super) fn shown(&self, settings: &Settings) -> Building {
        Building {
            collection: settings.display(&self.db, &self.coll),
            side: self.side,
            index: self.index.name.clone(),
        }
    }

    fn command(&self) -> Document {
        doc! {
            "createIndexes": &self.coll,
            "indexes": [self.index.to_spec()],
            "writeConcern": {"w": "majority"},
        }
    }
}

/// An index that a server would not build.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Refusal {
    pub(super) build: Build,
    code: Option<i32>,
    /// The server's name of the code; its words may hold values (R23).
    name: String,
}

impl Refusal {
    pub(super) fn new(build: &Build, failure: &Failure) -> Self {
        Self {
            build: build.clone(),
            code: failure.code,
            name: failure.what.clone(),
        }
    }

    pub(super) fn is_about(&self, build: &Build) -> bool {
        self.build == *build
    }

    pub(super) fn why(&self) -> String {
        let code = self.code.map_or(String::new(), |c| format!(" (code {c})"));
        format!(": {}{code}{}", self.name, hint(self.code))
    }
}

/// What was refused so far.
pub(super) async fn refusals(shared: &Shared) -> Result<Vec<Refusal>, Failure> {
    let text: Option<String> = shared
        .store
        .get_meta(REFUSALS)
        .await
        .map_err(store_failed)?;
    Ok(text
        .and_then(|t| serde_json::from_str(&t).ok())
        .unwrap_or_default())
}

/// Keeps these alone.
pub(super) async fn keep_refusals(shared: &Shared, all: Vec<Refusal>) -> Result<(), Failure> {
    let text = serde_json::to_string(&all).unwrap_or_default();
    let kept = shared.store.set_meta(REFUSALS, text).await;
    kept.map_err(store_failed)
}

/// What became of a build.
pub(super) struct Built {
    build: Build,
    outcome: Result<(), Failure>,
}

/// Builds in the background, one on each side.
#[derive(Default)]
pub(super) struct Builder {
    at_work: JoinSet<Built>,
    sides: Vec<Side>,
}

impl Builder {
    pub(super) fn is_idle(&self) -> bool {
        self.at_work.is_empty()
    }

    /// Starts what waits and may be started.
    pub(super) fn start(&mut self, shared: &Arc<Shared>) {
        if !shared.may_work() || shared.withholds() {
            return;
        }
        for side in [Side::Local, Side::Remote] {
            let next = lock(&shared.schema.builds)
                .iter()
                .find(|b| b.side == side)
                .cloned();
            let Some(build) = next.filter(|_| !self.sides.contains(&side)) else {
                continue;
            };
            let shared = shared.clone();
            self.sides.push(side);
            self.at_work.spawn(async move {
                let shown = build.shown(&shared.settings());
                tracing::info!(
                    collection = shown.collection,
                    side = side.name(),
                    index = shown.index,
                    "building an index"
                );
                let outcome = build_long(&shared, &build).await;
                Built { build, outcome }
            });
        }
    }

    /// The next build that ended.
    pub(super) async fn next(&mut self) -> Result<Built, Failure> {
        match self.at_work.join_next().await {
            Some(Ok(built)) => {
                self.sides.retain(|s| *s != built.build.side);
                Ok(built)
            }
            Some(Err(e)) => Err(Failure::fatal(format!("an index build panicked: {e}"))),
            None => std::future::pending().await,
        }
    }
}

/// Waits for the end of a build without a deadline, or for the end of the link.
async fn build_long(shared: &Arc<Shared>, build: &Build) -> Result<(), Failure> {
    let endpoint = shared.endpoint(build.side)?;
    endpoint.may_write()?;
    let command = RawDocumentBuf::try_from(&build.command());
    let command = command.map_err(|_| Failure::fatal("createIndexes"))?;
    let db = endpoint.client().database(&build.db);
    let answer = tokio::spawn(async move { db.run_raw_command(command).await });
    let abort = answer.abort_handle();
    let gone = async {
        let mut link = shared.link.subscribe();
        while build.side == Side::Local || link.borrow_and_update().is_online() {
            if link.changed().await.is_err() {
                break;
            }
        }
    };
    let outcome = tokio::select! {
        answer = answer => match answer {
            Ok(answer) => answer.map(|_| ()).map_err(|e| endpoint.failure(&e)),
            Err(_) => Err(Failure::fatal("a driver call was cancelled")),
        },
        () = gone => Err(Failure::offline(Reason::Offline)),
    };
    abort.abort();
    outcome
}

/// Puts down what became of a build.
pub(super) async fn done(shared: &Arc<Shared>, built: Built) -> Result<(), Failure> {
    let _one = shared.schema.looking.lock().await;
    let Built { build, outcome } = built;
    let shown = build.shown(&shared.settings());
    match outcome {
        Ok(()) => tracing::info!(
            collection = shown.collection,
            side = build.side.name(),
            index = shown.index,
            "the index is there"
        ),
        Err(failure) if failure.class == Class::Rejected => {
            tracing::warn!(
                collection = shown.collection, side = build.side.name(), index = shown.index, %failure,
                "the index can't be built"
            );
            let mut all = refusals(shared).await?;
            all.retain(|r| !r.is_about(&build));
            all.push(Refusal::new(&build, &failure));
            keep_refusals(shared, all).await?;
        }
        Err(failure) => {
            // It stays on the list; the server may well go on with it.
            tracing::debug!(%failure, "an index build was interrupted");
            tokio::time::sleep(Duration::from_secs(1)).await;
            return Ok(());
        }
    }
    lock(&shared.schema.builds).retain(|b| *b != build);
    Ok(())
}

/// Makes an index of an empty collection.
pub(super) async fn create(shared: &Shared, build: &Build) -> Result<(), Failure> {
    let endpoint = shared.endpoint(build.side)?;
    let outcome = endpoint.run_doc(&build.db, build.command()).await;
    shared.note(build.side, &outcome);
    outcome?;
    tracing::info!(
        collection = build.coll,
        side = build.side.name(),
        index = build.index.name,
        "made an index"
    );
    Ok(())
}

/// Makes a collection; that it is there already is no error.
pub(super) async fn create_collection(
    shared: &Shared,
    on: Side,
    (db, coll): (&str, &str),
    options: Document,
) -> Result<(), Failure> {
    let mut command = doc! {"create": coll};
    command.extend(options);
    command.insert("writeConcern", doc! {"w": "majority"});
    let outcome = shared.endpoint(on)?.run_doc(db, command).await;
    shared.note(on, &outcome);
    match outcome {
        Err(failure) if failure.code != Some(NAMESPACE_EXISTS) => Err(failure),
        _ => Ok(()),
    }
}

/// `collMod`.
pub(super) async fn modify(
    shared: &Shared,
    on: Side,
    (db, coll): (&str, &str),
    change: Document,
) -> Result<(), Failure> {
    let mut command = doc! {"collMod": coll};
    command.extend(change);
    command.insert("writeConcern", doc! {"w": "majority"});
    let outcome = shared.endpoint(on)?.run_doc(db, command).await;
    shared.note(on, &outcome);
    outcome?;
    tracing::info!(
        collection = coll,
        side = on.name(),
        "changed a collection's options"
    );
    Ok(())
}

/// Number of documents, by the server's own books.
pub(super) async fn count(
    shared: &Shared,
    side: Side,
    (db, coll): (&str, &str),
) -> Result<u64, Failure> {
    let outcome = shared
        .endpoint(side)?
        .run_doc(db, doc! {"count": coll})
        .await;
    shared.note(side, &outcome);
    let n = outcome?;
    let n = n.get_i32("n").map(i64::from).or_else(|_| n.get_i64("n"));
    Ok(u64::try_from(n.unwrap_or(0)).unwrap_or(0))
}

/// Whether the index can be made at once.
pub(super) async fn is_empty(shared: &Shared, build: &Build) -> Result<bool, Failure> {
    Ok(count(shared, build.side, (&build.db, &build.coll)).await? == 0)
}

/// Whether documents there are due by a TTL index, as far as a short look can tell.
pub(super) async fn holds_due(
    shared: &Arc<Shared>,
    build: &Build,
    ttl: &Ttl,
) -> Result<bool, Failure> {
    let now = chrono::Utc::now().timestamp_millis() + shared.offset(build.side);
    let before = now.saturating_sub(ttl.seconds.saturating_mul(1000));
    let mut filter = doc! {&ttl.field: {"$lt": bson::DateTime::from_millis(before)}};
    if let Ok(partial) = build.index.options.get_document("partialFilterExpression") {
        filter = doc! {"$and": [filter, partial.clone()]};
    }
    let command = doc! {
        "find": &build.coll, "filter": filter, "limit": 1, "projection": {"_id": 1},
        "singleBatch": true, "maxTimeMS": DUE_MS,
    };
    let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("find"))?;
    let mut due = false;
    let endpoint = shared.endpoint(build.side)?;
    let looked = endpoint.query(&build.db, raw, |_| due = true).await;
    match looked {
        Ok(()) => Ok(due),
        // Too large to tell in time: a person shall say so.
        Err(failure) if failure.class == Class::Transient && failure.answered => Ok(true),
        Err(failure) => Err(failure),
    }
}
