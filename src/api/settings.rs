//! The configuration over HTTP.

use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::{Extension, Json};
use serde_json::{Map, Value, json};

use super::guard::Caller;
use super::{Answer, ApiError, in_time, read};
use crate::dispatch::Dispatcher;
use crate::overrides;

/// The settings in force
#[utoipa::path(get, path = "/api/sync/config", tag = "config",
    responses((status = 200, body = crate::api::openapi::SyncConfig),
              (status = "4XX", body = crate::api::openapi::Problem), (status = "5XX", body = crate::api::openapi::Problem)))]
pub(super) async fn config(State(dispatcher): State<Dispatcher>) -> Answer<Value> {
    let handle = dispatcher.handle().clone();
    in_time(async move {
        let mut shown = overrides::shown(&handle.config());
        let changed = handle.overrides().await?;
        let names: Vec<&str> = changed.names().collect();
        if !names.is_empty() {
            shown.insert("changedHere".into(), json!(names));
        }
        Ok(Json(Value::Object(shown)))
    })
    .await
}

/// Changes settings; they go before the file's, at once and after a restart. `null` takes one back
#[utoipa::path(put, path = "/api/sync/config", tag = "config", request_body = crate::api::openapi::SyncConfigChange,
    responses((status = 200, body = crate::api::openapi::SyncConfig),
              (status = "4XX", body = crate::api::openapi::Problem), (status = "5XX", body = crate::api::openapi::Problem)))]
pub(super) async fn set_config(
    State(dispatcher): State<Dispatcher>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Answer<Value> {
    let bytes = read(body).await?;
    let bad = |detail: String| ApiError::new(StatusCode::BAD_REQUEST, detail);
    let wanted = |e| bad(format!("the body must be an object of settings: {e}"));
    let changes: Map<String, Value> = serde_json::from_slice(&bytes).map_err(wanted)?;
    let known = |name: &&str| overrides::NAMES.iter().any(|(known, _)| known == name);
    let named: Vec<&str> = changes.keys().map(String::as_str).filter(known).collect();
    tracing::info!(by = caller.name, settings = named.join(","), "API config");
    let this = dispatcher.clone();
    in_time(async move { this.change(&changes, &caller.name).await }).await?;
    config(State(dispatcher)).await
}
