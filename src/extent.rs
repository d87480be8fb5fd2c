//! What a comparison covers: the collections of both sides, and what differs in a range of one.

use tokio::sync::mpsc;

use crate::command::CommandError;
use crate::decide::Side;
use crate::failure::Failure;
use crate::key::{Id, KeyMap};
use crate::reconcile::collections;
use crate::settle::store_failed;
use crate::shared::{Settings, Shared, lock};
use crate::walk::{Count, Found, Place, Range};

/// A collection that either side has.
#[derive(Clone, Debug)]
pub struct Extent {
    /// Its database.
    pub db: String,
    /// Its name.
    pub coll: String,
    /// Number of its namespace.
    pub ns: u32,
    /// How it is called in answers.
    pub shown: String,
    /// Whether it waits for a person's word (R13).
    pub halted: bool,
}

/// Documents by key.
type Documents = KeyMap<Vec<u8>>;

impl Extent {
    /// Reads documents on both sides at once, by `_id`: what the local side holds, what the remote.
    pub async fn read<'i>(
        &self,
        shared: &Shared,
        ids: impl Iterator<Item = &'i Id> + Clone,
    ) -> Result<(Documents, Documents), Failure> {
        let remote = shared.endpoint(Side::Remote)?;
        let (db, coll) = (&self.db, &self.coll);
        let (here, there) = tokio::join!(
            shared.local.read(db, coll, self.ns, ids.clone()),
            remote.read(db, coll, self.ns, ids)
        );
        shared.note(Side::Remote, &there);
        Ok((here?, there?))
    }
}

/// The synced collections of all databases, or only those named.
pub async fn of(
    shared: &Shared,
    settings: &Settings,
    only: &[String],
) -> Result<Vec<Extent>, Failure> {
    let wanted: Vec<(String, String)> = only.iter().map(|n| settings.names_of(n)).collect();
    let mut all = Vec::new();
    for db in &settings.config.databases {
        let mut names = collections(shared, settings, Side::Local, db).await?;
        let there = collections(shared, settings, Side::Remote, db).await;
        shared.note(Side::Remote, &there);
        names.extend(there?);
        names.sort();
        names.dedup();
        for coll in names {
            if !wanted.is_empty() && !wanted.contains(&(db.clone(), coll.clone())) {
                continue;
            }
            let ns = shared.store.namespace(db, &coll).await;
            let ns = ns.map_err(store_failed)?;
            all.push(Extent {
                db: db.clone(),
                shown: settings.display(db, &coll),
                coll,
                ns,
                halted: lock(&shared.halted).contains(ns),
            });
        }
    }
    Ok(all)
}

/// Refuses names of collections that are not synced.
pub fn check(settings: &Settings, only: &[String]) -> Result<(), CommandError> {
    for name in only {
        let (db, coll) = settings.names_of(name);
        if !settings.is_synced(&db, &coll) {
            return Err(CommandError::BadRequest(format!(
                "{name} is not among the collections that are synced"
            )));
        }
    }
    Ok(())
}

/// Compares a range byte for byte; `each` is given all that was found.
pub async fn compare(
    shared: &Shared,
    place: &Place,
    range: &Range,
    mut each: impl FnMut(Found),
) -> Result<Count, Failure> {
    let (finds, mut found) = mpsc::channel(2);
    let walked = async move {
        let outcome = place.exact(range, &finds).await;
        drop(finds);
        outcome
    };
    let taken = async {
        while let Some(some) = found.recv().await {
            some.into_iter().for_each(&mut each);
        }
        Ok(())
    };
    let outcome = tokio::try_join!(walked, taken).map(|(count, ())| count);
    shared.note(Side::Remote, &outcome);
    outcome
}
