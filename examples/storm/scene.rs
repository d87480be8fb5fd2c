//! The documents that everything is about: how they begin, and what became of them.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use futures::TryStreamExt;
use mongodb::bson::{Document, RawDocumentBuf, doc};
use mongodb::options::{IndexOptions, WriteConcern};
use mongodb::{Database, IndexModel};
use sangam::config::FieldNames;

use super::check::{Conflict, Documents, Ledger, Side, field_of};
use super::writers::{CHAINED, COUNTED, HANDED, MERGED, SWAPPED};

/// Indexes on all sides; documents that exist from the start, in the first local database.
pub async fn prepare(locals: &[&Database], remote: &Database) -> Result<Ledger> {
    let unique = IndexModel::builder()
        .keys(doc! {"u": 1})
        .options(
            IndexOptions::builder()
                .unique(true)
                .partial_filter_expression(doc! {"u": {"$exists": true}})
                .build(),
        )
        .build();
    for database in locals.iter().chain([&remote]) {
        let c = database.collection::<Document>("c");
        c.create_index(unique.clone()).await.context("the index")?;
    }
    let mut merged = doc! {field_of(Side::Remote): 0_i64};
    for site in 0..u8::try_from(locals.len())? {
        merged.insert(field_of(Side::Local(site)), 0_i64);
    }
    let with_id = |id: String, rest: Document| {
        let mut document = doc! {"_id": id};
        document.extend(rest);
        document
    };
    let mut first: Vec<Document> = Vec::new();
    first.extend((0..MERGED).map(|i| with_id(format!("B{i}"), merged.clone())));
    first.extend((0..SWAPPED).map(|i| doc! {"_id": format!("U{i}"), "u": format!("u{i}")}));
    first.extend(
        (0..HANDED).map(|i| doc! {"_id": format!("V-{i}"), "u": format!("handed{i}"), "v": 0_i64}),
    );
    first.extend((0..CHAINED).map(|i| doc! {"_id": format!("K{i}"), "h": []}));
    let counted = doc! {"sum": 0_i64, "set": []};
    first.extend((0..COUNTED).map(|i| with_id(format!("N{i}"), counted.clone())));
    let c = locals[0].collection::<Document>("c");
    // It may have got half-way before.
    let emptied = c.delete_many(doc! {}).await;
    emptied.context("room for the first documents")?;
    let inserted = c.insert_many(first).write_concern(WriteConcern::majority());
    inserted.await.context("the first documents")?;
    Ok(Ledger {
        swapped: (0..SWAPPED).map(|i| format!("u{i}")).collect(),
        ..Ledger::default()
    })
}

/// All documents of one side, without sync fields.
pub async fn documents(database: &Database) -> Result<Documents> {
    let mut all = BTreeMap::new();
    let mut cursor = database
        .collection::<RawDocumentBuf>("c")
        .find(doc! {})
        .await?;
    let fields = FieldNames::default();
    while let Some(body) = cursor.try_next().await? {
        let content = sangam::compare::content(&body, &fields)?;
        let decoded = Document::from_reader(&content[..])?;
        all.insert(decoded.get_str("_id")?.to_owned(), (content, decoded));
    }
    Ok(all)
}

/// The document a record of `conflict_logs` is about, its versions, and whether it waits for a person.
pub fn conflict(record: &Document) -> Conflict {
    let id = |name: &str| record.get_str(name).ok().map(str::to_owned);
    let body = |name: &str| record.get_document(name).ok().cloned();
    let (local, remote) = (body("localDocument"), body("remoteDocument"));
    let body_id = |body: &Option<Document>| Some(body.as_ref()?.get_str("_id").ok()?.to_owned());
    Conflict {
        key: id("localId")
            .or_else(|| id("remoteId"))
            .or_else(|| body_id(&local))
            .or_else(|| body_id(&remote))
            .unwrap_or_else(|| format!("unknown: {record}")),
        open: !record.get_bool("resolved").unwrap_or(false),
        local,
        remote,
    }
}
