//! Whether the daemon is alive and captures, and its metrics.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::{ApiError, in_time};
use crate::dispatch::Dispatcher;
use crate::metrics::MEDIA_TYPE;

/// Whether the daemon is alive
#[utoipa::path(get, path = "/healthz", tag = "sync", security(()), 
    responses((status = 200, body = crate::api::openapi::Health),
              (status = "4XX", body = crate::api::openapi::Problem), (status = "5XX", body = crate::api::openapi::Problem)))]
pub(super) async fn healthz(State(dispatcher): State<Dispatcher>) -> Response {
    health(
        dispatcher.handle().is_alive(),
        "alive",
        "an event loop is stuck",
    )
}

/// Whether local changes are being captured
#[utoipa::path(get, path = "/readyz", tag = "sync", security(()), 
    responses((status = 200, body = crate::api::openapi::Health),
              (status = "4XX", body = crate::api::openapi::Problem), (status = "5XX", body = crate::api::openapi::Problem)))]
pub(super) async fn readyz(State(dispatcher): State<Dispatcher>) -> Response {
    let state = match dispatcher.handle().takes_orders() {
        Ok(()) => "capturing",
        Err(_) => "standby",
    };
    health(
        dispatcher.handle().is_capturing(),
        state,
        "local changes are not being captured",
    )
}

fn health(good: bool, yes: &str, no: &str) -> Response {
    if good {
        Json(json!({ "status": yes })).into_response()
    } else {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, no).into_response()
    }
}

/// Metrics for Prometheus, as OpenMetrics text
#[utoipa::path(get, path = "/metrics", tag = "sync",
    responses((status = 200, body = String, content_type = "application/openmetrics-text"),
              (status = "4XX", body = crate::api::openapi::Problem), (status = "5XX", body = crate::api::openapi::Problem)))]
pub(super) async fn metrics(State(dispatcher): State<Dispatcher>) -> Result<Response, ApiError> {
    let handle = dispatcher.handle().clone();
    let text = in_time(async move { handle.metrics().await }).await?;
    Ok(([(CONTENT_TYPE, MEDIA_TYPE)], text).into_response())
}
