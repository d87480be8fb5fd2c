//! The HTTP API: JSON over axum. Errors are `{"detail": "..."}` with the right status.
//!
//! Who may ask: with a token, whoever knows it. Without one the address is loopback only (the
//! configuration refuses anything else), and a request must be addressed to loopback by name, so that
//! a web page in the administrator's browser can't reach it by DNS rebinding. A request that changes
//! something is refused when the browser says that another site's page made it.

mod guard;

use std::sync::Arc;
use std::time::Duration;

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
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::command::{Command, CommandError, NetworkStatus, Queue, Status, SyncRun};
use crate::config::Policy;
use crate::dispatch::{Dispatcher, Outcome};

/// Largest request body.
const MOST_BYTES: usize = 1 << 20;
/// Time for a request's headers, and again for its body.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for an answer, but for `sync` and `reconcile`, which take as long as they take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for answers that are being written when the daemon stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// More connections than this wait.
const MOST_CONNECTIONS: usize = 128;
/// Highest `limit` that may be asked for.
const MOST_ENTRIES: u32 = 1000;

/// Serves until cancelled.
pub async fn serve(
    listener: TcpListener,
    dispatcher: Dispatcher,
    guard: Guard,
    cancel: CancellationToken,
) -> std::io::Result<()> {
    let router = router(dispatcher, guard);
    let slots = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            break;
        };
        let accepted = tokio::select! {
            biased;
            () = cancel.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        while connections.try_join_next().is_some() {}
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, mostly; it passes.
                tracing::warn!(%error, "the API can't take a connection");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let (service, cancel) = (TowerToHyperService::new(router.clone()), cancel.clone());
        connections.spawn(async move {
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(READ_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            let mut connection = std::pin::pin!(connection);
            // An error here is a client that hung up.
            tokio::select! {
                _ = connection.as_mut() => {}
                () = cancel.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    let _ = timeout(STOP_TIMEOUT, connection).await;
                }
            }
            drop(slot);
        });
    }
    while connections.join_next().await.is_some() {}
    Ok(())
}

pub use guard::Guard;

fn router(dispatcher: Dispatcher, guard: Guard) -> Router {
    let guarded = Router::new()
        .route("/api/sync/sync", post(sync))
        .route("/api/sync/reconcile", post(reconcile))
        .route("/api/sync/pause", post(pause))
        .route("/api/sync/resume", post(resume))
        .route("/api/sync/status", get(status))
        .route("/api/sync/network-status", get(network_status))
        .route("/api/sync/logs", get(logs))
        .route("/api/sync/queue", get(queue))
        .route("/api/sync/config", get(config))
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(
            Arc::new(guard),
            guard::check,
        ));
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .method_not_allowed_fallback(wrong_method)
        .merge(guarded)
        .with_state(dispatcher)
}

/// An answer that is an error.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    detail: String,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self {
            status,
            detail: detail.into(),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(json!({ "detail": self.detail }))).into_response();
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
            CommandError::NotConfigured | CommandError::Offline(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            CommandError::BadRequest(_) => StatusCode::BAD_REQUEST,
            CommandError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.to_string())
    }
}

type Answer<T> = Result<Json<T>, ApiError>;

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct SyncRequest {
    #[serde(default)]
    collections: Option<Vec<String>>,
}

async fn sync(State(dispatcher): State<Dispatcher>, body: Body) -> Answer<SyncRun> {
    let bytes = read(body).await?;
    let request = parse(&bytes).map_err(|error| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the body must be {{\"collections\": [\"NAME\", ...]}} or empty: {error}"),
        )
    })?;
    let collections = request.collections.unwrap_or_default();
    run(dispatcher, Command::Sync { collections }).await
}

fn parse(bytes: &[u8]) -> serde_json::Result<SyncRequest> {
    if bytes.trim_ascii().is_empty() {
        return Ok(SyncRequest::default());
    }
    // By way of an object: serde takes a list for a struct, too.
    let object: serde_json::Map<String, Value> = serde_json::from_slice(bytes)?;
    serde_json::from_value(Value::Object(object))
}

async fn reconcile(State(dispatcher): State<Dispatcher>) -> Answer<SyncRun> {
    run(dispatcher, Command::Reconcile).await
}

async fn run(dispatcher: Dispatcher, command: Command) -> Answer<SyncRun> {
    tracing::info!(?command, "API");
    match dispatcher.execute(command).await? {
        Outcome::Run(run) => Ok(Json(*run)),
        other => Err(unexpected(&other)),
    }
}

async fn pause(State(dispatcher): State<Dispatcher>) -> Answer<Value> {
    done(dispatcher, Command::Pause).await
}

async fn resume(State(dispatcher): State<Dispatcher>) -> Answer<Value> {
    done(dispatcher, Command::Resume).await
}

async fn done(dispatcher: Dispatcher, command: Command) -> Answer<Value> {
    tracing::info!(?command, "API");
    let outcome = in_time(async move { dispatcher.execute(command).await }).await?;
    Ok(Json(json!({ "success": true, "message": outcome.line() })))
}

async fn status(State(dispatcher): State<Dispatcher>) -> Answer<Status> {
    match in_time(async move { dispatcher.execute(Command::Status).await }).await? {
        Outcome::Status(status) => Ok(Json(*status)),
        other => Err(unexpected(&other)),
    }
}

async fn network_status(State(dispatcher): State<Dispatcher>) -> Json<NetworkStatus> {
    Json(dispatcher.handle().network_status())
}

#[derive(Deserialize)]
struct Limit {
    limit: Option<u32>,
}

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

async fn config(State(dispatcher): State<Dispatcher>) -> Json<Value> {
    let config = dispatcher.config();
    let minutes = config.pull.interval.as_secs_f64() / 60.0;
    let strategy: Policy = config.sync.conflict_resolution_strategy;
    Json(json!({
        "autoSyncEnabled": config.sync.auto_sync_enabled,
        "syncIntervalMinutes": if minutes.fract() == 0.0 { json!(minutes as u64) } else { json!(minutes) },
        "conflictResolutionStrategy": strategy,
        "collectionsToSync": config.sync.collections,
        "maxRetries": config.sync.max_retries,
        "batchSize": config.sync.batch_size,
    }))
}

async fn healthz(State(dispatcher): State<Dispatcher>) -> Response {
    health(
        dispatcher.handle().is_alive(),
        "alive",
        "an event loop is stuck",
    )
}

async fn readyz(State(dispatcher): State<Dispatcher>) -> Response {
    health(
        dispatcher.handle().is_capturing(),
        "capturing",
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
mod tests {
    use super::*;

    #[test]
    fn errors_of_commands_have_their_status() {
        for (error, expected) in [
            (CommandError::Busy, 409),
            (CommandError::NotConfigured, 503),
            (CommandError::Offline("no internet".into()), 503),
            (CommandError::BadRequest("no such collection".into()), 400),
            (CommandError::Failed("broken".into()), 500),
        ] {
            assert_eq!(ApiError::from(error).status.as_u16(), expected);
        }
    }
}
