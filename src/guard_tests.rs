//! Every form and every verdict against a real server.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bson::{Bson, RawDocumentBuf, doc};

use super::*;
use crate::decide::Side;
use crate::mongod::MongoServer;

/// A server that the tests that run at the same time share; the last one takes it down.
struct Server {
    mongod: MongoServer,
    _dir: tempfile::TempDir,
}

async fn server() -> Arc<Server> {
    static SHARED: tokio::sync::Mutex<Weak<Server>> = tokio::sync::Mutex::const_new(Weak::new());
    let mut shared = SHARED.lock().await;
    if let Some(server) = shared.upgrade() {
        return server;
    }
    let dir = tempfile::tempdir().unwrap();
    let mongod = MongoServer::start(dir.path(), None, "rs0").await.unwrap();
    let server = Arc::new(Server { mongod, _dir: dir });
    *shared = Arc::downgrade(&server);
    server
}

const SYNC_FIELDS: [&str; 3] = ["syncedAt", "origin", "syncStatus"];

/// A collection of a test's own.
struct Place {
    endpoint: Arc<Endpoint>,
    coll: String,
    /// With stamping the documents there may hold more than content.
    stamping: bool,
    names: FieldNames,
    _server: Arc<Server>,
}

impl Place {
    async fn new(stamping: bool) -> Self {
        let server = server().await;
        let uri = server.mongod.direct_uri().into();
        let endpoint = Endpoint::connect(Side::Remote, &uri, Duration::from_secs(10)).await;
        Self {
            endpoint: Arc::new(endpoint.unwrap()),
            coll: format!("c{:x}", rand::random::<u64>()),
            stamping,
            names: FieldNames::default(),
            _server: server,
        }
    }

    fn sync_fields(&self) -> Vec<String> {
        let names = SYNC_FIELDS.iter().map(ToString::to_string);
        names.filter(|_| self.stamping).collect()
    }

    fn docs(&self) -> mongodb::Collection<Document> {
        self.endpoint.client().database("d").collection(&self.coll)
    }

    /// Somebody else puts a document there.
    async fn put(&self, document: &[u8]) {
        let mut w = Writer::new();
        w.str("insert", &self.coll)
            .open_array("documents")
            .doc("0", document)
            .close();
        let reply = self.endpoint.run("d", w.command()).await.unwrap();
        assert!(!reply.contains_key("writeErrors"), "{reply}");
    }

    /// Somebody else updates document 1.
    async fn update(&self, update: Document) {
        let done = self
            .docs()
            .update_one(doc! {"_id": 1}, update)
            .await
            .unwrap();
        assert_eq!(done.modified_count, 1);
    }

    /// The bytes of document 1.
    async fn there(&self) -> Option<Vec<u8>> {
        let c = self.docs().clone_with_type::<RawDocumentBuf>();
        let found = c.find_one(doc! {"_id": 1}).await.unwrap();
        found.map(RawDocumentBuf::into_bytes)
    }

    /// Writes document 1 from `expect` to `new`: the form chosen, and the verdict.
    async fn write(&self, expect: Option<&[u8]>, new: Option<&[u8]>) -> (Form, Verdict) {
        let id = Id::of(expect.or(new).unwrap()).unwrap();
        let write = Write {
            key: Key::new(1, &id),
            id,
            expect: expect.map(<[u8]>::to_vec),
            new: new.map(<[u8]>::to_vec),
        };
        let form = form(&write, &self.sync_fields());
        let stamp = self.stamping.then_some(Stamp {
            fields: &self.names,
            origin: "local",
            server_now: 1,
        });
        let writes = [(&write, &form)];
        let place = ("d", self.coll.as_str());
        let outcome =
            super::write(&self.endpoint, place, &writes, &self.sync_fields(), stamp).await;
        assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
        (form, outcome.verdicts.into_iter().next().unwrap())
    }

    /// The write is carried out, and exactly `new` is there.
    async fn done(&self, expect: Option<&[u8]>, new: Option<&[u8]>) -> Form {
        let (form, verdict) = self.write(expect, new).await;
        assert_eq!(verdict, Verdict::Done, "{form:?}");
        let there = self.there().await;
        let content = there
            .as_deref()
            .map(|d| content::strip(d, &self.sync_fields()));
        assert_eq!(content.as_deref(), new, "{form:?}");
        form
    }

    /// The guard refuses the write, and nothing changed.
    async fn refused(&self, expect: Option<&[u8]>, new: Option<&[u8]>) -> Form {
        let before = self.there().await;
        let (form, verdict) = self.write(expect, new).await;
        let refused = match form {
            // A deletion that found nothing as expected is looked at again (R8).
            Form::Delete => Verdict::Unknown { late: false },
            _ => Verdict::Modified,
        };
        assert_eq!(verdict, refused, "{form:?}");
        assert_eq!(self.there().await, before, "{form:?}");
        form
    }
}

fn b(d: Document) -> Vec<u8> {
    d.to_vec().unwrap()
}

fn pad() -> String {
    "x".repeat(500)
}

/// One of each form: what is expected, what shall be, and whether the form is the one meant.
type Case = (Vec<u8>, Option<Vec<u8>>, fn(&Form) -> bool);

fn by_fields() -> Case {
    let (old, new) = (
        doc! {"_id": 1, "v": 1, "pad": pad()},
        doc! {"_id": 1, "v": 2, "pad": pad()},
    );
    (b(old), Some(b(new)), |f| matches!(f, Form::Fields(_)))
}

fn whole() -> Case {
    // The same fields in another order can't be set by field.
    let (old, new) = (
        doc! {"_id": 1, "v": 1, "w": 1},
        doc! {"_id": 1, "w": 1, "v": 2},
    );
    (b(old), Some(b(new)), |f| matches!(f, Form::Whole(_)))
}

fn delete() -> Case {
    (b(doc! {"_id": 1, "v": 1}), None, |f| *f == Form::Delete)
}

fn exact() -> Case {
    let large = |v: i32| b(doc! {"_id": 1, "v": v, "big": v.to_string().repeat(9 << 20)});
    (large(1), Some(large(2)), |f| *f == Form::Exact)
}

fn all_forms() -> [Case; 4] {
    [by_fields(), whole(), delete(), exact()]
}

#[tokio::test]
async fn an_insert_creates_and_tells_what_is_there_already() {
    for stamping in [false, true] {
        let place = Place::new(stamping).await;
        let new = b(doc! {"_id": 1, "v": 1});
        assert_eq!(place.done(None, Some(&new)).await, Form::Insert);
        assert_eq!(
            place.refused(None, Some(&b(doc! {"_id": 1, "v": 2}))).await,
            Form::Insert
        );
    }
}

#[tokio::test]
async fn a_create_keeps_a_zero_timestamp() {
    for stamping in [false, true] {
        let place = Place::new(stamping).await;
        let zero = Bson::Timestamp(bson::Timestamp {
            time: 0,
            increment: 0,
        });
        let new = b(doc! {"_id": 1, "t": zero, "v": 1});
        assert_eq!(place.done(None, Some(&new)).await, Form::Create);
        assert_eq!(place.refused(None, Some(&new)).await, Form::Create);
    }
}

#[tokio::test]
async fn every_form_writes_what_was_seen_and_refuses_what_changed() {
    for stamping in [false, true] {
        for (expect, new, is_form) in all_forms() {
            let place = Place::new(stamping).await;
            // WHEN the document is as it was seen THEN it is written
            place.put(&expect).await;
            let form = place.done(Some(&expect), new.as_deref()).await;
            assert!(is_form(&form), "{form:?}");
            // WHEN somebody changed the field THEN nothing is
            place.docs().delete_one(doc! {"_id": 1}).await.unwrap();
            place.put(&expect).await;
            place.update(doc! {"$set": {"v": "theirs"}}).await;
            place.refused(Some(&expect), new.as_deref()).await;
            // WHEN somebody removed it THEN nothing is
            place.update(doc! {"$unset": {"v": ""}}).await;
            place.refused(Some(&expect), new.as_deref()).await;
            // WHEN somebody deleted the document THEN it stays deleted
            place.docs().delete_one(doc! {"_id": 1}).await.unwrap();
            place.refused(Some(&expect), new.as_deref()).await;
            assert_eq!(place.there().await, None);
        }
    }
}

#[tokio::test]
async fn another_field_changed_by_somebody_stays_and_trips_only_whole_documents() {
    let theirs = doc! {"$set": {"theirs": 7}};
    for (expect, new, _) in [whole(), delete(), exact()] {
        let place = Place::new(true).await;
        place.put(&expect).await;
        place.update(theirs.clone()).await;
        place.refused(Some(&expect), new.as_deref()).await;
    }
    let (expect, new, _) = by_fields();
    let place = Place::new(true).await;
    place.put(&expect).await;
    place.update(theirs).await;
    assert_eq!(
        place.write(Some(&expect), new.as_deref()).await.1,
        Verdict::Done
    );
    let merged = Document::from_reader(place.there().await.unwrap().as_slice()).unwrap();
    assert_eq!(
        (merged.get_i32("v"), merged.get_i32("theirs")).0.unwrap(),
        2
    );
    assert_eq!(merged.get_i32("theirs").unwrap(), 7);
}

#[tokio::test]
async fn adding_a_field_never_raises_a_deleted_document() {
    for stamping in [false, true] {
        let place = Place::new(stamping).await;
        let expect = b(doc! {"_id": 1, "pad": pad()});
        for new in [
            doc! {"_id": 1, "pad": pad(), "new": 1},
            doc! {"_id": 1, "pad": pad(), "new": 1, "second": {"x": 1}},
        ] {
            let form = place.refused(Some(&expect), Some(&b(new))).await;
            assert!(matches!(form, Form::Fields(_)), "{form:?}");
            assert_eq!(place.there().await, None);
        }
        // WHEN somebody else added it with another value THEN that stays
        place
            .put(&b(doc! {"_id": 1, "pad": pad(), "new": null}))
            .await;
        place
            .refused(
                Some(&expect),
                Some(&b(doc! {"_id": 1, "pad": pad(), "new": 1})),
            )
            .await;
    }
}

#[tokio::test]
async fn fields_are_removed_and_embedded_documents_replaced() {
    for stamping in [false, true] {
        let place = Place::new(stamping).await;
        let steps = [
            doc! {"_id": 1, "a": {"x": 1, "y": 2}, "gone": 1, "pad": pad()},
            doc! {"_id": 1, "a": {"x": 1}, "gone": 1, "pad": pad()},
            doc! {"_id": 1, "a": {"x": 1}, "pad": pad()},
            doc! {"_id": 1, "a": [{"x": 1}], "pad": pad()},
            doc! {"_id": 1, "a": [], "pad": pad()},
            doc! {"_id": 1, "a": {}, "pad": pad(), "b": "$pad", "c": "$$ROOT"},
            doc! {"_id": 1, "a": {"$literal": 1}, "pad": pad(), "b": {"$add": [1, 2]}, "c": "$$NOW"},
        ]
        .map(b);
        place.put(&steps[0]).await;
        for pair in steps.windows(2) {
            let form = place.done(Some(&pair[0]), Some(&pair[1])).await;
            assert!(matches!(form, Form::Fields(_)), "{form:?}");
        }
    }
}

#[tokio::test]
async fn sync_fields_there_trip_no_guard_and_are_brought_up_to_date() {
    for (expect, new, _) in all_forms() {
        // GIVEN a document that another site stamped
        let place = Place::new(true).await;
        place.put(&expect).await;
        let stamps = doc! {"syncedAt": "odd", "origin": 7, "syncStatus": {"x": 1}};
        place.update(doc! {"$set": stamps}).await;
        // WHEN it is written THEN its content is ours, and the fields say so
        let form = place.done(Some(&expect), new.as_deref()).await;
        if new.is_some() {
            let there = Document::from_reader(place.there().await.unwrap().as_slice()).unwrap();
            assert!(there.get_datetime("syncedAt").is_ok(), "{form:?}");
            assert_eq!(there.get_str("origin").unwrap(), "local");
            assert_eq!(there.get_str("syncStatus").unwrap(), "synced");
        }
    }
}

/// A document with `_id` 1 and these fields.
fn with(fill: impl FnOnce(&mut Writer) -> &mut Writer) -> Vec<u8> {
    let mut w = Writer::new();
    w.i32("_id", 1);
    fill(&mut w);
    w.finish()
}

#[tokio::test]
async fn odd_documents_are_carried_exactly() {
    let decimal = |text: &str| Bson::Decimal128(text.parse().unwrap());
    let nan = f64::from_bits(0x7ff8_0000_0000_0001);
    let odd: Vec<Vec<u8>> = vec![
        with(|w| w.i32("a", 1).i32("b", 2).i32("a", 3)),
        with(|w| {
            w.open("d")
                .i32("a", 1)
                .i32("a", 2)
                .close()
                .str("pad", &pad())
        }),
        with(|w| {
            w.open("d")
                .i32("a", 1)
                .i32("a", 3)
                .close()
                .str("pad", &pad())
        }),
        with(|w| {
            w.i32("$set", 1)
                .str("$ref", "$$ROOT")
                .i32("a.b", 1)
                .i32("", 2)
                .str("pad", &pad())
        }),
        with(|w| {
            w.i32("$set", 2)
                .str("$ref", "$_id")
                .i32("a.b", 2)
                .i32("", 3)
                .str("pad", &pad())
        }),
        with(|w| {
            w.i32("a.b", 2)
                .open("a")
                .i32("b", 3)
                .close()
                .str("pad", &pad())
        }),
        b(doc! {"_id": 1, "v": 0.0, "w": f64::NAN, "pad": pad()}),
        b(doc! {"_id": 1, "v": -0.0, "w": nan, "pad": pad()}),
        b(doc! {"_id": 1, "v": 0, "w": decimal("NaN"), "pad": pad()}),
        b(doc! {"_id": 1, "v": decimal("0"), "w": decimal("1"), "pad": pad()}),
        b(doc! {"_id": 1, "v": decimal("-0"), "w": decimal("1.0"), "pad": pad()}),
        b(doc! {"_id": 1, "v": 0_i64, "w": decimal("1.00"), "pad": pad()}),
        b(doc! {"_id": 1}),
    ];
    for stamping in [false, true] {
        let place = Place::new(stamping).await;
        place.done(None, Some(&odd[0])).await;
        for pair in odd.windows(2) {
            // One after the other, and back.
            place.done(Some(&pair[0]), Some(&pair[1])).await;
            place.done(Some(&pair[1]), Some(&pair[0])).await;
            place.done(Some(&pair[0]), Some(&pair[1])).await;
        }
        for d in &odd {
            place.docs().delete_one(doc! {"_id": 1}).await.unwrap();
            place.done(None, Some(d)).await;
            place.done(Some(d), None).await;
        }
    }
}

#[tokio::test]
async fn large_documents_go_by_field_while_they_can_and_exactly_beyond() {
    let large = |letter: &str, n: i32| b(doc! {"_id": 1, "big": letter.repeat(9 << 20), "n": n});
    for stamping in [false, true] {
        let place = Place::new(stamping).await;
        place.done(None, Some(&large("a", 1))).await;
        let form = place.done(Some(&large("a", 1)), Some(&large("a", 2))).await;
        assert!(matches!(form, Form::Fields(_)), "{form:?}");
        let form = place.done(Some(&large("a", 2)), Some(&large("b", 2))).await;
        assert_eq!(form, Form::Exact);
        assert_eq!(place.done(Some(&large("b", 2)), None).await, Form::Exact);
    }
}

#[tokio::test]
async fn a_document_of_16_mib_is_created_changed_and_deleted() {
    let place = Place::new(false).await;
    let rest = b(doc! {"_id": 1, "n": 1, "big": ""}).len();
    let full = |n: i32| b(doc! {"_id": 1, "n": n, "big": "x".repeat((16 << 20) - rest)});
    assert_eq!(full(1).len(), 16 << 20);
    place.done(None, Some(&full(1))).await;
    place.done(Some(&full(1)), Some(&full(2))).await;
    place.done(Some(&full(2)), None).await;
    // WHEN there is no room for the stamp THEN it goes without
    let place = Place::new(true).await;
    place.done(None, Some(&full(1))).await;
    let found = place.docs().find_one(doc! {"_id": 1}).await.unwrap();
    assert!(!found.unwrap().contains_key("syncedAt"));
}

#[path = "guard_verdict_tests.rs"]
mod verdicts;
