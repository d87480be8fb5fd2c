//! The HTTP API: JSON over axum. Errors are `{"detail": "..."}` with the right status.
//!
//! Who may ask: with a token, whoever knows it. Without one the address is loopback only (the
//! configuration refuses anything else), and a request must be addressed to loopback by name, so that
//! a web page in the administrator's browser can't reach it by DNS rebinding. A request that changes
//! something is refused when the browser says that another site's page made it.

mod assets;
mod conflicts;
mod dashboard;
mod guard;
mod health;
pub mod openapi;
mod schema;
mod serve;
mod settings;
mod survey;

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::Json;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::http::header::WWW_AUTHENTICATE;
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http_body_util::{BodyExt, Limited};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::command::{Command, CommandError, NetworkStatus, Queue, Status, SyncRun};
use crate::dispatch::{Dispatcher, Outcome};

/// Largest request body.
const MOST_BYTES: usize = 1 << 20;
/// Time for a request's headers, and again for its body.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for an answer, but for `sync` and `reconcile`, which take as long as they take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Highest `limit` that may be asked for.
const MOST_ENTRIES: u32 = 1000;

pub use guard::{Caller, Guard, Role};
pub use serve::{Listener, serve};

fn router(dispatcher: Dispatcher, guard: Guard, live: Arc<dashboard::Live>) -> Router {
    let guarded = Router::new()
        .route("/api/sync/sync", post(sync))
        .route("/api/sync/reconcile", post(reconcile))
        .route(
            "/api/sync/verify",
            get(survey::last_verify).post(survey::verify),
        )
        .route("/api/sync/verify/repair", post(survey::repair))
        .route("/api/sync/plan", get(survey::plan))
        .route("/api/sync/adopt", post(survey::adopt))
        .route("/api/sync/pause", post(pause))
        .route("/api/sync/resume", post(resume))
        .route("/api/sync/status", get(status))
        .route("/api/sync/network-status", get(network_status))
        .route("/api/sync/logs", get(logs))
        .route("/api/sync/queue", get(queue))
        .route(
            "/api/sync/config",
            get(settings::config).put(settings::set_config),
        )
        .route("/api/sync/schema", get(schema::report).post(schema::make))
        .route("/api/sync/conflicts", get(conflicts::list))
        .route("/api/sync/conflicts/resolve", post(conflicts::resolve_many))
        .route(
            "/api/sync/conflicts/auto-resolve",
            post(conflicts::auto_resolve),
        )
        .route("/api/sync/conflicts/{id}", get(conflicts::show))
        .route("/api/sync/conflicts/{id}/resolve", post(conflicts::resolve))
        .route("/api/sync/conflicts/{id}/undo", post(conflicts::undo))
        .route("/api/sync/session", get(dashboard::session))
        .route("/api/sync/overview", get(dashboard::overview))
        .route("/api/sync/collections", get(dashboard::collections))
        .route("/api/sync/history", get(dashboard::history))
        .route(
            "/api/sync/events",
            get(dashboard::events).layer(Extension(live)),
        )
        .route("/metrics", get(health::metrics))
        .route("/openapi.json", get(openapi::document))
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(
            Arc::new(guard),
            guard::check,
        ));
    Router::new()
        .route("/healthz", get(health::healthz))
        .route("/readyz", get(health::readyz))
        .method_not_allowed_fallback(wrong_method)
        .merge(assets::router())
        .merge(guarded)
        .layer(middleware::from_fn(assets::strict))
        .with_state(dispatcher)
}

/// An answer that is an error.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    detail: String,
    /// The new state of a conflict that changed since it was shown.
    conflict: Option<Box<Value>>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self {
            status,
            detail: detail.into(),
            conflict: None,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut body = json!({ "detail": self.detail });
        if let Some(conflict) = self.conflict {
            body["conflict"] = *conflict;
        }
        let mut response = (self.status, Json(body)).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(
                WWW_AUTHENTICATE,
                axum::http::HeaderValue::from_static("Bearer"),
            );
        }
        response
    }
}

impl From<CommandError> for ApiError {
    fn from(error: CommandError) -> Self {
        let status = match error {
            CommandError::Busy | CommandError::Refused(_) | CommandError::Changed { .. } => {
                StatusCode::CONFLICT
            }
            CommandError::NotFound(_) => StatusCode::NOT_FOUND,
            CommandError::NotConfigured | CommandError::Offline(_) | CommandError::LocalAway(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            CommandError::BadRequest(_) => StatusCode::BAD_REQUEST,
            CommandError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let detail = error.to_string();
        let conflict = match error {
            CommandError::Changed { state, .. } => Some(state),
            _ => None,
        };
        Self {
            status,
            detail,
            conflict,
        }
    }
}

type Answer<T> = Result<Json<T>, ApiError>;

#[derive(Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct SyncRequest {
    /// Only these; all without it.
    #[serde(default)]
    collections: Option<Vec<String>>,
}

/// Sends and fetches everything now
#[utoipa::path(post, path = "/api/sync/sync", tag = "sync", request_body = Option<SyncRequest>,
    responses((status = 200, body = SyncRun),
              (status = "4XX", body = openapi::Problem), (status = "5XX", body = openapi::Problem)))]
async fn sync(State(dispatcher): State<Dispatcher>, body: Body) -> Answer<SyncRun> {
    let bytes = read(body).await?;
    let request: SyncRequest = object(&bytes).map_err(|error| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the body must be {{\"collections\": [\"NAME\", ...]}} or empty: {error}"),
        )
    })?;
    let collections = request.collections.unwrap_or_default();
    run(dispatcher, Command::Sync { collections }).await
}

/// A JSON object; nothing at all, or `null`, is an empty one.
fn object<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    let bytes = match bytes.trim_ascii() {
        b"" | b"null" => b"{}",
        bytes => bytes,
    };
    // By way of an object: serde takes a list for a struct, too.
    let object: serde_json::Map<String, Value> = serde_json::from_slice(bytes)?;
    serde_json::from_value(Value::Object(object))
}

#[derive(Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct ReconcileRequest {
    /// Read every document instead of comparing checksums, which don't see every change of a fraction.
    #[serde(default)]
    exact: bool,
}

/// Compares both databases as a whole and mends what differs
#[utoipa::path(post, path = "/api/sync/reconcile", tag = "sync", request_body = Option<ReconcileRequest>,
    responses((status = 200, body = SyncRun),
              (status = "4XX", body = openapi::Problem), (status = "5XX", body = openapi::Problem)))]
async fn reconcile(State(dispatcher): State<Dispatcher>, body: Body) -> Answer<SyncRun> {
    let bytes = read(body).await?;
    let ReconcileRequest { exact } = object(&bytes).map_err(|error| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the body must be {{\"exact\": true}} or empty: {error}"),
        )
    })?;
    run(dispatcher, Command::Reconcile { exact }).await
}

async fn run(dispatcher: Dispatcher, command: Command) -> Answer<SyncRun> {
    tracing::info!(?command, "API");
    match dispatcher.execute(command).await? {
        Outcome::Run(run) => Ok(Json(*run)),
        other => Err(unexpected(&other)),
    }
}

/// Stops moving changes; they go on being noted
#[utoipa::path(post, path = "/api/sync/pause", tag = "sync",
    responses((status = 200, body = openapi::Done),
              (status = "4XX", body = openapi::Problem), (status = "5XX", body = openapi::Problem)))]
async fn pause(State(dispatcher): State<Dispatcher>) -> Answer<Value> {
    done(dispatcher, Command::Pause).await
}

/// Undoes `pause`
#[utoipa::path(post, path = "/api/sync/resume", tag = "sync",
    responses((status = 200, body = openapi::Done),
              (status = "4XX", body = openapi::Problem), (status = "5XX", body = openapi::Problem)))]
async fn resume(State(dispatcher): State<Dispatcher>) -> Answer<Value> {
    done(dispatcher, Command::Resume).await
}

async fn done(dispatcher: Dispatcher, command: Command) -> Answer<Value> {
    tracing::info!(?command, "API");
    let outcome = in_time(async move { dispatcher.execute(command).await }).await?;
    Ok(Json(json!({ "success": true, "message": outcome.line() })))
}

/// How things are
#[utoipa::path(get, path = "/api/sync/status", tag = "sync",
    responses((status = 200, body = Status),
              (status = "4XX", body = openapi::Problem), (status = "5XX", body = openapi::Problem)))]
async fn status(State(dispatcher): State<Dispatcher>) -> Answer<Status> {
    match in_time(async move { dispatcher.execute(Command::Status).await }).await? {
        Outcome::Status(status) => Ok(Json(*status)),
        other => Err(unexpected(&other)),
    }
}

/// Whether the remote can be reached
#[utoipa::path(get, path = "/api/sync/network-status", tag = "sync",
    responses((status = 200, body = NetworkStatus),
              (status = "4XX", body = openapi::Problem), (status = "5XX", body = openapi::Problem)))]
async fn network_status(State(dispatcher): State<Dispatcher>) -> Json<NetworkStatus> {
    Json(dispatcher.handle().network_status())
}

#[derive(Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
struct Limit {
    /// Most entries
    #[param(minimum = 1, maximum = 1000, default = 20)]
    limit: Option<u32>,
}

/// The last sync runs, newest first
#[utoipa::path(get, path = "/api/sync/logs", tag = "sync", params(Limit),
    responses((status = 200, body = Vec<SyncRun>),
              (status = "4XX", body = openapi::Problem), (status = "5XX", body = openapi::Problem)))]
async fn logs(
    State(dispatcher): State<Dispatcher>,
    query: Result<Query<Limit>, QueryRejection>,
) -> Answer<Vec<SyncRun>> {
    let limit = limit(query)?;
    let handle = dispatcher.handle().clone();
    in_time(async move { handle.logs(i64::from(limit)).await })
        .await
        .map(Json)
}

/// The changes that wait
#[utoipa::path(get, path = "/api/sync/queue", tag = "sync", params(Limit),
    responses((status = 200, body = Queue),
              (status = "4XX", body = openapi::Problem), (status = "5XX", body = openapi::Problem)))]
async fn queue(
    State(dispatcher): State<Dispatcher>,
    query: Result<Query<Limit>, QueryRejection>,
) -> Answer<Queue> {
    let limit = limit(query)?;
    let handle = dispatcher.handle().clone();
    in_time(async move { handle.queue(limit).await })
        .await
        .map(Json)
}

fn limit(query: Result<Query<Limit>, QueryRejection>) -> Result<u32, ApiError> {
    query
        .ok()
        .map(|Query(query)| query.limit.unwrap_or(20))
        .filter(|limit| (1..=MOST_ENTRIES).contains(limit))
        .ok_or_else(|| {
            let detail = format!("limit must be a whole number from 1 to {MOST_ENTRIES}");
            ApiError::new(StatusCode::BAD_REQUEST, detail)
        })
}

async fn not_found() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "there is nothing at this address")
}

async fn wrong_method() -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "this address doesn't take that method",
    )
}

fn unexpected(outcome: &Outcome) -> ApiError {
    ApiError::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        format!("unexpected answer: {}", outcome.line()),
    )
}

/// Bounds the wait, not the work: a call of the driver must not be dropped half-way.
async fn in_time<T: Send + 'static>(
    work: impl Future<Output = Result<T, CommandError>> + Send + 'static,
) -> Result<T, ApiError> {
    match timeout(ANSWER_TIMEOUT, tokio::spawn(work)).await {
        Ok(Ok(result)) => Ok(result?),
        Ok(Err(_)) => Err(ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the daemon is stopping",
        )),
        Err(_) => Err(ApiError::new(
            StatusCode::GATEWAY_TIMEOUT,
            "no answer in time: the local database may be away; see `sangam status`",
        )),
    }
}

/// For work that takes as long as it takes; it goes on if the caller hangs up.
async fn without_limit<T: Send + 'static>(
    work: impl Future<Output = Result<T, CommandError>> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::spawn(work).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the daemon is stopping",
        )),
    }
}

async fn read(body: Body) -> Result<Bytes, ApiError> {
    match timeout(READ_TIMEOUT, Limited::new(body, MOST_BYTES).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "the body is larger than 1 MiB",
        )),
        Ok(Err(_)) => Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "the body could not be read",
        )),
        Err(_) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "the body did not arrive in time",
        )),
    }
}

#[cfg(test)]
mod body_tests;
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_commands_have_their_status() {
        for (error, expected) in [
            (CommandError::Busy, 409),
            (CommandError::NotConfigured, 503),
            (CommandError::Offline("no internet".into()), 503),
            (CommandError::LocalAway("no server".into()), 503),
            (CommandError::BadRequest("no such collection".into()), 400),
            (CommandError::Failed("broken".into()), 500),
        ] {
            assert_eq!(ApiError::from(error).status.as_u16(), expected);
        }
    }
}
