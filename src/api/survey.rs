//! Verify, plan and adopt over HTTP.

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use serde::Deserialize;

use super::guard::Caller;
use super::{Answer, ApiError, object, read, without_limit};
use crate::adopt::Mode;
use crate::command::{Command, SyncRun};
use crate::dispatch::Dispatcher;
use crate::plan::{self, Plan};
use crate::verify::{self, Report};

/// Proves both sides equal, or says what differs; goes on with a verify that was interrupted
#[utoipa::path(post, path = "/api/sync/verify", tag = "sync", request_body = Option<verify::Request>,
    responses((status = 200, body = Report),
              (status = "4XX", body = super::openapi::Problem), (status = "5XX", body = super::openapi::Problem)))]
pub(super) async fn verify(State(dispatcher): State<Dispatcher>, body: Body) -> Answer<Report> {
    let bytes = read(body).await?;
    let request: verify::Request = object(&bytes).map_err(|error| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the body must be {{\"collections\", \"fresh\", \"maxDocumentsPerSecond\", \"maxBytesPerSecond\"}} or empty: {error}"),
        )
    })?;
    if !request.is_reasonable() {
        return Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "a limit must be at least 10 documents or 4096 bytes a second; leave it out for none",
        ));
    }
    tracing::info!(?request, "API verify");
    let handle = dispatcher.handle().clone();
    without_limit(async move { handle.verify(request).await })
        .await
        .map(Json)
}

/// The report of the last verify
#[utoipa::path(get, path = "/api/sync/verify", tag = "sync",
    responses((status = 200, body = Report),
              (status = "4XX", body = super::openapi::Problem), (status = "5XX", body = super::openapi::Problem)))]
pub(super) async fn last_verify(State(dispatcher): State<Dispatcher>) -> Answer<Report> {
    match dispatcher.handle().last_verify().await? {
        Some(report) => Ok(Json(report)),
        None => Err(ApiError::new(
            StatusCode::NOT_FOUND,
            "nothing was verified yet; run `sangam verify`",
        )),
    }
}

/// Mends what the last verify found, and looks at it again
#[utoipa::path(post, path = "/api/sync/verify/repair", tag = "sync",
    responses((status = 200, body = Report),
              (status = "4XX", body = super::openapi::Problem), (status = "5XX", body = super::openapi::Problem)))]
pub(super) async fn repair(State(dispatcher): State<Dispatcher>) -> Answer<Report> {
    tracing::info!("API repair");
    let handle = dispatcher.handle().clone();
    without_limit(async move { handle.repair().await })
        .await
        .map(Json)
}

/// What a sync would do; nothing is written
#[utoipa::path(get, path = "/api/sync/plan", tag = "sync", params(plan::Request),
    responses((status = 200, body = Plan),
              (status = "4XX", body = super::openapi::Problem), (status = "5XX", body = super::openapi::Problem)))]
pub(super) async fn plan(
    State(dispatcher): State<Dispatcher>,
    query: Result<Query<plan::Request>, QueryRejection>,
) -> Answer<Plan> {
    let Query(request) = query.map_err(|_| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            "compare must be true or false, adopt one of local, remote, merge",
        )
    })?;
    let handle = dispatcher.handle().clone();
    without_limit(async move { handle.plan(&request).await })
        .await
        .map(Json)
}

#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct AdoptRequest {
    /// Which side is right.
    mode: Mode,
}

/// Makes both sides equal in that way, whatever was known of them before; what is discarded stays on record
#[utoipa::path(post, path = "/api/sync/adopt", tag = "sync", request_body = AdoptRequest,
    responses((status = 200, body = SyncRun),
              (status = "4XX", body = super::openapi::Problem), (status = "5XX", body = super::openapi::Problem)))]
pub(super) async fn adopt(
    State(dispatcher): State<Dispatcher>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Answer<SyncRun> {
    let bytes = read(body).await?;
    let request: AdoptRequest = object(&bytes).map_err(|error| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the body must be {{\"mode\": \"local\" | \"remote\" | \"merge\"}}: {error}"),
        )
    })?;
    let (mode, who) = (request.mode, caller.name);
    super::run(dispatcher, Command::Adopt { mode, who }).await
}
