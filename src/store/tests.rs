//! The store from the outside: durability, coalescing, sequence numbers, damage.

use std::collections::HashSet;

use bson::doc;
use bson::oid::ObjectId;

use super::base;
use super::claim::{Claim, claim};
use super::intents::{self, Intent};
use super::queue::{self, Change};
use super::*;
use crate::decide::Side;
use crate::key::{Id, Key};
use crate::receipt::Receipt;

fn change(n: i32, hint: Option<&[u8]>) -> Change {
    let raw = doc! {"_id": n}.to_vec().unwrap();
    let id = Id::of(&raw).unwrap();
    Change {
        key: Key::new(1, &id),
        id,
        hint: hint.map(<[u8]>::to_vec),
    }
}

fn claim_all(of: Side) -> Claim {
    Claim {
        behind: Default::default(),
        sent: Default::default(),
        longest: i64::MAX,
        of,
        after: 0,
        limit: 100,
        now: 1_000,
        only: vec![],
        never: HashSet::new(),
        sync_fields: vec!["syncedAt".into()],
    }
}

async fn claimed(store: &Store, of: Side) -> Vec<queue::Work> {
    store
        .call(move |c| claim(c, &claim_all(of), &mut Default::default()))
        .await
        .unwrap()
        .0
}

#[tokio::test]
async fn a_key_changed_often_is_one_row_in_the_order_of_its_first_change() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store
        .call(|c| {
            queue::enqueue(
                c,
                Side::Local,
                &[change(1, None), change(2, None), change(1, None)],
                5,
            )
        })
        .await
        .unwrap();
    let works = claimed(&store, Side::Local).await;
    assert_eq!(
        works.iter().map(|w| w.key.clone()).collect::<Vec<_>>(),
        [change(1, None).key, change(2, None).key]
    );
    assert_eq!(works[0].outbox.as_ref().unwrap().seq, 3);
}

#[tokio::test]
async fn r2_a_key_made_dirty_in_flight_stays_and_numbers_are_never_reused() {
    let dir = tempfile::tempdir().unwrap();
    let key = change(1, None).key;
    let seq = {
        let store = Store::open(dir.path()).unwrap();
        store
            .call(|c| queue::enqueue(c, Side::Local, &[change(1, None)], 5))
            .await
            .unwrap();
        let seq = claimed(&store, Side::Local).await[0]
            .outbox
            .as_ref()
            .unwrap()
            .seq;
        store
            .call(|c| queue::enqueue(c, Side::Local, &[change(1, None)], 6))
            .await
            .unwrap();
        let k = key.clone();
        store
            .call(move |c| queue::remove(c, Side::Local, &k, seq))
            .await
            .unwrap();
        assert_eq!(
            claimed(&store, Side::Local).await.len(),
            1,
            "the second change is still there"
        );
        let k = key.clone();
        store
            .call(move |c| queue::remove(c, Side::Local, &k, seq + 1))
            .await
            .unwrap();
        assert!(claimed(&store, Side::Local).await.is_empty());
        seq + 1
    };
    let store = reopen(dir.path());
    store
        .call(|c| queue::enqueue(c, Side::Local, &[change(1, None)], 5))
        .await
        .unwrap();
    assert!(
        claimed(&store, Side::Local).await[0]
            .outbox
            .as_ref()
            .unwrap()
            .seq
            > seq
    );
}

pub(super) fn reopen(dir: &Path) -> Store {
    // The thread of the dropped store lets go of the lock a moment later.
    for _ in 0..200 {
        match Store::open(dir) {
            Err(StoreError::Locked(_)) => std::thread::sleep(Duration::from_millis(5)),
            other => return other.unwrap(),
        }
    }
    panic!("the lock was never let go");
}

#[tokio::test]
async fn what_a_clock_put_off_that_was_set_back_since_is_due() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let due = store.call(|c| {
        queue::enqueue(c, Side::Local, &[change(1, None), change(2, None)], 5)?;
        for (n, at) in [(1, 1_500), (2, 110_000_000)] {
            queue::defer(c, Side::Local, &change(n, None).key, at, false, None)?;
        }
        let mut what = claim_all(Side::Local);
        what.longest = 1_000;
        claim(c, &what, &mut Default::default())
    });
    let keys: Vec<_> = due.await.unwrap().0.into_iter().map(|w| w.key).collect();
    assert_eq!(keys, [change(2, None).key]);
}

#[tokio::test]
async fn what_leaves_is_counted_whatever_became_of_it_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let of = |ns: u32, n: i32| {
        let Change { id, .. } = change(n, None);
        let key = Key::new(ns, &id);
        let hint = None;
        Change { key, id, hint }
    };
    // GIVEN claimed rows of two collections, of which one is held and one comes again
    let left = store.call(move |c| {
        let changes = [(2, 1), (1, 2), (2, 3), (1, 4), (1, 5)].map(|(ns, n)| of(ns, n));
        queue::enqueue(c, Side::Local, &changes, 5)?;
        let together: Vec<_> = changes.iter().map(|c| (c.key.clone(), 7)).collect();
        transactions::note(c, Side::Local, &together)?;
        let (works, _) = claim(c, &claim_all(Side::Local), &mut Default::default())?;
        assert_eq!(works.len(), 5);
        let held = &works[3];
        let seq = held.outbox.as_ref().unwrap().seq;
        queue::hold(c, Side::Local, &held.key, seq, "failed", "refused")?;
        queue::enqueue(c, Side::Local, &changes[4..], 6)?;
        // WHEN all of them leave
        let rows = works.iter().map(|w| (&w.key, w.outbox.as_ref().unwrap()));
        queue::remove_all(c, Side::Local, &mut rows.collect::<Vec<_>>())?;
        // THEN what came again stays, with its part in the transaction, and nothing else is counted
        let still = |key: &Key| transactions::of(c, key.as_bytes());
        Ok((
            queue::counts(c, Side::Local)?,
            [queue::count_of(c, 1)?, queue::count_of(c, 2)?],
            [still(&changes[4].key)?, still(&changes[3].key)?],
            queue::get_row(c, Side::Local, &changes[4].key)?.is_some(),
        ))
    });
    let (counts, by_ns, transaction, stays) = left.await.unwrap();
    assert_eq!((counts.all, counts.failed), (1, 0), "{counts:?}");
    assert_eq!(by_ns, [1, 0]);
    assert_eq!(transaction, [Some(7), None]);
    assert!(stays);
}

#[tokio::test]
async fn echoes_leave_without_a_look_at_the_document() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let mut update = b"u".to_vec();
    update.extend(
        doc! {"updatedFields": {"a": 2, "syncedAt": 1}, "removedFields": [], "truncatedArrays": []}
            .to_vec()
            .unwrap(),
    );
    let mut news = b"u".to_vec();
    news.extend(
        doc! {"updatedFields": {"a": 3}, "removedFields": []}
            .to_vec()
            .unwrap(),
    );
    let content = doc! {"_id": 1, "a": 2}.to_vec().unwrap();
    let c1 = content.clone();
    store
        .call(move |c| base::put(c, &change(1, None).key, Some(&c1)))
        .await
        .unwrap();
    let queue_one = |hint: Vec<u8>| {
        store.call(move |c| queue::enqueue(c, Side::Remote, &[change(1, Some(&hint))], 5))
    };

    queue_one(update.clone()).await.unwrap();
    assert!(
        claimed(&store, Side::Remote).await.is_empty(),
        "what it says is in base"
    );
    queue_one(news).await.unwrap();
    assert_eq!(
        claimed(&store, Side::Remote).await.len(),
        1,
        "it says something new"
    );
    queue_one(update.clone()).await.unwrap();
    assert_eq!(
        claimed(&store, Side::Remote).await.len(),
        1,
        "two events of a key: look at the document"
    );
    store
        .call(|c| c.execute("DELETE FROM inbox", []))
        .await
        .unwrap();
    queue_one(b"d".to_vec()).await.unwrap();
    assert_eq!(
        claimed(&store, Side::Remote).await.len(),
        1,
        "a deletion of what base has"
    );
}

#[tokio::test]
async fn r3_intents_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let body = |a: i32| {
        doc! {"_id": 1, "a": a, "pad": "x".repeat(500)}
            .to_vec()
            .unwrap()
    };
    let intents = [
        Intent {
            side: Side::Remote,
            new: Some(body(1)),
            digest: None,
            base_after: Some(body(1)),
            fields: Some(vec![b"a".to_vec()]),
            epoch: 1,
            receipt: Some(Receipt {
                lane: ObjectId::new(),
                number: 7,
            }),
        },
        Intent {
            side: Side::Local,
            new: None,
            digest: None,
            base_after: None,
            fields: None,
            epoch: 1,
            receipt: None,
        },
        Intent {
            side: Side::Remote,
            new: None,
            digest: Some(intents::digest(&body(1))),
            base_after: None,
            fields: None,
            epoch: 1,
            receipt: None,
        },
        Intent {
            side: Side::Remote,
            new: Some(body(1)),
            digest: None,
            base_after: None,
            fields: None,
            epoch: 1,
            receipt: None,
        },
    ];
    for intent in intents {
        let store = reopen(dir.path());
        let i = intent.clone();
        store
            .call(move |c| intents::put(c, &change(1, None).key, &i))
            .await
            .unwrap();
        drop(store);
        let store = reopen(dir.path());
        let read = store
            .call(|c| intents::get(c, &change(1, None).key))
            .await
            .unwrap();
        assert_eq!(read, Some(intent));
    }
}

#[tokio::test]
async fn a_failed_call_changes_nothing_and_harms_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let bad = || {
        store.call(|c| {
            set_meta(c, "x", 1)?;
            c.execute("INSERT INTO no_such_table VALUES(1)", [])
        })
    };
    // Alone at first; then in one transaction with others, which come while the first is at work.
    for first in [false, true] {
        let slow = store.call(move |c| {
            if first {
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            set_meta(c, "w", 3)
        });
        let good = store.set_meta("y", 2);
        let outcomes = match first {
            true => tokio::join!(slow, bad(), good),
            false => {
                let bad = bad().await;
                let (slow, good) = tokio::join!(slow, good);
                (slow, bad, good)
            }
        };
        assert!(outcomes.0.is_ok() && outcomes.1.is_err() && outcomes.2.is_ok());
        assert_eq!(store.get_meta::<i64>("x").await.unwrap(), None);
        assert_eq!(store.get_meta::<i64>("y").await.unwrap(), Some(2));
        assert_eq!(store.get_meta::<i64>("w").await.unwrap(), Some(3));
    }
}

#[tokio::test]
async fn every_file_of_the_state_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.set_meta("x", 1).await.unwrap();
    let mut seen = 0;
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let file = file.unwrap();
        let mode = file.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{:?}", file.file_name());
        seen += 1;
    }
    assert!(seen >= 3, "database, log, lock");
}

#[test]
fn a_second_daemon_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _first = Store::open(dir.path()).unwrap();
    assert!(matches!(
        Store::open(dir.path()),
        Err(StoreError::Locked(_))
    ));
}

#[tokio::test]
async fn a_damaged_file_is_put_aside_and_named() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 3] = [
        ("garbled head", |p| {
            std::fs::write(p, b"this is no database at all").unwrap()
        }),
        ("cut", |p| {
            File::options()
                .write(true)
                .open(p)
                .unwrap()
                .set_len(20_000)
                .unwrap()
        }),
        ("garbled middle", |p| {
            let mut bytes = std::fs::read(p).unwrap();
            let n = bytes.len();
            bytes[n / 3..n / 2].fill(0xA5);
            std::fs::write(p, bytes).unwrap();
        }),
    ];
    for (what, damage) in damages {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sangam.db");
        let store = Store::open(dir.path()).unwrap();
        let many: Vec<_> = (0..5_000).map(|n| change(n, None)).collect();
        store
            .call(move |c| queue::enqueue(c, Side::Local, &many, 5))
            .await
            .unwrap();
        drop(store);
        drop(reopen(dir.path()));
        std::thread::sleep(Duration::from_millis(50));
        Connection::open(&path)
            .unwrap()
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
            .unwrap();
        damage(&path);
        let store = reopen(dir.path());
        let aside = store
            .put_aside()
            .unwrap_or_else(|| panic!("{what}: not noticed"))
            .to_owned();
        assert!(
            aside.exists() && aside.to_string_lossy().contains("damaged"),
            "{what}"
        );
        assert_eq!(
            store
                .call(|c| queue::counts(c, Side::Local))
                .await
                .unwrap()
                .all,
            0
        );
    }
}

#[test]
fn a_newer_format_is_refused_with_its_remedy() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(dir.path()).unwrap());
    Connection::open(dir.path().join("sangam.db"))
        .unwrap()
        .execute_batch("PRAGMA user_version=99")
        .unwrap();
    for _ in 0..200 {
        match Store::open(dir.path()) {
            Err(StoreError::Locked(_)) => std::thread::sleep(Duration::from_millis(5)),
            Err(e @ StoreError::Newer { .. }) => {
                return assert!(e.to_string().contains("install that version"));
            }
            _ => panic!("opened a newer format"),
        }
    }
}

#[test]
fn damaged_rows_of_base_are_noticed() {
    let content = doc! {"_id": 1, "text": "abc ".repeat(100)}
        .to_vec()
        .unwrap();
    let stored = base::encode(1, &content);
    assert!(stored.len() < content.len());
    assert_eq!(base::decode(&stored), Some(content));
    for at in 0..stored.len() {
        let mut bad = stored.clone();
        bad[at] ^= 0x40;
        assert_eq!(base::decode(&bad), None, "byte {at}");
    }
}

#[tokio::test]
async fn many_become_base_together_and_what_it_knows_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let row = |n: i32, text: &str| {
        let content = doc! {"_id": n, "text": text}.to_vec().unwrap();
        (change(n, None).key, base::encode(1, &content))
    };
    let add = |range: std::ops::Range<i32>, text: &str| {
        let rows: Vec<_> = range.map(|n| row(n, text)).collect();
        let store = store.clone();
        async move {
            let added = store.call(move |c| {
                let rows: Vec<_> = rows.iter().map(|(k, e)| (k, e.as_slice())).collect();
                base::add_encoded(c, &rows)
            });
            added.await.unwrap()
        }
    };
    assert!(add(0..0, "none").await);
    // More than one statement, and a rest.
    assert!(add(0..137, "first").await);
    assert!(!add(100..260, "second").await);
    let hashes = store.call(|c| {
        (0..260)
            .map(|n| base::get_hash(c, &change(n, None).key))
            .collect::<rusqlite::Result<Vec<_>>>()
    });
    for (n, hash) in (0..).zip(hashes.await.unwrap()) {
        let text = if n < 137 { "first" } else { "second" };
        assert_eq!(hash, base::hash_of(&row(n, text).1), "{n}");
    }
}

#[tokio::test]
async fn base_is_packed_with_what_the_documents_of_a_collection_have_in_common() {
    let dir = tempfile::tempdir().unwrap();
    let key = |n: i32| Key::new(1, &Id::of(&doc! {"_id": n}.to_vec().unwrap()).unwrap());
    let content = |n: i32| {
        let text = format!("please call before the ritual begins ({n})");
        doc! {"_id": n, "name": format!("devotee {n}"), "paid": n % 3 == 0, "notes": text}
            .to_vec()
            .unwrap()
    };
    let put = |store: Store, from: i32, to: i32| async move {
        let bodies: Vec<_> = (from..to).map(|n| (key(n), content(n))).collect();
        let done = store.call(move |c| {
            bodies
                .iter()
                .try_for_each(|(key, body)| base::put(c, key, Some(body)))
        });
        done.await.unwrap();
    };
    let length = |store: Store, n: i32| async move {
        let sql = "SELECT length(body) FROM base WHERE key = ?";
        let row = store.call(move |c| c.query_row(sql, [key(n).as_bytes()], |r| r.get(0)));
        row.await.unwrap()
    };
    let store = Store::open(dir.path()).unwrap();
    put(store.clone(), 0, 5000).await;
    let alone: usize = length(store.clone(), 0).await;
    // Training is on its way.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(90);
    let together = loop {
        put(store.clone(), 5000, 5001).await;
        let together: usize = length(store.clone(), 5000).await;
        if together * 10 < alone * 7 || std::time::Instant::now() > deadline {
            break together;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    assert!(together * 10 < alone * 7, "{together} bytes, alone {alone}");
    // All of it can be read, by the next run as well.
    let read = |store: Store| async move {
        for n in [0, 4999, 5000] {
            let found = store.call(move |c| base::get(c, &key(n))).await.unwrap();
            assert_eq!(found, Some(content(n)));
        }
    };
    read(store.clone()).await;
    drop(store);
    let next = loop {
        // The lock goes with the last handle, which training may hold.
        match Store::open(dir.path()) {
            Err(StoreError::Locked(_)) => tokio::task::yield_now().await,
            opened => break opened.unwrap(),
        }
    };
    read(next).await;
}
