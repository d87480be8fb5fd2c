//! Indexes and options over HTTP.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;

use super::{Answer, ApiError, object, read, without_limit};
use crate::dispatch::Dispatcher;
use crate::schema::Report;

#[derive(Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SchemaRequest {
    /// Make what is missing, too: indexes that were dropped on one side, that were refused before,
    /// that the pull needs.
    #[serde(default)]
    create: bool,
}

/// How indexes and options of the two sides differ, as of the last look
#[utoipa::path(get, path = "/api/sync/schema", tag = "schema",
    responses((status = 200, body = Report),
              (status = "4XX", body = super::openapi::Problem), (status = "5XX", body = super::openapi::Problem)))]
pub(super) async fn report(State(dispatcher): State<Dispatcher>) -> Json<Report> {
    Json(dispatcher.handle().schema())
}

/// Looks at both sides now, and makes what is missing if that is asked for
#[utoipa::path(post, path = "/api/sync/schema", tag = "schema", request_body = Option<SchemaRequest>,
    responses((status = 200, body = Report),
              (status = "4XX", body = super::openapi::Problem), (status = "5XX", body = super::openapi::Problem)))]
pub(super) async fn make(State(dispatcher): State<Dispatcher>, body: Body) -> Answer<Report> {
    let bytes = read(body).await?;
    let request: SchemaRequest = object(&bytes).map_err(|error| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the body must be {{\"create\": true}} or empty: {error}"),
        )
    })?;
    tracing::info!(create = request.create, "API schema");
    let handle = dispatcher.handle().clone();
    without_limit(async move { handle.look_at_schema(request.create).await })
        .await
        .map(Json)
}
