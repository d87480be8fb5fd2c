//! Identity: the state belongs to two databases and no others (R12).
//!
//! A token from another cluster is accepted by a server without a word and yields nothing, and base
//! from another pair would turn "never there" into "deleted". So the state is bound to the identity
//! of both, and a server whose time lies before our token was restored from a backup.

use std::sync::Arc;

use bson::oid::ObjectId;
use bson::{Document, RawDocument, RawDocumentBuf, Timestamp, doc};

use crate::conflicts;
use crate::decide::Side;
use crate::failure::Failure;
use crate::settle::store_failed;
use crate::shared::{Shared, token_time};
use crate::side::Endpoint;
use crate::store::records;
use crate::tail::token_name;

/// Name under which the `_id` of the last record in `sync_logs` is kept.
pub const LAST_RECORD: &str = "last_record";

fn name(side: Side) -> String {
    format!("identity:{}", side.name())
}

/// Compares a side with the one the state was made with; the first time, keeps it.
pub async fn check(shared: &Shared, endpoint: &Arc<Endpoint>) -> Result<(), Failure> {
    let side = endpoint.side;
    let found = endpoint.identity().await?;
    let known: Option<String> = shared
        .store
        .get_meta(&name(side))
        .await
        .map_err(store_failed)?;
    match known {
        None => shared
            .store
            .set_meta(&name(side), found)
            .await
            .map_err(store_failed)?,
        Some(known) if known == found => {}
        Some(_) => {
            return Err(refusal(
                side,
                "is another one than the state in state_dir was made with",
            ));
        }
    }
    if side == Side::Local {
        check_records(shared).await?;
    }
    for db in &shared.settings().config.databases {
        check_oplog(shared, endpoint, db).await?;
        let token: Option<Vec<u8>> = shared
            .store
            .get_meta(&token_name(side, db))
            .await
            .map_err(store_failed)?;
        let at = token.and_then(|bytes| token_time(RawDocument::from_bytes(&bytes).ok()?));
        let Some(at) = at else { continue };
        // Asked after it: a stream may move the position on meanwhile.
        if let Some(now) = endpoint.hello().await?.operation_time
            && after(at, now)
        {
            return Err(restored(side));
        }
    }
    // Last: a server that is another one shall be told so, not that it lacks members.
    match shared.settings().config.databases.first() {
        Some(db) => endpoint.prove_primary(db).await,
        None => Ok(()),
    }
}

/// A restored local database lacks the last record that we wrote into it, but has older ones. (An
/// empty `sync_logs` proves nothing: somebody may have cleared it.)
async fn check_records(shared: &Shared) -> Result<(), Failure> {
    let last: Option<Vec<u8>> = shared
        .store
        .get_meta(LAST_RECORD)
        .await
        .map_err(store_failed)?;
    let Some(last) = last.and_then(|id| <[u8; 12]>::try_from(id).ok()) else {
        return Ok(());
    };
    let last = ObjectId::from_bytes(last);
    let mut found = Vec::new();
    let command = doc! {
        "find": "sync_logs", "filter": {"_id": {"$lte": last}}, "sort": {"_id": -1}, "limit": 1,
        "projection": {"_id": 1},
    };
    let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("find"))?;
    let settings = shared.settings();
    let each = |d: RawDocumentBuf| found.extend(d.get_object_id("_id").ok());
    shared.local.query(settings.records_db(), raw, each).await?;
    match found.first() {
        Some(id) if *id != last => Err(restored(Side::Local)),
        _ => Ok(()),
    }
}

/// Name under which the last event seen is kept, as text of [`Seen`].
pub fn seen_name(side: Side, db: &str) -> String {
    format!("seen:{}:{db}", side.name())
}

/// An event as the oplog knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its cluster time.
    pub time: Timestamp,
    /// When it was written by the server's clock, in ms; servers before 6.0 don't tell.
    wall: Option<i64>,
}

impl Seen {
    /// The event with this position; `None` if the position has no time.
    pub fn of(event: &RawDocument) -> Option<Self> {
        Some(Self {
            time: token_time(event.get_document("_id").ok()?)?,
            wall: wall(event, "wallTime"),
        })
    }

    /// As kept: seconds and increment, and ms if they are known, with dots between them.
    pub fn text(&self) -> String {
        let Timestamp { time, increment } = self.time;
        match self.wall {
            Some(wall) => format!("{time}.{increment}.{wall}"),
            None => format!("{time}.{increment}"),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let time = parts.next()?.parse().ok()?;
        let increment = parts.next()?.parse().ok()?;
        let wall = parts.next().map(str::parse).transpose().ok()?;
        let time = Timestamp { time, increment };
        Some(Self { time, wall })
    }

    /// Is that entry of an oplog this event? A server that was put back may give the same time to
    /// something else: times count up from 1 in each second, and it may be that second still.
    fn is(&self, entry: Self) -> bool {
        let same_wall = self.wall.zip(entry.wall).is_none_or(|(a, b)| a == b);
        self.time == entry.time && same_wall
    }
}

fn wall(doc: &RawDocument, name: &str) -> Option<i64> {
    doc.get_datetime(name).ok().map(|t| t.timestamp_millis())
}

/// A restored server lacks the oplog entry of the last event we saw, though its oplog reaches from
/// before that to now. The server itself accepts such a position without a word. Where the oplog may
/// not be read (a small Atlas tier), nothing is proven.
///
/// # Errors
/// [`Class::Fatal`](crate::failure::Class::Fatal) if it was restored; a server that does not answer
/// proves nothing either way.
pub async fn check_oplog(
    shared: &Shared,
    endpoint: &Arc<Endpoint>,
    db: &str,
) -> Result<bool, Failure> {
    let name = seen_name(endpoint.side, db);
    let seen: Option<String> = shared.store.get_meta(&name).await.map_err(store_failed)?;
    let Some(seen) = seen.as_deref().and_then(Seen::parse) else {
        return Ok(false);
    };
    let first = |filter: Document| async move {
        let command = doc! {"find": "oplog.rs", "filter": filter, "limit": 1, "projection": {"ts": 1, "wall": 1}};
        let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("find"))?;
        let mut found = None;
        let each = |d: RawDocumentBuf| {
            let wall = wall(&d, "wall");
            found = d.get_timestamp("ts").ok().map(|time| Seen { time, wall });
        };
        endpoint.query("local", raw, each).await?;
        Ok::<_, Failure>(found)
    };
    // In this order: what the oplog still holds after the look, it held at the look.
    let next = first(doc! {"ts": {"$gte": seen.time}}).await;
    let oldest = first(doc! {}).await;
    let (next, oldest) = match (next, oldest) {
        (Ok(next), Ok(oldest)) => (next, oldest),
        (Err(failure), _) | (_, Err(failure)) if !failure.is_refusal() => return Err(failure),
        _ => return Ok(false),
    };
    let found = next.is_some_and(|entry| seen.is(entry));
    let reaches_back = oldest.is_some_and(|oldest| !after(oldest.time, seen.time));
    if reaches_back && !found {
        return Err(restored(endpoint.side));
    }
    Ok(found)
}

/// The refusal of a database that has gone back in time.
pub fn restored(side: Side) -> Failure {
    refusal(
        side,
        "lies before what we have seen of it: it was restored from a backup",
    )
}

fn after(a: Timestamp, b: Timestamp) -> bool {
    (a.time, a.increment) > (b.time, b.increment)
}

fn refusal(side: Side, what: &str) -> Failure {
    Failure::fatal(format!(
        "the {} database {what}. Nothing was changed. If that is intended, run `sangam reconcile --adopt` once: \
         it forgets the old state and compares both databases whole, deleting nothing",
        side.name()
    ))
}

/// Forgets everything bound to the old databases: the next start compares them as on the first day.
pub fn adopt(c: &rusqlite::Connection) -> rusqlite::Result<()> {
    // What a policy may have discarded stays on record (R21): that the write happened can't be told now.
    for key in records::overruled_keys(c)? {
        conflicts::overruled(c, &key)?;
    }
    for table in [
        "base",
        "outbox",
        "inbox",
        "counts",
        "intents",
        "sent",
        "open_conflicts",
        "stamps",
        "differences",
        "walk",
        "gone",
        "transactions",
        "definitions",
    ] {
        c.execute(&format!("DELETE FROM {table}"), [])?;
    }
    c.execute("DELETE FROM meta WHERE k LIKE 'identity:%' OR k LIKE 'token:%' OR k LIKE 'reconcile:%' OR k LIKE 'pull:%' OR k LIKE 'halted:%' OR k LIKE 'seen:%' OR k LIKE 'walk:%' OR k LIKE 'first:%' OR k LIKE 'exact:%' OR k LIKE 'missed:%' OR k = 'last_record' OR k LIKE 'loss\\_confirmed:%' ESCAPE '\\' OR k = 'verify' OR k = 'verified' OR k = 'verified_short' OR k = 'proof'", [])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{Id, Key};
    use crate::store::{self, Store};

    #[tokio::test]
    async fn adopting_forgets_the_old_state_and_keeps_what_a_policy_may_have_discarded() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let id = Id::of(&doc! {"_id": 1}.to_vec().unwrap()).unwrap();
        let key = Key::new(1, &id);
        let discarded = doc! {"kind": "both_modified"}.to_vec().unwrap();
        let left = store.call(move |c| {
            records::put_overruled(c, &key, &discarded, None)?;
            store::set_meta(c, "identity:remote", "old")?;
            store::set_meta(c, "loss_confirmed:1", "local")?;
            adopt(c)?;
            let kept: Vec<u8> = c.query_row("SELECT doc FROM records", [], |r| r.get(0))?;
            assert_eq!(kept, discarded);
            c.query_row(
                "SELECT (SELECT count(*) FROM overruled) + (SELECT count(*) FROM meta WHERE k LIKE '%:%')",
                [],
                |r| r.get::<_, i64>(0),
            )
        });
        assert_eq!(left.await.unwrap(), 0);
    }
}
