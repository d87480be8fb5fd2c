//! Any body of a request is read or refused, and what a list says is no object.

use proptest::prelude::*;
use serde::de::DeserializeOwned;

use super::{ReconcileRequest, SyncRequest, conflicts, object, schema, survey};
use crate::parse_tests::json;
use crate::verify;

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<(), String> {
    object::<T>(bytes).map(|_| ()).map_err(|e| e.to_string())
}

type Read = fn(&[u8]) -> Result<(), String>;

const ALL: [Read; 9] = [
    read::<SyncRequest>,
    read::<ReconcileRequest>,
    read::<survey::AdoptRequest>,
    read::<schema::SchemaRequest>,
    read::<verify::Request>,
    read::<conflicts::ResolveBody>,
    read::<conflicts::BulkBody>,
    read::<conflicts::AutoBody>,
    read::<conflicts::UndoBody>,
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_body_is_read_or_refused(
        body in json(), bytes in proptest::collection::vec(any::<u8>(), 0..40), cut in any::<usize>(),
    ) {
        let mut text = body.to_string().into_bytes();
        let is_object = body.is_object() || body.is_null();
        for read in ALL {
            if let Err(error) = read(&text) {
                prop_assert!(!error.is_empty());
            } else {
                prop_assert!(is_object);
            }
            let _ = read(&bytes);
        }
        text.truncate(cut % (text.len() + 1));
        for read in ALL {
            let _ = read(&text);
        }
    }
}
