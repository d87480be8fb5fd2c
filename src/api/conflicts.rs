//! Conflicts over HTTP.

use axum::Extension;
use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use bson::oid::ObjectId;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::guard::Caller;
use super::openapi::{Conflict, ConflictDetail, Problem};
use super::{Answer, ApiError, MOST_ENTRIES, in_time, object, read, without_limit};
use crate::decide::Kind;
use crate::dispatch::Dispatcher;
use crate::many::{Many, Selection};
use crate::overrides;
use crate::resolution::Strategy;
use crate::resolve::{Request, Resolution};
use crate::view::Filter;

/// Longest note, in characters.
const NOTES: usize = 4096;

/// Highest `max` of a bulk request.
const MOST_AT_ONCE: u64 = 1_000_000;

/// Conflicts on a page unless asked otherwise.
const PAGE: u32 = 100;

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// Only resolved conflicts, or only open ones
    resolved: Option<bool>,
    /// Only of this collection
    collection: Option<String>,
    /// Only of this kind
    #[param(inline)]
    kind: Option<Kind>,
    /// Most conflicts on the page
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<u32>,
    /// Id of the last conflict of the page before
    #[param(pattern = "^[0-9a-f]{24}$")]
    after: Option<String>,
}

/// A strategy for one conflict.
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ResolveBody {
    strategy: Strategy,
    /// A value for the field in conflict; its type is kept.
    #[serde(default)]
    #[schema(value_type = Option<Value>)]
    new_value: Option<Value>,
    /// For the record.
    #[serde(default)]
    #[schema(max_length = 4096)]
    notes: Option<String>,
    /// The `version` that was looked at. If a side has changed since, nothing is written.
    #[serde(default)]
    version: Option<String>,
    /// Only say what would happen.
    #[serde(default)]
    dry_run: bool,
}

/// A strategy for every open conflict that fits.
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct BulkBody {
    strategy: Strategy,
    #[serde(default)]
    collection: Option<String>,
    #[serde(default)]
    kind: Option<Kind>,
    #[serde(default)]
    #[schema(max_length = 4096)]
    notes: Option<String>,
    /// At most so many.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 1_000_000)]
    max: Option<u64>,
    /// Go on behind this conflict: `next` of the answer before.
    #[serde(default)]
    #[schema(pattern = "^[0-9a-fA-F]{24}$")]
    after: Option<String>,
    #[serde(default)]
    dry_run: bool,
}

#[derive(Debug, Default, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct AutoBody {
    #[serde(default)]
    collection: Option<String>,
    /// At most so many.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 1_000_000)]
    max: Option<u64>,
    /// Go on behind this conflict: `next` of the answer before.
    #[serde(default)]
    #[schema(pattern = "^[0-9a-fA-F]{24}$")]
    after: Option<String>,
}

#[derive(Debug, Default, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct UndoBody {
    /// A value for the field in conflict, where the old one is taken meanwhile.
    #[serde(default)]
    #[schema(value_type = Option<Value>)]
    new_value: Option<Value>,
}

/// A number of conflicts, if any.
fn whole<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let given = Value::deserialize(from)?;
    let number = overrides::whole(&given).as_u64();
    let wrong = || serde::de::Error::custom(whole_number());
    match number {
        None if !given.is_null() => Err(wrong()),
        number => Ok(number),
    }
}

fn whole_number() -> String {
    format!("max must be a whole number up to {MOST_AT_ONCE}")
}

fn bad(detail: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, detail)
}

fn id_of(text: &str) -> Result<ObjectId, ApiError> {
    ObjectId::parse_str(text).map_err(|_| {
        ApiError::new(
            StatusCode::NOT_FOUND,
            "the id of a conflict has 24 hex digits; `sangam conflicts` lists them",
        )
    })
}

async fn body_of<T: serde::de::DeserializeOwned>(body: Body, wanted: &str) -> Result<T, ApiError> {
    let bytes = read(body).await?;
    object(&bytes).map_err(|error| bad(format!("the body must be {wanted}: {error}")))
}

fn notes(notes: Option<String>) -> Result<Option<String>, ApiError> {
    match notes {
        Some(notes) if notes.chars().count() > NOTES => Err(bad(format!(
            "notes must not have more than {NOTES} characters"
        ))),
        notes => Ok(notes.filter(|n| !n.trim().is_empty())),
    }
}

fn most(max: Option<u64>) -> Result<Option<u64>, ApiError> {
    match max {
        Some(max) if max > MOST_AT_ONCE => Err(bad(whole_number())),
        max => Ok(max),
    }
}

fn behind(after: Option<&str>) -> Result<Option<ObjectId>, ApiError> {
    let parse = |text| {
        ObjectId::parse_str(text)
            .map_err(|_| bad("after must be the id of a conflict, 24 hex digits"))
    };
    after.map(parse).transpose()
}

/// Conflicts, newest first
#[utoipa::path(get, path = "/api/sync/conflicts", tag = "conflicts", params(ListQuery),
    responses((status = 200, description = "A page", body = Vec<Conflict>, headers(
                  ("X-Total-Count" = u64, description = "All that fit, on whatever page"),
                  ("X-Next" = Option<String>, description = "`after` for the next page; missing on the last"))),
              (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub(super) async fn list(
    State(dispatcher): State<Dispatcher>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<(HeaderMap, Json<Vec<Value>>), ApiError> {
    let Query(query) = query.map_err(|error| bad(error.body_text()))?;
    let limit = query.limit.unwrap_or(PAGE);
    if !(1..=MOST_ENTRIES).contains(&limit) {
        return Err(bad(format!(
            "limit must be a whole number from 1 to {MOST_ENTRIES}"
        )));
    }
    let after = match &query.after {
        Some(text) => {
            Some(ObjectId::parse_str(text).map_err(|_| bad("after must be the id of a conflict"))?)
        }
        None => None,
    };
    let filter = Filter {
        resolved: query.resolved,
        collection: query.collection,
        kind: query.kind,
    };
    let handle = dispatcher.handle().clone();
    let page = in_time(async move { handle.conflicts(&filter, limit, after).await }).await?;
    let mut headers = HeaderMap::new();
    headers.insert("x-total-count", page.total.into());
    if let Some(next) = page.next.and_then(|n| HeaderValue::from_str(&n).ok()) {
        headers.insert("x-next", next);
    }
    Ok((headers, Json(page.conflicts)))
}

/// One conflict, side by side, with what each strategy would come to
#[utoipa::path(get, path = "/api/sync/conflicts/{id}", tag = "conflicts", params(("id" = String, Path)),
    responses((status = 200, body = ConflictDetail),
              (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub(super) async fn show(
    State(dispatcher): State<Dispatcher>,
    Path(id): Path<String>,
) -> Answer<Value> {
    let id = id_of(&id)?;
    let handle = dispatcher.handle().clone();
    in_time(async move { handle.conflict(id).await })
        .await
        .map(Json)
}

/// Resolves a conflict
#[utoipa::path(post, path = "/api/sync/conflicts/{id}/resolve", tag = "conflicts", params(("id" = String, Path)),
    request_body = ResolveBody,
    responses((status = 200, body = Resolution),
              (status = 409, description = "Resolved already, or a side changed since it was shown (then with the new state as `conflict`), or the value is taken", body = Problem),
              (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub(super) async fn resolve(
    State(dispatcher): State<Dispatcher>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    body: Body,
) -> Answer<Resolution> {
    let id = id_of(&id)?;
    let body: ResolveBody = body_of(
        body,
        "{\"strategy\": \"rename_local|keep_remote|keep_local|merge\", \"newValue\"?, \"notes\"?, \"dryRun\"?}",
    )
    .await?;
    tracing::info!(by = caller.name, conflict = %id, strategy = body.strategy.name(), dry_run = body.dry_run, "API resolve");
    let request = Request {
        strategy: body.strategy,
        value: body.new_value,
        notes: notes(body.notes)?,
        version: body.version,
        who: caller.name,
        dry_run: body.dry_run,
    };
    let handle = dispatcher.handle().clone();
    without_limit(async move { handle.resolve(id, request).await })
        .await
        .map(Json)
}

/// Puts back what a resolution discarded
#[utoipa::path(post, path = "/api/sync/conflicts/{id}/undo", tag = "conflicts", params(("id" = String, Path)),
    request_body = Option<UndoBody>,
    responses((status = 200, body = Resolution),
              (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub(super) async fn undo(
    State(dispatcher): State<Dispatcher>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    body: Body,
) -> Answer<Resolution> {
    let id = id_of(&id)?;
    let body: UndoBody = body_of(body, "{\"newValue\"?} or empty").await?;
    tracing::info!(by = caller.name, conflict = %id, "API undo");
    let handle = dispatcher.handle().clone();
    without_limit(async move { handle.undo(id, &caller.name, body.new_value.as_ref()).await })
        .await
        .map(Json)
}

/// Resolves every open conflict that fits, in the same way
#[utoipa::path(post, path = "/api/sync/conflicts/resolve", tag = "conflicts", request_body = BulkBody,
    responses((status = 200, body = Many),
              (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub(super) async fn resolve_many(
    State(dispatcher): State<Dispatcher>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Answer<Many> {
    let body: BulkBody = body_of(
        body,
        "{\"strategy\", \"collection\"?, \"kind\"?, \"notes\"?, \"max\"?, \"after\"?, \"dryRun\"?}",
    )
    .await?;
    if body.collection.is_none() && body.kind.is_none() {
        return Err(bad(
            "name a collection or a kind: conflicts of all sorts can't be settled in one way",
        ));
    }
    tracing::info!(
        by = caller.name,
        strategy = body.strategy.name(),
        collection = body.collection,
        "API bulk resolve"
    );
    let request = Request {
        strategy: body.strategy,
        value: None,
        notes: notes(body.notes)?,
        version: None,
        who: caller.name,
        dry_run: body.dry_run,
    };
    let selection = Selection {
        collection: body.collection,
        kind: body.kind,
        max: most(body.max)?,
        after: behind(body.after.as_deref())?,
    };
    let handle = dispatcher.handle().clone();
    without_limit(async move { handle.resolve_many(selection, request).await })
        .await
        .map(Json)
}

/// Resolves what can be resolved without a person
#[utoipa::path(post, path = "/api/sync/conflicts/auto-resolve", tag = "conflicts", request_body = Option<AutoBody>,
    responses((status = 200, body = Many),
              (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub(super) async fn auto_resolve(
    State(dispatcher): State<Dispatcher>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Answer<Many> {
    let body: AutoBody = body_of(body, "{\"max\"?, \"after\"?, \"collection\"?} or empty").await?;
    tracing::info!(by = caller.name, max = body.max, "API auto-resolve");
    let selection = Selection {
        collection: body.collection,
        kind: None,
        max: most(body.max)?,
        after: behind(body.after.as_deref())?,
    };
    let handle = dispatcher.handle().clone();
    without_limit(async move {
        handle
            .auto_resolve(selection, format!("auto-resolve ({})", caller.name))
            .await
    })
    .await
    .map(Json)
}
