//! Resolving many conflicts: by filter, and by the rules of `auto-resolve`.
//!
//! Open conflicts are taken from the store in pages, a few at a time, so that ten thousand of them
//! need no more memory than ten. Whoever wants to see how far it is takes them in slices, by `max`
//! and `after`; what is left open does not come up again then.

use std::sync::Arc;
use std::time::Duration;

use bson::oid::ObjectId;
use chrono::Utc;
use futures::StreamExt as _;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::advice::Facts;
use crate::command::CommandError;
use crate::decide::{Kind, Side};
use crate::resolution::{Auto, Strategy, automatic, created_at};
use crate::resolve::{Request, look, resolve};
use crate::ruling;
use crate::shared::Shared;
use crate::store::cases;
use crate::trial::Place;
use crate::view;

/// Conflicts at work at a time: enough to hide a round trip to the remote.
const AT_ONCE: usize = 8;

/// Conflicts taken from the store together.
const PAGE: usize = 200;

/// Most results told one by one; the counts cover all.
const TOLD: usize = 1000;

/// Which open conflicts, and how many of them at most.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only of this collection.
    pub collection: Option<String>,
    /// Only of this kind.
    pub kind: Option<Kind>,
    /// At most so many.
    pub max: Option<u64>,
    /// Only those behind this one, in the order of their ids.
    pub after: Option<ObjectId>,
}

/// What became of one conflict.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct One {
    /// The conflict.
    pub conflict_id: String,
    /// `resolved`, `skipped` (a person has to decide) or `failed`.
    pub outcome: String,
    /// The strategy used, if any.
    pub strategy: Option<String>,
    /// What was done, or why not.
    pub message: String,
}

/// What became of many.
#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Many {
    /// Settled now.
    pub resolved: u64,
    /// Left for a person.
    pub skipped: u64,
    /// Tried in vain.
    pub failed: u64,
    /// One by one, the first thousand.
    pub results: Vec<One>,
    /// `after` for going on, if `max` ended it before the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

impl Many {
    fn add(&mut self, one: One) {
        match one.outcome.as_str() {
            "resolved" => self.resolved += 1,
            "skipped" => self.skipped += 1,
            _ => self.failed += 1,
        }
        if self.results.len() < TOLD {
            self.results.push(one);
        }
    }
}

/// What is to be done with each.
#[derive(Clone, Debug)]
pub enum How {
    /// What a person says.
    By(Request),
    /// By the rules of `auto-resolve`, in the name of someone.
    Auto(String),
}

/// Resolves all that are selected.
pub async fn resolve_many(
    shared: &Arc<Shared>,
    selection: Selection,
    how: How,
) -> Result<Many, CommandError> {
    if shared.settings().config.remote_uri.is_none() {
        return Err(CommandError::NotConfigured);
    }
    shared.endpoint(Side::Remote)?;
    if !shared.link.is_online() {
        let reason = shared.link.snapshot().reason;
        let reason = reason.unwrap_or(crate::failure::Reason::Offline);
        return Err(CommandError::Offline(reason.message().into()));
    }
    let namespaces = match &selection.collection {
        Some(name) => {
            let (db, coll) = shared.settings().names_of(name);
            Some(vec![shared.store.namespace(&db, &coll).await?])
        }
        None => None,
    };
    let mut many = Many::default();
    let mut left = selection.max.unwrap_or(u64::MAX);
    let mut after = selection.after.map_or(vec![], |id| id.bytes().to_vec());
    while left > 0 {
        let limit = PAGE.min(usize::try_from(left).unwrap_or(PAGE));
        let (from, wanted, kind) = (after.clone(), namespaces.clone(), selection.kind);
        let page = shared
            .store
            .call(move |c| cases::page(c, &from, kind.map(Kind::name), wanted.as_deref(), limit))
            .await?;
        let Some(last) = page.last() else { break };
        after = last.to_vec();
        left -= page.len() as u64;
        if left == 0 {
            many.next = Some(ObjectId::from_bytes(*last).to_hex());
        }
        let mut done = futures::stream::iter(page)
            .map(|id| {
                let (shared, how) = (shared.clone(), how.clone());
                tokio::spawn(async move { one(&shared, ObjectId::from_bytes(id), how).await })
            })
            .buffer_unordered(AT_ONCE);
        while let Some(outcome) = done.next().await {
            match outcome {
                Ok(one) => many.add(one?),
                Err(e) => return Err(CommandError::Failed(e.to_string())),
            }
        }
    }
    Ok(many)
}

/// One of many. Only what concerns all of them is an error: no link, no store.
async fn one(shared: &Arc<Shared>, id: ObjectId, how: How) -> Result<One, CommandError> {
    let outcome = match how {
        How::By(request) => by(shared, id, request).await,
        How::Auto(who) => auto(shared, id, &who).await,
    };
    let (outcome, strategy, message) = match outcome {
        Ok(done) => done,
        Err(
            error @ (CommandError::Offline(_)
            | CommandError::LocalAway(_)
            | CommandError::Failed(_)),
        ) => return Err(error),
        Err(error) => ("failed", None, error.to_string()),
    };
    Ok(One {
        conflict_id: id.to_hex(),
        outcome: outcome.into(),
        strategy: strategy.map(|s: Strategy| s.name().into()),
        message,
    })
}

type Done = (&'static str, Option<Strategy>, String);

async fn by(
    shared: &Arc<Shared>,
    id: ObjectId,
    mut request: Request,
) -> Result<Done, CommandError> {
    let strategy = request.strategy;
    if strategy == Strategy::RenameLocal && request.value.is_none() {
        let Some(sight) = look(shared, id.bytes(), false).await? else {
            return Ok(("skipped", None, "it is not open any more".into()));
        };
        let advice = view::free_advice(shared, &sight).await?;
        request.value = advice.into_iter().find_map(|a| a.value).map(Json::String);
    }
    let done = resolve(shared, id, request, false).await?;
    Ok(("resolved", Some(strategy), done.message))
}

async fn auto(shared: &Arc<Shared>, id: ObjectId, who: &str) -> Result<Done, CommandError> {
    let Some(sight) = look(shared, id.bytes(), false).await? else {
        return Ok(("skipped", None, "it is not open any more".into()));
    };
    let settings = shared.settings();
    let [local, remote] = sight.whole.each_ref().map(Option::as_deref);
    let hex = id.to_hex();
    let facts = Facts {
        id: &hex,
        kind: sight.kind,
        fields: &sight.case.fields,
        local,
        remote,
        lost: None,
        updated_at: &settings.config.fields.updated_at,
        skew_ms: shared.skew_ms(),
        attempt: 0,
    };
    let now = Utc::now().timestamp_millis() + shared.offset(Side::Local);
    let age = local
        .and_then(created_at)
        .map(|at| Duration::from_millis(u64::try_from(now.saturating_sub(at)).unwrap_or(0)));
    let blocked = match &sight.mine.local {
        Some(doc) if sight.kind == Kind::UniqueField => {
            let place = Place {
                endpoint: &shared.endpoint(Side::Remote)?,
                ns: &sight.ns,
            };
            place
                .is_taken(&sight.case.fields, doc, &sight.mine.id)
                .await?
        }
        _ => true,
    };
    let (strategy, why) = match automatic(sight.kind, age, blocked, facts.newest()) {
        Auto::Skip(why) => return Ok(("skipped", None, why.into())),
        Auto::Retry => {
            let keys: Vec<_> = std::iter::once(&sight.mine)
                .chain(&sight.theirs)
                .map(|v| (v.key.clone(), v.id.clone()))
                .collect();
            shared
                .store
                .call(move |c| ruling::look_again(c, &keys))
                .await?;
            shared.wake.notify_one();
            return Ok((
                "resolved",
                None,
                "nothing is in the way any more; it is tried again".into(),
            ));
        }
        Auto::Rename(why) => (Strategy::RenameLocal, why),
        Auto::KeepRemote(why) => (Strategy::KeepRemote, why),
    };
    let request = Request {
        strategy,
        value: None,
        notes: Some(format!("auto-resolve: {why}")),
        version: Some(crate::conflicts::version_text(sight.version)),
        who: who.to_owned(),
        dry_run: false,
    };
    if strategy == Strategy::RenameLocal && facts.suggestion().is_none() {
        let why = "the value is no text, so no free one can be made up".to_owned();
        return Ok(("skipped", None, why));
    }
    let (outcome, strategy, message) = by(shared, id, request).await?;
    Ok((outcome, strategy, format!("{why}: {message}")))
}
