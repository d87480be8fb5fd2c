//! Documents that are hard to carry.

use mongodb::Database;
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{
    Binary, Bson, DateTime, Decimal128, JavaScriptCodeWithScope, Regex, Timestamp, doc,
    oid::ObjectId,
};
use sangam::raw::{self, Writer};

use super::kit::raw_docs;

/// Puts a document into a database exactly as it is; `insert` would fill in a `Timestamp(0, 0)`.
pub async fn put(db: &Database, coll: &str, document: &[u8]) {
    let id = raw::get(document, b"_id").expect("well formed");
    let mut w = Writer::new();
    if raw::elements(document).any(|e| e.is_ok_and(|e| e.kind == 0x11)) {
        w.str("update", coll).open_array("updates").open("0");
        w.open("q").value("_id", id.kind, id.value).close();
        w.open_array("u").open("0").open("$replaceWith");
        w.doc("$literal", document).close().close().close();
        w.bool("upsert", true).close().close();
    } else {
        w.str("insert", coll)
            .open_array("documents")
            .doc("0", document)
            .close();
    }
    let reply = db.run_raw_command(w.command()).await.expect("well formed");
    assert!(!reply.contains_key("writeErrors"), "{reply}");
    assert!(
        raw_docs(db, coll)
            .await
            .iter()
            .any(|d| d.as_bytes() == document)
    );
}

pub fn decimal(text: &str) -> Decimal128 {
    text.parse().expect("well formed")
}

fn decimals(texts: &[&str]) -> Bson {
    texts
        .iter()
        .map(|t| Bson::Decimal128(decimal(t)))
        .collect::<Vec<_>>()
        .into()
}

/// A value of every type, and of some more than one.
pub fn values() -> Vec<(&'static str, Bson)> {
    let binary = |subtype, bytes: &[u8]| {
        Bson::Binary(Binary {
            subtype,
            bytes: bytes.to_vec(),
        })
    };
    let code = "function() { return x; }".to_owned();
    vec![
        ("double", 0.1.into()),
        ("minus zero", (-0.0).into()),
        ("nan", f64::NAN.into()),
        (
            "nan with payload",
            f64::from_bits(0x7ff8_0000_dead_beef).into(),
        ),
        ("infinity", f64::NEG_INFINITY.into()),
        ("tiny", f64::from_bits(1).into()),
        ("string", "नमस्ते \0 zero".into()),
        ("empty string", "".into()),
        (
            "document",
            Bson::Document(doc! {"b": 1, "a": {"c": [1, {"d": 2}]}}),
        ),
        (
            "array",
            Bson::Array(vec![1.into(), 1_i64.into(), 1.0.into(), Bson::Null]),
        ),
        ("binary", binary(BinarySubtype::Generic, &[0, 1, 255])),
        ("uuid", binary(BinarySubtype::Uuid, &[7; 16])),
        ("own binary", binary(BinarySubtype::UserDefined(0x80), &[])),
        ("object id", ObjectId::from_bytes([9; 12]).into()),
        ("bool", false.into()),
        ("date", DateTime::from_millis(-1).into()),
        ("far date", DateTime::from_millis(i64::MAX).into()),
        ("null", Bson::Null),
        (
            "regex",
            Regex {
                pattern: "^a".try_into().expect("well formed"),
                options: "imx".try_into().expect("well formed"),
            }
            .into(),
        ),
        ("code", Bson::JavaScriptCode(code.clone())),
        (
            "scoped",
            JavaScriptCodeWithScope {
                code,
                scope: doc! {"x": 1},
            }
            .into(),
        ),
        ("symbol", Bson::Symbol("sym".into())),
        ("int", i32::MIN.into()),
        ("long", i64::MAX.into()),
        (
            "timestamp",
            Timestamp {
                time: 1,
                increment: 2,
            }
            .into(),
        ),
        (
            "zero timestamp",
            Timestamp {
                time: 0,
                increment: 0,
            }
            .into(),
        ),
        (
            "cohorts",
            decimals(&["1", "1.0", "1.00", "1E0", "-0", "0E+3", "NaN", "Infinity"]),
        ),
        ("one", decimal("1").into()),
        ("one point zero", decimal("1.0").into()),
        ("decimal nan", decimal("NaN").into()),
        ("min key", Bson::MinKey),
        ("max key", Bson::MaxKey),
        ("undefined", Bson::Undefined),
    ]
}

/// Documents that are hard to carry, without `_id`.
pub fn odd() -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>)> = values()
        .into_iter()
        .map(|(name, v)| {
            (
                name.into(),
                doc! {"v": v, "w": 1}.to_vec().expect("well formed"),
            )
        })
        .collect();
    let mut add = |name: &str, fill: &dyn Fn(&mut Writer)| {
        let mut w = Writer::new();
        fill(&mut w);
        all.push((name.into(), w.finish()));
    };
    add("empty", &|_| {});
    add("duplicate names", &|w| {
        w.i32("a", 1).i32("b", 2).i32("a", 3);
    });
    add("duplicate names within", &|w| {
        w.open("d").i32("a", 1).i32("a", 2).close();
    });
    add("dollar", &|w| {
        w.i32("$set", 1)
            .str("$ref", "$$ROOT")
            .open("x")
            .i32("$gt", 1)
            .close();
    });
    add("dotted", &|w| {
        w.i32("a.b", 1)
            .i32(".", 2)
            .i32("a.", 3)
            .open("a")
            .i32("b", 4)
            .close();
    });
    add("empty name", &|w| {
        w.i32("", 1).open("x").str("", "").close();
    });
    add("expression", &|w| {
        w.str("v", "$_id")
            .open("u")
            .str("$literal", "x")
            .close()
            .str("n", "$$NOW");
    });
    add("zero timestamps", &|w| {
        w.value("t", 0x11, &[0; 8])
            .open("in")
            .value("t", 0x11, &[0; 8])
            .close();
    });
    add("100 levels", &|w| {
        for _ in 0..100 {
            w.open("d");
        }
        w.i32("v", 1);
        for _ in 0..100 {
            w.close();
        }
    });
    add("5000 fields", &|w| {
        for n in 0..5000 {
            w.i32(format!("f{n}"), n);
        }
    });
    add("numeric names", &|w| {
        w.i32("0", 1)
            .i32("1", 2)
            .open("a")
            .i32("10", 1)
            .i32("2", 2)
            .close();
    });
    all
}

/// A document with a string `_id` and these fields.
pub fn with_id(id: &str, fields: &[u8]) -> Vec<u8> {
    let mut w = Writer::new();
    w.str("_id", id);
    for e in raw::elements(fields) {
        w.whole(e.expect("well formed").whole);
    }
    w.finish()
}
