//! Resolution: what each strategy makes of a conflict. Pure.
//!
//! A plan is a short list of guarded writes. Each expects the content that was looked at, so a plan
//! that is carried out late changes nothing it has not seen. What a plan leaves open (a renamed
//! document that has to reach the other side, a merge that has to come back) is ordinary work for the
//! worker afterwards.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::decide::{Kind, Merge, Rules, Side};
use crate::key::{Id, Key};
use crate::raw::{self, Writer};
use crate::value::{self, Value};

/// How a conflict is settled.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    Serialize,
    Deserialize,
    clap::ValueEnum,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Strategy {
    /// The local document gets a new unique value; both documents stay.
    RenameLocal,
    /// The local side takes what the remote has.
    KeepRemote,
    /// The remote takes what the local side has.
    KeepLocal,
    /// Both sides get a merge.
    Merge,
}

impl Strategy {
    /// In the order in which they are shown.
    pub const ALL: [Self; 4] = [
        Self::RenameLocal,
        Self::KeepRemote,
        Self::KeepLocal,
        Self::Merge,
    ];

    /// As it is written in commands and records.
    pub fn name(self) -> &'static str {
        match self {
            Self::RenameLocal => "rename_local",
            Self::KeepRemote => "keep_remote",
            Self::KeepLocal => "keep_local",
            Self::Merge => "merge",
        }
    }
}

/// One document on both sides, as contents (sync fields left out).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versions {
    /// Which document.
    pub key: Key,
    /// Its `_id`.
    pub id: Id,
    /// What the local database holds.
    pub local: Option<Vec<u8>>,
    /// What both sides last agreed on.
    pub base: Option<Vec<u8>>,
    /// What the remote holds.
    pub remote: Option<Vec<u8>>,
}

/// A conflict between documents, as it is now.
#[derive(Clone, Debug)]
pub struct Case<'a> {
    /// What kind.
    pub kind: Kind,
    /// Fields in conflict.
    pub fields: &'a [String],
    /// The document of the local side.
    pub mine: &'a Versions,
    /// The other document on the remote that holds the unique value; only for `unique_field`.
    pub theirs: Option<&'a Versions>,
    /// How documents are merged.
    pub rules: Rules<'a>,
}

/// One guarded write of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Which document.
    pub key: Key,
    /// Its `_id`.
    pub id: Id,
    /// Where.
    pub side: Side,
    /// The content that must be there.
    pub expect: Option<Vec<u8>>,
    /// The content it gets.
    pub new: Option<Vec<u8>>,
    /// What base becomes with it.
    pub base_after: Option<Vec<u8>>,
    /// Whether the new content comes from the other side; else it is an edit that has to travel yet.
    pub from_other: bool,
}

/// What a strategy comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The writes, in order. None at all: the conflict has no cause any more.
    pub steps: Vec<Step>,
    /// The content of the local document in the end.
    pub result: Option<Vec<u8>>,
    /// What the document in the way is in the end, where there is one.
    pub other_result: Option<Vec<u8>>,
    /// What happens, for a person.
    pub summary: String,
}

/// Why a strategy can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It does not fit the conflict.
    #[error("{0}")]
    Unfit(String),
    /// A value is missing or wrong.
    #[error("{0}")]
    Value(String),
}

fn unfit(text: impl Into<String>) -> Refusal {
    Refusal::Unfit(text.into())
}

impl Case<'_> {
    /// Whether anything is left to be settled.
    pub fn is_over(&self) -> bool {
        match self.theirs {
            Some(theirs) => self.mine.local.is_none() || theirs.remote.is_none(),
            None => self.mine.local == self.mine.remote,
        }
    }

    /// The value in conflict that a new one has to be like.
    pub fn like(&self, field: &str) -> Option<Value> {
        let other = self.theirs.and_then(|t| t.remote.as_deref());
        [
            self.mine.local.as_deref(),
            self.mine.remote.as_deref(),
            self.mine.base.as_deref(),
            other,
        ]
        .into_iter()
        .flatten()
        .find_map(|doc| value::at_path(doc, field).filter(|v| v.kind != 0x0A))
    }

    /// What a strategy comes to.
    pub fn plan(
        &self,
        strategy: Strategy,
        value: Option<&serde_json::Value>,
    ) -> Result<Plan, Refusal> {
        match (self.theirs, strategy) {
            (Some(theirs), Strategy::KeepRemote) => Ok(self.give_way(theirs)),
            (Some(theirs), Strategy::Merge) if value.is_none() => self.make_one(theirs),
            (Some(theirs), _) => self.rename(theirs, strategy, value),
            (None, Strategy::RenameLocal) => Err(unfit(
                "rename_local is for a unique value that is taken; here, choose keep_local, keep_remote or merge",
            )),
            (None, _) if value.is_some() && strategy != Strategy::Merge => Err(Refusal::Value(
                format!("{} takes no value; merge does", strategy.name()),
            )),
            (None, Strategy::KeepLocal) => Ok(self.keep_local()),
            (None, Strategy::KeepRemote) => Ok(self.keep_remote()),
            (None, Strategy::Merge) => self.merge(value),
        }
    }

    fn keep_local(&self) -> Plan {
        let m = self.mine;
        let summary = match (&m.local, &m.remote) {
            (None, _) => "the document is deleted on the remote side, too",
            (_, None) => "the local document is created again on the remote side",
            _ => "the local version goes to the remote side",
        };
        Plan {
            steps: vec![self.step(Side::Remote, m.local.clone(), m.local.clone())],
            result: m.local.clone(),
            other_result: None,
            summary: summary.into(),
        }
    }

    fn keep_remote(&self) -> Plan {
        let m = self.mine;
        let summary = match (&m.local, &m.remote) {
            (_, None) => "the document is deleted on the local side, too",
            (None, _) => "the remote document is created again on the local side",
            _ => "the remote version comes to the local side",
        };
        Plan {
            steps: vec![self.step(Side::Local, m.remote.clone(), m.remote.clone())],
            result: m.remote.clone(),
            other_result: None,
            summary: summary.into(),
        }
    }

    fn step(&self, side: Side, new: Option<Vec<u8>>, base_after: Option<Vec<u8>>) -> Step {
        let m = self.mine;
        Step {
            key: m.key.clone(),
            id: m.id.clone(),
            side,
            expect: match side {
                Side::Local => m.local.clone(),
                Side::Remote => m.remote.clone(),
            },
            new,
            base_after,
            from_other: true,
        }
    }

    fn merge(&self, value: Option<&serde_json::Value>) -> Result<Plan, Refusal> {
        let m = self.mine;
        let (local, remote) = match (&m.local, &m.remote) {
            (Some(local), Some(remote)) => (local, remote),
            // A deletion has no fields: the document that lives is the merge.
            (Some(_), None) if value.is_none() => return Ok(self.keep_local()),
            (None, Some(_)) if value.is_none() => return Ok(self.keep_remote()),
            _ => return Err(unfit("one side has no document that could take the value")),
        };
        let Some(merge) = Merge::new(m.base.as_deref(), local, remote, self.rules) else {
            return Err(unfit(
                "these documents can't be merged by field (a name comes twice); choose keep_local or keep_remote",
            ));
        };
        let mut merged = merge.merged(remote, Side::Local);
        if let Some(value) = value {
            merged = self.with_value(&merged, value)?;
        }
        if merged == *local {
            return Ok(self.keep_local());
        }
        if merged == *remote {
            return Ok(self.keep_remote());
        }
        Ok(Plan {
            // As everywhere: the remote first, with the local content as base; the rest is a pull.
            steps: vec![self.step(Side::Remote, Some(merged.clone()), m.local.clone())],
            result: Some(merged),
            other_result: None,
            summary: if value.is_some() {
                "both sides get the merged document with that value".into()
            } else {
                "both sides get the merged document; where both changed a field, the local value stays".into()
            },
        })
    }

    /// The document with new values in the fields of the conflict.
    fn with_value(&self, doc: &[u8], new: &serde_json::Value) -> Result<Vec<u8>, Refusal> {
        let given: Vec<(&str, &serde_json::Value)> = match (self.fields, new) {
            ([], _) => {
                return Err(Refusal::Value(
                    "this conflict is not about a field, so it takes no value".into(),
                ));
            }
            ([field], value) => vec![(field.as_str(), value)],
            (fields, serde_json::Value::Object(map))
                if !map.is_empty() && map.keys().all(|k| fields.contains(k)) =>
            {
                map.iter().map(|(k, v)| (k.as_str(), v)).collect()
            }
            // A command line has only texts.
            (fields, serde_json::Value::String(text)) if text.trim_start().starts_with('{') => {
                return match serde_json::from_str(text) {
                    Ok(object @ serde_json::Value::Object(_)) => self.with_value(doc, &object),
                    _ => Err(Refusal::Value(format!(
                        "the value must be JSON with some of the fields {}",
                        fields.join(", ")
                    ))),
                };
            }
            (fields, _) => {
                return Err(Refusal::Value(format!(
                    "the conflict is about several fields ({0}): give the value as JSON, for example {{\"{1}\": …}}",
                    fields.join(", "),
                    fields[0]
                )));
            }
        };
        let mut doc = doc.to_vec();
        for (field, new) in given {
            if field == "_id" {
                return Err(Refusal::Value("an _id can't be changed".into()));
            }
            let typed = Value::like(new, self.like(field).as_ref())
                .map_err(|why| Refusal::Value(format!("{field} {why}")))?;
            doc = value::set_path(&doc, field, &typed);
        }
        Ok(doc)
    }

    /// The local document under a new value; the one in the way stays as it is.
    fn rename(
        &self,
        theirs: &Versions,
        strategy: Strategy,
        value: Option<&serde_json::Value>,
    ) -> Result<Plan, Refusal> {
        let m = self.mine;
        let Some(local) = &m.local else {
            return Err(unfit("the local document is gone"));
        };
        let Some(value) = value else {
            return Err(Refusal::Value(format!(
                "{} needs a new value for {}, since {} is taken: give it with --value (newValue)",
                strategy.name(),
                self.fields.join(" + "),
                if self.fields.len() == 1 {
                    "the present one"
                } else {
                    "the present combination"
                }
            )));
        };
        let renamed = self.with_value(local, value)?;
        if renamed == *local {
            return Err(Refusal::Value(
                "that is the value which is taken; give another one".into(),
            ));
        }
        let mut step = self.step(Side::Local, Some(renamed.clone()), m.base.clone());
        step.from_other = false;
        Ok(Plan {
            steps: vec![step],
            result: Some(renamed),
            other_result: theirs.remote.clone(),
            summary: format!(
                "the local document gets the new value of {}; both documents then exist on both sides",
                self.fields.join(" + ")
            ),
        })
    }

    /// The local side takes the remote's version of its own document, and the one in the way.
    fn give_way(&self, theirs: &Versions) -> Plan {
        let m = self.mine;
        let summary = match &m.remote {
            None => {
                "the local document is removed (it stays in the record, `conflicts undo` puts it back), and the \
                 remote's document with that value comes to the local side"
            }
            Some(_) => {
                "the local document goes back to what the remote has for it, and the remote's document with that \
                 value comes to the local side"
            }
        };
        Plan {
            steps: vec![self.step(Side::Local, m.remote.clone(), m.remote.clone())],
            result: m.remote.clone(),
            other_result: theirs.remote.clone(),
            summary: summary.into(),
        }
    }

    /// Two documents that mean the same thing become one, under the remote's `_id`.
    fn make_one(&self, theirs: &Versions) -> Result<Plan, Refusal> {
        let m = self.mine;
        let (Some(local), Some(remote)) = (&m.local, &theirs.remote) else {
            return Err(unfit("one of the two documents is gone"));
        };
        if m.remote.is_some() || theirs.local.is_some() {
            return Err(unfit(
                "both documents exist on both sides, so they can't become one; choose rename_local or keep_remote",
            ));
        }
        let mut w = Writer::new();
        let mut written = Vec::new();
        for r in raw::elements(remote).map_while(Result::ok) {
            let ours = raw::get(local, r.name).filter(|_| r.name != b"_id");
            w.whole(ours.map_or(r.whole, |e| e.whole));
            written.push(r.name);
        }
        for e in raw::elements(local).map_while(Result::ok) {
            if !written.contains(&e.name) {
                w.whole(e.whole);
            }
        }
        let merged = w.finish();
        let first = Step {
            key: theirs.key.clone(),
            id: theirs.id.clone(),
            side: Side::Remote,
            expect: theirs.remote.clone(),
            new: Some(merged.clone()),
            base_after: theirs.base.clone(),
            from_other: true,
        };
        Ok(Plan {
            steps: vec![first, self.step(Side::Local, None, None)],
            result: None,
            other_result: Some(merged),
            summary:
                "the two documents become one, under the _id of the remote's: the local fields, and those \
                      that only the remote has; what refers to the local _id has to be changed by you"
                    .into(),
        })
    }
}

/// What `auto-resolve` does with a conflict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Auto {
    /// Give the local document a new value.
    Rename(&'static str),
    /// Nothing is in the way any more: let the worker try again.
    Retry,
    /// Take the remote's version.
    KeepRemote(&'static str),
    /// A person has to decide.
    Skip(&'static str),
}

/// A local document younger than this is renamed rather than asked about.
const YOUNG: Duration = Duration::from_secs(3600);

/// The order of the design, section 6. `age`: of the local document, if it tells; `newest`: the side
/// with the later change, if both tell.
pub fn automatic(kind: Kind, age: Option<Duration>, blocked: bool, newest: Option<Side>) -> Auto {
    match kind {
        Kind::UniqueField if age.is_some_and(|age| age < YOUNG) => {
            Auto::Rename("the local document is less than an hour old")
        }
        Kind::UniqueField if !blocked => Auto::Retry,
        Kind::Rejected => {
            Auto::Skip("a database refuses the document; a person has to look at why")
        }
        Kind::CollectionDropped | Kind::MassDelete => {
            Auto::Skip("a whole collection is at stake; a person has to decide")
        }
        _ => match newest {
            Some(Side::Remote) => Auto::KeepRemote("the remote version is the newer one"),
            Some(Side::Local) if kind == Kind::UniqueField => {
                Auto::Rename("the local document is the newer one")
            }
            Some(Side::Local) => Auto::Skip("the local version is the newer one"),
            None => Auto::Skip("the documents do not tell which one is newer"),
        },
    }
}

/// Milliseconds since 1970 at which a document was made: its `createdAt` (or `created_at`), else the
/// time in an ObjectId.
pub fn created_at(doc: &[u8]) -> Option<i64> {
    let field = ["createdAt", "created_at"]
        .into_iter()
        .find_map(|name| crate::decide::millis(&raw::get(doc, name.as_bytes())?));
    field.or_else(|| {
        let id = Id::of(doc).filter(|id| id.kind == 0x07)?;
        let seconds = u32::from_be_bytes(*id.value.first_chunk()?);
        Some(i64::from(seconds) * 1000)
    })
}

#[cfg(test)]
#[path = "resolution_tests.rs"]
mod tests;
