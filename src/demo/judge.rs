//! The verdict at the end: are the two databases equal, but for the conflicts on record?

use std::collections::BTreeMap;

use mongodb::bson::{Bson, Document};

use crate::compare::{Comparison, Difference, How};

/// An open conflict as its record in `conflict_logs` tells it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Conflict {
    pub(super) collection: String,
    pub(super) kind: String,
    /// The field that clashes; empty if it is the whole document.
    pub(super) field: String,
    pub(super) local_id: Bson,
    pub(super) remote_id: Bson,
    pub(super) local: Document,
    pub(super) remote: Document,
}

impl Conflict {
    /// Reads a record; what is missing is empty.
    pub(super) fn of(record: &Document) -> Self {
        let text = |key| record.get_str(key).unwrap_or_default().to_owned();
        let id = |key| record.get(key).cloned().unwrap_or(Bson::Null);
        let body = |key| record.get_document(key).cloned().unwrap_or_default();
        Self {
            collection: text("collection"),
            kind: text("kind"),
            field: text("field"),
            local_id: id("localId"),
            remote_id: id("remoteId"),
            local: body("localDocument"),
            remote: body("remoteDocument"),
        }
    }

    /// Whether this conflict is why that document differs.
    fn explains(&self, difference: &Difference) -> bool {
        let Ok(id) = Bson::try_from(difference.id.clone()) else {
            return false;
        };
        self.collection == difference.collection && (self.local_id == id || self.remote_id == id)
    }

    /// `unique field` for `unique_field`.
    pub(super) fn kind_in_words(&self) -> String {
        self.kind.replace('_', " ")
    }
}

/// What differs though no open conflict says why.
pub(super) fn unexplained<'a>(
    found: &'a Comparison,
    conflicts: &[Conflict],
) -> Vec<&'a Difference> {
    found
        .differences
        .iter()
        .filter(|difference| {
            !conflicts
                .iter()
                .any(|conflict| conflict.explains(difference))
        })
        .collect()
}

/// Number of documents that differ, by collection.
pub(super) fn by_collection(found: &Comparison) -> BTreeMap<&str, u64> {
    let mut counts = BTreeMap::new();
    for difference in &found.differences {
        *counts.entry(difference.collection.as_str()).or_default() += 1;
    }
    counts
}

/// `1 only in the temple, 2 different on the two sides`.
pub(super) fn where_they_are(found: &Comparison) -> String {
    let kinds = [How::OnlyLocal, How::OnlyRemote, How::Content];
    let counted = kinds.map(|how| {
        let of_kind = found.differences.iter().filter(|d| d.how == how);
        (of_kind.count(), in_words(how))
    });
    let parts: Vec<String> = counted
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, how)| format!("{count} {how}"))
        .collect();
    parts.join(", ")
}

/// A value as people write it.
pub(super) fn plain(value: &Bson) -> String {
    match value {
        Bson::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn in_words(how: How) -> &'static str {
    match how {
        How::OnlyLocal => "only in the temple",
        How::OnlyRemote => "only in the cloud",
        How::Content => "different on the two sides",
    }
}

/// One line about a difference.
pub(super) fn describe(difference: &Difference) -> String {
    let how = in_words(difference.how);
    let id = Bson::try_from(difference.id.clone()).map_or_else(|_| "?".into(), |id| id.to_string());
    format!("{} {id}: {how}", difference.collection)
}

#[cfg(test)]
mod tests {
    use mongodb::bson::{RawBson, doc};

    use super::*;

    fn difference(collection: &str, id: i32, how: How) -> Difference {
        Difference {
            collection: collection.into(),
            id: RawBson::Int32(id),
            how,
            local: None,
            remote: None,
        }
    }

    fn conflict(collection: &str, local: i32, remote: i32) -> Conflict {
        Conflict::of(&doc! {
            "collection": collection, "kind": "unique_field", "field": "username",
            "localId": local, "remoteId": remote,
        })
    }

    #[test]
    fn only_documents_of_a_conflict_may_differ() {
        let found = Comparison {
            collections: 2,
            equal: 10,
            differences: vec![
                difference("admins", 1, How::OnlyLocal),
                difference("admins", 2, How::OnlyRemote),
                difference("admins", 3, How::Content),
                difference("stock", 1, How::OnlyLocal),
            ],
        };
        let left = unexplained(&found, &[conflict("admins", 1, 2)]);
        let left: Vec<String> = left.into_iter().map(describe).collect();
        assert_eq!(
            left,
            [
                "admins 3: different on the two sides",
                "stock 1: only in the temple"
            ]
        );
        assert_eq!(unexplained(&found, &[]).len(), 4);
        assert_eq!(
            where_they_are(&found),
            "2 only in the temple, 1 only in the cloud, 1 different on the two sides"
        );
        assert_eq!(
            by_collection(&found),
            BTreeMap::from([("admins", 3), ("stock", 1)])
        );
    }

    #[test]
    fn a_record_with_missing_fields_explains_nothing() {
        let found = Comparison {
            differences: vec![difference("admins", 1, How::OnlyLocal)],
            ..Comparison::default()
        };
        let empty = Conflict::of(&doc! {"collection": "admins"});
        assert_eq!(unexplained(&found, &[empty]).len(), 1);
    }
}
