//! Intents: writes of ours that may have happened, and whether they did (R3).

use std::borrow::Cow;
use std::time::Duration;

use tokio::time::Instant;

use super::{Item, Planned, State};
use crate::content::{self, strip};
use crate::decide::Side;
use crate::expiry;
use crate::settle::Settlement;
use crate::shared::{Settings, Shared};
use crate::store::intents::{Intent, digest};

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
            // With a receipt it may have happened and be edited since: base is what was written.
            (None, Some(new)) if self.is_last() && self.receipt.is_none() => Some(digest(new)),
            _ => None,
        };
        let unless_told = |body: Option<&[u8]>| match digest {
            Some(_) => None,
            None => body.map(<[u8]>::to_vec),
        };
        Intent {
            side: self.side,
            new: unless_told(self.write.new.as_deref()),
            digest,
            base_after: unless_told(self.base_after()),
            fields: self.form.fields().and_then(telling),
            epoch,
            receipt: self.receipt,
        }
    }

    /// The same with the whole content, for a daemon that has nothing else.
    pub(crate) fn whole_intent(&self, epoch: i64, updated_at: &str) -> Intent {
        let mut intent = self.intent(epoch, updated_at);
        if intent.digest.take().is_some() {
            intent.new.clone_from(&self.write.new);
            intent.base_after.clone_from(&self.write.new);
        }
        intent
    }
}

/// A write of ours that may have happened is decided before anything else (R3). `false`: not now.
pub(super) fn settle_intent(
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
    let happened = match (intent.receipt, item.happened) {
        (Some(_), Some(happened)) => happened,
        _ => landed(&intent, actual.as_deref()),
    };
    if happened && gone(item).is_some_and(|side| !knows_how_documents_vanish(shared, side)) {
        // Right after the start; else what went by itself would be deleted on the other side as well (R15).
        settlements.push(Settlement::Deferred {
            work: item.work.claim_only(),
            wait: Duration::from_millis(200),
            why: "waits until it is known whether documents of its collection expire",
        });
        item.work.intent = Some(intent);
        item.state = State::Done;
        return false;
    }
    if happened {
        if intent.digest.is_some() {
            intent.base_after = actual.map(Cow::into_owned);
        }
        item.work.base = intent.base_after.clone();
        item.work.left = went_by_itself(shared, item);
        settlements.push(Settlement::Landed {
            work: item.work.claim_only(),
            intent,
            left: item.work.left,
            due: [Side::Local, Side::Remote]
                .into_iter()
                .filter(|side| is_due(shared, item, *side))
                .collect(),
        });
        return true;
    }
    if let Some(until) = shared.late_until(&item.work.key, &intent) {
        // It may still happen: deciding now could take our own write for somebody else's edit (R4).
        let wait = until.saturating_duration_since(Instant::now().into_std());
        settlements.push(Settlement::Deferred {
            work: item.work.claim_only(),
            wait,
            why: "waits until a lost answer can't matter any more",
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

/// The side that has let go of a document by itself while it was not known whether the document had
/// arrived: its event came too early to be told from a deletion (R15). Judged by the present time.
fn went_by_itself(shared: &Shared, item: &Item) -> Option<Side> {
    gone(item).filter(|side| is_due(shared, item, *side))
}

/// Whether a side lets go of a document with the content of base by itself by now.
fn is_due(shared: &Shared, item: &Item, side: Side) -> bool {
    let volatile = shared.schema.volatile(side, item.work.key.ns());
    let (Some(base), Some(volatile)) = (item.work.base.as_deref(), volatile) else {
        return false;
    };
    let now = chrono::Utc::now().timestamp_millis() + shared.offset(side);
    expiry::goes_by_itself(&volatile, base, now)
}

/// How long the event of a deletion is waited for, in ms: it is on its way.
const EVENT: i64 = 60_000;

/// Whether a document that is due has gone from a side of which no event has told that yet, or told after
/// this claim: only the event says whether it went by itself (R15).
pub(super) fn may_have_expired(shared: &Shared, item: &Item) -> bool {
    let row = match gone(item) {
        Some(Side::Local) => &item.work.outbox,
        Some(Side::Remote) if shared.follows() => &item.work.inbox,
        _ => return false,
    };
    let (outbox, inbox) = (item.work.outbox.as_ref(), item.work.inbox.as_ref());
    let since = outbox.or(inbox).map_or(0, |row| row.at);
    let is_young = chrono::Utc::now().timestamp_millis() - since < EVENT;
    row.is_none() && is_young && item.work.left.is_none() && went_by_itself(shared, item).is_some()
}

/// The side that alone does not have the document.
fn gone(item: &Item) -> Option<Side> {
    match (&item.local, &item.remote) {
        (None, Some(_)) => Some(Side::Local),
        (Some(_), None) if item.remote_known => Some(Side::Remote),
        _ => None,
    }
}

/// Whether it is known which documents of a side vanish by themselves: that is learned before its stream
/// is opened.
fn knows_how_documents_vanish(shared: &Shared, side: Side) -> bool {
    shared.streams_open(side) || side == Side::Remote && !shared.follows()
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
