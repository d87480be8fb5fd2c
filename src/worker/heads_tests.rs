use bson::doc;

use super::*;
use crate::key::{Id, Key, KeySet};
use crate::store::queue::{self, Change};
use crate::store::{Store, transactions};

const BOOKINGS: u32 = 1;
const GUESTS: u32 = 2;
const LOGS: u32 = 3;

fn key(ns: u32, n: i32) -> (Key, Id) {
    let id = Id::of(&doc! {"_id": n}.to_vec().unwrap()).unwrap();
    (Key::new(ns, &id), id)
}

fn enqueue(c: &Connection, of: Side, ns: u32, ids: std::ops::Range<i32>) -> rusqlite::Result<()> {
    let changes: Vec<Change> = ids
        .map(|n| {
            let (key, id) = key(ns, n);
            Change {
                key,
                id,
                hint: None,
            }
        })
        .collect();
    queue::enqueue(c, of, &changes, 1)
}

fn classes(ranks: &[(Rank, &[u32])]) -> Vec<Class> {
    let classes = ranks.iter().map(|(rank, namespaces)| Class {
        rank: *rank,
        namespaces: namespaces.to_vec(),
    });
    classes.collect()
}

fn limits(most: usize) -> Limits {
    Limits {
        most,
        better_than: None,
        aged: true,
    }
}

/// Runs a test inside the store's thread, on an empty store.
async fn on_store(test: fn(&Connection) -> rusqlite::Result<()>) {
    let dir = tempfile::tempdir().unwrap();
    Store::open(dir.path()).unwrap().call(test).await.unwrap();
}

/// Numbers of the collections of what is claimed next; `None` at the end.
fn next(
    heads: &mut Heads,
    c: &Connection,
    limits: Limits,
    busy: &mut KeySet,
) -> rusqlite::Result<Option<(Rank, Vec<u32>)>> {
    let what = Claim {
        of: Side::Local,
        after: 0,
        limit: limits.most,
        now: 1_000,
        only: vec![],
        never: Default::default(),
        sync_fields: vec![],
        behind: Default::default(),
        sent: Default::default(),
        longest: i64::MAX,
    };
    let batch = heads.claim_in(c, what, limits, busy)?;
    Ok(batch.map(|b| (b.rank, b.works.iter().map(|w| w.key.ns()).collect())))
}

#[tokio::test]
async fn the_best_rank_is_claimed_first_and_alone() {
    on_store(|c| {
        enqueue(c, Side::Local, LOGS, 0..3)?;
        enqueue(c, Side::Remote, LOGS, 0..1)?;
        enqueue(c, Side::Local, GUESTS, 0..2)?;
        enqueue(c, Side::Local, BOOKINGS, 0..2)?;
        enqueue(c, Side::Remote, GUESTS, 5..6)?;
        let (mut heads, mut busy) = (Heads::new(), KeySet::default());
        heads.arrange(classes(&[(0, &[BOOKINGS]), (1, &[GUESTS]), (2, &[LOGS])]));
        let mut claimed = vec![];
        while let Some(batch) = next(&mut heads, c, limits(10), &mut busy)? {
            claimed.push(batch);
        }
        let expected = [
            (0, vec![BOOKINGS; 2]),
            (1, vec![GUESTS]),
            (1, vec![GUESTS; 2]),
            // A document that both sides changed is claimed once.
            (2, vec![LOGS]),
            (2, vec![LOGS; 2]),
        ];
        assert_eq!(claimed, expected);
        // What comes while worse ones wait or are at work is next.
        enqueue(c, Side::Local, LOGS, 10..13)?;
        enqueue(c, Side::Local, BOOKINGS, 10..11)?;
        heads.wake();
        assert_eq!(
            next(&mut heads, c, limits(1), &mut busy)?,
            Some((0, vec![BOOKINGS]))
        );
        let better = |rank| Limits {
            most: 1,
            better_than: Some(rank),
            aged: false,
        };
        assert_eq!(next(&mut heads, c, better(2), &mut busy)?, None);
        assert_eq!(
            next(&mut heads, c, better(3), &mut busy)?,
            Some((2, vec![LOGS]))
        );
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_new_order_counts_for_what_waits_already() {
    on_store(|c| {
        enqueue(c, Side::Local, LOGS, 0..3)?;
        enqueue(c, Side::Local, BOOKINGS, 0..1)?;
        let (mut heads, mut busy) = (Heads::new(), KeySet::default());
        assert_eq!(
            next(&mut heads, c, limits(1), &mut busy)?,
            Some((0, vec![LOGS]))
        );
        heads.arrange(classes(&[(0, &[BOOKINGS]), (1, &[LOGS])]));
        assert_eq!(
            next(&mut heads, c, limits(1), &mut busy)?,
            Some((0, vec![BOOKINGS]))
        );
        enqueue(c, Side::Local, BOOKINGS, 5..6)?;
        heads.arrange(classes(&[(0, &[LOGS]), (1, &[BOOKINGS])]));
        assert_eq!(
            next(&mut heads, c, limits(9), &mut busy)?,
            Some((0, vec![LOGS; 2]))
        );
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_transaction_takes_the_best_rank_of_its_collections() {
    on_store(|c| {
        enqueue(c, Side::Local, LOGS, 0..3)?;
        enqueue(c, Side::Local, BOOKINGS, 0..2)?;
        let together = [(key(LOGS, 1).0, 7), (key(BOOKINGS, 1).0, 7)];
        transactions::note(c, Side::Local, &together)?;
        let (mut heads, mut busy) = (Heads::new(), KeySet::default());
        heads.arrange(classes(&[(0, &[BOOKINGS]), (1, &[LOGS])]));
        let first = next(&mut heads, c, limits(9), &mut busy)?;
        assert_eq!(first, Some((0, vec![BOOKINGS, LOGS, BOOKINGS])));
        assert_eq!(
            next(&mut heads, c, limits(9), &mut busy)?,
            Some((1, vec![LOGS; 2]))
        );
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_stream_of_better_ones_stops_nobody_for_ever() {
    on_store(|c| {
        enqueue(c, Side::Local, LOGS, 0..4)?;
        let (mut heads, mut busy) = (Heads::new(), KeySet::default());
        heads.arrange(classes(&[(0, &[BOOKINGS]), (1, &[LOGS])]));
        let mut claimed = vec![];
        for n in 0..24 {
            enqueue(c, Side::Local, BOOKINGS, n..n + 1)?;
            heads.wake();
            claimed.extend(next(&mut heads, c, limits(1), &mut busy)?);
        }
        let logs = claimed.iter().filter(|(rank, _)| *rank == 1).count();
        assert_eq!(logs, 24 / AGED, "{claimed:?}");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn rows_of_a_collection_are_found_by_an_index() {
    on_store(|c| {
        lanes::index(c, true)?;
        enqueue(c, Side::Local, LOGS, 0..500)?;
        enqueue(c, Side::Local, BOOKINGS, 0..5)?;
        let plan: String = c.query_row(
            "EXPLAIN QUERY PLAN SELECT pos, key, id, seq, hint, attempts, at, next_at FROM outbox
             WHERE held IS NULL AND substr(key, 1, 4) = ?3 AND pos > ?1 ORDER BY pos LIMIT ?2",
            rusqlite::params![0, 10, BOOKINGS.to_be_bytes()],
            |r| r.get("detail"),
        )?;
        assert!(
            plan.contains("outbox_lanes") && plan.contains("pos>"),
            "{plan}"
        );
        lanes::index(c, false)
    })
    .await;
}
