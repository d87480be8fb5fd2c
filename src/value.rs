//! Single values: at a dotted path, in the type of another one, under a free name.

use std::str::FromStr;

use bson::Bson;
use serde_json::Value as Json;

use crate::raw::{self, Writer};

/// A BSON value: type byte and bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// BSON type byte.
    pub kind: u8,
    /// The value's bytes.
    pub bytes: Vec<u8>,
}

impl Value {
    fn of(value: &Bson) -> Option<Self> {
        let raw = bson::doc! {"v": value}.to_vec().ok()?;
        raw::get(&raw, b"v").map(|e| Self {
            kind: e.kind,
            bytes: e.value.to_vec(),
        })
    }

    /// The text, if it is one.
    pub fn text(&self) -> Option<&str> {
        if self.kind != 0x02 {
            return None;
        }
        let end = self.bytes.len().checked_sub(1)?;
        std::str::from_utf8(self.bytes.get(4..end)?).ok()
    }

    /// As the crate's value.
    pub fn to_bson(&self) -> Bson {
        let mut w = Writer::new();
        w.value("v", self.kind, &self.bytes);
        bson::Document::from_reader(w.finish().as_slice())
            .ok()
            .and_then(|mut d| d.remove("v"))
            .unwrap_or(Bson::Null)
    }

    /// What a person or a program gave, in the type of `like`: a number stays a number of its kind.
    /// The error completes a sentence that begins with the field's name.
    pub fn like(given: &Json, like: Option<&Self>) -> Result<Self, String> {
        let text = match given {
            Json::String(text) => Some(text.clone()),
            Json::Number(number) => Some(number.to_string()),
            Json::Bool(value) => Some(value.to_string()),
            _ => None,
        };
        if given.is_null() {
            return Err("needs a value; null is none".into());
        }
        let kind = like.map(|l| l.kind);
        let value = match (kind, text) {
            (Some(0x02), Some(text)) if text.trim().is_empty() => {
                return Err("must not be empty".into());
            }
            (Some(0x02), Some(text)) => Some(Bson::String(text)),
            (Some(0x0E), Some(text)) => Some(Bson::Symbol(text)),
            (Some(0x10), Some(text)) => text.parse().ok().map(Bson::Int32),
            (Some(0x12), Some(text)) => text.parse().ok().map(Bson::Int64),
            (Some(0x01), Some(text)) => text.parse().ok().map(Bson::Double),
            (Some(0x13), Some(text)) => {
                bson::Decimal128::from_str(&text).ok().map(Bson::Decimal128)
            }
            (Some(0x08), Some(text)) => text.parse().ok().map(Bson::Boolean),
            (Some(0x09), Some(text)) => chrono::DateTime::parse_from_rfc3339(&text)
                .ok()
                .map(|t| Bson::DateTime(bson::DateTime::from_millis(t.timestamp_millis()))),
            (Some(0x07), Some(text)) => bson::oid::ObjectId::parse_str(&text)
                .ok()
                .map(Bson::ObjectId),
            // A command line has only texts: what is no text there was meant as JSON.
            (Some(_), Some(text)) => serde_json::from_str::<Json>(&text)
                .ok()
                .and_then(|json| Bson::try_from(json).ok()),
            (_, _) => Bson::try_from(given.clone()).ok(),
        };
        value
            .and_then(|v| Self::of(&v))
            .filter(|v| kind.is_none_or(|kind| kind == v.kind))
            .ok_or_else(|| {
                format!(
                    "must be {}, as it is now",
                    kind.map_or("a value", kind_name)
                )
            })
    }
}

fn kind_name(kind: u8) -> &'static str {
    match kind {
        0x01 => "a number (double)",
        0x02 => "a text",
        0x03 => "a document, written as JSON",
        0x04 => "an array, written as JSON",
        0x07 => "an ObjectId of 24 hex digits",
        0x08 => "true or false",
        0x09 => "a date such as 2026-01-31T08:00:00Z",
        0x10 => "a whole number (32 bits)",
        0x12 => "a whole number (64 bits)",
        0x13 => "a decimal number",
        _ => "a value of the same type, written as extended JSON",
    }
}

/// The value at a dotted path of embedded documents.
pub fn at_path(doc: &[u8], path: &str) -> Option<Value> {
    if let Some(e) = raw::get(doc, path.as_bytes()) {
        return Some(Value {
            kind: e.kind,
            bytes: e.value.to_vec(),
        });
    }
    let (head, rest) = path.split_once('.')?;
    let e = raw::get(doc, head.as_bytes()).filter(|e| e.kind == raw::DOCUMENT)?;
    at_path(e.value, rest)
}

/// The document with that value at a dotted path; documents on the way are made where they lack.
pub fn set_path(doc: &[u8], path: &str, new: &Value) -> Vec<u8> {
    let split = match raw::get(doc, path.as_bytes()) {
        Some(_) => None,
        None => path.split_once('.'),
    };
    let (head, rest) = split.map_or((path, None), |(head, rest)| (head, Some(rest)));
    let mut w = Writer::new();
    let mut done = false;
    let put = |w: &mut Writer, inner: &[u8]| {
        match rest {
            None => w.value(head, new.kind, &new.bytes),
            Some(rest) => w.doc(head, &set_path(inner, rest, new)),
        };
    };
    const NOTHING: &[u8] = &[5, 0, 0, 0, 0];
    for e in raw::elements(doc).map_while(Result::ok) {
        if e.name == head.as_bytes() && !done {
            put(
                &mut w,
                if e.kind == raw::DOCUMENT {
                    e.value
                } else {
                    NOTHING
                },
            );
            done = true;
        } else {
            w.whole(e.whole);
        }
    }
    if !done {
        put(&mut w, NOTHING);
    }
    w.finish()
}

/// Letters and digits that are told apart when read aloud.
const LETTERS: &[u8] = b"abcdefghjkmnpqrstuvwxyz23456789";

/// A value like this one with four characters more (`john_admin_a7k2`), the same for the same seed;
/// the part before the `@` of an address. `None` for what is no text.
pub fn suggestion(value: &Value, seed: &[u8], attempt: u32) -> Option<String> {
    let text = value.text().filter(|t| !t.is_empty())?;
    let mut n = xxhash_rust::xxh3::xxh3_64_with_seed(seed, u64::from(attempt));
    let mut suffix = String::new();
    for _ in 0..4 {
        let at = usize::try_from(n % LETTERS.len() as u64).unwrap_or(0);
        suffix.push(char::from(LETTERS[at]));
        n /= LETTERS.len() as u64;
    }
    Some(match text.split_once('@') {
        Some((name, host)) if !name.is_empty() => format!("{name}_{suffix}@{host}"),
        _ => format!("{text}_{suffix}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::doc;
    use serde_json::json;

    fn b(d: bson::Document) -> Vec<u8> {
        d.to_vec().unwrap()
    }

    #[test]
    fn a_number_stays_a_number() {
        for (old, given, new) in [
            (Bson::Int32(5), json!("7"), Some(Bson::Int32(7))),
            (Bson::Int32(5), json!(7), Some(Bson::Int32(7))),
            (Bson::Int32(5), json!(7.5), None),
            (Bson::Int32(5), json!("abc"), None),
            (Bson::Int64(5), json!("7"), Some(Bson::Int64(7))),
            (Bson::Double(5.0), json!(7), Some(Bson::Double(7.0))),
            (
                Bson::String("a".into()),
                json!("7"),
                Some(Bson::String("7".into())),
            ),
            (
                Bson::String("a".into()),
                json!(7),
                Some(Bson::String("7".into())),
            ),
            (Bson::String("a".into()), json!("  "), None),
            (Bson::String("a".into()), json!(null), None),
            (Bson::String("a".into()), json!({"b": 1}), None),
            (
                Bson::Boolean(true),
                json!("false"),
                Some(Bson::Boolean(false)),
            ),
            (
                Bson::Array(vec![]),
                json!("[1]"),
                Some(Bson::Array(vec![Bson::Int32(1)])),
            ),
        ] {
            let like = Value::of(&old).unwrap();
            let got = Value::like(&given, Some(&like)).ok().map(|v| v.to_bson());
            assert_eq!(got, new, "{old:?} {given}");
        }
    }

    #[test]
    fn paths_reach_into_documents() {
        let new = Value::of(&Bson::Int32(9)).unwrap();
        let d = b(doc! {"_id": 1, "a": {"b": 1, "c": 2}, "x.y": 3});
        assert_eq!(
            set_path(&d, "a.b", &new),
            b(doc! {"_id": 1, "a": {"b": 9, "c": 2}, "x.y": 3})
        );
        assert_eq!(
            set_path(&d, "x.y", &new),
            b(doc! {"_id": 1, "a": {"b": 1, "c": 2}, "x.y": 9})
        );
        assert_eq!(
            set_path(&b(doc! {"_id": 1}), "n.m", &new),
            b(doc! {"_id": 1, "n": {"m": 9}})
        );
        assert_eq!(at_path(&d, "a.c").unwrap().to_bson(), Bson::Int32(2));
        assert_eq!(at_path(&d, "a.z"), None);
    }

    #[test]
    fn suggestions_are_stable_and_differ_by_attempt() {
        let v = Value::of(&Bson::String("john_admin".into())).unwrap();
        let one = suggestion(&v, b"id", 0).unwrap();
        assert!(one.starts_with("john_admin_") && one.len() == 15, "{one}");
        assert_eq!(one, suggestion(&v, b"id", 0).unwrap());
        assert_ne!(one, suggestion(&v, b"id", 1).unwrap());
        let mail = Value::of(&Bson::String("a@b.org".into())).unwrap();
        let mail = suggestion(&mail, b"id", 0).unwrap();
        assert!(mail.starts_with("a_") && mail.ends_with("@b.org"), "{mail}");
        assert_eq!(
            suggestion(&Value::of(&Bson::Int32(1)).unwrap(), b"id", 0),
            None
        );
    }
}
