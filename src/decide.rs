//! The decision: what to do with one document key, from its three contents. Pure.
//!
//! `decide` is total and deterministic; swapping the sides swaps the answer; whatever it answers,
//! carried out on both sides, leaves them equal or held. The property tests below say so.

use crate::config::Policy;
use crate::content::{self, Diff};
use crate::raw::{self, Element};
use crate::rules::{self, Combined, FieldRules, Three};

/// One of the two databases.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// On the premises.
    Local,
    /// In the cloud.
    Remote,
}

impl Side {
    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::Local => Self::Remote,
            Self::Remote => Self::Local,
        }
    }

    /// `local` or `remote`, as in the `origin` field.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Remote => "remote",
        }
    }
}

/// Contents (sync fields left out) of one document key; `None` is "no such document".
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// What the local database holds.
    pub local: Option<&'a [u8]>,
    /// What both sides last agreed on.
    pub base: Option<&'a [u8]>,
    /// What the remote holds.
    pub remote: Option<&'a [u8]>,
}

/// What settles a clash.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// The policy of the collection.
    pub policy: Policy,
    /// Name of the `updatedAt` field: merged by the later value, never a conflict by itself.
    pub updated_at: &'a str,
    /// Remote clock minus local clock in milliseconds; only breaks ties of `newest_wins` (R17).
    pub skew_ms: i64,
    /// Neither side has ever been synced: the newer `updatedAt` wins even under `manual`.
    pub first_sync: bool,
    /// Rules of the collection for single fields.
    pub fields: Option<&'a FieldRules>,
    /// Base may lag behind what both sides agreed on: where they are equal, they did.
    pub base_may_lag: bool,
}

/// Kind of a conflict, as recorded.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    serde::Serialize,
    serde::Deserialize,
    clap::ValueEnum,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Kind {
    /// Both sides changed the same field.
    BothModified,
    /// Both sides created the same `_id` differently.
    InsertInsert,
    /// One side deleted what the other changed.
    DeleteUpdate,
    /// A unique value is taken by another document.
    UniqueField,
    /// A side refuses the document (validator, size, rights).
    Rejected,
    /// A collection or database was dropped or renamed.
    CollectionDropped,
    /// Too large a share of a collection was deleted at once.
    MassDelete,
    /// One of the databases was made equal to the other (`reconcile --adopt`); never open.
    Adopted,
}

impl Kind {
    /// As it is stored and shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::BothModified => "both_modified",
            Self::InsertInsert => "insert_insert",
            Self::DeleteUpdate => "delete_update",
            Self::UniqueField => "unique_field",
            Self::Rejected => "rejected",
            Self::CollectionDropped => "collection_dropped",
            Self::MassDelete => "mass_delete",
            Self::Adopted => "adopted",
        }
    }
}

/// A clash that has to be put on record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clash {
    /// What kind.
    pub kind: Kind,
    /// Top-level fields in conflict; empty for a deletion or documents that can't be compared by field.
    pub fields: Vec<String>,
}

/// The content both sides shall have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// What the local side has (push).
    Local,
    /// What the remote has (pull).
    Remote,
    /// A merge that neither has yet.
    Merged(Vec<u8>),
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Both sides are equal; base becomes that content.
    Agree,
    /// Bring both sides to the target; the clash, if any, is recorded as settled by policy.
    Settle(Target, Option<Clash>),
    /// Touch neither side; the clash waits for a person.
    Hold(Clash),
}

/// Decides one document key. See the table in the design, section 2.
pub fn decide(view: View<'_>, rules: Rules<'_>) -> Decision {
    let View {
        local,
        base,
        remote,
    } = view;
    if local == remote {
        return both_alike(view, rules);
    }
    if local == base {
        return Decision::Settle(Target::Remote, None);
    }
    if remote == base {
        return Decision::Settle(Target::Local, None);
    }
    match (local, remote) {
        (Some(local), Some(remote)) => both_exist(local, base, remote, rules),
        // Only one of the two is a deletion here: equal sides were answered above.
        _ => deletion_against_update(local.is_some(), rules),
    }
}

/// Both sides hold the same. They agree, unless both did the same and a rule counts that twice.
fn both_alike(view: View<'_>, rules: Rules<'_>) -> Decision {
    let (Some(both), Some(base), Some(fields)) = (view.local, view.base, rules.fields) else {
        return Decision::Agree;
    };
    if both == base || rules.base_may_lag || !fields.values().any(|rule| rule.adds()) {
        return Decision::Agree;
    }
    match Merge::new(Some(base), both, both, rules) {
        Some(merge) => match merge.target(both, both, Side::Remote) {
            Target::Merged(merged) => Decision::Settle(Target::Merged(merged), None),
            Target::Local | Target::Remote => Decision::Agree,
        },
        None => Decision::Agree,
    }
}

fn deletion_against_update(local_lives: bool, rules: Rules<'_>) -> Decision {
    let survivor = if local_lives {
        Target::Local
    } else {
        Target::Remote
    };
    let target = match rules.policy {
        Policy::LocalWins => Target::Local,
        Policy::RemoteWins => Target::Remote,
        // A deletion carries no time, so the update is kept; both bodies are on record.
        Policy::Manual | Policy::NewestWins => survivor,
    };
    Decision::Settle(
        target,
        Some(Clash {
            kind: Kind::DeleteUpdate,
            fields: vec![],
        }),
    )
}

fn both_exist(local: &[u8], base: Option<&[u8]>, remote: &[u8], rules: Rules<'_>) -> Decision {
    let kind = if base.is_some() {
        Kind::BothModified
    } else {
        Kind::InsertInsert
    };
    let winner = winner(local, remote, rules);
    let Some(merge) = Merge::new(base, local, remote, rules) else {
        // Duplicate names or bytes that can't be walked: the documents are compared whole.
        let clash = Clash {
            kind,
            fields: vec![],
        };
        return match winner {
            Some(Side::Local) => Decision::Settle(Target::Local, Some(clash)),
            Some(Side::Remote) => Decision::Settle(Target::Remote, Some(clash)),
            None => Decision::Hold(clash),
        };
    };
    let fields = merge.clashing_names();
    if fields.is_empty() {
        return Decision::Settle(merge.target(local, remote, Side::Remote), None);
    }
    let clash = Clash { kind, fields };
    match winner {
        Some(side) => Decision::Settle(merge.target(local, remote, side), Some(clash)),
        None => Decision::Hold(clash),
    }
}

fn winner(local: &[u8], remote: &[u8], rules: Rules<'_>) -> Option<Side> {
    match rules.policy {
        Policy::LocalWins => Some(Side::Local),
        Policy::RemoteWins => Some(Side::Remote),
        Policy::Manual if !rules.first_sync => None,
        Policy::Manual => Some(newest(local, remote, rules)?),
        Policy::NewestWins => newest(local, remote, rules),
    }
}

/// The side with the later `updatedAt`, skew corrected; a tie goes to the remote, which all sites
/// share. `None` when either has none: guessing would lose a version to a wrong clock.
fn newest(local: &[u8], remote: &[u8], rules: Rules<'_>) -> Option<Side> {
    let name = rules.updated_at.as_bytes();
    let (l, r) = (
        millis(&raw::get(local, name)?)?,
        millis(&raw::get(remote, name)?)?,
    );
    Some(if l > r.saturating_sub(rules.skew_ms) {
        Side::Local
    } else {
        Side::Remote
    })
}

/// A date in milliseconds since 1970: a BSON date, or the text of one (RFC 3339).
pub fn millis(e: &Element<'_>) -> Option<i64> {
    match e.kind {
        0x09 => Some(i64::from_le_bytes(e.value.try_into().ok()?)),
        0x02 => chrono::DateTime::parse_from_rfc3339(raw::text(e)?)
            .ok()
            .map(|t| t.timestamp_millis()),
        _ => None,
    }
}

/// A three-way merge by top-level field.
pub struct Merge<'a> {
    ours: Diff<'a>,
    /// Names that both sides changed differently, `updatedAt` left out.
    clashing: Vec<&'a [u8]>,
    /// What rules made of fields that both sides changed.
    combined: Vec<(&'a [u8], Combined)>,
    updated_at: Option<Side>,
    updated_at_name: &'a [u8],
}

impl<'a> Merge<'a> {
    /// `None` when the contents can't be taken apart by field.
    pub fn new(
        base: Option<&'a [u8]>,
        local: &'a [u8],
        remote: &'a [u8],
        rules: Rules<'a>,
    ) -> Option<Self> {
        const NOTHING: &[u8] = &[5, 0, 0, 0, 0];
        let has_base = base.is_some();
        let base = base.unwrap_or(NOTHING);
        if [base, local, remote]
            .into_iter()
            .any(content::has_duplicates)
        {
            return None;
        }
        let (ours, theirs) = (
            content::diff(base, local).ok()?,
            content::diff(base, remote).ok()?,
        );
        let updated_at_name = rules.updated_at.as_bytes();
        let mut clashing = Vec::new();
        let mut combined = Vec::new();
        let mut later = None;
        for name in local_names(&ours) {
            if !theirs.names().any(|n| n == name) {
                continue;
            }
            let rule = rules
                .fields
                .and_then(|fields| fields.get(std::str::from_utf8(name).ok()?));
            let three = Three {
                local: raw::get(local, name),
                base: raw::get(base, name),
                remote: raw::get(remote, name),
                has_base,
                newest: newest(local, remote, rules),
            };
            if content::agree_on(local, remote, [name]) {
                // Two sales of one each are two. (A field that is new on both sides was set up there.)
                let twice =
                    rule.filter(|rule| rule.adds() && three.base.is_some() && !rules.base_may_lag);
                let both = twice.and_then(|rule| rules::combine(*rule, three));
                combined.extend(both.map(|value| (name, value)));
                continue;
            }
            if name == updated_at_name {
                let at = |d| raw::get(d, name).and_then(|e| millis(&e));
                // No date on either side: the remote's, which all sites share.
                later = Some(if at(local) > at(remote) {
                    Side::Local
                } else {
                    Side::Remote
                });
                continue;
            }
            match rule.and_then(|rule| rules::combine(*rule, three)) {
                Some(value) => combined.push((name, value)),
                None => clashing.push(name),
            }
        }
        Some(Self {
            ours,
            clashing,
            combined,
            updated_at: later,
            updated_at_name,
        })
    }

    /// Names of the fields in conflict.
    pub fn clashing_names(&self) -> Vec<String> {
        self.clashing
            .iter()
            .map(|n| String::from_utf8_lossy(n).into_owned())
            .collect()
    }

    fn combined(&self, name: &[u8]) -> Option<&Combined> {
        let found = self.combined.iter().find(|(n, _)| *n == name);
        found.map(|(_, combined)| combined)
    }

    /// The merged content: the remote's, with what the local side changed; `winner` decides the
    /// fields in conflict.
    pub fn merged(&self, remote: &[u8], winner: Side) -> Vec<u8> {
        let keep_ours = |name: &[u8]| {
            if name == self.updated_at_name && self.updated_at.is_some() {
                return self.updated_at == Some(Side::Local);
            }
            if let Some(Combined::Of(side)) = self.combined(name) {
                return *side == Side::Local;
            }
            winner == Side::Local || !self.clashing.contains(&name)
        };
        let mut w = raw::Writer::new();
        let mut written = Vec::new();
        for r in raw::elements(remote).map_while(Result::ok) {
            let ours = self
                .ours
                .set
                .iter()
                .find(|(n, _)| n.name == r.name)
                .filter(|_| keep_ours(r.name));
            if let Some(Combined::New(kind, value)) = self.combined(r.name) {
                w.value(r.name, *kind, value);
            } else if let Some((n, _)) = ours {
                w.whole(n.whole);
            } else if !(self.ours.unset.iter().any(|u| u.name == r.name) && keep_ours(r.name)) {
                w.whole(r.whole);
            }
            written.push(r.name);
        }
        for (n, _) in &self.ours.set {
            if !written.contains(&n.name) && keep_ours(n.name) {
                w.whole(n.whole);
            }
        }
        w.finish()
    }

    fn target(&self, local: &[u8], remote: &[u8], winner: Side) -> Target {
        let merged = self.merged(remote, winner);
        if merged == remote {
            Target::Remote
        } else if merged == local {
            Target::Local
        } else {
            Target::Merged(merged)
        }
    }
}

fn local_names<'a>(diff: &Diff<'a>) -> Vec<&'a [u8]> {
    diff.set
        .iter()
        .map(|(e, _)| e.name)
        .chain(diff.unset.iter().map(|e| e.name))
        .collect()
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
