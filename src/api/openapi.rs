//! The API's description, made from the handlers.

use axum::Json;
use serde::Serialize;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi, ToSchema};

/// An error.
#[derive(Serialize, ToSchema)]
pub(crate) struct Problem {
    /// What is wrong, and what to do about it.
    detail: String,
    /// The new state of a conflict that changed since it was shown.
    #[schema(value_type = Option<Object>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    conflict: Option<serde_json::Value>,
}

/// A conflict; documents and values as relaxed extended JSON.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Conflict {
    #[serde(rename = "_id")]
    id: String,
    collection: String,
    kind: crate::decide::Kind,
    #[schema(value_type = Value)]
    local_id: serde_json::Value,
    #[schema(value_type = Value)]
    remote_id: serde_json::Value,
    /// The field in conflict; several with commas between.
    field: Option<String>,
    #[schema(value_type = Value)]
    local_value: serde_json::Value,
    #[schema(value_type = Value)]
    remote_value: serde_json::Value,
    timestamp: chrono::DateTime<chrono::Utc>,
    resolved: bool,
    resolution_strategy: Option<String>,
    resolved_at: Option<chrono::DateTime<chrono::Utc>>,
    resolved_by: Option<String>,
    notes: Option<String>,
    /// Tells states of the conflict apart; give it back with `resolve`.
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    /// What the local side had; of a resolved conflict, what it had then.
    #[schema(value_type = Option<Object>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    local_document: Option<serde_json::Value>,
    /// The same of the remote side.
    #[schema(value_type = Option<Object>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    remote_document: Option<serde_json::Value>,
    /// What both last agreed on.
    #[schema(value_type = Option<Object>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    base_document: Option<serde_json::Value>,
    /// Documents too large for a list; the conflict's own address has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    left_out: Option<Vec<String>>,
    /// What can be done about an open one, the best first.
    #[serde(skip_serializing_if = "Option::is_none")]
    recommendations: Option<Vec<crate::advice::Advice>>,
}

/// A conflict in detail.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ConflictDetail {
    #[serde(flatten)]
    conflict: Conflict,
    /// Side by side, field by field.
    #[serde(skip_serializing_if = "Option::is_none")]
    fields: Option<Vec<FieldOfThree>>,
    /// What each side changed against base.
    #[serde(skip_serializing_if = "Option::is_none")]
    changes: Option<Changes>,
    /// What each strategy would come to.
    #[serde(skip_serializing_if = "Option::is_none")]
    strategies: Option<Vec<Preview>>,
}

/// A field on both sides and in base.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct FieldOfThree {
    name: String,
    #[schema(value_type = Value)]
    local: serde_json::Value,
    #[schema(value_type = Value)]
    base: serde_json::Value,
    #[schema(value_type = Value)]
    remote: serde_json::Value,
    differs: bool,
    /// `local`, `remote`, `both` or `none`
    changed_by: String,
}

/// What each side changed.
#[derive(Serialize, ToSchema)]
pub(crate) struct Changes {
    local: Change,
    remote: Change,
}

/// What one side changed, when, and who, as far as the document tells.
#[derive(Serialize, ToSchema)]
pub(crate) struct Change {
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deleted: Option<bool>,
    fields: Vec<String>,
    at: Option<String>,
    #[schema(value_type = Value)]
    by: serde_json::Value,
}

/// What a strategy would come to.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Preview {
    strategy: crate::resolution::Strategy,
    possible: bool,
    needs_value: bool,
    suggested_value: Option<String>,
    summary: String,
    #[schema(value_type = Option<Object>)]
    result: Option<serde_json::Value>,
}

/// The settings in force.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SyncConfig {
    auto_sync_enabled: bool,
    sync_interval_minutes: f64,
    conflict_resolution_strategy: String,
    collections_to_sync: Vec<String>,
    max_retries: u32,
    batch_size: u32,
    collections_first: Vec<String>,
    collections_last: Vec<String>,
    /// Settings that were changed over the API and go before the file; only if there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    changed_here: Option<Vec<String>>,
}

/// A pattern of collection names.
#[derive(Serialize, ToSchema)]
#[schema(pattern = r"^[\s\S]+$")]
pub(crate) struct Pattern(String);

/// Settings to change; `null` goes back to the file's.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct SyncConfigChange {
    auto_sync_enabled: Option<bool>,
    #[schema(minimum = 0.016_666_7, maximum = 1440)]
    sync_interval_minutes: Option<f64>,
    conflict_resolution_strategy: Option<crate::config::Policy>,
    #[schema(min_items = 1, max_items = 1000)]
    collections_to_sync: Option<Vec<Pattern>>,
    #[schema(minimum = 0, maximum = 1000)]
    max_retries: Option<u32>,
    #[schema(minimum = 1, maximum = 10000)]
    batch_size: Option<u32>,
    #[schema(max_items = 1000)]
    collections_first: Option<Vec<Pattern>>,
    #[schema(max_items = 1000)]
    collections_last: Option<Vec<Pattern>>,
}

/// `{"success": true, "message": …}`
#[derive(Serialize, ToSchema)]
pub(crate) struct Done {
    success: bool,
    message: String,
}

/// A server-sent event.
#[derive(Serialize, ToSchema)]
pub(crate) struct Live {
    /// An overview, as JSON.
    data: String,
}

/// `{"status": …}`
#[derive(Serialize, ToSchema)]
pub(crate) struct Health {
    status: String,
}

struct Token;

impl Modify for Token {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        api.components
            .get_or_insert_default()
            .add_security_scheme("token", SecurityScheme::Http(scheme));
    }
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Sangam", description = "Keeps a local MongoDB database and a remote one equal, both ways."),
    paths(
        super::sync, super::reconcile, super::pause, super::resume, super::status, super::network_status,
        super::logs, super::queue, super::health::healthz, super::health::readyz, super::health::metrics,
        super::survey::verify, super::survey::last_verify, super::survey::repair, super::survey::plan,
        super::survey::adopt,
        super::dashboard::session, super::dashboard::overview, super::dashboard::collections,
        super::dashboard::history, super::dashboard::events,
        super::settings::config, super::settings::set_config,
        super::schema::report, super::schema::make,
        super::conflicts::list, super::conflicts::show, super::conflicts::resolve, super::conflicts::undo,
        super::conflicts::resolve_many, super::conflicts::auto_resolve
    ),
    modifiers(&Token),
    security(("token" = []))
)]
struct Api;

/// The description of the API.
pub fn described() -> utoipa::openapi::OpenApi {
    Api::openapi()
}

pub(super) async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(described())
}
