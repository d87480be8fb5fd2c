//! Receipts: knowing for certain whether a write happened whose answer got lost.
//!
//! Of most writes it is enough to look: the document is what was written, or its fields are. Not so
//! where a rule adds up what both sides did (`sum_of_changes`, `union`, `append`): when an
//! application has counted on since, the number tells neither "ours is in it" nor "it is not", and
//! to guess wrong is to count twice or not at all. (The change stream does not tell either: an
//! application may have written the same number.) So such a write goes in a transaction that also
//! leaves its number in a document of its own, in [`COLLECTION`] on that side. However long the link
//! is gone, that document says later what became of it.
//!
//! A document (a lane) serves one transaction at a time. One whose outcome is not known is not used
//! again; a later run removes it once no intent refers to it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use bson::oid::ObjectId;
use bson::{RawDocumentBuf, doc};
use rusqlite::Connection;

use crate::content;
use crate::decide::Side;
use crate::failure::Failure;
use crate::guard::{Verdict, Write};
use crate::raw::Writer;
use crate::rules::FieldRules;
use crate::settle::store_failed;
use crate::shared::{Shared, lock};
use crate::side::Endpoint;
use crate::store;

/// Where the receipts are, in the first database of each side; never synced.
pub const COLLECTION: &str = "sangam_receipts";

/// What a transaction leaves behind: this number in that lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// `_id` of the lane's document.
    pub lane: ObjectId,
    /// Grows with each transaction of the lane.
    pub number: i64,
}

impl Receipt {
    /// As the store keeps it.
    pub(crate) fn to_bytes(self) -> Vec<u8> {
        [self.lane.bytes().as_slice(), &self.number.to_le_bytes()].concat()
    }

    /// The reverse; `None` of anything else.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Option<Self> {
        let (lane, number) = bytes.split_first_chunk::<12>()?;
        Some(Self {
            lane: ObjectId::from_bytes(*lane),
            number: i64::from_le_bytes(number.try_into().ok()?),
        })
    }

    /// The last statement of its transaction.
    pub(crate) fn statement(self) -> Writer {
        let mut w = Writer::new();
        w.str("update", COLLECTION).open_array("updates").open("0");
        w.open("q")
            .value("_id", 0x07, &self.lane.bytes())
            .close()
            .open("u")
            .open("$set")
            .value("n", 0x12, &self.number.to_le_bytes())
            .close()
            .close();
        w.bool("upsert", true).close().close();
        w
    }
}

/// Lanes that are free, by side, with their last numbers.
#[derive(Debug, Default)]
pub struct Receipts([Mutex<Vec<Receipt>>; 2]);

impl Receipts {
    /// What became of the transaction with this receipt: if that is known, its lane serves the next one.
    pub(crate) fn ended(&self, side: Side, receipt: Option<Receipt>, verdict: &Verdict) {
        if !matches!(verdict, Verdict::Unknown { .. }) {
            lock(&self.0[side as usize]).extend(receipt);
        }
    }
}

/// The content of a document that is not there, as far as fields go.
const NOTHING: &[u8] = &[5, 0, 0, 0, 0];

/// Whether whoever comes after this write may add to what it wrote, so that it can't be told by
/// looking whether it happened.
pub(crate) fn is_needed(write: &Write, rules: Option<&FieldRules>) -> bool {
    let (Some(rules), Some(new)) = (rules, &write.new) else {
        return false;
    };
    let expect = write.expect.as_deref().unwrap_or(NOTHING);
    let adds = rules.iter().filter(|(_, rule)| rule.adds());
    let mut names = adds.map(|(name, _)| name.as_bytes());
    names.any(|name| !content::agree_on(expect, new, [name]))
}

/// A receipt for the next transaction on a side. `None`: that side takes none, which is told.
pub(crate) async fn take(shared: &Shared, side: Side) -> Result<Option<Receipt>, Failure> {
    let free = lock(&shared.receipts.0[side as usize]).pop();
    if let Some(Receipt { lane, number }) = free {
        let number = number + 1;
        return Ok(Some(Receipt { lane, number }));
    }
    let made = open_lane(shared, side).await;
    let refused = made.as_ref().is_err_and(Failure::is_refusal);
    let text = || {
        format!(
            "the user of the {} database may not write to {COLLECTION}: after a lost answer, numbers and sets \
             with a rule in [sync.rules] may count a change twice; give it readWrite",
            side.name()
        )
    };
    shared.notice(&format!("receipts:{}", side.name()), refused.then(text));
    match made {
        Ok(receipt) => Ok(Some(receipt)),
        Err(_) if refused => Ok(None),
        Err(failure) => Err(failure),
    }
}

fn name(side: Side, lane: &str) -> String {
    format!("receipts:{}:{lane}", side.name())
}

async fn open_lane(shared: &Shared, side: Side) -> Result<Receipt, Failure> {
    let endpoint = shared.endpoint(side)?;
    let settings = shared.settings();
    let db = settings.records_db();
    remove_old(shared, &endpoint, db).await?;
    let lane = ObjectId::new();
    // On record before it is there, so that it is removed some day.
    let (name, epoch) = (name(side, &lane.to_hex()), shared.store.epoch());
    let noted = shared.store.set_meta(&name, epoch).await;
    noted.map_err(store_failed)?;
    let command = doc! {
        "insert": COLLECTION, "documents": [{"_id": lane, "n": 0_i64}],
        "writeConcern": {"w": "majority"}, "maxTimeMS": 5000,
    };
    let reply = endpoint.run_doc(db, command).await?;
    if reply.contains_key("writeConcernError") {
        return Err(Failure::timeout().of(side));
    }
    Ok(Receipt { lane, number: 1 })
}

/// Removes the lanes of earlier runs that no intent refers to.
async fn remove_old(shared: &Shared, endpoint: &Arc<Endpoint>, db: &str) -> Result<(), Failure> {
    let (side, epoch) = (endpoint.side, shared.store.epoch());
    let found = shared.store.call(move |c| old_lanes(c, side, epoch));
    let old = found.await.map_err(store_failed)?;
    if old.is_empty() {
        return Ok(());
    }
    let command = doc! {
        "delete": COLLECTION, "deletes": [{"q": {"_id": {"$in": &old}}, "limit": 0}],
        "writeConcern": {"w": "majority"}, "maxTimeMS": 5000,
    };
    endpoint.run_doc(db, command).await?;
    let forgotten = shared.store.call(move |c| {
        old.iter().try_for_each(|lane| {
            let name = name(side, &lane.to_hex());
            c.execute("DELETE FROM meta WHERE k = ?", [name]).map(drop)
        })
    });
    forgotten.await.map_err(store_failed)
}

fn old_lanes(c: &Connection, side: Side, epoch: i64) -> rusqlite::Result<Vec<ObjectId>> {
    let used: HashSet<ObjectId> = store::intents::receipts(c)?
        .iter()
        .map(|r| r.lane)
        .collect();
    let prefix = name(side, "");
    let mut rows = c.prepare("SELECT k FROM meta WHERE k LIKE ? || '%' AND v < ?")?;
    let names = rows.query_map((&prefix, epoch), |r| r.get::<_, String>(0))?;
    let lanes = names.collect::<Result<Vec<_>, _>>()?;
    let lane = |name: &String| ObjectId::parse_str(name.strip_prefix(&prefix)?).ok();
    let old = lanes.iter().filter_map(lane);
    Ok(old.filter(|lane| !used.contains(lane)).collect())
}

/// Which of these transactions happened. One that may still be under way is not told yet.
pub(crate) async fn happened(
    endpoint: &Arc<Endpoint>,
    db: &str,
    receipts: &[Receipt],
) -> Result<Vec<bool>, Failure> {
    let lanes: Vec<ObjectId> = receipts.iter().map(|r| r.lane).collect();
    let command = doc! {
        "find": COLLECTION, "filter": {"_id": {"$in": &lanes}},
        "readConcern": endpoint.concern(), "batchSize": 1000,
    };
    let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("find"))?;
    let mut last = HashMap::new();
    endpoint
        .query(db, raw, |lane| {
            if let (Ok(id), Ok(n)) = (lane.get_object_id("_id"), lane.get_i64("n")) {
                last.insert(id, n);
            }
        })
        .await?;
    let number = |lane| last.get(lane).copied().unwrap_or(0);
    Ok(receipts
        .iter()
        .map(|r| number(&r.lane) >= r.number)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{Id, Key};
    use crate::rules::FieldRule;
    use crate::store::Store;
    use crate::store::intents::{self, Intent};

    fn write(expect: Option<bson::Document>, new: Option<bson::Document>) -> Write {
        let raw = doc! {"_id": 1}.to_vec().unwrap();
        let id = Id::of(&raw).unwrap();
        let bytes = |d: Option<bson::Document>| d.map(|d| d.to_vec().unwrap());
        Write {
            key: Key::new(1, &id),
            id,
            expect: bytes(expect),
            new: bytes(new),
        }
    }

    #[test]
    fn only_what_adds_up_needs_one() {
        let rules: FieldRules = [
            ("n".to_owned(), FieldRule::SumOfChanges),
            ("top".to_owned(), FieldRule::Max),
        ]
        .into();
        let at = |n: i32, top: i32, v: i32| Some(doc! {"_id": 1, "n": n, "top": top, "v": v});
        let needs = |expect, new| is_needed(&write(expect, new), Some(&rules));
        assert!(needs(at(1, 1, 1), at(2, 1, 1)));
        assert!(needs(Some(doc! {"_id": 1}), at(0, 1, 1)), "it appears");
        assert!(!needs(at(1, 1, 1), at(1, 2, 2)), "the larger one is larger");
        assert!(
            needs(None, at(1, 1, 1)),
            "what both sides add to a create afterwards"
        );
        assert!(!needs(None, Some(doc! {"_id": 1, "m": 1})));
        assert!(!needs(at(1, 1, 1), None));
        assert!(!is_needed(&write(at(1, 1, 1), at(2, 1, 1)), None));
    }

    #[tokio::test]
    async fn a_lane_stays_for_as_long_as_an_intent_refers_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (used, left, now) = (ObjectId::new(), ObjectId::new(), ObjectId::new());
        let old = store.call(move |c| {
            for (side, lane, epoch) in [
                (Side::Remote, used, 1),
                (Side::Remote, left, 1),
                (Side::Local, left, 1),
                (Side::Remote, now, 2),
            ] {
                store::set_meta(c, &name(side, &lane.to_hex()), epoch)?;
            }
            let intent = Intent {
                side: Side::Remote,
                new: None,
                digest: None,
                base_after: None,
                fields: None,
                epoch: 1,
                receipt: Some(Receipt {
                    lane: used,
                    number: 3,
                }),
            };
            intents::put(c, &write(None, None).key, &intent)?;
            old_lanes(c, Side::Remote, 2)
        });
        assert_eq!(old.await.unwrap(), [left]);
    }
}
