//! Capture and follow: a change stream of one side into its queue.
//!
//! Both are the same code: *capture* tails the local side into the outbox, *follow* the remote into
//! the inbox. Only keys and operations travel, with a small update description where there is one
//! (R10); keys and resume token are committed in one transaction (R1). Lost history becomes a flag
//! that starts a reconcile (R11).

mod event;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bson::{Bson, Document, RawDocument, RawDocumentBuf, Timestamp};
use mongodb::change_stream::ChangeStream;
use mongodb::change_stream::event::ResumeToken;
use tokio::time::{Instant, timeout};

use self::event::{Event, parse, pipeline};
use crate::decide::Side;
use crate::echo::News;
use crate::expiry;
use crate::failure::{Class, Failure, Reason, UNAUTHORIZED};
use crate::identity::{self, Seen};
use crate::key::Key;
use crate::metrics::Retried;
use crate::reconcile;
use crate::retry::Retry;
use crate::settle::store_failed;
use crate::shared::{Settings, Shared, token_time};
use crate::side::{Endpoint, deadline};
use crate::store::queue::{self, Change};
use crate::store::{self, records, transactions};

/// The server's `ChangeStreamFatalError`: no event with our token where it should be.
const RESUME_TOKEN_NOT_FOUND: i32 = 280;

/// Most events in one transaction, and in one answer: a server with many to tell fills answers of 16 MB,
/// which the driver holds three times over.
const EVENTS: u32 = 2000;

/// How long an event waits for company before it is committed.
const GATHER: Duration = Duration::from_millis(2);

/// How long the server holds an idle stream's request. Short of it nothing is read, so it bounds
/// how stale "seen up to" can be.
const AWAIT: Duration = Duration::from_millis(900);

/// How often an idle stream's token is saved (R1): the oplog window is hours at the least.
const SAVE_IDLE_TOKEN: Duration = Duration::from_secs(30);

/// Name under which a stream's token is kept.
pub fn token_name(side: Side, db: &str) -> String {
    format!("token:{}:{db}", side.name())
}

/// Name of the flag that asks for a reconcile of a database; its value says why.
pub fn reconcile_name(db: &str) -> String {
    format!("reconcile:{db}")
}

/// Tails one database of one side until the daemon ends.
pub async fn run(shared: Arc<Shared>, side: Side, db: String) -> Result<(), Failure> {
    let mut retry = Retry::new(&shared.settings().config.retry);
    while !shared.cancel.is_cancelled() {
        if side == Side::Remote {
            tokio::select! {
                () = shared.cancel.cancelled() => break,
                () = shared.link.online() => {}
            }
        }
        let outcome = tokio::select! {
            () = shared.cancel.cancelled() => break,
            outcome = tail(&shared, side, &db, &mut retry) => outcome,
        };
        shared.close_stream(side, &db);
        let Err(stop) = outcome else { continue };
        let failure = match stop {
            Stop::Store(error) if !error.is_disk() => return Err(store_failed(error)),
            Stop::Store(error) => store_failed(error),
            Stop::Failure(failure) => failure,
        };
        shared.note::<()>(side, &Err(failure.clone()));
        if failure.code == Some(RESUME_TOKEN_NOT_FOUND) {
            // The oplog reaches back far enough, but what we have seen is not in it. Or it is, and only
            // the collections to be synced were changed: the stream then leaves out the very event
            // that it is to go on from.
            let endpoint = shared.endpoint(side)?;
            match identity::check_oplog(&shared, &endpoint, &db).await {
                Ok(true) => {
                    lose_history(&shared, side, &db, &failure).await?;
                    continue;
                }
                Ok(false) => return Err(identity::restored(side)),
                Err(failure) if failure.class == Class::Fatal => return Err(failure),
                Err(failure) => {
                    tracing::debug!(side = side.name(), %failure, "what its oplog has can't be asked yet")
                }
            }
        } else if failure.class == Class::HistoryLost {
            lose_history(&shared, side, &db, &failure).await?;
            continue;
        }
        if side == Side::Remote && refuses_streams(&failure) {
            // The timestamp pull does what it can, and comparing does not wait for a stream. The
            // stream is tried again all the same: rights may be given.
            shared.no_stream.store(true, Ordering::Relaxed);
            shared.reconcile.notify_one();
        }
        if side == Side::Local || !failure.is_offline() {
            let text = format!(
                "the {} database's changes can't be read: {failure}",
                side.name()
            );
            shared.notice(&format!("stream:{}:{db}", side.name()), Some(text));
        }
        shared.metrics.retried(Retried::Stream);
        let delay = retry.next_delay();
        tokio::select! {
            () = shared.cancel.cancelled() => break,
            () = tokio::time::sleep(delay) => {}
        }
    }
    Ok(())
}

/// The server answered that it offers no change stream to us, by its kind or our rights.
fn refuses_streams(failure: &Failure) -> bool {
    failure.code == Some(UNAUTHORIZED)
        || failure.class == Class::Offline(Reason::NotAReplicaSet)
        || failure.class == Class::Rejected
}

enum Stop {
    Failure(Failure),
    Store(store::StoreError),
}

impl From<Failure> for Stop {
    fn from(f: Failure) -> Self {
        Self::Failure(f)
    }
}

impl From<store::StoreError> for Stop {
    fn from(e: store::StoreError) -> Self {
        Self::Store(e)
    }
}

/// Forgets a position that the oplog no longer holds, and asks for a reconcile (R11).
async fn lose_history(
    shared: &Shared,
    side: Side,
    db: &str,
    failure: &Failure,
) -> Result<(), Failure> {
    tracing::warn!(side = side.name(), db, %failure, "the oplog no longer holds our position; comparing everything");
    let token = token_name(side, db);
    let seen = identity::seen_name(side, db);
    let why = format!("history of the {} database lost", side.name());
    let name = db.to_owned();
    shared
        .store
        .call(move |c| {
            c.execute("DELETE FROM meta WHERE k = ? OR k = ?", [&token, &seen])?;
            reconcile::missed(c, &name, &why)
        })
        .await
        .map_err(store_failed)?;
    // Insert events that we were owed may be among the lost ones.
    shared.echoes.forget(side);
    shared.reconcile.notify_one();
    Ok(())
}

/// The saved position, or a fresh one: now. A database seen for the first time asks for a first sync.
async fn position(
    shared: &Shared,
    side: Side,
    db: &str,
    endpoint: &Endpoint,
) -> Result<Result<ResumeToken, Timestamp>, Stop> {
    let saved: Option<Vec<u8>> = shared.store.get_meta(&token_name(side, db)).await?;
    let damaged = saved.is_some();
    let token = saved.and_then(|bytes| {
        // The server takes some that say nothing, and then tells nothing: each has its time.
        token_time(RawDocument::from_bytes(&bytes).ok()?)?;
        let doc = Document::from_reader(bytes.as_slice()).ok()?;
        bson::deserialize_from_bson::<ResumeToken>(Bson::Document(doc)).ok()
    });
    if let Some(token) = token {
        return Ok(Ok(token));
    }
    if damaged {
        let failure = Failure::fatal("the saved position is damaged");
        lose_history(shared, side, db, &failure).await?;
    }
    let hello = endpoint.hello().await;
    shared.note(side, &hello);
    let now = hello?
        .operation_time
        .ok_or_else(|| Failure::fatal("the server tells no operation time"))?;
    let flag = reconcile_name(db);
    shared
        .store
        .call(move |c| match store::get_meta::<String>(c, &flag)? {
            Some(_) => Ok(()),
            None => store::set_meta(c, &flag, "first sync"),
        })
        .await?;
    Ok(Err(now))
}

async fn tail(shared: &Arc<Shared>, side: Side, db: &str, retry: &mut Retry) -> Result<(), Stop> {
    let settings = shared.settings();
    let endpoint = shared.endpoint(side)?;
    let position = position(shared, side, db, &endpoint).await?;
    match crate::schema::learn(shared, side, db).await {
        Err(failure) if failure.is_offline() || failure.class == Class::Fatal => {
            return Err(failure.into());
        }
        // Without the right to list collections nothing is known to expire.
        Err(failure) => tracing::debug!(%failure, "how documents expire"),
        Ok(()) => {}
    }
    endpoint.is_known()?;
    let database = endpoint.client().database(db);
    let watch = database
        .watch()
        .pipeline(pipeline(shared, &settings))
        // Those of indexes and options, too.
        .show_expanded_events(true)
        .batch_size(EVENTS)
        .max_await_time(AWAIT);
    let fresh = position.as_ref().err().copied();
    let watch = match position {
        // `start_after` also gets over the invalidate event of a dropped database.
        Ok(token) => watch.start_after(token),
        Err(time) => watch.start_at_operation_time(time),
    };
    let stream = timeout(deadline(0), async { watch.await }).await;
    let stream = stream
        .map_err(|_| Failure::timeout().of(side))?
        .map_err(|e| {
            let mut failure = endpoint.failure(&e);
            // What it refuses may be the position, damaged in our file or of another version. The
            // next try has none, and tells whether it was that.
            let unauthorized = failure.code == Some(UNAUTHORIZED);
            if fresh.is_none() && failure.class == Class::Rejected && !unauthorized {
                failure.class = Class::HistoryLost;
            }
            failure
        })?;
    let mut stream = stream.with_type::<RawDocumentBuf>();
    if fresh.is_some() {
        shared.echoes.forget(side);
        // Saved at once: a crash before the first event must not skip what happens meanwhile.
        save_token(shared, side, db, stream.resume_token()).await?;
    }
    shared.notice(&format!("stream:{}:{db}", side.name()), None);
    if side == Side::Remote {
        shared.no_stream.store(false, Ordering::Relaxed);
    }
    shared.open_stream(side, db, &settings);
    shared.note(side, &Ok(()));
    shared.reconcile.notify_one();
    tracing::info!(side = side.name(), db, "reading changes");
    let opened = Opened {
        endpoint: &endpoint,
        settings: &settings,
    };
    read(shared, (side, db), opened, &mut stream, retry).await
}

async fn save_token(
    shared: &Shared,
    side: Side,
    db: &str,
    token: Option<ResumeToken>,
) -> Result<(), Stop> {
    let Some(token) = token else {
        // No token yet means that nothing was read; the next start begins at its own "now" and
        // the reconcile that was asked for covers what lies between.
        return Ok(());
    };
    let bytes = bson::serialize_to_vec(&token).map_err(|_| Failure::fatal("resume token"))?;
    shared.store.set_meta(&token_name(side, db), bytes).await?;
    Ok(())
}

/// What a stream was opened with.
struct Opened<'a> {
    endpoint: &'a Endpoint,
    settings: &'a Settings,
}

async fn read(
    shared: &Arc<Shared>,
    (side, db): (Side, &str),
    Opened { endpoint, settings }: Opened<'_>,
    stream: &mut ChangeStream<RawDocumentBuf>,
    retry: &mut Retry,
) -> Result<(), Stop> {
    let mut pending: Vec<RawDocumentBuf> = Vec::new();
    let mut saved = Instant::now();
    loop {
        if pending.is_empty() && shared.is_stale(settings) {
            return Ok(());
        }
        let mut ended = false;
        {
            // The future is kept across turns: dropping it half-way would lose what it has read.
            let next = stream.next_if_any();
            tokio::pin!(next);
            let overdue = tokio::time::sleep(AWAIT + deadline(1 << 20));
            tokio::pin!(overdue);
            loop {
                tokio::select! {
                    biased;
                    event = &mut next => {
                        match event.map_err(|e| endpoint.failure(&e))? {
                            Some(event) => pending.push(event),
                            None => ended = true,
                        }
                        break;
                    }
                    () = tokio::time::sleep(GATHER), if !pending.is_empty() => {
                        commit(shared, side, db, std::mem::take(&mut pending)).await?;
                    }
                    () = &mut overdue => return Err(Failure::timeout().of(side).into()),
                }
            }
        }
        shared.note(side, &Ok(()));
        retry.reset();
        // A stream that ends does so by its invalidate event, whose position gets over it next time.
        let last = ended || !stream.is_alive();
        if pending.len() >= EVENTS as usize || (last && !pending.is_empty()) {
            commit(shared, side, db, std::mem::take(&mut pending)).await?;
        }
        if ended {
            let token = stream.resume_token();
            let bytes = token.as_ref().and_then(|t| bson::serialize_to_vec(t).ok());
            let seen = bytes
                .as_deref()
                .and_then(|b| RawDocument::from_bytes(b).ok())
                .and_then(token_time);
            shared.stream_at(side, db, seen);
            if let Some(bytes) = bytes
                && saved.elapsed() > SAVE_IDLE_TOKEN
            {
                endpoint.is_known()?;
                saved = Instant::now();
                shared.store.set_meta(&token_name(side, db), bytes).await?;
            }
        }
        if !stream.is_alive() {
            return Ok(());
        }
    }
}

/// Stores the keys of these events and the position behind them in one transaction (R1).
async fn commit(
    shared: &Arc<Shared>,
    side: Side,
    db: &str,
    events: Vec<RawDocumentBuf>,
) -> Result<(), Stop> {
    let settings = shared.settings();
    let Some(last) = events.last() else {
        return Ok(());
    };
    let Ok(token) = last.get_document("_id") else {
        return Ok(());
    };
    let event_seen = Seen::of(last);
    let seen = event_seen.map(|event| event.time);
    let token = token.as_bytes().to_vec();
    let mut changes = Vec::with_capacity(events.len());
    let mut numbers: HashMap<&str, u32> = HashMap::new();
    let mut synced: HashMap<&str, bool> = HashMap::new();
    // Deletions where documents go by themselves: index of the change, how, when.
    let mut gone_where = Vec::new();
    let mut transactions = Vec::new();
    for event in &events {
        let is_synced = |coll| {
            *synced
                .entry(coll)
                .or_insert_with(|| settings.is_synced(db, coll))
        };
        match parse(event, &settings.sync_fields, is_synced) {
            Event::Change {
                coll,
                id,
                hint,
                created,
                transaction,
            } => {
                let ns = match numbers.get(coll) {
                    Some(n) => *n,
                    None => {
                        let n = shared.store.namespace(db, coll).await?;
                        numbers.insert(coll, n);
                        n
                    }
                };
                let key = Key::new(ns, &id);
                let news = match hint.as_deref() {
                    _ if created => News::Inserted,
                    Some([b'u', description @ ..]) => News::Updated(description),
                    _ => News::Other,
                };
                let sync_fields = &settings.sync_fields;
                if !shared.echoes.arrived(side, &key, news, sync_fields) {
                    let gone = hint.as_deref() == Some(b"d");
                    if let Some(volatile) = shared
                        .schema
                        .volatile(side, ns)
                        .filter(|_| gone && transaction.is_none())
                    {
                        let at = event.get_timestamp("clusterTime").ok();
                        let at = at.map_or(0, |t| i64::from(t.time) * 1000);
                        gone_where.push((changes.len(), volatile, at));
                    }
                    transactions.extend(transaction.map(|t| (key.clone(), t)));
                    changes.push(Change { key, id, hint });
                }
            }
            Event::Halt { coll, what } => crate::halt::halt(shared, side, db, coll, &what).await?,
            Event::Schema => shared.schema.wake.notify_one(),
            Event::Nothing => {}
        }
    }
    let endpoint = shared.endpoint(side)?;
    // A server put back to a backup goes on telling, from there.
    endpoint.is_known()?;
    let name = token_name(side, db);
    let now = chrono::Utc::now().timestamp_millis();
    // Offline, an app shall see that its edit waits.
    let stamp_pending =
        side == Side::Local && settings.config.sync.stamp_documents && !shared.link.is_online();
    let any = !changes.is_empty();
    if shared.failpoints.mutated("token_first") {
        shared.store.set_meta(&name, token.clone()).await?;
        shared.failpoints.crash("token_before_enq");
    }
    if let Some(seen) = seen {
        endpoint.told(seen);
    }
    let failpoints = shared.clone();
    // At the limit only the fact that something changed is kept (R22).
    let degraded = any && shared.degraded.load(Ordering::Relaxed);
    let db_name = db.to_owned();
    let seen_name = identity::seen_name(side, db);
    let seen_text = event_seen.map(|event| event.text());
    shared
        .store
        .call(move |c| {
            if degraded {
                reconcile::missed(c, &db_name, "queue was full")?;
            } else {
                let changes = expiry::without_expired(c, side, changes, &gone_where)?;
                queue::enqueue(c, side, &changes, now)?;
                transactions::note(c, side, &transactions)?;
                if stamp_pending {
                    for change in &changes {
                        records::put_stamp(c, &change.key, &change.id)?;
                    }
                }
            }
            failpoints.failpoints.crash("enq_before_token");
            store::set_meta(c, &name, token)?;
            if let Some(seen) = &seen_text {
                store::set_meta(c, &seen_name, seen)?;
            }
            Ok(())
        })
        .await?;
    shared.failpoints.crash("after_token");
    shared.stream_at(side, db, seen);
    if any {
        shared.wake.notify_one();
        if stamp_pending {
            shared.stamp.notify_one();
        }
    }
    Ok(())
}

/// Waits until everything that happened on a side before now is in the queue, for `limit` at most.
pub async fn catch_up(shared: &Shared, side: Side, limit: Duration) -> bool {
    let Ok(endpoint) = shared.endpoint(side) else {
        return false;
    };
    let hello = endpoint.hello().await;
    shared.note(side, &hello);
    let Ok(Some(now)) = hello.map(|h| h.operation_time) else {
        return false;
    };
    let arrived = async {
        loop {
            let moved = shared.stream_moved.notified();
            let databases = shared.settings().config.databases.clone();
            let there = {
                let streams = crate::shared::lock(&shared.streams);
                databases.iter().all(|db| {
                    let seen = streams.get(&(side, db.clone())).and_then(|s| s.seen);
                    seen.is_some_and(|s| (s.time, s.increment) >= (now.time, now.increment))
                })
            };
            if there {
                return true;
            }
            if side == Side::Remote && !shared.link.is_online() {
                return false;
            }
            // Woken by a moving stream; the short wait covers a wake-up between look and wait.
            let _ = timeout(Duration::from_millis(100), moved).await;
        }
    };
    timeout(limit, arrived).await.unwrap_or(false)
}
