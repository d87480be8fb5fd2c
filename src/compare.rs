//! A full comparison of two databases, byte for byte but for the sync fields.
//!
//! The demo and the tests judge the daemon by it, so it shares nothing with the daemon's own
//! reconcile: it reads everything, knows no base, and decides nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, Result};
use futures::TryStreamExt;
use mongodb::Database;
use mongodb::bson::{RawBson, RawDocument, RawDocumentBuf, cstr, doc};

use crate::config::FieldNames;

/// Sangam's own collections, which are never synced.
pub const OWN_COLLECTIONS: [&str; 5] = [
    "conflict_logs",
    "sync_logs",
    "sync_config",
    "sangam_lease",
    "sangam_receipts",
];

/// How a document differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Only the local database has it.
    OnlyLocal,
    /// Only the remote database has it.
    OnlyRemote,
    /// Both have it with different content.
    Content,
}

/// One document that is not the same on both sides.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Its collection.
    pub collection: String,
    /// Its `_id`.
    pub id: RawBson,
    /// What differs.
    pub how: How,
    /// The local body, sync fields included.
    pub local: Option<RawDocumentBuf>,
    /// The remote body, sync fields included.
    pub remote: Option<RawDocumentBuf>,
}

/// What a comparison found.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// Collections that at least one side has.
    pub collections: usize,
    /// Documents that are equal on both sides.
    pub equal: u64,
    /// All others, by collection.
    pub differences: Vec<Difference>,
}

impl Comparison {
    /// Whether nothing differs.
    pub fn is_equal(&self) -> bool {
        self.differences.is_empty()
    }
}

/// Compares the two databases whole; `leave_out` names further collections that are not synced.
pub async fn compare(
    local: &Database,
    remote: &Database,
    fields: &FieldNames,
    leave_out: &[&str],
) -> Result<Comparison> {
    let mut names: BTreeSet<String> = collections(local).await?.into_iter().collect();
    names.extend(collections(remote).await?);
    names.retain(|name| !leave_out.contains(&name.as_str()));
    let mut found = Comparison {
        collections: names.len(),
        ..Comparison::default()
    };
    for name in names {
        compare_collection(local, remote, fields, &name, &mut found)
            .await
            .with_context(|| format!("comparing {name}"))?;
    }
    Ok(found)
}

/// Ordinary collections, without system collections and Sangam's own.
async fn collections(database: &Database) -> Result<Vec<String>> {
    let mut names = database
        .list_collection_names()
        .filter(doc! {"type": "collection"})
        .await?;
    names.retain(|name| !name.starts_with("system.") && !OWN_COLLECTIONS.contains(&name.as_str()));
    Ok(names)
}

async fn compare_collection(
    local: &Database,
    remote: &Database,
    fields: &FieldNames,
    name: &str,
    found: &mut Comparison,
) -> Result<()> {
    let mut ours = read(local, name).await?;
    let theirs = read(remote, name).await?;
    let mut different = BTreeMap::new();
    for (id, remote) in theirs {
        let local = ours.remove(&id);
        let how = match &local {
            None => How::OnlyRemote,
            Some(local) if content(local, fields)? == content(&remote, fields)? => {
                found.equal += 1;
                continue;
            }
            Some(_) => How::Content,
        };
        different.insert(id, (how, local, Some(remote)));
    }
    for (id, local) in ours {
        different.insert(id, (How::OnlyLocal, Some(local), None));
    }
    for (how, local, remote) in different.into_values() {
        let either = local.as_ref().or(remote.as_ref());
        let id = either.and_then(|body| body.get("_id").ok().flatten());
        found.differences.push(Difference {
            collection: name.into(),
            id: id.context("a document without _id")?.into(),
            how,
            local,
            remote,
        });
    }
    Ok(())
}

/// All documents of a collection by the bytes of their `_id`.
async fn read(database: &Database, name: &str) -> Result<HashMap<Vec<u8>, RawDocumentBuf>> {
    let collection = database.collection::<RawDocumentBuf>(name);
    let mut cursor = collection.find(doc! {}).batch_size(1000).await?;
    let mut all = HashMap::new();
    while let Some(body) = cursor.try_next().await? {
        let mut id = RawDocumentBuf::new();
        if let Some(value) = body.get("_id")? {
            id.append(cstr!("_id"), value);
        }
        all.insert(id.into_bytes(), body);
    }
    Ok(all)
}

/// The bytes of a body without its sync fields.
pub fn content(body: &RawDocument, fields: &FieldNames) -> Result<Vec<u8>> {
    let sync = [&fields.synced_at, &fields.origin, &fields.sync_status];
    let mut content = RawDocumentBuf::new();
    for element in body.iter_elements() {
        let element = element?;
        if !sync.iter().any(|field| *field == element.key().as_str()) {
            content.append(element.key(), element.value()?);
        }
    }
    Ok(content.into_bytes())
}
