//! The queues against a model: random operations and crashes do the same to both.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use bson::doc;
use proptest::prelude::*;

use super::base;
use super::claim::{Claim, claim};
use super::queue::{self, Change};
use super::*;
use crate::decide::Side;
use crate::key::{Id, Key, KeySet};

/// What an event said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Look,
    Deleted,
    /// Several events, the last of them a deletion: look all the same.
    Gone,
    Set(i32),
}

#[derive(Clone, Debug)]
enum Step {
    Enqueue(Side, Vec<(i32, Said)>),
    Claim(Side, usize, i64),
    /// The claimed key number so many is done: base becomes this, its rows go (R2).
    Settle(usize, Option<i32>),
    /// It is put back for later.
    Defer(usize, i64, bool),
    /// It is held.
    Hold(usize, bool),
    RetryAll,
    /// The process dies: what was claimed is forgotten, all that was answered is there.
    Crash,
    /// The machine dies and the disk had not written all: an earlier moment is there, whole.
    Torn(usize),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    key: i32,
    seq: i64,
    said: Said,
    attempts: u32,
    next_at: i64,
    held: Option<&'static str>,
}

/// What the store must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Model {
    seq: i64,
    outbox: Vec<Row>,
    inbox: Vec<Row>,
    base: BTreeMap<i32, i32>,
}

fn other(of: Side) -> Side {
    of.other()
}

impl Model {
    fn rows(&mut self, of: Side) -> &mut Vec<Row> {
        match of {
            Side::Local => &mut self.outbox,
            Side::Remote => &mut self.inbox,
        }
    }

    fn seq_of(&mut self, of: Side, key: i32) -> Option<i64> {
        let rows = self.rows(of);
        rows.iter().find(|row| row.key == key).map(|row| row.seq)
    }

    fn enqueue(&mut self, of: Side, changes: &[(i32, Said)]) {
        for (key, said) in changes {
            self.seq += 1;
            let seq = self.seq;
            let rows = self.rows(of);
            match rows.iter_mut().find(|row| row.key == *key) {
                Some(row) => {
                    let said = match said {
                        Said::Deleted => Said::Gone,
                        _ => Said::Look,
                    };
                    (row.seq, row.said, row.attempts) = (seq, said, 0);
                    (row.next_at, row.held) = (0, None);
                }
                None => rows.push(Row {
                    key: *key,
                    seq,
                    said: *said,
                    attempts: 0,
                    next_at: 0,
                    held: None,
                }),
            }
        }
    }

    fn claim(&mut self, of: Side, limit: usize, now: i64, busy: &mut Vec<Claimed>) {
        let mut left = limit;
        for row in self.rows(of).clone() {
            if left == 0 {
                break;
            }
            let taken = busy.iter().any(|claimed| claimed.key == row.key);
            if row.held.is_some() || row.next_at > now || taken {
                continue;
            }
            let there = self.seq_of(other(of), row.key);
            let echo = match (row.said, self.base.get(&row.key)) {
                (Said::Deleted, None) => true,
                (Said::Set(n), Some(base)) => n == *base,
                _ => false,
            };
            if there.is_none() && echo {
                self.rows(of).retain(|r| r.key != row.key);
                continue;
            }
            let (outbox, inbox) = match of {
                Side::Local => (Some(row.seq), there),
                Side::Remote => (there, Some(row.seq)),
            };
            busy.push(Claimed {
                key: row.key,
                outbox,
                inbox,
            });
            left -= 1;
        }
    }
}

/// A claimed key with the sequence numbers of its rows.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Claimed {
    key: i32,
    outbox: Option<i64>,
    inbox: Option<i64>,
}

impl Claimed {
    fn seqs(&self) -> impl Iterator<Item = (Side, i64)> {
        let outbox = self.outbox.map(|seq| (Side::Local, seq));
        outbox
            .into_iter()
            .chain(self.inbox.map(|seq| (Side::Remote, seq)))
    }
}

fn key(n: i32) -> (Key, Id) {
    let id = Id::of(&doc! {"_id": n}.to_vec().unwrap()).unwrap();
    (Key::new(1, &id), id)
}

fn content(n: i32) -> Vec<u8> {
    doc! {"_id": 1, "a": n}.to_vec().unwrap()
}

fn change(n: i32, said: Said) -> Change {
    let (key, id) = key(n);
    let hint = match said {
        Said::Look => None,
        Said::Deleted => Some(b"d".to_vec()),
        Said::Gone => Some(queue::LOOK_GONE.to_vec()),
        Said::Set(n) => {
            let described = doc! {"updatedFields": {"a": n}, "removedFields": []};
            Some([b"u".to_vec(), described.to_vec().unwrap()].concat())
        }
    };
    Change { key, id, hint }
}

/// The real store, and what is claimed from it.
struct Real {
    store: Option<Store>,
    dir: PathBuf,
    /// Every life of it has a folder of its own: the dead one's thread may still hold the lock.
    root: tempfile::TempDir,
    lives: usize,
}

impl Real {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("0");
        let store = Some(Store::open(&dir).unwrap());
        Self {
            store,
            dir,
            root,
            lives: 0,
        }
    }

    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> T {
        self.store.as_ref().unwrap().call(work).await.unwrap()
    }

    /// As `kill -9` leaves it: the files as they are between two calls. `torn`: of the log, only so
    /// many per mille.
    fn die(&mut self, torn: Option<usize>) {
        self.lives += 1;
        let next = self.root.path().join(self.lives.to_string());
        std::fs::create_dir(&next).unwrap();
        for name in ["sangam.db", "sangam.db-wal"] {
            if let Ok(mut bytes) = std::fs::read(self.dir.join(name)) {
                if name.ends_with("wal")
                    && let Some(kept) = torn
                {
                    bytes.truncate(bytes.len() * kept / 1000);
                }
                std::fs::write(next.join(name), bytes).unwrap();
            }
        }
        self.store = None;
        self.dir = next;
        self.store = Some(Store::open(&self.dir).unwrap());
        assert_eq!(self.store.as_ref().unwrap().put_aside(), None);
    }

    /// All that the model knows of.
    async fn dump(&self) -> Model {
        self.call(|c| {
            let names: BTreeMap<Vec<u8>, i32> = (0..KEYS)
                .map(|n| (key(n).0.as_bytes().to_vec(), n))
                .collect();
            let says: Vec<(Option<Vec<u8>>, Said)> = [Said::Look, Said::Deleted, Said::Gone]
                .into_iter()
                .chain((0..VALUES).map(Said::Set))
                .map(|said| (change(0, said).hint, said))
                .collect();
            let rows = |table: &str| -> rusqlite::Result<Vec<Row>> {
                let query = format!(
                    "SELECT key, seq, hint, attempts, next_at, held FROM {table} ORDER BY pos"
                );
                c.prepare(&query)?
                    .query_map([], |r| {
                        let hint: Option<Vec<u8>> = r.get(2)?;
                        let held: Option<String> = r.get(5)?;
                        Ok(Row {
                            key: names[&r.get::<_, Vec<u8>>(0)?],
                            seq: r.get(1)?,
                            said: says.iter().find(|s| s.0 == hint).unwrap().1,
                            attempts: r.get(3)?,
                            next_at: r.get(4)?,
                            held: held.map(|h| if h == "failed" { "failed" } else { "conflict" }),
                        })
                    })?
                    .collect()
            };
            let mut contents = BTreeMap::new();
            for n in 0..KEYS {
                if let Some(body) = base::get(c, &key(n).0)? {
                    let a = (0..VALUES).find(|v| content(*v) == body).unwrap();
                    contents.insert(n, a);
                }
            }
            // The counts are those of the rows, after every step and every crash.
            for of in [Side::Local, Side::Remote] {
                let t = queue::table(of);
                let number = |what: &str| {
                    let query = format!("SELECT count(*) FROM {t} WHERE {what}");
                    c.query_row(&query, [], |r| r.get::<_, u64>(0))
                };
                let counts = queue::counts(c, of)?;
                assert_eq!(counts.all, number("true")?);
                assert_eq!(counts.conflict, number("held = 'conflict'")?);
                assert_eq!(counts.failed, number("held = 'failed'")?);
            }
            let rows_of = "SELECT (SELECT count(*) FROM outbox) + (SELECT count(*) FROM inbox)";
            assert_eq!(
                queue::count_of(c, 1)?,
                c.query_row(rows_of, [], |r| r.get::<_, u64>(0))?
            );
            Ok(Model {
                seq: queue::last_seq(c)?,
                outbox: rows("outbox")?,
                inbox: rows("inbox")?,
                base: contents,
            })
        })
        .await
    }
}

const KEYS: i32 = 4;
const VALUES: i32 = 3;

/// Does one step to both; `claimed` is what a worker holds.
async fn step(model: &mut Model, real: &Real, claimed: &mut Vec<Claimed>, step: Step) {
    match step {
        Step::Enqueue(of, changes) => {
            model.enqueue(of, &changes);
            let changes: Vec<Change> = changes.iter().map(|(n, said)| change(*n, *said)).collect();
            real.call(move |c| queue::enqueue(c, of, &changes, 5)).await;
        }
        Step::Claim(of, limit, now) => {
            let what = Claim {
                of,
                after: 0,
                limit,
                now,
                only: vec![],
                never: HashSet::new(),
                sync_fields: vec![],
                behind: Default::default(),
                sent: Default::default(),
                longest: i64::MAX,
            };
            let mut busy: KeySet = claimed.iter().map(|claim| key(claim.key).0).collect();
            let before = claimed.len();
            model.claim(of, limit, now, claimed);
            let works = real.call(move |c| claim(c, &what, &mut busy)).await.0;
            let found: Vec<Claimed> = works
                .iter()
                .map(|work| Claimed {
                    key: (0..KEYS).find(|n| key(*n).0 == work.key).unwrap(),
                    outbox: work.outbox.as_ref().map(|row| row.seq),
                    inbox: work.inbox.as_ref().map(|row| row.seq),
                })
                .collect();
            assert_eq!(&claimed[before..], found);
        }
        Step::Settle(n, value) if !claimed.is_empty() => {
            let claim = claimed.remove(n % claimed.len());
            match value {
                Some(value) => model.base.insert(claim.key, value),
                None => model.base.remove(&claim.key),
            };
            for (of, seq) in claim.seqs() {
                let rows = model.rows(of);
                rows.retain(|row| row.key != claim.key || row.seq != seq);
            }
            real.call(move |c| {
                let key = key(claim.key).0;
                base::put(c, &key, value.map(content).as_deref())?;
                for (of, seq) in claim.seqs() {
                    queue::remove(c, of, &key, seq)?;
                }
                Ok(())
            })
            .await;
        }
        Step::Defer(n, next_at, attempt) if !claimed.is_empty() => {
            let claim = claimed.remove(n % claimed.len());
            for (of, _) in claim.seqs() {
                let rows = model.rows(of).iter_mut();
                for row in rows.filter(|row| row.key == claim.key) {
                    row.next_at = next_at;
                    row.attempts += u32::from(attempt);
                }
            }
            real.call(move |c| {
                for (of, _) in claim.seqs() {
                    queue::defer(c, of, &key(claim.key).0, next_at, attempt, None)?;
                }
                Ok(())
            })
            .await;
        }
        Step::Hold(n, failed) if !claimed.is_empty() => {
            let claim = claimed.remove(n % claimed.len());
            let held = if failed { "failed" } else { "conflict" };
            for (of, seq) in claim.seqs() {
                let rows = model.rows(of).iter_mut();
                for row in rows.filter(|row| row.key == claim.key && row.seq == seq) {
                    row.held = Some(held);
                }
            }
            real.call(move |c| {
                for (of, seq) in claim.seqs() {
                    queue::hold(c, of, &key(claim.key).0, seq, held, "because")?;
                }
                Ok(())
            })
            .await;
        }
        Step::RetryAll => {
            for of in [Side::Local, Side::Remote] {
                for row in model.rows(of) {
                    row.next_at = 0;
                    if row.held == Some("failed") {
                        (row.held, row.attempts) = (None, 0);
                    }
                }
            }
            real.call(queue::retry_all).await;
        }
        _ => {}
    }
}

async fn run(steps: Vec<Step>) {
    let (mut model, mut real) = (Model::default(), Real::new());
    let mut claimed = Vec::new();
    let mut past = vec![model.clone()];
    for next in steps {
        match next {
            Step::Crash => {
                real.die(None);
                claimed.clear();
            }
            Step::Torn(kept) => {
                real.die(Some(kept));
                claimed.clear();
                // A moment that was, not a mixture of two.
                model = real.dump().await;
                let then = past.iter().rposition(|moment| *moment == model);
                past.truncate(then.expect("a moment that was") + 1);
            }
            other => step(&mut model, &real, &mut claimed, other).await,
        }
        assert_eq!(real.dump().await, model);
        past.push(model.clone());
    }
}

fn side() -> impl Strategy<Value = Side> {
    prop_oneof![Just(Side::Local), Just(Side::Remote)]
}

fn said() -> impl Strategy<Value = Said> {
    prop_oneof![
        Just(Said::Look),
        Just(Said::Deleted),
        (0..VALUES).prop_map(Said::Set)
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let changes = proptest::collection::vec((0..KEYS, said()), 0..5);
    let one = prop_oneof![
        6 => (side(), changes).prop_map(|(of, changes)| Step::Enqueue(of, changes)),
        6 => (side(), 0..4_usize, 0..4_i64).prop_map(|(of, n, now)| Step::Claim(of, n + 1, now)),
        4 => (any::<usize>(), proptest::option::of(0..VALUES)).prop_map(|(n, v)| Step::Settle(n, v)),
        2 => (any::<usize>(), 0..5_i64, any::<bool>()).prop_map(|(n, t, a)| Step::Defer(n, t, a)),
        2 => (any::<usize>(), any::<bool>()).prop_map(|(n, failed)| Step::Hold(n, failed)),
        1 => Just(Step::RetryAll),
        1 => Just(Step::Crash),
        1 => (0..=1000_usize).prop_map(Step::Torn),
    ];
    proptest::collection::vec(one, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn the_queues_do_what_the_model_does_through_any_crash(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(run(steps));
    }
}
