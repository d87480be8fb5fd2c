//! One batch: look at the documents, decide each, write, settle.
//!
//! Three looks at most. The first one assumes that the remote still holds base where only the local
//! side is known to have changed, which saves reading it: the guard finds out (R6). What the guard
//! refuses is looked at again, with both sides read.

mod intent;
mod read;
mod transaction;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::conflicts::Found;
use crate::content::strip;
use crate::decide::{self, Clash, Decision, Rules, Side, Target, View};
use crate::failure::Failure;
use crate::guard::{self, Duplicate, Form, Outcome, Write};
use crate::key::Key;
use crate::lease::journal;
use crate::raw;
use crate::receipt::Receipt;
use crate::retry::delay_of_attempt;
use crate::settle::{self, Settlement};
use crate::shared::{Settings, Shared, lock};
use crate::store::queue::Work;
pub(crate) use intent::landed;
use intent::{may_have_expired, settle_intent};

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
    /// Tries to send it together with others in one transaction.
    together: u8,
    /// What the receipt of its intent says.
    happened: Option<bool>,
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
    /// What base becomes once it is done: the content as written, where both sides are equal then.
    pub(crate) then: Then,
    pub(crate) clash: Option<Clash>,
    /// What its transaction leaves behind, if it goes in one that needs it.
    pub(crate) receipt: Option<Receipt>,
}

/// What base becomes once a write is done.
pub(crate) enum Then {
    /// What was written: both sides are equal.
    Written,
    /// This, and the other side is written next.
    Base(Option<Vec<u8>>),
}

impl Planned {
    /// Whether both sides are equal once it is done.
    pub(crate) fn is_last(&self) -> bool {
        matches!(self.then, Then::Written)
    }

    /// What base becomes once it is done.
    pub(crate) fn base_after(&self) -> Option<&[u8]> {
        match &self.then {
            Then::Written => self.write.new.as_deref(),
            Then::Base(base) => base.as_deref(),
        }
    }
}

/// Works through claimed keys and lets go of them. An error means that a side or the store failed.
pub async fn process(shared: &Arc<Shared>, works: Vec<Work>) -> Result<(), Failure> {
    let keys: Vec<Key> = works.iter().map(|w| w.key.clone()).collect();
    shared.failpoints.stall("claimed").await;
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
            happened: None,
            state: State::Look,
        });
    }
    // Of several daemons, one that stands by settles what is equal and leaves the rest where it is.
    let withheld = shared.withholds();
    // What the last holder did may not have been seen here yet: believe nothing.
    let careful = withheld || shared.lease().is_some_and(|l| l.journal().inherits());
    for look in 0..LOOKS {
        if items.iter().all(|i| i.state != State::Look) {
            break;
        }
        read::read(shared, &mut items, look > 0 || careful).await?;
        let planned = decide_all(shared, &settings, &mut items, withheld).await?;
        if withheld {
            break;
        }
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
    if withheld {
        return settle::withhold(shared, left).await;
    }
    settle::put_back(shared, left, delay_of_attempt(&settings.config.retry, 1)).await
}

/// Decides every item that was read, stores what needs no write and the intents of what does.
async fn decide_all(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &mut [Item],
    withheld: bool,
) -> Result<Vec<Planned>, Failure> {
    let mut settlements: Vec<Settlement> = Vec::new();
    let mut planned = Vec::new();
    let first_sync = lock(&shared.first_sync).clone();
    for (i, item) in items.iter_mut().enumerate() {
        if item.state != State::Look || !settle_intent(shared, settings, item, &mut settlements) {
            continue;
        }
        if may_have_expired(shared, item) {
            settlements.push(Settlement::Deferred {
                work: item.work.claim_only(),
                wait: Duration::from_millis(200),
                why: "waits for the event that says whether it expired or was deleted",
            });
            item.state = State::Done;
            continue;
        }
        let local = item
            .local
            .as_deref()
            .map(|d| strip(d, &settings.sync_fields));
        let there = item
            .remote
            .as_deref()
            .map(|d| strip(d, &settings.sync_fields));
        let base = item.work.base.as_deref();
        let remote = if item.remote_known {
            there.as_deref()
        } else {
            base
        };
        let base = match item.work.left {
            // Nobody's deletion (R15): left alone, unless the other side has changed since; then it is new here.
            Some(Side::Local) if local.is_none() && remote == base => {
                settlements.push(Settlement::left(&item.work));
                item.state = State::Done;
                continue;
            }
            Some(Side::Remote)
                if item.remote_known && remote.is_none() && local.as_deref() == base =>
            {
                settlements.push(Settlement::left(&item.work));
                item.state = State::Done;
                continue;
            }
            Some(Side::Local) if local.is_none() => None,
            Some(Side::Remote) if item.remote_known && remote.is_none() => None,
            _ => base,
        };
        let view = View {
            local: local.as_deref(),
            base,
            remote,
        };
        let rules = Rules {
            policy: settings.policy(&item.ns.coll),
            updated_at: &settings.config.fields.updated_at,
            skew_ms: shared.skew_ms(),
            first_sync: first_sync.contains(&item.ns.number),
            fields: settings.config.sync.rules.get(&item.ns.coll),
            base_may_lag: settings.base_may_lag(),
        };
        let mut decision = decide::decide(view, rules);
        if shared.failpoints.mutated("lww_silent")
            && let Decision::Hold(_)
            | Decision::Settle(_, Some(_))
            | Decision::Settle(Target::Merged(_), _) = decision
        {
            decision = Decision::Settle(Target::Local, None);
        }
        match decision {
            Decision::Agree => {
                let base = (local.as_deref() != item.work.base.as_deref())
                    .then(|| local.as_deref().map(<[u8]>::to_vec));
                let unstamped = item
                    .local
                    .as_deref()
                    .is_some_and(|d| is_unstamped(d, settings));
                let settlement = Settlement::Agreed {
                    work: item.work.claim_only(),
                    base,
                    close: item.remote_known,
                    stamp: unstamped && item.work.outbox.is_some(),
                };
                settlements.push(settlement);
                item.state = State::Done;
            }
            // It may be over before this daemon has to put it on record.
            Decision::Hold(_) if withheld => {}
            Decision::Hold(clash) => {
                let found = found(item, &clash);
                settlements.push(Settlement::Held {
                    work: item.work.claim_only(),
                    found: Box::new(found),
                });
                item.state = State::Done;
            }
            Decision::Settle(target, clash) => {
                let next = plan((i, item), (target, clash), view, &settings.sync_fields);
                planned.push(next);
            }
        }
    }
    settle::commit(shared, settlements).await?;
    Ok(planned)
}

fn is_unstamped(doc: &[u8], settings: &Settings) -> bool {
    settings.config.sync.stamp_documents
        && raw::get(doc, settings.config.fields.sync_status.as_bytes())
            .is_some_and(|e| raw::text(&e) != Some("synced"))
}

/// The record of a clash, from the documents as read.
fn found(item: &Item, clash: &Clash) -> Found {
    let with_id = |d: &Option<Vec<u8>>| d.as_ref().map(|d| (item.work.id.clone(), d.clone()));
    let notes = match clash.kind {
        decide::Kind::DeleteUpdate => {
            "one side deleted the document, the other changed it".to_owned()
        }
        decide::Kind::InsertInsert => {
            "both sides created this _id with different content".to_owned()
        }
        _ => format!(
            "both sides changed {}",
            if clash.fields.is_empty() {
                "it"
            } else {
                "the same field"
            }
        ),
    };
    Found {
        key: item.work.key.clone(),
        kind: clash.kind,
        collection: item.ns.shown.clone(),
        local: with_id(&item.local),
        remote: with_id(&item.remote),
        base: item.work.base.clone(),
        fields: clash.fields.clone(),
        other: None,
        notes,
        sync_fields: item.ns.sync_fields.clone(),
    }
}

/// The next write towards the target. A merge is written to the remote first; base then becomes the
/// local content, so that the rest is a plain pull even after a crash.
fn plan(
    (index, item): (usize, &Item),
    (target, clash): (Target, Option<Clash>),
    view: View<'_>,
    sync_fields: &[String],
) -> Planned {
    let own = |content: Option<&[u8]>| content.map(<[u8]>::to_vec);
    let (side, expect, new, then) = match target {
        Target::Local => (Side::Remote, view.remote, own(view.local), Then::Written),
        Target::Remote => (Side::Local, view.local, own(view.remote), Then::Written),
        Target::Merged(merged) => {
            let then = Then::Base(own(view.local));
            (Side::Remote, view.remote, Some(merged), then)
        }
    };
    let write = Write {
        key: item.work.key.clone(),
        id: item.work.id.clone(),
        expect: own(expect),
        new,
    };
    let form = guard::form(&write, sync_fields);
    Planned {
        item: index,
        side,
        write,
        form,
        then,
        clash,
        receipt: None,
    }
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
    let (planned, together) = transaction::groups(shared, settings, items, planned).await?;
    let mut groups: HashMap<(Side, u32), Vec<Planned>> = HashMap::new();
    for p in planned {
        groups
            .entry((p.side, items[p.item].ns.number))
            .or_default()
            .push(p);
    }
    let groups: Vec<_> = groups.into_values().collect();
    let (tickets, entries) =
        settle::put_intents(shared, settings, items, &groups, &together).await?;
    // Nothing may be sent that another daemon could not go on with.
    let unsent = journal::announce(shared, entries).await.err();
    shared.failpoints.crash("before_write");
    let mut failed = transaction::send(shared, settings, items, together, unsent.as_ref()).await?;
    for (group, ticket) in groups.into_iter().zip(tickets) {
        let side = group[0].side;
        let ns = items[group[0].item].ns.clone();
        let endpoint = shared.endpoint(side)?;
        let writes: Vec<_> = group.iter().map(|p| (&p.write, &p.form)).collect();
        let stamp = shared.stamp_for(settings, side);
        let writes_of = group.iter().map(|p| (&p.write, &p.form));
        shared.echoes.sent(side, writes_of);
        let outcome = match &unsent {
            Some(failure) => Outcome::unsent(writes.len(), failure.clone()),
            None => {
                let names = (ns.db.as_str(), ns.coll.as_str());
                guard::write(&endpoint, names, &writes, &settings.sync_fields, stamp).await
            }
        };
        shared.failpoints.crash("after_write_before_ack");
        if shared.failpoints.mutated("clear_noseq") {
            // The mutation matters to an edit that comes in while the answer is on its way.
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        let failure = outcome.failure.clone();
        if let Some(failure) = &failure {
            tracing::debug!(collection = ns.shown, %failure, "a write has no answer");
        }
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
        settle::verdicts(shared, settings, items, group, outcome.verdicts, ticket).await?;
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
    tokio::time::sleep(Duration::from_millis(150)).await;
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

/// Puts a rejected document on record, for [`settle`].
pub(crate) fn rejected(item: &Item, side: Side, code: i32, message: &str) -> Found {
    let mut found = found(
        item,
        &Clash {
            kind: decide::Kind::Rejected,
            fields: vec![],
        },
    );
    found.notes = format!(
        "the {} database refuses the document: {message} (code {code})",
        side.name()
    );
    found
}

/// The record of a clash that the policy settled.
pub(crate) fn overruled(item: &Item, clash: &Clash) -> Found {
    found(item, clash)
}
