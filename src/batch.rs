//! One batch: look at the documents, decide each, write, settle.
//!
//! Three looks at most. The first one assumes that the remote still holds base where only the local
//! side is known to have changed, which saves reading it: the guard finds out (R6). What the guard
//! refuses is looked at again, with both sides read.

mod decision;
mod read;
mod transaction;

pub(crate) use decision::{landed, overruled, rejected};

use std::collections::HashMap;
use std::sync::Arc;

use tokio::time::Instant;

use crate::content::strip;
use crate::decide::{Clash, Side};
use crate::failure::Failure;
use crate::guard::{self, Duplicate, Form, Write};
use crate::key::Key;
use crate::retry::delay_of_attempt;
use crate::settle;
use crate::shared::{Settings, Shared, lock};
use crate::store::base::{Intent, digest};
use crate::store::queue::Work;

/// Looks at a batch before what is left of it goes back to the queue.
const LOOKS: usize = 4;

/// A document on its way through a batch.
pub(crate) struct Item {
    pub(crate) work: Work,
    pub(crate) ns: Arc<Namespace>,
    /// The documents as last read.
    pub(crate) local: Option<Vec<u8>>,
    pub(crate) remote: Option<Vec<u8>>,
    /// Whether `remote` was read, rather than believed to be base.
    remote_known: bool,
    /// Tries to send it together with the rest of its transaction.
    together: u8,
    pub(crate) state: State,
}

/// Where an item stands.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum State {
    /// To be looked at (again).
    Look,
    /// Nothing more to do in this batch.
    Done,
    /// A unique index refused the write to that side.
    Clash(Box<(Side, Write, Duplicate)>),
}

/// A namespace of the batch.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) number: u32,
    pub(crate) db: String,
    pub(crate) coll: String,
    pub(crate) shown: String,
    pub(crate) sync_fields: Vec<String>,
}

/// A write that was decided.
pub(crate) struct Planned {
    pub(crate) item: usize,
    pub(crate) side: Side,
    pub(crate) write: Write,
    pub(crate) form: Form,
    pub(crate) base_after: Option<Vec<u8>>,
    /// Whether both sides are equal once it is done.
    pub(crate) last: bool,
    pub(crate) clash: Option<Clash>,
}

impl Planned {
    /// The intent of this write. `updatedAt` does not tell whether it landed: whoever edits another
    /// field afterwards bumps it.
    pub(crate) fn intent(&self, epoch: i64, updated_at: &str) -> Intent {
        let telling = |names: &[Vec<u8>]| {
            let names: Vec<_> = names
                .iter()
                .filter(|n| *n != updated_at.as_bytes())
                .cloned()
                .collect();
            (!names.is_empty()).then_some(names)
        };
        let digest = match (&self.write.expect, &self.write.new) {
            (None, Some(new)) if self.base_after == self.write.new => Some(digest(new)),
            _ => None,
        };
        let unless_told = |body: &Option<Vec<u8>>| match digest {
            Some(_) => None,
            None => body.clone(),
        };
        Intent {
            side: self.side,
            new: unless_told(&self.write.new),
            digest,
            base_after: unless_told(&self.base_after),
            fields: self.form.fields().and_then(telling),
            epoch,
        }
    }
}

/// Works through claimed keys and lets go of them. An error means that a side or the store failed.
pub async fn process(shared: &Arc<Shared>, works: Vec<Work>) -> Result<(), Failure> {
    let keys: Vec<Key> = works.iter().map(|w| w.key.clone()).collect();
    let began = Instant::now();
    let outcome = run(shared, works).await;
    shared.metrics.batch(keys.len(), began.elapsed());
    shared.touched.note(&keys);
    let mut busy = lock(&shared.busy);
    for key in &keys {
        busy.remove(key);
    }
    // It leaves alone what somebody works on.
    shared.stamp.notify_one();
    outcome
}

async fn run(shared: &Arc<Shared>, works: Vec<Work>) -> Result<(), Failure> {
    let settings = shared.settings();
    let mut namespaces: HashMap<u32, Arc<Namespace>> = HashMap::new();
    let mut items = Vec::with_capacity(works.len());
    for work in works {
        let n = work.key.ns();
        let ns = match namespaces.get(&n) {
            Some(ns) => ns.clone(),
            None => {
                let Some((db, coll)) = shared.store.namespace_name(n) else {
                    continue;
                };
                let shown = settings.display(&db, &coll);
                let ns = Arc::new(Namespace {
                    number: n,
                    db,
                    coll,
                    shown,
                    sync_fields: settings.sync_fields.clone(),
                });
                namespaces.insert(n, ns.clone());
                ns
            }
        };
        items.push(Item {
            work,
            ns,
            local: None,
            remote: None,
            remote_known: false,
            together: 0,
            state: State::Look,
        });
    }
    for look in 0..LOOKS {
        if items.iter().all(|i| i.state != State::Look) {
            break;
        }
        read::read(shared, &mut items, look > 0).await?;
        let planned = decision::decide_all(shared, &settings, &mut items).await?;
        if !planned.is_empty() {
            write_all(shared, &settings, &mut items, planned).await?;
        }
        crate::unique::untie_all(shared, &settings, &mut items).await?;
    }
    let left: Vec<Work> = items
        .into_iter()
        .filter(|i| i.state == State::Look)
        .map(|i| i.work)
        .collect();
    settle::put_back(shared, left, delay_of_attempt(&settings.config.retry, 1)).await
}

/// Stores the intents, writes by side and collection, settles what came of it.
async fn write_all(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &mut [Item],
    mut planned: Vec<Planned>,
) -> Result<(), Failure> {
    crate::loss::hold(shared, items, &mut planned).await?;
    crate::unique::configured::check(shared, settings, items, &mut planned).await?;
    if shared.failpoints.mutated("unguarded") {
        believe_anything(shared, settings, items, &mut planned).await?;
    }
    settle::put_intents(shared, settings, items, &planned).await?;
    shared.failpoints.crash("before_write");
    let (planned, mut failed) = transaction::send(shared, settings, items, planned).await?;
    let mut groups: HashMap<(Side, u32), Vec<Planned>> = HashMap::new();
    for p in planned {
        groups
            .entry((p.side, items[p.item].ns.number))
            .or_default()
            .push(p);
    }
    for ((side, _), group) in groups {
        let ns = items[group[0].item].ns.clone();
        let endpoint = shared.endpoint(side)?;
        let writes: Vec<_> = group.iter().map(|p| (&p.write, &p.form)).collect();
        let stamp = shared.stamp_for(settings, side);
        let created = group.iter().filter(|p| p.form == Form::Insert);
        shared.echoes.sent(side, created.map(|p| &p.write.key));
        let outcome = guard::write(
            &endpoint,
            (&ns.db, &ns.coll),
            &writes,
            &settings.sync_fields,
            stamp,
        )
        .await;
        shared.failpoints.crash("after_write_before_ack");
        if shared.failpoints.mutated("clear_noseq") {
            // The mutation matters to an edit that comes in while the answer is on its way.
            tokio::time::sleep(std::time::Duration::from_millis(150)).await;
        }
        let failure = outcome.failure.clone();
        shared.note(side, &failure.clone().map_or(Ok(()), Err));
        let refused = failure
            .as_ref()
            .is_some_and(|f| f.code == Some(crate::failure::UNAUTHORIZED));
        let text = || {
            format!(
                "the user of the {} database may not write to {}: give it readWrite",
                side.name(),
                ns.shown
            )
        };
        shared.notice(&format!("rights:{}", side.name()), refused.then(text));
        settle::verdicts(shared, settings, items, group, outcome.verdicts).await?;
        shared.failpoints.crash("after_base");
        failed = failed.or(failure.filter(Failure::is_offline));
    }
    failed.map_or(Ok(()), Err)
}

/// The mutation `unguarded`: takes whatever stands there now for what was expected. Others get some
/// time to write in between, which a guard would notice.
async fn believe_anything(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &[Item],
    planned: &mut [Planned],
) -> Result<(), Failure> {
    tokio::time::sleep(std::time::Duration::from_millis(150)).await;
    for p in planned {
        let ns = &items[p.item].ns;
        let endpoint = shared.endpoint(p.side)?;
        let mut now = endpoint
            .read(&ns.db, &ns.coll, ns.number, std::iter::once(&p.write.id))
            .await?;
        p.write.expect = now
            .remove(&p.write.key)
            .map(|d| strip(&d, &settings.sync_fields).into_owned());
        p.form = guard::form(&p.write, &settings.sync_fields);
    }
    Ok(())
}
