//! What the dashboard is made of, and events for as long as somebody looks.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::{Extension, Json};
use futures::Stream;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::guard::{Caller, Role};
use super::{Answer, ApiError, in_time};
use crate::dispatch::Dispatcher;
use crate::history::History;
use crate::overview::{self, CollectionState, Overview};

/// Pages that may be open at once; each keeps a connection.
const MOST_VIEWERS: usize = 32;
/// How often is looked for a change while somebody looks.
const EVERY: Duration = Duration::from_secs(1);
/// The longest time back, in hours.
const MOST_HOURS: u32 = 24 * 400;

/// Who asks, and what they may do.
#[derive(Serialize, utoipa::ToSchema)]
pub(super) struct Session {
    /// The token's name; `api` without tokens.
    name: String,
    /// `read`, `operate` or `admin`.
    role: String,
}

/// Who the token belongs to, and what it allows
#[utoipa::path(get, path = "/api/sync/session", tag = "dashboard",
    responses((status = 200, body = Session),
              (status = "4XX", body = crate::api::openapi::Problem), (status = "5XX", body = crate::api::openapi::Problem)))]
pub(super) async fn session(Extension(caller): Extension<Caller>) -> Json<Session> {
    let role = match caller.role {
        Role::Read => "read",
        Role::Operate => "operate",
        Role::Admin => "admin",
    };
    Json(Session {
        name: caller.name,
        role: role.into(),
    })
}

/// Status with the figures around it
#[utoipa::path(get, path = "/api/sync/overview", tag = "dashboard",
    responses((status = 200, body = Overview),
              (status = "4XX", body = crate::api::openapi::Problem), (status = "5XX", body = crate::api::openapi::Problem)))]
pub(super) async fn overview(State(dispatcher): State<Dispatcher>) -> Answer<Overview> {
    let handle = dispatcher.handle().clone();
    in_time(async move { overview::take(&handle).await })
        .await
        .map(Json)
}

/// The collections with their counts
#[utoipa::path(get, path = "/api/sync/collections", tag = "dashboard",
    responses((status = 200, body = Vec<CollectionState>),
              (status = "4XX", body = crate::api::openapi::Problem), (status = "5XX", body = crate::api::openapi::Problem)))]
pub(super) async fn collections(
    State(dispatcher): State<Dispatcher>,
) -> Answer<Vec<CollectionState>> {
    let shared = dispatcher.handle().shared().clone();
    in_time(async move { overview::collections(&shared).await })
        .await
        .map(Json)
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Span {
    /// How far back
    #[param(minimum = 1, maximum = 9600, default = 24)]
    hours: Option<u32>,
}

/// Queues, lag and throughput over time, and when the link came and went
#[utoipa::path(get, path = "/api/sync/history", tag = "dashboard", params(Span),
    responses((status = 200, body = History),
              (status = "4XX", body = crate::api::openapi::Problem), (status = "5XX", body = crate::api::openapi::Problem)))]
pub(super) async fn history(
    State(dispatcher): State<Dispatcher>,
    query: Result<Query<Span>, QueryRejection>,
) -> Answer<History> {
    let hours = query
        .ok()
        .map(|Query(q)| q.hours.unwrap_or(24))
        .filter(|hours| (1..=MOST_HOURS).contains(hours))
        .ok_or_else(|| {
            let detail = format!("hours must be a whole number from 1 to {MOST_HOURS}");
            ApiError::new(StatusCode::BAD_REQUEST, detail)
        })?;
    let shared = dispatcher.handle().shared().clone();
    in_time(async move {
        let now = chrono::Utc::now().timestamp();
        let read = shared
            .store
            .call(move |c| crate::history::read(c, hours, now));
        Ok(Json(read.await?))
    })
    .await
}

/// The newest overview, made once a second for all who look, and not at all when nobody does.
pub(super) struct Live {
    newest: watch::Sender<Arc<str>>,
    wanted: Notify,
    ended: CancellationToken,
}

impl Live {
    pub(super) fn new(ended: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            newest: watch::Sender::new("".into()),
            wanted: Notify::new(),
            ended,
        })
    }

    pub(super) async fn run(self: Arc<Self>, dispatcher: Dispatcher) {
        let work = async {
            loop {
                if self.newest.receiver_count() == 0 {
                    self.newest.send_replace("".into());
                    self.wanted.notified().await;
                }
                let handle = dispatcher.handle().clone();
                if let Ok(mut now) = in_time(async move { overview::take(&handle).await }).await {
                    // It changes with every sign of life and tells nothing new.
                    now.status.link.last_check = None;
                    let text: Arc<str> = serde_json::to_string(&now).unwrap_or_default().into();
                    self.newest.send_if_modified(|newest| {
                        let changed = *newest != text;
                        *newest = text;
                        changed
                    });
                }
                tokio::time::sleep(EVERY).await;
            }
        };
        self.ended.run_until_cancelled(work).await;
    }
}

/// The overview whenever it changes, as server-sent events
#[utoipa::path(get, path = "/api/sync/events", tag = "dashboard",
    responses((status = 200, description = "Each event's data is an overview", content_type = "text/event-stream", body = crate::api::openapi::Live),
              (status = "4XX", body = crate::api::openapi::Problem), (status = "5XX", body = crate::api::openapi::Problem)))]
pub(super) async fn events(
    Extension(live): Extension<Arc<Live>>,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    // The browser would keep the events from another site's page, but not spare us the connection.
    let from_elsewhere = headers
        .get("sec-fetch-site")
        .is_some_and(|site| site != "same-origin" && site != "none");
    if from_elsewhere {
        let detail = "requests from the pages of other sites are refused";
        return Err(ApiError::new(StatusCode::FORBIDDEN, detail));
    }
    if live.newest.receiver_count() >= MOST_VIEWERS {
        let detail = "too many dashboards are open; close one";
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, detail));
    }
    let mut newest = live.newest.subscribe();
    newest.mark_changed();
    live.wanted.notify_one();
    let each = futures::stream::unfold((newest, live), |(mut newest, live)| async move {
        loop {
            live.ended
                .run_until_cancelled(newest.changed())
                .await?
                .ok()?;
            let text = newest.borrow_and_update().clone();
            if !text.is_empty() {
                return Some((Ok(Event::default().data(&*text)), (newest, live)));
            }
        }
    });
    Ok(Sse::new(each).keep_alive(KeepAlive::default()))
}
