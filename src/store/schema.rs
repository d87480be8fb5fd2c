//! Tables of the state file, and how it is opened and checked.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::StoreError;

/// Format of the state file (`PRAGMA user_version`).
pub(super) const FORMAT: i64 = 1;

const TABLES: &str = "
CREATE TABLE meta(k TEXT PRIMARY KEY, v) WITHOUT ROWID;
CREATE TABLE namespaces(n INTEGER PRIMARY KEY, db TEXT NOT NULL, coll TEXT NOT NULL, UNIQUE(db, coll));
-- pos keeps the order of the first change; seq changes with every change (R2).
-- hint: what the single event said ('d' delete, 'u' + update description), NULL: look, 'D': look, it is gone.
-- held: 'conflict' or 'failed'; next_at in ms since 1970.
CREATE TABLE outbox(pos INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL UNIQUE, id BLOB NOT NULL,
  seq INTEGER NOT NULL, hint BLOB, at INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
  next_at INTEGER NOT NULL DEFAULT 0, held TEXT, reason TEXT);
CREATE TABLE inbox(pos INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL UNIQUE, id BLOB NOT NULL,
  seq INTEGER NOT NULL, hint BLOB, at INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
  next_at INTEGER NOT NULL DEFAULT 0, held TEXT, reason TEXT);
CREATE INDEX outbox_ready ON outbox(pos) WHERE held IS NULL;
CREATE INDEX inbox_ready ON inbox(pos) WHERE held IS NULL;
CREATE INDEX outbox_held ON outbox(held) WHERE held IS NOT NULL;
CREATE INDEX inbox_held ON inbox(held) WHERE held IS NOT NULL;
-- body: a marker byte (0 plain, 1 zstd), 8 bytes xxh3 of the content, the content.
CREATE TABLE base(key BLOB PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
-- A write that may have reached `side`. new NULL: a deletion. base_after NULL with after_is_new=1: same as new.
-- Of a create, new is the byte 2 and the BLAKE3 digest of the content.
CREATE TABLE intents(key BLOB PRIMARY KEY, side INTEGER NOT NULL, new BLOB, base_after BLOB,
  after_is_new INTEGER NOT NULL, fields BLOB, epoch INTEGER NOT NULL) WITHOUT ROWID;
-- Documents whose sync fields have to be brought up to date; gen counts the requests.
CREATE TABLE stamps(key BLOB PRIMARY KEY, id BLOB NOT NULL, gen INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
-- Open conflicts by document key; two keys may share one (a unique clash).
-- other: the document that holds the unique value.
CREATE TABLE open_conflicts(key BLOB PRIMARY KEY, conflict BLOB NOT NULL, kind TEXT NOT NULL, other BLOB) WITHOUT ROWID;
CREATE INDEX open_conflicts_id ON open_conflicts(conflict);
-- Records on their way into conflict_logs and sync_logs: fields to be set in the record with that _id,
-- in order; a repeat does no harm.
CREATE TABLE records(n INTEGER PRIMARY KEY AUTOINCREMENT, id BLOB NOT NULL, coll TEXT NOT NULL, doc BLOB NOT NULL);
INSERT INTO meta(k, v) VALUES('seq', 0);
";

/// Tables that came later; made in any file that lacks them.
/// cases: what `resolve` must know of an open conflict. local, remote: `_id` of the document on that
/// side; fields: names, NUL-separated; seen: version of both documents when last shown to a person.
/// walk: ranges of `_id` of comparisons under way; documents is NULL until a range is done.
/// gone: documents that such a comparison found missing on a side (0 local, 1 remote).
/// definitions: indexes and options of a collection; tree 0: as seen on the local side, 1: on the remote,
/// 2: what both had. dictionaries: of zstd, for the rows of base. transactions: documents of the outbox that one transaction wrote.
/// overruled: records of clashes that the policy settles by a write which may have happened; gone:
/// digest of the content that this write replaces, NULL where there was no document.
const LATER: &str = "
CREATE TABLE IF NOT EXISTS cases(conflict BLOB PRIMARY KEY, local BLOB, remote BLOB, fields TEXT NOT NULL,
  seen INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS differences(key BLOB PRIMARY KEY, id BLOB NOT NULL, kind TEXT, repair TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS overruled(key BLOB PRIMARY KEY, doc BLOB NOT NULL, gone BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS walk(ns INTEGER NOT NULL, n INTEGER NOT NULL, first BLOB, last BLOB, exact INTEGER NOT NULL,
  wrapped INTEGER NOT NULL, documents INTEGER, known INTEGER NOT NULL, bytes INTEGER NOT NULL, PRIMARY KEY(ns, n)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS gone(key BLOB PRIMARY KEY, id BLOB NOT NULL, side INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS outbox_gone ON outbox(key, at) WHERE held IS NULL AND hint IN (x'64', x'44');
CREATE INDEX IF NOT EXISTS inbox_gone ON inbox(key, at) WHERE held IS NULL AND hint IN (x'64', x'44');
CREATE INDEX IF NOT EXISTS open_conflicts_other ON open_conflicts(other) WHERE other IS NOT NULL;
CREATE TABLE IF NOT EXISTS transactions(key BLOB PRIMARY KEY, t INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS transactions_t ON transactions(t);
CREATE TRIGGER IF NOT EXISTS outbox_left AFTER DELETE ON outbox BEGIN
  DELETE FROM transactions WHERE key = OLD.key; END;
CREATE TABLE IF NOT EXISTS dictionaries(number INTEGER PRIMARY KEY, ns INTEGER NOT NULL, bytes BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS definitions(ns INTEGER NOT NULL, tree INTEGER NOT NULL, body BLOB NOT NULL,
  PRIMARY KEY(ns, tree)) WITHOUT ROWID;
";

/// A file whose existence asks for a full check at the next start.
pub(super) fn suspect_mark(path: &Path) -> PathBuf {
    path.with_extension("db.suspect")
}

pub(super) fn open(path: &Path) -> Result<Connection, StoreError> {
    // Made before SQLite opens it: its log takes over the mode.
    let private = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path);
    private.map_err(|source| StoreError::Directory {
        path: path.to_owned(),
        source,
    })?;
    let mut conn = Connection::open(path)?;
    conn.busy_timeout(Duration::from_secs(5))?;
    // auto_vacuum must be set before the first table and journal_mode.
    conn.execute_batch("PRAGMA auto_vacuum=INCREMENTAL;")?;
    conn.query_row("PRAGMA journal_mode=WAL", [], |_| Ok(()))?;
    conn.execute_batch(
        "PRAGMA synchronous=FULL; PRAGMA temp_store=MEMORY; PRAGMA cache_size=-8000; PRAGMA wal_autocheckpoint=4000;",
    )?;
    conn.set_prepared_statement_cache_capacity(128);
    let found: i64 = conn.query_row("PRAGMA user_version", [], |r| r.get(0))?;
    match found {
        0 => conn
            .execute_batch(&format!(
                "BEGIN IMMEDIATE; {TABLES} PRAGMA user_version={FORMAT}; COMMIT;"
            ))
            .map_err(StoreError::from)?,
        FORMAT => {}
        found => {
            return Err(StoreError::Newer {
                path: path.to_owned(),
                found,
                known: FORMAT,
            });
        }
    }
    check(&mut conn, suspect_mark(path).exists())?;
    conn.execute_batch(LATER)?;
    conn.execute_batch(crate::history::TABLES)?;
    Ok(conn)
}

/// Looks for damage: for a second at most, or for as long as it takes after a damaged read.
fn check(conn: &mut Connection, thorough: bool) -> Result<(), StoreError> {
    let began = Instant::now();
    conn.progress_handler(
        100_000,
        Some(move || !thorough && began.elapsed() > Duration::from_secs(1)),
    )?;
    let verdict = conn.query_row("PRAGMA quick_check(1)", [], |r| r.get::<_, String>(0));
    conn.progress_handler(0, None::<fn() -> bool>)?;
    match verdict {
        Ok(text) if text == "ok" => Ok(()),
        Ok(text) => {
            Err(rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(11), Some(text)).into())
        }
        // Out of time: no damage in what was seen; every row of base carries its own checksum.
        Err(rusqlite::Error::SqliteFailure(e, _))
            if e.code == rusqlite::ErrorCode::OperationInterrupted =>
        {
            Ok(())
        }
        Err(e) => Err(e.into()),
    }
}
