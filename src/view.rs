//! Conflicts as people and programs see them: listed in pages, and one in detail, side by side.

use std::sync::Arc;

use bson::oid::ObjectId;
use bson::{Bson, Document, RawDocumentBuf, doc};
use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Map, Value as Json, json};

use crate::advice::{Advice, Facts};
use crate::command::CommandError;
use crate::conflicts;
use crate::content::{self, strip};
use crate::decide::{Kind, Side};
use crate::failure::Failure;
use crate::raw;
use crate::recorder;
use crate::resolution::{Refusal, Strategy};
use crate::resolve::{self, Sight, kind_named};
use crate::shared::Shared;
use crate::side::LONG;
use crate::store::cases;
use crate::trial::Place;

/// Larger documents are left out of a list; the detail has them.
const LISTED_BYTES: usize = 16 << 10;

const DOCUMENTS: [&str; 4] = [
    "localDocument",
    "remoteDocument",
    "baseDocument",
    "resultDocument",
];

/// Which conflicts.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only resolved ones, or only open ones.
    pub resolved: Option<bool>,
    /// Only of this collection.
    pub collection: Option<String>,
    /// Only of this kind.
    pub kind: Option<Kind>,
}

/// A page of conflicts, newest first.
#[derive(Clone, Debug)]
pub struct Page {
    /// As the API shows them.
    pub conflicts: Vec<Json>,
    /// How many the filter finds in all.
    pub total: u64,
    /// Where the next page begins; `None` at the end.
    pub next: Option<String>,
}

/// A document as relaxed extended JSON; `null` for none.
pub fn json_of(doc: Option<&[u8]>) -> Json {
    doc.and_then(|d| Document::from_reader(d).ok())
        .map_or(Json::Null, |d| Bson::Document(d).into_relaxed_extjson())
}

/// The error for an id that no conflict has.
pub fn unknown(id: ObjectId) -> CommandError {
    CommandError::NotFound(format!(
        "there is no conflict {id}; `sangam conflicts` lists those that are open"
    ))
}

async fn find(shared: &Shared, command: Document) -> Result<Vec<RawDocumentBuf>, Failure> {
    let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("find"))?;
    let mut found = Vec::new();
    let db = shared.settings().records_db().to_owned();
    shared.local.query(&db, raw, |d| found.push(d)).await?;
    Ok(found)
}

/// The record of a conflict, in its newest state.
pub async fn record(shared: &Shared, id: ObjectId) -> Result<Option<Document>, CommandError> {
    Ok(raw_record(shared, id)
        .await?
        .and_then(|d| Document::from_reader(d.as_bytes()).ok()))
}

/// The same as bytes: its documents survive whatever they hold.
pub async fn raw_record(
    shared: &Shared,
    id: ObjectId,
) -> Result<Option<RawDocumentBuf>, CommandError> {
    recorder::flush(shared, &mut true).await?;
    let command = doc! {"find": "conflict_logs", "filter": {"_id": id}, "limit": 1};
    Ok(find(shared, command).await?.pop())
}

/// A page of conflicts. What is shown counts as seen.
pub async fn list(
    shared: &Arc<Shared>,
    filter: &Filter,
    limit: u32,
    after: Option<ObjectId>,
) -> Result<Page, CommandError> {
    recorder::flush(shared, &mut true).await?;
    let mut query = doc! {"parent": null};
    if let Some(resolved) = filter.resolved {
        query.insert("resolved", resolved);
    }
    if let Some(collection) = &filter.collection {
        query.insert("collection", collection);
    }
    if let Some(kind) = filter.kind {
        query.insert("kind", kind.name());
    }
    let counted = shared
        .local
        .run_doc(
            shared.settings().records_db(),
            doc! {"count": "conflict_logs", "query": &query},
        )
        .await?;
    let total = counted
        .get_i32("n")
        .ok()
        .and_then(|n| u64::try_from(n).ok());
    if let Some(after) = after {
        query.insert("_id", doc! {"$lt": after});
    }
    // A record may have 16 MiB: they are taken one by one, and shown without large documents.
    let command = doc! {
        "find": "conflict_logs", "filter": query, "sort": {"_id": -1}, "limit": i64::from(limit) + 1,
        "batchSize": 50,
    };
    let raw = RawDocumentBuf::try_from(&command).map_err(|_| Failure::fatal("find"))?;
    let db = shared.settings().records_db().to_owned();
    let mut rows = shared.local.cursor(&db, raw, LONG).await?;
    let (mut shown, mut seen, mut next) = (Vec::new(), Vec::new(), None);
    let mut last = None;
    while let Some(row) = rows.next().await? {
        if shown.len() == limit as usize {
            next = last;
            break;
        }
        if let Ok(id) = row.get_object_id("_id") {
            last = Some(id.to_hex());
            if let Ok(version) = row.get_str("version")
                && let Ok(version) = u64::from_str_radix(version, 16)
            {
                seen.push((id.bytes(), version.cast_signed()));
            }
        }
        shown.push(listed(shared, row.as_bytes()));
    }
    shared
        .store
        .call(move |c| seen.iter().try_for_each(|(id, v)| cases::saw(c, id, *v)))
        .await?;
    Ok(Page {
        conflicts: shown,
        total: total.unwrap_or(0),
        next,
    })
}

/// A record in a list: as [`plain`], large documents left out, with advice if it is open.
fn listed(shared: &Shared, record: &[u8]) -> Json {
    let mut small = raw::Writer::new();
    let mut left_out = Vec::new();
    for e in raw::elements(record).map_while(Result::ok) {
        let name = String::from_utf8_lossy(e.name);
        if DOCUMENTS.contains(&name.as_ref()) && e.value.len() > LISTED_BYTES {
            left_out.push(name.into_owned());
        } else {
            small.whole(e.whole);
        }
    }
    let mut map = plain(&small.finish());
    for name in &left_out {
        map.insert(name.clone(), Json::Null);
    }
    if !left_out.is_empty() {
        map.insert("leftOut".into(), json!(left_out));
    }
    if map.get("resolved") == Some(&Json::Bool(false)) {
        let advice = recorded_advice(shared, record);
        map.insert("recommendations".into(), json!(advice));
    }
    Json::Object(map)
}

/// Advice from what a record holds.
fn recorded_advice(shared: &Shared, record: &[u8]) -> Vec<Advice> {
    let text = |name: &str| raw::get(record, name.as_bytes()).and_then(|e| raw::text(&e));
    let Some(kind) = text("kind").and_then(kind_named) else {
        return vec![];
    };
    let doc = |name: &str| {
        raw::get(record, name.as_bytes())
            .filter(|e| e.kind == raw::DOCUMENT)
            .map(|e| e.value)
    };
    let id = raw::get(record, b"_id")
        .and_then(|e| Some(ObjectId::from_bytes(e.value.try_into().ok()?).to_hex()))
        .unwrap_or_default();
    let fields: Vec<String> = text("field")
        .map(|f| f.split(',').map(str::to_owned).collect())
        .unwrap_or_default();
    let settings = shared.settings();
    Facts {
        id: &id,
        kind,
        fields: &fields,
        local: doc("localDocument"),
        remote: doc("remoteDocument"),
        lost: text("side").map(|side| match side {
            "remote" => Side::Remote,
            _ => Side::Local,
        }),
        updated_at: &settings.config.fields.updated_at,
        skew_ms: shared.skew_ms(),
        attempt: 0,
    }
    .advice()
}

/// A record with the API's field names: ids of conflicts as hex, times as RFC 3339.
fn plain(record: &[u8]) -> Map<String, Json> {
    let Ok(d) = Document::from_reader(record) else {
        return Map::new();
    };
    let mut map = Map::new();
    for (name, value) in d {
        let json = match (name.as_str(), value) {
            ("_id" | "parent" | "undoes" | "undoneIn", Bson::ObjectId(id)) => id.to_hex().into(),
            ("timestamp" | "resolvedAt" | "undoneAt", Bson::DateTime(t)) => {
                DateTime::<Utc>::from_timestamp_millis(t.timestamp_millis())
                    .map_or(Json::Null, |t| {
                        t.to_rfc3339_opts(SecondsFormat::Millis, true).into()
                    })
            }
            (_, value) => value.into_relaxed_extjson(),
        };
        map.insert(name, json);
    }
    for name in [
        "localId",
        "remoteId",
        "field",
        "localValue",
        "remoteValue",
        "resolutionStrategy",
        "resolvedAt",
        "resolvedBy",
        "notes",
    ] {
        map.entry(name).or_insert(Json::Null);
    }
    map
}

/// One conflict in detail. Of an open one: the documents as they are now, what differs, who changed
/// what, and what each strategy would come to.
pub async fn detail(shared: &Arc<Shared>, id: ObjectId) -> Result<Json, CommandError> {
    let Some(record) = raw_record(shared, id).await? else {
        return Err(unknown(id));
    };
    let mut map = plain(record.as_bytes());
    // Large documents stay in: this is where they can be seen.
    if map.get("resolved") == Some(&Json::Bool(true)) {
        let part = |name: &str| {
            raw::get(record.as_bytes(), name.as_bytes())
                .filter(|e| e.kind == raw::DOCUMENT)
                .map(|e| e.value)
        };
        let sides = [
            part("localDocument"),
            part("baseDocument"),
            part("remoteDocument"),
        ];
        map.insert("fields".into(), side_by_side(shared, sides));
        return Ok(Json::Object(map));
    }
    let sight = match resolve::look(shared, id.bytes(), false).await {
        Ok(sight) => sight,
        // Without the remote, what is on record has to do.
        Err(CommandError::Offline(_)) => None,
        Err(error) => return Err(error),
    };
    let Some(sight) = sight else {
        map.insert(
            "recommendations".into(),
            json!(recorded_advice(shared, record.as_bytes())),
        );
        return Ok(Json::Object(map));
    };
    let (case, version) = (sight.case.id, sight.version);
    shared
        .store
        .call(move |c| cases::saw(c, &case, version))
        .await?;
    if let Json::Object(now) = now(shared, &sight) {
        map.extend(now);
    }
    let advice = free_advice(shared, &sight).await?;
    map.insert("strategies".into(), strategies(shared, &sight, &advice));
    map.insert("recommendations".into(), json!(advice));
    Ok(Json::Object(map))
}

/// The state of an open conflict as it is now.
pub fn now(shared: &Shared, sight: &Sight) -> Json {
    let [local, remote] = sight.whole.each_ref().map(Option::as_deref);
    let base = sight.mine.base.as_deref();
    let fields = &sight.case.fields;
    let value = |doc: Option<&[u8]>| match fields.as_slice() {
        [one] => doc
            .and_then(|d| crate::value::at_path(d, one))
            .map_or(Json::Null, |v| v.to_bson().into_relaxed_extjson()),
        _ => json_of(doc),
    };
    let id = |id: &Option<crate::key::Id>| id.as_ref().map_or(Json::Null, conflicts::id_json);
    json!({
        "_id": ObjectId::from_bytes(sight.case.id).to_hex(), "kind": sight.kind,
        "collection": sight.collection,
        "localId": id(&sight.case.local), "remoteId": id(&sight.case.remote),
        "field": if fields.is_empty() { Json::Null } else { fields.join(",").into() },
        "localValue": value(local), "remoteValue": value(remote),
        "localDocument": json_of(local), "remoteDocument": json_of(remote),
        "baseDocument": json_of(base),
        "version": conflicts::version_text(sight.version),
        "fields": side_by_side(shared, [local, base, remote]),
        "changes": { "local": change(shared, base, local), "remote": change(shared, base, remote) },
    })
}

/// Each field with its three values, whether the sides differ in it, and which side changed it.
fn side_by_side(shared: &Shared, [local, base, remote]: [Option<&[u8]>; 3]) -> Json {
    let skip = &shared.settings().sync_fields;
    let mut names: Vec<&[u8]> = Vec::new();
    for doc in [local, remote, base].into_iter().flatten() {
        for e in raw::elements(doc).map_while(Result::ok) {
            if !names.contains(&e.name) && !skip.iter().any(|s| s.as_bytes() == e.name) {
                names.push(e.name);
            }
        }
    }
    let part = |doc: Option<&[u8]>| json_of(doc);
    let [l, b, r] = [part(local), part(base), part(remote)];
    let rows = names.into_iter().map(|name| {
        let bytes = |doc: Option<&[u8]>| doc.and_then(|d| raw::get(d, name)).map(|e| e.whole.to_vec());
        let (lv, bv, rv) = (bytes(local), bytes(base), bytes(remote));
        let by = match (base.is_some(), lv != bv, rv != bv) {
            (false, ..) if lv == rv => "both",
            (false, ..) if rv.is_none() => "local",
            (false, ..) if lv.is_none() => "remote",
            (false, ..) | (_, true, true) => "both",
            (_, true, false) => "local",
            (_, false, true) => "remote",
            (_, false, false) => "none",
        };
        let name = String::from_utf8_lossy(name).into_owned();
        json!({
            "local": l.get(&name), "base": b.get(&name), "remote": r.get(&name), "differs": lv != rv,
            "changedBy": by, "name": name,
        })
    });
    Json::Array(rows.collect())
}

/// What a side changed against base, when, and who, as far as the document tells.
fn change(shared: &Shared, base: Option<&[u8]>, doc: Option<&[u8]>) -> Json {
    let settings = shared.settings();
    let Some(doc) = doc else {
        return json!({"deleted": base.is_some(), "fields": [], "at": null, "by": null});
    };
    let content = strip(doc, &settings.sync_fields);
    let fields: Vec<String> = match base.map(|b| content::diff(b, &content)) {
        Some(Ok(diff)) => diff
            .names()
            .map(|n| String::from_utf8_lossy(n).into_owned())
            .collect(),
        _ => vec![],
    };
    let json = json_of(Some(doc));
    let by = [
        "updatedBy",
        "updated_by",
        "modifiedBy",
        "modified_by",
        "lastModifiedBy",
    ]
    .into_iter()
    .find_map(|name| json.get(name).cloned());
    let at = raw::get(doc, settings.config.fields.updated_at.as_bytes())
        .and_then(|e| crate::decide::millis(&e))
        .and_then(DateTime::<Utc>::from_timestamp_millis)
        .map(|t| t.to_rfc3339_opts(SecondsFormat::Millis, true));
    json!({"created": base.is_none(), "fields": fields, "at": at, "by": by})
}

/// Advice whose suggested value was found to be free on both sides.
pub async fn free_advice(shared: &Arc<Shared>, sight: &Sight) -> Result<Vec<Advice>, CommandError> {
    let id = ObjectId::from_bytes(sight.case.id).to_hex();
    let settings = shared.settings();
    let [local, remote] = sight.whole.each_ref().map(Option::as_deref);
    let mut facts = Facts {
        id: &id,
        kind: sight.kind,
        fields: &sight.case.fields,
        local,
        remote,
        lost: None,
        updated_at: &settings.config.fields.updated_at,
        skew_ms: shared.skew_ms(),
        attempt: 0,
    };
    if sight.kind == Kind::UniqueField {
        while let Some(new) = facts.suggestion() {
            let value = Json::String(new);
            let plan = sight
                .as_case(&settings, facts.skew_ms)
                .plan(Strategy::RenameLocal, Some(&value));
            let Ok(Some(result)) = plan.map(|p| p.result) else {
                break;
            };
            let mut taken = false;
            for side in [Side::Local, Side::Remote] {
                let place = Place {
                    endpoint: &shared.endpoint(side)?,
                    ns: &sight.ns,
                };
                taken |= place
                    .is_taken(&sight.case.fields, &result, &sight.mine.id)
                    .await?;
            }
            if !taken || facts.attempt > 8 {
                break;
            }
            facts.attempt += 1;
        }
    }
    Ok(facts.advice())
}

/// What each strategy would come to.
fn strategies(shared: &Shared, sight: &Sight, advice: &[Advice]) -> Json {
    let settings = shared.settings();
    let case = sight.as_case(&settings, shared.skew_ms());
    let each = Strategy::ALL.into_iter().map(|strategy| {
        let suggested = advice
            .iter()
            .find(|a| a.value.is_some())
            .and_then(|a| a.value.clone().map(Json::String));
        let (needs_value, plan) = match case.plan(strategy, None) {
            Err(Refusal::Value(_)) => (true, case.plan(strategy, suggested.as_ref())),
            other => (false, other),
        };
        match plan {
            Ok(plan) => json!({
                "strategy": strategy, "possible": true, "needsValue": needs_value,
                "suggestedValue": suggested.filter(|_| needs_value), "summary": plan.summary,
                "result": {
                    "document": json_of(plan.result.as_deref()),
                    "otherDocument": json_of(plan.other_result.as_deref()),
                },
            }),
            Err(refusal) => json!({
                "strategy": strategy, "possible": matches!(refusal, Refusal::Value(_)),
                "needsValue": needs_value, "suggestedValue": null, "summary": refusal.to_string(),
                "result": null,
            }),
        }
    });
    Json::Array(each.collect())
}
