//! Unique values that another document has already: clashes to come.

use std::collections::{HashMap, HashSet};

use bson::{RawDocumentBuf, doc};

use crate::decide::Side;
use crate::extent::Extent;
use crate::failure::{Class, Failure};
use crate::key::{Id, Key, KeySet};
use crate::raw::{self, Writer, index_name};
use crate::shared::Shared;

/// Values asked for at once.
const VALUES: usize = 200;

/// The fields of a unique index. Indexes over nested fields are left to the sync itself.
pub(super) type Index = Vec<String>;

/// The unique indexes of a collection on one side, and the fields configured as unique.
pub(super) async fn indexes(
    shared: &Shared,
    side: Side,
    extent: &Extent,
) -> Result<Vec<Index>, Failure> {
    let raw = RawDocumentBuf::try_from(&doc! {"listIndexes": &extent.coll})
        .map_err(|_| Failure::fatal("listIndexes"))?;
    let mut found: Vec<Index> = Vec::new();
    let endpoint = shared.endpoint(side)?;
    let listed = endpoint.query(&extent.db, raw, |index| {
        if !index.get_bool("unique").unwrap_or(false) {
            return;
        }
        let Ok(key) = index.get_document("key") else {
            return;
        };
        let names: Vec<String> = raw::elements(key.as_bytes())
            .map_while(Result::ok)
            .map(|e| String::from_utf8_lossy(e.name).into_owned())
            .collect();
        if !names.iter().any(|n| n.contains('.')) {
            found.push(names);
        }
    });
    match listed.await {
        Ok(()) => {}
        Err(f) if f.is_offline() || f.class == Class::Transient => return Err(f),
        // No such collection there yet.
        Err(_) => {}
    }
    let configured = shared
        .settings()
        .config
        .unique_fields
        .get(&extent.coll)
        .cloned();
    for field in configured.unwrap_or_default() {
        let index = vec![field];
        if !found.contains(&index) {
            found.push(index);
        }
    }
    Ok(found)
}

/// The values of an index in a document, as bytes; `None` where a field is missing.
fn values(doc: &[u8], index: &Index) -> Option<Vec<Vec<u8>>> {
    index
        .iter()
        .map(|name| raw::get(doc, name.as_bytes()).map(|e| e.whole.to_vec()))
        .collect()
}

/// How many of these writes meet a document with the same unique value that is not written itself.
pub(super) async fn count(
    shared: &Shared,
    (side, extent): (Side, &Extent),
    indexes: &[Index],
    writes: &[(Key, Vec<u8>)],
) -> Result<u64, Failure> {
    let written: HashSet<&Key> = writes.iter().map(|(key, _)| key).collect();
    let mut clashing: KeySet = KeySet::default();
    let endpoint = shared.endpoint(side)?;
    for index in indexes {
        let mut by_value: HashMap<Vec<Vec<u8>>, &Key> = HashMap::new();
        for (key, doc) in writes {
            if let Some(values) = values(doc, index) {
                by_value.insert(values, key);
            }
        }
        let all: Vec<_> = by_value.keys().collect();
        for some in all.chunks(VALUES) {
            let mut w = Writer::new();
            w.str("find", &extent.coll).open("filter").open_array("$or");
            for (i, values) in some.iter().enumerate() {
                w.open(index_name(i));
                for (name, value) in index.iter().zip(values.iter()) {
                    let one = [&[0; 4], value.as_slice(), &[0]].concat();
                    if let Some(e) = raw::elements(&one).flatten().next() {
                        w.open(name).value("$eq", e.kind, e.value).close();
                    }
                }
                w.close();
            }
            w.close().close().open("projection");
            for name in index {
                w.i32(name, 1);
            }
            w.close();
            let found = endpoint.query(&extent.db, w.command(), |d| {
                let (Some(id), Some(values)) = (Id::of(d.as_bytes()), values(d.as_bytes(), index))
                else {
                    return;
                };
                let there = Key::new(extent.ns, &id);
                if let Some(key) = by_value.get(&values)
                    && **key != there
                    && !written.contains(&there)
                {
                    clashing.insert((*key).clone());
                }
            });
            found.await?;
        }
    }
    Ok(clashing.len() as u64)
}
