//! What goes in a transaction.
//!
//! What one local transaction wrote is claimed together. Here its writes to the remote go in one remote
//! transaction, as long as they fit the limits below. What the queue knows is the documents' state: of
//! one that was changed again since, the newest goes. When the remote refuses (a document there is not
//! what we believed), both sides are looked at again and it is tried once more; after that, or when a
//! document is in conflict or rejected, each goes for itself, in the same batch.
//!
//! So do writes that need a [`receipt`], to either side: many of them at first, fewer after a refusal,
//! at last each for itself.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Item, Planned};
use crate::decide::Side;
use crate::exact;
use crate::failure::Failure;
use crate::guard::{Form, Verdict};
use crate::receipt;
use crate::settle;
use crate::shared::{Settings, Shared};

/// Most bytes of a transaction: its writes must be done within the server's minute.
const BYTES: usize = 16 << 20;

/// Tries before each document goes for itself.
const TRIES: u8 = 2;

/// Most documents of a transaction that is one for its receipt only, by the tries before.
const WITH_RECEIPT: [usize; 3] = [100, 10, 1];

/// What goes in one transaction, to one side.
pub(super) type Group = Vec<Planned>;

/// What goes by itself, and what goes together; this has its receipts.
pub(super) async fn groups(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &[Item],
    planned: Vec<Planned>,
) -> Result<(Vec<Planned>, Vec<Group>), Failure> {
    let needed = |p: &Planned| {
        let rules = settings.config.sync.rules.get(&items[p.item].ns.coll);
        receipt::is_needed(&p.write, rules)
    };
    let mut rest = Vec::with_capacity(planned.len());
    let mut together: HashMap<i64, Group> = HashMap::new();
    for p in planned {
        let item = &items[p.item];
        let fits = p.side == Side::Remote && p.form != Form::Exact && item.together < TRIES;
        match item.work.transaction.filter(|_| fits) {
            Some(transaction) => together.entry(transaction).or_default().push(p),
            None => rest.push(p),
        }
    }
    let mut groups = Vec::new();
    for group in together.into_values() {
        match group.len() < 2 || group.iter().map(size).sum::<usize>() > BYTES {
            true => rest.extend(group),
            false => groups.push(group),
        }
    }
    let (counted, rest) = rest.into_iter().partition(needed);
    groups.extend(in_parts(items, counted));
    for group in &mut groups {
        // The mutation `no_receipt`: what became of a count is guessed from the number.
        if group.iter().any(needed) && !shared.failpoints.mutated("no_receipt") {
            let receipt = receipt::take(shared, group[0].side).await?;
            group.iter_mut().for_each(|p| p.receipt = receipt);
        }
    }
    Ok((rest, groups))
}

fn size(p: &Planned) -> usize {
    let len = |d: &Option<Vec<u8>>| d.as_ref().map_or(0, Vec::len);
    len(&p.write.expect) + len(&p.write.new)
}

/// Parts by side and by how often they were tried; an exact write is one by itself.
fn in_parts(items: &[Item], counted: Vec<Planned>) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut open: HashMap<(Side, u8), (usize, usize)> = HashMap::new();
    for p in counted {
        let tries = items[p.item].together;
        let most = match p.form {
            Form::Exact => 1,
            _ => WITH_RECEIPT[usize::from(tries).min(WITH_RECEIPT.len() - 1)],
        };
        let bytes = size(&p);
        let part = open.get_mut(&(p.side, tries)).filter(|(at, filled)| {
            groups[*at].len() < most
                && groups[*at][0].form != Form::Exact
                && *filled + bytes <= BYTES
        });
        match part {
            Some((at, filled)) => {
                *filled += bytes;
                groups[*at].push(p);
            }
            None => {
                open.insert((p.side, tries), (groups.len(), bytes));
                groups.push(vec![p]);
            }
        }
    }
    groups
}

/// Sends what goes together, unless that failure says that nothing may be sent; the failure of the link,
/// if it failed.
pub(super) async fn send(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &mut [Item],
    groups: Vec<Group>,
    unsent: Option<&Failure>,
) -> Result<Option<Failure>, Failure> {
    let mut failed: Option<Failure> = None;
    for group in groups {
        let failure = together(shared, settings, items, group, unsent).await?;
        failed = failed.or(failure.filter(Failure::is_offline));
    }
    Ok(failed)
}

async fn together(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &mut [Item],
    group: Group,
    unsent: Option<&Failure>,
) -> Result<Option<Failure>, Failure> {
    let (side, receipt, alone) = (group[0].side, group[0].receipt, group.len() == 1);
    let endpoint = shared.endpoint(side)?;
    let mut by_ns: HashMap<u32, Vec<Planned>> = HashMap::new();
    for p in group {
        by_ns.entry(items[p.item].ns.number).or_default().push(p);
    }
    let by_ns: Vec<Vec<Planned>> = by_ns.into_values().collect();
    let all = || by_ns.iter().flatten();
    shared.echoes.sent(side, all().map(|p| (&p.write, &p.form)));
    let writes: Vec<_> = by_ns
        .iter()
        .map(|group| {
            let ns = &items[group[0].item].ns;
            let writes: Vec<_> = group.iter().map(|p| (&p.write, &p.form)).collect();
            ((ns.db.as_str(), ns.coll.as_str()), writes)
        })
        .collect();
    let with = exact::With {
        sync_fields: &settings.sync_fields,
        stamp: shared.stamp_for(settings, side),
        receipt: receipt.map(|receipt| (settings.records_db(), receipt)),
    };
    let (verdict, failure) = match writes.as_slice() {
        _ if unsent.is_some() => (Verdict::Unknown { late: false }, unsent.cloned()),
        [(ns, one)] if *one[0].1 == Form::Exact => {
            exact::write_together(&endpoint, &[(*ns, one[0].0)], with).await
        }
        writes => exact::write_guarded(&endpoint, writes, with).await,
    };
    drop(writes);
    shared.failpoints.crash("after_write_before_ack");
    shared.note(side, &failure.clone().map_or(Ok(()), Err));
    shared.receipts.ended(side, receipt, &verdict);
    for p in all() {
        let tries = &mut items[p.item].together;
        *tries = match &verdict {
            Verdict::Duplicate(_) | Verdict::Rejected { .. } => TRIES,
            _ => *tries + 1,
        };
    }
    // Nothing was written: what stands in the way of one is looked at for each.
    let verdict = match verdict {
        Verdict::Duplicate(_) | Verdict::Rejected { .. } if !alone => Verdict::Modified,
        other => other,
    };
    for group in by_ns {
        let verdicts = vec![verdict.clone(); group.len()];
        settle::verdicts(shared, settings, items, group, verdicts, None).await?;
        shared.failpoints.crash("after_base");
    }
    Ok(failure)
}
