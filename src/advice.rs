//! Advice: what a person can do about a conflict, best first, with the exact command. Pure.

use serde::{Deserialize, Serialize};

use crate::decide::{Kind, Side, millis};
use crate::raw;
use crate::resolution::Strategy;
use crate::value;

/// One way out of a conflict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Advice {
    /// The strategy.
    pub strategy: Strategy,
    /// A free value that goes with it.
    pub value: Option<String>,
    /// What it means.
    pub reason: String,
    /// The command that does it.
    pub command: String,
}

/// What is known of a conflict.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Id of the conflict, in hex.
    pub id: &'a str,
    /// What kind.
    pub kind: Kind,
    /// Fields in conflict.
    pub fields: &'a [String],
    /// The local document.
    pub local: Option<&'a [u8]>,
    /// The remote document.
    pub remote: Option<&'a [u8]>,
    /// The side that lost its documents, for a halted collection.
    pub lost: Option<Side>,
    /// Name of the `updatedAt` field.
    pub updated_at: &'a str,
    /// Remote clock minus local clock, ms.
    pub skew_ms: i64,
    /// How often a suggested value was found to be taken.
    pub attempt: u32,
}

impl Facts<'_> {
    /// The side with the later change, if both tell.
    pub fn newest(&self) -> Option<Side> {
        let at = |doc: Option<&[u8]>| millis(&raw::get(doc?, self.updated_at.as_bytes())?);
        let (local, remote) = (
            at(self.local)?,
            at(self.remote)?.saturating_sub(self.skew_ms),
        );
        match local.cmp(&remote) {
            std::cmp::Ordering::Greater => Some(Side::Local),
            std::cmp::Ordering::Less => Some(Side::Remote),
            std::cmp::Ordering::Equal => None,
        }
    }

    /// A new value for the local document, made from the present one; only for a single text field.
    pub fn suggestion(&self) -> Option<String> {
        let [field] = self.fields else { return None };
        let doc = self.local.or(self.remote)?;
        value::suggestion(
            &value::at_path(doc, field)?,
            self.id.as_bytes(),
            self.attempt,
        )
    }

    /// The ways out, best first.
    pub fn advice(&self) -> Vec<Advice> {
        match self.kind {
            Kind::UniqueField => self.unique(),
            Kind::CollectionDropped | Kind::MassDelete => self.lost(),
            // Never open: there is nothing to decide.
            Kind::Adopted => vec![],
            Kind::DeleteUpdate => self.deleted(),
            Kind::Rejected => vec![
                self.way(
                    Strategy::KeepLocal,
                    None,
                    "try again with the local version, once what the database refuses is put right",
                ),
                self.way(
                    Strategy::KeepRemote,
                    None,
                    "give up the local version; it stays in the record",
                ),
            ],
            Kind::BothModified | Kind::InsertInsert => self.modified(),
        }
    }

    fn way(&self, strategy: Strategy, value: Option<String>, reason: &str) -> Advice {
        let argument = match &value {
            Some(value) => format!(" --value {}", quoted(value)),
            None => String::new(),
        };
        Advice {
            strategy,
            command: format!(
                "sangam resolve {} --strategy {}{argument}",
                self.id,
                strategy.name()
            ),
            value,
            reason: reason.into(),
        }
    }

    fn unique(&self) -> Vec<Advice> {
        let mut ways = Vec::new();
        match self.suggestion() {
            Some(new) => {
                let reason = format!("keep both documents, the local one as {new}");
                ways.push(self.way(Strategy::RenameLocal, Some(new), &reason));
            }
            None => {
                let mut way = self.way(
                    Strategy::RenameLocal,
                    None,
                    "keep both documents, the local one under a value that is free",
                );
                way.command.push_str(" --value NEW_VALUE");
                ways.push(way);
            }
        }
        ways.push(self.way(
            Strategy::KeepRemote,
            None,
            "keep the remote document only; the local one stays in the record",
        ));
        ways.push(self.way(
            Strategy::Merge,
            None,
            "make one document of the two, if both mean the same; local fields win",
        ));
        ways
    }

    fn modified(&self) -> Vec<Advice> {
        let newest = self.newest();
        let newer = |side| {
            if newest == Some(side) {
                "; it is the newer one"
            } else {
                ""
            }
        };
        let local = self.way(
            Strategy::KeepLocal,
            None,
            &format!("keep the local version{}", newer(Side::Local)),
        );
        let remote = self.way(
            Strategy::KeepRemote,
            None,
            &format!("keep the remote version{}", newer(Side::Remote)),
        );
        let mut ways = if newest == Some(Side::Remote) {
            vec![remote, local]
        } else {
            vec![local, remote]
        };
        ways.push(self.way(
            Strategy::Merge,
            None,
            "keep what each side alone changed; where both did, the local value",
        ));
        if let [field] = self.fields {
            let mut way = self.way(
                Strategy::Merge,
                None,
                &format!("the same, with a value of your own for {field}"),
            );
            way.command.push_str(" --value VALUE");
            ways.push(way);
        }
        ways
    }

    fn deleted(&self) -> Vec<Advice> {
        let (keeps, deletes) = if self.local.is_some() {
            (Strategy::KeepLocal, Strategy::KeepRemote)
        } else {
            (Strategy::KeepRemote, Strategy::KeepLocal)
        };
        vec![
            self.way(keeps, None, "keep the document that was changed"),
            self.way(
                deletes,
                None,
                "delete it on both sides; it stays in the record",
            ),
        ]
    }

    fn lost(&self) -> Vec<Advice> {
        let (keeps, deletes) = match self.lost {
            Some(Side::Remote) => (Strategy::KeepLocal, Strategy::KeepRemote),
            _ => (Strategy::KeepRemote, Strategy::KeepLocal),
        };
        vec![
            self.way(
                keeps,
                None,
                "bring the documents back from the side that still has them",
            ),
            self.way(
                deletes,
                None,
                "delete them on the other side, too; each stays in the record",
            ),
        ]
    }
}

/// For a shell: as it is where nothing in it is special.
pub fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "_-.@:/+".contains(c);
    if !text.is_empty() && text.chars().all(plain) && !text.starts_with('-') {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}
