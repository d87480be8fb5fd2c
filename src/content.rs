//! Content: a document without its sync fields, and what differs between two contents.
//!
//! Contents are compared byte for byte (R14). The sync fields never take part; with
//! `stamp_documents = false` there are none, and every field is content.

use std::borrow::Cow;

use crate::raw::{self, Element, Malformed};

/// Leaves out the fields named in `sync_fields`; borrows when the document has none of them.
pub fn strip<'a>(doc: &'a [u8], sync_fields: &[String]) -> Cow<'a, [u8]> {
    let is_sync = |e: &Element<'_>| sync_fields.iter().any(|f| f.as_bytes() == e.name);
    if sync_fields.is_empty() || !raw::elements(doc).flatten().any(|e| is_sync(&e)) {
        return Cow::Borrowed(doc);
    }
    let mut w = raw::Writer::new();
    for e in raw::elements(doc).map_while(Result::ok) {
        if !is_sync(&e) {
            w.whole(e.whole);
        }
    }
    Cow::Owned(w.finish())
}

/// Whether two fields of the same name come in the document, at any depth: no pipeline of the server
/// can carry such a document, it would take the first value for all of them.
pub fn has_duplicates(doc: &[u8]) -> bool {
    let mut names: Vec<&[u8]> = Vec::new();
    for e in raw::elements(doc).map_while(Result::ok) {
        match e.kind {
            raw::DOCUMENT if has_duplicates(e.value) => return true,
            raw::ARRAY if holds_duplicates(e.value) => return true,
            _ => names.push(e.name),
        }
    }
    // Sorting a dozen names costs less than hashing them.
    names.sort_unstable();
    names.windows(2).any(|pair| pair[0] == pair[1])
}

/// Whether one of an array's items has duplicate names; its own names are but numbers.
fn holds_duplicates(array: &[u8]) -> bool {
    raw::elements(array)
        .map_while(Result::ok)
        .any(|e| match e.kind {
            raw::DOCUMENT => has_duplicates(e.value),
            raw::ARRAY => holds_duplicates(e.value),
            _ => false,
        })
}

/// What turns one content into another by top-level fields.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Diff<'a> {
    /// Fields to set, in the order of the new content, with the element they replace, if any.
    pub set: Vec<(Element<'a>, Option<Element<'a>>)>,
    /// Fields to remove.
    pub unset: Vec<Element<'a>>,
}

impl Diff<'_> {
    /// Nothing differs (fields in another order do not count).
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.unset.is_empty()
    }

    /// Names of all fields that differ.
    pub fn names(&self) -> impl Iterator<Item = &[u8]> {
        self.set
            .iter()
            .map(|(e, _)| e.name)
            .chain(self.unset.iter().map(|e| e.name))
    }
}

/// All elements, or the first malformation.
pub fn fields(doc: &[u8]) -> Result<Vec<Element<'_>>, Malformed> {
    raw::elements(doc).collect()
}

/// The difference by top-level field. Only for documents without duplicate names.
pub fn diff<'a>(old: &'a [u8], new: &'a [u8]) -> Result<Diff<'a>, Malformed> {
    let (old, new) = (fields(old)?, fields(new)?);
    let mut out = Diff::default();
    for n in &new {
        let before = old.iter().find(|o| o.name == n.name);
        if before.is_none_or(|o| o.whole != n.whole) {
            out.set.push((*n, before.copied()));
        }
    }
    out.unset
        .extend(old.iter().filter(|o| !new.iter().any(|n| n.name == o.name)));
    Ok(out)
}

/// What a server's `$set`/`$unset` of this difference makes of `old`: fields replaced where they
/// stand, removed ones gone, new ones at the end.
pub fn apply(old: &[u8], diff: &Diff<'_>) -> Vec<u8> {
    let mut w = raw::Writer::new();
    for o in raw::elements(old).map_while(Result::ok) {
        if let Some((n, _)) = diff.set.iter().find(|(n, _)| n.name == o.name) {
            w.whole(n.whole);
        } else if !diff.unset.iter().any(|u| u.name == o.name) {
            w.whole(o.whole);
        }
    }
    for (n, before) in &diff.set {
        if before.is_none() {
            w.whole(n.whole);
        }
    }
    w.finish()
}

/// Whether every field of `names` is the same (or missing alike) in both contents.
pub fn agree_on<'n>(a: &[u8], b: &[u8], names: impl IntoIterator<Item = &'n [u8]>) -> bool {
    names
        .into_iter()
        .all(|n| raw::get(a, n).map(|e| e.whole) == raw::get(b, n).map(|e| e.whole))
}

/// Bytes of the elements that a difference sets, for estimates.
pub fn size(diff: &Diff<'_>) -> usize {
    diff.set
        .iter()
        .map(|(n, o)| n.whole.len() + o.map_or(0, |o| o.whole.len()))
        .sum::<usize>()
        + diff.unset.iter().map(|u| u.whole.len()).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bson::{Document, doc};

    fn b(d: Document) -> Vec<u8> {
        d.to_vec().unwrap()
    }

    #[test]
    fn sync_fields_are_no_content() {
        let names = ["syncedAt".to_string(), "origin".to_string()];
        let d = b(doc! {"syncedAt": 1, "_id": 1, "origin": "x", "a": 2});
        assert_eq!(strip(&d, &names), b(doc! {"_id": 1, "a": 2}));
        let d = b(doc! {"_id": 1, "a": {"origin": 1}});
        assert!(matches!(strip(&d, &names), Cow::Borrowed(_)));
    }

    #[test]
    fn a_difference_applied_gives_the_new_fields() {
        let old = b(doc! {"_id": 1, "a": 1, "b": 2, "c": 3});
        let new = b(doc! {"_id": 1, "a": 1, "c": 4, "d": 5});
        let d = diff(&old, &new).unwrap();
        assert_eq!(apply(&old, &d), new);
        assert_eq!(d.names().collect::<Vec<_>>(), [b"c".as_slice(), b"d", b"b"]);
        let reordered = b(doc! {"_id": 1, "b": 2, "a": 1, "c": 3});
        assert!(diff(&old, &reordered).unwrap().is_empty());
        assert_ne!(apply(&old, &diff(&old, &reordered).unwrap()), reordered);
    }

    #[test]
    fn duplicate_names_are_found_at_any_depth() {
        let twice = |name: &str| {
            let mut w = raw::Writer::new();
            w.i32("a", 1).i32(name, 2);
            w.finish()
        };
        let within = |inner: &[u8]| {
            let mut w = raw::Writer::new();
            w.i32("a", 1).open_array("list").open("0");
            w.doc("d", inner).close().close();
            w.finish()
        };
        assert!(has_duplicates(&twice("a")) && has_duplicates(&within(&twice("a"))));
        assert!(!has_duplicates(&twice("b")) && !has_duplicates(&within(&twice("b"))));
    }

    #[test]
    fn numbers_of_another_type_differ() {
        let (a, z) = (b(doc! {"_id": 1, "a": 1}), b(doc! {"_id": 1, "a": 1.0}));
        assert!(!diff(&a, &z).unwrap().is_empty());
    }
}
