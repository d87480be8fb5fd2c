//! Tables of the state file, and how it is opened and checked.
//!
//! These are the tables of the newest format; how a file of an older one gets them is in
//! [`super::migrations`].

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use rusqlite::config::DbConfig;

use super::StoreError;
use super::migrations::{self, Step};
use super::sent::{self, Sent};

/// cases: what `resolve` must know of an open conflict. local, remote: `_id` of the document on that
/// side; fields: names, NUL-separated; seen: version of both documents when last shown to a person.
/// walk: ranges of `_id` of comparisons under way; documents is NULL until a range is done.
/// gone: documents that such a comparison found missing on a side (0 local, 1 remote).
/// definitions: indexes and options of a collection; tree 0: as seen on the local side, 1: on the remote,
/// 2: what both had. transactions: documents of the outbox that one transaction wrote.
/// overruled: records of clashes that the policy settles by a write which may have happened; gone:
/// digest of the content that this write replaces, NULL where there was no document.
/// history, link_history, activity: times in seconds since 1970, but for activity, which has ms.
pub(crate) const TABLES: &str = "
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
CREATE INDEX outbox_gone ON outbox(key, at) WHERE held IS NULL AND hint IN (x'64', x'44');
CREATE INDEX inbox_gone ON inbox(key, at) WHERE held IS NULL AND hint IN (x'64', x'44');
-- Rows of the queues (0 outbox, 1 inbox) by namespace (as a key begins) and held ('' where it is not). Triggers
-- count what comes; what leaves is counted by whoever deletes it, many at a time.
CREATE TABLE counts(queue INTEGER NOT NULL, ns BLOB NOT NULL, held TEXT NOT NULL, n INTEGER NOT NULL,
  PRIMARY KEY(queue, ns, held)) WITHOUT ROWID;
CREATE TRIGGER outbox_came AFTER INSERT ON outbox BEGIN
  INSERT INTO counts VALUES(0, substr(NEW.key, 1, 4), ifnull(NEW.held, ''), 1) ON CONFLICT DO UPDATE SET n = n + 1; END;
CREATE TRIGGER inbox_came AFTER INSERT ON inbox BEGIN
  INSERT INTO counts VALUES(1, substr(NEW.key, 1, 4), ifnull(NEW.held, ''), 1) ON CONFLICT DO UPDATE SET n = n + 1; END;
CREATE TRIGGER outbox_held_or_freed AFTER UPDATE OF held ON outbox WHEN OLD.held IS NOT NEW.held BEGIN
  UPDATE counts SET n = n - 1 WHERE queue = 0 AND ns = substr(OLD.key, 1, 4) AND held = ifnull(OLD.held, '');
  INSERT INTO counts VALUES(0, substr(NEW.key, 1, 4), ifnull(NEW.held, ''), 1) ON CONFLICT DO UPDATE SET n = n + 1; END;
CREATE TRIGGER inbox_held_or_freed AFTER UPDATE OF held ON inbox WHEN OLD.held IS NOT NEW.held BEGIN
  UPDATE counts SET n = n - 1 WHERE queue = 1 AND ns = substr(OLD.key, 1, 4) AND held = ifnull(OLD.held, '');
  INSERT INTO counts VALUES(1, substr(NEW.key, 1, 4), ifnull(NEW.held, ''), 1) ON CONFLICT DO UPDATE SET n = n + 1; END;
CREATE TABLE transactions(key BLOB PRIMARY KEY, t INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX transactions_t ON transactions(t);
-- body: a marker byte (0 plain, 1 zstd), 8 bytes xxh3 of the content, the content.
CREATE TABLE base(key BLOB PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
-- A write that may have reached `side`. new NULL: a deletion. base_after NULL with after_is_new=1: same as new.
-- Of a create, new is the byte 2 and the digest of the content (xxh3, 16 bytes); of a change of some fields the
-- byte 3, the digest, and the difference to base: {s: fields set, u: fields removed}. receipt: lane (12 bytes) and number.
CREATE TABLE intents(key BLOB PRIMARY KEY, side INTEGER NOT NULL, new BLOB, base_after BLOB,
  after_is_new INTEGER NOT NULL, fields BLOB, epoch INTEGER NOT NULL, receipt BLOB) WITHOUT ROWID;
-- Intents of a command that is under way, in one row; whatever becomes of it, they end or go into intents.
CREATE TABLE sent(n INTEGER PRIMARY KEY AUTOINCREMENT, intents BLOB NOT NULL);
-- Documents whose sync fields have to be brought up to date; gen counts the requests.
CREATE TABLE stamps(key BLOB PRIMARY KEY, id BLOB NOT NULL, gen INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
-- Open conflicts by document key; two keys may share one (a unique clash).
-- other: the document that holds the unique value.
CREATE TABLE open_conflicts(key BLOB PRIMARY KEY, conflict BLOB NOT NULL, kind TEXT NOT NULL, other BLOB) WITHOUT ROWID;
CREATE INDEX open_conflicts_id ON open_conflicts(conflict);
CREATE INDEX open_conflicts_other ON open_conflicts(other) WHERE other IS NOT NULL;
CREATE TABLE cases(conflict BLOB PRIMARY KEY, local BLOB, remote BLOB, fields TEXT NOT NULL,
  seen INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE overruled(key BLOB PRIMARY KEY, doc BLOB NOT NULL, gone BLOB) WITHOUT ROWID;
-- Records on their way into conflict_logs and sync_logs: fields to be set in the record with that _id,
-- in order; a repeat does no harm.
CREATE TABLE records(n INTEGER PRIMARY KEY AUTOINCREMENT, id BLOB NOT NULL, coll TEXT NOT NULL, doc BLOB NOT NULL);
CREATE TABLE differences(key BLOB PRIMARY KEY, id BLOB NOT NULL, kind TEXT, repair TEXT) WITHOUT ROWID;
CREATE TABLE walk(ns INTEGER NOT NULL, n INTEGER NOT NULL, first BLOB, last BLOB, exact INTEGER NOT NULL,
  wrapped INTEGER NOT NULL, documents INTEGER, known INTEGER NOT NULL, bytes INTEGER NOT NULL, PRIMARY KEY(ns, n)) WITHOUT ROWID;
CREATE TABLE gone(key BLOB PRIMARY KEY, id BLOB NOT NULL, side INTEGER NOT NULL) WITHOUT ROWID;
-- Of zstd, for the rows of base.
CREATE TABLE dictionaries(number INTEGER PRIMARY KEY, ns INTEGER NOT NULL, bytes BLOB NOT NULL);
CREATE TABLE definitions(ns INTEGER NOT NULL, tree INTEGER NOT NULL, body BLOB NOT NULL,
  PRIMARY KEY(ns, tree)) WITHOUT ROWID;
CREATE TABLE history(step INTEGER NOT NULL, at INTEGER NOT NULL, outbox INTEGER NOT NULL,
  inbox INTEGER NOT NULL, lag REAL NOT NULL, sent INTEGER NOT NULL, fetched INTEGER NOT NULL,
  sent_bytes INTEGER NOT NULL, fetched_bytes INTEGER NOT NULL, conflicts INTEGER NOT NULL,
  PRIMARY KEY(step, at)) WITHOUT ROWID;
CREATE TABLE link_history(n INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL,
  online INTEGER NOT NULL, reason TEXT);
CREATE TABLE activity(collection TEXT PRIMARY KEY, at INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta(k, v) VALUES('seq', 0);
";

/// A file whose existence asks for a full check at the next start.
pub(super) fn suspect_mark(path: &Path) -> PathBuf {
    path.with_extension("db.suspect")
}

/// Opens a file, or makes one, and brings it to the newest format.
pub(super) fn open(path: &Path) -> Result<Connection, StoreError> {
    open_with(path, migrations::STEPS)
}

/// The same with other steps from format to format.
pub(super) fn open_with(path: &Path, steps: &[&Step<'_>]) -> Result<Connection, StoreError> {
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
    // Before anything is written into it: what is not ours is left as it is.
    let format = migrations::examine(&conn, path, steps)?;
    // auto_vacuum must be set before the first table and journal_mode.
    conn.execute_batch("PRAGMA auto_vacuum=INCREMENTAL;")?;
    conn.query_row("PRAGMA journal_mode=WAL", [], |_| Ok(()))?;
    conn.execute_batch(
        "PRAGMA synchronous=FULL; PRAGMA temp_store=MEMORY; PRAGMA cache_size=-8000; PRAGMA wal_autocheckpoint=4000;",
    )?;
    conn.set_prepared_statement_cache_capacity(128);
    // The values bound to a long list are no reason to plan its statement anew.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    if format.is_some() {
        let thorough = suspect_mark(path).exists();
        check(&mut conn, thorough)?;
        if thorough && format == Some(migrations::newest(steps)) && !is_as_made(&conn)? {
            return Err(damaged(
                "the tables are not as this program made them".into(),
            ));
        }
    }
    migrations::bring_up(&conn, format, steps)?;
    let transaction = conn.transaction()?;
    sent::take_apart(&transaction, &Sent::default())?;
    transaction.commit()?;
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
        Ok(text) => Err(damaged(text)),
        // Out of time: no damage in what was seen; every row of base carries its own checksum.
        Err(rusqlite::Error::SqliteFailure(e, _))
            if e.code == rusqlite::ErrorCode::OperationInterrupted =>
        {
            Ok(())
        }
        Err(e) => Err(e.into()),
    }
}

fn damaged(how: String) -> StoreError {
    corrupt(how).into()
}

/// What SQLite would say of a damaged file.
pub(super) fn corrupt(how: String) -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(11), Some(how))
}

/// Whether a file has all that a new one has. SQLite's own check does not look at the names in a
/// definition.
fn is_as_made(conn: &Connection) -> rusqlite::Result<bool> {
    let new = Connection::open_in_memory()?;
    new.execute_batch(TABLES)?;
    Ok(definitions(&new)?.is_subset(&definitions(conn)?))
}

/// What a file has: of a table the columns, since a step of the migrations may have added some.
fn definitions(conn: &Connection) -> rusqlite::Result<HashSet<Vec<u8>>> {
    let columns =
        "SELECT t.name || ' ' || c.name || ' ' || c.type || ' ' || c.\"notnull\" || ' ' || c.pk
         FROM sqlite_schema t JOIN pragma_table_info(t.name) c WHERE t.type = 'table'";
    let others = "SELECT type || ' ' || name || ' ' || sql FROM sqlite_schema
         WHERE type <> 'table' AND sql IS NOT NULL";
    let mut all = HashSet::new();
    for sql in [columns, others] {
        let mut rows = conn.prepare(sql)?;
        let rows = rows.query_map([], |r| Ok(r.get_ref(0)?.as_bytes()?.to_vec()))?;
        for row in rows {
            all.insert(row?);
        }
    }
    Ok(all)
}
