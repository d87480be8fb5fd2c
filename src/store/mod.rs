//! The state store: one SQLite file, one thread, group commit.
//!
//! Everything that must survive a crash is in `state_dir/sangam.db`: outbox, inbox, base, intents,
//! stream tokens, holds, and records on their way into the local database. All calls go to one
//! thread, which runs those that wait together in one transaction (WAL, `synchronous=FULL`) and
//! answers after the commit, so an answer means "on disk" (R1, R2, R3).
//!
//! A second daemon on the same directory is refused by a lock. A file that is cut or garbled is put
//! aside under a name that says so; base is then rebuilt by a reconcile.

pub mod base;
pub mod cases;
pub mod claim;
pub mod definitions;
mod dictionaries;
pub mod differences;
pub mod intents;
pub mod lanes;
mod migrations;
pub mod queue;
pub mod records;
mod schema;
pub mod sent;
mod together;
pub mod transactions;
pub mod walks;

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dictionaries::Dictionaries;
pub(crate) use dictionaries::Packer;
use rusqlite::{Connection, ErrorCode, OptionalExtension};
use tokio::sync::oneshot;

/// Why the store could not be opened or used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process holds the lock.
    #[error(
        "another sangam already works in {0}; stop it first (systemctl stop sangam), or give this one its own state_dir"
    )]
    Locked(PathBuf),
    /// The directory can't be used.
    #[error(
        "state directory {path} can't be used: {source}; create it and give it to the user that runs sangam"
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file was written by a later version.
    #[error(
        "{path} was written by sangam {by} (format {found}), this is sangam {version} (up to format {known}): install that \
         version or a later one again, or move the file away, then both databases are compared anew",
        version = env!("CARGO_PKG_VERSION")
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// The version that opened it last.
        by: String,
        /// Its format.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// The file is somebody else's, or its first page is damaged.
    #[error(
        "{path} is not a state file of sangam: give it another state_dir, or move the file away, then both databases are compared anew"
    )]
    Unknown {
        /// The file.
        path: PathBuf,
    },
    /// SQLite failed.
    #[error("state store: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The store's thread is gone; only at shutdown.
    #[error("state store is closed")]
    Closed,
}

impl StoreError {
    /// The file is damaged: put it aside and rebuild.
    pub fn is_corrupt(&self) -> bool {
        matches!(self, Self::Sqlite(e) if is_corrupt(e))
    }

    /// No space left, or the file system went read-only.
    pub fn is_disk(&self) -> bool {
        use std::io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
        match self {
            Self::Sqlite(rusqlite::Error::SqliteFailure(e, _)) => matches!(
                e.code,
                ErrorCode::DiskFull
                    | ErrorCode::ReadOnly
                    | ErrorCode::SystemIoFailure
                    | ErrorCode::CannotOpen
            ),
            Self::Directory { source, .. } => matches!(
                source.kind(),
                QuotaExceeded | ReadOnlyFilesystem | StorageFull
            ),
            _ => false,
        }
    }
}

/// What SQLite says of a statement that names what is not there.
const UNKNOWN_NAME: [&str; 5] = [
    "no such column",
    "no such table",
    "no such function",
    "has no column named",
    "clause does not match any",
];

/// A name that is not there is a sign of damage as well: those in the statements of this program are, in
/// the tables as it made them.
fn is_corrupt(e: &rusqlite::Error) -> bool {
    let says = |text: &str| UNKNOWN_NAME.iter().any(|words| text.contains(words));
    match e {
        rusqlite::Error::SqliteFailure(e, text) => match e.code {
            ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => true,
            ErrorCode::Unknown => text.as_deref().is_some_and(says),
            _ => false,
        },
        rusqlite::Error::SqlInputError { msg, .. } => says(msg),
        _ => false,
    }
}

type Finish = Box<dyn FnOnce(Result<(), rusqlite::Error>) + Send>;
/// Work in a transaction that is `fresh` or has done something before; whether it failed, and how it ends.
type Job = Box<dyn FnOnce(&Connection, bool) -> (bool, Finish) + Send>;

/// Handle to the store; cheap to clone.
#[derive(Clone)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    /// Number of this run of the daemon; intents of earlier runs may still be on the wire.
    epoch: i64,
    /// Where a damaged file was put, if this start found one.
    put_aside: Option<PathBuf>,
    namespaces: Mutex<queue::Namespaces>,
    dictionaries: Arc<Dictionaries>,
    sent: sent::Sent,
    /// The disk refused the last write that was tried.
    refused: AtomicBool,
    _lock: File,
}

/// Most jobs folded into one transaction; more would only lengthen the wait of the first.
const GROUP: usize = 64;

impl Store {
    /// Opens or makes the store in `dir`.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let unusable = |source| StoreError::Directory {
            path: dir.to_owned(),
            source,
        };
        std::fs::create_dir_all(dir).map_err(unusable)?;
        restrict(dir, 0o700).map_err(unusable)?;
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(dir.join("sangam.lock"))
            .map_err(unusable)?;
        lock.try_lock()
            .map_err(|_| StoreError::Locked(dir.to_owned()))?;
        let path = dir.join("sangam.db");
        let mut put_aside = None;
        let conn = match schema::open(&path) {
            Err(e) if e.is_corrupt() => {
                put_aside = Some(set_aside(&path).map_err(unusable)?);
                schema::open(&path)?
            }
            other => other?,
        };
        let epoch = conn.query_row(
            "INSERT INTO meta(k, v) VALUES('epoch', 1) ON CONFLICT(k) DO UPDATE SET v = v + 1 RETURNING v",
            [],
            |r| r.get(0),
        )?;
        let namespaces = Mutex::new(queue::Namespaces::load(&conn)?);
        let dictionaries = Arc::new(Dictionaries::load(&conn)?);
        let (jobs, inbox) = mpsc::channel();
        let its = dictionaries.clone();
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || {
                its.adopt();
                serve(conn, &inbox);
            })
            .map_err(unusable)?;
        Ok(Self {
            jobs,
            inner: Arc::new(Inner {
                path,
                epoch,
                put_aside,
                namespaces,
                dictionaries,
                sent: Default::default(),
                refused: AtomicBool::new(false),
                _lock: lock,
            }),
        })
    }

    /// Number of this run of the daemon.
    pub fn epoch(&self) -> i64 {
        self.inner.epoch
    }

    /// Where a damaged state file was put at this start.
    pub fn put_aside(&self) -> Option<&Path> {
        self.inner.put_aside.as_deref()
    }

    /// Bytes of the state file and its log.
    pub fn bytes_on_disk(&self) -> u64 {
        let size = |p: &Path| std::fs::metadata(p).map_or(0, |m| m.len());
        size(&self.inner.path) + size(&self.inner.path.with_extension("db-wal"))
    }

    /// Directory of the state file.
    pub fn dir(&self) -> &Path {
        self.inner.path.parent().unwrap_or(Path::new("."))
    }

    /// Runs `work` in a transaction; the answer comes after the commit.
    pub async fn call<T, F>(&self, work: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    {
        self.run(work, false).await
    }

    /// Looks, to tell a person: where the disk refuses what others write, the answer comes all the same.
    /// It may then show what these have lost.
    pub async fn look<T, F>(&self, work: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    {
        self.run(work, true).await
    }

    async fn run<T, F>(&self, work: F, only_looks: bool) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |conn, fresh| {
            let outcome = match fresh {
                true => work(conn),
                false => in_savepoint(conn, work),
            };
            let failed = outcome.is_err();
            let finish: Finish = Box::new(move |committed| {
                // The receiver is gone only if its task was cancelled; then nobody wants the answer.
                let _ = reply.send(match committed {
                    Err(e) if !only_looks => Err(e),
                    _ => outcome,
                });
            });
            (failed, finish)
        });
        self.jobs.send(job).map_err(|_| StoreError::Closed)?;
        let outcome = answer.await.map_err(|_| StoreError::Closed)?;
        if let Err(e) = &outcome
            && is_corrupt(e)
        {
            // The next start checks the whole file and puts it aside if it is damaged indeed.
            let _ = std::fs::write(schema::suspect_mark(&self.inner.path), b"");
        }
        let outcome = outcome.map_err(StoreError::from);
        if outcome.as_ref().is_err_and(StoreError::is_disk) {
            self.inner.refused.store(true, Ordering::Relaxed);
        }
        if self.inner.dictionaries.is_due() {
            tokio::spawn(self.clone().learn());
        }
        outcome
    }

    /// The commands that are under way.
    pub fn sent(&self) -> &sent::Sent {
        &self.inner.sent
    }

    /// What packs contents for base.
    pub(crate) fn dictionaries(&self) -> &Dictionaries {
        &self.inner.dictionaries
    }

    /// Trains dictionaries and takes them into use. Without them all works as before, only larger.
    fn learn(self) -> futures::future::BoxFuture<'static, ()> {
        Box::pin(async move {
            let dictionaries = &self.inner.dictionaries;
            let training = dictionaries.clone();
            // Fails only when the daemon ends.
            let Ok(trained) = tokio::task::spawn_blocking(move || training.train()).await else {
                return;
            };
            let rows = trained.clone();
            match self.call(move |c| dictionaries::put(c, &rows)).await {
                Ok(()) => dictionaries.use_stored(trained),
                Err(error) => tracing::debug!(%error, "keeping a dictionary"),
            }
            dictionaries.trained();
        })
    }

    /// Whether the disk refuses writes. Once it did, a small write is tried: that alone tells that it
    /// takes them again.
    pub async fn is_refused(&self) -> Result<bool, StoreError> {
        if !self.inner.refused.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let now = chrono::Utc::now().timestamp_millis();
        match self.set_meta("disk_tried_at", now).await {
            Ok(()) => {
                self.inner.refused.store(false, Ordering::Relaxed);
                Ok(false)
            }
            Err(error) if error.is_disk() => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// A value kept under a name.
    pub async fn get_meta<T: rusqlite::types::FromSql + Send + 'static>(
        &self,
        name: &str,
    ) -> Result<Option<T>, StoreError> {
        let name = name.to_owned();
        self.call(move |c| get_meta(c, &name)).await
    }

    /// Keeps a value under a name.
    pub async fn set_meta<T: rusqlite::ToSql + Send + 'static>(
        &self,
        name: &str,
        value: T,
    ) -> Result<(), StoreError> {
        let name = name.to_owned();
        self.call(move |c| set_meta(c, &name, value)).await
    }
}

/// A value kept under a name, inside a call; one that was kept as NULL is none.
pub fn get_meta<T: rusqlite::types::FromSql>(
    c: &Connection,
    name: &str,
) -> rusqlite::Result<Option<T>> {
    c.prepare_cached("SELECT v FROM meta WHERE k = ?")?
        .query_row([name], |r| r.get(0))
        .optional()
        .map(Option::flatten)
}

/// Keeps a value under a name, inside a call.
pub fn set_meta(c: &Connection, name: &str, value: impl rusqlite::ToSql) -> rusqlite::Result<()> {
    c.prepare_cached("INSERT OR REPLACE INTO meta(k, v) VALUES(?, ?)")?
        .execute(rusqlite::params![name, value])?;
    Ok(())
}

fn in_savepoint<T>(
    conn: &Connection,
    work: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> Result<T, rusqlite::Error> {
    conn.prepare_cached("SAVEPOINT job")?.execute([])?;
    let outcome = work(conn);
    if outcome.is_err() {
        conn.prepare_cached("ROLLBACK TO job")?.execute([])?;
    }
    conn.prepare_cached("RELEASE job")?.execute([])?;
    outcome
}

fn serve(conn: Connection, jobs: &mpsc::Receiver<Job>) {
    let mut last_vacuum = Instant::now();
    while let Ok(first) = jobs.recv() {
        let mut finishes: Vec<Finish> = Vec::new();
        let began = conn.execute_batch("BEGIN IMMEDIATE");
        if began.is_ok() {
            // What comes first needs no savepoint, which costs a copy of every page that is touched.
            let (failed, finish) = first(&conn, true);
            if failed {
                // It may have been rolled back by itself. The caller is told what failed, not this.
                let _ = conn.execute_batch("ROLLBACK");
                finish(Ok(()));
                continue;
            }
            finishes.push(finish);
            while finishes.len() < GROUP {
                match jobs.try_recv() {
                    Ok(job) => finishes.push(job(&conn, false).1),
                    Err(_) => break,
                }
            }
        } else {
            finishes.push(Box::new(move |_| drop(first)));
        }
        let mut committed = began.and_then(|()| conn.execute_batch("COMMIT"));
        if committed.is_err() {
            // After a failed commit nothing of the group is on disk; every caller is told.
            let _ = conn.execute_batch("ROLLBACK");
        }
        for finish in finishes {
            finish(match &mut committed {
                Ok(()) => Ok(()),
                Err(e) => Err(copy_error(e)),
            });
        }
        if last_vacuum.elapsed() > Duration::from_secs(60) {
            last_vacuum = Instant::now();
            // What a burst took is given back, on disk and in memory.
            let tidy = "PRAGMA incremental_vacuum(2000); PRAGMA shrink_memory;";
            if let Err(error) = conn.execute_batch(tidy) {
                tracing::debug!(%error, "tidying the store");
            }
        }
    }
}

fn copy_error(e: &rusqlite::Error) -> rusqlite::Error {
    match e {
        rusqlite::Error::SqliteFailure(code, text) => {
            rusqlite::Error::SqliteFailure(*code, text.clone())
        }
        other => {
            rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(1), Some(other.to_string()))
        }
    }
}

fn restrict(path: &Path, mode: u32) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

/// Renames a damaged file and its companions; the new name says when.
fn set_aside(path: &Path) -> std::io::Result<PathBuf> {
    let stamp = chrono::Utc::now().format("%Y%m%dT%H%M%S");
    let aside = path.with_extension(format!("db.damaged-{stamp}"));
    std::fs::rename(path, &aside)?;
    for ext in ["db-wal", "db-shm"] {
        let companion = path.with_extension(ext);
        if companion.exists() {
            std::fs::rename(
                &companion,
                aside.with_extension(format!("damaged-{stamp}-{}", &ext[3..])),
            )?;
        }
    }
    let mark = schema::suspect_mark(path);
    if mark.exists() {
        std::fs::remove_file(mark)?;
    }
    Ok(aside)
}

#[cfg(test)]
pub(crate) use schema::TABLES;

#[cfg(test)]
mod damage_tests;
#[cfg(test)]
mod migration_tests;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
