//! Resolving: a person's (or `auto-resolve`'s) decision, checked, then carried out as a ruling.
//!
//! The documents are taken out of the worker's reach, read on both sides, and compared with what was
//! last shown of the conflict. If they changed since, nothing is written and the answer has the new
//! state. Values are tried out before anything is written: taken on either side? passes the validators?

use std::sync::Arc;
use std::time::Duration;

use bson::doc;
use bson::oid::ObjectId;
use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::command::CommandError;
use crate::conflicts::{self, put_result};
use crate::content::strip;
use crate::decide::{Kind, Rules, Side};
use crate::guard::Duplicate;
use crate::key::{Id, Key};
use crate::raw::Writer;
use crate::resolution::{Case, Plan, Refusal, Strategy, Versions};
use crate::ruling::{self, Ending, Ruling, Taken};
use crate::shared::{Settings, Shared};
use crate::store::cases;
use crate::store::{base, queue};
use crate::trial;
use crate::value;
use crate::view;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// How.
    pub strategy: Strategy,
    /// A new value for the field in conflict.
    pub value: Option<Json>,
    /// A person's words, for the record.
    pub notes: Option<String>,
    /// The version that was looked at; without it, the one that was last shown to anyone counts.
    pub version: Option<String>,
    /// Who decides.
    pub who: String,
    /// Only say what would happen.
    pub dry_run: bool,
}

/// What came of it.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Resolution {
    /// It is done (or, with a dry run, it would be).
    pub success: bool,
    /// What was done, for a person.
    pub message: String,
    /// The conflict.
    pub conflict_id: String,
    /// The strategy that settled it.
    pub strategy: String,
    /// Who decided.
    pub resolved_by: String,
    /// When; not with a dry run.
    pub resolved_at: Option<DateTime<Utc>>,
    /// Nothing was written.
    pub dry_run: bool,
    /// Whether both sides are equal already; else the rest follows by itself.
    pub settled: bool,
    /// The documents afterwards: `document`, and `otherDocument` for the one in the way.
    #[schema(value_type = Object)]
    pub result: Json,
}

/// An open conflict between documents, with the documents as they are now.
pub struct Sight {
    /// From the store.
    pub case: cases::Case,
    /// What kind.
    pub kind: Kind,
    /// Collection as shown.
    pub collection: String,
    /// Database and collection.
    pub ns: (String, String),
    /// The document of the local side.
    pub mine: Versions,
    /// The one in the way.
    pub theirs: Option<Versions>,
    /// Whole, sync fields and all: what the local side has of `mine`, the remote of the document in
    /// conflict with it.
    pub whole: [Option<Vec<u8>>; 2],
    /// Version of the two.
    pub version: i64,
    taken: Option<Taken>,
}

impl Sight {
    /// For the pure part.
    pub fn as_case<'a>(&'a self, settings: &'a Settings, skew_ms: i64) -> Case<'a> {
        Case {
            kind: self.kind,
            fields: &self.case.fields,
            mine: &self.mine,
            theirs: self.theirs.as_ref(),
            rules: Rules {
                policy: settings.policy(&self.ns.1),
                updated_at: &settings.config.fields.updated_at,
                skew_ms,
                first_sync: false,
                fields: settings.config.sync.rules.get(&self.ns.1),
                base_may_lag: settings.base_may_lag(),
            },
        }
    }

    fn keys(&self) -> Vec<(Key, Id)> {
        std::iter::once(&self.mine)
            .chain(&self.theirs)
            .map(|v| (v.key.clone(), v.id.clone()))
            .collect()
    }
}

/// The kind of that name.
pub fn kind_named(name: &str) -> Option<Kind> {
    serde_json::from_value(Json::String(name.to_owned())).ok()
}

/// Looks at an open conflict; `take`: and keeps the worker off its documents. `None`: it is not open
/// (or not between documents).
pub async fn look(
    shared: &Arc<Shared>,
    id: [u8; 12],
    take: bool,
) -> Result<Option<Sight>, CommandError> {
    let settings = shared.settings();
    let Some((case, kind, keys)) = shared.store.call(move |c| cases::get(c, &id)).await? else {
        return Ok(None);
    };
    let (Some(kind), Some(ns)) = (kind_named(&kind), keys.first().map(Key::ns)) else {
        return Ok(None);
    };
    let Some(names) = shared.store.namespace_name(ns) else {
        return Ok(None);
    };
    let Some(mine) = case.local.clone().or_else(|| case.remote.clone()) else {
        return Ok(None);
    };
    let theirs = case.remote.clone().filter(|_| kind == Kind::UniqueField);
    let all: Vec<Id> = std::iter::once(mine.clone())
        .chain(theirs.clone())
        .collect();
    let of = |id: &Id| Key::new(ns, id);
    let taken = if take {
        let keys: Vec<Key> = all.iter().map(of).collect();
        let Some(taken) = Taken::take(shared, &keys).await else {
            return Err(CommandError::Refused(
                "the document is being worked on; try again in a moment".into(),
            ));
        };
        Some(taken)
    } else {
        None
    };
    let remote = shared.endpoint(Side::Remote)?;
    let (db, coll) = (&names.0, &names.1);
    let (local, there) = tokio::join!(
        shared.local.read(db, coll, ns, all.iter()),
        remote.read(db, coll, ns, all.iter())
    );
    shared.note(Side::Remote, &there);
    let (mut local, mut there) = (local?, there?);
    let keys: Vec<Key> = all.iter().map(of).collect();
    let bases = shared.store.call(move |c| {
        keys.iter()
            .map(|k| base::get(c, k))
            .collect::<rusqlite::Result<Vec<_>>>()
    });
    let bases = bases.await?;
    let content = |d: Option<&Vec<u8>>| d.map(|d| strip(d, &settings.sync_fields).into_owned());
    let versions = |id: &Id, base: &Option<Vec<u8>>| Versions {
        key: of(id),
        id: id.clone(),
        local: content(local.get(&of(id))),
        base: base.clone(),
        remote: content(there.get(&of(id))),
    };
    let first = versions(&mine, &bases[0]);
    let second = theirs.as_ref().map(|id| versions(id, &bases[1]));
    let whole = [
        local.remove(&of(&mine)),
        there.remove(&of(theirs.as_ref().unwrap_or(&mine))),
    ];
    let [l, r] = whole.each_ref().map(Option::as_deref);
    Ok(Some(Sight {
        version: conflicts::version(l, r, &settings.sync_fields),
        collection: settings.display(db, coll),
        ns: names,
        case,
        kind,
        mine: first,
        theirs: second,
        whole,
        taken,
    }))
}

/// Resolves one conflict. `wait`: until both sides are equal, for a few seconds.
pub async fn resolve(
    shared: &Arc<Shared>,
    id: ObjectId,
    request: Request,
    wait: bool,
) -> Result<Resolution, CommandError> {
    if shared.settings().config.remote_uri.is_none() {
        return Err(CommandError::NotConfigured);
    }
    let halts = shared.store.call(crate::halt::all).await?;
    if let Some((ns, halt)) = halts.into_iter().find(|(_, h)| h.conflict == id) {
        return crate::lift::resolve(shared, (ns, halt), request).await;
    }
    let Some(mut sight) = look(shared, id.bytes(), true).await? else {
        return not_open(shared, id, &request).await;
    };
    let settings = shared.settings();
    check_version(shared, &sight, &request).await?;
    let case = sight.as_case(&settings, shared.skew_ms());
    if case.is_over() {
        free(shared, &sight).await?;
        return Err(CommandError::Refused(
            "there is nothing left to resolve: both sides agree again, and the conflict closes by itself".into(),
        ));
    }
    let plan = case
        .plan(request.strategy, request.value.as_ref())
        .map_err(|refusal| match refusal {
            Refusal::Unfit(text) | Refusal::Value(text) => CommandError::BadRequest(text),
        })?;
    trial::check(shared, &settings, &sight, &plan).await?;
    let answer = answer(&sight, &plan, &request);
    if request.dry_run {
        return Ok(answer);
    }
    let ruling = Ruling {
        id: id.bytes(),
        steps: plan.steps.clone(),
        at: 0,
        look: sight.keys(),
        records: vec![(id.bytes(), record(&sight, &plan, &request))],
        epoch: 0,
    };
    let Some(taken) = sight.taken.take() else {
        return Err(CommandError::Failed("the documents were not taken".into()));
    };
    let keys = ruling.look.clone();
    let ending = ruling::begin(shared, ruling, taken).await?;
    after(shared, &sight, ending).await?;
    tracing::info!(
        conflict = %id, kind = sight.kind.name(), collection = sight.collection,
        strategy = request.strategy.name(), by = request.who, "conflict resolved"
    );
    let settled = wait && settled(shared, &keys).await?;
    Ok(Resolution { settled, ..answer })
}

/// The error of a ruling that did not end well.
async fn after(shared: &Arc<Shared>, sight: &Sight, ending: Ending) -> Result<(), CommandError> {
    match ending {
        Ending::Done => Ok(()),
        Ending::Changed => Err(changed(shared, sight.case.id).await?),
        Ending::Taken(dup) => Err(CommandError::Refused(taken_text(&dup))),
        Ending::Refused(why) => Err(CommandError::Refused(format!(
            "the database refuses the document: {why}; nothing was written"
        ))),
        Ending::Pending(_) => Err(CommandError::Offline(
            "the answer was lost on the way; the decision is kept and is carried out when the link is back".into(),
        )),
    }
}

/// Says which fields are taken, never which values (R23).
pub fn taken_text(dup: &Duplicate) -> String {
    let fields: Vec<&str> = dup.pattern.keys().map(String::as_str).collect();
    format!(
        "that value of {} is taken by another document; nothing was written, give another value",
        fields.join(" + ")
    )
}

async fn check_version(
    shared: &Arc<Shared>,
    sight: &Sight,
    request: &Request,
) -> Result<(), CommandError> {
    let same = match &request.version {
        Some(version) => *version == conflicts::version_text(sight.version),
        None => sight.case.seen == sight.version,
    };
    if same {
        return Ok(());
    }
    free(shared, sight).await?;
    Err(changed_from(shared, sight).await?)
}

/// Lets the worker look at the documents, so that the record is brought up to date or closed.
async fn free(shared: &Arc<Shared>, sight: &Sight) -> Result<(), CommandError> {
    let keys = sight.keys();
    Ok(shared
        .store
        .call(move |c| ruling::look_again(c, &keys))
        .await?)
}

async fn changed(shared: &Arc<Shared>, id: [u8; 12]) -> Result<CommandError, CommandError> {
    match look(shared, id, false).await? {
        Some(sight) => changed_from(shared, &sight).await,
        None => Ok(CommandError::Refused(
            "a side changed meanwhile, and the conflict is no longer open".into(),
        )),
    }
}

async fn changed_from(shared: &Arc<Shared>, sight: &Sight) -> Result<CommandError, CommandError> {
    let (id, version) = (sight.case.id, sight.version);
    shared
        .store
        .call(move |c| cases::saw(c, &id, version))
        .await?;
    Ok(CommandError::Changed {
        message: "one of the sides changed since this conflict was shown; nothing was written. Look at the new state and decide again".into(),
        state: Box::new(view::now(shared, sight)),
    })
}

/// The answer for a conflict that is not open: settled the same way already, otherwise, or unknown.
async fn not_open(
    shared: &Arc<Shared>,
    id: ObjectId,
    request: &Request,
) -> Result<Resolution, CommandError> {
    let Some(record) = view::record(shared, id).await? else {
        return Err(view::unknown(id));
    };
    let text = |name: &str| record.get_str(name).unwrap_or_default().to_owned();
    if !record.get_bool("resolved").unwrap_or(false) {
        return Err(CommandError::Refused(
            "this conflict is being worked on; look at it again in a moment".into(),
        ));
    }
    let (strategy, by) = (text("resolutionStrategy"), text("resolvedBy"));
    let at = record
        .get_datetime("resolvedAt")
        .ok()
        .and_then(|t| DateTime::from_timestamp_millis(t.timestamp_millis()));
    if strategy == request.strategy.name() && !request.dry_run {
        return Ok(Resolution {
            success: true,
            message: format!("it was resolved already, by {by}"),
            conflict_id: id.to_hex(),
            strategy,
            resolved_by: by,
            resolved_at: at,
            dry_run: false,
            settled: true,
            result: json!({}),
        });
    }
    let when = at.map_or_else(String::new, |t| {
        format!(" at {}", t.to_rfc3339_opts(SecondsFormat::Secs, true))
    });
    Err(CommandError::Refused(format!(
        "it was resolved already: {strategy}, by {by}{when}; `sangam conflicts undo {id}` takes that back"
    )))
}

fn answer(sight: &Sight, plan: &Plan, request: &Request) -> Resolution {
    let mut result = serde_json::Map::new();
    result.insert("document".into(), view::json_of(plan.result.as_deref()));
    if sight.theirs.is_some() {
        let other = view::json_of(plan.other_result.as_deref());
        result.insert("otherDocument".into(), other);
    }
    Resolution {
        success: true,
        message: plan.summary.clone(),
        conflict_id: ObjectId::from_bytes(sight.case.id).to_hex(),
        strategy: request.strategy.name().into(),
        resolved_by: request.who.clone(),
        resolved_at: (!request.dry_run).then(Utc::now),
        dry_run: request.dry_run,
        settled: false,
        result: Json::Object(result),
    }
}

/// What the record gets: who decided what, and every version that is discarded (R21).
fn record(sight: &Sight, plan: &Plan, request: &Request) -> Vec<u8> {
    let mut w = Writer::new();
    w.bool("resolved", true)
        .str("resolutionStrategy", request.strategy.name())
        .str("resolvedBy", &request.who)
        .date("resolvedAt", Utc::now().timestamp_millis());
    if let Some(notes) = &request.notes {
        w.str("notes", notes);
    }
    if let ([field], Some(result), Some(_)) =
        (sight.case.fields.as_slice(), &plan.result, &request.value)
        && let Some(new) = value::at_path(result, field)
    {
        w.value("newValue", new.kind, &new.bytes);
    }
    let names = ["localDocument", "remoteDocument", "baseDocument"];
    let [local, remote] = sight.whole.each_ref().map(Option::as_deref);
    let mut room = 15_usize << 20;
    for (name, doc) in names
        .into_iter()
        .zip([local, remote, sight.mine.base.as_deref()])
    {
        match doc {
            Some(doc) if doc.len() < room => {
                room -= doc.len();
                w.doc(name, doc);
            }
            // The record has it from when the conflict was found, as far as there was room.
            Some(_) => {}
            None => {
                w.value(name, 0x0A, &[]);
            }
        }
    }
    put_result(&mut w, plan.result.as_deref());
    w.finish()
}

/// Waits a little for the worker to finish what a ruling left to it.
pub async fn settled(shared: &Arc<Shared>, keys: &[(Key, Id)]) -> Result<bool, CommandError> {
    for _ in 0..200 {
        let keys: Vec<Key> = keys.iter().map(|(key, _)| key.clone()).collect();
        let waiting = shared.store.call(move |c| {
            for key in &keys {
                for side in [Side::Local, Side::Remote] {
                    if queue::get_row(c, side, key)?.is_some() {
                        return Ok(true);
                    }
                }
            }
            Ok(false)
        });
        if !waiting.await? {
            return Ok(true);
        }
        if !shared.may_work() {
            return Ok(false);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(false)
}
