//! Reads what the collections of a side are like.

use std::collections::BTreeMap;
use std::sync::Arc;

use bson::{Document, RawDocumentBuf, doc};
use futures::{StreamExt as _, TryStreamExt as _};

use super::definition::{Definition, Index, options};
use crate::failure::{Class, Failure};
use crate::shared::Settings;
use crate::side::Endpoint;

/// Collections asked about at a time: enough to hide the round trip to the remote.
const AT_ONCE: usize = 8;

/// The server's `NamespaceNotFound`: dropped a moment ago.
const NAMESPACE_NOT_FOUND: i32 = 26;

/// Every collection of a database that can be synced, by name.
pub(super) async fn definitions(
    endpoint: &Arc<Endpoint>,
    settings: &Settings,
    db: &str,
) -> Result<BTreeMap<String, Definition>, Failure> {
    let mut found: Vec<(String, Document)> = Vec::new();
    rows(endpoint, db, &doc! {"listCollections": 1}, |c| {
        let name = c.get_str("name").unwrap_or_default();
        if c.get_str("type").is_ok_and(|t| t == "collection") && settings.is_synced(db, name) {
            let given = c.get_document("options").cloned().unwrap_or_default();
            found.push((name.to_owned(), options(&given)));
        }
    })
    .await?;
    let found: Vec<Option<(String, Definition)>> = futures::stream::iter(found)
        .map(|(name, options)| async move {
            let indexes = indexes(endpoint, db, &name).await?;
            Ok::<_, Failure>(indexes.map(|(indexes, building)| {
                let definition = Definition {
                    options,
                    indexes,
                    building,
                };
                (name, definition)
            }))
        })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await?;
    Ok(found.into_iter().flatten().collect())
}

/// Indexes of a collection, and the names of those that are still being built.
async fn indexes(
    endpoint: &Arc<Endpoint>,
    db: &str,
    coll: &str,
) -> Result<Option<(Vec<Index>, Vec<String>)>, Failure> {
    let mut found = Vec::new();
    let mut building = Vec::new();
    let mut told = doc! {"listIndexes": coll, "includeIndexBuildInfo": true};
    loop {
        let outcome = rows(endpoint, db, &told, |row| {
            let (spec, in_build) = match row.get_document("spec") {
                Ok(spec) => (spec, row.contains_key("indexBuildInfo")),
                Err(_) => (row, false),
            };
            if let Some(index) = Index::from_spec(spec) {
                if in_build {
                    building.push(index.name.clone());
                }
                found.push(index);
            }
        })
        .await;
        match outcome {
            Ok(()) => return Ok(Some((found, building))),
            Err(f) if f.code == Some(NAMESPACE_NOT_FOUND) => return Ok(None),
            // A server that does not know the question lists those in the making among the others.
            Err(f) if f.class == Class::Rejected && told.contains_key("includeIndexBuildInfo") => {
                told.remove("includeIndexBuildInfo");
            }
            Err(f) => return Err(f),
        }
    }
}

async fn rows(
    endpoint: &Arc<Endpoint>,
    db: &str,
    command: &Document,
    mut each: impl FnMut(&Document),
) -> Result<(), Failure> {
    let raw = RawDocumentBuf::try_from(command).map_err(|_| Failure::fatal("command"))?;
    endpoint
        .query(db, raw, |row| {
            // Definitions are small and made by the server: what can't be decoded is none of ours.
            if let Ok(row) = Document::try_from(row.as_ref()) {
                each(&row);
            }
        })
        .await
}
