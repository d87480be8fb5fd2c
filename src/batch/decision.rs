//! What to do with each document of a batch that was read.

use std::borrow::Cow;
use std::sync::Arc;

use tokio::time::Instant;

use super::{Item, Planned, State};
use crate::conflicts::Found;
use crate::content::{self, strip};
use crate::decide::{self, Clash, Decision, Rules, Side, Target, View};
use crate::failure::Failure;
use crate::guard::{self, Write};
use crate::raw;
use crate::settle::{self, Settlement};
use crate::shared::{Settings, Shared, lock};
use crate::store::base::{Intent, digest};

/// Decides every item that was read, stores what needs no write and the intents of what does.
pub(super) async fn decide_all(
    shared: &Arc<Shared>,
    settings: &Settings,
    items: &mut [Item],
) -> Result<Vec<Planned>, Failure> {
    let mut settlements: Vec<Settlement> = Vec::new();
    let mut planned = Vec::new();
    let first_sync = lock(&shared.first_sync).clone();
    for (i, item) in items.iter_mut().enumerate() {
        if item.state != State::Look || !settle_intent(shared, settings, item, &mut settlements) {
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

/// A write of ours that may have happened is decided before anything else (R3). `false`: not now.
fn settle_intent(
    shared: &Shared,
    settings: &Settings,
    item: &mut Item,
    settlements: &mut Vec<Settlement>,
) -> bool {
    let Some(mut intent) = item.work.intent.take() else {
        return true;
    };
    let actual = match intent.side {
        Side::Local => item.local.as_deref(),
        Side::Remote => item.remote.as_deref(),
    };
    let actual = actual.map(|d| strip(d, &settings.sync_fields));
    if landed(&intent, actual.as_deref()) {
        if intent.digest.is_some() {
            intent.base_after = actual.map(Cow::into_owned);
        }
        item.work.base = intent.base_after.clone();
        item.work.left = None;
        settlements.push(Settlement::Landed {
            work: item.work.claim_only(),
            intent,
        });
        return true;
    }
    if let Some(until) = shared.late_until(&item.work.key, &intent) {
        // It may still happen: deciding now could take our own write for somebody else's edit (R4).
        let wait = until.saturating_duration_since(Instant::now().into_std());
        settlements.push(Settlement::Deferred {
            work: item.work.claim_only(),
            wait,
        });
        item.work.intent = Some(intent);
        item.state = State::Done;
        return false;
    }
    settlements.push(Settlement::NotLanded {
        key: item.work.key.clone(),
        now: actual.map(Cow::into_owned),
    });
    true
}

/// Whether a side holds what the intent wrote: all of it, or at least its fields, since others may
/// have changed further ones.
pub(crate) fn landed(intent: &Intent, actual: Option<&[u8]>) -> bool {
    if let Some(wanted) = &intent.digest {
        return actual.is_some_and(|a| digest(a) == *wanted);
    }
    if actual == intent.new.as_deref() {
        return true;
    }
    match (&intent.fields, actual, &intent.new) {
        (Some(fields), Some(actual), Some(new)) => {
            content::agree_on(actual, new, fields.iter().map(Vec::as_slice))
        }
        _ => false,
    }
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
    let (side, expect, new, last) = match target {
        Target::Local => (Side::Remote, view.remote, own(view.local), true),
        Target::Remote => (Side::Local, view.local, own(view.remote), true),
        Target::Merged(merged) => (Side::Remote, view.remote, Some(merged), false),
    };
    let base_after = if last { new.clone() } else { own(view.local) };
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
        base_after,
        last,
        clash,
    }
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
