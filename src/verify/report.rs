//! What a verify is asked, and what it answers.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize};

/// What to verify, and how fast.
#[derive(Clone, Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Request {
    /// Only these collections; all without it.
    #[serde(default)]
    pub collections: Option<Vec<String>>,
    /// Begin anew instead of going on with one that was interrupted.
    #[serde(default)]
    pub fresh: bool,
    /// Read no more documents a second than this, of both sides together counted once.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 10)]
    pub max_documents_per_second: Option<u64>,
    /// Read no more bytes a second than this, of both sides together.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 4096)]
    pub max_bytes_per_second: Option<u64>,
}

impl Request {
    /// Whether the limits let a verify come to an end at all.
    pub fn is_reasonable(&self) -> bool {
        self.max_documents_per_second.is_none_or(|n| n >= 10)
            && self.max_bytes_per_second.is_none_or(|n| n >= 4096)
    }
}

/// A whole number, in JSON also written as `5.0`.
fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let number = Option::<serde_json::Number>::deserialize(deserializer)?;
    number
        .map(|n| {
            let real = n.as_f64().filter(|n| n.fract() == 0.0 && *n >= 0.0);
            n.as_u64()
                .or_else(|| real.map(|n| n as u64))
                .filter(|n| i64::try_from(*n).is_ok())
                .ok_or_else(|| serde::de::Error::custom("a limit must be a whole number"))
        })
        .transpose()
}

/// What came of it for one collection.
#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Tally {
    /// Its name.
    pub collection: String,
    /// Documents compared.
    pub documents: u64,
    /// Bytes read from both sides.
    pub bytes: u64,
    /// Documents that only the local side has.
    pub only_local: u64,
    /// Documents that only the remote has.
    pub only_remote: u64,
    /// Documents whose content differs.
    pub different: u64,
    /// Documents that differ because a change is on its way.
    pub waiting: u64,
    /// Documents that differ because they are in conflict.
    pub in_conflict: u64,
    /// Documents that differ because a side refuses them.
    pub set_aside: u64,
    /// Documents that one side let go of by itself (TTL, capped collections) and the other keeps: no
    /// difference (R15).
    #[serde(default)]
    pub expired: u64,
    /// It was left out: it waits for a person's word.
    pub held: bool,
}

impl Tally {
    pub(super) fn add(&mut self, other: &Self) {
        self.documents += other.documents;
        self.bytes += other.bytes;
        self.only_local += other.only_local;
        self.only_remote += other.only_remote;
        self.different += other.different;
        self.waiting += other.waiting;
        self.in_conflict += other.in_conflict;
        self.set_aside += other.set_aside;
        self.expired += other.expired;
        self.held |= other.held;
    }

    /// Differences that nothing explains.
    pub fn differences(&self) -> u64 {
        self.only_local + self.only_remote + self.different
    }

    /// Differences that are known about.
    pub fn known(&self) -> u64 {
        self.waiting + self.in_conflict + self.set_aside
    }
}

/// A difference that nothing explains.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Difference {
    /// Its collection.
    pub collection: String,
    /// `_id` as extended JSON.
    #[schema(value_type = Value)]
    pub id: serde_json::Value,
    /// `only_local`, `only_remote` or `different`.
    pub kind: String,
    /// What a repair would do: `push`, `pull`, `delete_remote`, `delete_local`, `merge` or `conflict`.
    pub repair: String,
}

/// What came of a verify.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = VerifyReport)]
pub struct Report {
    /// Whether both sides are proven equal, but for what is known to wait.
    pub equal: bool,
    /// When it began.
    pub started: DateTime<Utc>,
    /// When it ended.
    pub ended: DateTime<Utc>,
    /// It went on with one that was interrupted.
    pub resumed: bool,
    /// Sums over all collections.
    pub total: Tally,
    /// By collection.
    pub collections: Vec<Tally>,
    /// The first differences, at most 1,000.
    pub differences: Vec<Difference>,
}

/// The last time both sides were proven equal.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Proof {
    /// When the verify ended.
    pub at: DateTime<Utc>,
    /// Documents compared.
    pub documents: u64,
    /// Documents that differed, but were known to wait.
    pub waiting: u64,
}

/// The last verify in short.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Last {
    /// When it ended.
    pub at: DateTime<Utc>,
    /// Whether both sides were equal, but for what was known to wait.
    pub equal: bool,
    /// Documents compared.
    pub documents: u64,
    /// Differences that nothing explains.
    pub differences: u64,
    /// Differences that are known about.
    pub waiting: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_whole_numbers_however_they_are_written() {
        let limit = |text: &str| {
            let body = format!("{{\"maxBytesPerSecond\": {text}}}");
            serde_json::from_str::<Request>(&body).map(|r| r.max_bytes_per_second)
        };
        assert_eq!(limit("6513.0").unwrap(), Some(6513));
        assert_eq!(limit("null").unwrap(), None);
        for bad in ["-1", "0.5", "\"7\"", "1e30", "9223372036854775808"] {
            assert!(limit(bad).is_err(), "{bad}");
        }
    }
}
