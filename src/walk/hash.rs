//! The cheap comparison of a range: by hashes that the servers compute.
//!
//! One number for a range on each side, the sum of its documents' hashes, so that their order does
//! not matter. Where the numbers differ, the range is cut into parts, and at the end into documents. All of
//! it is plain aggregation, which small tiers offer, too. The sync fields are left out by `$unset`,
//! which keeps the other fields as they stand. A document's size is added, since to the hash 1 and 1.0 are
//! the same; 2.2 and 2.9 still are.

use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _};

use super::{Count, Difference, Finds, Found, Out, Place, Range, Seen};
use crate::failure::Failure;
use crate::key::{Id, Key, KeyMap};
use crate::raw::{Writer, index_name};
use crate::side::Endpoint;

/// A range of no more documents is compared document by document.
const FEW: u64 = 1000;

/// Into how many parts a range that differs is cut.
const PARTS: u64 = 8;

/// Questions that a side is asked at once.
const AT_ONCE: usize = 4;

/// Hashes are taken modulo this, so that the sum of a range is exact.
const MODULUS: i64 = 1 << 40;

/// Documents of a range and the sum of their hashes.
type Sum = (u64, i64);

impl Place {
    /// Compares a range by hashes; see the module's text. What seems to differ goes to `finds`, its
    /// contents unread. An error that is a refusal: the servers can't hash this range.
    pub async fn cheap(&self, range: &Range, finds: &Finds) -> Result<Count, Failure> {
        let mut out = Out::new(finds);
        let mut count = Count::default();
        let mut open = vec![range.clone()];
        while !open.is_empty() {
            let each = open.iter().cloned();
            let asked =
                futures::stream::iter(each.map(|range| async move { self.sums(&range).await }));
            let sums: Vec<_> = asked.buffered(AT_ONCE).try_collect().await?;
            let mut parts = Vec::new();
            for (range, (local, remote)) in open.into_iter().zip(sums) {
                let most = local.0.max(remote.0);
                if local == remote {
                    count.documents += most;
                    count.by_hash += most;
                } else if most <= FEW {
                    let some = self.by_document(&range, &mut out).await?;
                    count.documents += some.documents;
                    count.by_hash += some.by_hash;
                } else {
                    parts.extend(self.cut(range, local.0 >= remote.0, most).await?);
                }
            }
            open = parts;
        }
        out.flush().await?;
        Ok(count)
    }

    async fn sums(&self, range: &Range) -> Result<(Sum, Sum), Failure> {
        tokio::try_join!(self.sum(&self.local, range), self.sum(&self.remote, range))
    }

    /// Cuts a range into parts by the documents of the side that has more.
    async fn cut(&self, range: Range, by_local: bool, most: u64) -> Result<Vec<Range>, Failure> {
        let by = if by_local { &self.local } else { &self.remote };
        let each = (most / PARTS).max(FEW / 2);
        let mut parts = Vec::new();
        let mut rest = range;
        while let Some(id) = self.nth(by, &rest, each).await? {
            parts.push(Range {
                from: rest.from.replace(id.clone()),
                to: Some(id),
            });
        }
        parts.push(rest);
        Ok(parts)
    }

    /// Compares the hash of each document.
    async fn by_document(&self, range: &Range, out: &mut Out<'_>) -> Result<Count, Failure> {
        let (mut local, remote) = tokio::try_join!(
            self.hashes(&self.local, range),
            self.hashes(&self.remote, range)
        )?;
        let mut count = Count::default();
        let differ = |key, id, local, remote| {
            Found::Differs(Difference {
                key,
                id,
                local,
                remote,
            })
        };
        for (key, (id, there)) in remote {
            count.documents += 1;
            let found = match local.remove(&key) {
                Some((_, here)) if here == there => {
                    count.by_hash += 1;
                    continue;
                }
                Some(_) => differ(key, id, Seen::Unread, Seen::Unread),
                None => differ(key, id, Seen::Absent, Seen::Unread),
            };
            out.push(found);
            out.flush_if_full().await?;
        }
        for (key, (id, _)) in local {
            count.documents += 1;
            out.push(differ(key, id, Seen::Unread, Seen::Absent));
            out.flush_if_full().await?;
        }
        Ok(count)
    }

    async fn sum(&self, endpoint: &Arc<Endpoint>, range: &Range) -> Result<Sum, Failure> {
        let mut w = Writer::new();
        let stage = self.hashed(&mut w, range);
        w.open(stage)
            .open("$group")
            .value("_id", 0x0A, &[])
            .open("n")
            .i32("$sum", 1)
            .close();
        w.open("h").open("$sum");
        hash(&mut w);
        w.close().close().close().close();
        self.ending(&mut w);
        let mut sum = (0, 0);
        endpoint
            .query(&self.db, w.command(), |d| {
                sum = (
                    u64::try_from(integer(&d, "n")).unwrap_or(0),
                    integer(&d, "h"),
                );
            })
            .await?;
        Ok(sum)
    }

    async fn hashes(
        &self,
        endpoint: &Arc<Endpoint>,
        range: &Range,
    ) -> Result<KeyMap<(Id, i64)>, Failure> {
        let mut w = Writer::new();
        let stage = self.hashed(&mut w, range);
        w.open(stage).open("$project").open("h");
        hash(&mut w);
        w.close().close().close();
        self.ending(&mut w);
        let mut found = KeyMap::default();
        endpoint
            .query(&self.db, w.command(), |d| {
                if let Some(id) = Id::of(d.as_bytes()) {
                    found.insert(Key::new(self.ns, &id), (id, integer(&d, "h")));
                }
            })
            .await?;
        Ok(found)
    }

    /// The beginning of a pipeline over a range, sync fields left out; the name of the next stage.
    fn hashed(&self, w: &mut Writer, range: &Range) -> String {
        w.str("aggregate", &self.coll).open_array("pipeline");
        let mut stage = 0;
        if range.from.is_some() || range.to.is_some() {
            // `$expr` compares across types, as the index does; a plain `$gte` would stay within one.
            w.open("0").open("$match").open("$expr").open_array("$and");
            let bounds = [("$gte", &range.from), ("$lt", &range.to)];
            let bounds = bounds
                .into_iter()
                .filter_map(|(operator, id)| Some((operator, id.as_ref()?)));
            for (i, (operator, id)) in bounds.enumerate() {
                w.open(index_name(i)).open_array(operator).str("0", "$_id");
                w.open("1").value("$literal", id.kind, &id.value).close();
                w.close().close();
            }
            w.close().close().close().close();
            stage += 1;
        }
        if !self.sync_fields.is_empty() {
            w.open(index_name(stage)).open_array("$unset");
            for (i, name) in self.sync_fields.iter().enumerate() {
                w.str(index_name(i), name);
            }
            w.close().close();
            stage += 1;
        }
        index_name(stage)
    }

    fn ending(&self, w: &mut Writer) {
        w.close().open("cursor").i32("batchSize", 10_000).close();
        w.open("hint").i32("_id", 1).close();
        w.open("readConcern").str("level", "majority").close();
    }
}

/// The expression, into an open document: the hash of the document, and its size.
fn hash(w: &mut Writer) {
    w.open_array("$add");
    w.open("0").open_array("$mod");
    w.open("0").str("$toHashedIndexKey", "$$ROOT").close();
    w.value("1", 0x12, &MODULUS.to_le_bytes()).close().close();
    w.open("1").str("$bsonSize", "$$ROOT").close();
    w.close();
}

fn integer(d: &bson::RawDocument, name: &str) -> i64 {
    d.get_i64(name)
        .or_else(|_| d.get_i32(name).map(i64::from))
        .unwrap_or(0)
}
