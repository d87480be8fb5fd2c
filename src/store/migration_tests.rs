//! Formats of the state file: steps are whole or not there, and what is not ours is left alone.

use std::cell::Cell;

use bson::doc;

use super::migrations::{STEPS, Step, newest};
use super::queue::Change;
use super::*;
use crate::decide::Side;
use crate::key::{Id, Key};

/// A used file of the newest format, closed.
fn used(dir: &Path) -> PathBuf {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let store = Store::open(dir).unwrap();
        let fill = |c: &Connection| {
            for n in 0..200 {
                let content = doc! {"_id": n, "pad": "x".repeat(200)}.to_vec().unwrap();
                let id = Id::of(&content).unwrap();
                let key = Key::new(1, &id);
                base::put(c, &key, Some(&content))?;
                let hint = None;
                queue::enqueue(c, Side::Local, &[Change { key, id, hint }], 5)?;
            }
            Ok(())
        };
        store.call(fill).await.unwrap();
    });
    dir.join("sangam.db")
}

/// Opens a file as a later version would that takes further steps.
fn open(path: &Path, further: &[&Step<'_>]) -> Result<Connection, StoreError> {
    schema::open_with(path, &[STEPS, further].concat())
}

fn format(c: &Connection) -> i64 {
    c.query_row("PRAGMA user_version", [], |r| r.get(0))
        .unwrap()
}

/// All that is in a file: its tables, and every row of those that the steps touch.
fn dump(path: &Path, steps: &[&Step<'_>]) -> Vec<String> {
    let c = open(path, steps).unwrap();
    let mut all = vec![format!("{}", format(&c))];
    for query in [
        "SELECT quote(sql) FROM sqlite_master ORDER BY name",
        "SELECT quote(key) || quote(body) FROM base ORDER BY key",
        "SELECT quote(key) || pos || seq || quote(next_at) FROM outbox ORDER BY pos",
        "SELECT quote(ns) || held || n FROM counts",
    ] {
        let mut rows = c.prepare(query).unwrap();
        let rows = rows.query_map([], |r| r.get(0)).unwrap();
        all.extend(rows.map(Result::unwrap));
    }
    all
}

/// What a later version might do: a column more, another one rewritten, a table that is replaced; more
/// than the cache holds, so that a part of it is in the log before the end.
const LINES: [&str; 6] = [
    "ALTER TABLE base ADD COLUMN since INTEGER NOT NULL DEFAULT 0",
    "CREATE TABLE newer(key BLOB PRIMARY KEY, body BLOB NOT NULL)",
    "INSERT INTO newer SELECT key, zeroblob(100000) FROM base",
    "UPDATE outbox SET next_at = seq * 2",
    "UPDATE base SET since = 7",
    "DROP TABLE gone",
];

#[test]
fn a_step_is_whole_or_not_there_wherever_the_process_dies() {
    let root = tempfile::tempdir().unwrap();
    let path = used(&root.path().join("state"));
    let plain = |c: &Connection| LINES.iter().try_for_each(|line| c.execute_batch(line));
    let before = dump(&path, &[]);
    // As `kill -9` leaves it behind each line: the files as they are.
    let lines = Cell::new(0);
    let dying = |c: &Connection| {
        for line in LINES {
            c.execute_batch(line)?;
            let next = root.path().join(lines.get().to_string());
            std::fs::create_dir(&next).unwrap();
            for name in ["sangam.db", "sangam.db-wal"] {
                std::fs::copy(path.with_file_name(name), next.join(name)).unwrap();
            }
            lines.set(lines.get() + 1);
        }
        Ok(())
    };
    let after = dump(&path, &[&dying]);
    let now = newest(STEPS);
    assert_eq!(
        [&before[0], &after[0]].map(|n| n.parse::<i64>().unwrap()),
        [now, now + 1]
    );
    assert_ne!(before, after);
    let mut spilled = false;
    for n in 0..LINES.len() {
        let path = root.path().join(n.to_string()).join("sangam.db");
        let log = std::fs::metadata(path.with_extension("db-wal")).unwrap();
        spilled |= log.len() > 5 << 20;
        assert_eq!(dump(&path, &[]), before, "line {n}");
        assert_eq!(dump(&path, &[&plain]), after, "line {n}");
        // Behind it, it is not taken again.
        assert_eq!(dump(&path, &[&plain]), after, "line {n}");
    }
    assert!(spilled, "a part of a step was in the log before its end");
}

#[test]
fn steps_are_taken_in_order_and_one_that_fails_is_taken_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = used(dir.path());
    let (works, first) = (Cell::new(false), Cell::new(0));
    let one = |c: &Connection| {
        first.set(first.get() + 1);
        c.execute_batch("CREATE TABLE one(a)")
    };
    let two = |c: &Connection| {
        c.execute_batch("INSERT INTO one VALUES(1)")?;
        match works.get() {
            true => Ok(()),
            false => c.execute_batch("no such statement"),
        }
    };
    let steps: [&Step<'_>; 2] = [&one, &two];
    assert!(open(&path, &steps).is_err());
    works.set(true);
    let c = open(&path, &steps).unwrap();
    let now = newest(STEPS);
    assert_eq!((format(&c), first.get()), (now + 2, 1));
    let rows: i64 = (c.query_row("SELECT count(*) FROM one", [], |r| r.get(0))).unwrap();
    assert_eq!(rows, 1);
    drop(c);
    // AND who knows only one of them refuses the file, with both versions and the remedy
    let error = open(&path, &steps[..1]).unwrap_err().to_string();
    for part in [
        &format!("sangam {} (format {})", env!("CARGO_PKG_VERSION"), now + 2),
        &format!("up to format {}", now + 1),
        "install that version or a later one",
        "move the file away",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_file_of_somebody_else_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sangam.db");
    for foreign in [
        "CREATE TABLE theirs(a); INSERT INTO theirs VALUES(1)",
        "PRAGMA application_id=7",
        "PRAGMA user_version=1",
    ] {
        let _ = std::fs::remove_file(&path);
        let c = Connection::open(&path).unwrap();
        c.execute_batch(foreign).unwrap();
        drop(c);
        let bytes = std::fs::read(&path).unwrap();
        let error = open(&path, &[]).unwrap_err();
        assert!(matches!(error, StoreError::Unknown { .. }), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }
}
