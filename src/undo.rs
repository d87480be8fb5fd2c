//! Undo: puts back what a resolution or a policy discarded (R21).
//!
//! The discarded version becomes a local edit, guarded like everything else, and travels on as such.
//! What the version had changed is put back; the other fields stay as they are now. What the undo displaces is put on record as well, so an undo can itself be undone.

use std::sync::Arc;

use bson::oid::ObjectId;
use bson::{RawBsonRef, RawDocumentBuf};
use chrono::Utc;
use serde_json::{Value as Json, json};

use crate::command::CommandError;
use crate::conflicts::put_result;
use crate::content::{self, strip};
use crate::decide::{Merge, Side};
use crate::key::{Id, Key};
use crate::raw::{self, Writer};
use crate::resolution::Step;
use crate::resolve::{Resolution, settled, taken_text};
use crate::ruling::{self, Ending, Ruling, Taken};
use crate::shared::{Settings, Shared};
use crate::side::LONG;
use crate::store::{base, records};
use crate::value::{self, Value};
use crate::view;

/// What an undo needs of a record.
struct Discarded {
    ns: u32,
    names: (String, String),
    collection: String,
    kind: String,
    fields: Vec<String>,
    key: Key,
    id: Id,
    /// The content that was discarded; `None`: a deletion.
    content: Option<Vec<u8>>,
    /// The content that both sides had agreed on before.
    base: Option<Vec<u8>>,
    /// The content that the resolution left, if the record tells.
    result: Option<Option<Vec<u8>>>,
}

fn refused(text: &str) -> CommandError {
    CommandError::Refused(text.into())
}

/// Puts back what the conflict's resolution discarded; with `value` in the field of the conflict.
pub async fn undo(
    shared: &Arc<Shared>,
    id: ObjectId,
    who: &str,
    value: Option<&Json>,
) -> Result<Resolution, CommandError> {
    let Some(record) = view::raw_record(shared, id).await? else {
        return Err(view::unknown(id));
    };
    if !matches!(record.get("resolved"), Ok(Some(RawBsonRef::Boolean(true)))) {
        return Err(refused(
            "this conflict is still open: there is nothing to undo",
        ));
    }
    if matches!(record.get("undoneAt"), Ok(Some(RawBsonRef::DateTime(_)))) {
        return Err(refused("it was undone already"));
    }
    if raw::get(record.as_bytes(), b"localDocument").is_none()
        && raw::get(record.as_bytes(), b"remoteDocument").is_none()
    {
        return children(shared, id, who).await;
    }
    let (mut answer, keys) = one(shared, id, &record, (who, value)).await?;
    answer.settled = settled(shared, &keys).await?;
    tracing::info!(conflict = %id, by = who, "resolution undone");
    Ok(answer)
}

/// Puts back every document that a lifted halt let go.
async fn children(
    shared: &Arc<Shared>,
    id: ObjectId,
    who: &str,
) -> Result<Resolution, CommandError> {
    let raw = RawDocumentBuf::try_from(&crate::lift::children(id))
        .map_err(|_| CommandError::Failed("find".into()))?;
    let db = shared.settings().records_db().to_owned();
    let mut rows = shared.local.cursor(&db, raw, LONG).await?;
    let (mut done, mut failed, mut why) = (0_u64, 0_u64, String::new());
    while let Some(record) = rows.next().await? {
        let Ok(child) = record.get_object_id("_id") else {
            continue;
        };
        match one(shared, child, &record, (who, None)).await {
            Ok(_) => done += 1,
            Err(
                error @ (CommandError::Offline(_)
                | CommandError::LocalAway(_)
                | CommandError::Failed(_)),
            ) => return Err(error),
            Err(error) => {
                failed += 1;
                why = format!("; the last one that could not be: {error}");
            }
        }
    }
    if done + failed == 0 {
        return Err(refused(
            "nothing was discarded by it, so there is nothing to put back",
        ));
    }
    let mut w = Writer::new();
    w.date("undoneAt", Utc::now().timestamp_millis())
        .str("undoneBy", who);
    let fields = w.finish();
    shared
        .store
        .call(move |c| records::put_record(c, "conflict_logs", &id.bytes(), &fields))
        .await?;
    Ok(answer(
        id,
        who,
        format!("{done} documents were put back, {failed} were not{why}"),
        None,
    ))
}

fn answer(id: ObjectId, who: &str, message: String, result: Option<&[u8]>) -> Resolution {
    Resolution {
        success: true,
        message,
        conflict_id: id.to_hex(),
        strategy: "undo".into(),
        resolved_by: who.into(),
        resolved_at: Some(Utc::now()),
        dry_run: false,
        settled: false,
        result: json!({ "document": view::json_of(result) }),
    }
}

async fn one(
    shared: &Arc<Shared>,
    id: ObjectId,
    record: &RawDocumentBuf,
    (who, value): (&str, Option<&Json>),
) -> Result<(Resolution, Vec<(Key, Id)>), CommandError> {
    let settings = shared.settings();
    let was = discarded(shared, &settings, record.as_bytes()).await?;
    let Some(taken) = Taken::take(shared, std::slice::from_ref(&was.key)).await else {
        return Err(refused(
            "the document is being worked on; try again in a moment",
        ));
    };
    let key = was.key.clone();
    let known = shared
        .store
        .call(move |c| Ok((base::get(c, &key)?, records::open_conflict(c, &key)?)));
    let (base, open) = known.await?;
    if let Some(open) = open {
        return Err(CommandError::Refused(format!(
            "the document is in another conflict, {}; resolve that one first",
            ObjectId::from_bytes(open.id)
        )));
    }
    let (db, coll) = (&was.names.0, &was.names.1);
    let mut there = shared
        .local
        .read(db, coll, was.ns, std::iter::once(&was.id))
        .await?;
    let whole = there.remove(&was.key);
    let now = whole
        .as_deref()
        .map(|d| strip(d, &settings.sync_fields).into_owned());
    let new = put_back(&settings, &was, now.as_deref(), value)?;
    if new == now {
        return Err(refused(
            "the document is already as it was before the resolution",
        ));
    }
    let own = ObjectId::new().bytes();
    let mut mark = Writer::new();
    mark.date("undoneAt", Utc::now().timestamp_millis())
        .str("undoneBy", who)
        .value("undoneIn", 0x07, &own);
    let keys = vec![(was.key.clone(), was.id.clone())];
    let ruling = Ruling {
        id: own,
        steps: vec![Step {
            key: was.key.clone(),
            id: was.id.clone(),
            side: Side::Local,
            expect: now.clone(),
            new: new.clone(),
            base_after: base,
            from_other: false,
        }],
        at: 0,
        look: keys.clone(),
        records: vec![
            (
                own,
                displaced(&was, id, who, (whole.as_deref(), new.as_deref())),
            ),
            (id.bytes(), mark.finish()),
        ],
        epoch: 0,
    };
    match ruling::begin(shared, ruling, taken).await? {
        Ending::Done => {}
        Ending::Changed => {
            return Err(refused(
                "the document was changed at this very moment; nothing was written, try again",
            ));
        }
        Ending::Taken(dup) => {
            return Err(CommandError::Refused(format!(
                "{}: `sangam conflicts undo {id} --value NEW_VALUE`",
                taken_text(&dup)
            )));
        }
        Ending::Refused(why) => {
            return Err(CommandError::Refused(format!(
                "the database refuses the document: {why}; nothing was written"
            )));
        }
        Ending::Pending(_) => {
            return Err(CommandError::LocalAway(
                "it does not answer; the undo is kept and carried out when it does".into(),
            ));
        }
    }
    let message = match &new {
        Some(_) => "what was discarded is put back on the local side, and goes to the remote side",
        None => "the document is deleted again on the local side, and then on the remote side",
    };
    Ok((answer(id, who, message.into(), new.as_deref()), keys))
}

/// The content that the document gets.
fn put_back(
    settings: &Settings,
    was: &Discarded,
    now: Option<&[u8]>,
    value: Option<&Json>,
) -> Result<Option<Vec<u8>>, CommandError> {
    let Some(old) = &was.content else {
        let unchanged = match &was.result {
            Some(result) => now == result.as_deref(),
            None => false,
        };
        return if unchanged || now.is_none() {
            Ok(None)
        } else {
            Err(refused(
                "the document was changed since, so it is not deleted again; delete it by hand if you are sure",
            ))
        };
    };
    let rules = crate::decide::Rules {
        policy: settings.policy(&was.names.1),
        updated_at: &settings.config.fields.updated_at,
        skew_ms: 0,
        first_sync: false,
        fields: None,
        base_may_lag: false,
    };
    // What the discarded version had changed goes back; what it had not stays as it is now.
    let before = was
        .base
        .as_ref()
        .or(was.result.as_ref().and_then(Option::as_ref));
    let merged = match (before, now) {
        (Some(before), Some(now)) => {
            Merge::new(Some(before), old, now, rules).map(|m| m.merged(now, Side::Local))
        }
        _ => None,
    };
    let mut new = merged.unwrap_or_else(|| old.clone());
    if let Some(given) = value {
        let [field] = was.fields.as_slice() else {
            return Err(CommandError::BadRequest(
                "this conflict is not about a single field, so undo takes no value".into(),
            ));
        };
        let like = value::at_path(&new, field);
        let typed = Value::like(given, like.as_ref())
            .map_err(|why| CommandError::BadRequest(format!("{field} {why}")))?;
        new = value::set_path(&new, field, &typed);
    }
    Ok(Some(new))
}

/// The record of what an undo displaces.
fn displaced(
    was: &Discarded,
    undoes: ObjectId,
    who: &str,
    (old, new): (Option<&[u8]>, Option<&[u8]>),
) -> Vec<u8> {
    let mut w = Writer::new();
    let now = Utc::now().timestamp_millis();
    w.str("collection", &was.collection)
        .str("kind", &was.kind)
        .value("localId", was.id.kind, &was.id.value)
        .value("remoteId", was.id.kind, &was.id.value);
    match was.fields.as_slice() {
        [] => w.value("field", 0x0A, &[]),
        fields => w.str("field", &fields.join(",")),
    };
    for name in ["localDocument", "remoteDocument"] {
        // Before an undo both sides are alike, as a rule; the local one is what it displaces.
        match old.filter(|_| name == "localDocument") {
            Some(old) => w.doc(name, old),
            None => w.value(name, 0x0A, &[]),
        };
    }
    w.date("timestamp", now)
        .bool("resolved", true)
        .str("resolutionStrategy", "undo")
        .str("resolvedBy", who)
        .date("resolvedAt", now)
        .value("undoes", 0x07, &undoes.bytes())
        .str("notes", &format!("took back the resolution of {undoes}"));
    put_result(&mut w, new);
    w.finish()
}

/// Which version a record's resolution discarded.
async fn discarded(
    shared: &Arc<Shared>,
    settings: &Settings,
    record: &[u8],
) -> Result<Discarded, CommandError> {
    let text = |name: &str| {
        raw::get(record, name.as_bytes()).and_then(|e| raw::text(&e).map(str::to_owned))
    };
    let strategy = text("resolutionStrategy").unwrap_or_default();
    if strategy == "none" {
        return Err(refused(
            "nothing was discarded: both sides agreed by themselves",
        ));
    }
    let collection = text("collection").unwrap_or_default();
    let names = settings.names_of(&collection);
    let ns = shared.store.namespace(&names.0, &names.1).await?;
    let doc = |name: &str| -> Result<Option<Vec<u8>>, CommandError> {
        match raw::get(record, name.as_bytes()) {
            Some(e) if e.kind == raw::DOCUMENT => {
                Ok(Some(strip(e.value, &settings.sync_fields).into_owned()))
            }
            Some(e) if e.kind == 0x02 => Err(refused(
                "the document was too large to be kept in the record with the others",
            )),
            _ => Ok(None),
        }
    };
    let id_of = |name: &str| {
        raw::get(record, name.as_bytes())
            .filter(|e| e.kind != 0x0A)
            .map(|e| Id::from_element(&e))
    };
    let fields: Vec<String> = text("field")
        .map(|f| f.split(',').map(str::to_owned).collect())
        .unwrap_or_default();
    let result = match raw::get(record, b"resultDocument") {
        Some(e) if e.kind == raw::DOCUMENT => {
            Some(Some(strip(e.value, &settings.sync_fields).into_owned()))
        }
        Some(_) => Some(None),
        None => None,
    };
    let (local, remote) = (doc("localDocument")?, doc("remoteDocument")?);
    let (local_id, remote_id) = (id_of("localId"), id_of("remoteId"));
    let local_lost = match (&result, strategy.as_str()) {
        (_, "undo") => true,
        (Some(result), _) => !agrees(result.as_deref(), local.as_deref(), &fields),
        (None, "keep_local" | "local_wins") => text("kind").as_deref() == Some("unique_field"),
        (None, _) => true,
    };
    let (id, content) = if local_lost {
        (local_id.clone().or(remote_id), local)
    } else {
        (remote_id.or(local_id), remote)
    };
    let Some(id) = id else {
        return Err(refused("the record does not tell which document it was"));
    };
    Ok(Discarded {
        ns,
        key: Key::new(ns, &id),
        names,
        collection,
        kind: text("kind").unwrap_or_default(),
        fields,
        id,
        content,
        base: doc("baseDocument").unwrap_or(None),
        result,
    })
}

/// Whether a version's part in the conflict is in the result.
fn agrees(result: Option<&[u8]>, version: Option<&[u8]>, fields: &[String]) -> bool {
    match (result, version) {
        (Some(result), Some(version)) if !fields.is_empty() => {
            content::agree_on(result, version, fields.iter().map(String::as_bytes))
        }
        (result, version) => result == version,
    }
}
