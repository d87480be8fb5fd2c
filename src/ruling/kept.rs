//! Rulings in the state store: a row of `meta` each, as BSON with the bodies as binary.

use bson::spec::BinarySubtype;
use bson::{Binary, Bson, Document, doc};
use rusqlite::Connection;

use super::Ruling;
use crate::decide::Side;
use crate::key::{Id, Key};
use crate::resolution::Step;
use crate::store;

const PREFIX: &str = "ruling:";

fn name(id: &[u8; 12]) -> String {
    format!("{PREFIX}{}", bson::oid::ObjectId::from_bytes(*id))
}

pub(super) fn put(c: &Connection, ruling: &Ruling) -> rusqlite::Result<()> {
    store::set_meta(c, &name(&ruling.id), encode(ruling))
}

pub(super) fn forget(c: &Connection, ruling: &Ruling) -> rusqlite::Result<()> {
    c.execute("DELETE FROM meta WHERE k = ?", [name(&ruling.id)])?;
    Ok(())
}

pub(super) fn get(c: &Connection, id: &[u8; 12]) -> rusqlite::Result<Option<Ruling>> {
    Ok(store::get_meta::<Vec<u8>>(c, &name(id))?.and_then(|bytes| decode(&bytes)))
}

pub(super) fn all(c: &Connection) -> rusqlite::Result<Vec<Ruling>> {
    let mut rows = c.prepare("SELECT v FROM meta WHERE k LIKE 'ruling:%'")?;
    let rows = rows.query_map([], |r| r.get::<_, Vec<u8>>(0))?;
    let mut found = Vec::new();
    for row in rows {
        found.extend(decode(&row?));
    }
    Ok(found)
}

fn blob(bytes: &[u8]) -> Bson {
    Bson::Binary(Binary {
        subtype: BinarySubtype::Generic,
        bytes: bytes.to_vec(),
    })
}

fn maybe(bytes: Option<&Vec<u8>>) -> Bson {
    bytes.map_or(Bson::Null, |b| blob(b))
}

fn encode(ruling: &Ruling) -> Vec<u8> {
    let steps = ruling.steps.iter().map(|s| {
        Bson::Document(doc! {
            "key": blob(s.key.as_bytes()), "id": blob(&s.id.to_bytes()), "side": s.side.name(),
            "expect": maybe(s.expect.as_ref()), "new": maybe(s.new.as_ref()),
            "base": maybe(s.base_after.as_ref()), "fromOther": s.from_other,
        })
    });
    let pairs = |a: &[u8], b: &[u8]| Bson::Document(doc! {"a": blob(a), "b": blob(b)});
    let look = ruling
        .look
        .iter()
        .map(|(key, id)| pairs(key.as_bytes(), &id.to_bytes()));
    let records = ruling.records.iter().map(|(id, fields)| pairs(id, fields));
    let d = doc! {
        "id": blob(&ruling.id), "at": i64::try_from(ruling.at).unwrap_or(0), "epoch": ruling.epoch,
        "steps": Bson::Array(steps.collect()), "look": Bson::Array(look.collect()),
        "records": Bson::Array(records.collect()),
    };
    d.to_vec().unwrap_or_default()
}

fn decode(bytes: &[u8]) -> Option<Ruling> {
    let d = Document::from_reader(bytes).ok()?;
    let bytes = |d: &Document, name: &str| d.get_binary_generic(name).ok().cloned();
    let each = |name: &str| -> Option<Vec<Document>> {
        d.get_array(name)
            .ok()?
            .iter()
            .map(|b| b.as_document().cloned())
            .collect()
    };
    let step = |s: &Document| {
        Some(Step {
            key: Key::from_bytes(&bytes(s, "key")?),
            id: Id::from_bytes(&bytes(s, "id")?),
            side: match s.get_str("side").ok()? {
                "local" => Side::Local,
                _ => Side::Remote,
            },
            expect: bytes(s, "expect"),
            new: bytes(s, "new"),
            base_after: bytes(s, "base"),
            from_other: s.get_bool("fromOther").ok()?,
        })
    };
    Some(Ruling {
        id: bytes(&d, "id")?.try_into().ok()?,
        at: usize::try_from(d.get_i64("at").ok()?).ok()?,
        epoch: d.get_i64("epoch").ok()?,
        steps: each("steps")?.iter().map(step).collect::<Option<_>>()?,
        look: each("look")?
            .iter()
            .map(|p| {
                Some((
                    Key::from_bytes(&bytes(p, "a")?),
                    Id::from_bytes(&bytes(p, "b")?),
                ))
            })
            .collect::<Option<_>>()?,
        records: each("records")?
            .iter()
            .map(|p| Some((bytes(p, "a")?.try_into().ok()?, bytes(p, "b")?)))
            .collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ruling_survives_the_store() {
        let id = Id {
            kind: 0x10,
            value: [1, 0, 0, 0].as_slice().into(),
        };
        let key = Key::new(3, &id);
        let ruling = Ruling {
            id: [7; 12],
            at: 1,
            epoch: 4,
            steps: vec![Step {
                key: key.clone(),
                id: id.clone(),
                side: Side::Remote,
                expect: None,
                new: Some(vec![5, 0, 0, 0, 0]),
                base_after: Some(vec![1]),
                from_other: true,
            }],
            look: vec![(key, id)],
            records: vec![([9; 12], vec![2, 3])],
        };
        assert_eq!(decode(&encode(&ruling)), Some(ruling));
        assert_eq!(decode(b"garbled"), None);
    }
}
