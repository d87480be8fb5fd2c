//! How new an answer must be.
//!
//! A read by majority shows what the server *knows* most members to have. A member that has just been
//! elected may know less than the one before it did: after a restart it begins with a state of up to a
//! minute ago, and shows that until most have its first own entry. And a primary that was suspended
//! takes itself for one until it hears of the next. An old state that is taken for the present one
//! looks like an edit, and would be carried over. So reads name the latest time that is known to have
//! been committed, and whoever is new as primary has to commit something first.

use bson::{Document, RawDocumentBuf, Timestamp, doc};

use super::Endpoint;
use crate::failure::{Failure, MAX_TIME_EXPIRED};
use crate::raw::Writer;
use crate::receipt;
use crate::shared::lock;

/// How long the server may take to have something committed by most members, in ms.
const COMMITTED: i32 = 5_000;

impl Endpoint {
    /// Most members have what happened at that time: no later read may show less.
    pub fn told(&self, time: Timestamp) {
        let mut told = lock(&self.told);
        *told = (*told).max(Some(time));
    }

    /// The same, of the answer to a write, or to a read that waited for most members.
    pub(super) fn told_by(&self, answer: &Document) {
        if let Ok(time) = answer.get_timestamp("operationTime") {
            self.told(time);
        }
    }

    /// Puts the read concern of a command in place: what most members have, and never less than was
    /// told before.
    pub fn put_concern(&self, w: &mut Writer) {
        w.open("readConcern").str("level", "majority");
        if let Some(time) = *lock(&self.told) {
            w.timestamp("afterClusterTime", time);
        }
        w.close();
    }

    /// The same as a document.
    pub fn concern(&self) -> Document {
        match *lock(&self.told) {
            Some(time) => doc! {"level": "majority", "afterClusterTime": time},
            None => doc! {"level": "majority"},
        }
    }

    /// Lets the primary show that it is one, and that it knows all that was committed before it became
    /// one: it answers this read once most members have an entry of its own, and later reads show no less.
    ///
    /// # Errors
    /// A server that does not reach most members in time; one that does not offer this proves nothing.
    pub async fn prove_primary(&self, db: &str) -> Result<(), Failure> {
        let command = doc! {
            "find": receipt::COLLECTION, "filter": {"_id": 0}, "limit": 1,
            "readConcern": {"level": "linearizable"}, "maxTimeMS": COMMITTED,
        };
        let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("find"))?;
        match self.run_now(db, raw).await {
            Ok(answer) => {
                self.told_by(&answer);
                Ok(())
            }
            Err(failure) if failure.is_refusal() => {
                tracing::debug!(side = self.side.name(), %failure, "can't prove to be the primary");
                Ok(())
            }
            Err(failure) if failure.code == Some(MAX_TIME_EXPIRED) => Err(Failure {
                what: "it does not reach most members of its replica set (are they running?)"
                    .into(),
                ..failure
            }),
            Err(failure) => Err(failure),
        }
    }
}
