//! What a collection is like besides its documents: its indexes and options, made comparable.

use bson::{Bson, Document, doc};
use serde::{Deserialize, Serialize};

/// What a server adds by itself, and what differs by version without meaning anything.
const NOT_OURS: [&str; 9] = [
    "v",
    "ns",
    "key",
    "name",
    "background",
    "dropDups",
    "storageEngine",
    "textIndexVersion",
    "2dsphereIndexVersion",
];

/// An index: name, keys in order, and every option that means something.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Index {
    /// Its name.
    pub name: String,
    /// Fields and directions; the order counts.
    pub key: Document,
    /// Options that are not at their default.
    pub options: Document,
}

/// A TTL index, or the expiry of a clustered collection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ttl {
    /// The field with the date.
    pub field: String,
    /// Documents are due so many seconds after it.
    pub seconds: i64,
}

impl Index {
    /// From what `listIndexes` says; `None` for the index on `_id`, which every collection has.
    pub fn from_spec(spec: &Document) -> Option<Self> {
        let name = spec.get_str("name").ok()?.to_owned();
        let key = spec.get_document("key").ok()?.clone();
        if name == "_id_" || spec.get_bool("clustered").unwrap_or(false) {
            return None;
        }
        let mut options = Document::new();
        for (option, value) in spec {
            match (option.as_str(), value) {
                (o, _) if NOT_OURS.contains(&o) => {}
                ("unique" | "sparse" | "hidden" | "prepareUnique", v) => {
                    if is_true(v) {
                        options.insert(option, true);
                    }
                }
                ("collation", Bson::Document(d)) => {
                    let mut d = d.clone();
                    d.remove("version");
                    options.insert(option, d);
                }
                _ => {
                    options.insert(option, value.clone());
                }
            }
        }
        Some(Self { name, key, options })
    }

    /// As `createIndexes` takes it.
    pub fn to_spec(&self) -> Document {
        let mut spec = doc! {"key": self.key.clone(), "name": &self.name};
        spec.extend(self.options.clone());
        spec
    }

    /// Whether both serve the same purpose, by whatever name.
    pub fn is_alike(&self, other: &Self) -> bool {
        self.differing(other).is_empty()
    }

    /// Names of what differs: `key`, or options.
    pub fn differing(&self, other: &Self) -> Vec<String> {
        let mut names = Vec::new();
        if !same_in_order(&self.key, &other.key) {
            names.push("key".to_owned());
        }
        let mine = self.options.keys();
        let theirs = other
            .options
            .keys()
            .filter(|k| !self.options.contains_key(k));
        for name in mine.chain(theirs) {
            let same = match (self.options.get(name), other.options.get(name)) {
                (Some(a), Some(b)) => same(a, b, name == "partialFilterExpression"),
                _ => false,
            };
            if !same {
                names.push(name.clone());
            }
        }
        names
    }

    /// Whether a server takes both for the same keys with other options.
    pub fn is_over_same_keys(&self, other: &Self) -> bool {
        const IDENTITY: [&str; 4] = [
            "key",
            "collation",
            "partialFilterExpression",
            "wildcardProjection",
        ];
        let is_text = |i: &Self| i.key.values().any(|v| v.as_str() == Some("text"));
        // A collection has one text index at the most.
        (is_text(self) && is_text(other))
            || !self
                .differing(other)
                .iter()
                .any(|name| IDENTITY.contains(&name.as_str()))
    }

    /// After how long its documents expire, if it is a TTL index.
    pub fn ttl(&self) -> Option<Ttl> {
        let seconds = seconds(self.options.get("expireAfterSeconds")?)?;
        let (field, _) = self.key.iter().next()?;
        Some(Ttl {
            field: field.clone(),
            seconds,
        })
    }

    /// Whether a range on `field` can use it.
    pub fn serves(&self, field: &str) -> bool {
        let first = self.key.iter().next();
        let ordered = first.is_some_and(|(name, v)| name == field && number(v).is_some());
        let limited = ["partialFilterExpression", "sparse", "hidden", "collation"];
        // A sparse index serves a range, too, but not a sort over everything.
        ordered
            && !limited
                .iter()
                .any(|o| *o != "sparse" && self.options.contains_key(o))
    }
}

/// A collection on one side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Definition {
    /// Its options that are not at their default.
    pub options: Document,
    /// Its indexes but the one on `_id`.
    pub indexes: Vec<Index>,
    /// Names of indexes that are being built.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub building: Vec<String>,
}

impl Definition {
    /// Whether it drops its oldest documents by itself.
    pub fn is_capped(&self) -> bool {
        self.options.get_bool("capped").unwrap_or(false)
    }

    /// By what its documents expire.
    pub fn ttl(&self) -> Vec<Ttl> {
        let clustered = self.options.get("expireAfterSeconds").and_then(seconds);
        let clustered = clustered.map(|seconds| Ttl {
            field: "_id".into(),
            seconds,
        });
        self.indexes
            .iter()
            .filter_map(Index::ttl)
            .chain(clustered)
            .collect()
    }
}

/// The options of `listCollections` without what is a default.
pub(super) fn options(found: &Document) -> Document {
    let mut options = Document::new();
    for (name, value) in found {
        let is_default = match (name.as_str(), value) {
            ("validationLevel", v) => v.as_str() == Some("strict"),
            ("validationAction", v) => v.as_str() == Some("error"),
            ("validator", Bson::Document(d)) => d.is_empty(),
            ("capped", v) => !is_true(v),
            ("changeStreamPreAndPostImages", Bson::Document(d)) => {
                !d.get_bool("enabled").unwrap_or(false)
            }
            ("storageEngine" | "uuid" | "autoIndexId" | "flags" | "temp", _) => true,
            _ => false,
        };
        if is_default {
            continue;
        }
        let mut value = value.clone();
        if let (true, Bson::Document(d)) = (name == "collation", &mut value) {
            d.remove("version");
        }
        options.insert(name, value);
    }
    options
}

/// Options that `collMod` can change, in the groups that belong together.
pub(super) const CHANGEABLE: [&[&str]; 3] = [
    &["validator", "validationLevel", "validationAction"],
    &["changeStreamPreAndPostImages"],
    &["expireAfterSeconds"],
];

/// The options of one group, or all that are in none (`None`).
pub(super) fn part(options: &Document, group: Option<&[&str]>) -> Document {
    let wanted = |name: &str| match group {
        Some(group) => group.contains(&name),
        None => !CHANGEABLE.concat().contains(&name),
    };
    let of_group = options.iter().filter(|(name, _)| wanted(name));
    of_group.map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// Whether two sets of options mean the same.
pub(super) fn same_options(a: &Document, b: &Document) -> bool {
    a.len() == b.len()
        && a.iter()
            .all(|(name, v)| b.get(name).is_some_and(|w| same(v, w, name == "validator")))
}

fn is_true(value: &Bson) -> bool {
    match value {
        Bson::Boolean(b) => *b,
        other => number(other).is_some_and(|n| n != 0.0),
    }
}

fn number(value: &Bson) -> Option<f64> {
    match value {
        Bson::Int32(n) => Some(f64::from(*n)),
        #[allow(clippy::cast_precision_loss)] // directions and seconds are far below 2^53
        Bson::Int64(n) => Some(*n as f64),
        Bson::Double(n) => Some(*n),
        _ => None,
    }
}

fn seconds(value: &Bson) -> Option<i64> {
    #[allow(clippy::cast_possible_truncation)]
    // a fraction of a second does not matter; `as` saturates
    number(value).map(|n| n as i64)
}

/// Numbers are the same in any type; fields of a document may come in any order unless it counts.
fn same(a: &Bson, b: &Bson, in_order: bool) -> bool {
    match (a, b) {
        (Bson::Document(a), Bson::Document(b)) if in_order => same_in_order(a, b),
        (Bson::Document(a), Bson::Document(b)) => {
            a.len() == b.len()
                && a.iter()
                    .all(|(k, v)| b.get(k).is_some_and(|w| same(v, w, in_order)))
        }
        (Bson::Array(a), Bson::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(v, w)| same(v, w, in_order))
        }
        _ => match (number(a), number(b)) {
            (Some(a), Some(b)) => a == b,
            _ => a == b,
        },
    }
}

fn same_in_order(a: &Document, b: &Document) -> bool {
    a.len() == b.len()
        && a.iter()
            .zip(b)
            .all(|((k, v), (l, w))| k == l && same(v, w, true))
}
