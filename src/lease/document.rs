//! The documents of the lease, as the servers keep them. All in [`COLLECTION`](super::COLLECTION).
//!
//! - `lease:PAIR`, local: `holder`, `name`, `epoch` (a number for each term), `beat` (grows with each
//!   renewal), `since`, `until {local, remote}` (no command of the holder is at work on that side after
//!   that, by its server's clock), `paused`.
//! - `fence:PAIR`, on both sides: `epoch`, `n`.
//! - `note:PAIR:…`, local: what the holder writes, see [`journal`](super::journal); `seen:PAIR:…` up to where
//!   who stands by has read, `cut:PAIR` up to where it was cut off.

use bson::{Bson, DateTime, Document, doc};

use super::{COLLECTION, Lease, VALID, at_work};
use crate::failure::Failure;
use crate::raw::Writer;
use crate::side::Endpoint;

/// The lease as read.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub epoch: i64,
    pub beat: i64,
    /// Who holds it: its state, its name, since when (ms).
    pub holder: Option<(String, String, i64)>,
    /// No command of the holder is at work after that, ms by the side's clock.
    pub until: [i64; 2],
    pub paused: bool,
    /// Nobody ever held it.
    pub first: bool,
}

impl Found {
    fn of(found: &Document) -> Self {
        let until = |side: &str| {
            let until = found.get_document("until").ok();
            let time = until.and_then(|u| u.get_datetime(side).ok());
            time.map_or(0, |t| t.timestamp_millis())
        };
        let since = found.get_datetime("since").map(|t| t.timestamp_millis());
        let text = |name: &str| found.get_str(name).map(str::to_owned);
        Self {
            epoch: found.get_i64("epoch").unwrap_or(0),
            beat: found.get_i64("beat").unwrap_or(0),
            holder: match (text("holder"), text("name")) {
                (Ok(holder), Ok(name)) => Some((holder, name, since.unwrap_or(0))),
                _ => None,
            },
            until: [until("local"), until("remote")],
            paused: found.get_bool("paused").unwrap_or(false),
            first: found.get_bool("first").unwrap_or(false),
        }
    }
}

fn lease_id(lease: &Lease) -> String {
    format!("lease:{}", lease.pair)
}

fn fence_id(lease: &Lease) -> String {
    format!("fence:{}", lease.pair)
}

fn majority() -> Document {
    doc! {"w": "majority", "wtimeout": 3000}
}

/// So long after the clock of a server: a promise made now.
fn promise() -> i64 {
    VALID + at_work()
}

/// Reads the lease; `None`: nobody ever had it.
pub(super) async fn look(lease: &Lease, local: &Endpoint) -> Result<Option<Found>, Failure> {
    let command = doc! {
        "find": COLLECTION, "filter": {"_id": lease_id(lease)}, "limit": 1, "singleBatch": true,
        "maxTimeMS": 2000,
    };
    let reply = local.run_doc(&lease.db, command).await?;
    let batch = reply
        .get_document("cursor")
        .and_then(|c| c.get_array("firstBatch"));
    let first = batch.ok().and_then(|b| b.first()?.as_document().cloned());
    Ok(first.as_ref().map(Found::of))
}

/// Puts the document there, free to be taken. That it is there already is no error.
pub(super) async fn create(lease: &Lease, local: &Endpoint) -> Result<(), Failure> {
    let now = local.run_doc("admin", doc! {"hello": 1}).await?;
    // The numbers of terms go on growing even if somebody deletes the document.
    let epoch = now
        .get_datetime("localTime")
        .map_or(0, |t| t.timestamp_millis() / 1000);
    let never = DateTime::from_millis(0);
    let free = doc! {
        "_id": lease_id(lease), "holder": null, "name": null, "epoch": epoch, "beat": 0_i64,
        "until": {"local": never, "remote": never}, "paused": false, "first": true,
    };
    let command = doc! {"insert": COLLECTION, "documents": [free], "writeConcern": majority()};
    local.run_doc(&lease.db, command).await.map(|_| ())
}

/// One change of the lease by compare-and-set; `None`: it is not as expected any more.
async fn change(
    lease: &Lease,
    local: &Endpoint,
    query: Document,
    update: Bson,
) -> Result<Option<Document>, Failure> {
    let command = doc! {
        "findAndModify": COLLECTION, "query": query, "update": update, "new": true,
        "writeConcern": majority(), "maxTimeMS": 3000,
    };
    let reply = local.run_doc(&lease.db, command).await?;
    if reply.contains_key("writeConcernError") {
        return Err(Failure::timeout());
    }
    Ok(reply.get_document("value").ok().cloned())
}

/// Takes the lease as it was read, if its holder's time is over on the local side.
pub(super) async fn take(
    lease: &Lease,
    local: &Endpoint,
    found: &Found,
) -> Result<Option<Found>, Failure> {
    let query = doc! {
        "_id": lease_id(lease), "epoch": found.epoch, "beat": found.beat,
        "$expr": {"$lt": ["$until.local", "$$NOW"]},
    };
    let update = vec![
        doc! {"$set": {
            "holder": &lease.me, "name": {"$literal": &lease.name}, "since": "$$NOW",
            "epoch": {"$add": ["$epoch", 1_i64]}, "beat": {"$add": ["$beat", 1_i64]},
            "until.local": {"$add": ["$$NOW", promise()]},
        }},
        doc! {"$unset": "first"},
    ];
    let taken = change(lease, local, query, update.into()).await?;
    Ok(taken.as_ref().map(Found::of))
}

/// Renews it; `remote` is what is promised for that side. `None`: somebody else has it.
pub(super) async fn renew(
    lease: &Lease,
    local: &Endpoint,
    (epoch, remote): (i64, i64),
    paused: bool,
) -> Result<Option<Found>, Failure> {
    let query = doc! {"_id": lease_id(lease), "epoch": epoch, "holder": &lease.me};
    let update = vec![doc! {"$set": {
        "beat": {"$add": ["$beat", 1_i64]}, "paused": paused,
        "until.local": {"$max": ["$until.local", {"$add": ["$$NOW", promise()]}]},
        "until.remote": {"$max": ["$until.remote", DateTime::from_millis(remote)]},
    }}];
    let renewed = change(lease, local, query, update.into()).await?;
    Ok(renewed.as_ref().map(Found::of))
}

/// Gives it back; `until`: nothing of ours is at work after that.
pub(super) async fn give_back(
    lease: &Lease,
    local: &Endpoint,
    (epoch, until): (i64, [i64; 2]),
) -> Result<(), Failure> {
    let query = doc! {"_id": lease_id(lease), "epoch": epoch, "holder": &lease.me};
    let update = vec![doc! {"$set": {
        "holder": null, "name": null, "beat": {"$add": ["$beat", 1_i64]},
        "until.local": DateTime::from_millis(until[0]), "until.remote": DateTime::from_millis(until[1]),
    }}];
    change(lease, local, query, update.into()).await.map(|_| ())
}

/// Takes over a side's fence: waits for transactions that have touched it, and shuts out the others.
pub(super) async fn raise_fence(
    lease: &Lease,
    endpoint: &Endpoint,
    epoch: i64,
) -> Result<(), Failure> {
    let statement = doc! {
        "q": {"_id": fence_id(lease), "epoch": {"$lte": epoch}},
        "u": {"$set": {"epoch": epoch}}, "upsert": true,
    };
    let command = doc! {
        "update": COLLECTION, "updates": [statement], "writeConcern": majority(), "maxTimeMS": 3000,
    };
    let reply = endpoint.run_doc(&lease.db, command).await?;
    if reply.contains_key("writeErrors") || reply.contains_key("writeConcernError") {
        return Err(Failure::standby());
    }
    Ok(())
}

/// Within a transaction: fails to match once a later term has taken the fence.
pub(super) fn touch_fence(lease: &Lease, epoch: i64) -> Writer {
    let mut w = Writer::new();
    w.str("update", COLLECTION).open_array("updates").open("0");
    w.open("q")
        .str("_id", &fence_id(lease))
        .value("epoch", 0x12, &epoch.to_le_bytes())
        .close();
    w.open("u").open("$inc").i32("n", 1).close().close();
    w
}
