//! Identity: the state belongs to two databases and no others (R12).
//!
//! A token from another cluster is accepted by a server without a word and yields nothing, and base
//! from another pair would turn "never there" into "deleted". So the state is bound to the identity
//! of both, and a server whose time lies before our token was restored from a backup.

use bson::{RawDocument, Timestamp};

use crate::decide::Side;
use crate::failure::Failure;
use crate::settle::store_failed;
use crate::shared::{Shared, token_time};
use crate::side::Endpoint;
use crate::tail::token_name;

fn name(side: Side) -> String {
    format!("identity:{}", side.name())
}

/// Compares a side with the one the state was made with; the first time, keeps it.
pub async fn check(shared: &Shared, endpoint: &Endpoint) -> Result<(), Failure> {
    let side = endpoint.side;
    let found = endpoint.identity().await?;
    let known: Option<String> = shared
        .store
        .get_meta(&name(side))
        .await
        .map_err(store_failed)?;
    match known {
        None => shared
            .store
            .set_meta(&name(side), found)
            .await
            .map_err(store_failed)?,
        Some(known) if known == found => {}
        Some(_) => {
            return Err(refusal(
                side,
                "is another one than the state in state_dir was made with",
            ));
        }
    }
    let now = endpoint.hello().await?.operation_time;
    for db in &shared.settings().config.databases {
        let token: Option<Vec<u8>> = shared
            .store
            .get_meta(&token_name(side, db))
            .await
            .map_err(store_failed)?;
        let at = token.and_then(|bytes| token_time(RawDocument::from_bytes(&bytes).ok()?));
        if let (Some(at), Some(now)) = (at, now)
            && after(at, now)
        {
            return Err(refusal(
                side,
                "lies before what we have seen of it: it was restored from a backup",
            ));
        }
    }
    Ok(())
}

fn after(a: Timestamp, b: Timestamp) -> bool {
    (a.time, a.increment) > (b.time, b.increment)
}

fn refusal(side: Side, what: &str) -> Failure {
    Failure::fatal(format!(
        "the {} database {what}. Nothing was changed. If that is intended, run `sangam reconcile --adopt` once: \
         it forgets the old state and compares both databases whole, deleting nothing",
        side.name()
    ))
}

/// Forgets everything bound to the old databases: the next start compares them as on the first day.
pub fn adopt(c: &rusqlite::Connection) -> rusqlite::Result<()> {
    for table in [
        "base",
        "outbox",
        "inbox",
        "intents",
        "open_conflicts",
        "stamps",
    ] {
        c.execute(&format!("DELETE FROM {table}"), [])?;
    }
    c.execute("DELETE FROM meta WHERE k LIKE 'identity:%' OR k LIKE 'token:%' OR k LIKE 'reconcile:%' OR k LIKE 'pull:%' OR k LIKE 'halted:%'", [])?;
    Ok(())
}
