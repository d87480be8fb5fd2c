//! Trying out a plan before anything is written: is the value taken, do the validators accept it?
//!
//! Only a courtesy to the person who decides: whatever slips through is refused by the write itself.

use std::sync::Arc;

use bson::{Document, RawDocumentBuf, doc};

use crate::command::CommandError;
use crate::decide::{Kind, Side};
use crate::failure::Failure;
use crate::key::Id;
use crate::raw::Writer;
use crate::resolution::Plan;
use crate::resolve::Sight;
use crate::shared::{Settings, Shared};
use crate::side::Endpoint;
use crate::value::{self, Value};

/// Refuses a plan whose value is taken on either side, or whose document a validator would refuse.
pub async fn check(
    shared: &Arc<Shared>,
    settings: &Settings,
    sight: &Sight,
    plan: &Plan,
) -> Result<(), CommandError> {
    let Some(result) = &plan.result else {
        return Ok(());
    };
    let edited = sight.mine.local.as_ref() != Some(result);
    for side in [Side::Local, Side::Remote] {
        let there = match side {
            Side::Local => &sight.mine.local,
            Side::Remote => &sight.mine.remote,
        };
        if there.as_ref() == Some(result) {
            continue;
        }
        let endpoint = shared.endpoint(side)?;
        if edited && sight.kind == Kind::UniqueField {
            let place = Place {
                endpoint: &endpoint,
                ns: &sight.ns,
            };
            if place
                .is_taken(&sight.case.fields, result, &sight.mine.id)
                .await?
            {
                return Err(CommandError::Refused(format!(
                    "that value of {} is taken by another document on the {} side; nothing was written, give another value",
                    sight.case.fields.join(" + "),
                    side.name()
                )));
            }
        }
        if let Some(why) = refused(&endpoint, settings, &sight.ns, result).await? {
            return Err(CommandError::Refused(format!(
                "the {} database would refuse the document: {why}; nothing was written",
                side.name()
            )));
        }
    }
    Ok(())
}

/// A collection of one side.
pub struct Place<'a> {
    /// The side.
    pub endpoint: &'a Arc<Endpoint>,
    /// Database and collection.
    pub ns: &'a (String, String),
}

impl Place<'_> {
    /// Whether another document than `except` has the values that `doc` has in these fields.
    pub async fn is_taken(
        &self,
        fields: &[String],
        doc: &[u8],
        except: &Id,
    ) -> Result<bool, Failure> {
        let values: Vec<(&String, Option<Value>)> =
            fields.iter().map(|f| (f, value::at_path(doc, f))).collect();
        if fields.is_empty() || values.iter().all(|(_, v)| v.is_none()) {
            return Ok(false);
        }
        let collation = self.collation(fields).await?;
        let (db, coll) = self.ns;
        let mut w = Writer::new();
        w.str("find", coll).open("filter").open_array("$and");
        w.open("0")
            .open("_id")
            .value("$ne", except.kind, &except.value)
            .close()
            .close();
        for (i, (field, value)) in values.iter().enumerate() {
            w.open((i + 1).to_string()).open(field);
            match value {
                Some(v) => w.value("$eq", v.kind, &v.bytes),
                None => w.value("$eq", 0x0A, &[]),
            };
            w.close().close();
        }
        w.close()
            .close()
            .i32("limit", 1)
            .open("projection")
            .i32("_id", 1)
            .close();
        w.open("readConcern").str("level", "majority").close();
        if let Some(collation) = collation.and_then(|c| c.to_vec().ok()) {
            w.doc("collation", &collation);
        }
        let mut found = false;
        self.endpoint
            .query(db, w.command(), |_| found = true)
            .await?;
        Ok(found)
    }

    async fn collation(&self, fields: &[String]) -> Result<Option<Document>, Failure> {
        let raw = RawDocumentBuf::try_from(&doc! {"listIndexes": &self.ns.1})
            .map_err(|_| Failure::fatal("listIndexes"))?;
        let mut found = None;
        let listed = self
            .endpoint
            .query(&self.ns.0, raw, |d| {
                if let Ok(spec) = Document::from_reader(d.as_bytes())
                    && spec
                        .get_document("key")
                        .is_ok_and(|k| k.keys().eq(fields.iter()))
                    && let Ok(collation) = spec.get_document("collation")
                {
                    found = Some(collation.clone());
                }
            })
            .await;
        match listed {
            // The collection does not exist on that side yet.
            Err(f) if f.code == Some(26) => Ok(None),
            other => other.map(|()| found),
        }
    }
}

/// Why a collection's validator refuses a document, if it does. Servers before 5.1 can't be asked.
async fn refused(
    endpoint: &Arc<Endpoint>,
    settings: &Settings,
    (db, coll): &(String, String),
    doc: &[u8],
) -> Result<Option<&'static str>, Failure> {
    let command = doc! {"listCollections": 1, "filter": {"name": coll}};
    let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("listCollections"))?;
    let mut options = Document::new();
    endpoint
        .query(db, raw, |d| {
            if let Ok(spec) = Document::from_reader(d.as_bytes()) {
                options = spec.get_document("options").cloned().unwrap_or_default();
            }
        })
        .await?;
    let Ok(validator) = options.get_document("validator") else {
        return Ok(None);
    };
    if options
        .get_str("validationAction")
        .is_ok_and(|a| a != "error")
        || validator.is_empty()
    {
        return Ok(None);
    }
    let Ok(validator) = validator.to_vec() else {
        return Ok(None);
    };
    let stamped = if settings.config.sync.stamp_documents {
        crate::guard::stamped(
            doc,
            Some(crate::guard::Stamp {
                fields: &settings.config.fields,
                origin: "remote",
                server_now: chrono::Utc::now().timestamp_millis(),
            }),
        )
    } else {
        doc.into()
    };
    let mut w = Writer::new();
    w.i32("aggregate", 1).open_array("pipeline");
    w.open("0")
        .open("$documents")
        .open_array("$literal")
        .doc("0", &stamped)
        .close()
        .close()
        .close();
    w.open("1").doc("$match", &validator).close().close();
    w.open("cursor").close();
    let mut passes = false;
    match endpoint.query(db, w.command(), |_| passes = true).await {
        Ok(()) if !passes => Ok(Some("it does not pass the collection's validator")),
        Err(failure) if failure.is_offline() => Err(failure),
        _ => Ok(None),
    }
}
