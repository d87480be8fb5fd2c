//! `[unique_fields]`: values that must be unique though no index says so, looked up before a write.

use std::sync::Arc;

use bson::{Document, doc};

use super::blocker::at_path;
use crate::batch::{Item, Planned, State};
use crate::decide::Side;
use crate::failure::Failure;
use crate::guard::Duplicate;
use crate::key::{Id, Key};
use crate::raw::{self, Writer, index_name};
use crate::shared::{Settings, Shared};

/// Takes writes out of a batch whose `[unique_fields]` value is taken, index or not.
pub(crate) async fn check(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &mut [Item],
    planned: &mut Vec<Planned>,
) -> Result<(), Failure> {
    if settings.config.unique_fields.is_empty() {
        return Ok(());
    }
    let mut taken: Vec<(usize, Duplicate)> = Vec::new();
    for side in [Side::Local, Side::Remote] {
        for (coll, fields) in &settings.config.unique_fields {
            for field in fields {
                taken.extend(taken_values(shared, items, planned, side, coll, field).await?);
            }
        }
    }
    for (item, dup) in taken {
        let Some(at) = planned.iter().position(|p| p.item == item) else {
            continue;
        };
        let p = planned.remove(at);
        items[item].state = State::Clash(Box::new((p.side, p.write, dup)));
    }
    Ok(())
}

async fn taken_values(
    shared: &Arc<Shared>,
    items: &[Item],
    planned: &[Planned],
    side: Side,
    coll: &str,
    field: &str,
) -> Result<Vec<(usize, Duplicate)>, Failure> {
    let mut wanted = Vec::new();
    for p in planned
        .iter()
        .filter(|p| p.side == side && items[p.item].ns.coll == coll)
    {
        let value = |d: &Option<Vec<u8>>| {
            d.as_ref()
                .and_then(|d| raw::get(d, field.as_bytes()).map(|e| e.whole.to_vec()))
        };
        let new = value(&p.write.new);
        // A missing or null value is no value.
        if new.as_ref().is_some_and(|n| n[0] != 0x0A) && new != value(&p.write.expect) {
            wanted.push(p);
        }
    }
    let Some(first) = wanted.first() else {
        return Ok(vec![]);
    };
    let ns = &items[first.item].ns;
    let mut w = Writer::new();
    w.str("find", coll)
        .open("filter")
        .open(field)
        .open_array("$in");
    for (i, p) in wanted.iter().enumerate() {
        if let Some(e) = p
            .write
            .new
            .as_ref()
            .and_then(|d| raw::get(d, field.as_bytes()))
        {
            w.value(index_name(i), e.kind, e.value);
        }
    }
    w.close()
        .close()
        .close()
        .open("readConcern")
        .str("level", "majority")
        .close();
    w.open("projection").i32(field, 1).close();
    let mut holders: Vec<Vec<u8>> = Vec::new();
    let endpoint = shared.endpoint(side)?;
    endpoint
        .query(&ns.db, w.command(), |d| holders.push(d.into_bytes()))
        .await?;
    let mut taken = Vec::new();
    for p in wanted {
        let Some(new) = p
            .write
            .new
            .as_ref()
            .and_then(|d| raw::get(d, field.as_bytes()))
        else {
            continue;
        };
        let holder = holders.iter().find(|h| {
            raw::get(h, field.as_bytes()).is_some_and(|e| e.whole == new.whole)
                && Id::of(h).is_some_and(|id| Key::new(ns.number, &id) != p.write.key)
        });
        if holder.is_some() {
            let value = p
                .write
                .new
                .as_ref()
                .and_then(|d| Document::from_reader(d.as_slice()).ok())
                .unwrap_or_default();
            let value = doc! {field: at_path(&value, field)};
            taken.push((
                p.item,
                Duplicate {
                    pattern: doc! {field: 1},
                    value,
                    collation: None,
                },
            ));
        }
    }
    Ok(taken)
}
