//! The applications: several on each side, each with documents of its own and shared ones, writing
//! in every way that a driver offers.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mongodb::bson::{Binary, Bson, DateTime, Document, doc, spec::BinarySubtype};
use mongodb::error::{Error, ErrorKind, WriteFailure};
use mongodb::options::{Acknowledgment, CollectionOptions, WriteConcern};
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
pub const CHAINED: usize = 3;
pub const COUNTED: usize = 2;

/// What writers do; a storm leaves parts out to find the smallest one that fails.
pub const PARTS: [&str; 9] = [
    "own", "shared", "fields", "swap", "handover", "chain", "many", "count", "set",
];

/// The rules of the collection's fields, as in the configuration.
pub const RULES: [(&str, &str); 2] = [("sum", "sum_of_changes"), ("set", "union")];

/// What all writers of a history share.
#[derive(Clone)]
pub struct Shared {
    pub ledger: Arc<Mutex<Ledger>>,
    pub counter: Arc<AtomicI64>,
    pub stop: Arc<AtomicBool>,
    /// Those of [`PARTS`] that are left out.
    pub without: Arc<BTreeSet<String>>,
}

impl Shared {
    pub fn new(ledger: Ledger) -> Self {
        Self {
            ledger: Arc::new(Mutex::new(ledger)),
            counter: Arc::new(AtomicI64::new(1)),
            stop: Arc::default(),
            without: Arc::default(),
        }
    }
}

/// One application.
pub struct Writer {
    side: Side,
    index: usize,
    client: Client,
    /// Acknowledged by the majority, which no failover takes back.
    c: Collection<Document>,
    /// Acknowledged by the primary alone: a failover may take it back.
    one: Option<Collection<Document>>,
    /// Of all its steps, and of the one at work: a step that is left out leaves the others as they are.
    steps: StdRng,
    rng: StdRng,
    /// What it put into sets.
    items: BTreeSet<i64>,
    shared: Shared,
}

impl Writer {
    pub fn new(side: Side, index: usize, client: Client, database: &str, shared: Shared) -> Self {
        Self {
            side,
            index,
            c: collection(&client, database, WriteConcern::majority()),
            one: None,
            client,
            steps: StdRng::seed_from_u64(0),
            rng: StdRng::seed_from_u64(0),
            items: BTreeSet::new(),
            shared,
        }
    }

    /// What it does follows from this seed.
    pub fn seeded(mut self, seed: u64) -> Self {
        let side = match self.side {
            Side::Local(site) => u64::from(site) << 8,
            Side::Remote => 1,
        };
        self.steps = StdRng::seed_from_u64(seed ^ side << 32 ^ (self.index as u64 + 1) << 40);
        self
    }

    /// Most of its writes are acknowledged by the primary alone.
    pub fn hasty(mut self) -> Self {
        let concern = WriteConcern::builder().w(Acknowledgment::Nodes(1)).build();
        self.one = Some(collection(&self.client, &self.c.namespace().db, concern));
        self
    }

    /// Writes until told to stop; returns how many writes were acknowledged.
    pub async fn run(mut self) -> u64 {
        let mut done = 0;
        while !self.shared.stop.load(Ordering::Relaxed) {
            self.rng = StdRng::seed_from_u64(self.steps.random());
            // An error means that the server was killed: what it means for the ledger is settled
            // where it happened, and life goes on.
            done += u64::from(self.step().await.unwrap_or(false));
            let pause = self.rng.random_range(0..25);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        done
    }

    async fn step(&mut self) -> Result<bool, Error> {
        let first_site = self.side == Side::Local(0);
        let kind = match self.rng.random_range(0..100) {
            0..28 => "own",
            28..35 => "many",
            35..48 => "shared",
            48..60 => "chain",
            60..73 => "fields",
            73..79 => "count",
            79..85 => "set",
            85..95 if first_site && self.index == 0 => "swap",
            95.. if first_site && self.index == 1 => "handover",
            _ => return Ok(false),
        };
        if self.shared.without.contains(kind) {
            return Ok(false);
        }
        let number = self.rng.random_range(0..60);
        let own = format!("{}_{}", self.name(), number % OWN);
        match kind {
            "own" => self.write(&own).await,
            "many" => self.many().await,
            // A shared key has one writer on each side, so "the last write of a side" is known.
            "shared" => {
                self.write(&format!("C{}_{}", self.index, number % SHARED))
                    .await
            }
            "chain" => self.chain(number % CHAINED).await,
            "fields" => self.set_field().await,
            "count" => self.count(number % COUNTED).await,
            "set" => self.change_set(number % COUNTED).await,
            "swap" => self.swap().await,
            _ => self.hand_over().await,
        }
    }

    /// The collection with this write's concern, and whether what it acknowledges stays.
    fn concern(&mut self) -> (Collection<Document>, bool) {
        match &self.one {
            Some(one) if self.rng.random_bool(0.7) => (one.clone(), false),
            _ => (self.c.clone(), true),
        }
    }

    fn next(&self) -> i64 {
        self.shared.counter.fetch_add(1, Ordering::Relaxed)
    }

    fn ledger(&self) -> std::sync::MutexGuard<'_, Ledger> {
        let ledger = self.shared.ledger.lock();
        ledger.unwrap_or_else(PoisonError::into_inner)
    }

    /// One write of `v` in a document that this writer alone writes on this side.
    async fn write(&mut self, key: &str) -> Result<bool, Error> {
        let v = self.next();
        let (c, stays) = self.concern();
        let kind = self.rng.random_range(0..14);
        let value = if kind < 4 { None } else { Some(v) };
        let before = self.ledger().attempt(key, self.side, value);
        let outcome = match kind {
            0..4 => self.delete(&c, key).await,
            4..6 => self.put(&c, key, v).await,
            6..8 => self.insert(&c, key, v).await,
            8..10 => self.set(&c, key, v).await,
            10 => self.pipeline(&c, key, v).await,
            11 => self.find_and_set(&c, key, v).await,
            _ => self.save_whole(&c, key, v).await,
        };
        match &outcome {
            Ok(true) if stays => self.ledger().acknowledge(key, self.side, value),
            Ok(true) => {}
            Ok(false) => self.ledger().revert(key, self.side, before),
            Err(error) if was_refused(error) => self.ledger().revert(key, self.side, before),
            Err(_) => {}
        }
        outcome
    }

    async fn delete(&mut self, c: &Collection<Document>, key: &str) -> Result<bool, Error> {
        if self.rng.random_bool(0.3) {
            let found = c.find_one_and_delete(doc! {"_id": key}).await?;
            return Ok(found.is_some());
        }
        let result = c.delete_one(doc! {"_id": key}).await?;
        Ok(result.deleted_count == 1)
    }

    /// A whole document.
    fn fresh(&mut self, key: &str, v: i64) -> Document {
        let mut document = doc! {"_id": key, "v": v, "by": self.name()};
        if self.rng.random_bool(0.7) {
            document.insert("updatedAt", DateTime::now());
        }
        for name in ["x", "y"] {
            if self.rng.random_bool(0.5) {
                document.insert(name, self.noise());
            }
        }
        document
    }

    async fn put(&mut self, c: &Collection<Document>, key: &str, v: i64) -> Result<bool, Error> {
        let replaced = c.replace_one(doc! {"_id": key}, self.fresh(key, v));
        replaced.upsert(true).await?;
        Ok(true)
    }

    async fn insert(&mut self, c: &Collection<Document>, key: &str, v: i64) -> Result<bool, Error> {
        // Refused where the document is there.
        c.insert_one(self.fresh(key, v)).await?;
        Ok(true)
    }

    async fn set(&mut self, c: &Collection<Document>, key: &str, v: i64) -> Result<bool, Error> {
        let noise = self.noise();
        let change = doc! {"v": v, "by": self.name(), "x": noise};
        let update = c.update_one(doc! {"_id": key}, doc! {"$set": change});
        Ok(update.await?.matched_count == 1)
    }

    async fn pipeline(&self, c: &Collection<Document>, key: &str, v: i64) -> Result<bool, Error> {
        let twice = doc! {"$multiply": [2_i64, v]};
        let stages = vec![
            doc! {"$set": {"v": v, "twice": twice}},
            doc! {"$unset": "x"},
        ];
        let update = c.update_one(doc! {"_id": key}, stages);
        Ok(update.await?.matched_count == 1)
    }

    async fn find_and_set(
        &self,
        c: &Collection<Document>,
        key: &str,
        v: i64,
    ) -> Result<bool, Error> {
        let change = doc! {"$set": {"v": v}, "$inc": {"n": 1}, "$currentDate": {"updatedAt": true}};
        let found = c.find_one_and_update(doc! {"_id": key}, change).await?;
        Ok(found.is_some())
    }

    /// As an ORM saves: reads the document, changes one field, writes the whole of it.
    async fn save_whole(
        &mut self,
        c: &Collection<Document>,
        key: &str,
        v: i64,
    ) -> Result<bool, Error> {
        if self.rng.random_bool(0.15) {
            // Long enough for the document to be synced and stamped: what is saved carries the stamp.
            tokio::time::sleep(Duration::from_millis(800)).await;
        }
        let Some(mut document) = c.find_one(doc! {"_id": key}).await? else {
            return Ok(false);
        };
        let pause = self.rng.random_range(0..10);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        document.insert("v", v);
        document.insert("updatedAt", DateTime::now());
        let result = c.replace_one(doc! {"_id": key}, document).await?;
        Ok(result.matched_count == 1)
    }

    /// Several documents of its own at once: in one command, or in one transaction.
    async fn many(&mut self) -> Result<bool, Error> {
        let keys: Vec<String> = (0..OWN).map(|i| format!("{}_m{i}", self.name())).collect();
        let values: Vec<i64> = keys.iter().map(|_| self.next()).collect();
        for (key, v) in keys.iter().zip(&values) {
            self.ledger().attempt(key, self.side, Some(*v));
        }
        let bodies: Vec<Document> = keys
            .iter()
            .zip(&values)
            .map(|(key, v)| self.fresh(key, *v))
            .collect();
        if self.rng.random_bool(0.5) {
            let statements: Vec<Document> = bodies
                .into_iter()
                .map(|body| doc! {"q": {"_id": body.get("_id")}, "u": body, "upsert": true})
                .collect();
            let command = doc! {
                "update": self.c.name(), "updates": statements, "ordered": self.rng.random_bool(0.5),
                "writeConcern": {"w": "majority"},
            };
            let database = self.client.database(&self.c.namespace().db);
            let reply = database.run_command(command).await?;
            if reply.contains_key("writeErrors") || reply.contains_key("writeConcernError") {
                return Ok(false);
            }
        } else {
            let mut session = self.client.start_session().await?;
            session.start_transaction().await?;
            for body in bodies {
                let key = body.get("_id").cloned();
                let put = self.c.replace_one(doc! {"_id": key}, body).upsert(true);
                put.session(&mut session).await?;
            }
            session.commit_transaction().await?;
        }
        for (key, v) in keys.iter().zip(&values) {
            self.ledger().acknowledge(key, self.side, Some(*v));
        }
        Ok(true)
    }

    /// Adds to the history that a chained document carries in itself.
    async fn chain(&mut self, number: usize) -> Result<bool, Error> {
        let key = format!("K{number}");
        let v = self.next();
        let (c, stays) = self.concern();
        let mut set = doc! {"v": v, "h": {"$concatArrays": ["$h", [v]]}};
        if self.rng.random_bool(0.5) {
            set.insert("updatedAt", "$$NOW");
        }
        let update = c.update_one(doc! {"_id": &key}, vec![doc! {"$set": set}]);
        if update.await?.matched_count == 1 && stays {
            self.ledger().chains.entry(key).or_default().insert(v);
        }
        Ok(true)
    }

    /// Adds to a number that all sides add to.
    async fn count(&mut self, number: usize) -> Result<bool, Error> {
        let (key, more) = (format!("N{number}"), self.rng.random_range(1..10_i64));
        let (c, stays) = self.concern();
        let mut change = doc! {"$inc": {"sum": more}};
        if self.rng.random_bool(0.5) {
            change.insert("$currentDate", doc! {"updatedAt": true});
        }
        self.ledger().may_count(&key, more);
        let outcome = c.update_one(doc! {"_id": &key}, change).await;
        match &outcome {
            Ok(_) if stays => self.ledger().counted(&key, more, true),
            Err(error) if was_refused(error) => self.ledger().counted(&key, more, false),
            _ => {}
        }
        outcome.map(|_| true)
    }

    /// Puts a new item into a set that all sides change, or takes out one that it put in. An item whose
    /// fate is not known is left alone.
    async fn change_set(&mut self, number: usize) -> Result<bool, Error> {
        let key = format!("N{number}");
        let mine = |(of, item): &(String, i64)| *of == key && self.items.contains(item);
        let known = {
            let ledger = self.ledger();
            let sure = ledger.items.iter().filter(|(_, is)| **is == [true]);
            sure.map(|(at, _)| at.clone()).find(|at| mine(at))
        };
        let (c, stays) = self.concern();
        let (at, put_in) = match known {
            Some(at) if stays && self.rng.random_bool(0.4) => (at, false),
            _ => ((key.clone(), self.next()), true),
        };
        let change = match put_in {
            true => doc! {"$addToSet": {"set": at.1}},
            false => doc! {"$pull": {"set": at.1}},
        };
        self.items.insert(at.1);
        self.ledger().items.insert(at.clone(), vec![true, false]);
        let outcome = c.update_one(doc! {"_id": &key}, change).await;
        let is = match &outcome {
            Ok(_) if stays => Some(put_in),
            Err(error) if was_refused(error) => Some(!put_in),
            _ => None,
        };
        if let Some(is) = is {
            self.ledger().items.insert(at, vec![is]);
        }
        outcome.map(|_| true)
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
        let (c, stays) = self.concern();
        let update = c.update_one(doc! {"_id": &key}, doc! {"$set": change});
        update.await?;
        if stays {
            self.ledger().fields.insert(at, vec![v]);
        }
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
        match self.side {
            Side::Local(site) => format!("L{site}w{}", self.index),
            Side::Remote => format!("Rw{}", self.index),
        }
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

fn collection(client: &Client, database: &str, concern: WriteConcern) -> Collection<Document> {
    let options = CollectionOptions::builder().write_concern(concern).build();
    let database = client.database(database);
    database.collection_with_options("c", options)
}

/// Whether the server said no, so that the write certainly didn't happen.
fn was_refused(error: &Error) -> bool {
    matches!(
        error.kind.as_ref(),
        ErrorKind::Write(WriteFailure::WriteError(_))
    )
}
