//! What both databases hold: clocks, unique values, the fields that Sangam goes by.

use bson::{Document, doc};
use serde_json::json;

use super::Report;
use super::server::Server;
use crate::client::Client;
use crate::command::Status;
use crate::config::Config;
use crate::schema;

/// A larger skew warns, in ms.
const SKEW_MS: i64 = 60_000;
/// Documents of a collection that are looked at.
const SAMPLE: i64 = 200;

pub(super) fn clocks(report: &mut Report, local: &Server, remote: &Server) {
    let ours = local.hello.clock_offset_ms;
    let skew = remote.hello.clock_offset_ms - ours;
    if skew.abs() > SKEW_MS {
        report.warn(
            "clocks",
            format!("the two servers' clocks are {} s apart", skew.abs() / 1000),
            "the policy `newest_wins` goes by them; Sangam corrects for it, but apps that compare times do not",
            ["timedatectl set-ntp true"],
        );
    } else {
        report.good(
            "clocks",
            format!("the two servers' clocks are {} ms apart", skew.abs()),
        );
    }
}

/// The first batch of a command that answers with a cursor.
async fn batch(server: &Server, db: &str, command: Document) -> Vec<Document> {
    let Ok(reply) = server.endpoint.run_doc(db, command).await else {
        return vec![];
    };
    let batch = reply
        .get_document("cursor")
        .and_then(|c| c.get_array("firstBatch"));
    let found = batch.into_iter().flatten();
    found.filter_map(|d| d.as_document().cloned()).collect()
}

/// Whether each field of `[unique_fields]` has a unique index on both sides.
pub(super) async fn unique(
    report: &mut Report,
    config: &Config,
    local: Option<&Server>,
    remote: Option<&Server>,
) {
    for server in [local, remote].into_iter().flatten() {
        let side = server.endpoint.side.name();
        for (coll, fields) in &config.unique_fields {
            let db = &config.databases[0];
            let indexes = batch(server, db, doc! {"listIndexes": coll}).await;
            for field in fields {
                let has = indexes.iter().any(|index| {
                    let keys = index.get_document("key");
                    index.get_bool("unique").unwrap_or(false)
                        && keys.is_ok_and(|k| k.len() == 1 && k.contains_key(field))
                });
                if has {
                    report.good(
                        "indexes",
                        format!("{coll}.{field} is unique on the {side} side"),
                    );
                } else {
                    report.warn(
                        "indexes",
                        format!("{coll}.{field} has no unique index on the {side} side"),
                        "Sangam tells of a value taken twice, but an app there may still write one",
                        [format!(
                            "mongosh {db} --eval 'db.getCollection({coll:?}).createIndex({{{field:?}: 1}}, {{unique: true}})'"
                        )],
                    );
                }
            }
        }
    }
}

/// Whether documents have the field by which the app says when it changed them.
pub(super) async fn stamps(
    report: &mut Report,
    config: &Config,
    local: Option<&Server>,
    remote: Option<&Server>,
) {
    let field = &config.fields.updated_at;
    for server in [local, remote].into_iter().flatten() {
        let side = server.endpoint.side.name();
        let mut lacking = Vec::new();
        for db in &config.databases {
            let list =
                doc! {"listCollections": 1, "filter": {"type": "collection"}, "nameOnly": true};
            for coll in batch(server, db, list).await {
                let Ok(name) = coll.get_str("name") else {
                    continue;
                };
                if crate::shared::OWN_COLLECTIONS.contains(&name) || name.starts_with("system.") {
                    continue;
                }
                let command = doc! {"aggregate": name, "cursor": {}, "pipeline": [
                    {"$sample": {"size": SAMPLE}},
                    {"$match": {field: {"$not": {"$type": "date"}}}},
                    {"$count": "n"},
                ]};
                if !batch(server, db, command).await.is_empty() {
                    lacking.push(format!("{db}.{name}"));
                }
            }
        }
        if lacking.is_empty() {
            report.good(
                "documents",
                format!("documents on the {side} side have {field}"),
            );
        } else {
            report.warn(
                "documents",
                format!("on the {side} side, documents without a date in {field}: {}", lacking.join(", ")),
                "`newest_wins` can't tell which version is newer, and where the remote has no change stream, such a change is seen by the nightly comparison only",
                [format!("let the app set {field} on every write, or name its own field in [fields] updated_at")],
            );
        }
    }
}

/// What the daemon knows of indexes and options.
pub(super) async fn schema(report: &mut Report, client: &Client) {
    let asked = json!({ "create": false });
    let Ok(found) = client
        .post::<schema::Report>("/api/sync/schema", Some(asked))
        .await
    else {
        return;
    };
    if found.findings.is_empty() {
        report.good("indexes", "both sides have the same indexes");
    }
    for finding in found.findings {
        let fix = match finding.can_create {
            true => "sangam schema --create",
            false => "sangam schema",
        };
        let index = finding
            .index
            .map_or(String::new(), |index| format!(".{index}"));
        report.warn(
            "indexes",
            format!("{}{index}: {}", finding.collection, finding.detail),
            "what one side enforces or finds fast, the other does not",
            [fix],
        );
    }
}

/// Documents that a side refuses.
pub(super) fn refused(report: &mut Report, status: Option<&Status>) {
    let Some(status) = status else { return };
    if status.failed_documents > 0 {
        report.warn(
            "documents",
            format!(
                "{} set aside: a database refuses them",
                crate::words::count(status.failed_documents, "document")
            ),
            "they stay on one side only until the cause is gone",
            ["sangam queue", "sangam conflicts"],
        );
    } else {
        report.good("documents", "no document is refused");
    }
}
