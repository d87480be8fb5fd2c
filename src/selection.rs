//! The selection of collections (`sync.collections`, `sync.exclude`), as it was last taken into force.
//!
//! A collection that joins it, by a change of the file before a start, by `reload` or over the API, is
//! compared at once and not first at night. Where base knows it from before, its events were missed
//! meanwhile: all of it is read.

use rusqlite::Connection;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::shared::Settings;
use crate::store::{self, walks};
use crate::tail::reconcile_name;

/// Name in the store.
const NAME: &str = "selection";

/// Why a database is compared whose collections may be others now.
pub(crate) const CHANGED: &str = "collections changed";

#[derive(Clone, PartialEq, Serialize, Deserialize)]
struct Selection {
    collections: Vec<String>,
    exclude: Vec<String>,
}

/// Name under which it is kept that the events of a collection were missed.
fn missed_name(ns: u32) -> String {
    format!("missed:{ns}")
}

/// Whether the events of a collection were missed since it was last compared, inside a call.
pub(crate) fn is_missed(c: &Connection, ns: u32) -> rusqlite::Result<bool> {
    Ok(store::get_meta::<i64>(c, &missed_name(ns))?.is_some())
}

/// The selection as kept, to be compared with a later one; inside a call.
pub(crate) fn kept(c: &Connection) -> rusqlite::Result<Option<String>> {
    store::get_meta(c, NAME)
}

/// Takes note of the selection in force, inside a call. If it is another one than before, every
/// database asks to be compared. Whether it is.
pub(crate) fn note(c: &Connection, settings: &Settings) -> rusqlite::Result<bool> {
    let sync = &settings.config.sync;
    let now = Selection {
        collections: sync.collections.clone(),
        exclude: sync.exclude.clone(),
    };
    let before: Option<Selection> = kept(c)?.and_then(|text| serde_json::from_str(&text).ok());
    let text = serde_json::to_string(&now).unwrap_or_default();
    store::set_meta(c, NAME, text)?;
    // Of a state that is new, everything is compared anyway.
    let Some(before) = before.filter(|before| *before != now) else {
        return Ok(false);
    };
    let before = Settings::new(with(&settings.config, before));
    let mut known = c.prepare("SELECT n, db, coll FROM namespaces")?;
    let mut known = known.query([])?;
    while let Some(r) = known.next()? {
        let (ns, db, coll): (u32, String, String) = (r.get(0)?, r.get(1)?, r.get(2)?);
        if settings.is_synced(&db, &coll) && !before.is_synced(&db, &coll) {
            store::set_meta(c, &missed_name(ns), 1)?;
            // Of a comparison under way: what it has seen is from before.
            walks::forget_parts(c, ns)?;
        }
    }
    for db in &settings.config.databases {
        let flag = reconcile_name(db);
        if store::get_meta::<String>(c, &flag)?.is_none() {
            store::set_meta(c, &flag, CHANGED)?;
        }
    }
    Ok(true)
}

fn with(config: &Config, selection: Selection) -> Config {
    let mut config = config.clone();
    config.sync.collections = selection.collections;
    config.sync.exclude = selection.exclude;
    config
}

/// A comparison of a database that was asked for with this selection is over, inside a call: what was
/// missed is made good; or, if the selection changed meanwhile, everything is asked for once more.
/// Whether it is over.
pub(crate) fn compared(
    c: &Connection,
    (db, why): (&str, &str),
    selection: Option<&String>,
) -> rusqlite::Result<bool> {
    if kept(c)?.as_ref() != selection {
        let again = "UPDATE meta SET v = ? WHERE k = ? AND v = ?";
        c.execute(again, [CHANGED, &reconcile_name(db), why])?;
        return Ok(false);
    }
    c.execute(
        "DELETE FROM meta WHERE k IN (SELECT 'missed:' || n FROM namespaces WHERE db = ?)",
        [db],
    )?;
    Ok(true)
}
