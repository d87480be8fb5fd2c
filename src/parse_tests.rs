//! Whatever parses, fed with anything: an answer or an error, never a panic, never a secret (R23).

use bson::{RawDocumentBuf, doc};
use proptest::prelude::*;
use secrecy::SecretString;

use crate::config::{Config, redact_uri};
use crate::key::{Id, Key};
use crate::store::{base, queue};
use crate::{content, control, raw, shared, value};

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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

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
