//! Whatever parses, fed with anything: an answer or an error, never a panic, never a secret (R23).

use std::time::Duration;

use bson::{RawDocumentBuf, doc};
use proptest::prelude::*;
use secrecy::SecretString;
use serde_json::Value as Json;

use crate::config::{Config, redact_uri};
use crate::key::{Id, Key};
use crate::overrides::{self, Overrides};
use crate::store::{base, queue};
use crate::value::{self, Value};
use crate::{content, control, raw, shared};

/// Nothing that is shown may have this in it.
const SECRET: &str = "hUnTeR2hUnTeR2";

/// The example file with an address that holds the secret.
fn example() -> String {
    let text = include_str!("../config/sangam.toml");
    let uri = format!("[remote]\nuri = \"mongodb+srv://u:{SECRET}@cluster0.example.net/\"\n");
    let (before, after) = text.split_once("[remote]\n").unwrap();
    let (_, after) = after.split_once("uri = \"\"\n").unwrap();
    format!("{before}{uri}{after}")
}

/// How a text came to harm.
#[derive(Clone, Debug)]
enum Harm {
    Insert(usize, String),
    Remove(usize, usize),
    /// The line at the first place goes to the second.
    MoveLine(usize, usize),
}

fn harm() -> impl Strategy<Value = Harm> {
    let tokens = prop_oneof![
        Just("=".to_owned()),
        Just("\"".to_owned()),
        Just("[sync]\n".to_owned()),
        Just("[[local]]\n".to_owned()),
        Just("\n-1".to_owned()),
        Just("9999999999999999999999".to_owned()),
        Just("\u{0}".to_owned()),
        Just("ॐ".to_owned()),
        any::<String>(),
    ];
    prop_oneof![
        (any::<usize>(), tokens).prop_map(|(at, text)| Harm::Insert(at, text)),
        (any::<usize>(), 1..40_usize).prop_map(|(at, n)| Harm::Remove(at, n)),
        (any::<usize>(), any::<usize>()).prop_map(|(from, to)| Harm::MoveLine(from, to)),
    ]
}

fn harmed(text: &str, harms: &[Harm]) -> String {
    let mut chars: Vec<char> = text.chars().collect();
    for harm in harms {
        let n = chars.len() + 1;
        match harm {
            Harm::Insert(at, new) => {
                let at = at % n;
                chars.splice(at..at, new.chars());
            }
            Harm::Remove(at, count) => {
                let at = at % n;
                chars.drain(at..(at + count).min(n - 1));
            }
            Harm::MoveLine(from, to) => {
                let text: String = chars.iter().collect();
                let mut lines: Vec<&str> = text.lines().collect();
                if !lines.is_empty() {
                    let line = lines.remove(from % lines.len());
                    lines.insert(to % (lines.len() + 1), line);
                }
                chars = lines.join("\n").chars().collect();
            }
        }
    }
    chars.into_iter().collect()
}

/// A document of many kinds, its bytes perhaps changed.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let whole = doc! {
        "_id": {"a": 1.0, "b": [1_i64, "x"]}, "v": 1, "updatedAt": bson::DateTime::now(),
        "a.b": true, "$set": bson::Bson::Null, "deep": {"er": {"still": [{"x": "y"}]}},
        "updatedFields": {"v": 2}, "removedFields": ["w"],
    };
    let whole = whole.to_vec().unwrap();
    let changes = proptest::collection::vec((any::<usize>(), any::<u8>()), 0..4);
    let spoilt = (changes, any::<usize>(), any::<bool>()).prop_map(move |(changes, end, cut)| {
        let mut bytes = whole.clone();
        for (at, with) in changes {
            let at = at % bytes.len();
            bytes[at] = with;
        }
        if cut {
            bytes.truncate(end % bytes.len());
        }
        bytes
    });
    prop_oneof![
        1 => proptest::collection::vec(any::<u8>(), 0..64),
        3 => spoilt,
    ]
}

/// Any JSON, with the names that mean something to us or to BSON now and then.
pub(crate) fn json() -> impl Strategy<Value = Json> {
    let names = prop_oneof![
        any::<String>(),
        proptest::sample::select(
            &[
                "$oid",
                "$date",
                "$numberDecimal",
                "$numberLong",
                "$binary",
                "$timestamp",
                "$symbol",
                "collections",
                "exact",
                "mode",
                "strategy",
                "newValue",
                "notes",
                "create",
                "repair",
            ][..]
        )
        .prop_map(str::to_owned),
        proptest::sample::select(&overrides::NAMES[..]).prop_map(|(name, _)| name.to_owned()),
    ];
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        any::<u64>().prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        (0.0..2000.0).prop_map(Json::from),
        any::<String>().prop_map(Json::from),
        "[0-9a-f]{24}|manual|local|-?[0-9]{1,40}|[*a-z\\[{!-]{1,6}".prop_map(Json::from),
    ];
    leaf.prop_recursive(4, 24, 5, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Json::from),
            proptest::collection::btree_map(names.clone(), inner, 0..5)
                .prop_map(|map| Json::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn settings_over_the_api_are_as_good_as_those_of_a_file_or_change_nothing(
        name in proptest::sample::select(&overrides::NAMES[..]), value in json(),
    ) {
        let file = || Config::from_toml("database = \"d\"").unwrap();
        let mut kept = Overrides::default();
        let change = [(name.0.to_owned(), value)].into_iter().collect();
        match kept.change(&change) {
            Err(error) => {
                prop_assert!(error.contains(name.0), "{error}");
                prop_assert_eq!(kept, Overrides::default());
            }
            Ok(()) => {
                let config = kept.apply(file());
                prop_assert!((1..=10_000).contains(&config.sync.batch_size));
                prop_assert!(config.pull.interval <= Duration::from_secs(86_400));
                prop_assert!(!config.sync.collections.is_empty());
                // What is shown can be given back.
                prop_assert_eq!(kept.change(&overrides::shown(&config)), Ok(()));
            }
        }
    }

    #[test]
    fn kept_settings_that_came_to_harm_are_left_out(text in any::<String>(), object in json()) {
        for text in [text, object.to_string()] {
            let config = Overrides::read(&text).apply(Config::from_toml("database = \"d\"").unwrap());
            prop_assert!((1..=10_000).contains(&config.sync.batch_size));
        }
    }

    #[test]
    fn any_value_for_a_conflict_is_taken_or_refused(given in json(), doc in bytes(), path in "[a-z.$0-9]{0,8}") {
        let before = value::at_path(&doc, &path);
        if let Ok(value) = Value::like(&given, before.as_ref()) {
            let _ = value.to_bson();
            let _ = value::suggestion(&value, &doc, 3);
            let _ = value::set_path(&doc, &path, &value);
        }
    }

    #[test]
    fn a_harmed_configuration_is_an_error_without_the_secret(
        harms in proptest::collection::vec(harm(), 1..4),
    ) {
        let text = harmed(&example(), &harms);
        if let Err(error) = Config::from_toml(&text) {
            let message = error.to_string();
            prop_assert!(!message.is_empty());
            prop_assert!(!message.contains(SECRET), "{message}");
        }
    }

    #[test]
    fn an_address_is_shown_without_its_secret(before in "[a-z+:/]{0,20}", after in any::<String>()) {
        for uri in [
            format!("mongodb://user:{SECRET}@host/{after}"),
            format!("mongodb+srv://{before}:{SECRET}@{after}"),
        ] {
            let shown = redact_uri(&SecretString::from(uri));
            prop_assert!(!shown.contains(SECRET), "{shown}");
        }
    }

    #[test]
    fn any_line_of_the_control_file_is_a_command_or_a_short_error(line in any::<String>()) {
        if let Err(error) = control::parse(&line) {
            prop_assert!(error.len() < 800);
        }
    }

    #[test]
    fn any_bytes_are_read_as_a_document_or_refused(a in bytes(), b in bytes(), name in "[a-z.$]{0,8}") {
        let sync = ["updatedAt".to_owned(), name.clone()];
        for e in raw::elements(&a) {
            let Ok(e) = e else { break };
            let _ = raw::text(&e);
        }
        let _ = raw::get(&a, name.as_bytes());
        if let Some(id) = Id::of(&a) {
            let key = Key::new(3, &id);
            prop_assert_eq!(key.ns(), 3);
            prop_assert_eq!(&Id::from_bytes(&id.to_bytes()), &id);
            let _ = id.to_bson();
        }
        let _ = content::strip(&a, &sync);
        let _ = content::has_duplicates(&a);
        if let Ok(diff) = content::diff(&a, &b) {
            let _ = content::size(&diff);
            let _ = content::apply(&a, &diff);
        }
        let _ = queue::is_echo(&a, Some(&b), &sync);
        let _ = queue::only_sync_fields(&a, &sync);
        prop_assert_eq!(base::decode(&base::encode(1, &a)), Some(a.clone()));
        let _ = base::decode(&a);
        let _ = value::at_path(&a, &name);
        if let Ok(token) = RawDocumentBuf::from_bytes(a) {
            let _ = shared::token_time(&token);
        }
    }

    #[test]
    fn any_text_of_a_stream_position_is_read_or_refused(data in "(82)?[0-9a-fॐA-F]{0,24}") {
        let token = RawDocumentBuf::try_from(&doc! {"_data": data}).unwrap();
        let _ = shared::token_time(&token);
    }
}
