//! Who holds a unique value: the index behind the error, and the document in the way.

use std::sync::Arc;

use bson::{Bson, Document, RawDocumentBuf, doc};

use super::Knot;
use crate::failure::Failure;
use crate::guard::Duplicate;
use crate::key::{Id, Key, KeySet};
use crate::side::Endpoint;

impl Knot<'_> {
    pub(super) fn same_index(&self, dup: &Duplicate, new: &[u8]) -> Duplicate {
        let new = Document::from_reader(new).unwrap_or_default();
        let value = dup
            .pattern
            .keys()
            .map(|k| (k.clone(), at_path(&new, k)))
            .collect();
        Duplicate {
            pattern: dup.pattern.clone(),
            value,
            collation: dup.collation.clone(),
        }
    }

    /// A document other than those known that holds the values of `new` under that index.
    pub(super) async fn blocker(
        &self,
        endpoint: &Arc<Endpoint>,
        new: &[u8],
        dup: &Duplicate,
        known: &KeySet,
    ) -> Result<Option<Vec<u8>>, Failure> {
        let spec = self.index(endpoint, &dup.pattern).await?;
        let mut filter = Document::new();
        // With a collation the error shows sort keys, not values: take those of the document.
        let values = if dup.collation.is_some() {
            self.same_index(dup, new).value
        } else {
            dup.value.clone()
        };
        for (name, value) in values {
            filter.insert(
                name,
                match value {
                    Bson::Array(several) => doc! {"$in": several},
                    one => doc! {"$eq": one},
                },
            );
        }
        let mut and = vec![filter];
        if let Some(partial) = spec
            .as_ref()
            .and_then(|s| s.get_document("partialFilterExpression").ok())
        {
            and.push(partial.clone());
        }
        let mut command = doc! {
            "find": self.coll, "filter": {"$and": and}, "limit": i32::try_from(known.len() + 2).unwrap_or(100),
            "readConcern": {"level": "majority"},
        };
        if let Some(collation) = spec
            .as_ref()
            .and_then(|s| s.get_document("collation").ok())
            .or(dup.collation.as_ref())
        {
            command.insert("collation", collation.clone());
        }
        let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("find"))?;
        let mut found = None;
        endpoint
            .query(self.db, raw, |d| {
                let unknown =
                    Id::of(d.as_bytes()).is_some_and(|id| !known.contains(&Key::new(self.ns, &id)));
                if unknown && found.is_none() {
                    found = Some(d.into_bytes());
                }
            })
            .await?;
        Ok(found)
    }

    async fn index(
        &self,
        endpoint: &Arc<Endpoint>,
        pattern: &Document,
    ) -> Result<Option<Document>, Failure> {
        let mut found = None;
        let raw = RawDocumentBuf::try_from(&doc! {"listIndexes": self.coll})
            .map_err(|_| Failure::fatal("listIndexes"))?;
        endpoint
            .query(self.db, raw, |d| {
                if let Ok(spec) = Document::from_reader(d.as_bytes())
                    && spec.get_document("key").is_ok_and(|k| k == pattern)
                    && spec.get_bool("unique").unwrap_or(false)
                {
                    found = Some(spec);
                }
            })
            .await?;
        Ok(found)
    }
}

/// The value at a dotted path, or null, as a unique index sees it.
pub(super) fn at_path(doc: &Document, path: &str) -> Bson {
    let mut at = Bson::Document(doc.clone());
    for step in path.split('.') {
        at = match at {
            Bson::Document(mut d) => d.remove(step).unwrap_or(Bson::Null),
            Bson::Array(items) => {
                let inner = items
                    .iter()
                    .filter_map(Bson::as_document)
                    .map(|d| at_path(d, step));
                Bson::Array(inner.collect())
            }
            _ => Bson::Null,
        };
    }
    at
}
