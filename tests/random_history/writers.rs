//! The applications: several on each side, each with documents of its own and shared ones.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mongodb::bson::{Binary, Bson, DateTime, Document, doc, spec::BinarySubtype};
use mongodb::error::{Error, ErrorKind, WriteFailure};
use mongodb::{Client, ClientSession, Collection};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::check::{Ledger, Side, field_of};

pub const WRITERS_A_SIDE: usize = 3;
/// Documents of each kind that one writer owns on its side.
const OWN: usize = 4;
const SHARED: usize = 2;
pub const MERGED: usize = 6;
pub const SWAPPED: usize = 5;
pub const HANDED: usize = 2;

/// What all writers of a history share.
#[derive(Clone)]
pub struct Shared {
    pub ledger: Arc<Mutex<Ledger>>,
    pub counter: Arc<AtomicI64>,
    pub stop: Arc<AtomicBool>,
}

impl Shared {
    pub fn new(ledger: Ledger) -> Self {
        Self {
            ledger: Arc::new(Mutex::new(ledger)),
            counter: Arc::new(AtomicI64::new(1)),
            stop: Arc::default(),
        }
    }
}

/// One application.
pub struct Writer {
    side: Side,
    index: usize,
    client: Client,
    c: Collection<Document>,
    rng: StdRng,
    shared: Shared,
}

impl Writer {
    pub fn new(
        side: Side,
        index: usize,
        client: Client,
        database: &str,
        seed: u64,
        shared: Shared,
    ) -> Self {
        let salt = (side as u64) << 32 | (index as u64 + 1) << 40;
        Self {
            side,
            index,
            c: client.database(database).collection("c"),
            client,
            rng: StdRng::seed_from_u64(seed ^ salt),
            shared,
        }
    }

    /// Writes until told to stop; returns how many writes were acknowledged.
    pub async fn run(mut self) -> u64 {
        let mut done = 0;
        while !self.shared.stop.load(Ordering::Relaxed) {
            // An error means that the server was killed: what it means for the ledger is settled
            // where it happened, and life goes on.
            done += u64::from(self.step().await.unwrap_or(false));
            let pause = self.rng.random_range(0..25);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        done
    }

    async fn step(&mut self) -> Result<bool, Error> {
        let local = self.side == Side::Local;
        match self.rng.random_range(0..100) {
            0..40 => {
                let letter = if local { 'L' } else { 'R' };
                let own = self.rng.random_range(0..OWN);
                let key = format!("{letter}{}_{own}", self.index);
                self.write(&key).await
            }
            40..65 => {
                // A shared key has one writer on each side, so "the last write of a side" is known.
                let shared = self.rng.random_range(0..SHARED);
                let key = format!("C{}_{shared}", self.index);
                self.write(&key).await
            }
            65..85 => self.set_field().await,
            85..95 if local && self.index == 0 => self.swap().await,
            95.. if local && self.index == 1 => self.hand_over().await,
            _ => Ok(false),
        }
    }

    fn next(&self) -> i64 {
        self.shared.counter.fetch_add(1, Ordering::Relaxed)
    }

    fn ledger(&self) -> std::sync::MutexGuard<'_, Ledger> {
        self.shared.ledger.lock().unwrap()
    }

    /// One write of `v` in a document that this writer alone writes on this side.
    async fn write(&mut self, key: &str) -> Result<bool, Error> {
        let v = self.next();
        let kind = self.rng.random_range(0..10);
        let value = if kind < 3 { None } else { Some(v) };
        let before = self.ledger().attempt(key, self.side, value);
        let outcome = match kind {
            0..3 => self.delete(key).await,
            3..6 => self.put(key, v).await,
            6..8 => self.set(key, v).await,
            _ => self.save_whole(key, v).await,
        };
        match &outcome {
            Ok(true) => self.ledger().acknowledge(key, self.side, value),
            Ok(false) => self.ledger().revert(key, self.side, before),
            Err(error) if was_refused(error) => self.ledger().revert(key, self.side, before),
            Err(_) => {}
        }
        outcome
    }

    async fn delete(&mut self, key: &str) -> Result<bool, Error> {
        let result = self.c.delete_one(doc! {"_id": key}).await?;
        Ok(result.deleted_count == 1)
    }

    async fn put(&mut self, key: &str, v: i64) -> Result<bool, Error> {
        let mut document = doc! {"_id": key, "v": v, "by": self.name()};
        if self.rng.random_bool(0.7) {
            document.insert("updatedAt", DateTime::now());
        }
        for name in ["x", "y"] {
            if self.rng.random_bool(0.5) {
                document.insert(name, self.noise());
            }
        }
        let replaced = self.c.replace_one(doc! {"_id": key}, document);
        replaced.upsert(true).await?;
        Ok(true)
    }

    async fn set(&mut self, key: &str, v: i64) -> Result<bool, Error> {
        let noise = self.noise();
        let change = doc! {"v": v, "by": self.name(), "x": noise};
        let result = self
            .c
            .update_one(doc! {"_id": key}, doc! {"$set": change})
            .await?;
        Ok(result.matched_count == 1)
    }

    /// As an ORM saves: reads the document, changes one field, writes the whole of it.
    async fn save_whole(&mut self, key: &str, v: i64) -> Result<bool, Error> {
        if self.rng.random_bool(0.15) {
            // Long enough for the document to be synced and stamped: what is saved carries the stamp.
            tokio::time::sleep(Duration::from_millis(800)).await;
        }
        let Some(mut document) = self.c.find_one(doc! {"_id": key}).await? else {
            return Ok(false);
        };
        let pause = self.rng.random_range(0..10);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        document.insert("v", v);
        document.insert("updatedAt", DateTime::now());
        let result = self.c.replace_one(doc! {"_id": key}, document).await?;
        Ok(result.matched_count == 1)
    }

    /// This side's field of a document whose other field the other side writes.
    async fn set_field(&mut self) -> Result<bool, Error> {
        let mine: Vec<usize> = (self.index..MERGED).step_by(WRITERS_A_SIDE).collect();
        let key = format!("B{}", mine[self.rng.random_range(0..mine.len())]);
        let v = self.next();
        let mut change = doc! {field_of(self.side): v};
        if self.rng.random_bool(0.5) {
            change.insert("updatedAt", DateTime::now());
        }
        let at = (key.clone(), self.side);
        self.ledger()
            .fields
            .entry(at.clone())
            .or_insert_with(|| vec![0])
            .push(v);
        let filter = doc! {"_id": &key};
        self.c.update_one(filter, doc! {"$set": change}).await?;
        self.ledger().fields.insert(at, vec![v]);
        Ok(true)
    }

    /// Rotates the unique values of two or three documents in one transaction.
    async fn swap(&mut self) -> Result<bool, Error> {
        let count = self.rng.random_range(2..=3);
        let first = self.rng.random_range(0..SWAPPED);
        let keys: Vec<String> = (0..count)
            .map(|i| format!("U{}", (first + i) % SWAPPED))
            .collect();
        let mut session = self.client.start_session().await?;
        session.start_transaction().await?;
        let outcome = self.rotate(&mut session, &keys).await;
        match outcome {
            Ok(()) => {
                session.commit_transaction().await?;
                Ok(true)
            }
            Err(error) => {
                let _ = session.abort_transaction().await;
                Err(error)
            }
        }
    }

    async fn rotate(&mut self, session: &mut ClientSession, keys: &[String]) -> Result<(), Error> {
        let mut values = Vec::new();
        for key in keys {
            let found = self.c.find_one(doc! {"_id": key}).session(&mut *session);
            let found = found.await?.ok_or_else(|| Error::custom("gone"))?;
            values.push(found.get_str("u").unwrap_or("absent").to_owned());
        }
        values.rotate_left(1);
        let parked: Vec<String> = keys.iter().map(|key| format!("parked {key}")).collect();
        for value in [&parked, &values] {
            for (key, u) in keys.iter().zip(value) {
                let change = doc! {"$set": {"u": u}};
                let update = self.c.update_one(doc! {"_id": key}, change);
                update.session(&mut *session).await?;
            }
        }
        Ok(())
    }

    /// Deletes the holder of a unique value and gives the value to another document.
    async fn hand_over(&mut self) -> Result<bool, Error> {
        let value = format!("handed{}", self.rng.random_range(0..HANDED));
        let v = self.next();
        self.c.delete_many(doc! {"u": &value}).await?;
        let document = doc! {"_id": format!("V{v}"), "u": value, "v": v};
        self.c.insert_one(document).await?;
        Ok(true)
    }

    fn name(&self) -> String {
        format!("{:?}{}", self.side, self.index)
    }

    /// Values that a careless comparison or a lossy copy would change.
    fn noise(&mut self) -> Bson {
        match self.rng.random_range(0..9) {
            0 => Bson::Int32(1),
            1 => Bson::Int64(1),
            2 => Bson::Double(1.0),
            3 => Bson::Double(-0.0),
            4 => Bson::Double(f64::NAN),
            5 => Bson::Null,
            6 => Bson::Array(vec![
                Bson::Int32(self.rng.random()),
                doc! {"$a.b": 1}.into(),
            ]),
            7 => Bson::Binary(Binary {
                subtype: BinarySubtype::Generic,
                bytes: vec![7; self.rng.random_range(0..2000)],
            }),
            _ => Bson::String("ॐ".repeat(self.rng.random_range(0..20))),
        }
    }
}

/// Whether the server said no, so that the write certainly didn't happen.
fn was_refused(error: &Error) -> bool {
    matches!(
        error.kind.as_ref(),
        ErrorKind::Write(WriteFailure::WriteError(_))
    )
}
