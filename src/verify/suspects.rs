//! Documents that seemed to differ, looked at again.

use std::sync::Arc;
use std::time::Duration;

use crate::content::strip;
use crate::decide::{self, Decision, Rules, Side, Target, View};
use crate::expiry;
use crate::extent::Extent;
use crate::failure::{Failure, Reason};
use crate::key::{Id, Key, KeyMap};
use crate::settle::store_failed;
use crate::shared::{Settings, Shared, lock};
use crate::store::base::{self, digest};
use crate::store::differences::{Standing, Verdict, standing};
use crate::tail;

/// Suspects looked at together.
pub(super) const PAGE: u32 = 5000;

/// Documents read at once.
const CHUNK: usize = 200;

/// Looks at most; a document that is still on the move then is counted as waiting.
const LOOKS: u32 = 8;

/// How long the streams may take to come to what was just read.
const PATIENCE: Duration = Duration::from_secs(30);

/// What both sides held at a look.
type Pair = (Option<[u8; 32]>, Option<[u8; 32]>);

struct Look {
    pair: Pair,
    repair: &'static str,
    /// One side let go of it by itself.
    expired: bool,
}

/// What became of each suspect. A difference is one when both sides hold what they held at the look
/// before, the streams have passed that look, and no queue knows of the document.
pub(super) async fn judge(
    shared: &Arc<Shared>,
    extent: &Extent,
    page: Vec<(Key, Id)>,
) -> Result<Vec<Verdict>, Failure> {
    let settings = shared.settings();
    let mut open: KeyMap<(Id, Option<Pair>)> = page
        .into_iter()
        .map(|(key, id)| (key, (id, None)))
        .collect();
    let mut verdicts = Vec::new();
    for look in 0..LOOKS {
        if open.is_empty() {
            break;
        }
        caught_up(shared).await?;
        let keys: Vec<Key> = open.keys().cloned().collect();
        let standings = standings(shared, keys).await?;
        let seen = read(shared, &settings, extent, &open).await?;
        for (key, now) in seen {
            let Some((id, before)) = open.get_mut(&key) else {
                continue;
            };
            let standing = standings.get(&key).copied().unwrap_or(Standing::Queued);
            let kind = match (standing, now.pair) {
                (_, (local, remote)) if local == remote => "equal",
                (Standing::Conflict, _) => "conflict",
                (Standing::Failed, _) => "failed",
                (Standing::Idle, _) if now.expired => "expired",
                (Standing::Idle, pair) if *before == Some(pair) => match pair {
                    (Some(_), None) => "only_local",
                    (None, _) => "only_remote",
                    _ => "different",
                },
                // It moves, or is about to.
                (_, pair) => {
                    *before = Some(pair);
                    continue;
                }
            };
            verdicts.push(Verdict {
                key: key.clone(),
                id: id.clone(),
                kind: kind.into(),
                repair: now.repair.into(),
            });
            open.remove(&key);
        }
        if shared.may_work() {
            tokio::time::sleep(Duration::from_millis(100) * look).await;
        }
    }
    verdicts.extend(open.into_iter().map(|(key, (id, _))| Verdict {
        key,
        id,
        kind: "waiting".into(),
        repair: String::new(),
    }));
    Ok(verdicts)
}

async fn caught_up(shared: &Shared) -> Result<(), Failure> {
    let local = tail::catch_up(shared, Side::Local, PATIENCE);
    let there = if shared.follows() {
        let remote = tail::catch_up(shared, Side::Remote, PATIENCE);
        let (local, remote) = tokio::join!(local, remote);
        local && remote
    } else {
        local.await
    };
    there
        .then_some(())
        .ok_or_else(|| Failure::offline(Reason::Timeout))
}

async fn standings(shared: &Arc<Shared>, keys: Vec<Key>) -> Result<KeyMap<Standing>, Failure> {
    let context = shared.clone();
    let found = shared.store.call(move |c| {
        let mut found = KeyMap::with_capacity_and_hasher(keys.len(), Default::default());
        for key in keys {
            let busy = lock(&context.busy).contains(&key);
            let standing = match standing(c, &key)? {
                Standing::Idle if busy => Standing::Queued,
                other => other,
            };
            found.insert(key, standing);
        }
        Ok(found)
    });
    found.await.map_err(store_failed)
}

/// Reads the suspects on both sides: what they hold, and what a repair would do.
async fn read(
    shared: &Arc<Shared>,
    settings: &Settings,
    extent: &Extent,
    open: &KeyMap<(Id, Option<Pair>)>,
) -> Result<Vec<(Key, Look)>, Failure> {
    let all: Vec<(&Key, &Id)> = open.iter().map(|(key, (id, _))| (key, id)).collect();
    let mut found = Vec::with_capacity(all.len());
    for chunk in all.chunks(CHUNK) {
        let (here, there) = extent.read(shared, chunk.iter().map(|(_, id)| *id)).await?;
        let keys: Vec<Key> = chunk.iter().map(|(key, _)| (*key).clone()).collect();
        let bases = shared.store.call(move |c| {
            keys.into_iter()
                .map(|key| Ok((base::get_marked(c, &key)?, key)))
                .collect::<rusqlite::Result<Vec<_>>>()
        });
        for ((base, left), key) in bases.await.map_err(store_failed)? {
            let content =
                |d: Option<&Vec<u8>>| d.map(|d| strip(d, &settings.sync_fields).into_owned());
            let (local, remote) = (content(here.get(&key)), content(there.get(&key)));
            let view = View {
                local: local.as_deref(),
                base: base.as_deref(),
                remote: remote.as_deref(),
            };
            let look = Look {
                expired: expiry::is_at_rest(left, view),
                pair: (local.as_deref().map(digest), remote.as_deref().map(digest)),
                repair: repair(view, rules(shared, settings, &extent.coll)),
            };
            found.push((key, look));
        }
    }
    Ok(found)
}

/// The rules by which a document of the collection is decided now.
pub(crate) fn rules<'a>(shared: &Shared, settings: &'a Settings, coll: &str) -> Rules<'a> {
    Rules {
        policy: settings.policy(coll),
        updated_at: &settings.config.fields.updated_at,
        skew_ms: shared.skew_ms(),
        first_sync: false,
        fields: settings.config.sync.rules.get(coll),
        base_may_lag: settings.base_may_lag(),
    }
}

fn repair(view: View<'_>, rules: Rules<'_>) -> &'static str {
    match decide::decide(view, rules) {
        Decision::Agree => "none",
        Decision::Hold(_) => "conflict",
        Decision::Settle(Target::Merged(_), _) => "merge",
        Decision::Settle(Target::Local, _) if view.local.is_some() => "push",
        Decision::Settle(Target::Local, _) => "delete_remote",
        Decision::Settle(Target::Remote, _) if view.remote.is_some() => "pull",
        Decision::Settle(Target::Remote, _) => "delete_local",
    }
}
