//! What a look at both sides left for a person.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::build::Refusal;
use crate::config::SchemaSync;
use crate::decide::Side;
use crate::words;

/// What is the matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// Only the other side has it, and by configuration it is not made.
    Missing,
    /// Both sides had it; it was dropped on this one.
    Dropped,
    /// Both sides have it, but not alike.
    Differs,
    /// The database refused to make it.
    Refused,
    /// A TTL index that would delete documents at once.
    WouldExpire,
    /// Options of the collection differ.
    Options,
    /// The timestamp pull has to read whole collections.
    NoPullIndex,
}

/// Something about indexes or options that a person should know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// The collection.
    pub collection: String,
    /// The side where something is missing or refused, if it is one.
    pub side: Option<Side>,
    /// What is the matter.
    pub kind: FindingKind,
    /// Name of the index, if it is about one.
    pub index: Option<String>,
    /// A sentence for a person.
    pub detail: String,
    /// Whether `sangam schema --create` would make it.
    pub can_create: bool,
}

/// An index that is being built, or waits for its turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Building {
    /// The collection.
    pub collection: String,
    /// Where.
    pub side: Side,
    /// Name of the index.
    pub index: String,
}

/// The answer of `sangam schema`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = SchemaReport)]
pub struct Report {
    /// When both sides were last looked at.
    pub checked_at: Option<DateTime<Utc>>,
    /// As configured: `report`, `indexes` or `full`.
    pub sync: SchemaSync,
    /// What is left for a person.
    pub findings: Vec<Finding>,
    /// What is being built.
    pub building: Vec<Building>,
}

impl Default for Report {
    fn default() -> Self {
        Self {
            checked_at: None,
            sync: SchemaSync::Indexes,
            findings: vec![],
            building: vec![],
        }
    }
}

impl Report {
    /// A sentence for `status`, if there is anything to be said. That options differ is no news where
    /// they are not synced.
    pub fn notice(&self) -> Option<String> {
        let counts =
            |f: &&Finding| f.kind != FindingKind::Options || self.sync != SchemaSync::Indexes;
        let found: Vec<&Finding> = self.findings.iter().filter(counts).collect();
        let first = found.first()?;
        let about = match &first.index {
            Some(index) => format!("{}.{index}", first.collection),
            None => first.collection.clone(),
        };
        let more = match found.len() {
            1 => String::new(),
            n => format!(" and {}", words::count(n as u64 - 1, "other finding")),
        };
        Some(format!(
            "indexes or options of the two sides differ: {about}{more}; see `sangam schema`"
        ))
    }
}

/// Findings in the making.
#[derive(Default)]
pub(super) struct Findings {
    pub(super) all: Vec<Finding>,
}

impl Findings {
    pub(super) fn add(
        &mut self,
        collection: String,
        side: Option<Side>,
        kind: FindingKind,
        index: Option<String>,
        detail: String,
    ) {
        let can_create = side.is_some() && index.is_some();
        self.all.push(Finding {
            collection,
            side,
            kind,
            index,
            detail,
            can_create,
        });
    }

    pub(super) fn refused(&mut self, collection: String, refusal: &Refusal) {
        let detail = format!(
            "the {} database refused to build it{}",
            refusal.build.side.name(),
            refusal.why()
        );
        self.add(
            collection,
            Some(refusal.build.side),
            FindingKind::Refused,
            Some(refusal.build.index.name.clone()),
            detail,
        );
    }
}

/// What to do about a server's refusal.
pub(super) fn hint(code: Option<i32>) -> &'static str {
    match code {
        Some(11000) => {
            "; documents there have the same value: make them differ, then `sangam schema --create` \
             tries again (so does the nightly comparison)"
        }
        Some(crate::failure::UNAUTHORIZED) => {
            "; give its user readWrite, and dbAdmin for schema.sync = \"full\""
        }
        Some(85 | 86) => "; another index there is in the way: drop the one that is not wanted",
        Some(67) => "; its documents or options do not allow it",
        _ => "",
    }
}
