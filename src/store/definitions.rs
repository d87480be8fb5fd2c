//! What collections are like on either side, and what both last agreed on.

use bson::{deserialize_from_slice, serialize_to_vec};
use rusqlite::{Connection, OptionalExtension, params};

use crate::decide::Side;
use crate::schema::Definition;

/// One of the three trees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tree {
    /// As last seen on a side.
    Seen(Side),
    /// What both had.
    Base,
}

impl Tree {
    fn number(self) -> i64 {
        match self {
            Self::Seen(Side::Local) => 0,
            Self::Seen(Side::Remote) => 1,
            Self::Base => 2,
        }
    }
}

/// The definition of a namespace in a tree. One that can't be read any more reads as none.
pub fn get(c: &Connection, ns: u32, tree: Tree) -> rusqlite::Result<Option<Definition>> {
    let body: Option<Vec<u8>> = c
        .prepare_cached("SELECT body FROM definitions WHERE ns = ? AND tree = ?")?
        .query_row(params![ns, tree.number()], |r| r.get(0))
        .optional()?;
    Ok(body.and_then(|b| deserialize_from_slice(&b).ok()))
}

/// Sets it; `None` removes it.
pub fn put(
    c: &Connection,
    ns: u32,
    tree: Tree,
    definition: Option<&Definition>,
) -> rusqlite::Result<()> {
    let body = definition.and_then(|d| serialize_to_vec(d).ok());
    match body {
        Some(body) => c
            .prepare_cached("INSERT OR REPLACE INTO definitions(ns, tree, body) VALUES(?,?,?)")?
            .execute(params![ns, tree.number(), body])?,
        None => c
            .prepare_cached("DELETE FROM definitions WHERE ns = ? AND tree = ?")?
            .execute(params![ns, tree.number()])?,
    };
    Ok(())
}

/// Everything that was seen on the sides: namespace, side, definition.
pub fn seen(c: &Connection) -> rusqlite::Result<Vec<(u32, Side, Definition)>> {
    let mut rows = c.prepare_cached("SELECT ns, tree, body FROM definitions WHERE tree < 2")?;
    let rows = rows.query_map([], |r| {
        let side = match r.get::<_, i64>(1)? {
            0 => Side::Local,
            _ => Side::Remote,
        };
        Ok((r.get(0)?, side, r.get::<_, Vec<u8>>(2)?))
    })?;
    let mut all = Vec::new();
    for row in rows {
        let (ns, side, body) = row?;
        if let Ok(definition) = deserialize_from_slice(&body) {
            all.push((ns, side, definition));
        }
    }
    Ok(all)
}

/// Namespaces of which anything is known.
pub fn namespaces(c: &Connection) -> rusqlite::Result<Vec<u32>> {
    c.prepare_cached("SELECT DISTINCT ns FROM definitions")?
        .query_map([], |r| r.get(0))?
        .collect()
}
