//! Document keys: a namespace and an `_id` in canonical form.
//!
//! To the server `1`, `1.0`, `NumberLong(1)` and `NumberDecimal("1")` are the same `_id`, nested
//! in an `_id` document too, so they must be the same key here (R14). Everything that is not a
//! number keeps its bytes, except that a symbol equals the string of the same text.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Deref;

use smallvec::SmallVec;

use crate::raw::{self, Element};

/// Documents by key. The hash is seeded at random, and a third of the price of the standard one.
pub type KeyMap<T> = HashMap<Key, T, foldhash::quality::RandomState>;

/// Keys of documents; see [`KeyMap`].
pub type KeySet = HashSet<Key, foldhash::quality::RandomState>;

/// Bytes of a key or an `_id`. The usual ones, of 24 bytes at most, need no memory of their own.
#[derive(Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Short(SmallVec<[u8; 24]>);

impl Clone for Short {
    fn clone(&self) -> Self {
        Self::from(&**self)
    }
}

impl Deref for Short {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl From<&[u8]> for Short {
    fn from(bytes: &[u8]) -> Self {
        // Not `SmallVec::from`, which goes byte by byte.
        Self(SmallVec::from_slice(bytes))
    }
}

/// A document key: 4 bytes of namespace number (see `Store`), then the canonical `_id`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Short);

impl Key {
    /// The key of the document with this `_id` element in namespace number `ns`.
    pub fn new(ns: u32, id: &Id) -> Self {
        Self::from_value(ns, id.kind, &id.value)
    }

    /// The key of a document in namespace number `ns`, if it has an `_id`.
    pub fn of(ns: u32, doc: &[u8]) -> Option<Self> {
        raw::get(doc, b"_id").map(|e| Self::from_value(ns, e.kind, e.value))
    }

    fn from_value(ns: u32, kind: u8, value: &[u8]) -> Self {
        let mut bytes = Short::default();
        bytes.0.extend_from_slice(&ns.to_be_bytes());
        canonical(kind, value, &mut bytes.0);
        Self(bytes)
    }

    /// From the bytes kept in the store.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }

    /// The bytes kept in the store.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Number of the namespace.
    pub fn ns(&self) -> u32 {
        self.0.first_chunk().map_or(0, |b| u32::from_be_bytes(*b))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A hash: an `_id` may be a person's name, and values never appear in logs (R23).
        write!(
            f,
            "Key({}:{:08x})",
            self.ns(),
            xxhash_rust::xxh3::xxh3_64(self.as_bytes()) as u32
        )
    }
}

/// An `_id` exactly as the document holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Id {
    /// BSON type byte.
    pub kind: u8,
    /// Value bytes.
    pub value: Short,
}

impl Id {
    /// The `_id` of a document, if it has one.
    pub fn of(doc: &[u8]) -> Option<Self> {
        raw::get(doc, b"_id").map(|e| Self::from_element(&e))
    }

    /// From an element of a document.
    pub fn from_element(e: &Element<'_>) -> Self {
        Self {
            kind: e.kind,
            value: e.value.into(),
        }
    }

    /// Type byte and value, as the store keeps it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.value.len() + 1);
        bytes.push(self.kind);
        bytes.extend_from_slice(&self.value);
        bytes
    }

    /// The reverse of [`Id::to_bytes`]; empty bytes are a null `_id`.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        match bytes.split_first() {
            Some((kind, value)) => Self {
                kind: *kind,
                value: value.into(),
            },
            None => Self {
                kind: 0x0A,
                value: Short::default(),
            },
        }
    }

    /// As a `Bson` value, for records and for showing.
    pub fn to_bson(&self) -> bson::Bson {
        let mut w = raw::Writer::new();
        w.value("v", self.kind, &self.value);
        bson::Document::from_reader(w.finish().as_slice())
            .ok()
            .and_then(|mut d| d.remove("v"))
            .unwrap_or(bson::Bson::Null)
    }
}

const NUMBER: u8 = 0x10;
const STRING: u8 = 0x02;

fn canonical(kind: u8, value: &[u8], out: &mut SmallVec<[u8; 24]>) {
    match kind {
        0x10 | 0x12 | 0x01 | 0x13 => {
            out.push(NUMBER);
            out.extend_from_slice(number(kind, value).as_bytes());
            out.push(0);
        }
        0x02 | 0x0E => {
            out.push(STRING);
            out.extend_from_slice(value);
        }
        raw::DOCUMENT | raw::ARRAY => {
            out.push(kind);
            for e in raw::elements(value).map_while(Result::ok) {
                canonical_named(e.kind, e.name, e.value, out);
            }
            out.push(0);
        }
        _ => {
            out.push(kind);
            out.extend_from_slice(value);
        }
    }
}

fn canonical_named(kind: u8, name: &[u8], value: &[u8], out: &mut SmallVec<[u8; 24]>) {
    out.push(1);
    out.extend_from_slice(name);
    out.push(0);
    canonical(kind, value, out);
}

/// The exact decimal text of a number: sign, digits without trailing zeros, `E`, exponent of ten.
fn number(kind: u8, value: &[u8]) -> String {
    match kind {
        0x10 => integer(
            value
                .try_into()
                .map_or(0, |b| i64::from(i32::from_le_bytes(b))),
        ),
        0x12 => integer(value.try_into().map_or(0, i64::from_le_bytes)),
        0x01 => double(value.try_into().map_or(0.0, f64::from_le_bytes)),
        _ => decimal(value),
    }
}

fn integer(v: i64) -> String {
    normal(v < 0, &v.unsigned_abs().to_string(), 0)
}

fn double(v: f64) -> String {
    if v.is_nan() {
        return "NaN".into();
    }
    if v.is_infinite() {
        return if v < 0.0 { "-Inf" } else { "Inf" }.into();
    }
    // Rust prints the exact decimal expansion; 1074 digits after the point reach the smallest double.
    let text = format!("{:.1074}", v.abs());
    let (whole, fraction) = text.split_once('.').unwrap_or((&text, ""));
    let fraction = fraction.trim_end_matches('0');
    let exponent = -i64::try_from(fraction.len()).unwrap_or(0);
    normal(v < 0.0, &format!("{whole}{fraction}"), exponent)
}

fn decimal(value: &[u8]) -> String {
    let Ok(bytes) = <[u8; 16]>::try_from(value) else {
        return "NaN".into();
    };
    let text = bson::Decimal128::from_bytes(bytes).to_string();
    let (negative, text) = text
        .strip_prefix('-')
        .map_or((false, text.as_str()), |t| (true, t));
    if text.starts_with("NaN") {
        return "NaN".into();
    }
    if text.starts_with("Inf") {
        return if negative { "-Inf" } else { "Inf" }.into();
    }
    let (mantissa, exponent) = text.split_once('E').unwrap_or((text, "0"));
    let exponent: i64 = exponent.trim_start_matches('+').parse().unwrap_or(0);
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let shift = i64::try_from(fraction.len()).unwrap_or(0);
    normal(negative, &format!("{whole}{fraction}"), exponent - shift)
}

fn normal(negative: bool, digits: &str, exponent: i64) -> String {
    let digits = digits.trim_start_matches('0');
    let kept = digits.trim_end_matches('0');
    if kept.is_empty() {
        return "0".into();
    }
    let exponent = exponent + i64::try_from(digits.len() - kept.len()).unwrap_or(0);
    format!("{}{kept}E{exponent}", if negative { "-" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::{Bson, doc};

    fn key(id: impl Into<Bson>) -> Key {
        let raw = doc! {"_id": id.into()}.to_vec().unwrap();
        Key::new(7, &Id::of(&raw).unwrap())
    }
    fn dec(s: &str) -> Bson {
        Bson::Decimal128(s.parse().unwrap())
    }

    #[test]
    fn r14_numbers_that_are_equal_to_the_server_are_one_key() {
        for (a, b) in [
            (Bson::Int32(1), Bson::Int64(1)),
            (Bson::Int32(1), Bson::Double(1.0)),
            (Bson::Int32(1), dec("1")),
            (Bson::Int32(1), dec("1.00")),
            (Bson::Int32(0), Bson::Double(-0.0)),
            (Bson::Double(0.5), dec("0.5")),
            (Bson::Int64(1 << 60), Bson::Double((1_i64 << 60) as f64)),
            (Bson::Double(f64::NAN), dec("NaN")),
            (Bson::Double(f64::INFINITY), dec("Infinity")),
            (Bson::Int32(100), dec("1E2")),
            (Bson::Symbol("a".into()), Bson::String("a".into())),
        ] {
            assert_eq!(key(a.clone()), key(b.clone()), "{a:?} {b:?}");
            assert_eq!(
                key(doc! {"x": a.clone()}),
                key(doc! {"x": b.clone()}),
                "nested {a:?} {b:?}"
            );
        }
    }

    #[test]
    fn r14_different_ids_stay_apart() {
        let ids = [
            Bson::Int32(1),
            Bson::Int32(-1),
            Bson::Int32(10),
            Bson::Double(0.1),
            dec("0.1"),
            Bson::Int64((1 << 60) + 1),
            Bson::Double((1_i64 << 60) as f64),
            Bson::String("1".into()),
            Bson::Null,
            Bson::Boolean(true),
            Bson::Document(doc! {"a": 1, "b": 2}),
            Bson::Document(doc! {"b": 2, "a": 1}),
            Bson::Document(doc! {"a": {"b": 2}}),
            Bson::DateTime(bson::DateTime::from_millis(1)),
            Bson::Timestamp(bson::Timestamp {
                time: 0,
                increment: 1,
            }),
        ];
        for (i, a) in ids.iter().enumerate() {
            for (j, b) in ids.iter().enumerate() {
                assert_eq!(i == j, key(a.clone()) == key(b.clone()), "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn ids_survive_the_store() {
        let raw = doc! {"_id": {"a": 1.0, "b": "x"}}.to_vec().unwrap();
        let id = Id::of(&raw).unwrap();
        assert_eq!(Id::from_bytes(&id.to_bytes()), id);
        assert_eq!(id.to_bson(), Bson::Document(doc! {"a": 1.0, "b": "x"}));
    }
}
