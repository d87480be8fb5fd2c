//! How a state file comes from one format to the next.
//!
//! A file says what it is: SQLite's `application_id` that it is ours, `user_version` its format. A
//! program opens what it knows: a file of an older format is brought up, step by step; one of a newer
//! format, or of somebody else, is refused and left as it is. Every step runs in one transaction
//! together with the new number, so that a crash at any line leaves the file before the step or behind
//! it, and the next start goes on from there.
//!
//! To change the tables after a release: change [`super::schema::TABLES`], add the step that does the
//! same to a file of the format before, and a fixture of that format (`tests/service/upgrade.rs` says how). A
//! step is never changed once it was released. The tests compare what the steps make of the oldest
//! fixture with what a new file has.

use std::path::Path;

use rusqlite::Connection;

use super::{StoreError, get_meta, schema, set_meta};

/// What brings a file to the next format; inside a transaction.
pub(super) type Step<'a> = dyn Fn(&Connection) -> rusqlite::Result<()> + 'a;

/// The steps in order; the first one leads from format 1 to 2.
pub(super) const STEPS: &[&Step<'static>] = &[&|c| {
    c.execute_batch(
        "DROP TRIGGER outbox_left;
         DROP TRIGGER inbox_left;
         CREATE TABLE sent(n INTEGER PRIMARY KEY AUTOINCREMENT, intents BLOB NOT NULL);",
    )
}];

/// The format of the first release.
const FIRST: i64 = 1;

/// `application_id` of our files: `SANG`.
const OURS: i64 = 0x5341_4E47;

/// Name under which a file keeps the version of the program that opened it last.
const WRITTEN_BY: &str = "written_by";

/// The newest format that these steps lead to.
pub(super) fn newest(steps: &[&Step<'_>]) -> i64 {
    FIRST + i64::try_from(steps.len()).unwrap_or(i64::MAX - FIRST)
}

/// The format of a file, without writing anything; `None` of one that is still empty.
pub(super) fn examine(
    c: &Connection,
    path: &Path,
    steps: &[&Step<'_>],
) -> Result<Option<i64>, StoreError> {
    let number = |pragma| c.query_row(pragma, [], |r| r.get::<_, i64>(0));
    let (mark, found) = (
        number("PRAGMA application_id")?,
        number("PRAGMA user_version")?,
    );
    let empty = "SELECT NOT EXISTS(SELECT 1 FROM sqlite_master)";
    if mark == 0 && found == 0 && c.query_row(empty, [], |r| r.get(0))? {
        return Ok(None);
    }
    if mark != OURS || found < FIRST {
        return Err(StoreError::Unknown {
            path: path.to_owned(),
        });
    }
    if found > newest(steps) {
        // Where a later format keeps it elsewhere, it is not told.
        let by = get_meta::<String>(c, WRITTEN_BY).unwrap_or_default();
        return Err(StoreError::Newer {
            path: path.to_owned(),
            by: by.unwrap_or_else(|| "of a later version".into()),
            found,
            known: newest(steps),
        });
    }
    Ok(Some(found))
}

/// Makes the tables of an empty file, or takes the steps that a file lacks.
pub(super) fn bring_up(
    c: &Connection,
    format: Option<i64>,
    steps: &[&Step<'_>],
) -> Result<(), StoreError> {
    match format {
        None => in_transaction(c, |c| {
            c.execute_batch(schema::TABLES)?;
            c.execute_batch(&format!("PRAGMA application_id={OURS}"))?;
            set_format(c, newest(steps))
        })?,
        Some(format) => {
            for (step, to) in steps.iter().zip(FIRST + 1..) {
                if to > format {
                    tracing::info!(
                        from = to - 1,
                        to,
                        "bringing the state file to a newer format"
                    );
                    in_transaction(c, |c| {
                        step(c)?;
                        set_format(c, to)
                    })?;
                }
            }
        }
    }
    let version = env!("CARGO_PKG_VERSION");
    if get_meta::<String>(c, WRITTEN_BY)?.as_deref() != Some(version) {
        set_meta(c, WRITTEN_BY, version)?;
    }
    Ok(())
}

fn set_format(c: &Connection, to: i64) -> rusqlite::Result<()> {
    c.execute_batch(&format!("PRAGMA user_version={to}"))
}

fn in_transaction(
    c: &Connection,
    work: impl FnOnce(&Connection) -> rusqlite::Result<()>,
) -> rusqlite::Result<()> {
    c.execute_batch("BEGIN IMMEDIATE")?;
    let done = work(c).and_then(|()| c.execute_batch("COMMIT"));
    if done.is_err() {
        // It may have been rolled back by itself; what failed is what counts.
        let _ = c.execute_batch("ROLLBACK");
    }
    done
}
