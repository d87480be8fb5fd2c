//! A local transaction reaches the remote as one.
//!
//! What one transaction wrote is claimed together. Here its writes to the remote go in one remote
//! transaction, as long as they fit the limits below. What the queue knows is the documents' state: of
//! one that was changed again since, the newest goes. When the remote refuses (a document there is not
//! what we believed), both sides are looked at again and it is tried once more; after that, or when a
//! document is in conflict or rejected, each goes for itself, in the same batch.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Item, Planned};
use crate::decide::Side;
use crate::exact;
use crate::failure::Failure;
use crate::guard::{Form, Verdict};
use crate::settle;
use crate::shared::{Settings, Shared};

/// Most bytes of a remote transaction: its writes must be done within the server's minute.
const BYTES: usize = 16 << 20;

/// Tries before each document goes for itself.
const TRIES: u8 = 2;

/// Sends what belongs together; the rest comes back, with the failure of the link, if it failed.
pub(super) async fn send(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &mut [Item],
    planned: Vec<Planned>,
) -> Result<(Vec<Planned>, Option<Failure>), Failure> {
    let mut rest = Vec::with_capacity(planned.len());
    let mut groups: HashMap<i64, Vec<Planned>> = HashMap::new();
    for p in planned {
        let item = &items[p.item];
        let fits = p.side == Side::Remote && p.form != Form::Exact && item.together < TRIES;
        match item.work.transaction.filter(|_| fits) {
            Some(transaction) => groups.entry(transaction).or_default().push(p),
            None => rest.push(p),
        }
    }
    let mut failed = None;
    for group in groups.into_values() {
        let size = |p: &Planned| {
            let len = |d: &Option<Vec<u8>>| d.as_ref().map_or(0, Vec::len);
            len(&p.write.expect) + len(&p.write.new)
        };
        if group.len() < 2 || group.iter().map(size).sum::<usize>() > BYTES {
            rest.extend(group);
            continue;
        }
        let failure = together(shared, settings, items, group).await?;
        failed = failed.or(failure.filter(Failure::is_offline));
    }
    Ok((rest, failed))
}

async fn together(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &mut [Item],
    group: Vec<Planned>,
) -> Result<Option<Failure>, Failure> {
    let endpoint = shared.endpoint(Side::Remote)?;
    let mut by_ns: HashMap<u32, Vec<Planned>> = HashMap::new();
    for p in group {
        by_ns.entry(items[p.item].ns.number).or_default().push(p);
    }
    let by_ns: Vec<Vec<Planned>> = by_ns.into_values().collect();
    let all = || by_ns.iter().flatten();
    let created = all().filter(|p| p.form == Form::Insert);
    shared
        .echoes
        .sent(Side::Remote, created.map(|p| &p.write.key));
    let writes: Vec<_> = by_ns
        .iter()
        .map(|group| {
            let ns = &items[group[0].item].ns;
            let writes: Vec<_> = group.iter().map(|p| (&p.write, &p.form)).collect();
            ((ns.db.as_str(), ns.coll.as_str()), writes)
        })
        .collect();
    let stamp = shared.stamp_for(settings, Side::Remote);
    let (verdict, failure) =
        exact::write_guarded(&endpoint, &writes, &settings.sync_fields, stamp).await;
    drop(writes);
    shared.failpoints.crash("after_write_before_ack");
    shared.note(Side::Remote, &failure.clone().map_or(Ok(()), Err));
    for p in all() {
        let tries = &mut items[p.item].together;
        *tries = match &verdict {
            Verdict::Duplicate(_) | Verdict::Rejected { .. } => TRIES,
            _ => *tries + 1,
        };
    }
    // Nothing was written: what stands in the way of one is looked at for each.
    let verdict = match verdict {
        Verdict::Duplicate(_) | Verdict::Rejected { .. } => Verdict::Modified,
        other => other,
    };
    for group in by_ns {
        let verdicts = vec![verdict.clone(); group.len()];
        settle::verdicts(shared, settings, items, group, verdicts).await?;
        shared.failpoints.crash("after_base");
    }
    Ok(failure)
}
